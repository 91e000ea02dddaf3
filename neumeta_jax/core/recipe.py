"""How an INR is trained: a recipe of numbers, and the phases that they stand for.

    fit     the INR reproduces the folded, ordered teacher
    blocks  blocks join one at a time, from the input; all that have joined are trained jointly at
            random widths
    depth   what only networks that skip blocks see

Method: arXiv 2505.05510.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from neumeta_jax.core.hypernetwork import Hypernetwork
from neumeta_jax.core.inr import INR, Grid, Projection
from neumeta_jax.core.losses import Loss
from neumeta_jax.core.sizes import Sizes, shallowest_widths, skippable
from neumeta_jax.errors import check

CHOICES = {
    "mode": ("blockwise", "at_once"),
    "block_init": ("copy", "teacher"),
    "learned": ("last", "all", "none"),
    "schedule": ("constant", "cosine"),
    "optimizer": ("adamw", "muon"),
    "fit_widths": ("full", "random"),
    "fit_target": ("averaged", "projected"),
    "distill_from": ("teacher", "full"),
    "warmup_phases": ("stage", "all"),
}
_DEPTH_EPOCHS = ("shallow_epochs", "depth_epochs")


class Program(NamedTuple):
    """What a phase's steps are compiled from; phases where it is equal share a compilation."""

    sizes: Sizes
    loss: Loss | None


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training between two events.

    Attributes:
        name: for logs.
        start, num_steps: the first global step, and how many there are.
        warmup_steps: linear warm-up of the learning rates.
        num_active: how many blocks, counted in training order, are generated.
        new_blocks: positions of the blocks that join when the phase starts.
        sizes: the networks of a step.
        images_per_step: that a step takes from the epoch.
        rates: learning rates at their highest, by what is trained: "inr" (of active blocks),
            "alpha" (likewise), "learned" or "last" (all that is not generated, or of it what
            follows the elastic blocks), or instead of these "depth", the depth term alone.
        schedule: of the learning rates.
        loss: on images; None where the INR learns the teacher's weights and sees no images.
    """

    name: str
    start: int
    num_steps: int
    warmup_steps: int
    num_active: int
    new_blocks: tuple[int, ...]
    sizes: Sizes
    images_per_step: int
    rates: Mapping[str, float]
    schedule: str
    loss: Loss | None

    @property
    def stop(self) -> int:
        return self.start + self.num_steps

    @property
    def program(self) -> Program:
        return Program(self.sizes, self.loss)


@dataclasses.dataclass(frozen=True)
class InrRecipe:
    """How the INR is trained. Defaults are the papers' (arXiv 2505.05510).

    Attributes:
        mode: "blockwise" adds blocks from the input on, `blocks_per_phase` at a time; "at_once"
            trains all of them in one phase (NeuMeta, arXiv 2410.11878).
        epochs: of each phase; one epoch shows every training image once, to one of the sizes or,
            with `share_images`, to all sizes of a step.
        final_epochs: of a last phase after all blocks have joined.
        depth_epochs, depth_learning_rate: of a phase at the very end that trains the depth term
            alone, on networks that skip blocks; all others stay what they are. For INR kinds with
            a `depth_term`; the sizes of a step are then the shallowest network at full width
            (`shallowest_widths`), with `sandwich` that at the smallest widths, and random ones,
            together `num_random_sizes`, but at least one.
        shallow_epochs, shallow_learning_rate: of a phase before that one that trains the same
            parameters, but sees the first of those sizes alone, so that its steps are short.
        warmup_epochs: length of the linear warm-up of the learning rates.
        warmup_phases: which phases warm up: only those that open a "stage", whose INR has nothing
            to be copied from (papers), or "all", because each starts a fresh optimiser.
        block_init: a new block's INR starts as a "copy" of the previous block's, or from the
            "teacher": in closed form for INR kinds that have one, else from the fit phase.
        fit_steps, fit_learning_rate: the fit phase; 0 steps leave it out.
        fit_widths: fit the teacher at "full" width only, or at "random" widths of the trained range
            too.
        fit_target: what the teacher is at smaller widths (`fit_inr`): its channels "averaged", or
            "projected" on the first ones and refitted at the widths that every step has.
        alpha_init: SkipInit scalar of a new block; 0 makes it start as the identity.
        batch_size: images per size.
        share_images: all sizes of a step see the same images (Yu and Huang, arXiv 1903.05134),
            which then count once; the targets of distillation are computed once.
        micro_batch: images per forward and backward pass; 0 takes the batch at once. Gradients are
            summed, so that this changes speed and memory only; small ones stay in a CPU's cache.
        num_random_sizes: sizes per step beside the full width.
        min_width_ratio: ratios are drawn uniformly from here to 1, the trained range.
        sandwich: the first of the random sizes is always the smallest of the trained range (Yu and
            Huang, arXiv 1903.05134). With `skip_blocks` the second one is the shallowest network at
            full width.
        fixed_ratios: width ratios of further sizes that every step has, of the number of random
            ones too; with the smallest those of slimmable networks.
        per_block_widths: share of the random sizes that draw one ratio for each block instead of
            one for the network.
        skip_blocks: share of the random sizes that skip blocks, so that depth varies too: in each
            stage the last ones, a number drawn uniformly from 0 to `max_skipped` of those that are
            generated.
        max_skipped: share of a stage's generated blocks, rounded, half of one upwards.
        noise: whether training adds coordinate noise (its size belongs to the INR).
        ce_weight, norm_weight, reconstruction_weight, distillation_weight, temperature: the loss.
        distill_from: whose logits are the soft labels: the folded "teacher"'s, or those of the
            "full" size of the same step (in-place distillation, arXiv 1903.05134).
        ema_decay: of an average of the parameters that replaces them in the end; 0 keeps none.
        optimizer: "adamw", or "muon" for what is a matrix to it, see `optimizer`.
        learning_rate, alpha_learning_rate, learned_learning_rate, weight_decay: of the optimizer.
        learned: which parameters that are not generated are trained: the "last" block and the head
            once the last stage that is generated is reached, "all" of them always, or "none".
        schedule: of the learning rates within a phase.
    """

    mode: str = "blockwise"
    epochs: float = 50.0
    final_epochs: float = 0.0
    depth_epochs: float = 0.0
    depth_learning_rate: float = 8e-4
    shallow_epochs: float = 0.0
    shallow_learning_rate: float = 8e-4
    warmup_epochs: float = 20.0
    warmup_phases: str = "stage"
    blocks_per_phase: int = 1
    block_init: str = "copy"
    fit_steps: int = 0
    fit_learning_rate: float = 8e-4
    fit_widths: str = "full"
    fit_target: str = "averaged"
    alpha_init: float = 0.0
    batch_size: int = 128
    share_images: bool = False
    micro_batch: int = 0
    num_random_sizes: int = 3
    min_width_ratio: float = 0.5
    sandwich: bool = False
    fixed_ratios: tuple[float, ...] = ()
    per_block_widths: float = 0.0
    skip_blocks: float = 0.0
    max_skipped: float = 0.5
    noise: bool = True
    ce_weight: float = 100.0
    norm_weight: float = 1e-3
    reconstruction_weight: float = 1.0
    distillation_weight: float = 0.0
    distill_from: str = "teacher"
    temperature: float = 1.0
    ema_decay: float = 0.0
    optimizer: str = "adamw"
    learning_rate: float = 8e-4
    alpha_learning_rate: float = 1e-4
    learned_learning_rate: float = 7e-5
    weight_decay: float = 1e-4
    learned: str = "last"
    schedule: str = "constant"

    def __post_init__(self):
        for field, allowed in CHOICES.items():
            value = getattr(self, field)
            check(value in allowed, f"{field} must be one of {allowed}, got {value!r}.")
        check(
            0 < self.min_width_ratio <= 1,
            f"min_width_ratio must be above 0 and at most 1, got {self.min_width_ratio}.",
        )
        check(
            all(self.min_width_ratio <= ratio <= 1 for ratio in self.fixed_ratios),
            f"fixed_ratios must lie in the trained range [{self.min_width_ratio}, 1], got "
            f"{self.fixed_ratios}.",
        )
        check(
            self.batch_size >= 1 and self.num_random_sizes >= 0 and self.blocks_per_phase >= 1,
            "batch_size and blocks_per_phase must be at least 1 and num_random_sizes at least 0, "
            f"got {self.batch_size}, {self.blocks_per_phase}, {self.num_random_sizes}.",
        )
        check(
            self.micro_batch == 0
            or (self.micro_batch > 0 and self.batch_size % self.micro_batch == 0),
            f"micro_batch must divide batch_size or be 0, got {self.micro_batch} and "
            f"{self.batch_size}.",
        )
        check(
            0 <= self.per_block_widths <= 1 and 0 <= self.ema_decay < 1,
            "per_block_widths must lie in [0, 1] and ema_decay in [0, 1), got "
            f"{self.per_block_widths} and {self.ema_decay}.",
        )
        check(
            0 <= self.skip_blocks <= 1 and 0 <= self.max_skipped <= 1,
            "skip_blocks and max_skipped must lie in [0, 1], got "
            f"{self.skip_blocks} and {self.max_skipped}.",
        )
        for field in ("epochs", "final_epochs", "warmup_epochs", "fit_steps", *_DEPTH_EPOCHS):
            value = getattr(self, field)
            check(value >= 0, f"{field} must not be < 0, got {value}.")
        for field in _DEPTH_EPOCHS:
            check(
                not getattr(self, field) or (self.skip_blocks and self.max_skipped),
                f"{field} trains networks that skip blocks and needs skip_blocks > 0 and "
                f"max_skipped > 0, got {self.skip_blocks} and {self.max_skipped}.",
            )

    @property
    def num_sizes(self) -> int:
        """Networks of a step in which blocks are trained."""
        return 1 + self.num_random_sizes

    @property
    def images_per_step(self) -> int:
        """How many images such a step takes from the epoch."""
        return self.batch_size * (1 if self.share_images else self.num_sizes)

    @property
    def fit_inr(self) -> INR:
        """The kind whose closed form of the teacher the fit phase aims at."""
        if self.fit_target == "averaged":
            return Grid(num_terms=1)
        ratios = {*self.fixed_ratios, *([self.min_width_ratio] * self.sandwich)} - {1.0}
        return Projection(width_terms=tuple(sorted(ratios, reverse=True)))

    @property
    def loss(self) -> Loss:
        return Loss(
            ce=self.ce_weight,
            distillation=self.distillation_weight,
            temperature=self.temperature,
            norm=self.norm_weight,
            reconstruction=self.reconstruction_weight,
            distill_from=self.distill_from,
        )

    def phases(self, hypernetwork: Hypernetwork, *, num_images: int) -> tuple[Phase, ...]:
        """The phases of training in order; they cover all global steps without gaps.

        Raises:
            UsageError: if the recipe trains a depth term that the INR does not have.
        """
        stages = hypernetwork.stages
        everything = tuple(range(len(stages)))
        fit, joint, shallow, deep = self.phase_sizes(hypernetwork)
        always = self.warmup_phases == "all"

        def phase(name, epochs, *, warms_up=always, sizes=joint, rates=None, new_blocks=()):
            num_active = new_blocks[-1] + 1 if new_blocks else len(stages)
            if rates is None:
                rates = {"inr": self.learning_rate, "alpha": self.alpha_learning_rate}
                if self.learned == "all":
                    rates["learned"] = self.learned_learning_rate
                elif self.learned == "last" and stages[num_active - 1] == stages[-1]:
                    rates["last"] = self.learned_learning_rate
            images = self.batch_size * (1 if self.share_images else len(sizes))
            num_steps = round(epochs * num_images / images)
            warmup = min(round(self.warmup_epochs * num_images / images), num_steps)
            return Phase(
                name=name,
                start=0,
                num_steps=num_steps,
                warmup_steps=warmup if warms_up else 0,
                num_active=num_active,
                new_blocks=new_blocks,
                sizes=sizes,
                images_per_step=images,
                rates=rates,
                schedule=self.schedule,
                loss=self.loss,
            )

        fitted = phase("fit", 0, sizes=fit, rates={"inr": self.fit_learning_rate})
        # Always a cosine: there is nothing to keep exploring once the weights are met.
        changes = {"num_steps": self.fit_steps, "schedule": "cosine", "loss": None}
        found = [dataclasses.replace(fitted, **changes)]
        if self.mode == "at_once":
            found.append(phase("all blocks", self.epochs, warms_up=True, new_blocks=everything))
        else:
            for first in range(0, len(stages), self.blocks_per_phase):
                new = everything[first : first + self.blocks_per_phase]
                opens = any(p == 0 or stages[p] != stages[p - 1] for p in new)
                name = f"block {new[-1] + 1} of {len(stages)}"
                found.append(phase(name, self.epochs, warms_up=opens or always, new_blocks=new))
        found.append(phase("final", self.final_epochs))
        for name, sizes in (("shallow", shallow), ("depth", deep)):
            epochs = getattr(self, f"{name}_epochs")
            rates = {"depth": getattr(self, f"{name}_learning_rate")}
            check(
                not epochs or hypernetwork.inr.depth_term,
                f"train.{name}_epochs trains the depth term of an INR, which this one does not "
                f"have; set inr.depth_term (kind 'projection') or {name}_epochs to 0.",
            )
            found.append(phase(name, epochs, warms_up=True, sizes=sizes, rates=rates))
        result: list[Phase] = []
        for later in found:
            start = result[-1].stop if result else 0
            if later.num_steps:
                result.append(dataclasses.replace(later, start=start))
        return tuple(result)

    def phase_sizes(self, hypernetwork: Hypernetwork) -> tuple[Sizes, ...]:
        """Of the phases: the fit, those in which blocks join, "shallow" and "depth"."""
        full, share = hypernetwork.full_widths, self.max_skipped
        shallowest = shallowest_widths(hypernetwork, share)
        smallest = tuple(hypernetwork.widths(self.min_width_ratio).tolist())

        def sizes(num, fixed, **fields):
            fixed = tuple(fixed[:num])
            return Sizes(
                full=full,
                fixed=fixed,
                num_random=num - len(fixed),
                low=self.min_width_ratio,
                per_block=self.per_block_widths,
                stages=skippable(hypernetwork, share),
                **fields,
            )

        sandwich = ([smallest, shallowest] if self.skip_blocks else [smallest]) * self.sandwich
        further = [tuple(hypernetwork.widths(ratio).tolist()) for ratio in self.fixed_ratios]
        lowest = [tuple(map(min, shallowest, smallest))] * self.sandwich
        dense = self.mode == "at_once"
        return (
            sizes(1, [full] if self.fit_widths == "full" else []),
            sizes(
                self.num_sizes, [full, *sandwich, *further], skipping=self.skip_blocks, dense=dense
            ),
            sizes(1, [shallowest], skipping=1.0, dense=True),
            sizes(max(self.num_random_sizes, 1), [shallowest, *lowest], skipping=1.0, dense=True),
        )
