"""Orders of channels: paths through them, those of ResNets, and orders by importance."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_params, refused

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.elastic import ordering
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import SHORTCUTS, morph, resnet_spec

SPECS = {
    shortcut: resnet_spec(
        14, num_classes=5, stage_widths=(4, 6, 8), image_size=8, shortcut=shortcut
    )
    for shortcut in SHORTCUTS
}
SPEC = SPECS["projection"]
GROUPS = cifar_resnet.family(SPEC).groups
HIDDEN = [cifar_resnet.hidden_group(block) for block in SPEC.blocks]
PARAMS = random_params(SPEC)
IMAGES = np.random.default_rng(7).normal(size=(4, 8, 8, 3))
both_shortcuts = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def logits(spec, params):
    """Computed in float64 up to the float32 head, so that only a wrong permutation shows."""
    with jax.enable_x64(True):
        return np.asarray(cifar_resnet.apply(spec, params, jnp.asarray(IMAGES, jnp.float64)))


def assert_same_function(spec, params, other):
    np.testing.assert_allclose(logits(spec, params), logits(spec, other), rtol=1e-5, atol=1e-5)


def random_distances(n, seed):
    matrix = np.random.default_rng(seed).random((n, n))
    return matrix + matrix.T


# The groups of a ResNet


def test_a_resnet56_has_27_hidden_and_3_stream_groups_to_order():
    groups = cifar_resnet.family(resnet_spec(56, num_classes=100)).groups
    streams = [groups[name] for name in ordering.movable(groups) if groups[name].skips is None]
    sizes = [group.size for group in streams if "stream" in group.flags]
    assert len(ordering.movable(groups)) == 30 and sizes == [16, 32, 64]


def test_every_channel_axis_is_in_exactly_one_group():
    members = [(m.path, m.axis) for name in ordering.movable(GROUPS) for m in GROUPS[name].members]
    expected = {
        (path, axis)
        for path, axes in GROUPS.tensors
        for axis in range(len(axes))
        if len(axes) < 4 or axis >= 2
    }
    # Image channels and logits.
    expected -= {("stem/kernel", 2), ("head/kernel", 1), ("head/bias", 0)}
    assert sorted(members) == sorted(expected)


def test_skipped_blocks_have_no_group_and_are_in_no_stream():
    skipped = morph(SPEC, (1, 5), (0, 0))
    groups = cifar_resnet.family(skipped).groups
    assert len(ordering.movable(groups)) == len(ordering.movable(GROUPS)) - 2
    names = {path.partition("/")[0] for path, _ in groups.tensors}
    assert names == set(cifar_resnet.param_shapes(skipped))
    params = random_params(skipped)
    assert_same_function(skipped, params, ordering.smooth(groups, params)[0])


def test_channel_rows_hold_every_weight_that_touches_a_channel():
    rows = ordering.channel_rows(GROUPS, PARAMS, HIDDEN[0])
    assert rows.shape == (4, 9 * 4 + 1 + 9 * 4) and rows.dtype == np.float64
    conv1, conv2 = (PARAMS["stage1_block0"][name] for name in ("conv1", "conv2"))
    touching = [conv1["kernel"][..., 2], conv1["bias"][2], conv2["kernel"][:, :, 2]]
    flat = np.concatenate([np.ravel(tensor) for tensor in touching])
    np.testing.assert_array_equal(np.sort(rows[2]), np.sort(flat))


# Paths


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_tiny_paths_and_equal_distances_keep_the_present_order(n):
    distances = random_distances(n, 0) if n < 3 else np.ones((n, n))
    order = ordering.shortest_hamiltonian_path(distances)
    assert order.dtype == np.int64 and order.tolist() == list(range(n))


def test_paths_are_nearly_optimal():
    excess = []
    for seed in range(30):
        distances = random_distances(3 + seed % 6, seed)
        order = ordering.shortest_hamiltonian_path(distances)
        assert sorted(order) == list(range(len(distances)))
        every = np.array(list(itertools.permutations(order)))
        shortest = distances[every[:, :-1], every[:, 1:]].sum(axis=1).min()
        excess.append(ordering.path_length(distances, order) / shortest - 1)
    assert min(excess) > -1e-12
    assert np.mean(excess) < 0.01


@pytest.mark.parametrize("n", [3, 8, 20, 64])
def test_shuffled_points_on_a_line_are_sorted(n):
    x = np.random.default_rng(n).normal(size=n)
    ascending = np.argsort(x)
    expected = ascending if ascending[0] < ascending[-1] else ascending[::-1]
    found = ordering.shortest_hamiltonian_path(np.abs(x[:, None] - x))
    np.testing.assert_array_equal(found, expected)


def test_no_reversal_of_a_segment_shortens_a_path():
    distances = random_distances(24, seed=5)
    order = ordering.shortest_hamiltonian_path(distances)
    length = ordering.path_length(distances, order)
    for i, j in itertools.combinations(range(25), 2):
        other = np.concatenate([order[:i], order[i:j][::-1], order[j:]])
        assert ordering.path_length(distances, other) >= length - 1e-9


def test_a_path_does_not_depend_on_labels_scale_or_a_constant():
    distances = random_distances(20, seed=3)
    order = ordering.shortest_hamiltonian_path(distances)
    labels = np.random.default_rng(3).permutation(20)
    relabelled = labels[ordering.shortest_hamiltonian_path(distances[np.ix_(labels, labels)])]
    assert relabelled.tolist() in (order.tolist(), order[::-1].tolist())
    for same in (4 * distances, distances + 1, distances + np.diag(np.arange(20.0))):
        np.testing.assert_array_equal(ordering.shortest_hamiltonian_path(same), order)


@pytest.mark.parametrize("n", [11, 16])
def test_a_path_starts_at_its_smaller_end_and_is_never_longer_than_the_present_order(n):
    for seed in range(10):
        distances, present = random_distances(n, seed), np.arange(n)
        best = ordering.shortest_hamiltonian_path(distances)
        assert best[0] < best[-1]
        shorter = ordering.path_length(distances, best)
        assert shorter <= ordering.path_length(distances, present)
        # In an order that is already the best one there is nothing to do.
        again = ordering.shortest_hamiltonian_path(distances[np.ix_(best, best)])
        np.testing.assert_array_equal(again, present)


# Networks


def test_leaving_out_any_member_of_a_group_changes_the_function():
    expected = logits(SPEC, PARAMS)
    for name in ordering.movable(GROUPS):
        order = np.roll(np.arange(GROUPS[name].size), 1)
        whole = GROUPS.leaves(elastic.permute(GROUPS, PARAMS, {name: order}))
        for path in {member.path for member in GROUPS[name].members}:
            leaves = whole | {path: GROUPS.leaves(PARAMS)[path]}
            wrong = logits(SPEC, hyper.nested(leaves))
            assert np.abs(wrong - expected).max() > 1e-3, path


def test_total_variation_is_the_length_of_all_paths():
    leaves = GROUPS.leaves(PARAMS)
    members = [m for name in ordering.movable(GROUPS) for m in GROUPS[name].members]
    expected = sum(np.abs(np.diff(leaves[m.path], axis=m.axis)).sum(dtype=float) for m in members)
    np.testing.assert_allclose(ordering.total_variation(GROUPS, PARAMS), expected, rtol=1e-6)


@both_shortcuts
@pytest.mark.parametrize("seed", range(3))
def test_smoothing_keeps_the_function_says_which_channel_went_where_and_needs_one_pass(spec, seed):
    params, groups = random_params(spec, seed), cifar_resnet.family(spec).groups
    smoothed, orders = ordering.smooth(groups, params)
    assert_same_function(spec, params, smoothed)
    before = ordering.total_variation(groups, params)
    assert ordering.total_variation(groups, smoothed) < 0.99 * before
    assert tuple(orders) == ordering.movable(groups)
    chex.assert_trees_all_equal(elastic.permute(groups, params, orders), smoothed)
    again, kept = ordering.smooth(groups, smoothed)
    chex.assert_trees_all_equal(kept, {name: np.arange(groups[name].size) for name in orders})
    chex.assert_trees_all_equal(again, smoothed)


def scramble(groups, params):
    """(params with the channels of every group at random, their orders)."""
    rng = np.random.default_rng(1)
    orders = {name: rng.permutation(groups[name].size) for name in ordering.movable(groups)}
    return elastic.permute(groups, params, orders), orders


def waves(shape, rng):
    """Slow waves along the last two axes, another one for each kernel tap."""
    taps = shape[:-2] if len(shape) == 4 else ()
    values = rng.normal(size=taps + (1,) * (len(shape) - len(taps)))
    for axis in range(len(taps), len(shape)):
        grid = np.linspace(0, 1, shape[axis]).reshape((-1,) + (1,) * (len(shape) - 1 - axis))
        values = values * np.cos(rng.uniform(0, 0.5) + rng.uniform(1, 2) * grid)
    return values.astype(np.float32)


def test_a_scrambled_smooth_network_returns_to_its_own_order():
    spec = resnet_spec(14, num_classes=5, stage_widths=(8, 12, 16), image_size=8)
    rng, groups = np.random.default_rng(0), cifar_resnet.family(spec).groups
    params = jax.tree.map(lambda leaf: waves(leaf.shape, rng), random_params(spec))
    scrambled, came_from = scramble(groups, params)
    rescued, orders = ordering.smooth(groups, scrambled)
    smooth, rough, again = (
        ordering.total_variation(groups, tree) for tree in (params, scrambled, rescued)
    )
    assert rough > 2 * smooth and again == pytest.approx(smooth, rel=1e-9)
    # The order itself comes back, up to its direction.
    for name, order in orders.items():
        forward = list(range(len(order)))
        assert came_from[name][order].tolist() in (forward, forward[::-1])


# Importance


def random_moments(size, seed):
    """Of correlated activations behind a ReLU, and a constant."""
    rng = np.random.default_rng(seed)
    hidden = np.maximum(rng.normal(size=(200, size)) @ rng.normal(size=(size, size)), 0)
    rows = np.concatenate([hidden, np.ones((200, 1))], axis=1)
    return rows.T @ rows / 200


def greedy_elimination(moments, kernel, ridge):
    """The order of removal, each trial with a regression of its own on all that is left."""
    size = len(moments) - 1
    diagonal = np.diag(moments)
    loaded = moments + np.diag(ridge * diagonal + 1e-6 * diagonal.mean())
    rows = np.linalg.cholesky(loaded).T
    target = rows[:, :size] @ kernel
    left, removed = list(range(size)), []
    while left:
        errors = []
        for candidate in left:
            design = rows[:, [c for c in left if c != candidate] + [size]]
            solution = np.linalg.lstsq(design, target)[0]
            errors.append(np.sum((design @ solution - target) ** 2))
        removed.append(left.pop(int(np.argmin(errors))))
    return removed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_the_importance_order_is_that_of_a_greedy_elimination_by_least_squares(seed, ridge):
    moments = random_moments(7, seed)
    kernel = np.random.default_rng(seed + 10).normal(size=(7, 36))
    order = ordering.importance_order({"w": moments}, {"w": kernel}, ridge=ridge)
    assert order.tolist() == greedy_elimination(moments, kernel, ridge)[::-1]


def test_a_channel_that_others_make_up_for_is_the_least_important():
    moments = random_moments(4, seed=0)
    # Channel 4 is the sum of channels 1 and 2 and a constant.
    basis = np.zeros((6, 5))
    basis[[0, 1, 2, 3, 5], range(5)] = 1
    basis[4, [1, 2, 4]] = 1, 1, 3
    moments, kernel = {"w": basis @ moments @ basis.T}, np.ones((5, 18))
    kernel[4] = 10.0
    assert ordering.importance_order(moments, {"w": kernel}, ridge=1e-9)[-1] in (1, 2, 4)
    kernel[3] = 0.0  # nobody reads it
    assert ordering.importance_order(moments, {"w": kernel})[-1] == 3


def test_ordering_by_importance_keeps_the_function_and_moves_only_blocks_with_moments():
    family, chosen = cifar_resnet.family(SPEC), [HIDDEN[n] for n in (1, 3, 5)]
    moments = elastic.moments(family, PARAMS, IMAGES.astype(np.float32), chosen)
    ordered, orders = ordering.by_importance(GROUPS, PARAMS, moments)
    assert list(orders) == chosen
    assert_same_function(SPEC, PARAMS, ordered)
    assert any(order.tolist() != sorted(order) for order in orders.values())
    for block in SPEC.blocks:
        conv1, conv2 = (PARAMS[block.name][name]["kernel"] for name in ("conv1", "conv2"))
        order = np.arange(block.hidden_width)
        if (path := f"{block.name}/conv2/kernel") in moments:
            kernel = np.moveaxis(conv2, 2, 0).reshape(block.hidden_width, -1)
            order = ordering.importance_order({path: moments[path]}, {path: kernel})
            np.testing.assert_array_equal(orders[cifar_resnet.hidden_group(block)], order)
        layers = ordered[block.name]
        np.testing.assert_array_equal(layers["conv2"]["kernel"], conv2[:, :, order])
        np.testing.assert_array_equal(layers["conv1"]["kernel"], conv1[..., order])


# Refusals


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (np.zeros(4), "must be a square matrix"),
        (np.zeros((2, 3)), "must be a square matrix"),
        (np.array([[0, 1, 2], [1, 0, 3], [2, 4, 0]]), "must be symmetric"),
        (np.array([[0, np.inf], [np.inf, 0]]), "must be finite"),
        (np.array([[0, np.nan], [np.nan, 0]]), "must be finite"),
        (np.array([[0, -1], [-1, 0]]), "must be non-negative"),
    ],
)
def test_impossible_distances_are_refused(distances, message):
    with refused(message):
        ordering.shortest_hamiltonian_path(distances)


SHALLOWER, NARROWER = (random_params(morph(SPEC, [3], [width])) for width in (0, 5))
NAN = {**PARAMS, "stem": {**PARAMS["stem"], "bias": np.array([0, np.nan, 0, 0], np.float32)}}


@pytest.mark.parametrize(
    "function, params, words",
    [
        (ordering.smooth, SHALLOWER, "missing stage2_block1/conv1/bias"),
        (ordering.total_variation, NARROWER, r"block1/conv1/bias must .* \(6,\), got \(5,\)"),
        (ordering.smooth, NAN, "must be finite, got NaN or infinity"),
    ],
    ids=["another depth", "another width", "not finite"],
)
def test_params_that_do_not_fit_are_refused(function, params, words):
    with refused(words):
        function(GROUPS, params)
