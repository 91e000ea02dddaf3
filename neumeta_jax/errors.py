"""Errors of the whole package, and the exit codes that they end a command with."""

from typing import Any

USAGE_ERROR = 2
INTERRUPTED = 75  # EX_TEMPFAIL: the same command continues
MAX_MESSAGE = 500  # letters


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what to do instead."""


class Interrupted(Exception):
    """The process was asked to stop and has saved its state."""


def sentence(text: str) -> str:
    """`text` on one printable line, with an end; of a long one the first part."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    line = line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}..."
    return line if line.endswith((".", "?")) else f"{line}."


def check(condition: Any, message: str) -> None:
    """Raises UsageError unless `condition`; `message` says what is required, given, and to do."""
    if not condition:
        raise UsageError(message)
