"""Families of networks in plain flax.linen, each in a file of its own.

    net = make_network("resnet", variant=18, num_classes=10, stem="cifar")
    variables = net.init(key, images)
    logits = net.apply(variables, images)
    logits, moved = net.apply(variables, images, train=True, mutable=["batch_stats"])

Networks are values: their constructor fields say all about them. Images are NHWC.
"""

import dataclasses
from typing import Any

import flax.linen as nn

from neumeta_jax.networks.mixer import MIXER_VARIANTS, MLPMixer
from neumeta_jax.networks.mlp import MLP
from neumeta_jax.networks.mobilenet import MobileNetV2
from neumeta_jax.networks.resnet import RESNET_VARIANTS, ResNet, from_torchvision
from neumeta_jax.networks.vgg import VGG, VGG_VARIANTS
from neumeta_jax.networks.vit import VIT_VARIANTS, ViT

__all__ = [
    "FAMILIES",
    "MIXER_VARIANTS",
    "MLP",
    "RESNET_VARIANTS",
    "VGG",
    "VGG_VARIANTS",
    "VIT_VARIANTS",
    "MLPMixer",
    "MobileNetV2",
    "ResNet",
    "ViT",
    "from_torchvision",
    "make_network",
]

FAMILIES: dict[str, type[nn.Module]] = {
    "mixer": MLPMixer,
    "mlp": MLP,
    "mobilenet": MobileNetV2,
    "resnet": ResNet,
    "vgg": VGG,
    "vit": ViT,
}

_VARIANTS = {
    "mixer": MIXER_VARIANTS,
    "resnet": RESNET_VARIANTS,
    "vgg": VGG_VARIANTS,
    "vit": VIT_VARIANTS,
}


def make_network(kind: str, *, variant: int | str | None = None, **fields: Any) -> nn.Module:
    """The network of `kind` (a key of `FAMILIES`) with the given fields; lists become tuples.

        >>> make_network("vgg", variant=16, num_classes=100) == VGG(num_classes=100)
        True

    Args:
        variant: a published size, a key of `MIXER_VARIANTS`, `RESNET_VARIANTS`, `VGG_VARIANTS` or
            `VIT_VARIANTS`, that sets the fields which are not given.

    Raises:
        ValueError: for an unknown kind, variant or field.
    """
    if kind not in FAMILIES:
        raise ValueError(f"The network must be one of {sorted(FAMILIES)}, got {kind!r}.")
    variants = _VARIANTS.get(kind, {})
    if variant is not None and variant not in variants:
        known = f"is one of {[*variants]}" if variants else "must be None, as it has no others"
        raise ValueError(f"The variant of a network of kind {kind!r} {known}, got {variant!r}.")
    cls = FAMILIES[kind]
    known = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    if unknown := set(fields) - known:
        raise ValueError(
            f"A network of kind {kind!r} takes {sorted(known)}, got also {sorted(unknown)}."
        )
    fields = (variants[variant] if variant is not None else {}) | fields
    return cls(**{name: _hashable(value) for name, value in fields.items()})


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
