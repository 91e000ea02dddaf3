"""Network files of PyTorch, safetensors and npz: what is read, and what is refused.

No PyTorch is needed: the checkpoints are written here, with stand-ins under PyTorch's names.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neumeta_jax import archives, resnet, teacher_import
from neumeta_jax.architecture import ResNetSpec, cifar_resnet

SPEC = ResNetSpec(stage_widths=(4, 6, 8), hidden_widths=(4, 6, 8), num_classes=5, image_size=8)


# Stand-ins for PyTorch. Pickles refer to them by module and name.


def _stand_in(kind, module, name):
    kind.__module__, kind.__name__, kind.__qualname__ = module, name, name
    return kind


STORAGE_TYPES = {
    name: _stand_in(type(name, (), {}), "torch", name)
    for name in ("FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage")
}
REBUILDERS = {
    name: _stand_in(lambda *_: None, "torch._utils", name)
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
}


class Size(tuple):
    def __reduce__(self):
        return Size, (tuple(self),)


_stand_in(Size, "torch", "Size")


@contextlib.contextmanager
def fake_torch():
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    vars(torch).update(STORAGE_TYPES, Size=Size, _utils=utils)
    vars(utils).update(REBUILDERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        yield


@dataclasses.dataclass(eq=False)
class Storage:
    data: np.ndarray
    type_name: str = ""
    claimed: int | None = None
    view: tuple | None = None

    def __post_init__(self):
        names = {"f4": "Float", "f8": "Double", "f2": "Half", "u2": "BFloat16", "i8": "Long"}
        self.type_name = self.type_name or names[self.data.dtype.str[1:]] + "Storage"


@dataclasses.dataclass(eq=False)
class Tensor:
    """As PyTorch pickles a tensor: shape and strides (in elements) over a storage."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple

    def __reduce__(self):
        described = (self.storage, self.offset, self.shape, self.strides)
        more = (False, collections.OrderedDict())
        return REBUILDERS["_rebuild_tensor_v2"], described + more


def tensor(array):
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Tensor(Storage(array.reshape(-1)), 0, array.shape, strides)


class Parameter:
    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return REBUILDERS["_rebuild_parameter"], (self.data, True, collections.OrderedDict())


class _Pickler(pickle.Pickler):
    def __init__(self, stream, protocol, legacy):
        super().__init__(stream, protocol)
        self.storages = {}
        self.legacy = legacy

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key = self.storages.setdefault(obj, str(len(self.storages)))
        size = obj.data.size if obj.claimed is None else obj.claimed
        pid = ("storage", STORAGE_TYPES[obj.type_name], key, "cuda:0", size)
        return (*pid, obj.view) if self.legacy else pid


def zip_bytes(payload, storages=(), *, method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/byteorder", "little")
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage.data.tobytes())
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def legacy_bytes(payload, storages=()):
    head = [teacher_import._LEGACY_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True}]
    parts = [pickle.dumps(obj, 2) for obj in head] + [payload]
    parts.append(pickle.dumps([str(key) for key in range(len(storages))], 2))
    for storage in storages:
        parts += [struct.pack("<q", storage.data.size), storage.data.tobytes()]
    return b"".join(parts)


def torch_bytes(obj, *, legacy=False, protocol=2):
    stream = io.BytesIO()
    with fake_torch():
        pickler = _Pickler(stream, protocol, legacy)
        pickler.dump(obj)
    write = legacy_bytes if legacy else zip_bytes
    return write(stream.getvalue(), list(pickler.storages))


def state_dict(tensors):
    result = collections.OrderedDict((name, tensor(array)) for name, array in tensors.items())
    result._metadata = collections.OrderedDict({"": {"version": 1}})  # pickled with BUILD
    return result


def safetensors_bytes(tensors, codes=None):
    names = {"f4": "F32", "f8": "F64", "f2": "F16", "i8": "I64", "b1": "BOOL"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        code = (codes or {}).get(name) or names[array.dtype.str[1:]]
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def npz_bytes(tensors):
    stream = io.BytesIO()
    np.savez(stream, **tensors)
    return stream.getvalue()


WRITERS = {
    "zip.pt": lambda tensors: torch_bytes(state_dict(tensors)),
    "legacy.th": lambda tensors: torch_bytes(state_dict(tensors), legacy=True),
    "flat.safetensors": safetensors_bytes,
    "arrays.npz": npz_bytes,
}


def teacher_tensors(spec, *, shortcut="downsample", head="fc", seed=0):
    """Random tensors of `spec` under the names and with the shapes of PyTorch."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def conv(name, out_width, in_width, size=3):
        tensors[f"{name}.weight"] = rng.normal(size=(out_width, in_width, size, size))

    def norm(name, width):
        tensors[f"{name}.weight"] = rng.normal(1, 0.1, width)
        tensors[f"{name}.bias"] = rng.normal(size=width)
        tensors[f"{name}.running_mean"] = rng.normal(size=width)
        tensors[f"{name}.running_var"] = rng.uniform(0.5, 2, width)
        tensors[f"{name}.num_batches_tracked"] = np.array(7)

    conv("conv1", spec.stage_widths[0], spec.channels)
    norm("bn1", spec.stage_widths[0])
    for block in spec.blocks:
        if not block.hidden_width:
            continue
        name = f"layer{block.stage}.{block.index}"
        conv(f"{name}.conv1", block.hidden_width, block.in_width)
        norm(f"{name}.bn1", block.hidden_width)
        conv(f"{name}.conv2", block.out_width, block.hidden_width)
        norm(f"{name}.bn2", block.out_width)
        if block.projection:
            conv(f"{name}.{shortcut}.0", block.out_width, block.in_width, 1)
            norm(f"{name}.{shortcut}.1", block.out_width)
    tensors[f"{head}.weight"] = rng.normal(size=(spec.num_classes, spec.stage_widths[-1]))
    tensors[f"{head}.bias"] = rng.normal(size=spec.num_classes)
    return {k: v.astype("f4") if v.dtype == np.float64 else v for k, v in tensors.items()}


def read(tmp_path, content, name="teacher.pt"):
    path = tmp_path / name
    path.write_bytes(content)
    return teacher_import.read_tensors(path)


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].flags.c_contiguous
        np.testing.assert_array_equal(got[name], array, err_msg=name, strict=True)


def is_one_sentence(error):
    text = str(error.value if hasattr(error, "value") else error)
    return text.endswith(".") and ". " not in text and "\n" not in text and len(text) < 600


# Reading


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_to_the_same_arrays(tmp_path, name):
    tensors = teacher_tensors(SPEC)
    assert_equal(read(tmp_path, WRITERS[name](tensors), name), tensors)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".PT"])
def test_the_content_and_not_the_suffix_tells_the_pytorch_format(tmp_path, legacy, suffix):
    tensors = {"fc.bias": np.arange(3, dtype="f4")}
    content = torch_bytes(state_dict(tensors), legacy=legacy)
    assert_equal(read(tmp_path, content, f"teacher{suffix}"), tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_pickle_protocol_is_read(tmp_path, protocol, legacy):
    tensors = {"fc.weight": np.arange(6, dtype="f4").reshape(2, 3), "step": np.array(3)}
    content = torch_bytes(state_dict(tensors), legacy=legacy, protocol=protocol)
    assert_equal(read(tmp_path, content), tensors)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_into_a_shared_storage_read_to_contiguous_arrays(tmp_path, legacy):
    storage = Storage(np.arange(24, dtype="f8"))
    whole = storage.data.reshape(4, 6)
    saved = {
        "whole": Tensor(storage, 0, Size((4, 6)), (6, 1)),
        "transposed": Tensor(storage, 0, (6, 4), (1, 6)),
        "inner": Tensor(storage, 8, (2, 3), (6, 2)),
        "scalar": Tensor(storage, 23, (), ()),
        "empty": Tensor(storage, 0, (0, 3), (3, 1)),
    }
    wanted = {
        "whole": whole,
        "transposed": whole.T,
        "inner": np.array([[8.0, 10, 12], [14, 16, 18]]),
        "scalar": whole[3, 5],
        "empty": np.zeros((0, 3)),
    }
    assert_equal(read(tmp_path, torch_bytes(saved, legacy=legacy)), wanted)


def test_legacy_views_of_a_root_storage_start_where_they_say(tmp_path):
    storage = Storage(np.arange(10, dtype="f4"), view=("7", 4, 6))
    content = torch_bytes({"view": Tensor(storage, 1, (2,), (2,))}, legacy=True)
    assert_equal(read(tmp_path, content), {"view": np.array([5, 7], "f4")})
    storage = Storage(np.arange(10, dtype="f4"), view=("7", 4, 7))
    content = torch_bytes({"view": Tensor(storage, 1, (2,), (2,))}, legacy=True)
    with pytest.raises(ValueError, match="no storage of numbers"):
        read(tmp_path, content)


# Exact in bfloat16 and in float16.
HALVES = np.array([[0, -1.5, 0.15625], [320, -0.0078125, 2]], "f4")


@pytest.mark.parametrize("name", ["zip.pt", "legacy.th", "flat.safetensors"])
def test_half_and_bfloat16_read_as_float32(tmp_path, name):
    upper = (HALVES.view("u4") >> 16).astype("u2")
    if name == "flat.safetensors":
        tensors = {"half": HALVES.astype("f2"), "brain": upper}
        content = safetensors_bytes(tensors, {"brain": "BF16"})
    else:
        saved = {"half": tensor(HALVES.astype("f2")), "brain": tensor(upper)}
        content = torch_bytes(saved, legacy=name == "legacy.th")
    assert_equal(read(tmp_path, content, name), {"half": HALVES, "brain": HALVES})


def test_npz_arrays_of_any_layout_read_to_native_contiguous_ones(tmp_path):
    array = np.arange(6, dtype="f4").reshape(2, 3)
    content = npz_bytes(
        {
            "big": array.astype(">f4"),
            "fortran": np.asfortranarray(array),
            "half": HALVES.astype("f2"),
        }
    )
    wanted = {"big": array, "fortran": array, "half": HALVES}
    assert_equal(read(tmp_path, content, "teacher.npz"), wanted)


def test_compressed_npz_files_are_read(tmp_path):
    tensors = teacher_tensors(SPEC) | {"ones": np.ones(50_000, "f4")}
    stream = io.BytesIO()
    np.savez_compressed(stream, **tensors)
    assert_equal(read(tmp_path, stream.getvalue(), "teacher.npz"), tensors)


@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_read_as_tensors(tmp_path, legacy):
    array = np.arange(4, dtype="f4")
    content = torch_bytes({"fc.bias": Parameter(tensor(array))}, legacy=legacy)
    assert_equal(read(tmp_path, content), {"fc.bias": array})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "net"])
def test_wrapped_state_dicts_are_found_and_the_rest_is_left_out(tmp_path, legacy, wrapper):
    tensors = {"fc.weight": np.ones((2, 3), "f4"), "fc.bias": np.zeros(2, "f4")}
    best = tensor(np.array(0.7, "f4"))
    checkpoint = {"epoch": 3, wrapper: state_dict(tensors), "best_prec1": best, "args": [None, "x"]}
    assert_equal(read(tmp_path, torch_bytes(checkpoint, legacy=legacy)), tensors)


def test_entries_that_are_no_tensors_are_left_out(tmp_path):
    saved = {"fc.bias": tensor(np.ones(2, "f4")), "epoch": 3, "note": "x", 7: tensor(np.ones(1))}
    assert list(read(tmp_path, torch_bytes(saved))) == ["fc.bias"]
    content = npz_bytes({"fc.bias": np.ones(2, "f4"), "note": np.array("x")})
    assert list(read(tmp_path, content, "teacher.npz")) == ["fc.bias"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.model."])
def test_prefixes_are_stripped_only_where_all_names_share_them(tmp_path, name, prefix):
    arrays = {"conv1.weight": np.ones((1, 1, 3, 3), "f4"), "fc.bias": np.ones(2, "f4")}
    prefixed = {prefix + key: array for key, array in arrays.items()}
    assert_equal(read(tmp_path, WRITERS[name](prefixed), name), arrays)
    mixed = prefixed | {"other": np.ones(1, "f4")}
    assert_equal(read(tmp_path, WRITERS[name](mixed), name), mixed)


# Refusals of what is not a network file


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt") as error:
        teacher_import.read_tensors(tmp_path / "nowhere.pt")
    assert is_one_sentence(error)


def test_an_unknown_suffix_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"\.pt, \.pth, \.th, \.safetensors, \.npz") as error:
        read(tmp_path, b"", "teacher.h5")
    assert is_one_sentence(error)


@pytest.mark.parametrize("suffix", teacher_import._READERS)
@pytest.mark.parametrize("content", [b"", b"PK", b"<!DOCTYPE html>\n<html>", b"\x80", b"\0" * 99])
def test_files_of_another_kind_are_named(tmp_path, suffix, content):
    with pytest.raises(ValueError, match=f"teacher{suffix}") as error:
        read(tmp_path, content, f"teacher{suffix}")
    assert is_one_sentence(error)


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_zip_archives_without_tensors_are_refused(tmp_path, suffix):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"0 entries data\.pkl|holds no named tensors") as error:
        read(tmp_path, stream.getvalue(), f"teacher{suffix}")
    assert is_one_sentence(error)


@pytest.mark.parametrize(
    "saved, match",
    [
        ([1, 2], "holds a list, not a state_dict"),
        ({"epoch": 3}, "holds no named tensors"),
        (tensor(np.ones(2, "f4")), "holds a Tensor, not a state_dict"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_without_a_state_dict_are_refused(tmp_path, saved, match, legacy):
    with pytest.raises(ValueError, match=match) as error:
        read(tmp_path, torch_bytes(saved, legacy=legacy))
    assert is_one_sentence(error)


def test_a_plain_pickle_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a file that torch.save wrote") as error:
        read(tmp_path, pickle.dumps({"fc.bias": [1.0]}))
    assert is_one_sentence(error)


def test_big_endian_checkpoints_are_refused(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="big-endian") as error:
        read(tmp_path, stream.getvalue())
    assert is_one_sentence(error)


def test_a_file_larger_than_any_network_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_import, "_MAX_SIZE", 10)
    with pytest.raises(ValueError, match="at most 10 bytes") as error:
        read(tmp_path, b"x" * 11)
    assert is_one_sentence(error)


# Hostile files


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _stack_global(module, name, arguments=b")"):
    """A pickle of protocol 4 that calls `module.name`; names may have dots there."""
    parts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(parts) + b"\x93" + arguments + b"R."


def _doubled(times):
    """Opcodes of a tuple that holds one tuple twice, which holds another twice, and so on."""
    return b")" + b"2\x86" * times


def hostile_pickles(marker):
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    quoted = command.encode()
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return {
        "os.system": pickle.dumps(_Call(os.system, command), 2),
        "os.system inside": pickle.dumps({"state_dict": {"a": _Call(os.system, command)}}, 2),
        "eval": pickle.dumps(_Call(eval, code), 2),
        "exec": pickle.dumps(_Call(exec, code), 4),
        "open": pickle.dumps(_Call(open, str(marker), "w"), 5),
        "inst": b"(S'" + quoted + b"'\niposix\nsystem\n.",
        "obj": b"(cposix\nsystem\nS'" + quoted + b"'\no.",
        "another name of torch._utils": b"\x80\x02ctorch._utils\nimport_module\n)R.",
        "another name of torch": b"\x80\x02ctorch\nload\n)R.",
        "dotted": _stack_global("collections", "OrderedDict.__class__"),
        "dotted module": _stack_global("torch._utils", "_rebuild_tensor_v2.__globals__"),
        "dotted through sys": _stack_global("collections", "_sys.modules.__getitem__"),
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
        "doubled key": b"\x80\x02}" + _doubled(200) + b"K\x01s.",
        "doubled key among others": b"\x80\x02}(" + _doubled(200) + b"K\x01u.",
        "doubled key of an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n]"
        + _doubled(200)
        + b"K\x01\x86a\x85R.",
        "doubled entry of a set": b"\x80\x04\x8f(" + _doubled(200) + b"\x90.",
        "doubled entry of a frozenset": b"\x80\x04(" + _doubled(200) + b"\x91.",
        "doubled tuple": b"\x80\x02" + _doubled(200) + b".",
        "large memo": b"\x80\x02}r\xff\xff\xff\xff.",
        "large text memo": b"}p99999999999\n.",
        "large bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
        "large integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("attack", hostile_pickles("x"))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, attack, legacy):
    marker = tmp_path / "marker"
    rebuild = teacher_import._GLOBALS["torch._utils", "_rebuild_tensor_v2"]
    before = dict(vars(rebuild))
    payload = hostile_pickles(marker)[attack]
    content = legacy_bytes(payload) if legacy else zip_bytes(payload)
    with pytest.raises(ValueError, match=r"teacher\.pt") as error:
        read(tmp_path, content)
    assert is_one_sentence(error)
    assert not marker.exists()
    assert vars(rebuild) == before


@pytest.mark.parametrize("attack", ["os.system", "eval", "inst", "obj", "open"])
def test_the_hostile_pickles_would_run_elsewhere(tmp_path, attack):
    marker = tmp_path / "marker"
    result = pickle.loads(hostile_pickles(marker)[attack])
    assert marker.exists()
    if hasattr(result, "close"):
        result.close()


def test_the_refusal_names_what_the_file_wants_to_call(tmp_path):
    payload = hostile_pickles("x")["os.system"]
    with pytest.raises(ValueError, match=r"teacher\.pt wants to call \w+\.system .*state_dict"):
        read(tmp_path, zip_bytes(payload))


@pytest.mark.parametrize("place", ["version", "storages"])
def test_legacy_files_with_doubled_tuples_beside_the_tensors_are_refused(tmp_path, place):
    """Neither printed nor hashed, which would take 2**200 steps."""
    pickles = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    pickles += [pickle.dumps({}, 2), b"\x80\x02]" + _doubled(200) + b"a."]
    if place == "version":
        pickles[1] = b"\x80\x02" + _doubled(200) + b"."
    with pytest.raises(ValueError, match=r"teacher\.pt") as error:
        read(tmp_path, b"".join(pickles))
    assert is_one_sentence(error)


def test_names_from_a_file_are_printed_without_control_characters(tmp_path):
    payload = _stack_global("a\x1b[2Jb", "c\nd")
    with pytest.raises(ValueError, match="wants to call") as error:
        read(tmp_path, zip_bytes(payload))
    assert str(error.value).isprintable()


def test_object_arrays_are_not_unpickled(tmp_path):
    marker = tmp_path / "marker"
    objects = np.array([_Call(os.system, f"touch {marker}")], object)
    content = npz_bytes({"evil": objects, "fc.bias": np.ones(2, "f4")})
    assert list(read(tmp_path, content, "teacher.npz")) == ["fc.bias"]
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
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
    saved = {"fc.bias": Tensor(Storage(np.arange(6, dtype="f4")), offset, shape, strides)}
    with pytest.raises(
        ValueError, match=r"teacher\.pt is truncated or corrupt \(a tensor"
    ) as error:
        read(tmp_path, torch_bytes(saved, legacy=legacy))
    assert is_one_sentence(error)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("claimed", [5, 7, 10**12, -6, "6", 6.0])
def test_storages_of_another_size_than_claimed_are_refused(tmp_path, legacy, claimed):
    storage = Storage(np.arange(6, dtype="f4"), claimed=claimed)
    saved = {"fc.bias": Tensor(storage, 0, (2,), (1,))}
    with pytest.raises(ValueError, match=r"truncated or corrupt") as error:
        read(tmp_path, torch_bytes(saved, legacy=legacy))
    assert is_one_sentence(error)


def test_many_views_of_one_storage_do_not_fill_the_memory(tmp_path):
    storage = Storage(np.zeros(2**20, "f4"))
    saved = {f"t{i}": Tensor(storage, 0, (2**20,), (1,)) for i in range(20)}
    with pytest.raises(ValueError, match="bytes of tensors") as error:
        read(tmp_path, torch_bytes(saved))
    assert is_one_sentence(error)


@pytest.mark.parametrize("name", ["teacher.pt", "teacher.npz"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs_are_not_inflated(tmp_path, name, method):
    zeros = np.zeros(2**23, "f4")
    if name == "teacher.pt":
        stored = zipfile.ZipFile(io.BytesIO(torch_bytes({"fc.bias": tensor(zeros)})))
    else:
        stored = zipfile.ZipFile(io.BytesIO(npz_bytes({"fc.bias": zeros})))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for entry in stored.namelist():
            archive.writestr(entry, stored.read(entry))
    with pytest.raises(ValueError, match="inflate") as error:
        read(tmp_path, stream.getvalue(), name)
    assert is_one_sentence(error)


def test_a_single_entry_that_inflates_too_far_is_refused(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        noise = np.random.default_rng(0).bytes(2**20)
        archive.writestr("noise.npy", noise)
        zeros = npz_bytes({"a": np.zeros(2**20, "f4")})
        zeros = zipfile.ZipFile(io.BytesIO(zeros)).read("a.npy")
        archive.writestr("zeros.npy", zeros, zipfile.ZIP_DEFLATED)
    content = stream.getvalue()
    archive = teacher_import._open_zip(content)
    with pytest.raises(archives.InflationError, match=r"zeros\.npy that inflates"):
        teacher_import._read_entry(archive, "zeros.npy")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-3], "data_offsets": [12, 0]},
        {"dtype": "F32", "shape": [2**62, 4, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [3.0], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0]},
        {"dtype": "F8_E4M3", "shape": [12], "data_offsets": [0, 12]},
        {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]},
        {"shape": [3], "data_offsets": [0, 12]},
        [1, 2],
        None,
    ],
)
def test_inconsistent_safetensors_headers_are_refused(tmp_path, entry):
    text = json.dumps({"fc.bias": entry}).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(12)
    with pytest.raises(ValueError, match=r"teacher\.safetensors") as error:
        read(tmp_path, content, "teacher.safetensors")
    assert is_one_sentence(error)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"[]", b"\xff\xfe", b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_hostile_safetensors_headers_are_refused(tmp_path, text):
    content = struct.pack("<Q", len(text)) + text
    with pytest.raises(ValueError, match=r"teacher\.safetensors") as error:
        read(tmp_path, content, "teacher.safetensors")
    assert is_one_sentence(error)


def test_safetensors_that_share_bytes_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(12)
    with pytest.raises(ValueError, match=r"teacher\.safetensors is truncated or corrupt"):
        read(tmp_path, content, "teacher.safetensors")


def test_npz_headers_that_claim_more_than_there_is_take_no_memory(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)}
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("fc.bias.npy", stream.getvalue())
    with pytest.raises(ValueError, match="0 bytes for") as error:
        read(tmp_path, archive.getvalue(), "teacher.npz")
    assert is_one_sentence(error)


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path, name):
    content = WRITERS[name]({"fc.weight": np.ones((2, 3), "f4"), "fc.bias": np.ones(2, "f4")})
    rng = np.random.default_rng(0)
    damaged = [content[:end] for end in np.linspace(0, len(content) - 1, 60).astype(int)]
    for position in rng.integers(len(content), size=200):
        flipped = bytearray(content)
        flipped[position] ^= rng.integers(1, 256)
        damaged.append(bytes(flipped))
    refused = 0
    for case in damaged:
        try:
            assert isinstance(read(tmp_path, case, name), dict)
        except ValueError as error:
            assert name in str(error)
            assert is_one_sentence(error)
            refused += 1
    assert refused > 60


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files_are_refused(tmp_path, name):
    content = WRITERS[name]({"fc.weight": np.ones((2, 3), "f4")})
    for end in range(0, len(content), 7):
        with pytest.raises(ValueError, match=name):
            read(tmp_path, content[:end], name)


# From tensors to networks

SPECS = {
    "projection": SPEC,
    "pad": dataclasses.replace(SPEC, shortcut="pad"),
    "deep": cifar_resnet(20, num_classes=10, stage_widths=(2, 3, 4)),
    "gray": dataclasses.replace(SPEC, channels=1),
    "pruned": ResNetSpec((4, 6, 8), (3, 5, 2, 7, 1, 9), num_classes=3),
    "morphed": ResNetSpec((4, 6, 8), (3, 0, 5, 2, 0, 7, 1, 9, 0), num_classes=3),
    "skipped": ResNetSpec((4, 6, 8), (0, 3, 5, 0, 7, 1), num_classes=3, shortcut="pad"),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_spec_of_a_network_is_inferred_from_its_tensors(name):
    spec = SPECS[name]
    tensors = teacher_tensors(spec)
    assert teacher_import.infer_spec(tensors, image_size=spec.image_size) == spec


@pytest.mark.parametrize("shortcut", ["downsample", "shortcut"])
@pytest.mark.parametrize("head", ["fc", "linear", "classifier"])
def test_the_names_of_other_repositories_give_the_same_network(shortcut, head):
    usual = teacher_import.to_variables(SPEC, teacher_tensors(SPEC))
    tensors = teacher_tensors(SPEC, shortcut=shortcut, head=head)
    assert teacher_import.infer_spec(tensors, image_size=8) == SPEC
    jax.tree.map(np.testing.assert_array_equal, teacher_import.to_variables(SPEC, tensors), usual)


@pytest.mark.parametrize("name", SPECS)
def test_variables_have_the_tree_of_the_linen_network(name):
    spec = SPECS[name]
    images = jnp.zeros((1, spec.image_size, spec.image_size, spec.channels))
    wanted = jax.eval_shape(resnet.ResNet(spec).init, jax.random.key(0), images)
    got = teacher_import.to_variables(spec, teacher_tensors(spec))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), got)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), wanted)


def test_every_tensor_lands_where_it_belongs():
    tensors = teacher_tensors(SPEC)
    variables = teacher_import.to_variables(SPEC, tensors)
    params, stats = variables["params"], variables["batch_stats"]
    kernel, weight = params["stage2_block0"]["conv1"]["kernel"], tensors["layer2.0.conv1.weight"]
    assert kernel[0, 2, 3, 5] == weight[5, 3, 0, 2]
    kernel = params["stage3_block0"]["shortcut"]["kernel"]
    assert kernel[0, 0, 3, 5] == tensors["layer3.0.downsample.0.weight"][5, 3, 0, 0]
    norm = params["stage3_block0"]["shortcut_bn"]
    np.testing.assert_array_equal(norm["scale"], tensors["layer3.0.downsample.1.weight"])
    np.testing.assert_array_equal(norm["bias"], tensors["layer3.0.downsample.1.bias"])
    moments = stats["stage1_block0"]["bn2"]
    np.testing.assert_array_equal(moments["mean"], tensors["layer1.0.bn2.running_mean"])
    np.testing.assert_array_equal(moments["var"], tensors["layer1.0.bn2.running_var"])
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["fc.weight"].T)
    np.testing.assert_array_equal(params["head"]["bias"], tensors["fc.bias"])


def test_infer_spec_refuses_other_networks():
    tensors = teacher_tensors(SPEC)
    for extra in ("layer4.0.conv1.weight", "layer1.0.conv3.weight", "layer1.99999.conv1.weight"):
        with pytest.raises(ValueError, match=extra) as error:
            teacher_import.infer_spec(tensors | {extra: np.ones((1, 1, 3, 3))})
        assert is_one_sentence(error)
    for gone in ("conv1", "fc", "layer1.0.conv1", "layer3.0.conv1", "layer3.0.conv2"):
        remaining = {name: t for name, t in tensors.items() if name != f"{gone}.weight"}
        with pytest.raises(ValueError, match=f"{gone}.weight of . dimensions.*none") as error:
            teacher_import.infer_spec(remaining)
        assert is_one_sentence(error)
    with pytest.raises(ValueError, match=r"conv1\.weight of 4 dim.*shape \(4,\)"):
        teacher_import.infer_spec(tensors | {"conv1.weight": np.ones(4)})


def _without(name):
    return lambda tensors: tensors.pop(name)


def _set(name, value):
    return lambda tensors: tensors.update({name: value})


def _fill(name, value):
    return lambda tensors: tensors[name].flat.__setitem__(1, value)


@pytest.mark.parametrize(
    "damage, match",
    [
        (_without("layer2.0.bn1.running_var"), r"layer2\.0\.bn1\.running_var of shape \(6,\), but"),
        (
            _without("layer3.0.downsample.0.weight"),
            r"layer3\.0\.downsample\.0\.weight .*\(8, 6, 1, 1\)",
        ),
        (
            _set("conv1.weight", np.ones((4, 3, 5, 5))),
            r"conv1\.weight .*\(4, 3, 3, 3\).*\(4, 3, 5, 5\)",
        ),
        (_set("fc.bias", np.ones(6)), r"fc\.bias .*\(5,\).*\(6,\)"),
        (_set("conv1.bias", np.ones(4)), r"no place for the tensors conv1\.bias"),
        (_set("linear.weight", np.ones((5, 8))), r"no place for the tensors linear\.weight"),
        (_fill("layer1.0.conv2.weight", np.nan), r"layer1\.0\.conv2\.weight needs finite.*1 other"),
        (_fill("bn1.weight", -np.inf), r"bn1\.weight needs finite"),
        (_set("fc.bias", np.full(5, 1e300)), r"fc\.bias needs finite.*5 others"),
        (
            _fill("bn1.running_var", -0.5),
            r"bn1\.running_var needs variances of at least 0, got -0\.5",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(damage, match):
    tensors = teacher_tensors(SPEC)
    damage(tensors)
    with pytest.raises(ValueError, match=match) as error:
        teacher_import.to_variables(SPEC, tensors)
    assert is_one_sentence(error)


def test_many_missing_or_superfluous_tensors_are_counted():
    tensors = teacher_tensors(SPEC)
    deeper = cifar_resnet(14, num_classes=5, stage_widths=SPEC.stage_widths)
    with pytest.raises(ValueError, match=r"layer1\.1\.conv1\.weight .* and 29 more"):
        teacher_import.to_variables(deeper, tensors)
    with pytest.raises(ValueError, match="no place for the tensors .* and 27 more"):
        teacher_import.to_variables(SPEC, teacher_tensors(deeper))


@pytest.mark.parametrize("name", WRITERS)
def test_a_teacher_loads_from_every_format(tmp_path, name):
    tensors = teacher_tensors(SPEC)
    (tmp_path / name).write_bytes(WRITERS[name](tensors))
    spec, variables = teacher_import.load_teacher(tmp_path / name, spec=SPEC)
    assert spec == SPEC
    wanted = teacher_import.to_variables(SPEC, tensors)
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"num_classes": 10}, "num_classes 5 in the file, 10 in the config"),
        ({"hidden_widths": (4,) * 6}, "ResNet8 with 5 classes; the config asks for a ResNet14"),
        (
            {"hidden_widths": (4, 5, 8)},
            "hidden width of stage2_block0 6 in the file, 5 in the config",
        ),
        ({"shortcut": "pad"}, "shortcut projection in the file, pad in the config"),
    ],
)
def test_a_teacher_of_another_network_shows_both(tmp_path, change, match):
    path = tmp_path / "teacher.npz"
    path.write_bytes(npz_bytes(teacher_tensors(SPEC)))
    with pytest.raises(ValueError, match=match) as error:
        teacher_import.load_teacher(str(path), spec=dataclasses.replace(SPEC, **change))
    assert is_one_sentence(error)


def test_a_teacher_that_does_not_fit_is_refused_with_its_path(tmp_path):
    path = tmp_path / "teacher.npz"
    path.write_bytes(npz_bytes(teacher_tensors(SPEC) | {"conv1.bias": np.ones(4)}))
    with pytest.raises(ValueError, match=r"teacher\.npz .*conv1\.bias") as error:
        teacher_import.load_teacher(path)
    assert is_one_sentence(error)


# The real teachers


@pytest.fixture(scope="session")
def shared():
    default = pathlib.Path(__file__).resolve().parents[1] / ".." / "shared"
    folder = pathlib.Path(os.environ.get("NEUMETA_SHARED", default))
    if not (folder / "weights").is_dir():
        pytest.skip(f"needs the teachers in {folder}; set NEUMETA_SHARED to their folder")
    return folder


@pytest.fixture(scope="session")
def cifar_images(shared):
    """The first 32 test images of CIFAR-100, normalised as the teachers expect."""
    path = shared / "data" / "imgpack.py"
    if not path.is_file():
        pytest.skip(f"needs the images that {path} unpacks")
    module_spec = importlib.util.spec_from_file_location("imgpack", path)
    imgpack = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(imgpack)
    images = imgpack.load_chunk("cifar100", "test", 0)[:32]
    mean, std = (0.507, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)
    return ((images / 255 - mean) / std).astype(np.float32)


TEACHERS = {"cifar100_resnet20": ".npz", "cifar100_resnet56": "-f2eff4c8.pt"}


@pytest.mark.parametrize(
    "name, depth, num_params",
    [
        ("cifar100_resnet20", 20, 277_540),
        ("cifar100_resnet56", 56, 859_492),
    ],
)
def test_the_real_teachers_are_recognised(shared, name, depth, num_params):
    path = shared / "weights" / (name + TEACHERS[name])
    spec, variables = teacher_import.load_teacher(path)
    assert spec == cifar_resnet(depth, num_classes=100)
    assert spec.num_params == num_params
    folded = resnet.fold_batch_norm(variables)
    assert sum(leaf.size for leaf in jax.tree.leaves(folded)) == num_params


@pytest.mark.parametrize("name", TEACHERS)
def test_the_real_teachers_give_the_logits_of_pytorch(shared, cifar_images, name):
    spec, variables = teacher_import.load_teacher(shared / "weights" / (name + TEACHERS[name]))
    with np.load(shared / "weights" / "reference_logits.npz") as file:
        wanted = file[name][:32]
    logits = jax.jit(resnet.ResNet(spec).apply)(variables, cifar_images)
    np.testing.assert_allclose(logits, wanted, atol=1e-3)
    folded = resnet.fold_batch_norm(variables)
    logits = jax.jit(resnet.apply, static_argnums=0)(spec, folded, cifar_images)
    np.testing.assert_allclose(logits, wanted, atol=1e-3)
