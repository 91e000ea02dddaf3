"""The INR kinds: pure functions from coordinates of model space to raw weights.

An `INR` maps (parameters, widths) to the raw tensors of every generated block, in groups of tensors
of equal role and shape (`coordinates.TensorGroup`). What surrounds it is the same for all kinds
(`hypernetwork`): masking to the width, SkipInit, what is not generated.

    per_tensor_mlp   the papers': one residual MLP of Fourier features per tensor
    grid             learned values, averaged over each channel's cell
    projection       learned values; a smaller network is the least-squares projection of the full
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import coordinates
from neumeta_jax.coordinates import Coordinates, TensorGroup
from neumeta_jax.resnet import Params


class INR(abc.ABC):
    """What an implicit neural representation must offer. Implementations are hashable values.

    They define `init` and `__call__`. The other methods are as they are for a kind that has no
    closed form to start with, and all of whose leaves have a leading axis of a group's tensors.

    Attributes:
        needs_moments: whether `with_moments` makes use of second moments of the hidden channels.
        depth_term: whether weights depend on which blocks are skipped, those not generated
            included.
    """

    needs_moments = False
    depth_term = False

    @abc.abstractmethod
    def init(self, key: jax.Array, groups: Sequence[TensorGroup]) -> Params:
        """Fresh parameters."""

    @abc.abstractmethod
    def __call__(
        self,
        inr_params: Params,
        groups: Sequence[TensorGroup],
        widths: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Raw weights float32[tensors, rows, columns, num_outputs] by group name.

        `widths` is int[num_blocks]; entries beyond a block's width may hold anything finite. With a
        `key`, coordinates are noisy.
        """

    def start_from(
        self, inr_params: Params, groups: Sequence[TensorGroup], raw: Mapping[str, jax.Array]
    ) -> Params:
        """`inr_params` that generate the full-width tensors `raw`, where there is a closed form.

        Kinds without one return `inr_params` as they are; that is what the fit phase is for.
        """
        del groups, raw
        return inr_params

    def with_moments(
        self, inr_params: Params, groups: Sequence[TensorGroup], moments: Mapping[str, jax.Array]
    ) -> Params:
        """`inr_params` that know the second moments of the hidden channels of each tensor.

        They are float32[tensors, hidden + 1, hidden + 1] by the name of conv2's kernel (see
        `resnet.hidden_moments`), and are measured, not learned: no block copies those of another.
        Kinds without `needs_moments` return `inr_params` as they are.
        """
        del groups, moments
        return inr_params

    def copy_block(
        self, inr_params: Params, groups: Sequence[TensorGroup], source: int, target: int
    ) -> Params:
        """`inr_params` in which block `target` starts as a copy of block `source`."""
        copied = dict(inr_params)
        for group in groups:
            if source in group.positions and target in group.positions:
                s, t = group.positions.index(source), group.positions.index(target)
                copied[group.name] = jax.tree.map(
                    lambda p, s=s, t=t: p.at[t].set(p[s]), inr_params[group.name]
                )
        return copied

    def update_mask(
        self, inr_params: Params, groups: Sequence[TensorGroup], active: jax.Array
    ) -> Params:
        """A tree that broadcasts against `inr_params`: 1 where only `active` blocks learn, else 0.

        `active` is bool[num_blocks] and may be traced.
        """
        mask = {}
        for group in groups:
            flags = jnp.asarray(active)[jnp.array(group.positions)].astype(jnp.float32)
            mask[group.name] = jax.tree.map(
                lambda p, f=flags: f.reshape((-1,) + (1,) * (p.ndim - 1)), inr_params[group.name]
            )
        return mask

    def depth_mask(self, inr_params: Params, groups: Sequence[TensorGroup]) -> Params:
        """A tree that broadcasts against `inr_params`: 1 for the `depth_term`, else 0."""
        del groups
        return jax.tree.map(lambda _: jnp.float32(0), inr_params)


class CoordinateMLP(nn.Module):
    """The papers' residual MLP for one tensor (arXiv 2505.05510, section 3).

        h = act(W0 e + b0);  h = h + s * act(W h + b), num_layers - 1 times;  W_out h + b_out

    with e the Fourier features of the six normalised coordinates and s learned scalars that start
    at 0.1.
    """

    hidden_width: int
    num_layers: int
    num_frequencies: int
    num_outputs: int
    activation: str

    @nn.compact
    def __call__(self, coords: Coordinates) -> jax.Array:
        """float32[rows, columns, num_outputs] for entries that broadcast to [rows, columns]."""
        act = {"elu": nn.elu, "relu": nn.relu, "gelu": nn.gelu}[self.activation]
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        features = 1 + 2 * self.num_frequencies
        kernel = self.param("in_kernel", uniform, (len(coords) * features, self.hidden_width))
        kernel = kernel.reshape(len(coords), features, self.hidden_width)
        # Linear in the encodings: entries are projected at their own shape and broadcast, those of
        # one shape together, in one product.
        h = self.param("in_bias", nn.initializers.zeros, (self.hidden_width,))
        for shape in dict.fromkeys(entry.shape for entry in coords):
            chosen = [n for n, entry in enumerate(coords) if entry.shape == shape]
            encoded = [
                coordinates.fourier_features(coords[n], self.num_frequencies) for n in chosen
            ]
            weights = jnp.concatenate([kernel[n] for n in chosen])
            h = h + jnp.concatenate(encoded, axis=-1) @ weights
        h = act(h)
        for layer in range(1, self.num_layers):
            scale = self.param(f"scale{layer}", nn.initializers.constant(0.1), ())
            dense = nn.Dense(self.hidden_width, kernel_init=uniform, name=f"hidden{layer}")
            h = h + scale * act(dense(h))
        return nn.Dense(self.num_outputs, kernel_init=uniform, name="out")(h)


@dataclasses.dataclass(frozen=True)
class PerTensorMLP(INR):
    """One `CoordinateMLP` for every generated tensor; its output is divided by C_in.

    The MLPs of a group are stacked along a leading axis and run as one batched call.

    Attributes:
        hidden_width, num_layers, num_frequencies, activation: of each MLP. HTTY: 512, 8, 32, "elu"
            (2.04 M parameters each, 187.8 M for ResNet56); NeuMeta: 256, 4, 16, "relu".
        noise_scale: size of the coordinate noise in channels; 1 is the papers' +-0.5.
        noise_per: "query" (papers) or "channel", see `coordinates.add_noise`.
    """

    hidden_width: int = 512
    num_layers: int = 8
    num_frequencies: int = 32
    activation: str = "elu"
    noise_scale: float = 1.0
    noise_per: str = "query"

    def __post_init__(self):
        if min(self.hidden_width, self.num_layers) < 1 or self.num_frequencies < 0:
            raise ValueError(
                "An INR needs hidden_width >= 1, num_layers >= 1 and num_frequencies >= 0, got "
                f"{self.hidden_width=}, {self.num_layers=}, {self.num_frequencies=}."
            )
        if self.noise_scale < 0:
            raise ValueError(f"noise_scale must be at least 0, got {self.noise_scale}.")
        if self.activation not in ("elu", "relu", "gelu"):
            raise ValueError(f"activation must be one of elu, relu, gelu, got {self.activation!r}.")
        if self.noise_per not in coordinates.NOISE:
            raise ValueError(
                f"noise_per must be one of {coordinates.NOISE}, got {self.noise_per!r}."
            )

    def _mlp(self, group: TensorGroup) -> CoordinateMLP:
        return CoordinateMLP(
            hidden_width=self.hidden_width,
            num_layers=self.num_layers,
            num_frequencies=self.num_frequencies,
            num_outputs=group.num_outputs,
            activation=self.activation,
        )

    def init(self, key, groups):
        dummy = Coordinates(*[jnp.zeros((1, 1))] * 6)
        shapes = {}
        for group in groups:
            one = jax.eval_shape(self._mlp(group).init, jax.random.key(0), dummy)["params"]
            count = len(group.positions)
            shapes[group.name] = jax.tree.map(lambda x, n=count: (n, *x.shape), one)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(
            shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        # As `CoordinateMLP.init` would draw them one by one, but from a single draw: a generator
        # for each leaf takes longer to compile than everything else.
        sizes = [math.prod(shape) for _, shape in leaves]
        draws = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
        draws = jax.lax.optimization_barrier(draws)  # or it is fused into each of its readers
        values, parts = [], jnp.split(draws, np.cumsum(sizes)[:-1])
        for (path, shape), draw in zip(leaves, parts, strict=True):
            name = path[-1].key
            if name.startswith("scale"):
                values.append(jnp.full(shape, 0.1, jnp.float32))
            elif name.endswith("bias"):
                values.append(jnp.zeros(shape, jnp.float32))
            else:  # uniform(+-1 / sqrt(fan_in)), PyTorch's default
                values.append(draw.reshape(shape) / shape[1] ** 0.5)
        return jax.tree_util.tree_unflatten(treedef, values)

    def __call__(self, inr_params, groups, widths, *, key=None):
        raw = {}
        for number, group in enumerate(groups):
            coords = coordinates.raw_coordinates(group, widths)
            in_width = coords.in_width
            if key is not None and self.noise_scale:
                coords = coordinates.add_noise(
                    jax.random.fold_in(key, number),
                    coords,
                    scale=self.noise_scale,
                    per=self.noise_per,
                )
            coords = coordinates.normalize(coords, group.norm)
            # vmap needs the axis of tensors in every entry.
            tensors = len(group.positions)
            coords = Coordinates(*[jnp.broadcast_to(x, (tensors, *x.shape[1:])) for x in coords])
            mlp = self._mlp(group)
            values = jnp.asarray(
                jax.vmap(lambda p, x, mlp=mlp: mlp.apply({"params": p}, x))(
                    inr_params[group.name], coords
                )
            )
            raw[group.name] = values / in_width[..., None]
        return raw


RESAMPLING = ("cell", "nested")


@dataclasses.dataclass(frozen=True)
class Grid(INR):
    """Learned values on a grid of channels, interpolated, and conditioned on the width.

    For a block of `hidden` channels at full size and w = width / hidden, before resampling,

        V(w) = sum over m < num_terms of (1 - w)^m G_m

    with one value of each G_m for every weight of the full-size tensor. "cell" resampling gives
    channel j of a network with C channels the mean of V over [j / C, (j + 1) / C) of the relative
    channel axis, V being constant over each of its own cells; what reads the hidden channels is
    multiplied by hidden / C, the quadrature that keeps sums over inputs (Integral Neural Networks,
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

    def init(self, key, groups):
        params = {}
        for group, group_key in zip(groups, jax.random.split(key, len(groups)), strict=True):
            shape = (len(group.positions), group.rows, group.columns, group.num_outputs)
            # He initialisation of kernels; biases start at zero.
            scale = (2 / (9 * group.columns)) ** 0.5 if group.kind == "kernel" else 0.0
            values = jnp.zeros((self.num_terms, *shape))
            values = values.at[0].set(scale * jax.random.normal(group_key, shape))
            params[group.name] = {"values": jnp.moveaxis(values, 0, 1)}
        return params

    def __call__(self, inr_params, groups, widths, *, key=None):
        raw = {}
        for number, group in enumerate(groups):
            values = inr_params[group.name]["values"]
            hidden_axis = 1 if group.out_is_hidden else 2 if group.in_is_hidden else None
            # The bias after the hidden channels has no such axis, but its kernel's sibling has.
            full = (
                values.shape[1 + hidden_axis] if hidden_axis else _hidden_width(inr_params, group)
            )
            width = jnp.maximum(jnp.asarray(widths)[jnp.array(group.positions)], 1)
            width = width.astype(jnp.float32)
            ratio = width / full
            powers = (1 - ratio)[:, None] ** jnp.arange(self.num_terms)
            values = jnp.einsum("tm,tmrco->trco", powers, values)
            if hidden_axis:
                size = group.rows if group.out_is_hidden else group.columns
                group_key = None if key is None else jax.random.fold_in(key, number)
                weights = self._weights(width, size, full, group_key)
                if group.out_is_hidden:
                    values = jnp.einsum("tsr,trco->tsco", weights, values)
                else:
                    values = jnp.einsum("tsc,trco->trso", weights, values)
                    if self.resampling == "cell":
                        values = values * (full / width)[:, None, None, None]
            raw[group.name] = values
        return raw

    def _weights(self, width, size, full, key):
        """float32[tensors, size, full]: how much each value counts for each channel."""
        channels = jnp.arange(size, dtype=jnp.float32)
        if self.resampling == "nested":
            weights = (channels[:, None] == jnp.arange(full)).astype(jnp.float32)
            return jnp.broadcast_to(weights, (width.shape[0], size, full))
        cell = 1 / width[:, None]
        left = channels * cell
        if key is not None and self.noise_scale:
            noise = jax.random.uniform(key, left.shape, minval=-0.5, maxval=0.5)
            left = jnp.clip(left + self.noise_scale * noise * cell, 0.0, 1.0 - cell)
        left, right = left[:, :, None], (left + cell)[:, :, None]
        edges = jnp.arange(full, dtype=jnp.float32) / full
        overlap = jnp.minimum(right, edges + 1 / full) - jnp.maximum(left, edges)
        return jnp.maximum(overlap, 0.0) * width[:, None, None]

    def start_from(self, inr_params, groups, raw):
        started = {}
        for group in groups:
            values = jnp.zeros_like(inr_params[group.name]["values"])
            started[group.name] = {"values": values.at[:, 0].set(raw[group.name])}
        return started


def _hidden_width(inr_params, group):
    sibling = group.name.removesuffix("bias") + "kernel"
    return inr_params[sibling]["values"].shape[3]


@dataclasses.dataclass(frozen=True)
class Projection(INR):
    """Learned values on a grid of channels; smaller networks are projections of the full one.

    Hidden channels are nested: a block of width C keeps the first C of its channels, K. What the
    dropped channels D contributed is not lost but carried by the kept ones, as well as least
    squares can: with M the second moments of the hidden activations and a constant,
    M = E[(h, 1) (h, 1)^T],

        A = (M_KK + ridge diag(M_KK))^-1 M_KD         h_D is approximately A^T (h_K, 1)
        W1(C) = W1_K,   W2(C) = W2_K + A W2_D,   b2(C) = b2 + (last row of A) W2_D

    W1 and W2 are those of the full width, learned, conditioned on the width ratio w = C / hidden:

        W(w) = sum over m < num_terms of (1 - w)^m G_m, times 1 + (1 - w) S with `modulated`

    where S has one value for each kernel slice (for biases (1 - w) S is added). With `depth_term`
    d D is added to the sum, d the share of the generated blocks of its stage that are skipped: what
    is left of a stage can make up for them. M is measured once
    on the teacher, (hidden + 1)^2 numbers a block. The projection is a closed form in the width, so
    that it holds at sizes never seen in training, and it needs no calibration data afterwards.
    At full size it is the identity. Beyond the full size, channels are doubled and what reads them
    is halved, which leaves the function as it is (Net2Wider; Chen et al., arXiv 1511.05641).

    Least-squares repair of pruned channels: He, Zhang and Sun, arXiv 1707.06168, there for one
    network and on data; here it is part of the function that is trained.

    Parameters: `num_terms` times what it generates (plus a ninth, `modulated`; one more,
    `depth_term`) plus the moments.
    Generation: one factorisation of a (hidden + 1)^2 matrix per block, for all widths that are
    generated at once, and one matrix product per tensor.

    Attributes:
        num_terms: 1 leaves the width out of the learned values.
        modulated: learn S.
        depth_term: learn D, here and for what is not generated (see `hypernetwork`).
        ridge: of the least squares, relative to the diagonal of M.
        max_cell: in training (with a key), half of the networks narrower than full are drawn
            through cells up to this many times wider than those of their own channels: a block of
            width C then has C / factor different channels, each of them several times, and what
            reads them is divided among the copies. This trains coarser functions than any network
            that is built has channels for. With a factor of 2, the network of half the width
            computes what that of a quarter would.
    """

    num_terms: int = 1
    modulated: bool = False
    depth_term: bool = False
    ridge: float = 1e-3
    max_cell: float = 1.0
    needs_moments = True

    @property
    def _values_only(self) -> Grid:
        return Grid(num_terms=self.num_terms + self.depth_term)

    def __post_init__(self):
        if self.num_terms < 1 or not self.ridge > 0:
            raise ValueError(
                f"A projection needs num_terms >= 1 and ridge > 0, got {self.num_terms=}, "
                f"{self.ridge=}."
            )
        if self.max_cell < 1:
            raise ValueError(f"max_cell must be at least 1, got {self.max_cell}.")

    def init(self, key, groups):
        params = self._values_only.init(key, groups)
        for group in groups:
            if self.modulated:
                shape = (len(group.positions), group.rows, group.columns)
                params[group.name]["modulation"] = jnp.zeros(shape)
            if group.in_is_hidden:
                # Channels that have nothing in common: the projection keeps what it keeps.
                eye = jnp.eye(group.columns + 1)
                moments = jnp.broadcast_to(eye, (len(group.positions), *eye.shape))
                params[group.name]["moments"] = moments
        return params

    def __call__(self, inr_params, groups, widths, *, key=None):
        raw = {}
        by_name = {group.name: group for group in groups}
        factor = jnp.ones(())
        if key is not None and self.max_cell > 1:
            # Half of the draws are 1 and three tenths the largest.
            draw = jax.random.uniform(jax.random.fold_in(key, len(groups)), minval=-1, maxval=1)
            factor = 1 + (self.max_cell - 1) * jnp.clip(2.5 * draw, 0, 1)
        for name, reader in by_name.items():
            if not reader.in_is_hidden:
                continue
            prefix = name.removesuffix("conv2_kernel")
            moments = jax.lax.stop_gradient(inr_params[name]["moments"])
            full, size = moments.shape[-1] - 1, reader.columns
            width = jnp.maximum(jnp.asarray(widths)[jnp.array(reader.positions)], 1)
            coarse = jnp.maximum(1, jnp.floor(width / factor + 0.5).astype(width.dtype))
            distinct = jnp.where(width < full, coarse, jnp.minimum(width, full))
            kept = jnp.arange(full) < distinct[:, None]
            ratio = jnp.sum(kept, axis=1) / full
            compensation = self._compensation(moments, kept)
            # Channel j of the network is channel j of the grid; beyond those that differ it starts
            # over, and the copies share what reads them.
            source = jnp.arange(size) % distinct[:, None]
            selected = (source[:, :, None] == jnp.arange(full)) & kept[:, None]
            selected &= (jnp.arange(size) < width[:, None])[:, :, None]
            selected = selected.astype(jnp.float32)
            copies = jnp.maximum(jnp.sum(selected, axis=1, keepdims=True), 1.0)
            project = (selected / copies) @ compensation[:, :full]

            stage = sorted({p for g in groups if g.stage == reader.stage for p in g.positions})
            skipped = coordinates.skipped_share(widths, stage)
            values = {
                part: self._values(
                    inr_params[prefix + part], by_name[prefix + part], ratio, skipped
                )
                for part in ("conv1_kernel", "conv1_bias", "conv2_kernel", "conv2_bias")
            }
            for part in ("conv1_kernel", "conv1_bias"):
                raw[prefix + part] = jnp.einsum("tsf,tfco->tsco", selected, values[part])
            kernel = values["conv2_kernel"]
            raw[name] = jnp.einsum("tsf,trfo->trso", project, kernel)
            constant = jnp.einsum("tf,trfo->tr", compensation[:, full], kernel)
            raw[prefix + "conv2_bias"] = values["conv2_bias"] + constant[:, :, None, None]
        return {group.name: raw[group.name] for group in groups}

    def _values(self, params, group, ratio, skipped):
        """W(w), float32[tensors, rows, columns, outputs] of the full size."""
        small = jnp.maximum(1 - ratio, 0.0)
        powers = small[:, None] ** jnp.arange(self.num_terms)
        if self.depth_term:
            powers = jnp.pad(powers, ((0, 0), (0, 1)), constant_values=skipped)
        values = jnp.einsum("tm,tmrco->trco", powers, params["values"])
        if self.modulated:
            modulation = small[:, None, None, None] * params["modulation"][..., None]
            values = values * (1 + modulation) if group.kind == "kernel" else values + modulation
        return values

    def _compensation(self, moments, kept):
        """float32[tensors, full + 1, full]: how each channel is made of the kept and a constant.

        Columns of kept channels are unit vectors, those of dropped ones the rows of A. As the kept
        channels are the first ones, one factor M = L L^T, the constant put first, serves all
        widths: its leading block is that of M_KK, so that A = L_KK^-T L_DK^T.
        """
        diagonal = jnp.diagonal(moments, axis1=1, axis2=2)
        floor = 1e-6 * jnp.mean(diagonal, axis=1, keepdims=True)  # channels that never fire
        loaded = moments + jax.vmap(jnp.diag)(self.ridge * diagonal + floor)
        factor, inverse = _cholesky(jnp.roll(loaded, 1, axis=(1, 2)))
        there = jnp.pad(kept, ((0, 0), (1, 0)), constant_values=True).astype(jnp.float32)
        solution = jnp.einsum("tki,tk,tjk->tij", inverse, there, factor) * there[:, :, None]
        solution = jnp.roll(solution, -1, axis=1)[:, :, 1:]
        return jnp.where(kept[:, None, :], jnp.eye(moments.shape[-1])[:, :-1], solution)

    def start_from(self, inr_params, groups, raw):
        started = self._values_only.start_from(inr_params, groups, raw)
        for group in groups:
            for leaf in ("modulation", "moments"):
                if leaf in inr_params[group.name]:
                    started[group.name][leaf] = inr_params[group.name][leaf]
        return started

    def with_moments(self, inr_params, groups, moments):
        found = dict(inr_params)
        for group in groups:
            if group.in_is_hidden:
                known = jnp.asarray(moments[group.name])
                found[group.name] = {**inr_params[group.name], "moments": known}
        return found

    def copy_block(self, inr_params, groups, source, target):
        copied = super().copy_block(inr_params, groups, source, target)
        moments = {g.name: inr_params[g.name]["moments"] for g in groups if g.in_is_hidden}
        return self.with_moments(copied, groups, moments)

    def update_mask(self, inr_params, groups, active):
        mask = super().update_mask(inr_params, groups, active)
        for group in groups:
            if "moments" in mask[group.name]:  # measured, not learned
                mask[group.name]["moments"] = jnp.zeros_like(mask[group.name]["moments"])
        return mask

    def depth_mask(self, inr_params, groups):
        mask = super().depth_mask(inr_params, groups)
        if self.depth_term:
            last = jnp.arange(self.num_terms + 1) == self.num_terms
            for group in groups:
                mask[group.name]["values"] = last.astype(jnp.float32)[:, None, None, None]
        return mask


def _cholesky(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(L, L^-1), lower triangular, with L L^T = `matrices`, float[number, size, size]."""

    def lapack(matrices):
        factor = jnp.linalg.cholesky(matrices)
        eye = jnp.broadcast_to(jnp.eye(matrices.shape[-1]), matrices.shape)
        return factor, jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)

    def written_out(matrices):
        """The same, because batched LAPACK calls can block XLA's CPU backend for good."""
        size = matrices.shape[-1]
        index = jnp.arange(size)

        def eliminate(k, state):
            """Takes column k of L out of what is left, and row k of L^-1 out of the unit matrix."""
            left, factor, inverse = state
            column = jnp.take(left, k, axis=2)
            column = jnp.where(index >= k, column, 0.0) / jnp.sqrt(column[:, k])[:, None]
            row = jnp.take(inverse, k, axis=1) / column[:, k][:, None]
            below = jnp.where(index > k, column, 0.0)
            inverse = inverse - below[:, :, None] * row[:, None, :]
            inverse = jnp.where((index == k)[:, None], row[:, None, :], inverse)
            left = left - column[:, :, None] * column[:, None, :]
            return left, jnp.where(index == k, column[:, :, None], factor), inverse

        eye = jnp.broadcast_to(jnp.eye(size), matrices.shape)
        state = (matrices, jnp.zeros_like(matrices), eye)
        return jax.lax.fori_loop(0, size, eliminate, state)[1:]

    return jax.lax.platform_dependent(matrices, cpu=written_out, default=lapack)


INR_KINDS: dict[str, type] = {
    "per_tensor_mlp": PerTensorMLP,
    "grid": Grid,
    "projection": Projection,
}


def make_inr(kind: str, **fields: Any) -> INR:
    """The INR of `kind` (a key of `INR_KINDS`) with the given fields.

    Raises:
        ValueError: for an unknown kind or field.
    """
    if kind not in INR_KINDS:
        raise ValueError(f"The INR kind must be one of {sorted(INR_KINDS)}, got {kind!r}.")
    cls = INR_KINDS[kind]
    if not fields.get("channel_dropout", True):
        del fields["channel_dropout"]  # an option of earlier versions, switched off
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = set(fields) - known
    if unknown:
        raise ValueError(
            f"An INR of kind {kind!r} takes {sorted(known)}, got also {sorted(unknown)}."
        )
    return cls(**fields)


def describe_inr(inr: INR) -> dict[str, Any]:
    """`{"kind": ..., **fields}` in JSON types, so that `make_inr(**describe_inr(inr)) == inr`."""
    for kind, cls in INR_KINDS.items():
        if type(inr) is cls:
            fields = {f.name: getattr(inr, f.name) for f in dataclasses.fields(cls)}
            return {"kind": kind, **fields}
    raise ValueError(f"{type(inr).__name__} is not in INR_KINDS; add it there to save it.")
