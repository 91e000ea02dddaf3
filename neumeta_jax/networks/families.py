"""The families of networks that a run can have: CIFAR ResNets, and any Flax network.

Both offer the same to everything above: a `spec` of the full size, groups of channels by name,
counts, `forward`, and `dense` with `apply` for one of their sizes. What differs by kind is here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from neumeta_jax.core.hypernetwork import nested
from neumeta_jax.core.inr import INR
from neumeta_jax.networks import cifar_resnet, linen
from neumeta_jax.networks.cifar_resnet import ResNetHypernetwork
from neumeta_jax.networks.cifar_spec import ResNetSpec
from neumeta_jax.networks.linen import LinenHypernetwork, LinenSize, LinenSpec

Family = ResNetHypernetwork | LinenHypernetwork
Size = ResNetSpec | LinenSize  # one network of a family

_MAX_NUMBER = 2**16  # of channels, blocks, layers, ... that a header may ask for


def from_description(description: Mapping[str, Any], inr: INR) -> Family:
    """The family that `Family.describe` described.

    Raises:
        ValueError: if the description is of no family, or of one too large to be believed.
    """
    if "network" in description:
        spec, names = LinenSpec.from_dict(description["network"]), description["names"]
        return linen.hypernetwork(spec, inr, names=tuple(map(str, names)))
    spec, blocks = ResNetSpec.from_dict(description["spec"]), tuple(description["blocks"])
    check_numbers((*vars(spec).values(), blocks))
    if list(blocks) != sorted({n for n in blocks if n < len(spec.blocks)}):
        raise ValueError(f"blocks must count upwards below {len(spec.blocks)}, got {blocks}"[:200])
    return cifar_resnet.hypernetwork(spec, blocks, inr, streams=description.get("streams") is True)


def check_numbers(values: Any) -> None:
    """Raises ValueError unless what came from a header are small numbers, or tuples of them."""
    for value in values:
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) not in (int, float, str, bool) or (
                type(number) is int and not 0 <= number <= _MAX_NUMBER
            ):
                raise ValueError(f"numbers from 0 to {_MAX_NUMBER} are read, got {number!r}"[:200])


def size_from_dict(fields: Mapping[str, Any]) -> Size:
    """The network that `Size.to_dict` described; raises ValueError for anything else."""
    return (LinenSize if "names" in fields else ResNetSpec).from_dict(fields)


def abstract_params(size: Size) -> Any:
    """The parameters of one network, with a float32 `jax.ShapeDtypeStruct` as each leaf."""
    if isinstance(size, ResNetSpec):
        return cifar_resnet.abstract_params(size)
    widths = dict(zip(size.names, size.widths, strict=True))
    return nested(
        {
            path: jax.ShapeDtypeStruct([axis.width(widths) for axis in axes], jnp.float32)
            for path, axes in size.spec.family.groups.tensors
        }
    )


def run(size: Size, params: Mapping, images: jax.Array) -> jax.Array:
    """Logits of one network on normalised images, float[batch, size, size, channels]."""
    if isinstance(size, ResNetSpec):
        return cifar_resnet.apply(size, params, images)
    return size.apply(params, images)
