"""Answers and bodies that last: how many there may be at a time, and the progress of jobs that many may follow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from chunkmill.domain.results import Job
from chunkmill.gateway.errors import Refusal

MOST_LONG = 4
"""How many enqueues and exports a gateway has at a time. The client has threads and connections for five."""
MOST_FOLLOWERS = 500
"""How many event streams a gateway has at a time."""
STALL_SECONDS = 60.0
"""How many seconds an answer waits for its reader. After that it is ended, because it holds a thread."""
LOOK_SECONDS = 0.5
"""How often the row of a job that somebody follows is read. Reading a large job takes longer, and is done less often:
it takes at most a tenth of the time."""
HEARTBEAT_SECONDS = 15.0
"""How many seconds pass without news before a comment is sent, because proxies end silent connections."""

Look = Callable[[int], Awaitable[Job]]


@dataclass(eq=False)
class _Watch:
    """A job that is read for all who follow it."""

    followers: int = 0
    job: Job | None = None
    error: Exception | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class Streams:
    """What lasts longer than a request's transaction."""

    def __init__(self) -> None:
        self._long = 0
        self._followers = 0
        self._watches: dict[int, _Watch] = {}

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """A place for a body or an answer of any length. Raises :class:`Refusal` if there is none."""
        if self._long >= MOST_LONG:
            raise Refusal(
                429,
                "overloaded",
                f"this gateway reads or writes {MOST_LONG} long streams already; try again in some seconds.",
                retry_after=2.0,
            )
        self._long += 1
        try:
            yield
        finally:
            self._long -= 1

    def require_room(self) -> None:
        """Raise :class:`Refusal` if nobody else may follow a job."""
        if self._followers >= MOST_FOLLOWERS:
            raise Refusal(
                429, "overloaded", f"{MOST_FOLLOWERS} event streams are open; try again later.", retry_after=10.0
            )

    async def follow(
        self, job_id: int, look: Look, *, leaving: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[Job | None, None]:
        """The job each time that it has changed, the first time at once; None if nothing has for a while.

        It ends when the job has, or when ``leaving()`` is true. However many follow a job, its row is read once.
        """
        watch = self._watches.setdefault(job_id, _Watch())
        watch.followers += 1
        self._followers += 1
        if watch.task is None:
            watch.task = asyncio.create_task(self._read(watch, job_id, look, leaving))
        seen: Job | None = None
        try:
            while True:
                news = watch.news
                if watch.job is not None and watch.job is not seen:
                    seen = watch.job
                    yield seen
                    if seen.state.is_final:
                        return
                elif watch.error is not None:
                    raise watch.error
                elif watch.task.done():
                    return
                else:
                    try:
                        async with asyncio.timeout(HEARTBEAT_SECONDS):
                            await news.wait()
                    except TimeoutError:
                        yield None
        finally:
            self._followers -= 1
            watch.followers -= 1
            if watch.followers == 0:
                watch.task.cancel()
                if self._watches.get(job_id) is watch:
                    del self._watches[job_id]

    async def _read(self, watch: _Watch, job_id: int, look: Look, leaving: Callable[[], bool]) -> None:
        try:
            while not leaving():
                begun = time.monotonic()
                job = await look(job_id)
                took = time.monotonic() - begun
                if watch.job is None or (job, job.hindrance) != (watch.job, watch.job.hindrance):
                    watch.job = job
                    watch.tell()
                if job.state.is_final:
                    break
                await asyncio.sleep(max(LOOK_SECONDS, 10 * took))
        except Exception as error:  # noqa: BLE001 - each follower raises it
            watch.error = error
        finally:
            # Who comes now begins anew: the job may be retried.
            if self._watches.get(job_id) is watch:
                del self._watches[job_id]
            asyncio.get_running_loop().call_soon(watch.tell)


class StreamedResponse(StreamingResponse):
    """An answer of any length. It ends early if its reader has gone or takes nothing any more, and then calls ``ends``.

    The first part is made before the answer begins, so that an error in it is still an answer with a status.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        first: bytes | None,
        *,
        media_type: str,
        ends: Callable[[], object] = lambda: None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_chained(first, parts), headers=headers, media_type=media_type)
        self._parts = parts
        self._ends = ends

    @classmethod
    async def of(
        cls,
        parts: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        ends: Callable[[], object] = lambda: None,
        headers: Mapping[str, str] | None = None,
    ) -> StreamedResponse:
        try:
            first = await anext(parts, None)
        except BaseException:
            await parts.aclose()
            ends()
            raise
        return cls(parts, first, media_type=media_type, ends=ends, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def bounded(message: Message) -> None:
            async with asyncio.timeout(STALL_SECONDS):
                await send(message)

        try:
            if scope["method"] == "HEAD":
                await Response(status_code=self.status_code, headers=dict(self.headers))(scope, receive, bounded)
                return
            await super().__call__(scope, receive, bounded)
        finally:
            try:
                await self._parts.aclose()
            finally:
                self._ends()


async def _chained(first: bytes | None, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first is not None:
        yield first
        async for part in parts:
            yield part
