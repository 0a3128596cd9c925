"""A scripted SGLang for unit tests: an httpx transport that answers as the engine's OpenAI server does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import orjson

MODEL = "smol/model"
DONE = b"data: [DONE]\n\n"
Step = bytes | float | threading.Event | Exception


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def chunk(text: str = "", index: int = 0, finish: str | None = None, **lenvm: Any) -> bytes:
    choice: dict[str, Any] = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    if lenvm:
        choice["lenvm"] = lenvm
    return event({"id": "c1", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]})


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    total = prompt_tokens + completion_tokens
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
    return event({"id": "c1", "object": "chat.completion.chunk", "model": MODEL, "choices": [], "usage": counts})


PREDICTION = {"expected": 3.0, "interval": [2.0, 9.0]}
ERROR_EVENT = event(
    {"error": {"object": "error", "message": "out of memory", "type": "OOM", "param": None, "code": 500}}
)


def answer_events(applied: dict[str, Any] | None = None, ended: str = "natural") -> list[bytes]:
    """A whole stream of four tokens in three chunks, as the engine sends it with usage on."""
    return [
        chunk("", values=[-0.5], remaining=[3.0], prediction=PREDICTION),
        chunk("Hel", values=[-0.4, -0.3], remaining=[2.5, 2.0]),
        chunk("lo", values=[-0.1], remaining=[1.0]),
        chunk("", finish="stop", applied=applied, ended=ended),
        usage(7, 4),
        DONE,
    ]


def completion(**lenvm: Any) -> dict[str, Any]:
    """An answer that was not streamed."""
    described = {"values": [-0.5, -0.1], "remaining": [2.0, 1.0], "prediction": PREDICTION, "applied": None}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Hi"},
        "finish_reason": "stop",
        "lenvm": {**described, "ended": "natural", **lenvm},
    }
    counts = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return {"id": "c1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": counts}


class Script(httpx.AsyncByteStream):
    """Plays its steps: bytes are sent, numbers are seconds of silence, events are waited for, exceptions break the
    connection."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.exhausted = False
        self.closed = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for step in self.steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, bytes):
                yield step
            elif isinstance(step, threading.Event):
                await asyncio.to_thread(step.wait, 60)
            else:
                await asyncio.sleep(step)
        self.exhausted = True

    async def aclose(self) -> None:
        self.closed.set()


def json_response(content: Any, status: int = 200) -> httpx.Response:
    return httpx.Response(status, content=orjson.dumps(content), headers={"content-type": "application/json"})


class FakeEngine(httpx.AsyncBaseTransport):
    """``answer`` maps a request's JSON body to its response; ``down`` refuses connections."""

    def __init__(self, answer: Callable[[dict[str, Any]], httpx.Response] | None = None) -> None:
        self.answer = answer or (lambda body: json_response(completion()))
        self.down = False
        self.health_status = 200
        self.has_plugin = True
        self.server_info: dict[str, Any] = {
            "enable_deterministic_inference": False,
            "tool_call_parser": None,
            "startup_time": 1.0,
        }
        self.has_images = False
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.num_probes = 0
        self.num_rendered = 0
        self.read_parts = {"chat_template_kwargs.enable_thinking", "user.name"}
        self.refused_roles: set[str] = set()
        self.script: Script | None = None

    def play(self, *steps: Step) -> None:
        """Answer every generation request with a stream of these steps."""

        def answer(_: dict[str, Any]) -> httpx.Response:
            self.script = Script(steps)
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=self.script)

        self.answer = answer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("refused", request=request)
        path = request.url.path
        if request.method == "GET":
            return self._describe(path)
        body = orjson.loads(await request.aread())
        if body.get("return_prompt_token_ids"):
            return self._render(body)
        if body.get("prompt") == "Hi" and body.get("max_tokens") == 1:
            self.num_probes += 1
            described = completion() if self.has_plugin else {"choices": [{"index": 0, "text": "!"}]}
            return json_response(described)
        self.bodies.append(body)
        self.paths.append(path)
        return self.answer(body)

    def _render(self, chat: dict[str, Any]) -> httpx.Response:
        """A prompt of what the template reads: these parts, and every message's role and content."""
        self.num_rendered += 1
        prompt: list[Any] = []
        for name, value in chat.get("chat_template_kwargs", {}).items():
            prompt += [value] if f"chat_template_kwargs.{name}" in self.read_parts else []
        for message in chat["messages"]:
            if message["role"] in self.refused_roles:
                return json_response({"error": {"message": "no such role"}}, 400)
            prompt += [message["role"], message["content"]]
            prompt += [message.get("name")] if f"{message['role']}.name" in self.read_parts else []
            prompt += [message.get("reasoning_content")] if "reasoning_content" in self.read_parts else []
        return json_response({"choices": [{"prompt_token_ids": prompt}]})

    def _describe(self, path: str) -> httpx.Response:
        cards = [{"id": MODEL, "object": "model", "created": 1, "owned_by": "sglang", "max_model_len": 2048}]
        return {
            "/health": httpx.Response(self.health_status),
            "/v1/models": json_response({"object": "list", "data": cards}),
            "/server_info": json_response(self.server_info),
            "/model_info": json_response({"has_image_understanding": self.has_images}),
        }[path]
