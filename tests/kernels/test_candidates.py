"""Candidate selection against a plain per-row statement of SGLang's filters, and the way back to logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats

from lenvm_kernels.candidates import (
    BANNED_BELOW,
    CHUNK,
    TOP_K_ALL,
    Candidates,
    likeliest_tokens,
    release_filters,
    release_temperatures,
    scatter_candidates,
    select_candidates,
)

VOCAB = 97
EOS = torch.tensor([3, 50])


def make_batch(num_rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows with all kinds of filters, greedy rows and grammar masks among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, VOCAB, generator=generator)
    logits[2::5, ::3] = -torch.inf
    logits[::2, 1::2] -= 100.0  # a bias that bans
    return {
        "logits": logits,
        "temperatures": torch.tensor([1.0, 0.7, 1.3])[torch.arange(num_rows) % 3].unsqueeze(1),
        "top_ks": torch.tensor([TOP_K_ALL, 5, 1, 40], dtype=torch.int32)[torch.arange(num_rows) % 4],
        "top_ps": torch.tensor([1.0, 0.9, 0.5, 0.99, 1.0])[torch.arange(num_rows) % 5],
        "min_ps": torch.tensor([0.0, 0.1, 0.0, 0.01])[torch.arange(num_rows) % 4],
        "exempt_eos": torch.arange(num_rows) % 3 != 1,
    }


def select(batch: dict[str, torch.Tensor], max_candidates: int) -> Candidates:
    return select_candidates(**batch, eos_token_ids=EOS, max_candidates=max_candidates)


def expected_row(row: dict[str, Any], max_candidates: int) -> dict[int, float]:
    """The candidate set of one row, one token after the other."""
    greedy = row["top_ks"] <= 1
    temperature = 1.0 if greedy else row["temperatures"].item()
    probs = torch.softmax(row["logits"].double() / temperature, -1).tolist()
    banned = (row["logits"] <= row["logits"].max() - BANNED_BELOW).tolist()
    chosen: dict[int, float] = {}
    mass = 0.0
    ranked = sorted(range(VOCAB), key=lambda token: -probs[token])
    for rank, token in enumerate(ranked[:max_candidates]):
        passes = rank < row["top_ks"] and mass <= row["top_ps"] and probs[token] >= row["min_ps"] * probs[ranked[0]]
        mass += probs[token]
        if not banned[token] and (greedy or passes):
            chosen[token] = probs[token]
    if row["exempt_eos"]:
        chosen |= {token: probs[token] for token in EOS.tolist() if not banned[token]}
    return {token: math.log(p / sum(chosen.values())) for token, p in chosen.items()}


@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("max_candidates", [1, 2, 33, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_are_those_of_the_filters_and_eos(num_rows: int, max_candidates: int, dtype: torch.dtype) -> None:
    batch = make_batch(num_rows)
    if dtype == torch.bfloat16:  # distinct logits that bfloat16 holds exactly: no ties at the cut
        grid = torch.stack([torch.randperm(VOCAB, generator=torch.Generator().manual_seed(i)) for i in range(num_rows)])
        batch["logits"] = torch.where(batch["logits"] > -torch.inf, grid / 16, -torch.inf).to(dtype)
    ids, logprobs, eos_mask = select(batch, max_candidates)
    assert ids.shape == logprobs.shape == eos_mask.shape == (num_rows, max_candidates + 2)
    assert ids.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    assert (eos_mask == (torch.arange(max_candidates + 2) >= max_candidates)).all()
    for i in range(num_rows):
        expected = expected_row({name: column[i] for name, column in batch.items()}, max_candidates)
        kept = [(t, p) for t, p in zip(ids[i].tolist(), logprobs[i].tolist(), strict=True) if p > -math.inf]
        assert len(kept) == len(expected)  # no token twice
        assert dict(kept) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("width", [VOCAB, 5 * CHUNK, 40 * CHUNK, 40 * CHUNK + 17])
@pytest.mark.parametrize("num_tokens", [1, 5, 39])
def test_the_likeliest_tokens_are_those_of_topk(width: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(width)
    logprobs = torch.randn(7, width, generator=generator)
    logprobs[1, : 3 * width // 4] = -torch.inf
    logprobs[2] = -torch.inf
    logprobs[2, width - 1] = 0.0
    logprobs[3] = logprobs[3].sort().values  # all of them in neighbouring chunks
    values, ids = likeliest_tokens(logprobs, num_tokens)
    assert torch.equal(values, logprobs.topk(num_tokens).values)
    assert torch.equal(values, logprobs.gather(1, ids))
    assert all(len(set(row)) == num_tokens for row in ids.tolist())


def test_eos_keeps_its_true_chance_beside_filtered_tokens() -> None:
    batch = make_batch(1)
    batch |= {"top_ks": torch.tensor([4]), "top_ps": torch.tensor([0.9]), "min_ps": torch.tensor([0.5])}
    batch["logits"][0, EOS] = torch.tensor([-9.0, -torch.inf])
    ids, logprobs, _ = select(batch, 8)
    true = torch.log_softmax(batch["logits"], -1)[0]
    assert logprobs[0, 8] - logprobs[0, 0] == pytest.approx((true[3] - true[ids[0, 0]]).item(), abs=1e-5)
    assert logprobs[0, 9] == -torch.inf


def test_row_with_a_single_token_left() -> None:
    batch = make_batch(3)
    batch["logits"][1] = -torch.inf
    batch["logits"][1, 42] = -7.0
    ids, logprobs, _ = select(batch, 5)
    assert ids[1, 0] == 42
    assert logprobs[1].tolist() == [0.0] + [-math.inf] * 6


def test_a_row_alone_equals_the_row_in_a_mixed_batch_bitwise() -> None:
    batch = make_batch(17)
    together = select(batch, 33)
    for i in range(17):
        alone = select({name: column[i : i + 1] for name, column in batch.items()}, 33)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[i])


def sglang_softmax(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.softmax(logits / batch["temperatures"], -1)


def test_scattered_logits_hold_the_steered_distribution_and_leave_other_rows_alone() -> None:
    batch = make_batch(17)
    ids, logprobs, _ = select(batch, 33)
    steered = torch.log_softmax(logprobs + torch.randn(17, 35), -1)
    guided = torch.arange(17) % 2 == 0
    logits = batch["logits"].clone()
    scatter_candidates(logits, ids, steered, batch["temperatures"], guided)
    assert torch.equal(logits[1::2], batch["logits"][1::2])
    expected = torch.zeros(17, VOCAB).scatter_add_(1, ids, steered.exp())
    torch.testing.assert_close(sglang_softmax(logits, batch)[guided], expected[guided], atol=1e-6, rtol=1e-4)
    assert (logits[guided] > -torch.inf).sum() == (steered[guided] > -torch.inf).sum()


def test_sampling_scattered_logits_draws_the_steered_frequencies() -> None:
    batch = make_batch(2)
    ids, logprobs, eos_mask = select(batch, 6)
    steered = torch.log_softmax(logprobs + 2.0 * eos_mask, -1)
    logits = batch["logits"].clone()
    scatter_candidates(logits, ids, steered, batch["temperatures"], torch.tensor([True, True]))
    probs = torch.zeros(2, VOCAB).scatter_add_(1, ids, steered.exp())
    num_draws = 20_000
    drawn = torch.multinomial(
        sglang_softmax(logits, batch), num_draws, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    for row_drawn, row_probs in zip(drawn, probs, strict=True):
        counts = torch.bincount(row_drawn, minlength=VOCAB)
        assert counts[row_probs == 0].sum() == 0
        likely = row_probs * num_draws >= 5
        observed = torch.cat([counts[likely], counts[~likely].sum().view(1)]).double()
        expected = torch.cat([row_probs[likely], row_probs[~likely].sum().view(1)]).double() * num_draws
        deviation = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
        assert deviation < stats.chi2.isf(1e-4, int(likely.sum()))


def test_released_filters_sample_guided_rows_as_they_are() -> None:
    batch = make_batch(8)
    guided = torch.arange(8) < 4
    top_ks, top_ps, min_ps = release_filters(batch["top_ks"], batch["top_ps"], batch["min_ps"], guided)
    assert top_ks.tolist() == [TOP_K_ALL, TOP_K_ALL, 1, TOP_K_ALL, *batch["top_ks"][4:].tolist()]
    assert top_ks.dtype == batch["top_ks"].dtype
    assert top_ps.tolist() == [1.0] * 4 + batch["top_ps"][4:].tolist()
    assert min_ps.tolist() == [0.0] * 4 + batch["min_ps"][4:].tolist()


def test_greedy_guided_row_takes_the_steered_argmax() -> None:
    batch = make_batch(3)  # row 2 is greedy
    ids, logprobs, _ = select(batch, 6)
    steered = logprobs.clone()
    steered[2, 4] = 1.0
    logits = batch["logits"].clone()
    scatter_candidates(logits, ids, steered, batch["temperatures"], torch.tensor([False, False, True]))
    assert logits[2].argmax() == ids[2, 4]


def test_nothing_is_read_back_to_the_host() -> None:
    """Meta tensors hold no data: reading one, or a shape that depends on data, raises."""
    batch = {name: column.to("meta") for name, column in make_batch(3).items()}
    eos, guided = EOS.to("meta"), torch.empty(3, dtype=torch.bool, device="meta")
    ids, logprobs, _ = select_candidates(**batch, eos_token_ids=eos, max_candidates=7)
    scatter_candidates(batch["logits"], ids, logprobs, batch["temperatures"], guided)
    release_filters(batch["top_ks"], batch["top_ps"], batch["min_ps"], guided)


def test_an_eos_that_a_bias_bans_is_no_candidate() -> None:
    batch = make_batch(3) | {"exempt_eos": torch.ones(3, dtype=torch.bool)}
    batch["logits"][:, EOS] = torch.tensor([[-100.0, 0.0], [-40.0, 0.0], [-100.0, -100.0]])
    _, logprobs, eos_mask = select(batch, 33)
    assert (logprobs[eos_mask].view(3, 2) > -torch.inf).tolist() == [[False, True], [True, True], [False, False]]


@pytest.mark.parametrize("biases", [{7: -100.0}, {5: 100.0, 6: 100.0}], ids=["banned", "allowed"])
def test_a_token_that_a_bias_bans_is_no_candidate(biases: dict[int, float]) -> None:
    """A grammar leaves three tokens and EOS; a biased row beside one without a bias, each sampled and greedy."""
    batch = make_batch(4) | {"exempt_eos": torch.ones(4, dtype=torch.bool), "min_ps": torch.zeros(4)}
    batch |= {"top_ks": torch.tensor([TOP_K_ALL, TOP_K_ALL, 1, 1]), "top_ps": torch.ones(4)}
    batch["logits"] = torch.full((4, VOCAB), -torch.inf)
    batch["logits"][:, [3, 5, 6, 7]] = torch.tensor([-9.0, 1.0, 0.0, 2.0])
    for token, bias in biases.items():
        batch["logits"][::2, token] += bias
    ids, logprobs, _ = select(batch, 33)
    found = [set(row[chosen].tolist()) for row, chosen in zip(ids, logprobs > -torch.inf, strict=True)]
    biased = {3, 5, 6} if 7 in biases else {5, 6}
    assert found == [biased, {3, 5, 6, 7}] * 2


def test_greedy_guided_rows_are_sampled_at_temperature_1() -> None:
    batch = make_batch(4) | {"top_ks": torch.tensor([1, 1, TOP_K_ALL, 1])}
    batch["temperatures"] = torch.tensor([[0.5], [0.5], [0.5], [1.0]])
    guided = torch.tensor([True, False, True, True])
    kept = batch["temperatures"].clone()
    assert release_temperatures(batch["temperatures"], batch["top_ks"], guided).tolist() == [[1.0], [0.5], [0.5], [1.0]]
    assert torch.equal(batch["temperatures"], kept)
