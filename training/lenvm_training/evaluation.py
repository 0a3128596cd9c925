"""Evaluation of a head on completions of held-out prompts.

Censored completions (cut by the token limit) are left out of every figure that needs their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from lenvm_kernels.checkpoint import Head
from lenvm_kernels.length_distribution import expected_length, quantile_length
from lenvm_kernels.length_value import length_from_value, value_from_length
from lenvm_training.features import StateTable
from lenvm_training.trainer import features_of

FRACTIONS = (0.25, 0.5, 0.75)
FRACTION_WIDTH = 0.05
POSITION_BINS = 40
INTERVAL = (0.1, 0.9)


def evaluate_head(
    head: Head,
    train: StateTable,
    held_out: StateTable,
    layers: tuple[int, ...],
    rollouts: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """Figures of ``head`` on ``held_out`` (states of ``rollouts``); ``train`` fits the baselines.

    * ``value_mse``, and that of the best constant and of the best function of the position alone;
    * at the prompt boundary, against the samples of each prompt: ``boundary_tau`` (Kendall) and
      ``boundary_mre`` (mean relative error; truth and prediction in return space, as in the paper's
      equations 13 to 15), and both for the mean of the predicted distribution in plain tokens;
    * ``remaining_mre_25/50/75``: median relative error of the expected remaining length there;
    * ``interval_coverage``: share of completions inside the 80% interval of the prompt boundary.
    """
    gamma = head.config.gamma
    known_train, known = train.select(~train.censored), held_out.select(~held_out.censored)
    features = features_of(known, head.config, layers).float()
    returns = value_from_length(known.remaining.float(), gamma)
    with torch.inference_mode():
        values = head.value_head(features[:, : head.config.hidden_size])
        logprobs = head.candidate_head.state_logprobs(features)
    lengths = head.candidate_head.bin_lengths
    expected = expected_length(logprobs, lengths)
    distribution_values = (logprobs.exp() * value_from_length(lengths, gamma)).sum(-1)
    train_returns = value_from_length(known_train.remaining.float(), gamma)
    figures = {
        "num_states": float(len(known.position)),
        "num_completions": float(known.rollout.unique().numel()),
        "value_mse": _mse(values, returns),
        "value_mse_distribution": _mse(distribution_values, returns),
        "value_mse_constant": _mse(train_returns.mean(), returns),
        "value_mse_position": _mse(_position_only(known_train.position, train_returns, known.position), returns),
    }
    figures["value_mse_over_position"] = figures["value_mse"] / figures["value_mse_position"]
    figures["value_mse_over_constant"] = figures["value_mse"] / figures["value_mse_constant"]
    figures["distribution_mse_over_position"] = figures["value_mse_distribution"] / figures["value_mse_position"]
    figures |= _boundary_figures(known, values, expected, rollouts, gamma)
    figures |= _remaining_errors(known, expected)
    boundary = known.position == 0
    low, high = (quantile_length(logprobs[boundary], lengths, level) for level in INTERVAL)
    actual = known.remaining[boundary]
    figures["interval_coverage"] = ((actual >= low.round()) & (actual <= high.round())).float().mean().item()
    return figures


def _boundary_figures(
    known: StateTable, values: Tensor, expected: Tensor, rollouts: Sequence[dict[str, Any]], gamma: float
) -> dict[str, float]:
    """Agreement with the mean over each prompt's samples. Prompts with fewer than 4 finished ones are left out."""
    boundary = (known.position == 0).nonzero().squeeze(-1)
    by_prompt: dict[str, list[int]] = {}
    for row in boundary.tolist():
        by_prompt.setdefault(rollouts[int(known.rollout[row])]["prompt_id"], []).append(row)
    groups = [torch.tensor(rows) for rows in by_prompt.values() if len(rows) >= 4]
    first = torch.stack([group[0] for group in groups])
    sampled = [known.remaining[group].float() for group in groups]
    mean_length = torch.stack([lengths.mean() for lengths in sampled])
    mean_return = torch.stack([value_from_length(lengths, gamma).mean() for lengths in sampled])
    return_length = length_from_value(mean_return, gamma)
    predicted = length_from_value(values[first], gamma)
    return {
        "num_prompts": float(len(groups)),
        "boundary_tau": float(kendalltau(predicted, return_length).statistic),
        "boundary_mre": _mre(predicted, return_length),
        "boundary_tau_expected": float(kendalltau(expected[first], mean_length).statistic),
        "boundary_mre_expected": _mre(expected[first], mean_length),
    }


def _remaining_errors(known: StateTable, expected: Tensor) -> dict[str, float]:
    fraction = known.position / (known.position + known.remaining)
    errors = (expected - known.remaining).abs() / known.remaining
    return {
        f"remaining_mre_{round(100 * point)}": errors[(fraction - point).abs() < FRACTION_WIDTH].median().item()
        for point in FRACTIONS
    }


def _position_only(train_position: Tensor, train_returns: Tensor, position: Tensor) -> Tensor:
    """The mean training return of each position's bin (bins of equal counts)."""
    levels = torch.linspace(0, 1, POSITION_BINS + 1)[1:-1]
    edges = torch.quantile(train_position[torch.randperm(len(train_position))[:100_000]].float(), levels)
    train_bins, bins = (torch.bucketize(part.float(), edges) for part in (train_position, position))
    sums = torch.zeros(POSITION_BINS).index_add(0, train_bins, train_returns)
    counts = torch.zeros(POSITION_BINS).index_add(0, train_bins, torch.ones_like(train_returns))
    return (sums / counts.clamp_min(1))[bins]


def _mse(predicted: Tensor, actual: Tensor) -> float:
    return (predicted - actual).square().mean().item()


def _mre(predicted: Tensor, actual: Tensor) -> float:
    return ((predicted - actual).abs() / actual).mean().item()
