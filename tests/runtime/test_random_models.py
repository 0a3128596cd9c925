"""Random heads on dummy weights: does control among five candidates still change a distribution that is measured?"""

from __future__ import annotations

import pytest
import torch

from bench_guided import CONTROL, MIN_EFFECT
from lenvm_kernels.length_value import value_from_length
from random_models import make_head, make_value_head

DUMMY_WEIGHT = 1e-3
"""The greatest weight of SGLang's ``--load-format dummy``, norms included: so are the states."""


def dummy_states(*shape: int) -> torch.Tensor:
    return torch.empty(shape).uniform_(-DUMMY_WEIGHT, DUMMY_WEIGHT)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_steers(values: torch.Tensor) -> None:
    """By what `bench_guided.check` asks: how much the tilt's logits differ between the candidates. [rows, 5]"""
    assert CONTROL.beta is not None
    logits = CONTROL.beta * values
    assert (logits.amax(1) - logits.amin(1)).min() > 10 * MIN_EFFECT


def test_a_separate_lenvms_values_differ_between_candidates() -> None:
    with torch.no_grad():
        values = make_value_head(1536)(dummy_states(20 * 5, 1536))
    assert_steers(values.view(20, 5))


def test_a_candidate_heads_values_differ_between_candidates() -> None:
    head = make_head({"hidden_size": 3584, "vocab_size": 512, "eos_token_id": 0}).candidate_head
    with torch.no_grad():
        rows = head.build_token_table(dummy_states(20 * 5, 3584)).view(20, 5, -1)
        logprobs = head.candidate_logprobs(dummy_states(20, 3584), rows)
        values = (logprobs.exp() * value_from_length(head.bin_lengths, 0.997)).sum(-1)
    assert_steers(values)
