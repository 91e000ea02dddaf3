"""Training of a family of any network on arrays: what train.py does, as one function."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper, start
from neumeta_jax.core.hypernetwork import Hypernetwork
from neumeta_jax.core.recipe import InrRecipe
from neumeta_jax.core.update import Objective, inr_update, phase_inputs, start_phase
from neumeta_jax.errors import check
from neumeta_jax.runs.loop import Steps

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


class Hooks(TypedDict, total=False):
    """What a fit does beside its recipe.

    Attributes:
        augment: `augment(key, x)` of a batch of inputs.
        objective: `objective(logits, labels, soft)` to (loss, terms to report) of one network, in
            place of cross-entropy and distillation; `soft` are the logits of the full network.
        after: called with (step, metrics) after each epoch.
        teacher: the tree of the full network, whose logits are the soft labels and whose weights a
            fit phase aims at; default what `params` generate. An INR kind without a closed form
            does not start there and needs it.
    """

    augment: Callable[[jax.Array, jax.Array], jax.Array]
    objective: Objective
    after: Callable[[int, dict[str, float]], None]
    teacher: Any


def fit(
    hypernetwork: Hypernetwork,
    apply: Callable | elastic.Family,
    params: Mapping,
    x: Any,
    labels: Any,
    recipe: InrRecipe = RECIPE,
    key: jax.Array | None = None,
    **hooks: Unpack[Hooks],
) -> dict[str, Any]:
    """Trains the INR so that one set of parameters serves every width.

    All networks of a step learn the labels and, softly, the logits of the full one.

    Args:
        hypernetwork: the family.
        apply: the user's function of (tree, x) to logits, in inference mode; or its `Family`, with
            which the smallest network runs at its own shapes, which saves time.
        params: as `hypernetwork.init` made them, or trained ones to go on with.
        x: inputs, float[n, ...] or int[n, ...], as the network takes them.
        labels: int[n], float[n, classes], or whatever the objective takes.
        recipe: of the training; `dataclasses.replace(fitting.RECIPE, epochs=...)` changes it.
        key: PRNG key, default that of 0.
        hooks: augment, objective, after and teacher, see `Hooks`.

    Returns:
        The trained parameters, of the structure of `params`.

    Raises:
        UsageError: if there are too few inputs for a step.
        loop.NonFiniteLossError: naming the step.
    """
    labels, x = jnp.asarray(labels), jnp.asarray(x)
    check(
        len(x) == len(labels) and len(x) >= recipe.images_per_step,
        f"fit needs as many labels as inputs and at least {recipe.images_per_step} for a step "
        f"of this recipe, got {len(x)} inputs and {len(labels)} labels.",
    )
    augment, after = hooks.get("augment"), hooks.get("after")

    def prepare(key, x, labels):
        return (x if augment is None else augment(key, x)), labels

    key = jax.random.key(0) if key is None else key
    full = np.array(hypernetwork.full_widths, np.int32)
    teacher = hooks.get("teacher")
    if teacher is None:
        teacher = hyper.generate(hypernetwork, params, full)
    forward = _forward(hypernetwork, apply)
    options = {
        "unroll": jax.default_backend() != "tpu",
        "objective": hooks.get("objective"),
    }
    programs: dict[Any, Steps] = {}
    phases = recipe.phases(hypernetwork, num_images=len(x))
    for number, phase in enumerate(phases):
        program = phase.program
        if program not in programs:
            update = inr_update(hypernetwork, recipe, program, prepare, forward, **options)
            programs[program] = Steps(update, phase.images_per_step)
        per_epoch = len(x) // phase.images_per_step

        def report(step, state, metrics, per_epoch=per_epoch):
            if after is not None and (step % per_epoch == 0 or step == phases[-1].stop):
                after(step, metrics)

        state = programs[program].run(
            start_phase(dict(params), hypernetwork, recipe, phase),
            range(phase.start, phase.stop),
            key=jax.random.fold_in(key, number),
            images=(x, labels),
            rest=(
                teacher if phase.loss else _fit_target(hypernetwork, recipe, apply, teacher, x),
                phase_inputs(params, hypernetwork, recipe, phase),
            ),
            after=report,
        )
        params = state.result
    return dict(params)


def _fit_target(hypernetwork, recipe, apply, teacher, x):
    """`start.fit_target` of the first inputs."""
    inr, x = recipe.fit_inr, x[:2000]
    family = apply if isinstance(apply, elastic.Family) else None
    moments = None
    if family and inr.needs_moments:
        measure = functools.partial(elastic.moments, family, names=hypernetwork.names)
        moments = jax.jit(measure)(teacher, x)
    return start.fit_target(hypernetwork, inr, family, teacher, x, moments)


def _forward(hypernetwork, apply):
    """`update.Forward` of a function of (tree, x), or of a family at its own shapes."""
    if not isinstance(apply, elastic.Family):
        return lambda tree, x, widths: apply(tree, x)

    def forward(tree, x, widths):
        at = hypernetwork.by_name(hypernetwork.full_widths if widths is None else widths)
        return elastic.apply_at(apply, elastic.slice_params(apply.groups, tree, at), x, at)

    return forward
