"""The ``lenvm`` objects of OpenAI responses, built in the engine's API process. No torch.

``values[i]`` is V of the state that token i was sampled from, in (-1, 0]. ``remaining[i]`` is the
length that this value is the exact return of, log(1 + V) / log(gamma): the certainty equivalent,
which underestimates the mean remaining length (Jensen). ``prediction`` comes from the predicted
distribution of the length at the prompt boundary: its mean and its 10% and 90% quantiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lenvm_runtime.length_control import LengthControl, wants_values

VALUE_KEY = "lenvm_value"
PREDICTION_KEY = "lenvm_prediction"
_ENDED = {"stop": "natural", "length": "cap", "abort": "abort"}


@dataclass
class ResponseBuilder:
    """The ``lenvm`` objects of one request. ``max_length`` bounds ``remaining``, which V = -1 would make infinite."""

    custom_params: Any
    gamma: float
    max_length: int
    _pending: dict[int, dict[str, Any]] = field(default_factory=dict)
    _ended: dict[int, str] = field(default_factory=dict)
    _predicted: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        control = LengthControl.from_custom_params(self.custom_params)
        self.applied = control.to_dict() if control else None
        self.with_values = wants_values(self.custom_params)

    def observe(self, index: int, meta_info: dict[str, Any]) -> None:
        """Take the new values of one engine event (incremental ``meta_info``) of choice ``index``."""
        if self.with_values:
            self._observe_values(index, meta_info)
        reason = meta_info.get("finish_reason")
        if reason:
            self._ended[index] = _ENDED[reason["type"]]

    def take(self, index: int, finishing: bool) -> dict[str, Any]:
        """What the next chunk of choice ``index`` carries; ``finishing`` when it has a finish_reason."""
        lenvm = self._pending.pop(index, {})
        if finishing and index in self._ended:
            lenvm |= {"applied": self.applied, "ended": self._ended[index]}
        return lenvm

    def _observe_values(self, index: int, meta_info: dict[str, Any]) -> None:
        values = meta_info.get(VALUE_KEY)
        if not values:
            return
        pending = self._pending.setdefault(index, {"values": [], "remaining": []})
        pending["values"] += [round(value, 5) for value in values]
        pending["remaining"] += [round(self._remaining(value), 1) for value in values]
        prediction = meta_info.get(PREDICTION_KEY)
        if prediction and index not in self._predicted:
            self._predicted.add(index)
            expected, low, high = prediction[0]
            pending["prediction"] = {"expected": round(expected, 1), "interval": [round(low), round(high)]}

    def _remaining(self, value: float) -> float:
        if value <= -1.0:
            return float(self.max_length)
        return min(math.log1p(value) / math.log(self.gamma), float(self.max_length))
