"""Data sets as uint8 arrays, read once, in NumPy, from files that the user has.

    dataset = load_dataset("cifar100", data_dir="path/to/archives")
    splits = split_validation(dataset, num_validation=5000, seed=0)

What happens to batches of them on the device is in `preprocessing`.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import math
import os
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from neumeta_jax.files import archives, pickles, storage

NUM_CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}

# Per-channel (mean, std) of images scaled to [0, 1]. The CIFAR numbers are those of the pretrained
# networks of chenyaofo/pytorch-cifar-models, which must see what they were trained on; cifar10's
# std is the mean over images of their own std, smaller than what `channel_statistics` measures.
# Those of digits were measured with `channel_statistics` on its training images.
NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar100": ((0.507, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "digits": ((0.3055,), (0.3760,)),
}

_HOW_TO_NAME = "with --config.data.dir or --data_dir, data_dir in Python"
_MAX_FILE_BYTES = 2**28  # The largest true file, CIFAR-100's train, has 155 MB.
_MAX_ARCHIVE_BYTES = 2**30  # of a tar archive, uncompressed; both CIFARs have 180 MB.
_MAX_ARRAY_BYTES = 2**34  # of an array in an .npz file
_MAX_INFLATION = 100  # of it; photographs compress to a half, digits to a tenth


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in memory, checked; made by `make_dataset` and `load_dataset`.

    Attributes:
        name: what `NORMALIZATION` and logs call it.
        train_images: uint8 [num_train, size, size, channels].
        train_labels: int32 [num_train].
        test_images: uint8 [num_test, size, size, channels].
        test_labels: int32 [num_test].
        num_classes: labels are in [0, num_classes).
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int

    @property
    def image_size(self) -> int:
        return self.train_images.shape[1]

    @property
    def channels(self) -> int:
        return self.train_images.shape[3]

    def fingerprint(self) -> str:
        """Returns 16 hex digits of a SHA-256 over the shapes and bytes of all arrays.

        The order of the images counts: tensorflow-datasets stores them shuffled, so its copy of a
        data set has another fingerprint than the original archives.
        """
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test arrays; dtypes and shapes as in `Dataset`."""

    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def make_dataset(
    name: str,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int | None = None,
    source: str = "the arguments",
) -> Dataset:
    """Returns a `Dataset` of arrays that have been checked.

    Args:
        name: see `Dataset`.
        train_images, test_images: uint8 [num, size, size, channels], or [num, size, size] for gray.
        train_labels, test_labels: integers [num], at least 0.
        num_classes: by default the known number for `name`, else the largest label plus one.
        source: the file that errors name.

    Raises:
        ValueError: if an array has another dtype or shape, is empty, or a label is out of range.

    >>> gray = np.zeros((4, 8, 8), np.uint8)
    >>> dataset = make_dataset("zeros", gray, np.arange(4), gray[:2], np.arange(2))
    >>> dataset.train_images.shape, dataset.num_classes
    ((4, 8, 8, 1), 4)
    """
    train = _check_split("train", train_images, train_labels, source)
    test = _check_split("test", test_images, test_labels, source)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"train_images and test_images in {source} must have images of one shape, got "
            f"{list(train[0].shape[1:])} and {list(test[0].shape[1:])}; resize one of them."
        )
    found = np.union1d(train[1], test[1])
    largest = int(found[-1])
    num_classes = num_classes or NUM_CLASSES.get(name)
    if num_classes is None and len(found) != largest + 1:
        absent = int(np.setdiff1d(np.arange(len(found)), found)[0])
        raise ValueError(
            f"Labels of {name!r} must count the classes from 0 without a gap, got labels up to "
            f"{largest} and no image of class {absent} in {source}; number the classes anew."
        )
    num_classes = num_classes or largest + 1
    if largest >= num_classes:
        raise ValueError(
            f"Labels of {name!r} must be below {num_classes=}, got {largest} in {source}; "
            "check the name of the data set."
        )
    return Dataset(name, *train, *test, num_classes)


def _check_split(
    split: str, images: np.ndarray, labels: np.ndarray, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images with a channel axis and labels as int32, or says what is wrong with them."""
    images, labels = np.asarray(images), np.asarray(labels)
    what = f"{split}_images in {source}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise ValueError(
            f"{what} must be non-empty uint8 of shape [num, size, size, channels], "
            f"got {images.dtype} {list(images.shape)}; convert the array and save it again."
        )
    if images.shape[1] != images.shape[2]:
        raise ValueError(
            f"{what} must be square with channels last, got {list(images.shape)}; "
            "crop, pad or transpose the images."
        )
    what = f"{split}_labels in {source}"
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        raise ValueError(
            f"{what} must be one integer for each of {len(images)} images, "
            f"got {labels.dtype} {list(labels.shape)}; make the two arrays match."
        )
    if labels.min() < 0 or labels.max() >= 2**31:
        raise ValueError(
            f"{what} must be from 0 to 2**31 - 1, got {labels.min()} to {labels.max()}; "
            "number the classes from 0."
        )
    return images[..., None] if images.ndim == 3 else images, labels.astype(np.int32)


def load_dataset(name: str, *, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Returns a data set from files on this machine, the first of these that is there:

    1. `data_dir` is a file `*.npz`, or a folder with `<name>.npz`, with the arrays `train_images`,
       `train_labels`, `test_images`, `test_labels` as in `make_dataset`; any `name` will do;
    2. "digits" without `data_dir`: the 1,797 scans that come with scikit-learn, see `_load_digits`;
    3. `data_dir` is, or is a folder with, the original archives, extracted or not: CIFAR in its
       python or binary version, MNIST and Fashion-MNIST as IDX files (`*-ubyte`, `*-ubyte.gz`),
       also in a subfolder called `name` or where torchvision puts them (`MNIST/raw`);
    4. what tensorflow-datasets has prepared as array_record under `data_dir`, by default in
       $TFDS_DATA_DIR or ~/tensorflow_datasets. Reading that needs no TensorFlow. Without
       `data_dir`, and with TensorFlow installed, a data set that is missing is downloaded.

    Files are taken as hostile: sizes are checked before they are believed, archives are never
    unpacked to disk, and CIFAR's pickles are read by an unpickler that can run no code.

    Raises:
        FileNotFoundError: if nothing suitable is there; says what was looked for and found.
        ValueError: if the name is unknown, or if a file is damaged or not what its name says.
        ImportError: if reading needs a package that is not installed.

    >>> dataset = load_dataset("digits")
    >>> dataset.train_images.shape, dataset.test_images.shape, dataset.num_classes
    ((1438, 8, 8, 1), (359, 8, 8, 1), 10)
    """
    root = _tfds_folder() if data_dir is None else pathlib.Path(data_dir).expanduser()
    if data_dir is not None:
        if not root.exists():  # Also for digits: a mistyped path is not ignored.
            raise FileNotFoundError(_what_is_missing(name, root))
        npz = root / f"{name}.npz" if root.is_dir() else root
        if npz.suffix == ".npz" and npz.is_file():
            return _load_npz(name, npz)
    if name not in NUM_CLASSES:
        raise ValueError(
            f"load_dataset knows {', '.join(NUM_CLASSES)}, got {name!r}; "
            f"for other data name an .npz file {_HOW_TO_NAME}."
        )
    if name == "digits":
        if data_dir is not None:
            raise FileNotFoundError(
                f"The data set 'digits' comes with scikit-learn, or from a digits.npz, but "
                f"{str(root)!r} has none; put one there or name no folder {_HOW_TO_NAME}."
            )
        return _load_digits()
    if data_dir is not None:
        if name in _CIFAR and (place := _find_cifar(name, root)):
            return _load_cifar(name, place)
        if name in _IDX_FOLDERS and (paths := _find_idx(name, root)):
            return _load_idx(name, paths)
    prepared = _find_prepared(name, root)
    if prepared or (data_dir is None and _tensorflow_installed()):
        return _load_prepared(name, root, prepared)
    raise FileNotFoundError(_what_is_missing(name, root))


def _what_is_missing(name: str, root: pathlib.Path) -> str:
    """Returns the sentence for a folder without `name`: what was looked for and what is there."""
    ways = [f"{name}.npz", *(_CIFAR[name].places if name in _CIFAR else ())]
    ways += [f"{file}[.gz]" for file in (_IDX_FILES if name in _IDX_FOLDERS else ())]
    if root.is_dir():
        names = sorted(path.name for path in root.iterdir())
        found = f"holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"
    else:
        found = "is a file of another kind" if root.exists() else "does not exist"
    return (
        f"The data set {name!r} needs one of {', '.join(ways)}, or {name}/<version>/ as prepared "
        f"by tensorflow-datasets in array_record format, but {str(root)!r} {found}; "
        f"put one of these there or name their folder {_HOW_TO_NAME}."
    )


@contextlib.contextmanager
def _reading(source: object) -> Iterator[None]:
    """Turns whatever a decoder raises on a damaged file into one sentence.

    The list of those exceptions has no end (zlib.error, BadZipFile, EOFError, struct.error,
    PIL's, tensorflow-datasets' own), so this takes them all and must stay around foreign calls.
    """
    try:
        yield
    except _RefusedError:
        raise
    except Exception as error:
        storage.check_is_damage(str(source), error)
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"{source} must be complete and readable, got {type(error).__name__}"
            f"{reason and f' ({reason})'}; fetch or write the file again."
        ) from error


# Digits


def _load_digits() -> Dataset:
    """Returns scikit-learn's 8x8 digits, 20 % of each class as test set.

    Values 0..16 become round(value * 255 / 16), so 0 -> 0, 8 -> 128 and 16 -> 255. The split is
    part of the data set: its seed is fixed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"The data set 'digits' needs scikit-learn, got {error}; pip install scikit-learn."
        ) from error
    digits: Any = load_digits()
    labels = digits.target
    images = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    test = _stratified(labels, round(0.2 * len(images)), seed=0)
    arrays = images[~test], labels[~test], images[test], labels[test]
    return make_dataset("digits", *arrays, source="scikit-learn")


# NumPy archives


def _load_npz(name: str, path: pathlib.Path) -> Dataset:
    wanted = ("train_images", "train_labels", "test_images", "test_labels")
    with _reading(path), zipfile.ZipFile(path) as archive:
        keys = [entry.removesuffix(".npy") for entry in archive.namelist()]
        arrays = [_read_numbers(archive, f"{key}.npy") for key in wanted if key in keys]
    if len(arrays) < len(wanted):
        raise ValueError(
            f"{path} must hold the arrays {', '.join(wanted)}, got {', '.join(keys) or 'none'}; "
            "save it again with these names."
        )
    return make_dataset(name, *arrays, source=str(path))


def _read_numbers(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    array = archives.read_npy(archive, name, inflation=_MAX_INFLATION, largest=_MAX_ARRAY_BYTES)
    if array is None:  # objects would be unpickled
        raise ValueError(f"{name} holds no numbers")
    return array


# CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html


class _Cifar(NamedTuple):
    places: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_key: bytes
    label_bytes: int  # in a row of the binary version; the last of them is the class


_CIFAR = {
    "cifar10": _Cifar(
        ("cifar-10-python.tar.gz", "cifar-10-batches-py")
        + ("cifar-10-binary.tar.gz", "cifar-10-batches-bin"),
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        label_key=b"labels",
        label_bytes=1,
    ),
    "cifar100": _Cifar(
        ("cifar-100-python.tar.gz", "cifar-100-python")
        + ("cifar-100-binary.tar.gz", "cifar-100-binary"),
        ("train",),
        ("test",),
        label_key=b"fine_labels",
        label_bytes=2,  # coarse, then fine
    ),
}


def _find_cifar(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """Returns the archive or extracted folder to read; `root` itself may be either."""
    files = _CIFAR[name]
    if root.is_file():
        return root
    for folder in (root / name, root):
        for place in files.places:
            if (folder / place).exists():
                return folder / place
        # One telling file is enough; those that are missing are reported later.
        if any((folder / (files.train[0] + end)).is_file() for end in ("", ".bin")):
            return folder
    return None


def _load_cifar(name: str, place: pathlib.Path) -> Dataset:
    """Returns CIFAR from a tar archive or a folder, in whichever version it holds."""
    files = _CIFAR[name]
    wanted = files.train + files.test
    contents = _read_files(place, {*wanted, *(f"{file}.bin" for file in wanted)})
    end = ".bin" if contents and contents.keys().isdisjoint(wanted) else ""
    if missing := [file + end for file in wanted if file + end not in contents]:
        raise ValueError(
            f"{place} must hold all files of {name}, got none called {', '.join(missing)}; "
            "fetch the archive again or check the name of the data set."
        )

    def read(batches: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = [], []
        for batch in batches:
            source = f"{batch + end} in {place}"
            with _reading(source):
                if end:
                    rows = np.frombuffer(contents[batch + end], np.uint8)
                    rows = rows.reshape(-1, files.label_bytes + 3072)
                    pixels.append(rows[:, files.label_bytes :])
                    labels.append(rows[:, files.label_bytes - 1])
                else:
                    content = _CifarUnpickler(contents[batch], source).load()
                    pixels.append(content[b"data"].array().reshape(-1, 3072))
                    labels.append(_flat_labels(content[files.label_key], len(pixels[-1])))
        # A row is a plane of red, one of green, one of blue.
        images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), np.concatenate(labels)

    return make_dataset(name, *read(files.train), *read(files.test), source=str(place))


def _flat_labels(labels: object, count: int) -> np.ndarray:
    """Returns `labels`, a list of integers out of a pickle, as an array [count]."""
    # NumPy would follow lists inside lists, of which a hundred bytes can make 2**64.
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise TypeError("labels must be a list of integers")
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    return np.array(labels)


class _RefusedError(ValueError):
    """A pickle asked for something that can run code."""


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


class _CifarUnpickler(pickles.Unpickler):
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
        raise _RefusedError(
            f"{self._source} must hold nothing but arrays, lists and strings, got a request for "
            f"{name}, which was refused; do not trust this file."
        )


def _read_files(place: pathlib.Path, names: Collection[str]) -> dict[str, bytes]:
    """Returns {basename: content} of the files in a folder or tar archive called one of `names`."""
    if place.is_dir():
        paths = (place / name for name in names)
        return {path.name: _read_file(path) for path in paths if path.is_file()}
    contents: dict[str, bytes] = {}
    with _reading(place), _open_tar(place) as archive:
        for member in archive:
            name = pathlib.PurePosixPath(member.name).name
            # Only regular files: a link in an archive may point anywhere.
            if name in names and member.isreg() and (file := archive.extractfile(member)):
                contents[name] = _read_all(file)
        # gzip compares its checksum only at the end of the file, which lies behind tar's end.
        while archive.fileobj and archive.fileobj.read(2**20):
            pass
    return contents


class _Limited(io.RawIOBase):
    """A file of which no more than `limit` bytes can be read, however much it inflates to."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limit: int):
        self._file, self._limit = file, limit

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset > self._limit:
            raise ValueError(f"more than {self._limit} bytes in an archive")
        return self._file.seek(offset)

    def read(self, size: int = -1) -> bytes:
        left = self._limit - self._file.tell()
        # In pieces: a reader allocates what it is asked for, whether or not it is there.
        pieces, missing = [], left + 1 if size < 0 else size
        while missing > 0 and (piece := self._file.read(min(missing, 2**20))):
            pieces.append(piece)
            missing -= len(piece)
            if self._file.tell() > self._limit:
                raise ValueError(f"more than {self._limit} bytes in an archive")
        return b"".join(pieces)


@contextlib.contextmanager
def _open_tar(place: pathlib.Path) -> Iterator[tarfile.TarFile]:
    with place.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if compressed else raw
        limited: Any = _Limited(file, _MAX_ARCHIVE_BYTES)
        with tarfile.open(fileobj=limited, mode="r:") as archive:
            yield archive


def _read_file(path: pathlib.Path) -> bytes:
    """Returns a file's content, decompressed if it ends in .gz."""
    with _reading(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return _read_all(file)


def _read_all(file: IO[bytes] | gzip.GzipFile) -> bytes:
    """Returns the rest of a file; a small archive can hold terabytes."""
    pieces, size = [], 0
    while piece := file.read(2**20):
        pieces.append(piece)
        size += len(piece)
        if size > _MAX_FILE_BYTES:
            raise ValueError(f"more than {_MAX_FILE_BYTES} bytes in one file")
    return b"".join(pieces)


# MNIST and Fashion-MNIST: http://yann.lecun.com/exdb/mnist


_IDX_FILES = tuple(
    f"{split}-{kind}-ubyte"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
# Named folders first, because the two data sets have files of the same names.
_IDX_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "."),
    "fashion_mnist": ("fashion_mnist", "FashionMNIST/raw", "."),
}


def _find_idx(name: str, root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns {name without .gz: path} of the IDX files in the first folder that has any."""
    for folder in _IDX_FOLDERS[name]:
        paths = [root / folder / (file + end) for file in _IDX_FILES for end in (".gz", "")]
        if found := {path.name.removesuffix(".gz"): path for path in paths if path.is_file()}:
            return found
    return {}


def _load_idx(name: str, paths: dict[str, pathlib.Path]) -> Dataset:
    folder = next(iter(paths.values())).parent
    if missing := [file for file in _IDX_FILES if file not in paths]:
        raise ValueError(
            f"{folder} must hold all four IDX files of {name}, got none called "
            f"{', '.join(missing)}[.gz]; add the missing ones."
        )
    return make_dataset(name, *(_read_idx(paths[file]) for file in _IDX_FILES), source=str(folder))


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """Returns the uint8 array of an IDX file: bytes 0, 0, 8 (uint8), ndim; sizes; values."""
    content = _read_file(path)
    ndim = 3 if "idx3" in path.name else 1
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(
            f"{path} must start with the IDX header 0, 0, 8, {ndim} and sizes, got "
            f"{', '.join(map(str, content[:4])) or 'nothing'}; fetch the file again."
        )
    shape = np.frombuffer(content[4:header], ">u4").tolist()
    if math.prod(shape) != len(content) - header:
        raise ValueError(
            f"{path} must have {math.prod(shape)} bytes for its shape {shape}, "
            f"got {len(content) - header}; fetch the file again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# tensorflow-datasets


def _tfds_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def _tensorflow_installed() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _find_prepared(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the newest version; "3.0.10" is newer than "3.0.2"."""
    folders = [info.parent for info in root.glob(f"{name}/*/dataset_info.json")]
    return max(
        folders, key=lambda folder: [*map(int, re.findall(r"\d+", folder.name))], default=None
    )


def _load_prepared(name: str, root: pathlib.Path, prepared: pathlib.Path | None) -> Dataset:
    """Returns what tensorflow-datasets has prepared; prepares it first if there is no folder."""
    try:
        import tensorflow_datasets as tfds  # Here, because the import is slow.
    except ImportError as error:
        raise ImportError(
            f"Reading {name!r} below {str(root)!r} needs tensorflow-datasets, got {error}; "
            "pip install tensorflow-datasets importlib_resources."
        ) from error
    with _reading(prepared or f"The download of {name!r} to {str(root)!r}"):
        if prepared:
            builder = tfds.builder_from_directory(prepared)
        else:
            builder = tfds.builder(name, data_dir=root, file_format="array_record")
            builder.download_and_prepare()
        file_format = getattr(builder.info.file_format, "value", None)
    if file_format != "array_record":
        # Without TensorFlow nothing else can be read.
        raise ValueError(
            f"{prepared} must be prepared as array_record, got {file_format}; "
            "prepare it in another folder with file_format='array_record'."
        )
    with _reading(builder.data_dir):
        sources: Any = builder.as_data_source()
        arrays = *_stack_examples(sources["train"]), *_stack_examples(sources["test"])
    return make_dataset(name, *arrays, source=str(builder.data_dir))


def _stack_examples(examples: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of anything with a length and dicts as items."""
    first = examples[0]["image"]
    images = np.empty((len(examples), *first.shape), first.dtype)
    labels = np.empty(len(examples), np.int32)
    for i in range(len(examples)):
        example = examples[i]
        images[i], labels[i] = example["image"], example["label"]
    return images, labels


# Splits and statistics


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation of each channel, of pixels scaled to [0, 1].

    Args:
        images: uint8 [num, height, width, channels].

    >>> channel_statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    # Through histograms: exact, and without a float copy of the data set.
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        mean = counts @ levels / counts.sum()
        means.append(float(mean))
        stds.append(math.sqrt(counts @ (levels - mean) ** 2 / counts.sum()))
    return tuple(means), tuple(stds)


def split_validation(dataset: Dataset, *, num_validation: int, seed: int) -> Splits:
    """Returns `dataset` with `num_validation` of its training images set apart.

    Each class gives in proportion to its size, to within one image. Both parts keep the order of
    the original, and equal arguments give equal splits on every machine.

    Args:
        dataset: see `Dataset`.
        num_validation: images to set apart; 0 leaves the validation arrays empty.
        seed: in [0, 2**32); chooses which images.

    Raises:
        ValueError: if `num_validation` is negative or more than the training set holds, or if
            `seed` is out of range.

    >>> splits = split_validation(load_dataset("digits"), num_validation=100, seed=0)
    >>> splits.train_images.shape, np.bincount(splits.validation_labels).tolist()
    ((1338, 8, 8, 1), [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    num_train = len(dataset.train_labels)
    if not 0 <= num_validation <= num_train:
        raise ValueError(
            f"{dataset.name!r} has {num_train} training images to set apart, got {num_validation=}"
            f"; choose a number from 0 to {num_train}."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(
            f"The seed of a split is from 0 to 2**32 - 1, got {seed=}; choose another."
        )
    held_out = _stratified(dataset.train_labels, num_validation, seed=seed)
    return Splits(
        train_images=dataset.train_images[~held_out],
        train_labels=dataset.train_labels[~held_out],
        validation_images=dataset.train_images[held_out],
        validation_labels=dataset.train_labels[held_out],
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
    )


def _stratified(labels: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Returns a bool mask [len(labels)] of `count` examples, from each class in proportion."""
    # RandomState, because NumPy keeps its stream unchanged for ever (NEP 19), unlike Generator's.
    rng = np.random.RandomState(seed)
    sizes = np.bincount(labels)
    quotas, remainders = np.divmod(count * sizes.astype(np.int64), len(labels))
    # The largest remainders get the rest; which of equal ones is drawn, not always the first class.
    ties = rng.permutation(len(sizes))
    quotas[np.lexsort((ties, -remainders))[: count - quotas.sum()]] += 1
    mask = np.zeros(len(labels), bool)
    for label, quota in enumerate(quotas):
        mask[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return mask
