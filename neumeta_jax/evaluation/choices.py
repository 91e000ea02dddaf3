"""Which networks to evaluate: of a few width ratios, at random, or without blocks."""

import functools
from collections.abc import Sequence

import numpy as np

from neumeta_jax.elastic.widths import check_width_ratio
from neumeta_jax.errors import UsageError, check
from neumeta_jax.evaluation.morphs import Widths
from neumeta_jax.networks.families import Family

SWEEP_RATIOS = tuple(round(float(ratio), 10) for ratio in np.linspace(0.1, 1.25, 24))
NUM_UNIFORM = 24

Range = tuple[float, float]  # of the width ratios that were trained


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


def parse_skipped(values: Sequence[str] | None) -> tuple[int, ...]:
    """Numbers of `--skipped_blocks`, increasing; empty where none were given."""
    for value in values or ():
        check(
            value.isdecimal(),
            f"--skipped_blocks takes numbers of blocks from 0 on with commas between, got "
            f"{value!r}.",
        )
    return tuple(sorted({int(value) for value in values or ()}))


def at_ratios(family: Family, width_ratios: Sequence[float]) -> list[Widths]:
    return [tuple(family.widths(ratio).tolist()) for ratio in width_ratios]


def _check_drawing(trained: Range, flag: str, number: int, seed: int) -> None:
    low, high = trained
    check(
        number >= 1 and seed >= 0,
        f"{flag} must be at least 1 and --seed at least 0, got {number} and {seed}; choose larger "
        "ones.",
    )
    check(
        low < high,
        f"{flag} needs a run that trained more than one width, but its range is {low}..{high}; use "
        "--width_ratios or --spec.",
    )


def draw_width_ratios(trained: Range, number: int, seed: int) -> tuple[float, ...]:
    """`number` width ratios, uniformly from the trained range, increasing."""
    _check_drawing(trained, "--random_ratios", number, seed)
    return tuple(np.sort(np.random.default_rng(seed).uniform(*trained, number)).tolist())


def draw_networks(family: Family, trained: Range, number: int, seed: int) -> list[Widths]:
    """`number` networks, the width ratio of each group uniformly from the trained range."""
    _check_drawing(trained, "--random_networks", number, seed)
    full = np.array(family.full_widths)
    ratios = np.random.default_rng(seed).uniform(*trained, (number, len(full)))
    widths = np.maximum(np.floor(ratios * full + 0.5).astype(int), 1)
    return [tuple(row) for row in widths.tolist()]


def uniform_networks(family: Family, trained: Range) -> list[Widths]:
    """Networks with one width ratio for all groups, over the trained range."""
    return list(dict.fromkeys(at_ratios(family, np.linspace(*trained, NUM_UNIFORM).tolist())))


def depth_networks(
    family: Family, skipped: Sequence[int], width_ratios: Sequence[float]
) -> dict[tuple[int, float], Widths]:
    """Every ratio without the last 0, 1, ... generated blocks of each stage, by (number, ratio).

    Raises:
        UsageError: for a number of blocks that leaves out no more than a smaller one.
    """
    without = functools.partial(family.without_last, [1] * len(family.names))
    for number in skipped:
        check(
            not number or without(number) != without(number - 1),
            "--skipped_blocks takes numbers of blocks that a stage of this run can be without, "
            f"got {number}; no stage has as many, give smaller ones.",
        )
    return {
        (number, ratio): family.without_last(family.widths(ratio).tolist(), number)
        for number in skipped
        for ratio in sorted(set(width_ratios))
    }
