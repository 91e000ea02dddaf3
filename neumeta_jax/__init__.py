"""Train one function and get from it every size of a network."""

from typing import Any


def load(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The (hypernetwork, params, metadata) of a trained INR, see `checkpoint.load_inr`.

    `name` is one of `checkpoint.pretrained()`, a work directory of train.py, or a file.
    """
    from neumeta_jax import checkpoint  # imports JAX, which a look at the package need not

    return checkpoint.load_inr(name)
