import csv

import numpy as np
import pytest

from neumeta_jax import plotting, published
from neumeta_jax.architecture import cifar_resnet, generated_blocks, morph, widths_at
from neumeta_jax.evaluation import GridRow, WeightSlices

RESNET20 = cifar_resnet(20, num_classes=100)
RESNET56 = cifar_resnet(56, num_classes=100)


def made_up_rows(spec, ratios):
    blocks = generated_blocks(spec)
    rows = []
    for ratio in ratios:
        widths = widths_at(spec, blocks, ratio)
        small = morph(spec, blocks, widths)
        accuracy = 0.7 - 0.5 * abs(ratio - 0.8) ** 1.5
        trained = 0.5 <= ratio <= 1
        rows.append(GridRow(ratio, widths, small.num_params, small.num_macs, accuracy, trained))
    return rows


def made_up_slices():
    """Hidden widths 2..6 of a block of full width 5, three output channels."""
    widths = np.arange(2, 7)
    kernels = np.random.default_rng(0).normal(size=(5, 3, 3, 6, 3)).astype("float32")
    for kernel, width in zip(kernels, widths, strict=True):
        kernel[:, :, width:] = np.nan
    return WeightSlices("stage3_block1", 5, widths, kernels)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_written(tmp_path, name):
    """A PNG and a CSV, and nothing else."""
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.csv", f"{name}.png"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# --- published results -----------------------------------------------------------------------


def test_published_multiply_adds_are_those_of_the_networks_compared():
    for curve in published.CURVES:
        found = [round(n / 1e6, 1) for n in curve.num_macs]
        assert found == [125.8, 98.6, 71.5, 44.4]
        assert curve.width_ratios == (1.0, 0.75, 0.5, 0.25)
    sizes = {(s.dataset, s.depth): s.num_macs for s in published.SINGLES}
    assert round(sizes["cifar100", 20] / 1e6, 2) == 40.82
    assert round(sizes["cifar10", 56] / 1e6, 2) == 125.75


def test_every_published_accuracy_is_a_fraction_and_has_its_source():
    for curve in published.CURVES:
        assert len(curve.accuracies) == len(curve.width_ratios)
        assert all(0.4 < a < 0.8 for a in curve.accuracies) and curve.source
    assert all(0.6 < s.accuracy < 0.95 and s.source for s in published.SINGLES)


def test_both_sources_agree_on_the_individually_trained_resnet56():
    (single,) = [s for s in published.SINGLES if (s.dataset, s.depth) == ("cifar100", 56)]
    curve = published.CURVES[0]
    assert (single.num_macs, single.accuracy) == (curve.num_macs[0], curve.accuracies[0])


def test_a_run_is_compared_with_what_fits_it():
    curves, singles = published.references("cifar100", RESNET56)
    assert [c.name for c in curves] == [
        "trained individually",
        "HTTY",
        "HTTY, 150 more epochs per block",
        "NeuMeta, full network",
    ]
    assert singles == ()
    curves, singles = published.references("cifar100", RESNET20)
    assert curves == () and [s.accuracy for s in singles] == [0.6883]
    curves, singles = published.references("cifar10", cifar_resnet(56, num_classes=10))
    assert curves == () and [s.depth for s in singles] == [20, 32, 44, 56]
    assert published.references("digits", RESNET20) == ((), ())
    narrow = cifar_resnet(56, num_classes=100, stage_widths=(8, 16, 32))
    assert published.references("cifar100", narrow) == ((), ())


# --- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, num_curves, num_singles", [(RESNET56, 4, 0), (RESNET20, 0, 1)])
def test_accuracy_against_macs_has_the_run_and_the_published_results_in_its_csv(
    tmp_path, spec, num_curves, num_singles
):
    rows = made_up_rows(spec, [1.25, 1.0, 0.5, 0.25])
    curves, singles = published.references("cifar100", spec)
    plotting.plot_against_macs(
        tmp_path / "macs.png", rows, title="x", curves=curves, singles=singles
    )
    assert_written(tmp_path, "macs")
    lines = read_csv(tmp_path / "macs.csv")
    assert list(lines[0]) == ["name", "width_ratio", "num_macs", "accuracy", "trained", "source"]
    assert len(lines) == 4 + 4 * num_curves + num_singles
    own = [line for line in lines if line["name"] == "this run"]
    for line, row in zip(own, rows[::-1], strict=True):
        assert float(line["width_ratio"]) == row.width_ratio
        assert int(line["num_macs"]) == row.num_macs
        assert float(line["accuracy"]) == row.accuracy
        assert line["trained"] == str(row.trained) and line["source"] == ""
    assert all(line["source"] for line in lines if line["name"] != "this run")


@pytest.mark.parametrize("teacher_accuracy", [None, 0.71])
def test_a_sweep_has_all_its_series_in_its_csv(tmp_path, teacher_accuracy):
    rows = made_up_rows(RESNET20, [1.0, 0.3, 0.5])
    plotting.plot_sweep(
        tmp_path / "sweep.png",
        rows,
        title="x",
        trained_range=(0.5, 1.0),
        teacher_accuracy=teacher_accuracy,
    )
    assert_written(tmp_path, "sweep")
    lines = read_csv(tmp_path / "sweep.csv")
    assert list(lines[0]) == ["series", "width_ratio", "num_macs", "accuracy", "trained"]
    found = {}
    for line in lines:
        point = float(line["width_ratio"]), float(line["accuracy"])
        found.setdefault(line["series"], []).append(point)
    wanted = {"generated": [(row.width_ratio, row.accuracy) for row in (rows[1], rows[2], rows[0])]}
    if teacher_accuracy:
        wanted["teacher"] = [(1.0, 0.71)]
    assert found == wanted


# --- weights ---------------------------------------------------------------------------------


def test_weight_slices_have_curves_and_image_in_their_csv(tmp_path):
    slices = made_up_slices()
    plotting.plot_weight_slices(
        tmp_path / "weights.png", slices, title="x", trained_range=(0.5, 1.0)
    )
    assert_written(tmp_path, "weights")
    lines = read_csv(tmp_path / "weights.csv")
    assert list(lines[0]) == [
        "block",
        "panel",
        "width",
        "out_channel",
        "hidden_channel",
        "tap",
        "value",
    ]
    curves = [line for line in lines if line["panel"] == "curves"]
    image = [line for line in lines if line["panel"] == "image"]
    assert len(curves) == 5 * 6 and len(image) == 5 * 6
    assert {(line["out_channel"], line["tap"]) for line in image} == {("0", "4")}
    for line in lines:
        width, out, hidden, tap = (
            int(line[k]) for k in ("width", "out_channel", "hidden_channel", "tap")
        )
        if hidden >= width:
            assert line["value"] == ""
        else:
            wanted = slices.kernels[width - 2, tap // 3, tap % 3, hidden, out]
            assert np.float32(line["value"]) == wanted


def test_default_entries_differ_and_lie_within_the_kernel():
    for out_width, hidden in ((3, 6), (64, 80)):
        kernels = np.zeros((1, 3, 3, hidden, out_width), "float32")
        slices = WeightSlices("x", hidden * 4 // 5, np.array([hidden]), kernels)
        entries = plotting.default_entries(slices)
        assert len(set(entries)) == 6
        below = np.array([out_width, hidden, 9])
        assert np.all((np.array(entries) >= 0) & (np.array(entries) < below))


def test_the_heat_map_of_width_and_depth_has_its_networks_in_its_csv(tmp_path):
    rows = [
        {
            "num_layers": layers,
            "width_ratio": ratio,
            "widths": [3, 0],
            "num_macs": 1000 * layers,
            "accuracy": ratio / 2,
            "trained": layers == 20,
        }
        for layers in (20, 14)
        for ratio in (1.0, 0.5)
    ]
    plotting.plot_depths(tmp_path / "depths.png", rows, title="depths")
    assert (tmp_path / "depths.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "depths.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["num_layers"], row["width_ratio"], row["accuracy"]) for row in found] == [
        (str(row["num_layers"]), str(row["width_ratio"]), str(row["accuracy"])) for row in rows
    ]
    assert found[0]["widths"] == "3 0"
