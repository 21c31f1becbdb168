"""HTTP by hand over a socket, for what no client would send."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.support.waiting import PATIENCE


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What came back on a connection: the first answer, and whether the server closed the connection after it."""

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)


def head(
    method: str, path: str, key: str | None, headers: Iterable[tuple[str, str]] = (), host: str = "127.0.0.1"
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def post(path: str, key: str | None, body: bytes, *headers: tuple[str, str]) -> bytes:
    """A whole request with a body of JSON."""
    given = [("Content-Length", str(len(body))), *headers]
    if not any(name.lower() == "content-type" for name, _ in given):
        given.append(("Content-Type", "application/json"))
    return head("POST", path, key, given) + body


def read_answer(connection: socket.socket) -> RawAnswer:
    """The first answer. Raises :class:`ConnectionError` if the connection ends before it does."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _some(connection)
    top, _, body = received.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", "0"))
    while len(body) < length:
        body += _some(connection)
    return RawAnswer(int(first.split()[1]), headers, body[:length], body[length:])


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends the connection. It waits for that, or for more bytes."""
    try:
        return not connection.recv(1)
    except ConnectionError:
        return True


def _some(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise ConnectionError("the connection ended before the answer did")
    return part
