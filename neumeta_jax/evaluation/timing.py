"""The one timer: seconds of calls that are waited for, after compilation, in turns."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

K = TypeVar("K")


def timed(function: Callable, *args: Any) -> tuple[float, Any]:
    """(seconds, result) of one call, which has ended on the device too."""
    started = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - started, result


def compiled(function: Callable, *args: Any) -> tuple[float, jax.stages.Compiled]:
    """Seconds of tracing and compiling `function`, jitted or not, for `args`, and the program."""
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    return timed(lambda: jitted.lower(*args).compile())


def in_turns(
    calls: Mapping[K, Callable[[], Any]],
    rounds: int,
    *,
    seconds: float = 0.0,
    warm_up: int = 1,
    seed: int = 0,
) -> dict[K, list[float]]:
    """Seconds of the calls of each function, one of each in turn.

    The order is drawn anew for each round, so that what else the machine does, and whether it
    becomes slower or faster, hits all alike.

    Args:
        calls: functions by name; they return what is to be waited for.
        rounds: calls of each; more follow until all together have taken this many `seconds`.
        warm_up: calls of each before, which do not count: the first one compiles.
        seed: of the order.
    """
    for call in calls.values():
        for _ in range(warm_up):
            jax.block_until_ready(call())
    rng, keys = np.random.default_rng(seed), list(calls)
    times: dict[K, list[float]] = {key: [] for key in keys}
    done, total = 0, 0.0
    while done < rounds or total < seconds:
        for number in rng.permutation(len(keys)):
            elapsed, _ = timed(calls[keys[number]])
            times[keys[number]].append(elapsed)
            total += elapsed
        done += 1
    return times


def fewest(
    calls: Mapping[K, Callable[[], Any]], rounds: int, *, warm_up: int = 1
) -> dict[K, float]:
    """The fewest seconds of each function in `in_turns`: those that nothing else disturbed."""
    return {key: min(times) for key, times in in_turns(calls, rounds, warm_up=warm_up).items()}
