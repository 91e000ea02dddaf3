"""Generation of network parameters from an INR.

What surrounds an INR (see `inr`) is the same for all kinds: masking to the width, SkipInit, what is
not generated, averaging of noisy samples. The learned parameters of a hypernetwork are one tree:

    {"inr":     what the INR kind keeps,
     "alpha":   float32[names], the SkipInit scalar of each elastic group,
     "learned": the parameters that are not generated,
     "depth":   for an INR with a depth term, a tree like "learned", added to it times the share of
                the branches in a parameter's scope that are skipped,
     "width":   for an INR with width terms the same by the number of each, from 1, times what it
                counts at the mean width (`width_counts`)}

Terms of depth and width start at what makes smaller networks follow the full one (`start`), or at
zero.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.typing
import numpy as np

from neumeta_jax.core import stacks
from neumeta_jax.core.inr import INR
from neumeta_jax.core.inr.base import Params, kept_ratio, skipped_share, width_counts
from neumeta_jax.core.stacks import TensorStack
from neumeta_jax.elastic.counting import Count, params_count
from neumeta_jax.elastic.groups import Groups
from neumeta_jax.elastic.resize import mask_axes, masked_axes, take_axes
from neumeta_jax.elastic.widths import widths_at

# The papers' INR holds 7 x 64 x 64 x 512 activations, 59 MB, per sample and layer of a ResNet56.
SAMPLE_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Hypernetwork:
    """A family of networks: the groups of a network, which of them an `inr` makes elastic.

    Hashable, so that it can be a static argument of `jax.jit`. A network with conventions of its
    own derives from it and says how its tensors are stacked, what they make up for, and where
    SkipInit goes.

    Attributes:
        groups: of the full-size network.
        names: of the groups whose width varies, in the order in which they join the training.
        inr: what generates all tensors that change with these widths.
    """

    groups: Groups
    names: tuple[str, ...]
    inr: INR

    def __post_init__(self):
        self.groups.check(dict.fromkeys(self.names, 1))
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"The groups of a hypernetwork are named once, got {self.names}.")

    def label(self, path: str) -> str | None:
        """The stack that a tensor belongs to; None stacks tensors of equal form."""
        del path
        return None

    def scope(self, path: str) -> tuple[int, ...]:
        """Positions of the groups whose branches, if skipped, the tensor at `path` makes up for."""
        del path
        skippable = (n for n, name in enumerate(self.names) if not self.groups[name].lowest)
        return tuple(skippable)

    def scaled(self, name: str) -> bool:
        """Whether SkipInit's scalar multiplies what reads the group."""
        return self.groups[name].skips is not None

    def is_last(self, path: str) -> bool:
        """Whether a parameter that is not generated belongs to what follows all elastic groups."""
        outputs = (g for g in self.groups.groups if "output" in g.flags)
        return any(member.path == path for group in outputs for member in group.members)

    @property
    def stages(self) -> tuple[int, ...]:
        """From 1, the part of the network that each group belongs to, in ascending order."""
        return (1,) * len(self.names)

    @property
    def stacks(self) -> tuple[TensorStack, ...]:
        return _stacks(self)

    @property
    def lowest(self) -> tuple[int, ...]:
        """The smallest widths of `names`: 0 where a branch can be skipped, else 1."""
        return tuple(self.groups[name].lowest for name in self.names)

    def num_params(self, widths: Any) -> Any:
        """Parameters at `widths`: an int for int[names], int64[rows] for int[rows, names]."""
        return _params_count(self)(widths)

    def without_last(self, widths: Sequence[int], number: int) -> tuple[int, ...]:
        """`widths` without the last `number` branches of each stage that can be skipped.

        A stage that has fewer loses them all.
        """
        result = [int(width) for width in widths]
        for stage in range(1, max(self.stages) + 1):
            members = [n for n, s in enumerate(self.stages) if s == stage and not self.lowest[n]]
            for position in members[max(0, len(members) - number) :]:
                result[position] = 0
        return tuple(result)

    @property
    def full_widths(self) -> tuple[int, ...]:
        """Widths of `names` in the full-size network."""
        return tuple(self.groups[name].size for name in self.names)

    @property
    def owners(self) -> dict[str, int]:
        """With which of `names` each generated tensor joins the training, by path."""
        return _owners(self)

    def widths(self, width_ratio: float) -> np.ndarray:
        """int32[names]: every group keeps `width_ratio` of its channels, rounded, at least one."""
        return np.array(widths_at(self.full_widths, width_ratio), np.int32)

    def by_name(self, widths) -> dict[str, Any]:
        """{group: width} of an array or a sequence [names]."""
        return {name: widths[n] for n, name in enumerate(self.names)}

    def as_array(self, widths) -> Any:
        """int[names] of an array, a sequence or {group: width}, whose other groups are full."""
        if not isinstance(widths, Mapping):
            return widths
        if unknown := sorted(set(widths) - set(self.names)):
            raise ValueError(
                f"Widths need names of elastic groups, got {unknown}; they are {self.names}."
            )
        full = dict(zip(self.names, self.full_widths, strict=True))
        values = (full | dict(widths)).values()
        traced = any(isinstance(width, jax.Array) for width in values)
        return jnp.stack([jnp.asarray(w) for w in values]) if traced else np.array([*values])


@functools.lru_cache(maxsize=64)
def _stacks(hypernetwork: Hypernetwork) -> tuple[TensorStack, ...]:
    names, groups = hypernetwork.names, hypernetwork.groups
    return stacks.tensor_stacks(groups, names, hypernetwork.label, hypernetwork.scope)


@functools.lru_cache(maxsize=64)
def _params_count(hypernetwork: Hypernetwork) -> Count:
    return params_count(hypernetwork.groups, hypernetwork.names)


@functools.lru_cache(maxsize=64)
def _owners(hypernetwork: Hypernetwork) -> dict[str, int]:
    made = ((s.paths, s.owners) for s in hypernetwork.stacks)
    return {p: owner for paths, owners in made for p, owner in zip(paths, owners, strict=True)}


@functools.lru_cache(maxsize=64)
def scaled(hypernetwork: Hypernetwork) -> dict[str, int]:
    """By path, whose SkipInit scalar a generated tensor is multiplied by."""
    positions = {}
    for position, name in enumerate(hypernetwork.names):
        if hypernetwork.scaled(name):
            for reader in hypernetwork.groups.readers:
                axes = (hypernetwork.groups.axes[reader.path][n] for n in reader.reads)
                if any(name in axis.groups() for axis in axes):
                    positions[reader.path] = position
                    if reader.bias:
                        positions[reader.bias] = position
    return positions


@functools.lru_cache(maxsize=64)
def _skips(hypernetwork: Hypernetwork) -> dict[str, tuple[int, ...]]:
    """By path, of which groups the width 0 sets a tensor to zero that has none of their axes."""
    skips: dict[str, tuple[int, ...]] = {}
    for position, name in enumerate(hypernetwork.names):
        for path in hypernetwork.groups[name].skips or ():
            skips[path] = (*skips.get(path, ()), position)
    return skips


def nested(leaves: Mapping[str, Any]) -> Params:
    """Nested dicts of leaves by path."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    return tree


def flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by path; the inverse of `nested`."""
    leaves = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        leaves |= flat(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return leaves


def init(
    key: jax.Array,
    hypernetwork: Hypernetwork,
    backbone: Any,
    *,
    alpha: float = 1.0,
    from_backbone: bool = True,
    moments: Mapping[str, jax.Array] | None = None,
) -> Params:
    """A fresh parameter tree around the full-size `backbone`.

    Args:
        key: PRNG key of the INR's initialisation.
        hypernetwork: the family.
        backbone: the parameters that were traced; supplies what is not generated.
        alpha: initial SkipInit scalar; 0 makes every skippable branch the identity (HTTY).
        from_backbone: start at the backbone's own weights, for INR kinds that have a closed form.
        moments: second moments of the backbone's channels by path, see `moments.moments`; for INR
            kinds that need them.

    Raises:
        ValueError: if `backbone` is not a tree of this network.
    """
    values = hypernetwork.groups.leaves(backbone, {})
    return _init(hypernetwork, from_backbone, key, values, alpha, moments)


# Else it would be a hundred programs of one line each where no `jit` is around it.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _init(hypernetwork, from_backbone, key, values, alpha, moments):
    """`init` of the backbone's leaves by path."""
    inr, made = hypernetwork.inr, hypernetwork.stacks
    inr_params = inr.init(key, made)
    if moments is not None:
        inr_params = inr.with_moments(inr_params, made, moments)
    if from_backbone:
        inr_params = inr.start_from(inr_params, made, pack(hypernetwork, values))
    owners = hypernetwork.owners
    learned = nested({path: jnp.asarray(x) for path, x in values.items() if path not in owners})
    params = {
        "inr": inr_params,
        "alpha": jnp.full(len(hypernetwork.names), alpha, jnp.float32),
        "learned": learned,
    }
    if inr.depth_term:
        params["depth"] = jax.tree.map(jnp.zeros_like, learned)
    if inr.width_terms:
        numbers = map(str, range(1, len(inr.width_terms) + 1))
        params["width"] = {number: jax.tree.map(jnp.zeros_like, learned) for number in numbers}
    return params


def num_inr_params(params: Mapping) -> int:
    """How many numbers the INR, the SkipInit scalars and terms of depth and width hold."""
    counted = {name: tree for name, tree in params.items() if name != "learned"}
    return sum(x.size for x in jax.tree.leaves(counted))


def check_widths(hypernetwork: Hypernetwork, widths, sizes=None, *, limited: bool = True) -> None:
    """Raises ValueError where concrete `widths` do not fit; traced widths are taken on trust.

    Args:
        hypernetwork: the family.
        widths: of its groups, an array or a sequence of ints.
        sizes: how many channels there are to hold them, as `widths`; default the full size.
        limited: whether these are an upper limit.
    """
    names = hypernetwork.names
    if not isinstance(widths, jax.Array):
        widths = np.asarray(widths)
    if widths.ndim != 1 or widths.shape[0] != len(names):
        raise ValueError(
            f"widths must be an int array with one entry for each of the {len(names)} elastic "
            f"groups, got shape {widths.shape}."
        )
    if not jnp.issubdtype(widths.dtype, jnp.integer):
        raise ValueError(
            "widths must be integers (numbers of channels, not ratios; Hypernetwork.widths(ratio) "
            f"makes them), got {widths.dtype}."
        )
    try:
        concrete = np.asarray(widths)
    except jax.errors.TracerArrayConversionError:
        return
    sizes = hypernetwork.full_widths if sizes is None else sizes
    for name, lowest, width, size in zip(names, hypernetwork.lowest, concrete, sizes, strict=True):
        if width < lowest or (limited and width > size):
            allowed = f"from {lowest} to {size}" if limited else f"from {lowest} on"
            larger = "; larger ones need generate(..., sizes=larger ones)" if limited else ""
            raise ValueError(f"{name} takes widths {allowed}, got {width}{larger}.")


def learned_at(
    hypernetwork: Hypernetwork, params: Mapping, widths, sizes=None
) -> dict[str, jax.Array]:
    """What is not generated, by path, as the network of `widths` has it; see `generate`."""
    leaves = flat(params["learned"])
    trained = [path for path in leaves if path not in hypernetwork.groups.frozen]
    if "width" in params:
        ratio = kept_ratio(widths, hypernetwork.full_widths)
        for number, count in enumerate(width_counts(ratio, hypernetwork.inr.width_terms), 1):
            terms = flat(params["width"][str(number)])
            for path in trained:
                leaves[path] = leaves[path] + count * terms[path]
    if "depth" in params:
        terms = flat(params["depth"])
        scopes = {path: hypernetwork.scope(path) for path in trained}
        shares = {scope: skipped_share(widths, scope) for scope in set(scopes.values())}
        for path in trained:
            leaves[path] = leaves[path] + shares[scopes[path]] * terms[path]
    by_name, container, repeated = hypernetwork.by_name(widths), {}, {}
    if sizes is not None:
        container = hypernetwork.by_name([int(size) for size in sizes])
        full = hypernetwork.groups.sizes(container)
        repeated = {name: np.arange(size) % full[name] for name, size in container.items()}
    for path in hypernetwork.groups.frozen:
        leaf = take_axes(leaves[path], hypernetwork.groups.axes[path], repeated)
        leaves[path] = mask_axes(leaf, masked_axes(hypernetwork.groups, path), by_name, container)
    return leaves


def check_num_samples(num_samples: int, key: jax.Array | None) -> None:
    """Raises ValueError unless `num_samples` noisy samples can be drawn with `key`."""
    if num_samples < 1 or (num_samples > 1 and key is None):
        raise ValueError(
            f"num_samples must be 1, or larger together with a key, got {num_samples=}; without "
            "noise all samples are equal."
        )


def check_dtype(dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError unless `dtype` names a floating-point type."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            f"The dtype of a network must be a floating-point type, got {dtype!r}; use bfloat16 or "
            "float32."
        )


def generate_tensors(
    hypernetwork: Hypernetwork,
    inr_params: Mapping,
    widths: jax.Array,
    *,
    sizes=None,
    key: jax.Array | None = None,
    num_samples: int = 1,
    sample_batch: int | None = SAMPLE_BATCH,
) -> dict[str, jax.Array]:
    """The generated tensors by path, masked to `widths`, without SkipInit.

    See `generate` for the arguments.
    """
    made = hypernetwork.stacks
    if sizes is not None:
        made = tuple(stack.resized(sizes) for stack in made)

    def sample(sample_key):
        return hypernetwork.inr(dict(inr_params), made, widths, key=sample_key)

    if key is None or num_samples == 1:
        raw = sample(key)
    else:
        raw = _mean_of(sample, jax.random.split(key, num_samples), sample_batch or num_samples)

    groups, skips = hypernetwork.groups, _skips(hypernetwork)
    by_name = hypernetwork.by_name(widths)
    container = {} if sizes is None else hypernetwork.by_name([int(size) for size in sizes])
    tensors = {}
    for stack in made:
        for path in dict.fromkeys(stack.paths):
            tensor = stacks.unpack(groups, stack, path, raw[stack.name], container)
            tensor = mask_axes(tensor, groups.axes[path], by_name, container)
            for position in skips.get(path, ()):
                tensor = jnp.where(widths[position] > 0, tensor, 0)
            tensors[path] = tensor
    return tensors


def _mean_of(function: Callable, keys: jax.Array, batch: int):
    """The mean of the trees `function(key)`; `batch` keys are taken in one vectorised call."""
    batch = min(batch, len(keys))
    whole = len(keys) - len(keys) % batch

    def add(sums, some):
        return jax.tree.map(lambda s, x: s + jnp.sum(x, axis=0), sums, jax.vmap(function)(some))

    # Added up as they come: one batch of samples and one sum are in memory, never all samples.
    shapes = jax.eval_shape(function, keys[0])
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    batches = keys[:whole].reshape(-1, batch, *keys.shape[1:])
    sums, _ = jax.lax.scan(lambda sums, some: (add(sums, some), None), sums, batches)
    if whole < len(keys):
        sums = add(sums, keys[whole:])
    return jax.tree.map(lambda x: x / len(keys), sums)


def pack(hypernetwork: Hypernetwork, values: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The generated tensors of a full-size network, by path, as an INR emits them.

    Returns:
        float32[tensors, rows, columns, num_outputs] by the name of each stack.

    Raises:
        ValueError: if tensors of one stack differ in shape.
    """
    raw = {}
    for stack in hypernetwork.stacks:
        paths = dict.fromkeys(stack.paths)
        tensors = [stacks.pack(hypernetwork.groups, path, values[path]) for path in paths]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            raise ValueError(
                f"The tensors of {stack.name} must have one shape to be stacked, got "
                f"{[tensor.shape[1:] for tensor in tensors]}."
            )
        raw[stack.name] = jnp.concatenate(tensors)
    return raw


def skip_init(
    hypernetwork: Hypernetwork, tensors: Mapping[str, jax.Array], alpha: jax.Array
) -> dict[str, jax.Array]:
    """`tensors` with SkipInit's scalar absorbed: alpha * (kernel * x + bias) at a branch's end."""
    owners = scaled(hypernetwork)
    return {p: alpha[owners[p]] * x if p in owners else x for p, x in tensors.items()}


def generate(
    hypernetwork: Hypernetwork,
    params: Mapping,
    widths,
    *,
    sizes=None,
    key: jax.Array | None = None,
    num_samples: int = 1,
    sample_batch: int | None = SAMPLE_BATCH,
    dtype: jax.typing.DTypeLike | None = None,
) -> Any:
    """The parameters of the network of `widths`.

    A pure function, for use under `jit`, `vmap` and `grad`. The tree has the full shape whatever
    the widths, with the channels beyond them set to zero, so that one compilation serves every
    network; `resize.slice_params` cuts out the dense one. Where widths are traced, those out of
    range cannot be refused: they make all weights NaN.

    Args:
        hypernetwork: the family.
        params: {"inr", "alpha", "learned"[, "depth"][, "width"]}, see `init`.
        widths: int[names], channels of each elastic group, 0 = branch skipped; or {group: width},
            where those that are missing are full.
        sizes: int[names], channels of the result where they are to differ from the full size:
            fewer (then nothing larger can be asked for) or more, for widths beyond the full size.
        key: PRNG key; draws coordinate noise. Without it coordinates are exact.
        num_samples: noisy samples to average (the papers use 100); needs `key`.
        sample_batch: samples per vectorised call, which bounds memory; None takes all at once.
        dtype: of the result, such as "bfloat16", which halves the memory of many networks at once.
            The tree is computed as without it and rounded at the end, once: coordinates and
            projections need float32. bfloat16 changes each weight by at most 2^-8 of its size.

    Returns:
        A tree like the one that was traced, for the network's own function; float32 unless `dtype`
        says otherwise.

    Raises:
        ValueError: if concrete widths are out of range, `num_samples` > 1 without a key,
            `sample_batch` < 1 or `dtype` not a floating-point type.
    """
    widths = hypernetwork.as_array(widths)
    check_widths(hypernetwork, widths, sizes)
    if dtype is not None:
        check_dtype(dtype)
    if sample_batch is not None and sample_batch < 1:
        raise ValueError(
            f"sample_batch must be at least 1, got {sample_batch=}; None takes all samples at once."
        )
    check_num_samples(num_samples, key)
    sizes = None if sizes is None else tuple(map(int, sizes))
    options = {"sizes": sizes, "num_samples": num_samples, "sample_batch": sample_batch}
    tree = _generate(hypernetwork, dict(params), widths, key, **options)
    if isinstance(widths, jax.core.Tracer):
        most = hypernetwork.full_widths if sizes is None else sizes
        within = (widths >= np.array(hypernetwork.lowest)) & (widths <= np.array(most))
        tree = jax.tree.map(lambda x: _nan_unless(jnp.all(within), x), tree)
    if dtype is not None:
        tree = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    return tree


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("sizes", "num_samples", "sample_batch"),
    inline=True,  # as `_init`
)
def _generate(hypernetwork, params, widths, key, **options):
    tensors = generate_tensors(hypernetwork, params["inr"], widths, key=key, **options)
    tensors = skip_init(hypernetwork, tensors, params["alpha"])
    learned = learned_at(hypernetwork, params, widths, options["sizes"])
    return assemble(hypernetwork, learned | tensors)


def _nan_unless(condition: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(condition, x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x


def assemble(hypernetwork: Hypernetwork, leaves: Mapping[str, Any]) -> Any:
    """The tree that was traced, of its leaves by path."""
    structure = hypernetwork.groups.structure
    if structure is None:
        return nested(leaves)
    return structure.unflatten([leaves[path] for path, _ in hypernetwork.groups.tensors])
