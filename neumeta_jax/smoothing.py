"""Reorder the channels of a folded ResNet so that neighbouring channels carry similar weights.

An INR is smooth along the channel axis and the channels of a trained network come in no order.
Permuting them leaves the function of the network unchanged as long as every tensor that touches
a channel is permuted alike: these tensors form a clique. One order per clique is chosen by a
shortest Hamiltonian path through its channels. Runs once, offline, in float64 NumPy.

Method: NeuMeta (arXiv 2410.11878), for all blocks as in HTTY (arXiv 2505.05510).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.architecture import ResNetSpec
from neumeta_jax.resnet import Params

Path = tuple[str, ...]

MIN_GAIN = 1e-12  # of the largest distance; a smaller gain may be rounding, and could cycle


@dataclasses.dataclass(frozen=True)
class Clique:
    """Tensor axes that must be permuted together.

    Attributes:
        name: "stage1_block0_hidden", "stage1_stream", and so on.
        size: the number of channels.
        members: (path into the folded tree, axis), for example
            (("stage1_block0", "conv1", "kernel"), 3).
    """

    name: str
    size: int
    members: tuple[tuple[Path, int], ...]


def cliques(spec: ResNetSpec) -> tuple[Clique, ...]:
    """The cliques of `spec`: the hidden channels of each block, then the stream of each stage.

    Image channels and logits have a meaning and belong to no clique. A skipped block has no
    tensors and no clique. With `spec.shortcut` "pad" there are no stream cliques.

    >>> from neumeta_jax.architecture import cifar_resnet
    >>> len(cliques(cifar_resnet(56, num_classes=100)))
    30
    """
    hidden = []
    streams: list[list[tuple[Path, int]]] = [[] for _ in spec.stage_widths]
    streams[0] += _outputs("stem")
    stage = 0
    for block in spec.blocks:
        into, out_of = streams[stage], streams[block.stage - 1]
        stage = block.stage - 1
        if block.hidden_width == 0:
            continue
        conv1, conv2 = (block.name, "conv1"), (block.name, "conv2")
        members = (*_outputs(*conv1), ((*conv2, "kernel"), 2))
        hidden.append(Clique(f"{block.name}_hidden", block.hidden_width, members))
        into.append(((*conv1, "kernel"), 2))
        out_of += _outputs(*conv2)
        if block.projection:
            into.append(((block.name, "shortcut", "kernel"), 2))
            out_of += _outputs(block.name, "shortcut")
    streams[-1].append((("head", "kernel"), 0))
    if spec.shortcut == "pad":
        # A padded shortcut adds channel k of one stage to channel k + extra of the next, whatever
        # their weights: the streams are tied to these positions and cannot be permuted one by one.
        return tuple(hidden)
    return tuple(hidden) + tuple(
        Clique(f"stage{number}_stream", width, tuple(members))
        for number, (width, members) in enumerate(zip(spec.stage_widths, streams, strict=True), 1)
    )


def _outputs(*layer: str) -> tuple[tuple[Path, int], ...]:
    """The output axes of a convolution: the last of its HWIO kernel and that of its bias."""
    return ((*layer, "kernel"), 3), ((*layer, "bias"), 0)


def _member(params: Mapping, clique: Clique, path: Path, axis: int) -> np.ndarray:
    """The tensor at `path`, checked against the clique."""
    tensor: Any = params
    for name in path:
        if not isinstance(tensor, Mapping) or name not in tensor:
            raise ValueError(
                f"params must hold {'/'.join(path)} for the clique {clique.name} but do not; "
                "pass the spec that these params were made for."
            )
        tensor = tensor[name]
    tensor = np.asarray(tensor)
    if tensor.ndim <= axis or tensor.shape[axis] != clique.size:
        raise ValueError(
            f"Axis {axis} of {'/'.join(path)} must have the {clique.size} channels of the clique "
            f"{clique.name}, got the shape {tensor.shape}."
        )
    return tensor


def channel_rows(params: Mapping, clique: Clique) -> np.ndarray:
    """All weights that touch a channel, one row per channel.

    Returns:
        float64[size, features], in the order of the members of `clique`.
    """
    rows = []
    for path, axis in clique.members:
        tensor = _member(params, clique, path, axis)
        rows.append(np.moveaxis(tensor, axis, 0).reshape(clique.size, -1).astype(np.float64))
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


def total_variation(params: Mapping, spec: ResNetSpec) -> float:
    """How much the weights change from each channel to the next, over all cliques.

        TV = sum_q sum_k || rows_q[k + 1] - rows_q[k] ||_1,    rows_q = channel_rows(params, q)

    This is what `smooth` lowers (NeuMeta, arXiv 2410.11878). A kernel counts once along each of
    its channel axes that belongs to a clique.
    """
    rows = (channel_rows(params, clique) for clique in cliques(spec))
    return float(sum(np.abs(np.diff(r, axis=0)).sum() for r in rows))


def permute(params: Params, clique: Clique, order: np.ndarray) -> Params:
    """A new tree in which channel k of the clique is channel `order[k]` of `params`.

    The network computes the same function (up to the rounding of sums in another order).

    `order` is int[size], a permutation. The leaves are JAX arrays.
    """
    order = np.asarray(order)
    if not np.array_equal(np.sort(order, axis=None), np.arange(clique.size)) or order.ndim != 1:
        raise ValueError(
            f"order must be a permutation of 0, ..., {clique.size - 1} for the clique "
            f"{clique.name}, got {order.tolist()}."
        )
    permuted = jax.tree.map(jnp.asarray, params)  # new dicts around the same arrays
    for path, axis in clique.members:
        tensor = _member(permuted, clique, path, axis)
        layer = permuted
        for name in path[:-1]:
            layer = layer[name]
        layer[path[-1]] = jnp.asarray(np.take(tensor, order, axis=axis))
    return permuted


def smooth(params: Params, spec: ResNetSpec) -> tuple[Params, dict[str, np.ndarray]]:
    """The same function with channels in an order along which the weights are smooth.

    For every clique, with r_k the rows of `channel_rows`,

        order = argmin over permutations p of  sum_k || r_p(k + 1) - r_p(k) ||_1

    approximately, by `shortest_hamiltonian_path`. `total_variation` never rises.

    Returns:
        The permuted tree, and the order of each clique by name: new channel k is channel
        `order[k]` of `params`. Where no shorter path was found this is 0, 1, 2, ...
    """
    orders = {}
    smoothed = params
    # One pass suffices: other cliques permute the features of a row, for all rows alike, and an
    # L1 distance does not depend on the order of features.
    for clique in cliques(spec):
        distances = _l1_distances(channel_rows(params, clique))
        orders[clique.name] = shortest_hamiltonian_path(distances)
        smoothed = permute(smoothed, clique, orders[clique.name])
    return smoothed, orders


def importance_order(moments: np.ndarray, kernel: np.ndarray, *, ridge: float = 1e-3) -> np.ndarray:
    """Hidden channels from the one that is missed most to the one that is missed least.

    Channels are removed one at a time, each time the one whose removal costs least after the
    remaining ones have taken over its part by least squares: with H the moments of what remains
    and w_c what reads channel c,

        cost(c) = |w_c|^2 / (H^-1)_cc,     w <- w - (H^-1)_:c w_c / (H^-1)_cc

    This is Optimal Brain Surgeon (Hassibi and Stork, 1993) on whole channels.

    >>> importance_order(np.diag([1.0, 3.0, 2.0, 1.0]), np.ones((1, 1, 3, 1)))
    array([1, 2, 0])

    Args:
        moments: float[size + 1, size + 1], see `resnet.hidden_moments`.
        kernel: float[height, width, size, out], what reads the channels.
        ridge: of the least squares, relative to the diagonal.

    Returns:
        int64[size], a permutation.
    """
    moments = np.asarray(moments, np.float64)
    size = len(moments) - 1
    weights = np.moveaxis(np.asarray(kernel, np.float64), 2, 0).reshape(size, -1)
    weights = np.concatenate([weights, np.zeros((1, weights.shape[1]))])  # the constant
    diagonal = np.diag(moments)
    inverse = np.linalg.inv(moments + np.diag(ridge * diagonal + 1e-6 * diagonal.mean()))
    left = np.ones(size + 1, bool)
    removed = []
    for _ in range(size):
        cost = (weights**2).sum(axis=1) / np.where(left, np.diag(inverse), 1.0)
        cost[~left] = np.inf
        cost[size] = np.inf  # the constant stays
        c = int(cost.argmin())
        weights -= np.outer(inverse[:, c] / inverse[c, c], weights[c])
        inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        left[c] = False
        weights[~left] = 0.0
        removed.append(c)
    return np.array(removed[::-1], np.int64)


def by_importance(
    params: Params, spec: ResNetSpec, moments: Mapping[str, np.ndarray]
) -> tuple[Params, dict[str, np.ndarray]]:
    """The same function with the hidden channels of each block in `importance_order`.

    A nested family, which keeps the first channels, then loses the least. `moments` are those of
    `resnet.hidden_moments`, by block name; blocks without are left as they are.

    Returns:
        The permuted tree, and the order of each reordered clique by name.
    """
    orders = {}
    ordered = params
    for clique in cliques(spec):
        block = clique.name.removesuffix("_hidden")
        if block != clique.name and block in moments:
            kernel = _member(params, clique, (block, "conv2", "kernel"), 2)
            orders[clique.name] = importance_order(moments[block], kernel)
            ordered = permute(ordered, clique, orders[clique.name])
    return ordered, orders
