"""Coordinates against the papers' formulas, written as loops and in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import refused

from neumeta_jax.architecture import cifar_resnet, generated_blocks, morph
from neumeta_jax.core import coordinates
from neumeta_jax.core.coordinates import KINDS, LAYERS, Coordinates

SPEC = cifar_resnet(20, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
BLOCKS = generated_blocks(SPEC)
WIDTHS = np.array([3, 4, 1, 6, 5])


def full_grid(coords):
    """float[tensors, rows, columns, 6]."""
    return np.stack([np.broadcast_to(entry, coords.shape) for entry in coords], axis=-1)


def tensors_of(groups):
    """The group and row of every generated tensor by (position, layer, kind)."""
    return {
        (position, group.layer, group.kind): (group, row)
        for group in groups
        for row, position in enumerate(group.positions)
    }


def test_the_papers_resnet56_has_92_tensors_in_12_groups():
    spec = cifar_resnet(56, num_classes=100)
    groups = coordinates.tensor_groups(spec, generated_blocks(spec))
    assert len(groups) == len({group.name for group in groups}) == 12
    assert sum(len(group.positions) for group in groups) == 92
    assert {group.num_tensors for group in groups} == {92}
    assert {group.norm for group in groups} == {64}


@pytest.mark.parametrize("which", ["inner", "not_first", "all"])
@pytest.mark.parametrize("stage_widths", [(4, 6, 8), (4, 4, 4), (8, 6, 4)])
def test_every_tensor_has_its_own_index_in_training_order_and_its_shape(stage_widths, which):
    spec = cifar_resnet(20, num_classes=5, stage_widths=stage_widths, image_size=8)
    blocks = generated_blocks(spec, which)
    groups = coordinates.tensor_groups(spec, blocks)
    tensors = tensors_of(groups)
    in_order = list(itertools.product(range(len(blocks)), LAYERS, KINDS))
    assert [tensors[t][0].indices[tensors[t][1]] for t in in_order] == list(range(len(in_order)))
    assert len(tensors) == sum(len(group.positions) for group in groups)  # none comes twice
    assert len({group.name for group in groups}) == len(groups)
    for (position, layer, kind), (group, _) in tensors.items():
        block = spec.blocks[blocks[position]]
        rows, columns = {
            "conv1": (block.hidden_width, block.in_width),
            "conv2": (block.out_width, block.hidden_width),
        }[layer]
        wanted = (rows, columns, 9) if kind == "kernel" else (rows, 1, 1)
        assert (group.rows, group.columns, group.num_outputs) == wanted


def test_a_tensor_keeps_its_index_at_every_width():
    full, narrow = (
        [
            (group.name, group.positions, group.indices)
            for group in coordinates.tensor_groups(spec, BLOCKS)
        ]
        for spec in (SPEC, morph(SPEC, BLOCKS, WIDTHS))
    )
    assert full == narrow


def normalized_grids(groups, widths):
    @jax.jit
    def coords(widths):
        raw = {group.name: coordinates.raw_coordinates(group, widths) for group in groups}
        return {group.name: coordinates.normalize(raw[group.name], group.norm) for group in groups}

    return {name: full_grid(entries) for name, entries in coords(widths).items()}


def test_normalised_coordinates_are_those_of_the_papers():
    groups = coordinates.tensor_groups(SPEC, BLOCKS)
    grids = normalized_grids(groups, WIDTHS)
    n, norm = 4 * len(BLOCKS), 8
    for (position, layer, kind), (group, row) in tensors_of(groups).items():
        i = 4 * position + 2 * LAYERS.index(layer) + KINDS.index(kind)
        stream, hidden = SPEC.blocks[BLOCKS[position]].in_width, int(WIDTHS[position])
        c_out, c_in = (hidden, stream) if layer == "conv1" else (stream, hidden)
        c_in = 1 if kind == "bias" else c_in
        for o, c in itertools.product(range(c_out), range(c_in)):
            wanted = (i / n, o / c_out, c / c_in, n / norm, c_out / norm, c_in / norm)
            np.testing.assert_allclose(grids[group.name][row][o, c], wanted, rtol=1e-6)


def test_the_grid_stays_separable_without_noise():
    for group in coordinates.tensor_groups(SPEC, BLOCKS):
        coords = jax.eval_shape(lambda w, g=group: coordinates.raw_coordinates(g, w), WIDTHS)
        assert coords.shape == (len(group.positions), group.rows, group.columns)
        varying = [tuple(np.array(entry.shape) > 1) for entry in coords]
        assert not any(rows and columns for _, rows, columns in varying)
        assert sum(entry.size for entry in coords) < 30


def test_a_width_of_zero_has_finite_coordinates():
    grids = normalized_grids(coordinates.tensor_groups(SPEC, BLOCKS), np.zeros(len(BLOCKS), int))
    assert all(np.isfinite(grid).all() for grid in grids.values())


def large_grid():
    _, rows, columns = np.ogrid[:1.0, :40.0, :50.0]
    one = np.ones((2, 1, 1), np.float32)
    entries = (one, rows, columns, 92 * one, 40 * one, 50 * one)
    return Coordinates(*(entry.astype(np.float32) for entry in entries))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_noise_per_query_moves_every_entry_of_every_query_by_up_to_half_a_channel(scale):
    coords = large_grid()
    noisy = coordinates.add_noise(jax.random.key(0), coords, scale=scale)
    assert all(entry.shape == (2, 40, 50) for entry in noisy)
    noise = (full_grid(noisy) - full_grid(coords)) / scale
    assert np.abs(noise).max() == pytest.approx(0.49, abs=1e-4)  # clipped, and often enough reached
    assert np.abs(noise.mean((0, 1, 2))).max() < 0.03
    np.testing.assert_allclose(noise.std((0, 1, 2)), 12**-0.5, rtol=0.05)
    correlation = np.corrcoef(noise.reshape(-1, 6).T) - np.eye(6)
    assert np.abs(correlation).max() < 0.08  # five standard deviations


def test_noise_per_channel_moves_each_channel_as_a_whole():
    coords = large_grid()
    noisy = coordinates.add_noise(jax.random.key(0), coords, per="channel")
    assert [entry.shape for entry in noisy] == [entry.shape for entry in coords]
    for entry, original in zip(noisy, coords, strict=True):
        moved = np.abs(np.asarray(entry) - original)
        assert moved.max() <= 0.4901
        assert len(np.unique(moved)) > 0.85 * moved.size  # few are clipped, none shared


def test_unknown_noise_is_refused():
    with refused("'tensor'"):
        coordinates.add_noise(jax.random.key(0), large_grid(), per="tensor")


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


def test_fourier_features_have_the_phases_of_the_rational_they_encode():
    """Up to f = 15 the rounding of x = o/C to float32 moves a phase by at most 2^-9 turns."""
    exact = np.arange(48) / 48
    features = coordinates.fourier_features(jnp.asarray(exact, jnp.float32), 16)
    error = np.abs(features - reference_features(exact, 16)).reshape(48, -1)[:, 1:].max(0)
    assert (error < np.pi * 2.0 ** (np.tile(np.arange(16), 2) - 25) + 5e-7).all()


def test_fourier_features_of_dyadic_coordinates_vanish_exactly_at_all_high_frequencies():
    x = jnp.arange(128, dtype=jnp.float32) / 64
    features = np.asarray(coordinates.fourier_features(x, 32))
    np.testing.assert_array_equal(features[:, 1 + 7 : 33], 0.0)  # whole turns
    np.testing.assert_array_equal(features[:, 33 + 7 :], 1.0)
    np.testing.assert_allclose(features, reference_features(x, 32), rtol=0, atol=5e-7)


def test_fourier_features_keep_the_coordinate_itself_and_the_shape():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 1)), jnp.float32)
    assert coordinates.fourier_features(x, 0).shape == (2, 3, 1, 1)
    features = coordinates.fourier_features(x, 5)
    assert features.shape == (2, 3, 1, 11)
    np.testing.assert_array_equal(features[..., 0], x)
