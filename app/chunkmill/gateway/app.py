"""Builds the ASGI application of a gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.errors import ChunkmillError
from chunkmill.gateway.batches.keeper import BatchKeeper
from chunkmill.gateway.caller import NOBODY, Caller, Scope
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.errors import Refusal, refusal_of
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.keys import key_in
from chunkmill.gateway.paths import RawRoute
from chunkmill.gateway.routes import all_endpoints

logger = logging.getLogger(__name__)


def build(gateway: Gateway, endpoints: Sequence[Endpoint] | None = None) -> Starlette:
    """The application. It closes the gateway when it shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        gateway.batches = BatchKeeper(gateway.db, gateway.settings, gateway.models, asyncio.get_running_loop())
        gateway.batches.start()
        yield
        await asyncio.to_thread(gateway.batches.stop)
        await gateway.close()

    by_path: dict[str, list[Endpoint]] = {}
    for endpoint in all_endpoints() if endpoints is None else endpoints:
        by_path.setdefault(endpoint.path, []).append(endpoint)
    routes = [
        RawRoute(path, _handle(gateway, {each.method: each for each in found}), methods=[each.method for each in found])
        for path, found in by_path.items()
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_refusal},
    )
    # A redirect would lead to the address in the Host header, which anybody can write, and drop the key.
    app.router.redirect_slashes = False
    return app


def _handle(gateway: Gateway, by_method: dict[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        endpoint = by_method["GET" if request.method == "HEAD" else request.method]
        request_id = f"req_{secrets.token_hex(12)}"
        try:
            caller = NOBODY if endpoint.scope is None else await _caller(gateway, request, endpoint.scope)
            response = await endpoint.handler(gateway, request, caller)
        except Refusal as refusal:
            response = refusal.reply()
        except ChunkmillError as error:
            response = refusal_of(error).reply()
        except Exception:
            logger.exception("%s %s failed (%s)", request.method, endpoint.path, request_id)
            message = f"the gateway failed; its log says more about {request_id}."
            response = Refusal(500, "internal", message).reply()
        response.headers["x-request-id"] = request_id
        return response

    return handle


async def _caller(gateway: Gateway, request: Request, scope: Scope) -> Caller:
    if gateway.is_leaving:
        raise Refusal(503, "draining", "this gateway is shutting down; another one answers.", retry_after=1.0)
    caller = await gateway.keys.caller(key_in(request.headers))
    if caller is None:
        raise Refusal(401, "invalid_api_key", "the API key is wrong, was revoked, or has expired.")
    if not caller.may(scope):
        raise Refusal(403, "scope", f"this API key does not allow {scope!s} requests.")
    return caller


async def _http_refusal(_: Request, error: Exception) -> Response:
    """Paths and methods that do not exist."""
    if not isinstance(error, HTTPException):
        raise error
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = {404: "there is no such path.", 405: "this path does not take that method."}.get(
        error.status_code, error.detail
    )
    reply = Refusal(error.status_code, codes.get(error.status_code, "http"), message, headers=error.headers).reply()
    reply.headers["x-request-id"] = f"req_{secrets.token_hex(12)}"
    return reply
