"""Every way a request can fail: one class, one HTTP status, one OpenAI error type.

GatewayError
├── InvalidRequest 400 ─ MalformedBody, InvalidField ─ (UnknownField, UnsupportedField)
├── InvalidApiKey 401      ├── NotFound 404 ─ ModelNotFound     ├── MethodNotAllowed 405
├── BodyTimeout 408        ├── BodyTooLarge 413                 ├── TooManyRequests 429
├── InternalError 500
└── EngineError ─ EngineBroken 502 ─ EngineFailed, EngineUnavailable 503, EngineTimeout 504
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson
from starlette.responses import Response


class GatewayError(Exception):
    """A failed request. ``kind`` labels the error in ``/metrics``; ``param`` names the request's field."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP answer of a request that failed before its answer began."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return Response(orjson.dumps(self.body()), self.status, headers, "application/json")

    def event(self) -> bytes:
        """The terminal event of a stream that failed after its answer began."""
        return b"data: " + orjson.dumps(self.body()) + b"\n\n"


class InvalidRequest(GatewayError):
    """The request cannot be served as it is."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    kind = "invalid_request"


class MalformedBody(InvalidRequest):
    """The body is not a JSON object."""

    code = "invalid_json"


class InvalidField(InvalidRequest):
    """A field has a wrong type or value, or cannot be combined with another one."""

    code = "invalid_value"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", param=field)


class UnknownField(InvalidField):
    """A field that this route does not have."""

    code = "unknown_parameter"


class UnsupportedField(InvalidField):
    """A field that exists elsewhere but would be ignored or is unsafe here."""

    code = "unsupported_parameter"


class InvalidApiKey(GatewayError):
    """No key, or not one of the configured ones."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    kind = "invalid_api_key"


class NotFound(GatewayError):
    """No such route."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"
    kind = "not_found"


class ModelNotFound(NotFound):
    """No served model has this name."""

    code = "model_not_found"
    kind = "model_not_found"


class MethodNotAllowed(GatewayError):
    """The route exists with another method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    kind = "method_not_allowed"


class BodyTimeout(GatewayError):
    """The client did not send its body in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    kind = "body_timeout"


class BodyTooLarge(GatewayError):
    """The body is larger than the gateway accepts."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    kind = "body_too_large"


class TooManyRequests(GatewayError):
    """A concurrency limit is reached. Carries Retry-After."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    kind = "rate_limit"


class InternalError(GatewayError):
    """A fault of the gateway itself."""


class EngineError(GatewayError):
    """A fault between the gateway and the engine, or inside the engine."""


class EngineBroken(EngineError):
    """The engine's answer broke off or made no sense."""

    status = 502
    code = "engine_broken"
    kind = "engine_broken"


class EngineFailed(EngineBroken):
    """The engine answered with a fault of its own."""

    code = "engine_failed"
    kind = "engine_failed"


class EngineUnavailable(EngineError):
    """The engine is not there, or not ready. Carries Retry-After."""

    status = 503
    type = "overloaded_error"
    code = "engine_unavailable"
    kind = "engine_unavailable"


class EngineTimeout(EngineError):
    """The engine was silent for too long."""

    status = 504
    code = "engine_timeout"
    kind = "engine_timeout"
