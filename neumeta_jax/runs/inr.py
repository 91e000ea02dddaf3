"""The INR of a run: trained phase by phase, from where its work directory stands, and saved."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.data import datasets
from neumeta_jax.data.preprocessing import Images
from neumeta_jax.errors import UsageError
from neumeta_jax.networks import saved
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.runs import backbone as backbones, diagnosis, hosts, training
from neumeta_jax.runs.config import Experiment
from neumeta_jax.runs.part import Part, Phase, Profile
from neumeta_jax.runs.training import TrainState
from neumeta_jax.runs.workdir import Workdir

NUM_IDLE_IMAGES = 500
SHOWN = {
    "fit": ("loss",),
    "train": ("loss", "ce", "accuracy", "full_accuracy"),
    **dict.fromkeys(training.DEPTH_KINDS, ("loss", "ce", "accuracy", "shallow_accuracy")),
}


def load_start(experiment: Experiment) -> Params | None:
    """The INR parameters of `train.init_from`; None where the run begins anew.

    Raises:
        FileNotFoundError, ValueError: if the file is missing or damaged, or holds another family.
    """
    path, family = experiment.recipe.init_from, experiment.hypernetwork
    if not path:
        return None
    found, params, _ = saved.load_inr(path)
    if found != family:
        raise UsageError(
            f"train.init_from must hold an INR of the run's networks and kind, {family.spec} "
            f"and {family.inr}, but {path} has {found.spec} and {found.inr}; use the config that "
            "trained it."
        )
    return params


def phases(experiment: Experiment, splits: datasets.Splits) -> tuple[training.Phase, ...]:
    """The phases of the INR's training in order; none where the recipe has no steps."""
    num_images = len(splits.train_labels)
    return training.phases(experiment.hypernetwork, experiment.recipe, num_images=num_images)


@dataclasses.dataclass(frozen=True)
class _Training:
    """What all phases of the INR's training share."""

    experiment: Experiment
    splits: datasets.Splits
    backbone: Params
    part: Part

    def update(self, kind: str):
        """The function of a step of phases of `kind`."""
        experiment, family = self.experiment, self.experiment.hypernetwork
        if kind == "fit":
            return training.fit_update(family, experiment.recipe)
        return training.inr_update(
            family,
            experiment.recipe,
            experiment.preprocessing,
            family.forward,
            num_classes=experiment.spec.num_classes,
            unroll=jax.default_backend() != "tpu",
            mesh=self.part.mesh,
            kind=kind,
        )

    def phases(self, phases: tuple[training.Phase, ...]) -> list[Phase]:
        calls = {}
        for kind in dict.fromkeys(phase.kind for phase in phases):
            calls[kind] = self.part.chunked(self.update(kind), self._images_per_step(kind))
        return [
            self._phase(phase, calls[phase.kind], f"[{number}/{len(phases)}] {phase.name}")
            for number, phase in enumerate(phases, 1)
        ]

    def _images_per_step(self, kind: str) -> int:
        return training.phase_recipe(self.experiment.recipe, kind).images_per_step

    def _phase(self, phase: training.Phase, call, title: str) -> Phase:
        experiment, family = self.experiment, self.experiment.hypernetwork
        recipe, kind = experiment.recipe, phase.kind
        inputs = training.phase_inputs(family, recipe, phase)

        def begin(params):
            return training.start_phase(params, family, recipe, phase)

        def evaluate(state):
            if kind == "fit":
                return {}
            return self._accuracies(state.result, inputs.active, kind in training.DEPTH_KINDS)

        def locate(state, step):
            seen = step, self.part.images, self.backbone, inputs
            preprocessing = experiment.preprocessing
            return diagnosis.locate_in_inr(
                family, recipe, preprocessing, state.params, *seen, kind=kind
            )

        return Phase(
            title,
            phase.start,
            phase.stop,
            call,
            self._images_per_step(kind),
            begin,
            locate,
            rest=(self.backbone, inputs),
            shown=SHOWN[kind],
            evaluate=evaluate,
            looks_at_images=kind != "fit",
        )

    def _accuracies(self, params: Params, active: np.ndarray, shallow: bool) -> dict[str, float]:
        """Validation accuracy of the network as the phase has it, at a few widths.

        `shallow` networks skip as many blocks as training skips.
        """
        experiment, family = self.experiment, self.experiment.hypernetwork
        images, labels = experiment.progress_images(self.splits)
        shallowest = np.array(training.shallowest_widths(family, experiment.recipe))
        found = {}
        for ratio in experiment.evaluation.progress_ratios if len(labels) else ():
            widths = family.widths(ratio)
            widths = jnp.asarray(np.where(shallowest == 0, 0, widths) if shallow else widths)
            tree = _mixed_network(family, params, widths, self.backbone, active)
            found[str(ratio)] = experiment.accuracy(tree, images, labels)
        return found


@functools.partial(jax.jit, static_argnums=0)
def _mixed_network(hypernetwork, params, widths, backbone, active):
    widths = jnp.where(active, widths, jnp.array(hypernetwork.full_widths))
    generated = hyper.generate_tensors(hypernetwork, params["inr"], widths)
    originals = hypernetwork.groups.leaves(backbone)
    return training.mixed_tree(hypernetwork, params, generated, originals, active, widths)


def train_inr(
    workdir: Workdir,
    experiment: Experiment,
    splits: datasets.Splits,
    backbone: Params,
    given: Params | None = None,
    profile: Profile | None = None,
) -> Params:
    """All phases of INR training, from where the work directory stands; returns the parameters.

    A run that begins starts from the parameters that are `given` (`load_start`), if any.
    """
    family, recipe = experiment.hypernetwork, experiment.recipe
    of_recipe = phases(experiment, splits)
    if given is not None:  # blocks are what they are
        of_recipe = tuple(dataclasses.replace(phase, new_blocks=()) for phase in of_recipe)
    init = functools.partial(
        hyper.init,
        hypernetwork=family,
        alpha=recipe.alpha_init,
        from_backbone=recipe.block_init == "teacher",
    )
    key = experiment.key(1)

    def template(backbone):
        params = init(key, backbone=backbone)
        opt_state = training.inr_optimizer(recipe).init(params)
        return TrainState(params, opt_state, params if recipe.ema_decay else None)

    def initial():
        if given is not None:
            print(f"INR: starting from {recipe.init_from}", flush=True)
            return given
        moments = None
        if family.inr.needs_moments:
            moments = backbones.measure_moments(experiment, backbone, splits.train_images)
        return jax.jit(init)(key, backbone=backbone, moments=moments)

    part = Part(
        workdir,
        experiment.run,
        "inr",
        "INR",
        experiment.key(2),
        Images.of(splits.train_images, splits.train_labels),
        of_recipe[-1].stop,
        experiment.mesh(),
        profile,
    )
    shared = _Training(experiment, splits, backbone, part)
    return part.train(shared.phases(of_recipe), jax.eval_shape(template, backbone), initial)


def save_result(workdir: Workdir, experiment: Experiment, params: Params) -> pathlib.Path:
    """Writes the trained INR with what is needed to use it elsewhere; returns the file's path."""
    path, preprocessing = workdir.path / saved.INR_FILE, experiment.preprocessing
    if hosts.is_first():
        saved.save_inr(
            path,
            experiment.hypernetwork,
            params,
            dataset=experiment.name,
            mean=list(preprocessing.mean),
            std=list(preprocessing.std),
            trained_range=list(experiment.trained_range),
        )
    return path


def find_idle(experiment: Experiment, params: Params, splits: datasets.Splits) -> diagnosis.Idle:
    """What of the family does nothing on the first `NUM_IDLE_IMAGES` training images."""
    images = jnp.asarray(splits.train_images[:NUM_IDLE_IMAGES])
    family = experiment.hypernetwork
    smallest = training.smallest_widths(family, experiment.recipe)
    images = experiment.preprocessing.evaluate(images)
    return diagnosis.idle_parts(family, params, images, smallest)
