"""The ResNet itself: with batch norm (to train a teacher) and folded (what an INR generates).

Parameter trees are nested dicts by layer name. Folded:

    {"stem": {"kernel", "bias"},
     "stage1_block0": {"conv1": {"kernel", "bias"}, "conv2": {...}[, "shortcut": {...}]}, ...,
     "head": {"kernel", "bias"}}

Kernels are HWIO, images NHWC. The tree of the linen module has the same layer names, no biases in
its convolutions, and `stem_bn`, `bn1`, `bn2`, `shortcut_bn` beside them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import elastic
from neumeta_jax.core.hypernetwork import Hypernetwork
from neumeta_jax.core.inr import INR
from neumeta_jax.elastic.counting import Count, macs_count
from neumeta_jax.networks.cifar_spec import NUM_STAGES, Block, ResNetSpec, morph

Params = dict[str, Any]

BATCH_NORM_EPSILON = 1e-5


def _conv(x, kernel, stride: int):
    # PyTorch's padding; "SAME" would pad a stride of 2 on the other side.
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _pad_shortcut(x, block: Block):
    """Every second pixel, and zero channels on both sides (He et al., option A)."""
    extra = block.out_width - block.in_width
    x = x[:, :: block.stride, :: block.stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class ResNet(nn.Module):
    """The CIFAR ResNet of `spec` with batch norm, as it is trained before folding."""

    spec: ResNetSpec

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        """Logits float[batch, classes] of normalised images float[batch, size, size, channels]."""

        def conv(x, width, name, *, stride=1, size=3):
            return nn.Conv(
                width,
                (size, size),
                strides=stride,
                padding=size // 2,  # PyTorch's, see _conv
                use_bias=False,
                kernel_init=nn.initializers.he_normal(),
                name=name,
            )(x)

        def norm(x, name):
            # Flax's momentum of 0.9 is PyTorch's 0.1.
            return nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=BATCH_NORM_EPSILON,
                name=name,
            )(x)

        x = nn.relu(norm(conv(images, self.spec.stage_widths[0], "stem"), "stem_bn"))
        for block in self.spec.blocks:
            if block.hidden_width:
                x = _BatchNormBlock(block, name=block.name)(x, conv, norm)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.spec.num_classes, name="head")(x)


class _BatchNormBlock(nn.Module):
    block: Block

    @nn.compact
    def __call__(self, x, conv, norm):
        block = self.block
        y = nn.relu(norm(conv(x, block.hidden_width, "conv1", stride=block.stride), "bn1"))
        y = norm(conv(y, block.out_width, "conv2"), "bn2")
        if block.projection:
            x = conv(x, block.out_width, "shortcut", stride=block.stride, size=1)
            x = norm(x, "shortcut_bn")
        elif not block.skippable:
            x = _pad_shortcut(x, block)
        return nn.relu(x + y)


def apply(spec: ResNetSpec, params: Mapping, images: jax.Array) -> jax.Array:
    """Logits of the folded network.

    `params` is a folded tree, kernels HWIO; images are normalised, float[batch, size, size,
    channels]. The computation runs in their type; logits are float32[batch, classes].
    """
    x = _relu(_affine(jnp.asarray(images), params["stem"]))
    for block in spec.blocks:
        if block.hidden_width:  # else max(0, x) of a stream that is already non-negative
            x = _apply_block(block, params[block.name], x)
    x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def _affine(x, layer, stride=1):
    y = _conv(x, layer["kernel"], stride)
    return y + _spread(layer["bias"], y)


@jax.custom_jvp
def _relu(x):
    return jnp.maximum(x, 0)


@_relu.defjvp
def _relu_jvp(primals, tangents):
    # By the sign of the result, so that what went in need not be kept for the backward pass.
    y = _relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)


def _spread(bias, x) -> jax.Array:
    """`bias` at every image and pixel of `x`, in its type."""
    if bias.dtype == x.dtype:
        return bias[None, None, None]
    return jnp.asarray(_rounded(bias, x.shape, x.dtype.name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _rounded(bias, shape, dtype):
    # The gradient is a sum over images and pixels: in bfloat16 it would be lost in rounding.
    return jnp.broadcast_to(bias.astype(dtype), shape)


_rounded.defvjp(
    lambda bias, shape, dtype: (_rounded(bias, shape, dtype), bias),
    lambda shape, dtype, bias, g: (jnp.sum(g, axis=(0, 1, 2), dtype="float32").astype(bias.dtype),),
)


def _apply_block(block: Block, layers: Mapping, x):
    """The stream after the block, float[batch, size, size, channels]."""
    hidden = _relu(_affine(x, layers["conv1"], block.stride))
    y = _affine(hidden, layers["conv2"])
    if block.projection:
        x = _affine(x, layers["shortcut"], block.stride)
    elif not block.skippable:
        x = _pad_shortcut(x, block)
    return _relu(x + y)


def param_shapes(spec: ResNetSpec) -> Params:
    """The folded tree of `spec` with the shape of each tensor as leaf (a tuple of ints)."""

    def layer(size, in_width, out_width):
        return {"kernel": (size, size, in_width, out_width), "bias": (out_width,)}

    tree: Params = {"stem": layer(3, spec.channels, spec.stage_widths[0])}
    for block in spec.blocks:
        if block.hidden_width == 0:
            continue
        tree[block.name] = {
            "conv1": layer(3, block.in_width, block.hidden_width),
            "conv2": layer(3, block.hidden_width, block.out_width),
        }
        if block.projection:
            tree[block.name]["shortcut"] = layer(1, block.in_width, block.out_width)
    width, classes = spec.stage_widths[-1], spec.num_classes
    tree["head"] = {"kernel": (width, classes), "bias": (classes,)}
    return tree


def abstract_params(spec: ResNetSpec) -> Params:
    """The folded tree of `spec` with a float32 `jax.ShapeDtypeStruct` as each leaf."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        param_shapes(spec),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def init_variables(key: jax.Array, spec: ResNetSpec) -> Params:
    """Fresh linen variables {"params", "batch_stats"}: He-normal kernels, identity batch norm."""
    dummy = jnp.zeros((1, spec.image_size, spec.image_size, spec.channels))
    return _draw(key, jax.eval_shape(ResNet(spec).init, jax.random.key(0), dummy))


def init_params(key: jax.Array, spec: ResNetSpec) -> Params:
    """A folded tree at random: He-normal kernels, zero biases."""
    return _draw(key, abstract_params(spec))


def _draw(key: jax.Array, shapes: Mapping) -> Params:
    """A tree of `shapes`; one draw for all, because a generator per leaf takes long to compile."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    draws = jax.random.normal(key, (sum(leaf.size for _, leaf in leaves),))
    draws = jax.lax.optimization_barrier(draws)  # or it is fused into each of its readers
    values, start = [], 0
    for path, leaf in leaves:
        name = path[-1].key
        if name == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            draw = draws[start : start + leaf.size].reshape(leaf.shape)
            values.append(draw * (2 / fan_in) ** 0.5)
        else:
            values.append(jnp.full(leaf.shape, float(name in ("scale", "var")), jnp.float32))
        start += leaf.size
    return jax.tree_util.tree_unflatten(treedef, values)


def fold_batch_norm(variables: Mapping) -> Params:
    """The folded tree with the same function as the linen `variables` at evaluation.

    A convolution followed by batch norm is one affine map (method: NeuMeta, arXiv 2410.11878):

        kernel * s,  beta - mean * s   with   s = scale / sqrt(var + 1e-5)

    Computed in float64, returned in float32.
    """

    def fold(layers: Mapping, stats: Mapping, conv: str, norm: str):
        affine = {k: np.asarray(v, np.float64) for k, v in layers[norm].items()}
        moments = {k: np.asarray(v, np.float64) for k, v in stats[norm].items()}
        scale = affine["scale"] / np.sqrt(moments["var"] + BATCH_NORM_EPSILON)
        kernel = np.asarray(layers[conv]["kernel"], np.float64) * scale
        bias = affine["bias"] - moments["mean"] * scale
        return {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }

    params, stats = variables["params"], variables["batch_stats"]
    folded: Params = {"stem": fold(params, stats, "stem", "stem_bn")}
    for name, layers in params.items():
        if name.startswith("stage"):
            folded[name] = {
                "conv1": fold(layers, stats[name], "conv1", "bn1"),
                "conv2": fold(layers, stats[name], "conv2", "bn2"),
            }
            if "shortcut" in layers:
                folded[name]["shortcut"] = fold(layers, stats[name], "shortcut", "shortcut_bn")
    folded["head"] = jax.tree.map(jnp.asarray, dict(params["head"]))
    return folded


# --- the family ------------------------------------------------------------------------------


class Network(NamedTuple):
    """How a network starts, trains, is made ready for the INR, and runs.

    `networks.linen.Network` is the same of any Flax network.
    """

    spec: ResNetSpec

    @property
    def family(self) -> elastic.Family:
        return family(self.spec)

    def init_variables(self, key: jax.Array) -> Params:
        return init_variables(key, self.spec)

    def abstract_params(self) -> Params:
        return abstract_params(self.spec)

    def train(self, variables: Mapping, images: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """(logits, batch statistics that moved)."""
        del key
        logits, changed = ResNet(self.spec).apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return jnp.asarray(logits), changed

    def fold(self, variables: Mapping) -> Params:
        return fold_batch_norm(variables)

    def apply(self, tree: Mapping, images: jax.Array) -> jax.Array:
        """Logits of a folded tree, or of linen variables in inference mode."""
        if "batch_stats" in tree:
            return jnp.asarray(ResNet(self.spec).apply(tree, images))
        return apply(self.spec, tree, images)


@functools.lru_cache(maxsize=256)
def family(spec: ResNetSpec) -> elastic.Family:
    """The channel groups of the folded network of `spec`, and its program."""
    size, channels = spec.image_size, spec.channels
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    return elastic.trace(functools.partial(apply, spec), abstract_params(spec), images, check=False)


@functools.lru_cache(maxsize=256)
def linen_groups(spec: ResNetSpec) -> elastic.Groups:
    """The channel groups of the network with batch norm; its variables are those of `ResNet`."""
    size, channels = spec.image_size, spec.channels
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    variables = jax.eval_shape(ResNet(spec).init, jax.random.key(0), images)
    return elastic.trace(ResNet(spec).apply, variables, images, check=False).groups


def hidden_group(block: Block) -> str:
    """The name of the group of a block's hidden channels."""
    return f"{block.name}/conv1"


STREAM_GROUPS = ("stem", "stage2_block0/conv2", "stage3_block0/conv2")


@dataclasses.dataclass(frozen=True)
class ResNetHypernetwork(Hypernetwork):
    """A family of CIFAR ResNets: the full-size `spec`, and which of its `blocks` are generated.

    The first groups are the hidden channels of these blocks; with `streams` those of the residual
    streams follow, so that the whole network becomes narrow. Tensors of blocks are stacked by
    (stage, stream shape, layer, kind); what is not skipped of a stage makes up for what is;
    SkipInit goes into every generated block. See `hypernetwork`.
    """

    spec: ResNetSpec
    blocks: tuple[int, ...]
    streams: bool = False

    def __hash__(self) -> int:
        return hash((self.spec, self.blocks, self.streams, self.inr))

    def label(self, path: str) -> str | None:
        name, *layer = path.split("/")
        block = _by_name(self.spec).get(name)
        if block is None:
            return None
        # The first block of a stage may read a narrower stream than the others.
        entry = "" if block.in_width == block.out_width else "_entry"
        return f"stage{block.stage}{entry}_{'_'.join(layer)}"

    def scope(self, path: str) -> tuple[int, ...]:
        block = _by_name(self.spec).get(path.partition("/")[0])
        stage = block.stage if block else 1 if path.startswith("stem") else NUM_STAGES
        members = enumerate(self.spec.blocks[n] for n in self.blocks)
        return tuple(position for position, block in members if block.stage == stage)

    def scaled(self, name: str) -> bool:
        return name not in STREAM_GROUPS

    def is_last(self, path: str) -> bool:
        return path.partition("/")[0] in (self.spec.blocks[-1].name, "head")

    @property
    def stages(self) -> tuple[int, ...]:
        streams = tuple(range(1, NUM_STAGES + 1)) if self.streams else ()
        return tuple(self.spec.blocks[n].stage for n in self.blocks) + streams

    @property
    def lowest(self) -> tuple[int, ...]:
        # Channels that only a padded shortcut brings in would make a sound network too, but blocks
        # that change the shape are part of every `ResNetSpec`.
        blocks = tuple(0 if self.spec.blocks[n].skippable else 1 for n in self.blocks)
        return blocks + (1,) * (len(self.names) - len(blocks))

    def describe(self) -> dict[str, Any]:
        """Which family it is, in JSON types."""
        fields = {"spec": self.spec.to_dict(), "blocks": list(self.blocks)}
        return fields | ({"streams": True} if self.streams else {})

    @property
    def network(self) -> Network:
        return Network(self.spec)

    def num_macs(self, widths: Any) -> Any:
        """Multiply-adds of an image at `widths`, see `num_params`."""
        return _macs_count(self)(widths)

    def num_layers(self, widths: Sequence[int]) -> int:
        """Of the network of `widths`; skipped blocks do not count."""
        return self.spec.depth - 2 * sum(width == 0 for width in widths)

    def at(self, widths: Sequence[int]) -> ResNetSpec:
        """The network of `widths`."""
        hidden = [int(width) for width in widths[: len(self.blocks)]]
        small = morph(self.spec, self.blocks, hidden)
        if not self.streams:
            return small
        streams = tuple(int(width) for width in widths[len(self.blocks) :])
        return dataclasses.replace(small, stage_widths=streams)

    def forward(self, tree: Mapping, x: jax.Array, widths: Sequence[int] | None = None):
        """Logits of a masked tree; the network cut out of it runs where `widths` are given."""
        if widths is None:
            return apply(self.spec, tree, x)
        # What tensor cores take at once; channels beyond a width are zero.
        multiple = 1 if jax.default_backend() == "cpu" else 8
        sizes = zip(widths, self.full_widths, strict=True)
        widths = [min(-(-width // multiple) * multiple, full) for width, full in sizes]
        return apply(*self.dense(tree, widths), x)

    def dense(self, tree: Mapping, widths: Sequence[int], sizes=None) -> tuple[ResNetSpec, Params]:
        """The small network inside a tree of the channel numbers `sizes`: (its spec, its tree).

        Keeps the first channels of each group; blocks of width 0 leave the tree.
        """
        groups, small = self.groups, self.at(widths)
        if sizes is not None:
            groups = groups.resized(self.by_name([int(size) for size in sizes]))
        sliced = elastic.slice_params(groups, tree, self.by_name([int(width) for width in widths]))
        return small, {name: sliced[name] for name in param_shapes(small)}


@functools.lru_cache(maxsize=64)
def _macs_count(hypernetwork: ResNetHypernetwork) -> Count:
    return macs_count(family(hypernetwork.spec), hypernetwork.names)


@functools.lru_cache(maxsize=256)
def _by_name(spec: ResNetSpec) -> dict[str, Block]:
    return {block.name: block for block in spec.blocks}


def hypernetwork(
    spec: ResNetSpec, blocks: Sequence[int], inr: INR, *, streams: bool = False
) -> ResNetHypernetwork:
    """The family of `spec` whose `blocks`, positions in `spec.blocks`, an `inr` generates.

    Args:
        spec: the full-size network.
        blocks: whose hidden widths vary.
        inr: what generates them.
        streams: whether the widths of the residual streams vary too, with all that writes or reads
            them: the stem, the head and every block.

    Raises:
        ValueError: for streams that padded shortcuts tie to each other, or a group of 1 channel.
    """
    if streams and spec.shortcut != "projection":
        raise ValueError(
            "Residual streams vary independently with shortcut='projection' only, got "
            f"{spec.shortcut!r}; import or train a network with projections."
        )
    names = tuple(hidden_group(spec.blocks[n]) for n in blocks) + STREAM_GROUPS * streams
    groups = family(spec).groups
    if single := [name for name in names if name not in groups.by_name]:
        raise ValueError(
            "Widths vary for groups of 2 channels or more, of which this network has no "
            f"{', '.join(single)}; generate other blocks."
        )
    return ResNetHypernetwork(groups, names, inr, spec, tuple(blocks), streams)
