"""The tables and figures of results/, made from the files of the runs that are in it.

Equal files give equal text. Rows that differ in their seed alone are averaged.
"""

import collections
import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence

from neumeta_jax.errors import check
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import format_seconds
from neumeta_jax.report import plotting
from neumeta_jax.report.comparisons import Comparison, Method, read

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTICE = "Written by `neumeta report`; change the files it is made from instead."
RATIOS = (1.0, 0.75, 0.5, 0.25)  # of the overview
NUM_TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000}
# What the command was called when some of the committed rows were made.
_EARLIER = "python -m neumeta_jax.baselines"


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

    `variants` is how many of a method are shown, the best ones; all without.
    """
    first, ratios, rows = "test top-1 at compression", comparison.methods[0].ratios, []
    shown = collections.Counter()
    for method in comparison.methods:
        row = method.one
        shown[row.method] += 1
        if variants is not None and shown[row.method] > variants:
            continue
        cells = {_compression(ratio): _accuracy(method.accuracies(ratio)) for ratio in ratios}
        images = f"{row.switch_images:,} images" if row.switch_images else "no data"
        cells |= {
            "stored": f"{row.storage_bytes / 1e6:.2f} MB",
            "sizes between": "yes" if row.continuous else "no",
            "a change of size needs": images,
        }
        rows.append({first: row.name, **cells})
    curves, singles = comparison.references
    found = {curve.name: dict(curve.points) for curve in curves}
    found |= {f"{s.name} trained in full (the teacher)": {1.0: s.accuracy} for s in singles}
    for name, known in found.items():
        cells = {_compression(r): f"{100 * known[r]:.2f}" for r in ratios if r in known}
        rows.append({first: f"*published, not at this budget:* {name}", **cells})
    return table(rows)


def cost_table(comparison: Comparison) -> str:
    """What every method took; means over seeds."""
    lines = []
    for method in comparison.methods:
        row, rows = method.one, method.rows
        cells = {
            "method": row.name,
            "seeds": ", ".join(str(row.seed) for row in rows),
            "images drawn": f"{max(size['images'] for size in row.sizes):,}",
            "network passes (images)": f"{row.network_passes:,}",
            "multiply-adds of training (T)": f"{row.training_macs / 1e12:.2f}",
            "wall-clock": format_seconds(method.average("wall_seconds")),
            "a change of size (s)": f"{method.average('switch_seconds'):.3g}",
            "commit": ", ".join(dict.fromkeys(str(row.commit) for row in rows)),
            "device": ", ".join(dict.fromkeys(row.device for row in rows)),
        }
        lines.append(cells)
    return table(lines)


def commands(comparison: Comparison) -> str:
    """The command and the source of every method; those of one command in one line."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in sorted((method.one for method in comparison.methods), key=lambda row: row.name):
        command = row.command.replace(_EARLIER, "neumeta compare")
        names.setdefault((row.source, command), []).append(row.name)
    found = [(f"- {'; '.join(some)}. {source}", line) for (source, line), some in names.items()]
    return "\n".join(f"{text}: `{line}`" for text, line in found)


def _evaluations(path: pathlib.Path) -> Iterator[tuple[str, list[dict], str]]:
    """(what was evaluated, rows, field of the accuracy) of the run whose grid.json is at `path`."""
    grid = read(path, ("trained_range", "rows"))
    config = read(path.with_name("config.json"), ("network", "inr", "train"))
    low, high = grid["trained_range"]
    text = f"widths{' of the whole network' * (config.get('generated') == 'full')}"
    text += f" [{low:g}, {high:g}]{' and depth' * bool(config['train'].get('skip_blocks'))}"
    text += ", with terms for small ones" * bool(config["inr"].get("width_terms"))
    data = config.get("data", {})
    text += ", on mixed images" * bool(data.get("mixup") or data.get("cutmix"))
    kind = config["inr"]["kind"]
    yield text + (f"; INR kind `{kind}`" if kind != "projection" else ""), grid["rows"], "accuracy"
    depths = path.with_name("depths.json")
    found = read(depths, ("rows", "split")) if depths.exists() else {"split": "", "rows": []}
    rows = found["rows"] if found["split"] == "test" else []
    for number in sorted({row["skipped_blocks"] for row in rows} - {0}):
        some = [row for row in rows if row["skipped_blocks"] == number]
        blocks = "one block" if number == 1 else f"{number} blocks"
        yield f"the same, without {blocks} of each stage", some, "accuracy"
    int8 = path.with_name("int8.json")  # earlier versions put 8 bits into grid.json
    found = read(int8, ("rows", "split")) if int8.exists() else {**grid, "split": "test"}
    rounded = [row for row in found["rows"] if row.get("int8_accuracy") is not None]
    if rounded and found["split"] == "test":
        yield "the same, weights in 8 bits", rounded, "int8_accuracy"


def overview_table(root: pathlib.Path) -> str:
    """A line for each grid.json below `root` that is of a test split; "" if there is none.

    Runs that differ in their seed alone share a line. Runs on width and depth have a line more for
    each number of skipped blocks in depths.json, and runs that were evaluated in 8 bits one for
    that.
    """
    runs = collections.defaultdict(list)
    for path in sorted(root.rglob("grid.json")):
        grid = read(path, ("dataset", "split", "trained_range", "num_inr_params", "rows"))
        if grid["split"] != "test":
            continue
        config = read(path.with_name("config.json"), ("network", "inr", "train"))
        network = config["network"]
        name = network.get("factory") or f"ResNet{network['depth']}"
        folder = path.parent.relative_to(root).as_posix()
        recipe = json.dumps({**config, "seed": None}, sort_keys=True)
        for text, rows, field in _evaluations(path):
            head = f"{grid['dataset']}, {name}", text
            rest = f"{grid['num_inr_params']:,}", f"[{folder}]({folder})"
            rows = {row["width_ratio"]: (100 * row[field], row["trained"]) for row in rows}
            runs[recipe, text].append((head, rows, rest))
    lines = []
    for seeds in runs.values():
        (name, text), rows, (size, files) = seeds[0]
        text += f"; {len(seeds)} seeds" if len(seeds) > 1 else ""
        cells = dict.fromkeys(map(_compression, RATIOS), "")
        for ratio in set(RATIOS) & set(rows):
            mark = "" if rows[ratio][1] else " (never trained)"
            values = [found[ratio][0] for _, found, _ in seeds if ratio in found]
            cells[_compression(ratio)] = _accuracy(values) + mark
        line = {"data, network": name, "one INR, trained on": text}
        lines.append({**line, **cells, "INR parameters": size, "files": files})
    return table(lines, left=2) if lines else ""


def report(root: pathlib.Path, comparisons: Sequence[Comparison]) -> str:
    """The text of the report, with links from `root`."""
    parts = ["# Results", NOTICE]
    overview = overview_table(root)
    if overview:
        parts += [
            "## Runs to the end",
            "Test top-1 in percent at compression 0 to 75 %, ± the standard deviation over seeds.",
            overview,
        ]
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
    text = "\n\n".join(part for part in parts if part)
    return f"{BEGIN}\n\n{text.replace('](', f']({prefix}') if prefix else text}\n\n{END}"


def replace_block(path: pathlib.Path, block: str) -> str:
    """The text of the README at `path` with `block` in place of what its markers enclose.

    Raises:
        UsageError: unless it has each marker once, in their order.
    """
    text = path.read_text()
    check(
        text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END),
        f"{path} must have the lines {BEGIN} and {END} once each; add them.",
    )
    before, rest = text.split(BEGIN)
    return before + block + rest.split(END)[1]


def write_figure(path: pathlib.Path, comparison: Comparison) -> None:
    """Accuracy against multiply-adds, of each method its best variant; and all as CSV."""
    best: dict[str, Method] = {}
    for method in comparison.methods:  # best first
        best.setdefault(method.one.method, method)
    series = {
        method.one.name: [(size["num_macs"], method.mean(size["width_ratio"])) for size in sizes]
        for method in best.values()
        for sizes in [method.one.sizes]
    }
    curves, singles = comparison.references
    references = {
        curve.name: [(n, 100 * a) for n, (_, a) in zip(curve.num_macs, curve.points, strict=True)]
        for curve in curves
    }
    references |= {f"{s.name} trained in full": [(s.num_macs, 100 * s.accuracy)] for s in singles}
    seeds = {len(method.rows) for method in best.values()}
    number = "One seed" if seeds == {1} else f"Means of {min(seeds)} to {max(seeds)} seeds"
    images = NUM_TEST_IMAGES.get(comparison.dataset, 0)
    plotting.plot_comparison(
        path,
        series,
        title=f"{comparison.name}, test split",
        references=references,
        num_images=images,
        caption=f"{number}; of each method the variant that is best on the test split."
        + (f" Bars: 95 % intervals for {images:,} test images." if images else ""),
    )
    rows = [
        {
            **{name: getattr(row, name) for name in ("method", "variant", "seed")},
            **{name: size[name] for name in ("width_ratio", "num_params", "num_macs")},
            **{name: size[name] for name in ("images", "validation", "test")},
        }
        for method in comparison.methods
        for row in method.rows
        for size in row.sizes
    ]
    storage.write_csv(path.with_suffix(".csv"), storage.as_table(rows))
