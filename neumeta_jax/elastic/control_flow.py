"""Primitives with a jaxpr inside: loops, branches, and functions with rules of their own.

What each makes of the tracer, its params and its inputs is a step that runs programs of what is
inside. With `rules` this is what knows JAX's primitives.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.extend import core

from neumeta_jax.elastic.axes import Dim, unify
from neumeta_jax.elastic.program import Layers, Step, Value


def custom_jvp(tracer, params, ins):
    """Keeps the function's own rule of differentiation, traced at the first use of it."""
    body, start = tracer.body(params["call_jaxpr"], ins), params["num_consts"]

    def run(size, arrays):
        call = jax.custom_jvp(lambda *arrays: tuple(body.run(size, arrays)))

        @call.defjvp
        def differentiate(primals, tangents):
            constant = [t.dtype == jax.dtypes.float0 for t in tangents[start:]]
            jaxpr, consts, zeros = params["jvp_jaxpr_fun"].call_wrapped(*constant)
            moving = [start + n for n, zero in enumerate(constant) if not zero]
            values = [Value(ins[n].dims) for n in [*range(start, len(ins)), *moving]]
            rule = type(tracer)().body(core.ClosedJaxpr(jaxpr, consts), values)
            outs = rule.run(size, [*primals[start:], *(tangents[n] for n in moving)])
            results, moved = outs[: len(zeros)], iter(outs[len(zeros) :])
            out = [
                jnp.zeros_like(r) if zero else next(moved)
                for r, zero in zip(results, zeros, strict=True)
            ]
            return tuple(results), tuple(out)

        return list(call(*arrays))

    return Step(ins, body.outputs, run, bodies=((1, body),), transparent=True)


def remat(tracer, params, ins):
    body = tracer.body(core.ClosedJaxpr(params["jaxpr"], ()), ins)

    def run(size, arrays):
        function = functools.partial(body.run, size)
        return jax.checkpoint(function, policy=params["policy"])(arrays)

    return Step(ins, body.outputs, run, bodies=((1, body),), transparent=True)


def _carried(values, active):
    """What a loop carries, of whose numbers no more is told than whether the input changes them."""
    return [dataclasses.replace(v.opaque(), active=v.active or active) for v in values]


def _lengths(params):
    """How many inputs of a scan are constants, and how many are carried."""
    if "num_consts" in params:  # before JAX 0.12
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(list(constants)), len(list(carry))


def scan(tracer, params, ins):
    """Layers that are stacked along a leading axis have all the same widths.

    Each has products of its own, which are observed one by one.
    """
    first, split = _lengths(params)
    last = first + split
    active = any(value.active for value in ins)
    inner = [dataclasses.replace(v, view=v.view and n >= last) for n, v in enumerate(ins)]
    inner[first:last] = _carried(ins[first:last], active)
    length = Dim(params["length"], ["fixed"])
    for value in inner[last:]:
        unify(length, value.dims[0])
        value.dims = value.dims[1:]
        value.zero = frozenset(axis - 1 for axis in value.zero if axis)
    body = tracer.body(params["jaxpr"], inner)
    weights = {s.inputs[s.weight] for s in body.walk() if s.weight is not None}
    stacked = any(w.view and w.sources <= v.sources for w in weights for v in inner[last:])
    if stacked:
        length.note("layers")
    for before, after in zip(inner[first:last], body.outputs[: last - first], strict=True):
        for a, b in zip(before.dims, after.dims, strict=True):
            unify(a, b)
    sources = frozenset().union(*(value.sources for value in ins))
    outs = [dataclasses.replace(value, tail=None, looked_up=None) for value in body.outputs]
    for value in outs:
        value.sources = frozenset() if value.active else sources
    for value in outs[split:]:
        value.dims = (length, *value.dims)
        value.zero = frozenset(axis + 1 for axis in value.zero)

    def run(size, arrays):
        def layer(carry, slices):
            results = body.run(size, [*arrays[:first], *carry, *slices])
            return results[:split], results[split:]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, results = jax.lax.scan(layer, arrays[first:last], arrays[last:], **options)
        return [*carry, *results]

    order = range(params["length"])[:: -1 if params["reverse"] else 1]
    layers = Layers(first, last, order) if stacked else None
    return Step(ins, outs, run, bodies=((params["length"], body),), layers=layers)


def while_loop(tracer, params, ins):
    """What is carried has the same axes before and after each round."""
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    active = any(value.active for value in ins)
    carried = _carried(ins[second:], active)
    test = tracer.body(params["cond_jaxpr"], [*ins[:first], *carried])
    body = tracer.body(params["body_jaxpr"], [*ins[first:second], *carried])
    for before, after in zip(carried, body.outputs, strict=True):
        for a, b in zip(before.dims, after.dims, strict=True):
            unify(a, b)
    sources = frozenset().union(*(value.sources for value in ins))
    outs = _carried(body.outputs, active)  # they may be what the loop starts with
    for value in outs:
        value.sources = frozenset() if value.active else sources

    def run(size, arrays):
        def more(carry):
            return test.run(size, [*arrays[:first], *carry])[0]

        def advance(carry):
            return body.run(size, [*arrays[first:second], *carry])

        return jax.lax.while_loop(more, advance, list(arrays[second:]))

    return Step(ins, outs, run, bodies=((1, test), (1, body)))


def cond(tracer, params, ins):
    bodies = [tracer.body(branch, ins[1:]) for branch in params["branches"]]
    outs = []
    for values in zip(*(body.outputs for body in bodies), strict=True):
        for value in values[1:]:
            for a, b in zip(values[0].dims, value.dims, strict=True):
                unify(a, b)
        outs.append(dataclasses.replace(values[0], active=True, tail=None))

    def run(size, arrays):
        branches = [lambda *arrays, body=body: body.run(size, arrays) for body in bodies]
        return jax.lax.switch(arrays[0], branches, *arrays[1:])

    return Step(ins, outs, run, bodies=tuple((int(n == 0), body) for n, body in enumerate(bodies)))


BODIES = {
    "custom_jvp_call": custom_jvp,
    "remat2": remat,
    "scan": scan,
    "cond": cond,
    "while": while_loop,
}
TRANSPARENT = {"custom_jvp_call", "remat2"}
