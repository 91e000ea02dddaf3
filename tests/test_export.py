"""Exported files: that they compute what the network does, and what is refused."""

import contextlib
import functools
import importlib.util
import io
import json
import pathlib
import pickletools
import sys
import zipfile

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy

from neumeta_jax import (
    checkpoint,
    command_line,
    data,
    experiment as lab,
    export,
    hypernetwork as hyper,
    litert,
    morphs,
    resnet,
    teacher_import,
)
from neumeta_jax.architecture import ResNetSpec, cifar_resnet, morph
from neumeta_jax.export import Normalization
from neumeta_jax.inr import Grid

ROOT = pathlib.Path(__file__).resolve().parent.parent
NETWORKS = {
    "projection": ResNetSpec((4, 6, 8), (3, 0, 6, 5, 2, 7), num_classes=5, image_size=8),
    # Odd sizes and odd numbers of added channels, where sides could be mixed up.
    "pad": ResNetSpec((3, 4, 7), (2, 3, 4), 4, image_size=9, channels=2, shortcut="pad"),
}
both_shortcuts = pytest.mark.parametrize("name", NETWORKS)
no_litert = pytest.mark.skipif(
    not importlib.util.find_spec("ai_edge_litert"), reason="ai-edge-litert is not installed"
)
written_formats = pytest.mark.parametrize(
    "format", [*export.FORMATS[:-1], pytest.param("litert", marks=no_litert)]
)


def network(name):
    """(spec, folded tree, normalisation, uint8 images) of a small network at random."""
    spec, rng = NETWORKS[name], np.random.default_rng(0)

    def leaf(shape):
        fan_in = np.prod(shape[:-1])
        return (rng.normal(size=shape) * (2 / fan_in) ** 0.5).astype(np.float32)

    params = jax.tree.map(leaf, resnet.param_shapes(spec), is_leaf=lambda x: isinstance(x, tuple))
    mean = tuple(rng.uniform(0.3, 0.6, spec.channels).round(3).tolist())
    std = tuple(rng.uniform(0.2, 0.4, spec.channels).round(3).tolist())
    shape = (5, spec.image_size, spec.image_size, spec.channels)
    return spec, params, Normalization(mean, std), rng.integers(0, 256, shape).astype(np.uint8)


def reference(name):
    """(normalised images, the network's logits) as NumPy arrays."""
    spec, params, normalization, images = network(name)
    normalised = data.normalize(jnp.asarray(images), *normalization)
    return np.asarray(normalised), np.asarray(compiled(spec)(params, normalised))


@functools.cache
def compiled(spec):
    """Op by op it would compile every operation alone."""
    return jax.jit(lambda params, images: resnet.apply(spec, params, images))


def assert_equal(got, wanted):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_equal(got, wanted)


def assert_close(found, wanted):
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert export.compare(found, wanted).error < 1e-5


def is_one_sentence(error):
    message = str(error.value)
    return "\n" not in message and message.endswith(".") and ". " not in message


# --- safetensors -----------------------------------------------------------------------------


@both_shortcuts
def test_a_safetensors_file_holds_all_that_it_takes_to_run_the_network(tmp_path, name):
    spec, params, normalization, images = network(name)
    path = tmp_path / "net.safetensors"
    export.save_safetensors(path, spec, params, normalization=normalization, dataset="noise")
    found_spec, found, info = export.load_safetensors(path)
    assert found_spec == spec
    assert_equal(found, params)
    assert info["dataset"] == "noise"
    normalised = data.normalize(jnp.asarray(images), info["mean"], info["std"])
    assert_close(np.asarray(compiled(found_spec)(found, normalised)), reference(name)[1])


def without(tree, *path):
    copy = dict(tree)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(copy[path[0]], *path[1:])
    return copy


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda p, i: (without(p, "stem", "bias"), i), "stem/bias has the shape None"),
        (lambda p, i: ({**p, "more": np.ones(2, np.float32)}, i), "more has the shape"),
        (lambda p, i: (jax.tree.map(lambda x: x[..., :1], p), i), "is needed"),
        (lambda p, i: (jax.tree.map(lambda x: x.astype(np.float16), p), i), "float32 tensors"),
        (lambda p, i: (p, {**i, "mean": [0.5]}), "mean and a std for each of 3 channels"),
        (lambda p, i: (p, without(i, "std")), "lacks ['std']"),
        (lambda p, i: (p, {**i, "network": {"depth": 20}}), "A ResNetSpec has the fields"),
        (
            lambda p, i: (p, {**i, "network": {**i["network"], "stage_widths": "abc"}}),
            "holds no usable network",
        ),
    ],
)
def test_a_safetensors_file_that_does_not_fit_its_spec_is_refused(tmp_path, damage, match):
    spec, params, normalization, _ = network("projection")
    header = {"network": spec.to_dict(), **normalization._asdict()}
    path = tmp_path / "net.safetensors"
    checkpoint.save_tree(path, *damage(params, header))
    with pytest.raises(ValueError) as error:
        export.load_safetensors(path)
    assert match in str(error.value) and str(path) in str(error.value)


def test_a_safetensors_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.safetensors") as error:
        export.load_safetensors(tmp_path / "gone.safetensors")
    assert is_one_sentence(error)


# --- PyTorch ---------------------------------------------------------------------------------


@both_shortcuts
def test_a_state_dict_reads_back_to_the_same_bits(tmp_path, name):
    spec, params, _, _ = network(name)
    path = tmp_path / "net.pt"
    path.write_bytes(export.to_torch(export.to_state_dict(spec, params)))
    tensors = teacher_import.read_tensors(path)
    assert teacher_import.infer_spec(tensors, image_size=spec.image_size) == spec
    assert_equal(resnet.fold_batch_norm(teacher_import.to_variables(spec, tensors)), params)


def test_the_exported_batch_norm_divides_by_exactly_one_in_float32():
    state = export.to_state_dict(*network("projection")[:2])
    variance = state["bn1.running_var"]
    assert variance.dtype == np.float32
    assert np.all(np.sqrt(variance + np.float32(1e-5)) == np.float32(1))
    assert np.all(state["bn1.weight"] == 1) and np.all(state["bn1.running_mean"] == 0)


def test_a_state_dict_has_the_names_and_order_of_the_stock_network():
    state = export.to_state_dict(*network("projection")[:2])
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{leaf}" for leaf in norm)]
    assert list(state)[:6] == names
    for conv in (1, 2):
        names = [f"layer2.0.conv{conv}.weight", *(f"layer2.0.bn{conv}.{leaf}" for leaf in norm)]
        assert [name for name in state if name in names] == names
    names = ["layer2.0.downsample.0.weight", *(f"layer2.0.downsample.1.{leaf}" for leaf in norm)]
    assert [name for name in state if "layer2.0.downsample" in name] == names
    assert list(state)[-2:] == ["fc.weight", "fc.bias"]
    assert not any(name.startswith("layer1.1.") for name in state)  # the skipped block
    assert state["layer1.0.conv1.weight"].shape == (3, 4, 3, 3)
    assert state["fc.weight"].shape == (5, 8)
    assert state["bn1.num_batches_tracked"].shape == ()
    assert state["bn1.num_batches_tracked"].dtype == np.int64


def test_a_pytorch_file_has_the_records_that_torch_save_writes():
    state = export.to_state_dict(*network("projection")[:2])
    content = export.to_torch(state)
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = [entry.filename for entry in archive.infolist()]
    assert names[0] == "archive/data.pkl"
    assert set(names[1:]) == {
        "archive/byteorder",
        "archive/version",
        *(f"archive/data/{key}" for key in range(len(state))),
    }
    assert archive.read("archive/byteorder") == b"little"
    assert archive.read("archive/version") == b"3\n"
    assert archive.testzip() is None
    for key, array in enumerate(state.values()):
        entry = archive.getinfo(f"archive/data/{key}")
        assert entry.compress_type == zipfile.ZIP_STORED and entry.flag_bits == 0
        assert archive.read(entry) == array.tobytes()
        name_size, extra_size = np.frombuffer(content, "<u2", 2, entry.header_offset + 26)
        start = entry.header_offset + 30 + int(name_size) + int(extra_size)
        assert start % 64 == 0
        assert content[start : start + array.nbytes] == array.tobytes()
    assert export.to_torch(state) == content


def test_the_pickle_of_a_pytorch_file_uses_few_opcodes_and_names():
    content = export.to_torch(export.to_state_dict(*network("pad")[:2]))
    pickled = zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl")
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


def test_arrays_that_the_pytorch_format_has_no_name_for_are_refused():
    with pytest.raises(ValueError, match="weights must be float32 or int64, got float64"):
        export.to_torch({"weights": np.zeros(3)})


@both_shortcuts
@pytest.mark.parametrize("mmap", [False, True])
def test_pytorch_loads_the_file_strictly_and_computes_the_same(tmp_path, name, mmap):
    torch = pytest.importorskip("torch")
    module_spec = importlib.util.spec_from_file_location(
        "torch_resnet", ROOT / "examples" / "torch_resnet.py"
    )
    torch_resnet = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(torch_resnet)
    spec, params, _, _ = network(name)
    path = tmp_path / "net.pt"
    path.write_bytes(export.to_torch(export.to_state_dict(spec, params)))
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    for key, array in export.to_state_dict(spec, params).items():
        np.testing.assert_array_equal(loaded[key].numpy(), array)
    images, wanted = reference(name)
    with torch.no_grad():
        logits = torch_resnet.load(path)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert_close(logits.numpy(), wanted)


# --- graphs ----------------------------------------------------------------------------------


def run_onnx(model, images):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], {"images": images.transpose(0, 3, 1, 2).copy()})[0]


@both_shortcuts
def test_an_onnx_graph_computes_the_network_for_batches_of_any_size(name):
    spec, params, normalization, _ = network(name)
    model = export.to_onnx(spec, params, mean=normalization.mean, dataset="noise")
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [export.ONNX_OPSET]
    images, wanted = reference(name)
    for size in (1, 5):
        assert_close(run_onnx(model, images[:size]), wanted[:size])
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert ResNetSpec.from_dict(metadata["network"]) == spec
    assert metadata["mean"] == list(normalization.mean) and metadata["dataset"] == "noise"


def test_an_onnx_graph_may_take_pixels():
    spec, params, normalization, images = network("projection")
    model = export.to_onnx(spec, params, normalization=normalization)
    onnx.checker.check_model(model, full_check=True)
    assert_close(run_onnx(model, images), reference("projection")[1])


@pytest.mark.parametrize("name, normalize", [("projection", True), ("pad", False)])
def test_a_stablehlo_artefact_computes_the_network_for_batches_of_any_size(name, normalize):
    spec, params, normalization, pixels = network(name)
    content = export.to_stablehlo(spec, params, normalization=normalization if normalize else None)
    exported = jax.export.deserialize(bytearray(content))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    images, wanted = reference(name)
    images = pixels if normalize else images
    for size in (1, 5):
        assert_close(np.asarray(exported.call(images[:size])), wanted[:size])


# --- files -----------------------------------------------------------------------------------


@written_formats
def test_an_export_writes_a_file_that_computes_the_same(tmp_path, format):
    spec, params, normalization, images = network("projection")
    path = tmp_path / "net"  # no suffix is needed
    path.write_text("older")
    found = export.export(path, spec, params, images, format=format, normalization=normalization)
    assert found.error < 1e-5 and found.agreement == 1 and found.num_images == 5
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@written_formats
def test_a_file_that_computes_something_else_does_not_take_its_name(tmp_path, format, monkeypatch):
    spec, params, normalization, images = network("projection")
    path = tmp_path / "net"
    path.write_text("older")
    writer = {
        "safetensors": "save_safetensors",
        "torch": "to_state_dict",
        "onnx": "to_onnx",
        "stablehlo": "to_stablehlo",
        "litert": "to_litert",
    }[format]
    module = litert if format == "litert" else export
    write = getattr(module, writer)

    def wrong(*args, **options):
        position = 2 if format == "safetensors" else 1
        args = list(args)
        stem = args[position]["stem"]
        kernel = np.array(stem["kernel"])
        kernel[0, 0, 0, 0] += 0.01
        args[position] = {**args[position], "stem": {**stem, "kernel": kernel}}
        return write(*args, **options)

    monkeypatch.setattr(module, writer, wrong)
    with pytest.raises(export.EquivalenceError, match="was not written") as error:
        export.export(path, spec, params, images, format=format, normalization=normalization)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert path.read_text() == "older"


def test_a_network_that_is_not_finite_is_not_exported(tmp_path):
    spec, params, normalization, images = network("projection")
    params["head"] = {**params["head"], "bias": np.full(5, np.nan, np.float32)}
    with pytest.raises(export.EquivalenceError):
        export.export(
            tmp_path / "net", spec, params, images, format="onnx", normalization=normalization
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, format):
    spec, params, normalization, images = network("projection")
    path = tmp_path / "net"
    path.write_text("older")

    def disk_full(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    def disk_full_too(tensors, filename, metadata=None):
        filename.touch()
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(pathlib.Path, "write_bytes", disk_full)
    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full_too)
    with pytest.raises(command_line.UsageError, match="No space left on device") as error:
        export.export(path, spec, params, images, format=format, normalization=normalization)
    assert is_one_sentence(error)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert path.read_text() == "older"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"format": "coreml"}, "must be one of safetensors, torch, onnx, stablehlo, litert"),
        ({"format": "torch", "normalize": True}, "--normalize is for onnx, stablehlo, litert"),
        ({"format": "onnx", "images": np.zeros((0, 8, 8, 3), np.uint8)}, "at least one image"),
    ],
)
def test_an_export_that_cannot_be_is_refused(tmp_path, options, match):
    spec, params, normalization, images = network("projection")
    options = {"images": images, "normalization": normalization, **options}
    with pytest.raises(ValueError, match=match) as error:
        export.export(tmp_path / "net", spec, params, **options)
    assert is_one_sentence(error)
    assert not list(tmp_path.iterdir())


def test_the_error_is_relative_to_the_largest_logit_of_each_image():
    wanted = np.array([[1.0, 10.0], [0.2, -0.1]])
    found = np.array([[1.1, 10.0], [0.1, 0.12]])
    result = export.compare(found, wanted)
    assert result.error == pytest.approx(1.1)
    assert result.agreement == 0.5 and result.num_images == 2
    assert str(result) == (
        "largest relative logit error 1.1e+00, top-1 agreement 50.00 % on 2 images"
    )


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A work directory with an INR of random values; what training leaves besides is not needed."""
    path = tmp_path_factory.mktemp("export") / "run"
    path.mkdir()
    module_spec = importlib.util.spec_from_file_location("digits", ROOT / "configs" / "digits.py")
    digits = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(digits)
    config = digits.get_config("smoke").to_dict()
    (path / "config.json").write_text(json.dumps(config))
    family = lab.from_config(config, data.load_dataset("digits")).hypernetwork

    def init(key):
        return hyper.init(key, family, resnet.init_params(key, family.spec))

    shapes = jax.eval_shape(init, jax.random.key(0, impl="unsafe_rbg"))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.4).astype("float32"), shapes)
    checkpoint.save_inr(path / checkpoint.INR_FILE, family, params)
    return path


def call(*args):
    """(exit status, standard output, standard error) of the command."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [export.__file__, *map(str, args)])
        patch.setattr(lab, "quiet_logging", lambda: None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command_line.run(export.main)
            except SystemExit as stop:
                status = stop.code
    return status, out.getvalue(), err.getvalue()


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
    status, out, err = call(f"--workdir={workdir}", f"--out={tmp_path / 'net'}", *options)
    assert status == 0, err
    last = out.splitlines()[-1]
    assert last.startswith("equivalence: largest relative logit error ")
    assert last.endswith("top-1 agreement 100.00 % on 144 images of the validation split of digits")
    assert ("outside what was trained" in out) == (options[1] in ("--widths=3,0", "--widths=6,1"))
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_the_command_writes_the_network_that_the_library_generates(workdir, tmp_path):
    family, params, _ = checkpoint.load_inr(workdir)
    widths = (3, 5)
    (tmp_path / "best.json").write_text(
        json.dumps({**morphs.morph_to_dict(family, widths), "accuracy": 0.5})
    )
    path = tmp_path / "net.safetensors"
    status, _, err = call(
        f"--workdir={workdir}",
        f"--spec={tmp_path / 'best.json'}",
        "--format=safetensors",
        f"--out={path}",
        "--num_images=10",
    )
    assert status == 0, err
    spec, tree, info = export.load_safetensors(path)
    assert spec == morph(family.spec, family.blocks, widths)
    wanted = jax.jit(lambda params: hyper.generate_dense(family, params, widths)[1])(params)
    wanted = {name: wanted[name] for name in tree}
    for (place, x), (_, y) in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(wanted), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6, err_msg=str(place))
    assert info["dataset"] == "digits" and info["morph"]["widths"] == list(widths)
    assert (info["mean"], info["std"]) == ([0.3055], [0.376])


@pytest.fixture
def nothing_runs(monkeypatch):
    """What refuses does so before anything is loaded or traced."""

    def refuse(*args, **options):
        raise AssertionError("reached the data or the network")

    monkeypatch.setattr(lab, "load_data", refuse)
    monkeypatch.setattr(export, "draw", refuse)


@pytest.mark.parametrize(
    "change, shown",
    [
        ({"workdir": None}, "An export needs --workdir"),
        ({"workdir": "nowhere"}, "nowhere must be a work directory of train.py"),
        ({"format": None}, "An export needs --format"),
        ({"format": "coreml"}, "<safetensors|torch|onnx|stablehlo|litert>"),
        ({"out": None}, "An export needs --out"),
        ({"out": "/dev/null"}, "/dev/null is something else"),
        ({"out": "missing/net.onnx"}, "missing/net.onnx must be writable, but: No such file"),
        ({"width": None}, "one of --width, --widths and --spec, got none of them"),
        ({"widths": "3,4"}, "got --width and --widths"),
        ({"width": 2}, "A width ratio must lie in (0, 1.5], got 2"),
        ({"width": None, "widths": "3,x"}, "integers with commas between, got '3,x'"),
        ({"width": None, "widths": "3"}, "each of the 2 generated blocks, got 1"),
        (
            {"width": None, "widths": "3,10"},
            "stage2_block1 takes hidden widths from 0 to 9, got 10",
        ),
        (
            {"width": None, "widths": "-1,3"},
            "stage1_block1 takes hidden widths from 0 to 6, got -1",
        ),
        ({"width": None, "spec": "gone.json"}, "--spec=gone.json must be a file"),
        ({"num_images": 0}, "--num_images must be at least 1"),
        ({"num_samples": 0}, "--num_samples must be at least 1"),
        ({"tolerance": "nan"}, "--tolerance above 0"),
        ({"format": "torch", "normalize": "true"}, "--normalize is for onnx, stablehlo, litert"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_sentence(workdir, tmp_path, nothing_runs, change, shown):
    options = {
        "workdir": workdir,
        "width": 0.5,
        "format": "onnx",
        "out": tmp_path / "net",
        **change,
    }
    args = [f"--{name}={value}" for name, value in options.items() if value is not None]
    status, _, err = call(*args)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and shown in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "format, package",
    [
        ("onnx", "onnx"),
        ("onnx", "onnxruntime"),
        ("stablehlo", "flatbuffers"),
        pytest.param("litert", "ai-edge-litert", marks=no_litert),
        pytest.param("litert", "ai-edge-quantizer", marks=no_litert),
    ],
)
def test_a_missing_extra_is_named(workdir, tmp_path, nothing_runs, monkeypatch, format, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name.replace("_", "-") == package else find_spec(name),
    )
    status, _, err = call(
        f"--workdir={workdir}", "--width=1", f"--format={format}", f"--out={tmp_path / 'net'}"
    )
    assert status == 2
    assert f"{format} files need {package}; install them" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda fields: "{", "must be JSON"),
        (lambda fields: "[1, 2]", "lacks blocks, spec, widths"),
        (lambda fields: without(fields, "blocks"), "lacks blocks"),
        (lambda fields: {**fields, "blocks": [0, 1]}, r"blocks \[0, 1\] there, \[1, 3\] here"),
        (
            lambda fields: {**fields, "spec": {**fields["spec"], "num_classes": 100}},
            "num_classes 100 there, 10 here",
        ),
        (lambda fields: {**fields, "spec": None}, "other fields in its spec"),
        (lambda fields: {**fields, "widths": [1.0, 2]}, "list of integers"),
        (lambda fields: {**fields, "widths": [1, 2, 3]}, "2 generated blocks, got 3"),
        (lambda fields: {**fields, "widths": [1, 99]}, "from 0 to 9, got 99"),
    ],
)
def test_a_spec_of_another_architecture_or_a_damaged_one_is_refused(
    workdir, tmp_path, change, match
):
    family = checkpoint.load_inr(workdir)[0]
    changed = change(morphs.morph_to_dict(family, (3, 4)))
    path = tmp_path / "best.json"
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(command_line.UsageError, match=match) as error:
        morphs.load_morph(path, family)
    assert is_one_sentence(error)


def test_a_block_that_changes_the_shape_of_the_stream_cannot_be_skipped():
    spec = cifar_resnet(8, num_classes=3, stage_widths=(2, 2, 2))
    family = hyper.Hypernetwork(spec, (0, 1, 2), Grid())
    assert morphs.check_widths(family, (0, 1, 1)) == (0, 1, 1)
    with pytest.raises(ValueError, match="stage2_block0 takes hidden widths from 1 to 3, got 0"):
        morphs.check_widths(family, (0, 0, 1))
