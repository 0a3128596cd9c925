"""``steer_candidates`` in torch: the production path on the CPU and the oracle of the Triton kernel."""

from __future__ import annotations

import torch

from lenvm_kernels.length_control import DEFAULT_KERNEL, Mode, PreferenceKernel, Strategy
from lenvm_kernels.length_value import expected_value, length_from_value


def steer_candidates(
    candidate_logprobs: torch.Tensor,
    bin_logprobs: torch.Tensor,
    eos_mask: torch.Tensor,
    bin_lengths: torch.Tensor,
    num_generated: torch.Tensor,
    mode: torch.Tensor,
    strategy: torch.Tensor,
    target: torch.Tensor,
    beta: torch.Tensor,
    gamma: float,
    kernel: PreferenceKernel = DEFAULT_KERNEL,
) -> torch.Tensor:
    """See ``length_control.steer_candidates``."""
    mode, strategy, target, beta = (row.unsqueeze(-1) for row in (mode, strategy, target, beta))  # [B, 1]
    end_length = (num_generated + 1).float().unsqueeze(-1)  # [B, 1]: the length if x is the last token
    unmet = (mode == Mode.AT_LEAST) & (end_length < target)

    logprobs = _forbid_eos(candidate_logprobs, eos_mask, unmet)  # [B, C]
    log_psi = _log_psi(bin_logprobs, eos_mask, bin_lengths, end_length, mode, target, kernel)
    values = expected_value(bin_logprobs, bin_lengths, gamma).masked_fill(eos_mask, 0.0)  # [B, C]

    strength = torch.where(mode == Mode.EQUAL, kernel.equal_strength, kernel.bound_strength)
    reweighted = _reweigh(logprobs, torch.where(mode == Mode.TILT, beta * values, strength * log_psi))
    chosen = _choose(logprobs, values, (target - end_length).clamp(min=0.0), mode, gamma)
    steered = torch.where((strategy == Strategy.HARD) & (mode != Mode.TILT), chosen, reweighted)

    idle = (mode == Mode.NONE) | ((mode == Mode.TILT) & (beta == 0)) | ((mode == Mode.AT_LEAST) & ~unmet)
    return torch.where(idle, candidate_logprobs, steered)


def _forbid_eos(logprobs: torch.Tensor, eos_mask: torch.Tensor, unmet: torch.Tensor) -> torch.Tensor:
    """Drop the EOS candidates of rows still too short, where any other candidate is left. [B, C]"""
    others_left = ((logprobs > -torch.inf) & ~eos_mask).any(-1, keepdim=True)
    return logprobs.masked_fill(eos_mask & unmet & others_left, -torch.inf)


def _log_psi(
    bin_logprobs: torch.Tensor,
    eos_mask: torch.Tensor,
    bin_lengths: torch.Tensor,
    end_length: torch.Tensor,
    mode: torch.Tensor,
    target: torch.Tensor,
    kernel: PreferenceKernel,
) -> torch.Tensor:
    """log psi of each candidate: [B, C]. Without a target (NONE, TILT) the slopes are 0."""
    equal, at_least, at_most = mode == Mode.EQUAL, mode == Mode.AT_LEAST, mode == Mode.AT_MOST
    short = equal * kernel.equal_short + at_least * kernel.at_least_short  # [B, 1]
    long = equal * kernel.equal_long + at_most * kernel.at_most_long  # [B, 1]

    def log_preference(length: torch.Tensor) -> torch.Tensor:
        deviation = (length - target) / target
        return -(short * (-deviation).clamp(min=0.0) + long * deviation.clamp(min=0.0))

    at_bins = log_preference(end_length + bin_lengths).unsqueeze(1)  # [B, 1, M]
    return torch.where(eos_mask, log_preference(end_length), torch.logsumexp(bin_logprobs + at_bins, dim=-1))


def _reweigh(logprobs: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """Normalised logprobs + log_weights: [B, C]; of the logprobs alone where every weight is 0."""
    candidate = logprobs > -torch.inf
    weighted = torch.where(candidate, logprobs + log_weights, -torch.inf)
    reachable = (weighted > -torch.inf).any(-1, keepdim=True)
    weighted = torch.where(reachable, weighted, logprobs)
    return torch.where(weighted > -torch.inf, torch.log_softmax(weighted, dim=-1), -torch.inf)


def _choose(
    logprobs: torch.Tensor, values: torch.Tensor, remaining_target: torch.Tensor, mode: torch.Tensor, gamma: float
) -> torch.Tensor:
    """Log of the hard strategy's one-hot: [B, C]."""
    distance = (length_from_value(values, gamma) - remaining_target).abs()
    cost = torch.where(mode == Mode.EQUAL, distance, torch.where(mode == Mode.AT_LEAST, values, -values))
    candidate = logprobs > -torch.inf
    best = torch.where(candidate, cost, torch.inf).argmin(-1, keepdim=True)  # [B, 1]
    column = torch.arange(logprobs.shape[1], device=logprobs.device)
    return torch.zeros_like(logprobs).masked_fill((column != best) | ~candidate, -torch.inf)
