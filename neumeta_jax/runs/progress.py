"""Progress on the terminal and `metrics.jsonl` in the work directory."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from neumeta_jax.files import storage
from neumeta_jax.files.provenance import format_seconds


class MetricsFile:
    """Appends one JSON object per line; lines from beyond a restored step are dropped.

    A line belongs to a `part` of the run ("teacher", "inr"), each with its own count of steps.
    Without a path nothing is written: of several processes only one has the file.
    """

    def __init__(self, path: pathlib.Path | None):
        self.path = path

    def rewind(self, part: str, step: int) -> None:
        """Drops the lines of `part` after `step`, and what is no line of ours, one cut off say."""
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                of_part, at = record["part"] == part, int(record["step"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if not of_part or at <= step:
                kept.append(line + "\n")
        with storage.replacing(self.path) as partial:
            partial.write_text("".join(kept))

    def write(self, part: str, step: int, values: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with storage.writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"part": part, "step": step, **values}) + "\n")


class Progress:
    """One line of progress: rewritten in place on a terminal, else one line per call of `show`."""

    def __init__(self, total: int, images_per_step: int, *, done: int = 0):
        self.total = total
        self.images_per_step = images_per_step
        self.first = done
        self.started: float | None = None
        self.drawn = 0.0
        self.console = None
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            self._text = Text
            self.console = Live(console=Console(), auto_refresh=False, transient=True)

    def __enter__(self):
        if self.console:
            self.console.start()
        return self

    def __exit__(self, *_):
        if self.console:
            self.console.stop()

    def show(self, step: int, phase: str, values: Mapping[str, float], *, line: bool) -> float:
        """Shows where training is and returns images per second since the first call.

        The first call starts the clock, so that compilation does not count. `line` asks for a line
        that stays. A phase that looks at no images (`images_per_step` 0) shows steps instead.
        """
        now = time.perf_counter()
        if self.started is None:
            self.started, self.first = now, step
        elapsed = max(now - self.started, 1e-9)
        done = step - self.first
        rate = done * self.images_per_step / elapsed
        remaining = elapsed / done * (self.total - step) if done else math.inf
        numbers = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.images_per_step:
            speed = f"{rate:.0f} images/s" if done else "- images/s"
        else:
            speed = f"{done / elapsed:.1f} steps/s" if done else "- steps/s"
        text = (
            f"{phase} | step {step}/{self.total} | {numbers} | {speed} | "
            f"ETA {format_seconds(remaining)}"
        )
        if self.console:
            if now - self.drawn > 0.1:
                self.console.update(self._text(text), refresh=True)
                self.drawn = now
            if line:
                self.console.console.print(text, highlight=False)
        elif line:
            print(text, flush=True)
        return rate
