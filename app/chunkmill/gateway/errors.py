"""Every refusal of the gateway, in the form of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``.

No message holds a text or a key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from chunkmill.errors import (
    BudgetExceeded,
    ChunkmillError,
    ClientClosed,
    EngineError,
    InvalidInput,
    NotFound,
    StoreUnavailable,
    UnknownModel,
    WaitTimeout,
)
from chunkmill.gateway.replies import Reply

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict",
    411: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}
"""HTTP status → the ``type`` of the error. Every other status is a ``server_error``."""


class Refusal(Exception):
    """An answer that is an error. ``param`` names the field of the request that is wrong.

    ``retry_after`` is in seconds. ``should_retry`` is told to OpenAI's clients, which else decide by the status.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.headers = dict(headers or {})

    def reply(self) -> Reply:
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
            headers["retry-after-ms"] = str(math.ceil(1000 * self.retry_after))
        should_retry = self.status in (429, 502, 503, 504) if self.should_retry is None else self.should_retry
        headers["x-should-retry"] = "true" if should_retry else "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Reply({"error": self.error()}, self.status, headers)

    def error(self) -> dict[str, Any]:
        return {
            "message": self.message,
            "type": TYPES.get(self.status, "server_error"),
            "param": self.param,
            "code": self.code,
        }


def refusal_of(error: ChunkmillError) -> Refusal:
    """The refusal that tells the caller of an error of ours."""
    message = str(error)
    if isinstance(error, UnknownModel):
        return Refusal(404, "model_not_found", message, param="model")
    if isinstance(error, InvalidInput):
        return Refusal(400, error.code, message)
    if isinstance(error, NotFound):
        return Refusal(404, error.code, message)
    if isinstance(error, BudgetExceeded):
        return Refusal(429, "insufficient_quota", message, should_retry=False)
    if isinstance(error, WaitTimeout):
        return Refusal(504, "timeout", message)
    if isinstance(error, StoreUnavailable | ClientClosed):
        return Refusal(503, error.code, message, retry_after=1.0)
    if isinstance(error, EngineError):
        return Refusal(
            503 if error.elsewhere else 500, error.code, message, retry_after=1.0 if error.elsewhere else None
        )
    return Refusal(error.http_status, error.code, message, should_retry=error.retryable)
