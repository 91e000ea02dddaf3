"""Accuracy of networks drawn from one INR, over a grid of widths."""

import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from neumeta_jax.commands.command_line import Flags
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data import datasets
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.elastic.widths import MAX_WIDTH_RATIO
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import consistency, timing
from neumeta_jax.evaluation.buckets import Bucket, fill_containers, make_buckets
from neumeta_jax.files import storage
from neumeta_jax.networks import families
from neumeta_jax.networks.families import Family


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One network of the grid.

    Attributes:
        width_ratio: kept fraction of the hidden channels; the papers' gamma is 1 - width_ratio.
        widths: hidden widths of the generated blocks.
        num_params, num_macs: of the whole dense network.
        accuracy: top-1 in [0, 1].
        num_images, interval: that it was measured on, and `accuracy_interval` of it.
        trained: whether the ratio lies in the trained range.
        agreement, kl_divergence, calibration_error, worst_class, worst_class_drop: against the
            full network, see `consistency.Consistency`; None where they were not asked for.
        int8_accuracy: with weights rounded to 8 bits (see `quantize`); None: not evaluated.
    """

    width_ratio: float
    widths: tuple[int, ...]
    num_params: int
    num_macs: int
    accuracy: float
    trained: bool
    agreement: float | None = None
    kl_divergence: float | None = None
    calibration_error: float | None = None
    worst_class: int | None = None
    worst_class_drop: float | None = None
    int8_accuracy: float | None = None
    num_images: int | None = None
    interval: tuple[float, float] | None = None


NORMAL_95 = 1.959964  # standard deviations on both sides of a mean that hold 95 %


def accuracy_interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) of a share that was measured on `num_images` images.

    >>> [round(bound, 3) for bound in accuracy_interval(0.9, 100)]
    [0.826, 0.945]
    """
    z2 = NORMAL_95**2 / num_images
    center = (accuracy + z2 / 2) / (1 + z2)
    half = math.sqrt(accuracy * (1 - accuracy) * z2 + z2**2 / 4) / (1 + z2)
    return max(0.0, center - half), min(1.0, center + half)


@dataclasses.dataclass
class Comparison:
    """Networks against the full one on the same images; an `Evaluator` fills it.

    Attributes:
        reference: float32[images, classes], logits of the full network, once it was evaluated.
        found: by hidden widths.
    """

    reference: np.ndarray | None = None
    found: dict[tuple[int, ...], consistency.Consistency] = dataclasses.field(default_factory=dict)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_correct(network, preprocessing, tree, images, labels):
    logits = network.apply(tree, preprocessing.evaluate(images))
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)


def accuracy(
    network: Any,
    tree: Mapping,
    images: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 1000,
) -> float:
    """Top-1 accuracy in [0, 1] of a network on uint8 images NHWC, labels int[n].

    `network` is a `cifar_resnet.Network` or `networks.linen.Network`; batch statistics of linen
    variables count.
    """
    if len(images) == 0:
        raise ValueError("Evaluation needs at least one image, got an empty split.")
    batch_size = min(batch_size, len(images))
    correct = []
    for start in range(0, len(images), batch_size):
        x, y = images[start : start + batch_size], labels[start : start + batch_size]
        missing = batch_size - len(x)
        if missing:  # one shape, one compilation; no image has the label -1
            x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
            y = np.concatenate([y, np.full(missing, -1, y.dtype)])
        correct.append(_count_correct(network, preprocessing, tree, x, y))
    return sum(int(n) for n in correct) / len(images)


def evaluation_split(splits: datasets.Splits, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of "test" or "validation", which must have some."""
    images = splits.test_images if split == "test" else splits.validation_images
    labels = splits.test_labels if split == "test" else splits.validation_labels
    if not len(labels):
        raise UsageError(
            f"The {split} split must have images; set --config.data.num_validation above 0."
        )
    return images, labels


# --- many networks ---------------------------------------------------------------------------

STRATEGIES = ("auto", "loop", "map", "vmap")
MESH_AXES = ("configs", "data")
SAMPLE_FLAGS: Flags = {  # of commands that evaluate
    "num_samples": (
        int,
        None,
        "Noisy weight samples to average (papers: 100); default: the config's.",
    ),
    "strategy": (
        STRATEGIES,
        "auto",
        "How networks are evaluated; auto finds out which is fastest here.",
    ),
}

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

_log = logging.getLogger(__name__)

PerImage = Callable[[jax.Array, jax.Array], Any]
Transform = Callable[[Mapping], Mapping]


@dataclasses.dataclass(frozen=True)
class GridResult:
    """What `evaluate_grid` found, a row for each network in the order given.

    Attributes:
        widths: int32[N, blocks].
        num_correct: int64[N], images whose largest logit is the label's.
        num_images: how many there were.
        predictions: int32[N, images], or None where they were not asked for.
        per_image: a tree of arrays [N, images, ...], or None.
        buckets: which networks were evaluated at which shape; equal ones count once, by the first.
        strategy: "loop", "map" or "vmap".
        reason: why that strategy.
    """

    widths: np.ndarray
    num_correct: np.ndarray
    num_images: int
    predictions: np.ndarray | None
    per_image: Any
    buckets: tuple[Bucket, ...]
    strategy: str
    reason: str

    @property
    def accuracy(self) -> np.ndarray:
        """float64[N], top-1 in [0, 1]."""
        return self.num_correct / self.num_images


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the programs of one bucket are compiled for.

    Attributes:
        container: channels of the forward pass.
        drawn_at: channels of the generation, which buckets share, and with them its program. Noise
            depends on them.
    """

    hypernetwork: Family
    preprocessing: Preprocessing
    strategy: str
    num_samples: int
    predictions: bool
    per_image: PerImage | None
    transform: Transform | None
    mesh: Mesh | None
    container: tuple[int, ...]
    drawn_at: tuple[int, ...]

    def shards(self, axis: str) -> int:
        return 1 if self.mesh is None else self.mesh.shape[axis]


def _sharded(job: _Job, function, in_specs, out_specs):
    """`function` on every device's share of its arguments; there is no communication between."""
    if job.mesh is None:
        return function
    return jax.shard_map(
        function, mesh=job.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _over_networks(job: _Job, function, *arguments):
    """`function` over the leading axis of `arguments`, as the strategy says."""
    if job.strategy == "vmap":
        return jax.vmap(function)(*arguments)
    if job.strategy == "map":
        return jax.lax.map(lambda one: function(*one), arguments)
    # One network; vmap would make a grouped convolution even of one.
    result = function(*jax.tree.map(lambda x: x[0], arguments))
    return jax.tree.map(lambda x: x[None], result)


def _network(job: _Job, params, widths, key):
    tree = hyper.generate(
        job.hypernetwork, params, widths, sizes=job.drawn_at, key=key, num_samples=job.num_samples
    )
    return tree if job.transform is None else job.transform(tree)


def _score(job: _Job, tree, images, labels):
    """(number correct, what was asked for of each image) of one network on one batch."""
    small, tree = job.hypernetwork.dense(tree, job.container, job.drawn_at)
    logits = families.run(small, tree, job.preprocessing.evaluate(images))
    predictions = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    found = {}
    if job.predictions:
        found["predictions"] = predictions
    if job.per_image is not None:
        found["per_image"] = job.per_image(logits, labels)
    return jnp.sum(predictions == labels, dtype=jnp.int32), found


@functools.partial(jax.jit, static_argnums=0)
def _generate_chunk(job: _Job, params, widths, key):
    """The trees of int[chunk, blocks] widths at `drawn_at`, stacked along a leading axis."""

    def generate(params, widths, key):
        return _over_networks(job, lambda row: _network(job, params, row, key), widths)

    return _sharded(job, generate, (P(), P("configs"), P()), P("configs"))(params, widths, key)


@functools.partial(jax.jit, static_argnums=0)
def _score_chunk(job: _Job, trees, images, labels, number, correct):
    """Adds batch `number` of the images to `correct`, int32[chunk, shards of the data].

    The sum is handed on from batch to batch on the device, so that batches run one after another
    and nothing waits for the host.

    Returns:
        The new sums, and a tree of arrays [chunk, batch, ...].
    """

    def score(trees, images, labels, number, correct):
        images, labels = images[number], labels[number]
        counts, found = _over_networks(job, lambda tree: _score(job, tree, images, labels), trees)
        return correct + counts[:, None], found

    return _sharded(
        job,
        score,
        (P("configs"), P(None, "data"), P(None, "data"), P(), P("configs", "data")),
        (P("configs", "data"), P("configs", "data")),
    )(trees, images, labels, number, correct)


class _Data(NamedTuple):
    """Images [batches, batch, size, size, channels] and labels [batches, batch] on the devices."""

    images: jax.Array
    labels: jax.Array

    @property
    def platform(self) -> str:
        return next(iter(self.images.devices())).platform


def _place(images: np.ndarray, labels: np.ndarray, batch_size: int, mesh: Mesh | None) -> _Data:
    """Batches of one size, filled up with images of the label -1, which none has."""
    shards = 1 if mesh is None else mesh.shape["data"]
    num_batches = -(-len(images) // batch_size)
    batch = -(-len(images) // num_batches)
    batch = -(-batch // shards) * shards
    missing = num_batches * batch - len(images)
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.full(missing, -1)]).astype(np.int32)
    images = images.reshape(num_batches, batch, *images.shape[1:])
    labels = labels.reshape(num_batches, batch)
    where = None if mesh is None else NamedSharding(mesh, P(None, "data"))
    return _Data(jax.device_put(images, where), jax.device_put(labels, where))


def _chunk_size(job: _Job, number: int, config_batch: int, *, fixed: bool = False) -> int:
    """How many of a bucket's `number` networks go into one call; `fixed` leaves `number` out."""
    shards = job.shards("configs")
    if job.strategy == "loop":
        return shards
    share = config_batch if fixed else -(-number // shards)
    return -(-share // -(-share // config_batch)) * shards  # chunks of one size


def _dispatch(job: _Job, params, widths: np.ndarray, key, data: _Data, num_batches: int):
    """(sums, list of trees [chunk, batch, ...]) of int[chunk, blocks] widths, not waited for."""
    # What the scores need does not concern the generation: buckets share its program.
    drawing = dataclasses.replace(job, container=job.drawn_at, predictions=False, per_image=None)
    trees = _generate_chunk(drawing, params, widths, key)
    correct = np.zeros((len(widths), job.shards("data")), np.int32)
    parts = []
    for number in range(num_batches):
        correct, found = _score_chunk(
            job, trees, data.images, data.labels, np.int32(number), correct
        )
        parts.append(found)
    return correct, parts


def _read(correct, parts, number: int, num_images: int) -> list[tuple[int, Any]]:
    """(number correct, tree of arrays [num_images, ...]) of the first `number` networks."""
    counts, parts = jax.device_get((correct, parts))
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1)[:, :num_images], *parts)
    return [(int(counts[n].sum()), jax.tree.map(lambda x, n=n: x[n], found)) for n in range(number)]


def _seconds_per_network(job: _Job, params, widths, key, data: _Data) -> float:
    """Time of one batch and its generation, after compilation; infinite where memory ran out."""
    try:
        found = timing.fewest({"": lambda: _dispatch(job, params, widths, key, data, 1)}, 2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    return found[""] / len(widths)


# The outcome of a probe holds for this process: its programs may not be compiled again.
_probed: dict[tuple, tuple[str, str]] = {}


def _choose_strategy(
    job: _Job, params, widths: np.ndarray, key, data: _Data, work: float, config_batch: int
) -> tuple[str, str]:
    """(strategy, why it is the fastest here), by a probe on networks of one bucket.

    Args:
        job: of the bucket.
        widths: int[n, blocks], its members.
        work: multiply-adds of the whole call.
    """
    worth = _PROBE_FROM_COMPILATIONS * compilation_macs(data.platform)
    if len(widths) == 1 or work < worth:
        reason = (
            f"{work:.1e} multiply-adds and {len(widths)} networks of one shape are not worth a "
            f"probe, which needs {worth:.0e} and 2"
        )
        _log.debug("evaluating by loop: %s", reason)
        return "loop", reason
    known = (job.hypernetwork, job.preprocessing, job.mesh, data.images.shape[1:], config_batch)
    known = (data.platform, *known)
    if known in _probed:
        return _probed[known]
    tried, note = ("loop", "map", "vmap"), ""
    if data.platform == "cpu":
        tried, note = ("loop", "vmap"), f"; {_NO_MAP_ON_CPU}"
        shards = job.shards("data")
        count = min(data.images.shape[1], -(-_PROBE_IMAGES_ON_CPU // shards) * shards)
        data = _Data(data.images[:1, :count], data.labels[:1, :count])
        config_batch = min(config_batch, 2)
    seconds = {}
    for strategy in tried:
        probe = dataclasses.replace(job, strategy=strategy)
        size = _chunk_size(probe, len(widths), config_batch)
        chunk = widths[np.arange(size) % len(widths)]
        seconds[strategy] = _seconds_per_network(probe, params, chunk, key, data)
    chosen = min(seconds, key=lambda strategy: seconds[strategy])
    times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    reason = f"{times} per network and {data.images.shape[1]} images{note}"
    _log.info("evaluating by %s: %s", chosen, reason)
    _probed[known] = chosen, reason
    return chosen, reason


def compilation_macs(platform: str) -> float:
    """Multiply-adds in the time in which the programs of one shape compile, roughly."""
    return _MACS_PER_COMPILATION.get(platform, _MACS_PER_COMPILATION_ELSEWHERE)


def _check_grid(hypernetwork: Family, widths) -> np.ndarray:
    """`widths` as int32[N, blocks], if every row is a network."""
    names = hypernetwork.names
    widths = np.asarray(widths)
    if widths.ndim != 2 or widths.shape[1] != len(names) or not len(widths):
        raise ValueError(
            "widths must be int[networks, names] with at least one row and a column for each of "
            f"the {len(names)} elastic groups, got shape {widths.shape}."
        )
    if not np.issubdtype(widths.dtype, np.integer):
        raise ValueError(
            "widths must be integers (numbers of channels, not ratios; Hypernetwork.widths(ratio) "
            f"makes them), got {widths.dtype}."
        )
    lowest = np.array(hypernetwork.lowest)
    largest = hypernetwork.widths(MAX_WIDTH_RATIO)
    wrong = np.argwhere((widths < lowest) | (widths > largest))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{names[column]} takes widths from {lowest[column]} to "
            f"{largest[column]}, got {widths[row, column]} in row {row} of widths."
        )
    return widths.astype(np.int32)


def _check_images(spec: Any, images, labels) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    if len(images) == 0:
        raise ValueError("Evaluation needs at least one image, got an empty split.")
    shape = spec.input_shape
    if images.shape[1:] != shape or images.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8[n, {', '.join(map(str, shape))}] for this network, got "
            f"{images.dtype}{list(images.shape)}."
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be int[{len(images)}], one for each image, got "
            f"{labels.dtype}{list(labels.shape)}."
        )
    return images, labels


def device_mesh() -> Mesh | None:
    """All devices of this process, which share each batch of images; None if there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return Mesh(np.array(devices).reshape(1, -1), MESH_AXES)


def _check_mesh(mesh: Mesh | None) -> Mesh | None:
    if mesh is None:
        return None
    if tuple(mesh.axis_names) != MESH_AXES:
        raise ValueError(
            f"mesh must have the axes {MESH_AXES}, got {tuple(mesh.axis_names)}; "
            f"jax.make_mesh((configs, data), {MESH_AXES}) makes one."
        )
    return Mesh(mesh.devices, MESH_AXES)  # without the types of axes that make_mesh may add


def evaluate_grid(
    hypernetwork: Family,
    params: Mapping,
    widths: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    *,
    strategy: str = "auto",
    max_buckets: int = 7,
    containers: Sequence[Sequence[int]] | None = None,
    config_batch: int = 8,
    batch_size: int = 1000,
    num_samples: int = 1,
    key: jax.Array | None = None,
    predictions: bool = False,
    per_image: PerImage | None = None,
    transform: Transform | None = None,
    mesh: Mesh | None = None,
    macs_per_compilation: float | None = None,
    on_result: Callable[[int, float], None] | None = None,
    on_images: Callable[[int, Any], None] | None = None,
) -> GridResult:
    """Evaluates the networks of hidden `widths` int[N, blocks] on all images.

    Networks are put into at most `max_buckets` buckets (see `buckets.make_buckets`), each compiled
    once and dense inside, beside one program that generates for all of them; fewer where another
    shape would save less than its compilation takes. Images are transferred once. Equal rows are
    evaluated once. The strategies differ in speed and not in what they compute:

        loop   one network at a time, one call for each batch of images
        map    `config_batch` networks in one call, one after another
        vmap   `config_batch` networks at a time
        auto   what a short probe finds fastest; "loop" where there is too little to do

    `per_image` gives more than predictions, for example the margin between the two largest logits:

        def margin(logits, labels):
            top, _ = jax.lax.top_k(logits, 2)
            return top[:, 0] - top[:, 1]

    Args:
        hypernetwork, params: the family and its learned parameters.
        widths: hidden channels of each generated block, up to 1.5 times the full size; 0 = block
            skipped.
        images, labels: uint8[n, size, size, channels], int[n].
        preprocessing: normalisation of the images, and the type to compute in.
        strategy: one of `STRATEGIES`.
        max_buckets: how many shapes may be compiled.
        containers: hidden widths of shapes to use instead of such as fit these networks best; each
            network is evaluated at the cheapest that holds it. Later calls with the same ones, the
            same number of images and an explicit strategy compile nothing that an earlier call has.
        config_batch: networks per call of "map" and "vmap", on each share of the devices.
        batch_size: images per call.
        num_samples: noisy weight samples to average; more than 1 needs `key`.
        key: PRNG key of the coordinate noise, the same for all networks; None evaluates exact
            coordinates. A network that fits into the full size gets the same noise whatever is
            evaluated beside it, if `max_buckets` is at least 2.
        predictions: whether to return the predicted classes.
        per_image: maps logits float32[batch, classes] and labels int32[batch] to a tree of arrays
            [batch, ...], under `jit`. Each new function compiles anew.
        transform: maps each generated tree to the one to evaluate, of the same shapes, under `jit`;
            for example `quantize.fake_quantize`. Channels beyond a network's width are zero in what
            it gets and must stay so.
        mesh: devices with the axes `MESH_AXES`: networks are spread over "configs" and each batch
            of images over "data". None computes on one device.
        macs_per_compilation: multiply-adds that take as long as compiling one shape; default: a
            constant of the kind of device. 0 ignores the time of compilation.
        on_result: called with a row's number and its accuracy as soon as it is known; rows become
            known bucket by bucket.
        on_images: called before `on_result` with a row's number and its tree of arrays
            [images, ...]; then the result holds none, so that many networks need little memory.

    Raises:
        ValueError: for bad input, before anything is compiled.
    """
    widths = _check_grid(hypernetwork, widths)
    images, labels = _check_images(hypernetwork.spec, images, labels)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}.")
    if min(max_buckets, config_batch, batch_size) < 1:
        raise ValueError(
            "max_buckets, config_batch and batch_size must be at least 1, got "
            f"{max_buckets=}, {config_batch=}, {batch_size=}."
        )
    if containers is not None:
        containers = [tuple(row) for row in _check_grid(hypernetwork, containers).tolist()]
        fill_containers(
            hypernetwork.num_macs, widths, containers
        )  # refuses what none of them holds
    if on_images and per_image is None:
        raise ValueError("on_images needs per_image, which says what of each image; give both.")
    hyper.check_num_samples(num_samples, key)
    mesh = _check_mesh(mesh)

    _, first, which = np.unique(widths, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    order = np.argsort(first)  # as they were given
    distinct = widths[first[order]]
    numbers = np.argsort(order)[which]  # of each row in `distinct`

    data = _place(images, labels, batch_size, mesh)
    params = jax.device_put(dict(params), None if mesh is None else NamedSharding(mesh, P()))
    if macs_per_compilation is None:
        macs_per_compilation = compilation_macs(data.platform)
    if containers is None:
        found_buckets = _buckets(
            hypernetwork,
            distinct,
            noisy=key is not None,
            max_buckets=max_buckets,
            macs_per_bucket=macs_per_compilation / len(images),
        )
    else:
        found_buckets = fill_containers(hypernetwork.num_macs, distinct, containers)

    asked = num_samples, predictions, per_image, transform
    job = _Job(hypernetwork, preprocessing, strategy, *asked, mesh, (), ())
    jobs = [_at_bucket(job, bucket, distinct) for bucket in found_buckets]
    reason = "asked for"
    if strategy == "auto":
        work = len(images) * int(hypernetwork.num_macs(distinct).sum())
        number = max(range(len(jobs)), key=lambda n: len(found_buckets[n].members))
        members = distinct[list(found_buckets[number].members)]
        strategy, reason = _choose_strategy(
            jobs[number], params, members, key, data, work, config_batch
        )
        jobs = [dataclasses.replace(job, strategy=strategy) for job in jobs]

    found: dict[int, tuple[int, Any]] = {}
    rows_of = [np.flatnonzero(numbers == n).tolist() for n in range(len(distinct))]
    waiting: list[tuple] = []

    def read():
        members, correct, parts = waiting.pop(0)
        results = _read(correct, parts, len(members), len(images))
        for member, (correct, trees) in zip(members, results, strict=True):
            rows = rows_of[member]
            if on_images:
                tree = trees.pop("per_image")
                for row in rows:
                    on_images(row, tree)
            found[member] = correct, trees
            if on_result:
                for row in rows:
                    on_result(row, correct / len(images))

    for job, bucket in zip(jobs, found_buckets, strict=True):
        fixed = containers is not None
        size = _chunk_size(job, len(bucket.members), config_batch, fixed=fixed)
        for start in range(0, len(bucket.members), size):
            members = list(bucket.members[start : start + size])
            chunk = distinct[members + members[-1:] * (size - len(members))]
            waiting.append((members, *_dispatch(job, params, chunk, key, data, len(data.images))))
            if len(waiting) > 1:  # read while the devices are busy with the next chunk
                read()
    while waiting:
        read()

    trees = [found[n][1] for n in numbers]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    return GridResult(
        widths=widths,
        num_correct=np.array([found[n][0] for n in numbers], np.int64),
        num_images=len(images),
        predictions=stacked.get("predictions"),
        per_image=stacked.get("per_image"),
        buckets=tuple(
            Bucket(b.container, tuple(int(first[order[m]]) for m in b.members))
            for b in found_buckets
        ),
        strategy=strategy,
        reason=reason,
    )


def _at_bucket(job: _Job, bucket: Bucket, widths: np.ndarray) -> _Job:
    """`job` with the shapes of `bucket`; `widths` are those of all networks."""
    full = np.array(job.hypernetwork.full_widths)
    container = np.array(bucket.container)
    drawn = full
    if np.any(container > full):
        drawn = np.maximum(np.maximum(widths.max(axis=0), container), full)
    return dataclasses.replace(
        job, container=tuple(bucket.container), drawn_at=tuple(drawn.tolist())
    )


def _buckets(
    hypernetwork: Family,
    widths: np.ndarray,
    *,
    noisy: bool,
    max_buckets: int,
    macs_per_bucket: float,
) -> list[Bucket]:
    """Buckets of distinct widths; with noise none holds networks both within and beyond full size.

    Noise is drawn at one shape for all networks within the full size, as if the others were not
    there.
    """
    beyond = np.any(widths > np.array(hypernetwork.full_widths), axis=1)
    parts = [np.arange(len(widths))]
    if noisy and max_buckets > 1 and beyond.any() and not beyond.all():
        parts = [np.flatnonzero(~beyond), np.flatnonzero(beyond)]
    limits = [max_buckets] if len(parts) == 1 else [max_buckets - 1, 1]
    result = []
    for part, limit in zip(parts, limits, strict=True):
        for bucket in make_buckets(
            hypernetwork.num_macs,
            widths[part],
            max_buckets=limit,
            macs_per_bucket=macs_per_bucket,
        ):
            members = tuple(int(part[n]) for n in bucket.members)
            result.append(Bucket(bucket.container, members))
    return sorted(result, key=lambda bucket: bucket.members[0])


def _logits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    del labels
    return logits


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """The networks of one INR on the same images, each evaluated once, whoever asks for it.

    Attributes:
        hypernetwork, params: the family and its learned parameters.
        images, labels: uint8[n, size, size, channels], int[n].
        preprocessing: normalisation of the images.
        options: of `evaluate_grid`, but not `on_result`, `on_images` and `per_image`. The `mesh` is
            `device_mesh()` if none is given.
        split: what tables call the images.
        known: accuracies by widths of what was evaluated; evaluations add to it.
        comparison: with the full network, of all that is known; None: that is not asked for.
    """

    hypernetwork: Family
    params: Mapping
    images: np.ndarray
    labels: np.ndarray
    preprocessing: Preprocessing
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    split: str = ""
    known: dict[tuple[int, ...], float] = dataclasses.field(default_factory=dict)
    comparison: Comparison | None = None

    def knows(self, widths: tuple[int, ...]) -> bool:
        found = self.comparison is None or widths in self.comparison.found
        return found and widths in self.known

    def describe(self, widths: tuple[int, ...]) -> dict[str, Any]:
        """What is known of a network, by the names of `GridRow`."""
        return {
            "widths": widths,
            "num_params": self.hypernetwork.num_params(widths),
            "num_macs": self.hypernetwork.num_macs(widths),
            "accuracy": self.known[widths],
            "num_images": len(self.labels),
            "interval": accuracy_interval(self.known[widths], len(self.labels)),
            **(self.comparison.found[widths]._asdict() if self.comparison else {}),
        }

    def evaluate(
        self,
        widths: Sequence[tuple[int, ...]],
        *,
        on_known: Callable[[], None] | None = None,
    ) -> list[dict[str, Any]]:
        """`describe` of each of `widths`, after one call of `evaluate_grid` for the unknown ones.

        The full network is evaluated first where the comparison needs it. `on_known` is called
        whenever a network was added.
        """
        options = {"mesh": device_mesh(), **self.options}
        missing = [row for row in dict.fromkeys(widths) if not self.knows(row)]
        comparison = self.comparison
        if missing and comparison is not None:
            if comparison.reference is None:  # the first row is evaluated first
                missing = list(dict.fromkeys([self.hypernetwork.full_widths, *missing]))

            def on_images(number, logits):
                reference = logits if comparison.reference is None else comparison.reference
                comparison.reference = reference
                found = consistency.compare(logits, reference, self.labels)
                comparison.found[missing[number]] = found

            options |= {"per_image": _logits, "on_images": on_images}

        def on_result(number, accuracy):
            self.known[missing[number]] = accuracy
            if on_known:
                on_known()

        if missing:
            data = self.images, self.labels, self.preprocessing
            network = self.hypernetwork, self.params, np.array(missing)
            evaluate_grid(*network, *data, on_result=on_result, **options)
        return [self.describe(row) for row in widths]

    def rows(
        self,
        width_ratios: Sequence[float],
        *,
        trained_range: tuple[float, float],
        on_row: Callable[[GridRow], None] | None = None,
    ) -> list[GridRow]:
        """One row for each width ratio, in the order given.

        Ratios that round to the same widths are one network.

        Args:
            width_ratios: each in (0, 1.5].
            trained_range: smallest and largest width ratio seen in training.
            on_row: called with each row, in the order given, as soon as it and those before are
                known.

        Raises:
            ValueError: for a width ratio out of range, before anything is evaluated.
        """
        low, high = trained_range
        family = self.hypernetwork
        widths = [tuple(family.widths(ratio).tolist()) for ratio in width_ratios]
        rows: list[GridRow] = []

        def report():
            waiting = zip(width_ratios[len(rows) :], widths[len(rows) :], strict=True)
            for ratio, row in itertools.takewhile(lambda pair: self.knows(pair[1]), waiting):
                trained = low - 1e-9 <= ratio <= high + 1e-9
                rows.append(GridRow(float(ratio), trained=trained, **self.describe(row)))
                if on_row:
                    on_row(rows[-1])

        self.evaluate(widths, on_known=report)
        report()
        return rows


class Dip(NamedTuple):
    """How far an accuracy falls below the line through its neighbours, in [0, 1], and its ratio."""

    fall: float
    where: float | None


def largest_dip(ratios: Sequence[float], accuracies: Sequence[float]) -> Dip:
    """The largest fall of an interior point below the straight line through its two neighbours.

    Zero at no width where no point lies below; the first of several equal falls.

    >>> largest_dip([0.5, 0.75, 1.0], [0.5, 0.5, 0.75])
    Dip(fall=0.125, where=0.75)

    Args:
        ratios: width ratios, increasing.
        accuracies: of the same length, in [0, 1].

    Raises:
        ValueError: if the lengths differ or a ratio is not above the one before it.
    """
    if len(ratios) != len(accuracies):
        raise ValueError(
            "largest_dip needs one accuracy for each width ratio, got "
            f"{len(accuracies)} for {len(ratios)}."
        )
    x, y = np.asarray(ratios, np.float64), np.asarray(accuracies, np.float64)
    if not np.all(x[1:] > x[:-1]):
        raise ValueError(
            f"largest_dip needs width ratios that increase, got {x.tolist()}; sort them and leave "
            "out repeated ones."
        )
    if len(x) < 3:
        return Dip(0.0, None)
    weight = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    # The left neighbour plus a share of the difference: of equal accuracies it is exactly theirs.
    falls = y[:-2] + weight * (y[2:] - y[:-2]) - y[1:-1]
    deepest = int(np.argmax(falls))
    if not falls[deepest] > 0:
        return Dip(0.0, None)
    return Dip(float(falls[deepest]), float(x[1 + deepest]))


SLICE_RATIOS = (0.1, 1.25)


@dataclasses.dataclass(frozen=True)
class WeightSlices:
    """The kernels that read the channels of one group, at several widths.

    Attributes:
        block: its name, for example "stage3_block7".
        full_width: its hidden width in the full-size network.
        widths: int[n], hidden widths, increasing.
        kernels: float32[n, 3, 3, hidden, C_out], NaN in the hidden channels beyond the width.
    """

    block: str
    full_width: int
    widths: np.ndarray
    kernels: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _readers(hypernetwork, sizes, path, params, widths):
    def kernel(row):
        tree = hyper.generate(hypernetwork, params, row, sizes=sizes)
        return hypernetwork.groups.leaves(tree)[path]

    return jax.lax.map(kernel, widths)


def weight_slices(hypernetwork: Family, params: Mapping) -> WeightSlices:
    """What reads the last group of a ResNet at every width that it takes, in one compilation.

    The widths are all integers between those of `SLICE_RATIOS`. The kernels are those of the
    network, SkipInit's scalar included; coordinates are exact.
    """
    full_width = hypernetwork.full_widths[-1]
    first, last = (int(hypernetwork.widths(ratio)[-1]) for ratio in SLICE_RATIOS)
    widths = np.arange(first, last + 1)
    # Each integer width of this block as a ratio; the others follow it, as in any network. A width
    # that was rounded up may lie beyond the largest ratio.
    ratios = np.minimum(widths / full_width, SLICE_RATIOS[1])
    rows = np.array([hypernetwork.widths(float(ratio)) for ratio in ratios], np.int32)
    widest = np.maximum(rows.max(axis=0), hypernetwork.full_widths)
    groups, name = hypernetwork.groups, hypernetwork.names[-1]
    (path,) = (r.path for r in groups.readers if groups.axes[r.path][r.reads[0]].group == name)
    kernels = _readers(hypernetwork, tuple(widest.tolist()), path, dict(params), jnp.asarray(rows))
    beyond = np.arange(kernels.shape[3]) >= widths[:, None]
    kernels = np.where(beyond[:, None, None, :, None], np.nan, np.asarray(kernels))
    return WeightSlices(name.partition("/")[0], full_width, widths, kernels)


def format_row(row: GridRow) -> str:
    """A line of the table under `TABLE_HEADER`."""
    return (
        f"{row.width_ratio:6.3f}  {format_widths(row.widths):>12}  {format_counts(_row_dict(row))}"
    )


def format_counts(row: Mapping[str, Any]) -> str:
    """The columns under `COUNTS_HEADER` of a row in JSON types; blanks if it was not compared."""
    compared = ["", "", "", ""]
    if row.get("agreement") is not None:
        compared = [
            f"{100 * row['agreement']:.2f}",
            f"{row['kl_divergence']:.4f}",
            f"{100 * row['calibration_error']:.2f}",
            f"{row['worst_class']} ({-100 * row['worst_class_drop'] + 0.0:+.1f})",
        ]
    cells = [
        f"{row['num_params']:,}",
        f"{row['num_macs'] / 1e6:.2f}",
        f"{100 * row['accuracy']:.2f}",
        *compared,
    ]
    padded = [cell.rjust(len(title)) for cell, title in zip(cells, _COUNTS, strict=True)]
    return "  ".join([*padded, "trained" if row["trained"] else "unseen"])


def format_widths(widths: Sequence[int]) -> str:
    """The different widths, or the smallest and the largest of many."""
    distinct = sorted(set(widths))
    shown = "/".join(map(str, distinct))
    return shown if len(distinct) <= 4 else f"{distinct[0]}..{distinct[-1]}"


_COUNTS = (
    "parameters",
    " MACs (M)",
    " top-1 %",
    "agrees %",
    "KL nats",
    " ECE %",
    "  worst class",
)
COUNTS_HEADER = "  ".join([*_COUNTS, "range"])


def format_int8_row(row: GridRow) -> str:
    """A line of the table under `INT8_TABLE_HEADER`, of a row with an `int8_accuracy`."""
    assert row.int8_accuracy is not None
    change = row.int8_accuracy - row.accuracy
    return (
        f"{row.width_ratio:6.3f}  {row.num_params:>10,}  {100 * row.accuracy:>9.2f}  "
        f"{100 * row.int8_accuracy:>8.2f}  {100 * change:>+8.2f}"
    )


INT8_TABLE_HEADER = (
    f"{'ratio':>6}  {'parameters':>10}  {'float32 %':>9}  {'int8 %':>8}  {'change':>8}"
)
TABLE_HEADER = f"{'ratio':>6}  {'widths':>12}  {COUNTS_HEADER}"


def grid_dict(rows: Sequence[GridRow], *, dataset: str, split: str, **extra) -> dict:
    """The grid as JSON types: {"dataset", "split", "rows": [...]} and what is in `extra`."""
    return {"dataset": dataset, "split": split, **extra, "rows": [_row_dict(r) for r in rows]}


def _row_dict(row: GridRow) -> dict:
    fields = {**dataclasses.asdict(row), "widths": list(row.widths)}
    fields["interval"] = row.interval and list(row.interval)
    if row.int8_accuracy is None:
        del fields["int8_accuracy"]
    return fields


def grid_row(fields: Mapping[str, Any]) -> GridRow:
    """The row in JSON types that `fields` hold among others."""
    names = [field.name for field in dataclasses.fields(GridRow)]
    row = {name: fields[name] for name in names if name in fields}
    tuples = {name: tuple(row[name]) for name in ("widths", "interval") if row.get(name)}
    return GridRow(**{**row, **tuples})


def write_grid(
    directory: str | os.PathLike,
    rows: Sequence[GridRow],
    *,
    dataset: str,
    split: str,
    **extra,
) -> None:
    """Writes `grid.json` and `grid.csv` into `directory`; each file appears whole or not at all."""
    document = grid_dict(rows, dataset=dataset, split=split, **extra)
    storage.write_json(pathlib.Path(directory) / "grid.json", document)
    storage.write_csv(pathlib.Path(directory) / "grid.csv", storage.as_table(document["rows"]))
