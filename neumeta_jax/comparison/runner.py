"""Runs a row of the comparison: trains its families, reads each split once, writes row.json."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from neumeta_jax.comparison import individual, inr, pruning, slimmable
from neumeta_jax.comparison.baseline import Baseline, within_budget
from neumeta_jax.comparison.run import Family, Run
from neumeta_jax.errors import check
from neumeta_jax.evaluation import evaluator, timing
from neumeta_jax.files import provenance, storage
from neumeta_jax.files.provenance import format_seconds
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.report.comparisons import ROW_FILE, Row
from neumeta_jax.runs import recipes
from neumeta_jax.runs.backbone import check_teacher
from neumeta_jax.runs.config import from_config, load_data
from neumeta_jax.runs.plan import check_start, check_steps
from neumeta_jax.runs.workdir import open_workdir

SPLITS = ("validation", "test")
_SHORT_SECONDS = 5.0  # a change of size that is faster is timed again, without compilation


def families(run: Run) -> Iterator[tuple[str, str, Family]]:
    """(folder in the work directory, variant, family) of each row that a run makes."""
    if run.baseline.method == "pruning":
        yield from pruning.families(run)
        return
    make: Callable[[Run], Family] = {
        "individual": individual.family,
        "pruning_finetuned": individual.family,
        "slimmable": slimmable.switchable,
        "universally_slimmable": slimmable.universal,
        "inr": inr.family,
    }[run.baseline.method]
    yield "", run.baseline.variant, make(run)


def measure(
    run: Run, family: Family, known: dict[float, dict[str, float]], splits: Sequence[str] = SPLITS
) -> tuple[list[dict[str, Any]], float]:
    """(a line for each size with its accuracies in percent, seconds of a change of size).

    `known` has the accuracies by split of what is the teacher in all families of a run, by ratio.
    """
    lines, seconds = [], []
    for ratio in run.baseline.width_ratios:
        for _ in range(2):
            last, (spec, params) = timing.timed(family.network, ratio)
            if last > _SHORT_SECONDS:
                break
        seconds.append(last)
        found = known.get(ratio) or {}
        for split in splits[len(found) :]:
            data = evaluator.evaluation_split(run.splits, split)
            accuracy = run.experiment.accuracy(params, *data, cifar_resnet.Network(spec))
            found[split] = round(100 * accuracy, 4)
        if ratio == 1 and ratio in family.kept_as_is:
            known[ratio] = found
        line = {
            "width_ratio": ratio,
            "compression": round(100 * (1 - ratio), 6),
            "widths": run.family.widths(ratio).tolist(),
            "num_params": spec.num_params,
            "num_macs": spec.num_macs,
            "images": 0 if ratio in family.kept_as_is else run.cost.images,
            **found,
        }
        accuracies = "".join(f"   {split} {line[split]:6.2f} %" for split in splits)
        counts = f"{spec.num_params:>9,} parameters {spec.num_macs / 1e6:7.2f} M multiply-adds"
        print(f"width {ratio:<5} {counts}{accuracies}", flush=True)
        lines.append(line)
    return lines, float(np.median(seconds))


def row(run: Run, family: Family, **fields: Any) -> Row:
    """The row of a family, the measured `fields` among its own."""
    baseline, experiment, cost = run.baseline, run.experiment, run.cost
    source, versions = provenance.checkout(), provenance.versions()
    commit = source["commit"] and source["commit"][:10] + " with changes" * bool(source["changed"])
    return Row(
        method=baseline.title,
        source=baseline.source,
        seed=experiment.run.seed,
        dataset=experiment.name,
        network=f"ResNet{experiment.spec.depth}",
        teacher=pathlib.PurePath(experiment.teacher.file).name or None,
        budget_images=baseline.images,
        network_passes=cost.network_passes,
        teacher_passes=cost.teacher_passes,
        training_macs=cost.macs,
        calibration_images=family.calibration_images,
        storage_bytes=family.storage_bytes,
        continuous=family.continuous,
        switch_images=family.switch_images,
        commit=commit,
        device=f"{versions.pop('devices')}, {provenance.num_cores()} CPU cores",
        versions=versions,
        **fields,
    )


@contextlib.contextmanager
def _clock(path: pathlib.Path) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds so far, those of interrupted runs included."""
    started = time.perf_counter()
    with contextlib.suppress(OSError, ValueError):
        started -= float(path.read_text())
    try:
        yield lambda: time.perf_counter() - started
    finally:
        with contextlib.suppress(OSError):
            storage.write_text(path, f"{time.perf_counter() - started:.1f}\n")


def compare(
    config: Mapping[str, Any], workdir: str, *, budget: float, trial: bool, command: str
) -> None:
    """Makes the row of `config` in `workdir`, or goes on with it; `command` is for row.json.

    A `trial` leaves the test images alone and writes no row.
    """
    section = config.get("baseline")
    missing = "The config must have a section baseline; use configs/baselines.py."
    check(isinstance(section, Mapping), missing)
    baseline = recipes.from_fields(Baseline, config["baseline"], "baseline")
    check(
        config["teacher"]["file"] or not baseline.needs_teacher,
        f"{baseline.title!r} starts from or learns from a teacher; give one with "
        "--config.teacher.file=FILE.",
    )
    dataset, splits = load_data(config)
    config = within_budget(config, budget, len(splits.train_labels))
    baseline = dataclasses.replace(baseline, images=config["baseline"]["images"])
    experiment = from_config(config, dataset)
    check(
        isinstance(experiment.spec, ResNetSpec),
        "Methods are compared on CIFAR ResNets; leave network.factory empty.",
    )
    read = SPLITS[: 1 if trial else 2]
    for split in read:
        evaluator.evaluation_split(splits, split)
    if baseline.method == "inr":
        check_start(experiment, splits, workdir)
    else:
        check_steps(len(splits.train_labels), baseline=baseline.batch_size)
        check_teacher(experiment, workdir)
    sizes = f"{len(baseline.width_ratios)} sizes of a ResNet{experiment.spec.depth}"
    print(f"{baseline.title}: {baseline.images} images for {sizes}", flush=True)
    with (
        open_workdir(workdir, config, experiment.fingerprint) as opened,
        _clock(opened.path / "seconds") as elapsed,
    ):
        run, known, before = Run(opened, experiment, baseline, splits), {}, 0.0
        for folder, variant, family in families(run):
            print(f"\n{baseline.title}{variant and ', '}{variant}", flush=True)
            lines, seconds = measure(run, family, known, read)
            if trial:
                continue
            fields = {"variant": variant, "sizes": lines, "command": command}
            fields["switch_seconds"] = round(seconds, 4)
            fields["wall_seconds"] = round(elapsed() - before, 1)
            path = opened.path / folder / ROW_FILE
            path.parent.mkdir(exist_ok=True)
            storage.write_json(path, dataclasses.asdict(row(run, family, **fields)))
            print(f"wrote {path}", flush=True)
            before = elapsed()
            opened.check_stop(0)
        print(f"done in {format_seconds(elapsed())}")
