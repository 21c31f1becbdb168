"""The outermost layer of the application: whatever is true of every request.

It ends a request whose caller hangs up, cuts bodies that come too slowly, bounds what waits, refuses names of hosts
that are not ours, and writes a line of the access log, the metrics and a span.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chunkmill.gateway import exchange as exchanges
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.exchange import Exchange
from chunkmill.gateway.gateway import Gateway
from chunkmill.telemetry import metrics, tracing
from chunkmill.telemetry.counts import COUNTS

logger = logging.getLogger("chunkmill.gateway.access")

GONE = 499
"""The status in the log of a request whose caller hung up. Nobody gets it as an answer."""
SLOWEST_BYTES = 16 * 1024
"""A body that is streamed, such as an upload, must bring so many bytes a second after its first seconds."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


class WatchedApp:
    """``app`` with all that. Handlers find the exchange of their request by ``exchange.current()``."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope["method"])
        exchanges.enter(exchange)
        headers = Headers(scope=scope)
        parent = headers.get("traceparent", "")
        parents = [parent] if _TRACEPARENT.fullmatch(parent) else []
        with tracing.root("gateway request", {"request": exchange.request_id}, kind="SERVER", parents=parents) as span:
            try:
                await self._watched(exchange, headers, scope, receive, send)
            finally:
                self._end(exchange)
                span.set({"path": exchange.path, "status": exchange.status, "texts": exchange.texts})
                if exchange.status >= 500:
                    span.fail(exchange.code or str(exchange.status))

    async def _watched(self, exchange: Exchange, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                exchange.has_ended = True

        if self._gateway.hosts is not None and _name_of(headers.get("host", "")) not in self._gateway.hosts:
            message = "this gateway does not answer for that host. Name it in GATEWAY_HOSTS if a proxy asks for it."
            exchange.code = "invalid_host"
            reply = Refusal(421, exchange.code, message).reply()
            reply.headers["x-request-id"] = exchange.request_id
            await reply(scope, receive, told)
            return
        reading = _Reading(self._gateway, exchange, receive, has_body=_has_body(headers))
        reading.begin()
        try:
            await self._app(scope, reading.receive, told)
        except asyncio.CancelledError:
            if not reading.is_gone:
                raise  # the server is being shut down
            # What this task waited for was withdrawn on the way here.
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
        finally:
            reading.end()
            if reading.is_gone:
                exchange.status = GONE

    def _end(self, exchange: Exchange) -> None:
        limits = self._gateway.limits
        if exchange.hold is not None:
            limits.release(exchange.hold, answered=exchange.status < 400)
        if exchange.is_counted:
            limits.end(exchange.caller)
        seconds = time.monotonic() - exchange.began
        labels = (str(exchange.scope or metrics.OTHER), _result(exchange), _key_class(exchange))
        COUNTS.add_all(
            ((metrics.GATEWAY_REQUESTS, 1), (metrics.GATEWAY_SECONDS, seconds), (metrics.GATEWAY_TEXTS, exchange.texts),
             (metrics.GATEWAY_TOKENS, exchange.tokens)),
            *labels,
        )  # fmt: skip
        COUNTS.set(metrics.GATEWAY_WAITING_TEXTS, limits.room.texts)
        COUNTS.set(metrics.GATEWAY_WAITING_TOKENS, limits.room.tokens)
        if logger.isEnabledFor(logging.INFO):
            fields: dict[str, object] = {
                "method": exchange.method,
                "path": exchange.path or "-",
                "status": exchange.status,
                "ms": round(1000 * seconds, 1),
                "request": exchange.request_id,
            }
            if exchange.caller.name:
                fields["key"] = exchange.caller.key_id or exchange.caller.name
            if exchange.code:
                fields["code"] = exchange.code
            if exchange.texts:
                fields |= {"model": exchange.model, "texts": exchange.texts, "tokens": exchange.tokens}
            logger.info("%s %s %d", exchange.method, exchange.path or "-", exchange.status, extra=fields)


class _Reading:
    """The body of a request, within its time and room; and after it the news that the caller has gone."""

    def __init__(self, gateway: Gateway, exchange: Exchange, receive: Receive, *, has_body: bool) -> None:
        self.is_gone = False
        self._gateway = gateway
        self._exchange = exchange
        self._receive = receive
        self._has_body = has_body
        self._is_read = False
        self._bytes = 0
        self._waited = 0.0
        """Seconds that were spent waiting for parts of the body."""
        self._gone = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._task = asyncio.current_task()

    def begin(self) -> None:
        if not self._has_body:
            self._watch = asyncio.create_task(self._watch_for_end())

    def end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    async def receive(self) -> Message:
        if not self._has_body and not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        if self._is_read:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._next()
        if message["type"] == "http.disconnect":
            # Whoever reads the body gets a ClientDisconnect, and may note how far it came.
            self._is_read = self.is_gone = True
            self._gone.set()
            return message
        self._bytes += len(message.get("body", b""))
        if self._exchange.hold is not None:
            self._gateway.limits.grow(self._exchange.hold, self._bytes)
        if not message.get("more_body", False):
            self._is_read = True
            self._watch = asyncio.create_task(self._watch_for_end())
        return message

    async def _next(self) -> Message:
        """The next part of the body. Raises :class:`Refusal` if it does not come in time.

        Only the time that was spent waiting for the caller counts, because a job is enqueued while its body comes.
        """
        seconds = self._gateway.settings.gateway_body_seconds
        if not self._exchange.bounds_body:
            seconds += self._bytes / SLOWEST_BYTES
        begun = time.monotonic()
        try:
            async with asyncio.timeout(seconds - self._waited):
                return await self._receive()
        except TimeoutError:
            said = f"the body did not come within {self._gateway.settings.gateway_body_seconds:g} seconds."
            raise Refusal(408, "body_too_slow", said, headers={"connection": "close"}) from None
        finally:
            self._waited += time.monotonic() - begun

    async def _watch_for_end(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._exchange.has_ended:
            return
        self.is_gone = True
        self._gone.set()
        if self._task is not None:
            self._task.cancel()


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _name_of(host: str) -> str:
    """``host`` without its port, as ``localhost`` or ``[::1]``."""
    name = host.lower()
    return name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]


def _result(exchange: Exchange) -> str:
    if exchange.status == GONE:
        return "gone"
    if exchange.status == 429:
        return "limited"
    if exchange.status >= 500 or not exchange.status:
        return "failed"
    return "refused" if exchange.status >= 400 else "ok"


def _key_class(exchange: Exchange) -> str:
    return metrics.OTHER if exchange.caller.key_id is None else "key"
