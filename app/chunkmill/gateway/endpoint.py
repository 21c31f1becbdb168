"""One endpoint: its path, who may call it, what it does, and what its documentation says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway.caller import Caller, Scope

if TYPE_CHECKING:
    from chunkmill.gateway.gateway import Gateway

Handler = Callable[["Gateway", Request, Caller], Awaitable[Response]]
Schema = Mapping[str, Any]
"""A JSON schema, as OpenAPI 3.1 has it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """``scope`` is what the caller's key must allow; without one, everybody may call it.

    The other fields are for ``/openapi.json``. ``answer`` describes the body of a success, and ``media_type`` says what
    it is if it is not JSON.
    """

    method: str
    path: str
    handler: Handler
    scope: Scope | None
    summary: str
    body: Schema | None = None
    answer: Schema | None = None
    media_type: str = "application/json"
    parameters: Mapping[str, Schema] = field(default_factory=dict)
    """Query parameter → its schema."""
    body_media_type: str = "application/json"
    is_listed: bool = True
    """Whether ``/openapi.json`` has it. The page's own paths are for browsers only."""
