"""A traced network as a program whose steps also run at other sizes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neumeta_jax.elastic.axes import Dim


class Tail(NamedTuple):
    """What has been done to the result of a product, such that it is 0 where the result is.

    Attributes:
        product: its number.
        added: the parameters that were added since, and have to be 0 too.
        bare: only moves since, so that a bias may follow.
    """

    product: int
    added: frozenset[str] = frozenset()
    bare: bool = True


@dataclasses.dataclass(eq=False)
class Value:
    """An intermediate array.

    Attributes:
        dims: its axes.
        active: it depends on the input.
        sources: the parameters it depends on, while it is not active.
        view: it is a parameter, at most moved and cast.
        plain: it is a parameter, at most moved, cast, shifted and scaled by constants.
        vanishing: it is 0 if all its parameters are.
        zero: the axes along which it is 0 for the channels whose parameters are masked.
        writers: the products that its channels come from.
        ancestors: all products before it.
        tail: of what a single product has written.
        looked_up: the number of the lookup, where it is a parameter at places that depend on the
            input, at most moved and cast.
    """

    dims: tuple[Dim, ...]
    active: bool = False
    sources: frozenset = frozenset()
    view: bool = False
    plain: bool = False
    vanishing: bool = False
    zero: frozenset[int] = frozenset()
    writers: frozenset = frozenset()
    ancestors: frozenset = frozenset()
    tail: Tail | None = None
    looked_up: int | None = None

    def opaque(self) -> "Value":
        """A value of the same origin of whose numbers nothing is told."""
        return Value(
            self.dims, self.active, self.sources, writers=self.writers, ancestors=self.ancestors
        )


class Layers(NamedTuple):
    """How a loop goes through stacked layers.

    Its inputs are constants before `first`, what is carried before `last`, and what is stacked; its
    outputs are what is carried and what is stacked. `order` is that of the layers.
    """

    first: int
    last: int
    order: Sequence[int]

    @property
    def carried(self) -> int:
        return self.last - self.first


@dataclasses.dataclass(eq=False)
class Step:
    """`run(size, arrays)` computes `outputs` from `inputs`; `size` tells the int of a `Dim`.

    A dot or convolution sums over the axes `contracted[i]` of operand i. One that mixes channels is
    a product and has a `number`.

    Attributes:
        bodies: (times, program) inside; 0 times where another one is counted in its place.
        transparent: running the only body gives the same outputs.
        weight: which operand of a product does not depend on the input.
        layers: of a loop over stacked layers.
    """

    inputs: list[Value]
    outputs: list[Value]
    run: Callable[[Callable[[Dim], int], Sequence[jax.Array]], list[jax.Array]]
    bodies: tuple[tuple[int, "Program"], ...] = ()
    transparent: bool = False
    contracted: tuple | None = None
    number: int | None = None
    weight: int | None = None
    layers: Layers | None = None

    def run_each(self, size, arrays: Sequence[jax.Array], observe, outer: int) -> list[jax.Array]:
        """As `run`, layer by layer, each of which is observed; `outer` is the layer this is in."""
        assert self.layers
        (first, last, order), carried = self.layers, self.layers.carried
        carry, stacked = arrays[first:last], {}
        for n in order:
            given = [*arrays[:first], *carry, *(array[n] for array in arrays[last:])]
            out = self.bodies[0][1].run(size, given, observe, outer * len(order) + n)
            carry, stacked[n] = out[:carried], out[carried:]
        results = zip(*(stacked[n] for n in range(len(order))), strict=True)
        return [*carry, *map(jnp.stack, results)]

    def summed(self, operand: int) -> list[Dim]:
        """The axes of an operand that a product sums over."""
        return [self.inputs[operand].dims[axis] for axis in (self.contracted or ((), ()))[operand]]


@dataclasses.dataclass(eq=False)
class Program:
    inputs: list[Value]
    outputs: list[Value]
    steps: list[Step]
    constants: list[tuple[Value, Any]]

    def walk(self) -> Iterator[Step]:
        """All steps, those inside of others too."""
        for step in self.steps:
            yield step
            for _, body in step.bodies:
                yield from body.walk()

    def run(
        self,
        size: Callable[[Dim], int],
        arrays: Sequence[jax.Array],
        observe: Callable[[Step, Sequence[jax.Array], int], None] | None = None,
        layer: int = 0,
    ) -> list[jax.Array]:
        """The outputs at the sizes that `size` tells.

        Calls `observe(step, arrays, layer)` for each step, with the number of the layer where these
        are stacked, else 0.

        Raises:
            ValueError: where an array that the network holds as a constant would have to grow.
        """
        values = dict(zip(self.inputs, arrays, strict=True))
        for value, array in self.constants:
            shape = tuple(map(size, value.dims))
            if any(new > old for new, old in zip(shape, array.shape, strict=True)):
                raise ValueError(
                    f"Widths beyond the full size need no constant tied to them, but one of shape "
                    f"{array.shape} would have to grow to {shape}; make it a parameter."
                )
            values[value] = array[tuple(map(slice, shape))] if shape else array
        for step in self.steps:
            arrays = [values[value] for value in step.inputs]
            if observe and step.transparent:
                results = step.bodies[0][1].run(size, arrays, observe, layer)
            elif observe and step.layers:
                results = step.run_each(size, arrays, observe, layer)
            else:
                results = step.run(size, arrays)
            if observe:
                observe(step, arrays, layer)
            values.update(zip(step.outputs, results, strict=True))
        return [values[value] for value in self.outputs]
