"""Which networks a search chooses from, and what they may cost."""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from neumeta_jax.elastic.widths import check_width_ratio
from neumeta_jax.errors import check
from neumeta_jax.networks.families import Family

Widths = tuple[int, ...]

NUM_SHALLOW = 5  # uniform networks of each smaller depth in the first population
LATENCY_WIDTHS = 6  # measured for each shape of blocks, straight lines between
UNITS = {"macs": "multiply-adds", "params": "parameters", "latency_ms": "ms"}


@dataclasses.dataclass(frozen=True)
class Space:
    """The networks to choose from; one has `genes`, the numbers of its widths in `choices`.

    Attributes:
        family: whose networks they are.
        choices: widths of each of its groups, increasing; 0 = skipped.
    """

    family: Family
    choices: tuple[Widths, ...]

    def widths(self, genes: Sequence[int]) -> Widths:
        return tuple(map(tuple.__getitem__, self.choices, genes))

    def genes(self, widths: Sequence[int]) -> list[int]:
        return list(map(tuple.index, self.choices, widths))

    def without(self, positions: Collection[int]) -> "Space":
        """The same with some of the groups left out of every network."""
        choices = [(0,) if n in positions else c for n, c in enumerate(self.choices)]
        return dataclasses.replace(self, choices=tuple(choices))

    @property
    def size(self) -> int:
        return math.prod(map(len, self.choices))

    @property
    def ends(self) -> tuple[Widths, Widths]:
        """The smallest and the largest network."""
        return tuple(c[0] for c in self.choices), tuple(c[-1] for c in self.choices)

    @property
    def lowest(self) -> list[int]:
        """The gene of each block that does not skip it, where that is a choice."""
        return [int(choices[0] == 0 and len(choices) > 1) for choices in self.choices]


def make_space(
    family: Family, *, low: float, high: float, multiple: int = 1, depth: bool = False
) -> Space:
    """Every group between `low` and `high` of its full width, in multiples of `multiple`.

    With `depth`, branches of a residual stream may be skipped.

    Raises:
        UsageError: for ratios out of range or exchanged, or a group without any such width.
    """
    ordered = check_width_ratio(low) <= check_width_ratio(high)
    check(ordered, f"--min_ratio must not exceed --max_ratio, got {low} and {high}.")
    check(multiple >= 1, f"--width_multiple must be at least 1, got {multiple}.")
    choices = []
    ranges = family.widths(low).tolist(), family.widths(high).tolist()
    for name, lowest, first, last in zip(family.names, family.lowest, *ranges, strict=True):
        allowed = tuple(range(-(-first // multiple) * multiple, last + 1, multiple))
        check(
            allowed,
            f"{name} takes widths from {first} to {last}, of which none is a multiple of "
            f"{multiple}; use a smaller --width_multiple or other ratios.",
        )
        choices.append(((0,) if depth and lowest == 0 else ()) + allowed)
    return Space(family, tuple(choices))


def uniform_networks(space: Space, *, low: float, high: float) -> list[Widths]:
    """Every network of `space` whose blocks keep one ratio from `low` to `high`, by size.

    Each width is the nearest allowed one to the ratio's, of two as near the larger; none is 0 where
    that is possible.
    """
    # All ratios at which a width changes.
    steps = {
        (width - 0.5) / whole + 1e-9
        for whole in set(space.family.full_widths)
        for width in range(1, math.ceil(high * whole) + 1)
    }
    wide = [[choice for choice in choices if choice] or choices for choices in space.choices]

    def nearest(choices: Sequence[int], width: int) -> int:
        return min(choices, key=lambda choice: (abs(choice - width), -choice))

    ratios = sorted({low, high} | {step for step in steps if low < step < high})
    rows = (map(nearest, wide, space.family.widths(ratio).tolist()) for ratio in ratios)
    return list(dict.fromkeys(map(tuple, rows)))


# --- costs -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a network costs, and a budget for it.

    Attributes:
        name: of the flag, without "max_".
        limit: the budget, or None for something that is only reported.
        total: of a network's widths.
    """

    name: str
    limit: float | None
    total: Callable[[Widths], float]

    @property
    def column(self) -> str:
        return self.name if self.name == "latency_ms" else f"num_{self.name}"

    def text(self, amount: float) -> str:
        return f"{amount:.3f}" if self.name == "latency_ms" else f"{amount:,.0f}"


def allows(costs: Sequence[Cost], widths: Widths) -> bool:
    return all(cost.limit is None or cost.total(widths) <= cost.limit for cost in costs)


def count_cost(family: Family, name: str, limit: float | None = None) -> Cost:
    """The cost "macs" (multiply-adds of an image) or "params" (parameters), exactly."""
    return Cost(name, limit, getattr(family, f"num_{name}"))


def latency_cost(space: Space, limit: float | None, measure: Callable[[Widths], float]) -> Cost:
    """Latency as a sum over the groups, from a few networks measured whole.

    Groups of one size and cost share a table: the network is measured with all of them at one width
    and the others at their largest, at `LATENCY_WIDTHS` widths with straight lines between. Lookup
    tables of layers are how ProxylessNAS (Cai et al. 2019, arXiv 1812.00332) models latency.

    `limit` is in milliseconds, as is what `measure` returns for a network's widths.
    """
    full, (smallest, largest) = np.array(space.family.full_widths), space.ends
    narrower = full - np.eye(len(full), dtype=int)
    per_channel = space.family.num_macs(full) - space.family.num_macs(narrower)
    alike: dict[tuple, list[int]] = {}
    for position, key in enumerate(zip(full, per_channel, space.choices, strict=True)):
        alike.setdefault(key, []).append(position)
    fastest, slowest = measure(smallest), measure(largest)
    tables: list[dict[int, float]] = [{} for _ in space.choices]  # of each width
    for (*_, choices), positions in alike.items():
        picked = np.linspace(0, len(choices) - 1, LATENCY_WIDTHS).round().astype(int).tolist()
        skips = [1] if choices[0] == 0 and len(choices) > 1 else []  # skipping is no straight line
        picked, saved = sorted({*picked, *skips}), [0.0]
        for number in picked[-2::-1]:
            widths = np.array(largest)
            widths[positions] = choices[number]
            change = (measure(tuple(widths.tolist())) - slowest) / len(positions)
            saved.append(min(change, saved[-1]))  # noise must not make a wider block cheaper
        values = np.interp(choices, [choices[number] for number in picked], saved[::-1])
        for position in positions:
            tables[position] = dict(zip(choices, values.tolist(), strict=True))
    # Exact at both ends.
    slowest = max(fastest, slowest)
    total = sum(map(dict.__getitem__, tables, smallest))
    scale = (slowest - fastest) / -total if total else 0.0
    return Cost(
        "latency_ms",
        limit,
        lambda widths: slowest + scale * sum(map(dict.__getitem__, tables, widths)),
    )


def check_budgets(space: Space, costs: Sequence[Cost], noise: float = 0.0) -> list[str]:
    """Notes on budgets that decide nothing, as all networks keep them or differ by `noise` ms.

    Raises:
        UsageError: if the smallest network breaks a budget, saying what is possible.
    """
    notes = []
    for cost in costs:
        if cost.limit is None:
            continue
        low, high = map(cost.total, space.ends)
        least, most, limit = map(cost.text, (low, high, cost.limit))
        check(
            low <= cost.limit,
            f"--max_{cost.name} must be at least {least}, got {limit}; the networks to choose from "
            f"have {least} to {most}, a smaller --min_ratio or --depth allows smaller ones.",
        )
        if high <= cost.limit:
            notes.append(
                f"--max_{cost.name}={cost.limit:.12g} excludes no network, as the largest to "
                f"choose from has {most} {UNITS[cost.name]}"
            )
        if cost.name == "latency_ms" and noise >= high - low:
            notes.append(
                f"latencies are noise here: the smallest and the largest network differ by "
                f"{high - low:.3f} ms, two measurements of one by {noise:.3f} ms; raise "
                "--latency_batch or give another budget"
            )
    return notes


def shallow_networks(
    space: Space, costs: Sequence[Cost], uniform: Sequence[Widths]
) -> list[Widths]:
    """Of each smaller depth the `NUM_SHALLOW` largest of `uniform` that keep the budgets.

    Depths are those of `Hypernetwork.without_last`: 1, 2, ... blocks of each stage left out.
    """
    family, found = space.family, []
    stages = zip(family.stages, space.lowest, strict=True)
    skippable = collections.Counter(stage for stage, lowest in stages if lowest)
    for number in range(1, max(skippable.values(), default=0) + 1):
        shorter = dict.fromkeys(family.without_last(widths, number) for widths in uniform)
        inside = (row for row in shorter if all(map(tuple.__contains__, space.choices, row)))
        fitting = [row for row in inside if allows(costs, row)]
        found += sorted(fitting, key=lambda row: -family.num_macs(row))[:NUM_SHALLOW]
    return found
