"""Completions over HTTP with exact token ids: SGLang's ``/generate``, or any OpenAI-compatible server.

Of an OpenAI-compatible server ``return_token_ids`` is asked for (SGLang and vLLM have it); one that
does not answer with token ids is refused, because text tokenised again is not what was sampled.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import httpx
from tqdm import tqdm

RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})
REFUSED_STATUS = frozenset({400, 413, 422})
"""Of what is asked, not of who asks or where: another try would end the same."""
ELSEWHERE_STATUS = frozenset({*range(300, 400), 401, 402, 403, 404, 405, 407, 410})
"""Of who asks, or where: every other request would end the same."""
ABORTED = "abort"
WHOLE = ("stop", "length")
"""Finish reasons of completions that are what the model wrote: it ended, or the token limit was reached."""
MAX_TOKEN_ID = 2**31 - 1

IMAGES_NEED_OPENAI = "images need an OpenAI-compatible endpoint (rollouts.api: openai)"
HOW_TO_REACH = "rollouts.engine_url is the server's address without /v1, OPENAI_API_KEY its key"

Answer = TypeVar("Answer")


class EngineError(RuntimeError):
    """The engine did not answer, or refused a request."""


class MissingCompletionsError(EngineError):
    """The engine answers, but some requests had no usable answer in all their tries."""


class EndpointError(ValueError):
    """No completion can be had from this server, whatever the prompt and whenever it is asked."""


class PromptRefusedError(ValueError):
    """The engine cannot complete this prompt, whenever it is asked; the message has the engine's reason."""


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

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0 and finite"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("top_k", self.top_k >= -1, "at least -1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "greater than 0 and finite"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not fits:
                raise ValueError(f"rollouts.sampling.{name}: must be {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Retry:
    """A request is tried ``attempts`` times, after delays of ``first_delay_s`` doubling up to ``max_delay_s``.

    A try lasts at most ``timeout_s``. What takes longest is cut off first, so this is for engines that have stalled:
    a limit that a completion in a full engine can reach would leave out the long ones.
    """

    attempts: int = 8
    first_delay_s: float = 1.0
    max_delay_s: float = 30.0
    timeout_s: float = 7200.0

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
    """``token_ids`` include the end token of a finished answer; ``finish_reason`` is one of `WHOLE`."""

    token_ids: list[int]
    finish_reason: str


class Endpoint(Protocol):
    """Where completions come from."""

    async def complete(self, request: Request, sampling: Sampling) -> Completion:
        """Sample one completion.

        Raises EngineError, PromptRefusedError for a prompt that cannot be completed, and EndpointError.
        """


class EngineEndpoint:
    """SGLang's own ``/generate``: token ids in, token ids out."""

    def __init__(self, client: httpx.AsyncClient, retry: Retry) -> None:
        self._client, self._retry = client, retry

    async def complete(self, request: Request, sampling: Sampling) -> Completion:
        if request.images:
            raise EndpointError(f"prompt {request.name}: {IMAGES_NEED_OPENAI}")
        body = {"input_ids": list(request.token_ids), "sampling_params": asdict(sampling)}
        return await _post(self._client, "/generate", body, request.name, self._retry, self._read)

    @staticmethod
    def _read(answer: Any) -> Completion:
        return _completion(answer["output_ids"], answer["meta_info"]["finish_reason"]["type"])


class OpenAIEndpoint:
    """``/v1/completions`` with token ids; ``/v1/chat/completions`` for prompts with images."""

    def __init__(self, client: httpx.AsyncClient, retry: Retry, model: str) -> None:
        self._client, self._retry, self._model = client, retry, model

    async def complete(self, request: Request, sampling: Sampling) -> Completion:
        path = "/v1/chat/completions" if request.images else "/v1/completions"
        fields = asdict(sampling)
        body = {"model": self._model, "max_tokens": fields.pop("max_new_tokens"), "return_token_ids": True, **fields}
        body |= {"messages": _with_images(request)} if request.images else {"prompt": list(request.token_ids)}

        def read(answer: Any) -> Completion:
            if request.images:
                _check_prompt_tokens(request, answer)
            return self._read(answer)

        return await _post(self._client, path, body, request.name, self._retry, read)

    def _read(self, answer: Any) -> Completion:
        choice = answer["choices"][0]
        if choice["finish_reason"] in WHOLE and choice.get("token_ids") is None:
            raise EndpointError(f"{self._client.base_url} returns no token ids (return_token_ids), only text")
        return _completion(choice.get("token_ids"), choice["finish_reason"])


def _check_prompt_tokens(request: Request, answer: dict[str, Any]) -> None:
    """Raises EndpointError where the server says that it read another number of tokens, as other image sizes make."""
    count = (answer.get("usage") or {}).get("prompt_tokens")
    if count is not None and count != len(request.token_ids):
        raise EndpointError(
            f"prompt {request.name}: the server reads {count} tokens, the served model's processor makes "
            f"{len(request.token_ids)}: another model, or other settings for images"
        )


def _completion(token_ids: Any, finish_reason: Any) -> Completion:
    """Raises ValueError for what is no whole completion."""
    if finish_reason not in WHOLE:
        raise ValueError(f"finish reason {finish_reason}")
    if not isinstance(token_ids, list) or not token_ids or not all(map(_is_token_id, token_ids)):
        raise ValueError("no token ids")
    return Completion(token_ids, finish_reason)


def _is_token_id(token: Any) -> bool:
    return type(token) is int and 0 <= token <= MAX_TOKEN_ID


async def connect(api: str, client: httpx.AsyncClient, retry: Retry) -> Endpoint:
    """The endpoint of ``client`` (its base URL without ``/v1``) for ``api`` ``engine`` or ``openai``."""
    if api == "engine":
        return EngineEndpoint(client, retry)

    def read(models: Any) -> str:
        return str(models["data"][0]["id"])

    name = await _request(client, "GET", "/v1/models", None, "list of models", retry, read)
    return OpenAIEndpoint(client, retry, name)


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


async def _post(
    client: httpx.AsyncClient,
    path: str,
    body: dict[str, Any],
    name: str,
    retry: Retry,
    read: Callable[[Any], Answer],
) -> Answer:
    return await _request(client, "POST", path, body, f"prompt {name}", retry, read)


async def _request(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    name: str,
    retry: Retry,
    read: Callable[[Any], Answer],
) -> Answer:
    """What ``read`` makes of the answer; one that it cannot read is tried again, as one that did not come."""
    for failures in range(1, retry.attempts + 1):
        try:
            response = await client.request(method, path, json=body)
            if response.status_code == 200:
                return read(response.json())
        except httpx.RequestError as error:
            problem = f"the engine at {client.base_url} does not answer: {error!r}"
            if isinstance(error, httpx.ReadTimeout):
                tqdm.write(
                    f"{name}: no answer in {client.timeout.read:g} s (rollouts.timeout_s), it is lost", file=sys.stderr
                )
        except EndpointError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problem = f"the engine's answer to {name} cannot be used ({error!r}): {response.text[:200]}"
        else:
            problem = f"the engine refused {name}: {response.status_code} {response.text[:200]}"
            if method == "POST" and response.status_code in REFUSED_STATUS:
                raise PromptRefusedError(f"{problem} (too long? rollouts.max_prompt_tokens leaves such prompts out)")
            if response.status_code in ELSEWHERE_STATUS or (
                method == "GET" and response.status_code not in RETRIED_STATUS
            ):
                raise EndpointError(f"{problem} ({HOW_TO_REACH})")
            if response.status_code not in RETRIED_STATUS:
                raise EngineError(problem)
        if failures < retry.attempts:
            await asyncio.sleep(retry.delay_s(failures))
    raise EngineError(problem)
