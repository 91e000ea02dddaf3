"""The search: what it proposes, finds, keeps and refuses; the command on a tiny work directory."""

import collections
import csv
import itertools
import json

import numpy as np
import pytest
from networks import assert_refuses, call, refused, run, write_workdir

from neumeta_jax.core.inr import Grid
from neumeta_jax.data import datasets
from neumeta_jax.errors import INTERRUPTED, UsageError
from neumeta_jax.evaluation import grid, morphs
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, morph, resnet_spec
from neumeta_jax.runs import checkpoint, experiment as lab
from neumeta_jax.search import evolution
from neumeta_jax.search.evolution import Candidate

SPEC = resnet_spec(20, num_classes=5, stage_widths=(8, 12, 16), image_size=8)
BLOCKS = generated_blocks(SPEC)
FAMILY = cifar_resnet.hypernetwork(SPEC, BLOCKS, Grid())
RANGE = {"low": 0.25, "high": 1.0}
SPACE = evolution.make_space(FAMILY, **RANGE)
DEEP = evolution.make_space(FAMILY, **RANGE, depth=True)
UNIFORM = evolution.uniform_networks(SPACE, **RANGE)
SMALLEST, LARGEST = (2, 2, 3, 3, 4), (8, 8, 12, 12, 16)


def costs(space=SPACE, *, macs=None, params=None):
    return [
        evolution.count_cost(space, "macs", macs),
        evolution.count_cost(space, "params", params),
    ]


def middle(space, name, share=0.5):
    """A budget between the smallest and the largest network's."""
    cost = evolution.count_cost(space, name, None)
    low = cost.total([0] * len(space.choices))
    high = cost.total([len(choices) - 1 for choices in space.choices])
    return low + share * (high - low)


def toy_accuracy(widths):
    """Grows with every block, the fourth and the last most of all."""
    gains = (0.01, 0.01, 0.01, 0.2, 0.3)
    shares = np.array(widths) / FAMILY.full_widths
    return float(np.dot(gains, np.sqrt(shares)))


def evolve(space=SPACE, *, limits=None, asked=None, **options):
    """The archive; `asked` is extended by the networks that are evaluated."""

    def evaluate(widths):
        if asked is not None:
            asked.extend(widths)
        return [toy_accuracy(row) for row in widths]

    options = {"num_candidates": 300, "population": 20, "seed": 0, **options}
    uniform = evolution.uniform_networks(space, **RANGE)
    return evolution.evolve(space, limits or costs(space), uniform, evaluate, **options)


# --- networks and budgets --------------------------------------------------------------------


def test_a_space_holds_every_width_of_the_range_or_its_multiples():
    assert SPACE.choices[0] == tuple(range(2, 9)) and SPACE.choices[4] == tuple(range(4, 17))
    assert SPACE.size == 7 * 7 * 10 * 10 * 13
    assert DEEP.choices[0] == (0, *range(2, 9))
    for multiple, wanted in ((4, (4, 8)), (8, (8,)), (3, (3, 6))):
        space = evolution.make_space(FAMILY, **RANGE, multiple=multiple)
        assert space.choices[0] == wanted


def test_blocks_that_change_nothing_are_left_out_of_every_network_and_of_its_costs():
    space = DEEP.without((0, 3))
    assert space.choices[0] == space.choices[3] == (0,) and space.choices[1] == DEEP.choices[1]
    rows = evolution.uniform_networks(space, **RANGE)
    assert rows and all(row[0] == row[3] == 0 < min(row[1], row[2], row[4]) for row in rows)
    shallow = evolution.shallow_networks(space, costs(space), rows)
    assert shallow and all(row[0] == row[3] == 0 for row in shallow)
    plain = SPACE.without((0, 3))
    assert evolution.shallow_networks(plain, costs(plain), rows) == []
    cost = evolution.count_cost(space, "macs", None).total(space.genes(rows[-1]))
    assert cost == morph(SPEC, BLOCKS, rows[-1]).num_macs


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
        evolution.make_space(FAMILY, **options)


def test_the_uniform_networks_are_those_of_all_ratios():
    wanted = {tuple(FAMILY.widths(ratio)) for ratio in np.linspace(0.25, 1, 2000)}
    assert set(UNIFORM) == wanted and len(UNIFORM) == len(wanted)
    assert UNIFORM[0] == SMALLEST and UNIFORM[-1] == LARGEST
    multiples = evolution.make_space(FAMILY, **RANGE, multiple=4, depth=True)
    found = evolution.uniform_networks(multiples, **RANGE)
    assert found[0] == (4, 4, 4, 4, 4) and found[-1] == LARGEST
    assert all(width in (4, 8, 12, 16) for widths in found for width in widths)


@pytest.mark.parametrize("name", ["macs", "params"])
def test_costs_are_those_of_the_dense_networks(name):
    rng = np.random.default_rng(0)
    cost = evolution.count_cost(DEEP, name, None)
    for _ in range(20):
        genes = [int(rng.integers(len(choices))) for choices in DEEP.choices]
        dense = morph(SPEC, BLOCKS, DEEP.widths(genes))
        assert cost.total(genes) == getattr(dense, f"num_{name}")
        assert DEEP.genes(DEEP.widths(genes)) == genes


def test_the_latency_of_a_sum_over_blocks_is_found_from_few_networks():
    measured = []

    def measure(widths):
        measured.append(widths)
        weights = (1.0, 1.0, 2.0, 2.0, 0.5)
        return 3 + sum(a * w + (w > 0) for a, w in zip(weights, widths, strict=True))

    cost = evolution.latency_cost(DEEP, 40.0, measure)
    assert len(measured) < 25
    for widths in (LARGEST, (0, 2, 5, 0, 11), SMALLEST, (0, 0, 0, 0, 0)):
        assert cost.total(DEEP.genes(widths)) == pytest.approx(measure(widths))


def test_noisy_latencies_still_grow_with_the_width():
    rng = np.random.default_rng(1)
    cost = evolution.latency_cost(SPACE, 1.0, lambda widths: 1 + 0.001 * sum(widths) + rng.random())
    for n, choices in enumerate(SPACE.choices):
        genes = [[gene if m == n else 0 for m in range(5)] for gene in range(len(choices))]
        amounts = [cost.total(row) for row in genes]
        assert amounts == sorted(amounts)


@pytest.mark.parametrize("name", ["macs", "params"])
def test_an_impossible_budget_says_what_is_possible(name):
    small, large = (
        getattr(morph(SPEC, BLOCKS, widths), f"num_{name}") for widths in (SMALLEST, LARGEST)
    )
    evolution.check_budgets(SPACE, costs(**{name: small}))
    with refused(f"--max_{name} .*{small:,} to {large:,}", UsageError):
        evolution.check_budgets(SPACE, costs(**{name: small - 1}))


# --- evolution -------------------------------------------------------------------------------


def test_the_best_network_under_a_budget_is_found():
    """Of all 63,700, found among 600."""
    limits = costs(macs=middle(SPACE, "macs"))
    genes = itertools.product(*(range(len(choices)) for choices in SPACE.choices))
    best = max(toy_accuracy(SPACE.widths(row)) for row in genes if limits[0].allows(row))
    uniform = max(toy_accuracy(w) for w in UNIFORM if limits[0].allows(SPACE.genes(w)))
    for seed in range(3):
        archive = evolve(limits=limits, num_candidates=600, seed=seed)
        found = max(candidate.accuracy for candidate in archive)
        assert found > uniform + 0.95 * (best - uniform)


def test_no_network_is_evaluated_twice_and_the_seed_decides_which():
    first, again, other = [], [], []
    archive = evolve(asked=first)
    evolve(asked=again)
    evolve(asked=other, seed=1)
    assert len(first) == len(set(first)) == len(archive) == 300
    assert first == again != other


@pytest.mark.parametrize("space", [SPACE, DEEP], ids=["widths", "depth"])
def test_every_candidate_keeps_every_budget(space):
    limits = costs(space, macs=middle(space, "macs", 0.4), params=middle(space, "params", 0.5))
    archive = evolve(space, limits=limits)
    for candidate in archive:
        dense = morph(SPEC, BLOCKS, candidate.widths)
        assert dense.num_macs <= limits[0].limit and dense.num_params <= limits[1].limit
        for width, choices in zip(candidate.widths, space.choices, strict=True):
            assert width in choices
    skipped = sum(0 in candidate.widths for candidate in archive)
    assert skipped > 20 if space is DEEP else skipped == 0


def test_the_uniform_networks_within_the_budget_are_in_the_first_population():
    limits = costs(macs=middle(SPACE, "macs"))
    first = [c.widths for c in evolve(limits=limits) if c.generation == 0]
    wanted = [w for w in UNIFORM if limits[0].allows(SPACE.genes(w))]
    assert 0 < len(wanted) < len(UNIFORM) and set(wanted) <= set(first)
    assert len(first) > len(wanted)


def test_the_largest_shallow_networks_within_the_budget_are_in_the_first_population():
    limits = costs(DEEP, macs=middle(DEEP, "macs", 0.6))
    first = [c.widths for c in evolve(DEEP, limits=limits) if c.generation == 0]
    shallow = evolution.shallow_networks(DEEP, limits, UNIFORM)
    assert set(shallow) <= set(first)
    assert shallow.pop() == (0, 0, 0, 0, 0)  # two blocks of each stage left out
    wanted = [(widths[0], 0, widths[2], 0, 0) for widths in UNIFORM]
    macs = evolution.count_cost(DEEP, "macs", None)
    amounts = {macs.total(DEEP.genes(w)) for w in wanted if limits[0].allows(DEEP.genes(w))}
    amounts = sorted(amounts)
    found = [macs.total(DEEP.genes(w)) for w in shallow]
    assert set(shallow) <= set(wanted) and found == amounts[::-1][: evolution.NUM_SHALLOW]
    assert amounts[-1] < limits[0].limit
    assert evolution.shallow_networks(SPACE, costs(), UNIFORM) == []


def test_shallow_networks_of_a_deeper_network_leave_out_up_to_all_skippable_blocks():
    spec = resnet_spec(32, num_classes=5, stage_widths=(4, 4, 4), image_size=8)
    family = cifar_resnet.hypernetwork(spec, generated_blocks(spec), Grid())
    space = evolution.make_space(family, low=1.0, high=1.0, depth=True)
    uniform = evolution.uniform_networks(space, low=1.0, high=1.0)
    found = evolution.shallow_networks(space, costs(space), uniform)
    most = collections.Counter(family.stages).most_common(1)[0][1]
    assert len(found) == most and len({sum(w == 0 for w in widths) for widths in found}) == most


def test_a_search_goes_on_from_what_it_has_evaluated():
    whole = evolve()
    generations = []

    def stop(archive):
        generations.append(archive[-1].generation)
        return len(generations) < 3

    part = evolve(on_generation=stop)
    assert generations == [0, 1, 2] and len(part) < len(whole)
    rest = []
    assert evolve(asked=rest, archive=part) == whole
    assert rest == [candidate.widths for candidate in whole[len(part) :]]


def test_a_search_ends_when_every_network_was_evaluated():
    space = evolution.make_space(FAMILY, **RANGE, multiple=8)
    archive = evolve(space, num_candidates=50, population=10)
    assert {c.widths for c in archive} == {(8, 8, 8, 8, 8), (8, 8, 8, 8, 16)}


def test_the_front_holds_what_nothing_smaller_reaches():
    amounts, accuracies = [5, 3, 4, 1, 4], [0.6, 0.5, 0.5, 0.2, 0.55]
    assert evolution.pareto_front(amounts, accuracies) == [True, True, False, True, True]


# --- containers ------------------------------------------------------------------------------


def test_later_populations_use_the_containers_of_earlier_ones():
    rng = np.random.default_rng(0)
    rows = [tuple(int(rng.choice(c[:4])) for c in SPACE.choices) for _ in range(40)]
    first = evolution.add_containers(SPACE, [], rows[:20], macs_per_container=1000)
    assert first[0] == LARGEST and 1 < len(first) <= evolution.MAX_CONTAINERS
    again = evolution.add_containers(SPACE, first, rows[:20], macs_per_container=1000)
    assert again == first
    assert evolution.add_containers(SPACE, [], rows[:20], macs_per_container=1e12) == first[:1]
    assert not np.any(np.array(first) % (np.array(LARGEST) // 4))


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_workdir(tmp_path_factory.mktemp("search") / "run", depth=20)


BUDGET = 200_000
OPTIONS = ("--num_candidates=40", "--population=12", "--num_images=40")


@pytest.fixture(scope="module")
def finished(workdir, tmp_path_factory):
    """(folder, what was printed, calls of evaluate_grid) of a search that nothing interrupted.

    Of each call the first image, the number of images and the networks.
    """
    evaluate_grid, calls = grid.evaluate_grid, []

    def record(hypernetwork, params, widths, images, *args, **options):
        calls.append((images[0].tobytes(), len(images), [tuple(row) for row in widths.tolist()]))
        return evaluate_grid(hypernetwork, params, widths, images, *args, **options)

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "evaluate_grid", record)
        return folder, run(evolution, *arguments(workdir, folder)), calls


def arguments(workdir, out, *more, budget=f"--max_macs={BUDGET}"):
    return (f"--workdir={workdir}", f"--out={out}", budget, *OPTIONS, *more)


def read(folder, name="best.json"):
    return json.loads((folder / name).read_text())


def test_a_folder_serves_one_search_at_a_time(workdir, tmp_path):
    out, file = tmp_path / "search", tmp_path / "file"
    with lab.locked(out):
        assert_refuses(f"Another process is using {out}", evolution, *arguments(workdir, out))
    assert not (out / evolution.STATE_FILE).exists()
    file.write_text("")
    words = "must be writable, but File exists; choose another"
    assert_refuses(words, evolution, *arguments(workdir, file))


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
    assert len(finalists) == 1 and len(finalists[0][2]) >= evolution.NUM_FINALISTS

    family, _, _ = checkpoint.load_inr(workdir)
    widths = morphs.load_morph(folder / "best.json", family)
    dense = morph(family.spec, family.blocks, widths)
    assert (best["num_macs"], best["num_params"]) == (dense.num_macs, dense.num_params)
    assert dense.num_macs <= BUDGET
    assert best["validation_accuracy"] >= best["uniform"]["validation_accuracy"]
    for row in (best, best["uniform"]):
        assert f"test {100 * row['test_accuracy']:.2f} %" in printed
    front = read(folder, "pareto.json")
    assert len(front["rows"]) == 40 and front["best"] == best["widths"]
    with (folder / "pareto.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["accuracy"] for row in table] == [str(row["accuracy"]) for row in front["rows"]]
    assert 0 < sum(row["front"] for row in front["rows"]) < 40
    assert sum(row["uniform"] for row in front["rows"]) > 1
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_continues_to_the_same_result_and_evaluates_nothing_again(
    workdir, tmp_path, finished, monkeypatch
):
    args = arguments(workdir, tmp_path, "--notest")
    run(evolution, *args, "--time_limit=1e-9")
    part = len(read(tmp_path, "pareto.json")["rows"])
    assert part < 40
    assert f"continuing after {part} candidates" in run(evolution, *args)
    found, wanted = (read(folder, "pareto.json")["rows"] for folder in (tmp_path, finished[0]))
    for name in ("widths", "accuracy", "generation"):
        assert [row[name] for row in found] == [row[name] for row in wanted]
    best = read(tmp_path)
    assert best["widths"] == read(finished[0])["widths"] and "test_accuracy" not in best
    monkeypatch.setattr(grid, "evaluate_grid", None)
    run(evolution, *args)


def test_an_interrupted_search_says_that_the_same_command_continues(workdir, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "evaluate_grid", interrupted)
    status, _, err = call(evolution, *arguments(workdir, tmp_path))
    assert status == INTERRUPTED
    assert "stopped after 0 candidates; the same command continues" in err


def test_a_latency_budget_holds_for_what_is_measured(workdir, tmp_path, monkeypatch):
    def measure(family, widths, *, batch, dtype):
        assert (batch, dtype) == (4, "float32")
        return family.num_macs(widths) / 1e5 + sum(widths) % 3 * 0.05

    monkeypatch.setattr(evolution, "measure_latency", measure)
    family, _, _ = checkpoint.load_inr(workdir)
    options = {"batch": 4, "dtype": "float32"}
    half, full = (measure(family, family.widths(ratio), **options) for ratio in (0.5, 1.0))
    limit = (half + full) / 2

    def args(out, limit):
        budget, more = f"--max_latency_ms={limit}", ("--latency_batch=4", "--notest")
        return arguments(workdir, out, *more, budget=budget)

    run(evolution, *args(tmp_path, limit))
    best = read(tmp_path)
    assert best["latency_ms"] == pytest.approx(measure(family, best["widths"], **options), abs=1e-3)
    assert best["latency_ms"] <= limit and best["uniform"]["latency_ms"] <= limit
    words = f"{half:.3f} to {full:.3f}"
    assert_refuses(words, evolution, *args(tmp_path / "b", 0.1))


def test_a_measured_latency_is_a_time():
    assert (
        0 < evolution.measure_latency(FAMILY, LARGEST, batch=2, dtype="float32", seconds=0.0) < 1000
    )


@pytest.mark.parametrize(
    "args, shown",
    [
        ((), "needs a budget"),
        (("--max_macs=10",), "--max_macs must be at least"),
        (("--max_params=-1",), "--max_params must be above 0"),
        (("--max_macs=inf",), "must be above 0 and finite"),
        (("--max_macs=3e5", "--min_ratio=0.9", "--max_ratio=0.6"), "got 0.9 and 0.6"),
        (("--max_macs=3e5", "--width_multiple=16"), "none is a multiple of 16"),
        (("--max_macs=3e5", "--num_candidates=0"), "--num_candidates must be at least 1, got 0"),
        (("--max_macs=3e5", "--population=1"), "--population must be at least 2"),
        (("--max_macs=3e5", "--seed=-1"), "--seed must be at least 0"),
        (("--max_macs=3e5", "--time_limit=-2"), "--time_limit must be above 0"),
        (("--max_macs=3e5", "--num_samples=0"), "--num_samples must be at least 1"),
        (("--max_macs=many",), "many"),
    ],
)
def test_the_command_refuses_in_one_sentence(workdir, tmp_path, monkeypatch, args, shown):
    monkeypatch.setattr(grid, "evaluate_grid", None)
    assert_refuses(shown, evolution, f"--workdir={workdir}", f"--out={tmp_path}", *args)


def test_another_search_in_the_same_folder_names_what_differs(workdir, tmp_path):
    settings, path = {"max_macs": 1.0, "seed": 0}, tmp_path / "candidates.json"
    record = evolution.Record(settings, [Candidate((1, 2), 0.5, 0)], validation={(1, 2): 0.25})
    record.write(path)
    assert evolution.read_record(path, settings) == record
    with refused(r"seed \(saved 0, given 1\)", UsageError):
        evolution.read_record(path, {**settings, "seed": 1})
    names = dict.fromkeys(evolution.BUDGETS) | {"depth": False}
    evolution.Record({**names, "max_macs": 3e7}).write(path)
    for more, below in [
        ({"max_macs": 3e7}, ""),
        ({"max_macs": 5e7}, "max_macs=5e+07"),
        ({"max_params": 2e5, "depth": True}, "max_params=200000,depth"),
    ]:
        assert evolution._folder(tmp_path, {**names, **more}) == tmp_path / below
    record.write(path)
    words = f"max_macs (saved 1.0, given {BUDGET}.0)"
    assert_refuses(words, evolution, *arguments(workdir, tmp_path))
    path.write_text('{"archive": 3')
    with refused("damaged; remove it", UsageError):
        evolution.read_record(path, settings)
