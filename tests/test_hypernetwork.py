"""Generation against the papers' equations in NumPy, and its invariances."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import hypernetwork, resnet
from neumeta_jax.architecture import cifar_resnet, generated_blocks, morph, widths_at
from neumeta_jax.core import coordinates
from neumeta_jax.core.coordinates import KINDS, LAYERS
from neumeta_jax.core.inr import (
    INR_KINDS,
    CoordinateMLP,
    Grid,
    PerTensorMLP,
    Projection,
    describe_inr,
    make_inr,
)

SPEC = cifar_resnet(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8, channels=2)
# Two blocks of one group, and one that enters a stage and cannot be skipped.
BLOCKS = (0, 1, 2)
IMAGES = np.random.default_rng(7).normal(size=(3, 8, 8, 2)).astype(np.float32)
INRS = {
    "mlp": PerTensorMLP(hidden_width=8, num_layers=2, num_frequencies=5),
    "cell grid": Grid(num_terms=3),
    "projection": Projection(num_terms=2, modulated=True),
    "nested grid": Grid(num_terms=2, resampling="nested"),
}
TENSORS = [f"{layer}_{kind}" for layer in LAYERS for kind in KINDS]
WIDTHS = {
    "full": (4, 4, 6),
    "half": (2, 2, 3),
    "uneven": (1, 3, 5),
    "skipped": (0, 0, 1),
    "partly skipped": (3, 0, 6),
}
all_kinds = pytest.mark.parametrize("inr", INRS.values(), ids=INRS)
one_of_each_class = pytest.mark.parametrize("inr", list(INRS.values())[:3], ids=list(INRS)[:3])


def scrambled(tree, seed, scale=0.3):
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        moved = np.asarray(x) + rng.normal(size=x.shape, scale=scale)
        if getattr(path[-1], "key", None) == "moments":  # of anything: symmetric and positive
            moved = moved @ moved.swapaxes(-1, -2) + 0.1 * np.eye(x.shape[-1])
        return moved.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def fast_key(seed):
    """JAX's default generator takes longer to compile than everything tested here."""
    return jax.random.key(seed, impl="unsafe_rbg")


@functools.cache
def family(inr, blocks=BLOCKS):
    """A family and parameters of it, all of them moved off their initial values."""
    members = resnet.hypernetwork(SPEC, blocks, inr)

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

    @functools.partial(jax.jit, static_argnames=("spec", "num_samples", "sample_batch", "dtype"))
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


def least_squares(moments, width, ridge):
    """float64[full + 1, full]: what stands for each channel where the first `width` are left.

    Stated as a regression: rows whose second moments are `moments`, and ridge rows below them.
    """
    moments = np.asarray(moments, np.float64)
    diagonal = np.diag(moments)
    rows = np.linalg.cholesky(moments).T
    penalty = np.diag(np.sqrt(ridge * diagonal + 1e-6 * diagonal.mean()))
    full = len(moments) - 1
    there, dropped = [*range(width), full], list(range(width, full))
    design = np.concatenate([rows[:, there], penalty[:, there]])
    wanted = np.concatenate([rows[:, dropped], np.zeros((full + 1, len(dropped)))])
    result = np.eye(full + 1, full)
    result[np.ix_(dropped, dropped)] = 0
    result[np.ix_(there, dropped)] = np.linalg.lstsq(design, wanted)[0]
    return result


def reference_projection(members, params, group, row, width):
    """The equation of `Projection`, one tensor at a time."""
    blocks = group.name.removesuffix(f"{group.layer}_{group.kind}")
    params = {name: p for name, p in params["inr"].items() if name.removeprefix(blocks) in TENSORS}
    params = jax.tree.map(lambda x: np.asarray(x[row], np.float64), params)
    hidden = members.full_widths[group.positions[row]]
    small = max(1 - width / hidden, 0)

    def conditioned(name):
        terms = params[name]["values"]
        values = sum(small**m * term for m, term in enumerate(terms))
        if members.inr.modulated:
            change = small * params[name]["modulation"][..., None]
            values = values * (1 + change) if name.endswith("kernel") else values + change
        return values

    values = conditioned(group.name)
    # Beyond the full size there are copies, which share what reads them.
    origin = np.arange(width) % hidden
    if group.layer == "conv1":
        return values[origin]
    reader = group.name.replace("bias", "kernel")
    kernel, kept = conditioned(reader), min(width, hidden)
    matrix = least_squares(params[reader]["moments"], kept, members.inr.ridge)
    projected = np.einsum("kf,ofs->oks", matrix, kernel)
    if group.kind == "bias":
        return values + projected[:, hidden].sum(-1)[:, None, None]
    copies = np.bincount(origin, minlength=hidden)
    return (projected[:, origin].swapaxes(1, 2) / copies[origin]).swapaxes(1, 2)


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
    if isinstance(members.inr, Projection):
        return reference_projection(members, params, group, row, width)
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
    chex.assert_trees_all_equal_shapes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=tolerance)


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
    mlp = CoordinateMLP(
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
    members = resnet.hypernetwork(spec, generated_blocks(spec), PerTensorMLP())
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


@one_of_each_class
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


@one_of_each_class
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
            tensors = dict(gradients["inr"][group.name])
            if "moments" in tensors:
                assert not tensors.pop("moments").any()  # measured, not learned
            for leaf in jax.tree.leaves(tensors):
                for row, position in enumerate(group.positions):
                    assert leaf[row].any() == (widths[position] > 0)


@one_of_each_class
def test_gradients_agree_with_finite_differences(inr):
    members, params = family(inr, blocks=(1,))
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(np.float64), params)
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        for tensors in direction["inr"].values():
            if isinstance(tensors, dict) and "moments" in tensors:
                tensors["moments"] = np.zeros_like(tensors["moments"])  # not learned

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


@pytest.mark.parametrize("batch", [None, 1, 3, 4])
def test_averaged_samples_are_the_mean_of_single_ones(batch):
    members, params = family(INRS["mlp"], blocks=(1,))
    key, widths = jax.random.key(3), (3,)  # of the default kind: others change under vmap
    mean = generate(members, params, widths, key=key, num_samples=4, sample_batch=batch)
    samples = [generate(members, params, widths, key=k) for k in jax.random.split(key, 4)]
    assert_same_tree(mean, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *samples))
    conv2 = [sample["stage1_block1"]["conv2"]["kernel"] for sample in samples]
    assert np.std(conv2, axis=0)[:, :, :3].min() > 0  # every sample has its own noise


def test_a_bfloat16_network_is_the_float32_one_rounded_once():
    members, params = family(INRS["mlp"], blocks=(0, 1))
    widths = (3, 2)
    rounded = generate(members, params, widths, dtype="bfloat16")
    for path, exact in jax.tree.leaves_with_path(generate(members, params, widths)):
        leaf = functools.reduce(lambda node, entry: node[entry.key], path, rounded)
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(leaf.astype(jnp.float32), exact, rtol=2**-8, atol=0)
        assert not np.array_equal(leaf.astype(jnp.float32), exact) or not exact.any()


def test_a_new_width_compiles_nothing_and_moves_nothing_between_host_and_device():
    members, params = family(INRS["projection"])
    call = jax.jit(lambda params, widths: hypernetwork.generate(members, params, widths))
    params = jax.device_put(params)
    all_widths = [jnp.array(widths, jnp.int32) for widths in WIDTHS.values()]
    call(params, all_widths[0])
    with jax.transfer_guard("disallow"):
        trees = [call(params, widths) for widths in all_widths]
    assert call._cache_size() == 1 < len(trees)


def test_noise_is_drawn_only_with_a_key_and_only_at_a_positive_scale():
    fields = {"hidden_width": 8, "num_layers": 2, "num_frequencies": 5}
    members, params = family(PerTensorMLP(**fields), blocks=(1,))
    quiet = resnet.hypernetwork(SPEC, (1,), PerTensorMLP(**fields, noise_scale=0.0))
    exact = generate(members, params, (3,))
    assert_same_tree(generate(quiet, params, (3,), key=fast_key(0)), exact, tolerance=0)
    moved = generate(members, params, (3,), key=fast_key(0))["stage1_block1"]
    for layer in LAYERS:
        for kind in KINDS:
            change = np.abs(moved[layer][kind] - exact["stage1_block1"][layer][kind])
            assert 1e-4 < change.max() < 10
    assert not np.asarray(moved["conv1"]["bias"])[3:].any()  # noise stays behind the mask


@one_of_each_class
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
    members, backbone = resnet.hypernetwork(SPEC, (2,), INRS["cell grid"]), random_backbone()
    learned = {**backbone, "stage2_block0": {"shortcut": backbone["stage2_block0"]["shortcut"]}}
    for kwargs, alpha in (({}, 0.0), ({"alpha": 0.5}, 0.5)):
        params = hypernetwork.init(fast_key(0), members, backbone, **kwargs)
        assert params["alpha"].tolist() == [alpha]
        assert_same_tree(params["learned"], learned, tolerance=0)


@pytest.mark.parametrize("name", ["cell grid", "nested grid"])
def test_a_grid_can_start_at_the_backbone(name):
    members, backbone = resnet.hypernetwork(SPEC, BLOCKS, INRS[name]), random_backbone()
    params = jax.jit(
        lambda key: hypernetwork.init(key, members, backbone, alpha=1.0, from_backbone=True)
    )(fast_key(0))
    assert_same_tree(generate(members, params, members.widths(1.0)), backbone)


def projection_of(backbone, moments, inr=None, blocks=BLOCKS):
    members = resnet.hypernetwork(SPEC, blocks, inr or Projection())
    params = jax.jit(
        lambda key: hypernetwork.init(
            key, members, backbone, alpha=1.0, from_backbone=True, moments=moments
        )
    )(fast_key(0))
    return members, params


def backbone_and_moments():
    backbone = random_backbone()
    moments = resnet.hidden_moments(SPEC, backbone, jnp.asarray(IMAGES), BLOCKS)
    return backbone, moments


def test_a_projection_at_the_full_width_is_exactly_its_values():
    members, params = family(INRS["projection"])
    raw = jax.jit(lambda p, w: members.inr(p, members.groups, w))(
        params["inr"], np.array(members.full_widths)
    )
    for group in members.groups:
        values = params["inr"][group.name]["values"][:, 0]
        np.testing.assert_array_equal(raw[group.name], values)


def test_a_projection_started_at_the_backbone_is_the_backbone_at_the_full_width():
    backbone, moments = backbone_and_moments()
    members, params = projection_of(backbone, moments)
    assert_same_tree(generate(members, params, members.full_widths), backbone, tolerance=0)


def test_without_moments_a_projection_is_a_nested_slice():
    backbone = random_backbone()
    members, params = projection_of(backbone, None)
    sliced = resnet.mask_params(SPEC, backbone, BLOCKS, (2, 3, 5))
    assert_same_tree(generate(members, params, (2, 3, 5)), sliced)


def test_a_projection_has_its_moments_wherever_its_values_start():
    backbone, moments = backbone_and_moments()
    members = resnet.hypernetwork(SPEC, BLOCKS, Projection())
    params = jax.jit(lambda key: hypernetwork.init(key, members, backbone, moments=moments))(
        fast_key(0)
    )
    for group in members.groups:
        if group.in_is_hidden:
            names = [SPEC.blocks[BLOCKS[p]].name for p in group.positions]
            np.testing.assert_array_equal(
                params["inr"][group.name]["moments"], np.stack([moments[name] for name in names])
            )


def without_depth_term(members, params, widths):
    """The family, and parameters, that have the weights of one network of a family with the term.

    Its values are those at the share of skipped blocks in each stage.
    """
    skipped = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
    for stage in skipped:
        positions = [p for p, n in enumerate(BLOCKS) if SPEC.blocks[n].stage == stage]
        if positions:
            skipped[stage] = float(np.mean([widths[p] == 0 for p in positions]))
    plain = Projection(num_terms=2, modulated=True)
    fields = {}
    for group in members.groups:
        entry = params["inr"][group.name]
        values = np.array(entry["values"])
        values[:, 0] += skipped[group.stage] * values[:, 2]
        fields[group.name] = {**entry, "values": values[:, :2]}
    stages = {block.name: block.stage for block in SPEC.blocks} | {"stem": 1, "head": 3}
    learned = {
        name: jax.tree.map(lambda x, d, s=stages[name]: x + skipped[s] * d, layers, depth)
        for (name, layers), depth in zip(
            params["learned"].items(), params["depth"].values(), strict=True
        )
    }
    params = {"inr": fields, "alpha": params["alpha"], "learned": learned}
    return resnet.hypernetwork(SPEC, BLOCKS, plain), params


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_a_depth_term_counts_as_far_as_blocks_of_its_stage_are_skipped(widths):
    members, params = family(Projection(num_terms=2, modulated=True, depth_term=True))
    tree = generate(members, params, widths)
    plain, plain_params = without_depth_term(members, params, widths)
    assert_same_tree(tree, generate(plain, plain_params, widths))
    as_learned = np.array_equal(tree["stem"]["kernel"], params["learned"]["stem"]["kernel"])
    assert as_learned == all(widths)


def test_a_depth_term_starts_at_nothing():
    backbone, moments = backbone_and_moments()
    members, params = projection_of(backbone, moments, Projection(depth_term=True))
    plain, plain_params = projection_of(backbone, moments)
    for widths in (WIDTHS["uneven"], WIDTHS["skipped"]):
        assert_same_tree(
            generate(members, params, widths), generate(plain, plain_params, widths), tolerance=0
        )


def test_a_projected_layer_is_the_least_squares_solution():
    backbone, moments = backbone_and_moments()
    members, params = projection_of(backbone, moments)
    widths = (2, 1, 4)
    tree = generate(members, params, widths)
    for n, width in zip(BLOCKS, widths, strict=True):
        name = SPEC.blocks[n].name
        kernel, bias = (np.asarray(backbone[name]["conv2"][k], np.float64) for k in KINDS[:2])
        full = kernel.shape[2]
        # W2_K + A W2_D and b2 + (last row of A) W2_D, summed over the taps
        matrix = np.asarray(moments[name], np.float64)
        diagonal = np.diag(matrix)
        loaded = matrix + np.diag(1e-3 * diagonal + 1e-6 * diagonal.mean())
        there, dropped = [*range(width), full], list(range(width, full))
        a = np.linalg.solve(loaded[np.ix_(there, there)], matrix[np.ix_(there, dropped)])
        taken = np.einsum("kd,hwdo->hwko", a, kernel[:, :, dropped])
        projected = tree[name]["conv2"]
        expected = kernel[:, :, :width] + taken[:, :, :width]
        np.testing.assert_allclose(projected["kernel"][:, :, :width], expected, atol=1e-4)
        expected = bias + taken[:, :, width].sum((0, 1))
        np.testing.assert_allclose(projected["bias"], expected, atol=1e-4)
        for kind in KINDS:
            np.testing.assert_array_equal(
                tree[name]["conv1"][kind][..., :width], backbone[name]["conv1"][kind][..., :width]
            )


def test_a_projection_beyond_the_full_width_is_the_same_function():
    members, params = family(INRS["projection"])
    exact = apply(SPEC, generate(members, params, members.full_widths), IMAGES)
    for widths in ((5, 8, 9), (4, 11, 13)):
        larger = morph(SPEC, BLOCKS, widths)
        logits = apply(larger, generate(members, params, widths, spec=larger), IMAGES)
        np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_a_projection_loses_less_than_a_nested_slice():
    rng = np.random.default_rng(4)
    backbone = random_backbone()
    # Correlated activations, as those of a layer are, in an image without an edge.
    mixing = rng.normal(size=(4, 4)) + 1
    hidden = np.maximum(rng.normal(size=(16, 8, 8, 4)) @ mixing + 0.5, 0)
    rows = np.concatenate([hidden.reshape(-1, 4), np.ones((16 * 64, 1))], axis=1)
    moments = {"stage1_block1": np.asarray(rows.T @ rows / len(rows), np.float32)}
    nested = resnet.hypernetwork(SPEC, (1,), INRS["nested grid"])
    members, params = projection_of(backbone, moments, blocks=(1,))
    nested_params = jax.jit(
        lambda key: hypernetwork.init(key, nested, backbone, alpha=1.0, from_backbone=True)
    )(fast_key(0))

    def output(tree):
        kernel, bias = (np.asarray(tree["stage1_block1"]["conv2"][kind]) for kind in KINDS[:2])
        patches = np.lib.stride_tricks.sliding_window_view(hidden, (3, 3), axis=(1, 2))
        return np.einsum("bxyihw,hwio->bxyo", patches, kernel) + bias

    exact, losses = output(backbone), []
    for width in (1, 2, 3):
        loss, nested_loss = (
            np.mean((output(generate(m, p, (width,))) - exact) ** 2)
            for m, p in ((members, params), (nested, nested_params))
        )
        assert loss < 0.7 * nested_loss
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)


def test_a_network_drawn_through_wider_cells_computes_what_a_narrower_one_does():
    backbone, moments = backbone_and_moments()
    members, params = projection_of(backbone, moments, Projection(max_cell=2.0))
    plain, _ = projection_of(backbone, moments)
    wide = (2, 2, 4)
    logits = {
        widths: apply(SPEC, generate(plain, params, widths), IMAGES)
        for widths in (wide, (1, 1, 2), (1, 1, 3), (2, 2, 3))
    }
    met = set()
    for seed in range(16):
        tree = generate(members, params, wide, key=fast_key(seed))
        found = apply(SPEC, tree, IMAGES)
        # As many channels as asked for, whatever the cells.
        for n, width in zip(BLOCKS, wide, strict=True):
            kernel = np.asarray(tree[SPEC.blocks[n].name]["conv1"]["kernel"])
            assert kernel.any((0, 1, 2)).sum() == width
        close = [w for w, x in logits.items() if np.abs(found - x).max() < 1e-4]
        assert close
        met.update(close)
    assert {wide, (1, 1, 2)} <= met
    full = generate(members, params, members.full_widths, key=fast_key(1))
    assert_same_tree(full, backbone, tolerance=0)


@all_kinds
def test_generation_calls_no_linear_algebra_library(inr):
    """Two batched LAPACK calls at once block XLA's CPU backend for good on two cores."""
    members, params = family(inr)

    def several(params, widths):
        return jax.vmap(lambda w: hypernetwork.generate(members, params, w))(widths)

    program = jax.jit(several).lower(params, np.array([(4, 4, 6), (2, 2, 3)])).as_text()
    assert "stablehlo" in program
    for name in ("lapack", "cholesky", "triangular_solve"):
        assert name not in program


def copy_block(members, params, source, target):
    return jax.jit(lambda tree: members.inr.copy_block(tree, members.groups, source, target))(
        params["inr"]
    )


@one_of_each_class
def test_a_copied_block_generates_the_weights_of_its_source(inr):
    members, params = family(inr)
    copied = copy_block(members, params, 0, 1)
    for group in members.groups:
        new_leaves, old_leaves = (
            jax.tree.leaves_with_path(tree[group.name]) for tree in (copied, params["inr"])
        )
        for (path, new), (_, old) in zip(new_leaves, old_leaves, strict=True):
            measured = jax.tree_util.keystr(path, simple=True) == "moments"  # each block's own
            if group.positions == (0, 1) and not measured:
                np.testing.assert_array_equal(new[1], old[0])
                np.testing.assert_array_equal(new[0], old[0])
                assert (new[1] != old[1]).any()
            else:
                np.testing.assert_array_equal(new, old)
    widths = members.full_widths if isinstance(inr, Projection) else (3, 3, 5)
    tree = generate(members, {**params, "inr": copied, "alpha": np.ones(3)}, widths)
    if not isinstance(inr, PerTensorMLP):  # which knows the tensor by its coordinate too
        assert_same_tree(tree["stage1_block1"], tree["stage1_block0"], tolerance=0)


@one_of_each_class
def test_copying_from_another_stage_changes_nothing(inr):
    members, params = family(inr)
    copied = copy_block(members, params, 1, 2)
    assert_same_tree(copied, params["inr"], tolerance=0)


@one_of_each_class
def test_a_masked_update_changes_only_active_blocks(inr):
    members, params = family(inr)
    active = np.array([False, True, True])

    @jax.jit
    def update(active):
        mask = inr.update_mask(params["inr"], members.groups, active)
        return jax.tree.map(lambda p, m: p + 0.1 * m, params["inr"], mask)

    updated = update(active)
    assert jax.tree.map(np.shape, updated) == jax.tree.map(np.shape, params["inr"])
    for group in members.groups:
        tensors = updated[group.name]
        if "moments" in tensors:
            np.testing.assert_array_equal(tensors["moments"], params["inr"][group.name]["moments"])
    before = generate(members, params, WIDTHS["half"])
    after = generate(members, {**params, "inr": updated}, WIDTHS["half"])
    for position, n in enumerate(BLOCKS):
        name = SPEC.blocks[n].name
        changed = jax.tree.map(lambda x, y: bool((x != y).any()), before[name], after[name])
        for layer in LAYERS:
            assert set(changed[layer].values()) == {bool(active[position])}


@pytest.mark.parametrize(
    "inr",
    [
        *INRS.values(),
        PerTensorMLP(activation="gelu", noise_per="channel", noise_scale=0.5),
        Projection(ridge=0.1, depth_term=True, max_cell=1.5),
    ],
)
def test_a_described_inr_can_be_made_again(inr):
    description = json.loads(json.dumps(describe_inr(inr)))
    assert make_inr(**description) == inr
    assert hash(make_inr(**description)) == hash(inr)


def test_a_description_of_an_earlier_version_is_read():
    fields = {"kind": "projection", "num_terms": 2, "ridge": 0.1}
    assert make_inr(**fields, channel_dropout=0.0) == make_inr(**fields)
    assert "channel_dropout" in refusal(make_inr, **fields, channel_dropout=0.5)


def test_unknown_kinds_and_fields_of_inrs_are_refused():
    message = refusal(make_inr, "siren")
    assert "'siren'" in message
    assert "per_tensor_mlp" in message
    assert all(kind in message for kind in INR_KINDS)
    message = refusal(make_inr, "per_tensor_mlp", hidden_widht=8)
    assert "hidden_widht" in message
    assert "hidden_width" in message
    assert "ResNetSpec" in refusal(describe_inr, SPEC)


@pytest.mark.parametrize(
    "kind, fields, given",
    [
        ("per_tensor_mlp", {"hidden_width": 0}, "hidden_width=0"),
        ("per_tensor_mlp", {"num_layers": 0}, "num_layers=0"),
        ("per_tensor_mlp", {"num_frequencies": -1}, "num_frequencies=-1"),
        ("per_tensor_mlp", {"activation": "tanh"}, "'tanh'"),
        ("per_tensor_mlp", {"noise_per": "row"}, "'row'"),
        ("projection", {"num_terms": 0}, "num_terms=0"),
        ("projection", {"ridge": 0.0}, "ridge=0.0"),
        ("projection", {"max_cell": 0.5}, "0.5"),
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


@pytest.mark.parametrize("dtype", ["int8", "bfloat", np.int32])
def test_a_dtype_that_holds_no_fractions_is_refused(dtype):
    members, params = family(INRS["cell grid"])
    widths = members.widths(1.0)
    message = refusal(hypernetwork.generate, members, params, widths, dtype=dtype)
    assert repr(dtype) in message


def test_a_batch_without_samples_is_refused():
    members, params = family(INRS["cell grid"])
    widths = members.widths(1.0)
    message = refusal(hypernetwork.generate, members, params, widths, sample_batch=0)
    assert "sample_batch=0" in message


def test_blocks_of_uneven_width_cannot_be_stacked():
    spec = morph(SPEC, (0,), (3,))
    members = resnet.hypernetwork(spec, BLOCKS, INRS["cell grid"])
    backbone = jax.tree.map(
        np.zeros, resnet.param_shapes(spec), is_leaf=lambda shape: isinstance(shape, tuple)
    )
    assert "[3, 4]" in refusal(hypernetwork.pack_blocks, members, backbone)
