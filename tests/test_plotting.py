import csv
import dataclasses

import pytest

from neumeta_jax.evaluation.rows import GridRow
from neumeta_jax.networks.cifar_spec import generated_blocks, morph, resnet_spec
from neumeta_jax.report import plotting, published

RESNET20 = resnet_spec(20, num_classes=100)
RESNET56 = resnet_spec(56, num_classes=100)


def made_up_row(spec, ratio):
    widths = [round(ratio * spec.hidden_widths[n]) for n in generated_blocks(spec)]
    small = morph(spec, generated_blocks(spec), widths)
    accuracy = 0.7 - 0.5 * abs(ratio - 0.8) ** 1.5
    row = GridRow(ratio, widths, small.num_params, small.num_macs, accuracy, 0.5 <= ratio <= 1)
    return dataclasses.replace(row, interval=(accuracy - 0.01, accuracy + 0.01))


def written(path, columns=""):
    """The lines of the CSV beside the PNG `path`; there is no other file."""
    assert sorted(path.parent.iterdir()) == [path.with_suffix(".csv"), path]
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with path.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert not columns or list(lines[0]) == columns.split()
    return lines


def test_published_results_are_fractions_of_the_networks_compared_and_have_their_source():
    for curve in published.CURVES:
        assert [round(n / 1e6, 1) for n in curve.num_macs] == [125.8, 98.6, 71.5, 44.4]
        assert curve.width_ratios == (1.0, 0.75, 0.5, 0.25)
        assert len(curve.accuracies) == len(curve.width_ratios)
        assert all(0.4 < a < 0.8 for a in curve.accuracies) and curve.source
    assert all(0.6 < s.accuracy < 0.95 and s.source for s in published.SINGLES)
    sizes = {(s.dataset, s.depth): s.num_macs for s in published.SINGLES}
    assert round(sizes["cifar100", 20] / 1e6, 2) == 40.82
    assert round(sizes["cifar10", 56] / 1e6, 2) == 125.75
    # Both sources agree on the individually trained ResNet56.
    (single,) = [s for s in published.SINGLES if (s.dataset, s.depth) == ("cifar100", 56)]
    curve = published.CURVES[0]
    assert (single.num_macs, single.accuracy) == (curve.num_macs[0], curve.accuracies[0])


CURVES = "trained individually; HTTY; HTTY, 150 more epochs per block; NeuMeta, full network"


@pytest.mark.parametrize(
    "dataset, spec, curves, depths",
    [
        ("cifar100", RESNET56, CURVES.split("; "), []),
        ("cifar100", RESNET20, [], [20]),
        ("cifar10", resnet_spec(56, num_classes=10), [], [20, 32, 44, 56]),
        ("digits", RESNET20, [], []),
        ("cifar100", resnet_spec(56, num_classes=100, stage_widths=(8, 16, 32)), [], []),
    ],
)
def test_a_run_is_compared_with_what_fits_it(dataset, spec, curves, depths):
    found_curves, found_singles = published.references(dataset, spec)
    assert [curve.name for curve in found_curves] == curves
    assert [single.depth for single in found_singles] == depths
    if (dataset, depths) == ("cifar100", [20]):
        assert found_singles[0].accuracy == 0.6883


@pytest.mark.parametrize("spec, num_published", [(RESNET56, 4 * 4), (RESNET20, 1)])
def test_accuracy_against_macs_has_all_its_results_in_its_csv(tmp_path, spec, num_published):
    rows = [made_up_row(spec, ratio) for ratio in (1.25, 1.0, 0.5, 0.25)]
    curves, singles = published.references("cifar100", spec)
    path = tmp_path / "macs.png"
    plotting.plot_against_macs(path, rows, title="x", curves=curves, singles=singles)
    lines = written(path, "name width_ratio num_macs accuracy low high trained source")
    assert len(lines) == 4 + num_published
    own = [line for line in lines if line["name"] == "this run"]
    for line, row in zip(own, rows[::-1], strict=True):
        assert float(line["width_ratio"]) == row.width_ratio
        assert int(line["num_macs"]) == row.num_macs
        found = tuple(float(line[name]) for name in ("accuracy", "low", "high"))
        assert found == (row.accuracy, *row.interval)
        assert line["trained"] == str(row.trained) and line["source"] == ""
    assert all(line["source"] for line in lines if line["name"] != "this run")


@pytest.mark.parametrize("teacher_accuracy", [None, 0.71])
def test_a_sweep_has_all_its_series_in_its_csv(tmp_path, teacher_accuracy):
    rows = [made_up_row(RESNET20, ratio) for ratio in (1.0, 0.3, 0.5)]
    path = tmp_path / "sweep.png"
    options = {"trained_range": (0.5, 1.0), "teacher_accuracy": teacher_accuracy}
    plotting.plot_sweep(path, rows, title="x", **options)
    lines = written(path, "series width_ratio num_macs accuracy low high trained")
    found = [(e["series"], float(e["width_ratio"]), float(e["accuracy"])) for e in lines]
    generated = [("generated", rows[n].width_ratio, rows[n].accuracy) for n in (1, 2, 0)]
    teacher = [("teacher", 1.0, 0.71)] if teacher_accuracy else []
    assert sorted(found) == sorted(generated + teacher)
    assert [point for point in found if point[0] == "generated"] == generated


def test_the_heat_map_of_width_and_depth_has_its_networks_in_its_csv(tmp_path):
    rows = [
        {"num_layers": layers, "width_ratio": ratio, "widths": [3, 0], "num_macs": 1000 * layers}
        | {"accuracy": ratio / 2, "trained": layers == 20}
        for layers in (20, 14)
        for ratio in (1.0, 0.5)
    ]
    path = tmp_path / "depths.png"
    plotting.plot_depths(path, rows, title="depths")
    lines = written(path)
    for name in ("num_layers", "width_ratio", "accuracy"):
        assert [line[name] for line in lines] == [str(row[name]) for row in rows]
    assert lines[0]["widths"] == "3 0"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved from now on, with their captions."""
    figures, save = [], plotting._save

    def keep(figure, path, title, caption, table=None):
        save(figure, path, title, caption, table)
        figures.append((figure, caption))

    monkeypatch.setattr(plotting, "_save", keep)
    return figures


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_networks_that_were_never_trained_stretch_no_axis_and_are_told_at_its_foot(tmp_path, drawn):
    rows = [made_up_row(RESNET20, ratio) for ratio in (1.0, 0.75, 0.5, 0.4, 0.25)]
    far = dataclasses.replace(rows[-1], accuracy=0.02, interval=(0.01, 0.03))
    options = {"trained_range": (0.5, 1.0), "teacher_accuracy": 0.71, "title": "x"}
    for draw in (plotting.plot_grid, plotting.plot_sweep):
        draw(tmp_path / "x.png", rows, **options)
        draw(tmp_path / "x.png", [*rows[:-1], far], **options)
    plotting.plot_against_macs(tmp_path / "x.png", [*rows[:-1], far], title="x")
    for (figure, caption), clipped in zip(drawn, (False, True, False, True, True), strict=True):
        low, high = figure.axes[0].get_ylim()
        assert (texts(figure).count("2.0") > 0) == clipped and 40 < low < 60 < 70 < high < 75
        assert "95 % intervals" in caption
    # A trained network is shown wherever it lies.
    plotting.plot_sweep(
        tmp_path / "x.png", [*rows, dataclasses.replace(far, trained=True)], **options
    )
    assert drawn[-1][0].axes[0].get_ylim()[0] < 2


def test_methods_far_below_the_best_are_told_in_the_caption_of_the_comparison(tmp_path, drawn):
    series = {
        "good": [(20e6, 60.0), (40e6, 70.0)],
        "falls": [(20e6, 5.0), (40e6, 65.0)],
        "scratch": [(20e6, 1.5), (40e6, 2.0)],
    }
    options = {"title": "x", "references": {"zoo": [(40e6, 71.0)]}, "num_images": 10_000}
    plotting.plot_comparison(tmp_path / "x.png", series, caption="One seed.", **options)
    figure, caption = drawn[0]
    assert caption.startswith("One seed. Below the axis")
    assert caption.endswith("falls (5.0); scratch (1.5, 2.0).")
    assert figure.axes[0].get_ylim()[0] > 50
    shown = figure.axes[0].get_legend_handles_labels()[1]
    assert sorted(shown) == ["falls", "good", "zoo (published, full length)"]


def test_a_search_names_the_networks_below_its_axis(tmp_path, drawn):
    rows = [
        {"widths": [n], "num_macs": n, "accuracy": accuracy, "uniform": n < 3, "front": n == 3}
        for n, accuracy in enumerate((0.6, 0.62, 0.64, 0.66, 0.1))
    ]
    options = {"title": "x", "column": "num_macs", "limit": 10, "winner": [3]}
    plotting.plot_search(tmp_path / "x.png", rows, caption="Chosen here.", **options)
    assert drawn[0][1] == "1 networks lie below the axis, from 10.0 %. Chosen here."
    assert len(written(tmp_path / "x.png")) == len(rows)


def test_the_colours_of_a_heat_map_span_more_than_chance(tmp_path, drawn):
    rows = [
        {"num_layers": layers, "width_ratio": ratio, "num_macs": macs, "trained": layers == 20}
        | {"accuracy": 0.98 - 0.002 * (ratio < 1) - 0.1 * (layers < 20)}
        for layers, macs in ((20, 636_000), (14, 415_000))
        for ratio in (1.0, 0.5)
    ]
    plotting.plot_depths(tmp_path / "depths.png", rows, title="depths")
    ((figure, _),) = drawn
    axis = figure.axes[0]
    assert axis.images[0].get_clim() == pytest.approx((93.0, 98.0))
    assert [text.get_text() for text in axis.texts][::2] == ["98.0\n0.64 M", "88.0*\n0.41 M"]
