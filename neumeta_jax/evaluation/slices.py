"""Weights as a function of the width, to look at."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from neumeta_jax.core import hypernetwork as hyper
from neumeta_jax.networks.families import Family

SLICE_RATIOS = (0.1, 1.25)


@dataclasses.dataclass(frozen=True)
class WeightSlices:
    """The kernels that read the channels of one group, at several widths.

    Attributes:
        block: its name, for example "stage3_block7".
        full_width: its hidden width in the full-size network.
        widths: int[n], hidden widths, increasing.
        kernels: float32[n, 3, 3, hidden, C_out], NaN in channels that are not there.
    """

    block: str
    full_width: int
    widths: np.ndarray
    kernels: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _readers(family, sizes, path, params, widths):
    def kernel(row):
        return family.groups.leaves(hyper.generate(family, params, row, sizes=sizes))[path]

    return jax.lax.map(kernel, widths)


def weight_slices(family: Family, params: Mapping) -> WeightSlices:
    """What reads the last group of hidden channels of a ResNet at every width that it takes.

    The widths are all integers between those of `SLICE_RATIOS`. The kernels are those of the
    network, SkipInit's scalar included; coordinates are exact.
    """
    groups = family.groups
    readers = [
        [r.path for r in groups.readers if groups.axes[r.path][r.reads[0]].group == name]
        for name in family.names
    ]
    # Residual streams, each with several readers, are the last groups where they vary.
    place = max(n for n, paths in enumerate(readers) if len(paths) == 1)
    (path,), full_width = readers[place], family.full_widths[place]
    first, last = (int(family.widths(ratio)[place]) for ratio in SLICE_RATIOS)
    widths = np.arange(first, last + 1)
    # Each integer width of this block as a ratio; the others follow it, as in any network. A width
    # that was rounded up may lie beyond the largest ratio.
    ratios = np.minimum(widths / full_width, SLICE_RATIOS[1])
    rows = np.array([family.widths(float(ratio)) for ratio in ratios], np.int32)
    widest = np.maximum(rows.max(axis=0), family.full_widths)
    kernels = _readers(family, tuple(widest.tolist()), path, dict(params), jnp.asarray(rows))
    kernels = np.array(kernels)
    reads, writes = groups.axes[path][-2:]
    for kernel, row in zip(kernels, rows, strict=True):
        at = family.by_name(row), family.by_name(widest)
        kernel[:, :, ~np.asarray(reads.mask(*at))] = np.nan
        kernel[..., ~np.asarray(writes.mask(*at))] = np.nan
    return WeightSlices(family.names[place].partition("/")[0], full_width, widths, kernels)
