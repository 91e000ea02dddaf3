"""Consistency between two networks, against values computed by hand."""

import math

import numpy as np
import pytest
from networks import refused

from neumeta_jax.errors import UsageError
from neumeta_jax.evaluation.consistency import compare, expected_calibration_error

# Softmax of log(p) is p.
P = np.log([[0.5, 0.5], [0.75, 0.25], [0.2, 0.8]])
Q = np.log([[0.25, 0.75], [0.75, 0.25], [0.4, 0.6]])


ANY = np.array([0, 0, 1])  # labels


def kl_divergence(logits, reference):
    return compare(logits, reference, np.zeros(len(logits), int)).kl_divergence


def test_kl_divergence_is_the_mean_over_images_in_nats_from_the_reference():
    by_hand = [
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
        0.0,
        0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6),
    ]
    assert kl_divergence(Q, P) == pytest.approx(sum(by_hand) / 3)
    assert kl_divergence(P, Q) != pytest.approx(sum(by_hand) / 3)


def test_softmax_takes_logits_of_any_offset_and_size():
    shifted = (P + np.array([[100.0], [-3.0], [1e4]])).astype(np.float32)
    assert kl_divergence(shifted, P) == pytest.approx(0.0, abs=1e-6)
    certain = np.array([[2000.0, 0.0, -2000.0]])
    assert kl_divergence(certain, certain) == 0.0
    assert kl_divergence(certain[:, ::-1], certain) == pytest.approx(4000.0)


def test_agreement_is_of_the_predictions_not_of_the_labels():
    logits = np.array([[3.0, 1, 2], [0, 5, 1], [0, 1, 2], [9, 0, 1]])
    reference = np.array([[1.0, 0, 0], [0, 0, 1], [0, 0, 1], [2, 1, 0]])
    assert compare(logits, reference, np.array([1, 1, 0, 0])).agreement == 0.75


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_images():
    # Confidences 0.9, 0.8 (wrong), 0.62, 0.61 (wrong); with 15 bins, the last two share one.
    logits = np.log([[0.9, 0.1], [0.8, 0.2], [0.62, 0.38], [0.39, 0.61]])
    labels = np.array([0, 1, 0, 0])
    by_hand = (abs(1 - 0.9) + abs(0 - 0.8) + abs(1 - 0.62 - 0.61)) / 4
    assert expected_calibration_error(logits, labels) == pytest.approx(by_hand)
    one_bin = abs(2 - 0.9 - 0.8 - 0.62 - 0.61) / 4
    found = expected_calibration_error(logits, labels, num_bins=1)
    assert found == pytest.approx(one_bin)


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower_one():
    logits = np.log([[0.5, 0.3, 0.2], [0.45, 0.3, 0.25]])  # bins (0.25, 0.5] for both
    found = expected_calibration_error(logits, np.array([0, 1]), num_bins=4)
    assert found == pytest.approx(abs(1 - 0.5 - 0.45) / 2)
    certain = np.array([[800.0, 0.0]])
    assert expected_calibration_error(certain, np.array([1])) == 1.0


def worst_class(logits, reference, labels):
    return compare(logits, reference, labels)[3:]


def test_the_worst_class_is_the_one_whose_share_of_right_images_falls_most():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    reference = np.eye(4)[[0, 0, 0, 0, 1, 1, 0]]
    logits = np.eye(4)[[0, 0, 1, 1, 1, 0, 2]]  # 0 loses 2 of 4, 1 loses 1 of 2, 2 gains; 3 has none
    assert worst_class(logits, reference, labels) == (0, 0.5)
    logits = np.eye(4)[[0, 0, 0, 1, 1, 0, 2]]
    assert worst_class(logits, reference, labels) == (1, 0.5)
    assert worst_class(np.eye(4)[labels], reference, labels) == (0, 0.0)
    assert worst_class(np.eye(4)[[2]], np.eye(4)[[0]], np.array([2])) == (2, -1.0)


def test_the_full_network_agrees_with_itself():
    labels = np.array([0, 0, 0])
    found = compare(P, P, labels)
    error = expected_calibration_error(P, labels)
    assert found == (1.0, 0.0, error, 0, 0.0)
    found = compare(Q, P, ANY)
    assert (found.agreement, found.worst_class, found.worst_class_drop) == (2 / 3, 0, 0.5)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((P[0], P[0], ANY), r"at least one image, got shape \(2,\)"),
        ((P[:0], P[:0], ANY), r"got shape \(0, 2\)"),
        ((P, P[:2], ANY), r"\(3, 2\), got \(2, 2\)"),
        ((P, P, ANY[:2]), "for each of 3 images"),
        ((P, P, np.array([0, 1, 2])), "one of 0 to 1 .* 0 to 2"),
    ],
)
def test_what_does_not_belong_together_is_refused(arguments, match):
    with refused(match, UsageError):
        compare(*arguments)
