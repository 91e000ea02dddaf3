"""What an INR is compared with: other ways to a family of sizes, on the same data and budget.

    python -m neumeta_jax.baselines --config=configs/baselines.py:slimmable --workdir=DIR \\
        --config.data.dir=FOLDER_OR_NPZ --config.teacher.file=cifar100_resnet20.npz --budget=0.5

A preset is a row of the comparison, the INRs' own rows included. All rows have the same family of
networks (the hidden widths of the generated blocks at a few ratios), teacher, augmentation,
validation split, evaluation code and budget: `baseline.images` training images that are drawn,
times `--budget`. An image counts once, however many sizes of shared weights it passes through in a
step; networks that are trained one by one see as many each. Where the sizes of a step have images
of their own, as in NeuMeta and HTTY, each sees its part.

Writes DIR/row.json, which `python -m neumeta_jax.report` makes tables of. Accuracies are of the
validation and the test split; both are read once, at the end, the test split not at all with
`--trial`. The same command continues an interrupted run and ends with the same bits.

    individual              a network per size, from scratch
    slimmable               shared kernels, batch norm for each of four widths (arXiv 1812.08928)
    universally_slimmable   all shared, statistics measured after training (arXiv 1903.05134)
    pruning                 the teacher without its least important channels (arXiv 1906.10771)
    pruning_finetuned       the same, each size trained on
    inr                     a recipe of train.py
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from neumeta_jax.commands import command_line
from neumeta_jax.core import hypernetwork as hyper, losses
from neumeta_jax.data import datasets
from neumeta_jax.data.preprocessing import Images, Preprocessing
from neumeta_jax.elastic import ordering, resize
from neumeta_jax.elastic.widths import check_width_ratio
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import grid, timing
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import format_seconds
from neumeta_jax.networks import cifar_resnet, cifar_spec
from neumeta_jax.networks.cifar_resnet import Params, ResNet
from neumeta_jax.networks.cifar_spec import ResNetSpec, widths_at
from neumeta_jax.runs import diagnosis, experiment as lab, training
from neumeta_jax.runs.experiment import Experiment, Workdir
from neumeta_jax.runs.training import TrainState

ROW_FILE = "row.json"
SPLITS = ("validation", "test")
METHODS = (
    "individual",
    "slimmable",
    "universally_slimmable",
    "pruning",
    "pruning_finetuned",
    "inr",
)
INITS = ("teacher", "random")
CRITERIA = ("random", "l1", "l2", "taylor", "surgeon")
DISTILL_FROM = ("none", "teacher", "full")
_SEED_OF_TRAINING, _SEED_OF_ORDER = 4, 5  # parts of a run, see `experiment.phase_key`
_BACKWARD = 2  # forward passes that a backward pass costs


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The section `baseline` of a config: a row of the comparison.

    Attributes:
        method: one of `METHODS`.
        title, variant, source: for tables: "slimmable", "soft labels of the teacher", the paper.
        images: training images that are drawn, see above.
        width_ratios: the family; the first is the full size.
        init: networks start at the "teacher", or at "random" values.
        criterion: what orders the hidden channels of the teacher, of which small networks keep the
            first: see `channel_order`.
        criteria: those that the method "pruning" evaluates beside `criterion`.
        batch_size, learning_rate, momentum, weight_decay: SGD with Nesterov's momentum, a short
            warm-up and half a cosine to zero.
        distill_from: soft labels of the "teacher", of the "full" network of the same step (which
            has none itself), or "none".
        ce_weight, distillation_weight, temperature: of a network with soft labels; one without has
            cross-entropy alone.
        num_random_sizes: of universally slimmable networks in a step, beside the largest and the
            smallest.
        calibration_images: training images that importance and statistics are measured on.
    """

    method: str
    title: str
    variant: str = ""
    source: str = ""
    images: int = 50_000
    width_ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    init: str = "teacher"
    criterion: str = "surgeon"  # the best on validation images
    criteria: tuple[str, ...] = ()
    batch_size: int = 64
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distill_from: str = "none"
    ce_weight: float = 1.0
    distillation_weight: float = 0.0
    temperature: float = 1.0
    num_random_sizes: int = 2
    calibration_images: int = 2000

    def __post_init__(self):
        for field, value, allowed in (
            ("method", self.method, METHODS),
            ("init", self.init, INITS),
            ("criterion", self.criterion, CRITERIA),
            ("distill_from", self.distill_from, DISTILL_FROM),
            *(("criteria", criterion, CRITERIA) for criterion in self.criteria),
        ):
            if value not in allowed:
                raise UsageError(f"baseline.{field} must be one of {allowed}, got {value!r}.")
        if min(self.images, self.batch_size, self.calibration_images) < 1 or self.learning_rate < 0:
            raise UsageError(
                "baseline.images, batch_size and calibration_images must be at least 1 and "
                f"learning_rate at least 0, got {self.images}, {self.batch_size}, "
                f"{self.calibration_images} and {self.learning_rate}."
            )
        if self.num_random_sizes < 0 or not self.temperature > 0:
            raise UsageError(
                "baseline.num_random_sizes must be at least 0 and temperature above 0, got "
                f"{self.num_random_sizes} and {self.temperature}."
            )
        ratios = self.width_ratios
        for ratio in ratios:
            check_width_ratio(ratio)
        if not ratios or ratios[0] != 1 or list(ratios) != sorted(set(ratios), reverse=True):
            raise UsageError(
                f"baseline.width_ratios must start at 1 and decrease, got {ratios}; all methods "
                "start from the full size."
            )
        if self.method in ("individual", "pruning_finetuned") and self.distill_from == "full":
            raise UsageError(
                "baseline.distill_from='full' needs sizes that are trained together, but "
                f"{self.method!r} trains them one by one; use 'teacher'."
            )

    @property
    def num_steps(self) -> int:
        """SGD steps of a network, or of a family of shared weights."""
        return max(1, round(self.images / self.batch_size))

    @property
    def images_seen(self) -> int:
        return self.num_steps * self.batch_size

    @property
    def needs_teacher(self) -> bool:
        scratch = self.method == "individual" or self.init == "random"
        return not scratch or self.method == "inr" or self.distill_from == "teacher"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What training took.

    Attributes:
        images: training images drawn; networks that are trained one by one: by each.
        network_passes: images that passed forward and backward through a network, over all sizes.
        teacher_passes: images that passed forward through the teacher, for soft labels.
        macs: multiply-adds of both, a backward pass as two forward passes; masked networks count at
            the full shape that they are computed at. Without what generates weights.
    """

    images: int
    network_passes: int
    teacher_passes: int
    macs: int


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


# --- networks with batch norm ----------------------------------------------------------------


def _take(spec: ResNetSpec, variables: Mapping, channels: Mapping[int, Any]) -> Params:
    """Linen variables, or a part of them, with the hidden `channels` of each block."""
    axes = cifar_resnet.linen_groups(spec).axes
    chosen = {cifar_resnet.hidden_group(spec.blocks[n]): index for n, index in channels.items()}
    leaves = hyper.flat(variables)
    return hyper.nested({p: resize.take_axes(x, axes[p], chosen) for p, x in leaves.items()})


def slice_variables(
    spec: ResNetSpec, variables: Mapping, blocks: Sequence[int], widths: Sequence[int]
) -> tuple[ResNetSpec, Params]:
    """The network of the first `widths[i]` hidden channels of `blocks[i]`: (spec, variables).

    `cifar_resnet.slice_params` for linen variables {"params", "batch_stats"} or a part of them;
    differentiable.
    """
    small = cifar_spec.morph(spec, blocks, widths)
    channels = {n: np.arange(width) for n, width in zip(blocks, widths, strict=True)}
    return small, _take(spec, variables, channels)


def reorder(spec: ResNetSpec, variables: Mapping, orders: Mapping[int, np.ndarray]) -> Params:
    """The same function, with the hidden channels of block n in the order `orders[n]`."""
    return _take(spec, variables, orders)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_moments(spec, preprocessing, variables, images):
    # From statistics of zero, an update of flax's running average is 0.1 times the batch's.
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    _, mutated = ResNet(spec).apply(
        {"params": variables["params"], "batch_stats": zeros},
        preprocessing.evaluate(images),
        train=True,
        mutable=["batch_stats"],
    )
    return jax.tree.map(lambda x: x / (1 - 0.9), mutated["batch_stats"])


def recalibrate(
    spec: ResNetSpec,
    variables: Mapping,
    images: np.ndarray,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 500,
) -> Params:
    """`variables` with batch-norm statistics measured on `images`, uint8 NHWC, not augmented.

    Means and variances over all images, each batch normalised by its own ("post-statistics" of Yu
    and Huang, arXiv 1903.05134). Images that fill no batch are left out.
    """
    batch_size = min(batch_size, len(images))
    found = [
        _batch_moments(spec, preprocessing, variables, images[start : start + batch_size])
        for start in range(0, len(images) - batch_size + 1, batch_size)
    ]

    def pool(mean, var):
        total = jnp.mean(mean, axis=0)
        return total, jnp.mean(var + mean**2, axis=0) - total**2

    def walk(tree):
        if "mean" in tree:
            mean, var = pool(tree["mean"], tree["var"])
            return {"mean": mean, "var": var}
        return {name: walk(node) for name, node in tree.items()}

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *found)
    return {"params": variables["params"], "batch_stats": walk(stacked)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gate_gradients(spec, blocks, preprocessing, variables, images, labels):
    def loss(masks):
        x = preprocessing.evaluate(images)
        logits = jnp.asarray(ResNet(spec).apply(variables, x, hidden_masks=masks))
        return losses.cross_entropy(logits, labels)

    chosen = [spec.blocks[n] for n in blocks]
    return jax.grad(loss)({block.name: jnp.ones(block.hidden_width) for block in chosen})


def taylor_importance(
    spec: ResNetSpec,
    variables: Mapping,
    blocks: Sequence[int],
    images: np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """First-order importance of hidden channels (Molchanov et al., arXiv 1906.10771).

        importance(c) = mean over batches of (sum of gradient * weight over what reads channel c)^2

    The sum is the gradient of the loss with respect to a factor of 1 on the channel, which is how
    it is computed. Statistics of batch norm are the running ones.

    Returns:
        float64[hidden_width] by block name.
    """
    batch_size = min(batch_size, len(images))
    total = {spec.blocks[n].name: np.zeros(spec.blocks[n].hidden_width) for n in blocks}
    starts = range(0, len(images) - batch_size + 1, batch_size)
    for start in starts:
        part = slice(start, start + batch_size)
        found = _gate_gradients(
            spec, tuple(blocks), preprocessing, variables, images[part], labels[part]
        )
        for name, gradient in found.items():
            total[name] += np.asarray(gradient, np.float64) ** 2 / len(starts)
    return total


def channel_order(
    experiment: Experiment,
    variables: Mapping,
    images: np.ndarray,
    labels: np.ndarray,
    criterion: str,
) -> dict[int, np.ndarray]:
    """Hidden channels of each generated block, the most important one first, by `criterion`.

    "random"; "l1" and "l2", norms of the filters that write them (Li et al., arXiv 1608.08710);
    "taylor", see `taylor_importance`; "surgeon", which is what the INR's channels are ordered by
    (`ordering.importance_order`).
    """
    spec, blocks = experiment.spec, experiment.hypernetwork.blocks
    orders = {}
    if criterion == "taylor":
        scores = taylor_importance(
            spec, variables, blocks, images, labels, experiment.preprocessing
        )
    elif criterion == "surgeon":
        folded = cifar_resnet.fold_batch_norm(variables)
        moments = jax.device_get(lab.measure_moments(experiment, folded, images))
        ordered = ordering.importance_orders(cifar_resnet.family(spec).groups, folded, moments)
    key = lab.phase_key(experiment, _SEED_OF_ORDER)
    for n in blocks:
        name = spec.blocks[n].name
        if criterion == "surgeon":
            orders[n] = ordered[cifar_resnet.hidden_group(spec.blocks[n])]
            continue
        if criterion == "random":
            draw = jax.random.uniform(jax.random.fold_in(key, n), (spec.blocks[n].hidden_width,))
            score = np.asarray(draw)
        elif criterion == "taylor":
            score = scores[name]
        else:
            groups = cifar_resnet.linen_groups(spec)
            members = groups[cifar_resnet.hidden_group(spec.blocks[n])].members
            (path,) = (member.path for member in members if member.role == "write")
            kernel = np.abs(np.asarray(hyper.flat(variables)[path], np.float64))
            score = (kernel ** (1 if criterion == "l1" else 2)).sum(axis=(0, 1, 2))
        orders[n] = np.argsort(-score, kind="stable")
    return orders


# --- batch norm for each width ---------------------------------------------------------------


def _is_norm(name: str) -> bool:
    return name in ("bn1", "bn2") or name.endswith("_bn")


def split_norms(params: Mapping) -> tuple[Params, Params]:
    """(all but batch norm, batch norm) of linen params, as trees of the same layout."""
    rest: Params = {}
    norms: Params = {}
    for name, layers in params.items():
        if name.startswith("stage"):
            rest[name] = {k: v for k, v in layers.items() if not _is_norm(k)}
            norms[name] = {k: v for k, v in layers.items() if _is_norm(k)}
        else:
            (norms if _is_norm(name) else rest)[name] = layers
    return rest, norms


def join_norms(rest: Mapping, norms: Mapping) -> Params:
    """The inverse of `split_norms`."""
    joined = {
        name: {**layers, **norms[name]} if name.startswith("stage") else layers
        for name, layers in rest.items()
    }
    return joined | {name: norms[name] for name in norms if not name.startswith("stage")}


def make_switchable(
    spec: ResNetSpec, variables: Mapping, blocks: Sequence[int], ratios: Sequence[float]
) -> Params:
    """Variables of a slimmable network: the kernels of `variables` and batch norm for each ratio.

    Each starts at the batch norm of `variables`, of its first channels.

        {"params": {"shared": ..., "norms": {"0.5": ...}}, "batch_stats": {"0.5": ...}}
    """
    norms, stats = {}, {}
    for ratio in ratios:
        _, small = slice_variables(spec, variables, blocks, widths_at(spec, blocks, ratio))
        norms[str(ratio)] = split_norms(small["params"])[1]
        stats[str(ratio)] = small["batch_stats"]
    shared, _ = split_norms(variables["params"])
    return {"params": {"shared": shared, "norms": norms}, "batch_stats": stats}


def switch(
    spec: ResNetSpec, variables: Mapping, blocks: Sequence[int], ratio: float
) -> tuple[ResNetSpec, Params]:
    """(spec, linen variables) of a slimmable network at one of its ratios."""
    widths = widths_at(spec, blocks, ratio)
    shared = {"params": variables["params"]["shared"]}
    small, sliced = slice_variables(spec, shared, blocks, widths)
    params = join_norms(sliced["params"], variables["params"]["norms"][str(ratio)])
    return small, {"params": params, "batch_stats": variables["batch_stats"][str(ratio)]}


# --- updates ---------------------------------------------------------------------------------


def _train_pass(spec: ResNetSpec, variables: Mapping, x, **options):
    """(logits, new statistics) of a network in training."""
    logits, mutated = ResNet(spec).apply(
        variables, x, train=True, mutable=["batch_stats"], **options
    )
    return jnp.asarray(logits), mutated["batch_stats"]


def joint_loss(
    baseline: Baseline, logits: Sequence[jax.Array], labels: jax.Array, teacher_logits
) -> jax.Array:
    """Sum over the networks of a step, the full one first, of their losses.

    Cross-entropy for a network without soft labels, else `ce_weight` of it and
    `distillation_weight` of distillation. No gradient flows into soft labels.
    """
    total = jnp.zeros(())
    for number, found in enumerate(logits):
        soft = {"none": None, "teacher": teacher_logits, "full": logits[0] if number else None}[
            baseline.distill_from
        ]
        ce = losses.cross_entropy(found, labels)
        if soft is None:
            total += ce
            continue
        total += baseline.ce_weight * ce
        total += baseline.distillation_weight * losses.distillation(
            found, soft, temperature=baseline.temperature
        )
    return total


Forward = Callable[[Mapping, jax.Array, jax.Array], tuple[list[jax.Array], Mapping]]


def one_network(spec: ResNetSpec) -> Forward:
    """`forward(variables, x, key)` of a single network: ([logits], new statistics)."""

    def forward(variables, x, key):
        del key
        logits, stats = _train_pass(spec, variables, x)
        return [logits], stats

    return forward


def all_switches(spec: ResNetSpec, blocks: Sequence[int], ratios: Sequence[float]) -> Forward:
    """`forward` of a slimmable network at all its ratios (Yu et al., arXiv 1812.08928)."""

    def forward(variables, x, key):
        del key
        logits, stats = [], {}
        for ratio in ratios:
            small, of_ratio = switch(spec, variables, blocks, ratio)
            found, stats[str(ratio)] = _train_pass(small, of_ratio, x)
            logits.append(found)
        return logits, stats

    return forward


def sandwich(
    spec: ResNetSpec, blocks: Sequence[int], *, smallest: float, num_random: int
) -> Forward:
    """`forward` of the full, the smallest and random widths (Yu and Huang, arXiv 1903.05134).

    Random ones are masked, at full shape. Statistics are those of the full network.
    """

    def forward(variables, x, key):
        full, stats = _train_pass(spec, variables, x)
        logits = [full]
        small, of_small = slice_variables(
            spec, variables, blocks, widths_at(spec, blocks, smallest)
        )
        logits.append(_train_pass(small, of_small, x)[0])
        ratios = jax.random.uniform(key, (num_random,), minval=smallest, maxval=1.0)
        for number in range(num_random):
            masks = {}
            for n in blocks:
                block = spec.blocks[n]
                width = jnp.floor(ratios[number] * block.hidden_width + 0.5)
                masks[block.name] = jnp.arange(block.hidden_width) < jnp.maximum(width, 1)
            logits.append(_train_pass(spec, variables, x, hidden_masks=masks)[0])
        return logits, stats

    return forward


def sgd_update(
    forward: Forward,
    baseline: Baseline,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    *,
    teacher_spec: ResNetSpec,
) -> Callable[..., tuple[TrainState, training.Metrics]]:
    """`update(state, step, key, images, indices, teacher)` of one SGD step on `joint_loss`.

    The state's params are {"params", "batch_stats"}; `teacher` is a folded tree of `teacher_spec`,
    which is only looked at for soft labels.
    """

    def update(state, step, key, images: Images, indices, teacher):
        key = jax.random.fold_in(key, step)
        x, y = preprocessing.train(
            key, images.images[indices], images.labels[indices], teacher_spec.num_classes
        )
        teacher_logits = None
        if baseline.distill_from == "teacher":
            teacher_logits = cifar_resnet.apply(teacher_spec, teacher, x)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.params["batch_stats"]}
            logits, stats = forward(variables, x, jax.random.fold_in(key, 1))
            loss = joint_loss(baseline, logits, y, teacher_logits)
            found = {
                "accuracy": losses.accuracy(logits[-1], y),
                "full_accuracy": losses.accuracy(logits[0], y),
            }
            return loss, ({"batch_stats": stats}, found)

        return training.sgd_step(optimizer, state, loss_fn)

    return update


# --- what training costs ---------------------------------------------------------------------


def _cost(images: int, *, sizes: Sequence[int], full: int, distilled: int = 0) -> Cost:
    """Cost of `images` that pass through networks of `sizes` multiply-adds each."""
    return Cost(
        images=images,
        network_passes=images * len(sizes),
        teacher_passes=distilled,
        macs=images * (1 + _BACKWARD) * sum(sizes) + distilled * full,
    )


def training_cost(experiment: Experiment, baseline: Baseline) -> Cost:
    """`Cost` of the SGD of a method on networks with batch norm."""
    spec, blocks = experiment.spec, experiment.hypernetwork.blocks
    full = spec.num_macs
    sizes = [
        cifar_spec.morph(spec, blocks, widths_at(spec, blocks, ratio)).num_macs
        for ratio in baseline.width_ratios
    ]
    distilled = baseline.distill_from == "teacher"
    images = baseline.images_seen
    if baseline.method == "pruning":
        return Cost(0, 0, 0, 0)
    if baseline.method == "pruning_finetuned":
        sizes = sizes[1:]  # the full size is the teacher
    if baseline.method == "universally_slimmable":
        sizes = [full, sizes[-1], *([full] * baseline.num_random_sizes)]
    shared = baseline.method in ("slimmable", "universally_slimmable")
    teacher_passes = images * (1 if shared else len(sizes)) if distilled else 0
    return _cost(images, sizes=sizes, full=full, distilled=teacher_passes)


def inr_cost(experiment: Experiment, num_images: int) -> Cost:
    """`Cost` of the phases of an INR's recipe that look at images."""
    family, recipe = experiment.hypernetwork, experiment.recipe
    steps = sum(
        phase.stop - phase.start
        for phase in training.phases(family, recipe, num_images=num_images)
        if phase.kind == "train"
    )
    full = experiment.spec.num_macs
    sizes = [full] * recipe.num_sizes
    if recipe.sandwich and recipe.mode == "at_once" and recipe.num_random_sizes:
        widths = training.smallest_widths(family, recipe)
        sizes[1] = cifar_spec.morph(experiment.spec, family.blocks, widths).num_macs
    passes = steps * recipe.batch_size
    distilled = 0
    targets = recipe.distillation_weight
    if targets and recipe.distill_from == "teacher":
        distilled = steps * recipe.images_per_step
    cost = _cost(passes, sizes=sizes, full=full, distilled=distilled)
    return dataclasses.replace(cost, images=steps * recipe.images_per_step)


def within_budget(config: Mapping[str, Any], budget: float, num_images: int) -> dict[str, Any]:
    """`config` with `baseline.images` times `budget`, and for an INR the epochs that this is.

    Phases share the images equally and have a step at least; the warm-up keeps its share.

    Args:
        config: of a row, see configs/baselines.py.
        budget: factor on `baseline.images`.
        num_images: training images in an epoch.
    """
    if not budget > 0:
        raise UsageError(f"--budget must be above 0, got {budget}; 1 is baseline.images images.")
    resolved: dict[str, Any] = json.loads(json.dumps(config))
    images = max(1, round(config["baseline"]["images"] * budget))
    resolved["baseline"]["images"] = images
    if config["baseline"]["method"] != "inr":
        return resolved
    recipe, network, num_phases = config["train"], config["network"], 1
    if recipe["mode"] == "blockwise":
        spec = cifar_spec.resnet_spec(network["depth"], num_classes=1)
        blocks = cifar_spec.generated_blocks(spec, config["generated"])
        num_phases = -(-len(blocks) // recipe["blocks_per_phase"])
    sizes = 1 if recipe["share_images"] else 1 + recipe["num_random_sizes"]
    per_phase = max(images / num_phases, recipe["batch_size"] * sizes)
    epochs = per_phase / num_images
    share = recipe["warmup_epochs"] / recipe["epochs"] if recipe["epochs"] else 0.0
    resolved["train"] |= {
        "epochs": epochs,
        "warmup_epochs": share * epochs,
        "final_epochs": 0.0,
        "shallow_epochs": 0.0,
        "depth_epochs": 0.0,
    }
    return resolved


# --- families --------------------------------------------------------------------------------


def _num_bytes(*trees: Any) -> int:
    return sum(int(x.size) * 4 for x in jax.tree.leaves(trees))


@dataclasses.dataclass(frozen=True)
class Run:
    """What all families are made from."""

    workdir: Workdir
    experiment: Experiment
    baseline: Baseline
    splits: datasets.Splits

    @property
    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """(images, labels) that importance and statistics are measured on."""
        number = self.baseline.calibration_images
        return self.splits.train_images[:number], self.splits.train_labels[:number]

    @property
    def cost(self) -> Cost:
        """Of training one of its families."""
        if self.baseline.method == "inr":
            return inr_cost(self.experiment, len(self.splits.train_labels))
        return training_cost(self.experiment, self.baseline)

    @functools.cached_property
    def teacher(self) -> Params:
        """Linen variables of the teacher, as it was trained."""
        return lab.import_teacher(self.experiment, self.experiment.teacher.file)

    @property
    def soft_teacher(self) -> Params:
        """The folded teacher where soft labels are its, else nothing."""
        if self.baseline.distill_from != "teacher":
            return {}
        return cifar_resnet.fold_batch_norm(self.teacher)

    def ordered(self, criterion: str) -> Params:
        """The teacher with the hidden channels of its generated blocks by importance."""
        orders = channel_order(self.experiment, self.teacher, *self.calibration, criterion)
        return reorder(self.experiment.spec, self.teacher, orders)

    def start(self, number: int = 0) -> Params:
        """Full-size linen variables to start from."""
        if self.baseline.init == "teacher":
            return self.ordered(self.baseline.criterion)
        key = jax.random.fold_in(lab.phase_key(self.experiment, _SEED_OF_ORDER), number)
        return jax.jit(cifar_resnet.init_variables, static_argnums=1)(key, self.experiment.spec)

    def sliced(self, variables: Params, ratio: float) -> tuple[ResNetSpec, Params]:
        spec, blocks = self.experiment.spec, self.experiment.hypernetwork.blocks
        return slice_variables(spec, variables, blocks, widths_at(spec, blocks, ratio))

    def recalibrated(self, spec: ResNetSpec, variables: Params) -> Params:
        images, _ = self.calibration
        batch_size = self.experiment.evaluation.batch_size
        preprocessing = self.experiment.preprocessing
        return recalibrate(spec, variables, images, preprocessing, batch_size=batch_size)

    def train(
        self,
        name: str,
        number: int,
        first: Callable[[], Params],
        forward: Forward,
        of_one: ResNetSpec | None = None,
    ) -> Params:
        """Trains from where the work directory stands; returns {"params", "batch_stats"}.

        Args:
            name: of the part of the run, for checkpoints and metrics.
            number: of the part, for its random numbers.
            first: makes the variables to start from.
            forward: see `sgd_update`.
            of_one: the network's spec, where there is only one.
        """
        baseline, experiment, splits = self.baseline, self.experiment, self.splits
        images = Images(jnp.asarray(splits.train_images), jnp.asarray(splits.train_labels))
        recipe = training.TeacherRecipe(
            batch_size=baseline.batch_size,
            learning_rate=baseline.learning_rate,
            momentum=baseline.momentum,
            weight_decay=baseline.weight_decay,
        )
        optimizer = training.teacher_optimizer(recipe, baseline.num_steps)
        preprocessing = experiment.preprocessing

        def fresh():
            variables = jax.tree.map(jnp.array, first())  # steps donate their buffers
            return TrainState(variables, jax.jit(optimizer.init)(variables["params"]))

        def locate(state, step):
            if of_one is None:
                return ""
            return diagnosis.locate_in_teacher(of_one, preprocessing, state.params, step, images)

        key = jax.random.fold_in(lab.phase_key(experiment, _SEED_OF_TRAINING), number)
        part = lab.Part(self.workdir, experiment.run, name, name, key, images, baseline.num_steps)
        update = sgd_update(
            forward, baseline, optimizer, preprocessing, teacher_spec=experiment.spec
        )
        state = part.train(
            update,
            fresh,
            images_per_step=baseline.batch_size,
            shown=("loss", "full_accuracy", "accuracy"),
            rest=(self.soft_teacher,),
            locate=locate,
        )
        return state.params


def _one_by_one(run: Run) -> Family:
    """A network per size: from scratch, or pruned from the teacher and trained on."""
    baseline, spec = run.baseline, run.experiment.spec
    blocks = run.experiment.hypernetwork.blocks
    pruned = baseline.method == "pruning_finetuned"
    ordered = run.ordered(baseline.criterion) if pruned else None
    networks = {}
    for number, ratio in enumerate(baseline.width_ratios):
        small = cifar_spec.morph(spec, blocks, widths_at(spec, blocks, ratio))
        if ordered is not None:
            _, first = run.sliced(ordered, ratio)
        else:
            key = jax.random.fold_in(lab.phase_key(run.experiment, _SEED_OF_ORDER), number)
            first = jax.jit(cifar_resnet.init_variables, static_argnums=1)(key, small)
        if ordered is not None and ratio == 1:
            variables = first  # nothing was pruned
        else:
            variables = run.train(
                f"width_{ratio}", number, lambda v=first: v, one_network(small), small
            )
        networks[ratio] = small, cifar_resnet.fold_batch_norm(variables)
    return Family(
        network=lambda ratio: (networks[ratio][0], jax.tree.map(jnp.array, networks[ratio][1])),
        storage_bytes=_num_bytes([tree for _, tree in networks.values()]),
        continuous=False,
        calibration_images=baseline.calibration_images if pruned else 0,
        kept_as_is=(1.0,) if pruned else (),
    )


def _slimmable(run: Run) -> Family:
    baseline, spec = run.baseline, run.experiment.spec
    blocks, ratios = run.experiment.hypernetwork.blocks, run.baseline.width_ratios
    variables = run.train(
        "slimmable",
        0,
        lambda: make_switchable(spec, run.start(), blocks, ratios),
        all_switches(spec, blocks, ratios),
    )

    def network(ratio):
        small, of_ratio = switch(spec, variables, blocks, ratio)
        return small, cifar_resnet.fold_batch_norm(of_ratio)

    # Of each batch norm a factor and a summand are left once its statistics are known.
    return Family(
        network=network,
        storage_bytes=_num_bytes(variables["params"]["shared"], variables["params"]["norms"]),
        continuous=False,
        calibration_images=baseline.calibration_images if baseline.init == "teacher" else 0,
    )


def _universally_slimmable(run: Run) -> Family:
    baseline, spec = run.baseline, run.experiment.spec
    blocks, ratios = run.experiment.hypernetwork.blocks, run.baseline.width_ratios
    forward = sandwich(spec, blocks, smallest=ratios[-1], num_random=baseline.num_random_sizes)
    variables = run.train("universally_slimmable", 0, run.start, forward)

    def network(ratio):
        small, of_ratio = run.sliced(variables, ratio)
        return small, cifar_resnet.fold_batch_norm(run.recalibrated(small, of_ratio))

    # Kernels once; for each of the sizes a factor and a summand per channel.
    shared, _ = split_norms(variables["params"])
    norms = [split_norms(run.sliced(variables, ratio)[1]["params"])[1] for ratio in ratios]
    return Family(
        network=network,
        storage_bytes=_num_bytes(shared, norms),
        switch_images=len(run.calibration[0]),
        calibration_images=baseline.calibration_images,
    )


def _pruned(run: Run, criterion: str, *, recalibrated: bool) -> Family:
    """The teacher without its least important channels, not trained on."""
    ordered = run.ordered(criterion)

    def network(ratio):
        small, variables = run.sliced(ordered, ratio)
        if recalibrated and ratio < 1:  # the full size is the teacher
            variables = run.recalibrated(small, variables)
        return small, cifar_resnet.fold_batch_norm(variables)

    number = run.baseline.calibration_images
    measured = recalibrated or criterion in ("taylor", "surgeon")
    shared, norms = split_norms(ordered["params"])
    of_sizes = [
        split_norms(run.sliced(ordered, r)[1]["params"])[1] for r in run.baseline.width_ratios
    ]
    return Family(
        network=network,
        storage_bytes=_num_bytes(shared, of_sizes if recalibrated else norms),
        switch_images=len(run.calibration[0]) if recalibrated else 0,
        calibration_images=number if measured else 0,
        kept_as_is=run.baseline.width_ratios,
    )


def _inr(run: Run) -> Family:
    """The INR of the config's recipe, trained as by train.py."""
    experiment, family = run.experiment, run.experiment.hypernetwork
    backbone = lab.prepare_backbone(run.workdir, experiment, run.splits)
    params = lab.train_inr(run.workdir, experiment, run.splits, backbone)
    lab.save_result(run.workdir, experiment, params)
    noise = experiment.noise(experiment.evaluation.num_samples)
    # The key is an argument: XLA would spend minutes on working out the noise of a constant.
    generate = jax.jit(functools.partial(hyper.generate, family), static_argnames="num_samples")

    def network(ratio):
        widths = family.widths(ratio)
        tree = generate(params, jnp.asarray(widths), **noise)
        return family.dense(tree, widths.tolist())

    return Family(
        network=network,
        storage_bytes=_num_bytes(params),
        calibration_images=lab.NUM_MOMENT_IMAGES if family.inr.needs_moments else 0,
    )


def families(run: Run) -> Iterator[tuple[str, str, Family]]:
    """(folder in the work directory, variant, family) of each row that a run makes."""
    baseline = run.baseline
    if baseline.method == "pruning":
        for criterion in dict.fromkeys((baseline.criterion, *baseline.criteria)):
            for recalibrated in (True, False):
                name = f"{criterion}_recalibrated" if recalibrated else criterion
                folder = "" if criterion == baseline.criterion and recalibrated else name
                variant = f"{criterion}, statistics recalibrated" if recalibrated else criterion
                yield folder, variant, _pruned(run, criterion, recalibrated=recalibrated)
        return
    make = {
        "individual": _one_by_one,
        "pruning_finetuned": _one_by_one,
        "slimmable": _slimmable,
        "universally_slimmable": _universally_slimmable,
        "inr": _inr,
    }[baseline.method]
    yield "", baseline.variant, make(run)


# --- the row ---------------------------------------------------------------------------------

_SHORT_SECONDS = 5.0  # a change of size that is faster is timed again, without compilation


def measure(
    run: Run,
    family: Family,
    known: MutableMapping[float, dict[str, float]],
    read: Sequence[str] = SPLITS,
) -> tuple[list[dict[str, Any]], float]:
    """(a line for each size with its accuracies in percent, seconds of a change of size).

    `known` holds accuracies by split of what is the teacher itself in all families of a run, by
    ratio, and is added to. `read` are the splits to evaluate.
    """
    experiment, splits = run.experiment, run.splits
    lines, seconds = [], []
    for ratio in run.baseline.width_ratios:
        for _ in range(2):
            last, (spec, params) = timing.timed(family.network, ratio)
            if last > _SHORT_SECONDS:
                break
        seconds.append(last)
        network = cifar_resnet.Network(spec)
        found = known.get(ratio) or {
            split: round(
                100 * experiment.accuracy(params, *grid.evaluation_split(splits, split), network), 4
            )
            for split in read
        }
        if ratio == 1 and ratio in family.kept_as_is:
            known[ratio] = found
        line = {
            "width_ratio": ratio,
            "compression": round(100 * (1 - ratio), 6),
            "widths": [spec.hidden_widths[n] for n in experiment.hypernetwork.blocks],
            "num_params": spec.num_params,
            "num_macs": spec.num_macs,
            "images": 0 if ratio in family.kept_as_is else run.cost.images,
            **found,
        }
        accuracies = "".join(f"   {split} {line[split]:6.2f} %" for split in read)
        print(
            f"width {ratio:<5} {spec.num_params:>9,} parameters {spec.num_macs / 1e6:7.2f} M "
            f"multiply-adds{accuracies}",
            flush=True,
        )
        lines.append(line)
    return lines, float(np.median(seconds))


def shown_command(argv: Sequence[str]) -> str:
    """A command line that reads the same on any machine: of paths only the last part.

    >>> shown_command(["x", "--config=/a/configs/baselines.py:slimmable", "--workdir=/tmp/b"])
    'python -m neumeta_jax.baselines --config=configs/baselines.py:slimmable --workdir=DIR'
    """
    words = []
    for word in argv[1:]:
        name, equals, value = word.partition("=")
        if name.lstrip("-") == "workdir" and equals:
            value = "DIR"
        elif name.lstrip("-") == "config" and equals:
            value = "/".join(pathlib.PurePath(value).parts[-2:])
        elif os.sep in value:
            value = pathlib.PurePath(value).name
        words.append(name + equals + value)
    return " ".join(["python -m neumeta_jax.baselines", *words])


@contextlib.contextmanager
def _clock(path: pathlib.Path) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds so far, those of interrupted runs included."""
    before, started = 0.0, time.perf_counter()
    with contextlib.suppress(OSError, ValueError):
        before = float(path.read_text())

    def elapsed():
        return before + time.perf_counter() - started

    try:
        yield elapsed
    finally:
        with contextlib.suppress(OSError), storage.replacing(path) as partial:
            partial.write_text(f"{elapsed():.1f}\n")


def row(
    run: Run,
    family: Family,
    *,
    variant: str,
    lines: Sequence[Mapping[str, Any]],
    switch_seconds: float,
    wall_seconds: float,
    command: str,
) -> dict[str, Any]:
    """The contents of row.json."""
    baseline, experiment = run.baseline, run.experiment
    source = lab.checkout()
    commit = source["commit"] and source["commit"][:10] + " with changes" * bool(source["changed"])
    found = lab.versions()
    devices = found.pop("devices")
    return {
        "method": baseline.title,
        "variant": variant,
        "source": baseline.source,
        "seed": experiment.run.seed,
        "dataset": experiment.name,
        "network": f"ResNet{experiment.spec.depth}",
        "teacher": pathlib.PurePath(experiment.teacher.file).name or None,
        "budget_images": baseline.images,
        "sizes": list(lines),
        "network_passes": run.cost.network_passes,
        "teacher_passes": run.cost.teacher_passes,
        "training_macs": run.cost.macs,
        "calibration_images": family.calibration_images,
        "storage_bytes": family.storage_bytes,
        "continuous": family.continuous,
        "switch_images": family.switch_images,
        "switch_seconds": round(switch_seconds, 4),
        "wall_seconds": round(wall_seconds, 1),
        "command": command,
        "commit": commit,
        "device": f"{devices}, {lab.num_cores()} CPU cores",
        "versions": found,
    }


FLAGS: command_line.Flags = {
    "workdir": (str, "", "Where the run lives; created if absent."),
    "budget": (float, 1.0, "Factor on baseline.images."),
    "trial": (
        bool,
        False,
        "Leave the test images alone and write no row, only print; for choosing rates.",
    ),
}


def section(config: Mapping[str, Any]) -> Baseline:
    """The `Baseline` of a config.

    Raises:
        ValueError: for a missing or unknown field, or a value that no run could use.
    """
    given = config.get("baseline")
    if not isinstance(given, Mapping):
        raise UsageError("The config must have a section baseline; use configs/baselines.py.")
    known = [field.name for field in dataclasses.fields(Baseline)]
    unknown = sorted(set(given) - set(known))
    if unknown or not {"method", "title"} <= set(given):
        raise UsageError(
            f"The config section 'baseline' needs method and title and takes {known}, got "
            f"{sorted(given)}; compare it with configs/baselines.py."
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Baseline(**values)


def main(argv: Sequence[str]) -> None:
    config, options = command_line.parse(argv, FLAGS, config_required=True)
    if not options.workdir:
        raise UsageError("--workdir=DIR is required; the run is kept and resumed there.")
    baseline = section(config)
    if baseline.needs_teacher and not config["teacher"]["file"]:
        raise UsageError(
            f"{baseline.title!r} starts from or learns from a teacher; give one with "
            "--config.teacher.file=FILE."
        )
    lab.quiet_logging()
    lab.configure_jax()
    dataset, splits = lab.load_data(config)
    config = within_budget(config, options.budget, len(splits.train_labels))
    baseline = section(config)
    experiment = lab.from_config(config, dataset)
    if not isinstance(experiment.spec, ResNetSpec):
        raise UsageError(
            "Methods are compared on CIFAR ResNets, got network.factory="
            f"{experiment.spec.factory!r}; leave it empty."
        )
    read = SPLITS[:1] if options.trial else SPLITS
    for split in read:
        grid.evaluation_split(splits, split)
    if baseline.method == "inr":
        lab.check_start(experiment, splits, options.workdir)
    else:
        lab.check_steps(len(splits.train_labels), baseline=baseline.batch_size)
        lab.check_teacher(experiment, options.workdir)
    print(
        f"{baseline.title}{baseline.variant and ', '}{baseline.variant}: {baseline.images} images "
        f"for {len(baseline.width_ratios)} sizes of a ResNet{experiment.spec.depth}",
        flush=True,
    )
    with (
        lab.open_workdir(options.workdir, config, experiment.fingerprint) as workdir,
        _clock(workdir.path / "seconds") as elapsed,
    ):
        run = Run(workdir, experiment, baseline, splits)
        known: dict[float, dict[str, float]] = {}
        before = 0.0
        for folder, variant, family in families(run):
            print(f"\n{baseline.title}{variant and ', '}{variant}", flush=True)
            lines, switch_seconds = measure(run, family, known, read)
            if options.trial:
                continue
            document = row(
                run,
                family,
                variant=variant,
                lines=lines,
                switch_seconds=switch_seconds,
                wall_seconds=elapsed() - before,
                command=shown_command(argv),
            )
            path = workdir.path / folder / ROW_FILE
            path.parent.mkdir(exist_ok=True)
            storage.write_json(path, document)
            print(f"wrote {path}", flush=True)
            before = elapsed()
            workdir.check_stop(0)
        print(f"done in {format_seconds(elapsed())}")


if __name__ == "__main__":
    command_line.run(main, sys.argv)
