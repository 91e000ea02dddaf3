"""PyTorch: a state_dict for a CIFAR ResNet, written without PyTorch; images are NCHW there."""

import io
import math
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping

import jax
import numpy as np

from neumeta_jax.errors import check
from neumeta_jax.export.network import Network
from neumeta_jax.files.torch_files import read_tensors
from neumeta_jax.networks import cifar_import, cifar_resnet

_STORAGE_TYPES = {"<f4": "FloatStorage", "<i8": "LongStorage"}
_ALIGNMENT = 64  # of tensors in the file, so that torch.load(..., mmap=True) can map them


def to_torch(state_dict: Mapping[str, np.ndarray]) -> bytes:
    """The file that torch.save (PyTorch 1.6 and later) writes of `state_dict`; no PyTorch needed.

    A zip archive without compression: `data.pkl` describes the tensors, `data/0` and so on hold
    their numbers. Equal tensors give equal bytes.

    Args:
        state_dict: float32 and int64 arrays by name.
    """
    arrays = {}
    for name, array in state_dict.items():
        arrays[name] = array.astype(array.dtype.newbyteorder("<"))
        known = arrays[name].dtype.str in _STORAGE_TYPES
        check(known, f"{name} must be float32 or int64, got {array.dtype}.")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:

        def write(name: str, content: bytes):
            entry = zipfile.ZipInfo(f"archive/{name}")  # at the date 1980-01-01
            # An extra field fills up to the boundary, after 30 bytes of header, the name, and 4
            # bytes of its own.
            padding = -(stream.tell() + 30 + len(entry.filename) + 4) % _ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(entry, content)

        write("data.pkl", _pickled(arrays))
        write("byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            write(f"data/{key}", array.tobytes())
        write("version", b"3\n")
    return stream.getvalue()


def _pickled(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The pickle, protocol 2, of an OrderedDict of tensors.

    Written opcode by opcode, because `pickle` would import PyTorch to check what it names. These
    are the opcodes that torch.load(..., weights_only=True) allows.
    """

    def name(module: str, attribute: str) -> bytes:
        return b"c" + f"{module}\n{attribute}\n".encode()

    def text(value: str) -> bytes:
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def tuple_of(*items: bytes) -> bytes:
        return b"(" + b"".join(items) + b"t"

    ordered_dict = name("collections", "OrderedDict") + b")R"  # called without arguments
    pickled = b"\x80\x02" + ordered_dict + b"("
    for key, (tensor_name, array) in enumerate(arrays.items()):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        storage_type = name("torch", _STORAGE_TYPES[array.dtype.str])
        location = text(str(key)), text("cpu")
        storage = tuple_of(text("storage"), storage_type, *location, integer(array.size))
        arguments = tuple_of(
            storage + b"Q",  # a reference to a record of the archive
            integer(0),
            tuple_of(*map(integer, array.shape)),
            tuple_of(*map(integer, strides)),
            b"\x89",  # needs no gradient
            ordered_dict,  # has no hooks
        )
        pickled += text(tensor_name) + name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"
    return pickled + b"u."


def write(path: str | os.PathLike, network: Network) -> None:
    tensors = cifar_import.to_tensors(network.resnet, network.params)
    pathlib.Path(path).write_bytes(to_torch(tensors))


def read(path: str | os.PathLike) -> Callable:
    """The network of a file as a teacher is read, normalised images NHWC -> logits."""
    tensors = read_tensors(path)
    spec = cifar_import.infer_spec(tensors)
    params = cifar_resnet.fold_batch_norm(cifar_import.to_variables(spec, tensors))
    return jax.jit(lambda images: cifar_resnet.apply(spec, params, images))
