"""Smaller networks whose products are solved anew, and the terms of an INR that begin there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_networks import CASES, draw

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import PerTensorMLP, Projection
from neumeta_jax.core.start import fill_terms, fit_target
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec

X = np.random.default_rng(0).normal(size=(2000, 6)).astype(np.float32)
SPEC = resnet_spec(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8, channels=2)
IMAGES = np.random.default_rng(1).normal(size=(40, 8, 8, 2)).astype(np.float32)


def twins(transposed=False):
    """Layers whose hidden channels are alike in pairs, so that half of them are enough."""
    params = draw({"a": (6, 4), "b": (4,), "c": (8, 3), "d": (3,)})
    order = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    params = {**params, "a": params["a"][:, order], "b": params["b"][order]}
    if transposed:
        params["c"] = params["c"].T

    def apply(params, x):
        hidden = jnp.maximum(x @ params["a"] + params["b"], 0)
        return hidden @ (params["c"].T if transposed else params["c"]) + params["d"]

    return apply, params


def refitted(apply, params, width, x=X, **options):
    """(family, widths, small, refitted) of one elastic group."""
    family = elastic.trace(apply, params, x[:2], check=False)
    (name,) = family.groups.elastic()
    small = elastic.mask_params(family.groups, params, {name: width})
    return (
        family,
        {name: width},
        small,
        elastic.refit(family, params, small, {name: width}, x, **options),
    )


def error(apply, params, tree, x=X):
    """The part of the full network's outputs that the small one does not have."""
    wanted = apply(params, x)
    return float(jnp.sum((apply(tree, x) - wanted) ** 2) / jnp.sum((wanted - wanted.mean(0)) ** 2))


@pytest.mark.parametrize("options", [{}, {"transposed": True}], ids=str)
def test_channels_that_others_can_stand_for_cost_nothing(options):
    apply, params = twins(**options)
    _, _, small, found = refitted(apply, params, 4, ridge=1e-8)
    assert error(apply, params, small) > 0.1
    assert error(apply, params, found) < 1e-3


def test_a_bias_that_is_subtracted_is_moved_the_other_way():
    def apply(params, x):
        return jnp.maximum(x @ params["a"], 0) @ params["c"] - params["d"]

    params = draw({"a": (6, 8), "c": (8, 3), "d": (3,)})
    _, _, small, found = refitted(apply, params, 4)
    gaps = [np.mean(apply(tree, X) - apply(params, X), axis=0) for tree in (small, found)]
    assert np.abs(gaps[1]).max() < 0.02 * np.abs(gaps[0]).max()
    assert np.abs(found["d"] - small["d"]).max() > 0.01


def test_the_solution_is_that_of_the_normal_equations():
    apply, params = twins()
    params = {**params, "a": params["a"].at[:, 4:].multiply(jnp.arange(4) - 1.5)}
    _, _, small, found = refitted(apply, params, 4, ridge=0.05)
    hidden = np.maximum(X @ small["a"] + small["b"], 0)[:, :4]
    rows = np.concatenate([hidden, np.ones((2000, 1))], axis=1).astype(np.float64)
    gram, rest = rows.T @ rows, np.asarray(apply(params, X) - apply(small, X))
    load = np.diag(gram).copy()
    # Channels that are gone count as zeros in the mean that keeps the equations solvable.
    load = 0.05 * load + 1e-6 * np.sum(load) / 9
    solution = np.linalg.solve(gram + np.diag(load), rows.T @ rest)
    np.testing.assert_allclose(found["c"][:4] - small["c"][:4], solution[:4], atol=1e-4)
    np.testing.assert_allclose(found["d"] - small["d"], solution[4], atol=1e-4)


def test_a_network_that_has_lost_nothing_stays_as_it_is():
    apply, params = twins()
    _, _, _, found = refitted(apply, params, 8)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_what_is_used_twice_stays_as_it_is():
    def apply(params, x):
        hidden = jnp.maximum(x @ params["a"], 0)
        return hidden @ params["c"], 2 * hidden @ params["c"]

    params = draw({"a": (6, 8), "c": (8, 3)})
    _, _, small, found = refitted(apply, params, 4)
    jax.tree.map(np.testing.assert_array_equal, found, small)


def test_a_residual_stream_is_met_as_a_sum():
    """What an earlier branch has left undone, a later one that adds to it makes up for."""

    def apply(params, x):
        x = x + jnp.maximum(x @ params["a"], 0) @ params["b"]
        return x + jnp.maximum(x, 0) @ params["c"]

    params = draw({"a": (6, 8), "b": (8, 6), "c": (6, 6)})
    _, _, small, found = refitted(apply, params, 1)
    alone = {**found, "c": small["c"]}
    assert error(apply, params, found) < 0.9 * error(apply, params, alone)
    assert not np.array_equal(found["c"], params["c"])
    assert error(apply, params, found) < 0.5 * error(apply, params, small)


@pytest.mark.parametrize("name", ["shuffle", "nnx", "haiku_rnn", "equinox"])
def test_networks_of_every_kind_come_closer_and_stay_small(name):
    case = CASES[name]()
    family = elastic.trace(case.apply, case.params, case.x, check=False)
    names = family.groups.elastic(*case.allowed)
    widths = {n: max(1, family.groups[n].size * 5 // 8) for n in names}
    small = elastic.mask_params(family.groups, case.params, widths)
    found = elastic.refit(family, case.params, small, widths, case.x, batch_size=len(case.x))
    masked = elastic.mask_params(family.groups, found, widths)
    jax.tree.map(np.testing.assert_array_equal, found, masked)

    def distance(tree):
        pairs = (case.apply(tree, case.x), case.apply(case.params, case.x))
        return sum(
            float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, pairs), strict=True)
        )

    assert distance(found) < 0.5 * distance(small)


def test_fewer_inputs_than_a_batch_are_one_batch_and_none_are_refused():
    apply, params = twins()
    _, _, _, found = refitted(apply, params, 4, X[:60])
    _, _, _, wanted = refitted(apply, params, 4, X[:60], batch_size=60)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    family = elastic.trace(apply, params, X[:2], check=False)
    with pytest.raises(ValueError, match="needs inputs, a few hundred or more, got none"):
        elastic.refit(family, params, params, {"a": 4}, X[:0])
    with pytest.raises(ValueError, match="a takes widths from 1 to 8, got 9"):
        elastic.refit(family, params, params, {"a": 9}, X)


# --- the terms of an INR ---------------------------------------------------------------------


@functools.cache
def filled():
    """(family, parameters before, after, the full network) of a small ResNet."""
    inr = Projection(width_terms=(0.5,), depth_term=True)
    family = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC, "all"), inr)
    backbone = cifar_resnet.init_params(jax.random.key(0), SPEC)
    params = hyper.init(jax.random.key(1), family, backbone, alpha=0.8)
    given = family, family.network.family, params, backbone, IMAGES
    return family, params, fill_terms(*given, batch_size=20), backbone


def test_terms_start_at_networks_that_follow_the_full_one():
    family, before, params, backbone = filled()
    full = jnp.asarray(family.full_widths)
    exact = [hyper.generate(family, tree, full) for tree in (before, params)]
    jax.tree.map(np.testing.assert_array_equal, *exact)

    def logits(tree):
        return cifar_resnet.apply(SPEC, tree, IMAGES)

    wanted = logits(backbone)
    shallow = np.array([w * (n not in (1, 3, 5)) for n, w in enumerate(family.full_widths)])
    for widths in (family.widths(0.5), family.widths(0.75), shallow):
        trees = [hyper.generate(family, tree, jnp.asarray(widths)) for tree in (before, params)]
        far, near = (float(jnp.sum((logits(tree) - wanted) ** 2)) for tree in trees)
        assert near < 0.6 * far, widths


def test_the_network_of_a_term_is_the_refitted_one():
    family, before, params, backbone = filled()
    widths = family.widths(0.5)
    small = hyper.generate(family, before, jnp.asarray(widths))
    at = family.by_name(widths.tolist())
    given = family.network.family, backbone, small, at, IMAGES
    wanted = elastic.refit(*given, batch_size=20)
    found = hyper.generate(family, params, jnp.asarray(widths))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_a_fit_aims_at_networks_whose_generated_tensors_are_refitted():
    mlp = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC, "all"), PerTensorMLP())
    backbone, traced = cifar_resnet.init_params(jax.random.key(0), SPEC), mlp.network.family
    inr, widths = Projection(width_terms=(0.5,)), mlp.widths(0.5)
    target = fit_target(mlp, inr, traced, backbone, IMAGES)
    closed = dataclasses.replace(mlp, inr=inr)
    values = mlp.groups.leaves(backbone)
    full = hyper.generate_tensors(closed, target, jnp.asarray(mlp.full_widths))
    jax.tree.map(np.testing.assert_array_equal, full, {path: values[path] for path in mlp.owners})

    at = mlp.by_name(widths.tolist())
    small = elastic.mask_params(mlp.groups, backbone, at)
    wanted = elastic.refit(traced, backbone, small, at, IMAGES, paths=mlp.owners)
    for path, found in hyper.generate_tensors(closed, target, jnp.asarray(widths)).items():
        np.testing.assert_allclose(found, mlp.groups.leaves(wanted)[path], atol=1e-5)
    rest = [path for path in values if path not in mlp.owners]
    assert rest and all((mlp.groups.leaves(wanted)[path] == values[path]).all() for path in rest)


def test_layers_of_layers_are_refitted_like_layers():
    shapes = {"up": (2, 2, 4, 6), "b": (2, 2, 6), "down": (2, 2, 6, 4)}
    layers = {name: np.asarray(leaf) for name, leaf in draw(shapes).items()}
    flat = {name: leaf.reshape(4, *leaf.shape[2:]) for name, leaf in layers.items()}

    def layer(h, q):
        return h + jax.nn.gelu(h @ q["up"] + q["b"]) @ q["down"], None

    def once(params, x):
        return jax.lax.scan(layer, x[:, :4], params)[0]

    def twice(params, x):
        return jax.lax.scan(lambda h, q: (jax.lax.scan(layer, h, q)[0], None), x[:, :4], params)[0]

    _, _, small, wanted = refitted(once, flat, 3)
    _, _, _, found = refitted(twice, layers, 3)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf.reshape(wanted[name].shape), wanted[name], atol=1e-5)
    assert error(once, flat, wanted) < 0.8 * error(once, flat, small)
