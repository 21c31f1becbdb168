"""Answers that may take minutes. Blank lines come before the JSON meanwhile, because proxies end connections on which
nothing comes; JSON allows them.

The status is sent with the first of them, so it is 200 then, whatever comes. An error that comes later is the usual
object, with its ``status`` in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.responses import Response

from chunkmill.errors import ChunkmillError
from chunkmill.gateway.asked import wrong
from chunkmill.gateway.endpoint import Schema
from chunkmill.gateway.errors import Refusal, refusal_of
from chunkmill.gateway.exchange import current
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.shapes import dumped, plain
from chunkmill.gateway.streams import HEARTBEAT_SECONDS, StreamedResponse

LONGEST_S = 86_400.0


def timeout_schema(default: float) -> Schema:
    """That of the field ``timeout_s``."""
    return {
        "type": "number",
        "minimum": 0,
        "maximum": LONGEST_S,
        "default": default,
        "description": "An answer that takes longer than 15 seconds begins with blank lines, and its status is 200. If "
        "it ends in an error, that is the usual object `error`, with the `status` in it.",
    }


def timeout_in(body: dict[str, Any], default: float, *, most: float = LONGEST_S) -> float:
    """The field ``timeout_s`` in seconds. Raises :class:`Refusal`."""
    seconds = body.get("timeout_s", default)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= most:
        raise wrong("timeout_s", f"it must be a number of seconds from 0 to {most:,.0f}")
    return float(seconds)


async def lasting(gateway: Gateway, work: Coroutine[Any, Any, Any]) -> Response:
    """What ``work`` results in, as JSON. It is cancelled if its caller hangs up.

    Raises :class:`Refusal` if this gateway has too much of that kind under way.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(work.close)  # which does nothing once it has run
        stack.enter_context(gateway.streams.one_more())
        return await StreamedResponse.of(_parts(work), media_type="application/json", ends=stack.pop_all().close)


async def _parts(work: Coroutine[Any, Any, Any]) -> AsyncGenerator[bytes, None]:
    task = asyncio.ensure_future(work)
    has_begun = False
    try:
        while not (await asyncio.wait([task], timeout=HEARTBEAT_SECONDS))[0]:
            has_begun = True
            yield b"\n"
        try:
            yield dumped(plain(task.result()))
        except (ChunkmillError, Refusal) as error:
            if not has_begun:
                raise
            yield _late(error if isinstance(error, Refusal) else refusal_of(error))
    finally:
        task.cancel()
        await asyncio.wait([task])  # its thread ends before another one takes its place


def _late(refusal: Refusal) -> bytes:
    if (exchange := current()) is not None:
        exchange.code = refusal.code
    return dumped({"error": {**refusal.error(), "status": refusal.status}})
