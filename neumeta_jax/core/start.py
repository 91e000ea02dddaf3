"""Where training starts: small networks that follow the full one."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.hypernetwork import Hypernetwork
from neumeta_jax.core.inr.base import (
    INR,
    Params,
    kept_ratio,
    over,
    skipped_share,
    width_counts,
)
from neumeta_jax.core.sizes import shallowest_widths
from neumeta_jax.elastic.family import Family
from neumeta_jax.elastic.refit import refit
from neumeta_jax.errors import UsageError


def fit_target(
    hypernetwork: Hypernetwork,
    inr: INR,
    family: Family | None,
    backbone: Any,
    x: Any,
    moments: Mapping[str, jax.Array] | None = None,
) -> Params:
    """The parameters with which `inr`, a kind with a closed form, is the full-size `backbone`.

    An INR without one can be fitted to what they generate, at any width. What is not generated has
    no terms for small sizes here.

    Args:
        hypernetwork: the family to be fitted.
        inr: of the target.
        family, x: see `fill_terms`; kinds without terms need none.
        backbone: the full-size network.
        moments: see `hypernetwork.init`.

    Raises:
        UsageError: for a kind with terms without a family.
    """
    closed = dataclasses.replace(hypernetwork, inr=inr)
    params = hyper.init(jax.random.key(0), closed, backbone, moments=moments)
    params.pop("width", None)
    if inr.width_terms:
        if family is None:
            raise UsageError(
                "A fit to projected networks needs the Family of the network in place of its "
                'function, see nm.trace; or set fit_target to "averaged".'
            )
        params = fill_terms(closed, family, params, backbone, x)
    return params["inr"]


def fill_terms(
    hypernetwork: Hypernetwork,
    family: Family,
    params: Mapping,
    backbone: Any,
    x: Any,
    *,
    max_skipped: float = 0.5,
    batch_size: int = 100,
) -> Params:
    """`params` whose terms of width and depth make smaller networks follow the full one.

    The network of each width term, the largest first, and then the shallowest network at full width
    is generated with the terms so far, and its products are solved anew (`refit`); the term is the
    difference. Sizes in between have a part of it. No labels are needed, and no slopes. Where
    `params` have no "width", only what is generated is solved.

    Args:
        hypernetwork: one whose INR has terms.
        family: what its groups were found in.
        params: of `hypernetwork.init`.
        backbone: the full-size network.
        x: inputs, arrays [number, ...], without labels; 2,000 images are enough.
        max_skipped: share of the branches of each stage that the shallowest network skips.
        batch_size: inputs that run together.

    Raises:
        ValueError: as `refit`.
    """
    inr = hypernetwork.inr
    sizes = [hypernetwork.widths(ratio) for ratio in inr.width_terms]
    shallowest = shallowest_widths(hypernetwork, max_skipped)
    if inr.depth_term and 0 in shallowest:
        sizes.append(np.array(shallowest, np.int32))
    filled: Params = dict(params)
    for number, widths in enumerate(sizes):
        tree = hyper.generate(hypernetwork, filled, widths)
        by_name = hypernetwork.by_name(widths.tolist())
        solved = None if {"width", "depth"} & filled.keys() else hypernetwork.owners
        found = refit(family, backbone, tree, by_name, x, paths=solved, batch_size=batch_size)
        filled = _with_term(hypernetwork, number, filled, widths, tree, found)
    return filled


@functools.partial(jax.jit, static_argnums=(0, 1))  # else it is a hundred programs of one line each
def _with_term(hypernetwork, number, params, widths, tree, wanted):
    """`params` that generate `wanted` in place of `tree` at `widths`, those of term `number`."""
    inr, leaves = hypernetwork.inr, hypernetwork.groups.leaves
    changes = {path: new - leaves(tree)[path] for path, new in leaves(wanted).items()}
    for path, position in hyper.scaled(hypernetwork).items():
        alpha = params["alpha"][position]  # a branch that is switched off stays as it is
        changes[path] = changes[path] * jnp.where(alpha == 0, 0.0, 1 / alpha)
    raw = hyper.pack(hypernetwork, changes)
    inr_params = inr.with_term(params["inr"], hypernetwork.stacks, widths, number, raw)
    params, learned = {**params, "inr": inr_params}, hyper.flat(params["learned"])
    if number == len(inr.width_terms):
        shares = {path: skipped_share(widths, hypernetwork.scope(path)) for path in learned}
        params["depth"] = hyper.nested({p: over(changes[p], shares[p]) for p in learned})
    elif "width" in params:
        ratio = kept_ratio(widths, hypernetwork.full_widths)
        count = width_counts(ratio, inr.width_terms)[number]
        term = hyper.nested({path: over(changes[path], count) for path in learned})
        params["width"] = {**params["width"], str(number + 1): term}
    return params
