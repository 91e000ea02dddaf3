import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import resource
import shutil
import tempfile
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from builders import STRICT, flipped, refused

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import Grid, PerTensorMLP
from neumeta_jax.data import datasets
from neumeta_jax.files import storage, torch_files, trees
from neumeta_jax.files.trees import load_tree, save_tree
from neumeta_jax.networks import cifar_resnet
from neumeta_jax.networks.cifar_spec import generated_blocks, resnet_spec
from neumeta_jax.networks.saved import INR_FILE, load_inr, save_inr
from neumeta_jax.runs import checkpoint, logs
from neumeta_jax.runs.checkpoint import Checkpoints

RAMP = np.arange(24, dtype="float32").reshape(2, 3, 4)
TREE = {
    "stem": {"kernel": np.arange(6, dtype="float32").reshape(2, 3), "bias": np.float32(0.5)},
    "head": {"fc": {"counts": np.array([1, -2], "int32"), "empty": np.zeros((0, 3), "float32")}},
    "not contiguous": {"transposed": RAMP.transpose(2, 0, 1), "strided": RAMP[:, ::2]},
}
METADATA = {"list": [1, 2.5, None], "name": 'a "quoted" välue', "nested": {"x": True}}


assert_equal = functools.partial(chex.assert_trees_all_equal, strict=True)


# --- finished trees --------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    """A file with TREE and METADATA."""
    path = tmp_path / "tree.safetensors"
    save_tree(path, TREE, METADATA)
    return path


def assert_holds(path):
    tree, metadata = load_tree(path)
    assert_equal(tree, TREE)
    assert metadata == METADATA


def test_a_saved_tree_comes_back_with_its_metadata_and_has_the_same_bytes_each_time(path):
    """So that the digest that train.py prints tells whether two runs ended alike."""
    assert_holds(path)
    assert list(path.parent.iterdir()) == [path]
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode  # not for its owner alone
    other.unlink()
    content = path.read_bytes()
    for _ in range(7):
        save_tree(path, TREE, METADATA)
        assert path.read_bytes() == content


def test_a_tree_from_before_checksums_is_read(path):
    old = {trees._OLD_FORMAT: json.dumps(METADATA)}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata=old)
    assert_holds(path)


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    save_file = safetensors.numpy.save_file

    def disk_full(tensors, filename, metadata=None):
        save_file(tensors, filename, metadata)
        halve(filename)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", disk_full)
        with pytest.raises(OSError, match="No space"):
            save_tree(path, {"other": np.ones(3)}, {})
    assert_holds(path)
    save_tree(path, {"other": np.ones(3, "float32")}, {})
    assert list(load_tree(path)[0]) == ["other"]


def test_files_that_are_truncated_or_of_another_program_or_not_there_are_refused(path):
    content = path.read_bytes()
    for kept in (0.0, 0.02, 0.5, 0.99):
        path.write_bytes(content[: int(kept * len(content))])
        with refused("must be a complete safetensors file", path):
            load_tree(path)
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file({"w": np.ones(3)}, path, metadata=metadata)
        with refused("must be written by this software", path):
            load_tree(path)
    path.unlink()
    with refused("tree.safetensors", error=FileNotFoundError):
        load_tree(path)


# --- trained INRs ----------------------------------------------------------------------------


MLP = PerTensorMLP(4, 1, 1, noise_scale=0.5, noise_per="channel")


@pytest.mark.parametrize("inr", [MLP, Grid(3, "nested", 0.25)], ids=["mlp", "grid"])
def test_a_saved_inr_generates_the_same_networks_bit_for_bit(tmp_path, inr):
    spec = resnet_spec(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    family = cifar_resnet.hypernetwork(spec, generated_blocks(spec), inr)
    init = jax.jit(lambda key, tree: hyper.init(key, family, tree, alpha=0.3))
    params = init(jax.random.key(0), cifar_resnet.init_params(jax.random.key(1), spec))
    notes = {"dataset": "x", "trained_range": [0.5, 1.0]}
    save_inr(tmp_path / INR_FILE, family, params, **notes)
    generate = jax.jit(lambda params, widths: hyper.generate(family, params, widths))
    for place in (tmp_path, tmp_path / INR_FILE):
        loaded, loaded_params, metadata = load_inr(place)
        assert loaded == family and hash(loaded) == hash(family)
        assert metadata == notes
        for ratio in (1.0, 0.5):
            widths = family.widths(ratio)
            assert_equal(generate(loaded_params, widths), generate(params, widths))


def test_a_tree_without_an_inr_is_refused_and_says_what_is_missing(tmp_path):
    path = tmp_path / INR_FILE
    with refused("inr.safetensors", error=FileNotFoundError):
        load_inr(tmp_path)
    save_tree(path, TREE, {"spec": {}})
    with refused(r"lacks \['blocks', 'inr'\]", path):
        load_inr(tmp_path)


# --- checkpoints of a running phase ----------------------------------------------------------


def state_of(value):
    return {
        "w": jnp.full((64, 32), value, jnp.float32),
        "moments": (jnp.arange(500, dtype=jnp.float32) + value, {"count": jnp.int32(value)}),
    }


TEMPLATE = jax.eval_shape(lambda: state_of(0))


@pytest.fixture
def saved():
    """Checkpoints of steps 1 and 3, in a folder that any user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder).chmod(0o755)
        checkpoints = Checkpoints(pathlib.Path(folder) / "checkpoints")
        for step in (1, 3):
            checkpoints.save(step, state_of(step))
        yield checkpoints


def assert_restores(saved, step):
    found, state = saved.restore(TEMPLATE)
    assert found == step
    assert_equal(state, state_of(step))


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) // 2, bits=0x10))


def damage(saved, harm=halve, pattern="**/*", most=None, step=3):
    """Harms the `most` largest files, or all, or whole folders of a checkpoint."""
    found = (saved.directory / str(step)).glob(pattern)
    found = [path for path in found if path.is_dir() == (harm is shutil.rmtree)]
    assert found
    for path in sorted(found, key=lambda path: -path.stat().st_size)[:most]:
        harm(path)


ARRAYS = "**/d/*"
DAMAGE = [
    (halve,),
    (pathlib.Path.unlink,),
    (shutil.rmtree, "state"),
    (shutil.rmtree, "meta"),
    (halve, "**/*", 1),
    (halve, ARRAYS, 1),
    (pathlib.Path.unlink, ARRAYS),
    (flip, ARRAYS),
]


def test_the_newest_checkpoint_is_restored_and_runs_in_the_programs_of_a_fresh_one(saved):
    assert saved.steps() == [1, 3]
    assert_restores(saved, 3)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))
    step(state_of(3))
    step(saved.restore(TEMPLATE)[1])
    assert step._cache_size() == 1


def test_only_the_newest_are_kept_and_complete_when_the_call_returns(saved, tmp_path):
    nothing = Checkpoints(tmp_path / "new")
    assert nothing.steps() == [] and nothing.restore(TEMPLATE) is None
    saved.save(4, state_of(4))
    state = state_of(10)
    saved.save(10, state)
    jax.tree.map(lambda x: x.delete(), state)
    assert saved.steps() == [4, 10]
    assert_restores(saved, 10)


@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(saved, harm, caplog):
    damage(saved, *harm)
    with caplog.at_level(logging.WARNING, "neumeta_jax"):
        assert_restores(saved, 1)
    (record,) = [r for r in caplog.records if r.name.startswith("neumeta_jax")]
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert f"{saved.directory / '3'} is damaged" in message and "\n" not in message
    assert saved.steps() == [1]
    assert (saved.directory / "3.damaged").is_dir()  # it stays for whoever wants to look
    saved.save(2, state_of(2))
    assert_restores(saved, 2)


@pytest.mark.parametrize("harm", DAMAGE[:3])
def test_a_damaged_checkpoint_can_be_saved_again(saved, harm):
    damage(saved, *harm)
    saved.save(3, state_of(30))
    step, state = saved.restore(TEMPLATE)
    assert step == 3
    assert_equal(state, state_of(30))
    assert saved.steps() == [1, 3]


def test_a_damaged_checkpoint_is_never_dropped(saved):
    for number in range(2):
        damage(saved)
        assert_restores(saved, 1)
        for step in (2, 3):
            saved.save(step, state_of(step))
        if number == 0:
            shutil.rmtree(saved.directory / "2")
            saved.save(1, state_of(1))
    saved.save(4, state_of(4))
    assert saved.steps() == [3, 4]
    assert {"3.damaged", "3.damaged2"} <= {path.name for path in saved.directory.iterdir()}
    assert_restores(saved, 4)


def test_checkpoints_of_which_none_is_intact_are_refused_and_stay_where_they_are(saved):
    """As after a change of the software, when another version can still read them."""
    for step in (1, 3):
        damage(saved, step=step)
    with refused(r"steps \[1, 3\], but none of them is intact", saved.directory):
        saved.restore(TEMPLATE)
    assert saved.steps() == [1, 3]


@pytest.mark.parametrize("harm", [flip, halve, pathlib.Path.unlink])
def test_any_harmed_file_of_a_checkpoint_is_noticed_or_does_not_matter(saved, tmp_path, harm):
    """One file at a time; what comes back is one of the two states, bit for bit."""
    intact = shutil.copytree(saved.directory, tmp_path / "intact")
    fallen_back = 0
    for file in [path for path in (saved.directory / "3").rglob("*") if path.is_file()]:
        harm(file)
        step, state = saved.restore(TEMPLATE)
        assert_equal(state, state_of(step))
        fallen_back += step == 1
        shutil.rmtree(saved.directory)
        shutil.copytree(intact, saved.directory)
    assert fallen_back >= 1


@pytest.mark.parametrize(
    "failure, error",
    [(MemoryError(), MemoryError), (OSError(errno.EIO, "x"), storage.StorageError)],
)
def test_what_the_machine_refuses_is_not_blamed_on_a_checkpoint_or_a_file(
    saved, path, monkeypatch, failure, error
):
    """No other checkpoint is taken for it and nothing renamed."""

    def fail(*args, **kwargs):
        raise failure

    images = path.with_name("images.npz")
    images.write_bytes(b"")
    readers = {
        (checkpoint, "_digest"): lambda: saved.restore(TEMPLATE),
        (safetensors, "safe_open"): lambda: load_tree(path),
        (pathlib.Path, "read_bytes"): lambda: torch_files.read_tensors(path),
        (zipfile, "ZipFile"): lambda: datasets.load_dataset("mine", data_dir=images),
    }
    for (place, name), read in readers.items():
        monkeypatch.setattr(place, name, fail)
        with pytest.raises(error):
            read()
    monkeypatch.undo()
    assert_restores(saved, 3)
    assert_holds(path)


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(saved):
    folder = next((saved.directory / "3").glob("**/d"))
    with (
        forbidden(folder),
        refused("could not be read", saved.directory, error=storage.StorageError),
    ):
        saved.restore(TEMPLATE)
    assert_restores(saved, 3)


def test_a_tree_that_may_not_be_read_is_not_taken_for_a_damaged_one(saved):
    path = saved.directory / "tree.safetensors"
    save_tree(path, TREE, METADATA)
    with forbidden(path), refused("could not be read", path, error=storage.StorageError):
        load_tree(path)
    assert_holds(path)


@pytest.mark.parametrize("setting", STRICT)
def test_strict_settings_of_jax_change_nothing_in_what_is_loaded(saved, tmp_path, setting):
    spec = resnet_spec(14, num_classes=3, stage_widths=(2, 2, 3), image_size=8)
    family = cifar_resnet.hypernetwork(spec, generated_blocks(spec), MLP)
    params = hyper.init(
        jax.random.key(0), family, cifar_resnet.init_params(jax.random.key(1), spec)
    )
    save_inr(tmp_path / INR_FILE, family, params)
    wanted = state_of(3)
    with getattr(jax, setting.removeprefix("jax_"))(STRICT[setting]):
        step, state = saved.restore(TEMPLATE)
        loaded = load_inr(tmp_path)
    assert step == 3 and loaded[0] == family
    assert_equal((state, loaded[1]), (wanted, params))


def test_what_a_killed_save_leaves_behind_is_no_checkpoint(saved):
    """Orbax writes under a temporary name first."""
    partial = saved.directory / "5.orbax-checkpoint-tmp"
    shutil.copytree(saved.directory / "3", partial)
    damage(saved, step=partial.name)
    assert saved.steps() == [1, 3]
    assert_restores(saved, 3)
    saved.save(5, state_of(5))
    assert_restores(saved, 5)


# --- faults of the disk ----------------------------------------------------------------------


@contextlib.contextmanager
def no_file_beyond(size):
    """As on a full disk: the system refuses to make any file larger than `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def forbidden(folder, mode=0):
    """`folder` with the rights `mode`; for root, who needs none, as another user."""
    is_root = os.geteuid() == 0
    folder.chmod(mode)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("fault", ["File too large", "Permission denied"])
def test_a_save_on_a_full_or_read_only_disk_says_so_and_keeps_the_last_checkpoint(saved, fault):
    disk = no_file_beyond(200) if "large" in fault else forbidden(saved.directory, 0o555)
    words = saved.directory / "5", "the checkpoint of step 3 is kept"
    with disk, refused(fault, *words, error=storage.StorageError):
        saved.save(5, state_of(5))
    assert saved.steps() == [1, 3]
    assert_restores(saved, 3)
    saved.save(5, state_of(5))  # once there is room
    assert_restores(saved, 5)
    assert not list(saved.directory.glob("*tmp*"))


@pytest.mark.parametrize("size", [0, 100])
def test_a_tree_on_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(path, size):
    with no_file_beyond(size), refused("tree.saf", error=storage.StorageError):
        save_tree(path, {"other": np.ones(300, "float32")}, {})
    assert_holds(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_line_of_metrics_on_a_full_disk_is_one_sentence(tmp_path):
    metrics = logs.Metrics(tmp_path)
    metrics.write("inr", 1, {"loss": 0.5})
    with no_file_beyond(60), refused("metrics.jsonl", error=storage.StorageError):
        metrics.write("inr", 2, {"loss": 0.25, "text": "x" * 100})
    metrics.rewind("inr", 1)
    assert metrics.path.read_text() == '{"part": "inr", "step": 1, "loss": 0.5}\n'
