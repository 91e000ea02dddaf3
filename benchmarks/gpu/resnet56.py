"""Trains configs/resnet56.py:depth for a given time on a GPU, and leaves what is worth keeping.

    python benchmarks/gpu/throughput.py --out=DIR                 # first: which variant is best
    python benchmarks/gpu/resnet56.py --out=DIR --workdir=RUN --minutes=7.5 -- \\
        --config.data.dir=cifar100.npz --config.teacher.file=cifar100_resnet56-f2eff4c8.pt

Batch size, XLA's flags and the number of epochs follow from DIR/throughput.json: `--minutes` is
what the steps take, compilation and evaluation not counted. DIR then holds the trained INR as
`inr_bfloat16.safetensors` (`saved.save_compact`) and `run.tar.gz` with config, metrics, and
the tables and figures of the test split, read once, by the parameters of that file.

Terms for small sizes and for depth are fitted before the first step, in minutes that `--minutes`
does not count either. They can be made elsewhere: train.py with `--config.train.epochs=0.01`,
`--config.train.depth_epochs=0` and rates of 0 leaves them in DIR/inr.safetensors, from which a run
with `--config.train.init_from=FILE` starts at once.

`--trial=RATE` instead raises the learning rates in a straight line from 0 to RATE for three epochs,
which shows where training becomes unstable.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tarfile

import throughput

KEPT = ("*.json", "*.jsonl", "*.csv", "*.png", "test")
DEPTH_SHARE = 0.2  # of the time, for the phase that trains the depth term alone


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--variant", help="one of throughput.py, default the fastest")
    parser.add_argument("--config", default="configs/resnet56.py:depth")
    parser.add_argument("--trial", type=float)
    parser.add_argument("flags", nargs="*", help="for train.py")
    options = parser.parse_args()

    measured = json.loads((options.out / "throughput.json").read_text())
    rows = {name: row for name, row in measured.items() if name in throughput.VARIANTS}
    rows = {name: row for name, row in rows.items() if "failed" not in row}

    def merit(name):
        """Images a second; twice the batch, with half the steps, must have a quarter more."""
        return rows[name]["images_per_second"] * rows[name]["batch_size"] ** -0.32

    best = options.variant or max(rows, key=merit)
    row, xla_flags = rows[best], throughput.VARIANTS[best][1]
    batch_size = row["batch_size"]

    def epochs(seconds, step_ms):
        return round(seconds / (1e-3 * step_ms) * batch_size / 48_000, 4)

    seconds = 60 * options.minutes
    train = epochs((1 - DEPTH_SHARE) * seconds, row["step_ms"])
    depth = epochs(DEPTH_SHARE * seconds, row["depth_step_ms"])
    flags = [f"--config={options.config}", f"--config.train.batch_size={batch_size}"]
    if options.trial:
        train, depth = 3.0, 0.0
        flags += [
            f"--config.train.warmup_epochs={train}",
            f"--config.train.learning_rate={options.trial}",
            f"--config.train.alpha_learning_rate={options.trial}",
            f"--config.train.learned_learning_rate={options.trial / 2}",
        ]
    flags += [f"--config.train.epochs={train}", f"--config.train.depth_epochs={depth}"]
    flags += [*options.flags, "--config.eval.split=validation", f"--workdir={options.workdir}"]
    print(f"{best}: {train} epochs, {depth} of the depth term", flush=True)

    def run(*command, xla_flags=""):
        environment = throughput.environment(xla_flags)
        command = [sys.executable, *command]
        subprocess.run(command, cwd=throughput.ROOT, env=environment, check=True)

    run("train.py", *flags, xla_flags=xla_flags)
    compact = (options.out / "inr_bfloat16.safetensors").absolute()
    run("-c", throughput.SAVE_COMPACT, str(options.workdir), str(compact))
    if not options.trial:
        # What is tested is what is kept.
        (options.workdir / "inr.safetensors").write_bytes(compact.read_bytes())
        sizes = ["--width_ratios=1,0.9,0.75,0.6,0.5,0.4,0.3,0.25", "--skipped_blocks=0,1,2,3,4"]
        out = f"--out={options.workdir / 'test'}"  # beside the grid of the validation split
        run("eval.py", f"--workdir={options.workdir}", "--split=test", out, *sizes)
    with tarfile.open(options.out / "run.tar.gz", "w:gz") as archive:
        for pattern in KEPT:
            for path in sorted(options.workdir.glob(pattern)):
                archive.add(path, path.relative_to(options.workdir))


if __name__ == "__main__":
    main()
