"""Callers that go away while they are waited for."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.requests import Request

from chunkmill.gateway.errors import Refusal


class EndsWithCaller:
    """``async with EndsWithCaller(request)``: the block is cancelled when the caller hangs up.

    What the block has asked a worker for is then withdrawn. The body of the request must have been read before. The
    :class:`Refusal` that the block then raises is for the log, because nobody reads it.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine always runs in one
        self._task = task
        self._watching = asyncio.create_task(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.cancel()
        if self._is_gone and isinstance(error, asyncio.CancelledError) and self._task.uncancel() == 0:
            raise Refusal(499, "caller_gone", "the caller hung up.") from None

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._task.cancel()
