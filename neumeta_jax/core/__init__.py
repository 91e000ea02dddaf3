"""The method, for any network: groups of channels, networks at other widths, hypernetworks."""

from neumeta_jax.core.family import Family, apply_at, num_macs, trace
from neumeta_jax.core.folding import fold, folded
from neumeta_jax.core.groups import Group, Groups, Member, Reader, num_params
from neumeta_jax.core.moments import moments
from neumeta_jax.core.resize import mask_params, permute, select, slice_params
from neumeta_jax.core.rules import UnknownPrimitive

__all__ = [
    "Family",
    "Group",
    "Groups",
    "Member",
    "Reader",
    "UnknownPrimitive",
    "apply_at",
    "fold",
    "folded",
    "mask_params",
    "moments",
    "num_macs",
    "num_params",
    "permute",
    "select",
    "slice_params",
    "trace",
]
