"""benchmarks/speed.py on a tiny network; what it measures is not tested, only that it does."""

import importlib.util
import json
import math
import pathlib
import sys

import jax
import numpy as np
import pytest

from neumeta_jax.commands import command_line
from neumeta_jax.core.inr import Grid
from neumeta_jax.errors import USAGE_ERROR, UsageError
from neumeta_jax.networks import cifar_resnet, cifar_spec

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


def test_smoke_measures_every_ratio_and_its_two_files_agree(speed, tmp_path, capsys):
    cache = jax.config.jax_enable_compilation_cache
    try:
        speed.main(["speed.py", f"--out={tmp_path}", "--smoke"])
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)

    document = json.loads((tmp_path / "speed.json").read_text())
    for row in document["rows"]:
        assert row["ratio"] == row["value"] / row["reference"]
        for name in ("ratio", "value", "reference"):
            assert math.isfinite(row[name]) and row[name] > 0, row
    found = [(row["part"], row["what"].split(",")[0].split(" of ")[0]) for row in document["rows"]]
    assert found == [
        ("grid", "Evaluator"),
        ("grid", "Evaluator"),
        ("grid", "multiply-adds an image at the shapes"),
        ("step", "training step"),
        ("step", "training step"),
    ]
    parts = {part["part"]: part["facts"] for part in document["parts"]}
    assert parts["grid"]["buckets"] == 1
    assert parts["grid"]["networks whose number of correct images differs from the floor's"] == 0
    assert document["command"].startswith("python benchmarks/speed.py --out=")
    assert document["versions"]["jax"] and document["wall_seconds"] > 0

    text = (tmp_path / "speed.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| tiny")]
    assert [(line[2], line[3], line[4]) for line in lines] == [
        (row["what"], row["against"], f"{row['ratio']:.3g}") for row in document["rows"]
    ]
    for facts in parts.values():
        assert all(f"- {name}: {value}" in text for name, value in facts.items())
    assert text.rstrip() in capsys.readouterr().out


def test_a_grid_has_no_network_twice(speed):
    spec = cifar_spec.resnet_spec(20, num_classes=10)
    family = cifar_resnet.hypernetwork(spec, (1, 4, 6), Grid())
    rows = speed.draw_widths(family, 64)
    assert rows.shape == (64, 3) and len(np.unique(rows, axis=0)) == 64
    assert np.all(rows >= family.widths(0.25)) and np.all(rows <= family.widths(1.0))
    small = cifar_spec.resnet_spec(14, num_classes=10, stage_widths=(2, 2, 2))
    tiny = cifar_resnet.hypernetwork(small, (1,), Grid())
    assert sorted(speed.draw_widths(tiny, 3).tolist()) == [[1], [2]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out"),
        (["--out=x", "--networks=resnet18"], "--networks must be among resnet20, resnet56, got"),
        (["--out=x", "--networks=tiny"], "--networks must be among"),
        (["--out=x", "--parts=grid,speed"], "--parts must be among .*, got speed"),
        (["--out=x", "--parts="], "--parts takes values with commas between, got none"),
        (["--out=x", "--num_images=0"], "--num_images must be at least 1, got 0"),
        (["--out=x", "--repeats=few"], "--repeats"),
        (["--out=x", "--fast"], "flag 'fast'"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(speed, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.run(speed.main, ["speed.py", *flags])
    assert stop.value.code == USAGE_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(UsageError, match=message):
        speed.parse(["speed.py", *flags])


def test_parts_run_in_a_fixed_order_and_smoke_is_tiny(speed):
    args = speed.parse(["speed.py", "--out=x", "--parts=step,grid", "--num_images=7", "--smoke"])
    assert args.parts == ["grid", "step"]
    assert args.networks == ["tiny"] and args.num_images == 7 and args.num_networks == 4
