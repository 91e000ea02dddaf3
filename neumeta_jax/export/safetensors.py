"""safetensors: the folded tree, and in the header all that it takes to run it."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

from neumeta_jax.errors import check, sentence
from neumeta_jax.evaluation import quantize
from neumeta_jax.export.network import Network, Normalization
from neumeta_jax.files import trees
from neumeta_jax.networks import families


def save(path: str | os.PathLike, network: Network) -> None:
    """Writes a network; `load` reads it."""
    trees.save_tree(path, network.params, network.metadata)


def load(path: str | os.PathLike) -> Network:
    """An exported network.

        network = load("half.safetensors")
        logits = families.run(network.spec, network.params, network.normalization(pixels))

    Weights in 8 bits come multiplied by their scales, in float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, is no exported network, or its tensors do not fit its spec.
    """
    name = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {name}; check the path.")
    params, info = trees.load_tree(path)
    missing = sorted({"network", "mean", "std"} - set(info))
    check(not missing, f"{name} must hold an exported network, but its header lacks {missing}.")
    try:
        spec = families.size_from_dict(info.pop("network"))
        wanted = families.abstract_params(spec)
        params = quantize.dequantize(params)
    except (TypeError, ValueError) as error:
        reason = sentence(str(error))
        raise ValueError(f"{name} holds no usable network: {reason}") from None
    difference = trees.first_difference(params, wanted)
    check(
        not difference,
        f"{name} must hold the tensors of the network in its header, but {difference}; export it "
        "again.",
    )
    check(
        all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)),
        f"{name} must hold float32 tensors; export it again.",
    )
    normalization = {key: info.pop(key) for key in ("mean", "std")}
    for key, values in normalization.items():
        numbers = isinstance(values, list) and all(type(x) in (int, float) for x in values)
        check(
            numbers and len(values) == spec.channels,
            f"{name} must hold a mean and a std for each of {spec.channels} channels, got "
            f"{ascii(values)[:80]} as {key}; export it again.",
        )
    mean, std = map(tuple, normalization.values())
    return Network(spec, params, Normalization(mean, std), info)


def read(path: str | os.PathLike) -> Callable:
    """The network of a file, normalised images NHWC -> logits."""
    network = load(path)
    return jax.jit(lambda images: families.run(network.spec, network.params, images))


write = save
