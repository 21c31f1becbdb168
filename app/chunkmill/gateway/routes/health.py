"""Whether the gateway lives, and whether it can answer."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway.caller import Caller
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.replies import Reply


async def live(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """The process answers. A supervisor restarts it if it does not."""
    return Reply({"status": "alive"})


ENDPOINTS = [Endpoint("GET", "/live", live, None, "Whether the process answers.")]
