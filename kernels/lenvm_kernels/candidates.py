"""From a batch of logits to a small set of candidate next tokens, and back.

Fixed shapes, no host synchronisation, each row independent of the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

TOP_K_ALL = 1 << 30
"""SGLang's top_k of a request without a top-k filter."""
NO_TOKEN = -1
"""In place of an EOS id, where rows have different numbers of them."""
BANNED_BELOW = 60.0
"""A logit so far below the row's greatest is banned (a chance of 1e-26 at temperature 1): OpenAI's logit_bias of -100
is a ban, one of 100 bans the others. The logits that models give EOS lie at most about 25 below the greatest."""

CHUNK = 128


class Candidates(NamedTuple):
    """Candidate next tokens of B rows. Columns 0..K-1 by falling probability, columns K.. the E EOS ids.

    A column that is no candidate (filtered, or an EOS id that has its own column) has logprob -inf; that of NO_TOKEN
    has id 0.
    """

    ids: torch.Tensor  # [B, K + E] int64
    logprobs: torch.Tensor  # [B, K + E] float32, normalised over the candidates
    eos_mask: torch.Tensor  # [B, K + E] bool, true in columns K..


def select_candidates(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    eos_token_ids: torch.Tensor,
    max_candidates: int,
    exempt_eos: torch.Tensor,
) -> Candidates:
    """The K = max_candidates likeliest tokens that pass the request's filters, and, in exempt rows, every EOS id.

    logits [B, V] float; temperatures [B] or [B, 1]; top_ks [B] int; top_ps, min_ps [B] float;
    eos_token_ids [E] or [B, E] int64, each < V, distinct in a row but for NO_TOKEN; 1 <= max_candidates <= V;
    exempt_eos [B] bool.

    The filters are those of SGLang's pytorch backend, on p = softmax(logits / T) sorted: rank < top_k,
    (sum of the likelier ones) <= top_p, p >= min_p * max p. They need no more than the first K ranks.
    In exempt rows EOS ids pass K and the filters whatever their chance: they keep their true p(EOS) beside the
    others' p before the whole set is renormalised, so that an answer can end where the model gives it a chance
    at all. In other rows EOS is a candidate like any token. Tokens with logit -inf (a grammar's mask) never are,
    nor are those, EOS or not, that a bias has put BANNED_BELOW under the greatest logit: steering could prefer them.

    Greedy rows (top_k <= 1, as SGLang marks them) get the K likeliest tokens at temperature 1, without
    top-p and min-p, which greedy decoding ignores: take the argmax after steering.
    """
    greedy = (top_ks <= 1).unsqueeze(-1)  # [B, 1]
    temperature = torch.where(greedy, 1.0, temperatures.view(-1, 1))
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)  # [B, V]
    top_logprobs, top_ids = likeliest_tokens(logprobs, max_candidates)  # [B, K]

    keep = greedy | _passes_filters(top_logprobs.exp(), top_ks, top_ps, min_ps)
    eos_ids = eos_token_ids.expand(logits.shape[0], -1)  # [B, E]
    is_eos = top_ids.unsqueeze(-1) == eos_ids.unsqueeze(1)  # [B, K, E]
    eos_passes = exempt_eos.unsqueeze(-1) | (is_eos & keep.unsqueeze(-1)).any(1)  # [B, E]
    keep = torch.cat([keep & ~is_eos.any(-1), eos_passes & (eos_ids != NO_TOKEN)], dim=-1)  # [B, K + E]

    ids = torch.cat([top_ids, eos_ids.clamp(min=0)], dim=-1)
    keep &= logits.gather(1, ids) > logits.gather(1, top_ids[:, :1]) - BANNED_BELOW
    weights = logprobs.gather(1, ids).masked_fill(~keep, -torch.inf)
    eos_mask = torch.arange(ids.shape[1], device=ids.device) >= max_candidates
    return Candidates(ids, torch.log_softmax(weights, dim=-1), eos_mask.expand_as(ids))


def likeliest_tokens(logprobs: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``num_tokens`` greatest of each row, falling, and where they are: [B, V] -> [B, K], [B, K] int64.

    ``Tensor.topk`` in one pass over wide rows: a row's K greatest elements lie in the K chunks with the greatest
    maxima, because each chunk with a greater maximum holds a greater element.
    """
    num_chunks = logprobs.shape[-1] // CHUNK
    if num_chunks <= num_tokens:
        top = logprobs.topk(num_tokens, dim=-1)
        return top.values, top.indices
    tokens = torch.arange(logprobs.shape[-1], device=logprobs.device)
    chunks = logprobs[:, : num_chunks * CHUNK].unflatten(-1, (-1, CHUNK))  # [B, chunks, CHUNK]
    best = chunks.amax(-1).topk(num_tokens, dim=-1, sorted=False).indices  # [B, K]
    kept = chunks.gather(1, best.unsqueeze(-1).expand(-1, -1, CHUNK)).flatten(1)
    kept_ids = (best.unsqueeze(-1) * CHUNK + tokens[:CHUNK]).flatten(1)
    rest, rest_ids = logprobs[:, num_chunks * CHUNK :], tokens[num_chunks * CHUNK :]
    top = torch.cat([kept, rest], dim=-1).topk(num_tokens, dim=-1)
    ids = torch.cat([kept_ids, rest_ids.expand(len(rest), -1)], dim=-1)
    return top.values, ids.gather(1, top.indices)


def scatter_candidates(
    logits: torch.Tensor,
    candidate_ids: torch.Tensor,
    steered_logprobs: torch.Tensor,
    temperatures: torch.Tensor,
    guided: torch.Tensor,
) -> None:
    """Write the steered distribution of guided rows into ``logits`` [B, V], in place.

    A guided row becomes T * steered_logprobs at its candidates and -inf elsewhere, so that
    softmax(logits / T), the first thing that SGLang's sampler computes, is the steered distribution.
    An id in several columns gets the greatest of them (the others are -inf: ``select_candidates``
    counts no token twice). Unguided rows keep every bit.

    candidate_ids, steered_logprobs [B, C]; temperatures [B] or [B, 1], > 0; guided [B] bool.

    The sampler then filters once more. On a row steered by a one-hot (hard strategy) every filter is
    neutral. Otherwise none is: top-p and min-p cut the tail of the *steered* distribution, and top-k may
    drop an EOS id that stands beside k other candidates. They have been applied once, by
    ``select_candidates``: sample with ``release_filters``.
    """
    guided = guided.unsqueeze(-1)  # [B, 1]
    rows = (steered_logprobs * temperatures.view(-1, 1)).masked_fill(~guided, -torch.inf)  # [B, C]
    logits.masked_fill_(guided, -torch.inf)
    logits.scatter_reduce_(1, candidate_ids, rows.to(logits.dtype), "amax")


def release_temperatures(temperatures: torch.Tensor, top_ks: torch.Tensor, guided: torch.Tensor) -> torch.Tensor:
    """New temperatures, of the same shape: 1 in greedy guided rows (top_k <= 1), whose draw ignores theirs.

    temperatures [B] or [B, 1]; top_ks [B] int; guided [B] bool. SGLang divides logits by them unless all rows are
    greedy: at 1 the log-probabilities of such a row do not depend on the others.
    """
    return temperatures.masked_fill((guided & (top_ks <= 1)).view_as(temperatures), 1.0)


def release_filters(
    top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor, guided: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New (top_ks, top_ps, min_ps), each [B], with which SGLang samples guided rows without filtering.

    Greedy rows (top_k <= 1) stay greedy; unguided rows keep their filters.
    """
    released_top_ks = torch.where(guided & (top_ks > 1), TOP_K_ALL, top_ks)
    return released_top_ks, top_ps.masked_fill(guided, 1.0), min_ps.masked_fill(guided, 0.0)


def _passes_filters(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor
) -> torch.Tensor:
    """Whether each of the likeliest tokens (probs [B, K], falling) passes top-k, top-p and min-p: [B, K] bool."""
    rank = torch.arange(probs.shape[1], device=probs.device)
    mass_before = (probs.cumsum(-1) - probs).clamp(max=1.0)  # rounding: top_p = 1 must not cut
    keep = (rank < top_ks.unsqueeze(-1)) & (mass_before <= top_ps.unsqueeze(-1))
    return keep & (probs >= probs[:, :1] * min_ps.unsqueeze(-1))
