import itertools

import numpy as np
import pytest

from neumeta_jax.core.inr import Grid
from neumeta_jax.evaluation import buckets
from neumeta_jax.evaluation.buckets import Bucket, fill_containers, make_buckets
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec

SPEC = resnet_spec(20, num_classes=10)
FAMILY = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC, "all"), Grid())
INNER = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC), Grid())
BLOCKS = FAMILY.blocks


def uniform(number, seed=0):
    ratios = np.random.default_rng(seed).uniform(0.25, 1, number)
    return np.array([FAMILY.widths(ratio) for ratio in ratios])


def by_block(number, seed=0):
    rng = np.random.default_rng(seed)
    full = np.array(FAMILY.full_widths)
    return np.maximum(1, np.round(rng.uniform(0.25, 1, (number, len(BLOCKS))) * full)).astype(int)


def macs(widths):
    return FAMILY.num_macs(widths)


def padded(found):
    return sum(len(bucket.members) * macs(bucket.container) for bucket in found)


@pytest.mark.parametrize("rows", [uniform(40), by_block(40)])
@pytest.mark.parametrize("max_buckets", [1, 3, 8])
def test_every_network_lies_in_one_bucket_that_holds_it_tightly(rows, max_buckets):
    found = make_buckets(FAMILY.num_macs, rows, max_buckets=max_buckets)
    assert 1 <= len(found) <= max_buckets
    assert sorted(n for bucket in found for n in bucket.members) == list(range(40))
    for bucket in found:
        assert bucket.container == tuple(rows[list(bucket.members)].max(axis=0))
        assert list(bucket.members) == sorted(bucket.members)
    firsts = [bucket.members[0] for bucket in found]
    assert firsts == sorted(firsts)


def test_widths_of_one_ratio_are_padded_hardly_more_than_in_the_best_contiguous_partition():
    rows = uniform(14)
    ordered = sorted(rows.tolist(), key=macs)
    best = min(
        sum((stop - start) * macs(ordered[stop - 1]) for start, stop in itertools.pairwise(cuts))
        for inner in itertools.combinations(range(1, 14), 3)
        for cuts in [(0, *inner, 14)]
    )
    assert best <= padded(make_buckets(FAMILY.num_macs, rows, max_buckets=4)) < 1.01 * best


def test_eight_buckets_pad_64_networks_of_one_ratio_by_a_tenth_at_most():
    rows = uniform(64)
    exact = sum(map(macs, rows))
    assert padded(make_buckets(FAMILY.num_macs, rows)) < 1.1 * exact
    assert 64 * SPEC.num_macs > 1.4 * exact


def test_widths_drawn_block_by_block_cost_less_than_at_one_shape():
    """And less than networks put together by their size alone."""
    rows = by_block(64)
    found = padded(make_buckets(FAMILY.num_macs, rows))
    ordered = rows[np.argsort([macs(row) for row in rows])]
    by_size = sum(8 * macs(part.max(axis=0)) for part in np.split(ordered, 8))
    assert found < by_size < 64 * macs(rows.max(axis=0))


def test_a_bucket_is_opened_only_where_it_saves_its_price():
    rows = np.array([FAMILY.widths(ratio) for ratio in (0.25, 0.26, 1.0, 0.99)])
    saved = 2 * (macs(rows[2]) - macs(rows[1]))
    assert len(make_buckets(FAMILY.num_macs, rows)) == 4
    found = make_buckets(FAMILY.num_macs, rows, macs_per_bucket=saved * 0.9)
    assert [bucket.members for bucket in found] == [(0, 1), (2, 3)]
    assert len(make_buckets(FAMILY.num_macs, rows, macs_per_bucket=saved * 1.1)) == 1


def test_a_block_that_all_members_skip_is_not_in_the_container():
    rows = np.array([[0, 8, 20, 20, 40], [4, 8, 30, 20, 0], [0, 8, 32, 20, 50]])
    found = make_buckets(INNER.num_macs, rows, max_buckets=2)
    assert [bucket.container[0] for bucket in found] == [0, 4]


def test_beyond_the_limit_neighbours_in_size_start_as_one(monkeypatch):
    monkeypatch.setattr(buckets, "MAX_RUNS", 50)
    rows = uniform(400)
    found = make_buckets(FAMILY.num_macs, rows)
    assert sorted(n for bucket in found for n in bucket.members) == list(range(400))
    assert len(found) == 8 and padded(found) < 1.1 * sum(map(macs, rows))


def test_given_containers_hold_each_network_in_the_cheapest_that_fits():
    rows = by_block(30)
    containers = [
        FAMILY.full_widths,
        rows.max(axis=0).tolist(),
        rows[:4].max(axis=0).tolist(),
        rows[7].tolist(),
    ]
    found = fill_containers(FAMILY.num_macs, rows, containers)
    assert sorted(n for bucket in found for n in bucket.members) == list(range(30))
    for bucket in found:
        for n in bucket.members:
            fitting = [c for c in containers if np.all(rows[n] <= c)]
            assert macs(bucket.container) == min(map(macs, fitting))
    assert found[0].members[:4] == (0, 1, 2, 3)
    assert Bucket(tuple(rows[7].tolist()), (7,)) in found


@pytest.mark.parametrize("containers", [[], [[16] * len(BLOCKS)]])
def test_a_network_that_no_container_holds_is_refused(containers):
    rows = np.array([[8] * len(BLOCKS), [8] * (len(BLOCKS) - 1) + [17]])
    with pytest.raises(ValueError, match=f"one of the {len(containers)} containers.* row") as error:
        fill_containers(FAMILY.num_macs, rows, containers)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
