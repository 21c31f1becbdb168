"""A TCP proxy in front of Postgres that cuts a connection at a chosen message, before or after the server sees it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import sqlalchemy as sa

from tests.support.waiting import PATIENCE


@dataclass
class Cut:
    """Cut when a client sends ``words``. With ``answer_lost`` the server gets them, but the client gets no answer."""

    words: bytes
    answer_lost: bool
    times: int = 1
    struck: int = 0


@dataclass
class CuttingProxy:
    """A proxy on a free port of the loopback. ``url`` leads through it to the database."""

    server: str
    listener: socket.socket
    url: str
    cut: Cut | None = None
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(self.server)
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            while data := client.recv(65_536):
                cut = self._strikes(data)
                if cut is None:
                    server.sendall(data)
                    continue
                if cut.answer_lost:
                    _shut(client)  # before the server can answer
                    server.sendall(data)
                    server.shutdown(socket.SHUT_WR)
                    back.join(PATIENCE)  # when the server hangs up, it has executed the message
                # close() alone is not enough, because a thread that waits for the socket keeps it open.
                _shut(client)
                _shut(server)
                return
            _shut(server)

    def _strikes(self, data: bytes) -> Cut | None:
        with self._mutex:
            cut = self.cut
            if cut is None or cut.struck >= cut.times or cut.words not in data:
                return None
            cut.struck += 1
            return cut


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            with contextlib.suppress(OSError):  # the client is cut off, and the server continues to its end
                target.sendall(data)
        _shut(target)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def cutting_proxy(database_url: str) -> Iterator[CuttingProxy]:
    url = sa.make_url(database_url)
    socket_folder = str(url.query["host"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        behind = url.set(host="127.0.0.1", port=port, query={"sslmode": "disable"})
        proxy = CuttingProxy(
            f"{socket_folder}/.s.PGSQL.{url.port or url.query.get('port', 5432)}",
            listener,
            behind.render_as_string(hide_password=False),
        )
        threading.Thread(target=proxy.serve, daemon=True).start()
        try:
            yield proxy
        finally:
            listener.shutdown(socket.SHUT_RDWR)
