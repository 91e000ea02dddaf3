"""ONNX: a float32 graph of opset 13 with the spec, mean and std as metadata; images are NCHW.

onnx and onnxruntime are packages of the extra: pip install 'neumeta-jax[export]'.
"""

import functools
import logging
import os
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neumeta_jax.export.network import INPUT_NAME, OUTPUT_NAME, Network, in_batches, operations

if TYPE_CHECKING:
    import onnx

OPSET = 13  # the first whose operators quantise per channel; every runtime since 2020 reads it
IR_VERSION = 7  # of ONNX 1.8, which brought opset 13


class _Graph:
    """A graph that grows node by node, in which a tensor is its name."""

    def __init__(self, layers: Mapping[str, Mapping]):
        self.layers = layers
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        array = np.ascontiguousarray(np.asarray(value, dtype))
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def normalize(self, x: str, network: Network) -> str:
        mean, std = (np.asarray(v)[None, :, None, None] for v in network.normalization)
        x = self.node("Cast", [x], "pixels", to=1)  # float32
        x = self.node("Div", [x, self.constant("full_scale", 255)], "scaled")
        x = self.node("Sub", [x, self.constant("mean", mean)], "centred")
        return self.node("Div", [x, self.constant("std", std)], "normalised")

    # The operations of `network.operations`.

    def conv(self, name: str, x: str, stride: int, relu: bool) -> None:
        layer = self.layers[name]
        result = f"{name}.linear" if relu else name
        self._conv(result, x, layer["kernel"], layer, stride)
        if relu:
            self.node("Relu", [result], name)

    def _conv(self, name: str, x: str, kernel: Any, layer: Mapping, stride: int = 1) -> str:
        """Weights OIHW, multiplied by their scales in the graph where they are integers."""
        kernel, weight = np.asarray(kernel).transpose(3, 2, 0, 1), f"{name}.weight"
        if "scale" in layer:
            stored = [
                self.constant(f"{weight}.int8", kernel, np.int8),
                self.constant(f"{weight}.scale", layer["scale"]),
                self.constant(f"{weight}.zero", np.zeros(len(kernel)), np.int8),
            ]
            self.node("DequantizeLinear", stored, weight, axis=0)
        else:
            self.constant(weight, kernel)
        inputs, size = [x, weight, self.constant(f"{name}.bias", layer["bias"])], kernel.shape[-1]
        shape = {"kernel_shape": [size, size], "pads": [size // 2] * 4}
        return self.node("Conv", inputs, name, strides=[stride, stride], **shape)

    def pad(self, name: str, x: str, stride: int, before: int, after: int) -> None:
        if stride > 1:
            bounds = {"starts": [0, 0], "ends": [2**31 - 1] * 2, "axes": [2, 3]}
            bounds["steps"] = [stride, stride]
            inputs = [self.constant(f"{name}.{k}", v, np.int64) for k, v in bounds.items()]
            x = self.node("Slice", [x, *inputs], f"{name}.slice")
        pads = self.constant(f"{name}.pads", [0, before, 0, 0, 0, after, 0, 0], np.int64)
        self.node("Pad", [x, pads], name)

    def add(self, name: str, inputs: Sequence[str]) -> None:
        self.node("Relu", [self.node("Add", inputs, f"{name}.sum")], name)

    def mean(self, name: str, x: str) -> None:
        self.node("GlobalAveragePool", [x], name)

    def dense(self, name: str, x: str) -> None:
        head = self.layers["head"]
        if "scale" in head:
            # onnxruntime would fuse integer weights with a Gemm into an operator that rounds what
            # is multiplied too (logits off by 2 %); it does not with a convolution of one pixel.
            x = self._conv("head", x, np.asarray(head["kernel"])[None, None], head)
            self.node("Flatten", [x], name)
        else:
            weights = [self.constant(f"head.{leaf}", head[leaf]) for leaf in ("kernel", "bias")]
            self.node("Gemm", [self.node("Flatten", [x], "flat"), *weights], name)


def to_onnx(network: Network, *, normalize: bool = False) -> "onnx.ModelProto":
    """The network as an ONNX graph, images[batch, channels, size, size] -> logits.

    Images are float32 and come normalised; with `normalize` they are uint8 pixels.
    """
    from onnx import TensorProto, helper

    graph, spec = _Graph(network.layers), network.resnet
    images = graph.normalize(INPUT_NAME, network) if normalize else INPUT_NAME
    for operation, name, (x, *arguments) in operations(spec):
        getattr(graph, operation)(name, images if x == INPUT_NAME else x, *arguments)

    def declared(name: str, kind: int, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, kind, ["batch", *shape])

    image = spec.channels, spec.image_size, spec.image_size
    images = declared(INPUT_NAME, TensorProto.UINT8 if normalize else TensorProto.FLOAT, *image)
    logits = declared(OUTPUT_NAME, TensorProto.FLOAT, spec.num_classes)
    name = f"resnet{spec.num_layers}"
    model = helper.make_model(
        helper.make_graph(graph.nodes, name, [images], [logits], graph.constants),
        producer_name="neumeta-jax",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    helper.set_model_props(model, network.texts)
    return model


def write(
    path: str | os.PathLike,
    network: Network,
    *,
    normalize: bool = False,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes the graph; with `calibration` weights and activations are 8-bit integers.

    onnxruntime's static quantiser rounds them: weights with a scale for each output channel,
    activations with one for each tensor, over their range on `calibration`, inputs NHWC.
    """
    path, model = pathlib.Path(path), to_onnx(network, normalize=normalize)
    if calibration is None:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    feeds = ({INPUT_NAME: batch} for batch in in_batches(_channels_first(calibration), 64))
    reader: Any = types.SimpleNamespace(get_next=functools.partial(next, feeds, None))
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises shape inference and fusion, which change nothing
    try:
        quantize_static(
            model,
            path,
            reader,
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    finally:
        logging.disable(previous)


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2))


def read(path: str | os.PathLike) -> Callable:
    """The network of a file as onnxruntime runs it on the CPU, images NHWC -> logits."""
    import onnx
    import onnxruntime

    content = pathlib.Path(path).read_bytes()
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(content, options, providers=providers)
    return lambda images: session.run([OUTPUT_NAME], {INPUT_NAME: _channels_first(images)})[0]
