"""Rows of the comparison at a length that means something, on a GPU, one after the other.

    python benchmarks/gpu/comparison.py --out=DIR --workdir=RUNS \\
        --rows=ours,slimmable_distilled -- \\
        --config.data.dir=cifar100.npz --config.teacher.file=cifar100_resnet20.npz
    python benchmarks/gpu/comparison.py --out=/tmp/t --workdir=/tmp/r --smoke -- ...  # any device

Each row is that of configs/baselines.py with 30 epochs of images, in batches of 256 and at twice
the rates, which are for 32 and 64; `htty` is the papers' recipe, as the papers have it, with 50
epochs of each of its five blocks (configs/resnet20.py:paper). No row begins after `--minutes`; the
same command goes on where one was interrupted. DIR then holds ROW/row.json, the weights of the INRs
(`saved.save_compact`), and the table and figure of `neumeta report`.
"""

import argparse
import pathlib
import runpy
import shutil
import subprocess
import sys
import time

import throughput

EPOCH = 45_000  # training images
EPOCHS = {"htty": 250}
BATCH_SIZE = 256
AS_PUBLISHED = ("htty", "neumeta")  # their batches and rates
RATES = ("learning_rate", "alpha_learning_rate", "learned_learning_rate")


def overrides(row: str, smoke: bool) -> list[str]:
    """What differs from the preset `row`, for `neumeta compare`."""
    config = runpy.run_path(str(throughput.ROOT / "configs/baselines.py"))["get_config"](row)
    epochs = 0.02 if smoke else EPOCHS.get(row, 30)
    flags = [f"--budget={epochs * EPOCH / config.baseline.images}"]
    if smoke:
        flags += ["--config.eval.num_samples=1", "--config.data.num_validation=200"]
    if row in AS_PUBLISHED or smoke:
        return flags
    inr = config.baseline.method == "inr"
    section = "train" if inr else "baseline"
    fields = {name: 2 * config[section][name] for name in (RATES if inr else RATES[:1])}
    fields |= {"batch_size": BATCH_SIZE} | ({"micro_batch": 0} if inr else {})
    return [*flags, *(f"--config.{section}.{name}={value}" for name, value in fields.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--rows", default="ours,slimmable_distilled")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--smoke", action="store_true", help="a fraction of an epoch")
    parser.add_argument("flags", nargs="*", help="for neumeta compare")
    options = parser.parse_args()

    def run(*command):
        environment = throughput.environment("" if options.smoke else throughput.GRAPHS)
        command = [sys.executable, *map(str, command)]
        subprocess.run(command, cwd=throughput.ROOT, env=environment, check=True)

    began = time.monotonic()
    for row in options.rows.split(","):
        if time.monotonic() - began > 60 * options.minutes:
            print(f"{row} and what follows it are left out: {options.minutes} minutes are over")
            break
        workdir, kept = (options.workdir / row).absolute(), (options.out / row).absolute()
        flags = [f"--config=configs/baselines.py:{row}", f"--workdir={workdir}"]
        run("-m", "neumeta_jax", "compare", *flags, *overrides(row, options.smoke), *options.flags)
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(workdir / "row.json", kept)
        if (workdir / "inr.safetensors").exists():
            run("-c", throughput.SAVE_COMPACT, workdir, kept / "inr_bfloat16.safetensors")
    run("-m", "neumeta_jax", "report", options.out.absolute())


if __name__ == "__main__":
    main()
