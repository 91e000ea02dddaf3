"""Which networks of a family a training step sees."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from neumeta_jax.core.hypernetwork import Hypernetwork

Widths = tuple[int, ...]


def skippable(
    hypernetwork: Hypernetwork, share: float
) -> tuple[tuple[int, tuple[int, ...], int], ...]:
    """(stage, positions of its groups that can be skipped, `share` of their number, rounded)."""
    found = []
    for stage in range(1, max(hypernetwork.stages) + 1):
        stages = zip(hypernetwork.stages, hypernetwork.lowest, strict=True)
        members = tuple(p for p, (s, lowest) in enumerate(stages) if s == stage and not lowest)
        if members:
            found.append((stage, members, math.floor(share * len(members) + 0.5)))
    return tuple(found)


def shallowest_widths(hypernetwork: Hypernetwork, share: float) -> Widths:
    """Full widths without the last blocks of each stage, `share` of those that can be skipped."""
    widths = list(hypernetwork.full_widths)
    for _, members, most in skippable(hypernetwork, share):
        for position in members[len(members) - most :]:
            widths[position] = 0
    return tuple(widths)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The networks of a step: some that are the same in every step, then random ones.

    Attributes:
        full: widths of the full-size network.
        fixed: widths of each network that is the same in every step.
        num_random: how many others there are.
        low: theirs are drawn uniformly from this width ratio to 1.
        per_block: share of them that draws a ratio for each group instead of one for the network.
        skipping: share of them that skips blocks, in each stage the last ones, a number drawn
            uniformly from 0 to the most.
        stages: which blocks these are, see `skippable`.
        dense: whether `fixed` holds in every phase, so that these networks can run at their own
            shapes; without it blocks that have not joined are full.
    """

    full: Widths
    fixed: tuple[Widths, ...]
    num_random: int
    low: float
    per_block: float = 0.0
    skipping: float = 0.0
    stages: tuple[tuple[int, tuple[int, ...], int], ...] = ()
    dense: bool = False

    def __len__(self) -> int:
        return len(self.fixed) + self.num_random

    @property
    def with_full(self) -> bool:
        """Whether the first network is the full-size one."""
        return self.fixed[:1] == (self.full,)

    @property
    def metric(self) -> str:
        """The name of the accuracy of the first network."""
        return "full_accuracy" if self.with_full else "shallow_accuracy"

    @property
    def shapes(self) -> Sequence[Widths | None]:
        """The widths at which each network may run as a dense one; None for the full shape."""
        known = [None if w == self.full or not self.dense else w for w in self.fixed]
        return [*known, *[None] * self.num_random]

    def draw(self, key: jax.Array) -> jax.Array:
        """int32[networks, names]: the widths of a step's networks."""
        fixed = jnp.array(self.fixed, jnp.int32).reshape(-1, len(self.full))
        if not self.num_random:
            return fixed
        full = jnp.array(self.full, jnp.float32)
        # A row for each network but the full one, the last of which are used. That and how many
        # numbers `_skipped` draws is what it was for the runs in results/, which can be repeated.
        num = len(self) - self.with_full
        # One draw for all: a ratio for each group, and whether a network has one for each.
        draws = jax.random.uniform(key, (num, 1 + len(full)))
        choice, draws = draws[:, :1], draws[:, 1:]
        draws = jnp.where(choice < self.per_block, draws, draws[:, :1])
        ratios = self.low + (1 - self.low) * draws
        widths = jnp.maximum(1, jnp.floor(ratios * full + 0.5)).astype(jnp.int32)
        if self.skipping:
            widths = jnp.where(self._skipped(jax.random.fold_in(key, 1), num), 0, widths)
        return jnp.concatenate([fixed, widths[num - self.num_random :]])

    def _skipped(self, key, num):
        """bool[num, names]: which blocks each network skips."""
        draws = jax.random.uniform(key, (num, 1 + 3 + len(self.full)))
        skips = draws[:, 0] < self.skipping
        skipped = jnp.zeros((num, len(self.full)), bool)
        for stage, members, most in self.stages:
            count = jnp.floor(draws[:, stage] * (most + 1))
            place = jnp.arange(len(members))[::-1]  # counted from the last one
            chosen = skips[:, None] & (place < count[:, None])
            skipped = skipped.at[:, jnp.array(members)].set(chosen)
        return skipped
