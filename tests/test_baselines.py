"""The baselines on networks of a few channels: their parts against references, their rows whole."""

import contextlib
import functools
import importlib.util
import io
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import (
    architecture,
    baselines,
    checkpoint,
    command_line,
    experiment as lab,
    losses,
    resnet,
    training,
)
from neumeta_jax.architecture import cifar_resnet, generated_blocks, widths_at
from neumeta_jax.baselines import Baseline
from neumeta_jax.training import Preprocessing, TrainState

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "baselines.py"
SPEC = cifar_resnet(8, num_classes=5, stage_widths=(4, 6, 8), image_size=8, channels=3)
BLOCKS = generated_blocks(SPEC, "all")
RATIOS = (1.0, 0.5)
PLAIN = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=0, flip=False)


def load_config():
    spec = importlib.util.spec_from_file_location("config_baselines", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS = load_config().ROWS


@functools.cache
def variables(seed=0):
    """Linen variables away from where they start, so that nothing is one or zero by chance."""
    shapes = jax.eval_shape(functools.partial(resnet.init_variables, spec=SPEC), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            scale = math.sqrt(2 / math.prod(leaf.shape[:-1]))
            return jnp.asarray(rng.normal(size=leaf.shape, scale=scale), jnp.float32)
        low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.3, 0.3)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def images(number=24, seed=1):
    rng = np.random.default_rng(seed)
    shape = (number, SPEC.image_size, SPEC.image_size, SPEC.channels)
    pictures = rng.integers(0, 256, shape, np.uint8)
    return pictures, rng.integers(0, SPEC.num_classes, number).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logits(spec, tree, masks, train, pictures):
    options = {"train": True, "mutable": ["batch_stats"]} if train else {}
    x = PLAIN.evaluate(pictures)
    found = resnet.ResNet(spec).apply(tree, x, hidden_masks=masks, **options)
    return found[0] if train else found


def logits(spec, tree, *, masks=None, train=False):
    return _logits(spec, tree, masks, train, images()[0])


def close(got, wanted, tolerance=1e-4):
    got, wanted = jax.tree.leaves(got), jax.tree.leaves(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def baseline(**fields):
    return Baseline(**{"method": "slimmable", "title": "x", "width_ratios": RATIOS, **fields})


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_a_masked_network_computes_what_the_sliced_one_does(train):
    widths = (3, 4, 5)
    small, sliced = baselines.slice_variables(SPEC, variables(), BLOCKS, widths)
    masks = {
        SPEC.blocks[n].name: jnp.arange(SPEC.blocks[n].hidden_width) < width
        for n, width in zip(BLOCKS, widths, strict=True)
    }
    masked = logits(SPEC, variables(), masks=masks, train=train)
    close(masked, logits(small, sliced, train=train))
    assert np.abs(masked - logits(SPEC, variables(), train=train)).max() > 0.01


def test_masked_channels_get_no_gradient():
    name = SPEC.blocks[BLOCKS[0]].name
    masks = {name: jnp.array([1.0, 1.0, 0.0, 0.0])}

    def loss(params):
        tree = {**variables(), "params": params}
        return losses.cross_entropy(logits(SPEC, tree, masks=masks, train=True), images()[1])

    layers = jax.jit(jax.grad(loss))(variables()["params"])[name]
    kept = np.abs(layers["conv1"]["kernel"]).max(axis=(0, 1, 2)) > 0
    assert kept.tolist() == [True, True, False, False]


def test_reordering_channels_does_not_change_the_function():
    rng = np.random.default_rng(3)
    orders = {n: rng.permutation(SPEC.blocks[n].hidden_width) for n in BLOCKS}
    moved = baselines.reorder(SPEC, variables(), orders)
    close(logits(SPEC, moved), logits(SPEC, variables()))
    name = SPEC.blocks[BLOCKS[1]].name
    assert not np.array_equal(
        moved["params"][name]["conv1"]["kernel"], variables()["params"][name]["conv1"]["kernel"]
    )


def test_the_sliced_network_folds_to_the_slice_of_the_folded_one():
    widths = widths_at(SPEC, BLOCKS, 0.5)
    small, sliced = baselines.slice_variables(SPEC, variables(), BLOCKS, widths)
    spec, wanted = resnet.slice_params(SPEC, resnet.fold_batch_norm(variables()), BLOCKS, widths)
    assert small == spec
    close(resnet.fold_batch_norm(sliced), wanted, 1e-6)


def test_switches_start_at_the_sliced_network_and_have_batch_norm_of_their_own():
    made = baselines.make_switchable(SPEC, variables(), BLOCKS, RATIOS)
    made = jax.tree.map(lambda x: x, made)  # dicts of its own, to be changed below
    for ratio in RATIOS:
        widths = widths_at(SPEC, BLOCKS, ratio)
        small, wanted = baselines.slice_variables(SPEC, variables(), BLOCKS, widths)
        spec, found = baselines.switch(SPEC, made, BLOCKS, ratio)
        assert spec == small
        close(logits(spec, found), logits(small, wanted), 1e-6)
    # What one switch is changed to, the other does not see; a shared kernel both see.
    before = {r: logits(*baselines.switch(SPEC, made, BLOCKS, r)) for r in RATIOS}
    made["params"]["norms"]["0.5"]["stem_bn"]["bias"] += 1.0
    assert np.array_equal(before[1.0], logits(*baselines.switch(SPEC, made, BLOCKS, 1.0)))
    assert not np.allclose(before[0.5], logits(*baselines.switch(SPEC, made, BLOCKS, 0.5)))
    made["params"]["shared"]["head"]["bias"] += 1.0
    close(logits(*baselines.switch(SPEC, made, BLOCKS, 1.0)), before[1.0] + 1.0)


def test_splitting_off_batch_norm_and_joining_it_again_changes_nothing():
    rest, norms = baselines.split_norms(variables()["params"])
    kernels = {p[-1].key for p, _ in jax.tree.leaves_with_path(rest)}
    assert kernels == {"kernel", "bias"} and "bias" not in rest["stem"]
    assert {p[-1].key for p, _ in jax.tree.leaves_with_path(norms)} == {"scale", "bias"}
    joined = baselines.join_norms(rest, norms)
    assert jax.tree.structure(joined) == jax.tree.structure(variables()["params"])
    close(joined, variables()["params"], 0)


def test_a_slimmable_step_sees_each_width_with_statistics_of_its_own():
    made = baselines.make_switchable(SPEC, variables(), BLOCKS, RATIOS)
    x = PLAIN.evaluate(images()[0])
    found, stats = jax.jit(baselines.all_switches(SPEC, BLOCKS, RATIOS))(made, x, None)
    for ratio, of_ratio in zip(RATIOS, found, strict=True):
        spec, tree = baselines.switch(SPEC, made, BLOCKS, ratio)
        close(of_ratio, logits(spec, tree, train=True))
        before = tree["batch_stats"]["stem_bn"]["mean"]
        batch = baselines.recalibrate(spec, tree, images()[0], PLAIN)["batch_stats"]
        wanted = 0.9 * before + 0.1 * batch["stem_bn"]["mean"]
        close(stats[str(ratio)]["stem_bn"]["mean"], wanted)
        shapes = [jax.tree.map(jnp.shape, s) for s in (stats[str(ratio)], batch)]
        assert shapes[0] == shapes[1]


def test_a_sandwich_step_sees_the_full_the_smallest_and_random_widths_between():
    forward = jax.jit(baselines.sandwich(SPEC, BLOCKS, smallest=0.5, num_random=1))
    x = PLAIN.evaluate(images()[0])
    found, _ = forward(variables(), x, jax.random.key(0))
    assert len(found) == 3
    close(found[0], logits(SPEC, variables(), train=True))
    widths = widths_at(SPEC, BLOCKS, 0.5)
    small, sliced = baselines.slice_variables(SPEC, variables(), BLOCKS, widths)
    close(found[1], logits(small, sliced, train=True))
    ratio = 0.5 + 0.5 * jax.random.uniform(jax.random.key(0), (1,))[0]
    masks = {
        SPEC.blocks[n].name: jnp.arange(SPEC.blocks[n].hidden_width) < width
        for n, width in zip(BLOCKS, widths_at(SPEC, BLOCKS, float(ratio)), strict=True)
    }
    close(found[2], logits(SPEC, variables(), masks=masks, train=True))
    assert np.abs(found[2] - forward(variables(), x, jax.random.key(1))[0][2]).max() > 1e-3


def test_recalibrated_statistics_are_those_of_the_images():
    widths = widths_at(SPEC, BLOCKS, 0.5)
    small, sliced = baselines.slice_variables(SPEC, variables(), BLOCKS, widths)
    pictures, _ = images()
    found = baselines.recalibrate(small, sliced, pictures, PLAIN, batch_size=100)
    stem = sliced["params"]["stem"]["kernel"]
    x = jax.lax.conv_general_dilated(
        PLAIN.evaluate(pictures), stem, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = np.asarray(x, np.float64)
    close(found["batch_stats"]["stem_bn"]["mean"], x.mean(axis=(0, 1, 2)))
    close(found["batch_stats"]["stem_bn"]["var"], x.var(axis=(0, 1, 2)))
    # With them the network at evaluation normalises as in training: every layer's are right.
    close(logits(small, found), logits(small, sliced, train=True), 1e-3)
    # Over several batches the first layer's are still those of all images.
    parts = baselines.recalibrate(small, sliced, pictures, PLAIN, batch_size=8)
    close(parts["batch_stats"]["stem_bn"], found["batch_stats"]["stem_bn"])


def test_taylor_importance_is_the_squared_sum_of_gradient_times_weight():
    pictures, labels = images()
    found = baselines.taylor_importance(
        SPEC, variables(), BLOCKS, pictures, labels, PLAIN, batch_size=12
    )

    def loss(params, start):
        tree = {**variables(), "params": params}
        part = slice(start, start + 12)
        return losses.cross_entropy(logits(SPEC, tree)[part], labels[part])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    grads = [gradient(variables()["params"], start) for start in (0, 12)]
    for n in BLOCKS:
        name = SPEC.blocks[n].name
        kernel = np.asarray(variables()["params"][name]["conv2"]["kernel"], np.float64)
        products = [np.asarray(g[name]["conv2"]["kernel"]) * kernel for g in grads]
        wanted = np.mean([p.sum(axis=(0, 1, 3)) ** 2 for p in products], axis=0)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-9)
        assert len(set(np.argsort(wanted))) == SPEC.blocks[n].hidden_width


def test_norm_criteria_order_channels_by_the_norms_of_their_filters():
    experiment = experiment_of()
    for criterion, power in (("l1", 1), ("l2", 2)):
        orders = baselines.channel_order(experiment, variables(), *images(), criterion)
        for n in BLOCKS:
            kernel = variables()["params"][SPEC.blocks[n].name]["conv1"]["kernel"]
            norms = (np.abs(kernel) ** power).sum(axis=(0, 1, 2))[orders[n]]
            assert np.all(np.diff(norms) <= 0)
    by_chance = baselines.channel_order(experiment, variables(), *images(), "random")
    again = baselines.channel_order(experiment, variables(), *images(), "random")
    for n in BLOCKS:
        assert sorted(by_chance[n]) == list(range(SPEC.blocks[n].hidden_width))
        assert by_chance[n].tolist() == again[n].tolist()


def test_in_place_distillation_gives_the_full_network_labels_and_the_others_its_answers():
    rng = np.random.default_rng(5)
    full, small, teacher = (jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for _ in range(3))
    labels = jnp.arange(6) % 5
    fields = {"ce_weight": 0.25, "distillation_weight": 2.0, "temperature": 3.0}
    joint = functools.partial(baselines.joint_loss, labels=labels, teacher_logits=teacher)
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
    config = load_config().get_config(preset)
    config.data.name = "tiny"
    config.network.depth, config.network.stage_widths = 8, (4, 6, 8)
    config.generated = "all"
    for name, value in overrides.items():
        section, field = name.split("__")
        config[section][field] = value
    pictures, labels = images()
    dataset = baselines.data.make_dataset(
        "tiny", pictures, labels, pictures, labels, num_classes=SPEC.num_classes
    )
    return lab.from_config(config.to_dict(), dataset)


def test_every_row_sees_the_same_number_of_images_at_each_size():
    num_images = 45_000
    for name in ROWS:
        for preset in (name, f"{name}_resnet56"):
            config = load_config().get_config(preset).to_dict()
            resolved = baselines.within_budget(config, 2.0, num_images)
            row = baselines.section(resolved)
            assert row.images == 100_000
            if row.method != "inr":
                assert abs(row.images_seen - row.images) <= row.batch_size
                continue
            config = {**resolved, "data": {**resolved["data"], "name": "cifar100"}}
            experiment = lab.from_config(config, stand_in())
            cost = baselines.inr_cost(experiment, num_images)
            phases = training.phases(
                experiment.hypernetwork, experiment.recipe, num_images=num_images
            )
            # Each phase is a whole number of steps.
            rounding = 0.5 * len(phases) * experiment.recipe.images_per_step
            assert abs(cost.images - row.images) <= rounding, (preset, cost.images)


@functools.cache
def stand_in():
    pictures = np.zeros((4, 32, 32, 3), np.uint8)
    labels = np.arange(4, dtype=np.int32)
    return baselines.data.make_dataset("cifar100", pictures, labels, pictures, labels)


def test_costs_are_passes_of_the_networks_that_are_trained():
    experiment = experiment_of()
    full = SPEC.num_macs
    half = architecture.morph(SPEC, BLOCKS, widths_at(SPEC, BLOCKS, 0.5)).num_macs

    def cost(method, **fields):
        row = baseline(method=method, images=640, batch_size=32, **fields)
        return baselines.training_cost(experiment, row)

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


def test_an_inr_whose_sizes_have_images_of_their_own_counts_each():
    shared = experiment_of(train__epochs=40.0, train__batch_size=4, train__micro_batch=0)
    cost = baselines.inr_cost(shared, 24)
    assert (cost.images, cost.network_passes) == (960, 960 * 3)
    separate = experiment_of(
        train__epochs=40.0, train__batch_size=4, train__micro_batch=0, train__share_images=False
    )
    cost = baselines.inr_cost(separate, 24)
    assert (cost.images, cost.network_passes, cost.teacher_passes) == (960, 960, 960)


# --- rows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set and a teacher of a few channels under PyTorch's names."""
    folder = tmp_path_factory.mktemp("baselines")
    pictures, labels = images(96, 4)
    test_pictures, test_labels = images(20, 5)
    np.savez(
        folder / "tiny.npz",
        train_images=pictures,
        train_labels=labels,
        test_images=test_pictures,
        test_labels=test_labels,
    )
    found = {}

    def put(torch_name, layers, stats, conv, norm_name):
        bn = f"{torch_name[1]}"
        found[f"{torch_name[0]}.weight"] = np.transpose(layers[conv]["kernel"], (3, 2, 0, 1))
        found[f"{bn}.weight"] = layers[norm_name]["scale"]
        found[f"{bn}.bias"] = layers[norm_name]["bias"]
        found[f"{bn}.running_mean"] = stats[norm_name]["mean"]
        found[f"{bn}.running_var"] = stats[norm_name]["var"]

    params, stats = variables()["params"], variables()["batch_stats"]
    put(("conv1", "bn1"), params, stats, "stem", "stem_bn")
    for block in SPEC.blocks:
        name = f"layer{block.stage}.{block.index}"
        layers, of_block = params[block.name], stats[block.name]
        for number in (1, 2):
            names = (f"{name}.conv{number}", f"{name}.bn{number}")
            put(names, layers, of_block, f"conv{number}", f"bn{number}")
        if block.projection:
            names = (f"{name}.downsample.0", f"{name}.downsample.1")
            put(names, layers, of_block, "shortcut", "shortcut_bn")
    found["fc.weight"] = np.transpose(params["head"]["kernel"])
    found["fc.bias"] = params["head"]["bias"]
    np.savez(folder / "teacher.npz", **{k: np.asarray(v, np.float32) for k, v in found.items()})
    return folder


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Equal rows compile once."""
    monkeypatch.setattr(training, "chunked", functools.cache(training.chunked))


def call(preset, place, workdir, *args, teacher=True, images=64, ratios="(1.0,0.5)", error=None):
    """What a row prints; with `error`, the line of a refusal that must hold it."""
    argv = [
        "baselines.py",
        f"--config={CONFIG}:{preset}",
        f"--workdir={workdir}",
        f"--config.data.dir={place / 'tiny.npz'}",
        "--config.data.name=tiny",
        "--config.data.num_validation=16",
        "--config.data.crop_padding=1",
        "--config.network.depth=8",
        "--config.generated=all",
        "--config.network.stage_widths=(4,6,8)",
        f"--config.baseline.images={images}",
        "--config.baseline.batch_size=16",
        f"--config.baseline.width_ratios={ratios}",
        "--config.baseline.calibration_images=32",
        "--config.log_every=2",
        "--config.checkpoint_every=2",
        *([f"--config.teacher.file={place / 'teacher.npz'}"] if teacher else []),
        *args,
    ]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(lab, "quiet_logging", lambda: None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command_line.run(baselines.main, argv)
            except SystemExit as stop:
                status = stop.code
    if error is None:
        assert status == 0, err.getvalue()
        return out.getvalue()
    text = err.getvalue()
    assert status == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    assert error in text, text
    return text


def read(workdir):
    return json.loads((workdir / "row.json").read_text())


FIELDS = {
    *("method", "variant", "source", "seed", "dataset", "network", "teacher", "budget_images"),
    *("sizes", "network_passes", "teacher_passes", "training_macs", "calibration_images"),
    *("storage_bytes", "continuous", "switch_images", "switch_seconds", "wall_seconds"),
    *("command", "commit", "device", "versions"),
}


def test_a_slimmable_row_that_was_killed_resumes_to_the_same_bits(place, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    call("slimmable", place, whole)
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
            call("slimmable", place, killed)
    assert saves == [2]
    assert "continuing from step 2 of 4" in call("slimmable", place, killed)
    ends = []
    for workdir in (whole, killed):
        saved = checkpoint.Checkpoints(workdir / "checkpoints" / "slimmable")
        fresh = baselines.make_switchable(SPEC, variables(), BLOCKS, RATIOS)
        recipe = training.TeacherRecipe(batch_size=16, learning_rate=0.02, weight_decay=5e-4)
        optimizer = training.sgd_optimizer(recipe, 4)
        template = TrainState(fresh, optimizer.init(fresh["params"]))
        step, state = saved.restore(template)
        assert step == 4
        ends.append(state)
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    rows = [read(workdir) for workdir in (whole, killed)]
    assert rows[0]["sizes"] == rows[1]["sizes"]
    row = rows[0]
    assert set(row) == FIELDS
    assert (row["method"], row["variant"]) == ("slimmable, 4 widths", "")
    assert (row["budget_images"], row["network_passes"]) == (64, 128)
    assert [line["images"] for line in row["sizes"]] == [64, 64]
    assert [line["compression"] for line in row["sizes"]] == [0, 50]
    assert row["sizes"][1]["widths"] == [2, 3, 4] and not row["continuous"]
    small = architecture.morph(SPEC, BLOCKS, (2, 3, 4))
    assert row["sizes"][1]["num_params"] == small.num_params
    # Kernels once, and a factor and a summand per channel of each width.
    channels = [2 * sum(norm_channels(s)) for s in (SPEC, small)]
    kernels = SPEC.num_params - sum(norm_channels(SPEC))
    assert row["storage_bytes"] == 4 * (kernels + sum(channels))
    assert "/" not in row["command"].replace("configs/baselines.py", "")


def norm_channels(spec):
    yield spec.stage_widths[0]
    for block in spec.blocks:
        yield from (block.hidden_width, block.out_width)
        yield block.out_width if block.projection else 0


def test_a_universally_slimmable_row_needs_images_for_a_change_of_size(place, tmp_path):
    call("universally_slimmable", place, tmp_path / "run", "--budget=0.5")
    row = read(tmp_path / "run")
    assert (row["budget_images"], row["network_passes"]) == (32, 32 * 4)
    assert (row["continuous"], row["switch_images"], row["calibration_images"]) == (True, 32, 32)


def test_pruning_at_full_size_is_the_teacher_whatever_the_criterion(place, tmp_path):
    out = call("pruning", place, tmp_path, '--config.baseline.criteria=("random","l1")')
    rows = {
        name: read(tmp_path / name)
        for name in ("", "taylor", "random", "random_recalibrated", "l1", "l1_recalibrated")
    }
    assert out.count("wrote") == len(rows) == len(list(tmp_path.rglob("row.json")))
    assert rows[""]["variant"] == "taylor, statistics recalibrated"
    whole = float((tmp_path / "seconds").read_text())
    assert sum(row["wall_seconds"] for row in rows.values()) <= whole + 1  # each its own time
    assert rows["l1"]["variant"] == "l1"
    assert len({row["sizes"][0]["test"] for row in rows.values()}) == 1
    assert all(line["images"] == 0 for row in rows.values() for line in row["sizes"])
    assert (rows["l1"]["calibration_images"], rows["taylor"]["calibration_images"]) == (0, 32)
    assert (rows["l1"]["switch_images"], rows["l1_recalibrated"]["switch_images"]) == (0, 32)
    # The row is of the teacher's slice: the accuracy of one computed here.
    experiment = experiment_of(data__crop_padding=1)
    order = baselines.channel_order(experiment, variables(), *images(96, 4), "l1")
    moved = baselines.reorder(SPEC, variables(), order)
    small, tree = baselines.slice_variables(SPEC, moved, BLOCKS, (2, 3, 4))
    mean, std = baselines.data.channel_statistics(images(96, 4)[0])
    x = baselines.data.normalize(images(20, 5)[0], mean, std)
    found = np.argmax(resnet.ResNet(small).apply(tree, x), axis=-1) == images(20, 5)[1]
    assert rows["l1"]["sizes"][1]["test"] == pytest.approx(100 * found.mean())


def test_finetuning_leaves_the_full_size_as_it_is_and_trains_the_others(place, tmp_path):
    call("pruning_finetuned_distilled", place, tmp_path)
    row = read(tmp_path)
    assert [line["images"] for line in row["sizes"]] == [0, 64]
    assert (row["network_passes"], row["teacher_passes"]) == (64, 64)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["width_0.5"]


def test_a_trial_reads_no_test_image_and_leaves_the_row_to_the_run_after_it(
    place, tmp_path, monkeypatch
):
    read_splits = []
    split_of = baselines.lab.evaluation_split
    monkeypatch.setattr(
        baselines.lab,
        "evaluation_split",
        lambda splits, name: read_splits.append(name) or split_of(splits, name),
    )
    out = call("pruning_finetuned", place, tmp_path, "--trial")
    assert set(read_splits) == {"validation"}
    assert out.count("   validation ") == 2 and "test" not in out
    assert not (tmp_path / "row.json").exists()
    call("pruning_finetuned", place, tmp_path)
    assert set(read_splits) == {"validation", "test"}
    line = next(x for x in out.splitlines() if x.startswith("width 0.5"))
    assert f"validation {read(tmp_path)['sizes'][1]['validation']:6.2f} %" in line


def test_individual_networks_need_no_teacher(place, tmp_path):
    call("individual", place, tmp_path, teacher=False, ratios="(1.0,)")
    row = read(tmp_path)
    assert [line["images"] for line in row["sizes"]] == [64]
    assert row["teacher"] is None and row["network_passes"] == 64
    assert row["storage_bytes"] == 4 * sum(line["num_params"] for line in row["sizes"])


def test_an_inr_runs_within_the_same_budget(place, tmp_path):
    args = ["train.optimizer=adamw", "train.num_random_sizes=1", "train.micro_batch=0"]
    args += ["eval.progress_images=8", "eval.progress_ratios=(1.0,)"]
    call("ours", place, tmp_path, *[f"--config.{arg}" for arg in args], images=96)
    row = read(tmp_path)
    # 80 training images, 32 in a step, which both sizes see.
    assert (row["budget_images"], row["sizes"][0]["images"]) == (96, 96)
    assert row["network_passes"] == 96 * 2 and row["continuous"] and row["switch_images"] == 0
    assert (tmp_path / checkpoint.INR_FILE).exists()


@pytest.mark.parametrize("name, alpha", [("neumeta", 1), ("neumeta_fitted", 1), ("htty", 0)])
def test_skip_init_is_part_of_htty_alone(name, alpha):
    train = load_config().get_config(name).train
    assert train.alpha_init == alpha and (train.alpha_learning_rate > 0) == (alpha == 0)


@pytest.mark.parametrize(
    "args, error",
    [
        (["--budget=0"], "--budget must be above 0, got 0.0"),
        (["--config.baseline.criterion=l3"], "criterion must be one of"),
        (["--config.baseline.init=zeros"], "init must be one of"),
        (["--config.baseline.width_ratios=(0.75,)"], "must start at 1 and decrease"),
        (["--config.baseline.images=0"], "must be at least 1"),
        (["--config.baseline.temperature=0.0"], "temperature above 0"),
        (["--config.baseline.distill_form=full"], "did you mean --config.baseline.distill_from?"),
        (["--config.data.num_validation=0"], "The validation split must have images"),
        (["--config.teacher.file="], "--config.teacher.file=FILE"),
    ],
)
def test_what_no_row_could_use_is_refused(place, tmp_path, args, error):
    call("slimmable", place, tmp_path / "run", *args, error=error)
    assert not (tmp_path / "run").exists()


def test_a_row_needs_a_work_directory_and_the_section_of_its_config(place, tmp_path):
    call("slimmable", place, "", error="--workdir=DIR is required")
    with pytest.raises(command_line.UsageError, match="must have a section baseline"):
        baselines.section({"seed": 0})
    with pytest.raises(command_line.UsageError, match=r"takes \['method'.*got \['image',"):
        baselines.section({"baseline": {"method": "pruning", "title": "x", "image": 3}})
    with pytest.raises(command_line.UsageError, match="one by one; use 'teacher'"):
        baseline(method="individual", distill_from="full")
