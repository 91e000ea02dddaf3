"""Accuracy of any number of networks that are drawn from one INR."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data.datasets import Splits
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.errors import check
from neumeta_jax.evaluation import consistency, programs
from neumeta_jax.evaluation.buckets import Bucket, fill_containers, make_buckets
from neumeta_jax.evaluation.morphs import Widths, check_rows
from neumeta_jax.evaluation.programs import MESH_AXES, STRATEGIES, Job, PerImage, Transform
from neumeta_jax.evaluation.rows import GridRow, accuracy_interval
from neumeta_jax.networks.families import Family


def evaluation_split(splits: Splits, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of "test" or "validation", which must have some."""
    images, labels = (getattr(splits, f"{split}_{what}") for what in ("images", "labels"))
    check(
        len(labels),
        f"The {split} split must have images; set --config.data.num_validation above 0.",
    )
    return images, labels


# --- one network -----------------------------------------------------------------------------


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
    check(len(images), "Evaluation needs at least one image, got an empty split.")
    batches = zip(*programs.batched(images, labels, batch_size), strict=True)
    correct = [_count_correct(network, preprocessing, tree, x, y) for x, y in batches]
    return sum(int(n) for n in correct) / len(images)


# --- many networks ---------------------------------------------------------------------------


def device_mesh() -> Mesh | None:
    """All devices of this process, which share each batch of images; None if there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return Mesh(np.array(devices).reshape(1, -1), MESH_AXES)


def predicted_classes(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """int32[batch], for `per_image`."""
    del labels
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _logits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    del labels
    return logits


class Part(NamedTuple):
    """The networks of one shape: rows of `Plan.widths`, and how many of them go into one call."""

    job: Job
    members: tuple[int, ...]
    chunk: int


class Plan(NamedTuple):
    """How networks are evaluated: int32[networks, names], and "loop", "map" or "vmap", and why."""

    widths: np.ndarray
    parts: list[Part]
    strategy: str
    reason: str


@dataclasses.dataclass
class _Known:
    """Facts of networks by their widths, and float32[images, classes] of the full one."""

    facts: dict[Widths, dict[str, Any]] = dataclasses.field(default_factory=dict)
    reference: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """The networks of one INR on the same images.

    Networks are put into at most `max_buckets` buckets (see `buckets.make_buckets`), each compiled
    once and dense inside, beside one program that generates for all of them; fewer where another
    shape would save less than its compilation takes. Images are transferred once.

        evaluator = Evaluator(family, params, images, labels, preprocessing)
        evaluator.accuracies([family.widths(ratio) for ratio in (0.25, 0.5, 1)])

    Attributes:
        family, params: the family and its learned parameters.
        images, labels: uint8[n, size, size, channels], int[n].
        preprocessing: normalisation of the images, and the type to compute in.
        split: what tables call the images.
        batch_size: images per call.
        strategy: one of `STRATEGIES`, see `programs`.
        num_samples: noisy weight samples to average; more than 1 needs `key`.
        key: PRNG key of the coordinate noise, the same for all networks; None evaluates exact
            coordinates. A network that fits into the full size gets the same noise whatever is
            evaluated beside it, if `max_buckets` is at least 2.
        transform: maps each generated tree to the one to evaluate, of the same shapes, under `jit`;
            for example `quantize.fake_quantize`. Channels beyond a network's width are zero in what
            it gets and must stay so.
        compare: whether to tell how each network differs from the full one, see `consistency`.
        mesh: devices with the axes `MESH_AXES`: networks are spread over "configs" and each batch
            of images over "data". None computes on one device.
        max_buckets: how many shapes may be compiled.
        config_batch: networks per call of "map" and "vmap", on each share of the devices.
        macs_per_compilation: multiply-adds that take as long as compiling one shape; default: a
            constant of the kind of device. 0 ignores the time of compilation.

    Raises:
        ValueError: for bad input, before anything is compiled.
    """

    family: Family
    params: Mapping = dataclasses.field(repr=False)
    images: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    preprocessing: Preprocessing
    _: dataclasses.KW_ONLY
    split: str = ""
    batch_size: int = 1000
    strategy: str = "auto"
    num_samples: int = 1
    key: jax.Array | None = None
    transform: Transform | None = None
    compare: bool = False
    mesh: Mesh | None = dataclasses.field(default_factory=device_mesh)
    max_buckets: int = 7
    config_batch: int = 8
    macs_per_compilation: float | None = None
    # Another evaluator, made by `dataclasses.replace`, knows nothing.
    _known: _Known = dataclasses.field(init=False, repr=False, default_factory=_Known)

    def __post_init__(self):
        for name in ("images", "labels"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        images, labels = self.images, self.labels
        check(len(images), "Evaluation needs at least one image, got an empty split.")
        shape = self.family.spec.input_shape
        check(
            images.shape[1:] == shape and images.dtype == np.uint8,
            f"images must be uint8[n, {', '.join(map(str, shape))}] for this network, got "
            f"{images.dtype}{list(images.shape)}.",
        )
        check(
            labels.shape == (len(images),) and np.issubdtype(labels.dtype, np.integer),
            f"labels must be int[{len(images)}], one for each image, got "
            f"{labels.dtype}{list(labels.shape)}.",
        )
        check(
            self.strategy in STRATEGIES,
            f"strategy must be one of {STRATEGIES}, got {self.strategy!r}.",
        )
        for name in ("max_buckets", "config_batch", "batch_size"):
            value = getattr(self, name)
            check(value >= 1, f"{name} must be at least 1, got {value}.")
        hyper.check_num_samples(self.num_samples, self.key)
        if self.mesh is not None:
            axes = tuple(self.mesh.axis_names)
            check(
                axes == MESH_AXES,
                f"mesh must have the axes {MESH_AXES}, got {axes}; "
                f"jax.make_mesh((configs, data), {MESH_AXES}) makes one.",
            )
            # Without the types of axes that make_mesh may add.
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices, MESH_AXES))

    @functools.cached_property
    def _inputs(self) -> programs.Inputs:
        mesh, everywhere, shared, shards = self.mesh, None, None, 1
        if mesh is not None:
            everywhere, shared = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
            shards = mesh.shape["data"]
        data = programs.batched(self.images, self.labels, self.batch_size, shards)
        params = jax.device_put(dict(self.params), everywhere)
        return programs.Inputs(params, self.key, *jax.device_put(data, shared))

    def accuracies(self, widths: Any) -> np.ndarray:
        """float64[networks], top-1 in [0, 1], of int[networks, names].

        Widths are at most 1.5 times the full ones; 0 skips a branch. What was evaluated before is
        not evaluated again.
        """
        rows = check_rows(self.family, widths)
        return np.array([facts["accuracy"] for facts in self.facts(rows)])

    def rows(
        self, width_ratios: Sequence[float], trained_range: tuple[float, float]
    ) -> Iterator[GridRow]:
        """A row for each width ratio in (0, 1.5], in the order given, as soon as it is known.

        Ratios that round to the same widths are one network. `trained_range` are the smallest and
        the largest ratio seen in training.
        """
        low, high = trained_range
        widths = [tuple(self.family.widths(ratio).tolist()) for ratio in width_ratios]
        for ratio, facts in zip(width_ratios, self.facts(widths), strict=True):
            yield GridRow(float(ratio), trained=low - 1e-9 <= ratio <= high + 1e-9, **facts)

    def facts(self, widths: Sequence[Widths]) -> Iterator[dict[str, Any]]:
        """What is known of each network by the names of `GridRow`, as soon as it is known."""
        known = self._known.facts
        evaluated = self._evaluate([row for row in dict.fromkeys(widths) if row not in known])
        for row in widths:
            while row not in known:
                next(evaluated)
            yield dict(known[row])

    def _evaluate(self, widths: Sequence[Widths]) -> Iterator[None]:
        """Makes the distinct `widths` known, one with each step."""
        known, number = self._known, len(self.labels)
        if self.compare and known.reference is None:  # the full network comes first
            widths = list(dict.fromkeys([self.family.full_widths, *widths]))
        plan = self.plan(widths, per_image=_logits if self.compare else None)
        for member, correct, logits in self.stream(plan):
            row, compared = widths[member], {}
            if self.compare:
                reference = logits if known.reference is None else known.reference
                compared = consistency.compare(logits, reference, self.labels)._asdict()
                known.reference = reference
            known.facts[row] = {
                "widths": row,
                "num_params": self.family.num_params(row),
                "num_macs": self.family.num_macs(row),
                "accuracy": correct / number,
                "num_images": number,
                "interval": accuracy_interval(correct / number, number),
                **compared,
            }
            yield

    def plan(
        self,
        widths: Any,
        *,
        per_image: PerImage | None = None,
        containers: Sequence[Sequence[int]] | None = None,
    ) -> Plan:
        """Shapes and strategy for networks, to `score` them all, known or not.

        Args:
            widths: int[networks, names], as those of `accuracies`; best distinct.
            per_image: maps logits float32[batch, classes] and labels int32[batch] to a tree of
                arrays [batch, ...], under `jit`, such as `predicted_classes`. Each new function
                compiles anew.
            containers: widths of shapes to use instead of such as fit these networks best; each
                network is evaluated at the cheapest that holds it. Later calls with the same ones
                and an explicit strategy compile nothing that an earlier call has.
        """
        num_macs, inputs, config_batch = self.family.num_macs, self._inputs, self.config_batch
        rows = np.array(check_rows(self.family, widths), np.int32)
        if containers is None:
            buckets = self._buckets(rows)
        else:
            buckets = fill_containers(num_macs, rows, check_rows(self.family, containers))
        shared = self.strategy, self.num_samples, per_image, self.transform, self.mesh
        job = Job(self.family, self.preprocessing, *shared)
        jobs = [job.at(bucket.container, rows) for bucket in buckets]
        strategy, reason = self.strategy, "asked for"
        if strategy == "auto":
            number = max(range(len(jobs)), key=lambda n: len(buckets[n].members))
            strategy, reason = programs.choose_strategy(
                jobs[number],
                inputs,
                rows[list(buckets[number].members)],
                work=len(self.labels) * int(num_macs(rows).sum()),
                config_batch=config_batch,
            )
        parts = []
        for job, bucket in zip(jobs, buckets, strict=True):
            job, number = dataclasses.replace(job, strategy=strategy), len(bucket.members)
            if containers is not None:  # the same programs however many there are
                number = config_batch * job.shards("configs")
            parts.append(Part(job, bucket.members, job.chunk_size(number, config_batch)))
        return Plan(rows, parts, strategy, reason)

    def score(self, plan: Plan) -> tuple[np.ndarray, Any]:
        """(int64[networks] images classified right, what `per_image` made of all).

        The latter is a tree of arrays [networks, images, ...].
        """
        found = sorted(self.stream(plan), key=lambda entry: entry[0])
        counts = np.array([correct for _, correct, _ in found], np.int64)
        return counts, jax.tree.map(lambda *x: np.stack(x), *(tree for *_, tree in found))

    def stream(self, plan: Plan) -> Iterator[tuple[int, int, Any]]:
        """(which of `plan.widths`, images classified right, what `per_image` made of all).

        Networks come shape by shape, those of a shape in order; some are read while the devices are
        busy with the next.
        """
        waiting, inputs = None, self._inputs
        for job, members, chunk in plan.parts:
            for start in range(0, len(members), chunk):
                some = list(members[start : start + chunk])
                filled = plan.widths[some + some[-1:] * (chunk - len(some))]
                running = some, programs.dispatch(job, inputs, filled, len(inputs.images))
                if waiting:
                    yield from programs.read(*waiting, len(self.labels))
                waiting = running
        if waiting:
            yield from programs.read(*waiting, len(self.labels))

    def _buckets(self, widths: np.ndarray) -> list[Bucket]:
        """Buckets of distinct widths; with noise none holds networks both within and beyond full
        size.

        Noise is drawn at one shape for all networks within the full size, as if the others were
        not there.
        """
        macs = self.macs_per_compilation
        if macs is None:
            macs = programs.compilation_macs(self._inputs.platform)
        beyond = np.any(widths > np.array(self.family.full_widths), axis=1)
        parts, limits = [np.arange(len(widths))], [self.max_buckets]
        if self.key is not None and self.max_buckets > 1 and beyond.any() and not beyond.all():
            parts = [np.flatnonzero(~beyond), np.flatnonzero(beyond)]
            limits = [self.max_buckets - 1, 1]
        found = []
        for part, limit in zip(parts, limits, strict=True):
            price = {"max_buckets": limit, "macs_per_bucket": macs / len(self.labels)}
            for bucket in make_buckets(self.family.num_macs, widths[part], **price):
                members = part[list(bucket.members)].tolist()
                found.append(Bucket(bucket.container, tuple(members)))
        return sorted(found, key=lambda bucket: bucket.members[0])
