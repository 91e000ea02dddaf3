"""Networks of a family at other widths: masked at full shape, and dense.

Widths are ints by group name; groups that are not among them have their full size.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from neumeta_jax.elastic.axes import Axis
from neumeta_jax.elastic.groups import Groups


def _skipped(groups: Groups, path: str, widths: Mapping) -> list:
    """Widths of the residual branches that are the identity only if the parameter is zero."""
    return [widths[g.name] for g in groups.groups if path in (g.skips or ()) and g.name in widths]


def mask_axes(x: Any, axes: tuple, widths: Mapping, sizes: Mapping = {}) -> Any:
    """`x`, of the shape at `sizes`, with channels that are not there at `widths` set to zero."""
    for n, axis in enumerate(axes):
        if any(name in widths for name in axis.groups()):
            keep = axis.mask(widths, sizes).reshape((-1,) + (1,) * (x.ndim - n - 1))
            # `where`, not a product: what is masked may be anything, and its gradient must be zero.
            x = jnp.where(keep, x, 0)
    return x


def masked_axes(groups: Groups, path: str) -> tuple[Axis, ...]:
    """The axes of a parameter for `mask_axes`, those along which it is not masked as fixed ones."""
    return tuple(
        Axis("fixed", axis.size) if (path, n) in groups.unmasked else axis
        for n, axis in enumerate(groups.axes[path])
    )


def take_axes(x: Any, axes: tuple, channels: Mapping) -> Any:
    """`x` with the channels int[any] of each group in `channels`, in this order."""
    for n, axis in enumerate(axes):
        if any(name in channels for name in axis.groups()):
            # JAX would compile a program for each shape; arrays of NumPy stay NumPy's.
            take = np.take if isinstance(x, np.ndarray) else jnp.take
            x = take(x, axis.channels(channels), n)
    return x


def mask_params(groups: Groups, params: Any, widths: Mapping) -> Any:
    """`params` with channels from the width on set to zero; widths may be traced.

    The result computes, at a shape that does not depend on the widths, what the network that
    `slice_params` cuts out computes. Residual branches of width 0 are the identity. What is frozen
    keeps its values where only a 0 would be seen, see `Groups.unmasked`.

    Raises:
        ValueError: for widths or parameters that are not of this network.
    """
    groups.check(widths)

    def mask(path, axes, x):
        x = mask_axes(x, masked_axes(groups, path), widths)
        for width in _skipped(groups, path, widths):
            x = jnp.where(width > 0, x, 0)
        return x

    return groups.map(mask, params, {})


def select(groups: Groups, params: Any, channels: Mapping) -> Any:
    """`params` with the channels int[any] of each group in `channels`, in this order.

    Raises:
        ValueError: for groups or channels that there are not.
    """
    sizes = groups.sizes(name for name in channels if name in groups.by_name)
    groups.check({name: sizes.get(name, 0) for name in channels})
    for name, chosen in channels.items():
        if len(chosen) and not 0 <= min(chosen) <= max(chosen) < sizes[name]:
            raise ValueError(
                f"The channels of {name} are 0 to {sizes[name] - 1}, got {list(chosen)}."
            )

    return groups.map(lambda path, axes, x: take_axes(x, axes, channels), params, {})


def slice_params(groups: Groups, params: Any, widths: Mapping[str, int]) -> Any:
    """The parameters of the dense network inside, for `family.apply_at`.

    Raises:
        ValueError: for widths or parameters that are not of this network.
    """
    groups.check(widths)
    sliced = select(groups, params, {name: np.arange(width) for name, width in widths.items()})

    def skip(path, axes, x):
        return jnp.zeros_like(x) if 0 in _skipped(groups, path, widths) else x

    return groups.map(skip, sliced)


def permute(groups: Groups, params: Any, orders: Mapping) -> Any:
    """`params` with channel k of a group in place of its channel `orders[group][k]`.

    The network computes the same function, up to the rounding of sums in another order.

    Raises:
        ValueError: for groups that there are not, or orders that are not permutations.
    """
    for name, order in orders.items():
        size = groups.by_name[name].size if name in groups.by_name else len(order)
        if np.ndim(order) != 1 or sorted(order) != list(range(size)):
            raise ValueError(
                f"The order of {name} must be a permutation of 0, ..., {size - 1}, got "
                f"{np.asarray(order).tolist()}."
            )
    return select(groups, params, orders)
