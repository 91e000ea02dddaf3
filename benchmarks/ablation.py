"""Runs the rows of configs/ablation.py, several at a time, and makes one table of them.

    python benchmarks/ablation.py --workdir=DIR --rows=base,nested,cell --jobs=2 -- \\
        --config.data.dir=FOLDER_OR_NPZ --config.teacher.file=cifar100_resnet20.npz

What follows `--` goes to every train.py. Each row has its own folder in DIR with its log,
train.log; a row that has a grid.json is not run again, and the same command continues after an
interruption. Rows run on one CPU core each, where the system can pin them, so that their times
compare; the teacher is prepared once for each order of its channels and copied.

Writes DIR/ablation.csv, a line for each row and seed, and prints a Markdown table. Both hold every
seed of the chosen rows that DIR has; the table has their means.
"""

import argparse
import csv
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from neumeta_jax import command_line, experiment as lab
from neumeta_jax.command_line import UsageError
from neumeta_jax.progress import format_seconds

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"
CONFIG = ROOT / "configs" / "ablation.py"
POLL_SECONDS = 0.5


def load_rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """`ROWS` of configs/ablation.py."""
    spec = importlib.util.spec_from_file_location("ablation_config", CONFIG)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ROWS


# --- running ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A row with a seed. `teacher` is equal for runs whose prepared teacher is the same."""

    row: str
    seed: int
    workdir: pathlib.Path
    command: tuple[str, ...]
    teacher: str

    @property
    def name(self) -> str:
        return self.workdir.name

    @property
    def backbone(self) -> pathlib.Path:
        return self.workdir / lab.BACKBONE_FILE

    @property
    def done(self) -> bool:
        return (self.workdir / "grid.json").exists()


def plan(
    workdir: pathlib.Path, rows: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]
) -> list[Run]:
    """The runs of `rows` with `seeds`, those of one seed together.

    Raises:
        UsageError: for arguments that no row takes, or a folder made with others.
    """
    for arg in overrides:
        if re.match(r"--?(config(=|$)|config\.seed\b|workdir\b|dry_run\b)", arg):
            raise UsageError(
                f"After -- come overrides --config.field=value, got {arg!r}; configs, seeds and "
                "work directories of the rows are set here."
            )
    runs = []
    for seed in seeds:
        for row in rows:
            args = (f"--config={CONFIG}:{row}", f"--config.seed={seed}", *overrides)
            config, _ = command_line.parse(["train.py", *args], {}, config_required=True)
            folder = workdir / (row if seed == 0 else f"{row}-seed{seed}")
            if (folder / "config.json").exists():
                lab.check_same_config(folder, config)
            command = (sys.executable, str(TRAIN), f"--workdir={folder}", *args)
            runs.append(Run(row, seed, folder, command, _teacher(config)))
    return runs


def _teacher(config: Mapping[str, Any]) -> str:
    """What the prepared teacher depends on; on the seed only where it is trained first."""
    parts = {name: config[name] for name in ("channel_order", "dtype", "data", "network")}
    seed = None if config["teacher"]["file"] else config["seed"]
    return json.dumps([parts, config["teacher"], seed], sort_keys=True)


def run_all(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Runs what is not done, `jobs` at a time; returns the runs that failed."""
    pending = [run for run in runs if not run.done]
    total, failed = len(pending), []
    if total < len(runs):
        print(f"{len(runs) - total} of {len(runs)} runs are there already", flush=True)
    slots: list[tuple[Run, subprocess.Popen, TextIO, float] | None] = [None] * jobs

    def next_run():
        """The first run that has a teacher, or that can prepare one nobody is preparing."""
        busy = {slot[0].teacher for slot in slots if slot}
        ready = {run.teacher for run in runs if run.backbone.exists()}
        for run in pending:
            if run.teacher in ready or run.teacher not in busy:
                return run
        return None

    try:
        while pending or any(slots):
            for number, slot in enumerate(slots):
                if slot and slot[1].poll() is not None:
                    run, process, log, started = slot
                    log.close()
                    slots[number] = None
                    seconds = format_seconds(time.perf_counter() - started)
                    if process.returncode == 0 and run.done:
                        print(f"{run.name}: done in {seconds}", flush=True)
                    else:
                        failed.append(run)
                        print(
                            f"{run.name}: FAILED after {seconds} with exit status "
                            f"{process.returncode}, see {run.workdir / 'train.log'}",
                            flush=True,
                        )
                if slots[number] is None and (run := next_run()):
                    pending.remove(run)
                    copy_teacher(run, runs)
                    print(f"{run.name}: {total - len(pending)} of {total}", flush=True)
                    slots[number] = start(run, number)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print("stopping; waiting for the runs to save", flush=True)
        for _, process, _, _ in filter(None, slots):
            process.terminate()
        for _, process, log, _ in filter(None, slots):
            process.wait()
            log.close()
        raise command_line.Interrupted("stopped; the same command continues.") from None
    return failed


def copy_teacher(run: Run, runs: Sequence[Run]) -> None:
    """Gives `run` the prepared teacher of another run, where there is one."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    found = [other.backbone for other in runs if other.teacher == run.teacher]
    found = [path for path in found if path.exists()]
    if found and not run.backbone.exists():
        partial = run.backbone.with_name(run.backbone.name + ".partial")
        shutil.copyfile(found[0], partial)
        partial.replace(run.backbone)


def start(run: Run, slot: int) -> tuple[Run, subprocess.Popen, TextIO, float]:
    """Starts train.py on the CPU core of a slot, where the system can pin processes."""
    log = (run.workdir / "train.log").open("a")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if cores:  # the process inherits it
        os.sched_setaffinity(0, {sorted(cores)[slot % len(cores)]})
    try:
        process = subprocess.Popen(
            run.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches it once, from here
        )
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
    return run, process, log, time.perf_counter()


# --- the table -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """What a finished run came to.

    Attributes:
        accuracies: in [0, 1], by width ratio.
        fit_seconds, train_seconds: of all steps at the speed that the run measured, without
            compilation and evaluation; None where it measured none.
        wall_seconds: of the whole of train.py when it last ended; None without a log.
    """

    row: str
    description: str
    seed: int
    split: str
    accuracies: dict[float, float]
    num_inr_params: int
    fit_steps: int
    fit_seconds: float | None
    train_seconds: float | None
    wall_seconds: float | None


def read_record(folder: pathlib.Path, row: str, description: str) -> Record:
    grid = json.loads((folder / "grid.json").read_text())
    config = lab.read_config(folder)
    log = folder / "train.log"
    text = log.read_text() if log.exists() else ""
    return Record(
        row=row,
        description=description,
        seed=config["seed"],
        split=grid["split"],
        accuracies={line["width_ratio"]: line["accuracy"] for line in grid["rows"]},
        num_inr_params=grid["num_inr_params"],
        fit_steps=config["train"]["fit_steps"],
        fit_seconds=_fit_seconds(text),
        train_seconds=_train_seconds(folder, config["train"]),
        wall_seconds=_wall_seconds(text),
    )


def _train_seconds(folder: pathlib.Path, recipe: Mapping[str, Any]) -> float | None:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    sizes = 1 if recipe["share_images"] else 1 + recipe["num_random_sizes"]
    ends: dict[str, tuple[int, float]] = {}  # last step and speed of each phase, in order
    for line in map(json.loads, path.read_text().splitlines()):
        if line["part"] == "inr" and "images_per_second" in line:
            ends[line["phase"]] = line["step"], line["images_per_second"]
    seconds, first = 0.0, 0
    for step, speed in ends.values():
        if speed:  # a fit phase looks at no images
            seconds += (step - first) * recipe["batch_size"] * sizes / speed
        first = step
    return seconds or None


def _fit_seconds(log: str) -> float | None:
    found = re.findall(r"\] fit \| step (\d+)/.*\| ([\d.]+) steps/s", log)
    if not found or not float(found[-1][1]):
        return None
    step, speed = found[-1]
    return int(step) / float(speed)


def _wall_seconds(log: str) -> float | None:
    found = re.findall(r"^done in ([\d:]+)$", log, re.MULTILINE)
    if not found:
        return None
    seconds = 0
    for part in found[-1].split(":"):
        seconds = 60 * seconds + int(part)
    return float(seconds)


def collect(workdir: pathlib.Path, rows: Mapping[str, str]) -> list[Record]:
    """The finished runs in `workdir` of `rows`, descriptions by name; by row, then seed."""
    records = []
    for row, description in rows.items():
        folders = [workdir / row, *workdir.glob(f"{row}-seed*")]
        found = [
            read_record(folder, row, description)
            for folder in folders
            if (folder / "grid.json").exists()
        ]
        records += sorted(found, key=lambda record: record.seed)
    return records


def _width_ratios(records: Sequence[Record]) -> list[float]:
    return sorted({ratio for record in records for ratio in record.accuracies}, reverse=True)


def write_csv(path: pathlib.Path, records: Sequence[Record]) -> None:
    """One line for each row and seed; accuracies in [0, 1]; appears whole or not at all."""
    ratios = _width_ratios(records)
    fields = [field.name for field in dataclasses.fields(Record)]
    position = fields.index("accuracies")
    fields[position : position + 1] = [f"accuracy_{ratio:g}" for ratio in ratios]
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for record in records:
            line = dataclasses.asdict(record)
            accuracies = line.pop("accuracies")
            for name in ("fit_seconds", "train_seconds", "wall_seconds"):
                line[name] = None if line[name] is None else round(line[name], 1)
            line |= {f"accuracy_{r:g}": accuracies[r] for r in ratios if r in accuracies}
            writer.writerow(line)
    partial.replace(path)


def markdown(records: Sequence[Record]) -> str:
    """The table: means over the seeds of a row, accuracies in percent."""
    ratios = _width_ratios(records)
    header = ["row", "", *(f"{r:g}" for r in ratios), "INR parameters", "training s", "seeds"]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for row in dict.fromkeys(record.row for record in records):
        runs = [record for record in records if record.row == row]
        cells = [row, runs[0].description]
        for ratio in ratios:
            found = [run.accuracies[ratio] for run in runs if ratio in run.accuracies]
            cells.append(f"{100 * statistics.mean(found):.1f}" if found else "")
        cells += [f"{runs[0].num_inr_params:,}", _seconds(runs)]
        seeds = ", ".join(str(run.seed) for run in runs)
        cells.append(seeds if len(runs) == 1 else f"{len(runs)} ({seeds})")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(runs: Sequence[Record]) -> str:
    """Mean time of the training steps, the fit's apart; else of the whole run, with a mark."""

    def mean(values):
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known else None

    train = mean(run.train_seconds for run in runs)
    if train is None:
        wall = mean(run.wall_seconds for run in runs)
        return "" if wall is None else f"{wall:.0f} (whole run)"
    if not runs[0].fit_steps:
        return f"{train:.0f}"
    fit = mean(run.fit_seconds for run in runs)
    return f"{train:.0f} + fit {'?' if fit is None else f'{fit:.0f}'}"


def main(argv: Sequence[str]) -> None:
    own, overrides = _split(list(argv[1:]))
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Arguments after -- go to every train.py.",
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="holds all rows")
    parser.add_argument("--rows", default="", help="names with commas between; default all")
    parser.add_argument("--seeds", default="0", help="numbers with commas between; default 0")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument(
        "--table_only", action="store_true", help="make the table of what is there and run nothing"
    )
    args = parser.parse_args(own)

    known = load_rows()
    rows = [row.strip() for row in args.rows.split(",") if row.strip()] or list(known)
    unknown = [row for row in rows if row not in known]
    if unknown:
        raise UsageError(f"--rows must be among {', '.join(known)}, got {', '.join(unknown)}.")
    seeds = args.seeds.split(",")
    if not all(seed.strip().isdigit() for seed in seeds) or args.jobs < 1:
        raise UsageError(
            "--seeds takes whole numbers with commas between and --jobs a number from 1 on, got "
            f"{args.seeds!r} and {args.jobs}."
        )
    rows = list(dict.fromkeys(rows))
    failed = []
    if not args.table_only:
        args.workdir.mkdir(parents=True, exist_ok=True)
        runs = plan(args.workdir, rows, list(dict.fromkeys(map(int, seeds))), overrides)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        failed = run_all(runs, args.jobs)

    records = collect(args.workdir, {row: known[row][0] for row in rows})
    if records:
        write_csv(args.workdir / "ablation.csv", records)
        splits = "/".join(sorted({record.split for record in records}))
        print(f"\ntop-1 in % on the {splits} split by width ratio, means over seeds\n")
        print(markdown(records))
        print(f"\nwrote {args.workdir / 'ablation.csv'}", flush=True)
    elif not failed:
        raise UsageError(f"{args.workdir} must hold finished rows, but has none of these.")
    if failed:
        print(f"failed: {', '.join(run.name for run in failed)}", file=sys.stderr)
        sys.exit(1)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What comes before and after `--`."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


if __name__ == "__main__":
    command_line.run(main)
