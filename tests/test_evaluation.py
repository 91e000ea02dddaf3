import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from neumeta_jax import evaluation, hypernetwork as hyper, plotting, resnet
from neumeta_jax.architecture import cifar_resnet, generated_blocks, morph
from neumeta_jax.evaluation import GridRow
from neumeta_jax.hypernetwork import Hypernetwork
from neumeta_jax.inr import Grid
from neumeta_jax.training import Preprocessing

SPEC = cifar_resnet(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
FAMILY = Hypernetwork(SPEC, generated_blocks(SPEC), Grid(noise_scale=1.0))
PREPROCESSING = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
NUM_IMAGES = 23
RANGE = (0.5, 1.0)
RATIOS = [1.0, 0.5, 1.25, 0.25]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8, 3)).astype("uint8")


@pytest.fixture(scope="module")
def backbone():
    rng = np.random.default_rng(1)
    params = resnet.init_params(jax.random.key(0), SPEC)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("float32"), params)


@pytest.fixture(scope="module")
def params(backbone):
    return hyper.init(jax.random.key(1), FAMILY, backbone, alpha=0.8, from_backbone=True)


def predictions(spec, tree, images):
    x = (images / 255 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)
    apply = jax.jit(lambda tree, x: resnet.apply(spec, tree, x))
    return np.argmax(np.asarray(apply(tree, x.astype("float32"))), axis=-1)


@pytest.fixture(scope="module")
def labels(backbone, images):
    """Right for some images and wrong for the others."""
    found = predictions(SPEC, backbone, images)
    assert len(set(found)) > 1
    return np.where(np.arange(NUM_IMAGES) % 3, found, (found + 1) % 5).astype("int32")


def grid(params, ratios, images, labels, **options):
    options = {"trained_range": RANGE, "batch_size": 10, **options}
    return evaluation.evaluate_grid(
        FAMILY, params, ratios, images, labels, PREPROCESSING, **options
    )


@pytest.fixture(scope="module")
def rows(params, images, labels):
    return grid(params, RATIOS, images, labels)


def is_one_sentence(error):
    message = str(error.value)
    return "\n" not in message and message.endswith(".")


# --- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [10, 23, 1000])
def test_accuracy_counts_the_argmax_whatever_the_batch_size(backbone, images, labels, batch_size):
    wanted = np.mean(predictions(SPEC, backbone, images) == labels)
    assert 0.5 < wanted < 0.8
    got = evaluation.accuracy(SPEC, backbone, images, labels, PREPROCESSING, batch_size=batch_size)
    assert got == wanted


def test_images_that_fill_up_the_last_batch_do_not_count(backbone, images):
    """Black images fill it up; the label that they would get is right for all others."""
    black = predictions(SPEC, backbone, np.zeros_like(images))[0]
    labels = np.full(NUM_IMAGES, black, "int32")
    wanted = np.mean(predictions(SPEC, backbone, images) == black)
    got = evaluation.accuracy(SPEC, backbone, images, labels, PREPROCESSING, batch_size=10)
    assert got == wanted


def test_batch_norm_accuracy_is_that_of_the_folded_network(images):
    spec = cifar_resnet(8, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    init = jax.jit(resnet.ResNet(spec).init)
    variables = init(jax.random.key(0), np.zeros((1, 8, 8, 3), "float32"))
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda x: x + 0.2 * abs(rng.normal(size=x.shape)).astype("float32"), variables
    )
    folded = resnet.fold_batch_norm(variables)
    labels = (predictions(spec, folded, images) + (np.arange(NUM_IMAGES) % 3 == 0)) % 5
    for accuracy, tree in (
        (evaluation.batch_norm_accuracy, variables),
        (evaluation.accuracy, folded),
    ):
        got = accuracy(spec, tree, images, labels, PREPROCESSING, batch_size=10)
        assert got == pytest.approx(15 / 23)


def test_an_empty_split_is_refused(backbone, images, labels):
    with pytest.raises(ValueError, match="at least one image, got an empty split") as error:
        evaluation.accuracy(SPEC, backbone, images[:0], labels[:0], PREPROCESSING)
    assert is_one_sentence(error)


# --- grid ------------------------------------------------------------------------------------


def test_rows_hold_the_counts_of_the_dense_networks_in_the_order_given(rows):
    assert [row.width_ratio for row in rows] == RATIOS
    for row in rows:
        small = morph(SPEC, FAMILY.blocks, row.widths)
        assert row.widths == tuple(FAMILY.widths(row.width_ratio))
        assert (row.num_params, row.num_macs) == (small.num_params, small.num_macs)
    assert rows[0].num_params == SPEC.num_params
    assert rows[2].num_params > SPEC.num_params > rows[1].num_params > rows[3].num_params


def test_rows_hold_the_accuracy_of_the_dense_networks(rows, params, images, labels):
    for row in rows[1:3]:  # below and beyond the full size
        small, tree = hyper.generate_dense(FAMILY, params, row.widths)
        wanted = np.mean(predictions(small, tree, images) == labels)
        assert row.accuracy == wanted


def test_rows_say_whether_their_ratio_was_trained(rows):
    assert [row.trained for row in rows] == [True, True, False, False]


def test_each_row_is_reported_as_soon_as_it_is_known(params, images, labels):
    seen = []
    found = grid(params, [1.0, 0.5], images, labels, on_row=seen.append)
    assert seen == found


def test_ratios_that_round_to_the_same_widths_are_evaluated_once(
    params, images, labels, monkeypatch
):
    ratios = [0.5, 0.51, 1.0, 1.01, 0.49]
    assert len({tuple(FAMILY.widths(ratio)) for ratio in ratios}) == 2
    accuracy, calls = evaluation.accuracy, []

    def counted(*args, **options):
        calls.append(args)
        return accuracy(*args, **options)

    monkeypatch.setattr(evaluation, "accuracy", counted)
    found = grid(params, ratios, images, labels)
    assert len(calls) == 2
    assert [row.width_ratio for row in found] == ratios
    assert [row.trained for row in found] == [True, True, True, False, False]
    assert found[0].accuracy == found[1].accuracy == found[4].accuracy
    assert found[2].accuracy == found[3].accuracy


@pytest.mark.parametrize("ratio", [0, 1.6, -0.5, float("nan")])
def test_a_width_ratio_out_of_range_is_refused_before_anything_is_evaluated(
    params, images, labels, ratio
):
    seen = []
    with pytest.raises(ValueError, match=r"\(0, 1.5\], got " + str(ratio)) as error:
        grid(params, [1.0, ratio], images, labels, on_row=seen.append)
    assert seen == []
    assert "\n" not in str(error.value)


def test_averaged_samples_need_a_key(params, images, labels):
    with pytest.raises(ValueError, match="got num_samples=3") as error:
        grid(params, [1.0], images, labels, num_samples=3)
    assert is_one_sentence(error)
    (row,) = grid(params, [1.0], images, labels, num_samples=3, key=jax.random.key(0))
    assert 0 <= row.accuracy <= 1


# --- the width axis --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratios, accuracies, fall, where",
    [
        ([0.5, 0.75, 1.0], [0.4, 0.3, 0.6], 0.2, 0.75),
        ([0.0, 0.1, 1.0], [0.0, 0.0, 1.0], 0.1, 0.1),  # the line is taken where the point lies
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.5, 0.1, 0.5], 0.4, 0.4),
        ([0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.5, 0.0], 0.0, None),
        ([0.1, 0.2, 0.7], [0.5, 0.5, 0.5], 0.0, None),
        ([0.5, 1.0], [0.9, 0.1], 0.0, None),  # no interior point
        ([0.5], [0.9], 0.0, None),
        ([], [], 0.0, None),
    ],
)
def test_the_largest_dip_is_below_the_line_through_the_two_neighbours(
    ratios, accuracies, fall, where
):
    found = evaluation.largest_dip(ratios, accuracies)
    assert found.fall == pytest.approx(fall, abs=1e-12)
    assert found.where == where


@pytest.mark.parametrize(
    "ratios, accuracies, match",
    [
        ([0.5, 1.0], [0.5], "got 1 for 2"),
        ([0.5, 1.0, 0.75], [0.5, 0.5, 0.5], r"increase, got \[0.5, 1.0, 0.75\]"),
        ([0.5, 0.5, 0.75], [0.5, 0.5, 0.5], r"increase, got \[0.5, 0.5, 0.75\]"),
    ],
)
def test_a_dip_needs_increasing_ratios_with_one_accuracy_each(ratios, accuracies, match):
    with pytest.raises(ValueError, match=match) as error:
        evaluation.largest_dip(ratios, accuracies)
    assert is_one_sentence(error)


@pytest.mark.parametrize("position", [0, -1])
def test_weight_slices_are_the_kernels_of_the_dense_networks(params, position):
    slices = evaluation.weight_slices(
        FAMILY, params, position=position, smallest=0.25, largest=1.25
    )
    full = FAMILY.full_widths[position]
    assert slices.block == SPEC.blocks[FAMILY.blocks[position]].name
    assert slices.full_width == full
    assert list(slices.widths) == list(range(1 if full == 4 else 2, (5 if full == 4 else 8) + 1))
    for number in (0, len(slices.widths) - 1):  # below and beyond the full size
        width = slices.widths[number]
        _, tree = hyper.generate_dense(FAMILY, params, FAMILY.widths(width / full))
        wanted = tree[slices.block]["conv2"]["kernel"]
        kernel = slices.kernels[number]
        np.testing.assert_allclose(kernel[:, :, :width], wanted, rtol=1e-5, atol=1e-6)
        assert np.isnan(kernel[:, :, width:]).all()
    assert np.isfinite(slices.kernels[-1]).all()


def test_weight_slices_reach_the_largest_ratio_allowed(params):
    """There the width is rounded up and lies beyond 1.5 times the full one."""
    odd = dataclasses.replace(SPEC, hidden_widths=(5,) * len(SPEC.hidden_widths))
    family = dataclasses.replace(FAMILY, spec=odd)
    backbone = resnet.init_params(jax.random.key(0), odd)
    slices = evaluation.weight_slices(
        family, hyper.init(jax.random.key(1), family, backbone), smallest=1.3, largest=1.5
    )
    assert list(slices.widths) == [7, 8]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"position": 2}, "2 generated blocks, .* got 2"),
        ({"position": -3}, "2 generated blocks, .* got -3"),
        ({"largest": 1.6}, r"\(0, 1.5\], got 1.6"),
        ({"smallest": 1.0, "largest": 0.5}, "got 1.0 and 0.5"),
    ],
)
def test_weight_slices_that_do_not_exist_are_refused(params, options, match):
    with pytest.raises(ValueError, match=match) as error:
        evaluation.weight_slices(FAMILY, params, **options)
    assert "\n" not in str(error.value)


# --- what is written -------------------------------------------------------------------------


def test_grid_json_has_its_schema(tmp_path, rows):
    evaluation.write_grid(tmp_path, rows, dataset="digits", split="test", seconds=1.5)
    document = json.loads((tmp_path / "grid.json").read_text())
    assert set(document) == {"dataset", "split", "rows", "seconds"}
    assert (document["dataset"], document["split"]) == ("digits", "test")
    for found, row in zip(document["rows"], rows, strict=True):
        assert set(found) == {
            "width_ratio",
            "widths",
            "num_params",
            "num_macs",
            "accuracy",
            "trained",
        }
        assert GridRow(**{**found, "widths": tuple(found["widths"])}) == row
        assert type(found["trained"]) is bool and type(found["num_params"]) is int


def test_grid_csv_holds_the_same_rows(tmp_path, rows):
    evaluation.write_grid(tmp_path, rows, dataset="digits", split="test")
    with (tmp_path / "grid.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [field.name for field in dataclasses.fields(GridRow)]
    for line, row in zip(found, rows, strict=True):
        assert float(line["width_ratio"]) == row.width_ratio
        assert tuple(map(int, line["widths"].split())) == row.widths
        assert int(line["num_params"]) == row.num_params
        assert int(line["num_macs"]) == row.num_macs
        assert float(line["accuracy"]) == row.accuracy
        assert line["trained"] == str(row.trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.csv", "grid.json"]


def test_the_table_has_one_line_per_row(rows):
    lines = evaluation.format_table(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    for line, row in zip(lines[1:], rows, strict=True):
        assert f"{row.num_params:,}" in line and f"{100 * row.accuracy:.2f}" in line
        assert line.endswith("trained" if row.trained else "unseen")


@pytest.mark.parametrize("teacher_accuracy", [None, 0.5])
def test_the_figure_is_a_png(tmp_path, rows, teacher_accuracy):
    path = tmp_path / "grid.png"
    plotting.plot_grid(
        path, rows, title="x", trained_range=RANGE, teacher_accuracy=teacher_accuracy
    )
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
