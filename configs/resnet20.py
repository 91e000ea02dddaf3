"""CIFAR-100, ResNet20, sized for two CPU cores: an INR that starts at the teacher.

    neumeta fetch cifar100 cifar100-resnet20-teacher
    neumeta train --config=resnet20 --workdir=/tmp/resnet20 \\
        --config.teacher.file=cifar100-resnet20-teacher

The teacher is cifar100_resnet20-23dac2f1.pt of `chenyaofo/pytorch-cifar-models` (68.83 % top-1);
without `teacher.file` one is trained first, which takes hours on two cores.

Hardware, time and result: results/cifar100_resnet20/README.md.

Presets: the default is protocol B, trained on width ratios [0.25, 1], with terms in the weights
for small sizes; `:depth` is the default whose networks also skip up to half of the generated blocks
of each stage, the last ones, with one size more in each step and a depth term in the weights, which
two last phases train alone, first for the shallowest network at full width; `:smoke` touches
everything in two minutes. Without terms for small sizes: `:shared`, for a file of a quarter of
the size; `:protocol_a` on [0.5, 1] only, as the papers do; `:full` makes the whole network narrow,
residual streams included, in [0.5, 1]; `:grid` is an INR of cell averages, which has not been run
with this recipe.

`:per_tensor_mlp` is the papers' kind, an MLP for each tensor, at a size that two cores can hold and
with the recipe above: fitted to the teacher and its small networks first. Its channels are
coordinates by their number, not by their share of the width.

`:paper` is the recipe of arXiv 2505.05510 and nothing of ours: 20 MLPs of 2.0 M parameters, five
blocks one at a time with 50 epochs each (22,000 steps of 4 x 128 images), for a GPU. It has not
been run to the end.
"""

from ml_collections import ConfigDict

from neumeta_jax.runs import recipes

SHARED = ("shared", "protocol_a", "full", "grid")
PRESETS = ("", "depth", "smoke", "paper", "per_tensor_mlp", *SHARED)


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        known = ", ".join(PRESETS[1:])
        raise ValueError(f"configs/resnet20.py has the presets {known}, got {preset!r}.")
    if preset == "paper":
        config = recipes.defaults("per_tensor_mlp")  # what is not said is the papers'
        config.network.depth = 20
        config.train.epochs = 50.0  # of each block
        config.eval.progress_ratios = (1.0, 0.75, 0.5)
        config.eval.num_samples = 100
        return config
    config = recipes.defaults("projection", modulated=True, width_terms=(0.75, 0.5, 0.25))
    config.channel_order = "importance"  # a nested family that keeps the first channels loses least
    config.checkpoint_every = 100

    config.network.depth = 20

    # Chosen on validation images, see results/cifar100_resnet20/experiments.md.
    config.train.mode = "at_once"
    config.train.epochs = 4.0  # each image is seen by all sizes of its step
    config.train.warmup_epochs = 0.1
    config.train.warmup_phases = "all"
    config.train.block_init = "teacher"  # in closed form, so that there is no fit phase
    config.train.alpha_init = 1.0
    config.train.batch_size = 32
    config.train.share_images = True
    config.train.micro_batch = 16  # stays in the cache of one core
    config.train.num_random_sizes = 4
    config.train.min_width_ratio = 0.25
    config.train.sandwich = True  # arXiv 1903.05134
    config.train.fixed_ratios = (0.75, 0.5)  # they fall behind where only random sizes meet them
    config.train.per_block_widths = 0.5
    config.train.ce_weight = 1.0
    config.train.norm_weight = 1e-5
    config.train.reconstruction_weight = 0.0
    config.train.distillation_weight = 4.0
    config.train.temperature = 4.0
    config.train.optimizer = "muon"
    config.train.learning_rate = 3e-4
    config.train.alpha_learning_rate = 3e-4
    config.train.learned_learning_rate = 1.5e-4
    config.train.learned = "all"
    config.train.schedule = "cosine"
    config.train.fit_learning_rate = 4e-3  # of presets that have a fit phase
    config.train.depth_learning_rate = 5e-4  # of the preset `:depth`

    config.eval.width_ratios = (1.25, 1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.45, 0.4, 0.3, 0.25)
    config.eval.progress_images = 1000
    config.eval.batch_size = 50  # what the layers pass on stays in the cache of a core

    if preset in SHARED:  # as they were run
        config.train.epochs = 3.5
        config.train.temperature = 2.0
        config.inr.width_terms = ()
        config.train.num_random_sizes = 2
        config.train.fixed_ratios = ()
        config.train.learning_rate = 6e-4
        config.train.alpha_learning_rate = 6e-4
        config.train.learned_learning_rate = 3e-4
    if preset == "protocol_a":
        config.train.min_width_ratio = 0.5
        config.inr.max_cell = 1.75  # no cell as wide as those of a quarter of the channels
    if preset == "depth":
        config.inr.depth_term = True
        config.train.shallow_epochs = 3.0  # of a network that starts half way there
        config.train.depth_epochs = 1.25
        config.train.num_random_sizes = 5
        config.train.skip_blocks = 0.5
    if preset == "full":
        config.generated = "full"
        config.train.min_width_ratio = 0.5  # a quarter of the multiply-adds
        config.eval.width_ratios = (1.25, 1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)
    if preset == "grid":
        config.channel_order = "smoothness"
        config.inr = recipes.inr("grid")
    if preset == "per_tensor_mlp":
        config.inr = recipes.inr(
            "per_tensor_mlp",
            hidden_width=192,
            num_layers=4,
            num_frequencies=7,
            noise_scale=0.0,
            relative=False,
        )
        config.train.fit_steps = 1600
        config.train.fit_widths = "random"
        config.train.fit_target = "projected"
        config.train.epochs = 2.5
        config.train.batch_size = 64  # the networks of a step are made once, however many images
        config.train.learning_rate = 2e-4  # higher rates undo the fit
    if preset == "smoke":
        config.data.num_validation = 200
        config.teacher.epochs = 0.005
        config.train.epochs = 0.005
        config.train.micro_batch = 0  # half as much to compile
        config.eval.progress_images = 100
        config.eval.split = "validation"
        config.eval.width_ratios = (1.0, 0.5, 0.25)
        config.log_every = 1
    return config
