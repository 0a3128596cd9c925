"""From a client's body to the body that the engine gets. Nothing is accepted and then ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from lenvm_runtime.length_control import LengthControl, LengthControlError, build_custom_params

from .chat_template import unread_parts
from .config import GatewayConfig
from .errors import InvalidField, MalformedBody, ModelNotFound, UnsupportedField
from .fields import CHAT, COMPLETION, PREDICTION, Check, check_fields

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"
MAX_DEPTH = 64
DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, OpenAI's and SGLang's
STRICT_PARSERS = frozenset(
    "apertus2509 deepseekv3 deepseekv31 deepseekv32 deepseekv4 glm47 gpt-oss hermes inkling interns1 kimi_k2 kimi_k3 "
    "llama3 mistral qwen qwen25 qwen3_coder step3p5 trinity".split()
)
"""SGLang's tool-call parsers that hold a ``strict`` tool to its schema without a forced call."""
_DROPPED = ("user", "max_length_hint", "length_control", "length_values")  # never sent to the engine


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """What the running engine serves and can do.

    ``models``: OpenAI model cards, the first is the base model's. ``tool_call_parser``: empty without one.
    ``read_parts``: what the chat template reads, see `chat_template`.
    """

    models: tuple[Mapping[str, Any], ...]
    seeds: bool
    tool_call_parser: str
    images: bool
    read_parts: frozenset[str]

    @property
    def model_id(self) -> str:
        """The served base model's name."""
        return str(self.models[0]["id"])


@dataclass(frozen=True, slots=True)
class Generation:
    """A validated generation request. ``body`` is the client's, without nulls."""

    path: str
    body: Mapping[str, Any]
    control: LengthControl | None

    @property
    def is_stream(self) -> bool:
        """Whether the answer is a stream of events."""
        return bool(self.body.get("stream", False))

    @property
    def wants_usage(self) -> bool:
        """Whether the client asked for the final usage chunk of a stream."""
        return bool(self.body.get("stream_options", {}).get("include_usage"))

    @property
    def max_tokens(self) -> int | None:
        """The hard cap on completion tokens; None: what fits the context."""
        cap = self.body.get("max_completion_tokens", self.body.get("max_tokens"))
        return DEFAULT_COMPLETION_TOKENS if cap is None and self.path == COMPLETION_PATH else cap

    def engine_body(self, profile: EngineProfile) -> bytes:
        """The JSON that SGLang gets: the served model's id, the control in ``custom_params``, usage always on."""
        body = {name: value for name, value in self.body.items() if name not in _DROPPED}
        body["model"] = profile.model_id
        body["custom_params"] = build_custom_params(self.control, self.body.get("length_values", True))
        if self.is_stream:
            body["stream_options"] = {**self.body.get("stream_options", {}), "include_usage": True}
        return orjson.dumps(body)


def read_generation(path: str, raw: bytes, config: GatewayConfig) -> Generation:
    """Validate a body of ``/v1/chat/completions`` or ``/v1/completions``, as far as that needs no engine."""
    known, content = (CHAT, "messages") if path == CHAT_PATH else (COMPLETION, "prompt")
    body = read_body(known, raw)
    require(body, "model", content)
    generation = Generation(path, body, _read_control(body))
    _check_limits(generation, config)
    _check_sampling(generation)
    _check_tools(body)
    _check_control(generation)
    return generation


def read_prediction(raw: bytes) -> Generation:
    """Validate a body of ``/v1/length/predict``: the one-token request whose prompt boundary is wanted."""
    body = read_body(PREDICTION, raw)
    require(body, "model")
    if ("messages" in body) == ("prompt" in body):
        raise InvalidField("messages", "give either messages or prompt")
    if "messages" in body:
        return Generation(CHAT_PATH, {**body, "max_completion_tokens": 1}, None)
    if "tools" in body or "chat_template_kwargs" in body:
        raise InvalidField("prompt", "tools and chat_template_kwargs need messages")
    if count_prompts(body) != 1:
        raise InvalidField("prompt", "must be one prompt")
    return Generation(COMPLETION_PATH, {**body, "max_tokens": 1}, None)


def check_profile(generation: Generation, profile: EngineProfile, config: GatewayConfig) -> None:
    """What only the running engine can tell: its model's name and template, seeds, tool calls, images."""
    body = generation.body
    check_model(body["model"], profile, config)
    for field in unread_parts(body, profile.read_parts):
        raise UnsupportedField(field, f"the chat template of model '{profile.model_id}' does not read it")
    _check_seeds(body, profile)
    _check_target_fits(generation, profile)
    if "tools" in body and body.get("tool_choice") != "none":
        _check_tool_parser(body, profile)
    for field, url in _image_urls(body.get("messages", [])):
        if not profile.images:
            raise UnsupportedField(field, f"model '{profile.model_id}' takes no images")
        if not url.startswith("data:") and not (config.allow_remote_media and url.startswith(("http://", "https://"))):
            raise UnsupportedField(field, "must be a data: URL")


def _check_target_fits(generation: Generation, profile: EngineProfile) -> None:
    control, context = generation.control, profile.models[0].get("max_model_len")
    if control is None or control.target is None or control.mode == "at_most" or not context:
        return
    if control.target >= context:
        raise InvalidField("length_control.target", f"must be less than the model's context length of {context} tokens")


def _check_seeds(body: Mapping[str, Any], profile: EngineProfile) -> None:
    if "seed" in body and not profile.seeds:
        raise UnsupportedField("seed", "the engine honours it only when started with --enable-deterministic-inference")
    if body.get("min_p") and profile.seeds:
        raise UnsupportedField("min_p", "the engine cannot combine it with --enable-deterministic-inference")


def _check_tool_parser(body: Mapping[str, Any], profile: EngineProfile) -> None:
    if not profile.tool_call_parser:
        raise UnsupportedField("tools", "the engine parses tool calls only when started with --tool-call-parser")
    if _forces_tool(body) or profile.tool_call_parser in STRICT_PARSERS:
        return
    for index, tool in enumerate(body["tools"]):
        if tool["function"].get("strict"):
            reason = f"true is honoured only where tool_choice forces a call (parser '{profile.tool_call_parser}')"
            raise UnsupportedField(f"tools[{index}].function.strict", reason)


def check_model(model: str, profile: EngineProfile, config: GatewayConfig) -> None:
    """Raises ModelNotFound unless ``model`` is the served base model or its alias."""
    if model not in (profile.model_id, config.model_alias or profile.model_id):
        raise ModelNotFound(f"The model '{model[:80]}' does not exist", param="model")


def count_prompts(body: Mapping[str, Any]) -> int:
    """How many prompts a completion body has; a chat body has one."""
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def read_body(known: Mapping[str, Check], raw: bytes) -> dict[str, Any]:
    """The body's fields without nulls, each checked. Raises MalformedBody, or an error naming the field."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"The body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise MalformedBody("The body must be a JSON object")
    if _is_deeper(body, MAX_DEPTH):
        raise MalformedBody(f"The body must be nested at most {MAX_DEPTH} deep")
    return check_fields(known, body)


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [child for one in level if isinstance(one, dict | list) for child in _children(one)]
    return bool(level)


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def require(body: Mapping[str, Any], *names: str) -> None:
    """Raises InvalidField for the first of the fields that is not given."""
    for name in names:
        if name not in body:
            raise InvalidField(name, "is required")


def _read_control(body: Mapping[str, Any]) -> LengthControl | None:
    try:
        return LengthControl.from_request(body)
    except LengthControlError as error:
        raise InvalidField(error.field, str(error).removeprefix(f"{error.field}: ")) from None


def _check_limits(generation: Generation, config: GatewayConfig) -> None:
    body, cap = generation.body, generation.max_tokens
    prompts = count_prompts(body)
    if prompts * body.get("n", 1) > config.max_choices:
        field = "prompt" if prompts > config.max_choices else "n"
        raise InvalidField(field, f"n times the number of prompts must be at most {config.max_choices}")
    if body.get("max_tokens", cap) != cap:
        raise InvalidField("max_tokens", "differs from max_completion_tokens; give one of them")
    if cap is not None and body.get("min_tokens", 0) > cap:
        raise InvalidField("min_tokens", f"must be at most the cap of {cap} tokens")


def _check_sampling(generation: Generation) -> None:
    body = generation.body
    if "stream_options" in body and not generation.is_stream:
        raise InvalidField("stream_options", "needs stream to be true")
    if "top_logprobs" in body and body.get("logprobs") is not True:
        raise InvalidField("top_logprobs", "needs logprobs to be true")
    if body.get("echo") and "logprobs" in body:
        raise UnsupportedField("echo", "the engine cannot combine it with logprobs")
    constraints = [name for name in ("regex", "ebnf") if name in body]
    if body.get("response_format", {}).get("type", "text") != "text":
        constraints.append("response_format")
    if len(constraints) > 1:
        raise InvalidField(constraints[0], f"cannot be combined with {constraints[1]}")
    if constraints and _forces_tool(body):
        raise InvalidField(constraints[0], "cannot be combined with a tool_choice that forces a call")


def _forces_tool(body: Mapping[str, Any]) -> bool:
    choice = body.get("tool_choice")
    return choice == "required" or isinstance(choice, dict)


def _check_tools(body: Mapping[str, Any]) -> None:
    choice, names = body.get("tool_choice"), [tool["function"]["name"] for tool in body.get("tools", [])]
    if choice not in (None, "none") and not names:
        raise InvalidField("tool_choice", "needs tools")
    if isinstance(choice, dict) and choice["function"]["name"] not in names:
        raise InvalidField("tool_choice.function.name", "is not the name of one of the tools")
    if body.get("parallel_tool_calls") is False and not _forces_tool(body):
        raise UnsupportedField("parallel_tool_calls", "false is honoured only where tool_choice forces a call")


def _check_control(generation: Generation) -> None:
    control, body, cap = generation.control, generation.body, generation.max_tokens
    if control is None or control.is_neutral:
        return
    field = "max_length_hint" if "max_length_hint" in body else "length_control"
    if body.get("ignore_eos"):
        raise InvalidField("ignore_eos", f"cannot be true with {field}: the answer could not end by itself")
    if generation.path == COMPLETION_PATH and "max_tokens" not in body:
        raise InvalidField("max_tokens", f"is required with {field}: its default of {cap} would cut the answer")
    if control.target is None:
        return
    if control.mode != "at_least" and body.get("min_tokens", 0) > control.target:
        raise InvalidField("min_tokens", f"must be at most the target of {control.target} tokens")
    if control.mode != "at_most" and cap is not None and control.target > cap:
        raise InvalidField(f"{field}.target", f"must be at most the cap of {cap} tokens, which would cut the answer")


def _image_urls(messages: list[Any]) -> list[tuple[str, str]]:
    return [
        (f"messages[{i}].content[{j}].image_url.url", part["image_url"]["url"])
        for i, message in enumerate(messages)
        if isinstance(message.get("content"), list)
        for j, part in enumerate(message["content"])
        if part["type"] == "image_url"
    ]
