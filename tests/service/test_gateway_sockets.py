"""The gateway over real sockets: a raw HTTP/1.1 engine behind it, the openai client before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import openai
import orjson
import pytest
import uvicorn

from fake_engine import (
    DONE,
    ERROR_EVENT,
    MODEL,
    PREDICTION,
    FakeEngine,
    answer_events,
    chunk,
    completion,
    json_response,
    usage,
)
from lenvm_service.app import build_app
from lenvm_service.config import GatewayConfig

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]


def frame(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class RawEngine:
    """Answers the gateway's questions as FakeEngine does; ``behave`` answers streamed requests by hand."""

    def __init__(self) -> None:
        self.described = FakeEngine()
        self.behave: Behaviour | None = None
        self.lost = asyncio.Event()  # the gateway closed a connection under a streamed request

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
                if body and orjson.loads(body).get("stream"):
                    await self.behave(reader, writer)
                else:
                    await self._answer(head.split(b" ")[1].decode(), body, writer)
        writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        content = await self._describe(path, orjson.loads(body) if body else None).aread()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(content) + content)

    def _describe(self, path: str, body: dict[str, Any] | None) -> httpx.Response:
        if body is None:
            return self.described._describe(path)
        return self.described._render(body) if "return_prompt_token_ids" in body else json_response(completion())

    async def stream_until_lost(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + frame(chunk("a", values=[-0.5])))
        await reader.read()
        self.lost.set()

    async def die_in_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + frame(chunk("a", values=[-0.5])))
        await writer.drain()
        writer.transport.abort()

    def play(self, *events: bytes) -> None:
        async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM_HEAD + b"".join(frame(event) for event in events) + b"0\r\n\r\n")

        self.behave = behave


@pytest.fixture
async def raw_engine() -> AsyncIterator[RawEngine]:
    engine = RawEngine()
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield engine
    server.close()


@pytest.fixture
async def port(raw_engine) -> AsyncIterator[int]:
    """A gateway's port."""
    config = GatewayConfig(engine_url=raw_engine.url, api_keys=("key",), max_concurrency=4)
    server = uvicorn.Server(uvicorn.Config(build_app(config), port=0, log_level="warning", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


@pytest.fixture
async def client(port) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0) as client:
        yield client


QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello"}]}


async def test_openai_client_reads_values_from_a_stream(raw_engine, client):
    raw_engine.play(*answer_events(applied={"mode": "at_most", "target": 9}))
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"max_length_hint": 9}}
    chunks = [one async for one in await client.chat.completions.create(**QUESTION, **options)]
    assert "".join(one.choices[0].delta.content for one in chunks if one.choices) == "Hello"
    assert chunks[0].choices[0].lenvm["prediction"] == PREDICTION
    assert [value for one in chunks[:3] for value in one.choices[0].lenvm["values"]] == [-0.5, -0.4, -0.3, -0.1]
    assert chunks[3].choices[0].lenvm == {"applied": {"mode": "at_most", "target": 9}, "ended": "natural"}
    assert chunks[4].usage.completion_tokens == 4


async def test_openai_client_reads_an_answer_and_models(client):
    answer = await client.chat.completions.create(**QUESTION)
    assert answer.choices[0].message.content == "Hi"
    assert answer.choices[0].lenvm["ended"] == "natural"
    assert [model.id async for model in client.models.list()] == [MODEL]


async def test_openai_client_gets_its_own_errors(client):
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**QUESTION, extra_body={"length_control": {"mode": "equal"}})
    assert refused.value.param == "length_control.target"
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(**{**QUESTION, "model": "other"})
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()


async def test_openai_client_gets_an_engines_error_event_as_an_error(raw_engine, client):
    raw_engine.play(chunk("a"), ERROR_EVENT, DONE)
    stream = await client.chat.completions.create(**QUESTION, stream=True)
    with pytest.raises(openai.APIError, match="out of memory"):
        async for _ in stream:
            pass


async def test_engine_that_dies_in_a_stream_is_an_error_event(raw_engine, client):
    raw_engine.behave = raw_engine.die_in_stream
    stream = await client.chat.completions.create(**QUESTION, stream=True)
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in stream:
            pass


async def test_client_that_leaves_a_stream_aborts_it_in_the_engine(raw_engine, client):
    raw_engine.behave = raw_engine.stream_until_lost
    stream = await client.chat.completions.create(**QUESTION, stream=True)
    assert (await anext(stream)).choices[0].delta.content == "a"
    await stream.close()
    await asyncio.wait_for(raw_engine.lost.wait(), 2)


async def test_four_at_once_are_served_and_a_fifth_is_told_to_wait(raw_engine, client):
    raw_engine.behave = raw_engine.stream_until_lost
    streams = [await client.chat.completions.create(**QUESTION, stream=True) for _ in range(4)]
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(**QUESTION)
    assert refused.value.response.headers["retry-after"] == "2"
    for stream in streams:
        await stream.close()


async def test_many_streams_over_kept_connections(raw_engine, client):
    raw_engine.play(*[chunk("a", values=[-0.5])] * 50, usage(1, 50), DONE)
    for _ in range(5):
        streams = await asyncio.gather(*[client.chat.completions.create(**QUESTION, stream=True) for _ in range(4)])
        for stream in streams:
            assert len([one async for one in stream]) == 50
