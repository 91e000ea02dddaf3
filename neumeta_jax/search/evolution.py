"""Evolution of networks within budgets.

As in Once-for-all (Cai et al. 2020, arXiv 1908.09791, section 3.4) the best quarter of a
population's size are parents, half of the children are mutated and half crossed, and none breaks a
budget. But accuracies are measured, not predicted, since a network is generated in a fraction of
its forward pass and needs no calibration; a child beyond a budget is narrowed, half of the others
use it up, so that its edge is searched, where the best ones lie; and a fifth of the children come
from anywhere on the front, for the sake of the table. Age plays no role, unlike in regularised
evolution (Real et al. 2019): a network gets the same accuracy whenever it is evaluated.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from neumeta_jax.networks.families import Family
from neumeta_jax.search.budgets import Cost, Space, Widths, allows, shallow_networks

PARENTS = 0.25  # of a population (Cai et al. 2020)
MUTATED_BLOCKS = 0.1  # of the blocks of a child, at least one (Cai et al. 2020)
MUTATION_STEP = 0.2  # standard deviation, as a share of a block's choices
FRONT_RATE = 0.2  # of the children come from anywhere on the front, not from the best
SKIP_RATE = 0.2  # of the mutations of a block that may be skipped
MAX_UNIFORM = 64


class Score(NamedTuple):
    """Of a network on some images: its accuracy in [0, 1] and its mean cross-entropy in nats."""

    accuracy: float
    loss: float


class Candidate(NamedTuple):
    """A network that was evaluated, and when."""

    widths: Widths
    score: Score
    generation: int


def rank(family: Family, widths: Widths, score: Score) -> tuple:
    """Of the better network it is smaller: by accuracy, loss, and then multiply-adds."""
    return -score.accuracy, score.loss, family.num_macs(widths)


def pareto_front(amounts: Sequence[float], scores: Sequence[Score]) -> list[bool]:
    """Which networks are more accurate than all that cost less, and the best that cost as much.

    >>> scores = [Score(0.5, 1.2), Score(0.4, 1.4), Score(0.6, 1.1), Score(0.6, 1.0)]
    >>> pareto_front([1, 2, 3, 3], scores)
    [True, False, False, True]
    """
    front, best = [False] * len(amounts), -math.inf
    for n in sorted(range(len(amounts)), key=lambda n: (amounts[n], -scores[n][0], scores[n][1])):
        if scores[n].accuracy > best:
            front[n], best = True, scores[n].accuracy
    return front


@dataclasses.dataclass(frozen=True)
class _Evolution:
    """Proposes populations of `size` networks within the budgets; depends on its arguments alone.

    A population of a generation has a random generator of its own.
    """

    space: Space
    costs: Sequence[Cost]
    size: int
    seed: int

    def first(self, uniform: Sequence[Widths], limit: int) -> list[Widths]:
        """The uniform networks, shallow ones, and at least half of `size` at random.

        No more than half of `limit`, the candidates of the whole search, are uniform.
        """
        rng = np.random.default_rng([self.seed, 0])
        allowed = [widths for widths in uniform if allows(self.costs, widths)]
        most = max(1, min(MAX_UNIFORM, limit // 2))
        if len(allowed) > most:  # evenly, with the largest and, if there is room, the smallest
            picked = np.linspace(len(allowed) - 1, 0, most).round().astype(int)
            allowed = [allowed[n] for n in picked[::-1]]
        shallow = shallow_networks(self.space, self.costs, uniform)
        population = dict.fromkeys([*allowed, *shallow])
        wanted = len(population) + max(self.size - len(population), self.size // 2)
        self._add(population, wanted, (), lambda: self._random(rng))
        return list(population)

    def next(self, archive: Sequence[Candidate], generation: int) -> list[Widths]:
        """Up to `size` networks that are not in the archive; fewer only where few are left."""
        space, rng = self.space, np.random.default_rng([self.seed, generation])
        ranked = sorted(archive, key=lambda c: rank(space.family, c.widths, c.score))
        parents = [space.genes(c.widths) for c in ranked[: max(2, round(PARENTS * self.size))]]
        axis = next((cost for cost in self.costs if cost.limit is not None), self.costs[0])
        amounts = [axis.total(candidate.widths) for candidate in archive]
        on_front = pareto_front(amounts, [candidate.score for candidate in archive])
        front = [space.genes(c.widths) for c, on in zip(archive, on_front, strict=True) if on]

        def child() -> list[int]:
            if rng.random() < FRONT_RATE:
                genes = self._mutated(front[rng.integers(len(front))], rng)
                return self._within(genes, rng, fill=False)
            first = parents[rng.integers(len(parents))]
            if rng.random() < 0.5:
                genes = self._mutated(first, rng)
            else:
                second = parents[rng.integers(len(parents))]
                genes = [int(rng.choice(pair)) for pair in zip(first, second, strict=True)]
            return self._within(genes, rng, fill=rng.random() < 0.5)

        population: dict[Widths, None] = {}
        seen = {candidate.widths for candidate in archive}
        self._add(population, self.size, seen, child)
        # Parents that are all alike have few children.
        self._add(population, self.size, seen, lambda: self._random(rng))
        return list(population)

    def _add(self, population, size, seen, draw) -> None:
        """Draws until `population` has `size` networks, or nearly all draws were seen before."""
        for _ in range(50 * size):
            if len(population) >= size:
                break
            widths = self.space.widths(draw())
            if widths not in seen:
                population[widths] = None

    def _random(self, rng: np.random.Generator) -> list[int]:
        genes = []
        for choices, first in zip(self.space.choices, self.space.lowest, strict=True):
            skipped = first and rng.random() < SKIP_RATE
            genes.append(0 if skipped else int(rng.integers(first, len(choices))))
        return self._within(genes, rng, fill=rng.random() < 0.5)

    def _mutated(self, genes: Sequence[int], rng: np.random.Generator) -> list[int]:
        chosen = rng.random(len(genes)) < MUTATED_BLOCKS
        chosen[rng.integers(len(genes))] = True
        result = list(genes)
        for position in np.flatnonzero(chosen):
            choices, first = self.space.choices[position], self.space.lowest[position]
            if first and (result[position] == 0 or rng.random() < SKIP_RATE):
                skipped = result[position] != 0
                result[position] = 0 if skipped else int(rng.integers(first, len(choices)))
                continue
            step = rng.normal() * MUTATION_STEP * len(choices)
            step = math.copysign(max(1, round(abs(step))), step)
            result[position] = int(np.clip(result[position] + step, first, len(choices) - 1))
        return result

    def _within(self, genes: Sequence[int], rng: np.random.Generator, *, fill: bool) -> list[int]:
        """`genes` narrowed step by step until they keep the budgets, then widened if `fill`.

        Blocks are skipped only where narrowing all others is not enough.
        """
        genes, space, lowest = list(genes), self.space, self.space.lowest
        highest = [len(choices) - 1 for choices in space.choices]
        while not allows(self.costs, space.widths(genes)):
            free = [b for b, gene in enumerate(genes) if gene > lowest[b]]
            free = free or [b for b, gene in enumerate(genes) if gene > 0]
            if not free:
                break  # the smallest network, see check_budgets
            genes[free[rng.integers(len(free))]] -= 1
        free = [b for b, gene in enumerate(genes) if fill and lowest[b] <= gene < highest[b]]
        while free:
            position = free[rng.integers(len(free))]
            genes[position] += 1
            allowed = allows(self.costs, space.widths(genes))
            genes[position] -= not allowed
            if not allowed or genes[position] == highest[position]:
                free.remove(position)
        return genes


def evolve(
    space: Space,
    costs: Sequence[Cost],
    uniform: Sequence[Widths],
    evaluate: Callable[[list[Widths]], Sequence[Score]],
    archive: Sequence[Candidate] = (),
    *,
    num_candidates: int,
    population: int,
    seed: int,
) -> Iterator[list[Candidate]]:
    """Evaluates up to `num_candidates` networks, none twice; yields all so far per generation.

    Args:
        space, costs: the networks and their budgets.
        uniform: networks for the first population; those beyond a budget are left out.
        evaluate: scores of some networks, in their order.
        archive: what an earlier search has evaluated, in its order; this one goes on from there.
        num_candidates: how many, those in `archive` included.
        population: how many are evaluated between two selections.
        seed: equal seeds give equal networks.
    """
    archive, evolution = list(archive), _Evolution(space, costs, population, seed)
    for generation in itertools.count(archive[-1].generation + 1 if archive else 0):
        left = num_candidates - len(archive)
        if left <= 0:
            return
        proposed = (
            evolution.next(archive, generation) if generation else evolution.first(uniform, left)
        )
        proposed = proposed[:left]
        if not proposed:
            return
        pairs = zip(proposed, evaluate(proposed), strict=True)
        archive += [Candidate(widths, score, generation) for widths, score in pairs]
        yield archive
