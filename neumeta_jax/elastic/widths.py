"""Widths at a ratio of the full size."""

import math
from collections.abc import Sequence

MAX_WIDTH_RATIO = 1.5


def check_width_ratio(width_ratio: float) -> float:
    """`width_ratio` itself, if it lies in (0, 1.5]."""
    if not 0 < width_ratio <= MAX_WIDTH_RATIO:
        raise ValueError(
            f"A width ratio must lie in (0, {MAX_WIDTH_RATIO}], got {width_ratio}; 1 is the "
            "full-size network."
        )
    return float(width_ratio)


def widths_at(full_widths: Sequence[int], width_ratio: float) -> tuple[int, ...]:
    """Widths where each keeps `width_ratio` of its channels, rounded, at least one.

    The papers' compression rate gamma is `1 - width_ratio`.

    >>> widths_at((16, 32), 0.37)
    (6, 12)
    """
    check_width_ratio(width_ratio)
    return tuple(max(1, math.floor(width_ratio * width + 0.5)) for width in full_widths)
