"""From a jaxpr to a program, and what it tells about the axes of parameters."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from neumeta_jax.elastic import control_flow, rules
from neumeta_jax.elastic.axes import Dim
from neumeta_jax.elastic.program import Program, Step, Tail, Value


class Skip(NamedTuple):
    """Where a residual branch ends.

    Attributes:
        total: the sum of stream and branch.
        stream: what the branch is added to.
        added: the parameters that are 0 where the branch is skipped.
    """

    total: Value
    stream: Value
    added: frozenset[str]


class Tracer:
    """Collects steps and what they tell: roles of axes, biases of products, skippable branches."""

    def __init__(self):
        self.steps, self.constants = [], []
        self.num_products, self.line = 0, ""
        self.roles = {}  # (path, axis): set of "read" and "write"
        self.written = []  # (number of the product, dim, path)
        self.readers = {}  # product: (path, axes it reads, axes it writes)
        self.biases = {}  # product: (path, sign)
        self.lookups = {}  # number: (step, axes), while nothing tells whether it picks weights
        self.skips = {}  # product: where a residual branch ends that begins with it
        self.frozen = set()  # parameters whose sign, root, logarithm or reciprocal matters
        self.lost_rules = False  # whether a function has a rule of differentiation left out here

    def network(self, closed: core.ClosedJaxpr, inputs: list[Value]) -> Program:
        """The program of the whole network."""
        program = self.body(closed, inputs)
        for step, _ in list(self.lookups.values()):
            self.embed(step.outputs[0])
        return program

    def body(self, closed: core.ClosedJaxpr, inputs: list[Value]) -> Program:
        """A jaxpr as a program of its own."""
        outer, self.steps, self.constants = (self.steps, self.constants), [], []
        outputs = self.inline(closed, inputs)
        program = Program(inputs, outputs, self.steps, self.constants)
        self.steps, self.constants = outer
        return program

    def inline(self, closed: core.ClosedJaxpr, inputs: list[Value]) -> list[Value]:
        """The outputs of a jaxpr, after adding its steps."""
        values = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        values.update(zip(closed.jaxpr.constvars, map(self.constant, closed.consts), strict=True))

        def read(var):
            return self.constant(var.val) if isinstance(var, core.Literal) else values[var]

        for eqn in closed.jaxpr.eqns:
            outs = self.equation(eqn, [read(var) for var in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in closed.jaxpr.outvars]

    def constant(self, array) -> Value:
        dims = tuple(Dim(n, ["constant"]) for n in np.shape(array))
        # As part of the code: arrays of JAX would be arguments of every program around it.
        is_key = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        array = array if is_key else np.asarray(array)
        value = Value(dims, vanishing=not is_key and not np.any(array))
        self.constants.append((value, array))
        return value

    def equation(self, eqn, ins: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        self.line = source_info_util.summarize(eqn.source_info) or self.line
        if name in rules.IGNORED:
            return ins
        if name in rules.INLINED:
            self.lost_rules |= name == "custom_vjp_call"
            return self.inline(params["jaxpr" if "jaxpr" in params else "call_jaxpr"], ins)
        if name not in rules.MOVES | control_flow.TRANSPARENT | rules.PRODUCTS.keys():
            for value in ins:
                self.embed(value)
        if name in control_flow.BODIES:
            step = control_flow.BODIES[name](self, params, ins)
            self.steps.append(step)
            return step.outputs
        avals = [var.aval for var in eqn.outvars]
        rule = rules.find(name, params) or functools.partial(self.unknown, name)
        dims, resize = rule(params, ins, [aval.shape for aval in avals])
        outs = [self.result(name, params, ins, tuple(out)) for out in dims]

        def run(size, arrays):
            shapes = [tuple(map(size, out.dims)) for out in outs]
            empty = all(0 in shape for shape in shapes)  # not every primitive takes that
            if empty or (name in rules.PRODUCTS and any(0 in array.shape for array in arrays)):
                return [jnp.zeros(s, aval.dtype) for s, aval in zip(shapes, avals, strict=True)]
            results = eqn.primitive.bind(*arrays, **params | (resize(size) if resize else {}))
            return results if eqn.primitive.multiple_results else [results]

        step = Step(ins, outs, run)
        if name in rules.PRODUCTS:
            rules.PRODUCTS[name](self, params, step)
        self.steps.append(step)
        return outs

    def unknown(self, name: str, params, ins, shapes):
        """The rule for other primitives: they keep their sizes, and must not meet channels."""
        for dim in (dim for value in ins for dim in value.dims):
            if any("parameter" in atom.notes for atom in dim.atoms()):
                raise rules.UnknownPrimitive(
                    f"No rule tells what the primitive {name} ({self.line}) does to the axis of "
                    f"{dim.size} channels that it meets; write that line with other primitives, "
                    "or add a rule to rules.RULES."
                )
            dim.note("fixed")
        return [[Dim(n, ["fixed"]) for n in shape] for shape in shapes], None

    def result(self, name: str, params, ins: list[Value], dims: tuple[Dim, ...]) -> Value:
        """A value of `dims`, with what the primitive `name` passes on."""
        active = [value for value in ins if value.active]
        self.freeze(name, params, ins)
        zero = rules.zero_axes(name, params, ins, tuple(dim.size for dim in dims))
        moved = name in rules.MOVES
        if not active:
            sources = frozenset().union(*(value.sources for value in ins))
            varying = [value for value in ins if value.sources]
            return Value(
                dims,
                sources=sources,
                view=moved and ins[0].view,
                plain=(moved or name in rules.LINEAR) and [v.plain for v in varying] == [True],
                vanishing=rules.vanishes(name, ins),
                zero=zero,
            )
        out = Value(
            dims,
            active=True,
            zero=zero if moved or name == "gather" else frozenset(),
            looked_up=ins[0].looked_up if moved else None,
            writers=frozenset().union(*(value.writers for value in active)),
            ancestors=frozenset().union(*(value.ancestors for value in active)),
        )
        if len(active) == 1:
            out.tail = self.tail(name, ins)
        elif len(active) == 2 and name in ("add", "sub"):
            for stream, branch in (active, active[::-1])[: 2 if name == "add" else 1]:
                if stream.writers <= branch.ancestors and not branch.writers <= stream.writers:
                    for dim in dims:
                        dim.note("stream")
                    if branch.tail:
                        self.skips[branch.tail.product] = Skip(out, stream, branch.tail.added)
        return out

    def freeze(self, name: str, params, ins: list[Value]) -> None:
        """Notes the parameters whose sign, root, logarithm or reciprocal a primitive takes."""
        sensitive = [ins[rules.SIGNED[name]]] if name in rules.SIGNED else []
        if name == "integer_pow" and params["y"] >= 0:
            sensitive = []
        if name in rules.COMPARED and not any(value.active for value in ins):
            sensitive = ins
        for value in sensitive:
            if value.plain:
                self.frozen |= value.sources

    def tail(self, name: str, ins: list[Value]) -> Tail | None:
        """Of a result with one active operand; None where that may be 0 and the result is not."""
        ((place, active),) = ((n, value) for n, value in enumerate(ins) if value.active)
        idle = [(n, value) for n, value in enumerate(ins) if not value.active]
        if active.tail is None or name not in rules.MOVES | rules.LINEAR:
            return None
        number, added, bare = active.tail
        for n, value in idle:
            if bare and value.view and (name, n) in rules.BIASES:
                self.biases[number] = (*value.sources, rules.BIASES[name, n])
        if name in ("add", "sub"):
            if not all(value.vanishing for _, value in idle):
                return None
            added = added.union(*(value.sources for _, value in idle))
        if name == "div" and place == 1:
            return None
        return Tail(number, added, bare and name in rules.MOVES)

    def product(self, step: Step, contracted: tuple, batch: tuple = ((), ())) -> None:
        """Notes who reads and who writes in a step that sums over the axes `contracted`."""
        self.number(step)
        operands = step.inputs[:2]
        idle = [n for n, value in enumerate(operands) if not value.active]
        weights = idle or [n for n, value in enumerate(operands) if value.looked_up is not None]
        step.weight = weights[0] if len(weights) == 1 else None
        for n, value in enumerate(operands):
            if n == step.weight:
                self.lookups.pop(value.looked_up, None)
            else:
                self.embed(value)
        if step.weight is not None:
            self.weigh(step, step.weight, contracted[step.weight], batch[step.weight])
        elif not idle:  # as in attention
            for axis in contracted[0]:
                operands[0].dims[axis].note("paired")
        else:  # a weight that is computed from others
            for i, j in zip(*contracted, strict=False):
                if i not in operands[0].zero and j not in operands[1].zero:
                    operands[0].dims[i].note("reduced")

    def number(self, step: Step) -> None:
        """Counts a step as a product, which writes what comes out of it."""
        step.number = self.num_products
        self.num_products += 1
        out = step.outputs[0]
        out.writers = frozenset([step.number])
        out.ancestors |= out.writers
        out.tail = Tail(step.number)

    def lookup(self, step: Step, contracted: tuple) -> None:
        """Notes a step that picks from a parameter: an embedding, unless its result is a weight."""
        self.number(step)
        self.lookups[step.number] = step, contracted
        step.outputs[0].looked_up = step.number

    def embed(self, value: Value) -> None:
        """An embedding writes what is looked up."""
        if value.looked_up in self.lookups:
            step, contracted = self.lookups.pop(value.looked_up)
            step.weight = 0
            self.weigh(step, 0, contracted[0])

    def weigh(self, step: Step, n: int, contracted: tuple, batch: tuple = ()) -> None:
        """Notes what the operand `n`, a parameter or computed from some, reads and writes."""
        weight = step.inputs[n]
        for axis in set(contracted) - weight.zero:
            weight.dims[axis].note("reduced")  # what is masked would still be summed
        axes = {"read": set(), "write": set()}  # of the parameter
        for axis, dim in enumerate(weight.dims):
            for origin in sorted(dim.origins if axis not in batch else ()):
                role = "read" if axis in contracted else "write"
                self.roles.setdefault(origin, set()).add(role)
                axes[role].add(origin[1])
                if role == "write":
                    self.written.append((step.number, dim, origin[0]))
        if weight.view:
            (path,) = weight.sources
            self.readers[step.number] = path, *(tuple(sorted(axes[role])) for role in axes)

    def skippable(self, program: Program) -> dict[Dim, frozenset[str]]:
        """The parameters to be 0 at width 0, by the atoms where the rest is the identity then.

        All that reads such an atom ends in residual branches, and so does what is added to them.
        """
        steps = {step.number: step for step in program.walk() if step.number is not None}
        readers = collections.defaultdict(set)
        for number, step in steps.items():
            for dim in (dim for operand in (0, 1) for dim in step.summed(operand)):
                for atom in dim.atoms():
                    readers[atom].add(number)
        skips = collections.defaultdict(list)
        for number, skip in self.skips.items():
            weight = steps[number].weight
            for dim in steps[number].summed(weight) if weight is not None else ():
                for atom in dim.factors():
                    skips[atom].append(skip)
        added = {atom: frozenset().union(*(s.added for s in skips[atom])) for atom in skips}
        return {
            atom: added[atom]
            for atom in skips
            if not added[atom] & self.frozen
            and not any(atom in dim.atoms() for s in skips[atom] for dim in s.total.dims)
            and confined(program, skips[atom], readers[atom], added[atom])
        }


def confined(program: Program, skips: list[Skip], products: set[int], paths: frozenset) -> bool:
    """Whether products and parameters change only what is added to the streams of `skips`."""
    totals = {skip.total: skip.stream for skip in skips}
    changed = {value for value in program.inputs if value.sources & paths}
    for step in program.steps:
        inner = [s for _, body in step.bodies for s in body.walk()]
        if any(out in totals for s in inner for out in s.outputs):
            if any(value.active for value in changed.intersection(step.inputs)):
                return False
            if not all(confined(body, skips, products, paths) for _, body in step.bodies):
                return False
        elif ends := [out for out in step.outputs if out in totals]:
            if totals[ends[0]] in changed:
                return False
        elif not changed.isdisjoint(step.inputs) or any(
            s.number in products for s in (step, *inner)
        ):
            changed.update(step.outputs)
    return changed.isdisjoint(program.outputs)
