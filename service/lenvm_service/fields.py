"""The allow-list: which body fields each route takes, and the type and range of each.

A field is listed only where SGLang 0.5.17 honours it. ``REFUSED`` says why well-known others are not.
Ranges are checked here where SGLang would accept and ignore a value, answer 500, or stop its scheduler.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lenvm_runtime.length_control import MAX_STOP_TOKENS

from .errors import InvalidField, UnknownField, UnsupportedField

_IGNORED = "the engine would ignore it"
Check = Callable[[str, Any], None]

MAX_TOKENS = 10_000_000
MAX_TOKEN_ID = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_CANDIDATES = 1024
MAX_GRAMMAR_CHARS = 65_536
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = ("role", "content", "name", "tool_call_id", "tool_calls", "reasoning_content")
TEMPLATE_SWITCHES = ("enable_thinking", "thinking")
STREAM_OPTIONS = ("include_usage", "continuous_usage_stats")


def boolean(field: str, value: Any) -> None:
    """A JSON boolean; strings and numbers are not taken for one."""
    if not isinstance(value, bool):
        raise InvalidField(field, "must be true or false")


def text(field: str, value: Any) -> None:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise InvalidField(field, "must be a string that is not empty")


def mapping(field: str, value: Any) -> None:
    """A JSON object."""
    if not isinstance(value, dict):
        raise InvalidField(field, "must be an object")


def anything(field: str, value: Any) -> None:
    """A field whose check needs the others: see ``validation``."""


def _only(field: str, value: Mapping[str, Any], *known: str) -> None:
    """Raises UnknownField for a key that SGLang would not read."""
    for key in value:
        if key not in known:
            raise UnknownField(f"{field}.{key[:80]}", f"known: {', '.join(known)}")


def integer(low: int, high: int) -> Check:
    """An integer from ``low`` to ``high``."""

    def check(field: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidField(field, f"must be an integer from {low} to {high}")

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A finite number from ``low`` to ``high``; greater than ``low`` with ``above``."""
    range_text = f"greater than {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"

    def check(field: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high or (above and value == low):
            raise InvalidField(field, f"must be a number {range_text}")

    return check


def grammar(field: str, value: Any) -> None:
    """A regex or EBNF grammar."""
    text(field, value)
    if len(value) > MAX_GRAMMAR_CHARS:
        raise InvalidField(field, f"must have at most {MAX_GRAMMAR_CHARS} characters")


def top_k(field: str, value: Any) -> None:
    """-1 (all) or a number of candidates."""
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or 1 <= value <= 2**30):
        raise InvalidField(field, "must be -1 (all) or an integer from 1")


def stop(field: str, value: Any) -> None:
    """One stop string or a list of them."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not 1 <= len(stops) <= MAX_STOPS:
        raise InvalidField(field, f"must be a string or a list of 1 to {MAX_STOPS} strings")
    for one in stops:
        if not isinstance(one, str) or not 1 <= len(one) <= MAX_STOP_CHARS:
            raise InvalidField(field, f"each stop must be a string of 1 to {MAX_STOP_CHARS} characters")


def stop_token_ids(field: str, value: Any) -> None:
    """Token ids that end the answer; the engine refuses one that its model does not have."""
    if not _is_ids(value) or len(value) > MAX_STOP_TOKENS:
        raise InvalidField(field, f"must be 1 to {MAX_STOP_TOKENS} token ids")


def logit_bias(field: str, value: Any) -> None:
    """Token ids as decimal strings -> bias in [-100, 100]."""
    mapping(field, value)
    if len(value) > MAX_BIASES:
        raise InvalidField(field, f"must have at most {MAX_BIASES} entries")
    bias = number(-100, 100)
    for key, one in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise InvalidField(field, f"'{key[:40]}' is not a token id; keys are decimal numbers")
        bias(f"{field}.{key}", one)


def stream_options(field: str, value: Any) -> None:
    """``include_usage`` and SGLang's ``continuous_usage_stats``."""
    mapping(field, value)
    _only(field, value, *STREAM_OPTIONS)
    for key, one in value.items():
        if one is not None:
            boolean(f"{field}.{key}", one)


def chat_template_kwargs(field: str, value: Any) -> None:
    """Thinking switches only: other template variables could replace the template itself."""
    mapping(field, value)
    for key, one in value.items():
        if key not in TEMPLATE_SWITCHES:
            raise UnsupportedField(f"{field}.{key}", f"not settable here; known: {', '.join(TEMPLATE_SWITCHES)}")
        boolean(f"{field}.{key}", one)


def response_format(field: str, value: Any) -> None:
    """``{"type": "text" | "json_object"}`` or ``{"type": "json_schema", "json_schema": {"name", "schema"}}``."""
    mapping(field, value)
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidField(f"{field}.type", "must be one of text, json_object, json_schema")
    for key in value:
        if key != "type" and (key, kind) != ("json_schema", "json_schema"):
            raise UnknownField(f"{field}.{key}", f"is not a field of type '{kind}'")
    if kind == "json_schema":
        schema = value.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise InvalidField(f"{field}.json_schema.schema", "must be an object")
        _json_schema(f"{field}.json_schema", schema)


def _json_schema(field: str, value: Mapping[str, Any]) -> None:
    text(f"{field}.name", value.get("name"))
    if value.get("description") is not None:
        raise UnsupportedField(f"{field}.description", _IGNORED)
    if value.get("strict") not in (None, True):
        raise UnsupportedField(f"{field}.strict", "must be true: the engine always keeps to the schema")
    _only(field, value, "name", "description", "schema", "strict")


def tools(field: str, value: Any) -> None:
    """A list of ``{"type": "function", "function": {"name", ...}}`` with distinct names."""
    if not isinstance(value, list) or not value:
        raise InvalidField(field, "must be a list of tools that is not empty")
    names = set()
    for index, tool in enumerate(value):
        here = f"{field}[{index}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise InvalidField(here, 'must be {"type": "function", "function": {...}}')
        _only(here, tool, "type", "function")
        text(f"{here}.function.name", tool["function"].get("name"))
        _only(f"{here}.function", tool["function"], "name", "description", "parameters", "strict")
        if tool["function"].get("strict") is not None:
            boolean(f"{here}.function.strict", tool["function"]["strict"])
        if tool["function"]["name"] in names:
            raise InvalidField(f"{here}.function.name", "is used twice")
        names.add(tool["function"]["name"])


def tool_choice(field: str, value: Any) -> None:
    """``none``, ``auto``, ``required`` or one named function."""
    if isinstance(value, dict):
        if value.get("type") != "function" or not isinstance(value.get("function"), dict):
            raise InvalidField(field, 'must be {"type": "function", "function": {"name": ...}}')
        text(f"{field}.function.name", value["function"].get("name"))
    elif value not in ("none", "auto", "required"):
        raise InvalidField(field, "must be none, auto, required or a named function")


def messages(field: str, value: Any) -> None:
    """A conversation: roles, content, known message fields. Media parts are checked with the engine's profile."""
    if not isinstance(value, list) or not value:
        raise InvalidField(field, "must be a list of messages that is not empty")
    for index, message in enumerate(value):
        _message(f"{field}[{index}]", message)


def _message(here: str, message: Any) -> None:
    mapping(here, message)
    if message.get("role") not in ROLES:
        raise InvalidField(f"{here}.role", f"must be one of {', '.join(ROLES)}")
    for key, value in message.items():
        if key not in MESSAGE_FIELDS and value is not None:
            raise UnknownField(f"{here}.{key}", f"known message fields: {', '.join(MESSAGE_FIELDS)}")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None and not isinstance(message[key], str):
            raise InvalidField(f"{here}.{key}", "must be a string")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InvalidField(f"{here}.tool_calls", "must be a list of objects")
    content = message.get("content")
    if content is None and not (message["role"] == "assistant" and message.get("tool_calls")):
        raise InvalidField(f"{here}.content", "is required")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _part(f"{here}.content[{index}]", part)
    elif content is not None and not isinstance(content, str):
        raise InvalidField(f"{here}.content", "must be a string or a list of parts")


def _part(here: str, part: Any) -> None:
    mapping(here, part)
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InvalidField(f"{here}.text", "must be a string")
        _only(here, part, "type", "text")
    elif kind == "image_url":
        if not isinstance(part.get("image_url"), dict) or not isinstance(part["image_url"].get("url"), str):
            raise InvalidField(f"{here}.image_url.url", "must be a string")
        _only(here, part, "type", "image_url")
        _only(f"{here}.image_url", part["image_url"], "url", "detail")
        if part["image_url"].get("detail") not in (None, "auto"):
            raise UnsupportedField(f"{here}.image_url.detail", f"must be auto: {_IGNORED}")
    else:
        raise UnsupportedField(f"{here}.type", "must be text or image_url")


def prompt(field: str, value: Any) -> None:
    """A string, a list of token ids, or a list of either."""
    prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not prompts or not all((isinstance(one, str) and one) or _is_ids(one) for one in prompts):
        raise InvalidField(field, "must be text or token ids that are not empty, or a list of those")
    if len({isinstance(one, str) for one in prompts}) > 1:
        raise InvalidField(field, "must not mix text and token ids")


def candidate_ids(field: str, value: Any) -> None:
    """Token ids, or a list of such lists, each of at most MAX_CANDIDATES."""
    lists = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not lists or not all(_is_ids(ids) and len(ids) <= MAX_CANDIDATES for ids in lists):
        raise InvalidField(field, f"must be 1 to {MAX_CANDIDATES} token ids, or a list of such lists")


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= MAX_TOKEN_ID for one in value)
    )


_LENGTH: Mapping[str, Check] = {"max_length_hint": anything, "length_control": anything, "length_values": boolean}

_SAMPLING: Mapping[str, Check] = {
    "model": text,
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": top_k,
    "min_p": number(0, 1),
    "n": integer(1, 128),
    "stop": stop,
    "stop_token_ids": stop_token_ids,
    "seed": integer(-(2**63), 2**63 - 1),
    "max_tokens": integer(1, MAX_TOKENS),
    "min_tokens": integer(0, MAX_TOKENS),
    "ignore_eos": boolean,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0, 2, above=True),
    "logit_bias": logit_bias,
    "response_format": response_format,
    "regex": grammar,
    "ebnf": grammar,
    "stream": boolean,
    "stream_options": stream_options,
    "user": text,
    **_LENGTH,
}

CHAT: Mapping[str, Check] = {
    **_SAMPLING,
    "messages": messages,
    "max_completion_tokens": integer(1, MAX_TOKENS),
    "logprobs": boolean,
    "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
    "tools": tools,
    "tool_choice": tool_choice,
    "parallel_tool_calls": boolean,
    "chat_template_kwargs": chat_template_kwargs,
}

COMPLETION: Mapping[str, Check] = {
    **_SAMPLING,
    "prompt": prompt,
    "logprobs": integer(0, MAX_TOP_LOGPROBS),
    "echo": boolean,
}

PREDICTION: Mapping[str, Check] = {
    "model": text,
    "messages": messages,
    "prompt": prompt,
    "tools": tools,
    "chat_template_kwargs": chat_template_kwargs,
    "user": text,
}

VALUES: Mapping[str, Check] = {
    "model": text,
    "input": prompt,
    "candidates": candidate_ids,
    "user": text,
}

_INTERNAL = "is not open to clients"

REFUSED: Mapping[str, str] = {
    "best_of": _IGNORED,
    "suffix": _IGNORED,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "reasoning_effort": "use chat_template_kwargs.enable_thinking",
    "stop_regex": "a regex can stall the engine; use stop",
    "json_schema": "use response_format",
    "custom_params": "use max_length_hint, length_control and length_values",
    "custom_logit_processor": _INTERNAL,
    "lora_path": _INTERNAL,
    "input_ids": "use prompt on /v1/completions",
    "return_hidden_states": _INTERNAL,
    "session_params": _INTERNAL,
    "rid": _INTERNAL,
    "priority": _INTERNAL,
}


def check_fields(known: Mapping[str, Check], body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without its nulls, once every field is known and has a usable type and range.

    Raises UnknownField, UnsupportedField or InvalidField naming the field.
    """
    given = {name: value for name, value in body.items() if value is not None or name not in {*known, *REFUSED}}
    for name, value in given.items():
        if name in REFUSED:
            raise UnsupportedField(name, REFUSED[name])
        if name not in known:
            raise UnknownField(name[:80], "unknown field")
        known[name](name, value)
    return given
