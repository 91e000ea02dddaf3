"""Consistency between two networks, against values computed by hand."""

import math

import numpy as np
import pytest

from neumeta_jax.evaluation import consistency

# Softmax of log(p) is p.
P = np.log([[0.5, 0.5], [0.75, 0.25], [0.2, 0.8]])
Q = np.log([[0.25, 0.75], [0.75, 0.25], [0.4, 0.6]])


def test_kl_divergence_is_the_mean_over_images_in_nats_from_the_reference():
    by_hand = [
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
        0.0,
        0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6),
    ]
    assert consistency.kl_divergence(Q, P) == pytest.approx(sum(by_hand) / 3)
    assert consistency.kl_divergence(P, Q) != pytest.approx(sum(by_hand) / 3)


def test_softmax_takes_logits_of_any_offset_and_size():
    shifted = (P + np.array([[100.0], [-3.0], [1e4]])).astype(np.float32)
    assert consistency.kl_divergence(shifted, P) == pytest.approx(0.0, abs=1e-6)
    certain = np.array([[2000.0, 0.0, -2000.0]])
    assert consistency.kl_divergence(certain, certain) == 0.0
    assert consistency.kl_divergence(certain[:, ::-1], certain) == pytest.approx(4000.0)


def test_agreement_is_of_the_predictions_not_of_the_labels():
    logits = np.array([[3.0, 1, 2], [0, 5, 1], [0, 1, 2], [9, 0, 1]])
    reference = np.array([[1.0, 0, 0], [0, 0, 1], [0, 0, 1], [2, 1, 0]])
    assert consistency.agreement(logits, reference) == 0.75


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_images():
    # Confidences 0.9, 0.8 (wrong), 0.62, 0.61 (wrong); with 15 bins, the last two share one.
    logits = np.log([[0.9, 0.1], [0.8, 0.2], [0.62, 0.38], [0.39, 0.61]])
    labels = np.array([0, 1, 0, 0])
    by_hand = (abs(1 - 0.9) + abs(0 - 0.8) + abs(1 - 0.62 - 0.61)) / 4
    assert consistency.expected_calibration_error(logits, labels) == pytest.approx(by_hand)
    one_bin = abs(2 - 0.9 - 0.8 - 0.62 - 0.61) / 4
    found = consistency.expected_calibration_error(logits, labels, num_bins=1)
    assert found == pytest.approx(one_bin)


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower_one():
    logits = np.log([[0.5, 0.3, 0.2], [0.45, 0.3, 0.25]])  # bins (0.25, 0.5] for both
    found = consistency.expected_calibration_error(logits, np.array([0, 1]), num_bins=4)
    assert found == pytest.approx(abs(1 - 0.5 - 0.45) / 2)
    certain = np.array([[800.0, 0.0]])
    assert consistency.expected_calibration_error(certain, np.array([1])) == 1.0


def test_the_worst_class_is_the_one_whose_share_of_right_images_falls_most():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    reference = np.eye(4)[[0, 0, 0, 0, 1, 1, 0]]
    logits = np.eye(4)[[0, 0, 1, 1, 1, 0, 2]]  # 0 loses 2 of 4, 1 loses 1 of 2, 2 gains; 3 has none
    assert consistency.worst_class(logits, reference, labels) == (0, 0.5)
    logits = np.eye(4)[[0, 0, 0, 1, 1, 0, 2]]
    assert consistency.worst_class(logits, reference, labels) == (1, 0.5)
    assert consistency.worst_class(np.eye(4)[labels], reference, labels) == (0, 0.0)
    assert consistency.worst_class(np.eye(4)[[2]], np.eye(4)[[0]], np.array([2])) == (2, -1.0)


def test_the_full_network_agrees_with_itself():
    labels = np.array([0, 0, 0])
    found = consistency.compare(P, P, labels)
    error = consistency.expected_calibration_error(P, labels)
    assert found == (1.0, 0.0, error, 0, 0.0)
    found = consistency.compare(Q, P, np.array([0, 0, 1]))
    assert (found.agreement, found.worst_class, found.worst_class_drop) == (2 / 3, 0, 0.5)


@pytest.mark.parametrize(
    "function, arguments, match",
    [
        (consistency.agreement, (P[0], P[0]), r"at least one image, got shape \(2,\)"),
        (consistency.kl_divergence, (P[:0], P[:0]), r"got shape \(0, 2\)"),
        (consistency.kl_divergence, (P, P[:2]), r"\(3, 2\), got \(2, 2\)"),
        (consistency.expected_calibration_error, (P, np.array([0, 1])), "for each of 3 images"),
        (consistency.worst_class, (P, P, np.array([0, 1, 2])), "one of 0 to 1 .* 0 to 2"),
    ],
)
def test_what_does_not_belong_together_is_refused(function, arguments, match):
    with pytest.raises(ValueError, match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
