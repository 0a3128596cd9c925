"""Controls stay aligned with their rows through SGLang's batch operations."""

from __future__ import annotations

import random

import pytest
import torch

from lenvm_kernels.candidates import NO_TOKEN
from lenvm_kernels.length_control import Mode
from lenvm_kernels.value_bound import NO_MIN_VALUE
from lenvm_runtime.control_batch import DEFAULT_CANDIDATES, ControlBatch, merge
from lenvm_runtime.length_control import LengthControl

CHOICES = (
    None,
    LengthControl("tilt", beta=0.0),
    LengthControl("equal", target=7),
    LengthControl("at_most", target=9, strategy="hard"),
    LengthControl("scale", factor=0.5),
    LengthControl("tilt", beta=3.0),
    LengthControl("target_mean", target=8, entropy_threshold=0.5),
    LengthControl("target_mean", factor=2.0, scaling="value"),
    LengthControl("at_least", target=8, max_mean_value=-0.25),
    LengthControl("tilt", beta=0.0, min_value=-0.5),
    LengthControl("target_mean", factor=0.5, scaling="length"),
)


def build(rows: list[tuple[LengthControl | None, int]]) -> ControlBatch | None:
    numbers = [number for _, number in rows]  # of the prompt's tokens, and stand for what else a row has
    stops = [set(range(number, number + number % 4)) or None for number in numbers]
    ignored = [number % 2 == 0 for number in numbers]
    asked = [number % 7 or None for number in numbers]
    return ControlBatch.build([c for c, _ in rows], numbers, numbers, "cpu", ignored, stops, asked)


def assert_equal(batch: ControlBatch | None, rows: list[tuple[LengthControl | None, int]]) -> None:
    expected = build(rows)
    if expected is None or batch is None:
        assert batch is expected is None
        return
    assert batch.guided == expected.guided
    assert batch.mean == expected.mean
    assert batch.bounded == expected.bounded
    assert batch.gated == expected.gated
    assert batch.endings_ignored == expected.endings_ignored
    assert batch.ranked == expected.ranked
    assert batch.max_candidates == expected.max_candidates
    assert batch.num_stops == expected.num_stops
    assert torch.equal(batch.stop_ids, expected.stop_ids)
    guided = expected.rows
    assert torch.equal(batch.rows, guided)
    for name in (
        "mode",
        "strategy",
        "target",
        "factor",
        "beta",
        "entropy_threshold",
        "min_value",
        "max_mean_value",
        "max_rank",
        "endless",
        "prompt_len",
    ):
        assert torch.equal(getattr(batch, name)[guided], getattr(expected, name)[guided]), name
    assert torch.equal(batch.mode, expected.mode)


def test_random_filters_and_merges_keep_rows_aligned() -> None:
    rng = random.Random(0)
    rows: list[tuple[LengthControl | None, int]] = []
    batch: ControlBatch | None = None
    for _ in range(300):
        if rng.random() < 0.5:
            added = [(rng.choice(CHOICES), rng.randint(1, 50)) for _ in range(rng.randint(1, 4))]
            batch = merge(batch, build(added), len(rows), len(added), "cpu")
            rows = rows + added
        elif rows:
            keep = sorted(rng.sample(range(len(rows)), rng.randint(0, len(rows))))
            batch = batch.filter(keep, torch.tensor(keep, dtype=torch.int64)) if batch else None
            rows = [rows[index] for index in keep]
        assert_equal(batch, rows)


def test_a_batch_without_control_costs_nothing() -> None:
    assert build([(None, 3), (LengthControl("tilt", beta=0.0), 4)]) is None
    assert merge(None, None, 2, 3, "cpu") is None


def test_guided_rows_are_those_under_control_with_their_own_targets() -> None:
    controls = (LengthControl("equal", target=7), None, LengthControl("scale", factor=0.5), CHOICES[-4], CHOICES[-1])
    batch = build([(control, 3) for control in controls])
    assert batch is not None
    targets, last, closing = torch.tensor([11.0, 12.0, 13.0, 14.0, 15.0]), torch.arange(5), torch.arange(9) == 3
    rows = batch.guided_rows(torch.tensor([1, 2, 3, 4, 5]), targets, last, closing)
    assert rows.after_closing.tolist() == [False, False, True, False]
    assert rows.mode.tolist() == [Mode.EQUAL, Mode.EQUAL, Mode.MEAN_VALUE_FACTOR, Mode.MEAN_LENGTH_FACTOR]
    assert rows.target.tolist() == [7.0, 13.0, 1.0, 1.0]
    assert rows.factor.tolist() == [0.0, 0.5, 2.0, 0.5]
    assert rows.generated.tolist() == [1, 3, 4, 5]
    assert rows.has_mean
    assert not rows.has_min_value
    kept = batch.filter([0, 2], torch.tensor([0, 2]))
    assert kept is not None
    assert not kept.guided_rows(torch.ones(2), targets[:2], last[:2], closing).has_mean


@pytest.mark.parametrize(
    ("bound", "bounded", "values"),
    [
        ("min_value", CHOICES[-2], [NO_MIN_VALUE, -0.5]),
        ("max_mean_value", CHOICES[-3], [0.0, -0.25]),
    ],
)
def test_a_bound_is_its_rows_alone(bound: str, bounded: LengthControl, values: list[float]) -> None:
    batch = build([(None, 3), (LengthControl("equal", target=7), 3), (bounded, 3)])
    assert batch is not None
    closing = torch.zeros(9, dtype=torch.bool)
    rows = batch.guided_rows(torch.zeros(3), torch.ones(3), torch.arange(3), closing)
    assert getattr(rows, f"has_{bound}")
    assert getattr(rows, bound).tolist() == values
    filtered = batch.filter([0, 1], torch.tensor([0, 1]))
    assert filtered is not None
    assert not getattr(filtered.guided_rows(torch.zeros(2), torch.ones(2), torch.arange(2), closing), f"has_{bound}")


def test_a_greedy_row_has_the_candidates_that_it_asked_for() -> None:
    control = LengthControl("equal", target=7)
    batch = ControlBatch.build([control] * 4, [1] * 4, [1, 1, 9, 1], "cpu", None, None, [5, None, 9, 1])
    assert batch is not None
    assert batch.max_candidates == [5, DEFAULT_CANDIDATES, 9, 1]
    assert batch.has_limits
    sampled = batch.filter([1, 2], torch.tensor([1, 2]))
    assert sampled is not None
    assert not sampled.has_limits, "SGLang's filter does it"


def test_the_stops_of_a_row_are_its_ends_beside_the_eos_ids() -> None:
    eos, control = torch.tensor([2, 9]), LengthControl("equal", target=7)
    batch = ControlBatch.build(
        [control, None, control, control], [1] * 4, [1] * 4, "cpu", None, [{5}, {6}, None, {9, 3}]
    )
    assert batch is not None
    assert batch.end_ids(eos).tolist() == [[2, 9, 5, NO_TOKEN], [2, 9, NO_TOKEN, NO_TOKEN], [2, 9, 3, NO_TOKEN]]
    without = batch.filter([1, 2], torch.tensor([1, 2]))
    assert without is not None
    assert without.end_ids(eos) is eos
