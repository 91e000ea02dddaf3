"""A config resolved against its data set: the networks, images and recipe of a run."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from neumeta_jax.core.devices import data_mesh
from neumeta_jax.core.inr import make_inr
from neumeta_jax.data import datasets
from neumeta_jax.data.preprocessing import Preprocessing
from neumeta_jax.elastic.widths import check_width_ratio
from neumeta_jax.errors import UsageError, check
from neumeta_jax.evaluation import evaluator
from neumeta_jax.networks import cifar_resnet, cifar_spec, linen
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.families import Family
from neumeta_jax.runs import recipes


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config, resolved against its data set. `name` and `fingerprint` are the data set's."""

    name: str
    fingerprint: str
    run: recipes.Run
    hypernetwork: Any  # a Family; the comparison with other methods has ResNets only
    preprocessing: Preprocessing
    teacher: recipes.Teacher
    recipe: recipes.Train
    evaluation: recipes.Evaluation

    @property
    def spec(self) -> Any:
        return self.hypernetwork.spec

    @property
    def network(self) -> str:
        return self.spec.title

    @property
    def trained_range(self) -> tuple[float, float]:
        return self.recipe.min_width_ratio, 1.0

    @property
    def in_float32(self) -> "Experiment":
        """The same with activations in float32, in which teachers are checked."""
        preprocessing = dataclasses.replace(self.preprocessing, dtype="float32")
        return dataclasses.replace(self, preprocessing=preprocessing)

    def key(self, part: int) -> jax.Array:
        """The PRNG key of a part of the run.

        0 teacher, 1 INR initialisation, 2 INR training, 3 noise of evaluations; 4 and 5 are of the
        comparison with other methods.
        """
        return jax.random.fold_in(jax.random.key(self.run.seed), part)

    def noise(self, num_samples: int) -> dict[str, Any]:
        """Options of a generation with the noise that all evaluations of the run have."""
        return {"num_samples": num_samples, "key": self.key(3) if num_samples > 1 else None}

    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that share out the batches of the run: all there are. None for one.

        Raises:
            ValueError: if a batch of the run cannot be shared equally.
        """
        trained = {} if self.teacher.file else {"teacher": self.teacher}
        return data_mesh({**trained, "train": self.recipe})

    def accuracy(
        self, tree: Params, images: np.ndarray, labels: np.ndarray, network: Any = None
    ) -> float:
        """`evaluator.accuracy` of a tree, of the full size unless `network` says otherwise."""
        network, batch_size = network or self.hypernetwork.network, self.evaluation.batch_size
        return evaluator.accuracy(
            network, tree, images, labels, self.preprocessing, batch_size=batch_size
        )

    def progress_images(self, splits: datasets.Splits) -> tuple[np.ndarray, np.ndarray]:
        """(images, labels) of the validation split that are looked at during training."""
        chosen = slice(self.evaluation.progress_images)
        return splits.validation_images[chosen], splits.validation_labels[chosen]


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns what a missing field, or a value of the wrong type, ends in into one sentence."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        lines = str(error).splitlines() or [""]
        raise UsageError(
            "The config must have the fields of those in configs/, with values of their types, but "
            f"reading it ended in {type(error).__name__} ({lines[0][:200]}); compare it with them."
        ) from error


def load_data(config: Mapping[str, Any]) -> tuple[datasets.Dataset, datasets.Splits]:
    """The data set of a config and its training, validation and test splits."""
    with reading():
        section = recipes.from_fields(recipes.Data, config["data"], "data")
    dataset = datasets.load_dataset(
        section.name, data_dir=section.dir or None, image_size=section.image_size or None
    )
    return dataset, datasets.split_validation(
        dataset, num_validation=section.num_validation, seed=section.split_seed
    )


@reading()
def from_config(config: Mapping[str, Any], dataset: datasets.Dataset) -> Experiment:
    """The experiment that `config` describes.

    Raises:
        ValueError: for a value that no run could use, or a section that none reads.
    """
    run, sections = recipes.sections(config)
    evaluation, recipe = sections["eval"], sections["train"]
    ratios = {
        name: tuple(map(check_width_ratio, getattr(evaluation, name)))
        for name in ("width_ratios", "progress_ratios")
    }
    if recipe.init_from:  # such an INR has all its blocks and is not fitted to the teacher again
        recipe = dataclasses.replace(recipe, mode="at_once", fit_steps=0)
    return Experiment(
        name=dataset.name,
        fingerprint=dataset.fingerprint(),
        run=run,
        hypernetwork=_family(sections["network"], run, make_inr(**config["inr"]), dataset),
        preprocessing=_preprocessing(sections["data"], run, dataset),
        teacher=sections["teacher"],
        recipe=recipe,
        evaluation=dataclasses.replace(evaluation, **ratios),
    )


def _preprocessing(
    section: recipes.Data, run: recipes.Run, dataset: datasets.Dataset
) -> Preprocessing:
    mean, std = section.mean, section.std
    if not mean or not std:
        known = datasets.NORMALIZATION.get(dataset.name)
        mean, std = known or datasets.channel_statistics(dataset.train_images)
    check(
        len(mean) == len(std) == dataset.channels and min(std) > 0,
        f"data.mean and data.std need {dataset.channels} entries, those of std above 0, got "
        f"{mean} and {std}.",
    )
    names = ("crop_padding", "flip", "mixup", "cutmix")
    augmentation = {name: getattr(section, name) for name in names}
    return Preprocessing(mean, std, dtype=run.dtype, **augmentation)


def _family(
    section: recipes.Network, run: recipes.Run, inr: Any, dataset: datasets.Dataset
) -> Family:
    """The networks of the section `network` on the images of a data set."""
    sizes = {name: getattr(dataset, name) for name in ("num_classes", "image_size", "channels")}
    streams = run.generated == "full"
    if not section.factory:
        shapes = {"stage_widths": section.stage_widths, "shortcut": section.shortcut}
        spec = cifar_spec.resnet_spec(section.depth, **shapes, **sizes)
        blocks = cifar_spec.generated_blocks(spec, run.generated)
        return cifar_resnet.hypernetwork(spec, blocks, inr, streams=streams)
    try:
        fields = json.loads(section.fields)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"network.fields must be JSON such as '{{\"width\": 32}}', got {section.fields!r} "
            f"({error})."
        ) from None
    spec = linen.LinenSpec.from_dict({"factory": section.factory, "fields": fields, **sizes})
    return linen.hypernetwork(spec, inr, streams=streams)


def for_teacher(
    config: Mapping[str, Any], dataset: datasets.Dataset, spec: ResNetSpec
) -> Experiment:
    """The experiment of `config` with a teacher's `spec` in place of the config's network."""
    check(
        (spec.num_classes, spec.channels) == (dataset.num_classes, dataset.channels),
        f"The teacher must fit {dataset.name}, which has {dataset.num_classes} classes and "
        f"{dataset.channels} channels; the file has {spec.num_classes} and {spec.channels}.",
    )
    experiment = from_config(config, dataset)
    family = cifar_resnet.hypernetwork(spec, (), experiment.hypernetwork.inr)
    return dataclasses.replace(experiment, hypernetwork=family)
