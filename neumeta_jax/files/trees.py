"""Finished trees of arrays as safetensors: whole or not at all, read without running their code."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from neumeta_jax.files import storage

FORMAT = "neumeta-jax 2"
_OLD_FORMAT = "neumeta-jax 1"  # without a checksum
_CHECKSUM = "sha256"


def save_tree(path: str | os.PathLike, tree: Mapping, metadata: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays and JSON `metadata` as safetensors, atomically.

    Raises:
        StorageError: if the disk is full, the folder read-only, ...; an old file is still there.
    """
    flat = {
        # Not `np.ascontiguousarray`, which makes vectors of scalars.
        "/".join(entry.key for entry in keys): np.asarray(leaf, order="C")
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    fields = {**metadata, _CHECKSUM: _digest(flat, metadata)}
    # One entry: safetensors writes several in any order, and equal trees should be equal files.
    header = {FORMAT: json.dumps(fields, sort_keys=True)}
    with storage.replacing(path) as partial:
        safetensors.numpy.save_file(flat, partial, metadata=header)


def _digest(flat: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    """sha256 over all that `save_tree` writes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, array in sorted(flat.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def load_tree(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The (tree, metadata) of `save_tree`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or is not one of ours.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; training writes it when it is done.")
    try:
        path.open("rb").close()  # safetensors calls missing what may not be read
        with safetensors.safe_open(path, framework="numpy") as file:
            header = dict(file.metadata() or {})
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        storage.check_is_damage(path, error)
        raise ValueError(
            f"{path} must be a complete safetensors file, but reading it failed ({error}); write "
            "it again."
        ) from error
    ours = [entry for entry in (FORMAT, _OLD_FORMAT) if entry in header]
    if not ours:
        raise ValueError(
            f"{path} must be written by this software (format {FORMAT!r}); it is some other "
            "safetensors file."
        )
    try:
        metadata = json.loads(header[ours[0]])
        checksum = metadata.pop(_CHECKSUM, None)
        if ours[0] == FORMAT and checksum != _digest(flat, metadata):
            raise ValueError("its checksum does not match")
        tree = _nested(flat)
    except Exception as error:  # no JSON, no dict, a number too deep for the parser, ...
        storage.check_is_damage(path, error)
        raise ValueError(
            f"{path} must be as it was written, but it is damaged ({reason(error)}); restore it "
            "or write it again."
        ) from error
    return jax.device_put(tree), metadata


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        node = tree
        *parents, leaf = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf in node:
            raise ValueError("it has a tensor where others need a folder")
        node[leaf] = value
    return tree


def reason(error: Exception) -> str:
    """The first line of an error, for a sentence."""
    lines = str(error).splitlines()
    line = lines[0].rstrip(".")[:200] if lines else type(error).__name__
    return line if line.isprintable() else ascii(line)[1:-1]  # it may quote the file


def first_difference(given: Any, wanted: Any) -> str:
    """Which array of a tree has another shape than in the tree `wanted`, "" if none has."""
    given, wanted = (
        {"/".join(entry.key for entry in keys): leaf.shape for keys, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (given, wanted))
    )
    for name in sorted(set(wanted) | set(given)):
        found, needed = given.get(name), wanted.get(name)
        if found != needed:
            return f"{name[:80]} has the shape {found}, where {needed} is needed"
    return ""
