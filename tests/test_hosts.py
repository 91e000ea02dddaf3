"""train.py on several processes and several devices: one result, one resume, no silent hang."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_recipe as recipe
from absl import flags

from neumeta_jax.commands import command_line, train
from neumeta_jax.errors import UsageError
from neumeta_jax.networks.saved import INR_FILE
from neumeta_jax.runs import checkpoint, hosts

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_STEPS = 40
TOLERANCE = 2e-5  # of the largest entry of a tensor; sums over devices round differently

CONFIG = """
import importlib.util

from ml_collections import ConfigDict


def get_config():
    spec = importlib.util.spec_from_file_location("digits_config", {digits!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke")
    config.generated = "all"
    config.network.depth = 8
    config.channel_order = "as_trained"
    config.teacher.file = {teacher!r}
    config.inr = ConfigDict(dict(kind="grid"))
    config.train.fit_steps = 0
    config.train.mode = "at_once"
    config.train.share_images = True
    config.train.batch_size = 32
    config.train.num_random_sizes = 1
    config.train.final_epochs = 0.0
    config.log_every = 5
    config.checkpoint_every = 5
    config.eval.width_ratios = (1.0,)
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    recipe.write_teacher(folder / "teacher.npz")
    values = {"digits": str(ROOT / "configs/digits.py"), "teacher": str(folder / "teacher.npz")}
    (folder / "config.py").write_text(CONFIG.format(**values))
    return f"--config={folder / 'config.py'}"


def train_here(config, workdir):
    """The run in this process, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        status, out, err = recipe.call("train", config, f"--workdir={workdir}")
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The work directory of a run on one device that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    train_here(config, workdir)
    return workdir


def start(*args, num_devices=1):
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, args)],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(num_devices),
            "PYTHONPATH": str(ROOT),
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(config, workdir):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"--coordinator_address=127.0.0.1:{port}"
    return [
        start(config, f"--workdir={workdir}", address, "--num_processes=2", f"--process_id={n}")
        for n in range(2)
    ]


def wait_for_checkpoint(processes, workdir, step):
    saved = checkpoint.Checkpoints(workdir / "checkpoints" / "inr")
    deadline = time.monotonic() + 1200
    while max(saved.steps(), default=0) < step:
        ended = [process for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            raise AssertionError([process.communicate() for process in processes])
        time.sleep(0.002)


def ends(processes):
    """[(status, standard output, standard error)] of processes that must end by themselves."""
    try:
        printed = [process.communicate(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, printed, strict=True)]


def assert_agrees(workdir, reference):
    """Same steps in the metrics, and the same parameters to TOLERANCE."""
    found, wanted = (recipe.tensors(path / INR_FILE) for path in (workdir, reference))
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        atol = TOLERANCE * np.abs(value).max(initial=0.0) + 1e-12
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)
    found, wanted = (recipe.read_metrics(path) for path in (workdir, reference))
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    np.testing.assert_allclose(
        [line["loss"] for line in found], [line["loss"] for line in wanted], rtol=1e-4
    )


def test_two_processes_train_save_and_resume_together(config, reference, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(config, workdir)
    wait_for_checkpoint(processes, workdir, 5)
    processes[1].send_signal(signal.SIGKILL)
    (status, _, err), (killed, *_) = ends(processes)
    assert killed == -signal.SIGKILL
    assert status not in (0, None)
    assert (
        "another process of this run is gone" in err
        or "JAX distributed service detected fatal errors" in err
    ), err
    assert not (workdir / INR_FILE).exists()

    # Asked to stop, one of them stops both.
    processes = start_two(config, workdir)
    wait_for_checkpoint(processes, workdir, checkpoint_of(workdir) + 5)
    processes[1].send_signal(signal.SIGTERM)
    (first, out, err), (second, *_) = ends(processes)
    assert (first, second) == (75, 75), err
    assert "INR: continuing from step" in out
    assert "the same command continues from there" in err and "Traceback" not in err

    (first, out, err), (second, quiet, _) = ends(start_two(config, workdir))
    assert (first, second) == (0, 0), err
    assert "INR: continuing from step" in out
    assert "2 share every batch: 16 of 32 images" in out
    assert out.rstrip().splitlines()[-1].startswith("done in ")
    assert quiet.startswith("waiting for 2 processes") and "INR" not in quiet
    assert_agrees(workdir, reference)
    assert f"continuing from step {NUM_STEPS} of {NUM_STEPS}" in train_here(config, workdir)


def checkpoint_of(workdir):
    return checkpoint.Checkpoints(workdir / "checkpoints" / "inr").steps()[-1]


def test_a_run_begun_on_two_devices_is_continued_on_one(config, reference, tmp_path):
    workdir = tmp_path / "run"
    process = start(config, f"--workdir={workdir}", num_devices=2)
    wait_for_checkpoint([process], workdir, 5)
    process.send_signal(signal.SIGTERM)
    ((status, _, err),) = ends([process])
    assert status == 75, err
    step = checkpoint_of(workdir)
    assert step < NUM_STEPS
    assert f"continuing from step {step} of {NUM_STEPS}" in train_here(config, workdir)
    assert_agrees(workdir, reference)


def test_a_run_begun_on_one_device_is_continued_on_two(config, reference, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        recipe.killing(patch, "inr", 3, before=False)
        with pytest.raises(recipe.KilledError):
            train_here(config, workdir)
    ((status, out, err),) = ends([start(config, f"--workdir={workdir}", num_devices=2)])
    assert status == 0, err
    assert f"continuing from step 15 of {NUM_STEPS}" in out
    assert_agrees(workdir, reference)


# --- one process -----------------------------------------------------------------------------


def options(*args):
    values = flags.FlagValues()
    command_line.define(values, train.HOSTS)
    values(["train.py", *args])
    return {name: values[name].value for name in train.HOSTS}


def test_a_run_on_one_host_starts_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("it asks for other hosts")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with hosts.joined(**options()):
        assert hosts.is_first()
        assert not hosts.any_process(False) and hosts.any_process(True)
        assert hosts.from_first(lambda: 3, None) == 3


@pytest.mark.parametrize(
    "args, given",
    [
        (["--num_processes=2"], "need --coordinator_address=HOST:PORT"),
        (["--coordinator_address=a:1", "--process_id=0"], "got a:1, None and 0"),
        (["--coordinator_address=a", "--num_processes=2", "--process_id=0"], "got a, 2 and 0"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "0 to 1, got 2"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(args, given, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    with pytest.raises(UsageError) as error, hosts.joined(**options(*args)):
        pass
    assert given in str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_hosts_that_do_not_come_are_named_with_what_to_do(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UsageError) as error, hosts.joined(**options("--distributed")):
        pass
    assert "the other workers did not come together (DEADLINE_EXCEEDED" in str(error.value)
    assert "start the same command on every host" in capsys.readouterr().out
