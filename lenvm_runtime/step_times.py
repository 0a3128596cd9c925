"""Host time of each step by part, one JSON line a step: for benchmarks, where ``LENVM_STEP_TIMES`` names a file.

On a CPU that is what the parts cost; with an accelerator it is what the host spends on launching them.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lenvm_runtime import compat

_VALUE_STEP = "lenvm_runtime.value_model.runner.ValueModelRunner.step"


class StepTimes:
    """Seconds of a step's parts, each without the parts within it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self._path, self._clock = path, clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = [0.0]

    def run(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` and count its time to ``part``."""
        started = self._clock()
        self._inner.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            elapsed = self._clock() - started
            self._seconds[part] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its calls counted to ``part``."""
        return lambda *args, **kwargs: self.run(part, function, *args, **kwargs)

    def end_step(self, is_decode: bool, num_rows: int) -> None:
        """Write the step's line and begin the next."""
        line = {"ended": time.time(), "decode": is_decode, "rows": num_rows, "seconds": dict(self._seconds)}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._seconds.clear()


def install(path: Path) -> None:
    """Time the parts of this process's steps; call before SGLang applies its hooks."""
    from lenvm_runtime import steering
    from lenvm_runtime.guidance import GuidedRows

    times = StepTimes(path)

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return times.run("base_forward", original, *args, **kwargs)

    def sample(original: Callable[..., Any], runner: Any, logits_output: Any, forward_batch: Any) -> Any:
        sampled = times.run("sampling", original, runner, logits_output, forward_batch)
        times.end_step(forward_batch.forward_mode.is_decode(), forward_batch.batch_size)
        return sampled

    compat.around(compat.FORWARD, forward)
    compat.around(compat.SAMPLE, sample)
    for owner, name, part in (
        (steering, "select_candidates", "selection"),
        (steering, "scatter_candidates", "steering"),
        (GuidedRows, "steer", "steering"),
    ):
        setattr(owner, name, times.wrap(part, getattr(owner, name)))
    compat.around(_VALUE_STEP, lambda step, *args: times.run("value_forward", step, *args))
