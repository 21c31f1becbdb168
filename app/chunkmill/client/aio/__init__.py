"""The producer's API for asyncio."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Literal

from chunkmill.client import Client
from chunkmill.client.aio.batcher import AsyncBatcher
from chunkmill.client.aio.calls import Call
from chunkmill.client.aio.golden import AsyncGoldenQueries
from chunkmill.client.aio.threads import Threads
from chunkmill.client.aio.verbs import AsyncVerbs
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import InvalidInput

__all__ = ["AsyncBatcher", "AsyncClient", "AsyncGoldenQueries"]


class AsyncClient(AsyncVerbs):
    """A :class:`Client` for asyncio: every method is a coroutine, and none blocks the event loop.

    ``AsyncClient(client)`` takes a client over and closes it in the end; :meth:`connect` and :meth:`from_env` make the
    client too. ``async with`` closes it. Iterables may be asynchronous too, and are read no faster than they are
    enqueued. A synchronous iterable runs in a thread. ``on_progress`` and ``on_hindrance`` are called in the loop, and
    may be coroutine functions. Context variables, and so traces, are the same as in code without threads.

    A call whose task is cancelled, for example by ``asyncio.timeout``, ends at its next pause, chunk or transaction,
    and the task ends after the call. Then nothing of the call runs any more, its connection is given back, and a
    request to a worker is withdrawn. What an enqueue has committed stays; the same ``idempotency_key`` completes it.

    Searches, ``embed`` and ``wait`` take a thread and a connection only for moments, so that hundreds of them may wait
    at a time. Five other long calls, such as enqueues, run at a time, and further ones wait. An AsyncClient may be used
    in several event loops and from several threads. A process that is forked from one with an AsyncClient may use it in
    an event loop of its own. If the interpreter ends while a call runs, the call ends as in a process that is killed.

    Raises :class:`InvalidInput` if ``client`` is no :class:`Client`.
    """

    def __init__(self, client: Client) -> None:
        if not isinstance(client, Client):
            raise InvalidInput(
                f"client is of type {type(client).__name__}; it must be a Client, as in "
                "AsyncClient(Client(…)). For one of the environment's settings call: await AsyncClient.from_env()"
            )
        super().__init__(client)

    def batcher(
        self,
        collection: str,
        *,
        max_chunks: int = 1_000,
        max_bytes: int = 8 * 1024 * 1024,
        max_seconds: float = 5.0,
        timeout: float = 60.0,
        model: str | None = None,
        route: Route | str = Route.AUTO,
        priority: Priority | str = Priority.NORMAL,
        on_long: OnLong | str = OnLong.TRUNCATE,
        on_invalid: Literal["raise", "skip"] = "raise",
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        deadline: timedelta | float | None = None,
    ) -> AsyncBatcher:
        """Gather chunks that come one at a time: ``async with client.batcher("docs") as add``, then ``await add(…)``.

        :meth:`Client.batcher` describes the arguments. ``async with`` checks them.
        """
        make = partial(
            self._client.batcher, collection,
            max_chunks=max_chunks, max_bytes=max_bytes, max_seconds=max_seconds, timeout=timeout, model=model,
            route=route, priority=priority, on_long=on_long, on_invalid=on_invalid, dimensions=dimensions,
            precision=precision, deadline=deadline,
        )  # fmt: skip
        return AsyncBatcher(self, partial(self._short, make))

    async def golden(self, collection: str) -> AsyncGoldenQueries:
        """The golden queries of a collection: queries whose answers are known."""
        return AsyncGoldenQueries(self, await self._short(self._client.golden, collection))

    @classmethod
    async def from_env(cls) -> AsyncClient:
        """A client for ``DATABASE_URL`` and ``REDIS_URL``, as :meth:`Client.from_env` makes it, which says what it
        raises."""
        return await cls.connect()

    @classmethod
    async def connect(
        cls, *, database_url: str | None = None, redis_url: str | None = None, **settings: object
    ) -> AsyncClient:
        """A client for these servers and with these settings, which are the arguments of :class:`Client`."""
        threads = Threads("chunkmill-opener", 1)
        made: list[Client] = []

        def open_client() -> None:
            made.append(Client(database_url=database_url, redis_url=redis_url, **settings))

        try:
            await Call().in_thread(threads, open_client)
        except BaseException:
            for client in made:
                client.close()
            raise
        finally:
            threads.close()
        return cls(made[0])

    def __repr__(self) -> str:
        """One line with the servers, without their passwords."""
        return f"Async{self._client!r}"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
