import dataclasses
import functools
import json
import logging
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import dense_network, logits_of, random_params, random_pixels, refused

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import Grid
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.evaluation import consistency, programs, rows as tables
from neumeta_jax.evaluation.evaluator import Evaluator, accuracy, predicted_classes
from neumeta_jax.evaluation.rows import GridRow
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, morph, resnet_spec

SPEC = resnet_spec(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
FAMILY = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC), Grid(noise_scale=1.0))
PREPROCESSING = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
NUM_IMAGES = 23
IMAGES = random_pixels(SPEC, NUM_IMAGES)
BACKBONE = random_params(SPEC, seed=5)  # which names several classes
RANGE = (0.5, 1.0)
RATIOS = [1.0, 0.5, 1.25, 0.25]
WIDTHS = np.array([[4, 6], [2, 3], [6, 9], [0, 6], [2, 3], [0, 0]])
teacher_accuracy = functools.partial(
    accuracy, cifar_resnet.Network(SPEC), preprocessing=PREPROCESSING
)


def test_means_of_any_sequence_make_the_same_preprocessing():
    mean, std = list(PREPROCESSING.mean), np.array(PREPROCESSING.std)
    assert hash(Preprocessing(mean, std)) == hash(PREPROCESSING)


@functools.cache
def inr_params():
    return hyper.init(jax.random.key(1), FAMILY, BACKBONE, alpha=0.8, from_backbone=True)


def predictions(spec, tree, images=IMAGES):
    x = (images / 255 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)
    return np.argmax(np.asarray(logits_of(spec, tree, x.astype("float32"))), axis=-1)


@functools.cache
def labels():
    """Right for some images and wrong for the others."""
    found = predictions(SPEC, BACKBONE)
    assert len(set(found)) > 1
    return np.where(np.arange(NUM_IMAGES) % 3, found, (found + 1) % 5).astype("int32")


@functools.cache
def dense_predictions():
    """Those of the networks of WIDTHS, each at its own shapes."""
    found = [predictions(*dense_network(FAMILY, inr_params(), row)) for row in WIDTHS]
    assert len({row.tobytes() for row in found}) == 5
    return np.stack(found)


def evaluator_of(**options):
    chosen = {"batch_size": 10, "images": IMAGES, "labels": labels(), "macs_per_compilation": 0}
    chosen |= options
    data = chosen.pop("images"), chosen.pop("labels"), PREPROCESSING
    return Evaluator(FAMILY, inr_params(), *data, **chosen)


class Found(NamedTuple):
    """What `score` found of a plan."""

    plan: Any
    num_correct: np.ndarray
    per_image: Any

    @property
    def members(self):
        return [part.members for part in self.plan.parts]


def evaluate(widths=WIDTHS, per_image=predicted_classes, containers=None, **options):
    evaluator = evaluator_of(**options)
    plan = evaluator.plan(widths, per_image=per_image, containers=containers)
    return Found(plan, *evaluator.score(plan))


def all_logits(logits, labels):
    return logits


@pytest.fixture(scope="module")
def rows():
    return list(evaluator_of().rows(RATIOS, RANGE))


# --- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [10, 23, 1000])
def test_accuracy_counts_the_argmax_whatever_the_batch_size(batch_size):
    """Black images, which fill up the last batch, do not count, even where they would be right."""
    found = predictions(SPEC, BACKBONE)
    black = predictions(SPEC, BACKBONE, np.zeros_like(IMAGES)).astype("int32")
    assert 0.5 < np.mean(found == labels()) < 0.8
    for given in (labels(), black):
        wanted = np.mean(found == given)
        assert teacher_accuracy(BACKBONE, IMAGES, given, batch_size=batch_size) == wanted


def test_batch_norm_accuracy_is_that_of_the_folded_network():
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda x: x + 0.2 * abs(rng.normal(size=x.shape)).astype("float32"),
        jax.jit(functools.partial(cifar_resnet.init_variables, spec=SPEC))(jax.random.key(0)),
    )
    folded = cifar_resnet.fold_batch_norm(variables)
    near = (predictions(SPEC, folded) + (np.arange(NUM_IMAGES) % 3 == 0)) % 5
    for tree in (variables, folded):
        assert teacher_accuracy(tree, IMAGES, near, batch_size=10) == pytest.approx(15 / 23)


def test_an_empty_split_is_refused():
    with refused("at least one image, got an empty split"):
        teacher_accuracy(BACKBONE, IMAGES[:0], labels()[:0])


# --- grid ------------------------------------------------------------------------------------


def test_rows_hold_the_counts_and_the_accuracy_of_the_dense_networks_in_the_order_given(rows):
    assert [row.width_ratio for row in rows] == RATIOS
    assert [row.trained for row in rows] == [True, True, False, False]
    for row in rows:
        small, tree = dense_network(FAMILY, inr_params(), row.widths)
        assert row.widths == tuple(FAMILY.widths(row.width_ratio))
        assert small == morph(SPEC, FAMILY.blocks, row.widths)
        assert (row.num_params, row.num_macs) == (small.num_params, small.num_macs)
        assert row.accuracy == np.mean(predictions(small, tree) == labels())
        assert row.num_images == NUM_IMAGES
        assert row.interval == tables.accuracy_interval(row.accuracy, NUM_IMAGES)
    assert rows[0].num_params == SPEC.num_params
    assert rows[2].num_params > SPEC.num_params > rows[1].num_params > rows[3].num_params


def test_networks_that_are_known_or_the_same_again_are_not_evaluated_again(monkeypatch):
    ratios, evaluator = [0.5, 0.51, 1.0, 1.01, 0.49], evaluator_of()
    half, full = (tuple(FAMILY.widths(ratio)) for ratio in (0.5, 1.0))
    found = list(evaluator.rows(ratios, RANGE))
    assert [row.widths for row in found] == [half, half, full, full, half]
    assert [row.width_ratio for row in found] == ratios
    assert [row.trained for row in found] == [True, True, True, False, False]
    assert len({row.accuracy for row in found}) == 2
    other = dataclasses.replace(evaluator, transform=dict)
    monkeypatch.setattr(Evaluator, "stream", None)
    assert list(evaluator.rows(ratios[::-1], RANGE)) == found[::-1]
    assert list(evaluator.accuracies([full, half])) == [found[2].accuracy, found[0].accuracy]
    with pytest.raises(TypeError):  # another evaluator, which knows nothing
        other.accuracies([full])


@pytest.mark.parametrize("ratio", [0, 1.6, -0.5, float("nan")])
def test_a_width_ratio_out_of_range_is_refused_before_anything_is_evaluated(ratio, monkeypatch):
    monkeypatch.setattr(Evaluator, "stream", None)
    with refused(rf"\(0, 1.5\], got {ratio}"):
        next(evaluator_of().rows([1.0, ratio], RANGE))


def test_rows_come_as_soon_as_they_are_known(monkeypatch):
    scored, stream = [], Evaluator.stream

    def recorded(self, plan):
        for member, *rest in stream(self, plan):
            scored.append(member)
            yield member, *rest

    monkeypatch.setattr(Evaluator, "stream", recorded)
    seen = [len(scored) for _ in evaluator_of(strategy="loop").rows([1.0, 0.5, 1.0], RANGE)]
    assert seen == [1, 2, 2]


def test_rows_say_how_consistent_they_are_with_the_full_network(monkeypatch):
    """In one pass, in which the full network comes first whether a row asks for it or not."""
    evaluator = evaluator_of(compare=True)
    found = list(evaluator.rows([0.5, 0.5], RANGE))
    # A call of its own, at the same shape for both networks.
    both = [FAMILY.full_widths, found[0].widths]
    logits = evaluate(both, all_logits, strategy="loop", max_buckets=1).per_image
    wanted = consistency.compare(logits[1], logits[0], labels())
    for row in found:
        got = [getattr(row, name) for name in consistency.Consistency._fields]
        assert got == pytest.approx(list(wanted), abs=1e-3)
        line = tables.format_row(row)
        assert f"{100 * row.agreement:.2f}" in line and f"{row.kl_divergence:.4f}" in line
        loses = row.worst_class_drop > 0
        assert (f" {row.worst_class} (-" if loses else " none  ") in line
    monkeypatch.setattr(Evaluator, "stream", None)
    again = list(evaluator.rows([1.0, 0.5], RANGE))
    assert again[0].agreement == 1.0 and again[0].kl_divergence == 0.0
    assert again[1] == found[0]


# --- many networks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy, options",
    [
        ("loop", {}),
        ("map", {"max_buckets": 2}),
        ("vmap", {"max_buckets": 2, "config_batch": 3}),
        ("loop", {"max_buckets": 1, "batch_size": 1000}),
    ],
)
def test_every_strategy_predicts_what_the_dense_networks_do(strategy, options):
    """With blocks that are skipped, in buckets of their own or not, and widths beyond full size."""
    found = evaluate(strategy=strategy, **options)
    assert found.per_image.shape == dense_predictions().shape
    assert np.mean(found.per_image != dense_predictions()) <= 1e-4
    assert list(found.num_correct) == list(np.sum(found.per_image == labels(), axis=1))
    assert (found.plan.strategy, found.plan.reason) == (strategy, "asked for")
    assert len(found.plan.parts) <= options.get("max_buckets", 7)
    assert sorted(n for some in found.members for n in some) == list(range(len(WIDTHS)))
    accuracies = evaluator_of(strategy=strategy, **options).accuracies(WIDTHS)
    assert list(accuracies) == list(found.num_correct / NUM_IMAGES)


@pytest.mark.parametrize("strategy", ["loop", "map"])
def test_what_is_asked_of_each_image_comes_with_the_counts(strategy):
    def per_image(logits, labels):
        return {"logits": logits, "right": jnp.argmax(logits, axis=-1) == labels}

    found = evaluate(WIDTHS[:2], per_image, strategy=strategy, max_buckets=1)
    assert found.per_image["logits"].shape == (2, NUM_IMAGES, 5)
    assert np.array_equal(found.per_image["logits"].argmax(axis=-1), dense_predictions()[:2])
    assert list(found.per_image["right"].sum(axis=1)) == list(found.num_correct)
    alone = evaluate(WIDTHS[:2], None, strategy=strategy, max_buckets=1)
    assert alone.per_image is None and list(alone.num_correct) == list(found.num_correct)


def test_shapes_are_compiled_only_where_they_are_worth_it():
    options = {"strategy": "loop", "batch_size": 1000}
    many, few = (evaluate(macs_per_compilation=macs, **options) for macs in (0, None))
    assert len(many.plan.parts) == 5 and len(few.plan.parts) == 1
    assert list(many.num_correct) == list(few.num_correct)


def num_programs():
    return programs.generate_chunk._cache_size(), programs.score_chunk._cache_size()


def test_buckets_share_the_program_that_generates():
    programs.generate_chunk.clear_cache()
    programs.score_chunk.clear_cache()
    up_to_full = WIDTHS[np.less_equal(WIDTHS, FAMILY.full_widths).all(axis=1)]
    found = evaluate(up_to_full, strategy="loop", batch_size=1000)
    assert len(found.plan.parts) > 2
    assert num_programs() == (1, len(found.plan.parts))


def test_later_calls_with_the_same_containers_compile_nothing():
    options = {"strategy": "vmap", "config_batch": 2}
    containers = [[4, 6], [6, 9], [4, 2]]
    found = evaluate(WIDTHS[:2], containers=containers, **options)
    assert [part.job.container for part in found.plan.parts] == [(4, 6)]
    programs = num_programs()
    # Another number of other networks, one of which is skipped in part.
    later = evaluate(WIDTHS[[3, 1, 0]], containers=containers, **options)
    assert np.array_equal(later.per_image, dense_predictions()[[3, 1, 0]])
    assert num_programs() == programs
    with refused(r"row 1, \[6, 9\], fits into none"):
        evaluate(WIDTHS[1:3], containers=containers[:1], **options)


def test_noise_does_not_depend_on_the_networks_beside_it():
    noise = {"key": jax.random.key(2), "num_samples": 2}
    options = {"strategy": "loop", "per_image": all_logits, **noise}
    together = evaluate(WIDTHS[:3], **options, max_buckets=2)
    assert together.members == [(0, 1), (2,)]
    alone = evaluate(WIDTHS[1:2], **options)
    np.testing.assert_allclose(together.per_image[1], alone.per_image[0], rtol=1e-4, atol=1e-5)
    generate = jax.jit(lambda params: hyper.generate(FAMILY, params, WIDTHS[1], **noise))
    wanted = predictions(SPEC, generate(inr_params()))
    assert list(wanted) == list(alone.per_image[0].argmax(axis=-1))


# --- the choice of the strategy --------------------------------------------------------------


@pytest.fixture
def probing(monkeypatch):
    """As if even this were worth a probe, in a process that has probed nothing."""
    monkeypatch.setattr(programs, "_MACS_PER_COMPILATION", {"cpu": 1.0, "gpu": 1.0})
    monkeypatch.setattr(programs, "_probed", {})


def test_little_work_is_done_one_by_one_without_a_probe(monkeypatch):
    monkeypatch.setattr(programs, "_seconds_per_network", None)
    plan = evaluator_of(macs_per_compilation=None).plan(WIDTHS)
    assert plan.strategy == "loop"
    assert "not worth a probe" in plan.reason


def test_a_probe_leaves_out_map_on_the_cpu_and_is_logged_once(probing, caplog):
    with caplog.at_level(logging.INFO, "neumeta_jax"):
        found, again = evaluate(max_buckets=2), evaluate(max_buckets=2)
    strategy, reason = found.plan[2:]
    assert strategy in ("loop", "vmap")
    assert np.mean(found.per_image != dense_predictions()) <= 1e-4
    assert again.plan[2:] == (strategy, reason)
    (record,) = caplog.records
    assert record.getMessage() == f"evaluating by {strategy}: {reason}"
    for part in ("loop ", "vmap ", " ms", "map not tried"):
        assert part in reason


@pytest.mark.parametrize("fastest", ["loop", "map", "vmap"])
def test_the_fastest_in_the_probe_is_taken(probing, monkeypatch, fastest):
    def seconds(job, *_):
        return 0.001 if job.strategy == fastest else float("inf")

    monkeypatch.setattr(programs.Inputs, "platform", "gpu")
    monkeypatch.setattr(programs, "_seconds_per_network", seconds)
    plan = evaluator_of(max_buckets=1).plan(WIDTHS[:2])
    assert plan.strategy == fastest and {part.job.strategy for part in plan.parts} == {fastest}
    assert f"{fastest} 1.0 ms" in plan.reason and "inf ms" in plan.reason


def test_only_running_out_of_memory_is_a_time_of_its_own(monkeypatch):
    job = lower_job("loop")

    def fail(message):
        def dispatch(*_):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(programs, "dispatch", dispatch)
        return programs._seconds_per_network(job, None, WIDTHS)

    assert fail("RESOURCE_EXHAUSTED: out of memory") == float("inf")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail("INTERNAL: something else")


# --- devices ---------------------------------------------------------------------------------

FOUR_DEVICES = """
import jax, numpy as np
import test_evaluation as t

assert len(jax.devices()) == 4
options = {"max_buckets": 1, "config_batch": 2, "per_image": t.all_logits}
one = t.evaluate(strategy="loop", mesh=None, **options)
assert len(set(one.per_image.argmax(axis=-1).reshape(-1).tolist())) > 1
for strategy, shape in (("loop", (2, 2)), ("vmap", (1, 4)), ("map", (4, 1))):
    mesh = jax.make_mesh(shape, ("configs", "data"))
    many = t.evaluate(strategy=strategy, mesh=mesh, **options)
    np.testing.assert_array_equal(many.num_correct, one.num_correct)
    np.testing.assert_allclose(many.per_image, one.per_image, rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_four_devices_give_the_numbers_of_one():
    tests = pathlib.Path(__file__).parent
    settings = {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
    }
    command = [sys.executable, "-c", FOUR_DEVICES]
    found = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert found.stdout == "equal\n", found.stderr


def lower_job(strategy):
    shapes = {"container": FAMILY.full_widths, "drawn_at": FAMILY.full_widths}
    asked = strategy, 1, predicted_classes, None, None
    return programs.Job(FAMILY, PREPROCESSING, *asked, **shapes)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("strategy", ["loop", "map", "vmap"])
def test_every_strategy_lowers_for_accelerators(strategy, platform):
    job = lower_job(strategy)
    data = programs.batched(IMAGES, labels(), 10)
    widths = jnp.asarray(WIDTHS[:1] if strategy == "loop" else WIDTHS[:2])
    generate = functools.partial(programs.generate_chunk, job)
    trees = jax.eval_shape(generate, inr_params(), widths, None)
    correct = jnp.zeros((len(widths), 1), jnp.int32)
    traced = [
        programs.generate_chunk.trace(job, inr_params(), widths, None),
        programs.score_chunk.trace(job, trees, *data, np.int32(0), correct),
    ]
    for program in traced:
        lowered = program.lower(lowering_platforms=(platform,)).as_text()
        assert "func.func public @main" in lowered
    assert "convolution" in lowered


@pytest.mark.parametrize(
    "options, match",
    [
        ({"widths": WIDTHS[0]}, r"each of the 2 elastic groups, got shape \(2,\)"),
        ({"widths": WIDTHS[:, :1]}, r"got shape \(6, 1\)"),
        ({"widths": WIDTHS[:0]}, r"got shape \(0, 2\)"),
        ({"widths": WIDTHS / 2}, "integers .*got float64"),
        (
            {"widths": [[4, 6], [4, -1]]},
            "stage2_block1/conv1 takes .* from 0 to 9, got -1 in row 1",
        ),
        ({"widths": [[7, 6]]}, "stage1_block1/conv1 takes .* from 0 to 6, got 7\\."),
        ({"strategy": "scan"}, r"strategy must be one of \('auto', .*got 'scan'"),
        ({"max_buckets": 0}, "max_buckets must be at least 1, got 0"),
        ({"config_batch": 0}, "config_batch must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"num_samples": 2}, "got num_samples=2"),
        ({"num_samples": 0}, "got num_samples=0"),
        (
            {"mesh": jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))},
            r"axes \('configs', 'data'\), got \('data',\)",
        ),
        ({"images": IMAGES[:0], "labels": np.zeros(0, int)}, "at least one image, got an empty"),
        ({"images": IMAGES[:, :4]}, r"uint8\[n, 8, 8, 3\] .* got uint8\[23, 4, 8, 3\]"),
        ({"images": IMAGES / 255}, r"got float64\[23, 8, 8, 3\]"),
        ({"labels": np.zeros(22, "int32")}, r"labels must be int\[23\].* got int32\[22\]"),
        ({"labels": np.zeros(23, "float32")}, r"got float32\[23\]"),
    ],
)
def test_a_grid_that_cannot_be_evaluated_is_refused(options, match):
    with refused(match):
        evaluate(**options)


@pytest.mark.parametrize("correct, number", [(0, 7), (7, 7), (13, 23), (9000, 10000)])
def test_the_ends_of_the_interval_are_shares_that_lie_two_deviations_away(correct, number):
    """Wilson's score: the ends p solve |correct / number - p| = z sqrt(p (1 - p) / number)."""
    low, high = tables.accuracy_interval(correct / number, number)
    assert 0 <= low <= correct / number <= high <= 1
    for end in (low, high):
        deviation = (end * (1 - end) / number) ** 0.5
        assert abs(correct / number - end) == pytest.approx(1.959964 * deviation, abs=1e-7)


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
    found = tables.largest_dip(ratios, accuracies)
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
    with refused(match):
        tables.largest_dip(ratios, accuracies)


# --- what is written -------------------------------------------------------------------------


def test_a_row_outlives_a_file(rows):
    for row in [*rows, dataclasses.replace(rows[0], int8_accuracy=0.5)]:
        found = json.loads(json.dumps(row.to_dict()))
        assert GridRow.from_dict(found | {"beside": 1}) == row
        assert ("int8_accuracy" in found) == (row.int8_accuracy is not None)


def test_the_table_has_one_line_per_row(rows):
    for row in rows:
        line = tables.format_row(row)
        assert len(line.rsplit("  ", 1)[0]) == len(tables.TABLE_HEADER.rsplit("  ", 1)[0])
        assert f"{row.num_params:,}" in line and f"{100 * row.accuracy:.2f}" in line
        assert line.endswith("trained" if row.trained else "unseen")
