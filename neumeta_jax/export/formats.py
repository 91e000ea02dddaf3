"""One network of a trained INR as a file that other tools load, checked to compute the same thing.

    python -m neumeta_jax.export --workdir=/tmp/digits --width=0.5 --format=onnx --out=half.onnx
    python -m neumeta_jax.export --workdir=/tmp/digits --widths=4,0,8,8,16 --format=torch --out=a.pt
    python -m neumeta_jax.export --workdir=/tmp/digits --spec=best.json --format=stablehlo \
        --normalize --out=best.stablehlo

| format | content | images |
|---|---|---|
| safetensors | the folded tree; in the header its ResNetSpec, mean and std (`load_safetensors`) | |
| torch | a state_dict for a CIFAR ResNet whose blocks take hidden widths (`to_state_dict`) | NCHW |
| onnx | a float32 graph of opset 13 with its ResNetSpec, mean and std as metadata | NCHW |
| stablehlo | one `jax.export` artefact for cpu, cuda and tpu | NHWC |
| litert | a LiteRT (TensorFlow Lite) file with the metadata of onnx (`litert`) | NHWC |

Batches are of any size. Images are normalised by the caller, or are the uint8 pixels of an image
file with --normalize, which puts the normalisation into the graph. It cannot go into the weights of
the first two formats: the first convolution pads normalised images with zeros, which are no pixels.

--int8 rounds the weights to 8 bits, with a scale for each output channel (`quantize`), in
safetensors (`load_safetensors` multiplies them out), onnx (DequantizeLinear in front of each
convolution), stablehlo and litert (DEQUANTIZE). --int8=full lets the quantiser of onnxruntime
(onnx) or LiteRT (litert) round the activations too, over the ranges that they take on training
images; the file is compared with the float32 network then, within a wider tolerance.

Every file is read back, run on images of the run's data set, or on random ones where that is not on
this machine, and compared before it takes its name. Neither PyTorch nor TensorFlow is needed. onnx,
onnxruntime, ai-edge-litert, ai-edge-quantizer and flatbuffers (which jax.export needs to write) are
those of the extra: pip install 'neumeta-jax[export]'.
"""

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import flags

from neumeta_jax.commands import command_line
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data import preprocessing
from neumeta_jax.errors import UsageError, sentence
from neumeta_jax.evaluation import grid, quantize
from neumeta_jax.evaluation.morphs import check_widths, load_morph, morph_to_dict, note_range
from neumeta_jax.export import litert
from neumeta_jax.networks import cifar_resnet, families, teacher_import
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import Block, ResNetSpec
from neumeta_jax.networks.families import Family, Size
from neumeta_jax.runs import checkpoint, experiment as lab

if TYPE_CHECKING:
    import onnx

FORMATS = ("safetensors", "torch", "onnx", "stablehlo", "litert")
ANY_NETWORK = ("safetensors", "stablehlo")  # formats of networks that are no CIFAR ResNets
GRAPH_FORMATS = ("onnx", "stablehlo", "litert")  # hold the computation, not only the weights
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4
INT8 = ("weights", "full")
INT8_FORMATS = {
    "weights": ("safetensors", "onnx", "stablehlo", "litert"),
    "full": ("onnx", "litert"),
}
# Of networks with 8-bit activations: their logits are off by several percent, those of a wrong file
# by more than all of it.
FULL_INT8_TOLERANCE = 0.5
NUM_CALIBRATION_IMAGES = 512

ONNX_OPSET = 13  # the first whose operators quantise per channel; every runtime since 2020 reads it
ONNX_IR_VERSION = 7  # of ONNX 1.8, which brought opset 13
INPUT_NAME, OUTPUT_NAME = "images", "logits"

_SUFFIXES = {
    "safetensors": ".safetensors",
    "torch": ".pt",
    "onnx": ".onnx",
    "stablehlo": ".stablehlo",
    "litert": ".tflite",
}
_EXTRAS = {
    "onnx": ("onnx", "onnxruntime"),
    "stablehlo": ("flatbuffers",),
    "litert": ("ai_edge_litert", "ai_edge_quantizer"),
}
_BATCH_SIZE = 256


class Normalization(NamedTuple):
    """What a network expects to be done to images in [0, 255]: (images / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# --- which network ---------------------------------------------------------------------------


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
    spec = hypernetwork.at(widths)
    tree = generate(params)
    return spec, {name: tree[name] for name in families.abstract_params(spec)}


# --- safetensors -----------------------------------------------------------------------------


def save_safetensors(
    path: str | os.PathLike,
    spec: Size,
    params: Mapping,
    *,
    normalization: Normalization,
    **info: Any,
) -> None:
    """Writes a folded network with all that it takes to run it; `load_safetensors` reads it.

    The tree may be one of `quantize.quantize`.
    """
    header = {
        "network": spec.to_dict(),
        "mean": list(normalization.mean),
        "std": list(normalization.std),
    }
    checkpoint.save_tree(path, params, {**info, **header})


def load_safetensors(path: str | os.PathLike) -> tuple[Size, Params, dict[str, Any]]:
    """The (spec, params, info) of an exported network.

        spec, params, info = load_safetensors("half.safetensors")
        images = preprocessing.normalize(pixels, info["mean"], info["std"])
        logits = families.run(spec, params, images)

    Weights in 8 bits come multiplied by their scales, in float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, is no exported network, or its tensors do not fit its spec.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {os.fspath(path)}; check the path.")
    params, info = checkpoint.load_tree(path)
    missing = {"network", "mean", "std"} - set(info)
    if missing:
        raise ValueError(
            f"{os.fspath(path)} must hold an exported network, but its header lacks "
            f"{sorted(missing)}."
        )
    try:
        spec = families.size_from_dict(info.pop("network"))
        wanted = families.abstract_params(spec)
        params = quantize.dequantize(params)
    except (TypeError, ValueError) as error:
        reason = sentence(str(error))
        raise ValueError(f"{os.fspath(path)} holds no usable network: {reason}") from None
    if difference := checkpoint.first_difference(params, wanted):
        raise ValueError(
            f"{os.fspath(path)} must hold the tensors of the network in its header, but "
            f"{difference}; export it again."
        )
    if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params)):
        raise ValueError(f"{os.fspath(path)} must hold float32 tensors; export it again.")
    for name in ("mean", "std"):
        values = info[name]
        numbers = isinstance(values, list) and all(type(x) in (int, float) for x in values)
        if not numbers or len(values) != spec.channels:
            raise ValueError(
                f"{os.fspath(path)} must hold a mean and a std for each of {spec.channels} "
                f"channels, got {ascii(values)[:80]} as {name}; export it again."
            )
    return spec, params, info


# --- PyTorch ---------------------------------------------------------------------------------


def to_state_dict(spec: ResNetSpec, params: Mapping) -> dict[str, np.ndarray]:
    """The tensors of a folded network under the names of a CIFAR ResNet in PyTorch.

    The names are those of chenyaofo/pytorch-cifar-models (with padded shortcuts and the head as
    `linear`, those of akamaster/pytorch_resnet_cifar10). At full width that very class loads them
    strictly; else hidden widths inside the blocks differ from those of their stage, so the class
    must take them, as the one in examples/torch_resnet.py does. A skipped block is `nn.Identity`.

    Batch norm is the identity with the folded bias: at PyTorch's default eps of 1e-5

        (x - 0) / sqrt(float32(1 - eps) + eps) * 1 + bias,

    and in float32 the root is exactly 1, so the network computes what the folded one does.

    Returns:
        float32 arrays, convolutions OIHW, the head (out, in); int64 `num_batches_tracked`.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, name, _, conv, norm, _ in teacher_import.layers(spec):
        layer = (params[path[0]] if path else params)[name]
        bias = np.asarray(layer["bias"], np.float32)
        tensors[f"{conv}.weight"] = _oihw(layer["kernel"])
        tensors[f"{norm}.weight"] = np.ones_like(bias)
        tensors[f"{norm}.bias"] = bias
        tensors[f"{norm}.running_mean"] = np.zeros_like(bias)
        tensors[f"{norm}.running_var"] = np.full_like(bias, 1 - cifar_resnet.BATCH_NORM_EPSILON)
        tensors[f"{norm}.num_batches_tracked"] = np.array(0, np.int64)
    head = "fc" if spec.shortcut == "projection" else "linear"
    tensors[f"{head}.weight"] = np.asarray(params["head"]["kernel"], np.float32).T
    tensors[f"{head}.bias"] = np.asarray(params["head"]["bias"], np.float32)
    return tensors


def _oihw(kernel: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(kernel, np.float32).transpose(3, 2, 0, 1))


_STORAGE_TYPES = {"<f4": "FloatStorage", "<i8": "LongStorage"}
_TORCH_ALIGNMENT = 64  # of tensors in the file, so that torch.load(..., mmap=True) can map them


def to_torch(state_dict: Mapping[str, np.ndarray]) -> bytes:
    """The file that torch.save (PyTorch 1.6 and later) writes of `state_dict`; no PyTorch needed.

    A zip archive without compression: `data.pkl` describes the tensors, `data/0` and so on hold
    their numbers. Equal tensors give equal bytes.

    Args:
        state_dict: float32 and int64 arrays by name.
    """
    arrays = {}
    for name, array in state_dict.items():
        arrays[name] = np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("<"))
        if arrays[name].dtype.str not in _STORAGE_TYPES:
            raise ValueError(f"{name} must be float32 or int64, got {np.asarray(array).dtype}.")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:

        def write(name: str, content: bytes):
            entry = zipfile.ZipInfo(f"archive/{name}")  # at the date 1980-01-01
            # An extra field fills up to the boundary, after 30 bytes of header, the name, and 4
            # bytes of its own.
            padding = -(stream.tell() + 30 + len(entry.filename) + 4) % _TORCH_ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(entry, content)

        write("data.pkl", _pickle_state_dict(arrays))
        write("byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            write(f"data/{key}", array.tobytes())
        write("version", b"3\n")
    return stream.getvalue()


def _pickle_state_dict(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The pickle, protocol 2, of an OrderedDict of tensors.

    Written opcode by opcode, because `pickle` would import PyTorch to check what it names. These
    are the opcodes that torch.load(..., weights_only=True) allows.
    """

    def name(module: str, attribute: str) -> bytes:
        return b"c" + f"{module}\n{attribute}\n".encode()

    def text(value: str) -> bytes:
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def tuple_of(*items: bytes) -> bytes:
        return b"(" + b"".join(items) + b"t"

    ordered_dict = name("collections", "OrderedDict") + b")R"  # called without arguments
    pickled = b"\x80\x02" + ordered_dict + b"("
    for key, (tensor_name, array) in enumerate(arrays.items()):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        storage = tuple_of(
            text("storage"),
            name("torch", _STORAGE_TYPES[array.dtype.str]),
            text(str(key)),
            text("cpu"),
            integer(array.size),
        )
        arguments = tuple_of(
            storage + b"Q",  # a reference to a record of the archive
            integer(0),
            tuple_of(*map(integer, array.shape)),
            tuple_of(*map(integer, strides)),
            b"\x89",  # needs no gradient
            ordered_dict,  # has no hooks
        )
        pickled += text(tensor_name) + name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"
    return pickled + b"u."


# --- ONNX ------------------------------------------------------------------------------------


def to_onnx(
    spec: ResNetSpec,
    params: Mapping,
    *,
    normalization: Normalization | None = None,
    **info: Any,
) -> "onnx.ModelProto":
    """The folded network as an ONNX graph, images[batch, channels, size, size] -> logits.

    Args:
        spec, params: the network's shapes and its folded tree, or that of `quantize.quantize`.
        normalization: put into the graph, whose images then are uint8 pixels; None: images are
            float32 and come normalised.
        **info: JSON values for the model's metadata, beside "network" (the spec).
    """
    check_extra("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights = [], []

    def constant(name: str, value: Any, dtype: Any = np.float32) -> str:
        array = np.ascontiguousarray(np.asarray(value, dtype))
        weights.append(numpy_helper.from_array(array, name))
        return name

    def node(operator: str, inputs: Sequence[str], output: str, **attributes) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def weight(name: str, layer: Mapping) -> str:
        """A kernel OIHW, multiplied by its scales in the graph where it is integers."""
        if "scale" not in layer:
            return constant(name, _oihw(layer["kernel"]))
        inputs = [
            constant(f"{name}.int8", _oihw(layer["kernel"]), np.int8),
            constant(f"{name}.scale", layer["scale"]),
            constant(f"{name}.zero", np.zeros(len(layer["scale"])), np.int8),
        ]
        return node("DequantizeLinear", inputs, name, axis=0)

    def conv(x: str, layer: Mapping, name: str, stride: int = 1) -> str:
        size = layer["kernel"].shape[0]
        inputs = [
            x,
            weight(f"{name}.weight", layer),
            constant(f"{name}.bias", layer["bias"]),
        ]
        return node(
            "Conv",
            inputs,
            name,
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[size // 2] * 4,
        )

    def pad_shortcut(x: str, block: Block) -> str:
        prefix, extra = f"{block.name}.shortcut", block.out_width - block.in_width
        if block.stride > 1:
            bounds = {"starts": [0, 0], "ends": [2**31 - 1] * 2, "axes": [2, 3]}
            bounds["steps"] = [block.stride] * 2
            names = [constant(f"{prefix}.{k}", v, np.int64) for k, v in bounds.items()]
            x = node("Slice", [x, *names], f"{prefix}.slice")
        pads = constant(
            f"{prefix}.pads", [0, extra // 2, 0, 0, 0, extra - extra // 2, 0, 0], np.int64
        )
        return node("Pad", [x, pads], f"{prefix}.pad")

    def per_channel(values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, np.float32)[None, :, None, None]

    x, kind = INPUT_NAME, TensorProto.FLOAT
    if normalization is not None:
        kind = TensorProto.UINT8
        x = node("Cast", [x], "pixels", to=TensorProto.FLOAT)
        x = node("Div", [x, constant("full_scale", 255)], "scaled")
        x = node("Sub", [x, constant("mean", per_channel(normalization.mean))], "centred")
        x = node("Div", [x, constant("std", per_channel(normalization.std))], "normalised")

    x = node("Relu", [conv(x, params["stem"], "stem")], "stem.relu")
    for block in spec.blocks:
        if block.hidden_width == 0:
            continue
        layers, name = params[block.name], block.name
        y = conv(x, layers["conv1"], f"{name}.conv1", block.stride)
        y = conv(node("Relu", [y], f"{name}.conv1.relu"), layers["conv2"], f"{name}.conv2")
        if block.projection:
            x = conv(x, layers["shortcut"], f"{name}.shortcut", block.stride)
        elif not block.skippable:
            x = pad_shortcut(x, block)
        x = node("Relu", [node("Add", [x, y], f"{name}.sum")], name)
    x, head = node("GlobalAveragePool", [x], "mean_over_pixels"), params["head"]
    if "scale" in head:
        # onnxruntime would fuse integer weights with a Gemm into an operator that rounds what is
        # multiplied too (logits off by 2 %); it does not with a convolution of one pixel.
        x = conv(x, {**head, "kernel": np.asarray(head["kernel"])[None, None]}, "head")
        node("Flatten", [x], OUTPUT_NAME)
    else:
        inputs = [constant("head.weight", head["kernel"]), constant("head.bias", head["bias"])]
        node("Gemm", [node("Flatten", [x], "features"), *inputs], OUTPUT_NAME)

    shape = ["batch", spec.channels, spec.image_size, spec.image_size]
    graph = helper.make_graph(
        nodes,
        f"resnet{spec.num_layers}",
        [helper.make_tensor_value_info(INPUT_NAME, kind, shape)],
        [
            helper.make_tensor_value_info(
                OUTPUT_NAME, TensorProto.FLOAT, ["batch", spec.num_classes]
            )
        ],
        weights,
    )
    model = helper.make_model(
        graph,
        producer_name="neumeta-jax",
        ir_version=ONNX_IR_VERSION,
        opset_imports=[helper.make_opsetid("", ONNX_OPSET)],
    )
    metadata = {**info, "network": spec.to_dict()}
    helper.set_model_props(model, {k: json.dumps(v, sort_keys=True) for k, v in metadata.items()})
    return model


class _Batches:
    """Calibration images for onnxruntime, one batch at a time (its CalibrationDataReader)."""

    def __init__(self, images: np.ndarray):
        self._batches = iter(np.split(images, range(64, len(images), 64)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def quantize_onnx(
    path: str | os.PathLike,
    model: "onnx.ModelProto",
    images: np.ndarray,
    *,
    normalization: Normalization | None,
) -> None:
    """Writes `model` with weights and activations in 8 bits, by onnxruntime's static quantiser.

    Weights have a scale for each output channel, activations one for each tensor, over the range
    that they take on `images`.

    Args:
        model: of `to_onnx`, with float32 weights.
        images: uint8[images, size, size, channels], of the training set.
        normalization: of the images, where the graph does not do it itself.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    pixels = np.asarray(images)
    if normalization is not None:
        pixels = np.asarray(preprocessing.normalize(jnp.asarray(pixels), *normalization))
    batches: Any = _Batches(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises shape inference and fusion, which change nothing
    try:
        quantize_static(
            model,
            pathlib.Path(path),
            batches,
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    finally:
        logging.disable(previous)


# --- StableHLO -------------------------------------------------------------------------------


def to_stablehlo(
    spec: Size, params: Mapping, *, normalization: Normalization | None = None
) -> bytes:
    """The folded network as one serialised `jax.export` artefact for cpu, cuda and tpu.

        network = jax.export.deserialize(bytearray(pathlib.Path("half.stablehlo").read_bytes()))
        logits = network.call(images)  # float32[batch, classes], for a batch of any size

    Each platform multiplies in its own default precision, which is below float32 on most
    accelerators.

    Images are NHWC; the arguments are those of `to_onnx`.
    """
    check_extra("stablehlo")
    weights = jax.tree.map(np.asarray, dict(params))

    def network(images):
        if normalization is not None:
            images = preprocessing.normalize(images, *normalization)
        return families.run(spec, quantize.dequantize(weights), images)

    size = f"batch, {spec.image_size}, {spec.image_size}, {spec.channels}"
    images = jax.ShapeDtypeStruct(
        jax.export.symbolic_shape(size), jnp.float32 if normalization is None else jnp.uint8
    )
    exported = jax.export.export(jax.jit(network), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


# --- files, and whether they compute the same ------------------------------------------------


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


def check_extra(format: str) -> None:
    """Raises ValueError if a package that writes and runs `format` is not installed."""
    missing = [name for name in _EXTRAS.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        packages = " and ".join(missing).replace("_", "-")
        raise UsageError(
            f"{format} files need {packages}; install them with pip install 'neumeta-jax[export]'."
        )


def check_writable(path: str | os.PathLike) -> pathlib.Path:
    """`path`, which --out gave, if a file can be put there; else raises ValueError."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"--out must name a file, but {path} is something else; choose another.")
    probe = path.with_name(f"{path.name}.partial")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{path} must be writable, but: {error.strerror}; choose another --out."
        ) from None
    return path


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Computes on the CPU, where float32 is float32, if JAX may use it."""
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield


def logits_of_file(
    path: str | os.PathLike,
    images: np.ndarray,
    *,
    format: str,
    normalization: Normalization,
    normalize: bool = False,
) -> np.ndarray:
    """Logits float32[images, classes] of an exported file, by its format's own reader.

    Args:
        images: uint8[images, size, size, channels].
        format: of the file; "torch" is read and folded by `teacher_import`.
        normalization: what the network was trained with.
        normalize: whether the file normalises by itself.
    """
    path = pathlib.Path(path)
    network: Callable[[Any], Any]
    if format == "onnx":
        import onnx
        import onnxruntime

        onnx.checker.check_model(onnx.load_model(path), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )

        def run_graph(batch):
            batch = np.ascontiguousarray(np.asarray(batch).transpose(0, 3, 1, 2))
            return session.run([OUTPUT_NAME], {INPUT_NAME: batch})[0]

        network = run_graph
    elif format == "stablehlo":
        network = jax.export.deserialize(bytearray(path.read_bytes())).call
    elif format == "litert":
        network = litert.reader(path)
    else:
        if format == "torch":
            tensors = teacher_import.read_tensors(path)
            spec = teacher_import.infer_spec(tensors, image_size=images.shape[1])
            params = cifar_resnet.fold_batch_norm(teacher_import.to_variables(spec, tensors))
        else:
            spec, params, _ = load_safetensors(path)
        network = jax.jit(lambda batch: families.run(spec, params, batch))

    return _in_batches(network, images, None if normalize else normalization)


def _in_batches(
    network: Callable[[Any], Any], images: np.ndarray, normalization: Normalization | None
) -> np.ndarray:
    """What `network` computes of `images`, on the CPU, normalised where that is asked for."""
    parts = []
    with _on_cpu():
        for start in range(0, len(images), _BATCH_SIZE):
            batch = images[start : start + _BATCH_SIZE]
            if normalization is not None:
                batch = preprocessing.normalize(jnp.asarray(batch), *normalization)
            parts.append(np.asarray(network(batch)))
    return np.concatenate(parts)


def export(
    path: str | os.PathLike,
    spec: Size,
    params: Mapping,
    images: np.ndarray,
    *,
    format: str,
    normalization: Normalization,
    normalize: bool = False,
    int8: str | None = None,
    calibration: np.ndarray | None = None,
    tolerance: float | None = None,
    **info: Any,
) -> Equivalence:
    """Writes a network, reads it back, and lets it take its name if it computes the same.

    Args:
        path: where to; an existing file is replaced once the new one is complete and checked.
        spec, params: the network's shapes and its folded tree.
        images: uint8[images, size, size, channels], to compare on.
        format: one of `FORMATS`.
        normalization: what the network was trained with.
        normalize: whether to put it into the graph, for `GRAPH_FORMATS`.
        int8: "weights", "full" or None, see `INT8_FORMATS`. A file with 8-bit weights must compute
            what the network of the rounded weights does, a file with 8-bit activations too what
            the float32 network does.
        calibration: uint8 images of the training set to measure the ranges of activations on, for
            "full".
        tolerance: largest relative logit error (see `Equivalence`) to accept; default: `TOLERANCE`,
            or `FULL_INT8_TOLERANCE` for "full".
        **info: JSON values for the header or metadata of "safetensors", "onnx" and "litert".

    Raises:
        ValueError: if an argument is out of range, the file cannot be written, or it computes
            something else; nothing has changed at `path` then.
    """
    check_format(format, normalize=normalize, int8=int8)
    check_network(spec, format)
    if not len(images):
        raise UsageError("An export needs at least one image to compare on, got none.")
    calibration = np.zeros(0) if calibration is None else calibration
    if int8 == "full" and not len(calibration):
        raise UsageError("An export with int8='full' needs calibration images, got none.")
    if tolerance is None:
        tolerance = FULL_INT8_TOLERANCE if int8 == "full" else TOLERANCE
    path = check_writable(path)
    if int8 == "weights":
        params = quantize.quantize(params)
    if int8:
        info["int8"] = int8
    wanted = network_logits(spec, params, images, normalization)
    # The suffix, because readers go by it.
    partial = path.with_name(f"{path.name}.partial{_SUFFIXES[format]}")
    baked, outside = (normalization, None) if normalize else (None, normalization)
    metadata = {**info, **normalization._asdict()}
    try:
        try:
            if format == "safetensors":
                save_safetensors(partial, spec, params, normalization=normalization, **info)
            elif format == "torch":
                partial.write_bytes(to_torch(to_state_dict(cast("ResNetSpec", spec), params)))
            elif format == "onnx":
                model = to_onnx(cast("ResNetSpec", spec), params, normalization=baked, **metadata)
                if int8 == "full":
                    quantize_onnx(partial, model, calibration, normalization=outside)
                else:
                    partial.write_bytes(model.SerializeToString(deterministic=True))
            elif format == "litert":
                content = litert.to_litert(
                    cast("ResNetSpec", spec), params, normalization=baked, **metadata
                )
                if int8 == "full":
                    content = litert.quantize_litert(content, calibration, normalization=outside)
                partial.write_bytes(content)
            else:
                partial.write_bytes(to_stablehlo(spec, params, normalization=baked))
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{path} must be writable, but: {reason}; choose another --out."
            ) from None
        found = logits_of_file(
            partial, images, format=format, normalization=normalization, normalize=normalize
        )
        equivalence = compare(found, wanted)
        if not equivalence.error <= tolerance:  # NaN too
            raise EquivalenceError(
                f"The {format} file must compute what the network does to within {tolerance:g}, "
                f"but it has {equivalence}; {path} was not written."
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        partial.with_name(f"{partial.name}.partial").unlink(missing_ok=True)  # of save_tree
    return equivalence


def network_logits(
    spec: Size, params: Mapping, images: np.ndarray, normalization: Normalization
) -> np.ndarray:
    """Logits float32[images, classes] of uint8 images NHWC, in float32 on the CPU.

    The tree may be one of `quantize.quantize`.
    """
    with _on_cpu():
        tree = quantize.dequantize(params)
    network = jax.jit(lambda batch: families.run(spec, tree, batch))
    return _in_batches(network, images, normalization)


def check_network(spec: Size, format: str) -> None:
    """Raises UsageError if a format is written layer by layer, and not of this kind of network."""
    if not isinstance(spec, ResNetSpec) and format not in ANY_NETWORK:
        raise UsageError(
            f"--format={format} is written for CIFAR ResNets; a {spec.title} is exported as one of "
            f"{', '.join(ANY_NETWORK)}."
        )


def check_format(format: str, *, normalize: bool, int8: str | None = None) -> None:
    """Raises ValueError if `format` is unknown, needs what is not installed, or cannot do that."""
    if format not in FORMATS:
        raise UsageError(f"The format must be one of {', '.join(FORMATS)}, got {format!r}.")
    check_extra(format)
    if normalize and format not in GRAPH_FORMATS:
        raise UsageError(
            f"--normalize is for {', '.join(GRAPH_FORMATS)}, got {format}, which holds weights "
            "and no computation; normalise images before the network."
        )
    if int8 is not None and int8 not in INT8:
        raise UsageError(f"--int8 is one of {', '.join(INT8)} or absent, got {int8!r}.")
    if int8 and format not in INT8_FORMATS[int8]:
        raise UsageError(
            f"--int8={int8} is for {', '.join(INT8_FORMATS[int8])}, got {format}; choose another "
            "--format."
        )


# --- the command -----------------------------------------------------------------------------


FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "width": (float, None, "Kept fraction of all hidden channels, up to 1.5."),
    "widths": (list, None, "Hidden channels of each generated block; 0 skips the block."),
    "spec": (str, None, "A JSON file with widths, spec and blocks of one network."),
    "format": (FORMATS, None, "Of the file."),
    "out": (str, "", "The file to write."),
    "normalize": (
        bool,
        False,
        f"Put the normalisation into the graph ({', '.join(GRAPH_FORMATS)}), which then takes "
        "uint8 pixels.",
    ),
    "int8": (
        str,
        None,
        "Weights in 8 bits (--int8), or activations too (--int8=full, onnx and litert).",
    ),
    "num_images": (int, 256, "Images of the data set to compare on, at most."),
    "tolerance": (
        float,
        None,
        f"Largest relative logit error to accept; default {TOLERANCE:g}, {FULL_INT8_TOLERANCE:g} "
        "with --int8=full.",
    ),
    "num_samples": grid.SAMPLE_FLAGS["num_samples"],
    **command_line.DATA_DIR,
}


def _chosen_widths(hypernetwork: Family, options: flags.FlagValues) -> tuple[int, ...]:
    if options.width is not None:
        return tuple(hypernetwork.widths(options.width).tolist())
    if options.spec is not None:
        return load_morph(options.spec, hypernetwork)
    try:
        widths = [int(width) for width in options.widths]
    except ValueError:
        raise UsageError(
            f"--widths takes integers with commas between, got {','.join(options.widths)!r}."
        ) from None
    return check_widths(hypernetwork, widths)


def _check_options(options: flags.FlagValues) -> None:
    for name in ("workdir", "format", "out"):
        if not getattr(options, name):
            raise UsageError(f"An export needs --{name}; see --help.")
    given = [name for name in ("width", "widths", "spec") if getattr(options, name) is not None]
    if len(given) != 1:
        shown = " and ".join(f"--{name}" for name in given) or "none of them"
        raise UsageError(f"An export needs one of --width, --widths and --spec, got {shown}.")
    if options.num_images < 1 or not (options.tolerance is None or options.tolerance > 0):
        raise UsageError(
            "--num_images must be at least 1 and --tolerance above 0, got "
            f"{options.num_images} and {options.tolerance}."
        )
    command_line.check_at_least(options, num_samples=1)
    check_format(options.format, normalize=options.normalize, int8=options.int8)
    others = [suffix for format, suffix in _SUFFIXES.items() if format != options.format]
    if pathlib.Path(options.out).suffix in others:
        raise UsageError(
            f"A file of --format={options.format} ends in {_SUFFIXES[options.format]}, got "
            f"{options.out}, which is the name of another format; change one of them."
        )
    check_writable(options.out)


def _title(spec: Size) -> str:
    return f"ResNet{spec.num_layers}" if isinstance(spec, ResNetSpec) else spec.title


def _describe_input(spec: Size, format: str, normalize: bool) -> str:
    dtype = "uint8" if normalize else "float32"
    size = f"{spec.image_size}, {spec.image_size}"
    channels_last = format in ("safetensors", "stablehlo", "litert")
    shape = f"{size}, {spec.channels}" if channels_last else f"{spec.channels}, {size}"
    return f"takes {dtype}[batch, {shape}], " + ("pixels" if normalize else "normalised")


def main(argv: Sequence[str]) -> None:
    argv = ["--int8=weights" if arg in ("--int8", "-int8") else arg for arg in argv]
    config, options = command_line.parse(argv, FLAGS, config_required=False)
    _check_options(options)
    lab.quiet_logging()
    lab.configure_jax()
    opened = lab.open_run(config, options)
    hypernetwork = opened.hypernetwork
    widths = _chosen_widths(hypernetwork, options)
    try:
        # Images to compare on may be any; those that ranges are measured on are the run's.
        experiment, splits = opened.load(other_data=options.int8 != "full")
        split = "validation" if len(splits.validation_images) else "test"
        images = splits.validation_images if split == "validation" else splits.test_images
        compared_on = f"of the {split} split of {experiment.name}"
    except (FileNotFoundError, ImportError):
        if options.data_dir or options.int8 == "full":  # which measures ranges on the data
            raise
        experiment, splits = opened.without_data(options.num_images)
        images = splits.test_images
        compared_on = f"at random, as {experiment.name} is not here; --data_dir=DIR says where"

    normalization = Normalization(experiment.preprocessing.mean, experiment.preprocessing.std)
    noise = experiment.noise(options.num_samples or experiment.evaluation.num_samples)
    spec, tree = draw(hypernetwork, opened.params, widths, **noise)
    shown = ",".join(map(str, widths))
    print(
        f"{_title(spec)} of {experiment.name} with widths {shown}: "
        f"{spec.num_params:,} parameters, {spec.num_macs / 1e6:.2f} M multiply-adds"
    )
    note_range(experiment, widths)
    images = images[: options.num_images]
    equivalence = export(
        options.out,
        spec,
        tree,
        images,
        format=options.format,
        normalization=normalization,
        normalize=options.normalize,
        int8=options.int8,
        calibration=splits.train_images[:NUM_CALIBRATION_IMAGES],
        tolerance=options.tolerance,
        dataset=experiment.name,
        morph=morph_to_dict(hypernetwork, widths),
    )
    size = os.path.getsize(options.out)
    shown = _describe_input(spec, options.format, options.normalize)
    print(f"wrote {options.out} ({options.format}, {size:,} bytes), which {shown}")
    print(f"normalisation: mean {normalization.mean}, std {normalization.std} of images in [0, 1]")
    if options.int8 == "weights":
        pair = (quantize.quantize(tree), tree)
        found, wanted = (network_logits(spec, each, images, normalization) for each in pair)
        print(f"int8 weights against float32 ones: {compare(found, wanted)}")
    print(f"equivalence: {equivalence} {compared_on}")


if __name__ == "__main__":
    command_line.run(main)
