"""What happens to images before a network sees them."""

import dataclasses
from typing import NamedTuple

import jax

from neumeta_jax.data import datasets
from neumeta_jax.errors import check


class Images(NamedTuple):
    """Training images as they lie on the device: uint8[n, size, size, channels], int32[n]."""

    images: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to a batch of uint8 images before the network sees it.

    `mixup` and `cutmix` are the shares of the training images that are mixed with another image
    (`datasets.mix`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 4
    flip: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("mean", "std"):  # hashable, whatever sequences they came as
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        check(
            self.mixup >= 0 and self.cutmix >= 0 and self.mixup + self.cutmix <= 1,
            "mixup and cutmix are shares of the images and add up to 1 at most, got "
            f"{self.mixup} and {self.cutmix}.",
        )

    def train(
        self, key: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int
    ) -> tuple[jax.Array, jax.Array]:
        """(what the network sees, labels) of uint8 images and labels int[batch].

        Where images are mixed, labels become probabilities, float32[batch, num_classes].
        """
        images = datasets.augment(key, images, crop_padding=self.crop_padding, flip=self.flip)
        x, y = datasets.normalize(images, self.mean, self.std), labels
        if self.mixup or self.cutmix:
            key = jax.random.fold_in(key, 1)
            y = jax.nn.one_hot(labels, num_classes)
            x, y = datasets.mix(key, x, y, mixup=self.mixup, cutmix=self.cutmix)
        return x.astype(self.dtype), y

    def evaluate(self, images: jax.Array) -> jax.Array:
        return datasets.normalize(images, self.mean, self.std).astype(self.dtype)
