"""Whether a smaller network answers as the full one does: more than its accuracy says.

A device that switches to a smaller network must not change its mind. All functions take logits
float[images, classes] of the same images in the same order and compute in float64. No JAX import.
"""

from typing import NamedTuple

import numpy as np

NUM_BINS = 15  # Guo et al. 2017


class WorstClass(NamedTuple):
    """The class that loses most, and how much of its accuracy, in [-1, 1] (0.05 = 5 points)."""

    label: int
    drop: float


class Consistency(NamedTuple):
    """One network against the full one on the same images.

    Attributes:
        agreement: share of the images that both classify alike, in [0, 1].
        kl_divergence: mean of KL(full network || this one), in nats.
        calibration_error: expected calibration error of this network, in [0, 1].
        worst_class, worst_class_drop: see `worst_class`.
    """

    agreement: float
    kl_divergence: float
    calibration_error: float
    worst_class: int
    worst_class_drop: float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64[images, classes], log-probabilities."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def agreement(logits: np.ndarray, reference: np.ndarray) -> float:
    """Share of the images whose largest logit is that of the reference, in [0, 1].

    >>> agreement(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [2.0, 0.0]]))
    0.5
    """
    _check(logits, reference)
    return float(np.mean(np.argmax(logits, axis=-1) == np.argmax(reference, axis=-1)))


def kl_divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Mean over the images of KL(p || q) = sum_k p_k (log p_k - log q_k), in nats.

    p is the softmax of the reference and q that of `logits`.
    """
    _check(logits, reference)
    p, q = log_softmax(reference), log_softmax(logits)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def expected_calibration_error(
    logits: np.ndarray, labels: np.ndarray, *, num_bins: int = NUM_BINS
) -> float:
    """How far confidence and accuracy are apart, in [0, 1].

        ECE = sum_m |B_m| / n * |accuracy(B_m) - mean confidence(B_m)|,

    where B_m are the images whose largest probability lies in ((m - 1) / M, m / M].

    Reference: Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.

    Args:
        logits: float[images, classes].
        labels: int[images].
        num_bins: M.
    """
    _check(logits, labels=labels)
    confidence = np.exp(log_softmax(logits).max(axis=-1))
    right = np.argmax(logits, axis=-1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    # |B_m| / n * |mean - mean| is the absolute sum of the differences over n.
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def worst_class(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> WorstClass:
    """The class whose accuracy falls most against the reference; the first of several.

    Classes without an image do not count. A negative drop means that every class has gained.
    """
    _check(logits, reference, labels)
    num_classes = logits.shape[-1]
    images = np.bincount(labels, minlength=num_classes)

    def right(some):
        return np.bincount(labels[np.argmax(some, axis=-1) == labels], minlength=num_classes)

    lost = right(reference) - right(logits)
    drops = np.where(images > 0, lost / np.maximum(images, 1), -np.inf)
    label = int(np.argmax(drops))
    return WorstClass(label, float(drops[label]))


def compare(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> Consistency:
    """All of it: `logits` of one network against those of the full one, `reference`."""
    label, drop = worst_class(logits, reference, labels)
    return Consistency(
        agreement=agreement(logits, reference),
        kl_divergence=kl_divergence(logits, reference),
        calibration_error=expected_calibration_error(logits, labels),
        worst_class=label,
        worst_class_drop=drop,
    )


def _check(logits, reference=None, labels=None) -> None:
    if np.ndim(logits) != 2 or len(logits) == 0:
        raise ValueError(
            "logits must be float[images, classes] with at least one image, got shape "
            f"{np.shape(logits)}."
        )
    if reference is not None and np.shape(reference) != np.shape(logits):
        raise ValueError(
            f"The reference must have the shape of the logits, {np.shape(logits)}, got "
            f"{np.shape(reference)}; evaluate both on the same images."
        )
    if labels is not None and (
        np.shape(labels) != np.shape(logits)[:1]
        or np.min(labels) < 0
        or np.max(labels) >= np.shape(logits)[1]
    ):
        raise ValueError(
            f"labels must be one of 0 to {np.shape(logits)[1] - 1} for each of {len(logits)} "
            f"images, got shape {np.shape(labels)} and {np.min(labels)} to {np.max(labels)}."
        )
