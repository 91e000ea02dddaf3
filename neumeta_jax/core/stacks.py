"""What an INR generates of a network: its tensors as stacks of query grids.

Every generated tensor is brought to the form [rows, columns, outputs]: rows are the channels that
it writes (or only touches, as a bias does), columns those that it reads, outputs all that holds no
channels, such as the taps of a kernel. Tensors of equal form are stacked and generated together;
where a parameter holds stacked layers, each of them is a tensor.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.elastic.axes import Axis
from neumeta_jax.elastic.groups import Groups


@dataclasses.dataclass(frozen=True)
class Side:
    """The rows or the columns of a stack of tensors, as a term like that of an `Axis`.

    Attributes:
        kind: "channels", "product" (the slowest first) or "concat".
        sizes: of channels, how many each tensor has.
        full: of channels, how many the largest tensor has in the network that the INR was made for.
        positions: of channels whose number varies, which of the widths each tensor has; else ().
        parts: of a product or concatenation.
    """

    kind: str
    sizes: tuple[int, ...] = ()
    full: int = 0
    positions: tuple[int, ...] = ()
    parts: tuple["Side", ...] = ()

    @property
    def size(self) -> int:
        """Length in the grid: that of the largest tensor."""
        if self.kind == "channels":
            return max(self.sizes)
        return (math.prod if self.kind == "product" else sum)(part.size for part in self.parts)

    @property
    def full_size(self) -> int:
        """Length in the grid of the network that the INR was made for."""
        if self.kind == "channels":
            return self.full
        return (math.prod if self.kind == "product" else sum)(p.full_size for p in self.parts)

    @property
    def elastic(self) -> bool:
        return bool(self.positions) or any(part.elastic for part in self.parts)

    @property
    def factors(self) -> tuple["Side", ...]:
        return self.parts if self.kind == "product" else (self,)

    def leaves(self) -> tuple["Side", ...]:
        if self.kind == "channels":
            return (self,)
        return tuple(leaf for part in self.parts for leaf in part.leaves())

    def width(self, widths: jax.Array) -> jax.Array:
        """[tensors]: how many channels there are at `widths`, [names]."""
        if self.kind == "channels":
            if self.positions:
                return widths[np.array(self.positions)]
            return jnp.array(self.sizes, widths.dtype)
        parts = [part.width(widths) for part in self.parts]
        return functools.reduce(jnp.multiply if self.kind == "product" else jnp.add, parts)

    def combine(self, of_channels: Callable[["Side"], jax.Array]) -> jax.Array:
        """A matrix [tensors, new size, old size] for the whole side from those of its channels.

        Kronecker products for products, blocks on the diagonal for concatenations.
        """
        if self.kind == "channels":
            return of_channels(self)
        matrices = [part.combine(of_channels) for part in self.parts]
        if self.kind == "product":
            return functools.reduce(jax.vmap(jnp.kron), matrices)
        return jax.vmap(lambda *m: jax.scipy.linalg.block_diag(*m))(*matrices)

    def mask(self, of_channels: Callable[["Side"], jax.Array]) -> jax.Array:
        """bool[tensors, size] for the whole side from those of its channels."""
        if self.kind == "channels":
            return of_channels(self)
        masks = [part.mask(of_channels) for part in self.parts]
        if self.kind == "concat":
            return jnp.concatenate(masks, axis=1)
        keep = masks[0]
        for mask in masks[1:]:
            keep = (keep[:, :, None] & mask[:, None, :]).reshape(len(mask), -1)
        return keep

    def resized(self, sizes: Sequence[int]) -> "Side":
        """This side in a network whose elastic channels have `sizes`, ints by position."""
        if self.positions:
            return dataclasses.replace(self, sizes=tuple(int(sizes[p]) for p in self.positions))
        return dataclasses.replace(self, parts=tuple(part.resized(sizes) for part in self.parts))

    def present(self, tensor: int) -> np.ndarray:
        """int[any]: which entries of the grid a tensor has that is not the largest one."""
        if self.kind == "channels":
            return np.arange(self.sizes[tensor])
        entries, offset = np.zeros(int(self.kind == "product"), int), 0
        for part in self.parts:
            inner = part.present(tensor)
            if self.kind == "product":
                entries = (entries[:, None] * part.size + inner).reshape(-1)
            else:
                entries, offset = np.append(entries, offset + inner), offset + part.size
        return entries


@dataclasses.dataclass(frozen=True)
class TensorStack:
    """Tensors of equal form that are generated in one batched call.

    Attributes:
        name: by which an INR keeps its parameters.
        paths: of the tensors; one of stacked layers is named as often as there are layers.
        indices: the tensor index i of each, in 0..num_tensors - 1.
        num_tensors: N, the number of tensors that the INR generates.
        rows, columns: sides of the query grid.
        num_outputs: values per query, 9 for a slice of a 3x3 kernel and 1 for a bias.
        norm: what channel counts are divided by, the largest of the network.
        kernel: whether it is a factor of a product.
        owners: the group, as a position, with which each tensor joins the training.
        conditions: on whose widths each tensor depends, as positions: those of its own channels and
            for a bias those of what its product reads.
        scope: positions of the groups whose branches, if skipped, the tensors make up for.
        biases: of what a least-squares projection may repair, the (stack, row, sign) of each
            tensor's bias, None without one; () for all other stacks.
    """

    name: str
    paths: tuple[str, ...]
    indices: tuple[int, ...]
    num_tensors: int
    rows: Side
    columns: Side
    num_outputs: int
    norm: int
    kernel: bool
    owners: tuple[int, ...]
    conditions: tuple[tuple[int, ...], ...]
    scope: tuple[int, ...]
    biases: tuple[tuple[str, int, int] | None, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), self.rows.size, self.columns.size, self.num_outputs

    def resized(self, sizes: Sequence[int]) -> "TensorStack":
        """The stack in a network whose elastic groups have `sizes`, ints by position."""
        rows, columns = self.rows.resized(sizes), self.columns.resized(sizes)
        return dataclasses.replace(self, rows=rows, columns=columns)


def full_widths(stacks: Sequence[TensorStack], num_names: int) -> np.ndarray:
    """float32[names]: the widths of the network that an INR was made for, by its own grids."""
    full = np.ones(num_names, np.float32)
    for stack in stacks:
        for leaf in (*stack.rows.leaves(), *stack.columns.leaves()):
            full[list(leaf.positions)] = leaf.full
    return full


def identities(channels: Side) -> jax.Array:
    """float32[tensors, size, size]: what does nothing to channels whose number does not vary."""
    shape = (len(channels.sizes), channels.size, channels.size)
    return jnp.broadcast_to(jnp.eye(channels.size, dtype=jnp.float32), shape)


def _placed(groups: Groups, path: str) -> tuple[list[tuple[int, Axis]], ...]:
    """The factors of a tensor that are rows, columns, outputs and layers.

    Of each (place among all factors, axis).
    """
    roles = {m.axis: m.role for g in groups.groups for m in g.members if m.path == path}
    parts: tuple[list[tuple[int, Axis]], ...] = [], [], [], []
    place = 0
    for n, axis in enumerate(groups.axes[path]):
        for factor in axis.factors():
            part = roles.get(n) == "read" if any(factor.groups()) else 2 + (axis.kind == "layers")
            parts[part].append((place, factor))
            place += 1
    return parts


@functools.lru_cache(maxsize=4096)
def _layout(groups: Groups, path: str) -> tuple[tuple[Axis, ...], tuple[int, ...]]:
    """All factors of a tensor, and the order that brings them to layers, rows, columns, outputs."""
    factors = tuple(factor for axis in groups.axes[path] for factor in axis.factors())
    *sides, layers = _placed(groups, path)
    return factors, tuple(place for part in (layers, *sides) for place, _ in part)


def pack(groups: Groups, path: str, tensor: jax.Array) -> jax.Array:
    """[layers, rows, columns, outputs] of a full-size parameter; 1 layer where none are stacked."""
    factors, order = _layout(groups, path)
    sizes = [math.prod(factor.size for _, factor in part) for part in _placed(groups, path)]
    tensor = jnp.asarray(tensor).reshape([factor.size for factor in factors])
    return tensor.transpose(order).reshape(sizes[3], sizes[0], sizes[1], -1)


def unpack(groups: Groups, stack: TensorStack, path: str, grid: jax.Array, sizes: Mapping):
    """A parameter of [tensors, rows, columns, outputs] of a stack at the container `sizes`."""
    row = stack.paths.index(path)
    grid = grid[row : row + stack.paths.count(path)]
    for n, side in enumerate((stack.rows, stack.columns), 1):
        present = side.present(row)
        if len(present) < side.size:
            whole = np.array_equal(present, np.arange(len(present)))
            index = (slice(None),) * n + (slice(len(present)) if whole else present,)
            grid = grid[index]
    factors, order = _layout(groups, path)
    shape = [factors[place].width(sizes) for place in order]
    tensor = grid.reshape(shape).transpose(np.argsort(order))
    return tensor.reshape([axis.width(sizes) for axis in groups.axes[path]])


def _side(axes: Sequence[Axis], positions: Mapping[str, int]) -> Side:
    """The side of a stack from the axis that each of its tensors has there."""
    first = axes[0]
    if first.kind in ("fixed", "group"):
        place = tuple(positions[axis.group] for axis in axes if axis.group in positions)
        sizes = tuple(axis.size for axis in axes)
        return Side("channels", sizes, max(sizes), place)
    parts = zip(*(axis.parts for axis in axes), strict=True)
    return Side(first.kind, (), 0, (), tuple(_side(part, positions) for part in parts))


def _product(factors: list[tuple[int, Axis]]) -> Axis:
    axes = tuple(axis for _, axis in factors)
    if len(axes) == 1:
        return axes[0]
    size = math.prod(axis.size for axis in axes)
    return Axis("product", size, "", axes) if axes else Axis("fixed", 1)


def generated_tensors(groups: Groups, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The tensors that change with the widths of `names`, and on which of them each depends.

    In the order of the network: for each group what writes it, what touches it, what reads it and
    the biases of those products.

    What is frozen is not generated.

    Returns:
        positions in `names`, ascending, by path.
    """
    positions = {name: n for n, name in enumerate(names)}
    by_path = {reader.path: reader for reader in groups.readers}
    order: dict[str, None] = {}
    for name in names:
        members = groups.by_name[name].members
        for role in ("write", "elementwise", "read"):
            for member in members:
                if role in member.role.split("+"):
                    order[member.path] = None
                    reader = by_path.get(member.path)
                    if role == "read" and reader and reader.bias:
                        order[reader.bias] = None
    biases = {r.bias: r for r in groups.readers if r.bias}
    depends = {}
    for path in (path for path in order if path not in groups.frozen):
        axes = list(groups.axes[path])
        if path in biases:
            reader = biases[path]
            axes += [groups.axes[reader.path][n] for n in reader.reads]
        places = {positions[g] for axis in axes for g in axis.groups() if g in positions}
        depends[path] = tuple(sorted(places))
    return depends


def tensor_stacks(
    groups: Groups,
    names: Sequence[str],
    label: Callable[[str], str | None],
    scope: Callable[[str], tuple[int, ...]],
) -> tuple[TensorStack, ...]:
    """The tensors that change with the widths of `names`, stacked.

    Args:
        groups: of the network.
        names: of its elastic groups.
        label: the stack of a tensor by its path; None stacks those of equal form.
        scope: by path, see `TensorStack`.
    """
    positions = {name: n for n, name in enumerate(names)}
    depends = generated_tensors(groups, names)
    placed = {path: _placed(groups, path) for path in depends}
    layers = {path: math.prod(axis.size for _, axis in placed[path][3]) for path in depends}
    index = dict(zip(depends, itertools.accumulate(layers.values(), initial=0), strict=False))
    readers = {
        r.path: r
        for r in groups.readers
        if any(g in positions for n in r.reads for g in groups.axes[r.path][n].groups())
    }
    written = {m.path for g in groups.groups for m in g.members if m.role != "elementwise"}

    def form(axis: Axis):
        return axis.kind, axis.size, axis.group in positions, tuple(map(form, axis.parts))

    stacked: dict[object, list[str]] = {}
    for path in depends:
        rows, columns, outputs, _ = placed[path]
        own = path.rpartition("/")[2], scope(path), path in readers, _layout(groups, path)[1]
        key = label(path) or (
            *own,
            form(_product(rows)),
            form(_product(columns)),
            form(_product(outputs)),
        )
        stacked.setdefault(key, []).extend([path] * layers[path])
    places = {
        path: (label(path) or paths[0].replace("/", "."), paths.index(path))
        for paths in stacked.values()
        for path in paths
    }
    norm = max(group.size for group in groups.groups if "output" not in group.flags)
    stacks = []
    for paths in stacked.values():
        rows, columns, outputs = ([_product(placed[p][n]) for p in paths] for n in range(3))
        number = [row - paths.index(path) for row, path in enumerate(paths)]  # of its layer
        biases: tuple = ()
        if all(path in readers for path in paths):
            partners = [(readers[path], n) for path, n in zip(paths, number, strict=True)]
            biases = tuple(
                (places[r.bias][0], places[r.bias][1] + n, r.sign) if r.bias else None
                for r, n in partners
            )
        stacks.append(
            TensorStack(
                name=places[paths[0]][0],
                paths=tuple(paths),
                indices=tuple(index[path] + n for path, n in zip(paths, number, strict=True)),
                num_tensors=sum(layers.values()),
                rows=_side(rows, positions),
                columns=_side(columns, positions),
                num_outputs=outputs[0].size,
                norm=norm,
                kernel=paths[0] in written,
                owners=tuple(depends[path][0] for path in paths),
                conditions=tuple(depends[path] for path in paths),
                scope=scope(paths[0]),
                biases=biases,
            )
        )
    return tuple(stacks)
