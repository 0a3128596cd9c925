"""What an odd engine, an odd client or a readiness probe must not do to others."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from fake_engine import MODEL, FakeEngine, answer_events, json_response
from gateway_client import GatewayClient

GENERATION = ("/v1/completions", "/v1/chat/completions")


class SlowHealth(FakeEngine):
    """An engine whose health check takes ``delay_s``, as a busy SGLang's does."""

    delay_s = 0.0
    num_checks = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            self.num_checks += 1
            await asyncio.sleep(self.delay_s)
        return await super().handle_async_request(request)


async def test_requests_do_not_wait_for_readiness_probes():
    engine = SlowHealth()
    gateway = GatewayClient(engine, ready_timeout_s=0.5)
    assert (await gateway.chat()).status_code == 200
    engine.delay_s, engine.num_checks = 60.0, 0
    probes = [asyncio.create_task(gateway.http.get("/ready")) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert (await asyncio.wait_for(gateway.chat(), 0.3)).status_code == 200
    assert {(await probe).status_code for probe in probes} == {503}
    assert engine.num_checks == 1
    assert (await gateway.samples())["lenvm_engine_up"] == 0
    assert (await asyncio.wait_for(gateway.chat(), 0.3)).status_code == 200
    engine.delay_s = 0.0
    assert (await gateway.http.get("/ready")).status_code == 200
    assert (await gateway.samples())["lenvm_engine_up"] == 1


async def test_a_probe_whose_caller_left_serves_the_others():
    engine = SlowHealth()
    engine.delay_s = 0.2
    gateway = GatewayClient(engine)
    first, second = (asyncio.create_task(gateway.http.get("/ready")) for _ in range(2))
    await asyncio.sleep(0.05)
    first.cancel()
    assert (await second).status_code == 200
    assert engine.num_checks == 1


@pytest.mark.parametrize(("depth", "status"), [(50, 200), (70, 400), (400, 400), (900, 400)])
async def test_bodies_may_be_nested_64_deep(gateway, depth, status):
    schema = b'{"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": %s}}}'
    body = b'{"model": "smol/model", "prompt": "x", "response_format": ' + schema % (b"[" * depth + b"]" * depth) + b"}"
    response = await gateway.post("/v1/completions", body)
    assert response.status_code == status
    assert status == 200 or "nested" in response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["x/pause_generation?", "x/flush_cache#", "x/generate?"])
@pytest.mark.parametrize("path", GENERATION)
async def test_the_host_header_does_not_choose_the_engines_route(engine, gateway, host, path):
    body = {
        "model": MODEL,
        **({"prompt": "x"} if path == GENERATION[0] else {"messages": [{"role": "user", "content": "x"}]}),
    }
    await gateway.post(path, body, host=host)
    assert set(engine.paths) <= {path}


USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"name": "x", "schema": {}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{**USER, "name": [1]}]}, "messages[0].name"),
        ({"messages": [{**USER, "tool_calls": "f"}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]},
            "messages[0].content[0].cache_control",
        ),
        ({"tools": [{**TOOL, "zzz": 1}]}, "tools[0].zzz"),
        ({"tools": [{"type": "function", "function": {"name": "f", "zzz": 1}}]}, "tools[0].function.zzz"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**SCHEMA, "zzz": 1}}},
            "response_format.json_schema.zzz",
        ),
    ],
)
async def test_nested_fields_that_nobody_reads_are_400(gateway, fields, param):
    response = await gateway.chat(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_client_that_never_reads_the_end_did_not_get_the_answer(engine):
    engine.play(b"".join(answer_events()))
    gateway = GatewayClient(engine, client_timeout_s=0.1)
    exchange = gateway.exchange(stream=True)
    exchange.reading.clear()
    await asyncio.wait_for(exchange.task, 5)
    samples = await gateway.samples()
    assert samples['lenvm_aborts_total{reason="stalled",route="/v1/chat/completions"}'] == 1
    assert not [name for name in samples if name.startswith("lenvm_e2e") and samples[name]]


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"{}", b'{"choices": null}', b'{"choices": [{}]}'])
@pytest.mark.parametrize("path", ["/v1/length/predict", "/v1/length/values", "/v1/chat/completions"])
async def test_answers_that_are_none_are_502(engine, gateway, path, content):
    engine.answer = lambda _: httpx.Response(200, content=content)
    key = {"/v1/length/values": {"input": "x"}, "/v1/length/predict": {"prompt": "x"}}.get(path, {"messages": [USER]})
    assert (await gateway.post(path, {"model": MODEL, **key})).status_code == 502


async def test_an_overloaded_engine_says_when_to_come_back(engine):
    gateway = GatewayClient(engine, retry_after_s=7)
    engine.answer = lambda _: json_response({"error": {"message": "queue full"}}, 429)
    response = await gateway.chat()
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")


async def test_predictions_count_their_prompt_tokens(gateway):
    await gateway.post("/v1/length/predict", {"model": MODEL, "prompt": "x"})
    assert (await gateway.samples())[f'lenvm_prompt_tokens_total{{model="{MODEL}"}}'] == 7


async def test_an_absurd_content_length_is_413(gateway):
    response = await gateway.post("/v1/completions", b"{}", **{"content-length": "9" * 5000})
    assert response.status_code == 413
