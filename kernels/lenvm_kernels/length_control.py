"""Length control: reweight candidate next tokens by where their remaining lengths lead.

A row has generated t = num_generated tokens. Candidate x would be token t + 1; P(m | x) says how many
tokens (bin m, about bin_lengths[m] >= 1 of them) come after it, 0 after an EOS candidate; v(x) is its value
(0 for EOS). A head that predicts P gives v as ``length_value.expected_value``; a LenVM that predicts v gives P
as ``value_distribution.distribution_from_value``. With d = (length - target) / target:

natural   p'(x) ~ p(x) * psi(x) ** strength,  psi(x) = sum_m P(m | x) * K(t + 1 + bin_lengths[m]),
          psi(EOS) = K(t + 1)

          K = exp(-short * max(-d, 0) - long * max(d, 0)), slopes by mode (``PreferenceKernel``): what a
          final length is worth. With strength 1 this is the Doob h-transform of the model's own sampling:
          were P exact, answers would follow p(answer) * K(length), the least-KL way to that preference,
          so EOS gets chance only where the model itself ends. A head that knows less than P asks for more
          strength: its psi differs too little between candidates. psi(EOS) then stands out and would cut
          sentences. Hence EQUAL and AT_MOST end on purpose from an onset on only (the target, or at_most_lead
          before it), after a token that closes a sentence if one comes: with e = max((t + 1) / target - onset, 0),
          0 for t = 0, an EOS with p < min_eos * exp(-eos_haste * e) is forbidden, where e is less by patience
          unless the last token closed a sentence. If it did, EOS gains closing_haste * e nats, else the closing
          candidates gain closing_haste * min(e, patience), where EOS is a candidate. AT_LEAST forbids EOS while
          t + 1 < target. The last candidate is never forbidden.
hard      one-hot at  EQUAL: argmin |length(v(x)) - max(target - t - 1, 0)|;  AT_LEAST: argmin v(x) while
          t + 1 < target;  AT_MOST: argmax v(x).  (Length Value Model, arXiv 2604.27039; first wins ties)
tilt      p'(x) ~ p(x) * exp(beta * v(x)): beta > 0 shortens, beta < 0 lengthens; either strategy
mean      the tilt under which E_{p'}[v] has a wanted value (``mean_target``), with the beta of
          ``solve_mean_tilt``: of all p' with that mean, the one of least KL to p; either strategy

A row that is NONE, a tilt with beta 0, or AT_LEAST with t + 1 >= target keeps its input, bit for bit.

What is returned is the distribution that is sampled from, after temperature, filters and control, over the
candidates alone; SGLang's returned logprobs of a guided row are these, those of other tokens are -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from lenvm_kernels.length_value import MIN_VALUE, length_from_value, value_from_length
from lenvm_kernels.value_bound import NO_MIN_VALUE


class Mode(IntEnum):
    """What a row's length is held to. Codes of the ``mode`` tensor."""

    NONE = 0
    EQUAL = 1
    AT_LEAST = 2
    AT_MOST = 3
    TILT = 4
    MEAN_TARGET = 5
    MEAN_LENGTH_FACTOR = 6
    MEAN_VALUE_FACTOR = 7


class Strategy(IntEnum):
    """How EQUAL, AT_LEAST and AT_MOST are pursued. Codes of the ``strategy`` tensor."""

    NATURAL = 0
    HARD = 1


@dataclass(frozen=True, slots=True)
class PreferenceKernel:
    """Slopes of K, in nats per relative deviation from the target (>= 0): 20 is 1 nat for 5% off.

    Strengths (> 0): of EQUAL, and of the bounds AT_LEAST and AT_MOST. ``min_eos``: the least chance, from 0 to below
    1, that the model itself must give EOS for EQUAL and AT_MOST to end there; ``eos_haste``: by how many nats it falls
    per relative deviation beyond the onset, ``patience`` (a relative deviation) later in the middle of a sentence;
    ``closing_haste``: by how many nats the tokens that close a sentence gain, and EOS after them; ``at_most_lead``:
    how far before its target, as a share of it, AT_MOST has its onset.
    """

    equal_short: float = 24.0
    equal_long: float = 16.0
    at_least_short: float = 20.0
    at_most_long: float = 20.0
    equal_strength: float = 5.0
    bound_strength: float = 3.0
    min_eos: float = 0.005
    eos_haste: float = 120.0
    closing_haste: float = 120.0
    patience: float = 0.1
    at_most_lead: float = 0.2


DEFAULT_KERNEL = PreferenceKernel()


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
    """Steered log-probabilities of the candidates: new float32 [B, C], normalised; -inf stays -inf.

    candidate_logprobs [B, C] float32, -inf for a column that is no candidate; candidate_values [B, C] and
    bin_logprobs [B, C, M] float32 (read at candidates other than EOS); eos_mask [B, C] bool; bin_lengths
    [M] float32; num_generated, mode, strategy [B] int32; target [B] float32, > 0 where the mode has one;
    beta [B] float32, of TILT and of the MEAN modes; closing_mask [B, C] bool, candidates that close a sentence;
    after_closing [B] bool, whether the last token did; gamma in (0, 1) of the model. All on one device: Triton on
    CUDA, torch elsewhere.

    Rows do not influence each other, nothing is synchronised with the host. Where no candidate can reach
    a preferred length (every psi is 0), the row keeps p. The result is never NaN for inputs that are not.
    """
    if candidate_logprobs.is_cuda:
        from lenvm_kernels.length_control_triton import steer_candidates as backend
    else:
        from lenvm_kernels.length_control_torch import steer_candidates as backend
    return backend(
        candidate_logprobs,
        candidate_values,
        bin_logprobs,
        eos_mask,
        bin_lengths,
        num_generated,
        mode,
        strategy,
        target,
        beta,
        closing_mask,
        after_closing,
        gamma,
        kernel,
    )


def solve_mean_tilt(
    candidate_logprobs: torch.Tensor, candidate_values: torch.Tensor, eos_mask: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """The beta of each row for which p'(x) ~ p(x) * exp(beta * v(x)) has E_{p'}[v] = wanted: float32 [B].

    candidate_logprobs, candidate_values [B, C] float32; eos_mask [B, C] bool; wanted [B] float32 in (-1, 0].

    Bisection with a fixed number of steps: the mean grows with beta. A wanted value that no mixture of the
    candidates has leads to the extreme candidate (a beta that leaves the others next to nothing); where all
    candidates have one value, beta is 0. Rows do not influence each other; nothing is synchronised.
    """
    if candidate_logprobs.is_cuda:
        from lenvm_kernels.length_control_triton import solve_mean_tilt as backend
    else:
        from lenvm_kernels.length_control_torch import solve_mean_tilt as backend
    return backend(candidate_logprobs, candidate_values, eos_mask, wanted)


def mean_value(
    candidate_logprobs: torch.Tensor, candidate_values: torch.Tensor, eos_mask: torch.Tensor
) -> torch.Tensor:
    """E_p[v] over each row's candidates, 0 without any: float32 [B] in [-1, 0].

    candidate_logprobs, candidate_values [B, C] float32, read at candidates other than EOS; eos_mask [B, C] bool.
    """
    chosen = candidate_logprobs.exp() * candidate_values.masked_fill(eos_mask, 0.0)
    return torch.where(candidate_logprobs > -torch.inf, chosen, 0.0).sum(-1)


def mean_target(
    candidate_logprobs: torch.Tensor,
    candidate_values: torch.Tensor,
    eos_mask: torch.Tensor,
    num_generated: torch.Tensor,
    mode: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    gamma: float,
) -> torch.Tensor:
    """The mean value that a MEAN row wants of its next state, with e its `mean_value`: float32 [B].

    MEAN_TARGET          value(max(target - t - 1, 0)): target tokens in all
    MEAN_LENGTH_FACTOR   value(factor * length(e)): factor times as many tokens to come as predicted
    MEAN_VALUE_FACTOR    max(factor * e, -1)

    candidate_logprobs, candidate_values [B, C] float32; eos_mask [B, C] bool; num_generated, mode [B] int32;
    target, factor [B] float32, read where the mode has one. Other modes: meaningless, finite.
    """
    mean = mean_value(candidate_logprobs, candidate_values, eos_mask)  # [B]
    by_target = value_from_length((target - num_generated - 1).clamp(min=0.0), gamma)
    by_length = value_from_length(factor * length_from_value(mean, gamma), gamma)
    by_value = (factor * mean).clamp(MIN_VALUE, 0.0)
    scaled = torch.where(mode == Mode.MEAN_VALUE_FACTOR, by_value, by_length)
    return torch.where(mode == Mode.MEAN_TARGET, by_target, scaled)


def needs_scoring(
    candidate_logprobs: torch.Tensor,
    mode: torch.Tensor,
    beta: torch.Tensor,
    entropy_threshold: torch.Tensor,
    min_value: torch.Tensor,
) -> torch.Tensor:
    """Rows whose candidates' values can change anything, and are wanted: bool [B].

    Not: rows under no control (NONE, TILT with beta 0; each without a min_value), with at most one candidate, or
    whose candidates' entropy -sum p log p, in nats, is below entropy_threshold [B] float32 (0: never). A row left
    out is to be steered with mode NONE. candidate_logprobs [B, C] float32, normalised; mode [B] int32; beta,
    min_value [B] float32 (NO_MIN_VALUE: none).
    """
    candidate = candidate_logprobs > -torch.inf
    surprise = torch.where(candidate, -candidate_logprobs.exp() * candidate_logprobs, 0.0)
    steered = (mode != Mode.NONE) & ~((mode == Mode.TILT) & (beta == 0))
    controlled = steered | (min_value > NO_MIN_VALUE)
    return controlled & (candidate.sum(-1) > 1) & (surprise.sum(-1) >= entropy_threshold)
