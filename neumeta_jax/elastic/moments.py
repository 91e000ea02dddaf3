"""Second moments of the channels that products read, which a least-squares projection needs."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from neumeta_jax.elastic.axes import Axis
from neumeta_jax.elastic.family import Family, apply_at


def moments(family: Family, params: Any, x: Any, names: Iterable[str]) -> dict[str, jax.Array]:
    """Second moments of the channels that each reader of the groups `names` sees, at full size.

        M = E[(h, 1) (h, 1)^T]    over examples, positions, taps' places and uses

    Call it under `jax.jit`, or all activations stay alive.

    Args:
        family: of the network.
        params: a tree like the one traced.
        x: inputs.
        names: of groups.

    Returns:
        float32[n + 1, n + 1] by the path of the reader, of stacked layers float32[layers, n + 1,
        n + 1]; the last row holds the means.
    """
    sums = moment_sums(family, params, x, names)
    return {path: total / total[..., -1:, -1:] for path, total in sums.items()}


def moment_sums(family: Family, params: Any, x: Any, names: Iterable[str]) -> dict[str, jax.Array]:
    """The sums of which `moments` are the means; the last entry counts the terms."""
    wanted = set(names)
    sums: dict[str, dict[int, jax.Array]] = collections.defaultdict(dict)
    readers = {reader.path: reader for reader in family.groups.readers}

    def observe(step, arrays, layer):
        if step.weight is None or step.contracted is None:
            return
        weight = step.inputs[step.weight]
        if not weight.view or not weight.sources <= readers.keys():
            return
        (path,) = weight.sources
        reads = {n: family.groups.axes[path][n] for n in readers[path].reads}
        if not wanted & {name for axis in reads.values() for name in axis.groups()}:
            return
        # Which axis of the activations each axis of the parameter is summed with; taps have none.
        pairs = zip(step.contracted[step.weight], step.contracted[1 - step.weight], strict=False)
        axes = {mine: axis for its, mine in pairs for _, axis in weight.dims[its].origins}
        order = sorted(axes, key=lambda mine: axes[mine])  # as in the parameter
        h = jnp.moveaxis(arrays[1 - step.weight], order, range(len(order)))
        channels = {n: reads[axes[mine]] for n, mine in enumerate(order) if axes[mine] in reads}
        h = _channels_first(h, channels).astype(jnp.float32)
        h = jnp.pad(h, ((0, 1), (0, 0)), constant_values=1.0)
        sums[path][layer] = sums[path].get(layer, 0) + h @ h.T

    apply_at(family, params, x, {}, observe)
    totals = {}
    for path, parts in sums.items():
        stacked = any(axis.kind == "layers" for axis in family.groups.axes[path])
        totals[path] = jnp.stack([parts[n] for n in sorted(parts)]) if stacked else parts[0]
    return totals


def _channels_first(x: jax.Array, axes: Mapping[int, Axis]) -> jax.Array:
    """float[channels, rest], where `axes` tells which axes of `x` have channels."""
    shape, channels = [], []
    for n, size in enumerate(x.shape):
        for factor in axes[n].factors() if n in axes else (Axis("fixed", size),):
            if any(factor.groups()):
                channels.append(len(shape))
            shape.append(factor.size)
    x = jnp.moveaxis(x.reshape(shape), channels, range(len(channels)))
    return x.reshape(math.prod(x.shape[: len(channels)]), -1)
