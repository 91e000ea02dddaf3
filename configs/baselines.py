"""The rows of the comparison: other ways to a family of sizes, on the same data and budget.

    neumeta fetch cifar100 cifar100-resnet20-teacher
    neumeta compare --config=baselines:slimmable --workdir=DIR \\
        --config.teacher.file=cifar100-resnet20-teacher

Each row draws `baseline.images` training images (1.1 epochs; `--budget=X` times as many) and is
made of the same teacher, split and augmentation; `neumeta_jax.comparison` says what the methods
are, `neumeta report` makes tables of what it writes. `:NAME_resnet56` is the same row for a
ResNet56 (`cifar100-resnet56-teacher`), with batches of 128, for a GPU.

Rates are for budgets of about an epoch: of 0.001, 0.003 and 0.01 in runs of a tenth of it, by
validation images. Those were the teacher's training images, which makes low rates look better than
they are, most of all at full size; so the widths below it decided, and between two the higher.
Training from scratch needs a hundred times as much; a network from scratch at this budget is a
lower bound and no judgement.

Hardware and time: results/README.md has the device and the wall-clock of each row.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from neumeta_jax.comparison.baseline import Baseline
from neumeta_jax.runs import recipes

# A network with soft labels learns from them and from labels as 4 to 1, as the INR's recipe does.
DISTILLED = {
    "distill_from": "teacher",
    "ce_weight": 0.2,
    "distillation_weight": 0.8,
    "temperature": 4.0,
}
INDIVIDUAL = {
    "method": "individual",
    "title": "trained individually",
    "source": "He et al., 2016",
    "learning_rate": 0.1,
}
SLIMMABLE = {
    "method": "slimmable",
    "title": "slimmable, 4 widths",
    "source": "Yu et al., arXiv 1812.08928",
    "learning_rate": 0.002,  # the losses of the widths are added up
}
UNIVERSAL = {
    "method": "universally_slimmable",
    "title": "universally slimmable",
    "source": "Yu and Huang, arXiv 1903.05134",
    "learning_rate": 0.002,
    # The full network learns from labels and the others from its answers alone.
    "distill_from": "full",
    "ce_weight": 0.0,
    "distillation_weight": 1.0,
    "temperature": 1.0,
}
PRUNING = {
    "method": "pruning",
    "title": "pruned",
    "source": "Molchanov et al., arXiv 1906.10771; Li et al., arXiv 1608.08710 (L1)",
    "criterion": "surgeon",
    "criteria": ("random", "l1", "l2", "taylor", "surgeon"),
}
FINETUNED = {
    "method": "pruning_finetuned",
    "title": "pruned, each size fine-tuned",
    "source": "Molchanov et al., arXiv 1906.10771",
    "variant": "surgeon",
    "learning_rate": 0.003,
}
NEUMETA = {"method": "inr", "title": "NeuMeta, all blocks", "source": "arXiv 2410.11878"}
HTTY = {"method": "inr", "title": "HTTY", "source": "arXiv 2505.05510"}
OURS = {"method": "inr", "title": "this project", "source": "configs/resnet20.py"}

# Name of the preset -> the fields of the section `baseline` that are not its defaults.
ROWS = {
    "individual": INDIVIDUAL,
    "individual_distilled": {**INDIVIDUAL, **DISTILLED, "variant": "distilled"},
    "slimmable": SLIMMABLE,
    "slimmable_distilled": {**SLIMMABLE, **DISTILLED, "variant": "distilled"},
    "universally_slimmable": UNIVERSAL,
    "universally_slimmable_distilled": {**UNIVERSAL, **DISTILLED, "variant": "distilled"},
    "pruning": PRUNING,
    "pruning_finetuned": FINETUNED,
    "pruning_finetuned_distilled": {**FINETUNED, **DISTILLED, "variant": "surgeon, distilled"},
    "pruning_refitted_distilled": {
        **FINETUNED,
        **DISTILLED,
        "refitted": True,
        "variant": "surgeon, products solved anew, distilled",
    },
    "neumeta": {**NEUMETA, "variant": "as published"},
    "neumeta_fitted": {**NEUMETA, "variant": "fitted to the teacher first"},
    "htty": {**HTTY, "variant": "as published"},
    "ours": {**OURS, "variant": "widths [0.25, 1]"},
    "ours_shared": {**OURS, "variant": "one set of values for widths [0.25, 1]"},
    "ours_a": {**OURS, "variant": "widths [0.5, 1]; 0.25 never trained"},
}
LARGE = "_resnet56"
SHARED = "ours_shared"  # of a ResNet56, whose recipe has no terms for small sizes, this is `ours`
PRESETS = ("", *ROWS, *(name + LARGE for name in ROWS if name != SHARED))


def get_config(preset: str = "") -> ConfigDict:
    if preset not in PRESETS:
        known = ", ".join(PRESETS[1:])
        raise ValueError(f"configs/baselines.py has the presets {known}, got {preset!r}.")
    large = preset.endswith(LARGE)
    name = preset.removesuffix(LARGE) or "ours"
    if name == "ours_a":
        config = _load("resnet56" if large else "resnet20").get_config("protocol_a")
    elif name == SHARED:
        config = _load("resnet20").get_config("shared")
    elif large and ROWS[name]["method"] == "inr":
        config = _load("resnet56").get_config()
    else:
        config = _load("resnet20").get_config()
    config.network.depth = 56 if large else 20
    config.dtype = "float32"
    config.log_every = 50
    config.checkpoint_every = 100

    batch_size = 128 if large else 64
    section = {**recipes.field_defaults(Baseline), "batch_size": batch_size, **ROWS[name]}
    config.baseline = ConfigDict(section)

    config.eval.width_ratios = config.baseline.width_ratios
    if name.startswith("neumeta"):
        _neumeta(config, fitted=name == "neumeta_fitted")
        config.train.micro_batch = 0 if large else 32  # stays in a CPU's cache
        config.eval.num_samples = 1 if name == "neumeta_fitted" else 100
    if name == "htty":
        paper = _load("resnet56_paper").get_config()
        config.channel_order = paper.channel_order
        config.inr, config.train = paper.inr, paper.train
        config.eval.num_samples = paper.eval.num_samples
    return config


def _neumeta(config: ConfigDict, *, fitted: bool) -> None:
    """The numbers of NeuMeta's released configurations for CIFAR ResNets; its bugs are off.

    Released: a random width for each step, now and then the full one. Here a step has a batch of
    each, as all steps of `update.inr_update` have the full size.
    """
    config.channel_order = "smoothness"
    config.inr = recipes.inr(
        "per_tensor_mlp", hidden_width=256, num_layers=4, num_frequencies=16, activation="relu"
    )
    config.train = _load("resnet56_paper").get_config("at_once").train
    config.train.warmup_epochs = 0.0
    config.train.batch_size = 64
    config.train.num_random_sizes = 1
    config.train.alpha_learning_rate = 0.0  # SkipInit is HTTY's
    config.train.ce_weight = 1.0
    config.train.norm_weight = 1e-4
    config.train.ema_decay = 0.995
    config.train.learning_rate = 1e-3
    config.train.weight_decay = 1e-2
    config.train.learned = "none"
    if fitted:
        # What makes most of so few images: the INR starts close to the teacher, which needs none,
        # without noise, and then learns slowly, since higher rates undo the fit.
        config.inr.noise_scale = 0.0
        config.train.noise = False
        config.train.fit_steps = 800
        config.train.fit_learning_rate = 4e-3
        config.train.fit_widths = "random"
        config.train.learning_rate = 1e-4
        config.train.weight_decay = 1e-4
        config.train.schedule = "cosine"
        config.train.distillation_weight = 4.0
        config.train.temperature = 2.0
        config.train.learned = "all"
        config.train.learned_learning_rate = 1e-4


def _load(name: str):
    # Config files are loaded by path, from anywhere; `from configs import` would not always work.
    path = pathlib.Path(__file__).resolve().with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"neumeta_jax_config_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
