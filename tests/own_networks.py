"""Networks as users write them: linen, nnx, Equinox, Haiku, jraph, stax and plain functions.

`CASES[name]()` is a network to trace; `REBUILT[name]` the same network really built at other
widths of its groups, some smaller and some larger.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from flax import nnx
from jax.example_libraries import stax

from neumeta_jax.networks import cifar_resnet, cifar_spec

KEY = jax.random.key(0)
VECTORS, TOKENS, IMAGES = (
    np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for shape in ((3, 16), (3, 5, 16), (3, 8, 8, 3))
)
WORDS = np.arange(15).reshape(3, 5) % 11


class Case(NamedTuple):
    """apply(params, x), and the flags that its elastic groups may have."""

    apply: Callable
    params: Any
    x: Any
    allowed: tuple[str, ...] = ()


def draw(shapes, seed=0):
    """Float32 arrays at random, of the shapes (or like the arrays) in a tree; variances above 0."""
    rng = np.random.default_rng(seed)

    def array(path, shape):
        shape = getattr(shape, "shape", shape)
        x = rng.normal(size=shape) / np.sqrt(2 * np.prod(shape[:-1]) if len(shape) > 1 else 4)
        variance = any("var" in str(key) for key in path)
        return jnp.asarray(abs(x) + 0.5 if variance else x, jnp.float32)

    def shape(node):
        return type(node) is tuple and all(type(n) is int for n in node)

    return jax.tree_util.tree_map_with_path(array, shapes, is_leaf=shape)


def relu_norm(x):
    return nn.relu(nn.BatchNorm(use_running_average=True)(x))


class MLP(nn.Module):
    hidden: tuple = (32, 24)

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.gelu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class VGG(nn.Module):
    widths: tuple = (8, 8, 12)
    hidden: int = 20

    @nn.compact
    def __call__(self, x):
        for n, width in enumerate(self.widths):
            x = relu_norm(nn.Conv(width, (3, 3), use_bias=False)(x))
            if n % 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class MobileNet(nn.Module):
    """An inverted residual: depthwise convolution, squeeze-and-excitation."""

    width: int = 8
    hidden: int = 32
    squeezed: int = 12

    @nn.compact
    def __call__(self, x):
        x = relu_norm(nn.Conv(self.width, (3, 3), name="stem")(x))
        y = relu_norm(nn.Conv(self.hidden, (1, 1), name="expand")(x))
        y = nn.Conv(self.hidden, (3, 3), feature_group_count=self.hidden, name="depthwise")(y)
        y = relu_norm(y)
        gate = nn.relu(nn.Dense(self.squeezed, name="squeeze")(y.mean((1, 2))))
        y = y * nn.sigmoid(nn.Dense(self.hidden, name="excite")(gate))[:, None, None]
        x = x + nn.Conv(self.width, (1, 1), name="shrink")(y)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class ViT(nn.Module):
    heads: int = 3
    hidden: int = 24
    depth: int = 2
    dim: int = 12
    head_size: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.dim, (4, 4), (4, 4), name="embed")(x).reshape(len(x), -1, self.dim)
        token = self.param("token", nn.initializers.normal(), (1, 1, self.dim))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.dim)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
        for n in range(self.depth):
            y = nn.LayerNorm(name=f"before_attention{n}")(x)
            x = x + nn.MultiHeadDotProductAttention(
                self.heads, qkv_features=self.heads * self.head_size, name=f"attention{n}"
            )(y, y)
            y = nn.LayerNorm(name=f"before_up{n}")(x)
            y = nn.gelu(nn.Dense(self.hidden, name=f"up{n}")(y))
            x = x + nn.Dense(self.dim, name=f"down{n}")(y)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class FusedAttention(nn.Module):
    """Queries, keys and values of all heads from one layer."""

    heads: int = 3

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        qkv = nn.Dense(12 * self.heads, name="qkv")(y).reshape(*x.shape[:2], 3, self.heads, 4)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1)
        return nn.Dense(3, name="head")(x + nn.Dense(x.shape[-1], name="project")(y))


class Llama(nn.Module):
    """RMS norm, grouped queries, a causal mask, SwiGLU; no biases."""

    groups: int = 2
    hidden: int = 24

    @nn.compact
    def __call__(self, x):
        def linear(width, name, axis=-1):
            return nn.DenseGeneral(width, axis, use_bias=False, name=name)

        y = nn.RMSNorm()(x)
        q = linear((2 * self.groups, 4), "query")(y)
        k, v = (jnp.repeat(linear((self.groups, 4), name)(y), 2, 2) for name in ("key", "value"))
        causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
        weights = nn.softmax(jnp.where(causal, jnp.einsum("bqhd,bkhd->bhqk", q, k), -1e9))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + linear(16, "attended", (-2, -1))(y)
        y = nn.RMSNorm()(x)
        gate, up = (linear(self.hidden, name)(y) for name in ("gate", "up"))
        x = x + linear(16, "down")(nn.silu(gate) * up)
        return nn.Dense(5)(x)


class LSTM(nn.Module):
    width: int = 12

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(self.width))(x)[:, -1])


class Shuffle(nn.Module):
    """Grouped convolutions with shuffled channels, then pixels out of channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3))(x))
        x = nn.Conv(12, (1, 1), feature_group_count=3)(x)
        x = x.reshape(*x.shape[:3], 3, 4).swapaxes(3, 4).reshape(x.shape)
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=12)(x))
        x = nn.Conv(24, (3, 3))(x).reshape(*x.shape[:3], 2, 2, 6)
        b, h, w = x.shape[:3]
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 6)
        return nn.Conv(5, (3, 3))(x).mean((1, 2))


class UNet(nn.Module):
    fine: int = 6
    coarse: int = 8
    up: int = 7

    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(self.fine, (3, 3), name="fine")(x))
        b = nn.relu(nn.Conv(self.coarse, (3, 3), strides=2, name="coarse")(a))
        b = b + nn.relu(nn.Conv(self.coarse, (3, 3), name="residual")(b))
        b = jax.image.resize(b, (*a.shape[:3], b.shape[-1]), "nearest")
        x = nn.relu(nn.Conv(self.up, (3, 3), name="up")(jnp.concatenate([b, a], -1)))
        return nn.Conv(2, (3, 3), name="head")(x)


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(24, (3, 3))(x)))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=4)(x))
        x = nn.ConvTranspose(8, (2, 2), strides=(2, 2))(x)
        return nn.Dense(3)(nn.avg_pool(x, (2, 2), (2, 2)).mean((1, 2)))


def linen(net, x=IMAGES, allowed=()):
    return lambda: Case(net.apply, draw(jax.eval_shape(net.init, KEY, x)), x, allowed)


class Nnx(nnx.Module):
    def __init__(self, width):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.conv = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        return self.head((x + nnx.relu(self.conv(x))).mean((1, 2)))


def nnx_net(width=8):
    graph, state = nnx.split(nnx.eval_shape(lambda: Nnx(width)))
    return lambda: Case(lambda p, x: nnx.merge(graph, p)(x), draw(state), IMAGES, ("stream",))


class Equinox(eqx.Module):
    layers: dict

    def __init__(self, stem, hidden):
        keys = jax.random.split(KEY, 5)
        self.layers = {
            "stem": eqx.nn.Conv2d(3, stem, 3, padding=1, key=keys[0]),
            "conv": eqx.nn.Conv2d(stem, 12, 3, stride=2, padding=1, key=keys[1]),
            "norm": eqx.nn.GroupNorm(4, 12),
            "attention": eqx.nn.MultiheadAttention(3, 12, key=keys[2]),
            "up": eqx.nn.Linear(12, hidden, key=keys[3]),
            "head": eqx.nn.Linear(hidden, 4, key=keys[4]),
        }

    def __call__(self, image):
        layers = self.layers
        x = layers["norm"](layers["conv"](jax.nn.relu(layers["stem"](image))))
        x = x.reshape(12, -1).T
        x = x + layers["attention"](x, x, x)
        return layers["head"](jax.nn.gelu(layers["up"](x.mean(0))))


def equinox_net(stem=8, hidden=16):
    def build():
        shapes = eqx.filter_eval_shape(Equinox, stem, hidden)
        shapes, rest = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        x = IMAGES.transpose(0, 3, 1, 2)
        return Case(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), draw(shapes), x)

    return build


def haiku(net, x, allowed=()):
    """`net(x, is_training)`; the averages of its batch statistics are parameters here."""

    def build():
        init, apply = hk.without_apply_rng(hk.transform_with_state(net))
        params, state = jax.eval_shape(lambda key: init(key, x, True), KEY)
        averages = hk.data_structures.filter(lambda module, name, _: name == "average", state)
        return Case(lambda p, x: apply(*p, x, False)[0], draw((params, averages)), x, allowed)

    return build


def haiku_mobilenet(channels=(8, 12)):
    return haiku(lambda x, t: hk.nets.MobileNetV1((1, 2), channels, num_classes=5)(x, t), IMAGES)


def haiku_rnn(x, is_training):
    core = hk.DeepRNN([hk.LSTM(12), jax.nn.relu, hk.GRU(8)])
    return hk.Linear(3)(hk.dynamic_unroll(core, x.swapaxes(0, 1), core.initial_state(3))[0][-1])


def haiku_transformer(x, is_training):
    """Layers of one shape, stacked and scanned by the library."""

    def layer(h):
        start = hk.initializers.VarianceScaling()
        h = h + hk.MultiHeadAttention(2, 4, w_init=start, model_size=12)(h, h, h)
        return h + hk.Linear(12)(jax.nn.gelu(hk.Linear(20)(h)))

    h = hk.experimental.layer_stack(2)(layer)(hk.Linear(12)(x))
    return hk.Linear(3)(h.mean(1))


def jraph_net(edge=(10, 8), node=(14, 12)):
    """A round of messages on rings of nodes."""

    def net(x):
        senders = np.arange(len(x))
        graph = jraph.GraphsTuple(
            nodes=hk.Linear(12)(x),
            edges=x[:, :2],
            senders=senders,
            receivers=np.roll(senders, 1),
            n_node=np.array([len(x)]),
            n_edge=np.array([len(x)]),
            globals=None,
        )
        updates = (jraph.concatenated_args(hk.nets.MLP(widths)) for widths in (edge, node))
        return hk.Linear(3)(jraph.InteractionNetwork(*updates)(graph).nodes)

    return haiku(lambda x, is_training: hk.vmap(net, split_rng=False)(x), TOKENS)


def stax_net(width=8):
    def build():
        branch = stax.serial(
            stax.Conv(width, (1, 1)),
            stax.BatchNorm(),
            stax.Relu,
            stax.Conv(6, (3, 3), None, "SAME"),
        )
        init, apply = stax.serial(
            stax.GeneralConv(("NHWC", "OIHW", "NHWC"), 6, (3, 3)),
            *(stax.FanOut(2), stax.parallel(branch, stax.Identity), stax.FanInSum, stax.Softplus),
            *(stax.FanOut(2), stax.parallel(stax.AvgPool((3, 3)), stax.MaxPool((3, 3)))),
            *(stax.FanInConcat(), stax.Flatten, stax.Dense(5), stax.LogSoftmax),
        )
        params = jax.eval_shape(lambda key: init(key, IMAGES.shape)[1], KEY)
        return Case(apply, draw(params), IMAGES, ("stream",))

    return build


def plain(apply, shapes, x=VECTORS, allowed=()):
    return lambda: Case(apply, draw(shapes), x, allowed)


def glu(p, x):
    value, gate = jnp.split(x @ p["up"] + p["bias"], 2, -1)
    return (value * jax.nn.sigmoid(gate)) @ p["down"]


def densenet(p, x):
    for scale, shift, kernel in zip(p["scale"], p["shift"], p["kernel"], strict=True):
        x = jnp.concatenate([x, jax.nn.relu(x * scale + shift) @ kernel], -1)
    return x @ p["head"]


def rope(p, x):
    angles = np.arange(5)[:, None, None] * 0.1 * np.arange(1, 5)
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))

    def rotate(x):
        a, b = jnp.split(x, 2, -1)
        return x * cos + jnp.concatenate([-b, a], -1) * sin

    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], 2, 8) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k)))
    return x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["o"]


def stacked(p, x):
    def layer(h, q):
        return h + jax.nn.gelu(h @ q["up"] + q["b"]) @ q["down"] + q["c"], None

    return jax.lax.scan(layer, jnp.tanh(x @ p["in"]), p["layers"])[0] @ p["out"]


def recurrent(p, x):
    def cell(h, u):
        return (jnp.tanh(h @ p["h"] + u @ p["x"] + p["b"]),) * 2

    start = jnp.zeros((len(x), len(p["h"])))
    return jax.lax.scan(cell, start, x.swapaxes(0, 1))[1].mean(0) @ p["out"]


def branching(p, x):
    h = jax.nn.relu(x @ p["a"])
    h = jax.lax.cond(x.sum() > 0, lambda h: 2 * h, jax.nn.relu, h)
    return jax.checkpoint(lambda h: jnp.tanh(h @ p["b"]) @ p["c"])(h)


def language(p, words):
    h = p["embedding"][words] + p["positions"]
    return (h + jax.nn.gelu(h @ p["up"]) @ p["down"]) @ p["embedding"].T


def standardised(p, x):
    def conv(x, w):
        w = (w - w.mean((0, 1, 2))) / jnp.sqrt(w.var((0, 1, 2)) + 1e-3)
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
        return jax.nn.relu(x)

    return conv(conv(x, p["a"]), p["b"]).mean((1, 2)) @ p["c"]


def padded():
    """Shortcuts of option A: the stream of a stage is a piece of that of the next."""
    spec = cifar_spec.resnet_spec(
        8, num_classes=3, stage_widths=(4, 8, 12), image_size=8, shortcut="pad"
    )
    params = draw(cifar_resnet.param_shapes(spec))
    return Case(lambda p, x: cifar_resnet.apply(spec, p, x), params, IMAGES, ("stream",))


_DENSE = {"scale": [(16,), (24,), (32,)], "shift": [(16,), (24,), (32,)], "head": (40, 4)}
_STACK = {"up": (3, 12, 20), "b": (3, 20), "down": (3, 20, 12), "c": (3, 12)}
_WORDS = {"embedding": (11, 12), "positions": (5, 12), "up": (12, 20), "down": (20, 12)}

PLAIN = {  # their sizes are those of their parameters alone
    "glu": plain(glu, {"up": (16, 24), "bias": (24,), "down": (12, 5)}),
    "densenet": plain(densenet, _DENSE | {"kernel": [(16, 8), (24, 8), (32, 8)]}),
    "stacked": plain(
        stacked, {"in": (16, 12), "layers": _STACK, "out": (12, 4)}, VECTORS, ("stream",)
    ),
    "recurrent": plain(
        recurrent, {"h": (10, 10), "x": (16, 10), "b": (10,), "out": (10, 3)}, TOKENS
    ),
    "branching": plain(branching, {"a": (16, 12), "b": (12, 8), "c": (8, 3)}),
    "language": plain(language, _WORDS, WORDS, ("stream",)),
    "standardised": plain(
        standardised, {"a": (3, 3, 3, 8), "b": (3, 3, 8, 8), "c": (8, 4)}, IMAGES
    ),
}
CASES = PLAIN | {
    "mlp": linen(MLP()),
    "vgg": linen(VGG()),
    "mobilenet": linen(MobileNet(), allowed=("stream",)),
    "vit": linen(ViT()),
    "fused": linen(FusedAttention(), TOKENS),
    "llama": linen(Llama(), TOKENS),
    "lstm": linen(LSTM(), TOKENS),
    "shuffle": linen(Shuffle()),
    "unet": linen(UNet(), allowed=("stream",)),
    "grouped": linen(Grouped()),
    "nnx": nnx_net(),
    "equinox": equinox_net(),
    "rope": plain(rope, dict.fromkeys("qkvo", (16, 16)), TOKENS),
    "padded": padded,
    "haiku_mobilenet": haiku_mobilenet(),
    "haiku_rnn": haiku(haiku_rnn, TOKENS, ("stream",)),
    "haiku_transformer": haiku(haiku_transformer, TOKENS, ("stream",)),
    "jraph": jraph_net(),
    "stax": stax_net(),
}

_BLOCK = "0/mobile_net_v1/mobile_net_v1_block"
REBUILT = {  # name: ({group: width}, the network built with these widths)
    "mlp": ({"Dense_0": 20, "Dense_1": 40}, linen(MLP((20, 40)))),
    "vgg": (
        {"Conv_0": 5, "Conv_1": 12, "Conv_2": 9, "Dense_0": 33},
        linen(VGG((5, 12, 9), 33)),
    ),
    "mobilenet": (
        {"stem": 10, "expand": 24, "squeeze": 5},
        linen(MobileNet(10, 24, 5)),
    ),
    "vit": (
        {"attention0/query": 2, "attention1/query": 2, "up0": 30, "up1": 30},
        linen(ViT(heads=2, hidden=30)),
    ),
    "fused": ({"qkv": 5}, linen(FusedAttention(5), TOKENS)),
    "llama": ({"query": 3, "gate": 20}, linen(Llama(3, 20), TOKENS)),
    "lstm": ({"OptimizedLSTMCell_0/hf": 15}, linen(LSTM(15), TOKENS)),
    "unet": ({"fine": 9, "coarse": 5, "up": 8}, linen(UNet(9, 5, 8))),
    "nnx": ({"stem": 11}, nnx_net(11)),
    "equinox": ({"layers/stem": 5, "layers/up": 20}, equinox_net(5, 20)),
    "haiku_mobilenet": (
        {f"{_BLOCK}/pointwise_conv": 10, f"{_BLOCK}_1/pointwise_conv": 7},
        haiku_mobilenet((10, 7)),
    ),
    "jraph": (
        {"0/mlp/~/linear_0": 13, "0/mlp/~/linear_1": 5, "0/mlp_1/~/linear_1": 9},
        jraph_net((13, 5), (14, 9)),
    ),
    "stax": ({"2/0/0/0": 11}, stax_net(11)),
}
