"""Requests to a gateway app without sockets, message by message where a test needs it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson

from fake_engine import MODEL, FakeEngine
from lenvm_service.app import build_app
from lenvm_service.config import GatewayConfig


class Exchange:
    """One request whose client can read message by message, stop reading, or leave."""

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.reading = asyncio.Event()
        self.reading.set()
        self._to_app.put_nowait({"type": "http.request", "body": orjson.dumps(body)})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._to_app.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        self.sent.put_nowait(message)

    def leave(self) -> None:
        self._to_app.put_nowait({"type": "http.disconnect"})

    async def next(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.sent.get(), 5)


class GatewayClient:
    """Requests to one gateway app."""

    def __init__(self, engine: FakeEngine, **config: Any) -> None:
        self.engine = engine
        self.app = build_app(GatewayConfig(**config), engine)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", chat_body(**fields))

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"model": MODEL, "prompt": "Once", **fields})

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        return await self.http.post(path, content=content, headers=headers)

    def exchange(self, **fields: Any) -> Exchange:
        return Exchange(self.app, "/v1/chat/completions", chat_body(**fields))

    async def samples(self) -> dict[str, float]:
        """The metrics by their exposed text, e.g. ``lenvm_errors_total{kind="rate_limit"}``."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Say hello"}], **fields}
