"""MLP-Mixer."""

from typing import Any

import flax.linen as nn
import jax

from neumeta_jax.networks.layers import LayerNorm, patches


def _variant(patch: int, width: int, depth: int) -> dict[str, Any]:
    hidden = {"token_width": width // 2, "channel_width": 4 * width}
    return {"patch": patch, "width": width, "depth": depth} | hidden


MIXER_VARIANTS: dict[Any, dict[str, Any]] = {  # table 1
    "S/32": _variant(32, 512, 8),
    "S/16": _variant(16, 512, 8),
    "B/32": _variant(32, 768, 12),
    "B/16": _variant(16, 768, 12),
    "L/32": _variant(32, 1024, 24),
    "L/16": _variant(16, 1024, 24),
    "H/14": _variant(14, 1280, 32),
}


class MLPMixer(nn.Module):
    """An MLP-Mixer (Tolstikhin et al., arXiv 2105.01601).

    Patches are embedded linearly; each block adds a hidden layer over the patches, the same for
    every channel, and one over the channels, both of what a layer norm leaves of the stream. There
    is no dropout. The number of patches is in the weights: a network has one size of images.

    The default is S/16: 18,528,264 parameters with 1000 classes on images of 224 x 224 pixels. B/16
    has 59,880,472, L/16 208,196,168 and H/14 432,350,952, as in the authors' code.

        >>> import jax
        >>> from neumeta_jax.networks import MLPMixer
        >>> net = MLPMixer(patch=2, width=24, depth=2, token_width=12, channel_width=48)
        >>> params = net.init(jax.random.key(0), jax.numpy.zeros((2, 8, 8, 1)))["params"]
        >>> params["block0"]["token_mixing"]["up"]["kernel"].shape  # from 4 x 4 patches
        (16, 12)

    Attributes:
        patch: height and width of a patch in pixels.
        width: channels of the residual stream, C in the paper.
        depth: number of blocks.
        token_width, channel_width: of the hidden layers over patches, D_S, and channels, D_C.
        num_classes: length of the output.
    """

    patch: int = 16
    width: int = 512
    depth: int = 8
    token_width: int = 256
    channel_width: int = 2048
    num_classes: int = 1000

    def __post_init__(self):
        super().__post_init__()
        names = ("patch", "width", "depth", "token_width", "channel_width", "num_classes")
        numbers = {name: getattr(self, name) for name in names}
        if min(numbers.values()) < 1:
            raise ValueError(f"An MLPMixer needs numbers of 1 or more, got {numbers}.")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""
        del train  # for the sake of the other families
        x = patches(images, self.patch, self.width, "embed")
        for number in range(self.depth):
            x = MixerBlock(self.token_width, self.channel_width, name=f"block{number}")(x)
        x = LayerNorm(name="norm")(x).mean(1)
        return nn.Dense(self.num_classes, name="head")(x)


class MixerBlock(nn.Module):
    """x += mix_tokens(norm(x)^T)^T; x += mix_channels(norm(x)), float[batch, patches, width]."""

    token_width: int
    channel_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = LayerNorm(name="norm1")(x).swapaxes(1, 2)
        x += HiddenLayer(self.token_width, name="token_mixing")(y).swapaxes(1, 2)
        y = LayerNorm(name="norm2")(x)
        return x + HiddenLayer(self.channel_width, name="channel_mixing")(y)


class HiddenLayer(nn.Module):
    """down(gelu(up(x))), over the last axis of x."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(nn.Dense(self.width, name="up")(x))
        return nn.Dense(x.shape[-1], name="down")(hidden)
