"""The bound on candidates' values: by definition, row by row, and without reading anything on the host."""

from __future__ import annotations

import pytest
import torch

from lenvm_kernels.value_bound import NO_MIN_VALUE, forbid_low_values

NO = -torch.inf


def bound(probs: list[float], values: list[float], min_value: float) -> list[float]:
    """One row whose last column is EOS."""
    eos = torch.arange(len(probs)) == len(probs) - 1
    logprobs = torch.tensor([probs]).log()
    return forbid_low_values(logprobs, torch.tensor([values]), eos[None], torch.tensor([min_value])).exp()[0].tolist()


@pytest.mark.parametrize(
    ("probs", "values", "min_value", "expected"),
    [
        ([0.4, 0.4, 0.2], [-0.1, -0.3, 0.0], -0.2, [0.8, 0.0, 0.2]),  # EOS keeps its chance
        ([0.2, 0.6, 0.2, 0.0], [-0.1, -0.3, -0.1, 0.0], -0.2, [0.5, 0.0, 0.5, 0.0]),
        ([0.4, 0.4, 0.2], [-0.2, -0.3, 0.0], -0.2, [0.8, 0.0, 0.2]),  # the bound itself is allowed
        ([0.4, 0.4, 0.2], [-0.4, -0.3, 0.0], -0.2, [0.4, 0.4, 0.2]),  # EOS alone is left: nothing is dropped
        ([0.4, 0.0, 0.6], [-0.4, -0.1, 0.0], -0.2, [0.4, 0.0, 0.6]),  # a masked token is no candidate
        ([0.4, 0.4, 0.2], [-0.1, -0.3, -0.9], -0.2, [0.8, 0.0, 0.2]),  # an EOS column's value is not read
        ([0.4, 0.4, 0.2], [-0.1, -0.3, 0.0], NO_MIN_VALUE, [0.4, 0.4, 0.2]),
    ],
)
def test_low_candidates_are_dropped(
    probs: list[float], values: list[float], min_value: float, expected: list[float]
) -> None:
    assert bound(probs, values, min_value) == pytest.approx(expected, abs=1e-6)


def make_batch(num_rows: int, num_candidates: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * num_candidates)
    weights = torch.randn(num_rows, num_candidates, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < 0.2] = NO
    weights[:, -1] = 0.0
    eos = (torch.arange(num_candidates) >= num_candidates - 2).expand_as(weights)
    values = -torch.rand(weights.shape, generator=generator)
    return torch.log_softmax(weights, -1), values, eos, torch.linspace(NO_MIN_VALUE, 0.0, num_rows)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (17, 33), (5, 130)])
def test_each_row_is_a_distribution_of_its_own(shape: tuple[int, int]) -> None:
    logprobs, values, eos, min_value = make_batch(*shape)
    together = forbid_low_values(logprobs, values, eos, min_value)
    torch.testing.assert_close(together.exp().sum(-1), torch.ones(shape[0]))
    assert torch.equal(together[:1], logprobs[:1])
    for row in range(shape[0]):
        one = slice(row, row + 1)
        assert torch.equal(forbid_low_values(logprobs[one], values[one], eos[one], min_value[one])[0], together[row])


def test_nothing_is_read_back_to_the_host() -> None:
    assert forbid_low_values(*(part.to("meta") for part in make_batch(3, 5))).shape == (3, 5)
