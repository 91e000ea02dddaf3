"""Weights in 8 bits: how far they are off, and that files hold them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from neumeta_jax import evaluation, export, hypernetwork as hyper, litert, quantize, resnet
from neumeta_jax.architecture import ResNetSpec, cifar_resnet, generated_blocks
from neumeta_jax.export import Normalization
from neumeta_jax.inr import Grid
from neumeta_jax.training import Preprocessing

NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
no_litert = pytest.mark.skipif(
    not importlib.util.find_spec("ai_edge_litert"), reason="ai-edge-litert is not installed"
)
weights_formats = pytest.mark.parametrize(
    "format", [*export.INT8_FORMATS["weights"][:-1], pytest.param("litert", marks=no_litert)]
)
SPEC = ResNetSpec((4, 6, 8), (3, 0, 6, 5, 2, 7), num_classes=5, image_size=8)


def network(spec=SPEC):
    """(folded tree at random with scales that differ from channel to channel, uint8 images)."""
    rng = np.random.default_rng(0)

    def leaf(shape):
        fan_in = np.prod(shape[:-1])
        values = rng.normal(size=shape) * (2 / fan_in) ** 0.5
        return (values * rng.uniform(0.3, 1.5, shape[-1])).astype(np.float32)

    params = jax.tree.map(leaf, resnet.param_shapes(spec), is_leaf=lambda x: isinstance(x, tuple))
    images = rng.integers(0, 256, (40, spec.image_size, spec.image_size, spec.channels))
    return params, images.astype(np.uint8)


@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (7, 3)])
def test_each_weight_is_off_by_half_a_step_of_its_channel_at_most(shape):
    kernel = np.random.default_rng(1).normal(size=shape) * np.arange(1, shape[-1] + 1)
    kernel = kernel.astype(np.float32)
    q, scale = quantize.quantize_kernel(kernel)
    assert q.dtype == jnp.int8 and q.shape == shape
    assert scale.dtype == jnp.float32 and scale.shape == shape[-1:]
    flat = np.abs(kernel).reshape(-1, shape[-1])
    np.testing.assert_allclose(scale, flat.max(axis=0) / 127, rtol=1e-6)
    assert np.all(np.abs(q.astype(int)).reshape(flat.shape).max(axis=0) == 127)
    off = np.abs(kernel - np.asarray(q, np.float32) * scale)
    assert np.all(off <= 0.5 * np.asarray(scale) * (1 + 1e-4))
    assert off.max() > 0.1 * scale.max()  # it did round


def test_a_channel_of_zeros_stays_one():
    kernel = np.random.default_rng(2).normal(size=(3, 3, 2, 4)).astype(np.float32)
    kernel[..., 1] = 0
    q, scale = quantize.quantize_kernel(kernel)
    assert scale[1] == 0 and not np.any(q[..., 1])
    found = quantize.fake_quantize({"stem": {"kernel": kernel, "bias": np.ones(4)}})["stem"]
    assert np.all(np.isfinite(found["kernel"])) and not np.any(found["kernel"][..., 1])


def test_rounding_again_changes_nothing_and_biases_are_kept():
    params, _ = network()
    once = quantize.fake_quantize(params)
    assert jax.tree.structure(once) == jax.tree.structure(params)
    twice = quantize.fake_quantize(once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), once, twice)
    np.testing.assert_array_equal(once["stem"]["bias"], params["stem"]["bias"])
    assert not np.array_equal(once["head"]["kernel"], params["head"]["kernel"])


def test_a_padded_network_rounds_as_the_dense_one_does():
    spec = cifar_resnet(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    blocks, widths = generated_blocks(spec), np.array([2, 5])
    params, _ = network(spec)
    masked = quantize.fake_quantize(resnet.mask_params(spec, params, blocks, widths))
    dense = quantize.fake_quantize(resnet.slice_params(spec, params, blocks, widths)[1])
    sliced = resnet.slice_params(spec, masked, blocks, widths)[1]
    jax.tree.map(np.testing.assert_array_equal, sliced, dense)


@weights_formats
def test_a_file_with_8_bit_weights_computes_what_the_rounded_network_does(tmp_path, format):
    params, images = network()
    path = tmp_path / "net"
    options = {"format": format, "normalization": NORMALIZATION}
    found = export.export(path, SPEC, params, images, int8="weights", **options)
    assert found.error < 1e-5 and found.agreement == 1
    logits = export.logits_of_file(path, images, **options)
    exact = export.network_logits(SPEC, params, images, NORMALIZATION)
    assert 1e-4 < export.compare(logits, exact).error < 0.1  # it is the rounded one
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@weights_formats
def test_a_file_with_8_bit_weights_is_smaller(tmp_path, format):
    spec = cifar_resnet(8, num_classes=5, stage_widths=(16, 32, 32), image_size=8)
    params, _ = network(spec)
    sizes = []
    for tree in (params, quantize.quantize(params)):
        path = tmp_path / "net"
        if format == "safetensors":
            export.save_safetensors(path, spec, tree, normalization=NORMALIZATION)
        elif format == "onnx":
            path.write_bytes(export.to_onnx(spec, tree).SerializeToString())
        elif format == "litert":
            path.write_bytes(litert.to_litert(spec, tree))
        else:
            path.write_bytes(export.to_stablehlo(spec, tree))
        sizes.append(path.stat().st_size)
    assert sizes[0] - sizes[1] > 2.7 * spec.num_params  # three bytes less for each weight


@pytest.mark.parametrize("change", ["no scale", "wrong scale"])
def test_8_bit_weights_without_their_scales_are_refused(tmp_path, change):
    tree = quantize.quantize(network()[0])
    tree["stem"] = dict(tree["stem"])
    if change == "no scale":
        del tree["stem"]["scale"]
    else:
        tree["stem"]["scale"] = np.ones(3, np.float32)
    path = tmp_path / "net.safetensors"
    export.save_safetensors(path, SPEC, tree, normalization=NORMALIZATION)
    with pytest.raises(ValueError, match="net.safetensors"):
        export.load_safetensors(path)


@pytest.mark.parametrize("normalize", [False, True])
def test_onnxruntime_rounds_the_activations_too(tmp_path, normalize):
    import onnx

    params, images = network()
    path = tmp_path / "net.onnx"
    found = export.export(
        path,
        SPEC,
        params,
        images,
        format="onnx",
        normalization=NORMALIZATION,
        normalize=normalize,
        int8="full",
        calibration=images,
        dataset="noise",
    )
    assert 1e-3 < found.error < 0.2
    model = onnx.load(path)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("QuantizeLinear") >= operators.count("Conv")
    kernels = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.INT8]
    assert sum(np.prod(w.dims) for w in kernels if len(w.dims) == 4) == sum(
        leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 4
    )
    assert {p.key: p.value for p in model.metadata_props}["dataset"] == '"noise"'
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    one = np.zeros((1, 3, 8, 8), np.uint8 if normalize else np.float32)
    assert session.run(None, {"images": one})[0].shape == (1, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"format": "torch", "int8": "weights"}, "--int8=weights is for safetensors, onnx, stable"),
        ({"format": "stablehlo", "int8": "full"}, "is for onnx, litert, got stablehlo"),
        (
            {"format": "onnx", "int8": "half"},
            "--int8 is one of weights, full or absent, got 'half'",
        ),
        ({"format": "onnx", "int8": "full"}, "needs calibration images"),
    ],
)
def test_an_int8_export_that_cannot_be_is_refused(tmp_path, options, match):
    params, images = network()
    with pytest.raises(ValueError, match=match) as error:
        export.export(
            tmp_path / "net", SPEC, params, images, normalization=NORMALIZATION, **options
        )
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_grid_of_rounded_networks_has_the_accuracy_of_each():
    spec = cifar_resnet(8, num_classes=3, stage_widths=(4, 4, 8), image_size=8)
    family = hyper.Hypernetwork(spec, (0, 2), Grid())
    tree, images = network(spec)
    shapes = jax.eval_shape(lambda key: hyper.init(key, family, tree), jax.random.key(0))
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), shapes)
    preprocessing = Preprocessing(*NORMALIZATION)
    # Labels that the float32 network of full width gives, so that any rounding may show.
    exact = evaluation.evaluate_grid(
        family, params, [(4, 8)], images, np.zeros(40, int), preprocessing, predictions=True
    )
    labels = exact.predictions[0].astype(int)
    found = evaluation.evaluate_grid(
        family,
        params,
        [(4, 8), (2, 5)],
        images,
        labels,
        preprocessing,
        transform=quantize.fake_quantize,
    )
    for widths, accuracy in zip([(4, 8), (2, 5)], found.accuracy, strict=True):
        small, dense = hyper.generate_dense(family, params, widths)
        logits = export.network_logits(small, quantize.quantize(dense), images, NORMALIZATION)
        assert abs(accuracy - np.mean(logits.argmax(axis=1) == labels)) <= 1 / 40
