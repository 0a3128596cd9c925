"""Keys, limits, readiness, routes and engine faults: one status each, OpenAI's error form always."""

from __future__ import annotations

import asyncio

import httpx
import orjson
import pytest

from fake_engine import MODEL, FakeEngine, chunk, json_response
from gateway_client import Exchange, GatewayClient, chat_body


def assert_error(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


@pytest.mark.parametrize(
    ("authorization", "status"),
    [("Bearer two", 200), ("bearer one", 200), (None, 401), ("Bearer", 401), ("Bearer on", 401), ("Basic one", 401)],
)
async def test_v1_needs_one_of_the_keys(engine, authorization, status):
    gateway = GatewayClient(engine, api_keys=("one", "two"))
    headers = {"authorization": authorization} if authorization else {}
    response = await gateway.post("/v1/chat/completions", chat_body(), **headers)
    assert response.status_code == status
    if status == 401:
        assert_error(response, 401, "invalid_api_key")
        assert (await gateway.http.get("/v1/models", headers=headers)).status_code == 401
    assert (await gateway.http.get("/health")).status_code == 200


async def test_header_bytes_outside_ascii_are_no_key(engine):
    gateway = GatewayClient(engine, api_keys=("one",))
    response = await gateway.http.get("/v1/models", headers={"authorization": b"Bearer \xff\xe9"})
    assert response.status_code == 401


async def test_body_above_the_limit_is_413(engine):
    gateway = GatewayClient(engine, max_body_bytes=1000)
    response = await gateway.chat(user="x" * 1000)
    assert_error(response, 413, "request_too_large")
    assert engine.bodies == []

    async def unannounced():
        for _ in range(20):
            yield b"x" * 100

    response = await gateway.http.post("/v1/chat/completions", content=unannounced())
    assert_error(response, 413, "request_too_large")


async def test_body_that_does_not_come_is_408(engine):
    gateway = GatewayClient(engine, body_timeout_s=0.05)

    async def stalled():
        yield b"{"
        await asyncio.sleep(60)

    response = await gateway.http.post("/v1/completions", content=stalled())
    assert_error(response, 408, "request_timeout")


async def test_requests_above_the_limit_are_429(engine):
    gateway = GatewayClient(engine, max_concurrency=2, retry_after_s=7)
    engine.play(chunk("a"), 60.0)
    open_ones = [gateway.exchange(stream=True) for _ in range(2)]
    for exchange in open_ones:
        await exchange.next()
    response = await gateway.chat()
    assert_error(response, 429, "rate_limit_exceeded")
    assert response.headers["retry-after"] == "7"
    assert (await gateway.http.get("/v1/models")).status_code == 200
    open_ones[0].leave()
    await open_ones[0].task
    engine.answer = lambda body: json_response({"choices": []})
    assert (await gateway.chat()).status_code == 200
    open_ones[1].leave()
    await open_ones[1].task


async def test_each_key_has_its_own_limit(engine):
    gateway = GatewayClient(engine, api_keys=("one", "two"), max_concurrency_per_key=1)
    engine.play(60.0)
    waiting = asyncio.create_task(gateway.post("/v1/chat/completions", chat_body(), authorization="Bearer one"))
    while engine.script is None:
        await asyncio.sleep(0)
    engine.answer = lambda body: json_response({"choices": []})
    refused = await gateway.post("/v1/chat/completions", chat_body(), authorization="Bearer one")
    assert_error(refused, 429, "rate_limit_exceeded")
    other = await gateway.post("/v1/chat/completions", chat_body(), authorization="Bearer two")
    assert other.status_code == 200
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_slots_come_back_whatever_happens(engine):
    gateway = GatewayClient(engine, max_concurrency=1)
    engine.answer = lambda body: json_response({"message": "no"}, 400)
    for fields in ({"n": 0}, {}, {"model": "x"}):
        assert (await gateway.chat(**fields)).status_code in (400, 404)
    engine.play(httpx.ReadError("reset"))
    assert (await gateway.chat(stream=True)).status_code == 502
    engine.answer = lambda body: json_response({"choices": []})
    assert (await gateway.chat()).status_code == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/chat/completions", "GET", 405),
        ("/health", "POST", 405),
        ("/generate", "POST", 404),
        ("/flush_cache", "POST", 404),
        ("/update_weights_from_disk", "POST", 404),
        ("/v1/embeddings", "POST", 404),
        ("/server_info", "GET", 404),
        ("/page/../app.py", "GET", 404),
        ("/v1/", "GET", 404),
    ],
)
async def test_no_other_route_exists(engine, gateway, path, method, status):
    response = await gateway.http.request(method, path)
    assert_error(response, status, "method_not_allowed" if status == 405 else "not_found")
    assert engine.paths == []


class TestEngine:
    async def test_down_is_503_until_it_is_back(self, engine: FakeEngine, gateway):
        engine.down = True
        for response in (await gateway.chat(), await gateway.http.get("/ready"), await gateway.http.get("/v1/models")):
            assert_error(response, 503, "engine_unavailable")
            assert response.headers["retry-after"] == "2"
        assert (await gateway.http.get("/health")).status_code == 200
        assert (await gateway.samples())["lenvm_engine_up"] == 0
        engine.down = False
        assert (await gateway.http.get("/ready")).json() == {"status": "ready", "model": MODEL}
        assert (await gateway.chat()).status_code == 200
        assert (await gateway.samples())["lenvm_engine_up"] == 1

    async def test_that_goes_away_later_is_503(self, engine: FakeEngine, gateway):
        assert (await gateway.chat()).status_code == 200
        engine.down = True
        assert_error(await gateway.chat(), 503, "engine_unavailable")
        assert_error(await gateway.chat(stream=True), 503, "engine_unavailable")

    async def test_starting_is_not_ready(self, engine: FakeEngine, gateway):
        engine.health_status = 503
        assert_error(await gateway.http.get("/ready"), 503, "engine_unavailable")

    async def test_without_the_plugin_is_not_ready(self, engine: FakeEngine, gateway):
        engine.has_plugin = False
        assert_error(await gateway.http.get("/ready"), 503, "engine_unavailable")
        assert_error(await gateway.chat(max_length_hint=5), 503, "engine_unavailable")

    async def test_is_probed_once_a_start(self, engine: FakeEngine, gateway):
        for _ in range(3):
            assert (await gateway.http.get("/ready")).status_code == 200
            assert (await gateway.chat()).status_code == 200
        assert engine.num_probes == 1
        engine.server_info["startup_time"] = 2.0
        assert (await gateway.http.get("/ready")).status_code == 200
        assert engine.num_probes == 2

    async def test_concurrent_first_requests_ask_once(self, engine: FakeEngine, gateway):
        responses = await asyncio.gather(*[gateway.chat() for _ in range(8)])
        assert {response.status_code for response in responses} == {200}
        assert engine.num_probes == 1

    @pytest.mark.parametrize(
        ("status", "body", "seen", "code"),
        [
            (400, {"object": "error", "message": "bad", "type": "BadRequest", "code": 400}, 400, "invalid_request"),
            (422, {"error": {"message": "bad"}}, 400, "invalid_request"),
            (500, {"message": "Internal server error: secret"}, 502, "engine_failed"),
            (401, {"error": "Unauthorized"}, 502, "engine_failed"),
            (503, {"message": "The request queue is full."}, 503, "engine_unavailable"),
        ],
    )
    @pytest.mark.parametrize("stream", [True, False])
    async def test_faults_are_translated(self, engine: FakeEngine, gateway, stream, status, body, seen, code):
        engine.answer = lambda _: json_response(body, status)
        response = await gateway.chat(stream=stream)
        assert_error(response, seen, code)
        assert "secret" not in response.text

    async def test_answer_that_is_no_json_is_502(self, engine: FakeEngine, gateway):
        engine.answer = lambda _: httpx.Response(200, content=b"<html>")
        assert_error(await gateway.chat(), 502, "engine_broken")
        engine.answer = lambda _: httpx.Response(500, content=b"\xff")
        assert_error(await gateway.chat(), 502, "engine_failed")


async def test_a_fault_of_the_gateway_is_a_plain_500(engine, gateway):
    def fail(_):
        raise RuntimeError("secret")

    engine.answer = fail
    response = await gateway.chat()
    assert_error(response, 500, "internal_error")
    assert "secret" not in response.text
    assert (await gateway.samples())['lenvm_errors_total{kind="internal"}'] == 1


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_Z", True), ("a b", False), ("x" * 65, False), ("", False)])
async def test_every_answer_has_a_request_id(gateway, given, kept):
    for path in ("/health", "/nowhere"):
        seen = (await gateway.http.get(path, headers={"x-request-id": given})).headers["x-request-id"]
        assert (seen == given) == kept
        assert seen


async def test_cors_only_for_configured_origins(engine):
    gateway = GatewayClient(engine, cors_origins=("https://app.example",), api_keys=("one",))
    for origin, allowed in (("https://app.example", True), ("https://other.example", False)):
        response = await gateway.post("/v1/chat/completions", chat_body(), origin=origin)
        assert response.status_code == 401
        assert ("access-control-allow-origin" in response.headers) == allowed


async def test_body_cut_by_a_disconnect_is_an_abort(engine, gateway):
    exchange = Exchange(gateway.app, "/v1/chat/completions", {})
    exchange._to_app.get_nowait()
    exchange._to_app.put_nowait({"type": "http.request", "body": orjson.dumps({})[:1], "more_body": True})
    exchange.leave()
    await asyncio.wait_for(exchange.task, 1)
    samples = await gateway.samples()
    assert samples['lenvm_requests_total{route="/v1/chat/completions",status="499"}'] == 1
