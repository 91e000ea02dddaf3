"""Training of the full-size network, whose folded weights the INR starts from."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from neumeta_jax.core import losses
from neumeta_jax.core.devices import DATA_AXIS
from neumeta_jax.core.update import Metrics, TrainState
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.errors import check


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

    def __post_init__(self):
        check(
            self.epochs > 0 and self.batch_size >= 1 and self.learning_rate > 0,
            "A teacher needs epochs > 0, batch_size >= 1 and learning_rate > 0, got "
            f"{self.epochs=}, {self.batch_size=}, {self.learning_rate=}.",
        )
        check(
            self.optimizer in ("sgd", "adamw"),
            f"optimizer must be sgd or adamw, got {self.optimizer!r}.",
        )


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

    On a `mesh` (see `devices.data_mesh`) the compiler shares out the batch. Batch norm sees all of
    it, so that the statistics are those of one device.
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
