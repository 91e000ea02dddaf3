"""The library computes what it computed when the files in golden/ were made; see golden/make.py."""

import json

import chex
import numpy as np
import pytest
from golden import make


def golden(kind, part):
    """The arrays of a part of a golden file, by name."""
    with np.load(make.FOLDER / f"{kind}.npz") as saved:
        return {name: saved[name] for name in saved if name.startswith(f"{part}/")}


@pytest.fixture(scope="module", params=make.INRS)
def case(request):
    return request.param, make.inr_case(request.param)


def assert_as_it_was(case, part, *, tolerance):
    """Equal names, and values to `tolerance` of themselves and of the largest of their tensor."""
    kind, found = case
    wanted = golden(kind, part)
    found = {name: value for name, value in found.items() if name.startswith(f"{part}/")}
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    scales = {name: np.abs(value).max(initial=1e-30) for name, value in wanted.items()}
    chex.assert_trees_all_close(
        {name: value / scales[name] for name, value in found.items()},
        {name: value / scales[name] for name, value in wanted.items()},
        rtol=tolerance,
        atol=tolerance,
    )


def test_the_networks_of_two_widths_are_what_they_were(case):
    assert_as_it_was(case, "network", tolerance=1e-5)


def test_an_update_step_ends_where_it_did(case):
    assert_as_it_was(case, "step", tolerance=2e-5)


def test_an_exported_network_has_the_tensors_that_it_had(case):
    assert_as_it_was(case, "export", tolerance=1e-5)


@pytest.mark.parametrize("depth", make.DEPTHS)
def test_counts_groups_and_orders_of_a_network_are_what_they_were(depth):
    wanted = json.loads((make.FOLDER / f"resnet{depth}.json").read_text())
    found = make.network_case(depth)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name] == value, name
