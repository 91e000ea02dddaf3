"""What outlives a process: checkpoints of a running phase (orbax) and finished trees (safetensors).

Both can be read without running code from the file, and appear whole or not at all.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import describe_inr, make_inr
from neumeta_jax.files import storage
from neumeta_jax.networks import families
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.families import Family

# Orbax takes a quarter of the time of all imports. A run that starts needs it at its first save.
if TYPE_CHECKING:
    import orbax.checkpoint as ocp

INR_FILE = "inr.safetensors"
PRETRAINED = pathlib.Path(__file__).resolve().parents[1] / "pretrained"
FORMAT = "neumeta-jax 2"
_OLD_FORMAT = "neumeta-jax 1"  # without a checksum
_CHECKSUM = "sha256"

_log = logging.getLogger(__name__)


# --- finished trees --------------------------------------------------------------------------


def save_tree(path: str | os.PathLike, tree: Mapping, metadata: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays and JSON `metadata` as safetensors, atomically.

    Raises:
        StorageError: if the disk is full, the folder read-only, ...; an old file is still there.
    """
    flat = {
        # Not `np.ascontiguousarray`, which makes vectors of scalars.
        "/".join(entry.key for entry in keys): np.asarray(leaf, order="C")
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    fields = dict(metadata)
    fields[_CHECKSUM] = _file_digest(flat, fields)
    # One entry: safetensors writes several in any order, and equal trees should be equal files.
    header = {FORMAT: json.dumps(fields, sort_keys=True)}
    with storage.replacing(path) as partial:
        safetensors.numpy.save_file(flat, partial, metadata=header)


def _file_digest(flat: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    """sha256 over all that `save_tree` writes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(flat):
        array = flat[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def load_tree(path: str | os.PathLike) -> tuple[Params, dict[str, Any]]:
    """The (tree, metadata) of `save_tree`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or is not one of ours.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; train.py writes it when it is done.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = dict(file.metadata() or {})
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        storage.check_is_damage(path, error)
        raise ValueError(
            f"{path} must be a complete safetensors file, but reading it failed ({error}); write "
            "it again."
        ) from error
    if FORMAT not in header and _OLD_FORMAT not in header:
        raise ValueError(
            f"{path} must be written by this software (format {FORMAT!r}); it is some other "
            "safetensors file."
        )
    tree: dict[str, Any] = {}
    try:
        metadata = json.loads(header[FORMAT if FORMAT in header else _OLD_FORMAT])
        checksum = metadata.pop(_CHECKSUM, None)
        if FORMAT in header and checksum != _file_digest(flat, metadata):
            raise ValueError("its checksum does not match")
        for name, value in flat.items():
            node = tree
            *parents, leaf = name.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            if leaf in node:
                raise ValueError("it has a tensor where others need a folder")
            node[leaf] = value
    except Exception as error:  # no JSON, no dict, a number too deep for the parser, ...
        storage.check_is_damage(path, error)
        raise ValueError(
            f"{path} must be as it was written, but it is damaged ({_reason(error)}); restore it "
            "or write it again."
        ) from error
    return jax.device_put(tree), metadata


def _reason(error: Exception) -> str:
    """The first line of an error, for a sentence."""
    lines = str(error).splitlines()
    line = lines[0].rstrip(".")[:200] if lines else type(error).__name__
    return line if line.isprintable() else ascii(line)[1:-1]  # it may quote the file


def save_inr(
    path: str | os.PathLike, hypernetwork: Family, params: Mapping, **metadata: Any
) -> None:
    """Writes a trained INR with all that `load_inr` needs to generate networks from it."""
    fields = {
        **hypernetwork.describe(),
        "inr": describe_inr(hypernetwork.inr),
    }
    save_tree(path, params, {**fields, **metadata})


def save_compact(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Writes the trained INR of `source`, a work directory or a file, again in half its bytes.

    Numbers are rounded to bfloat16, but for second moments, whose inverse is taken.
    """
    hypernetwork, params, metadata = load_inr(source)

    def rounded(keys, leaf):
        return leaf if keys[-1].key == "moments" else leaf.astype(jnp.bfloat16)

    save_inr(path, hypernetwork, jax.tree_util.tree_map_with_path(rounded, params), **metadata)


def pretrained() -> list[str]:
    """The names of the trained INRs that come with the package; each has a page beside it.

    >>> "cifar100-resnet56" in pretrained()
    True
    """
    return sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))


def unpack(name: str, workdir: pathlib.Path) -> None:
    """Puts a `pretrained` INR and the config that trained it into a work directory."""
    for suffix, target in ((".safetensors", INR_FILE), (".json", "config.json")):
        with storage.replacing(workdir / target) as partial:
            shutil.copyfile(PRETRAINED / f"{name}{suffix}", partial)


def load(name: str) -> tuple[Family, Params, dict[str, Any]]:
    """`load_inr`; `name` is one of `pretrained()`, a work directory of train.py, or a file."""
    return load_inr(name)


def load_inr(path: str | os.PathLike) -> tuple[Family, Params, dict[str, Any]]:
    """The (hypernetwork, params, metadata) of a trained INR; parameters are float32.

    `path` is a work directory of train.py, the file `inr.safetensors` in it, or the name of one of
    the `pretrained` INRs.

    Raises:
        FileNotFoundError, ValueError: as `load_tree`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / INR_FILE
    elif not path.exists() and str(path) in pretrained():
        path = PRETRAINED / f"{path}.safetensors"
    params, metadata = load_tree(path)
    params.setdefault("learned", {})  # nothing, where everything is generated
    kinds = {"spec", "blocks", "inr"}, {"network", "names", "inr"}
    if not any(kind <= set(metadata) for kind in kinds):
        missing = sorted(kinds["network" in metadata] - set(metadata))
        raise ValueError(f"{path} must hold a trained INR, but its header lacks {missing}.")
    try:
        inr = make_inr(**metadata.pop("inr"))
        families.check_numbers(describe_inr(inr).values())
        hypernetwork = families.from_description(metadata, inr)
        for name in hypernetwork.describe():
            del metadata[name]
        # Whatever the caller asks of JAX, an error within is the header's.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            _check_shapes(hypernetwork, params)
    except Exception as error:  # a header may hold anything
        storage.check_is_damage(path, error)
        raise ValueError(
            f"{path} must hold a trained INR, but its header or its tensors fit none "
            f"({_reason(error)}); train it again."
        ) from error
    return hypernetwork, jax.tree.map(lambda x: x.astype(jnp.float32), params), metadata


def _check_shapes(hypernetwork: Family, params: Mapping) -> None:
    """Raises ValueError unless `params` are those of `hypernetwork`."""
    wanted = jax.eval_shape(
        lambda tree: hyper.init(jax.random.key(0), hypernetwork, tree),
        hypernetwork.network.abstract_params(),
    )
    if difference := first_difference(params, wanted):
        raise ValueError(difference)


def first_difference(given: Any, wanted: Any) -> str:
    """Which array of a tree has another shape than in the tree `wanted`, "" if none has."""
    given, wanted = (
        {"/".join(entry.key for entry in keys): leaf.shape for keys, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (given, wanted))
    )
    for name in sorted(set(wanted) | set(given)):
        if wanted.get(name) != given.get(name):
            return (
                f"{name[:80]} has the shape {given.get(name)}, where {wanted.get(name)} is needed"
            )
    return ""


# --- checkpoints of a running phase ----------------------------------------------------------


def _digest(tree: Any) -> str:
    """sha256 over the bytes of all leaves; finds damage that still decodes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that takes calls after its end: nobody waits for them any more."""

    def call_soon_threadsafe(self, callback, *args, context=None):
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            return asyncio.Handle(callback, args, self, context)


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self):
        return _PatientLoop()


@contextlib.contextmanager
def _patient_loops() -> Iterator[None]:
    """Has orbax run in loops that it may close early.

    It does at the first array that it cannot read or write, when those of the others are still in
    the hands of tensorstore, whose threads then report to a loop that is gone.
    """
    previous = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(previous)


def _set_aside(directory: pathlib.Path) -> None:
    """Renames a damaged checkpoint to "<step>.damaged", or "<step>.damaged2" and so on."""
    names = (f"{directory.name}.damaged{n if n > 1 else ''}" for n in itertools.count(1))
    free = next(name for name in names if not directory.with_name(name).exists())
    directory.rename(directory.with_name(free))


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The newest `keep` states of a phase in `directory`, one per step.

    A save is complete before the call returns, so that the caller may donate the state's buffers.
    """

    directory: pathlib.Path
    keep: int = 2

    def _manager(self) -> "ocp.CheckpointManager":
        import orbax.checkpoint as ocp

        directory = pathlib.Path(self.directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        # Of several processes the first alone comes here; it may not wait for the others.
        alone = {jax.process_index()} if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep,
            enable_async_checkpointing=False,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=alone),
        )
        return ocp.CheckpointManager(directory, options=options)

    def steps(self) -> list[int]:
        """Steps that were saved, ascending, whether intact or not."""
        directory = pathlib.Path(self.directory)
        if not directory.is_dir():
            return []
        return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())

    def save(self, step: int, state: Any) -> None:
        """Saves the pytree `state` under `step` and then drops what is older than `keep` saves.

        Raises:
            StorageError: if the disk is full, the folder read-only, ...; earlier saves are kept.
        """
        import orbax.checkpoint as ocp

        directory = pathlib.Path(self.directory) / str(step)
        # Orbax would have all processes write their part of arrays that lie on devices.
        state = jax.tree.map(np.asarray, state)
        earlier = [n for n in self.steps() if n != step]
        kept = f"the checkpoint of step {earlier[-1]} is kept" if earlier else ""
        try:
            if directory.exists():
                _set_aside(directory)  # a damaged one that a resumed run has reached again
            with _patient_loops(), self._manager() as manager:
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        meta=ocp.args.JsonSave({"sha256": _digest(state)}),
                    ),
                    force=True,  # also where a damaged, later one is still there
                )
        except Exception as error:  # orbax and tensorstore have their own names for a full disk
            if storage.system_error(error) is None:
                raise
            raise storage.refusal(directory, error, kept=kept) from error

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """The newest intact (step, state), or None where nothing was saved.

        A damaged checkpoint is named in a warning and the one before is tried. Once an intact one
        is found, damaged ones are renamed to "<step>.damaged", so that no later save drops them.

        Args:
            template: a pytree of arrays or `jax.ShapeDtypeStruct` with the state's structure.

        Raises:
            ValueError: if there are checkpoints and none is intact.
            StorageError: if the system does not let them be read.
        """
        steps = self.steps()
        if not steps:
            return None
        import orbax.checkpoint as ocp

        # On the host: not on the devices that it was saved from, which may not be here.
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
        damaged = []
        for step in reversed(steps):
            try:
                with _patient_loops(), self._manager() as manager:
                    restored = manager.restore(
                        step,
                        args=ocp.args.Composite(
                            state=ocp.args.StandardRestore(abstract),
                            meta=ocp.args.JsonRestore(),
                        ),
                    )
                if _digest(restored["state"]) != restored["meta"]["sha256"]:
                    raise ValueError("its checksum does not match")
            except Exception as error:  # whatever a damaged file makes the readers raise
                storage.check_is_damage(self.directory, error)
                damaged.append(pathlib.Path(self.directory) / str(step))
                _log.warning(
                    "checkpoint %s is damaged (%s); falling back to the one before it",
                    damaged[-1],
                    _reason(error),
                )
                continue
            with contextlib.suppress(OSError):  # a folder that can only be read
                for directory in damaged:
                    _set_aside(directory)
            # Orbax commits arrays to a device, which would compile every program a second time.
            state = jax.tree.map(np.asarray, restored["state"])
            return step, jax.device_put(state, may_alias=False)
        raise ValueError(
            f"{self.directory} holds checkpoints of steps {steps}, but none of them is intact; "
            "move the directory away to start over."
        )
