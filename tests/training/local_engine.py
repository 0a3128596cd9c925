"""Local stand-ins of what is sampled from: the engine's ``/generate``, where the prompt's first word or the test
decides the answers, and an OpenAI-compatible server, where pictures do.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


class _Server(ThreadingHTTPServer):
    """Answers so many requests; then it drops connections."""

    def __init__(self, answers: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.left = iter(range(answers))


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._answer({"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        if next(self.server.left, None) is None:
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/generate":
            kind = body["input_ids"][1] % 4 if len(body["input_ids"]) > 1 else 0
            self._answer({"output_ids": _tokens(kind), "meta_info": {"finish_reason": {"type": "stop"}}})
        else:
            kind = _brightness(body["messages"]) if self.path == "/v1/chat/completions" else 0
            self._answer({"choices": [{"token_ids": _tokens(kind), "finish_reason": "stop"}]})

    def _answer(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _tokens(kind: int) -> list[int]:
    """An answer of one of four lengths, nearly."""
    length = (2, 5, 9, 14)[kind] + random.randrange(3)
    return [*(random.randrange(8, 64) for _ in range(length)), 1]


def _brightness(messages: list[dict[str, Any]]) -> int:
    """Of the first picture: 3 for a bright one, 1 for a dark one."""
    urls = [part["image_url"]["url"] for part in messages[0]["content"] if part["type"] == "image_url"]
    kind, _, data = urls[0].partition(",")
    assert kind == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    return 3 if np.asarray(picture).mean() > 128 else 1


@contextmanager
def local_engine(answers: int = sys.maxsize) -> Iterator[str]:
    """Yields its address; it dies after so many answers."""
    with _Server(answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@asynccontextmanager
async def asyncio_engine(answer: Callable[[dict[str, Any]], Awaitable[Any]]) -> AsyncIterator[str]:
    """Yields its address; ``answer`` makes the JSON of each request's answer, all of them at once if need be."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                body = json.loads(await reader.readexactly(length))
                content = json.dumps(await answer(body)).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
