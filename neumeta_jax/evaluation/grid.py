"""Names that have moved to `evaluator`, `programs`, `rows` and `slices`."""

from typing import Any, NamedTuple

import numpy as np

from neumeta_jax.commands.command_line import SAMPLES as SAMPLE_FLAGS  # noqa: F401
from neumeta_jax.evaluation.evaluator import (  # noqa: F401
    Evaluator,
    accuracy,
    device_mesh,
    evaluation_split,
)
from neumeta_jax.evaluation.programs import compilation_macs  # noqa: F401
from neumeta_jax.evaluation.rows import GridRow, largest_dip  # noqa: F401
from neumeta_jax.evaluation.slices import WeightSlices, weight_slices  # noqa: F401


class GridResult(NamedTuple):
    num_correct: np.ndarray
    per_image: Any
    accuracy: np.ndarray
    strategy: str


def evaluate_grid(
    hypernetwork, params, widths, images, labels, preprocessing, **options
) -> GridResult:
    asked = {name: options.pop(name, None) for name in ("per_image", "containers")}
    evaluator = Evaluator(hypernetwork, params, images, labels, preprocessing, **options)
    plan = evaluator.plan(widths, **asked)
    counts, per_image = evaluator.score(plan)
    return GridResult(counts, per_image, counts / len(labels), plan.strategy)
