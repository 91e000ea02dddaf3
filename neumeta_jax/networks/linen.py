"""A Flax network of any architecture as the network of a run, by the function that builds it."""

import dataclasses
import functools
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from neumeta_jax import elastic, networks
from neumeta_jax.core.hypernetwork import Hypernetwork
from neumeta_jax.core.inr import INR
from neumeta_jax.elastic.counting import Count, macs_count, params_count

ELASTIC = ("paired",)  # flags of the groups that vary beside those without any
FULL = ("paired", "stream")


@dataclasses.dataclass(frozen=True)
class LinenSpec:
    """A network that maps images to logits.

    Attributes:
        factory: "module:function", or a kind of `networks.FAMILIES`, that makes a `flax.linen`
            module; its `__call__` takes images, and may take `train`.
        fields: JSON of the factory's keyword arguments; `num_classes` is added where it takes it.
        num_classes, image_size, channels: of the data.
    """

    factory: str
    fields: str
    num_classes: int
    image_size: int
    channels: int

    @property
    def title(self) -> str:
        return type(self.module).__name__

    @property
    def module(self) -> nn.Module:
        return _module(self)

    @property
    def family(self) -> elastic.Family:
        return _family(self)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, self.channels

    @property
    def num_params(self) -> int:
        return _params_count(self, ())(())

    @property
    def num_macs(self) -> int:
        return _macs_count(self, ())(())

    def to_dict(self) -> dict[str, Any]:
        """In JSON types; `from_dict` is the inverse."""
        return {**dataclasses.asdict(self), "fields": json.loads(self.fields)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LinenSpec":
        return cls(**{**values, "fields": json.dumps(values["fields"], sort_keys=True)})


class Network(NamedTuple):
    """How a network starts, trains, is prepared, and runs; see `cifar_resnet.Network`."""

    spec: LinenSpec

    @property
    def family(self) -> elastic.Family:
        return self.spec.family

    def init_variables(self, key: jax.Array) -> Any:
        """{"params"[, "batch_stats", ...]}."""
        return self.spec.module.init(key, jnp.zeros((1, *self.spec.input_shape)))

    def abstract_params(self) -> Any:
        return _shapes(self.spec)

    def train(self, variables: Mapping, images: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """(logits, collections that changed) in training, where the network tells them apart."""
        module = self.spec.module
        options: dict[str, Any] = {"train": True} if _takes(module.__call__, "train") else {}
        changing = [name for name in variables if name != "params"]
        logits, changed = module.apply(
            variables, images, mutable=changing, rngs={"dropout": key}, **options
        )
        return jnp.asarray(logits), changed

    def fold(self, variables: Mapping) -> Any:
        """The same function with batch norm moved into what precedes it."""
        return elastic.fold(self.family, variables)[1]

    def apply(self, tree: Mapping, images: jax.Array) -> jax.Array:
        """Logits in inference mode."""
        return jnp.asarray(self.spec.module.apply(tree, images))


def _takes(function: Any, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # what is written in C may have no signature
        return False


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@functools.lru_cache(maxsize=32)
def _module(spec: LinenSpec) -> nn.Module:
    fields = {name: _tuples(value) for name, value in json.loads(spec.fields).items()}
    if ":" not in spec.factory:
        return networks.make_network(spec.factory, num_classes=spec.num_classes, **fields)
    name, _, function = spec.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"network.factory must be an importable 'module:function', got {spec.factory!r}: "
            f"{error}; the folder of the module must be in PYTHONPATH."
        ) from None
    if _takes(factory, "num_classes"):
        fields.setdefault("num_classes", spec.num_classes)
    module = factory(**fields)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"network.factory must make a flax.linen Module, but {spec.factory} made "
            f"{type(module).__name__}."
        )
    return module


@functools.lru_cache(maxsize=32)
def _shapes(spec: LinenSpec) -> Any:
    images = jax.ShapeDtypeStruct((1, *spec.input_shape), jnp.float32)
    shapes = jax.eval_shape(spec.module.init, jax.random.key(0), images)
    logits = jax.eval_shape(spec.module.apply, shapes, images)
    if getattr(logits, "shape", None) != (1, spec.num_classes):
        raise ValueError(
            f"The network must map images to {spec.num_classes} logits, but {spec.factory} returns "
            f"{jax.tree.map(jnp.shape, logits)} for one image."
        )
    return shapes


@functools.lru_cache(maxsize=32)
def _family(spec: LinenSpec) -> elastic.Family:
    images = jax.ShapeDtypeStruct((2, *spec.input_shape), jnp.float32)
    return elastic.folded(elastic.trace(spec.module.apply, _shapes(spec), images))


@functools.lru_cache(maxsize=64)
def _macs_count(spec: LinenSpec, names: tuple[str, ...]) -> Count:
    return macs_count(spec.family, names)


@functools.lru_cache(maxsize=64)
def _params_count(spec: LinenSpec, names: tuple[str, ...]) -> Count:
    """Of the collection "params" alone: statistics are not counted, as is usual."""
    groups = spec.family.groups
    tensors = tuple(item for item in groups.tensors if item[0].startswith("params/"))
    return params_count(dataclasses.replace(groups, tensors=tensors), names)


@dataclasses.dataclass(frozen=True)
class LinenSize:
    """One network of a family: `spec` with the `widths` of its groups `names`."""

    spec: LinenSpec
    names: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def title(self) -> str:
        return self.spec.title

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @property
    def image_size(self) -> int:
        return self.spec.image_size

    @property
    def channels(self) -> int:
        return self.spec.channels

    @property
    def num_params(self) -> int:
        return _params_count(self.spec, self.names)(self.widths)

    @property
    def num_macs(self) -> int:
        return _macs_count(self.spec, self.names)(self.widths)

    def apply(self, tree: Any, x: jax.Array) -> jax.Array:
        """Logits of the dense network."""
        widths = dict(zip(self.names, self.widths, strict=True))
        return elastic.apply_at(self.spec.family, tree, x.astype(jnp.float32), widths)

    def to_dict(self) -> dict[str, Any]:
        """In JSON types; `from_dict` is the inverse."""
        fields = {"names": list(self.names), "widths": list(self.widths)}
        return {"spec": self.spec.to_dict(), **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LinenSize":
        spec = LinenSpec.from_dict(fields["spec"])
        return cls(spec, tuple(fields["names"]), tuple(fields["widths"]))


@dataclasses.dataclass(frozen=True, eq=False)
class LinenHypernetwork(Hypernetwork):
    """The family of a `LinenSpec`; equal to another one of the same network, groups and INR."""

    spec: LinenSpec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinenHypernetwork) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple:
        return self.spec, self.names, self.inr

    @property
    def network(self) -> Network:
        return Network(self.spec)

    def describe(self) -> dict[str, Any]:
        """Which family it is, in JSON types."""
        return {"network": self.spec.to_dict(), "names": list(self.names)}

    def num_params(self, widths: Any) -> Any:
        return _params_count(self.spec, self.names)(widths)

    def num_macs(self, widths: Any) -> Any:
        return _macs_count(self.spec, self.names)(widths)

    def num_layers(self, widths: Sequence[int]) -> int:
        """How many products with a parameter the network of `widths` has."""
        skipped = {name for name, width in zip(self.names, widths, strict=True) if width == 0}
        axes = self.groups.axes
        written = {m.path for g in self.groups.groups for m in g.members if m.role != "elementwise"}
        return sum(not skipped & {g for a in axes[path] for g in a.groups()} for path in written)

    def at(self, widths: Sequence[int]) -> LinenSize:
        """The network of `widths`."""
        return LinenSize(self.spec, self.names, tuple(int(width) for width in widths))

    def dense(self, tree: Any, widths: Sequence[int], sizes=None) -> tuple[LinenSize, Any]:
        """(`at(widths)`, the small tree) inside a tree of the channel numbers `sizes`."""
        groups, small = self.groups, self.at(widths)
        if sizes is not None:
            groups = groups.resized(self.by_name([int(size) for size in sizes]))
        return small, elastic.slice_params(groups, tree, self.by_name(small.widths))

    def forward(self, tree: Any, x: jax.Array, widths: Sequence[int] | None = None) -> jax.Array:
        """Logits of a masked tree; the network cut out of it runs where `widths` are given."""
        if widths is None:
            return self.network.apply(tree, x)
        small, dense = self.dense(tree, widths)
        return small.apply(dense, x)


def hypernetwork(
    spec: LinenSpec, inr: INR, *, names: Sequence[str] | None = None, streams: bool = False
) -> LinenHypernetwork:
    """The family of `spec` in which the groups `names` vary.

    Args:
        spec: the network.
        inr: what generates all that changes with the widths.
        names: default all groups that may vary,
        streams: residual streams included.

    Raises:
        ValueError: if no group may vary, saying why.
    """
    groups = spec.family.groups
    names = tuple(groups.elastic(*(FULL if streams else ELASTIC)) if names is None else names)
    if not names:
        raise ValueError(f"{spec.title} has no group of channels that may vary:\n{groups}")
    return LinenHypernetwork(groups, names, inr, spec)
