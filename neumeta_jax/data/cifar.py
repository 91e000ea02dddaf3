"""CIFAR-10 and CIFAR-100, https://www.cs.toronto.edu/~kriz/cifar.html, in both their versions.

The archives are never unpacked to disk, and the pickles of the python version are read by an
unpickler that can run no code.
"""

import gzip
import io
import pathlib
import tarfile
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from neumeta_jax.data.formats import Arrays, read_all, read_file, reading
from neumeta_jax.errors import UsageError, check
from neumeta_jax.files import pickles


class _Files(NamedTuple):
    places: list[str]
    train: list[str]
    test: list[str]
    label_key: bytes
    label_bytes: int  # in a row of the binary version; the last of them is the class


_PLACES_10 = ["cifar-10-python.tar.gz", "cifar-10-batches-py"]
_PLACES_10 += ["cifar-10-binary.tar.gz", "cifar-10-batches-bin"]
_PLACES_100 = ["cifar-100-python.tar.gz", "cifar-100-python"]
_PLACES_100 += ["cifar-100-binary.tar.gz", "cifar-100-binary"]
_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
FILES = {
    "cifar10": _Files(_PLACES_10, _BATCHES, ["test_batch"], b"labels", 1),
    "cifar100": _Files(_PLACES_100, ["train"], ["test"], b"fine_labels", 2),  # coarse, then fine
}


def find(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """The archive or extracted folder to read; `root` itself may be either."""
    if name not in FILES or root.is_file():
        return root if name in FILES else None
    files = FILES[name]
    for folder in (root / name, root):
        for place in files.places:
            if (folder / place).exists():
                return folder / place
        # One telling file is enough; those that are missing are reported later. A folder `train`
        # holds images by class.
        if any((folder / (files.train[0] + end)).is_file() for end in ("", ".bin")):
            return folder
    return None


def load(name: str, place: pathlib.Path) -> Arrays:
    """The arrays in a tar archive or a folder, in whichever version it holds."""
    files = FILES[name]
    wanted = [*files.train, *files.test]
    contents = _read_files(place, {*wanted, *(f"{file}.bin" for file in wanted)})
    end = ".bin" if contents and contents.keys().isdisjoint(wanted) else ""
    missing = [file + end for file in wanted if file + end not in contents]
    check(
        not missing,
        f"{place} must hold all files of {name}, got none called {', '.join(missing)}; "
        "fetch the archive again or check the name of the data set.",
    )

    def read(batches: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [_read_batch(contents[b + end], f"{b + end} in {place}", files) for b in batches]
        # A row is a plane of red, one of green, one of blue.
        images = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        return images, np.concatenate([labels for _, labels in parts])

    return *read(files.train), *read(files.test)


def _read_batch(content: bytes, source: str, files: _Files) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [num, 3072] and labels [num] of a batch, binary where its name says so."""
    with reading(source):
        if source.startswith(tuple(f"{name}.bin" for name in (*files.train, *files.test))):
            rows = np.frombuffer(content, np.uint8).reshape(-1, files.label_bytes + 3072)
            return rows[:, files.label_bytes :], rows[:, files.label_bytes - 1]
        found = _Unpickler(content, source).load()
        pixels, labels = found[b"data"].array().reshape(-1, 3072), found[files.label_key]
        # NumPy would follow lists inside lists, of which a hundred bytes can make 2**64.
        if not isinstance(labels, list) or any(type(label) is not int for label in labels):
            raise TypeError("labels must be a list of integers")
        if len(labels) != len(pixels):
            raise ValueError(f"{len(labels)} labels for {len(pixels)} images")
        return pixels, np.array(labels)


def _read_files(place: pathlib.Path, names: Collection[str]) -> dict[str, bytes]:
    """{basename: content} of the files in a folder or tar archive called one of `names`."""
    if place.is_dir():
        paths = [place / name for name in names]
        return {path.name: read_file(path) for path in paths if path.is_file()}
    contents: dict[str, bytes] = {}
    with reading(place), place.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        # Into memory, because a header that claims terabytes is then no longer than what is there.
        content = read_all(gzip.GzipFile(fileobj=raw) if compressed else raw)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                # Only regular files: a link in an archive may point anywhere.
                if name in names and member.isreg() and (file := archive.extractfile(member)):
                    contents[name] = file.read()
    return contents


class _PickledDtype:
    """Stands for numpy.dtype in a pickle; only bytes are accepted."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        if code not in (b"u1", "u1"):
            shown = repr(code[:20]) if isinstance(code, bytes | str) else type(code).__name__
            raise TypeError(f"pixels must be uint8, not {shown}")

    def __setstate__(self, state: object) -> None:
        pass  # Byte order and alignment, of which a byte has none.


class _PickledArray:
    """Stands for numpy.ndarray in a pickle; keeps the state from which to rebuild it."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, _, self.fortran_order, self.content = state

    def array(self) -> np.ndarray:
        order = "F" if self.fortran_order else "C"
        return np.frombuffer(self.content, np.uint8).reshape(self.shape, order=order)


class _Unpickler(pickles.Unpickler):
    """Reads CIFAR's Python 2 pickles and can call nothing but the stand-ins above.

    NumPy's own functions stay out of reach too: with hostile arguments they allocate at will.
    """

    def __init__(self, content: bytes, source: str) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._source = source

    def find_class(self, module_name: str, global_name: str) -> Any:
        match module_name, global_name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return lambda *_: _PickledArray()
            case "numpy", "ndarray":
                return _PickledArray
            case "numpy", "dtype":
                return _PickledDtype
            case "_codecs", "encode":  # How Python 3 writes bytes in protocol 2.
                return lambda text, _: text.encode("latin1")
        name = ascii(f"{module_name}.{global_name}"[:80])[1:-1]
        raise UsageError(
            f"{self._source} must hold nothing but arrays, lists and strings, got a request for "
            f"{name}, which was refused; do not trust this file."
        )
