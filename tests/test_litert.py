"""LiteRT files: that they compute what the network does, in float32 and in 8 bits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from neumeta_jax import command_line, data, export, litert, quantize, resnet
from neumeta_jax.architecture import ResNetSpec
from neumeta_jax.export import Normalization

SPECS = {
    "projection": ResNetSpec((4, 6, 8), (3, 0, 6, 5, 2, 7), num_classes=5, image_size=8),
    # Odd sizes and odd numbers of added channels, where sides could be mixed up.
    "pad": ResNetSpec((3, 4, 7), (2, 3, 4), 4, image_size=9, channels=2, shortcut="pad"),
}
both_shortcuts = pytest.mark.parametrize("name", SPECS)


@functools.cache
def network(name):
    """(spec, folded tree, normalisation, uint8 images, the images normalised, their logits)."""
    spec, rng = SPECS[name], np.random.default_rng(0)

    def leaf(shape):
        values = rng.normal(size=shape) * (2 / np.prod(shape[:-1])) ** 0.5
        return (values * rng.uniform(0.3, 1.5, shape[-1])).astype(np.float32)

    params = jax.tree.map(leaf, resnet.param_shapes(spec), is_leaf=lambda x: isinstance(x, tuple))
    mean, std = rng.uniform(0.2, 0.6, (2, spec.channels)).round(3).tolist()
    normalization = Normalization(tuple(mean), tuple(std))
    shape = (12, spec.image_size, spec.image_size, spec.channels)
    pixels = rng.integers(0, 256, shape).astype(np.uint8)
    images = np.asarray(data.normalize(jnp.asarray(pixels), *normalization))
    return spec, params, normalization, pixels, images, logits_of(spec, params, images)


def with_a_channel_of_zeros(params):
    """Its scale in 8 bits is 0."""
    kernel = params["stem"]["kernel"].copy()
    kernel[..., 1] = 0
    return {**params, "stem": {**params["stem"], "kernel": kernel}}


def logits_of(spec, params, images):
    return np.asarray(jax.jit(lambda p, x: resnet.apply(spec, p, x))(params, images))


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


def assert_close(found, wanted, bound=1e-5):
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert export.compare(found, wanted).error < bound


def unpack(content):
    """(the file as objects, its operators' names, their versions)."""
    model = schema.ModelT.InitFromPackedBuf(content)
    names = {number: name for name, number in vars(schema.BuiltinOperator).items()}
    codes = [names[code.builtinCode] for code in model.operatorCodes]
    operators = [codes[operator.opcodeIndex] for operator in model.subgraphs[0].operators]
    versions = [code.version for code in model.operatorCodes]
    return model, operators, dict(zip(codes, versions, strict=True))


@both_shortcuts
def test_a_file_computes_the_network_for_batches_of_any_size(name):
    spec, params, _, _, images, wanted = network(name)
    content = litert.to_litert(spec, params)
    assert litert.to_litert(spec, params) == content
    whole, one, three = run(content, images, images[:1], images[:3])
    assert_close(whole, wanted)
    assert_close(one, wanted[:1])
    assert_close(three, wanted[:3])


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


@both_shortcuts
def test_a_file_may_take_pixels(name):
    spec, params, normalization, pixels, _, wanted = network(name)
    content = litert.to_litert(spec, params, normalization=normalization)
    whole, one = run(content, pixels, pixels[:1])
    assert_close(whole, wanted)
    assert_close(one, wanted[:1])


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


def test_the_constants_of_a_file_are_aligned():
    spec, params, *_ = network("projection")
    content = litert.to_litert(spec, params, odd="x")
    model = schema.Model.GetRootAs(content)
    buffers = [model.Buffers(n) for n in range(model.BuffersLength())]
    starts = [b._tab.Vector(b._tab.Offset(4)) for b in buffers if b.DataLength()]
    assert len(starts) > 20 and all(start % 16 == 0 for start in starts)


@both_shortcuts
@pytest.mark.parametrize("normalize", [False, True])
def test_8_bit_weights_compute_what_the_rounded_network_does(name, normalize):
    spec, params, normalization, pixels, images, _ = network(name)
    rounded = quantize.quantize(with_a_channel_of_zeros(params))
    exact = logits_of(spec, with_a_channel_of_zeros(params), images)
    content = litert.to_litert(spec, rounded, normalization=normalization if normalize else None)
    wanted = logits_of(spec, quantize.dequantize(rounded), images)
    batch = pixels if normalize else images
    whole, one = run(content, batch, batch[:1])
    assert_close(whole, wanted)
    assert_close(one, wanted[:1])
    assert 1e-4 < export.compare(whole, exact).error < 0.1
    model, operators, versions = unpack(content)
    stored = [t for t in model.subgraphs[0].tensors if t.type == schema.TensorType.INT8]
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    assert sum(np.prod(t.shape) for t in stored) == sum(kernel.size for kernel in kernels)
    assert operators.count("DEQUANTIZE") == len(kernels) and versions["DEQUANTIZE"] == 5


@both_shortcuts
@pytest.mark.parametrize("normalize", [False, True])
def test_the_quantiser_rounds_the_activations_too(tmp_path, name, normalize):
    spec, params, normalization, pixels, _, _ = network(name)
    path = tmp_path / "net.tflite"
    found = export.export(
        path,
        spec,
        params,
        pixels,
        format="litert",
        normalization=normalization,
        normalize=normalize,
        int8="full",
        calibration=pixels,
        dataset="noise",
    )
    assert 1e-3 < found.error < 0.2
    model, _, _ = unpack(path.read_bytes())
    graph = model.subgraphs[0]
    types = {tensor.name.decode(): tensor.type for tensor in graph.tensors}
    float32 = {name for name, kind in types.items() if kind == schema.TensorType.FLOAT32}
    outside = {"pixels", "pixels.factor", "pixels.scaled", "pixels.mean", "pixels.normalised"}
    assert {n for n in float32 if not n.startswith("logits")} == (
        outside if normalize else {"images"}
    )
    assert {graph.tensors[n].type for n in graph.outputs} == {schema.TensorType.FLOAT32}
    assert [e for e in model.metadata if e.name == b"dataset"]
    assert [p.name for p in tmp_path.iterdir()] == ["net.tflite"]


def test_ranges_are_those_of_all_calibration_images():
    """Not those of the first batch, as the quantiser's own moving average nearly has them."""
    spec, params, normalization, pixels, _, wanted = network("projection")
    faint = np.resize(pixels // 4 + 96, (litert._BATCH_SIZE, *pixels.shape[1:]))
    content = litert.to_litert(spec, params)
    errors = []
    for images in (faint, np.concatenate([faint, pixels])):
        small = litert.quantize_litert(content, images, normalization=normalization)
        batch = np.asarray(data.normalize(jnp.asarray(pixels), *normalization))
        errors.append(export.compare(run(small, batch)[0], wanted).error)
    assert errors[1] < 0.05 < errors[0]


@pytest.mark.parametrize("format", ["litert", "onnx"])
def test_a_block_whose_channels_never_fire_can_be_rounded_too(tmp_path, format):
    """The range of its activations is zero, which has no scale."""
    spec, params, normalization, pixels, *_ = network("projection")
    name = spec.blocks[0].name
    silent = {**params[name]["conv1"], "bias": np.full(spec.blocks[0].hidden_width, -100, "f4")}
    found = export.export(
        tmp_path / "net",
        spec,
        {**params, name: {**params[name], "conv1": silent}},
        pixels,
        format=format,
        normalization=normalization,
        int8="full",
        calibration=pixels,
    )
    assert found.error < 0.2


def test_a_file_that_the_runtime_cannot_run_is_refused(tmp_path):
    """Its kernels refuse a scale of weights far from that of what they write."""
    spec, params, _, pixels, *_ = network("projection")
    large = {**params["stem"], "kernel": params["stem"]["kernel"] * 1e12}
    with pytest.raises(command_line.UsageError, match="LiteRT must be able to run") as error:
        export.export(
            tmp_path / "net",
            spec,
            {**params, "stem": large},
            np.zeros_like(pixels),
            format="litert",
            normalization=Normalization((0.0,) * 3, (1.0,) * 3),
            int8="full",
            calibration=np.zeros_like(pixels),
        )
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
