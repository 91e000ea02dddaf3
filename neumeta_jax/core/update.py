"""A step of INR training: draw networks, the loss of one, the mean gradient, apply.

Everything random is a pure function of a key and the step, so that a run that was interrupted ends
with the same bits as one that was not.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from neumeta_jax.core import hypernetwork as hyper, losses
from neumeta_jax.core.devices import DATA_AXIS
from neumeta_jax.core.hypernetwork import Hypernetwork
from neumeta_jax.core.inr.base import Params
from neumeta_jax.core.losses import Loss
from neumeta_jax.core.optimizer import inr_optimizer
from neumeta_jax.core.recipe import InrRecipe, Phase, Program
from neumeta_jax.core.sizes import Sizes

Metrics = dict[str, jax.Array]
# (tree, x, widths) to logits; `widths` are those of the tree as ints, None where they are drawn. A
# network that is always the same may run at its own shapes.
Forward = Callable[[Any, jax.Array, Any], Any]
# (logits, labels, soft labels) to a loss and the terms to report.
Objective = Callable[[Any, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]
# (key, inputs, labels) of a batch to what the network and the objective take.
Prepare = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


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


class PhaseInputs(NamedTuple):
    """What a step needs to know of its phase, as arrays, so that all phases share a compilation.

    `rates` are the learning rates at their highest, a tree that broadcasts against the parameters,
    0 where nothing is trained; `decay` is that of the average.
    """

    start: Any  # int32
    num_steps: Any  # int32
    warmup_steps: Any  # int32
    cosine: Any  # bool
    active: Any  # bool[names]
    rates: Any  # float32
    decay: Any  # float32


def start_phase(
    params: Params, hypernetwork: Hypernetwork, recipe: InrRecipe, phase: Phase
) -> TrainState:
    """The state at the first step of `phase`: new blocks initialised, a fresh optimiser.

    A new block's INR starts from the block before it ("INR initialisation"), where there is one in
    the same stage and the recipe says so.
    """
    if phase.new_blocks:
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
    return fresh_state(params, recipe)


@functools.partial(jax.jit, static_argnums=1)  # else it is a hundred programs of one line each
def fresh_state(params: Params, recipe: InrRecipe) -> TrainState:
    """A state in buffers of its own, because the step donates them and trees may share leaves."""
    params = jax.tree.map(jnp.array, params)
    average = jax.tree.map(jnp.array, params) if recipe.ema_decay else None
    return TrainState(params, inr_optimizer(recipe).init(params), average)


def phase_inputs(
    params: Mapping, hypernetwork: Hypernetwork, recipe: InrRecipe, phase: Phase
) -> PhaseInputs:
    """`phase` for its steps; of `params` only the shapes count."""
    active = np.arange(len(hypernetwork.names)) < phase.num_active
    return PhaseInputs(
        start=np.int32(phase.start),
        num_steps=np.int32(phase.num_steps),
        warmup_steps=np.int32(phase.warmup_steps),
        cosine=np.bool_(phase.schedule == "cosine"),
        active=active,
        rates=_rate_tree(params, hypernetwork, phase.rates, active),
        # What follows the fit starts from the fit itself, not from an average over its steps.
        decay=np.float32(recipe.ema_decay if phase.loss else 0.0),
    )


def _rate_tree(params, hypernetwork, rates, active):
    """The tree of `PhaseInputs` from the `rates` of a `Phase`."""
    inr, stacks, alone = hypernetwork.inr, hypernetwork.stacks, "depth" in rates

    def learns(path):
        chosen = "learned" in rates or ("last" in rates and hypernetwork.is_last(path))
        return chosen and path not in hypernetwork.groups.frozen

    def at_rate(mask, rate):
        return jax.tree.map(lambda m: np.float32(rate) * np.float32(m), mask)

    learned = hyper.nested({path: learns(path) for path in hyper.flat(params["learned"])})
    mask = inr.update_mask(params["inr"], stacks, active)
    if alone:
        mask = inr.depth_mask(params["inr"], stacks)
    rate = rates["depth" if alone else "inr"]
    tree = {
        "inr": at_rate(mask, rate),
        "alpha": at_rate(active, rates.get("alpha", 0.0)),
        "learned": at_rate(learned, rates.get("learned", rates.get("last", 0.0))),
    }
    if "width" in params:
        tree["width"] = dict.fromkeys(params["width"], tree["learned"])
    if "depth" in params:
        tree["depth"] = at_rate(jax.tree.map(lambda m: m or alone, learned), rate)
    return tree


# --- a step ----------------------------------------------------------------------------------


class Draws(NamedTuple):
    """The networks of a step, and keys of what else is random in it.

    Without coordinate noise `noise` is None.
    """

    widths: jax.Array  # int32[networks, names]
    is_full: jax.Array  # float32[networks], 1 of the full-size network
    noise: jax.Array | None  # keys [networks]
    data: jax.Array


def draw(sizes: Sizes, key: jax.Array, step: Any, active: Any, *, noise: bool) -> Draws:
    """Of a step on images; blocks that are not `active`, bool[names], are full."""
    width_key, data, noise_key = jax.random.split(jax.random.fold_in(key, step), 3)
    widths = jnp.where(active, sizes.draw(width_key), jnp.array(sizes.full, jnp.int32))
    is_full = (jnp.arange(len(sizes)) == 0) & sizes.with_full
    keys = jax.random.split(noise_key, len(sizes)) if noise else None
    return Draws(widths, is_full.astype(jnp.float32), keys, data)


def draw_fit(sizes: Sizes, key: jax.Array, step: Any, *, noise: bool) -> Draws:
    """Of a step of the fit: the full network, in turn with a random one where there is one."""
    width_key, data = jax.random.split(jax.random.fold_in(key, step))
    full = jnp.array([sizes.full], jnp.int32)
    widths = jnp.where(step % 2 == 0, full, sizes.draw(width_key)) if sizes.num_random else full
    return Draws(widths, jnp.ones(1), data[None] if noise else None, data)


def draw_network(
    hypernetwork: Hypernetwork,
    params: Params,
    teacher: Mapping[str, jax.Array],
    active: Any,
    widths: jax.Array,
    key: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """The network of a phase: generated where `active`, the teacher elsewhere.

    Args:
        teacher: tensors by path.
        active: bool[names].
        widths: int32[names], full where not active.
        key: draws coordinate noise.

    Returns:
        The tree, and the generated tensors by path, without SkipInit.
    """
    generated = hyper.generate_tensors(hypernetwork, params["inr"], widths, key=key)
    leaves = hyper.learned_at(hypernetwork, params, widths)
    for path, new in hyper.skip_init(hypernetwork, generated, params["alpha"]).items():
        leaves[path] = jnp.where(active[hypernetwork.owners[path]], new, teacher[path])
    return hyper.assemble(hypernetwork, leaves), generated


def draw_networks(
    params: Params,
    hypernetwork: Hypernetwork,
    loss: Loss,
    teacher: Mapping[str, jax.Array],
    active: jax.Array,
    drawn: Draws,
) -> tuple[tuple[Any, jax.Array], tuple[Metrics, jax.Array]]:
    """All networks of a step, in one batched call, and that of their loss which sees no images.

    Returns:
        (trees with a leading axis of networks, the sum of their losses) to differentiate, and
        (terms to report, losses), float32[networks].
    """
    weights = active.astype(jnp.float32)
    counted = {path: weights[owner] for path, owner in hypernetwork.owners.items()}

    def one(widths, is_full, key):
        tree, generated = draw_network(hypernetwork, params, teacher, active, widths, key)
        return tree, *loss.of_weights(generated, teacher, counted, is_full)

    trees, values, terms = jax.vmap(one)(drawn.widths, drawn.is_full, drawn.noise)
    return (trees, jnp.sum(values)), (terms, values)


@dataclasses.dataclass(frozen=True)
class Batching:
    """How a step goes through its networks and images.

    Attributes:
        micro_batch: images per forward and backward pass and device; 0 takes all at once.
        unroll: write out the loops over networks and micro-batches. XLA's CPU backend compiles
            convolutions inside loops to code that is up to 100 times slower, and the host drives
            the loops of a GPU; on a TPU loops save memory and compilation.
        mesh: see `devices.data_mesh`. Each device takes an equal part of the images of every
            network through its own micro-batches, and their gradients are averaged once per step.
            Generation, which is cheap beside it, happens on every device.
    """

    micro_batch: int = 0
    unroll: bool = True
    mesh: jax.sharding.Mesh | None = None

    def loop(self, function: Callable, values: Any, shapes: Sequence[Any] | None = None) -> Any:
        """`function(value, shape)` of each entry of the leading axis of `values`, stacked.

        Only where loops are written out can shapes differ; else each is None.
        """
        if not self.unroll:
            return jax.lax.map(lambda value: function(value, None), values)
        count = jax.tree.leaves(values)[0].shape[0]
        results = [
            function(jax.tree.map(lambda a, n=n: a[n], values), shape)
            for n, shape in enumerate(shapes or [None] * count)
        ]
        return jax.tree.map(lambda *entries: jnp.stack(entries), *results)


def first(tree: Any) -> Any:
    """The first entry of each leading axis; None of None."""
    return jax.tree.map(lambda a: a[0], tree)


def network_loss(
    forward: Forward, objective: Objective, tree: Any, batch: tuple[Any, Any, Any], widths: Any
) -> tuple[jax.Array, Metrics]:
    """The loss of one network on a batch (x, labels, soft labels), and the terms to report."""
    x, y, soft = batch
    loss, terms = objective(forward(tree, x, widths), y, soft)
    return loss, {"network_loss": loss, **terms}


def mean_gradient(
    loss_fn: Callable,
    soft_labels: Callable,
    trees: Any,
    target: Any,
    batch: tuple[jax.Array, jax.Array],
    shapes: Sequence[Any],
    batching: Batching,
) -> tuple[Any, Metrics]:
    """Gradients of the networks' losses with respect to their weights, mean over all images.

    Args:
        loss_fn: `network_loss` of (tree, (x, labels, soft labels), widths).
        soft_labels: of (target, x).
        trees: the networks, with a leading axis.
        target: the network whose logits are the soft labels; None where there are none.
        batch: x [networks, images, ...] and labels [networks, images, ...], or [1, images, ...]
            that all networks share.
        shapes: of each network, see `Sizes.shapes`.
        batching: how the images are gone through.

    Returns:
        A tree like `trees`, and the terms to report, float32[networks].
    """
    # Traced once for all that is written out; XLA inlines it.
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True), static_argnums=2)

    def on_one_device(trees, target, batch):
        share = batch[0].shape[1]
        micro = min(batching.micro_batch or share, share)
        x, y = jax.tree.map(
            lambda a: a.reshape(a.shape[0], share // micro, micro, *a.shape[2:]), batch
        )
        soft = jnp.zeros((*x.shape[:3], 0))
        if target is not None:
            each = x.reshape(-1, *x.shape[2:])
            logits = batching.loop(lambda x, _: soft_labels(target, x), each)
            soft = logits.reshape(*x.shape[:2], *logits.shape[1:])
        batches = x, y, soft
        shared = x.shape[0] == 1

        def of_network(value, shape):
            tree, own = value
            own = first(batches) if shared else own
            found = batching.loop(lambda micro_batch, _: gradient(tree, micro_batch, shape), own)
            return jax.tree.map(lambda a: jnp.mean(a, axis=0), found)

        return batching.loop(of_network, (trees, None if shared else batches), shapes)

    if batching.mesh is None:
        return on_one_device(trees, target, batch)

    def on_each_device(trees, target, batch):
        # Varying over the devices, or JAX would add up the gradients of every micro-batch.
        trees, target = jax.lax.pcast((trees, target), DATA_AXIS, to="varying")
        return jax.lax.pmean(on_one_device(trees, target, batch), DATA_AXIS)

    return jax.shard_map(
        on_each_device,
        mesh=batching.mesh,
        in_specs=(jax.P(), jax.P(), jax.P(None, DATA_AXIS)),
        out_specs=jax.P(),
    )(trees, target, batch)


def rate_scale(step: Any, phase: PhaseInputs) -> jax.Array:
    """Factor on all learning rates: linear warm-up, then constant or half a cosine to zero."""
    done = (step - phase.start).astype(jnp.float32)
    scale = jnp.minimum(1.0, (done + 1) / jnp.maximum(phase.warmup_steps, 1))
    remaining = jnp.maximum(phase.num_steps - phase.warmup_steps, 1)
    progress = jnp.clip((done - phase.warmup_steps) / remaining, 0.0, 1.0)
    return scale * jnp.where(phase.cosine, 0.5 * (1 + jnp.cos(jnp.pi * progress)), 1.0)


def apply(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    step: jax.Array,
    phase: PhaseInputs,
) -> TrainState:
    """The state after a step of `optimizer`, at a learning rate of 1, times the phase's rates."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    scale = rate_scale(step, phase)
    updates = jax.tree.map(lambda update, rate: scale * rate * update, updates, phase.rates)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        # Of the steps so far until there are enough of them for the decay.
        done = (step - phase.start).astype(jnp.float32)
        decay = jnp.minimum(phase.decay, (1 + done) / (10 + done))
        average = optax.incremental_update(params, average, 1 - decay)
    return TrainState(params, opt_state, average)


def inr_update(
    hypernetwork: Hypernetwork,
    recipe: InrRecipe,
    program: Program,
    prepare: Prepare,
    forward: Forward,
    *,
    unroll: bool,
    mesh: jax.sharding.Mesh | None = None,
    objective: Objective | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`update(state, step, key, images, indices, teacher, inputs)`: one step over several networks.

    Of all phases with this `program`; `images` is (inputs, labels), `indices` int[images_per_step]
    into them, `teacher` the full-size tree (of a fit the parameters of `start.fit_target`) and
    `inputs` the `PhaseInputs`.

    All networks of a step are generated in one batched call. The gradients of the losses with
    respect to their weights are pulled back through the generation once.

    Args:
        unroll, mesh: see `Batching`.
        objective: of one network on one batch, in place of the recipe's cross-entropy and
            distillation.
    """
    sizes, loss = program
    optimizer, num = inr_optimizer(recipe), len(sizes)
    if loss is None:
        return _fit_update(hypernetwork, recipe, sizes)
    batching = Batching(recipe.micro_batch, unroll, mesh)
    loss_fn = functools.partial(network_loss, forward, objective or loss.of_logits)

    def update(state, step, key, images, indices, teacher, inputs):
        drawn = draw(sizes, key, step, inputs.active, noise=recipe.noise)
        given = hypernetwork.groups.leaves(teacher), inputs.active

        (trees, _), pull_back, (terms, values) = jax.vjp(
            lambda params: draw_networks(params, hypernetwork, loss, *given, drawn),
            state.params,
            has_aux=True,
        )

        x, y = prepare(drawn.data, *(array[indices] for array in images))
        batches = 1 if recipe.share_images else num
        batch = jax.tree.map(lambda a: a.reshape(batches, recipe.batch_size, *a.shape[1:]), (x, y))
        target = teacher if loss.distillation else None
        if loss.distillation and loss.distill_from == "full":
            target = first(trees)
            if not sizes.with_full:
                full = jnp.array(sizes.full, jnp.int32)
                network = draw_network(hypernetwork, state.params, *given, full, first(drawn.noise))
                target = network[0]
        tree_grads, found = mean_gradient(
            loss_fn, lambda t, x: forward(t, x, None), trees, target, batch, sizes.shapes, batching
        )
        (grads,) = pull_back((tree_grads, jnp.ones(())))
        grads = jax.tree.map(lambda g: g / num, grads)

        terms = {**terms, **found}
        terms["loss"] = terms.pop("network_loss") + values
        metrics = {name: jnp.mean(values) for name, values in terms.items()}
        if "accuracy" in terms:
            metrics[sizes.metric] = terms["accuracy"][0]
        metrics["reconstruction"] = terms["reconstruction"][0]
        metrics["grad_norm"] = optax.tree.norm(grads)
        return apply(optimizer, state, grads, step, inputs), metrics

    return update


def _fit_update(hypernetwork, recipe, sizes):
    """`inr_update` of a phase without a loss on images: the INR learns the teacher.

    Minimises the relative reconstruction error, with coordinate noise where the recipe has it, so
    that the fit is as smooth as what follows.
    """
    optimizer, closed = inr_optimizer(recipe), dataclasses.replace(hypernetwork, inr=recipe.fit_inr)

    def update(state, step, key, images, indices, teacher, inputs):
        del images, indices
        drawn = draw_fit(sizes, key, step, noise=recipe.noise)
        widths = drawn.widths[0]
        target = hyper.generate_tensors(closed, teacher, widths)

        def loss_fn(params):
            noise = first(drawn.noise)
            generated = hyper.generate_tensors(hypernetwork, params["inr"], widths, key=noise)
            return losses.reconstruction(generated, target, relative=True)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return apply(optimizer, state, grads, step, inputs), metrics

    return update
