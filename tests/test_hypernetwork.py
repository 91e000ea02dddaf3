"""Generation against the papers' equations in NumPy, and its invariances."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import coordinates, hypernetwork, resnet
from neumeta_jax.architecture import cifar_resnet, generated_blocks, morph, widths_at
from neumeta_jax.coordinates import KINDS, LAYERS
from neumeta_jax.hypernetwork import Grid, Hypernetwork, PerTensorMLP, make_inr

SPEC = cifar_resnet(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8, channels=2)
# Two blocks of one group, and one that enters a stage and cannot be skipped.
BLOCKS = (0, 1, 2)
IMAGES = np.random.default_rng(7).normal(size=(3, 8, 8, 2)).astype(np.float32)
INRS = {
    "mlp": PerTensorMLP(hidden_width=8, num_layers=2, num_frequencies=5),
    "cell grid": Grid(num_terms=3),
    "nested grid": Grid(num_terms=2, resampling="nested"),
}
WIDTHS = {
    "full": (4, 4, 6),
    "half": (2, 2, 3),
    "uneven": (1, 3, 5),
    "skipped": (0, 0, 1),
    "partly skipped": (3, 0, 6),
}
all_kinds = pytest.mark.parametrize("inr", INRS.values(), ids=INRS)
mlp_and_grid = pytest.mark.parametrize("inr", list(INRS.values())[:2], ids=list(INRS)[:2])


def scrambled(tree, seed, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (np.asarray(x) + rng.normal(size=x.shape, scale=scale)).astype(np.float32), tree
    )


def fast_key(seed):
    """JAX's default generator takes longer to compile than everything tested here."""
    return jax.random.key(seed, impl="unsafe_rbg")


@functools.cache
def family(inr, blocks=BLOCKS):
    """A family and parameters of it, all of them moved off their initial values."""
    members = Hypernetwork(SPEC, blocks, inr)

    def init(key):
        return hypernetwork.init(key, members, resnet.init_params(key, SPEC))

    params = jax.tree.map(lambda x: np.zeros(x.shape), jax.eval_shape(init, fast_key(0)))
    params = scrambled(params, 1)
    return members, {**params, "alpha": params["alpha"] + np.float32(0.8)}


def compiled(members):
    """`generate` of one family, and what it was traced with so far."""
    return _compiled(members.inr, members.blocks)


@functools.cache
def _compiled(inr, blocks):
    members, traces = family(inr, blocks)[0], []

    @functools.partial(jax.jit, static_argnames=("spec", "num_samples"))
    def traced(params, widths, **kwargs):
        traces.append(widths)
        return hypernetwork.generate(members, params, widths, **kwargs)

    return traced, traces


def generate(members, params, widths, **kwargs):
    return compiled(members)[0](params, np.array(widths), **kwargs)


apply = jax.jit(resnet.apply, static_argnums=0)


def features(x, num_frequencies):
    x = np.asarray(x, np.float32).astype(np.float64)[..., None]
    angles = np.pi * np.fmod(x * 2.0 ** np.arange(num_frequencies), 2.0)
    return np.concatenate([x, np.sin(angles), np.cos(angles)], axis=-1)


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def reference_mlp(params, queries, num_frequencies):
    """arXiv 2505.05510, section 3, for normalised queries float[..., 6]."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    e = features(queries, num_frequencies).reshape(*queries.shape[:-1], -1)
    h = elu(e @ params["in_kernel"] + params["in_bias"])
    for layer in range(1, 1 + sum(name.startswith("hidden") for name in params)):
        dense = params[f"hidden{layer}"]
        h = h + params[f"scale{layer}"] * elu(h @ dense["kernel"] + dense["bias"])
    return h @ params["out"]["kernel"] + params["out"]["bias"]


def resampled(values, axis, width, resampling):
    """`values` at `width` channels along `axis`: means over cells, or the first ones."""
    full = values.shape[axis]
    values = np.moveaxis(values, axis, 0)
    if resampling == "cell":
        fine = np.repeat(values, width, 0)
        values = fine.reshape(width, full, *values.shape[1:]).mean(1)
    else:
        values = np.concatenate([values, np.zeros((width, *values.shape[1:]))])[:width]
    return np.moveaxis(values, 0, axis)


def reference_tensor(members, params, group, row, width):
    """[C_out, C_in, outputs] of one tensor of a block with `width` hidden channels."""
    params = jax.tree.map(lambda x: x[row], params["inr"][group.name])
    c_out = width if group.out_is_hidden else group.rows
    c_in = width if group.in_is_hidden else group.columns
    if isinstance(members.inr, PerTensorMLP):
        i, n, norm = group.indices[row], group.num_tensors, max(members.spec.stage_widths)
        o, c = np.meshgrid(np.arange(c_out), np.arange(c_in), indexing="ij")
        raw = (i / n, o / c_out, c / c_in, n / norm, c_out / norm, c_in / norm)
        queries = np.stack(np.broadcast_arrays(*raw), axis=-1)
        return reference_mlp(params, queries, members.inr.num_frequencies) / c_in
    hidden = members.full_widths[group.positions[row]]
    powers = (1 - width / hidden) ** np.arange(members.inr.num_terms)
    values = np.tensordot(powers, np.asarray(params["values"], np.float64), 1)
    if group.out_is_hidden:
        values = resampled(values, 0, width, members.inr.resampling)
    if group.in_is_hidden:
        scale = hidden / width if members.inr.resampling == "cell" else 1
        values = scale * resampled(values, 1, width, members.inr.resampling)
    return values


def reference_dense(members, params, widths):
    """The tree of the small network, tensor by tensor in float64."""
    tree = dict(params["learned"])
    for position, n in enumerate(members.blocks):
        name = members.spec.blocks[n].name
        rest = tree.pop(name, {})
        if widths[position]:
            tree[name] = {"conv1": {}, "conv2": {}, **rest}
    for group in members.groups:
        for row, position in enumerate(group.positions):
            if not widths[position]:
                continue
            values = reference_tensor(members, params, group, row, int(widths[position]))
            if group.kind == "kernel":
                values = values.reshape(*values.shape[:2], 3, 3).transpose(2, 3, 1, 0)
            else:
                values = values[:, 0, 0]
            if group.layer == "conv2":
                values = values * params["alpha"][position]
            name = members.spec.blocks[members.blocks[position]].name
            tree[name][group.layer][group.kind] = values
    return tree


def assert_same_tree(actual, expected, tolerance=2e-6):
    actual, expected = jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, expected)
    assert jax.tree.map(np.shape, actual) == jax.tree.map(np.shape, expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=tolerance), actual, expected
    )


def padded(tree, spec):
    """`tree` with zeros up to the shapes of `spec`."""
    result = {}
    for name, shapes in resnet.param_shapes(spec).items():
        result[name] = jax.tree.map(np.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
        layers = jax.tree_util.tree_leaves_with_path(tree.get(name, {}))
        for path, values in layers:
            zeros = result[name]
            for step in path:
                zeros = zeros[step.key]
            zeros[tuple(map(slice, values.shape))] = values
    return result


def refusal(function, *args, **kwargs):
    """The message with which `function` refuses; one line."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_mlp_is_that_of_the_papers():
    mlp = hypernetwork.CoordinateMLP(
        hidden_width=16, num_layers=4, num_frequencies=32, num_outputs=9, activation="elu"
    )
    group = coordinates.tensor_groups(SPEC, BLOCKS)[0]
    coords = coordinates.raw_coordinates(group, jnp.array(WIDTHS["full"]))
    coords = coordinates.normalize(coords, group.norm)
    coords = coordinates.Coordinates(*[entry[0] for entry in coords])
    params = jax.eval_shape(mlp.init, jax.random.key(0), coords)["params"]
    params = scrambled(jax.tree.map(lambda x: np.zeros(x.shape), params), 2)
    assert params["in_kernel"].shape == (6 * 65, 16)
    queries = np.stack([np.broadcast_to(x, coords.shape) for x in coords], axis=-1)
    expected = reference_mlp(params, queries, 32)
    actual = jax.jit(mlp.apply)({"params": params}, coords)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_residual_scales_of_the_mlp_start_at_a_tenth_and_all_mlps_differ():
    inr = PerTensorMLP(hidden_width=8, num_layers=3, num_frequencies=1)
    groups = coordinates.tensor_groups(SPEC, BLOCKS)[:1]
    params = jax.jit(lambda key: inr.init(key, groups))(jax.random.key(0))
    mlps = params[groups[0].name]
    assert mlps["scale1"].tolist() == mlps["scale2"].tolist() == pytest.approx([0.1, 0.1])
    for kernel in (mlps["in_kernel"], mlps["hidden1"]["kernel"], mlps["out"]["kernel"]):
        assert (kernel[0] != kernel[1]).all()


def test_the_papers_inr_of_a_resnet56_has_187_8_million_parameters():
    spec = cifar_resnet(56, num_classes=100)
    members = Hypernetwork(spec, generated_blocks(spec), PerTensorMLP())
    inr = jax.eval_shape(lambda key: members.inr.init(key, members.groups), jax.random.key(0))
    for group in members.groups:
        count = sum(leaf.size for leaf in jax.tree.leaves(inr[group.name]))
        each = 2_043_408 if group.kind == "kernel" else 2_039_304
        assert count == each * len(group.positions)
    total = hypernetwork.num_inr_params({"inr": inr, "alpha": np.zeros(23)})
    assert total == 46 * (2_043_408 + 2_039_304) + 23
    assert round(total / 1e6, 1) == 187.8


@all_kinds
def test_one_compilation_generates_what_the_equations_give_at_every_width(inr):
    members, params = family(inr)
    for widths in WIDTHS.values():
        expected = padded(reference_dense(members, params, widths), SPEC)
        expected["stage2_block0"]["shortcut"] = params["learned"]["stage2_block0"]["shortcut"]
        assert_same_tree(generate(members, params, widths), expected)
    assert len(compiled(members)[1]) == 1


@all_kinds
def test_the_masked_network_is_the_dense_one(inr):
    members, params = family(inr)
    widths = WIDTHS["partly skipped"]
    small = morph(SPEC, BLOCKS, widths)
    specs = []

    @jax.jit
    def dense(params):
        spec, tree = hypernetwork.generate_dense(members, params, widths)
        specs.append(spec)
        return tree, resnet.apply(spec, tree, IMAGES)

    tree, logits = dense(params)
    masked = generate(members, params, widths)
    assert specs == [small]
    assert resnet.slice_params(SPEC, masked, BLOCKS, widths)[0] == small
    assert_same_tree(tree, resnet.slice_params(SPEC, masked, BLOCKS, widths)[1])
    scale = float(jnp.abs(logits).max())
    np.testing.assert_allclose(apply(SPEC, masked, IMAGES), logits, rtol=0, atol=2e-5 * scale)


@all_kinds
def test_networks_larger_than_the_full_one_follow_the_same_equations(inr):
    members, params = family(inr, blocks=(1,))
    widths = widths_at(SPEC, members.blocks, 1.5)
    assert widths == (6,)
    larger = morph(SPEC, members.blocks, widths)
    for asked in (widths, (5,), (0,), members.full_widths):
        tree = generate(members, params, asked, spec=larger)
        assert_same_tree(tree, padded(reference_dense(members, params, asked), larger))


@mlp_and_grid
def test_generation_maps_over_widths(inr):
    members, params = family(inr, blocks=(0, 1))
    batch = np.array(list(WIDTHS.values()))[:, :2]
    trees = jax.jit(jax.vmap(lambda w: hypernetwork.generate(members, params, w)))(batch)
    for number, widths in enumerate(batch):
        tree = jax.tree.map(lambda x, n=number: x[n], trees)
        assert_same_tree(tree, generate(members, params, widths))


@all_kinds
def test_the_tree_is_that_of_the_spec_and_keeps_what_is_not_generated(inr):
    members, params = family(inr)
    tree = jax.eval_shape(lambda p, w: hypernetwork.generate(members, p, w), params, np.arange(3))
    assert jax.tree.map(lambda x: x.shape, tree) == resnet.param_shapes(SPEC)
    learned = params["learned"]
    assert set(learned) == {"stem", "head", *(block.name for block in SPEC.blocks[2:])}
    assert set(learned["stage2_block0"]) == {"shortcut"}


@mlp_and_grid
def test_gradients_reach_every_parameter_and_are_finite(inr):
    members, params = family(inr, blocks=(0, 1))

    @jax.jit
    @jax.grad
    def gradient(params, widths):
        tree = hypernetwork.generate(members, params, widths)
        return sum(jnp.sum(jnp.sin(leaf + 0.3)) for leaf in jax.tree.leaves(tree))

    for widths in ((3, 2), (0, 2)):
        gradients = gradient(params, np.array(widths))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        np.testing.assert_array_equal(gradients["alpha"] != 0, np.array(widths) > 0)
        assert all(leaf.any() for leaf in jax.tree.leaves(gradients["learned"]))
        for group in members.groups:
            for leaf in jax.tree.leaves(gradients["inr"][group.name]):
                for row, position in enumerate(group.positions):
                    assert leaf[row].any() == (widths[position] > 0)


@mlp_and_grid
def test_gradients_agree_with_finite_differences(inr):
    members, params = family(inr, blocks=(1,))
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(np.float64), params)
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

        @jax.jit
        def slope_and_value(step):
            def value(step):
                moved = jax.tree.map(lambda x, d: x + step * d, params, direction)
                tree = hypernetwork.generate(members, moved, jnp.array([3]))
                return sum(jnp.sum(jnp.sin(leaf + 0.3)) for leaf in jax.tree.leaves(tree))

            return jax.grad(value)(step), value(step)

        slope, step = float(slope_and_value(0.0)[0]), 1e-5
        difference = float(slope_and_value(step)[1]) - float(slope_and_value(-step)[1])
    assert slope == pytest.approx(difference / (2 * step), rel=1e-7)
    assert abs(slope) > 0.1


def test_averaged_samples_are_the_mean_of_single_ones():
    members, params = family(INRS["mlp"], blocks=(1,))
    key, widths = fast_key(3), (3,)
    mean = generate(members, params, widths, key=key, num_samples=4)
    samples = [generate(members, params, widths, key=k) for k in jax.random.split(key, 4)]
    assert_same_tree(mean, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *samples))
    conv2 = [sample["stage1_block1"]["conv2"]["kernel"] for sample in samples]
    assert np.std(conv2, axis=0)[:, :, :3].min() > 0  # every sample has its own noise


def test_noise_is_drawn_only_with_a_key_and_only_at_a_positive_scale():
    fields = {"hidden_width": 8, "num_layers": 2, "num_frequencies": 5}
    members, params = family(PerTensorMLP(**fields), blocks=(1,))
    quiet = Hypernetwork(SPEC, (1,), PerTensorMLP(**fields, noise_scale=0.0))
    exact = generate(members, params, (3,))
    assert_same_tree(generate(quiet, params, (3,), key=fast_key(0)), exact, tolerance=0)
    moved = generate(members, params, (3,), key=fast_key(0))["stage1_block1"]
    for layer in LAYERS:
        for kind in KINDS:
            change = np.abs(moved[layer][kind] - exact["stage1_block1"][layer][kind])
            assert 1e-4 < change.max() < 10
    assert not np.asarray(moved["conv1"]["bias"])[3:].any()  # noise stays behind the mask


@mlp_and_grid
def test_an_alpha_of_zero_makes_generated_blocks_the_identity(inr):
    members, params = family(inr)
    params = {**params, "alpha": np.zeros(3, np.float32)}
    other = {**params, "inr": scrambled(params["inr"], 5)}
    logits = [apply(SPEC, generate(members, p, (4, 2, 6)), IMAGES) for p in (params, other)]
    np.testing.assert_array_equal(*logits)
    skipped = apply(SPEC, generate(members, params, (0, 0, 6)), IMAGES)
    np.testing.assert_array_equal(skipped, logits[0])


def random_backbone():
    shapes = jax.eval_shape(lambda key: resnet.init_params(key, SPEC), fast_key(0))
    return scrambled(jax.tree.map(lambda x: np.zeros(x.shape), shapes), 3)


def test_a_fresh_family_starts_with_the_alpha_asked_for_and_the_backbone_around_it():
    members, backbone = Hypernetwork(SPEC, (2,), INRS["cell grid"]), random_backbone()
    learned = {**backbone, "stage2_block0": {"shortcut": backbone["stage2_block0"]["shortcut"]}}
    for kwargs, alpha in (({}, 0.0), ({"alpha": 0.5}, 0.5)):
        params = hypernetwork.init(fast_key(0), members, backbone, **kwargs)
        assert params["alpha"].tolist() == [alpha]
        assert_same_tree(params["learned"], learned, tolerance=0)


@pytest.mark.parametrize("name", ["cell grid", "nested grid"])
def test_a_grid_can_start_at_the_backbone(name):
    members, backbone = Hypernetwork(SPEC, BLOCKS, INRS[name]), random_backbone()
    params = jax.jit(
        lambda key: hypernetwork.init(key, members, backbone, alpha=1.0, from_backbone=True)
    )(fast_key(0))
    assert_same_tree(generate(members, params, members.widths(1.0)), backbone)


def copy_block(members, params, source, target):
    return jax.jit(lambda tree: members.inr.copy_block(tree, members.groups, source, target))(
        params["inr"]
    )


@mlp_and_grid
def test_a_copied_block_generates_the_weights_of_its_source(inr):
    members, params = family(inr)
    copied = copy_block(members, params, 0, 1)
    for group in members.groups:
        for new, old in zip(
            *map(jax.tree.leaves, (copied[group.name], params["inr"][group.name])), strict=True
        ):
            if group.positions == (0, 1):
                np.testing.assert_array_equal(new[1], old[0])
                np.testing.assert_array_equal(new[0], old[0])
                assert (new[1] != old[1]).any()
            else:
                np.testing.assert_array_equal(new, old)


@mlp_and_grid
def test_copying_from_another_stage_changes_nothing(inr):
    members, params = family(inr)
    copied = copy_block(members, params, 1, 2)
    assert_same_tree(copied, params["inr"], tolerance=0)


@mlp_and_grid
def test_a_masked_update_changes_only_active_blocks(inr):
    members, params = family(inr)
    active = np.array([False, True, True])

    @jax.jit
    def update(active):
        mask = inr.update_mask(params["inr"], members.groups, active)
        return jax.tree.map(lambda p, m: p + 0.1 * m, params["inr"], mask)

    updated = update(active)
    assert jax.tree.map(np.shape, updated) == jax.tree.map(np.shape, params["inr"])
    before = generate(members, params, WIDTHS["half"])
    after = generate(members, {**params, "inr": updated}, WIDTHS["half"])
    for position, n in enumerate(BLOCKS):
        name = SPEC.blocks[n].name
        changed = jax.tree.map(lambda x, y: bool((x != y).any()), before[name], after[name])
        for layer in LAYERS:
            assert set(changed[layer].values()) == {bool(active[position])}


@pytest.mark.parametrize(
    "inr",
    [*INRS.values(), PerTensorMLP(activation="gelu", noise_per="channel", noise_scale=0.5)],
)
def test_a_described_inr_can_be_made_again(inr):
    description = json.loads(json.dumps(hypernetwork.describe_inr(inr)))
    assert make_inr(**description) == inr
    assert hash(make_inr(**description)) == hash(inr)


def test_unknown_kinds_and_fields_of_inrs_are_refused():
    message = refusal(make_inr, "siren")
    assert "'siren'" in message
    assert "per_tensor_mlp" in message
    message = refusal(make_inr, "per_tensor_mlp", hidden_widht=8)
    assert "hidden_widht" in message
    assert "hidden_width" in message
    assert "ResNetSpec" in refusal(hypernetwork.describe_inr, SPEC)


@pytest.mark.parametrize(
    "kind, fields, given",
    [
        ("per_tensor_mlp", {"hidden_width": 0}, "hidden_width=0"),
        ("per_tensor_mlp", {"num_layers": 0}, "num_layers=0"),
        ("per_tensor_mlp", {"num_frequencies": -1}, "num_frequencies=-1"),
        ("per_tensor_mlp", {"activation": "tanh"}, "'tanh'"),
        ("per_tensor_mlp", {"noise_per": "row"}, "'row'"),
        ("grid", {"num_terms": 0}, "num_terms=0"),
        ("grid", {"noise_scale": -1.0}, "noise_scale=-1.0"),
        ("grid", {"resampling": "linear"}, "'linear'"),
    ],
)
def test_an_inr_with_impossible_fields_is_refused(kind, fields, given):
    assert given in refusal(make_inr, kind, **fields)


@pytest.mark.parametrize(
    "widths, given",
    [
        (np.array([4.0, 4.0, 6.0], np.float32), "float32"),
        (np.array([4, 4, 6, 6]), "(4,)"),
        (np.array(4), "()"),
        (np.array([4, 5, 6]), "stage1_block1 takes hidden widths from 0 to 4, got 5"),
        (np.array([4, -1, 6]), "stage1_block1 takes hidden widths from 0 to 4, got -1"),
        (np.array([4, 4, 0]), "stage2_block0 takes hidden widths from 1 to 6, got 0"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths, given):
    members, params = family(INRS["cell grid"])
    assert given in refusal(hypernetwork.generate, members, params, widths)


@pytest.mark.parametrize(
    "widths, given",
    [
        ([0.5, 0.5, 1.5], "float"),  # ratios, which must not become skipped blocks
        ([4, 4, 6, 6], "4"),
        ([4, -1, 6], "stage1_block1"),
        ([4, 4, 0], "stage2_block0"),
    ],
)
def test_dense_widths_that_do_not_fit_are_refused(widths, given):
    members, params = family(INRS["cell grid"])
    assert given in refusal(hypernetwork.generate_dense, members, params, widths)


@pytest.mark.parametrize("kwargs", [{"num_samples": 2}, {"num_samples": 0}])
def test_several_samples_without_a_key_are_refused(kwargs):
    members, params = family(INRS["cell grid"])
    message = refusal(hypernetwork.generate, members, params, members.widths(1.0), **kwargs)
    assert f"num_samples={kwargs['num_samples']}" in message


def test_blocks_of_uneven_width_cannot_be_stacked():
    spec = morph(SPEC, (0,), (3,))
    members = Hypernetwork(spec, BLOCKS, INRS["cell grid"])
    backbone = jax.tree.map(
        np.zeros, resnet.param_shapes(spec), is_leaf=lambda shape: isinstance(shape, tuple)
    )
    assert "[3, 4]" in refusal(hypernetwork.pack_blocks, members, backbone)
