"""The public API through the public client, against the real engine."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import openai
import pytest

from engine_load import wait_until_idle
from lenvm_runtime.serve import Stack

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ESSAY = [{"role": "user", "content": "Write a long essay about rivers."}]


def test_completion_is_not_streamed(client: openai.OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name, messages=QUESTION, temperature=0, max_completion_tokens=40, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert "Paris" in choice.message.content
    lenvm = choice.model_extra["lenvm"]
    assert len(lenvm["values"]) == answer.usage.completion_tokens
    assert lenvm["ended"] == "natural"
    assert lenvm["applied"] is None
    assert len(choice.logprobs.content[0].top_logprobs) == 3


def test_stream_has_one_terminal_event(stack: Stack, model_name: str) -> None:
    body = {"model": model_name, "messages": QUESTION, "temperature": 0, "stream": True, "max_completion_tokens": 20}
    with httpx.stream("POST", f"{stack.gateway_url}/v1/chat/completions", json=body, timeout=60) as response:
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert sum(event == "data: [DONE]" for event in events) == 1
    assert sum('"finish_reason":"' in event for event in events) == 1


def test_values_can_be_left_out(client: openai.OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name, messages=QUESTION, temperature=0, extra_body={"length_values": False}
    )
    assert set(answer.choices[0].model_extra["lenvm"]) == {"applied", "ended"}


def test_two_choices(client: openai.OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name, messages=QUESTION, n=2, temperature=1, max_completion_tokens=20
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    total = sum(len(choice.model_extra["lenvm"]["values"]) for choice in answer.choices)
    assert total == answer.usage.completion_tokens


def test_two_streamed_choices(client: openai.OpenAI, model_name: str) -> None:
    counts, ended = {0: 0, 1: 0}, {}
    stream = client.chat.completions.create(
        model=model_name, messages=QUESTION, n=2, temperature=1, max_completion_tokens=20, stream=True
    )
    for chunk in stream:
        for choice in chunk.choices:
            lenvm = (choice.model_extra or {}).get("lenvm") or {}
            counts[choice.index] += len(lenvm.get("values", []))
            if "ended" in lenvm:
                ended[choice.index] = lenvm["ended"]
    assert set(ended) == {0, 1}
    assert min(counts.values()) > 0


def test_stop_string_and_cap(client: openai.OpenAI, model_name: str) -> None:
    stopped = client.chat.completions.create(model=model_name, messages=QUESTION, temperature=0, stop=["capital"])
    assert "capital" not in stopped.choices[0].message.content
    assert stopped.choices[0].finish_reason == "stop"
    capped = client.chat.completions.create(model=model_name, messages=ESSAY, temperature=0, max_completion_tokens=5)
    assert capped.choices[0].finish_reason == "length"
    assert capped.choices[0].model_extra["lenvm"]["ended"] == "cap"
    assert capped.usage.completion_tokens == 5


def test_the_cap_does_not_depend_on_the_length_hint(client: openai.OpenAI, model_name: str) -> None:
    answer = client.chat.completions.create(
        model=model_name,
        messages=ESSAY,
        max_completion_tokens=7,
        extra_body={"max_length_hint": 200, "length_values": False},
    )
    assert answer.usage.completion_tokens <= 7


def test_json_schema(client: openai.OpenAI, model_name: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    for extra in ({}, {"max_length_hint": 12}):
        answer = client.chat.completions.create(
            model=model_name,
            messages=QUESTION,
            temperature=0,
            max_completion_tokens=60,
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
            extra_body=extra,
        )
        assert set(json.loads(answer.choices[0].message.content)) == {"city"}


def test_completions_endpoint(client: openai.OpenAI, model_name: str) -> None:
    answer = client.completions.create(model=model_name, prompt="The capital of France is", max_tokens=8, temperature=0)
    assert "Paris" in answer.choices[0].text
    assert len(answer.choices[0].model_extra["lenvm"]["values"]) == 8


def test_length_prediction(stack: Stack, model_name: str) -> None:
    def predict(content: str) -> dict[str, Any]:
        body = {"model": model_name, "messages": [{"role": "user", "content": content}]}
        response = httpx.post(f"{stack.gateway_url}/v1/length/predict", json=body, timeout=60)
        assert response.status_code == 200
        return response.json()

    short, long = (
        predict("What is 2 + 2? Answer with the number only."),
        predict("Write a detailed essay about rivers."),
    )
    assert short["interval"][0] <= short["interval"][1]
    assert short["expected"] < long["expected"]


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"max_length_hint": 0}, "max_length_hint"),
        ({"max_length_hint": "ten"}, "max_length_hint"),
        ({"max_length_hint": 5, "length_control": {"mode": "equal", "target": 5}}, "max_length_hint"),
        ({"length_control": {"mode": "shorter", "target": 5}}, "length_control.mode"),
        ({"length_control": {"mode": "equal"}}, "length_control.target"),
        ({"length_control": {"mode": "tilt"}}, "length_control.beta"),
        ({"length_control": {"mode": "scale", "factor": -1}}, "length_control.factor"),
        ({"length_control": {"mode": "equal", "target": 5, "colour": 1}}, "length_control.colour"),
        ({"length_values": "yes"}, "length_values"),
        ({"custom_params": {}}, "custom_params"),
        ({"custom_logit_processor": "x"}, "custom_logit_processor"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
    ],
)
def test_bad_fields_are_named(client: openai.OpenAI, model_name: str, extra: dict[str, Any], field: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model_name, messages=QUESTION, extra_body=extra)
    assert field in caught.value.body["param"]


@pytest.mark.parametrize("lenvm", [{"mode": "equal"}, {"target": 40}, {"mod": "equal"}, {"candidates": [3]}])
def test_the_engine_itself_refuses_a_malformed_control(stack: Stack, lenvm: dict[str, Any]) -> None:
    custom = {"custom_params": {"lenvm": lenvm}}
    body = {"text": "Hi", "sampling_params": {"max_new_tokens": 4, **custom}}
    assert httpx.post(f"{stack.engine_url}/generate", json=body, timeout=60).status_code == 400
    for stream in (False, True):
        chat = {"model": "x", "messages": QUESTION, "max_tokens": 4, "stream": stream, **custom}
        assert httpx.post(f"{stack.engine_url}/v1/chat/completions", json=chat, timeout=60).status_code == 400
    assert httpx.get(f"{stack.engine_url}/health", timeout=60).status_code == 200


def test_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=QUESTION)


async def test_cancelled_stream_frees_the_engine(
    stack: Stack, async_client: openai.AsyncOpenAI, model_name: str
) -> None:
    stream = await async_client.chat.completions.create(
        model=model_name, messages=ESSAY, stream=True, max_completion_tokens=2000, extra_body={"ignore_eos": True}
    )
    received = 0
    async for _ in stream:
        received += 1
        if received == 5:
            break
    await stream.close()
    wait_until_idle(stack.engine_url)


def test_a_client_that_leaves_before_its_answer_frees_the_engine(stack: Stack, model_name: str) -> None:
    body = {"model": model_name, "messages": ESSAY, "ignore_eos": True, "max_completion_tokens": 4000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{stack.gateway_url}/v1/chat/completions", json=body, timeout=2)
    wait_until_idle(stack.engine_url)


async def test_32_mixed_requests(stack: Stack, async_client: openai.AsyncOpenAI, model_name: str) -> None:
    controls: list[dict[str, Any]] = [
        {},
        {"max_length_hint": 20},
        {"length_control": {"mode": "equal", "target": 40}},
        {"length_control": {"mode": "at_least", "target": 30}},
        {"length_control": {"mode": "tilt", "beta": 20}},
        {"length_control": {"mode": "scale", "factor": 0.5}},
        {"length_control": {"mode": "target_mean", "target": 30}},
        {"length_control": {"mode": "target_mean", "factor": 0.5, "entropy_threshold": 0.3}},
        {"length_control": {"mode": "equal", "target": 25, "strategy": "hard"}},
        {"length_values": False},
    ]

    async def ask(index: int) -> None:
        extra = controls[index % len(controls)]
        temperature = 0 if index % 3 == 0 else 1
        answer = await async_client.chat.completions.create(
            model=model_name,
            messages=[{"role": "user", "content": f"Tell me something about the number {index}."}],
            temperature=temperature,
            top_p=0.95 if index % 2 else 1,
            max_completion_tokens=80,
            extra_body=extra,
        )
        lenvm = answer.choices[0].model_extra["lenvm"]
        assert lenvm["ended"] in ("natural", "cap")
        mode = "at_most" if "max_length_hint" in extra else extra.get("length_control", {}).get("mode")
        assert (lenvm["applied"] or {}).get("mode") == mode
        if mode == "at_least" and lenvm["ended"] == "natural":
            assert answer.usage.completion_tokens >= 30
        if extra.get("length_values", True):
            assert len(lenvm["values"]) == answer.usage.completion_tokens

    await asyncio.gather(*(ask(index) for index in range(32)))
    wait_until_idle(stack.engine_url)


def test_page_and_metrics_are_served(stack: Stack) -> None:
    assert "<html" in httpx.get(f"{stack.gateway_url}/").text
    metrics = httpx.get(f"{stack.gateway_url}/metrics").text
    assert "lenvm_" in metrics


@pytest.mark.parametrize(
    ("route", "fields", "field"),
    [
        ("completions", {"prompt": [99_999_999], "max_tokens": 1}, "prompt"),
        ("completions", {"prompt": [[5, 6], [49_152]], "max_tokens": 1, "stream": True}, "prompt"),
        ("length/values", {"input": [[5, 49_152]]}, "input"),
    ],
)
def test_a_token_that_the_model_does_not_have_is_refused(
    stack: Stack, model_name: str, route: str, fields: dict[str, Any], field: str
) -> None:
    answer = httpx.post(f"{stack.gateway_url}/v1/{route}", json={"model": model_name, **fields}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert httpx.get(f"{stack.gateway_url}/ready", timeout=60).status_code == 200


FILLED = re.compile(r'(\.[^\s"]*){3}|"\.')
"""bread.b.bread.b, or a string of full stops."""
QUESTIONS = ("How is bread made?", "How is soap made?", "How do planes fly?", "What is the sun?")


@pytest.mark.parametrize("mode", ["equal", "at_most"])
def test_text_that_a_schema_holds_open_is_not_filled_with_full_stops(
    client: openai.OpenAI, model_name: str, mode: str
) -> None:
    """At most two of four texts held far beyond the target: what a greedy answer is depends on the CPU's rounding.

    They would be three with `equal` and four with `at_most`, if full stops were hurried where no answer may end.
    """
    properties = {"title": {"type": "string"}, "steps": {"type": "array", "items": {"type": "string"}}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    contents = [
        client.chat.completions.create(
            model=model_name,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_completion_tokens=80,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "recipe", "strict": True, "schema": schema},
            },
            extra_body={"length_control": {"mode": mode, "target": 20}},
        )
        .choices[0]
        .message.content
        for question in QUESTIONS
    ]
    assert sum(FILLED.search(content) is not None for content in contents) <= len(QUESTIONS) // 2, contents
