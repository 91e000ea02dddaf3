"""Groups of channels of any network, found by tracing it, and the network at other widths."""

from neumeta_jax.elastic.counting import num_macs, num_params
from neumeta_jax.elastic.family import Family, apply_at, trace
from neumeta_jax.elastic.folding import fold, folded
from neumeta_jax.elastic.groups import Group, Groups, Member, Reader
from neumeta_jax.elastic.moments import moments
from neumeta_jax.elastic.refit import refit
from neumeta_jax.elastic.resize import mask_params, permute, select, slice_params
from neumeta_jax.elastic.rules import UnknownPrimitive

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
    "refit",
    "select",
    "slice_params",
    "trace",
]
