"""Latency: what is measured of which network, and what is refused. No test depends on speed."""

import csv
import importlib.util
import json

import jax
import numpy as np
import pytest
from networks import assert_refuses, random_inr, run

from neumeta_jax.commands import latency as command
from neumeta_jax.core.inr import Grid
from neumeta_jax.evaluation import morphs
from neumeta_jax.export.network import draw
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, morph, resnet_spec
from neumeta_jax.networks.saved import INR_FILE, load_inr, save_inr
from neumeta_jax.report import page
from neumeta_jax.search import latency

SPEC = resnet_spec(14, num_classes=3, stage_widths=(2, 4, 4), image_size=8)
FAMILY = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC), Grid())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("latency")
    params = random_inr(FAMILY, seed=3, scale=0.4)
    save_inr(path / INR_FILE, FAMILY, params)
    config = {"eval": {"width_ratios": [1.0, 0.5], "num_samples": 1}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_command_measures_every_network_in_both_runtimes(workdir, tmp_path):
    # Wider than the full size, and with a block less.
    widths = (0, 5)
    spec = tmp_path / "wider_and_shallower.json"
    spec.write_text(json.dumps(morphs.morph_to_dict(FAMILY, widths)))
    out = run(command, f"--workdir={workdir}", f"--spec={spec}", "--calls=3", "--batch_sizes=2,1")
    assert "wider_and_shallower  generate" in out and "p90 ms" in out  # names are not cut
    document = json.loads((workdir / "latency.json").read_text())
    assert page.read_latency(workdir / "latency.json") == document
    assert "onnxruntime" in document["versions"] and "CPU cores" in document["device"]
    rows = document["rows"]
    names = [(row["name"], row["width_ratio"]) for row in rows]
    assert names == [("1", 1.0), ("0.5", 0.5), ("wider_and_shallower", None)]
    for row in rows:
        small = morph(SPEC, FAMILY.blocks, row["widths"])
        assert (row["num_params"], row["num_macs"]) == (small.num_params, small.num_macs)
        assert set(row["latency"]) == {"jax", "onnxruntime"}
        for batches in row["latency"].values():
            assert set(batches) == {"1", "2"}
            for found in batches.values():
                assert 0 < found["p50_ms"] <= found["p90_ms"] and found["calls"] == 3
        assert row["memory_bytes"]["2"] > row["memory_bytes"]["1"] > 4 * small.num_params
        assert min(row["file_bytes"].values()) > 4 * small.num_params
        assert set(row["file_bytes"]) == {"safetensors", "onnx"}
        assert set(row["switch_ms"]) == {"generate", "compile", "onnxruntime"}
        assert min(row["switch_ms"].values()) > 0
    assert rows[2]["widths"] == list(widths)
    with (workdir / "latency.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 2 * 2 and lines[-1]["widths"] == "0 5"


def test_what_is_measured_computes_the_network_of_its_widths(workdir, monkeypatch):
    kept = {}

    def keep(calls, rounds, *, warm_up):
        kept.update(calls)
        return {key: [1.0] * rounds for key in calls}

    monkeypatch.setattr(latency.timing, "in_turns", keep)
    family, params, _ = load_inr(workdir)
    network = latency.Network("", None, (1, 3))
    writers = {"onnx": command.write_onnx}
    latency.measure(family, params, [network], batch_sizes=(2,), rounds=1, writers=writers)
    compiled, (tree, images) = kept[0, "jax", 2].func, kept[0, "jax", 2].args
    (onnx_logits,) = kept[0, "onnxruntime", 2]()
    small, wanted = draw(family, params, network.widths)
    logits = jax.jit(lambda tree: cifar_resnet.apply(small, tree, images))(wanted)
    np.testing.assert_allclose(compiled(tree, images), logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(onnx_logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "args, shown",
    [
        ([], "needs --workdir=DIR"),
        (["--batch_sizes=1,0"], "--batch_sizes takes integers of at least 1"),
        (["--calls=0"], "--calls must be at least 1, got 0"),
        (["--width_ratios=2"], "A width ratio must lie in (0, 1.5], got 2"),
        (["--spec=gone.json"], "--spec=gone.json must be a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(workdir, monkeypatch, args, shown):
    monkeypatch.setattr(latency, "measure", None)
    assert_refuses(shown, command, *args, *([f"--workdir={workdir}"] if args else []))


def test_without_onnxruntime_jax_alone_is_measured(workdir, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    asked = {}

    def measure(*args, **options):
        asked.update(options)
        return []

    monkeypatch.setattr(latency, "measure", measure)
    there = workdir / "elsewhere"
    out = run(command, f"--workdir={workdir}", f"--out={there}")
    assert list(asked["writers"]) == ["safetensors"] and "only JAX is measured" in out
    assert (there / "latency.json").is_file()
    (there / "latency.json").write_text(json.dumps({"rows": [{"widths": [1, 1]}]}))
    words = "holds another evaluation, of other networks"
    assert_refuses(words, command, f"--workdir={workdir}", f"--out={there}")
