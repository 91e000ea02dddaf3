"""Runs the rows of configs/ablation.py, one after the other, and makes one table of them.

    python benchmarks/ablation.py --workdir=DIR --rows=base,nested,cell -- \\
        --config.data.dir=FOLDER_OR_NPZ --config.teacher.file=cifar100_resnet20.npz

What follows `--` goes to every train.py. Each row has its own folder in DIR with its log,
train.log; a row that has a grid.json is not run again, and the same command continues after an
interruption. Other rows of the same DIR can run in a second process.

Writes DIR/ablation.csv, a line for each row and seed, and prints a Markdown table. Both hold every
seed of the chosen rows that DIR has; the table has their means.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from neumeta_jax.commands import command_line
from neumeta_jax.errors import check
from neumeta_jax.files import storage
from neumeta_jax.report.tables import table
from neumeta_jax.runs.workdir import check_same_config, read_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"
CONFIG = ROOT / "configs" / "ablation.py"


def load_rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """`ROWS` of configs/ablation.py."""
    spec = importlib.util.spec_from_file_location("ablation_config", CONFIG)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ROWS


def plan(
    workdir: pathlib.Path, rows: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]
) -> dict[pathlib.Path, list[str]]:
    """The command of train.py for each row and seed by its folder, those of one seed together.

    Raises:
        UsageError: for arguments that no row takes, or a folder made with others.
    """
    for arg in overrides:
        check(
            not re.match(r"--?(config(=|$)|config\.seed\b|workdir\b|dry_run\b)", arg),
            f"After -- come overrides --config.field=value, got {arg!r}; configs, seeds and work "
            "directories of the rows are set here.",
        )
    commands = {}
    for seed in seeds:
        for row in rows:
            args = [f"--config={CONFIG}:{row}", f"--config.seed={seed}", *overrides]
            config, _ = command_line.parse(["train.py", *args], {}, config_required=True)
            folder = workdir / (row if seed == 0 else f"{row}-seed{seed}")
            if (folder / "config.json").exists():
                check_same_config(folder, config)
            commands[folder] = [sys.executable, str(TRAIN), f"--workdir={folder}", *args]
    return commands


def run_all(commands: Mapping[pathlib.Path, Sequence[str]]) -> list[str]:
    """Runs what is not done; returns the names of the folders whose run failed."""
    failed = []
    for number, (folder, command) in enumerate(commands.items(), 1):
        place = f"{folder.name} ({number} of {len(commands)})"
        if (folder / "grid.json").exists():
            print(f"{place}: there already", flush=True)
            continue
        print(place, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "train.log").open("a") as log:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if status:
            failed.append(folder.name)
            print(f"FAILED with exit status {status}, see {folder / 'train.log'}", flush=True)
    return failed


def collect(workdir: pathlib.Path, rows: Mapping[str, str]) -> list[dict[str, Any]]:
    """A line for each finished run of `rows`, descriptions by name; by row, then seed."""
    lines = []
    for row, description in rows.items():
        found = []
        for path in [workdir / row / "grid.json", *workdir.glob(f"{row}-seed*/grid.json")]:
            if path.exists():
                grid, config = json.loads(path.read_text()), read_config(path.parent)
                head = {"row": row, "description": description, "seed": config["seed"]}
                size = {"num_inr_params": grid["num_inr_params"]}
                accuracies = {
                    f"accuracy_{line['width_ratio']:g}": line["accuracy"] for line in grid["rows"]
                }
                found.append({**head, "split": grid["split"], **accuracies, **size})
        lines += sorted(found, key=lambda line: line["seed"])
    return lines


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table: means over the seeds of a row, accuracies in percent."""
    columns, cells = [name for name in lines[0] if name.startswith("accuracy_")], []
    for row in dict.fromkeys(line["row"] for line in lines):
        runs = [line for line in lines if line["row"] == row]
        means = {name: statistics.mean(run[name] for run in runs) for name in columns}
        cells.append(
            {
                "row": row,
                "": runs[0]["description"],
                **{name.removeprefix("accuracy_"): f"{100 * means[name]:.1f}" for name in columns},
                "INR parameters": f"{runs[0]['num_inr_params']:,}",
                "seeds": ", ".join(str(run["seed"]) for run in runs),
            }
        )
    return table(cells, left=2)


def main(argv: Sequence[str]) -> None:
    arguments = list(argv[1:])
    place = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Arguments after -- go to every train.py.",
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="holds all rows")
    parser.add_argument("--rows", default="", help="names with commas between; default all")
    parser.add_argument("--seeds", default="0", help="numbers with commas between; default 0")
    args = parser.parse_args(arguments[:place])

    known = load_rows()
    rows = list(dict.fromkeys(args.rows.split(","))) if args.rows else list(known)
    unknown = [row for row in rows if row not in known]
    check(not unknown, f"--rows must be among {', '.join(known)}, got {', '.join(unknown)}.")
    seeds = list(dict.fromkeys(args.seeds.split(",")))
    check(
        all(map(str.isdigit, seeds)),
        f"--seeds takes whole numbers with commas between, got {args.seeds!r}.",
    )
    seeds = list(map(int, seeds))
    failed = run_all(plan(args.workdir, rows, seeds, arguments[place + 1 :]))

    lines = collect(args.workdir, {row: known[row][0] for row in rows})
    if lines:
        path = args.workdir / "ablation.csv"
        storage.write_csv(path, storage.as_table(lines))
        print(f"\ntop-1 in % on the {lines[0]['split']} split by width ratio, means over seeds\n")
        print(markdown(lines))
        print(f"\nwrote {path}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
