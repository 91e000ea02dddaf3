"""A search from its first population to its winners; what was interrupted continues.

What it has to guard against is the best of a thousand on the same images: the finalists, the best
20 and the best five uniform networks (one ratio for all blocks), are evaluated on the entire
validation split, which decides. Uniform networks, from the smallest to the largest within the
budget, are in the first population, so that on this split the winner is at least as good as they
are. The test split is read for the winner and the best uniform network only.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from neumeta_jax.evaluation.buckets import container_macs, make_buckets
from neumeta_jax.evaluation.evaluator import Evaluator
from neumeta_jax.evaluation.programs import compilation_macs
from neumeta_jax.files.provenance import format_seconds
from neumeta_jax.search import latency
from neumeta_jax.search.budgets import UNITS, Cost, Space, Widths, check_budgets, latency_cost
from neumeta_jax.search.evolution import Candidate, Score, evolve, pareto_front, rank
from neumeta_jax.search.record import Record

NUM_FINALISTS = 20
NUM_UNIFORM_FINALISTS = 5
MAX_CONTAINERS = 16


def add_containers(
    space: Space, containers: Sequence[Widths], widths: Sequence[Widths], macs_per_container: float
) -> list[Widths]:
    """`containers` and those that pay for their compilation in this population already.

    Widths of containers are multiples of a quarter of the full width, so that later populations
    fit into them too. The first is the largest network, which holds all.

    `macs_per_container` are the multiply-adds of one image that take as long as compiling a shape,
    divided by the number of images.
    """
    num_macs, largest, rows = space.family.num_macs, space.ends[1], np.array(widths)
    found = list(containers) or [largest]
    step = np.array([max(1, round(full / 4)) for full in space.family.full_widths])
    rounded = np.minimum(-(-rows // step) * step, largest)
    buckets = make_buckets(num_macs, rounded, macs_per_bucket=macs_per_container)
    proposed = dict.fromkeys(tuple(bucket.container) for bucket in buckets)
    proposed = [row for row in proposed if row not in found]
    now = container_macs(num_macs, rows, np.array(found)).min(axis=1)
    while proposed and len(found) < MAX_CONTAINERS:
        costs = container_macs(num_macs, rows, np.array(proposed))
        saved = np.maximum(now[:, None] - costs, 0).sum(axis=0)
        best = int(np.argmax(saved))
        if saved[best] <= macs_per_container:
            break
        now = np.minimum(now, costs[:, best])
        found.append(proposed.pop(best))
    return found


def _loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@dataclasses.dataclass
class Session:
    """A search with all that it works on.

    Attributes:
        record: how far it is.
        space, uniform: the networks, and those of one width ratio.
        costs: what they may cost, or what is only reported; the first has a limit.
        evaluators: by name, "candidates", "validation" and, if it is to be read, "test".
        options: of the command line.
    """

    record: Record
    space: Space
    uniform: Sequence[Widths]
    costs: list[Cost]
    evaluators: dict[str, Evaluator]
    options: Any

    def search(self) -> dict[str, Widths]:
        """The networks "searched" and, if one keeps the budgets, "best uniform"."""
        self._evolve()
        archive, facts, uniform = self.record.archive, self.record.facts, set(self.uniform)
        # The estimate of a latency may be too low for all, but the smallest network was measured.
        finalists = self._finalists(archive, NUM_FINALISTS) or [self.space.ends[0]]
        even = [candidate for candidate in archive if candidate.widths in uniform]
        even = self._finalists(even, NUM_UNIFORM_FINALISTS)
        self._complete([*finalists, *even], "validation")

        def order(row: Widths) -> tuple:
            score = Score(*(facts[row][f"validation_{name}"] for name in Score._fields))
            return *rank(self.space.family, row, score), row

        winners = {"searched": min([*finalists, *even], key=order)}
        if even:
            winners["best uniform"] = min(even, key=order)
        if "test" in self.evaluators:
            self._complete(winners.values(), "test")
        return winners

    def add_latency(self) -> list[str]:
        """Makes latency one of the costs, from measurements that the record keeps; notes on it."""
        record, limit = self.record, self.options.max_latency_ms
        print("measuring latencies", flush=True)
        cost = latency_cost(self.space, limit, self._latency)
        if record.noise is None:
            again = [abs(self._measure(row) - self._latency(row)) for row in self.space.ends]
            record.noise = max(again)
        print(f"two measurements of one network differ by {record.noise:.3f} ms")
        record.write()
        self.costs.append(cost)
        self.costs.sort(key=lambda cost: cost.limit is None)
        return check_budgets(self.space, [cost], record.noise)

    def _latency(self, widths: Widths) -> float:
        """Milliseconds, measured once."""
        facts = self.record.facts[widths]
        if "latency_ms" not in facts:
            facts["latency_ms"] = round(self._measure(widths), 4)
        return facts["latency_ms"]

    def _measure(self, widths: Widths) -> float:
        dtype = self.evaluators["candidates"].preprocessing.dtype
        options = {"batch": self.options.latency_batch, "dtype": dtype}
        return latency.milliseconds(self.space.family, widths, **options)

    def _evolve(self) -> None:
        """Fills the archive; the record is written after each generation."""
        record, options, cost = self.record, self.options, self.costs[0]
        started, before, first = time.perf_counter(), record.seconds, len(record.archive)
        sizes = {name: getattr(options, name) for name in ("num_candidates", "population", "seed")}
        networks = self.space, self.costs, self.uniform
        if first:
            print(f"continuing after {first} candidates")
        for archive in evolve(*networks, self._evaluate, record.archive, **sizes):
            elapsed = time.perf_counter() - started
            record.archive, record.seconds = archive, round(before + elapsed, 1)
            record.write()
            left = (options.num_candidates - len(archive)) * elapsed / (len(archive) - first)
            shapes = len(record.containers)
            leader = min(archive, key=lambda c: rank(self.space.family, c.widths, c.score))
            print(
                f"generation {archive[-1].generation} | {len(archive)}/{options.num_candidates} "
                f"candidates | best {100 * leader.score.accuracy:.2f} %, loss "
                f"{leader.score.loss:.4f}, at {cost.text(cost.total(leader.widths))} "
                f"{UNITS[cost.name]} | {shapes} shape{'s' * (shapes != 1)} | "
                f"{format_seconds(elapsed)}, ETA {format_seconds(left)}",
                flush=True,
            )
            if options.time_limit is not None and elapsed >= 60 * options.time_limit:
                break

    def _evaluate(self, widths: Sequence[Widths]) -> list[Score]:
        record, number = self.record, len(self.evaluators["candidates"].labels)
        worth = compilation_macs(jax.default_backend()) / number
        record.containers = add_containers(self.space, record.containers, widths, worth)
        return self._scores("candidates", widths, containers=record.containers)

    def _scores(self, name: str, widths: Sequence[Widths], **containers: Any) -> list[Score]:
        evaluator, record = self.evaluators[name], self.record
        if evaluator.strategy == "auto" != record.strategy:
            evaluator = dataclasses.replace(evaluator, strategy=record.strategy)
            self.evaluators[name] = evaluator
        plan = evaluator.plan(widths, per_image=_loss, **containers)
        correct, losses = evaluator.score(plan)
        record.strategy, accuracies = plan.strategy, correct / len(evaluator.labels)
        losses = losses.mean(axis=1, dtype=np.float64).round(6)
        return list(map(Score, accuracies.tolist(), losses.tolist()))

    def _complete(self, widths: Iterable[Widths], split: str) -> None:
        """Finds out the scores of `widths` on an entire split."""
        facts, number = self.record.facts, len(self.evaluators[split].labels)
        missing = [row for row in dict.fromkeys(widths) if f"{split}_loss" not in facts[row]]
        if missing:
            some = f"{len(missing)} network{'s' * (len(missing) != 1)}"
            print(f"{some} on all {number} {split} images", flush=True)
            for row, score in zip(missing, self._scores(split, missing), strict=True):
                facts[row] |= {f"{split}_{name}": x for name, x in score._asdict().items()}
            self.record.write()

    def _finalists(self, some: Iterable[Candidate], number: int) -> list[Widths]:
        ranked = sorted(some, key=lambda c: rank(self.space.family, c.widths, c.score))
        limit = self.options.max_latency_ms
        fitting = (c.widths for c in ranked if limit is None or self._latency(c.widths) <= limit)
        return list(itertools.islice(fitting, number))

    def table(self) -> list[dict[str, Any]]:
        """A row for each network that was evaluated, in order; the front is over `costs[0]`."""
        rows, archive, uniform = [], self.record.archive, set(self.uniform)
        amounts = [self.costs[0].total(candidate.widths) for candidate in archive]
        front = pareto_front(amounts, [candidate.score for candidate in archive])
        for (widths, score, generation), on_front in zip(archive, front, strict=True):
            facts = self.record.facts.get(widths, {})
            row: dict[str, Any] = {"widths": list(widths)}
            row |= {cost.column: round(cost.total(widths), 4) for cost in self.costs}
            row |= score._asdict()
            row |= {f"validation_{n}": facts.get(f"validation_{n}") for n in Score._fields}
            row |= {"generation": generation, "uniform": widths in uniform, "front": on_front}
            rows.append(row)
        return rows

    def describe(self, widths: Widths) -> dict[str, Any]:
        """What is known of a network that was chosen."""
        family, facts = self.space.family, self.record.facts[widths]
        counts = {"num_params": family.num_params(widths), "num_macs": family.num_macs(widths)}
        return {"widths": list(widths), **counts, **facts}
