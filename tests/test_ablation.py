"""benchmarks/ablation.py with a train.py that trains nothing."""

import csv
import importlib.util
import pathlib
import sys

import pytest

from neumeta_jax import command_line

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Prepares a teacher where there is none, and notes that it did; fails where it is told to.
STUB = """
import json, pathlib, sys
from neumeta_jax import command_line
flags = {"workdir": (str, "", "")}
config, options = command_line.parse(sys.argv, flags, config_required=True)
workdir = pathlib.Path(options.workdir)
(workdir / "config.json").write_text(json.dumps(config))
if not (workdir / "backbone.safetensors").exists():
    (workdir / "backbone.safetensors").write_text(config["channel_order"])
    (workdir / "prepared").touch()
if config["train"]["distill_from"] == "full":
    sys.exit("no such luck")
fit = config["train"]["fit_steps"]
if fit:
    print(f"[1/2] fit | step {fit}/{fit + 400} | loss 0.1 | 20.0 steps/s | ETA 1:00")
lines = [{"part": "inr", "step": fit, "phase": "fit", "images_per_second": 0.0}] if fit else []
lines.append({"part": "inr", "step": fit + 400, "phase": "all", "images_per_second": 64.0})
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
rows = [{"width_ratio": 1.0, "accuracy": 0.5 + 0.1 * config["seed"]}]
rows.append({"width_ratio": 0.5, "accuracy": 0.25})
grid = {"split": "validation", "num_inr_params": 1234, "rows": rows}
(workdir / "grid.json").write_text(json.dumps(grid))
print("done in 1:02:05")
"""


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    path = ROOT / "benchmarks" / "ablation.py"
    spec = importlib.util.spec_from_file_location("benchmark_ablation", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)
    stub = tmp_path / "train.py"
    stub.write_text(STUB)
    monkeypatch.setattr(module, "TRAIN", stub)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(module.signal, "signal", lambda *args: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return module


OVERRIDES = ["--", "--config.teacher.file=teacher.npz"]


def test_rows_share_a_teacher_and_a_failed_row_stops_no_other(ablation, tmp_path, capsys):
    workdir = tmp_path / "runs"
    rows = "base,in_place,per_tensor_mlp,order_smoothness"
    with pytest.raises(SystemExit) as stop:
        ablation.main(
            ["", f"--workdir={workdir}", f"--rows={rows}", "--seeds=0,1", "--jobs=2", *OVERRIDES]
        )
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert err == "failed: in_place, in_place-seed1\n"
    assert "no such luck" in (workdir / "in_place" / "train.log").read_text()

    prepared = sorted(path.parent.name for path in workdir.glob("*/prepared"))
    assert len(prepared) == 2, prepared  # one for each order of channels
    assert (workdir / "base" / "backbone.safetensors").read_text() == "importance"
    assert (workdir / "per_tensor_mlp-seed1" / "backbone.safetensors").read_text() == "smoothness"

    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    base, shared = (
        next([cell.strip() for cell in line.split("|")] for line in table if f"| {row} |" in line)
        for row in ("base", "per_tensor_mlp")
    )
    # Means of two seeds; 400 steps of 32 shared images at 64 images a second, 600 steps of fit.
    assert base[3:-1] == ["55.0", "25.0", "1,234", "200", "2 (0, 1)"]
    assert shared[3:-1] == ["55.0", "25.0", "1,234", "200 + fit 30", "2 (0, 1)"]
    with (workdir / "ablation.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["seed"]) for line in lines[:2]] == [("base", "0"), ("base", "1")]
    assert (lines[1]["accuracy_1"], lines[1]["wall_seconds"]) == ("0.6", "3725.0")


def test_finished_rows_are_not_run_again_and_the_table_needs_no_run(ablation, tmp_path, capsys):
    workdir = tmp_path / "runs"
    command = ["", f"--workdir={workdir}", "--rows=base"]
    ablation.main([*command, *OVERRIDES])
    first = capsys.readouterr().out
    table = [line for line in first.splitlines() if line.startswith("|")]
    log = (workdir / "base" / "train.log").read_bytes()
    ablation.main([*command, *OVERRIDES])
    assert "1 of 1 runs are there already" in capsys.readouterr().out
    (workdir / "ablation.csv").unlink()
    ablation.main([*command, "--table_only"])
    assert (workdir / "base" / "train.log").read_bytes() == log
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("|")] == table
    assert (workdir / "ablation.csv").exists()
    with pytest.raises(command_line.UsageError, match="another config.*train.batch_size"):
        ablation.main([*command, *OVERRIDES, "--config.train.batch_size=64"])


@pytest.mark.parametrize(
    "args, given",
    [
        ("--rows=base,siren", "got siren"),
        ("--seeds=0,one", "'0,one'"),
        ("--jobs=0", "and 0"),
        ("--table_only", "has none"),
        ("-- --config.seed=3", "'--config.seed=3'"),
        ("-- --workdir=x", "'--workdir=x'"),
        ("-- --config=x.py", "'--config=x.py'"),
        ("-- --config.train.batchsize=3", "did you mean --config.train.batch_size"),
    ],
)
def test_what_no_row_could_use_is_refused(ablation, tmp_path, args, given):
    with pytest.raises(command_line.UsageError, match=given):
        ablation.main(["", f"--workdir={tmp_path / 'runs'}", *args.split()])
    assert not list(tmp_path.rglob("*.json"))
