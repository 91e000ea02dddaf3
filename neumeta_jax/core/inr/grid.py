"""Learned values on a grid of channels, interpolated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core.inr.base import INR, mean_ratio
from neumeta_jax.core.stacks import Side, full_widths, identities

RESAMPLING = ("cell", "nested")


@dataclasses.dataclass(frozen=True)
class Grid(INR):
    """Learned values on a grid of channels, interpolated, and conditioned on the width.

    With w the width over the full width, for a tensor with several such axes their mean, before
    resampling,

        V(w) = sum over m < num_terms of (1 - w)^m G_m

    with one value of each G_m for every weight of the full-size tensor. "cell" resampling gives
    channel j of a network with C channels the mean of V over [j / C, (j + 1) / C) of the relative
    channel axis, V being constant over each of its own cells; what reads channels is
    multiplied by full / C, the quadrature that keeps sums over inputs (Integral Neural Networks,
    Solodskikh et al., CVPR 2023). "nested" resampling takes the first C channels, as slimmable
    networks do; beyond full size it adds channels of zeros.

    It has `num_terms` times the parameters of what it generates, generation is one small matrix
    product per tensor, and it starts at the teacher exactly (G_0; the rest at zero).

    Attributes:
        num_terms: 1 leaves the width out of the function.
        resampling: "cell" or "nested".
        noise_scale: in training, cells move by up to +-0.5 of their own size times this.
    """

    num_terms: int = 2
    resampling: str = "cell"
    noise_scale: float = 0.0

    def __post_init__(self):
        if self.num_terms < 1 or self.noise_scale < 0:
            raise ValueError(
                "A grid INR needs num_terms >= 1 and noise_scale >= 0, got "
                f"{self.num_terms=}, {self.noise_scale=}."
            )
        if self.resampling not in RESAMPLING:
            raise ValueError(f"resampling must be one of {RESAMPLING}, got {self.resampling!r}.")

    def init(self, key, stacks):
        params = {}
        for stack, stack_key in zip(stacks, jax.random.split(key, len(stacks)), strict=True):
            # He initialisation of kernels; all else starts at zero.
            fan_in = stack.columns.size * stack.num_outputs
            scale = (2 / fan_in) ** 0.5 if stack.kernel else 0.0
            values = jnp.zeros((self.num_terms, *stack.shape))
            values = values.at[0].set(scale * jax.random.normal(stack_key, stack.shape))
            params[stack.name] = {"values": jnp.moveaxis(values, 0, 1)}
        return params

    def __call__(self, inr_params, stacks, widths, *, key=None):
        raw = {}
        full = jnp.asarray(full_widths(stacks, len(widths)))
        width = jnp.maximum(jnp.asarray(widths), 1).astype(jnp.float32)
        for number, stack in enumerate(stacks):
            values = inr_params[stack.name]["values"]
            ratio = mean_ratio(stack, width / full)
            powers = (1 - ratio)[:, None] ** jnp.arange(self.num_terms, dtype=ratio.dtype)[None]
            values = jnp.einsum("tm,tmrco->trco", powers, values)
            stack_key = None if key is None else jax.random.fold_in(key, number)
            if stack.rows.elastic:
                weights = self._weights(stack.rows, width, stack_key)
                values = jnp.einsum("tsr,trco->tsco", weights, values)
            if stack.columns.elastic:
                if stack_key is not None and stack.rows.elastic:
                    stack_key = jax.random.fold_in(stack_key, 1)
                weights = self._weights(stack.columns, width, stack_key)
                values = jnp.einsum("tsc,trco->trso", weights, values)
                if self.resampling == "cell":
                    quadrature = stack.columns.width(full) / stack.columns.width(width)
                    values = values * quadrature[:, None, None, None]
            raw[stack.name] = values
        return raw

    def _weights(self, side: Side, width, key):
        """float32[tensors, size, full]: how much each value counts for each channel."""

        def of_channels(channels: Side):
            if not channels.positions:
                return identities(channels)
            chosen = width[np.array(channels.positions)]
            return self._cells(chosen, channels.size, channels.full, key)

        return side.combine(of_channels)

    def _cells(self, width, size, full, key):
        """float32[tensors, size, full] of channels whose width varies."""
        channels = jnp.arange(size, dtype=jnp.float32)[None]
        if self.resampling == "nested":
            weights = jnp.eye(size, full, dtype=jnp.float32)[None]
            return jnp.broadcast_to(weights, (width.shape[0], size, full))
        cell = 1 / width[:, None]
        left = channels * cell
        if key is not None and self.noise_scale:
            noise = jax.random.uniform(key, left.shape, minval=-0.5, maxval=0.5)
            left = jnp.clip(left + self.noise_scale * noise * cell, 0.0, 1.0 - cell)
        left, right = left[:, :, None], (left + cell)[:, :, None]
        edges = (jnp.arange(full, dtype=jnp.float32) / full)[None, None]
        overlap = jnp.minimum(right, edges + 1 / full) - jnp.maximum(left, edges)
        return jnp.maximum(overlap, 0.0) * width[:, None, None]

    def start_from(self, inr_params, stacks, raw):
        started = {}
        for stack in stacks:
            values = jnp.zeros_like(inr_params[stack.name]["values"])
            started[stack.name] = {"values": values.at[:, 0].set(raw[stack.name])}
        return started
