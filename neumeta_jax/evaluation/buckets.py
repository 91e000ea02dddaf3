"""A handful of network shapes that hold many networks.

XLA compiles one program for one set of shapes, and compiling takes as long as evaluating a network
or longer. Networks of many widths are therefore put into a few containers, each the elementwise
maximum of the widths that it holds, in which the channels beyond a network's width are zero. No
JAX import.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from neumeta_jax.errors import UsageError

Count = Callable[[np.ndarray], np.ndarray]  # multiply-adds int64[rows] of widths int64[rows, names]

MAX_RUNS = 1000


class Bucket(NamedTuple):
    """Networks that are evaluated at one shape.

    Attributes:
        container: widths that hold every member; 0 where all members skip the branch.
        members: the rows that it holds, increasing.
    """

    container: tuple[int, ...]
    members: tuple[int, ...]


def make_buckets(
    num_macs: Count,
    widths: np.ndarray,
    *,
    max_buckets: int = 8,
    macs_per_bucket: float = 0.0,
) -> list[Bucket]:
    """At most `max_buckets` buckets that pad few multiply-adds, in the order of first members.

    Minimises, greedily,

        sum over rows of MACs(container of the row) + macs_per_bucket * number of buckets

    by merging, from one bucket for each row on, the two whose union costs least. For widths of one
    ratio per network the padding is within half a percent of the best contiguous partition of the
    networks in order of size; for widths drawn block by block it finds networks that are large in
    the same blocks, but the more blocks vary independently, the closer any eight containers are to
    the full size. Counts rows^2 networks and makes rows^3 comparisons in NumPy. Beyond 1,000 rows
    neighbours in order of size start as one bucket.

    >>> widths = np.array([[4, 8], [15, 30], [5, 8], [16, 0]])
    >>> make_buckets(lambda rows: rows @ [2, 1], widths, max_buckets=2)
    [Bucket(container=(5, 8), members=(0, 2)), Bucket(container=(16, 30), members=(1, 3))]

    Args:
        num_macs: multiply-adds of networks by their widths.
        widths: int[rows, names]; 0 = branch skipped.
        max_buckets: how many shapes are allowed.
        macs_per_bucket: what a further shape costs, in multiply-adds of one image.
    """
    rows = np.asarray(widths, np.int64)
    order = np.argsort(num_macs(rows), kind="stable")
    runs = np.array_split(order, min(len(order), MAX_RUNS))
    containers = np.array([rows[run].max(axis=0) for run in runs])
    counts = np.array([len(run) for run in runs], np.float64)
    buckets = []
    for group in _merge(containers, counts, num_macs, max_buckets, macs_per_bucket):
        members = np.sort(np.concatenate([runs[n] for n in group]))
        container = rows[members].max(axis=0)
        buckets.append(Bucket(tuple(container.tolist()), tuple(members.tolist())))
    return sorted(buckets, key=lambda bucket: bucket.members[0])


def fill_containers(
    num_macs: Count, widths: np.ndarray, containers: Sequence[Sequence[int]]
) -> list[Bucket]:
    """Each network in the cheapest of the given `containers` that holds it; empty ones left out.

    Raises:
        ValueError: if a network is held by none.
    """
    rows = np.asarray(widths, np.int64)
    shapes = np.array(containers, np.int64).reshape(-1, rows.shape[1])
    costs = container_macs(num_macs, rows, shapes)
    for lost in np.flatnonzero(np.isinf(costs).all(axis=1)):
        raise UsageError(
            f"Each network must fit into one of the {len(shapes)} containers, but the one of row "
            f"{lost}, {rows[lost].tolist()}, fits into none; add a larger one."
        )
    chosen = np.argmin(costs, axis=1)
    buckets = [
        Bucket(tuple(shape.tolist()), tuple(np.flatnonzero(chosen == number).tolist()))
        for number, shape in enumerate(shapes)
    ]
    return sorted((b for b in buckets if b.members), key=lambda bucket: bucket.members[0])


def container_macs(num_macs: Count, widths: np.ndarray, containers: np.ndarray) -> np.ndarray:
    """float64[rows, containers], multiply-adds of a row in a container; inf if it does not fit."""
    fits = np.all(np.asarray(widths)[:, None] <= containers[None], axis=2)
    return np.where(fits, num_macs(containers).astype(np.float64), np.inf)


def _merge(containers, counts, num_macs, max_buckets, macs_per_bucket):
    """Lists of the rows of `containers` that share a bucket, by greedy agglomeration."""
    number, macs = len(containers), num_macs(containers).astype(np.float64)
    groups, alive = [[n] for n in range(number)], np.ones(number, bool)

    def increases(n):
        """What merging each of the others with `n` adds to the padded multiply-adds."""
        union = num_macs(np.maximum(containers[n], containers))
        added = (counts[n] + counts) * union - counts[n] * macs[n] - counts * macs
        return np.where(alive & (np.arange(number) != n), added, np.inf)

    table = np.stack([increases(n) for n in range(number)])
    for left in range(number, 1, -1):
        a, b = np.unravel_index(np.argmin(table), table.shape)
        if left <= max_buckets and table[a, b] > macs_per_bucket:
            break
        containers[a] = np.maximum(containers[a], containers[b])
        counts[a] += counts[b]
        macs[a] = num_macs(containers[a : a + 1])[0]
        groups[a] += groups[b]
        alive[b] = False
        table[b] = table[:, b] = np.inf
        table[a] = table[:, a] = increases(a)
    return [group for group, kept in zip(groups, alive, strict=True) if kept]
