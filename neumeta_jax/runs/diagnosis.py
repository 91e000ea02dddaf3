"""What is wrong with a network: where it stopped being finite, and which of its parts do nothing.

Steps themselves only notice that a loss is not finite, which costs nothing. The functions that say
where, which block at which width, are given the state before that step, which a run recomputes from
its last checkpoint, and look at the step's networks one by one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import elastic
from neumeta_jax.core import hypernetwork as hyper, losses, update
from neumeta_jax.core.recipe import InrRecipe, Phase
from neumeta_jax.data import preprocessing
from neumeta_jax.data.preprocessing import Images, Preprocessing
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_resnet import ResNetHypernetwork
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


def _first(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of `names` with an entry that is not finite, else ""."""
    for name in names:
        leaves = jax.tree.leaves(found.get(name, ()))
        if not all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in leaves):
            return name
    return ""


def locate_in_teacher(
    network: Any,
    preprocessing: Preprocessing,
    variables: Mapping,
    step: Step,
    images: Images,
) -> str:
    """Where a ResNet with batch norm is first not finite, for an error's sentence; "" of others.

    `variables` are the linen ones before the step; `step` and `images` are what it saw.
    """

    spec = network.spec
    if not isinstance(spec, cifar_resnet.ResNetSpec):
        return ""

    @jax.jit
    def activations(variables, images, labels):
        key = jax.random.fold_in(step.key, step.number)
        x, _ = preprocessing.train(key, images, labels, spec.num_classes)
        _, mutated = cifar_resnet.ResNet(spec).apply(
            variables,
            x,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )
        return {"images": x, **mutated["intermediates"]}

    found = activations(variables, *(array[step.indices] for array in images))
    widths = {block.name: block.hidden_width for block in spec.blocks}
    name = _first(found, ("images", "stem", "stem_bn", *widths, "head"))
    if name in widths:
        return f"first in the activations of {name} at hidden width {widths[name]}"
    if name:
        return f"first in the {'images' if name == 'images' else f'activations of {name}'}"
    return "in the gradient or the update, not in the network before it"


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
    """Where a step of INR training is first not finite, for an error's sentence; "" of others.

    Of ResNets only. `params` are those before the step, `step` and `images` what it saw; the others
    are those of `update.inr_update`, `teacher` the full-size tree.
    """
    if not isinstance(hypernetwork, ResNetHypernetwork):
        return ""
    spec = hypernetwork.spec
    names = [spec.blocks[n].name for n in hypernetwork.blocks]
    active = np.arange(len(names)) < phase.num_active
    x = y = jnp.zeros(0)
    if phase.loss is None:
        drawn = update.draw_fit(phase.sizes, step.key, step.number, noise=recipe.noise)
    else:
        drawn = update.draw(phase.sizes, step.key, step.number, active, noise=recipe.noise)
        x, y = jax.jit(prepare)(drawn.data, *(array[step.indices] for array in images))
        if _first({"images": x}, ["images"]):
            return "first in the images"

    @jax.jit
    def network(params, widths, key):
        tensors = hypernetwork.groups.leaves(teacher)
        return update.draw_network(hypernetwork, params, tensors, active, widths, key)

    @jax.jit
    def look(tree, x, y):
        hidden = [cifar_resnet.hidden_group(block) for block in spec.blocks]
        moments = elastic.moments(cifar_resnet.family(spec), tree, x.astype(jnp.float32), hidden)
        gradient = jax.grad(lambda tree: losses.cross_entropy(cifar_resnet.apply(spec, tree, x), y))
        return {path.partition("/")[0]: m for path, m in moments.items()}, gradient(tree)

    order = [*cifar_resnet.param_shapes(spec)]
    for number, widths in enumerate(np.asarray(drawn.widths)):
        noise = None if drawn.noise is None else drawn.noise[number]
        tree, generated = network(params, widths, noise)
        found = [("weights", hyper.nested(generated), names)]
        if phase.loss is not None:
            batch = slice(number * recipe.batch_size, (number + 1) * recipe.batch_size)
            batch = slice(None) if recipe.share_images else batch
            moments, gradient = look(tree, x[batch], y[batch])
            found += [
                ("weights", tree, order),
                ("activations", moments, order),
                ("gradient", gradient, order[::-1]),
            ]
        sizes = {block.name: block.hidden_width for block in spec.blocks}
        sizes |= dict(zip(names, widths, strict=True))
        for what, values, searched in found:
            if name := _first(values, searched):
                at = f" at hidden width {sizes[name]}" if name in sizes else ""
                return (
                    f"first in the {what} of {name}{at}, in network {number + 1} of "
                    f"{len(phase.sizes)} with the widths {','.join(map(str, widths))}"
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
    def tree_at(params, widths):
        return hyper.generate(hypernetwork, params, widths)

    @jax.jit
    def energies(tree, images):
        moments = elastic.moments(network.family, tree, images.astype(jnp.float32), names)
        return {path: jnp.diagonal(moment)[:-1] for path, moment in moments.items()}

    forward = jax.jit(network.apply)
    full = np.array(hypernetwork.full_widths, np.int32)
    silent: dict[str, np.ndarray] = {}
    for path, energy in jax.device_get(energies(tree_at(params, full), images)).items():
        (reader,) = (r for r in hypernetwork.groups.readers if r.path == path)
        axes = [hypernetwork.groups.axes[path][n] for n in reader.reads]
        if len(axes) == 1 and axes[0].group in names:
            name = axes[0].group
            silent[name] = silent.get(name, True) & (energy <= 0)
    channels = {name: int(flags.sum()) for name, flags in silent.items() if flags.any()}

    idle = [n for n, lowest in enumerate(hypernetwork.lowest) if lowest == 0]
    for widths in (full, np.array(smallest, np.int32)):
        whole = tree_at(params, widths)
        for some in (images[:NUM_FIRST_IMAGES], images) if idle else ():
            logits = jax.device_get(forward(whole, some))
            for position in tuple(idle):
                without = widths.copy()
                without[position] = 0
                others = jax.device_get(forward(tree_at(params, without), some))
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
