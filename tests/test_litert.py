"""LiteRT files: that they compute what the network does, in float32 and in 8 bits."""

import json

import jax
import numpy as np
import pytest
from builders import refused
from networks import assert_same_logits, both_shortcuts, sample

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from neumeta_jax.evaluation import quantize
from neumeta_jax.export import formats, litert
from neumeta_jax.export.network import Normalization

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


def rounded(network):
    return network._replace(params=quantize.quantize(network.params))


@both_shortcuts
@both_inputs
def test_a_file_computes_the_network_for_batches_of_any_size(name, normalize):
    network, pixels, images, wanted = sample(name)
    content = litert.to_litert(network, normalize=normalize)
    assert litert.to_litert(network, normalize=normalize) == content
    assert_runs(content, pixels if normalize else images, wanted)


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors")
@both_shortcuts
def test_shapes_in_a_file_are_those_that_the_runtime_infers(name):
    """Converters and quantisers read them without running anything."""
    content = litert.to_litert(rounded(sample(name).network), normalize=True)
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
    network = sample("projection").network._replace(info={"dataset": "noise"})
    content = litert.to_litert(network)
    assert content[4:8] == b"TFL3"
    model, operators, _ = unpack(content)
    texts = {
        entry.name.decode(): json.loads(bytes(model.buffers[entry.buffer].data))
        for entry in model.metadata
    }
    assert texts == network.metadata
    # ReLU is part of the convolutions and sums; the skipped block is not there.
    assert operators.count("CONV_2D") == 1 + 2 * 5 + 2 and operators.count("ADD") == 5
    assert set(operators) == {"CONV_2D", "PAD", "ADD", "MEAN", "FULLY_CONNECTED"}
    # Its constants are aligned, whatever the length of the texts.
    for info in ({"dataset": "noise"}, {"odd": "x"}):
        model = schema.Model.GetRootAs(litert.to_litert(network._replace(info=info)))
        buffers = [model.Buffers(n) for n in range(model.BuffersLength())]
        starts = [b._tab.Vector(b._tab.Offset(4)) for b in buffers if b.DataLength()]
        assert len(starts) > 20 and all(start % 16 == 0 for start in starts)


@both_shortcuts
@both_inputs
def test_8_bit_weights_compute_what_the_rounded_network_does(name, normalize):
    network, pixels, images, _ = sample(name)
    params = jax.tree.map(np.copy, network.params)
    params["stem"]["kernel"][..., 1] = 0  # The scale of this channel in 8 bits is 0.
    exact = network._replace(params=params)
    network, batch = rounded(exact), pixels if normalize else images
    content = litert.to_litert(network, normalize=normalize)
    assert_runs(content, batch, network.logits(pixels))
    assert 1e-4 < formats.compare(run(content, batch)[0], exact.logits(pixels)).error < 0.1
    model, operators, versions = unpack(content)
    stored = [t for t in model.subgraphs[0].tensors if t.type == schema.TensorType.INT8]
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    assert sum(np.prod(t.shape) for t in stored) == sum(kernel.size for kernel in kernels)
    assert operators.count("DEQUANTIZE") == len(kernels) and versions["DEQUANTIZE"] == 5


@both_shortcuts
@both_inputs
def test_the_quantiser_rounds_the_activations_too(tmp_path, name, normalize):
    network, pixels, *_ = sample(name)
    path = tmp_path / "net.tflite"
    options = {"format": "litert", "normalize": normalize, "int8": "full", "calibration": pixels}
    assert 1e-3 < formats.export(path, network, pixels, **options).error < 0.2
    model, _, _ = unpack(path.read_bytes())
    graph = model.subgraphs[0]
    types = {tensor.name.decode(): tensor.type for tensor in graph.tensors}
    float32 = {name for name, kind in types.items() if kind == schema.TensorType.FLOAT32}
    outside = {"pixels", "pixels.factor", "pixels.scaled", "pixels.mean", "pixels.normalised"}
    outside = outside if normalize else {"images"}
    assert {n for n in float32 if not n.startswith("logits")} == outside
    assert {graph.tensors[n].type for n in graph.outputs} == {schema.TensorType.FLOAT32}
    assert {e.name.decode() for e in model.metadata} >= {"network", "mean", "std", "int8"}
    assert [p.name for p in tmp_path.iterdir()] == ["net.tflite"]


def test_ranges_are_those_of_all_calibration_images(tmp_path):
    """Not those of the first batch, as the quantiser's own moving average nearly has them."""
    network, pixels, batch, wanted = sample("projection")
    faint = np.resize(pixels // 4 + 96, (litert.CALIBRATION_BATCH, *pixels.shape[1:]))
    errors = []
    for images in (faint, np.concatenate([faint, pixels])):
        litert.write(tmp_path / "net", network, calibration=network.normalization(images))
        found = run((tmp_path / "net").read_bytes(), batch)[0]
        errors.append(formats.compare(found, wanted).error)
    assert errors[1] < 0.05 < errors[0]


def with_layer(network, name, **leaves):
    """The network with other values in `stem`, or in the first convolution of a block."""
    part = network.params[name]
    part = {**part, **leaves} if name == "stem" else {**part, "conv1": {**part["conv1"], **leaves}}
    return network._replace(params={**network.params, name: part})


@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_a_block_whose_channels_never_fire_can_be_rounded_too(tmp_path, format):
    """The range of its activations is zero, which has no scale."""
    network, pixels, *_ = sample("projection")
    block = network.spec.blocks[0]
    network = with_layer(network, block.name, bias=np.full(block.hidden_width, -100, "f4"))
    options = {"format": format, "int8": "full", "calibration": pixels}
    assert formats.export(tmp_path / "net", network, pixels, **options).error < 0.2


def test_a_file_that_the_runtime_cannot_run_is_refused(tmp_path):
    """Its kernels refuse a scale of weights far from that of what they write."""
    network, pixels, *_ = sample("projection")
    network = with_layer(network, "stem", kernel=network.params["stem"]["kernel"] * 1e12)
    network = network._replace(normalization=Normalization((0.0,) * 3, (1.0,) * 3))
    black = np.zeros_like(pixels)
    with refused("LiteRT must be able to run"):
        options = {"format": "litert", "int8": "full", "calibration": black}
        formats.export(tmp_path / "net", network, black, **options)
    assert not list(tmp_path.iterdir())
