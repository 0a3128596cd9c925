"""Figures against sums written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lenvm_training.metrics import calibration_curve, calibration_error, rank_agreement, state_metrics
from lenvm_training.targets import RawLength


def test_errors_are_taken_where_the_share_is_written() -> None:
    labels = np.full((2, 14), -100)
    labels[0, 2:7] = range(4, -1, -1)  # 4 tokens
    labels[1, 1:12] = range(10, -1, -1)  # 10 tokens
    predictions = np.where(labels >= 0, labels, 0) + np.array([[1.0], [2.0]])
    figures = state_metrics(predictions, labels, RawLength())
    assert figures["mse"] == pytest.approx((5 * 1 + 11 * 4) / 16)
    assert figures["mre_0"] == pytest.approx((1 / 4 + 2 / 10) / 2)
    assert figures["mae_50"] == pytest.approx(1.5)
    assert figures["mre_50"] == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert figures["median_re_90"] == pytest.approx((1 / 1 + 2 / 1) / 2)
    assert figures["tau_0"] == 1


def test_calibration_is_zero_for_honest_noise_and_the_bias_otherwise() -> None:
    generator = np.random.default_rng(0)
    predicted = generator.uniform(0, 100, 20_000)
    actual = predicted + generator.normal(0, 10, 20_000)
    assert calibration_error(predicted, actual) < 1
    assert calibration_error(predicted + 7, actual) == pytest.approx(7, abs=1)
    mean_predicted, mean_actual = calibration_curve(np.array([3.0, 1.0, 2.0]), np.array([30.0, 10.0, 20.0]))
    assert mean_predicted.tolist() == [1, 2, 3]
    assert mean_actual.tolist() == [10, 20, 30]


def test_a_constant_orders_nothing() -> None:
    assert rank_agreement(np.ones(5), np.arange(5.0)) == 0
    assert rank_agreement(np.arange(5.0), np.arange(5.0)) == pytest.approx(1)
