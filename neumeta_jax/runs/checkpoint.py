"""Checkpoints of a running part (orbax): they appear whole or not at all, newest ones are kept."""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from neumeta_jax.files import storage, trees

# Orbax takes a quarter of the time of all imports. A run that starts needs it at its first save.
if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_log = logging.getLogger(__name__)


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
                    trees.reason(error),
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
