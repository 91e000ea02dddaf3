"""The section `baseline` of a config: a row of the comparison, its budget and its cost."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from neumeta_jax.elastic.widths import check_width_ratio
from neumeta_jax.errors import check
from neumeta_jax.networks import cifar_spec
from neumeta_jax.runs.config import Experiment

TOGETHER = ("slimmable", "universally_slimmable", "inr")  # train several sizes in a step
_CHOICES = {
    "method": ("individual", "pruning", "pruning_finetuned", *TOGETHER),
    "criterion": ("random", "l1", "l2", "taylor", "surgeon"),
    "distill_from": ("none", "teacher", "full"),
}
_BACKWARD = 2  # forward passes that a backward pass costs


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A row of the comparison.

    Attributes:
        method: see `neumeta_jax.comparison`.
        title, variant, source: for tables: "slimmable", "soft labels of the teacher", the paper.
        images: training images that are drawn.
        width_ratios: the family; the first is the full size.
        criterion: what orders the channels of the teacher, of which small networks keep the first:
            see `pruning.channel_order`. The method "pruning" evaluates `criteria` too.
        refitted: of "pruning_finetuned", whether the products of a small network are solved anew
            before it is trained (`elastic.refit`).
        batch_size, learning_rate, momentum, weight_decay: SGD with Nesterov's momentum, a short
            warm-up and half a cosine to zero.
        distill_from: soft labels of the "teacher", of the "full" network of the same step (which
            has none itself), or "none".
        ce_weight, distillation_weight, temperature: of a network with soft labels; one without has
            cross-entropy alone.
        num_random_sizes: of universally slimmable networks in a step, beside the largest and the
            smallest.
        calibration_images: training images that importance and statistics are measured on.
    """

    method: str = ""
    title: str = ""
    variant: str = ""
    source: str = ""
    images: int = 50_000
    width_ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    criterion: str = "surgeon"  # the best on validation images
    criteria: tuple[str, ...] = ()
    refitted: bool = False
    batch_size: int = 64
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distill_from: str = "none"
    ce_weight: float = 1.0
    distillation_weight: float = 0.0
    temperature: float = 1.0
    num_random_sizes: int = 2
    calibration_images: int = 2000

    def __post_init__(self):
        given = [(name, getattr(self, name)) for name in _CHOICES]
        for name, value in (*given, *(("criterion", value) for value in self.criteria)):
            allowed = _CHOICES[name]
            check(value in allowed, f"baseline.{name} must be one of {allowed}, got {value!r}.")
        counts = (self.images, self.batch_size, self.calibration_images)
        rates = (self.learning_rate, self.num_random_sizes)
        check(
            min(counts) >= 1 and min(rates) >= 0 and self.temperature > 0,
            "baseline.images, batch_size and calibration_images must be at least 1, learning_rate "
            f"and num_random_sizes at least 0 and temperature above 0, got {counts}, {rates} and "
            f"{self.temperature}.",
        )
        ratios = list(map(check_width_ratio, self.width_ratios))
        check(
            ratios[:1] == [1] and ratios == sorted(set(ratios), reverse=True),
            f"baseline.width_ratios must start at 1 and decrease, got {ratios}; 1 is full size.",
        )
        check(
            self.method in TOGETHER or self.distill_from != "full",
            f"baseline.distill_from='full' needs sizes that are trained together, as {TOGETHER} "
            f"do, but method is {self.method!r}; use 'teacher'.",
        )

    @property
    def num_steps(self) -> int:
        """SGD steps of a network, or of a family of shared weights."""
        return max(1, round(self.images / self.batch_size))

    @property
    def needs_teacher(self) -> bool:
        return self.method != "individual" or self.distill_from == "teacher"


def within_budget(config: Mapping[str, Any], budget: float, num_images: int) -> dict[str, Any]:
    """`config` with `baseline.images` times `budget`, and for an INR the epochs that this is.

    Phases share the images equally and have a step at least; the warm-up keeps its share.
    `num_images` is the number of training images in an epoch.
    """
    check(budget > 0, f"--budget must be above 0, got {budget}; 1 is baseline.images images.")
    resolved: dict[str, Any] = json.loads(json.dumps(config))
    images = max(1, round(config["baseline"]["images"] * budget))
    resolved["baseline"]["images"] = images
    if config["baseline"]["method"] != "inr":
        return resolved
    recipe, num_phases = config["train"], 1
    if recipe["mode"] == "blockwise":
        spec = cifar_spec.resnet_spec(config["network"]["depth"], num_classes=1)
        blocks = cifar_spec.generated_blocks(spec, config["generated"])
        num_phases = math.ceil(len(blocks) / recipe["blocks_per_phase"])
    sizes = 1 if recipe["share_images"] else 1 + recipe["num_random_sizes"]
    epochs = max(images / num_phases, recipe["batch_size"] * sizes) / num_images
    share = recipe["warmup_epochs"] / recipe["epochs"] if recipe["epochs"] else 0.0
    resolved["train"] |= {"epochs": epochs, "warmup_epochs": share * epochs}
    resolved["train"] |= dict.fromkeys(("final_epochs", "shallow_epochs", "depth_epochs"), 0.0)
    return resolved


class Cost(NamedTuple):
    """What training took, without what generates weights.

    `images` are drawn, by networks that are trained one by one each; `network_passes` of them went
    forward and backward through a network, over all sizes, and `teacher_passes` forward through the
    teacher. `macs` are the multiply-adds of both, a backward pass as two forward passes and masked
    networks at the full shape that they are computed at.
    """

    images: int
    network_passes: int
    teacher_passes: int
    macs: int


def cost(experiment: Experiment, baseline: Baseline, num_images: int) -> Cost:
    """Of training the family of `baseline`; an epoch has `num_images`."""
    family, recipe, full = experiment.hypernetwork, experiment.recipe, experiment.spec.num_macs
    images = passes = baseline.num_steps * baseline.batch_size
    soft = baseline.distill_from == "teacher"
    sizes = [family.num_macs(family.widths(ratio)) for ratio in baseline.width_ratios]
    if baseline.method == "inr":
        phases = recipe.phases(family, num_images=num_images)
        steps = sum(
            phase.stop - phase.start for phase in phases if phase.loss and phase.sizes.with_full
        )
        images, passes = steps * recipe.images_per_step, steps * recipe.batch_size
        soft = recipe.distillation_weight and recipe.distill_from == "teacher"
        fixed = phases[-1].sizes.shapes
        sizes = [full if widths is None else family.num_macs(widths) for widths in fixed]
    elif baseline.method == "universally_slimmable":
        sizes = [full, sizes[-1], *[full] * baseline.num_random_sizes]
    elif baseline.method == "pruning_finetuned":
        sizes = sizes[1:]  # the full size is the teacher
    elif baseline.method == "pruning":
        images = passes = 0
    teacher_passes = images * (1 if baseline.method in TOGETHER else len(sizes)) if soft else 0
    macs = passes * (1 + _BACKWARD) * sum(map(int, sizes)) + teacher_passes * full
    return Cost(images, passes * len(sizes), teacher_passes, macs)
