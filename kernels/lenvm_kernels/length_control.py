"""Length control: reweight candidate next tokens by where their remaining-length distributions lead.

A row has generated t = num_generated tokens. Candidate x would be token t + 1; P(m | x) says how many
tokens (bin m, about bin_lengths[m] >= 1 of them) come after it, 0 after an EOS candidate. With v(x) the
expected value after x (``length_value.expected_value``; 0 for EOS) and d = (length - target) / target:

natural   p'(x) ~ p(x) * psi(x) ** strength,  psi(x) = sum_m P(m | x) * K(t + 1 + bin_lengths[m]),
          psi(EOS) = K(t + 1)

          K = exp(-short * max(-d, 0) - long * max(d, 0)), slopes by mode (``PreferenceKernel``): what a
          final length is worth. With strength 1 this is the Doob h-transform of the model's own sampling:
          were P exact, answers would follow p(answer) * K(length), the least-KL way to that preference,
          so EOS gets chance only where the model itself ends. A head that knows less than P asks for more
          strength: its psi differs too little between candidates. AT_LEAST also forbids EOS while t + 1 < target.
hard      one-hot at  EQUAL: argmin |length(v(x)) - max(target - t - 1, 0)|;  AT_LEAST: argmin v(x) while
          t + 1 < target;  AT_MOST: argmax v(x).  (Length Value Model, arXiv 2604.27039; first wins ties)
tilt      p'(x) ~ p(x) * exp(beta * v(x)): beta > 0 shortens, beta < 0 lengthens; either strategy

A row that is NONE, TILT with beta 0, or AT_LEAST with t + 1 >= target keeps its input, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


class Mode(IntEnum):
    """What a row's length is held to. Codes of the ``mode`` tensor."""

    NONE = 0
    EQUAL = 1
    AT_LEAST = 2
    AT_MOST = 3
    TILT = 4


class Strategy(IntEnum):
    """How EQUAL, AT_LEAST and AT_MOST are pursued. Codes of the ``strategy`` tensor."""

    NATURAL = 0
    HARD = 1


@dataclass(frozen=True, slots=True)
class PreferenceKernel:
    """Slopes of K, in nats per relative deviation from the target (>= 0): 20 is 1 nat for 5% off.

    Strengths (> 0): of EQUAL, and of the bounds AT_LEAST and AT_MOST.
    """

    equal_short: float = 24.0
    equal_long: float = 16.0
    at_least_short: float = 20.0
    at_most_long: float = 20.0
    equal_strength: float = 5.0
    bound_strength: float = 3.0


DEFAULT_KERNEL = PreferenceKernel()


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
    """Steered log-probabilities of the candidates: new float32 [B, C], normalised; -inf stays -inf.

    candidate_logprobs [B, C] float32, -inf for a column that is no candidate; bin_logprobs [B, C, M]
    float32 (read at candidates other than EOS); eos_mask [B, C] bool; bin_lengths [M] float32;
    num_generated, mode, strategy [B] int32; target [B] float32, > 0 where the mode has one; beta [B]
    float32; gamma in (0, 1) of the head. All on one device: Triton on CUDA, torch elsewhere.

    Rows do not influence each other, nothing is synchronised with the host. Where no candidate can reach
    a preferred length (every psi is 0), the row keeps p. The result is never NaN for inputs that are not.
    """
    if candidate_logprobs.is_cuda:
        from lenvm_kernels.length_control_triton import steer_candidates as backend
    else:
        from lenvm_kernels.length_control_torch import steer_candidates as backend
    return backend(
        candidate_logprobs,
        bin_logprobs,
        eos_mask,
        bin_lengths,
        num_generated,
        mode,
        strategy,
        target,
        beta,
        gamma,
        kernel,
    )
