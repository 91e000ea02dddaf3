import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import refused

from neumeta_jax.core import hypernetwork as hyper, losses, start
from neumeta_jax.core.inr import Grid, PerTensorMLP, Projection
from neumeta_jax.core.optimizer import CLIP, inr_optimizer
from neumeta_jax.core.recipe import CHOICES, InrRecipe
from neumeta_jax.core.sizes import shallowest_widths
from neumeta_jax.core.update import (
    PhaseInputs,
    TrainState,
    draw_fit,
    draw_network,
    inr_update,
    phase_inputs,
    rate_scale,
    start_phase,
)
from neumeta_jax.data import preprocessing
from neumeta_jax.data.preprocessing import Images, Preprocessing
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import SHORTCUTS, generated_blocks, resnet_spec
from neumeta_jax.runs.loop import NonFiniteLossError, Steps
from neumeta_jax.runs.teacher import TeacherRecipe, teacher_init, teacher_update

# Two inner blocks, one in stage 1 and one in stage 2; a grid compiles faster than MLPs.
SPEC = resnet_spec(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
FAMILY = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC), Grid(noise_scale=0.5))
RECIPE = InrRecipe(
    batch_size=4,
    num_random_sizes=1,
    ce_weight=1.0,
    learning_rate=1e-2,
    alpha_learning_rate=1e-2,
    learned_learning_rate=1e-2,
    distillation_weight=0.5,
)
PREPROCESSING = Preprocessing((0.5,) * 3, (0.25,) * 3, crop_padding=1)
NUM_IMAGES = 24


@functools.cache
def family_of(depth, which="inner", inr=Grid(), stage_widths=(4, 6, 8), **fields):  # noqa: B008
    spec = resnet_spec(depth, num_classes=5, stage_widths=stage_widths, image_size=8, **fields)
    return cifar_resnet.hypernetwork(spec, generated_blocks(spec, which), inr)


def random_backbone(spec, seed=0):
    """Biases too are off their initial zeros."""
    rng = np.random.default_rng(seed)
    params = cifar_resnet.init_params(jax.random.key(seed), spec)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("float32"), params)


def random_images(seed=0):
    rng = np.random.default_rng(seed)
    return Images(
        jnp.asarray(rng.integers(0, 256, (NUM_IMAGES, 8, 8, 3)), jnp.uint8),
        jnp.asarray(rng.integers(0, 5, NUM_IMAGES), jnp.int32),
    )


def leaves(tree):
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def backbone():
    return random_backbone(SPEC)


@functools.partial(jax.jit, static_argnums=0, static_argnames="from_backbone")
def init(family, backbone, **options):
    return hyper.init(jax.random.key(1), family, backbone, **options)


@pytest.fixture(scope="module")
def params(backbone):
    return init(FAMILY, backbone, alpha=0.7, from_backbone=False)


@functools.partial(jax.jit, static_argnums=0)
def generate(family, params, widths):
    return hyper.generate(family, params, widths)


def prepare(key, images, labels):
    return PREPROCESSING.train(key, images, labels, SPEC.num_classes)


def phase_of(recipe, name="", family=FAMILY, **changes):
    """The last phase whose name has that in it, ten steps from 0 on, with `changes`."""
    phase = [p for p in recipe.phases(family, num_images=10_000) if name in p.name][-1]
    return dataclasses.replace(phase, **{"start": 0, "num_steps": 10, "warmup_steps": 0} | changes)


@functools.cache
def compiled(program, recipe, family, images_per_step, unroll):
    """Compiled once for all tests: that is where their time goes."""
    update = inr_update(family, recipe, program, prepare, family.forward, unroll=unroll)
    return Steps(update, images_per_step, 1 if unroll else 5)


def steps_of(recipe, name="", family=FAMILY, *, unroll=True):
    """Written out, a step per call, as on CPUs; else in loops, as accelerators run them."""
    phase = phase_of(recipe, name, family)
    return compiled(phase.program, recipe, family, phase.images_per_step, unroll)


# --- phases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("blocks_per_phase", [1, 2, 5])
@pytest.mark.parametrize("fit_steps, final_epochs", [(0, 0.0), (7, 1.5)])
def test_phases_cover_all_steps_without_gaps(mode, blocks_per_phase, fit_steps, final_epochs):
    recipe = InrRecipe(
        mode=mode,
        blocks_per_phase=blocks_per_phase,
        fit_steps=fit_steps,
        final_epochs=final_epochs,
        epochs=2.0,
        batch_size=5,
    )
    found = recipe.phases(family_of(20), num_images=100)
    assert found[0].start == 0
    for before, after in itertools.pairwise(found):
        assert before.stop == after.start
    joined = [n for phase in found for n in phase.new_blocks]
    assert joined == list(range(5))
    assert all(phase.start < phase.stop for phase in found)
    assert len({phase.program for phase in found if phase.loss}) == 1
    assert found[-1].num_active == 5


def test_resnet56_has_the_papers_23_phases_and_warms_up_where_a_stage_opens():
    spec = resnet_spec(56, num_classes=100)
    family = cifar_resnet.hypernetwork(spec, generated_blocks(spec), PerTensorMLP())
    recipe = InrRecipe()
    found = recipe.phases(family, num_images=50_000)
    assert len(found) == 23
    per_epoch = 50_000 / 512
    assert {phase.num_steps for phase in found} == {round(50 * per_epoch)}
    assert [phase.num_active for phase in found] == list(range(1, 24))
    warm = {n + 1: phase.warmup_steps for n, phase in enumerate(found) if phase.warmup_steps}
    assert warm == dict.fromkeys([1, 9, 17], round(20 * per_epoch))
    assert ["last" in phase.rates for phase in found] == [False] * 16 + [True] * 7


DEPTH = dataclasses.replace(
    RECIPE,
    mode="at_once",
    num_random_sizes=2,
    sandwich=True,
    skip_blocks=0.5,
    shallow_epochs=1.0,
    depth_epochs=1.0,
    depth_learning_rate=2e-2,
    weight_decay=0.0,
)
DEPTH_PHASES = ("shallow", "depth")
DEEP = cifar_resnet.hypernetwork(SPEC, FAMILY.blocks, Projection(modulated=True, depth_term=True))


@pytest.fixture(scope="module")
def deep_params(backbone):
    return init(DEEP, backbone)


def test_the_phases_of_the_depth_term_come_last_and_warm_up():
    family = family_of(20, inr=Projection(depth_term=True))
    recipe = dataclasses.replace(
        DEPTH, epochs=2.0, warmup_epochs=0.25, fit_steps=3, shallow_epochs=2.0
    )
    # Ten steps an epoch, with three sizes of four images; then 30 with one and 15 with two.
    found = recipe.phases(family, num_images=120)
    assert [phase.name for phase in found] == ["fit", "all blocks", "shallow", "depth"]
    assert [(p.start, p.stop, p.warmup_steps) for p in found[2:]] == [(23, 83, 8), (83, 98, 4)]
    assert all(phase.new_blocks == () and phase.num_active == 5 for phase in found[2:])


@pytest.mark.parametrize(
    "name, num_random_sizes, expected",
    [("depth", 0, 1), ("depth", 1, 1), ("depth", 3, 3), ("shallow", 3, 1)],
)
def test_a_step_of_a_depth_phase_has_no_network_of_full_size(name, num_random_sizes, expected):
    recipe = dataclasses.replace(
        DEPTH, num_random_sizes=num_random_sizes, shallow_epochs=1.0, shallow_learning_rate=3e-3
    )
    family = family_of(20, inr=Projection(depth_term=True))
    phase = phase_of(recipe, name, family)
    assert (len(phase.sizes), phase.images_per_step) == (expected, 4 * expected)
    assert phase.rates == {"depth": {"depth": 2e-2, "shallow": 3e-3}[name]}
    widths = phase.sizes.draw(jax.random.key(0))
    assert len(widths) == expected
    np.testing.assert_array_equal(widths[0], shallowest_widths(family, recipe.max_skipped))


@pytest.mark.parametrize("kind", DEPTH_PHASES)
def test_phases_of_the_depth_term_need_one_and_blocks_to_skip(kind):
    epochs = {"shallow_epochs": 0.0, "depth_epochs": 0.0, f"{kind}_epochs": 1.0}
    recipe = dataclasses.replace(DEPTH, **epochs)
    with refused(rf"{kind}_epochs .* inr.depth_term"):
        recipe.phases(FAMILY, num_images=120)
    for field in ("skip_blocks", "max_skipped"):
        with refused(rf"{kind}_epochs .* needs skip_blocks > 0"):
            dataclasses.replace(recipe, **{field: 0.0})


def test_all_phases_warm_up_where_the_recipe_says_so():
    recipe = InrRecipe(warmup_phases="all", epochs=3.0, warmup_epochs=1.0, final_epochs=0.5)
    found = recipe.phases(family_of(20), num_images=5120)
    assert [phase.warmup_steps for phase in found] == [10] * 5 + [5]  # no longer than the phase


@pytest.mark.parametrize(
    "recipe, wanted",
    [
        (
            InrRecipe(fit_steps=3, epochs=1.0, final_epochs=2.0),
            [
                ("fit", 3, ()),
                ("block 1 of 2", 10, (0,)),
                ("block 2 of 2", 10, (1,)),
                ("final", 20, ()),
            ],
        ),
        (InrRecipe(mode="at_once", epochs=2.0), [("all blocks", 20, (0, 1))]),
        (InrRecipe(epochs=0.0), []),  # phases without steps are left out
    ],
    ids=["blockwise", "at once", "no epochs"],
)
def test_fit_comes_first_and_the_final_phase_last(recipe, wanted):
    found = recipe.phases(FAMILY, num_images=5120)
    assert [(p.name, p.num_steps, p.new_blocks) for p in found] == wanted


# --- recipe ----------------------------------------------------------------------------------


LENGTHS = [f.name for f in dataclasses.fields(InrRecipe) if f.name.endswith("epochs")]


@pytest.mark.parametrize(
    "fields, words",
    [
        *(({name: "upside"}, f"{name} must be one of .*, got 'upside'") for name in CHOICES),
        *(({name: -1}, name) for name in (*LENGTHS, "fit_steps")),
        *(({"min_width_ratio": low}, f"at most 1, got {low}") for low in (0.0, -0.5, 1.25)),
        ({"fixed_ratios": (0.75, 0.25)}, r"trained range \[0.5, 1\], got \(0.75, 0.25\)"),
        *(
            ({name: share}, rf"skip_blocks and max_skipped .* got .*{share}")
            for name in ("skip_blocks", "max_skipped")
            for share in (-0.1, 1.1)
        ),
        ({"batch_size": 0}, "got 0, 1, 3"),
        ({"blocks_per_phase": 0}, "got 128, 0, 3"),
        ({"num_random_sizes": -1}, "got 128, 1, -1"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_is_refused(fields, words):
    with refused(words):
        InrRecipe(**fields)


@pytest.mark.parametrize(
    "field, value", [("epochs", 0.0), ("batch_size", 0), ("learning_rate", 0.0)]
)
def test_a_teachers_recipe_refuses_what_trains_nothing(field, value):
    with refused(f"{field}={value}"):
        TeacherRecipe(**{field: value})


# --- schedules and widths --------------------------------------------------------------------


@pytest.mark.parametrize("schedule", CHOICES["schedule"])
@pytest.mark.parametrize("num_steps, warmup_steps", [(40, 10), (40, 0), (10, 10)])
def test_schedules_warm_up_linearly_and_stay_or_fall_by_half_a_cosine(
    schedule, num_steps, warmup_steps
):
    done = np.arange(num_steps)
    after = np.ones(num_steps)
    if schedule == "cosine":
        after = 0.5 * (1 + np.cos(np.pi * (done - warmup_steps) / max(num_steps - warmup_steps, 1)))
    wanted = np.where(done < warmup_steps, (done + 1) / max(warmup_steps, 1), after)
    phase = PhaseInputs(100, num_steps, warmup_steps, schedule == "cosine", None, None, None)
    actual = rate_scale(100 + done, phase)
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


WIDE = family_of(20, stage_widths=(16, 32, 64))


def drawn(recipe, num=2000, *, family=WIDE, seed=0, name="block"):
    """int[num, names]: the networks of a step beside the full one."""
    recipe = dataclasses.replace(recipe, num_random_sizes=num)
    sizes = phase_of(recipe, name, family).sizes
    return np.asarray(sizes.draw(jax.random.key(seed)))[int(sizes.with_full) :]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_sampled_widths_fill_the_trained_range_and_a_share_of_them_is_uneven(share):
    recipe = InrRecipe(min_width_ratio=0.3, per_block_widths=share)
    widths = drawn(recipe)
    assert widths.shape == (2000, 5) and widths.dtype == np.int32
    np.testing.assert_array_equal(widths.min(0), WIDE.widths(0.3))
    np.testing.assert_array_equal(widths.max(0), WIDE.full_widths)
    ratios = drawn(InrRecipe(per_block_widths=share)) / np.array(WIDE.full_widths)
    uneven = ratios.max(1) - ratios.min(1) > 1 / 16
    assert np.mean(uneven) == pytest.approx(share, abs=0.04)


def test_a_width_is_at_least_one_channel():
    assert np.all(drawn(InrRecipe(min_width_ratio=0.01), 200, family=FAMILY).min(0) == 1)


def test_the_sandwich_draws_the_smallest_widths_first_and_the_rest_at_random():
    plain, sandwich = (drawn(InrRecipe(sandwich=flag), 4, seed=3) for flag in (False, True))
    np.testing.assert_array_equal(sandwich[0], WIDE.widths(0.5))
    np.testing.assert_array_equal(sandwich[1:], plain[1:])
    assert drawn(InrRecipe(sandwich=True), 0).shape == (0, 5)


def test_fixed_ratios_follow_the_smallest_and_the_shallowest_and_leave_the_other_draws():
    fields = {"sandwich": True, "min_width_ratio": 0.25, "skip_blocks": 0.5}
    plain = drawn(InrRecipe(**fields), 6, seed=3)
    found = drawn(InrRecipe(**fields, fixed_ratios=(0.75, 0.5)), 6, seed=3)
    np.testing.assert_array_equal(found[[0, 1, 4, 5]], plain[[0, 1, 4, 5]])
    np.testing.assert_array_equal(found[2:4], [WIDE.widths(0.75), WIDE.widths(0.5)])


def test_a_share_of_the_random_sizes_skips_the_last_blocks_up_to_a_share_of_each_stage():
    family = family_of(32, stage_widths=(16, 32, 64))
    stages = np.array(family.stages)  # 4, 4 and 3 blocks
    skipped = drawn(InrRecipe(skip_blocks=0.6, max_skipped=0.5), 4000, family=family) == 0
    for stage in (1, 2, 3):
        members = skipped[:, stages == stage]
        counts = np.bincount(members.sum(1), minlength=4) / len(members)
        # 0, 1 or 2 blocks are equally likely in the 60 % that skip; half of 3 is rounded up.
        np.testing.assert_allclose(counts, [0.6, 0.2, 0.2, 0], atol=0.03)
        share = members.mean(0)
        np.testing.assert_allclose(share[-2:], [0.2, 0.4], atol=0.03)
        assert not share[:-2].any()
    # Stages are independent of each other.
    assert np.mean(skipped.sum(1) == 6) == pytest.approx(0.6 / 27, abs=0.01)


def test_skipping_leaves_the_other_draws_and_the_smallest_size_alone():
    plain = drawn(InrRecipe(sandwich=True), 50, seed=3)
    recipe = InrRecipe(sandwich=True, skip_blocks=1.0, max_skipped=1.0)
    skipping = drawn(recipe, 50, seed=3)
    np.testing.assert_array_equal(skipping[0], plain[0])
    np.testing.assert_array_equal(skipping[1], shallowest_widths(WIDE, 1.0))
    assert (skipping[2:] == 0).any()
    np.testing.assert_array_equal(skipping[2:], np.where(skipping == 0, 0, plain)[2:])


@pytest.mark.parametrize(
    "share, wanted",
    [(0.0, (16, 16, 32, 32, 64)), (0.5, (16, 0, 32, 0, 0)), (1.0, (0, 0, 0, 0, 0))],
)
def test_the_shallowest_network_has_full_widths_and_lacks_the_last_blocks_of_each_stage(
    share, wanted
):
    assert shallowest_widths(WIDE, share) == wanted


@pytest.mark.parametrize("sandwich", [True, False])
def test_the_depth_phase_draws_networks_that_skip_blocks(sandwich):
    recipe = InrRecipe(
        sandwich=sandwich,
        skip_blocks=0.1,
        max_skipped=1.0,
        min_width_ratio=0.25,
        depth_epochs=1.0,
    )
    wide = dataclasses.replace(WIDE, inr=Projection(depth_term=True))
    draw = functools.partial(drawn, num=40, family=wide)
    widths = draw(recipe, name="depth")
    assert widths.shape == (40, 5)
    # Up to all of 2, 2 and 1 blocks: one network in 3 x 3 x 2 keeps them all.
    assert (widths == 0).any(1).mean() > 0.8
    of_half = draw(dataclasses.replace(recipe, max_skipped=0.5), name="depth")
    np.testing.assert_array_equal(of_half[0], (16, 0, 32, 0, 0))
    smallest = (of_half[1:] == (4, 0, 8, 0, 0)).all(1)
    assert smallest[0] if sandwich else not smallest.any()


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_blocks_that_change_the_shape_are_never_skipped(shortcut):
    family = family_of(14, "all", shortcut=shortcut)
    recipe = InrRecipe(skip_blocks=1.0, max_skipped=1.0)
    skipped = drawn(recipe, 500, family=family) == 0
    skippable = np.array([block.skippable for block in family.spec.blocks])
    np.testing.assert_array_equal(skipped.any(0), skippable)


# --- starting a phase ------------------------------------------------------------------------


@pytest.mark.parametrize("inr", [PerTensorMLP(4, 1, 1), Grid()], ids=["mlp", "grid"])
def test_a_new_block_starts_from_the_previous_block_of_its_stage_only(inr):
    family = family_of(20, inr=inr)  # inner blocks in stages 1, 1, 2, 2, 3
    start = init(family, random_backbone(family.spec), alpha=0.7, from_backbone=False)
    recipe = InrRecipe(epochs=1.0, alpha_init=0.25)
    same_stage = {1: 0, 3: 2}
    for phase in recipe.phases(family, num_images=512):
        state = start_phase(start, family, recipe, phase)
        (new,) = phase.new_blocks
        wanted = np.full(5, 0.7, "float32")
        wanted[new] = 0.25
        np.testing.assert_array_equal(state.params["alpha"], wanted)
        for stack in family.stacks:
            for row, position in enumerate(stack.owners):
                source = row
                if position == new and new in same_stage:
                    source = stack.owners.index(same_stage[new])
                got = jax.tree.map(lambda p, r=row: p[r], state.params["inr"][stack.name])
                old = jax.tree.map(lambda p, s=source: p[s], start["inr"][stack.name])
                chex.assert_trees_all_equal(got, old)


@pytest.mark.parametrize(
    "new_blocks, fields", [((), {}), ((0, 1), {"block_init": "teacher", "alpha_init": 1.0})]
)
def test_blocks_that_do_not_join_or_start_from_the_teacher_are_kept(params, new_blocks, fields):
    recipe = InrRecipe(**fields)
    state = start_phase(params, FAMILY, recipe, phase_of(recipe, new_blocks=new_blocks))
    alpha = jnp.ones(2) if fields else params["alpha"]
    chex.assert_trees_all_equal(state.params, {**params, "alpha": alpha})


def test_a_phase_starts_with_a_fresh_optimiser_in_buffers_of_its_own(params):
    """The step donates all of them, and a buffer can be donated once."""
    recipe = dataclasses.replace(RECIPE, ema_decay=0.9)
    state = start_phase(params, FAMILY, recipe, phase_of(recipe))
    chex.assert_trees_all_equal(state.opt_state, inr_optimizer(recipe).init(params))
    buffers = [
        [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.size]
        for tree in (params, state)
    ]
    assert not set(buffers[0]) & set(buffers[1])
    assert len(set(buffers[1])) == len(buffers[1])


# --- the optimiser ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def first_update(recipe, params):
    """The first update for gradients of ones and noise, without the learning rate."""
    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(params))))
    grads = jax.tree.map(lambda x: 1 + jax.random.normal(next(keys), x.shape), params)
    optimizer = inr_optimizer(recipe)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize(
    "inr, leaf, matrix",
    [
        # [tensors, terms, rows, columns, 9] as [rows, columns * 9]
        (Grid(), ("stage1_conv1_kernel", "values"), lambda x: x[0, 0].reshape(x.shape[2], -1)),
        (
            PerTensorMLP(hidden_width=8, num_layers=3),
            ("stage1_conv1_kernel", "hidden2", "kernel"),
            lambda x: x[0],
        ),
    ],
)
def test_muon_makes_the_singular_values_of_an_inrs_matrices_about_equal(inr, leaf, matrix):
    family = family_of(14, inr=inr)
    params = init(family, random_backbone(family.spec))
    recipe = dataclasses.replace(RECIPE, optimizer="muon", weight_decay=0.0)
    update = first_update(recipe, {"inr": {leaf[0]: params["inr"][leaf[0]]}})["inr"]
    for name in leaf:
        update = update[name]
    values = jnp.linalg.svd(matrix(update), compute_uv=False)
    assert values[0] < 2 * values[-1]
    assert rms(matrix(update)) == pytest.approx(0.2, rel=0.2)


def test_stacking_matrices_of_a_shape_changes_no_update(params):
    """Against the same optimiser, leaf by leaf."""
    recipe = dataclasses.replace(RECIPE, optimizer="muon")
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    plain = optax.contrib.muon(
        1.0,
        weight_decay=recipe.weight_decay,
        adam_weight_decay=recipe.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda leaf: numbers if leaf.ndim == 4 else None, tree
        ),
    )
    learned = params["learned"]
    plain = optax.chain(optax.clip(CLIP), plain)
    grads = jax.tree.map(
        lambda x: jnp.sin(jnp.arange(x.size, dtype="f4")).reshape(x.shape), learned
    )
    found = []
    for optimizer in (plain, inr_optimizer(recipe)):
        state = optimizer.init(learned)
        for _ in range(2):
            update, state = jax.jit(optimizer.update)(grads, state, learned)
        found.append(update)
    chex.assert_trees_all_close(*found, rtol=1e-3, atol=1e-5)


def test_muon_takes_kernels_outside_the_inr_and_leaves_the_rest_to_adamw(params):
    recipe = dataclasses.replace(RECIPE, optimizer="muon", weight_decay=0.0)
    chosen = {"alpha": params["alpha"], "learned": {"stem": params["learned"]["stem"]}}
    update = first_update(recipe, chosen)
    stem = update["learned"]["stem"]["kernel"].reshape(-1, 4)
    values = jnp.linalg.svd(stem, compute_uv=False)
    assert values[0] < 2 * values[-1]
    # Adam's first step has the length of the learning rate, 1; Nesterov's momentum adds to it.
    for values in (update["alpha"], update["learned"]["stem"]["bias"]):
        np.testing.assert_allclose(np.abs(values), 1.4737, rtol=1e-3)


# --- a step ----------------------------------------------------------------------------------


def step_once(params, backbone, recipe=RECIPE, name="", family=FAMILY, *, unroll=True, **changes):
    """(state, metrics) after a step of the phase of that name, with `changes`."""
    phase = phase_of(recipe, name, family, **{"new_blocks": ()} | changes)
    state = start_phase(params, family, recipe, phase)
    inputs = phase_inputs(params, family, recipe, phase)
    order, zero = jnp.arange(NUM_IMAGES), np.int32(0)
    place = zero, np.int32(1), jax.random.key(5), random_images(), order, zero
    call = steps_of(recipe, name, family, unroll=unroll).call
    return call(state, *place, backbone, inputs)[:2]


def test_a_step_changes_active_blocks_and_nothing_else(params, backbone):
    state, _ = step_once(params, backbone, name="block 1")
    before, after = leaves(params), leaves(state.params)
    for stack in FAMILY.stacks:
        for name in [n for n in before if n.startswith(f"['inr']['{stack.name}']")]:
            for row, position in enumerate(stack.owners):
                same = np.array_equal(before[name][row], after[name][row])
                assert same == (position > 0), (name, row)
    changed = before["['alpha']"] != after["['alpha']"]
    np.testing.assert_array_equal(changed, [True, False])
    for name in [n for n in before if n.startswith("['learned']")]:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_the_last_block_and_the_head_learn_once_the_last_stage_with_new_blocks_is_reached(
    params, backbone
):
    state, _ = step_once(params, backbone)
    before, after = leaves(params["learned"]), leaves(state.params["learned"])
    changed = {n.split("'")[1] for n in before if not np.array_equal(before[n], after[n])}
    assert changed == {"stage3_block1", "head"}
    assert not np.any(np.asarray(params["alpha"]) == np.asarray(state.params["alpha"]))


@pytest.mark.parametrize("learned, flag", [("all", 1.0), ("none", 0.0)])
def test_all_or_none_of_the_learned_parameters_train(params, learned, flag):
    recipe = dataclasses.replace(RECIPE, learned=learned)
    inputs = phase_inputs(params, FAMILY, recipe, phase_of(recipe, "block 1"))
    rates = set(map(float, jax.tree.leaves(inputs.rates["learned"])))
    assert rates == {flag * np.float32(recipe.learned_learning_rate)}


@pytest.mark.parametrize("kind", DEPTH_PHASES)
@pytest.mark.parametrize("distill_from", CHOICES["distill_from"])
def test_the_depth_term_changes_no_network_that_has_all_blocks(
    distill_from, kind, deep_params, backbone
):
    recipe = dataclasses.replace(DEPTH, distill_from=distill_from)
    state, metrics = step_once(deep_params, backbone, recipe, kind, DEEP)
    before, after = leaves(deep_params), leaves(state.params)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all("['depth']" in name or "['values']" in name for name in changed)
    assert "shallow_accuracy" in metrics and "full_accuracy" not in metrics
    for widths, same in ((DEEP.full_widths, True), ((2, 3), True), ((4, 0), False)):
        widths = jnp.array(widths)
        old, new = (leaves(generate(DEEP, tree, widths)) for tree in (deep_params, state.params))
        assert all(np.array_equal(old[name], new[name]) for name in old) == same


@pytest.mark.parametrize("kind", DEPTH_PHASES)
def test_phases_of_the_depth_term_have_a_rate_of_their_own(kind, deep_params, backbone):
    changes = []
    for rate in (1e-2, 2e-2):
        state, _ = step_once(deep_params, backbone, DEPTH, kind, DEEP, rates={"depth": rate})
        changes.append(state.params["depth"])  # zero before
    chex.assert_trees_all_close(changes[1], jax.tree.map(lambda x: 2 * x, changes[0]), rtol=1e-5)


def test_with_no_block_active_the_network_is_the_teacher(params, backbone):
    images = jax.random.normal(jax.random.key(2), (3, 8, 8, 3))
    apply = jax.jit(lambda tree: cifar_resnet.apply(SPEC, tree, images))
    full = jnp.array(FAMILY.full_widths)
    tensors = hyper.flat(backbone)
    draw = jax.jit(lambda active: draw_network(FAMILY, params, tensors, active, full)[0])

    def logits(active):
        return apply(draw(jnp.array(active)))

    teacher = apply(backbone)
    np.testing.assert_array_equal(logits([False, False]), teacher)
    assert np.max(np.abs(logits([True, False]) - teacher)) > 1e-3
    whole = generate(FAMILY, params, full)
    np.testing.assert_array_equal(logits([True, True]), apply(whole))


SHARED = dataclasses.replace(RECIPE, share_images=True)


def same_update(one, other):
    (state, metrics), (other_state, other_metrics) = one, other
    chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-4, atol=1e-6)
    # The first moment is the gradient; the update of Adam's first step is its sign.
    chex.assert_trees_all_close(other_state.opt_state, state.opt_state, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "recipe, unroll, other_unroll, micro_batch",
    [(RECIPE, True, False, 0), (RECIPE, False, False, 2), (SHARED, False, False, 1)],
    ids=["written out", "micro-batches", "micro-batches of shared images"],
)
def test_loops_and_micro_batches_change_nothing_but_rounding(
    recipe, unroll, other_unroll, micro_batch, params, backbone
):
    changed = dataclasses.replace(recipe, micro_batch=micro_batch)
    same_update(
        step_once(params, backbone, recipe, unroll=unroll),
        step_once(params, backbone, changed, unroll=other_unroll),
    )


@pytest.mark.parametrize("kind", DEPTH_PHASES)
def test_loops_change_no_update_of_the_depth_term(kind, deep_params, backbone):
    same_update(
        *(
            step_once(deep_params, backbone, DEPTH, kind, DEEP, unroll=unroll)
            for unroll in (True, False)
        )
    )


def test_the_gradient_is_the_mean_over_the_sizes(params, backbone):
    """Against the loss written out for one size after the other."""
    _, metrics = step_once(params, backbone)
    width_key, data_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(5), 0), 3)
    drawn = phase_of(RECIPE).sizes.draw(width_key)[1]
    images = random_images()
    x, y = PREPROCESSING.train(data_key, images.images[:8], images.labels[:8], SPEC.num_classes)
    keys = jax.random.split(noise_key, 2)

    def loss(params, widths, key, x, y, full):
        generated = hyper.generate_tensors(FAMILY, params["inr"], widths, key=key)
        tree = hyper.nested(hyper.flat(params["learned"]) | generated)
        for position, name in enumerate(["stage1_block1", "stage2_block1"]):
            last = tree[name]["conv2"]
            tree[name]["conv2"] = jax.tree.map(lambda w, n=position: params["alpha"][n] * w, last)
        logits = cifar_resnet.apply(SPEC, tree, x)
        soft_labels = cifar_resnet.apply(SPEC, backbone, x)
        return (
            losses.cross_entropy(logits, y)
            + 1e-3 * losses.weight_norm(generated)
            + full * losses.reconstruction(generated, hyper.flat(backbone))
            + 0.5 * losses.distillation(logits, soft_labels)
        )

    value = jax.jit(loss)
    full = jnp.array(FAMILY.full_widths)
    total = value(params, full, keys[0], x[:4], y[:4], 1.0)
    total += value(params, drawn, keys[1], x[4:], y[4:], 0.0)
    np.testing.assert_allclose(metrics["loss"], total / 2, rtol=1e-4)


def toy_update(poisoned=-1):
    """Cheap to compile; its state remembers which images it saw, and in which order."""

    def update(state, step, key, images, indices):
        noise = jax.random.normal(jax.random.fold_in(key, step))
        seen = state.params["seen"] * 31 + jnp.sum(indices * jnp.arange(1, 5)).astype("uint32")
        params = {"seen": seen, "w": 0.9 * state.params["w"] + noise}
        loss = jnp.where(step == poisoned, jnp.nan, params["w"])
        metrics = {"loss": loss, "grad_norm": jnp.float32(1), "last": jnp.float32(indices[-1])}
        return TrainState(params, state.opt_state), metrics

    return update


def run_toy(start, stop, *, steps_per_call, state=None, poisoned=-1, **options):
    """Steps on the random images, four a step."""
    state = state or TrainState({"seen": jnp.uint32(7), "w": jnp.float32(0)}, ())
    options |= {"key": jax.random.key(9), "images": random_images()}
    steps = Steps(toy_update(poisoned), 4, steps_per_call)
    return steps.run(state, range(start, stop), **options)


def test_steps_in_chunks_see_the_same_data_in_the_same_order():
    wanted = run_toy(0, 17, steps_per_call=1).params  # 6 steps per epoch
    chex.assert_trees_all_close(run_toy(0, 17, steps_per_call=5).params, wanted, rtol=1e-6)
    assert run_toy(0, 16, steps_per_call=5).params["seen"] != wanted["seen"]


def test_an_epoch_shows_every_image_once():
    seen = []
    order = np.asarray(
        preprocessing.epoch_order(jax.random.split(jax.random.key(9))[0], 0, NUM_IMAGES)
    )
    run_toy(0, 6, steps_per_call=1, after=lambda step, state, m: seen.append(int(m["last"])))
    np.testing.assert_array_equal(seen, order[3::4])


@pytest.mark.parametrize("steps_per_call", [1, 5])
@pytest.mark.parametrize("interrupted", [1, 6, 7])
def test_where_a_run_was_interrupted_has_no_influence(steps_per_call, interrupted):
    wanted = run_toy(0, 13, steps_per_call=steps_per_call).params
    state = run_toy(0, interrupted, steps_per_call=steps_per_call)
    got = run_toy(interrupted, 13, steps_per_call=steps_per_call, state=state).params
    chex.assert_trees_all_equal(got, wanted)


def test_calls_end_at_epochs_and_at_every_stride():
    steps = []
    run_toy(0, 15, steps_per_call=5, every=(4, 0), after=lambda step, *_: steps.append(step))
    assert steps == [4, 5, 6, 8, 10, 12, 15]


def chunk_arguments(params, backbone):
    """What a looped call takes for two steps, on the device."""
    phase = phase_of(RECIPE)
    state = start_phase(params, FAMILY, RECIPE, phase)
    rest = backbone, phase_inputs(params, FAMILY, RECIPE, phase)
    order = jnp.arange(NUM_IMAGES)
    steps = np.int32(0), np.int32(2), jax.random.key(5), random_images(), order, np.int32(0)
    return jax.device_put((state, *steps, *rest))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_chunk_of_steps_lowers_for_accelerators_and_donates_its_state(params, backbone, platform):
    args = chunk_arguments(params, backbone)
    text = (
        steps_of(RECIPE, "", unroll=False)
        .call.trace(*args)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(args[0]))
    for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert word not in text


def test_a_chunk_of_steps_moves_nothing_between_host_and_device(params, backbone):
    call = steps_of(RECIPE, "", unroll=False).call
    call(*chunk_arguments(params, backbone))  # compiles
    args = chunk_arguments(params, backbone)
    with jax.transfer_guard("disallow"):
        state, _, bad = call(*args)
    assert int(bad) == -1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(args[0]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# --- fit -------------------------------------------------------------------------------------


def test_the_fit_phase_lowers_the_reconstruction_error_and_changes_the_inr_alone(params, backbone):
    recipe = dataclasses.replace(
        RECIPE, fit_steps=30, fit_learning_rate=1e-2, noise=False, ema_decay=0.99
    )
    phase = recipe.phases(FAMILY, num_images=NUM_IMAGES)[0]
    error = []
    end = steps_of(recipe, "fit").run(
        start_phase(params, FAMILY, recipe, phase),
        range(phase.stop),
        key=jax.random.key(9),
        images=random_images(),
        after=lambda step, state, metrics: error.append(metrics["loss"]),
        rest=(
            start.fit_target(FAMILY, recipe.fit_inr, FAMILY.network.family, backbone, x=None),
            phase_inputs(params, FAMILY, recipe, phase),
        ),
    )
    assert len(error) == 30 and error[-1] < 0.8 * error[0]
    for name in ("alpha", "learned"):
        chex.assert_trees_all_equal(end.params[name], params[name])
    before, after = (next(iter(leaves(tree["inr"]).values())) for tree in (params, end.params))
    assert not np.array_equal(before, after)
    # The next phase starts from the fit and not from an average of before.
    assert end.average is not None
    chex.assert_trees_all_equal(end.result, end.params)


def test_the_fit_phase_draws_random_widths_with_the_sandwich_too():
    recipe = dataclasses.replace(
        RECIPE, fit_steps=4, fit_widths="random", sandwich=True, skip_blocks=1.0
    )
    sizes = phase_of(recipe, "fit", WIDE).sizes
    found = [draw_fit(sizes, jax.random.key(0), n, noise=True).widths for n in range(20)]
    found = np.concatenate(found)
    assert (found[::2] == WIDE.full_widths).all()
    assert len(set(map(tuple, found[1::2]))) > 5 and (found >= WIDE.widths(0.5)).all()


# --- teacher ---------------------------------------------------------------------------------


def teach(recipe, preprocessing, stop, images_per_step=4, after=lambda *_: None):
    """(state before, state after) of `stop` steps of 25."""
    spec = resnet_spec(8, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    state = teacher_init(jax.random.key(0), cifar_resnet.Network(spec), recipe, 25)
    update = teacher_update(cifar_resnet.Network(spec), recipe, preprocessing, 25)
    before = leaves(state.params)
    given = {"key": jax.random.key(0), "images": random_images(), "after": after}
    end = Steps(update, images_per_step, 1).run(state, range(stop), **given)
    return before, leaves(end.params)


def test_a_teacher_learns_and_updates_its_statistics():
    recipe = TeacherRecipe(learning_rate=0.05)
    preprocessing = dataclasses.replace(PREPROCESSING, crop_padding=0, flip=False)
    error = []

    def after(step, state, metrics):
        error.append(metrics["loss"])

    before, end = teach(recipe, preprocessing, 25, NUM_IMAGES, after)
    assert error[-1] < 0.8 * error[0]
    assert all(not np.array_equal(before[name], end[name]) for name in before)


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(steps_per_call):
    seen = []

    def after(step, state, metrics):
        seen.append((step, float(state.params["w"])))

    with pytest.raises(NonFiniteLossError, match="at step 7 ") as error:
        run_toy(0, 12, steps_per_call=steps_per_call, poisoned=7, every=(2,), after=after)
    assert error.value.step == 7
    assert "\n" not in str(error.value)
    assert set(error.value.metrics) == {"loss", "grad_norm"}
    assert seen[-1][0] == (7 if steps_per_call == 1 else 6)
    assert np.all(np.isfinite([w for _, w in seen]))


def test_images_that_are_not_finite_stop_the_run_before_anything_is_saved():
    preprocessing = dataclasses.replace(PREPROCESSING, std=(0.25, float("nan"), 0.25))
    seen = []
    with pytest.raises(NonFiniteLossError, match=r"got .*loss = nan.* at step 0") as error:
        teach(TeacherRecipe(), preprocessing, 10, after=lambda *a: seen.append(a))
    assert error.value.step == 0
    assert seen == []


def test_an_update_that_is_not_finite_is_never_handed_on():
    recipe = TeacherRecipe(learning_rate=float("inf"))
    finite = []

    def after(step, state, metrics):
        finite.append(bool(jnp.isfinite(optax.global_norm(state.params["params"]))))

    with pytest.raises(NonFiniteLossError):
        teach(recipe, PREPROCESSING, 10, after=after)
    assert all(finite)


def test_the_message_names_phase_and_checkpoint():
    error = NonFiniteLossError(12, {"loss": float("inf")}, phase="fit", last_saved=8)
    assert "loss = inf at step 12 (fit); the checkpoint of step 8 is kept" in str(error)


def test_a_step_larger_than_the_training_split_is_refused():
    with refused(r"needs 32 images .* has 24; lower batch_size"):
        Steps(toy_update(), 32, 1).run(
            None, range(1), key=jax.random.key(0), images=random_images()
        )
