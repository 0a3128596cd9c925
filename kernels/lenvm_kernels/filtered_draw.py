"""One draw a row after top-k, top-p and min-p: the tokens of SGLang's torch sampler, without sorting the vocabulary.

On a CPU: which rows the likeliest tokens suffice for is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lenvm_kernels.multinomial import multinomial

NUM_LIKELIEST = 256
_ROUNDING = 1e-5
"""Of a sum of probabilities, several times over."""


def draw_filtered(probs: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """Draw one token a row: [rows, vocab] fp32 probabilities -> [rows] int32.

    top_ks [rows] int, top_ps, min_ps [rows] float. Uses and advances torch's default generator as
    ``torch.multinomial(p, 1)`` does on the whole sorted and filtered table p, and gives its tokens. Rows for which a
    filter ends within the NUM_LIKELIEST tokens are not sorted beyond them, unless two of the kept ones are equally
    likely: the order of those is left to torch's own sort of the whole row.
    """
    table, ids = torch.zeros_like(probs), torch.zeros_like(probs, dtype=torch.int32)
    likeliest, likeliest_ids = probs.topk(min(NUM_LIKELIEST, probs.shape[1]), dim=-1)
    kept = _filter(likeliest, top_ks, top_ps, min_ps)
    enough = _is_enough(likeliest, kept, top_ks, top_ps, min_ps)
    table[:, : kept.shape[1]], ids[:, : kept.shape[1]] = kept, likeliest_ids.int()
    rest = (~enough).nonzero().flatten()
    if len(rest):
        ordered, ordered_ids = probs[rest].sort(dim=-1, descending=True)
        table[rest] = _filter(ordered, top_ks[rest], top_ps[rest], min_ps[rest])
        ids[rest] = ordered_ids.int()
    return ids.gather(1, multinomial(table)).view(-1)


def _filter(ordered: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """Falling probabilities [rows, n] with those that a filter drops set to 0: new."""
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    dropped = (rank >= top_ks.view(-1, 1)) | (_mass_before(ordered) > top_ps.view(-1, 1))
    dropped |= ordered < ordered[:, :1] * min_ps.view(-1, 1)
    return ordered.masked_fill(dropped, 0.0)


def _mass_before(ordered: Tensor) -> Tensor:
    return ordered.cumsum(-1) - ordered


def _is_enough(likeliest: Tensor, kept: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """Rows of which every further token is dropped, and no two kept ones are equal: bool [rows]."""
    last = likeliest[:, -1]
    ended = (top_ks < likeliest.shape[1]) | (last == 0) | (last < likeliest[:, 0] * min_ps)
    ended |= _mass_before(likeliest)[:, -1] > top_ps + _ROUNDING
    tied = (kept[:, :-1] > 0) & (likeliest[:, :-1] == likeliest[:, 1:])
    return ended & ~tied.any(-1)
