"""Quick start: handwritten digits (8x8, bundled with scikit-learn), ResNet14, from scratch.

    python train.py --config=configs/digits.py --workdir=/tmp/digits

Hardware and time: two CPU cores, about two minutes.
Result: test top-1 97.8 / 98.3 / 98.1 / 98.3 % at width ratio 1 / 0.75 / 0.6 / 0.5 and 97.8 % at
the never trained 0.4, see results/digits/README.md.

Presets: `:smoke` is a run of seconds that touches every phase.
"""

from ml_collections import ConfigDict

PRESETS = ("", "smoke")


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        raise ValueError(f"configs/digits.py has the presets {PRESETS[1:]}, got {preset!r}.")
    config = ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.channel_order = "smoothness"
    config.generated = "inner"
    config.log_every = 50
    config.eval_every = 0
    config.checkpoint_every = 200

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.dir = ""
    config.data.num_validation = 144
    config.data.split_seed = 0
    config.data.crop_padding = 1
    config.data.flip = False
    config.data.mixup = 0.0  # share of the images mixed with another as a whole
    config.data.cutmix = 0.0  # and of those with a box of another
    config.data.mean = ()
    config.data.std = ()

    config.network = ConfigDict()
    config.network.depth = 20
    config.network.stage_widths = (8, 16, 32)
    config.network.shortcut = "projection"

    config.teacher = ConfigDict()
    config.teacher.file = ""
    config.teacher.epochs = 15.0
    config.teacher.batch_size = 64
    config.teacher.learning_rate = 0.1
    config.teacher.momentum = 0.9
    config.teacher.weight_decay = 5e-4
    config.teacher.label_smoothing = 0.0

    config.inr = ConfigDict()
    config.inr.kind = "per_tensor_mlp"
    config.inr.hidden_width = 64
    config.inr.num_layers = 4
    config.inr.num_frequencies = 5
    config.inr.activation = "elu"
    config.inr.noise_scale = 0.5
    config.inr.noise_per = "channel"

    config.train = ConfigDict()
    config.train.init_from = ""
    config.train.mode = "blockwise"
    config.train.blocks_per_phase = 1
    config.train.block_init = "teacher"
    config.train.fit_steps = 300
    config.train.fit_learning_rate = 3e-3
    config.train.fit_widths = "random"
    config.train.alpha_init = 1.0
    config.train.epochs = 8.0
    config.train.final_epochs = 25.0
    config.train.depth_epochs = 0.0
    config.train.depth_learning_rate = 8e-4
    config.train.shallow_epochs = 0.0
    config.train.shallow_learning_rate = 8e-4
    config.train.warmup_epochs = 1.0
    config.train.warmup_phases = "all"
    config.train.batch_size = 64
    config.train.share_images = False
    config.train.micro_batch = 0
    config.train.num_random_sizes = 2
    config.train.min_width_ratio = 0.5
    config.train.max_width_ratio = 1.0
    config.train.sandwich = True
    config.train.per_block_widths = 0.0
    config.train.skip_blocks = 0.0
    config.train.max_skipped = 0.5
    config.train.skip_order = "random"
    config.train.noise = True
    config.train.ce_weight = 1.0
    config.train.norm_weight = 1e-5
    config.train.reconstruction_weight = 1e-2
    config.train.distillation_weight = 1.0
    config.train.stream_weight = 0.0
    config.train.distill_from = "teacher"
    config.train.temperature = 2.0
    config.train.ema_decay = 0.0
    config.train.optimizer = "adamw"
    config.train.learning_rate = 1e-3
    config.train.alpha_learning_rate = 1e-3
    config.train.learned_learning_rate = 1e-3
    config.train.weight_decay = 1e-4
    config.train.clip = 10.0
    config.train.learned = "all"
    config.train.schedule = "cosine"

    config.eval = ConfigDict()
    config.eval.split = "test"
    config.eval.width_ratios = (1.25, 1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25)
    config.eval.progress_ratios = (1.0, 0.5)
    config.eval.progress_images = 1000
    config.eval.batch_size = 500
    config.eval.num_samples = 1

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
