"""Every field that the gateway takes has an effect on the real engine: one observable effect a field and route.

``covers`` names the fields that a test shows; the last test compares them with the gateway's allow-lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from lenvm_runtime.serve import Stack
from lenvm_service.fields import (
    CHAT,
    COMPLETION,
    MESSAGE_FIELDS,
    PREDICTION,
    STREAM_OPTIONS,
    TEMPLATE_SWITCHES,
    VALUES,
)

pytestmark = pytest.mark.e2e

CHAT_PATH, COMPLETION_PATH = "chat/completions", "completions"
PREDICTION_PATH, VALUES_PATH = "length/predict", "length/values"
BOTH = (CHAT_PATH, COMPLETION_PATH)

QUESTION = "What is the capital of France?"
ESSAY = "Write a long essay about rivers."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}

covered: set[tuple[str, str]] = set()


def covers(*fields: str, routes: tuple[str, ...] = BOTH) -> Callable[[Any], Any]:
    """The test shows these fields on each of these routes, which it gets as ``route``."""
    covered.update((route, field) for route in routes for field in fields)
    return pytest.mark.parametrize("route", routes)


@dataclass(frozen=True)
class Answer:
    """An answer of either route."""

    body: dict[str, Any]

    @property
    def choice(self) -> dict[str, Any]:
        return self.body["choices"][0]

    @property
    def text(self) -> str:
        choice = self.choice
        return choice["message"]["content"] if "message" in choice else choice["text"]

    @property
    def num_tokens(self) -> int:
        return self.body["usage"]["completion_tokens"]

    @property
    def num_prompt_tokens(self) -> int:
        return self.body["usage"]["prompt_tokens"]

    @property
    def words(self) -> list[str]:
        return re.findall(r"[a-z]+", self.text.lower())


class Api:
    """Requests to the running gateway, greedy and without values unless the fields say otherwise."""

    def __init__(self, url: str, model: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/v1/", timeout=120)
        self.model = model

    def body(self, route: str, question: str, fields: dict[str, Any]) -> dict[str, Any]:
        turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        content = {"messages": [{"role": "user", "content": question}]} if route == CHAT_PATH else {"prompt": turn}
        cap = {} if "max_completion_tokens" in fields else {"max_tokens": 60}
        return {"model": self.model, "temperature": 0, "length_values": False, **cap, **content, **fields}

    def ask(self, route: str, question: str = QUESTION, **fields: Any) -> Answer:
        response = self._http.post(route, json=self.body(route, question, fields))
        assert response.status_code == 200, response.text
        return Answer(response.json())

    def events(self, route: str, question: str = QUESTION, **fields: Any) -> list[str]:
        with self._http.stream("POST", route, json=self.body(route, question, {"stream": True, **fields})) as response:
            return [line.removeprefix("data: ") for line in response.iter_lines() if line]

    def stream(self, route: str, question: str = QUESTION, **fields: Any) -> list[dict[str, Any]]:
        events = self.events(route, question, **fields)
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def refusal(self, route: str, **fields: Any) -> str:
        """The field that a 400 names."""
        response = self._http.post(route, json=self.body(route, QUESTION, fields))
        assert response.status_code == 400, response.text
        return response.json()["error"]["param"]

    def post(self, route: str, **fields: Any) -> dict[str, Any]:
        response = self._http.post(route, json={"model": self.model, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def token_ids(self, text: str) -> list[int]:
        return self.post(VALUES_PATH, input=text)["data"][0]["token_ids"]


@pytest.fixture(scope="module")
def api(stack: Stack, model_name: str) -> Api:
    return Api(stack.gateway_url, model_name)


@covers("model")
def test_model(api: Api, route: str) -> None:
    assert api.ask(route).body["model"] == api.model


@covers("temperature", "top_p", "top_k", "min_p")
def test_sampling(api: Api, route: str) -> None:
    greedy = api.ask(route).text
    hot = [api.ask(route, temperature=2).text for _ in range(2)]
    assert len({greedy, *hot}) == 3
    for narrow in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1}):
        assert api.ask(route, temperature=2, **narrow).text == greedy


@covers("seed")
def test_a_seed_is_refused_by_an_engine_that_cannot_keep_it(api: Api, route: str) -> None:
    assert api.refusal(route, seed=1) == "seed"


@covers("n")
def test_n(api: Api, route: str) -> None:
    answer = api.ask(route, ESSAY, n=3, temperature=2, max_tokens=12)
    assert [choice["index"] for choice in answer.body["choices"]] == [0, 1, 2]
    assert answer.num_tokens == 36


@covers("stop", "max_tokens")
def test_stop_and_cap(api: Api, route: str) -> None:
    assert "capital" in api.ask(route).text
    stopped = api.ask(route, stop=["xyz", "capital"])
    assert "capital" not in stopped.text
    assert stopped.choice["matched_stop"] == "capital"
    capped = api.ask(route, ESSAY, max_tokens=5)
    assert (capped.num_tokens, capped.choice["finish_reason"]) == (5, "length")


@covers("stop_token_ids")
def test_stop_tokens(api: Api, route: str) -> None:
    """With control too; a token that the model does not have is refused, not the engine's end."""
    (token,) = api.token_ids(" capital")
    assert " capital" in api.ask(route).text
    for control in ({}, {"length_control": {"mode": "tilt", "beta": 1}}):
        stopped = api.ask(route, stop_token_ids=[token], **control)
        assert " capital" not in stopped.text
        assert (stopped.choice["finish_reason"], stopped.choice["matched_stop"]) == ("stop", token)
    assert api.refusal(route, stop_token_ids=[49_152], min_tokens=3) == "stop_token_ids"
    assert " capital" in api.ask(route).text


@covers("max_completion_tokens", routes=(CHAT_PATH,))
def test_max_completion_tokens(api: Api, route: str) -> None:
    capped = api.ask(route, ESSAY, max_completion_tokens=5)
    assert (capped.num_tokens, capped.choice["finish_reason"]) == (5, "length")


@covers("min_tokens", "ignore_eos")
def test_min_tokens_and_ignore_eos(api: Api, route: str) -> None:
    assert api.ask(route).num_tokens < 20
    assert api.ask(route, min_tokens=30).num_tokens >= 30
    assert api.ask(route, ignore_eos=True, max_tokens=40).num_tokens == 40


@covers("presence_penalty", "frequency_penalty", "repetition_penalty")
def test_penalties_take_repetitions_away(api: Api, route: str) -> None:
    def share_of_new_words(**fields: Any) -> float:
        words = api.ask(route, ESSAY, **fields).words
        return len(set(words)) / len(words)

    plain = share_of_new_words()
    assert share_of_new_words(presence_penalty=2) > plain
    assert share_of_new_words(frequency_penalty=2) > plain
    assert share_of_new_words(repetition_penalty=1.5) > plain


@covers("logit_bias")
def test_logit_bias_takes_a_token_away(api: Api, route: str) -> None:
    (token,) = api.token_ids(" Paris")
    assert "Paris" in api.ask(route).text
    assert " Paris" not in api.ask(route, logit_bias={str(token): -100}).text
    assert api.ask(route, logit_bias={str(token): 100}, max_tokens=2).text.strip() == "Paris Paris"


@covers("response_format", "regex", "ebnf")
def test_grammars_hold(api: Api, route: str) -> None:
    """With a space, a line break and other scripts, which the vocabulary stores as other letters."""
    braces = {str(token): 100 for token in api.token_ids("{}")}
    assert api.ask(route, logit_bias=braces, max_tokens=4).text.startswith("{}{}")
    assert api.ask(route, logit_bias=braces, max_tokens=4, response_format={"type": "json_object"}).text == "{}"
    city = {"type": "object", "properties": {"city": {"enum": ["New York", "São Paulo"]}}, "required": ["city"]}
    schema = {"name": "city", "schema": {**city, "additionalProperties": False}}
    answer = api.ask(route, response_format={"type": "json_schema", "json_schema": schema})
    assert json.loads(answer.text)["city"] in ("New York", "São Paulo")
    pattern = r"[a-z]{5} [0-9]{3}\n[a-z]{3} é"
    assert re.fullmatch(pattern, api.ask(route, regex=pattern).text)
    assert api.ask(route, ebnf='root ::= ("yes, sir" | "no, sir") "!"').text in ("yes, sir!", "no, sir!")


@pytest.mark.parametrize("route", BOTH)
def test_a_grammar_that_no_answer_ends_is_an_error_of_the_request(api: Api, route: str) -> None:
    """SGLang compiles it, and fails at a token: a stream has begun by then."""
    endless = 'root ::= "a" root'
    assert api.refusal(route, ebnf=endless) == "ebnf"
    *_, last = api.events(route, ebnf=endless)
    assert json.loads(last)["error"]["code"] == 400
    assert "Failed to follow ebnf grammar: parser error: Too many items" in last


@covers("stream", "stream_options", "stream_options.include_usage", "stream_options.continuous_usage_stats")
def test_streams_and_their_usage(api: Api, route: str) -> None:
    plain = api.stream(route, max_tokens=6)
    assert len([chunk for chunk in plain if chunk["choices"]]) > 2
    assert not any(chunk.get("usage") for chunk in plain)

    *_, last = api.stream(route, max_tokens=6, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)

    chunks = api.stream(route, max_tokens=6, stream_options={"continuous_usage_stats": True})
    texts = [
        chunk
        for chunk in chunks
        for choice in chunk["choices"]
        if choice.get("text") or "content" in choice.get("delta", {})
    ]
    counts = [chunk["usage"]["completion_tokens"] for chunk in texts[1:]]  # the first of a chat brings the role alone
    assert counts == sorted(counts)
    assert counts[-1] == 6


@covers("user")
def test_user_is_metadata(api: Api, route: str) -> None:
    assert api.ask(route, user="someone").text == api.ask(route).text


@covers("max_length_hint", "length_control", "length_values")
def test_length_fields(api: Api, route: str) -> None:
    hinted = api.ask(route, ESSAY, max_length_hint=20, max_tokens=200)
    assert hinted.num_tokens < 40
    assert hinted.choice["lenvm"]["applied"] == {"mode": "at_most", "target": 20, "strategy": "natural"}
    longer = api.ask(route, length_control={"mode": "at_least", "target": 30}, max_tokens=200)
    assert longer.num_tokens >= 30
    assert len(api.ask(route, length_values=True).choice["lenvm"]["values"]) == api.ask(route).num_tokens
    assert set(api.ask(route, length_values=False).choice["lenvm"]) == {"applied", "ended"}


@covers("logprobs", "top_logprobs", routes=(CHAT_PATH,))
def test_chat_logprobs(api: Api, route: str) -> None:
    tokens = api.ask(route, logprobs=True, top_logprobs=3, max_tokens=5).choice["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in tokens] == [3] * 5
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0 for token in tokens)
    assert api.ask(route, max_tokens=5).choice["logprobs"] is None
    streamed = [
        token
        for chunk in api.stream(route, logprobs=True, top_logprobs=3, max_tokens=5)
        for choice in chunk["choices"]
        for token in (choice["logprobs"] or {}).get("content", [])
    ]
    assert [token["token"] for token in streamed] == [token["token"] for token in tokens]


@covers("logprobs", "echo", routes=(COMPLETION_PATH,))
def test_completion_logprobs_and_echo(api: Api, route: str) -> None:
    prompt = "The capital of France is"
    answer = api.ask(route, prompt=prompt, logprobs=2, max_tokens=4)
    assert [len(top) for top in answer.choice["logprobs"]["top_logprobs"]] == [2] * 4
    assert "".join(answer.choice["logprobs"]["tokens"]) == answer.text
    assert api.ask(route, prompt=prompt, echo=True, max_tokens=4).text == prompt + answer.text


@covers("prompt", routes=(COMPLETION_PATH,))
def test_prompts(api: Api, route: str) -> None:
    """Texts, token ids and lists of both give the same answers, in order."""
    prompts = ["The capital of France is", "The capital of Italy is"]
    ids = [api.token_ids(prompt) for prompt in prompts]
    alone = [api.ask(route, prompt=prompt, max_tokens=2).text for prompt in prompts]
    assert "Paris" in alone[0]
    assert "Rome" in alone[1]
    assert api.ask(route, prompt=ids[0], max_tokens=2).text == alone[0]
    for several in (prompts, ids):
        choices = api.ask(route, prompt=several, max_tokens=2).body["choices"]
        assert [choice["text"] for choice in choices] == alone


@covers("messages", "message.role", "message.content", routes=(CHAT_PATH,))
def test_messages(api: Api, route: str) -> None:
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    assert "Paris" in api.ask(route, messages=[{"role": "user", "content": parts}]).text
    system = {"role": "system", "content": "x " * 20}
    user = {"role": "user", "content": QUESTION}
    turns = [user, {"role": "assistant", "content": "x " * 20}, user]
    plain = api.ask(route).num_prompt_tokens
    assert api.ask(route, messages=[system, user]).num_prompt_tokens > plain
    assert api.ask(route, messages=turns).num_prompt_tokens > plain + 20


@covers("message.tool_calls", "message.tool_call_id", routes=(CHAT_PATH,))
def test_a_conversation_with_a_tool_call(api: Api, route: str) -> None:
    """The call and its result reach the prompt. The id ties them together and is read by templates with ids only."""
    user = {"role": "user", "content": "Is it cold in Paris?"}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "It is 31 degrees in Paris."}
    answer = api.ask(route, messages=[user, called, result], tools=[WEATHER], max_tokens=8)
    without_call = api.ask(route, messages=[user, {**called, "content": "x", "tool_calls": None}, result], max_tokens=8)
    without_result = api.ask(route, messages=[user, called], tools=[WEATHER], max_tokens=8)
    assert answer.num_prompt_tokens > max(without_call.num_prompt_tokens, without_result.num_prompt_tokens)


def tool_fields(choice: Any, **fields: Any) -> dict[str, Any]:
    return {"tools": [WEATHER], "tool_choice": choice, **fields}


@covers("tools", "tool_choice", "parallel_tool_calls", routes=(CHAT_PATH,))
def test_tools(api: Api, route: str) -> None:
    """A forced call is a whole one and ends by itself; ``tools`` are in the prompt unless tool_choice is none."""
    user = "What is the weather in Paris?"
    for fields in (
        tool_fields("required"),
        tool_fields("required", parallel_tool_calls=False),
        tool_fields(NAMED, parallel_tool_calls=False),
    ):
        choice = api.ask(route, user, **fields).choice
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert "Paris" in json.loads(call["function"]["arguments"])["city"]
        assert (choice["finish_reason"], choice["lenvm"]["ended"]) == ("tool_calls", "natural")
    plain = api.ask(route, user).num_prompt_tokens
    assert api.ask(route, user, **tool_fields("auto")).num_prompt_tokens > plain + 20
    assert api.ask(route, user, **tool_fields("none")).num_prompt_tokens == plain


@covers("parallel_tool_calls", routes=(CHAT_PATH,))
def test_parallel_tool_calls(api: Api, route: str) -> None:
    """Biased towards commas, the model makes calls until it is cut, unless it may make only one."""
    parameters = {**WEATHER["function"]["parameters"], "properties": {"city": {"enum": ["Paris"]}}}
    closed = {"name": "get_weather", "parameters": {**parameters, "additionalProperties": False}}
    tools = [{"type": "function", "function": closed}]
    commas = {token for text in (",", "},", "}},", "}},{") for token in api.token_ids(text)}
    bias = {str(token): 30 for token in commas}
    several = api.ask(route, **tool_fields("required", tools=tools, logit_bias=bias))
    assert several.text.count("get_weather") > 1
    one = api.ask(route, **tool_fields("required", tools=tools, logit_bias=bias, parallel_tool_calls=False))
    assert len(one.choice["message"]["tool_calls"]) == 1


@covers("tools", routes=(CHAT_PATH,))
def test_streamed_tools(api: Api, route: str) -> None:
    chunks = api.stream(route, "What is the weather in Paris?", **tool_fields("required", parallel_tool_calls=False))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    calls = [call["function"] for choice in choices for call in choice["delta"].get("tool_calls") or []]
    assert [call["name"] for call in calls if call.get("name")] == ["get_weather"]
    assert "Paris" in json.loads("".join(call["arguments"] for call in calls))["city"]
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert choices[-1]["lenvm"]["ended"] == "natural"


@covers("messages", "prompt", "tools", "model", "user", routes=(PREDICTION_PATH,))
def test_prediction(api: Api, route: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    plain = api.post(route, messages=messages, user="someone")
    assert plain["model"] == api.model
    assert 1 <= plain["interval"][0] <= plain["expected"] <= plain["interval"][1]
    assert api.post(route, messages=messages, tools=[WEATHER])["prompt_tokens"] > plain["prompt_tokens"]
    assert api.post(route, prompt="The capital of France is")["prompt_tokens"] == 5


@covers("model", "input", "candidates", "user", routes=(VALUES_PATH,))
def test_values(api: Api, route: str) -> None:
    answer = api.post(route, input="The capital of France is", candidates=[2, 100], user="someone")
    assert answer["model"] == api.model
    assert len(answer["data"][0]["values"]) == 5
    end, other = answer["data"][0]["candidates"]
    assert (end["token_id"], end["value"], other["token_id"]) == (2, 0, 100)


@covers("message.name", "message.reasoning_content", routes=(CHAT_PATH,))
def test_message_fields_that_the_template_does_not_read(api: Api, route: str) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "x"},
        {"role": "user", "content": QUESTION},
    ]
    assert api.refusal(route, messages=messages) == "messages[1].reasoning_content"
    named = [{"role": "user", "content": QUESTION, "name": "Ann"}]
    assert api.refusal(route, messages=named) == "messages[0].name"


@covers("chat_template_kwargs", *(f"chat_template_kwargs.{name}" for name in TEMPLATE_SWITCHES), routes=(CHAT_PATH,))
def test_template_switches_that_the_template_does_not_read(api: Api, route: str) -> None:
    for name in TEMPLATE_SWITCHES:
        for value in (True, False):
            assert api.refusal(route, chat_template_kwargs={name: value}) == f"chat_template_kwargs.{name}"


@covers("chat_template_kwargs", routes=(PREDICTION_PATH,))
def test_template_switches_of_a_prediction(stack: Stack, api: Api, route: str) -> None:
    body = {
        "model": api.model,
        "messages": [{"role": "user", "content": "Hi"}],
        "chat_template_kwargs": {"thinking": True},
    }
    response = httpx.post(f"{stack.gateway_url}/v1/{route}", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs.thinking")


def test_every_field_of_the_allow_lists_is_covered() -> None:
    allowed = {
        CHAT_PATH: {
            *CHAT,
            *(f"message.{name}" for name in MESSAGE_FIELDS),
            *(f"chat_template_kwargs.{name}" for name in TEMPLATE_SWITCHES),
            *(f"stream_options.{name}" for name in STREAM_OPTIONS),
        },
        COMPLETION_PATH: {*COMPLETION, *(f"stream_options.{name}" for name in STREAM_OPTIONS)},
        PREDICTION_PATH: {*PREDICTION},
        VALUES_PATH: {*VALUES},
    }
    assert covered == {(route, field) for route, fields in allowed.items() for field in fields}
