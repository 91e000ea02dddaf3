"""Whether a long run slows down or grows: step time, memory and files along 100,000 steps.

    python benchmarks/long_run.py --out=DIR

The loop of train.py, with its metrics, progress and checkpoints, around a step that does next to
nothing, so that what the loop itself costs is all there is to see. Reports the median time from one
step to the next and the mean, saves and logs included, in windows along the run, with the resident
memory, the size of metrics.jsonl and the checkpoints that are kept at their ends; and how long a
start takes to go through the metrics of the whole run. Writes long_run.json to --out.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import experiment as lab, recipes, training
from neumeta_jax.progress import MetricsFile

WINDOW = 1000  # steps
NUM_VALUES = 100_000  # of the state, 400 kB


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run(
    workdir: pathlib.Path, *, num_steps: int, log_every: int, checkpoint_every: int
) -> list[dict[str, Any]]:
    """Runs the loop and returns a row for each window of `WINDOW` steps.

    Args:
        workdir: an empty directory.
        num_steps: of the run, of which the first ten are left out (compilation).
        log_every, checkpoint_every: as in a config.
    """
    images = training.Images(jnp.zeros((64, 1, 1, 1), jnp.uint8), jnp.zeros(64, jnp.int32))

    def update(state, step, key, images, indices):
        del images, indices
        noise = jax.random.normal(jax.random.fold_in(key, step))
        params = jax.tree.map(lambda x: 0.99 * x + 1e-3 * noise, state.params)
        metrics = {"loss": jnp.abs(noise), "grad_norm": jnp.abs(noise)}
        return training.TrainState(params, state.opt_state), metrics

    call = training.chunked(update, images_per_step=4, steps_per_call=1)
    stamps = np.zeros(num_steps)
    rows: list[dict[str, Any]] = []
    metrics = workdir / "metrics.jsonl"

    def timed(state, first, *rest):
        step = int(first)
        stamps[step] = time.perf_counter()
        last = step - 1
        if step > WINDOW and last % WINDOW == 0:
            seconds = np.diff(stamps[max(10, last - WINDOW) : last + 1])
            rows.append(
                {
                    "last_step": last,
                    "median_us": round(1e6 * float(np.median(seconds)), 1),
                    "mean_us": round(1e6 * float(np.mean(seconds)), 1),
                    "resident_mib": round(resident_bytes() / 2**20, 1),
                    "metrics_kib": round(metrics.stat().st_size / 2**10, 1),
                    "checkpoints": len(part.saved.steps()),
                }
            )
        return call(state, first, *rest)

    settings = recipes.Run(log_every=log_every, checkpoint_every=checkpoint_every)
    part = lab.Part(
        lab.Workdir(workdir),
        settings,
        "inr",
        "INR",
        jax.random.key(0),
        images,
        num_steps,
        steps_per_call=1,
    )
    state = training.TrainState({"w": jnp.ones(NUM_VALUES)}, ())
    part.run(
        timed,
        state,
        start=0,
        stop=num_steps,
        images_per_step=4,
        phase="synthetic",
        shown=("loss",),
        state_before=lambda: (0, state),
        locate=lambda *_: "",
    )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="for long_run.json")
    parser.add_argument("--steps", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--log_every", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--checkpoint_every", type=int, default=1000, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.steps < 3 * WINDOW:
        parser.error(f"--steps must be at least {3 * WINDOW}, got {args.steps}.")
    workdir = args.out.absolute() / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    lab.quiet_logging()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        rows = run(
            workdir,
            num_steps=args.steps,
            log_every=args.log_every,
            checkpoint_every=args.checkpoint_every,
        )
    started = time.perf_counter()
    MetricsFile(workdir / "metrics.jsonl").rewind("inr", args.steps)
    document = {
        "steps": args.steps,
        "log_every": args.log_every,
        "checkpoint_every": args.checkpoint_every,
        "windows": rows,
        "rewind_seconds": round(time.perf_counter() - started, 3),
        "versions": lab.versions(),
    }
    (args.out / "long_run.json").write_text(json.dumps(document, indent=1) + "\n")
    print("last step  median us  mean us  resident MiB  metrics KiB  checkpoints")
    for row in (rows[0], rows[1], rows[len(rows) // 2], rows[-2], rows[-1]):
        print("{:>9}  {:>9}  {:>7}  {:>12}  {:>11}  {:>11}".format(*row.values()))
    print(f"a start goes through the metrics in {document['rewind_seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
