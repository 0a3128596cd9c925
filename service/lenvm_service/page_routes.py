"""The web page at ``/``: static files of this package, no outside host."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_MEDIA_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """``/`` and one route for each file beside it, read once."""
    names = sorted(file.name for file in files(__package__).joinpath("page").iterdir() if file.is_file())
    return [_file_route("/" if name == "index.html" else f"/page/{name}", name) for name in names]


def _file_route(path: str, name: str) -> Route:
    body = files(__package__).joinpath("page", name).read_bytes()
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]

    async def show(request: Request) -> Response:
        return Response(body, headers=_HEADERS, media_type=media_type)

    return Route(path, show)
