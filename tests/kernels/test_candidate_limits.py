"""Rows of a batch with limits of their own on their candidates."""

from __future__ import annotations

import pytest
import torch

from lenvm_kernels.candidate_limits import limit_candidates
from lenvm_kernels.candidates import Candidates


def limit(
    probs: list[list[float]], max_ranks: list[int], endless: list[bool], exempt_eos: list[bool]
) -> list[list[float]]:
    """Rows whose last column is EOS."""
    weights = torch.tensor(probs)
    eos_mask = (torch.arange(weights.shape[1]) == weights.shape[1] - 1).expand_as(weights)
    ids = torch.arange(weights.shape[1]).expand_as(weights)
    limits = torch.tensor(max_ranks), torch.tensor(endless), torch.tensor(exempt_eos)
    limited = limit_candidates(Candidates(ids, weights.log(), eos_mask), *limits)
    return limited.logprobs.exp().tolist()


@pytest.mark.parametrize(
    ("probs", "max_rank", "endless", "exempt_eos", "expected"),
    [
        ([0.5, 0.3, 0.2], 9, False, False, [0.5, 0.3, 0.2]),
        ([0.5, 0.3, 0.2], 1, False, True, [5 / 7, 0.0, 2 / 7]),  # an exempt EOS has no rank
        ([0.5, 0.3, 0.2], 2, False, False, [0.625, 0.375, 0.0]),
        ([0.5, 0.3, 0.2], 9, True, True, [0.625, 0.375, 0.0]),
        ([0.5, 0.3, 0.2], 1, True, True, [1.0, 0.0, 0.0]),
        ([0.0, 0.0, 1.0], 9, True, False, [0.0, 0.0, 1.0]),  # a grammar that allows EOS alone
    ],
)
def test_a_row_keeps_its_ranks_and_loses_an_eos_that_ends_nothing(
    probs: list[float], max_rank: int, endless: bool, exempt_eos: bool, expected: list[float]
) -> None:
    alone = limit([probs], [max_rank], [endless], [exempt_eos])[0]
    assert alone == pytest.approx(expected)
    beside = limit(
        [[0.2, 0.2, 0.6], probs, [0.9, 0.1, 0.0]], [1, max_rank, 9], [False, endless, True], [True, exempt_eos, False]
    )
    assert beside[1] == alone


def test_nothing_is_read_back_to_the_host() -> None:
    parts = torch.zeros(3, 5, device="meta")
    candidates = Candidates(parts.long(), parts, parts.bool())
    assert limit_candidates(candidates, parts[:, 0].int(), *[parts[:, 0].bool()] * 2).logprobs.shape == (3, 5)
