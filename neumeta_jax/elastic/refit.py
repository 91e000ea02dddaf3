"""A smaller network whose products are solved anew, so that it follows the full one.

Channels that are gone leave an error in each layer, and errors add up from layer to layer. Here the
products of the smaller network are solved one after the other, in the order of the network: weights
and bias by least squares, from what the smaller network has computed so far to what the full one
has there. Where the result is only added to something that is there already, such as a residual
stream, the sum is what has to be met. Labels and slopes are not needed, only a few examples.

Method: He, Zhang and Sun, arXiv 1707.06168, section 3.2, for any traced network.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.elastic.axes import Dim
from neumeta_jax.elastic.family import Family, sizes_at
from neumeta_jax.elastic.groups import Reader
from neumeta_jax.elastic.program import Program, Step, Value
from neumeta_jax.elastic.resize import mask_params

Arrays = list[jax.Array]  # one for each batch


@dataclasses.dataclass(eq=False)
class _Call:
    """A step and the values that it takes and makes, under the names of the whole network."""

    step: Step
    inputs: list[Value]
    outputs: list[Value]


class _Plan:
    """A program as calls of steps, the bodies of transparent ones in their place.

    So are those of loops over stacked layers, once for each layer; what is stacked in a parameter
    counts as parameters of their own.

    Attributes:
        whole: (path of the parameter, layer) by the path of a layer of it.
        calls: in order, those that depend on the input.
        active: what depends on the input.
        makers: the call that makes each other value, but for parameters and constants.
        users: the `calls` that take each active value, as often as they do.
        uses: how many `calls` depend on each parameter.
    """

    def __init__(self, family: Family, size: Callable[[Dim], int]):
        self.family, self.size = family, size
        program = family.program
        self.examples = [value for value in program.inputs if value.active]
        self.paths = dict(zip(program.inputs, (p for p, _ in family.groups.tensors), strict=False))
        self.whole: dict[str, tuple[str, int]] = {}
        self.active = set(self.examples)
        self.constants: dict[Value, Any] = {}
        self.makers: dict[Value, _Call] = {}
        self.calls: list[_Call] = []
        names: dict[Value, Value] = {}
        for call in self._flat(program, names):
            if self.active.isdisjoint(call.inputs):
                self.makers |= dict.fromkeys(call.outputs, call)
            else:
                self.calls.append(call)
                self.active.update(call.outputs)
        self.outputs = {names.get(value, value) for value in program.outputs}
        self.users: dict[Value, list[_Call]] = collections.defaultdict(list)
        for call in self.calls:
            for value in call.inputs:
                if value in self.active:
                    self.users[value].append(call)
        self.uses = collections.Counter(
            path for call in self.calls for path in set().union(*map(self.sources, call.inputs))
        )

    def _flat(self, program: Program, names: dict[Value, Value], often=False) -> Iterator[_Call]:
        self.constants |= dict(program.constants)
        for step in program.steps:
            inputs = [names.get(value, value) for value in step.inputs]
            if step.layers:
                yield from self._layers(step, inputs, names)
            elif step.transparent:
                body = step.bodies[0][1]
                names |= zip(body.inputs, inputs, strict=True)
                yield from self._flat(body, names, often)
                made = [names.get(value, value) for value in body.outputs]
                names |= zip(step.outputs, made, strict=True)
            else:
                outputs = list(map(dataclasses.replace, step.outputs)) if often else step.outputs
                names |= zip(step.outputs, outputs, strict=True)
                yield _Call(step, inputs, outputs)

    def _layers(self, step: Step, inputs: list[Value], names: dict) -> Iterator[_Call]:
        assert step.layers
        (first, last, order), body = step.layers, step.bodies[0][1]
        carry, stacked = inputs[first:last], {}
        for n in order:
            slices = list(map(dataclasses.replace, body.inputs[last:]))
            for whole, part in zip(inputs[last:], slices, strict=True):
                if path := self.paths.get(whole):
                    self.paths[part] = f"{path}[{n}]"
                    self.whole[self.paths[part]] = path, n
                else:
                    yield _call(lambda arrays, n=n: arrays[0][n], [whole], part)
            names |= zip(body.inputs, [*inputs[:first], *carry, *slices], strict=True)
            yield from self._flat(body, names, True)
            made = [names.get(value, value) for value in body.outputs]
            carry, stacked[n] = made[: len(carry)], made[len(carry) :]
        names |= zip(step.outputs, carry, strict=False)
        for number, output in enumerate(step.outputs[len(carry) :]):
            parts = [stacked[n][number] for n in range(len(order))]
            names[output] = dataclasses.replace(output)
            yield _call(jnp.stack, parts, names[output])

    def split(self, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """`leaves` by path, those of layers too."""
        result = dict(leaves)
        for path, (of, n) in self.whole.items():
            result[path] = result[of][n]
        return result

    def joined(self, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """`leaves` by path, of layers stacked as they were."""
        result = dict(leaves)
        for path, (of, n) in reversed(self.whole.items()):  # layers of layers first
            result[of] = jnp.asarray(result[of]).at[n].set(result[path])
        return result

    def chain(self, path: str) -> list[str]:
        """`path`, and if it is a layer the parameters that it is a layer of, the whole one last."""
        return [path, *(self.chain(self.whole[path][0]) if path in self.whole else ())]

    def readers(self, readers: Iterable[Reader]) -> dict[str, Reader]:
        """`readers` by path, those of layers too."""
        result = {reader.path: reader for reader in readers}
        for path, (of, n) in self.whole.items():
            if reader := result.get(of):
                reads, writes = (
                    tuple(a - 1 for a in axes) for axes in (reader.reads, reader.writes)
                )
                bias = f"{reader.bias}[{n}]"
                bias = bias if bias in self.whole else None
                result[path] = Reader(path, reads, writes, bias, reader.sign)
        return result

    def sources(self, value: Value) -> set[str]:
        """The parameters that a value is made of which does not depend on the input."""
        if value in self.paths:
            return {self.paths[value]}
        if value in self.active or value not in self.makers:
            return set()
        return set().union(*map(self.sources, self.makers[value].inputs))


def _call(function: Callable, inputs: list[Value], output: Value) -> _Call:
    """A call of `function(arrays)`."""
    step = Step(inputs, [output], lambda size, arrays: [function(arrays)])
    return _Call(step, inputs, [output])


class _Network:
    """A network that runs call by call, on all batches at once."""

    def __init__(self, plan: _Plan, leaves: Mapping[str, jax.Array], batches: list[list]):
        self.plan, self.leaves = plan, plan.split(leaves)
        parts, self.num_batches = zip(*batches, strict=True), len(batches)
        self.values: dict[Value, Arrays] = dict(zip(plan.examples, map(list, parts), strict=True))

    def fixed(self, value: Value) -> Any:
        """What does not depend on the input, of the parameters as they are now."""
        plan = self.plan
        if value in plan.paths:
            return self.leaves[plan.paths[value]]
        if value in plan.constants:
            return plan.constants[value]
        call = plan.makers[value]
        made = call.step.run(plan.size, [self.fixed(each) for each in call.inputs])
        return made[call.outputs.index(value)]

    def inputs(self, call: _Call, n: int, given: Mapping[Value, jax.Array] = {}) -> list:
        """What a call takes in batch n, `given` arrays in place of others."""

        def array(value):
            if value in given:
                return given[value]
            return self.values[value][n] if value in self.plan.active else self.fixed(value)

        return [array(value) for value in call.inputs]

    def results(self, call: _Call, n: int, given: Mapping[Value, jax.Array] = {}) -> list:
        """The outputs of a call in batch n."""
        return call.step.run(self.plan.size, self.inputs(call, n, given))

    def run(self, call: _Call) -> None:
        batches = [self.results(call, n) for n in range(self.num_batches)]
        self.values |= zip(call.outputs, map(list, zip(*batches, strict=True)), strict=True)

    def forget(self, values: list[Value]) -> None:
        for value in values:
            self.values.pop(value, None)

    def additions(self, call: _Call) -> list[_Call]:
        """The calls after `call` that add to its result what is there already."""
        found, (value,), (array,) = [], call.outputs, self.results(call, 0)
        while len(self.plan.users[value]) == 1 and value not in self.plan.outputs:
            (user,) = self.plan.users[value]
            needed = [v for v in user.inputs if v in self.plan.active and v is not value]
            if len(user.outputs) != 1 or any(v not in self.values for v in needed):
                break
            moved = array + _noise_like(array)
            (before,), (after,) = (self.results(user, 0, {value: x}) for x in (array, moved))
            if before.shape != moved.shape or not _equal(after - before, moved - array):
                break
            found.append(user)
            (value,), array = user.outputs, before
        return found

    def after(self, call: _Call, additions: list[_Call], n: int) -> jax.Array:
        """The result of `call` and `additions` to it in batch n."""
        (array,), (value,) = self.results(call, n), call.outputs
        for user in additions:
            (array,), (value,) = self.results(user, n, {value: array}), user.outputs
        return array


def _noise_like(x: jax.Array) -> jax.Array:
    draws = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    return jnp.asarray(draws * (np.std(x) + 1e-3), x.dtype)


def _equal(a: jax.Array, b: jax.Array) -> bool:
    return bool(jnp.max(jnp.abs(a - b)) <= 1e-3 * (jnp.max(jnp.abs(b)) + 1e-6))


_masked = jax.jit(mask_params, static_argnums=0)  # else each operation is a program


@jax.default_matmul_precision("highest")
def refit(
    family: Family,
    params: Any,
    small: Any,
    widths: Mapping[str, int],
    x: Any,
    *,
    paths: Container[str] | None = None,
    batch_size: int = 100,
    ridge: float = 1e-3,
) -> Any:
    """`small` with the weights and biases of its products solved anew, one after the other.

    Products of parameters that are used more than once, or inside of loops other than those over
    stacked layers, stay as they are; so do grouped convolutions. Activations of `x` stay in memory
    as long as they are needed.

    Args:
        family: of the network, see `trace`.
        params: of the full network.
        small: a tree of the same shapes, masked to `widths` (`mask_params`).
        widths: int by group.
        x: inputs, arrays [number, ...] as the network takes them.
        paths: of the weights to be solved; default all.
        batch_size: examples that run together; what is left over when all are divided counts not.
        ridge: of the least squares, relative to the mean squares of what a product reads; at least
            the ratio of unknowns to equations. It pulls to `small`.

    Returns:
        A tree like `small`.

    Raises:
        ValueError: for no inputs, and as `apply_at`.
    """
    family.groups.check(widths)
    inputs = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    if not (number := min(map(len, inputs))):
        raise ValueError("A refit needs inputs, a few hundred or more, got none.")
    batch_size = min(batch_size, number)
    starts = range(0, number - batch_size + 1, batch_size)
    parts = [slice(start, start + batch_size) for start in starts]
    batches = [[jnp.asarray(leaf[part]) for leaf in inputs] for part in parts]
    groups = family.groups
    plan = _Plan(family, sizes_at(family, batches[0], {}))
    ones = jax.tree.map(lambda leaf: np.ones(np.shape(leaf), np.float32), params)
    masks = plan.split(groups.leaves(_masked(groups, ones, dict(widths))))
    full = _Network(plan, groups.leaves(params), batches)
    narrow = _Network(plan, groups.leaves(small), batches)
    solved = [r for r in groups.readers if r.path not in groups.frozen]
    readers = plan.readers(r for r in solved if paths is None or r.path in paths)
    left = collections.Counter({value: len(calls) for value, calls in plan.users.items()})
    for call in plan.calls:
        product = _product(plan, call, readers)
        if product:
            for path, change in _solved(product, full, narrow, ridge).items():
                narrow.leaves[path] = narrow.leaves[path] + masks[path] * change
        full.run(call)
        narrow.run(call)
        left.subtract(value for value in call.inputs if value in plan.active)
        over = [value for value in (*call.inputs, *call.outputs) if left[value] < 1]
        full.forget(over)
        narrow.forget(over)
    found = plan.joined(narrow.leaves)
    return groups.map(lambda path, _, leaf: found[path].astype(leaf.dtype), small)


class _Product(NamedTuple):
    """A call that multiplies an activation by a parameter.

    Attributes:
        call, reader: of the product.
        size: the ints of the dims of the program.
        weight: which operand the parameter is.
        order: the axis of the parameter that each axis of the operand is.
        shape: of the operand.
        summed, free: the axes of the operand that are summed over, and those that are not.
    """

    call: _Call
    reader: Reader
    size: Callable[[Dim], int]
    weight: int
    order: tuple[int, ...]
    shape: tuple[int, ...]
    summed: tuple[int, ...]
    free: tuple[int, ...]

    @property
    def unknowns(self) -> int:
        """For each entry of the free axes."""
        return math.prod(self.shape[axis] for axis in self.summed)

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.free)

    def operand(self, matrix: jax.Array, columns: Sequence[int]) -> jax.Array:
        """The operand of a matrix [unknowns, columns], whose free axes have the sizes `columns`."""
        array = matrix.reshape(*(self.shape[axis] for axis in self.summed), *columns)
        return jnp.moveaxis(array, range(array.ndim), (*self.summed, *self.free))

    def run(self, x: jax.Array, operand: jax.Array) -> jax.Array:
        pair = (operand, x) if self.weight == 0 else (x, operand)
        return self.call.step.run(self.size, pair)[0]

    def places(self, x: jax.Array) -> list[int]:
        """The axis of the result that each free axis becomes."""

        def shape(columns):
            weights = jnp.zeros((self.unknowns, math.prod(columns)), x.dtype)
            return jax.eval_shape(self.run, x, self.operand(weights, columns)).shape

        ones, found = [1] * len(self.free), []
        for n in range(len(ones)):
            larger = shape([*ones[:n], 2, *ones[n + 1 :]])
            found += [i for i, (a, b) in enumerate(zip(shape(ones), larger, strict=True)) if a != b]
        return found

    def changes(self, solution: np.ndarray) -> dict[str, jax.Array]:
        """By path, what a matrix [unknowns, or one more for the bias, columns] is."""
        values = jnp.asarray(solution, jnp.float32)
        weights = self.operand(values[: self.unknowns], self.columns)
        found = {self.reader.path: jnp.moveaxis(weights, range(weights.ndim), self.order)}
        if self.reader.bias:
            axes = sorted(range(len(self.free)), key=lambda n: self.order[self.free[n]])
            bias = values[self.unknowns].reshape(self.columns).transpose(axes)
            found[self.reader.bias] = self.reader.sign * bias
        return found


def _product(plan: _Plan, call: _Call, readers: Mapping[str, Reader]) -> _Product | None:
    """The call as a product that can be solved, if it is one."""
    step = call.step
    if step.weight is None or step.contracted is None or len(call.inputs) != 2:
        return None
    operand = call.inputs[step.weight]
    sources = plan.sources(operand)
    if not operand.view or len(sources) != 1:
        return None
    (path,) = sources
    *layers, whole = plan.chain(path)
    shift = len(layers)
    origins = [{axis - shift for p, axis in dim.origins if p == whole} for dim in operand.dims]
    order = tuple(min(axes, default=-1) for axes in origins)  # -1: it is more than moved
    uses = sum(plan.uses[part] for part in plan.chain(path))
    if path not in readers or uses != 1 or sorted(order) != [*range(len(order))]:
        return None
    summed = tuple(step.contracted[step.weight])
    free = tuple(axis for axis in range(len(order)) if axis not in summed)
    if not free or {order[axis] for axis in free} != {*readers[path].writes}:
        return None  # a stack of matrices, say
    shape = tuple(map(plan.size, operand.dims))
    return _Product(call, readers[path], plan.size, step.weight, order, shape, summed, free)


def _solved(
    product: _Product, full: _Network, narrow: _Network, ridge: float
) -> dict[str, jax.Array]:
    """What to add to the weights, and to the bias, of a product: float32 like each, by path."""
    call, batches = product.call, range(narrow.num_batches)
    additions = narrow.additions(call)
    missing = [full.after(call, additions, n) - narrow.after(call, additions, n) for n in batches]
    if not any(bool(jnp.any(x != 0)) for x in missing):
        return {}
    xs = [narrow.inputs(call, n)[1 - product.weight] for n in batches]
    places, last = product.places(xs[0]), range(-len(product.free), 0)
    unknowns = product.unknowns

    # Not compiled as a whole: operations one by one are compiled once for all layers of a shape.
    def sums(x, rest):
        # The product with a unit matrix has all that is summed as its channels.
        unit = product.operand(jnp.eye(unknowns, dtype=x.dtype), [unknowns, *[1] * (len(last) - 1)])
        seen = jnp.moveaxis(product.run(x, unit), places, last)
        seen = seen.reshape(-1, unknowns).astype(jnp.float32)
        if product.reader.bias:
            seen = jnp.pad(seen, ((0, 0), (0, 1)), constant_values=1.0)
        rest = jnp.moveaxis(rest, places, last).reshape(len(seen), -1).astype(jnp.float32)
        return seen.T @ seen, seen.T @ rest

    found = [jax.device_get(sums(*pair)) for pair in zip(xs, missing, strict=True)]
    gram, cross = (sum(x.astype(np.float64) for x in parts) for parts in zip(*found, strict=True))
    equations = sum(x.size for x in missing) / math.prod(product.columns)
    diagonal = np.diagonal(gram)
    load = max(ridge, np.count_nonzero(diagonal) / equations) * diagonal
    load += 1e-6 * np.mean(diagonal)  # of channels that are gone
    return product.changes(np.linalg.solve(gram + np.diag(load), cross))
