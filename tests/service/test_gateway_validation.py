"""What reaches the engine and what is refused: every 400 names its field, and nothing is accepted and ignored."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_engine import MODEL, FakeEngine, completion, json_response
from gateway_client import GatewayClient, chat_body
from lenvm_runtime.length_control import LengthControl, build_custom_params
from lenvm_service.engine import explain_refusal
from lenvm_service.errors import GatewayError, InvalidRequest
from lenvm_service.fields import CHAT, COMPLETION, PREDICTION, REFUSED, check_fields

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
EQUAL = {"mode": "equal", "target": 100}


def with_schema(**fields):
    return {"type": "json_schema", "json_schema": {**SCHEMA["json_schema"], **fields}}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}

BAD_FIELDS = [
    # field named, fields sent
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": "1"}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.01}),
    ("top_k", {"top_k": 0}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": 1.5}),
    ("min_p", {"min_p": 1.5}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("n", {"n": 33}),
    ("n", {"n": True}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": []}),
    ("stop", {"stop": ["a", 3]}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop", {"stop": "x" * 257}),
    ("stop_token_ids", {"stop_token_ids": []}),
    ("stop_token_ids", {"stop_token_ids": 5}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("stop_token_ids", {"stop_token_ids": [True]}),
    ("stop_token_ids", {"stop_token_ids": [*range(17)]}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": "a"}),
    ("seed", {"seed": 1}),  # the engine would ignore it
    ("max_tokens", {"max_tokens": 0}),
    ("max_completion_tokens", {"max_completion_tokens": 0}),
    ("max_completion_tokens", {"max_completion_tokens": "9"}),
    ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
    ("ignore_eos", {"ignore_eos": 1}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": -2.5}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("logit_bias", {"logit_bias": [1]}),
    ("logit_bias", {"logit_bias": {"word": 1}}),
    ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias.5", {"logit_bias": {"5": 101}}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}),
    ("logprobs", {"logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options", {"stream": True, "stream_options": []}),
    ("stream_options.extra", {"stream": True, "stream_options": {"extra": True}}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
    ("user", {"user": 3}),
    ("regex", {"regex": ""}),
    ("ebnf", {"ebnf": "x" * 65_537}),
    ("regex", {"regex": "a", "ebnf": "root ::= 'a'"}),
    ("regex", {"regex": "a", "response_format": SCHEMA}),
    ("response_format", {"response_format": "json"}),
    ("response_format.type", {"response_format": {"type": "structural_tag"}}),
    ("response_format.schema", {"response_format": {"type": "json_object", "schema": {}}}),
    ("response_format.json_schema.schema", {"response_format": {"type": "json_schema"}}),
    ("response_format.json_schema.name", {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
    ("response_format.json_schema.strict", {"response_format": with_schema(strict=False)}),  # the schema always holds
    ("response_format.json_schema.strict", {"response_format": with_schema(strict="yes")}),
    ("response_format.json_schema.description", {"response_format": with_schema(description="x")}),
    ("response_format", {"response_format": SCHEMA, "tools": [TOOL], "tool_choice": "required"}),
    ("tools", {"tools": []}),
    ("tools[0]", {"tools": [{"type": "retrieval"}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}),
    ("tools[1].function.name", {"tools": [TOOL, TOOL]}),
    ("tools", {"tools": [TOOL]}),  # the engine would not parse the call
    ("tools[0].function.strict", {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": "yes"}}]}),
    ("tool_choice", {"tool_choice": "auto"}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": "always"}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"name": "look_up"}}),
    ("tool_choice.function.name", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}),
    ("parallel_tool_calls", {"tools": [TOOL], "parallel_tool_calls": False}),
    ("parallel_tool_calls", {"parallel_tool_calls": "no"}),
    ("chat_template_kwargs", {"chat_template_kwargs": "x"}),
    ("chat_template_kwargs.chat_template", {"chat_template_kwargs": {"chat_template": "{% for i in range(9) %}"}}),
    ("chat_template_kwargs.enable_thinking", {"chat_template_kwargs": {"enable_thinking": "no"}}),
    ("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": True}}),  # the template does not read it
    ("model", {"model": 3}),
    ("model", {"model": None}),
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "hello"}),
    ("messages[0]", {"messages": ["hello"]}),
    ("messages[0].role", {"messages": [{"role": "function", "content": "x"}]}),
    ("messages[0].role", {"messages": [{"role": ["user"], "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "assistant"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
    ("messages[0].name", {"messages": [{"role": "system", "content": "x", "name": "n"}]}),
    ("messages[0].reasoning_content", {"messages": [{"role": "user", "content": "x", "reasoning_content": "r"}]}),
    ("messages[0].tools", {"messages": [{"role": "system", "content": "x", "tools": [TOOL]}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["x"]}]}),
    ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}),
    ("messages[0].content[0].image_url.url", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("messages[0].content[0].image_url.url", {"messages": [{"role": "user", "content": [IMAGE]}]}),
    (
        "messages[0].content[0].image_url.detail",
        {"messages": [{"role": "user", "content": [{**IMAGE, "image_url": {**IMAGE["image_url"], "detail": "low"}}]}]},
    ),
    ("max_length_hint", {"max_length_hint": 0}),
    ("max_length_hint", {"max_length_hint": "200"}),
    ("max_length_hint", {"max_length_hint": True}),
    ("max_length_hint", {"max_length_hint": 5, "length_control": EQUAL}),
    ("length_control", {"length_control": 5}),
    ("length_control.mode", {"length_control": {"mode": "about", "target": 5}}),
    ("length_control.mode", {"length_control": {"target": 5}}),
    ("length_control.target", {"length_control": {"mode": "equal"}}),
    ("length_control.target", {"length_control": {"mode": "equal", "target": 2.5}}),
    ("length_control.beta", {"length_control": {"mode": "equal", "target": 5, "beta": 1}}),
    ("length_control.beta", {"length_control": {"mode": "tilt"}}),
    ("length_control.factor", {"length_control": {"mode": "scale", "factor": 0}}),
    ("length_control.target", {"length_control": {"mode": "target_mean"}}),
    ("length_control.factor", {"length_control": {"mode": "target_mean", "target": 5, "factor": 2}}),
    ("length_control.scaling", {"length_control": {"mode": "target_mean", "factor": 2, "scaling": "square"}}),
    ("length_control.entropy_threshold", {"length_control": {**EQUAL, "entropy_threshold": -0.5}}),
    ("length_control.entropy_threshold", {"length_control": {**EQUAL, "entropy_threshold": "low"}}),
    ("length_control.min_value", {"length_control": {**EQUAL, "min_value": -1}}),
    ("length_control.min_value", {"length_control": {**EQUAL, "min_value": 0.1}}),
    ("length_control.max_mean_value", {"length_control": {**EQUAL, "max_mean_value": -1}}),
    ("length_control.max_mean_value", {"length_control": {**EQUAL, "max_mean_value": 0.1}}),
    ("length_control.target", {"max_tokens": 9, "length_control": {"mode": "target_mean", "target": 10}}),
    ("length_control.speed", {"length_control": {"mode": "equal", "target": 5, "speed": 1}}),
    ("length_values", {"length_values": "yes"}),
    ("ignore_eos", {"ignore_eos": True, "max_length_hint": 50}),
    ("ignore_eos", {"ignore_eos": True, "length_control": {"mode": "tilt", "beta": 2}}),
    ("min_tokens", {"min_tokens": 51, "max_length_hint": 50}),
    ("min_tokens", {"min_tokens": 101, "length_control": EQUAL}),
    ("length_control.target", {"max_tokens": 99, "length_control": EQUAL}),
    ("length_control.target", {"max_tokens": 9, "length_control": {"mode": "at_least", "target": 10}}),
    *((name, {name: "x"}) for name in REFUSED),
    ("lenvm", {"lenvm": {}}),
    ("prompt", {"prompt": "x"}),
    ("echo", {"echo": True}),
    ("wrong", {"wrong": None}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_FIELDS, ids=[str(case)[:70] for case in BAD_FIELDS])
async def test_bad_chat_field_is_400_naming_it(engine, gateway, field, fields):
    response = await gateway.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]
    assert engine.bodies == []


BAD_COMPLETIONS = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [""]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [2**31]}),
    ("prompt", {"prompt": [1, "a"]}),
    ("prompt", {"prompt": ["a", [1]]}),
    ("prompt", {"prompt": ["a"] * 33}),
    ("n", {"prompt": ["a"] * 3, "n": 11}),
    ("logprobs", {"logprobs": True}),
    ("echo", {"echo": True, "logprobs": 0}),
    ("messages", {"messages": []}),
    ("tools", {"tools": [TOOL]}),
    ("max_completion_tokens", {"max_completion_tokens": 5}),
    ("max_tokens", {"max_length_hint": 10}),
    ("max_tokens", {"length_control": {"mode": "tilt", "beta": -1}}),
    ("min_tokens", {"min_tokens": 17}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_COMPLETIONS, ids=[str(case)[:70] for case in BAD_COMPLETIONS])
async def test_bad_completion_field_is_400_naming_it(engine, gateway, field, fields):
    response = await gateway.complete(**fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert engine.bodies == []


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "n": 32, "stop": ["a", "b"]},
        {"stop_token_ids": [*range(16)]},
        {"max_completion_tokens": 7, "max_tokens": 7, "min_tokens": 7, "presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {"0": -100, "49151": 100.0}, "repetition_penalty": 2, "logprobs": True, "top_logprobs": 20},
        {"response_format": SCHEMA},
        {"response_format": with_schema(strict=True)},
        {"messages": [{"role": "user", "content": "x", "name": "Ann"}]},
        {"response_format": {"type": "text"}, "regex": "a+"},
        {"stream": False, "ignore_eos": True, "min_tokens": 3},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"tools": [TOOL], "tool_choice": "none"},
        {
            "messages": [
                {"role": "system", "content": "x"},
                {"role": "user", "content": [{"type": "text", "text": "y"}]},
            ]
        },
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "refusal": None}]},
    ],
)
async def test_good_fields_reach_the_engine_as_they_are(engine, gateway, fields):
    assert (await gateway.chat(**fields)).status_code == 200
    sent = engine.bodies[0]
    assert sent.pop("custom_params") == build_custom_params(None, values=True)
    assert sent == chat_body(**fields)


@pytest.mark.parametrize(
    ("fields", "control", "values"),
    [
        ({}, None, True),
        ({"length_values": False, "max_length_hint": None}, None, False),
        ({"max_length_hint": 200}, LengthControl("at_most", target=200), True),
        ({"max_length_hint": 200, "max_tokens": 20, "min_tokens": 20}, LengthControl("at_most", target=200), True),
        (
            {"length_control": {**EQUAL, "strategy": "hard"}, "max_tokens": 100, "n": 2, "stop": "x"},
            LengthControl("equal", target=100, strategy="hard"),
            True,
        ),
        ({"length_control": {"mode": "tilt", "beta": 0}, "ignore_eos": True}, LengthControl("tilt", beta=0.0), True),
        (
            {"length_control": {"mode": "tilt", "beta": 2, "max_mean_value": -0.2}},
            LengthControl("tilt", beta=2.0, max_mean_value=-0.2),
            True,
        ),
        (
            {"length_control": {"mode": "target_mean", "factor": 0.5, "entropy_threshold": 0.2, "min_value": -0.5}},
            LengthControl("target_mean", factor=0.5, scaling="length", entropy_threshold=0.2, min_value=-0.5),
            True,
        ),
    ],
)
async def test_control_reaches_the_engine_in_custom_params_only(engine, gateway, fields, control, values):
    assert (await gateway.chat(**fields, user="someone")).status_code == 200
    sent = engine.bodies[0]
    assert sent["custom_params"] == build_custom_params(control, values)
    assert not {"max_length_hint", "length_control", "length_values", "user"} & set(sent)


async def test_completions_reach_the_engine(engine, gateway):
    fields = {"prompt": [[1, 2], [3]], "echo": True, "max_tokens": 300, "length_control": EQUAL}
    assert (await gateway.complete(**fields)).status_code == 200
    assert engine.paths == ["/v1/completions"]
    assert engine.bodies[0]["prompt"] == [[1, 2], [3]]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"3", b"\xff", b'{"a": NaN}'],
    ids=["empty", "cut", "list", "text", "3", "latin", "nan"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/length/predict"])
async def test_body_that_is_no_json_object_is_400(gateway, path, body):
    response = await gateway.post(path, body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


@given(name=st.text(min_size=1), value=st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()))
def test_no_field_passes_that_is_not_listed(name, value):
    for known in (CHAT, COMPLETION, PREDICTION):
        if name not in known and not (name in REFUSED and value is None):
            with pytest.raises(GatewayError):
                check_fields(known, {name: value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted({*CHAT, *COMPLETION})), value=JSON)
def test_a_check_refuses_or_accepts_but_never_breaks(name, value):
    for known in (CHAT, COMPLETION):
        with contextlib.suppress(InvalidRequest):
            check_fields(known, {name: value})


async def test_unknown_model_is_404(engine, gateway):
    for response in (
        await gateway.chat(model="other"),
        await gateway.chat(model=f"{MODEL}:adapter"),
        await gateway.http.get("/v1/models/other"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
    assert engine.bodies == []


async def test_alias_is_served_under_the_models_own_id(engine):
    gateway = GatewayClient(engine, model_alias="default")
    assert (await gateway.chat(model="default")).status_code == 200
    assert engine.bodies[0]["model"] == MODEL
    models = (await gateway.http.get("/v1/models")).json()
    assert [card["id"] for card in models["data"]] == [MODEL, "default"]
    assert (await gateway.http.get("/v1/models/default")).json()["parent"] == MODEL
    assert (await gateway.http.get(f"/v1/models/{MODEL}")).json()["max_model_len"] == 2048


async def test_what_the_engine_can_do_is_allowed(engine: FakeEngine, gateway):
    engine.server_info.update(enable_deterministic_inference=True, tool_call_parser="qwen25")
    engine.has_images = True
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    fields["messages"] = [{"role": "user", "content": [IMAGE]}]
    assert (await gateway.chat(**fields)).status_code == 200


async def test_min_p_is_refused_where_seeds_are_kept(engine: FakeEngine, gateway):
    """SGLang's scheduler would stop at an assertion."""
    assert (await gateway.chat(min_p=0.1)).status_code == 200
    engine.server_info.update(enable_deterministic_inference=True)
    seeded = GatewayClient(engine)
    assert (await seeded.chat(min_p=0.1)).json()["error"]["param"] == "min_p"
    assert (await seeded.chat(min_p=0, seed=1)).status_code == 200


@pytest.mark.parametrize(
    ("parser", "choice", "accepted"),
    [("pythonic", "auto", False), ("pythonic", "required", True), ("qwen25", "auto", True), ("pythonic", "none", True)],
)
async def test_strict_tools_need_a_parser_or_a_forced_call(engine: FakeEngine, gateway, parser, choice, accepted):
    engine.server_info["tool_call_parser"] = parser
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    response = await gateway.chat(tools=[strict], tool_choice=choice)
    assert response.status_code == (200 if accepted else 400)
    if not accepted:
        assert response.json()["error"]["param"] == "tools[0].function.strict"


PARTS = {
    "chat_template_kwargs.thinking": {"chat_template_kwargs": {"thinking": False}},
    "user.name": {"messages": [{"role": "user", "content": "x", "name": "n"}]},
    "tool.name": {"messages": [{"role": "tool", "content": "x", "name": "n"}]},
    "reasoning_content": {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "r"}]},
}


@pytest.mark.parametrize("part", PARTS)
async def test_what_the_chat_template_reads_is_taken(engine: FakeEngine, part):
    for read, status in (set(), 400), ({part}, 200):
        engine.read_parts = read
        assert (await GatewayClient(engine).chat(**PARTS[part])).status_code == status


async def test_the_template_is_asked_once_an_engine(engine: FakeEngine, gateway):
    await gateway.chat()
    asked = engine.num_rendered
    assert asked > 0
    await gateway.http.get("/ready")
    await gateway.chat()
    assert engine.num_rendered == asked
    engine.server_info["startup_time"] = 2.0
    await gateway.http.get("/ready")
    assert engine.num_rendered == 2 * asked


async def test_a_template_without_a_role_reads_nothing_of_it(engine: FakeEngine, gateway):
    engine.refused_roles = {"tool", "developer"}
    engine.read_parts = {"tool.name", "user.name"}
    assert (await gateway.chat(**PARTS["user.name"])).status_code == 200
    assert (await gateway.chat(**PARTS["tool.name"])).status_code == 400


@pytest.mark.parametrize("url", ["/etc/passwd.png", "file:///etc/passwd", "AAAA", "http://10.0.0.1/x.png"])
async def test_image_urls_that_the_engine_would_open_are_refused(engine: FakeEngine, url):
    engine.has_images = True
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    assert (await GatewayClient(engine).chat(messages=messages)).status_code == 400
    remote = await GatewayClient(engine, allow_remote_media=True).chat(messages=messages)
    assert remote.status_code == (200 if url.startswith("http") else 400)


class TestPrediction:
    async def test_answers_with_the_prompts_prediction(self, engine, gateway):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}
        engine.server_info["tool_call_parser"] = "qwen25"
        response = await gateway.post("/v1/length/predict", body)
        assert response.json() == {
            "object": "length.prediction",
            "model": MODEL,
            "prompt_tokens": 7,
            "expected": 3.0,
            "interval": [2.0, 9.0],
        }
        assert engine.paths == ["/v1/chat/completions"]
        assert engine.bodies[0]["max_completion_tokens"] == 1
        assert engine.bodies[0]["custom_params"] == build_custom_params(None, values=True)

    async def test_takes_a_plain_prompt(self, engine, gateway):
        response = await gateway.post("/v1/length/predict", {"model": MODEL, "prompt": [1, 2]})
        assert response.status_code == 200
        assert engine.paths == ["/v1/completions"]

    @pytest.mark.parametrize(
        ("field", "body"),
        [
            ("model", {"prompt": "x"}),
            ("messages", {"model": MODEL}),
            ("messages", {"model": MODEL, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
            ("prompt", {"model": MODEL, "prompt": ["x", "y"]}),
            ("prompt", {"model": MODEL, "prompt": "x", "tools": [TOOL]}),
            ("temperature", {"model": MODEL, "prompt": "x", "temperature": 1}),
        ],
    )
    async def test_bad_field_is_400_naming_it(self, gateway, field, body):
        response = await gateway.post("/v1/length/predict", body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)

    async def test_answer_without_prediction_is_502(self, engine, gateway):
        engine.answer = lambda body: json_response(completion(prediction=None))
        response = await gateway.post("/v1/length/predict", {"model": MODEL, "prompt": "x"})
        assert response.status_code == 502


@pytest.mark.parametrize(
    ("message", "field", "text"),
    [
        ("top_p must be in (0, 1], got 3.", "top_p", "top_p must be in (0, 1], got 3."),
        ("The input (9 tokens) is longer", None, "The input (9 tokens) is longer"),
        ('1 error\n\n  File "/a/path.py", line 3', None, "1 error"),
        ("Failed to compile regex grammar: not closed.\n", "regex", "Failed to compile regex grammar: not closed."),
        ("Failed to compile json grammar: banana", "response_format", "Failed to compile json grammar: banana"),
        ("Failed to follow ebnf grammar: Too many items", "ebnf", "Failed to follow ebnf grammar: Too many items"),
        (
            "1 validation error:\n  {'type': 'x', 'loc': ('body', 'messages', 0, 'content'), "
            "'msg': 'Input should be a string', 'input': 3}\n [{'type': ...",
            "messages[0].content",
            "messages[0].content: Input should be a string",
        ),
        (
            "[{'type': 'x', 'loc': ('body', 'n'), 'msg': \"isn't right\", 'input': 3}]",
            "n",
            "n: isn't right",
        ),
    ],
)
def test_the_engines_refusals_are_explained(message, field, text):
    assert explain_refusal(message) == (field, text)


@pytest.mark.parametrize(
    ("path", "input_field", "cap_field"),
    [
        ("/v1/chat/completions", "messages", "max_completion_tokens"),
        ("/v1/completions", "prompt", "max_tokens"),
        ("/generate", "input", None),
    ],
)
def test_what_does_not_fit_the_context_is_named(path, input_field, cap_field):
    text = "Input length (8191 tokens) exceeds the maximum allowed length (8186 tokens)."
    advice = " Use a shorter input or enable --allow-auto-truncate."
    assert explain_refusal(text + advice, path) == (input_field, text)
    text = "The input (9031 tokens) is longer than the model's context length (8192 tokens)."
    assert explain_refusal(text, path) == (input_field, text)
    text = "Requested token count exceeds the model's maximum context length of 8192 tokens."
    assert explain_refusal(text, path) == (cap_field, text)


@pytest.mark.parametrize("mode", ["equal", "at_least", "at_most", "target_mean"])
async def test_a_target_beyond_the_context_is_refused_unless_it_is_a_bound(gateway, mode):
    response = await gateway.chat(length_control={"mode": mode, "target": 2048})
    if mode == "at_most":
        assert response.status_code == 200
    else:
        assert response.json()["error"]["param"] == "length_control.target"
        assert (await gateway.chat(length_control={"mode": mode, "target": 2047})).status_code == 200


async def test_a_null_in_length_control_is_no_field(gateway):
    control = {**EQUAL, "strategy": None, "entropy_threshold": None, "min_value": None, "beta": None}
    assert (await gateway.chat(length_control=control)).status_code == 200
