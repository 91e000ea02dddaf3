"""Work directories: made by train.py with one config, for one process, and opened by all others."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from neumeta_jax.data import datasets
from neumeta_jax.errors import Interrupted, UsageError, check
from neumeta_jax.files import provenance, storage
from neumeta_jax.networks import saved
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.families import Family
from neumeta_jax.runs import config as configs, hosts, recipes
from neumeta_jax.runs.config import Experiment
from neumeta_jax.runs.logs import Metrics

# What a run leaves in its work directory before there is anything that cost work.
_EARLY_FILES = {"config.json", "versions.json", "lock", "metrics.jsonl", "tensorboard"}


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The config that `workdir` was made with.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is damaged.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} must be the work directory of a training run, but it has no config.json."
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UsageError(f"{path} must be JSON; it is damaged, restore or remove it.") from None
    check(
        isinstance(config, dict),
        f"{path} must hold a config; it is damaged, restore or remove it.",
    )
    with configs.reading():
        return recipes.completed(config)


def check_same_config(path: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the fields that differ, if another config made `path`.

    Fields that an earlier version did not have count as their defaults, see `recipes.completed`.
    """
    pair = json.loads(json.dumps((read_config(path), recipes.completed(config))))
    differing = provenance.differences(*storage.local(pair, "config"))
    check(
        not differing,
        f"{path} was written by another config; these fields differ: {', '.join(differing)}; "
        "use the saved values or another --workdir.",
    )


def check_same_data(workdir: pathlib.Path, fingerprint: str) -> None:
    """Raises ValueError if the run in `workdir` was made with another data set, where it says."""
    try:
        made_with = json.loads((workdir / "versions.json").read_text("utf-8"))["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    check(
        not made_with or not fingerprint or made_with == fingerprint,
        f"The data must be those that the run in {workdir} was made with, of fingerprint "
        f"{made_with}, but those here have {fingerprint}; use the former, or evaluate others with "
        "neumeta eval --out=FOLDER.",
    )


# --- a run that trains -----------------------------------------------------------------------


@dataclasses.dataclass
class Workdir:
    """The directory of a run that trains: config, versions, metrics, checkpoints, results."""

    path: pathlib.Path
    metrics: Metrics
    stop_requested: bool = False

    def check_stop(self, step: int) -> None:
        """Raises `Interrupted` if the process was asked to stop."""
        if self.stop_requested:
            raise Interrupted(f"stopped at step {step}; the same command continues from there.")


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
    path: str | os.PathLike,
    config: Mapping[str, Any],
    fingerprint: str = "",
    *,
    tensorboard: bool = False,
) -> Iterator[Workdir]:
    """Opens or creates the work directory of a run with `config`, for this process alone.

    Its versions.json keeps the `fingerprint` of the data set; `tensorboard` is of `Metrics`. While
    it is open, SIGTERM and SIGINT ask the run to save and stop. Of several processes the first
    alone opens it.

    Raises:
        ValueError: if a run with another config has saved something in the directory (naming the
            fields that differ), or with other data, or another process is using it.
    """
    path = pathlib.Path(path)
    with contextlib.ExitStack() as stack:
        if hosts.is_first():
            stack.enter_context(storage.locked(path))
            if check_claim(path, config):
                check_same_data(path, fingerprint)
            else:
                storage.write_json(path / "config.json", config)
            versions = {**provenance.versions(), "data": fingerprint}
            storage.write_json(path / "versions.json", versions)
        metrics = Metrics(path if hosts.is_first() else None, tensorboard=tensorboard)
        workdir = Workdir(path, stack.enter_context(contextlib.closing(metrics)))
        stack.enter_context(_stopped_by_signals(workdir))
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


# --- a run that has trained ------------------------------------------------------------------


class TrainedRun(NamedTuple):
    """A work directory with a trained INR: what eval, search, export and latency begin with."""

    workdir: pathlib.Path
    config: dict[str, Any]
    hypernetwork: Family
    params: Params
    metadata: dict[str, Any]

    def load(self, *, other_data: bool = False) -> tuple[Experiment, datasets.Splits]:
        """The experiment and its data; with `other_data` they need not be those of training.

        Raises:
            ValueError: if the INR is of other networks than the config, or the data have changed.
        """
        dataset, splits = configs.load_data(self.config)
        experiment = self._experiment(self.config, dataset)
        if not other_data:
            check_same_data(self.workdir, experiment.fingerprint)
        return experiment, splits

    def without_data(self, num_images: int) -> tuple[Experiment, datasets.Splits]:
        """The experiment with as many random images in place of each split of its data."""
        spec, rng = self.hypernetwork.spec, np.random.default_rng(0)
        pixels = rng.integers(0, 256, (num_images, *spec.input_shape), np.uint8)
        split = pixels, np.zeros(num_images, int)
        name, known = self.config["data"]["name"], {"mean", "std"} & set(self.metadata)
        section = self.config["data"] | {field: self.metadata[field] for field in known}
        check(
            section["mean"] or name in datasets.NORMALIZATION,
            f"The mean of {name} is not known without it; name it by --data_dir.",
        )
        dataset = datasets.make_dataset(name, *split, *split, num_classes=spec.num_classes)
        experiment = self._experiment(self.config | {"data": section}, dataset)
        return experiment, datasets.split_validation(dataset, num_validation=0, seed=0)

    def _experiment(self, config: Mapping[str, Any], dataset: datasets.Dataset) -> Experiment:
        experiment = configs.from_config(config, dataset)
        check(
            self.hypernetwork == experiment.hypernetwork,
            "The saved INR must generate the networks of the work directory's config, but it "
            f"generates {self.hypernetwork.spec} and the config asks for {experiment.spec}; one of "
            "them was replaced.",
        )
        return experiment


def open_run(config: Mapping[str, Any], options: Any) -> TrainedRun:
    """The run in `options.workdir`, which `config`, unless empty, must have made.

    Where there is no such folder and it has the name of a pretrained INR, it is made of that. The
    data are looked for in `options.data_dir`, if it has one.
    """
    workdir = pathlib.Path(options.workdir)
    if not workdir.exists() and workdir.name in saved.pretrained():
        with storage.locked(workdir):
            saved.unpack(workdir.name, workdir)
    made_with = read_config(workdir)
    if config:
        check_same_config(workdir, config)
    if getattr(options, "data_dir", ""):
        made_with["data"]["dir"] = options.data_dir
    return TrainedRun(workdir, made_with, *saved.load_inr(workdir))
