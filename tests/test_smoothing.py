import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import resnet, smoothing
from neumeta_jax.architecture import SHORTCUTS, cifar_resnet, morph

NUM_IMAGES = 4


def small_spec(shortcut="projection"):
    return cifar_resnet(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8, shortcut=shortcut)


def random_params(spec, seed=0):
    """Every weight random, biases included."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        fan_in = math.prod(shape[:-1])
        return jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / fan_in), jnp.float32)

    return jax.tree.map(
        leaf, resnet.param_shapes(spec), is_leaf=lambda shape: isinstance(shape, tuple)
    )


def scramble(params, spec, seed=1):
    rng = np.random.default_rng(seed)
    for clique in smoothing.cliques(spec):
        params = smoothing.permute(params, clique, rng.permutation(clique.size))
    return params


def logits(spec, params):
    """Computed in float64 up to the float32 head, so that only a wrong permutation shows."""
    shape = (NUM_IMAGES, spec.image_size, spec.image_size, spec.channels)
    images = np.random.default_rng(7).normal(size=shape)
    with jax.enable_x64(True):
        return np.asarray(resnet.apply(spec, params, jnp.asarray(images, jnp.float64)))


def assert_same_function(spec, params, other):
    np.testing.assert_allclose(logits(spec, params), logits(spec, other), rtol=1e-5, atol=1e-5)


def random_distances(n, seed):
    matrix = np.random.default_rng(seed).random((n, n))
    return matrix + matrix.T


def distances_on_a_line(x):
    return np.abs(x[:, None] - x)


def shortest_length(distances):
    orders = itertools.permutations(range(len(distances)))
    orders = np.array([order for order in orders if order[0] < order[-1]])
    return distances[orders[:, :-1], orders[:, 1:]].sum(axis=1).min()


# Cliques


def test_a_resnet56_has_27_hidden_and_3_stream_cliques():
    found = smoothing.cliques(cifar_resnet(56, num_classes=100))
    hidden = [clique for clique in found if clique.name.endswith("_hidden")]
    streams = [clique for clique in found if clique.name.endswith("_stream")]
    assert (len(hidden), len(streams), len(found)) == (27, 3, 30)
    assert len({clique.name for clique in found}) == 30
    assert [clique.size for clique in streams] == [16, 32, 64]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_every_channel_axis_is_in_exactly_one_clique(shortcut):
    spec = small_spec(shortcut)
    members = [member for clique in smoothing.cliques(spec) for member in clique.members]
    assert len(set(members)) == len(members)

    expected = set()
    shapes = jax.tree_util.tree_leaves_with_path(
        resnet.param_shapes(spec), is_leaf=lambda shape: isinstance(shape, tuple)
    )
    for keys, shape in shapes:
        path = tuple(key.key for key in keys)
        expected |= {(path, axis) for axis in range(len(shape)) if len(shape) < 4 or axis >= 2}
    # Image channels and logits.
    expected -= {(("stem", "kernel"), 2), (("head", "kernel"), 1), (("head", "bias"), 0)}
    if shortcut == "pad":
        hidden = {("conv1", "kernel", 3), ("conv1", "bias", 0), ("conv2", "kernel", 2)}
        expected = {(path, axis) for path, axis in expected if (*path[1:], axis) in hidden}
        assert len(expected) == 3 * len(spec.blocks)
    assert set(members) == expected


def test_skipped_blocks_have_no_clique_and_are_in_no_stream():
    spec = small_spec()
    skipped = morph(spec, (1, 5), (0, 0))
    found = smoothing.cliques(skipped)
    assert len(found) == len(smoothing.cliques(spec)) - 2
    names = {path[0] for clique in found for path, _ in clique.members}
    assert names == set(resnet.param_shapes(skipped))
    params = random_params(skipped)
    assert_same_function(skipped, params, smoothing.smooth(params, skipped)[0])


def test_channel_rows_hold_every_weight_that_touches_a_channel():
    spec = small_spec()
    params = random_params(spec)
    clique = smoothing.cliques(spec)[0]
    rows = smoothing.channel_rows(params, clique)
    assert rows.shape == (4, 9 * 4 + 1 + 9 * 4)
    assert rows.dtype == np.float64
    layers = params["stage1_block0"]
    touching = [
        layers["conv1"]["kernel"][..., 2],
        layers["conv1"]["bias"][2],
        layers["conv2"]["kernel"][:, :, 2],
    ]
    np.testing.assert_array_equal(rows[2], np.concatenate([np.ravel(t) for t in touching]))


# Paths


@pytest.mark.parametrize("n", [0, 1, 2])
def test_tiny_paths_are_the_identity(n):
    order = smoothing.shortest_hamiltonian_path(random_distances(n, seed=0))
    assert order.dtype == np.int64
    assert order.tolist() == list(range(n))


def test_paths_are_nearly_optimal():
    excess = []
    for seed in range(30):
        distances = random_distances(3 + seed % 6, seed)
        order = smoothing.shortest_hamiltonian_path(distances)
        assert sorted(order) == list(range(len(distances)))
        excess.append(smoothing.path_length(distances, order) / shortest_length(distances) - 1)
    assert min(excess) > -1e-12
    assert np.mean(excess) < 0.01


@pytest.mark.parametrize("n", [3, 8, 20, 64])
def test_shuffled_points_on_a_line_are_sorted(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    order = smoothing.shortest_hamiltonian_path(distances_on_a_line(x))
    ascending = np.argsort(x)
    expected = ascending if ascending[0] < ascending[-1] else ascending[::-1]
    np.testing.assert_array_equal(order, expected)


def test_no_reversal_of_a_segment_shortens_a_path():
    distances = random_distances(24, seed=5)
    order = smoothing.shortest_hamiltonian_path(distances)
    length = smoothing.path_length(distances, order)
    for i, j in itertools.combinations(range(25), 2):
        other = np.concatenate([order[:i], order[i:j][::-1], order[j:]])
        assert smoothing.path_length(distances, other) >= length - 1e-9


def test_a_path_starts_at_its_smaller_end():
    for seed in range(10):
        order = smoothing.shortest_hamiltonian_path(random_distances(11, seed))
        assert order[0] < order[-1]


def test_a_path_does_not_depend_on_labels_scale_or_a_constant():
    distances = random_distances(20, seed=3)
    order = smoothing.shortest_hamiltonian_path(distances)
    labels = np.random.default_rng(3).permutation(20)
    relabelled = labels[smoothing.shortest_hamiltonian_path(distances[np.ix_(labels, labels)])]
    assert relabelled.tolist() in (order.tolist(), order[::-1].tolist())
    for same in (4 * distances, distances + 1, distances + np.diag(np.arange(20.0))):
        np.testing.assert_array_equal(smoothing.shortest_hamiltonian_path(same), order)


def test_a_path_is_never_longer_than_the_present_order():
    for seed in range(10):
        distances = random_distances(16, seed)
        best = smoothing.shortest_hamiltonian_path(distances)
        present = np.arange(16)
        shorter = smoothing.path_length(distances, best)
        assert shorter <= smoothing.path_length(distances, present)
        # In an order that is already the best one there is nothing to do.
        again = smoothing.shortest_hamiltonian_path(distances[np.ix_(best, best)])
        np.testing.assert_array_equal(again, present)


def test_equal_distances_keep_the_present_order():
    order = smoothing.shortest_hamiltonian_path(np.ones((9, 9)))
    np.testing.assert_array_equal(order, np.arange(9))


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
    with pytest.raises(ValueError, match=message):
        smoothing.shortest_hamiltonian_path(distances)


# Networks


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_permuting_any_clique_keeps_the_function(shortcut):
    spec = small_spec(shortcut)
    params = random_params(spec)
    rng = np.random.default_rng(2)
    for clique in smoothing.cliques(spec):
        order = np.roll(rng.permutation(clique.size), 1)
        permuted = smoothing.permute(params, clique, order)
        assert_same_function(spec, params, permuted)
        np.testing.assert_array_equal(
            smoothing.channel_rows(permuted, clique),
            smoothing.channel_rows(params, clique)[order],
        )
        back = smoothing.permute(permuted, clique, np.argsort(order))
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_leaving_out_any_member_of_a_clique_changes_the_function():
    spec = small_spec()
    params = random_params(spec)
    expected = logits(spec, params)
    for clique in smoothing.cliques(spec):
        for left_out in range(len(clique.members)):
            members = clique.members[:left_out] + clique.members[left_out + 1 :]
            partial = smoothing.Clique(clique.name, clique.size, members)
            order = np.roll(np.arange(clique.size), 1)
            wrong = logits(spec, smoothing.permute(params, partial, order))
            assert np.abs(wrong - expected).max() > 1e-3, clique.members[left_out]


def test_permute_returns_a_new_tree_and_leaves_the_old_one_alone():
    spec = small_spec()
    params = jax.tree.map(np.asarray, random_params(spec))
    before = jax.tree.map(np.copy, params)
    permuted = smoothing.permute(params, smoothing.cliques(spec)[-1], np.arange(8)[::-1])
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(permuted))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(permuted))
    assert jax.tree.structure(permuted) == jax.tree.structure(params)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_smoothing_keeps_the_function_and_lowers_total_variation(shortcut):
    spec = small_spec(shortcut)
    for seed in range(3):
        params = random_params(spec, seed)
        smoothed, _ = smoothing.smooth(params, spec)
        assert_same_function(spec, params, smoothed)
        before = smoothing.total_variation(params, spec)
        assert smoothing.total_variation(smoothed, spec) < 0.99 * before


def test_total_variation_is_the_length_of_all_paths():
    spec = small_spec()
    params = random_params(spec)
    expected = 0.0
    for clique in smoothing.cliques(spec):
        for path, axis in clique.members:
            tensor = params
            for name in path:
                tensor = tensor[name]
            expected += np.abs(np.diff(np.asarray(tensor, np.float64), axis=axis)).sum()
    np.testing.assert_allclose(smoothing.total_variation(params, spec), expected, rtol=1e-12)


def test_orders_say_which_channel_went_where():
    spec = small_spec()
    params = random_params(spec)
    smoothed, orders = smoothing.smooth(params, spec)
    assert list(orders) == [clique.name for clique in smoothing.cliques(spec)]
    replayed = params
    for clique in smoothing.cliques(spec):
        replayed = smoothing.permute(replayed, clique, orders[clique.name])
    jax.tree.map(np.testing.assert_array_equal, replayed, smoothed)


def test_smoothing_is_deterministic():
    spec = small_spec()
    params = random_params(spec)
    first, second = smoothing.smooth(params, spec), smoothing.smooth(params, spec)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_one_pass_suffices():
    spec = small_spec()
    smoothed, _ = smoothing.smooth(random_params(spec), spec)
    again, orders = smoothing.smooth(smoothed, spec)
    for order in orders.values():
        np.testing.assert_array_equal(order, np.arange(len(order)))
    jax.tree.map(np.testing.assert_array_equal, again, smoothed)


def test_a_scrambled_network_smooths_to_the_same_total_variation():
    spec = small_spec()
    params = random_params(spec)
    smoothed, _ = smoothing.smooth(params, spec)
    rescued, _ = smoothing.smooth(scramble(params, spec), spec)
    np.testing.assert_allclose(
        smoothing.total_variation(rescued, spec),
        smoothing.total_variation(smoothed, spec),
        rtol=1e-9,
    )


def test_a_scrambled_smooth_network_returns_to_its_own_order():
    spec = cifar_resnet(14, num_classes=5, stage_widths=(8, 12, 16), image_size=8)
    rng = np.random.default_rng(0)

    def leaf(shape):
        # Slow waves along the last two axes, another one for each kernel tap.
        taps = shape[:-2] if len(shape) == 4 else ()
        weights = rng.normal(size=taps + (1,) * (len(shape) - len(taps)))
        waves = np.ones(shape)
        for axis in range(len(taps), len(shape)):
            grid = np.linspace(0, 1, shape[axis]).reshape((-1,) + (1,) * (len(shape) - 1 - axis))
            waves = waves * np.cos(rng.uniform(0, 0.5) + rng.uniform(1, 2) * grid)
        return jnp.asarray(weights * waves, jnp.float32)

    params = jax.tree.map(
        leaf, resnet.param_shapes(spec), is_leaf=lambda shape: isinstance(shape, tuple)
    )
    scrambled = scramble(params, spec)
    assert smoothing.total_variation(scrambled, spec) > 2 * smoothing.total_variation(params, spec)
    rescued, _ = smoothing.smooth(scrambled, spec)
    np.testing.assert_allclose(
        smoothing.total_variation(rescued, spec),
        smoothing.total_variation(params, spec),
        rtol=1e-9,
    )
    # The order itself comes back, up to its direction.
    rng = np.random.default_rng(1)
    orders = smoothing.smooth(scrambled, spec)[1]
    for clique in smoothing.cliques(spec):
        came_from = rng.permutation(clique.size)[orders[clique.name]]
        forward = list(range(clique.size))
        assert came_from.tolist() in (forward, forward[::-1])


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
def test_the_importance_order_is_that_of_a_greedy_elimination_by_least_squares(seed):
    moments = random_moments(7, seed)
    kernel = np.random.default_rng(seed + 10).normal(size=(3, 3, 7, 4))
    for ridge in (1e-3, 0.1):
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
    spec = small_spec()
    params = random_params(spec)
    shape = (NUM_IMAGES, spec.image_size, spec.image_size, spec.channels)
    images = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    moments = resnet.hidden_moments(spec, params, images, (1, 3, 5))
    moments = {name: np.asarray(values) for name, values in moments.items()}
    ordered, orders = smoothing.by_importance(params, spec, moments)
    assert list(orders) == [f"stage{stage}_block1_hidden" for stage in (1, 2, 3)]
    assert_same_function(spec, params, ordered)
    moved = False
    for block in spec.blocks:
        kernel = params[block.name]["conv2"]["kernel"]
        order = np.arange(block.hidden_width)
        if block.name in moments:
            order = smoothing.importance_order(moments[block.name], kernel)
            np.testing.assert_array_equal(orders[f"{block.name}_hidden"], order)
            moved |= order.tolist() != sorted(order)
        np.testing.assert_array_equal(
            ordered[block.name]["conv2"]["kernel"], np.asarray(kernel)[:, :, order]
        )
        np.testing.assert_array_equal(
            ordered[block.name]["conv1"]["kernel"],
            np.asarray(params[block.name]["conv1"]["kernel"])[..., order],
        )
    assert moved


# Refusals


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [[0, 1], [2, 3]]])
def test_permute_refuses_what_is_no_permutation(order):
    spec = small_spec()
    clique = smoothing.cliques(spec)[0]
    with pytest.raises(ValueError, match=r"order must be a permutation of 0, \.\.\., 3"):
        smoothing.permute(random_params(spec), clique, np.array(order))


def test_params_of_another_depth_are_refused():
    spec = small_spec()
    params = random_params(spec)
    del params["stage2_block1"]
    with pytest.raises(ValueError, match="params must hold stage2_block1/conv1/kernel"):
        smoothing.smooth(params, spec)


def test_params_of_another_width_are_refused():
    spec = small_spec()
    wider = morph(spec, (3,), (7,))
    with pytest.raises(ValueError, match=r"Axis 3 of stage2_block1/conv1/kernel .* 7 channels"):
        smoothing.total_variation(random_params(spec), wider)


def test_weights_that_are_not_finite_are_refused():
    spec = small_spec()
    params = random_params(spec)
    params["stem"]["bias"] = params["stem"]["bias"].at[1].set(jnp.nan)
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
        smoothing.smooth(params, spec)
