"""Asks a cloud's metadata service over plain HTTP. No answer can hang, grow, redirect or come from a proxy."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LINK_LOCAL = "http://169.254.169.254"
"""The address in every cloud. It is a number, because looking up a name has no timeout."""
REQUEST_SECONDS = 5.0
MOST_BYTES = 1 << 20
"""A real answer has a few hundred bytes; Azure lists every machine of a scale set."""


class MetadataError(Exception):
    """The service is away, slow, or answered what it should not. The message quotes nothing of the answer."""


class Aborted(Exception):
    """:meth:`MetadataService.abort` was called."""


class TooLongReply(http.client.HTTPException):
    """More than ``MOST_BYTES``."""


@dataclass(frozen=True, slots=True)
class Reply:
    source: str
    """The request in words, without its query."""
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def unusable(self, why: str) -> MetadataError:
        return MetadataError(f"{self.source} {why}")


class MetadataService:
    """One request at a time, each on a connection of its own. Only :meth:`abort` may be called from other threads."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url
        self.patience = REQUEST_SECONDS
        """Seconds for a whole exchange, unless the request says otherwise."""
        self._host, self._port, self._prefix = parts.hostname or "", parts.port or 80, parts.path.rstrip("/")
        self._socket: socket.socket | None = None
        self._aborted = threading.Event()

    def request(self, method: str, path: str, headers: Mapping[str, str], *, seconds: float | None = None) -> Reply:
        """The answer, whatever its status. Raises :class:`MetadataError` if none came in time, or :class:`Aborted`."""
        source = f"{method} {self.url}{path.partition('?')[0]}"
        deadline = time.monotonic() + (self.patience if seconds is None else seconds)
        connection = http.client.HTTPConnection(self._host, self._port)
        try:
            self._connect(connection, deadline)
            connection.request(method, self._prefix + path, headers=dict(headers))
            with connection.getresponse() as response:
                reply = _read(source, response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if self._aborted.is_set():
                raise Aborted from None
            because = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise MetadataError(f"{source} failed: {because}") from error
        finally:
            connection.close()
        self.pause(0)  # abort() may have cut an answer without a length
        return reply

    def pause(self, seconds: float) -> None:
        """Sleep. Raises :class:`Aborted` as soon as ``abort`` is called."""
        if self._aborted.wait(seconds):
            raise Aborted

    def abort(self) -> None:
        """End the request in hand and all that would follow."""
        self._aborted.set()
        opened = self._socket
        if opened is not None:
            with contextlib.suppress(OSError):  # it is closed already
                opened.shutdown(socket.SHUT_RDWR)

    def _connect(self, connection: http.client.HTTPConnection, deadline: float) -> None:
        """Connect without http.client, which keeps no deadline and shows its socket only when it is connected."""
        failure = OSError("no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM):
            connection.close()
            opened = _DeadlineSocket(family, kind, protocol)
            opened.deadline = deadline
            # abort() sets its flag and then looks for a socket. The order here is the reverse, so one sees the other.
            connection.sock = self._socket = opened
            if self._aborted.is_set():
                raise Aborted
            try:
                opened.settimeout(opened.seconds_left())
                opened.connect(address)
            except OSError as error:
                failure = error
            else:
                return
        raise failure


def _read(source: str, response: http.client.HTTPResponse) -> Reply:
    reply = Reply(source, response.status, response.headers, response.read(MOST_BYTES + 1))
    if len(reply.body) > MOST_BYTES:
        raise TooLongReply
    if response.length:  # read() with a number of bytes does not notice that the rest of the promised length is missing
        raise http.client.IncompleteRead(b"", response.length)
    return reply


class _DeadlineSocket(socket.socket):
    """A socket with a deadline. A timeout is for each read only: an answer of one byte a second would never end."""

    deadline = 0.0

    def seconds_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(self.seconds_left())
        return super().recv_into(buffer, nbytes, flags)
