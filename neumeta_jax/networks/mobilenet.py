"""MobileNetV2: inverted residuals with depthwise convolutions."""

from typing import NamedTuple

import flax.linen as nn
import jax

from neumeta_jax.networks.layers import batch_norm, conv


class Stage(NamedTuple):
    """A row of the paper's table 2: `blocks` inverted residuals, the first of stride `stride`."""

    expansion: int
    width: int
    blocks: int
    stride: int


IMAGENET_STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


def scaled_width(width: int, multiple: float) -> int:
    """`width` times `multiple`, rounded to 8 channels, but not by more than a tenth down.

    A multiple of 1 leaves every width as it is.

        >>> [scaled_width(32, multiple) for multiple in (1, 0.75, 0.35, 1.4)]
        [32, 24, 16, 48]
    """
    if multiple == 1:
        return width
    rounded = max(8, int(width * multiple + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width * multiple else rounded + 8


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler, Howard, Zhu, Zhmoginov and Chen, arXiv 1801.04381).

    The default is the paper's for ImageNet, with torchvision's 3,504,872 parameters with 1000
    classes (1,968,680 at `width_multiple` 0.5). There is no dropout before the classifier.

    With strides of 1 it takes smaller images. The usual one for CIFAR has `stem_stride=1` and a
    stride of 1 in the second stage, which leaves 4 x 4 pixels of 32 x 32: 2,236,682 parameters with
    10 classes.

        >>> import jax
        >>> from neumeta_jax.networks import MobileNetV2
        >>> net = MobileNetV2(stages=((1, 8, 1, 1), (4, 12, 2, 2)), stem_width=8, stem_stride=1)
        >>> images = jax.numpy.zeros((2, 8, 8, 1))
        >>> params = jax.eval_shape(net.init, jax.random.key(0), images)["params"]
        >>> params["stage2_block0"]["expand"]["kernel"].shape
        (1, 1, 8, 32)

    Attributes:
        stages: (expansion, width, blocks, stride) of each, see `Stage`.
        stem_width, stem_stride: of the first convolution.
        head_width: channels of the last convolution.
        width_multiple: of all widths, see `scaled_width`; that of the head does not shrink.
        num_classes: length of the output.
    """

    stages: tuple[tuple[int, int, int, int], ...] = IMAGENET_STAGES
    stem_width: int = 32
    stem_stride: int = 2
    head_width: int = 1280
    width_multiple: float = 1.0
    num_classes: int = 1000

    def __post_init__(self):
        super().__post_init__()
        if any(len(stage) != 4 or min(stage) < 1 for stage in self.stages):
            raise ValueError(
                "A stage of a MobileNetV2 is (expansion, width, blocks, stride), each 1 or more, "
                f"got {self.stages=}."
            )
        if min(self.stem_width, self.stem_stride, self.head_width, self.num_classes) < 1:
            raise ValueError(
                "A MobileNetV2 needs stem_width, stem_stride, head_width and num_classes of 1 or "
                f"more, got {self.stem_width=}, {self.stem_stride=}, {self.head_width=}, "
                f"{self.num_classes=}."
            )
        if not self.width_multiple > 0:
            raise ValueError(f"width_multiple must be positive, got {self.width_multiple}.")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""

        def width_of(width):
            return scaled_width(width, self.width_multiple)

        x = conv(width_of(self.stem_width), 3, "stem", stride=self.stem_stride)(images)
        x = nn.relu6(batch_norm(train, "stem_bn")(x))
        for number, (expansion, width, blocks, stride) in enumerate(self.stages, start=1):
            for block in range(blocks):
                x = InvertedResidual(
                    width_of(width),
                    expansion,
                    stride if block == 0 else 1,
                    name=f"stage{number}_block{block}",
                )(x, train=train)
        head_width = scaled_width(self.head_width, max(1.0, self.width_multiple))
        x = nn.relu6(batch_norm(train, "last_bn")(conv(head_width, 1, "last")(x)))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class InvertedResidual(nn.Module):
    """Expands the channels, convolves each by itself, and projects them to `width` linearly.

    The input is added where the stride is 1 and the width stays. There is no expansion by 1.
    """

    width: int
    expansion: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y, hidden = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = nn.relu6(batch_norm(train, "expand_bn")(conv(hidden, 1, "expand")(y)))
        y = conv(hidden, 3, "depthwise", stride=self.stride, groups=hidden)(y)
        y = nn.relu6(batch_norm(train, "depthwise_bn")(y))
        y = batch_norm(train, "project_bn")(conv(self.width, 1, "project")(y))
        return x + y if self.stride == 1 and x.shape == y.shape else y
