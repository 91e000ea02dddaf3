"""The comparison on networks of a few channels: parts against references, rows whole."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import ROOT, assert_refuses, load_module, random_pixels, refused, run

from neumeta_jax import elastic
from neumeta_jax.commands import compare
from neumeta_jax.comparison import baseline as baselines, pruning, run as runs, slimmable
from neumeta_jax.comparison.baseline import Baseline
from neumeta_jax.core import losses
from neumeta_jax.core.inr import make_inr
from neumeta_jax.core.update import TrainState
from neumeta_jax.data import datasets, preprocessing
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import evaluator
from neumeta_jax.networks import cifar_import, cifar_resnet, cifar_spec
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec
from neumeta_jax.networks.saved import INR_FILE
from neumeta_jax.report.comparisons import Row
from neumeta_jax.runs import checkpoint, recipes
from neumeta_jax.runs.config import from_config
from neumeta_jax.runs.teacher import TeacherRecipe, teacher_optimizer

CONFIG = "configs/baselines.py"
CONFIGS = load_module(CONFIG)
SPEC = resnet_spec(8, num_classes=5, stage_widths=(4, 6, 8), image_size=8, channels=3)
BLOCKS = generated_blocks(SPEC, "all")
FAMILY = cifar_resnet.hypernetwork(SPEC, BLOCKS, make_inr("grid"))
GROUPS = cifar_resnet.linen_groups(SPEC)
RATIOS = (1.0, 0.5)
HALF = tuple(SPEC.hidden_widths[n] // 2 for n in BLOCKS)
PLAIN = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=0, flip=False)


@functools.cache
def teacher():
    """Tensors under PyTorch's names, none of them one or zero by chance."""
    rng, found = np.random.default_rng(0), {}
    for name, (path, shape) in cifar_import.leaves(SPEC).items():
        if len(shape) > 1:
            found[name] = rng.normal(size=shape, scale=math.sqrt(2 / math.prod(shape[1:])))
        else:
            low, high = (0.5, 1.5) if path[-1] in ("scale", "var") else (-0.3, 0.3)
            found[name] = rng.uniform(low, high, shape)
    return {name: np.float32(values) for name, values in found.items()}


@functools.cache
def variables():
    return jax.tree.map(jnp.asarray, cifar_import.to_variables(SPEC, teacher()))


def images(number=24, seed=1):
    labels = np.random.default_rng(seed + 10).integers(0, SPEC.num_classes, number)
    return random_pixels(SPEC, number, seed), labels.astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _logits(spec, tree, train, pictures):
    x = PLAIN.evaluate(pictures)
    network = cifar_resnet.Network(spec)
    return runs.train_pass(spec, tree, x)[0] if train else network.apply(tree, x)


def logits(spec, tree, *, train=False):
    return _logits(spec, tree, train, images()[0])


def half():
    """(spec, variables) of the slice at half the width."""
    return runs.sliced(FAMILY, variables(), 0.5)


def close(got, wanted, tolerance=1e-4):
    wanted = jax.tree.unflatten(jax.tree.structure(got), jax.tree.leaves(wanted))
    chex.assert_trees_all_close(got, wanted, rtol=tolerance, atol=tolerance)


def baseline(**fields):
    return Baseline(**{"method": "slimmable", "title": "x", "width_ratios": RATIOS, **fields})


# --- parts -----------------------------------------------------------------------------------


def test_the_sliced_network_folds_to_the_slice_of_the_folded_one():
    small, sliced = half()
    family = cifar_resnet.hypernetwork(SPEC, BLOCKS, make_inr("grid"))
    spec, wanted = family.dense(cifar_resnet.fold_batch_norm(variables()), HALF)
    assert small == spec
    close(cifar_resnet.fold_batch_norm(sliced), wanted, 1e-6)


@pytest.mark.parametrize("train", [False, True], ids=["running", "own"])
def test_a_folded_network_gets_a_batch_norm_that_changes_nothing(train):
    spec, sliced = half()
    folded = cifar_resnet.fold_batch_norm(sliced)
    found = pruning.with_batch_norm(spec, folded, PLAIN.evaluate(images()[0]))
    close(logits(spec, found, train=train), logits(spec, folded))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, sliced)


def test_switches_start_at_the_sliced_network_and_have_batch_norm_of_their_own():
    made = slimmable.make_switchable(FAMILY, variables(), RATIOS)
    made = jax.tree.map(lambda x: x, made)  # dicts of its own, to be changed below

    def switch(ratio):
        return slimmable.switch(FAMILY, made, ratio)

    for ratio in RATIOS:
        small, wanted = runs.sliced(FAMILY, variables(), ratio)
        spec, found = switch(ratio)
        assert spec == small
        close(logits(spec, found), logits(small, wanted), 1e-6)
    # What one switch is changed to, the other does not see; a shared kernel both see.
    full, narrow = (logits(*switch(ratio)) for ratio in RATIOS)
    made["params"]["norms"]["0.5"]["stem_bn"]["bias"] += 1.0
    assert np.array_equal(full, logits(*switch(1.0)))
    assert not np.allclose(narrow, logits(*switch(0.5)))
    made["params"]["shared"]["head"]["bias"] += 1.0
    close(logits(*switch(1.0)), full + 1.0)


def test_splitting_off_batch_norm_and_joining_it_again_changes_nothing():
    rest, norms = runs.split_norms(variables()["params"])
    kernels = {p[-1].key for p, _ in jax.tree.leaves_with_path(rest)}
    assert kernels == {"kernel", "bias"} and "bias" not in rest["stem"]
    assert {p[-1].key for p, _ in jax.tree.leaves_with_path(norms)} == {"scale", "bias"}
    chex.assert_trees_all_equal(runs.with_norms(rest, norms), variables()["params"])


def test_a_slimmable_step_sees_each_width_with_statistics_of_its_own():
    made = slimmable.make_switchable(FAMILY, variables(), RATIOS)
    x = PLAIN.evaluate(images()[0])
    found, stats = jax.jit(slimmable.all_switches(FAMILY, RATIOS))(made, x, None)
    for ratio, of_ratio in zip(RATIOS, found, strict=True):
        spec, tree = slimmable.switch(FAMILY, made, ratio)
        close(of_ratio, logits(spec, tree, train=True))
        before = tree["batch_stats"]["stem_bn"]["mean"]
        batch = runs.recalibrate(spec, tree, images()[0], PLAIN)["batch_stats"]
        wanted = 0.9 * before + 0.1 * batch["stem_bn"]["mean"]
        close(stats[str(ratio)]["stem_bn"]["mean"], wanted)
        chex.assert_trees_all_equal_shapes(stats[str(ratio)], batch)


def test_a_sandwich_step_sees_the_full_the_smallest_and_random_widths_between():
    forward = jax.jit(slimmable.sandwich(FAMILY, smallest=0.5, num_random=1))
    x = PLAIN.evaluate(images()[0])
    found, _ = forward(variables(), x, jax.random.key(0))
    assert len(found) == 3
    close(found[0], logits(SPEC, variables(), train=True))
    close(found[1], logits(*half(), train=True))
    ratio = 0.5 + 0.5 * jax.random.uniform(jax.random.key(0), (1,))[0]
    close(found[2], logits(*runs.sliced(FAMILY, variables(), float(ratio)), train=True))
    assert np.abs(found[2] - forward(variables(), x, jax.random.key(1))[0][2]).max() > 1e-3


def test_recalibrated_statistics_are_those_of_the_images():
    small, sliced = half()
    pictures, _ = images()
    found = runs.recalibrate(small, sliced, pictures, PLAIN, 100)
    stem, layout = sliced["params"]["stem"]["kernel"], ("NHWC", "HWIO", "NHWC")
    x = PLAIN.evaluate(pictures)
    x = jax.lax.conv_general_dilated(x, stem, (1, 1), "SAME", dimension_numbers=layout)
    x = np.asarray(x, np.float64)
    wanted = {"mean": x.mean(axis=(0, 1, 2)), "var": x.var(axis=(0, 1, 2))}
    close(found["batch_stats"]["stem_bn"], wanted)
    # With them the network at evaluation normalises as in training: every layer's are right.
    close(logits(small, found), logits(small, sliced, train=True), 1e-3)
    # Over several batches the first layer's are still those of all images.
    parts = runs.recalibrate(small, sliced, pictures, PLAIN, 8)
    close(parts["batch_stats"]["stem_bn"], found["batch_stats"]["stem_bn"])


def test_taylor_importance_is_the_squared_gradient_of_a_factor_on_the_channel():
    found = pruning.taylor_importance(FAMILY, variables(), *images(), PLAIN, 12)
    labels = images()[1]

    def loss(factors, start):
        params = dict(variables()["params"])
        for name, factor in factors.items():
            layers = params[name]
            kernel = layers["conv2"]["kernel"] * factor[:, None]
            params[name] = {**layers, "conv2": {"kernel": kernel}}
        part = slice(start, start + 12)
        tree = {**variables(), "params": params}
        return losses.cross_entropy(logits(SPEC, tree)[part], labels[part])

    factors = {SPEC.blocks[n].name: jnp.ones(SPEC.blocks[n].hidden_width) for n in BLOCKS}
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    grads = [gradient(factors, start) for start in (0, 12)]
    for name, score in found.items():
        wanted = np.mean([np.square(g[name.partition("/")[0]]) for g in grads], axis=0)
        np.testing.assert_allclose(score, wanted, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("criterion", ["random", "l1", "l2", "taylor", "surgeon"])
def test_criteria_order_channels_without_a_change_of_the_function(criterion):
    order = pruning.channel_order(experiment_of(), variables(), *images(), criterion)
    sizes = dict(zip(FAMILY.names, FAMILY.full_widths, strict=True))
    assert {n: sorted(order[n]) for n in order} == {n: list(range(w)) for n, w in sizes.items()}
    moved = elastic.permute(GROUPS, variables(), order)
    close(logits(SPEC, moved), logits(SPEC, variables()))
    if criterion in ("l1", "l2"):
        for name, of_group in order.items():
            kernel = variables()["params"][name.partition("/")[0]]["conv1"]["kernel"]
            norms = (np.abs(kernel) ** int(criterion[1])).sum(axis=(0, 1, 2))[of_group]
            assert np.all(np.diff(norms) <= 0)


def test_in_place_distillation_gives_the_full_network_labels_and_the_others_its_answers():
    rng = np.random.default_rng(5)
    full, small, teacher = (jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for _ in range(3))
    labels = jnp.arange(6) % 5
    fields = {"ce_weight": 0.25, "distillation_weight": 2.0, "temperature": 3.0}
    joint = functools.partial(runs.joint_loss, labels=labels, teacher_logits=teacher)
    ce = losses.cross_entropy

    def kd(found, soft):
        return losses.distillation(found, soft, temperature=3.0)

    found = joint(baseline(distill_from="none", **fields), [full, small])
    close(found, ce(full, labels) + ce(small, labels), 1e-6)
    in_place = functools.partial(joint, baseline(distill_from="full", **fields))
    wanted = ce(full, labels) + 0.25 * ce(small, labels) + 2 * kd(small, full)
    close(in_place([full, small]), wanted, 1e-6)
    # No gradient flows into the answers that others learn from.
    gradient = jax.grad(lambda f: in_place([f, small]))(full)
    close(gradient, jax.grad(lambda f: ce(f, labels))(full), 1e-6)
    found = joint(baseline(distill_from="teacher", **fields), [full, small])
    wanted = sum(0.25 * ce(x, labels) + 2 * kd(x, teacher) for x in (full, small))
    close(found, wanted, 1e-6)


# --- the budget ------------------------------------------------------------------------------


def experiment_of(preset="ours", **overrides):
    config = CONFIGS.get_config(preset)
    config.data.name = "tiny"
    config.network.depth, config.network.stage_widths = 8, (4, 6, 8)
    config.generated = "all"
    for name, value in overrides.items():
        section, field = name.split("__")
        config[section][field] = value
    dataset = datasets.make_dataset("tiny", *images(), *images(), num_classes=SPEC.num_classes)
    return from_config(config.to_dict(), dataset)


@functools.cache
def stand_in():
    split = np.zeros((4, 32, 32, 3), np.uint8), np.arange(4, dtype=np.int32)
    return datasets.make_dataset("cifar100", *split, *split)


@pytest.mark.parametrize("preset", CONFIGS.PRESETS[1:])
def test_every_row_sees_the_same_number_of_images_at_each_size(preset):
    num_images = 45_000
    resolved = baselines.within_budget(CONFIGS.get_config(preset).to_dict(), 2.0, num_images)
    row = recipes.from_fields(Baseline, resolved["baseline"], "")
    assert row.images == 100_000
    if row.method != "inr":
        assert abs(row.num_steps * row.batch_size - row.images) <= row.batch_size
        return
    config = {**resolved, "data": {**resolved["data"], "name": "cifar100"}}
    experiment = from_config(config, stand_in())
    recipe = experiment.recipe
    phases = recipe.phases(experiment.hypernetwork, num_images=num_images)
    # Each phase is a whole number of steps.
    rounding = 0.5 * len(phases) * recipe.images_per_step
    assert abs(baselines.cost(experiment, row, num_images).images - row.images) <= rounding


def test_costs_are_passes_of_the_networks_that_are_trained():
    experiment = experiment_of()
    full = SPEC.num_macs
    half = cifar_spec.morph(SPEC, BLOCKS, HALF).num_macs

    def cost(method, **fields):
        row = baseline(method=method, images=640, batch_size=32, **fields)
        return baselines.cost(experiment, row, 0)

    found = cost("individual", distill_from="teacher")
    assert (found.images, found.network_passes, found.teacher_passes) == (640, 1280, 1280)
    assert found.macs == 640 * 3 * (full + half) + 1280 * full
    found = cost("slimmable", distill_from="teacher")
    assert (found.network_passes, found.teacher_passes) == (1280, 640)
    found = cost("universally_slimmable", num_random_sizes=2)
    assert found.network_passes == 4 * 640
    assert found.macs == 640 * 3 * (full + half + 2 * full)
    found = cost("pruning_finetuned")  # the full size is the teacher as it is
    assert (found.network_passes, found.macs) == (640, 640 * 3 * half)
    assert cost("pruning").macs == 0


@pytest.mark.parametrize("share, passes", [(True, 960 * 5), (False, 960)])
def test_an_inr_whose_sizes_have_images_of_their_own_counts_each(share, passes):
    chosen = {"epochs": 40.0, "batch_size": 4, "micro_batch": 0, "share_images": share}
    experiment = experiment_of(**{f"train__{name}": value for name, value in chosen.items()})
    assert baselines.cost(experiment, baseline(method="inr"), 24)[:3] == (960, passes, 960)


# --- rows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set and a teacher of a few channels under PyTorch's names."""
    folder = tmp_path_factory.mktemp("baselines")
    splits = {"train": images(96, 4), "test": images(20, 5)}
    tiny = {f"{name}_images": pictures for name, (pictures, _) in splits.items()}
    tiny |= {f"{name}_labels": labels for name, (_, labels) in splits.items()}
    np.savez(folder / "tiny.npz", **tiny)
    np.savez(folder / "teacher.npz", **teacher())
    return folder


def arguments(preset, place, workdir, *args, **config):
    chosen = {
        "data.dir": place / "tiny.npz",
        "data.name": "tiny",
        "data.num_validation": 16,
        "data.crop_padding": 1,
        "teacher.file": place / "teacher.npz",
        "network.depth": 8,
        "network.stage_widths": "(4,6,8)",
        "generated": "all",
        "baseline.images": 64,
        "baseline.batch_size": 16,
        "baseline.width_ratios": "(1.0,0.5)",
        "baseline.calibration_images": 32,
        "log_every": 2,
        "checkpoint_every": 2,
    } | {name.replace("__", "."): value for name, value in config.items()}
    flags = [f"--config.{name}={value}" for name, value in chosen.items()]
    return [f"--config={ROOT / CONFIG}:{preset}", f"--workdir={workdir}", *flags, *args]


def read(workdir):
    return json.loads((workdir / "row.json").read_text())


def test_a_slimmable_row_that_was_killed_resumes_to_the_same_bits(place, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(compare, *arguments("slimmable", place, whole))
    save, saves = checkpoint.Checkpoints.save, []

    class KilledError(BaseException):
        pass

    def dying(self, step, state):
        save(self, step, state)
        saves.append(step)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", dying)
        with pytest.raises(KilledError):
            run(compare, *arguments("slimmable", place, killed))
    assert saves == [2]
    assert "continuing from step 2 of 4" in run(compare, *arguments("slimmable", place, killed))
    fresh = slimmable.make_switchable(FAMILY, variables(), RATIOS)
    recipe = TeacherRecipe(batch_size=16, learning_rate=0.02, weight_decay=5e-4)
    template = TrainState(fresh, teacher_optimizer(recipe, 4).init(fresh["params"]))
    ends = []
    for workdir in (whole, killed):
        saved = checkpoint.Checkpoints(workdir / "checkpoints" / "slimmable").restore(template)
        ends.append(jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), saved))
    assert saved[0] == 4 and ends[0] == ends[1]
    row = read(whole)
    assert row["sizes"] == read(killed)["sizes"]
    assert set(row) == {field.name for field in dataclasses.fields(Row)}
    assert (row["method"], row["variant"]) == ("slimmable, 4 widths", "")
    assert (row["budget_images"], row["network_passes"]) == (64, 128)
    assert [line["images"] for line in row["sizes"]] == [64, 64]
    assert [line["compression"] for line in row["sizes"]] == [0, 50]
    assert row["sizes"][1]["widths"] == [2, 3, 4] and not row["continuous"]
    small = cifar_spec.morph(SPEC, BLOCKS, (2, 3, 4))
    assert row["sizes"][1]["num_params"] == small.num_params
    # Kernels once, and a factor and a summand per channel of each width.
    _, norms = runs.split_norms(fresh["params"]["norms"])
    _, of_full = runs.split_norms(variables()["params"])
    folded = runs.num_bytes(of_full) // 2  # a bias in place of both
    assert row["storage_bytes"] == 4 * SPEC.num_params - folded + runs.num_bytes(norms)
    assert "/" not in row["command"].replace("configs/baselines.py", "")


def test_pruning_at_full_size_is_the_teacher_whatever_the_criterion(place, tmp_path):
    criteria = '("random","l1")'
    out = run(compare, *arguments("pruning", place, tmp_path, baseline__criteria=criteria))
    names = (
        "",
        "surgeon",
        "surgeon_refitted",
        "random",
        "random_recalibrated",
        "l1",
        "l1_recalibrated",
    )
    rows = {name: read(tmp_path / name) for name in names}
    assert out.count("wrote") == len(rows) == len(list(tmp_path.rglob("row.json")))
    assert rows[""]["variant"] == "surgeon, statistics recalibrated"
    whole = float((tmp_path / "seconds").read_text())
    assert sum(row["wall_seconds"] for row in rows.values()) <= whole + 1  # each its own time
    assert rows["l1"]["variant"] == "l1"
    assert len({row["sizes"][0]["test"] for row in rows.values()}) == 1
    assert all(line["images"] == 0 for row in rows.values() for line in row["sizes"])
    assert (rows["l1"]["calibration_images"], rows["surgeon"]["calibration_images"]) == (0, 32)
    assert (rows["l1"]["switch_images"], rows["l1_recalibrated"]["switch_images"]) == (0, 32)
    assert rows["surgeon_refitted"]["variant"] == "surgeon, products solved anew"
    assert rows["surgeon_refitted"]["switch_images"] == 32
    # The row is of the teacher's slice: the accuracy of one computed here.
    experiment = experiment_of(data__crop_padding=1)
    order = pruning.channel_order(experiment, variables(), *images(96, 4), "l1")
    moved = elastic.permute(GROUPS, variables(), order)
    small, tree = runs.sliced(FAMILY, moved, 0.5)
    pictures, labels = images(20, 5)
    x = preprocessing.normalize(pictures, *datasets.channel_statistics(images(96, 4)[0]))
    found = np.argmax(cifar_resnet.ResNet(small).apply(tree, x), axis=-1) == labels
    assert rows["l1"]["sizes"][1]["test"] == pytest.approx(100 * found.mean())


def test_a_trial_reads_no_test_image_and_leaves_the_row_to_the_run_after_it(
    place, tmp_path, monkeypatch
):
    read_splits = []

    def split_of(splits, name, of=evaluator.evaluation_split):
        read_splits.append(name)
        return of(splits, name)

    monkeypatch.setattr(evaluator, "evaluation_split", split_of)
    out = run(compare, *arguments("pruning_finetuned", place, tmp_path, "--trial"))
    assert set(read_splits) == {"validation"}
    assert out.count("   validation ") == 2 and "test" not in out
    assert not (tmp_path / "row.json").exists()
    run(compare, *arguments("pruning_finetuned", place, tmp_path))
    assert set(read_splits) == {"validation", "test"}
    line = next(x for x in out.splitlines() if x.startswith("width 0.5"))
    assert f"validation {read(tmp_path)['sizes'][1]['validation']:6.2f} %" in line


INR = {"train__optimizer": "adamw", "train__num_random_sizes": 1, "train__micro_batch": 0}
INR |= {"eval__progress_images": 8, "eval__progress_ratios": "(1.0,)", "baseline__images": 192}
ALONE = {"teacher__file": "", "baseline__width_ratios": "(1.0,)"}  # needs no teacher


@pytest.mark.parametrize(
    "preset, config, images, wanted",
    [
        # It needs images for a change of size.
        ("universally_slimmable", {}, [32, 32], (32 * 4, 0, True, 32)),
        # The full size stays as it is.
        ("pruning_refitted_distilled", {}, [0, 32], (32, 32, False, 0)),
        ("individual", ALONE, [32], (32, 0, False, 0)),
        # 80 training images, 32 in a step, which both sizes see.
        ("ours", INR, [96, 96], (96 * 2, 96, True, 0)),
    ],
)
def test_a_row_says_what_its_method_needs(place, tmp_path, preset, config, images, wanted):
    run(compare, *arguments(preset, place, tmp_path, "--budget=0.5", **config))
    row = read(tmp_path)
    assert [line["images"] for line in row["sizes"]] == images
    assert row["budget_images"] == images[-1]
    names = ("network_passes", "teacher_passes", "continuous", "switch_images")
    assert tuple(row[name] for name in names) == wanted
    assert (row["teacher"] is None) == (preset == "individual")
    if preset == "universally_slimmable":
        assert row["calibration_images"] == 32
    if preset == "individual":
        assert row["storage_bytes"] == 4 * SPEC.num_params
    if preset == "pruning_refitted_distilled":
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["width_0.5"]
    assert (tmp_path / INR_FILE).exists() == (preset == "ours")


@pytest.mark.parametrize("name, alpha", [("neumeta", 1), ("neumeta_fitted", 1), ("htty", 0)])
def test_skip_init_is_part_of_htty_alone(name, alpha):
    train = CONFIGS.get_config(name).train
    assert train.alpha_init == alpha and (train.alpha_learning_rate > 0) == (alpha == 0)


@pytest.mark.parametrize(
    "args, error",
    [
        (["--budget=0"], "--budget must be above 0, got 0.0"),
        (["--config.baseline.criterion=l3"], "criterion must be one of"),
        (["--config.baseline.distill_from=zeros"], "distill_from must be one of"),
        (["--config.baseline.width_ratios=(0.75,)"], "must start at 1 and decrease"),
        (["--config.baseline.images=0"], "must be at least 1"),
        (["--config.baseline.temperature=0.0"], "temperature above 0"),
        (["--config.baseline.distill_form=full"], "did you mean --config.baseline.distill_from?"),
        (["--config.data.num_validation=0"], "The validation split must have images"),
        (["--config.teacher.file="], "--config.teacher.file=FILE"),
    ],
)
def test_what_no_row_could_use_is_refused(place, tmp_path, args, error):
    assert_refuses(error, compare, *arguments("slimmable", place, tmp_path / "run", *args))
    assert not (tmp_path / "run").exists()


def test_a_row_needs_a_work_directory_and_a_section_of_its_config(place, tmp_path):
    assert_refuses("--workdir=DIR is required", compare, *arguments("slimmable", place, ""))
    other = f"--config={ROOT / 'configs/digits.py'}", f"--workdir={tmp_path / 'run'}"
    assert_refuses("must have a section baseline", compare, *other)
    with refused("together.*method is 'individual'", UsageError):
        baseline(method="individual", distill_from="full")
