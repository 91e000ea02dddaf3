"""The folded network against an explicit one in NumPy, and against itself at other widths."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_params, refused

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import Grid
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import SHORTCUTS, generated_blocks, morph, resnet_spec

NUM_IMAGES = 3
apply = jax.jit(cifar_resnet.apply, static_argnums=0)


def small_spec(**kwargs):
    fields = {"stage_widths": (4, 6, 8), "image_size": 8, "channels": 2, **kwargs}
    return resnet_spec(14, num_classes=5, **fields)


def random_images(spec, seed=7):
    shape = (NUM_IMAGES, spec.image_size, spec.image_size, spec.channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_widths(spec, blocks, seed):
    rng = np.random.default_rng(seed)
    chosen = [spec.blocks[n] for n in blocks]
    return [int(rng.integers(0 if b.skippable else 1, b.hidden_width + 1)) for b in chosen]


def reference_conv(x, layer, stride):
    """PyTorch's Conv2d(kernel_size=k, stride=stride, padding=k // 2), pixel by pixel."""
    kernel = np.asarray(layer["kernel"], np.float64)
    side = len(kernel)
    pad = side // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    size = (x.shape[1] - side) // stride + 1
    y = np.empty((len(x), size, size, kernel.shape[-1]))
    for i in range(size):
        for j in range(size):
            patch = x[:, i * stride : i * stride + side, j * stride : j * stride + side]
            y[:, i, j] = np.tensordot(patch, kernel, 3)
    return y + layer["bias"]


def reference_logits(spec, params, images):
    """The network of He et al., written out in float64."""
    x = np.maximum(reference_conv(images, params["stem"], 1), 0)
    for block in spec.blocks:
        if block.name not in params:
            continue
        layers = params[block.name]
        y = np.maximum(reference_conv(x, layers["conv1"], block.stride), 0)
        y = reference_conv(y, layers["conv2"], 1)
        if "shortcut" in layers:
            x = reference_conv(x, layers["shortcut"], block.stride)
        elif x.shape != y.shape:
            widened = np.zeros_like(y)
            before = (y.shape[-1] - x.shape[-1]) // 2
            widened[..., before : before + x.shape[-1]] = x[:, ::2, ::2]
            x = widened
        x = np.maximum(x + y, 0)
    logits = x.mean((1, 2)) @ np.asarray(params["head"]["kernel"], np.float64)
    return logits + params["head"]["bias"]


def assert_close(actual, expected, tolerance=2e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("image_size", [8, 9])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_network_computes_what_pytorch_computes(shortcut, image_size):
    spec = small_spec(shortcut=shortcut, image_size=image_size)
    params, images = random_params(spec), random_images(spec)
    assert_close(apply(spec, params, images), reference_logits(spec, params, images))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_folding_batch_norm_preserves_the_function(shortcut):
    spec = small_spec(shortcut=shortcut)
    model, images = cifar_resnet.ResNet(spec), random_images(spec)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(1)

    def leaf(path, x):
        if path[-1].key == "var":
            return rng.uniform(0.01, 3, x.shape)
        return rng.normal(size=x.shape) / np.sqrt(max(1, math.prod(x.shape[:-1])))

    variables = jax.tree_util.tree_map_with_path(leaf, shapes)
    folded = cifar_resnet.fold_batch_norm(variables)
    assert jax.tree.map(jnp.shape, folded) == cifar_resnet.param_shapes(spec)
    with jax.enable_x64(True):
        expected = jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float64))
    assert_close(reference_logits(spec, folded, images), expected, 1e-6)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_linen_network_has_the_layer_names_of_the_folded_one(shortcut):
    spec = morph(small_spec(shortcut=shortcut), (1, 3), (0, 2))
    images = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
    variables = jax.eval_shape(cifar_resnet.ResNet(spec).init, jax.random.key(0), images)

    def kernels(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
        named = {jax.tree_util.keystr(path): getattr(x, "shape", x) for path, x in leaves}
        return {name: shape for name, shape in named.items() if name.endswith("['kernel']")}

    assert kernels(variables["params"]) == kernels(cifar_resnet.param_shapes(spec))


def test_hidden_moments_are_those_of_the_activations_and_a_constant():
    spec = morph(small_spec(), (1,), (0,))
    params, images = random_params(spec), random_images(spec)
    hidden = [cifar_resnet.hidden_group(spec.blocks[n]) for n in (0, 2)]  # a skipped block has none
    moments = elastic.moments(cifar_resnet.family(spec), params, jnp.asarray(images), hidden)
    assert list(moments) == ["stage1_block0/conv2/kernel", "stage2_block0/conv2/kernel"]

    stem = np.maximum(reference_conv(images, params["stem"], 1), 0)
    first, entry = params["stage1_block0"], params["stage2_block0"]
    hidden = np.maximum(reference_conv(stem, first["conv1"], 1), 0)
    stream = np.maximum(stem + reference_conv(hidden, first["conv2"], 1), 0)
    later = np.maximum(reference_conv(stream, entry["conv1"], 2), 0)
    for name, activations in zip(moments, (hidden, later), strict=True):
        rows = activations.reshape(-1, activations.shape[-1])
        width = rows.shape[1]
        expected = np.ones((width + 1, width + 1))
        for a in range(width):
            expected[a, width] = expected[width, a] = rows[:, a].mean()
            for b in range(width):
                expected[a, b] = (rows[:, a] * rows[:, b]).mean()
        assert moments[name].dtype == jnp.float32
        assert_close(moments[name], expected)


@pytest.mark.parametrize("which", ["inner", "not_first", "all"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_masked_network_equals_the_smaller_dense_one(shortcut, which):
    spec = small_spec(shortcut=shortcut)
    blocks = generated_blocks(spec, which)
    family = cifar_resnet.hypernetwork(spec, blocks, Grid())
    params, images = random_params(spec), random_images(spec)

    @jax.jit
    def masked_logits(widths):
        return cifar_resnet.apply(spec, elastic.mask_params(family.groups, params, widths), images)

    choices = [random_widths(spec, blocks, seed) for seed in range(6)]
    lowest = [0 if spec.blocks[n].skippable else 1 for n in blocks]
    full = [spec.blocks[n].hidden_width for n in blocks]
    for widths in [*choices, lowest, full]:
        small, dense = family.dense(params, widths)
        assert small == morph(spec, blocks, widths)
        assert jax.tree.map(jnp.shape, dense) == cifar_resnet.param_shapes(small)
        expected = reference_logits(small, dense, images)
        assert_close(masked_logits(family.by_name(np.array(widths))), expected)


def test_what_is_masked_may_be_anything_and_gets_no_gradient():
    spec, widths = small_spec(), (0, 3, 2, 0, 5, 1)
    groups = cifar_resnet.family(spec).groups
    by_name = {cifar_resnet.hidden_group(b): w for b, w in zip(spec.blocks, widths, strict=True)}
    params, images = random_params(spec), random_images(spec)
    mask = jax.jit(lambda tree: elastic.mask_params(groups, tree, by_name))
    kept = jax.tree.map(lambda x: np.asarray(x) > 0, mask(jax.tree.map(np.ones_like, params)))
    poisoned = jax.tree.map(lambda x, keep: np.where(keep, x, np.nan), params, kept)
    loss = jax.jit(
        jax.grad(lambda tree: jnp.sum(cifar_resnet.apply(spec, mask(tree), images) ** 2))
    )
    gradient = loss(poisoned)
    jax.tree.map(np.testing.assert_array_equal, gradient, loss(params))
    for x, keep in zip(jax.tree.leaves(gradient), jax.tree.leaves(kept), strict=True):
        assert np.isfinite(x).all() and not np.asarray(x)[~keep].any()
        assert np.asarray(x)[keep].any() == keep.any()


def test_slicing_beyond_the_tree_is_refused():
    spec = small_spec()
    with refused("stage2_block1/conv1 takes widths from 0 to 6, got 7"):
        cifar_resnet.hypernetwork(spec, (1, 3), Grid()).dense(random_params(spec), (4, 7))


def cell_means(x, axis, width):
    """Means over `width` equal cells of an axis: exact, on the common refinement of both grids."""
    fine = np.moveaxis(np.repeat(np.asarray(x, np.float64), width, axis), axis, 0)
    return np.moveaxis(fine.reshape(width, x.shape[axis], *fine.shape[1:]).mean(1), 0, axis)


def test_resampling_averages_over_cells():
    spec, axes = small_spec(), {"conv1/kernel": 3, "conv1/bias": 0, "conv2/kernel": 2}
    family = cifar_resnet.hypernetwork(spec, (3,), Grid(num_terms=1))
    values = hyper.flat(random_params(spec))
    inr = hyper.init(jax.random.key(0), family, random_params(spec))["inr"]
    resample = jax.jit(lambda width: hyper.generate_tensors(family, inr, width[None]))
    for width in range(7):
        resampled = {name: np.asarray(x) for name, x in resample(np.array(width)).items()}
        if width == 0:
            assert not any(x.any() for x in resampled.values())
            continue
        for path, axis in axes.items():
            name = f"stage2_block1/{path}"
            # Hidden channels that all carry one value are summed to the same result.
            scale = 6 / width if path == "conv2/kernel" else 1
            kept, beyond = np.split(np.moveaxis(resampled[name], axis, 0), [width])
            wanted = scale * cell_means(values[name], axis, width)
            assert_close(np.moveaxis(kept, 0, axis), wanted, 3e-6)
            assert not beyond.any()
        bias = "stage2_block1/conv2/bias"
        np.testing.assert_array_equal(resampled[bias], values[bias])
    assert resample._cache_size() == 1


def test_images_of_numpys_float64_are_taken_as_float32():
    spec = small_spec()
    params, images = random_params(spec), random_images(spec)
    logits = cifar_resnet.apply(spec, params, np.asarray(images, np.float64))
    assert_close(logits, apply(spec, params, images), 1e-5)


def test_bfloat16_images_give_float32_logits_close_to_those_of_float32_images():
    spec = small_spec()
    params, images = random_params(spec), random_images(spec)
    logits = apply(spec, params, jnp.asarray(images, jnp.bfloat16))
    exact = apply(spec, params, images)
    assert logits.dtype == exact.dtype == jnp.float32
    assert_close(logits, exact, 0.05)
    assert not np.allclose(logits, exact, rtol=1e-4, atol=0)  # it did run in bfloat16


def test_gradients_in_bfloat16_are_close_to_those_in_float32_for_biases_too():
    spec = resnet_spec(20, num_classes=10)
    params = cifar_resnet.init_params(jax.random.key(0), spec)
    images = jax.random.normal(jax.random.key(1), (16, 32, 32, 3))

    @jax.jit
    @jax.grad
    def gradient(params, images):
        return jnp.mean(cifar_resnet.apply(spec, params, images) ** 2)

    exact, rounded = gradient(params, images), gradient(params, images.astype(jnp.bfloat16))
    error = jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)), exact, rounded
    )
    assert max(jax.tree.leaves(error)) < 0.1
