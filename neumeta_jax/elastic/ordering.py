"""Reorder the channels of a network so that neighbouring channels carry similar weights.

An INR is smooth along the channel axis and the channels of a trained network come in no order.
Permuting those of a group leaves the function of the network unchanged. One order per group is
chosen by a shortest Hamiltonian path through its channels, or by importance. Runs once, offline, in
float64 NumPy.

Method: NeuMeta (arXiv 2410.11878), for all blocks as in HTTY (arXiv 2505.05510).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from neumeta_jax.elastic.groups import Groups
from neumeta_jax.elastic.resize import permute

MIN_GAIN = 1e-12  # of the largest distance; a smaller gain may be rounding, and could cycle


def movable(groups: Groups) -> tuple[str, ...]:
    """The groups whose channels may be put in another order, though not all may be left out."""
    return groups.elastic("stream", "reduced", "paired", "unread", "unwritten", "unsound")


def channel_rows(groups: Groups, params: Any, name: str) -> np.ndarray:
    """All weights that touch a channel of the group `name`, one row per channel.

    Returns:
        float64[size, features], in the order of the members of the group.
    """
    leaves, size, rows = groups.leaves(params, {}), groups[name].size, []
    for path, axis in dict.fromkeys((m.path, m.axis) for m in groups[name].members):
        tensor = np.moveaxis(np.asarray(leaves[path], np.float64), axis, 0)
        # In a composed axis a channel has several places; what others have is alike in all rows.
        places = [groups.axes[path][axis].channels({name: np.array([k])}) for k in range(size)]
        rows.append(tensor[np.stack(places)].reshape(size, -1))
    return np.concatenate(rows, axis=1)


def _l1_distances(rows: np.ndarray) -> np.ndarray:
    """float64[n, n] of `rows`, float64[n, features]; symmetric to the last bit."""
    distances = np.zeros((len(rows), len(rows)))
    # Row by row, because all differences of a ResNet56's last stream at once fill 325 MB.
    for k in range(len(rows) - 1):
        distances[k, k + 1 :] = np.abs(rows[k + 1 :] - rows[k]).sum(axis=1)
    return distances + distances.T


def path_length(distances: np.ndarray, order: np.ndarray) -> float:
    """sum_k distances[order[k], order[k + 1]], the length of the open path `order`.

    >>> path_length(np.array([[0.0, 1, 5], [1, 0, 2], [5, 2, 0]]), np.array([0, 1, 2]))
    3.0
    """
    order = np.asarray(order, np.int64)
    return float(np.asarray(distances, np.float64)[order[:-1], order[1:]].sum())


def shortest_hamiltonian_path(distances: np.ndarray) -> np.ndarray:
    """A short open path through all nodes: nearest neighbour, then 2-opt.

    From every node it goes to the nearest node left, again and again, then reverses segments
    while that shortens the path (2-opt: Croes, 1958); the shortest result wins. A heuristic for
    an NP-hard problem: deterministic, and never longer than the order 0, 1, ..., n - 1. Of a
    path and its reverse it returns the one that starts at the smaller node. Relabelling the nodes
    relabels the path, up to that choice and to ties.

    >>> x = np.array([0.0, 3.0, 1.0, 2.0])
    >>> shortest_hamiltonian_path(np.abs(x[:, None] - x))
    array([0, 2, 3, 1])

    Args:
        distances: float64[n, n], symmetric; the diagonal has no meaning.

    Returns:
        int64[n], a permutation.

    Raises:
        ValueError: if `distances` is not square, finite, non-negative and symmetric.
    """
    distances = np.asarray(distances, np.float64)
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances must be a square matrix, got the shape {distances.shape}.")
    if not np.isfinite(distances).all():
        raise ValueError("distances must be finite, got NaN or infinity; check the weights.")
    if (distances < 0).any():
        raise ValueError(f"distances must be non-negative, got {distances.min()}.")
    if not np.array_equal(distances, distances.T):
        raise ValueError("distances must be symmetric; average them with their transpose.")

    best = np.arange(len(distances), dtype=np.int64)
    if len(best) <= 2:
        return best
    # The start that gives the shortest greedy path often isn't the one that 2-opt improves most.
    for start in _nearest_neighbour_paths(distances):
        order = _two_opt(start, distances)
        order = order if order[0] < order[-1] else order[::-1]
        if path_length(distances, order) < path_length(distances, best):
            best = order
    return best.copy()


def _nearest_neighbour_paths(distances: np.ndarray) -> np.ndarray:
    """int64[n, n]: row s starts at node s and always goes on to the nearest node left."""
    rows = np.arange(len(distances))
    paths = np.tile(rows[:, None], len(rows)).astype(np.int64)
    visited = np.eye(len(rows), dtype=bool)
    for step in range(1, len(rows)):
        ahead = np.where(visited, np.inf, distances[paths[:, step - 1]])
        paths[:, step] = ahead.argmin(axis=1)
        visited[rows, paths[:, step]] = True
    return paths


def _two_opt(order: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """`order` after the best reversal of a segment, again and again until none shortens it.

    Reversing path[i..j] replaces the edges (i - 1, i) and (j, j + 1) by (i - 1, j) and (i, j + 1).
    """
    n = len(order)
    # A node at distance 0 from all others closes both ends, which then need no special case.
    padded = np.pad(distances, (0, 1))
    path = np.concatenate([[n], order, [n]])
    while True:
        between = padded[np.ix_(path, path)]
        edges = np.diagonal(between, 1)
        gains = edges[:-1, None] + edges[1:] - between[:-2, 1:-1] - between[1:-1, 2:]
        gains = np.triu(gains, 1)  # [i - 1, j - 1], i < j
        i, j = np.unravel_index(gains.argmax(), gains.shape)
        if gains[i, j] <= MIN_GAIN * distances.max():
            return path[1:-1]
        path[i + 1 : j + 2] = path[i + 1 : j + 2][::-1].copy()


def total_variation(groups: Groups, params: Any) -> float:
    """How much the weights change from each channel to the next, over all movable groups.

        TV = sum_q sum_k || rows_q[k + 1] - rows_q[k] ||_1,    rows_q = channel_rows(..., q)

    This is what `smooth` lowers (NeuMeta, arXiv 2410.11878). A kernel counts once along each of
    its channel axes that belongs to a group.
    """
    rows = (channel_rows(groups, params, name) for name in movable(groups))
    return float(sum(np.abs(np.diff(r, axis=0)).sum() for r in rows))


def smooth(groups: Groups, params: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The same function with channels in an order along which the weights are smooth.

    For every movable group, with r_k the rows of `channel_rows`,

        order = argmin over permutations p of  sum_k || r_p(k + 1) - r_p(k) ||_1

    approximately, by `shortest_hamiltonian_path`. `total_variation` never rises.

    Returns:
        The permuted tree, and the order of each group by name: new channel k is channel `order[k]`
        of `params`. Where no shorter path was found this is 0, 1, 2, ...
    """
    # The orders do not depend on each other: those of other groups permute the features of a row,
    # for all rows alike, and an L1 distance does not depend on the order of features.
    orders = {
        name: shortest_hamiltonian_path(_l1_distances(channel_rows(groups, params, name)))
        for name in movable(groups)
    }
    return permute(groups, params, orders), orders


def importance_order(
    moments: Mapping[str, np.ndarray], kernels: Mapping[str, np.ndarray], *, ridge: float = 1e-3
) -> np.ndarray:
    """Channels from the one that is missed most to the one that is missed least.

    Channels are removed one at a time, each time the one whose removal costs least after the
    remaining ones have taken over its part by least squares: with H the moments of what remains
    and w_c what reads channel c,

        cost(c) = |w_c|^2 / (H^-1)_cc,     w <- w - (H^-1)_:c w_c / (H^-1)_cc

    This is Optimal Brain Surgeon (Hassibi and Stork, 1993) on whole channels. Where several
    products read the channels, their costs add up.

    >>> importance_order({"w": np.diag([1.0, 3.0, 2.0, 1.0])}, {"w": np.ones((3, 1))})
    array([1, 2, 0])

    Args:
        moments: float[size + 1, size + 1] by reader, see `moments.moments`.
        kernels: float[size, features] by reader, what reads the channels.
        ridge: of the least squares, relative to the diagonal.

    Returns:
        int64[size], a permutation.
    """
    weights, inverses = [], []
    for path, kernel in kernels.items():
        moment = np.asarray(moments[path], np.float64)
        diagonal = np.diag(moment)
        loaded = moment + np.diag(ridge * diagonal + 1e-6 * diagonal.mean())
        inverses.append(np.linalg.inv(loaded))
        weights.append(np.pad(np.asarray(kernel, np.float64), ((0, 1), (0, 0))))  # the constant
    size = len(inverses[0]) - 1
    left = np.ones(size + 1, bool)
    removed = []
    for _ in range(size):
        cost = np.zeros(size + 1)
        for w, inverse in zip(weights, inverses, strict=True):
            cost += (w**2).sum(axis=1) / np.where(left, np.diag(inverse), 1.0)
        cost[~left] = np.inf
        cost[size] = np.inf  # the constant stays
        c = int(cost.argmin())
        left[c] = False
        for w, inverse in zip(weights, inverses, strict=True):
            w -= np.outer(inverse[:, c] / inverse[c, c], w[c])
            inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
            w[~left] = 0.0
        removed.append(c)
    return np.array(removed[::-1], np.int64)


def importance_orders(
    groups: Groups, params: Any, moments: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`importance_order` of each movable group that is read, as a whole axis, by what has moments.

    `moments` are those of `moments.moments`, by path.
    """
    leaves, orders = groups.leaves(params, {}), {}
    for name in movable(groups):
        kernels, of_kernels, size = {}, {}, groups[name].size
        for path, reads in ((reader.path, reader.reads) for reader in groups.readers):
            of_tensor = groups.axes[path]
            if path not in moments or [of_tensor[n].group for n in reads] != [name]:
                continue
            layers = [n for n, axis in enumerate(of_tensor) if axis.kind == "layers"]
            first = (*layers, *reads)
            kernel = np.moveaxis(np.asarray(leaves[path]), first, range(len(first)))
            number = math.prod(kernel.shape[: len(layers)])
            each = (x.reshape(number, size + n, -1) for n, x in enumerate((kernel, moments[path])))
            for layer, (kernel, moment) in enumerate(zip(*each, strict=True)):
                kernels[f"{path}:{layer}"], of_kernels[f"{path}:{layer}"] = kernel, moment
        if kernels:
            orders[name] = importance_order(of_kernels, kernels)
    return orders


def by_importance(
    groups: Groups, params: Any, moments: Mapping[str, np.ndarray]
) -> tuple[Any, dict[str, np.ndarray]]:
    """The same function with channels in `importance_orders`; groups without moments stay.

    A nested family, which keeps the first channels, then loses the least.

    Returns:
        The permuted tree, and the order of each reordered group by name.
    """
    orders = importance_orders(groups, params, moments)
    return permute(groups, params, orders), orders
