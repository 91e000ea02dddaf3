"""From a jaxpr to a program, and what it tells about the axes of parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from neumeta_jax.core import rules
from neumeta_jax.core.axes import Dim
from neumeta_jax.core.program import Program, Step, Value


class Tracer:
    """Collects steps and what they tell: roles of axes, biases of products, skippable branches."""

    def __init__(self):
        self.steps, self.constants = [], []
        self.num_products, self.line = 0, ""
        self.roles = {}  # (path, axis): set of "read" and "write"
        self.written = []  # (dim, path) in the order of the network
        self.readers = {}  # product: (path, axes it reads, axes it writes)
        self.biases = {}  # product: (path, sign)
        self.skips = {}  # product: parameters applied between it and a skip connection
        self.frozen = set()  # parameters whose sign, root, logarithm or reciprocal matters

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
        value = Value(tuple(Dim(n, ["constant"]) for n in np.shape(array)))
        # As part of the code: arrays of JAX would be arguments of every program around it.
        is_key = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        self.constants.append((value, array if is_key else np.asarray(array)))
        return value

    def equation(self, eqn, ins: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        self.line = source_info_util.summarize(eqn.source_info) or self.line
        if name in rules.INLINED:
            return self.inline(params[rules.INLINED[name]], ins)
        if name in rules.BODIES:
            step = rules.BODIES[name](self, params, ins)
            self.steps.append(step)
            return step.outputs
        avals = [var.aval for var in eqn.outvars]
        rule = rules.find(name) or functools.partial(self.unknown, name)
        dims, resize = rule(params, ins, [aval.shape for aval in avals])
        outs = [self.result(name, ins, tuple(out)) for out in dims]

        def run(size, arrays):
            shapes = [tuple(map(size, out.dims)) for out in outs]
            if 0 in (n for array in arrays for n in array.shape):  # not every primitive takes it
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

    def result(self, name: str, ins: list[Value], dims: tuple[Dim, ...]) -> Value:
        """A value of `dims`, with what the primitive `name` passes on."""
        active = [value for value in ins if value.active]
        if name == "div" and active and ins[1].plain:
            self.frozen |= ins[1].sources
        if not active:
            sources = frozenset().union(*(value.sources for value in ins))
            zero = [value.zero for value in ins]
            zero = (
                (name in rules.ZERO_IF_ALL and all(zero))
                or (name in rules.ZERO_IF_ANY and any(zero))
                or (name == "div" and zero[0])
            )
            view = name in rules.MOVES and ins[0].view
            if name in rules.SIGNED and ins[-1].plain:
                self.frozen |= ins[-1].sources
            if name in rules.COMPARED:
                self.frozen |= frozenset().union(*(v.sources for v in ins if v.plain))
            varying = [value for value in ins if value.sources]
            plain = name in rules.MOVES | rules.LINEAR and [v.plain for v in varying] == [True]
            return Value(dims, sources=sources, view=view, plain=plain, zero=zero)
        out = Value(
            dims,
            active=True,
            writers=frozenset().union(*(value.writers for value in active)),
            ancestors=frozenset().union(*(value.ancestors for value in active)),
        )
        if len(active) == 1 and active[0].tail and name in rules.MOVES | rules.LINEAR:
            number, applied, bare = active[0].tail
            for place, value in enumerate(ins):
                if bare and value.view and (name, place) in rules.BIASES:
                    self.biases[number] = (*value.sources, rules.BIASES[name, place])
                applied |= value.sources
            if name != "div" or active[0] is ins[0]:
                out.tail = number, applied, bare and name in rules.MOVES
        elif len(active) == 2 and name in ("add", "sub"):
            for stream, branch in (active, active[::-1])[: 2 if name == "add" else 1]:
                if stream.writers <= branch.ancestors and not branch.writers <= stream.writers:
                    for dim in dims:
                        dim.note("stream")
                    if branch.tail:
                        self.skips[branch.tail[0]] = branch.tail[1]
        return out

    def product(self, step: Step, contracted: tuple, batch: tuple = ((), ())) -> None:
        """Notes who reads and who writes in a step that sums over the axes `contracted`."""
        step.number = self.num_products
        self.num_products += 1
        out = step.outputs[0]
        out.writers = frozenset([step.number])
        out.ancestors |= out.writers
        out.tail = step.number, frozenset(), True
        idle = [n for n, value in enumerate(step.inputs) if not value.active]
        if not idle:  # as in attention
            for axis in contracted[0]:
                step.inputs[0].dims[axis].note("paired")
        if len(idle) != 1:
            return
        step.weight = n = idle[0]
        for axis in contracted[n] if not step.inputs[n].zero else ():
            step.inputs[n].dims[axis].note("reduced")  # what is masked would still be summed
        axes = {"read": set(), "write": set()}  # of the parameter
        for axis, dim in enumerate(step.inputs[n].dims):
            for origin in sorted(dim.origins if axis not in batch[n] else ()):
                role = "read" if axis in contracted[n] else "write"
                self.roles.setdefault(origin, set()).add(role)
                axes[role].add(origin[1])
                if role == "write":
                    self.written.append((dim, origin[0]))
        if step.inputs[n].view:
            (path,) = step.inputs[n].sources
            self.readers[step.number] = path, *(tuple(sorted(axes[role])) for role in axes)
