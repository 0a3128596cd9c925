"""What one generation request adds to the metrics, read from a copy of what the client gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import Any

import orjson

from .errors import EngineBroken
from .metrics import Metrics
from .sse import DATA, DONE
from .validation import Generation

_ENDS = ("natural", "cap", "abort")


class Event(Enum):
    """What an engine's event is to the relay."""

    CHUNK = "chunk"
    USAGE = "usage"
    ERROR = "error"
    DONE = "done"


@dataclass(slots=True)
class _Choice:
    num_tokens: int = 0
    last_s: float = 0.0
    prediction: Mapping[str, Any] | None = None
    ended: str | None = None


class Observer:
    """Counts one request. Create it once the request is read; call ``finish`` exactly once, however it ends."""

    def __init__(self, metrics: Metrics, generation: Generation, model: str) -> None:
        self.error: Mapping[str, Any] = {}
        self._metrics = metrics
        self._control = generation.control
        self._model = model
        self._started_s = perf_counter()
        self._first_s = 0.0
        self._choices: dict[int, _Choice] = {}
        self._usage: Mapping[str, Any] = {}
        self._token_latency = metrics.inter_token_latency.labels(model)

    def see_event(self, event: bytes) -> Event:
        """Count one streamed event; the payload of an error event is then in ``error``."""
        if event == DONE:
            return Event.DONE
        if not event.startswith(DATA):
            return Event.CHUNK  # a comment
        chunk = _parse(event[len(DATA) :])
        with _well_formed():
            return self._see_chunk(chunk)

    def _see_chunk(self, chunk: Mapping[str, Any]) -> Event:
        if "error" in chunk:
            error = chunk["error"]
            self.error = error if isinstance(error, dict) else {"message": str(error)}
            return Event.ERROR
        self._usage = chunk.get("usage") or self._usage
        choices = chunk.get("choices")
        if not choices:
            return Event.USAGE if chunk.get("usage") else Event.CHUNK
        now_s = perf_counter()
        for choice in choices:
            self._see_choice(choice, now_s)
        return Event.CHUNK

    def see_answer(self, body: bytes) -> None:
        """Count an answer that was not streamed."""
        answer = _parse(body)
        with _well_formed():
            self._usage = answer.get("usage") or {}
            for choice in answer["choices"]:
                self._see_lenvm(self._choices.setdefault(choice["index"], _Choice()), choice.get("lenvm") or {})

    def finish(self, *, completed: bool) -> None:
        """Add the request's totals. ``completed``: the client got the whole answer."""
        num_tokens = self._usage.get("completion_tokens") or sum(one.num_tokens for one in self._choices.values())
        self._metrics.generation_tokens.labels(self._model).inc(num_tokens)
        self._metrics.prompt_tokens.labels(self._model).inc(self._usage.get("prompt_tokens", 0))
        if not completed:
            return
        self._metrics.e2e_latency.labels(self._model).observe(perf_counter() - self._started_s)
        for choice in self._choices.values():
            self._count_end(choice, num_tokens if len(self._choices) == 1 else choice.num_tokens)

    def _see_choice(self, raw: Mapping[str, Any], now_s: float) -> None:
        if not self._first_s:
            self._first_s = now_s
            self._metrics.time_to_first_token.labels(self._model).observe(now_s - self._started_s)
        index = raw["index"]
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice()
        lenvm = raw.get("lenvm")
        num_new = (self._see_lenvm(choice, lenvm) if lenvm else 0) or _has_text(raw)
        if not num_new:
            return
        if choice.last_s:
            self._token_latency.observe((now_s - choice.last_s) / num_new)
        choice.last_s = now_s

    def _see_lenvm(self, choice: _Choice, lenvm: Mapping[str, Any]) -> int:
        num_new = len(lenvm.get("values") or ())
        choice.num_tokens += num_new
        choice.prediction = lenvm.get("prediction") or choice.prediction
        choice.ended = lenvm.get("ended") or choice.ended
        return num_new

    def _count_end(self, choice: _Choice, num_tokens: int) -> None:
        if self._control is not None:
            self._count_control(choice, num_tokens)
        elif choice.ended == "natural" and choice.prediction and num_tokens:
            expected, (low, high) = choice.prediction["expected"], choice.prediction["interval"]
            self._metrics.prediction_error.labels(self._model).observe((expected - num_tokens) / num_tokens)
            inside = "true" if low <= num_tokens <= high else "false"
            self._metrics.prediction_interval.labels(self._model, inside).inc()

    def _count_control(self, choice: _Choice, num_tokens: int) -> None:
        control = self._control
        assert control is not None
        ended = choice.ended if choice.ended in _ENDS else "abort"
        self._metrics.control_outcomes.labels(control.mode, ended).inc()
        target: float | None = control.target
        if control.factor is not None and choice.prediction:
            target = control.factor * choice.prediction["expected"]
        if target and num_tokens and ended != "abort":
            self._metrics.control_deviation.labels(control.mode).observe((num_tokens - target) / target)


@contextmanager
def _well_formed() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError):
        raise EngineBroken("The engine's answer is malformed") from None


def _has_text(choice: Mapping[str, Any]) -> bool:
    """Whether a chunk without values shows at least one new token."""
    return bool(choice.get("text") or (choice.get("delta") or {}).get("content"))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise EngineBroken("The engine's answer is not JSON") from None
    if not isinstance(parsed, dict):
        raise EngineBroken("The engine's answer is not a JSON object")
    return parsed
