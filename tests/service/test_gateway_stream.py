"""The relay: bytes unchanged, one terminal event whatever happens, nothing left running for nobody."""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest

from fake_engine import DONE, ERROR_EVENT, MODEL, FakeEngine, answer_events, chunk, json_response, usage
from gateway_client import Exchange, GatewayClient


def terminal_events(body: bytes) -> list[bytes]:
    events = [event + b"\n\n" for event in body.split(b"\n\n") if event]
    return [event for event in events if event == DONE or event.startswith(b'data: {"error"')]


async def test_stream_is_byte_identical_when_usage_is_asked_for(engine, gateway):
    events = answer_events()
    engine.play(*events)
    response = await gateway.chat(stream=True, stream_options={"include_usage": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.content == b"".join(events)


async def test_stream_lacks_only_the_usage_chunk_when_it_is_not_asked_for(engine, gateway):
    engine.play(*answer_events())
    response = await gateway.chat(stream=True)
    assert response.content == b"".join(event for event in answer_events() if event != usage(7, 4))
    assert engine.bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
async def test_events_cut_anywhere_arrive_whole(engine, gateway, size):
    whole = b"".join(answer_events())
    engine.play(*[whole[i : i + size] for i in range(0, len(whole), size)])
    exchange = gateway.exchange(stream=True, stream_options={"include_usage": True})
    bodies, more = [], True
    while more:
        message = await exchange.next()
        bodies.append(message.get("body", b""))
        more = message.get("more_body", message["type"] == "http.response.start")
    assert b"".join(bodies) == whole
    assert all(body.endswith(b"\n\n") for body in bodies if body)


async def test_events_are_passed_on_at_once(engine, gateway):
    engine.play(chunk("a", values=[-0.5]), 60.0)
    exchange = gateway.exchange(stream=True)
    assert (await exchange.next())["type"] == "http.response.start"
    assert (await exchange.next())["body"] == chunk("a", values=[-0.5])
    exchange.leave()
    await exchange.task


FAILURES = {
    "connection breaks": [chunk("a"), httpx.ReadError("reset")],
    "protocol breaks": [chunk("a"), httpx.RemoteProtocolError("cut")],
    "ends without [DONE]": [chunk("a")],
    "ends inside an event": [chunk("a"), b'data: {"choi'],
    "is not JSON": [chunk("a"), b"data: <html>\n\n"],
    "is not an object": [chunk("a"), b"data: 3\n\n"],
    "is not a chunk": [chunk("a"), b'data: {"choices": [{}]}\n\n'],
    "falls silent": [chunk("a"), 60.0],
    "reports an error, then [DONE]": [chunk("a"), ERROR_EVENT, DONE],
    "reports an error and goes on": [chunk("a"), ERROR_EVENT, chunk("b"), ERROR_EVENT, 60.0],
    "says [DONE] twice": [chunk("a"), DONE, DONE],
    "breaks after [DONE]": [chunk("a"), DONE, httpx.ReadError("reset")],
    "lingers after [DONE]": [chunk("a"), DONE, 60.0],
    "sends more after [DONE]": [chunk("a"), DONE, chunk("b")],
}


@pytest.mark.parametrize("name", FAILURES)
async def test_exactly_one_terminal_event_comes_last(engine, name):
    engine.play(*FAILURES[name])
    gateway = GatewayClient(engine, idle_timeout_s=0.2)
    response = await gateway.chat(stream=True)
    assert response.status_code == 200
    assert response.content.startswith(chunk("a"))
    terminal = terminal_events(response.content)
    assert len(terminal) == 1
    assert response.content.endswith(terminal[0])
    assert engine.script.closed.is_set()
    assert (terminal[0] == DONE) == ("[DONE]" in name and "error" not in name and "without" not in name)


@pytest.mark.parametrize(
    ("steps", "kind", "code"),
    [
        ([chunk("a"), httpx.ReadError("reset")], "engine_broken", "engine_broken"),
        ([chunk("a"), 60.0], "engine_timeout", "engine_timeout"),
        ([chunk("a"), ERROR_EVENT, DONE], "engine_failed", 500),
    ],
)
async def test_stream_failures_are_counted_once(engine, steps, kind, code):
    engine.play(*steps)
    gateway = GatewayClient(engine, idle_timeout_s=0.2)
    response = await gateway.chat(stream=True)
    assert orjson.loads(terminal_events(response.content)[0][6:])["error"]["code"] == code
    samples = await gateway.samples()
    assert {name: value for name, value in samples.items() if "errors_total" in name} == {
        f'lenvm_errors_total{{kind="{kind}"}}': 1.0
    }
    assert 'lenvm_e2e_request_latency_seconds_count{model="smol/model"}' not in samples


async def test_engines_error_event_is_relayed_unchanged(engine, gateway):
    engine.play(chunk("a"), ERROR_EVENT, DONE)
    assert (await gateway.chat(stream=True)).content == chunk("a") + ERROR_EVENT


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ([ERROR_EVENT, DONE], 502),
        ([ERROR_EVENT.replace(b"500", b"400"), DONE], 400),
        ([ERROR_EVENT.replace(b"500", b"503"), DONE], 503),
        ([httpx.ReadError("reset")], 502),
        ([], 502),
        ([b"data: <html>\n\n"], 502),
        ([60.0], 504),
    ],
)
async def test_a_failure_before_the_first_event_is_an_http_error(engine, steps, status):
    engine.play(*steps)
    gateway = GatewayClient(engine, first_event_timeout_s=0.2)
    response = await gateway.chat(stream=True)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_closes_the_engines_connection_at_once(engine, gateway, stream):
    engine.play(chunk("a"), 60.0) if stream else engine.play(60.0)
    exchange = gateway.exchange(stream=stream)
    while engine.script is None:
        await asyncio.sleep(0)
    if stream:
        await exchange.next()
    exchange.leave()
    await asyncio.wait_for(engine.script.closed.wait(), 1)
    await asyncio.wait_for(exchange.task, 1)
    samples = await gateway.samples()
    assert samples['lenvm_aborts_total{reason="disconnect",route="/v1/chat/completions"}'] == 1
    assert samples['lenvm_requests_in_flight{route="/v1/chat/completions"}'] == 0
    assert not [name for name in samples if name.startswith("lenvm_errors_total")]


async def test_disconnect_while_predicting_closes_the_engines_connection(engine, gateway):
    engine.play(60.0)
    exchange = Exchange(gateway.app, "/v1/length/predict", {"model": MODEL, "prompt": "Once"})
    while engine.script is None:
        await asyncio.sleep(0)
    exchange.leave()
    await asyncio.wait_for(engine.script.closed.wait(), 1)
    await asyncio.wait_for(exchange.task, 1)


async def test_client_that_stops_reading_is_given_up(engine):
    engine.play(*[chunk("a")] * 3, 60.0)
    gateway = GatewayClient(engine, client_timeout_s=0.2)
    exchange = gateway.exchange(stream=True)
    exchange.reading.clear()
    await asyncio.wait_for(exchange.task, 2)
    assert engine.script.closed.is_set()
    samples = await gateway.samples()
    assert samples['lenvm_aborts_total{reason="stalled",route="/v1/chat/completions"}'] == 1


async def test_a_stopping_gateway_ends_streams_with_an_error_event(engine, gateway):
    engine.play(chunk("a"), 60.0)
    exchange = gateway.exchange(stream=True)
    await exchange.next()
    await exchange.next()
    exchange.task.cancel()
    last = await exchange.next()
    assert last["body"].startswith(b'data: {"error"')
    assert not last.get("more_body")
    with pytest.raises(asyncio.CancelledError):
        await exchange.task
    assert engine.script.closed.is_set()


async def test_answer_is_byte_identical(engine, gateway):
    raw = b'{"choices": [ ],   "usage": {"prompt_tokens": 1, "completion_tokens": 2}}'
    engine.answer = lambda body: httpx.Response(200, content=raw)
    response = await gateway.chat()
    assert response.content == raw
    assert response.headers["content-type"] == "application/json"


async def test_answer_that_takes_too_long_is_504(engine):
    engine.play(60.0)
    response = await GatewayClient(engine, request_timeout_s=0.1).chat()
    assert response.status_code == 504


async def test_concurrent_streams_do_not_mix(engine: FakeEngine, gateway: GatewayClient):
    def answer(body):
        engine.play(*[chunk(body["messages"][0]["content"], values=[-0.5])] * 20, DONE)
        return engine.answer(body)

    def restore(body):
        response = answer(body)
        engine.answer = restore
        return response

    engine.answer = restore
    texts = [f"stream {i}" for i in range(16)]
    responses = await asyncio.gather(
        *[gateway.chat(stream=True, messages=[{"role": "user", "content": text}]) for text in texts]
    )
    for text, response in zip(texts, responses, strict=True):
        assert response.content == chunk(text, values=[-0.5]) * 20 + DONE


async def test_engine_errors_become_openai_errors(engine, gateway):
    engine.answer = lambda body: json_response(
        {"object": "error", "message": "top_p must be in (0, 1], got 3.", "type": "BadRequest", "code": 400}, 400
    )
    response = await gateway.chat()
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "top_p must be in (0, 1], got 3.",
        "type": "invalid_request_error",
        "param": "top_p",
        "code": "invalid_request",
    }
