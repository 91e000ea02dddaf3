"""benchmarks/speed.py on a tiny network; what it measures is not tested, only that it does."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from neumeta_jax import command_line

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("benchmark_speed", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_smoke_measures_every_ratio_and_its_two_files_agree(tmp_path):
    flags = [f"--out={tmp_path}", "--smoke", "--parts=generation,grid,strategies,step,flops"]
    command = [sys.executable, str(PROGRAM), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    document = json.loads((tmp_path / "speed.json").read_text())
    for row in document["rows"]:
        assert row["ratio"] == row["value"] / row["reference"]
        for name in ("ratio", "value", "reference"):
            assert math.isfinite(row[name]) and row[name] > 0, row
    found = [(row["part"], row["what"].split(",")[0].split(" of ")[0]) for row in document["rows"]]
    assert found == [
        ("generation", "one network from the default INR"),
        ("generation", "one network from the papers' INR"),
        ("grid", "evaluate_grid"),
        ("grid", "evaluate_grid"),
        ("grid", "papers' way"),
        ("grid", "papers' way"),
        ("grid", "papers' way"),
        ("grid", "papers' way"),
        ("grid", "multiply-adds an image at the shapes"),
        ("strategies", "vmap"),
        ("strategies", "vmap"),
        ("strategies", "map"),
        ("strategies", "loop"),
        ("step", "training step"),
        ("step", "training step"),
        ("step", "temporary memory"),
        ("flops", "forward pass"),
        ("flops", "forward and backward passes in a training step"),
    ]
    parts = {part["part"]: part["facts"] for part in document["parts"]}
    assert parts["grid"]["buckets"] == 1
    assert "1 jit(_score_chunk)" in parts["grid"]["programs compiled"]
    assert all("peak resident memory" in facts for facts in parts.values())
    assert document["command"].startswith("python benchmarks/speed.py --out=")
    assert document["versions"]["jax"] and document["wall_seconds"] > 0

    text = (tmp_path / "speed.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| tiny")]
    assert [(line[2], line[3], line[4]) for line in lines] == [
        (row["what"], row["against"], f"{row['ratio']:.3g}") for row in document["rows"]
    ]
    for facts in parts.values():
        assert all(f"- {name}: {value}" in text for name, value in facts.items())
    assert text.rstrip() in result.stdout


def test_what_is_compared_takes_turns_and_counts_with_its_fewest_seconds(speed, monkeypatch):
    clock = iter([10.0, 13.0, 20.0, 21.0, 30.0, 35.0, 40.0, 42.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    assert speed.take_turns(functions, rounds=2) == {"a": 2.0, "b": 1.0}
    assert calls == ["a", "b", "a", "b", "b", "a"]


def test_a_grid_has_no_network_twice(speed):
    spec = speed.cifar_resnet(20, num_classes=10)
    family = speed.Hypernetwork(spec=spec, blocks=(1, 4, 6), inr=speed.PAPERS_INR)
    rows = speed.draw_widths(family, 64)
    assert rows.shape == (64, 3) and len(np.unique(rows, axis=0)) == 64
    assert np.all(rows >= family.widths(0.25)) and np.all(rows <= family.widths(1.0))
    tiny = speed.Hypernetwork(
        spec=speed.cifar_resnet(14, num_classes=10, stage_widths=(2, 2, 2)),
        blocks=(1,),
        inr=speed.PAPERS_INR,
    )
    assert sorted(speed.draw_widths(tiny, 3).tolist()) == [[1], [2]]


def test_networks_of_one_shape_differ(speed):
    spec = speed.cifar_resnet(20, num_classes=10)
    family = speed.Hypernetwork(spec=spec, blocks=(1, 4), inr=speed.PAPERS_INR)
    rows = speed.one_bucket(family, 4)
    assert len(rows) == 4 and rows.max(axis=0).tolist() == family.widths(0.75).tolist()


def test_a_sample_of_the_floor_is_spread_over_all_sizes(speed):
    order = np.arange(64)[::-1]
    assert speed.evenly_spaced(order, 4).tolist() == [55, 39, 23, 7]
    assert speed.evenly_spaced(order, 64).tolist() == order.tolist()
    assert speed.evenly_spaced(order, 100).tolist() == order.tolist()


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("teacher | step 1/2930 | loss 4.6 accuracy 0.01 | - images/s | ETA ?", True),
        ("[1/1] all blocks | step 12/4921 | loss 4.6 | 100 images/s | ETA 1:00", True),
        ("[1/1] all blocks | step 12 | validation top-1 at width 1.0: 3.00 %", False),
        ("[1/1] all blocks | step 0/4921 | loss 4.6 | - images/s | ETA ?", False),
        ("steps      4,921 in 1 phases", False),
    ],
)
def test_the_end_of_a_training_step_is_read_from_the_log(speed, line, ends):
    assert speed.ends_a_step(line) == ends


def test_a_start_is_timed_until_the_first_step_and_then_stopped(speed, tmp_path):
    stub = tmp_path / "train.py"
    stub.write_text(
        "import time\nprint('jax 1.0')\nprint('all | step 1/9 | loss 1 | -')\ntime.sleep(600)\n"
    )
    seconds = speed.seconds_to_first_step([sys.executable, str(stub)], {})
    assert 0 < seconds < 300
    stub.write_text("print('error: no data')\n")
    with pytest.raises(command_line.UsageError, match="ended with 'error: no data'"):
        speed.seconds_to_first_step([sys.executable, str(stub)], {})


def test_steps_on_several_cpu_devices_are_compared_with_those_on_one(speed, tmp_path, monkeypatch):
    stub = tmp_path / "train.py"
    stub.write_text(
        "import os, time\n"
        "pause = 0.0 if os.environ['JAX_NUM_CPU_DEVICES'] == '1' else 0.5\n"
        "for n in range(1, 100):\n"
        "    print(f'all | step {n}/99 | loss 1 | -')\n"
        "    time.sleep(pause)\n"
    )
    monkeypatch.setattr(speed, "TRAIN", stub)
    monkeypatch.setattr(speed.lab, "num_cores", lambda: 3)
    args = speed.parse(["--out=x", "--smoke", "--train_batch=6"])
    found = speed.measure_devices("tiny", args)
    (row,) = found.rows
    assert row.what == "training step on 3 CPU devices"
    assert row.reference < 0.5 <= row.value  # each of them slept for this long
    args = speed.parse(["--out=x", "--smoke", "--train_batch=1"])
    assert speed.measure_devices("tiny", args).rows == []  # a batch that cannot be shared


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out"),
        (["--out=x", "--networks=resnet18"], "--networks must be among resnet20, resnet56, got"),
        (["--out=x", "--networks=tiny"], "--networks must be among"),
        (["--out=x", "--parts=grid,speed"], "--parts must be among .*, got speed"),
        (["--out=x", "--parts="], "--parts must be among .*, got none"),
        (["--out=x", "--num_images=0"], "--num_images must be at least 1, got 0"),
        (["--out=x", "--repeats=few"], "--repeats"),
        (["--out=x", "--batch_sizes=256,0"], "--batch_sizes takes whole numbers above 0"),
        (["--out=x", "--fast"], "--fast"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(speed, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.run(speed.main, ["speed.py", *flags])
    assert stop.value.code == command_line.USAGE_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(command_line.UsageError, match=message):
        speed.parse(flags)


def test_parts_run_in_a_fixed_order_and_smoke_is_tiny(speed):
    args = speed.parse(["--out=x", "--parts=flops,startup,grid", "--num_images=7", "--smoke"])
    assert args.parts == ["startup", "grid", "flops"]
    assert args.networks == ["tiny"] and args.num_images == 7 and args.num_networks == 4
