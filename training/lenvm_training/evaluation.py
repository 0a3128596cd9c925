"""Evaluation of a head on completions of held-out prompts.

Completions cut by the token limit T are censored: their return at t is only known to lie in
(-1, -(1 - gamma^(T - t))]. At the prompt boundary they count at the limit, which is at most gamma^T too near
the end; so do they for the predicted distribution, whose mean is cut there too (restricted mean). Errors over the
states of whole answers leave them out, and so favour short ones; those over `EARLY` states count all completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lenvm_kernels.checkpoint import Head
from lenvm_kernels.length_distribution import expected_length, quantile_length
from lenvm_kernels.length_value import length_from_value, value_from_length
from lenvm_training.features import StateTable
from lenvm_training.head_losses import features_of
from lenvm_training.metrics import rank_agreement

FRACTIONS = (0.25, 0.5, 0.75)
FRACTION_WIDTH = 0.05
POSITION_BINS = 40
INTERVAL = (0.1, 0.9)
EARLY = 0.25
"""Share of the token limit: before it the return of every completion is known to within gamma^(0.75 T)."""
MIN_SAMPLES = 4


def evaluate_head(
    head: Head,
    train: StateTable,
    held_out: StateTable,
    layers: tuple[int, ...],
    rollouts: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """Figures of ``head`` on ``held_out`` (states of ``rollouts``); ``train`` fits the baselines.

    * ``value_mse``, and that of the best constant and of the best function of the position alone, over the states of
      finished completions; ``early_*``: the same over the first quarter of the token limit of all completions,
      a cut one's return taken in the middle of what it can be (there the other two know the held-out states);
    * at the prompt boundary, against the mean of the samples of each prompt: ``boundary_tau`` (Kendall) and
      ``boundary_mre`` (mean relative error; truth and prediction in return space, as in the paper's
      equations 13 to 15), and ``boundary_tau_expected``, ``boundary_mre_expected`` of the predicted
      distribution's mean in plain tokens, both sides cut at the token limit and at the last bin's length;
    * ``remaining_mre_25/50/75``: median over completions of the relative error of the remaining length that V stands
      for there;
    * ``interval_coverage``: share of completions inside the 80% interval of the prompt boundary (a
      longer one counts as inside when the interval reaches that cut).
    """
    gamma = head.config.gamma
    known_train, known = train.select(~train.censored), held_out.select(~held_out.censored)
    features = features_of(known, head.config, layers).float()
    returns = value_from_length(known.remaining.float(), gamma)
    values = _values(head, known)
    with torch.inference_mode():
        logprobs = head.candidate_head.state_logprobs(features)
    lengths = head.candidate_head.bin_lengths
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
    figures |= _early_figures(head, held_out)
    boundary = held_out.select(held_out.position == 0)
    figures |= _value_boundary_figures(head, boundary, rollouts)
    figures |= _distribution_boundary_figures(head, boundary, layers, rollouts)
    return figures | _remaining_errors(known, length_from_value(values, gamma))


def _early_figures(head: Head, held_out: StateTable) -> dict[str, float]:
    """Errors over the states before EARLY of the token limit, of all completions; {} where nothing was cut.

    The constant and the function of the position are fitted to these states themselves.
    """
    if not held_out.censored.any():
        return {}
    limit = int((held_out.position + held_out.remaining)[held_out.censored].max())
    early = held_out.select(held_out.position < EARLY * limit)
    returns = _middle_returns(early, head.config.gamma)
    mse = _mse(_values(head, early), returns)
    of_position = _mse(_position_only(early.position, returns, early.position), returns)
    errors = {
        "early_mse": mse,
        "early_mse_constant": _mse(returns.mean(), returns),
        "early_mse_position": of_position,
    }
    return errors | ({"early_mse_over_position": mse / of_position} if of_position else {})


def _middle_returns(states: StateTable, gamma: float) -> Tensor:
    """Realised returns; of cut completions the middle of (-1, -(1 - gamma^remaining)]."""
    returns = value_from_length(states.remaining.float(), gamma)
    return torch.where(states.censored, (returns - 1) / 2, returns)


def _values(head: Head, states: StateTable) -> Tensor:
    with torch.inference_mode():
        values: Tensor = head.value_head(states.final.float())
    return values


def _value_boundary_figures(head: Head, boundary: StateTable, rollouts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Agreement of V(s_0) with the mean return of each prompt's samples (at least MIN_SAMPLES)."""
    gamma = head.config.gamma
    groups = _by_prompt(boundary, rollouts)
    returns = [value_from_length(boundary.remaining[group].float(), gamma).mean() for group in groups]
    actual = length_from_value(torch.stack(returns), gamma)
    first = boundary.select(torch.stack([group[0] for group in groups]))
    predicted = length_from_value(_values(head, first), gamma)
    return {
        "num_prompts": float(len(groups)),
        "samples_per_prompt": sum(map(len, groups)) / len(groups),
        "boundary_tau": rank_agreement(predicted.double().numpy(), actual.double().numpy()),
        "boundary_mre": _mre(predicted, actual),
    }


def _distribution_boundary_figures(
    head: Head, boundary: StateTable, layers: tuple[int, ...], rollouts: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Restricted mean and 80% interval of the predicted distribution against all samples."""
    with torch.inference_mode():
        logprobs = head.candidate_head.state_logprobs(features_of(boundary, head.config, layers).float())
    lengths = head.candidate_head.bin_lengths
    limit = lengths[-1].round()  # of the last bin, which is open: all that is longer counts as this long
    if boundary.censored.any():
        limit = limit.minimum(boundary.remaining[boundary.censored].max())
    restricted = expected_length(logprobs, lengths.clamp(max=limit))
    remaining = boundary.remaining.float().clamp(max=limit)
    groups = _by_prompt(boundary, rollouts)
    actual = torch.stack([remaining[group].mean() for group in groups])
    predicted = restricted[torch.stack([group[0] for group in groups])]
    low, high = (quantile_length(logprobs, lengths, level).round() for level in INTERVAL)
    inside = (remaining >= low) & (remaining <= high)
    return {
        "boundary_tau_expected": rank_agreement(predicted.double().numpy(), actual.double().numpy()),
        "boundary_mre_expected": _mre(predicted, actual),
        "interval_coverage": inside.float().mean().item(),
    }


def _by_prompt(boundary: StateTable, rollouts: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Rows of the states of each prompt that has at least MIN_SAMPLES."""
    rows: dict[str, list[int]] = {}
    for row, rollout in enumerate(boundary.rollout.tolist()):
        rows.setdefault(rollouts[rollout]["prompt_id"], []).append(row)
    return [torch.tensor(group) for group in rows.values() if len(group) >= MIN_SAMPLES]


def _remaining_errors(known: StateTable, remaining: Tensor) -> dict[str, float]:
    fraction = known.position / (known.position + known.remaining)
    errors = (remaining - known.remaining).abs() / known.remaining
    return {
        f"remaining_mre_{round(100 * point)}": _by_rollout(errors, known.rollout, (fraction - point).abs())
        for point in FRACTIONS
    }


def _by_rollout(errors: Tensor, rollout: Tensor, distance: Tensor) -> float:
    """Median over completions of the mean of the ``errors`` [N] of those states within FRACTION_WIDTH of a place."""
    near = distance < FRACTION_WIDTH
    completions, index = rollout[near].unique(return_inverse=True)
    sums = torch.zeros(len(completions)).index_add(0, index, errors[near])
    median: float = (sums / index.bincount()).median().item()
    return median


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
