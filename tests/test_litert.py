"""LiteRT files: that they compute what the network does, in float32 and in 8 bits."""

import json

import jax
import numpy as np
import pytest
from networks import assert_same_logits, both_shortcuts, logits_of, network, refused

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import quantize
from neumeta_jax.export import formats, litert
from neumeta_jax.export.formats import Normalization
from neumeta_jax.networks.cifar_spec import ResNetSpec

both_inputs = pytest.mark.parametrize("normalize", [False, True], ids=["images", "pixels"])


def run(content, *batches):
    """The logits of each batch, one after the other in one interpreter."""
    interpreter = Interpreter(model_content=content)
    images, logits = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    names = {"inputs": ["images"], "outputs": ["logits"]}
    assert interpreter.get_signature_list() == {litert.SIGNATURE: names}
    assert images["shape_signature"].tolist() == [-1, *batches[0].shape[1:]]
    results = []
    for batch in batches:
        interpreter.resize_tensor_input(images["index"], batch.shape, strict=True)
        interpreter.allocate_tensors()
        interpreter.set_tensor(images["index"], batch)
        interpreter.invoke()
        results.append(interpreter.get_tensor(logits["index"]))
    return results


def assert_runs(content, images, wanted):
    """With batches of any size."""
    for logits, size in zip(run(content, images, images[:1], images[:3]), (12, 1, 3), strict=True):
        assert_same_logits(logits, wanted[:size])


def unpack(content):
    """(the file as objects, its operators' names, their versions)."""
    model = schema.ModelT.InitFromPackedBuf(content)
    names = {number: name for name, number in vars(schema.BuiltinOperator).items()}
    codes = [names[code.builtinCode] for code in model.operatorCodes]
    operators = [codes[operator.opcodeIndex] for operator in model.subgraphs[0].operators]
    versions = [code.version for code in model.operatorCodes]
    return model, operators, dict(zip(codes, versions, strict=True))


@both_shortcuts
@both_inputs
def test_a_file_computes_the_network_for_batches_of_any_size(name, normalize):
    spec, params, normalization, pixels, images, wanted = network(name)
    options = {"normalization": normalization if normalize else None}
    content = litert.to_litert(spec, params, **options)
    assert litert.to_litert(spec, params, **options) == content
    assert_runs(content, pixels if normalize else images, wanted)


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors")
@both_shortcuts
def test_shapes_in_a_file_are_those_that_the_runtime_infers(name):
    """Converters and quantisers read them without running anything."""
    spec, params, normalization, *_ = network(name)
    content = litert.to_litert(spec, quantize.quantize(params), normalization=normalization)
    written = unpack(content)[0].subgraphs[0].tensors
    interpreter = Interpreter(model_content=content, experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    for details in interpreter.get_tensor_details()[: len(written)]:
        tensor = written[details["index"]]
        assert tensor.name.decode() == details["name"]
        assert list(tensor.shape) == list(details["shape"]), details["name"]
    activations = [tensor for tensor in written if tensor.shapeSignature is not None]
    assert len(activations) > 10
    assert all(list(tensor.shapeSignature) == [-1, *tensor.shape[1:]] for tensor in activations)


def test_a_file_holds_what_it_takes_to_use_it():
    spec, params, normalization, *_ = network("projection")
    content = litert.to_litert(spec, params, mean=normalization.mean, dataset="noise")
    assert content[4:8] == b"TFL3"
    model, operators, _ = unpack(content)
    texts = {
        entry.name.decode(): json.loads(bytes(model.buffers[entry.buffer].data))
        for entry in model.metadata
    }
    assert ResNetSpec.from_dict(texts["network"]) == spec
    assert texts["mean"] == list(normalization.mean) and texts["dataset"] == "noise"
    # ReLU is part of the convolutions and sums; the skipped block is not there.
    assert operators.count("CONV_2D") == 1 + 2 * 5 + 2 and operators.count("ADD") == 5
    assert set(operators) == {"CONV_2D", "PAD", "ADD", "MEAN", "FULLY_CONNECTED"}
    # Its constants are aligned, whatever the length of the texts.
    for texts in ({"dataset": "noise"}, {"odd": "x"}):
        model = schema.Model.GetRootAs(litert.to_litert(spec, params, **texts))
        buffers = [model.Buffers(n) for n in range(model.BuffersLength())]
        starts = [b._tab.Vector(b._tab.Offset(4)) for b in buffers if b.DataLength()]
        assert len(starts) > 20 and all(start % 16 == 0 for start in starts)


@both_shortcuts
@both_inputs
def test_8_bit_weights_compute_what_the_rounded_network_does(name, normalize):
    spec, params, normalization, pixels, images, _ = network(name)
    params = jax.tree.map(np.copy, params)
    params["stem"]["kernel"][..., 1] = 0  # The scale of this channel in 8 bits is 0.
    rounded = quantize.quantize(params)
    content = litert.to_litert(spec, rounded, normalization=normalization if normalize else None)
    batch = pixels if normalize else images
    assert_runs(content, batch, logits_of(spec, quantize.dequantize(rounded), images))
    exact = np.asarray(logits_of(spec, params, images))
    assert 1e-4 < formats.compare(run(content, batch)[0], exact).error < 0.1
    model, operators, versions = unpack(content)
    stored = [t for t in model.subgraphs[0].tensors if t.type == schema.TensorType.INT8]
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    assert sum(np.prod(t.shape) for t in stored) == sum(kernel.size for kernel in kernels)
    assert operators.count("DEQUANTIZE") == len(kernels) and versions["DEQUANTIZE"] == 5


@both_shortcuts
@both_inputs
def test_the_quantiser_rounds_the_activations_too(tmp_path, name, normalize):
    spec, params, normalization, pixels, _, _ = network(name)
    path = tmp_path / "net.tflite"
    options = {"format": "litert", "normalization": normalization, "normalize": normalize}
    options |= {"int8": "full", "calibration": pixels, "dataset": "noise"}
    assert 1e-3 < formats.export(path, spec, params, pixels, **options).error < 0.2
    model, _, _ = unpack(path.read_bytes())
    graph = model.subgraphs[0]
    types = {tensor.name.decode(): tensor.type for tensor in graph.tensors}
    float32 = {name for name, kind in types.items() if kind == schema.TensorType.FLOAT32}
    outside = {"pixels", "pixels.factor", "pixels.scaled", "pixels.mean", "pixels.normalised"}
    outside = outside if normalize else {"images"}
    assert {n for n in float32 if not n.startswith("logits")} == outside
    assert {graph.tensors[n].type for n in graph.outputs} == {schema.TensorType.FLOAT32}
    assert [e for e in model.metadata if e.name == b"dataset"]
    assert [p.name for p in tmp_path.iterdir()] == ["net.tflite"]


def test_ranges_are_those_of_all_calibration_images():
    """Not those of the first batch, as the quantiser's own moving average nearly has them."""
    spec, params, normalization, pixels, batch, wanted = network("projection")
    faint = np.resize(pixels // 4 + 96, (litert._BATCH_SIZE, *pixels.shape[1:]))
    content = litert.to_litert(spec, params)
    errors = []
    for images in (faint, np.concatenate([faint, pixels])):
        small = litert.quantize_litert(content, images, normalization=normalization)
        errors.append(formats.compare(run(small, batch)[0], wanted).error)
    assert errors[1] < 0.05 < errors[0]


@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_a_block_whose_channels_never_fire_can_be_rounded_too(tmp_path, format):
    """The range of its activations is zero, which has no scale."""
    spec, params, normalization, pixels, *_ = network("projection")
    name = spec.blocks[0].name
    silent = {**params[name]["conv1"], "bias": np.full(spec.blocks[0].hidden_width, -100, "f4")}
    params = {**params, name: {**params[name], "conv1": silent}}
    options = {"normalization": normalization, "int8": "full", "calibration": pixels}
    found = formats.export(tmp_path / "net", spec, params, pixels, format=format, **options)
    assert found.error < 0.2


def test_a_file_that_the_runtime_cannot_run_is_refused(tmp_path):
    """Its kernels refuse a scale of weights far from that of what they write."""
    spec, params, _, pixels, *_ = network("projection")
    large = {**params["stem"], "kernel": params["stem"]["kernel"] * 1e12}
    params, black = {**params, "stem": large}, np.zeros_like(pixels)
    options = {"normalization": Normalization((0.0,) * 3, (1.0,) * 3), "int8": "full"}
    options |= {"format": "litert", "calibration": black}
    with refused("LiteRT must be able to run", UsageError):
        formats.export(tmp_path / "net", spec, params, black, **options)
    assert not list(tmp_path.iterdir())
