"""Groups of channels that can only be removed together: what a family of networks is, as data.

`Groups` is hashable, so that it can be a static argument of `jax.jit`, goes to and from JSON and
may be edited by hand. `family.trace` finds it in a network.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from neumeta_jax.elastic.axes import Axis

# Why the width of a group may not vary, by flag.
REASONS = {
    "input": "it holds channels of the input",
    "output": "it holds outputs of the network",
    "stream": "it carries a residual stream",
    "reduced": "a norm, softmax, maximum, mean or sum over its channels would notice those masked",
    "paired": "two activations are contracted over it",
    "constant": "it meets an array that is not a parameter",
    "random": "it meets random numbers, which differ at other shapes",
    "ordered": "a sort, scan or reversal goes along it",
    "indexed": "a part of it is picked by position",
    "spatial": "a window moves along it",
    "fixed": "a reshape or a primitive without a rule needs just this size",
    "unsound": "masked and sliced networks differ in it, or give NaN",
    "unread": "no product reads it",
    "unwritten": "no product writes it",
}
ALLOWED = ("stream", "paired")  # what `Groups.elastic` takes

_ROLES = {"read": "read", "write": "written"}


@dataclasses.dataclass(frozen=True)
class Member:
    """One axis of one parameter that holds channels of a group, alone or as a part of it.

    Attributes:
        path: of the parameter, names joined by "/".
        axis: which of its axes.
        role: "write" (a product puts its results there), "read" (a product sums over it), both
            joined by "+", or "elementwise".
        part: where in a composed axis, () for the whole.
    """

    path: str
    axis: int
    role: str
    part: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that can only be removed together.

    Attributes:
        name: of the first layer that writes them.
        size: how many there are in the network that was traced.
        members: the axes that hold them.
        flags: why the width may not vary, keys of `REASONS`.
        skips: parameters that are zero, beside the group itself, where a residual branch of width 0
            is skipped; None where there is no such branch.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    flags: tuple[str, ...] = ()
    skips: tuple[str, ...] | None = None

    def has(self, role: str) -> bool:
        return any(role in member.role for member in self.members)

    @property
    def lowest(self) -> int:
        """The smallest width: 0 where the branch can be skipped."""
        return 1 if self.skips is None else 0

    def obstacles(self, allowed: Iterable[str] = ()) -> tuple[str, ...]:
        """Keys of `REASONS` for which the width may not vary, but for those `allowed`."""
        missing = [f"un{past}" for role, past in _ROLES.items() if not self.has(role)]
        if "paired" in self.flags:  # an activation reads it
            missing = [flag for flag in missing if flag != "unread"]
        return tuple(flag for flag in (*self.flags, *missing) if flag not in set(allowed))


@dataclasses.dataclass(frozen=True)
class Reader:
    """A parameter whose product with an activation sums over its axes `reads`.

    Attributes:
        path: of the parameter.
        reads, writes: its axes.
        bias: the parameter that is added to the product (sign 1) or subtracted (-1), if there is
            one; it has the shape of the axes `writes`.
    """

    path: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    bias: str | None = None
    sign: int = 1


@dataclasses.dataclass(frozen=True)
class Groups:
    """What a family of networks is.

    Attributes:
        groups: in the order of the network.
        tensors: the axes of each parameter by path, in the order of `jax.tree.leaves`.
        readers: the parameters whose products a projection can repair.
        frozen: paths of what is cut to a width but neither generated nor trained, such as the
            variances of a norm, which have to stay positive. No mask sets it to zero, but where a
            product sums over it or writes it.
        structure: of the parameters, a PyTreeDef, None where they are nested dicts. JSON leaves it
            out: `from_json` takes it from a tree.
    """

    groups: tuple[Group, ...]
    tensors: tuple[tuple[str, tuple[Axis, ...]], ...]
    readers: tuple[Reader, ...]
    frozen: tuple[str, ...] = ()
    structure: Any = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Groups):
            return NotImplemented
        if (self.structure is None) != (other.structure is None):
            return False  # a PyTreeDef refuses to be compared with None
        return all(getattr(self, f.name) == getattr(other, f.name) for f in _FIELDS)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.groups, self.tensors, self.readers, self.frozen, self.structure))

    @functools.cached_property
    def by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @functools.cached_property
    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The axes of each parameter by path."""
        return dict(self.tensors)

    @functools.cached_property
    def unmasked(self) -> frozenset[tuple[str, int]]:
        """(path, axis) where a parameter keeps its values in channels that are not there.

        A 0 there could be divided by. Such channels are silenced by what reads them.
        """
        members = [member for group in self.groups for member in group.members]
        return frozenset(
            (m.path, m.axis) for m in members if m.path in self.frozen and m.role == "elementwise"
        )

    def __getitem__(self, name: str) -> Group:
        return self.by_name[name]

    def elastic(self, *allowed: str) -> tuple[str, ...]:
        """Names of the groups whose width may vary, in the order of the network.

        They are written and read by products and have no flags but `allowed` ones: "stream" for
        the residual streams, "paired" for queries and keys of an attention.
        """
        return tuple(group.name for group in self.groups if not group.obstacles(allowed))

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.by_name[name].size for name in names}

    def resized(self, sizes: Mapping[str, int]) -> "Groups":
        """The groups of a network of this family that was built with `sizes`."""
        return _resized(self, tuple(sizes.items()))

    def check(self, widths: Mapping[str, Any], *, limited: bool = True) -> None:
        """Raises ValueError unless `widths` are of groups and, where not traced, in range.

        With `limited` the full size is the upper limit.
        """
        if unknown := sorted(set(widths) - set(self.by_name)):
            raise ValueError(
                f"Widths need names of groups, got {unknown}; there are {list(self.by_name)}."
            )
        for name, width in widths.items():
            group = self.by_name[name]
            try:
                number = np.asarray(width)
            except jax.errors.TracerArrayConversionError:
                continue
            if number.shape or not np.issubdtype(number.dtype, np.integer):
                raise ValueError(f"The width of {name} must be one integer, got {width!r}.")
            if number < group.lowest or (limited and number > group.size):
                upper = f"to {group.size}" if limited else "on"
                raise ValueError(f"{name} takes widths from {group.lowest} {upper}, got {number}.")

    def leaves(self, params: Any, widths: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The leaves of `params` by path, after a check that they are of this network.

        `widths` are those of a dense tree; with None its shapes are not looked at.

        Raises:
            ValueError: naming what differs.
        """
        values = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
        if values.keys() != self.axes.keys():
            raise ValueError(
                "params must be the same tree as the one traced, or the groups are of another "
                f"network: missing {_first(self.axes.keys() - values.keys())}, unexpected "
                f"{_first(values.keys() - self.axes.keys())}."
            )
        if widths is None:
            return values
        for path, axes in self.tensors:
            expected = tuple(axis.width(widths) for axis in axes)
            if np.shape(values[path]) != expected:
                raise ValueError(
                    f"{path} must have the shape {expected}, got {np.shape(values[path])}; the "
                    "groups are of another network, or the parameters of other widths."
                )
        return values

    def map(self, function: Callable, params: Any, widths: Mapping[str, int] | None = None) -> Any:
        """The tree of `function(path, axes, leaf)`; see `leaves` for the check."""
        values = self.leaves(params, widths)
        tree = jax.tree.structure(params)
        return tree.unflatten([function(p, self.axes[p], x) for p, x in values.items()])

    def to_json(self) -> str:
        fields = dataclasses.asdict(dataclasses.replace(self, structure=None))
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str, params: Any = None) -> "Groups":
        """The groups that `to_json` wrote.

        Args:
            text: the JSON.
            params: a tree of the network, whose structure its networks are to have; without it
                they are nested dicts.

        Raises:
            ValueError: if the text is something else, or of another network.
        """
        try:
            groups = json.loads(text, object_hook=_revive)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"Groups need the JSON that to_json writes, got {error!r}.") from None
        if not isinstance(groups, cls):
            raise ValueError(f"Groups need the JSON that to_json writes, got {text[:40]!r}.")
        if params is None:
            return groups
        groups.leaves(params, {})
        return dataclasses.replace(groups, structure=structure_of(params))

    def __str__(self) -> str:
        """A table: group, size, whether it is elastic or why not, which parameters."""
        rows = [("group", "size", "width may vary", "parameters")]
        for group in self.groups:
            obstacles = group.obstacles()
            reason = "; ".join(REASONS.get(flag, flag) for flag in obstacles)
            if set(obstacles) <= set(ALLOWED):
                reason += f" (elastic({', '.join(map(repr, obstacles))}) allows it)"
            state = f"no: {reason}" if obstacles else "yes, from 0" if group.lowest == 0 else "yes"
            members = " ".join(f"{m.path}[{m.axis}]" for m in group.members)
            rows.append((group.name, str(group.size), state, members))
        widths = [max(len(row[n]) for row in rows) for n in range(3)]
        lines = ("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)
        return "\n".join(lines)


_FIELDS = dataclasses.fields(Groups)


@functools.lru_cache(maxsize=1024)
def _resized(groups: Groups, sizes: tuple[tuple[str, int], ...]) -> Groups:
    new = dict(sizes)
    of = (dataclasses.replace(g, size=new.get(g.name, g.size)) for g in groups.groups)
    tensors = ((path, tuple(axis.resized(new) for axis in axes)) for path, axes in groups.tensors)
    return dataclasses.replace(groups, groups=tuple(of), tensors=tuple(tensors))


_CLASSES = {
    frozenset(field.name for field in dataclasses.fields(cls)): cls
    for cls in (Axis, Member, Group, Reader, Groups)
}


def _revive(fields: dict) -> Any:
    tuples = {key: _tuples(value) for key, value in fields.items()}
    return _CLASSES[frozenset(fields)](**tuples)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _first(paths: Iterable[str]) -> str:
    paths = sorted(paths)
    return "nothing" if not paths else ", ".join(paths[:3]) + ", ..." * (len(paths) > 3)


def leaf_paths(tree: Any) -> list[str]:
    """The path of each leaf, names joined by "/", in the order of `jax.tree.leaves`.

    Raises:
        ValueError: where two leaves have the same path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"Paths of parameters must differ, got {twice} twice; rename one of them.")
    return paths


def structure_of(params: Any) -> Any:
    """The PyTreeDef of `params`, None for nested dicts."""

    def is_nested(tree) -> bool:
        if type(tree) is not dict:
            return jax.tree_util.all_leaves([tree])
        return all(type(k) is str and "/" not in k and is_nested(v) for k, v in tree.items())

    return None if type(params) is dict and is_nested(params) else jax.tree.structure(params)
