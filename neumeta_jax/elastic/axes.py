"""Axes of arrays as terms over groups of channels.

An axis is atomic, a product of axes (heads x head size, the slowest first) or a concatenation of
axes (query | key | value). `Dim` is the term while a network is traced and unification refines it;
`Axis` is what remains of it, as data.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Dim:
    """A term that unification refines. Dims of size 1 carry no channels and tie nothing.

    Attributes:
        size: its length in the network that is traced.
        kind: "atom", "product" or "concat"; the last two have `parts`.
        notes: of an atom, why its size may not change.
        origins: (path, axis) of the parameters that it is an axis of.
    """

    _ages = itertools.count()

    def __init__(self, size: int, notes: Iterable[str] = (), kind: str = "atom", parts=()):
        self.size, self.kind, self.parts = int(size), kind, tuple(parts)
        self.notes: set[str] = set(notes)
        self.origins: frozenset[tuple[str, int]] = frozenset()
        self.age = next(Dim._ages)
        self._same_as: Dim | None = None

    def find(self) -> "Dim":
        """The term that this one has become."""
        dim = self
        while dim._same_as is not None:
            dim = dim._same_as
        if dim is not self:
            self._same_as = dim  # or chains grow with the depth of the network
        return dim

    def atoms(self) -> Iterator["Dim"]:
        dim = self.find()
        if dim.kind == "atom":
            yield dim
        for part in dim.parts:
            yield from part.atoms()

    def factors(self) -> Iterator["Dim"]:
        """The atoms without which nothing of the axis is left."""
        dim = self.find()
        if dim.kind == "atom":
            yield dim
        for part in dim.parts if dim.kind == "product" else ():
            yield from part.factors()

    def note(self, note: str) -> "Dim":
        for atom in self.atoms():
            atom.notes.add(note)
        return self

    def become(self, term: "Dim") -> None:
        """This atom turns out to be `term`."""
        for note in self.notes:
            term.note(note)
        self._same_as = term


def product(dims: Iterable[Dim]) -> Dim:
    dims = [dim for dim in dims if dim.size != 1]
    return dims[0] if len(dims) == 1 else Dim(math.prod(d.size for d in dims), (), "product", dims)


def concat(dims: Iterable[Dim]) -> Dim:
    dims = [dim for dim in dims if dim.size]
    return dims[0] if len(dims) == 1 else Dim(sum(d.size for d in dims), (), "concat", dims)


def _flat(dims: Iterable[Dim], kind: str) -> list[Dim]:
    dims = [dim.find() for dim in dims]
    nested = (_flat(dim.parts, kind) if dim.kind == kind else [dim] for dim in dims)
    return [dim for part in nested for dim in part if kind == "concat" or dim.size > 1]


def unify(a: Dim, b: Dim) -> None:
    """Makes two axes one. Where their structures contradict each other, all sizes become fixed."""
    a, b = a.find(), b.find()
    if a.size != b.size:
        raise ValueError(f"Axes of sizes {a.size} and {b.size} cannot be one.")
    if a is b or a.size <= 1:
        return
    if a.kind != "atom" or (b.kind == "atom" and a.age < b.age):
        a, b = b, a  # the younger atom becomes the older one, which others point to already
    if a.kind == "atom":
        if any(atom is a for atom in b.atoms()):  # it would be a part of itself
            b.note("fixed")
        else:
            a.become(b)
    else:
        align([a], [b], a.kind if a.kind == b.kind else "product")


def align(left: Iterable[Dim], right: Iterable[Dim], kind: str = "product") -> None:
    """Unifies two sequences of factors (or pieces) of one total, by splitting the larger ones."""
    left, right = _flat(left, kind), _flat(right, kind)
    while left and right:
        x, y = left.pop(0).find(), right.pop(0).find()
        if x.kind == kind or y.kind == kind:  # was split meanwhile
            left, right = _flat([x, *left], kind), _flat([y, *right], kind)
        elif x.size == y.size:
            unify(x, y)
        else:
            large, small = (x, y) if x.size > y.size else (y, x)
            rest = large.size // small.size if kind == "product" else large.size - small.size
            divides = kind == "concat" or large.size % small.size == 0
            if large.kind != "atom" or not divides or any(atom is large for atom in small.atoms()):
                for dim in (x, y, *left, *right):
                    dim.note("fixed")
                return
            large.become(Dim(large.size, (), kind, (small, Dim(rest))))
            (left if large is x else right).insert(0, large.find().parts[1])


def join(dims: list[Dim]) -> Dim:
    """The one axis that all of `dims` are, of all their parameters."""
    for dim in dims[1:]:
        unify(dims[0], dim)
    origins = frozenset().union(*(dim.origins for dim in dims))
    if origins == dims[0].origins:
        return dims[0]
    joint = Dim(dims[0].size)
    unify(dims[0], joint)
    joint.origins = origins
    return joint


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a parameter: `kind` is "fixed", "layers", "group", "product" or "concat".

    Along "layers" lie the parameters of layers that run one after the other in a loop.
    `widths` are ints by group name; a group that is not in them has its full size. `sizes` are
    those of a container: a network of the same family with more, or fewer, channels.
    """

    kind: str
    size: int
    group: str = ""
    parts: tuple["Axis", ...] = ()

    def groups(self) -> Iterator[str]:
        if self.kind == "group":
            yield self.group
        for part in self.parts:
            yield from part.groups()

    def factors(self) -> tuple["Axis", ...]:
        """The factors of a product, the slowest first; any other axis is its only factor."""
        return self.parts if self.kind == "product" else (self,)

    def width(self, widths: Mapping) -> Any:
        """How long the axis is at `widths`, which may be traced."""
        if self.kind in ("fixed", "layers"):
            return self.size
        if self.kind == "group":
            return widths.get(self.group, self.size)
        parts = (part.width(widths) for part in self.parts)
        return math.prod(parts) if self.kind == "product" else sum(parts)

    def resized(self, sizes: Mapping[str, int]) -> "Axis":
        """The axis in a network whose groups have `sizes`."""
        parts = tuple(part.resized(sizes) for part in self.parts)
        return dataclasses.replace(self, size=self.width(sizes), parts=parts)

    def mask(self, widths: Mapping, sizes: Mapping = {}) -> jax.Array:
        """bool[length at `sizes`]: the channels there are at `widths`, which may be traced."""
        if self.kind == "group" and self.group in widths:
            return jnp.arange(sizes.get(self.group, self.size)) < widths[self.group]
        masks = [part.mask(widths, sizes) for part in self.parts]
        if self.kind == "concat":
            return jnp.concatenate(masks)
        if self.kind == "product":
            keep = masks[0]
            for mask in masks[1:]:
                keep = (keep[:, None] & mask).reshape(-1)
            return keep
        return jnp.ones(self.width(sizes), bool)

    def channels(self, chosen: Mapping) -> np.ndarray:
        """int[new length]: what remains when a group consists of its channels `chosen[group]`."""
        if self.kind == "group" and self.group in chosen:
            return np.asarray(chosen[self.group])
        if self.kind in ("group", "fixed", "layers"):
            return np.arange(self.size)
        channels, offset = np.zeros(int(self.kind == "product"), int), 0
        for part in self.parts:
            inner = part.channels(chosen)
            if self.kind == "product":
                channels = (channels[:, None] * part.size + inner).reshape(-1)
            else:
                channels, offset = np.append(channels, offset + inner), offset + part.size
        return channels
