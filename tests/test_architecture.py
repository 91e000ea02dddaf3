"""The shapes of networks: parameters and multiply-adds against the papers and against JAX."""

import json
import math
from functools import partial

import jax
import numpy as np
import pytest
from networks import random_params, random_pixels, refused

from neumeta_jax.elastic.widths import widths_at
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import (
    SHORTCUTS,
    ResNetSpec,
    generated_blocks,
    morph,
    resnet_spec,
)

RESNET14 = resnet_spec(14, num_classes=5)
RESNET56 = resnet_spec(56, num_classes=100)


def random_spec(seed):
    """Any network there is: blocks of all widths, some skipped, odd and even image sizes."""
    rng = np.random.default_rng(seed)
    stage_widths = tuple(int(w) for w in np.sort(rng.integers(1, 9, 3)))
    blocks_per_stage = int(rng.integers(1, 4))
    spec = ResNetSpec(
        stage_widths=stage_widths,
        hidden_widths=(1,) * 3 * blocks_per_stage,
        num_classes=int(rng.integers(1, 7)),
        image_size=int(rng.integers(4, 14)),
        channels=int(rng.integers(1, 4)),
        shortcut=SHORTCUTS[rng.integers(2)],
    )
    widths = [rng.integers(0 if block.skippable else 1, 8) for block in spec.blocks]
    return morph(spec, range(len(widths)), widths)


def count_macs(jaxpr):
    """Multiply-adds of all convolutions and matrix products, including those of inner calls."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            height, width, in_channels, _ = eqn.invars[1].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * height * width * in_channels
        elif eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            lengths = [eqn.invars[0].aval.shape[axis] for axis in contracted]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(lengths)
        for inner in eqn.params.values():
            inner = getattr(inner, "jaxpr", inner)
            total += count_macs(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    "gamma, thousand_params, million_macs",
    [(0, 859, 125.8), (0.25, 684, 98.6), (0.5, 509, 71.5), (0.75, 334, 44.4)],
)
def test_compressed_networks_have_the_totals_of_the_papers(gamma, thousand_params, million_macs):
    blocks = generated_blocks(RESNET56, "inner")
    full = [RESNET56.hidden_widths[n] for n in blocks]
    small = morph(RESNET56, blocks, widths_at(full, 1 - gamma))
    assert round(small.num_params / 1000) == thousand_params
    assert round(small.num_macs / 1e6, 1) == million_macs


@pytest.mark.parametrize("seed", range(30))
def test_a_spec_counts_its_parameters_and_multiply_adds_and_survives_json(seed):
    spec = random_spec(seed)
    params, images = random_params(spec), random_pixels(spec, 1).astype("float32")
    assert spec.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))
    jaxpr = jax.make_jaxpr(cifar_resnet.apply, static_argnums=0)(spec, params, images)
    assert spec.num_macs == count_macs(jaxpr.jaxpr)
    restored = ResNetSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert restored == spec and hash(restored) == hash(spec)


def test_the_inner_blocks_of_a_resnet56_are_23_of_27():
    inner = generated_blocks(RESNET56)
    blocks = [(RESNET56.blocks[n].stage, RESNET56.blocks[n].index) for n in inner]
    last = {1: 8, 2: 8, 3: 7}
    assert blocks == [(stage, index) for stage in last for index in range(1, last[stage] + 1)]
    assert len(blocks) == 23
    assert generated_blocks(RESNET56, "all") == tuple(range(27))
    not_first = generated_blocks(RESNET56, "not_first")
    assert not_first == (*inner, 26)
    assert all(RESNET56.blocks[n].skippable for n in not_first)


def test_widths_are_rounded_half_up_and_at_least_one():
    wanted = {0.5: (2, 3, 4), 0.01: (1, 1, 1), 1.5: (5, 8, 12), 1: (3, 5, 8)}
    assert {ratio: widths_at((3, 5, 8), ratio) for ratio in wanted} == wanted


@pytest.mark.parametrize(
    "change, given",
    [
        ({"shortcut": "identity"}, "'identity'"),
        ({"stage_widths": (4, 6)}, r"\(4, 6\)"),
        ({"stage_widths": (4, 0, 8)}, r"\(4, 0, 8\)"),
        ({"hidden_widths": (4, 6, 8, 8)}, "4 hidden widths"),
        ({"hidden_widths": ()}, "0 hidden widths"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"image_size": 0}, "image_size=0"),
        ({"channels": -1}, "channels=-1"),
        ({"hidden_widths": (4, 6, -2)}, "-2 for stage3_block0"),
        ({"hidden_widths": (4, 0, 8)}, "stage2_block0"),
    ],
)
def test_a_spec_of_impossible_shapes_is_refused(change, given):
    fields = {"stage_widths": (4, 6, 8), "hidden_widths": (4, 6, 8), "num_classes": 5, **change}
    with refused(given):
        ResNetSpec(**fields)


NO_DEPTHS = (2, 7, 13, 55, -4)
FIELDS = RESNET14.to_dict()
WITHOUT_CHANNELS = {name: value for name, value in FIELDS.items() if name != "channels"}


@pytest.mark.parametrize(
    "impossible, words",
    [
        *((partial(resnet_spec, n, num_classes=9), f"6n . 2.*depth={n}") for n in NO_DEPTHS),
        *((partial(widths_at, [16], x), f"got {x};") for x in (0, 1.6, -1, math.nan)),
        (partial(resnet_spec, 14, num_classes=5, stage_widths=[4, 6]), r"\(4, 6\)"),
        (partial(generated_blocks, RESNET14, "outer"), "'outer'"),
        # ... and says what to do.
        (partial(generated_blocks, resnet_spec(8, num_classes=5)), "ResNet8.*generated='all'"),
        (partial(morph, RESNET14, [2], [0]), "stage2_block0"),
        (partial(morph, RESNET14, [1, 3], [4, 4, 4]), "2 generated blocks.*got 3"),
        (partial(ResNetSpec.from_dict, {**FIELDS, "dropout": 0.1}), "'dropout'"),
        (partial(ResNetSpec.from_dict, WITHOUT_CHANNELS), "'channels'"),
    ],
)
def test_what_no_network_can_be_is_refused(impossible, words):
    with refused(words):
        impossible()


def test_a_network_is_called_by_the_layers_that_are_there():
    spec = resnet_spec(20, num_classes=10)
    assert spec.title == "ResNet20"
    blocks = generated_blocks(spec)
    assert morph(spec, blocks, [0] * len(blocks)).title == f"ResNet{20 - 2 * len(blocks)}"
