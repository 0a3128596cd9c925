"""A least value of the candidates: a bound on how much may follow the next token. Beside every mode of control."""

from __future__ import annotations

import torch
from torch import Tensor

NO_MIN_VALUE = -1.0
"""The bound of a row without one: no value is less."""


def forbid_low_values(candidate_logprobs: Tensor, values: Tensor, eos_mask: Tensor, min_value: Tensor) -> Tensor:
    """Candidates of a value below ``min_value`` dropped, their chance shared out to the others: new float32 [B, C].

    candidate_logprobs [B, C] float32, normalised, -inf for a column that is no candidate; values [B, C] float32,
    read at candidates other than EOS; eos_mask [B, C] bool; min_value [B] float32, NO_MIN_VALUE for no bound.

    An EOS keeps its chance. A row none of whose other candidates has such a value keeps its input, bit for bit, as
    one without a bound does: an answer that is too long by any way of going on is not cut. Rows do not influence
    each other; nothing is synchronised with the host.
    """
    going_on = (candidate_logprobs > -torch.inf) & ~eos_mask  # [B, C]
    dropped = going_on & (values < min_value.unsqueeze(-1))
    dropped &= (going_on & ~dropped).any(-1, keepdim=True)
    others = candidate_logprobs.masked_fill(~going_on, -torch.inf)
    left = others.masked_fill(dropped, -torch.inf)
    gain = others.logsumexp(-1, keepdim=True) - left.logsumexp(-1, keepdim=True)  # [B, 1]
    bounded = torch.where(going_on, left + gain, candidate_logprobs)
    return torch.where(dropped.any(-1, keepdim=True), bounded, candidate_logprobs)
