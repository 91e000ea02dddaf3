"""Generation against the papers' equations in NumPy, and its invariances."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import refused
from test_coordinates import reference_features

from neumeta_jax import elastic
from neumeta_jax.core import coordinates, hypernetwork as hyper
from neumeta_jax.core.inr import (
    INR_KINDS,
    CoordinateMLP,
    Grid,
    PerTensorMLP,
    Projection,
    describe_inr,
    make_inr,
)
from neumeta_jax.core.inr.base import width_counts
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import (
    generated_blocks,
    morph,
    resnet_spec,
)

SPEC = resnet_spec(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8, channels=2)
# Two blocks of one stack, and one that enters a stage and cannot be skipped.
BLOCKS = (0, 1, 2)
IMAGES = np.random.default_rng(7).normal(size=(3, 8, 8, 2)).astype(np.float32)
LAYERS, KINDS = ("conv1", "conv2"), ("kernel", "bias")
INRS = {
    "mlp": PerTensorMLP(hidden_width=8, num_layers=2, num_frequencies=5),
    "cell grid": Grid(num_terms=3),
    "projection": Projection(num_terms=2, modulated=True),
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
one_of_each_class = pytest.mark.parametrize("inr", list(INRS.values())[:3], ids=list(INRS)[:3])


def scrambled(tree, seed, scale=0.3):
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        moved = rng.normal(size=x.shape, scale=scale)
        if not isinstance(x, jax.ShapeDtypeStruct):
            moved += x
        if getattr(path[-1], "key", None) == "moments":  # of anything: symmetric and positive
            moved = moved @ moved.swapaxes(-1, -2) + 0.1 * np.eye(x.shape[-1])
        return moved.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def fast_key(seed):
    """JAX's default generator takes longer to compile than everything tested here."""
    return jax.random.key(seed, impl="unsafe_rbg")


@functools.cache
def case(inr, blocks=BLOCKS, streams=False):
    """A family and parameters of it at random."""
    family = cifar_resnet.hypernetwork(SPEC, blocks, inr, streams=streams)

    def init(key):
        return hyper.init(key, family, cifar_resnet.init_params(key, SPEC))

    params = scrambled(jax.eval_shape(init, fast_key(0)), 1)
    return family, {**params, "alpha": params["alpha"] + np.float32(0.8)}


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("sizes", "num_samples", "sample_batch", "dtype")
)
def _generate(family, params, widths, **kwargs):
    return hyper.generate(family, params, widths, **kwargs)


def generate(family, params, widths, **kwargs):
    return _generate(family, params, np.array(widths), **kwargs)


apply = jax.jit(cifar_resnet.apply, static_argnums=0)


def rows_of(family):
    """(stack, row, position, layer, kind) of every generated tensor."""
    for stack in family.stacks:
        *_, layer, kind = stack.name.split("_")
        for row, position in enumerate(stack.owners):
            yield stack, row, position, layer, kind


def block_name(position):
    return SPEC.blocks[BLOCKS[position]].name


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def reference_mlp(params, queries, num_frequencies):
    """arXiv 2505.05510, section 3, for normalised queries float[..., 6]."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    e = reference_features(np.float32(queries), num_frequencies)
    h = elu(e.reshape(*queries.shape[:-1], -1) @ params["in_kernel"] + params["in_bias"])
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


def reference_projection(family, params, stack, row, width):
    """The equation of `Projection`, one tensor at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params["inr"])
    *_, layer, kind = stack.name.split("_")
    hidden = family.full_widths[stack.owners[row]]
    small = max(1 - width / hidden, 0)

    def conditioned(name):
        terms = params[name]["values"][row]
        values = sum(small**m * term for m, term in enumerate(terms))
        if family.inr.modulated:
            change = small * params[name]["modulation"][row][..., None]
            values = values * (1 + change) if name.endswith("kernel") else values + change
        return values

    values = conditioned(stack.name)
    # Beyond the full size there are copies, which share what reads them.
    origin = np.arange(width) % hidden
    if layer == "conv1":
        return values[origin]
    reader = stack.name.replace("bias", "kernel")
    kernel, kept = conditioned(reader), min(width, hidden)
    matrix = least_squares(params[reader]["moments"][row], kept, family.inr.ridge)
    projected = np.einsum("kf,ofs->oks", matrix, kernel)
    if kind == "bias":
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


def reference_tensor(family, params, stack, row, width):
    """[C_out, C_in, outputs] of one tensor of a block with `width` hidden channels."""
    if isinstance(family.inr, Projection):
        return reference_projection(family, params, stack, row, width)
    params = jax.tree.map(lambda x: x[row], params["inr"][stack.name])
    *_, layer, kind = stack.name.split("_")
    writes, reads = layer == "conv1", (layer, kind) == ("conv2", "kernel")
    if isinstance(family.inr, PerTensorMLP):
        c_out = width if writes else stack.rows.size
        c_in = width if reads else stack.columns.size
        i, n, norm = stack.indices[row], stack.num_tensors, max(SPEC.stage_widths)
        o, c = np.meshgrid(np.arange(c_out), np.arange(c_in), indexing="ij")
        raw = (i / n, o / c_out, c / c_in, n / norm, c_out / norm, c_in / norm)
        queries = np.stack(np.broadcast_arrays(*raw), axis=-1)
        return reference_mlp(params, queries, family.inr.num_frequencies) / c_in
    hidden = family.full_widths[stack.owners[row]]
    powers = (1 - width / hidden) ** np.arange(family.inr.num_terms)
    values = np.tensordot(powers, np.asarray(params["values"], np.float64), 1)
    if writes:
        values = resampled(values, 0, width, family.inr.resampling)
    if reads:
        scale = hidden / width if family.inr.resampling == "cell" else 1
        values = scale * resampled(values, 1, width, family.inr.resampling)
    return values


def reference_dense(family, params, widths):
    """The leaves of the small network by path, tensor by tensor in float64."""
    leaves = hyper.flat(params["learned"])
    for stack, row, position, layer, kind in rows_of(family):
        if not widths[position]:
            continue
        values = reference_tensor(family, params, stack, row, int(widths[position]))
        if kind == "kernel":
            values = values.reshape(*values.shape[:2], 3, 3).transpose(2, 3, 1, 0)
        else:
            values = values[:, 0, 0]
        if layer == "conv2":
            values = values * params["alpha"][position]
        leaves[stack.paths[row]] = values
    return leaves


def assert_same_tree(actual, expected, tolerance=2e-6):
    chex.assert_trees_all_equal_shapes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=tolerance)


def padded(leaves, spec):
    """The tree of `leaves` with zeros up to the shapes of `spec`."""
    shapes = hyper.flat(cifar_resnet.param_shapes(spec))
    tree = {path: np.zeros(shape) for path, shape in shapes.items()}
    for path, values in leaves.items():
        tree[path][tuple(map(slice, values.shape))] = values
    return hyper.nested(tree)


# --- the papers' INR -------------------------------------------------------------------------


def test_the_mlp_is_that_of_the_papers():
    mlp = CoordinateMLP(
        hidden_width=16, num_layers=4, num_frequencies=32, num_outputs=9, activation="elu"
    )
    stack = case(INRS["mlp"])[0].stacks[0]
    coords = coordinates.raw_coordinates(stack, jnp.array(WIDTHS["full"]))
    coords = coordinates.normalize(coords, stack.norm)
    coords = coordinates.Coordinates.of(entry[0] for entry in coords.entries)
    params = scrambled(jax.eval_shape(mlp.init, jax.random.key(0), coords)["params"], 2)
    assert params["in_kernel"].shape == (6 * 65, 16)
    queries = np.stack([np.broadcast_to(x, coords.shape) for x in coords.entries], axis=-1)
    expected = reference_mlp(params, queries, 32)
    actual = jax.jit(mlp.apply)({"params": params}, coords)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_residual_scales_of_the_mlp_start_at_a_tenth_and_all_mlps_differ():
    inr = PerTensorMLP(hidden_width=8, num_layers=3, num_frequencies=1)
    stacks = case(INRS["mlp"])[0].stacks[:1]
    mlps = jax.jit(lambda key: inr.init(key, stacks))(jax.random.key(0))[stacks[0].name]
    assert mlps["scale1"].tolist() == mlps["scale2"].tolist() == pytest.approx([0.1, 0.1])
    for kernel in (mlps["in_kernel"], mlps["hidden1"]["kernel"], mlps["out"]["kernel"]):
        assert (kernel[0] != kernel[1]).all()


def test_the_papers_inr_of_a_resnet56_has_187_8_million_parameters():
    spec = resnet_spec(56, num_classes=100)
    family = cifar_resnet.hypernetwork(spec, generated_blocks(spec), PerTensorMLP())
    inr = jax.eval_shape(lambda key: family.inr.init(key, family.stacks), jax.random.key(0))
    for stack in family.stacks:
        count = sum(leaf.size for leaf in jax.tree.leaves(inr[stack.name]))
        assert count == (2_043_408 if stack.kernel else 2_039_304) * len(stack.paths)
    total = hyper.num_inr_params({"inr": inr, "alpha": np.zeros(23)})
    assert total == 46 * (2_043_408 + 2_039_304) + 23
    assert round(total / 1e6, 1) == 187.8


# --- all kinds -------------------------------------------------------------------------------


@all_kinds
def test_one_compilation_generates_what_the_equations_give_at_every_width(inr):
    family, params = case(inr)
    before = _generate._cache_size()
    for widths in WIDTHS.values():
        tree = generate(family, params, widths)
        assert_same_tree(tree, padded(reference_dense(family, params, widths), SPEC))
    assert _generate._cache_size() <= before + 1


@all_kinds
@pytest.mark.parametrize("streams", [(), (3, 4, 8)], ids=["blocks", "blocks and streams"])
def test_the_dense_network_is_the_masked_one_without_zeros(inr, streams):
    family, params = case(inr, streams=bool(streams))
    widths = (*WIDTHS["partly skipped"], *streams)
    masked = generate(family, params, widths)
    # Generated in a smaller container, and cut out of the full one.
    smaller = family.dense(generate(family, params, widths, sizes=widths), widths, widths)
    spec, tree = family.dense(masked, widths)
    assert smaller[0] == spec == family.at(widths)
    shapes = cifar_resnet.param_shapes(spec)
    assert jax.tree.map(np.shape, tree) == shapes and list(tree) == list(shapes)
    assert_same_tree(smaller[1], tree)
    logits = apply(spec, tree, IMAGES)
    scale = float(jnp.abs(logits).max())
    np.testing.assert_allclose(apply(SPEC, masked, IMAGES), logits, rtol=0, atol=2e-5 * scale)


@all_kinds
def test_networks_larger_than_the_full_one_follow_the_same_equations(inr):
    family, params = case(inr, blocks=(1,))
    sizes = (6,)
    larger = morph(SPEC, family.blocks, sizes)
    for widths in (sizes, (5,), (0,), family.full_widths):
        tree = generate(family, params, widths, sizes=sizes)
        assert_same_tree(tree, padded(reference_dense(family, params, widths), larger))


@one_of_each_class
def test_gradients_reach_every_parameter_and_are_finite(inr):
    family, params = case(inr, blocks=(0, 1))

    @jax.jit
    @jax.grad
    def gradient(params, widths):
        tree = hyper.generate(family, params, widths)
        return sum(jnp.sum(jnp.sin(leaf + 0.3)) for leaf in jax.tree.leaves(tree))

    for widths in ((3, 2), (0, 2)):
        gradients = gradient(params, np.array(widths))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        np.testing.assert_array_equal(gradients["alpha"] != 0, np.array(widths) > 0)
        assert all(leaf.any() for leaf in jax.tree.leaves(gradients["learned"]))
        for stack, row, position, _, _ in rows_of(family):
            tensors = dict(gradients["inr"][stack.name])
            if "moments" in tensors:
                assert not tensors.pop("moments").any()  # measured, not learned
            for leaf in jax.tree.leaves(tensors):
                assert leaf[row].any() == (widths[position] > 0)


@one_of_each_class
def test_an_alpha_of_zero_makes_generated_blocks_the_identity(inr):
    family, params = case(inr)
    params = {**params, "alpha": np.zeros(3, np.float32)}
    other = {**params, "inr": scrambled(params["inr"], 5)}
    logits = [apply(SPEC, generate(family, p, (4, 2, 6)), IMAGES) for p in (params, other)]
    np.testing.assert_array_equal(*logits)
    skipped = apply(SPEC, generate(family, params, (0, 0, 6)), IMAGES)
    np.testing.assert_array_equal(skipped, logits[0])


@all_kinds
def test_generation_calls_no_linear_algebra_library(inr):
    """Two batched LAPACK calls at once block XLA's CPU backend for good on two cores."""
    family, params = case(inr)

    def several(params, widths):
        return jax.vmap(lambda w: hyper.generate(family, params, w))(widths)

    program = jax.jit(several).lower(params, np.array([(4, 4, 6), (2, 2, 3)])).as_text()
    assert "stablehlo" in program
    for name in ("lapack", "cholesky", "triangular_solve"):
        assert name not in program


# --- widths ----------------------------------------------------------------------------------


def test_the_last_skippable_blocks_of_each_stage_are_left_out():
    spec = resnet_spec(20, num_classes=10)
    inner, everything = (
        cifar_resnet.hypernetwork(spec, generated_blocks(spec, which), Grid())
        for which in ("inner", "all")
    )
    widths = (16, 12, 32, 20, 64)
    assert inner.without_last(widths, 0) == widths
    assert inner.without_last(widths, 1) == (16, 0, 32, 0, 0)
    assert inner.without_last(widths, 5) == (0,) * 5
    kept = [n for n, width in enumerate(everything.without_last(spec.hidden_widths, 9)) if width]
    assert kept == [n for n, block in enumerate(spec.blocks) if not block.skippable]


# --- noise, samples and types ----------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1, 3, 4])
def test_averaged_samples_are_the_mean_of_single_ones(batch):
    family, params = case(INRS["mlp"], blocks=(1,))
    key, widths = jax.random.key(3), (3,)  # of the default kind: others change under vmap
    mean = generate(family, params, widths, key=key, num_samples=4, sample_batch=batch)
    samples = [generate(family, params, widths, key=k) for k in jax.random.split(key, 4)]
    assert_same_tree(mean, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *samples))
    conv2 = [sample["stage1_block1"]["conv2"]["kernel"] for sample in samples]
    assert np.std(conv2, axis=0)[:, :, :3].min() > 0  # every sample has its own noise


def test_a_bfloat16_network_is_the_float32_one_rounded_once():
    family, params = case(INRS["cell grid"])
    rounded, exact = (
        hyper.flat(generate(family, params, (3, 2, 5), dtype=dtype)) for dtype in ("bfloat16", None)
    )
    for path, leaf in rounded.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(leaf.astype(jnp.float32), exact[path], rtol=2**-8, atol=0)
        assert not np.array_equal(leaf.astype(jnp.float32), exact[path]) or not exact[path].any()


def test_a_new_width_compiles_nothing_and_moves_nothing_between_host_and_device():
    family, params = case(INRS["projection"])
    call = jax.jit(lambda params, widths: hyper.generate(family, params, widths))
    params = jax.device_put(params)
    all_widths = [jnp.array(widths, jnp.int32) for widths in WIDTHS.values()]
    call(params, all_widths[0])
    with jax.transfer_guard("disallow"):
        trees = [call(params, widths) for widths in all_widths]
    assert call._cache_size() == 1 < len(trees)


def test_noise_is_drawn_only_with_a_key_and_only_at_a_positive_scale():
    fields = {"hidden_width": 8, "num_layers": 2, "num_frequencies": 5}
    family, params = case(PerTensorMLP(**fields), blocks=(1,))
    quiet = cifar_resnet.hypernetwork(SPEC, (1,), PerTensorMLP(**fields, noise_scale=0.0))
    exact = generate(family, params, (3,))
    assert_same_tree(generate(quiet, params, (3,), key=fast_key(0)), exact, tolerance=0)
    moved = generate(family, params, (3,), key=fast_key(0))["stage1_block1"]
    for layer in LAYERS:
        for kind in KINDS:
            change = np.abs(moved[layer][kind] - exact["stage1_block1"][layer][kind])
            assert 1e-4 < change.max() < 10
    assert not np.asarray(moved["conv1"]["bias"])[3:].any()  # noise stays behind the mask


# --- starting at a backbone ------------------------------------------------------------------


@functools.cache
def random_backbone():
    return scrambled(jax.eval_shape(lambda k: cifar_resnet.init_params(k, SPEC), fast_key(0)), 3)


@functools.cache
def measured_moments():
    family = cifar_resnet.family(SPEC)
    names = [cifar_resnet.hidden_group(SPEC.blocks[n]) for n in BLOCKS]
    return jax.jit(lambda params: elastic.moments(family, params, IMAGES, names))(random_backbone())


@functools.partial(jax.jit, static_argnums=0)
def _init(family, backbone, moments):
    return hyper.init(fast_key(0), family, backbone, moments=moments)


def started(inr, moments=None, blocks=BLOCKS):
    """The family of the INR, and its parameters where they start at the backbone."""
    family = cifar_resnet.hypernetwork(SPEC, blocks, inr)
    return family, _init(family, random_backbone(), moments)


def test_a_fresh_family_starts_with_the_alpha_asked_for_and_the_backbone_around_it():
    family, backbone = cifar_resnet.hypernetwork(SPEC, (2,), INRS["cell grid"]), random_backbone()
    learned = {**backbone, "stage2_block0": {"shortcut": backbone["stage2_block0"]["shortcut"]}}
    for kwargs, alpha in (({}, 1.0), ({"alpha": 0.5}, 0.5)):
        params = hyper.init(fast_key(0), family, backbone, **kwargs)
        assert params["alpha"].tolist() == [alpha]
        assert_same_tree(params["learned"], learned, tolerance=0)


@pytest.mark.parametrize("name", ["cell grid", "nested grid", "projection"])
def test_kinds_with_a_closed_form_start_at_the_backbone(name):
    moments = measured_moments() if name == "projection" else None
    family, params = started(INRS[name], moments)
    tolerance = 2e-6 if name == "cell grid" else 0
    tree = generate(family, params, family.widths(1.0))
    assert_same_tree(tree, random_backbone(), tolerance)


def test_a_start_elsewhere_is_what_the_inr_draws():
    family, backbone = cifar_resnet.hypernetwork(SPEC, (2,), Grid()), random_backbone()
    drawn = hyper.init(fast_key(0), family, backbone, from_backbone=False)["inr"]
    chex.assert_trees_all_close(drawn, family.inr.init(fast_key(0), family.stacks), rtol=1e-6)


# --- projections -----------------------------------------------------------------------------


def test_without_moments_a_projection_is_a_nested_slice():
    family, params = started(Projection())
    widths = (2, 3, 5)
    sliced = elastic.mask_params(family.groups, random_backbone(), family.by_name(widths))
    assert_same_tree(generate(family, params, widths), sliced)


def test_a_projection_has_its_moments_wherever_its_values_start():
    family, moments = cifar_resnet.hypernetwork(SPEC, BLOCKS, Projection()), measured_moments()
    params = hyper.init(
        fast_key(0), family, random_backbone(), from_backbone=False, moments=moments
    )
    for stack, row, _, layer, kind in rows_of(family):
        reads = (layer, kind) == ("conv2", "kernel")
        assert ("moments" in params["inr"][stack.name]) == reads
        if reads:
            kept = params["inr"][stack.name]["moments"][row]
            np.testing.assert_array_equal(kept, moments[stack.paths[row]])


def without_depth_term(family, params, widths):
    """The family, and parameters, that have the weights of one network of a family with the term.

    Its values are those at the share of skipped blocks in each stage.
    """
    skipped = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
    for stage in skipped:
        positions = [p for p, n in enumerate(BLOCKS) if SPEC.blocks[n].stage == stage]
        if positions:
            skipped[stage] = float(np.mean([widths[p] == 0 for p in positions]))
    fields = {}
    for stack in family.stacks:
        entry = params["inr"][stack.name]
        values = np.array(entry["values"])
        values[:, 0] += skipped[int(stack.name[len("stage")])] * values[:, 2]
        fields[stack.name] = {**entry, "values": values[:, :2]}
    stages = {block.name: block.stage for block in SPEC.blocks} | {"stem": 1, "head": 3}
    learned = {
        name: jax.tree.map(
            lambda x, d, s=stages[name]: x + skipped[s] * d, layers, params["depth"][name]
        )
        for name, layers in params["learned"].items()
    }
    params = {"inr": fields, "alpha": params["alpha"], "learned": learned}
    return cifar_resnet.hypernetwork(SPEC, BLOCKS, INRS["projection"]), params


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_a_depth_term_counts_as_far_as_blocks_of_its_stage_are_skipped(widths):
    family, params = case(Projection(num_terms=2, modulated=True, depth_term=True))
    tree = generate(family, params, widths)
    plain, plain_params = without_depth_term(family, params, widths)
    assert_same_tree(tree, generate(plain, plain_params, widths))
    as_learned = np.array_equal(tree["stem"]["kernel"], params["learned"]["stem"]["kernel"])
    assert as_learned == all(widths)


@pytest.mark.parametrize("terms", [{"depth_term": True}, {"width_terms": (0.5,)}], ids=str)
def test_terms_start_at_nothing(terms):
    family, params = started(Projection(**terms), measured_moments())
    plain, plain_params = started(Projection(), measured_moments())
    for widths in (WIDTHS["uneven"], WIDTHS["skipped"]):
        assert_same_tree(
            generate(family, params, widths), generate(plain, plain_params, widths), tolerance=0
        )


@pytest.mark.parametrize(
    ("ratio", "one", "two"),
    [
        (1.25, 0, (0, 0)),
        (1, 0, (0, 0)),
        (0.5, 1, (1, 0)),
        (0.5**1.5, 1.5, (0.5, 1)),
        (0.25, 2, (0, 2)),
    ],
)
def test_a_width_term_counts_at_its_width_and_not_at_the_next(ratio, one, two):
    terms = (0.5, 0.25, 0.125)
    for wanted in ((one,), two, (*two, 0)):
        found = width_counts(jnp.float32(ratio), terms[: len(wanted)])
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert width_counts(jnp.float32(0.125), (0.5, 0.25)).tolist() == [0, 4]


def test_a_term_for_more_than_half_of_the_width_counts_once():
    terms = (0.75, 0.5)
    np.testing.assert_allclose(width_counts(jnp.float32(0.75), terms), (1, 0), atol=1e-6)
    between = np.sqrt(np.float32(0.75))  # half of the way to the full width
    np.testing.assert_allclose(width_counts(between, terms), (0.5, 0), atol=1e-6)


@pytest.mark.parametrize("terms", [(1.0,), (0.5, 0.5), (0.25, 0.5), (0.5, 0.0)], ids=str)
def test_width_terms_have_to_descend(terms):
    with pytest.raises(ValueError, match="descend from below 1 to above 0, got"):
        Projection(width_terms=terms)


@pytest.mark.parametrize("widths", [WIDTHS["full"], WIDTHS["half"], (0, 2, 3)], ids=str)
def test_networks_are_those_of_the_sum_of_the_width_terms(widths):
    family, params = case(Projection(modulated=True, width_terms=(0.5, 0.25)))
    plain = cifar_resnet.hypernetwork(SPEC, BLOCKS, Projection(modulated=True))
    counts = np.array([1, widths != WIDTHS["full"], 0])

    def summed(leaves):
        values = np.einsum("m,tmrco->trco", counts, leaves["values"])
        return {**leaves, "values": values[:, None]}

    added = jax.tree.map(lambda x, w: x + counts[1] * w, params["learned"], params["width"]["1"])
    plain_params = {
        "inr": {name: summed(leaves) for name, leaves in params["inr"].items()},
        "alpha": params["alpha"],
        "learned": added,
    }
    wanted = generate(plain, plain_params, widths)
    assert_same_tree(generate(family, params, widths), wanted, tolerance=1e-5)


def test_a_projection_beyond_the_full_width_is_the_same_function():
    family, params = case(INRS["projection"])
    exact = apply(SPEC, generate(family, params, family.full_widths), IMAGES)
    for widths in ((5, 8, 9), (4, 11, 13)):
        larger = morph(SPEC, BLOCKS, widths)
        logits = apply(larger, generate(family, params, widths, sizes=widths), IMAGES)
        np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_a_projection_loses_less_than_a_nested_slice():
    rng = np.random.default_rng(4)
    # Correlated activations, as those of a layer are, in an image without an edge.
    mixing = rng.normal(size=(4, 4)) + 1
    hidden = np.maximum(rng.normal(size=(16, 8, 8, 4)) @ mixing + 0.5, 0)
    rows = np.concatenate([hidden.reshape(-1, 4), np.ones((16 * 64, 1))], axis=1)
    moments = {"stage1_block1/conv2/kernel": np.asarray(rows.T @ rows / len(rows), np.float32)}
    pair = (
        started(Projection(), moments, blocks=(1,)),
        started(INRS["nested grid"], blocks=(1,)),
    )

    def output(tree):
        kernel, bias = (np.asarray(tree["stage1_block1"]["conv2"][kind]) for kind in KINDS)
        patches = np.lib.stride_tricks.sliding_window_view(hidden, (3, 3), axis=(1, 2))
        return np.einsum("bxyihw,hwio->bxyo", patches, kernel) + bias

    exact, losses = output(random_backbone()), []
    for width in (1, 2, 3):
        loss, nested_loss = (
            np.mean((output(generate(*family_and_params, (width,))) - exact) ** 2)
            for family_and_params in pair
        )
        assert loss < 0.7 * nested_loss
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)


def test_a_network_drawn_through_wider_cells_computes_what_a_narrower_one_does():
    family, params = started(Projection(max_cell=2.0), measured_moments())
    plain = cifar_resnet.hypernetwork(SPEC, BLOCKS, Projection())
    wide = (2, 2, 4)
    logits = {
        widths: apply(SPEC, generate(plain, params, widths), IMAGES)
        for widths in (wide, (1, 1, 2), (1, 1, 3), (2, 2, 3))
    }
    met = set()
    for seed in range(16):
        tree = generate(family, params, wide, key=fast_key(seed))
        drawn = apply(SPEC, tree, IMAGES)
        # As many channels as asked for, whatever the cells.
        for position, width in enumerate(wide):
            kernel = np.asarray(tree[block_name(position)]["conv1"]["kernel"])
            assert kernel.any((0, 1, 2)).sum() == width
        close = [w for w, x in logits.items() if np.abs(drawn - x).max() < 1e-4]
        assert close
        met.update(close)
    assert {wide, (1, 1, 2)} <= met
    full = generate(family, params, family.full_widths, key=fast_key(1))
    assert_same_tree(full, random_backbone(), tolerance=0)


# --- in training -----------------------------------------------------------------------------


@one_of_each_class
@pytest.mark.parametrize("source, target", [(0, 1), (1, 2)], ids=["same stage", "another stage"])
def test_a_copied_block_has_the_inr_of_its_source_where_they_share_a_stack(inr, source, target):
    family, params = case(inr)
    copied = jax.jit(lambda tree: inr.copy_group(tree, family.stacks, source, target))(
        params["inr"]
    )
    expected = jax.tree.map(np.array, params["inr"])
    for stack in family.stacks:
        if {source, target} <= set(stack.owners):
            for path, leaf in jax.tree.leaves_with_path(expected[stack.name]):
                if jax.tree_util.keystr(path, simple=True) != "moments":  # each block's own
                    assert (leaf[1] != leaf[0]).any()
                    leaf[1] = leaf[0]
    chex.assert_trees_all_equal(copied, expected)
    if target == 1 and not isinstance(inr, PerTensorMLP):  # which knows the tensor's coordinate
        widths = family.full_widths if isinstance(inr, Projection) else (3, 3, 5)
        tree = generate(family, {**params, "inr": copied, "alpha": np.ones(3)}, widths)
        assert_same_tree(tree["stage1_block1"], tree["stage1_block0"], tolerance=0)


@one_of_each_class
def test_a_masked_update_changes_only_active_blocks(inr):
    family, params = case(inr)
    active = np.array([False, True, True])

    mask = inr.update_mask(params["inr"], family.stacks, active)
    updated = jax.jit(lambda inr: jax.tree.map(lambda p, m: p + 0.1 * m, inr, mask))(params["inr"])
    assert jax.tree.map(np.shape, updated) == jax.tree.map(np.shape, params["inr"])
    before = generate(family, params, WIDTHS["half"])
    after = generate(family, {**params, "inr": updated}, WIDTHS["half"])
    for stack, row, position, layer, kind in rows_of(family):
        tensors = updated[stack.name]
        if "moments" in tensors:
            np.testing.assert_array_equal(tensors["moments"], params["inr"][stack.name]["moments"])
        old, new = (tree[block_name(position)][layer][kind] for tree in (before, after))
        assert bool((old != new).any()) == active[position], stack.paths[row]


# --- descriptions and refusals ---------------------------------------------------------------


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
    with refused("channel_dropout"):
        make_inr(**fields, channel_dropout=0.5)


def test_unknown_kinds_and_fields_of_inrs_are_refused():
    with refused(f"{sorted(INR_KINDS)}, got 'siren'".replace("[", r"\[").replace("]", r"\]")):
        make_inr("siren")
    with refused("takes .*'hidden_width'.*got also .*'hidden_widht'"):
        make_inr("per_tensor_mlp", hidden_widht=8)
    with pytest.raises(ValueError, match="ResNetSpec is not in INR_KINDS"):
        describe_inr(SPEC)


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
    with refused(given):
        make_inr(kind, **fields)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "widths, words",
    [
        (np.array([4.0, 4.0, 6.0], np.float32), "float32"),
        ([0.5, 0.5, 1.5], "float64"),  # ratios, which must not become skipped blocks
        ([4, 4, 6, 6], r"each of the 3 elastic groups, got shape \(4,\)"),
        (np.array(4), r"got shape \(\)"),
        ([4, 5, 6], "stage1_block1/conv1 takes widths from 0 to 4, got 5; .* need .*sizes="),
        ([4, -1, 6], "stage1_block1/conv1 takes widths from 0 to 4, got -1"),
        ([4, 4, 0], "stage2_block0/conv1 takes widths from 1 to 6, got 0"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths, words, dense):
    family, params = case(INRS["cell grid"])
    sizes = (4, 4, 6) if dense else None
    with refused(words):
        hyper.generate(family, params, widths, sizes=sizes)


@pytest.mark.parametrize("widths", [(4, 5, 6), (4, -1, 6), (4, 4, 0)])
def test_traced_widths_that_do_not_fit_give_nan(widths):
    family, params = case(INRS["cell grid"])
    for leaf in jax.tree.leaves(generate(family, params, widths)):
        assert np.isnan(leaf).all()
    assert not np.isnan(generate(family, params, (4, 4, 6))["head"]["kernel"]).any()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_samples": 2}, "num_samples=2"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"sample_batch": 0}, "sample_batch=0"),
        ({"dtype": "int8"}, "'int8'"),
        ({"dtype": "bfloat"}, "'bfloat'"),
        ({"dtype": np.int32}, "int32"),
    ],
    ids=str,
)
def test_samples_without_a_key_and_types_without_fractions_are_refused(options, words):
    family, params = case(INRS["cell grid"])
    with refused(words):
        hyper.generate(family, params, family.widths(1.0), **options)


def test_a_group_of_one_channel_cannot_vary():
    with refused("has no stage1_block1/conv1; generate other blocks"):
        cifar_resnet.hypernetwork(morph(SPEC, (1,), (1,)), (0, 1), Grid())


def test_blocks_of_uneven_width_cannot_be_stacked():
    spec = morph(SPEC, (0,), (3,))
    family = cifar_resnet.hypernetwork(spec, BLOCKS, INRS["cell grid"])
    leaves = {
        path: np.zeros(shape) for path, shape in hyper.flat(cifar_resnet.param_shapes(spec)).items()
    }
    with refused(r"stage1_conv1_kernel .*, got \[\(3, 4, 9\), \(4, 4, 9\)"):
        hyper.pack(family, leaves)
