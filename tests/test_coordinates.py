"""Coordinates against the papers' formulas, written as loops and in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import refused

from neumeta_jax.core import coordinates
from neumeta_jax.core.coordinates import Coordinates
from neumeta_jax.core.inr import Grid
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec

SPEC = resnet_spec(20, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
BLOCKS = generated_blocks(SPEC)
WIDTHS = np.array([3, 4, 1, 6, 5])
LAYERS, KINDS = ("conv1", "conv2"), ("kernel", "bias")


def stacks_of(spec=SPEC, blocks=BLOCKS):
    return cifar_resnet.hypernetwork(spec, blocks, Grid()).stacks


def full_grid(coords):
    """float[tensors, rows, columns, 6]."""
    return np.stack([np.broadcast_to(entry, coords.shape) for entry in coords.entries], axis=-1)


def tensors_of(stacks):
    """The stack and row of every generated tensor by (position, layer, kind)."""
    tensors = {}
    for stack in stacks:
        for row, (path, position) in enumerate(zip(stack.paths, stack.owners, strict=True)):
            _, layer, kind = path.split("/")
            tensors[position, layer, kind] = stack, row
    return tensors


def test_the_papers_resnet56_has_92_tensors_in_12_stacks():
    spec = resnet_spec(56, num_classes=100)
    stacks = stacks_of(spec, generated_blocks(spec))
    assert len(stacks) == len({stack.name for stack in stacks}) == 12
    assert sum(len(stack.paths) for stack in stacks) == 92
    assert {stack.num_tensors for stack in stacks} == {92}
    assert {stack.norm for stack in stacks} == {64}


@pytest.mark.parametrize("which", ["inner", "not_first", "all"])
@pytest.mark.parametrize("stage_widths", [(4, 6, 8), (4, 4, 4), (8, 6, 4)])
def test_every_tensor_has_its_own_index_in_training_order_and_its_shape(stage_widths, which):
    spec = resnet_spec(20, num_classes=5, stage_widths=stage_widths, image_size=8)
    blocks = generated_blocks(spec, which)
    stacks = stacks_of(spec, blocks)
    tensors = tensors_of(stacks)
    in_order = list(itertools.product(range(len(blocks)), LAYERS, KINDS))
    assert [tensors[t][0].indices[tensors[t][1]] for t in in_order] == list(range(len(in_order)))
    assert len(tensors) == sum(len(stack.paths) for stack in stacks)  # none comes twice
    assert len({stack.name for stack in stacks}) == len(stacks)
    for (position, layer, kind), (stack, row) in tensors.items():
        block = spec.blocks[blocks[position]]
        assert stack.paths[row] == f"{block.name}/{layer}/{kind}"
        rows, columns = {
            "conv1": (block.hidden_width, block.in_width),
            "conv2": (block.out_width, block.hidden_width),
        }[layer]
        wanted = (rows, columns, 9) if kind == "kernel" else (rows, 1, 1)
        assert stack.shape[1:] == wanted
        elastic = layer == "conv1", (layer, kind) == ("conv2", "kernel")
        assert (stack.rows.elastic, stack.columns.elastic) == elastic


def normalized_grids(stacks, widths):
    @jax.jit
    def coords(widths):
        raw = {stack.name: coordinates.raw_coordinates(stack, widths) for stack in stacks}
        return {stack.name: coordinates.normalize(raw[stack.name], stack.norm) for stack in stacks}

    return {name: full_grid(entries) for name, entries in coords(widths).items()}


def test_normalised_coordinates_are_those_of_the_papers():
    stacks = stacks_of()
    grids = normalized_grids(stacks, WIDTHS)
    n, norm = 4 * len(BLOCKS), 8
    for (position, layer, kind), (stack, row) in tensors_of(stacks).items():
        i = 4 * position + 2 * LAYERS.index(layer) + KINDS.index(kind)
        stream, hidden = SPEC.blocks[BLOCKS[position]].in_width, int(WIDTHS[position])
        c_out, c_in = (hidden, stream) if layer == "conv1" else (stream, hidden)
        c_in = 1 if kind == "bias" else c_in
        for o, c in itertools.product(range(c_out), range(c_in)):
            wanted = (i / n, o / c_out, c / c_in, n / norm, c_out / norm, c_in / norm)
            np.testing.assert_allclose(grids[stack.name][row][o, c], wanted, rtol=1e-6)


def test_the_grid_stays_separable_without_noise():
    for stack in stacks_of():
        coords = jax.eval_shape(lambda w, s=stack: coordinates.raw_coordinates(s, w), WIDTHS)
        assert coords.shape == stack.shape[:3]
        varying = [tuple(np.array(entry.shape) > 1) for entry in coords.entries]
        assert not any(rows and columns for _, rows, columns in varying)
        assert sum(entry.size for entry in coords.entries) < 30


def test_a_width_of_zero_has_finite_coordinates():
    grids = normalized_grids(stacks_of(), np.zeros(len(BLOCKS), int))
    assert all(np.isfinite(grid).all() for grid in grids.values())


def large_grid():
    _, rows, columns = np.ogrid[:1.0, :40.0, :50.0]
    one = np.ones((2, 1, 1), np.float32)
    entries = (one, rows, columns, 92 * one, 40 * one, 50 * one)
    return Coordinates.of(entry.astype(np.float32) for entry in entries)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_noise_per_query_moves_every_entry_of_every_query_by_up_to_half_a_channel(scale):
    coords = large_grid()
    noisy = coordinates.add_noise(jax.random.key(0), coords, scale=scale)
    assert all(entry.shape == (2, 40, 50) for entry in noisy.entries)
    noise = (full_grid(noisy) - full_grid(coords)) / scale
    assert np.abs(noise).max() == pytest.approx(0.49, abs=1e-4)  # clipped, and often enough reached
    assert np.abs(noise.mean((0, 1, 2))).max() < 0.03
    np.testing.assert_allclose(noise.std((0, 1, 2)), 12**-0.5, rtol=0.05)
    correlation = np.corrcoef(noise.reshape(-1, 6).T) - np.eye(6)
    assert np.abs(correlation).max() < 0.08  # five standard deviations


def test_noise_per_channel_moves_each_channel_as_a_whole():
    coords = large_grid()
    noisy = coordinates.add_noise(jax.random.key(0), coords, per="channel")
    assert [x.shape for x in noisy.entries] == [x.shape for x in coords.entries]
    for entry, original in zip(noisy.entries, coords.entries, strict=True):
        moved = np.abs(np.asarray(entry) - original)
        assert moved.max() <= 0.4901
        assert len(np.unique(moved)) > 0.85 * moved.size  # few are clipped, none shared
    with refused("'tensor'"):
        coordinates.add_noise(jax.random.key(0), coords, per="tensor")


def reference_features(x, num_frequencies):
    """In float64, where 2^f x is exact and small enough for an accurate sine."""
    x = np.asarray(x, np.float64)[..., None]
    angles = np.pi * np.fmod(x * 2.0 ** np.arange(num_frequencies), 2.0)
    return np.concatenate([x, np.sin(angles), np.cos(angles)], axis=-1)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_fourier_features_are_those_of_float64(transform):
    features = transform(lambda x: coordinates.fourier_features(x, 16))
    x = [np.arange(-width, 2 * width) / width for width in (3, 37, 48, 64, 92)]
    x = np.concatenate(x).astype(np.float32)
    np.testing.assert_allclose(features(x), reference_features(x, 16), rtol=0, atol=5e-7)
    assert coordinates.fourier_features(x[:, None], 0).shape == (*x.shape, 1, 1)


def test_fourier_features_of_dyadic_coordinates_vanish_exactly_at_all_high_frequencies():
    x = jnp.arange(128, dtype=jnp.float32) / 64
    features = np.asarray(coordinates.fourier_features(x, 32))
    np.testing.assert_array_equal(features[:, 1 + 7 : 33], 0.0)  # whole turns
    np.testing.assert_array_equal(features[:, 33 + 7 :], 1.0)
    np.testing.assert_allclose(features, reference_features(x, 32), rtol=0, atol=5e-7)
