"""Order, augmentation, mixing and normalisation of images."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import refused

from neumeta_jax.data import datasets, preprocessing


def test_epoch_order_is_a_permutation_that_depends_on_key_and_epoch_alone():
    order = jax.jit(preprocessing.epoch_order, static_argnums=2)
    key = jax.random.key(0)
    first = order(key, 0, 101)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(jnp.sort(first), np.arange(101))
    np.testing.assert_array_equal(first, preprocessing.epoch_order(key, jnp.asarray(0), 101))
    others = [order(key, 1, 101), order(jax.random.key(1), 0, 101)]
    assert all((first != other).any() for other in others)


augment = jax.jit(preprocessing.augment, static_argnames=("crop_padding", "flip"))


def distinct_images(num, height, width):
    return np.random.default_rng(0).integers(1, 256, (num, height, width, 3), np.uint8)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (2, False), (2, True)])
def test_augment_returns_all_shifted_and_mirrored_images_and_no_others(padding, flip):
    images = distinct_images(1000, 5, 7)
    result = augment(jax.random.key(1), images, crop_padding=padding, flip=flip)
    assert result.dtype == jnp.uint8
    again, other = (
        augment(jax.random.key(seed), images, crop_padding=padding, flip=flip) for seed in (1, 2)
    )
    np.testing.assert_array_equal(result, again)
    assert (result != other).any() == (padding > 0 or flip)
    padded = np.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    places = np.ndindex(2 * padding + 1, 2 * padding + 1)
    ways = [padded[:, top : top + 5, left : left + 7] for top, left in places]
    ways += [way[:, :, ::-1] for way in ways] if flip else []
    matches = np.array([(way == result).all((1, 2, 3)) for way in ways])
    assert (matches.sum(0) == 1).all()
    # Uniform: each count is binomial; six standard deviations.
    expected = 1000 / len(ways)
    assert matches.sum(1).min() > 0
    assert np.abs(matches.sum(1) - expected).max() < 6 * math.sqrt(expected)


def test_augment_refuses_what_it_cannot_crop():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    for found, padding, word in [
        (images.astype(np.float32), 1, "float32"),
        (images[0], 1, "[4, 4, 3]"),
        (images, -1, "crop_padding=-1"),
    ]:
        with refused("got", word):
            augment(jax.random.key(0), found, crop_padding=padding, flip=True)


def test_normalize_is_its_formula_for_as_many_channels_as_it_has_means():
    images = distinct_images(3, 4, 4)
    mean, std = datasets.NORMALIZATION["cifar100"]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        result = jax.jit(lambda images: preprocessing.normalize(images, mean, std))(images)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    with refused("channel_statistics", "3 channels", "got 1 and 1"):
        preprocessing.normalize(images, (0.5,), (0.5,))
    for scaled in (images / 255, np.float32(images)):
        with refused("takes uint8 pixels from 0 to 255", f"got {scaled.dtype}"):
            preprocessing.normalize(scaled, mean, std)


mix = jax.jit(preprocessing.mix, static_argnames=("mixup", "cutmix"))


def numbered(batch=64, size=16):
    """Image n and target n are n everywhere, so that what is mixed says of what it is made."""
    images = jnp.broadcast_to(
        jnp.arange(batch, dtype=jnp.float32)[:, None, None, None], (batch, size, size, 3)
    )
    return images, jnp.eye(batch)


def test_mixup_has_one_share_of_the_image_before_and_the_same_share_of_its_target():
    images, targets = numbered()
    x, y = (np.asarray(a) for a in mix(jax.random.key(0), images, targets, mixup=1.0, cutmix=0.0))
    assert np.ptp(x, axis=(1, 2, 3)).max() < 1e-5  # one share for the whole image
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(x[:, 0, 0, 0], y @ np.arange(len(y)), rtol=1e-4, atol=1e-4)
    rest = np.diag(y)
    np.testing.assert_allclose(1 - rest, np.diag(np.roll(y, 1, axis=1)), atol=1e-6)
    assert rest.min() < 0.1 and rest.max() > 0.9 and 0.4 < rest.mean() < 0.6


def test_cutmix_has_a_box_of_the_image_before_and_its_area_of_the_target():
    images, targets = numbered()
    x, y = (np.asarray(a) for a in mix(jax.random.key(1), images, targets, mixup=0.0, cutmix=1.0))
    other = x[..., 0] != np.arange(len(y))[:, None, None]
    for n, box in enumerate(other):
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert set(np.unique(x[n])) <= {n, (n - 1) % len(y)}
        assert box.sum() == len(rows) * len(columns)  # a box, without holes
        for edge in (rows, columns):
            assert len(edge) == 0 or np.ptp(edge) == len(edge) - 1
        np.testing.assert_allclose(y[n, n], 1 - box.mean(), atol=1e-6)
        np.testing.assert_allclose(y[n, n - 1], box.mean(), atol=1e-6)
    assert other.mean(axis=(1, 2)).min() < 0.1 and other.mean(axis=(1, 2)).max() > 0.5


def test_images_are_mixed_in_the_shares_asked_for():
    images, targets = numbered(batch=4096, size=4)
    x, _ = mix(jax.random.key(2), images, targets[:, :1], mixup=0.25, cutmix=0.0)
    changed = np.asarray((x != images).any(axis=(1, 2, 3)))
    assert 0.22 < changed.mean() < 0.28
    same = mix(jax.random.key(2), images, targets[:, :1], mixup=0.0, cutmix=0.0)
    chex.assert_trees_all_equal(same, (images, targets[:, :1]))
