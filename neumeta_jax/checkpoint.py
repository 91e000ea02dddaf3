"""What outlives a process: checkpoints of a running phase (orbax) and finished trees (safetensors).

Both can be read without running code from the file, and appear whole or not at all.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from neumeta_jax.architecture import ResNetSpec
from neumeta_jax.hypernetwork import Hypernetwork
from neumeta_jax.inr import describe_inr, make_inr
from neumeta_jax.resnet import Params

# Orbax takes a quarter of the time of all imports. A run that starts needs it at its first save.
if TYPE_CHECKING:
    import orbax.checkpoint as ocp

INR_FILE = "inr.safetensors"
FORMAT = "neumeta-jax 1"

_log = logging.getLogger(__name__)


# --- finished trees --------------------------------------------------------------------------


def save_tree(path: str | os.PathLike, tree: Mapping, metadata: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays and JSON `metadata` as safetensors, atomically."""
    path = pathlib.Path(path)
    flat = {
        "/".join(entry.key for entry in keys): np.ascontiguousarray(leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    # One entry: safetensors writes several in any order, and equal trees should be equal files.
    header = {FORMAT: json.dumps(dict(metadata), sort_keys=True)}
    partial = path.with_name(path.name + ".partial")
    safetensors.numpy.save_file(flat, partial, metadata=header)
    partial.replace(path)


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
        raise ValueError(
            f"{path} must be a complete safetensors file, but reading it failed ({error}); write "
            "it again."
        ) from error
    if FORMAT not in header:
        raise ValueError(
            f"{path} must be written by this software (format {FORMAT!r}); it is some other "
            "safetensors file."
        )
    tree: Params = {}
    for name, value in flat.items():
        node = tree
        *parents, leaf = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(value)
    return tree, json.loads(header[FORMAT])


def save_inr(
    path: str | os.PathLike, hypernetwork: Hypernetwork, params: Mapping, **metadata: Any
) -> None:
    """Writes a trained INR with all that `load_inr` needs to generate networks from it."""
    fields = {
        "spec": hypernetwork.spec.to_dict(),
        "blocks": list(hypernetwork.blocks),
        "inr": describe_inr(hypernetwork.inr),
    }
    save_tree(path, params, {**fields, **metadata})


def load_inr(path: str | os.PathLike) -> tuple[Hypernetwork, Params, dict[str, Any]]:
    """The (hypernetwork, params, metadata) of a trained INR.

    `path` is a work directory of train.py or the file `inr.safetensors` in it.

    Raises:
        FileNotFoundError, ValueError: as `load_tree`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / INR_FILE
    params, metadata = load_tree(path)
    missing = {"spec", "blocks", "inr"} - set(metadata)
    if missing:
        raise ValueError(f"{path} must hold a trained INR, but its header lacks {sorted(missing)}.")
    hypernetwork = Hypernetwork(
        spec=ResNetSpec.from_dict(metadata.pop("spec")),
        blocks=tuple(metadata.pop("blocks")),
        inr=make_inr(**metadata.pop("inr")),
    )
    return hypernetwork, params, metadata


# --- checkpoints of a running phase ----------------------------------------------------------


def _digest(tree: Any) -> str:
    """sha256 over the bytes of all leaves; finds damage that still decodes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The newest `keep` states of a phase in `directory`, one per step.

    A save is complete before the call returns, so that the caller may donate the state's buffers.
    """

    directory: pathlib.Path
    keep: int = 2

    def _manager(self) -> "ocp.CheckpointManager":
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep, enable_async_checkpointing=False, create=True
        )
        return ocp.CheckpointManager(pathlib.Path(self.directory).absolute(), options=options)

    def steps(self) -> list[int]:
        """Steps that were saved, ascending, whether intact or not."""
        directory = pathlib.Path(self.directory)
        if not directory.is_dir():
            return []
        return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())

    def save(self, step: int, state: Any) -> None:
        """Saves the pytree `state` under `step` and then drops what is older than `keep` saves."""
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            if step in manager.all_steps():
                manager.delete(step)  # a damaged one that a resumed run has reached again
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave({"sha256": _digest(state)}),
                ),
                force=True,  # also where a damaged, later one is still there
            )

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """The newest intact (step, state), or None where nothing was saved.

        A damaged checkpoint is named in a warning and left where it is; the one before is tried.

        Args:
            template: a pytree of arrays or `jax.ShapeDtypeStruct` with the state's structure.

        Raises:
            ValueError: if there are checkpoints and none is intact.
        """
        steps = self.steps()
        if not steps:
            return None
        import orbax.checkpoint as ocp

        # Not the devices that it was saved from, which this process may not have.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), template
        )
        for step in reversed(steps):
            try:
                with self._manager() as manager:
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
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                _log.warning(
                    "checkpoint %s is damaged (%s); falling back to the one before it",
                    pathlib.Path(self.directory) / str(step),
                    reason[:200],
                )
                continue
            # Orbax commits arrays to a device, which would compile every program a second time.
            return step, jax.tree.map(lambda x: jnp.array(np.asarray(x)), restored["state"])
        raise ValueError(
            f"{self.directory} holds checkpoints of steps {steps}, but none of them is intact; "
            "move the directory away to start over."
        )
