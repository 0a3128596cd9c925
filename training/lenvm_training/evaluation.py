"""Evaluation of a head on completions of held-out prompts.

Completions cut by the token limit T of their own sampling are censored: their return at t is only known to lie in
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
RATIOS = (
    ("value_mse_over_position", "value_mse", "value_mse_position"),
    ("value_mse_over_constant", "value_mse", "value_mse_constant"),
    ("distribution_mse_over_position", "value_mse_distribution", "value_mse_position"),
)


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
      ``early_mse_unknown``: how much of ``early_mse`` that can make, if every cut one's true return were at an edge;
    * at the prompt boundary, against the mean of the samples of each prompt: ``boundary_tau`` (Kendall) and
      ``boundary_mre`` (mean relative error; truth and prediction in return space, as in the paper's
      equations 13 to 15), and ``boundary_tau_expected``, ``boundary_mre_expected`` of the predicted
      distribution's mean in plain tokens, both sides cut at the token limit and at the last bin's length;
    * ``remaining_mre_25/50/75``: median over completions of the relative error of the remaining length that V stands
      for there;
    * ``interval_coverage``: share of completions inside the 80% interval of the prompt boundary (one that was cut
      counts as inside when the interval reaches its cut).

    A ratio to a baseline that makes no error is left out.
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
    for name, numerator, denominator in RATIOS:
        figures |= _ratio(figures, name, numerator, denominator)
    figures |= _early_figures(head, held_out, rollouts)
    boundary = held_out.select(held_out.position == 0)
    figures |= _value_boundary_figures(head, boundary, rollouts)
    figures |= _distribution_boundary_figures(head, boundary, layers, rollouts)
    return figures | _remaining_errors(known, length_from_value(values, gamma))


def _ratio(figures: dict[str, float], name: str, numerator: str, denominator: str) -> dict[str, float]:
    return {name: figures[numerator] / figures[denominator]} if figures[denominator] else {}


def _early_figures(head: Head, held_out: StateTable, rollouts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Errors over the states before EARLY of the token limit, of all completions; {} where nothing was cut.

    The constant and the function of the position are fitted to these states themselves.
    """
    if not held_out.censored.any():
        return {}
    early = held_out.select(held_out.position < EARLY * token_limits(held_out, rollouts))
    returns, half_width = _middle_returns(early, head.config.gamma)
    errors = {
        "early_mse": _mse(_values(head, early), returns),
        "early_mse_unknown": half_width.square().mean().item(),
        "early_mse_constant": _mse(returns.mean(), returns),
        "early_mse_position": _mse(_position_only(early.position, returns, early.position), returns),
    }
    return errors | _ratio(errors, "early_mse_over_position", "early_mse", "early_mse_position")


def token_limits(states: StateTable, rollouts: Sequence[dict[str, Any]]) -> Tensor:
    """The limit on new tokens that each state's completion was sampled with: [N] float32.

    Where its row does not tell, the length of the longest one that was cut; infinity where none was.
    """
    lengths = states.position + states.remaining
    unknown = float(lengths[states.censored].max()) if states.censored.any() else torch.inf
    limits = [float(row.get("sampling", {}).get("max_new_tokens") or unknown) for row in rollouts]
    return torch.tensor(limits)[states.rollout]


def _middle_returns(states: StateTable, gamma: float) -> tuple[Tensor, Tensor]:
    """Realised returns; of cut completions the middle of (-1, -(1 - gamma^remaining)]. And how far it may be off."""
    returns = value_from_length(states.remaining.float(), gamma)
    half_width = (returns + 1).masked_fill(~states.censored, 0.0) / 2
    return returns - half_width, half_width


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
    last = lengths[-1].round()  # of the last bin, which is open: all that is longer counts as this long
    remaining = boundary.remaining.float().clamp(max=last)
    limits = token_limits(boundary, rollouts).clamp(max=last)
    groups = _by_prompt(boundary, rollouts)
    least = torch.stack([limits[group].min() for group in groups])  # of the limits of a prompt's samples
    actual = torch.stack([remaining[group].clamp(max=limit).mean() for group, limit in zip(groups, least, strict=True)])
    first = torch.stack([group[0] for group in groups])
    predicted = expected_length(logprobs[first], lengths.minimum(least.unsqueeze(1)))
    low, high = (quantile_length(logprobs, lengths, level).round() for level in INTERVAL)
    inside = (boundary.censored | (remaining >= low)) & (remaining <= high)
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
