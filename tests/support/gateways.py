"""A gateway on a real socket, and a stand-in for the worker behind it, which needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial

import httpx2
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db, raw
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.keys import KeyRing, OneKey
from chunkmill.gateway.server import GatewayServer
from chunkmill.ledger import embed_requests
from chunkmill.monitor import reports
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.support.waiting import PATIENCE, until

KEY = "cmk_of_the_tests"


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """``url`` is ``http://127.0.0.1:PORT``. ``http`` sends the key; paths are relative to ``url``."""

    gateway: Gateway
    url: str
    key: str
    http: httpx2.Client

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for a test that needs the socket itself."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def client(self, key: str | None) -> httpx2.Client:
        """A client that sends another key, or none. The caller closes it."""
        return _client(self.url, key)


@contextlib.contextmanager
def running_gateway(
    settings: Settings,
    *,
    keys: KeyRing | None = None,
    make: Callable[..., Gateway] = Gateway.over,
    endpoints: Sequence[Endpoint] | None = None,
) -> Iterator[RunningGateway]:
    """A gateway over the database of ``settings``, served by uvicorn in a thread. It ends with the block.

    Without ``keys`` it takes ``KEY``, which may do everything. ``make`` builds the gateway from a client, its engine,
    the settings and the keys. Without ``endpoints`` it has all of them.
    """
    db = create_db(settings.require_database_url(), role="client")
    gateway = make(Client(db, Broker.connect(settings), settings), db, settings, keys or OneKey(KEY))
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = GatewayServer(gateway, endpoints=endpoints)
    thread = threading.Thread(target=partial(server.run, sockets=[listening]), name=f"gateway {url}", daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), pause=0.005)
        assert server.started, "the gateway did not start"
        with _client(url, KEY) as http:
            yield RunningGateway(gateway, url, KEY, http)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listening.close()
        db.dispose()  # what a thread opened that outlived its request


def _client(url: str, key: str | None) -> httpx2.Client:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    # Without one of its own, each client would read the certificates of all authorities: 30 ms.
    return httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False, verify=_trusting_nobody())


@cache
def _trusting_nobody() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def vector_of(text: str, kind: str, dimensions: int) -> NDArray[np.float32]:
    """``(d,)`` float32 of length 1, which is another one for every text, kind and size."""
    seed = int.from_bytes(hashlib.sha256(f"{kind}\0{dimensions}\0{text}".encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32)
    return vector / np.linalg.norm(vector)  # type: ignore[no-any-return]


def tokens_of(text: str) -> int:
    """How many tokens the stand-in says that a text has: its words, and two more."""
    return len(text.split()) + 2


class StandInWorker(threading.Thread):
    """Answers embed requests with :func:`vector_of` and :func:`tokens_of`, and reports like a worker.

    A text of more than the space's ``max_tokens`` tokens is said to be cut. Requests wait while ``may`` is not set, and
    ``fails`` is the error that they then get instead of vectors. ``asked`` has the texts of each request, in order.
    While ``is_silent`` it reports nothing.
    """

    NAME = "stand-in"

    def __init__(self, db: sa.Engine) -> None:
        super().__init__(name="stand-in worker", daemon=True)
        self.may = threading.Event()
        self.may.set()
        self.fails: str | None = None
        self.asked: list[tuple[str, ...]] = []
        self.is_silent = False
        self._ends = threading.Event()
        self._db = db

    def run(self) -> None:
        with self._db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(sa.text(f"LISTEN {embed_requests.CHANNEL}"))
            try:
                reported_at = 0.0
                while not self._ends.is_set():
                    if not self.is_silent and time.monotonic() - reported_at >= reports.REPORT_SECONDS:
                        self.report()
                        reported_at = time.monotonic()
                    if self.may.is_set():
                        while self._answer_next():
                            pass
                    for _ in raw(conn).notifies(timeout=0.05, stop_after=1):
                        pass
            finally:
                conn.invalidate()

    def report(self) -> None:
        """Write the row that says that the worker lives."""
        with self._db.begin() as conn:
            reports.write(
                conn,
                reports.Report(
                    name=self.NAME,
                    kind="local",
                    label=f"{self.NAME}@here",
                    device="cpu",
                    started_at=datetime.now(UTC),
                    window_seconds=60.0,
                    contents=0,
                    tokens=0,
                    padded_tokens=0,
                    engine_seconds=0.0,
                    held=0,
                ),
            )

    def end(self) -> None:
        self._ends.set()
        self.join(PATIENCE)

    def _answer_next(self) -> bool:
        with self._db.begin() as conn:
            request = embed_requests.claim_next(conn)
            if request is None:
                return False
            self.asked.append(request.texts)
            if self.fails is not None:
                embed_requests.refuse(conn, request, self.fails)
                return True
            spec = registry.get(conn, request.space_id).spec
            counts = np.array([tokens_of(text) for text in request.texts], np.int32)
            vectors = np.stack([vector_of(text, request.kind, spec.dimensions) for text in request.texts])
            embed_requests.answer(
                conn, request.id, vectors, np.minimum(counts, spec.max_tokens), counts > spec.max_tokens
            )
        return True


@contextlib.contextmanager
def stand_in_worker(db: sa.Engine) -> Iterator[StandInWorker]:
    """A stand-in that has reported and answers; it ends with the block."""
    worker = StandInWorker(db)
    worker.report()
    worker.start()
    try:
        yield worker
    finally:
        worker.end()
