"""The map between remaining lengths (tokens) and length values: sign, gamma and bins are decided here only.

A state with n tokens still to come (the end-of-sequence token counts) has the discounted return

    value(n) = -(1 - gamma ** n)            in (-1, 0]; 0 at the end of the sequence

the sum of rewards of -(1 - gamma) a step and 0 after the last. Functions typed with ``Real`` take and
return either a Python float or a float tensor of any shape and device (computed in its own dtype).
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch

Real = TypeVar("Real", float, torch.Tensor)

MIN_VALUE = -1.0 + 2.0**-24
"""The least float32 above -1. ``length_from_value`` reads smaller values as this one."""


def value_from_length(length: Real, gamma: float) -> Real:
    """-(1 - gamma ** length) for ``length`` >= 0 tokens; exact to rounding for short lengths too."""
    exponent = length * math.log(gamma)
    return torch.expm1(exponent) if isinstance(exponent, torch.Tensor) else math.expm1(exponent)


def length_from_value(value: Real, gamma: float) -> Real:
    """log(1 + value) / log(gamma) tokens, the inverse of ``value_from_length``.

    Values are clamped to [MIN_VALUE, 0], so the result is finite: 0 to about 16.6 / (1 - gamma) tokens.
    Of a *mean* value this is less than the mean length (Jensen).
    """
    if isinstance(value, torch.Tensor):
        log_survival = torch.log1p(value.clamp(MIN_VALUE, 0.0))
    else:
        log_survival = math.log1p(min(max(value, MIN_VALUE), 0.0))
    return abs(log_survival / math.log(gamma))  # abs: 0, not -0, at the end


def value_from_raw(raw_value: Real) -> Real:
    """-sigmoid(raw_value): the value that a head's last linear layer stands for."""
    if isinstance(raw_value, torch.Tensor):
        return -torch.sigmoid(raw_value)
    return -0.5 * (1.0 + math.tanh(0.5 * raw_value))


def bellman_step(next_value: Real, gamma: float) -> Real:
    """G_t = -(1 - gamma) + gamma * G_{t+1}: the value one token earlier."""
    return next_value * gamma - (1.0 - gamma)


def discounted_returns(length: int, gamma: float) -> torch.Tensor:
    """G_t of every state t = 0..length of a completion of ``length`` tokens: float32 [length + 1], last 0."""
    return value_from_length(torch.arange(length, -1, -1, dtype=torch.float32), gamma)


def bin_edges(num_bins: int, max_length: int) -> torch.Tensor:
    """Least length of each bin of remaining lengths: int64 [num_bins], increasing from 1.

    Bin m holds edges[m] <= length < edges[m + 1]; the last one everything from edges[-1] on. Edges are
    spaced as max_length ** (m / num_bins), and at least one token apart.
    Raises ValueError unless 1 <= num_bins <= max_length.
    """
    if not 1 <= num_bins <= max_length:
        raise ValueError(f"num_bins must be from 1 to max_length={max_length}, got {num_bins}")
    edges = [1]
    for m in range(1, num_bins):
        edges.append(max(round(max_length ** (m / num_bins)), edges[-1] + 1))
    return torch.tensor(edges)


def bin_lengths(num_bins: int, max_length: int) -> torch.Tensor:
    """Representative length of each bin: float32 [num_bins], the geometric mean of its least and greatest length.

    The last bin, open-ended, is represented as if it ended at ``max_length``.
    """
    edges = bin_edges(num_bins, max_length)
    greatest = torch.cat([edges[1:] - 1, torch.tensor([max_length])])
    return torch.sqrt(edges.double() * greatest.double()).float()


def bin_index(length: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Bin of each remaining length >= 1: int64, same shape as ``length``, for ``edges`` of ``bin_edges``."""
    return torch.bucketize(length, edges, right=True) - 1


def expected_value(bin_logprobs: torch.Tensor, lengths: torch.Tensor, gamma: float) -> torch.Tensor:
    """sum_m P(m) * value(lengths[m]) of distributions over length bins: [..., M], [M] -> float32 [...]."""
    return (bin_logprobs.float().exp() * value_from_length(lengths.float(), gamma)).sum(-1)
