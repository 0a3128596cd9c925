"""Guided rows of every mode together, from scalar values and from distributions: each row by its own definition."""

from __future__ import annotations

import pytest
import torch

from lenvm_kernels.candidates import TOP_K_ALL, Candidates, select_candidates
from lenvm_kernels.length_value import bin_lengths, expected_value, length_from_value, value_from_length
from lenvm_kernels.value_distribution import build_value_table, distribution_from_value
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.guidance import GuidedRows
from lenvm_runtime.length_control import LengthControl

GAMMA = 0.997
LENGTHS = bin_lengths(32, 2048)
TABLE = build_value_table(LENGTHS, GAMMA)
CONTROLS = (
    LengthControl("equal", target=40),
    LengthControl("equal", target=40, strategy="hard"),
    LengthControl("at_least", target=90),
    LengthControl("at_most", target=20, strategy="hard"),
    LengthControl("tilt", beta=8.0),
    LengthControl("target_mean", target=60),
    LengthControl("target_mean", factor=0.8, scaling="length"),
    LengthControl("target_mean", factor=1.1, scaling="value"),
    LengthControl("equal", target=40, entropy_threshold=0.3),
    LengthControl("equal", target=40, min_value=-0.15),
    LengthControl("at_least", target=5, min_value=-0.12),
    LengthControl("at_most", target=20, strategy="hard", min_value=-0.1),
    LengthControl("tilt", beta=0.0, min_value=-0.1),
    LengthControl("target_mean", factor=1.0, scaling="length", min_value=-0.1),
    LengthControl("equal", target=40, max_mean_value=-0.12),
    LengthControl("tilt", beta=0.0, min_value=-0.1, max_mean_value=-0.12),
)
GENERATED = 12


def make_step(num_rows: int, vocab: int = 50) -> tuple[Candidates, torch.Tensor]:
    """Candidates under top-k, top-p and min-p together, every third row greedy; their values, garbage at EOS."""
    generator = torch.Generator().manual_seed(num_rows)
    logits = 3 * torch.randn(num_rows, vocab, generator=generator)
    logits[:, 7] = -torch.inf  # a grammar's mask
    row = torch.arange(num_rows)
    top_ks = torch.where(row % 3 == 2, 1, torch.where(row % 3 == 1, 9, TOP_K_ALL))
    ones = torch.ones(num_rows)
    candidates = select_candidates(logits, ones, top_ks, 0.98 * ones, 0.01 * ones, torch.tensor([3]), 15, row % 2 == 0)
    lengths = 10 + 90 * torch.rand(candidates.ids.shape, generator=generator)
    return candidates, value_from_length(lengths, GAMMA)


def guided_rows(controls: list[LengthControl]) -> GuidedRows:
    batch = ControlBatch.build(controls, [5] * len(controls), [50] * len(controls), "cpu")
    assert batch is not None
    last = torch.arange(len(controls)) % 2  # one of the two closes a sentence
    closing = torch.arange(50) % 3 == 1
    return batch.guided_rows(torch.full((len(controls),), GENERATED), torch.ones(len(controls)), last, closing)


def steer(rows: GuidedRows, candidates: Candidates, values: torch.Tensor) -> torch.Tensor:
    return rows.steer(candidates, values, distribution_from_value(values, TABLE), LENGTHS, GAMMA)


def take(candidates: Candidates, i: int) -> Candidates:
    return Candidates(*(part[i : i + 1] for part in candidates))


def test_each_row_alone_equals_the_row_among_all_modes_bitwise() -> None:
    """But for a solved beta: torch's sinh rounds differently in a vector's lanes than alone."""
    num_rows = 3 * len(CONTROLS)
    controls = [CONTROLS[i % len(CONTROLS)] for i in range(num_rows)]
    candidates, values = make_step(num_rows)
    rows = guided_rows(controls)
    together, steered = steer(rows, candidates, values), rows.needs_steering(candidates, values)
    for i in range(num_rows):
        alone = guided_rows([controls[i]])
        tolerance = 1e-6 if controls[i].mode == "target_mean" else 0.0
        found = steer(alone, take(candidates, i), values[i : i + 1])[0]
        torch.testing.assert_close(found, together[i], rtol=tolerance, atol=0)
        assert alone.needs_steering(take(candidates, i), values[i : i + 1])[0] == steered[i]


@pytest.mark.parametrize("control", CONTROLS, ids=str)
def test_masked_and_filtered_tokens_stay_out_in_every_mode(control: LengthControl) -> None:
    candidates, values = make_step(9)
    steered = steer(guided_rows([control] * 9), candidates, values)
    assert not steered.isnan().any()
    assert (steered[candidates.logprobs == -torch.inf] == -torch.inf).all()
    assert (steered[candidates.ids == 7] == -torch.inf).all()
    torch.testing.assert_close(steered.exp().sum(-1), torch.ones(9))


@pytest.mark.parametrize(
    ("control", "wanted_length"),
    [
        (LengthControl("target_mean", target=60), lambda own: torch.full_like(own, 60 - GENERATED - 1)),
        (LengthControl("target_mean", factor=0.9, scaling="length"), lambda own: 0.9 * own),
    ],
    ids=["target", "factor"],
)
def test_target_mean_has_the_length_asked_for_where_the_candidates_allow_it(control, wanted_length) -> None:  # type: ignore[no-untyped-def]
    candidates, values = make_step(9)
    values = values.masked_fill(candidates.eos_mask, 0.0)
    own = length_from_value((candidates.logprobs.exp() * values).sum(-1), GAMMA)
    wanted = value_from_length(wanted_length(own), GAMMA)
    steered = steer(guided_rows([control] * 9), candidates, values)
    found = (steered.exp() * values).sum(-1)
    is_candidate = candidates.logprobs > -torch.inf
    lowest = values.masked_fill(~is_candidate, 0.0).amin(-1)
    assert (lowest < wanted).any()  # otherwise the next line tests nothing
    torch.testing.assert_close(found, torch.maximum(wanted, lowest), atol=1e-4, rtol=0)


def test_hard_modes_take_the_candidate_that_scalar_values_say() -> None:
    candidates, values = make_step(9)
    length = length_from_value(values.masked_fill(candidates.eos_mask, 0.0), GAMMA)
    absent = candidates.logprobs == -torch.inf
    steered = steer(guided_rows([LengthControl("equal", target=40, strategy="hard")] * 9), candidates, values)
    distance = (length - (40 - GENERATED - 1)).abs().masked_fill(absent, torch.inf)
    assert torch.equal(steered.argmax(-1), distance.argmin(-1))
    steered = steer(guided_rows([LengthControl("at_most", target=40, strategy="hard")] * 9), candidates, values)
    assert torch.equal(steered.argmax(-1), length.masked_fill(absent, torch.inf).argmin(-1))


def test_the_natural_controller_prefers_candidates_that_lead_near_the_target() -> None:
    """Two candidates alike but for their value: the likelier one afterwards is the one nearer the target."""
    logprobs = torch.log(torch.tensor([[0.5, 0.5, 0.0]]))
    candidates = Candidates(torch.tensor([[4, 5, 3]]), logprobs, torch.tensor([[False, False, True]]))
    values = value_from_length(torch.tensor([[27.0, 80.0, 1.0]]), GAMMA)
    near, far, _ = steer(guided_rows([LengthControl("equal", target=40)]), candidates, values).exp()[0].tolist()
    assert near > 0.9 > far
    near, far, _ = steer(guided_rows([LengthControl("equal", target=93)]), candidates, values).exp()[0].tolist()
    assert far > 0.9 > near


def test_values_and_their_distributions_agree() -> None:
    _, values = make_step(5)
    torch.testing.assert_close(
        expected_value(distribution_from_value(values, TABLE), LENGTHS, GAMMA), values, atol=2e-6, rtol=0
    )


def test_steps_nearer_the_end_than_the_greatest_mean_value_are_left_alone() -> None:
    candidates, values = make_step(9)
    mean = torch.where(candidates.eos_mask | candidates.logprobs.isneginf(), 0.0, candidates.logprobs.exp() * values)
    mean = mean.sum(-1)
    plain = guided_rows([LengthControl("tilt", beta=8.0)] * 9).needs_scoring(candidates)
    bound = float(mean.median())
    assert 0 < int((plain & (mean <= bound)).sum()) < int(plain.sum())  # otherwise the gate does nothing here
    for max_mean_value, expected in (
        (bound, plain & (mean <= bound)),  # a mean value equal to the bound is steered
        (bound - 1e-6, plain & (mean < bound)),
        (0.0, plain),
        (-0.999, plain & False),
    ):
        rows = guided_rows([LengthControl("tilt", beta=8.0, max_mean_value=max_mean_value)] * 9)
        assert torch.equal(rows.needs_steering(candidates, values), expected)


def test_without_a_greatest_mean_value_no_mean_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from lenvm_runtime import guidance

    candidates, values = make_step(3)
    gated = guided_rows([LengthControl("tilt", beta=8.0, max_mean_value=-0.1)] * 3)
    monkeypatch.delattr(guidance, "mean_value")
    guided_rows([LengthControl("tilt", beta=8.0, max_mean_value=0.0)] * 3).needs_steering(candidates, values)
    with pytest.raises(NameError):
        gated.needs_steering(candidates, values)


BOUNDED = [control for control in CONTROLS if control.min_value is not None]


@pytest.mark.parametrize("control", BOUNDED, ids=str)
def test_a_row_with_a_least_value_is_the_row_whose_low_candidates_were_masked(control: LengthControl) -> None:
    candidates, values = make_step(9)
    low = (values < control.min_value) & ~candidates.eos_mask
    left = (candidates.logprobs > -torch.inf) & ~candidates.eos_mask & ~low
    assert low.any()
    steered = steer(guided_rows([control] * 9), candidates, values)
    assert (steered[low & left.any(-1, keepdim=True)] == -torch.inf).all()
    assert torch.equal(steered.isneginf().all(-1), torch.zeros(9, dtype=torch.bool))
    if control.mode in ("tilt", "at_least"):  # nothing else to steer by, or the target is met
        kept = candidates.logprobs.exp().masked_fill(~left, 0.0)
        going_on = candidates.logprobs.exp().masked_fill(candidates.eos_mask, 0.0).sum(-1, keepdim=True)
        expected = torch.where(
            candidates.eos_mask, candidates.logprobs.exp(), kept / kept.sum(-1, keepdim=True) * going_on
        )
        bounded = left.any(-1)
        torch.testing.assert_close(steered.exp()[bounded], expected[bounded])


def test_a_lower_bound_that_is_met_steers_no_more_unless_a_least_value_does() -> None:
    candidates, values = make_step(3)
    plain = guided_rows([LengthControl("tilt", beta=8.0)] * 3).needs_steering(candidates, values)
    assert plain.any()
    for strategy in ("natural", "hard"):
        for target, bound, expected in (
            (GENERATED + 2, None, plain),
            (GENERATED + 1, None, plain & False),  # the token to be sampled may be the last one
            (5, None, plain & False),
            (5, -0.12, plain),
        ):
            control = LengthControl("at_least", target=target, strategy=strategy, min_value=bound)
            assert torch.equal(guided_rows([control] * 3).needs_steering(candidates, values), expected)
