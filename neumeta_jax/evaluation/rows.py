"""What is known of one network after its evaluation, as a value, in files and in tables."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from neumeta_jax.errors import check

NORMAL_95 = 1.959964  # standard deviations on both sides of a mean that hold 95 %


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One network of the grid.

    Attributes:
        width_ratio: kept fraction of the hidden channels; the papers' gamma is 1 - width_ratio.
        widths: of the elastic groups; 0 = branch skipped.
        num_params, num_macs: of the whole dense network.
        accuracy: top-1 in [0, 1].
        trained: whether the ratio lies in the trained range.
        agreement, kl_divergence, calibration_error, worst_class, worst_class_drop: against the
            full network, see `consistency.Consistency`; None where they were not asked for.
        int8_accuracy: with weights rounded to 8 bits (see `quantize`); None: not evaluated.
        num_images, interval: that it was measured on, and `accuracy_interval` of it.
    """

    width_ratio: float
    widths: tuple[int, ...]
    num_params: int
    num_macs: int
    accuracy: float
    trained: bool
    agreement: float | None = None
    kl_divergence: float | None = None
    calibration_error: float | None = None
    worst_class: int | None = None
    worst_class_drop: float | None = None
    int8_accuracy: float | None = None
    num_images: int | None = None
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without an 8-bit accuracy that was not measured."""
        return {k: v for k, v in vars(self).items() if k != "int8_accuracy" or v is not None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "GridRow":
        """The row that `fields` hold among others."""
        names = [field.name for field in dataclasses.fields(cls)]
        row = {name: fields[name] for name in names if name in fields}
        tuples = {name: tuple(row[name]) for name in ("widths", "interval") if row.get(name)}
        return cls(**{**row, **tuples})


def accuracy_interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) of a share that was measured on `num_images` images.

    >>> [round(bound, 3) for bound in accuracy_interval(0.9, 100)]
    [0.826, 0.945]
    """
    z2 = NORMAL_95**2 / num_images
    center = (accuracy + z2 / 2) / (1 + z2)
    half = math.sqrt(accuracy * (1 - accuracy) * z2 + z2**2 / 4) / (1 + z2)
    return max(0.0, center - half), min(1.0, center + half)


class Dip(NamedTuple):
    """How far an accuracy falls below the line through its neighbours, in [0, 1], and its ratio."""

    fall: float
    where: float | None

    def __str__(self) -> str:
        if self.where is None:
            return "no width falls below the line through its neighbours"
        return (
            f"largest fall below the line through the neighbours: {100 * self.fall:.2f} points at "
            f"width ratio {self.where:.3f}"
        )


def largest_dip(ratios: Sequence[float], accuracies: Sequence[float]) -> Dip:
    """The largest fall of an interior point below the straight line through its two neighbours.

    Zero at no width where no point lies below; the first of several equal falls.

    >>> largest_dip([0.5, 0.75, 1.0], [0.5, 0.5, 0.75]).fall
    0.125

    Args:
        ratios: width ratios, increasing.
        accuracies: of the same length, in [0, 1].
    """
    x, y = np.asarray(ratios, np.float64), np.asarray(accuracies, np.float64)
    check(
        len(x) == len(y),
        f"largest_dip needs one accuracy for each width ratio, got {len(y)} for {len(x)}.",
    )
    check(
        np.all(x[1:] > x[:-1]),
        f"largest_dip needs width ratios that increase, got {x.tolist()}; sort them and leave out "
        "repeated ones.",
    )
    if len(x) < 3:
        return Dip(0.0, None)
    weight = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    # The left neighbour plus a share of the difference: of equal accuracies it is exactly theirs.
    falls = y[:-2] + weight * (y[2:] - y[:-2]) - y[1:-1]
    deepest = int(np.argmax(falls))
    if not falls[deepest] > 0:
        return Dip(0.0, None)
    return Dip(float(falls[deepest]), float(x[1 + deepest]))


# --- tables ----------------------------------------------------------------------------------

_COUNTS = (
    "parameters",
    " MACs (M)",
    " top-1 %",
    "agrees %",
    "KL nats",
    " ECE %",
    "  worst class",
)
COUNTS_HEADER = "  ".join([*_COUNTS, "range"])
TABLE_HEADER = f"{'ratio':>6}  {'widths':>12}  {COUNTS_HEADER}"


def format_row(row: GridRow) -> str:
    """A line of the table under `TABLE_HEADER`."""
    return f"{row.width_ratio:6.3f}  {format_widths(row.widths):>12}  {format_counts(vars(row))}"


def format_counts(row: Mapping[str, Any]) -> str:
    """The columns under `COUNTS_HEADER` of a row's fields; blanks if it was not compared.

    The worst class is the one that loses most, "none" if none loses.
    """
    compared = ["", "", "", ""]
    if row.get("agreement") is not None:
        loss = 100 * row["worst_class_drop"]
        compared = [
            f"{100 * row['agreement']:.2f}",
            f"{row['kl_divergence']:.4f}",
            f"{100 * row['calibration_error']:.2f}",
            f"{row['worst_class']} (-{loss:.1f})" if loss > 0 else "none",
        ]
    cells = [
        f"{row['num_params']:,}",
        f"{row['num_macs'] / 1e6:.2f}",
        f"{100 * row['accuracy']:.2f}",
        *compared,
    ]
    padded = [cell.rjust(len(title)) for cell, title in zip(cells, _COUNTS, strict=True)]
    return "  ".join([*padded, "trained" if row["trained"] else "unseen"])


def format_widths(widths: Sequence[int]) -> str:
    """The different widths, or the smallest and the largest of many."""
    distinct = sorted(set(widths))
    shown = "/".join(map(str, distinct))
    return shown if len(distinct) <= 4 else f"{distinct[0]}..{distinct[-1]}"
