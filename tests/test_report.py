"""The report is made of the files of runs and of nothing else."""

import json

from networks import ROOT, refused
from PIL import Image

from neumeta_jax.commands import report
from neumeta_jax.errors import UsageError
from neumeta_jax.report import comparisons, tables

RESULTS = ROOT / "results"


FIELDS = {
    "source": "arXiv 0000.00000",
    "dataset": "cifar100",
    "network": "ResNet20",
    "training_macs": 2_340_000_000_000,
    "storage_bytes": 1_234_567,
    "continuous": False,
    "switch_images": 0,
    "switch_seconds": 0.0123,
    "wall_seconds": 65.0,
    "command": "python -m x",
    "commit": "abc",
    "device": "1 x cpu",
}


def row(method="slimmable", *, variant="", seed=0, images=1000, accuracies=(60.0, 50.0), **fields):
    sizes = [
        {
            "width_ratio": ratio,
            "compression": 100 * (1 - ratio),
            "widths": [int(16 * ratio), int(32 * ratio)],
            "num_params": int(1000 * ratio),
            "num_macs": int(40e6 * ratio),
            "images": images,
            "validation": accuracy + 20,
            "test": accuracy,
        }
        for ratio, accuracy in zip((1.0, 0.5), accuracies, strict=True)
    ]
    found = {"method": method, "variant": variant, "seed": seed, "sizes": sizes}
    return {**FIELDS, **found, "budget_images": images, "network_passes": 2 * images, **fields}


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def cells(text, start):
    """The cells of the first line of a table that starts with `start`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def make(folder, *args):
    report.main(["neumeta report", str(folder), *args])
    return (folder / "README.md").read_text()


def test_seeds_are_averaged_and_the_best_method_comes_first(tmp_path):
    for seed, first in enumerate((60.0, 61.0, 62.0)):
        put(tmp_path, f"a/{seed}/row.json", row(seed=seed, accuracies=(first, 50.0)))
    better = row("this project", variant="all", accuracies=(70.0, 65.0), continuous=True)
    put(tmp_path, "b/row.json", {**better, "switch_images": 2000})
    text = make(tmp_path)
    wanted = ["61.00 ± 1.00", "50.00 ± 0.00", "1.23 MB", "no", "no data"]
    assert cells(text, "slimmable")[:5] == wanted
    assert cells(text, "this project (all)")[:2] == ["70.00", "65.00"]
    assert cells(text, "this project (all)")[3:] == ["yes", "2,000 images"]
    assert text.index("| this project (all) |") < text.index("| slimmable |")
    assert "- slimmable; this project (all). arXiv 0000.00000: `python -m x`" in text
    cost = [line for line in text.splitlines() if line.startswith("| slimmable | 0, 1, 2 |")]
    assert "| 1,000 | 2,000 | 2.34 | 1:05 | 0.0123 | abc | 1 x cpu |" in cost[0]
    # What others published is there, and marked.
    name = "*published, not at this budget:* ResNet20 trained in full (the teacher)"
    assert cells(text, name)[:2] == ["68.83", ""]
    stem = "comparison_cifar100_resnet20_1000"
    with Image.open(tmp_path / f"{stem}.png") as figure:
        assert figure.width > 800
    lines = (tmp_path / f"{stem}.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 4
    assert lines[1] == "this project,all,0,1.0,1000,40000000,1000,90.0,70.0"
    assert f"({stem}.png)" in text


def test_budgets_and_networks_are_not_mixed_but_a_row_that_trains_nothing_is_in_all(tmp_path):
    put(tmp_path, "a/row.json", row(images=1000))
    put(tmp_path, "b/row.json", row(images=2000))
    put(tmp_path, "c/row.json", row(network="ResNet56"))
    pruned = row("pruned", images=5000, network_passes=0, training_macs=0)
    put(tmp_path, "d/row.json", pruned)
    text = make(tmp_path)
    assert cells(text, "*published, not at this budget:* HTTY")[:2] == ["66.13", "66.10"]
    parts = text.split("## Comparison: ")[1:]
    assert [part.partition(" training images\n")[0] for part in parts] == [
        "cifar100, ResNet20, 1,000",
        "cifar100, ResNet20, 2,000",
        "cifar100, ResNet56, 1,000",
    ]
    assert ["| pruned |" in part for part in parts] == [True, True, False]
    # Alone it has a comparison of its own.
    alone = tmp_path / "alone"
    put(alone, "d/row.json", pruned)
    assert "## Comparison: cifar100, ResNet20, 5,000 training images" in make(alone)


GRID = {
    "dataset": "cifar100",
    "split": "test",
    "trained_range": [0.5, 1.0],
    "num_inr_params": 4321,
    "rows": [
        {"width_ratio": 1.0, "accuracy": 0.68, "trained": True, "int8_accuracy": 0.675},
        {"width_ratio": 0.25, "accuracy": 0.55, "trained": False, "int8_accuracy": 0.5},
    ],
}
CONFIG = {"network": {"depth": 20}, "inr": {"kind": "grid"}, "train": {"skip_blocks": 0.5}}


def test_the_overview_has_a_line_for_each_way_in_which_a_run_was_evaluated(tmp_path):
    put(tmp_path, "run/grid.json", GRID)
    put(tmp_path, "run/config.json", CONFIG)
    depths = [
        {"skipped_blocks": n, "width_ratio": 1.0, "accuracy": 0.6 - n / 10, "trained": True}
        for n in (0, 1)
    ]
    put(tmp_path, "run/depths.json", {"rows": depths, "split": "test"})
    put(tmp_path, "other/grid.json", {**GRID, "split": "validation"})  # not of the test split
    lines = [line for line in make(tmp_path).splitlines() if "[run](run)" in line]
    assert [line.split(" | ")[1:6] for line in lines] == [
        ["widths [0.5, 1] and depth; INR kind `grid`", "68.00", "", "", "55.00 (never trained)"],
        ["the same, without one block of each stage", "50.00", "", "", ""],
        ["the same, weights in 8 bits", "67.50", "", "", "50.00 (never trained)"],
    ]
    put(tmp_path, "run/int8.json", {"rows": GRID["rows"][:1], "split": "test"})
    (line,) = (line for line in make(tmp_path).splitlines() if "8 bits" in line)
    assert line.split(" | ")[2:6] == ["67.50", "", "", ""]


def test_runs_that_differ_in_their_seed_alone_share_a_line(tmp_path):
    rows = [{"width_ratio": 1.0, "accuracy": 0.66, "trained": True}]
    other = {**CONFIG, "data": {"mixup": 0.0, "cutmix": 0.25}}
    for folder, grid, config in (
        ("run", GRID, {**CONFIG, "seed": 0}),
        ("run/seed1", {**GRID, "rows": rows}, {**CONFIG, "seed": 1}),
        ("run/other", GRID, {**other, "seed": 1}),
    ):
        put(tmp_path, f"{folder}/grid.json", grid)
        put(tmp_path, f"{folder}/config.json", config)
    lines = [line.split(" | ")[1:6] for line in make(tmp_path).splitlines() if "widths" in line]
    text = "widths [0.5, 1] and depth; INR kind `grid`"
    assert lines == [
        [f"{text}; 2 seeds", "67.00 ± 1.41", "", "", "55.00 (never trained)"],
        [text.replace(";", ", on mixed images;"), "68.00", "", "", "55.00 (never trained)"],
    ]


def test_the_tables_go_between_the_markers_of_a_readme_with_its_own_links(tmp_path):
    results = tmp_path / "results"
    put(results, "run/grid.json", GRID)
    put(results, "run/config.json", CONFIG)
    for number, variant in enumerate(("worst", "good", "best")):
        put(results, f"{variant}/row.json", row(variant=variant, accuracies=(60.0, 50.0 + number)))
    text = f"# A\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n"
    readme = put(tmp_path, "README.md", text)
    make(results, f"--readme={readme}")
    first = readme.read_text()
    assert first.startswith("# A\n\n") and first.endswith("\n\nafter\n") and "old" not in first
    assert "[run](results/run)" in first and "68.00" in first
    assert first.index("slimmable (best)") < first.index("slimmable (good)")
    assert "slimmable (worst)" not in first and "([all](results/README.md))" in first
    assert "| slimmable (worst) |" in (results / "README.md").read_text()
    make(results, f"--readme={readme}")
    assert readme.read_text() == first


def test_the_committed_report_and_the_table_of_the_docs_are_those_of_the_committed_files():
    found = comparisons.read_comparisons(RESULTS)
    text = tables.report(RESULTS, found)
    assert (RESULTS / "README.md").read_text() == text, "run neumeta report results"
    assert all((RESULTS / f"{comparison.stem}.png").exists() for comparison in found)
    block, page = tables.readme_block(RESULTS, found, "../results/"), ROOT / "docs" / "results.md"
    assert tables.replace_block(page, block) == page.read_text()


def test_what_cannot_be_reported_is_refused_in_a_sentence(tmp_path):
    def refuses(words, *args, folder=tmp_path):
        with refused(words, UsageError):
            make(folder, *args)

    refuses("must hold a row.json or grid.json")
    refuses("must be a folder", folder=tmp_path / "nothing")
    refuses("takes one folder", str(tmp_path))
    put(tmp_path, "a/row.json", "{")
    refuses("must be JSON")
    put(tmp_path, "a/row.json", {k: v for k, v in row().items() if k != "sizes"})
    refuses(r"lacks \['sizes'\]")
    put(tmp_path, "a/row.json", row())
    second = put(tmp_path, "b/row.json", row())
    refuses("must not be of one row, budget and seed")
    other = row("pruned")
    other["sizes"][1]["widths"] = [1, 2]
    put(tmp_path, "b/row.json", other)
    refuses("must be of the same sizes")
    second.unlink()
    readme = put(tmp_path, "top.md", f"{tables.END}\n{tables.BEGIN}\n")
    refuses("once each", f"--readme={readme}")
    assert not (tmp_path / "README.md").exists()
