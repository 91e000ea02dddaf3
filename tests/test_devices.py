"""Training on several devices, and programs for devices that are not here."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import many_devices
import numpy as np
import pytest
from builders import refused

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.devices import data_mesh
from neumeta_jax.core.inr import INR_KINDS, Grid, make_inr
from neumeta_jax.core.recipe import InrRecipe
from neumeta_jax.core.update import fresh_state
from neumeta_jax.evaluation.evaluator import device_mesh
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import resnet_spec
from neumeta_jax.runs.checkpoint import Checkpoints
from neumeta_jax.runs.teacher import TeacherRecipe

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPEC = resnet_spec(8, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
PLATFORMS = ("tpu", "cuda")


def start(*args, num_devices):
    """Runs a Python program with this many virtual CPU devices."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    done = start(many_devices.__file__, folder, num_devices=many_devices.NUM_DEVICES)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "lowered.json").read_text())


def states(folder, case, num_devices):
    saved = np.load(folder / "states.npz")
    prefix = f"{case}/{num_devices}/"
    return {name.removeprefix(prefix): saved[name] for name in saved if name.startswith(prefix)}


@pytest.mark.parametrize("case", many_devices.CASES)
def test_two_devices_end_where_one_does(folder, case):
    """Parameters and the optimizer's state, augmentation included, to rounding in float32."""
    one, two = (states(folder, case, n) for n in (1, many_devices.NUM_DEVICES))
    assert list(one) == list(two)
    # Batch norm over few images amplifies rounding from step to step, which differs among CPUs.
    tolerance = 2e-3 if case == "teacher" else 2e-5
    for name, value in one.items():
        scale = np.abs(value).max(initial=0.0)
        np.testing.assert_allclose(
            two[name], value, rtol=0, atol=tolerance * scale + 1e-12, err_msg=name
        )


@pytest.mark.parametrize("case", many_devices.CASES)
def test_the_state_stays_on_all_devices_and_one_program_serves_all_steps(found, case):
    assert found[f"{case}/replicated"]
    assert found[f"{case}/1/programs"] == found[f"{case}/{many_devices.NUM_DEVICES}/programs"] == 1


def test_gradients_are_summed_over_devices_once_per_step(found):
    """Not once per micro-batch; the fit phase looks at no images and has nothing to sum."""
    tree = cifar_resnet.param_shapes(SPEC)
    tensors = len(jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple)))
    metrics = 4  # cross-entropy, distillation, their sum; accuracy
    for case in ("looped", "unrolled"):
        assert found[f"{case}/all_reduces"] == tensors + metrics
    assert found["fit/all_reduces"] == 0


def test_what_a_command_evaluates_is_shared_by_all_devices(found):
    shared, alone = found["evaluated"]
    np.testing.assert_allclose(shared, alone, rtol=1e-3, atol=1e-7)
    divergences = [divergence for _, divergence in alone]
    assert divergences[0] < 1e-7 < min(divergences[1:])  # each network is another one
    assert divergences[1] != pytest.approx(divergences[2], rel=0.1)
    assert found["evaluated_on"] == many_devices.NUM_DEVICES
    assert device_mesh() is None  # here, where there is one


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("case", many_devices.CASES)
def test_steps_on_many_devices_lower_for_accelerators_with_donated_state(found, case, platform):
    assert found[f"{case}/{platform}/donated"] == found[f"{case}/leaves"]


def test_a_checkpoint_of_two_devices_is_continued_on_one(folder):
    assert jax.device_count() == 1
    family = cifar_resnet.hypernetwork(SPEC, many_devices.BLOCKS, Grid(noise_scale=0.5))

    def fresh(key):
        params = hyper.init(key, family, cifar_resnet.init_params(key, SPEC))
        return fresh_state(params, InrRecipe())

    template = jax.eval_shape(fresh, jax.random.key(0))
    restored = Checkpoints(folder / "checkpoints").restore(template)
    assert restored is not None
    step, state = restored
    assert step == many_devices.NUM_STEPS
    wanted = states(folder, "looped", many_devices.NUM_DEVICES)
    for path, leaf in jax.tree.leaves_with_path(state):
        assert np.array_equal(leaf, wanted[jax.tree_util.keystr(path)])


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, count, message",
    [
        (InrRecipe(batch_size=32), 3, "train.batch_size must be a multiple of the 3 devices"),
        (TeacherRecipe(batch_size=128), 7, "teacher.batch_size must be a multiple of the 7"),
        (
            InrRecipe(batch_size=48, micro_batch=16),
            2,
            "train.micro_batch must divide .*, 24 of 48 images, got 16",
        ),
    ],
)
def test_a_batch_that_devices_cannot_share_equally_is_refused(recipe, count, message):
    with refused(message):
        data_mesh({message.partition(".")[0]: recipe}, jax.devices() * count)


def test_a_single_device_needs_no_mesh():
    assert data_mesh({"train": InrRecipe(batch_size=31)}, jax.devices()) is None


def test_a_run_is_refused_before_it_starts_where_the_batch_does_not_divide(tmp_path):
    workdir = tmp_path / "run"
    config = "--config=configs/digits.py:smoke"
    done = start("train.py", config, f"--workdir={workdir}", num_devices=3)
    assert done.returncode == 2
    assert done.stderr.startswith("error: teacher.batch_size must be a multiple of the 3 devices")
    assert done.stderr.count("\n") == 1
    assert not workdir.exists()


# --- programs for devices that are not here --------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kind", sorted(INR_KINDS))
def test_generation_lowers_for_accelerators(kind, platform):
    inr = make_inr(kind)
    family = cifar_resnet.hypernetwork(SPEC, many_devices.BLOCKS, inr)
    key = jax.random.key(0)
    params = jax.eval_shape(
        lambda key: hyper.init(key, family, cifar_resnet.init_params(key, SPEC)), key
    )

    def generate(params, widths, key):
        return hyper.generate(family, params, widths, key=key, num_samples=3, dtype="bfloat16")

    traced = jax.jit(generate).trace(params, np.array(family.full_widths), key)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "bf16" in text and "callback" not in text
