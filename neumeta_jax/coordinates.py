"""Where each generated weight lies in model space.

One query asks for the 3x3 kernel slice between output channel `o` and input channel `c` of tensor
`i`, or for the bias of channel `o`. Its raw coordinates are (arXiv 2505.05510, section 3)

    (i, o, c, N, C_out, C_in)        for a kernel slice
    (i, o, 0, N, C,     1)           for a bias

with N the number of generated tensors. Queries form a grid: `o` varies along rows only, `c` along
columns only, the rest not at all. `Coordinates` keeps them apart, so that whatever is linear in an
encoding of single coordinates costs C_out + C_in evaluations instead of C_out * C_in.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.architecture import ResNetSpec

LAYERS = ("conv1", "conv2")
KINDS = ("kernel", "bias")
NOISE = ("query", "channel")


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """Tensors of equal role and shape, one per block, that are generated in one batched call.

    Attributes:
        name: for example "stage2_conv1_kernel".
        stage: of its blocks, from 1.
        layer, kind: "conv1" or "conv2"; "kernel" or "bias".
        positions: which generated blocks (positions in training order) the group covers.
        indices: the tensor index i of each, in 0..num_tensors - 1.
        num_tensors: N, the number of tensors the INR generates.
        rows, columns: sides of the query grid, the largest C_out and C_in.
        out_is_hidden, in_is_hidden: whether C_out (C_in) is the block's hidden width, which varies
            from network to network, or a width of the residual stream, which does not.
        num_outputs: values per query, 9 for a kernel slice and 1 for a bias.
        norm: what channel counts are divided by, the width of the widest stage.
    """

    name: str
    stage: int
    layer: str
    kind: str
    positions: tuple[int, ...]
    indices: tuple[int, ...]
    num_tensors: int
    rows: int
    columns: int
    out_is_hidden: bool
    in_is_hidden: bool
    num_outputs: int
    norm: int


def tensor_groups(spec: ResNetSpec, blocks: Sequence[int]) -> tuple[TensorGroup, ...]:
    """The generated tensors of `blocks`, stacked by (stage, stream shape, layer, kind).

    The tensor index counts in training order: conv1 kernel, conv1 bias, conv2 kernel, conv2 bias of
    the first generated block, then of the second. It does not depend on how many blocks training
    has reached.

    >>> from neumeta_jax.architecture import cifar_resnet, generated_blocks
    >>> spec = cifar_resnet(56, num_classes=100)
    >>> groups = tensor_groups(spec, generated_blocks(spec))
    >>> len(groups), sum(len(group.positions) for group in groups)
    (12, 92)
    """
    num_tensors = len(blocks) * len(LAYERS) * len(KINDS)
    gathered: dict[tuple, list[int]] = {}
    for position, n in enumerate(blocks):
        block = spec.blocks[n]
        gathered.setdefault((block.stage, block.in_width, block.out_width), []).append(position)
    groups = []
    for (stage, in_width, out_width), positions in gathered.items():
        hidden = max(spec.hidden_widths[blocks[p]] for p in positions)
        # The first block of a stage may read a narrower stream than the others.
        prefix = f"stage{stage}" if in_width == out_width else f"stage{stage}_entry"
        for number, (layer, kind) in enumerate((la, ki) for la in LAYERS for ki in KINDS):
            kernel = kind == "kernel"
            rows = hidden if layer == "conv1" else out_width
            columns = (in_width if layer == "conv1" else hidden) if kernel else 1
            groups.append(
                TensorGroup(
                    name=f"{prefix}_{layer}_{kind}",
                    stage=stage,
                    layer=layer,
                    kind=kind,
                    positions=tuple(positions),
                    indices=tuple(4 * p + number for p in positions),
                    num_tensors=num_tensors,
                    rows=rows,
                    columns=columns,
                    out_is_hidden=layer == "conv1",
                    in_is_hidden=layer == "conv2" and kernel,
                    num_outputs=9 if kernel else 1,
                    norm=max(spec.stage_widths),
                )
            )
    return tuple(groups)


def skipped_share(widths: jax.Array | np.ndarray, positions: Sequence[int]) -> jax.Array:
    """How many of the generated blocks at `positions` are skipped, float32 in [0, 1]; 0 of none."""
    if not positions:
        return jnp.zeros(())
    return jnp.mean((jnp.asarray(widths)[jnp.array(positions)] == 0).astype(jnp.float32))


class Coordinates(NamedTuple):
    """Six float32 arrays that broadcast against each other to [tensors, rows, columns]."""

    tensor: jax.Array
    out_channel: jax.Array
    in_channel: jax.Array
    num_tensors: jax.Array
    out_width: jax.Array
    in_width: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.broadcast_shapes(*(entry.shape for entry in self))


def raw_coordinates(group: TensorGroup, widths: jax.Array) -> Coordinates:
    """Coordinates of every query of `group` for hidden widths int[num_blocks] (may be traced).

    Channels from the width on get coordinates too (beyond the edge of the network); their weights
    are masked later. A width of 0 is treated as 1, to keep the quotients finite.
    """
    hidden = jnp.maximum(jnp.asarray(widths)[jnp.array(group.positions)], 1)
    hidden = hidden.astype(jnp.float32)[:, None, None]
    one = jnp.ones_like(hidden)
    return Coordinates(
        tensor=jnp.array(group.indices, jnp.float32)[:, None, None],
        out_channel=jnp.arange(group.rows, dtype=jnp.float32)[None, :, None],
        in_channel=jnp.arange(group.columns, dtype=jnp.float32)[None, None, :],
        num_tensors=group.num_tensors * one,
        out_width=hidden if group.out_is_hidden else group.rows * one,
        in_width=hidden if group.in_is_hidden else group.columns * one,
    )


def add_noise(
    key: jax.Array, coords: Coordinates, *, scale: float = 1.0, per: str = "query"
) -> Coordinates:
    """`coords + scale * clip(U(-0.5, 0.5), -0.49, 0.49)`, independently for all six entries.

    Args:
        scale: 1 moves a channel by up to half the distance to its neighbour (the papers' noise).
        per: "query" draws for every query, as the papers do, and makes the grid inseparable;
            "channel" draws once for each distinct coordinate, so that a channel moves as a whole.
    """
    if per not in NOISE:
        raise ValueError(f"noise must be drawn per one of {NOISE}, got {per!r}.")
    shapes = [coords.shape if per == "query" else entry.shape for entry in coords]
    sizes = [math.prod(shape) for shape in shapes]
    # One draw for all entries: the generator is most of the compiled code.
    noise = jax.random.uniform(key, (sum(sizes),), minval=-0.5, maxval=0.5)
    noise = jax.lax.optimization_barrier(scale * jnp.clip(noise, -0.49, 0.49))
    parts = jnp.split(noise, np.cumsum(sizes)[:-1])
    moved = [
        entry + part.reshape(shape)
        for entry, part, shape in zip(coords, parts, shapes, strict=True)
    ]
    return Coordinates(*moved)


def normalize(coords: Coordinates, norm: int) -> Coordinates:
    """(i/N, o/C_out, c/C_in, N/norm, C_out/norm, C_in/norm); the papers' norm is 64.

    Entries stay separate, and so does the grid where the noise left it separable.
    """
    return Coordinates(
        tensor=coords.tensor / coords.num_tensors,
        out_channel=coords.out_channel / coords.out_width,
        in_channel=coords.in_channel / coords.in_width,
        num_tensors=coords.num_tensors / norm,
        out_width=coords.out_width / norm,
        in_width=coords.in_width / norm,
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
    half_turns = x * np.exp2(np.arange(num_frequencies, dtype=np.float32))
    phase = jnp.pi * (half_turns - 2.0 * jnp.round(half_turns / 2.0))
    return jnp.concatenate([x, jnp.sin(phase), jnp.cos(phase)], axis=-1)
