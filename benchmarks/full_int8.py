"""What rounding the activations too costs: top-1 of exported files with weights and activations in
8 bits, beside the float32 file of the same network.

    python benchmarks/full_int8.py --workdir=DIR --split=validation --num_images=2000 --out=OUT
    python benchmarks/full_int8.py --workdir=DIR --split=test --out=OUT

For each width ratio three files are written, as `neumeta export` writes them (--format=onnx,
--format=onnx --int8=full, --format=litert --int8=full), and run by onnxruntime and LiteRT on the
CPU. Ranges of activations are measured on the first 512 training images.

Writes full_int8_<split>.json to --out and prints a table.
"""

import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from neumeta_jax.commands import command_line, setup
from neumeta_jax.errors import check
from neumeta_jax.evaluation.choices import parse_width_ratios
from neumeta_jax.evaluation.evaluator import evaluation_split
from neumeta_jax.export import formats
from neumeta_jax.export.network import Network, Normalization, draw
from neumeta_jax.files import storage
from neumeta_jax.report.tables import table
from neumeta_jax.runs.workdir import open_run

FILES = {
    "float32, onnxruntime": ("onnx", None),
    "8 bits, onnxruntime": ("onnx", "full"),
    "8 bits, LiteRT": ("litert", "full"),
}


FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "out": (str, "", "Folder of the results."),
    "split": (("validation", "test"), "validation", "Whose images."),
    "width_ratios": (list, ["1", "0.75", "0.5", "0.25"], "Comma-separated."),
    "num_images": (int, None, "The first ones; default: all."),
    **command_line.DATA_DIR,
}


def main(argv: Sequence[str]) -> None:
    config, args = command_line.parse(argv, FLAGS, config_required=False)
    check(args.workdir and args.out, "--workdir=DIR and --out=DIR are required.")
    setup.quiet_logging()
    opened = open_run(config, args)
    experiment, splits = opened.load()
    images, labels = (data[: args.num_images] for data in evaluation_split(splits, args.split))
    normalization = Normalization(experiment.preprocessing.mean, experiment.preprocessing.std)
    noise = experiment.noise(experiment.evaluation.num_samples)
    family, params = opened.hypernetwork, opened.params

    rows = []
    for ratio in parse_width_ratios(args.width_ratios):
        widths = family.widths(ratio).tolist()
        spec, tree = draw(family, params, widths, **noise)
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
    cells = []
    for row in rows:
        found = row["accuracy"]
        change = {name: 100 * (found[name] - found[exact]) for name in rounded}
        cells.append({"width ratio": f"{row['width_ratio']:g}", exact: f"{100 * found[exact]:.2f}"})
        cells[-1] |= {n: f"{100 * found[n]:.2f} ({change[n]:+.2f})" for n in rounded}
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    content = {"dataset": experiment.name, "split": args.split, "images": len(images), "rows": rows}
    storage.write_json(out / f"full_int8_{args.split}.json", content)
    print(table(cells))


if __name__ == "__main__":
    command_line.run(main)
