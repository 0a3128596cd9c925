"""Steering of candidates: formulas by brute force, the exact posterior on a Markov chain, both backends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm_kernels.length_control import (
    Mode,
    PreferenceKernel,
    Strategy,
    mean_target,
    mean_value,
    needs_scoring,
    solve_mean_tilt,
    steer_candidates,
)
from lenvm_kernels.length_value import bin_lengths, length_from_value, value_from_length
from lenvm_kernels.value_bound import NO_MIN_VALUE

GAMMA = 0.997
KERNEL = PreferenceKernel(
    equal_short=15.0,
    equal_long=25.0,
    at_least_short=10.0,
    at_most_long=30.0,
    equal_strength=1.5,
    bound_strength=2.5,
    min_eos=0.02,
    eos_haste=40.0,
    closing_haste=30.0,
    patience=0.2,
    at_most_lead=0.3,
)
GRID = [(b, c, m) for b in (1, 3, 17) for c in (1, 2, 33) for m in (1, 24)]
CONTROLS = [(mode, strategy) for mode in Mode for strategy in Strategy]


@dataclass
class Batch:
    """The row-wise arguments of ``steer_candidates``, and the bins."""

    candidate_logprobs: torch.Tensor
    candidate_values: torch.Tensor
    bin_logprobs: torch.Tensor
    eos_mask: torch.Tensor
    num_generated: torch.Tensor
    mode: torch.Tensor
    strategy: torch.Tensor
    target: torch.Tensor
    beta: torch.Tensor
    closing_mask: torch.Tensor
    after_closing: torch.Tensor
    bin_lengths: torch.Tensor

    def steer(self, op: Callable[..., torch.Tensor] = steer_candidates) -> torch.Tensor:
        return op(**self.arguments(), gamma=GAMMA, kernel=KERNEL)

    def arguments(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def row(self, i: int) -> Batch:
        rows = {name: x[i : i + 1] for name, x in self.arguments().items() if name != "bin_lengths"}
        return Batch(**rows, bin_lengths=self.bin_lengths)

    def to(self, device: str) -> Batch:
        return Batch(**{name: x.to(device) for name, x in self.arguments().items()})


def make_batch(num_rows: int, num_candidates: int, num_bins: int, seed: int = 0) -> Batch:
    """Every mode and strategy; dropped candidates; the last column EOS (column 0 too, in some rows)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    row, column = torch.arange(num_rows), torch.arange(num_candidates)
    logits = 3 * normal(num_rows, num_candidates)
    dropped = (normal(num_rows, num_candidates) > 1) & (column > 0)
    eos_mask = (column == num_candidates - 1).expand(num_rows, -1) | ((column == 0) & (row % 4 == 3).unsqueeze(1))
    codes = torch.tensor(CONTROLS, dtype=torch.int32)[(row + seed) % len(CONTROLS)]
    target = torch.randint(1, 300, (num_rows,), generator=generator).float()
    return Batch(
        candidate_logprobs=torch.log_softmax(logits.masked_fill(dropped, -torch.inf), -1),
        candidate_values=-torch.rand(num_rows, num_candidates, generator=generator),
        bin_logprobs=torch.log_softmax(4 * normal(num_rows, num_candidates, num_bins), -1),
        eos_mask=eos_mask,
        num_generated=(target * torch.rand(num_rows, generator=generator) * 1.5).int(),
        mode=codes[:, 0],
        strategy=codes[:, 1],
        target=target,
        beta=50 * normal(num_rows) * (row % 7 != 6),
        closing_mask=(normal(num_rows, num_candidates) > 0.5) & ~eos_mask,
        after_closing=normal(num_rows) > 0,
        bin_lengths=bin_lengths(num_bins, 2048),
    )


def with_control(batch: Batch, mode: Mode, strategy: Strategy = Strategy.NATURAL, **changes: Any) -> Batch:
    return replace(
        batch, mode=torch.full_like(batch.mode, mode), strategy=torch.full_like(batch.strategy, strategy), **changes
    )


def make_distant_batch() -> Batch:
    """Every value rounds to -1, and the target is far: the hard choice is the first candidate left, column 1."""
    batch = with_control(make_batch(3, 33, 24), Mode.EQUAL, Strategy.HARD, target=torch.full((3,), 1e6))
    batch.candidate_logprobs[:, 0] = -torch.inf
    batch.candidate_logprobs[:, 1] = -3.0
    batch.candidate_values = torch.full_like(batch.candidate_values, -1.0)
    return batch


CASES = [*(make_batch(*shape) for shape in GRID), make_distant_batch()]


def kernel_worth(length: float, mode: int, target: float) -> float:
    d = (length - target) / target
    if mode == Mode.EQUAL:
        return math.exp(-(KERNEL.equal_short * max(-d, 0) + KERNEL.equal_long * max(d, 0)))
    if mode == Mode.AT_LEAST:
        return math.exp(-KERNEL.at_least_short * max(-d, 0))
    return math.exp(-KERNEL.at_most_long * max(d, 0))


def expected_row(batch: Batch, i: int) -> list[float]:
    """Steered probabilities of one row, straight from the definitions (IEEE double)."""
    given = batch.candidate_logprobs[i].double().exp().tolist()
    eos = batch.eos_mask[i].tolist()
    bins = batch.bin_logprobs[i].double().exp().tolist()
    lengths = batch.bin_lengths.tolist()
    mode, target, beta = int(batch.mode[i]), batch.target[i].item(), batch.beta[i].item()
    end = int(batch.num_generated[i]) + 1
    columns = range(len(given))
    values = [0.0 if eos[c] else batch.candidate_values[i, c].item() for c in columns]
    if mode == Mode.NONE or (mode == Mode.AT_LEAST and end >= target):
        return given
    if mode >= Mode.TILT:
        weights = [given[c] * math.exp(beta * values[c]) for c in columns]
        return [w / sum(weights) for w in weights]
    left = [c for c in columns if given[c] > 0]
    least_eos, boost = 1.0 if mode == Mode.AT_LEAST else 0.0, 1.0
    if mode in (Mode.EQUAL, Mode.AT_MOST) and batch.strategy[i] == Strategy.NATURAL:
        onset = 1 - KERNEL.at_most_lead if mode == Mode.AT_MOST else 1
        late = max(end / target - onset, 0) if end > 1 else 0
        eos_late = late if batch.after_closing[i] else max(late - KERNEL.patience, 0)
        least_eos = KERNEL.min_eos * math.exp(-KERNEL.eos_haste * eos_late)
        boost = math.exp(KERNEL.closing_haste * (late if batch.after_closing[i] else min(late, KERNEL.patience)))
    if any(not eos[c] for c in left):
        left = [c for c in left if not eos[c] or given[c] >= least_eos]
    hurried = (batch.eos_mask if batch.after_closing[i] else batch.closing_mask)[i]
    if not any(eos[c] and given[c] > 0 for c in columns):
        boost = 1.0
    given = [p * boost if hurried[c] else p for c, p in enumerate(given)]
    if batch.strategy[i] == Strategy.HARD:
        remaining = max(target - end, 0)
        costs = {
            Mode.EQUAL: lambda c: abs(length_from_value(values[c], GAMMA) - remaining),
            Mode.AT_LEAST: lambda c: values[c],
            Mode.AT_MOST: lambda c: -values[c],
        }
        best = min(left, key=costs[Mode(mode)])
        return [float(c == best) for c in columns]
    psi = [
        kernel_worth(end, mode, target)
        if eos[c]
        else sum(p * kernel_worth(end + n, mode, target) for p, n in zip(bins[c], lengths, strict=True))
        for c in columns
    ]
    strength = KERNEL.equal_strength if mode == Mode.EQUAL else KERNEL.bound_strength
    weights = [given[c] * psi[c] ** strength if c in left else 0.0 for c in columns]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("shape", GRID)
@pytest.mark.parametrize("seed", [0, 3, 7])
def test_rows_follow_the_definitions(shape: tuple[int, int, int], seed: int) -> None:
    batch = make_batch(*shape, seed=seed)
    steered = batch.steer()
    assert steered.shape == shape[:2]
    assert steered.dtype == torch.float32
    expected = torch.tensor([expected_row(batch, i) for i in range(shape[0])])
    torch.testing.assert_close(steered.exp(), expected, atol=2e-5, rtol=1e-4)
    assert (steered[batch.candidate_logprobs == -torch.inf] == -torch.inf).all()


def test_values_beyond_the_clamp_still_lead_to_a_choice() -> None:
    steered = make_distant_batch().steer()
    assert (steered.exp() == (torch.arange(33) == 1)).all()


@pytest.mark.parametrize("shape", GRID)
def test_a_row_alone_equals_the_row_in_a_mixed_batch_bitwise(shape: tuple[int, int, int]) -> None:
    batch = make_batch(*shape)
    together = batch.steer()
    for i in range(shape[0]):
        assert torch.equal(batch.row(i).steer()[0], together[i])


@pytest.mark.parametrize("strategy", list(Strategy))
def test_no_control_keeps_every_bit(strategy: Strategy) -> None:
    batch = make_batch(17, 33, 24)
    batch.candidate_logprobs += 0.123  # not normalised: still untouched
    none = with_control(batch, Mode.NONE, strategy, target=torch.zeros(17))
    neutral = with_control(batch, Mode.TILT, strategy, beta=torch.zeros(17), target=torch.zeros(17))
    reached = with_control(batch, Mode.AT_LEAST, strategy, num_generated=batch.target.int())
    for unsteered in (none, neutral, reached):
        assert torch.equal(unsteered.steer(), batch.candidate_logprobs)


@settings(deadline=None, max_examples=30)
@given(low=st.floats(-500, 500), step=st.floats(1, 500), seed=st.integers(0, 1000))
def test_larger_beta_shortens(low: float, step: float, seed: int) -> None:
    batch = make_batch(3, 33, 24, seed)
    values = batch.candidate_values.masked_fill(batch.eos_mask, 0.0)

    def mean_value(beta: float) -> torch.Tensor:
        return (with_control(batch, Mode.TILT, beta=torch.full((3,), beta)).steer().exp() * values).sum(-1)

    assert (mean_value(low + step) >= mean_value(low) - 1e-6).all()


@pytest.mark.parametrize("mode", [Mode.EQUAL, Mode.AT_LEAST, Mode.AT_MOST])
def test_hopeless_targets_still_give_a_distribution(mode: Mode) -> None:
    batch = make_batch(17, 33, 24)
    for target, num_generated in ((1.0, 1_000_000), (1_000_000.0, 0), (1.0, 0)):
        far = with_control(
            batch, mode, target=torch.full((17,), target), num_generated=torch.full((17,), num_generated)
        )
        torch.testing.assert_close(far.steer().exp().sum(-1), torch.ones(17), atol=1e-4, rtol=0)


def test_where_no_candidate_can_reach_a_length_the_row_keeps_its_distribution() -> None:
    batch = with_control(make_batch(3, 33, 24), Mode.EQUAL)
    batch.eos_mask = torch.zeros_like(batch.eos_mask)
    batch.bin_logprobs = torch.full_like(batch.bin_logprobs, -torch.inf)
    torch.testing.assert_close(batch.steer(), batch.candidate_logprobs)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_rows_without_candidates_or_with_garbage_bins_never_give_nan(strategy: Strategy) -> None:
    for mode in Mode:
        batch = with_control(make_batch(3, 33, 24), mode, strategy)
        batch.candidate_logprobs[1] = -torch.inf
        unread = (batch.candidate_logprobs == -torch.inf) | batch.eos_mask
        batch.bin_logprobs[unread] = torch.nan
        batch.candidate_values[unread] = torch.nan
        steered = batch.steer()
        assert not steered.isnan().any()
        assert (steered[1] == -torch.inf).all()


def test_at_least_bars_eos_until_the_target_unless_nothing_else_is_left() -> None:
    batch = make_batch(2, 3, 24)
    batch.eos_mask = torch.tensor([[False, False, True]]).expand(2, -1)
    batch.candidate_logprobs = torch.log(torch.tensor([[0.01, 0.0, 0.99], [0.0, 0.0, 1.0]]))
    batch.target = torch.tensor([10.0, 10.0])
    for strategy in Strategy:
        early = with_control(batch, Mode.AT_LEAST, strategy, num_generated=torch.tensor([8, 8])).steer()
        assert early.exp().tolist() == [[1, 0, 0], [0, 0, 1]]
    at_target = with_control(batch, Mode.AT_LEAST, num_generated=torch.tensor([9, 9])).steer()
    assert torch.equal(at_target, batch.candidate_logprobs)


def at_length(mode: Mode, num_generated: int, eos_chance: float, after_closing: bool = True) -> torch.Tensor:
    """Steered probabilities [3] of a closing token, another one and EOS, for a target of 100 tokens."""
    batch = with_control(make_batch(1, 3, 24), mode, target=torch.tensor([100.0]))
    batch.bin_logprobs = torch.full((1, 3, 24), -math.log(24))  # both words lead to the same lengths
    batch.num_generated = torch.tensor([num_generated])
    batch.eos_mask, batch.closing_mask = torch.tensor([[False, False, True]]), torch.tensor([[True, False, False]])
    batch.after_closing = torch.tensor([after_closing])
    rest = (1 - eos_chance) / 2
    batch.candidate_logprobs = torch.log(torch.tensor([[rest, rest, eos_chance]]))
    return batch.steer().exp()[0]


@pytest.mark.parametrize(("mode", "onset"), [(Mode.EQUAL, 100), (Mode.AT_MOST, 70)])
def test_an_answer_ends_where_the_model_gives_eos_a_chance(mode: Mode, onset: int) -> None:
    unlikely, likely = 0.9 * KERNEL.min_eos, 1.1 * KERNEL.min_eos
    assert at_length(mode, onset - 1, unlikely)[2] == 0
    assert at_length(mode, onset - 1, likely)[2] > likely
    assert at_length(mode, onset + 1, unlikely)[2] > 0  # the least chance falls
    assert at_length(mode, 0, unlikely)[2] == 0  # an empty answer
    assert at_length(mode, onset - 1, 1.0)[2] == 1  # nothing else is left


@pytest.mark.parametrize(("mode", "onset"), [(Mode.EQUAL, 100), (Mode.AT_MOST, 70)])
def test_an_answer_waits_for_the_end_of_a_sentence(mode: Mode, onset: int) -> None:
    chance, patience = 1e-3, int(100 * KERNEL.patience)
    assert at_length(mode, onset + patience - 2, chance)[2] > 0
    assert at_length(mode, onset + patience - 2, chance, after_closing=False)[2] == 0
    assert at_length(mode, onset + 2 * patience, chance, after_closing=False)[2] > 0


@pytest.mark.parametrize(("mode", "onset"), [(Mode.EQUAL, 100), (Mode.AT_MOST, 70)])
def test_sentences_are_closed_from_the_onset_on(mode: Mode, onset: int) -> None:
    def closing_over_other(num_generated: int, after_closing: bool = False) -> float:
        closing, other, _ = at_length(mode, num_generated, 1e-30, after_closing).tolist()
        return closing / other

    assert closing_over_other(onset - 1) == pytest.approx(1, rel=1e-4)
    assert closing_over_other(onset + 9) == pytest.approx(math.exp(KERNEL.closing_haste * 0.1), rel=1e-4)
    assert closing_over_other(onset + 9, after_closing=True) == pytest.approx(1, rel=1e-4)  # no row of full stops
    gain = math.exp(KERNEL.closing_haste * 0.1)
    eos = [at_length(mode, onset + length, 1e-3, after_closing=True)[2].item() for length in (9, 19)]
    assert eos[1] / (1 - eos[1]) > gain * eos[0] / (1 - eos[0])  # then the answer ends
    most = math.exp(KERNEL.closing_haste * KERNEL.patience)
    assert closing_over_other(onset + 300) == pytest.approx(most, rel=1e-4)


def test_where_a_grammar_forbids_the_end_no_sentence_is_closed() -> None:
    closing, other, eos = at_length(Mode.EQUAL, 150, 0.0, after_closing=False).tolist()
    assert closing == pytest.approx(other, rel=1e-4)
    assert eos == 0


def test_hard_control_ends_at_the_target_whatever_eos_has() -> None:
    batch = make_batch(3, 3, 24)
    batch.eos_mask = torch.tensor([[False, False, True]]).expand(3, -1)
    at_target = dict(target=torch.full((3,), 10.0), num_generated=torch.full((3,), 9))
    hard = with_control(batch, Mode.EQUAL, Strategy.HARD, **at_target).steer().exp()
    assert (hard[:, 2] == 1).all()


def test_eos_ignores_its_bins_and_value() -> None:
    batch = make_batch(17, 33, 24)
    steered = batch.steer()
    batch.bin_logprobs = torch.where(batch.eos_mask.unsqueeze(-1), torch.randn(24), batch.bin_logprobs)
    batch.candidate_values[batch.eos_mask] = -0.5
    assert torch.equal(batch.steer(), steered)


class Chain:
    """A toy model of two words and EOS: the next token's chances depend on the last word and the position.

    At position ``longest`` every answer ends, so all lengths are 1..longest and every law is exact.
    """

    longest = 24
    words = 2

    def __init__(self) -> None:
        chances = torch.rand(self.longest, self.words, self.words + 1, generator=torch.Generator().manual_seed(5))
        chances[..., -1] *= 0.15
        chances[-1] = torch.tensor([0.0, 0.0, 1.0])
        self.next_probs = (chances / chances.sum(-1, keepdim=True)).double()  # [t, last word, next token]
        self.remaining = self._remaining()

    def _remaining(self) -> torch.Tensor:
        """P(n more tokens | t generated, last word): [t, word, n - 1]."""
        law = torch.zeros(self.longest + 1, self.words, self.longest, dtype=torch.float64)
        for t in reversed(range(self.longest)):
            law[t, :, 0] = self.next_probs[t, :, -1]
            law[t, :, 1:] += self.next_probs[t, :, :-1] @ law[t + 1, :, :-1]
        return law

    def length_law(self, next_probs: torch.Tensor) -> torch.Tensor:
        """Law of the total length when sampling with ``next_probs``, starting after word 0: [longest]."""
        at_word, law = torch.tensor([1.0, 0.0], dtype=torch.float64), []
        for t in range(self.longest):
            law.append(at_word @ next_probs[t, :, -1])
            at_word = at_word @ next_probs[t, :, :-1]
        return torch.stack(law)

    def steered_probs(self, mode: Mode, target: float) -> torch.Tensor:
        """``next_probs`` of every state after steering, one row a state."""
        rows = self.longest * self.words
        t = torch.arange(self.longest).repeat_interleave(self.words)
        after = self.remaining[1:].log().float()  # [t, next word, n - 1]
        bins = torch.cat([after, torch.zeros(self.longest, 1, self.longest)], dim=1)  # EOS column unread
        steered = steer_candidates(
            self.next_probs.log().float().view(rows, -1),
            torch.zeros(rows, self.words + 1),
            bins.repeat_interleave(self.words, dim=0),
            torch.tensor([[False, False, True]]).expand(rows, -1),
            torch.arange(1, self.longest + 1).float(),
            t.int(),
            torch.full((rows,), mode, dtype=torch.int32),
            torch.zeros(rows, dtype=torch.int32),
            torch.full((rows,), target),
            torch.zeros(rows),
            torch.zeros(rows, self.words + 1, dtype=torch.bool),
            torch.zeros(rows, dtype=torch.bool),
            GAMMA,
            replace(KERNEL, equal_strength=1.0, bound_strength=1.0, min_eos=0.0),
        )
        return steered.double().exp().view_as(self.next_probs)


@pytest.mark.parametrize("mode", [Mode.EQUAL, Mode.AT_MOST])
@pytest.mark.parametrize("target", [3.0, 9.0, 20.0])
def test_steering_step_by_step_gives_the_posterior_law_of_the_length(mode: Mode, target: float) -> None:
    """With exact P the steered chain's lengths follow p(L) K(L) / Z: the h-transform, at every length."""
    chain = Chain()
    own = chain.length_law(chain.next_probs)
    assert own.sum() == pytest.approx(1.0)
    torch.testing.assert_close(own, chain.remaining[0, 0])
    worth = torch.tensor([kernel_worth(n, mode, target) for n in range(1, chain.longest + 1)], dtype=torch.float64)
    steered = chain.length_law(chain.steered_probs(mode, target))
    torch.testing.assert_close(steered, own * worth / (own * worth).sum(), atol=1e-5, rtol=1e-3)


def test_at_least_on_the_chain_ends_no_earlier_than_the_target() -> None:
    chain = Chain()
    own, steered = chain.length_law(chain.next_probs), chain.length_law(chain.steered_probs(Mode.AT_LEAST, 9.0))
    assert own[:8].sum() > 0.3
    assert steered[:8].sum() == 0
    assert steered.sum() == pytest.approx(1.0, abs=1e-5)


def value_batch(num_rows: int, num_candidates: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The arguments of ``solve_mean_tilt`` but the wanted mean. Values of a row lie within 2^-row of each other."""
    batch = make_batch(num_rows, num_candidates, 24, seed)
    scale = 0.5 ** (torch.arange(num_rows).float() % 12).unsqueeze(1)
    values = -0.4 + 0.4 * scale * batch.candidate_values
    return batch.candidate_logprobs, values, batch.eos_mask & (torch.arange(num_rows) % 2 == 0).unsqueeze(1)


def tilted_probs(logprobs: torch.Tensor, values: torch.Tensor, eos_mask: torch.Tensor, beta: torch.Tensor) -> Any:
    """p' in double, and the values of its candidates, EOS at 0."""
    values = values.double().masked_fill(eos_mask, 0.0)
    return torch.softmax(logprobs.double() + beta.double().unsqueeze(-1) * values, -1), values


SHARES = [0.02, 0.3, 0.8, 0.999]
MEAN_GRID = [(b, c) for b in (1, 3, 17) for c in (1, 2, 33)]


def wanted_means(logprobs: torch.Tensor, values: torch.Tensor, eos_mask: torch.Tensor, share: float) -> torch.Tensor:
    """A mean that the candidates can have: ``share`` of the way from their least to their greatest value."""
    values = values.masked_fill(eos_mask, 0.0)
    lowest = values.masked_fill(logprobs == -torch.inf, torch.inf).amin(-1)
    return lowest + share * (values.masked_fill(logprobs == -torch.inf, -torch.inf).amax(-1) - lowest)


MEAN_CASES = [
    (*value_batch(*shape), wanted_means(*value_batch(*shape), share)) for shape in MEAN_GRID for share in SHARES[1::2]
]


@pytest.mark.parametrize("shape", MEAN_GRID, ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_solved_tilt_has_the_wanted_mean(shape: tuple[int, int], share: float) -> None:
    arguments = value_batch(*shape)
    wanted = wanted_means(*arguments, share)
    beta = solve_mean_tilt(*arguments, wanted)
    assert beta.shape == shape[:1]
    probs, values = tilted_probs(*arguments, beta)
    lowest, highest = wanted_means(*arguments, 0.0), wanted_means(*arguments, 1.0)
    error = ((probs * values).sum(-1) - wanted).abs()
    assert (error <= 2e-4 * (highest - lowest) + 1e-7).all()
    assert (beta[highest == lowest] == 0).all()


def test_steering_with_the_solved_beta_gives_the_mean_too() -> None:
    batch = with_control(make_batch(17, 33, 24), Mode.MEAN_TARGET)
    arguments = (batch.candidate_logprobs, batch.candidate_values, batch.eos_mask)
    wanted = wanted_means(*arguments, 0.7)
    batch.beta = solve_mean_tilt(*arguments, wanted)
    values = batch.candidate_values.masked_fill(batch.eos_mask, 0.0)
    torch.testing.assert_close((batch.steer().exp() * values).sum(-1), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_unreachable_means_lead_to_the_extreme_candidate(strategy: Strategy) -> None:
    batch = with_control(make_batch(17, 33, 24), Mode.MEAN_TARGET, strategy)
    arguments = (batch.candidate_logprobs, batch.candidate_values, batch.eos_mask)
    values = batch.candidate_values.masked_fill(batch.eos_mask, 0.0)
    candidate = batch.candidate_logprobs > -torch.inf
    for wanted, extreme in (
        (-1.0, values.masked_fill(~candidate, torch.inf).amin(-1)),
        (0.0, values.masked_fill(~candidate, -torch.inf).amax(-1)),
    ):
        batch.beta = solve_mean_tilt(*arguments, torch.full((17,), wanted))
        steered = batch.steer()
        torch.testing.assert_close((steered.exp() * values).sum(-1), extreme, atol=1e-5, rtol=0)


def test_solved_rows_alone_equal_those_of_a_batch_bitwise() -> None:
    arguments = value_batch(17, 33)
    wanted = wanted_means(*arguments, 0.4)
    together = solve_mean_tilt(*arguments, wanted)
    for i in range(17):
        row = tuple(x[i : i + 1] for x in (*arguments, wanted))
        assert torch.equal(solve_mean_tilt(*row)[0], together[i])


def test_a_solved_row_without_candidates_or_with_garbage_values_is_finite() -> None:
    logprobs, values, eos_mask = value_batch(3, 33)
    logprobs[1] = -torch.inf
    values[(logprobs == -torch.inf) | eos_mask] = torch.nan
    beta = solve_mean_tilt(logprobs, values, eos_mask, torch.full((3,), -0.4))
    assert beta.isfinite().all()
    assert beta[1] == 0


def test_the_mean_value_is_that_of_the_candidates_alone_with_none_at_the_end() -> None:
    logprobs = torch.log(torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0] * 4]))
    values = torch.tensor([[-0.2, -0.4, -0.9, torch.nan]]).expand(3, -1)
    eos_mask = torch.tensor([[False, False, True, False]]).expand(3, -1)
    found = mean_value(logprobs, values, eos_mask)
    assert found.tolist() == pytest.approx([0.5 * -0.2 + 0.25 * -0.4, 0.0, 0.0])
    assert mean_value(logprobs.to("meta"), values.to("meta"), eos_mask.to("meta")).shape == (3,)


def test_mean_targets_follow_their_definitions() -> None:
    logprobs = torch.log(torch.tensor([[0.5, 0.25, 0.25, 0.0]])).expand(4, -1)
    values = torch.tensor([[-0.2, -0.4, -0.9, torch.nan]]).expand(4, -1)
    eos_mask = torch.tensor([[False, False, True, False]]).expand(4, -1)
    mode = torch.tensor([Mode.MEAN_TARGET, Mode.MEAN_TARGET, Mode.MEAN_LENGTH_FACTOR, Mode.MEAN_VALUE_FACTOR])
    generated, target = torch.tensor([9, 30, 9, 9]), torch.tensor([30.0, 30.0, 1.0, 1.0])
    factor = torch.tensor([1.0, 1.0, 0.5, 2.0])
    wanted = mean_target(logprobs, values, eos_mask, generated, mode, target, factor, GAMMA)
    mean = 0.5 * -0.2 + 0.25 * -0.4
    halved = value_from_length(0.5 * length_from_value(mean, GAMMA), GAMMA)
    assert wanted.tolist() == pytest.approx([value_from_length(20.0, GAMMA), 0.0, halved, 2 * mean], abs=1e-6)


def test_value_factor_never_asks_for_less_than_the_least_value() -> None:
    logprobs, values = torch.zeros(1, 1), torch.full((1, 1), -0.4)
    mode, one = torch.tensor([Mode.MEAN_VALUE_FACTOR]), torch.ones(1)
    wanted = mean_target(logprobs, values, values > 0, one.int(), mode, one, 100 * one, GAMMA)
    assert -1.0 < wanted.item() < -0.999


def test_scoring_is_skipped_where_it_cannot_matter_or_is_not_wanted() -> None:
    even = [math.log(0.5), math.log(0.5), -math.inf]
    sure = [math.log(0.99), math.log(0.01), -math.inf]
    rows = [
        (even, Mode.EQUAL, 0.0, 0.0, True),
        ([0.0, -math.inf, -math.inf], Mode.EQUAL, 0.0, 0.0, False),  # a single candidate
        (even, Mode.NONE, 0.0, 0.0, False),
        (even, Mode.TILT, 0.0, 0.0, False),
        (even, Mode.TILT, 3.0, 0.0, True),
        (even, Mode.MEAN_TARGET, 0.0, 0.0, True),
        (even, Mode.EQUAL, 0.0, 0.69, True),  # entropy log 2 = 0.6931
        (even, Mode.EQUAL, 0.0, 0.70, False),
        (sure, Mode.EQUAL, 0.0, 0.05, True),  # entropy 0.0560
        (sure, Mode.EQUAL, 0.0, 0.06, False),
        ([-math.inf] * 3, Mode.EQUAL, 0.0, 0.0, False),
    ]
    logprobs, modes, betas, thresholds, expected = (list(column) for column in zip(*rows, strict=True))
    needed = needs_scoring(
        torch.tensor(logprobs),
        torch.tensor(modes),
        torch.tensor(betas),
        torch.tensor(thresholds, dtype=torch.float32),
        torch.full((len(rows),), NO_MIN_VALUE),
    )
    assert needed.tolist() == expected


def test_a_least_value_needs_scores_whatever_the_mode() -> None:
    logprobs = torch.tensor([[0.5, 0.5]]).log().expand(4, -1)
    modes = torch.tensor([Mode.NONE, Mode.TILT, Mode.NONE, Mode.TILT])
    min_value = torch.tensor([NO_MIN_VALUE, NO_MIN_VALUE, -0.5, -0.5])
    assert (
        needs_scoring(logprobs, modes, torch.zeros(4), torch.zeros(4), min_value).tolist() == [False] * 2 + [True] * 2
    )


def test_nothing_is_read_back_to_the_host() -> None:
    """Meta tensors hold no data: reading one, or a shape that depends on data, raises."""
    batch = make_batch(17, 33, 24).to("meta")
    assert batch.steer().shape == (17, 33)
    arguments = (batch.candidate_logprobs, batch.candidate_values, batch.eos_mask)
    wanted = mean_target(*arguments, batch.num_generated, batch.mode, batch.target, batch.beta, GAMMA)
    assert solve_mean_tilt(*arguments, wanted).shape == (17,)
    assert needs_scoring(batch.candidate_logprobs, batch.mode, *[batch.beta] * 3).shape == (17,)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """The Triton kernels' answers to CASES and MEAN_CASES, from a process in which Triton interprets them."""
    folder: Path = tmp_path_factory.mktemp("interpreted")
    torch.save({"steer": [case.arguments() for case in CASES], "solve": MEAN_CASES}, folder / "cases.pt")
    script = f"""
import torch
from lenvm_kernels.length_control import PreferenceKernel
from lenvm_kernels.length_control_triton import solve_mean_tilt, steer_candidates
cases = torch.load("cases.pt")
steered = [steer_candidates(**case, gamma={GAMMA}, kernel={KERNEL}) for case in cases["steer"]]
torch.save({{"steer": steered, "solve": [solve_mean_tilt(*case) for case in cases["solve"]]}}, "answers.pt")
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, check=True, timeout=300)
    answers: dict[str, list[torch.Tensor]] = torch.load(folder / "answers.pt")
    return answers


@pytest.mark.parametrize("index", range(len(CASES)))
def test_triton_kernel_equals_the_reference(index: int, interpreted: dict[str, list[torch.Tensor]]) -> None:
    """float32 sums in another order: 1e-5 relative on log-probabilities of tens of nats."""
    case, steered = CASES[index], interpreted["steer"][index]
    torch.testing.assert_close(steered, case.steer(), atol=2e-5, rtol=1e-5)
    idle = case.mode == Mode.NONE
    assert torch.equal(steered[idle], case.candidate_logprobs[idle])


@pytest.mark.parametrize("index", range(len(MEAN_CASES)))
def test_triton_solver_equals_the_reference(index: int, interpreted: dict[str, list[torch.Tensor]]) -> None:
    """Of two betas, the distributions count: far from the root a mean hardly moves with beta."""
    *arguments, wanted = MEAN_CASES[index]
    found, _ = tilted_probs(*arguments, interpreted["solve"][index])
    expected, _ = tilted_probs(*arguments, solve_mean_tilt(*arguments, wanted))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (interpreted["solve"][index].isfinite()).all()


def test_triton_kernels_compile_for_a_gpu_without_one() -> None:
    """The interpreter accepts what the compiler refuses: compile to machine code for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lenvm_kernels.length_control_triton import _solve_row, _steer_row

    integers = {"num_generated_ptr", "mode_ptr", "strategy_ptr"}
    for kernel, blocks in ((_steer_row, {"BLOCK_C": 32, "BLOCK_M": 32}), (_solve_row, {"BLOCK_C": 32})):
        types = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(blocks, "constexpr")
        types |= {name: "*i32" if name in integers else "*fp32" for name in types if name.endswith("_ptr")}
        types |= {"eos_mask_ptr": "*i1"} | dict.fromkeys(types.keys() & {"num_candidates", "num_bins"}, "i32")
        source = ASTSource(fn=kernel, signature=types, constexprs=blocks)
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("index", range(len(CASES)))
def test_triton_kernel_on_the_device_equals_the_reference(index: int) -> None:
    on_device = CASES[index].to("cuda")
    together = on_device.steer()
    torch.testing.assert_close(together.cpu(), CASES[index].steer(), atol=1e-4, rtol=1e-4)
    for i in range(together.shape[0]):
        assert torch.equal(on_device.row(i).steer()[0], together[i])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("index", range(len(MEAN_CASES)))
def test_triton_solver_on_the_device_equals_the_reference(index: int) -> None:
    *arguments, wanted = MEAN_CASES[index]
    beta = solve_mean_tilt(*(x.cuda() for x in MEAN_CASES[index]))
    found, _ = tilted_probs(*arguments, beta.cpu())
    expected, _ = tilted_probs(*arguments, solve_mean_tilt(*arguments, wanted))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
