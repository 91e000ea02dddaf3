"""Zip archives of strangers: entries and NumPy arrays, no size of which is believed unchecked."""

import io
import math
import zipfile

import numpy as np

_SLACK = 2**20  # small entries (a batch norm's ones) may inflate as they like


class InflationError(ValueError):
    """An entry is compressed in an unusual way or would take more memory than is allowed."""


def read_entry(archive: zipfile.ZipFile, name: str, *, inflation: int, largest: int) -> bytes:
    """The bytes of an entry, whose checksum is compared.

    Args:
        archive: open for reading.
        name: of the entry.
        inflation: how many times its compressed size it may have, and a MiB more.
        largest: how many bytes it may have at all.

    Raises:
        InflationError: before any memory is taken.
    """
    entry = archive.getinfo(name)
    limit = min(largest, inflation * entry.compress_size + _SLACK)
    # Other methods than these inflate a whole chunk before zipfile looks at the entry's size.
    known = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not known or entry.file_size > limit:
        shown = name if name.isascii() and name.isprintable() else ascii(name)
        raise InflationError(
            f"has an entry {shown[:80]} that inflates to {entry.file_size} bytes, where at most "
            f"{limit} are read, stored or deflated; save it again uncompressed."
        )
    return archive.read(entry)


def read_npy(
    archive: zipfile.ZipFile, name: str, *, inflation: int, largest: int
) -> np.ndarray | None:
    """The array of numbers in an entry `*.npy`, read-only; None for text, objects and records.

    The limits are those of `read_entry`. Nothing is unpickled.

    Raises:
        InflationError: as `read_entry`.
        ValueError: if the entry is damaged.
    """
    data = read_entry(archive, name, inflation=inflation, largest=largest)
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_2_0
    if version == (1, 0):
        read_header = np.lib.format.read_array_header_1_0
    shape, fortran_order, dtype = read_header(stream)
    if dtype.kind not in "biuf":
        return None
    size = len(data) - stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{ascii(name)[1:-1]} has {size} bytes for {shape} of {dtype}"[:200])
    array = np.frombuffer(data, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")
