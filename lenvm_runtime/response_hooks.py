"""Puts ``lenvm`` objects into SGLang's OpenAI responses (API process).

Streams: every event that a request's generator takes from the tokenizer manager is observed, and
what it brought rides on the next chunk of its choice, spliced in without decoding the chunk.
Non-streamed answers: each choice gets the whole object.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
from fastapi.responses import ORJSONResponse

from lenvm_runtime import compat
from lenvm_runtime.length_control import LengthControl
from lenvm_runtime.response import ResponseBuilder

_BUILDER = "lenvm_builder"
_CHOICE = re.compile(r'"choices":\[\{"index":(\d+),')
_FINISHING = '"finish_reason":"'


def register(gamma: float, max_length: int) -> None:
    """Hook the chat and completion handlers; ``gamma`` is the LenVM's, ``max_length`` bounds ``remaining``."""

    def new_builder(custom_params: Any) -> ResponseBuilder:
        return ResponseBuilder(custom_params, gamma, max_length)

    def stream(
        original: Callable[..., AsyncGenerator[str, None]], handler: Any, adapted: Any, request: Any, *args: Any
    ) -> AsyncGenerator[str, None]:
        builder = new_builder(request.custom_params)
        setattr(adapted, _BUILDER, builder)
        return _splice(original(handler, adapted, request, *args), builder)

    def respond(response: Any, _handler: Any, request: Any, results: list[dict[str, Any]], *_: Any) -> Any:
        if not hasattr(response, "choices"):  # an error response
            return None
        body = response.model_dump()
        builder = new_builder(request.custom_params)
        for index, (choice, result) in enumerate(zip(body["choices"], results, strict=True)):
            builder.observe(index, result["meta_info"])
            choice["lenvm"] = builder.take(index, finishing=True)
        return ORJSONResponse(body)

    compat.around(compat.GENERATE, _observe)
    for target in (compat.CHAT_STREAM, compat.COMPLETION_STREAM):
        compat.around(target, stream)
    for target in (compat.CHAT_RESPONSE, compat.COMPLETION_RESPONSE):
        compat.after(target, respond)


def _observe(original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, *args: Any) -> Any:
    _check_controls(getattr(obj, "sampling_params", None))
    events = original(manager, obj, *args)
    builder = getattr(obj, _BUILDER, None)
    return events if builder is None else _observe_events(events, builder)


def _check_controls(sampling_params: Any) -> None:
    """Refuse a malformed control here (ValueError: HTTP 400), before it reaches the scheduler."""
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        if isinstance(params, dict):
            LengthControl.from_custom_params(params.get("custom_params"))


async def _observe_events(events: AsyncGenerator[Any, None], builder: ResponseBuilder) -> AsyncGenerator[Any, None]:
    async for event in events:
        builder.observe(event.get("index", 0), event["meta_info"])
        yield event


async def _splice(chunks: AsyncGenerator[str, None], builder: ResponseBuilder) -> AsyncGenerator[str, None]:
    async for chunk in chunks:
        match = _CHOICE.search(chunk)
        if match is None:
            yield chunk
            continue
        lenvm = builder.take(int(match[1]), finishing=_FINISHING in chunk)
        if lenvm:
            encoded = orjson.dumps(lenvm).decode()
            chunk = f'{chunk[: match.end()]}"lenvm":{encoded},{chunk[match.end() :]}'
        yield chunk
