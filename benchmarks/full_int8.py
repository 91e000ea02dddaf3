"""What rounding the activations too costs: top-1 of exported files with weights and activations in
8 bits, beside the float32 file of the same network.

    python benchmarks/full_int8.py --workdir=DIR --split=validation --num_images=2000 --out=OUT
    python benchmarks/full_int8.py --workdir=DIR --split=test --out=OUT

For each width ratio three files are written, as `neumeta export` writes them (--format=onnx,
--format=onnx --int8=full, --format=litert --int8=full), and run by onnxruntime and LiteRT on the
CPU. Ranges of activations are measured on the first 512 training images.

Writes full_int8_<split>.json to --out and prints a table.
"""

import argparse
import json
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from neumeta_jax.commands import setup
from neumeta_jax.commands.command_line import run
from neumeta_jax.errors import UsageError
from neumeta_jax.export import formats
from neumeta_jax.export.network import Network, Normalization, draw
from neumeta_jax.networks.saved import load_inr
from neumeta_jax.runs.config import from_config, load_data
from neumeta_jax.runs.workdir import read_config

FILES = {
    "float32, onnxruntime": ("onnx", None),
    "8 bits, onnxruntime": ("onnx", "full"),
    "8 bits, LiteRT": ("litert", "full"),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--width_ratios", default="1,0.75,0.5,0.25")
    parser.add_argument("--num_images", type=int, help="the first ones; default: all")
    parser.add_argument("--data_dir", help="where the data lies, if it has moved")
    args = parser.parse_args(argv[1:])

    setup.quiet_logging()
    config = read_config(args.workdir)
    if args.data_dir:
        config["data"]["dir"] = args.data_dir
    family, params, _ = load_inr(args.workdir)
    dataset, splits = load_data(config)
    experiment = from_config(config, dataset)
    images = getattr(splits, f"{args.split}_images")[: args.num_images]
    labels = getattr(splits, f"{args.split}_labels")[: args.num_images]
    if not len(images):
        raise UsageError(f"{args.workdir} must have a {args.split} split, but it is empty.")
    normalization = Normalization(experiment.preprocessing.mean, experiment.preprocessing.std)
    num_samples = experiment.evaluation.num_samples
    key = experiment.key(3) if num_samples > 1 else None  # the noise of eval.py

    rows = []
    for ratio in map(float, args.width_ratios.split(",")):
        widths = family.widths(ratio).tolist()
        spec, tree = draw(family, params, widths, key=key, num_samples=num_samples)
        row = {"width_ratio": ratio, "accuracy": {}, "file_bytes": {}}
        for name, (format, int8) in FILES.items():
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "net")
                formats.export(
                    path,
                    Network(spec, tree, normalization),
                    splits.train_images[:64],
                    format=format,
                    int8=int8,
                    calibration=splits.train_images[: formats.NUM_CALIBRATION_IMAGES],
                )
                logits = formats.logits_of_file(
                    path, images, format=format, normalization=normalization
                )
                row["file_bytes"][name] = path.stat().st_size
            row["accuracy"][name] = float(np.mean(logits.argmax(axis=1) == labels))
        rows.append(row)
        print(row, flush=True)

    exact, *rounded = FILES
    lines = ["| width ratio | " + " | ".join(FILES) + " |", "|---" * (1 + len(FILES)) + "|"]
    for row in rows:
        wanted = row["accuracy"][exact]
        cells = [f"{row['width_ratio']:g}", f"{100 * wanted:.2f}"]
        for name in rounded:
            found = row["accuracy"][name]
            cells.append(f"{100 * found:.2f} ({100 * (found - wanted):+.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    content = {"dataset": experiment.name, "split": args.split, "images": len(images), "rows": rows}
    (out / f"full_int8_{args.split}.json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
