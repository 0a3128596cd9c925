"""How good predictions are at every part of an answer: error by relative position, rank agreement, calibration.

Everything is read off padded arrays: ``predictions`` float [N, T] in a target space, ``labels`` int [N, T]
remaining lengths (IGNORED outside the states; each row's states are consecutive and end with 0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau

from lenvm_training.targets import IGNORED, TargetSpace

Floats = NDArray[np.float64]
POSITIONS = (0, 25, 50, 75, 90)
CALIBRATION_BINS = 10
FIGURES = ("mse", "calibration_error", "mre", "median_re", "mae", "tau")
"""Names of the figures of `state_metrics`; the last four carry a position."""


def state_metrics(predictions: NDArray[Any], labels: NDArray[Any], space: TargetSpace) -> dict[str, float]:
    """Figures over the states of completions of known length.

    * ``mse``: mean squared error in the target space over all states;
    * ``mre_P`` and ``median_re_P`` for P in 0, 25, 50, 75, 90: mean and median of |predicted - n| / n at
      the state where P% of the completion is written (state floor(P% of L); one a completion), n tokens to come;
    * ``mae_P``: mean of |predicted - n| there, in tokens;
    * ``tau_P``: Kendall's tau between predicted and realised n over completions there;
    * ``calibration_error``: mean over ten equally filled bins of predictions of
      |mean prediction - mean target|, in the target space.
    """
    is_state = labels != IGNORED
    targets = _numpy(space.target(torch.from_numpy(labels[is_state]).double()))
    flat = predictions[is_state].astype(np.float64)
    figures = {
        "mse": float(np.mean((flat - targets) ** 2)),
        "calibration_error": calibration_error(flat, targets),
    }
    for position in POSITIONS:
        predicted, actual = _at_position(predictions, labels, space, position)
        errors = np.abs(predicted - actual)
        figures[f"mre_{position}"] = float(np.mean(errors / actual))
        figures[f"median_re_{position}"] = float(np.median(errors / actual))
        figures[f"mae_{position}"] = float(np.mean(errors))
        figures[f"tau_{position}"] = rank_agreement(predicted, actual)
    return figures


def calibration_curve(predicted: Floats, actual: Floats, num_bins: int = CALIBRATION_BINS) -> tuple[Floats, Floats]:
    """Mean prediction and mean truth of equally filled bins by rising prediction, ``num_bins`` at most."""
    order = np.argsort(predicted, kind="stable")
    bins = [part for part in np.array_split(order, num_bins) if len(part)]
    return np.array([predicted[part].mean() for part in bins]), np.array([actual[part].mean() for part in bins])


def calibration_error(predicted: Floats, actual: Floats) -> float:
    """Mean distance of the calibration curve from the diagonal, in the unit of the arguments."""
    mean_predicted, mean_actual = calibration_curve(predicted, actual)
    return float(np.mean(np.abs(mean_predicted - mean_actual)))


def rank_agreement(predicted: Floats, actual: Floats) -> float:
    """Kendall's tau-b; 0 where one side is constant (it orders nothing)."""
    statistic = float(kendalltau(predicted, actual).statistic) if len(predicted) > 1 else 0.0
    return 0.0 if np.isnan(statistic) else statistic


def _at_position(
    predictions: NDArray[Any], labels: NDArray[Any], space: TargetSpace, position: int
) -> tuple[Floats, Floats]:
    rows = np.flatnonzero(labels.max(axis=1) >= 1)
    first = (labels[rows] != IGNORED).argmax(axis=1)  # the prompt boundary
    lengths = labels[rows, first]
    columns = first + lengths * position // 100
    predicted = space.length(torch.from_numpy(predictions[rows, columns]).double())
    return _numpy(predicted), labels[rows, columns].astype(np.float64)


def _numpy(tensor: torch.Tensor) -> Floats:
    return tensor.numpy().astype(np.float64)
