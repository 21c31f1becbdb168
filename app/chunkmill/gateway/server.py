"""Runs a gateway: uvicorn with our protocol, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

import uvicorn

from chunkmill.gateway.addresses import LOOPBACK_NAMES, Listeners
from chunkmill.gateway.app import build
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.protocol import GatewayProtocol

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
FILES_BESIDE = 256
"""How many files a gateway needs besides its connections: those to Postgres, models, the log."""


class GatewayServer(uvicorn.Server):
    """Serves a gateway until :meth:`leave`, or SIGTERM or SIGINT in the main thread.

    From then on ``/ready`` says 503 and new requests are refused, and those under way have ``GATEWAY_DRAIN_SECONDS``.
    A second signal ends the process at once: what it had asked workers for ends at its deadline.
    """

    def __init__(
        self, gateway: Gateway, tls: ssl.SSLContext | None = None, endpoints: Sequence[Endpoint] | None = None
    ) -> None:
        self._gateway = gateway
        self._leaving: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            build(gateway, endpoints),
            http=GatewayProtocol.bounded(gateway.settings.gateway_connections),
            ws="none",
            log_config=None,
            access_log=False,
            log_level="warning",  # the gateway itself says when it starts and ends
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
        )
        if tls is not None:
            config.load()
            config.ssl = tls
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            logger.info("the gateway takes requests")

    def leave(self) -> None:
        """Begin the orderly end. It is called in the event loop."""
        if self._leaving is None:
            self._gateway.is_leaving = True
            logger.info("the gateway ends: %d requests are under way", len(self.server_state.tasks))
            self._leaving = asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._gateway.settings.gateway_drain_seconds
        # Refused requests are under way for an instant too, so this looks at those that have begun before.
        under_way = set(self.server_state.tasks)
        if under_way:
            await asyncio.wait(under_way, timeout=max(0.0, deadline - loop.time()))
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at the end, so that an orderly end looked like a kill."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._leaving is not None:
            logger.warning("the gateway ends at once, because it was told to a second time")
            logging.shutdown()
            os._exit(128 + sig)
        self.leave()


def serve(gateway: Gateway, listeners: Listeners, tls: ssl.SSLContext | None = None) -> None:
    """Serve at these sockets until SIGTERM or SIGINT."""
    if listeners.is_loopback or gateway.settings.gateway_hosts:
        gateway.hosts = LOOPBACK_NAMES | (gateway.settings.gateway_hosts or frozenset())
    _allow_files(gateway.settings.gateway_connections + FILES_BESIDE)
    GatewayServer(gateway, tls).run(sockets=list(listeners.sockets))


def _allow_files(wanted: int) -> None:
    """Let this process have so many files open, as far as its hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning(
            "this process may open %d files, and GATEWAY_CONNECTIONS needs %d: raise LimitNOFILE, or ulimit -n",
            allowed,
            wanted,
        )
