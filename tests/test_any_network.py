"""Hypernetworks, training, runs and counts of networks that are no ResNets of ours."""

import dataclasses
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import own_networks
import pytest
from builders import refused
from networks import ROOT, assert_refuses, load_module, run

import neumeta_jax as nm
from neumeta_jax import elastic
from neumeta_jax.commands import export, latency, search
from neumeta_jax.core import hypernetwork as hyper, inr
from neumeta_jax.elastic import counting, ordering
from neumeta_jax.export import safetensors as saved
from neumeta_jax.networks import families, linen
from neumeta_jax.runs import fitting


def largest(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / (1e-3 + jnp.max(jnp.abs(x)))) for x, y in pairs)


@pytest.fixture(scope="module", params=["vgg", "vit", "densenet", "nnx"])
def case(request):
    """(apply, params, x, the family, its elastic groups, their moments)."""
    apply, params, x, allowed = own_networks.CASES[request.param]()
    family = elastic.trace(apply, params, x, check=False)
    names = family.groups.elastic(*allowed)
    moments = jax.jit(lambda p, x: elastic.moments(family, p, x, names))(params, x)
    return apply, params, x, family, names, moments


KINDS = {
    "projection": inr.Projection(num_terms=2, modulated=True, depth_term=True, max_cell=2.0),
    "grid": inr.Grid(num_terms=2, noise_scale=1.0),
    "per_tensor_mlp": inr.PerTensorMLP(hidden_width=8, num_layers=2, num_frequencies=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_generates_networks_that_run_masked_and_dense(case, kind):
    apply, params, x, family, names, moments = case
    hypernetwork = nm.Hypernetwork(family.groups, names, KINDS[kind])

    @jax.jit
    def start(params, moments):
        return hyper.init(jax.random.key(0), hypernetwork, params, moments=moments)

    inr_params = start(params, moments)
    generate = jax.jit(lambda p, w, key: hyper.generate(hypernetwork, p, w, key=key))
    full = generate(inr_params, jnp.array(hypernetwork.full_widths), None)
    chex.assert_trees_all_equal_structs(full, params)
    if kind != "per_tensor_mlp":  # those have no closed form
        assert largest(params, full) < 1e-5
    widths = hypernetwork.widths(0.5)
    half = generate(inr_params, jnp.asarray(widths), None)
    at = hypernetwork.by_name(widths.tolist())
    assert largest(half, elastic.mask_params(family.groups, half, at)) == 0

    @jax.jit
    def dense(tree):
        return elastic.apply_at(family, elastic.slice_params(family.groups, tree, at), x, at)

    assert largest(jax.jit(apply)(half, x), dense(half)) < 1e-4
    noisy = generate(inr_params, jnp.asarray(widths), jax.random.key(3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(noisy))
    assert generate._cache_size() == 2  # one program for all widths, one with noise


def test_projections_beyond_the_full_size_leave_the_function_as_it_is(case):
    apply, params, x, family, names, moments = case
    hypernetwork = nm.Hypernetwork(family.groups, names, inr.Projection())
    inr_params = hyper.init(jax.random.key(0), hypernetwork, params, moments=moments)
    sizes = [3 * width // 2 for width in hypernetwork.full_widths]
    wide = hyper.generate(hypernetwork, inr_params, np.array(sizes), sizes=sizes)
    ours = elastic.apply_at(family, wide, x, hypernetwork.by_name(sizes))
    assert largest(jax.jit(apply)(params, x), ours) < 1e-5


def test_orders_leave_the_function_and_counts_are_those_of_the_groups(case):
    apply, params, x, family, names, moments = case
    important, _ = ordering.by_importance(family.groups, params, moments)
    smooth, orders = ordering.smooth(family.groups, params)
    assert {*orders} >= {*names}
    for ordered in (important, smooth):
        assert largest(jax.jit(apply)(params, x), jax.jit(apply)(ordered, x)) < 1e-5
    rng, groups = np.random.default_rng(0), family.groups
    rows = [[int(rng.integers(groups[n].lowest, groups[n].size + 1)) for n in names] for _ in "abc"]
    of_params = counting.params_count(groups, names)
    of_macs = counting.macs_count(family, names)
    at = [dict(zip(names, row, strict=True)) for row in rows]
    assert [of_params(row) for row in rows] == [elastic.num_params(groups, w) for w in at]
    assert [of_macs(row) for row in rows] == [elastic.num_macs(family, w) for w in at]
    assert of_macs(np.array(rows)).tolist() == [of_macs(row) for row in rows]


def test_arrays_of_numpy_are_cut_by_numpy():
    params = {"first": np.eye(3, 8, dtype=np.float32), "second": np.eye(8, 2, dtype=np.float32)}
    family = elastic.trace(
        lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"], params, jnp.ones((2, 3))
    )
    (name,) = family.groups.elastic()
    small = elastic.slice_params(family.groups, params, {name: 4})
    assert [type(leaf) for leaf in small.values()] == [np.ndarray, np.ndarray]
    np.testing.assert_array_equal(small["first"], params["first"][:, :4])
    np.testing.assert_array_equal(small["second"], params["second"][:4])


def test_variances_are_cut_and_not_generated():
    apply, params, x, _ = own_networks.CASES["vgg"]()
    groups = elastic.trace(apply, params, x, check=False).groups
    assert groups.frozen == tuple(path for path, _ in groups.tensors if path.endswith("/var"))
    hypernetwork = nm.Hypernetwork(groups, groups.elastic(), inr.Grid())
    assert not {*groups.frozen} & {*hypernetwork.owners}


@pytest.mark.parametrize("name, number", [("vgg", 3), ("mobilenet", 2), ("nnx", 1), ("unet", 0)])
def test_folding_moves_batch_norm_into_the_product_before_it(name, number):
    apply, params, x, _ = own_networks.CASES[name]()
    family = elastic.trace(apply, params, x, check=False)
    after, folded = elastic.fold(family, params)
    chex.assert_trees_all_equal_shapes(folded, params)
    assert largest(jax.jit(apply)(params, x), jax.jit(apply)(folded, x)) < 1e-6
    leaves = after.groups.leaves(folded)
    # That of a depthwise convolution, which mixes no channels, stays.
    means = [path for path in after.groups.frozen if "mean" in path.split("/")]
    assert len(means) == number
    assert all(not np.any(leaves[path]) for path in means)
    # A folded channel is its kernel and one bias: with both zero nothing is left of it.
    biases = {reader.path: reader.bias for reader in after.groups.readers if reader.bias}
    assert not {*biases.values()} & {*after.groups.frozen}


class Two(nn.Module):
    width: int = 12
    num_classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.num_classes)(x)


def test_fit_makes_small_networks_better_than_slices():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 256)
    x = (rng.normal(size=(3, 4, 4, 1))[labels] + rng.normal(size=(256, 4, 4, 1))).astype("float32")
    params = Two().init(jax.random.key(0), x)
    family = nm.trace(Two().apply, params, x[:2])
    names = family.groups.elastic()
    assert names == ("Dense_0", "Dense_1")
    hypernetwork = nm.Hypernetwork(family.groups, names, nm.make_inr("projection"))
    moments = jax.jit(lambda p, x: nm.moments(family, p, x, names))(params, x)
    inr_params = nm.init(jax.random.key(1), hypernetwork, params, moments=moments)
    changes = {"epochs": 20.0, "learning_rate": 1e-2, "distillation_weight": 0.0}  # of an untrained
    recipe = dataclasses.replace(fitting.RECIPE, **changes)
    losses = []
    trained = nm.fit(
        hypernetwork,
        family,
        inr_params,
        x,
        labels,
        recipe,
        after=lambda step, metrics: losses.append(metrics["loss"]),
    )
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]
    chex.assert_trees_all_equal_shapes(trained, inr_params)

    def accuracy(tree):
        return np.mean(Two().apply(tree, x).argmax(-1) == labels)

    third = {"Dense_0": 4, "Dense_1": 4}
    ours = accuracy(nm.generate(hypernetwork, trained, third))
    assert ours > 0.8 > accuracy(nm.mask_params(family.groups, params, third))


@pytest.mark.parametrize("kind, fit_steps", [("grid", 0), ("per_tensor_mlp", 3)])
def test_groups_join_the_training_one_at_a_time(kind, fit_steps):
    x = np.random.default_rng(0).normal(size=(64, 4, 4, 1)).astype(np.float32)
    params = Two().init(jax.random.key(0), x)
    family = nm.trace(Two().apply, params, x[:2], check=False)
    hypernetwork = nm.Hypernetwork(family.groups, family.groups.elastic(), KINDS[kind])
    inr_params = nm.init(jax.random.key(1), hypernetwork, params)
    steps = []
    recipe = dataclasses.replace(
        fitting.RECIPE,
        mode="blockwise",
        epochs=2.0,
        final_epochs=1.0,
        fit_steps=fit_steps,
        noise=True,
    )
    trained = nm.fit(
        *(hypernetwork, Two().apply, inr_params, x, np.arange(64) % 3, recipe),
        after=lambda step, metrics: steps.append(step),
    )
    assert steps[-1] == fit_steps + 2 + 2 + 1
    half = nm.generate(hypernetwork, trained, hypernetwork.widths(0.5))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(half))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), trained["inr"], inr_params["inr"])
    assert all(jax.tree.leaves(moved))


def test_stacked_layers_are_what_they_are_one_by_one():
    rng = np.random.default_rng(0)
    shapes = {"up": (6, 10), "b": (10,), "down": (10, 6), "c": (6,)}
    layers = [own_networks.draw(shapes, seed) for seed in range(3)]
    ends = own_networks.draw({"in": (4, 6), "out": (6, 3)})
    x = rng.normal(size=(200, 4)).astype(np.float32)

    def layer(h, q):
        return h + jax.nn.gelu(h @ q["up"] + q["b"]) @ q["down"] + q["c"]

    def scanned(p, x):
        start = jnp.tanh(x @ p["in"])
        end, _ = jax.lax.scan(lambda h, q: (layer(h, q), None), start, p["layers"], reverse=True)
        return end @ p["out"]

    def written(p, x):
        h = jnp.tanh(x @ p["in"])
        for q in p["layers"][::-1]:
            h = layer(h, q)
        return h @ p["out"]

    def family_of(apply, layers):
        """(groups, moments, tensors of the INR, logits at half the width, without it refitted)."""
        params = {**ends, "layers": layers}
        family = nm.trace(apply, params, x[:2])
        names = family.groups.elastic("stream")
        moments = jax.jit(lambda p, x: nm.moments(family, p, x, names))(params, x)
        hypernetwork = nm.Hypernetwork(family.groups, names, nm.make_inr("projection"))
        inr_params = nm.init(jax.random.key(0), hypernetwork, params, moments=moments)
        half = nm.generate(hypernetwork, inr_params, jnp.asarray(hypernetwork.widths(0.5)))
        tensors = sum(len(stack.paths) for stack in hypernetwork.stacks)
        widths = hypernetwork.by_name(hypernetwork.widths(0.5).tolist())
        small = nm.mask_params(family.groups, params, widths)
        refitted = nm.refit(family, params, small, widths, x)["layers"]
        return family.groups, jax.device_get(moments), tensors, apply(half, x), refitted

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    groups, measured, tensors, half, refitted = family_of(scanned, stacked)
    _, one_by_one, wanted_tensors, wanted_half, wanted = family_of(written, layers)
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *wanted)
    assert tensors == wanted_tensors and largest(wanted, refitted) < 1e-3
    assert largest(refitted, stacked) > 0.1
    assert largest(wanted_half, half) < 1e-4
    for name in ("up", "down"):
        wanted = np.stack([one_by_one[f"layers/{n}/{name}"] for n in range(3)])
        np.testing.assert_allclose(measured[f"layers/{name}"], wanted, rtol=2e-5, atol=1e-5)
    # Channels of all layers that have one number stay or go together, and their costs add up.
    orders = ordering.importance_orders(groups, {**ends, "layers": stacked}, measured)
    each = {str(n): measured["layers/down"][n] for n in range(3)}
    kernels = {str(n): np.asarray(layers[n]["down"]) for n in range(3)}
    np.testing.assert_array_equal(orders["layers/up"], ordering.importance_order(each, kernels))


def test_a_kind_without_a_closed_form_is_fitted_to_the_network_and_its_small_ones():
    x = np.random.default_rng(0).normal(size=(64, 4, 4, 1)).astype(np.float32)
    params = Two().init(jax.random.key(0), x)
    family = nm.trace(Two().apply, params, x[:2], check=False)
    kind = inr.PerTensorMLP(64, num_layers=2, num_frequencies=5, relative=False)
    hypernetwork = nm.Hypernetwork(family.groups, family.groups.elastic(), kind)
    inr_params = nm.init(jax.random.key(1), hypernetwork, params)
    recipe = dataclasses.replace(
        fitting.RECIPE,
        epochs=0.0,
        fit_steps=250,
        fit_learning_rate=1e-2,
        fit_widths="random",
        fit_target="projected",
        noise=False,
    )
    labels = np.arange(64) % 3
    fitted = nm.fit(hypernetwork, family, inr_params, x, labels, recipe, teacher=params)
    half = hypernetwork.widths(0.5)
    small = elastic.mask_params(family.groups, params, hypernetwork.by_name(half))
    refitted = elastic.refit(family, params, small, hypernetwork.by_name(half), x)
    for widths, wanted in ((hypernetwork.full_widths, params), (half, refitted)):
        before, after = (
            hyper.flat(nm.generate(hypernetwork, p, widths)) for p in (inr_params, fitted)
        )
        far, near = (
            sum(float(jnp.sum((x - tree[path]) ** 2)) for path, x in hyper.flat(wanted).items())
            for tree in (before, after)
        )
        assert near < 0.6 * far, widths

    with refused("needs the Family of the network", 'fit_target to "averaged"'):
        nm.fit(hypernetwork, Two().apply, inr_params, x, labels, recipe, teacher=params)


def test_fit_refuses_what_makes_no_step():
    x = np.zeros((5, 4, 4, 1), np.float32)
    params = Two().init(jax.random.key(0), x)
    family = nm.trace(Two().apply, params, x, check=False)
    hypernetwork = nm.Hypernetwork(family.groups, family.groups.elastic(), nm.make_inr("grid"))
    inr_params = nm.init(jax.random.key(0), hypernetwork, params)
    with refused("at least 64 for a step", "5 inputs"):
        nm.fit(hypernetwork, Two().apply, inr_params, x, np.zeros(5, int))


SIZES = {"num_classes": 3, "image_size": 4, "channels": 1}


def spec_of(factory, **fields):
    return linen.LinenSpec.from_dict({"factory": factory, "fields": fields, **SIZES})


def test_a_network_by_the_name_of_its_factory():
    spec = spec_of("test_any_network:Two", width=8)
    family = linen.hypernetwork(spec, inr.Projection())
    assert linen.LinenSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert families.from_description(family.describe(), inr.Projection()) == family
    assert spec.num_params == 16 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3
    assert spec.num_macs == family.num_macs((8, 8)) == 16 * 8 + 8 * 8 + 8 * 3
    size = family.at((3, 8))
    assert families.size_from_dict(json.loads(json.dumps(size.to_dict()))) == size
    variables = family.network.init_variables(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 4, 4, 1))
    masked = elastic.mask_params(family.groups, variables, family.by_name((3, 8)))
    small, dense = family.dense(variables, (3, 8))
    shapes = families.abstract_params(small)
    chex.assert_trees_all_equal_shapes(dense, shapes)
    np.testing.assert_allclose(
        families.run(small, dense, x), family.network.apply(masked, x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "factory, fields, words",
    [
        ("no_such_module:Net", {}, "importable 'module:function', got 'no_such_module:Net'"),
        ("test_any_network:Three", {}, "has no attribute 'Three'"),
        ("builtins:dict", {}, "must make a flax.linen Module, but builtins:dict made dict"),
        ("test_any_network:Two", {"num_classes": 4}, "must map images to 3 logits"),
        ("vggg", {}, "must be one of"),
    ],
)
def test_what_is_no_network_of_a_run_is_refused(factory, fields, words):
    with pytest.raises(ValueError, match=words):
        linen.hypernetwork(spec_of(factory, **fields), inr.Grid())


def test_the_commands_take_a_network_of_any_family(tmp_path):
    workdir = tmp_path / "vgg"
    fields = json.dumps({"stages": [[4], [6]], "dense": [8]})
    short = ("--config.train.epochs=0.3", "--config.teacher.epochs=0.5")
    config = f"--config={ROOT / 'configs/own.py'}:vgg"
    out = run(
        load_module("train.py"),
        *(config, f"--workdir={workdir}", f"--config.network.fields={fields}", *short),
    )
    assert "network    VGG: 572 parameters" in out and "elastic groups of channels: 3 of 4" in out
    family, params, _ = nm.load(str(workdir))
    assert family.spec.title == "VGG" and len(family.names) == 3
    out = run(
        export,
        f"--workdir={workdir}",
        "--widths=2,3,4",
        "--format=stablehlo",
        f"--out={tmp_path / 'small.stablehlo'}",
    )
    assert f"VGG of digits with widths 2,3,4: {family.num_params((2, 3, 4)):,} parameters" in out
    path = tmp_path / "small.safetensors"
    run(export, f"--workdir={workdir}", "--widths=2,3,4", "--format=safetensors", f"--out={path}")
    size, tree, *_ = saved.load(path)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    masked = hyper.generate(family, params, np.array([2, 3, 4]))
    np.testing.assert_allclose(
        families.run(size, tree, x), family.network.apply(masked, x), rtol=1e-4, atol=1e-5
    )
    assert_refuses(
        "a VGG is exported as one of safetensors, stablehlo",
        *(
            export,
            f"--workdir={workdir}",
            "--width=1",
            "--format=onnx",
            f"--out={tmp_path / 'n.onnx'}",
        ),
    )
    budget = family.num_macs((2, 4, 6))
    options = ("--num_candidates=8", "--population=4", "--num_images=20")
    out = run(search, f"--workdir={workdir}", f"--max_macs={budget}", *options)
    assert "best uniform" in out
    out = run(latency, f"--workdir={workdir}", "--width_ratios=1", "--calls=1", "--batch_sizes=1")
    assert "ONNX graphs are written for CIFAR ResNets" in out


def test_the_readmes_code_for_a_network_of_ones_own_runs(capsys):
    _, heading, section = (ROOT / "README.md").read_text().partition("\n## Your own network\n")
    _, fence, block = section.split("\n## ")[0].partition("```python\n")
    assert heading and fence
    images = np.random.default_rng(0).normal(size=(64, 4, 4, 1)).astype(np.float32)
    names = {"net": Two(), "images": images, "labels": np.arange(64) % 3, "jax": jax}
    names |= {"key": jax.random.key(0), "params": Two().init(jax.random.key(1), images)}
    exec(compile(block.partition("```")[0], "README.md", "exec"), names)
    assert "Dense_0" in capsys.readouterr().out
    np.testing.assert_allclose(
        names["logits"], Two().apply(names["tree"], images), rtol=1e-4, atol=1e-5
    )
