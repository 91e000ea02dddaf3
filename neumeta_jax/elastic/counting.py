"""Parameters and multiply-adds as polynomials in the widths, for many networks at once."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from neumeta_jax.elastic.axes import Axis, Dim
from neumeta_jax.elastic.family import Family
from neumeta_jax.elastic.groups import Groups
from neumeta_jax.elastic.program import Program

Monomials = collections.Counter  # coefficients by the positions of the widths multiplied, ascending


@dataclasses.dataclass(frozen=True)
class Count:
    """A sum of products of widths; some terms are there only while certain widths are not 0.

    Attributes:
        terms: (coefficient, positions of the widths multiplied, positions that must not be 0).
    """

    terms: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]

    def __call__(self, widths: Any) -> Any:
        """An int for a sequence of widths, int64[rows] for an array [rows, names]."""
        if np.ndim(widths) == 1:
            return sum(
                coefficient * math.prod(int(widths[p]) for p in factors)
                for coefficient, factors, alive in self.terms
                if all(widths[p] for p in alive)
            )
        rows = np.asarray(widths, np.int64)
        total = np.zeros(len(rows), np.int64)
        for coefficient, factors, alive in self.terms:
            term = coefficient * np.prod(rows[:, list(factors)], axis=1)
            total += np.where(np.all(rows[:, list(alive)] > 0, axis=1), term, 0)
        return total


def _times(factors: Iterable[Monomials]) -> Monomials:
    result = Monomials({(): 1})
    for factor in factors:
        product = Monomials()
        for (a, x), (b, y) in itertools.product(result.items(), factor.items()):
            product[tuple(sorted(a + b))] += x * y
        result = product
    return result


def _count(terms: Mapping[tuple[int, ...], Monomials]) -> Count:
    """From monomials by what must not be 0 for them."""
    return Count(
        tuple(
            (coefficient, factors, alive)
            for alive, monomials in terms.items()
            for factors, coefficient in monomials.items()
            if coefficient
        )
    )


def params_count(groups: Groups, names: Sequence[str]) -> Count:
    """The numbers in the parameters, by the widths of `names`; see `num_params`."""
    positions = {name: n for n, name in enumerate(names)}

    def length(axis: Axis) -> Monomials:
        if axis.kind == "group" and axis.group in positions:
            return Monomials({(positions[axis.group],): 1})
        if axis.kind in ("fixed", "layers", "group"):
            return Monomials({(): axis.size})
        parts = [length(part) for part in axis.parts]
        return _times(parts) if axis.kind == "product" else sum(parts, Monomials())

    terms: dict[tuple[int, ...], Monomials] = collections.defaultdict(Monomials)
    for path, axes in groups.tensors:
        alive = tuple(n for n, name in enumerate(names) if path in (groups[name].skips or ()))
        terms[alive].update(_times(map(length, axes)))
    return _count(terms)


def macs_count(family: Family, names: Sequence[str]) -> Count:
    """Multiply-adds of one example, by the widths of `names`; see `num_macs`."""
    positions = {family.atoms[name].find(): n for n, name in enumerate(names)}

    def length(dim: Dim) -> Monomials:
        dim = dim.find()
        if dim.kind == "atom":
            varies = dim in positions
            return Monomials({(positions[dim],): 1} if varies else {(): dim.size})
        parts = [length(part) for part in dim.parts]
        return _times(parts) if dim.kind == "product" else sum(parts, Monomials())

    def count(program: Program) -> Monomials:
        total = Monomials()
        for step in program.steps:
            if step.contracted is not None:
                weights = step.inputs[1].dims
                summed = [weights[axis] for axis in step.contracted[1]]
                total.update(_times(map(length, (*summed, *step.outputs[0].dims))))
            for times, body in step.bodies:
                total.update({key: times * value for key, value in count(body).items()})
        return total

    (batch, *_), *_ = (value.dims for value in family.program.inputs if value.active)
    whole = count(family.program)
    return _count({(): Monomials({key: n // batch.size for key, n in whole.items()})})


def num_params(groups: Groups, widths: Mapping[str, int]) -> int:
    """Numbers in the parameters at `widths`; those of a skipped branch do not count.

    A branch of width 0 is not there, so that what has to be zero for it is left out too.
    """
    groups.check(widths, limited=False)
    return params_count(groups, tuple(widths))(tuple(widths.values()))


def num_macs(family: Family, widths: Mapping[str, int]) -> int:
    """Multiply-adds of dots and convolutions for one example at `widths`."""
    family.groups.check(widths, limited=False)
    return macs_count(family, tuple(widths))(tuple(widths.values()))
