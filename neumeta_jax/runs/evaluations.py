"""Evaluations of a trained run: what each prints and writes into a folder."""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data import datasets
from neumeta_jax.elastic.widths import check_width_ratio
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import grid, quantize
from neumeta_jax.evaluation.grid import GridRow
from neumeta_jax.files import storage
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.linen import LinenSpec
from neumeta_jax.report import page, plotting, published
from neumeta_jax.runs import checkpoint, experiment as lab

SWEEP_RATIOS = tuple(round(float(ratio), 10) for ratio in np.linspace(0.1, 1.25, 24))


def parse_width_ratios(
    values: Sequence[str] | None, *, flag: str = "--width_ratios"
) -> tuple[float, ...]:
    """Width ratios of a command line's `flag`, checked; empty where none were given."""
    ratios = []
    for value in values or ():
        try:
            ratios.append(float(value))
        except ValueError:
            raise UsageError(f"{flag} takes numbers with commas between, got {value!r}.") from None
    return tuple(map(check_width_ratio, ratios))


def parse_sweep_ratios(figures: bool, values: Sequence[str] | None) -> tuple[float, ...]:
    """Width ratios of the sweep that `--figures` asks for, increasing; empty without it."""
    if values and not figures:
        raise UsageError(
            f"--sweep_ratios needs --figures or --report, got {','.join(values)} without; add one."
        )
    given = parse_width_ratios(values, flag="--sweep_ratios")
    return tuple(sorted(set(given or SWEEP_RATIOS))) if figures else ()


def drawing_range(
    experiment: lab.Experiment, flag: str, instead: str, number: int, seed: int
) -> tuple[float, float]:
    """The trained range, if what `flag` asks for can be drawn from it; else use `instead`."""
    low, high = experiment.trained_range
    if number < 1 or seed < 0:
        raise UsageError(
            f"{flag} must be at least 1 and --seed at least 0, got {number} and {seed}; choose "
            "larger ones."
        )
    if not low < high:
        raise UsageError(
            f"{flag} needs a run that trained more than one width, but its range is {low}..{high}; "
            f"use {instead}."
        )
    return low, high


def draw_width_ratios(experiment: lab.Experiment, number: int, seed: int) -> tuple[float, ...]:
    """`number` width ratios, uniformly from the trained range, increasing."""
    bounds = drawing_range(experiment, "--random_ratios", "--width_ratios", number, seed)
    return tuple(np.sort(np.random.default_rng(seed).uniform(*bounds, number)).tolist())


def make_evaluator(
    experiment: lab.Experiment,
    params: Params,
    splits: datasets.Splits,
    *,
    split: str | None = None,
    num_samples: int | None = None,
    strategy: str = "auto",
) -> grid.Evaluator:
    """An evaluator on a split, by default that of the config, as is the number of samples."""
    split = split or experiment.evaluation.split
    options = {"batch_size": experiment.evaluation.batch_size, "strategy": strategy}
    return grid.Evaluator(
        experiment.hypernetwork,
        params,
        *grid.evaluation_split(splits, split),
        experiment.preprocessing,
        options={**options, **experiment.noise(num_samples or experiment.evaluation.num_samples)},
        split=split,
        comparison=grid.Comparison(),
    )


def _evaluate(
    experiment: lab.Experiment, evaluator: grid.Evaluator, width_ratios: Sequence[float]
) -> list[GridRow]:
    """A row for each ratio; prints the table as it grows."""
    print(grid.TABLE_HEADER, flush=True)
    return evaluator.rows(
        width_ratios,
        trained_range=experiment.trained_range,
        on_row=lambda row: print(grid.format_row(row), flush=True),
    )


def _evaluate_int8(
    experiment: lab.Experiment, evaluator: grid.Evaluator, rows: Sequence[GridRow]
) -> list[GridRow]:
    """`rows` with their `int8_accuracy`; prints both accuracies side by side as they come."""
    print(f"\nweights in 8 bits, a scale for each output channel\n{grid.INT8_TABLE_HEADER}")
    found: list[GridRow] = []

    def on_row(row: GridRow):
        found.append(dataclasses.replace(rows[len(found)], int8_accuracy=row.accuracy))
        print(grid.format_int8_row(found[-1]), flush=True)

    options = {**evaluator.options, "transform": quantize.fake_quantize}
    rounded = dataclasses.replace(evaluator, options=options, known={}, comparison=None)
    ratios = [row.width_ratio for row in rows]
    rounded.rows(ratios, trained_range=experiment.trained_range, on_row=on_row)
    worst = min(row.int8_accuracy - row.accuracy for row in found if row.int8_accuracy is not None)
    print(f"largest loss by 8-bit weights: {max(0.0, -100 * worst):.2f} points")
    return found


def check_free(
    folder: pathlib.Path, planned: Mapping[str, Sequence[Sequence[int]]], **settings: Any
) -> None:
    """Raises ValueError if a file of `folder` would be replaced by another evaluation.

    Args:
        folder: made if it is not there.
        planned: the networks to come, widths of each, by the name of their file without ".json".
        settings: what else the file says about the evaluation, such as its split.
    """
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    for name, networks in planned.items():
        path = folder / f"{name}.json"
        try:
            saved = json.loads(path.read_text("utf-8"))
            there = saved.get("widths") or [row["widths"] for row in saved["rows"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # there is none, or it is damaged
        asked = {**settings, "networks": np.array(networks).tolist()}
        differing = [
            what
            for what, value in asked.items()
            if {**asked, **saved, "networks": there}[what] != value
        ]
        if differing:
            raise UsageError(
                f"{path} holds another evaluation, of other {' and '.join(differing)}, and is not "
                "replaced; give --out=FOLDER for this one, or move the file away."
            )


def _kept_int8(folder: pathlib.Path, rows: Sequence[GridRow]) -> list[GridRow]:
    """`rows` with the 8-bit accuracies that the grid in `folder` has of the same networks."""
    try:
        saved = json.loads((folder / "grid.json").read_text("utf-8"))["rows"]
        known = {(*row["widths"], row["accuracy"]): row.get("int8_accuracy") for row in saved}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        known = {}
    found = [known.get((*row.widths, row.accuracy)) for row in rows]
    return [
        dataclasses.replace(row, int8_accuracy=value) if None not in found else row
        for row, value in zip(rows, found, strict=True)
    ]


def evaluate_and_write(
    workdir: pathlib.Path,
    experiment: lab.Experiment,
    evaluator: grid.Evaluator,
    *,
    width_ratios: Sequence[float],
    sweep_ratios: Sequence[float] = (),
    report: bool = False,
    others: Sequence[GridRow] = (),
    int8: bool = False,
    out: pathlib.Path | None = None,
) -> list[GridRow]:
    """Evaluates the grid, prints the table as it grows, writes grid.json, grid.csv and grid.png.

    With `sweep_ratios`, increasing, it evaluates those too and writes the figures against_macs,
    sweep and weights, each as .png and .csv, and sweep.json; with `report` also report.html, a
    page to look at all of it and at `others`, networks of other depths (see `page`). With `int8`
    the grid is evaluated with 8-bit weights too. All of it goes to the folder `out`, if one is
    given, else to the work directory.
    """
    out = out or workdir
    split, params, num_images = evaluator.split, evaluator.params, len(evaluator.labels)
    low, high = experiment.trained_range
    outside = [ratio for ratio in width_ratios if not low <= ratio <= high]
    print(f"\n{experiment.name}, {split} split, {num_images} images; trained range {low}..{high}")
    started = time.perf_counter()
    rows = _evaluate(experiment, evaluator, width_ratios)
    if outside:
        print(f"note: width ratios {outside} lie outside the trained range")
    rows = _evaluate_int8(experiment, evaluator, rows) if int8 else _kept_int8(out, rows)
    document = {
        "dataset": experiment.name,
        "split": split,
        "trained_range": [low, high],
        "num_samples": evaluator.options["num_samples"],
        "data": experiment.fingerprint,
        "versions": lab.versions(),
    }
    grid.write_grid(
        out,
        rows,
        **document,
        num_inr_params=hyper.num_inr_params(params),
        seconds=round(time.perf_counter() - started, 1),
    )
    figures = {
        "trained_range": experiment.trained_range,
        "teacher_accuracy": _teacher_accuracy(workdir, experiment, evaluator),
    }
    name = f"{experiment.network}, {experiment.name}, {split} split"
    title = f"{name}: every size from one INR"
    plotting.plot_grid(out / "grid.png", rows, title=title, **figures)
    print(f"wrote {out / 'grid.json'}, grid.csv and grid.png")
    if not sweep_ratios:
        return rows

    print(f"\nsweep of {len(sweep_ratios)} widths")
    sweep = _evaluate(experiment, evaluator, sweep_ratios)
    dip = grid.largest_dip(sweep_ratios, [row.accuracy for row in sweep])
    print(_describe_dip(dip))
    found = {"largest_dip": dip.fall, "where": dip.where, **figures}
    storage.write_json(out / "sweep.json", grid.grid_dict(sweep, **{**document, **found}))
    title = f"{name}: accuracy over the width axis"
    plotting.plot_sweep(out / "sweep.png", sweep, title=title, **figures)
    curves, singles = (), ()
    if isinstance(experiment.spec, ResNetSpec):
        curves, singles = published.references(experiment.name, experiment.spec)
    plotting.plot_against_macs(
        out / "against_macs.png",
        rows,
        title=f"{name}: accuracy against multiply-adds",
        curves=curves,
        singles=singles,
    )
    if isinstance(experiment.spec, LinenSpec):
        return rows
    slices = grid.weight_slices(experiment.hypernetwork, params)
    title = f"{experiment.network}, {experiment.name}: what reads {slices.block} at every width"
    plotting.plot_weight_slices(
        out / "weights.png", slices, title=title, trained_range=experiment.trained_range
    )
    print(f"wrote {out / 'sweep.json'}; against_macs, sweep and weights as .png and .csv")
    if report:
        page_document = page.page_document(
            [*rows, *sweep, *others],
            experiment.spec,
            title=f"{experiment.network} on {experiment.name}: every size from one INR",
            subtitle=f"Top-1 accuracy on the {num_images:,} images of the {split} split. The INR "
            f"has {hyper.num_inr_params(params):,} parameters, the full-size network "
            f"{experiment.spec.num_params:,}.",
            **figures,
            slices=slices,
            latency=page.read_latency(workdir / page.LATENCY_FILE),
            config=lab.read_config(workdir),
            versions=lab.versions(),
        )
        page.write_page(out / "report.html", page_document)
        print(f"wrote {out / 'report.html'}; open it in a browser")
    return rows


def evaluate_random_ratios(
    workdir: pathlib.Path,
    experiment: lab.Experiment,
    evaluator: grid.Evaluator,
    ratios: Sequence[float],
) -> list[GridRow]:
    """Evaluates `ratios`, increasing, as drawn by `draw_width_ratios`; writes random_ratios.json.

    The file holds {"ratios", "accuracies" in [0, 1], "widths", "largest_dip" in [0, 1], "where"
    (its ratio or null), "split", "num_samples", "data", "versions"}.
    """
    print(f"\n{len(ratios)} widths at random from the trained range, {evaluator.split} split")
    rows = _evaluate(experiment, evaluator, ratios)
    accuracies = [row.accuracy for row in rows]
    dip = grid.largest_dip(ratios, accuracies)
    print(f"smallest accuracy {100 * min(accuracies):.2f} %; {_describe_dip(dip)}")
    document = {
        "ratios": list(ratios),
        "accuracies": accuracies,
        "widths": [row.widths for row in rows],
        "largest_dip": dip.fall,
        "where": dip.where,
        "split": evaluator.split,
        "num_samples": evaluator.options["num_samples"],
        "data": experiment.fingerprint,
        "versions": lab.versions(),
    }
    storage.write_json(workdir / "random_ratios.json", document)
    print(f"wrote {workdir / 'random_ratios.json'}")
    return rows


def _describe_dip(dip: grid.Dip) -> str:
    if dip.where is None:
        return "no width falls below the line through its neighbours"
    return (
        f"largest fall below the line through the neighbours: {100 * dip.fall:.2f} points at "
        f"width ratio {dip.where:.3f}"
    )


def _teacher_accuracy(workdir, experiment, evaluator) -> float | None:
    path = workdir / lab.BACKBONE_FILE
    if not path.exists():
        return None
    params, _ = checkpoint.load_tree(path)
    found = experiment.in_float32.accuracy(params, evaluator.images, evaluator.labels)
    print(f"teacher (full size, not generated): {100 * found:.2f} %")
    return found
