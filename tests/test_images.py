"""Data sets of one's own: folders of PNG and JPEG files by class."""

import warnings

import numpy as np
import pytest
from builders import refused
from PIL import Image

from neumeta_jax.data import datasets, images

RNG = np.random.default_rng(0)
RGB, GRAY = (RNG.integers(0, 256, (8, 8, *end), np.uint8) for end in [(3,), ()])


def write(path, pixels=RGB, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)


def write_classes(folder, counts, pixels=RGB):
    for name, count in counts.items():
        for number in range(count):
            write(folder / name / f"{number:02d}.png", pixels + np.uint8(number))


def load(folder, **options):
    return datasets.load_dataset("mine", data_dir=folder, **options)


def test_classes_are_numbered_by_name_in_train_and_test(tmp_path):
    write_classes(tmp_path / "train", {"cat": 3, "ant": 2, "bee": 1})
    write_classes(tmp_path / "test", {"bee": 2, "cat": 1})
    (tmp_path / "train/ant/notes.txt").write_text("not an image")
    write(tmp_path / "train/.hidden/x.png")
    dataset = load(tmp_path)
    assert dataset.train_labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert dataset.test_labels.tolist() == [1, 1, 2]
    assert (dataset.num_classes, dataset.image_size, dataset.channels) == (3, 8, 3)
    np.testing.assert_array_equal(dataset.train_images[4], RGB + np.uint8(1))


def test_without_a_test_folder_a_fifth_of_each_class_is_always_the_same_test_set(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 20}, GRAY)
    dataset, again = load(tmp_path), load(tmp_path)
    assert np.bincount(dataset.train_labels).tolist() == [8, 16]
    assert np.bincount(dataset.test_labels).tolist() == [2, 4]
    assert dataset.channels == 1 and dataset.fingerprint() == again.fingerprint()
    splits = datasets.split_validation(dataset, num_validation=12, seed=0)
    assert np.bincount(splits.validation_labels).tolist() == [4, 8]


def test_images_of_any_size_are_scaled_and_cropped_only_if_asked_to(tmp_path):
    tall = np.repeat(np.array([[0] * 8, [200] * 8, [0] * 8], np.uint8), 8, axis=0)  # 24 x 8
    write(tmp_path / "train/a/tall.jpg", tall, quality=100)
    write(tmp_path / "train/b/small.png", GRAY)
    write(tmp_path / "test/a/wide.jpeg", tall.T, quality=100)
    dataset = load(tmp_path, image_size=4)
    for middle in (dataset.train_images[0], dataset.test_images[0]):
        assert middle.shape == (4, 4, 1) and abs(int(middle.min()) - 200) < 20
    with refused("square and of one size", "8 x 24", "data.image_size=32", "tall.jpg"):
        load(tmp_path)
    with refused("image_size=16, got 8", "scikit-learn"):
        datasets.load_dataset("digits", image_size=16)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK"])
def test_modes_become_gray_or_colour(tmp_path, mode):
    write(tmp_path / "a" / ("0.jpg" if mode == "CMYK" else "0.png"), mode=mode)
    write_classes(tmp_path, {"b": 4}, RGB if mode not in ("L", "LA", "1") else GRAY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path).channels == (1 if mode in ("L", "LA", "1") else 3)


def test_turned_photographs_are_set_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    write(tmp_path / "a/turned.png", RGB, exif=exif)
    write(tmp_path / "a/0.png")
    write_classes(tmp_path, {"b": 3})
    dataset = load(tmp_path)
    both = [*dataset.train_images, *dataset.test_images]
    assert any((image == np.rot90(RGB, -1)).all() for image in both)


def test_what_is_no_data_set_of_images_is_refused(tmp_path, monkeypatch):
    write_classes(tmp_path / "train", {"a": 2, "b": 2})
    with refused("must hold images of classes that", tmp_path / "test", "none"):
        load(tmp_path)
    write_classes(tmp_path / "test", {"a": 1, "c": 1})
    with refused("must hold images of classes that", "got c;"):
        load(tmp_path)
    (tmp_path / "test/c/00.png").rename(tmp_path / "test/a/01.png")
    deep = tmp_path / "train/b/00.png"
    write(deep, np.zeros((8, 8), np.uint16))
    with refused("8 bits in a channel", deep, "mode I;16"):
        load(tmp_path)
    write(deep)
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with refused("at most 63 pixels", "8 x 8"):
        load(tmp_path)
    with refused("an .npz file or a folder of images by class"):
        load(tmp_path / "train/a")
