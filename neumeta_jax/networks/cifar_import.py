"""CIFAR ResNets under the names of PyTorch: teachers from other programs, and the way back.

    path -> torch_files.read_tensors -> {PyTorch name: array} -> infer_spec -> ResNetSpec
                                                              -> to_variables -> linen variables

The names are those of chenyaofo/pytorch-cifar-models; `infer_spec` and `to_variables` also read
those of akamaster/pytorch_resnet_cifar10 (the head is `linear`) and of others.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from neumeta_jax.errors import check
from neumeta_jax.files.torch_files import read_tensors, show
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import NUM_STAGES, ResNetSpec

_HEADS = ("fc", "linear", "classifier")
_SHORTCUTS = ("downsample", "shortcut")
_COUNTER = "num_batches_tracked"  # of a batch norm; nothing here needs it
_MAX_BLOCKS = 1000  # per stage; the deepest published CIFAR ResNet has 200

# A convolution of the linen tree: the name of its batch norm there, and both names in PyTorch.
_LAYERS = {
    "stem": ("stem_bn", "conv1", "bn1"),
    "conv1": ("bn1", "conv1", "bn1"),
    "conv2": ("bn2", "conv2", "bn2"),
    "shortcut": ("shortcut_bn", "{shortcut}.0", "{shortcut}.1"),
}
# A batch norm's tensors in PyTorch, and where they are in the linen variables.
_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
# Axes by their number: OIHW to HWIO and (out, in) to (in, out), and back.
_TO_FLAX: dict[int, Sequence[int]] = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TORCH: dict[int, Sequence[int]] = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}

Leaf = tuple[tuple[str, ...], tuple[int, ...]]


def leaves(spec: ResNetSpec, *, head: str = "fc", shortcut: str = "downsample") -> dict[str, Leaf]:
    """All tensors of `spec`: PyTorch's name -> (path in the linen variables, PyTorch's shape).

    >>> leaves(ResNetSpec((4, 6, 8), (4, 6, 8), num_classes=5))["layer1.0.bn1.running_mean"]
    (('batch_stats', 'stage1_block0', 'bn1', 'mean'), (4,))
    """
    found: dict[str, Leaf] = {}
    shapes: dict[Any, Any] = flatten_dict(cifar_resnet.param_shapes(spec))
    for (*block, layer, leaf), shape in shapes.items():
        shape = tuple(shape[axis] for axis in _TO_TORCH[len(shape)])
        if layer == "head":
            name = {"kernel": "weight", "bias": "bias"}[leaf]
            found[f"{head}.{name}"] = ("params", layer, leaf), shape
            continue
        norm, *names = _LAYERS[layer]
        prefix = re.sub(r"stage(\d+)_block(\d+)", r"layer\1.\2.", "".join(block))
        torch_conv, torch_norm = (prefix + name.format(shortcut=shortcut) for name in names)
        if leaf == "kernel":
            found[f"{torch_conv}.weight"] = ("params", *block, layer, leaf), shape
            continue
        for torch_leaf, (kind, name) in _NORM.items():  # which the folded bias stands for
            found[f"{torch_norm}.{torch_leaf}"] = (kind, *block, norm, name), shape
    return found


def infer_spec(tensors: Mapping[str, Any], *, image_size: int = 32) -> ResNetSpec:
    """The architecture that the names and shapes of `tensors` tell.

    Widths inside the blocks are read one by one, and a block that is absent between others counts
    as skipped, so that pruned and morphed networks are found as they are.

    >>> spec = ResNetSpec((4, 6, 8), (5, 0, 3, 7, 9, 1), num_classes=5)
    >>> infer_spec({name: np.zeros(shape) for name, (_, shape) in leaves(spec).items()}) == spec
    True

    Args:
        tensors: arrays under their PyTorch names.
        image_size: side of the square input in pixels, which tensors do not tell.

    Raises:
        ValueError: if they are not the tensors of a CIFAR ResNet with basic blocks.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = np.shape(tensors[name]) if name in tensors else None
        given = "there is none" if found is None else f"it has the shape {found}"
        check(
            found is not None and len(found) == dims,
            f"A CIFAR ResNet has a tensor {name} of {dims} dimensions, but {given}; pass the "
            "state_dict of a CIFAR ResNet with basic blocks.",
        )
        return found or ()

    present, last = set(), 0
    for name in tensors:
        match = re.match(r"layer(\d{1,9})\.(\d{1,9})\.(.*)", name, re.ASCII)
        if match is None:
            continue
        stage, index = int(match[1]), int(match[2])
        known = 1 <= stage <= NUM_STAGES and index < _MAX_BLOCKS
        check(
            known and not match[3].startswith("conv3."),
            f"A CIFAR ResNet has layer1 to layer{NUM_STAGES} with at most {_MAX_BLOCKS} basic "
            f"blocks of two convolutions each, got the tensor {show(name)}; pass the state_dict of "
            "such a network.",
        )
        present.add(f"layer{stage}.{index}")
        last = max(last, index)

    stem_width, channels, *_ = shape("conv1.weight", 4)
    widths = [shape(f"layer{stage}.0.conv2.weight", 4)[0] for stage in range(2, NUM_STAGES + 1)]
    blocks = [f"layer{stage + 1}.{n}" for stage in range(NUM_STAGES) for n in range(last + 1)]
    hidden = [shape(f"{block}.conv1.weight", 4)[0] if block in present else 0 for block in blocks]
    projection = f"layer2.0.{_name(tensors, _SHORTCUTS)}.0.weight" in tensors
    return ResNetSpec(
        stage_widths=(stem_width, *widths),
        hidden_widths=tuple(hidden),
        num_classes=shape(f"{_name(tensors, _HEADS)}.weight", 2)[0],
        image_size=image_size,
        channels=channels,
        shortcut="projection" if projection else "pad",
    )


def _name(tensors: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of `names` that a module of `tensors` has, else the first of all."""
    modules = {module for name in tensors for module in name.split(".")}
    return next((name for name in names if name in modules), names[0])


def to_variables(spec: ResNetSpec, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of `cifar_resnet.ResNet(spec)` with the values of `tensors`.

    Args:
        spec: the network's shapes.
        tensors: arrays under their PyTorch names; convolutions OIHW, the head (out, in).

    Returns:
        {"params", "batch_stats"}, kernels HWIO and (in, out), all float32.

    Raises:
        ValueError: if a tensor is missing, superfluous (`num_batches_tracked` aside), of another
            shape, not finite, or a negative variance.
    """
    head, shortcut = _name(tensors, _HEADS), _name(tensors, _SHORTCUTS)
    wanted = leaves(spec, head=head, shortcut=shortcut)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"A ResNet{spec.depth} needs the tensor {missing[0]} of shape "
            f"{wanted[missing[0]][1]}{more}, but there is none; pass the complete state_dict of "
            "this network."
        )
    extra = [show(n) for n in sorted(set(tensors) - set(wanted)) if n.split(".")[-1] != _COUNTER]
    more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
    check(
        not extra,
        f"A ResNet{spec.depth} of this shape has no place for the tensors {', '.join(extra[:3])}"
        f"{more}; pass the state_dict of a CIFAR ResNet with basic blocks and batch norm.",
    )
    arrays = {path: _checked(name, tensors[name], shape) for name, (path, shape) in wanted.items()}
    return unflatten_dict(
        {path: jnp.asarray(x.transpose(_TO_FLAX[x.ndim])) for path, x in arrays.items()}
    )


def _checked(name: str, tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor as float32, if that is what its place takes."""
    check(
        np.shape(tensor) == shape,
        f"The tensor {name} needs the shape {shape}, got {np.shape(tensor)}; pass the state_dict "
        "of a network with the shapes of the spec.",
    )
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
        array = np.asarray(tensor).astype(np.float32)
    others = np.count_nonzero(~np.isfinite(array))
    check(
        others == 0,
        f"The tensor {name} needs finite float32 values, got {others} others; its training "
        "diverged or the file is corrupt, so pass another file.",
    )
    check(
        not name.endswith("running_var") or array.min() >= 0,
        f"The tensor {name} needs variances of at least 0, got {array.min()}; the file is corrupt, "
        "so pass another file.",
    )
    return array


def to_tensors(spec: ResNetSpec, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a folded network under PyTorch's names, in the order of its classes.

    At full width the class of chenyaofo/pytorch-cifar-models loads them strictly (that of akamaster
    where shortcuts are padded); else hidden widths inside the blocks differ from those of their
    stage, so the class must take them, as the one in examples/torch_resnet.py does. A skipped block
    is `nn.Identity`. Batch norm is the identity with the folded bias: at PyTorch's eps of 1e-5

        (x - 0) / sqrt(float32(1 - eps) + eps) * 1 + bias,

    and in float32 the root is exactly 1, so the network computes what the folded one does.

    Returns:
        float32 arrays, convolutions OIHW, the head (out, in); int64 `num_batches_tracked`.
    """
    folded = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(params).items()}
    convs = {norm: conv for conv, (norm, *_) in _LAYERS.items()}
    tensors: dict[str, np.ndarray] = {}
    head = "fc" if spec.shortcut == "projection" else "linear"
    for name, ((_, *block, layer, leaf), shape) in leaves(spec, head=head).items():
        if layer not in convs:
            tensors[name] = folded[*block, layer, leaf].transpose(_TO_TORCH[len(shape)])
            continue
        variance = 1 - cifar_resnet.BATCH_NORM_EPSILON
        identity = {"scale": 1, "bias": folded[*block, convs[layer], "bias"], "mean": 0}
        tensors[name] = np.full(shape, identity.get(leaf, variance), np.float32)
        if leaf == "var":
            tensors[f"{name.rpartition('.')[0]}.{_COUNTER}"] = np.array(0, np.int64)
    return {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}


def load_teacher(
    path: str | os.PathLike, *, image_size: int = 32, spec: ResNetSpec | None = None
) -> tuple[ResNetSpec, dict[str, Any]]:
    """The network in a file: its architecture and the variables of `cifar_resnet.ResNet(spec)`.

    Args:
        path: see `torch_files.read_tensors`.
        image_size: side of the square input in pixels; with `spec`, its image size is used.
        spec: the architecture that is required, if one is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, holds no CIFAR ResNet, or another one than `spec`.
    """
    tensors = read_tensors(path)
    try:
        found = infer_spec(tensors, image_size=spec.image_size if spec else image_size)
        if spec is None or spec == found:
            return found, to_variables(found, tensors)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} holds no usable network: {error}") from error
    fields = ("depth", "num_classes", "stage_widths", "channels", "shortcut")
    pairs = [(field, getattr(found, field), getattr(spec, field)) for field in fields]
    if found.depth == spec.depth:
        pairs += [
            (f"hidden width of {ours.name}", ours.hidden_width, theirs.hidden_width)
            for ours, theirs in zip(found.blocks, spec.blocks, strict=True)
        ]
    shown = [f"{what} {a} in the file, {b} in the config" for what, a, b in pairs if a != b]
    raise ValueError(
        f"{os.fspath(path)} is a ResNet{found.depth} with {found.num_classes} classes; the config "
        f"asks for a ResNet{spec.depth} with {spec.num_classes} classes ({'; '.join(shown[:4])}); "
        "pass a file of that network or change the config."
    )
