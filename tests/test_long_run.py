"""benchmarks/long_run.py, and through it the loop of train.py, for a few thousand steps."""

import json

import test_recipe as recipe


def test_a_long_run_keeps_two_checkpoints_and_reports_its_windows(tmp_path, capsys, monkeypatch):
    long_run = recipe.load_script("benchmarks/long_run")
    monkeypatch.setattr(long_run.lab, "quiet_logging", lambda: None)
    monkeypatch.setattr(long_run, "WINDOW", 100)
    arguments = ["--steps=500", "--log_every=10", "--checkpoint_every=50", f"--out={tmp_path}"]
    assert long_run.main(arguments) == 0
    assert "last step  median us" in capsys.readouterr().out
    document = json.loads((tmp_path / "long_run.json").read_text())
    rows = document["windows"]
    assert [row["last_step"] for row in rows] == [100, 200, 300, 400]
    assert all(row["checkpoints"] == 2 for row in rows)
    assert all(row["median_us"] > 0 for row in rows)
    sizes = [row["metrics_kib"] for row in rows]
    assert sizes == sorted(sizes) and sizes[0] > 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(10, 501, 10))
