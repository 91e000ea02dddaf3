"""What every format is written from: a network with its images, and the list of its operations."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data import preprocessing
from neumeta_jax.evaluation import quantize
from neumeta_jax.networks import families
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.families import Family, Size

INPUT_NAME, OUTPUT_NAME = "images", "logits"
_BATCH_SIZE = 256


class Normalization(NamedTuple):
    """What a network expects to be done to images in [0, 255]: (images / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(preprocessing.normalize(jnp.asarray(pixels), *self))


class Network(NamedTuple):
    """A network to export.

    Attributes:
        spec: its shapes.
        params: its folded tree, or that of `quantize.quantize`.
        normalization: of its images.
        info: JSON values that tell more of it.
    """

    spec: Size
    params: Mapping[str, Any]
    normalization: Normalization
    info: Mapping[str, Any] = {}

    @property
    def resnet(self) -> ResNetSpec:
        """`spec`, for formats that are written of CIFAR ResNets alone."""
        return cast("ResNetSpec", self.spec)

    @property
    def layers(self) -> dict[str, Mapping[str, Any]]:
        """{"kernel", "bias"[, "scale"]} by the layer's name: "stem", "stage1_block0.conv1", ..."""
        found: Any = flatten_dict(self.params, is_leaf=lambda _, x: "kernel" in x, sep=".")
        return found

    @property
    def metadata(self) -> dict[str, Any]:
        """All but the tree, as JSON values."""
        normalization = {name: list(value) for name, value in self.normalization._asdict().items()}
        return {**self.info, **normalization, "network": self.spec.to_dict()}

    @property
    def texts(self) -> dict[str, str]:
        """`metadata`, each value as JSON."""
        return {key: json.dumps(value, sort_keys=True) for key, value in self.metadata.items()}

    def logits(self, images: np.ndarray) -> np.ndarray:
        """float32[images, classes] of uint8 images NHWC, in float32 on the CPU."""
        with on_cpu():
            tree = quantize.dequantize(self.params)
        network = jax.jit(lambda batch: families.run(self.spec, tree, batch))
        return run(network, images, self.normalization)


def draw(
    hypernetwork: Family, params: Mapping, widths: Sequence[int], **noise: Any
) -> tuple[Size, Params]:
    """The dense network of `widths`, (spec, tree), with the noise that `evaluation` gives it."""
    full = [max(pair) for pair in zip(widths, hypernetwork.full_widths, strict=True)]

    @jax.jit
    def generate(params):
        tree = hyper.generate(hypernetwork, params, np.array(widths), sizes=full, **noise)
        return hypernetwork.dense(tree, widths, full)[1]

    # jit sorts the layers; the order of the network is that of its description.
    spec, tree = hypernetwork.at(widths), generate(params)
    return spec, {name: tree[name] for name in families.abstract_params(spec)}


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Computes on the CPU, where float32 is float32, if JAX may use it."""
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield


def in_batches(images: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(images, range(size, len(images), size))


def run(network: Callable, pixels: np.ndarray, normalize: Callable | None) -> np.ndarray:
    """What `network` computes of `pixels` on the CPU, normalised where `normalize` is given."""
    with on_cpu():
        batches = in_batches(pixels, _BATCH_SIZE)
        inputs = map(normalize, batches) if normalize else batches
        return np.concatenate([np.asarray(network(batch)) for batch in inputs])


def operations(spec: ResNetSpec) -> Iterator[tuple[str, str, tuple]]:
    """What a CIFAR ResNet does, in order: (operation, name of its result, arguments).

    "conv" (input, stride, relu) by the layer of its name, with zeros around the image, as many as
    half the kernel; "pad" (input, stride, before, after): every `stride`-th pixel, between channels
    of zeros; "add" (inputs), then ReLU; "mean" (input) over pixels; "dense" (input) by the layer
    "head". The first reads INPUT_NAME, the last is OUTPUT_NAME.
    """
    x = "stem"
    yield "conv", x, (INPUT_NAME, 1, True)
    for block in spec.blocks:
        if block.hidden_width == 0:
            continue
        name, shortcut = block.name, x
        yield "conv", f"{name}.conv1", (x, block.stride, True)
        yield "conv", f"{name}.conv2", (f"{name}.conv1", 1, False)
        if block.projection or not block.skippable:
            shortcut, extra = f"{name}.shortcut", block.out_width - block.in_width
            padding = "pad", shortcut, (x, block.stride, extra // 2, extra - extra // 2)
            yield ("conv", shortcut, (x, block.stride, False)) if block.projection else padding
        yield "add", name, ((shortcut, f"{name}.conv2"),)
        x = name
    yield "mean", "features", (x,)
    yield "dense", OUTPUT_NAME, ("features",)
