"""Vision transformers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from neumeta_jax.networks.layers import LayerNorm, patches

VIT_VARIANTS: dict[Any, dict[str, Any]] = {
    "Ti/16": {"patch": 16, "width": 192, "depth": 12, "heads": 3},
    "S/16": {"patch": 16, "width": 384, "depth": 12, "heads": 6},
    "B/16": {"patch": 16, "width": 768, "depth": 12, "heads": 12},
    "B/32": {"patch": 32, "width": 768, "depth": 12, "heads": 12},
    "L/16": {"patch": 16, "width": 1024, "depth": 24, "heads": 16},
}

POOLS = ("token", "mean")


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929).

    Patches are embedded linearly, and learned positions added; each block adds attention and a
    hidden layer, both of what a layer norm leaves of the stream. There is no dropout.

    The default is Ti/16 of DeiT (Touvron et al., arXiv 2012.12877): 5,717,416 parameters with 1000
    classes on images of 224 x 224 pixels. S/16 has 22,050,664, and the paper's B/16 86,567,656,
    B/32 88,224,232 and L/16 304,326,632, as in timm.

        >>> import jax
        >>> from neumeta_jax.networks import ViT
        >>> net = ViT(patch=2, width=24, depth=2, heads=3, num_classes=10)
        >>> images = jax.numpy.zeros((2, 8, 8, 1))
        >>> params = jax.eval_shape(net.init, jax.random.key(0), images)["params"]
        >>> params["positions"].shape  # 4 x 4 patches and the class token
        (1, 17, 24)

    Attributes:
        patch: height and width of a patch in pixels.
        width: channels of the residual stream.
        depth: number of blocks.
        heads: of the attention; their channels are `width` divided by `heads`.
        mlp_ratio: channels of the hidden layer of a block, divided by `width`.
        pool: what the classifier reads: a class "token", or the "mean" over the patches (Beyer,
            Zhai and Kolesnikov, arXiv 2205.01580).
        num_classes: length of the output.
    """

    patch: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    pool: str = "token"
    num_classes: int = 1000

    def __post_init__(self):
        super().__post_init__()
        if min(self.patch, self.width, self.depth, self.heads, self.num_classes) < 1:
            raise ValueError(
                "A ViT needs patch, width, depth, heads and num_classes of 1 or more, got "
                f"{self.patch=}, {self.width=}, {self.depth=}, {self.heads=}, {self.num_classes=}."
            )
        if self.width % self.heads:
            raise ValueError(
                f"The width of a ViT must be a multiple of its heads, got {self.width=}, "
                f"{self.heads=}."
            )
        if int(self.mlp_ratio * self.width) < 1:
            raise ValueError(f"mlp_ratio must leave a hidden channel, got {self.mlp_ratio}.")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {self.pool!r}.")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels].

        `train` is there for the sake of the other families.
        """
        del train
        x = patches(images, self.patch, self.width, "embed")
        if self.pool == "token":
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x += self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        for number in range(self.depth):
            hidden = int(self.mlp_ratio * self.width)
            x = TransformerBlock(self.heads, hidden, name=f"block{number}")(x)
        x = LayerNorm(name="norm")(x)
        x = x[:, 0] if self.pool == "token" else x.mean(1)
        return nn.Dense(self.num_classes, name="head")(x)


class TransformerBlock(nn.Module):
    """x += attention(norm(x)); x += down(gelu(up(norm(x)))), float[batch, tokens, width]."""

    heads: int
    hidden_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        xavier = nn.initializers.xavier_uniform()
        attention = nn.MultiHeadDotProductAttention(
            self.heads, kernel_init=xavier, name="attention"
        )
        x += attention(LayerNorm(name="norm1")(x))
        up = nn.Dense(self.hidden_width, kernel_init=xavier, name="up")
        down = nn.Dense(x.shape[-1], kernel_init=xavier, name="down")
        return x + down(nn.gelu(up(LayerNorm(name="norm2")(x)), approximate=False))
