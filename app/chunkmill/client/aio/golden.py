"""The golden queries of a collection for asyncio."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from chunkmill.client.hybrid import GoldenQueries
from chunkmill.domain.golden import GoldenQuery
from chunkmill.domain.results import GoldenLoaded

if TYPE_CHECKING:
    from chunkmill.client.aio.running import RunningCalls


class AsyncGoldenQueries:
    """A :class:`GoldenQueries` for asyncio: its methods are coroutines, and none blocks the event loop.
    ``await client.golden("docs")`` of an :class:`AsyncClient` makes it."""

    def __init__(self, running: RunningCalls, queries: GoldenQueries) -> None:
        self._running = running
        self._queries = queries

    def __repr__(self) -> str:
        return f"Async{self._queries!r}"

    async def load(self, queries: str | PathLike[str], qrels: str | PathLike[str]) -> GoldenLoaded:
        """Store the queries of two files of a BEIR data set, as :meth:`GoldenQueries.load` does."""
        return await self._running._long(self._queries.load, queries, qrels)

    async def from_titles(self, n: int = 500) -> int:
        """Make golden queries of titles, as :meth:`GoldenQueries.from_titles` does."""
        return await self._running._long(self._queries.from_titles, n)

    async def list(self) -> Sequence[GoldenQuery]:
        """All golden queries of the collection, as :meth:`GoldenQueries.list` returns them."""
        return await self._running._short(self._queries.list)

    async def count(self) -> int:
        """How many golden queries the collection has. Raises :class:`NotFound`."""
        return await self._running._short(self._queries.count)

    async def clear(self) -> int:
        """Delete all golden queries of the collection, as :meth:`GoldenQueries.clear` does."""
        return await self._running._short(self._queries.clear)
