"""Figures. Each has its numbers in a CSV or JSON file beside it."""

import os
import pathlib
from collections.abc import Sequence

from neumeta_jax.evaluation import GridRow

TRAINED, UNSEEN = "#1f5fa8", "#c8501e"


def plot_grid(
    path: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    title: str,
    trained_range: tuple[float, float],
    teacher_accuracy: float | None = None,
) -> None:
    """Writes a PNG of accuracy against kept width (left) and against multiply-adds (right).

    Args:
        path: file to write; an existing one is replaced once the new one is complete.
        rows: the grid.
        title: figure title.
        trained_range: smallest and largest width ratio seen in training, shaded on the left.
        teacher_accuracy: in [0, 1], drawn as a dashed line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row.width_ratio)
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    axes = ((left, [r.width_ratio for r in rows]), (right, [r.num_macs / 1e6 for r in rows]))
    accuracies = [100 * row.accuracy for row in rows]
    for axis, sizes in axes:
        axis.plot(sizes, accuracies, color="0.75", linewidth=1, zorder=1)
        for trained, color, marker in ((True, TRAINED, "o"), (False, UNSEEN, "D")):
            points = [
                (x, y)
                for x, y, row in zip(sizes, accuracies, rows, strict=True)
                if row.trained == trained
            ]
            if points:
                x, y = zip(*points, strict=True)
                label = "trained range" if trained else "never trained"
                axis.scatter(x, y, color=color, marker=marker, s=30, label=label, zorder=2)
        if teacher_accuracy is not None:
            label = f"teacher, {100 * teacher_accuracy:.1f} %"
            axis.axhline(
                100 * teacher_accuracy, color="0.3", linestyle="--", linewidth=1, label=label
            )
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    left.axvspan(*trained_range, color=TRAINED, alpha=0.07, zorder=0)
    left.set_xlabel("kept hidden width (ratio)")
    left.set_ylabel("top-1 accuracy (%)")
    right.set_xlabel("multiply-adds (millions)")
    right.legend(loc="lower right", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
