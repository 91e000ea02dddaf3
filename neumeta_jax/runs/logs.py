"""What a run tells while it trains: metrics.jsonl, TensorBoard, and progress on the terminal."""

import importlib.util
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from neumeta_jax.errors import check
from neumeta_jax.files import storage
from neumeta_jax.files.provenance import format_seconds

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

CLEAR = "\r\x1b[K"  # of a terminal: the line that the cursor is in
FLUSH_SECONDS = 10  # of TensorBoard's files


def check_tensorboard() -> None:
    """Raises UsageError if what writes TensorBoard's files is not installed."""
    check(
        importlib.util.find_spec("tensorboardX"),
        'Writing for TensorBoard needs tensorboardX; pip install "neumeta-jax[tensorboard]".',
    )


class Metrics:
    """metrics.jsonl in a work directory, one JSON object per line.

    A line belongs to a `part` of the run ("teacher", "inr"), each with its own count of steps.
    Without a folder nothing is written: of several processes only one has it.

    With `tensorboard` the folder of that name has the same numbers as scalars, a run for each part.
    They are written anew from the lines at each start, so that no step is there twice, and steps
    from before somebody asked for it are there too.
    """

    def __init__(self, folder: pathlib.Path | None, *, tensorboard: bool = False):
        self.path = folder and folder / "metrics.jsonl"
        self._scalars = folder / "tensorboard" if folder and tensorboard else None
        self._writers: dict[str, SummaryWriter] = {}

    def rewind(self, part: str, step: int) -> None:
        """Drops the lines of `part` after `step`, and what is no line of ours, one cut off say."""
        if self.path is None:
            return
        kept = []
        there = self.path.exists()
        for line in self.path.read_text(errors="replace").splitlines() if there else ():
            try:
                record = json.loads(line)
                of_part, at = record.pop("part"), int(record.pop("step"))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue
            if of_part != part or at <= step:
                kept.append((line, of_part, at, record))
        if there:
            storage.write_text(self.path, "".join(f"{line}\n" for line, *_ in kept))
        if self._scalars:
            self.close()
            for old in self._scalars.glob("*/events.out.tfevents.*"):
                old.unlink()
            for _, *record in kept:
                self._show(*record)

    def write(self, part: str, step: int, values: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with storage.writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"part": part, "step": step, **values}) + "\n")
        if self._scalars:
            self._show(part, step, values)

    def _show(self, part: str, step: int, values: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        if part not in self._writers:
            folder = str(self._scalars and self._scalars / part)
            self._writers[part] = SummaryWriter(folder, flush_secs=FLUSH_SECONDS)
        for name, value in scalars(values):
            self._writers[part].add_scalar(name, value, step)

    def close(self) -> None:
        while self._writers:
            self._writers.popitem()[1].close()


def scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics by name, "validation/0.5" where they lie in an entry.

    >>> list(scalars({"phase": "fit", "loss": 0.5, "validation": {"0.5": 0.9}}))
    [('loss', 0.5), ('validation/0.5', 0.9)]
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


class Progress:
    """One line of progress: rewritten in place on a terminal, else one line where it may stay.

    Args:
        total: steps of the part.
        images_per_step: 0 if the steps look at none, of which it shows steps per second.
    """

    def __init__(self, total: int, images_per_step: int):
        self.total, self.images_per_step = total, images_per_step
        self.first, self.started, self.drawn = 0, 0.0, 0.0
        self.in_place = sys.stdout.isatty()

    def show(self, step: int, phase: str, values: Mapping[str, float], *, stays: bool) -> float:
        """Shows where training is and returns images per second since the first call.

        The first call starts the clock, so that compilation does not count.
        """
        now = time.perf_counter()
        if not self.started:
            self.started, self.first = now, step
        done = step - self.first
        rate = done / max(now - self.started, 1e-9)
        images = rate * self.images_per_step
        speed = f"{images:.0f} images/s" if self.images_per_step else f"{rate:.1f} steps/s"
        numbers = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        text = f"{phase} | step {step}/{self.total} | {numbers}"
        if done:
            text += f" | {speed} | ETA {format_seconds((self.total - step) / rate)}"
        if stays:
            self.say(text)
        elif self.in_place and now - self.drawn > 0.1:
            width = shutil.get_terminal_size().columns
            print(f"{CLEAR}{text[: width - 1]}", end="", flush=True)
            self.drawn = now
        return images

    def say(self, text: str) -> None:
        """Prints a line that stays, in place of the one that does not."""
        print(f"{CLEAR}{text}" if self.in_place else text, flush=True)

    def clear(self) -> None:
        """Takes the line that does not stay away, before somebody else prints."""
        if self.in_place:
            print(CLEAR, end="", flush=True)
