"""Trained INRs as files, and those that come with the package."""

import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.core.inr import describe_inr, make_inr
from neumeta_jax.files import storage, trees
from neumeta_jax.networks import families
from neumeta_jax.networks.cifar_resnet import Params
from neumeta_jax.networks.families import Family

INR_FILE = "inr.safetensors"
PRETRAINED = pathlib.Path(__file__).resolve().parents[1] / "pretrained"


def save_inr(
    path: str | os.PathLike, hypernetwork: Family, params: Mapping, **metadata: Any
) -> None:
    """Writes a trained INR with all that `load_inr` needs to generate networks from it."""
    fields = {**hypernetwork.describe(), "inr": describe_inr(hypernetwork.inr)}
    trees.save_tree(path, params, {**fields, **metadata})


def save_compact(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Writes the trained INR of `source`, a work directory or a file, again in half its bytes.

    Numbers are rounded to bfloat16, but for second moments, whose inverse is taken.
    """
    hypernetwork, params, metadata = load_inr(source)

    def rounded(keys, leaf):
        return leaf if keys[-1].key == "moments" else leaf.astype(jnp.bfloat16)

    save_inr(path, hypernetwork, jax.tree_util.tree_map_with_path(rounded, params), **metadata)


def pretrained() -> list[str]:
    """The names of the trained INRs that come with the package; each has a page beside it.

    >>> "cifar100-resnet56" in pretrained()
    True
    """
    return sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))


def unpack(name: str, workdir: pathlib.Path) -> None:
    """Puts a `pretrained` INR and the config that trained it into a work directory."""
    for suffix, target in ((".safetensors", INR_FILE), (".json", "config.json")):
        with storage.replacing(workdir / target) as partial:
            shutil.copyfile(PRETRAINED / f"{name}{suffix}", partial)


def load(name: str) -> tuple[Family, Params, dict[str, Any]]:
    """`load_inr`; `name` is one of `pretrained()`, a work directory of train.py, or a file."""
    return load_inr(name)


def load_inr(path: str | os.PathLike) -> tuple[Family, Params, dict[str, Any]]:
    """The (hypernetwork, params, metadata) of a trained INR; parameters are float32.

    `path` is a work directory of train.py, the file `inr.safetensors` in it, or the name of one of
    the `pretrained` INRs.

    Raises:
        FileNotFoundError, ValueError: as `trees.load_tree`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / INR_FILE
    elif not path.exists() and str(path) in pretrained():
        path = PRETRAINED / f"{path}.safetensors"
    params, metadata = trees.load_tree(path)
    params.setdefault("learned", {})  # nothing, where everything is generated
    kinds = {"spec", "blocks", "inr"}, {"network", "names", "inr"}
    if not any(kind <= set(metadata) for kind in kinds):
        missing = sorted(kinds["network" in metadata] - set(metadata))
        raise ValueError(f"{path} must hold a trained INR, but its header lacks {missing}.")
    try:
        inr = make_inr(**metadata.pop("inr"))
        families.check_numbers(describe_inr(inr).values())
        hypernetwork = families.from_description(metadata, inr)
        for name in hypernetwork.describe():
            del metadata[name]
        # Whatever the caller asks of JAX, an error within is the header's.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            _check_shapes(hypernetwork, params)
    except Exception as error:  # a header may hold anything
        storage.check_is_damage(path, error)
        raise ValueError(
            f"{path} must hold a trained INR, but its header or its tensors fit none "
            f"({trees.reason(error)}); train it again."
        ) from error
    return hypernetwork, jax.tree.map(lambda x: x.astype(jnp.float32), params), metadata


def _check_shapes(hypernetwork: Family, params: Mapping) -> None:
    """Raises ValueError unless `params` are those of `hypernetwork`."""
    wanted = jax.eval_shape(
        lambda tree: hyper.init(jax.random.key(0), hypernetwork, tree),
        hypernetwork.network.abstract_params(),
    )
    if difference := trees.first_difference(params, wanted):
        raise ValueError(difference)
