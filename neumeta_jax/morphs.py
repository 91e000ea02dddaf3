"""Networks whose blocks have widths of their own: the files that name them, their accuracy."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from neumeta_jax import (
    architecture,
    evaluation,
    experiment as lab,
    plotting,
    storage,
    training,
)
from neumeta_jax.architecture import ResNetSpec
from neumeta_jax.command_line import UsageError
from neumeta_jax.resnet import ResNetHypernetwork as ResNetHypernetwork

Widths = tuple[int, ...]


def morph_to_dict(hypernetwork: ResNetHypernetwork, widths: Sequence[int]) -> dict[str, Any]:
    """One network of a family as plain JSON types, for `--spec=FILE`.

    Returns:
        {"widths": hidden widths of the generated blocks (0 = skipped), "spec": the full-size
        network, "blocks": positions of the generated blocks}; the last two tell whose widths
        these are.
    """
    return {
        "widths": [int(width) for width in widths],
        "spec": hypernetwork.spec.to_dict(),
        "blocks": list(hypernetwork.blocks),
    }


def load_morph(path: str | os.PathLike, hypernetwork: ResNetHypernetwork) -> tuple[int, ...]:
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
    if fields["spec"] != wanted["spec"] or fields["blocks"] != wanted["blocks"]:
        differing = _first_difference(fields, wanted)
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


def _first_difference(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    spec = fields["spec"]
    if isinstance(spec, dict):
        for name, value in wanted["spec"].items():
            if spec.get(name) != value:
                return f"{name} {ascii(spec.get(name))[:80]} there, {value} here"
    if fields["blocks"] != wanted["blocks"]:
        return f"blocks {ascii(fields['blocks'])[:80]} there, {wanted['blocks']} here"
    return "other fields in its spec"


def check_widths(hypernetwork: ResNetHypernetwork, widths: Sequence[int]) -> tuple[int, ...]:
    """`widths` themselves, if each lies between 0 or 1 and 1.5 times its block's full width."""
    spec, blocks = hypernetwork.spec, hypernetwork.blocks
    if len(widths) != len(blocks):
        raise UsageError(
            f"widths must have one entry for each of the {len(blocks)} generated blocks, got "
            f"{len(widths)}."
        )
    highest = architecture.widths_at(spec, blocks, architecture.MAX_WIDTH_RATIO)
    for n, width, high in zip(blocks, widths, highest, strict=True):
        low = 0 if spec.blocks[n].skippable else 1
        if not low <= width <= high:
            raise UsageError(
                f"{spec.blocks[n].name} takes hidden widths from {low} to {high}, got {width}."
            )
    return tuple(int(width) for width in widths)


def num_layers(spec: ResNetSpec) -> int:
    """Of a network, skipped blocks not counted; its `depth` counts them."""
    return 2 + 2 * sum(width > 0 for width in spec.hidden_widths)


def outside_range(experiment: lab.Experiment, widths: Sequence[int]) -> list[str]:
    """Names of the blocks whose widths lie outside the trained range.

    A skipped block lies inside where training skips as many blocks of its stage.
    """
    low, high = experiment.trained_range
    family, recipe = experiment.hypernetwork, experiment.recipe
    skipped = set()
    for _, members, most in training.skippable_blocks(family, recipe) if recipe.skip_blocks else ():
        zeros = [position for position in members if widths[position] == 0]
        skipped |= set(zeros if len(zeros) <= most else ())
    blocks = experiment.hypernetwork.blocks
    lowest = architecture.widths_at(experiment.spec, blocks, low)
    highest = architecture.widths_at(experiment.spec, blocks, high)
    names = [experiment.spec.blocks[n].name for n in blocks]
    bounds = zip(names, lowest, widths, highest, strict=True)
    return [
        name
        for position, (name, first, width, last) in enumerate(bounds)
        if not first <= width <= last and position not in skipped
    ]


def note_range(experiment: lab.Experiment, widths: Sequence[int]) -> None:
    """Prints which blocks, if any, have widths outside the trained range."""
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
    evaluator: evaluation.Evaluator,
    widths: Sequence[Widths],
    beside: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """What is known of each network, with what `beside` says of it, as JSON types."""
    return [
        {**some, **row, "widths": list(widths), "trained": not outside_range(experiment, widths)}
        for some, widths, row in zip(beside, widths, evaluator.evaluate(widths), strict=True)
    ]


def _document(
    experiment: lab.Experiment, evaluator: evaluation.Evaluator, rows: Sequence[Mapping[str, Any]]
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
    evaluator: evaluation.Evaluator,
    networks: Mapping[str, Widths],
) -> list[dict[str, Any]]:
    """Evaluates `networks`, widths by the file that names them; writes specs.json and specs.csv."""
    print(f"\n{experiment.name}, {evaluator.split} split, {len(evaluator.labels)} images")
    files = [{"spec": path} for path in networks]
    rows = _evaluate(experiment, evaluator, list(networks.values()), files)
    print(f"{evaluation.COUNTS_HEADER}    widths, file")
    for row in rows:
        counts = evaluation.format_counts(row).ljust(len(evaluation.COUNTS_HEADER) + 2)
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
    spec, blocks = experiment.spec, experiment.hypernetwork.blocks
    networks, cells = [], []
    for number in skipped:
        without = functools.partial(architecture.without_last, spec, blocks, [1] * len(blocks))
        if number and without(number) == without(number - 1):
            raise UsageError(
                "--skipped_blocks takes numbers of blocks that a stage of this run can be without, "
                f"got {number}; no stage has as many, give smaller ones."
            )
        for ratio in sorted(set(width_ratios)):
            full = architecture.widths_at(spec, blocks, ratio)
            networks.append(architecture.without_last(spec, blocks, full, number))
            layers = num_layers(architecture.morph(spec, blocks, networks[-1]))
            cells.append({"skipped_blocks": number, "num_layers": layers, "width_ratio": ratio})
    return networks, cells


def evaluate_depths(
    workdir: pathlib.Path,
    experiment: lab.Experiment,
    evaluator: evaluation.Evaluator,
    networks: Sequence[Widths],
    cells: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Evaluates what `depth_networks` returned.

    Prints a table and writes depths.json, .csv and the heat map depths.png.
    """
    print(f"\nwidth and depth, {evaluator.split} split, {len(evaluator.labels)} images", flush=True)
    rows = _evaluate(experiment, evaluator, networks, cells)
    print(f"{'skipped':>7}  {'layers':>6}  {'ratio':>6}  {evaluation.COUNTS_HEADER}")
    for row in rows:
        cell = f"{row['skipped_blocks']:>7}  {row['num_layers']:>6}  {row['width_ratio']:6.3f}"
        print(f"{cell}  {evaluation.format_counts(row)}")
    storage.write_json(workdir / "depths.json", _document(experiment, evaluator, rows))
    name = f"{experiment.network}, {experiment.name}, {evaluator.split} split"
    plotting.plot_depths(workdir / "depths.png", rows, title=f"{name}: top-1 accuracy (%)")
    print(f"wrote {workdir / 'depths.json'}, depths.csv and depths.png")
    return rows


def uniform_networks(experiment: lab.Experiment) -> list[Widths]:
    """Networks with one width ratio for all blocks, over the trained range."""
    spec, blocks = experiment.spec, experiment.hypernetwork.blocks
    ratios = np.linspace(*experiment.trained_range, NUM_UNIFORM).tolist()
    return list(dict.fromkeys(architecture.widths_at(spec, blocks, ratio) for ratio in ratios))


def draw_networks(experiment: lab.Experiment, number: int, seed: int) -> list[Widths]:
    """`number` networks, the width ratio of each block uniformly from the trained range."""
    low, high = lab.drawing_range(experiment, "--random_networks", "--spec", number, seed)
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
    evaluator: evaluation.Evaluator,
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
