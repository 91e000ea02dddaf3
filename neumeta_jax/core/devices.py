"""Sharing out batches over devices; parameters and optimiser lie on each of them.

Training images (uint8, 154 MB for CIFAR) lie on every device too: an epoch's order is random, so
that shared-out images would travel in every step. Each device computes the gradient of an equal
share of every batch, and one sum per step makes the devices equal again. What is random is drawn
for the whole batch, so that it does not depend on the number of devices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.errors import check

DATA_AXIS = "data"


def data_mesh(
    recipes: Mapping[str, Any], devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh | None:
    """A mesh whose axis "data" shares out the batches of `recipes`; None for a single device.

    Args:
        recipes: with a `batch_size`, and perhaps a `micro_batch`, by section of the config.
        devices: default all devices, those of other processes included.

    Raises:
        UsageError: if a batch cannot be shared equally.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if count == 1:
        return None
    for section, recipe in recipes.items():
        size, micro = recipe.batch_size, getattr(recipe, "micro_batch", 0)
        check(
            size % count == 0,
            f"{section}.batch_size must be a multiple of the {count} devices, got {size}; change "
            "it or show this process fewer devices (CUDA_VISIBLE_DEVICES).",
        )
        share = size // count
        check(
            not micro or share <= micro or share % micro == 0,
            f"{section}.micro_batch must divide each device's share of the batch, {share} of "
            f"{size} images, got {micro}; change it or set it to 0.",
        )
    return jax.sharding.Mesh(np.array(devices), (DATA_AXIS,))


def replicate(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """`tree`, the same in all processes, on every device of `mesh`; as it is without one."""
    if mesh is None:
        return tree
    everywhere = jax.NamedSharding(mesh, jax.P())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)))
        if isinstance(x, jax.Array) and x.sharding == everywhere:
            return x
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])

    return jax.tree.map(one, tree)


def on_default_device(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """A replicated `tree` as a program that knows of one device only would have it."""
    if mesh is None:
        return tree
    # Through the host: arrays that are tied to a device compile every program a second time.
    return jax.tree.map(lambda x: jnp.array(np.asarray(x)), tree)
