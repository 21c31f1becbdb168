"""One request and its answer, as the access log, the metrics and the limits see it."""

from __future__ import annotations

import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from chunkmill.domain.keys import Scope
from chunkmill.gateway.caller import NOBODY, Caller
from chunkmill.gateway.limits.room import Hold


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


@dataclass(slots=True, eq=False)
class Exchange:
    """``path`` is the template of the route, such as ``/v1/files/{file_id}``, and never what the caller sent."""

    method: str
    request_id: str = field(default_factory=new_request_id)
    began: float = field(default_factory=time.monotonic)
    path: str = ""
    scope: Scope | None = None
    caller: Caller = NOBODY
    is_counted: bool = False
    """Whether the limits of its key count it, so that it must be ended."""
    hold: Hold | None = None
    bounds_body: bool = False
    """Whether its body is read whole, so that its time and its size are bounded."""
    status: int = 0
    code: str = ""
    """The code of the refusal, if it is one."""
    model: str = ""
    texts: int = 0
    tokens: int = 0
    has_ended: bool = False


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def current() -> Exchange | None:
    """The exchange in whose task this runs; None outside of a request."""
    return _current.get()


def enter(exchange: Exchange) -> None:
    """Make it the current one of this task, which is uvicorn's for this request."""
    _current.set(exchange)
