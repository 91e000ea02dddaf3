"""CIFAR-100, ResNet56: an INR about as large as the network it generates.

    neumeta fetch cifar100 cifar100-resnet56-teacher
    neumeta train --config=resnet56 --workdir=DIR \\
        --config.teacher.file=cifar100-resnet56-teacher

Import, folding, ordering of channels, training and the final evaluation, in one command. It may be
stopped at any time (`timeout -s TERM 480 neumeta train ...`) and the same command continues.

The recipe is that of configs/resnet20.py, chosen there on validation images; see
results/cifar100_resnet20/README.md.

Presets: the default is protocol B, trained on width ratios [0.25, 1]; `:depth` trains on depth
too, with one size more in each step, down to half of the generated blocks of each stage (56 to 32
layers), on mixed images and at higher rates, and lets a last phase train the depth term alone;
`:protocol_a` trains on [0.5, 1] only (the papers' protocol); `:full` makes the whole network narrow
there, residual streams included; `:cifar10` is for the public network `neumeta fetch
cifar10-resnet56-teacher`; `:smoke` touches everything on a CPU in a few minutes.

Hardware and time: `:depth` takes 7.4 minutes of one H200 (18,703 steps of 4 x 256 images, 6,904 of
3 x 256), 1.5 to compile and one for the rest; result in results/cifar100_resnet56/depth. The others
have not been run to the end. The default is 21,094 steps of 3 x 128 images, 6.8e15 FLOPs in all: 27
hours at the 70 GFLOP/s that two CPU cores reach in such a step (results/speed).
"""

from ml_collections import ConfigDict

from neumeta_jax.runs import recipes

PRESETS = ("", "protocol_a", "depth", "full", "cifar10", "smoke")


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        known = ", ".join(PRESETS[1:])
        raise ValueError(f"configs/resnet56.py has the presets {known}, got {preset!r}.")
    config = recipes.defaults("projection", modulated=True)
    config.dtype = "bfloat16"  # activations; encodings, weights and moments stay float32
    config.channel_order = "importance"
    config.checkpoint_every = 1000

    # As configs/resnet20.py, but for the length, batches for a GPU, and half its rates.
    config.train.mode = "at_once"
    config.train.epochs = 60.0
    config.train.warmup_epochs = 1.0
    config.train.warmup_phases = "all"
    config.train.block_init = "teacher"
    config.train.alpha_init = 1.0
    config.train.share_images = True
    config.train.num_random_sizes = 2
    config.train.min_width_ratio = 0.25
    config.train.sandwich = True
    config.train.per_block_widths = 0.5
    config.train.ce_weight = 1.0
    config.train.norm_weight = 1e-5
    config.train.reconstruction_weight = 0.0
    config.train.distillation_weight = 4.0
    config.train.temperature = 2.0
    config.train.optimizer = "muon"
    config.train.learning_rate = 3e-4
    config.train.alpha_learning_rate = 3e-4
    config.train.learned_learning_rate = 1.5e-4
    config.train.learned = "all"
    config.train.schedule = "cosine"
    config.train.fit_learning_rate = 4e-3  # of an INR kind that needs a fit phase

    if preset == "protocol_a":
        config.train.min_width_ratio = 0.5
        config.inr.max_cell = 1.75
    if preset == "depth":
        config.inr.depth_term = True
        config.data.num_validation = 2000  # enough to search on, and more to train on
        config.data.mixup = 0.5
        config.data.cutmix = 0.5
        # Seven times the rates of before: training was stable up to 4e-3 in a trial that raised
        # them in a straight line (benchmarks/gpu/resnet56.py --trial).
        config.train.batch_size = 256
        config.train.epochs = 99.75
        config.train.depth_epochs = 36.82
        config.train.num_random_sizes = 3
        config.train.skip_blocks = 0.5
        config.train.learning_rate = 2e-3
        config.train.alpha_learning_rate = 2e-3
        config.train.learned_learning_rate = 1e-3
        config.train.depth_learning_rate = 1e-3
    if preset == "full":
        config.generated = "full"
        config.train.min_width_ratio = 0.5  # a quarter of the multiply-adds
    if preset == "cifar10":
        config.data.name = "cifar10"
    if preset == "smoke":
        config.data.num_validation = 100
        config.teacher.epochs = 0.005
        config.train.epochs = 0.001
        config.train.batch_size = 16
        config.eval.split = "validation"
        config.eval.width_ratios = (1.0, 0.5, 0.25)
        config.eval.progress_images = 50
        config.eval.batch_size = 50
        config.log_every = 1
    return config
