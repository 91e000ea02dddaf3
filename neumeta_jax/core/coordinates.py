"""Where each generated weight lies in model space.

One query asks for the outputs between output channel `o` and input channel `c` of tensor `i`: the
slice of a 3x3 kernel, or for a bias one number. Its raw coordinates are (arXiv 2505.05510,
section 3)

    (i, o, c, N, C_out, C_in)        for a kernel slice
    (i, o, 0, N, C,     1)           for a bias

with N the number of generated tensors; where an axis is a product, such as heads x head size, each
of its factors has a coordinate and a width. Queries form a grid: `o` varies along rows only, `c`
along columns only, the rest not at all. `Coordinates` keeps them apart, so that whatever is linear
in an encoding of single coordinates costs C_out + C_in evaluations instead of C_out * C_in.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core.stacks import TensorStack

NOISE = ("query", "channel")


class Coordinates(NamedTuple):
    """Pairs of float32 arrays, all of which broadcast to [tensors, rows, columns].

    Attributes:
        places: (i, o, c), more of them where an axis has factors.
        limits: (N, C_out, C_in), what each of the places counts up to.
    """

    places: tuple[jax.Array, ...]
    limits: tuple[jax.Array, ...]

    @property
    def entries(self) -> tuple[jax.Array, ...]:
        return self.places + self.limits

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.broadcast_shapes(*(entry.shape for entry in self.entries))

    @classmethod
    def of(cls, entries) -> "Coordinates":
        entries = tuple(entries)
        return cls(entries[: len(entries) // 2], entries[len(entries) // 2 :])


def raw_coordinates(stack: TensorStack, widths: jax.Array) -> Coordinates:
    """Coordinates of every query of `stack` for widths int[names] (may be traced).

    Channels from the width on get coordinates too (beyond the edge of the network); their weights
    are masked later. A width of 0 is treated as 1, to keep the quotients finite.
    """
    widths = jnp.maximum(jnp.asarray(widths), 1).astype(jnp.float32)
    places = [jnp.array(stack.indices, jnp.float32)[:, None, None]]
    limits = [jnp.full_like(places[0], stack.num_tensors)]
    for side, shape in ((stack.rows, (1, -1, 1)), (stack.columns, (1, 1, -1))):
        index, stride = np.arange(side.size), side.size
        for factor in side.factors:
            stride //= factor.size
            place = index // stride % factor.size
            places.append(jnp.array(place, jnp.float32).reshape(shape))
            limits.append(factor.width(widths)[:, None, None])
    return Coordinates(tuple(places), tuple(limits))


def fan_in(stack: TensorStack, coords: Coordinates) -> jax.Array:
    """[tensors, 1, 1]: over how many channels a product sums, 1 for a bias."""
    first, *rest = coords.limits[1 + len(stack.rows.factors) :]
    return functools.reduce(jnp.multiply, rest, first)


def add_noise(
    key: jax.Array, coords: Coordinates, *, scale: float = 1.0, per: str = "query"
) -> Coordinates:
    """`coords + scale * clip(U(-0.5, 0.5), -0.49, 0.49)`, independently for all entries.

    Args:
        scale: 1 moves a channel by up to half the distance to its neighbour (the papers' noise).
        per: "query" draws for every query, as the papers do, and makes the grid inseparable;
            "channel" draws once for each distinct coordinate, so that a channel moves as a whole.
    """
    if per not in NOISE:
        raise ValueError(f"noise must be drawn per one of {NOISE}, got {per!r}.")
    entries = coords.entries
    shapes = [coords.shape if per == "query" else entry.shape for entry in entries]
    sizes = [math.prod(shape) for shape in shapes]
    # One draw for all entries: the generator is most of the compiled code.
    noise = jax.random.uniform(key, (sum(sizes),), minval=-0.5, maxval=0.5)
    noise = jax.lax.optimization_barrier(scale * jnp.clip(noise, -0.49, 0.49))
    parts = jnp.split(noise, np.cumsum(sizes)[:-1])
    return Coordinates.of(
        entry + part.reshape(shape)
        for entry, part, shape in zip(entries, parts, shapes, strict=True)
    )


def normalize(coords: Coordinates, norm: int, *, relative: bool = True) -> Coordinates:
    """(i/N, o/C_out, c/C_in, N/norm, C_out/norm, C_in/norm); the papers' norm is 64.

    Unless `relative`, o and c are divided by the norm too. Entries stay separate, and so does the
    grid where the noise left it separable.
    """
    tensor, *channels = zip(coords.places, coords.limits, strict=True)
    places = [place / (limit if relative else norm) for place, limit in channels]
    return Coordinates(
        places=(tensor[0] / tensor[1], *places),
        limits=tuple(limit / norm for limit in coords.limits),
    )


def fourier_features(x: jax.Array, num_frequencies: int) -> jax.Array:
    """`[x, sin(2^f pi x), cos(2^f pi x)]` for f = 0..num_frequencies - 1, float32[..., 1 + 2F].

    `2^f x` is reduced to [-1, 1] before the sine; scaling by a power of two and the reduction are
    exact in float32, so the result does not depend on a backend's sine of large arguments. The
    rounding of `x` itself (2^-24) still makes phases meaningless from about f = 22 on.

    >>> [round(float(x), 3) for x in fourier_features(jnp.array(0.25), 1)]
    [0.25, 0.707, 0.707]
    """
    x = x.astype(jnp.float32)[..., None]
    # NumPy's powers of two are exact; XLA's exp2 is not.
    powers = np.exp2(np.arange(num_frequencies, dtype=np.float32))
    half_turns = x * powers.reshape((1,) * (x.ndim - 1) + (-1,))
    phase = jnp.pi * (half_turns - 2.0 * jnp.round(half_turns / 2.0))
    return jnp.concatenate([x, jnp.sin(phase), jnp.cos(phase)], axis=-1)
