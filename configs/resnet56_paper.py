"""CIFAR-100, ResNet56, the recipe of "How to Train Your Metamorphic Deep Neural Network".

    python train.py --config=configs/resnet56_paper.py --workdir=DIR \\
        --config.data.dir=FOLDER_OR_NPZ --config.teacher.file=cifar100_resnet56-f2eff4c8.pt

Numbers are those of arXiv 2505.05510 and its released code. 92 MLPs with 187.8 M parameters in all,
23 phases of 50 epochs; the authors report 66.13 / 66.00 / 66.10 / 65.36 % at compression 0 / 25 /
50 / 75 % (the last one never trained) and about a day on one GPU. Hardware: a GPU or TPU with at
least 24 GB. We have not run it to the end.

Presets: `:cifar10` (use the public cifar10_resnet56 as teacher), `:at_once` trains all blocks in
one phase (NeuMeta, arXiv 2410.11878), `:smoke` touches every phase on a CPU in a few minutes.
"""

from ml_collections import ConfigDict

PRESETS = ("", "cifar10", "at_once", "smoke")


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        raise ValueError(
            f"configs/resnet56_paper.py has the presets {PRESETS[1:]}, got {preset!r}."
        )
    config = ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.channel_order = "smoothness"
    config.generated = "inner"  # 23 of 27 blocks
    config.log_every = 50
    config.eval_every = 0  # besides the end of each phase
    config.checkpoint_every = 500

    config.data = ConfigDict()
    config.data.name = "cifar10" if preset == "cifar10" else "cifar100"
    config.data.dir = ""
    config.data.num_validation = 5000  # the papers choose on the test set; we do not
    config.data.split_seed = 0
    config.data.crop_padding = 4
    config.data.flip = True
    config.data.mixup = 0.0  # share of the images mixed with another as a whole
    config.data.cutmix = 0.0  # and of those with a box of another
    config.data.mean = ()  # those of the data set
    config.data.std = ()

    config.network = ConfigDict()
    config.network.depth = 56
    config.network.stage_widths = (16, 32, 64)
    config.network.shortcut = "projection"

    config.teacher = ConfigDict()  # used without teacher.file: He et al., 2016, longer
    config.teacher.file = ""
    config.teacher.epochs = 200.0
    config.teacher.batch_size = 128
    config.teacher.learning_rate = 0.1
    config.teacher.momentum = 0.9
    config.teacher.weight_decay = 5e-4
    config.teacher.label_smoothing = 0.0

    config.inr = ConfigDict()  # section 3 of the paper
    config.inr.kind = "per_tensor_mlp"
    config.inr.hidden_width = 512
    config.inr.num_layers = 8
    config.inr.num_frequencies = 32
    config.inr.activation = "elu"
    config.inr.noise_scale = 1.0
    config.inr.noise_per = "query"

    config.train = ConfigDict()
    config.train.init_from = ""
    config.train.mode = "blockwise"
    config.train.epochs = 50.0  # of each block; 350 in the released configuration
    config.train.final_epochs = 0.0
    config.train.depth_epochs = 0.0
    config.train.depth_learning_rate = 8e-4
    config.train.shallow_epochs = 0.0
    config.train.shallow_learning_rate = 8e-4
    config.train.warmup_epochs = 20.0
    config.train.warmup_phases = "stage"
    config.train.blocks_per_phase = 1
    config.train.block_init = "copy"
    config.train.fit_steps = 0  # the papers start at random; the reconstruction loss does the rest
    config.train.fit_learning_rate = 8e-4
    config.train.fit_widths = "full"
    config.train.alpha_init = 0.0
    config.train.batch_size = 128
    config.train.share_images = False
    config.train.micro_batch = 0
    config.train.num_random_sizes = 3
    config.train.min_width_ratio = 0.5
    config.train.max_width_ratio = 1.0
    config.train.sandwich = False
    config.train.per_block_widths = 0.0
    config.train.skip_blocks = 0.0
    config.train.max_skipped = 0.5
    config.train.skip_order = "random"
    config.train.noise = True
    config.train.ce_weight = 100.0
    config.train.norm_weight = 1e-3
    config.train.reconstruction_weight = 1.0
    config.train.distillation_weight = 0.0
    config.train.stream_weight = 0.0
    config.train.distill_from = "teacher"
    config.train.temperature = 1.0
    config.train.ema_decay = 0.0
    config.train.optimizer = "adamw"
    config.train.learning_rate = 8e-4
    config.train.alpha_learning_rate = 1e-4
    config.train.learned_learning_rate = 7e-5
    config.train.weight_decay = 1e-4
    config.train.clip = 10.0
    config.train.learned = "last"  # the last block and the head, once stage 3 is reached
    config.train.schedule = "constant"

    config.eval = ConfigDict()
    config.eval.split = "test"
    config.eval.width_ratios = (1.25, 1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25)
    config.eval.progress_ratios = (1.0, 0.75, 0.5)
    config.eval.progress_images = 5000
    config.eval.batch_size = 1000
    config.eval.num_samples = 100

    if preset == "at_once":
        config.train.mode = "at_once"
        config.train.epochs = 200.0
        config.train.alpha_init = 1.0
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
