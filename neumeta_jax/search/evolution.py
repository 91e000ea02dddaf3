"""The most accurate network of a trained family under a budget.

    python -m neumeta_jax.search --workdir=/tmp/resnet20 --max_macs=30e6
    python -m neumeta_jax.search --workdir=/tmp/resnet20 --max_params=200e3 --max_latency_ms=2
    python -m neumeta_jax.search --workdir=/tmp/resnet20 --max_macs=30e6 --width_multiple=8 --depth

Every generated block has a hidden width of its own. The search is evolutionary, as that of
Once-for-all (Cai et al. 2020, arXiv 1908.09791, section 3.4): the best quarter of a population's
size are parents, half of the children are mutated and half crossed, and none breaks a budget. It
differs in two ways. Accuracies are measured, not predicted, since a network is generated in a
fraction of its forward pass and needs no calibration; and what a child breaks is repaired by
narrowing, what it leaves of the budget is used up in half of the cases, so that few children are
thrown away and the edge of the budget, where the best ones lie, is searched (a fifth of the
children come from anywhere on the front, for the sake of the table). Age plays no role as it does
in regularised evolution (Real et al. 2019): it guards against lucky evaluations, but here a network
gets the same accuracy whenever it is evaluated.

What it has to guard against is the best of a thousand on the same images: the finalists, the best
20 and the best five uniform networks (one ratio for all blocks), are evaluated on the entire
validation split, which decides. The uniform networks within the budget are in the first population,
so that on this split the winner is at least as good as they are; with --depth so are the largest
that leave out the last blocks of each stage. The test split is read for the winner and the best
uniform network only.

The folder --out holds best.json (for `eval.py --spec` and `export --spec`), pareto.json, pareto.csv
and pareto.png (all networks that were evaluated), and candidates.json, from which the same command
continues after an interruption or with a larger --num_candidates.
"""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from neumeta_jax.commands import command_line
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.elastic.widths import check_width_ratio
from neumeta_jax.errors import Interrupted, UsageError
from neumeta_jax.evaluation import grid, timing
from neumeta_jax.evaluation.buckets import container_macs, make_buckets
from neumeta_jax.evaluation.morphs import morph_to_dict, note_range
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import format_seconds
from neumeta_jax.networks import families
from neumeta_jax.networks.families import Family
from neumeta_jax.report import plotting
from neumeta_jax.runs import checkpoint, diagnosis, experiment as lab

Widths = tuple[int, ...]

PARENTS = 0.25  # of a population (Cai et al. 2020)
MUTATED_BLOCKS = 0.1  # of the blocks of a child, at least one (Cai et al. 2020)
MUTATION_STEP = 0.2  # standard deviation, as a share of a block's choices
FRONT_RATE = 0.2  # of the children come from anywhere on the front, not from the best
SKIP_RATE = 0.2  # of the mutations of a block that may be skipped
NUM_FINALISTS = 20
NUM_UNIFORM_FINALISTS = 5
MAX_UNIFORM = 64
NUM_SHALLOW = 5  # uniform networks of each smaller depth in the first population
MAX_CONTAINERS = 16
LATENCY_WIDTHS = 6  # measured for each shape of blocks, straight lines between
STATE_FILE = "candidates.json"


# --- which networks --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Space:
    """The networks to choose from.

    Attributes:
        family: whose networks they are.
        choices: widths of each of its groups, increasing; 0 = skipped.

    A network is a tuple of `genes`, the numbers of its widths in `choices`.
    """

    family: Family
    choices: tuple[Widths, ...]

    def widths(self, genes: Sequence[int]) -> Widths:
        return tuple(self.choices[b][gene] for b, gene in enumerate(genes))

    def genes(self, widths: Sequence[int]) -> list[int]:
        pairs = zip(self.choices, widths, strict=True)
        return [choices.index(width) for choices, width in pairs]

    def without(self, positions: Collection[int]) -> "Space":
        """The same with some of the groups left out of every network."""
        choices = [(0,) if n in positions else c for n, c in enumerate(self.choices)]
        return dataclasses.replace(self, choices=tuple(choices))

    @property
    def size(self) -> int:
        return math.prod(len(choices) for choices in self.choices)

    @property
    def lowest(self) -> list[int]:
        """The gene of each block that does not skip it, where that is a choice."""
        return [int(choices[0] == 0 and len(choices) > 1) for choices in self.choices]


def make_space(
    family: Family,
    *,
    low: float,
    high: float,
    multiple: int = 1,
    depth: bool = False,
) -> Space:
    """Every group between `low` and `high` of its full width, in multiples of `multiple`.

    With `depth`, branches of a residual stream may be skipped.

    Raises:
        ValueError: for ratios out of range or exchanged, or a group without any such width.
    """
    if check_width_ratio(low) > check_width_ratio(high):
        raise UsageError(f"--min_ratio must not exceed --max_ratio, got {low} and {high}.")
    if multiple < 1:
        raise UsageError(f"--width_multiple must be at least 1, got {multiple}.")
    lowest, highest = family.widths(low).tolist(), family.widths(high).tolist()
    choices = []
    for name, skipped, first, last in zip(
        family.names, family.lowest, lowest, highest, strict=True
    ):
        allowed = tuple(range(-(-first // multiple) * multiple, last + 1, multiple))
        if not allowed:
            raise UsageError(
                f"{name} takes widths from {first} to {last}, of which none "
                f"is a multiple of {multiple}; use a smaller --width_multiple or other ratios."
            )
        choices.append(((0,) if depth and skipped == 0 else ()) + allowed)
    return Space(family, tuple(choices))


def _nearest(choices: Sequence[int], width: int) -> int:
    """The choice that skips no block, if there is one; of two as near the larger."""
    wide = [choice for choice in choices if choice] or choices
    return min(wide, key=lambda choice: (abs(choice - width), -choice))


def uniform_networks(space: Space, *, low: float, high: float) -> list[Widths]:
    """Every network of `space` whose blocks keep one ratio from `low` to `high`, by size.

    Each width is the nearest allowed one to the ratio's.
    """
    full = space.family.full_widths
    # All ratios at which a width changes.
    steps = {
        (width - 0.5) / whole + 1e-9
        for whole in set(full)
        for width in range(1, math.ceil(high * whole) + 1)
    }
    found = {}
    for ratio in sorted({low, high} | {step for step in steps if low < step < high}):
        widths = space.family.widths(ratio).tolist()
        pairs = zip(space.choices, widths, strict=True)
        found[tuple(_nearest(choices, width) for choices, width in pairs)] = None
    return list(found)


def shallow_networks(
    space: Space, costs: Sequence["Cost"], uniform: Sequence[Widths]
) -> list[Widths]:
    """Of each smaller depth the `NUM_SHALLOW` largest of `uniform` that keep the budgets.

    Depths are those of `Hypernetwork.without_last`: 1, 2, ... blocks of each stage left out.
    """
    skippable = collections.Counter(
        stage
        for stage, choices in zip(space.family.stages, space.choices, strict=True)
        if choices[0] == 0 and len(choices) > 1
    )
    macs = count_cost(space, "macs", None)
    found = []
    for number in range(1, max(skippable.values(), default=0) + 1):
        shorter = dict.fromkeys(space.family.without_last(widths, number) for widths in uniform)
        shorter = [row for row in shorter if all(map(tuple.__contains__, space.choices, row))]
        fitting = [widths for widths in shorter if _fits(space, costs, widths)]
        fitting.sort(key=lambda widths: -macs.total(space.genes(widths)))
        found += fitting[:NUM_SHALLOW]
    return found


# --- budgets ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a network costs, and a budget for it.

    Attributes:
        name: of the flag, without "max_".
        limit: the budget, or None for something that is only reported.
        total: of a network's genes.
    """

    name: str
    limit: float | None
    total: Callable[[Sequence[int]], float]

    def allows(self, genes: Sequence[int]) -> bool:
        return self.limit is None or self.total(genes) <= self.limit


def _fits(space: Space, costs: Sequence[Cost], widths: Widths) -> bool:
    return all(cost.allows(space.genes(widths)) for cost in costs)


def count_cost(space: Space, name: str, limit: float | None) -> Cost:
    """The cost "macs" (multiply-adds of an image) or "params" (parameters), exactly."""
    count = getattr(space.family, f"num_{name}")
    return Cost(name, limit, lambda genes: count(space.widths(genes)))


def measure_latency(
    family: Family,
    widths: Sequence[int],
    *,
    batch: int,
    dtype: str,
    seconds: float = 0.3,
) -> float:
    """Milliseconds of one forward pass of the dense network on this device, jitted, the median.

    Args:
        family, widths: the network; its weights are drawn at random.
        batch: images per pass.
        dtype: of the images.
        seconds: for how long to repeat it after compilation; at least 10 times.
    """
    rng = np.random.default_rng(0)
    sizes = [max(pair) for pair in zip(widths, family.full_widths, strict=True)]
    full = {
        path: 0.05 * rng.normal(size=[axis.width(family.by_name(sizes)) for axis in axes])
        for path, axes in family.groups.tensors
    }
    tree = hyper.assemble(family, {path: x.astype(np.float32) for path, x in full.items()})
    small, params = family.dense(tree, widths, sizes)
    images = jnp.ones((batch, *family.spec.input_shape), dtype)
    network = jax.jit(lambda params, images: families.run(small, params, images))
    times = timing.in_turns({"": lambda: network(params, images)}, 10, seconds=seconds)
    return 1e3 * float(np.median(times[""]))


def latency_cost(space: Space, limit: float | None, measure: Callable[[Widths], float]) -> Cost:
    """Latency as a sum over the groups, from a few networks measured whole.

    Groups of one size and cost share a table: the network is measured with all of them at one width
    and the others at their largest, at `LATENCY_WIDTHS` widths with straight lines between. Lookup
    tables of layers are how ProxylessNAS (Cai et al. 2019, arXiv 1812.00332) models latency.

    `limit` is in milliseconds, as is what `measure` returns for a network's widths.
    """
    largest = [choices[-1] for choices in space.choices]
    whole = measure(tuple(largest))
    shapes: dict[tuple, list[int]] = {}
    family = space.family
    for position, full in enumerate(family.full_widths):
        narrower = list(family.full_widths)
        narrower[position] -= 1
        per_channel = family.num_macs(family.full_widths) - family.num_macs(narrower)
        key = full, per_channel, space.choices[position]
        shapes.setdefault(key, []).append(position)
    tables = [np.zeros(len(choices)) for choices in space.choices]
    for (*_, choices), positions in shapes.items():
        picked = np.unique(np.linspace(0, len(choices) - 1, LATENCY_WIDTHS).round().astype(int))
        if choices[0] == 0 and len(choices) > 1:
            picked = np.unique([*picked, 1])  # skipping is no straight line
        saved = []
        for number in picked[:-1]:
            widths = list(largest)
            for position in positions:
                widths[position] = choices[number]
            saved.append((measure(tuple(widths)) - whole) / len(positions))
        # Noise must not make a wider block cheaper.
        known = np.minimum.accumulate([0.0, *saved[::-1]])[::-1]
        x = [choices[number] for number in picked]
        for position in positions:
            tables[position] = np.interp(choices, x, known)
    # Exact at both ends.
    smallest = measure(tuple(choices[0] for choices in space.choices))
    total = sum(table[0] for table in tables)
    scale = max(whole - smallest, 0.0) / -total if total else 0.0
    scaled, fixed = [(scale * table).tolist() for table in tables], max(whole, smallest)
    return Cost(
        "latency_ms",
        limit,
        lambda genes: fixed + sum(t[gene] for t, gene in zip(scaled, genes, strict=True)),
    )


def check_budgets(space: Space, costs: Sequence[Cost]) -> None:
    """Raises ValueError, saying what is possible, if the smallest network breaks a budget."""
    smallest = [0] * len(space.choices)
    largest = [len(choices) - 1 for choices in space.choices]
    for cost in costs:
        if not cost.allows(smallest):
            raise UsageError(
                f"--max_{cost.name} must be at least {_amount(cost, cost.total(smallest))}, got "
                f"{_amount(cost, cost.limit)}; the networks to choose from have "
                f"{_amount(cost, cost.total(smallest))} to {_amount(cost, cost.total(largest))}, "
                "a smaller --min_ratio or --depth allows smaller ones."
            )


def _amount(cost: Cost, value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.3f}" if cost.name == "latency_ms" else f"{value:,.0f}"


# --- evolution -------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A network that was evaluated: its accuracy in [0, 1] and when."""

    widths: Widths
    accuracy: float
    generation: int


@dataclasses.dataclass(frozen=True)
class _Evolution:
    """Proposes populations of `size` networks within the budgets; depends on its arguments alone.

    A population of a generation has a random generator of its own.
    """

    space: Space
    costs: Sequence[Cost]
    size: int
    seed: int

    def first(self, uniform: Sequence[Widths]) -> list[Widths]:
        """The uniform networks, shallow ones, and at least half of `size` at random."""
        rng = np.random.default_rng([self.seed, 0])
        allowed = [widths for widths in uniform if _fits(self.space, self.costs, widths)]
        if len(allowed) > MAX_UNIFORM:  # evenly, with the smallest and the largest
            picked = np.linspace(0, len(allowed) - 1, MAX_UNIFORM).round().astype(int)
            allowed = [allowed[n] for n in picked]
        shallow = shallow_networks(self.space, self.costs, uniform)
        population = dict.fromkeys([*allowed, *shallow])
        wanted = len(population) + max(self.size - len(population), self.size // 2)
        self._add(population, wanted, (), lambda: self._random(rng))
        return list(population)

    def next(self, archive: Sequence[Candidate], generation: int) -> list[Widths]:
        """Up to `size` networks that are not in the archive; fewer only where few are left."""
        space, rng = self.space, np.random.default_rng([self.seed, generation])
        macs = count_cost(space, "macs", None)
        ranked = sorted(archive, key=lambda c: (-c.accuracy, macs.total(space.genes(c.widths))))
        parents = [space.genes(c.widths) for c in ranked[: max(2, round(PARENTS * self.size))]]
        axis = next((cost for cost in self.costs if cost.limit is not None), self.costs[0])
        genes_of = [space.genes(candidate.widths) for candidate in archive]
        amounts = [axis.total(genes) for genes in genes_of]
        on_front = pareto_front(amounts, [candidate.accuracy for candidate in archive])
        front = [genes for genes, on in zip(genes_of, on_front, strict=True) if on]

        def child() -> list[int]:
            if rng.random() < FRONT_RATE:
                genes = self._mutated(front[rng.integers(len(front))], rng)
                return self._within(genes, rng, fill=False)
            first = parents[rng.integers(len(parents))]
            if rng.random() < 0.5:
                genes = self._mutated(first, rng)
            else:
                second = parents[rng.integers(len(parents))]
                genes = [int(rng.choice(pair)) for pair in zip(first, second, strict=True)]
            return self._within(genes, rng, fill=rng.random() < 0.5)

        population: dict[Widths, None] = {}
        seen = {candidate.widths for candidate in archive}
        self._add(population, self.size, seen, child)
        # Parents that are all alike have few children.
        self._add(population, self.size, seen, lambda: self._random(rng))
        return list(population)

    def _add(self, population, size, seen, draw) -> None:
        """Draws until `population` has `size` networks, or nearly all draws were seen before."""
        for _ in range(50 * size):
            if len(population) >= size:
                break
            widths = self.space.widths(draw())
            if widths not in seen:
                population[widths] = None

    def _random(self, rng: np.random.Generator) -> list[int]:
        genes = []
        for choices, first in zip(self.space.choices, self.space.lowest, strict=True):
            skipped = first and rng.random() < SKIP_RATE
            genes.append(0 if skipped else int(rng.integers(first, len(choices))))
        return self._within(genes, rng, fill=rng.random() < 0.5)

    def _mutated(self, genes: Sequence[int], rng: np.random.Generator) -> list[int]:
        chosen = rng.random(len(genes)) < MUTATED_BLOCKS
        chosen[rng.integers(len(genes))] = True
        result = list(genes)
        for position in np.flatnonzero(chosen):
            choices, first = self.space.choices[position], self.space.lowest[position]
            if first and (result[position] == 0 or rng.random() < SKIP_RATE):
                skipped = result[position] != 0
                result[position] = 0 if skipped else int(rng.integers(first, len(choices)))
                continue
            step = rng.normal() * MUTATION_STEP * len(choices)
            step = math.copysign(max(1, round(abs(step))), step)
            result[position] = int(np.clip(result[position] + step, first, len(choices) - 1))
        return result

    def _within(self, genes: Sequence[int], rng: np.random.Generator, *, fill: bool) -> list[int]:
        """`genes` narrowed step by step until they keep the budgets, then widened if `fill`.

        Blocks are skipped only where narrowing all others is not enough.
        """
        genes, lowest = list(genes), self.space.lowest
        highest = [len(choices) - 1 for choices in self.space.choices]
        while not all(cost.allows(genes) for cost in self.costs):
            free = [b for b, gene in enumerate(genes) if gene > lowest[b]]
            free = free or [b for b, gene in enumerate(genes) if gene > 0]
            if not free:
                break  # the smallest network, see check_budgets
            genes[free[rng.integers(len(free))]] -= 1
        free = [b for b, gene in enumerate(genes) if fill and lowest[b] <= gene < highest[b]]
        while free:
            position = free[rng.integers(len(free))]
            genes[position] += 1
            allowed = all(cost.allows(genes) for cost in self.costs)
            genes[position] -= not allowed
            if not allowed or genes[position] == highest[position]:
                free.remove(position)
        return genes


def evolve(
    space: Space,
    costs: Sequence[Cost],
    uniform: Sequence[Widths],
    evaluate: Callable[[list[Widths]], Sequence[float]],
    *,
    num_candidates: int,
    population: int,
    seed: int,
    archive: Sequence[Candidate] = (),
    on_generation: Callable[[list[Candidate]], bool] = lambda archive: True,
) -> list[Candidate]:
    """Evaluates up to `num_candidates` networks, none twice; all of them, in that order.

    Args:
        space, costs: the networks and their budgets.
        uniform: networks for the first population; those beyond a budget are left out.
        evaluate: accuracies in [0, 1] of some networks, in their order.
        num_candidates: how many, those in `archive` included.
        population: how many are evaluated between two selections.
        seed: equal seeds give equal networks.
        archive: what an earlier call has evaluated, in its order; the search goes on from there.
        on_generation: called with all networks so far after each population; False ends the search.
    """
    archive, evolution = list(archive), _Evolution(space, costs, population, seed)
    generation = archive[-1].generation + 1 if archive else 0
    while len(archive) < num_candidates:
        if generation:
            proposed = evolution.next(archive, generation)
        else:
            proposed = evolution.first(uniform)
        proposed = proposed[: num_candidates - len(archive)]
        if not proposed:
            break
        accuracies = evaluate(proposed)
        archive += [
            Candidate(widths, float(accuracy), generation)
            for widths, accuracy in zip(proposed, accuracies, strict=True)
        ]
        generation += 1
        if not on_generation(archive):
            break
    return archive


def pareto_front(amounts: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Which networks no other one equals or beats in both at once; the first of equal ones.

    >>> pareto_front([1, 2, 3, 3], [0.5, 0.4, 0.6, 0.6])
    [True, False, True, False]
    """
    front, best = [False] * len(amounts), -math.inf
    order = sorted(range(len(amounts)), key=lambda n: (amounts[n], -accuracies[n], n))
    for n in order:
        if accuracies[n] > best:
            front[n], best = True, accuracies[n]
    return front


# --- evaluation ------------------------------------------------------------------------------


def add_containers(
    space: Space,
    containers: Sequence[Widths],
    widths: Sequence[Widths],
    *,
    macs_per_container: float,
) -> list[Widths]:
    """`containers` and those that pay for their compilation in this population already.

    Widths of containers are multiples of a quarter of the full width, so that later populations
    fit into them too. The first is the largest network, which holds all.

    `macs_per_container` are the multiply-adds of one image that take as long as compiling a shape,
    divided by the number of images.
    """
    num_macs = space.family.num_macs
    largest = np.array([choices[-1] for choices in space.choices])
    found = list(containers) or [tuple(largest.tolist())]
    step = np.array([max(1, round(full / 4)) for full in space.family.full_widths])
    rows = np.array(widths)
    proposed = {
        tuple(bucket.container): None
        for bucket in make_buckets(
            num_macs,
            np.minimum(-(-rows // step) * step, largest),
            macs_per_bucket=macs_per_container,
        )
    }
    now = container_macs(num_macs, rows, np.array(found)).min(axis=1)
    proposed = [row for row in proposed if row not in found]
    while proposed and len(found) < MAX_CONTAINERS:
        costs = container_macs(num_macs, rows, np.array(proposed))
        saved = np.maximum(now[:, None] - costs, 0).sum(axis=0)
        best = int(np.argmax(saved))
        if saved[best] <= macs_per_container:
            break
        now = np.minimum(now, costs[:, best])
        found.append(proposed.pop(best))
    return found


# --- what a search leaves in its folder ------------------------------------------------------


@dataclasses.dataclass
class Record:
    """A search as far as it has come, `candidates.json`.

    Attributes:
        settings: what its networks and accuracies depend on.
        archive: the networks that were evaluated.
        containers: shapes that they were evaluated at.
        strategy: how, see `grid.evaluate_grid`.
        latencies: milliseconds of networks that were measured.
        validation, test: accuracies in [0, 1] on the entire splits.
        seconds: spent on the archive.
    """

    settings: dict[str, Any]
    archive: list[Candidate] = dataclasses.field(default_factory=list)
    containers: list[Widths] = dataclasses.field(default_factory=list)
    strategy: str = "auto"
    latencies: dict[Widths, float] = dataclasses.field(default_factory=dict)
    validation: dict[Widths, float] = dataclasses.field(default_factory=dict)
    test: dict[Widths, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def write(self, path: pathlib.Path) -> None:
        fields = dict(vars(self))
        fields["archive"] = [candidate._asdict() for candidate in self.archive]
        for name in ("latencies", "validation", "test"):
            fields[name] = [[widths, value] for widths, value in fields[name].items()]
        storage.write_json(path, fields)


def load_record(path: pathlib.Path) -> Record | None:
    """The search in `path`, None where there is no such file; ValueError if it is damaged."""
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        fields["archive"] = [
            Candidate(tuple(c["widths"]), c["accuracy"], c["generation"]) for c in fields["archive"]
        ]
        fields["containers"] = [tuple(widths) for widths in fields["containers"]]
        for name in ("latencies", "validation", "test"):
            fields[name] = {tuple(widths): value for widths, value in fields[name]}
        return Record(**fields)
    except (ValueError, TypeError, KeyError):
        raise UsageError(
            f"{path} must hold a search, but it is damaged; remove it to start anew."
        ) from None


def read_record(path: pathlib.Path, settings: dict[str, Any]) -> Record:
    """The search in `path`, or a new one where there is no such file.

    Raises:
        ValueError: if the file is damaged, or of a search with other settings, naming them.
    """
    settings = json.loads(json.dumps(settings))
    record = load_record(path) or Record(settings)
    differing = lab.differences(record.settings, settings)
    if differing:
        raise UsageError(
            f"{path} is of a search with other settings; these differ: {', '.join(differing)}; use "
            "the saved values or another --out."
        )
    return record


def _table(space: Space, costs: Sequence[Cost], uniform: Collection[Widths], record: Record):
    """A dict for each network that was evaluated, in that order."""
    axis = next(cost for cost in costs if cost.limit is not None)
    genes = [space.genes(candidate.widths) for candidate in record.archive]
    front = pareto_front(
        [axis.total(some) for some in genes], [candidate.accuracy for candidate in record.archive]
    )
    rows = []
    for candidate, some, on_front in zip(record.archive, genes, front, strict=True):
        row: dict[str, Any] = {"widths": list(candidate.widths)}
        row |= {f"num_{c.name}": int(c.total(some)) for c in costs if c.name != "latency_ms"}
        row |= {c.name: round(c.total(some), 4) for c in costs if c.name == "latency_ms"}
        row["accuracy"] = candidate.accuracy
        row["validation_accuracy"] = record.validation.get(candidate.widths)
        row["generation"] = candidate.generation
        row["uniform"] = candidate.widths in uniform
        row["front"] = on_front
        rows.append(row)
    return rows


# --- the command -----------------------------------------------------------------------------


FLAGS: command_line.Flags = {
    **command_line.WORKDIR,
    "out": (
        str,
        "",
        "The folder to write into; default: search in the work directory, and below it, named by "
        "the budgets, where that holds a search with other settings.",
    ),
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
    **grid.SAMPLE_FLAGS,
    **command_line.DATA_DIR,
}


BUDGETS = ("max_macs", "max_params", "max_latency_ms")


def _check_options(options: flags.FlagValues) -> None:
    if not options.workdir:
        raise UsageError("A search needs --workdir=DIR; see --help.")
    given = {name: getattr(options, name) for name in BUDGETS if getattr(options, name) is not None}
    if not given:
        raise UsageError(
            "A search needs a budget; give --max_macs, --max_params or --max_latency_ms."
        )
    limits = {**given, **({"time_limit": options.time_limit} if options.time_limit else {})}
    for name, value in limits.items():
        if not 0 < value < math.inf:
            raise UsageError(f"--{name} must be above 0 and finite, got {value:g}.")
    least = {"latency_batch": 1, "num_candidates": 1, "num_images": 1, "num_samples": 1}
    command_line.check_at_least(options, **least, population=2, seed=0)


def main(argv: Sequence[str]) -> None:
    config, options = command_line.parse(argv, FLAGS, config_required=False)
    _check_options(options)
    lab.quiet_logging()
    lab.configure_jax()
    opened = lab.open_run(config, options)
    hypernetwork, recipe = opened.hypernetwork, opened.config["train"]
    low, high = recipe["min_width_ratio"], recipe["max_width_ratio"]
    low = low if options.min_ratio is None else options.min_ratio
    high = high if options.max_ratio is None else options.max_ratio
    space = make_space(
        hypernetwork,
        low=low,
        high=high,
        multiple=options.width_multiple,
        depth=options.depth,
    )
    experiment, splits = opened.load()
    grid.evaluation_split(splits, "validation")
    idle = lab.find_idle(experiment, opened.params, splits)
    for line in diagnosis.describe_idle(hypernetwork, idle):
        print(line)
    space = space.without(idle.groups)
    counted = [count_cost(space, name, getattr(options, f"max_{name}")) for name in COUNTED]
    check_budgets(space, counted)

    num_samples = options.num_samples or experiment.evaluation.num_samples
    settings = {name: getattr(options, name) for name in (*BUDGETS, "width_multiple", "depth")}
    settings |= {"min_ratio": low, "max_ratio": high, "num_samples": num_samples}
    settings |= {name: getattr(options, name) for name in ("population", "num_images", "seed")}
    if options.max_latency_ms is not None:
        settings["latency_batch"] = options.latency_batch
    settings["inr"] = lab.file_digest(opened.workdir / checkpoint.INR_FILE)
    out = pathlib.Path(options.out or _folder(opened.workdir / "search", settings))
    with lab.locked(out, name="The folder of --out"):
        record = read_record(out / STATE_FILE, settings)
        if record.strategy == "auto":
            record.strategy = options.strategy
        try:
            network = experiment, opened.params, splits
            _search(out, *network, space, counted, record, (low, high), options)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped after {len(record.archive)} candidates; the same command continues."
            ) from None


def _folder(first: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
    """Where a search goes by default: `first`, or, if that holds another one, below it."""
    record = load_record(first / STATE_FILE)
    if record is None or not lab.differences(record.settings, json.loads(json.dumps(settings))):
        return first
    named = [f"{name}={settings[name]:g}" for name in BUDGETS if settings[name] is not None]
    return first / ",".join([*named, *(["depth"] if settings["depth"] else [])])


COUNTED = ("macs", "params")
_UNITS = {"macs": "multiply-adds", "params": "parameters", "latency_ms": "ms"}
_CPU_BATCH_SIZE = 50  # what the layers pass on stays in the cache; 500 took 1.2 times as long


def _search(out, experiment, params, splits, space, counted, record, ratios, options) -> None:
    """Searches, chooses, and writes what it finds into the folder `out`."""
    state = out / STATE_FILE
    dtype = experiment.preprocessing.dtype

    def latency(widths: Widths) -> float:
        if widths not in record.latencies:
            options_of = {"batch": options.latency_batch, "dtype": dtype}
            measured = measure_latency(space.family, widths, **options_of)
            record.latencies[widths] = measured
        return record.latencies[widths]

    costs = list(counted)
    if options.max_latency_ms is not None:
        print("measuring latencies", flush=True)
        costs.append(latency_cost(space, options.max_latency_ms, latency))
        record.write(state)
        check_budgets(space, costs[-1:])
    # The first budget is the axis of the front.
    costs.sort(key=lambda cost: cost.limit is None)
    uniform = uniform_networks(space, low=ratios[0], high=ratios[1])
    platform = jax.default_backend()
    images, labels = splits.validation_images, splits.validation_labels
    num_images = min(options.num_images, len(labels))
    print(
        f"{space.size:,} networks of {len(space.choices)} groups with widths "
        f"{min(map(min, space.choices))} to {max(map(max, space.choices))}; each candidate on "
        f"{num_images} of {len(labels)} validation images of {experiment.name}",
        flush=True,
    )
    for cost in costs:
        if cost.limit is not None:
            print(f"budget: {_amount(cost, cost.limit)} {_UNITS[cost.name]}")
    if record.archive:
        print(f"continuing after {len(record.archive)} candidates")

    mesh = grid.device_mesh()
    batch_size = experiment.evaluation.batch_size
    if platform == "cpu":
        batch_size = _CPU_BATCH_SIZE * (1 if mesh is None else mesh.size)

    family = experiment.hypernetwork, params
    shared = {"batch_size": batch_size, "mesh": mesh}
    shared |= experiment.noise(record.settings["num_samples"])

    def evaluate(widths):
        record.containers = add_containers(
            space,
            record.containers,
            widths,
            macs_per_container=grid.compilation_macs(platform) / num_images,
        )
        result = grid.evaluate_grid(
            *family,
            np.array(widths, np.int32),
            images[:num_images],
            labels[:num_images],
            experiment.preprocessing,
            containers=record.containers,
            strategy=record.strategy,
            **shared,
        )
        record.strategy = result.strategy
        return result.accuracy.tolist()

    def complete(known, widths, split):
        """Adds the accuracies of `widths` on an entire split to `known`."""
        missing = [row for row in dict.fromkeys(widths) if row not in known]
        if missing:
            images, labels = grid.evaluation_split(splits, split)
            print(f"{len(missing)} networks on all {len(labels)} {split} images", flush=True)
            options = {**shared, "strategy": "loop" if len(missing) == 1 else record.strategy}
            grid.Evaluator(
                *family, images, labels, experiment.preprocessing, options=options, known=known
            ).evaluate(missing)
            record.write(state)

    started, before, first = time.perf_counter(), record.seconds, len(record.archive)

    def on_generation(archive):
        record.archive = archive
        elapsed = time.perf_counter() - started
        record.seconds = round(before + elapsed, 1)
        record.write(state)
        remaining = (options.num_candidates - len(archive)) * elapsed / (len(archive) - first)
        leader = max(archive, key=lambda candidate: candidate.accuracy)
        amount = costs[0].total(space.genes(leader.widths))
        print(
            f"generation {archive[-1].generation} | {len(archive)}/{options.num_candidates} "
            f"candidates | best {100 * leader.accuracy:.2f} % at {_amount(costs[0], amount)} "
            f"{_UNITS[costs[0].name]} | {len(record.containers)} shapes | "
            f"{format_seconds(elapsed)}, ETA {format_seconds(remaining)}",
            flush=True,
        )
        return options.time_limit is None or elapsed < 60 * options.time_limit

    evolve(
        space,
        costs,
        uniform,
        evaluate,
        num_candidates=options.num_candidates,
        population=options.population,
        seed=options.seed,
        archive=record.archive,
        on_generation=on_generation,
    )

    def finalists_of(some, number):
        ranked = sorted(some, key=lambda c: (-c.accuracy, costs[0].total(space.genes(c.widths))))
        limit = options.max_latency_ms
        fitting = (c.widths for c in ranked if limit is None or latency(c.widths) <= limit)
        return list(itertools.islice(fitting, number))

    # The estimate of a latency may be too low for all, but the smallest network was measured.
    finalists = finalists_of(record.archive, NUM_FINALISTS) or [
        space.widths([0] * len(space.choices))
    ]
    uniform_finalists = finalists_of(
        [c for c in record.archive if c.widths in set(uniform)], NUM_UNIFORM_FINALISTS
    )
    together = list(dict.fromkeys([*finalists, *uniform_finalists]))
    if num_images == len(labels):
        record.validation |= {c.widths: c.accuracy for c in record.archive if c.widths in together}
    complete(record.validation, together, "validation")

    def best(some):
        return min(some, key=lambda w: (-record.validation[w], costs[0].total(space.genes(w)), w))

    winners = {"searched": best(together)}
    if uniform_finalists:
        winners["uniform"] = best(uniform_finalists)
    if options.test:
        complete(record.test, winners.values(), "test")
    _write(out, experiment, space, costs, uniform, record, winners, options)


def _write(out, experiment, space, costs, uniform, record, winners, options) -> None:
    """Writes the tables, the figure and best.json, and prints what was found."""
    axis = costs[0]
    rows = _table(space, costs, set(uniform), record)
    described = {}
    for name, widths in winners.items():
        described[name] = {
            "num_params": space.family.num_params(widths),
            "num_macs": space.family.num_macs(widths),
            "validation_accuracy": record.validation[widths],
        }
        if widths in record.latencies:
            described[name]["latency_ms"] = round(record.latencies[widths], 4)
        if options.test:
            described[name]["test_accuracy"] = record.test[widths]
    shared = {
        "dataset": experiment.name,
        "budget": {cost.name: cost.limit for cost in costs if cost.limit is not None},
        "num_candidates": len(record.archive),
        "seed": options.seed,
        "num_images": options.num_images,
        "seconds": record.seconds,
        "versions": lab.versions(),
    }
    best: dict[str, Any] = morph_to_dict(experiment.hypernetwork, winners["searched"])
    best |= {**described["searched"], **shared, "uniform": None}
    if "uniform" in winners:
        best["uniform"] = {"widths": list(winners["uniform"]), **described["uniform"]}
    storage.write_json(out / "best.json", best)
    front = {"front_over": axis.name, "best": list(winners["searched"]), **shared, "rows": rows}
    storage.write_json(out / "pareto.json", front)
    plotting.plot_search(
        out / "pareto.png",
        rows,
        title=f"{experiment.network}, {experiment.name}: {len(rows)} networks from one INR",
        column=axis.name if axis.name == "latency_ms" else f"num_{axis.name}",
        limit=axis.limit,
        winner=winners["searched"],
    )
    print(f"wrote {out / 'best.json'}; pareto.json, pareto.csv and pareto.png")
    for name, widths in winners.items():
        found = described[name]
        latency = f", {found['latency_ms']:.3f} ms" if "latency_ms" in found else ""
        test = f", test {100 * found['test_accuracy']:.2f} %" if options.test else ""
        label = "searched" if name == "searched" else "best uniform"
        print(
            f"{label}: hidden widths {','.join(map(str, widths))}: {found['num_macs'] / 1e6:.2f} M "
            f"multiply-adds, {found['num_params']:,} parameters{latency}; validation "
            f"{100 * found['validation_accuracy']:.2f} %{test}"
        )
    note_range(experiment, winners["searched"])


if __name__ == "__main__":
    command_line.run(main)
