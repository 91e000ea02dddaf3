"""The search: what it proposes, finds, keeps and refuses; the command on a tiny work directory."""

import csv
import itertools
import json
import shutil
import types

import numpy as np
import pytest
from networks import assert_refuses, call, refused, run, write_workdir

from neumeta_jax.commands import search
from neumeta_jax.core.inr import Grid
from neumeta_jax.data import datasets
from neumeta_jax.errors import INTERRUPTED, UsageError
from neumeta_jax.evaluation import morphs
from neumeta_jax.evaluation.evaluator import Evaluator
from neumeta_jax.files.storage import locked
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, morph, resnet_spec
from neumeta_jax.networks.saved import load_inr
from neumeta_jax.report import plotting
from neumeta_jax.search import budgets, evolution, latency, session
from neumeta_jax.search.budgets import allows, shallow_networks
from neumeta_jax.search.evolution import Candidate, Score
from neumeta_jax.search.record import STATE_FILE, Record, read_record

SPEC = resnet_spec(20, num_classes=5, stage_widths=(8, 12, 16), image_size=8)
BLOCKS = generated_blocks(SPEC)
FAMILY = cifar_resnet.hypernetwork(SPEC, BLOCKS, Grid())
RANGE = {"low": 0.25, "high": 1.0}
SPACE = budgets.make_space(FAMILY, **RANGE)
DEEP = budgets.make_space(FAMILY, **RANGE, depth=True)
UNIFORM = budgets.uniform_networks(SPACE, **RANGE)
SMALLEST, LARGEST = SPACE.ends


def costs(*, macs=None, params=None):
    limits = {"macs": macs, "params": params}
    return [budgets.count_cost(FAMILY, name, limit) for name, limit in limits.items()]


def middle(space, name, share=0.5):
    """A budget between the smallest and the largest network's."""
    low, high = map(budgets.count_cost(FAMILY, name).total, space.ends)
    return low + share * (high - low)


def toy_accuracy(widths):
    """Grows with every block, the fourth and the last most of all."""
    shares = np.array(widths) / FAMILY.full_widths
    return float(np.dot((0.01, 0.01, 0.01, 0.2, 0.3), np.sqrt(shares)))


def toy_score(widths):
    return Score(toy_accuracy(widths), 0.0)


def generations(space=SPACE, *, limits=None, asked=None, archive=(), score=toy_score, **options):
    """The archive after each generation; `asked` is extended by the networks evaluated."""

    def evaluate(widths):
        if asked is not None:
            asked.extend(widths)
        return [score(row) for row in widths]

    options = {"num_candidates": 300, "population": 20, "seed": 0, **options}
    uniform = budgets.uniform_networks(space, **RANGE)
    return evolution.evolve(space, limits or costs(), uniform, evaluate, archive, **options)


def evolve(*args, **options):
    *_, archive = generations(*args, **options)
    return archive


# --- networks and budgets --------------------------------------------------------------------


def test_a_space_holds_every_width_of_the_range_or_its_multiples():
    assert SPACE.choices[0] == tuple(range(2, 9)) and SPACE.choices[4] == tuple(range(4, 17))
    assert SPACE.size == 7 * 7 * 10 * 10 * 13
    assert DEEP.choices[0] == (0, *range(2, 9)) and DEEP.genes((0, 2, 4, 0, 5)) == [0, 1, 2, 0, 2]
    for multiple, wanted in ((4, (4, 8)), (8, (8,)), (3, (3, 6))):
        assert budgets.make_space(FAMILY, **RANGE, multiple=multiple).choices[0] == wanted


def test_blocks_that_change_nothing_are_left_out_of_every_network_and_of_its_costs():
    space = DEEP.without((0, 3))
    assert space.choices[0] == space.choices[3] == (0,) and space.choices[1] == DEEP.choices[1]
    rows = budgets.uniform_networks(space, **RANGE)
    assert rows and all(row[0] == row[3] == 0 < min(row[1], row[2], row[4]) for row in rows)
    shallow = shallow_networks(space, costs(), rows)
    assert shallow and all(row[0] == row[3] == 0 for row in shallow)
    assert shallow_networks(SPACE.without((0, 3)), costs(), rows) == []
    assert costs()[0].total(rows[-1]) == morph(SPEC, BLOCKS, rows[-1]).num_macs


@pytest.mark.parametrize(
    "options, match",
    [
        ({"low": 0.9, "high": 0.5}, "got 0.9 and 0.5"),
        ({"low": 0.5, "high": 1.7}, "got 1.7"),
        ({"low": 0.5, "high": 1.0, "multiple": 0}, "at least 1, got 0"),
        ({"low": 0.3, "high": 0.9, "multiple": 8}, "stage1_block1/conv1 takes .* from 2 to 7"),
    ],
)
def test_a_space_that_cannot_be_is_refused(options, match):
    with refused(match):
        budgets.make_space(FAMILY, **options)


def test_the_uniform_networks_are_those_of_all_ratios():
    wanted = {tuple(FAMILY.widths(ratio)) for ratio in np.linspace(0.25, 1, 2000)}
    assert set(UNIFORM) == wanted and len(UNIFORM) == len(wanted)
    assert UNIFORM[0] == SMALLEST and UNIFORM[-1] == LARGEST
    multiples = budgets.make_space(FAMILY, **RANGE, multiple=4, depth=True)
    found = budgets.uniform_networks(multiples, **RANGE)
    assert found[0] == (4, 4, 4, 4, 4) and found[-1] == LARGEST
    assert all(width in (4, 8, 12, 16) for widths in found for width in widths)


def test_the_latency_of_a_sum_over_blocks_is_found_from_few_networks():
    measured = []

    def measure(widths):
        measured.append(widths)
        weights = (1.0, 1.0, 2.0, 2.0, 0.5)
        return 3 + sum(a * w + (w > 0) for a, w in zip(weights, widths, strict=True))

    cost = budgets.latency_cost(DEEP, 40.0, measure)
    assert len(measured) < 25
    for widths in (LARGEST, (0, 2, 5, 0, 11), SMALLEST, (0, 0, 0, 0, 0)):
        assert cost.total(widths) == pytest.approx(measure(widths))


def test_noisy_latencies_still_grow_with_the_width():
    rng = np.random.default_rng(1)
    cost = budgets.latency_cost(SPACE, 1.0, lambda widths: 1 + 0.001 * sum(widths) + rng.random())
    for n, choices in enumerate(SPACE.choices):
        amounts = [cost.total((*SMALLEST[:n], width, *SMALLEST[n + 1 :])) for width in choices]
        assert amounts == sorted(amounts)


@pytest.mark.parametrize("name", ["macs", "params"])
def test_a_budget_that_none_or_every_network_keeps_says_what_is_possible(name):
    small, large = (getattr(morph(SPEC, BLOCKS, row), f"num_{name}") for row in SPACE.ends)
    assert budgets.check_budgets(SPACE, costs(**{name: small})) == []
    assert budgets.check_budgets(SPACE, costs(**{name: large - 1})) == []
    (note,) = budgets.check_budgets(SPACE, costs(**{name: large}))
    assert f"--max_{name}={large} excludes no network" in note and f"{large:,}" in note
    with refused(f"--max_{name} .*{small:,} to {large:,}", UsageError):
        budgets.check_budgets(SPACE, costs(**{name: small - 1}))


def test_latencies_that_differ_by_less_than_their_noise_are_said_to_be_noise():
    cost = budgets.latency_cost(SPACE, 2.0, lambda widths: 1 + sum(widths) / sum(LARGEST))
    cost = budgets.Cost(cost.name, 1.9, cost.total)
    assert budgets.check_budgets(SPACE, [cost], noise=0.5) == []
    (note,) = budgets.check_budgets(SPACE, [cost], noise=0.8)
    assert "differ by 0.750 ms" in note and "two measurements of one by 0.800 ms" in note


# --- evolution -------------------------------------------------------------------------------


def test_the_best_network_under_a_budget_is_found():
    """Of all 63,700, found among 600."""
    limits = costs(macs=middle(SPACE, "macs"))
    best = max(toy_accuracy(w) for w in itertools.product(*SPACE.choices) if allows(limits, w))
    uniform = max(toy_accuracy(w) for w in UNIFORM if allows(limits, w))
    for seed in range(3):
        archive = evolve(limits=limits, num_candidates=600, seed=seed)
        found = max(candidate.score.accuracy for candidate in archive)
        assert found > uniform + 0.95 * (best - uniform)


def test_of_equal_accuracies_the_smaller_loss_is_sought_and_then_fewer_multiply_adds():
    assert (
        evolution.rank(FAMILY, LARGEST, Score(0.6, 2.0))
        < evolution.rank(FAMILY, LARGEST, Score(0.5, 1.0))
        < evolution.rank(FAMILY, SMALLEST, Score(0.5, 1.1))
        < evolution.rank(FAMILY, LARGEST, Score(0.5, 1.1))
    )
    limits = costs(macs=middle(SPACE, "macs"))
    archive = evolve(limits=limits, score=lambda row: Score(0.5, -toy_accuracy(row)))
    uniform = min(-toy_accuracy(w) for w in UNIFORM if allows(limits, w))
    assert min(candidate.score.loss for candidate in archive) < uniform - 0.02


def test_the_front_holds_what_nothing_smaller_reaches_and_of_equals_the_smaller_loss():
    amounts, accuracies = [5, 3, 4, 1, 4, 4, 9], [0.6, 0.5, 0.5, 0.2, 0.55, 0.55, 0.6]
    losses = [1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 0.5]
    front = evolution.pareto_front(amounts, list(map(Score, accuracies, losses)))
    assert front == [True, True, False, True, False, True, False]


def test_no_network_is_evaluated_twice_and_the_seed_decides_which():
    first, again, other = [], [], []
    archive = evolve(asked=first)
    evolve(asked=again)
    evolve(asked=other, seed=1)
    assert len(first) == len(set(first)) == len(archive) == 300
    assert first == again != other


@pytest.mark.parametrize("space", [SPACE, DEEP], ids=["widths", "depth"])
def test_every_candidate_keeps_every_budget(space):
    limits = costs(macs=middle(space, "macs", 0.4), params=middle(space, "params", 0.5))
    archive = evolve(space, limits=limits)
    for candidate in archive:
        dense = morph(SPEC, BLOCKS, candidate.widths)
        assert dense.num_macs <= limits[0].limit and dense.num_params <= limits[1].limit
        assert all(map(tuple.__contains__, space.choices, candidate.widths))
    skipped = sum(0 in candidate.widths for candidate in archive)
    assert skipped > 20 if space is DEEP else skipped == 0


def test_uniform_networks_and_the_largest_shallow_ones_are_in_the_first_population():
    limits, macs = costs(macs=middle(DEEP, "macs", 0.6)), FAMILY.num_macs
    shallow = shallow_networks(DEEP, limits, UNIFORM)
    even = {w for w in UNIFORM if allows(limits, w)}
    assert 0 < len(even) < len(UNIFORM)
    assert {*even, *shallow} < {c.widths for c in next(generations(DEEP, limits=limits))}
    assert shallow.pop() == (0, 0, 0, 0, 0)  # two blocks of each stage left out
    wanted = {(widths[0], 0, widths[2], 0, 0) for widths in UNIFORM}
    amounts = sorted({macs(w) for w in wanted if allows(limits, w)}, reverse=True)
    assert set(shallow) <= wanted
    assert list(map(macs, shallow)) == amounts[: budgets.NUM_SHALLOW]
    assert shallow_networks(SPACE, costs(), UNIFORM) == []


@pytest.mark.parametrize("number", [1, 4, 9])
def test_a_short_search_has_uniform_networks_up_to_the_largest_and_others(number):
    chosen = [candidate.widths for candidate in evolve(num_candidates=number)]
    even = [widths for widths in UNIFORM if widths in chosen]
    assert len(chosen) == number and len(even) == max(1, number // 2) < len(UNIFORM)
    assert even[-1] == UNIFORM[-1] and (number == 1 or even[0] == UNIFORM[0])


def test_a_search_goes_on_from_what_it_has_evaluated():
    whole, part = evolve(), []
    for archive in itertools.islice(generations(), 3):
        part = list(archive)
    assert part[-1].generation == 2 and len(part) < len(whole)
    rest = []
    assert evolve(asked=rest, archive=part) == whole
    assert rest == [candidate.widths for candidate in whole[len(part) :]]


def test_a_search_ends_when_every_network_was_evaluated():
    space = budgets.make_space(FAMILY, **RANGE, multiple=8)
    archive = evolve(space, num_candidates=50, population=10)
    assert {c.widths for c in archive} == {(8, 8, 8, 8, 8), (8, 8, 8, 8, 16)}


# --- the session -----------------------------------------------------------------------------


def test_later_populations_use_the_containers_of_earlier_ones():
    rng = np.random.default_rng(0)
    rows = [tuple(int(rng.choice(c[:4])) for c in SPACE.choices) for _ in range(40)]
    first = session.add_containers(SPACE, [], rows[:20], 1000)
    assert first[0] == LARGEST and 1 < len(first) <= session.MAX_CONTAINERS
    assert session.add_containers(SPACE, first, rows[:20], 1000) == first
    assert session.add_containers(SPACE, [], rows[:20], 1e12) == first[:1]
    assert not np.any(np.array(first) % (np.array(LARGEST) // 4))


def test_the_final_choice_among_equal_accuracies_is_the_smallest_loss(tmp_path, monkeypatch):
    def scores(self, name, widths, **options):
        return [Score(0.5, abs(sum(row) - (39 if name == "validation" else 38))) for row in widths]

    monkeypatch.setattr(session.Session, "_scores", scores)
    names = "candidates", "validation", "test"
    evaluators = {name: types.SimpleNamespace(labels=range(4)) for name in names}
    options = types.SimpleNamespace(
        num_candidates=100, population=20, seed=0, time_limit=None, max_latency_ms=None
    )
    record = Record(tmp_path / STATE_FILE, {})
    found = session.Session(record, SPACE, UNIFORM, costs(macs=1e9), evaluators, options)
    winners = found.search()
    assert sum(winners["searched"]) == 39
    assert read_record(record.path, {}) == record
    assert all(row["loss"] == abs(sum(row["widths"]) - 38) for row in found.table())


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_workdir(tmp_path_factory.mktemp("search") / "run", depth=20)


BUDGET = 90_000
OPTIONS = ("--num_candidates=40", "--population=12", "--num_images=40")


@pytest.fixture(scope="module")
def finished(workdir, tmp_path_factory):
    """(folder, what was printed, evaluations) of a search that nothing interrupted.

    Of each call the first image, the number of images and the networks.
    """
    plan, calls = Evaluator.plan, []

    def record(self, widths, **options):
        calls.append((self.images[0].tobytes(), len(self.images), list(widths)))
        return plan(self, widths, **options)

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "plan", record)
        return folder, run(search, *arguments(workdir, folder)), calls


def arguments(workdir, out, *more, budget=f"--max_macs={BUDGET}"):
    return (f"--workdir={workdir}", f"--out={out}", budget, *OPTIONS, *more)


def read(folder, name="best.json"):
    return json.loads((folder / name).read_text())


def test_a_folder_serves_one_search_at_a_time(workdir, tmp_path):
    out, file = tmp_path / "search", tmp_path / "file"
    with locked(out):
        assert_refuses(f"Another process is using {out}", search, *arguments(workdir, out))
    assert not (out / STATE_FILE).exists()
    file.write_text("")
    words = "must be writable, but File exists; choose another"
    assert_refuses(words, search, *arguments(workdir, file))


def test_the_command_reads_the_test_split_once_for_the_winner_and_the_best_uniform_network(
    workdir, finished
):
    folder, printed, recorded = finished
    dataset = datasets.load_dataset("digits")
    tests = [call for call in recorded if call[0] == dataset.test_images[0].tobytes()]
    best = read(folder)
    wanted = {tuple(best["widths"]), tuple(best["uniform"]["widths"])}
    assert len(tests) == 1 and set(tests[0][2]) == wanted
    assert tests[0][1] == len(dataset.test_images)

    candidates = [row for call in recorded if call[1] == 40 for row in call[2]]
    assert len(candidates) == len(set(candidates)) == 40
    finalists = [call for call in recorded if call[1] == 144]
    assert len(finalists) == 1 and len(finalists[0][2]) >= session.NUM_FINALISTS

    family, _, _ = load_inr(workdir)
    widths = morphs.load_morph(folder / "best.json", family)
    dense = morph(family.spec, family.blocks, widths)
    assert (best["num_macs"], best["num_params"]) == (dense.num_macs, dense.num_params)
    assert dense.num_macs <= BUDGET
    assert best["validation_accuracy"] >= best["uniform"]["validation_accuracy"]
    for row in (best, best["uniform"]):
        assert f"test {100 * row['test_accuracy']:.2f} %" in printed
        assert row["validation_loss"] > 0 and row["test_loss"] > 0
    front = read(folder, "pareto.json")
    assert len(front["rows"]) == 40 and front["best"] == best["widths"]
    with (folder / "pareto.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for name in ("accuracy", "loss"):
        assert [row[name] for row in table] == [str(row[name]) for row in front["rows"]]
    assert 0 < sum(row["front"] for row in front["rows"]) < 40
    assert sum(row["uniform"] for row in front["rows"]) > 1
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert front["notes"] == best["notes"] and len(best["notes"]) == 1
    assert "neither the teacher nor the INR was trained on the validation" in best["notes"][0]
    assert f"note: {best['notes'][0]}" in printed


def test_the_command_continues_to_the_same_result_and_evaluates_nothing_again(
    workdir, tmp_path, finished, monkeypatch
):
    args = arguments(workdir, tmp_path, "--notest")
    run(search, *args, "--time_limit=1e-9")
    part = len(read(tmp_path, "pareto.json")["rows"])
    assert part < 40
    assert f"continuing after {part} candidates" in run(search, *args)
    found, wanted = (read(folder, "pareto.json")["rows"] for folder in (tmp_path, finished[0]))
    for name in ("widths", "accuracy", "loss", "generation"):
        assert [row[name] for row in found] == [row[name] for row in wanted]
    best = read(tmp_path)
    assert best["widths"] == read(finished[0])["widths"] and "test_accuracy" not in best
    monkeypatch.setattr(Evaluator, "plan", None)
    run(search, *args)


def test_an_interrupted_search_says_that_the_same_command_continues(workdir, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "plan", interrupted)
    status, _, err = call(search, *arguments(workdir, tmp_path))
    assert status == INTERRUPTED
    assert "stopped after 0 candidates; the same command continues" in err


def test_a_latency_budget_holds_for_what_is_measured_and_notes_are_everywhere(
    workdir, tmp_path, monkeypatch
):
    def measure(family, widths, *, batch, dtype):
        assert (batch, dtype) == (4, "float32")
        return round(family.num_macs(widths) / 1e5 + sum(widths) % 3 * 0.05, 4)

    monkeypatch.setattr(latency, "milliseconds", measure)
    captions, plot = [], plotting.plot_search
    monkeypatch.setattr(
        plotting,
        "plot_search",
        lambda *args, **o: (captions.append(o["caption"]), plot(*args, **o)),
    )
    shutil.copytree(workdir, tmp_path / "run")
    config = read(tmp_path / "run", "config.json")
    config["teacher"]["file"] = "somewhere/public.pt"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    family, _, _ = load_inr(workdir)
    options = {"batch": 4, "dtype": "float32"}
    half, full = (measure(family, family.widths(ratio), **options) for ratio in (0.5, 1.0))
    limit = (half + full) / 2

    def args(out, limit):
        budget, more = f"--max_latency_ms={limit}", ("--latency_batch=4", "--notest")
        return arguments(tmp_path / "run", out, "--max_params=1e9", *more, budget=budget)

    printed = run(search, *args(tmp_path / "a", limit))
    best = read(tmp_path / "a")
    assert best["latency_ms"] == measure(family, best["widths"], **options)
    assert best["latency_ms"] <= limit and best["uniform"]["latency_ms"] <= limit
    assert best["latency_noise_ms"] == 0
    seen, loose = best["notes"]
    assert "the teacher, public.pt, may have been trained on the validation images" in seen
    wanted = f"T{seen[1:]}. Of equal accuracies the smaller loss wins."
    assert "--max_params=1000000000 excludes no network" in loose and captions == [wanted]
    assert f"note: {seen}\nnote: {loose}" in printed
    assert_refuses(f"{half:.3f} to {full:.3f}", search, *args(tmp_path / "b", 0.1))


def test_a_measured_latency_is_a_time():
    assert 0 < latency.milliseconds(FAMILY, LARGEST, batch=2, dtype="float32") < 1000


@pytest.mark.parametrize(
    "args, shown",
    [
        ((), "needs a budget"),
        (("--max_macs=10",), "--max_macs must be at least"),
        (("--max_params=-1",), "--max_params must be above 0"),
        (("--max_macs=inf",), "must be above 0 and finite"),
        (("--max_macs=3e5", "--width_multiple=16"), "none is a multiple of 16"),
        (("--max_macs=3e5", "--num_candidates=0"), "--num_candidates must be at least 1, got 0"),
        (("--max_macs=3e5", "--population=1"), "--population must be at least 2"),
        (("--max_macs=3e5", "--time_limit=-2"), "--time_limit must be above 0"),
    ],
)
def test_the_command_refuses_in_one_sentence(workdir, tmp_path, monkeypatch, args, shown):
    monkeypatch.setattr(Evaluator, "plan", None)
    assert_refuses(shown, search, f"--workdir={workdir}", f"--out={tmp_path}", *args)


def test_each_kind_of_budget_has_its_folder_below_the_work_directory(workdir, monkeypatch):
    monkeypatch.setattr(Evaluator, "plan", None)
    for more, name in [
        ((), "max_macs=200001"),
        (("--max_params=30500.5", "--depth"), "max_macs=200001+max_params=30500.5+depth"),
        (("--width_multiple=2",), "max_macs=200001+width_multiple=2"),
    ]:
        folder = workdir / "search" / name
        folder.mkdir(parents=True)
        Record(folder / STATE_FILE, {"seed": 3}).write()  # another one is there: it is named
        words = f"{folder / STATE_FILE} is of a search with other settings"
        assert_refuses(words, search, f"--workdir={workdir}", "--max_macs=200001", *more)


def test_another_search_in_the_same_folder_names_what_differs(workdir, tmp_path):
    settings, path = {"max_macs": 1.0, "seed": 0}, tmp_path / STATE_FILE
    record = Record(path, settings, [Candidate((1, 2), Score(0.5, 1.5), 0)])
    record.facts[1, 2]["validation_loss"] = 0.25
    record.write()
    assert read_record(path, settings) == record
    with refused(r"seed \(saved 0, given 1\)", UsageError):
        read_record(path, {**settings, "seed": 1})
    words = f"max_macs (saved 1.0, given {BUDGET}.0)"
    assert_refuses(words, search, *arguments(workdir, tmp_path))
    for damaged in ('{"archive": 3', '{"archive": [[[1, 2], 0.5, 0]]}'):
        path.write_text(damaged)
        with refused("damaged or older; remove it", UsageError):
            read_record(path, settings)
