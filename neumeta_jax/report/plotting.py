"""Figures. Each has its numbers in a CSV or JSON file beside it.

All functions take the `path` of the PNG to write, which replaces an existing file once it is
complete, as does the CSV beside it, and the figure's `title`. A `trained_range`, the smallest and
the largest width ratio seen in training, is shaded; a `teacher_accuracy`, in [0, 1], is a dashed
line.
"""

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neumeta_jax.evaluation.grid import GridRow, WeightSlices
from neumeta_jax.files import storage
from neumeta_jax.report.published import Curve, Single

TRAINED, UNSEEN = "#1f5fa8", "#c8501e"
# One for each published curve; none is a color of the run.
REFERENCES = (("0.25", "s"), ("#4c8c4a", "^"), ("#8a5fa8", "v"), ("#b08a2e", "P"))
ENTRIES = ("#1f5fa8", "#c8501e", "#4c8c4a", "#8a5fa8", "#b08a2e", "0.35")
RATIO, HIDDEN = "kept width (ratio)", "hidden width (channels)"
MACS, TOP_1 = "multiply-adds (millions)", "top-1 accuracy (%)"
CENTER = 4  # of the nine taps of a 3x3 kernel, row by row


def plot_grid(
    path: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    title: str,
    trained_range: tuple[float, float],
    teacher_accuracy: float | None = None,
) -> None:
    """Draws accuracy against kept width (left) and against multiply-adds (right)."""
    rows = sorted(rows, key=lambda row: row.width_ratio)
    figure = _figure(9.5, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    axes = ((left, [r.width_ratio for r in rows]), (right, [r.num_macs / 1e6 for r in rows]))
    accuracies = [100 * row.accuracy for row in rows]
    for axis, sizes in axes:
        axis.plot(sizes, accuracies, color="0.75", linewidth=1, zorder=1)
        _scatter_rows(axis, sizes, rows)
        _draw_teacher(axis, teacher_accuracy)
        _restrain(axis)
    left.axvspan(*trained_range, color=TRAINED, alpha=0.07, zorder=0)
    left.set(xlabel=RATIO, ylabel=TOP_1)
    right.set_xlabel(MACS)
    right.legend(loc="lower right", frameon=False, fontsize=8)
    _save(figure, path, title)


def plot_against_macs(
    path: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    title: str,
    curves: Sequence[Curve] = (),
    singles: Sequence[Single] = (),
) -> None:
    """Draws accuracy against multiply-adds, with published results (`published.references`).

    The CSV beside it has the columns name, width_ratio, num_macs, accuracy, trained, source; name
    is "this run" for the rows of the grid, whose source is empty, as is what does not apply.
    """
    rows = sorted(rows, key=lambda row: row.num_macs)
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()
    sizes = [row.num_macs / 1e6 for row in rows]
    axis.plot(sizes, [100 * r.accuracy for r in rows], color=TRAINED, linewidth=1.2, zorder=3)
    _scatter_rows(axis, sizes, rows, prefix="this run, ", zorder=4)
    table: list[tuple] = [
        ("this run", r.width_ratio, r.num_macs, r.accuracy, r.trained, "") for r in rows
    ]
    for number, curve in enumerate(curves):
        color, marker = REFERENCES[number % len(REFERENCES)]
        axis.plot(
            [n / 1e6 for n in curve.num_macs],
            [100 * a for a in curve.accuracies],
            color=color,
            marker=marker,
            markersize=4.5,
            linewidth=1,
            linestyle="--",
            label=f"{curve.name} (published)",
        )
        columns = (curve.width_ratios, curve.num_macs, curve.accuracies)
        table += [(curve.name, *row, "", curve.source) for row in zip(*columns, strict=True)]
    if singles:
        x, y = [s.num_macs / 1e6 for s in singles], [100 * s.accuracy for s in singles]
        label = "trained individually (published)"
        axis.scatter(x, y, color="0.25", marker="s", s=24, label=label, zorder=2)
        for single, a, b in zip(singles, x, y, strict=True):
            axis.annotate(
                single.name,
                (a, b),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="0.25",
            )
        table += [(s.name, "", s.num_macs, s.accuracy, "", s.source) for s in singles]
    axis.margins(x=0.08, y=0.1)  # room for the names of single networks
    _finish(figure, axis, xlabel=MACS, ylabel=TOP_1)
    header = ("name", "width_ratio", "num_macs", "accuracy", "trained", "source")
    _save(figure, path, title, [header, *table])


def plot_sweep(
    path: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    title: str,
    trained_range: tuple[float, float],
    teacher_accuracy: float | None = None,
) -> None:
    """Draws accuracy over the width axis, of networks close enough to each other for a curve.

    The CSV beside it has the columns series, width_ratio, num_macs, accuracy, trained; series is
    "generated" or "teacher".
    """
    rows = sorted(rows, key=lambda row: row.width_ratio)
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    ratios = [row.width_ratio for row in rows]
    axis.axvspan(*trained_range, color=TRAINED, alpha=0.07, zorder=0)
    axis.plot(ratios, [100 * r.accuracy for r in rows], color="0.6", linewidth=1, zorder=1)
    _scatter_rows(axis, ratios, rows, size=18)
    table: list[tuple] = [
        ("generated", r.width_ratio, r.num_macs, r.accuracy, r.trained) for r in rows
    ]
    _draw_teacher(axis, teacher_accuracy)
    if teacher_accuracy is not None:
        table.append(("teacher", 1.0, "", teacher_accuracy, ""))
    _finish(figure, axis, xlabel=RATIO, ylabel=TOP_1)
    header = ("series", "width_ratio", "num_macs", "accuracy", "trained")
    _save(figure, path, title, [header, *table])


def default_entries(slices: WeightSlices, number: int = 6) -> tuple[tuple[int, int, int], ...]:
    """`number` entries (out channel, hidden channel, tap), spread over a full-size kernel."""
    taps = (4, 1, 3, 5, 7, 0, 2, 6, 8)
    out_width = slices.kernels.shape[-1]
    # Not evenly over the hidden channels: only the lower ones are there at small widths.
    return tuple(
        (
            n * out_width // number,
            int(slices.full_width * (n / number) ** 1.5),
            taps[n % len(taps)],
        )
        for n in range(number)
    )


def plot_weight_slices(
    path: str | os.PathLike,
    slices: WeightSlices,
    *,
    title: str,
    trained_range: tuple[float, float],
) -> None:
    """Draws how the weights that read a group change with its width (`grid.weight_slices`).

    Left: `default_entries` as curves. Right: the centre tap to output channel 0 as an image, hidden
    channel against width. What is masked is left blank. The CSV beside it has the columns block,
    panel ("curves" or "image"), width, out_channel, hidden_channel, tap (0 to 8, row by row),
    value; the value of what is masked is empty. The trained range lies between dashed lines on the
    right.
    """
    widths, kernels = slices.widths, slices.kernels
    figure = _figure(10.5, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    low, high = (ratio * slices.full_width for ratio in trained_range)
    left.axvspan(low, high, color=TRAINED, alpha=0.07, zorder=0)
    table: list[tuple] = []

    def add(panel, values, out, hidden, tap):
        for width, value in zip(widths, values, strict=True):
            shown = "" if np.isnan(value) else float(value)
            table.append((slices.block, panel, int(width), out, hidden, tap, shown))

    for number, (out, hidden, tap) in enumerate(default_entries(slices)):
        values = kernels[:, tap // 3, tap % 3, hidden, out]
        color = ENTRIES[number % len(ENTRIES)]
        label = f"out {out}, hidden {hidden}, tap {tap}"
        left.plot(widths, values, color=color, linewidth=1, marker=".", markersize=4, label=label)
        add("curves", values, out, hidden, tap)
    _finish(figure, left, xlabel=HIDDEN, ylabel="weight", columns=3)

    image = kernels[:, CENTER // 3, CENTER % 3, :, 0].T  # [hidden, widths]
    for hidden, values in enumerate(image):
        add("image", values, 0, hidden, CENTER)
    # A few large weights, at widths far from the trained ones, must not bleach all the others.
    limit = np.nanpercentile(np.abs(image), 98) or 1.0
    extent = (widths[0] - 0.5, widths[-1] + 0.5, -0.5, len(image) - 0.5)
    shown = right.imshow(
        image,
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        extent=extent,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    for bound in (low, high):
        right.axvline(bound, color="0.3", linestyle="--", linewidth=1)
    right.set_xlim(extent[:2])
    right.spines[["top", "right"]].set_visible(False)
    right.set(xlabel=HIDDEN, ylabel="hidden channel")
    figure.colorbar(shown, ax=right, extend="both", label="centre tap to output channel 0")
    header = ("block", "panel", "width", "out_channel", "hidden_channel", "tap", "value")
    _save(figure, path, title, [header, *table])


_AXES = {
    "num_macs": (1e-6, "multiply-adds (millions)"),
    "num_params": (1e-3, "parameters (thousands)"),
    "latency_ms": (1.0, "latency (ms, estimated from measured networks)"),
}


def plot_search(
    path: str | os.PathLike,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    column: str,
    limit: float,
    winner: Sequence[int],
    note: str = "",
) -> None:
    """Draws all networks that a search has evaluated.

    The CSV beside it has a column for each entry of the rows, a list with spaces between.

    Args:
        rows: for each network "widths", "accuracy" in [0, 1], "uniform", "front" and what `column`
            names.
        column: the horizontal axis, "num_macs", "num_params" or "latency_ms".
        limit: the budget, in the unit of the column.
        winner: the widths of the network that was chosen.
        note: a sentence below the axis.
    """
    scale, label = _AXES[column]
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()

    def points(some):
        return [scale * row[column] for row in some], [100 * row["accuracy"] for row in some]

    others = [row for row in rows if not row["uniform"]]
    axis.scatter(*points(others), color="0.7", s=9, label="evaluated", zorder=1)
    uniform = sorted((row for row in rows if row["uniform"]), key=lambda row: row[column])
    if uniform:
        style = {"color": UNSEEN, "marker": "D", "markersize": 4, "linewidth": 1}
        axis.plot(*points(uniform), label="uniform", zorder=2, **style)
    front = sorted((row for row in rows if row["front"]), key=lambda row: row[column])
    style = {"color": TRAINED, "drawstyle": "steps-post", "linewidth": 1.4}
    axis.plot(*points(front), label="front", zorder=3, **style)
    chosen = [row for row in rows if list(row["widths"]) == list(winner)]
    if chosen:
        style = {"color": TRAINED, "marker": "*", "s": 130, "edgecolor": "white"}
        axis.scatter(*points(chosen), label="chosen", zorder=4, **style)
    largest = max(row[column] for row in rows)
    if limit <= 1.5 * largest:  # else it would squeeze the points
        axis.axvline(scale * limit, color="0.3", linestyle="--", linewidth=1, label="budget")
    label = "\n".join([label, *textwrap.wrap(note, 80)])
    _finish(figure, axis, xlabel=label, ylabel="validation accuracy (%)", columns=5)
    _save(figure, path, title, storage.as_table(rows))


def plot_random_networks(
    path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], *, title: str
) -> None:
    """Draws networks of random widths around the curve of uniform ones.

    `rows` have "series" ("uniform" or "random"), "num_macs" and "accuracy" in [0, 1]; the CSV has a
    column for each of their entries.
    """
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    for series, draw, style in (
        ("random", axis.scatter, {"color": TRAINED, "s": 12, "alpha": 0.7}),
        ("uniform", axis.plot, {"color": UNSEEN, "marker": "D", "markersize": 4, "linewidth": 1}),
    ):
        some = sorted((r for r in rows if r["series"] == series), key=lambda row: row["num_macs"])
        x, y = [row["num_macs"] / 1e6 for row in some], [100 * row["accuracy"] for row in some]
        draw(x, y, label=series, **style)
    _finish(figure, axis, xlabel=MACS, ylabel=TOP_1)
    _save(figure, path, title, storage.as_table(rows))


def plot_depths(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draws accuracy over width and depth, a heat map.

    `rows` hold a network for each pair of "num_layers" and "width_ratio", with "accuracy" in
    [0, 1], "num_macs" and "trained"; the CSV has a column for each of their entries.
    """
    depths = sorted({row["num_layers"] for row in rows}, reverse=True)
    ratios = sorted({row["width_ratio"] for row in rows})
    cells = {(row["num_layers"], row["width_ratio"]): row for row in rows}
    values = np.full((len(depths), len(ratios)), np.nan)
    for (depth, ratio), row in cells.items():
        values[depths.index(depth), ratios.index(ratio)] = 100 * row["accuracy"]
    figure = _figure(max(5.0, 1.6 + 0.62 * len(ratios)), 1.6 + 0.62 * len(depths))
    axis = figure.subplots()
    image = axis.imshow(values, cmap="viridis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (depth, ratio), row in cells.items():
        value = 100 * row["accuracy"]
        axis.text(
            ratios.index(ratio),
            depths.index(depth),
            f"{value:.1f}{'' if row['trained'] else '*'}\n{row['num_macs'] / 1e6:.1f} M",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if value < middle else "black",
        )
    axis.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axis.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    unseen = any(not row["trained"] for row in rows)
    axis.set(xlabel=RATIO + ("; * never trained" if unseen else ""), ylabel="layers")
    figure.colorbar(image, ax=axis, label=TOP_1)
    _save(figure, path, title + ", multiply-adds", storage.as_table(rows))


def plot_comparison(
    path: str | os.PathLike,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    references: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Draws accuracy against multiply-adds, a curve for each method.

    Args:
        series: by method, (multiply-adds, accuracy in percent) of each size.
        references: published results by name, (multiply-adds, accuracies in percent), in gray.
    """
    figure = _figure(7.2, 5.2)
    axis = figure.subplots()
    colors = (*ENTRIES, "#c23b80", "#2a9d9d")
    for number, (name, points) in enumerate(series.items()):
        x, y = zip(*sorted(points), strict=True)
        axis.plot(
            [size / 1e6 for size in x],
            y,
            color=colors[number % len(colors)],
            marker="osD^vPX*"[number % 8],
            markersize=5,
            linewidth=1.3,
            label=name,
        )
    for number, (name, (x, y)) in enumerate(references.items()):
        style = {"color": "0.55", "marker": "osD^"[number % 4], "markersize": 4, "linewidth": 1}
        sizes = [size / 1e6 for size in x]
        axis.plot(sizes, y, linestyle="--", label=f"{name} (published, full length)", **style)
    _finish(figure, axis, xlabel=MACS, ylabel="test top-1 accuracy (%)")
    _save(figure, path, title)


# --- what the figures share ------------------------------------------------------------------


def plot_families(
    path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], *, title: str
) -> None:
    """Draws accuracy against multiply-adds and against latency, a curve for each family.

    `rows` have "family", "num_macs", "latency_ms", "accuracy" in [0, 1] and "trained"; the CSV has
    a column for each of their entries, the figure leaves out what was never trained.
    """
    figure = _figure(9.0, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    columns = (("num_macs", 1e-6, MACS), ("latency_ms", 1.0, "milliseconds of a batch"))
    for axis, (column, scale, label) in zip(axes, columns, strict=True):
        for family, color, marker in zip(
            dict.fromkeys(row["family"] for row in rows), (UNSEEN, TRAINED), "so", strict=False
        ):
            ordered = [row for row in rows if row["family"] == family and row["trained"]]
            ordered.sort(key=lambda row: row["num_macs"])
            x, y = [scale * r[column] for r in ordered], [100 * r["accuracy"] for r in ordered]
            shown = family if axis is axes[0] else None
            axis.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.2, label=shown)
        _restrain(axis)
        axis.set_xlabel(label)
    _finish(figure, axes[0], xlabel=MACS, ylabel=TOP_1)
    _save(figure, path, title, storage.as_table(rows))


def _figure(width: float, height: float):
    """An empty figure of that size in inches, drawn without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _scatter_rows(axis, sizes, rows, *, prefix="", size=30, zorder=2) -> None:
    """A point for each row at `sizes`; those of the trained range differ in color and shape."""
    for trained, color, marker in ((True, TRAINED, "o"), (False, UNSEEN, "D")):
        points = [
            (x, 100 * row.accuracy)
            for x, row in zip(sizes, rows, strict=True)
            if row.trained == trained
        ]
        if points:
            x, y = zip(*points, strict=True)
            label = prefix + ("trained range" if trained else "never trained")
            axis.scatter(x, y, color=color, marker=marker, s=size, label=label, zorder=zorder)


def _draw_teacher(axis, accuracy: float | None) -> None:
    if accuracy is not None:
        label = f"teacher, {100 * accuracy:.1f} %"
        axis.axhline(100 * accuracy, color="0.3", linestyle="--", linewidth=1, label=label)


def _restrain(axis) -> None:
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _finish(figure, axis, *, xlabel: str, ylabel: str, columns: int = 0) -> None:
    """Labels, and a legend below all axes, where it covers no point whatever the curves do."""
    _restrain(axis)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    handles, labels = axis.get_legend_handles_labels()
    columns = columns or (3 if len(labels) <= 3 else 2)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _save(
    figure, path: str | os.PathLike, title: str, table: Sequence[Sequence[Any]] | None = None
) -> None:
    """Writes the PNG and, beside it, a table whose first row is its header, each whole."""
    figure.suptitle(title, fontsize=10)
    with storage.replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    if table:
        storage.write_csv(pathlib.Path(path).with_suffix(".csv"), table)
