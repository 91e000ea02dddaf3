"""The programs that draw networks of one shape and score them, and the choice of how they run.

The strategies differ in speed and not in what they compute:

    loop   one network at a time, one call for each batch of images
    map    several networks in one call, one after another
    vmap   several networks at a time
    auto   what a short probe finds fastest; "loop" where there is too little to do
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.evaluation import timing
from neumeta_jax.networks import families
from neumeta_jax.networks.families import Family

STRATEGIES = ("auto", "loop", "map", "vmap")
MESH_AXES = ("configs", "data")

PerImage = Callable[[jax.Array, jax.Array], Any]
Transform = Callable[[Mapping], Mapping]


@dataclasses.dataclass(frozen=True)
class Job:
    """What the programs of one bucket are compiled for.

    Attributes:
        container: channels of the forward pass.
        drawn_at: channels of the generation, which buckets share, and with them its program. Noise
            depends on them.
    """

    family: Family
    preprocessing: Preprocessing
    strategy: str
    num_samples: int
    per_image: PerImage | None
    transform: Transform | None
    mesh: Mesh | None
    container: tuple[int, ...] = ()
    drawn_at: tuple[int, ...] = ()

    def at(self, container: Sequence[int], widths: np.ndarray) -> "Job":
        """The same with the shapes of `container`; `widths` are those of all networks."""
        full = np.array(self.family.full_widths)
        drawn = full
        if np.any(np.array(container) > full):
            drawn = np.maximum(np.maximum(widths.max(axis=0), container), full)
        shapes = {"container": tuple(container), "drawn_at": tuple(drawn.tolist())}
        return dataclasses.replace(self, **shapes)

    def shards(self, axis: str) -> int:
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def chunk_size(self, number: int, config_batch: int) -> int:
        """Networks of one call, so that `number` of them go into chunks of one size."""
        shards = self.shards("configs")
        if self.strategy == "loop":
            return shards
        share = -(-number // shards)
        return -(-share // -(-share // config_batch)) * shards


class Inputs(NamedTuple):
    """What lies on the devices: images uint8[batches, batch, ...], labels int32[batches, batch]."""

    params: Mapping
    key: jax.Array | None
    images: jax.Array
    labels: jax.Array

    @property
    def platform(self) -> str:
        return next(iter(self.images.devices())).platform


def batched(
    images: np.ndarray, labels: np.ndarray, batch_size: int, shards: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Batches of one size, filled up with black images of the label -1, which none has."""
    num_batches = -(-len(images) // batch_size)
    batch = -(-len(images) // (num_batches * shards)) * shards
    missing = num_batches * batch - len(images)
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.full(missing, -1)]).astype(np.int32)
    return images.reshape(num_batches, batch, *images.shape[1:]), labels.reshape(-1, batch)


def _sharded(job: Job, function, in_specs, out_specs):
    """`function` on every device's share of its arguments; there is no communication between."""
    if job.mesh is None:
        return function
    return jax.shard_map(
        function, mesh=job.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _over_networks(job: Job, function, argument):
    """`function` over the leading axis of `argument`, as the strategy says."""
    if job.strategy == "vmap":
        return jax.vmap(function)(argument)
    if job.strategy == "map":
        return jax.lax.map(function, argument)
    # One network; vmap would make a grouped convolution even of one.
    result = function(jax.tree.map(lambda x: x[0], argument))
    return jax.tree.map(lambda x: x[None], result)


@functools.partial(jax.jit, static_argnums=0)
def generate_chunk(job: Job, params, widths, key):
    """The trees of int[chunk, names] widths at `drawn_at`, stacked along a leading axis."""

    def generate(params, widths, key):
        def network(row):
            noise = {"key": key, "num_samples": job.num_samples}
            tree = hyper.generate(job.family, params, row, sizes=job.drawn_at, **noise)
            return tree if job.transform is None else job.transform(tree)

        return _over_networks(job, network, widths)

    return _sharded(job, generate, (P(), P("configs"), P()), P("configs"))(params, widths, key)


@functools.partial(jax.jit, static_argnums=0)
def score_chunk(job: Job, trees, images, labels, number, correct):
    """Adds batch `number` of the images to `correct`, int32[chunk, shards of the data].

    The sum is handed on from batch to batch on the device, so that batches run one after another
    and nothing waits for the host.

    Returns:
        The new sums, and what `per_image` made of each network and image, [chunk, batch, ...].
    """

    def score(trees, images, labels, number, correct):
        images, labels = images[number], labels[number]

        def network(tree):
            small, tree = job.family.dense(tree, job.container, job.drawn_at)
            logits = families.run(small, tree, job.preprocessing.evaluate(images))
            right = jnp.argmax(logits, axis=-1) == labels
            found = None if job.per_image is None else job.per_image(logits, labels)
            return jnp.sum(right, dtype=jnp.int32), found

        counts, found = _over_networks(job, network, trees)
        return correct + counts[:, None], found

    return _sharded(
        job,
        score,
        (P("configs"), P(None, "data"), P(None, "data"), P(), P("configs", "data")),
        (P("configs", "data"), P("configs", "data")),
    )(trees, images, labels, number, correct)


def dispatch(job: Job, inputs: Inputs, widths: np.ndarray, num_batches: int):
    """(sums, list of trees [chunk, batch, ...]) of int[chunk, names] widths, not waited for."""
    # What the scores need does not concern the generation: buckets share its program.
    drawing = dataclasses.replace(job, container=job.drawn_at, per_image=None)
    trees = generate_chunk(drawing, inputs.params, widths, inputs.key)
    correct, parts = np.zeros((len(widths), job.shards("data")), np.int32), []
    for number in range(num_batches):
        data = inputs.images, inputs.labels, np.int32(number)
        correct, found = score_chunk(job, trees, *data, correct)
        parts.append(found)
    return correct, parts


def read(members: Sequence[int], dispatched, num_images: int) -> Iterator[tuple[int, int, Any]]:
    """(member, number correct, tree of arrays [num_images, ...]) of each, once it has ended."""
    counts, parts = jax.device_get(dispatched)
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1)[:, :num_images], *parts)
    for n, member in enumerate(members):
        yield member, int(counts[n].sum()), jax.tree.map(lambda x, n=n: x[n], found)


# --- the choice of the strategy --------------------------------------------------------------

# Multiply-adds in the time in which a network's programs compile, an order of magnitude: a ResNet20
# took 5 s on two busy CPU cores, at 15e9 a second. On accelerators not measured.
_MACS_PER_COMPILATION = {"cpu": 5e10}
_MACS_PER_COMPILATION_ELSEWHERE = 5e13
# A probe compiles up to three programs that may not be used afterwards.
_PROBE_FROM_COMPILATIONS = 20
_PROBE_IMAGES_ON_CPU = 32
_NO_MAP_ON_CPU = (
    "map not tried, since XLA's CPU backend compiles convolutions in loops to slow code"
)
# The outcome of a probe holds for this process: its programs may not be compiled again.
_probed: dict[tuple, tuple[str, str]] = {}

_log = logging.getLogger(__name__)


def compilation_macs(platform: str) -> float:
    """Multiply-adds in the time in which the programs of one shape compile, roughly."""
    return _MACS_PER_COMPILATION.get(platform, _MACS_PER_COMPILATION_ELSEWHERE)


def _seconds_per_network(job: Job, inputs: Inputs, widths: np.ndarray) -> float:
    """Time of one batch and its generation, after compilation; infinite where memory ran out."""
    try:
        found = timing.fewest({"": lambda: dispatch(job, inputs, widths, 1)}, 2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    return found[""] / len(widths)


def choose_strategy(
    job: Job, inputs: Inputs, widths: np.ndarray, *, work: float, config_batch: int
) -> tuple[str, str]:
    """(strategy, why it is the fastest here), by a probe on networks of one bucket.

    Args:
        job, widths: of the bucket, and int[n, names] of its members.
        work: multiply-adds of the whole evaluation.
    """
    worth = _PROBE_FROM_COMPILATIONS * compilation_macs(inputs.platform)
    if len(widths) == 1 or work < worth:
        reason = (
            f"{work:.1e} multiply-adds and {len(widths)} networks of one shape are not worth a "
            f"probe, which needs {worth:.0e} and 2"
        )
        _log.debug("evaluating by loop: %s", reason)
        return "loop", reason
    shape = inputs.images.shape[1:]
    known = (inputs.platform, job.family, job.preprocessing, job.mesh, shape, config_batch)
    if known in _probed:
        return _probed[known]
    tried, note = ("loop", "map", "vmap"), ""
    if inputs.platform == "cpu":
        tried, note = ("loop", "vmap"), f"; {_NO_MAP_ON_CPU}"
        shards = job.shards("data")
        count = min(shape[0], -(-_PROBE_IMAGES_ON_CPU // shards) * shards)
        inputs = inputs._replace(images=inputs.images[:1, :count], labels=inputs.labels[:1, :count])
        config_batch = min(config_batch, 2)
    seconds = {}
    for strategy in tried:
        probe = dataclasses.replace(job, strategy=strategy)
        chunk = widths[np.arange(probe.chunk_size(len(widths), config_batch)) % len(widths)]
        seconds[strategy] = _seconds_per_network(probe, inputs, chunk)
    chosen = min(seconds, key=lambda strategy: seconds[strategy])
    times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    reason = f"{times} per network and {inputs.images.shape[1]} images{note}"
    _log.info("evaluating by %s: %s", chosen, reason)
    _probed[known] = chosen, reason
    return chosen, reason
