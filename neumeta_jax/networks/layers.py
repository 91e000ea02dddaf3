"""The convolution and the batch norm that the convolutional families share."""

import flax.linen as nn


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
