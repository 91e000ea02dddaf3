"""Networks whose blocks have widths of their own: the files that name them, their accuracy."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from neumeta_jax.elastic.widths import MAX_WIDTH_RATIO
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import grid
from neumeta_jax.files import storage
from neumeta_jax.networks.families import Family
from neumeta_jax.report import plotting
from neumeta_jax.runs import evaluations, experiment as lab, training

Widths = tuple[int, ...]


def morph_to_dict(hypernetwork: Family, widths: Sequence[int]) -> dict[str, Any]:
    """One network of a family as plain JSON types, for `--spec=FILE`.

    Returns:
        {"widths": channels of each elastic group (0 = skipped), and what `describe` of the
        hypernetwork says, which tells whose widths these are}.
    """
    return {"widths": [int(width) for width in widths], **hypernetwork.describe()}


def load_morph(path: str | os.PathLike, hypernetwork: Family) -> tuple[int, ...]:
    """The widths in a JSON file of `morph_to_dict`, checked against the family.

    A file written by hand needs {"widths": [...]} alone. Other fields than the three are left
    alone, so that a search can note what it found.

    Raises:
        ValueError: if there is no such file, or it is damaged or belongs to another family.
    """
    try:
        fields = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--spec={path} must be a file, but {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} must be JSON, but it is damaged; write it again.") from None
    if not isinstance(fields, dict) or "widths" not in fields:
        raise UsageError(
            f'{path} must hold one network as {{"widths": [...]}}, hidden channels of each block, '
            "but it has no widths; add them."
        )
    wanted = morph_to_dict(hypernetwork, ())
    fields = {**wanted, **fields}
    if differing := _first_difference(fields, hypernetwork.describe()):
        raise UsageError(
            f"{path} must belong to this run's architecture, but it is of another one ({differing})"
            "; use the work directory that it was made with."
        )
    widths = fields["widths"]
    if not isinstance(widths, list) or any(type(width) is not int for width in widths):
        raise UsageError(
            f"{path} must hold widths as a list of integers, got {str(widths)[:80]!r}."
        )
    return check_widths(hypernetwork, widths)


def _first_difference(fields: Any, wanted: Any) -> str:
    """What of the JSON value `wanted` is something else in `fields`, "" if nothing is."""
    for name, value in wanted.items():
        given = fields.get(name)
        if isinstance(value, dict) and isinstance(given, dict):
            if inner := _first_difference(given, value):
                return inner
        elif given != value:
            return f"{name} {ascii(given)[:80]} there, {ascii(value)[:80]} here"
    return ""


def check_widths(hypernetwork: Family, widths: Sequence[int]) -> tuple[int, ...]:
    """`widths` themselves, if each lies between 0 or 1 and 1.5 times the full width."""
    names = hypernetwork.names
    if len(widths) != len(names):
        raise UsageError(
            f"widths must have one entry for each of the {len(names)} elastic groups, got "
            f"{len(widths)}."
        )
    highest = hypernetwork.widths(MAX_WIDTH_RATIO).tolist()
    for name, low, width, high in zip(names, hypernetwork.lowest, widths, highest, strict=True):
        if not low <= width <= high:
            raise UsageError(f"{name} takes widths from {low} to {high}, got {width}.")
    return tuple(int(width) for width in widths)


def outside_range(experiment: lab.Experiment, widths: Sequence[int]) -> list[str]:
    """Names of the groups whose widths lie outside the trained range.

    A skipped block lies inside where training skips as many blocks of its stage.
    """
    low, high = experiment.trained_range
    family, recipe = experiment.hypernetwork, experiment.recipe
    skipped = set()
    for _, members, most in training.skippable_blocks(family, recipe) if recipe.skip_blocks else ():
        zeros = [position for position in members if widths[position] == 0]
        skipped |= set(zeros if len(zeros) <= most else ())
    lowest, highest = family.widths(low).tolist(), family.widths(high).tolist()
    bounds = zip(family.names, lowest, widths, highest, strict=True)
    return [
        name
        for position, (name, first, width, last) in enumerate(bounds)
        if not first <= width <= last and position not in skipped
    ]


def note_range(experiment: lab.Experiment, widths: Sequence[int]) -> None:
    """Prints which groups, if any, have widths outside the trained range."""
    outside = outside_range(experiment, widths)
    if outside:
        low, high = experiment.trained_range
        print(
            f"note: the widths of {', '.join(outside)} lie outside what was trained, width ratios "
            f"{low}..{high}{' and skipped blocks' if experiment.recipe.skip_blocks else ''}"
        )


# --- their accuracy --------------------------------------------------------------------------

NUM_UNIFORM = 24


def _evaluate(
    experiment: lab.Experiment,
    evaluator: grid.Evaluator,
    widths: Sequence[Widths],
    beside: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """What is known of each network, with what `beside` says of it, as JSON types."""
    return [
        {**some, **row, "widths": list(widths), "trained": not outside_range(experiment, widths)}
        for some, widths, row in zip(beside, widths, evaluator.evaluate(widths), strict=True)
    ]


def _document(
    experiment: lab.Experiment, evaluator: grid.Evaluator, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "dataset": experiment.name,
        "split": evaluator.split,
        "num_samples": evaluator.options["num_samples"],
        "data": experiment.fingerprint,
        "versions": lab.versions(),
        "rows": rows,
    }


def evaluate_specs(
    workdir: pathlib.Path,
    experiment: lab.Experiment,
    evaluator: grid.Evaluator,
    networks: Mapping[str, Widths],
) -> list[dict[str, Any]]:
    """Evaluates `networks`, widths by the file that names them; writes specs.json and specs.csv."""
    print(f"\n{experiment.name}, {evaluator.split} split, {len(evaluator.labels)} images")
    files = [{"spec": path} for path in networks]
    rows = _evaluate(experiment, evaluator, list(networks.values()), files)
    print(f"{grid.COUNTS_HEADER}    widths, file")
    for row in rows:
        counts = grid.format_counts(row).ljust(len(grid.COUNTS_HEADER) + 2)
        print(f"{counts}  {','.join(map(str, row['widths']))}, {row['spec']}")
    storage.write_json(workdir / "specs.json", _document(experiment, evaluator, rows))
    storage.write_csv(workdir / "specs.csv", storage.as_table(rows))
    print(f"wrote {workdir / 'specs.json'} and specs.csv")
    return rows


def parse_skipped(values: Sequence[str] | None) -> tuple[int, ...]:
    """Numbers of `--skipped_blocks`, increasing; empty where none were given."""
    found = set()
    for value in values or ():
        if not value.isdecimal():
            raise UsageError(
                "--skipped_blocks takes numbers of blocks from 0 on with commas between, got "
                f"{value!r}."
            )
        found.add(int(value))
    return tuple(sorted(found))


def depth_networks(
    experiment: lab.Experiment, skipped: Sequence[int], width_ratios: Sequence[float]
) -> tuple[list[Widths], list[dict[str, Any]]]:
    """Every ratio without the last 0, 1, ... generated blocks of each stage: (widths, which).

    Raises:
        ValueError: for a number of blocks that leaves out no more than a smaller one.
    """
    family, networks, cells = experiment.hypernetwork, [], []
    for number in skipped:
        without = functools.partial(family.without_last, [1] * len(family.names))
        if number and without(number) == without(number - 1):
            raise UsageError(
                "--skipped_blocks takes numbers of blocks that a stage of this run can be without, "
                f"got {number}; no stage has as many, give smaller ones."
            )
        for ratio in sorted(set(width_ratios)):
            networks.append(family.without_last(family.widths(ratio).tolist(), number))
            layers = family.num_layers(networks[-1])
            cells.append({"skipped_blocks": number, "num_layers": layers, "width_ratio": ratio})
    return networks, cells


def evaluate_depths(
    workdir: pathlib.Path,
    experiment: lab.Experiment,
    evaluator: grid.Evaluator,
    networks: Sequence[Widths],
    cells: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Evaluates what `depth_networks` returned.

    Prints a table and writes depths.json, .csv and the heat map depths.png.
    """
    print(f"\nwidth and depth, {evaluator.split} split, {len(evaluator.labels)} images", flush=True)
    rows = _evaluate(experiment, evaluator, networks, cells)
    print(f"{'skipped':>7}  {'layers':>6}  {'ratio':>6}  {grid.COUNTS_HEADER}")
    for row in rows:
        cell = f"{row['skipped_blocks']:>7}  {row['num_layers']:>6}  {row['width_ratio']:6.3f}"
        print(f"{cell}  {grid.format_counts(row)}")
    storage.write_json(workdir / "depths.json", _document(experiment, evaluator, rows))
    name = f"{experiment.network}, {experiment.name}, {evaluator.split} split"
    plotting.plot_depths(workdir / "depths.png", rows, title=f"{name}: top-1 accuracy (%)")
    print(f"wrote {workdir / 'depths.json'}, depths.csv and depths.png")
    return rows


def uniform_networks(experiment: lab.Experiment) -> list[Widths]:
    """Networks with one width ratio for all blocks, over the trained range."""
    ratios = np.linspace(*experiment.trained_range, NUM_UNIFORM).tolist()
    rows = (experiment.hypernetwork.widths(ratio).tolist() for ratio in ratios)
    return list(dict.fromkeys(map(tuple, rows)))


def draw_networks(experiment: lab.Experiment, number: int, seed: int) -> list[Widths]:
    """`number` networks, the width ratio of each block uniformly from the trained range."""
    low, high = evaluations.drawing_range(experiment, "--random_networks", "--spec", number, seed)
    full = np.array(experiment.hypernetwork.full_widths)
    ratios = np.random.default_rng(seed).uniform(low, high, (number, len(full)))
    widths = np.maximum(np.floor(ratios * full + 0.5).astype(int), 1)
    return [tuple(row) for row in widths.tolist()]


class Differences(NamedTuple):
    """Accuracies minus those of uniform networks of the same size, in [-1, 1].

    Attributes:
        each: float64[networks].
        mean, worst: of all.
        best_tenth: mean of the largest tenth.
    """

    each: np.ndarray
    mean: float
    worst: float
    best_tenth: float


def against_uniform(
    num_macs: Sequence[int],
    accuracies: Sequence[float],
    uniform_macs: Sequence[int],
    uniform_accuracies: Sequence[float],
) -> Differences:
    """Networks against the curve of uniform ones over multiply-adds, straight between its points.

    >>> found = against_uniform([15, 20], [0.5, 0.75], [10, 20], [0.25, 0.5])
    >>> found.each.tolist(), found.best_tenth
    ([0.125, 0.25], 0.25)
    """
    order = np.argsort(uniform_macs, kind="stable")
    curve = np.asarray(uniform_macs)[order], np.asarray(uniform_accuracies)[order]
    each = np.asarray(accuracies) - np.interp(num_macs, *curve)
    tenth = np.sort(each)[-max(1, round(len(each) / 10)) :]
    return Differences(each, float(each.mean()), float(each.min()), float(tenth.mean()))


def evaluate_random_networks(
    workdir: pathlib.Path,
    experiment: lab.Experiment,
    evaluator: grid.Evaluator,
    networks: Sequence[Widths],
) -> Differences:
    """Evaluates `networks`, as drawn by `draw_networks`, and uniform ones over the same sizes.

    Prints the differences and writes random_networks.json, .csv and .png.
    """
    print(
        f"\n{len(networks)} networks with a random width in each block, {evaluator.split} split, "
        f"{len(evaluator.labels)} images",
        flush=True,
    )
    uniform = uniform_networks(experiment)
    series = [{"series": "uniform"}] * len(uniform) + [{"series": "random"}] * len(networks)
    evaluator = dataclasses.replace(evaluator, comparison=None)
    rows = _evaluate(experiment, evaluator, [*uniform, *networks], series)
    macs, accuracies = ([row[name] for row in rows] for name in ("num_macs", "accuracy"))
    n = len(uniform)
    found = against_uniform(macs[n:], accuracies[n:], macs[:n], accuracies[:n])
    for row, difference in zip(rows, [*np.zeros(n), *found.each], strict=True):
        row["difference"] = float(difference)
    print(
        f"against uniform networks of the same multiply-adds: mean {100 * found.mean:+.2f} points, "
        f"worst {100 * found.worst:+.2f}, best tenth {100 * found.best_tenth:+.2f}"
    )
    document = {
        **_document(experiment, evaluator, rows),
        "mean_difference": found.mean,
        "worst_difference": found.worst,
        "best_tenth_difference": found.best_tenth,
    }
    storage.write_json(workdir / "random_networks.json", document)
    name = f"{experiment.network}, {experiment.name}, {evaluator.split} split"
    path = workdir / "random_networks.png"
    plotting.plot_random_networks(path, rows, title=f"{name}: widths at random")
    print(f"wrote {workdir / 'random_networks.json'}, random_networks.csv and random_networks.png")
    return found
