"""The command line of every command: flags, config files, and errors of one sentence."""

import ast
import difflib
import functools
import inspect
import operator
import os
import pathlib
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from neumeta_jax.errors import INTERRUPTED, USAGE_ERROR, Interrupted, UsageError, check, sentence
from neumeta_jax.files.storage import local

# A flag by name: its type (a tuple: one of these words), its default, and what --help says.
Flags = Mapping[str, tuple[type | tuple[str, ...], Any, str]]

# Those of commands that work on a trained run.
WORKDIR: Flags = {"workdir": (str, "", "A work directory of neumeta train.")}
DATA_DIR: Flags = {
    "data_dir": (str, "", "Where the data lies, if no longer where the run found it.")
}
# Those of commands that draw networks, and of commands that evaluate many.
NUM_SAMPLES: Flags = {
    "num_samples": (
        int,
        None,
        "Noisy weight samples to average (papers: 100); default: the config's.",
    )
}
SAMPLES: Flags = {
    **NUM_SAMPLES,
    "strategy": (
        ("auto", "loop", "map", "vmap"),
        "auto",
        "How networks are evaluated; auto finds out which is fastest here.",
    ),
}
_DEFINE = {
    bool: flags.DEFINE_bool,
    float: flags.DEFINE_float,
    int: flags.DEFINE_integer,
    list: flags.DEFINE_list,
    str: flags.DEFINE_string,
}
_HELP = {"-h", "-help", "--help"}
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def define(values: flags.FlagValues, table: Flags) -> None:
    """Adds the flags of `table` to `values`."""
    for name, (kind, default, text) in table.items():
        if isinstance(kind, tuple):
            flags.DEFINE_enum(name, default, kind, text, flag_values=values)
        else:
            _DEFINE[kind](name, default, text, flag_values=values)


def check_at_least(options: flags.FlagValues, **least: int) -> None:
    """Raises UsageError for a flag, given or with a default, whose value is below its least."""
    for name, smallest in least.items():
        value = getattr(options, name)
        check(
            value is None or value >= smallest,
            f"--{name} must be at least {smallest}, got {value}.",
        )


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main`; errors that this package raises on purpose become one line.

    With --help among its arguments it prints the docstring and the FLAGS of the module of `main`.
    """
    argv = sys.argv if argv is None else argv
    module = getattr(main, "__globals__", {})
    try:
        if "FLAGS" in module and not _HELP.isdisjoint(argv):
            print(_help(module["__doc__"] or "", module["FLAGS"]))
        else:
            main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if not isinstance(error, UsageError) and not _is_ours(error):
            raise
        _refuse(str(error))
    except (RuntimeError, AssertionError):
        if not (message := _missing_device()):
            raise
        _refuse(message)


def _refuse(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


def _help(text: str, table: Flags) -> str:
    values = flags.FlagValues()
    define(values, table)
    others = "Flags, besides --config=RECIPE[:PRESET] and --config.FIELD=VALUE:"
    _, _, listed = values.module_help(__name__).partition(":\n")  # without the module's name
    return f"{text.strip()}\n\n{others}\n{listed}"


def _missing_device() -> str:
    """Why JAX has no device to compute on, in one sentence; "" if it has one."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = f" ({' '.join(str(error).split())[:100]})" if str(error) else ""
        asked = os.environ.get("JAX_PLATFORMS", "")
        return (
            "JAX must find a device to compute on, but none starts with "
            f"JAX_PLATFORMS={asked}{reason}; unset it, set it to cpu, or install that device's JAX."
        )
    return ""


def _is_ours(error: BaseException) -> bool:
    """True if the error was raised by this package or by a config file, not by a library."""
    frames = traceback.extract_tb(error.__traceback__)
    place = pathlib.Path(frames[-1].filename).resolve()
    package = pathlib.Path(__file__).resolve().parents[1]
    scripts = pathlib.Path(sys.argv[0]).resolve()
    return package in place.parents or place == scripts or "configs" in place.parts


def parse(
    argv: Sequence[str], table: Flags, *, config_required: bool
) -> tuple[dict[str, Any], flags.FlagValues]:
    """The (config, flags) of a command line.

    Args:
        argv: with the program's name first.
        table: the command's own flags.
        config_required: whether `--config` must be there; without it the config is empty.

    Returns:
        The config with all overrides as nested plain dicts, and the parsed flags.

    Raises:
        UsageError: for a missing file, preset, flag or field, or a value of the wrong type.
    """
    values, config = flags.FlagValues(), {}
    define(values, table)
    path, preset, argv = _config_argument(argv)
    if path is not None:
        config = _load_config(path, preset)
        argv = _override(config, argv)
    check(
        path is not None or not config_required,
        f"--config=RECIPE or --config=FILE.py is required; recipes are {', '.join(recipes())}.",
    )
    check(
        not any(map(_OVERRIDE.fullmatch, argv)),
        "--config.field=value needs --config=FILE before it.",
    )
    try:
        remaining = values(argv)
    except flags.Error as error:
        raise UsageError(sentence(str(error))) from None
    check(
        len(remaining) == 1,
        f"Arguments must be flags like --name=value, got {' '.join(remaining[1:])!r}.",
    )
    for name in table:
        check(
            values[name].value != [],
            f"--{name} takes values with commas between, got none; leave it out.",
        )
        values[name].value = local(values[name].value, f"--{name}")
    return local(config, "--config"), values


def _config_argument(argv: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """The file and the preset that `--config` asks for, and the other arguments."""
    for number, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            end = number + (1 if equals else 2)
            value = value if equals else "".join(argv[number + 1 : end])
            path, _, preset = value.partition(":")
            return os.path.expanduser(path), preset or None, [*argv[:number], *argv[end:]]
    return None, None, list(argv)


def recipes() -> dict[str, pathlib.Path]:
    """The config files that come with the package, by name."""
    package = pathlib.Path(__file__).resolve().parents[1]
    # An installed package holds them, a checkout has them beside the package.
    found = [*package.glob("configs/*.py")] or [*package.parent.glob("configs/*.py")]
    return {path.stem: path for path in sorted(found)}


def _load_config(path: str, preset: str | None) -> dict[str, Any]:
    path = str(recipes().get(path, path))
    known = f"recipes are {', '.join(recipes())}."
    check(os.path.isfile(path), f"There is no config file {path!r}; {known}")
    try:
        get_config: Any = runpy.run_path(path).get("get_config")
    except SyntaxError as error:
        raise UsageError(f"{path} must be valid Python, but line {error.lineno} is not.") from None
    check(get_config, f"A config file must define get_config(preset=''), {path} does not.")
    arguments = () if preset is None else (preset,)
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        raise UsageError(
            f"get_config in {path} must take one optional argument, the preset ({error})."
        ) from None
    try:
        return get_config(*arguments).to_dict()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _override(config: dict[str, Any], argv: Sequence[str]) -> list[str]:
    """Sets the fields of `config` that `argv` overrides; returns its other arguments."""
    fields, others, arguments = _flatten(config), [], iter(argv)
    for argument in arguments:
        found = _OVERRIDE.fullmatch(argument)
        if not found:
            others.append(argument)
            continue
        negated, name, text = found.groups()
        if name not in fields or (negated and not isinstance(fields[name], bool)):
            raise UsageError(f"The config has no field {name!r}; {_suggestion(name, fields)}")
        if text is None and isinstance(fields[name], bool):
            text = "false" if negated else "true"
        elif text is None:
            text = next(arguments, None)
            check(text is not None, f"--config.{name} must have a value: --config.{name}=VALUE.")
        *sections, leaf = name.split(".")
        section = functools.reduce(operator.getitem, sections, config)
        section[leaf] = _parsed(name, str(text), fields[name])
    return others


def _suggestion(name: str, fields: Mapping[str, Any]) -> str:
    leaf = name.rsplit(".", 1)[-1]
    close = [field for field in fields if field.startswith(f"{name}.")]  # a section
    close = close or difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    # The right name in the wrong section.
    close = close or [field for field in fields if field.rsplit(".", 1)[-1] == leaf]
    return f"did you mean --config.{close[0]}?" if close else "see the file for the fields."


def _parsed(name: str, text: str, default: Any) -> Any:
    """`text` as a value of the type of `default`; integers may be written as 1e3."""
    if isinstance(default, str):
        return text
    kind = "numbers with commas between"
    try:
        if isinstance(default, bool):
            kind = "true or false"
            return _BOOLEANS[text.lower()]
        if isinstance(default, float):
            kind = "a number"
            return float(text)
        if isinstance(default, int):
            kind = "an integer"
            exact = int(text) if text.lstrip("+-").isdigit() else float(text)
            if int(exact) != exact:
                raise ValueError
            return int(exact)
        value = ast.literal_eval(text)
        return type(default)(value if isinstance(value, tuple | list) else (value,))
    except (ValueError, KeyError, SyntaxError, OverflowError, MemoryError, RecursionError):
        raise UsageError(f"--config.{name} must be {kind}, got {text[:80]!r}.") from None
