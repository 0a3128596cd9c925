"""Controls stay aligned with their rows through SGLang's batch operations."""

from __future__ import annotations

import random

import torch

from lenvm_runtime.control_batch import ControlBatch, merge
from lenvm_runtime.length_control import LengthControl

CHOICES = (
    None,
    LengthControl("tilt", beta=0.0),
    LengthControl("equal", target=7),
    LengthControl("at_most", target=9, strategy="hard"),
    LengthControl("scale", factor=0.5),
    LengthControl("tilt", beta=3.0),
)


def build(rows: list[tuple[LengthControl | None, int]]) -> ControlBatch | None:
    return ControlBatch.build([c for c, _ in rows], [p for _, p in rows], [p % 2 == 0 for _, p in rows], "cpu")


def assert_equal(batch: ControlBatch | None, rows: list[tuple[LengthControl | None, int]]) -> None:
    expected = build(rows)
    if expected is None or batch is None:
        assert batch is expected is None
        return
    assert batch.guided == expected.guided
    guided = expected.rows
    assert torch.equal(batch.rows, guided)
    for name in ("mode", "strategy", "target", "factor", "beta", "prompt_len", "greedy"):
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
