"""The INR kinds: pure functions from coordinates of model space to raw weights.

    per_tensor_mlp   the papers': one residual MLP of Fourier features per tensor
    grid             learned values, averaged over each channel's cell
    projection       learned values; a smaller network is the least-squares projection of the full

A new kind is a module here with a frozen dataclass that derives from `INR`, and a line in
`INR_KINDS`.
"""

import dataclasses
from typing import Any

from neumeta_jax.core.inr.base import INR
from neumeta_jax.core.inr.grid import Grid
from neumeta_jax.core.inr.mlp import CoordinateMLP, PerTensorMLP
from neumeta_jax.core.inr.projection import Projection

__all__ = [
    "INR",
    "INR_KINDS",
    "CoordinateMLP",
    "Grid",
    "PerTensorMLP",
    "Projection",
    "describe_inr",
    "make_inr",
]

INR_KINDS: dict[str, type] = {
    "per_tensor_mlp": PerTensorMLP,
    "grid": Grid,
    "projection": Projection,
}


def make_inr(kind: str, **fields: Any) -> INR:
    """The INR of `kind` (a key of `INR_KINDS`) with the given fields.

    Raises:
        ValueError: for an unknown kind or field.
    """
    if kind not in INR_KINDS:
        raise ValueError(f"The INR kind must be one of {sorted(INR_KINDS)}, got {kind!r}.")
    cls = INR_KINDS[kind]
    if not fields.get("channel_dropout", True):
        del fields["channel_dropout"]  # an option of earlier versions, switched off
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = set(fields) - known
    if unknown:
        raise ValueError(
            f"An INR of kind {kind!r} takes {sorted(known)}, got also {sorted(unknown)}."
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def describe_inr(inr: INR) -> dict[str, Any]:
    """`{"kind": ..., **fields}` in JSON types, so that `make_inr(**describe_inr(inr)) == inr`."""
    for kind, cls in INR_KINDS.items():
        if type(inr) is cls:
            fields = {f.name: getattr(inr, f.name) for f in dataclasses.fields(cls)}
            return {"kind": kind, **fields}
    raise ValueError(f"{type(inr).__name__} is not in INR_KINDS; add it there to save it.")
