"""The engine's answer to the client: bytes unchanged, one terminal event, no work for clients that left.

A stream's terminal event is ``data: [DONE]`` or one ``data: {"error": ...}``; nothing follows either.
A failure before the first event is an ordinary HTTP error: the answer begins with the first event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive, Scope, Send

from .config import GatewayConfig
from .engine import Engine
from .errors import EngineBroken, EngineTimeout, EngineUnavailable, GatewayError, InternalError
from .metrics import Metrics
from .observation import Event, Observer
from .sse import EventSplitter
from .validation import EngineProfile, Generation

log = logging.getLogger("lenvm.gateway")

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_CLOSE_S = 1.0  # for the engine to end the HTTP answer after its [DONE], so that the connection can be kept


class ClientGone(Exception):
    """The client left or stopped reading. ``reason`` is ``disconnect`` or ``stalled``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``; when the client disconnects, cancel it and raise ClientGone."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_wait_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        gone = not task.done()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if gone:
        raise ClientGone("disconnect")
    task.result()


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_gateway_error(error: Exception) -> GatewayError:
    if isinstance(error, GatewayError):
        return error
    log.error("a stream failed", exc_info=error)
    return InternalError("The gateway failed on this request")


class Relay:
    """The ASGI answer to one validated generation request."""

    def __init__(
        self, config: GatewayConfig, engine: Engine, metrics: Metrics, generation: Generation, profile: EngineProfile
    ) -> None:
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._generation = generation
        self._body = generation.engine_body(profile)
        self._observer = Observer(metrics, generation, profile.model_id)
        self._splitter = EventSplitter()
        self._begun = False  # the response's start was sent
        self._ended = False  # the terminal event was taken
        self._completed = False  # and it says that all is well
        self._delivered = False  # and the client has it, or has the whole answer
        self._sending = False  # the client, not the engine, is being waited for

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._relay_events(send) if self._generation.is_stream else self._relay_answer(send)
        try:
            await run_while_connected(receive, work)
        except ClientGone:
            if self._sending or not self._ended:
                raise
        except asyncio.CancelledError:  # the gateway is stopping and cannot wait any longer
            if self._begun and not self._ended:
                await self._send_last(send, EngineUnavailable("The server is stopping"))
            raise
        finally:
            self._observer.finish(completed=self._delivered)

    async def _relay_answer(self, send: Send) -> None:
        try:
            async with (
                asyncio.timeout(self._config.request_timeout_s),
                self._engine.post(self._generation.path, self._body) as response,
            ):
                body = await response.aread()
        except TimeoutError:
            raise EngineTimeout("The engine did not answer in time") from None
        self._observer.see_answer(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._ended = self._delivered = True

    async def _relay_events(self, send: Send) -> None:
        try:
            await self._copy_events(send)
        except ClientGone:
            raise
        except Exception as error:
            if not self._begun:
                raise
            if not self._ended:
                await self._send_last(send, _as_gateway_error(error))
                return
        await send({"type": "http.response.body", "body": b""})

    async def _copy_events(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        try:
            async with (
                asyncio.timeout(self._config.first_event_timeout_s) as limit,
                self._engine.post(self._generation.path, self._body) as response,
            ):
                async for data in response.aiter_raw():
                    events = self._take(data)
                    if events:
                        limit.reschedule(clock() + self._config.client_timeout_s)
                        await self._send(send, events)
                        self._delivered = self._completed
                    if self._ended and not self._completed:
                        return
                    limit.reschedule(clock() + (_CLOSE_S if self._ended else self._config.idle_timeout_s))
        except TimeoutError:
            raise ClientGone("stalled") if self._sending else EngineTimeout("The engine fell silent") from None
        if not self._ended:
            raise EngineBroken("The engine's answer broke off")

    def _take(self, data: bytes) -> bytes:
        """The bytes for the client among new bytes of the engine, up to and with a terminal event."""
        kept: list[bytes] = []
        for event in self._splitter.feed(data):
            if self._ended:
                break
            kind = self._observer.see_event(event)
            if kind is Event.USAGE and not self._generation.wants_usage:
                continue
            if kind is Event.ERROR:
                self._see_error(is_first=not (self._begun or kept))
            self._completed = kind is Event.DONE
            self._ended = self._completed or kind is Event.ERROR
            kept.append(event)
        return b"".join(kept)

    def _see_error(self, is_first: bool) -> None:
        """An error as the very first event becomes an HTTP error; a later one is relayed and counted."""
        code = self._observer.error.get("code")
        fault = self._engine.fault(code if isinstance(code, int) else 500, self._observer.error)
        if is_first:
            raise fault
        self._metrics.errors.labels(fault.kind).inc()

    async def _send_last(self, send: Send, error: GatewayError) -> None:
        self._ended = True
        self._metrics.errors.labels(error.kind).inc()
        await send({"type": "http.response.body", "body": error.event()})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sending = True
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending = False
