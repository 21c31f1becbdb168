"""Endpoints that tests of a gateway's limits need, whatever the real ones are."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway.bodies import read_object
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.replies import Reply
from chunkmill.gateway.routes import all_endpoints

MOST_BYTES = 2**20


async def _embed(gateway: Gateway, request: Request, caller: Caller) -> Response:
    body = await read_object(request, MOST_BYTES)
    model = await gateway.models.find(body.get("model"), caller)
    embedded = await gateway.embed(
        body["texts"], model=model.target, kind="document", caller=caller, timeout=body.get("timeout", 300.0)
    )
    return Reply({"tokens": embedded.tokens, "tenant": caller.tenant})


async def _upload(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return Reply({"bytes": sum([len(part) async for part in request.stream()])})


async def _wait(gateway: Gateway, request: Request, caller: Caller) -> Response:
    await asyncio.sleep(3600)
    return Reply({})


async def _fails(gateway: Gateway, request: Request, caller: Caller) -> Response:
    raise RuntimeError("a fault of ours")


ENDPOINTS = [
    *all_endpoints(),
    Endpoint("POST", "/test/embed", _embed, Scope.EMBED, "Embeds texts."),
    Endpoint("POST", "/test/upload", _upload, Scope.JOBS, "Counts the bytes of a body that is streamed."),
    Endpoint("GET", "/test/wait/{number}", _wait, Scope.SEARCH, "Waits for ever."),
    Endpoint("GET", "/test/fails", _fails, Scope.ADMIN, "Fails."),
]
