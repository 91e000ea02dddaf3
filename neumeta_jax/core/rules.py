"""What each primitive of JAX does to the axes of arrays: the one module that knows their names.

A rule (params, inputs, shapes of the outputs) gives the dims of each output, unifies those of the
inputs where the primitive ties them, and returns, where sizes are among the params of the
primitive, a function of `size` (the int of a `Dim` at the widths asked for) that computes these.

A primitive without a rule may not meet channels: nothing is guessed. To add one, write its rule
and enter it into `RULES`. Primitives and their params are internals of JAX, versions 0.10 to 0.12
of which are tested.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from neumeta_jax.core.axes import Dim, align, concat, join, product, unify
from neumeta_jax.core.program import Step, Value


class UnknownPrimitive(NotImplementedError):
    """A primitive without a rule meets the axis of a parameter."""


def find(name: str) -> Any:
    """The rule for the primitive `name`, or None."""
    return next((rule for names, rule in RULES.items() if re.fullmatch(names, name)), None)


def elementwise(params, ins, shapes):
    operands = [value.dims for value in ins if len(value.dims) == len(shapes[0])]  # or scalars
    same = ([d[axis] for d in operands if d[axis].size == n] for axis, n in enumerate(shapes[0]))
    return [[*map(join, same)]] * len(shapes), None  # what is not the same has size 1


def barrier(params, ins, shapes):
    return [value.dims for value in ins], None


def shaped(params, ins, shapes):
    out = [Dim(n) for n in shapes[0]]
    for axis, at in enumerate(params.get("broadcast_dimensions", ())):
        if ins[0].dims[axis].size == shapes[0][at]:
            out[at] = ins[0].dims[axis]
    if "dimension" in params:  # iota counts along it
        out[params["dimension"]].note("ordered")
    for dim in out if "bit_width" in params else ():
        dim.note("random")
    return [out], lambda size: {"shape": tuple(map(size, out))}


def reshape(params, ins, shapes):
    out = [Dim(n) for n in shapes[0]]
    starts = np.cumprod([1, *(dim.size for dim in ins[0].dims)])
    for dim, start in zip(out, np.cumprod([1, *shapes[0]]), strict=False):  # the axis it starts in
        inside = [d for d, s in zip(ins[0].dims, starts, strict=False) if d.size > 1 and s <= start]
        dim.origins = inside[-1].origins if inside else dim.origins
    align(ins[0].dims, out)
    return [out], lambda size: {"new_sizes": tuple(map(size, out))}


def transpose(params, ins, shapes):
    return [[ins[0].dims[axis] for axis in params["permutation"]]], None


def squeeze(params, ins, shapes):
    return [[d for axis, d in enumerate(ins[0].dims) if axis not in params["dimensions"]]], None


def reduce(params, ins, shapes):
    for axis in params["axes"]:
        ins[0].dims[axis].note("reduced")
    kept = [dim for axis, dim in enumerate(ins[0].dims) if axis not in params["axes"]]
    return [kept] * len(shapes), None


def window(params, ins, shapes):
    out = list(ins[0].dims)
    for axis, (length, n) in enumerate(zip(params["window_dimensions"], shapes[0], strict=True)):
        if (length, n) != (1, out[axis].size):
            out[axis].note("spatial")
            out[axis] = Dim(n)
    return [out], None


def ordered(params, ins, shapes):
    for axis in params.get("dimensions") or [params.get("axis", params.get("dimension"))]:
        ins[0].dims[axis].note("ordered")
    return elementwise(params, ins, shapes)


def slices(params, ins, shapes):
    strides = params["strides"] or (1,) * len(shapes[0])
    before, out = [], []
    for dim, start, stride, n in zip(
        ins[0].dims, params["start_indices"], strides, shapes[0], strict=True
    ):
        parts = Dim(start), Dim(n), Dim(dim.size - start - n)
        if n == dim.size:
            parts = Dim(0), dim, Dim(0)
        elif stride == 1:
            unify(dim, concat(parts))
        else:
            dim.note("spatial")
        parts[1].origins = dim.origins
        before.append(parts[0])
        out.append(parts[1])

    def resize(size):
        starts = tuple(map(size, before))
        ends = (b + s * (size(dim) - 1) + 1 for b, s, dim in zip(starts, strides, out, strict=True))
        return {"start_indices": starts, "limit_indices": tuple(ends)}

    return [out], resize


def dynamic_slice(params, ins, shapes):
    """At places that are computed: an axis may change its size only where all of it is taken."""
    out = [_whole(dim, n) for dim, n in zip(ins[0].dims, shapes[0], strict=True)]
    return [out], lambda size: {"slice_sizes": tuple(map(size, out))}


def dynamic_update_slice(params, ins, shapes):
    for dim, part in zip(ins[0].dims, ins[1].dims, strict=True):
        unify(_whole(dim, part.size), part)
    return [ins[0].dims], None


def _whole(dim, size):
    """`dim` itself where `size` is all of it, else a new one."""
    return dim if size == dim.size else dim.note("indexed") and Dim(size)


def scatter(params, ins, shapes):
    operand, _, updates = (value.dims for value in ins)
    numbers = params["dimension_numbers"]
    dropped = numbers.inserted_window_dims + numbers.operand_batching_dims
    for axis in dropped:
        operand[axis].note("indexed")
    kept = [dim for axis, dim in enumerate(operand) if axis not in dropped]
    for dim, at in zip(kept, numbers.update_window_dims, strict=True):
        unify(_whole(dim, updates[at].size), updates[at])
    return [operand], None


def top_k(params, ins, shapes):
    dims = list(ins[0].dims)
    dims[params["axis"]].note("ordered")
    dims[params["axis"]] = Dim(params["k"])
    return [dims, dims], None


def split(params, ins, shapes):
    axis, dims = params["axis"], ins[0].dims
    parts = [Dim(n) for n in params["sizes"]]
    unify(dims[axis], concat(parts))
    for part in parts:
        part.origins = dims[axis].origins
    outs = [[*dims[:axis], part, *dims[axis + 1 :]] for part in parts]
    return outs, lambda size: {"sizes": tuple(map(size, parts))}


def pad(params, ins, shapes):
    edges, out = [], []
    for dim, (low, high, inner), n in zip(
        ins[0].dims, params["padding_config"], shapes[0], strict=True
    ):
        if inner or min(low, high) < 0:
            dim.note("spatial")
            edges.append((Dim(0), Dim(0), (low, high, inner)))
            out.append(Dim(n))
        else:
            edges.append((Dim(low), Dim(high), (0, 0, 0)))
            out.append(concat([edges[-1][0], dim, edges[-1][1]]))

    def resize(size):
        config = [(size(a) + low, size(b) + high, inner) for a, b, (low, high, inner) in edges]
        return {"padding_config": tuple(config)}

    return [out], resize


def concatenate(params, ins, shapes):
    out = []
    for axis, dims in enumerate(map(list, zip(*(value.dims for value in ins), strict=True))):
        if axis == params["dimension"]:
            out.append(Dim(shapes[0][axis]))
            unify(out[axis], concat(dims))
            out[axis].origins = frozenset().union(*(dim.origins for dim in dims))
        else:
            out.append(join(dims))
    return [out], None


def dot(params, ins, shapes):
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    x, y = (value.dims for value in ins)
    for i, j in zip(left + left_batch, right + right_batch, strict=True):
        unify(x[i], y[j])
    free = [d for axis, d in enumerate(x) if axis not in left + left_batch]
    free += [d for axis, d in enumerate(y) if axis not in right + right_batch]
    return [[x[axis] for axis in left_batch] + free], None


def conv(params, ins, shapes):
    if params["batch_group_count"] != 1:
        raise UnknownPrimitive(
            "The channels of a convolution can be followed where its batch_group_count is 1, got "
            f"{params['batch_group_count']}; use feature_group_count."
        )
    (x, kernel), numbers = (value.dims for value in ins), params["dimension_numbers"]
    out = [Dim(n) for n in shapes[0]]
    for i, j in zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True):
        x[i].note("spatial")
        kernel[j].note("spatial")
    (batch, channels), (writes, reads) = numbers.lhs_spec[:2], numbers.rhs_spec[:2]
    count = Dim(params["feature_group_count"])
    unify(x[channels], product([count, kernel[reads]]))
    unify(kernel[writes], product([count, Dim(kernel[writes].size // count.size)]))
    out[numbers.out_spec[0]], out[numbers.out_spec[1]] = x[batch], kernel[writes]
    return [out], lambda size: {"feature_group_count": size(count)}


def gather(params, ins, shapes):
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    dims, out = ins[0].dims, list[Any]([None] * len(shapes[0]))
    dropped = numbers.collapsed_slice_dims + numbers.operand_batching_dims
    kept = [axis for axis in range(len(dims)) if axis not in dropped]
    whole = [axis for axis in kept if sizes[axis] == dims[axis].size]
    for axis in set(range(len(dims))) - set(whole):
        dims[axis].note("indexed")
    for at, axis in zip(numbers.offset_dims, kept, strict=True):
        out[at] = dims[axis] if axis in whole else Dim(sizes[axis])
    indices = iter(ins[1].dims[:-1])
    out = [next(indices) if dim is None else dim for dim in out]
    return [out], lambda size: {
        "slice_sizes": tuple(size(d) if a in whole else sizes[a] for a, d in enumerate(dims))
    }


RULES = {  # names as regular expressions; the first that matches
    "abs|a?(cos|sin|tan)h?|add|add_any|and|atan2|bitcast_convert_type|cbrt|ceil|clamp|complex|conj|"
    "copy|copy_p|"
    "convert_element_type|digamma|div|eq|erf|erf_inv|erfc|exp|exp2|expm1|floor|ge|gt|integer_pow|"
    "imag|is_finite|le|lgamma|log|log1p|logistic|lt|max|min|mul|name|ne|neg|nextafter|not|or|pow|real|"
    "reduce_precision|rem|round|rsqrt|select_n|shift_.*|sign|sqrt|square|stop_gradient|sub|xor": (
        elementwise
    ),
    "optimization_barrier": barrier,
    "broadcast_in_dim|iota|random_bits": shaped,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "reduce_window.*": window,
    "reduce_.*|argmax|argmin": reduce,
    "cum.*|sort|rev": ordered,
    "slice": slices,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "scatter|scatter-.*|scatter_.*": scatter,
    "top_k": top_k,
    "split": split,
    "pad": pad,
    "concatenate": concatenate,
    "dot_general": dot,
    "conv_general_dilated": conv,
    "gather": gather,
}
MOVES = {"transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy"}
LINEAR = {"add", "sub", "mul", "div"}
ZERO_IF_ALL = MOVES | {"abs", "add", "concatenate", "neg", "reduce_precision", "round", "sign"}
ZERO_IF_ALL |= {"slice", "split", "sqrt", "square", "stop_gradient", "sub", "tanh"}
ZERO_IF_ANY = {"mul", "dot_general"}
SIGNED = {"sqrt", "rsqrt", "log", "div"}  # need a last operand of one sign
COMPARED = {"eq", "ge", "gt", "le", "lt", "ne", "sign"}
BIASES = {("add", 0): 1, ("add", 1): 1, ("sub", 1): -1}  # of an operand of a primitive
INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
INLINED |= {"custom_vjp_call": "call_jaxpr"}  # without its rule of differentiation


# Products: what a step sums over, and whether it mixes channels.


def dot_product(tracer, params, step):
    contracted, batch = params["dimension_numbers"]
    step.contracted = contracted
    tracer.product(step, contracted, batch)


def conv_product(tracer, params, step):
    numbers, kernel = params["dimension_numbers"], step.inputs[1].dims
    step.contracted = numbers.lhs_spec[1:2], numbers.rhs_spec[1:]
    if params["feature_group_count"] == 1 or kernel[numbers.rhs_spec[1]].size > 1:
        tracer.product(step, step.contracted)
    if params["feature_group_count"] > 1:  # what each output sees differs
        tracer.readers.pop(step.number, None)


def lookup(tracer, params, step):
    """An embedding writes what is looked up."""
    if step.inputs[1].active and not step.inputs[0].active:
        tracer.product(step, (params["dimension_numbers"].collapsed_slice_dims, ()))


PRODUCTS = {
    "dot_general": dot_product,
    "conv_general_dilated": conv_product,
    "gather": lookup,
}


# Primitives with a jaxpr inside.


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


def scan(tracer, params, ins):
    """Layers that are stacked along a leading axis have all the same widths."""
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    active = any(value.active for value in ins)
    inner = [dataclasses.replace(value, view=False) for value in ins]
    for n in range(first, len(ins)):
        dims = ins[n].dims if n < last else ins[n].dims[1:]
        inner[n] = dataclasses.replace(
            inner[n], dims=dims, active=ins[n].active or (active and n < last)
        )
    length = Dim(params["length"], ["fixed"])
    for value in ins[last:]:
        unify(length, value.dims[0])
    body = tracer.body(params["jaxpr"], inner)
    for before, after in zip(inner[first:last], body.outputs[: last - first], strict=True):
        for a, b in zip(before.dims, after.dims, strict=True):
            unify(a, b)
    split = params["num_carry"]
    outs = [dataclasses.replace(value) for value in body.outputs]
    for value in outs[split:]:
        value.dims = (length, *value.dims)

    def run(size, arrays):
        def layer(carry, slices):
            results = body.run(size, [*arrays[:first], *carry, *slices])
            return results[:split], results[split:]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, stacked = jax.lax.scan(layer, arrays[first:last], arrays[last:], **options)
        return [*carry, *stacked]

    return Step(ins, outs, run, bodies=((params["length"], body),))


def while_loop(tracer, params, ins):
    """What is carried has the same axes before and after each round."""
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    active = any(value.active for value in ins)
    carried = [dataclasses.replace(v, view=False, active=v.active or active) for v in ins[second:]]
    test = tracer.body(params["cond_jaxpr"], [*ins[:first], *carried])
    body = tracer.body(params["body_jaxpr"], [*ins[first:second], *carried])
    for before, after in zip(carried, body.outputs, strict=True):
        for a, b in zip(before.dims, after.dims, strict=True):
            unify(a, b)
    outs = [dataclasses.replace(value, active=active, tail=None) for value in body.outputs]

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

    return Step(ins, outs, run, bodies=tuple((1, body) for body in bodies[:1]))


BODIES = {
    "custom_jvp_call": custom_jvp,
    "remat2": remat,
    "checkpoint": remat,
    "scan": scan,
    "cond": cond,
    "while": while_loop,
}
