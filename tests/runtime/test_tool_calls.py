"""SGLang's schema of forced tool calls, closed, as llguidance reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice  # noqa: E402
from sglang.srt.function_call.function_call_parser import FunctionCallParser  # noqa: E402

from lenvm_runtime.tool_calls import _close_constraint, close_calls  # noqa: E402
from lenvm_service.validation import STRICT_PARSERS  # noqa: E402

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    Tool(type="function", function={"name": name, "parameters": parameters})
    for name, parameters in (("get_weather", PARAMETERS), ("get_time", None))
]
WEATHER = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
TIME = '{"name": "get_time", "parameters": {}}'
NAMED = ToolChoice(type="function", function={"name": "get_weather"})


def constraint(choice: Any, parallel: bool = True) -> Any:
    return FunctionCallParser(TOOLS, "pythonic").get_structure_constraint(choice, parallel_tool_calls=parallel)


def holds(schema: dict[str, Any], text: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(schema))
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("choice", "parallel", "text", "expected"),
    [
        ("required", True, f"[{WEATHER}]", True),
        ("required", True, f"[{TIME}, {WEATHER}]", True),
        ("required", False, f"[{TIME}]", True),
        ("required", False, f"[{TIME}, {WEATHER}]", False),
        ("required", True, "[]", False),
        ("required", True, f'[{WEATHER[:-1]}, "description": "x"}}]', False),
        (NAMED, True, f"[{WEATHER}]", True),
        (NAMED, True, f"[{TIME}]", False),
        (NAMED, True, "[false]", False),
        (NAMED, True, f'[{WEATHER[:-1]}, "description": "x"}}]', False),
    ],
)
def test_only_calls_are_accepted(choice: Any, parallel: bool, text: str, expected: bool) -> None:
    kind, schema = constraint(choice, parallel)
    assert kind == "json_schema"
    assert holds(close_calls(schema), text) == expected


def test_other_constraints_stay_as_they_are() -> None:
    assert _close_constraint(None, SimpleNamespace()) is None
    assert _close_constraint(("structural_tag", object()), SimpleNamespace()) is None
    assert _close_constraint(constraint("auto"), SimpleNamespace()) is None


def test_the_gateway_knows_which_parsers_hold_strict_tools_to_their_schema() -> None:
    strict = Tool(type="function", function={"name": "get_weather", "parameters": PARAMETERS, "strict": True})
    found = {
        name
        for name in FunctionCallParser.ToolCallParserEnum
        if FunctionCallParser([strict], name).get_structure_constraint("auto") is not None
    }
    assert found == STRICT_PARSERS
