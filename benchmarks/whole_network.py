"""Whole networks made narrow beside networks with narrow blocks: accuracy, size and latency.

    python benchmarks/whole_network.py --hidden=results/cifar100_resnet20/protocol_b \\
        --whole=results/cifar100_resnet20/full

Both folders hold the config.json and grid.json of a run. Each network of the two grids is built
with random weights and timed in onnxruntime in turns with the others, as latency does not depend on
weights. Writes whole_network.json, .csv and .png into the second folder.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from neumeta_jax.data import datasets
from neumeta_jax.evaluation import timing
from neumeta_jax.export import onnx as onnx_format
from neumeta_jax.export.network import INPUT_NAME, Network, Normalization
from neumeta_jax.files import provenance, storage
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.report import plotting
from neumeta_jax.runs import recipes
from neumeta_jax.runs.config import from_config

BATCH = 64
KEPT = ("width_ratio", "num_params", "num_macs", "accuracy", "trained")


def grid(folder: pathlib.Path) -> list[tuple[dict[str, Any], cifar_resnet.ResNetSpec]]:
    """The rows of a run's grid and the shapes of their networks."""
    config = recipes.completed(json.loads((folder / "config.json").read_text()))
    name = config["data"]["name"]
    image = np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, int)
    classes = {"cifar10": 10, "cifar100": 100}[name]
    dataset = datasets.make_dataset(name, *image, *image, num_classes=classes)
    family = from_config(config, dataset).hypernetwork
    rows = json.loads((folder / "grid.json").read_text())["rows"]
    return [({key: row[key] for key in KEPT}, family.at(row["widths"])) for row in rows]


def add_latencies(rows: list[dict[str, Any]], specs: list[Any], rounds: int) -> None:
    """Adds the median time of a batch to each row, of all networks in turns."""
    import onnxruntime

    calls, rng = {}, np.random.default_rng(0)
    feed = {INPUT_NAME: rng.normal(size=(BATCH, 3, 32, 32)).astype(np.float32)}
    for number, spec in enumerate(specs):
        params = cifar_resnet.init_params(jax.random.key(number), spec)
        network = Network(spec, params, Normalization((0.0,) * 3, (1.0,) * 3))
        model = onnx_format.to_onnx(network)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        calls[number] = lambda session=session: session.run(None, feed)
    for number, times in timing.in_turns(calls, rounds, warm_up=3).items():
        rows[number]["latency_ms"] = round(1e3 * float(np.median(times)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=pathlib.Path, required=True)
    parser.add_argument("--whole", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    rows, specs = [], []
    for family, folder in (("blocks alone", options.hidden), ("whole network", options.whole)):
        for row, spec in grid(folder):
            rows.append({"family": family, **row})
            specs.append(spec)
    add_latencies(rows, specs, options.rounds)
    document = {
        "command": " ".join(["python", *sys.argv]),
        "batch": BATCH,
        "device": f"onnxruntime, {provenance.num_cores()} CPU cores",
        "versions": provenance.versions(),
        "rows": rows,
    }
    storage.write_json(options.whole / "whole_network.json", document)
    title = "CIFAR-100: narrow blocks and narrow networks, each family from one INR"
    plotting.plot_families(options.whole / "whole_network.png", rows, title=title)
    for row in rows:
        print({key: row[key] for key in ("family", *KEPT, "latency_ms")})


if __name__ == "__main__":
    main()
