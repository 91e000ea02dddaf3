"""CIFAR ResNets under the names of PyTorch: what is recognised, and where each tensor goes."""

import dataclasses
import importlib.util
import os
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import npz_bytes, refused
from networks import torch_tensors

from neumeta_jax.networks import cifar_import, cifar_resnet
from neumeta_jax.networks.cifar_spec import ResNetSpec, resnet_spec

SPEC = ResNetSpec(stage_widths=(4, 6, 8), hidden_widths=(4, 6, 8), num_classes=5, image_size=8)
SPECS = {
    "projection": SPEC,
    "pad": dataclasses.replace(SPEC, shortcut="pad"),
    "deep": resnet_spec(20, num_classes=10, stage_widths=(2, 3, 4)),
    "gray": dataclasses.replace(SPEC, channels=1),
    "pruned": ResNetSpec((4, 6, 8), (3, 5, 2, 7, 1, 9), num_classes=3),
    "morphed": ResNetSpec((4, 6, 8), (3, 0, 5, 2, 0, 7, 1, 9, 0), num_classes=3),
    "skipped": ResNetSpec((4, 6, 8), (0, 3, 5, 0, 7, 1), num_classes=3, shortcut="pad"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_tensors_tell_their_spec_and_become_the_tree_of_its_linen_network(spec):
    tensors = torch_tensors(spec)
    assert cifar_import.infer_spec(tensors, image_size=spec.image_size) == spec
    images = jnp.zeros((1, spec.image_size, spec.image_size, spec.channels))
    wanted = jax.eval_shape(cifar_resnet.ResNet(spec).init, jax.random.key(0), images)
    got = cifar_import.to_variables(spec, tensors)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)


@pytest.mark.parametrize("shortcut", ["downsample", "shortcut"])
@pytest.mark.parametrize("head", ["fc", "linear", "classifier"])
def test_the_names_of_other_repositories_give_the_same_network(shortcut, head):
    usual = cifar_import.to_variables(SPEC, torch_tensors(SPEC))
    tensors = torch_tensors(SPEC, shortcut=shortcut, head=head)
    assert cifar_import.infer_spec(tensors, image_size=8) == SPEC
    chex.assert_trees_all_equal(cifar_import.to_variables(SPEC, tensors), usual)


def test_every_tensor_lands_where_it_belongs():
    tensors = torch_tensors(SPEC)
    variables = cifar_import.to_variables(SPEC, tensors)
    params, stats = variables["params"], variables["batch_stats"]
    places = {
        "layer2.0.conv1.weight": params["stage2_block0"]["conv1"]["kernel"].transpose(3, 2, 0, 1),
        "layer3.0.downsample.0.weight": params["stage3_block0"]["shortcut"]["kernel"].T,
        "layer3.0.downsample.1.weight": params["stage3_block0"]["shortcut_bn"]["scale"],
        "layer3.0.downsample.1.bias": params["stage3_block0"]["shortcut_bn"]["bias"],
        "layer1.0.bn2.running_mean": stats["stage1_block0"]["bn2"]["mean"],
        "layer1.0.bn2.running_var": stats["stage1_block0"]["bn2"]["var"],
        "fc.weight": params["head"]["kernel"].T,
        "fc.bias": params["head"]["bias"],
    }
    chex.assert_trees_all_equal(places, {name: tensors[name] for name in places})


ONE_NAN = np.where(np.arange(144).reshape(4, 4, 3, 3) == 1, np.nan, 0)
LAST_NAMES = ("layer4.0.conv1.weight", "layer1.0.conv3.weight", "layer1.99999.conv1.weight")
NEEDED_NAMES = ("conv1", "fc", "layer1.0.conv1", "layer3.0.conv1", "layer3.0.conv2")


def changed_tensors(change):
    """Those of SPEC with other ones, or without some."""
    tensors = torch_tensors(SPEC) | change
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    "change, match",
    [
        *[({name: np.ones((1, 1, 3, 3))}, name) for name in LAST_NAMES],
        *[({f"{n}.weight": None}, f"{n}.weight of . dimensions.*none") for n in NEEDED_NAMES],
        ({"conv1.weight": np.ones(4)}, r"conv1\.weight of 4 dim.*shape \(4,\)"),
        ({"layer2.0.bn1.running_var": None}, r"layer2\.0\.bn1\.running_var of shape \(6,\), but"),
        ({"layer3.0.downsample.0.weight": None}, r"3\.0\.downsample\.0\.weight .*\(8, 6, 1, 1\)"),
        (
            {"conv1.weight": np.ones((4, 3, 5, 5))},
            r"conv1\.weight .*\(4, 3, 3, 3\).*\(4, 3, 5, 5\)",
        ),
        ({"fc.bias": np.ones(6)}, r"fc\.bias .*\(5,\).*\(6,\)"),
        ({"conv1.bias": np.ones(4)}, r"no place for the tensors conv1\.bias"),
        ({"linear.weight": np.ones((5, 8))}, r"no place for the tensors linear\.weight"),
        ({"layer1.0.conv2.weight": ONE_NAN}, r"layer1\.0\.conv2\.weight needs finite.*1 other"),
        ({"bn1.weight": np.full(4, -np.inf)}, r"bn1\.weight needs finite"),
        ({"fc.bias": np.full(5, 1e300)}, r"fc\.bias needs finite.*5 others"),
        (
            {"bn1.running_var": np.array([1, -0.5, 1, 1])},
            r"running_var needs varianc.* 0, got -0\.5",
        ),
    ],
)
def test_other_networks_and_tensors_that_do_not_fit_are_named(change, match):
    tensors = changed_tensors(change)
    with refused(match):
        cifar_import.infer_spec(tensors)
        cifar_import.to_variables(SPEC, tensors)


def test_many_missing_or_superfluous_tensors_are_counted():
    deeper = resnet_spec(14, num_classes=5, stage_widths=SPEC.stage_widths)
    with refused(r"layer1\.1\.conv1\.weight .* and 29 more"):
        cifar_import.to_variables(deeper, torch_tensors(SPEC))
    with refused("no place for the tensors .* and 27 more"):
        cifar_import.to_variables(SPEC, torch_tensors(deeper))


@pytest.mark.parametrize(
    "change, extra, match",
    [
        ({"num_classes": 10}, {}, "num_classes 5 in the file, 10 in the config"),
        ({"hidden_widths": (4,) * 6}, {}, "ResNet8 with 5 classes; the config asks for a ResNet14"),
        ({"hidden_widths": (4, 5, 8)}, {}, "width of stage2_block0 6 in the file, 5 in the config"),
        ({"shortcut": "pad"}, {}, "shortcut projection in the file, pad in the config"),
        ({}, {"conv1.bias": np.ones(4)}, r"teacher\.npz .*conv1\.bias"),
    ],
)
def test_a_teacher_of_another_network_shows_what_differs(tmp_path, change, extra, match):
    path = tmp_path / "teacher.npz"
    path.write_bytes(npz_bytes(changed_tensors(extra)))
    with refused(match):
        cifar_import.load_teacher(str(path), spec=dataclasses.replace(SPEC, **change))


# The real teachers


@pytest.mark.parametrize(
    "name, depth, num_params",
    [("cifar100_resnet20.npz", 20, 277_540), ("cifar100_resnet56-f2eff4c8.pt", 56, 859_492)],
)
def test_the_real_teachers_are_recognised_and_give_the_logits_of_pytorch(name, depth, num_params):
    default = pathlib.Path(__file__).resolve().parents[1] / ".." / "shared"
    shared = pathlib.Path(os.environ.get("NEUMETA_SHARED", default))
    if not (shared / "weights").is_dir():
        pytest.skip(f"needs the teachers in {shared}; set NEUMETA_SHARED to their folder")
    spec, variables = cifar_import.load_teacher(shared / "weights" / name)
    assert spec == resnet_spec(depth, num_classes=100)
    assert spec.num_params == num_params
    folded = cifar_resnet.fold_batch_norm(variables)
    assert sum(leaf.size for leaf in jax.tree.leaves(folded)) == num_params

    path = shared / "data" / "imgpack.py"
    if not path.is_file():
        pytest.skip(f"needs the images that {path} unpacks")
    module_spec = importlib.util.spec_from_file_location("imgpack", path)
    imgpack = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(imgpack)
    images = imgpack.load_chunk("cifar100", "test", 0)[:32]
    mean, std = (0.507, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)
    images = ((images / 255 - mean) / std).astype(np.float32)
    with np.load(shared / "weights" / "reference_logits.npz") as file:
        wanted = file[f"cifar100_resnet{depth}"][:32]
    logits = jax.jit(cifar_resnet.ResNet(spec).apply)(variables, images)
    np.testing.assert_allclose(logits, wanted, atol=1e-3)
    logits = jax.jit(cifar_resnet.apply, static_argnums=0)(spec, folded, images)
    np.testing.assert_allclose(logits, wanted, atol=1e-3)
