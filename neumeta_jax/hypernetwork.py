"""Generation of network parameters from an INR.

What surrounds an INR (see `inr`) is the same for all kinds: masking to the width, SkipInit, what is
not generated, averaging of noisy samples. The learned parameters of a hypernetwork are one tree:

    {"inr":     what the INR kind keeps,
     "alpha":   float32[num_blocks], the SkipInit scalar of each generated block,
     "learned": the folded tree of everything that is not generated,
     "depth":   for an INR with a depth term, a tree like "learned", added to it times the share of
                the generated blocks of a layer's stage that are skipped}
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from neumeta_jax import coordinates
from neumeta_jax.architecture import NUM_STAGES, ResNetSpec, morph, widths_at
from neumeta_jax.coordinates import TensorGroup
from neumeta_jax.inr import INR
from neumeta_jax.resnet import Params, mask_block, slice_params

# The papers' INR holds 7 x 64 x 64 x 512 activations, 59 MB, per sample and layer of a ResNet56.
SAMPLE_BATCH = 16


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
    moments: Mapping[str, jax.Array] | None = None,
) -> Params:
    """A fresh parameter tree around the folded full-size `backbone`.

    Args:
        key: PRNG key of the INR's initialisation.
        hypernetwork: the family.
        backbone: folded tree of `hypernetwork.spec`; supplies what is not generated.
        alpha: initial SkipInit scalar; 0 makes every generated block the identity (HTTY).
        from_backbone: start at the backbone's own weights, for INR kinds that have a closed form.
        moments: second moments of the backbone's hidden channels by block name, see
            `resnet.hidden_moments`; for INR kinds that need them.
    """
    inr, groups = hypernetwork.inr, hypernetwork.groups
    inr_params = inr.init(key, groups)
    if moments is not None:
        names = [hypernetwork.spec.blocks[n].name for n in hypernetwork.blocks]
        stacked = {
            group.name: jnp.stack([moments[names[p]] for p in group.positions])
            for group in groups
            if group.in_is_hidden
        }
        inr_params = inr.with_moments(inr_params, groups, stacked)
    if from_backbone:
        inr_params = inr.start_from(inr_params, groups, pack_blocks(hypernetwork, backbone))
    learned = jax.tree.map(jnp.asarray, learned_params(hypernetwork, backbone))
    params = {
        "inr": inr_params,
        "alpha": jnp.full(len(hypernetwork.blocks), alpha, jnp.float32),
        "learned": learned,
    }
    if inr.depth_term:
        params["depth"] = jax.tree.map(jnp.zeros_like, learned)
    return params


def num_inr_params(params: Mapping) -> int:
    """How many numbers the INR, the SkipInit scalars and a depth term hold."""
    counted = {name: tree for name, tree in params.items() if name != "learned"}
    return sum(x.size for x in jax.tree.leaves(counted))


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


def learned_at(
    hypernetwork: Hypernetwork, params: Mapping, widths: jax.Array | np.ndarray
) -> Params:
    """The folded layers that are not generated, as the network of hidden `widths` has them."""
    if "depth" not in params:
        return dict(params["learned"])
    spec, tree = hypernetwork.spec, {}
    stages = {block.name: block.stage for block in spec.blocks} | {"head": NUM_STAGES}
    for name, layers in params["learned"].items():
        stage = stages.get(name, 1)  # the stem feeds the first
        members = [p for p, n in enumerate(hypernetwork.blocks) if spec.blocks[n].stage == stage]
        share = coordinates.skipped_share(widths, members)
        tree[name] = jax.tree.map(lambda x, d, s=share: x + s * d, layers, params["depth"][name])
    return tree


def check_num_samples(num_samples: int, key: jax.Array | None) -> None:
    """Raises ValueError unless `num_samples` noisy samples can be drawn with `key`."""
    if num_samples < 1 or (num_samples > 1 and key is None):
        raise ValueError(
            f"num_samples must be 1, or larger together with a key, got {num_samples=}; without "
            "noise all samples are equal."
        )


def check_dtype(dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError unless `dtype` names a floating-point type."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            f"The dtype of a network must be a floating-point type, got {dtype!r}; use bfloat16 or "
            "float32."
        )


def generate_blocks(
    hypernetwork: Hypernetwork,
    inr_params: Mapping,
    widths: jax.Array,
    *,
    spec: ResNetSpec | None = None,
    key: jax.Array | None = None,
    num_samples: int = 1,
    sample_batch: int | None = SAMPLE_BATCH,
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
        raw = _mean_of(sample, jax.random.split(key, num_samples), sample_batch or num_samples)

    tree: Params = {spec.blocks[n].name: {"conv1": {}, "conv2": {}} for n in hypernetwork.blocks}
    for group in groups:
        for row, position in enumerate(group.positions):
            block = spec.blocks[hypernetwork.blocks[position]]
            values = raw[group.name][row]  # [C_out, C_in, outputs] of the group's widest block
            rows = block.hidden_width if group.out_is_hidden else group.rows
            if group.kind == "bias":
                tensor = values[:rows, 0, 0]
            else:
                columns = block.hidden_width if group.in_is_hidden else group.columns
                tensor = values[:rows, :columns].reshape(rows, columns, 3, 3)
                tensor = tensor.transpose(2, 3, 1, 0)  # HWIO
            tree[block.name][group.layer][group.kind] = tensor
    for position, n in enumerate(hypernetwork.blocks):
        name = spec.blocks[n].name
        tree[name] = mask_block(tree[name], widths[position])
    return tree


def _mean_of(function: Callable, keys: jax.Array, batch: int):
    """The mean of the trees `function(key)`; `batch` keys are taken in one vectorised call."""
    num_batches, rest = divmod(len(keys), batch)

    def total(some):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(function)(some))

    parts = []
    if num_batches == 1:
        parts.append(total(keys[:batch]))
    elif num_batches:
        # Added up as they come: one batch of samples and one sum are in memory, never all samples.
        start = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(total, keys[:batch])
        )
        parts.append(
            jax.lax.fori_loop(
                0,
                num_batches,
                lambda n, sums: jax.tree.map(
                    jnp.add, sums, total(jax.lax.dynamic_slice_in_dim(keys, n * batch, batch))
                ),
                start,
            )
        )
    if rest:
        parts.append(total(keys[num_batches * batch :]))
    return jax.tree.map(lambda *sums: sum(sums) / len(keys), *parts)


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
    sample_batch: int | None = SAMPLE_BATCH,
    dtype: jax.typing.DTypeLike | None = None,
) -> Params:
    """The folded parameter tree of the network with hidden `widths`.

    A pure function, for use under `jit`, `vmap` and `grad`. The tree has the full shape of `spec`
    whatever the widths, with the channels beyond them set to zero, so that one compilation serves
    every network; `resnet.slice_params` cuts out the dense one.

    Args:
        hypernetwork: the family.
        params: {"inr", "alpha", "learned"[, "depth"]}, see `init`.
        widths: int[num_blocks], hidden channels of each generated block; 0 = block skipped.
        spec: shapes of the result, where they are to differ from the full-size network: smaller
            (then nothing larger can be asked for) or larger, for widths beyond the full size.
        key: PRNG key; draws coordinate noise. Without it coordinates are exact.
        num_samples: noisy samples to average (the papers use 100); needs `key`.
        sample_batch: samples per vectorised call, which bounds memory; None takes all at once.
        dtype: of the result, such as "bfloat16", which halves the memory of many networks at once.
            The tree is computed as without it and rounded at the end, once: coordinates and
            projections need float32. bfloat16 changes each weight by at most 2^-8 of its size, and
            is what `resnet.apply` rounds the kernels to anyway for bfloat16 images.

    Returns:
        A tree for `resnet.apply(spec, tree, images)`; float32 unless `dtype` says otherwise.

    Raises:
        ValueError: if concrete widths are out of range, `num_samples` > 1 without a key,
            `sample_batch` < 1 or `dtype` not a floating-point type.
    """
    check_widths(hypernetwork, widths, spec)
    if dtype is not None:
        check_dtype(dtype)
    if sample_batch is not None and sample_batch < 1:
        raise ValueError(
            f"sample_batch must be at least 1, got {sample_batch=}; None takes all samples at once."
        )
    check_num_samples(num_samples, key)
    spec = spec or hypernetwork.spec
    generated = generate_blocks(
        hypernetwork,
        params["inr"],
        jnp.asarray(widths),
        spec=spec,
        key=key,
        num_samples=num_samples,
        sample_batch=sample_batch,
    )
    tree = learned_at(hypernetwork, params, widths)
    for position, n in enumerate(hypernetwork.blocks):
        name = spec.blocks[n].name
        layers = skip_init(generated[name], params["alpha"][position])
        tree[name] = {**tree.get(name, {}), **layers}
    if dtype is not None:
        tree = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    return tree


def generate_dense(
    hypernetwork: Hypernetwork,
    params: Mapping,
    widths: Sequence[int],
    *,
    spec: ResNetSpec | None = None,
    **options: Any,
) -> tuple[ResNetSpec, Params]:
    """The network of hidden `widths` at its own shapes, without masked channels: (spec, tree).

    Each new set of widths compiles anew where the result is used; for many networks use `generate`.
    Blocks of width 0 are left out. `spec` holds the shapes that it is cut out of, on which noise
    depends, by default its own. The `options` are those of `generate`.
    """
    check_widths(hypernetwork, widths, limited=False)
    chosen, blocks = [int(w) for w in widths], hypernetwork.blocks
    spec = spec or morph(hypernetwork.spec, blocks, [max(w, 1) for w in chosen])
    tree = generate(hypernetwork, params, np.array(chosen, np.int32), spec=spec, **options)
    return slice_params(spec, tree, blocks, chosen)
