"""The INR of a run: trained phase by phase, from where its work directory stands, and saved."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core import hypernetwork as hyper, recipe as recipes, start, update
from neumeta_jax.data import datasets
from neumeta_jax.data.preprocessing import Images
from neumeta_jax.errors import UsageError
from neumeta_jax.networks import saved
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.runs import backbone as backbones, diagnosis, hosts
from neumeta_jax.runs.config import Experiment
from neumeta_jax.runs.loop import Steps
from neumeta_jax.runs.part import Part, Phase, Profile
from neumeta_jax.runs.workdir import Workdir

NUM_IDLE_IMAGES = 500


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


def phases(experiment: Experiment, splits: datasets.Splits) -> tuple[recipes.Phase, ...]:
    """The phases of the INR's training in order; none where the recipe has no steps."""
    num_images = len(splits.train_labels)
    return experiment.recipe.phases(experiment.hypernetwork, num_images=num_images)


@dataclasses.dataclass(frozen=True)
class _Training:
    """What all phases of the INR's training share."""

    experiment: Experiment
    splits: datasets.Splits
    backbone: Params
    part: Part
    shapes: Params

    @property
    def prepare(self) -> update.Prepare:
        experiment = self.experiment
        num_classes = experiment.spec.num_classes
        return functools.partial(experiment.preprocessing.train, num_classes=num_classes)

    def phases(self, phases: tuple[recipes.Phase, ...]) -> list[Phase]:
        family, unroll = self.experiment.hypernetwork, jax.default_backend() != "tpu"
        given = family, self.experiment.recipe
        steps: dict[recipes.Program, Steps] = {}
        for phase in phases:
            program, mesh = phase.program, self.part.mesh
            if program not in steps:
                made = program, self.prepare, family.forward
                one = update.inr_update(*given, *made, unroll=unroll, mesh=mesh)
                steps[program] = Steps(one, phase.images_per_step, mesh=mesh)
        return [
            self._phase(phase, steps[phase.program], f"[{number}/{len(phases)}] {phase.name}")
            for number, phase in enumerate(phases, 1)
        ]

    @functools.cached_property
    def fit_target(self) -> Params:
        """See `start.fit_target`."""
        experiment, backbone, images = self.experiment, self.backbone, self.splits.train_images
        family, inr = experiment.hypernetwork, experiment.recipe.fit_inr
        moments = None
        if inr.needs_moments:
            print("INR: projecting the teacher to the widths that it is fitted at", flush=True)
            moments = backbones.measure_moments(experiment, backbone, images)
        given = family, inr, family.network.family, backbone, _inputs(experiment, images)
        return start.fit_target(*given, moments)

    def _phase(self, phase: recipes.Phase, steps: Steps, title: str) -> Phase:
        family, recipe = self.experiment.hypernetwork, self.experiment.recipe
        inputs = update.phase_inputs(self.shapes, family, recipe, phase)

        def begin(params):
            return update.start_phase(params, family, recipe, phase)

        def evaluate(state):
            return self._accuracies(state.result, phase) if phase.loss else {}

        def locate(state, step):
            given = family, recipe, phase, self.prepare, state.params
            return diagnosis.locate_in_inr(*given, step, self.part.images, self.backbone)

        return Phase(
            title,
            phase.start,
            phase.stop,
            steps,
            begin,
            locate,
            rest=lambda: (self.backbone if phase.loss else self.fit_target, inputs),
            shown=("loss", "ce", "accuracy", phase.sizes.metric) if phase.loss else ("loss",),
            evaluate=evaluate,
            looks_at_images=phase.loss is not None,
        )

    def _accuracies(self, params: Params, phase: recipes.Phase) -> dict[str, float]:
        """Validation accuracy of the network as the phase has it, at a few widths.

        Without the blocks that the first network of its steps skips.
        """
        experiment, family = self.experiment, self.experiment.hypernetwork
        images, labels = experiment.progress_images(self.splits)
        active = np.arange(len(family.names)) < phase.num_active
        full, first = (np.array(w) for w in (family.full_widths, phase.sizes.fixed[0]))
        found = {}
        for ratio in experiment.evaluation.progress_ratios if len(labels) else ():
            widths = np.where(active, np.where(first == 0, 0, family.widths(ratio)), full)
            tree = _network(family, params, jnp.asarray(widths), self.backbone, active)
            found[str(ratio)] = experiment.accuracy(tree, images, labels)
        return found


@functools.partial(jax.jit, static_argnums=0)
def _network(hypernetwork, params, widths, backbone, active):
    tensors = hypernetwork.groups.leaves(backbone)
    return update.draw_network(hypernetwork, params, tensors, active, widths)[0]


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

    def first(backbone):
        return update.fresh_state(init(key, backbone=backbone), recipe)

    def initial():
        if given is not None:
            print(f"INR: starting from {recipe.init_from}", flush=True)
            return given
        moments = None
        if family.inr.needs_moments:
            moments = backbones.measure_moments(experiment, backbone, splits.train_images)
        params = init(key, backbone=backbone, moments=moments)
        if (family.inr.width_terms or family.inr.depth_term) and recipe.block_init == "teacher":
            params = _filled(experiment, params, backbone, splits)
        return params

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
    template = jax.eval_shape(first, backbone)
    shared = _Training(experiment, splits, backbone, part, template.params)
    return part.train(shared.phases(of_recipe), template, initial)


def _filled(
    experiment: Experiment, params: Params, backbone: Params, splits: datasets.Splits
) -> Params:
    """`start.fill_terms` of the first training images."""
    family = experiment.hypernetwork
    print("INR: fitting terms for small sizes to the full network", flush=True)
    given = family, family.network.family, params, backbone
    x = _inputs(experiment, splits.train_images)
    return start.fill_terms(*given, x, max_skipped=experiment.recipe.max_skipped)


def _inputs(experiment: Experiment, images: np.ndarray) -> jax.Array:
    """What networks take of the first `images`."""
    chosen = jnp.asarray(images[: backbones.NUM_MOMENT_IMAGES])
    return experiment.preprocessing.evaluate(chosen).astype(jnp.float32)


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
    smallest = family.widths(experiment.recipe.min_width_ratio).tolist()
    images = experiment.preprocessing.evaluate(images)
    return diagnosis.idle_parts(family, params, images, smallest)
