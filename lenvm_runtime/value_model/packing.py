"""Packs one step of the value model: for each request the token just consumed and the candidates to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepRows:
    """T packed rows of R requests; those of a request lie together, the consumed token (row 0) first.

    Rows from ``q_starts[-1]`` on are padding: token 0 at position 0, whose states mean nothing.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    first_rows: Tensor  # [R] int64, row 0 of each request
    candidate_rows: Tensor  # [G, C] int64, row of each candidate; 0 where it is not scored
    slots: Tensor  # [R] int64, KV slot of each row 0
    req_pool_indices: Tensor  # [R] int64
    kv_lens: Tensor  # [R] int64, row 0 included
    q_starts: Tensor  # [R + 1] int64


def pack_step(
    token_ids: Tensor,
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    slots: Tensor,
    guided: Tensor,
    candidate_ids: Tensor,
    scored: Tensor,
    max_candidate_rows: int,
) -> StepRows:
    """Pack the rows of R requests, of which G have candidates.

    token_ids [R] int64: the tokens just consumed, at positions seq_lens - 1; seq_lens, req_pool_indices [R];
    slots [R]: where their keys go; guided [G] int64: which of the R requests have candidates;
    candidate_ids [G, C] int64; scored [G, C] bool: the candidates that need a row; max_candidate_rows >= the number
    of true elements of ``scored``: T = R + max_candidate_rows.

    Fixed shapes, nothing is synchronised with the host.
    """
    num_reqs, num_rows = len(token_ids), len(token_ids) + max_candidate_rows
    counts = torch.ones_like(seq_lens, dtype=torch.int64)
    counts[guided] += scored.sum(1)  # [R]
    q_starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))  # [R + 1]
    kv_lens = seq_lens.long()
    positions = kv_lens - 1

    first_rows = q_starts[:-1]
    candidate_rows = first_rows[guided].unsqueeze(1) + scored.cumsum(1)  # [G, C]: row 0, then the scored in order
    target = torch.where(scored, candidate_rows, num_rows)  # the rest go to a row that is cut off
    candidate_positions = kv_lens[guided].unsqueeze(1).expand_as(target)

    def place(first: Tensor, candidates: Tensor) -> Tensor:
        rows = torch.zeros(num_rows + 1, dtype=torch.int64, device=token_ids.device)
        rows[first_rows] = first
        rows[target] = candidates
        return rows[:num_rows]

    assert num_reqs == len(seq_lens) == len(req_pool_indices)
    return StepRows(
        input_ids=place(token_ids.long(), candidate_ids),
        positions=place(positions, candidate_positions),
        first_rows=first_rows,
        candidate_rows=candidate_rows.masked_fill(~scored, 0),
        slots=slots.long(),
        req_pool_indices=req_pool_indices.long(),
        kv_lens=kv_lens,
        q_starts=q_starts,
    )


def split_requests(max_candidates: Sequence[int], max_rows: int) -> list[slice]:
    """Cut requests of at most so many candidates each into runs of at most ``max_rows`` rows, or of one request."""
    cuts, num_rows = [0], 0
    for request, count in enumerate(max_candidates):
        num_rows += 1 + count
        if num_rows > max_rows and request > cuts[-1]:
            cuts.append(request)
            num_rows = 1 + count
    return [slice(*run) for run in pairwise([*cuts, len(max_candidates)]) if max_candidates]


def read_candidates(values: Tensor, rows: StepRows, scored: Tensor) -> Tensor:
    """Values of the candidates: [T] -> [G, C]; 0 where a candidate was not scored (value 0 is that of an EOS)."""
    return values[rows.candidate_rows].masked_fill(~scored, 0.0)
