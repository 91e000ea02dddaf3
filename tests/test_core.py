"""Groups of channels, and what can be done with them, in networks of every kind."""

import collections
import functools
import gc
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import own_networks
import pytest
from flax import nnx
from jax.extend.core import Primitive
from own_networks import CASES, IMAGES, PLAIN, REBUILT, TOKENS, VECTORS, draw

from neumeta_jax import elastic
from neumeta_jax.elastic import control_flow, rules

every_network = pytest.mark.parametrize("name", CASES)
COMPILED = collections.Counter()  # how often the masked network was
TWO_LAYERS = draw({"a": (16, 8), "b": (8, 3)})
# Sizes of the elastic groups, in the order of the network.
ELASTIC = {
    "glu": (12,),
    "densenet": (8, 8, 8),
    "stacked": (12, 20),
    "recurrent": (10,),
    "branching": (12, 8),
    "language": (12, 20),
    "standardised": (8,),
    "mlp": (32, 24),
    "vgg": (8, 8, 12, 20),
    "mobilenet": (8, 32, 12),
    "vit": (3, 4, 24, 3, 4, 24),
    "fused": (3,),
    "llama": (2, 2, 4, 24),
    "lstm": (12,),
    "shuffle": (3, 4, 4, 6),
    "unet": (6, 8, 7),
    "grouped": (4, 4, 8),
    "nnx": (8,),
    "equinox": (8, 3, 4, 16),
    "rope": (2, 8),
    "padded": (4, 4, 8, 2, 2, 12, 2, 2),
    "haiku_mobilenet": (32, 8, 12),
    "haiku_rnn": (12, 8),
    "haiku_transformer": (12, 2, 4, 20),
    "jraph": (12, 10, 8, 14, 12),
    "stax": (6, 8),
}


@functools.cache
def traced(name):
    """The network, its family, the names of its elastic groups."""
    case = CASES[name]()
    family = elastic.trace(case.apply, case.params, case.x, check=False)
    return case, family, family.groups.elastic(*case.allowed)


def differentiate(function):
    """The outputs of `function(params, ...)`, and the gradients of a sum of their sines."""

    def loss(*arguments):
        out = function(*arguments)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    def run(*arguments):
        (_, out), slopes = jax.value_and_grad(loss, has_aux=True)(*arguments)
        return out, slopes

    return jax.jit(run)


@functools.cache
def masked(name):
    """A compiled function of params and widths, which may be any."""
    case, family, _ = traced(name)

    def run(params, widths):
        COMPILED[name] += 1
        return case.apply(elastic.mask_params(family.groups, params, widths), case.x)

    return differentiate(run)


def sliced(name, widths):
    """The same of the dense network of these `widths`."""
    case, family, _ = traced(name)

    def run(params):
        return elastic.apply_at(
            family, elastic.slice_params(family.groups, params, widths), case.x, widths
        )

    return differentiate(run)(case.params)


def some_widths(name, least=1, seed=0):
    _, family, names = traced(name)
    rng = np.random.default_rng(seed)
    return {n: int(rng.integers(least, family.groups[n].size)) for n in names}


def full_widths(name):
    _, family, names = traced(name)
    return {n: family.groups[n].size for n in names}


def distance(a, b):
    """The largest difference of any leaf, as a part of the largest number in it."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    arrays = ((np.asarray(x), np.asarray(y)) for x, y in pairs)
    return max(np.max(np.abs(x - y)) / (1e-3 + np.max(np.abs(x))) for x, y in arrays)


@every_network
def test_the_groups_of_a_network_are_found(name):
    _, family, names = traced(name)
    assert tuple(family.groups[n].size for n in names) == ELASTIC[name]


@every_network
def test_a_masked_network_equals_the_smaller_one_and_so_do_their_gradients(name):
    widths = some_widths(name)
    whole, _ = masked(name)(traced(name)[0].params, full_widths(name))
    out, slopes = masked(name)(traced(name)[0].params, widths)
    expected, expected_slopes = sliced(name, widths)
    assert distance(expected, out) < 1e-5
    assert distance(expected_slopes, slopes) < 1e-3
    assert distance(whole, out) > 1e-3


@every_network
def test_permuted_channels_compute_the_same(name):
    case, family, names = traced(name)
    orders = {n: np.roll(np.arange(family.groups[n].size), 1) for n in names}
    permuted = jax.jit(lambda p: elastic.permute(family.groups, p, orders))(case.params)
    out, _ = masked(name)(permuted, full_widths(name))
    expected, _ = masked(name)(case.params, full_widths(name))
    assert distance(expected, out) < 1e-5
    assert distance(case.params, permuted) > 0.1


@every_network
def test_one_compilation_serves_all_widths(name):
    case, _, _ = traced(name)
    for seed in range(2):
        masked(name)(case.params, some_widths(name, seed=seed))
    assert COMPILED[name] == 1


@every_network
def test_groups_are_data_and_tracing_again_finds_the_same(name):
    case, family, _ = traced(name)
    again = elastic.trace(case.apply, case.params, case.x, check=False).groups
    revived = elastic.Groups.from_json(family.groups.to_json(), case.params)
    assert revived == again == family.groups
    assert hash(revived) == hash(again) == hash(family.groups)
    assert revived.to_json() == family.groups.to_json()


@every_network
def test_counts_of_a_smaller_network_are_those_of_its_arrays(name):
    case, family, _ = traced(name)
    widths = some_widths(name)
    small = jax.eval_shape(lambda p: elastic.slice_params(family.groups, p, widths), case.params)
    assert elastic.num_params(family.groups, widths) == sum(x.size for x in jax.tree.leaves(small))
    assert elastic.num_params(family.groups, {}) == sum(
        x.size for x in jax.tree.leaves(case.params)
    )
    assert 0 < elastic.num_macs(family, widths) < elastic.num_macs(family, {})


@pytest.mark.parametrize("name", REBUILT)
def test_a_network_runs_at_widths_at_which_it_was_not_traced_as_if_it_was_built_there(name):
    _, family, _ = traced(name)
    widths, build = REBUILT[name]
    other = build()
    assert jax.tree.map(jnp.shape, other.params) != jax.tree.map(jnp.shape, traced(name)[0].params)
    assert elastic.num_params(family.groups, widths) == sum(
        leaf.size for leaf in jax.tree.leaves(other.params)
    )
    rebuilt = elastic.trace(other.apply, other.params, other.x, check=False)
    assert elastic.num_macs(family, widths) == elastic.num_macs(rebuilt, {})
    whole_batches = name == "stax"  # its norms sum over the batch
    more = other.x if whole_batches else np.concatenate([other.x, other.x])
    ours = jax.jit(lambda p, x: elastic.apply_at(family, p, x, widths))(other.params, more)
    assert distance(jax.jit(other.apply)(other.params, more), ours) < 1e-5


@pytest.mark.parametrize("name", PLAIN)
def test_a_function_of_arrays_alone_runs_by_itself_on_sliced_parameters(name):
    case, family, _ = traced(name)
    widths = some_widths(name, seed=2)
    small = elastic.slice_params(family.groups, case.params, widths)
    ours = jax.jit(lambda p: elastic.apply_at(family, p, case.x, widths))(small)
    assert distance(jax.jit(case.apply)(small, case.x), ours) < 1e-5
    assert elastic.num_macs(family, widths) == elastic.num_macs(
        elastic.trace(case.apply, small, case.x, check=False), {}
    )


def test_counts_of_convolutions_are_those_of_the_textbook():
    _, family, _ = traced("vgg")
    a, b, c, d = widths = 5, 12, 9, 33
    at = dict(zip(family.groups.elastic(), widths, strict=True))
    products = 9 * (3 * a * 64 + a * b * 64 + b * c * 16) + 16 * c * d + 10 * d
    assert elastic.num_macs(family, at) == products
    norms_and_biases = 4 * (a + b + c) + d + 10
    kernels = 9 * (3 * a + a * b + b * c) + 16 * c * d + 10 * d
    assert elastic.num_params(family.groups, at) == kernels + norms_and_biases


def test_counts_of_scanned_layers_are_those_of_each_layer():
    _, family, _ = traced("stacked")
    counted = elastic.num_macs(family, {"in": 7, "layers/up": 9})
    assert counted == 16 * 7 + 3 * 2 * 7 * 9 + 7 * 4


def test_counts_of_attention_are_those_of_its_products_too():
    _, family, _ = traced("fused")
    heads, tokens = 5, 5
    projections = tokens * 16 * (3 * 4 * heads + 4 * heads + 3)
    assert elastic.num_macs(family, {"qkv": heads}) == projections + 2 * heads * tokens**2 * 4


def test_another_process_finds_the_same_groups():
    """Sets of names are in another order there."""
    names = ["vit", "padded", "haiku_rnn"]
    found = f"(t.traced(name)[1].groups.to_json() for name in {names})"
    code = f"import test_core as t; print(*{found}, sep=chr(10))"
    seed = str(1 + int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")))
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).parent,
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.splitlines() == [traced(name)[1].groups.to_json() for name in names]


def test_widths_may_be_mapped_over():
    case, family, names = traced("glu")
    widths = {names[0]: jnp.arange(1, 13)}
    many = jax.jit(jax.vmap(lambda w: elastic.mask_params(family.groups, case.params, w)))(widths)
    for n in (1, 7, 12):
        expected = elastic.mask_params(family.groups, case.params, {names[0]: n})
        assert all(np.array_equal(many[path][n - 1], leaf) for path, leaf in expected.items())
        assert np.count_nonzero(np.any(expected["down"], 1)) == n


def test_a_branch_of_width_0_is_skipped():
    case, family, _ = traced("vit")
    widths = {"up1": 0, "attention1/value": 0}
    shorter = jax.jit(own_networks.ViT(depth=1).apply)(case.params, case.x)
    skipped = elastic.mask_params(family.groups, case.params, widths)
    assert distance(shorter, jax.jit(case.apply)(skipped, case.x)) < 1e-5
    assert distance(shorter, jax.jit(case.apply)(case.params, case.x)) > 1e-3


@pytest.mark.parametrize("name", ["vit", "stacked", "mobilenet", "padded", "stax"])
def test_width_0_means_the_same_to_a_masked_and_a_sliced_network(name):
    case, family, names = traced(name)
    widths = {n: 0 for n in names if family.groups[n].lowest == 0}
    assert widths
    out, slopes = masked(name)(case.params, full_widths(name) | widths)
    small = elastic.slice_params(family.groups, case.params, widths)
    expected = jax.jit(lambda p: elastic.apply_at(family, p, case.x, widths))(small)
    assert distance(expected, out) < 1e-5
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slopes))


BRANCHES = {  # the smallest width of h, which the stream x is joined with
    "a bias": (0, lambda p, x, h: x + 2 * (h @ p["d"] + p["c"])),
    "a gate": (0, lambda p, x, h: x + (h * jax.nn.sigmoid(h @ p["g"] @ p["g"].T)) @ p["d"]),
    "computed again": (0, lambda p, x, h: x + jax.checkpoint(lambda h: h @ p["d"] + p["c"])(h)),
    "a scale divided by": (0, lambda p, x, h: x + h @ p["d"] / p["c"]),
    "half of what is read": (1, lambda p, x, h: x + jnp.concatenate([h, x], 1) @ p["both"]),
    "a constant after": (1, lambda p, x, h: x + (h @ p["d"] + p["c"] + 1)),
    "a bias that is not 0": (1, lambda p, x, h: x + (h @ p["d"] + jnp.exp(p["c"]))),
    "a bias that others use": (1, lambda p, x, h: jnp.tanh(x + (h @ p["d"] + p["c"])) * p["c"]),
    "another reader": (1, lambda p, x, h: (x + h @ p["d"]) * jnp.exp(h @ p["d"] + p["c"])),
    "a branch seen elsewhere": (1, lambda p, x, h: (lambda y: (x + y) * jnp.exp(y))(h @ p["d"])),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_width_0_is_for_branches_that_are_the_identity_then(branch):
    lowest, join = BRANCHES[branch]

    def apply(p, x):
        return join(p, x, jnp.tanh(x @ p["a"])) @ p["out"]

    shapes = {"a": (16, 8), "both": (24, 16), "d": (8, 16), "c": (16,), "g": (8, 6)}
    params = draw(shapes | {"out": (16, 3)})
    groups = elastic.trace(apply, params, VECTORS, check=False).groups
    assert ("a" in groups.elastic(), groups["a"].lowest) == (True, lowest)
    if lowest == 0:
        out = apply(elastic.mask_params(groups, params, {"a": 0}), VECTORS)
        assert distance(VECTORS @ params["out"], out) < 1e-5


def check_masks(apply, params, x):
    """The family, after a check that masked and sliced networks of half the widths agree."""
    family = elastic.trace(apply, params, x, check=False)
    widths = {name: family.groups[name].size // 2 for name in family.groups.elastic("stream")}
    assert widths

    @jax.jit
    def run(params):
        masked = apply(elastic.mask_params(family.groups, params, widths), x)
        small = elastic.slice_params(family.groups, params, widths)
        return masked, elastic.apply_at(family, small, x, widths)

    assert distance(*run(params)) < 1e-5
    return family


PAIRS = (1, 2, 1), (1, 2, 1), "VALID"


def max_pool(h):
    return jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, *PAIRS)


def add_pairs(a, b):
    return a[0] + b[0], a[1] + b[1]


ON_TOKENS = {  # what is done to h, float[batch, 5, 8], before its channels are read
    "real": lambda h: jnp.real(jnp.exp(1j * h)),
    "dynamic_slice": lambda h: jax.lax.dynamic_slice_in_dim(h, jnp.argmax(h[0, :, 0] * 0), 2, 1),
    "scatter": lambda h: h.at[:, 0].set(0),
    "segment_sum": lambda h: jax.ops.segment_sum(h[0], jnp.array([0, 1, 1, 0, 2]), 3),
    "sort": lambda h: jnp.sort(h, 1),
    "shift": lambda h: jnp.roll(h, 1, 1),
    "window": lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 1), (1, 1, 1), "SAME"),
    "while": lambda h: jax.lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 2), (0, h)
    )[1],
    "stack": lambda h: jnp.stack([h, -h], 1).max(1),
    "tile": lambda h: jnp.tile(h, (1, 2, 1)),
    "unstack": lambda h: sum(jnp.sin(part) for part in jnp.unstack(h, axis=1)),
    "fft": lambda h: jnp.abs(jnp.fft.rfft(h, axis=1)),
    "device_put": lambda h: jax.device_put(h, jax.devices()[0]),
    "barrier": lambda h: jax.lax.optimization_barrier((h, 2 * h))[1],
    "composite": lambda h: jax.lax.composite(lambda h: 2 * h, "library.double")(h),
    "reduce": lambda h: jax.lax.reduce((h, -h), (0.0, 0.0), add_pairs, (1,))[1],
    "reduce_window": lambda h: jax.lax.reduce_window((h, -h), (0.0, 0.0), add_pairs, *PAIRS)[1],
    "unpool": lambda h: jax.vjp(max_pool, h)[1](jnp.sin(max_pool(h)))[0],
    "pool_tangent": lambda h: jax.jvp(max_pool, (h,), (jnp.sin(h),))[1],
    "bits": lambda h: h / (1 + jax.lax.rng_bit_generator(jnp.ones(4, "uint32"), (5, 1))[1]),
}


@pytest.mark.parametrize("primitive", ON_TOKENS)
def test_operations_on_other_axes_leave_channels_alone(primitive):
    family = check_masks(
        lambda p, x: ON_TOKENS[primitive](jnp.tanh(x @ p["a"])) @ p["b"], TWO_LAYERS, TOKENS
    )
    assert family.groups.elastic() == ("a",)


def sorted_tokens(p, x, best):
    order, counts = jnp.argsort(best), jnp.bincount(best, length=4)
    h = jax.nn.gelu(jax.lax.ragged_dot(jnp.asarray(x)[order], p["up"], counts))
    return jax.lax.ragged_dot(h, p["down"], counts)[jnp.argsort(order)]


def looked_up(p, x, best):
    h = jax.nn.gelu(jnp.einsum("bi,bij->bj", x, p["up"][best]))
    return jnp.einsum("bj,bjk->bk", h, p["down"][best])


@pytest.mark.parametrize("experts", [sorted_tokens, looked_up])
def test_the_hidden_channels_of_experts_are_elastic(experts):
    family = check_masks(
        lambda p, x: experts(p, x, jnp.argmax(x @ p["route"], -1)),
        draw({"route": (16, 4), "up": (4, 16, 8), "down": (4, 8, 3)}),
        VECTORS,
    )
    assert family.groups.elastic() == ("up",)


def test_an_associative_scan_over_tokens():
    def apply(p, x):
        u = x @ p["in"]
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), u.shape)
        pairs = jax.lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, u), axis=1
        )
        return pairs[1] @ p["out"]

    check_masks(apply, draw({"in": (16, 8), "decay": (8,), "out": (8, 3)}), TOKENS)


def test_channels_that_a_transposed_convolution_reads():
    def apply(p, x):
        h = jnp.exp(x @ p["a"])
        h = jax.lax.conv_transpose(h, p["b"], (2, 2), "SAME", transpose_kernel=True)
        return h.mean((1, 2))

    family = check_masks(apply, draw({"a": (3, 8), "b": (3, 3, 6, 8)}), IMAGES)
    assert family.groups.elastic() == ("a",)


def test_a_convolution_over_the_batch_is_refused_with_its_line():
    def apply(p, x):
        return x * jax.lax.conv_general_dilated(p["a"], p["b"], (1,), "SAME", batch_group_count=2)

    with pytest.raises(elastic.UnknownPrimitive, match=r"conv_general_dilated.*test_core\.py:\d+"):
        elastic.trace(apply, draw({"a": (2, 8, 5), "b": (6, 8, 3)}), VECTORS[:, :5, None, None])


UNSOUND = {  # finite at all widths, but not where a parameter is 0
    "weight norm": lambda p, x: jnp.tanh(x @ (p["a"] / jnp.linalg.norm(p["a"], axis=0))) @ p["b"],
    "a logarithm": lambda p, x: jnp.log(jnp.abs(x @ p["a"])) @ p["b"],
}


@pytest.mark.parametrize("case", UNSOUND)
def test_groups_whose_masked_network_differs_are_found_by_numbers(case):
    groups = elastic.trace(UNSOUND[case], TWO_LAYERS, VECTORS).groups
    assert groups["a"].flags == ("unsound",)
    assert not groups.elastic()
    assert elastic.trace(UNSOUND[case], TWO_LAYERS, VECTORS, check=False).groups.elastic() == ("a",)


SENSITIVE = {  # to a parameter of 0
    "a divisor": lambda h, c: h / c,
    "a reciprocal": lambda h, c: h * c**-1,
    "a logarithm": lambda h, c: h * jnp.log(c),
    "a root": lambda h, c: h * jax.lax.rsqrt(c),
}


@pytest.mark.parametrize("case", SENSITIVE)
def test_a_mask_leaves_what_must_not_be_0_as_it_is(case):
    params = TWO_LAYERS | {"c": jnp.linspace(0.5, 1, 8)}
    family = check_masks(
        lambda p, x: jnp.tanh(SENSITIVE[case](x @ p["a"], p["c"])) @ p["b"], params, VECTORS
    )
    assert family.groups.frozen == ("c",)
    assert np.array_equal(elastic.mask_params(family.groups, params, {"a": 3})["c"], params["c"])


# Finite for a channel of zeros, with a slope that is not.
STEEP = {
    "a root": lambda h: jnp.sqrt(jnp.abs(h)),
    "a norm of tokens": lambda h: h / (1e-6 + jnp.linalg.norm(h, axis=1, keepdims=True)),
}


@pytest.mark.parametrize("steep", STEEP)
def test_gradients_of_masked_networks_are_finite_or_their_groups_are_not_elastic(steep):
    def apply(p, x):
        return STEEP[steep](jnp.tanh(x @ p["a"]) @ p["h"]) @ p["b"]

    params = draw({"a": (16, 8), "h": (8, 6), "b": (6, 3)})
    groups = elastic.trace(apply, params, TOKENS).groups
    widths = {name: groups[name].size // 2 for name in groups.elastic()}
    masked = differentiate(lambda p: apply(elastic.mask_params(groups, p, widths), TOKENS))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(masked(params)))


def test_groups_without_a_structure_differ_from_those_with_one():
    groups = traced("haiku_rnn")[1].groups
    assert elastic.Groups.from_json(groups.to_json()) != groups


@jax.custom_vjp
def rounded(h):
    return jnp.round(4 * h) / 4


rounded.defvjp(lambda h: (rounded(h), None), lambda _, slopes: (slopes,))


@pytest.mark.parametrize("rest", [rounded, ON_TOKENS["while"]], ids=["own rule", "no gradient"])
def test_unusual_gradients_and_numbers_among_the_parameters_pass_the_check(rest):
    params = TWO_LAYERS | {"scale": 2.0}
    groups = elastic.trace(
        lambda p, x: p["scale"] * rest(x @ p["a"]) @ p["b"], params, VECTORS
    ).groups
    assert groups.elastic() == ("a",)


UNSILENCED = {  # weights that are 0 where all parameters are, but not in a masked row
    "added to all rows": lambda p: p["m"] + p["s"],
    "added by one row": lambda p: p["m"] + p["s"][None],
    "scaled": lambda p: p["s"] * jnp.exp(p["m"]),
    "of rank 1": lambda p: jnp.exp(p["u"])[:, None] * p["s"],
    "factored": lambda p: jnp.exp(p["m"]) @ p["n"],
}


@pytest.mark.parametrize("weight", UNSILENCED)
def test_weights_that_are_not_0_in_a_masked_row_keep_the_channels(weight):
    params = draw({"a": (16, 8), "m": (8, 3), "s": (3,), "u": (8,), "n": (3, 3)})
    family = elastic.trace(
        lambda p, x: jnp.exp(x @ p["a"]) @ UNSILENCED[weight](p), params, VECTORS, check=False
    )
    assert "reduced" in family.groups["a"].flags


def normalised(h):
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True)


def layer_norm(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)


RIGID = {  # what is done with h, 8 channels after a product, and the flag that tells
    "a sum of constants": ("reduced", lambda h, b: jax.nn.sigmoid(h) @ jnp.ones((8, 1))),
    "positive weights": ("reduced", lambda h, b: jax.nn.sigmoid(h) @ jnp.exp(b)),
    "centred weights": ("reduced", lambda h, b: jnp.exp(h) @ (b - b.mean(0))),
    "weights in a scan": (
        "reduced",
        lambda h, b: jnp.exp(h) @ jax.lax.scan(lambda w, _: (w + 1, None), b, None, 2)[0],
    ),
    "a norm": ("reduced", lambda h, b: normalised(h) @ b),
    "layer norm": ("reduced", lambda h, b: layer_norm(h) @ b),
    "softmax": ("reduced", lambda h, b: jax.nn.softmax(h) @ b),
    "a maximum": ("reduced", lambda h, b: h.max(-1)),
    "a product": ("reduced", lambda h, b: jnp.prod(h, -1)),
    "attention": ("paired", lambda h, b: jnp.einsum("bc,dc->bd", h, h) @ h @ b),
    "the output": ("output", lambda h, b: (h, h @ b)),
    "a constant": ("constant", lambda h, b: (h * np.linspace(1, 2, 8, dtype="f")) @ b),
    "dropout": ("random", lambda h, b: jax.random.normal(own_networks.KEY, h.shape) * h @ b),
    "positions": ("ordered", lambda h, b: h * jnp.arange(8.0) @ b),
    "a cumulative sum": ("ordered", lambda h, b: jnp.cumsum(h, -1) @ b),
    "sorting": ("ordered", lambda h, b: jnp.sort(h, -1) @ b),
    "reversing": ("ordered", lambda h, b: jnp.flip(h, -1) @ b),
    "indexing": ("indexed", lambda h, b: h[:, jnp.argsort(b[:, 0])] @ b),
}


@pytest.mark.parametrize("case", RIGID)
def test_channels_that_a_mask_cannot_remove_are_not_elastic(case):
    flag, rest = RIGID[case]
    groups = elastic.trace(
        lambda p, x: rest(x @ p["a"], p["b"]), TWO_LAYERS, VECTORS, check=False
    ).groups
    assert flag in groups["a"].flags
    assert "a" not in groups.elastic()


def test_a_reader_sees_the_second_moments_of_its_input_and_a_constant():
    case, family, _ = traced("glu")
    seen = jax.jit(lambda p: elastic.moments(family, p, case.x, ["up"]))(case.params)
    value, gate = jnp.split(case.x @ case.params["up"] + case.params["bias"], 2, -1)
    h = jnp.concatenate([value * jax.nn.sigmoid(gate), jnp.ones((len(case.x), 1))], -1)
    assert list(seen) == ["down"]
    assert distance(h.T @ h / len(h), seen["down"]) < 1e-5


@pytest.mark.parametrize("name", ["vgg", "mobilenet", "unet", "densenet", "haiku_mobilenet"])
def test_doubled_channels_have_equal_moments(name):
    case, family, names = traced(name)
    half = {n: (family.groups[n].size + 1) // 2 for n in names}
    copies = {n: np.arange(family.groups[n].size) % half[n] for n in names}

    @jax.jit
    def run(params):
        doubled = elastic.select(family.groups, params, copies)
        return elastic.moments(family, doubled, case.x, names)

    seen, checked = run(case.params), 0
    for reader in family.groups.readers:
        axis = family.groups.axes[reader.path][reader.reads[0]]
        if reader.path in seen and len(reader.reads) == 1 and axis.kind in ("group", "concat"):
            moments = np.asarray(seen[reader.path])
            again = np.append(axis.channels(copies), -1)  # and the constant
            assert distance(moments, moments[np.ix_(again, again)]) < 1e-5
            assert distance(moments, np.roll(moments, 1, 0)) > 1e-3
            assert abs(moments[-1, -1] - 1) < 1e-6
            checked += 1
    assert checked >= 2


def test_every_name_of_a_primitive_is_spelled_as_in_jax():
    named = {*rules.RULES, *rules.INLINED, *control_flow.BODIES, *rules.IGNORED, *rules.ZERO_IF_ALL}
    known = {each.name for each in gc.get_objects() if isinstance(each, Primitive)}
    assert named - known <= {"closed_call", "log2", "one_minus_square", "polynomial"}  # or later
    assert {*rules.PRODUCTS, *rules.MOVES, *rules.LINEAR, *rules.SIGNED, *rules.COMPARED} <= named


def test_an_unknown_primitive_on_channels_is_named_with_its_line():
    def factorise(p, x):
        return jax.lax.linalg.lu(x @ p["a"])[0] @ p["b"]

    line = factorise.__code__.co_firstlineno + 1
    with pytest.raises(elastic.UnknownPrimitive, match=rf"lu .*test_core\.py:{line}.*8 channels"):
        elastic.trace(factorise, TWO_LAYERS, VECTORS)


@functools.cache
def vit():
    case, family, _ = traced("vit")
    return types.SimpleNamespace(**case._asdict(), family=family, groups=family.groups)


def foreign_params():
    return traced("mlp")[0].params


OUTSIDE = nnx.Variable(jnp.zeros(3))
REFUSED = {  # a call that cannot be right, and the essential words of the answer
    "a batch of 1": ("batch axis of 2", lambda v: elastic.trace(v.apply, v.params, v.x[:1])),
    "a function that asks for values": (
        "traceable",
        lambda v: elastic.trace(lambda p, x: x if x.sum() > 0 else -x, v.params, v.x),
    ),
    "a function that changes a variable outside": (
        "traceable",
        lambda v: elastic.trace(lambda p, x: setattr(OUTSIDE, "value", x) or x, v.params, v.x),
    ),
    "two parameters of one path": (
        "a/b twice",
        lambda v: elastic.trace(lambda p, x: x, {"a": {"b": 1.0}, "a/b": 1.0}, v.x),
    ),
    "another batch where the network holds one": (
        "each of the 3 of the example, got 2",
        lambda v: elastic.apply_at(
            elastic.trace(lambda p, x: x @ p["a"] + np.eye(3, 8), TWO_LAYERS, VECTORS),
            *(TWO_LAYERS, VECTORS[:2], {}),
        ),
    ),
    "an unknown group": (
        "up9.*up0",
        lambda v: elastic.mask_params(v.groups, v.params, {"up9": 3}),
    ),
    "an unknown group to run": (
        "up9",
        lambda v: elastic.apply_at(v.family, v.params, v.x, {"up9": 3}),
    ),
    "a mask of more": (
        "from [01] to 24",
        lambda v: elastic.mask_params(v.groups, v.params, {"up0": 25}),
    ),
    "a slice of more": (
        "from [01] to 24",
        lambda v: elastic.slice_params(v.groups, v.params, {"up0": 25}),
    ),
    "less than nothing": (
        "from [01] to 24",
        lambda v: elastic.slice_params(v.groups, v.params, {"up0": -1}),
    ),
    "a rigid group": (
        "embed is reduced.* 12 ",
        lambda v: elastic.apply_at(v.family, v.params, v.x, {"embed": 8}),
    ),
    "parameters of another width": (
        r"(up|down)0/\w+ must have the shape .*8.*24",
        lambda v: elastic.apply_at(v.family, v.params, v.x, {"up0": 8}),
    ),
    "another image": (
        "input must have the shape",
        lambda v: elastic.apply_at(v.family, v.params, v.x[:, :4], {}),
    ),
    "no permutation": (
        "permutation of 0, ..., 23",
        lambda v: elastic.permute(v.groups, v.params, {"up0": np.zeros(24, int)}),
    ),
    "a channel that is not there": (
        "channels of up0 are 0 to 23, got",
        lambda v: elastic.select(v.groups, v.params, {"up0": [24]}),
    ),
    "another tree to mask": (
        "same tree",
        lambda v: elastic.mask_params(v.groups, foreign_params(), {"up0": 8}),
    ),
    "another tree to slice": (
        "same tree",
        lambda v: elastic.slice_params(v.groups, foreign_params(), {"up0": 8}),
    ),
    "another tree to run": (
        "same tree",
        lambda v: elastic.apply_at(v.family, foreign_params(), v.x, {}),
    ),
    "groups of another network": (
        "another network",
        lambda v: elastic.Groups.from_json(traced("mlp")[1].groups.to_json(), v.params),
    ),
    "no groups at all": ("that to_json writes", lambda v: elastic.Groups.from_json('{"a": 1}')),
    "a branch that is no branch": (
        "from 1 to 7",
        lambda v: elastic.Groups.check(traced("unet")[1].groups, {"up": 0}),
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_sentence(mistake):
    words, call = REFUSED[mistake]
    with pytest.raises(ValueError, match=words) as refusal:
        call(vit())
    assert re.fullmatch(r"[^\n]+\.", str(refusal.value))
