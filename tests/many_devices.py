"""A few steps of each kind of training on one and on two devices; `test_devices.py` starts it.

    python tests/many_devices.py FOLDER

A process has the devices it starts with, so that this is a program of its own. It writes
states.npz, lowered.json and a checkpoint into FOLDER.
"""

import dataclasses
import functools
import json
import pathlib
import sys

NUM_DEVICES = 2
BLOCKS = (0, 1)
CASES = ("looped", "unrolled", "fit", "teacher", "depth")
NUM_STEPS = 3


def main(folder):
    import jax
    import numpy as np
    import test_training as tiny

    from neumeta_jax.core import hypernetwork as hyper
    from neumeta_jax.core.devices import data_mesh, replicate
    from neumeta_jax.core.inr import Grid, Projection
    from neumeta_jax.core.start import fit_target
    from neumeta_jax.core.update import inr_update, phase_inputs, start_phase
    from neumeta_jax.evaluation.evaluator import Evaluator, device_mesh
    from neumeta_jax.networks import cifar_resnet
    from neumeta_jax.networks.cifar_spec import resnet_spec
    from neumeta_jax.runs.checkpoint import Checkpoints
    from neumeta_jax.runs.loop import Steps
    from neumeta_jax.runs.teacher import TeacherRecipe, teacher_init, teacher_update

    assert jax.device_count() == NUM_DEVICES, jax.devices()
    recipe = dataclasses.replace(tiny.RECIPE, batch_size=8)
    recipes = {
        "looped": dataclasses.replace(recipe, micro_batch=2),
        # Everything that moves images about: on one device it takes two micro-batches.
        "unrolled": dataclasses.replace(
            recipe,
            share_images=True,
            micro_batch=4,
            sandwich=True,
            mode="at_once",
            distill_from="full",
        ),
        "fit": dataclasses.replace(recipe, fit_steps=NUM_STEPS),
        "depth": dataclasses.replace(tiny.DEPTH, batch_size=8),
        "teacher": TeacherRecipe(batch_size=8, learning_rate=1e-3),
    }
    # As few blocks as have one that can be skipped and one that changes the shape.
    spec = resnet_spec(8, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    plain = cifar_resnet.hypernetwork(spec, BLOCKS, Grid(noise_scale=0.5))
    deep = cifar_resnet.hypernetwork(spec, BLOCKS, Projection(modulated=True, depth_term=True))
    backbone = tiny.random_backbone(spec)
    images = tiny.random_images()

    @functools.partial(jax.jit, static_argnums=0)
    def init(family, backbone):
        return hyper.init(jax.random.key(1), family, backbone, alpha=0.7)

    params = init(plain, backbone)

    def run(case, devices):
        recipe = recipes[case]
        mesh = data_mesh({"train": recipe}, devices)
        if case == "teacher":
            network, rest, images_per_step = cifar_resnet.Network(spec), (), recipe.batch_size
            update = teacher_update(network, recipe, tiny.PREPROCESSING, 10, mesh=mesh)
            state = teacher_init(jax.random.key(0), network, recipe, 10)
        else:
            name = case if case in ("fit", "depth") else "block"
            family, start = plain, params
            if case == "depth":
                family, start = deep, init(deep, backbone)
            phase = tiny.phase_of(recipe, name, family, new_blocks=())
            given = family, recipe, phase.program, tiny.prepare, family.forward
            update = inr_update(*given, unroll=case == "unrolled", mesh=mesh)
            state = start_phase(start, family, recipe, phase)
            target = fit_target(family, recipe.fit_inr, None, backbone, None)
            teacher = target if case == "fit" else backbone
            rest = teacher, phase_inputs(start, family, recipe, phase)
            images_per_step = phase.images_per_step
        steps = Steps(update, images_per_step, 1 if case == "unrolled" else 2, mesh)
        given = {"key": jax.random.key(9), "images": images, "every": (1,), "rest": rest}
        return steps.call, steps.run(state, range(NUM_STEPS), **given), mesh, rest

    states, lowered = {}, {}
    for case in CASES:
        for devices in (jax.devices()[:1], jax.devices()):
            call, state, mesh, rest = run(case, devices)
            for name, value in tiny.leaves(state).items():
                states[f"{case}/{len(devices)}/{name}"] = value
            lowered[f"{case}/{len(devices)}/programs"] = call._cache_size()
        # The last one ran on all devices.
        lowered[f"{case}/replicated"] = all(
            leaf.sharding.is_fully_replicated and len(leaf.devices()) == NUM_DEVICES
            for leaf in jax.tree.leaves(state)
        )
        args = replicate(
            (jax.random.key(0), images, np.arange(tiny.NUM_IMAGES, dtype=np.int32)), mesh
        )
        rest = replicate(rest, mesh)
        traced = call.trace(state, np.int32(0), np.int32(2), *args, np.int32(0), *rest)
        for platform in ("tpu", "cuda"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            lowered[f"{case}/{platform}/donated"] = text.count("jax.buffer_donor") + text.count(
                "tf.aliasing_output"
            )
        lowered[f"{case}/leaves"] = len(jax.tree.leaves(state))
        lowered[f"{case}/all_reduces"] = traced.lower().as_text().count("stablehlo.all_reduce")
        if case == "looped":
            Checkpoints(folder / "checkpoints").save(NUM_STEPS, state)
    rows = [plain.full_widths, (2, 3), (0, 6)]
    pixels, labels = np.asarray(images.images), np.asarray(images.labels)
    data = plain, params, pixels, labels, tiny.PREPROCESSING
    lowered["evaluated"] = []
    for options in ({}, {"mesh": None}):
        found = Evaluator(*data, compare=True, **options).facts(rows)
        lowered["evaluated"].append([[row["accuracy"], row["kl_divergence"]] for row in found])
    mesh = device_mesh()
    lowered["evaluated_on"] = mesh.shape["data"] if mesh else 1
    np.savez(folder / "states.npz", **states)
    (folder / "lowered.json").write_text(json.dumps(lowered, indent=1))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
