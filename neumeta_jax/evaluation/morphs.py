"""Networks by the widths of their elastic groups: checks, files that name them, trained range."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from neumeta_jax.core.recipe import InrRecipe
from neumeta_jax.core.sizes import skippable
from neumeta_jax.elastic.widths import MAX_WIDTH_RATIO
from neumeta_jax.errors import UsageError, check
from neumeta_jax.networks.families import Family

Widths = tuple[int, ...]


def check_rows(family: Family, widths: Any) -> list[Widths]:
    """`widths` int[networks, names] as tuples, if each row lies within 1.5 times the full size."""
    names, rows = family.names, np.asarray(widths)
    check(
        rows.ndim == 2 and rows.shape[1] == len(names) and len(rows),
        "widths must be int[networks, names] with at least one row and a column for each of the "
        f"{len(names)} elastic groups, got shape {rows.shape}.",
    )
    check(
        np.issubdtype(rows.dtype, np.integer),
        "widths must be integers (numbers of channels, not ratios; Hypernetwork.widths(ratio) "
        f"makes them), got {rows.dtype}.",
    )
    lowest, highest = np.array(family.lowest), family.widths(MAX_WIDTH_RATIO)
    for row, column in np.argwhere((rows < lowest) | (rows > highest))[:1]:
        where = f" in row {row} of widths" if len(rows) > 1 else ""
        raise UsageError(
            f"{names[column]} takes widths from {lowest[column]} to {highest[column]}, got "
            f"{rows[row, column]}{where}."
        )
    return [tuple(row) for row in rows.tolist()]


def check_widths(family: Family, widths: Sequence[int]) -> Widths:
    """`widths` of one network, checked as those of `check_rows`."""
    check(
        len(widths) == len(family.names),
        f"widths must have one entry for each of the {len(family.names)} elastic groups, got "
        f"{len(widths)}.",
    )
    return check_rows(family, [widths])[0]


def morph_to_dict(family: Family, widths: Sequence[int]) -> dict[str, Any]:
    """One network of a family as plain JSON types, for `--spec=FILE`.

    Returns:
        {"widths": channels of each elastic group (0 = skipped), and what `describe` of the
        family says, which tells whose widths these are}.
    """
    return {"widths": [int(width) for width in widths], **family.describe()}


def load_morph(path: str | os.PathLike, family: Family) -> Widths:
    """The widths in a JSON file of `morph_to_dict`, checked against the family.

    A file written by hand needs {"widths": [...]} alone. Other fields are left alone, so that a
    search can note what it found.

    Raises:
        ValueError: if there is no such file, or it is damaged or belongs to another family.
    """
    try:
        fields = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--spec={path} must be a file, but {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} must be JSON, but it is damaged; write it again.") from None
    check(
        isinstance(fields, dict) and "widths" in fields,
        f'{path} must hold one network as {{"widths": [...]}}, hidden channels of each block, but '
        "it has no widths; add them.",
    )
    wanted = family.describe()
    differing = _first_difference({**wanted, **fields}, wanted)
    check(
        not differing,
        f"{path} must belong to this run's architecture, but it is of another one ({differing}); "
        "use the work directory that it was made with.",
    )
    widths = fields["widths"]
    check(
        isinstance(widths, list) and all(type(width) is int for width in widths),
        f"{path} must hold widths as a list of integers, got {str(widths)[:80]!r}.",
    )
    return check_widths(family, widths)


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


def outside_range(family: Family, recipe: InrRecipe, widths: Sequence[int]) -> list[str]:
    """Names of the groups whose widths lie outside the trained range.

    A skipped block lies inside where training skips as many blocks of its stage.
    """
    skipped = set()
    for _, members, most in skippable(family, recipe.max_skipped) if recipe.skip_blocks else ():
        zeros = [position for position in members if widths[position] == 0]
        skipped |= set(zeros if len(zeros) <= most else ())
    lowest = family.widths(recipe.min_width_ratio)
    bounds = zip(family.names, lowest, widths, family.full_widths, strict=True)
    return [
        name
        for position, (name, first, width, last) in enumerate(bounds)
        if not first <= width <= last and position not in skipped
    ]


def note_range(family: Family, recipe: InrRecipe, widths: Sequence[int]) -> None:
    """Prints which groups, if any, have widths outside the trained range."""
    if outside := outside_range(family, recipe, widths):
        trained = f"{recipe.min_width_ratio}..1.0"
        print(
            f"note: the widths of {', '.join(outside)} lie outside what was trained, width ratios "
            f"{trained}{' and skipped blocks' if recipe.skip_blocks else ''}"
        )
