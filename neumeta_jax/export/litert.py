"""LiteRT, formerly TensorFlow Lite: a flatbuffer with the metadata of ONNX; images are NHWC.

The graph is built operator by operator, with the schema that the runtime's own package brings, so
neither TensorFlow nor PyTorch is needed. ai-edge-litert and ai-edge-quantizer are packages of the
extra: pip install 'neumeta-jax[export]'.
"""

import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from neumeta_jax.errors import UsageError, sentence
from neumeta_jax.export.network import INPUT_NAME, OUTPUT_NAME, Network, in_batches, operations

SIGNATURE = "serving_default"  # the usual name of a file's only function
SCHEMA_VERSION = 3
ALIGNMENT = 16  # of constants in the file, as its schema demands
_PIXELS = "pixels"  # prefix of the tensors that normalise, which stay float32
CALIBRATION_BATCH = 64

# The version of an operator that does what is asked of it; others are the first.
_VERSIONS = {"DEQUANTIZE": 5}  # a scale for each channel


class _Graph:
    """A graph that grows operator by operator, in which a tensor is its name.

    The first axis of what is computed is the batch: of any size, and written as 1.
    """

    def __init__(self, layers: Mapping[str, Mapping]):
        from ai_edge_litert import schema_py_generated as schema

        class Buffer(schema.BufferT):
            def Pack(self, builder):
                if self.data is not None:
                    builder.Prep(ALIGNMENT, len(self.data))  # the generated code leaves it out
                return super().Pack(builder)

        self.layers, self.schema, self._buffer_type = layers, schema, Buffer
        self._relu = {"fusedActivationFunction": schema.ActivationFunctionType.RELU}
        self._tensors: dict[str, Any] = {}
        self._operators, self._codes = [], []
        self._buffers = [Buffer()]  # the first is that of tensors without content

    def shape(self, tensor: str) -> list[int]:
        return self._tensors[tensor].shape

    def computed(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> str:
        return self._tensor(name, shape, dtype, shapeSignature=[-1, *shape[1:]])

    def constant(self, name: str, value: Any, dtype: Any = np.float32, *, scale: Any = None) -> str:
        """A constant; of int8, `scale` float32[C] multiplies along the first axis."""
        array, fields = np.asarray(value, dtype), {}
        if scale is not None:
            fields["quantization"] = self.schema.QuantizationParametersT(
                scale=np.asarray(scale, np.float32), zeroPoint=np.zeros(len(scale), np.int64)
            )
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return self._tensor(name, array.shape, dtype, buffer=self._buffer(content), **fields)

    def append(self, operator: str, inputs: Sequence[str], name: str, shape: Any, **options) -> str:
        """Appends an operator, with options by the schema's names, and returns what it computes."""
        # The schema calls the options of CONV_2D Conv2DOptions, and so on but for one.
        kind = "Reducer" if operator == "MEAN" else operator.title().replace("_", "")
        batched = operator != "DEQUANTIZE"  # what is left computes weights
        (self.computed if batched else self._tensor)(name, shape, np.float32)
        if operator not in self._codes:
            self._codes.append(operator)
        self._operators.append(
            self.schema.OperatorT(
                opcodeIndex=self._codes.index(operator),
                inputs=[self._number(tensor) for tensor in inputs],
                outputs=[self._number(name)],
                builtinOptionsType=getattr(self.schema.BuiltinOptions, f"{kind}Options"),
                builtinOptions=getattr(self.schema, f"{kind}OptionsT")(**options),
            )
        )
        return name

    def to_bytes(self, name: str, metadata: Mapping[str, str]) -> bytes:
        """The file of a graph with one input and one output."""
        import flatbuffers

        schema = self.schema
        images, logits = self._number(INPUT_NAME), self._number(OUTPUT_NAME)
        tensors = list(self._tensors.values())
        ends = [schema.TensorMapT(INPUT_NAME, images)], [schema.TensorMapT(OUTPUT_NAME, logits)]
        # The first field is what readers older than the 128th operator look at.
        codes = {code: getattr(schema.BuiltinOperator, code) for code in self._codes}
        model = schema.ModelT(
            version=SCHEMA_VERSION,
            operatorCodes=[
                schema.OperatorCodeT(min(n, 127), version=_VERSIONS.get(code, 1), builtinCode=n)
                for code, n in codes.items()
            ],
            subgraphs=[schema.SubGraphT(tensors, [images], [logits], self._operators, name)],
            description="neumeta-jax",
            metadata=[
                schema.MetadataT(key, self._buffer(value.encode()))
                for key, value in metadata.items()
            ],
            buffers=self._buffers,
            signatureDefs=[schema.SignatureDefT(*ends, SIGNATURE)],
        )
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _buffer(self, content: bytes) -> int:
        self._buffers.append(self._buffer_type(np.frombuffer(content, np.uint8)))
        return len(self._buffers) - 1

    def _number(self, tensor: str) -> int:
        return list(self._tensors).index(tensor)

    def _tensor(self, name: str, shape: Sequence[int], dtype: Any, **fields: Any) -> str:
        kind = getattr(self.schema.TensorType, np.dtype(dtype).name.upper())
        shape = [int(size) for size in shape]
        self._tensors[name] = self.schema.TensorT(shape, kind, name=name, hasRank=True, **fields)
        return name

    def normalize(self, x: str, network: Network) -> str:
        mean, std = (np.asarray(values, np.float64) for values in network.normalization)
        shape, types = self.shape(x), self.schema.TensorType
        kinds = {"inDataType": types.UINT8, "outDataType": types.FLOAT32}
        x = self.append("CAST", [x], _PIXELS, shape, **kinds)
        factor = self.constant(f"{_PIXELS}.factor", 1 / (255 * std))
        x = self.append("MUL", [x, factor], f"{_PIXELS}.scaled", shape)
        shift = self.constant(f"{_PIXELS}.mean", mean / std)
        return self.append("SUB", [x, shift], f"{_PIXELS}.normalised", shape)

    def _weights(self, name: str) -> list[str]:
        """A layer's kernel, output channels first, and its bias."""
        layer = self.layers[name]
        kernel = np.moveaxis(np.asarray(layer["kernel"]), -1, 0)  # HWIO to OHWI
        if "scale" not in layer:
            weight = self.constant(f"{name}.weight", kernel)
        else:
            stored = self.constant(f"{name}.weight.int8", kernel, np.int8, scale=layer["scale"])
            weight = self.append("DEQUANTIZE", [stored], f"{name}.weight", kernel.shape)
        return [weight, self.constant(f"{name}.bias", layer["bias"])]

    def _zeros(self, x: str, pads: Sequence[tuple[int, int]], name: str) -> str:
        """Zeros before and after along each of four axes."""
        shape = [size + sum(pair) for size, pair in zip(self.shape(x), pads, strict=True)]
        return self.append("PAD", [x, self.constant(f"{name}.pads", pads, np.int32)], name, shape)

    # The operations of `network.operations`.

    def conv(self, name: str, x: str, stride: int, relu: bool) -> None:
        layer, padding = self.layers[name], self.schema.Padding
        border, size = len(layer["kernel"]) // 2, -(-self.shape(x)[1] // stride)
        if stride > 1 and border:  # where "SAME" would pad on the other side
            pads = [(0, 0), (border, border), (border, border), (0, 0)]
            x = self._zeros(x, pads, f"{name}.padded")
        self.append(
            "CONV_2D",
            [x, *self._weights(name)],
            name,
            [1, size, size, len(layer["bias"])],
            padding=padding.SAME if stride == 1 else padding.VALID,
            strideW=stride,
            strideH=stride,
            **(self._relu if relu else {}),
        )

    def pad(self, name: str, x: str, stride: int, before: int, after: int) -> None:
        if stride > 1:
            bounds = {"begin": [0] * 4, "end": [0] * 4, "strides": [1, stride, stride, 1]}
            inputs = [self.constant(f"{name}.{k}", v, np.int32) for k, v in bounds.items()]
            _, size, _, channels = self.shape(x)
            shape = [1, -(-size // stride), -(-size // stride), channels]
            # Masks of all four axes: from end to end, whatever the bounds are.
            masks = {"beginMask": 0b1111, "endMask": 0b1111}
            x = self.append("STRIDED_SLICE", [x, *inputs], f"{name}.slice", shape, **masks)
        self._zeros(x, [(0, 0), (0, 0), (0, 0), (before, after)], name)

    def add(self, name: str, inputs: Sequence[str]) -> None:
        self.append("ADD", inputs, name, self.shape(inputs[0]), **self._relu)

    def mean(self, name: str, x: str) -> None:
        axes = self.constant("pixel_axes", [1, 2], np.int32)
        self.append("MEAN", [x, axes], name, [1, self.shape(x)[-1]])

    def dense(self, name: str, x: str) -> None:
        shape = [1, len(self.layers["head"]["bias"])]
        self.append("FULLY_CONNECTED", [x, *self._weights("head")], name, shape)


def to_litert(network: Network, *, normalize: bool = False) -> bytes:
    """The network as a LiteRT file, images[batch, size, size, channels] -> logits.

    A reader resizes the input to its batch (`resize_tensor_input`); without that it is 1. Images
    are float32 and come normalised; with `normalize` they are uint8 pixels. Weights of
    `quantize.quantize` stay 8-bit integers and are multiplied by their scales in the graph.
    """
    graph, spec = _Graph(network.layers), network.resnet
    kind = np.uint8 if normalize else np.float32
    images = graph.computed(INPUT_NAME, (1, *spec.input_shape), kind)
    images = graph.normalize(images, network) if normalize else images
    for operation, name, (x, *arguments) in operations(spec):
        getattr(graph, operation)(name, images if x == INPUT_NAME else x, *arguments)
    return graph.to_bytes(spec.title.lower(), network.texts)


def _quantized(content: bytes, images: np.ndarray) -> bytes:
    """A LiteRT file with weights and activations in 8 bits, by the runtime's static quantiser.

    Weights have a scale for each output channel, activations a scale and a zero point for each
    tensor, over the range that they take on `images`. What the file takes and gives stays as it
    was: float32 or pixels, and float32 logits.

    Args:
        content: of `to_litert`, with float32 weights.
        images: what the network takes, of the training set.
    """
    from ai_edge_quantizer import Quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName as Name

    quantizer = Quantizer(content)
    quantizer.add_static_config(".*", Name.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for regex, name in ((".*", Name.INPUT), (".*", Name.OUTPUT), (_PIXELS, Name.ALL_SUPPORTED)):
        quantizer.update_quantization_recipe(regex, name, algorithm_key=AlgorithmName.NO_QUANTIZE)
    # Batch by batch, because in one call it would take a moving average of the batches' ranges,
    # which hardly moves from the first.
    ranges: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps all tensors, and warns of that
        for batch in in_batches(images, CALIBRATION_BATCH):
            for name, found in quantizer.calibrate({SIGNATURE: [{INPUT_NAME: batch}]}).items():
                known = ranges.setdefault(name, found)
                if found:
                    known["min"] = np.minimum(known["min"], found["min"])
                    known["max"] = np.maximum(known["max"], found["max"])
        for found in ranges.values():
            if found and not np.any(found["max"] > found["min"]):
                # What never fires: the least scale there is, 4e-12, is more than LiteRT can divide.
                found["max"] = found["min"] + 1.0
        result = quantizer.quantize(ranges, enable_progress_report=False)
    return bytes(result.quantized_model or b"")


def write(
    path: str | os.PathLike,
    network: Network,
    *,
    normalize: bool = False,
    calibration: np.ndarray | None = None,
) -> None:
    """Writes the graph; with `calibration`, inputs of the network, activations have 8 bits too."""
    content = to_litert(network, normalize=normalize)
    content = content if calibration is None else _quantized(content, calibration)
    pathlib.Path(path).write_bytes(content)


def read(path: str | os.PathLike) -> Callable:
    """The network of a file, images NHWC -> logits float32[images, classes].

    The first image of each batch runs alone, so that two sizes of batch are seen.

    Raises:
        ValueError: by the function, if LiteRT cannot run the file.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=pathlib.Path(path).read_bytes())
    (images,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(batch: np.ndarray) -> np.ndarray:
        interpreter.resize_tensor_input(images["index"], batch.shape, strict=True)
        try:
            interpreter.allocate_tensors()
        except RuntimeError as error:
            raise UsageError(
                f"LiteRT must be able to run {os.fspath(path)}, but: {sentence(str(error))}"
            ) from None
        interpreter.set_tensor(images["index"], batch)
        interpreter.invoke()
        return interpreter.get_tensor(logits["index"])

    return lambda batch: np.concatenate([run(part) for part in (batch[:1], batch[1:]) if len(part)])
