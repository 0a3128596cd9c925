"""The ``lenvm`` objects: every value once, the prediction first, the end last."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from lenvm_runtime.length_control import LengthControl, build_custom_params
from lenvm_runtime.response import ResponseBuilder

GAMMA = 0.997


def builder(control: LengthControl | None = None, values: bool = True) -> ResponseBuilder:
    return ResponseBuilder(build_custom_params(control, values), GAMMA, 2048)


def test_values_ride_on_the_next_chunk_of_their_choice() -> None:
    response = builder()
    response.observe(0, {"lenvm_value": [-0.5], "lenvm_prediction": [(100.2, 20.4, 300.6)]})
    response.observe(1, {"lenvm_value": [-0.25]})
    response.observe(0, {"lenvm_value": [-0.4]})
    first = response.take(0, finishing=False)
    assert first["values"] == [-0.5, -0.4]
    assert first["remaining"][0] == pytest.approx(math.log(0.5) / math.log(GAMMA), abs=0.1)
    assert first["prediction"] == {"expected": 100.2, "interval": [20, 301]}
    assert response.take(0, finishing=False) == {}
    assert response.take(1, finishing=False)["values"] == [-0.25]


@pytest.mark.parametrize(
    ("reason", "ended"), [("stop", "natural"), ("tool_calls", "natural"), ("length", "cap"), ("abort", "abort")]
)
def test_the_end_is_told_once_with_the_control_applied(reason: str, ended: str) -> None:
    control = LengthControl("equal", target=12)
    response = builder(control)
    response.observe(0, {"lenvm_value": [-0.1], "finish_reason": {"type": reason}})
    assert "ended" not in response.take(0, finishing=False)
    assert response.take(0, finishing=True) == {"applied": control.to_dict(), "ended": ended}


def test_values_can_be_left_out() -> None:
    response = builder(values=False)
    response.observe(0, {"lenvm_value": [-0.1], "lenvm_prediction": [(1, 1, 1)], "finish_reason": {"type": "stop"}})
    assert response.take(0, finishing=True) == {"applied": None, "ended": "natural"}


def test_a_value_of_minus_one_has_a_finite_remaining_length() -> None:
    response = builder()
    response.observe(0, {"lenvm_value": [-1.0]})
    assert response.take(0, finishing=False)["remaining"] == [2048.0]


async def test_chunks_are_spliced_without_decoding_them() -> None:
    pytest.importorskip("sglang")
    from lenvm_runtime.response_hooks import _splice

    quoted = orjson.dumps('"choices":[{"index":0,"finish_reason":"stop"').decode()
    plain = f'data: {{"id":"x","choices":[{{"index":0,"delta":{{"content":{quoted}}},"finish_reason":null}}]}}\n\n'
    last = 'data: {"id":"x","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    response = builder()
    response.observe(0, {"lenvm_value": [-0.5], "finish_reason": {"type": "stop"}})

    async def chunks() -> AsyncIterator[str]:
        for chunk in (plain, last, "data: [DONE]\n\n"):
            yield chunk

    spliced = [chunk async for chunk in _splice(chunks(), response)]

    def choice(chunk: str) -> dict[str, Any]:
        parsed: dict[str, Any] = orjson.loads(chunk.removeprefix("data: "))["choices"][0]
        return parsed

    first, final = choice(spliced[0]), choice(spliced[1])
    assert first["delta"]["content"] == '"choices":[{"index":0,"finish_reason":"stop"'
    assert first["lenvm"]["values"] == [-0.5]
    assert "ended" not in first["lenvm"]
    assert final["lenvm"]["ended"] == "natural"
    assert spliced[2] == "data: [DONE]\n\n"
