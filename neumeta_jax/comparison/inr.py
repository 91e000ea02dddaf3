"""The INR of a config's recipe, the papers' or this project's, trained as by train.py."""

import functools

import jax
import jax.numpy as jnp

from neumeta_jax.comparison.run import Family, Run, num_bytes
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.runs.backbone import NUM_MOMENT_IMAGES, prepare_backbone
from neumeta_jax.runs.inr import save_result, train_inr


def family(run: Run) -> Family:
    experiment, family = run.experiment, run.family
    backbone = prepare_backbone(run.workdir, experiment, run.splits)
    params = train_inr(run.workdir, experiment, run.splits, backbone)
    save_result(run.workdir, experiment, params)
    noise = experiment.noise(experiment.evaluation.num_samples)
    # The key is an argument: XLA would spend minutes on working out the noise of a constant.
    generate = jax.jit(functools.partial(hyper.generate, family), static_argnames="num_samples")

    def network(ratio):
        widths = family.widths(ratio)
        return family.dense(generate(params, jnp.asarray(widths), **noise), widths.tolist())

    measured = NUM_MOMENT_IMAGES if family.inr.needs_moments else 0
    return Family(network, num_bytes(params), calibration_images=measured)
