"""Images in folders by class, PNG or JPEG, as the arrays of a data set.

    FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png     or     FOLDER/CLASS/*.png

Classes are numbered in the order of their names. Without a folder `test`, a fifth of each class is
the test set, always the same.
"""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from neumeta_jax.data.formats import Arrays, reading
from neumeta_jax.data.splits import stratified
from neumeta_jax.errors import check

MAX_PIXELS = 2**26  # of one image before it is made smaller
_SUFFIXES = (".png", ".jpg", ".jpeg")
_GRAY = {"1", "L", "LA"}
_MODES = {*_GRAY, "P", "RGB", "RGBA", "CMYK"}  # 8 bits in a channel, or less

_Classes = Mapping[str, Sequence[pathlib.Path]]


def find(root: pathlib.Path) -> bool:
    """Whether `root` is a folder with images by class."""
    return bool(_classes(root / "train") or _classes(root))


def load(root: pathlib.Path, image_size: int | None) -> Arrays:
    """The images below `root`, gray if all of them are.

    Args:
        root: a folder as above.
        image_size: each is scaled until its shorter side has so many pixels, and its middle is cut
            out; None for images that are square and of one size already.
    """
    split = bool(_classes(root / "train"))
    train = _classes(root / "train" if split else root)
    test = _classes(root / "test") if split else {}
    check(
        not split or (test and test.keys() <= train.keys()),
        f"{root / 'test'} must hold images of classes that {root / 'train'} has, got "
        f"{', '.join(sorted(test.keys() - train.keys())) or 'none'}; move them, or put all images "
        f"into {root}/CLASS, of which a fifth becomes the test set.",
    )
    paths = {path: list(train).index(c) for part in (train, test) for c in part for path in part[c]}
    images = _read_images(list(paths), image_size)
    labels = np.array(list(paths.values()))
    if split:
        is_test = np.arange(len(labels)) >= sum(map(len, train.values()))
    else:
        is_test = stratified(labels, round(0.2 * len(labels)), seed=0)
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def _classes(folder: pathlib.Path) -> _Classes:
    """{class: its images} of the folders in `folder` that have any, in order of names."""
    if not folder.is_dir():
        return {}
    found = {
        place.name: sorted(p for p in place.iterdir() if p.suffix.lower() in _SUFFIXES)
        for place in sorted(folder.iterdir())
        if place.is_dir() and not place.name.startswith(".")
    }
    return {name: paths for name, paths in found.items() if paths}


def _read_images(paths: Sequence[pathlib.Path], image_size: int | None) -> np.ndarray:
    """uint8 [num, size, size, channels] of files, 3 channels unless all are gray."""
    from PIL import Image, ImageOps  # Here, because most data needs none.

    @contextlib.contextmanager
    def opened(path: pathlib.Path) -> Iterator[Any]:
        with warnings.catch_warnings(), Image.open(path, formats=("PNG", "JPEG")) as image:
            warnings.simplefilter("ignore")  # of palettes, of damaged EXIF
            yield image

    sizes, modes = {}, set()
    for path in paths:
        with reading(path), opened(path) as image:
            (width, height), mode = image.size, image.mode
        sizes.setdefault((width, height), path)
        modes.add(mode)
        check(
            width * height <= MAX_PIXELS and mode in _MODES,
            f"{path} must have at most {MAX_PIXELS} pixels of 8 bits in a channel, got {width} x "
            f"{height} of mode {mode}; convert it.",
        )
    (width, height), first = next(iter(sizes.items()))
    check(
        image_size or (len(sizes) == 1 and width == height),
        f"Images must be square and of one size, got {width} x {height} in {first} and "
        f"{len(sizes) - 1} other sizes; set --config.data.image_size=32, or another number of "
        "pixels, to scale and crop them.",
    )
    mode, size = ("L" if modes <= _GRAY else "RGB"), image_size or width
    images = np.empty((len(paths), size, size) + (() if mode == "L" else (3,)), np.uint8)
    for number, path in enumerate(paths):
        with reading(path), opened(path) as image:
            upright = ImageOps.exif_transpose(image)
            images[number] = np.asarray(ImageOps.fit(upright.convert(mode), (size, size)))
    return images
