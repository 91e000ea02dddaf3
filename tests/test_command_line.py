import pathlib
import sys

import numpy as np
import pytest

from neumeta_jax import architecture, command_line
from neumeta_jax.command_line import UsageError

CONFIG = """
from ml_collections import ConfigDict


def get_config(preset=""):
    if preset not in ("", "small"):
        raise ValueError(f"There is the preset 'small', got {preset!r}.")
    config = ConfigDict()
    config.seed = 1 if preset else 0
    config.name = "digits"
    config.smooth = True
    config.train = ConfigDict()
    config.train.steps = 5
    config.train.learning_rate = 1e-3
    config.train.widths = (4, 6, 8)
    config.data = ConfigDict()
    config.data.mean = ()
    config.data.ratios = (1.0, 0.5)
    return config
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project's folder with the config files a.py and b.py."""
    (tmp_path / "configs").mkdir()
    for name in "ab":
        (tmp_path / "configs" / f"{name}.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)


FLAGS = {
    "workdir": (str, "", "Where the run lives."),
    "dry_run": (bool, False, "Describe the run."),
}


def parse(*args, config_required=True):
    return command_line.parse(["train.py", *args], FLAGS, config_required=config_required)


def config_with(*args):
    return parse("--config=configs/a.py", *args)[0]


def refusal(*args, **options):
    """The message of the UsageError; one line, as the user will see it."""
    with pytest.raises(UsageError) as error:
        parse(*args, **options)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- the config file -------------------------------------------------------------------------


def test_a_config_comes_as_plain_values_and_flags_beside_it():
    config, options = parse("--config=configs/a.py", "--workdir=x")
    assert config == {
        "seed": 0,
        "name": "digits",
        "smooth": True,
        "train": {"steps": 5, "learning_rate": 1e-3, "widths": (4, 6, 8)},
        "data": {"mean": (), "ratios": (1.0, 0.5)},
    }
    assert type(config["train"]) is dict
    assert (options.workdir, options.dry_run) == ("x", False)


def test_a_preset_follows_a_colon():
    assert parse("--config=configs/a.py:small")[0]["seed"] == 1
    assert parse("--config", "configs/a.py:small")[0]["seed"] == 1


def test_a_missing_config_lists_those_that_exist():
    for args in ([], ["--config=configs/c.py"], ["--config="], ["--config"]):
        message = refusal(*args)
        assert "configs/a.py, configs/b.py" in message
    assert "'configs/c.py'" in refusal("--config=configs/c.py")


def test_outside_a_project_the_message_says_where_to_look(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = refusal("--config=configs/a.py")
    assert f"no config files in {tmp_path / 'elsewhere' / 'configs'}" in message


def test_where_a_config_is_optional_it_is_empty():
    assert parse("--workdir=x", config_required=False)[0] == {}


def test_overrides_without_a_config_are_refused():
    message = refusal("--config.seed=1", config_required=False)
    assert "needs --config=FILE" in message


def test_an_unknown_preset_is_one_line(capsys):
    def main(argv):
        command_line.parse(argv, FLAGS, config_required=True)

    with pytest.raises(SystemExit) as stop:
        command_line.run(main, ["train.py", "--config=configs/a.py:fast"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: There is the preset 'small', got 'fast'.\n"


def test_an_unknown_preset_is_one_line_wherever_the_config_file_lies(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(CONFIG)

    def main(argv):
        command_line.parse(argv, FLAGS, config_required=True)

    with pytest.raises(SystemExit) as stop:
        command_line.run(main, ["train.py", "--config=mine.py:fast"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: There is the preset 'small', got 'fast'.\n"


def test_a_file_without_get_config_is_refused():
    pathlib.Path("configs/empty.py").write_text("config = {}\n")
    assert "configs/empty.py" in refusal("--config=configs/empty.py")
    assert "get_config" in refusal("--config=configs/empty.py")


def test_a_file_that_is_not_valid_python_is_refused_with_the_line():
    pathlib.Path("configs/broken.py").write_text("x = 1\ndef get_config(:\n    pass\n")
    message = refusal("--config=configs/broken.py")
    assert "configs/broken.py must be valid Python, but line 2 is not" in message


def test_a_file_that_is_no_python_is_refused():
    pathlib.Path("configs/a.yaml").write_text("seed: 1\n")
    assert "configs/a.yaml" in refusal("--config=configs/a.yaml")


# --- overrides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, section, field, wanted",
    [
        ("--config.train.steps=7", "train", "steps", 7),
        ("--config.train.steps=1e3", "train", "steps", 1000),
        ("--config.train.steps=-2", "train", "steps", -2),
        ("--config.train.steps=9007199254740993", "train", "steps", 9007199254740993),
        ("--config.train.learning_rate=1e-2", "train", "learning_rate", 0.01),
        ("--config.train.learning_rate=3", "train", "learning_rate", 3.0),
        ("--config.train.widths=2,3,4", "train", "widths", (2, 3, 4)),
        ("--config.train.widths=(2,3,4)", "train", "widths", (2, 3, 4)),
        ("--config.data.ratios=0.25", "data", "ratios", (0.25,)),
        ("--config.data.mean=0.1,0.2", "data", "mean", (0.1, 0.2)),
    ],
)
def test_an_override_has_the_type_of_its_field(given, section, field, wanted):
    got = config_with(given)[section][field]
    assert got == wanted and type(got) is type(wanted)


def test_an_override_may_follow_a_space():
    assert config_with("--config.train.steps", "1e3")["train"]["steps"] == 1000
    assert config_with("--config.name", "mnist")["name"] == "mnist"


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("--config.smooth=false", False),
        ("--config.smooth=False", False),
        ("--config.smooth=0", False),
        ("--config.smooth=true", True),
        ("--config.smooth", True),
        ("--noconfig.smooth", False),
    ],
)
def test_a_boolean_is_spelled_in_the_usual_ways(given, wanted):
    assert config_with(given)["smooth"] is wanted


def test_a_string_may_be_empty_or_hold_anything():
    assert config_with("--config.name=")["name"] == ""
    assert config_with("--config.name=/a b=c,d")["name"] == "/a b=c,d"


@pytest.mark.parametrize("value", ["1.5", "1e-1", "x", "", "nan", "inf", "1_0.5"])
def test_what_is_no_integer_is_refused(value):
    message = refusal("--config=configs/a.py", f"--config.train.steps={value}")
    assert message == f"--config.train.steps must be an integer, got {value!r}."


def test_what_is_no_number_is_refused():
    message = refusal("--config=configs/a.py", "--config.train.learning_rate=fast")
    assert message == "--config.train.learning_rate must be a number, got 'fast'."


def test_what_is_no_boolean_is_refused():
    assert "maybe" in refusal("--config=configs/a.py", "--config.smooth=maybe")


@pytest.mark.parametrize(
    "given, suggested",
    [
        ("train.step", "train.steps"),
        ("trian.steps", "train.steps"),
        ("sed", "seed"),
        ("data.learning_rate", "train.learning_rate"),  # the wrong section
        ("learning_rate", "train.learning_rate"),  # no section
        ("train", "train."),  # a section
    ],
)
def test_an_unknown_field_suggests_the_one_that_was_meant(given, suggested):
    message = refusal("--config=configs/a.py", f"--config.{given}=1")
    assert f"has no field {given!r}; did you mean --config.{suggested}" in message


def test_a_field_like_no_other_is_named():
    message = refusal("--config=configs/a.py", "--config.zzzzzz=1")
    assert "no field 'zzzzzz'" in message and "did you mean" not in message


# --- flags -----------------------------------------------------------------------------------


def test_an_unknown_flag_suggests_the_one_that_was_meant():
    message = refusal("--config=configs/a.py", "--wrkdir=x")
    assert "wrkdir" in message and "workdir" in message


def test_arguments_that_are_no_flags_are_refused():
    assert "'extra more'" in refusal("--config=configs/a.py", "extra", "more")


@pytest.mark.parametrize("flag", ["--workdir", "--config.train.steps"])
def test_a_flag_without_its_value_is_refused(flag):
    assert flag.lstrip("-") in refusal("--config=configs/a.py", flag)


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--config=configs/a.py", "--help"]])
@pytest.mark.parametrize("config_required", [True, False])
def test_help_lists_the_flags_with_and_without_a_config(capsys, args, config_required):
    with pytest.raises(SystemExit) as stop:
        parse(*args, config_required=config_required)
    assert stop.value.code == 0
    found = capsys.readouterr().out
    assert all(flag in found for flag in ("--config", "--workdir", "dry_run"))


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


def test_an_error_of_this_package_is_one_line_and_exit_status_2(capsys):
    code, printed = run(lambda: architecture.cifar_resnet(9, num_classes=10), capsys)
    assert code == 2
    assert printed == "error: A CIFAR ResNet has depth 6n + 2 with n >= 1, got depth=9.\n"


def test_a_usage_error_is_one_line_wherever_it_was_raised(capsys):
    assert run(UsageError("first\n  second"), capsys) == (2, "error: first second\n")


def test_errors_of_the_script_itself_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [__file__])
    assert run(ValueError("so\nnot"), capsys) == (2, "error: so not\n")


def test_an_interrupted_run_exits_with_75(capsys):
    stop = command_line.Interrupted("stopped at step 3")
    assert run(stop, capsys) == (75, "stopped at step 3\n")


@pytest.mark.parametrize(
    "foreign",
    [
        lambda: np.zeros(3).reshape(2, 2),
        lambda: np.linalg.cholesky(-np.eye(2)),
        lambda: pathlib.Path("nowhere").read_text(),
        lambda: {}["x"],
    ],
    ids=["ValueError", "LinAlgError", "FileNotFoundError", "KeyError"],
)
def test_errors_of_other_libraries_keep_their_traceback(foreign, capsys):
    def main(argv):
        foreign()

    with pytest.raises((ValueError, OSError, KeyError)):
        command_line.run(main, ["train.py"])
    assert capsys.readouterr().err == ""


def test_a_program_that_succeeds_exits_by_itself():
    assert command_line.run(lambda argv: None, ["train.py"]) is None
