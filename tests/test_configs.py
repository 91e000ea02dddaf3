"""Every config with every preset describes a run that could start; the ablation's rows compare."""

import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from neumeta_jax.commands import command_line
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import make_inr
from neumeta_jax.data import datasets
from neumeta_jax.errors import UsageError
from neumeta_jax.networks.cifar_resnet import init_params
from neumeta_jax.runs import recipes
from neumeta_jax.runs.config import from_config
from neumeta_jax.runs.workdir import check_same_config, read_config

CONFIGS = sorted((pathlib.Path(__file__).resolve().parent.parent / "configs").glob("*.py"))
NUM_TRAINING_IMAGES = 45_000  # of CIFAR, without 5,000 for validation
STEPS, IMAGE_PASSES = 200, 200 * 3 * 32


@functools.cache
def load(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ABLATION = load(next(path for path in CONFIGS if path.stem == "ablation"))
ROWS = [row for row in ABLATION.ROWS if row != "base"]


@functools.cache
def stand_in(name):
    """A data set of a few images with the sizes and classes of the real one."""
    size, channels = (8, 1) if name == "digits" else (32, 3)
    num_classes = 100 if name == "cifar100" else 10
    images = np.random.default_rng(0).integers(0, 256, (4, size, size, channels), np.uint8)
    labels = np.arange(4, dtype=np.int32)
    return datasets.make_dataset(name, images, labels, images, labels, num_classes=num_classes)


def resolve(config):
    config = config.to_dict()
    return from_config(config, stand_in(config["data"]["name"]))


@functools.cache
def row(name):
    return resolve(ABLATION.get_config(name))


def training_phases(experiment):
    recipe, num_images = experiment.recipe, NUM_TRAINING_IMAGES
    found = recipe.phases(experiment.hypernetwork, num_images=num_images)
    return [phase for phase in found if phase.loss and phase.sizes.with_full]


def total_steps(experiment):
    return sum(phase.stop - phase.start for phase in training_phases(experiment))


def size_in_networks(experiment):
    spec = experiment.spec
    shapes = jax.eval_shape(
        lambda key: hyper.init(key, experiment.hypernetwork, init_params(key, spec)),
        jax.random.key(0),
    )
    return hyper.num_inr_params(shapes) / spec.num_params


@pytest.mark.parametrize(
    "path, preset",
    [(path, preset) for path in CONFIGS for preset in load(path).PRESETS],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_preset_of_every_config_describes_a_run(path, preset):
    experiment = resolve(load(path).get_config(preset))
    assert total_steps(experiment) > 0
    if preset == "smoke":  # one is trained where there is no file
        assert experiment.teacher.epochs <= 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_unknown_preset_is_refused_with_those_there_are(path):
    with pytest.raises(ValueError, match=rf"{path.name} has the presets \w.*\w, got 'large'"):
        load(path).get_config("large")


def test_the_ablation_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = next(path for path in CONFIGS if path.stem == "ablation")
    config, _ = command_line.parse(
        ["train.py", f"--config={path}:nested", "--config.seed=3"],
        {},
        config_required=True,
    )
    assert (config["inr"]["resampling"], config["seed"]) == ("nested", 3)


def test_the_ablation_without_a_preset_is_its_base():
    assert ABLATION.get_config().to_dict() == ABLATION.get_config("base").to_dict()


@pytest.mark.parametrize("name", ["base", *ROWS])
def test_every_row_of_the_ablation_has_the_same_budget(name):
    experiment = row(name)
    recipe = experiment.recipe
    steps = total_steps(experiment)
    assert steps == STEPS
    assert steps * recipe.num_sizes * recipe.batch_size == IMAGE_PASSES
    warmup = sum(phase.warmup_steps for phase in training_phases(experiment))
    assert warmup == sum(phase.warmup_steps for phase in training_phases(row("base")))
    different = 3 if name == "separate_images" else 1
    assert steps * recipe.images_per_step == different * STEPS * recipe.batch_size


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_ablation_changes_what_it_says_and_nothing_else(name):
    base, other = ABLATION.get_config("base").to_dict(), ABLATION.get_config(name).to_dict()
    changed = {
        field: value
        for field, value in command_line._flatten(other).items()
        if command_line._flatten(base).get(field, "absent") != value
    }
    assert changed and row(name) != row("base")
    for field, value in ABLATION.ROWS[name][1].items():
        if field != "inr":
            assert changed.pop(field) == value
    assert all(field.startswith("inr.") for field in changed), changed


def test_no_two_rows_of_the_ablation_are_equal():
    fields = [repr(dataclasses.asdict(row(name))) for name in ABLATION.ROWS]
    assert len(set(fields)) == len(fields)


@pytest.mark.parametrize("name", ["base", *ROWS])
def test_the_inrs_of_the_ablation_are_about_as_large_as_a_network(name):
    size = size_in_networks(row(name))
    if name == "per_tensor_mlp":
        assert size > 1.2
    else:
        assert 0.3 < size <= 1.2


# --- defaults and earlier versions -----------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_has_every_field_of_its_sections(path):
    config = load(path).get_config().to_dict()
    for name, cls in recipes.SECTIONS.items():
        assert set(config[name]) == {field.name for field in dataclasses.fields(cls)}
    inr = make_inr(**config["inr"])
    assert set(config["inr"]) == {"kind", *(field.name for field in dataclasses.fields(inr))}
    config.pop("baseline", None)
    alone = {name for name, value in config.items() if not isinstance(value, dict)}
    assert alone == {field.name for field in dataclasses.fields(recipes.Run)}
    assert recipes.completed(config) == config


RUNS = (
    "digits",
    "cifar100_resnet20/protocol_b",
    "cifar100_resnet20/depth",
    "cifar100_resnet56/depth",
)


@pytest.mark.parametrize("run", RUNS)
def test_the_work_directory_of_an_earlier_version_is_read(run):
    path = CONFIGS[0].parent.parent / "results" / run / "config.json"
    config = read_config(path.parent)
    assert set(config["train"]) == {field.name for field in dataclasses.fields(recipes.Train)}
    assert "channel_dropout" not in config["inr"]
    experiment = from_config(config, stand_in(config["data"]["name"]))
    check_same_config(path.parent, config)
    saved = json.loads(path.read_text())
    assert experiment.recipe.epochs == saved["train"]["epochs"]


@pytest.mark.parametrize(
    "fields, refused",
    [
        ({}, ""),
        ({"stream_weight": 0.0}, ""),
        ({"stream_weight": 0.5}, "train.stream_weight must be 0.0"),
        ({"max_width_ratio": 1.0, "clip": 10.0}, ""),
        ({"max_width_ratio": 0.8}, "train.max_width_ratio must be 1.0"),
        ({"skip_order": "random"}, ""),
        ({"skip_order": "last", "skip_blocks": 0.5}, ""),
        ({"skip_order": "random", "skip_blocks": 0.5}, "train.skip_order must be 'last'"),
    ],
    ids=str,
)
def test_options_that_are_gone_are_taken_where_they_changed_nothing(fields, refused):
    config = recipes.defaults("grid").to_dict()
    old = {**config, "train": {**config["train"], **fields}}
    if refused:
        with pytest.raises(UsageError, match=refused) as error:
            recipes.completed(old)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
    else:
        found = recipes.completed(old)
        skip_blocks = {name: value for name, value in fields.items() if name == "skip_blocks"}
        assert found["train"] == {**config["train"], **skip_blocks}


@pytest.mark.parametrize(
    "section, field, message",
    [
        ("train", "epoch", "section 'train' has no field 'epoch'; did you mean 'epochs'"),
        ("data", "pad", "section 'data' has no field 'pad'"),
        ("", "sed", "The config has no field 'sed'; did you mean 'seed'"),
    ],
)
def test_an_unknown_field_is_refused(section, field, message):
    config = recipes.defaults("grid").to_dict()
    (config[section] if section else config)[field] = 1
    with pytest.raises(UsageError, match=message):
        from_config(config, stand_in("cifar100"))
