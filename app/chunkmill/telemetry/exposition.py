"""Serves ``/metrics`` of one process in the text format of Prometheus. Each process is a target of its own."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from chunkmill.errors import InvalidSetting, install_command
from chunkmill.settings import Settings
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS, Counts
from chunkmill.telemetry.metrics import METRICS, Kind, Role

logger = logging.getLogger(__name__)

PORTS = 32
"""How many ports are tried, from METRICS_PORT on: as many processes of one machine can serve metrics."""

MOST_CONNECTIONS = 16
REQUEST_SECONDS = 10.0
"""How long a request may take. A client that sends a byte now and then must not keep a thread."""


@dataclass(frozen=True, slots=True)
class Process:
    """What ``chunkmill_process_info`` says about this process."""

    roles: frozenset[Role]
    name: str
    label: str = ""
    device: str = ""


class MetricsServer:
    """Serves the metrics in threads of its own. A scrape reads the counts, and asks no other server."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self.port = int(server.server_address[1])
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, settings: Settings, process: Process, counts: Counts = COUNTS) -> MetricsServer | None:
        """Start a server, or return None if METRICS_PORT is 0. Raises :class:`InvalidSetting`.

        It takes the first free port from METRICS_PORT on, because a machine may run several processes, and logs it.
        """
        if not settings.metrics_port:
            return None
        page = _page(process, counts)
        server = _bind(settings.metrics_address, settings.metrics_port, _handler(page))
        made = cls(server)
        logger.info("metrics are served at http://%s/metrics", _address(settings.metrics_address, made.port))
        return made

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """A thread for each connection, but for ``MOST_CONNECTIONS`` and ``REQUEST_SECONDS`` at most.

    A connection too many ends the oldest one: whoever holds connections open loses them, and a scrape, which takes
    milliseconds, is hardly ever the oldest.
    """

    daemon_threads = True
    # With it, two processes could share one port, and a scrape would reach one of them at random.
    allow_reuse_port = False

    def __init__(self, *arguments: Any) -> None:
        self._mutex = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        """Open connections, the oldest first, and when they were made."""
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._mutex:
            while len(self._open) >= MOST_CONNECTIONS:
                self._hang_up(next(iter(self._open)))
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._mutex:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that are too old. ``serve_forever`` calls this twice a second."""
        now = time.monotonic()
        with self._mutex:
            for connection in [one for one, since in self._open.items() if now - since > REQUEST_SECONDS]:
                self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        """End a connection. Its thread, which waits for it, ends too, and closes it."""
        del self._open[connection]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that hangs up is not worth a warning. Everything else is a fault of ours."""
        if isinstance(sys.exception(), ConnectionError | TimeoutError):
            logger.debug("a request for metrics ended early", exc_info=True)
        else:
            logger.exception("a request for metrics failed")


class _Server6(_Server):
    address_family = socket.AF_INET6


def _bind(address: str, first: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    kind = _Server6 if ":" in address else _Server
    for port in range(first, min(first + PORTS, 65536)):
        try:
            return kind((address, port), handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise InvalidSetting(
                    f"metrics cannot be served at {_address(address, port)}: {error.strerror or error}. Fix "
                    "METRICS_ADDRESS or METRICS_PORT. METRICS_PORT=0 turns metrics off."
                ) from None
    raise InvalidSetting(
        f"metrics cannot be served: the {PORTS} ports from METRICS_PORT={first} on are all in use. "
        "Set another METRICS_PORT."
    )


def _address(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _page(process: Process, counts: Counts) -> Any:
    """A function that returns the page of metrics and its content type."""
    try:
        import prometheus_client
        from prometheus_client import core
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4  # from 0.23.1 on
    except ImportError as error:
        raise InvalidSetting(
            f"METRICS_PORT is set, but the package for metrics is not installed, or is too old ({error}). "
            f"Run: {install_command('metrics')}, or unset METRICS_PORT."
        ) from None
    families = {Kind.COUNTER: core.CounterMetricFamily, Kind.GAUGE: core.GaugeMetricFamily}
    counts.set(
        metrics.INFO,
        1,
        "+".join(sorted(process.roles)),
        process.name,
        process.label,
        process.device,
        importlib.metadata.version("chunkmill"),
    )

    class Collector:
        def collect(self) -> Iterator[Any]:
            for metric in METRICS:
                series = counts.series(metric, process.roles)
                if series:
                    names = [label.name for label in metric.labels]
                    family = families[metric.kind](metric.name, metric.help, labels=names)
                    for labels, value in series:
                        family.add_metric(labels, value)
                    yield family

    registry = prometheus_client.CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    prometheus_client.ProcessCollector(registry=registry)  # CPU time, memory and open files of the process

    def page() -> tuple[bytes, str]:
        return prometheus_client.generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4

    return page


def _handler(page: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS
        server_version = "chunkmill"
        sys_version = ""

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(HTTPStatus.NOT_FOUND, "only /metrics is served here")
                return
            body, content_type = page()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in http.server
            """Nothing is logged, because there is a scrape every few seconds."""

    return Handler
