"""CIFAR-100, ResNet56, the recipe of "How to Train Your Metamorphic Deep Neural Network".

    neumeta fetch cifar100 cifar100-resnet56-teacher
    neumeta train --config=resnet56_paper --workdir=DIR \\
        --config.teacher.file=cifar100-resnet56-teacher

Numbers are those of arXiv 2505.05510 and its released code. 92 MLPs with 187.8 M parameters in all,
23 phases of 50 epochs; the authors report 66.13 / 66.00 / 66.10 / 65.36 % at compression 0 / 25 /
50 / 75 % (the last one never trained) and about a day on one GPU. Hardware: a GPU or TPU with at
least 24 GB. We have not run it to the end.

Presets: `:cifar10` (use the public cifar10_resnet56 as teacher), `:at_once` trains all blocks in
one phase (NeuMeta, arXiv 2410.11878), `:smoke` touches every phase on a CPU in a few minutes.
`:short` is for nine minutes of an H100: 3.5 epochs of each block instead of 50 and 1.4 of warm-up
instead of 20 at the first block of a stage (7,000 steps; generation is 3.8 TFLOP of each, so this
is an estimate), nothing else. `configs/resnet20.py:paper` is the recipe at full length.
"""

from ml_collections import ConfigDict

from neumeta_jax.runs import recipes

PRESETS = ("", "cifar10", "at_once", "short", "smoke")


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        known = ", ".join(PRESETS[1:])
        raise ValueError(f"configs/resnet56_paper.py has the presets {known}, got {preset!r}.")
    config = recipes.defaults("per_tensor_mlp")  # what is not said is a default, and the papers'
    config.train.epochs = 50.0  # of each block; 350 in the released configuration
    config.eval.progress_ratios = (1.0, 0.75, 0.5)
    config.eval.num_samples = 100

    if preset == "cifar10":
        config.data.name = "cifar10"
    if preset == "at_once":
        config.train.mode = "at_once"
        config.train.epochs = 200.0
        config.train.alpha_init = 1.0
    if preset == "short":
        config.train.epochs = 3.5
        config.train.warmup_epochs = 1.4
    if preset == "smoke":
        config.data.num_validation = 100
        config.teacher.epochs = 0.005
        config.inr.hidden_width = 32
        config.inr.num_layers = 2
        config.train.epochs = 0.002
        config.train.blocks_per_phase = 8
        config.train.batch_size = 16
        config.eval.split = "validation"
        config.eval.width_ratios = (1.0, 0.5, 0.25)
        config.eval.progress_images = 50
        config.eval.batch_size = 50
        config.eval.num_samples = 2
        config.log_every = 1
    return config
