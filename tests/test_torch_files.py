"""Network files of PyTorch, safetensors and npz: what is read, and what is refused.

No PyTorch is needed: the checkpoints are written here, with stand-ins under PyTorch's names.
"""

import collections
import dataclasses
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import chex
import numpy as np
import pytest
import safetensors.numpy
from builders import Call, npy_bytes, npz_bytes, refused, safetensors_with, unzipped, zipped

from neumeta_jax.files import torch_files

TENSORS = {"conv1.weight": np.arange(36.0).reshape(4, 1, 3, 3), "fc.bias": np.ones(2, "f4")}
TENSORS |= {"bn1.num_batches_tracked": np.array(7), "mask": np.array([True, False])}


# Stand-ins for PyTorch. Pickles refer to them by module and name.

STORAGE_TYPES = {"f4": "Float", "f8": "Double", "f2": "Half", "u2": "BFloat16", "i8": "Long"}
STORAGE_TYPES |= {"b1": "Bool"}
STORAGE_TYPES = {code: f"{name}Storage" for code, name in STORAGE_TYPES.items()}
PLACES = dict.fromkeys([*STORAGE_TYPES.values(), "Size"], "torch")
PLACES |= dict.fromkeys(["_rebuild_tensor_v2", "_rebuild_parameter"], "torch._utils")
STAND_INS = {name: type(name, (), {"__module__": module}) for name, module in PLACES.items()}


@dataclasses.dataclass(eq=False)
class Storage:
    data: np.ndarray
    claimed: int | None = None
    view: tuple | None = None


def rebuilt(storage, offset, shape, strides):
    """As PyTorch pickles a tensor: shape and strides (in elements) over a storage."""
    more = (False, collections.OrderedDict())
    return Call(STAND_INS["_rebuild_tensor_v2"], storage, offset, shape, strides, *more)


def tensor(array):
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return rebuilt(Storage(array.reshape(-1)), 0, array.shape, strides)


class _Pickler(pickle.Pickler):  # its storages and whether it is legacy are set from outside
    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key = self.storages.setdefault(obj, str(len(self.storages)))
        size = obj.data.size if obj.claimed is None else obj.claimed
        kind = STAND_INS[STORAGE_TYPES[obj.data.dtype.str[1:]]]
        pid = ("storage", kind, key, "cuda:0", size)
        return (*pid, obj.view) if self.legacy else pid


def zip_bytes(payload, storages=()):
    entries = {"archive/data.pkl": payload, "archive/byteorder": "little"}
    for key, storage in enumerate(storages):
        entries[f"archive/data/{key}"] = storage.data.tobytes()
    return zipped(entries | {"archive/version": "3\n"})


def legacy_bytes(payload, storages=(), version=None):
    head = [torch_files._LEGACY_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True}]
    parts = [pickle.dumps(obj, 2) for obj in head] + [payload]
    parts[1] = version or parts[1]
    parts.append(pickle.dumps([str(key) for key in range(len(storages))], 2))
    for storage in storages:
        parts += [struct.pack("<q", storage.data.size), storage.data.tobytes()]
    return b"".join(parts)


def torch_bytes(obj, *, legacy=False, protocol=2):
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol)
    pickler.storages, pickler.legacy = {}, legacy
    with pytest.MonkeyPatch.context() as patch:
        for module in ("torch", "torch._utils"):
            patch.setitem(sys.modules, module, types.SimpleNamespace(**STAND_INS))
        pickler.dump(obj)
    write = legacy_bytes if legacy else zip_bytes
    return write(stream.getvalue(), list(pickler.storages))


def state_dict(tensors):
    result = collections.OrderedDict((name, tensor(array)) for name, array in tensors.items())
    result._metadata = collections.OrderedDict({"": {"version": 1}})  # pickled with BUILD
    return result


WRITERS = {
    "zip.pt": lambda tensors: torch_bytes(state_dict(tensors)),
    "legacy.th": lambda tensors: torch_bytes(state_dict(tensors), legacy=True),
    "flat.safetensors": safetensors.numpy.save,
    "arrays.npz": npz_bytes,
}

both_formats = pytest.mark.parametrize("legacy", [False, True])


def read(tmp_path, content, name="teacher.pt"):
    path = tmp_path / name
    path.write_bytes(content)
    return torch_files.read_tensors(path)


def assert_equal(got, wanted):
    chex.assert_trees_all_equal(got, wanted, strict=True)
    assert all(array.flags.c_contiguous for array in got.values())


# Reading


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_to_the_same_arrays(tmp_path, name):
    assert_equal(read(tmp_path, WRITERS[name](TENSORS), name), TENSORS)


SUFFIXES = [".pt", ".pth", ".th", ".PT"]
WAYS = list(zip(2 * SUFFIXES, 2 * [2, 3, 4, 5], torch_files._WRAPPERS, strict=False))


@both_formats
@pytest.mark.parametrize("suffix, protocol, wrapper", WAYS)
def test_all_kinds_of_pytorch_files_are_read(tmp_path, legacy, suffix, protocol, wrapper):
    """The content tells the format; beside the state_dict there may be anything."""
    tensors = {"fc.weight": np.arange(6, dtype="f4").reshape(2, 3), "step": np.array(3)}
    best = tensor(np.array(0.7, "f4"))
    checkpoint = {"epoch": 3, wrapper: state_dict(tensors), "best_prec1": best, "args": [None, "x"]}
    average = state_dict(
        {"n_averaged": np.array(9), **{f"module.{n}": tensors[n] for n in tensors}}
    )
    for saved in (state_dict(tensors), checkpoint, {wrapper: {"epoch": 3, "model_ema": average}}):
        content = torch_bytes(saved, legacy=legacy, protocol=protocol)
        assert_equal(read(tmp_path, content, f"teacher{suffix}"), tensors)


@both_formats
def test_views_into_a_shared_storage_read_to_contiguous_arrays(tmp_path, legacy):
    storage = Storage(np.arange(24, dtype="f8"))
    whole = storage.data.reshape(4, 6)
    views = {
        "whole": ((0, Call(STAND_INS["Size"], (4, 6)), (6, 1)), whole),
        "transposed": ((0, (6, 4), (1, 6)), whole.T),
        "inner": ((8, (2, 3), (6, 2)), np.array([[8.0, 10, 12], [14, 16, 18]])),
        "scalar": ((23, (), ()), whole[3, 5]),
        "empty": ((0, (0, 3), (3, 1)), np.zeros((0, 3))),
    }
    saved = {name: rebuilt(storage, *view) for name, (view, _) in views.items()}
    wanted = {name: array for name, (_, array) in views.items()}
    assert_equal(read(tmp_path, torch_bytes(saved, legacy=legacy)), wanted)


def test_legacy_views_of_a_root_storage_start_where_they_say(tmp_path):
    def content(size):
        storage = Storage(np.arange(10, dtype="f4"), view=("7", 4, size))
        return torch_bytes({"view": rebuilt(storage, 1, (2,), (2,))}, legacy=True)

    assert_equal(read(tmp_path, content(6)), {"view": np.array([5, 7], "f4")})
    with refused("no storage of numbers"):
        read(tmp_path, content(7))


# Exact in bfloat16 and in float16.
HALVES = np.array([[0, -1.5, 0.15625], [320, -0.0078125, 2]], "f4")


@pytest.mark.parametrize("name", ["zip.pt", "legacy.th", "flat.safetensors"])
def test_half_and_bfloat16_read_as_float32(tmp_path, name):
    half, brain = HALVES.astype("f2"), (HALVES.view("u4") >> 16).astype("u2")
    if name == "flat.safetensors":
        header = {"half": _entry("F16", [2, 3], [0, 12]), "brain": _entry("BF16", [2, 3], [12, 24])}
        content = safetensors_with(header, half.tobytes() + brain.tobytes())
    else:
        content = WRITERS[name]({"half": half, "brain": brain})
    assert_equal(read(tmp_path, content, name), {"half": HALVES, "brain": HALVES})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_arrays_of_any_layout_read_to_native_contiguous_ones(tmp_path, save):
    array = np.arange(6, dtype="f4").reshape(2, 3)
    same = TENSORS | {"ones": np.ones(50_000, "f4")}
    stored = {"big": array.astype(">f4"), "fortran": np.asfortranarray(array)}
    content = npz_bytes(same | stored | {"half": HALVES.astype("f2")}, save)
    wanted = same | {"big": array, "fortran": array, "half": HALVES}
    assert_equal(read(tmp_path, content, "teacher.npz"), wanted)


@both_formats
def test_entries_that_are_no_tensors_are_left_out_and_not_unpickled(tmp_path, legacy):
    parameter = (tensor(np.ones(2)), True, collections.OrderedDict())
    saved = {"fc.bias": Call(STAND_INS["_rebuild_parameter"], *parameter)}
    saved |= {"epoch": 3, "note": "x", 7: tensor(np.ones(1))}
    assert_equal(read(tmp_path, torch_bytes(saved, legacy=legacy)), {"fc.bias": np.ones(2)})
    marker = tmp_path / "marker"
    objects = np.array([Call(os.system, f"touch {marker}")], object)
    content = npz_bytes({"evil": objects, "fc.bias": np.ones(2), "note": np.array("x")})
    assert_equal(read(tmp_path, content, "teacher.npz"), {"fc.bias": np.ones(2)})
    assert not marker.exists()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.model."])
def test_prefixes_are_stripped_only_where_all_names_share_them(tmp_path, name, prefix):
    arrays = {"conv1.weight": np.ones((1, 1, 3, 3), "f4"), "fc.bias": np.ones(2, "f4")}
    prefixed = {prefix + key: array for key, array in arrays.items()}
    assert_equal(read(tmp_path, WRITERS[name](prefixed), name), arrays)
    mixed = prefixed | {"other": np.ones(1, "f4")}
    assert_equal(read(tmp_path, WRITERS[name](mixed), name), mixed)


# Refusals of what is not a network file


@pytest.mark.parametrize("suffix", torch_files._READERS)
@pytest.mark.parametrize("content", [b"", b"PK", b"<!DOCTYPE html>\n<html>", b"\x80", b"\0" * 99])
def test_files_of_another_kind_and_missing_ones_are_named(tmp_path, suffix, content):
    path = tmp_path / f"teacher{suffix}"
    with refused(path.name, error=FileNotFoundError):
        torch_files.read_tensors(path)
    with refused(path.name):
        read(tmp_path, content, path.name)


@pytest.mark.parametrize(
    "suffix, content, match",
    [
        (".pt", torch_bytes([1, 2]), "holds a list, not a state_dict"),
        (".pt", torch_bytes({"epoch": 3}, legacy=True), "holds no named tensors"),
        (".pt", torch_bytes(tensor(np.ones(2))), "holds a Tensor, not a state_dict"),
        (".h5", b"", r"\.pt, \.pth, \.th, \.safetensors, \.npz"),
        (".pt", zipped({"readme.txt": "hello"}), r"0 entries data\.pkl"),
        (".npz", zipped({"readme.txt": "hello"}), "holds no named tensors"),
        (".pt", pickle.dumps({"fc.bias": [1.0]}), "a file that torch.save wrote"),
        (".pt", zipped({"a/data.pkl": pickle.dumps({}), "a/byteorder": "big"}), "big-endian"),
        (".npz", zipped({"a.npy": npy_bytes((2**20, 2**20), "<f4")}), "0 bytes for"),
    ],
)
def test_files_without_named_tensors_say_what_is_missing(tmp_path, suffix, content, match):
    with refused(match):
        read(tmp_path, content, f"teacher{suffix}")


def test_large_files_and_many_views_of_one_storage_do_not_fill_the_memory(tmp_path, monkeypatch):
    storage = Storage(np.zeros(2**20, "f4"))
    saved = {f"t{i}": rebuilt(storage, 0, (2**20,), (1,)) for i in range(20)}
    with refused("bytes of tensors"):
        read(tmp_path, torch_bytes(saved))
    monkeypatch.setattr(torch_files, "_MAX_SIZE", 10)
    with refused("at most 10 bytes"):
        read(tmp_path, b"x" * 11)


# Hostile files


def _stack_global(module, name):
    """A pickle of protocol 4 that calls `module.name`; names may have dots there."""
    parts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(parts) + b"\x93)R."


def doubled(times):
    """Opcodes of a tuple that holds one tuple twice, which holds another twice, and so on."""
    return b")" + b"2\x86" * times


def hostile_pickles(marker):
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    quoted = command.encode()
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    ordered = b"\x80\x02ccollections\nOrderedDict\n"
    return {
        "os.system": pickle.dumps(Call(os.system, command), 2),
        "os.system inside": pickle.dumps({"state_dict": {"a": Call(os.system, command)}}, 2),
        "eval": pickle.dumps(Call(eval, code), 2),
        "exec": pickle.dumps(Call(exec, code), 4),
        "open": pickle.dumps(Call(open, str(marker), "w"), 5),
        "inst": b"(S'" + quoted + b"'\niposix\nsystem\n.",
        "obj": b"(cposix\nsystem\nS'" + quoted + b"'\no.",
        "another name of torch._utils": b"\x80\x02ctorch._utils\nimport_module\n)R.",
        "another name of torch": b"\x80\x02ctorch\nload\n)R.",
        "dotted": _stack_global("collections", "OrderedDict.__class__"),
        "dotted module": _stack_global("torch._utils", "_rebuild_tensor_v2.__globals__"),
        "dotted through sys": _stack_global("collections", "_sys.modules.__getitem__"),
        "control": _stack_global("a\x1b[2Jb", "c\nd"),
        "newobj": b"\x80\x02csubprocess\nPopen\n(]X\x05\0\0\0touchat\x81.",
        "extension": b"\x80\x02\x82\x01)R.",
        "function state": b"\x80\x02" + rebuild + b"N}X\x08\0\0\0__code__Ns\x86b.",
        "function dict": b"\x80\x02" + rebuild + b"}X\x09\0\0\0_functionK\x01sb.",
        "storage type state": b"\x80\x02ctorch\nFloatStorage\nN}X\x04\0\0\0codeK\x01s\x86b.",
        "storage type call": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "text persistent id": b"Pposix system\n.",
        "module persistent id": b"\x80\x02(X\x06\0\0\0modulecposix\nsystem\nX\x01\0\0\0atQ.",
        "size of a number": b"\x80\x02ctorch\nSize\nK\x05\x85R.",
        "tensor of nothing": b"\x80\x02" + rebuild + b"(NNNNtR.",
        "parameter of nothing": b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x85R.",
        "deep key": b"\x80\x02})" + b"\x85" * 2_000_000 + b"K\x01s.",
        "doubled key": b"\x80\x02}" + doubled(200) + b"K\x01s.",
        "doubled key among others": b"\x80\x02}(" + doubled(200) + b"K\x01u.",
        "doubled key of an OrderedDict": ordered + b"]" + doubled(200) + b"K\x01\x86a\x85R.",
        "doubled entry of a set": b"\x80\x04\x8f(" + doubled(200) + b"\x90.",
        "doubled entry of a frozenset": b"\x80\x04(" + doubled(200) + b"\x91.",
        "doubled tuple": b"\x80\x02" + doubled(200) + b".",
        "large memo": b"\x80\x02}r\xff\xff\xff\xff.",
        "large text memo": b"}p99999999999\n.",
        "large bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
        "large integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    }


@both_formats
@pytest.mark.parametrize("attack", hostile_pickles("x"))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, attack, legacy):
    marker = tmp_path / "marker"
    rebuild = torch_files._GLOBALS["torch._utils", "_rebuild_tensor_v2"]
    before = dict(vars(rebuild))
    payload = hostile_pickles(marker)[attack]
    reason = {"os.system": r"wants to call \w+\.system .*state_dict", "control": "wants to call"}
    with refused(r"teacher\.pt " + reason.get(attack, "")):
        read(tmp_path, legacy_bytes(payload) if legacy else zip_bytes(payload))
    assert not marker.exists()
    assert vars(rebuild) == before


@pytest.mark.parametrize("attack", ["os.system", "eval", "inst", "obj", "open"])
def test_the_hostile_pickles_would_run_elsewhere(tmp_path, attack):
    result = pickle.loads(hostile_pickles(tmp_path / "marker")[attack])
    assert (tmp_path / "marker").exists()
    if hasattr(result, "close"):
        result.close()


def test_legacy_files_with_doubled_tuples_beside_the_tensors_are_refused(tmp_path):
    """Neither printed nor hashed, which would take 2**200 steps."""
    good = pickle.dumps({}, 2)
    version = legacy_bytes(good, version=b"\x80\x02" + doubled(200) + b".")
    storages = legacy_bytes(good + b"\x80\x02]" + doubled(200) + b"a.")
    for content in (version, storages):
        with refused(r"teacher\.pt"):
            read(tmp_path, content)


@both_formats
@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (10**6,), (0,)),
        (-1, (2,), (1,)),
        (4, (2,), (-1,)),
        (0, (-2, -3), (1, 1)),
        (0, (2, 3), (1,)),
        (2**62, (2,), (1,)),
        (0, (2**32, 2**32), (0, 0)),
        (0, (2**63, 0), (1, 1)),
        (0, (2,), (2**63,)),
        (0, (1,) * 65, (1,) * 65),
        (0, (2.0,), (1,)),
        (True, (2,), (1,)),
        ("0", (2,), (1,)),
        (0, "ab", "cd"),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, legacy, offset, shape, strides):
    saved = {"fc.bias": rebuilt(Storage(np.arange(6, dtype="f4")), offset, shape, strides)}
    with refused(r"teacher\.pt is truncated or corrupt \(a tensor"):
        read(tmp_path, torch_bytes(saved, legacy=legacy))


@both_formats
@pytest.mark.parametrize("claimed", [5, 7, 10**12, -6, "6", 6.0])
def test_storages_of_another_size_than_claimed_are_refused(tmp_path, legacy, claimed):
    storage = Storage(np.arange(6, dtype="f4"), claimed)
    with refused("truncated or corrupt"):
        read(tmp_path, torch_bytes({"fc.bias": rebuilt(storage, 0, (2,), (1,))}, legacy=legacy))


@pytest.mark.parametrize("name", ["zip.pt", "arrays.npz"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs_are_not_inflated(tmp_path, name, method):
    stored = WRITERS[name]({"fc.bias": np.zeros(2**23, "f4")})
    with refused("inflate"):
        read(tmp_path, zipped(unzipped(stored), method), name)


def test_a_single_entry_that_inflates_too_far_is_refused(tmp_path):
    noise = np.random.default_rng(0).bytes(2**20)  # so that the archive as a whole is no bomb
    content = zipped({"noise": noise, "zeros.npy": bytes(2**22)}, zipfile.ZIP_DEFLATED)
    with refused(r"zeros\.npy that inflates"):
        read(tmp_path, content, "teacher.npz")


def _entry(dtype="F32", shape=(3,), offsets=(0, 12)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": _entry(shape=[2])},
        {"a": _entry(shape=[4], offsets=[0, 16])},
        {"a": _entry(shape=[-3], offsets=[12, 0])},
        {"a": _entry(shape=[2**62, 4, 0], offsets=[0, 0])},
        {"a": _entry(shape=[3.0])},
        {"a": _entry(shape=3)},
        {"a": _entry(offsets=[-12, 0])},
        {"a": _entry(offsets=[0])},
        {"a": _entry("F8_E4M3", [12])},
        {"a": _entry(["F32"])},
        {"a": {"shape": [3], "data_offsets": [0, 12]}},
        {"a": [1, 2]},
        {"a": None},
        {"a": _entry(), "b": _entry()},  # which share their bytes
        b"[" * 100_000,
        b"[]",
        b"\xff\xfe",
        b'{"a": 1' + b"0" * 5000 + b"}",
    ],
)
def test_inconsistent_and_hostile_safetensors_headers_are_refused(tmp_path, header):
    with refused(r"teacher\.safetensors"):
        read(tmp_path, safetensors_with(header, bytes(12)), "teacher.safetensors")
