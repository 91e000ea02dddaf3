import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_params, refused

from neumeta_jax import resnet
from neumeta_jax.architecture import SHORTCUTS, cifar_resnet, morph

SPECS = {
    shortcut: cifar_resnet(
        14, num_classes=5, stage_widths=(4, 6, 8), image_size=8, shortcut=shortcut
    )
    for shortcut in SHORTCUTS
}
SPEC = SPECS["projection"]
CLIQUES = smoothing.cliques(SPEC)
PARAMS = random_params(SPEC)
IMAGES = np.random.default_rng(7).normal(size=(4, 8, 8, 3))
both_shortcuts = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def logits(spec, params):
    """Computed in float64 up to the float32 head, so that only a wrong permutation shows."""
    with jax.enable_x64(True):
        return np.asarray(resnet.apply(spec, params, jnp.asarray(IMAGES, jnp.float64)))


def assert_same_function(spec, params, other):
    np.testing.assert_allclose(logits(spec, params), logits(spec, other), rtol=1e-5, atol=1e-5)


def random_distances(n, seed):
    matrix = np.random.default_rng(seed).random((n, n))
    return matrix + matrix.T


# Cliques


def test_a_resnet56_has_27_hidden_and_3_stream_cliques():
    sizes = {c.name: c.size for c in smoothing.cliques(cifar_resnet(56, num_classes=100))}
    assert len(sizes) == 30 and sum(name.endswith("_hidden") for name in sizes) == 27
    assert [sizes[name] for name in sizes if name.endswith("_stream")] == [16, 32, 64]


@both_shortcuts
def test_every_channel_axis_is_in_exactly_one_clique(spec):
    members = [member for clique in smoothing.cliques(spec) for member in clique.members]
    expected = set()
    for keys, leaf in jax.tree.leaves_with_path(random_params(spec)):
        path = tuple(key.key for key in keys)
        expected |= {(path, axis) for axis in range(leaf.ndim) if leaf.ndim < 4 or axis >= 2}
    # Image channels and logits.
    expected -= {(("stem", "kernel"), 2), (("head", "kernel"), 1), (("head", "bias"), 0)}
    if spec.shortcut == "pad":
        hidden = {("conv1", "kernel", 3), ("conv1", "bias", 0), ("conv2", "kernel", 2)}
        expected = {(path, axis) for path, axis in expected if (*path[1:], axis) in hidden}
        assert len(expected) == 3 * len(spec.blocks)
    assert sorted(members) == sorted(expected)


def test_skipped_blocks_have_no_clique_and_are_in_no_stream():
    skipped = morph(SPEC, (1, 5), (0, 0))
    found = smoothing.cliques(skipped)
    assert len(found) == len(CLIQUES) - 2
    names = {path[0] for clique in found for path, _ in clique.members}
    assert names == set(resnet.param_shapes(skipped))
    params = random_params(skipped)
    assert_same_function(skipped, params, smoothing.smooth(params, skipped)[0])


def test_channel_rows_hold_every_weight_that_touches_a_channel():
    rows = smoothing.channel_rows(PARAMS, CLIQUES[0])
    assert rows.shape == (4, 9 * 4 + 1 + 9 * 4) and rows.dtype == np.float64
    conv1, conv2 = (PARAMS["stage1_block0"][name] for name in ("conv1", "conv2"))
    touching = [conv1["kernel"][..., 2], conv1["bias"][2], conv2["kernel"][:, :, 2]]
    np.testing.assert_array_equal(rows[2], np.concatenate([np.ravel(t) for t in touching]))


# Paths


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_tiny_paths_and_equal_distances_keep_the_present_order(n):
    order = smoothing.shortest_hamiltonian_path(
        random_distances(n, 0) if n < 3 else np.ones((n, n))
    )
    assert order.dtype == np.int64 and order.tolist() == list(range(n))


def test_paths_are_nearly_optimal():
    excess = []
    for seed in range(30):
        distances = random_distances(3 + seed % 6, seed)
        order = smoothing.shortest_hamiltonian_path(distances)
        assert sorted(order) == list(range(len(distances)))
        every = np.array(list(itertools.permutations(order)))
        shortest = distances[every[:, :-1], every[:, 1:]].sum(axis=1).min()
        excess.append(smoothing.path_length(distances, order) / shortest - 1)
    assert min(excess) > -1e-12
    assert np.mean(excess) < 0.01


@pytest.mark.parametrize("n", [3, 8, 20, 64])
def test_shuffled_points_on_a_line_are_sorted(n):
    x = np.random.default_rng(n).normal(size=n)
    ascending = np.argsort(x)
    expected = ascending if ascending[0] < ascending[-1] else ascending[::-1]
    found = smoothing.shortest_hamiltonian_path(np.abs(x[:, None] - x))
    np.testing.assert_array_equal(found, expected)


def test_no_reversal_of_a_segment_shortens_a_path():
    distances = random_distances(24, seed=5)
    order = smoothing.shortest_hamiltonian_path(distances)
    length = smoothing.path_length(distances, order)
    for i, j in itertools.combinations(range(25), 2):
        other = np.concatenate([order[:i], order[i:j][::-1], order[j:]])
        assert smoothing.path_length(distances, other) >= length - 1e-9


def test_a_path_does_not_depend_on_labels_scale_or_a_constant():
    distances = random_distances(20, seed=3)
    order = smoothing.shortest_hamiltonian_path(distances)
    labels = np.random.default_rng(3).permutation(20)
    relabelled = labels[smoothing.shortest_hamiltonian_path(distances[np.ix_(labels, labels)])]
    assert relabelled.tolist() in (order.tolist(), order[::-1].tolist())
    for same in (4 * distances, distances + 1, distances + np.diag(np.arange(20.0))):
        np.testing.assert_array_equal(smoothing.shortest_hamiltonian_path(same), order)


@pytest.mark.parametrize("n", [11, 16])
def test_a_path_starts_at_its_smaller_end_and_is_never_longer_than_the_present_order(n):
    for seed in range(10):
        distances, present = random_distances(n, seed), np.arange(n)
        best = smoothing.shortest_hamiltonian_path(distances)
        assert best[0] < best[-1]
        shorter = smoothing.path_length(distances, best)
        assert shorter <= smoothing.path_length(distances, present)
        # In an order that is already the best one there is nothing to do.
        again = smoothing.shortest_hamiltonian_path(distances[np.ix_(best, best)])
        np.testing.assert_array_equal(again, present)


# Networks


@both_shortcuts
def test_permuting_any_clique_keeps_the_function(spec):
    params = random_params(spec)
    rng = np.random.default_rng(2)
    for clique in smoothing.cliques(spec):
        order = np.roll(rng.permutation(clique.size), 1)
        permuted = smoothing.permute(params, clique, order)
        assert_same_function(spec, params, permuted)
        rows, moved = (smoothing.channel_rows(tree, clique) for tree in (params, permuted))
        np.testing.assert_array_equal(moved, rows[order])
        back = smoothing.permute(permuted, clique, np.argsort(order))
        chex.assert_trees_all_equal(back, params)


def test_leaving_out_any_member_of_a_clique_changes_the_function():
    expected = logits(SPEC, PARAMS)
    for clique in CLIQUES:
        for left_out in clique.members:
            members = tuple(member for member in clique.members if member != left_out)
            partial = smoothing.Clique(clique.name, clique.size, members)
            order = np.roll(np.arange(clique.size), 1)
            wrong = logits(SPEC, smoothing.permute(PARAMS, partial, order))
            assert np.abs(wrong - expected).max() > 1e-3, left_out


def test_permute_returns_a_new_tree_and_leaves_the_old_one_alone():
    before = jax.tree.map(np.copy, PARAMS)
    permuted = smoothing.permute(PARAMS, CLIQUES[-1], np.arange(8)[::-1])
    chex.assert_trees_all_equal(PARAMS, before)
    chex.assert_trees_all_equal_structs(permuted, PARAMS)
    for leaf in jax.tree.leaves(permuted):
        assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32


def test_total_variation_is_the_length_of_all_paths():
    leaves = {
        tuple(key.key for key in keys): np.asarray(leaf, np.float64)
        for keys, leaf in jax.tree.leaves_with_path(PARAMS)
    }
    members = [member for clique in CLIQUES for member in clique.members]
    expected = sum(np.abs(np.diff(leaves[path], axis=axis)).sum() for path, axis in members)
    np.testing.assert_allclose(smoothing.total_variation(PARAMS, SPEC), expected, rtol=1e-12)


@both_shortcuts
@pytest.mark.parametrize("seed", range(3))
def test_smoothing_keeps_the_function_says_which_channel_went_where_and_needs_one_pass(spec, seed):
    params = random_params(spec, seed)
    smoothed, orders = smoothing.smooth(params, spec)
    assert_same_function(spec, params, smoothed)
    before = smoothing.total_variation(params, spec)
    assert smoothing.total_variation(smoothed, spec) < 0.99 * before
    replayed, cliques = params, smoothing.cliques(spec)
    assert list(orders) == [clique.name for clique in cliques]
    for clique in cliques:
        replayed = smoothing.permute(replayed, clique, orders[clique.name])
    chex.assert_trees_all_equal(replayed, smoothed)
    chex.assert_trees_all_equal((smoothed, orders), smoothing.smooth(params, spec))
    again, kept = smoothing.smooth(smoothed, spec)
    chex.assert_trees_all_equal(kept, {clique.name: np.arange(clique.size) for clique in cliques})
    chex.assert_trees_all_equal(again, smoothed)


def scramble(params, spec):
    """(params with the channels of every clique at random, their orders)."""
    rng, orders = np.random.default_rng(1), {}
    for clique in smoothing.cliques(spec):
        orders[clique.name] = rng.permutation(clique.size)
        params = smoothing.permute(params, clique, orders[clique.name])
    return params, orders


def waves(shape, rng):
    """Slow waves along the last two axes, another one for each kernel tap."""
    taps = shape[:-2] if len(shape) == 4 else ()
    found = rng.normal(size=taps + (1,) * (len(shape) - len(taps)))
    for axis in range(len(taps), len(shape)):
        grid = np.linspace(0, 1, shape[axis]).reshape((-1,) + (1,) * (len(shape) - 1 - axis))
        found = found * np.cos(rng.uniform(0, 0.5) + rng.uniform(1, 2) * grid)
    return found.astype(np.float32)


def test_a_scrambled_network_smooths_to_the_same_total_variation():
    found = [smoothing.smooth(params, SPEC)[0] for params in (PARAMS, scramble(PARAMS, SPEC)[0])]
    found, rescued = (smoothing.total_variation(params, SPEC) for params in found)
    assert rescued == pytest.approx(found, rel=1e-9)


def test_a_scrambled_smooth_network_returns_to_its_own_order():
    spec = cifar_resnet(14, num_classes=5, stage_widths=(8, 12, 16), image_size=8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: waves(leaf.shape, rng), random_params(spec))
    scrambled, came_from = scramble(params, spec)
    rescued, orders = smoothing.smooth(scrambled, spec)
    smooth, rough, again = (
        smoothing.total_variation(tree, spec) for tree in (params, scrambled, rescued)
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
    weights = np.moveaxis(kernel, 2, 0).reshape(size, -1)
    target = rows[:, :size] @ weights
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
    kernel = np.random.default_rng(seed + 10).normal(size=(3, 3, 7, 4))
    order = smoothing.importance_order(moments, kernel, ridge=ridge)
    assert order.tolist() == greedy_elimination(moments, kernel, ridge)[::-1]


def test_a_channel_that_others_make_up_for_is_the_least_important():
    moments = random_moments(4, seed=0)
    # Channel 4 is the sum of channels 1 and 2 and a constant.
    basis = np.zeros((6, 5))
    basis[[0, 1, 2, 3, 5], range(5)] = 1
    basis[4, [1, 2, 4]] = 1, 1, 3
    moments = basis @ moments @ basis.T
    kernel = np.ones((3, 3, 5, 2))
    kernel[:, :, 4] = 10.0
    assert smoothing.importance_order(moments, kernel, ridge=1e-9)[-1] in (1, 2, 4)
    kernel[:, :, 3] = 0.0  # nobody reads it
    assert smoothing.importance_order(moments, kernel)[-1] == 3


def test_ordering_by_importance_keeps_the_function_and_moves_only_blocks_with_moments():
    moments = resnet.hidden_moments(SPEC, PARAMS, IMAGES.astype(np.float32), (1, 3, 5))
    moments = {name: np.asarray(values) for name, values in moments.items()}
    ordered, orders = smoothing.by_importance(PARAMS, SPEC, moments)
    assert list(orders) == [f"stage{stage}_block1_hidden" for stage in (1, 2, 3)]
    assert_same_function(SPEC, PARAMS, ordered)
    assert any(order.tolist() != sorted(order) for order in orders.values())
    for block in SPEC.blocks:
        conv1, conv2 = (PARAMS[block.name][name]["kernel"] for name in ("conv1", "conv2"))
        order = np.arange(block.hidden_width)
        if block.name in moments:
            order = smoothing.importance_order(moments[block.name], conv2)
            np.testing.assert_array_equal(orders[f"{block.name}_hidden"], order)
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
        smoothing.shortest_hamiltonian_path(distances)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [[0, 1], [2, 3]]])
def test_permute_refuses_what_is_no_permutation(order):
    with refused(r"order must be a permutation of 0, \.\.\., 3"):
        smoothing.permute(PARAMS, CLIQUES[0], np.array(order))


SHALLOWER, NARROWER = (random_params(morph(SPEC, [3], [width])) for width in (0, 5))
NAN = {**PARAMS, "stem": {**PARAMS["stem"], "bias": np.array([0, np.nan, 0, 0], np.float32)}}


@pytest.mark.parametrize(
    "function, params, words",
    [
        (smoothing.smooth, SHALLOWER, "params must hold stage2_block1/conv1/kernel"),
        (smoothing.total_variation, NARROWER, "Axis 3 of stage2_block1/conv1/kernel .* 6 channels"),
        (smoothing.smooth, NAN, "must be finite, got NaN or infinity"),
    ],
    ids=["another depth", "another width", "not finite"],
)
def test_params_that_do_not_fit_are_refused(function, params, words):
    with refused(words):
        function(params, SPEC)
