"""What a run will do, before it does anything: checks, and a page about it."""

import math
import os
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import describe_inr
from neumeta_jax.core.recipe import Phase
from neumeta_jax.data import datasets
from neumeta_jax.elastic.family import num_values
from neumeta_jax.errors import check
from neumeta_jax.evaluation import timing
from neumeta_jax.evaluation.evaluator import evaluation_split
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.runs import backbone, inr
from neumeta_jax.runs.config import Experiment


def check_start(
    experiment: Experiment, splits: datasets.Splits, workdir: str | os.PathLike
) -> Params | None:
    """Raises what a run in `workdir` would end in later; returns `inr.load_start`.

    Raises:
        FileNotFoundError, ValueError: for a teacher or a start that cannot be used, steps that the
            training images do not fill, no steps at all, or a split without images.
    """
    phases = inr.phases(experiment, splits)
    check(phases, "The training recipe has no steps; raise train.epochs or train.fit_steps.")
    sizes = [phase.images_per_step for phase in phases if phase.loss]
    of_teacher = 0 if experiment.teacher.file else experiment.teacher.batch_size
    check_steps(len(splits.train_labels), train=max(sizes, default=0), teacher=of_teacher)
    evaluation_split(splits, experiment.evaluation.split)
    experiment.mesh()
    backbone.check_teacher(experiment, workdir)
    return inr.load_start(experiment)


def check_steps(num_images: int, **images_per_step: int) -> None:
    """Raises ValueError unless `num_images` fill a step of each section of the config."""
    for section, number in images_per_step.items():
        check(
            number <= num_images,
            f"A step needs {number} images (batch size times sizes), but the training split has "
            f"{num_images}; lower {section}.batch_size.",
        )


def describe(
    experiment: Experiment,
    dataset: datasets.Dataset,
    splits: datasets.Splits,
    *,
    estimate_time: bool = False,
) -> str:
    """A page on the run before it starts: networks, coordinates, parameters, memory, steps."""
    family, recipe = experiment.hypernetwork, experiment.recipe
    shapes = jax.eval_shape(
        lambda key, tree: hyper.init(key, family, tree),
        jax.random.key(0),
        family.network.abstract_params(),
    )
    phases = inr.phases(experiment, splits)
    lines = [
        f"data       {dataset.name} {dataset.fingerprint()}: {len(splits.train_labels)} training, "
        f"{len(splits.validation_labels)} validation, {len(splits.test_labels)} test images, "
        f"{dataset.image_size}x{dataset.image_size}x{dataset.channels}, "
        f"{dataset.num_classes} classes",
        *_networks(experiment),
        *_inr(experiment, shapes),
    ]
    mesh = experiment.mesh()
    if mesh is not None:
        lines.append(
            f"devices    {mesh.size} share every batch: {recipe.batch_size // mesh.size} of "
            f"{recipe.batch_size} images of each size"
        )
    steps, plural = phases[-1].stop if phases else 0, "s" * (len(phases) != 1)
    lines.append(f"steps      {steps} in {len(phases)} phase{plural}:")
    lines += [f"  {phase.name:<20} {phase.stop - phase.start:>8} steps" for phase in phases]
    lines.append(_memory(experiment, shapes, splits))
    if estimate_time:
        lines.append(_time(experiment, phases))
    return "\n".join(lines)


def _networks(experiment: Experiment) -> Iterator[str]:
    family, recipe = experiment.hypernetwork, experiment.recipe
    yield (
        f"network    {experiment.network}: {experiment.spec.num_params:,} parameters, "
        f"{experiment.spec.num_macs / 1e6:.2f} M multiply-adds; elastic groups of channels: "
        f"{len(family.names)} of {len(family.groups.groups)}"
    )
    for name, ratio in (("smallest", recipe.min_width_ratio), ("largest", 1.0)):
        widths = family.widths(ratio)
        yield (
            f"{name:<10} width ratio {ratio}: {family.num_params(widths):,} parameters, "
            f"{family.num_macs(widths) / 1e6:.2f} M multiply-adds"
        )


def _inr(experiment: Experiment, shapes: Params) -> Iterator[str]:
    family, number = experiment.hypernetwork, hyper.num_inr_params(shapes)
    yield (
        f"INR        {describe_inr(family.inr)}: {number:,} parameters "
        f"({number / experiment.spec.num_params:.2f} networks), {_queries(family):,} queries per "
        "network"
    )
    for stack in family.stacks:
        tensors, rows, columns, outputs = stack.shape
        yield (
            f"  {stack.name:<28} {tensors:>2} tensors x {rows:>3} x {columns:>3} queries -> "
            f"{outputs} values  {_num_values(shapes['inr'].get(stack.name, {})):>12,} parameters"
        )
    yield (
        f"learned    {_num_values(shapes['learned']):,} parameters outside the INR "
        f"({experiment.recipe.learned!r} trained)"
    )


def _num_values(tree: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _queries(family) -> int:
    return sum(math.prod(stack.shape[:3]) for stack in family.stacks)


def _memory(experiment: Experiment, shapes: Params, splits: datasets.Splits) -> str:
    """An estimate: parameters, two moments, gradients; what one size keeps for its gradient."""
    family, inr_kind = experiment.hypernetwork, experiment.hypernetwork.inr
    trained = hyper.num_inr_params(shapes) + _num_values(shapes["learned"])
    hidden = getattr(inr_kind, "hidden_width", 1) * 2 * getattr(inr_kind, "num_layers", 1)
    maps = 2 * num_values(family.network.family)
    state = 4 * 4 * trained
    activations = 4 * (_queries(family) * hidden + experiment.recipe.batch_size * maps)
    images = splits.train_images.nbytes + splits.test_images.nbytes
    return (
        f"memory     about {(state + activations + images) / 2**30:.2f} GiB: state "
        f"{state / 2**20:.0f} MiB, activations of one size {activations / 2**20:.0f} MiB, images "
        f"{images / 2**20:.0f} MiB"
    )


def _time(experiment: Experiment, phases: Sequence[Phase]) -> str:
    """Measures a forward pass and one generation here and adds up what the phases need."""
    family, recipe = experiment.hypernetwork, experiment.recipe
    network, dtype = family.network, experiment.preprocessing.dtype
    images = jnp.zeros((recipe.batch_size, *experiment.spec.input_shape), dtype)
    backbone = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.abstract_params())
    params = hyper.init(jax.random.key(0), family, backbone)
    widths = jnp.array(family.full_widths, jnp.int32)
    run = jax.jit(network.apply)
    generate = jax.jit(lambda params, widths: hyper.generate(family, params, widths))
    seconds = timing.fewest(
        {"forward": lambda: run(backbone, images), "generation": lambda: generate(params, widths)},
        3,
    )
    forward, generation = seconds["forward"], seconds["generation"]
    # A backward pass costs about two forward passes; measured 3.0 to 4.5 in all on two cores.
    total = 0.0
    for phase in phases:
        step = 4 * generation
        if phase.loss:
            targets = forward * bool(recipe.distillation_weight)
            step = len(phase.sizes) * (4 * (forward + generation) + targets)
        total += phase.num_steps * step
    return (
        f"time       about {total / 60:.1f} minutes for the INR on this device (forward pass of "
        f"{recipe.batch_size} images {1e3 * forward:.1f} ms, generation {1e3 * generation:.1f} ms; "
        "estimated from these, compilation and teacher not included)"
    )
