"""Times of a step's parts: each without the parts within it, summed up over the steps of a kind of run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench_guided import part_figures
from lenvm_runtime.step_times import StepTimes


def test_a_part_is_timed_without_the_parts_within_it(tmp_path: Path) -> None:
    now = [0.0]

    def work(seconds: float, inner: float = 0.0) -> float:
        now[0] += seconds
        if inner:
            times.run("selection", work, inner)
        return seconds

    times = StepTimes(tmp_path / "times", lambda: now[0])
    assert times.wrap("base_forward", work)(5.0) == 5.0
    times.run("sampling", work, 2.0, inner=3.0)
    times.run("sampling", work, 1.0)
    times.end_step(True, 4)
    times.run("base_forward", work, 7.0)
    times.end_step(False, 2)
    first, second = map(json.loads, (tmp_path / "times").read_text().splitlines())
    assert first["seconds"] == {"base_forward": 5.0, "sampling": 3.0, "selection": 3.0}
    assert (first["decode"], first["rows"]) == (True, 4)
    assert second["seconds"] == {"base_forward": 7.0}


def test_a_part_that_raises_is_timed_too(tmp_path: Path) -> None:
    times = StepTimes(tmp_path / "times", iter(range(9)).__next__)
    with pytest.raises(ZeroDivisionError):
        times.run("sampling", lambda: 1 / 0)
    times.end_step(True, 1)
    assert json.loads((tmp_path / "times").read_text())["seconds"] == {"sampling": 1}


def test_figures_are_means_over_full_decode_steps_within_the_rounds_of_a_kind() -> None:
    def step(ended: float, seconds: float, decode: bool = True, rows: int = 2) -> dict[str, object]:
        return {"ended": ended, "decode": decode, "rows": rows, "seconds": {"base_forward": seconds}}

    steps = [step(1, 0.010), step(2, 0.020), step(2, 9.0, decode=False), step(2, 9.0, rows=1), step(5, 0.040)]
    rounds = {"plain": [(0.5, 1.5), (1.8, 2.5)], "k5": [(4.0, 6.0)], "idle": [(7.0, 8.0)]}
    figures = part_figures(steps, rounds, 2)
    assert figures == pytest.approx({"plain_base_forward_ms": 15.0, "k5_base_forward_ms": 40.0})
