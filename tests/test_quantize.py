"""Weights in 8 bits: how far they are off, and that files hold them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from networks import (
    SPECS,
    dense_network,
    no_litert,
    random_inr,
    random_params,
    random_pixels,
    refused,
)

from neumeta_jax import elastic
from neumeta_jax.core.inr import Grid
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.evaluation import quantize
from neumeta_jax.evaluation.evaluator import Evaluator, predicted_classes
from neumeta_jax.export import formats, safetensors as saved
from neumeta_jax.export.network import Network, Normalization
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec

NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
SPEC = SPECS["projection"]
PARAMS = random_params(SPEC)
NETWORK = Network(SPEC, PARAMS, NORMALIZATION, {"dataset": "noise"})
IMAGES = random_pixels(SPEC, 40)


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
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        once = quantize.fake_quantize(PARAMS)
    chex.assert_trees_all_equal_structs(once, PARAMS)
    chex.assert_trees_all_close(quantize.fake_quantize(once), once, rtol=1e-6)
    np.testing.assert_array_equal(once["stem"]["bias"], PARAMS["stem"]["bias"])
    assert not np.array_equal(once["head"]["kernel"], PARAMS["head"]["kernel"])


def test_a_padded_network_rounds_as_the_dense_one_does():
    spec = resnet_spec(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    blocks, widths = generated_blocks(spec), np.array([2, 5])
    params = random_params(spec)
    family = cifar_resnet.hypernetwork(spec, blocks, Grid())
    masked = elastic.mask_params(family.groups, params, family.by_name(widths))
    masked = quantize.fake_quantize(masked)
    dense = quantize.fake_quantize(family.dense(params, widths)[1])
    sliced = family.dense(masked, widths)[1]
    chex.assert_trees_all_equal(sliced, dense)


@pytest.mark.parametrize(
    "format", ["safetensors", "onnx", "stablehlo", pytest.param("litert", marks=no_litert)]
)
def test_a_file_with_8_bit_weights_is_small_and_computes_what_the_rounded_network_does(
    tmp_path, format
):
    spec = resnet_spec(8, num_classes=5, stage_widths=(16, 32, 32), image_size=8)
    network, path = Network(spec, random_params(spec), NORMALIZATION), tmp_path / "net"
    formats.export(path, network, IMAGES, format=format)
    large = path.stat().st_size
    found = formats.export(path, network, IMAGES, format=format, int8="weights")
    assert found.error < 1e-5 and found.agreement == 1
    logits = formats.logits_of_file(path, IMAGES, format=format, normalization=NORMALIZATION)
    exact = network.logits(IMAGES)
    assert 1e-4 < formats.compare(logits, exact).error < 0.1  # it is the rounded one
    assert large - path.stat().st_size > 2.7 * spec.num_params  # three bytes less for each weight
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("scale", [{}, {"scale": np.ones(3, np.float32)}], ids=["no", "wrong"])
def test_8_bit_weights_without_their_scales_are_refused(tmp_path, scale):
    tree = quantize.quantize(PARAMS)
    tree["stem"] = {k: v for k, v in tree["stem"].items() if k != "scale"} | scale
    path = tmp_path / "net.safetensors"
    saved.save(path, Network(SPEC, tree, NORMALIZATION))
    with refused("net.safetensors"):
        saved.load(path)


@pytest.mark.parametrize("normalize", [False, True])
def test_onnxruntime_rounds_the_activations_too(tmp_path, normalize):
    path = tmp_path / "net.onnx"
    options = {"format": "onnx", "normalize": normalize, "int8": "full", "calibration": IMAGES}
    found = formats.export(path, NETWORK, IMAGES, **options)
    assert 1e-3 < found.error < 0.2
    model = onnx.load(path)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("QuantizeLinear") >= operators.count("Conv")
    kernels = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.INT8]
    wanted = [leaf.size for leaf in jax.tree.leaves(PARAMS) if leaf.ndim == 4]
    assert sum(np.prod(w.dims) for w in kernels if len(w.dims) == 4) == sum(wanted)
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
        ({"format": "onnx", "int8": "half"}, "is one of weights, full or absent, got 'half'"),
        ({"format": "onnx", "int8": "full"}, "needs calibration images"),
    ],
)
def test_an_int8_export_that_cannot_be_is_refused(tmp_path, options, match):
    path = tmp_path / "net"
    with refused(match):
        formats.export(path, NETWORK, IMAGES, **options)
    assert not list(tmp_path.iterdir())


def test_a_grid_of_rounded_networks_has_the_accuracy_of_each():
    spec = resnet_spec(8, num_classes=3, stage_widths=(4, 4, 8), image_size=8)
    family = cifar_resnet.hypernetwork(spec, (0, 2), Grid())
    params, sizes = random_inr(family, seed=5, scale=0.5), [(4, 8), (2, 5)]
    preprocessing = Preprocessing(*NORMALIZATION)
    # Labels that the float32 network of full width gives, so that any rounding may show.
    exact = Evaluator(family, params, IMAGES, np.zeros(len(IMAGES), int), preprocessing)
    plan = exact.plan(sizes[:1], per_image=predicted_classes)
    labels = exact.score(plan)[1][0]
    rounded = dataclasses.replace(exact, labels=labels, transform=quantize.fake_quantize)
    for widths, accuracy in zip(sizes, rounded.accuracies(sizes), strict=True):
        small, dense = dense_network(family, params, widths)
        logits = Network(small, quantize.quantize(dense), NORMALIZATION).logits(IMAGES)
        assert abs(accuracy - np.mean(logits.argmax(axis=1) == labels)) <= 1 / 40
