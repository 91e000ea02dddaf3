"""An experiment: what a config describes, and the work directory in which it runs and resumes.

The rest of the library takes values; only this module and the two scripts know of config fields and
work directories.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from neumeta_jax import elastic
from neumeta_jax.commands.command_line import local
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import describe_inr, make_inr
from neumeta_jax.data import datasets, sources
from neumeta_jax.data.preprocessing import Images, Preprocessing
from neumeta_jax.elastic import ordering
from neumeta_jax.elastic.family import num_values
from neumeta_jax.elastic.widths import check_width_ratio
from neumeta_jax.errors import Interrupted, UsageError
from neumeta_jax.evaluation import grid, timing
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import (  # noqa: F401
    checkout,
    differences,
    file_digest,
    num_cores,
    versions,
)
from neumeta_jax.files.storage import locked
from neumeta_jax.networks import cifar_import, cifar_resnet, cifar_spec, linen
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.families import Family
from neumeta_jax.networks.linen import LinenSpec
from neumeta_jax.runs import checkpoint, diagnosis, hosts, recipes, training
from neumeta_jax.runs.progress import MetricsFile, Progress

BACKBONE_FILE = "backbone.safetensors"
NUM_MOMENT_IMAGES = 2000
NUM_IDLE_IMAGES = 500

_log = logging.getLogger(__name__)


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
    def trained_range(self) -> tuple[float, float]:
        return self.recipe.min_width_ratio, self.recipe.max_width_ratio

    @property
    def network(self) -> str:
        return self.spec.title

    @property
    def in_float32(self) -> "Experiment":
        """The same with activations in float32, in which teachers are checked."""
        preprocessing = dataclasses.replace(self.preprocessing, dtype="float32")
        return dataclasses.replace(self, preprocessing=preprocessing)

    def noise(self, num_samples: int) -> dict[str, Any]:
        """Options of a generation with the noise that all evaluations of the run have."""
        key = phase_key(self, 3) if num_samples > 1 else None
        return {"num_samples": num_samples, "key": key}

    def accuracy(
        self, tree: Params, images: np.ndarray, labels: np.ndarray, network: Any = None
    ) -> float:
        """`grid.accuracy` of a tree, of the full size unless `network` says otherwise."""
        network = network or self.hypernetwork.network
        options = {"batch_size": self.evaluation.batch_size}
        return grid.accuracy(network, tree, images, labels, self.preprocessing, **options)


@contextlib.contextmanager
def _reading_config() -> Iterator[None]:
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
    with _reading_config():
        section = recipes.from_fields(recipes.Data, config["data"], "data")
    dataset = datasets.load_dataset(
        section.name, data_dir=section.dir or None, image_size=section.image_size or None
    )
    splits = datasets.split_validation(
        dataset, num_validation=section.num_validation, seed=section.split_seed
    )
    return dataset, splits


@_reading_config()
def from_config(config: Mapping[str, Any], dataset: datasets.Dataset) -> Experiment:
    """The experiment that `config` describes.

    Raises:
        ValueError: for a value that no run could use, or a section that none reads.
    """
    unread = {name for name, value in config.items() if isinstance(value, Mapping)}
    unread -= {*recipes.SECTIONS, "inr", "baseline"}
    if unread:
        raise UsageError(
            f"The config must have the sections {', '.join(recipes.SECTIONS)} and inr, got "
            f"{', '.join(sorted(map(ascii, unread)))} too; leave out what no run reads."
        )
    for name in ("data", "network", "teacher", "inr", "train", "eval"):
        if not isinstance(config[name], Mapping):
            raise UsageError(
                f"The config's {name} must be a section with fields, got {config[name]!r:.80}."
            )
    sections: dict[str, Any] = {
        name: recipes.from_fields(cls, config[name], name) for name, cls in recipes.SECTIONS.items()
    }
    images, network = sections["data"], sections["network"]
    alone = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    run = recipes.from_fields(recipes.Run, alone, "")
    mean, std = images.mean, images.std
    if not mean or not std:
        known = datasets.NORMALIZATION.get(dataset.name)
        mean, std = known or datasets.channel_statistics(dataset.train_images)
    if len(mean) != dataset.channels or len(std) != dataset.channels or not min(std) > 0:
        raise UsageError(
            f"data.mean and data.std need {dataset.channels} entries, those of std above 0, got "
            f"{mean} and {std}."
        )
    hypernetwork = _hypernetwork(network, run, make_inr(**config["inr"]), dataset)
    ratios = {
        name: tuple(map(check_width_ratio, getattr(sections["eval"], name)))
        for name in ("width_ratios", "progress_ratios")
    }
    augmentation = ("crop_padding", "flip", "mixup", "cutmix")
    recipe = sections["train"]
    if recipe.init_from:  # such an INR has all its blocks and is not fitted to the teacher again
        recipe = dataclasses.replace(recipe, mode="at_once", fit_steps=0)
    return Experiment(
        name=dataset.name,
        fingerprint=dataset.fingerprint(),
        run=run,
        hypernetwork=hypernetwork,
        preprocessing=Preprocessing(
            mean, std, dtype=run.dtype, **{name: getattr(images, name) for name in augmentation}
        ),
        teacher=sections["teacher"],
        recipe=recipe,
        evaluation=dataclasses.replace(sections["eval"], **ratios),
    )


def _hypernetwork(
    network: recipes.Network, run: recipes.Run, inr: Any, dataset: datasets.Dataset
) -> Family:
    """The family of the section `network` on the images of a data set."""
    sizes = {name: getattr(dataset, name) for name in ("num_classes", "image_size", "channels")}
    streams = run.generated == "full"
    if network.factory:
        try:
            fields = json.loads(network.fields)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"network.fields must be JSON such as '{{\"width\": 32}}', got {network.fields!r} "
                f"({error})."
            ) from None
        spec = linen.LinenSpec.from_dict({"factory": network.factory, "fields": fields, **sizes})
        return linen.hypernetwork(spec, inr, streams=streams)
    shapes = {"stage_widths": network.stage_widths, "shortcut": network.shortcut}
    spec = cifar_spec.resnet_spec(network.depth, **shapes, **sizes)
    blocks = cifar_spec.generated_blocks(spec, run.generated)
    return cifar_resnet.hypernetwork(spec, blocks, inr, streams=streams)


def for_teacher(
    config: Mapping[str, Any], dataset: datasets.Dataset, spec: ResNetSpec
) -> Experiment:
    """The experiment of `config` with a teacher's `spec` in place of the config's network."""
    if spec.num_classes != dataset.num_classes or spec.channels != dataset.channels:
        raise UsageError(
            f"The teacher must fit {dataset.name}, which has {dataset.num_classes} classes and "
            f"{dataset.channels} channels; the file has {spec.num_classes} and {spec.channels}."
        )
    experiment = from_config(config, dataset)
    family = cifar_resnet.hypernetwork(spec, (), experiment.hypernetwork.inr)
    return dataclasses.replace(experiment, hypernetwork=family)


def check_same_family(experiment: Experiment, hypernetwork: Family) -> None:
    """Raises ValueError if a saved INR generates other networks than the experiment's."""
    if hypernetwork != experiment.hypernetwork:
        raise UsageError(
            "The saved INR must generate the networks of the work directory's config, but it "
            f"generates {hypernetwork.spec} and the config asks for {experiment.spec}; one of "
            "them was replaced."
        )


def configure_jax() -> None:
    """What all commands ask of JAX: products of float32 in float32, and a compilation cache.

    GPUs round the factors to 10 bits otherwise, and TPUs to 7, which moments of activations and
    what is solved with them do not bear. Activations in bfloat16 are not affected.

    Compiled programs are kept in the user's cache folder, unless JAX was told where to, all of
    them: a start compiles dozens of small ones, which together take as long as a large one.
    """
    jax.config.update("jax_default_matmul_precision", "highest")
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "neumeta-jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def phase_key(experiment: Experiment, number: int) -> jax.Array:
    """The PRNG key of part `number` of a run: 0 teacher, 1 INR initialisation, 2 INR training."""
    return jax.random.fold_in(jax.random.key(experiment.run.seed), number)


# --- the work directory ----------------------------------------------------------------------


@dataclasses.dataclass
class Workdir:
    """The directory of one run: config, versions, metrics, checkpoints, results."""

    path: pathlib.Path
    stop_requested: bool = False

    @property
    def metrics(self) -> MetricsFile:
        return MetricsFile(self.path / "metrics.jsonl" if hosts.is_first() else None)

    def check_stop(self, step: int) -> None:
        """Raises `Interrupted` if the process was asked to stop."""
        if self.stop_requested:
            raise Interrupted(f"stopped at step {step}; the same command continues from there.")


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The config that `workdir` was made with.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is damaged.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} must be a work directory of train.py, but it has no config.json."
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UsageError(f"{path} must be JSON; it is damaged, restore or remove it.") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path} must hold a config; it is damaged, restore or remove it.")
    with _reading_config():
        return recipes.completed(config)


def check_same_config(path: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the fields that differ, if another config made `path`.

    Fields that an earlier version did not have count as their defaults, see `recipes.completed`.
    """
    pair = read_config(path), recipes.completed(config)
    differing = differences(*local(json.loads(json.dumps(pair)), "config"))
    if differing:
        raise UsageError(
            f"{path} was written by another config; these fields differ: {', '.join(differing)}; "
            "use the saved values or another --workdir."
        )


def check_same_data(workdir: pathlib.Path, fingerprint: str) -> None:
    """Raises ValueError if the run in `workdir` was made with another data set, where it says."""
    try:
        saved = json.loads((workdir / "versions.json").read_text("utf-8"))["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if saved and fingerprint and saved != fingerprint:
        raise UsageError(
            f"The data must be those that the run in {workdir} was made with, of fingerprint "
            f"{saved}, but those here have {fingerprint}; use the former, or evaluate others with "
            "eval.py --out=FOLDER."
        )


class TrainedRun(NamedTuple):
    """A work directory with a trained INR: what eval.py, search, export and latency begin with."""

    workdir: pathlib.Path
    config: dict[str, Any]
    hypernetwork: Family
    params: Params
    metadata: dict[str, Any]

    def without_data(self, num_images: int) -> tuple[Experiment, datasets.Splits]:
        """The experiment with as many random images in place of each split of its data."""
        spec, rng = self.hypernetwork.spec, np.random.default_rng(0)
        split = (
            rng.integers(0, 256, (num_images, *spec.input_shape), np.uint8),
            np.zeros(num_images, int),
        )
        name, known = self.config["data"]["name"], {"mean", "std"} & set(self.metadata)
        section = self.config["data"] | {field: self.metadata[field] for field in known}
        if not section["mean"] and name not in datasets.NORMALIZATION:
            raise UsageError(f"The mean of {name} is not known without it; name it by --data_dir.")
        dataset = datasets.make_dataset(name, *split, *split, num_classes=spec.num_classes)
        experiment = from_config(self.config | {"data": section}, dataset)
        check_same_family(experiment, self.hypernetwork)
        return experiment, datasets.split_validation(dataset, num_validation=0, seed=0)

    def load(self, *, other_data: bool = False) -> tuple[Experiment, datasets.Splits]:
        """The experiment and its data; with `other_data` they need not be those of training.

        Raises:
            ValueError: if the INR is of other networks than the config, or the data have changed.
        """
        dataset, splits = load_data(self.config)
        experiment = from_config(self.config, dataset)
        if not other_data:
            check_same_data(self.workdir, experiment.fingerprint)
        check_same_family(experiment, self.hypernetwork)
        return experiment, splits


def open_run(config: Mapping[str, Any], options: flags.FlagValues) -> TrainedRun:
    """The run in `options.workdir`, which `config`, unless empty, must have made.

    Where there is no such folder and it has the name of a pretrained INR, it is made of that.
    """
    workdir = pathlib.Path(options.workdir)
    if not workdir.exists() and workdir.name in checkpoint.pretrained():
        with locked(workdir):
            checkpoint.unpack(workdir.name, workdir)
    saved = read_config(workdir)
    if config:
        check_same_config(workdir, config)
    if getattr(options, "data_dir", ""):
        saved["data"]["dir"] = options.data_dir
    return TrainedRun(workdir, saved, *checkpoint.load_inr(workdir))


# What a run leaves in its work directory before there is anything that cost work.
_EARLY_FILES = {"config.json", "versions.json", "lock", "metrics.jsonl", "seconds"}


def check_claim(workdir: str | os.PathLike, config: Mapping[str, Any]) -> bool:
    """Whether something was made in `workdir` with `config`; ValueError if with another one."""
    path = pathlib.Path(workdir)
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    claimed = "config.json" in names and not names <= _EARLY_FILES
    if claimed:
        check_same_config(path, config)
    return claimed


@contextlib.contextmanager
def open_workdir(
    path: str | os.PathLike, config: Mapping[str, Any], fingerprint: str = ""
) -> Iterator[Workdir]:
    """Opens or creates the work directory of a run with `config`, for this process alone.

    Its versions.json keeps the `fingerprint` of the data set.

    While it is open, SIGTERM and SIGINT ask the run to save and stop. Of several processes the
    first alone opens it.

    Raises:
        ValueError: if a run with another config has saved something in the directory (naming the
            fields that differ), or with other data, or another process is using it.
    """
    path = pathlib.Path(path)
    workdir = Workdir(path)
    if not hosts.is_first():
        with _stopped_by_signals(workdir):
            yield workdir
        return
    with locked(path):
        config = json.loads(json.dumps(config))
        if check_claim(path, config):
            check_same_data(path, fingerprint)
        else:
            storage.write_json(path / "config.json", config)
        storage.write_json(path / "versions.json", {**versions(), "data": fingerprint})
        with _stopped_by_signals(workdir):
            yield workdir


@contextlib.contextmanager
def _stopped_by_signals(workdir: Workdir) -> Iterator[None]:
    def request_stop(signum, frame):
        del frame
        if workdir.stop_requested:  # asked twice: at once
            raise KeyboardInterrupt
        workdir.stop_requested = True
        print(f"{signal.Signals(signum).name}: saving and stopping", flush=True)

    previous = {s: signal.signal(s, request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- the recipe's steps ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run, and what all its steps share.

    Attributes:
        workdir, settings: of the run.
        name: "teacher" or "inr", for checkpoints and metrics; `title` is for people.
        key: PRNG key of the steps.
        images: of the training split.
        num_steps: of the part.
        mesh: the devices that share out the batches, see `training.data_mesh`.
    """

    workdir: Workdir
    settings: recipes.Run
    name: str
    title: str
    key: jax.Array
    images: Images
    num_steps: int
    mesh: jax.sharding.Mesh | None = None

    @property
    def saved(self) -> checkpoint.Checkpoints:
        return checkpoint.Checkpoints(self.workdir.path / "checkpoints" / self.name)

    def continue_from(self, step: int) -> None:
        """Says where the part stands and drops the metrics of later steps."""
        if step:
            print(f"{self.title}: continuing from step {step} of {self.num_steps}", flush=True)
        self.workdir.metrics.rewind(self.name, step)

    def chunked(self, update: Callable, images_per_step: int) -> Callable:
        """`training.chunked` for `run`."""
        steps = training.default_steps_per_call()
        return training.chunked(
            update, images_per_step=images_per_step, steps_per_call=steps, mesh=self.mesh
        )

    def train(
        self, update: Callable, fresh: Callable[[], training.TrainState], **options: Any
    ) -> training.TrainState:
        """All steps of a part with a single phase, from where it stands; see `run`.

        `fresh` makes the state before the first step.
        """

        def last_state():
            state = fresh()
            return restore(self.saved, state) or (0, state)

        start, state = last_state()
        self.continue_from(start)
        call = self.chunked(update, options["images_per_step"])
        options |= {"phase": self.title, "state_before": last_state}
        return self.run(call, state, start=start, stop=self.num_steps, **options)

    def run(
        self,
        call: Callable,
        state: training.TrainState,
        *,
        start: int,
        stop: int,
        images_per_step: int,
        phase: str,
        shown: Sequence[str],
        state_before: Callable[[], tuple[int, training.TrainState]],
        locate: Callable[[training.TrainState, diagnosis.Step], str],
        rest: tuple = (),
        evaluate: Callable[[training.TrainState], dict[str, float]] | None = None,
        looks_at_images: bool = True,
    ) -> training.TrainState:
        """`training.run_steps` with metrics, progress, checkpoints and requests to stop.

        Args:
            call, state, start, stop, images_per_step, rest: of `training.run_steps`.
            phase: for progress.
            shown: metrics that progress shows.
            state_before: where a step is not finite, returns the last good step and state, from
                which that step is reached again; `locate` says what it finds there.
            evaluate: validation accuracies in [0, 1] of a state, by name.
            looks_at_images: whether progress counts images.
        """
        settings, workdir, mesh = self.settings, self.workdir, self.mesh
        every = (settings.log_every, settings.checkpoint_every, settings.eval_every)
        last_saved = start
        progress = Progress(self.num_steps, images_per_step if looks_at_images else 0, done=start)

        def due(step, interval):
            return (interval > 0 and step % interval == 0) or step == stop

        def after(step, state, metrics):
            nonlocal last_saved
            log = due(step, settings.log_every)
            rate = progress.show(step, phase, {k: metrics[k] for k in shown}, line=log)
            record = {**metrics, "images_per_second": round(rate, 1)} if log else {}
            if evaluate and due(step, settings.eval_every):
                found = evaluate(training.on_default_device(state, mesh))
                if found:
                    text = "  ".join(f"{k}: {100 * v:.2f} %" for k, v in found.items())
                    print(f"{phase} | step {step} | validation top-1 at width {text}", flush=True)
                    record["validation"] = found
            if record:
                workdir.metrics.write(self.name, step, {"phase": phase, **record})
            # A signal after this counts after the next step.
            stopping = hosts.any_process(workdir.stop_requested)
            if due(step, settings.checkpoint_every) or stopping:
                if hosts.is_first():
                    self.saved.save(step, state)
                last_saved = step
            if stopping:
                workdir.stop_requested = True
                workdir.check_stop(step)

        run = functools.partial(
            training.run_steps,
            call,
            key=self.key,
            images=self.images,
            images_per_step=images_per_step,
            steps_per_call=training.default_steps_per_call(),
            every=every,
            rest=rest,
            mesh=mesh,
        )

        def find(bad):
            first, good = state_before()
            print(f"step {bad} is not finite; finding out where, from step {first} on", flush=True)
            if first < bad:
                good = run(good, start=first, stop=bad, after=lambda *_: None)
            sizes = {"num_images": len(self.images.labels), "images_per_step": images_per_step}
            step = diagnosis.step_of(bad, self.key, **sizes)
            return locate(training.on_default_device(good, mesh), step)

        try:
            with progress:
                state = run(state, start=start, stop=stop, after=after)
        except training.NonFiniteLossError as error:
            where = ""
            try:
                where = find(error.step)
            except Exception as failure:  # the error itself must be told in any case
                _log.warning("where the loss stopped being finite was not found: %r", failure)
            raise training.NonFiniteLossError(
                error.step, error.metrics, phase=phase, last_saved=last_saved or None, where=where
            ) from None
        return training.on_default_device(state, mesh)


def restore(saved: checkpoint.Checkpoints, template: Any) -> tuple[int, Any] | None:
    """`saved.restore` by the first process, for all of them."""
    if jax.process_count() == 1:
        return saved.restore(template)
    found = saved.restore(template) if hosts.is_first() else None
    step = int(hosts.from_first(lambda: np.int32(found[0] if found else -1), np.int32(0)))
    if step < 0:
        return None
    state = hosts.from_first(lambda: found[1] if found else None, template)
    return step, jax.tree.map(jnp.array, state)


def data_mesh(experiment: Experiment) -> jax.sharding.Mesh | None:
    """The devices that share out the batches of a run: all there are. None for one.

    Raises:
        ValueError: if a batch of the run cannot be shared equally.
    """
    trained = () if experiment.teacher.file else (experiment.teacher,)
    return training.data_mesh(*trained, experiment.recipe)


def _on_device(splits: datasets.Splits) -> Images:
    return Images(jnp.asarray(splits.train_images), jnp.asarray(splits.train_labels))


def train_teacher(workdir: Workdir, experiment: Experiment, splits: datasets.Splits) -> Params:
    """Trains the full-size network with batch norm; returns its linen variables."""
    recipe, network = experiment.teacher, experiment.hypernetwork.network
    preprocessing = experiment.preprocessing
    num_steps = max(1, round(recipe.epochs * len(splits.train_labels) / recipe.batch_size))
    key, images, mesh = phase_key(experiment, 0), _on_device(splits), data_mesh(experiment)

    def evaluate(state):
        chosen = _progress_images(experiment, splits)
        return {"1.0": experiment.accuracy(state.params, *chosen)} if len(chosen[1]) else {}

    def locate(state, step):
        return diagnosis.locate_in_teacher(network, preprocessing, state.params, step, images)

    part = Part(workdir, experiment.run, "teacher", "teacher", key, images, num_steps, mesh)
    state = part.train(
        training.teacher_update(network, recipe, preprocessing, num_steps, mesh=mesh),
        lambda: training.teacher_init(key, network, recipe, num_steps),
        images_per_step=recipe.batch_size,
        shown=("loss", "accuracy"),
        evaluate=evaluate,
        locate=locate,
    )
    return state.params


def _progress_images(
    experiment: Experiment, splits: datasets.Splits
) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of the validation split that are looked at during training."""
    chosen = slice(experiment.evaluation.progress_images)
    return splits.validation_images[chosen], splits.validation_labels[chosen]


def load_start(experiment: Experiment) -> Params | None:
    """The INR parameters of `train.init_from`; None where the run begins anew.

    Raises:
        FileNotFoundError, ValueError: if the file is missing or damaged, or holds another family.
    """
    if not experiment.recipe.init_from:
        return None
    hypernetwork, params, _ = checkpoint.load_inr(experiment.recipe.init_from)
    if hypernetwork != experiment.hypernetwork:
        raise UsageError(
            f"train.init_from must hold an INR of the run's networks and kind, {experiment.spec} "
            f"and {experiment.hypernetwork.inr}, but {experiment.recipe.init_from} has "
            f"{hypernetwork.spec} and {hypernetwork.inr}; use the config that trained it."
        )
    return params


def import_teacher(experiment: Experiment, path: str) -> Params:
    """Linen variables of the experiment's network from a file: of PyTorch, or of another run."""
    path, spec = sources.local_teacher(path), experiment.spec
    if isinstance(spec, LinenSpec):
        variables, _ = checkpoint.load_tree(path)
        experiment.hypernetwork.groups.leaves(variables, {})
        return variables
    _, variables = cifar_import.load_teacher(path, image_size=spec.image_size, spec=spec)
    return variables


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A teacher, folded and with its channels in order.

    Attributes:
        params: folded tree, channels in the order that the config asks for.
        report: what each step did, for logs: accuracies in [0, 1] by stage of processing and total
            variation before and after.
    """

    params: Params
    report: dict[str, float]


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
    network, number = experiment.hypernetwork.network, len(labels)
    report = {}

    def measure(name, tree):
        if number:
            found = report[name] = experiment.in_float32.accuracy(tree, images, labels)
            correct = f"{round(found * number)} of {number}"
            print(f"teacher accuracy {name}: {100 * found:.2f} % ({correct})", flush=True)

    measure("as trained", variables)
    params = network.fold(variables)
    measure("folded", params)
    if experiment.run.channel_order == "as_trained":
        return Backbone(params, report)
    groups = experiment.hypernetwork.groups
    before = ordering.total_variation(groups, params)
    if experiment.run.channel_order == "smoothness":
        params, _ = ordering.smooth(groups, params)
    else:
        moments = jax.device_get(measure_moments(experiment, params, train_images))
        params, _ = ordering.by_importance(groups, params, moments)
    after = ordering.total_variation(groups, params)
    report |= {"total variation before": before, "total variation after": after}
    change = f"total variation {before:.1f} -> {after:.1f}"
    print(f"channels ordered by {experiment.run.channel_order}: {change}", flush=True)
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


def prepare_backbone(workdir: Workdir, experiment: Experiment, splits: datasets.Splits) -> Params:
    """The folded, reordered teacher: from the work directory, else imported or trained."""
    path = workdir.path / BACKBONE_FILE
    found = bool(hosts.from_first(lambda: np.int32(path.exists()), np.int32(0)))
    trained = None
    if not found and not experiment.teacher.file:
        trained = train_teacher(workdir, experiment, splits)

    def load_or_make():
        if found:
            params, _ = checkpoint.load_tree(path)
            print(f"teacher: {path} is there already", flush=True)
            return params
        return _make_backbone(path, experiment, splits, trained)

    return hosts.from_first(load_or_make, experiment.hypernetwork.network.abstract_params())


def _make_backbone(
    path: pathlib.Path, experiment: Experiment, splits: datasets.Splits, trained: Params | None
) -> Params:
    """Folds and orders the `trained` teacher, or one to be imported, and writes it to `path`."""
    if trained is None:
        print(f"teacher: importing {experiment.teacher.file}", flush=True)
        variables = import_teacher(experiment, experiment.teacher.file)
    else:
        variables = trained
    # As many as are looked at during training: thrice the whole split takes longer than all else.
    images, labels = _progress_images(experiment, splits)
    if experiment.teacher.file and len(labels):
        print("teacher: it may have been trained on images of the validation split", flush=True)
    backbone = fold_and_order(experiment, variables, images, labels, splits.train_images)
    checkpoint.save_tree(
        path,
        backbone.params,
        {"spec": experiment.spec.to_dict(), "report": backbone.report},
    )
    return backbone.params


def check_start(
    experiment: Experiment, splits: datasets.Splits, workdir: str | os.PathLike
) -> Params | None:
    """Raises what a run in `workdir` would end in later; returns `load_start`.

    Raises:
        FileNotFoundError, ValueError: for a teacher or a start that cannot be used, steps that the
            training images do not fill, no steps at all, or a split without images.
    """
    recipe, num_images = experiment.recipe, len(splits.train_labels)
    phases = training.phases(experiment.hypernetwork, recipe, num_images=num_images)
    if not phases:
        raise UsageError("The training recipe has no steps; raise train.epochs or train.fit_steps.")
    kinds = {phase.kind for phase in phases} - {"fit"}
    sizes = [training.phase_recipe(recipe, kind).images_per_step for kind in kinds]
    teacher = 0 if experiment.teacher.file else experiment.teacher.batch_size
    check_steps(num_images, train=max(sizes, default=0), teacher=teacher)
    grid.evaluation_split(splits, experiment.evaluation.split)
    data_mesh(experiment)
    check_teacher(experiment, workdir)
    return load_start(experiment)


def check_steps(num_images: int, **images_per_step: int) -> None:
    """Raises ValueError unless `num_images` fill a step of each section of the config."""
    for section, number in images_per_step.items():
        if number > num_images:
            raise UsageError(
                f"A step needs {number} images (batch size times sizes), but the training split "
                f"has {num_images}; lower {section}.batch_size."
            )


def check_teacher(experiment: Experiment, workdir: str | os.PathLike) -> None:
    """Raises ValueError if a run in `workdir` has to import a teacher and cannot."""
    prepared = pathlib.Path(workdir) / BACKBONE_FILE
    if experiment.teacher.file and hosts.is_first() and not prepared.exists():
        import_teacher(experiment, experiment.teacher.file)


def train_inr(
    workdir: Workdir,
    experiment: Experiment,
    splits: datasets.Splits,
    backbone: Params,
    given: Params | None = None,
) -> Params:
    """All phases of INR training, from where the work directory stands; returns the parameters.

    A run that begins starts from the parameters that are `given` (`load_start`), if any.
    """
    hypernetwork, recipe = experiment.hypernetwork, experiment.recipe
    images, mesh = _on_device(splits), data_mesh(experiment)
    phases = training.phases(hypernetwork, recipe, num_images=len(splits.train_labels))
    initialise = functools.partial(
        hyper.init,
        hypernetwork=hypernetwork,
        alpha=recipe.alpha_init,
        from_backbone=recipe.block_init == "teacher",
    )

    def first_state(key, backbone):
        params = initialise(key, backbone=backbone)
        opt_state = training.inr_optimizer(recipe).init(params)
        return training.TrainState(params, opt_state, params if recipe.ema_decay else None)

    key, step_key, num_steps = phase_key(experiment, 1), phase_key(experiment, 2), phases[-1].stop
    part = Part(workdir, experiment.run, "inr", "INR", step_key, images, num_steps, mesh)
    template = jax.eval_shape(first_state, key, backbone)
    start, state = restore(part.saved, template) or (0, None)
    if given is not None:  # blocks are what they are
        phases = tuple(dataclasses.replace(phase, new_blocks=()) for phase in phases)
    if state is not None:
        params = state.result
    elif given is not None:
        params = given
        print(f"INR: starting from {experiment.recipe.init_from}", flush=True)
    else:
        moments = None
        if hypernetwork.inr.needs_moments:
            moments = measure_moments(experiment, backbone, splits.train_images)
        params = jax.jit(initialise)(key, backbone=backbone, moments=moments)
    part.continue_from(start)

    def make_call(kind):
        if kind == "fit":
            update = training.fit_update(hypernetwork, recipe)
        else:
            options = {"unroll": jax.default_backend() != "tpu", "mesh": mesh, "kind": kind}
            update = training.inr_update(
                hypernetwork,
                recipe,
                experiment.preprocessing,
                hypernetwork.forward,
                num_classes=experiment.spec.num_classes,
                **options,
            )
        return part.chunked(update, training.phase_recipe(recipe, kind).images_per_step)

    calls = {kind: make_call(kind) for kind in dict.fromkeys(phase.kind for phase in phases)}
    shown = {
        "fit": ("loss",),
        "train": ("loss", "ce", "accuracy", "full_accuracy"),
        **dict.fromkeys(training.DEPTH_KINDS, ("loss", "ce", "accuracy", "shallow_accuracy")),
    }

    for number, phase in enumerate(phases, 1):
        if start >= phase.stop:
            continue
        if state is None or start <= phase.start:
            state = training.start_phase(params, hypernetwork, recipe, phase)
        inputs = training.phase_inputs(hypernetwork, recipe, phase)

        def evaluate(state, phase=phase, inputs=inputs):
            return _progress_accuracy(experiment, splits, backbone, state.result, inputs, phase)

        def state_before(phase=phase, params=params):
            last = restore(part.saved, template)
            if last and last[0] > phase.start:
                return last
            return phase.start, training.start_phase(params, hypernetwork, recipe, phase)

        def locate(state, step, phase=phase, inputs=inputs):
            family = hypernetwork, recipe, experiment.preprocessing
            seen = step, images, backbone, inputs
            return diagnosis.locate_in_inr(*family, state.params, *seen, kind=phase.kind)

        state = part.run(
            calls[phase.kind],
            state,
            start=max(start, phase.start),
            stop=phase.stop,
            images_per_step=training.phase_recipe(recipe, phase.kind).images_per_step,
            phase=f"[{number}/{len(phases)}] {phase.name}",
            shown=shown[phase.kind],
            rest=(backbone, inputs),
            evaluate=evaluate,
            state_before=state_before,
            locate=locate,
            looks_at_images=phase.kind != "fit",
        )
        params = state.result
    return params


def _progress_accuracy(experiment, splits, backbone, params, inputs, phase) -> dict[str, float]:
    """Validation accuracy of the network as the phase has it, at a few widths.

    In phases of the depth term these are networks with as many blocks skipped as training skips.
    """
    images, labels = _progress_images(experiment, splits)
    if phase.kind == "fit" or not len(labels):
        return {}
    hypernetwork = experiment.hypernetwork
    found = {}
    shallowest = training.shallowest_widths(hypernetwork, experiment.recipe)
    for ratio in experiment.evaluation.progress_ratios:
        widths = hypernetwork.widths(ratio)
        if phase.kind in training.DEPTH_KINDS:
            widths = np.where(np.array(shallowest) == 0, 0, widths)
        tree = _mixed_network(hypernetwork, params, jnp.asarray(widths), backbone, inputs.active)
        found[str(ratio)] = experiment.accuracy(tree, images, labels)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _mixed_network(hypernetwork, params, widths, backbone, active):
    widths = jnp.where(active, widths, jnp.array(hypernetwork.full_widths))
    generated = hyper.generate_tensors(hypernetwork, params["inr"], widths)
    originals = hypernetwork.groups.leaves(backbone)
    return training.mixed_tree(hypernetwork, params, generated, originals, active, widths)


def find_idle(experiment: Experiment, params: Params, splits: datasets.Splits) -> diagnosis.Idle:
    """What of the family does nothing on the first `NUM_IDLE_IMAGES` training images."""
    images = jnp.asarray(splits.train_images[:NUM_IDLE_IMAGES])
    family = experiment.hypernetwork
    smallest = training.smallest_widths(family, experiment.recipe)
    images = experiment.preprocessing.evaluate(images)
    return diagnosis.idle_parts(family, params, images, smallest)


def save_result(workdir: Workdir, experiment: Experiment, params: Params) -> pathlib.Path:
    """Writes the trained INR with what is needed to use it elsewhere; returns the file's path."""
    path = workdir.path / checkpoint.INR_FILE
    if not hosts.is_first():
        return path
    checkpoint.save_inr(
        path,
        experiment.hypernetwork,
        params,
        dataset=experiment.name,
        mean=list(experiment.preprocessing.mean),
        std=list(experiment.preprocessing.std),
        trained_range=list(experiment.trained_range),
    )
    return path


# --- what will happen ------------------------------------------------------------------------


def describe(
    experiment: Experiment,
    dataset: datasets.Dataset,
    splits: datasets.Splits,
    *,
    estimate_time: bool = False,
) -> str:
    """A page on the run before it starts: networks, coordinates, parameters, memory, steps."""
    hypernetwork, recipe, spec = experiment.hypernetwork, experiment.recipe, experiment.spec
    shapes = jax.eval_shape(
        lambda key, tree: hyper.init(key, hypernetwork, tree),
        jax.random.key(0),
        hypernetwork.network.abstract_params(),
    )
    num_inr = hyper.num_inr_params(shapes)
    queries = sum(math.prod(stack.shape[:3]) for stack in hypernetwork.stacks)
    lines = [
        f"data       {dataset.name} {dataset.fingerprint()}: {len(splits.train_labels)} training, "
        f"{len(splits.validation_labels)} validation, {len(splits.test_labels)} test images, "
        f"{dataset.image_size}x{dataset.image_size}x{dataset.channels}, "
        f"{dataset.num_classes} classes",
        f"network    {experiment.network}: {spec.num_params:,} parameters, "
        f"{spec.num_macs / 1e6:.2f} M multiply-adds; elastic groups of channels: "
        f"{len(hypernetwork.names)} of {len(hypernetwork.groups.groups)}",
    ]
    for name, ratio in (("smallest", recipe.min_width_ratio), ("largest", recipe.max_width_ratio)):
        widths = hypernetwork.widths(ratio)
        lines.append(
            f"{name:<10} width ratio {ratio}: {hypernetwork.num_params(widths):,} parameters, "
            f"{hypernetwork.num_macs(widths) / 1e6:.2f} M multiply-adds"
        )
    lines.append(
        f"INR        {describe_inr(hypernetwork.inr)}: {num_inr:,} parameters "
        f"({num_inr / spec.num_params:.2f} networks), {queries:,} queries per network"
    )
    for stack in hypernetwork.stacks:
        count = sum(x.size for x in jax.tree.leaves(shapes["inr"].get(stack.name, {})))
        tensors, rows, columns, outputs = stack.shape
        lines.append(
            f"  {stack.name:<28} {tensors:>2} tensors x {rows:>3} x "
            f"{columns:>3} queries -> {outputs} values  {count:>12,} parameters"
        )
    learned = sum(x.size for x in jax.tree.leaves(shapes["learned"]))
    lines.append(f"learned    {learned:,} parameters outside the INR ({recipe.learned!r} trained)")
    mesh = data_mesh(experiment)
    if mesh is not None:
        lines.append(
            f"devices    {mesh.size} share every batch: {recipe.batch_size // mesh.size} of "
            f"{recipe.batch_size} images of each size"
        )
    phases = training.phases(hypernetwork, recipe, num_images=len(splits.train_labels))
    lines.append(f"steps      {phases[-1].stop if phases else 0} in {len(phases)} phases:")
    for phase in phases:
        lines.append(f"  {phase.name:<20} {phase.stop - phase.start:>8} steps")
    # Parameters, two moments, gradients; activations of one size, forward and backward.
    state = 4 * 4 * (num_inr + learned)
    mlp = hypernetwork.inr
    per_query = getattr(mlp, "hidden_width", 1) * 2 * getattr(mlp, "num_layers", 1)
    maps = 2 * num_values(hypernetwork.network.family)
    activations = 4 * (queries * per_query + recipe.batch_size * maps)
    raw = sum(a.nbytes for a in (splits.train_images, splits.test_images))
    lines.append(
        f"memory     about {(state + activations + raw) / 2**30:.2f} GiB: state "
        f"{state / 2**20:.0f} MiB, activations of one size {activations / 2**20:.0f} MiB, images "
        f"{raw / 2**20:.0f} MiB"
    )
    if estimate_time:
        lines.append(_time_estimate(experiment, phases))
    return "\n".join(lines)


def _time_estimate(experiment: Experiment, phases: Sequence[training.Phase]) -> str:
    """Measures a forward pass and one generation here and adds up what the phases need."""
    spec, recipe, hypernetwork = experiment.spec, experiment.recipe, experiment.hypernetwork
    network = hypernetwork.network
    images = jnp.zeros((recipe.batch_size, *spec.input_shape), experiment.preprocessing.dtype)
    key = jax.random.key(0)
    backbone = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.abstract_params())
    params = jax.jit(lambda key, tree: hyper.init(key, hypernetwork, tree))(key, backbone)
    widths = jnp.array(hypernetwork.full_widths, jnp.int32)
    run = jax.jit(network.apply)
    generate = jax.jit(lambda params, widths: hyper.generate(hypernetwork, params, widths))
    seconds = timing.fewest(
        {
            "forward": lambda: run(backbone, images),
            "generation": lambda: generate(params, widths),
        },
        3,
    )
    forward, generation = seconds["forward"], seconds["generation"]
    # A backward pass costs about two forward passes; measured 3.0 to 4.5 in all on two cores.
    total = 0.0
    for phase in phases:
        step = 4 * generation
        if phase.kind != "fit":
            num_sizes = training.phase_recipe(recipe, phase.kind).num_sizes
            targets = bool(recipe.distillation_weight)
            step = num_sizes * (4 * (forward + generation) + targets * forward)
        total += (phase.stop - phase.start) * step
    minutes = total / 60
    return (
        f"time       about {minutes:.1f} minutes for the INR on this device (forward pass of "
        f"{recipe.batch_size} images {1e3 * forward:.1f} ms, generation {1e3 * generation:.1f} ms; "
        "estimated from these, compilation and teacher not included)"
    )


def quiet_logging() -> None:
    """This package's messages on standard error; orbax and absl only from errors on."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("neumeta_jax").setLevel(logging.INFO)
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
