"""What is wrong with a network: where it stopped being finite, and which of its parts do nothing.

Steps themselves only notice that a loss is not finite, which costs nothing. The functions that say
where, which parameter at which widths, are given the state before that step, which a run recomputes
from its last checkpoint, and look at the step's networks one by one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper, losses, update
from neumeta_jax.core.recipe import InrRecipe, Phase
from neumeta_jax.data import preprocessing
from neumeta_jax.data.preprocessing import Images, Preprocessing
from neumeta_jax.networks.families import Family


class Step(NamedTuple):
    """What a step of `Steps.run` saw: its number, its key, int[images] indices."""

    number: int
    key: jax.Array
    indices: jax.Array


def step_of(number: int, key: jax.Array, *, num_images: int, images_per_step: int) -> Step:
    """Step `number` of `Steps.run` with `key`."""
    order_key, step_key = jax.random.split(key)
    epoch, position = divmod(number, num_images // images_per_step)
    order = preprocessing.epoch_order(order_key, epoch, num_images)
    return Step(number, step_key, order[position * images_per_step :][:images_per_step])


def _finder(family: elastic.Family, loss: Callable[..., jax.Array]) -> Callable[..., str]:
    """`find(tree, x)` or `find(tree, x, y)`: what of a network is first not finite, "" if all is.

    Parameters come first, then what each product reads, both in the order of the products, and with
    labels the gradient of `loss(tree, x, y)`, in the order of the backward pass.
    """
    order: list[str] = []

    @jax.jit
    def all_finite(tree, x, *labels):
        reads = {}

        def observe(step, arrays, layer):
            if step.weight is None or step.contracted is None:
                return
            for path in sorted(step.inputs[step.weight].sources)[:1]:
                reads[path] = reads.get(path, True) & jnp.isfinite(arrays[1 - step.weight]).all()

        elastic.apply_at(family, tree, x.astype(jnp.float32), {}, observe)
        order[:] = reads
        trees = [tree, *(jax.grad(loss)(tree, x, y) for y in labels)]
        finite = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), trees)
        return reads, [family.groups.leaves(tree) for tree in finite]

    def find(tree, *data):
        reads, (weights, *gradient) = jax.device_get(all_finite(tree, *data))
        others = [path for path in weights if path not in order]
        searched = [
            ("weights of", weights, [*order, *others]),
            ("input of", reads, order),
            *(("gradient of", finite, [*order[::-1], *others]) for finite in gradient),
        ]
        for what, finite, paths in searched:
            for path in paths:
                if not finite[path]:
                    return f"first in the {what} {path}"
        return ""

    return find


def locate_in_teacher(
    network: Any, preprocessing: Preprocessing, variables: Mapping, step: Step, images: Images
) -> str:
    """Where a full-size network is first not finite, for an error's sentence.

    `variables` are the linen ones before the step; `step` and `images` are what it saw.
    """
    key, order = jax.random.fold_in(step.key, step.number), []
    pixels, labels = (array[step.indices] for array in images)
    x, _ = preprocessing.train(key, pixels, labels, network.spec.num_classes)

    @jax.jit
    def all_finite(variables, x):
        finite = {"images": jnp.isfinite(x).all()}

        def observe(call, arguments, options, context):
            result = call(*arguments, **options)
            name = f"output of {'/'.join(context.module.path) or 'the network'}"
            for leaf in jax.tree.leaves(result):
                finite[name] = finite.get(name, True) & jnp.isfinite(leaf).all()
            return result

        with nn.intercept_methods(observe):
            network.train(variables, x, jax.random.fold_in(key, 2))
        order[:] = finite
        return finite

    finite = jax.device_get(all_finite(variables, x))
    bad = [name for name in order if not finite[name]]
    return f"first in the {bad[0]}" if bad else "in the gradient or the update, not before it"


def locate_in_inr(
    hypernetwork: Family,
    recipe: InrRecipe,
    phase: Phase,
    prepare: update.Prepare,
    params: Mapping,
    step: Step,
    images: Images,
    teacher: Mapping,
) -> str:
    """Where a step of INR training is first not finite, for an error's sentence.

    `params` are those before the step, `step` and `images` what it saw; the others are those of
    `update.inr_update`, `teacher` the full-size tree.
    """
    full_size = hypernetwork.network
    active = np.arange(len(hypernetwork.names)) < phase.num_active
    if phase.loss is None:
        drawn = update.draw_fit(phase.sizes, step.key, step.number, noise=recipe.noise)
        data = (jnp.zeros((2, *full_size.spec.input_shape)),)
    else:
        drawn = update.draw(phase.sizes, step.key, step.number, active, noise=recipe.noise)
        data = jax.jit(prepare)(drawn.data, *(array[step.indices] for array in images))
        if not jnp.isfinite(data[0]).all():
            return "first in the images"

    @jax.jit
    def network(params, widths, key):
        tensors = hypernetwork.groups.leaves(teacher)
        return update.draw_network(hypernetwork, params, tensors, active, widths, key)[0]

    find = _finder(
        full_size.family, lambda tree, x, y: losses.cross_entropy(full_size.apply(tree, x), y)
    )
    for number, widths in enumerate(np.asarray(drawn.widths)):
        noise = None if drawn.noise is None else drawn.noise[number]
        batch = slice(number * recipe.batch_size, (number + 1) * recipe.batch_size)
        batch = slice(None) if recipe.share_images or phase.loss is None else batch
        if found := find(network(params, widths, noise), *(array[batch] for array in data)):
            return (
                f"{found}, in network {number + 1} of {len(phase.sizes)} with the widths "
                f"{','.join(map(str, widths))}"
            )
    return "in the update, not in the networks before it"


class Idle(NamedTuple):
    """What a family's networks have and do not use.

    Attributes:
        channels: by name of an elastic group, how many of its channels never fire at full width,
            where there are any; of groups that only products read.
        groups: positions of the groups whose removal, with their branch, changes no logit, neither
            at full width nor at the smallest.
    """

    channels: dict[str, int]
    groups: tuple[int, ...]


NUM_FIRST_IMAGES = 64  # what changes a logit of these need not be tried on all


def idle_parts(
    hypernetwork: Family, params: Mapping, images: jax.Array, smallest: Sequence[int]
) -> Idle:
    """What does nothing on normalised `images`, float[batch, size, size, channels].

    Args:
        hypernetwork, params: a trained family.
        images: to look at; what fires on others only is missed.
        smallest: the smallest widths to look at.
    """
    names, network = hypernetwork.names, hypernetwork.network

    @jax.jit
    def energies(tree, images):
        moments = elastic.moments(network.family, tree, images.astype(jnp.float32), names)
        energies = {p: jnp.diagonal(m, axis1=-2, axis2=-1)[..., :-1] for p, m in moments.items()}
        return {p: x if x.ndim == 1 else jnp.max(x, axis=0) for p, x in energies.items()}

    forward = jax.jit(network.apply)
    full = np.array(hypernetwork.full_widths, np.int32)
    silent: dict[str, np.ndarray] = {}
    whole = hyper.generate(hypernetwork, params, full)
    for path, energy in jax.device_get(energies(whole, images)).items():
        (reader,) = (r for r in hypernetwork.groups.readers if r.path == path)
        axes = [hypernetwork.groups.axes[path][n] for n in reader.reads]
        if len(axes) == 1 and axes[0].group in names:
            name = axes[0].group
            silent[name] = silent.get(name, True) & (energy <= 0)
    channels = {name: int(flags.sum()) for name, flags in silent.items() if flags.any()}

    idle = [n for n, lowest in enumerate(hypernetwork.lowest) if lowest == 0]
    for widths in (full, np.array(smallest, np.int32)):
        whole = hyper.generate(hypernetwork, params, widths)
        for some in (images[:NUM_FIRST_IMAGES], images) if idle else ():
            logits = jax.device_get(forward(whole, some))
            for position in tuple(idle):
                without = widths.copy()
                without[position] = 0
                shorter = hyper.generate(hypernetwork, params, without)
                others = jax.device_get(forward(shorter, some))
                if not np.allclose(others, logits, rtol=1e-5, atol=1e-5):
                    idle.remove(position)
    return Idle(channels, tuple(idle))


def describe_idle(hypernetwork: Family, idle: Idle) -> list[str]:
    """Sentences on what does nothing; none where all does something."""
    names, lines = hypernetwork.names, []
    sizes = dict(zip(names, hypernetwork.full_widths, strict=True))
    if idle.channels:
        parts = [f"{count} of {sizes[name]} in {name}" for name, count in idle.channels.items()]
        lines.append(f"channels that never fire: {', '.join(parts)}")
    if idle.groups:
        branches = ", ".join(names[position] for position in idle.groups)
        lines.append(f"branches that change no logit and can be left out: {branches}")
    return lines
