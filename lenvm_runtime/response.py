"""The ``lenvm`` objects of OpenAI responses, built in the engine's API process. No torch.

``values[i]`` is V of the state that token i was sampled from, in (-1, 0]. ``remaining[i]`` is the
length that this value is the exact return of, log(1 + V) / log(gamma): the certainty equivalent,
which underestimates the mean remaining length (Jensen). ``prediction`` comes from the predicted
distribution of the length at the prompt boundary: its mean and its 10% and 90% quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lenvm_runtime.length_control import LengthControl, wants_values

VALUE_KEY = "lenvm_value"
PREDICTION_KEY = "lenvm_prediction"
CANDIDATES_KEY = "lenvm_candidate_values"
_ENDED = {"stop": "natural", "tool_calls": "natural", "length": "cap", "abort": "abort"}


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
        for name, numbers in _describe(values, self.gamma, self.max_length).items():
            pending[name] += numbers
        prediction = meta_info.get(PREDICTION_KEY)
        if prediction and index not in self._predicted:
            self._predicted.add(index)
            expected, low, high = prediction[0]
            pending["prediction"] = {"expected": round(expected, 1), "interval": [round(low), round(high)]}


def describe_input(
    meta_info: dict[str, Any],
    candidate_ids: tuple[int, ...],
    gamma: float,
    max_length: int,
    input_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The ``lenvm`` object of a value query, from the ``meta_info`` of its one-token answer.

    ``input_ids``: the query's, where it gave any; SGLang's log-probabilities report the vocabulary's last id as 0.

    ``token_ids``, ``values``, ``remaining``: one element a prompt token, of the state after it;
    ``candidates``: for each asked-for next token the value and the remaining length after it.
    """
    entries = meta_info["input_token_logprobs"]  # (V at the token before, token id, text) a prompt token
    values = [entry[0] for entry in entries[1:]] + [meta_info[VALUE_KEY][0]]
    candidates = zip(candidate_ids, meta_info.get(CANDIDATES_KEY, [[]])[0], strict=False)  # rows are padded
    return {
        "token_ids": [entry[1] for entry in entries] if input_ids is None else list(input_ids),
        **_describe(values, gamma, max_length),
        "candidates": [
            {
                "token_id": token,
                "value": round(value, 5),
                "remaining": round(remaining_length(value, gamma, max_length), 1),
            }
            for token, value in candidates
        ],
    }


def _describe(values: list[float], gamma: float, max_length: int) -> dict[str, list[float]]:
    return {
        "values": [round(value, 5) for value in values],
        "remaining": [round(remaining_length(value, gamma, max_length), 1) for value in values],
    }


def remaining_length(value: float, gamma: float, max_length: int) -> float:
    """log(1 + V) / log(gamma) tokens, at most ``max_length``."""
    if value <= -1.0:
        return float(max_length)
    return min(abs(math.log1p(value) / math.log(gamma)), float(max_length))  # abs: 0, not -0, at the end
