"""``steer_candidates`` and ``solve_mean_tilt`` in torch: the CPU's production path and the Triton kernels' oracle."""

from __future__ import annotations

import torch

from lenvm_kernels.length_control import DEFAULT_KERNEL, Mode, PreferenceKernel, Strategy
from lenvm_kernels.length_value import length_from_value

BISECTION_STEPS = 32
MAX_ASINH_BETA = 15.0  # beta in units of the candidates' spread of values: up to sinh(15) = 1.6e6


def steer_candidates(
    candidate_logprobs: torch.Tensor,
    candidate_values: torch.Tensor,
    bin_logprobs: torch.Tensor,
    eos_mask: torch.Tensor,
    bin_lengths: torch.Tensor,
    num_generated: torch.Tensor,
    mode: torch.Tensor,
    strategy: torch.Tensor,
    target: torch.Tensor,
    beta: torch.Tensor,
    closing_mask: torch.Tensor,
    after_closing: torch.Tensor,
    gamma: float,
    kernel: PreferenceKernel = DEFAULT_KERNEL,
) -> torch.Tensor:
    """See ``length_control.steer_candidates``."""
    mode, strategy, target, beta, after_closing = (
        row.unsqueeze(-1) for row in (mode, strategy, target, beta, after_closing)
    )  # [B, 1]
    end_length = (num_generated + 1).float().unsqueeze(-1)  # [B, 1]: the length if x is the last token
    unmet = (mode == Mode.AT_LEAST) & (end_length < target)

    equal, at_most = mode == Mode.EQUAL, mode == Mode.AT_MOST
    ends_naturally = (equal | at_most) & (strategy == Strategy.NATURAL)
    onset = torch.where(at_most, 1.0 - kernel.at_most_lead, 1.0)
    late = torch.where(end_length > 1, (end_length / target - onset).clamp(min=0.0), 0.0)
    eos_late = torch.where(after_closing, late, (late - kernel.patience).clamp(min=0.0))
    cutting = ends_naturally & (candidate_logprobs.exp() < kernel.min_eos * (-kernel.eos_haste * eos_late).exp())
    logprobs = _forbid_eos(candidate_logprobs, eos_mask, unmet | cutting)  # [B, C]
    may_end = ((candidate_logprobs > -torch.inf) & eos_mask).any(-1, keepdim=True)  # a grammar may forbid it
    hurried = ends_naturally & may_end & torch.where(after_closing, eos_mask, closing_mask)
    hurry = torch.where(after_closing, late, late.clamp(max=kernel.patience))
    logprobs = logprobs + torch.where(hurried, kernel.closing_haste * hurry, 0.0)
    log_psi = _log_psi(bin_logprobs, eos_mask, bin_lengths, end_length, mode, target, kernel)
    values = candidate_values.masked_fill(eos_mask, 0.0)  # [B, C]

    tilted = mode >= Mode.TILT
    strength = torch.where(mode == Mode.EQUAL, kernel.equal_strength, kernel.bound_strength)
    _, highest = _value_range(logprobs, values)  # subtracted: a huge beta must not drown in rounding
    reweighted = _reweigh(logprobs, torch.where(tilted, beta * (values - highest), strength * log_psi))
    chosen = _choose(logprobs, values, (target - end_length).clamp(min=0.0), mode, gamma)
    steered = torch.where((strategy == Strategy.HARD) & ~tilted, chosen, reweighted)

    idle = (mode == Mode.NONE) | (tilted & (beta == 0)) | ((mode == Mode.AT_LEAST) & ~unmet)
    return torch.where(idle, candidate_logprobs, steered)


def solve_mean_tilt(
    candidate_logprobs: torch.Tensor, candidate_values: torch.Tensor, eos_mask: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """See ``length_control.solve_mean_tilt``."""
    values = candidate_values.masked_fill(eos_mask, 0.0)
    lowest, highest = _value_range(candidate_logprobs, values)  # [B, 1]
    spread = highest - lowest
    varied = spread > 0
    share = torch.where(varied & (candidate_logprobs > -torch.inf), (values - lowest) / spread, 0.0)  # [B, C], 0 to 1
    wanted_share = (wanted.unsqueeze(-1) - lowest) / spread

    low = torch.full_like(spread, -MAX_ASINH_BETA)
    high = -low
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        mean = (torch.softmax(candidate_logprobs + middle.sinh() * share, -1) * share).sum(-1, keepdim=True)
        short = mean < wanted_share
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return torch.where(varied, ((low + high) / 2).sinh() / spread, 0.0).squeeze(-1)


def _value_range(logprobs: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of each row's candidates: [B, 1] each; inf and -inf without any."""
    candidate = logprobs > -torch.inf
    lowest = torch.where(candidate, values, torch.inf).amin(-1, keepdim=True)
    return lowest, torch.where(candidate, values, -torch.inf).amax(-1, keepdim=True)


def _forbid_eos(logprobs: torch.Tensor, eos_mask: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """Drop the forbidden EOS candidates ([B, C] or [B, 1]) of rows where any other candidate is left. [B, C]"""
    others_left = ((logprobs > -torch.inf) & ~eos_mask).any(-1, keepdim=True)
    return logprobs.masked_fill(eos_mask & forbidden & others_left, -torch.inf)


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
