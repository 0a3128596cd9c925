"""``/v1/length/values``: what is refused, what the engine gets, what the client gets."""

from __future__ import annotations

import asyncio

import pytest

from fake_engine import MODEL, json_response
from gateway_client import Exchange, GatewayClient
from lenvm_runtime.length_control import ValueQuery

PATH = "/v1/length/values"
M = f'model="{MODEL}"'


def lenvm(num_tokens, candidates=()):
    """What the engine says of one input."""
    return {
        "token_ids": list(range(num_tokens)),
        "values": [-0.5] * num_tokens,
        "remaining": [230.7] * num_tokens,
        "candidates": [{"token_id": token, "value": -0.25, "remaining": 95.8} for token in candidates],
    }


def answer_each(body):
    inputs = body.get("text") or body["input_ids"]
    queries = [ValueQuery.from_custom_params(params["custom_params"]) for params in body["sampling_params"]]
    return json_response(
        [{"text": "x", "lenvm": lenvm(len(one), q.candidate_ids)} for one, q in zip(inputs, queries, strict=True)]
    )


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("model", {"model": None}),
        ("input", {"input": None}),
        ("input", {"input": ""}),
        ("input", {"input": []}),
        ("input", {"input": ["a", [1]]}),
        ("input", {"input": [-1]}),
        ("input", {"input": ["x"] * 1000}),
        ("candidates", {"candidates": []}),
        ("candidates", {"candidates": [1.5]}),
        ("candidates", {"candidates": [[1], []]}),
        ("candidates", {"candidates": [[1], [2]]}),
        ("candidates", {"candidates": [1] * 1025}),
        ("candidates", {"input": ["a", "b"], "candidates": [1, 2]}),
        ("candidates", {"input": ["a", "b"], "candidates": [[1]]}),
        ("temperature", {"temperature": 1}),
        ("stream", {"stream": True}),
    ],
    ids=str,
)
async def test_bad_field_is_400_naming_it(engine, gateway, field, fields):
    response = await gateway.post(PATH, {"model": MODEL, "input": "Once", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert engine.bodies == []


async def test_unknown_model_is_404(gateway):
    assert (await gateway.post(PATH, {"model": "other", "input": "x"})).status_code == 404


async def test_a_text_gets_its_values(engine, gateway):
    engine.answer = answer_each
    response = await gateway.post(PATH, {"model": MODEL, "input": "Once", "user": "someone"})
    described = {name: value for name, value in lenvm(4).items() if name != "candidates"}
    assert response.json() == {
        "object": "list",
        "model": MODEL,
        "data": [{"object": "length.values", "index": 0, **described}],
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    assert engine.paths == ["/generate"]
    sampling = {"max_new_tokens": 1, "temperature": 0, "custom_params": ValueQuery().to_custom_params()}
    assert engine.bodies == [{"text": ["Once"], "sampling_params": [sampling]}]
    assert (await gateway.samples())[f"lenvm_prompt_tokens_total{{{M}}}"] == 4


async def test_a_batch_with_candidates_is_one_engine_request(engine, gateway):
    engine.answer = answer_each
    fields = {"input": [[5, 6, 7], [8]], "candidates": [[1, 2], [3]]}
    response = await gateway.post(PATH, {"model": MODEL, **fields})
    assert [one["index"] for one in response.json()["data"]] == [0, 1]
    assert [[c["token_id"] for c in one["candidates"]] for one in response.json()["data"]] == [[1, 2], [3]]
    assert engine.bodies[0]["input_ids"] == [[5, 6, 7], [8]]
    assert len(engine.bodies) == 1


async def test_one_input_takes_a_flat_list_of_candidates(engine, gateway):
    engine.answer = answer_each
    response = await gateway.post(PATH, {"model": MODEL, "input": [5, 6], "candidates": [9, 4]})
    assert [c["token_id"] for c in response.json()["data"][0]["candidates"]] == [9, 4]


@pytest.mark.parametrize("answer", [{"text": "x"}, [], [{"text": "x"}], [{"lenvm": {"values": []}}]], ids=str)
async def test_answer_without_values_is_502(engine, gateway, answer):
    engine.answer = lambda body: json_response(answer)
    assert (await gateway.post(PATH, {"model": MODEL, "input": "x"})).status_code == 502


async def test_refusal_of_the_engine_is_400_with_its_text(engine, gateway):
    message = "candidates: token id 99999 is not below the vocabulary's size 49152"
    engine.answer = lambda body: json_response({"error": {"message": message}}, 400)
    response = await gateway.post(PATH, {"model": MODEL, "input": "x", "candidates": [99999]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["message"]) == ("candidates", message)


async def test_key_limit_and_engine_faults_hold_here_too(engine):
    client = GatewayClient(engine, api_keys=("secret",))
    assert (await client.post(PATH, {"model": MODEL, "input": "x"})).status_code == 401
    engine.down = True
    response = await client.post(PATH, {"model": MODEL, "input": "x"}, authorization="Bearer secret")
    assert response.status_code == 503
    samples = await client.samples()
    assert samples[f'lenvm_requests_total{{route="{PATH}",status="503"}}'] == 1


async def test_disconnect_closes_the_engines_connection(engine, gateway):
    engine.play(30.0)
    exchange = Exchange(gateway.app, PATH, {"model": MODEL, "input": "Once"})
    while engine.script is None:
        await asyncio.sleep(0)
    exchange.leave()
    await asyncio.wait_for(engine.script.closed.wait(), 1)
    await asyncio.wait_for(exchange.task, 1)


def test_the_wire_form_round_trips():
    query = ValueQuery((3, 4))
    assert ValueQuery.from_custom_params(query.to_custom_params()) == query
    assert ValueQuery.from_custom_params({"lenvm": {"values": True}}) is None
    assert ValueQuery.from_custom_params(None) is None
