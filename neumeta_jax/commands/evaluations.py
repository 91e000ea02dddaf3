"""Evaluations of a trained run: what each computes, prints, and writes into a folder.

Each is a function of a `Target` and what to evaluate, and writes a JSON file that no other writes.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data import datasets
from neumeta_jax.errors import check
from neumeta_jax.evaluation import quantize
from neumeta_jax.evaluation.choices import uniform_networks
from neumeta_jax.evaluation.evaluator import Evaluator, evaluation_split
from neumeta_jax.evaluation.morphs import Widths, outside_range
from neumeta_jax.evaluation.rows import (
    COUNTS_HEADER,
    TABLE_HEADER,
    GridRow,
    format_counts,
    format_row,
    largest_dip,
)
from neumeta_jax.files import storage, trees
from neumeta_jax.files.provenance import versions
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.report import page, plotting, published
from neumeta_jax.runs.backbone import BACKBONE_FILE
from neumeta_jax.runs.config import Experiment
from neumeta_jax.runs.workdir import read_config

INT8_HEADER = f"{'ratio':>6}  {'parameters':>10}  {'float32 %':>9}  {'int8 %':>8}  {'change':>8}"


def make_evaluator(
    experiment: Experiment,
    params: Params,
    splits: datasets.Splits,
    *,
    split: str | None = None,
    num_samples: int | None = None,
    **options: Any,
) -> Evaluator:
    """An evaluator on a split, by default that of the config, as is the number of samples.

    `options` are further fields of the `Evaluator`.
    """
    split = split or experiment.evaluation.split
    options = {"batch_size": experiment.evaluation.batch_size, "compare": True, **options}
    return Evaluator(
        experiment.hypernetwork,
        params,
        *evaluation_split(splits, split),
        experiment.preprocessing,
        split=split,
        **experiment.noise(num_samples or experiment.evaluation.num_samples),
        **options,
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """What is evaluated, and the folder `out` that the files go to.

    `workdir` has the run's teacher and what `neumeta latency` measured.
    """

    workdir: pathlib.Path
    out: pathlib.Path
    experiment: Experiment
    evaluator: Evaluator

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, beside the networks."""
        named = {name: getattr(self.evaluator, name) for name in ("split", "num_samples")}
        return {**named, "data": self.experiment.fingerprint}

    @property
    def title(self) -> str:
        experiment = self.experiment
        return f"{experiment.network}, {experiment.name}, {self.evaluator.split} split"

    @property
    def teacher_may_have_seen(self) -> bool:
        """Whether a network that the run began with may have been trained on the images."""
        origin = self.experiment.teacher.file or self.experiment.recipe.init_from
        return self.evaluator.split == "validation" and bool(origin)

    @property
    def caption(self) -> str:
        """What has to be said beside the accuracies."""
        seen = {"seed": self.experiment.run.seed, "imported": self.teacher_may_have_seen}
        return plotting.caveats(self.evaluator.split, len(self.evaluator.labels), **seen)

    @functools.cached_property
    def teacher_accuracy(self) -> float | None:
        """In [0, 1], in float32; None where the work directory has no teacher."""
        path = self.workdir / BACKBONE_FILE
        if not path.exists():
            return None
        params, _ = trees.load_tree(path)
        data = self.evaluator.images, self.evaluator.labels
        found = self.experiment.in_float32.accuracy(params, *data)
        print(f"teacher (full size, not generated): {100 * found:.2f} %")
        return found

    @functools.cached_property
    def int8(self) -> "Target":
        """The same with weights rounded to 8 bits."""
        rounded = {"transform": quantize.fake_quantize, "compare": False}
        evaluator = dataclasses.replace(self.evaluator, **rounded)
        return dataclasses.replace(self, evaluator=evaluator)

    def announce(self, what: str) -> None:
        low, high = self.experiment.trained_range
        split, number = self.evaluator.split, len(self.evaluator.labels)
        print(f"\n{what}, {split} split, {number} images; trained range {low}..{high}", flush=True)
        if self.teacher_may_have_seen:
            print("note: the network that the run began with may have been trained on these images")

    def rows(self, width_ratios: Sequence[float]) -> Iterator[GridRow]:
        return self.evaluator.rows(width_ratios, self.experiment.trained_range)

    def table(self, width_ratios: Sequence[float]) -> list[GridRow]:
        """A row for each ratio; prints them as they come."""
        print(TABLE_HEADER, flush=True)
        rows = []
        for row in self.rows(width_ratios):
            print(format_row(row), flush=True)
            rows.append(row)
        return rows

    def facts(
        self, widths: Sequence[Widths], beside: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """What is known of each network, with what `beside` says of it."""
        family, recipe = self.experiment.hypernetwork, self.experiment.recipe
        return [
            {**some, **facts, "trained": not outside_range(family, recipe, facts["widths"])}
            for some, facts in zip(beside, self.evaluator.facts(widths), strict=True)
        ]

    def save(self, name: str, rows: Sequence[Any], *, csv: bool = False, **more: Any) -> None:
        """Writes `name`.json: `rows`, `more`, and what the numbers depend on."""
        rows = [row.to_dict() if isinstance(row, GridRow) else row for row in rows]
        document = {
            "dataset": self.experiment.name,
            "trained_range": self.experiment.trained_range,
            "teacher_may_have_seen": self.teacher_may_have_seen,
            **self.settings,
            "versions": versions(),
            **more,
            "rows": rows,
        }
        storage.write_json(self.out / f"{name}.json", document)
        if csv:
            storage.write_csv(self.out / f"{name}.csv", storage.as_table(rows))


class Entry(NamedTuple):
    """An evaluation: the name of its JSON file, the networks in it, what writes it, and of what."""

    name: str
    networks: Sequence[Widths]
    write: Callable[..., None]
    arguments: tuple = ()


def evaluate(target: Target, entries: Sequence[Entry]) -> None:
    """All of `entries`, after a check that none replaces a file of another evaluation."""
    planned = {entry.name: entry.networks for entry in entries}
    check_free(target.out, planned, **target.settings)
    for entry in entries:
        entry.write(target, *entry.arguments)


def check_free(
    folder: pathlib.Path, planned: Mapping[str, Sequence[Sequence[int]]], **settings: Any
) -> None:
    """Raises UsageError if a file of `folder` would be replaced by another evaluation.

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
        found = {**asked, **saved, "networks": there}
        differing = " and ".join(what for what, value in asked.items() if found[what] != value)
        check(
            not differing,
            f"{path} holds another evaluation, of other {differing}, and is not replaced; give "
            "--out=FOLDER for this one, or move the file away.",
        )


def write_grid(target: Target, width_ratios: Sequence[float]) -> None:
    """Networks of a few width ratios: grid.json, .csv and .png."""
    started = time.perf_counter()
    target.announce(target.experiment.name)
    rows = target.table(width_ratios)
    if outside := [row.width_ratio for row in rows if not row.trained]:
        print(f"note: width ratios {outside} lie outside the trained range")
    seconds = round(time.perf_counter() - started, 1)
    number = hyper.num_inr_params(target.evaluator.params)
    target.save("grid", rows, csv=True, num_inr_params=number, seconds=seconds)
    plotting.plot_grid(
        target.out / "grid.png",
        rows,
        title=f"{target.title}: every size from one INR",
        trained_range=target.experiment.trained_range,
        teacher_accuracy=target.teacher_accuracy,
        caption=target.caption,
    )
    print(f"wrote {target.out / 'grid.json'}, grid.csv and grid.png")


def _with_int8(target: Target, width_ratios: Sequence[float]) -> Iterator[GridRow]:
    both = zip(target.rows(width_ratios), target.int8.rows(width_ratios), strict=True)
    for row, rounded in both:
        yield dataclasses.replace(row, int8_accuracy=rounded.accuracy)


def write_int8(target: Target, width_ratios: Sequence[float]) -> None:
    """The grid with weights in 8 bits beside float32: int8.json and .csv."""
    target.announce("weights in 8 bits, a scale for each output channel")
    print(INT8_HEADER, flush=True)
    rows, lost = [], 0.0
    for row in _with_int8(target, width_ratios):
        exact, rounded = 100 * row.accuracy, 100 * (row.int8_accuracy or 0.0)
        numbers = f"{exact:>9.2f}  {rounded:>8.2f}  {rounded - exact:>+8.2f}"
        print(f"{row.width_ratio:6.3f}  {row.num_params:>10,}  {numbers}", flush=True)
        rows.append(row)
        lost = max(lost, exact - rounded)
    print(f"largest loss by 8-bit weights: {lost:.2f} points")
    target.save("int8", rows, csv=True)
    print(f"wrote {target.out / 'int8.json'} and int8.csv")


def _along_axis(target: Target, name: str, ratios: Sequence[float], what: str) -> list[GridRow]:
    """Increasing `ratios`, and where accuracy falls between them: `name`.json."""
    target.announce(what)
    rows = target.table(ratios)
    dip = largest_dip(ratios, [row.accuracy for row in rows])
    print(f"smallest accuracy {100 * min(row.accuracy for row in rows):.2f} %; {dip}")
    found = {"teacher_accuracy": target.teacher_accuracy, "largest_dip": dip.fall}
    target.save(name, rows, where=dip.where, **found)
    return rows


def write_sweep(
    target: Target, width_ratios: Sequence[float], sweep_ratios: Sequence[float]
) -> None:
    """A sweep of the width axis, sweep.json; figures sweep and against_macs, with .csv."""
    experiment, out = target.experiment, target.out
    what = f"sweep of {len(sweep_ratios)} widths"
    rows = _along_axis(target, "sweep", sweep_ratios, what)
    plotting.plot_sweep(
        out / "sweep.png",
        rows,
        title=f"{target.title}: accuracy over the width axis",
        trained_range=experiment.trained_range,
        teacher_accuracy=target.teacher_accuracy,
        caption=target.caption,
    )
    curves, singles = (), ()
    if isinstance(experiment.spec, ResNetSpec):
        curves, singles = published.references(experiment.name, experiment.spec)
    plotting.plot_against_macs(
        out / "against_macs.png",
        list(target.rows(width_ratios)),
        title=f"{target.title}: accuracy against multiply-adds",
        curves=curves,
        singles=singles,
        caption=target.caption,
    )
    print(f"wrote {out / 'sweep.json'}; sweep and against_macs as .png and .csv")


def write_random_ratios(target: Target, ratios: Sequence[float]) -> None:
    """Those of `draw_width_ratios`: random_ratios.json."""
    _along_axis(target, "random_ratios", ratios, f"{len(ratios)} widths at random")
    print(f"wrote {target.out / 'random_ratios.json'}")


def write_specs(target: Target, networks: Mapping[str, Widths]) -> None:
    """Networks that files name, widths by file: specs.json and .csv."""
    target.announce(target.experiment.name)
    rows = target.facts(list(networks.values()), [{"spec": path} for path in networks])
    print(f"{COUNTS_HEADER}    widths, file")
    for row in rows:
        counts = format_counts(row).ljust(len(COUNTS_HEADER) + 2)
        print(f"{counts}  {','.join(map(str, row['widths']))}, {row['spec']}")
    target.save("specs", rows, csv=True)
    print(f"wrote {target.out / 'specs.json'} and specs.csv")


def _depth_rows(
    target: Target, networks: Mapping[tuple[int, float], Widths]
) -> list[dict[str, Any]]:
    layers = target.experiment.hypernetwork.num_layers
    beside = [
        {"skipped_blocks": number, "num_layers": layers(widths), "width_ratio": ratio}
        for (number, ratio), widths in networks.items()
    ]
    return target.facts(list(networks.values()), beside)


def write_depths(target: Target, networks: Mapping[tuple[int, float], Widths]) -> None:
    """Those of `depth_networks`: depths.json, .csv and a heat map."""
    target.announce("width and depth")
    rows = _depth_rows(target, networks)
    print(f"{'skipped':>7}  {'layers':>6}  {'ratio':>6}  {COUNTS_HEADER}")
    for row in rows:
        cell = f"{row['skipped_blocks']:>7}  {row['num_layers']:>6}  {row['width_ratio']:6.3f}"
        print(f"{cell}  {format_counts(row)}")
    target.save("depths", rows)
    title = f"{target.title}: top-1 accuracy (%)"
    plotting.plot_depths(target.out / "depths.png", rows, title=title, caption=target.caption)
    print(f"wrote {target.out / 'depths.json'}, depths.csv and depths.png")


def above_uniform(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Accuracies minus those that uniform networks of as many multiply-adds have.

    `rows` have "series", "num_macs" and "accuracy"; those of the series "uniform" are the points of
    a curve that is straight between them, and get 0 where no two of them cost the same.
    """
    uniform = sorted(
        (row["num_macs"], row["accuracy"]) for row in rows if row["series"] == "uniform"
    )
    on_curve = np.interp([row["num_macs"] for row in rows], *np.transpose(uniform))
    return np.array([row["accuracy"] for row in rows]) - on_curve


def write_random_networks(target: Target, drawn: Sequence[Widths]) -> None:
    """Those of `draw_networks` beside uniform ones: random_networks.json, .csv and .png."""
    target.announce(f"{len(drawn)} networks with a random width in each block")
    experiment, alone = target.experiment, dataclasses.replace(target.evaluator, compare=False)
    target = dataclasses.replace(target, evaluator=alone)
    uniform = uniform_networks(experiment.hypernetwork, experiment.trained_range)
    series = [{"series": "uniform"}] * len(uniform) + [{"series": "random"}] * len(drawn)
    rows = target.facts([*uniform, *drawn], series)
    differences = above_uniform(rows)
    for row, difference in zip(rows, differences.tolist(), strict=True):
        row["difference"] = difference
    each = np.sort(differences[len(uniform) :])
    found: dict[str, Any] = {
        "mean_difference": float(each.mean()),
        "worst_difference": float(each[0]),
        "best_tenth_difference": float(each[-max(1, round(len(each) / 10)) :].mean()),
    }
    mean, worst, best = (f"{100 * value:+.2f}" for value in found.values())
    print(
        f"against uniform networks of the same multiply-adds: mean {mean} points, worst {worst}, "
        f"best tenth {best}"
    )
    target.save("random_networks", rows, **found)
    path = target.out / "random_networks.png"
    title = f"{target.title}: widths at random"
    plotting.plot_random_networks(path, rows, title=title, caption=target.caption)
    print(f"wrote {path.with_suffix('.json')}, random_networks.csv and random_networks.png")


def write_report(
    target: Target,
    width_ratios: Sequence[float],
    sweep_ratios: Sequence[float],
    depths: Mapping[tuple[int, float], Widths],
    int8: bool,
) -> None:
    """report.html, a page to look at what the others evaluate."""
    experiment, evaluator = target.experiment, target.evaluator
    rows = list(_with_int8(target, width_ratios) if int8 else target.rows(width_ratios))
    rows += target.rows(sweep_ratios)
    rows += map(GridRow.from_dict, _depth_rows(target, depths))
    document = page.page_document(
        rows,
        experiment.hypernetwork,
        heading=(
            f"{experiment.network} on {experiment.name}: every size from one INR",
            f"Top-1 accuracy on {target.caption} The INR has "
            f"{hyper.num_inr_params(evaluator.params):,} parameters, the full-size network "
            f"{experiment.spec.num_params:,}.",
        ),
        trained_range=experiment.trained_range,
        teacher_accuracy=target.teacher_accuracy,
        latency=page.read_latency(target.workdir / page.LATENCY_FILE),
        about={"config": read_config(target.workdir), "versions": versions()},
    )
    page.write_page(target.out / "report.html", document)
    print(f"wrote {target.out / 'report.html'}; open it in a browser")
