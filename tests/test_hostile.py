"""Thousands of damaged and hostile files: each is loaded, or refused in one line, and nothing else.

What a case may do is watched: CPU time, memory, writing, starting programs. Damage is random, but
the same in every run. Much of it is put beneath checksums and compression, where it gets further.
"""

import collections
import contextlib
import functools
import gzip
import json
import operator
import pathlib
import pickle
import pickletools
import resource
import signal
import struct
import sys
import tarfile
import zipfile
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import test_data as data_files
import test_torch_files as teacher_files
from builders import flipped, npy_bytes, safetensors_with, unzipped, zipped
from PIL import Image

from neumeta_jax.commands import command_line
from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import Grid
from neumeta_jax.data import datasets
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import morphs
from neumeta_jax.export import safetensors as saved
from neumeta_jax.export.network import Network, Normalization
from neumeta_jax.files import torch_files, trees
from neumeta_jax.files.trees import FORMAT, load_tree, save_tree
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec
from neumeta_jax.networks.saved import load_inr, save_inr
from neumeta_jax.runs import logs
from neumeta_jax.runs.config import from_config, load_data
from neumeta_jax.runs.workdir import read_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPEC = resnet_spec(14, num_classes=3, stage_widths=(2, 2, 3), image_size=8)
FAMILY = cifar_resnet.hypernetwork(SPEC, generated_blocks(SPEC), Grid())
NORMALIZATION = Normalization((0.5,) * 3, (0.2,) * 3)

CPU_SECONDS = 10
EXTRA_BYTES = 2**30
NUM_CASES = collections.Counter()


# --- what a case may do ----------------------------------------------------------------------


class TooSlowError(BaseException):
    """Nothing that reads files catches it."""


_forbidden: list[str] = []
_watching = False


def _audit(event, args):
    if not _watching:
        return
    if args and str(args[0]).startswith(jax.config.jax_compilation_cache_dir):
        return  # JAX keeps what it compiles
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    starts = event.startswith(("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess."))
    changes = event.startswith(("socket.", "os.remove", "os.rename", "os.symlink", "os.link"))
    if writes or starts or changes:
        _forbidden.append(f"{event} {args}"[:200])


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched():
    """Fails for a case that takes long, takes memory, writes a file or starts a program."""
    global _watching

    def too_slow(signum, frame):
        raise TooSlowError(f"more than {CPU_SECONDS} s of CPU time")

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGPROF, too_slow)
    most = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, previous)
    done, _forbidden[:] = list(_forbidden), []
    assert not done, done


def attempt(kind, load, *args):
    """ "loaded" or "refused"; any other end than these fails the test."""
    NUM_CASES[kind] += 1
    refusal = None
    with watched():
        try:
            load(*args)
        except (ValueError, OSError) as error:
            refusal = error
    if refusal is None:
        return "loaded"
    # train.py and eval.py show exactly these as one line.
    ours = isinstance(refusal, UsageError) or command_line._is_ours(refusal)
    assert ours, f"{kind}: a traceback would end in {refusal!r}"
    message = str(refusal)
    file = args[0]
    if isinstance(file, pathlib.Path) and kind != "config":  # which is refused by its values
        assert file.name in message or str(file.parent) in message, message
    assert message.isprintable() and message[-1:] in (".", "?") and len(message) < 1500, message
    cause = refusal
    while cause := cause.__cause__ or cause.__context__:
        assert not isinstance(cause, MemoryError), f"{kind}: {message}"
    return "refused"


def attempt_all(kind, load, path, contents, *, least_refused=0.2):
    """Attempts each of `contents` as the file `path`; some must be refused, or none was damaged."""
    ends = collections.Counter()
    for content in contents:
        path.write_bytes(content)
        ends[attempt(kind, load, path)] += 1
    assert ends["refused"] >= least_refused * ends.total(), ends


# --- damage ----------------------------------------------------------------------------------


NUMBERS = [b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", struct.pack("<Q", 2**62)]


def damaged(content, number, seed):
    """`number` damaged copies of `content`: cut, flipped, overwritten, shifted, repeated."""
    rng = np.random.default_rng(seed)
    for n in range(number):
        found = bytearray(content)
        for _ in range(int(rng.choice([1, 1, 2, 8]))):
            at = int(rng.integers(len(found) or 1))
            end = at + int(rng.integers(1, 40))
            kind = (n + int(rng.integers(3))) % 6
            if kind == 0:
                del found[at:]
            elif kind == 1 and found:
                found[min(at, len(found) - 1)] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                new = NUMBERS[int(rng.integers(len(NUMBERS)))]
                found[at : at + len(new)] = new
            elif kind == 3:
                del found[at:end]
            elif kind == 4:
                found[at:at] = found[at:end] * int(rng.integers(1, 4))
            else:
                found[at:end] = rng.bytes(end - at)
        yield bytes(found)


JSON_VALUES = [None, True, -1, 0, 3, 2**31, 10**30, 1e308, float("nan"), float("inf"), "", [], {}]
JSON_VALUES += ["x\n\x1b[2J", "../../etc/passwd", [[[]]], {"a": [1]}, [1] * 300, ["a", None, 2.5]]


def paths_of(value, prefix=()):
    yield prefix
    if not isinstance(value, dict | list):
        return
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield from paths_of(entry, (*prefix, key))


def damaged_json(value, number, seed):
    """`number` copies of a JSON value with an entry replaced, missing, or of another entry."""
    rng = np.random.default_rng(seed)
    paths = list(paths_of(value))[1:]
    for n in range(number):
        copy = json.loads(json.dumps(value))
        for _ in range(1 + n % 2):
            path = paths[int(rng.integers(len(paths)))]
            # An earlier change may have removed the place.
            with contextlib.suppress(KeyError, IndexError, TypeError):
                node = functools.reduce(operator.getitem, path[:-1], copy)
                if n % 7 == 0:
                    del node[path[-1]]
                else:
                    node[path[-1]] = JSON_VALUES[int(rng.integers(len(JSON_VALUES)))]
        yield json.loads(json.dumps(copy))  # keys that are texts


def rezipped(content, name, number, seed):
    """Zip archives whose entry `name` is damaged, with a checksum that fits."""
    entries = unzipped(content)
    for n, payload in enumerate(damaged(entries[name], number, seed)):
        yield zipped(entries | {name: payload}, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[n % 2])


def opcodes(number, seed):
    """Pickles of random opcodes with arguments that are there."""
    rng = np.random.default_rng(seed)
    pieces = [b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"ctorch\nSize\n"]
    pieces += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"X\x07\0\0\0storage", b"X\1\0\0\0" + b"0"]
    pieces += [b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"q\0", b"q\1", b"h\0", b"h\1", b"K\3"]
    pieces += [b"J\xff\xff\xff\x7f", b"U\2u1", b"ccopyreg\n_reconstructor\n", b"cbuiltins\nlist\n"]
    simple = [code.code.encode("latin1") for code in pickletools.opcodes if code.arg is None]
    pieces += 2 * [code for code in simple if code != b"."]
    for _ in range(number):
        chosen = rng.integers(len(pieces), size=int(rng.integers(2, 40)))
        yield b"\x80\x04(" + b"".join(pieces[n] for n in chosen) + b"."


# --- trees and networks of this package ------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Good files of this package: {"tree", "inr", "network": bytes}."""
    folder = tmp_path_factory.mktemp("written")
    tree = cifar_resnet.init_params(jax.random.key(0), SPEC)
    params = jax.jit(lambda tree: hyper.init(jax.random.key(0), FAMILY, tree))(tree)
    save_tree(folder / "tree", tree, {"spec": SPEC.to_dict()})
    save_inr(folder / "inr", FAMILY, params, dataset="x", mean=[0.5], std=[0.2])
    saved.save(folder / "network", Network(SPEC, tree, NORMALIZATION))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LOADERS = {"tree": load_tree, "inr": load_inr}
LOADERS |= {"network": saved.load}


@pytest.mark.parametrize("kind", LOADERS)
def test_damaged_safetensors_of_this_package_are_refused(written, tmp_path, kind):
    """All of them: a checksum covers names, numbers and metadata."""
    path = tmp_path / "file.safetensors"
    contents = [c for c in damaged(written[kind], 130, seed=1) if c != written[kind]]
    attempt_all(kind, LOADERS[kind], path, contents, least_refused=1.0)
    path.write_bytes(written[kind])
    assert attempt(kind, LOADERS[kind], path) == "loaded"


def sealed(content, header):
    """The file `content` with another header and a checksum that fits it."""
    flat = safetensors.numpy.load(content)
    if isinstance(header, dict):
        header = {k: v for k, v in header.items() if k != trees._CHECKSUM}
        header[trees._CHECKSUM] = trees._digest(flat, header)
    return safetensors.numpy.save(flat, {FORMAT: json.dumps(header)})


@pytest.mark.parametrize("kind", ["inr", "network"])
def test_headers_that_ask_for_other_networks_than_there_are_are_refused(written, tmp_path, kind):
    path = tmp_path / "file.safetensors"
    path.write_bytes(written[kind])
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[FORMAT])
    del header[trees._CHECKSUM]
    contents = (sealed(written[kind], found) for found in damaged_json(header, 130, seed=2))
    attempt_all(f"{kind} header", LOADERS[kind], path, contents)


@pytest.mark.parametrize("load", [load_inr, saved.load])
def test_headers_that_are_no_dict_are_refused(written, tmp_path, load):
    flat = safetensors.numpy.load(written["tree"])
    headers = ["[" * 100_000, "[1]", "null", "{", '"x"', '{"spec": 1e999}', "", "\x00"]
    contents = [safetensors.numpy.save(flat, {FORMAT: header}) for header in headers]
    attempt_all("header", load, tmp_path / "file.safetensors", contents, least_refused=1.0)


def test_a_tensor_where_others_have_their_folder_and_any_flipped_bit_are_noticed(written, tmp_path):
    contents = [
        sealed(safetensors.numpy.save({name: np.ones(1, np.float32) for name in names}), {})
        for names in (("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"))
    ]
    positions = np.random.default_rng(0).integers(len(written["tree"]), size=60)
    contents += [flipped(written["tree"], position, bits=1) for position in positions]
    path = tmp_path / "file.safetensors"
    attempt_all("tree", load_tree, path, contents, least_refused=1.0)


# --- specs, configs, metrics -----------------------------------------------------------------


def test_damaged_specs_are_refused(tmp_path):
    path = tmp_path / "best.json"
    good = morphs.morph_to_dict(FAMILY, (1, 2))
    load = functools.partial(morphs.load_morph, family=FAMILY)
    contents = [json.dumps(found).encode() for found in damaged_json(good, 150, seed=3)]
    contents += damaged(json.dumps(good).encode(), 100, seed=4)
    contents += [b"[" * 100_000, b'{"widths": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"null"]
    attempt_all("spec", load, path, contents, least_refused=0.8)
    path.write_text(json.dumps(good))
    assert morphs.load_morph(path, FAMILY) == (1, 2)


@pytest.fixture(scope="module")
def config():
    arguments = ["train.py", f"--config={ROOT}/configs/digits.py:smoke"]
    found, _ = command_line.parse(arguments, {}, config_required=True)
    return json.loads(json.dumps(found))


def test_damaged_configs_of_work_directories_are_refused(config, tmp_path, monkeypatch):
    """As eval.py reads them; values that are merely unusual make an experiment."""
    load_once = functools.cache(datasets.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", load_once)

    def load(path):
        found = read_config(path.parent)
        dataset, _ = load_data(found)
        from_config(found, dataset)

    path = tmp_path / "config.json"
    contents = [json.dumps(found).encode() for found in damaged_json(config, 250, seed=5)]
    contents += damaged(json.dumps(config).encode(), 100, seed=6)
    contents += [b"[" * 100_000, b"[]", b"{}", b"null", b"\xff"]
    attempt_all("config", load, path, contents)
    path.write_text(json.dumps(config))
    assert attempt("config", load, path) == "loaded"


def test_overrides_of_any_kind_make_a_config_or_one_line(config):
    rng = np.random.default_rng(7)
    names = list(command_line._flatten(config)) + ["train", "data", "inr.what", "", "a.b.c", "."]
    values = ["", "1", "-1", "1e3", "1e999", "nan", "x", "(1,2)", "[", "None", "1" * 5000, "é\n"]
    values += ["True", "0x10", "1_0", "lambda: 1", "__import__('os').system('x')", "{}", "1,2", "'"]
    ends = collections.Counter()
    for n in range(200):
        name = names[int(rng.integers(len(names)))]
        value = values[n % len(values)]
        arguments = ["train.py", f"--config={ROOT}/configs/digits.py", f"--config.{name}={value}"]
        arguments += [["--what"], ["extra"], ["--config"]][n % 3] if n % 9 == 0 else []
        parse = functools.partial(command_line.parse, config_required=True)
        ends[attempt("override", parse, arguments, {})] += 1
    assert ends["loaded"] > 20 and ends["refused"] > 60, ends


def test_damaged_metrics_are_continued_from_the_lines_that_are_intact(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"part": "inr", "step": n, "loss": 0.5}) for n in range(1, 6)]
    good = "\n".join(lines).encode() + b"\n"
    for content in [*damaged(good, 60, seed=8), b"1\n[]\nnull\n" + good + b'{"part": "inr", "st']:
        path.write_bytes(content)
        NUM_CASES["metrics"] += 1
        logs.Metrics(tmp_path).rewind("inr", 3)
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(line["part"] != "inr" or line["step"] <= 3 for line in kept)
    assert [line["step"] for line in kept] == [1, 2, 3]


# --- teachers --------------------------------------------------------------------------------


TENSORS = {"fc.weight": np.arange(6, dtype="f4").reshape(2, 3), "fc.bias": np.ones(2, "f4")}


@pytest.mark.parametrize("name", teacher_files.WRITERS)
def test_damaged_teachers_are_refused(tmp_path, name):
    """As a whole, and beneath the checksums or in the header of those that have one."""
    path, read = tmp_path / name, torch_files.read_tensors
    content = teacher_files.WRITERS[name](TENSORS)
    attempt_all(name, read, path, damaged(content, 120, seed=9))
    truncated = (content[:end] for end in range(0, len(content), 7))
    attempt_all(name, read, path, truncated, least_refused=1.0)
    if entry := {"zip.pt": "archive/data.pkl", "arrays.npz": "fc.weight.npy"}.get(name):
        attempt_all(f"{name} entry", read, path, rezipped(content, entry, 150, seed=10))
    if name == "flat.safetensors":
        (length,) = struct.unpack_from("<Q", content)
        headers = damaged_json(json.loads(content[8 : 8 + length]), 120, seed=11)
        contents = (safetensors_with(header, content[8 + length :]) for header in headers)
        attempt_all("header", read, path, contents)


@pytest.mark.parametrize("wrap", [teacher_files.legacy_bytes, teacher_files.zip_bytes])
def test_random_programs_in_pickles_build_nothing(tmp_path, wrap):
    path, read = tmp_path / "teacher.pt", torch_files.read_tensors
    contents = (wrap(payload) for payload in opcodes(150, seed=12))
    attempt_all("opcodes", read, path, contents, least_refused=1.0)


# --- data sets -------------------------------------------------------------------------------

FEW = data_files.random_arrays(num_train=2, num_test=1)
NPZ = data_files.npz_of(data_files.random_arrays(size=4, num_train=3, num_test=2))
IDX = data_files.idx_files(data_files.random_arrays(size=4, channels=1, num_train=3, num_test=2))
IDX_NAME = "train-images-idx3-ubyte"


def load_files(name, path):
    """From a file, or from the folder of a file that is a part of it."""
    whole = path.is_dir() or path.suffix == ".npz" or path.name.endswith(".tar.gz")
    return datasets.load_dataset(name, data_dir=path if whole else path.parent)


load_cifar100, load_mnist, load_npz = (
    functools.partial(load_files, name) for name in ("cifar100", "mnist", "mine")
)


@pytest.mark.parametrize("version", ["python", "binary"])
def test_damaged_cifar_archives_are_refused(tmp_path, version):
    path = tmp_path / "cifar.tar.gz"
    data_files.write_tar(path, data_files.cifar_files("cifar100", version, FEW))
    content = path.read_bytes()
    attempt_all(f"{version} tar.gz", load_cifar100, path, damaged(content, 60, seed=13))
    # Beneath the compression.
    contents = (gzip.compress(c, 1) for c in damaged(gzip.decompress(content), 60, seed=14))
    attempt_all(f"{version} tar", load_cifar100, path, contents, least_refused=0.1)


def test_damaged_cifar_pickles_are_refused(tmp_path):
    data_files.write_folder(tmp_path, data_files.cifar_files("cifar100", "python", FEW))
    path = tmp_path / "cifar-100-python" / "train"
    good = path.read_bytes()
    contents = [part + good[200:] for part in damaged(good[:200], 120, seed=15)]
    contents += [good[:-200] + part for part in damaged(good[-200:], 60, seed=16)]
    contents += opcodes(120, seed=17)
    attempt_all("cifar pickle", load_cifar100, path, contents)


@pytest.mark.parametrize("name", ["0.png", "0.jpg"])
def test_damaged_images_are_refused_by_their_names(tmp_path, name):
    """Whatever the name: a suffix does not choose the decoder."""
    rng = np.random.default_rng(0)
    for place in ("a/1.png", "b/0.png", "b/1.png", "b/2.png", f"a/{name}"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / place)
    path = tmp_path / "a" / name
    load = lambda path: datasets.load_dataset("mine", data_dir=tmp_path)  # noqa: E731
    good = path.read_bytes()
    header = struct.pack(">II", 2**16, 2**16)
    contents = [good[:16] + header + good[24:], b"GIF89a" + good, b"", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    attempt_all("image of another kind", load, path, contents, least_refused=0.7)
    attempt_all("image", load, path, damaged(good, 100, seed=22))


def doubled_list(times):
    """A pickle's list that holds one list twice, which holds another twice, and so on."""
    return b"]K\1a" + b"".join(b"q%c]h%ca" % (n, n) + b"h%ca" % n for n in range(times))


@pytest.mark.parametrize("field", ["labels", "data", "dtype", "key", "shape"])
def test_structures_that_unfold_to_more_than_the_memory_are_refused(tmp_path, field):
    files = data_files.cifar_files("cifar100", "python", FEW)
    data_files.write_folder(tmp_path, files)
    text = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731
    tuples, lists = teacher_files.doubled(60), doubled_list(60)
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\1%sN\x89" + text(b"x") + b"tb"
    payload = {
        "labels": text(b"fine_labels") + lists + text(b"data") + array % b"K\1",
        "data": text(b"data") + lists,
        "dtype": text(b"data") + b"cnumpy\ndtype\n" + tuples + b"\x85R",
        "key": tuples + b"K\1",
        "shape": text(b"data") + array % tuples,
    }[field]
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(b"\x80\x02}(" + payload + b"u.")
    assert attempt("unfold", load_cifar100, tmp_path) == "refused"


def test_a_tar_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("neumeta_jax.data.formats.MAX_BYTES", 2**22)
    heads = [tarfile.TarInfo("cifar-100-python/other"), tarfile.TarInfo("x")]
    heads[1].type = tarfile.XHDTYPE  # a header that tarfile reads at once
    for head in heads:
        head.size = 2**33
    starts = [*(head.tobuf() for head in heads), b""]
    contents = [gzip.compress(start + bytes(2**23), 1) for start in starts]
    path = tmp_path / "cifar.tar.gz"
    attempt_all("bomb", load_cifar100, path, contents, least_refused=1.0)


def test_a_tar_writes_nothing_wherever_its_members_point(tmp_path):
    path = tmp_path / "inside" / "cifar.tar.gz"
    path.parent.mkdir()
    names = ["../train", "/tmp/train", "../../test", "a/../../test"]
    data_files.write_tar(path, dict.fromkeys(names, b"xyz"))
    assert attempt("tar names", load_cifar100, path) == "refused"
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]
    assert [p.name for p in path.parent.iterdir()] == ["cifar.tar.gz"]


def test_damaged_idx_files_are_refused(tmp_path):
    data_files.write_folder(tmp_path, IDX)
    path, good = tmp_path / IDX_NAME, IDX[IDX_NAME]
    attempt_all("idx", load_mnist, path, damaged(good, 60, seed=18))
    path.unlink()
    contents = damaged(gzip.compress(good), 60, seed=19)
    attempt_all("idx.gz", load_mnist, tmp_path / f"{IDX_NAME}.gz", contents)


def test_damaged_npz_data_sets_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    attempt_all("npz", load_npz, path, damaged(NPZ, 120, seed=20))
    attempt_all("npz entry", load_npz, path, rezipped(NPZ, "train_images.npy", 120, seed=21))
    checksum = struct.pack("<I", zlib.crc32(unzipped(NPZ)["train_images.npy"]))
    assert NPZ.count(checksum) >= 1
    path.write_bytes(NPZ.replace(checksum, struct.pack("<I", zlib.crc32(b"other"))))
    assert attempt("crc", load_npz, path) == "refused"


@pytest.mark.parametrize(
    "content",
    [
        npy_bytes((2**40,)),
        npy_bytes((2**20, 2**20, 2**20)),
        npy_bytes((2**62, 4)),
        npy_bytes((0, 2**62)),
        npy_bytes((1,), "|O", pickle.dumps([1])),
        npy_bytes((3,), [("a", "<i4")], bytes(12)),
        npy_bytes((-1,), content=b"x"),
        bytes(2**25),  # deflates to a thousandth
    ],
    ids=["huge", "cube", "overflow", "empty", "objects", "records", "negative", "bomb"],
)
def test_npz_entries_that_claim_more_than_there_is_take_no_memory(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(zipped(unzipped(NPZ) | {"train_images.npy": content}, zipfile.ZIP_DEFLATED))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert attempt("npz claims", load_npz, path) == "refused"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14  # 16 MiB, in KiB


def test_two_thousand_files_were_tried():
    """The last test of this file; it counts where all of them ran."""
    if len(NUM_CASES) < 30:
        pytest.skip("counts only where the whole file runs")
    assert NUM_CASES.total() >= 2000, NUM_CASES
