"""What a config consists of, with a default for every field; configs/ say what differs.

    config = recipes.defaults("projection", modulated=True)
    config.train.epochs = 60.0

Fields are described where they are used: `InrRecipe` and `TeacherRecipe`, the INR kinds in
`inr`, `Data`, `Network`, `Evaluation` and `Run` here.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from neumeta_jax.core.inr import describe_inr, make_inr
from neumeta_jax.core.recipe import InrRecipe
from neumeta_jax.errors import check
from neumeta_jax.runs.teacher import TeacherRecipe

CHANNEL_ORDERS = ("smoothness", "importance", "as_trained")
DTYPES = ("float32", "bfloat16")
SPLITS = ("test", "validation")


@dataclasses.dataclass(frozen=True)
class Run:
    """The fields of a config that lie in no section.

    Attributes:
        seed: of everything random but the validation split.
        dtype: of activations, "float32" or "bfloat16"; weights and moments are float32.
        channel_order: of the teacher's channels: by "smoothness" (papers), by "importance", or
            "as_trained".
        generated: which blocks of a ResNet the INR generates, see `cifar_spec.generated_blocks`;
            of another network "full" makes residual streams elastic too.
        log_every, eval_every, checkpoint_every: steps between lines of metrics, evaluations on
            validation images (0: at the end of each phase only) and checkpoints.
    """

    seed: int = 0
    dtype: str = "float32"
    channel_order: str = "smoothness"
    generated: str = "inner"
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 500

    def __post_init__(self):
        check(
            self.channel_order in CHANNEL_ORDERS,
            f"channel_order must be one of {CHANNEL_ORDERS}, got {self.channel_order!r}.",
        )
        check(self.dtype in DTYPES, f"dtype must be float32 or bfloat16, got {self.dtype!r}.")


@dataclasses.dataclass(frozen=True)
class Data:
    """The section `data` of a config.

    Attributes:
        name, dir, image_size: see `datasets.load_dataset`; "" and 0 stand for its defaults.
        num_validation, split_seed: see `datasets.split_validation`.
        crop_padding, flip, mixup, cutmix: of images, see `preprocessing`.
        mean, std: a number for each channel of images in [0, 1]; empty: those of the data set.
    """

    name: str = "cifar100"
    dir: str = ""
    image_size: int = 0
    num_validation: int = 5000  # the papers choose on the test set; we do not
    split_seed: int = 0
    crop_padding: int = 4
    flip: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Network:
    """The section `network` of a config.

    Attributes:
        depth, stage_widths, shortcut: of a CIFAR ResNet, see `cifar_spec.resnet_spec`.
        factory: another network in its place, "module:function" or a kind of `networks.FAMILIES`,
            see `networks.linen.LinenSpec`.
        fields: JSON of its keyword arguments; lists become tuples.
    """

    depth: int = 56
    stage_widths: tuple[int, ...] = (16, 32, 64)
    shortcut: str = "projection"
    factory: str = ""
    fields: str = "{}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The section `eval` of a config.

    Attributes:
        split: of the grid, "test" or "validation".
        width_ratios: of the grid at the end.
        progress_ratios, progress_images: widths and validation images of evaluations on the way.
        batch_size: images of a forward pass.
        num_samples: noisy samples of the weights that are averaged.
    """

    split: str = "test"
    width_ratios: tuple[float, ...] = (1.25, 1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25)
    progress_ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    progress_images: int = 5000
    batch_size: int = 1000
    num_samples: int = 1

    def __post_init__(self):
        check(self.split in SPLITS, f"eval.split must be test or validation, got {self.split!r}.")
        check(
            self.batch_size >= 1 and self.num_samples >= 1,
            "eval.batch_size and eval.num_samples must be at least 1, got "
            f"{self.batch_size} and {self.num_samples}.",
        )


@dataclasses.dataclass(frozen=True)
class Teacher(TeacherRecipe):
    """The section `teacher`: `file` is a trained network to import; empty: one is trained first."""

    file: str = ""


@dataclasses.dataclass(frozen=True)
class Train(InrRecipe):
    """The section `train`: `init_from` is a trained INR to start from; empty: none."""

    init_from: str = ""


SECTIONS = {
    "data": Data,
    "network": Network,
    "teacher": Teacher,
    "train": Train,
    "eval": Evaluation,
}
# Options that earlier versions had, and the values with which nothing differed without them.
_REMOVED = {
    ("teacher", "label_smoothing"): 0.0,
    ("train", "clip"): 10.0,
    ("train", "max_width_ratio"): 1.0,
    ("train", "stream_weight"): 0.0,
    ("train", "skip_order"): "last",
}

T = TypeVar("T")


def field_defaults(cls: type) -> dict[str, Any]:
    """The fields of a dataclass that have a default."""
    pairs = {field.name: field.default for field in dataclasses.fields(cls)}
    return {name: value for name, value in pairs.items() if value is not dataclasses.MISSING}


def inr(kind: str, **fields: Any) -> Any:
    """The section `inr` of a config: all fields of a kind, `fields` in place of their defaults."""
    return ConfigDict(describe_inr(make_inr(kind, **fields)))


def defaults(kind: str, **fields: Any) -> Any:
    """A ConfigDict with every field at its default, for an INR of `kind` with `fields`."""
    sections = {name: ConfigDict(field_defaults(cls)) for name, cls in SECTIONS.items()}
    return ConfigDict({**field_defaults(Run), **sections, "inr": inr(kind, **fields)})


def from_fields(cls: type[T], fields: Mapping[str, Any], name: str) -> T:
    """A value of the dataclass `cls` from the section `name` of a config, "" for its top level.

    Raises:
        UsageError: for a field that it does not have, or a value of another type than its default.
    """
    known = field_defaults(cls)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    where = f"The config section {name!r}" if name else "The config"
    for field, value in fields.items():
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {list(known)}."
        check(field in known, f"{where} has no field {field!r}; {hint}")
        wanted, given = (int if type(v) is float else type(v) for v in (known[field], value))
        shown = ascii(value)[:80]
        check(wanted is given, f"{where} must have {field} like {known[field]!r}, got {shown}.")
    return cls(**fields)


def sections(config: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    """(what lies in no section, the values of `SECTIONS` by name) of a config.

    Raises:
        UsageError: for a section that no run reads, one that is none, and as `from_fields`.
    """
    unread = {name for name, value in config.items() if isinstance(value, Mapping)}
    unread -= {*SECTIONS, "inr", "baseline"}
    check(
        not unread,
        f"The config must have the sections {', '.join(SECTIONS)} and inr, got "
        f"{', '.join(sorted(map(ascii, unread)))} too; leave out what no run reads.",
    )
    for name in (*SECTIONS, "inr"):
        check(
            isinstance(config[name], Mapping),
            f"The config's {name} must be a section with fields, got {config[name]!r:.80}.",
        )
    alone = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    found = {name: from_fields(cls, config[name], name) for name, cls in SECTIONS.items()}
    return from_fields(Run, alone, ""), found


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, which an earlier version may have written, with the fields of this one.

    What it does not have counts as its default, with which a run is what it was. Options that are
    gone are left out where they changed nothing.

    Raises:
        UsageError, ValueError: if such an option did change something.
    """
    result = {**field_defaults(Run), **config}
    for name, cls in SECTIONS.items():
        if isinstance(config.get(name), Mapping):
            result[name] = {**field_defaults(cls), **config[name]}
    for (name, field), neutral in _REMOVED.items():
        section = result[name] if isinstance(result.get(name), dict) else {}
        value = section.pop(field, neutral)
        check(
            value == neutral or (field == "skip_order" and not section["skip_blocks"]),
            f"{name}.{field} must be {neutral!r}, as this version has no other, got {value!r}; use "
            "the version that the run was made with.",
        )
    if isinstance(config.get("inr"), Mapping) and "kind" in config["inr"]:
        result["inr"] = describe_inr(make_inr(**config["inr"]))
    return result
