"""The phases of training, as functions from trees to trees.

    teacher   SGD on a ResNet with batch norm                       (`teacher_update`)
    fit       the INR reproduces the folded, smoothed teacher       (`fit_update`)
    blocks    blocks join one at a time, from the input; all INRs   (`inr_update`)
              so far are trained jointly at random widths
    depth     what only networks that skip blocks see               (`inr_update`)

Method: arXiv 2505.05510. Everything random is a pure function of a key and the step, so that a run
that was interrupted ends with the same bits as one that was not.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from neumeta_jax.core import hypernetwork as hyper, losses
from neumeta_jax.core.hypernetwork import Hypernetwork
from neumeta_jax.data import preprocessing
from neumeta_jax.data.preprocessing import Images, Preprocessing
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import NUM_STAGES

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a phase carries from step to step.

    `average` is the exponential moving average of `params`, None where none is kept.
    """

    params: Any
    opt_state: Any
    average: Any = None

    @property
    def result(self) -> Any:
        """The parameters to use: the average where there is one."""
        return self.params if self.average is None else self.average


class Prepares(Protocol):
    """What a step needs of a preprocessing: `train` as of `Preprocessing`, of any inputs."""

    def train(
        self, key: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int
    ) -> tuple[jax.Array, jax.Array]: ...


# --- devices ---------------------------------------------------------------------------------

DATA_AXIS = "data"


def data_mesh(
    *recipes: "TeacherRecipe | InrRecipe", devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh | None:
    """A mesh whose axis "data" shares out the batches of `recipes`; None for a single device.

    Parameters, the optimizer's state and the training images (uint8, 154 MB for CIFAR) lie on every
    device: an epoch's order is random, so that shared-out images would travel in every step. Each
    device computes the gradient of an equal share of every batch, and one sum per step over the
    devices makes them equal again. What is random is drawn for the whole batch, so that it does not
    depend on the number of devices.

    Args:
        recipes: whose batches must be shared equally.
        devices: default all devices, those of other processes included.

    Raises:
        ValueError: if a batch cannot be shared equally.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if count == 1:
        return None
    for recipe in recipes:
        micro = getattr(recipe, "micro_batch", 0)
        share, rest = divmod(recipe.batch_size, count)
        name = "teacher.batch_size" if isinstance(recipe, TeacherRecipe) else "train.batch_size"
        if rest:
            raise ValueError(
                f"{name} must be a multiple of the {count} devices, got {recipe.batch_size}; "
                "change it or show this process fewer devices (CUDA_VISIBLE_DEVICES)."
            )
        if micro and share > micro and share % micro:
            raise ValueError(
                f"train.micro_batch must divide each device's share of the batch, {share} of "
                f"{recipe.batch_size} images, got {micro}; change it or set it to 0."
            )
    return jax.sharding.Mesh(np.array(devices), (DATA_AXIS,))


def replicate(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """`tree`, the same in all processes, on every device of `mesh`; as it is without one."""
    if mesh is None:
        return tree
    everywhere = jax.NamedSharding(mesh, jax.P())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)))
        if isinstance(x, jax.Array) and x.sharding == everywhere:
            return x
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])

    return jax.tree.map(one, tree)


def on_default_device(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """A replicated `tree` as a program that knows of one device only would have it."""
    if mesh is None:
        return tree
    # Through the host: arrays that are tied to a device compile every program a second time.
    return jax.tree.map(lambda x: jnp.array(np.asarray(x)), tree)


# --- teacher ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TeacherRecipe:
    """How the full-size network is trained, with a cosine schedule.

    Attributes:
        optimizer: "sgd" with Nesterov's momentum, or "adamw".
    """

    optimizer: str = "sgd"
    epochs: float = 200.0
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.epochs <= 0 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(
                "A teacher needs epochs > 0, batch_size >= 1 and learning_rate > 0, got "
                f"{self.epochs=}, {self.batch_size=}, {self.learning_rate=}."
            )
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be sgd or adamw, got {self.optimizer!r}.")


def teacher_optimizer(recipe: TeacherRecipe, num_steps: int) -> optax.GradientTransformation:
    """The optimiser of `recipe` for parameters of a network; weight decay leaves out vectors."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(num_steps // 20, 500), max(num_steps, 1)
    )

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    if recipe.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=recipe.weight_decay, mask=matrices)
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, mask=matrices),
        optax.sgd(schedule, momentum=recipe.momentum, nesterov=True),
    )


def teacher_init(key: jax.Array, network: Any, recipe: TeacherRecipe, num_steps: int) -> TrainState:
    """State whose `params` are the linen variables {"params"[, "batch_stats", ...]}."""
    variables = jax.jit(network.init_variables)(key)
    optimizer = teacher_optimizer(recipe, num_steps)
    return TrainState(variables, jax.jit(optimizer.init)(variables["params"]))


def teacher_update(
    network: Any,
    recipe: TeacherRecipe,
    preprocessing: Preprocessing,
    num_steps: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`update(state, step, key, images, indices)` of one step; `indices` is int[batch].

    `network` is a `cifar_resnet.Network` or `networks.linen.Network`.

    On a `mesh` (see `data_mesh`) the compiler shares out the batch. Batch norm sees all of it, so
    that the statistics are those of one device.
    """
    optimizer = teacher_optimizer(recipe, num_steps)
    num_classes = network.spec.num_classes

    def update(state, step, key, images, indices):
        x, y = preprocessing.train(
            jax.random.fold_in(key, step),
            images.images[indices],
            images.labels[indices],
            num_classes,
        )
        if mesh is not None:
            x, y = jax.lax.with_sharding_constraint(
                (x, y), jax.NamedSharding(mesh, jax.P(DATA_AXIS))
            )

        def loss_fn(params):
            variables = {**state.params, "params": params}
            step_key = jax.random.fold_in(jax.random.fold_in(key, step), 2)
            logits, changed = network.train(variables, x, step_key)
            targets = y if y.ndim > 1 else jax.nn.one_hot(y, num_classes)
            targets = optax.smooth_labels(targets, recipe.label_smoothing)
            loss = losses.cross_entropy(logits, targets)
            return loss, (changed, {"accuracy": losses.accuracy(logits, y)})

        return sgd_step(optimizer, state, loss_fn)

    return update


def sgd_step(
    optimizer: optax.GradientTransformation, state: TrainState, loss_fn: Callable
) -> tuple[TrainState, Metrics]:
    """A step on linen variables; `loss_fn(params)` is the loss and (what changed, metrics).

    What changed are the collections beside "params", such as batch statistics.
    """
    params = state.params["params"]
    (loss, (changed, terms)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    metrics = {"loss": loss, **terms, "grad_norm": optax.tree.norm(grads)}
    return TrainState({**state.params, **changed, "params": params}, opt_state), metrics


# --- INR -------------------------------------------------------------------------------------

MODES = ("blockwise", "at_once")
BLOCK_INITS = ("copy", "teacher")
LEARNED = ("last", "all", "none")
DISTILL_FROM = ("teacher", "full")
FIT_WIDTHS = ("full", "random")
WARMUP_PHASES = ("stage", "all")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")
DEPTH_KINDS = ("shallow", "depth")  # of phases that train the depth term alone
STEP_KINDS = ("train", *DEPTH_KINDS)  # of phases whose steps are those of `inr_update`


@dataclasses.dataclass(frozen=True)
class InrRecipe:
    """How the INR is trained. Defaults are the papers' (arXiv 2505.05510).

    Attributes:
        mode: "blockwise" adds blocks from the input on, `blocks_per_phase` at a time; "at_once"
            trains all of them in one phase (NeuMeta, arXiv 2410.11878).
        epochs: of each phase; one epoch shows every training image once, to one of the sizes or,
            with `share_images`, to all sizes of a step.
        final_epochs: of a last phase after all blocks have joined.
        depth_epochs, depth_learning_rate: of a phase at the very end that trains the depth term
            alone, on networks that skip blocks; all others stay what they are. For INR kinds with
            a `depth_term`; the sizes of a step are then the shallowest network at full width
            (`shallowest_widths`), with `sandwich` that at the smallest widths, and random ones,
            together `num_random_sizes`, but at least one.
        shallow_epochs, shallow_learning_rate: of a phase before that one that trains the same
            parameters, but sees the first of those sizes alone, so that its steps are short.
        warmup_epochs: length of the linear warm-up of the learning rates.
        warmup_phases: which phases warm up: only those that open a "stage", whose INR has nothing
            to be copied from (papers), or "all", because each starts a fresh optimiser.
        block_init: a new block's INR starts as a "copy" of the previous block's, or from the
            "teacher": in closed form for INR kinds that have one, else from the fit phase.
        fit_steps, fit_learning_rate: the fit phase; 0 steps leave it out.
        fit_widths: fit the teacher at "full" width only, or at "random" widths of the trained range
            too, where the target is the teacher with its channels averaged
            (`hypernetwork.resampled`).
        alpha_init: SkipInit scalar of a new block; 0 makes it start as the identity.
        batch_size: images per size.
        share_images: all sizes of a step see the same images (Yu and Huang, arXiv 1903.05134),
            which then count once; the targets of distillation are computed once.
        micro_batch: images per forward and backward pass; 0 takes the batch at once. Gradients are
            summed, so that this changes speed and memory only; small ones stay in a CPU's cache.
        num_random_sizes: sizes per step beside the full width.
        min_width_ratio, max_width_ratio: trained range; ratios are drawn uniformly from it.
        sandwich: the first of the random sizes is always the smallest of the trained range (Yu and
            Huang, arXiv 1903.05134). With `skip_blocks` the second one is the shallowest network at
            full width.
        per_block_widths: share of the random sizes that draw one ratio for each block instead of
            one for the network.
        skip_blocks: share of the random sizes that skip blocks, so that depth varies too: in each
            stage the last ones, a number drawn uniformly from 0 to `max_skipped` of those that are
            generated.
        max_skipped: share of a stage's generated blocks, rounded, half of one upwards.
        noise: whether training adds coordinate noise (its size belongs to the INR).
        ce_weight, norm_weight, reconstruction_weight, distillation_weight, temperature: the loss.
        distill_from: whose logits are the soft labels: the folded "teacher"'s, or those of the
            "full" size of the same step (in-place distillation, arXiv 1903.05134).
        ema_decay: of an average of the parameters that replaces them in the end; 0 keeps none.
        optimizer: "adamw", or "muon" for what is a matrix to it, see `inr_optimizer`.
        learning_rate, alpha_learning_rate, learned_learning_rate, weight_decay, clip: of the
            optimizer, and the largest value of a gradient's entry.
        learned: which parameters that are not generated are trained: the "last" block and the head
            once the last stage that is generated is reached, "all" of them always, or "none".
        schedule: of the learning rates within a phase.
    """

    mode: str = "blockwise"
    epochs: float = 50.0
    final_epochs: float = 0.0
    depth_epochs: float = 0.0
    depth_learning_rate: float = 8e-4
    shallow_epochs: float = 0.0
    shallow_learning_rate: float = 8e-4
    warmup_epochs: float = 20.0
    warmup_phases: str = "stage"
    blocks_per_phase: int = 1
    block_init: str = "copy"
    fit_steps: int = 0
    fit_learning_rate: float = 8e-4
    fit_widths: str = "full"
    alpha_init: float = 0.0
    batch_size: int = 128
    share_images: bool = False
    micro_batch: int = 0
    num_random_sizes: int = 3
    min_width_ratio: float = 0.5
    max_width_ratio: float = 1.0
    sandwich: bool = False
    per_block_widths: float = 0.0
    skip_blocks: float = 0.0
    max_skipped: float = 0.5
    noise: bool = True
    ce_weight: float = 100.0
    norm_weight: float = 1e-3
    reconstruction_weight: float = 1.0
    distillation_weight: float = 0.0
    distill_from: str = "teacher"
    temperature: float = 1.0
    ema_decay: float = 0.0
    optimizer: str = "adamw"
    learning_rate: float = 8e-4
    alpha_learning_rate: float = 1e-4
    learned_learning_rate: float = 7e-5
    weight_decay: float = 1e-4
    clip: float = 10.0
    learned: str = "last"
    schedule: str = "constant"

    def __post_init__(self):
        for field, allowed in (
            ("mode", MODES),
            ("block_init", BLOCK_INITS),
            ("learned", LEARNED),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("fit_widths", FIT_WIDTHS),
            ("distill_from", DISTILL_FROM),
            ("warmup_phases", WARMUP_PHASES),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}.")
        if not 0 < self.min_width_ratio <= self.max_width_ratio <= 1:
            raise ValueError(
                "The trained range must satisfy 0 < min_width_ratio <= max_width_ratio <= 1, got "
                f"[{self.min_width_ratio}, {self.max_width_ratio}]."
            )
        if self.batch_size < 1 or self.num_random_sizes < 0 or self.blocks_per_phase < 1:
            raise ValueError(
                "batch_size and blocks_per_phase must be at least 1 and num_random_sizes at least "
                f"0, got {self.batch_size}, {self.blocks_per_phase}, {self.num_random_sizes}."
            )
        if self.micro_batch < 0 or (self.micro_batch and self.batch_size % self.micro_batch):
            raise ValueError(
                f"micro_batch must divide batch_size or be 0, got {self.micro_batch} and "
                f"{self.batch_size}."
            )
        if not (0 <= self.per_block_widths <= 1 and 0 <= self.ema_decay < 1):
            raise ValueError(
                "per_block_widths must lie in [0, 1] and ema_decay in [0, 1), got "
                f"{self.per_block_widths} and {self.ema_decay}."
            )
        if not (0 <= self.skip_blocks <= 1 and 0 <= self.max_skipped <= 1):
            raise ValueError(
                "skip_blocks and max_skipped must lie in [0, 1], got "
                f"{self.skip_blocks} and {self.max_skipped}."
            )
        lengths = (
            "epochs",
            "final_epochs",
            "shallow_epochs",
            "depth_epochs",
            "warmup_epochs",
            "fit_steps",
        )
        if min(getattr(self, field) for field in lengths) < 0:
            raise ValueError(f"{', '.join(lengths[:-1])} and {lengths[-1]} must not be < 0.")
        for field in ("shallow_epochs", "depth_epochs"):
            if getattr(self, field) and not (self.skip_blocks and self.max_skipped):
                raise ValueError(
                    f"{field} trains networks that skip blocks and needs skip_blocks > 0 and "
                    f"max_skipped > 0, got {self.skip_blocks} and {self.max_skipped}."
                )

    @property
    def num_sizes(self) -> int:
        return 1 + self.num_random_sizes

    @property
    def images_per_step(self) -> int:
        """How many images a step takes from the epoch."""
        return self.batch_size * (1 if self.share_images else self.num_sizes)


def phase_recipe(recipe: InrRecipe, kind: str) -> InrRecipe:
    """`recipe` as a phase of `kind` follows it: `DEPTH_KINDS` have no network of full size."""
    if kind not in DEPTH_KINDS:
        return recipe
    if kind == "shallow":
        return dataclasses.replace(
            recipe, learning_rate=recipe.shallow_learning_rate, num_random_sizes=0
        )
    return dataclasses.replace(
        recipe,
        learning_rate=recipe.depth_learning_rate,
        num_random_sizes=max(recipe.num_random_sizes - 1, 0),
    )


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training between two events.

    Attributes:
        name: for logs.
        kind: "fit", "train", "shallow" or "depth".
        start, stop: global steps.
        num_active: how many blocks, counted in training order, are generated.
        new_blocks: positions of the blocks that join when the phase starts.
        warmup_steps: linear warm-up of the learning rate.
        stage: the stage of the newest block.
    """

    name: str
    kind: str
    start: int
    stop: int
    num_active: int
    new_blocks: tuple[int, ...]
    warmup_steps: int
    stage: int


def phases(hypernetwork: Hypernetwork, recipe: InrRecipe, *, num_images: int) -> tuple[Phase, ...]:
    """The phases of INR training in order; they cover all global steps without gaps."""
    stages = hypernetwork.stages
    num_blocks = len(stages)
    per_epoch = num_images / recipe.images_per_step
    result: list[Phase] = []

    def add(name, kind, num_steps, num_active, new_blocks, warmup_steps=0):
        start = result[-1].stop if result else 0
        warmup_steps = min(warmup_steps, num_steps)
        stage = stages[num_active - 1]
        result.append(
            Phase(name, kind, start, start + num_steps, num_active, new_blocks, warmup_steps, stage)
        )

    everything = tuple(range(num_blocks))
    if recipe.fit_steps:
        add("fit", "fit", recipe.fit_steps, num_blocks, everything)
    steps = round(recipe.epochs * per_epoch)
    warmup = round(recipe.warmup_epochs * per_epoch)
    always = recipe.warmup_phases == "all"
    if recipe.mode == "at_once":
        add("all blocks", "train", steps, num_blocks, everything, warmup)
    else:
        for first in range(0, num_blocks, recipe.blocks_per_phase):
            new = tuple(range(first, min(first + recipe.blocks_per_phase, num_blocks)))
            opens = any(p == 0 or stages[p] != stages[p - 1] for p in new)
            name = f"block {new[-1] + 1} of {num_blocks}"
            add(name, "train", steps, new[-1] + 1, new, warmup if opens or always else 0)
    final = round(recipe.final_epochs * per_epoch)
    if final:
        add("final", "train", final, num_blocks, (), warmup if always else 0)
    for kind, epochs in (("shallow", recipe.shallow_epochs), ("depth", recipe.depth_epochs)):
        if epochs and not hypernetwork.inr.depth_term:
            raise ValueError(
                f"train.{kind}_epochs trains the depth term of an INR, which this one does not "
                f"have; set inr.depth_term (kind 'projection') or {kind}_epochs to 0."
            )
        per_epoch = num_images / phase_recipe(recipe, kind).images_per_step
        steps, warmup = (round(n * per_epoch) for n in (epochs, recipe.warmup_epochs))
        add(kind, kind, steps, num_blocks, (), warmup)
    return tuple(phase for phase in result if phase.stop > phase.start)


def inr_optimizer(recipe: InrRecipe) -> optax.GradientTransformation:
    """AdamW or Muon behind a clip, at a learning rate of 1; the step multiplies by those it has.

    Muon takes steps whose singular values are all about equal (Jordan, "Muon", 2024), here for the
    kernels of convolutions, those that an INR holds as values included, and for hidden layers of
    MLPs; all else keeps AdamW, with Nesterov's momentum. Steps are as long as AdamW's, a root mean
    square of 0.2 times the learning rate (Liu et al., arXiv 2502.16982), so that rates carry over.
    """
    if recipe.optimizer == "muon":
        numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        optimizer = _stacked(
            optax.contrib.muon(
                1.0,
                weight_decay=recipe.weight_decay,
                adam_weight_decay=recipe.weight_decay,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=lambda stacks: jax.tree.map_with_path(
                    lambda path, _: None if path[0].key == _REST else numbers, stacks
                ),
            )
        )
    else:
        optimizer = optax.adamw(1.0, weight_decay=recipe.weight_decay)
    return optax.chain(optax.clip(recipe.clip), optimizer)


_REST = "rest"  # the stack of all that is no matrix


def _stacked(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, whose tree has one array for all matrices of a shape and one for all else.

    Its updates are those that it would have for each leaf; a GPU runs one small program for a shape
    instead of one for a leaf.
    """

    def as_matrices(path, leaf):
        """A leaf as [number, rows, columns], or as a vector if it is no matrix to Muon."""
        names = [str(getattr(entry, "key", "")) for entry in path]
        if names[-1] == "values" and leaf.shape[3] > 1:  # tensors, terms, out, in, 3 x 3
            return leaf.reshape(-1, leaf.shape[2], leaf.shape[3] * leaf.shape[4])
        if names[-1] == "kernel" and leaf.ndim == 4:  # HWIO
            return jnp.moveaxis(leaf, 3, 0).reshape(1, leaf.shape[3], -1)
        if re.fullmatch(r"hidden\d+/kernel", "/".join(names[-2:])):  # ..., in, out
            return leaf.reshape(-1, *leaf.shape[-2:])
        return leaf.reshape(-1)

    def stack(tree):
        stacks: dict[str, list] = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            part = as_matrices(path, leaf)
            stacks.setdefault("x".join(map(str, part.shape[1:])) or _REST, []).append(part)
        return {name: jnp.concatenate(parts) for name, parts in stacks.items()}

    def update(updates, state, params=None):
        stacks, state = optimizer.update(stack(updates), state, stack(params))
        _, unstack = jax.vjp(stack, updates)  # a linear map that moves entries: its transpose
        return unstack(stacks)[0], state

    return optax.GradientTransformation(lambda params: optimizer.init(stack(params)), update)


def start_phase(
    params: Params, hypernetwork: Hypernetwork, recipe: InrRecipe, phase: Phase
) -> TrainState:
    """The state at the first step of `phase`: new blocks initialised, a fresh optimiser.

    A new block's INR starts from the block before it ("INR initialisation"), where there is one in
    the same stage and the recipe says so.
    """
    if phase.kind == "train" and phase.new_blocks:
        inr_params = params["inr"]
        if recipe.block_init == "copy" and recipe.mode == "blockwise":
            for position in phase.new_blocks:
                if position:
                    inr_params = hypernetwork.inr.copy_group(
                        inr_params, hypernetwork.stacks, position - 1, position
                    )
        new = jnp.array(phase.new_blocks)
        alpha = params["alpha"].at[new].set(recipe.alpha_init)
        params = {**params, "inr": inr_params, "alpha": alpha}
    return _fresh_state(params, recipe)


@functools.partial(jax.jit, static_argnums=1)  # else it is a hundred programs of one line each
def _fresh_state(params: Params, recipe: InrRecipe) -> TrainState:
    """A state in buffers of its own, because the step donates them and trees may share leaves."""
    params = jax.tree.map(jnp.array, params)
    average = jax.tree.map(jnp.array, params) if recipe.ema_decay else None
    return TrainState(params, inr_optimizer(recipe).init(params), average)


class PhaseInputs(NamedTuple):
    """What a step needs to know of its phase, as arrays, so that all phases share a compilation."""

    start: Any  # int32
    num_steps: Any  # int32
    warmup_steps: Any  # int32
    active: Any  # bool[num_blocks]
    learn_last: Any  # bool
    rates: Any  # float32 by the names of the parameters: learning rates at their highest


def phase_inputs(hypernetwork: Hypernetwork, recipe: InrRecipe, phase: Phase) -> PhaseInputs:
    last = recipe.learned == "last" and phase.stage == max(hypernetwork.stages)
    recipe = phase_recipe(recipe, phase.kind)
    rates = {
        "inr": recipe.learning_rate,
        "alpha": recipe.alpha_learning_rate,
        "learned": recipe.learned_learning_rate,
    }
    if phase.kind == "fit":
        rates = dict.fromkeys(rates, 0.0) | {"inr": recipe.fit_learning_rate}
    if hypernetwork.inr.depth_term:
        rates["depth"] = rates["inr"]
    return PhaseInputs(
        start=np.int32(phase.start),
        num_steps=np.int32(phase.stop - phase.start),
        warmup_steps=np.int32(phase.warmup_steps),
        active=np.arange(len(hypernetwork.names)) < phase.num_active,
        learn_last=np.bool_(last),
        rates={name: np.float32(rate) for name, rate in rates.items()},
    )


def learning_rate_scale(recipe: InrRecipe, step: jax.Array, phase: PhaseInputs) -> jax.Array:
    """Factor on all learning rates: linear warm-up, then constant or half a cosine to zero."""
    done = (step - phase.start).astype(jnp.float32)
    scale = jnp.minimum(1.0, (done + 1) / jnp.maximum(phase.warmup_steps, 1))
    if recipe.schedule == "cosine":
        remaining = jnp.maximum(phase.num_steps - phase.warmup_steps, 1)
        progress = jnp.clip((done - phase.warmup_steps) / remaining, 0.0, 1.0)
        scale = scale * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return scale


def at_rates(updates: Any, phase: PhaseInputs, scale: jax.Array) -> Params:
    """`updates` of a learning rate of 1 times the phase's rates and `scale`."""
    return {
        name: jax.tree.map(lambda u, rate=rate: scale * rate * u, updates[name])
        for name, rate in phase.rates.items()
    }


def update_mask(
    hypernetwork: Hypernetwork, recipe: InrRecipe, params: Params, phase: PhaseInputs
) -> Params:
    """1 where `phase` trains a parameter and 0 where it does not; broadcasts against `params`."""
    learned = {}
    for path in hyper.flat(params["learned"]):
        if path in hypernetwork.groups.frozen:
            learned[path] = jnp.float32(0)
        elif recipe.learned == "all":
            learned[path] = jnp.float32(1)
        elif recipe.learned == "last" and hypernetwork.is_last(path):
            learned[path] = phase.learn_last.astype(jnp.float32)
        else:
            learned[path] = jnp.float32(0)
    learned = hyper.nested(learned)
    mask = {
        "inr": hypernetwork.inr.update_mask(params["inr"], hypernetwork.stacks, phase.active),
        "alpha": phase.active.astype(jnp.float32),
        "learned": learned,
    }
    return {**mask, "depth": learned} if "depth" in params else mask


def depth_mask(hypernetwork: Hypernetwork, params: Params) -> Params:
    """1 where `DEPTH_KINDS` train a parameter: what only networks that skip blocks see."""
    zeros = {name: jax.tree.map(lambda _: jnp.float32(0), tree) for name, tree in params.items()}
    return zeros | {
        "inr": hypernetwork.inr.depth_mask(params["inr"], hypernetwork.stacks),
        "depth": jax.tree.map(lambda _: jnp.float32(1), params["depth"]),
    }


def sample_widths(
    key: jax.Array, hypernetwork: Hypernetwork, recipe: InrRecipe, num: int
) -> jax.Array:
    """int32[num, num_blocks] hidden widths at ratios drawn uniformly from the trained range.

    A share of `recipe.skip_blocks` of the rows has zeros, for skipped blocks. With
    `recipe.sandwich` the first row holds the smallest widths of the range, at full depth, and
    where blocks are skipped the second one the shallowest network, at full width.
    """
    full = jnp.array(hypernetwork.full_widths, jnp.float32)
    # One draw for all: a ratio for each block, and whether a network has one for each.
    draws = jax.random.uniform(key, (num, 1 + len(full)))
    choice, draws = draws[:, :1], draws[:, 1:]
    draws = jnp.where(choice < recipe.per_block_widths, draws, draws[:, :1])
    low, high = recipe.min_width_ratio, recipe.max_width_ratio
    ratios = low + (high - low) * draws
    widths = jnp.maximum(1, jnp.floor(ratios * full + 0.5)).astype(jnp.int32)
    if recipe.skip_blocks:
        skipped = _sample_skipped(jax.random.fold_in(key, 1), hypernetwork, recipe, num)
        widths = jnp.where(skipped, 0, widths)
    if recipe.sandwich:
        for row, fixed in enumerate(_sandwich(hypernetwork, recipe)[:num]):
            widths = widths.at[row].set(jnp.array(fixed))
    return widths


def sample_shallow_widths(
    key: jax.Array, hypernetwork: Hypernetwork, recipe: InrRecipe
) -> jax.Array:
    """int32[num_sizes, num_blocks]: the sizes of a step of `DEPTH_KINDS` (`phase_recipe`)."""
    free = dataclasses.replace(recipe, sandwich=False, skip_blocks=1.0)
    widths = sample_widths(key, hypernetwork, free, recipe.num_sizes)
    for row, fixed in enumerate(_shallow_sandwich(hypernetwork, recipe)):
        widths = widths.at[row].set(jnp.array(fixed))
    return widths


def step_widths(
    key: jax.Array, hypernetwork: Hypernetwork, recipe: InrRecipe, kind: str
) -> jax.Array:
    """int32[num_sizes, num_blocks]: the sizes of a step in a phase of a kind of `STEP_KINDS`.

    `recipe` is that of the phase (`phase_recipe`).
    """
    if kind in DEPTH_KINDS:
        return sample_shallow_widths(key, hypernetwork, recipe)
    full = jnp.array([hypernetwork.full_widths], jnp.int32)
    drawn = sample_widths(key, hypernetwork, recipe, recipe.num_random_sizes)
    return jnp.concatenate([full, drawn])


def _shallow_sandwich(hypernetwork: Hypernetwork, recipe: InrRecipe) -> list[tuple[int, ...]]:
    """The widths that a step of `DEPTH_KINDS` always has."""
    shallowest = shallowest_widths(hypernetwork, recipe)
    smallest = smallest_widths(hypernetwork, recipe)
    found = [shallowest, tuple(min(pair) for pair in zip(shallowest, smallest, strict=True))]
    return found[: recipe.num_sizes if recipe.sandwich else 1]


def _sandwich(hypernetwork: Hypernetwork, recipe: InrRecipe) -> list[tuple[int, ...]]:
    """The widths that a step with `recipe.sandwich` has in place of its first random ones."""
    found = [smallest_widths(hypernetwork, recipe)]
    if recipe.skip_blocks:
        found.append(shallowest_widths(hypernetwork, recipe))
    return found


def skippable_blocks(
    hypernetwork: Hypernetwork, recipe: InrRecipe
) -> Iterator[tuple[int, list[int], int]]:
    """(stage, positions of its elastic groups that can be skipped, how many training skips)."""
    lowest = hypernetwork.lowest
    for stage in range(1, max(hypernetwork.stages) + 1):
        members = [p for p, s in enumerate(hypernetwork.stages) if s == stage and not lowest[p]]
        if members:
            yield stage, members, math.floor(recipe.max_skipped * len(members) + 0.5)


def _sample_skipped(key, hypernetwork, recipe, num):
    """bool[num, num_blocks]: which blocks each network skips."""
    num_blocks = len(hypernetwork.names)
    # One draw for all: whether to skip, and how many in each stage. More are drawn than are used,
    # as they were for the runs in results/, which this way can be repeated.
    draws = jax.random.uniform(key, (num, 1 + NUM_STAGES + num_blocks))
    skips = draws[:, 0] < recipe.skip_blocks
    skipped = jnp.zeros((num, num_blocks), bool)
    for stage, members, most in skippable_blocks(hypernetwork, recipe):
        count = jnp.floor(draws[:, stage] * (most + 1))
        place = jnp.arange(len(members))[::-1]  # counted from the last one
        chosen = skips[:, None] & (place < count[:, None])
        skipped = skipped.at[:, jnp.array(members)].set(chosen)
    return skipped


def shallowest_widths(hypernetwork: Hypernetwork, recipe: InrRecipe) -> tuple[int, ...]:
    """Full widths without the last blocks of each stage, as many as `max_skipped` allows."""
    widths = list(hypernetwork.full_widths)
    for _, members, most in skippable_blocks(hypernetwork, recipe):
        for position in members[len(members) - most :]:
            widths[position] = 0
    return tuple(widths)


def smallest_widths(hypernetwork: Hypernetwork, recipe: InrRecipe) -> tuple[int, ...]:
    """Hidden widths of the generated blocks at the lower end of the trained range."""
    return tuple(hypernetwork.widths(recipe.min_width_ratio).tolist())


def mixed_tree(
    hypernetwork: Hypernetwork,
    params: Params,
    generated: Mapping[str, jax.Array],
    teacher: Mapping[str, jax.Array],
    active: jax.Array,
    widths: jax.Array,
) -> Any:
    """The network of a phase: generated tensors where `active`, the teacher's elsewhere.

    `generated` and `teacher` are tensors by path.
    """
    leaves = hyper.learned_at(hypernetwork, params, widths)
    for path, new in hyper.skip_init(hypernetwork, generated, params["alpha"]).items():
        leaves[path] = jnp.where(active[hypernetwork.owners[path]], new, teacher[path])
    return hyper.assemble(hypernetwork, leaves)


# (logits, labels, soft labels) to a loss and the terms to report.
Objective = Callable[[Any, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]


def recipe_objective(recipe: InrRecipe) -> Objective:
    """Cross-entropy with the labels, and distillation, weighed as `recipe` says."""

    def objective(logits, labels, targets):
        terms = {"ce": losses.cross_entropy(logits, labels)}
        loss = recipe.ce_weight * terms["ce"]
        if recipe.distillation_weight:
            terms["distillation"] = losses.distillation(
                logits, targets, temperature=recipe.temperature
            )
            loss += recipe.distillation_weight * terms["distillation"]
        terms["accuracy"] = losses.accuracy(logits, labels)
        return loss, terms

    return objective


def inr_update(
    hypernetwork: Hypernetwork,
    recipe: InrRecipe,
    preprocessing: Prepares,
    forward: Callable,
    *,
    num_classes: int,
    unroll: bool,
    objective: Objective | None = None,
    mesh: jax.sharding.Mesh | None = None,
    kind: str = "train",
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`update(state, step, key, images, indices, teacher, phase)`: one step over several sizes.

    The gradients at full width and at `num_random_sizes` random widths are averaged, or those at
    the sizes of the depth phase (`recipe.depth_epochs`). `indices` is int[images_per_step] of
    `phase_recipe(recipe, kind)`, `teacher` the full-size tree, `phase` a `PhaseInputs`.

    All networks of a step are generated in one batched call. The gradients of the losses with
    respect to their weights are summed over micro-batches, and are pulled back through the
    generation once.

    Args:
        hypernetwork: the family.
        recipe: of the training.
        preprocessing: of the images.
        forward: `forward(tree, x, widths)`, the logits of a network of the family; `widths` are
            those of the tree as ints, None where they are drawn. A network that is always the same
            may run at its own shapes.
        num_classes: length of the logits.
        unroll: write out the loops over sizes and micro-batches. XLA's CPU backend compiles
            convolutions inside loops to code that is up to 100 times slower, and the host drives
            the loops of a GPU; on a TPU loops save memory and compilation.
        objective: of one network on one batch, by default `recipe_objective`.
        mesh: see `data_mesh`. Each device takes an equal part of the images of every size through
            its own micro-batches, and their gradients are averaged once per step. Generation, which
            is cheap beside it, happens on every device.
        kind: of the phases it is for, one of `STEP_KINDS`.
    """
    shallow = kind in DEPTH_KINDS
    recipe = phase_recipe(recipe, kind)
    optimizer = inr_optimizer(recipe)
    objective = objective or recipe_objective(recipe)
    share = recipe.batch_size // (1 if mesh is None else mesh.size)  # images per size and device
    micro = min(recipe.micro_batch or share, share)

    def generate(params, widths, key):
        noise_key = key if recipe.noise else None
        return hyper.generate_tensors(hypernetwork, params["inr"], widths, key=noise_key)

    def penalties(generated, is_full, teacher, phase):
        """The terms that look at weights only."""
        weights = phase.active.astype(jnp.float32)
        active = {path: weights[owner] for path, owner in hypernetwork.owners.items()}
        return {
            "norm": losses.weight_norm(generated, active),
            "reconstruction": is_full * losses.reconstruction(generated, teacher, active),
        }

    # The widths of each size that are the same in every step, None where they are drawn.
    networks: list[tuple[int, ...] | None] = [None] * recipe.num_sizes
    if recipe.sandwich and recipe.mode == "at_once":
        fixed = _sandwich(hypernetwork, recipe)[: recipe.num_random_sizes]
        networks[1 : 1 + len(fixed)] = fixed
    if shallow:
        fixed = _shallow_sandwich(hypernetwork, recipe)
        networks = [*fixed, *[None] * (recipe.num_sizes - len(fixed))]

    def loop(function, values):
        """`function` of each entry of the leading axis of `values`, stacked."""
        if not unroll:
            return jax.lax.map(function, values)
        count = jax.tree.leaves(values)[0].shape[0]
        results = [function(jax.tree.map(lambda a, n=n: a[n], values)) for n in range(count)]
        return jax.tree.map(lambda *entries: jnp.stack(entries), *results)

    def network_loss(tree, x, y, targets, network):
        loss, terms = objective(forward(tree, x, network), y, targets)
        return loss, {"network_loss": loss, **terms}

    # Traced once for all that is written out; XLA inlines it.
    network_gradient = jax.jit(jax.grad(network_loss, has_aux=True), static_argnums=4)

    def local_gradients(trees, target, x, y):
        """Mean gradients of the networks' losses with respect to their weights, and the terms.

        Over the images of one device: x float[batches, share, ...], y [batches, share(, classes)].
        `target` is the network whose logits are the soft labels.
        """
        x, y = jax.tree.map(
            lambda a: a.reshape(a.shape[0], share // micro, micro, *a.shape[2:]), (x, y)
        )
        targets = jnp.zeros((*x.shape[:3], 0))
        if recipe.distillation_weight:
            logits = loop(lambda x: forward(target, x, None), x.reshape(-1, *x.shape[2:]))
            targets = logits.reshape(*x.shape[:2], *logits.shape[1:])

        def one_size(size, network):
            tree, batch = size
            if recipe.share_images:
                batch = jax.tree.map(lambda a: a[0], (x, y, targets))

            def one_batch(batch):
                return network_gradient(tree, *batch, network)

            return jax.tree.map(lambda a: jnp.mean(a, axis=0), loop(one_batch, batch))

        separate = None if recipe.share_images else (x, y, targets)
        if not unroll:
            return jax.lax.map(lambda size: one_size(size, None), (trees, separate))
        # Of what is written out, sizes that are always the same can run at their own shapes.
        results = []
        for n, network in enumerate(networks):
            size = jax.tree.map(lambda a, n=n: a[n], (trees, separate))
            results.append(one_size(size, network))
        return jax.tree.map(lambda *values: jnp.stack(values), *results)

    def gradients(trees, target, x, y):
        if mesh is None:
            return local_gradients(trees, target, x, y)

        def on_each_device(trees, target, x, y):
            # Varying over the devices, or JAX would add up the gradients of every micro-batch.
            trees, target = jax.lax.pcast((trees, target), DATA_AXIS, to="varying")
            return jax.lax.pmean(local_gradients(trees, target, x, y), DATA_AXIS)

        shares = jax.P(None, DATA_AXIS)
        return jax.shard_map(
            on_each_device,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(), shares, shares),
            out_specs=jax.P(),
        )(trees, target, x, y)

    def update(state, step, key, images, indices, teacher, phase):
        width_key, data_key, noise_key = jax.random.split(jax.random.fold_in(key, step), 3)
        full = jnp.array(hypernetwork.full_widths, jnp.int32)
        widths = step_widths(width_key, hypernetwork, recipe, kind)
        widths = jnp.where(phase.active, widths, full)
        tensors = hypernetwork.groups.leaves(teacher)
        keys = jax.random.split(noise_key, recipe.num_sizes)
        is_full = ((jnp.arange(recipe.num_sizes) == 0) & (not shallow)).astype(jnp.float32)

        def all_networks(params):
            generated = jax.vmap(generate, in_axes=(None, 0, 0))(params, widths, keys)
            trees = jax.vmap(
                lambda generated, widths: mixed_tree(
                    hypernetwork, params, generated, tensors, phase.active, widths
                )
            )(generated, widths)
            terms = jax.vmap(penalties, in_axes=(0, 0, None, None))(
                generated, is_full, tensors, phase
            )
            loss = (
                recipe.norm_weight * terms["norm"]
                + recipe.reconstruction_weight * terms["reconstruction"]
            )
            return (trees, jnp.sum(loss)), (terms, loss)

        (trees, _), pull_back, (terms, losses_of_weights) = jax.vjp(
            all_networks, state.params, has_aux=True
        )

        x, y = preprocessing.train(
            data_key, images.images[indices], images.labels[indices], num_classes
        )
        # [sizes, images, ...], or one batch that all sizes share.
        batches = 1 if recipe.share_images else recipe.num_sizes
        x, y = jax.tree.map(lambda a: a.reshape(batches, recipe.batch_size, *a.shape[1:]), (x, y))
        target = teacher
        if recipe.distill_from == "full" and not shallow:
            target = jax.tree.map(lambda a: a[0], trees)
        elif recipe.distill_from == "full":
            generated = generate(state.params, full, keys[0])
            target = mixed_tree(hypernetwork, state.params, generated, tensors, phase.active, full)
        tree_grads, found = gradients(trees, target, x, y)
        (grads,) = pull_back((tree_grads, jnp.ones(())))
        grads = jax.tree.map(lambda g: g / recipe.num_sizes, grads)

        terms = {**terms, **found}
        terms["loss"] = terms.pop("network_loss") + losses_of_weights
        metrics = {name: jnp.mean(values) for name, values in terms.items()}
        if "accuracy" in terms:
            metrics["shallow_accuracy" if shallow else "full_accuracy"] = terms["accuracy"][0]
        metrics["reconstruction"] = terms["reconstruction"][0]
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        scale = learning_rate_scale(recipe, step, phase)
        if shallow:
            mask = depth_mask(hypernetwork, state.params)
        else:
            mask = update_mask(hypernetwork, recipe, state.params, phase)
        updates = jax.tree.map(lambda u, m: m * u, updates, mask)
        params = optax.apply_updates(state.params, at_rates(updates, phase, scale))
        average = state.average
        if average is not None:
            # Of the steps so far until there are enough of them for the decay.
            done = (step - phase.start).astype(jnp.float32)
            decay = jnp.minimum(recipe.ema_decay, (1 + done) / (10 + done))
            average = optax.incremental_update(params, average, 1 - decay)
        return TrainState(params, opt_state, average), metrics

    return update


def without_extremes(recipe: InrRecipe) -> InrRecipe:
    """`recipe` with all sizes at random and no block skipped, as the fit phase draws them."""
    return dataclasses.replace(
        recipe, sandwich=False, skip_blocks=0.0, shallow_epochs=0.0, depth_epochs=0.0
    )


def fit_update(
    hypernetwork: Hypernetwork, recipe: InrRecipe
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`update(state, step, key, images, indices, teacher, phase)`: the INR learns the teacher.

    Minimises the relative reconstruction error at full width, or in turn there and at a random
    width, with coordinate noise where the recipe has it, so that the fit is as smooth as what
    follows. Images are not looked at.
    """
    optimizer = inr_optimizer(recipe)
    full = jnp.array(hypernetwork.full_widths, jnp.int32)

    def update(state, step, key, images, indices, teacher, phase):
        del images, indices
        width_key, noise_key = jax.random.split(jax.random.fold_in(key, step))
        widths, target = full, hypernetwork.groups.leaves(teacher)
        if recipe.fit_widths == "random":
            drawn = sample_widths(width_key, hypernetwork, without_extremes(recipe), 1)[0]
            widths = jnp.where(step % 2 == 0, full, drawn)
            target = hyper.resampled(hypernetwork, target, widths)

        def loss_fn(params):
            generated = hyper.generate_tensors(
                hypernetwork, params["inr"], widths, key=noise_key if recipe.noise else None
            )
            return losses.reconstruction(generated, target, relative=True)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # Always a cosine: there is nothing to keep exploring once the weights are met.
        done = (step - phase.start) / phase.num_steps
        scale = 0.5 * (1 + jnp.cos(jnp.pi * done))
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        params = optax.apply_updates(state.params, at_rates(updates, phase, scale))
        # What the next phase starts from is the fit itself, not an average over its steps.
        average = None if state.average is None else params
        return TrainState(params, opt_state, average), metrics

    return update


# --- the loop --------------------------------------------------------------------------------


class NonFiniteLossError(FloatingPointError):
    """Loss or gradient stopped being finite; `step` is the first step where it did.

    `where` says more of the place, see `diagnosis`.
    """

    def __init__(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        phase: str = "training",
        last_saved: int | None = None,
        where: str = "",
    ):
        self.step = step
        self.metrics = dict(metrics)
        bad = ", ".join(f"{name} = {value}" for name, value in metrics.items())
        kept = "" if last_saved is None else f"; the checkpoint of step {last_saved} is kept"
        super().__init__(
            f"Training needs a finite loss and gradient, got {bad} at step {step} ({phase})"
            f"{where and ', ' + where}{kept}; "
            "lower the learning rates and start in a new work directory."
        )


def default_steps_per_call() -> int:
    """Steps per jitted call: a chunk on accelerators, one on CPUs, where steps are long."""
    return 1 if jax.default_backend() == "cpu" else 50


def chunked(
    update: Callable,
    *,
    images_per_step: int,
    steps_per_call: int,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.stages.Wrapped:
    """`call(state, first, last, key, images, order, offset, *rest)` runs steps first..last - 1.

    One jitted function with donated state and no host synchronisation inside. `order` is the
    epoch's permutation and `offset` the position of step `first` in it. Returns the new state, the
    metrics of the last step, and the first step with a non-finite loss or gradient (-1 if none).
    With a `mesh`, all of these lie on each of its devices.
    """
    everywhere = None if mesh is None else jax.NamedSharding(mesh, jax.P())

    def one(state, step, position, key, images, order, rest):
        indices = jax.lax.dynamic_slice(order, (position,), (images_per_step,))
        state, metrics = update(state, step, key, images, indices, *rest)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        for leaf in jax.tree.leaves(state.params):
            finite &= jnp.all(jnp.isfinite(leaf))
        return state, metrics, finite

    if steps_per_call == 1:

        def call_one(state, first, last, key, images, order, offset, *rest):
            del last
            state, metrics, finite = one(state, first, offset, key, images, order, rest)
            return state, metrics, jnp.where(finite, -1, first)

        return jax.jit(call_one, donate_argnums=0, out_shardings=everywhere)

    def call(state, first, last, key, images, order, offset, *rest):
        shapes = jax.eval_shape(lambda s: one(s, first, offset, key, images, order, rest)[1], state)
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(step, carry):
            state, _, bad = carry
            position = offset + (step - first) * images_per_step
            new_state, new_metrics, finite = one(state, step, position, key, images, order, rest)
            bad = jnp.where((bad < 0) & ~finite, step, bad)
            return new_state, new_metrics, bad

        return jax.lax.fori_loop(first, last, body, (state, metrics, jnp.int32(-1)))

    return jax.jit(call, donate_argnums=0, out_shardings=everywhere)


def run_steps(
    call: Callable,
    state: TrainState,
    *,
    start: int,
    stop: int,
    key: jax.Array,
    images: Images,
    images_per_step: int,
    steps_per_call: int,
    every: Sequence[int],
    after: Callable[[int, TrainState, dict[str, float]], None],
    rest: tuple = (),
    mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
    """Runs steps `start`..`stop` - 1 of `call` (see `chunked`) and returns the state.

    `mesh` is that of `call`; the state lies on all of its devices, to begin with wherever it is.

    Calls end at epochs, at multiples of `steps_per_call` and of each entry of `every`, so that
    where a run was interrupted has no influence on where its calls begin. `after(step, state,
    metrics)` runs after each.

    Raises:
        NonFiniteLossError: naming the step; `after` has not seen the damaged state.
    """
    num_images = images.labels.shape[0]
    if images_per_step > num_images:
        raise ValueError(
            f"A step needs {images_per_step} images (batch size times sizes), but the training "
            f"split has {num_images}; lower batch_size."
        )
    per_epoch = num_images // images_per_step
    strides = [steps_per_call, per_epoch, *(n for n in every if n > 0)]
    order_key, step_key = jax.random.split(key)
    epoch_order = jax.jit(preprocessing.epoch_order, static_argnums=2)
    epoch, order = -1, None
    step = start
    state, step_key, images, rest = replicate((state, step_key, images, rest), mesh)
    while step < stop:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = replicate(epoch_order(order_key, epoch, num_images), mesh)
        last = min(stop, *(step - step % n + n for n in strides))
        if steps_per_call == 1:
            last = step + 1
        offset = (step % per_epoch) * images_per_step
        state, metrics, bad = call(
            state,
            np.int32(step),
            np.int32(last),
            step_key,
            images,
            order,
            np.int32(offset),
            *rest,
        )
        metrics, bad = jax.device_get((metrics, bad))  # the only time that the host waits
        values = {name: float(value) for name, value in metrics.items()}
        if int(bad) >= 0:
            raise NonFiniteLossError(
                int(bad), {n: v for n, v in values.items() if n in ("loss", "grad_norm")}
            )
        step = last
        after(step, state, values)
    return state
