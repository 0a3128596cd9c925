"""Limits of single rows on their candidates, where the rows of a batch differ in them."""

from __future__ import annotations

import torch
from torch import Tensor

from lenvm_kernels.candidates import Candidates


def limit_candidates(candidates: Candidates, max_ranks: Tensor, endless: Tensor, exempt_eos: Tensor) -> Candidates:
    """The candidates with some rows restricted, and renormalised where they lose any.

    max_ranks [B] int: a row keeps its so many likeliest candidates, in rows of exempt_eos [B] bool beside EOS ids;
    endless [B] bool: rows that no EOS ends lose their EOS candidates, unless nothing else is left. A row that loses
    none keeps every bit. Rows do not influence each other; nothing is synchronised with the host.
    """
    ids, logprobs, eos_mask = candidates
    candidate = logprobs > -torch.inf
    column = torch.arange(ids.shape[1], device=ids.device)
    num_likelier = (logprobs.unsqueeze(1) > logprobs.unsqueeze(2)).sum(-1)  # [B, C]
    kept = candidate & torch.where(
        eos_mask,
        exempt_eos.unsqueeze(-1) | (num_likelier < max_ranks.unsqueeze(-1)),
        column < max_ranks.unsqueeze(-1),
    )
    others_left = (kept & ~eos_mask).any(-1, keepdim=True)
    kept &= ~(eos_mask & endless.unsqueeze(-1) & others_left)
    limited = torch.log_softmax(logprobs.masked_fill(~kept, -torch.inf), dim=-1)
    return Candidates(ids, torch.where((candidate == kept).all(-1, keepdim=True), logprobs, limited), eos_mask)
