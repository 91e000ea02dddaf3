"""What each primitive of JAX does to the axes of arrays; those with a jaxpr are `control_flow`'s.

A rule (params, inputs, shapes of the outputs) gives the dims of each output, unifies those of the
inputs where the primitive ties them, and returns, where sizes are among the params of the
primitive, a function of `size` (the int of a `Dim` at the widths asked for) that computes these.

A primitive without a rule may not meet channels: nothing is guessed. To add one, write its rule
and enter it into `RULES`. Primitives and their params are internals of JAX, versions 0.10 to 0.12
of which are tested.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from neumeta_jax.elastic.axes import Dim, align, concat, join, product, unify
from neumeta_jax.elastic.program import Value


class UnknownPrimitive(NotImplementedError):
    """A primitive without a rule meets the axis of a parameter."""


def find(name: str, params: dict) -> Any:
    """The rule for the primitive `name`, or None."""
    return RULES.get(name) if params.get("batch_group_count", 1) == 1 else None


def elementwise(params, ins, shapes):
    operands = [value.dims for value in ins if len(value.dims) == len(shapes[0])]  # or scalars
    same = ([d[axis] for d in operands if d[axis].size == n] for axis, n in enumerate(shapes[0]))
    return [[*map(join, same)]] * len(shapes), None  # what is not the same has size 1


def shaped(params, ins, shapes):
    out = [Dim(n) for n in shapes[0]]
    for axis, at in enumerate(params.get("broadcast_dimensions", ())):
        if ins[0].dims[axis].size == shapes[0][at]:
            out[at] = ins[0].dims[axis]
    if "dimension" in params:  # iota counts along it
        out[params["dimension"]].note("ordered")
    return [out], lambda size: {"shape": tuple(map(size, out))}


def random(params, ins, shapes):
    """The last output; before it may be the next state, of the axes of the first input."""
    bits = [Dim(n, ["random"]) for n in shapes[-1]]
    outs = [ins[0].dims] * (len(shapes) - 1) + [bits]
    return outs, lambda size: {"shape": tuple(map(size, bits))}


def tile(params, ins, shapes):
    times, out = [Dim(n) for n in params["reps"]], []
    for count, dim in zip(times, ins[0].dims, strict=True):
        out.append(dim if count.size == 1 else product([count, dim]))
        out[-1].origins = dim.origins
    return [out], lambda size: {"reps": tuple(map(size, times))}


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
    axes = params["axes"] if "axes" in params else params["dimensions"]
    dims = _shared(ins)
    for axis in axes:
        dims[axis].note("reduced")
    return [[dim for axis, dim in enumerate(dims) if axis not in axes]] * len(shapes), None


def window(params, ins, shapes):
    out = _shared(ins)
    for axis, (length, n) in enumerate(zip(params["window_dimensions"], shapes[0], strict=True)):
        if (length, n) != (1, out[axis].size):
            out[axis].note("spatial")
            out[axis] = Dim(n)
    return [out] * len(shapes), None


def unpool(params, ins, shapes):
    """Adds each entry to that of its window which was selected."""
    source, operand = (value.dims for value in ins if value.dims)
    if params.get("scatter_jaxpr"):  # the general form has them in the other order
        source, operand = operand, source
    for length, small, large in zip(params["window_dimensions"], source, operand, strict=True):
        if length == 1 and small.size == large.size:
            unify(small, large)
        else:
            small.note("spatial")
            large.note("spatial")
    return [operand], None


def _shared(ins):
    """The dims of several operands of one shape, which scalars may follow."""
    return [*map(join, map(list, zip(*(value.dims for value in ins if value.dims), strict=True)))]


def fft(params, ins, shapes):
    out, start = list(ins[0].dims), len(shapes[0]) - len(params["fft_lengths"])
    for axis in range(start, len(out)):
        out[axis].note("spatial")
        out[axis] = Dim(shapes[0][axis], ["spatial"])
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
        lengths = (max(0, s * (size(d) - 1) + 1) for s, d in zip(strides, out, strict=True))
        ends = tuple(b + n for b, n in zip(starts, lengths, strict=True))
        return {"start_indices": starts, "limit_indices": ends}

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


def stack(params, ins, shapes):
    out = _shared(ins)
    out.insert(params["axis"], concat(Dim(1) for _ in ins))
    return [out], None


def unstack(params, ins, shapes):
    axis, dims = params["axis"], ins[0].dims
    unify(dims[axis], concat(Dim(1) for _ in shapes))
    return [[*dims[:axis], *dims[axis + 1 :]]] * len(shapes), None


def dot(params, ins, shapes):
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    x, y = (value.dims for value in ins)
    for i, j in zip(left + left_batch, right + right_batch, strict=True):
        unify(x[i], y[j])
    free = [d for axis, d in enumerate(x) if axis not in left + left_batch]
    free += [d for axis, d in enumerate(y) if axis not in right + right_batch]
    return [[x[axis] for axis in left_batch] + free], None


def ragged_dot(params, ins, shapes):
    """Rows that are sorted by the matrix of a stack that they meet."""
    numbers = params["ragged_dot_dimension_numbers"]
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    x, y, counts = (value.dims for value in ins)
    for i, j in zip(left + left_batch, right + right_batch, strict=True):
        unify(x[i], y[j])
    for axis in numbers.lhs_ragged_dimensions:
        x[axis].note("ordered")
    counts[-1].note("indexed")
    for axis in numbers.rhs_group_dimensions:
        unify(y[axis], counts[-1])
    out = [x[axis] for axis in left_batch]
    out += [d for axis, d in enumerate(x) if axis not in left + left_batch]
    matrices = right + right_batch + tuple(numbers.rhs_group_dimensions)
    out += [d for axis, d in enumerate(y) if axis not in matrices]
    # Rows that are summed, and not matrices, differ in number: there is a result for each count.
    return [[counts[-1]] * (len(shapes[0]) - len(out)) + out], None


def conv(params, ins, shapes):
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


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy cos cosh digamma div
eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow
is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi name ne neg nextafter
not one_minus_square or polygamma polynomial population_count pow real reduce_precision
regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
_BY_RULE: tuple[tuple[Callable, str], ...] = (
    (elementwise, _ELEMENTWISE),
    (shaped, "broadcast_in_dim iota"),
    (random, "random_bits rng_bit_generator"),
    (tile, "tile"),
    (reshape, "reshape"),
    (transpose, "transpose"),
    (squeeze, "squeeze"),
    (reduce, "reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"),
    (reduce, "argmax argmin"),
    (window, "reduce_window reduce_window_max reduce_window_min reduce_window_sum"),
    (window, "select_and_gather_add"),
    (unpool, "select_and_scatter select_and_scatter_add"),
    (fft, "fft"),
    (ordered, "cumlogsumexp cummax cummin cumprod cumsum rev sort"),
    (slices, "slice"),
    (dynamic_slice, "dynamic_slice"),
    (dynamic_update_slice, "dynamic_update_slice"),
    (scatter, "scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub"),
    (top_k, "top_k"),
    (split, "split"),
    (pad, "pad"),
    (concatenate, "concatenate"),
    (stack, "stack"),
    (unstack, "unstack"),
    (dot, "dot_general"),
    (ragged_dot, "ragged_dot_general"),
    (conv, "conv_general_dilated"),
    (gather, "gather"),
)
RULES = {name: rule for rule, names in _BY_RULE for name in names.split()}
# Identities: what devices do with arrays is not followed.
IGNORED = {"device_put", "optimization_barrier", "sharding_constraint"}
INLINED = {"jit", "closed_call", "composite", "custom_vjp_call"}  # the last without its rule
MOVES = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "rev", "squeeze"}
MOVES |= {"transpose"}
LINEAR = {"add", "sub", "mul", "div"}
# Which operand must not change its sign or be 0; integer powers if they are negative.
SIGNED = {
    "div": 1,
    "integer_pow": 0,
    "log": 0,
    "log2": 0,
    "pow": 0,
    "rem": 1,
    "rsqrt": 0,
    "sqrt": 0,
}
COMPARED = {"eq", "ge", "gt", "le", "lt", "ne", "sign"}
BIASES = {("add", 0): 1, ("add", 1): 1, ("sub", 1): -1}  # of an operand of a primitive


# Zeros: where an array that is computed from parameters is 0 because they are.

_ZERO_IF_ALL = """
abs add add_any asin asinh atan atanh cbrt ceil complex concatenate conj erf expm1 floor imag log1p
max min name neg real reduce_max reduce_min reduce_precision reduce_sum round sign sin sinh slice
split sqrt square stack stop_gradient sub tan tanh tile unstack
"""
ZERO_IF_ALL = MOVES | set(_ZERO_IF_ALL.split())
ZERO_IF_ANY = {"mul", "dot_general", "conv_general_dilated"}
ZERO_IF_FIRST = {"div", "gather"}


def vanishes(name: str, ins: list[Value]) -> bool:
    """Whether the result of a primitive is 0 where all parameters are."""
    values = [value.vanishing for value in ins]
    return (
        (name in ZERO_IF_ALL and all(values))
        or (name in ZERO_IF_ANY and any(values))
        or (name in ZERO_IF_FIRST and values[0])
    )


def zero_axes(name: str, params: dict, ins: list[Value], shape: tuple[int, ...]) -> frozenset[int]:
    """Along which axes the result of a primitive is 0 for the channels that are masked.

    Not along those of size 1, so that what is broadcast along an axis is never taken for zero.
    """
    zero = [value.zero for value in ins]
    match name:
        case "broadcast_in_dim":
            axes = {params["broadcast_dimensions"][axis] for axis in zero[0]}
        case "reshape":
            axes = _reshaped_zeros(ins[0], shape)
        case "transpose":
            axes = {params["permutation"].index(axis) for axis in zero[0]}
        case "squeeze":
            axes = _after(zero[0], params["dimensions"])
        case "unstack":
            axes = _after(zero[0], (params["axis"],))
        case "reduce_sum" | "reduce_max" | "reduce_min":
            axes = _after(zero[0], params["axes"])
        case "stack":
            axes = {axis + (axis >= params["axis"]) for axis in frozenset.intersection(*zero)}
        case "gather":
            numbers = params["dimension_numbers"]
            dropped = numbers.collapsed_slice_dims + numbers.operand_batching_dims
            axes = {numbers.offset_dims[n] for n in _after(zero[0], dropped)}
        case "dot_general":
            contracted, batch = params["dimension_numbers"]
            pairs = enumerate(zip(*batch, strict=True))
            axes = {at for at, (i, j) in pairs if i in zero[0] or j in zero[1]}
            start = len(batch[0])
            for side, value in enumerate(ins):
                gone = contracted[side] + batch[side]
                axes |= {start + n for n in _after(zero[side], gone)}
                start += len(value.dims) - len(gone)
        case "mul":
            axes = frozenset.union(*zero)
        case "div":
            axes = zero[0]
        case _:
            axes = frozenset.intersection(*zero) if name in ZERO_IF_ALL else frozenset()
    return frozenset(axis for axis in axes if shape[axis] > 1)


def _after(axes, gone):
    """What axes are called when those `gone` are."""
    return {axis - sum(other < axis for other in gone) for axis in axes if axis not in gone}


def _reshaped_zeros(value, shape):
    """Axes that come from axes of zeros alone."""
    if 0 in shape:
        return
    before = np.cumprod([1, *(dim.size for dim in value.dims)])
    after = np.cumprod([1, *shape])
    nonzero = [axis for axis, d in enumerate(value.dims) if d.size > 1 and axis not in value.zero]
    for n in range(len(shape)):
        edges = set(before) & set(after)  # between them axes are only merged or split
        start = max(edge for edge in edges if edge <= after[n])
        stop = min(edge for edge in edges if edge >= after[n + 1])
        if not any(start <= before[axis] < stop for axis in nonzero):
            yield n


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


def ragged_product(tracer, params, step):
    numbers = params["ragged_dot_dimension_numbers"]
    step.contracted, (left, right) = numbers.dot_dimension_numbers
    tracer.product(step, step.contracted, (left, right + tuple(numbers.rhs_group_dimensions)))
    tracer.readers.pop(step.number, None)  # each matrix of the stack sees other rows


def lookup(tracer, params, step):
    if step.inputs[1].active and not step.inputs[0].active:
        tracer.lookup(step, (params["dimension_numbers"].collapsed_slice_dims, ()))


PRODUCTS = {
    "dot_general": dot_product,
    "ragged_dot_general": ragged_product,
    "conv_general_dilated": conv_product,
    "gather": lookup,
}
