"""Layers that several families share: convolution and batch norm, patches and layer norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def conv(
    width: int,
    size: int,
    name: str,
    *,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = False,
) -> nn.Conv:
    """A convolution of `size` x `size` taps, padded by `size // 2` on every side.

    That is PyTorch's padding; "SAME" pads a stride of 2 on the other side.
    """
    return nn.Conv(
        width,
        (size, size),
        strides=stride,
        padding=size // 2,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """PyTorch's batch norm: epsilon 1e-5, and Flax's momentum of 0.9 is its 0.1.

    With `train` it normalises by the statistics of the batch, and "batch_stats", if mutable, move
    towards them.
    """
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


def patches(images: jax.Array, patch: int, width: int, name: str) -> jax.Array:
    """Patches of `patch` x `patch` pixels, embedded linearly, float[batch, patches, width]."""
    batch, *size, _ = images.shape
    if any(pixels % patch or not pixels for pixels in size):
        raise ValueError(
            f"The height and width of images must be multiples of the patch of {patch} pixels, "
            f"got {size[0]} x {size[1]}."
        )
    embed = nn.Conv(
        width,
        (patch, patch),
        strides=patch,
        padding="VALID",
        kernel_init=nn.initializers.lecun_normal(),
        name=name,
    )
    return embed(images).reshape(batch, -1, width)


class LayerNorm(nn.Module):
    """A layer norm that knows which of its channels there are.

        y = (x - m) / sqrt(v + epsilon) * scale + bias,
        m = sum_c k_c x_c / sum_c k_c,   v = sum_c k_c (x_c - m)^2 / sum_c k_c

    k_c is 0 where channel c of the variable "kept" is 0, else 1. "kept" is float[channels], of the
    collection "channels": all ones, which makes this the usual layer norm. It is no parameter and
    gets no gradient. A network whose channels from some width on are zero, those of "kept" among
    them, computes what the narrower network does; with the number of channels written into the
    program, as usual, the width of a stream could not vary. Variables without the collection are
    those of the full width.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if self.is_initializing() or self.has_variable("channels", "kept"):
            kept = self.variable("channels", "kept", jnp.ones, shape).value
        else:
            kept = jnp.ones(shape)
        kept = jnp.abs(jnp.sign(kept))

        def total(x):
            return jnp.dot(x, kept, precision="highest")[..., None]

        count = total(kept)
        x = x - total(x) / count
        return x * jax.lax.rsqrt(total(x * x) / count + self.epsilon) * scale + bias
