"""The most accurate network of a trained family under a budget.

    neumeta search --workdir=DIR --max_macs=30e6
    neumeta search --workdir=DIR --max_params=200e3 --max_latency_ms=2
    neumeta search --workdir=DIR --max_macs=30e6 --width_multiple=8 --depth

Every generated block has a width of its own. The best networks that an evolutionary search finds,
and the best with one ratio for all blocks, are evaluated on the whole validation split, which
decides; of equal accuracies the smaller loss wins, of equal losses fewer multiply-adds. The test
split is read for the winner and the best uniform network only.

The folder is --out, or DIR/search/BUDGETS, named by the budgets, --width_multiple and --depth, such
as DIR/search/max_macs=30000000+depth. It holds best.json (for `neumeta eval --spec` and `export
--spec`), pareto.json, pareto.csv and pareto.png (all networks that were evaluated), and
candidates.json, from which the same command continues after an interruption or with a larger
--num_candidates.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from neumeta_jax.commands import command_line, evaluations, setup
from neumeta_jax.errors import Interrupted, check
from neumeta_jax.evaluation.morphs import morph_to_dict, note_range
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import file_digest, versions
from neumeta_jax.files.storage import locked
from neumeta_jax.networks.saved import INR_FILE
from neumeta_jax.report import plotting
from neumeta_jax.runs import diagnosis
from neumeta_jax.runs.config import Experiment
from neumeta_jax.runs.inr import find_idle
from neumeta_jax.runs.workdir import open_run
from neumeta_jax.search import budgets
from neumeta_jax.search.record import STATE_FILE, read_record
from neumeta_jax.search.session import Session

CPU_BATCH_SIZE = 50  # what the layers pass on stays in the cache; 500 took 1.2 times as long
BUDGETS = ("max_macs", "max_params", "max_latency_ms")
FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "out": (str, "", "The folder to write into; default: DIR/search/BUDGETS, see above."),
    "max_macs": (float, None, "Budget: multiply-adds of one image, such as 30e6."),
    "max_params": (float, None, "Budget: parameters of the dense network."),
    "max_latency_ms": (float, None, "Budget: milliseconds of the dense network on this device."),
    "latency_batch": (int, 1, "Images of the pass whose latency counts."),
    "min_ratio": (float, None, "Smallest width ratio of a block; default: the smallest trained."),
    "max_ratio": (float, None, "Largest width ratio of a block; default: the largest trained."),
    "width_multiple": (int, 1, "Hidden widths are multiples of this, such as 8."),
    "depth": (bool, False, "Blocks may be skipped, those that keep the shape of the stream."),
    "num_candidates": (int, 1000, "Networks to evaluate."),
    "population": (int, 50, "Networks between two selections."),
    "num_images": (int, 2000, "Of the validation split, for each candidate."),
    "seed": (int, 0, "Of the search."),
    "time_limit": (float, None, "Minutes after which the search ends with what it has."),
    "test": (bool, True, "Evaluate the winner and the best uniform network on the test split."),
    **command_line.SAMPLES,
    **command_line.DATA_DIR,
}


def _check_options(options: flags.FlagValues) -> None:
    check(options.workdir, "A search needs --workdir=DIR; see --help.")
    given = {name: getattr(options, name) for name in (*BUDGETS, "time_limit")}
    check(
        any(given[name] is not None for name in BUDGETS),
        "A search needs a budget; give --max_macs, --max_params or --max_latency_ms.",
    )
    for name, value in given.items():
        possible = value is None or 0 < value < math.inf
        check(possible, f"--{name} must be above 0 and finite, got {value}.")
    least = {"latency_batch": 1, "num_candidates": 1, "num_images": 1, "num_samples": 1}
    command_line.check_at_least(options, **least, population=2, seed=0)


def folder_name(settings: Mapping[str, Any]) -> str:
    """Of a search by its budgets and kind of networks.

    >>> folder_name({"max_macs": 3e7, "max_params": None, "width_multiple": 8, "depth": True})
    'max_macs=30000000+width_multiple=8+depth'
    """
    parts = [f"{name}={settings[name]:.12g}" for name in BUDGETS if settings.get(name) is not None]
    if settings["width_multiple"] > 1:
        parts.append(f"width_multiple={settings['width_multiple']}")
    return "+".join(parts + ["depth"] * settings["depth"])


def main(argv: Sequence[str]) -> None:
    config, options = command_line.parse(argv, FLAGS, config_required=False)
    _check_options(options)
    setup.quiet_logging()
    setup.configure_jax()
    opened = open_run(config, options)
    experiment, splits = opened.load()
    given = {"num_samples": options.num_samples, "strategy": options.strategy}
    if jax.default_backend() == "cpu":
        given["batch_size"] = CPU_BATCH_SIZE * jax.local_device_count()
    evaluators = {
        split: evaluations.make_evaluator(experiment, opened.params, splits, split=split, **given)
        for split in ("validation", "test")[: 1 + options.test]
    }
    whole, some = evaluators["validation"], slice(options.num_images)
    data = {"images": whole.images[some], "labels": whole.labels[some]}
    evaluators["candidates"] = dataclasses.replace(whole, **data)

    ends = zip((options.min_ratio, options.max_ratio), experiment.trained_range, strict=True)
    low, high = (trained if ratio is None else ratio for ratio, trained in ends)
    kind = {"multiple": options.width_multiple, "depth": options.depth}
    space = budgets.make_space(opened.hypernetwork, low=low, high=high, **kind)
    idle = find_idle(experiment, opened.params, splits)
    for line in diagnosis.describe_idle(opened.hypernetwork, idle):
        print(line)
    space = space.without(idle.groups)
    limits = {name: getattr(options, f"max_{name}") for name in ("macs", "params")}
    costs = [budgets.count_cost(space.family, name, limit) for name, limit in limits.items()]
    costs.sort(key=lambda cost: cost.limit is None)
    notes = [_seen(experiment), *budgets.check_budgets(space, costs)]

    names = (*BUDGETS, "width_multiple", "depth", "population", "num_images", "seed")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"min_ratio": low, "max_ratio": high, "num_samples": whole.num_samples}
    settings["inr"] = file_digest(opened.workdir / INR_FILE)
    if options.max_latency_ms is not None:
        settings["latency_batch"] = options.latency_batch
    out = pathlib.Path(options.out or opened.workdir / "search" / folder_name(settings))
    with locked(out, name="The folder of --out"):
        record = read_record(out / STATE_FILE, settings)
        uniform = budgets.uniform_networks(space, low=low, high=high)
        session = Session(record, space, uniform, costs, evaluators, options)
        print(
            f"{space.size:,} networks of {len(space.choices)} groups with widths "
            f"{min(map(min, space.choices))} to {max(map(max, space.choices))}; each candidate "
            f"on {len(data['labels'])} of {len(whole.labels)} validation images of "
            f"{experiment.name}",
            flush=True,
        )
        try:
            if options.max_latency_ms is not None:
                notes += session.add_latency()
            _write(out, experiment, session, session.search(), notes)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped after {len(record.archive)} candidates; the same command continues."
            ) from None


def _seen(experiment: Experiment) -> str:
    """Whether networks from elsewhere that the run began with may know the validation images."""
    origin = experiment.teacher.file or experiment.recipe.init_from
    if not origin:
        return "neither the teacher nor the INR was trained on the validation images"
    kind = "teacher" if experiment.teacher.file else "INR that training started from"
    return (
        f"the {kind}, {pathlib.PurePath(origin).name}, may have been trained on the validation "
        "images, so that accuracies on these may be too high"
    )


def _write(
    out: pathlib.Path,
    experiment: Experiment,
    session: Session,
    winners: Mapping[str, Sequence[int]],
    notes: Sequence[str],
) -> None:
    """Writes the tables, the figure and best.json, and prints what was found."""
    record, axis, rows = session.record, session.costs[0], session.table()
    found = {name: session.describe(tuple(widths)) for name, widths in winners.items()}
    best = found["searched"]
    shared = {
        "dataset": experiment.name,
        "budget": {cost.name: cost.limit for cost in session.costs if cost.limit is not None},
        "num_candidates": len(record.archive),
        "seed": session.options.seed,
        "num_images": session.options.num_images,
        "seconds": record.seconds,
        "latency_noise_ms": record.noise,
        "notes": notes,
        "versions": versions(),
    }
    document = morph_to_dict(experiment.hypernetwork, best["widths"]) | best | shared
    storage.write_json(out / "best.json", document | {"uniform": found.get("best uniform")})
    front = {"front_over": axis.name, "best": best["widths"], **shared, "rows": rows}
    storage.write_json(out / "pareto.json", front)
    plotting.plot_search(
        out / "pareto.png",
        rows,
        title=f"{experiment.network}, {experiment.name}: {len(rows)} networks from one INR",
        column=axis.column,
        limit=axis.limit or math.inf,
        winner=best["widths"],
        caption=f"{notes[0][0].upper()}{notes[0][1:]}. Of equal accuracies the smaller loss wins.",
    )
    print(f"wrote {out / 'best.json'}; pareto.json, pareto.csv and pareto.png")
    for name, some in found.items():
        latency = f", {some['latency_ms']:.3f} ms" if "latency_ms" in some else ""
        test = f", test {100 * some['test_accuracy']:.2f} %" if "test_accuracy" in some else ""
        print(
            f"{name}: hidden widths {','.join(map(str, some['widths']))}: "
            f"{some['num_macs'] / 1e6:.2f} M multiply-adds, {some['num_params']:,} "
            f"parameters{latency}; validation {100 * some['validation_accuracy']:.2f} %, loss "
            f"{some['validation_loss']:.4f}{test}"
        )
    for line in notes:
        print(f"note: {line}")
    note_range(experiment.hypernetwork, experiment.recipe, best["widths"])
