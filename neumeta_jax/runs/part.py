"""A part of a run, its teacher's training or its INR's: steps, checkpoints, metrics, progress."""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core.devices import on_default_device
from neumeta_jax.core.update import TrainState
from neumeta_jax.data.preprocessing import Images
from neumeta_jax.errors import UsageError, check
from neumeta_jax.runs import checkpoint, diagnosis, hosts, recipes
from neumeta_jax.runs.logs import Progress
from neumeta_jax.runs.loop import NonFiniteLossError, Steps
from neumeta_jax.runs.workdir import Workdir

MAX_PROFILED = 1000  # steps; no browser opens the trace of many more

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps `start`..`stop` - 1 of a part, of which JAX's profiler writes a trace."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str, num_steps: int) -> "Profile":
        """The steps that --profile=START:STOP asks for, of a part with `num_steps`.

        >>> Profile.parse("10:15", 100)
        Profile(start=10, stop=15)
        """
        try:
            start, stop = map(int, text.split(":"))
        except ValueError:
            raise UsageError(f"--profile takes two steps, START:STOP, got {text!r}.") from None
        check(
            0 <= start < stop <= num_steps and stop - start <= MAX_PROFILED,
            f"--profile=START:STOP needs 0 <= START < STOP <= {num_steps}, the steps of the INR's "
            f"training, and at most {MAX_PROFILED} of them, got {text}.",
        )
        return cls(start, stop)

    def spans(
        self, start: int, stop: int, folder: pathlib.Path
    ) -> Iterator[tuple[int, int, AbstractContextManager]]:
        """Splits start..stop into (first, last, what to run its steps within)."""
        cuts = [start, *(n for n in (self.start, self.stop) if start < n < stop), stop]
        for first, last in itertools.pairwise(cuts):
            profiled = self.start <= first < self.stop and hosts.is_first()
            yield first, last, _traced(folder, first, last) if profiled else nullcontext()


@contextmanager
def _traced(folder: pathlib.Path, first: int, last: int) -> Iterator[None]:
    folder = folder / f"steps_{first}_{last}"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would be nearly all of it
    with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
        yield
    path = max(folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    print(
        f"profile of steps {first} to {last - 1}: {path}; open it in a browser at "
        "https://ui.perfetto.dev",
        flush=True,
    )


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps `start`..`stop` - 1 of a part, which share an update.

    Attributes:
        title: for progress.
        steps: of their update; `rest` makes its last arguments. Phases that share it share a
            program.
        begin: the state before `start`, of what the phase before ended with.
        locate: where a step that is not finite goes wrong, of the state before it; "" if unknown.
        shown: metrics that progress shows.
        evaluate: validation accuracies in [0, 1] of a state, by name.
        looks_at_images: whether progress counts images.
    """

    title: str
    start: int
    stop: int
    steps: Steps
    begin: Callable[[Any], TrainState]
    locate: Callable[[TrainState, diagnosis.Step], str]
    rest: Callable[[], tuple] = tuple
    shown: Sequence[str] = ("loss", "accuracy")
    evaluate: Callable[[TrainState], dict[str, float]] = lambda _: {}
    looks_at_images: bool = True


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run, and what all its steps share.

    Attributes:
        workdir, settings: of the run.
        name: "teacher" or "inr", for checkpoints and metrics; `title` is for people.
        key: PRNG key of the steps.
        images: of the training split.
        num_steps: of the part.
        mesh: the devices that share out the batches, see `devices.data_mesh`.
        profile: the steps to be profiled, if any.
    """

    workdir: Workdir
    settings: recipes.Run
    name: str
    title: str
    key: jax.Array
    images: Images
    num_steps: int
    mesh: jax.sharding.Mesh | None = None
    profile: Profile | None = None

    @property
    def saved(self) -> checkpoint.Checkpoints:
        return checkpoint.Checkpoints(self.workdir.path / "checkpoints" / self.name)

    def restore(self, template: TrainState) -> tuple[int, TrainState] | None:
        """The newest checkpoint, read by the first process for all of them."""
        if jax.process_count() == 1:
            return self.saved.restore(template)
        found = self.saved.restore(template) if hosts.is_first() else None
        step = int(hosts.from_first(lambda: np.int32(found[0] if found else -1), np.int32(0)))
        if step < 0:
            return None
        state = hosts.from_first(lambda: found and found[1], template)
        return step, jax.tree.map(jnp.array, state)

    def train(
        self,
        phases: Sequence[Phase],
        template: TrainState,
        initial: Callable[[], Any] = lambda: None,
    ) -> Any:
        """All phases, from where the work directory stands; returns `TrainState.result`.

        Args:
            phases: in order, without gaps.
            template: shapes and types of a state.
            initial: what the first phase begins with, where nothing is saved.
        """
        start, state = self.restore(template) or (0, None)
        result = initial() if state is None else state.result
        if start:
            print(f"{self.title}: continuing from step {start} of {self.num_steps}", flush=True)
        check(
            not self.profile or self.profile.stop > start,
            f"--profile must ask for steps that are still to come, but the run is at step {start} "
            f"of {self.num_steps}; give later ones or another --workdir.",
        )
        self.workdir.metrics.rewind(self.name, start)
        for phase in phases:
            if start >= phase.stop:
                continue
            if state is None or start <= phase.start:
                state = phase.begin(result)
            before = functools.partial(self._state_before, phase, template, result)
            state = self._run(phase, state, max(start, phase.start), before)
            result = state.result
        return result

    def _state_before(
        self, phase: Phase, template: TrainState, result: Any
    ) -> tuple[int, TrainState]:
        """The last good (step, state) of a phase, from which its steps are reached again."""
        last = self.restore(template)
        return last if last and last[0] > phase.start else (phase.start, phase.begin(result))

    def _run(self, phase: Phase, state: TrainState, start: int, before: Callable) -> TrainState:
        """The steps of a phase from `start` on."""
        settings, after = self.settings, _After(self, phase, start)
        run = functools.partial(
            phase.steps.run,
            key=self.key,
            images=self.images,
            every=(settings.log_every, settings.checkpoint_every, settings.eval_every),
            rest=phase.rest(),
        )
        spans = [(start, phase.stop, nullcontext())]
        if self.profile:
            spans = self.profile.spans(start, phase.stop, self.workdir.path / "profile")
        try:
            for first, last, within in spans:
                with within:
                    state = run(state, range(first, last), after=after)
        except NonFiniteLossError as error:
            where = ""
            try:
                where = self._locate(phase, run, before, error.step)
            except Exception as failure:  # the error itself must be told in any case
                _log.warning("where the loss stopped being finite was not found: %r", failure)
            raise NonFiniteLossError(
                error.step,
                error.metrics,
                phase=phase.title,
                last_saved=after.last_saved or None,
                where=where,
            ) from None
        finally:
            after.progress.clear()
        return on_default_device(state, self.mesh)

    def _locate(self, phase: Phase, run: Callable, before: Callable, bad: int) -> str:
        """Where step `bad` stops being finite."""
        first, good = before()
        print(f"step {bad} is not finite; finding out where, from step {first} on", flush=True)
        if first < bad:
            good = run(good, range(first, bad))
        step = diagnosis.step_of(
            bad,
            self.key,
            num_images=len(self.images.labels),
            images_per_step=phase.steps.images_per_step,
        )
        return phase.locate(on_default_device(good, self.mesh), step)


class _After:
    """What follows a call: progress, metrics, evaluations, checkpoints, requests to stop."""

    def __init__(self, part: Part, phase: Phase, start: int):
        self.part, self.phase, self.last_saved = part, phase, start
        images_per_step = phase.steps.images_per_step if phase.looks_at_images else 0
        self.progress = Progress(part.num_steps, images_per_step)

    def __call__(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        part, phase, workdir = self.part, self.phase, self.part.workdir

        def due(interval):
            return (interval > 0 and step % interval == 0) or step == phase.stop

        log = due(part.settings.log_every)
        shown = {name: metrics[name] for name in phase.shown}
        rate = self.progress.show(step, phase.title, shown, stays=log)
        record: dict[str, Any] = {}
        if log:
            record = {**metrics, "images_per_second": round(rate, 1)}
        if due(part.settings.eval_every):
            found = phase.evaluate(on_default_device(state, part.mesh))
            if found:
                text = "  ".join(f"{k}: {100 * v:.2f} %" for k, v in found.items())
                title = f"{phase.title} | step {step} | validation top-1 at width"
                self.progress.say(f"{title} {text}")
                record["validation"] = found
        if record:
            workdir.metrics.write(part.name, step, {"phase": phase.title, **record})
        # A signal after this counts after the next step.
        stopping = hosts.any_process(workdir.stop_requested)
        if due(part.settings.checkpoint_every) or stopping:
            if hosts.is_first():
                part.saved.save(step, state)
            self.last_saved = step
        if stopping:
            workdir.stop_requested = True
            workdir.check_stop(step)
