"""Losses against their formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 5), scale=3)
TEACHER = RNG.normal(size=(6, 5), scale=3)
LABELS = RNG.integers(0, 5, 6)


def random_blocks(seed):
    rng = np.random.default_rng(seed)

    def conv(rows, columns):
        kernel = rng.normal(size=(3, 3, columns, rows))
        return {
            "kernel": kernel.astype(np.float32),
            "bias": rng.normal(size=rows).astype(np.float32),
        }

    return {name: {"conv1": conv(4, 2), "conv2": conv(2, 4)} for name in ("first", "second")}


def softmax(logits):
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(-1, keepdims=True)


def tensors(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def zeros(tree):
    return jax.tree.map(np.zeros_like, tree)


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_cross_entropy_is_the_mean_negative_log_probability_of_the_label():
    expected = -np.log(softmax(LOGITS)[np.arange(6), LABELS]).mean()
    assert losses.cross_entropy(jnp.asarray(LOGITS), LABELS) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_scaled_divergence_from_the_teacher(temperature):
    student, teacher = softmax(LOGITS / temperature), softmax(TEACHER / temperature)
    expected = temperature**2 * (teacher * np.log(teacher / student)).sum(-1).mean()
    actual = losses.distillation(jnp.asarray(LOGITS), TEACHER, temperature=temperature)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_distillation_from_equal_logits_is_zero_up_to_a_shift_of_logits():
    assert losses.distillation(jnp.asarray(LOGITS), LOGITS, temperature=2) == 0
    assert losses.distillation(jnp.asarray(LOGITS + 3), LOGITS) == pytest.approx(0, abs=1e-6)


def test_distillation_sends_no_gradient_into_the_teacher():
    student, teacher = jax.jit(jax.grad(losses.distillation, argnums=(0, 1)))(LOGITS, TEACHER)
    assert not teacher.any()
    np.testing.assert_allclose(student, (softmax(LOGITS) - softmax(TEACHER)) / 6, atol=1e-6)


def test_distillation_stays_finite_for_extreme_logits():
    value, gradient = jax.jit(jax.value_and_grad(losses.distillation))(
        jnp.array([[1e4, -1e4]]), jnp.array([[-1e4, 1e4]])
    )
    assert value == pytest.approx(2e4)
    assert finite(gradient)


def test_weight_norm_sums_the_norms_of_the_tensors():
    blocks = random_blocks(1)
    expected = sum(np.linalg.norm(tensor) for tensor in tensors(blocks))
    assert losses.weight_norm(blocks) == pytest.approx(expected, rel=1e-6)


def test_weight_norm_weighs_blocks():
    blocks = random_blocks(1)
    active = {"first": jnp.float32(0.0), "second": jnp.float32(0.5)}
    expected = 0.5 * float(losses.weight_norm({"second": blocks["second"]}))
    assert losses.weight_norm(blocks, active) == pytest.approx(expected, rel=1e-6)
    gradient = jax.jit(jax.grad(losses.weight_norm))(blocks, active)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["first"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient["second"]))


def test_gradients_are_finite_at_zero_weights():
    blocks = random_blocks(1)
    assert finite(jax.jit(jax.grad(losses.weight_norm))(zeros(blocks)))
    for relative in (False, True):
        gradient = jax.jit(jax.grad(functools.partial(losses.reconstruction, relative=relative)))
        assert finite(gradient(zeros(blocks), blocks))
        # A tensor that is zero on both sides, as where a block is masked.
        gradients = gradient(zeros(blocks), zeros(blocks))
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_reconstruction_is_the_mean_squared_error_over_all_weights():
    blocks, teacher = random_blocks(1), random_blocks(2)
    difference = np.concatenate(
        [(x - y).ravel() for x, y in zip(tensors(blocks), tensors(teacher), strict=True)]
    )
    expected = np.mean(difference**2)
    assert losses.reconstruction(blocks, teacher) == pytest.approx(expected, rel=1e-5)


def test_relative_reconstruction_is_the_mean_over_tensors_of_the_unexplained_part():
    blocks, teacher = random_blocks(1), random_blocks(2)
    pairs = zip(tensors(blocks), tensors(teacher), strict=True)
    expected = np.mean([np.sum((x - y) ** 2) / np.sum(y**2) for x, y in pairs])
    actual = losses.reconstruction(blocks, teacher, relative=True)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_reconstruction_is_zero_at_the_target_and_relatively_one_at_zero():
    teacher = random_blocks(2)
    assert losses.reconstruction(teacher, teacher) == 0
    assert losses.reconstruction(teacher, teacher, relative=True) == 0
    nothing = losses.reconstruction(zeros(teacher), teacher, relative=True)
    assert nothing == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_reconstruction_leaves_inactive_blocks_out(relative):
    blocks, teacher = random_blocks(1), random_blocks(2)
    active = {"first": jnp.float32(0.0), "second": jnp.float32(1.0)}
    alone = {"second": blocks["second"]}
    expected = float(losses.reconstruction(alone, teacher, relative=relative))
    actual = losses.reconstruction(blocks, teacher, active, relative=relative)
    assert actual == pytest.approx(expected, rel=1e-6)
    none = losses.reconstruction(blocks, teacher, dict.fromkeys(active, 0.0), relative=relative)
    assert none == 0


def test_reconstruction_ignores_what_is_not_generated():
    blocks, teacher = random_blocks(1), random_blocks(2)
    shortcut = {"kernel": np.full((1, 1, 2, 2), 1e3), "bias": np.ones(2)}
    larger = {**teacher, "stem": shortcut, "first": {**teacher["first"], "shortcut": shortcut}}
    assert losses.reconstruction(blocks, larger) == losses.reconstruction(blocks, teacher)
