"""Errors in OpenAI's shape, with the HTTP status that its clients act on."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from kvstore.errors import InvalidInputError, NotFoundError


class FieldError(InvalidInputError):
    """A field of the body is wrong; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(NotFoundError):
    """The model that was asked for is not served here."""

    param, code = "model", "model_not_found"


class HttpError(InvalidInputError):
    """Wrong in a way that only HTTP knows: path, method, size of the body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kind(NamedTuple):
    """How an error is shown: HTTP status, `type` and `code` of the error object."""

    status: int
    type: str
    code: str | None


#: Name of the gRPC status that the same error has there -> how it is shown here.
KINDS: dict[str, Kind] = {
    "INVALID_ARGUMENT": Kind(400, "invalid_request_error", None),
    "NOT_FOUND": Kind(404, "invalid_request_error", None),
    "UNAUTHENTICATED": Kind(401, "authentication_error", "invalid_api_key"),
    "PERMISSION_DENIED": Kind(403, "permission_error", "permission_denied"),
    "RESOURCE_EXHAUSTED": Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    "UNAVAILABLE": Kind(503, "service_unavailable_error", "service_unavailable"),
    "DEADLINE_EXCEEDED": Kind(504, "timeout_error", "deadline_exceeded"),
}
INTERNAL = Kind(500, "server_error", "internal_error")


def body(message: str, kind: Kind, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object."""
    return {"error": {"message": message, "type": kind.type, "param": param, "code": code or kind.code}}


def retry_headers(retry_s: float | None) -> dict[str, str]:
    """``Retry-After`` in whole seconds, rounded up; nothing for None."""
    return {} if retry_s is None else {"retry-after": str(max(1, math.ceil(retry_s)))}


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
