"""The order of the images, and what happens to them before a network sees them.

The images lie on the device as uint8. Order, crops and flips are pure functions of (key, step) that
run inside `jax.jit`, so that resuming needs no iterator state.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neumeta_jax.errors import check


class Images(NamedTuple):
    """Training images as they lie on the device: uint8[n, size, size, channels], int32[n]."""

    images: jax.Array
    labels: jax.Array

    @classmethod
    def of(cls, images: Any, labels: Any) -> "Images":
        return cls(jnp.asarray(images), jnp.asarray(labels))


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to a batch of uint8 images before the network sees it.

    `mixup` and `cutmix` are the shares of the training images that are mixed with another image
    (`mix`).
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
        images = augment(key, images, crop_padding=self.crop_padding, flip=self.flip)
        x, y = normalize(images, self.mean, self.std), labels
        if self.mixup or self.cutmix:
            key = jax.random.fold_in(key, 1)
            y = jax.nn.one_hot(labels, num_classes)
            x, y = mix(key, x, y, mixup=self.mixup, cutmix=self.cutmix)
        return x.astype(self.dtype), y

    def evaluate(self, images: jax.Array) -> jax.Array:
        return normalize(images, self.mean, self.std).astype(self.dtype)


def epoch_order(key: jax.Array, epoch: int | jax.Array, num_examples: int) -> jax.Array:
    """A permutation, int32 [num_examples], that depends on `key` and `epoch` alone.

    It costs as much as many training steps on a CPU: call it once per epoch, not once per step.
    """
    indices = jnp.arange(num_examples, dtype=jnp.int32)
    return jax.random.permutation(jax.random.fold_in(key, epoch), indices)


def augment(key: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
    """The images, each cropped at random after padding and, half of the time, mirrored.

    What PyTorch's RandomCrop(size, padding=crop_padding) and RandomHorizontalFlip do. As there,
    the padding is 0 in the uint8 image, black, and not 0 after normalisation.

    Args:
        key: used once.
        images: uint8 [batch, height, width, channels], as is the result.
        crop_padding: pixels on each side, 4 for CIFAR; 0 for no crop.
        flip: whether to mirror left and right; false for digits.

    >>> images = jnp.ones((2, 4, 4, 3), jnp.uint8)
    >>> augment(jax.random.key(0), images, crop_padding=1, flip=True).shape
    (2, 4, 4, 3)
    """
    check(
        images.ndim == 4 and images.dtype == jnp.uint8,
        "augment takes uint8 images of shape [batch, height, width, channels], got "
        f"{images.dtype} {list(images.shape)}; normalize after it, not before.",
    )
    check(
        crop_padding >= 0, f"Crops are padded by 0 or more pixels, got {crop_padding=}; use 0 or 4."
    )
    batch, height, width, _ = images.shape
    key_crop, key_flip = jax.random.split(key)
    top, left = jax.random.randint(key_crop, (2, batch, 1), 0, 2 * crop_padding + 1)
    mirrored = jax.random.bernoulli(key_flip, shape=(batch, 1)) & flip

    # Two gathers along one axis each, with the flip for free in the second, took 1.1 ms for 1024
    # images on two cores; vmap of dynamic_slice 1.6 ms, one gather of pixels 1.3 ms.
    rows = top + jnp.arange(height)
    columns = left + jnp.where(mirrored, jnp.arange(width)[::-1], jnp.arange(width))
    pad = (crop_padding, crop_padding)
    padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
    cropped = jnp.take_along_axis(padded, rows[:, :, None, None], axis=1, mode="promise_in_bounds")
    return jnp.take_along_axis(cropped, columns[:, None, :, None], axis=2, mode="promise_in_bounds")


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Images, each mixed with the one before it in the batch, and their targets.

        mixup     r x + (1 - r) x'            (Zhang et al., arXiv 1710.09412)
        cutmix    x, but x' within a box      (Yun et al., arXiv 1905.04899)
        targets   r y + (1 - r) y'            r is what is left of the image

    r is uniform in [0, 1], drawn for each image. The box has the image's proportions, a center
    anywhere, and is clipped at the border.

    Args:
        key: used once.
        images: float [batch, height, width, channels].
        targets: float [batch, classes], probabilities.
        mixup, cutmix: shares of the images, drawn at random, that are mixed in this way.
    """
    batch, height, width, _ = images.shape
    choice, rest, row, column = jax.random.uniform(key, (4, batch, 1, 1))

    def inside(size, pixels, center):
        return jnp.abs(pixels + 0.5 - center * size) < jnp.sqrt(1 - rest) * size / 2

    box = inside(height, jnp.arange(height)[:, None], row)
    box &= inside(width, jnp.arange(width), column)
    share = jnp.where(box, 1.0, 0.0)  # of the other image, [batch, height, width]
    share = jnp.where(choice < cutmix + mixup, jnp.where(choice < cutmix, share, 1 - rest), 0.0)
    mean = jnp.mean(share, axis=(1, 2))[:, None]
    share = share[..., None].astype(images.dtype)
    mixed = images + share * (jnp.roll(images, 1, axis=0) - images)
    return mixed, targets + mean * (jnp.roll(targets, 1, axis=0) - targets)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images / 255 - mean) / std as float32, of uint8 [..., channels].

    `mean` and `std` have one number for each channel, as in `datasets.NORMALIZATION`.

    >>> normalize(jnp.array([[0, 255]], jnp.uint8), (0.5, 0.5), (0.5, 0.25)).tolist()
    [[-1.0, 2.0]]
    """
    check(
        images.dtype == jnp.uint8,
        f"normalize takes uint8 pixels from 0 to 255, got {images.dtype}; pass the pixels as "
        "they are in the file, or (images - mean) / std of images in [0, 1] to the network.",
    )
    check(
        len(mean) == len(std) == images.shape[-1],
        f"Images with {images.shape[-1]} channels need as many means and stds, "
        f"got {len(mean)} and {len(std)}; use channel_statistics.",
    )
    shift, scale = (
        jnp.expand_dims(jnp.asarray(numbers, jnp.float32), range(images.ndim - 1))
        for numbers in (mean, std)
    )
    return (images.astype(jnp.float32) / 255 - shift) / scale
