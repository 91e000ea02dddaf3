"""Networks whose blocks have widths of their own: the files that name one, and checks."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from neumeta_jax import architecture, experiment as lab
from neumeta_jax.command_line import UsageError
from neumeta_jax.hypernetwork import Hypernetwork


def morph_to_dict(hypernetwork: Hypernetwork, widths: Sequence[int]) -> dict[str, Any]:
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


def load_morph(path: str | os.PathLike, hypernetwork: Hypernetwork) -> tuple[int, ...]:
    """The widths in a JSON file of `morph_to_dict`, checked against the family.

    Other fields than its three are left alone, so that a search can note what it found.

    Raises:
        ValueError: if there is no such file, or it is damaged or belongs to another family.
    """
    try:
        fields = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--spec={path} must be a file, but {error.strerror}.") from None
    except ValueError:
        raise UsageError(f"{path} must be JSON, but it is damaged; write it again.") from None
    missing = {"widths", "spec", "blocks"} - set(fields if isinstance(fields, dict) else ())
    if missing:
        raise UsageError(
            f"{path} must hold widths, spec and blocks of one network, but it lacks "
            f"{', '.join(sorted(missing))}."
        )
    wanted = morph_to_dict(hypernetwork, ())
    if fields["spec"] != wanted["spec"] or fields["blocks"] != wanted["blocks"]:
        differing = _first_difference(fields, wanted)
        raise UsageError(
            f"{path} must belong to this run's architecture, but it is of another one ({differing})"
            "; use the work directory that it was made with."
        )
    widths = fields["widths"]
    if not isinstance(widths, list) or any(type(width) is not int for width in widths):
        raise UsageError(f"{path} must hold widths as a list of integers, got {widths!r}.")
    return check_widths(hypernetwork, widths)


def _first_difference(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    spec = fields["spec"]
    if isinstance(spec, dict):
        for name, value in wanted["spec"].items():
            if spec.get(name) != value:
                return f"{name} {spec.get(name)} there, {value} here"
    if fields["blocks"] != wanted["blocks"]:
        return f"blocks {fields['blocks']} there, {wanted['blocks']} here"
    return "other fields in its spec"


def check_widths(hypernetwork: Hypernetwork, widths: Sequence[int]) -> tuple[int, ...]:
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


def note_range(experiment: lab.Experiment, widths: Sequence[int]) -> None:
    """Prints which blocks, if any, have widths outside the trained range."""
    low, high = experiment.trained_range
    blocks = experiment.hypernetwork.blocks
    lowest = architecture.widths_at(experiment.spec, blocks, low)
    highest = architecture.widths_at(experiment.spec, blocks, high)
    names = [experiment.spec.blocks[n].name for n in blocks]
    bounds = zip(names, lowest, widths, highest, strict=True)
    outside = [name for name, a, width, b in bounds if not a <= width <= b]
    if outside:
        print(
            f"note: the widths of {', '.join(outside)} lie outside the trained range of width "
            f"ratios, {low}..{high}"
        )
