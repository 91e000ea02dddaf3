"""The teacher of a run: trained or imported, then folded and with its channels in order."""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax import elastic
from neumeta_jax.data import datasets, sources
from neumeta_jax.data.preprocessing import Images
from neumeta_jax.elastic import ordering
from neumeta_jax.files import trees
from neumeta_jax.networks import cifar_import
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.linen import LinenSpec
from neumeta_jax.runs import diagnosis, hosts
from neumeta_jax.runs.config import Experiment
from neumeta_jax.runs.loop import Steps
from neumeta_jax.runs.part import Part, Phase
from neumeta_jax.runs.teacher import teacher_init, teacher_update
from neumeta_jax.runs.workdir import Workdir

BACKBONE_FILE = "backbone.safetensors"
NUM_MOMENT_IMAGES = 2000


class Backbone(NamedTuple):
    """A teacher, folded and with its channels in the order that the config asks for.

    `report` says what each step did, for logs: accuracies in [0, 1] by stage of processing and
    total variation before and after.
    """

    params: Params
    report: dict[str, float]


def prepare_backbone(workdir: Workdir, experiment: Experiment, splits: datasets.Splits) -> Params:
    """The folded, reordered teacher: from the work directory, else imported or trained."""
    path = workdir.path / BACKBONE_FILE
    found = bool(hosts.from_first(lambda: np.int32(path.exists()), np.int32(0)))
    variables = None
    if not found and not experiment.teacher.file:
        variables = train_teacher(workdir, experiment, splits)

    def load_or_make():
        if found:
            print(f"teacher: {path} is there already", flush=True)
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trees.load_tree(path)[0])
        return _make(path, experiment, splits, variables)

    return hosts.from_first(load_or_make, experiment.hypernetwork.network.abstract_params())


def train_teacher(workdir: Workdir, experiment: Experiment, splits: datasets.Splits) -> Params:
    """Trains the full-size network with batch norm; returns its linen variables."""
    recipe, network = experiment.teacher, experiment.hypernetwork.network
    preprocessing, key, mesh = experiment.preprocessing, experiment.key(0), experiment.mesh()
    images = Images.of(splits.train_images, splits.train_labels)
    num_steps = max(1, round(recipe.epochs * len(splits.train_labels) / recipe.batch_size))

    def begin(_):
        return teacher_init(key, network, recipe, num_steps)

    def evaluate(state):
        chosen = experiment.progress_images(splits)
        return {"1.0": experiment.accuracy(state.params, *chosen)} if len(chosen[1]) else {}

    def locate(state, step):
        return diagnosis.locate_in_teacher(network, preprocessing, state.params, step, images)

    part = Part(workdir, experiment.run, "teacher", "teacher", key, images, num_steps, mesh)
    update = teacher_update(network, recipe, preprocessing, num_steps, mesh=mesh)
    phase = Phase(
        "teacher",
        0,
        num_steps,
        Steps(update, recipe.batch_size, mesh=mesh),
        begin,
        locate,
        evaluate=evaluate,
    )
    return part.train([phase], jax.eval_shape(begin, None))


def import_teacher(experiment: Experiment, path: str) -> Params:
    """Linen variables of the experiment's network from a file: of PyTorch, or of another run."""
    path, spec = sources.local_teacher(path), experiment.spec
    if isinstance(spec, LinenSpec):
        variables, _ = trees.load_tree(path)
        experiment.hypernetwork.groups.leaves(variables, {})
        return variables
    _, variables = cifar_import.load_teacher(path, image_size=spec.image_size, spec=spec)
    return variables


def check_teacher(experiment: Experiment, workdir: str | os.PathLike) -> None:
    """Raises ValueError if a run in `workdir` has to import a teacher and cannot."""
    prepared = pathlib.Path(workdir) / BACKBONE_FILE
    if experiment.teacher.file and hosts.is_first() and not prepared.exists():
        import_teacher(experiment, experiment.teacher.file)


def _make(
    path: pathlib.Path, experiment: Experiment, splits: datasets.Splits, variables: Params | None
) -> Params:
    """Folds and orders what was trained, or is to be imported, and writes it to `path`."""
    # As many as are looked at during training: thrice the whole split takes longer than all else.
    images, labels = experiment.progress_images(splits)
    if variables is None:
        print(f"teacher: importing {experiment.teacher.file}", flush=True)
        variables = import_teacher(experiment, experiment.teacher.file)
        if len(labels):
            print("teacher: it may have been trained on images of the validation split", flush=True)
    backbone = fold_and_order(experiment, variables, images, labels, splits.train_images)
    header = {"spec": experiment.spec.to_dict(), "report": backbone.report}
    trees.save_tree(path, backbone.params, header)
    return backbone.params


def fold_and_order(
    experiment: Experiment,
    variables: Mapping,
    images: np.ndarray,
    labels: np.ndarray,
    train_images: np.ndarray,
) -> Backbone:
    """Folds batch norm, reorders channels, and measures that neither changed the function.

    `images` and `labels` are what accuracy is measured on, in float32; channels are ordered by
    importance on `train_images`.
    """
    family, report = experiment.hypernetwork, {}

    def measure(name, tree):
        if number := len(labels):
            found = report[name] = experiment.in_float32.accuracy(tree, images, labels)
            correct = f"{round(found * number)} of {number}"
            print(f"teacher accuracy {name}: {100 * found:.2f} % ({correct})", flush=True)

    measure("as trained", variables)
    params = family.network.fold(variables)
    measure("folded", params)
    order = experiment.run.channel_order
    if order == "as_trained":
        return Backbone(params, report)
    before = ordering.total_variation(family.groups, params)
    if order == "smoothness":
        params, _ = ordering.smooth(family.groups, params)
    else:
        moments = jax.device_get(measure_moments(experiment, params, train_images))
        params, _ = ordering.by_importance(family.groups, params, moments)
    after = ordering.total_variation(family.groups, params)
    report |= {"total variation before": before, "total variation after": after}
    print(f"channels ordered by {order}: total variation {before:.1f} -> {after:.1f}", flush=True)
    measure("reordered", params)
    return Backbone(params, report)


def measure_moments(
    experiment: Experiment, params: Params, images: np.ndarray
) -> dict[str, jax.Array]:
    """`elastic.moments` of the elastic groups over the first 2,000 uint8 `images`.

    Of a ResNet those of the hidden channels of all blocks, generated or not, are measured too.

    Does not wait for the device, so that the caller can trace what comes next meanwhile.
    """
    hypernetwork, chosen = experiment.hypernetwork, images[:NUM_MOMENT_IMAGES]
    family = hypernetwork.network.family
    names = {*hypernetwork.names, *family.groups.elastic()}

    @jax.jit
    def measure(params, images):
        x = experiment.preprocessing.evaluate(images).astype(jnp.float32)
        return elastic.moments(family, params, x, names)

    batch_size = min(experiment.evaluation.batch_size, len(chosen))
    batches = range(0, len(chosen) - batch_size + 1, batch_size)  # what is left over is left out
    found = [measure(params, chosen[start : start + batch_size]) for start in batches]
    mean = jax.jit(lambda *trees: jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *trees))
    return mean(*found)
