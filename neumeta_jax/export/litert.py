"""One folded network as a LiteRT (formerly TensorFlow Lite) file; images are NHWC.

The graph is built operator by operator, with the schema that the runtime's own package brings, so
neither TensorFlow nor PyTorch is needed. `export` writes, checks and names the file; ai-edge-litert
and ai-edge-quantizer are packages of the extra: pip install 'neumeta-jax[export]'.
"""

import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from neumeta_jax.data import preprocessing
from neumeta_jax.errors import UsageError, sentence
from neumeta_jax.networks.cifar_spec import Block, ResNetSpec

if TYPE_CHECKING:
    from neumeta_jax.export.formats import Normalization

SIGNATURE = "serving_default"  # the usual name of a file's only function
INPUT_NAME, OUTPUT_NAME = "images", "logits"
SCHEMA_VERSION = 3
ALIGNMENT = 16  # of constants in the file, as its schema demands
_PIXELS = "pixels"  # prefix of the tensors that normalise, which stay float32
_BATCH_SIZE = 64

# Which options an operator takes, by the schema's names.
_OPTIONS = {
    "ADD": "AddOptions",
    "CAST": "CastOptions",
    "CONV_2D": "Conv2DOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "MEAN": "ReducerOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
}
# The version of an operator that does what is asked of it; others are the first.
_VERSIONS = {"DEQUANTIZE": 5}  # a scale for each channel


class _Graph:
    """A graph that grows operator by operator, in which a tensor is a number.

    The first axis of what is computed is the batch: of any size, and written as 1.
    """

    def __init__(self):
        from ai_edge_litert import schema_py_generated as schema

        class Buffer(schema.BufferT):
            def Pack(self, builder):
                if self.data is not None:
                    builder.Prep(ALIGNMENT, len(self.data))  # the generated code leaves it out
                return super().Pack(builder)

        self.schema, self._buffer_type = schema, Buffer
        self._tensors, self._operators, self._codes = [], [], []
        self._buffers = [Buffer()]  # the first is that of tensors without content

    def shape(self, tensor: int) -> list[int]:
        return self._tensors[tensor].shape

    def computed(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> int:
        return self._tensor(name, shape, dtype, shapeSignature=[-1, *shape[1:]])

    def constant(self, name: str, value: Any, dtype: Any = np.float32, *, scale: Any = None) -> int:
        """A constant; of int8, `scale` float32[C] multiplies along the first axis."""
        array, fields = np.asarray(value, dtype), {}
        if scale is not None:
            fields["quantization"] = self.schema.QuantizationParametersT(
                scale=np.asarray(scale, np.float32), zeroPoint=np.zeros(len(scale), np.int64)
            )
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return self._tensor(name, array.shape, dtype, buffer=self._buffer(content), **fields)

    def add(
        self,
        operator: str,
        inputs: Sequence[int],
        name: str,
        shape: Sequence[int],
        *,
        batched: bool = True,
        **options: Any,
    ) -> int:
        """Appends an operator, with options by the schema's names, and returns what it computes."""
        kind, make = _OPTIONS[operator], self.computed if batched else self._tensor
        output = make(name, shape, np.float32)
        if operator not in self._codes:
            self._codes.append(operator)
        self._operators.append(
            self.schema.OperatorT(
                opcodeIndex=self._codes.index(operator),
                inputs=list(inputs),
                outputs=[output],
                builtinOptionsType=getattr(self.schema.BuiltinOptions, kind),
                builtinOptions=getattr(self.schema, f"{kind}T")(**options),
            )
        )
        return output

    def to_bytes(self, name: str, input: int, output: int, metadata: Mapping[str, str]) -> bytes:
        """The file of a graph with one input and one output."""
        import flatbuffers

        schema = self.schema
        codes = {code: getattr(schema.BuiltinOperator, code) for code in self._codes}
        graph = schema.SubGraphT(self._tensors, [input], [output], self._operators, name)
        signature = schema.SignatureDefT(
            [schema.TensorMapT(INPUT_NAME, input)],
            [schema.TensorMapT(OUTPUT_NAME, output)],
            SIGNATURE,
        )
        model = schema.ModelT(
            version=SCHEMA_VERSION,
            operatorCodes=[
                # The first field is what readers older than the 128th operator look at.
                schema.OperatorCodeT(
                    min(number, 127), version=_VERSIONS.get(code, 1), builtinCode=number
                )
                for code, number in codes.items()
            ],
            subgraphs=[graph],
            description="neumeta-jax",
            metadata=[
                schema.MetadataT(key, self._buffer(value.encode()))
                for key, value in metadata.items()
            ],
            buffers=self._buffers,
            signatureDefs=[signature],
        )
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _buffer(self, content: bytes) -> int:
        self._buffers.append(self._buffer_type(np.frombuffer(content, np.uint8)))
        return len(self._buffers) - 1

    def _tensor(self, name: str, shape: Sequence[int], dtype: Any, **fields: Any) -> int:
        kind = getattr(self.schema.TensorType, np.dtype(dtype).name.upper())
        shape = [int(size) for size in shape]
        self._tensors.append(self.schema.TensorT(shape, kind, name=name, hasRank=True, **fields))
        return len(self._tensors) - 1


def to_litert(
    spec: ResNetSpec,
    params: Mapping,
    *,
    normalization: "Normalization | None" = None,
    **info: Any,
) -> bytes:
    """The folded network as a LiteRT file, images[batch, size, size, channels] -> logits.

    A reader resizes the input to its batch (`resize_tensor_input`); without that it is 1. The
    arguments are those of `formats.to_onnx`. Weights of `quantize.quantize` stay 8-bit integers and
    are multiplied by their scales in the graph.
    """
    graph = _Graph()
    relu = graph.schema.ActivationFunctionType.RELU
    same, valid = graph.schema.Padding.SAME, graph.schema.Padding.VALID

    def weight(name: str, layer: Mapping, kernel: np.ndarray) -> int:
        """A kernel, output channels first."""
        if "scale" not in layer:
            return graph.constant(name, kernel)
        stored = graph.constant(f"{name}.int8", kernel, np.int8, scale=layer["scale"])
        return graph.add("DEQUANTIZE", [stored], name, kernel.shape, batched=False)

    def pad(x: int, name: str, pads: Sequence[Sequence[int]]) -> int:
        """Zeros before and after along each axis, `pads` int[4, 2]."""
        shape = [size + sum(pair) for size, pair in zip(graph.shape(x), pads, strict=True)]
        return graph.add("PAD", [x, graph.constant(f"{name}.pads", pads, np.int32)], name, shape)

    def conv(x: int, layer: Mapping, name: str, stride: int = 1, activation: int = 0) -> int:
        kernel = np.asarray(layer["kernel"]).transpose(3, 0, 1, 2)  # HWIO to OHWI
        width, border = len(kernel), kernel.shape[1] // 2
        _, size, _, _ = graph.shape(x)
        if stride > 1 and border:  # where "SAME" would pad on the other side
            x = pad(x, f"{name}.padded", [(0, 0), (border, border), (border, border), (0, 0)])
        inputs = [
            x,
            weight(f"{name}.weight", layer, kernel),
            graph.constant(f"{name}.bias", layer["bias"]),
        ]
        return graph.add(
            "CONV_2D",
            inputs,
            name,
            [1, -(-size // stride), -(-size // stride), width],
            padding=same if stride == 1 else valid,
            strideW=stride,
            strideH=stride,
            fusedActivationFunction=activation,
        )

    def pad_shortcut(x: int, block: Block) -> int:
        prefix, extra = f"{block.name}.shortcut", block.out_width - block.in_width
        if block.stride > 1:
            bounds = {"begin": [0] * 4, "end": [0] * 4, "strides": [1, *[block.stride] * 2, 1]}
            inputs = [graph.constant(f"{prefix}.{k}", v, np.int32) for k, v in bounds.items()]
            size = -(-graph.shape(x)[1] // block.stride)
            x = graph.add(
                "STRIDED_SLICE",
                [x, *inputs],
                f"{prefix}.slice",
                [1, size, size, block.in_width],
                beginMask=0b1111,  # of all four axes: from end to end, whatever the bounds are
                endMask=0b1111,
            )
        return pad(x, f"{prefix}.pad", [(0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)])

    shape = [1, spec.image_size, spec.image_size, spec.channels]
    images = graph.computed(INPUT_NAME, shape, np.float32 if normalization is None else np.uint8)
    x = images
    if normalization is not None:
        mean, std = (np.asarray(values, np.float64) for values in normalization)
        types = graph.schema.TensorType
        x = graph.add(
            "CAST", [x], _PIXELS, shape, inDataType=types.UINT8, outDataType=types.FLOAT32
        )
        factor = graph.constant(f"{_PIXELS}.factor", 1 / (255 * std))
        x = graph.add("MUL", [x, factor], f"{_PIXELS}.scaled", shape)
        x = graph.add(
            "SUB",
            [x, graph.constant(f"{_PIXELS}.mean", mean / std)],
            f"{_PIXELS}.normalised",
            shape,
        )

    x = conv(x, params["stem"], "stem", activation=relu)
    for block in spec.blocks:
        if block.hidden_width == 0:
            continue
        layers, name = params[block.name], block.name
        y = conv(x, layers["conv1"], f"{name}.conv1", block.stride, activation=relu)
        y = conv(y, layers["conv2"], f"{name}.conv2")
        if block.projection:
            x = conv(x, layers["shortcut"], f"{name}.shortcut", block.stride)
        elif not block.skippable:
            x = pad_shortcut(x, block)
        x = graph.add("ADD", [x, y], name, graph.shape(y), fusedActivationFunction=relu)
    head, axes = params["head"], graph.constant("pixel_axes", [1, 2], np.int32)
    x = graph.add("MEAN", [x, axes], "features", [1, spec.stage_widths[-1]])
    inputs = [
        x,
        weight("head.weight", head, np.asarray(head["kernel"]).T),
        graph.constant("head.bias", head["bias"]),
    ]
    x = graph.add("FULLY_CONNECTED", inputs, OUTPUT_NAME, [1, spec.num_classes])

    metadata = {**info, "network": spec.to_dict()}
    texts = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    return graph.to_bytes(f"resnet{spec.depth}", images, x, texts)


def quantize_litert(
    content: bytes, images: np.ndarray, *, normalization: "Normalization | None"
) -> bytes:
    """A LiteRT file with weights and activations in 8 bits, by the runtime's static quantiser.

    Weights have a scale for each output channel, activations a scale and a zero point for each
    tensor, over the range that they take on `images`. What the file takes and gives stays as it
    was: float32 or pixels, and float32 logits.

    Args:
        content: of `to_litert`, with float32 weights.
        images: uint8[images, size, size, channels], of the training set.
        normalization: of the images, where the graph does not do it itself.
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
        for start in range(0, len(images), _BATCH_SIZE):
            batch = np.asarray(images[start : start + _BATCH_SIZE])
            if normalization is not None:
                batch = np.asarray(preprocessing.normalize(jnp.asarray(batch), *normalization))
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


def reader(path: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """The network of a LiteRT file, images NHWC -> logits float32[images, classes].

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

    def network(batch) -> np.ndarray:
        batch = np.asarray(batch)
        return np.concatenate([run(part) for part in (batch[:1], batch[1:]) if len(part)])

    return network
