"""One HTML file to look at what a run's networks can do; it needs a browser and no network.

`render` puts the numbers into page_template.html, whose script draws them: sliders, the accuracy
over the width axis, and the Pareto front.
"""

import html
import importlib.resources
import json
import os
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

from neumeta_jax.errors import UsageError, check
from neumeta_jax.evaluation.rows import GridRow
from neumeta_jax.files import storage
from neumeta_jax.networks.cifar_resnet import STREAM_GROUPS
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.families import Family

TEMPLATE = "page_template.html"
LATENCY_FILE = "latency.json"


def network_entries(
    rows: Sequence[GridRow], family: Family, latency: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The distinct networks of `rows` as the page shows them, by ratio; the first of equals counts.

    Args:
        rows: of `family`, from one or several evaluations.
        latency: the document that `neumeta latency` writes; its measurements go to the networks of
            the same widths.
    """
    measured = _measurements(latency or {"rows": []})
    distinct: dict[tuple[int, ...], GridRow] = {}
    for row in rows:
        distinct.setdefault(row.widths, row)
    entries = []
    for row in sorted(distinct.values(), key=lambda row: (row.width_ratio, row.num_macs)):
        entry = {
            "ratio": row.width_ratio,
            "widths": list(row.widths),
            "shown": describe_widths(row.widths),
            "depth": family.num_layers(row.widths),
            "params": row.num_params,
            "macs": row.num_macs,
            "accuracy": row.accuracy,
            "trained": row.trained,
            "interval": row.interval and list(row.interval),
            "int8": row.int8_accuracy,
            "latency": measured.get(row.widths),
        }
        entries.append({name: value for name, value in entry.items() if value is not None})
    return entries


def describe_widths(widths: Sequence[int]) -> str:
    """The different widths of a network, and how many of its residual branches are skipped.

    >>> describe_widths((2, 0, 4, 0, 0))
    '2 / 4, 3 blocks skipped'
    """
    kept = " / ".join(str(width) for width in dict.fromkeys(widths) if width) or "none"
    number = list(widths).count(0)
    return kept + (f", {number} block{'s' * (number > 1)} skipped" if number else "")


def _measurements(latency: Mapping[str, Any]) -> dict[tuple[int, ...], dict[str, Any]]:
    """{"p50_ms", "p90_ms"} by what was measured, such as "jax, batch 1", by widths."""
    return {
        tuple(row["widths"]): {
            f"{backend}, batch {batch}": {name: values[name] for name in ("p50_ms", "p90_ms")}
            for backend, batches in row["latency"].items()
            for batch, values in batches.items()
        }
        for row in latency["rows"]
    }


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as text by dotted name.

    >>> flatten({"data": {"name": "digits", "mean": []}})
    {'data.name': 'digits', 'data.mean': '[]'}
    """
    flat: dict[str, str] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def page_document(
    rows: Sequence[GridRow],
    family: Family,
    *,
    heading: tuple[str, str],
    trained_range: tuple[float, float],
    teacher_accuracy: float | None = None,
    latency: Mapping[str, Any] | None = None,
    about: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What `render` puts into the page, as JSON types.

    Args:
        rows: at least one network of `family`, see `network_entries`.
        heading: the first two lines; the second says on what images, see `plotting.caveats`.
        trained_range: smallest and largest width ratio seen in training, shaded.
        teacher_accuracy: in [0, 1], drawn as a dashed line.
        latency: the document that `neumeta latency` writes.
        about: the "config" of the run and "versions" of software, shown as tables.
    """
    check(rows, "A page needs at least one evaluated network, got none.")
    hidden = isinstance(family.spec, ResNetSpec) and not set(family.names) & set(STREAM_GROUPS)
    about = about or {"config": {}, "versions": {}}
    device = {"latency measured on": latency["device"]} if latency else {}
    return {
        "title": heading[0],
        "subtitle": heading[1],
        "channels": "hidden channels" if hidden else "channels",
        "trained_range": list(trained_range),
        "teacher_accuracy": teacher_accuracy,
        "full": {"params": family.spec.num_params, "macs": family.spec.num_macs},
        "networks": network_entries(rows, family, latency),
        "config": flatten(about["config"]),
        "versions": flatten(about["versions"]) | device,
    }


def render(document: Mapping[str, Any]) -> str:
    """The page of `page_document` as HTML.

    The data are JSON in a script element of its own, where "<" would be read as HTML: it becomes
    an escape of JSON's.
    """
    template = importlib.resources.files("neumeta_jax.report").joinpath(TEMPLATE).read_text("utf-8")
    title = html.escape(document["title"])
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return string.Template(template).substitute(title=title, data=text)


def write_page(path: str | os.PathLike, document: Mapping[str, Any]) -> None:
    """Writes `render(document)`; an existing file is replaced once the new one is complete."""
    storage.write_text(path, render(document))


def read_latency(path: str | os.PathLike) -> dict[str, Any] | None:
    """The document that `neumeta latency` wrote to `path`, or None without a file.

    Raises:
        UsageError: if it is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
        _measurements(document)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{path} must be what neumeta latency writes, but it is damaged; remove it or measure "
            "again."
        ) from None
    return document
