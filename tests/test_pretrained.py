"""The INRs that come with the package are those of their pages."""

import hashlib
import importlib.util
import os
import pathlib
import re
import types

import chex
import jax
import numpy as np
import pytest
from networks import dense_network

import neumeta_jax
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data import datasets
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.evaluation import evaluator
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.saved import PRETRAINED, pretrained
from neumeta_jax.runs.workdir import open_run, read_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
CIFAR100 = pathlib.Path(os.environ.get("NEUMETA_SHARED", ROOT.parent / "shared")) / "data"
NUM_IMAGES = 500


@pytest.fixture(scope="module")
def test_images():
    """The first images of CIFAR-100's test split, uint8 NHWC, and their labels."""
    path = CIFAR100 / "imgpack.py"
    if not path.is_file():
        pytest.skip(f"needs CIFAR-100 in {CIFAR100}")
    spec = importlib.util.spec_from_file_location("imgpack", path)
    imgpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imgpack)
    images, labels = imgpack.load("cifar100", "test")
    return images[:NUM_IMAGES], labels[:NUM_IMAGES].astype(np.int32)


@pytest.mark.parametrize("name", pretrained())
def test_the_page_names_the_file_and_its_size(name):
    page = (PRETRAINED / f"{name}.md").read_text()
    content = (PRETRAINED / f"{name}.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() in page
    assert f"{len(content):,} bytes" in page
    assert len(content) < 4_000_000
    _, params, _ = neumeta_jax.load(name)
    assert f"{hyper.num_inr_params(params):,} in bfloat16" in page
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("name", pretrained())
def test_accuracies_are_those_of_the_page(name, test_images):
    page = (PRETRAINED / f"{name}.md").read_text()
    family, params, info = neumeta_jax.load(name)
    row = re.search(rf"\| {family.spec.depth} \| (.*) \|", page)
    full, *_, smallest = map(float, row[1].split(" | "))
    preprocessing = Preprocessing(tuple(info["mean"]), tuple(info["std"]))
    assert preprocessing.mean == datasets.NORMALIZATION["cifar100"][0]
    for ratio, wanted in ((1.0, full), (0.25, smallest)):
        spec, network = dense_network(family, params, family.widths(ratio))
        accuracy = evaluator.accuracy(
            cifar_resnet.Network(spec), network, *test_images, preprocessing, batch_size=50
        )
        assert 100 * accuracy == pytest.approx(wanted, abs=4)  # two standard errors


@pytest.mark.parametrize("name", pretrained())
def test_a_name_stands_for_a_work_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = types.SimpleNamespace(workdir=name, data_dir="elsewhere")
    opened = open_run({}, options)
    assert opened.workdir == pathlib.Path(name) and opened.config["data"]["dir"] == "elsewhere"
    family, params, _ = neumeta_jax.load(name)
    assert opened.hypernetwork == family
    chex.assert_trees_all_equal(opened.params, params)
    assert read_config(name)["inr"]["kind"] == "projection"
    chex.assert_trees_all_equal(open_run({}, options).params, params)  # there now


def test_a_name_that_is_neither_a_file_nor_pretrained_is_refused():
    with pytest.raises(FileNotFoundError, match="There is no file cifar100-resnet57"):
        neumeta_jax.load("cifar100-resnet57")
