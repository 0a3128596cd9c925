"""The length-value map: identities, bins, agreement of floats and tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lenvm_kernels.length_value import (
    MIN_VALUE,
    bellman_step,
    bin_edges,
    bin_index,
    bin_lengths,
    discounted_returns,
    expected_value,
    length_from_value,
    value_from_length,
    value_from_raw,
)

GAMMAS = st.sampled_from([0.99, 0.997, 0.9998])


@given(horizons=st.floats(0.0, 10.0), gamma=GAMMAS)
def test_length_to_value_to_length_is_the_identity(horizons: float, gamma: float) -> None:
    length = horizons / (1 - gamma)
    assert length_from_value(value_from_length(length, gamma), gamma) == pytest.approx(length, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("gamma", "longest"), [(0.997, 3000), (0.9998, 32000)])
def test_float32_round_trip_is_within_a_quarter_token(gamma: float, longest: int) -> None:
    lengths = torch.arange(longest + 1, dtype=torch.float32)
    restored = length_from_value(value_from_length(lengths, gamma), gamma)
    assert (restored - lengths).abs().max() < 0.25
    assert (restored - lengths)[:10].abs().max() < 1e-5


@given(next_length=st.integers(0, 5000), gamma=GAMMAS)
def test_bellman_holds(next_length: int, gamma: float) -> None:
    expected = value_from_length(next_length + 1.0, gamma)
    assert bellman_step(value_from_length(float(next_length), gamma), gamma) == pytest.approx(expected, abs=1e-12)


def test_discounted_returns_are_the_sums_of_discounted_rewards() -> None:
    gamma, length = 0.997, 50
    rewards = [-(1 - gamma)] * length
    sums = [sum(r * gamma**i for i, r in enumerate(rewards[t:])) for t in range(length + 1)]
    assert discounted_returns(length, gamma).tolist() == pytest.approx(sums, abs=1e-7)


def test_the_end_has_value_zero_and_length_positive_zero() -> None:
    assert discounted_returns(7, 0.997)[-1] == 0
    assert value_from_length(0.0, 0.997) == 0
    assert math.copysign(1, length_from_value(0.0, 0.997)) == 1
    assert not torch.signbit(length_from_value(torch.zeros(1), 0.997)).any()


def test_values_outside_the_range_give_finite_lengths() -> None:
    lengths = length_from_value(torch.tensor([-1.0, -2.0, MIN_VALUE, 0.5]), 0.997)
    longest = 24 * math.log(2) / -math.log(0.997)
    assert lengths.tolist() == pytest.approx([longest, longest, longest, 0.0])
    assert length_from_value(-1.0, 0.997) == pytest.approx(longest)


@given(st.floats(-80, 80))
def test_raw_value_is_minus_a_sigmoid(raw: float) -> None:
    expected = -1 / (1 + math.exp(-raw))
    assert value_from_raw(raw) == pytest.approx(expected, abs=1e-15)
    assert value_from_raw(torch.tensor([raw])).item() == pytest.approx(expected, abs=1e-6)


@given(num_bins=st.integers(1, 80), extra=st.integers(0, 40000))
def test_bins_cover_every_length_once(num_bins: int, extra: int) -> None:
    max_length = num_bins + extra
    edges = bin_edges(num_bins, max_length)
    representatives = bin_lengths(num_bins, max_length)
    assert edges.shape == representatives.shape == (num_bins,)
    assert representatives.dtype == torch.float32
    assert edges[0] == 1
    assert edges[-1] <= max_length
    assert (edges.diff() >= 1).all()
    assert bin_index(edges, edges).tolist() == list(range(num_bins))
    assert bin_index(edges[1:] - 1, edges).tolist() == list(range(num_bins - 1))
    assert bin_index(torch.tensor([10**7]), edges).item() == num_bins - 1
    assert bin_index(representatives + 1e-3, edges).tolist() == list(range(num_bins))


def test_bins_of_one_token_are_represented_exactly() -> None:
    assert bin_lengths(24, 2048)[:3].tolist() == [1, 2, 3]
    assert bin_lengths(5, 5).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("num_bins", "max_length"), [(0, 10), (11, 10)])
def test_unusable_bins_are_refused(num_bins: int, max_length: int) -> None:
    with pytest.raises(ValueError, match="num_bins"):
        bin_edges(num_bins, max_length)


def test_expected_value_is_the_mean_over_bins() -> None:
    lengths = bin_lengths(24, 2048)
    logprobs = torch.log_softmax(torch.randn(3, 5, 24), -1)
    values = torch.tensor([-(1 - 0.997**n) for n in lengths.tolist()])
    torch.testing.assert_close(expected_value(logprobs, lengths, 0.997), logprobs.exp() @ values)
