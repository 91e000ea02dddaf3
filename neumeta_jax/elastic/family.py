"""Any network in: a family found by tracing the user's own function.

family = trace(apply, params, example)    # apply(params, example), a batch of 2 or more
print(family)                             # its groups of channels, which may vary and why not
logits = apply_at(family, slice_params(family.groups, params, widths), images, widths)
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.elastic.axes import Axis, Dim
from neumeta_jax.elastic.groups import Group, Groups, Member, Reader, leaf_paths, structure_of
from neumeta_jax.elastic.program import Program, Step, Value
from neumeta_jax.elastic.resize import mask_params, slice_params
from neumeta_jax.elastic.tracing import Tracer

# Flags that fix a size; the others only say that masked and full networks are not alike.
RIGID = {"input", "output", "reduced", "indexed", "spatial", "fixed", "unsound"}
ALLOWED = ("stream", "paired")  # flags of groups that are sound to vary


@dataclasses.dataclass(eq=False)
class Family:
    """A network at all its widths. Two families are equal only if they are the same object.

    Attributes:
        groups: its groups of channels.
        program: of `apply`, for `apply_at`.
        atoms: the axis of each group in the program.
        output: the structure of what `apply` returns.
    """

    groups: Groups
    program: Program
    atoms: dict[str, Dim]
    output: Any

    def __str__(self) -> str:
        return str(self.groups)


def trace(apply: Callable, params: Any, example: Any, *, check: bool = True) -> Family:
    """The family of `apply(params, example)`.

    Args:
        apply: a pure function of a tree of arrays and an input, in inference mode.
        params: all arrays that may change with the widths, statistics included, or shapes of them.
        example: an input with a leading batch axis of 2 or more, or shapes of one.
        check: compute a masked and a sliced network and slopes of them, with numbers close to
            `params`, and flag groups in which they differ, or are not finite, as "unsound".

    Raises:
        UnknownPrimitive: for a primitive on channels that no rule covers, with its source line.
        ValueError: if JAX cannot trace the function, two parameters have the same path, or the
            batch is too small.
    """
    if any(np.shape(x)[:1] in ((), (1,)) for x in jax.tree.leaves(example)):
        raise ValueError(
            "The example needs a leading batch axis of 2 or more, to tell it from axes of size 1, "
            f"got {[np.shape(x) for x in jax.tree.leaves(example)]}."
        )
    try:
        closed, out = jax.make_jaxpr(apply, return_shape=True)(params, example)
    except Exception as error:
        if not (isinstance(error, _UNTRACEABLE) or type(error).__name__ == "TraceContextError"):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            "apply must be traceable by JAX, without decisions on values, NumPy on arrays or "
            f"changes of what lies outside: {reason}."
        ) from error
    tracer = Tracer()
    paths, arrays = leaf_paths(params), jax.tree.leaves(params)
    inputs = [_parameter(path, np.shape(a)) for path, a in zip(paths, arrays, strict=True)]
    start = frozenset(["input"])
    inputs += [
        Value(
            tuple(Dim(n, start) for n in np.shape(x)), active=True, writers=start, ancestors=start
        )
        for x in jax.tree.leaves(example)
    ]
    program = tracer.network(closed, inputs)
    for dim in (dim for value in program.outputs for dim in value.dims):
        dim.note("output")
    atoms = _name(tracer)
    names = {dim: name for name, dim in atoms.items()}
    axes = {
        path: tuple(_freeze(dim, names) for dim in value.dims)
        for path, value in zip(paths, inputs, strict=False)  # the example's are left over
    }
    groups = Groups(
        _groups(tracer, axes, atoms, tracer.skippable(program)),
        tuple(axes.items()),
        _readers(tracer, axes),
        tuple(path for path in axes if path in tracer.frozen),
        structure_of(params),
    )
    family = Family(groups, program, atoms, jax.tree.structure(out))
    return _checked(family, apply, params, example, tracer.lost_rules) if check else family


_UNTRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)  # and Flax's TraceContextError


def _parameter(path: str, shape: tuple[int, ...]) -> Value:
    dims = tuple(Dim(n, ["parameter"]) for n in shape)
    for axis, dim in enumerate(dims):
        dim.origins = frozenset([(path, axis)])
    zero = frozenset(axis for axis, n in enumerate(shape) if n > 1)
    return Value(dims, sources=frozenset([path]), view=True, plain=True, vanishing=True, zero=zero)


_SUFFIXES = ("kernel", "weight", "w", "embedding")


def _name(tracer: Tracer) -> dict[str, Dim]:
    """The atoms that a product writes, by the name of the first layer that does."""
    atoms: dict[str, Dim] = {}
    taken: set[Dim] = set()
    for _, dim, path in sorted(tracer.written, key=lambda entry: entry[0]):
        parts = path.removeprefix("params/").split("/")
        if len(parts) > 2 and parts[-1] == "value" and parts[-2] in _SUFFIXES:  # of nnx
            parts.pop()
        if len(parts) > 1 and parts[-1] in _SUFFIXES:
            parts.pop()
        name = "/".join(parts)
        for atom in dim.atoms():
            if atom.size > 1 and "spatial" not in atom.notes and atom not in taken:
                number = 1 + sum(other.partition(":")[0] == name for other in atoms)
                atoms[name if number == 1 else f"{name}:{number}"] = atom
                taken.add(atom)
    return atoms


def _freeze(dim: Dim, names: dict[Dim, str]) -> Axis:
    dim = dim.find()
    if dim in names:
        return Axis("group", dim.size, names[dim])
    if not any(atom in names for atom in dim.atoms()):
        return Axis("layers" if "layers" in dim.notes else "fixed", dim.size)
    parts: list[Axis] = []
    for part in (_freeze(part, names) for part in dim.parts):
        parts += part.parts if part.kind == dim.kind else [part]
    return Axis(dim.kind, dim.size, "", tuple(parts))


def _places(axis: Axis, part: tuple[int, ...] = ()) -> Iterator[tuple[str, tuple[int, ...]]]:
    if axis.kind == "group":
        yield axis.group, part
    for n, inner in enumerate(axis.parts):
        yield from _places(inner, (*part, n))


def _groups(
    tracer: Tracer, axes: dict, atoms: dict[str, Dim], skips: dict[Dim, frozenset[str]]
) -> tuple[Group, ...]:
    members: dict[str, list[Member]] = {name: [] for name in atoms}
    for path, of_tensor in axes.items():
        for n, axis in enumerate(of_tensor):
            role = "+".join(sorted(tracer.roles.get((path, n), {"elementwise"})))
            for name, part in _places(axis):
                members[name].append(Member(path, n, role, part))
    return tuple(
        Group(
            name,
            atom.size,
            tuple(members[name]),
            tuple(sorted(atom.notes - {"parameter"})),
            tuple(sorted(skips[atom])) if atom in skips else None,
        )
        for name, atom in atoms.items()
    )


def _readers(tracer: Tracer, axes: dict) -> tuple[Reader, ...]:
    """Parameters that are read, and not also written, along axes of groups."""
    readers = {}
    for number, (path, reads, writes) in tracer.readers.items():
        reads = tuple(n for n in reads if axes[path][n].kind not in ("fixed", "layers"))
        if reads and all(tracer.roles[path, axis] == {"read"} for axis in reads):
            bias, sign = tracer.biases.get(number, (None, 1))
            stacked = [axis for axis in axes[path] if axis.kind == "layers"]
            if bias and [*axes[bias]] != [*stacked, *(axes[path][n] for n in writes)]:
                bias = None
            readers[path] = Reader(path, reads, writes, bias, sign)
    uses = collections.Counter(reader.bias for reader in readers.values())
    return tuple(
        reader if uses[reader.bias] == 1 else dataclasses.replace(reader, bias=None)
        for reader in readers.values()
    )


def _compiled(function: Callable) -> Callable:
    """`function` for few calls: most of their time would be that of the compiler."""
    takes_options = jax.default_backend() in ("cpu", "gpu")
    quick = {"xla_backend_optimization_level": 0} if takes_options else None
    return jax.jit(function, compiler_options=quick)


def _floats(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _with_slopes(function: Callable, backward: bool) -> Callable:
    """The outputs of `function(params, ...)` and slopes of them, [] where JAX has none.

    The slopes are those along one direction, which compile in a third of the time of gradients and
    are infinite where these are, or `backward`, for what has gradients only.
    """

    def outputs(params, *rest):
        return _floats(function(params, *rest))

    def loss(params, *rest):
        return sum(jnp.sum(jnp.sin(jnp.abs(x)), dtype=jnp.float32) for x in outputs(params, *rest))

    def tangent(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return np.zeros(x.shape, jax.dtypes.float0)
        return jnp.cos(100 * x).astype(x.dtype)  # as good as random

    def run(params, *rest):
        try:
            if backward:
                slopes = jax.grad(loss, allow_int=True)(params, *rest)
                return outputs(params, *rest), _floats(slopes)
            direction = jax.tree.map(tangent, params)
            return jax.jvp(lambda params: outputs(params, *rest), (params,), (direction,))
        except (NotImplementedError, TypeError, ValueError):  # has no slopes: a callback, a loop
            return outputs(params, *rest), []

    return run


def _finite(arrays: list[jax.Array]) -> bool:
    return all(bool(jnp.all(jnp.isfinite(x))) for x in arrays)


def _close(masked: list[jax.Array], sliced: list[jax.Array], tolerance: float) -> bool:
    """Whether arrays are finite and equal but for rounding; some slopes are nothing but that."""
    if not _finite(masked):
        return False
    wide = [np.asarray(x, np.complex64) for x in masked]
    largest = [np.max(np.abs(x), initial=0) for x in wide]
    slack = 1e-6 + 1e-4 * max(largest, default=0)
    return all(
        np.max(np.abs(a - np.asarray(b)), initial=0) <= tolerance * size + slack
        for a, b, size in zip(wide, sliced, largest, strict=False)
    )


def _checked(
    family: Family, apply: Callable, params: Any, example: Any, lost_rules: bool
) -> Family:
    """`family` with the flag "unsound" where masked and sliced networks differ.

    With `lost_rules` the sliced ones have other slopes, and those masked need only be finite.
    """
    rng = np.random.default_rng(0)

    def near(leaf):
        dtype, shape = jax.dtypes.result_type(leaf), np.shape(leaf)
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype) if abstract else jnp.asarray(leaf)
        if abstract:
            return jnp.asarray(rng.uniform(0.1, 0.5, shape), dtype)
        # Zeros would hide what they are multiplied with; variances have to stay positive.
        value = np.asarray(leaf, np.float32)
        moved = value + 0.1 * (np.abs(value) + 0.1) * rng.uniform(0.5, 1, shape)
        return jnp.asarray(moved, dtype)

    params, example = jax.tree.map(near, (params, example))
    groups, names = family.groups, family.groups.elastic(*ALLOWED)
    full = groups.sizes(names)

    def apply_masked(params, widths):
        return apply(mask_params(groups, params, widths), example)

    masked = _compiled(_with_slopes(apply_masked, lost_rules))  # once, as widths are traced

    def agree(widths) -> bool:
        def apply_sliced(params):
            return apply_at(family, slice_params(groups, params, widths), example, widths)

        out, slopes = masked(params, full | widths)
        if lost_rules or 0 in widths.values():  # the slopes at half the widths tell enough
            expected = _compiled(lambda params: _floats(apply_sliced(params)))(params)
            return _finite(slopes) and _close(out, expected, 1e-2)
        expected, expected_slopes = _compiled(_with_slopes(apply_sliced, False))(params)
        return _close(out, expected, 1e-2) and _close(slopes, expected_slopes, 5e-2)

    def sound(names) -> bool:
        half = {name: max(1, groups.by_name[name].size // 2) for name in names}
        skips = {name: 0 for name in names if groups.by_name[name].lowest == 0}
        return agree(half) and (not skips or agree(half | skips))

    def unsound(names) -> set[str]:
        """Those because of which the networks differ, if not because of all together."""
        if sound(names):
            return set()
        if len(names) == 1:
            return {*names}
        middle = len(names) // 2
        return unsound(names[:middle]) | unsound(names[middle:]) or {*names}

    differing = unsound(names) if names else set()
    flagged = tuple(
        dataclasses.replace(group, flags=tuple(sorted({*group.flags, "unsound"})))
        if group.name in differing
        else group
        for group in groups.groups
    )
    return dataclasses.replace(family, groups=dataclasses.replace(groups, groups=flagged))


def _sizes(
    family: Family, widths: Mapping[str, int], batch: Mapping[Dim, int]
) -> Callable[[Dim], int]:
    """The function from dims to their ints."""
    atoms = {family.atoms[name].find(): width for name, width in widths.items()} | dict(batch)

    def size(dim: Dim) -> int:
        dim = dim.find()
        if dim.kind == "atom":
            return atoms.get(dim, dim.size)
        parts = [size(part) for part in dim.parts]
        return math.prod(parts) if dim.kind == "product" else sum(parts)

    return size


def sizes_at(
    family: Family, inputs: Sequence[Any], widths: Mapping[str, int]
) -> Callable[[Dim], int]:
    """The ints of the dims of `program` at `widths` for these inputs.

    Raises:
        ValueError: for widths or inputs that do not fit the network.
    """
    family.groups.check(widths, limited=False)
    for name, width in widths.items():
        group = family.groups.by_name[name]
        if width != group.size and (rigid := sorted(RIGID & set(group.flags))):
            raise ValueError(
                f"{name} is {', '.join(rigid)} and keeps its {group.size} channels, got {width}."
            )
    batch = {}
    active = [value for value in family.program.inputs if value.active]
    for value, array in zip(active, inputs, strict=True):
        for dim, n in zip(value.dims, np.shape(array), strict=True):
            dim = dim.find()
            if dim.notes & (RIGID - {"input", "output"}):
                continue
            if n != dim.size and "constant" in dim.notes:
                raise ValueError(
                    f"A constant in the network has one entry for each of the {dim.size} of the "
                    f"example, got {n}; make it from the shape of the input, or trace with {n}."
                )
            batch[dim] = n
    size = _sizes(family, widths, batch)
    for value, array in zip(active, inputs, strict=True):
        expected = tuple(map(size, value.dims))
        if np.shape(array) != expected:
            raise ValueError(f"The input must have the shape {expected}, got {np.shape(array)}.")
    return size


def apply_at(
    family: Family,
    params: Any,
    x: Any,
    widths: Mapping[str, int],
    observe: Callable[[Step, Any, int], None] | None = None,
) -> Any:
    """What `apply` would return if the network had been built with `widths`.

    Args:
        family: of the network, see `trace`.
        params: a tree like the one traced, at the shapes of `widths`, smaller or larger.
        x: inputs; of another batch size, if nothing in the network sums over the batch.
        widths: int by group.
        observe: called with each step of the program, its arrays, and the number of the layer where
            layers are stacked, else 0.

    Raises:
        ValueError: for widths or parameters that do not fit the network.
    """
    inputs = jax.tree.leaves(x)
    size = sizes_at(family, inputs, widths)
    leaves = family.groups.leaves(params, widths).values()
    return family.output.unflatten(family.program.run(size, [*leaves, *inputs], observe))


def num_values(family: Family) -> int:
    """Numbers that the products of the network write for one example, at full size."""

    def count(program: Program) -> int:
        written = (
            math.prod(d.size for d in s.outputs[0].dims) for s in program.steps if s.contracted
        )
        inside = (times * count(body) for s in program.steps for times, body in s.bodies)
        return sum(written) + sum(inside)

    (batch, *_), *_ = (value.dims for value in family.program.inputs if value.active)
    return count(family.program) // batch.size
