"""A run of the comparison: networks with batch norm, their slices, statistics and SGD.

`variables` are those of `cifar_resnet.ResNet`, {"params", "batch_stats"}.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import elastic
from neumeta_jax.comparison.baseline import Baseline, Cost, cost
from neumeta_jax.core import losses
from neumeta_jax.core.hypernetwork import flat, nested
from neumeta_jax.core.update import TrainState
from neumeta_jax.data import datasets
from neumeta_jax.data.preprocessing import Images, Preprocessing
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_resnet import Network, Params, ResNetHypernetwork
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.runs.backbone import import_teacher
from neumeta_jax.runs.config import Experiment
from neumeta_jax.runs.loop import Steps
from neumeta_jax.runs.part import Part, Phase
from neumeta_jax.runs.teacher import TeacherRecipe, sgd_step, teacher_optimizer
from neumeta_jax.runs.workdir import Workdir

_SEED_OF_TRAINING, SEED_OF_ORDER = 4, 5  # parts of a run, see `experiment.phase_key`

# forward(variables, x, key): (logits of each network of a step, new statistics).
Forward = Callable[[Mapping, jax.Array, jax.Array], tuple[list[jax.Array], Any]]


class Family(NamedTuple):
    """A trained family of sizes.

    Attributes:
        network: (spec, folded tree) of a width ratio, from what lies in memory.
        storage_bytes: what has to be stored for the sizes of the comparison, weights as float32.
        continuous: whether sizes between those exist too.
        switch_images: images that a change of size needs.
        calibration_images: training images that importance or statistics were measured on.
        kept_as_is: ratios whose network needed no training.
    """

    network: Callable[[float], tuple[ResNetSpec, Params]]
    storage_bytes: int
    continuous: bool = True
    switch_images: int = 0
    calibration_images: int = 0
    kept_as_is: tuple[float, ...] = ()


def num_bytes(*trees: Any) -> int:
    """Of all leaves, as float32."""
    return sum(4 * int(x.size) for x in jax.tree.leaves(trees))


def sliced(
    family: ResNetHypernetwork, variables: Mapping, width_ratio: float
) -> tuple[ResNetSpec, Params]:
    """(spec, variables) of the network of the first channels of each group; differentiable."""
    widths = family.widths(width_ratio).tolist()
    groups = cifar_resnet.linen_groups(family.spec)
    return family.at(widths), elastic.slice_params(groups, variables, family.by_name(widths))


def split_norms(params: Mapping) -> tuple[Params, Params]:
    """(all but batch norm, batch norm), as trees of the same layout."""
    leaves = flat(params)
    norms = {p: x for p, x in leaves.items() if f"{p.rpartition('/')[0]}/scale" in leaves}
    return nested({p: x for p, x in leaves.items() if p not in norms}), nested(norms)


def with_norms(params: Mapping, norms: Mapping) -> Params:
    """`params`, or all but their batch norm, with the batch norm `norms`."""
    return nested(flat(params) | flat(norms))


def train_pass(spec: ResNetSpec, variables: Mapping, x: jax.Array) -> tuple[jax.Array, Any]:
    """(logits, new statistics) of a network in training."""
    logits, changed = Network(spec).train(variables, x, jax.random.key(0))  # draws nothing
    return logits, changed["batch_stats"]


def whole_batches(images: np.ndarray, batch_size: int) -> list[slice]:
    """Where the batches lie; images that fill none are left out."""
    size = min(batch_size, len(images))
    return [slice(start, start + size) for start in range(0, len(images) - size + 1, size)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_moments(spec, preprocessing, variables, images):
    # From statistics of zero, an update of flax's running average is 0.1 times the batch's.
    zeros = {**variables, "batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])}
    _, changed = train_pass(spec, zeros, preprocessing.evaluate(images))
    return jax.tree.map(lambda x: x / (1 - 0.9), changed)


def recalibrate(
    spec: ResNetSpec,
    variables: Mapping,
    images: np.ndarray,
    preprocessing: Preprocessing,
    batch_size: int = 500,
) -> Params:
    """`variables` with batch-norm statistics measured on `images`, uint8 NHWC, not augmented.

    Means and variances over all images, each batch normalised by its own ("post-statistics" of Yu
    and Huang, arXiv 1903.05134).
    """
    parts = whole_batches(images, batch_size)
    found = [_batch_moments(spec, preprocessing, variables, images[part]) for part in parts]
    moments = flat(jax.tree.map(lambda *x: jnp.stack(x), *found))
    pooled = {}
    for layer in {path.rpartition("/")[0] for path in moments}:
        means, variances = moments[f"{layer}/mean"], moments[f"{layer}/var"]
        mean = pooled[f"{layer}/mean"] = jnp.mean(means, axis=0)
        pooled[f"{layer}/var"] = jnp.mean(variances + means**2, axis=0) - mean**2
    return {"params": variables["params"], "batch_stats": nested(pooled)}


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the comparison in its work directory."""

    workdir: Workdir
    experiment: Experiment
    baseline: Baseline
    splits: datasets.Splits

    @property
    def family(self) -> ResNetHypernetwork:
        return self.experiment.hypernetwork

    @property
    def cost(self) -> Cost:
        return cost(self.experiment, self.baseline, len(self.splits.train_labels))

    @property
    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """(images, labels) that importance and statistics are measured on."""
        number = self.baseline.calibration_images
        return self.splits.train_images[:number], self.splits.train_labels[:number]

    @functools.cached_property
    def teacher(self) -> Params:
        """Linen variables of the teacher, as it was trained."""
        return import_teacher(self.experiment, self.experiment.teacher.file)

    def recalibrated(self, spec: ResNetSpec, variables: Params) -> Params:
        images = self.calibration[0], self.experiment.preprocessing
        return recalibrate(spec, variables, *images, self.experiment.evaluation.batch_size)

    def storage_bytes(self, variables: Mapping, ratios: Sequence[float] = (1.0,)) -> int:
        """Kernels once; of the batch norm at each ratio a factor and a summand per channel."""
        kernels, _ = split_norms(variables["params"])
        sizes = [sliced(self.family, variables, ratio)[1]["params"] for ratio in ratios]
        return num_bytes(kernels, [split_norms(params)[1] for params in sizes])

    def train(self, name: str, first: Params, forward: Forward, number: int = 0) -> Params:
        """Trains from where the work directory stands; returns {"params", "batch_stats"}.

        `first` are the variables to start from; `name` and `number` are the part's, for checkpoints
        and for random numbers.
        """
        baseline, experiment, splits = self.baseline, self.experiment, self.splits
        images = Images.of(splits.train_images, splits.train_labels)
        fields = ("batch_size", "learning_rate", "momentum", "weight_decay")
        recipe = TeacherRecipe(**{field: getattr(baseline, field) for field in fields})
        optimizer = teacher_optimizer(recipe, baseline.num_steps)
        network, distilled = self.family.network, baseline.distill_from == "teacher"

        def update(state, step, key, images, indices, teacher):
            key = jax.random.fold_in(key, step)
            batch = images.images[indices], images.labels[indices]
            x, y = experiment.preprocessing.train(key, *batch, network.spec.num_classes)
            soft = network.apply(teacher, x) if distilled else None

            def loss_fn(params):
                variables = {**state.params, "params": params}
                logits, stats = forward(variables, x, jax.random.fold_in(key, 1))
                ends = {"accuracy": logits[-1], "full_accuracy": logits[0]}
                found = {name: losses.accuracy(of, y) for name, of in ends.items()}
                return joint_loss(baseline, logits, y, soft), ({"batch_stats": stats}, found)

            return sgd_step(optimizer, state, loss_fn)

        def fresh():
            variables = jax.tree.map(jnp.array, first)  # steps donate their buffers
            return TrainState(variables, jax.jit(optimizer.init)(variables["params"]))

        key = jax.random.fold_in(experiment.key(_SEED_OF_TRAINING), number)
        part = Part(self.workdir, experiment.run, name, name, key, images, baseline.num_steps)
        phase = Phase(
            name,
            0,
            baseline.num_steps,
            Steps(update, baseline.batch_size),
            begin=lambda _: fresh(),
            locate=lambda state, step: "",
            rest=lambda: (network.fold(self.teacher) if distilled else {},),
            shown=("loss", "full_accuracy", "accuracy"),
        )
        return part.train([phase], jax.eval_shape(fresh))


def joint_loss(
    baseline: Baseline, logits: Sequence[jax.Array], labels: jax.Array, teacher_logits
) -> jax.Array:
    """Sum over the networks of a step, the full one first, of their losses.

    Cross-entropy for a network without soft labels, else `ce_weight` of it and
    `distillation_weight` of distillation. No gradient flows into soft labels.
    """
    total = jnp.zeros(())
    for number, found in enumerate(logits):
        soft = {"teacher": teacher_logits, "full": logits[0] if number else None}
        targets = soft.get(baseline.distill_from)
        ce = losses.cross_entropy(found, labels)
        if targets is None:
            total += ce
            continue
        kd = losses.distillation(found, targets, temperature=baseline.temperature)
        total += baseline.ce_weight * ce
        total += baseline.distillation_weight * kd
    return total
