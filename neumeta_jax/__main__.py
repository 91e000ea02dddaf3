"""Train one function and get from it every size of a network.

neumeta NAME [--flag=value ...]        or python -m neumeta_jax NAME
neumeta NAME --help                    what a command does, and its flags
"""

import ast
import difflib
import importlib
import importlib.metadata
import pathlib
from collections.abc import Sequence

from neumeta_jax.commands import command_line
from neumeta_jax.errors import check

# In the order of use. Each is a module of `commands` with a docstring, FLAGS and main(argv).
COMMANDS = ("train", "eval", "search", "export", "latency", "report", "compare", "fetch")


def overview() -> str:
    """What `neumeta --help` prints: the first line of each command's docstring, none imported."""
    lines = [(__doc__ or "").strip(), ""]
    for command in COMMANDS:
        source = pathlib.Path(command_line.__file__).with_name(f"{command}.py").read_text("utf-8")
        text = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"    {command:<8}  {text.splitlines()[0]}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that `argv`, by default that of this process, begins with."""
    command_line.run(_dispatch, argv)


def _dispatch(argv: Sequence[str]) -> None:
    name = argv[1] if len(argv) > 1 else "--help"
    if name in ("-h", "-help", "--help"):
        print(overview())
    elif name == "--version":
        print(f"neumeta-jax {importlib.metadata.version('neumeta-jax')}")
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}."
        check(name in COMMANDS, f"neumeta has no command {name[:80]!r}; {hint}")
        module = importlib.import_module(f"neumeta_jax.commands.{name}")
        command_line.run(module.main, [f"neumeta {name}", *argv[2:]])


if __name__ == "__main__":
    main()
