"""Weights of a folded network as 8-bit integers: one symmetric scale for each output channel.

    w  ~  s q,    s = max |w| / 127,    q = round(w / s) in [-127, 127]

so that |w - s q| <= s / 2. Scales of zero weights are 0. Biases stay float32: they are added to
32-bit sums, and are 1 % of the numbers. The scheme is that of Krishnamoorthi, "Quantizing deep
convolutional networks for efficient inference", 2018 (arXiv 1806.08342), section 3, and of ONNX,
LiteRT and onnxruntime.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.networks.cifar_resnet import Params

LARGEST = 127  # -128 is left out, so that the scheme is symmetric


def quantize_kernel(kernel: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(int8 of the kernel's shape, scales float32[C_out]); the output channels are the last axis.

    >>> q, scale = quantize_kernel(jnp.array([[1.27, 0.0], [-0.64, 0.0]]))
    >>> q.tolist(), round(float(scale[0]), 4), float(scale[1])
    ([[127, 0], [-64, 0]], 0.01, 0.0)
    """
    kernel = jnp.asarray(kernel, jnp.float32)
    axes = tuple(range(kernel.ndim - 1))
    scale = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True) / LARGEST
    ratio = kernel / jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(jnp.round(ratio), -LARGEST, LARGEST).astype(jnp.int8), scale.ravel()


@jax.jit
def quantize(params: Mapping) -> Params:
    """A folded tree with each kernel as int8 and its "scale" float32[C_out] beside it."""

    def layer(tree):
        kernel, scale = quantize_kernel(tree["kernel"])
        return {**tree, "kernel": kernel, "scale": scale}

    return _each_layer(params, layer)


@jax.jit
def dequantize(params: Mapping) -> Params:
    """The float32 tree of what `quantize` returned; of others, themselves."""

    def layer(tree):
        if "scale" not in tree:
            return dict(tree)
        # Not jnp.asarray(..., float32), which would put float32 constants into an exported graph.
        kernel = jnp.asarray(tree["kernel"]).astype(jnp.float32)
        kernel = kernel * jnp.expand_dims(tree["scale"], range(kernel.ndim - 1))
        return {name: value for name, value in tree.items() if name != "scale"} | {"kernel": kernel}

    return _each_layer(params, layer)


def fake_quantize(params: Mapping) -> Params:
    """`dequantize(quantize(params))`: what a network with int8 weights computes with.

    Channels masked to zero change nothing, so a padded tree gives the same as the dense one.
    """
    return dequantize(quantize(params))


def _each_layer(tree: Mapping, function: Callable[[Mapping], Params]) -> Params:
    """`tree` with `function` applied to what has a kernel; what is no layer stays as it is."""
    if "kernel" in tree:
        return function(tree)
    return {
        name: _each_layer(part, function) if isinstance(part, Mapping) else part
        for name, part in tree.items()
    }
