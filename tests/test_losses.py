"""Losses against their formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax.core import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 5), scale=3)
TEACHER = RNG.normal(size=(6, 5), scale=3)
LABELS = RNG.integers(0, 5, 6)


def random_tensors(seed):
    """Kernels and biases by path."""
    rng = np.random.default_rng(seed)
    shapes = {"first/kernel": (3, 3, 2, 4), "first/bias": (4,), "second/kernel": (3, 3, 4, 2)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def softmax(logits):
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(-1, keepdims=True)


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
    tensors = random_tensors(1)
    expected = sum(np.linalg.norm(tensor) for tensor in tensors.values())
    assert losses.weight_norm(tensors) == pytest.approx(expected, rel=1e-6)


def test_weight_norm_weighs_tensors():
    tensors = random_tensors(1)
    active = dict(zip(tensors, (0.0, 0.0, 0.5), strict=True))
    expected = 0.5 * np.linalg.norm(tensors["second/kernel"])
    assert losses.weight_norm(tensors, active) == pytest.approx(expected, rel=1e-6)
    gradient = jax.jit(jax.grad(losses.weight_norm))(tensors, active)
    assert [path for path, leaf in gradient.items() if leaf.any()] == ["second/kernel"]


def test_gradients_are_finite_at_zero_weights():
    tensors = random_tensors(1)
    assert finite(jax.jit(jax.grad(losses.weight_norm))(zeros(tensors)))
    for relative in (False, True):
        gradient = jax.jit(jax.grad(functools.partial(losses.reconstruction, relative=relative)))
        assert finite(gradient(zeros(tensors), tensors))
        # A tensor that is zero on both sides, as where a block is masked.
        gradients = gradient(zeros(tensors), zeros(tensors))
        assert not any(leaf.any() for leaf in gradients.values())


def test_reconstruction_is_the_mean_squared_error_over_all_weights():
    tensors, teacher = random_tensors(1), random_tensors(2)
    difference = np.concatenate([(tensors[path] - teacher[path]).ravel() for path in tensors])
    expected = np.mean(difference**2)
    assert losses.reconstruction(tensors, teacher) == pytest.approx(expected, rel=1e-5)


def test_relative_reconstruction_is_the_mean_over_tensors_of_the_unexplained_part():
    tensors, teacher = random_tensors(1), random_tensors(2)
    pairs = [(tensors[path], teacher[path]) for path in tensors]
    expected = np.mean([np.sum((x - y) ** 2) / np.sum(y**2) for x, y in pairs])
    actual = losses.reconstruction(tensors, teacher, relative=True)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_reconstruction_is_zero_at_the_target_and_relatively_one_at_zero():
    teacher = random_tensors(2)
    assert losses.reconstruction(teacher, teacher) == 0
    assert losses.reconstruction(teacher, teacher, relative=True) == 0
    nothing = losses.reconstruction(zeros(teacher), teacher, relative=True)
    assert nothing == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_reconstruction_leaves_inactive_tensors_out_and_what_is_not_generated(relative):
    tensors, teacher = random_tensors(1), random_tensors(2)
    active = dict(zip(tensors, (0.0, 0.0, 1.0), strict=True))
    alone = {"second/kernel": tensors["second/kernel"]}
    expected = float(losses.reconstruction(alone, teacher, relative=relative))
    actual = losses.reconstruction(tensors, teacher, active, relative=relative)
    assert actual == pytest.approx(expected, rel=1e-6)
    none = losses.reconstruction(tensors, teacher, dict.fromkeys(active, 0.0), relative=relative)
    assert none == 0
