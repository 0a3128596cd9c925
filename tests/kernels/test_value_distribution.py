"""Distributions with a given expected value, against integrals of the log-normal and their own definition."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from lenvm_kernels.length_value import bin_lengths, expected_value, value_from_length
from lenvm_kernels.value_distribution import build_value_table, distribution_from_value

GRID = [(24, 2048, 0.997), (64, 32768, 0.9998), (1, 100, 0.997), (5, 5, 0.9)]


@pytest.mark.parametrize(("num_bins", "max_length", "gamma"), GRID)
def test_the_expected_value_is_the_given_one(num_bins: int, max_length: int, gamma: float) -> None:
    lengths = bin_lengths(num_bins, max_length)
    extremes = value_from_length(lengths[[-1, 0]], gamma)
    values = torch.lerp(extremes[0], extremes[1], torch.linspace(0, 1, 301)).view(7, 43)
    logprobs = distribution_from_value(values, build_value_table(lengths, gamma))
    assert logprobs.shape == (7, 43, num_bins)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(7, 43), atol=1e-5, rtol=0)
    torch.testing.assert_close(expected_value(logprobs, lengths, gamma), values, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("num_bins", "max_length", "gamma"), GRID)
def test_smaller_values_mean_longer_everywhere(num_bins: int, max_length: int, gamma: float) -> None:
    table = build_value_table(bin_lengths(num_bins, max_length), gamma)
    at_most = distribution_from_value(torch.linspace(-1, 0, 401), table).exp().cumsum(-1)  # P(length <= bin)
    assert (at_most.diff(dim=0) >= -1e-5).all()


def test_the_shape_is_the_log_normal() -> None:
    gamma, spread, median = 0.997, 0.5, 90.0
    lengths = bin_lengths(40, 4096)
    law = stats.lognorm(spread, scale=median)
    value, _ = integrate.quad(lambda n: -(1 - gamma**n) * law.pdf(n), 0, 4000, limit=200)
    found = distribution_from_value(torch.tensor(value), build_value_table(lengths, gamma, spread)).exp()
    bounds = torch.sqrt(lengths[1:] * lengths[:-1]).tolist()
    expected = [law.cdf(b) - law.cdf(a) for a, b in zip([0, *bounds], [*bounds, math.inf], strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=3e-3)  # bins: values are those of their middles


def test_values_beyond_the_bins_get_the_first_or_the_last_one() -> None:
    table = build_value_table(bin_lengths(24, 2048), 0.997)
    probs = distribution_from_value(torch.tensor([0.0, -1e-9, -0.9999, -1.0]), table).exp()
    first, last = torch.eye(24)[0], torch.eye(24)[-1]
    assert torch.equal(probs, torch.stack([first, first, last, last]))


def test_rows_do_not_influence_each_other_and_nothing_is_read_back() -> None:
    table = build_value_table(bin_lengths(24, 2048), 0.997)
    values = -torch.rand(17, 5, generator=torch.Generator().manual_seed(0))
    together = distribution_from_value(values, table)
    for i in range(17):
        assert torch.equal(distribution_from_value(values[i : i + 1], table)[0], together[i])
    assert distribution_from_value(values.to("meta"), table.to("meta")).shape == (17, 5, 24)
