"""The tables and figures of results/, made from the files of the runs that are in it.

    python -m neumeta_jax.report results --out=results/README.md --readme=README.md

Reads every `row.json` (a row of the comparison, see `baselines`), `grid.json` with the
`config.json` beside it, and `depths.json` below the folder. Writes the report with a figure of each
comparison beside it (PNG and CSV), and puts the tables between the two markers of a README:

    <!-- results: begin -->
    <!-- results: end -->

Equal files give equal text. Rows that differ in their seed alone are averaged.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neumeta_jax.commands import command_line
from neumeta_jax.errors import UsageError
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import format_seconds
from neumeta_jax.networks import cifar_spec
from neumeta_jax.report import plotting, published

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTICE = "Written by `python -m neumeta_jax.report`; change the files it is made from instead."
RATIOS = (1.0, 0.75, 0.5, 0.25)  # of the overview
ROW_FIELDS = {
    *("method", "variant", "source", "seed", "dataset", "network", "budget_images", "sizes"),
    *("network_passes", "training_macs", "storage_bytes", "continuous", "switch_images"),
    *("switch_seconds", "wall_seconds", "command", "commit", "device"),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """The rows of a comparison that differ in their seed alone, by seed."""

    rows: tuple[Mapping[str, Any], ...]

    @property
    def one(self) -> Mapping[str, Any]:
        return self.rows[0]

    @property
    def name(self) -> str:
        """As tables show it."""
        return self.one["method"] + (f" ({self.one['variant']})" if self.one["variant"] else "")

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(size["width_ratio"] for size in self.one["sizes"])

    def accuracies(self, ratio: float, split: str = "test") -> list[float]:
        """In percent, an entry for each seed."""
        return [
            size[split]
            for row in self.rows
            for size in row["sizes"]
            if size["width_ratio"] == ratio
        ]

    def mean(self, ratio: float) -> float:
        return statistics.mean(self.accuracies(ratio))

    @property
    def overall(self) -> float:
        """Mean test accuracy over seeds and sizes, in percent."""
        return statistics.mean(self.mean(ratio) for ratio in self.ratios)

    def average(self, field: str) -> float:
        return statistics.mean(row[field] for row in self.rows)


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
    def references(self) -> tuple[tuple[published.Curve, ...], tuple[published.Single, ...]]:
        """What is published, of networks trained in full: see `published.references`."""
        if self.dataset not in published.NUM_CLASSES:
            return (), ()
        spec = cifar_spec.resnet_spec(
            int(self.network.removeprefix("ResNet")),
            num_classes=published.NUM_CLASSES[self.dataset],
        )
        return published.references(self.dataset, spec)


# --- reading ---------------------------------------------------------------------------------


def _read(path: pathlib.Path, fields: Iterable[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UsageError(f"{path} must be JSON, but it is damaged; restore or remove it.") from None
    missing = set(fields) - set(found if isinstance(found, dict) else ())
    if missing:
        raise UsageError(
            f"{path} must be as this software writes it, but it lacks {sorted(missing)}; restore "
            "or remove it."
        )
    return found


def read_comparisons(root: pathlib.Path) -> list[Comparison]:
    """The comparisons of all row.json below `root`, by data set, network and budget.

    A row that trains nothing is in all comparisons of its data set and network.

    Raises:
        UsageError: for a damaged file, two files of one row and seed, or rows of other sizes.
    """
    found = [(path, _read(path, ROW_FIELDS)) for path in sorted(root.rglob("row.json"))]
    keys = [(row["dataset"], row["network"], row["budget_images"]) for _, row in found]
    trained = [key for key, (_, row) in zip(keys, found, strict=True) if row["network_passes"]]
    groups: dict[tuple, dict[tuple, dict[int, tuple[pathlib.Path, dict]]]] = {}
    for own, (path, row) in zip(keys, found, strict=True):
        shared = () if row["network_passes"] else {key for key in trained if key[:2] == own[:2]}
        for key in shared or (own,):
            group = groups.setdefault(key, {})
            seeds = group.setdefault((row["method"], row["variant"]), {})
            if row["seed"] in seeds:
                raise UsageError(
                    f"{path} and {seeds[row['seed']][0]} must not be of one row, budget and seed; "
                    "remove one of them."
                )
            seeds[row["seed"]] = path, row
            sizes = [size["widths"] for size in row["sizes"]]
            first_path, first = next(iter(next(iter(group.values())).values()))
            if sizes != [size["widths"] for size in first["sizes"]]:
                raise UsageError(
                    f"{path} and {first_path} must be of the same sizes to be compared; remove one."
                )
    comparisons = []
    for (dataset, network, images), group in sorted(groups.items()):
        methods = [
            Method(tuple(seeds[seed][1] for seed in sorted(seeds))) for seeds in group.values()
        ]
        methods.sort(key=lambda method: (-round(method.overall, 6), method.name))
        comparisons.append(Comparison(dataset, network, images, tuple(methods)))
    return comparisons


# --- tables ----------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, str]], *, left: int = 1) -> str:
    """A Markdown table whose first `left` columns are words and the others numbers.

    Each row has its cells by the names of the columns; the first one has all of them.
    """
    header = list(rows[0])
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    lines = [[row.get(name, "") for name in header] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _accuracy(values: Sequence[float]) -> str:
    """In percent; the mean and, of several seeds, the sample standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _compression(ratio: float) -> str:
    return f"{100 * (1 - ratio):.4g} %"


def accuracy_table(comparison: Comparison, *, variants: int | None = None) -> str:
    """Test accuracy of every method, best first, and of what is published, marked as such.

    Args:
        variants: how many of a method, the best ones; all without.
    """
    first, ratios = "test top-1 at compression", comparison.methods[0].ratios
    rows = []
    shown = collections.Counter()
    for method in comparison.methods:
        row = method.one
        shown[row["method"]] += 1
        if variants is not None and shown[row["method"]] > variants:
            continue
        images = row["switch_images"]
        rows.append(
            {
                first: method.name,
                **{_compression(ratio): _accuracy(method.accuracies(ratio)) for ratio in ratios},
                "stored": f"{row['storage_bytes'] / 1e6:.2f} MB",
                "sizes between": "yes" if row["continuous"] else "no",
                "a change of size needs": f"{images:,} images" if images else "no data",
            }
        )
    curves, singles = comparison.references
    references = [(c.name, dict(zip(c.width_ratios, c.accuracies, strict=True))) for c in curves]
    references += [
        (f"{single.name} trained in full (the teacher)", {1.0: single.accuracy})
        for single in singles
        if single.name == comparison.network
    ]
    for name, found in references:
        cells = {_compression(r): f"{100 * found[r]:.2f}" for r in ratios if r in found}
        rows.append({first: f"*published, not at this budget:* {name}", **cells})
    return table(rows)


def cost_table(comparison: Comparison) -> str:
    """What every method took; means over seeds."""
    return table(
        [
            {
                "method": method.name,
                "seeds": ", ".join(str(row["seed"]) for row in method.rows),
                "images drawn": f"{max(size['images'] for size in method.one['sizes']):,}",
                "network passes (images)": f"{method.one['network_passes']:,}",
                "multiply-adds of training (T)": f"{method.one['training_macs'] / 1e12:.2f}",
                "wall-clock": format_seconds(method.average("wall_seconds")),
                "a change of size (s)": f"{method.average('switch_seconds'):.3g}",
                "commit": ", ".join(dict.fromkeys(str(row["commit"]) for row in method.rows)),
                "device": ", ".join(dict.fromkeys(row["device"] for row in method.rows)),
            }
            for method in comparison.methods
        ]
    )


def commands(comparison: Comparison) -> str:
    """The command and the source of every method; those of one command in one line."""
    names: dict[tuple[str, str], list[str]] = {}
    for method in sorted(comparison.methods, key=lambda method: method.name):
        names.setdefault((method.one["source"], method.one["command"]), []).append(method.name)
    lines = [
        f"- {'; '.join(found)}. {source}: `{command}`" for (source, command), found in names.items()
    ]
    return "\n".join(lines)


def overview_table(root: pathlib.Path) -> str:
    """A line for each grid.json below `root` that is of a test split; "" if there is none.

    Runs on width and depth have a line more for each number of skipped blocks in depths.json, and
    runs that were evaluated in 8 bits one for that.
    """
    lines = []
    for path in sorted(root.rglob("grid.json")):
        grid = _read(path, ("dataset", "split", "trained_range", "num_inr_params", "rows"))
        if grid["split"] != "test":
            continue
        config = _read(path.with_name("config.json"), ("network", "inr", "train"))
        low, high = grid["trained_range"]
        depth = bool(config["train"].get("skip_blocks"))
        whole = " of the whole network" if config.get("generated") == "full" else ""
        trained = f"widths{whole} [{low:g}, {high:g}]" + (" and depth" if depth else "")
        kind = config["inr"]["kind"]
        trained += "" if kind == "projection" else f"; INR kind `{kind}`"
        folder = path.parent.relative_to(root).as_posix()
        network = config["network"].get("factory") or f"ResNet{config['network']['depth']}"
        name = f"{grid['dataset']}, {network}"
        size = f"{grid['num_inr_params']:,}"

        def add(text, rows, field="accuracy", *, name=name, size=size, folder=folder):
            cells = dict.fromkeys(map(_compression, RATIOS), "")
            for row in rows:
                mark = "" if row["trained"] else " (never trained)"
                if row["width_ratio"] in RATIOS:
                    cells[_compression(row["width_ratio"])] = f"{100 * row[field]:.2f}{mark}"
            line = {"data, network": name, "one INR, trained on": text, **cells}
            lines.append({**line, "INR parameters": size, "files": f"[{folder}]({folder})"})

        add(trained, grid["rows"])
        depths = path.with_name("depths.json")
        found = _read(depths, ("rows", "split")) if depths.exists() else {}
        if found.get("split") == "test":
            rows = found["rows"]
            for number in sorted({row["skipped_blocks"] for row in rows} - {0}):
                some = [row for row in rows if row["skipped_blocks"] == number]
                blocks = "one block" if number == 1 else f"{number} blocks"
                add(f"the same, without {blocks} of each stage", some)
        rows = [row for row in grid["rows"] if row.get("int8_accuracy") is not None]
        if rows:
            add("the same, weights in 8 bits", rows, "int8_accuracy")
    return table(lines, left=2) if lines else ""


# --- the report ------------------------------------------------------------------------------


def _linked_from(text: str, prefix: str) -> str:
    """`text` of the report with its links as they are from another folder."""
    return text.replace("](", f"]({prefix}") if prefix else text


def report(root: pathlib.Path, comparisons: Sequence[Comparison]) -> str:
    """The text of the report, with links from `root`."""
    parts = ["# Results", NOTICE]
    overview = overview_table(root)
    if overview:
        parts += ["## Runs to the end", "Test top-1 in percent at compression 0 to 75 %.", overview]
    for comparison in comparisons:
        parts += [
            f"## Comparison: {comparison.name}",
            "Every row has the same teacher, data, split, augmentation and family of sizes, and "
            f"draws {comparison.budget_images:,} training images: networks that are trained one by "
            "one as many each, those that train nothing none. An image counts once, however many "
            "sizes it passes through in a step; where sizes have images of their own, as in "
            "NeuMeta and HTTY, each sees its part. Best mean first; ± is the standard deviation "
            "over seeds.",
            accuracy_table(comparison),
            f"![accuracy against multiply-adds]({comparison.stem}.png)",
            cost_table(comparison),
            "Network passes are images through a network forward and backward, summed over sizes; "
            "their multiply-adds take a backward pass as two forward passes and masked networks at "
            "full size, and leave out what generates weights.",
            commands(comparison),
        ]
    return "\n\n".join(parts) + "\n"


def readme_block(root: pathlib.Path, comparisons: Sequence[Comparison], prefix: str) -> str:
    """What stands between the markers of a README in another folder, the markers included."""
    parts = [overview_table(root)]
    for comparison in comparisons:
        parts += [
            f"**{comparison.name}**, everybody on the same budget, of a method the best two "
            "variants ([all](README.md)):",
            accuracy_table(comparison, variants=2),
        ]
    text = _linked_from("\n\n".join(part for part in parts if part), prefix)
    return f"{BEGIN}\n\n{text}\n\n{END}"


def replace_block(path: pathlib.Path, block: str) -> str:
    """The text of the README at `path` with `block` in place of what its markers enclose.

    Raises:
        UsageError: unless it has each marker once, in their order.
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{path} must have the lines {BEGIN} and {END} once each; add them.")
    before, rest = text.split(BEGIN)
    return before + block + rest.split(END)[1]


def write_figure(path: pathlib.Path, comparison: Comparison) -> None:
    """Accuracy against multiply-adds, of each method its best variant; and all as CSV."""
    best: dict[str, Method] = {}
    for method in comparison.methods:  # best first
        best.setdefault(method.one["method"], method)
    curves, singles = comparison.references
    plotting.plot_comparison(
        path,
        {
            method.name: [
                (size["num_macs"], method.mean(size["width_ratio"])) for size in method.one["sizes"]
            ]
            for method in best.values()
        },
        title=f"{comparison.name}, test split",
        references={
            **{c.name: (c.num_macs, [100 * a for a in c.accuracies]) for c in curves},
            **{
                f"{s.name} trained in full": ([s.num_macs], [100 * s.accuracy])
                for s in singles
                if s.name == comparison.network
            },
        },
    )
    rows = [
        {
            **{name: row[name] for name in ("method", "variant", "seed")},
            **{name: size[name] for name in ("width_ratio", "num_params", "num_macs")},
            **{name: size[name] for name in ("images", "validation", "test")},
        }
        for method in comparison.methods
        for row in method.rows
        for size in row["sizes"]
    ]
    storage.write_csv(path.with_suffix(".csv"), storage.as_table(rows))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", type=pathlib.Path, help="folder with the files of runs")
    parser.add_argument("--out", type=pathlib.Path, help="default: README.md in the folder")
    parser.add_argument("--readme", type=pathlib.Path, help="to put the tables into as well")
    args = parser.parse_args(argv[1:])
    for name, value in vars(args).items():
        setattr(args, name, value and pathlib.Path(command_line.local(str(value), f"--{name}")))
    if not args.results.is_dir():
        raise UsageError(f"{args.results} must be a folder with the files of runs; there is none.")
    out = args.out or args.results / "README.md"
    comparisons = read_comparisons(args.results)
    if not comparisons and not overview_table(args.results):
        raise UsageError(f"{args.results} must hold a row.json or grid.json, but it has none.")
    readme = None
    if args.readme:
        start = args.readme.resolve().parent
        prefix = pathlib.PurePath(os.path.relpath(args.results.resolve(), start)).as_posix() + "/"
        block = readme_block(args.results, comparisons, prefix)
        readme = replace_block(args.readme, block)
    for comparison in comparisons:
        write_figure(out.parent / f"{comparison.stem}.png", comparison)
    texts = {out: report(args.results, comparisons), args.readme: readme}
    for path, text in texts.items():
        if text is not None:
            storage.write_text(path, text)
            print(f"wrote {path}")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
