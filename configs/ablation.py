"""What each part of the recipe is worth: ResNet20 on CIFAR-100, a short budget, one row a preset.

    neumeta fetch cifar100 cifar100-resnet20-teacher
    for row in base nested cell; do
        neumeta train --config=ablation:$row --workdir=DIR/$row \\
            --config.teacher.file=cifar100-resnet20-teacher
    done

Each leaves its accuracies in DIR/ROW/grid.csv.

Every row differs from the base (no preset, or `:base`) in as little as possible and has the same
budget: 200 steps, each of which passes 32 images through each of three sizes, at 45,000 training
images. Accuracies are of the validation split and for comparing rows with each other only: the
budget is a fraction of a full run's, and the public teacher was trained on these images.

A fit phase comes on top of the budget: `per_tensor_mlp` has no closed form to start at the teacher
with, and fits it for 600 steps first, which look at no images. It then learns at 1e-4, since higher
rates undo the fit.

Hardware: one CPU core a row, or any accelerator.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from neumeta_jax.runs import recipes

NUM_IMAGES = 45_000
NUM_STEPS = 200
BATCH_SIZE = 32
NUM_BLOCKS = 5  # that a ResNet20 generates
EPOCHS = NUM_STEPS * BATCH_SIZE / NUM_IMAGES
WARMUP_EPOCHS = 40 * BATCH_SIZE / NUM_IMAGES

GRID = {"kind": "grid", "num_terms": 1, "resampling": "nested"}
CELL = {"kind": "grid"}
# Each block has its share of the steps, and of the warm-up.
BLOCKWISE = {
    "train.mode": "blockwise",
    "train.epochs": EPOCHS / NUM_BLOCKS,
    "train.warmup_epochs": WARMUP_EPOCHS / NUM_BLOCKS,
}

# Name of the preset -> (what it is, the fields that differ from the base). "inr" is the section as
# a whole, because each kind has its own fields, but for those at their defaults.
ROWS = {
    "base": ("projection of learned values, channels by importance, Muon", {}),
    # The optimiser.
    "adamw": ("AdamW instead of Muon", {"train.optimizer": "adamw"}),
    # The INR.
    "nested": ("no projection: the first channels of learned values", {"inr": GRID}),
    "cell": (
        "averages over channels' cells, values linear in the width, channels by smoothness",
        {"channel_order": "smoothness", "inr": CELL},
    ),
    "cell_noise": (
        "as cell, with coordinate noise of one channel",
        {"channel_order": "smoothness", "inr": {**CELL, "noise_scale": 1.0}},
    ),
    "per_tensor_mlp": (
        "one MLP per tensor after a fit, learning rate 1e-4, channels by smoothness",
        {
            "channel_order": "smoothness",
            "train.fit_steps": 600,
            "train.fit_widths": "random",
            "train.learning_rate": 1e-4,
            "inr": {
                "kind": "per_tensor_mlp",
                "hidden_width": 128,
                "num_layers": 4,
                "num_frequencies": 7,
                "noise_scale": 0.0,
                "noise_per": "channel",
            },
        },
    ),
    # Blocks.
    "blockwise": ("blocks join one at a time, each starts at the teacher", BLOCKWISE),
    "copy_init": (
        "blockwise; an INR starts as a copy of the previous block's, the first at random",
        {**BLOCKWISE, "train.block_init": "copy"},
    ),
    "skip_init": (
        "blockwise; a block starts as the identity, SkipInit's scalar at 0, learned at 2e-2",
        {**BLOCKWISE, "train.alpha_init": 0.0, "train.alpha_learning_rate": 2e-2},
    ),
    # The loss.
    "no_distillation": ("cross-entropy alone", {"train.distillation_weight": 0.0}),
    "in_place": ("soft labels of the full size of the same step", {"train.distill_from": "full"}),
    # The sizes of a step.
    "no_sandwich": ("both smaller sizes at random", {"train.sandwich": False}),
    # The rest of the recipe, from what matters more to what matters less.
    "order_smoothness": ("channels by smoothness", {"channel_order": "smoothness"}),
    "wider_cells": (
        "half of the smaller networks drawn through cells up to 1.75 times as wide",
        {"inr.max_cell": 1.75},
    ),
    "unmodulated": ("no learned factors linear in the width", {"inr.modulated": False}),
    "constant_schedule": (
        "learning rates constant after the warm-up",
        {"train.schedule": "constant"},
    ),
    "ema": ("parameters averaged with a decay of 0.99", {"train.ema_decay": 0.99}),
    "frozen_rest": ("what is not generated stays the teacher's", {"train.learned": "none"}),
    "per_block": (
        "half of the random sizes draw a width for each block",
        {"train.per_block_widths": 0.5},
    ),
    "distillation_only": ("distillation alone", {"train.ce_weight": 0.0}),
    "order_as_trained": ("channels as the teacher has them", {"channel_order": "as_trained"}),
}
PRESETS = ("", *ROWS)


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        known = ", ".join(PRESETS[1:])
        raise ValueError(f"configs/ablation.py has the presets {known}, got {preset!r}.")
    config = _resnet20().get_config("shared")
    config.log_every = 100
    config.checkpoint_every = NUM_STEPS

    config.train.epochs = EPOCHS
    config.train.warmup_epochs = WARMUP_EPOCHS
    config.train.batch_size = BATCH_SIZE
    config.train.min_width_ratio = 0.5
    config.train.per_block_widths = 0.0

    config.eval.split = "validation"
    config.eval.width_ratios = (1.0, 0.75, 0.5, 0.33, 0.25)
    config.eval.progress_ratios = (1.0, 0.5, 0.25)
    config.eval.progress_images = 100

    _, changes = ROWS[preset or "base"]
    for field, value in changes.items():
        if field == "inr":
            config.inr = recipes.inr(**value)
            continue
        section, _, name = field.rpartition(".")
        (config[section] if section else config)[name] = value
    return config


def _resnet20():
    # Config files are loaded by path, from anywhere; `from configs import` would not always work.
    path = pathlib.Path(__file__).resolve().with_name("resnet20.py")
    spec = importlib.util.spec_from_file_location("neumeta_jax_config_resnet20", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
