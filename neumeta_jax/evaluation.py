"""Accuracy of networks drawn from one INR, over a grid of widths."""

import csv
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import hypernetwork as hyper, resnet
from neumeta_jax.architecture import ResNetSpec, check_width_ratio, morph, widths_at
from neumeta_jax.hypernetwork import Hypernetwork
from neumeta_jax.training import Preprocessing


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One network of the grid.

    Attributes:
        width_ratio: kept fraction of the hidden channels; the papers' gamma is 1 - width_ratio.
        widths: hidden widths of the generated blocks.
        num_params, num_macs: of the whole dense network.
        accuracy: top-1 in [0, 1].
        trained: whether the ratio lies in the trained range.
    """

    width_ratio: float
    widths: tuple[int, ...]
    num_params: int
    num_macs: int
    accuracy: float
    trained: bool


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_correct(spec, preprocessing, params, images, labels):
    predictions = jnp.argmax(resnet.apply(spec, params, preprocessing.evaluate(images)), axis=-1)
    return jnp.sum(predictions == labels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_correct_batch_norm(spec, preprocessing, variables, images, labels):
    logits = jnp.asarray(resnet.ResNet(spec).apply(variables, preprocessing.evaluate(images)))
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)


def _accuracy(count: Callable, images: np.ndarray, labels: np.ndarray, batch_size: int) -> float:
    if len(images) == 0:
        raise ValueError("Evaluation needs at least one image, got an empty split.")
    batch_size = min(batch_size, len(images))
    correct = []
    for start in range(0, len(images), batch_size):
        x, y = images[start : start + batch_size], labels[start : start + batch_size]
        missing = batch_size - len(x)
        if missing:  # one shape, one compilation; no image has the label -1
            x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
            y = np.concatenate([y, np.full(missing, -1, y.dtype)])
        correct.append(count(x, y))
    return int(sum(int(n) for n in correct)) / len(images)


def accuracy(
    spec: ResNetSpec,
    params: Mapping,
    images: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 1000,
) -> float:
    """Top-1 accuracy in [0, 1] of a folded tree on uint8 images NHWC, labels int[n]."""
    count = functools.partial(_count_correct, spec, preprocessing, params)
    return _accuracy(count, images, labels, batch_size)


def batch_norm_accuracy(
    spec: ResNetSpec,
    variables: Mapping,
    images: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 1000,
) -> float:
    """Top-1 accuracy in [0, 1] of linen variables with their batch-norm statistics."""
    count = functools.partial(_count_correct_batch_norm, spec, preprocessing, variables)
    return _accuracy(count, images, labels, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="num_samples")
def _generate(hypernetwork, spec, params, widths, key, num_samples):
    return hyper.generate(hypernetwork, params, widths, spec=spec, key=key, num_samples=num_samples)


def evaluate_grid(
    hypernetwork: Hypernetwork,
    params: Mapping,
    width_ratios: Sequence[float],
    images: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    *,
    trained_range: tuple[float, float],
    num_samples: int = 1,
    key: jax.Array | None = None,
    batch_size: int = 1000,
    on_row: Callable[[GridRow], None] | None = None,
) -> list[GridRow]:
    """One row for each width ratio, in the order given.

    All ratios up to 1 share one compilation at the full shape, all beyond it another one. Ratios
    that round to the same widths are one network, which is evaluated once.

    Args:
        hypernetwork, params: the family and its learned parameters.
        width_ratios: each in (0, 1.5].
        images, labels: uint8[n, size, size, channels], int[n].
        preprocessing: normalisation of the images.
        trained_range: smallest and largest width ratio seen in training.
        num_samples: noisy weight samples to average; more than 1 needs `key`.
        key: PRNG key of the coordinate noise; None evaluates exact coordinates.
        batch_size: images per call.
        on_row: called with each row as soon as it is known.

    Raises:
        ValueError: for a width ratio out of range, before anything is evaluated.
    """
    ratios = [check_width_ratio(ratio) for ratio in width_ratios]
    spec, blocks = hypernetwork.spec, hypernetwork.blocks
    widest = max([1.0, *ratios])
    rows = []
    known: dict[tuple[int, ...], float] = {}
    for ratio in ratios:
        widths = widths_at(spec, blocks, ratio)
        if widths not in known:
            container = spec if ratio <= 1 else morph(spec, blocks, widths_at(spec, blocks, widest))
            tree = _generate(
                hypernetwork,
                container,
                dict(params),
                jnp.asarray(widths, jnp.int32),
                key,
                num_samples=num_samples,
            )
            known[widths] = accuracy(
                container, tree, images, labels, preprocessing, batch_size=batch_size
            )
        small = morph(spec, blocks, widths)
        low, high = trained_range
        row = GridRow(
            width_ratio=ratio,
            widths=widths,
            num_params=small.num_params,
            num_macs=small.num_macs,
            accuracy=known[widths],
            trained=low - 1e-9 <= ratio <= high + 1e-9,
        )
        rows.append(row)
        if on_row:
            on_row(row)
    return rows


class Dip(NamedTuple):
    """How far an accuracy falls below the line through its neighbours, in [0, 1], and its ratio."""

    fall: float
    where: float | None


def largest_dip(ratios: Sequence[float], accuracies: Sequence[float]) -> Dip:
    """The largest fall of an interior point below the straight line through its two neighbours.

    Zero at no width where no point lies below; the first of several equal falls.

    >>> largest_dip([0.5, 0.75, 1.0], [0.5, 0.5, 0.75])
    Dip(fall=0.125, where=0.75)

    Args:
        ratios: width ratios, increasing.
        accuracies: of the same length, in [0, 1].

    Raises:
        ValueError: if the lengths differ or a ratio is not above the one before it.
    """
    if len(ratios) != len(accuracies):
        raise ValueError(
            "largest_dip needs one accuracy for each width ratio, got "
            f"{len(accuracies)} for {len(ratios)}."
        )
    x, y = np.asarray(ratios, np.float64), np.asarray(accuracies, np.float64)
    if not np.all(x[1:] > x[:-1]):
        raise ValueError(
            f"largest_dip needs width ratios that increase, got {x.tolist()}; sort them and leave "
            "out repeated ones."
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


@dataclasses.dataclass(frozen=True)
class WeightSlices:
    """The conv2 kernels of one generated block at several widths.

    Attributes:
        block: its name, for example "stage3_block7".
        full_width: its hidden width in the full-size network.
        widths: int[n], hidden widths, increasing.
        kernels: float32[n, 3, 3, hidden, C_out], NaN in the hidden channels beyond the width.
    """

    block: str
    full_width: int
    widths: np.ndarray
    kernels: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _conv2_kernels(hypernetwork, container, name, params, widths):
    def kernel(row):
        return hyper.generate(hypernetwork, params, row, spec=container)[name]["conv2"]["kernel"]

    return jax.lax.map(kernel, widths)


def weight_slices(
    hypernetwork: Hypernetwork,
    params: Mapping,
    *,
    position: int = -1,
    smallest: float = 0.1,
    largest: float = 1.25,
) -> WeightSlices:
    """conv2 of one generated block at every hidden width that it takes, in one compilation.

    The kernels are those of the network, SkipInit's scalar included; coordinates are exact.

    Args:
        hypernetwork, params: the family and its learned parameters.
        position: which of the generated blocks, in training order; the last by default.
        smallest, largest: width ratios between which all integer widths are taken, in (0, 1.5].

    Raises:
        ValueError: for a ratio or a position out of range.
    """
    spec, blocks = hypernetwork.spec, hypernetwork.blocks
    if not -len(blocks) <= position < len(blocks):
        raise ValueError(
            f"position must name one of the {len(blocks)} generated blocks, from 0 on or from -1 "
            f"backwards, got {position}."
        )
    if check_width_ratio(smallest) > check_width_ratio(largest):
        raise ValueError(
            f"smallest must not exceed largest, got {smallest} and {largest}; exchange them."
        )
    block = spec.blocks[blocks[position]]
    first, last = (widths_at(spec, blocks, ratio)[position] for ratio in (smallest, largest))
    widths = np.arange(first, last + 1)
    # Each integer width of this block as a ratio; the others follow it, as in any network. A width
    # that was rounded up may lie beyond the largest ratio.
    ratios = np.minimum(widths / block.hidden_width, largest)
    rows = np.array([widths_at(spec, blocks, float(ratio)) for ratio in ratios], np.int32)
    widest = np.maximum(rows.max(axis=0), hypernetwork.full_widths)
    container = morph(spec, blocks, widest.tolist())
    kernels = _conv2_kernels(hypernetwork, container, block.name, dict(params), jnp.asarray(rows))
    beyond = np.arange(kernels.shape[3]) >= widths[:, None]
    kernels = np.where(beyond[:, None, None, :, None], np.nan, np.asarray(kernels))
    return WeightSlices(block.name, block.hidden_width, widths, kernels)


def format_row(row: GridRow) -> str:
    """A line of the table under `TABLE_HEADER`."""
    widths = sorted(set(row.widths))
    shown = "/".join(map(str, widths)) if len(widths) <= 4 else f"{widths[0]}..{widths[-1]}"
    seen = "trained" if row.trained else "unseen"
    return (
        f"{row.width_ratio:6.3f}  {shown:>12}  {row.num_params:>10,}  "
        f"{row.num_macs / 1e6:>9.2f}  {100 * row.accuracy:>8.2f}  {seen}"
    )


TABLE_HEADER = (
    f"{'ratio':>6}  {'widths':>12}  {'parameters':>10}  {'MACs (M)':>9}  {'top-1 %':>8}  range"
)


def format_table(rows: Sequence[GridRow]) -> str:
    """The grid as plain text."""
    return "\n".join([TABLE_HEADER, *map(format_row, rows)])


def grid_dict(rows: Sequence[GridRow], *, dataset: str, split: str, **extra) -> dict:
    """The grid as JSON types: {"dataset", "split", "rows": [...]} and what is in `extra`."""
    return {"dataset": dataset, "split": split, **extra, "rows": [_row_dict(r) for r in rows]}


def _row_dict(row: GridRow) -> dict:
    return {**dataclasses.asdict(row), "widths": list(row.widths)}


def write_grid(
    directory: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    dataset: str,
    split: str,
    **extra,
) -> None:
    """Writes `grid.json` and `grid.csv` into `directory`; each file appears whole or not at all."""
    directory = pathlib.Path(directory)
    document = grid_dict(rows, dataset=dataset, split=split, **extra)
    partial = directory / "grid.json.partial"
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(directory / "grid.json")
    partial = directory / "grid.csv.partial"
    with partial.open("w", newline="") as file:
        fields = [field.name for field in dataclasses.fields(GridRow)]
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow({**_row_dict(row), "widths": " ".join(map(str, row.widths))})
    partial.replace(directory / "grid.csv")
