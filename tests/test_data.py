"""Each source is read from files that the test writes in the original format."""

import gzip
import io
import math
import os
import pickle
import struct
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import data


def random_arrays(*, size=32, channels=3, num_classes=10, num_train=20, num_test=4, seed=0):
    """Returns train images and labels, test images and labels, as `make_dataset` takes them."""
    rng = np.random.default_rng(seed)
    shape = (size, size, channels)
    return (
        rng.integers(0, 256, (num_train, *shape), np.uint8),
        rng.integers(0, num_classes, num_train),
        rng.integers(0, 256, (num_test, *shape), np.uint8),
        rng.integers(0, num_classes, num_test),
    )


def assert_holds(dataset, arrays):
    train_images, train_labels, test_images, test_labels = arrays
    np.testing.assert_array_equal(dataset.train_images, train_images)
    np.testing.assert_array_equal(dataset.train_labels, train_labels)
    np.testing.assert_array_equal(dataset.test_images, test_images)
    np.testing.assert_array_equal(dataset.test_labels, test_labels)
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32


def assert_one_sentence(error, *words):
    """The message is one line that names every word, and the type is exactly ValueError's kind."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert str(word) in message, message


# Writers of the original formats


def py2_string(content):
    """Opcode of a Python 2 str, which Python 3 never writes."""
    return b"T" + struct.pack("<i", len(content)) + content


def py2_pickle(label_key, rows, labels):
    """Returns the bytes that cPickle of Python 2 writes for a CIFAR batch (protocol 2)."""
    dtype = b"cnumpy\ndtype\n" + py2_string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + py2_string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
    array += py2_string(b"b") + b"\x87R(K\x01"
    array += b"M" + struct.pack("<H", len(rows)) + b"M" + struct.pack("<H", rows.shape[1])
    array += b"\x86" + dtype + b"\x89" + py2_string(rows.tobytes()) + b"tb"
    numbers = b"(" + b"".join(b"K" + bytes([label]) for label in labels)
    content = b"\x80\x02}(" + py2_string(b"batch_label") + py2_string(b"batch 1 of 5")
    return (
        content
        + py2_string(label_key)
        + b"]"
        + numbers
        + b"e"
        + py2_string(b"data")
        + array
        + b"u."
    )


def py3_pickle(label_key, rows, labels):
    content = {b"batch_label": b"x", label_key: labels.tolist(), b"data": rows}
    return pickle.dumps(content, protocol=2)


def cifar_files(name, version, arrays, write_pickle=py2_pickle):
    """Returns {path in the archive: content} as in CIFAR's own archives."""
    folder = {
        ("cifar10", "python"): "cifar-10-batches-py",
        ("cifar10", "binary"): "cifar-10-batches-bin",
        ("cifar100", "python"): "cifar-100-python",
        ("cifar100", "binary"): "cifar-100-binary",
    }[name, version]
    train_images, train_labels, test_images, test_labels = arrays
    if name == "cifar10":
        parts = np.array_split(np.arange(len(train_labels)), 5)
        batches = {
            f"data_batch_{i}": (train_images[part], train_labels[part])
            for i, part in enumerate(parts, 1)
        }
        batches["test_batch"] = (test_images, test_labels)
    else:
        batches = {"train": (train_images, train_labels), "test": (test_images, test_labels)}
    files = {f"{folder}/readme.html": b"<html>"}
    for batch, (images, labels) in batches.items():
        rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
        if version == "python":
            key = b"labels" if name == "cifar10" else b"fine_labels"
            files[f"{folder}/{batch}"] = write_pickle(key, rows, labels)
        else:
            columns = [labels[:, None].astype(np.uint8), rows]
            if name == "cifar100":
                columns.insert(0, columns[0] // 5)  # The coarse label comes first.
            files[f"{folder}/{batch}.bin"] = np.concatenate(columns, axis=1).tobytes()
    return files


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_folder(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def idx_files(arrays):
    train_images, train_labels, test_images, test_labels = arrays
    return {
        "train-images-idx3-ubyte": idx(train_images[..., 0]),
        "train-labels-idx1-ubyte": idx(train_labels),
        "t10k-images-idx3-ubyte": idx(test_images[..., 0]),
        "t10k-labels-idx1-ubyte": idx(test_labels),
    }


def write_npz(path, arrays):
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(path, **dict(zip(keys, arrays, strict=True)))


# CIFAR


@pytest.mark.parametrize("place", ["folder with archive", "archive", "extracted", "inside"])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_its_original_files(tmp_path, name, num_classes, version, place):
    arrays = random_arrays(num_classes=num_classes)
    files = cifar_files(name, version, arrays)
    archive = tmp_path / f"{name.replace('cifar', 'cifar-')}-{version}.tar.gz"
    if "archive" in place:
        write_tar(archive, files)
    else:
        write_folder(tmp_path, files)
    folder = tmp_path / next(iter(files)).split("/")[0]
    data_dir = {"archive": archive, "inside": folder}.get(place, tmp_path)
    dataset = data.load_dataset(name, data_dir=data_dir)
    assert_holds(dataset, arrays)
    assert dataset.num_classes == num_classes
    assert (dataset.image_size, dataset.channels) == (32, 3)


def test_cifar_pickled_by_python_3_is_read(tmp_path):
    arrays = random_arrays()
    write_folder(tmp_path, cifar_files("cifar10", "python", arrays, py3_pickle))
    assert_holds(data.load_dataset("cifar10", data_dir=str(tmp_path)), arrays)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo x > {self.marker}",)


@pytest.mark.parametrize("archive", [True, False])
def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path, archive):
    marker = tmp_path / "marker"
    files = cifar_files("cifar100", "python", random_arrays())
    files["cifar-100-python/train"] = pickle.dumps({b"data": Malicious(marker)}, protocol=2)
    if archive:
        write_tar(tmp_path / "cifar-100-python.tar.gz", files)
    else:
        write_folder(tmp_path, files)
    with pytest.raises(ValueError, match="refused") as error:
        data.load_dataset("cifar100", data_dir=tmp_path)
    assert_one_sentence(error, f"{os.name}.system", "train in ", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02}(", b"garbage", pickle.dumps({b"data": 3})])
def test_damaged_pickle_is_one_sentence(tmp_path, content):
    files = cifar_files("cifar100", "python", random_arrays())
    files["cifar-100-python/test"] = content
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match="complete and readable") as error:
        data.load_dataset("cifar100", data_dir=tmp_path)
    assert_one_sentence(error, "test in ", tmp_path)


def test_pickled_pixels_that_are_not_bytes_are_refused(tmp_path):
    files = cifar_files("cifar100", "python", random_arrays())
    content = {b"fine_labels": [1], b"data": np.zeros((1, 3072))}
    files["cifar-100-python/test"] = pickle.dumps(content, protocol=2)
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match="pixels must be uint8"):
        data.load_dataset("cifar100", data_dir=tmp_path)


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_tar_is_one_sentence(tmp_path, version, kept):
    path = tmp_path / f"cifar-10-{version}.tar.gz"
    write_tar(path, cifar_files("cifar10", version, random_arrays()))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="must") as error:
        data.load_dataset("cifar10", data_dir=tmp_path)
    assert type(error.value) is ValueError
    assert_one_sentence(error, path)


def test_tar_with_a_flipped_byte_is_one_sentence(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    write_tar(path, cifar_files("cifar10", "binary", random_arrays()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must") as error:
        data.load_dataset("cifar10", data_dir=tmp_path)
    assert_one_sentence(error, path)


def test_links_in_a_tar_are_not_followed(tmp_path):
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("train.bin", "test.bin"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(member)
    with pytest.raises(ValueError, match="got none called train, test"):
        data.load_dataset("cifar100", data_dir=tmp_path)


def test_archive_of_the_other_cifar_is_refused(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    write_tar(path, cifar_files("cifar10", "python", random_arrays()))
    with pytest.raises(ValueError, match="check the name of the data set") as error:
        data.load_dataset("cifar100", data_dir=path)
    assert_one_sentence(error, path, "train, test")


def test_binary_batch_of_a_wrong_length_is_refused(tmp_path):
    files = cifar_files("cifar10", "binary", random_arrays())
    files["cifar-10-batches-bin/data_batch_3.bin"] += b"x"
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match="cannot reshape") as error:
        data.load_dataset("cifar10", data_dir=tmp_path)
    assert_one_sentence(error, "data_batch_3.bin in ", tmp_path)


def test_file_beyond_the_size_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_MAX_FILE_BYTES", 1000)
    write_tar(
        tmp_path / "cifar-10-binary.tar.gz", cifar_files("cifar10", "binary", random_arrays())
    )
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        data.load_dataset("cifar10", data_dir=tmp_path)


# MNIST and Fashion-MNIST


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion_mnist", "fashion_mnist"),
     ("fashion_mnist", "FashionMNIST/raw")],
)  # fmt: skip
def test_mnist_is_read_from_its_original_files(tmp_path, name, folder, compressed):
    arrays = random_arrays(size=28, channels=1)
    files = idx_files(arrays)
    if compressed:
        files = {f"{file}.gz": gzip.compress(content) for file, content in files.items()}
    write_folder(tmp_path / folder, files)
    dataset = data.load_dataset(name, data_dir=tmp_path)
    assert_holds(dataset, arrays)
    assert (dataset.image_size, dataset.channels, dataset.num_classes) == (28, 1, 10)


def test_fashion_mnist_in_its_own_folder_is_not_taken_for_mnist_beside_it(tmp_path):
    mnist, fashion = (random_arrays(size=28, channels=1, seed=seed) for seed in (1, 2))
    write_folder(tmp_path, idx_files(mnist))
    write_folder(tmp_path / "fashion_mnist", idx_files(fashion))
    assert_holds(data.load_dataset("fashion_mnist", data_dir=tmp_path), fashion)
    assert_holds(data.load_dataset("mnist", data_dir=tmp_path), mnist)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kept", [0, 3, 10, 200])
def test_truncated_idx_is_one_sentence(tmp_path, compressed, kept):
    files = idx_files(random_arrays(size=28, channels=1))
    name = "train-images-idx3-ubyte"
    content = files.pop(name)
    if compressed:
        files[f"{name}.gz"] = gzip.compress(content)[:kept]
    else:
        files[name] = content[:kept]
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match="must") as error:
        data.load_dataset("mnist", data_dir=tmp_path)
    assert type(error.value) is ValueError
    assert_one_sentence(error, name)


def test_idx_header_with_impossible_sizes_is_not_believed(tmp_path):
    files = idx_files(random_arrays(size=28, channels=1))
    files["t10k-images-idx3-ubyte"] = bytes((0, 0, 8, 3)) + b"\xff" * 12 + b"x"
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match="for its shape") as error:
        data.load_dataset("mnist", data_dir=tmp_path)
    assert_one_sentence(error, "t10k-images-idx3-ubyte", (2**32 - 1) ** 3)


def test_missing_idx_files_are_named(tmp_path):
    files = idx_files(random_arrays(size=28, channels=1))
    del files["t10k-labels-idx1-ubyte"]
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match="add the missing ones") as error:
        data.load_dataset("mnist", data_dir=tmp_path)
    assert_one_sentence(error, tmp_path, "t10k-labels-idx1-ubyte[.gz]")


# NumPy archives


@pytest.mark.parametrize("as_folder", [True, False])
def test_npz_is_read_with_any_name(tmp_path, as_folder):
    arrays = random_arrays(size=6, channels=2, num_classes=7)
    write_npz(tmp_path / "mine.npz", arrays)
    dataset = data.load_dataset("mine", data_dir=tmp_path if as_folder else tmp_path / "mine.npz")
    assert_holds(dataset, arrays)
    assert dataset.num_classes == 1 + max(arrays[1].max(), arrays[3].max())


def test_gray_npz_gets_a_channel_axis(tmp_path):
    arrays = random_arrays(size=6, channels=1)
    write_npz(tmp_path / "x.npz", [a[..., 0] if a.ndim == 4 else a for a in arrays])
    assert_holds(data.load_dataset("mnist", data_dir=tmp_path / "x.npz"), arrays)


@pytest.mark.parametrize("kept", [0, 10, 500, -30])
def test_truncated_npz_is_one_sentence(tmp_path, kept):
    path = tmp_path / "mnist.npz"
    write_npz(path, random_arrays(size=8, channels=1))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="complete and readable") as error:
        data.load_dataset("mnist", data_dir=tmp_path)
    assert type(error.value) is ValueError
    assert_one_sentence(error, path)


def test_npz_with_truncated_array_is_one_sentence(tmp_path):
    path = tmp_path / "mnist.npz"
    write_npz(path, random_arrays(size=8, channels=1))
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content[:-5])
    with pytest.raises(ValueError, match="complete and readable") as error:
        data.load_dataset("mnist", data_dir=tmp_path)
    assert_one_sentence(error, path)


def test_npz_with_pickled_objects_is_refused(tmp_path):
    path = tmp_path / "mnist.npz"
    arrays = list(random_arrays(size=8, channels=1))
    arrays[1] = np.array([Malicious(tmp_path / "marker")] * len(arrays[1]))
    write_npz(path, arrays)
    with pytest.raises(ValueError, match="train_labels.npy holds no numbers") as error:
        data.load_dataset("mnist", data_dir=path)
    assert_one_sentence(error, path)
    assert not (tmp_path / "marker").exists()


def test_npz_without_the_arrays_says_which(tmp_path):
    np.savez(tmp_path / "mnist.npz", train_images=np.zeros(3), x=np.zeros(3))
    with pytest.raises(ValueError, match="save it again") as error:
        data.load_dataset("mnist", data_dir=tmp_path)
    assert_one_sentence(error, "test_labels, got train_images, x", tmp_path)


# tensorflow-datasets


def prepare_with_tfds(name, root, arrays, *, version="3.0.1"):
    """Writes array_record shards as `download_and_prepare` does, without TensorFlow.

    TensorFlow is needed to encode images, and not when they come as PNG bytes.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    pil_image = pytest.importorskip("PIL.Image")
    pytest.importorskip("array_record")

    def png(image):
        file = io.BytesIO()
        pil_image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
        return file.getvalue()

    def examples(images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": png(image), "label": int(label)}

    class TinyBuilder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
        def _split_generators(self, dl_manager):
            return {"train": examples(*arrays[:2]), "test": examples(*arrays[2:])}

    features = {
        "image": tfds.features.Image(shape=arrays[0].shape[1:]),
        "label": tfds.features.ClassLabel(num_classes=data.NUM_CLASSES[name]),
    }
    builder = TinyBuilder(
        name=name,
        version=version,
        features=tfds.features.FeaturesDict(features),
        split_datasets={},
        data_dir=root,
        file_format="array_record",
    )
    builder.download_and_prepare()
    return builder


def in_order(images, labels):
    """Returns {image bytes: label}: tensorflow-datasets shuffles when it prepares."""
    return {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize("given", [True, False])
def test_tfds_array_record_is_read(tmp_path, monkeypatch, given):
    arrays = random_arrays()
    prepare_with_tfds("cifar10", tmp_path, arrays)
    newer = random_arrays(seed=1)
    prepare_with_tfds("cifar10", tmp_path, newer, version="3.0.10")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    dataset = data.load_dataset("cifar10", data_dir=tmp_path if given else None)
    assert in_order(dataset.train_images, dataset.train_labels) == in_order(*newer[:2])
    assert in_order(dataset.test_images, dataset.test_labels) == in_order(*newer[2:])
    assert dataset.train_images.dtype == np.uint8


def test_tfds_downloads_only_with_tensorflow_and_without_data_dir(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    arrays = random_arrays(size=28, channels=1)
    calls = []

    class Unprepared:
        def __init__(self, name, *, data_dir, file_format):
            calls.append((name, data_dir, file_format))

        def download_and_prepare(self):
            self.builder = prepare_with_tfds("mnist", tmp_path, arrays)

        def __getattr__(self, attribute):
            return getattr(self.builder, attribute)

    monkeypatch.setattr(tfds, "builder", Unprepared)
    monkeypatch.setattr(data, "_tensorflow_installed", lambda: True)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        data.load_dataset("mnist", data_dir=tmp_path)
    assert not calls
    dataset = data.load_dataset("mnist")
    assert calls == [("mnist", tmp_path, "array_record")]
    assert in_order(dataset.test_images, dataset.test_labels) == in_order(*arrays[2:])


def test_tfds_with_damaged_files_is_one_sentence(tmp_path):
    prepare_with_tfds("mnist", tmp_path, random_arrays(size=28, channels=1))
    for path in (tmp_path / "mnist/3.0.1").glob("*train.array_record*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="complete and readable") as error:
        data.load_dataset("mnist", data_dir=tmp_path)
    assert_one_sentence(error, tmp_path / "mnist/3.0.1")


def test_tfds_in_tfrecord_format_says_what_to_do(tmp_path):
    prepare_with_tfds("mnist", tmp_path, random_arrays(size=28, channels=1))
    info = tmp_path / "mnist/3.0.1/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="prepared as array_record, got tfrecord") as error:
        data.load_dataset("mnist", data_dir=tmp_path)
    assert_one_sentence(error, tmp_path / "mnist/3.0.1")


# Nothing there


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("cifar100", ["cifar100.npz", "cifar-100-python.tar.gz", "cifar-100-binary"]),
     ("mnist", ["mnist.npz", "t10k-labels-idx1-ubyte[.gz]"])],
)  # fmt: skip
def test_missing_data_lists_what_was_looked_for_and_found(tmp_path, name, wanted):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, data_dir=tmp_path)
    assert_one_sentence(error, name, *wanted, f"{name}/<version>/", tmp_path, "holds notes.txt;")


@pytest.mark.parametrize("name", ["absent", "empty", "file.txt"])
def test_data_dir_that_cannot_hold_data_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    found = {"absent": "does not exist", "empty": "holds nothing", "file.txt": "of another kind"}
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset("mnist", data_dir=tmp_path / name)
    assert_one_sentence(error, tmp_path / name, found[name])


@pytest.mark.parametrize("name", ["digits", "mine"])
def test_mistyped_data_dir_is_not_ignored(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        data.load_dataset(name, data_dir=tmp_path / "typo.npz")
    assert_one_sentence(error, "typo.npz")


def test_without_data_dir_the_default_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "absent"))
    monkeypatch.setattr(data, "_tensorflow_installed", lambda: False)
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset("cifar10")
    assert_one_sentence(error, tmp_path / "absent", "pass data_dir=")


def test_unknown_name_lists_the_known_ones(tmp_path):
    for data_dir in (None, tmp_path):
        with pytest.raises(ValueError, match="load_dataset knows") as error:
            data.load_dataset("imagenet", data_dir=data_dir)
        assert_one_sentence(error, "'imagenet'", "fashion_mnist", ".npz")


# Dataset


def bad_arrays(**changes):
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    return dict(zip(keys, random_arrays(size=4), strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": np.zeros((20, 4, 4, 3))}, ["train_images", "uint8", "float64"]),
        ({"test_images": np.zeros((0, 4, 4, 3), np.uint8)}, ["test_images", "non-empty"]),
        ({"test_images": np.zeros((4, 3, 4, 4), np.uint8)}, ["test_images", "square"]),
        ({"test_images": np.zeros((4, 5, 5, 3), np.uint8)}, ["one shape", "[5, 5, 3]"]),
        ({"train_labels": np.zeros(19, int)}, ["train_labels", "20 images", "[19]"]),
        ({"test_labels": np.zeros(4)}, ["test_labels", "integer", "float64"]),
        ({"test_labels": np.array([0, 1, -1, 2])}, ["test_labels", "-1"]),
        ({"test_labels": np.array([0, 1, 10, 2])}, ["num_classes=10", "got 10"]),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(changes, words):
    with pytest.raises(ValueError, match="must") as error:
        data.make_dataset("cifar10", **bad_arrays(**changes), source="some.npz")
    assert_one_sentence(error, "some.npz", *words)


def test_fingerprint_depends_on_every_array_and_on_nothing_else():
    dataset = data.make_dataset("a", **bad_arrays())
    assert len(dataset.fingerprint()) == 16
    assert dataset.fingerprint() == data.make_dataset("b", **bad_arrays()).fingerprint()
    prints = {dataset.fingerprint()}
    for key, array in bad_arrays().items():
        changed = array.copy()
        changed.flat[-1] ^= 1
        prints.add(data.make_dataset("a", **bad_arrays(**{key: changed})).fingerprint())
    assert len(prints) == 5


def test_digits_are_all_there_scaled_and_stratified():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    dataset = data.load_dataset("digits")
    assert dataset.train_images.shape == (1438, 8, 8, 1)
    assert dataset.test_images.shape == (359, 8, 8, 1)
    scaled = np.round(load_digits().images * 255 / 16 + 1e-6).astype(np.uint8)
    both = np.concatenate([dataset.train_images, dataset.test_images])[..., 0]
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in scaled)
    assert both.max() == 255
    sizes = np.bincount(load_digits().target)
    assert np.abs(np.bincount(dataset.test_labels) - 0.2 * sizes).max() < 1
    assert dataset.fingerprint() == data.load_dataset("digits").fingerprint()


def test_normalization_of_digits_is_what_their_training_images_have():
    pytest.importorskip("sklearn")
    measured = data.channel_statistics(data.load_dataset("digits").train_images)
    np.testing.assert_allclose(measured, data.NORMALIZATION["digits"], atol=5e-5)


def test_every_known_data_set_has_a_normalization():
    assert data.NORMALIZATION.keys() == data.NUM_CLASSES.keys()


def test_channel_statistics_are_mean_and_std():
    images = random_arrays(size=7)[0]
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)))


# Splits


def labelled(labels):
    """Returns a data set whose every training image is its own index, in four bytes."""
    images = np.arange(len(labels), dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2, 1)
    return data.make_dataset("x", images, labels, images[:1], labels[:1])


def indices_of(images):
    return np.ascontiguousarray(images).reshape(-1, 4).view(np.uint32)[:, 0]


@pytest.mark.parametrize("num_validation", [0, 1, 7, 50, 333, 999, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_disjoint_complete_ordered_and_stratified(num_validation, seed):
    labels = np.random.default_rng(3).choice(5, 1000, p=[0.4, 0.3, 0.2, 0.07, 0.03])
    dataset = labelled(labels)
    splits = data.split_validation(dataset, num_validation=num_validation, seed=seed)
    train, validation = indices_of(splits.train_images), indices_of(splits.validation_images)
    assert len(validation) == num_validation
    np.testing.assert_array_equal(np.union1d(train, validation), np.arange(1000))
    assert len(train) + len(validation) == 1000
    np.testing.assert_array_equal(train, np.sort(train))
    np.testing.assert_array_equal(validation, np.sort(validation))
    np.testing.assert_array_equal(splits.train_labels, labels[train])
    np.testing.assert_array_equal(splits.validation_labels, labels[validation])
    expected = np.bincount(labels) * num_validation / 1000
    assert np.abs(np.bincount(labels[validation], minlength=5) - expected).max() < 1
    assert splits.test_images is dataset.test_images


def test_split_depends_on_the_seed_alone():
    dataset = labelled(np.arange(300) % 10)
    first, again, other = (
        indices_of(data.split_validation(dataset, num_validation=30, seed=seed).validation_images)
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    # Golden: a split that changes with a version of NumPy would leak validation into training.
    assert first[:5].tolist() == [1, 9, 12, 14, 17]


@pytest.mark.parametrize(("num_validation", "seed"), [(-1, 0), (301, 0), (3, -1), (3, 2**32)])
def test_impossible_split_is_refused(num_validation, seed):
    with pytest.raises(ValueError, match="choose") as error:
        data.split_validation(
            labelled(np.arange(300) % 10), num_validation=num_validation, seed=seed
        )
    assert_one_sentence(error)


# Order


def test_epoch_order_is_a_permutation_that_depends_on_key_and_epoch_alone():
    order = jax.jit(data.epoch_order, static_argnums=2)
    key = jax.random.key(0)
    first = order(key, 0, 101)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(jnp.sort(first), np.arange(101))
    np.testing.assert_array_equal(first, data.epoch_order(key, jnp.asarray(0), 101))
    others = [order(key, 1, 101), order(jax.random.key(1), 0, 101)]
    assert all((first != other).any() for other in others)


# Augmentation

augment = jax.jit(data.augment, static_argnames=("crop_padding", "flip"))


def distinct_images(num, height, width):
    return np.random.default_rng(0).integers(1, 256, (num, height, width, 3), np.uint8)


def crops(image, padding, flip):
    """Returns {(top, left, mirrored): crop} of everything that `augment` may return."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + height, left : left + width]
            found[top, left, False] = crop
            if flip:
                found[top, left, True] = crop[:, ::-1]
    return found


def test_augment_without_padding_and_flip_is_the_identity():
    images = distinct_images(5, 6, 6)
    result = augment(jax.random.key(0), images, crop_padding=0, flip=False)
    np.testing.assert_array_equal(result, images)


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (2, False), (2, True)])
def test_augment_returns_all_shifted_and_mirrored_images_and_no_others(padding, flip):
    images = distinct_images(1000, 5, 7)
    result = augment(jax.random.key(1), images, crop_padding=padding, flip=flip)
    assert result.dtype == jnp.uint8
    assert result.shape == images.shape
    counts = {}
    for image, augmented in zip(images, np.asarray(result), strict=True):
        matches = [
            which
            for which, crop in crops(image, padding, flip).items()
            if np.array_equal(crop, augmented)
        ]
        assert len(matches) == 1
        counts[matches[0]] = counts.get(matches[0], 0) + 1
    num_ways = (2 * padding + 1) ** 2 * (1 + flip)
    assert len(counts) == num_ways
    # Uniform: each count is binomial; six standard deviations.
    expected = 1000 / num_ways
    assert max(abs(count - expected) for count in counts.values()) < 6 * math.sqrt(expected)


def test_augment_depends_on_its_key():
    images = distinct_images(20, 6, 6)
    first, again, other = (
        augment(jax.random.key(seed), images, crop_padding=2, flip=True) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("images", "padding", "word"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), 1, "float32"),
        (np.zeros((4, 4, 3), np.uint8), 1, "[4, 4, 3]"),
        (np.zeros((2, 4, 4, 3), np.uint8), -1, "crop_padding=-1"),
    ],
)
def test_augment_refuses_what_it_cannot_crop(images, padding, word):
    with pytest.raises(ValueError, match="got") as error:
        augment(jax.random.key(0), images, crop_padding=padding, flip=True)
    assert_one_sentence(error, word)


def test_normalize_is_its_formula():
    images = distinct_images(3, 4, 4)
    mean, std = data.NORMALIZATION["cifar100"]
    result = jax.jit(lambda images: data.normalize(images, mean, std))(images)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_normalize_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match="channel_statistics") as error:
        data.normalize(distinct_images(3, 4, 4), (0.5,), (0.5,))
    assert_one_sentence(error, "3 channels", "got 1 and 1")


# mix


mix = jax.jit(data.mix, static_argnames=("mixup", "cutmix"))


def numbered(batch=64, size=16):
    """Image n and target n are n everywhere, so that what is mixed says of what it is made."""
    images = jnp.broadcast_to(
        jnp.arange(batch, dtype=jnp.float32)[:, None, None, None], (batch, size, size, 3)
    )
    return images, jnp.eye(batch)


def test_mixup_has_one_share_of_the_image_before_and_the_same_share_of_its_target():
    images, targets = numbered()
    x, y = (np.asarray(a) for a in mix(jax.random.key(0), images, targets, mixup=1.0, cutmix=0.0))
    assert np.ptp(x, axis=(1, 2, 3)).max() < 1e-5  # one share for the whole image
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(x[:, 0, 0, 0], y @ np.arange(len(y)), rtol=1e-4, atol=1e-4)
    rest = np.diag(y)
    np.testing.assert_allclose(1 - rest, np.diag(np.roll(y, 1, axis=1)), atol=1e-6)
    assert rest.min() < 0.1 and rest.max() > 0.9 and 0.4 < rest.mean() < 0.6


def test_cutmix_has_a_box_of_the_image_before_and_its_area_of_the_target():
    images, targets = numbered()
    x, y = (np.asarray(a) for a in mix(jax.random.key(1), images, targets, mixup=0.0, cutmix=1.0))
    other = x[..., 0] != np.arange(len(y))[:, None, None]
    for n, box in enumerate(other):
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert set(np.unique(x[n])) <= {n, (n - 1) % len(y)}
        assert box.sum() == len(rows) * len(columns)  # a box, without holes
        for edge in (rows, columns):
            assert len(edge) == 0 or np.ptp(edge) == len(edge) - 1
        np.testing.assert_allclose(y[n, n], 1 - box.mean(), atol=1e-6)
        np.testing.assert_allclose(y[n, n - 1], box.mean(), atol=1e-6)
    assert other.mean(axis=(1, 2)).min() < 0.1 and other.mean(axis=(1, 2)).max() > 0.5


def test_images_are_mixed_in_the_shares_asked_for():
    images, targets = numbered(batch=4096, size=4)
    x, _ = mix(jax.random.key(2), images, targets[:, :1], mixup=0.25, cutmix=0.0)
    changed = np.asarray((x != images).any(axis=(1, 2, 3)))
    assert 0.22 < changed.mean() < 0.28
    same = mix(jax.random.key(2), images, targets[:, :1], mixup=0.0, cutmix=0.0)
    np.testing.assert_array_equal(same[0], images)
    np.testing.assert_array_equal(same[1], targets[:, :1])
