"""Mean and quantiles of a predicted distribution of the remaining length over log-spaced bins."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_length(bin_logprobs: Tensor, lengths: Tensor) -> Tensor:
    """sum_m P(m) * lengths[m], in tokens: [..., M], [M] or [..., M] -> float32 [...]."""
    return (bin_logprobs.float().exp() * lengths).sum(-1)


def quantile_length(bin_logprobs: Tensor, lengths: Tensor, level: float) -> Tensor:
    """The length that is not exceeded with probability ``level``: [..., M], [M] -> float32 [...].

    Within a bin the logarithm of the length is taken as uniform between the bin's boundaries, which
    lie at the geometric means of neighbouring ``lengths``. The last bin has no end: an upper quantile
    (``level`` >= 1/2) in it is that bin's length, which stands for all that is longer.
    """
    inner = torch.sqrt(lengths[1:] * lengths[:-1])
    bounds = torch.cat([lengths[:1], inner, lengths[-1:]]).log()  # [M + 1]
    cumulative = bin_logprobs.float().exp().cumsum(-1)  # [..., M]
    index = (cumulative < level).sum(-1, keepdim=True).clamp(max=lengths.numel() - 1)  # [..., 1]
    above = cumulative.gather(-1, index)
    mass = bin_logprobs.float().exp().gather(-1, index).clamp_min(1e-9)
    fraction = (1 - (above - level) / mass).clamp(0, 1)
    inside = torch.exp(bounds[index] + fraction * (bounds[index + 1] - bounds[index]))
    if level >= 0.5:
        inside = torch.where(index == lengths.numel() - 1, lengths[-1], inside)
    return inside.squeeze(-1)
