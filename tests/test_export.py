"""Exported files: that they compute what the network does, and what is refused."""

import importlib.util
import io
import json
import pathlib
import pickletools
import shutil
import zipfile

import chex
import jax
import jax.export
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
from builders import refused
from networks import (
    assert_refuses,
    assert_same_logits,
    both_shortcuts,
    dense_network,
    load_module,
    no_litert,
    run,
    sample,
    write_workdir,
)

from neumeta_jax.commands import export
from neumeta_jax.core.inr import Grid
from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation import morphs
from neumeta_jax.export import (
    formats,
    onnx as onnx_format,
    safetensors as saved,
    stablehlo,
    torch_state,
)
from neumeta_jax.files import trees
from neumeta_jax.files.storage import StorageError
from neumeta_jax.networks import cifar_import, cifar_resnet
from neumeta_jax.networks.cifar_spec import ResNetSpec, morph, resnet_spec
from neumeta_jax.networks.saved import load_inr

each_format = pytest.mark.parametrize(
    "format", [*formats.FORMATS][:-1] + [pytest.param("litert", marks=no_litert)]
)
NETWORK, PIXELS, _, _ = sample("projection")
STATE = cifar_import.to_tensors(NETWORK.spec, NETWORK.params)


def write(path, format, *, images=PIXELS, **options):
    return formats.export(path, NETWORK, images, format=format, **options)


# --- safetensors -----------------------------------------------------------------------------


@both_shortcuts
def test_a_safetensors_file_holds_all_that_it_takes_to_run_the_network(tmp_path, name):
    network, pixels, _, logits = sample(name)
    network = network._replace(info={"dataset": "noise"})
    saved.save(tmp_path / "net.safetensors", network)
    found = saved.load(tmp_path / "net.safetensors")
    assert found._replace(params=None) == network._replace(params=None)
    chex.assert_trees_all_equal(found.params, network.params, strict=True)
    assert_same_logits(found.logits(pixels), logits)


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


TREE, HEADER = dict(NETWORK.params), NETWORK.metadata
HALF = jax.tree.map(lambda x: x.astype(np.float16), TREE)
TEXT_WIDTHS = HEADER["network"] | {"stage_widths": "abc"}


@pytest.mark.parametrize(
    "tree, header, match",
    [
        (TREE | {"stem": without(TREE["stem"], "bias")}, HEADER, "stem/bias has the shape None"),
        (TREE | {"more": np.ones(2, np.float32)}, HEADER, "more has the shape"),
        (jax.tree.map(lambda x: x[..., :1], TREE), HEADER, "is needed"),
        (HALF, HEADER, "float32 tensors"),
        (TREE, HEADER | {"mean": [0.5]}, "mean and a std for each of 3 channels"),
        (TREE, without(HEADER, "std"), "lacks ..std.."),
        (TREE, HEADER | {"network": {"depth": 20}}, "A ResNetSpec has the fields"),
        (TREE, HEADER | {"network": TEXT_WIDTHS}, "holds no usable network"),
    ],
)
def test_a_safetensors_file_that_does_not_fit_its_spec_is_refused(tmp_path, tree, header, match):
    path = tmp_path / "net.safetensors"
    with refused("net.safetensors", error=FileNotFoundError):
        saved.load(path)
    trees.save_tree(path, tree, header)
    with refused(match, path):
        saved.load(path)


# --- PyTorch ---------------------------------------------------------------------------------


@both_shortcuts
def test_a_state_dict_reads_back_to_the_same_bits(tmp_path, name):
    (spec, params, *_), path = sample(name).network, tmp_path / "net.pt"
    path.write_bytes(torch_state.to_torch(cifar_import.to_tensors(spec, params)))
    found, variables = cifar_import.load_teacher(path, image_size=spec.image_size)
    assert found == spec
    chex.assert_trees_all_equal(cifar_resnet.fold_batch_norm(variables), params, strict=True)


def test_a_state_dict_has_the_names_and_order_of_the_stock_network():
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(STATE)[:6] == ["conv1.weight", *(f"bn1.{leaf}" for leaf in norm)]
    assert list(STATE)[-2:] == ["fc.weight", "fc.bias"]
    for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("downsample.0", "downsample.1")):
        names = [f"layer2.0.{conv}.weight", *(f"layer2.0.{bn}.{leaf}" for leaf in norm)]
        parts = tuple(f"layer2.0.{part}." for part in (conv, bn))
        assert [name for name in STATE if name.startswith(parts)] == names
    assert not any(name.startswith("layer1.1.") for name in STATE)  # the skipped block
    assert STATE["layer1.0.conv1.weight"].shape == (3, 4, 3, 3)
    assert STATE["fc.weight"].shape == (5, 8)
    assert STATE["bn1.num_batches_tracked"].shape == ()
    assert STATE["bn1.num_batches_tracked"].dtype == np.int64
    # Batch norm divides by exactly one in float32.
    variance = STATE["bn1.running_var"]
    assert variance.dtype == np.float32
    assert np.all(np.sqrt(variance + np.float32(1e-5)) == np.float32(1))
    assert np.all(STATE["bn1.weight"] == 1) and np.all(STATE["bn1.running_mean"] == 0)


def test_a_pytorch_file_has_the_records_that_torch_save_writes_and_a_simple_pickle():
    content = torch_state.to_torch(STATE)
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = [entry.filename for entry in archive.infolist()]
    assert names[0] == "archive/data.pkl"
    records = [f"archive/data/{key}" for key in range(len(STATE))]
    assert set(names[1:]) == {"archive/byteorder", "archive/version", *records}
    assert archive.read("archive/byteorder") == b"little"
    assert archive.read("archive/version") == b"3\n"
    assert archive.testzip() is None
    for record, array in zip(records, STATE.values(), strict=True):
        entry = archive.getinfo(record)
        assert entry.compress_type == zipfile.ZIP_STORED and entry.flag_bits == 0
        name_size, extra_size = np.frombuffer(content, "<u2", 2, entry.header_offset + 26)
        start = entry.header_offset + 30 + int(name_size) + int(extra_size)
        assert start % 64 == 0
        assert archive.read(entry) == content[start : start + array.nbytes] == array.tobytes()
    assert torch_state.to_torch(STATE) == content
    pickled = archive.read("archive/data.pkl")
    opcodes = list(pickletools.genops(pickled))
    pickletools.dis(pickled, io.StringIO())  # which checks the stack
    # All of them are known to PyTorch's weights_only reader.
    assert {opcode.name for opcode, _, _ in opcodes} <= {
        *("PROTO", "GLOBAL", "EMPTY_TUPLE", "REDUCE", "MARK", "BINUNICODE", "BININT", "TUPLE"),
        *("BINPERSID", "NEWFALSE", "SETITEMS", "STOP"),
    }
    assert {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"} == {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "torch LongStorage",
    }
    with refused("weights must be float32 or int64, got float64"):
        torch_state.to_torch({"weights": np.zeros(3)})


@both_shortcuts
@pytest.mark.parametrize("mmap", [False, True])
def test_pytorch_loads_the_file_strictly_and_computes_the_same(tmp_path, name, mmap):
    torch = pytest.importorskip("torch")
    torch_resnet = load_module("examples/torch_resnet.py")
    network, _, images, wanted = sample(name)
    tensors, path = cifar_import.to_tensors(network.spec, network.params), tmp_path / "net.pt"
    path.write_bytes(torch_state.to_torch(tensors))
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    for key, array in tensors.items():
        np.testing.assert_array_equal(loaded[key].numpy(), array)
    with torch.no_grad():
        logits = torch_resnet.load(path)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert_same_logits(logits.numpy(), wanted)


# --- graphs ----------------------------------------------------------------------------------


def run_onnx(model, images):
    content, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(content, providers=providers)
    return session.run(["logits"], {"images": images.transpose(0, 3, 1, 2).copy()})[0]


@pytest.mark.parametrize(
    "name, normalize", [("projection", False), ("projection", True), ("pad", False)]
)
def test_graphs_compute_the_network_for_batches_of_any_size(name, normalize):
    network, pixels, images, wanted = sample(name)
    network = network._replace(info={"dataset": "noise"})
    images = pixels if normalize else images
    model = onnx_format.to_onnx(network, normalize=normalize)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [onnx_format.OPSET]
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert ResNetSpec.from_dict(metadata["network"]) == network.spec
    mean, std = map(list, network.normalization)
    assert without(metadata, "network") == {"mean": mean, "std": std, "dataset": "noise"}
    content = stablehlo.to_stablehlo(network, normalize=normalize)
    exported = jax.export.deserialize(bytearray(content))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    for size in (1, 5):
        assert_same_logits(run_onnx(model, images[:size]), wanted[:size])
        assert_same_logits(exported.call(images[:size]), wanted[:size])


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def older(tmp_path):
    """A file that is there already; no suffix is needed."""
    path = tmp_path / "net"
    path.write_text("older")
    return path


def assert_alone_and_as_before(path):
    assert list(path.parent.iterdir()) == [path] and path.read_text() == "older"


@each_format
def test_an_export_writes_a_file_that_computes_the_same(older, format):
    mode, found = older.stat().st_mode, write(older, format)
    assert found.error < 1e-5 and found.agreement == 1 and found.num_images == 12
    assert list(older.parent.iterdir()) == [older] and older.stat().st_mode == mode


@each_format
def test_a_file_that_computes_something_else_does_not_take_its_name(older, format, monkeypatch):
    module = formats.FORMATS[format].module

    def wrong(path, network, right=module.write):
        params = jax.tree.map(np.array, network.params)
        params["stem"]["kernel"][0, 0, 0, 1] += 0.01
        right(path, network._replace(params=params))

    monkeypatch.setattr(module, "write", wrong)
    with refused("was not written", older, error=formats.EquivalenceError):
        write(older, format)
    assert_alone_and_as_before(older)


def test_a_network_that_is_not_finite_is_not_exported(tmp_path):
    head = {**NETWORK.params["head"], "bias": np.full(5, np.nan, np.float32)}
    network = NETWORK._replace(params={**NETWORK.params, "head": head})
    with pytest.raises(formats.EquivalenceError):
        formats.export(tmp_path / "net", network, PIXELS, format="onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_a_write_that_fails_leaves_the_old_file(older, monkeypatch, format):
    def disk_full(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    def disk_full_too(tensors, filename, metadata=None):
        filename.touch()
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(pathlib.Path, "write_bytes", disk_full)
    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full_too)
    with refused("No space left on device", error=StorageError):
        write(older, format)
    assert_alone_and_as_before(older)


def test_an_export_that_cannot_be_is_refused(tmp_path):
    with refused("must be one of safetensors, torch, onnx, stablehlo, litert"):
        write(tmp_path / "net", "coreml")
    with refused("at least one image"):
        write(tmp_path / "net", "onnx", images=PIXELS[:0])
    assert not list(tmp_path.iterdir())


def test_the_error_is_relative_to_the_largest_logit_of_each_image():
    result = formats.compare(np.array([[1.1, 10], [0.1, 0.12]]), np.array([[1, 10], [0.2, -0.1]]))
    assert result.error == pytest.approx(1.1) and result.agreement == 0.5
    wanted = "largest relative logit error 1.1e+00, top-1 agreement 50.00 % on 2 images"
    assert str(result) == wanted


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_workdir(tmp_path_factory.mktemp("export") / "run", depth=14)


@pytest.mark.parametrize(
    "options",
    [
        ("--format=safetensors", "--width=0.5"),
        ("--format=torch", "--widths=3,0"),
        ("--format=onnx", "--widths=6,1", "--normalize"),
        ("--format=stablehlo", "--width=1", "--num_samples=2"),
        pytest.param(("--format=litert", "--width=0.5", "--normalize"), marks=no_litert),
    ],
    ids=lambda options: options[0].split("=")[1],
)
def test_the_command_ends_with_an_equivalence_line(workdir, tmp_path, options):
    out = run(export, f"--workdir={workdir}", f"--out={tmp_path / 'net'}", *options)
    last = out.splitlines()[-1]
    assert last.startswith("equivalence: largest relative logit error ")
    assert last.endswith("top-1 agreement 100.00 % on 144 images of the validation split of digits")
    assert ("outside what was trained" in out) == (options[1] in ("--widths=3,0", "--widths=6,1"))
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_without_its_data_set_a_network_is_compared_on_random_images(workdir, tmp_path):
    there = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"data": config["data"] | {"dir": "x"}}))
    args = (f"--workdir={there}", "--width=1", "--num_images=7", "--format=safetensors")
    out = run(export, *args, f"--out={tmp_path / 'net'}")
    assert "on 7 images at random, as digits is not here; --data_dir=DIR says where" in out
    assert saved.load(tmp_path / "net").normalization == ((0.3055,), (0.376,))
    assert_refuses("does not exist", export, *args, f"--out={tmp_path / 'net'}", "--data_dir=y")
    (there / "config.json").write_text(
        json.dumps(config | {"data": config["data"] | {"name": "mine", "dir": "x"}})
    )
    assert_refuses("mean of mine is not known", export, *args, f"--out={tmp_path / 'net'}")


def test_the_command_writes_the_network_that_the_library_generates(workdir, tmp_path):
    family, params, _ = load_inr(workdir)
    widths = (3, 5)
    best, path = tmp_path / "best.json", tmp_path / "net.safetensors"
    best.write_text(json.dumps({**morphs.morph_to_dict(family, widths), "accuracy": 0.5}))
    args = (f"--workdir={workdir}", f"--spec={best}", f"--out={path}", "--format=safetensors")
    run(export, *args, "--num_images=10")
    spec, tree, normalization, info = saved.load(path)
    assert spec == morph(family.spec, family.blocks, widths)
    wanted = jax.jit(lambda params: dense_network(family, params, widths)[1])(params)
    wanted = {name: wanted[name] for name in tree}
    chex.assert_trees_all_close(tree, wanted, rtol=1e-4, atol=1e-6)
    assert info["dataset"] == "digits" and info["morph"]["widths"] == list(widths)
    assert normalization == ((0.3055,), (0.376,))


@pytest.fixture
def nothing_runs(monkeypatch):
    """What refuses does so before anything is loaded or traced."""

    def refuse(*args, **options):
        raise AssertionError("reached the data or the network")

    monkeypatch.setattr("neumeta_jax.runs.config.load_data", refuse)
    monkeypatch.setattr(export, "draw", refuse)


@pytest.mark.parametrize(
    "change, shown",
    [
        ({"workdir": None}, "An export needs --workdir"),
        ({"workdir": "nowhere"}, "nowhere must be the work directory of a training run"),
        ({"format": None}, "An export needs --format"),
        ({"format": "coreml"}, "<safetensors|torch|onnx|stablehlo|litert>"),
        ({"out": None}, "An export needs --out"),
        ({"out": "/dev/null"}, "/dev/null is something else"),
        ({"out": "b.pt"}, "A file of --format=onnx ends in .onnx, got b.pt"),
        (
            {"out": "missing/net.onnx"},
            "net.onnx could not be written (No such file or directory); make its",
        ),
        ({"width": None}, "one of --width, --widths and --spec, got none of them"),
        ({"widths": "3,4"}, "got --width and --widths"),
        ({"width": 2}, "A width ratio must lie in (0, 1.5], got 2"),
        ({"width": None, "widths": "3,x"}, "integers with commas between, got '3,x'"),
        ({"width": None, "widths": "3"}, "each of the 2 elastic groups, got 1"),
        ({"width": None, "widths": "3,10"}, "stage2_block1/conv1 takes widths from 0 to 9, got 10"),
        ({"width": None, "widths": "-1,3"}, "stage1_block1/conv1 takes widths from 0 to 6, got -1"),
        ({"width": None, "spec": "gone.json"}, "--spec=gone.json must be a file"),
        ({"num_images": 0}, "--num_images must be at least 1"),
        ({"num_samples": 0}, "--num_samples must be at least 1"),
        ({"tolerance": "nan"}, "--tolerance must be above 0"),
        ({"format": "torch", "normalize": "true"}, "--normalize is for onnx, stablehlo, litert"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_sentence(workdir, tmp_path, nothing_runs, change, shown):
    options = {"workdir": workdir, "width": 0.5, "format": "onnx", "out": tmp_path / "net"}
    options |= change
    args = [f"--{name}={value}" for name, value in options.items() if value is not None]
    assert_refuses(shown, export, *args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "stablehlo", "litert"])
def test_a_missing_extra_is_named(workdir, tmp_path, nothing_runs, monkeypatch, format):
    args = (f"--workdir={workdir}", f"--format={format}", f"--out={tmp_path / 'net'}")
    for package in formats.FORMATS[format].packages:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, gone=package: name != gone)
        words = f"{format} files need {package.replace('_', '-')}; install them"
        assert_refuses(words, export, *args, "--width=1")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda f: "{", "must be JSON"),
        (lambda f: "[1, 2]", 'must hold one network as {"widths"'),
        (lambda f: without(f, "widths"), "has no widths"),
        (lambda f: f | {"blocks": [0, 1]}, r"blocks \[0, 1\] there, \[1, 3\] here"),
        (lambda f: f | {"spec": f["spec"] | {"num_classes": 100}}, "classes 100 there, 10 here"),
        (lambda f: f | {"spec": None}, "spec None there"),
        (lambda f: f | {"widths": [1.0, 2]}, "list of integers"),
        (lambda f: f | {"widths": [1, 2, 3]}, "2 elastic groups, got 3"),
        (lambda f: f | {"widths": [1, 99]}, "from 0 to 9, got 99"),
    ],
)
def test_a_spec_of_another_architecture_or_a_damaged_one_is_refused(
    workdir, tmp_path, change, match
):
    family = load_inr(workdir)[0]
    changed = change(morphs.morph_to_dict(family, (3, 4)))
    path = tmp_path / "best.json"
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with refused(match, error=UsageError):
        morphs.load_morph(path, family)
    path.write_text('{"widths": [3, 4]}')  # as somebody writes it by hand
    assert morphs.load_morph(path, family) == (3, 4)


def test_a_block_that_changes_the_shape_of_the_stream_cannot_be_skipped():
    spec = resnet_spec(8, num_classes=3, stage_widths=(2, 2, 2))
    family = cifar_resnet.hypernetwork(spec, (0, 1, 2), Grid())
    assert morphs.check_widths(family, (0, 1, 1)) == (0, 1, 1)
    with refused("stage2_block0/conv1 takes widths from 1 to 3, got 0"):
        morphs.check_widths(family, (0, 0, 1))
