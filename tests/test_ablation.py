"""benchmarks/ablation.py with a train.py that trains nothing."""

import csv

import pytest
from networks import ROOT, load_module

from neumeta_jax.errors import UsageError

# Fails where it is told to.
STUB = """
import json, pathlib, sys
from neumeta_jax.commands import command_line
flags = {"workdir": (str, "", "")}
config, options = command_line.parse(sys.argv, flags, config_required=True)
workdir = pathlib.Path(options.workdir)
(workdir / "config.json").write_text(json.dumps(config))
if config["train"]["distill_from"] == "full":
    sys.exit("no such luck")
rows = [{"width_ratio": 1.0, "accuracy": 0.5 + 0.1 * config["seed"]}]
rows.append({"width_ratio": 0.5, "accuracy": 0.25})
grid = {"split": "validation", "num_inr_params": 1234, "rows": rows}
(workdir / "grid.json").write_text(json.dumps(grid))
"""


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    module, stub = load_module("benchmarks/ablation.py"), tmp_path / "train.py"
    stub.write_text(STUB)
    monkeypatch.setattr(module, "TRAIN", stub)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return module


OVERRIDES = ["--", "--config.teacher.file=teacher.npz"]


def test_a_failed_row_stops_no_other_and_the_table_has_means_over_seeds(ablation, tmp_path, capsys):
    workdir = tmp_path / "runs"
    command = ["", f"--workdir={workdir}", "--rows=base,in_place", *OVERRIDES]
    with pytest.raises(SystemExit) as stop:
        ablation.main([*command[:3], "--seeds=0,1", *OVERRIDES])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert err == "failed: in_place, in_place-seed1\n"
    assert "no such luck" in (workdir / "in_place" / "train.log").read_text()
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 3
    base = [cell.strip() for cell in table[-1].split("|")]
    assert base[1] == "base" and base[3:-1] == ["55.0", "25.0", "1,234", "0, 1"]
    with (workdir / "ablation.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["seed"]) for line in lines] == [("base", "0"), ("base", "1")]
    assert lines[1]["accuracy_1"] == "0.6"


def test_finished_rows_are_not_run_again(ablation, tmp_path, capsys):
    workdir = tmp_path / "runs"
    command = ["", f"--workdir={workdir}", "--rows=base"]
    ablation.main([*command, *OVERRIDES])
    first = capsys.readouterr().out
    (workdir / "base" / "train.log").unlink()
    ablation.main([*command, *OVERRIDES])
    again = capsys.readouterr().out
    assert "base (1 of 1): there already" in again
    assert not (workdir / "base" / "train.log").exists()
    assert again.splitlines()[1:] == first.splitlines()[1:]
    with pytest.raises(UsageError, match=r"another config.*train.batch_size"):
        ablation.main([*command, *OVERRIDES, "--config.train.batch_size=64"])


@pytest.mark.parametrize(
    "args, given",
    [
        ("--rows=base,siren", "got siren"),
        ("--seeds=0,one", "'0,one'"),
        ("-- --config.seed=3", "'--config.seed=3'"),
        ("-- --workdir=x", "'--workdir=x'"),
        ("-- --config=x.py", "'--config=x.py'"),
        ("-- --config.train.batchsize=3", "did you mean --config.train.batch_size"),
    ],
)
def test_what_no_row_could_use_is_refused(ablation, tmp_path, args, given):
    with pytest.raises(UsageError, match=given):
        ablation.main(["", f"--workdir={tmp_path / 'runs'}", *args.split()])
    assert not list(tmp_path.rglob("*.json"))
