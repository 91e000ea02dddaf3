"""The INRs, and the generation of network parameters from them.

An `INR` maps (parameters, widths) to the raw tensors of every generated block. What surrounds it is
the same for all kinds: masking to the width, SkipInit, what is not generated, averaging of noisy
samples. The learned parameters of a hypernetwork are one tree:

    {"inr":     what the INR kind keeps,
     "alpha":   float32[num_blocks], the SkipInit scalar of each generated block,
     "learned": the folded tree of everything that is not generated}
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import coordinates
from neumeta_jax.architecture import ResNetSpec, morph, widths_at
from neumeta_jax.coordinates import Coordinates, TensorGroup
from neumeta_jax.resnet import Params, mask_block, slice_params


class INR(Protocol):
    """What an implicit neural representation must offer. Implementations are hashable values."""

    def init(self, key: jax.Array, groups: Sequence[TensorGroup]) -> Params:
        """Fresh parameters."""
        ...

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
        ...

    def start_from(
        self, inr_params: Params, groups: Sequence[TensorGroup], raw: Mapping[str, jax.Array]
    ) -> Params:
        """`inr_params` that generate the full-width tensors `raw`, where there is a closed form.

        Kinds without one return `inr_params` as they are.
        """
        ...

    def copy_block(
        self, inr_params: Params, groups: Sequence[TensorGroup], source: int, target: int
    ) -> Params:
        """`inr_params` in which block `target` starts as a copy of block `source`."""
        ...

    def update_mask(
        self, inr_params: Params, groups: Sequence[TensorGroup], active: jax.Array
    ) -> Params:
        """A tree that broadcasts against `inr_params`: 1 where only `active` blocks learn, else 0.

        `active` is bool[num_blocks] and may be traced.
        """
        ...


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
class PerTensorMLP:
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

    def init(self, key: jax.Array, groups: Sequence[TensorGroup]) -> Params:
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
        values = []
        for (path, shape), draw in zip(
            leaves, jnp.split(draws, np.cumsum(sizes)[:-1]), strict=True
        ):
            name = path[-1].key
            if name.startswith("scale"):
                values.append(jnp.full(shape, 0.1, jnp.float32))
            elif name.endswith("bias"):
                values.append(jnp.zeros(shape, jnp.float32))
            else:  # uniform(+-1 / sqrt(fan_in)), PyTorch's default
                values.append(draw.reshape(shape) / shape[1] ** 0.5)
        params = jax.tree_util.tree_unflatten(treedef, values)
        return params

    def __call__(
        self,
        inr_params: Params,
        groups: Sequence[TensorGroup],
        widths: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
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

    def start_from(
        self, inr_params: Params, groups: Sequence[TensorGroup], raw: Mapping[str, jax.Array]
    ) -> Params:
        del groups, raw
        return inr_params  # no closed form; that is what the fit phase is for

    def copy_block(
        self, inr_params: Params, groups: Sequence[TensorGroup], source: int, target: int
    ) -> Params:
        return _copy_stacked(inr_params, groups, source, target)

    def update_mask(
        self, inr_params: Params, groups: Sequence[TensorGroup], active: jax.Array
    ) -> Params:
        return _mask_stacked(inr_params, groups, active)


def _copy_stacked(inr_params, groups, source, target):
    """`INR.copy_block` where every leaf of a group has a leading axis of tensors."""
    copied = dict(inr_params)
    for group in groups:
        if source in group.positions and target in group.positions:
            s, t = group.positions.index(source), group.positions.index(target)
            copied[group.name] = jax.tree.map(
                lambda p, s=s, t=t: p.at[t].set(p[s]), inr_params[group.name]
            )
    return copied


def _mask_stacked(inr_params, groups, active):
    """`INR.update_mask` where every leaf of a group has a leading axis of tensors."""
    mask = {}
    for group in groups:
        flags = jnp.asarray(active)[jnp.array(group.positions)].astype(jnp.float32)
        mask[group.name] = jax.tree.map(
            lambda p, f=flags: f.reshape((-1,) + (1,) * (p.ndim - 1)), inr_params[group.name]
        )
    return mask


RESAMPLING = ("cell", "nested")


@dataclasses.dataclass(frozen=True)
class Grid:
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

    def init(self, key: jax.Array, groups: Sequence[TensorGroup]) -> Params:
        params = {}
        for group, group_key in zip(groups, jax.random.split(key, len(groups)), strict=True):
            shape = (len(group.positions), group.rows, group.columns, group.num_outputs)
            # He initialisation of kernels; biases start at zero.
            scale = (2 / (9 * group.columns)) ** 0.5 if group.kind == "kernel" else 0.0
            values = jnp.zeros((self.num_terms, *shape))
            values = values.at[0].set(scale * jax.random.normal(group_key, shape))
            params[group.name] = {"values": jnp.moveaxis(values, 0, 1)}
        return params

    def __call__(
        self,
        inr_params: Params,
        groups: Sequence[TensorGroup],
        widths: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
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

    def start_from(
        self, inr_params: Params, groups: Sequence[TensorGroup], raw: Mapping[str, jax.Array]
    ) -> Params:
        started = {}
        for group in groups:
            values = jnp.zeros_like(inr_params[group.name]["values"])
            started[group.name] = {"values": values.at[:, 0].set(raw[group.name])}
        return started

    def copy_block(
        self, inr_params: Params, groups: Sequence[TensorGroup], source: int, target: int
    ) -> Params:
        return _copy_stacked(inr_params, groups, source, target)

    def update_mask(
        self, inr_params: Params, groups: Sequence[TensorGroup], active: jax.Array
    ) -> Params:
        return _mask_stacked(inr_params, groups, active)


def _hidden_width(inr_params, group):
    sibling = group.name.removesuffix("bias") + "kernel"
    return inr_params[sibling]["values"].shape[3]


INR_KINDS: dict[str, type] = {"per_tensor_mlp": PerTensorMLP, "grid": Grid}


def make_inr(kind: str, **fields: Any) -> INR:
    """The INR of `kind` ("per_tensor_mlp" or "grid") with the given fields.

    Raises:
        ValueError: for an unknown kind or field.
    """
    if kind not in INR_KINDS:
        raise ValueError(f"The INR kind must be one of {sorted(INR_KINDS)}, got {kind!r}.")
    cls = INR_KINDS[kind]
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


@dataclasses.dataclass(frozen=True)
class Hypernetwork:
    """A family of networks: the full-size `spec`, which `blocks` an `inr` generates.

    Hashable, so that it can be a static argument of `jax.jit`.
    """

    spec: ResNetSpec
    blocks: tuple[int, ...]
    inr: INR

    @property
    def groups(self) -> tuple[TensorGroup, ...]:
        return coordinates.tensor_groups(self.spec, self.blocks)

    @property
    def full_widths(self) -> tuple[int, ...]:
        """Hidden widths of `blocks` in the full-size network."""
        return tuple(self.spec.hidden_widths[n] for n in self.blocks)

    def widths(self, width_ratio: float) -> np.ndarray:
        """int32[num_blocks]: every block keeps `width_ratio` of its hidden channels."""
        return np.array(widths_at(self.spec, self.blocks, width_ratio), np.int32)


def learned_params(hypernetwork: Hypernetwork, backbone: Mapping) -> Params:
    """The part of a folded full-size tree that is not generated."""
    generated = {hypernetwork.spec.blocks[n].name for n in hypernetwork.blocks}
    learned = {}
    for name, layers in backbone.items():
        if name not in generated:
            learned[name] = layers
        elif "shortcut" in layers:
            learned[name] = {"shortcut": layers["shortcut"]}
    return learned


def init(
    key: jax.Array,
    hypernetwork: Hypernetwork,
    backbone: Mapping,
    *,
    alpha: float = 0.0,
    from_backbone: bool = False,
) -> Params:
    """A fresh parameter tree around the folded full-size `backbone`.

    Args:
        key: PRNG key of the INR's initialisation.
        hypernetwork: the family.
        backbone: folded tree of `hypernetwork.spec`; supplies what is not generated.
        alpha: initial SkipInit scalar; 0 makes every generated block the identity (HTTY).
        from_backbone: start at the backbone's own weights, for INR kinds that have a closed form.
    """
    inr_params = hypernetwork.inr.init(key, hypernetwork.groups)
    if from_backbone:
        raw = pack_blocks(hypernetwork, backbone)
        inr_params = hypernetwork.inr.start_from(inr_params, hypernetwork.groups, raw)
    return {
        "inr": inr_params,
        "alpha": jnp.full(len(hypernetwork.blocks), alpha, jnp.float32),
        "learned": jax.tree.map(jnp.asarray, learned_params(hypernetwork, backbone)),
    }


def num_inr_params(params: Mapping) -> int:
    """How many numbers the INR and the SkipInit scalars hold."""
    return sum(x.size for x in jax.tree.leaves({"inr": params["inr"], "alpha": params["alpha"]}))


def check_widths(
    hypernetwork: Hypernetwork, widths, spec: ResNetSpec | None = None, *, limited: bool = True
) -> None:
    """Raises ValueError where concrete `widths` do not fit; traced widths are taken on trust.

    Args:
        hypernetwork: the family.
        widths: hidden widths of its blocks, an array or a sequence of ints.
        spec: the shapes that are to hold them; default the full size.
        limited: whether the channels of `spec` are an upper limit.
    """
    spec = spec or hypernetwork.spec
    blocks = hypernetwork.blocks
    if not isinstance(widths, jax.Array):
        widths = np.asarray(widths)
    if widths.ndim != 1 or widths.shape[0] != len(blocks):
        raise ValueError(
            f"widths must be an int array with one entry for each of the {len(blocks)} generated "
            f"blocks, got shape {widths.shape}."
        )
    if not jnp.issubdtype(widths.dtype, jnp.integer):
        raise ValueError(
            "widths must be integers (hidden channels, not ratios; Hypernetwork.widths(ratio) "
            f"makes them), got {widths.dtype}."
        )
    try:
        concrete = np.asarray(widths)
    except jax.errors.TracerArrayConversionError:
        return
    for n, width in zip(blocks, concrete, strict=True):
        block = spec.blocks[n]
        lowest = 0 if block.skippable else 1
        if width < lowest or (limited and width > block.hidden_width):
            allowed = f"from {lowest} to {block.hidden_width}" if limited else f"from {lowest} on"
            larger = "; larger ones need generate(..., spec=a larger ResNetSpec)" if limited else ""
            raise ValueError(f"{block.name} takes hidden widths {allowed}, got {width}{larger}.")


def generate_blocks(
    hypernetwork: Hypernetwork,
    inr_params: Mapping,
    widths: jax.Array,
    *,
    spec: ResNetSpec | None = None,
    key: jax.Array | None = None,
    num_samples: int = 1,
) -> Params:
    """The convolutions of the generated blocks, masked to `widths`, without SkipInit.

    See `generate` for the arguments.
    """
    spec = spec or hypernetwork.spec
    groups = coordinates.tensor_groups(spec, hypernetwork.blocks)

    def sample(sample_key):
        return hypernetwork.inr(dict(inr_params), groups, widths, key=sample_key)

    if key is None or num_samples == 1:
        raw = sample(key)
    else:
        samples = jax.lax.map(sample, jax.random.split(key, num_samples))
        raw = jax.tree.map(lambda x: jnp.mean(x, axis=0), samples)

    tree: Params = {spec.blocks[n].name: {"conv1": {}, "conv2": {}} for n in hypernetwork.blocks}
    for group in groups:
        for row, position in enumerate(group.positions):
            block = spec.blocks[hypernetwork.blocks[position]]
            values = raw[group.name][row]  # [C_out, C_in, outputs] of the group's widest block
            if group.kind == "bias":
                rows = block.hidden_width if group.out_is_hidden else group.rows
                tensor = values[:rows, 0, 0]
            else:
                rows = block.hidden_width if group.out_is_hidden else group.rows
                columns = block.hidden_width if group.in_is_hidden else group.columns
                tensor = values[:rows, :columns].reshape(rows, columns, 3, 3)
                tensor = tensor.transpose(2, 3, 1, 0)  # HWIO
            tree[block.name][group.layer][group.kind] = tensor
    for position, n in enumerate(hypernetwork.blocks):
        name = spec.blocks[n].name
        tree[name] = mask_block(tree[name], widths[position])
    return tree


def pack_blocks(hypernetwork: Hypernetwork, tree: Mapping) -> dict[str, jax.Array]:
    """The generated tensors of a full-size folded tree, as an INR emits them.

    Returns:
        float32[tensors, rows, columns, num_outputs] by group name.

    Raises:
        ValueError: if blocks of one group differ in hidden width.
    """
    raw = {}
    for group in hypernetwork.groups:
        tensors = []
        for position in group.positions:
            block = hypernetwork.spec.blocks[hypernetwork.blocks[position]]
            tensor = jnp.asarray(tree[block.name][group.layer][group.kind])
            if group.kind == "bias":
                tensor = tensor[:, None, None]
            else:
                tensor = tensor.transpose(3, 2, 0, 1)
                tensor = tensor.reshape(*tensor.shape[:2], -1)
            tensors.append(tensor)
        if len({tensor.shape for tensor in tensors}) > 1:
            raise ValueError(
                f"The blocks of {group.name} must have one hidden width to be stacked, got "
                f"{[hypernetwork.full_widths[p] for p in group.positions]}."
            )
        raw[group.name] = jnp.stack(tensors)
    return raw


def skip_init(layers: Mapping, alpha: jax.Array) -> Params:
    """A block's layers with SkipInit's scalar absorbed: alpha * (kernel * x + bias) after conv2."""
    conv2 = {kind: alpha * values for kind, values in layers["conv2"].items()}
    return {**layers, "conv2": conv2}


def generate(
    hypernetwork: Hypernetwork,
    params: Mapping,
    widths: jax.Array | np.ndarray,
    *,
    spec: ResNetSpec | None = None,
    key: jax.Array | None = None,
    num_samples: int = 1,
) -> Params:
    """The folded parameter tree of the network with hidden `widths`.

    A pure function, for use under `jit`, `vmap` and `grad`. The tree has the full shape of `spec`
    whatever the widths, with the channels beyond them set to zero, so that one compilation serves
    every network; `resnet.slice_params` cuts out the dense one.

    Args:
        hypernetwork: the family.
        params: {"inr", "alpha", "learned"}, see `init`.
        widths: int[num_blocks], hidden channels of each generated block; 0 = block skipped.
        spec: shapes of the result, where they are to differ from the full-size network: smaller
            (then nothing larger can be asked for) or larger, for widths beyond the full size.
        key: PRNG key; draws coordinate noise. Without it coordinates are exact.
        num_samples: noisy samples to average (the papers use 100); needs `key`.

    Returns:
        A tree for `resnet.apply(spec, tree, images)`; float32.

    Raises:
        ValueError: if concrete widths are out of range, or `num_samples` > 1 without a key.
    """
    check_widths(hypernetwork, widths, spec)
    if num_samples < 1 or (num_samples > 1 and key is None):
        raise ValueError(
            f"num_samples must be 1, or larger together with a key, got {num_samples=}; without "
            "noise all samples are equal."
        )
    spec = spec or hypernetwork.spec
    generated = generate_blocks(
        hypernetwork,
        params["inr"],
        jnp.asarray(widths),
        spec=spec,
        key=key,
        num_samples=num_samples,
    )
    tree = dict(params["learned"])
    for position, n in enumerate(hypernetwork.blocks):
        name = spec.blocks[n].name
        layers = skip_init(generated[name], params["alpha"][position])
        tree[name] = {**params["learned"].get(name, {}), **layers}
    return tree


def generate_dense(
    hypernetwork: Hypernetwork,
    params: Mapping,
    widths: Sequence[int],
    *,
    key: jax.Array | None = None,
    num_samples: int = 1,
) -> tuple[ResNetSpec, Params]:
    """The network of hidden `widths` at its own shapes, without masked channels: (spec, tree).

    Each new set of widths compiles anew where the result is used; for many networks use `generate`.
    Blocks of width 0 are left out.
    """
    check_widths(hypernetwork, widths, limited=False)
    chosen = [int(w) for w in widths]
    container = morph(hypernetwork.spec, hypernetwork.blocks, [max(w, 1) for w in chosen])
    tree = generate(
        hypernetwork,
        params,
        np.array(chosen, np.int32),
        spec=container,
        key=key,
        num_samples=num_samples,
    )
    return slice_params(container, tree, hypernetwork.blocks, chosen)
