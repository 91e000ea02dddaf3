"""StableHLO: the whole computation as one `jax.export` artefact; images are NHWC."""

import os
import pathlib
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from neumeta_jax.data import preprocessing
from neumeta_jax.evaluation import quantize
from neumeta_jax.export.network import Network
from neumeta_jax.networks import families

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(network: Network, *, normalize: bool = False) -> bytes:
    """The network as one serialised artefact for `PLATFORMS`.

        network = jax.export.deserialize(bytearray(pathlib.Path("half.stablehlo").read_bytes()))
        logits = network.call(images)  # float32[batch, classes], for a batch of any size

    Each platform multiplies in its own default precision, which is below float32 on most
    accelerators. Images are float32 and come normalised; with `normalize` they are uint8 pixels.
    """
    spec, weights = network.spec, jax.tree.map(np.asarray, dict(network.params))

    def run(images):
        if normalize:
            images = preprocessing.normalize(images, *network.normalization)
        return families.run(spec, quantize.dequantize(weights), images)

    size = f"batch, {spec.image_size}, {spec.image_size}, {spec.channels}"
    shape, dtype = jax.export.symbolic_shape(size), jnp.uint8 if normalize else jnp.float32
    images = jax.ShapeDtypeStruct(shape, dtype)
    return bytes(jax.export.export(jax.jit(run), platforms=PLATFORMS)(images).serialize())


def write(path: str | os.PathLike, network: Network, *, normalize: bool = False) -> None:
    pathlib.Path(path).write_bytes(to_stablehlo(network, normalize=normalize))


def read(path: str | os.PathLike) -> Callable:
    """The network of a file, images NHWC -> logits."""
    return jax.export.deserialize(bytearray(pathlib.Path(path).read_bytes())).call
