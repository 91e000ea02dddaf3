"""Figures. Each has its numbers in a CSV or JSON file beside it.

All functions take the `path` of the PNG to write, which replaces an existing file once it is
complete, as does the CSV beside it, the figure's `title`, and a `caption` that is written below
(see `caveats`). A `trained_range`, the smallest and the largest width ratio seen in training, is
shaded; a `teacher_accuracy`, in [0, 1], is a dashed line. Bars and bands are 95 % intervals. No
axis is stretched by what was never trained: what lies below it is written at its foot.
"""

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neumeta_jax.evaluation.rows import GridRow, accuracy_interval
from neumeta_jax.files import storage
from neumeta_jax.report.published import CURVES_NOTE, Curve, Single

TRAINED, UNSEEN = "#1f5fa8", "#c8501e"
# One for each published curve; none is a color of the run.
REFERENCES = (("0.25", "s"), ("#4c8c4a", "^"), ("#8a5fa8", "v"), ("#b08a2e", "P"))
COLORS = (TRAINED, UNSEEN, "#4c8c4a", "#8a5fa8", "#b08a2e", "0.35", "#c23b80", "#2a9d9d")
RATIO = "kept width (ratio)"
MACS, TOP_1 = "multiply-adds (millions)", "top-1 accuracy (%)"
_SPAN = 5.0  # percent that the colours of a heat map span at least: less may be chance
_FAR = 2 / 3  # of the best accuracy: methods below are told, not drawn

Rows = Sequence[Mapping[str, Any]]


def caveats(split: str, num_images: int, *, seed: int | None = None, imported: bool = False) -> str:
    """What has to be said of accuracies on a split: its images, the seeds, and who has seen them.

    >>> caveats("validation", 5000, seed=0, imported=True)
    '5,000 validation images; one seed (0); the teacher may have been trained on these images.'
    """
    parts = [f"{num_images:,} {split} images"]
    parts += [] if seed is None else [f"one seed ({seed})"]
    if split == "validation" and imported:
        parts.append("the teacher may have been trained on these images")
    return "; ".join(parts) + "."


def plot_grid(
    path: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    title: str,
    trained_range: tuple[float, float],
    teacher_accuracy: float | None = None,
    caption: str = "",
) -> None:
    """Draws accuracy against kept width (left) and against multiply-adds (right)."""
    rows = sorted(rows, key=lambda row: row.width_ratio)
    figure = _figure(9.5, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_run(left, [row.width_ratio for row in rows], rows, teacher_accuracy, bars=True)
    _draw_run(right, [row.num_macs / 1e6 for row in rows], rows, teacher_accuracy, bars=True)
    left.axvspan(*trained_range, color=TRAINED, alpha=0.07, zorder=0)
    _finish(left, RATIO, TOP_1)
    _finish(right, MACS, "")
    _legend(figure, left, columns=4)
    _save(figure, path, title, _with_bars(rows, caption))


def plot_sweep(
    path: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    title: str,
    trained_range: tuple[float, float],
    teacher_accuracy: float | None = None,
    caption: str = "",
) -> None:
    """Draws accuracy over the width axis, of networks close enough to each other for a curve.

    The CSV beside it has the columns series, width_ratio, num_macs, accuracy, low, high, trained;
    series is "generated" or "teacher".
    """
    rows = sorted(rows, key=lambda row: row.width_ratio)
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    ratios = [row.width_ratio for row in rows]
    axis.axvspan(*trained_range, color=TRAINED, alpha=0.07, zorder=0)
    if all(row.interval for row in rows):
        low, high = (100 * np.array([_bounds(row)[n] for row in rows]) for n in (1, 2))
        axis.fill_between(ratios, low, high, color="0.5", alpha=0.2, linewidth=0)
        caption = f"Band: 95 % intervals. {caption}"
    _draw_run(axis, ratios, rows, teacher_accuracy, size=4.2)
    _finish(axis, RATIO, TOP_1)
    _legend(figure, axis, columns=5)
    header = ("series", "width_ratio", "num_macs", "accuracy", "low", "high", "trained")
    table: list[tuple] = [header]
    table += [("generated", r.width_ratio, r.num_macs, *_bounds(r), r.trained) for r in rows]
    if teacher_accuracy is not None:
        table.append(("teacher", 1.0, "", teacher_accuracy, "", "", ""))
    _save(figure, path, title, caption, table)


def plot_against_macs(
    path: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    title: str,
    curves: Sequence[Curve] = (),
    singles: Sequence[Single] = (),
    caption: str = "",
) -> None:
    """Draws accuracy against multiply-adds, with published results (`published.references`).

    The CSV beside it has the columns name, width_ratio, num_macs, accuracy, low, high, trained,
    source; name is "this run" for the rows of the grid, whose source is empty, as is what does not
    apply.
    """
    rows = sorted(rows, key=lambda row: row.num_macs)
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()
    header = ("name", "width_ratio", "num_macs", "accuracy", "low", "high", "trained", "source")
    table: list[tuple] = [header]
    table += [("this run", r.width_ratio, r.num_macs, *_bounds(r), r.trained, "") for r in rows]
    for curve, (color, marker) in zip(curves, REFERENCES, strict=False):
        style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1}
        x, y = [n / 1e6 for n in curve.num_macs], [100 * a for a in curve.accuracies]
        axis.plot(x, y, linestyle="--", label=f"{curve.name} (published)", **style)
        for macs, (ratio, accuracy) in zip(curve.num_macs, curve.points, strict=True):
            table.append((curve.name, ratio, macs, accuracy, "", "", "", curve.source))
    for number, one in enumerate(singles):
        point = one.num_macs / 1e6, 100 * one.accuracy
        label = "trained individually (published)" if number == 0 else None
        axis.scatter(*point, color="0.25", marker="s", s=24, label=label, zorder=2)
        place = {"xytext": (-6, 4), "textcoords": "offset points", "ha": "right"}
        axis.annotate(one.name, point, fontsize=8, color="0.25", **place)
        table.append((one.name, "", one.num_macs, one.accuracy, "", "", "", one.source))
    axis.margins(x=0.08, y=0.1)  # room for the names of single networks
    published = [line[3] for line in table[1:] if line[-1]]
    _draw_run(axis, [row.num_macs / 1e6 for row in rows], rows, published=published, bars=True)
    _finish(axis, MACS, TOP_1)
    _legend(figure, axis)
    caption = f"{caption} {CURVES_NOTE}".strip() if curves else caption
    _save(figure, path, title, _with_bars(rows, caption), table)


_AXES = {
    "num_macs": (1e-6, MACS),
    "num_params": (1e-3, "parameters (thousands)"),
    "latency_ms": (1.0, "latency (ms, estimated from measured networks)"),
}


def plot_search(
    path: str | os.PathLike,
    rows: Rows,
    *,
    title: str,
    column: str,
    limit: float,
    winner: Sequence[int],
    caption: str = "",
) -> None:
    """Draws all networks that a search has evaluated.

    The CSV beside it has a column for each entry of the rows, a list with spaces between.

    Args:
        rows: for each network "widths", "accuracy" in [0, 1], "uniform", "front" and what `column`
            names.
        column: the horizontal axis, "num_macs", "num_params" or "latency_ms".
        limit: the budget, in the unit of the column.
        winner: the widths of the network that was chosen.
    """
    scale, label = _AXES[column]
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()

    def points(some):
        some = sorted(some, key=lambda row: row[column])
        return [scale * row[column] for row in some], [100 * row["accuracy"] for row in some]

    uniform = points(row for row in rows if row["uniform"])
    style = {"color": "0.7", "s": 9, "label": "evaluated", "zorder": 1}
    axis.scatter(*points(row for row in rows if not row["uniform"]), **style)
    if uniform[0]:
        style = {"color": UNSEEN, "marker": "D", "markersize": 4, "linewidth": 1}
        axis.plot(*uniform, label="uniform", zorder=2, **style)
    style = {"color": TRAINED, "drawstyle": "steps-post", "linewidth": 1.4}
    axis.plot(*points(row for row in rows if row["front"]), label="front", zorder=3, **style)
    chosen = [row for row in rows if list(row["widths"]) == list(winner)]
    if chosen:
        style = {"color": TRAINED, "marker": "*", "s": 130, "edgecolor": "white"}
        axis.scatter(*points(chosen), label="chosen", zorder=4, **style)
    if limit <= 1.5 * max(row[column] for row in rows):  # else it would squeeze the points
        axis.axvline(scale * limit, color="0.3", linestyle="--", linewidth=1, label="budget")
    if uniform[0]:
        best = max(100 * row["accuracy"] for row in rows)
        floor = _floor([*uniform[1], best])
        below = [100 * row["accuracy"] for row in rows if 100 * row["accuracy"] < floor]
        if below:
            x = [scale * row[column] for row in rows if 100 * row["accuracy"] >= floor]
            axis.set_xlim(left=min(x) - 0.04 * (max(x) - min(x)))
            _end(axis, floor, best)
            count = f"{len(below)} networks lie below the axis, from {min(below):.1f} %"
            caption = f"{count}. {caption}".strip()
    _finish(axis, label, "validation accuracy (%)")
    _legend(figure, axis, columns=5)
    _save(figure, path, title, caption, storage.as_table(rows))


def plot_random_networks(
    path: str | os.PathLike, rows: Rows, *, title: str, caption: str = ""
) -> None:
    """Draws networks of random widths around the curve of uniform ones.

    `rows` have "series" ("uniform" or "random"), "num_macs" and "accuracy" in [0, 1]; the CSV has a
    column for each of their entries.
    """
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    for series, style in (
        ("random", {"color": TRAINED, "marker": "o", "markersize": 3.5, "linewidth": 0}),
        ("uniform", {"color": UNSEEN, "marker": "D", "markersize": 4, "linewidth": 1}),
    ):
        some = sorted((r for r in rows if r["series"] == series), key=lambda row: row["num_macs"])
        x, y = [row["num_macs"] / 1e6 for row in some], [100 * row["accuracy"] for row in some]
        axis.plot(x, y, label=series, alpha=0.8, **style)
    _finish(axis, MACS, TOP_1)
    _legend(figure, axis)
    _save(figure, path, title, caption, storage.as_table(rows))


def plot_depths(path: str | os.PathLike, rows: Rows, *, title: str, caption: str = "") -> None:
    """Draws accuracy over width and depth, a heat map.

    `rows` hold a network for each pair of "num_layers" and "width_ratio", with "accuracy" in
    [0, 1], "num_macs" and "trained"; the CSV has a column for each of their entries.
    """
    depths = sorted({row["num_layers"] for row in rows}, reverse=True)
    ratios = sorted({row["width_ratio"] for row in rows})
    values = np.full((len(depths), len(ratios)), np.nan)
    places = [(depths.index(r["num_layers"]), ratios.index(r["width_ratio"])) for r in rows]
    for place, row in zip(places, rows, strict=True):
        values[place] = 100 * row["accuracy"]
    known = [100 * row["accuracy"] for row in rows if row["trained"]] or [np.nanmin(values)]
    high = np.nanmax(values)
    low = max(min(*known, high - _SPAN), 0.0)
    figure = _figure(max(5.0, 1.6 + 0.62 * len(ratios)), 1.6 + 0.62 * len(depths))
    axis = figure.subplots()
    image = axis.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=high)
    for (y, x), row in zip(places, rows, strict=True):
        mark = "" if row["trained"] else "*"
        macs = row["num_macs"] / 1e6
        text = f"{100 * row['accuracy']:.1f}{mark}\n{macs:.{2 if macs < 1 else 1}f} M"
        color = "white" if 100 * row["accuracy"] < (low + high) / 2 else "black"
        axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color=color)
    axis.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axis.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    unseen = any(not row["trained"] for row in rows)
    axis.set(xlabel=RATIO + ("; * never trained" if unseen else ""), ylabel="layers")
    extend = "min" if np.nanmin(values) < low else "neither"
    figure.colorbar(image, ax=axis, label=TOP_1, extend=extend)
    _save(figure, path, title + ", multiply-adds", caption, storage.as_table(rows))


def plot_comparison(
    path: str | os.PathLike,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    references: Mapping[str, Sequence[tuple[float, float]]],
    num_images: int = 0,
    caption: str = "",
) -> None:
    """Draws accuracy against multiply-adds, a curve for each method.

    What lies far below the best is written into the caption.

    Args:
        series: by method, (multiply-adds, accuracy in percent) of each size.
        references: the same of published results, in gray.
        num_images: that accuracies were measured on, for intervals; 0 where that is not known.
    """
    figure = _figure(7.2, 5.2)
    axis = figure.subplots()
    found = [y for points in (*series.values(), *references.values()) for _, y in points]
    near = [y for y in found if y >= _FAR * max(found)]
    floor, below = _floor(near, room=0.1), []
    styles = list(zip(COLORS, "osD^vPX*", strict=True))
    for number, (name, points) in enumerate(series.items()):
        x, y = (np.array(values) for values in zip(*sorted(points), strict=True))
        color, marker = styles[number % len(styles)]
        style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.3}
        low = [f"{value:.1f}" for value in y if value < floor]
        below += [f"{name} ({', '.join(low)})"] if low else []
        if len(low) < len(y):
            errors = None
            if num_images:
                bounds = [accuracy_interval(value / 100, num_images) for value in y]
                errors = np.abs(100 * np.transpose(bounds) - y)
            axis.errorbar(x / 1e6, y, errors, label=name, elinewidth=0.8, capsize=2, **style)
    for marker, (name, points) in zip("sov^", references.items(), strict=False):
        x, y = zip(*sorted(points), strict=True)
        style = {"color": "0.55", "marker": marker, "markersize": 4, "linestyle": "--"}
        label = f"{name} (published, full length)"
        axis.plot([size / 1e6 for size in x], y, linewidth=1, label=label, **style)
    _end(axis, floor, max(near) + (1.0 if num_images else 0.0))
    _finish(axis, MACS, "test top-1 accuracy (%)")
    _legend(figure, axis)
    if below:
        told = f"Below the axis (%, from the smallest size on): {'; '.join(below)}."
        caption = f"{caption} {told}".strip()
    _save(figure, path, title, caption)


def plot_families(path: str | os.PathLike, rows: Rows, *, title: str, caption: str = "") -> None:
    """Draws accuracy against multiply-adds and against latency, a curve for each family.

    `rows` have "family", "num_macs", "latency_ms", "accuracy" in [0, 1] and "trained"; the CSV has
    a column for each of their entries, the figure leaves out what was never trained.
    """
    figure = _figure(9.0, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    by_cost = sorted(rows, key=lambda row: row["num_macs"])
    columns = (("num_macs", 1e-6, MACS), ("latency_ms", 1.0, "milliseconds of a batch"))
    for axis, (column, scale, label) in zip(axes, columns, strict=True):
        for number, family in enumerate(sorted({row["family"] for row in rows})):
            some = [row for row in by_cost if row["family"] == family and row["trained"]]
            x, y = [scale * row[column] for row in some], [100 * row["accuracy"] for row in some]
            style = {"color": COLORS[1 - number], "marker": "so"[number], "markersize": 4}
            axis.plot(x, y, linewidth=1.2, label=family, **style)
        _finish(axis, label, TOP_1 if axis is axes[0] else "")
    _legend(figure, axes[0])
    _save(figure, path, title, caption, storage.as_table(rows))


# --- what the figures share ------------------------------------------------------------------


def _figure(width: float, height: float):
    """An empty figure of that size in inches, drawn without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bounds(row: GridRow) -> tuple[Any, Any, Any]:
    """(accuracy, low, high) in [0, 1]; the interval is empty where it is not known."""
    low, high = row.interval or ("", "")
    return row.accuracy, low, high


def _with_bars(rows: Sequence[GridRow], caption: str) -> str:
    return ("Bars: 95 % intervals. " if any(row.interval for row in rows) else "") + caption


def _draw_run(
    axis, x, rows: Sequence[GridRow], teacher=None, *, published=(), size=5.5, bars=False
) -> None:
    """Draws rows at `x`: a line, and points whose color and shape says what was trained.

    The axis shows the accuracies, in [0, 1], of the `teacher` and what is `published`, too.
    """
    prefix, color = ("this run, ", TRAINED) if published else ("", "0.7")
    axis.plot(x, [100 * row.accuracy for row in rows], color=color, linewidth=1, zorder=1)
    for trained, color, marker in ((True, TRAINED, "o"), (False, UNSEEN, "D")):
        points = [(at, row) for at, row in zip(x, rows, strict=True) if row.trained == trained]
        if not points:
            continue
        at, errors = [place for place, _ in points], None
        if bars and all(row.interval for _, row in points):
            ends = 100 * np.array([_bounds(row) for _, row in points]).T
            errors = np.abs(ends[1:] - ends[0])
        style = {"color": color, "fmt": marker, "markersize": size, "elinewidth": 1, "capsize": 2}
        label = prefix + ("trained range" if trained else "never trained")
        axis.errorbar(at, [100 * row.accuracy for _, row in points], errors, label=label, **style)
    if teacher is not None:
        label = f"teacher, {100 * teacher:.1f} %"
        axis.axhline(100 * teacher, color="0.3", linestyle="--", linewidth=1, label=label)
    _clip(axis, x, rows, teacher, *published)


def _floor(shown: Sequence[float], *, room: float = 1.0) -> float:
    """Where an axis ends that shows all `shown`, in percent, and some of what lies below."""
    low, high = min(shown), max(shown)
    return max(low - room * max(high - low, 2.0), 0.0)


def _end(axis, floor: float, top: float) -> None:
    axis.set_ylim(floor - 0.02 * (top - floor), top + 0.06 * (top - floor))


def _clip(axis, x, rows: Sequence[GridRow], *others: float | None) -> None:
    """Lets no network that was never trained stretch the axis; those below it are told at its foot.

    `others` are accuracies in [0, 1] that have to be shown.
    """
    ends = [end for row in rows if row.trained for end in (row.interval or (row.accuracy,))]
    shown = [100 * value for value in (*ends, *others) if value is not None]
    floor = _floor(shown) if ends else 0.0
    if all(100 * row.accuracy >= floor for row in rows):
        return
    _end(axis, floor, max(*shown, *(100 * (row.interval or (0, 0))[1] for row in rows)))
    label = "never trained, below the axis (%)"
    for at, row in zip(x, rows, strict=True):
        if 100 * row.accuracy < floor:
            style = {"color": UNSEEN, "marker": "v", "s": 22, "clip_on": False, "zorder": 3}
            axis.scatter(at, floor, label=label, **style)
            place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
            text = f"{100 * row.accuracy:.1f}"
            axis.annotate(text, (at, floor), rotation=90, fontsize=7, color=UNSEEN, **place)
            label = None


def _finish(axis, xlabel: str, ylabel: str) -> None:
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(xlabel=xlabel, ylabel=ylabel)


def _legend(figure, axis, columns: int = 0) -> None:
    """Below all axes, where it covers no point whatever the curves do."""
    handles, labels = axis.get_legend_handles_labels()
    columns = columns or (3 if len(labels) <= 3 else 2)
    style = {"ncols": columns, "frameon": False, "fontsize": 8}
    figure.legend(handles, labels, loc="outside lower center", **style)


def _save(
    figure,
    path: str | os.PathLike,
    title: str,
    caption: str,
    table: Sequence[Sequence[Any]] | None = None,
) -> None:
    """Writes the PNG and, beside it, a table whose first row is its header, each whole."""
    figure.suptitle(title, fontsize=10)
    if caption:
        figure.draw_without_rendering()  # lays out all but the caption, which goes below
        figure.set_layout_engine("none")
        for legend in figure.legends:  # stays where it is, however the figure grows
            place = legend.get_window_extent().transformed(figure.transFigure.inverted())
            legend.set_loc("center")
            legend.set_bbox_to_anchor(place, figure.transFigure)
        text = textwrap.fill(caption, int(18 * figure.get_size_inches()[0]))
        figure.text(0.01, -0.01, text, fontsize=7.5, color="0.35", va="top")
    with storage.replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png", bbox_inches="tight")
    if table:
        storage.write_csv(pathlib.Path(path).with_suffix(".csv"), table)
