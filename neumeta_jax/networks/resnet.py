"""ResNets of four stages, as for ImageNet, and their parameters from torchvision's names."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.networks.layers import batch_norm, conv

# By the number of layers with weights (table 1).
RESNET_VARIANTS: dict[Any, dict[str, Any]] = {
    18: {"blocks": (2, 2, 2, 2), "bottleneck": False},
    34: {"blocks": (3, 4, 6, 3), "bottleneck": False},
    50: {"blocks": (3, 4, 6, 3), "bottleneck": True},
    101: {"blocks": (3, 4, 23, 3), "bottleneck": True},
    152: {"blocks": (3, 8, 36, 3), "bottleneck": True},
}

STEMS = ("imagenet", "cifar")


class ResNet(nn.Module):
    """A ResNet with basic or bottleneck blocks (He, Zhang, Ren and Sun, arXiv 1512.03385).

    It is torchvision's: a stride is in the 3 x 3 convolution of a bottleneck, and shortcuts are
    1 x 1 convolutions where the shape changes. With 1000 classes, torchvision has 11,689,512
    parameters (depth 18), 21,797,672 (34), 25,557,032 (50), 44,549,160 (101) and 60,192,808 (152).

        >>> import jax
        >>> from neumeta_jax.networks import RESNET_VARIANTS, ResNet
        >>> net, images = ResNet(**RESNET_VARIANTS[18]), jax.numpy.zeros((2, 224, 224, 3))
        >>> variables = jax.eval_shape(net.init, jax.random.key(0), images)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        11689512

    Attributes:
        blocks: in each stage. The first block of a stage but the first halves the image.
        bottleneck: blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions, the last one with 4 times the
            channels, instead of two of 3 x 3.
        width: channels inside the blocks of the first stage; each stage has twice those of the
            one before.
        stem: "imagenet", a convolution of 7 x 7 and a maximum, which leave a quarter of the height
            and width, or "cifar", a convolution of 3 x 3, which leaves all.
        num_classes: length of the output.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    stem: str = "imagenet"
    num_classes: int = 1000

    def __post_init__(self):
        super().__post_init__()
        if not self.blocks or min((*self.blocks, self.width, self.num_classes)) < 1:
            raise ValueError(
                "A ResNet needs one block or more in each stage, and width and num_classes of 1 or "
                f"more, got {self.blocks=}, {self.width=}, {self.num_classes=}."
            )
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {self.stem!r}.")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""
        if self.stem == "imagenet":
            x = conv(self.width, 7, "stem", stride=2)(images)
        else:
            x = conv(self.width, 3, "stem")(images)
        x = nn.relu(batch_norm(train, "stem_bn")(x))
        if self.stem == "imagenet":
            x = _max_pool(x)
        block_class = Bottleneck if self.bottleneck else BasicBlock
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block}"
                x = block_class(self.width * 2**stage, stride, name=name)(x, train=train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = conv(self.width, 3, "conv1", stride=self.stride)(x)
        y = nn.relu(batch_norm(train, "bn1")(y))
        y = batch_norm(train, "bn2")(conv(self.width, 3, "conv2")(y))
        return nn.relu(_shortcut(x, y.shape[-1], self.stride, train) + y)


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, the last one to 4 times the width."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = nn.relu(batch_norm(train, "bn1")(conv(self.width, 1, "conv1")(x)))
        y = conv(self.width, 3, "conv2", stride=self.stride)(y)
        y = nn.relu(batch_norm(train, "bn2")(y))
        y = batch_norm(train, "bn3")(conv(4 * self.width, 1, "conv3")(y))
        return nn.relu(_shortcut(x, y.shape[-1], self.stride, train) + y)


def _max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3 x 3 at every second pixel, with PyTorch's padding."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _shortcut(x: jax.Array, width: int, stride: int, train: bool) -> jax.Array:
    if stride == 1 and x.shape[-1] == width:
        return x
    return batch_norm(train, "shortcut_bn")(conv(width, 1, "shortcut", stride=stride)(x))


def from_torchvision(tensors: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Variables of the ResNet of `depth` from the state_dict of torchvision's.

    The network that takes them is `ResNet(**RESNET_VARIANTS[depth], num_classes=...)` with as many
    classes as there are in `fc.weight`.

    Args:
        tensors: arrays under torchvision's names, `model.state_dict()` for example. Kernels are
            OIHW; `num_batches_tracked` is ignored.
        depth: 18, 34, 50, 101 or 152.

    Returns:
        {"params", "batch_stats"}, float32, kernels HWIO.

    Raises:
        ValueError: for another depth, and where tensors are missing, unknown or of other shapes.
    """
    if depth not in RESNET_VARIANTS:
        raise ValueError(f"The depth must be one of {sorted(RESNET_VARIANTS)}, got {depth!r}.")
    arrays = {
        name: np.asarray(tensor)
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    head = arrays.get("fc.weight", np.zeros((1, 0)))
    if head.ndim != 2 or not len(head):
        raise ValueError(f"fc.weight must have the shape (classes, features), got {head.shape}.")
    net = ResNet(**RESNET_VARIANTS[depth], num_classes=len(head))
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    paths, tree = jax.tree.flatten_with_path(variables)
    expected = {}  # by torchvision's name
    for path, leaf in paths:
        collection, *layers, kind = (entry.key for entry in path)
        expected[_torch_name(collection, layers, kind)] = leaf.shape
    if missing := [name for name in expected if name not in arrays]:
        raise ValueError(
            f"A ResNet{depth} has {len(expected)} tensors and {_listed(missing)} missing."
        )
    if unknown := [name for name in arrays if name not in expected]:
        raise ValueError(f"{_listed(unknown)} not among the tensors of a ResNet{depth}.")
    leaves = []
    for name, shape in expected.items():
        array = arrays[name]
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[len(shape)]  # ours in the order of theirs
        theirs = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
        if array.shape != theirs:
            raise ValueError(
                f"{name} of a ResNet{depth} must have the shape {theirs}, got {array.shape}."
            )
        leaves.append(jnp.asarray(array.transpose(axes), jnp.float32))
    return jax.tree.unflatten(tree, leaves)


def _torch_name(collection: str, layers: list[str], kind: str) -> str:
    """torchvision's name of a leaf.

    >>> _torch_name("batch_stats", ["stage2_block0", "shortcut_bn"], "var")
    'layer2.0.downsample.1.running_var'
    """
    *block, layer = layers
    renamed = {
        "stem": "conv1",
        "stem_bn": "bn1",
        "head": "fc",
        "shortcut": "downsample.0",
        "shortcut_bn": "downsample.1",
    }
    parts = [name.replace("stage", "layer").replace("_block", ".") for name in block]
    kind = f"running_{kind}" if collection == "batch_stats" else kind
    kind = "weight" if kind in ("kernel", "scale") else kind
    return ".".join([*parts, renamed.get(layer, layer), kind])


def _listed(names: list[str]) -> str:
    """The subject of a sentence: at most three of the names, and how many more, with its verb."""
    text = ", ".join(names[:3])
    if len(names) > 3:
        text += f" and {len(names) - 3} more"
    return f"{text} {'is' if len(names) == 1 else 'are'}"
