import importlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest

from neumeta_jax.__main__ import COMMANDS
from neumeta_jax.commands import command_line
from neumeta_jax.errors import Interrupted, UsageError
from neumeta_jax.networks import cifar_spec

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VALUES = {
    "seed": 0,
    "name": "digits",
    "smooth": True,
    "train": {"steps": 5, "learning_rate": 1e-3, "widths": (4, 6, 8)},
    "data": {"mean": (), "ratios": (1.0, 0.5)},
}
CONFIG = f"""
from ml_collections import ConfigDict

def get_config(preset=""):
    if preset not in ("", "small"):
        raise ValueError(f"There is the preset 'small', got {{preset!r}}.")
    return ConfigDict({VALUES} | {{"seed": int(preset == "small")}})
"""
FILES = {
    "a.py": CONFIG,
    "b.py": CONFIG,
    "c.py": "config = {}\n",
    "d.py": "x = 1\ndef get_config(:\n    pass\n",
    "e.yaml": "seed: 1\n",
}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project's folder with config files, two of them good."""
    (tmp_path / "configs").mkdir()
    for name, content in FILES.items():
        (tmp_path / "configs" / name).write_text(content)
    monkeypatch.chdir(tmp_path)


FLAGS = {
    "workdir": (str, "", "Where the run lives."),
    "dry_run": (bool, False, "Describe the run."),
}


def parse(*args, config_required=True):
    return command_line.parse(["train.py", *args], FLAGS, config_required=config_required)


def refusal(*args, **options):
    """The message of the UsageError; one line, as the user will see it."""
    with pytest.raises(UsageError) as error:
        parse(*args, **options)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- the config file -------------------------------------------------------------------------


def test_a_config_comes_as_plain_values_perhaps_of_a_preset_and_flags_beside_it():
    config, options = parse("--config=configs/a.py", "--workdir=x")
    assert config == VALUES
    assert type(config["train"]) is dict
    assert (options.workdir, options.dry_run) == ("x", False)
    assert parse("--config=configs/a.py:small")[0]["seed"] == 1
    assert parse("--config", "configs/a.py:small")[0]["seed"] == 1


LISTED = "recipes are ablation, baselines, digits, own, resnet20, resnet56, resnet56_paper"


@pytest.mark.parametrize(
    "line, words",
    [
        ("", [LISTED]),
        ("--config", [LISTED]),
        ("--config=", [LISTED]),
        ("--config=configs/z.py", [LISTED, "'configs/z.py'"]),
        ("--config=resnet21", [LISTED, "'resnet21'"]),
        ("--config=digits:fast", ["has the presets", "'fast'"]),
        ("--config=configs/c.py", ["configs/c.py", "get_config"]),
        ("--config=configs/d.py", ["configs/d.py must be valid Python, but line 2 is not"]),
        ("--config=configs/e.yaml", ["configs/e.yaml"]),
        ("--config=configs/a.py --wrkdir=x", ["wrkdir", "workdir"]),  # the one that was meant
        ("--config=configs/a.py extra more", ["'extra more'"]),
        ("--config=configs/a.py --workdir", ["workdir"]),  # without its value
        ("--config=configs/a.py --config.train.steps", ["config.train.steps"]),
        ("--config=configs/a.py --config.smooth=maybe", ["maybe"]),
    ],
)
def test_what_cannot_be_read_is_named_with_what_could(line, words):
    message = refusal(*line.split())
    assert all(word in message for word in words), message


def test_without_a_config_there_are_no_fields_to_override():
    assert parse("--workdir=x", config_required=False)[0] == {}
    assert "needs --config=FILE" in refusal("--config.seed=1", config_required=False)


def test_a_recipe_of_the_package_is_found_by_name_from_any_folder():
    config, _ = parse("--config=resnet20:depth", "--config.seed=3")
    assert (config["network"]["depth"], config["train"]["shallow_epochs"]) == (20, 3.0)
    assert config["seed"] == 3


@pytest.mark.parametrize("flag", ["--workdir", "--config.name"])
def test_home_folders_are_expanded_and_object_stores_refused(flag, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config, options = parse("--config=configs/a.py", f"{flag}=~/run")
    assert (options.workdir if flag == "--workdir" else config["name"]) == "/home/me/run"
    for url in ("gs://bucket/run", "s3://bucket/run", "gs:/bucket/run"):
        message = refusal("--config=configs/a.py", f"{flag}={url}")
        assert message.startswith(f"{flag} must be a path") and url in message


@pytest.mark.parametrize("folder", ["", "configs/"])
def test_an_unknown_preset_is_one_line_wherever_the_config_file_lies(folder, capsys):
    pathlib.Path(f"{folder}mine.py").write_text(CONFIG)
    found = run(lambda: parse(f"--config={folder}mine.py:fast"), capsys)
    assert found == (2, "error: There is the preset 'small', got 'fast'.\n")


# --- overrides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("--config.train.steps=7", 7),
        ("--config.train.steps=1e3", 1000),
        ("--config.train.steps=-2", -2),
        ("--config.train.steps=9007199254740993", 9007199254740993),
        ("--config.train.steps 1e3", 1000),
        ("--config.train.learning_rate=1e-2", 0.01),
        ("--config.train.learning_rate=3", 3.0),
        ("--config.train.widths=2,3,4", (2, 3, 4)),
        ("--config.train.widths=(2,3,4)", (2, 3, 4)),
        ("--config.data.ratios=0.25", (0.25,)),
        ("--config.data.mean=0.1,0.2", (0.1, 0.2)),
        ("--config.name mnist", "mnist"),
        ("--config.name=", ""),
        ("--config.name='/a b=c,d'", "/a b=c,d"),
        ("--config.smooth=false", False),
        ("--config.smooth=False", False),
        ("--config.smooth=0", False),
        ("--config.smooth=true", True),
        ("--config.smooth", True),
        ("--noconfig.smooth", False),
    ],
)
def test_an_override_has_the_type_of_its_field(given, wanted):
    got = parse("--config=configs/a.py", *shlex.split(given))[0]
    for key in re.split("[ =]", given)[0].split(".")[1:]:
        got = got[key]
    assert got == wanted and type(got) is type(wanted)


INTEGERS = [("steps", text) for text in ("1.5", "1e-1", "x", "", "nan", "inf", "1_0.5")]


@pytest.mark.parametrize("field, value", [*INTEGERS, ("learning_rate", "fast")])
def test_what_is_no_number_is_refused(field, value):
    kind = "an integer" if field == "steps" else "a number"
    message = refusal("--config=configs/a.py", f"--config.train.{field}={value}")
    assert message == f"--config.train.{field} must be {kind}, got {value!r}."


@pytest.mark.parametrize(
    "given, suggested",
    [
        ("train.step", "train.steps"),
        ("trian.steps", "train.steps"),
        ("sed", "seed"),
        ("data.learning_rate", "train.learning_rate"),  # the wrong section
        ("learning_rate", "train.learning_rate"),  # no section
        ("train", "train."),  # a section
        ("zzzzzz", None),  # like no other
    ],
)
def test_an_unknown_field_suggests_the_one_that_was_meant(given, suggested):
    message = refusal("--config=configs/a.py", f"--config.{given}=1")
    assert f"has no field {given!r}" in message
    hint = f"; did you mean --config.{suggested}"
    assert hint in message if suggested else "did you mean" not in message


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--config=configs/a.py", "--help"]])
def test_help_is_the_modules_docstring_and_its_flags(capsys, args):
    module = {"__doc__": "Does this.\n\n    neumeta a_command\n", "FLAGS": FLAGS}
    exec("def main(argv): raise AssertionError", module)
    command_line.run(module["main"], ["neumeta a_command", *args])
    found = capsys.readouterr().out
    assert found.startswith("Does this.\n\n    neumeta a_command\n")
    assert all(flag in found for flag in ("--config", "--workdir", "dry_run"))


# --- the dispatcher --------------------------------------------------------------------------

HEAVY = ("jax", "tensorflow_datasets", "matplotlib", "sklearn", "PIL")
LIGHT = f"""
import sys
import neumeta_jax, neumeta_jax.commands
from neumeta_jax.__main__ import main
main(["neumeta", "--help"])
assert not (found := {set(HEAVY)} & set(sys.modules)), found
"""


def test_an_overview_needs_no_jax_and_has_a_line_for_each_command():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 120
    for name in COMMANDS:
        assert any(line.strip().startswith(f"{name} ") for line in lines), name


def test_the_console_script_runs_a_command_by_name(capsys):
    entry = PYPROJECT["project"]["scripts"]["neumeta"]
    module, function = entry.split(":")
    main = getattr(importlib.import_module(module), function)
    main(["neumeta", "search", "--help"])
    assert "--max_macs" in capsys.readouterr().out
    for arguments, words in [
        (["serch"], "no command 'serch'; did you mean search?"),
        (["zzz"], "there are train, eval"),
        (["train", "--config=gone"], "There is no config file 'gone'"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["neumeta", *arguments])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_every_folder_with_modules_is_installed_and_the_recipes_too():
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "neumeta_jax").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders}
    assert set(setuptools["packages"]) == found | {"neumeta_jax.configs"}
    assert setuptools["package-dir"] == {"neumeta_jax.configs": "configs"}


# --- errors ----------------------------------------------------------------------------------


def run(error_or_main, capsys):
    """Exit status and standard error of a program that raises, or does, this."""

    def main(argv):
        if isinstance(error_or_main, BaseException):
            raise error_or_main
        error_or_main()

    with pytest.raises(SystemExit) as stop:
        command_line.run(main, ["train.py"])
    captured = capsys.readouterr()
    assert captured.out == ""
    return stop.value.code, captured.err


def test_own_errors_and_interruptions_are_one_line_and_an_exit_status(capsys, monkeypatch):
    of_the_package = run(lambda: cifar_spec.resnet_spec(9, num_classes=10), capsys)
    message = "error: A CIFAR ResNet has depth 6n + 2 with n >= 1, got depth=9.\n"
    assert of_the_package == (2, message)
    assert run(UsageError("first\n  second"), capsys) == (2, "error: first second\n")
    stop = Interrupted("stopped at step 3")
    assert run(stop, capsys) == (75, "stopped at step 3\n")
    assert command_line.run(lambda argv: None, ["train.py"]) is None
    monkeypatch.setattr(sys, "argv", [__file__])
    assert run(ValueError("so\nnot"), capsys) == (2, "error: so not\n")


def test_output_that_nobody_reads_any_longer_ends_a_command_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "neumeta_jax", "--help"]
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (found.returncode, found.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("failure", [AssertionError(), RuntimeError("no backend 'x'\nat all")])
def test_where_jax_finds_no_device_a_sentence_names_the_variable(failure, capsys, monkeypatch):
    def no_device():
        raise failure

    monkeypatch.setattr(jax, "devices", no_device)
    monkeypatch.setenv("JAX_PLATFORMS", "other")
    status, error = run(lambda: jax.devices(), capsys)
    assert status == 2 and error.count("\n") == 1
    assert "JAX_PLATFORMS=other" in error and " ".join(str(failure).split()) in error


def test_errors_of_other_libraries_keep_their_traceback(capsys):
    for foreign, error in [
        (lambda: np.zeros(3).reshape(2, 2), ValueError),
        (lambda: np.linalg.cholesky(-np.eye(2)), np.linalg.LinAlgError),
        (lambda: pathlib.Path("nowhere").read_text(), FileNotFoundError),
        (lambda: {}["x"], KeyError),
        (lambda: sys.setrecursionlimit(1), RecursionError),
    ]:
        with pytest.raises(error):
            run(foreign, capsys)
        assert capsys.readouterr().err == ""
