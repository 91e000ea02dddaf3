"""Programs that a later process loads: their keys, their files, and what is not kept."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import programs, resnet
from neumeta_jax.training import Preprocessing

ROOT = pathlib.Path(__file__).resolve().parent.parent
VERSIONS = {"jax": jax.__version__}
MADE_FROM = ("step", Preprocessing(mean=(0.5,), std=(0.25,), crop_padding=0, flip=False))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, in which programs are kept."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(programs, "_enabled", True)
    monkeypatch.setattr(programs, "_loading", {})
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


class Traced:
    """A jitted function that counts how often it is traced."""

    def __init__(self, factor):
        self.count = 0

        def function(state, x):
            self.count += 1
            new = jax.tree.map(lambda s: s + factor * jnp.sum(x), state)
            return new, jnp.sin(x) @ x.T

        self.jitted = jax.jit(function, donate_argnums=0)


def arguments(size=3):
    x = np.arange(size * size, dtype=np.float32).reshape(size, size)
    return {"a": jnp.ones(2), "b": {"c": jnp.zeros(())}}, x


def results(function, size=3):
    return jax.tree.map(np.asarray, function(*arguments(size)))


def kept(folder):
    return sorted(folder.glob("program-*"))


def test_a_kept_program_is_loaded_without_being_traced(folder):
    first, second = Traced(1.25), Traced(1.25)
    wanted = results(first.jitted)
    found = results(programs.keep(first.jitted, MADE_FROM, VERSIONS))
    assert first.count == 1 and len(kept(folder)) == 1  # `lower` uses the trace of the call
    function = programs.keep(second.jitted, MADE_FROM, VERSIONS)
    state, x = arguments()
    loaded = jax.tree.map(np.asarray, function(state, x))
    assert second.count == 0
    assert state["a"].is_deleted()  # donated
    for got in (found, loaded):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    function(*arguments())
    assert second.count == 0


def test_prefetching_loads_in_the_background_what_the_first_call_takes(folder, monkeypatch):
    programs.prefetch(MADE_FROM, VERSIONS)  # nothing there: nothing happens
    assert not programs._loading
    first, second = Traced(1.5), Traced(1.5)
    wanted = results(programs.keep(first.jitted, MADE_FROM, VERSIONS))
    threads = []
    read = programs._read
    monkeypatch.setattr(
        programs, "_read", lambda path: threads.append(threading.current_thread()) or read(path)
    )
    programs.prefetch(MADE_FROM, VERSIONS)
    programs.prefetch(MADE_FROM, VERSIONS)
    found = results(programs.keep(second.jitted, MADE_FROM, VERSIONS))
    assert threads != [threading.main_thread()] and len(threads) == 1
    assert second.count == 0
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_arguments_of_other_shapes_go_to_the_function(folder):
    first = Traced(1.75)
    function = programs.keep(first.jitted, MADE_FROM, VERSIONS)
    results(function)
    wanted = results(Traced(1.75).jitted, size=4)
    jax.tree.map(np.testing.assert_array_equal, results(function, size=4), wanted)
    assert first.count == 2 and len(kept(folder)) == 1
    # A program that was loaded and does not fit its first arguments either.
    other = Traced(1.75)
    found = results(programs.keep(other.jitted, MADE_FROM, VERSIONS), size=4)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert other.count == 1


def test_the_key_sees_all_that_a_program_is_made_from(folder, monkeypatch):
    def path(made_from=MADE_FROM, versions=VERSIONS):
        return programs._path(made_from, versions)

    name, values = MADE_FROM
    paths = [
        path(),
        path(("other", values)),
        path((name, dataclasses.replace(values, flip=True))),
        path(versions={"jax": "0"}),
    ]
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    paths.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_source", lambda: "other")
        paths.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_processor", lambda: ["other"])
        paths.append(path())
    with jax.default_matmul_precision("highest"):
        paths.append(path())
    jax.config.update("jax_enable_x64", True)
    try:
        paths.append(path())
    finally:
        jax.config.update("jax_enable_x64", False)
    assert len(set(paths)) == len(paths)
    assert path() == paths[4]


def test_a_damaged_file_is_compiled_anew_and_replaced(folder, caplog):
    results(programs.keep(Traced(2.25).jitted, MADE_FROM, VERSIONS))
    (path,) = kept(folder)
    content = path.read_bytes()
    for number, damaged in enumerate((b"", content[:-7], content[:50] + b"x" + content[51:])):
        path.write_bytes(damaged)
        factor = 2.5 + number / 16  # another program, which JAX's cache does not know
        again = Traced(factor)
        results(programs.keep(again.jitted, MADE_FROM, VERSIONS))
        assert again.count == 1
        assert path.read_bytes() not in (damaged, b"")
        loaded = Traced(factor)
        results(programs.keep(loaded.jitted, MADE_FROM, VERSIONS))
        assert loaded.count == 0


def test_a_whole_file_of_another_kind_is_compiled_anew(folder, caplog):
    import hashlib
    import zlib

    results(programs.keep(Traced(2.75).jitted, MADE_FROM, VERSIONS))
    (path,) = kept(folder)
    body = zlib.compress(b"no pickle")
    path.write_bytes(hashlib.sha256(body).digest() + body)
    again = Traced(2.75)
    results(programs.keep(again.jitted, MADE_FROM, VERSIONS))
    assert again.count == 1 and "compiled anew" in caplog.text


def test_a_cache_that_cannot_be_written_is_none(folder):
    folder.write_text("a file where a folder should be")
    traced = Traced(3.25)
    wanted = results(Traced(3.25).jitted)
    found = results(programs.keep(traced.jitted, MADE_FROM, VERSIONS))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_what_came_out_of_the_cache_of_jax_is_not_kept(folder, monkeypatch):
    class Lowered:
        def compile(self):
            programs._count_hits(programs._HIT)
            return lambda *args: args

    class Jitted:
        def lower(self, *args):
            return Lowered()

    assert programs.keep(Jitted(), MADE_FROM, VERSIONS)(1, 2) == (1, 2)
    assert not kept(folder)
    programs._count_hits("/jax/compilation_cache/cache_misses")
    results(programs.keep(Traced(3.5).jitted, MADE_FROM, VERSIONS))
    assert len(kept(folder)) == 1


class Foreign:
    def __repr__(self):
        return "Foreign()"


@pytest.mark.parametrize(
    "made_from",
    [
        ("step", Foreign()),
        ("step", resnet.apply),
        ("step", object()),
        ("step", (1, dataclasses.replace(MADE_FROM[1], mean=Foreign()))),
    ],
)
def test_what_a_key_cannot_describe_is_not_kept(folder, made_from):
    function = Traced(4.0).jitted
    assert programs.keep(function, made_from, VERSIONS) is function


def test_nothing_is_kept_unless_a_command_asks_for_it(folder, monkeypatch):
    function = Traced(4.25).jitted
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_enabled", False)
        assert programs.keep(function, MADE_FROM, VERSIONS) is function
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert programs.keep(function, MADE_FROM, VERSIONS) is function
    jax.config.update("jax_compilation_cache_dir", None)
    assert programs.keep(function, MADE_FROM, VERSIONS) is function


PROGRAM = """
import sys, jax
from neumeta_jax import training
log = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **about: log.append((name, str(about.get("fun_name"))))
)
import train
sys.argv = ["train.py", *sys.argv[1:]]
from neumeta_jax import command_line
command_line.run(train.main)
traced = [n for event, n in log if "jaxpr_trace" in event and "call_one" in n]
print("traced", len(traced))
"""


def test_a_second_run_loads_its_steps_and_ends_with_the_same_bits(tmp_path):
    runs = []
    for name in ("first", "second"):
        workdir = tmp_path / name
        command = ["--config=configs/digits.py:smoke", f"--workdir={workdir}"]
        if runs:  # the teacher's steps are not kept
            workdir.mkdir()
            (workdir / "backbone.safetensors").write_bytes(
                (tmp_path / "first" / "backbone.safetensors").read_bytes()
            )
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *command],
            cwd=ROOT,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        runs.append((done.stdout.splitlines()[-1], (workdir / "inr.safetensors").read_bytes()))
    assert [line for line, _ in runs] == ["traced 3", "traced 0"]  # teacher, fit and train
    assert runs[0][1] == runs[1][1]
    assert len(list((tmp_path / "cache").glob("program-*"))) == 2
