"""Target spaces: inverse, Bellman and bounds for each; lambda-returns against their definition, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lenvm_training.targets import (
    IGNORED,
    SPACES,
    DiscountedReturn,
    NormalisedLength,
    TargetConfig,
    censored_errors,
    lambda_returns,
    mean_target,
    remaining_labels,
)

CONFIGS = st.builds(
    TargetConfig,
    space=st.sampled_from(sorted(SPACES)),
    gamma=st.sampled_from([0.99, 0.997, 0.9998]),
    max_length=st.just(4096),
)
LENGTHS = st.integers(0, 4000)


@given(CONFIGS, LENGTHS)
def test_length_is_the_inverse_of_target(config: TargetConfig, length: int) -> None:
    space = config.build_space()
    n = torch.tensor(float(length), dtype=torch.float64)
    assume(config.space != "discounted_return" or length < 16 / (1 - config.gamma))  # the inverse is clamped beyond
    assert space.length(space.target(n)).item() == pytest.approx(length, rel=1e-6, abs=1e-6)


@given(CONFIGS, st.integers(1, 4000))
def test_each_space_has_its_bellman_equation(config: TargetConfig, length: int) -> None:
    space = config.build_space()
    now, later = (torch.tensor(float(n), dtype=torch.float64) for n in (length, length - 1))
    assert space.step(space.target(later)).item() == pytest.approx(space.target(now).item(), rel=1e-9, abs=1e-12)


@given(CONFIGS, LENGTHS, st.floats(-30, 30))
def test_predictions_and_targets_stay_in_bounds(config: TargetConfig, length: int, raw: float) -> None:
    space = config.build_space()
    low, high = {"discounted_return": (-1, 0), "normalised_length": (0, 1)}.get(config.space, (0, float("inf")))
    for tensor in (space.target(torch.tensor(float(length))), space.prediction(torch.tensor(raw))):
        assert low <= tensor.item() <= high
    assert space.length(space.prediction(torch.tensor(raw))).isfinite()


@given(CONFIGS, st.integers(1, 2000))
def test_a_raw_value_stands_for_its_target(config: TargetConfig, length: int) -> None:
    space = config.build_space()
    target = space.target(torch.tensor(float(length), dtype=torch.float64))
    assert space.prediction(space.raw_value(target)).item() == pytest.approx(target.item(), rel=1e-9)


@given(CONFIGS, st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_the_mean_target_is_that_of_all_states(config: TargetConfig, lengths: list[int]) -> None:
    space = config.build_space()
    states = torch.cat([torch.arange(length + 1, dtype=torch.float64) for length in lengths])
    assert mean_target(lengths, space).item() == pytest.approx(space.target(states).mean().item(), rel=1e-9)


@given(st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_labels_run_from_the_last_prompt_token_to_the_end(prompt_len: int, output_len: int, finished: bool) -> None:
    labels = remaining_labels(prompt_len, output_len, finished)
    assert len(labels) == prompt_len + output_len
    assert labels[prompt_len - 1] == output_len
    assert labels[-1] == (0 if finished else IGNORED)
    assert sum(label != IGNORED for label in labels) == output_len + finished


@given(CONFIGS, st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 60))
def test_a_censored_state_is_wrong_only_below_its_bound(config: TargetConfig, predicted: list[int], least: int) -> None:
    space = config.build_space()
    predictions = space.target(torch.tensor([predicted, predicted], dtype=torch.float64))
    targets = space.target(torch.full_like(predictions, least))
    errors = censored_errors(predictions - targets, torch.tensor([True, False]), space)
    assert torch.equal(errors[1], predictions[1] - targets[1])
    for error, length in zip((errors[0]).tolist(), predicted, strict=True):
        assert (error != 0) == (length < least)


def by_definition(predictions: list[float], gamma: float, lam: float) -> list[float]:
    """The lambda-return as the weighted sum of n-step returns of one row; the last prediction counts as 0."""
    length = len(predictions) - 1
    values = [*predictions[:-1], 0.0]

    def n_step(t: int, n: int) -> float:
        return -(1 - gamma**n) + gamma**n * values[t + n]

    returns = []
    for t in range(length):
        last = length - t
        mixed = sum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, last))
        # rewards are -(1 - gamma) a step: an n-step return holds -(1 - gamma ** n)
        returns.append(mixed + lam ** (last - 1) * n_step(t, last))
    return [*returns, 0.0]


@settings(deadline=None)
@given(st.integers(0, 9), st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.integers(0, 2**16))
def test_lambda_returns_are_mixtures_of_n_step_returns(length: int, lam: float, seed: int) -> None:
    predictions = -torch.rand(1, length + 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    remaining = torch.tensor([[IGNORED, *range(length, -1, -1), IGNORED, IGNORED]])
    returns = lambda_returns(predictions, remaining, DiscountedReturn(0.9), lam)
    expected = by_definition(predictions[0, 1 : length + 2].tolist(), 0.9, lam)
    assert returns[0, 1 : length + 2].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("space", sorted(SPACES))
def test_lambda_one_is_the_target_and_rows_are_independent(space: str) -> None:
    built = TargetConfig(space).build_space()
    remaining = torch.tensor([[IGNORED, 3, 2, 1, 0, IGNORED], [4, 3, 2, 1, 0, IGNORED]])
    predictions = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    full = lambda_returns(predictions, remaining, built, 1.0)
    torch.testing.assert_close(full[0, 1:5], built.target(torch.tensor([3.0, 2.0, 1.0, 0.0])))
    nearly = lambda_returns(predictions, remaining, built, 1 - 1e-7)
    torch.testing.assert_close(nearly[remaining >= 0], full[remaining >= 0], atol=1e-4, rtol=1e-4)
    mixed = lambda_returns(predictions, remaining, built, 0.5)
    alone = lambda_returns(predictions[1:], remaining[1:], built, 0.5)
    torch.testing.assert_close(mixed[1], alone[0])


def test_lengths_beyond_the_scale_are_cut() -> None:
    assert NormalisedLength(100).target(torch.tensor(250.0)) == 1
    assert NormalisedLength(100).step(torch.tensor(1.0)) == 1


@pytest.mark.parametrize("bad", [{"space": "sqrt"}, {"gamma": 1.0}, {"lam": 1.5}, {"max_length": 0}])
def test_a_bad_setting_is_named(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"target.{next(iter(bad))}"):
        TargetConfig(**bad)  # type: ignore[arg-type]
