"""Completions over HTTP with exact token ids: SGLang's ``/generate``, or any OpenAI-compatible server.

Of an OpenAI-compatible server ``return_token_ids`` is asked for (SGLang and vLLM have it); one that
does not answer with token ids is refused, because text tokenised again is not what was sampled.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import httpx

RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})


class EngineError(RuntimeError):
    """The engine did not answer, or refused a request."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; stored with each row. The defaults draw from the model's own distribution.

    All of it is sent with each request: a server would else fill in what the model's generation_config says.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 640


@dataclass(frozen=True)
class Retry:
    """A request is tried ``attempts`` times, after delays of ``first_delay_s`` doubling up to ``max_delay_s``."""

    attempts: int = 8
    first_delay_s: float = 1.0
    max_delay_s: float = 30.0

    def delay_s(self, failures: int) -> float:
        """How long to wait after so many failures (1 or more)."""
        return min(self.first_delay_s * 2.0 ** (failures - 1), self.max_delay_s)


@dataclass(frozen=True)
class Request:
    """What to complete: the prompt's token ids; with images, its messages and their paths instead."""

    name: str
    token_ids: Sequence[int]
    messages: Sequence[dict[str, Any]] = ()
    images: Sequence[str] = ()


@dataclass(frozen=True)
class Completion:
    """``token_ids`` include the end token of a finished answer; ``finish_reason`` is OpenAI's (stop, length, ...)."""

    token_ids: list[int]
    finish_reason: str


class Endpoint(Protocol):
    """Where completions come from."""

    async def complete(self, request: Request, sampling: Sampling) -> Completion:
        """Sample one completion. Raises EngineError."""


class EngineEndpoint:
    """SGLang's own ``/generate``: token ids in, token ids out."""

    def __init__(self, client: httpx.AsyncClient, retry: Retry) -> None:
        self._client, self._retry = client, retry

    async def complete(self, request: Request, sampling: Sampling) -> Completion:
        if request.images:
            raise EngineError(f"prompt {request.name}: images need an OpenAI-compatible endpoint (api: openai)")
        body = {"input_ids": list(request.token_ids), "sampling_params": asdict(sampling)}
        answer = await _post(self._client, "/generate", body, request.name, self._retry)
        return Completion(answer["output_ids"], answer["meta_info"]["finish_reason"]["type"])


class OpenAIEndpoint:
    """``/v1/completions`` with token ids; ``/v1/chat/completions`` for prompts with images."""

    def __init__(self, client: httpx.AsyncClient, retry: Retry, model: str) -> None:
        self._client, self._retry, self._model = client, retry, model

    async def complete(self, request: Request, sampling: Sampling) -> Completion:
        path = "/v1/chat/completions" if request.images else "/v1/completions"
        fields = asdict(sampling)
        body = {"model": self._model, "max_tokens": fields.pop("max_new_tokens"), "return_token_ids": True, **fields}
        body |= {"messages": _with_images(request)} if request.images else {"prompt": list(request.token_ids)}
        answer = await _post(self._client, path, body, request.name, self._retry)
        choice = answer["choices"][0]
        if not choice.get("token_ids"):
            raise EngineError(f"{self._client.base_url} returns no token ids (return_token_ids), only text")
        return Completion(choice["token_ids"], choice["finish_reason"])


async def connect(api: str, client: httpx.AsyncClient, retry: Retry) -> Endpoint:
    """The endpoint of ``client`` (its base URL without ``/v1``) for ``api`` ``engine`` or ``openai``."""
    if api == "engine":
        return EngineEndpoint(client, retry)
    models = await _request(client, "GET", "/v1/models", None, "list of models", retry)
    return OpenAIEndpoint(client, retry, models["data"][0]["id"])


def _with_images(request: Request) -> list[dict[str, Any]]:
    """The messages with each image placeholder replaced by the file's data."""
    images = iter(request.images)

    def fill(part: dict[str, Any]) -> dict[str, Any]:
        if part.get("type") != "image":
            return part
        return {"type": "image_url", "image_url": {"url": _data_url(Path(next(images)))}}

    return [
        {**message, "content": [fill(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in request.messages
    ]


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any], name: str, retry: Retry) -> dict[str, Any]:
    return await _request(client, "POST", path, body, f"prompt {name}", retry)


async def _request(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None, name: str, retry: Retry
) -> dict[str, Any]:
    for failures in range(1, retry.attempts + 1):
        try:
            response = await client.request(method, path, json=body)
        except httpx.TransportError as error:
            problem = f"the engine at {client.base_url} does not answer: {error!r}"
        else:
            if response.status_code == 200:
                answer: dict[str, Any] = response.json()
                return answer
            problem = f"the engine refused {name}: {response.status_code} {response.text[:200]}"
            if response.status_code not in RETRIED_STATUS:
                break
        if failures < retry.attempts:
            await asyncio.sleep(retry.delay_s(failures))
    raise EngineError(problem)
