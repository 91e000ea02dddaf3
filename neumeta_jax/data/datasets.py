"""Data sets as uint8 arrays, read once, in NumPy, from files that the user has.

    dataset = load_dataset("cifar100", data_dir="path/to/archives")
    splits = split_validation(dataset, num_validation=5000, seed=0)

What happens to batches of them on the device is in `preprocessing`.
"""

import dataclasses
import hashlib
import math
import os
import pathlib

import numpy as np

from neumeta_jax.data import cifar, formats, images, sources
from neumeta_jax.data.splits import stratified
from neumeta_jax.errors import check

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


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in memory, checked; made by `make_dataset` and `load_dataset`.

    Attributes:
        name: what `NORMALIZATION` and logs call it.
        train_images, test_images: uint8 [num, size, size, channels].
        train_labels, test_labels: int32 [num], in [0, num_classes).
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
        """16 hex digits of a SHA-256 over the shapes and bytes of all arrays.

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
    source: object = "the arguments",
) -> Dataset:
    """A `Dataset` of arrays that have been checked.

    Args:
        name: see `Dataset`.
        train_images, test_images: uint8 [num, size, size, channels], or [num, size, size] for gray.
        train_labels, test_labels: integers [num], at least 0.
        num_classes: by default the known number for `name`, else the largest label plus one.
        source: the file that errors name.

    Raises:
        UsageError: if an array has another dtype or shape, is empty, or a label is out of range.

    >>> gray = np.zeros((4, 8, 8), np.uint8)
    >>> dataset = make_dataset("zeros", gray, np.arange(4), gray[:2], np.arange(2))
    >>> dataset.train_images.shape, dataset.num_classes
    ((4, 8, 8, 1), 4)
    """
    train = _checked("train", train_images, train_labels, source)
    test = _checked("test", test_images, test_labels, source)
    check(
        train[0].shape[1:] == test[0].shape[1:],
        f"train_images and test_images in {source} must have images of one shape, got "
        f"{list(train[0].shape[1:])} and {list(test[0].shape[1:])}; resize one of them.",
    )
    found = np.union1d(train[1], test[1])
    largest = int(found[-1])
    num_classes = num_classes or NUM_CLASSES.get(name)
    if num_classes is None:
        absent = [*np.setdiff1d(np.arange(len(found)), found)]
        check(
            not absent,
            f"Labels of {name!r} must count the classes from 0 without a gap, got labels up to "
            f"{largest} and no image of class {absent and absent[0]} in {source}; number the "
            "classes anew.",
        )
        num_classes = largest + 1
    check(
        largest < num_classes,
        f"Labels of {name!r} must be below {num_classes=}, got {largest} in {source}; "
        "check the name of the data set.",
    )
    return Dataset(name, *train, *test, num_classes)


def _checked(
    split: str, images: np.ndarray, labels: np.ndarray, source: object
) -> tuple[np.ndarray, np.ndarray]:
    """Images with a channel axis and labels as int32, or a sentence on what is wrong with them."""
    images, labels = np.asarray(images), np.asarray(labels)
    what = f"{split}_images in {source}"
    check(
        images.dtype == np.uint8 and images.ndim in (3, 4) and images.size,
        f"{what} must be non-empty uint8 of shape [num, size, size, channels], "
        f"got {images.dtype} {list(images.shape)}; convert the array and save it again.",
    )
    check(
        images.shape[1] == images.shape[2],
        f"{what} must be square with channels last, got {list(images.shape)}; "
        "crop, pad or transpose the images.",
    )
    what = f"{split}_labels in {source}"
    check(
        np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(images),),
        f"{what} must be one integer for each of {len(images)} images, "
        f"got {labels.dtype} {list(labels.shape)}; make the two arrays match.",
    )
    check(
        labels.min() >= 0 and labels.max() < 2**31,
        f"{what} must be from 0 to 2**31 - 1, got {labels.min()} to {labels.max()}; "
        "number the classes from 0.",
    )
    return images[..., None] if images.ndim == 3 else images, labels.astype(np.int32)


def load_dataset(
    name: str, *, data_dir: str | os.PathLike | None = None, image_size: int | None = None
) -> Dataset:
    """A data set from files on this machine, the first of these that is there:

    1. `data_dir` is a file `*.npz`, or a folder with `<name>.npz`, with the arrays `train_images`,
       `train_labels`, `test_images`, `test_labels` as in `make_dataset`; any `name` will do;
    2. "digits" without `data_dir`: the 1,797 scans that come with scikit-learn;
    3. `data_dir` is, or is a folder with, the original archives, extracted or not: CIFAR in its
       python or binary version, MNIST and Fashion-MNIST as IDX files (`*-ubyte`, `*-ubyte.gz`),
       also in a subfolder called `name` or where torchvision puts them (`MNIST/raw`); by default
       where `neumeta fetch` puts them;
    4. what tensorflow-datasets has prepared as array_record under `data_dir`, by default in
       $TFDS_DATA_DIR or ~/tensorflow_datasets; reading that needs no TensorFlow;
    5. `data_dir` is a folder with images by class, see `images`; any `name` will do.

    `image_size` is the one to which images in folders are scaled; other data has to have it.

    Raises:
        FileNotFoundError: if nothing suitable is there; says what was looked for and found.
        UsageError: if the name is unknown, or if a file is damaged or not what its name says.
        ImportError: if reading needs a package that is not installed.

    >>> dataset = load_dataset("digits")
    >>> dataset.train_images.shape, dataset.test_images.shape, dataset.num_classes
    ((1438, 8, 8, 1), (359, 8, 8, 1), 10)
    """
    if data_dir is None:
        roots = [sources.data_folder(), formats.tfds_folder()]
    else:
        roots = [pathlib.Path(data_dir).expanduser()]
    if data_dir is None and name == "digits":
        found = formats.load_digits(), "scikit-learn"
    else:
        found = next(filter(None, (_load_from(name, root, image_size) for root in roots)), None)
    if found is None:
        check(
            name in NUM_CLASSES or (data_dir is not None and not roots[-1].exists()),
            f"load_dataset knows {', '.join(NUM_CLASSES)}, got {name!r}; for other data name an "
            f".npz file or a folder of images by class {_HOW_TO_NAME}.",
        )
        raise FileNotFoundError(_what_is_missing(name, roots[-1]))
    arrays, source = found
    dataset = make_dataset(name, *arrays, source=source)
    check(
        image_size in (None, dataset.image_size),
        f"Images of {source} must have {image_size=}, got {dataset.image_size}; leave it out, "
        "only images in folders by class are scaled.",
    )
    return dataset


_HOW_TO_NAME = "with --config.data.dir or --data_dir, data_dir in Python"


def _load_from(
    name: str, root: pathlib.Path, image_size: int | None
) -> tuple[formats.Arrays, object] | None:
    """The arrays of the data set in a folder or file, and where they are; None if it has none."""
    npz = root / f"{name}.npz" if root.is_dir() else root
    if npz.suffix == ".npz" and npz.is_file():
        return formats.load_npz(npz), npz
    if root.exists() and (place := cifar.find(name, root)):
        return cifar.load(name, place), place
    if paths := formats.find_idx(name, root):
        return formats.load_idx(name, paths), next(iter(paths.values())).parent
    if name in NUM_CLASSES and (prepared := formats.find_prepared(name, root)):
        return formats.load_prepared(prepared), prepared
    if images.find(root):
        return images.load(root, image_size), root
    return None


def _what_is_missing(name: str, root: pathlib.Path) -> str:
    """The sentence for a folder without `name`: what was looked for and what is there."""
    ways = [f"{name}.npz", *(cifar.FILES[name].places if name in cifar.FILES else ())]
    ways += [f"{file}[.gz]" for file in formats.IDX_FILES if "mnist" in name]
    if root.is_dir():
        names = sorted(path.name for path in root.iterdir())
        holds = f"holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"
    else:
        holds = "is a file of another kind" if root.exists() else "does not exist"
    instead = f"fetch it with `neumeta fetch {name}`, " if name in sources.SOURCES else ""
    if name == "digits":
        instead = "it comes with scikit-learn if no folder is named; "
    return (
        f"The data set {name!r} needs one of {', '.join(ways)}, folders of images by class, or "
        f"{name}/<version>/ as prepared by tensorflow-datasets in array_record format, but "
        f"{str(root)!r} {holds}; {instead}put one of these there or name their folder "
        f"{_HOW_TO_NAME}."
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of uint8 [num, height, width, channels], scaled to [0, 1].

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
    """`dataset` with `num_validation` of its training images set apart.

    Each class gives in proportion to its size, to within one image. Both parts keep the order of
    the original, and equal arguments give equal splits on every machine.

    `seed`, in [0, 2**32), chooses which; 0 images leave the validation arrays empty.

    >>> splits = split_validation(load_dataset("digits"), num_validation=100, seed=0)
    >>> splits.train_images.shape, np.bincount(splits.validation_labels).tolist()
    ((1338, 8, 8, 1), [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    num_train = len(dataset.train_labels)
    check(
        0 <= num_validation <= num_train,
        f"{dataset.name!r} has {num_train} training images to set apart, got {num_validation=}"
        f"; choose a number from 0 to {num_train}.",
    )
    check(
        0 <= seed < 2**32,
        f"The seed of a split is from 0 to 2**32 - 1, got {seed=}; choose another.",
    )
    held_out = stratified(dataset.train_labels, num_validation, seed=seed)
    return Splits(
        train_images=dataset.train_images[~held_out],
        train_labels=dataset.train_labels[~held_out],
        validation_images=dataset.train_images[held_out],
        validation_labels=dataset.train_labels[held_out],
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
    )
