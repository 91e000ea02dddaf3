"""A network of any family, or one of your own, on the digits: minutes on two CPU cores.

    neumeta train --config=own:vgg --workdir=/tmp/vgg
    neumeta train --config=own --config.network.factory=my_module:MyNet --workdir=/tmp/mine

Presets: `:mlp`, `:vgg`, `:mobilenet`, `:resnet`, `:mixer` and `:vit` are the families of
`neumeta_jax.networks`, each trained from scratch, then made elastic, residual streams included;
`:vgg_cifar100` and `:vit_cifar100` are larger ones on CIFAR-100, with `--config.data.dir`.
In the second command `network.factory` names a function or class "module:name" that makes a
flax.linen module: images to logits, with `train` as an argument if batch norm or dropout need it.
Without a preset and a factory it is an MLP.
"""

import json
from typing import Any

from ml_collections import ConfigDict

from neumeta_jax.runs import recipes

# Sizes and rates, chosen on validation images.
FIELDS: dict[str, dict[str, Any]] = {
    "mlp": {"widths": (256, 128)},
    "vgg": {"stages": ((16, 16), (32, 32), (64,)), "dense": (64,)},
    "mobilenet": {
        "stages": ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 2)),
        "stem_width": 16,
        "stem_stride": 1,
        "head_width": 128,
    },
    "resnet": {"blocks": (1, 1, 1), "bottleneck": False, "width": 16, "stem": "cifar"},
    "mixer": {"patch": 2, "width": 48, "depth": 2, "token_width": 24, "channel_width": 96},
    "vit": {"patch": 2, "width": 48, "depth": 2, "heads": 4, "mlp_ratio": 2.0},
    "vgg_cifar100": {"stages": ((32,), (64,), (128, 128))},
    "vit_cifar100": {
        "patch": 4,
        "width": 96,
        "depth": 4,
        "heads": 4,
        "mlp_ratio": 2.0,
        "pool": "mean",
    },
}
TEACHERS = {  # epochs, rate, weight decay; the others have (40, 3e-3, 0.05)
    "mlp": (60, 3e-3, 0.05),
    "mixer": (100, 1e-2, 0.3),
    "vit": (200, 6e-3, 0.3),
    "mobilenet": (25, 5e-3, 0.05),
    "vgg_cifar100": (6, 3e-3, 0.05),
    "vit_cifar100": (8, 1e-3, 0.05),
}
CIFAR100_EPOCHS = {"vgg_cifar100": 1.5, "vit_cifar100": 3.0}  # of the INR
PRESETS = ("", *FIELDS)


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        known = ", ".join(PRESETS[1:])
        raise ValueError(f"configs/own.py has the presets {known}, got {preset!r}.")
    config = recipes.defaults("projection", modulated=True)
    config.channel_order = "importance"
    config.generated = "full"

    config.data.name = "digits"
    config.data.num_validation = 144  # a tenth
    config.data.crop_padding = 1  # of 8 pixels
    config.data.flip = False  # mirrored digits are none

    config.network.factory = preset.removesuffix("_cifar100") or "mlp"
    config.network.fields = json.dumps(FIELDS.get(preset, {}))

    epochs, rate, decay = TEACHERS.get(preset, (40, 3e-3, 0.05))
    config.teacher.optimizer = "adamw"
    config.teacher.epochs = float(epochs)
    config.teacher.batch_size = 64
    config.teacher.learning_rate = rate
    config.teacher.weight_decay = decay

    config.train.mode = "at_once"
    config.train.epochs = 100.0
    config.train.warmup_epochs = 1.0
    config.train.warmup_phases = "all"
    config.train.block_init = "teacher"  # in closed form, so that there is no fit phase
    config.train.alpha_init = 1.0
    config.train.batch_size = 64
    config.train.share_images = True
    config.train.num_random_sizes = 2
    config.train.min_width_ratio = 0.25
    config.train.sandwich = True  # arXiv 1903.05134
    config.train.per_block_widths = 0.5
    config.train.ce_weight = 1.0
    config.train.norm_weight = 0.0
    config.train.reconstruction_weight = 0.0
    config.train.distillation_weight = 4.0
    config.train.temperature = 2.0
    config.train.optimizer = "muon"
    config.train.learning_rate = 3e-3
    config.train.alpha_learning_rate = 1e-3
    config.train.learned_learning_rate = 5e-4
    config.train.learned = "all"
    config.train.schedule = "cosine"

    config.eval.width_ratios = (1.0, 0.75, 0.5, 0.25)
    config.eval.progress_ratios = (1.0, 0.5, 0.25)
    config.eval.batch_size = 500

    if preset.endswith("_cifar100"):
        config.data.name = "cifar100"
        config.data.num_validation = 5000
        config.data.crop_padding = 4
        config.data.flip = True
        config.teacher.batch_size = 128
        config.train.epochs = CIFAR100_EPOCHS[preset]
        config.train.warmup_epochs = 0.1
        config.train.micro_batch = 16  # stays in the cache of one core
    if preset == "vgg_cifar100":  # as configs/resnet20.py
        config.inr.width_terms = (0.75, 0.5, 0.25)
        config.train.num_random_sizes = 4
        config.train.fixed_ratios = (0.75, 0.5)
        config.train.temperature = 4.0
        config.train.learning_rate = 1.5e-3
        config.train.alpha_learning_rate = 5e-4
        config.train.learned_learning_rate = 2.5e-4
    return config
