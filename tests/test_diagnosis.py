"""Where a loss stops being finite is named: step, block and width."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_hosts
import test_recipe as recipe
import test_training as tiny

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import Projection
from neumeta_jax.networks import cifar_resnet, linen
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec
from neumeta_jax.runs import checkpoint, diagnosis

config = test_hosts.config
BLOCKS = [tiny.SPEC.blocks[n].name for n in tiny.FAMILY.blocks]
FULL = tiny.FAMILY.full_widths


@pytest.fixture(scope="module")
def params():
    backbone = tiny.random_backbone(tiny.SPEC)
    return tiny.init(tiny.FAMILY, backbone, alpha=0.7, from_backbone=False), backbone


def locate(params, backbone, *, number=3, phase="block", family=tiny.FAMILY, **changes):
    fields = {"batch_size": 4, "sandwich": True, "fit_steps": 1, **changes}
    chosen = dataclasses.replace(tiny.RECIPE, **fields)
    found = tiny.phase_of(chosen, phase, family)
    sizes = {"num_images": tiny.NUM_IMAGES, "images_per_step": found.images_per_step}
    step = diagnosis.step_of(number, jax.random.key(9), **sizes)
    given = family, chosen, found, tiny.prepare, params
    return diagnosis.locate_in_inr(*given, step, tiny.random_images(), backbone)


def scaled(params, layer, factor):
    layers = jax.tree.map(lambda x: x * factor, params["learned"][layer])
    return {**params, "learned": {**params["learned"], layer: layers}}


def test_finite_parameters_are_not_blamed(params):
    assert locate(*params) == "in the update, not in the networks before it"
    assert locate(*params, phase="fit") == "in the update, not in the networks before it"


@pytest.mark.parametrize("phase", ["fit", "block"])
def test_a_block_whose_weights_are_not_finite_is_named_with_its_width(params, phase):
    """All the last block's parameters are spoiled, and no other's."""
    tree, backbone = params
    owners = {stack.name: stack.owners for stack in tiny.FAMILY.stacks}

    def spoil(path, leaf):
        positions = owners[path[0].key]
        if len(FULL) - 1 not in positions or leaf.shape[0] != len(positions):
            return leaf
        return leaf.at[positions.index(len(FULL) - 1)].set(jnp.nan)

    spoiled = {**tree, "inr": jax.tree_util.tree_map_with_path(spoil, tree["inr"])}
    found = locate(spoiled, backbone, phase=phase)
    count = 1 if phase == "fit" else tiny.RECIPE.num_sizes
    assert (
        f"first in the weights of {BLOCKS[-1]}/conv1/kernel, in network 1 of {count} with" in found
    )


def test_the_networks_of_the_depth_phase_are_the_ones_that_are_searched():
    backbone = tiny.random_backbone(tiny.SPEC)
    family, tree = tiny.DEEP, tiny.init(tiny.DEEP, backbone)
    spoiled = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree["depth"])
    found = locate(
        {**tree, "depth": spoiled},
        backbone,
        phase="depth",
        depth_epochs=1.0,
        family=family,
        num_random_sizes=3,
        skip_blocks=0.5,
        max_skipped=1.0,
    )
    assert "in network 1 of 3 with the widths 0,0" in found


def test_activations_that_overflow_name_the_first_product_that_reads_them(params):
    tree, backbone = params
    found = locate(scaled(tree, "stem", 1e38), backbone)
    assert f"first in the input of {tiny.SPEC.blocks[0].name}/conv" in found


def test_weights_that_are_not_generated_are_named_too(params):
    tree, backbone = params
    assert "first in the weights of head/kernel, in network 1" in locate(
        scaled(tree, "head", np.inf), backbone
    )


def test_images_that_are_not_finite_are_named(params, monkeypatch):
    bad = dataclasses.replace(tiny.PREPROCESSING, std=(0.25, float("nan"), 0.25))
    prepare = functools.partial(bad.train, num_classes=tiny.SPEC.num_classes)
    monkeypatch.setattr(tiny, "prepare", prepare)
    assert locate(*params) == "first in the images"


def test_a_network_of_ones_own_is_searched_like_a_resnet():
    fields = {"num_classes": 5, "image_size": 8, "channels": 3}
    family = linen.hypernetwork(
        linen.LinenSpec("mlp", '{"widths": [8, 6]}', **fields), Projection()
    )
    variables = family.network.init_variables(jax.random.key(0))
    tree = tiny.init(family, variables)
    assert locate(tree, variables, family=family) == "in the update, not in the networks before it"
    tree["inr"] = jax.tree.map(lambda x: x * 1e30, tree["inr"])
    found = locate(tree, variables, family=family)
    assert found.startswith("first in the input of params/head/kernel, in network 1 of 2 with the")
    variables["params"]["dense2"]["bias"] = jnp.full(6, jnp.inf)
    assert locate_in_teacher(family.network, variables) == "first in the output of dense2"


def locate_in_teacher(network, variables):
    step = diagnosis.step_of(2, jax.random.key(0), num_images=tiny.NUM_IMAGES, images_per_step=4)
    images = tiny.random_images()
    return diagnosis.locate_in_teacher(network, tiny.PREPROCESSING, variables, step, images)


@pytest.mark.parametrize("block, layer", [("stage1_block0", "conv1"), ("stage3_block0", "bn1")])
def test_the_layer_of_a_teacher_whose_output_is_not_finite_is_named(block, layer):
    variables = cifar_resnet.init_variables(jax.random.key(0), tiny.SPEC)
    kernel = variables["params"][block]["conv1"]["kernel"]
    variables["params"][block]["conv1"]["kernel"] = kernel * 1e38
    found = locate_in_teacher(cifar_resnet.Network(tiny.SPEC), variables)
    assert found == f"first in the output of {block}/{layer}"


def test_a_run_whose_loss_is_not_finite_names_step_block_and_width(config, tmp_path, monkeypatch):
    """One block's weights are spoiled at one width, which is drawn for the first time in step 7."""
    workdir = tmp_path / "run"
    generate_tensors = hyper.generate_tensors
    drawn = []

    def spoiled(hypernetwork, inr_params, widths, **options):
        tensors = generate_tensors(hypernetwork, inr_params, widths, **options)
        bad = jnp.where((widths[1] == 4) & (widths[2] == 6), jnp.nan, 1.0)
        path = "stage2_block0/conv1/kernel"
        return tensors | {path: tensors[path] * bad}

    locate_in_inr = diagnosis.locate_in_inr

    def recorded(hypernetwork, recipe, phase, prepare, params, step, *args):
        drawn.append((phase, step))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
        return locate_in_inr(hypernetwork, recipe, phase, prepare, params, step, *args)

    monkeypatch.chdir(recipe.ROOT)
    with monkeypatch.context() as patch:
        patch.setattr(hyper, "generate_tensors", spoiled)
        patch.setattr(diagnosis, "locate_in_inr", recorded)
        args = [config, f"--workdir={workdir}", "--config.train.sandwich=false"]
        message = recipe.refusal("train", *args)

    ((phase, step),) = drawn
    # When it had to happen: the first step that draws these widths.
    for number in range(step.number + 1):
        key = jax.random.split(jax.random.fold_in(step.key, number), 3)[0]
        widths = np.asarray(phase.sizes.draw(key))[1]
        if tuple(widths[1:]) == (4, 6):
            break
    assert step.number == number > 5
    assert f"at step {number} ([1/1] all blocks), first in the weights of stage2_block0" in message
    assert "/conv1/kernel, in network 2 of 2 with the widths 3,4,6" in message
    kept = checkpoint.Checkpoints(workdir / "checkpoints" / "inr").steps()[-1]
    assert f"the checkpoint of step {kept} is kept" in message
    assert kept == number // 5 * 5


@pytest.mark.parametrize("depth_term", [False, True])
def test_channels_that_never_fire_and_blocks_that_change_nothing_are_named(depth_term):
    spec = resnet_spec(20, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    family = cifar_resnet.hypernetwork(
        spec, generated_blocks(spec), Projection(depth_term=depth_term)
    )
    first, second, third = (spec.blocks[n].name for n in family.blocks[:3])
    backbone = tiny.random_backbone(spec)
    backbone[first]["conv1"]["bias"] = backbone[first]["conv1"]["bias"].at[:3].set(-100.0)
    for name in (second, third):
        backbone[name]["conv1"]["bias"] = jnp.full_like(backbone[name]["conv1"]["bias"], -100.0)
    backbone[third]["conv2"]["bias"] = jnp.zeros_like(backbone[third]["conv2"]["bias"])
    params = tiny.init(family, backbone)
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    smallest = family.widths(0.5)
    idle = diagnosis.idle_parts(family, params, images, smallest)
    width = spec.blocks[family.blocks[2]].hidden_width
    counts = [idle.channels[name] for name in family.names[:3]]
    assert counts[0] >= 3 and counts[1:] == [4, width] and idle.groups == (2,)
    channels, blocks = diagnosis.describe_idle(family, idle)
    assert f"4 of 4 in {second}/conv1, {width} of {width} in {third}/conv1" in channels
    assert blocks.endswith(f"can be left out: {third}/conv1")
    if depth_term:  # without that block the others of its stage are not what they were
        params["depth"] = jax.tree.map(lambda x: x + 0.1, params["depth"])
        assert diagnosis.idle_parts(family, params, images, smallest).groups == ()


def test_nothing_is_said_of_a_family_all_of_which_does_something():
    spec = resnet_spec(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    family = cifar_resnet.hypernetwork(spec, generated_blocks(spec), Projection())
    backbone = tiny.random_backbone(spec)
    for n in family.blocks:
        layer = backbone[spec.blocks[n].name]["conv1"]
        layer["bias"] = jnp.ones_like(layer["bias"])
    params = tiny.init(family, backbone)
    images = jax.random.normal(jax.random.key(1), (64, 8, 8, 3))
    # Channels beyond the smallest widths are not there, which is not the same as never firing.
    idle = diagnosis.idle_parts(family, params, images, family.widths(0.5))
    assert idle == diagnosis.Idle({}, ())
    assert diagnosis.describe_idle(family, idle) == []
