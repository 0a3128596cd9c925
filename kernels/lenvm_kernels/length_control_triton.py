"""``steer_candidates`` and ``solve_mean_tilt`` as a Triton kernel each. Needs CUDA, or Triton's interpreter.

A program takes a row and holds its candidates, and their [C, M] distributions, in registers: C up to about 200.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lenvm_kernels.length_control import DEFAULT_KERNEL, Mode, PreferenceKernel, Strategy
from lenvm_kernels.length_control_torch import BISECTION_STEPS, MAX_ASINH_BETA
from lenvm_kernels.length_value import MIN_VALUE

_EQUAL = tl.constexpr(int(Mode.EQUAL))
_AT_LEAST = tl.constexpr(int(Mode.AT_LEAST))
_AT_MOST = tl.constexpr(int(Mode.AT_MOST))
_TILT = tl.constexpr(int(Mode.TILT))
_NONE = tl.constexpr(int(Mode.NONE))
_HARD = tl.constexpr(int(Strategy.HARD))
_MIN_VALUE = tl.constexpr(MIN_VALUE)
_STEPS = tl.constexpr(BISECTION_STEPS)
_MAX_ASINH_BETA = tl.constexpr(MAX_ASINH_BETA)


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
    num_rows, num_candidates, num_bins = bin_logprobs.shape
    steered = torch.empty_like(candidate_logprobs, memory_format=torch.contiguous_format)
    if num_rows == 0:
        return steered
    _steer_row[(num_rows,)](
        candidate_logprobs.contiguous(),
        candidate_values.contiguous(),
        bin_logprobs.contiguous(),
        eos_mask.contiguous(),
        bin_lengths.contiguous(),
        num_generated.contiguous(),
        mode.contiguous(),
        strategy.contiguous(),
        target.contiguous(),
        beta.contiguous(),
        closing_mask.contiguous(),
        after_closing.contiguous(),
        steered,
        num_candidates,
        num_bins,
        math.log(gamma),
        kernel.equal_short,
        kernel.equal_long,
        kernel.at_least_short,
        kernel.at_most_long,
        kernel.equal_strength,
        kernel.bound_strength,
        kernel.min_eos,
        kernel.eos_haste,
        kernel.closing_haste,
        kernel.patience,
        kernel.at_most_lead,
        BLOCK_C=triton.next_power_of_2(num_candidates),
        BLOCK_M=triton.next_power_of_2(num_bins),
    )
    return steered


@triton.jit
def _log_preference(length, target, short, long):  # type: ignore[no-untyped-def]
    deviation = (length - target) / target
    return -(short * tl.maximum(-deviation, 0.0) + long * tl.maximum(deviation, 0.0))


@triton.jit
def _log_softmax(x):  # type: ignore[no-untyped-def]
    """Of a row [C] with -inf for absent columns, which stay -inf; all -inf when no column is there."""
    highest = tl.maximum(tl.max(x, axis=0), -3.0e38)
    log_sum = tl.log(tl.sum(tl.exp(x - highest), axis=0))
    return tl.where(x > float("-inf"), x - highest - log_sum, float("-inf"))


@triton.jit
def _length_from_value(value, log_gamma):  # type: ignore[no-untyped-def]
    """log1p(value) / log_gamma; log(u) * (value / (u - 1)) with u = 1 + value is log1p to rounding."""
    value = tl.minimum(tl.maximum(value, _MIN_VALUE), 0.0)
    u = 1.0 + value
    log1p = tl.where(u == 1.0, value, tl.log(u) * (value / tl.where(u == 1.0, 1.0, u - 1.0)))
    return log1p / log_gamma


@triton.jit(do_not_specialize=["num_candidates"])  # type: ignore[untyped-decorator]
def _steer_row(  # type: ignore[no-untyped-def]
    candidate_logprobs_ptr,
    candidate_values_ptr,
    bin_logprobs_ptr,
    eos_mask_ptr,
    bin_lengths_ptr,
    num_generated_ptr,
    mode_ptr,
    strategy_ptr,
    target_ptr,
    beta_ptr,
    closing_mask_ptr,
    after_closing_ptr,
    steered_ptr,
    num_candidates,
    num_bins,
    log_gamma,
    equal_short,
    equal_long,
    at_least_short,
    at_most_long,
    equal_strength,
    bound_strength,
    min_eos,
    eos_haste,
    closing_haste,
    patience,
    at_most_lead,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    m = tl.arange(0, BLOCK_M)
    in_c = c < num_candidates
    in_m = m < num_bins
    columns = row * num_candidates + c  # [C]
    given = tl.load(candidate_logprobs_ptr + columns, mask=in_c, other=float("-inf"))
    is_eos = tl.load(eos_mask_ptr + columns, mask=in_c, other=0).to(tl.int1)
    closes = tl.load(closing_mask_ptr + columns, mask=in_c, other=0).to(tl.int1)
    after_closing = tl.load(after_closing_ptr + row).to(tl.int1)
    bins = tl.load(
        bin_logprobs_ptr + columns[:, None] * num_bins + m[None, :],
        mask=in_c[:, None] & in_m[None, :],
        other=float("-inf"),
    )  # [C, M]
    bin_lengths = tl.load(bin_lengths_ptr + m, mask=in_m, other=1.0)
    mode = tl.load(mode_ptr + row)
    tilted = mode >= _TILT
    hard = (tl.load(strategy_ptr + row) == _HARD) & (tilted == 0)
    target = tl.load(target_ptr + row)
    beta = tl.load(beta_ptr + row)
    end_length = (tl.load(num_generated_ptr + row) + 1).to(tl.float32)

    unmet = (mode == _AT_LEAST) & (end_length < target)
    others_left = tl.max(((given > float("-inf")) & (is_eos == 0)).to(tl.int32), axis=0) > 0
    ends_naturally = ((mode == _EQUAL) | (mode == _AT_MOST)) & (hard == 0)
    onset = tl.where(mode == _AT_MOST, 1.0 - at_most_lead, 1.0)
    late = tl.where(end_length > 1.0, tl.maximum(end_length / target - onset, 0.0), 0.0)
    eos_late = tl.where(after_closing, late, tl.maximum(late - patience, 0.0))
    cutting = ends_naturally & (tl.exp(given) < min_eos * tl.exp(-eos_haste * eos_late))  # [C]
    logprobs = tl.where(is_eos & (unmet | cutting) & others_left, float("-inf"), given)
    may_end = tl.max(((given > float("-inf")) & is_eos).to(tl.int32), axis=0) > 0
    hurried = ends_naturally & may_end & tl.where(after_closing, is_eos, closes)
    hurry = tl.where(after_closing, late, tl.minimum(late, patience))
    logprobs += tl.where(hurried, closing_haste * hurry, 0.0)
    candidate = logprobs > float("-inf")

    short = tl.where(mode == _EQUAL, equal_short, tl.where(mode == _AT_LEAST, at_least_short, 0.0))
    long = tl.where(mode == _EQUAL, equal_long, tl.where(mode == _AT_MOST, at_most_long, 0.0))
    joint = bins + _log_preference(end_length + bin_lengths, target, short, long)[None, :]
    highest = tl.maximum(tl.max(joint, axis=1), -3.0e38)  # [C]
    log_psi = highest + tl.log(tl.sum(tl.exp(joint - highest[:, None]), axis=1))
    log_psi = tl.where(is_eos, _log_preference(end_length, target, short, long), log_psi)
    values = tl.load(candidate_values_ptr + columns, mask=in_c, other=0.0)
    values = tl.where(is_eos, 0.0, values)
    highest_value = tl.max(tl.where(candidate, values, float("-inf")), axis=0)

    strength = tl.where(mode == _EQUAL, equal_strength, bound_strength)
    weighted = logprobs + tl.where(tilted, beta * (values - highest_value), strength * log_psi)
    weighted = tl.where(candidate, weighted, float("-inf"))
    reachable = tl.max(weighted, axis=0) > float("-inf")
    reweighted = _log_softmax(tl.where(reachable, weighted, logprobs))

    distance = tl.abs(_length_from_value(values, log_gamma) - tl.maximum(target - end_length, 0.0))
    cost = tl.where(mode == _EQUAL, distance, tl.where(mode == _AT_LEAST, values, -values))
    best = tl.argmin(tl.where(candidate, cost, float("inf")), axis=0)
    chosen = tl.where((c == best) & candidate, 0.0, float("-inf"))

    idle = (mode == _NONE) | (tilted & (beta == 0.0)) | ((mode == _AT_LEAST) & (unmet == 0))
    steered = tl.where(idle, given, tl.where(hard, chosen, reweighted))
    tl.store(steered_ptr + columns, steered, mask=in_c)


def solve_mean_tilt(
    candidate_logprobs: torch.Tensor, candidate_values: torch.Tensor, eos_mask: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """See ``length_control.solve_mean_tilt``."""
    num_rows, num_candidates = candidate_logprobs.shape
    beta = torch.empty_like(wanted)
    if num_rows == 0:
        return beta
    _solve_row[(num_rows,)](
        candidate_logprobs.contiguous(),
        candidate_values.contiguous(),
        eos_mask.contiguous(),
        wanted.contiguous(),
        beta,
        num_candidates,
        BLOCK_C=triton.next_power_of_2(num_candidates),
    )
    return beta


@triton.jit
def _sinh(x):  # type: ignore[no-untyped-def]
    return 0.5 * (tl.exp(x) - tl.exp(-x))


@triton.jit(do_not_specialize=["num_candidates"])  # type: ignore[untyped-decorator]
def _solve_row(  # type: ignore[no-untyped-def]
    candidate_logprobs_ptr,
    candidate_values_ptr,
    eos_mask_ptr,
    wanted_ptr,
    beta_ptr,
    num_candidates,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    in_c = c < num_candidates
    columns = row * num_candidates + c  # [C]
    logprobs = tl.load(candidate_logprobs_ptr + columns, mask=in_c, other=float("-inf"))
    is_eos = tl.load(eos_mask_ptr + columns, mask=in_c, other=0).to(tl.int1)
    values = tl.where(is_eos, 0.0, tl.load(candidate_values_ptr + columns, mask=in_c, other=0.0))
    candidate = logprobs > float("-inf")

    lowest = tl.min(tl.where(candidate, values, float("inf")), axis=0)
    spread = tl.max(tl.where(candidate, values, float("-inf")), axis=0) - lowest
    varied = spread > 0.0
    divisor = tl.where(varied, spread, 1.0)
    share = tl.where(candidate, (values - lowest) / divisor, 0.0)
    wanted_share = (tl.load(wanted_ptr + row) - lowest) / divisor
    low = -_MAX_ASINH_BETA + 0.0 * divisor
    high = -low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tilted = logprobs + _sinh(middle) * share
        weights = tl.exp(tilted - tl.maximum(tl.max(tilted, axis=0), -3.0e38))
        short = tl.sum(weights * share, axis=0) < wanted_share * tl.sum(weights, axis=0)
        low, high = tl.where(short, middle, low), tl.where(short, high, middle)
    tl.store(beta_ptr + row, tl.where(varied, _sinh((low + high) / 2) / divisor, 0.0))
