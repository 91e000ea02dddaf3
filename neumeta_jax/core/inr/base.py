"""What an implicit neural representation must offer.

What surrounds it is the same for all kinds (`hypernetwork`): masking to the width, SkipInit, what
is not generated.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core.stacks import TensorStack

Params = dict[str, Any]


class INR(abc.ABC):
    """A map from (parameters, widths) to the raw tensors of every stack. Values are hashable.

    Kinds define `init` and `__call__`. The other methods are as they are for a kind that has no
    closed form to start with, and all of whose leaves have a leading axis of a stack's tensors.

    Attributes:
        needs_moments: whether `with_moments` makes use of second moments of the channels.
        depth_term: whether weights depend on which branches are skipped, those not generated
            included.
        width_terms: the width ratios, descending, for which weights have terms of their own
            (`width_counts`), those not generated included.
    """

    needs_moments = False
    depth_term = False
    width_terms: tuple[float, ...] = ()

    @abc.abstractmethod
    def init(self, key: jax.Array, stacks: Sequence[TensorStack]) -> Params:
        """Fresh parameters, by the name of each stack."""

    @abc.abstractmethod
    def __call__(
        self,
        inr_params: Params,
        stacks: Sequence[TensorStack],
        widths: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Raw weights float32[tensors, rows, columns, num_outputs] by the name of each stack.

        `widths` is int[names]; entries beyond a width may hold anything finite. With a `key`,
        coordinates are noisy. The stacks may be of another size than those of `init`.
        """

    def start_from(
        self, inr_params: Params, stacks: Sequence[TensorStack], raw: Mapping[str, jax.Array]
    ) -> Params:
        """`inr_params` that generate the full-width tensors `raw`, where there is a closed form.

        Kinds without one return `inr_params` as they are; that is what the fit phase is for.
        """
        del stacks, raw
        return inr_params

    def with_moments(
        self, inr_params: Params, stacks: Sequence[TensorStack], moments: Mapping[str, jax.Array]
    ) -> Params:
        """`inr_params` that hold the second moments of the channels that each tensor reads.

        They are float32[..., columns + 1, columns + 1] by path (see `moments.moments`), and are
        measured, not learned: no tensor copies those of another. Kinds without `needs_moments`
        return `inr_params` as they are.
        """
        del stacks, moments
        return inr_params

    def copy_group(
        self, inr_params: Params, stacks: Sequence[TensorStack], source: int, target: int
    ) -> Params:
        """`inr_params` in which the tensors of group `target` start as copies of those of `source`.

        Groups are positions in the widths; only tensors that share a stack are copied.
        """
        copied = dict(inr_params)
        for stack in stacks:
            if source in stack.owners and target in stack.owners:
                owners = np.array(stack.owners)
                s, t = (np.flatnonzero(owners == group) for group in (source, target))
                number = min(len(s), len(t))
                copied[stack.name] = jax.tree.map(
                    lambda p, s=s[:number], t=t[:number]: p.at[t].set(p[s]), inr_params[stack.name]
                )
        return copied

    def update_mask(
        self, inr_params: Params, stacks: Sequence[TensorStack], active: np.ndarray
    ) -> Params:
        """A tree that broadcasts against `inr_params`: 1 where only `active` groups learn, else 0.

        `active` is bool[names]; of `inr_params` only the shapes count.
        """
        mask = {}
        for stack in stacks:
            flags = np.asarray(active)[list(stack.owners)].astype(np.float32)
            mask[stack.name] = jax.tree.map(
                lambda p, f=flags: f.reshape((-1,) + (1,) * (p.ndim - 1)), inr_params[stack.name]
            )
        return mask

    def with_term(
        self,
        inr_params: Params,
        stacks: Sequence[TensorStack],
        widths: jax.Array,
        number: int,
        raw: Mapping[str, jax.Array],
    ) -> Params:
        """`inr_params` that generate `raw` more at `widths`, by a term.

        `number` counts the `width_terms`, and after them the `depth_term`.
        """
        del stacks, widths, number, raw
        return inr_params

    def depth_mask(self, inr_params: Params, stacks: Sequence[TensorStack]) -> Params:
        """A tree that broadcasts against `inr_params`: 1 for the `depth_term`, else 0."""
        del stacks
        return jax.tree.map(lambda _: np.float32(0), inr_params)


def skipped_share(widths: jax.Array, positions: Sequence[int]) -> jax.Array:
    """How many of the groups at `positions` have width 0, float32 in [0, 1]; 0 of none."""
    if not positions:
        return jnp.zeros(())
    return jnp.mean((jnp.asarray(widths)[np.array(positions)] == 0).astype(jnp.float32))


def kept_ratio(widths: jax.Array, full: Sequence[int]) -> jax.Array:
    """float32: the mean of `widths` over the `full` ones, of the branches that are not skipped."""
    ratios = jnp.asarray(widths).astype(jnp.float32) / np.array(full, np.float32)
    return jnp.sum(ratios) / jnp.maximum(jnp.sum(ratios > 0, dtype=jnp.float32), 1.0)


def width_counts(ratios: jax.Array, terms: Sequence[float]) -> jax.Array:
    """float32[..., terms]: how much each of the `terms`, width ratios below 1, counts at `ratios`.

    A term counts at its own ratio, and falls to 0 at the next ones, of which 1 is the first, in a
    straight line along the logarithm of the ratio; the last term goes on growing below its own. A
    term for less than half of the width counts as often there as the width is halved: what is
    changed most learns fastest, as a step of a term is as long whatever it counts.
    """
    halvings = -jnp.log2(jnp.clip(ratios, 2.0**-10, 1.0))
    knots = [0.0, *(-math.log2(term) for term in terms)]
    counts = []
    for before, knot, after in zip(knots, knots[1:], [*knots[2:], math.inf], strict=False):
        share = (halvings - before) / (knot - before)
        if after < math.inf:
            share = jnp.minimum(share, (after - halvings) / (after - knot))
        counts.append(max(knot, 1.0) * jnp.maximum(share, 0.0))
    return jnp.stack(counts, axis=-1)


def over(change: jax.Array, count: jax.Array) -> jax.Array:
    """A term that is `change` where it counts `count`; 0 where it hardly counts.

    Few channels cannot have every width ratio.
    """
    return jnp.where(count < 0.25, 0.0, change / jnp.maximum(count, 0.25))


def mean_ratio(stack: TensorStack, ratios: jax.Array) -> jax.Array:
    """[tensors]: the mean of the width `ratios`, [names], on which each tensor depends."""
    longest = max(map(len, stack.conditions))
    if longest == 1:
        return ratios[np.array([places[0] for places in stack.conditions])]
    return jnp.stack([jnp.mean(ratios[np.array(places)]) for places in stack.conditions])
