"""Servers that do what a test says, and both remote clients behind one face."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import contextvars
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from chunkmill.remote import AsyncRemoteClient, RemoteClient
from tests.support.gateways import vector_of

KEY = "cmk_secret_of_this_test"
SPACE = "a" * 64


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as the server got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Said:
    """What the server answers. ``raw`` is sent in place of an HTTP answer, and then the connection is closed."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None


HANGS_UP = Said(raw=b"")


def refusal(status: int, code: str, *, retry: bool | None = None, after_ms: int | None = None, **more: Any) -> Said:
    headers = {} if retry is None else {"x-should-retry": "true" if retry else "false"}
    if after_ms is not None:
        headers |= {"retry-after-ms": str(after_ms), "retry-after": "1"}
    error = {"message": f"refused as {code}", "type": "t", "param": None, "code": code, **more}
    return Said(status, json.dumps({"error": error}).encode(), headers)


def embedded(asked: Asked, *, space: str = SPACE, dimensions: int = 8, **headers: str) -> Said:
    """The vectors of the stand-in worker, in the form of OpenAI's API."""
    body = asked.json
    data = []
    for i, text in enumerate(body["input"]):
        vector = vector_of(text, body["kind"], dimensions).astype("<f4")
        data.append(
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(vector.tobytes()).decode(),
            }
        )
    rest = {
        "tokens": [len(text.split()) + 2 for text in body["input"]],
        "truncated": [i for i, text in enumerate(body["input"]) if len(text) > 30],
    }
    said = json.dumps({"object": "list", "data": data, "model": "m", **rest}).encode()
    return Said(200, said, {"x-chunkmill-fingerprint": space, **headers})


class Scripted:
    """A server whose answers come from ``answer``. ``asked`` has the requests in the order in which they came."""

    def __init__(self, url: str, answer: Callable[[Asked], Said]) -> None:
        self.url = url
        self.answer = answer
        self.asked: list[Asked] = []

    def paths(self) -> list[str]:
        return [f"{asked.method} {asked.path.partition('?')[0]}" for asked in self.asked]


@contextlib.contextmanager
def scripted(answer: Callable[[Asked], Said]) -> Iterator[Scripted]:
    """A server on a real socket that answers what ``answer`` returns."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(self.command, self.path, headers, self._body(headers))
            server_side.asked.append(asked)
            said = server_side.answer(asked)
            if said.raw is not None:
                self.wfile.write(said.raw)
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(said.status)
            for name, value in {"content-length": str(len(said.body)), **said.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said.body)

        do_GET = do_POST = do_DELETE = handle_any  # noqa: N815 - the names that http.server calls

        def _body(self, headers: dict[str, str]) -> bytes:
            if headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(headers.get("content-length", 0)))
            body = b""
            while size := int(self.rfile.readline() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients hang up in these tests

    server = Server(("127.0.0.1", 0), Handler)
    server_side = Scripted(f"http://127.0.0.1:{server.server_address[1]}", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server_side
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Remote:
    """One of the two clients. Its methods are run to their end, and what hands items out becomes a list."""

    def __init__(self, kind: str, url: str, key: str = KEY, **options: Any) -> None:
        self.kind = kind
        self._runner = asyncio.Runner() if kind == "async" else None
        self.client: Any = (AsyncRemoteClient if self._runner else RemoteClient)(url, key, **options)

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        method = getattr(self.client, verb)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._runner is None:
                result = method(*args, **kwargs)
                return list(result) if hasattr(result, "send") else result

            async def main() -> Any:
                result = method(*args, **kwargs)
                return [item async for item in result] if hasattr(result, "asend") else await result

            # A runner would else keep the context, and with it the span, of its first call.
            return self._runner.run(main(), context=contextvars.copy_context())

        return call

    def close(self) -> None:
        if self._runner is None:
            self.client.close()
        else:
            self._runner.run(self.client.close())
            self._runner.close()


@contextlib.contextmanager
def remote(kind: str, url: str, key: str = KEY, **options: Any) -> Iterator[Remote]:
    client = Remote(kind, url, key, **options)
    try:
        yield client
    finally:
        client.close()


def same(first: Any, second: Any) -> bool:
    """Whether two results are equal, also if there are arrays in them."""
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and first.shape == second.shape and bool((first == second).all())
    return bool(first == second)
