"""The HTTP client below the official one: what a server may make us do, wait for, and keep in memory.

It follows no redirect, asks for no compression and decodes none, reads no more of a body than the request can need,
and gives a whole request one deadline. The HTTP libraries bound each read by itself, so that a server that sends a byte
a second would hold a thread for ever.

openai 3 uses httpx2, and openai 2 uses httpx. This module needs nothing that differs between them.
"""

from __future__ import annotations

import contextlib
import importlib
import ssl
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from chunkmill.errors import ProviderSilent, ProviderStopped
from chunkmill.openai.wire.redaction import clean
from chunkmill.system.certificates import require_certificate_folder

if TYPE_CHECKING:
    from types import ModuleType

LONGEST_ANSWER = 16 * 1024 * 1024
"""Bytes of an answer whose size does not depend on what was sent, such as a page of a list."""
LONGEST_ERROR = 64 * 1024
"""Bytes that are read of a refusal. The rest is left unread, because the status alone says most of it."""
SLOWEST_BYTES_PER_S = 100_000
"""A transfer gets a second for each so many bytes, beside the time that a request gets."""
_PIECE = 64 * 1024  # bytes that are written at a time, so that a server that reads slowly meets the deadline too
_LEAST_S = 0.001  # a socket takes 0 for "do not wait at all"


@dataclass(slots=True)
class Bounds:
    """The bounds of the request that this thread makes now."""

    seconds: float
    """How long the request may still take."""
    longest: int = LONGEST_ANSWER
    """Bytes that its answer may have."""
    status: int | None = None
    """The HTTP status of the answer; None before there is one."""
    deadline: float = 0.0
    """By ``time.monotonic``."""


_now: ContextVar[Bounds | None] = ContextVar("bounds", default=None)


@contextlib.contextmanager
def within(bounds: Bounds) -> Iterator[Bounds]:
    """Bounds what this thread asks for in the block. The time that the block takes is taken from ``seconds``."""
    started = time.monotonic()
    bounds.deadline = started + bounds.seconds
    token = _now.set(bounds)
    try:
        yield bounds
    finally:
        _now.reset(token)
        bounds.seconds -= time.monotonic() - started


def http_client(openai: ModuleType, server: str, timeout_s: float, *, is_https: bool = True) -> Any:
    """A client for ``openai.OpenAI``, whose errors name ``server``.

    Without ``is_https`` it uses no proxy of the environment and trusts no certificate: the client follows no redirect,
    and to read the system's certificates would take 50 ms. Raises what the HTTP library raises if the environment names
    a wrong proxy or certificate.
    """
    httpx = library(openai)
    if is_https:
        require_certificate_folder()

    class BoundedStream(httpx.SyncByteStream):  # type: ignore[misc, name-defined]  # httpx or httpx2
        def __init__(self, inner: Any, longest: int, *, is_error: bool) -> None:
            self._inner = inner
            self._longest = longest
            self._is_error = is_error

        def __iter__(self) -> Iterator[bytes]:
            left = self._longest
            for chunk in self._inner if left else ():
                if len(chunk) > left:
                    if self._is_error:
                        yield chunk[:left]
                        return
                    raise ProviderSilent(
                        f"{server} sent more than {self._longest:,} bytes, which no answer to this request needs"
                    )
                left -= len(chunk)
                yield chunk

        def close(self) -> None:
            self._inner.close()

    def bound(response: Any) -> None:
        bounds = _now.get() or Bounds(timeout_s)
        bounds.status = response.status_code
        if response.is_redirect:
            raise _redirected(server, response)
        is_error, longest = response.status_code >= 400, bounds.longest
        encodings = {word.strip().lower() for word in response.headers.get("content-encoding", "").split(",")}
        if odd := sorted(encodings - {"", "identity"}):
            if not is_error:
                raise ProviderSilent(
                    f"{server} compressed its answer ({clean(odd[0])[:20]}), and identity was asked for. Turn "
                    "compression off on the server, or on the proxy in front of it"
                )
            del response.headers["content-encoding"]
            longest = 0
        if is_error:
            longest = min(longest, LONGEST_ERROR)
        response.stream = BoundedStream(response.stream, longest, is_error=is_error)

    client = openai.DefaultHttpxClient(
        follow_redirects=False,
        timeout=timeout_s,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"response": [bound]},
        trust_env=is_https,
        **({} if is_https else {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}),
    )
    within_deadlines(client)
    return client


def within_deadlines(client: Any) -> None:
    """Let each read and write of a client of httpx or httpx2 obey the deadline of :func:`within`."""
    wrap_backends(client, _Backend)


def wrap_backends(client: Any, wrap: Callable[[Any], Any]) -> None:
    """Let a client of httpx or httpx2 make its connections by what ``wrap`` makes of its network backends."""
    for transport in (client._transport, *client._mounts.values()):
        # A mount of None goes past the proxies. The names are private: a test sees whether they are still there.
        pool: Any = getattr(transport, "_pool", None)
        if hasattr(pool, "_network_backend"):
            pool._network_backend = wrap(pool._network_backend)


def library(openai: ModuleType) -> ModuleType:
    """The HTTP library that the installed ``openai`` uses: ``httpx2`` or ``httpx``."""
    names = (base.__module__.partition(".")[0] for base in openai.DefaultHttpxClient.__mro__)
    return importlib.import_module(next(name for name in names if name.startswith("httpx")))


def _redirected(server: str, response: Any) -> ProviderStopped:
    """A redirect is not followed: the texts would go to an address that nobody has named."""
    try:
        host = urlsplit(response.headers.get("location", "")).hostname
    except ValueError:
        host = None
    place = f"host {clean(host)[:100]!r}" if host else "another address"
    return ProviderStopped(
        f"{server} answered {response.status_code}, a redirect to {place}, which is not followed",
        advice="Set OPENAI_BASE_URL to the address that answers itself, then: chunkmill lanes resume",
        provider_code="redirect",
    )


class _Backend:
    """A network backend of httpcore whose streams obey the deadline of the request under way."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **more: Any) -> _Stream:
        return _Stream(self._inner.connect_tcp(host, port, timeout=_left(timeout), **more))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Stream:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._inner.read(max_bytes, timeout=_left(timeout))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _PIECE):
            self._inner.write(buffer[start : start + _PIECE], timeout=_left(timeout))

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout=_left(timeout)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _left(timeout_s: float | None) -> float | None:
    """Seconds that one read or write may wait: what the library asks for, or what is left of the request's time."""
    bounds = _now.get()
    if bounds is None:
        return timeout_s
    left = max(_LEAST_S, bounds.deadline - time.monotonic())
    return left if timeout_s is None else min(timeout_s, left)
