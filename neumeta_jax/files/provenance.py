"""What a result says of its making: versions, commit, machine, digests of files, and time."""

import contextlib
import hashlib
import importlib.metadata
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

_PACKAGES = ("neumeta-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, the packages that numbers depend on, and the devices in use."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    devices = jax.devices()
    kind = f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"
    return {**found, "devices": kind}


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def checkout() -> dict[str, Any]:
    """The commit of the source and whether it has changes; None where it is no git checkout."""
    root = pathlib.Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return None

    commit = git("rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "changed": None if changed is None else bool(changed.strip()),
    }


def file_digest(path: str | os.PathLike) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(saved: Any, given: Any, prefix: str = "") -> list[str]:
    """What differs between two trees of JSON values: "name (saved 1, given 2)"."""
    if not (isinstance(saved, Mapping) and isinstance(given, Mapping)):
        return [] if saved == given else [f"{prefix[:-1]} (saved {saved!r}, given {given!r})"]
    found = []
    for name in sorted(set(saved) | set(given)):
        pair = saved.get(name, "absent"), given.get(name, "absent")
        found += differences(*pair, f"{prefix}{name}.")
    return found


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss or m:ss.

    >>> format_seconds(3725), format_seconds(65)
    ('1:02:05', '1:05')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
