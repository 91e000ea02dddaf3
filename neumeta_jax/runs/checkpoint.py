"""Checkpoints of a running part: whole or not at all, and checked when they are read."""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
from typing import Any

import jax

from neumeta_jax.errors import check
from neumeta_jax.files import storage, trees

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The newest `keep` states of a part in `directory`, one file per step (`trees.save_tree`).

    A save is complete before the call returns, so that the caller may donate the state's buffers.
    """

    directory: pathlib.Path
    keep: int = 2

    def path(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.safetensors"

    def steps(self) -> list[int]:
        """Steps that were saved, ascending, whether intact or not."""
        there = self.directory.iterdir() if self.directory.is_dir() else ()
        names = [path.stem for path in there if path.suffix == ".safetensors"]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, state: Any) -> None:
        """Saves the pytree `state` under `step` and then drops what is older than `keep` saves.

        Raises:
            StorageError: if the disk is full, the folder read-only, ...; earlier saves are kept.
        """
        earlier = [n for n in self.steps() if n != step]
        try:
            with storage.writing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            leaves = {_name(n): leaf for n, leaf in enumerate(jax.tree.leaves(state))}
            trees.save_tree(self.path(step), leaves, {"leaves": _describe(state)})
        except storage.StorageError as error:
            kept = f"the checkpoint of step {earlier[-1]} is kept" if earlier else ""
            cause = error.__cause__
            cause = cause if isinstance(cause, Exception) else error
            raise storage.refusal(self.path(step), cause, kept=kept) from error
        for old in self.steps()[: -self.keep]:
            with storage.writing(self.directory):
                self.path(old).unlink()

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
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                found, metadata = trees.load_tree(self.path(step))
                if metadata.get("leaves") != _describe(template):
                    raise ValueError("it is of another state")
            except ValueError as error:
                damaged.append(self.path(step))
                message = "checkpoint %s is damaged (%s); falling back to the one before it"
                _log.warning(message, damaged[-1], trees.reason(error))
                continue
            with contextlib.suppress(OSError):  # a folder that can only be read
                for path in damaged:
                    _set_aside(path)
            # In buffers of its own, which a step may take: those of the file may be NumPy's.
            leaves = [jax.device_put(found[name], may_alias=False) for name in sorted(found)]
            return step, jax.tree.unflatten(jax.tree.structure(template), leaves)
        check(
            not steps,
            f"{self.directory} holds checkpoints of steps {steps}, but none of them is intact; "
            "move the directory away to start over.",
        )
        there = list(self.directory.glob("*/state"))
        check(
            not there,
            f"{self.directory} must hold checkpoints of this version, but has {len(there)} that an "
            "earlier one wrote with orbax; finish the run with that one, or move them away to "
            "start over.",
        )
        return None


def _name(number: int) -> str:
    return f"{number:06}"  # in the order of their numbers


def _describe(state: Any) -> list[list]:
    """[[path, shape, type]] of all leaves, as JSON has it."""
    return [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]


def _set_aside(path: pathlib.Path) -> None:
    """Renames a damaged checkpoint to "<step>.damaged", or "<step>.damaged2" and so on."""
    names = (f"{path.stem}.damaged{n if n > 1 else ''}" for n in itertools.count(1))
    free = next(name for name in names if not path.with_name(name).exists())
    path.rename(path.with_name(free))
