"""How the verbs of an ``AsyncClient`` run: the waiting in the event loop, and the rest in a few threads."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.client.aio.calls import Call, Sink, Source, ended
from chunkmill.client.aio.threads import Threads
from chunkmill.client.asking import sockets
from chunkmill.client.asking.lookups import Lookups
from chunkmill.client.door import DOOR_ERRORS, door, translated
from chunkmill.client.steps import PauseStep, Steps, TellStep, WaitStep, WorkStep
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.results import Hits
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.errors import ClientClosed

Given = ParamSpec("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _WorkResult(Generic[Result]):
    result: Result


class RunningCalls:
    """The calls of an ``AsyncClient``, and its threads.

    There are as many threads as connections, in two halves. Short transactions have the one half. Calls that hold a
    connection while they read from the loop or hand items to it have the other. So a source of chunks may itself search
    with the same client, and so may a caller in the middle of reading vectors.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """Begin with no call and no thread: at first, and in a child process, which has none of its parent's."""
        half = _connections(self._client._db) // 2
        self._short_threads = Threads("chunkmill-short", half)
        self._long_threads = Threads("chunkmill-long", half)
        # If an AsyncClient is never closed, its threads end with it.
        weakref.finalize(self, self._short_threads.close)
        weakref.finalize(self, self._long_threads.close)
        self._mutex = threading.Lock()
        self._calls: set[Call] = set()
        self._is_closed = False
        self._all_ended: Future[None] = Future()
        self._lookups: Lookups | None = None

    async def _short(self, method: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """A call of a few transactions."""
        call = self._new_call()
        try:
            return await call.in_thread(self._short_threads, partial(method, *args, **kwargs), stoppable=True)
        finally:
            self._end(call)

    async def _long(self, method: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
        """A call that may take minutes. Asynchronous iterables and functions among its arguments run in the loop."""
        call = self._new_call()
        sources: list[Source[Any]] = []

        def adapted(argument: Any) -> Any:
            if isinstance(argument, AsyncIterable):
                sources.append(Source(call, argument))
                return sources[-1]
            return call.told(argument) if callable(argument) else argument

        given = [adapted(argument) for argument in args]
        named = {name: adapted(argument) for name, argument in kwargs.items()}
        try:
            return await call.in_thread(self._long_threads, partial(method, *given, **named), stoppable=True)
        finally:
            for source in sources:
                await source.close()
            self._end(call)

    async def _wait(self, steps: Steps[Result]) -> Result:
        """A call that waits: each of its steps takes a thread, and its pauses take none."""
        call = self._new_call()
        threads, db = self._short_threads, self._client._db
        error: BaseException | None = None
        is_over = False
        try:
            while True:
                try:
                    step = await call.in_thread(threads, partial(_advance, db, steps, error))
                except Exception:
                    is_over = True  # the steps raised it
                    raise
                if isinstance(step, _WorkResult):
                    is_over = True
                    return step.result
                error = None
                try:
                    await call.perform(step)
                except Exception as raised:  # noqa: BLE001 - the steps take back what they asked for, and raise it
                    error = raised
        finally:
            if not is_over:
                # The task was cancelled during a pause or a step.
                await ended(asyncio.wrap_future(threads.submit(steps.close)))
            self._end(call)

    def _live_in_loop(self) -> None:
        """Let :meth:`_embed_in_loop` be called in the running loop, in which this client is to be closed."""
        self._lookups = Lookups(self._client._db)
        if self._client._settings.worker_socket != "off":
            sockets.live_in_loop(self._client._db)

    async def _embed_in_loop(
        self, texts: Sequence[str], spec: SpaceSpec, *, kind: Literal["document", "query"], timeout: float, caller: str
    ) -> EmbeddedTexts:
        """``embed_texts`` for few texts, of which some may be blank: it takes a thread only for what may block.

        The loop itself looks into the store and asks workers at their sockets, so that a text costs no switch between
        threads.
        """
        steps = self._client._embed_few_steps(
            texts, spec, kind=kind, timeout=timeout, caller=caller, lookups=self._lookups
        )
        call = self._new_call()
        error: BaseException | None = None
        is_over = False
        try:
            while True:
                try:
                    step = next(steps) if error is None else steps.throw(error)
                except StopIteration as end:
                    is_over = True
                    embedded: EmbeddedTexts = end.value
                    return embedded
                except DOOR_ERRORS as raised:
                    is_over = True
                    raise translated(str(self._client._db.url), raised) from raised
                except Exception:
                    is_over = True
                    raise
                error = None
                try:
                    if not isinstance(step, WorkStep):
                        await call.perform(step)
                    elif step.is_awaited:
                        step.result = await call.in_thread(self._short_threads, step.function)
                    else:
                        self._short_threads.submit(step.function)
                except Exception as raised:  # noqa: BLE001 - the steps take back what they asked for, and raise it
                    error = raised
        finally:
            if not is_over:
                await ended(asyncio.wrap_future(self._short_threads.submit(steps.close)))
            self._end(call)

    async def _search_and_tell(
        self, tell: Callable[[EmbeddedTexts], object], query: Any, **asked: Any
    ) -> Hits | list[Hits]:
        """``search``, which gives ``tell`` the vectors of the queries, in each space in which they were embedded."""
        return await self._wait(self._client._search_steps(query, tell=tell, **asked))

    async def _items(
        self, method: Callable[Given, Iterator[Item]], *args: Given.args, **kwargs: Given.kwargs
    ) -> AsyncGenerator[Item, None]:
        """The items of a call that hands them out one after the other."""
        call = self._new_call()
        sink = Sink(call, self._long_threads, partial(method, *args, **kwargs), partial(self._end, call))
        try:
            async for item in sink:
                yield item
        finally:
            await sink.close()

    @staticmethod
    async def _gathered(items: Iterable[Item] | AsyncIterable[Item]) -> Iterable[Item]:
        """The items of an asynchronous iterable, which are all needed at once; any other one as it is."""
        return [item async for item in items] if isinstance(items, AsyncIterable) else items

    async def close(self) -> None:
        """End the calls that run, wait for them, and close the connections.

        These calls raise :class:`ClientClosed`, unless they complete at this moment. The embedded stack stays up for
        the next caller.
        """
        with self._mutex:
            calls = list(self._calls)
            if not self._is_closed and not calls:
                self._all_ended.set_result(None)
            self._is_closed = True
        for call in calls:
            call.stop(closed=True)
        await asyncio.shield(asyncio.wrap_future(self._all_ended))
        if self._lookups is not None:
            await self._lookups.close()
        closer = Threads("chunkmill-closer", 1)
        closing = asyncio.wrap_future(closer.submit(self._client.close))
        closer.close()
        self._short_threads.close()
        self._long_threads.close()
        await asyncio.shield(closing)

    def _new_call(self) -> Call:
        call = Call()
        with self._mutex:
            if self._is_closed:
                raise ClientClosed("the AsyncClient is closed. Make another one with AsyncClient.from_env().")
            self._calls.add(call)
        return call

    def _end(self, call: Call) -> None:
        with self._mutex:
            self._calls.discard(call)
            if self._is_closed and not self._calls and not self._all_ended.done():
                self._all_ended.set_result(None)


def _advance(
    db: sa.Engine, steps: Steps[Result], error: BaseException | None
) -> PauseStep | WaitStep | TellStep | _WorkResult[Result]:
    """The next step for the loop, after ``error`` was raised by the last one. A future cannot hold the end of a
    generator."""
    with door(db):
        try:
            while True:
                step = next(steps) if error is None else steps.throw(error)
                error = None
                if not isinstance(step, WorkStep):
                    return step
                try:
                    step.result = step.function()
                except BaseException as raised:  # noqa: BLE001 - the steps raise it, or know what to do
                    error = raised
        except StopIteration as end:
            return _WorkResult(end.value)


def _connections(db: sa.Engine) -> int:
    """How many connections the pool has at most."""
    pool = db.pool
    return max(2, pool.size() + max(0, pool._max_overflow)) if isinstance(pool, sa.QueuePool) else 2


_all: weakref.WeakSet[RunningCalls] = weakref.WeakSet()


def _begin_in_child() -> None:
    for running in list(_all):
        running._begin()


os.register_at_fork(after_in_child=_begin_in_child)
