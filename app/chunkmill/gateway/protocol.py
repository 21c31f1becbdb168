"""HTTP/1.1 on one connection: uvicorn's, with bounds on what comes before a request is known to the application.

A head of a request has a size and a time, connections have a number, and what is no HTTP gets an answer in JSON.
"""

from __future__ import annotations

import asyncio
import http
import logging
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.exchange import new_request_id

logger = logging.getLogger(__name__)

MOST_HEAD_BYTES = 16 * 1024
"""The first line and the headers together."""
HEAD_SECONDS = 10.0
"""How long they may take, from the connection or from their first byte on."""
LINGER_SECONDS = 5.0
"""How long the rest of a body is read and dropped after the answer, so that its sender gets to read that."""


class GatewayProtocol(HttpToolsProtocol):
    """One connection too many ends the one that has been without a request for the longest time; if all have one, it is
    refused. Each server makes a class of its own with :meth:`bounded`."""

    most_connections: ClassVar[int] = 4096
    idle: ClassVar[dict[GatewayProtocol, None]] = {}
    """The connections of this server that have no request, the oldest first."""

    @classmethod
    def bounded(cls, most_connections: int) -> type[GatewayProtocol]:
        return type("BoundedProtocol", (cls,), {"most_connections": most_connections, "idle": {}})

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._is_in_head = True
        self._is_refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._pending = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections and not self._evict():
            message = "this gateway has as many connections as it may have. Try again later."
            self._refuse(Refusal(503, "too_many_connections", message, retry_after=1.0))
            return
        self.idle[self] = None
        self._start_timer(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._is_in_head:
            if not self._head_bytes:
                self._start_timer(HEAD_SECONDS, self._head_is_late)
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES and b"\n\r\n" not in data:
                # The parser would keep a header without an end in memory.
                self._refuse(_too_large())
                return
        # As uvicorn does it, but without a warning for whatever strangers send.
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(Refusal(400, "invalid_request", "this is not a valid HTTP request."))
        except httptools.HttpParserUpgrade:
            pass  # the request was answered as one without an upgrade

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._pending = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._head_bytes = 0
        self._stop_timer()
        self.idle.pop(self, None)
        if self._is_refused:
            return
        if self._pending > MOST_HEAD_BYTES:
            self._refuse(_too_large())
            return
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() != "1.0"):
            self._refuse(Refusal(400, "invalid_request", "a request must have one Host header."))
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_refused:
            return
        self._stop_timer()
        self._is_in_head = True
        self._head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self.pipeline and self.cycle.response_complete:
            self.idle[self] = None
        if not self.transport.is_closing() and not self._is_in_head:
            self._start_timer(LINGER_SECONDS, self.transport.close)

    def _count(self, n_bytes: int) -> None:
        self._pending += n_bytes

    def _evict(self) -> bool:
        oldest = next(iter(self.idle), None)
        if oldest is None:
            return False
        del self.idle[oldest]
        self.connections.discard(oldest)
        oldest.transport.close()
        return True

    def _head_is_late(self) -> None:
        if not self._head_bytes:
            self.transport.close()  # nobody asked anything
        else:
            self._refuse(Refusal(408, "headers_too_slow", f"the headers did not come within {HEAD_SECONDS:g} seconds."))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer and end the connection. Nothing that still comes is looked at."""
        if self._is_refused:
            return
        self._is_refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._is_in_head or cycle.response_started:
                # A request of this connection is being answered, and nothing may come between.
                self.transport.close()
                return
            # This is the body of a request that nobody has answered yet. The application hears that the caller left.
            cycle.disconnected = True
            cycle.message_event.set()
        reply = refusal.reply()
        lines = [f"HTTP/1.1 {refusal.status} {http.HTTPStatus(refusal.status).phrase}".encode()]
        headers = [*reply.raw_headers, (b"x-request-id", new_request_id().encode()), (b"connection", b"close")]
        lines += [name + b": " + value for name, value in headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(reply.body)]))
        logger.info("refused a request before it was whole (%s)", refusal.code)
        if refusal.code == "too_many_connections" or not self.transport.can_write_eof():
            self.transport.close()
            return
        # With a close, what is still unread would make the kernel drop the answer too.
        self.transport.write_eof()
        self.flow.resume_reading()
        self._start_timer(LINGER_SECONDS, self.transport.close)

    def _start_timer(self, seconds: float, function: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, function)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _too_large() -> Refusal:
    message = f"the first line and the headers of a request may have {MOST_HEAD_BYTES:,} bytes together."
    return Refusal(431, "headers_too_large", message)
