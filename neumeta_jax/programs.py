"""Compiled programs that the next process loads without tracing them again.

JAX's persistent cache saves compilation, but finds a program by what it lowers to: a training step
is traced and lowered for seconds, on one core, before the cache can be asked. Here the key is what
the program is made from: the arguments of the function that makes it, the source of this package,
versions, devices and JAX's settings. The files lie in the folder of JAX's cache, which must be as
trusted: both hold code that is run.

A program that came out of JAX's cache is not kept: XLA's CPU backend saves one that was loaded
without some of its functions. So of two equal programs under different keys (the source changed,
the program did not) the first is kept.

A program is only as good as its key, which does not see functions that were replaced at run time.
So nothing is kept until a command calls `enable`; code that imports the library is not affected.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import pickle
import platform
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import serialize_executable

from neumeta_jax import storage

_log = logging.getLogger(__name__)
_HIT = "/jax/compilation_cache/cache_hits"

_enabled = False
_hits = 0  # of JAX's cache, since `enable`
_loading: dict[pathlib.Path, concurrent.futures.Future] = {}


def enable() -> None:
    """Keeps programs from now on, in the folder of JAX's compilation cache.

    Not with several processes, whose programs differ, and not where the cache is no local folder.
    """
    global _enabled
    if not _enabled:
        jax.monitoring.register_event_listener(_count_hits)
    _enabled = True


def _count_hits(event: str, **_) -> None:
    global _hits
    _hits += event == _HIT


def _folder() -> pathlib.Path | None:
    settings = jax.config.values
    found = settings["jax_compilation_cache_dir"]
    if not found or "://" in str(found) or not settings["jax_enable_compilation_cache"]:
        return None
    if not _enabled or settings["jax_disable_jit"] or jax.process_count() > 1:
        return None
    return pathlib.Path(found)


@functools.cache
def _source() -> str:
    """sha256 of the source of this package."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _processor() -> list[str]:
    """What machine code for this CPU depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return [platform.machine(), *(found[name] for name in wanted if name in found)]


def _environment(versions: Mapping[str, str]) -> dict[str, Any]:
    settings = {k: str(v) for k, v in jax.config.values.items() if "cache" not in k}
    flags = {k: v for k, v in os.environ.items() if k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {
        "source": _source(),
        "python": sys.version,
        "versions": dict(versions),
        "processor": _processor(),
        "devices": [str(device) for device in jax.devices()],
        "runtime": jax.devices()[0].client.platform_version,
        "settings": settings,
        "flags": flags,
    }


def _parts(value: Any) -> Iterator[Any]:
    """A value and, of tuples and dataclasses, all that is in it."""
    yield value
    if dataclasses.is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        for part in value:
            yield from _parts(part)


def _is_known(made_from: tuple) -> bool:
    """Whether `made_from` says all: it is made of values and classes of this package."""
    text = repr(made_from)
    modules = {type(value).__module__ for value in _parts(made_from)}
    ours = all(name == "builtins" or name.startswith("neumeta_jax.") for name in modules)
    return ours and " at 0x" not in text and " object>" not in text


def _path(made_from: tuple, versions: Mapping[str, str]) -> pathlib.Path | None:
    folder = _folder()
    if folder is None or not _is_known(made_from):
        return None
    key = json.dumps([repr(made_from), _environment(versions)], sort_keys=True)
    return folder / f"program-{hashlib.sha256(key.encode()).hexdigest()}"


def _read(path: pathlib.Path) -> Callable | None:
    """The program in a file; None if there is none or it cannot be used here."""
    try:
        body = path.read_bytes()
    except OSError:
        return None
    digest, body = body[:32], body[32:]
    if hashlib.sha256(body).digest() != digest:
        return None  # damaged
    try:
        parts = pickle.loads(zlib.decompress(body))
        return serialize_executable.deserialize_and_load(*parts)
    except Exception as error:  # of another runtime after all: it is compiled anew
        _log.warning("a kept program could not be loaded, it is compiled anew: %r", error)
        return None


def _write(path: pathlib.Path, program: jax.stages.Compiled) -> None:
    try:
        body = zlib.compress(pickle.dumps(serialize_executable.serialize(program)), 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path) as partial:
            partial.write_bytes(hashlib.sha256(body).digest() + body)
    except Exception as error:  # a cache that cannot be written is none
        _log.info("the program of this step is not kept: %r", error)


def prefetch(made_from: tuple, versions: Mapping[str, str]) -> None:
    """Begins to load the program made from `made_from`, if it is kept, in the background."""
    path = _path(made_from, versions)
    if path is not None and path.exists() and path not in _loading:
        pool = concurrent.futures.ThreadPoolExecutor(1)
        _loading[path] = pool.submit(_read, path)
        pool.shutdown(wait=False)


class _Program:
    """A jitted function whose program is loaded or kept at the first call."""

    def __init__(self, function: jax.stages.Wrapped, path: pathlib.Path):
        self.function = function
        self.path = path
        self.program: Callable | None = None

    def __call__(self, *args):
        if self.program is None:
            self.program = self._load() or self._compile(args)
        try:
            return self.program(*args)
        except (TypeError, ValueError):  # arguments of other shapes, which it looks at first
            return self.function(*args)

    def _load(self) -> Callable | None:
        future = _loading.pop(self.path, None)
        return future.result() if future else _read(self.path)

    def _compile(self, args) -> Callable:
        lowered = self.function.lower(*args)
        before = _hits
        program = lowered.compile()
        if _hits == before:
            _write(self.path, program)
        return program


def keep(function: jax.stages.Wrapped, made_from: tuple, versions: Mapping[str, str]) -> Callable:
    """`function`, jitted, with its program loaded from the cache or kept there at its first call.

    Args:
        function: a function of `jax.jit`, which may donate arguments.
        made_from: all that `function` depends on; values of this package and of Python, whose
            `repr` says everything.
        versions: of packages, part of the key.

    Returns:
        `function` itself where nothing is kept.
    """
    path = _path(made_from, versions)
    return function if path is None or not hasattr(function, "lower") else _Program(function, path)
