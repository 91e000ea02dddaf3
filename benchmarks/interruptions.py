"""Kills a run at random moments and compares its end with that of a run that was left alone.

    python benchmarks/interruptions.py --kills=20 --out=DIR
    python benchmarks/interruptions.py --kills=4 --saves=1 --out=DIR --config=configs/digits.py

Runs train.py to its end once, in DIR/reference, and then, in DIR/interrupted, kills it (SIGKILL) at
a random moment of its life and starts it again until it has been killed --kills times; --saves of
these kills fall into the save of a checkpoint. A run that ends before it is killed is compared and
begun anew. What must be the same, bit for bit: backbone.safetensors, inr.safetensors, the rows of
grid.json, and metrics.jsonl but for images per second, so that no step is missing or there twice.

Further flags go to train.py; without --config it is given --config=configs/digits.py:smoke. Ends
with status 0 if all is the same, else with 1; writes interruptions.json to DIR.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.001
FILES = ("backbone.safetensors", "inr.safetensors")


class Run:
    """train.py as a process of its own; what it prints is appended to a log."""

    def __init__(self, workdir: pathlib.Path, arguments: Sequence[str]):
        self.workdir = workdir
        self.started = time.monotonic()
        self.log = workdir.with_name(f"{workdir.name}.log")
        # The lock file tells when the run has opened its directory; an old one would not.
        (workdir / "lock").unlink(missing_ok=True)
        self.left_over = self._partial_checkpoints()
        with self.log.open("a") as log:
            command = [sys.executable, "train.py", f"--workdir={workdir}", *arguments]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """True as soon as `condition` holds; False if the run ends before."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def opened(self) -> bool:
        return (self.workdir / "lock").exists()

    def _partial_checkpoints(self) -> set[tuple[str, int]]:
        """Names and inodes of what orbax has begun to write and not yet renamed."""
        found = set()
        for path in (self.workdir / "checkpoints").glob("*/*tmp*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((str(path), path.stat().st_ino))
        return found

    def saves(self) -> set[tuple[str, int]]:
        """Checkpoints that this process is writing at this moment, or was when it was killed."""
        return self._partial_checkpoints() - self.left_over

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> float:
        """Seconds from the start to the end, which must be a good one."""
        if self.process.wait():
            raise SystemExit(f"train.py failed with {self.process.returncode}; see {self.log}.")
        return time.monotonic() - self.started


def position(workdir: pathlib.Path) -> str:
    """Part and step of the last line of metrics.jsonl."""
    try:
        line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    except (FileNotFoundError, IndexError, ValueError):
        return "before the first line of metrics"
    return f"after the line of {line['part']} step {line['step']}"


def kill_at_random(run: Run, rng: np.random.Generator, seconds: float, *, in_save: bool) -> str:
    """Kills `run` and returns where it was; "" if it ended before.

    Args:
        run: just started.
        rng: chooses the moment.
        seconds: how long such a run lasts once it has opened its directory.
        in_save: whether to kill it inside one of its next saves.
    """
    if in_save:
        seen: set[tuple[str, int]] = set()
        pending = int(rng.integers(1, 4))

        def in_the_chosen_save():
            nonlocal pending
            new = run.saves() - seen
            seen.update(new)
            pending -= len(new)
            return pending <= 0

        if not run.wait_until(in_the_chosen_save):
            return ""
    else:
        run.wait_until(run.opened)
        stop = time.monotonic() + rng.uniform(0, seconds)
        if not run.wait_until(lambda: time.monotonic() >= stop):
            return ""
    run.kill()
    if run.process.returncode != -signal.SIGKILL:
        return ""
    saving = ", inside a save" if run.saves() else ""
    return position(run.workdir) + saving


def result(workdir: pathlib.Path) -> dict[str, Any]:
    """All of a finished run that no interruption may change."""
    found: dict[str, Any] = {}
    for name in FILES:
        found[name] = hashlib.sha256((workdir / name).read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in x.items() if k != "images_per_second"} for x in lines]
    found["grid"] = json.loads((workdir / "grid.json").read_text())["rows"]
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of what differs, and of parts of the run whose steps do not count upwards."""
    differing = [name for name, value in wanted.items() if found[name] != value]
    for part in dict.fromkeys(line["part"] for line in found["metrics"]):
        steps = [line["step"] for line in found["metrics"] if line["part"] == part]
        if steps != sorted(set(steps)):
            differing.append(f"steps of {part}")
    return differing


def interrupt(
    workdir: pathlib.Path,
    arguments: Sequence[str],
    *,
    kills: int,
    saves: int,
    seconds: float,
    seed: int = 0,
    on_end: Callable[[pathlib.Path], None],
) -> list[str]:
    """Kills a run `kills` times, then lets it end; returns where it was each time.

    Args:
        workdir: of the run; deleted before it is begun and each time that it has ended.
        arguments: of train.py, beside --workdir.
        kills: how often; `saves` of them inside a save, at random places of the sequence.
        seconds: see `kill_at_random`.
        seed: of all that is random.
        on_end: called with the directory of each run that has ended.
    """
    rng = np.random.default_rng(seed)
    in_saves = rng.permutation(np.arange(kills) < saves)
    places: list[str] = []
    shutil.rmtree(workdir, ignore_errors=True)
    while True:
        run = Run(workdir, arguments)
        if len(places) == kills:
            run.finish()
            on_end(workdir)
            return places
        place = kill_at_random(run, rng, seconds, in_save=bool(in_saves[len(places)]))
        if place:
            places.append(place)
            print(f"kill {len(places)} of {kills}: {place}", flush=True)
        else:
            run.finish()
            on_end(workdir)
            shutil.rmtree(workdir)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Further flags go to train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--saves", type=int, help="of them inside a save; default: a quarter")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args, arguments = parser.parse_known_args(argv)
    saves = args.kills // 4 if args.saves is None else args.saves
    if not 0 <= saves <= args.kills:
        parser.error(f"--saves must lie between 0 and --kills, got {saves} and {args.kills}.")
    if not any(argument.startswith("--config=") for argument in arguments):
        arguments.insert(0, "--config=configs/digits.py:smoke")
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    shutil.rmtree(out / "reference", ignore_errors=True)
    run = Run(out / "reference", arguments)
    run.wait_until(run.opened)
    opened = time.monotonic()
    run.finish()
    seconds = time.monotonic() - opened
    wanted = result(out / "reference")
    print(f"reference: {seconds:.1f} s after it opened its directory", flush=True)

    compared: list[list[str]] = []

    def compare(workdir):
        compared.append(differences(result(workdir), wanted))
        print(f"run {len(compared)} ended; different: {compared[-1] or 'nothing'}", flush=True)

    places = interrupt(
        out / "interrupted",
        arguments,
        kills=args.kills,
        saves=saves,
        seconds=seconds,
        seed=args.seed,
        on_end=compare,
    )
    same = not any(compared)
    document = {
        "date": datetime.date.today().isoformat(),
        "arguments": arguments,
        "seed": args.seed,
        "kills": places,
        "different": compared,
        "sha256": {name: wanted[name] for name in FILES},
        "lines_of_metrics": len(wanted["metrics"]),
        "seconds": round(time.monotonic() - began, 1),
        "versions": json.loads((out / "reference" / "versions.json").read_text()),
    }
    (out / "interruptions.json").write_text(json.dumps(document, indent=1) + "\n")
    inside = sum(place.endswith("save") for place in places)
    verdict = "all runs ended with the same bits" if same else f"runs differ: {compared}"
    print(f"{len(places)} kills, {inside} of them inside a save, {len(compared)} runs: {verdict}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
