"""The papers' INR: one residual MLP of Fourier features per tensor."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core import coordinates
from neumeta_jax.core.coordinates import Coordinates
from neumeta_jax.core.inr.base import INR
from neumeta_jax.core.stacks import TensorStack


class CoordinateMLP(nn.Module):
    """The papers' residual MLP for one tensor (arXiv 2505.05510, section 3).

        h = act(W0 e + b0);  h = h + s * act(W h + b), num_layers - 1 times;  W_out h + b_out

    with e the Fourier features of the normalised coordinates and s learned scalars that start
    at 0.1.
    """

    hidden_width: int
    num_layers: int
    num_frequencies: int
    num_outputs: int
    activation: str

    @nn.compact
    def __call__(self, coords: Coordinates) -> jax.Array:
        """float32[rows, columns, num_outputs] for entries that broadcast to [rows, columns]."""
        entries = coords.entries
        act = {"elu": nn.elu, "relu": nn.relu, "gelu": nn.gelu}[self.activation]
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        features = 1 + 2 * self.num_frequencies
        kernel = self.param("in_kernel", uniform, (len(entries) * features, self.hidden_width))
        kernel = kernel.reshape(len(entries), features, self.hidden_width)
        # Linear in the encodings: entries are projected at their own shape and broadcast, those of
        # one shape together, in one product.
        h = self.param("in_bias", nn.initializers.zeros, (self.hidden_width,))[None, None]
        for shape in dict.fromkeys(entry.shape for entry in entries):
            chosen = [n for n, entry in enumerate(entries) if entry.shape == shape]
            encoded = [
                coordinates.fourier_features(entries[n], self.num_frequencies) for n in chosen
            ]
            weights = jnp.concatenate([kernel[n] for n in chosen])
            h = h + jnp.concatenate(encoded, axis=-1) @ weights
        h = act(h)
        for layer in range(1, self.num_layers):
            scale = self.param(f"scale{layer}", nn.initializers.constant(0.1), ())
            dense = nn.Dense(self.hidden_width, kernel_init=uniform, name=f"hidden{layer}")
            h = h + scale * act(dense(h))
        return nn.Dense(self.num_outputs, kernel_init=uniform, name="out")(h)


@dataclasses.dataclass(frozen=True)
class PerTensorMLP(INR):
    """One `CoordinateMLP` for every generated tensor; its output is divided by C_in.

    The MLPs of a stack lie along a leading axis and run as one batched call.

    Attributes:
        hidden_width, num_layers, num_frequencies, activation: of each MLP. HTTY: 512, 8, 32, "elu"
            (2.04 M parameters each, 187.8 M for ResNet56); NeuMeta: 256, 4, 16, "relu".
        noise_scale: size of the coordinate noise in channels; 1 is the papers' +-0.5.
        noise_per: "query" (papers) or "channel", see `coordinates.add_noise`.
        relative: a channel's coordinate is its share of the width (papers), which suits narrow
            networks that have the channels of the full one averaged; else its number, the same at
            all widths, which suits those that have the first ones.
    """

    hidden_width: int = 512
    num_layers: int = 8
    num_frequencies: int = 32
    activation: str = "elu"
    noise_scale: float = 1.0
    noise_per: str = "query"
    relative: bool = True

    def __post_init__(self):
        if min(self.hidden_width, self.num_layers) < 1 or self.num_frequencies < 0:
            raise ValueError(
                "An INR needs hidden_width >= 1, num_layers >= 1 and num_frequencies >= 0, got "
                f"{self.hidden_width=}, {self.num_layers=}, {self.num_frequencies=}."
            )
        if self.noise_scale < 0:
            raise ValueError(f"noise_scale must be at least 0, got {self.noise_scale}.")
        if self.activation not in ("elu", "relu", "gelu"):
            raise ValueError(f"activation must be one of elu, relu, gelu, got {self.activation!r}.")
        if self.noise_per not in coordinates.NOISE:
            raise ValueError(
                f"noise_per must be one of {coordinates.NOISE}, got {self.noise_per!r}."
            )

    def _mlp(self, stack: TensorStack) -> CoordinateMLP:
        return CoordinateMLP(
            hidden_width=self.hidden_width,
            num_layers=self.num_layers,
            num_frequencies=self.num_frequencies,
            num_outputs=stack.num_outputs,
            activation=self.activation,
        )

    def init(self, key, stacks):
        shapes = {}
        for stack in stacks:
            factors = len(stack.rows.factors) + len(stack.columns.factors)
            dummy = Coordinates.of([jnp.zeros((1, 1))] * (2 + 2 * factors))
            one = jax.eval_shape(self._mlp(stack).init, jax.random.key(0), dummy)["params"]
            count = len(stack.paths)
            shapes[stack.name] = jax.tree.map(lambda x, n=count: (n, *x.shape), one)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(
            shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        # As `CoordinateMLP.init` would draw them one by one, but from a single draw: a generator
        # for each leaf takes longer to compile than everything else.
        sizes = [math.prod(shape) for _, shape in leaves]
        draws = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
        draws = jax.lax.optimization_barrier(draws)  # or it is fused into each of its readers
        values, parts = [], jnp.split(draws, np.cumsum(sizes)[:-1])
        for (path, shape), draw in zip(leaves, parts, strict=True):
            name = path[-1].key
            if name.startswith("scale"):
                values.append(jnp.full(shape, 0.1, jnp.float32))
            elif name.endswith("bias"):
                values.append(jnp.zeros(shape, jnp.float32))
            else:  # uniform(+-1 / sqrt(fan_in)), PyTorch's default
                values.append(draw.reshape(shape) / shape[1] ** 0.5)
        return jax.tree_util.tree_unflatten(treedef, values)

    def __call__(self, inr_params, stacks, widths, *, key=None):
        raw = {}
        for number, stack in enumerate(stacks):
            coords = coordinates.raw_coordinates(stack, widths)
            fan_in = coordinates.fan_in(stack, coords)
            if key is not None and self.noise_scale:
                coords = coordinates.add_noise(
                    jax.random.fold_in(key, number),
                    coords,
                    scale=self.noise_scale,
                    per=self.noise_per,
                )
            coords = coordinates.normalize(coords, stack.norm, relative=self.relative)
            # vmap needs the axis of tensors in every entry.
            tensors = len(stack.paths)
            coords = Coordinates.of(
                jnp.broadcast_to(x, (tensors, *x.shape[1:])) for x in coords.entries
            )
            mlp = self._mlp(stack)
            values = jnp.asarray(
                jax.vmap(lambda p, x, mlp=mlp: mlp.apply({"params": p}, x))(
                    inr_params[stack.name], coords
                )
            )
            raw[stack.name] = values / fan_in[..., None]
        return raw
