"""Training of a family of any network on arrays: what train.py does, as one function."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.hypernetwork import Hypernetwork
from neumeta_jax.data.preprocessing import Images
from neumeta_jax.runs import training
from neumeta_jax.runs.training import InrRecipe

# What has proved itself on ResNets (results/): all groups at once, soft labels, three sizes a step.
RECIPE = InrRecipe(
    mode="at_once",
    epochs=20.0,
    warmup_epochs=1.0,
    warmup_phases="all",
    block_init="teacher",
    alpha_init=1.0,
    batch_size=64,
    share_images=True,
    num_random_sizes=2,
    min_width_ratio=0.25,
    sandwich=True,
    per_block_widths=0.5,
    ce_weight=1.0,
    norm_weight=0.0,
    reconstruction_weight=0.0,
    distillation_weight=4.0,
    temperature=2.0,
    optimizer="muon",
    learning_rate=1e-3,
    alpha_learning_rate=1e-3,
    learned_learning_rate=5e-4,
    learned="all",
    schedule="cosine",
)


@dataclasses.dataclass(frozen=True)
class _AsGiven:
    """In place of `Preprocessing`: inputs as they are, or as `augment` changes them."""

    augment: Callable | None

    def train(self, key, images, labels, num_classes):
        del num_classes
        return (images if self.augment is None else self.augment(key, images)), labels


def fit(
    hypernetwork: Hypernetwork,
    apply: Callable,
    params: Mapping,
    x: Any,
    labels: Any,
    recipe: InrRecipe = RECIPE,
    *,
    key: jax.Array | None = None,
    family: elastic.Family | None = None,
    augment: Callable | None = None,
    objective: training.Objective | None = None,
    after: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Trains the INR so that one set of parameters serves every width.

    A step takes the full network, the smallest and random ones on the same batch; all learn the
    labels and, softly, the logits of the network that `params` start at.

    Args:
        hypernetwork: the family.
        apply: the user's function of (tree, x) to logits, in inference mode.
        params: as `hypernetwork.init` made them, or trained ones to go on with.
        x: inputs, float[n, ...] or int[n, ...], as `apply` takes them.
        labels: int[n], float[n, classes], or whatever `objective` takes.
        recipe: of the training; `dataclasses.replace(fitting.RECIPE, epochs=...)` changes it.
        key: PRNG key, default 0.
        family: of `apply`; with it the smallest network runs at its own shapes, which saves time.
        augment: `augment(key, x)` of a batch.
        objective: `objective(logits, labels, soft)` to (loss, terms to report) of one network, in
            place of cross-entropy and distillation; `soft` are the logits of the full network.
        after: called with (step, metrics) after each epoch.

    Returns:
        The trained parameters, of the structure of `params`.

    Raises:
        ValueError: if there are too few inputs for a step.
        training.NonFiniteLossError: naming the step.
    """
    labels, x = jnp.asarray(labels), jnp.asarray(x)
    if len(x) != len(labels) or len(x) < recipe.images_per_step:
        raise ValueError(
            f"fit needs as many labels as inputs and at least {recipe.images_per_step} for a step "
            f"of this recipe, got {len(x)} inputs and {len(labels)} labels."
        )

    def forward(tree, x, widths):
        if widths is None or family is None:
            return apply(tree, x)
        at = hypernetwork.by_name(widths)
        return elastic.apply_at(family, elastic.slice_params(family.groups, tree, at), x, at)

    key = jax.random.key(0) if key is None else key
    full = np.array(hypernetwork.full_widths, np.int32)
    teacher = jax.jit(lambda params: hyper.generate(hypernetwork, params, full))(params)
    phases = training.phases(hypernetwork, recipe, num_images=len(x))
    chunk = training.default_steps_per_call()
    per_epoch = len(x) // recipe.images_per_step
    for number, phase in enumerate(phases):
        at_phase = training.phase_recipe(recipe, phase.kind)
        if phase.kind == "fit":
            update = training.fit_update(hypernetwork, recipe)
        else:
            update = training.inr_update(
                hypernetwork,
                recipe,
                _AsGiven(augment),
                forward,
                num_classes=0,
                unroll=jax.default_backend() != "tpu",
                objective=objective,
                kind=phase.kind,
            )
        call = training.chunked(
            update, images_per_step=at_phase.images_per_step, steps_per_call=chunk
        )

        def report(step, state, metrics):
            if after is not None and (step % per_epoch == 0 or step == phases[-1].stop):
                after(step, metrics)

        state = training.run_steps(
            call,
            training.start_phase(dict(params), hypernetwork, recipe, phase),
            start=phase.start,
            stop=phase.stop,
            key=jax.random.fold_in(key, number),
            images=Images(x, labels),
            images_per_step=at_phase.images_per_step,
            steps_per_call=chunk,
            every=(),
            after=report,
            rest=(teacher, training.phase_inputs(hypernetwork, recipe, phase)),
        )
        params = state.result
    return dict(params)
