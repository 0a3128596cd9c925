"""The one engine behind the gateway: is it usable, what can it do, requests to it and its faults."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import orjson

from lenvm_runtime.length_control import build_custom_params

from .chat_template import find_read_parts
from .config import GatewayConfig
from .errors import EngineBroken, EngineFailed, EngineTimeout, EngineUnavailable, GatewayError, InvalidRequest
from .fields import CHAT, COMPLETION, VALUES
from .metrics import Metrics
from .validation import CHAT_PATH, COMPLETION_PATH, EngineProfile

log = logging.getLogger("lenvm.gateway")

_KEEPALIVE_S = 2.0  # below the engine's own 5 s, so that a kept connection is never one it has just closed
_JSON = {"content-type": "application/json"}
_CLIENT_FAULTS = (400, 404, 413, 422)
_LOCATION = re.compile(r"'loc': \('body', (?P<loc>[^)]*)\), 'msg': (?P<quote>['\"])(?P<msg>.*?)(?P=quote)[,}]")
_GRAMMAR = re.compile(r"Failed to (compile|follow) (?P<kind>regex|ebnf|json) grammar")
_REFUSED_LENGTHS = (
    (
        re.compile(r"The input \(\d+ tokens\) is longer|Input length \(\d+ tokens\) exceeds|Prompt cannot be empty"),
        {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/generate": "input"},
    ),
    (
        re.compile(r"Requested token count exceeds"),
        {"/v1/chat/completions": "max_completion_tokens", "/v1/completions": "max_tokens"},
    ),
)
_ENGINE_ADVICE = " Use a shorter input or enable --allow-auto-truncate."
_GRAMMAR_FIELDS = {"regex": "regex", "ebnf": "ebnf", "json": "response_format"}


class Engine:
    """SGLang's OpenAI server with the LenVM plugin, over one pool of connections."""

    def __init__(self, config: GatewayConfig, metrics: Metrics, transport: httpx.AsyncBaseTransport | None) -> None:
        self._config = config
        self._metrics = metrics
        self._client = httpx.AsyncClient(
            base_url=config.engine_url,
            transport=transport,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=config.connect_timeout_s),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_S),
        )
        self._profile: EngineProfile | None = None
        self._started: object = None
        self._checking: asyncio.Task[EngineProfile] | None = None

    async def aclose(self) -> None:
        """Close all connections."""
        if self._checking is not None:
            self._checking.cancel()
        await self._client.aclose()

    async def profile(self) -> EngineProfile:
        """What the engine serves, asked once until it fails. Raises EngineUnavailable."""
        return self._profile or await self.check_ready()

    async def check_ready(self) -> EngineProfile:
        """Ask the engine whether it is healthy and carries the plugin; who asks meanwhile shares the answer.

        Requests go on with the last profile: SGLang's health check alone takes a second or more.
        Raises EngineUnavailable.
        """
        if self._checking is None:
            self._checking = asyncio.create_task(self._load())
            self._checking.add_done_callback(self._end_check)
        return await asyncio.shield(self._checking)

    def _end_check(self, check: asyncio.Task[EngineProfile]) -> None:
        self._checking = None
        if not check.cancelled():
            check.exception()  # retrieved, should all who asked have left

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[httpx.Response]:
        """Send a request; the answer is 200 and not yet read. Leaving the block closes the connection if unread.

        Raises InvalidRequest for the engine's own refusals and EngineError for its faults, inside the block too.
        """
        with self._faults():
            request = self._client.build_request("POST", path, content=body, headers=_JSON)
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    raise self.fault(response.status_code, _error_object(await response.aread()), path)
                yield response
            finally:
                await response.aclose()

    def fault(self, status: int, error: Mapping[str, Any], path: str = "") -> GatewayError:
        """The gateway's error for an error object of the engine and its HTTP status, asked at ``path``."""
        message = str(error.get("message", ""))
        if status in _CLIENT_FAULTS:
            param, text = explain_refusal(message, path)
            return InvalidRequest(text, param=param or error.get("param"))
        log.warning("engine answered %d: %s", status, message[:500])
        if status in (429, 503):
            return self._unavailable("The engine is overloaded or stopping")
        return EngineFailed("The engine failed on this request")

    async def _load(self) -> EngineProfile:
        try:
            async with asyncio.timeout(self._config.ready_timeout_s):
                profile = await self._ask(self._profile)
        except (TimeoutError, httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            log.warning("engine not ready: %r", error)
            self._metrics.engine_up.set(0)
            if not isinstance(error, TimeoutError):  # slow is not gone
                self._profile = None
            raise self._unavailable("The engine is not ready") from None
        self._profile = profile
        self._metrics.engine_up.set(1)
        return profile

    async def _ask(self, previous: EngineProfile | None) -> EngineProfile:
        (await self._client.get("/health")).raise_for_status()
        models, server, model = [await self._get(path) for path in ("/v1/models", "/server_info", "/model_info")]
        started = (server["startup_time"], models["data"][0]["id"])
        if previous is None or started != self._started:
            await self._probe(models["data"][0]["id"])
            read_parts = await find_read_parts(self._render)
        else:
            read_parts = previous.read_parts
        self._started = started
        return EngineProfile(
            models=tuple(models["data"]),
            seeds=bool(server["enable_deterministic_inference"]),
            tool_call_parser=server["tool_call_parser"] or "",
            images=bool(model["has_image_understanding"]),
            read_parts=read_parts,
        )

    async def _get(self, path: str) -> Any:
        return orjson.loads((await self._client.get(path)).raise_for_status().content)

    async def _probe(self, model: str) -> None:
        """One token, to see that plugin and head are there: an engine without them would ignore every length field."""
        body = {"model": model, "prompt": "Hi", "max_tokens": 1, "custom_params": build_custom_params(None, True)}
        response = await self._client.post(COMPLETION_PATH, content=orjson.dumps(body), headers=_JSON)
        lenvm = orjson.loads(response.raise_for_status().content)["choices"][0].get("lenvm")
        if not isinstance(lenvm, dict) or not lenvm.get("values"):
            raise ValueError("it sends no length values: does it run with the LenVM plugin and a head?")

    async def _render(self, chat: Mapping[str, Any]) -> object:
        """The token ids that a chat becomes; None where the engine refuses it. One token is generated, and dropped."""
        body = {**chat, "max_completion_tokens": 1, "return_prompt_token_ids": True}
        response = await self._client.post(CHAT_PATH, content=orjson.dumps(body), headers=_JSON)
        if response.status_code == 400:
            return None
        return orjson.loads(response.raise_for_status().content)["choices"][0]["prompt_token_ids"]

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            self._lose()
            raise self._unavailable("The engine cannot be reached") from None
        except httpx.TimeoutException:
            raise EngineTimeout("The engine was silent for too long") from None
        except httpx.HTTPError as error:
            self._lose()
            log.warning("engine connection broke: %r", error)
            raise EngineBroken("The engine's answer broke off") from None

    def _lose(self) -> None:
        self._profile = None
        self._metrics.engine_up.set(0)

    def _unavailable(self, message: str) -> EngineUnavailable:
        return EngineUnavailable(message, retry_after_s=self._config.retry_after_s)


def explain_refusal(message: str, path: str = "") -> tuple[str | None, str]:
    """The field that an SGLang refusal is about, where its text (or ``path``, asked for) says so, and the text for the
    client.
    """
    located = _LOCATION.search(message)
    if located:
        parts = [part.strip(" '") for part in located["loc"].split(",") if part.strip(" '")]
        field = parts[0] + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts[1:])
        return field, f"{field}: {located['msg']}"
    grammar = _GRAMMAR.match(message)
    if grammar:
        return _GRAMMAR_FIELDS[grammar["kind"]], message.strip()
    first_word = message.split(" ", 1)[0].strip(":")
    text = message.split("\n\n  File ")[0].removesuffix(_ENGINE_ADVICE)
    if first_word in {*CHAT, *COMPLETION, *VALUES}:
        return first_word, text
    for refusal, fields in _REFUSED_LENGTHS:
        if refusal.match(text):
            return fields.get(path), text
    return None, text


def _error_object(body: bytes) -> Mapping[str, Any]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {"message": body[:500].decode(errors="replace")}
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else {}
    return error if isinstance(error, dict) else {"message": str(error)}
