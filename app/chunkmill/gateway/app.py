"""Builds the ASGI application of a gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chunkmill.errors import ChunkmillError
from chunkmill.gateway.batches.keeper import BatchKeeper
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.errors import Refusal, refusal_of
from chunkmill.gateway.exchange import Exchange, current
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.keys import key_in
from chunkmill.gateway.paths import RawRoute
from chunkmill.gateway.routes import all_endpoints
from chunkmill.gateway.watching import WatchedApp
from chunkmill.ledger.access import spends

logger = logging.getLogger(__name__)

BOUNDED = frozenset({Scope.EMBED, Scope.SEARCH})
"""Endpoints of these scopes read their body whole, and what it holds waits in this process. The others stream."""


def build(gateway: Gateway, endpoints: Sequence[Endpoint] | None = None) -> Starlette:
    """The application. It starts the gateway, and closes it when it shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await gateway.start()
        gateway.batches = BatchKeeper(gateway.db, gateway.settings, gateway.models, asyncio.get_running_loop())
        gateway.batches.start()
        yield
        await asyncio.to_thread(gateway.batches.stop)
        await gateway.close()

    by_path: dict[str, list[Endpoint]] = {}
    for endpoint in all_endpoints() if endpoints is None else endpoints:
        by_path.setdefault(endpoint.path, []).append(endpoint)
    routes = [
        RawRoute(
            path,
            _handle(gateway, {endpoint.method: endpoint for endpoint in at_path}),
            methods=[endpoint.method for endpoint in at_path],
        )
        for path, at_path in by_path.items()
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(WatchedApp, gateway=gateway)],
        exception_handlers={HTTPException: _http_refusal},
    )
    # A redirect would lead to the address in the Host header, which anybody can write, and drop the key.
    app.router.redirect_slashes = False
    return app


def _handle(gateway: Gateway, by_method: dict[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        endpoint = by_method["GET" if request.method == "HEAD" and "HEAD" not in by_method else request.method]
        exchange = current() or Exchange(request.method)
        exchange.path, exchange.scope = endpoint.path, endpoint.scope
        try:
            if endpoint.scope is not None:
                exchange.caller = await _caller(gateway, request, endpoint.scope)
                gateway.limits.begin(exchange.caller)
                exchange.is_counted = True
                _take_room(gateway, exchange, request)
            with spends.paid_by(exchange.caller.key_id):
                response = await endpoint.handler(gateway, request, exchange.caller)
        except Refusal as refusal:
            response = _refused(exchange, refusal)
        except ChunkmillError as error:
            response = _refused(exchange, refusal_of(error))
        except ClientDisconnect:
            response = _refused(exchange, Refusal(400, "client_gone", "the caller went away."))
        except Exception:
            logger.exception("%s %s failed (%s)", request.method, endpoint.path, exchange.request_id)
            message = f"the gateway failed; its log says more about {exchange.request_id}."
            response = _refused(exchange, Refusal(500, "internal", message))
        response.headers["x-request-id"] = exchange.request_id
        if exchange.is_counted:
            response.headers.update(gateway.limits.headers(exchange.caller))
        return response

    return handle


def _refused(exchange: Exchange, refusal: Refusal) -> Response:
    exchange.code = refusal.code
    return refusal.reply()


def _take_room(gateway: Gateway, exchange: Exchange, request: Request) -> None:
    """Hold what the body may be, before a byte of it is read. Raises :class:`Refusal` if there is no room."""
    exchange.bounds_body = exchange.scope in BOUNDED
    if not exchange.bounds_body or request.method not in ("POST", "PUT"):
        return
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        message = f"a body with content-encoding {encoding[:20]!r} is not read. Send it as it is."
        raise Refusal(415, "unsupported_encoding", message)
    length = request.headers.get("content-length", "0")
    exchange.hold = gateway.limits.hold_body(int(length) if length.isascii() and length.isdecimal() else 0)


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
    exchange = current() or Exchange("")
    exchange.code = codes.get(error.status_code, "http")
    reply.headers["x-request-id"] = exchange.request_id
    return reply
