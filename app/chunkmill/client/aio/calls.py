"""One call of an ``AsyncClient``: where its event loop and its thread meet, and how it ends early."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from functools import partial
from typing import Any, TypeVar

from chunkmill.client.aio.threads import Threads
from chunkmill.client.steps import PauseStep, TellStep, WaitStep
from chunkmill.client.stopping import IS_STOPPED, Stopped
from chunkmill.errors import ClientClosed

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 64
"""How many items are read from a source or from an iterator before they are asked for."""
TOGETHER_S = 0.005
"""For how many seconds items of an iterator are collected before they are handed over together. Handing over takes 0.1
ms or more, and chunks come a hundred times as fast; but no item should wait long for others, and 64 batches of vectors
would take much memory."""


class Call:
    """A call in the running event loop. ``stop`` ends it, from any thread: at its next chunk, transaction or pause.

    All that it runs in threads sees the context variables of the task that made the call.
    """

    def __init__(self) -> None:
        self.is_closed = False
        """The client was closed while the call ran."""
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._stopped: Future[None] = Future()
        self._wake = asyncio.Event()

    def stop(self, *, closed: bool = False) -> None:
        """Let the call end. It is not waited for."""
        self.is_closed = self.is_closed or closed
        if not self._stopped.done():
            self._stopped.set_result(None)
        self._wake_up()

    def _wake_up(self) -> None:
        """End the pause that the call makes, from any thread."""
        if asyncio._get_running_loop() is self._loop:
            self._wake.set()
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed, so nobody waits for this call any more
            self._loop.call_soon_threadsafe(self._wake.set)

    # --- in the event loop -------------------------------------------------------------------------------------

    async def perform(self, step: PauseStep | WaitStep | TellStep) -> None:
        """Make the pause, wait, or call the caller's function, here in the loop.

        Raises :class:`ClientClosed` if the client is closed meanwhile.
        """
        if isinstance(step, PauseStep | WaitStep):
            if isinstance(step, WaitStep):
                step.signal.when_given(self._wake_up)
            try:
                async with asyncio.timeout(step.seconds):
                    await self._wake.wait()
            except TimeoutError:
                pass
            if not self._stopped.done():
                self._wake.clear()  # a call that was stopped makes no further pause
        else:
            await _told(step.function, step.argument)
        if self.is_closed:
            raise _closed()

    async def in_thread(self, threads: Threads, function: Callable[[], Result], *, stoppable: bool = False) -> Result:
        """Run ``function`` in one of the threads.

        If the task is cancelled meanwhile, this returns when the thread is done with it, so that nothing of it runs any
        more. A ``stoppable`` function ends early then, and when the client is closed.
        """
        if stoppable:
            self._context.run(IS_STOPPED.set, self._stopped.done)
        future = threads.submit(partial(self._context.run, function))
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if stoppable:
                self.stop()
            if not future.cancel():  # it is running already
                await ended(waiting)
            raise
        except Stopped:
            if self.is_closed:
                raise _closed() from None
            raise asyncio.CancelledError from None

    # --- in a thread -------------------------------------------------------------------------------------------

    def from_loop(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run ``coroutine`` in the loop and wait for it in a thread. Raises :class:`Stopped` if the call is stopped."""
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop was closed, so nobody waits for this call any more
            coroutine.close()
            raise Stopped from None
        either: list[Future[Any]] = [future, self._stopped]
        wait(either, return_when=FIRST_COMPLETED)
        if self._stopped.done() and future.cancel():
            raise Stopped
        try:
            return future.result()
        except CancelledError:
            raise Stopped from None  # what the coroutine waited for was cancelled, and this call with it

    def told(self, function: Callable[..., object]) -> Callable[..., None]:
        """``function`` as the thread may call it: it runs in the loop, and is awaited if it is asynchronous."""

        def tell(*arguments: object) -> None:
            self.from_loop(_told(function, *arguments))

        return tell


class Source(Iterator[Item]):
    """An asynchronous iterable as the thread of a call reads it. At most ``AHEAD`` items are read ahead."""

    def __init__(self, call: Call, items: AsyncIterable[Item]) -> None:
        self._call = call
        self._items = items
        self._taken: Iterator[Item] = iter(())
        self._pump: asyncio.Task[None] | None = None
        self._ready: list[Item] = []
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()

    def __next__(self) -> Item:
        for item in self._taken:
            return item
        self._taken = iter(self._call.from_loop(self._take()))
        return next(self._taken)

    async def close(self) -> None:
        """Stop reading, because the call has ended."""
        if self._pump is not None:
            self._pump.cancel()
            await ended(self._pump)

    async def _take(self) -> list[Item]:
        """All that is ready, at least one item; an empty list at the end. Raises what the iterable raises."""
        if self._pump is None:
            self._pump = asyncio.create_task(self._read())
        await self._has_news.wait()
        taken, self._ready = self._ready, []
        self._has_room.set()
        if not self._pump.done():
            self._has_news.clear()
        elif not taken:
            await self._pump
        return taken

    async def _read(self) -> None:
        items = aiter(self._items)
        try:
            async for item in items:
                self._ready.append(item)
                self._has_news.set()
                if len(self._ready) == AHEAD:
                    self._has_room.clear()
                    await self._has_room.wait()
        finally:
            try:
                if isinstance(items, AsyncGenerator):
                    await items.aclose()  # this releases what the iterable holds, also if the call ended early
            finally:
                self._has_news.set()


class Sink(AsyncIterator[Item]):
    """An iterator that a thread reads, as an asynchronous one.

    Items are handed over together: up to ``AHEAD`` of them, or those that come within ``TOGETHER_S``. The same number
    is read ahead. ``threads`` have one thread for it from its first item to its end. ``ends`` is called when that is
    over.
    """

    def __init__(
        self, call: Call, threads: Threads, iterate: Callable[[], Iterator[Item]], ends: Callable[[], None]
    ) -> None:
        self._call = call
        self._iterate = iterate
        self._ready: deque[Item] = deque()
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._reading = asyncio.create_task(call.in_thread(threads, self._read, stoppable=True))
        self._reading.add_done_callback(lambda _: self._has_news.set())
        self._reading.add_done_callback(lambda _: ends())

    async def __anext__(self) -> Item:
        if not self._ready:
            await self._has_news.wait()
        if not self._ready:
            await self._reading
            raise StopAsyncIteration
        item = self._ready.popleft()
        if not self._ready:
            self._has_room.set()
            if not self._reading.done():
                self._has_news.clear()
        return item

    async def close(self) -> None:
        """Let the thread end, and wait for it."""
        self._call.stop()
        await ended(self._reading)

    def _read(self) -> None:
        iterator = self._iterate()
        together: list[Item] = []
        begun = time.monotonic()
        try:
            for item in iterator:
                together.append(item)
                if len(together) == AHEAD or time.monotonic() - begun >= TOGETHER_S:
                    self._hand_over(together)
                    together = []
                    begun = time.monotonic()
        except Exception:
            self._hand_over(together)  # what came before the error
            raise
        finally:
            if isinstance(iterator, Generator):
                iterator.close()  # so that it is closed here, and not by the garbage collector in another thread
        self._hand_over(together)

    def _hand_over(self, items: list[Item]) -> None:
        if items:
            self._call.from_loop(self._put(items))

    async def _put(self, items: list[Item]) -> None:
        self._ready += items
        self._has_room.clear()
        self._has_news.set()
        await self._has_room.wait()


async def ended(waiting: asyncio.Future[Any]) -> None:
    """Wait until it is done, whatever its result. A cancel of this task does not end the wait: either the task was
    cancelled already, or it must wait for a thread."""
    while not waiting.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            continue
    if not waiting.cancelled():
        waiting.exception()  # reads the error, so that asyncio does not warn of it


async def _told(function: Callable[..., object], *arguments: object) -> None:
    said = function(*arguments)
    if inspect.isawaitable(said):
        await said


def _closed() -> ClientClosed:
    return ClientClosed("the AsyncClient was closed while this call ran. What the call had committed stays.")
