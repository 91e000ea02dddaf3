"""train.py and eval.py from end to end, with the quick start's preset of seconds.

The scripts' `main` runs in this process and what it compiles is kept from run to run, since
compilation is nearly all of the time; where a real process matters, one is started.
"""

import contextlib
import csv
import functools
import gzip
import importlib.util
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import types

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from neumeta_jax import elastic
from neumeta_jax.commands import evaluations, setup
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data import datasets, preprocessing
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.elastic import ordering
from neumeta_jax.errors import Interrupted, UsageError
from neumeta_jax.evaluation import choices, evaluator as evaluators, morphs
from neumeta_jax.evaluation.evaluator import Evaluator
from neumeta_jax.evaluation.rows import largest_dip
from neumeta_jax.files.trees import load_tree, save_tree
from neumeta_jax.networks import cifar_import, cifar_resnet, cifar_spec
from neumeta_jax.networks.saved import INR_FILE, load_inr, save_compact
from neumeta_jax.runs import checkpoint, inr, logs, loop, plan
from neumeta_jax.runs.backbone import BACKBONE_FILE, prepare_backbone
from neumeta_jax.runs.config import from_config, load_data
from neumeta_jax.runs.inr import train_inr
from neumeta_jax.runs.workdir import (
    Workdir,
    check_claim,
    check_same_config,
    open_workdir,
    read_config,
)

ROOT = networks.ROOT
SHARED = pathlib.Path(os.environ.get("NEUMETA_SHARED", ROOT.parent / "shared"))
CONFIG = "--config=configs/digits.py:smoke"


class KilledError(BaseException):
    """Ends a run as SIGKILL does: nothing in the program catches it."""


def load_script(name):
    return networks.load_module(f"{name}.py")


@pytest.fixture(scope="module", autouse=True)
def one_compilation_for_all_runs():
    with pytest.MonkeyPatch.context() as patch, networks.compiled_once():
        patch.chdir(ROOT)
        yield


def call(script, *args):
    """(exit status, standard output, standard error) of a script's main with these arguments."""
    return networks.call(load_script(script), *args)


def train(workdir, *args):
    status, out, err = call("train", CONFIG, f"--workdir={workdir}", *args)
    assert status == 0, err
    return out


def evaluate(workdir, flags, out=""):
    """(folder of the results, what is printed) of eval.py, which trains nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Steps, "run", None)
        given = f"--workdir={workdir}", f"--out={workdir / out}", "--strategy=loop"
        status, printed, err = call("eval", *given, *flags.split())
    assert status == 0, err
    return workdir / out, printed


def refusal(script, *args):
    """What a script that refuses prints: one line."""
    status, _, err = call(script, *args)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(work directory, what was printed) of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train(workdir)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished work directory, to do harm to."""
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "copied"))


def tensors(path):
    tree, _ = load_tree(path)
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


def read_metrics(workdir):
    """The lines without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
    return lines


def assert_same_result(workdir, reference):
    for name in ("backbone.safetensors", INR_FILE):
        got, wanted = tensors(workdir / name), tensors(reference / name)
        assert list(got) == list(wanted)
        for leaf, value in wanted.items():
            assert got[leaf].tobytes() == value.tobytes(), (name, leaf)
    assert read_metrics(workdir) == read_metrics(reference)


def assert_same_grid(workdir, reference):
    grids = [read_json(path / "grid.json") for path in (workdir, reference)]
    assert grids[0]["rows"] == grids[1]["rows"]


def read_json(path):
    return json.loads(path.read_text())


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


# --- a run -----------------------------------------------------------------------------------


def test_a_run_leaves_its_config_its_metrics_and_its_results(finished):
    workdir, out = finished
    assert {path.name for path in workdir.iterdir()} == {
        *(BACKBONE_FILE, INR_FILE, "checkpoints", "lock", "metrics.jsonl"),
        *("config.json", "versions.json", "grid.csv", "grid.json", "grid.png"),
    }
    config = read_json(workdir / "config.json")
    assert (config["network"]["depth"], config["train"]["fit_steps"]) == (14, 5)
    versions = read_json(workdir / "versions.json")
    assert {"python", "jax", "flax", "devices"} <= set(versions)
    assert out.rstrip().splitlines()[-1].startswith("done in ")


def test_every_part_of_the_metrics_counts_its_steps_upwards(finished):
    workdir, _ = finished
    lines = read_metrics(workdir)
    assert {line["part"] for line in lines} == {"teacher", "inr"}
    for part, last in (("teacher", 20), ("inr", 26)):
        steps = [line["step"] for line in lines if line["part"] == part]
        assert steps == sorted(set(steps)) and steps[-1] == last
    phases = dict.fromkeys(line["phase"] for line in lines)
    named = [name.split("] ")[-1] for name in phases]
    assert named == ["teacher", "fit", "block 1 of 2", "block 2 of 2", "final"]
    assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in lines)


def test_the_grid_of_a_run_is_of_the_test_split_at_the_ratios_of_the_config(finished):
    workdir, out = finished
    document = read_json(workdir / "grid.json")
    assert (document["dataset"], document["split"]) == ("digits", "test")
    rows = document["rows"]
    assert [row["width_ratio"] for row in rows] == [1.25, 1.0, 0.5, 0.25]
    assert [row["trained"] for row in rows] == [False, True, True, False]
    counts = [int(line["num_params"]) for line in read_csv(workdir / "grid.csv")]
    assert counts == [row["num_params"] for row in rows]
    assert is_png(workdir / "grid.png")
    for row in rows:
        assert f"{100 * row['accuracy']:.2f}" in out


def test_the_saved_inr_has_the_accuracies_of_the_grid(finished):
    workdir, _ = finished
    family, params, metadata = load_inr(workdir)
    images = datasets.load_dataset("digits")
    preprocessing = Preprocessing(tuple(metadata["mean"]), tuple(metadata["std"]))
    generate = jax.jit(lambda params, widths: hyper.generate(family, params, widths))
    rows = read_json(workdir / "grid.json")["rows"]
    for row in rows[1:]:
        tree = generate(params, family.widths(row["width_ratio"]))
        found = evaluators.accuracy(
            family.network, tree, images.test_images, images.test_labels, preprocessing
        )
        assert found == row["accuracy"]


def test_folding_and_reordering_change_no_accuracy(finished):
    lines = [line for line in finished[1].splitlines() if line.startswith("teacher accuracy")]
    stages = {line.split(":")[0].removeprefix("teacher accuracy "): line for line in lines}
    assert list(stages) == ["as trained", "folded", "reordered"]
    assert len({line.split(":")[1] for line in lines}) == 1


PROJECTION_CONFIG = """
import importlib.util

from ml_collections import ConfigDict


def get_config():
    spec = importlib.util.spec_from_file_location("digits_config", {digits!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke")
    config.channel_order = "importance"
    config.inr = ConfigDict(dict(kind="projection", modulated=True, max_cell=1.5))
    config.train.fit_steps = 0
    config.train.mode = "at_once"
    config.train.share_images = True
    config.train.num_random_sizes = 1
    config.train.per_block_widths = 0.5
    config.train.learning_rate = 0.0
    config.train.alpha_learning_rate = 0.0
    config.train.learned_learning_rate = 0.0
    config.eval.width_ratios = (1.25, 1.0, 0.5)
    return config
"""


def test_a_projection_starts_at_the_teacher_and_stays_there_without_a_learning_rate(tmp_path):
    config = tmp_path / "projection.py"
    config.write_text(PROJECTION_CONFIG.format(digits=str(ROOT / "configs" / "digits.py")))
    workdir = tmp_path / "run"
    status, out, err = call("train", f"--config={config}", f"--workdir={workdir}")
    assert status == 0, err
    assert "channels ordered by importance" in out
    (line,) = [x for x in out.splitlines() if x.startswith("teacher (full size, not generated)")]
    teacher = float(line.split(":")[1].removesuffix("%"))
    rows = read_json(workdir / "grid.json")["rows"]
    found = {row["width_ratio"]: 100 * row["accuracy"] for row in rows}
    assert found[1.0] == pytest.approx(teacher, abs=0.01)
    assert found[1.25] == pytest.approx(teacher, abs=0.01)
    _, params, _ = load_inr(workdir)
    for name, leaves in params["inr"].items():
        if "moments" in leaves:  # measured on the data, with a constant as last channel
            assert np.all(np.linalg.eigvalsh(np.asarray(leaves["moments"], np.float64)) > -1e-4)
            np.testing.assert_allclose(leaves["moments"][:, -1, -1], 1.0, rtol=1e-5, err_msg=name)
            assert np.all(np.asarray(leaves["moments"])[:, -1, :-1] >= 0)


def test_the_same_command_again_trains_nothing_and_ends_the_same(finished, copied, monkeypatch):
    monkeypatch.setattr(loop.Steps, "run", None)
    out = train(copied)
    assert "is there already" in out and "continuing from step 26 of 26" in out
    assert_same_result(copied, finished[0])
    assert_same_grid(copied, finished[0])


# --- interruptions ---------------------------------------------------------------------------


def killing(monkeypatch, part, number, *, before):
    """Kills the run at its save `number` of `part`, before or after something is on disk."""
    save, count = checkpoint.Checkpoints.save, 0

    def killed_save(self, step, state):
        nonlocal count
        if self.directory.name == part:
            count += 1
            if count == number and before:
                raise KilledError
        save(self, step, state)
        if count == number and self.directory.name == part:
            raise KilledError

    monkeypatch.setattr(checkpoint.Checkpoints, "save", killed_save)


def prepared(reference, workdir):
    """A work directory that has what `reference` had when its teacher was done."""
    workdir.mkdir()
    shutil.copy(reference / BACKBONE_FILE, workdir)
    lines = (reference / "metrics.jsonl").read_text().splitlines(keepends=True)
    teacher = [line for line in lines if json.loads(line)["part"] == "teacher"]
    (workdir / "metrics.jsonl").write_text("".join(teacher))
    return workdir


@pytest.mark.parametrize(
    "part, number, before",
    [
        ("teacher", 3, False),
        ("inr", 1, True),  # in the fit phase, nothing saved yet
        ("inr", 2, False),  # between fit and the first block
        ("inr", 4, True),  # within the first block's phase
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    finished, tmp_path, monkeypatch, part, number, before
):
    reference, workdir = finished[0], tmp_path / "run"
    # What does not belong to training, and is tested elsewhere, takes most of the time.
    monkeypatch.setattr(plan, "describe", lambda *args, **options: "")
    monkeypatch.setattr(evaluations, "write_grid", lambda *args: None)
    if part == "inr":  # the teacher's part is tested above
        prepared(reference, workdir)
    with monkeypatch.context() as patch:
        killing(patch, part, number, before=before)
        with pytest.raises(KilledError):
            train(workdir)
    assert not (workdir / INR_FILE).exists()
    train(workdir)
    assert_same_result(workdir, reference)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_process_that_is_ended_resumes_to_the_same_bits(finished, tmp_path, how):
    """`python benchmarks/interruptions.py` does it at random moments and inside saves."""
    reference, workdir = finished[0], tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train.py", CONFIG, f"--workdir={workdir}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, metrics = time.monotonic() + 300, workdir / "metrics.jsonl"
    while not metrics.is_file() or '"part": "teacher"' not in metrics.read_text():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=300)
    steps = checkpoint.Checkpoints(workdir / "checkpoints" / "teacher").steps()
    assert not (workdir / INR_FILE).exists()
    if how == signal.SIGTERM:
        assert process.returncode == 75, err
        assert "SIGTERM: saving and stopping" in out
        assert "the same command continues from there" in err
        assert "Traceback" not in err
        assert 4 <= steps[-1] < 20
        assert f"stopped at step {steps[-1]}" in err
        assert f"teacher: continuing from step {steps[-1]} of 20" in train(workdir)
    else:
        assert process.returncode == -signal.SIGKILL
        train(workdir)
    assert_same_result(workdir, reference)
    assert_same_grid(workdir, reference)


def test_a_run_that_ended_otherwise_is_told_apart(finished, copied):
    """What compares must see a step that is there twice and a bit that differs."""
    interruptions = load_script("benchmarks/interruptions")
    wanted = interruptions.result(finished[0])
    assert interruptions.differences(interruptions.result(copied), wanted) == []
    metrics = copied / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")
    flip_a_bit(copied / INR_FILE)
    found = interruptions.differences(interruptions.result(copied), wanted)
    assert found == ["inr.safetensors", "metrics", "steps of inr"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def scalars(folder):
    """{name: {step: value}} of TensorBoard's files in a folder; no step is there twice."""
    from tensorboardX.proto import event_pb2

    found = {}
    for path in folder.glob("events.*"):
        content = path.read_bytes()
        while content:  # length, its checksum, a message, its checksum
            (length,) = struct.unpack_from("<Q", content)
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                steps = found.setdefault(value.tag, {})
                assert event.step not in steps
                steps[event.step] = value.simple_value
    return found


def assert_scalars_are_the_metrics(workdir, part, name="loss"):
    lines = [line for line in read_metrics(workdir) if line["part"] == part]
    wanted = {line["step"]: np.float32(line[name]) for line in lines if name in line}
    assert scalars(workdir / "tensorboard" / part)[name] == wanted


def test_a_run_that_is_watched_and_killed_has_all_steps_once_and_the_same_bits(
    finished, tmp_path, monkeypatch
):
    workdir = prepared(finished[0], tmp_path / "run")
    monkeypatch.setattr(evaluations, "write_grid", lambda *args: None)
    with monkeypatch.context() as patch:
        killing(patch, "inr", 4, before=True)
        with pytest.raises(KilledError):
            train(workdir, "--tensorboard")
    out = train(workdir, "--tensorboard", "--profile=8:11")
    assert_same_result(workdir, finished[0])
    for part in ("teacher", "inr"):
        assert_scalars_are_the_metrics(workdir, part)
    lines = [line for line in read_metrics(workdir) if "validation" in line]
    shown = scalars(workdir / "tensorboard" / "inr")["validation/1.0"]
    assert list(shown) == [line["step"] for line in lines if line["part"] == "inr"]
    ((first, last, path),) = re.findall(r"profile of steps (\d+) to (\d+): (.*\.gz)", out)
    assert (int(first), int(last)) == (8, 10) and path.startswith(str(workdir / "profile"))
    assert "https://ui.perfetto.dev" in out
    names = {
        event.get("name")
        for event in json.loads(gzip.decompress(pathlib.Path(path).read_bytes()))["traceEvents"]
    }
    assert any("call_one" in str(name) for name in names)


@pytest.mark.parametrize(
    "text, given",
    [
        ("3", "takes two steps, START:STOP, got '3'"),
        ("a:b", "got 'a:b'"),
        ("1:2:3", "got '1:2:3'"),
        ("5:5", "0 <= START < STOP <= 26"),
        ("-1:3", "got -1:3"),
        ("20:27", "the steps of the INR's training"),
    ],
)
def test_a_profile_of_steps_that_there_are_not_is_refused_before_the_run(tmp_path, text, given):
    workdir = tmp_path / "run"
    assert given in refusal("train", CONFIG, f"--workdir={workdir}", f"--profile={text}")
    assert not workdir.exists()


def test_a_profile_of_steps_that_are_done_and_scalars_without_their_writer_are_refused(
    finished, copied, tmp_path, monkeypatch
):
    message = refusal("train", CONFIG, f"--workdir={copied}", "--profile=5:10")
    assert "still to come, but the run is at step 26 of 26" in message
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    message = refusal("train", CONFIG, f"--workdir={tmp_path / 'new'}", "--tensorboard")
    assert 'pip install "neumeta-jax[tensorboard]"' in message
    assert not (tmp_path / "new").exists()


def test_a_second_request_to_stop_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # none, where a shell runs it in the background
    with open_workdir(tmp_path, {}) as workdir, contextlib.redirect_stdout(io.StringIO()):
        os.kill(os.getpid(), signal.SIGINT)
        assert workdir.stop_requested
        with pytest.raises(Interrupted, match="stopped at step 7"):
            workdir.check_stop(7)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_truncated_checkpoint_resumes_from_the_one_before_it(finished, copied, caplog):
    (copied / INR_FILE).unlink()
    newest = checkpoint.Checkpoints(copied / "checkpoints" / "inr").steps()[-1]
    damaged = copied / "checkpoints" / "inr" / str(newest)
    for path in damaged.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = train(copied)
    assert "continuing from step 24 of 26" in out
    assert any(f"{damaged} is damaged" in record.getMessage() for record in caplog.records)
    assert_same_result(copied, finished[0])
    assert_same_grid(copied, finished[0])


def test_a_disk_that_is_full_at_a_save_is_one_line_and_costs_no_step(
    finished, tmp_path, monkeypatch
):
    reference, workdir = finished[0], tmp_path / "run"
    save = checkpoint.Checkpoints.save

    def save_on_full_disk(self, step, state):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if step > 8 else limits[0], limits[1]))
        try:
            save(self, step, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_on_full_disk)
        message = refusal("train", CONFIG, f"--workdir={workdir}")
    folder = workdir / "checkpoints" / "teacher"
    assert f"{folder / '9'} could not be written (" in message
    assert "the checkpoint of step 6 is kept" in message
    assert "teacher: continuing from step 6 of 20" in train(workdir)
    assert_same_result(workdir, reference)


# --- refusals --------------------------------------------------------------------------------


def test_another_config_in_the_same_work_directory_names_the_field_and_both_values(finished):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    message = refusal("train", CONFIG, f"--workdir={workdir}", "--config.train.batch_size=32")
    assert "train.batch_size (saved 64, given 32)" in message
    assert message.count("saved") == 2  # this field, and the advice
    assert (workdir / "config.json").read_bytes() == before


def test_a_field_that_an_earlier_version_did_not_have_counts_as_its_default(copied):
    config = read_config(copied)
    saved = json.loads(json.dumps(config))
    del saved["train"]["shallow_epochs"]
    (copied / "config.json").write_text(json.dumps(saved))
    check_same_config(copied, config)
    config["train"]["shallow_epochs"] = 2.0
    with pytest.raises(UsageError, match="differ: train.shallow_epochs .saved 0.0, given 2.0"):
        check_same_config(copied, config)


def beside(finished, tmp_path):
    """A work directory that has the prepared teacher of the finished run and nothing else."""
    (tmp_path / "run").mkdir()
    shutil.copy(finished[0] / BACKBONE_FILE, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_starts_from_the_result_of_another(finished, tmp_path):
    workdir, compact = beside(finished, tmp_path), tmp_path / "compact.safetensors"
    save_compact(finished[0], compact)
    rates = [f"--config.train.{name}learning_rate=0" for name in ("", "alpha_", "learned_")]
    start = [*rates, f"--config.train.init_from={compact}"]
    out = train(workdir, *start)
    assert f"INR: starting from {compact}" in out and "block 1 of" not in out and "fit" not in out
    before, after = tensors(compact), tensors(workdir / INR_FILE)
    assert list(before) == list(after)
    for leaf, value in before.items():
        np.testing.assert_array_equal(value.astype(np.float32), after[leaf], err_msg=leaf)
    other = [f"--workdir={tmp_path / 'other'}", *start, "--config.inr.hidden_width=9"]
    message = refusal("train", CONFIG, *other)
    assert "hidden_width=9" in message and "hidden_width=8" in message
    assert "There is no file" in refusal(
        "train", CONFIG, *other, "--config.train.init_from=nothing"
    )


def test_a_teacher_that_was_kept_in_half_its_bytes_is_taken(finished, tmp_path):
    tree, header = load_tree(finished[0] / BACKBONE_FILE)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
    save_tree(tmp_path / BACKBONE_FILE, half, header)
    config = read_config(finished[0])
    dataset, splits = load_data(config)
    workdir = Workdir(tmp_path, logs.Metrics(None))
    found = prepare_backbone(workdir, from_config(config, dataset), splits)
    chex.assert_trees_all_equal(found, jax.tree.map(lambda x: x.astype(jnp.float32), half))


def test_a_run_on_mixed_images_ends_otherwise(finished, tmp_path):
    workdir = beside(finished, tmp_path)
    train(workdir, "--config.data.mixup=0.5", "--config.data.cutmix=0.25")
    got, wanted = (tensors(path / INR_FILE) for path in (workdir, finished[0]))
    assert list(got) == list(wanted)
    assert any((got[leaf] != value).any() for leaf, value in wanted.items())
    message = refusal("train", CONFIG, f"--workdir={tmp_path / 'x'}", "--config.data.mixup=1.5")
    assert "add up to 1 at most, got 1.5 and 0.0" in message


def test_a_work_directory_that_is_in_use_cannot_be_made_or_is_missing_is_refused(copied, tmp_path):
    with open_workdir(copied, read_config(copied)):
        message = refusal("train", CONFIG, f"--workdir={copied}")
    assert f"Another process is using {copied}" in message
    (tmp_path / "file").write_text("")
    message = refusal("train", CONFIG, f"--workdir={tmp_path / 'file' / 'run'}")
    assert str(tmp_path / "file" / "run") in message
    assert "--workdir=DIR is required" in refusal("train", CONFIG)


@pytest.mark.parametrize(
    "overrides, given",
    [
        ("--config.network.depth=15", "depth=15"),
        ("--config.generated=outer", "'outer'"),
        ("--config.inr.kind=siren", "'siren'"),
        ("--config.train.schedule=linear", "'linear'"),
        ("--config.eval.width_ratios=1.0,1.6", "1.6"),
        ("--config.eval.split=train", "'train'"),
        ("--config.dtype=float16", "'float16'"),
        ("--config.data.mean=0.5 --config.data.std=0.0", "(0.0,)"),
        ("--config.data.mean=0.5 --config.data.std=0.5,0.5", "(0.5, 0.5)"),
        # What the run would meet late: in the last phases, after the teacher, in the evaluation.
        ("--config.train.batch_size=500", "lower train.batch_size"),
        ("--config.teacher.batch_size=5000", "lower teacher.batch_size"),
        (
            "--config.train.epochs=0 --config.train.final_epochs=0 --config.train.fit_steps=0",
            "steps",
        ),
        ("--config.teacher.file=nothing.pt", "nothing.pt"),
        ("--config.train.init_from=nothing", "There is no file nothing"),
        ("--config.data.num_validation=0 --config.eval.split=validation", "num_validation above 0"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused_before_the_run(tmp_path, overrides, given):
    workdir = tmp_path / "run"
    for dry in ([], ["--dry_run"]):
        message = refusal("train", CONFIG, f"--workdir={workdir}", *overrides.split(), *dry)
        assert given in message
        assert not workdir.exists()


def test_a_config_of_another_command_or_with_a_section_that_none_reads_is_refused(tmp_path):
    config = "--config=configs/baselines.py:slimmable"
    assert "neumeta compare" in refusal("train", config, f"--workdir={tmp_path / 'run'}")
    fields = load_script("configs/digits").get_config("smoke").to_dict() | {
        "trian": {"epochs": 1.0}
    }
    with pytest.raises(UsageError, match="got 'trian' too"):
        from_config(fields, datasets.load_dataset("digits"))


def test_a_work_directory_belongs_to_a_config_once_something_is_saved(tmp_path, finished):
    first, second = {"seed": 1}, read_config(finished[0])
    black = np.zeros((10, 8, 8), np.uint8), np.arange(10)
    others, digits = (
        datasets.make_dataset("digits", *black, *black),
        datasets.load_dataset("digits"),
    )
    for config, dataset in (first, others), (second, digits):
        with open_workdir(tmp_path, config, dataset.fingerprint()):
            assert read_json(tmp_path / "config.json")["seed"] == config["seed"]
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="was written by another config"):
        check_claim(tmp_path, second | {"seed": 2})
    with (
        pytest.raises(UsageError, match=others.fingerprint()),
        open_workdir(tmp_path, second, others.fingerprint()),
    ):
        pass


OWN = "--config=configs/own.py"
RESNET = f"{OWN} --config.network.factory= --config.network.depth=14"
DEPTH = "--config.train.shallow_epochs=1 --config.train.depth_epochs=1 --config.inr.depth_term=True"


@pytest.mark.parametrize(
    "flags, words",
    [
        (CONFIG, ['"depth": 14', "ResNet14", "26 in 4 phases", "block 2 of 2"]),
        (f"{OWN}:vit", ["network    ViT", "in 1 phase:", "all blocks"]),
        (RESNET, ["ResNet14", "elastic groups of channels: 9 of", "in 1 phase:"]),
        (
            f"{RESNET} --config.generated=all --config.train.skip_blocks=0.5 {DEPTH}",
            ["in 3 phases", "shallow", "depth "],
        ),
    ],
    ids=["blockwise", "factory", "full", "depth"],
)
def test_a_dry_run_describes_any_run_and_writes_nothing(tmp_path, flags, words):
    workdir = tmp_path / "run"
    status, out, err = call("train", *flags.split(), f"--workdir={workdir}", "--dry_run")
    assert (status, err) == (0, "")
    assert not workdir.exists()
    for text in (*words, "minutes for the INR on this device"):
        assert text in out, text


# --- eval.py ---------------------------------------------------------------------------------


def test_eval_evaluates_a_split_at_the_ratios_given(copied):
    flags = "--split=validation --width_ratios=0.75,1"
    before = (copied / "grid.json").read_bytes()
    message = refusal("eval", f"--workdir={copied}", *flags.split())
    assert "holds another evaluation, of other split and networks" in message
    assert (copied / "grid.json").read_bytes() == before
    there, out = evaluate(copied, flags, "validation")
    assert (copied / "grid.json").read_bytes() == before
    assert "validation split, 144 images" in out
    document = read_json(there / "grid.json")
    assert document["split"] == "validation"
    assert [row["width_ratio"] for row in document["rows"]] == [0.75, 1.0]
    last = [line for line in read_metrics(copied) if "validation" in line][-1]
    assert document["rows"][1]["accuracy"] == last["validation"]["1.0"]


def test_eval_does_not_take_other_data_for_those_of_the_run(copied, tmp_path):
    digits = datasets.load_dataset("digits")
    splits = ("train_images", "train_labels", "test_images", "test_labels")
    arrays = {name: getattr(digits, name)[::-1] for name in splits}
    np.savez(tmp_path / "digits.npz", **arrays)
    arguments = f"--workdir={copied}", f"--data_dir={tmp_path}"
    assert digits.fingerprint() in refusal("eval", *arguments)
    elsewhere = f"--out={tmp_path / 'other'}", "--width_ratios=1"
    assert call("eval", *arguments, *elsewhere)[0] == 0
    assert "of other data" in refusal("eval", arguments[0], *elsewhere)


def test_eval_draws_figures_and_random_widths_beside_the_grid(copied, monkeypatch):
    plan, evaluated = Evaluator.plan, []

    def recorded(self, widths, **options):
        evaluated.extend((row, self.strategy) for row in widths)
        return plan(self, widths, **options)

    monkeypatch.setattr(Evaluator, "plan", recorded)
    flags = (
        "--width_ratios=1,0.5 --figures --sweep_ratios=1.25,0.5,0.52,1 --random_ratios=4 --seed=3"
    )
    copied, out = evaluate(copied, flags, "figures")
    for name in ("against_macs", "sweep"):
        assert is_png(copied / f"{name}.png")
        assert f"{name}" in out
    assert [line["name"] for line in read_csv(copied / "against_macs.csv")] == 2 * ["this run"]
    sweep = read_json(copied / "sweep.json")
    assert [row["width_ratio"] for row in sweep["rows"]] == [0.5, 0.52, 1.0, 1.25]
    rows = read_json(copied / "grid.json")["rows"]
    assert [sweep["rows"][n]["accuracy"] for n in (2, 0)] == [row["accuracy"] for row in rows]
    series = [line["series"] for line in read_csv(copied / "sweep.csv")]
    assert series == 4 * ["generated"] + ["teacher"]

    drawn = read_json(copied / "random_ratios.json")
    ratios = [row["width_ratio"] for row in drawn["rows"]]
    assert ratios == sorted(np.random.default_rng(3).uniform(0.5, 1.0, 4))
    assert drawn["split"] == "test" and drawn["teacher_may_have_seen"] is False
    accuracies = [row["accuracy"] for row in drawn["rows"]]
    assert (drawn["largest_dip"], drawn["where"]) == largest_dip(ratios, accuracies)
    assert f"smallest accuracy {100 * min(accuracies):.2f} %" in out

    # Each network once, whichever of the three asks for it first.
    asked = [tuple(row["widths"]) for row in [*rows, *sweep["rows"], *drawn["rows"]]]
    assert evaluated == [(widths, "loop") for widths in dict.fromkeys(asked)]
    assert len(evaluated) < len(asked)


def test_eval_evaluates_networks_of_spec_files_and_of_random_widths(copied):
    family, _, _ = load_inr(copied)
    specs = {str(copied / "a.json"): [2, 5], str(copied / "b.json"): [0, 4]}
    for path, widths in specs.items():
        pathlib.Path(path).write_text(json.dumps(morphs.morph_to_dict(family, widths)))
    before = (copied / "grid.json").read_bytes()
    flags = f"--split=validation --spec={','.join(specs)} --random_networks=5 --seed=2"
    _, out = evaluate(copied, flags)
    assert (copied / "grid.json").read_bytes() == before  # of another command
    found = read_json(copied / "specs.json")
    assert found["split"] == "validation"
    assert {row["spec"]: row["widths"] for row in found["rows"]} == specs
    assert [row["trained"] for row in found["rows"]] == [True, False]
    assert [row["spec"] for row in read_csv(copied / "specs.csv")] == list(specs)
    for row in found["rows"]:
        dense = cifar_spec.morph(family.spec, family.blocks, row["widths"])
        assert (row["num_params"], row["num_macs"]) == (dense.num_params, dense.num_macs)
        assert 0 <= row["agreement"] <= 1 and row["kl_divergence"] > 0
        assert f"{100 * row['accuracy']:.2f}" in out

    drawn = read_json(copied / "random_networks.json")
    random = [row for row in drawn["rows"] if row["series"] == "random"]
    curve = [row for row in drawn["rows"] if row["series"] == "uniform"]
    assert len(random) == 5 and len(curve) > 2
    curve.sort(key=lambda row: row["num_macs"])
    macs, accuracies = ([row[name] for row in curve] for name in ("num_macs", "accuracy"))
    wanted = [row["accuracy"] - np.interp(row["num_macs"], macs, accuracies) for row in random]
    assert [row["difference"] for row in random] == wanted
    assert drawn["mean_difference"] == pytest.approx(np.mean(wanted))
    assert drawn["worst_difference"] == min(wanted)
    assert drawn["best_tenth_difference"] == max(wanted)  # one of five
    for row in random:
        for width, full in zip(row["widths"], family.full_widths, strict=True):
            assert full / 2 <= width <= full
    assert len(read_csv(copied / "random_networks.csv")) == len(drawn["rows"])
    assert is_png(copied / "random_networks.png")


def test_eval_evaluates_a_grid_of_width_and_depth(copied):
    family, _, _ = load_inr(copied)
    flags = "--split=validation --width_ratios=1,0.5 --skipped_blocks=1,0"
    copied, out = evaluate(copied, flags, "depths")
    found = read_json(copied / "depths.json")
    cells = {(row["skipped_blocks"], row["width_ratio"]): row for row in found["rows"]}
    assert list(cells) == [(0, 0.5), (0, 1.0), (1, 0.5), (1, 1.0)]
    assert [row["num_layers"] for row in found["rows"]] == [14, 14, 10, 10]
    grid = {row["width_ratio"]: row for row in read_json(copied / "grid.json")["rows"]}
    for (skipped, ratio), row in cells.items():
        assert row["trained"] == (skipped == 0)
        assert row["widths"] == ([0, 0] if skipped else family.widths(ratio).tolist())
        assert (
            row["num_macs"] == cifar_spec.morph(family.spec, family.blocks, row["widths"]).num_macs
        )
        if not skipped:
            assert row["accuracy"] == grid[ratio]["accuracy"]
        assert f"{100 * row['accuracy']:.2f}" in out
    assert len(read_csv(copied / "depths.csv")) == 4
    assert is_png(copied / "depths.png")


def test_eval_writes_a_page_and_the_accuracy_with_8_bit_weights(copied):
    flags = "--width_ratios=1,0.5 --sweep_ratios=0.5,0.75,1 --skipped_blocks=0,1 --report --int8"
    copied, out = evaluate(copied, flags, "page")
    rows = read_json(copied / "int8.json")["rows"]
    lines = read_csv(copied / "int8.csv")
    assert [row["width_ratio"] for row in rows] == [1.0, 0.5]
    for row, line in zip(rows, lines, strict=True):
        assert abs(row["int8_accuracy"] - row["accuracy"]) < 0.1
        assert float(line["int8_accuracy"]) == row["int8_accuracy"]
        shown = f"{100 * row['accuracy']:.2f}  {100 * row['int8_accuracy']:8.2f}"
        assert shown in out
    assert "largest loss by 8-bit weights" in out
    for row in read_json(copied / "grid.json")["rows"]:
        low, high = row["interval"]
        assert low < row["accuracy"] < high and row["num_images"] == 359
        assert "int8_accuracy" not in row
    embedded = (copied / "report.html").read_text().split('id="data">')[1]
    found = json.loads(embedded.split("</script>")[0])
    networks = {
        network["ratio"]: network for network in found["networks"] if network["depth"] == 14
    }
    assert sorted(networks) == [0.5, 0.75, 1.0]
    (shallow,) = [network for network in found["networks"] if network["depth"] != 14]
    depths = read_json(copied / "depths.json")["rows"]
    assert (shallow["depth"], shallow["widths"]) == (10, [0, 0])
    assert shallow["accuracy"] == depths[-1]["accuracy"]
    assert networks[0.5]["int8"] == rows[1]["int8_accuracy"] and "int8" not in networks[0.75]
    assert found["config"]["data.name"] == "digits" and "jax" in found["versions"]
    assert found["trained_range"] == [0.5, 1.0]


@pytest.mark.parametrize(
    "args, given",
    [
        ("--width_ratios=1,wide", "'wide'"),
        ("--width_ratios=1,1.6", "1.6"),
        ("--width_ratios=0", "0.0"),
        ("--skipped_blocks=0,one", "--skipped_blocks takes numbers of blocks"),
        ("--skipped_blocks=0,5", "--skipped_blocks takes numbers of blocks that a stage of this"),
        ("--width_ratios=", "--width_ratios takes values with commas between, got none"),
        ("--figures --sweep_ratios=1,wide", "--sweep_ratios takes numbers"),
        ("--figures --sweep_ratios=1,1.6", "1.6"),
        ("--sweep_ratios=1,0.5", "needs --figures or --report, got 1,0.5"),
        ("--random_ratios=0", "got 0 and 0"),
        ("--random_ratios=5 --seed=-1", "got 5 and -1"),
        ("--random_ratios=many", "many"),
        ("--strategy=scan", "auto|loop|map|vmap"),
        ("--random_networks=0", "got 0 and 0"),
        ("--random_networks=5 --seed=-1", "got 5 and -1"),
        ("--spec=gone.json", "--spec=gone.json must be a file"),
    ],
)
def test_eval_refuses_what_it_cannot_evaluate(finished, args, given):
    workdir, _ = finished
    before = (workdir / "grid.json").read_bytes()
    assert given in refusal("eval", f"--workdir={workdir}", *args.split())
    assert (workdir / "grid.json").read_bytes() == before


def test_random_widths_need_a_range_to_be_drawn_from(finished):
    config = read_config(finished[0])
    config["train"]["min_width_ratio"] = 1.0
    experiment = from_config(config, datasets.load_dataset("digits"))
    drawn = functools.partial(choices.draw_networks, experiment.hypernetwork)
    for draw in (choices.draw_width_ratios, drawn):
        with pytest.raises(UsageError, match=r"range is 1.0..1.0; use --width_ratios or --spec"):
            draw(experiment.trained_range, 3, 0)


@pytest.mark.parametrize(
    "split, section, field, seen",
    [
        ("validation", "teacher", "file", True),
        ("validation", "train", "init_from", True),
        ("test", "teacher", "file", False),
    ],
)
def test_an_imported_network_may_have_seen_the_validation_images(
    finished, capsys, split, section, field, seen
):
    config = read_config(finished[0])
    images = types.SimpleNamespace(split=split, labels=[0])
    for value in (str(finished[0] / "from_elsewhere"), ""):
        config[section][field] = value
        experiment = from_config(config, datasets.load_dataset("digits"))
        target = evaluations.Target(finished[0], finished[0], experiment, images)
        assert target.teacher_may_have_seen is (wanted := seen and bool(value))
        target.announce("a grid")
        assert ("may have been trained on these" in capsys.readouterr().out) is wanted


def test_a_sweep_is_24_widths_from_a_tenth_to_one_and_a_quarter_unless_others_are_given():
    ratios = choices.SWEEP_RATIOS
    assert len(ratios) == 24 and (ratios[0], ratios[-1]) == (0.1, 1.25)
    np.testing.assert_allclose(np.diff(ratios), 0.05, atol=1e-9)


def test_eval_says_what_it_needs(finished, copied, tmp_path):
    message = refusal("eval", f"--workdir={finished[0]}", CONFIG, "--config.network.shortcut=pad")
    assert "network.shortcut (saved 'projection', given 'pad')" in message
    assert "--workdir=DIR" in refusal("eval")
    assert "--config=FILE" in refusal("eval", "--teacher=x.npz")
    for flag in ("--figures", "--int8", "--width_ratios=1", f"--workdir={tmp_path}"):
        message = refusal("eval", "--teacher=x.npz", CONFIG, flag)
        assert f"{flag.split('=')[0]} and --teacher were given together" in message
    message = refusal("eval", f"--workdir={tmp_path}")
    assert f"{tmp_path} must be the work directory" in message
    (copied / INR_FILE).unlink()  # of a run that is not done
    assert str(copied / INR_FILE) in refusal("eval", f"--workdir={copied}")


def write_teacher(path, *, leave_out=()):
    """A ResNet8 for digits under PyTorch's names, with weights at random."""
    spec = cifar_spec.resnet_spec(
        8, num_classes=10, stage_widths=(4, 6, 8), image_size=8, channels=1
    )
    tensors = networks.torch_tensors(spec)
    for name, x in tensors.items():
        if x.ndim == 4:
            tensors[name] = x * np.float32((2 / np.prod(x.shape[1:])) ** 0.5)
    np.savez(path, **{name: x for name, x in tensors.items() if name not in leave_out})


def test_eval_shows_that_preparing_a_teacher_changes_no_accuracy(tmp_path, monkeypatch):
    """Teachers are checked in float32, whatever the run computes in."""
    write_teacher(tmp_path / "teacher.npz")
    accuracy, dtypes = evaluators.accuracy, set()

    def recorded(*args, **options):
        dtypes.add(args[4].dtype)
        return accuracy(*args, **options)

    monkeypatch.setattr(evaluators, "accuracy", recorded)
    arguments = f"--teacher={tmp_path / 'teacher.npz'}", CONFIG, "--config.dtype=bfloat16"
    status, out, err = call("eval", *arguments)
    assert status == 0 and dtypes == {"float32"}, err
    assert "ResNet8, 10 classes, projection shortcuts" in out
    assert "digits, test split, 359 images" in out
    shown = [line for line in out.splitlines() if line.startswith("teacher accuracy")]
    assert len(shown) == 3
    assert len({line.split(":")[1] for line in shown}) == 1


def test_a_teacher_without_a_tensor_or_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "teacher.npz"
    write_teacher(path, leave_out=["layer2.0.bn1.running_var"])
    message = refusal("eval", f"--teacher={path}", CONFIG)
    assert "layer2.0.bn1.running_var" in message and "teacher.npz" in message
    write_teacher(path)
    workdir = f"--workdir={tmp_path / 'run'}"
    message = refusal("train", CONFIG, workdir, f"--config.teacher.file={path}")
    assert "depth 8 in the file, 14 in the config" in message


# --- the pages and the real teacher ----------------------------------------------------------


def test_the_library_code_of_the_docs_runs_as_written(finished):
    page = (ROOT / "docs" / "library.md").read_text()
    assert "/tmp/digits" in page, "The code must use the quick start's work directory."
    names = {"__name__": "library"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code.replace("/tmp/digits", str(finished[0])), "library.md", "exec"), names)
    assert names["accuracies"].shape == (8,)


@pytest.mark.skipif(
    not (SHARED / "weights" / "cifar100_resnet56-f2eff4c8.pt").is_file(),
    reason=f"needs the ResNet56 teacher and CIFAR-100 in {SHARED} (NEUMETA_SHARED)",
)
def test_the_resnet56_teacher_classifies_alike_before_and_after_folding_and_reordering():
    spec = importlib.util.spec_from_file_location("imgpack", SHARED / "data" / "imgpack.py")
    imgpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imgpack)
    images = imgpack.load_chunk("cifar100", "test", 0)[:300]
    labels = imgpack.labels("cifar100", "test")["fine"][:300]

    path = SHARED / "weights" / "cifar100_resnet56-f2eff4c8.pt"
    spec, variables = cifar_import.load_teacher(path)
    assert spec.depth == 56 and spec.num_classes == 100
    x = jnp.asarray(preprocessing.normalize(images, *datasets.NORMALIZATION["cifar100"]))
    with_batch_norm = jax.jit(lambda v: cifar_resnet.ResNet(spec).apply(v, x))
    without = jax.jit(lambda p: cifar_resnet.apply(spec, p, x))

    folded = cifar_resnet.fold_batch_norm(variables)
    family = cifar_resnet.family(spec)
    smoothed, _ = ordering.smooth(family.groups, folded)
    before = ordering.total_variation(family.groups, folded)
    assert ordering.total_variation(family.groups, smoothed) < 0.95 * before
    logits = with_batch_norm(variables)
    assert np.mean(np.argmax(logits, -1) == labels) > 0.6
    hidden = [cifar_resnet.hidden_group(block) for block in spec.blocks]
    moments = jax.jit(lambda p: elastic.moments(family, p, x[:100], hidden))(folded)
    ordered, orders = ordering.by_importance(family.groups, folded, moments)
    assert len(orders) == 27 and any(np.any(np.diff(order) < 0) for order in orders.values())
    for params in (folded, smoothed, ordered):
        found = without(params)
        np.testing.assert_array_equal(np.argmax(found, -1), np.argmax(logits, -1))
        np.testing.assert_allclose(found, logits, rtol=1e-2, atol=1e-2)


# --- how a second process starts -------------------------------------------------------------


def test_every_program_is_kept_in_the_cache_and_products_are_exact(monkeypatch):
    kept = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_default_matmul_precision",
    )
    before = {name: getattr(jax.config, name) for name in kept}
    try:
        setup.configure_jax()
        assert jax.config.jax_compilation_cache_dir == before[kept[0]]  # JAX was told where to
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
        assert jax.config.jax_persistent_cache_min_entry_size_bytes == 0
        assert jax.config.jax_default_matmul_precision == "highest"
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        setup.configure_jax()
        assert jax.config.jax_compilation_cache_dir == "/caches/neumeta-jax"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_run_that_continues_does_not_initialise_again(monkeypatch, tmp_path):
    config = load_script("configs/digits").get_config("smoke").to_dict()
    config["inr"] = {"kind": "projection"}
    dataset, splits = load_data(config)
    experiment = from_config(config, dataset)
    backbone = cifar_resnet.init_params(jax.random.key(0), experiment.spec)
    stop = inr.phases(experiment, splits)[-1].stop
    found = []

    def restore(self, template):
        found.append(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template))
        return stop, found[0]

    def refuse(*args):
        raise AssertionError("it measures moments again")

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", restore)
    monkeypatch.setattr("neumeta_jax.runs.backbone.measure_moments", refuse)
    params = train_inr(Workdir(tmp_path, logs.Metrics(None)), experiment, splits, backbone)
    assert params is found[0].params


def test_importing_the_library_leaves_orbax_for_the_first_checkpoint():
    program = "import sys, neumeta_jax.commands.train; assert 'orbax.checkpoint' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
