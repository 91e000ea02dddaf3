"""One network as a file that other tools load, checked to compute the same thing.

    network = Network(*draw(family, params, widths), Normalization(mean, std))
    equivalence = export("half.onnx", network, images, format="onnx")

Each format is a module, and a line of `FORMATS`, by which `write` takes the arguments in brackets:

    write(path, network[, normalize=True][, calibration=images])
    read(path)               images NHWC, as the file takes them -> logits

Batches are of any size. Neither PyTorch nor TensorFlow is needed.
"""

import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from neumeta_jax.errors import UsageError, check
from neumeta_jax.evaluation import quantize
from neumeta_jax.export import litert, onnx, safetensors, stablehlo, torch_state
from neumeta_jax.export.network import Network, Normalization, run
from neumeta_jax.files import storage
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.families import Size


class _Module(Protocol):
    write: Callable[..., None]
    read: Callable[..., Callable]


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        module: that writes and reads it.
        suffix: of its files.
        packages: that it takes beyond what every installation has.
        any_network: whether it takes other networks than CIFAR ResNets.
        graph: whether it holds the computation, and so the normalisation if asked to.
        int8: which of `INT8` it can hold.
        channels_first: whether it takes images NCHW.
    """

    module: _Module
    suffix: str
    packages: tuple[str, ...] = ()
    any_network: bool = False
    graph: bool = True
    int8: tuple[str, ...] = ()
    channels_first: bool = False


INT8 = ("weights", "full")
FORMATS = {
    "safetensors": Format(
        safetensors, ".safetensors", any_network=True, graph=False, int8=INT8[:1]
    ),
    "torch": Format(torch_state, ".pt", graph=False, channels_first=True),
    "onnx": Format(onnx, ".onnx", ("onnx", "onnxruntime"), int8=INT8, channels_first=True),
    "stablehlo": Format(stablehlo, ".stablehlo", ("flatbuffers",), any_network=True, int8=INT8[:1]),
    "litert": Format(litert, ".tflite", ("ai_edge_litert", "ai_edge_quantizer"), int8=INT8),
}

TOLERANCE = 1e-4
# Of networks with 8-bit activations: their logits are off by several percent, those of a wrong file
# by more than all of it.
FULL_INT8_TOLERANCE = 0.5
NUM_CALIBRATION_IMAGES = 512


def _names(condition: Callable[[Format], Any]) -> str:
    return ", ".join(name for name, format in FORMATS.items() if condition(format))


class Equivalence(NamedTuple):
    """How a file's logits differ from those of the network it was made of.

    Attributes:
        error: the largest difference of a logit, relative to the largest logit of its image.
        agreement: the fraction of images with the same top-1 class.
        num_images: how many images.
    """

    error: float
    agreement: float
    num_images: int

    def __str__(self) -> str:
        return (
            f"largest relative logit error {self.error:.1e}, top-1 agreement "
            f"{100 * self.agreement:.2f} % on {self.num_images} images"
        )


class EquivalenceError(ValueError):
    """A written file does not compute what it should."""


def compare(found: np.ndarray, wanted: np.ndarray) -> Equivalence:
    """How the logits `found` differ from `wanted`, both float[images, classes].

    >>> compare(np.array([[1.0, -4.0]]), np.array([[1.0, -5.0]]))
    Equivalence(error=0.2, agreement=1.0, num_images=1)
    """
    scale = np.maximum(np.abs(wanted).max(axis=1), np.finfo(np.float32).tiny)
    error = (np.abs(found - wanted).max(axis=1) / scale).max()
    agreement = np.mean(found.argmax(axis=1) == wanted.argmax(axis=1))
    return Equivalence(float(error), float(agreement), len(wanted))


def check_format(
    name: str, *, normalize: bool = False, int8: str | None = None, spec: Size | None = None
) -> Format:
    """The format of a name, if it can hold that and what it takes is installed.

    Raises:
        UsageError: else.
    """
    check(name in FORMATS, f"The format must be one of {', '.join(FORMATS)}, got {name!r}.")
    format = FORMATS[name]
    missing = [package for package in format.packages if not importlib.util.find_spec(package)]
    check(
        not missing,
        f"{name} files need {' and '.join(missing).replace('_', '-')}; install them with pip "
        "install 'neumeta-jax[export]'.",
    )
    # Nor into the weights: the first convolution pads normalised images with zeros, no pixels.
    check(
        format.graph or not normalize,
        f"--normalize is for {_names(lambda f: f.graph)}, got {name}, which holds weights and no "
        "computation; normalise images before the network.",
    )
    check(int8 in (None, *INT8), f"--int8 is one of {', '.join(INT8)} or absent, got {int8!r}.")
    check(
        int8 is None or int8 in format.int8,
        f"--int8={int8} is for {_names(lambda f: int8 in f.int8)}, got {name}; choose another "
        "--format.",
    )
    if spec is not None and not isinstance(spec, ResNetSpec):
        check(
            format.any_network,
            f"--format={name} is written for CIFAR ResNets; a {spec.title} is exported as one of "
            f"{_names(lambda f: f.any_network)}.",
        )
    return format


def check_writable(path: str | os.PathLike) -> None:
    """Raises unless a file can be put at `path`, which --out gave."""
    path = pathlib.Path(path)
    known = path.is_file() or not path.exists()
    check(known, f"--out must name a file, but {path} is something else; choose another.")
    probe = path.with_name(f"{path.name}.partial")
    with storage.writing(path):
        probe.touch()
        probe.unlink()


def logits_of_file(
    path: str | os.PathLike,
    images: np.ndarray,
    *,
    format: str,
    normalization: Normalization | None = None,
) -> np.ndarray:
    """Logits float32[images, classes] of a file on uint8 images NHWC, by its format's own reader.

    `normalization` is that of the images, unless the file normalises by itself.
    """
    return run(FORMATS[format].module.read(path), images, normalization)


def export(
    path: str | os.PathLike,
    network: Network,
    images: np.ndarray,
    *,
    format: str,
    normalize: bool = False,
    int8: str | None = None,
    calibration: np.ndarray | None = None,
    tolerance: float | None = None,
) -> Equivalence:
    """Writes a network, reads it back, and lets it take its name if it computes the same.

    Args:
        path: where to; an existing file is replaced once the new one is complete and checked.
        network: with the float32 tree.
        images: uint8[images, size, size, channels], to compare on.
        format: one of `FORMATS`.
        normalize: whether to put the normalisation into the graph, which then takes pixels.
        int8: "weights", "full" or None. A file with 8-bit weights must compute what the network of
            the rounded weights does, a file with 8-bit activations too what the float32 network
            does.
        calibration: uint8 images of the training set to measure the ranges of activations on, for
            "full".
        tolerance: largest relative logit error (see `Equivalence`) to accept; default: `TOLERANCE`,
            or `FULL_INT8_TOLERANCE` for "full".

    Raises:
        ValueError: if an argument is out of range, or the file computes something else.
        StorageError: if it cannot be written. In all cases nothing has changed at `path`.
    """
    module = check_format(format, normalize=normalize, int8=int8, spec=network.spec).module
    check(len(images) > 0, "An export needs at least one image to compare on, got none.")
    options: dict[str, Any] = {"normalize": True} if normalize else {}
    outside = None if normalize else network.normalization
    if int8:
        network = network._replace(info={**network.info, "int8": int8})
    if int8 == "weights":
        network = network._replace(params=quantize.quantize(network.params))
    if int8 == "full":
        if calibration is None or not len(calibration):
            raise UsageError("An export with int8='full' needs calibration images, got none.")
        options["calibration"] = outside(calibration) if outside else calibration
    if tolerance is None:
        tolerance = FULL_INT8_TOLERANCE if int8 == "full" else TOLERANCE
    check_writable(path)
    wanted = network.logits(images)
    # The suffix, because readers go by it.
    with storage.replacing(path, suffix=f".partial{FORMATS[format].suffix}") as partial:
        module.write(partial, network, **options)
        found = logits_of_file(partial, images, format=format, normalization=outside)
        equivalence = compare(found, wanted)
        if not equivalence.error <= tolerance:  # NaN too
            raise EquivalenceError(
                f"The {format} file must compute what the network does to within {tolerance:g}, "
                f"but it has {equivalence}; {os.fspath(path)} was not written."
            )
    return equivalence
