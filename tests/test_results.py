"""The trained artefact under results/ is the one that the files beside it describe."""

import csv
import hashlib
import pathlib

import jax
import numpy as np

from neumeta_jax import checkpoint, hypernetwork as hyper, resnet

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "results/cifar100_resnet20/depth"


def test_the_artefact_has_the_digest_that_its_page_states():
    digest = hashlib.sha256((FOLDER / "inr.safetensors").read_bytes()).hexdigest()
    page = (FOLDER / "README.md").read_text()
    assert f"| sha256 of `inr.safetensors` | {digest[:16]}... |" in page


def test_every_network_of_the_table_comes_out_of_the_artefact():
    family, params, _ = checkpoint.load_inr(FOLDER)
    generate = jax.jit(lambda widths: hyper.generate(family, params, widths))
    with (FOLDER / "depths.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        widths = [int(width) for width in row["widths"].split()]
        tree = generate(np.array(widths, np.int32))
        spec, dense = resnet.slice_params(family.spec, tree, family.blocks, widths)
        assert sum(x.size for x in jax.tree.leaves(dense)) == int(row["num_params"])
        assert spec.num_macs == int(row["num_macs"])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(dense))
