"""Steps of an update, compiled in chunks and run over epochs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core.devices import replicate
from neumeta_jax.core.update import TrainState
from neumeta_jax.data.preprocessing import epoch_order
from neumeta_jax.errors import check


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
        self.step, self.metrics = step, dict(metrics)
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


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps of `update(state, step, key, images, indices, *rest)`, compiled for several at a time.

    Attributes:
        update: one step, returns (state, metrics); `indices` are int[images_per_step].
        images_per_step: that it takes from the epoch.
        steps_per_call: how many steps a call of the compiled program may take.
        mesh: on each of whose devices everything lies, see `devices.data_mesh`.
    """

    update: Callable
    images_per_step: int
    steps_per_call: int = dataclasses.field(default_factory=default_steps_per_call)
    mesh: jax.sharding.Mesh | None = None

    @functools.cached_property
    def call(self) -> jax.stages.Wrapped:
        """`call(state, first, last, key, images, order, offset, *rest)`: steps first..last - 1.

        One jitted function with donated state and no host synchronisation inside. `order` is the
        epoch's permutation and `offset` the position of step `first` in it. Returns the new state,
        the metrics of the last step, and the first step with a non-finite loss or gradient (-1 if
        none).
        """

        def one(state, step, position, key, images, order, rest):
            indices = jax.lax.dynamic_slice(order, (position,), (self.images_per_step,))
            state, metrics = self.update(state, step, key, images, indices, *rest)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            for leaf in jax.tree.leaves(state.params):
                finite &= jnp.all(jnp.isfinite(leaf))
            return state, metrics, finite

        def call_one(state, first, last, key, images, order, offset, *rest):
            del last
            state, metrics, finite = one(state, first, offset, key, images, order, rest)
            return state, metrics, jnp.where(finite, -1, first)

        def call_many(state, first, last, key, images, order, offset, *rest):
            shapes = jax.eval_shape(
                lambda s: one(s, first, offset, key, images, order, rest)[1], state
            )
            metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def body(step, carry):
                state, _, bad = carry
                position = offset + (step - first) * self.images_per_step
                state, metrics, finite = one(state, step, position, key, images, order, rest)
                return state, metrics, jnp.where((bad < 0) & ~finite, step, bad)

            return jax.lax.fori_loop(first, last, body, (state, metrics, jnp.int32(-1)))

        return jax.jit(
            call_one if self.steps_per_call == 1 else call_many,
            donate_argnums=0,
            out_shardings=None if self.mesh is None else jax.NamedSharding(self.mesh, jax.P()),
        )

    def run(
        self,
        state: TrainState,
        steps: range,
        *,
        key: jax.Array,
        images: Any,
        rest: tuple = (),
        every: Sequence[int] = (),
        after: Callable[[int, TrainState, dict[str, float]], None] = lambda *_: None,
    ) -> TrainState:
        """Runs `steps` on `images`, (inputs, labels), and returns the state.

        Calls end at epochs, at multiples of `steps_per_call` and of each entry of `every`, so that
        where a run was interrupted has no influence on where its calls begin. `after(step, state,
        metrics)` runs after each.

        Raises:
            UsageError: if there are too few images for a step.
            NonFiniteLossError: naming the step; `after` has not seen the damaged state.
        """
        num_images = len(images[1])
        check(
            self.images_per_step <= num_images,
            f"A step needs {self.images_per_step} images (batch size times sizes), but the "
            f"training split has {num_images}; lower batch_size.",
        )
        per_epoch = num_images // self.images_per_step
        strides = [self.steps_per_call, per_epoch, *(n for n in every if n > 0)]
        order_key, step_key = jax.random.split(key)
        order_of = jax.jit(epoch_order, static_argnums=2)
        epoch, order = -1, None
        step, stop = steps.start, steps.stop
        state, step_key, images, rest = replicate((state, step_key, images, rest), self.mesh)
        while step < stop:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = replicate(order_of(order_key, epoch, num_images), self.mesh)
            last = min(stop, *(step - step % n + n for n in strides))
            offset = np.int32((step % per_epoch) * self.images_per_step)
            place = np.int32(step), np.int32(last)
            state, metrics, bad = self.call(state, *place, step_key, images, order, offset, *rest)
            metrics, bad = jax.device_get((metrics, bad))  # the only time that the host waits
            values = {name: float(value) for name, value in metrics.items()}
            if int(bad) >= 0:
                found = {name: values[name] for name in ("loss", "grad_norm")}
                raise NonFiniteLossError(int(bad), found)
            step = last
            after(step, state, values)
        return state
