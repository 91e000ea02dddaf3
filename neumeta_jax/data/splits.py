"""Which images are set apart."""

import numpy as np


def stratified(labels: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """A bool mask [len(labels)] of `count` examples, from each class in proportion to its size.

    Equal arguments give equal masks on every machine, for ever: a split that changed with a version
    of NumPy would leak validation images into training.
    """
    # RandomState, because NumPy keeps its stream unchanged (NEP 19), unlike Generator's.
    rng = np.random.RandomState(seed)
    sizes = np.bincount(labels)
    quotas, remainders = np.divmod(count * sizes.astype(np.int64), len(labels))
    # The largest remainders get the rest; which of equal ones is drawn, not always the first class.
    ties = rng.permutation(len(sizes))
    quotas[np.lexsort((ties, -remainders))[: count - quotas.sum()]] += 1
    mask = np.zeros(len(labels), bool)
    for label, quota in enumerate(quotas):
        mask[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return mask
