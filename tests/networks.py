"""Small networks at random, refusals and commands: what the tests of several modules share."""

import contextlib
import functools
import importlib.util
import io
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from neumeta_jax.commands import command_line, setup
from neumeta_jax.core import hypernetwork as hyper, update
from neumeta_jax.data import datasets
from neumeta_jax.export import formats
from neumeta_jax.export.network import Network, Normalization
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.saved import INR_FILE, save_inr
from neumeta_jax.runs import backbone, inr, loop
from neumeta_jax.runs.config import from_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPECS = {
    "projection": ResNetSpec((4, 6, 8), (3, 0, 6, 5, 2, 7), num_classes=5, image_size=8),
    # Odd sizes and odd numbers of added channels, where sides could be mixed up.
    "pad": ResNetSpec((3, 4, 7), (2, 3, 4), 4, image_size=9, channels=2, shortcut="pad"),
}
both_shortcuts = pytest.mark.parametrize("name", SPECS)
no_litert = pytest.mark.skipif(
    not importlib.util.find_spec("ai_edge_litert"), reason="ai-edge-litert is not installed"
)


def random_params(spec, seed=0):
    """Every weight at random, biases included, with scales that differ between channels."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        values = rng.normal(size=shape) * (2 / np.prod(shape[:-1])) ** 0.5
        return (values * rng.uniform(0.3, 1.5, shape[-1])).astype(np.float32)

    return jax.tree.map(
        leaf, cifar_resnet.param_shapes(spec), is_leaf=lambda x: isinstance(x, tuple)
    )


def torch_tensors(spec, *, shortcut="downsample", head="fc"):
    """Random tensors of a CIFAR ResNet under the names and with the shapes of PyTorch."""
    rng = np.random.default_rng(0)
    tensors = {}

    def layer(conv, norm, out_width, in_width, size=3):
        tensors[f"{conv}.weight"] = rng.normal(size=(out_width, in_width, size, size))
        tensors[f"{norm}.weight"] = rng.normal(1, 0.1, out_width)
        tensors[f"{norm}.bias"] = rng.normal(size=out_width)
        tensors[f"{norm}.running_mean"] = rng.normal(size=out_width)
        tensors[f"{norm}.running_var"] = rng.uniform(0.5, 2, out_width)
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)

    layer("conv1", "bn1", spec.stage_widths[0], spec.channels)
    for block in spec.blocks:
        if not block.hidden_width:
            continue
        name = f"layer{block.stage}.{block.index}"
        layer(f"{name}.conv1", f"{name}.bn1", block.hidden_width, block.in_width)
        layer(f"{name}.conv2", f"{name}.bn2", block.out_width, block.hidden_width)
        if block.projection:
            sizes = block.out_width, block.in_width, 1
            layer(f"{name}.{shortcut}.0", f"{name}.{shortcut}.1", *sizes)
    tensors[f"{head}.weight"] = rng.normal(size=(spec.num_classes, spec.stage_widths[-1]))
    tensors[f"{head}.bias"] = rng.normal(size=spec.num_classes)
    return {k: v.astype("f4") if v.dtype == np.float64 else v for k, v in tensors.items()}


def random_pixels(spec, number, seed=0):
    shape = (number, spec.image_size, spec.image_size, spec.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def random_inr(family, *, seed, scale):
    """The parameters of INRs, all of them at random."""

    def init(key):
        return hyper.init(key, family, cifar_resnet.init_params(key, family.spec))

    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=scale).astype("f4"), shapes)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(spec, params, images):
    return cifar_resnet.apply(spec, params, images)


def dense_network(family, params, widths):
    """(spec, tree) of the network of `widths` at its own shapes."""
    return family.dense(hyper.generate(family, params, widths, sizes=widths), widths, widths)


class Sample(NamedTuple):
    """A network, what it is given and what it answers."""

    network: Network
    pixels: np.ndarray
    images: np.ndarray  # the pixels normalised
    logits: np.ndarray


@functools.cache
def sample(name):
    """That of `SPECS` at random."""
    spec, rng = SPECS[name], np.random.default_rng(1)
    params, pixels = random_params(spec), random_pixels(spec, 12)
    mean, std = rng.uniform(0.2, 0.6, (2, spec.channels)).round(3).tolist()
    network = Network(spec, params, Normalization(tuple(mean), tuple(std)))
    images = network.normalization(pixels)
    return Sample(network, pixels, images, np.asarray(logits_of(spec, params, images)))


def assert_same_logits(found, wanted):
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert formats.compare(found, np.asarray(wanted)).error < 1e-5


@contextlib.contextmanager
def refused(words, error=ValueError):
    """Expects of its body an `error` whose message is one sentence that matches `words`."""
    with pytest.raises(error, match=words) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and ". " not in message and message.endswith(".")


def load_module(path):
    """The module of a Python file, `path` from the root of the repository."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_workdir(path, *, depth):
    """A work directory of the digits with an INR at random; no more of what training leaves."""
    path.mkdir()
    config = load_module("configs/digits.py").get_config("smoke").to_dict()
    config["network"]["depth"] = depth
    (path / "config.json").write_text(json.dumps(config))
    family = from_config(config, datasets.load_dataset("digits")).hypernetwork
    params = random_inr(family, seed=3, scale=0.4)
    save_inr(path / INR_FILE, family, params)
    return path


def call(module, *args):
    """(exit status, standard output, standard error) of the command that a module is."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, args)])
        patch.setattr(setup, "quiet_logging", lambda: None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command_line.run(module.main)
            except SystemExit as stop:
                status = stop.code
    return status, out.getvalue(), err.getvalue()


def run(module, *args):
    """What a command prints that does what it should."""
    status, out, err = call(module, *args)
    assert status == 0, err
    return out


def assert_refuses(words, module, *args):
    """That a command ends with one line that holds `words`."""
    status, _, err = call(module, *args)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err, err


@contextlib.contextmanager
def compiled_once():
    """Runs within share their steps: arguments that read the same give the same jitted function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "teacher_update", once(backbone.teacher_update))
        patch.setattr(update, "inr_update", once(update.inr_update))
        steps = once(loop.Steps)
        for module in (backbone, inr):
            patch.setattr(module, "Steps", steps)
        yield


def once(function):
    """`function`, which gives the same result for arguments that read the same."""
    results = {}

    def called(*args, **options):
        key = repr((args, options))
        if key not in results:
            results[key] = function(*args, **options)
        return results[key]

    return called
