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
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from neumeta_jax.files import storage
from neumeta_jax.files.provenance import file_digest

ROOT = pathlib.Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.001
FILES = ("backbone.safetensors", "inr.safetensors")


class Run:
    """train.py as a process of its own; what it prints is appended to a log."""

    def __init__(self, workdir: pathlib.Path, arguments: Sequence[str]):
        self.workdir, self.started = workdir, time.monotonic()
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

    def kill(self, ready: Callable[[], bool]) -> str:
        """Kills it once it is `ready`, and returns where it was; "" if it ended before."""
        if not self.wait_until(ready):
            return ""
        self.process.kill()
        if self.process.wait() != -signal.SIGKILL:
            return ""
        return self.position() + (", inside a save" if self.saves() else "")

    def position(self) -> str:
        """Part and step of the last line of metrics.jsonl."""
        try:
            line = json.loads((self.workdir / "metrics.jsonl").read_text().splitlines()[-1])
        except (FileNotFoundError, IndexError, ValueError):
            return "before the first line of metrics"
        return f"after the line of {line['part']} step {line['step']}"

    def finish(self) -> None:
        """Waits for its end, which must be a good one."""
        if self.process.wait():
            raise SystemExit(f"train.py failed with {self.process.returncode}; see {self.log}.")


def result(workdir: pathlib.Path) -> dict[str, Any]:
    """All of a finished run that no interruption may change."""
    found: dict[str, Any] = {name: file_digest(workdir / name) for name in FILES}
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


def moment(run: Run, rng: np.random.Generator, seconds: float, in_save: bool) -> Callable[[], bool]:
    """Whether a moment drawn at random has come: within `seconds`, or inside one of three saves."""
    if in_save:
        seen: set[tuple[str, int]] = set()
        number = int(rng.integers(1, 4))

        def inside():
            seen.update(run.saves())
            return len(seen) >= number

        return inside
    run.wait_until(run.opened)
    stop = time.monotonic() + rng.uniform(0, seconds)
    return lambda: time.monotonic() >= stop


def interrupt(
    workdir: pathlib.Path,
    arguments: Sequence[str],
    *,
    kills: Sequence[bool],
    seconds: float,
    seed: int,
) -> Iterator[str]:
    """Kills a run at random, then lets it end; yields where it was, "" whenever it has ended.

    Args:
        workdir: of the run; deleted before it is begun and each time that it has ended.
        arguments: of train.py, beside --workdir.
        kills: which are to be inside a save, in an order that is drawn.
        seconds: how long such a run lasts once it has opened its directory.
        seed: of all that is random.
    """
    rng = np.random.default_rng(seed)
    waiting = rng.permutation(kills).tolist()
    shutil.rmtree(workdir, ignore_errors=True)
    while True:
        run = Run(workdir, arguments)
        place = run.kill(moment(run, rng, seconds, waiting[0])) if waiting else ""
        if place:
            waiting.pop(0)
            yield place
            continue
        run.finish()
        yield ""
        if not waiting:
            return
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
    seconds, wanted = time.monotonic() - opened, result(out / "reference")
    print(f"reference: {seconds:.1f} s after it opened its directory", flush=True)

    places, compared = [], []
    kills = [number < saves for number in range(args.kills)]
    options = {"kills": kills, "seconds": seconds, "seed": args.seed}
    for place in interrupt(out / "interrupted", arguments, **options):
        if place:
            places.append(place)
            print(f"kill {len(places)} of {args.kills}: {place}", flush=True)
        else:
            compared.append(differences(result(out / "interrupted"), wanted))
            print(f"run {len(compared)} ended; different: {compared[-1] or 'nothing'}", flush=True)
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
    storage.write_json(out / "interruptions.json", document)
    inside = sum(place.endswith("save") for place in places)
    verdict = "all runs ended with the same bits" if same else f"runs differ: {compared}"
    print(f"{len(places)} kills, {inside} of them inside a save, {len(compared)} runs: {verdict}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
