"""VGG with batch norm."""

from typing import Any

import flax.linen as nn
import jax

from neumeta_jax.networks.layers import batch_norm, conv


def _stages(*counts: int) -> dict[str, Any]:
    return {"stages": tuple((min(64 * 2**n, 512),) * count for n, count in enumerate(counts))}


# By the number of layers with weights, where the classifier has three (table 1, A to E).
VGG_VARIANTS: dict[Any, dict[str, Any]] = {
    11: _stages(1, 1, 2, 2, 2),
    13: _stages(2, 2, 2, 2, 2),
    16: _stages(2, 2, 3, 3, 3),
    19: _stages(2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions with batch norm, each halved by a maximum, then dense layers.

    Simonyan and Zisserman, arXiv 1409.1556; batch norm as in torchvision's `vgg16_bn`, with biases
    in the convolutions. The default is VGG16 for CIFAR with a linear classifier: 14,728,266
    parameters with 10 classes. With `dense=(512, 512)` it has 15,253,578, and with
    `dense=(4096, 4096)` and 1000 classes, on images of 224 x 224 pixels, torchvision's 138,365,992.
    There is no dropout.

        >>> import jax
        >>> from neumeta_jax.networks import VGG
        >>> net = VGG(stages=((8, 8), (16,)))
        >>> images = jax.numpy.zeros((2, 8, 8, 1))
        >>> params = jax.eval_shape(net.init, jax.random.key(0), images)["params"]
        >>> params["conv3"]["kernel"].shape  # of the second stage
        (3, 3, 8, 16)

    Attributes:
        stages: widths of the convolutions, by stage; `VGG_VARIANTS` has those of 11, 13, 16 and 19.
        dense: widths of the hidden layers of the classifier.
        num_classes: length of the output.
    """

    stages: tuple[tuple[int, ...], ...] = VGG_VARIANTS[16]["stages"]
    dense: tuple[int, ...] = ()
    num_classes: int = 10

    def __post_init__(self):
        super().__post_init__()
        widths = [width for stage in self.stages for width in stage]
        if min((*widths, *self.dense, self.num_classes)) < 1 or not all((widths, *self.stages)):
            raise ValueError(
                "A VGG needs one convolution or more in each stage, and widths and num_classes of "
                f"1 or more, got {self.stages=}, {self.dense=}, {self.num_classes=}."
            )

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""
        if min(images.shape[1:3]) < 2 ** len(self.stages):
            raise ValueError(
                f"A VGG of {len(self.stages)} stages halves images as many times, which "
                f"{images.shape[1]} x {images.shape[2]} pixels do not allow."
            )
        x, number = images, 0
        for stage in self.stages:
            for width in stage:
                number += 1
                x = conv(width, 3, f"conv{number}", use_bias=True)(x)
                x = nn.relu(batch_norm(train, f"bn{number}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for number, width in enumerate(self.dense, start=1):
            x = nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"dense{number}")(x)
            x = nn.relu(x)
        return nn.Dense(self.num_classes, name="head")(x)
