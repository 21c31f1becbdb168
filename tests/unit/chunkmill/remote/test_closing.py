"""A client that is closed while a call of another thread or task is under way leaves no connection open."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chunkmill.errors import ChunkmillError, GatewayUnavailable, WaitTimeout
from chunkmill.remote import AsyncRemoteClient, RemoteClient
from tests.support.remotes import KEY, Asked, Said, refusal, scripted
from tests.support.waiting import PATIENCE

CALLS: dict[str, tuple[Said, Callable[[Any], Any]]] = {
    "fails": (refusal(503, "overloaded"), lambda one: one.keywords("docs")),
    "is refused": (refusal(404, "not_found"), lambda one: one.keywords("docs")),
    "succeeds": (Said(body=b'{"keywords": null}'), lambda one: one.keywords("docs")),
    "streams, and ends too early": (Said(body=b""), lambda one: one.vectors("docs")),
    "streams, and fails": (refusal(503, "overloaded"), lambda one: one.vectors("docs")),
}


class Gate:
    """Holds the calls that look for the address of a server, until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._getaddrinfo = socket.getaddrinfo

    def getaddrinfo(self, *args: Any, **more: Any) -> Any:
        self.reached.set()
        assert self.opened.wait(PATIENCE)
        return self._getaddrinfo(*args, **more)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr(socket, "getaddrinfo", made.getaddrinfo)
    return made


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    assert [str(one.message) for one in caught] == []


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_connection_that_is_made_while_its_client_is_closed_is_closed_too(kind: str, how: str, gate: Gate) -> None:
    said, call = CALLS[how]

    def answer(asked: Asked) -> Said:
        return said

    with scripted(answer) as server, nothing_left_open():
        url = server.url.replace("127.0.0.1", "localhost")  # whose address is looked for
        (by_threads if kind == "sync" else by_tasks)(url, call, gate)
        assert len(server.asked) == 1


def by_threads(url: str, call: Callable[[Any], Any], gate: Gate) -> None:
    client = RemoteClient(url, KEY)

    def work() -> None:
        with contextlib.suppress(ChunkmillError):
            call(client)

    thread = threading.Thread(target=work)
    thread.start()
    assert gate.reached.wait(PATIENCE)
    client.close()
    gate.opened.set()
    thread.join()


def by_tasks(url: str, call: Callable[[Any], Any], gate: Gate) -> None:
    async def main() -> None:
        client = AsyncRemoteClient(url, KEY)

        async def work() -> None:
            with contextlib.suppress(ChunkmillError):
                await call(client)

        task = asyncio.create_task(work())
        assert await asyncio.to_thread(gate.reached.wait, PATIENCE)
        await client.close()
        gate.opened.set()
        await task

    asyncio.run(main())


@pytest.mark.parametrize("how", ["sync, its time is over", "async, its time is over", "async, it is cancelled"])
def test_a_connection_whose_handshake_is_cut_off_is_closed(how: str) -> None:
    """The server reads what greets it and says nothing, until the test is over."""
    greeted, ends = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, nothing_left_open():

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1)
                greeted.set()
                assert ends.wait(PATIENCE)

        async def ask() -> None:
            async with AsyncRemoteClient(url, KEY, **options) as client:
                task = asyncio.create_task(client.drop_keywords("docs"))  # which is not repeated
                if how == "async, it is cancelled":
                    assert await asyncio.to_thread(greeted.wait, PATIENCE)
                    task.cancel()
                with pytest.raises((asyncio.CancelledError, GatewayUnavailable, WaitTimeout)):
                    await task

        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        options: dict[str, Any] = {
            "timeout": PATIENCE if how == "async, it is cancelled" else 0.05,
            "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        }
        thread = threading.Thread(target=greet)
        thread.start()
        if how.startswith("async"):
            asyncio.run(ask())
        else:
            with RemoteClient(url, KEY, **options) as client, pytest.raises((GatewayUnavailable, WaitTimeout)):
                client.drop_keywords("docs")
        ends.set()
        thread.join()
