"""The gateway's routes and how its parts are put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import httpx
import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from .config import GatewayConfig
from .engine import Engine
from .errors import BodyTimeout, EngineBroken, EngineTimeout, MethodNotAllowed, NotFound
from .length_values import ENGINE_PATH, ValueRequest, read_value_request
from .metrics import Metrics
from .middleware import LENGTH_PATH, VALUES_PATH, Accounting, ApiKeys, BodyLimit, ConcurrencyLimit
from .page_routes import page_routes
from .relay import Relay, run_while_connected
from .validation import (
    CHAT_PATH,
    COMPLETION_PATH,
    EngineProfile,
    Generation,
    check_model,
    check_profile,
    read_generation,
    read_prediction,
)


def build_app(config: GatewayConfig, transport: httpx.AsyncBaseTransport | None = None) -> Starlette:
    """The gateway as an ASGI app. ``transport`` replaces the network between it and the engine."""
    metrics = Metrics()
    gateway = Gateway(config, Engine(config, metrics, transport), metrics)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.engine.aclose()

    return Starlette(
        routes=[*gateway.routes(), *page_routes()],
        middleware=_middleware(config, metrics),
        exception_handlers={HTTPException: _refuse_route},
        lifespan=lifespan,
    )


class Gateway:
    """The endpoints of one gateway."""

    def __init__(self, config: GatewayConfig, engine: Engine, metrics: Metrics) -> None:
        self.config = config
        self.engine = engine
        self.metrics = metrics

    def routes(self) -> list[Route]:
        """Every route but the page's. No other path of the engine can be reached."""
        return [
            Route(CHAT_PATH, self.generate, methods=["POST"]),
            Route(COMPLETION_PATH, self.generate, methods=["POST"]),
            Route(LENGTH_PATH, self.predict, methods=["POST"]),
            Route(VALUES_PATH, self.show_values, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{id:path}", self.show_model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.show_metrics),
        ]

    async def generate(self, request: Request) -> ASGIApp:
        """A chat or text completion, streamed or not."""
        generation = read_generation(request.scope["path"], await self._read_body(request), self.config)
        profile = await self.engine.profile()
        check_profile(generation, profile, self.config)
        return Relay(self.config, self.engine, self.metrics, generation, profile)

    async def predict(self, request: Request) -> Response:
        """The length that the engine predicts for a prompt. It samples one token, which is dropped."""
        generation = read_prediction(await self._read_body(request))
        profile = await self.engine.profile()
        check_profile(generation, profile, self.config)
        answer: dict[str, Any] = {}
        await run_while_connected(request.receive, self._ask_prediction(generation, profile, answer))
        self.metrics.prompt_tokens.labels(profile.model_id).inc(answer["prompt_tokens"])
        return _json(answer)

    async def show_values(self, request: Request) -> Response:
        """The value at every token of given texts or token ids, and after given next tokens. Batched."""
        wanted = read_value_request(await self._read_body(request), self.config)
        profile = await self.engine.profile()
        check_model(wanted.model, profile, self.config)
        answer: dict[str, Any] = {}
        await run_while_connected(request.receive, self._ask_values(wanted, profile, answer))
        self.metrics.prompt_tokens.labels(profile.model_id).inc(answer["usage"]["prompt_tokens"])
        return _json(answer)

    async def list_models(self, request: Request) -> Response:
        """The served model, and its alias."""
        return _json({"object": "list", "data": self._models(await self.engine.profile())})

    async def show_model(self, request: Request) -> Response:
        """One model's card."""
        profile, model = await self.engine.profile(), request.path_params["id"]
        check_model(model, profile, self.config)
        return _json(next(card for card in self._models(profile) if card["id"] == model))

    async def health(self, request: Request) -> Response:
        """This process answers."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """The engine is healthy now, and carries the plugin."""
        profile = await self.engine.check_ready()
        return _json({"status": "ready", "model": profile.model_id})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus text."""
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _read_body(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                return await request.body()
        except TimeoutError:
            raise BodyTimeout("The body did not arrive in time") from None

    async def _ask_prediction(self, generation: Generation, profile: EngineProfile, answer: dict[str, Any]) -> None:
        completion = await self._ask(generation.path, generation.engine_body(profile))
        answer.update(_prediction(completion, profile))

    async def _ask_values(self, wanted: ValueRequest, profile: EngineProfile, answer: dict[str, Any]) -> None:
        answer.update(wanted.response(await self._ask(ENGINE_PATH, wanted.engine_body()), profile))

    async def _ask(self, path: str, body: bytes) -> Any:
        """The engine's whole JSON answer."""
        try:
            async with asyncio.timeout(self.config.request_timeout_s), self.engine.post(path, body) as response:
                return orjson.loads(await response.aread())
        except TimeoutError:
            raise EngineTimeout("The engine did not answer in time") from None
        except orjson.JSONDecodeError:
            raise EngineBroken("The engine's answer is not JSON") from None

    def _models(self, profile: EngineProfile) -> list[Mapping[str, Any]]:
        base = profile.models[0]
        alias = self.config.model_alias
        return [base, {**base, "id": alias, "parent": base["id"]}] if alias else [base]


def _prediction(completion: Mapping[str, Any], profile: EngineProfile) -> dict[str, Any]:
    try:
        prediction = completion["choices"][0]["lenvm"]["prediction"]
        return {
            "object": "length.prediction",
            "model": profile.model_id,
            "prompt_tokens": completion["usage"]["prompt_tokens"],
            "expected": prediction["expected"],
            "interval": prediction["interval"],
        }
    except (KeyError, IndexError, TypeError):
        raise EngineBroken("The engine's answer has no length prediction") from None


def _middleware(config: GatewayConfig, metrics: Metrics) -> list[Middleware]:
    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["x-request-id", "retry-after"],
    )
    return [
        *([cors] if config.cors_origins else []),
        Middleware(Accounting, metrics=metrics),
        Middleware(ApiKeys, config=config),
        Middleware(ConcurrencyLimit, config=config),
        Middleware(BodyLimit, config=config),
    ]


async def _refuse_route(request: Request, error: Exception) -> NoReturn:
    if isinstance(error, HTTPException) and error.status_code == 405:
        raise MethodNotAllowed(f"{request.url.path} does not take {request.method}")
    raise NotFound(f"There is no {request.url.path[:80]} here")


def _json(content: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
