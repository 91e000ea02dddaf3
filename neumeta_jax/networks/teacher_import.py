"""Teachers from other programs: PyTorch, safetensors and npz files as variables of the ResNet.

A PyTorch checkpoint is a pickle, and a pickle can call anything while it loads. The reader here
lets it name a dozen things, all of which describe tensors; no other can be reached, so that a
hostile file is an error and not a program. PyTorch needs not be installed.

    path -> read_tensors -> {PyTorch name: array} -> infer_spec -> ResNetSpec
                                                  -> to_variables -> {"params", "batch_stats"}
"""

import functools
import io
import math
import os
import pathlib
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from neumeta_jax.files import archives, pickles, storage
from neumeta_jax.networks.cifar_spec import NUM_STAGES, ResNetSpec

# The codes of safetensors; bfloat16 and booleans are read as integers, see `_native`.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "|u1"}
_DTYPES |= {f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)}
_DTYPES |= {f"U{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)}
_STORAGE_TYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_BIG_ENDIAN = "was written in big-endian order; save it again on a little-endian machine."

# What training scripts call the state_dict in a checkpoint, and what wrappers put before names.
# An average of the weights counts where they are not there themselves.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema")
_PREFIXES = ("module.", "model.", "ema_model.", "_orig_mod.")
_MAX_WRAPPERS = 3  # around one another

_MAX_SIZE = 2**31  # bytes of a file, and of an entry of a zip archive
_MAX_INFLATION = 10
_SLACK = 2**20  # which small files may inflate to as they like
_MAX_DIMS = 16
_MAX_COUNT = 2**48  # keeps every product of counts far from what NumPy's integers cannot hold
_MAX_BLOCKS = 1000  # per stage; the deepest published CIFAR ResNet has 200

_HEADS = ("fc", "linear", "classifier")
_SHORTCUTS = ("downsample", "shortcut")


class _RefusalError(Exception):
    """Why a file that may be intact is not read: the rest of a sentence that begins with its path.

    Damage needs no such care; whatever exception it raises ends in the same sentence.
    """


_REMEDY = "save the network's state_dict() and pass that file."


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a network file under their names, as NumPy arrays.

    A state_dict that lies in a checkpoint under one of the usual names ("state_dict", "model",
    "net", "model_ema", "ema", ...) is found there; whatever is no tensor (epoch, accuracy, ...) and
    the counter of an averaged model are left out; the prefixes of wrappers ("module.", ...) are
    stripped where all names share them.

    Args:
        path: a `.pt`, `.pth` or `.th` file (both formats of torch.save), `.safetensors` or `.npz`.

    Returns:
        Contiguous arrays in the stored types, but float16 and bfloat16 as float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind, truncated or corrupt, holds no tensors, or
            wants to do anything else than to describe tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"A network file was asked for at {path}, but there is no such file; check the path."
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"A network file ends in one of {', '.join(_READERS)}, got {path}; save the network's "
            "state_dict() as one of these."
        )
    if path.stat().st_size > _MAX_SIZE:
        raise ValueError(
            f"A network file has at most {_MAX_SIZE} bytes, got {path} of {path.stat().st_size}; "
            "save the network's state_dict() alone."
        )
    try:
        content = path.read_bytes()
        tensors = reader(content)
        if not tensors:
            raise _RefusalError(f"holds no named tensors; {_REMEDY}")
    except (_RefusalError, archives.InflationError) as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # what a damaged file raises in zipfile, pickle, ... is open-ended
        storage.check_is_damage(path, error)
        reason = _show(str(error) or type(error).__name__, 200)
        raise ValueError(
            f"{path} is truncated or corrupt ({reason}); download or save it again."
        ) from error
    return _strip_prefixes(tensors)


def _strip_prefixes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` without the wrappers' prefixes that all names share.

    >>> _strip_prefixes({"module.model.fc.weight": 1, "module.model.fc.bias": 2})
    {'fc.weight': 1, 'fc.bias': 2}
    """
    shared = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)
    if shared is None or not tensors:
        return dict(tensors)
    return _strip_prefixes({name.removeprefix(shared): t for name, t in tensors.items()})


def _show(name: object, limit: int = 80) -> str:
    """Text out of a file, safe to print: short, and without control characters."""
    text = str(name)
    text = text if text.isascii() and text.isprintable() else ascii(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _show_scalar(value: object) -> str:
    """As `_show`, but the type alone of a container, whose printing may take for ever."""
    return _show(value) if isinstance(value, int | float | str) else type(value).__name__


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) <= _MAX_DIMS
        and all(_is_count(n) for n in value)
    )


def _native(array: np.ndarray, code: str | None = None) -> np.ndarray:
    """A contiguous copy of `array`, which holds the bits of type `code`."""
    if code == "BF16":  # the upper half of a float32
        return np.left_shift(array.astype(np.uint32, order="C"), 16).view(np.float32)
    if code == "BOOL":
        return np.array(array != 0, order="C")
    dtype = np.float32 if array.dtype.kind == "f" and array.dtype.itemsize == 2 else array.dtype
    return array.astype(np.dtype(dtype).newbyteorder("="), order="C")


# Zip archives: PyTorch checkpoints and npz files.


def _open_zip(content: bytes) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(content))
    # Entries may share their bytes in the file, so that the sum is bounded as well as each.
    total = sum(entry.file_size for entry in archive.infolist())
    if total > _MAX_INFLATION * len(content) + _SLACK:
        raise _RefusalError(
            f"would inflate to {total} bytes, where at most {_MAX_INFLATION} times its size are "
            "read; save it again uncompressed."
        )
    return archive


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    return archives.read_entry(archive, name, inflation=_MAX_INFLATION, largest=_MAX_SIZE)


def _read_npz(content: bytes) -> dict[str, np.ndarray]:
    tensors = {}
    archive = _open_zip(content)
    for name in archive.namelist():
        if name.endswith(".npy"):
            array = archives.read_npy(archive, name, inflation=_MAX_INFLATION, largest=_MAX_SIZE)
            if array is not None:  # text, objects, ...: no tensor
                tensors[name.removesuffix(".npy")] = _native(array)
    return tensors


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    tensors = {}
    for name, entry in safetensors.deserialize(content):
        code = entry["dtype"]
        if code not in _DTYPES:
            raise _RefusalError(
                f"has the tensor {_show(name)} of type {_show(code)}, but only "
                f"{', '.join(_DTYPES)} are read; convert it to F32."
            )
        array = np.frombuffer(entry["data"], _DTYPES[code]).reshape(entry["shape"])
        tensors[name] = _native(array, code)
    return tensors


# PyTorch checkpoints. The pickle yields descriptions of tensors (`_Tensor`); bytes are read later,
# which the legacy format needs anyway: there they come after the pickle.


class _StorageType(NamedTuple):
    code: str


class _Storage(NamedTuple):
    """`size` elements from `start` of a record that has `record_size` elements."""

    key: str
    code: str
    record_size: int
    start: int
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Callable:
    """A function that a pickle may call. It cannot be changed from there."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setstate__(self, state):
        raise ValueError("it sets the attributes of a function")


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    """Describes a tensor inside its storage, as torch._utils._rebuild_tensor and _v2 build it."""
    counts = _is_count(offset) and _is_shape(shape) and _is_shape(strides)
    if not isinstance(storage, _Storage) or not counts or len(shape) != len(strides):
        raise ValueError("a tensor without a valid storage, offset, shape or strides")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # No more elements than the storage has: strides of 0 could make any number out of one.
    if math.prod(shape) > storage.size or (0 not in shape and last >= storage.size):
        raise ValueError(
            f"a tensor of shape {tuple(shape)}, strides {tuple(strides)} and offset {offset} in a "
            f"storage of {storage.size} elements"
        )
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise TypeError("a parameter that is no tensor")
    return tensor


# All that a pickle can name. None of the values is a class or has an attribute that BUILD can set.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Callable(lambda *items: pickles.StateDict(*items)),
    ("torch", "Size"): _Callable(lambda sizes=(): tuple(sizes)),
    ("torch._utils", "_rebuild_tensor"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Callable(_rebuild_parameter),
    **{("torch", name): _StorageType(code) for name, code in _STORAGE_TYPES.items()},
}


class _Unpickler(pickles.Unpickler):
    """Builds containers, numbers, text and descriptions of tensors. `storages` is what it met."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="utf-8")  # Python 2 wrote names as bytes
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise _RefusalError(
                f"wants to call {_show(f'{module}.{name}')} while loading, which could run code; "
                f"only tensors are read, so {_REMEDY}"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size, *views = pid
        view = views[0] if views and views[0] is not None else (None, 0, size)
        _, start, view_size = view
        named = isinstance(storage_type, _StorageType) and isinstance(key, str)
        if (
            kind != "storage"
            or not named
            or not _is_shape((size, start, view_size))
            or start + view_size > size
        ):
            raise ValueError("a reference to something that is no storage of numbers")
        storage = _Storage(key, storage_type.code, size, start, view_size)
        known = self.storages.setdefault(key, storage)
        if (known.code, known.record_size) != (storage.code, size):
            raise ValueError(f"two descriptions of the storage {_show(key)}")
        return storage


def _unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
    """The next object in `stream`, and the storages that it refers to."""
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.storages


def _read_pytorch(content: bytes) -> dict[str, np.ndarray]:
    # The content decides: the suffix says nothing about the two formats.
    if content.startswith(b"PK"):
        loaded, read_record = _load_zip(content)
    else:
        loaded, read_record = _load_legacy(content)
    for _ in range(_MAX_WRAPPERS):
        wrapped = [loaded.get(w) for w in _WRAPPERS] if isinstance(loaded, dict) else []
        loaded = next((inner for inner in wrapped if isinstance(inner, dict)), loaded)
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__.lstrip("_")
        raise _RefusalError(f"holds a {kind}, not a state_dict; {_REMEDY}")
    described = {
        name: tensor
        for name, tensor in loaded.items()
        if isinstance(name, str) and isinstance(tensor, _Tensor) and name != "n_averaged"
    }
    # Tensors may share a storage, so that a small file could describe any number of large ones.
    total = sum(
        math.prod(tensor.shape) * np.dtype(_DTYPES[tensor.storage.code]).itemsize
        for tensor in described.values()
    )
    if total > _MAX_INFLATION * len(content) + _SLACK:
        raise ValueError(f"{total} bytes of tensors in {len(content)} bytes")
    return {name: _materialise(tensor, read_record) for name, tensor in described.items()}


def _load_zip(content: bytes) -> tuple[Any, Callable[[str], bytes]]:
    archive = _open_zip(content)
    pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise _RefusalError(
            f"is a zip archive with {len(pickles)} entries data.pkl, where a PyTorch checkpoint "
            "has one; pass a file that torch.save wrote."
        )
    root = pickles[0].removesuffix("data.pkl")
    byte_order = root + "byteorder"  # absent before PyTorch 2.1
    if byte_order in archive.namelist() and _read_entry(archive, byte_order) != b"little":
        raise _RefusalError(_BIG_ENDIAN)
    loaded, _ = _unpickle(io.BytesIO(_read_entry(archive, pickles[0])))
    return loaded, functools.cache(lambda key: _read_entry(archive, f"{root}data/{key}"))


def _load_legacy(content: bytes) -> tuple[Any, Callable[[str], bytes]]:
    """The format before PyTorch 1.6: five pickles, then size and bytes of each storage."""
    stream = io.BytesIO(content)
    magic, _ = _unpickle(stream)
    if magic != _LEGACY_MAGIC:
        raise _RefusalError(
            "is a pickle, but not a PyTorch checkpoint; pass a file that torch.save wrote."
        )
    protocol, _ = _unpickle(stream)
    if protocol != _LEGACY_PROTOCOL:
        raise _RefusalError(
            f"has version {_show_scalar(protocol)} of PyTorch's old format, where "
            f"{_LEGACY_PROTOCOL} is read; save it again with a current PyTorch."
        )
    system, _ = _unpickle(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _RefusalError(_BIG_ENDIAN)
    loaded, storages = _unpickle(stream)
    keys, _ = _unpickle(stream)
    records, position = {}, stream.tell()
    for key in keys:
        if not isinstance(key, str):  # the hash of something else may take for ever
            raise ValueError("a storage whose name is no text")
        storage = storages[key]
        (size,) = struct.unpack_from("<q", content, position)
        begin = position + 8
        position = begin + storage.record_size * np.dtype(_DTYPES[storage.code]).itemsize
        if size != storage.record_size or position > len(content):
            raise ValueError(
                f"the storage {_show(key)} has {size} elements of {storage.record_size}, and "
                f"{len(content) - begin} bytes are left"
            )
        records[key] = content[begin:position]
    return loaded, records.__getitem__


def _materialise(tensor: _Tensor, read_record: Callable[[str], bytes]) -> np.ndarray:
    """The array that `tensor` describes. Its bounds were checked when it was described."""
    storage = tensor.storage
    dtype = np.dtype(_DTYPES[storage.code])
    record = read_record(storage.key)
    if len(record) != storage.record_size * dtype.itemsize:
        raise ValueError(
            f"the storage {_show(storage.key)} has {len(record)} bytes for {storage.record_size} "
            f"elements of {dtype.itemsize} bytes"
        )
    if 0 in tensor.shape:
        return _native(np.empty(tensor.shape, dtype), storage.code)
    view = np.lib.stride_tricks.as_strided(
        np.frombuffer(record, dtype)[storage.start + tensor.offset :],
        tensor.shape,
        [stride * dtype.itemsize for stride in tensor.strides],
        writeable=False,
    )
    return _native(view, storage.code)


_READERS: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {
    **dict.fromkeys((".pt", ".pth", ".th"), _read_pytorch),
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
}


# From names and shapes to the network.


def _shape(tensors: Mapping[str, Any], name: str, dims: int) -> tuple[int, ...]:
    shape = np.shape(tensors[name]) if name in tensors else None
    if shape is None or len(shape) != dims:
        given = "there is none" if shape is None else f"it has the shape {shape}"
        raise ValueError(
            f"A CIFAR ResNet has a tensor {name} of {dims} dimensions, but {given}; pass the "
            "state_dict of a CIFAR ResNet with basic blocks."
        )
    return shape


def infer_spec(tensors: Mapping[str, Any], *, image_size: int = 32) -> ResNetSpec:
    """The architecture that the names and shapes of `tensors` tell.

    Widths inside the blocks are read one by one, and a block that is absent between others counts
    as skipped, so that pruned and morphed networks are found as they are.

    >>> tensors = {"conv1.weight": np.zeros((16, 3, 3, 3)), "fc.weight": np.zeros((10, 64))}
    >>> for stage, sizes in {1: (16, 16), 2: (16, 32), 3: (32, 64)}.items():
    ...     tensors[f"layer{stage}.0.conv1.weight"] = np.zeros((12, sizes[0], 3, 3))
    ...     tensors[f"layer{stage}.0.conv2.weight"] = np.zeros((sizes[1], 12, 3, 3))
    >>> infer_spec(tensors).hidden_widths
    (12, 12, 12)

    Args:
        tensors: arrays under their PyTorch names.
        image_size: side of the square input in pixels, which tensors do not tell.

    Raises:
        ValueError: if they are not the tensors of a CIFAR ResNet with basic blocks.
    """
    present = set()
    for name in tensors:
        match = re.match(r"layer(\d{1,9})\.(\d{1,9})\.(.*)", name, re.ASCII)
        if match is None:
            continue
        stage, index = int(match[1]), int(match[2])
        if not 1 <= stage <= NUM_STAGES or index >= _MAX_BLOCKS or match[3].startswith("conv3."):
            raise ValueError(
                f"A CIFAR ResNet has layer1 to layer{NUM_STAGES} with at most {_MAX_BLOCKS} basic "
                f"blocks of two convolutions each, got the tensor {_show(name)}; pass the "
                "state_dict of such a network."
            )
        present.add((stage, index))
    blocks_per_stage = 1 + max((index for _, index in present), default=0)

    stem_width, channels, *_ = _shape(tensors, "conv1.weight", 4)
    stage_widths, hidden_widths = [stem_width], []
    for stage in range(1, NUM_STAGES + 1):
        if stage > 1:
            stage_widths.append(_shape(tensors, f"layer{stage}.0.conv2.weight", 4)[0])
        for index in range(blocks_per_stage):
            width = 0
            if (stage, index) in present:
                width = _shape(tensors, f"layer{stage}.{index}.conv1.weight", 4)[0]
            hidden_widths.append(width)
    projection = any(f"layer2.0.{name}.0.weight" in tensors for name in _SHORTCUTS)
    return ResNetSpec(
        stage_widths=tuple(stage_widths),
        hidden_widths=tuple(hidden_widths),
        num_classes=_shape(tensors, f"{_head(tensors)}.weight", 2)[0],
        image_size=image_size,
        channels=channels,
        shortcut="projection" if projection else "pad",
    )


def _head(tensors: Mapping[str, Any]) -> str:
    return next((name for name in _HEADS if f"{name}.weight" in tensors), _HEADS[0])


Layer = tuple[tuple[str, ...], str, str, str, str, tuple[int, ...]]


def layers(spec: ResNetSpec, tensors: Mapping[str, Any] | None = None) -> list[Layer]:
    """The convolutions of `spec`, each with its batch norm.

    `tensors` tells how shortcuts are called, else "downsample".

    Returns:
        Of each (path to its block or (), names of conv and norm in the linen tree, their names in
        PyTorch, shape of the kernel, OIHW).
    """
    shape = (spec.stage_widths[0], spec.channels, 3, 3)
    found: list[Layer] = [((), "stem", "stem_bn", "conv1", "bn1", shape)]
    for block in spec.blocks:
        if block.hidden_width == 0:
            continue
        path, prefix = (block.name,), f"layer{block.stage}.{block.index}"
        widths = block.in_width, block.hidden_width, block.out_width
        for n in (1, 2):
            names = f"conv{n}", f"bn{n}", f"{prefix}.conv{n}", f"{prefix}.bn{n}"
            found.append((path, *names, (widths[n], widths[n - 1], 3, 3)))
        if block.projection:
            names = [f"{prefix}.{name}" for name in _SHORTCUTS]
            name = next((n for n in names if f"{n}.0.weight" in (tensors or ())), names[0])
            shape = (block.out_width, block.in_width, 1, 1)
            found.append((path, "shortcut", "shortcut_bn", f"{name}.0", f"{name}.1", shape))
    return found


class _Leaf(NamedTuple):
    """One array of the linen tree: where it lies, its PyTorch name, its shape in PyTorch."""

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]


_NORM_LEAVES = (
    ("params", "scale", "weight"),
    ("params", "bias", "bias"),
    ("batch_stats", "mean", "running_mean"),
    ("batch_stats", "var", "running_var"),
)


def _leaves(spec: ResNetSpec, tensors: Mapping[str, Any]) -> list[_Leaf]:
    """All arrays of the variables of `spec`; `tensors` tells how head and shortcuts are called."""
    leaves = []
    for path, conv, norm, torch_conv, torch_norm, shape in layers(spec, tensors):
        leaves.append(_Leaf(("params", *path, conv, "kernel"), f"{torch_conv}.weight", shape))
        for kind, leaf, torch_leaf in _NORM_LEAVES:
            name = f"{torch_norm}.{torch_leaf}"
            leaves.append(_Leaf((kind, *path, norm, leaf), name, shape[:1]))
    head, shape = _head(tensors), (spec.num_classes, spec.stage_widths[-1])
    leaves.append(_Leaf(("params", "head", "kernel"), f"{head}.weight", shape))
    leaves.append(_Leaf(("params", "head", "bias"), f"{head}.bias", shape[:1]))
    return leaves


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
    leaves = _leaves(spec, tensors)
    missing = [leaf for leaf in leaves if leaf.name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"A ResNet{spec.depth} needs the tensor {missing[0].name} of shape "
            f"{missing[0].shape}{more}, but there is none; pass the complete state_dict of this "
            "network."
        )
    extra = sorted(set(tensors) - {leaf.name for leaf in leaves})
    extra = [name for name in extra if name.rpartition(".")[2] != "num_batches_tracked"]
    if extra:
        shown = ", ".join(_show(name) for name in extra[:3])
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise ValueError(
            f"A ResNet{spec.depth} of this shape has no place for the tensors {shown}{more}; pass "
            "the state_dict of a CIFAR ResNet with basic blocks and batch norm."
        )

    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for leaf in leaves:
        tree = variables
        for key in leaf.path[:-1]:
            tree = tree.setdefault(key, {})
        tree[leaf.path[-1]] = _convert(leaf, tensors[leaf.name])
    return variables


# PyTorch's order of axes to Flax's, by number of axes: OIHW -> HWIO, (out, in) -> (in, out).
_AXES: dict[int, Sequence[int]] = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


def _convert(leaf: _Leaf, tensor: Any):
    given = np.shape(tensor)
    if given != leaf.shape:
        raise ValueError(
            f"The tensor {leaf.name} needs the shape {leaf.shape}, got {given}; pass the "
            "state_dict of a network with the shapes of the spec."
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
        array = np.asarray(tensor).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(
            f"The tensor {leaf.name} needs finite float32 values, got "
            f"{np.count_nonzero(~np.isfinite(array))} others; its training diverged or the file "
            "is corrupt, so pass another file."
        )
    if leaf.path[-1] == "var" and array.min() < 0:
        raise ValueError(
            f"The tensor {leaf.name} needs variances of at least 0, got {array.min()}; the file "
            "is corrupt, so pass another file."
        )
    return jnp.asarray(array.transpose(_AXES[array.ndim]))


def load_teacher(
    path: str | os.PathLike, *, image_size: int = 32, spec: ResNetSpec | None = None
) -> tuple[ResNetSpec, dict[str, Any]]:
    """The network in a file: its architecture and the variables of `cifar_resnet.ResNet(spec)`.

    Args:
        path: see `read_tensors`.
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
    differences = "; ".join(
        f"{what} {in_file} in the file, {asked} in the config"
        for what, in_file, asked in _differences(found, spec)
    )
    raise ValueError(
        f"{os.fspath(path)} is a ResNet{found.depth} with {found.num_classes} classes; the config "
        f"asks for a ResNet{spec.depth} with {spec.num_classes} classes ({differences}); pass a "
        "file of that network or change the config."
    )


def _differences(found: ResNetSpec, asked: ResNetSpec) -> list[tuple[str, Any, Any]]:
    fields = ("depth", "num_classes", "stage_widths", "channels", "shortcut")
    pairs = [(field, getattr(found, field), getattr(asked, field)) for field in fields]
    if found.depth == asked.depth:
        pairs += [
            (f"hidden width of {ours.name}", ours.hidden_width, theirs.hidden_width)
            for ours, theirs in zip(found.blocks, asked.blocks, strict=True)
        ]
    return [pair for pair in pairs if pair[1] != pair[2]][:4]  # enough to see what is wrong
