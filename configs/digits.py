"""Quick start: handwritten digits (8x8, bundled with scikit-learn), ResNet20, from scratch.

    neumeta train --config=digits --workdir=/tmp/digits

Hardware and time: two CPU cores, one to three minutes.
Result: test top-1 98.1 / 97.8 / 97.8 / 97.8 % at width ratio 1 / 0.75 / 0.6 / 0.5 and 97.5 % at
the never trained 0.4, see results/digits/README.md.

Presets: `:smoke` is a run of seconds that touches every phase.
"""

from ml_collections import ConfigDict

from neumeta_jax.runs import recipes

PRESETS = ("", "smoke")


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        known = ", ".join(PRESETS[1:])
        raise ValueError(f"configs/digits.py has the presets {known}, got {preset!r}.")
    # The papers' kind of INR. Sizes and rates are chosen on the validation images, for two cores.
    config = recipes.defaults("per_tensor_mlp")
    config.checkpoint_every = 200

    config.data.name = "digits"
    config.data.num_validation = 144  # a tenth
    config.data.crop_padding = 1  # of 8 pixels
    config.data.flip = False  # mirrored digits are none

    config.network.depth = 20
    config.network.stage_widths = (8, 16, 32)  # half as wide as for CIFAR

    config.teacher.epochs = 15.0
    config.teacher.batch_size = 64

    config.inr.hidden_width = 64
    config.inr.num_layers = 4
    config.inr.num_frequencies = 5
    config.inr.noise_scale = 0.5
    config.inr.noise_per = "channel"

    config.train.block_init = "teacher"  # what the fit phase found
    config.train.fit_steps = 300
    config.train.fit_learning_rate = 3e-3
    config.train.fit_widths = "random"
    config.train.alpha_init = 1.0  # blocks that start at the teacher need no SkipInit
    config.train.epochs = 8.0
    config.train.final_epochs = 25.0
    config.train.warmup_epochs = 1.0
    config.train.warmup_phases = "all"
    config.train.batch_size = 64
    config.train.num_random_sizes = 2
    config.train.sandwich = True  # arXiv 1903.05134
    config.train.ce_weight = 1.0
    config.train.norm_weight = 1e-5
    config.train.reconstruction_weight = 1e-2
    config.train.distillation_weight = 1.0
    config.train.temperature = 2.0
    config.train.learning_rate = 1e-3
    config.train.alpha_learning_rate = 1e-3
    config.train.learned_learning_rate = 1e-3
    config.train.learned = "all"
    config.train.schedule = "cosine"

    config.eval.progress_ratios = (1.0, 0.5)
    config.eval.progress_images = 1000
    config.eval.batch_size = 500

    if preset == "smoke":
        config.network.depth = 14
        config.network.stage_widths = (4, 6, 8)
        config.teacher.epochs = 1.0
        config.inr.hidden_width = 8
        config.inr.num_layers = 2
        config.train.fit_steps = 5
        config.train.epochs = 1.0
        config.train.final_epochs = 1.0
        config.eval.width_ratios = (1.25, 1.0, 0.5, 0.25)
        config.log_every = 4
        config.checkpoint_every = 3
    return config
