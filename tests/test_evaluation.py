import csv
import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import consistency, evaluation, hypernetwork as hyper, plotting, resnet
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


def grid(params, ratios, images, labels, *, known=None, comparison=None, on_row=None, **options):
    evaluator = evaluation.Evaluator(
        FAMILY,
        params,
        images,
        labels,
        PREPROCESSING,
        options={"batch_size": 10, **options},
        known={} if known is None else known,
        comparison=comparison,
    )
    return evaluator.rows(ratios, trained_range=RANGE, on_row=on_row)


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
    for tree in (variables, folded):
        got = evaluation.accuracy(spec, tree, images, labels, PREPROCESSING, batch_size=10)
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


def test_ratios_that_round_to_the_same_widths_are_evaluated_once(params, images, labels):
    ratios = [0.5, 0.51, 1.0, 1.01, 0.49]
    assert len({tuple(FAMILY.widths(ratio)) for ratio in ratios}) == 2
    known = {}
    found = grid(params, ratios, images, labels, known=known)
    assert set(known) == {tuple(FAMILY.widths(ratio)) for ratio in (0.5, 1.0)}
    assert [row.width_ratio for row in found] == ratios
    assert [row.trained for row in found] == [True, True, True, False, False]
    assert found[0].accuracy == found[1].accuracy == found[4].accuracy
    assert found[2].accuracy == found[3].accuracy


def test_what_is_known_is_not_evaluated_again(params, images, labels):
    known = {tuple(FAMILY.widths(0.5)): 0.123}
    found = grid(params, [0.5, 1.0], images, labels, known=known)
    assert found[0].accuracy == 0.123
    assert known[tuple(FAMILY.widths(1.0))] == found[1].accuracy != 0.123
    assert grid(params, [0.5, 1.0], images[:0], labels[:0], known=known) == found


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


def test_rows_say_how_consistent_they_are_with_the_full_network(params, images, labels):
    """In one pass, in which the full network comes first whether a row asks for it or not."""
    comparison, seen = evaluation.Comparison(), []
    options = {"comparison": comparison, "known": {}, "on_row": seen.append}
    found = grid(params, [0.5, 0.5], images, labels, **options)
    assert seen == found and list(comparison.found) == [FAMILY.full_widths, found[0].widths]
    # A call of its own, at the same shape for both networks.
    logits = evaluate(
        params,
        images,
        labels,
        np.array(list(comparison.found)),
        strategy="loop",
        max_buckets=1,
        per_image=lambda logits, labels: logits,
    ).per_image
    np.testing.assert_allclose(comparison.reference, logits[0], rtol=1e-3, atol=1e-4)
    wanted = consistency.compare(logits[1], logits[0], labels)
    for row in found:
        got = [getattr(row, name) for name in consistency.Consistency._fields]
        assert got == pytest.approx(list(wanted), abs=1e-3)
        line = evaluation.format_row(row)
        assert f"{100 * row.agreement:.2f}" in line and f"{row.kl_divergence:.4f}" in line
        assert f" {row.worst_class} (" in line
    # Nothing of it is evaluated again.
    again = grid(params, [1.0, 0.5], images[:0], labels[:0], **options)
    assert again[0].agreement == 1.0 and again[0].kl_divergence == 0.0
    assert again[1] == found[0]


# --- many networks ---------------------------------------------------------------------------

WIDTHS = np.array([[4, 6], [2, 3], [6, 9], [0, 6], [2, 3], [0, 0]])


def evaluate(params, images, labels, widths=WIDTHS, **options):
    options = {"batch_size": 10, "predictions": True, "macs_per_compilation": 0, **options}
    return evaluation.evaluate_grid(
        FAMILY, params, widths, images, labels, PREPROCESSING, **options
    )


@pytest.fixture(scope="module")
def wanted(params, images):
    """Predictions of the networks of WIDTHS, each at its own shapes."""
    return np.stack(
        [predictions(*hyper.generate_dense(FAMILY, params, row), images) for row in WIDTHS]
    )


@pytest.mark.parametrize(
    "strategy, options",
    [
        ("loop", {}),
        ("map", {"max_buckets": 2}),
        ("vmap", {"max_buckets": 2, "config_batch": 3}),
        ("loop", {"max_buckets": 1, "batch_size": 1000}),
    ],
)
def test_every_strategy_predicts_what_the_dense_networks_do(
    params, images, labels, wanted, strategy, options
):
    """With blocks that are skipped, in buckets of their own or not, and widths beyond full size."""
    found = evaluate(params, images, labels, strategy=strategy, **options)
    assert found.predictions.shape == wanted.shape
    assert np.mean(found.predictions != wanted) <= 1e-4
    assert list(found.num_correct) == list(np.sum(found.predictions == labels, axis=1))
    assert list(found.accuracy) == list(found.num_correct / NUM_IMAGES)
    assert (found.strategy, found.reason) == (strategy, "asked for")
    assert len(found.buckets) <= options.get("max_buckets", 7)
    members = [n for bucket in found.buckets for n in bucket.members]
    assert sorted(members) == [0, 1, 2, 3, 5]  # the fifth is the second again


def test_predictions_differ_between_the_networks_that_are_compared(wanted):
    assert len({row.tobytes() for row in wanted}) == 5


def test_results_are_reported_once_for_each_row(params, images, labels):
    seen = {}
    found = evaluate(params, images, labels, strategy="loop", on_result=seen.setdefault)
    assert seen == dict(enumerate(found.accuracy))


def test_what_is_asked_of_each_image_comes_with_the_counts(params, images, labels, wanted):
    def per_image(logits, labels):
        return {"logits": logits, "right": jnp.argmax(logits, axis=-1) == labels}

    for strategy in ("loop", "map"):
        found = evaluate(
            params,
            images,
            labels,
            WIDTHS[:2],
            strategy=strategy,
            predictions=False,
            per_image=per_image,
            max_buckets=1,
        )
        assert found.predictions is None
        assert found.per_image["logits"].shape == (2, NUM_IMAGES, 5)
        assert np.array_equal(np.argmax(found.per_image["logits"], axis=-1), wanted[:2])
        assert list(found.per_image["right"].sum(axis=1)) == list(found.num_correct)


def test_shapes_are_compiled_only_where_they_are_worth_it(params, images, labels):
    options = {"strategy": "loop", "batch_size": 1000}
    many = evaluate(params, images, labels, **options)
    few = evaluate(params, images, labels, macs_per_compilation=None, **options)
    assert len(many.buckets) == 5 and len(few.buckets) == 1
    assert list(many.num_correct) == list(few.num_correct)


def test_buckets_share_the_program_that_generates(params, images, labels):
    rows = np.array([row for row in WIDTHS if np.all(row <= np.array(FAMILY.full_widths))])
    evaluation._generate_chunk.clear_cache()
    evaluation._score_chunk.clear_cache()
    found = evaluate(params, images, labels, rows, strategy="loop", batch_size=1000)
    assert len(found.buckets) > 2
    assert evaluation._generate_chunk._cache_size() == 1
    assert evaluation._score_chunk._cache_size() == len(found.buckets)


def test_later_calls_with_the_same_containers_compile_nothing(params, images, labels, wanted):
    containers = [[4, 6], [6, 9], [4, 2]]
    options = {"containers": containers, "strategy": "vmap", "config_batch": 2}
    found = evaluate(params, images, labels, WIDTHS[:2], **options)
    assert [bucket.container for bucket in found.buckets] == [(4, 6)]
    programs = evaluation._score_chunk._cache_size(), evaluation._generate_chunk._cache_size()
    # Another number of other networks, one of which is skipped in part.
    later = evaluate(params, images, labels, WIDTHS[[3, 1, 0]], **options)
    assert np.array_equal(later.predictions, wanted[[3, 1, 0]])
    now = evaluation._score_chunk._cache_size(), evaluation._generate_chunk._cache_size()
    assert programs == now
    with pytest.raises(ValueError, match=r"row 1, \[6, 9\], fits into none") as error:
        evaluate(params, images, labels, WIDTHS[1:3], **{**options, "containers": [[4, 6]]})
    assert is_one_sentence(error)


def test_what_is_asked_of_each_image_may_be_handed_over_and_forgotten(params, images, labels):
    seen = {}
    options = {"per_image": lambda logits, labels: logits, "max_buckets": 1, "strategy": "loop"}
    kept = evaluate(params, images, labels, WIDTHS[[1, 0, 1]], **options)
    found = evaluate(
        params, images, labels, WIDTHS[[1, 0, 1]], on_images=seen.setdefault, **options
    )
    assert found.per_image is None and sorted(seen) == [0, 1, 2]
    for row, logits in seen.items():
        np.testing.assert_allclose(logits, kept.per_image[row], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="on_images needs per_image") as error:
        evaluate(params, images, labels, on_images=seen.setdefault)
    assert is_one_sentence(error)


def test_noise_does_not_depend_on_the_networks_beside_it(params, images, labels):
    options = {
        "strategy": "loop",
        "key": jax.random.key(2),
        "num_samples": 2,
        "predictions": False,
        "per_image": lambda logits, labels: logits,
    }
    together = evaluate(params, images, labels, WIDTHS[:3], **options, max_buckets=2)
    assert [bucket.members for bucket in together.buckets] == [(0, 1), (2,)]
    alone = evaluate(params, images, labels, WIDTHS[1:2], **options)
    np.testing.assert_allclose(together.per_image[1], alone.per_image[0], rtol=1e-4, atol=1e-5)
    tree = jax.jit(
        lambda params: hyper.generate(FAMILY, params, WIDTHS[1], key=options["key"], num_samples=2)
    )(params)
    assert list(predictions(SPEC, tree, images)) == list(alone.per_image[0].argmax(axis=-1))


# --- the choice of the strategy --------------------------------------------------------------


@pytest.fixture
def probing(monkeypatch):
    """As if even this were worth a probe, in a process that has probed nothing."""
    monkeypatch.setattr(evaluation, "_MACS_PER_COMPILATION", {"cpu": 1.0, "gpu": 1.0})
    monkeypatch.setattr(evaluation, "_probed", {})


def test_little_work_is_done_one_by_one_without_a_probe(params, images, labels, monkeypatch):
    monkeypatch.setattr(evaluation, "_seconds_per_network", None)
    found = evaluate(params, images, labels, macs_per_compilation=None, predictions=False)
    assert found.strategy == "loop"
    assert "not worth a probe" in found.reason


def test_a_probe_leaves_out_map_on_the_cpu_and_is_logged_once(
    params, images, labels, wanted, probing, caplog
):
    with caplog.at_level(logging.INFO, "neumeta_jax"):
        found = evaluate(params, images, labels, max_buckets=2)
        again = evaluate(params, images, labels, max_buckets=2)
    assert found.strategy in ("loop", "vmap")
    assert np.mean(found.predictions != wanted) <= 1e-4
    assert (again.strategy, again.reason) == (found.strategy, found.reason)
    (record,) = caplog.records
    assert record.getMessage() == f"evaluating by {found.strategy}: {found.reason}"
    for part in ("loop ", "vmap ", " ms", "map not tried"):
        assert part in found.reason


@pytest.mark.parametrize("fastest", ["loop", "map", "vmap"])
def test_the_fastest_in_the_probe_is_taken(params, images, labels, probing, monkeypatch, fastest):
    monkeypatch.setattr(evaluation._Data, "platform", "gpu")
    monkeypatch.setattr(
        evaluation,
        "_seconds_per_network",
        lambda job, *_: 0.001 if job.strategy == fastest else float("inf"),
    )
    found = evaluate(params, images, labels, WIDTHS[:2], max_buckets=1, predictions=False)
    assert found.strategy == fastest
    assert f"{fastest} 1.0 ms" in found.reason and "inf ms" in found.reason


def test_only_running_out_of_memory_is_a_time_of_its_own(monkeypatch):
    job = lower_job("loop")
    data = evaluation._Data(np.zeros((1, 1)), np.zeros((1, 1)))

    def fail(message):
        def dispatch(*_):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(evaluation, "_dispatch", dispatch)
        return evaluation._seconds_per_network(job, {}, WIDTHS, None, data)

    assert fail("RESOURCE_EXHAUSTED: out of memory") == float("inf")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail("INTERNAL: something else")


# --- devices ---------------------------------------------------------------------------------

FOUR_DEVICES = """
import jax, numpy as np
import test_evaluation as t
from neumeta_jax import hypernetwork as hyper, resnet

assert len(jax.devices()) == 4
images = np.random.default_rng(0).integers(0, 256, (t.NUM_IMAGES, 8, 8, 3)).astype("uint8")
labels = (np.arange(t.NUM_IMAGES) % 5).astype("int32")
backbone = resnet.init_params(jax.random.key(0), t.SPEC)
rng = np.random.default_rng(1)
backbone = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("float32"), backbone)
params = hyper.init(jax.random.key(1), t.FAMILY, backbone, alpha=0.8, from_backbone=True)
options = {"max_buckets": 1, "config_batch": 2, "per_image": lambda logits, labels: logits}
one = t.evaluate(params, images, labels, strategy="loop", **options)
assert len(set(one.predictions.reshape(-1).tolist())) > 1
for strategy, shape in (("loop", (2, 2)), ("vmap", (1, 4)), ("map", (4, 1))):
    mesh = jax.make_mesh(shape, ("configs", "data"))
    many = t.evaluate(params, images, labels, strategy=strategy, mesh=mesh, **options)
    np.testing.assert_array_equal(many.predictions, one.predictions)
    np.testing.assert_array_equal(many.num_correct, one.num_correct)
    np.testing.assert_allclose(many.per_image, one.per_image, rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_four_devices_give_the_numbers_of_one():
    tests = pathlib.Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        },
        capture_output=True,
        text=True,
    )
    assert result.stdout == "equal\n", result.stderr


def lower_job(strategy):
    return evaluation._Job(
        hypernetwork=FAMILY,
        preprocessing=PREPROCESSING,
        strategy=strategy,
        num_samples=1,
        predictions=True,
        per_image=None,
        transform=None,
        mesh=None,
        container=SPEC,
        drawn_at=SPEC,
    )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("strategy", ["loop", "map", "vmap"])
def test_every_strategy_lowers_for_accelerators(params, images, labels, strategy, platform):
    job = lower_job(strategy)
    data = evaluation._place(images, labels, 10, None)
    widths = jnp.asarray(WIDTHS[:1] if strategy == "loop" else WIDTHS[:2])
    trees = jax.eval_shape(
        lambda *args: evaluation._generate_chunk(job, *args), params, widths, None
    )
    correct = jnp.zeros((len(widths), 1), jnp.int32)
    programs = [
        evaluation._generate_chunk.trace(job, params, widths, None),
        evaluation._score_chunk.trace(job, trees, *data, np.int32(0), correct),
    ]
    for program in programs:
        lowered = program.lower(lowering_platforms=(platform,)).as_text()
        assert "func.func public @main" in lowered
    assert "convolution" in lowered


@pytest.mark.parametrize(
    "options, match",
    [
        ({"widths": WIDTHS[0]}, r"each of the 2 generated blocks, got shape \(2,\)"),
        ({"widths": WIDTHS[:, :1]}, r"got shape \(6, 1\)"),
        ({"widths": WIDTHS[:0]}, r"got shape \(0, 2\)"),
        ({"widths": WIDTHS / 2}, "integers .*got float64"),
        ({"widths": [[4, 6], [4, -1]]}, "stage2_block1 takes .* from 0 to 9, got -1 in row 1"),
        ({"widths": [[7, 6]]}, "stage1_block1 takes .* from 0 to 6, got 7 in row 0"),
        ({"strategy": "scan"}, r"strategy must be one of \('auto', .*got 'scan'"),
        ({"max_buckets": 0}, "at least 1, got max_buckets=0"),
        ({"config_batch": 0}, "config_batch=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_samples": 2}, "got num_samples=2"),
        ({"num_samples": 0}, "got num_samples=0"),
        (
            {"mesh": jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))},
            r"axes \('configs', 'data'\), got \('data',\)",
        ),
    ],
)
def test_a_grid_that_cannot_be_evaluated_is_refused(params, images, labels, options, match):
    with pytest.raises(ValueError, match=match) as error:
        evaluate(params, images, labels, **options)
    assert is_one_sentence(error)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda x, y: (x[:0], y[:0]), "at least one image, got an empty split"),
        (lambda x, y: (x[:, :4], y), r"uint8\[n, 8, 8, 3\] .* got uint8\[23, 4, 8, 3\]"),
        (lambda x, y: (x / 255, y), r"got float64\[23, 8, 8, 3\]"),
        (lambda x, y: (x, y[:-1]), r"labels must be int\[23\].* got int32\[22\]"),
        (lambda x, y: (x, y.astype("float32")), r"got float32\[23\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(params, images, labels, change, match):
    with pytest.raises(ValueError, match=match) as error:
        evaluate(params, *change(images, labels))
    assert is_one_sentence(error)


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


def test_weight_slices_are_the_kernels_of_the_dense_networks(params):
    slices = evaluation.weight_slices(FAMILY, params)
    full = FAMILY.full_widths[-1]
    assert slices.block == SPEC.blocks[FAMILY.blocks[-1]].name
    assert slices.full_width == full == 6
    assert list(slices.widths) == list(range(1, 9))
    for number in (1, 6):  # below and beyond the full size
        width = slices.widths[number]
        _, tree = hyper.generate_dense(FAMILY, params, FAMILY.widths(width / full))
        wanted = tree[slices.block]["conv2"]["kernel"]
        kernel = slices.kernels[number]
        np.testing.assert_allclose(kernel[:, :, :width], wanted, rtol=1e-5, atol=1e-6)
        assert np.isnan(kernel[:, :, width:]).all()
    assert np.isfinite(slices.kernels[-1]).all()


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
            *consistency.Consistency._fields,
        }
        assert GridRow(**{**found, "widths": tuple(found["widths"])}) == row
        assert type(found["trained"]) is bool and type(found["num_params"]) is int


def test_grid_csv_holds_the_same_rows(tmp_path, rows):
    evaluation.write_grid(tmp_path, rows, dataset="digits", split="test")
    with (tmp_path / "grid.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    names = [field.name for field in dataclasses.fields(GridRow)]
    assert list(found[0]) == [name for name in names if name != "int8_accuracy"]  # not asked for
    for line, row in zip(found, rows, strict=True):
        assert float(line["width_ratio"]) == row.width_ratio
        assert tuple(map(int, line["widths"].split())) == row.widths
        assert int(line["num_params"]) == row.num_params
        assert int(line["num_macs"]) == row.num_macs
        assert float(line["accuracy"]) == row.accuracy
        assert line["trained"] == str(row.trained)
        assert line["agreement"] == ""  # not asked for
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.csv", "grid.json"]


def test_the_table_has_one_line_per_row(rows):
    for row in rows:
        line = evaluation.format_row(row)
        assert len(line.rsplit("  ", 1)[0]) == len(evaluation.TABLE_HEADER.rsplit("  ", 1)[0])
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
