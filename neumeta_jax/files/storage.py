"""Writing files so that a fault of the disk is one sentence and costs nothing that was there."""

import contextlib
import csv
import errno
import fcntl
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import safetensors

from neumeta_jax.errors import UsageError, check


class StorageError(OSError):
    """A file could not be written; what was there before is still there."""


def cache_folder() -> pathlib.Path:
    """What this package keeps for all runs of a user: compiled programs, fetched files."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "neumeta-jax"


def local(value: Any, name: str) -> Any:
    """`value`, which `name` was given, with home folders in place of `~`, at any depth.

    Raises:
        UsageError: for the address of an object store or a server, of which a folder would be made.
    """
    if isinstance(value, Mapping):
        return {key: local(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(local(entry, name) for entry in value)
    if not isinstance(value, str):
        return value
    check(
        not re.match(r"[A-Za-z][\w+.-]+:/", value),
        f"{name} must be a path of this machine's file system, got {value!r}; copy the data to "
        "a folder here, or mount the bucket and give that folder.",
    )
    return os.path.expanduser(value)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns a full disk, a read-only folder and the like into one sentence about `path`.

    Raises:
        StorageError: for an OSError, and for what safetensors makes of one.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        if system_error(error) is None:
            raise
        raise refusal(path, error) from error


def refusal(path: str | os.PathLike, error: Exception, *, kept: str = "") -> StorageError:
    """The StorageError for `error`, which writing `path` ended in; `kept` is safe all the same."""
    number = system_error(error)
    reason = os.strerror(number) if number else (str(error).splitlines() or [repr(error)])[0][:200]
    advice = "make room or make its folder writable"
    advice = "make its folder" if number == errno.ENOENT else advice
    return StorageError(
        f"{os.fspath(path)} could not be written ({reason}){kept and f'; {kept}'}; {advice}, and "
        "run the same command again."
    )


def system_error(error: Exception) -> int | None:
    """The number of the operating system's error that `error` reports, if it is of that kind."""
    if number := getattr(error, "errno", None):
        return number
    found = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    return int(found[1] or found[2]) if found else None  # of tensorstore, of safetensors


def check_is_damage(path: str | os.PathLike, error: Exception) -> None:
    """Raises unless what `path` holds, or lacks, is what made reading it end in `error`.

    Raises:
        StorageError: if the system refused to read it.
        Exception: `error` itself, if there was no memory.
    """
    if isinstance(error, MemoryError):
        raise error
    number = system_error(error)
    if number not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL):
        raise StorageError(
            f"{os.fspath(path)} could not be read ({os.strerror(number)}); let it be read, and run "
            "the same command again."
        ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, suffix: str = ".partial") -> Iterator[pathlib.Path]:
    """Yields a partial file's path, which takes the name `path` once it is whole and on the disk.

    Until then it has the name and `suffix`.

    Raises:
        StorageError: as `writing`; an old file at `path` is still there then.
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + suffix)
    with writing(path):
        try:
            partial.touch()
            mode = partial.stat().st_mode  # that of any new file; some writers make private ones
            yield partial
            partial.chmod(mode)
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # or a power failure may leave the name and no content
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path`, whole or not at all, as the functions below."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_csv(path: str | os.PathLike, table: Iterable[Sequence]) -> None:
    with replacing(path) as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows(table)


def as_table(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of equal keys for `write_csv`: their names first, sequences with blanks between."""
    names = list(rows[0]) if rows else []
    return [names] + [
        [" ".join(map(str, row[n])) if isinstance(row[n], list | tuple) else row[n] for n in names]
        for row in rows
    ]


@contextlib.contextmanager
def locked(path: pathlib.Path, *, name: str = "The work directory") -> Iterator[None]:
    """Makes a folder, if it is not there, and keeps it for this process alone.

    Raises:
        UsageError: if it cannot be written, or another process is using it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as error:
        raise UsageError(
            f"{name} {path} must be writable, but {error.strerror}; choose another."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"Another process is using {path}; wait for it or choose another folder."
            ) from None
        yield
