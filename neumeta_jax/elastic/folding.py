"""Batch norm folded into the products before it, in any network.

What follows a product, element by element and with parameters alone, is affine in inference mode:

    y = a z + b       of batch norm: a = scale / sqrt(var + eps), b = bias - a mean

`fold` moves `a` into the kernel and `b` into the last bias, and sets the others to what makes the
rest do nothing. The network's own function then computes the same as before, and what is left to
generate and to train is a kernel and a bias, as in the papers. What does the scaling is `frozen`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.elastic.family import Family
from neumeta_jax.elastic.program import Step, Value


class Fold(NamedTuple):
    """One product and what follows it.

    Attributes:
        kernel: path of its parameter, `writes` the axes of it that the product writes.
        scale: path of a parameter in which the factor a is linear.
        bias: path of a parameter that is added last, or subtracted if `sign` is -1.
        zeros: paths of others that are added, which become zero.
        rest: paths of others that a depends on, such as a variance.
        product: the step, `chain` those that follow it.
    """

    kernel: str
    writes: tuple[int, ...]
    scale: str
    bias: str
    sign: int
    zeros: tuple[str, ...]
    rest: tuple[str, ...]
    product: Step
    chain: tuple[Step, ...]


def fold(family: Family, params: Any) -> tuple[Family, Any]:
    """(the family, the parameters) with every affine map after a product moved into it.

    The function stays what it is; where no map can be moved both are returned as they are. Not
    moved are those before a product, and those whose parameters are used elsewhere too.

    Args:
        family: of the network.
        params: a tree like the one traced.
    """
    values, folds = family.groups.leaves(params, {}), find_folds(family)
    for found in folds:
        slope, offset = _affine(family, found, values)
        kernel = jnp.asarray(values[found.kernel])
        shape = [n if axis in found.writes else 1 for axis, n in enumerate(kernel.shape)]
        values[found.kernel] = kernel * slope.reshape(shape)
        values |= {path: jnp.zeros_like(values[path]) for path in found.zeros}
        ones = {found.scale: jnp.ones_like(values[found.scale])}
        unit, _ = _affine(family, found, values | ones)
        values[found.scale] = 1 / unit
        _, left = _affine(family, found, values)
        values[found.bias] = values[found.bias] + found.sign * (offset - left)
    tree = jax.tree.structure(params)
    return folded(family, folds), tree.unflatten(list(values.values()))


def folded(family: Family, folds: Sequence[Fold] | None = None) -> Family:
    """The family after `fold`: the last bias is that of the product, what scales is frozen."""
    folds = find_folds(family) if folds is None else folds
    groups = family.groups
    biases = {found.kernel: (found.bias, found.sign) for found in folds}
    readers = tuple(
        dataclasses.replace(reader, bias=biases[reader.path][0], sign=biases[reader.path][1])
        if reader.path in biases
        else reader
        for reader in groups.readers
    )
    still = {p for found in folds for p in (found.scale, *found.zeros, *found.rest)}
    frozen = tuple(path for path, _ in groups.tensors if path in still | {*groups.frozen})
    return dataclasses.replace(
        family, groups=dataclasses.replace(groups, readers=readers, frozen=frozen)
    )


def find_folds(family: Family) -> list[Fold]:
    """What `fold` can move, found with numbers at random in place of the parameters."""
    rng, program = np.random.default_rng(0), family.program
    inputs = [value for value in program.inputs if not value.active]
    values = {
        path: jnp.asarray(rng.uniform(0.5, 1.5, [dim.size for dim in value.dims]), jnp.float32)
        for (path, _), value in zip(family.groups.tensors, inputs, strict=True)
    }
    folds = []
    for product in program.steps:
        weight = None if product.weight is None else product.inputs[product.weight]
        if product.number is None or weight is None or not weight.view:
            continue
        (kernel,) = weight.sources
        chain, applied = _chain(program.steps, [*program.outputs], product)
        out = product.outputs[0]
        writes = tuple(
            axis
            for dim in weight.dims
            if any(dim.find() is other.find() for other in out.dims)
            for path, axis in dim.origins
            if path == kernel
        )
        shape = tuple(values[kernel].shape[axis] for axis in writes)
        if not chain or any(values[path].shape != shape for path in applied):
            continue
        found = Fold(kernel, writes, "", "", 1, (), (), product, tuple(chain))

        def affine(changed, found=found):
            return _affine(family, found, values | changed)

        if roles := _roles(affine, values, applied):
            folds.append(found._replace(**roles))
    return folds


def _chain(steps, outputs, product: Step) -> tuple[list[Step], frozenset]:
    """(the affine steps after a product, the parameters in them, used nowhere else)."""
    chain, value, applied = [], product.outputs[0], frozenset()
    while True:
        readers = [step for step in steps if any(value is other for other in step.inputs)]
        if len(readers) != 1 or any(value is output for output in outputs):
            break
        (step,) = readers
        tail = step.outputs[0].tail
        if step.bodies or len(step.outputs) > 1 or not tail or tail.product != product.number:
            break
        before, after = ([d.find() for d in s.outputs[0].dims] for s in (product, step))
        if before != after:  # axes have moved
            break
        chain.append(step)
        value = step.outputs[0]
        applied |= frozenset().union(*(v.sources for v in step.inputs if not v.active))
    elsewhere = frozenset().union(
        *(
            value.sources
            for step in steps
            if step not in chain and any(out.active for out in step.outputs)
            for value in step.inputs
            if not value.active
        )
    )
    return (chain, applied) if applied and not applied & elsewhere else ([], frozenset())


def _affine(family: Family, found: Fold, values: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """(a, b), each of the shape of what the product writes; NaN where they differ by place."""
    arrays = {
        value: values[path]
        for (path, _), value in zip(family.groups.tensors, family.program.inputs, strict=False)
    }

    def size(dim) -> int:
        return dim.find().size

    arrays |= dict(family.program.constants)
    needed = _inactive_steps(family.program.steps, found.chain)
    for step in needed:
        results = step.run(size, [arrays[value] for value in step.inputs])
        arrays.update(zip(step.outputs, results, strict=True))

    def run(z):
        for step in found.chain:
            (z,) = step.run(size, [z if value.active else arrays[value] for value in step.inputs])
        return z

    out = found.product.outputs[0]
    z = jnp.zeros([dim.size for dim in out.dims])
    offset = run(z)
    slope = run(z + 1) - offset
    weight = found.product.inputs[found.product.weight or 0]
    axes = [
        next(n for n, other in enumerate(out.dims) if other.find() is dim.find())
        for axis in found.writes
        for dim in weight.dims
        if (found.kernel, axis) in dim.origins
    ]
    rest = [n for n in range(z.ndim) if n not in axes]

    def of_channels(x):
        x = jnp.moveaxis(x, axes + rest, range(x.ndim))
        x = x.reshape(*x.shape[: len(axes)], -1)
        return jnp.where(jnp.ptp(x, axis=-1) == 0, x[..., 0], jnp.nan)

    return of_channels(slope), of_channels(offset)


def _inactive_steps(steps: Sequence[Step], chain: Sequence[Step]) -> list[Step]:
    """The steps on parameters alone that a chain needs, in order."""
    needed: set[Value] = {value for step in chain for value in step.inputs if not value.active}
    chosen = []
    for step in reversed(steps):
        if needed & {*step.outputs}:
            chosen.append(step)
            needed |= {*step.inputs}
    return chosen[::-1]


def _roles(
    affine: Callable, values: Mapping[str, Any], applied: frozenset
) -> dict[str, Any] | None:
    """What each parameter of a chain does; None where there is no scale or no last bias."""
    slope, offset = map(np.asarray, affine({}))
    if not (np.isfinite(slope).all() and np.isfinite(offset).all()):
        return None
    scale, bias, sign, zeros, rest = "", "", 1, [], []
    for path in sorted(applied):
        twice = np.asarray(affine({path: 2 * values[path]})[0])
        shift = np.asarray(affine({path: values[path] + 1})[1]) - offset
        if np.allclose(twice, slope, rtol=1e-5):  # it is added
            if not bias and np.allclose(np.abs(shift), 1, atol=1e-4) and np.ptp(shift) < 1:
                bias, sign = path, round(float(shift.mean()))
            else:
                zeros.append(path)
        elif not scale and np.allclose(twice, 2 * slope, rtol=1e-5):
            scale = path
        else:
            rest.append(path)
    if not scale or not bias:
        return None
    return {
        "scale": scale,
        "bias": bias,
        "sign": sign,
        "zeros": tuple(zeros),
        "rest": tuple(rest),
    }
