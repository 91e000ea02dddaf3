"""What several test files need: a refusal in one sentence, and files in the formats of others."""

import contextlib
import io
import json
import struct
import zipfile

import numpy as np
import pytest

from neumeta_jax.errors import UsageError


@contextlib.contextmanager
def refused(match, *words, error=ValueError):
    """What runs within must raise `error` or UsageError, one sentence with `match` and `words`."""
    with pytest.raises(error, match=match) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) in (error, UsageError), repr(caught.value)
    assert message.isprintable() and message.endswith(".") and ". " not in message, message
    assert len(message) < 1000, message
    for word in words:
        assert str(word) in message, message


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def flipped(content, position, bits=255):
    """`content` with a byte of it changed."""
    return content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :]


def zipped(entries, method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def unzipped(content):
    """Returns {entry: bytes} of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npz_bytes(arrays, save=np.savez):
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def npy_bytes(shape, dtype="|u1", content=b""):
    """A file *.npy whose header claims this, before whatever content."""
    stream = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


def safetensors_with(header, content=b""):
    """A safetensors file of a header, as bytes or as a value, and what comes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


# What strict research code asks of JAX.
STRICT = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_enable_x64": True,
    "jax_debug_nans": True,
    "jax_check_tracer_leaks": True,
    "jax_transfer_guard": "disallow",
}
