"""Answers that are errors, in OpenAI's JSON shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ApiError(Exception):
    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class Cut(Exception):
    """The connection ends here, without an answer or in the middle of one."""


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def no_such_file(file_id: str) -> ApiError:
    return ApiError(404, f"No such File object: {file_id}", param="id")


def cannot_find_file(file_id: str) -> str:
    return f"Cannot find file {file_id}, or organization org-test does not have access to it."


def rate_limited(message: str, code: str = "rate_limit_exceeded", kind: str = "requests") -> ApiError:
    return ApiError(429, message, type=kind, code=code)
