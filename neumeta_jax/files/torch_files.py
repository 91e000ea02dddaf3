"""Named arrays in the files of other programs: PyTorch, safetensors and npz.

A PyTorch checkpoint is a pickle, and a pickle can call anything while it loads. The reader here
lets it name a dozen things, all of which describe tensors; no other can be reached, so that a
hostile file is an error and not a program. PyTorch needs not be installed.
"""

import functools
import io
import math
import os
import pathlib
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from neumeta_jax.errors import UsageError, check
from neumeta_jax.files import archives, pickles, storage

# The codes of safetensors, and how their bytes are read.
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}
_TYPES |= {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)}
_DTYPES = {code: np.dtype(dtype) for code, dtype in _TYPES.items()}
# What PyTorch calls the storages of them.
_STORAGES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Bool": "BOOL"}
_STORAGES |= {"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8"}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

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

_REMEDY = "save the network's state_dict() and pass that file."
_BIG_ENDIAN = "was written in big-endian order; save it again on a little-endian machine."


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a `.pt`, `.pth`, `.th`, `.safetensors` or `.npz` file under their names.

    A state_dict in a checkpoint is found under the usual names ("state_dict", "model", "net",
    "model_ema", ...); what is no tensor (epoch, accuracy, ...) and the counter of an averaged model
    are left out; prefixes of wrappers ("module.", ...) are stripped where all names share them.

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
    check(
        path.suffix.lower() in _READERS,
        f"A network file ends in one of {', '.join(_READERS)}, got {path}; save the network's "
        "state_dict() as one of these.",
    )
    check(
        path.stat().st_size <= _MAX_SIZE,
        f"A network file has at most {_MAX_SIZE} bytes, got {path} of {path.stat().st_size}; save "
        "the network's state_dict() alone.",
    )
    # A UsageError is why a file that may be intact is not read: a sentence without its beginning.
    try:
        tensors = _READERS[path.suffix.lower()](path.read_bytes())
        check(tensors, f"holds no named tensors; {_REMEDY}")
    except (UsageError, archives.InflationError) as error:
        raise UsageError(f"{path} {error}") from None
    except Exception as error:  # what a damaged file raises in zipfile, pickle, ... is open-ended
        storage.check_is_damage(path, error)
        reason = show(str(error) or type(error).__name__, 200)
        message = f"{path} is truncated or corrupt ({reason}); download or save it again."
        raise UsageError(message) from error
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


def show(name: object, limit: int = 80) -> str:
    """Text out of a file, safe to print: short, and without control characters."""
    text = str(name)
    text = text if text.isascii() and text.isprintable() else ascii(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _native(array: np.ndarray) -> np.ndarray:
    """A contiguous copy of `array` in the machine's order of bytes, halves as float32."""
    if array.dtype == bool:
        return np.array(array.view(np.uint8) != 0, order="C")
    dtype = array.dtype.newbyteorder("=")
    if dtype in (np.float16, ml_dtypes.bfloat16):
        dtype = np.dtype(np.float32)
    return array.astype(dtype, order="C")


# --- zip archives, npz, safetensors ----------------------------------------------------------


def _open_zip(content: bytes) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(content))
    # Entries may share their bytes in the file, so that the sum is bounded as well as each.
    total = sum(entry.file_size for entry in archive.infolist())
    check(
        total <= _MAX_INFLATION * len(content) + _SLACK,
        f"would inflate to {total} bytes, where at most {_MAX_INFLATION} times its size are read; "
        "save it again uncompressed.",
    )
    return archive


_read_entry = functools.partial(archives.read_entry, inflation=_MAX_INFLATION, largest=_MAX_SIZE)
_read_npy = functools.partial(archives.read_npy, inflation=_MAX_INFLATION, largest=_MAX_SIZE)


def _read_npz(content: bytes) -> dict[str, np.ndarray]:
    archive = _open_zip(content)
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    found = {name.removesuffix(".npy"): _read_npy(archive, name) for name in names}
    # None: text, objects, ...
    return {name: _native(array) for name, array in found.items() if array is not None}


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    tensors = {}
    for name, entry in safetensors.deserialize(content):
        code = entry["dtype"]
        check(
            code in _DTYPES,
            f"has the tensor {show(name)} of type {show(code)}, but only {', '.join(_DTYPES)} are "
            "read; convert it to F32.",
        )
        array = np.frombuffer(entry["data"], _DTYPES[code])
        tensors[name] = _native(array.reshape(entry["shape"]))
    return tensors


# --- PyTorch ---------------------------------------------------------------------------------

# The pickle yields descriptions of tensors (`_Tensor`); bytes are read later, which the legacy
# format needs anyway: there they come after the pickle.


class _Type(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    """`size` elements from `start` of a record that has `record_size` elements."""

    key: str
    dtype: np.dtype
    record_size: int
    start: int
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def read(self, read_record: Callable[[str], bytes]) -> np.ndarray:
        """The array. Its bounds were checked when it was described."""
        key, dtype, record_size, start, _ = self.storage
        record = read_record(key)
        if len(record) != record_size * dtype.itemsize:
            raise ValueError(
                f"the storage {show(key)} has {len(record)} bytes for {record_size} of {dtype}"
            )
        if 0 in self.shape:
            return _native(np.empty(self.shape, dtype))
        view = np.lib.stride_tricks.as_strided(
            np.frombuffer(record, dtype)[start + self.offset :],
            self.shape,
            [stride * dtype.itemsize for stride in self.strides],
            writeable=False,
        )
        return _native(view)


class _Callable:
    """A function that a pickle may call. It cannot be changed from there."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setstate__(self, state):
        raise ValueError("it sets the attributes of a function")


def _is_shape(value: object) -> bool:
    """True for a short list of counts; booleans are none."""
    return (
        isinstance(value, tuple | list)
        and len(value) <= _MAX_DIMS
        and all(type(n) is int and 0 <= n < _MAX_COUNT for n in value)
    )


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    """Describes a tensor inside its storage, as torch._utils._rebuild_tensor and _v2 build it."""
    counts = _is_shape([offset]) and _is_shape(shape) and _is_shape(strides)
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


# All that a pickle can name. None of the values is a class or has an attribute that BUILD can set.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Callable(lambda *items: pickles.StateDict(*items)),
    ("torch", "Size"): _Callable(lambda sizes=(): tuple(sizes)),
    ("torch._utils", "_rebuild_tensor"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Callable(lambda tensor, *_: tensor),
    **{("torch", f"{name}Storage"): _Type(_DTYPES[code]) for name, code in _STORAGES.items()},
}


class _Unpickler(pickles.Unpickler):
    """Builds containers, numbers, text and descriptions of tensors. `storages` is what it met."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="utf-8")  # Python 2 wrote names as bytes
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        check(
            (module, name) in _GLOBALS,
            f"wants to call {show(f'{module}.{name}')} while loading, which could run code; only "
            f"tensors are read, so {_REMEDY}",
        )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size, *views = pid
        _, start, view_size = views[0] if views and views[0] is not None else (None, 0, size)
        named = isinstance(storage_type, _Type) and isinstance(key, str)
        counts = _is_shape((size, start, view_size))
        if kind != "storage" or not named or not counts or start + view_size > size:
            raise ValueError("a reference to something that is no storage of numbers")
        storage = _Storage(key, storage_type.dtype, size, start, view_size)
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.record_size) != (storage.dtype, size):
            raise ValueError(f"two descriptions of the storage {show(key)}")
        return storage


def _unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
    """The next object in `stream`, and the storages that it refers to."""
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.storages


def _read_pytorch(content: bytes) -> dict[str, np.ndarray]:
    # The content decides: the suffix says nothing about the two formats.
    load = _load_zip if content.startswith(b"PK") else _load_legacy
    loaded, read_record = load(content)
    for _ in range(_MAX_WRAPPERS):
        wrapped = [loaded.get(w) for w in _WRAPPERS] if isinstance(loaded, dict) else []
        loaded = next((inner for inner in wrapped if isinstance(inner, dict)), loaded)
    kind = type(loaded).__name__.lstrip("_")
    check(isinstance(loaded, dict), f"holds a {kind}, not a state_dict; {_REMEDY}")
    tensors = {
        name: tensor
        for name, tensor in loaded.items()
        if isinstance(name, str) and isinstance(tensor, _Tensor) and name != "n_averaged"
    }
    # Tensors may share a storage, so that a small file could describe any number of large ones.
    total = sum(tensor.num_bytes for tensor in tensors.values())
    if total > _MAX_INFLATION * len(content) + _SLACK:
        raise ValueError(f"{total} bytes of tensors in {len(content)} bytes")
    return {name: tensor.read(read_record) for name, tensor in tensors.items()}


def _load_zip(content: bytes) -> tuple[Any, Callable[[str], bytes]]:
    """Of PyTorch 1.6 and later: a pickle, and an entry for each storage."""
    archive = _open_zip(content)
    found = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    check(
        len(found) == 1,
        f"is a zip archive with {len(found)} entries data.pkl, where a PyTorch checkpoint has one; "
        "pass a file that torch.save wrote.",
    )
    root = found[0].removesuffix("data.pkl")
    byte_order = root + "byteorder"
    known = byte_order in archive.namelist()  # since PyTorch 2.1
    check(not known or _read_entry(archive, byte_order) == b"little", _BIG_ENDIAN)
    loaded, _ = _unpickle(io.BytesIO(_read_entry(archive, found[0])))
    return loaded, functools.cache(lambda key: _read_entry(archive, f"{root}data/{key}"))


def _load_legacy(content: bytes) -> tuple[Any, Callable[[str], bytes]]:
    """Before PyTorch 1.6: five pickles, then size and bytes of each storage."""
    stream = io.BytesIO(content)
    check(
        _unpickle(stream)[0] == _LEGACY_MAGIC,
        "is a pickle, but not a PyTorch checkpoint; pass a file that torch.save wrote.",
    )
    check(
        _unpickle(stream)[0] == _LEGACY_PROTOCOL,  # not shown: to print it may take for ever
        f"has another version of PyTorch's old format than {_LEGACY_PROTOCOL}, which is read; save "
        "it again with a current PyTorch.",
    )
    system, _ = _unpickle(stream)
    little = isinstance(system, dict) and system.get("little_endian") is True
    check(little, _BIG_ENDIAN)
    loaded, storages = _unpickle(stream)
    keys, _ = _unpickle(stream)
    records, position = {}, stream.tell()
    for key in keys:
        if not isinstance(key, str):  # the hash of something else may take for ever
            raise ValueError("a storage whose name is no text")
        storage = storages[key]
        (size,) = struct.unpack_from("<q", content, position)
        begin = position + 8
        position = begin + storage.record_size * storage.dtype.itemsize
        if size != storage.record_size:
            raise ValueError(
                f"the storage {show(key)} of {size} for {storage.record_size} elements"
            )
        records[key] = content[begin:position]  # shorter at the end of the file, as `read` will see
    return loaded, records.__getitem__


_READERS: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {
    **dict.fromkeys((".pt", ".pth", ".th"), _read_pytorch),
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
}
