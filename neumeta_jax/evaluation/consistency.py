"""Whether a smaller network answers as the full one does: more than its accuracy says.

A device that switches to a smaller network must not change its mind. All functions take logits
float[images, classes] of the same images in the same order and compute in float64. No JAX import.
"""

from typing import NamedTuple

import numpy as np

from neumeta_jax.errors import check

NUM_BINS = 15  # Guo et al. 2017


class Consistency(NamedTuple):
    """One network against the full one on the same images.

    Attributes:
        agreement: share of the images that both classify alike, in [0, 1].
        kl_divergence: mean of KL(p || q) = sum_k p_k (log p_k - log q_k), in nats; p is the
            softmax of the full network and q that of this one.
        calibration_error: `expected_calibration_error` of this network, in [0, 1].
        worst_class: the class whose accuracy falls most, the first of several; classes without an
            image do not count.
        worst_class_drop: by how much, in [-1, 1] (0.05 = 5 points); negative if every class gains.
    """

    agreement: float
    kl_divergence: float
    calibration_error: float
    worst_class: int
    worst_class_drop: float


def compare(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> Consistency:
    """`logits` of one network against those of the full one, `reference`; labels int[images]."""
    error = expected_calibration_error(logits, labels)
    check(
        np.shape(reference) == np.shape(logits),
        f"The reference must have the shape of the logits, {np.shape(logits)}, got "
        f"{np.shape(reference)}; evaluate both on the same images.",
    )
    p, q = log_softmax(reference), log_softmax(logits)
    classes, wanted = np.argmax(logits, axis=-1), np.argmax(reference, axis=-1)
    size = logits.shape[-1]
    images, now, before = (
        np.bincount(labels[some], minlength=size)
        for some in (slice(None), classes == labels, wanted == labels)
    )
    drops = np.where(images > 0, (before - now) / np.maximum(images, 1), -np.inf)
    return Consistency(
        agreement=float(np.mean(classes == wanted)),
        kl_divergence=float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))),
        calibration_error=error,
        worst_class=int(np.argmax(drops)),
        worst_class_drop=float(np.max(drops)),
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64[images, classes], log-probabilities."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected_calibration_error(
    logits: np.ndarray, labels: np.ndarray, *, num_bins: int = NUM_BINS
) -> float:
    """How far confidence and accuracy are apart, in [0, 1].

        ECE = sum_m |B_m| / n * |accuracy(B_m) - mean confidence(B_m)|,

    where B_m are the images whose largest probability lies in ((m - 1) / num_bins, m / num_bins].

    Reference: Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
    """
    shape = np.shape(logits)
    check(
        len(shape) == 2 and len(logits),
        f"logits must be float[images, classes] with at least one image, got shape {shape}.",
    )
    check(
        np.shape(labels) == shape[:1] and np.min(labels) >= 0 and np.max(labels) < shape[1],
        f"labels must be one of 0 to {shape[-1] - 1} for each of {len(logits)} images, got shape "
        f"{np.shape(labels)} and {np.min(labels)} to {np.max(labels)}.",
    )
    confidence = np.exp(log_softmax(logits).max(axis=-1))
    right = np.argmax(logits, axis=-1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    # |B_m| / n * |mean - mean| is the absolute sum of the differences over n.
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))
