"""Draws after top-k, top-p and min-p are SGLang's own, token for token."""

from __future__ import annotations

import pytest
import torch

from lenvm_kernels.candidates import TOP_K_ALL
from lenvm_kernels.filtered_draw import NUM_LIKELIEST, draw_filtered

FILTERS = [
    (5, 1.0, 0.0),
    (TOP_K_ALL, 0.9, 0.0),
    (TOP_K_ALL, 1.0, 0.05),
    (20, 0.8, 0.02),
    (1, 1.0, 0.0),
    (TOP_K_ALL, 1.0, 0.0),  # the whole vocabulary, beside filtered rows
    (300, 0.999, 0.0),
    (255, 1.0, 0.0),
]


def both(probs: torch.Tensor, filters: list[tuple[int, float, float]], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of SGLang's sampler and of ours, and one more number of each generator."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch as sglang_draw

    top_ks, top_ps, min_ps = (torch.tensor(column) for column in zip(*filters, strict=True))
    torch.manual_seed(seed)
    expected = [*sglang_draw(probs.clone(), top_ks, top_ps, min_ps, True, None, None).tolist(), torch.rand(1)]
    torch.manual_seed(seed)
    found = [*draw_filtered(probs.clone(), top_ks, top_ps, min_ps).tolist(), torch.rand(1)]
    return torch.tensor(expected), torch.tensor(found)


@pytest.mark.parametrize("vocab", [40, NUM_LIKELIEST, 5000])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 6.0])
def test_tokens_are_those_of_sglang(vocab: int, sharpness: float) -> None:
    """Of bf16 logits, whose probabilities tie often."""
    generator = torch.Generator().manual_seed(vocab)
    for seed in range(5):
        logits = sharpness * torch.randn(2 * len(FILTERS), vocab, generator=generator).bfloat16()
        expected, found = both(torch.softmax(logits.float(), -1), FILTERS * 2, seed)
        assert torch.equal(found, expected)


def test_rows_with_few_candidates_left_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A steered row has no filter any more and probability 0 beyond its candidates."""
    logits = torch.full((4, 3000), -torch.inf)
    logits[:, 7:100] = torch.randn(4, 93, generator=torch.Generator().manual_seed(0))
    probs = torch.softmax(logits, -1)
    expected, found = both(probs, [(TOP_K_ALL, 1.0, 0.0)] * 4, 1)
    assert torch.equal(found, expected)
    monkeypatch.setattr(torch.Tensor, "sort", None, raising=False)
    draw_filtered(probs, torch.tensor([TOP_K_ALL, 5, 40, TOP_K_ALL]), torch.ones(4), torch.zeros(4))
