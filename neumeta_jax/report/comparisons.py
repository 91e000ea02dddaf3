"""The rows of the comparison, read from row.json, by data set, network and budget."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from neumeta_jax.errors import UsageError, check
from neumeta_jax.networks import cifar_spec
from neumeta_jax.report import published

ROW_FILE = "row.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """A method at one seed: what `neumeta compare` writes to row.json.

    `sizes` have "width_ratio", "compression" in percent, "widths", "num_params", "num_macs",
    training "images", and accuracies on "validation" and "test" in percent. For what training took
    see `comparison.baseline.Cost`, for what a family needs `comparison.run.Family`.
    """

    method: str
    variant: str
    source: str
    seed: int
    dataset: str
    network: str
    budget_images: int
    sizes: list[dict[str, Any]]
    network_passes: int
    training_macs: int
    storage_bytes: int
    continuous: bool
    switch_images: int
    switch_seconds: float
    wall_seconds: float
    command: str
    commit: str | None
    device: str
    teacher: str | None = None
    teacher_passes: int = 0
    calibration_images: int = 0
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def comparison(self) -> tuple[str, str, int]:
        return self.dataset, self.network, self.budget_images

    @property
    def name(self) -> str:
        """As tables show it."""
        return self.method + (f" ({self.variant})" if self.variant else "")


@dataclasses.dataclass(frozen=True)
class Method:
    """The rows of a comparison that differ in their seed alone, by seed."""

    rows: tuple[Row, ...]

    @property
    def one(self) -> Row:
        return self.rows[0]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(size["width_ratio"] for size in self.one.sizes)

    def accuracies(self, ratio: float) -> list[float]:
        """On the test split in percent, an entry for each seed."""
        sizes = [size for row in self.rows for size in row.sizes]
        return [size["test"] for size in sizes if size["width_ratio"] == ratio]

    def mean(self, ratio: float) -> float:
        return statistics.mean(self.accuracies(ratio))

    @property
    def overall(self) -> float:
        """Mean test accuracy over seeds and sizes, in percent."""
        return statistics.mean(self.mean(ratio) for ratio in self.ratios)

    def average(self, field: str) -> float:
        return statistics.mean(getattr(row, field) for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rows of one data set, network and budget, best first."""

    dataset: str
    network: str
    budget_images: int
    methods: tuple[Method, ...]

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.network}, {self.budget_images:,} training images"

    @property
    def stem(self) -> str:
        """Of the figure's file name."""
        return f"comparison_{self.dataset}_{self.network.lower()}_{self.budget_images}"

    @property
    def references(self) -> tuple[list[published.Curve], list[published.Single]]:
        """What is published of this network, trained in full: see `published.references`."""
        if self.dataset not in published.NUM_CLASSES:
            return [], []
        depth = int(self.network.removeprefix("ResNet"))
        classes = published.NUM_CLASSES[self.dataset]
        spec = cifar_spec.resnet_spec(depth, num_classes=classes)
        curves, singles = published.references(self.dataset, spec)
        return list(curves), [single for single in singles if single.name == self.network]


def read(path: pathlib.Path, fields: Iterable[str]) -> dict[str, Any]:
    """The document in a JSON file, which must have `fields`."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UsageError(f"{path} must be JSON, but it is damaged; restore or remove it.") from None
    missing = sorted(set(fields) - set(found if isinstance(found, dict) else ()))
    check(
        not missing,
        f"{path} must be as this software writes it, but it lacks {missing}; restore or remove it.",
    )
    return found


def read_row(path: pathlib.Path) -> Row:
    fields = dataclasses.fields(Row)
    needed = [field.name for field in fields[: [f.name for f in fields].index("teacher")]]
    found = read(path, needed)
    return Row(**{field.name: found[field.name] for field in fields if field.name in found})


def read_comparisons(root: pathlib.Path) -> list[Comparison]:
    """The comparisons of all row.json below `root`, by data set, network and budget.

    A row that trains nothing is in all comparisons of its data set and network.

    Raises:
        UsageError: for a damaged file, two files of one row and seed, or rows of other sizes.
    """
    rows = {path: read_row(path) for path in sorted(root.rglob(ROW_FILE))}
    trained = {row.comparison for row in rows.values() if row.network_passes}
    groups: dict[tuple[str, str, int], dict[str, dict[int, pathlib.Path]]] = {}
    for path, row in rows.items():
        alike = {key for key in trained if key[:2] == row.comparison[:2]}
        for key in (not row.network_passes and alike) or {row.comparison}:
            group = groups.setdefault(key, {})
            first = next((next(iter(seeds.values())) for seeds in group.values()), path)
            seeds = group.setdefault(row.name, {})
            other = seeds.setdefault(row.seed, path)
            check(
                other == path,
                f"{path} and {other} must not be of one row, budget and seed; remove one of them.",
            )
            widths = [[size["widths"] for size in rows[p].sizes] for p in (first, path)]
            check(
                widths[0] == widths[1],
                f"{path} and {first} must be of the same sizes to be compared; remove one.",
            )
    comparisons = []
    for key, group in sorted(groups.items()):
        methods = [Method(tuple(rows[seeds[s]] for s in sorted(seeds))) for seeds in group.values()]
        methods.sort(key=lambda method: (-round(method.overall, 6), method.one.name))
        comparisons.append(Comparison(*key, tuple(methods)))
    return comparisons
