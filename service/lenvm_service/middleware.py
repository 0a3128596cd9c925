"""Pure ASGI layers around the routes: accounting, API keys, concurrency, body size. None buffers an answer."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from collections import Counter
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import GatewayConfig
from .errors import BodyTooLarge, GatewayError, InternalError, InvalidApiKey, TooManyRequests
from .metrics import Metrics
from .relay import ClientGone

log = logging.getLogger("lenvm.gateway")

LENGTH_PATH = "/v1/length/predict"
VALUES_PATH = "/v1/length/values"
GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions", LENGTH_PATH, VALUES_PATH)
_PLAIN_ROUTES = frozenset({*GENERATION_PATHS, "/v1/models", "/health", "/ready", "/metrics", "/"})
_CLIENT_GONE = 499  # the status that access logs give to a client that left
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def route_label(path: str) -> str:
    """A path's route template: few values, whatever clients ask for."""
    if path in _PLAIN_ROUTES:
        return path
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    return "/page/{file}" if path.startswith("/page/") else "other"


class Accounting:
    """Outermost: gives each request an id, counts it, and turns every exception into its one answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route, request_id = route_label(scope["path"]), _read_request_id(scope)
        status = _CLIENT_GONE

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with self._metrics.in_flight.labels(route).track_inprogress():
            try:
                await self._app(scope, receive, send_counted)
            except (ClientGone, ClientDisconnect) as gone:
                reason = gone.reason if isinstance(gone, ClientGone) else "disconnect"
                self._metrics.aborts.labels(route, reason).inc()
            except Exception as error:
                if status != _CLIENT_GONE:
                    raise
                await self._refuse(error, request_id)(scope, receive, send_counted)
            finally:
                self._metrics.requests.labels(route, status).inc()

    def _refuse(self, error: Exception, request_id: str) -> ASGIApp:
        if not isinstance(error, GatewayError):
            log.error("request %s failed", request_id, exc_info=error)
            error = InternalError("The gateway failed on this request")
        self._metrics.errors.labels(error.kind).inc()
        return error.response()


class ApiKeys:
    """``/v1`` needs one of the configured keys as a bearer token, if there are any. Compared in constant time."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._keys = [key.encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"].startswith("/v1/"):
            scope["lenvm.key"] = self._find_key(Headers(scope=scope))
        await self._app(scope, receive, send)

    def _find_key(self, headers: Mapping[str, str]) -> int:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise InvalidApiKey("Give a valid API key as 'Authorization: Bearer KEY'")
        return matches.index(True)


class ConcurrencyLimit:
    """At most so many generation requests in flight, in all and for each key; more are a 429 with Retry-After."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._config = config
        self._in_flight: Counter[int | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in GENERATION_PATHS:
            await self._app(scope, receive, send)
            return
        key = scope.get("lenvm.key")
        self._check(key)
        self._in_flight[key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[key] -= 1

    def _check(self, key: int | None) -> None:
        limit, key_limit = self._config.max_concurrency, self._config.max_concurrency_per_key
        if self._in_flight.total() >= limit:
            self._refuse(f"The server is at its limit of {limit} requests in flight")
        if key is not None and key_limit and self._in_flight[key] >= key_limit:
            self._refuse(f"This key is at its limit of {key_limit} requests in flight")

    def _refuse(self, message: str) -> None:
        raise TooManyRequests(message, retry_after_s=self._config.retry_after_s)


class BodyLimit:
    """No request body above the limit, whether its length is announced or not."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._max_bytes = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        self._check(int(announced[:20]) if announced.isdecimal() else 0)
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            self._check(num_bytes)
            return message

        await self._app(scope, receive_counted, send)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise BodyTooLarge(f"The body must have at most {self._max_bytes} bytes")


def _read_request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
