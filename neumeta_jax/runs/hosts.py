"""Several processes, on as many machines, that train one run together.

    python train.py ... --distributed                      # on every worker of a TPU pod
    python train.py ... --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0

Every process runs the same command, and the devices of all of them share the batches. The first
process alone prints, and alone reads and writes the work directory: what it finds there is told to
the others, which need the data set on their own machines but no shared disk.

Without these flags nothing here starts: `jax.distributed` is not touched by a run on one host.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from neumeta_jax.errors import INTERRUPTED, USAGE_ERROR, Interrupted, UsageError, check

START_SECONDS = 300  # how long a process waits for the others
END_SECONDS = 24 * 3600  # the others wait while the first one evaluates


def is_first() -> bool:
    """True for the process that owns the work directory."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(
    *,
    distributed: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """Joins the other processes if a flag asks for it; the body is what they do together.

    A process that loses another, which is only noticed in the next step that they share, ends with
    one sentence and status 75: the same command on every host continues.

    Raises:
        UsageError: if the flags do not fit together, or the others do not come in time.
        Interrupted: if another process is gone.
    """
    named = (coordinator_address, num_processes, process_id)
    if not distributed and named == (None, None, None):
        yield
        return
    _start(*named)
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
        except Interrupted:
            raise  # agreed by all
        except jax.errors.JaxRuntimeError as error:
            _leave_without_the_others(INTERRUPTED)
            reason = str(error).splitlines()[0][:200]
            raise Interrupted(
                f"another process of this run is gone, or cannot be reached ({reason}); start the "
                "same command on every host again, and it continues from the last checkpoint."
            ) from error
        except Exception:
            _leave_without_the_others(USAGE_ERROR)
            raise


def _start(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    if address is None:
        check(
            num_processes is None and process_id is None,
            "--num_processes and --process_id need --coordinator_address=HOST:PORT.",
        )
    elif num_processes is None or process_id is None or ":" not in address:
        raise UsageError(
            "--coordinator_address=HOST:PORT needs --num_processes and --process_id, got "
            f"{address}, {num_processes} and {process_id}."
        )
    else:
        check(
            0 <= process_id < num_processes,
            f"--process_id counts from 0 to {num_processes - 1}, got {process_id}; start the "
            "processes with different ones.",
        )
    where = f"{num_processes} processes at {address}" if address else "the other workers"
    hint = f"start the same command on every host within {START_SECONDS} s"
    print(f"waiting for {where}; {hint}", flush=True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=START_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UsageError(f"{where} did not come together ({reason}); {hint}.") from error


def _leave_without_the_others(status: int) -> None:
    """At the exit, leaves at once: JAX would wait for processes that cannot come any more."""

    def leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)  # before JAX's own, which was registered earlier


def any_process(flag: bool) -> bool:
    """True if `flag` is true in any process; all of them must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_first(make: Callable[[], Any], template: Any) -> Any:
    """`make()` of the first process, in all of them and bit for bit; all of them must ask.

    Args:
        make: called by the first process only.
        template: a tree of the same structure, shapes and types.
    """
    if jax.process_count() == 1:
        return make()
    leaves, treedef = jax.tree.flatten(template)
    shapes = [(np.shape(leaf), np.dtype(leaf.dtype)) for leaf in leaves]
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes]
    words = np.zeros(-(-sum(sizes) // 4), np.uint32)  # sums of these are exact, -0.0 included
    if is_first():
        content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(make()))
        words = np.frombuffer(content.ljust(4 * len(words), b"\0"), np.uint32)
    content = np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes()
    values, start = [], 0
    for (shape, dtype), size in zip(shapes, sizes, strict=True):
        values.append(np.frombuffer(content[start : start + size], dtype).reshape(shape))
        start += size
    return jax.tree.unflatten(treedef, values)
