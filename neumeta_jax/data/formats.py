"""Arrays in the files of data sets: NumPy archives, IDX files, tensorflow-datasets, the digits.

Files are taken as hostile: sizes are checked before they are believed, and whatever a decoder makes
of damage is one sentence.
"""

import contextlib
import gzip
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from neumeta_jax.data.splits import stratified
from neumeta_jax.errors import UsageError, check
from neumeta_jax.files import archives, storage

# Train images and labels, test images and labels; not yet checked.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

MAX_BYTES = 2**28  # of a file, uncompressed; the archives of CIFAR have 180 MB
_MAX_ARRAY_BYTES = 2**34  # of an array in an .npz file
_MAX_INFLATION = 100  # of it; photographs compress to a half, digits to a tenth


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Turns whatever a decoder raises on a damaged file into one sentence.

    The list of those exceptions has no end (zlib.error, BadZipFile, EOFError, struct.error,
    PIL's, tensorflow-datasets' own), so this takes them all and must stay around foreign calls.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        storage.check_is_damage(str(source), error)
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UsageError(
            f"{source} must be complete and readable, got {type(error).__name__}"
            f"{reason and f' ({reason})'}; fetch or write the file again."
        ) from error


def read_all(file: IO[bytes] | gzip.GzipFile) -> bytes:
    """The rest of a file; a small compressed one can hold terabytes."""
    content = bytearray()
    # In pieces: a reader allocates what it is asked for, whether or not it is there.
    while piece := file.read(2**20):
        content += piece
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes in one file")
    return bytes(content)


def read_file(path: pathlib.Path) -> bytes:
    """A file's content, decompressed if it ends in .gz."""
    with reading(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return read_all(file)


def load_digits() -> Arrays:
    """scikit-learn's 8x8 digits, 20 % of each class as test set, always the same.

    Values 0..16 become round(value * 255 / 16), so 0 -> 0, 8 -> 128 and 16 -> 255.
    """
    from sklearn import datasets  # Here, as below, because the import is slow.

    digits: Any = datasets.load_digits()
    images = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    test = stratified(digits.target, round(0.2 * len(images)), seed=0)
    return images[~test], digits.target[~test], images[test], digits.target[test]


def load_npz(path: pathlib.Path) -> Arrays:
    """The arrays train_images, train_labels, test_images and test_labels of an .npz file."""
    wanted = ("train_images", "train_labels", "test_images", "test_labels")
    with reading(path), zipfile.ZipFile(path) as archive:
        keys = [entry.removesuffix(".npy") for entry in archive.namelist()]
        arrays = [_read_numbers(archive, f"{key}.npy") for key in wanted if key in keys]
    check(
        len(arrays) == len(wanted),
        f"{path} must hold the arrays {', '.join(wanted)}, got {', '.join(keys) or 'none'}; "
        "save it again with these names.",
    )
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _read_numbers(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    array = archives.read_npy(archive, name, inflation=_MAX_INFLATION, largest=_MAX_ARRAY_BYTES)
    if array is None:  # objects would be unpickled
        raise ValueError(f"{name} holds no numbers")
    return array


# MNIST and Fashion-MNIST: http://yann.lecun.com/exdb/mnist
IDX_FILES = tuple(
    f"{split}-{kind}-ubyte"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
# Named folders first, because the two data sets have files of the same names.
_IDX_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "."),
    "fashion_mnist": ("fashion_mnist", "FashionMNIST/raw", "."),
}


def find_idx(name: str, root: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name without .gz: path} of the IDX files in the first folder that has any."""
    for folder in _IDX_FOLDERS.get(name, ()):
        paths = [root / folder / (file + end) for file in IDX_FILES for end in (".gz", "")]
        if found := {path.name.removesuffix(".gz"): path for path in paths if path.is_file()}:
            return found
    return {}


def load_idx(name: str, paths: dict[str, pathlib.Path]) -> Arrays:
    """The arrays of the files that `find_idx` found."""
    missing = [file for file in IDX_FILES if file not in paths]
    check(
        not missing,
        f"{next(iter(paths.values())).parent} must hold all four IDX files of {name}, got none "
        f"called {', '.join(missing)}[.gz]; add the missing ones.",
    )
    arrays = [_read_idx(paths[file]) for file in IDX_FILES]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """The uint8 array of an IDX file: bytes 0, 0, 8 (uint8), ndim; sizes; values."""
    content = read_file(path)
    ndim = 3 if "idx3" in path.name else 1
    header = 4 + 4 * ndim
    check(
        len(content) >= header and content[:4] == bytes((0, 0, 8, ndim)),
        f"{path} must start with the IDX header 0, 0, 8, {ndim} and sizes, got "
        f"{', '.join(map(str, content[:4])) or 'nothing'}; fetch the file again.",
    )
    shape = np.frombuffer(content[4:header], ">u4").tolist()
    check(
        math.prod(shape) == len(content) - header,
        f"{path} must have {math.prod(shape)} bytes for its shape {shape}, "
        f"got {len(content) - header}; fetch the file again.",
    )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def tfds_folder() -> pathlib.Path:
    """Where tensorflow-datasets keeps what it has prepared."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def find_prepared(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """The folder of tensorflow-datasets' newest version; "3.0.10" is newer than "3.0.2"."""
    folders = [info.parent for info in root.glob(f"{name}/*/dataset_info.json")]
    return max(
        folders, key=lambda folder: [*map(int, re.findall(r"\d+", folder.name))], default=None
    )


def load_prepared(prepared: pathlib.Path) -> Arrays:
    """What tensorflow-datasets has prepared as array_record; reading it needs no TensorFlow."""
    import tensorflow_datasets as tfds

    with reading(prepared):
        builder = tfds.builder_from_directory(prepared)
        file_format = getattr(builder.info.file_format, "value", None)
        check(
            file_format == "array_record",  # without TensorFlow nothing else can be read
            f"{prepared} must be prepared as array_record, got {file_format}; "
            "prepare it in another folder with file_format='array_record'.",
        )
        sources: Any = builder.as_data_source()
        return *_stack_examples(sources["train"]), *_stack_examples(sources["test"])


def _stack_examples(examples: Any) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of anything with a length and dicts as items."""
    decoded = [examples[i] for i in range(len(examples))]
    images = np.stack([example["image"] for example in decoded])
    return images, np.array([example["label"] for example in decoded], np.int32)
