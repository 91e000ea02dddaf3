import contextlib
import logging
import os
import pathlib
import resource
import shutil
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from neumeta_jax import checkpoint, hypernetwork as hyper, progress, resnet, storage
from neumeta_jax.architecture import cifar_resnet, generated_blocks
from neumeta_jax.checkpoint import Checkpoints
from neumeta_jax.hypernetwork import Hypernetwork
from neumeta_jax.inr import Grid, PerTensorMLP

TREE = {
    "stem": {"kernel": np.arange(6, dtype="float32").reshape(2, 3), "bias": np.float32(0.5)},
    "head": {"fc": {"counts": np.array([1, -2], "int32"), "empty": np.zeros((0, 3), "float32")}},
}
METADATA = {"list": [1, 2.5, None], "name": 'a "quoted" välue', "nested": {"x": True}}


def assert_equal(got, wanted):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_equal(got, wanted)


def is_one_sentence(error):
    message = str(error.value)
    return "\n" not in message and message.endswith(".")


# --- finished trees --------------------------------------------------------------------------


def test_a_saved_tree_comes_back_with_its_metadata(tmp_path):
    path = tmp_path / "tree.safetensors"
    checkpoint.save_tree(path, TREE, METADATA)
    tree, metadata = checkpoint.load_tree(path)
    assert_equal(tree, TREE)
    assert metadata == METADATA
    assert [p.name for p in tmp_path.iterdir()] == ["tree.safetensors"]


def test_the_same_tree_gives_the_same_bytes(tmp_path):
    """So that the digest that train.py prints tells whether two runs ended alike."""
    contents = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        checkpoint.save_tree(path, TREE, METADATA)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_arrays_that_are_not_contiguous_are_saved_as_they_look(tmp_path):
    kernel = np.arange(24.0, dtype="float32").reshape(2, 3, 4)
    path = tmp_path / "tree.safetensors"
    checkpoint.save_tree(path, {"a": kernel.transpose(2, 0, 1), "b": kernel[:, ::2]}, {})
    tree, _ = checkpoint.load_tree(path)
    assert_equal(tree, {"a": kernel.transpose(2, 0, 1), "b": kernel[:, ::2]})


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tree.safetensors"
    checkpoint.save_tree(path, TREE, METADATA)
    save_file = safetensors.numpy.save_file

    def disk_full(tensors, filename, metadata=None):
        save_file(tensors, filename, metadata)
        filename.write_bytes(filename.read_bytes()[: filename.stat().st_size // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_tree(path, {"other": np.ones(3)}, {})
    tree, metadata = checkpoint.load_tree(path)
    assert_equal(tree, TREE)
    assert metadata == METADATA
    monkeypatch.undo()
    checkpoint.save_tree(path, {"other": np.ones(3, "float32")}, {})
    assert list(checkpoint.load_tree(path)[0]) == ["other"]


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "tree.safetensors"
    checkpoint.save_tree(path, TREE, METADATA)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="must be a complete safetensors file") as error:
        checkpoint.load_tree(path)
    assert str(path) in str(error.value)
    assert is_one_sentence(error)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_another_program_is_refused(tmp_path, metadata):
    path = tmp_path / "tree.safetensors"
    safetensors.numpy.save_file({"w": np.ones(3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="must be written by this software") as error:
        checkpoint.load_tree(path)
    assert str(path) in str(error.value)
    assert is_one_sentence(error)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.safetensors") as error:
        checkpoint.load_tree(tmp_path / "gone.safetensors")
    assert is_one_sentence(error)


# --- trained INRs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inr",
    [PerTensorMLP(4, 1, 1, noise_scale=0.5, noise_per="channel"), Grid(3, "nested", 0.25)],
    ids=["mlp", "grid"],
)
def test_a_saved_inr_generates_the_same_networks_bit_for_bit(tmp_path, inr):
    spec = cifar_resnet(14, num_classes=5, stage_widths=(4, 6, 8), image_size=8)
    family = Hypernetwork(spec, generated_blocks(spec), inr)
    init = jax.jit(lambda key, tree: hyper.init(key, family, tree, alpha=0.3))
    params = init(jax.random.key(0), resnet.init_params(jax.random.key(1), spec))
    checkpoint.save_inr(
        tmp_path / checkpoint.INR_FILE, family, params, dataset="x", trained_range=[0.5, 1.0]
    )
    generate = jax.jit(lambda params, widths: hyper.generate(family, params, widths))
    for place in (tmp_path, tmp_path / checkpoint.INR_FILE):
        loaded, loaded_params, metadata = checkpoint.load_inr(place)
        assert loaded == family and hash(loaded) == hash(family)
        assert metadata == {"dataset": "x", "trained_range": [0.5, 1.0]}
        for ratio in (1.0, 0.5):
            widths = family.widths(ratio)
            assert_equal(generate(loaded_params, widths), generate(params, widths))


def test_a_tree_without_an_inr_is_refused_and_says_what_is_missing(tmp_path):
    path = tmp_path / checkpoint.INR_FILE
    checkpoint.save_tree(path, TREE, {"spec": {}})
    with pytest.raises(ValueError, match=r"lacks \['blocks', 'inr'\]") as error:
        checkpoint.load_inr(tmp_path)
    assert str(path) in str(error.value)
    assert is_one_sentence(error)


def test_a_folder_without_an_inr_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="inr.safetensors") as error:
        checkpoint.load_inr(tmp_path)
    assert is_one_sentence(error)


# --- checkpoints of a running phase ----------------------------------------------------------


def state_of(value):
    return {
        "w": jnp.full((64, 32), value, jnp.float32),
        "moments": (jnp.arange(500, dtype=jnp.float32) + value, {"count": jnp.int32(value)}),
    }


TEMPLATE = jax.eval_shape(lambda: state_of(0))


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 and 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 3):
        checkpoints.save(step, state_of(step))
    return checkpoints


def files_of(saved, step):
    return [path for path in (saved.directory / str(step)).rglob("*") if path.is_file()]


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def truncate_all(saved, step):
    for path in files_of(saved, step):
        halve(path)


def truncate_largest(saved, step):
    halve(max(files_of(saved, step), key=lambda path: path.stat().st_size))


def truncate_largest_array(saved, step):
    arrays = [path for path in files_of(saved, step) if path.parent.name == "d"]
    halve(max(arrays, key=lambda path: path.stat().st_size))


def remove_all_files(saved, step):
    for path in files_of(saved, step):
        path.unlink()


def remove_the_state(saved, step):
    shutil.rmtree(saved.directory / str(step) / "state")


def remove_the_checksum(saved, step):
    shutil.rmtree(saved.directory / str(step) / "meta")


def remove_the_arrays(saved, step):
    for path in files_of(saved, step):
        if path.parent.name == "d":
            path.unlink()


def flip_a_byte_of_each_array_file(saved, step):
    for path in files_of(saved, step):
        if path.parent.name == "d":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0x10
            path.write_bytes(content)


DAMAGE = [
    truncate_all,
    truncate_largest,
    truncate_largest_array,
    remove_all_files,
    remove_the_state,
    remove_the_checksum,
    remove_the_arrays,
    flip_a_byte_of_each_array_file,
]


def test_the_newest_checkpoint_is_restored(saved):
    assert saved.steps() == [1, 3]
    step, state = saved.restore(TEMPLATE)
    assert step == 3
    assert_equal(state, state_of(3))


def test_a_restored_state_runs_in_the_programs_that_a_fresh_one_was_compiled_to(saved):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))
    step(state_of(3))
    _, state = saved.restore(TEMPLATE)
    step(state)
    assert step._cache_size() == 1


def test_nothing_saved_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.steps() == []
    assert checkpoints.restore(TEMPLATE) is None


def test_only_the_newest_are_kept(saved):
    saved.save(4, state_of(4))
    saved.save(10, state_of(10))
    assert saved.steps() == [4, 10]
    assert saved.restore(TEMPLATE)[0] == 10


def test_a_save_is_complete_when_the_call_returns(saved):
    state = state_of(5)
    saved.save(5, state)
    jax.tree.map(lambda x: x.delete(), state)
    assert_equal(saved.restore(TEMPLATE)[1], state_of(5))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(saved, damage, caplog):
    damage(saved, 3)
    with caplog.at_level(logging.WARNING, "neumeta_jax"):
        step, state = saved.restore(TEMPLATE)
    assert step == 1
    assert_equal(state, state_of(1))
    (record,) = [r for r in caplog.records if r.name.startswith("neumeta_jax")]
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert f"{saved.directory / '3'} is damaged" in message and "\n" not in message
    assert saved.steps() == [1]
    assert (saved.directory / "3.damaged").is_dir()  # it stays for whoever wants to look


@pytest.mark.parametrize("damage", [truncate_all, remove_all_files, remove_the_state])
def test_a_damaged_checkpoint_can_be_saved_again(saved, damage):
    damage(saved, 3)
    saved.save(3, state_of(30))
    step, state = saved.restore(TEMPLATE)
    assert step == 3
    assert_equal(state, state_of(30))
    assert saved.steps() == [1, 3]


def test_a_damaged_checkpoint_is_never_dropped(saved):
    for number in range(2):
        truncate_all(saved, 3)
        assert saved.restore(TEMPLATE)[0] == 1
        for step in (2, 3):
            saved.save(step, state_of(step))
        if number == 0:
            shutil.rmtree(saved.directory / "2")
            saved.save(1, state_of(1))
    saved.save(4, state_of(4))
    assert saved.steps() == [3, 4]
    assert {"3.damaged", "3.damaged2"} <= {path.name for path in saved.directory.iterdir()}
    assert saved.restore(TEMPLATE)[0] == 4


def test_checkpoints_of_which_none_is_intact_stay_where_they_are(saved):
    """As after a change of the software, when another version can still read them."""
    for step in (1, 3):
        truncate_all(saved, step)
    with pytest.raises(ValueError, match="none of them is intact"):
        saved.restore(TEMPLATE)
    assert saved.steps() == [1, 3]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    at = int(np.random.default_rng(len(content)).integers(len(content)))
    content[at] ^= 0x20
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip_a_byte, halve, pathlib.Path.unlink])
def test_any_harmed_file_of_a_checkpoint_is_noticed_or_does_not_matter(saved, tmp_path, harm):
    """One file at a time; what comes back is one of the two states, bit for bit."""
    intact = shutil.copytree(saved.directory, tmp_path / "intact")
    fallen_back = 0
    for file in files_of(saved, 3):
        harm(file)
        step, state = saved.restore(TEMPLATE)
        assert_equal(state, state_of(step))
        fallen_back += step == 1
        shutil.rmtree(saved.directory)
        shutil.copytree(intact, saved.directory)
    assert fallen_back >= 1


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
def read_only(folder):
    """`folder` without the right to write; for root, who needs none, as another user."""
    is_root = os.geteuid() == 0
    folder.chmod(0o555)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def assert_refused_and_kept(saved, error):
    assert is_one_sentence(error)
    assert str(saved.directory / "5") in str(error.value)
    assert "the checkpoint of step 3 is kept" in str(error.value)
    assert saved.steps() == [1, 3]
    step, state = saved.restore(TEMPLATE)
    assert step == 3
    assert_equal(state, state_of(3))
    saved.save(5, state_of(5))  # once there is room
    assert saved.restore(TEMPLATE)[0] == 5
    assert not list(saved.directory.glob("*tmp*"))


def test_a_save_on_a_full_disk_says_so_and_keeps_the_last_checkpoint(saved):
    with (
        no_file_beyond(200),
        pytest.raises(storage.StorageError, match="File too large") as error,
    ):
        saved.save(5, state_of(5))
    assert_refused_and_kept(saved, error)


def test_a_save_into_a_read_only_folder_says_so_and_keeps_the_last_checkpoint():
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder).chmod(0o755)
        saved = Checkpoints(pathlib.Path(folder) / "checkpoints")
        for step in (1, 3):
            saved.save(step, state_of(step))
        with (
            read_only(saved.directory),
            pytest.raises(storage.StorageError, match="Permission denied") as error,
        ):
            saved.save(5, state_of(5))
        assert_refused_and_kept(saved, error)


@pytest.mark.parametrize("size", [0, 100])
def test_a_tree_on_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path, size):
    path = tmp_path / "tree.safetensors"
    checkpoint.save_tree(path, TREE, METADATA)
    with no_file_beyond(size), pytest.raises(storage.StorageError, match="tree.saf") as error:
        checkpoint.save_tree(path, {"other": np.ones(300, "float32")}, {})
    assert is_one_sentence(error)
    assert_equal(checkpoint.load_tree(path)[0], TREE)
    assert [p.name for p in tmp_path.iterdir()] == ["tree.safetensors"]


def test_a_line_of_metrics_on_a_full_disk_is_one_sentence(tmp_path):
    metrics = progress.MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write("inr", 1, {"loss": 0.5})
    with no_file_beyond(60), pytest.raises(storage.StorageError, match="metrics.jsonl") as error:
        metrics.write("inr", 2, {"loss": 0.25, "text": "x" * 100})
    assert is_one_sentence(error)
    metrics.rewind("inr", 1)
    assert metrics.path.read_text() == '{"part": "inr", "step": 1, "loss": 0.5}\n'


def test_a_save_before_a_damaged_checkpoint_is_not_lost(saved):
    truncate_all(saved, 3)
    assert saved.restore(TEMPLATE)[0] == 1
    saved.save(2, state_of(2))
    assert saved.restore(TEMPLATE)[0] == 2


def test_checkpoints_of_which_none_is_intact_are_refused(saved):
    for step in (1, 3):
        truncate_all(saved, step)
    with pytest.raises(ValueError, match=r"steps \[1, 3\], but none of them is intact") as error:
        saved.restore(TEMPLATE)
    assert str(saved.directory) in str(error.value)
    assert is_one_sentence(error)


def test_what_a_killed_save_leaves_behind_is_no_checkpoint(saved):
    """Orbax writes under a temporary name first."""
    partial = saved.directory / "5.orbax-checkpoint-tmp"
    shutil.copytree(saved.directory / "3", partial)
    truncate_all(Checkpoints(saved.directory), partial.name)
    assert saved.steps() == [1, 3]
    assert saved.restore(TEMPLATE)[0] == 3
    saved.save(5, state_of(5))
    assert saved.restore(TEMPLATE)[0] == 5
