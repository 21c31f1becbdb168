"""Chunks as newline-delimited JSON: a body that is read as it comes, in constant memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from chunkmill.client.aio.calls import AHEAD
from chunkmill.errors import InvalidChunk
from chunkmill.gateway.bodies import NotJson, exact_json
from chunkmill.gateway.errors import Refusal

MAX_LINE_BYTES = 32 * 1024 * 1024
"""The most bytes of a line. A text may have 16 MiB and its metadata 1 MiB; JSON's escapes make both longer."""
LARGE_BYTES = 64 * 1024
"""A line of more bytes is parsed in a thread: 1 MiB takes some milliseconds."""
STALL_SECONDS = 60.0
"""How many seconds a body may be silent before it counts as ended: it holds a thread, and perhaps a connection."""
FIELDS = frozenset(("id", "text", "metadata"))


class ChunkLines:
    """The chunks of a request's body. ``on_invalid="skip"`` passes bad lines on, for the job's dead list.

    Every error names the line, from 1, and no error quotes it.
    """

    def __init__(self, request: Request, *, skips: bool) -> None:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise Refusal(415, "unsupported_encoding", "the body must not be compressed: send it without an encoding.")
        self._request = request
        self._skips = skips
        # A position is asked for while at most so many further chunks were read ahead.
        self._lines: deque[int] = deque(maxlen=4 * AHEAD)
        self._read = 0

    def line_of(self, position: int) -> int:
        """The number of the line that held the chunk at ``position``, if it was one of the latest."""
        first = self._read - len(self._lines)
        return self._lines[position - first] if first <= position < self._read else position + 1

    async def chunks(self) -> AsyncGenerator[object, None]:
        async for number, line in self._split():
            position = self._read
            self._read += 1
            self._lines.append(number)
            try:
                if len(line) > LARGE_BYTES:
                    yield await run_in_threadpool(_chunk, line)
                else:
                    yield _chunk(line)
            except _WrongLine as wrong:
                if not self._skips:
                    raise refused_line(number, wrong.problem) from None
                yield InvalidChunk(f"line {number}: {wrong.problem}", chunk_id="", position=position, reason="bad_line")

    async def _split(self) -> AsyncGenerator[tuple[int, bytes], None]:
        """The lines that are not blank, with their numbers."""
        buffer, searched, number = bytearray(), 0, 0
        async for part in self._parts():
            buffer += part
            begin = 0
            while (end := buffer.find(b"\n", max(begin, searched))) >= 0:
                number += 1
                if end - begin > MAX_LINE_BYTES:
                    raise _line_too_long(number)
                if line := bytes(buffer[begin:end]).strip():
                    yield number, line
                begin = end + 1
            del buffer[:begin]
            searched = len(buffer)
            if searched > MAX_LINE_BYTES:
                raise _line_too_long(number + 1)
        if line := bytes(buffer).strip():
            yield number + 1, line

    async def _parts(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises :class:`ClientDisconnect` if it ends early, or comes no more."""
        async with aclosing(self._request.stream()) as parts:
            while True:
                try:
                    async with asyncio.timeout(STALL_SECONDS):
                        part = await anext(parts, None)
                except TimeoutError:
                    raise ClientDisconnect from None
                if part is None:
                    return
                yield part


class _WrongLine(Exception):
    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


def _chunk(line: bytes) -> object:
    try:
        value = exact_json(line, "utf-8-sig")
    except NotJson as error:
        raise _WrongLine(str(error)) from None
    if not isinstance(value, dict):
        raise _WrongLine('it must be a JSON object such as {"id": "1", "text": "…", "metadata": {}}')
    if not value.keys() <= FIELDS or "id" not in value or "text" not in value:
        raise _WrongLine("a chunk has the fields id and text, and may have metadata, which is the place for all others")
    return value


def refused_line(number: int, problem: str) -> Refusal:
    return Refusal(
        400,
        "invalid_chunk",
        f"line {number}: {problem}. Nothing was written. Fix the line, or send on_invalid=skip, which puts bad chunks "
        "on the job's dead list and enqueues the others.",
        param=f"line {number}",
    )


def _line_too_long(number: int) -> Refusal:
    return Refusal(413, "line_too_long", f"line {number} has more than {MAX_LINE_BYTES:,} bytes; a chunk is a passage.")


def json_lines(values: list[Any]) -> bytes:
    """Values as lines of JSON."""
    from chunkmill.gateway.shapes import dumped

    return b"".join(dumped(value) + b"\n" for value in values)
