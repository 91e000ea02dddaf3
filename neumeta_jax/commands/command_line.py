"""The command line of train.py and eval.py: flags, config files, and errors of one sentence.

Wraps `ml_collections.config_flags`, whose own errors are tracebacks or point elsewhere.
"""

import difflib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from neumeta_jax.errors import INTERRUPTED, USAGE_ERROR, Interrupted, UsageError, sentence
from neumeta_jax.files.storage import local

# A flag by name: its type (a tuple: one of these words), its default, and what --help says.
Flags = Mapping[str, tuple[type | tuple[str, ...], Any, str]]

# Those of commands that work on a run of train.py.
WORKDIR: Flags = {"workdir": (str, "", "A work directory of train.py.")}
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


def define(values: flags.FlagValues, table: Flags) -> None:
    """Adds the flags of `table` to `values`."""
    for name, (kind, default, text) in table.items():
        if isinstance(kind, tuple):
            flags.DEFINE_enum(name, default, kind, text, flag_values=values)
        else:
            _DEFINE[kind](name, default, text, flag_values=values)


def _help(text: str, table: Flags) -> str:
    values = flags.FlagValues()
    define(values, table)
    others = "Flags, besides --config=RECIPE[:PRESET] and --config.FIELD=VALUE:"
    return f"{text.strip()}\n\n{others}\n{values.get_help()}"


def check_at_least(options: flags.FlagValues, **least: int) -> None:
    """Raises UsageError for a flag, given or with a default, whose value is below its least."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UsageError(f"--{name} must be at least {smallest}, got {value}.")


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main`; errors that this package raises on purpose become one line.

    With --help among its arguments it prints the docstring and the FLAGS of the module of `main`.
    """
    argv = sys.argv if argv is None else argv
    module = getattr(main, "__globals__", {})
    try:
        if "FLAGS" in module and not {"-h", "-help", "--help"}.isdisjoint(argv):
            print(_help(module["__doc__"] or "", module["FLAGS"]))
        else:
            main(argv)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if not isinstance(error, UsageError) and not _is_ours(error):
            raise
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except (RuntimeError, AssertionError):
        if not (message := _missing_device()):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


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
    argv: Sequence[str],
    table: Flags,
    *,
    config_required: bool,
) -> tuple[dict[str, Any], flags.FlagValues]:
    """The (config, flags) of a command line.

    Args:
        argv: with the program's name first.
        table: the script's own flags.
        config_required: whether `--config` must be there; without it the config is empty.

    Returns:
        The config with all overrides as nested plain dicts, and the parsed flags.

    Raises:
        UsageError: for a missing file, preset, flag or field, or a value of the wrong type.
    """
    argv = list(argv)
    values = flags.FlagValues()
    define(values, table)
    path, preset, argv = _config_argument(argv)
    if path is None:
        if config_required:
            raise UsageError(
                "--config=RECIPE or --config=FILE.py is required; recipes are "
                f"{', '.join(recipes())}."
            )
        if any(arg.startswith(("--config.", "-config.")) for arg in argv):
            raise UsageError("--config.field=value needs --config=FILE before it.")
    else:
        config = _load_config(path, preset)
        argv = _checked_overrides(argv, _flatten(config.to_dict()))
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        remaining = values(argv)
    except flags.Error as error:
        raise UsageError(sentence(str(error))) from None
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(sentence(str(error).strip("'\""))) from None
    if len(remaining) > 1:
        raise UsageError(
            f"Arguments must be flags like --name=value, got {' '.join(remaining[1:])!r}."
        )
    for name in table:
        if values[name].value == []:
            raise UsageError(f"--{name} takes values with commas between, got none; leave it out.")
        values[name].value = local(values[name].value, f"--{name}")
    return (local(values.config.to_dict(), "--config") if path is not None else {}), values


def _config_argument(argv: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """The file and the preset that `--config` asks for, and the other arguments."""
    for number, arg in enumerate(argv):
        value, end = None, number + 1
        if arg in ("--config", "-config"):
            value, end = "".join(argv[end : end + 1]), end + 1
        elif arg.startswith(("--config=", "-config=")):
            value = arg.split("=", 1)[1]
        if value is not None:
            path, _, preset = value.partition(":")
            return os.path.expanduser(path), preset or None, [*argv[:number], *argv[end:]]
    return None, None, list(argv)


def recipes() -> dict[str, pathlib.Path]:
    """The config files that come with the package, by name."""
    package = pathlib.Path(__file__).resolve().parents[1]
    # An installed package holds them, a checkout has them beside the package.
    found = [*package.glob("configs/*.py")] or [*package.parent.glob("configs/*.py")]
    return {path.stem: path for path in sorted(found)}


def _load_config(path: str, preset: str | None):
    if path in recipes():
        path = str(recipes()[path])
    if not os.path.isfile(path):
        raise UsageError(f"There is no config file {path!r}; recipes are {', '.join(recipes())}.")
    module_spec = importlib.util.spec_from_file_location("neumeta_jax_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"A config file is Python and ends in .py, got {path!r}.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UsageError(f"{path} must be valid Python, but line {error.lineno} is not.") from None
    if not hasattr(module, "get_config"):
        raise UsageError(f"A config file must define get_config(preset=''), {path} does not.")
    arguments = () if preset is None else (preset,)
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        raise UsageError(
            f"get_config in {path} must take one optional argument, the preset ({error})."
        ) from None
    try:
        return module.get_config(*arguments)
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


def _checked_overrides(argv: Sequence[str], fields: Mapping[str, Any]) -> list[str]:
    """`argv` with every `--config.field` known; integers may be written as 1e3."""
    checked = list(argv)
    for number, arg in enumerate(argv):
        if not arg.startswith(("--config.", "-config.")):
            continue
        name, equals, value = arg.lstrip("-").removeprefix("config.").partition("=")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            if not close:  # the right name in the wrong section
                leaf = name.rsplit(".", 1)[-1]
                close = [field for field in fields if field.rsplit(".", 1)[-1] == leaf][:1]
            if any(field.startswith(f"{name}.") for field in fields):
                close = [field for field in fields if field.startswith(f"{name}.")][:1]
            hint = f"did you mean --config.{close[0]}?" if close else "see the file for the fields."
            raise UsageError(f"The config has no field {name!r}; {hint}")
        default = fields[name]
        if not equals:
            if isinstance(default, bool) or number + 1 >= len(argv):
                continue
            value = argv[number + 1]
        if isinstance(default, bool) or not isinstance(default, int | float):
            continue
        kind = "an integer" if isinstance(default, int) else "a number"
        try:
            parsed = float(value)
            if isinstance(default, int):
                if not parsed.is_integer():
                    raise ValueError
                # ml_collections refuses integers written as 1e3.
                parsed = int(value) if value.lstrip("+-").isdigit() else int(parsed)
        except (ValueError, OverflowError):
            raise UsageError(f"--config.{name} must be {kind}, got {value[:80]!r}.") from None
        if equals:
            checked[number] = f"--config.{name}={parsed}"
        else:
            checked[number + 1] = str(parsed)
    return checked
