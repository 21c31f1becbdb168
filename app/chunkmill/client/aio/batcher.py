"""The batcher for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from chunkmill.client.batcher import Batcher

if TYPE_CHECKING:
    from chunkmill.client.aio.running import RunningCalls


class AsyncBatcher:
    """A :class:`Batcher` for asyncio. ``client.batcher("docs")`` of an :class:`AsyncClient` makes it::

        async with client.batcher("docs") as add:
            async for document in stream:
                await add(document.id, document.text)

    No call blocks the event loop: adding a chunk takes no other thread unless it has to wait for room.
    """

    def __init__(self, running: RunningCalls, make: Callable[[], Coroutine[Any, Any, Batcher]]) -> None:
        self._running = running
        self._make = make
        self._made: Batcher | None = None

    def __repr__(self) -> str:
        return f"Async{self._made!r}" if self._made else "AsyncBatcher()"

    @property
    def _batcher(self) -> Batcher:
        if self._made is None:
            raise RuntimeError('use the batcher in "async with client.batcher(…) as add:"')
        return self._made

    @property
    def added(self) -> int:
        """How many chunks were added."""
        return self._batcher.added

    @property
    def enqueued(self) -> int:
        """How many of them were enqueued."""
        return self._batcher.enqueued

    @property
    def jobs(self) -> list[int]:
        """The ids of the jobs, the latest 10,000 of them, in the order in which they were enqueued."""
        return self._batcher.jobs

    def rest(self) -> list[object]:
        """The chunks that were added and not enqueued, as :meth:`Batcher.rest` returns them."""
        return self._batcher.rest()

    async def __call__(self, chunk: object, text: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Add a chunk: ``await add(id, text)``, ``await add(id, text, metadata)`` or ``await add(chunk)``."""
        batcher = self._batcher
        if batcher._take(*batcher._read(chunk, text, metadata)) is not None:
            await self._running._wait(batcher._add_steps(chunk, text, metadata))

    async def flush(self) -> None:
        """Enqueue what was added until now, as :meth:`Batcher.flush` does."""
        await self._running._wait(self._batcher._flush_steps())

    async def close(self) -> None:
        """Enqueue what was added, and end, as :meth:`Batcher.close` does."""
        await self._running._wait(self._batcher._close_steps())

    async def __aenter__(self) -> AsyncBatcher:
        self._made = await self._make()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._running._wait(self._batcher._exit_steps(error))
