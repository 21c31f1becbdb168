"""Chunks as the lines of a request's body, which can be sent again and is never in memory as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import IO, Any, Literal

from chunkmill.domain.arguments import as_items
from chunkmill.domain.chunks import Chunk, prepare
from chunkmill.domain.shapes import rows_of
from chunkmill.errors import InvalidChunk, InvalidInput, InvalidSetting

PIECE_BYTES = 64 * 1024
SLOW_SECONDS = 1.0
"""A piece is sent with the first chunk that comes after so many seconds, although it is not full."""
LONGEST_LINE = 32 * 1024 * 1024
MEMORY_BYTES = 8 * 1024 * 1024
"""How much of a stream that can be read only once stays in memory. The rest is in an unnamed file."""


class SourceFailed(Exception):
    """The caller's iterable raised an error, which is ``error``. The request is broken off."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__)
        self.error = error


class Lines:
    """The lines of an iterable of chunks. Every reading begins with the first line.

    A list or a tuple is read again. What can be read only once is kept while it is sent, as far as it was read:
    :data:`MEMORY_BYTES` in memory, and the rest in a file that nobody else can open.
    """

    def __init__(
        self, chunks: Iterable[object] | AsyncIterable[object], on_invalid: Literal["raise", "skip"] = "raise"
    ) -> None:
        self.is_asynchronous = isinstance(chunks, AsyncIterable)
        self._skips = on_invalid == "skip"
        self._kept: IO[bytes] | None = None
        self._again: Iterable[object] | None = None
        self._rest: Iterator[object] | AsyncIterator[object]
        if isinstance(chunks, AsyncIterable):
            self._rest = aiter(chunks)
        elif isinstance(chunks, list | tuple):
            self._again = chunks
        else:
            self._rest = iter(rows_of(as_items("chunks", chunks)))
        if self._again is None:
            self._kept = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115 - closed by close()
        self._position = 0

    def close(self) -> None:
        if self._kept is not None:
            with contextlib.suppress(OSError):  # what does not fit on the disk is not needed any more
                self._kept.close()

    def pieces(self) -> Iterator[bytes]:
        """The lines in pieces of about :data:`PIECE_BYTES`. Raises :class:`SourceFailed`."""
        if self._again is not None:
            self._position = 0
            yield from self._gathered(iter(self._again))
            return
        yield from self._replayed()
        yield from self._fresh()

    async def pieces_in_a_loop(self) -> AsyncIterator[bytes]:
        """As :meth:`pieces`. Whatever may hold the event loop runs in a thread."""
        if not self.is_asynchronous:
            pieces = self.pieces()
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
            return
        replayed = self._replayed()
        while (piece := await asyncio.to_thread(next, replayed, None)) is not None:
            yield piece
        async for piece in self._fresh_in_a_loop():
            yield piece

    def drain(self) -> None:
        """Read the rest of what can be read only once, so that the next sending waits for nobody. Raises
        :class:`SourceFailed`."""
        if self._again is None:
            for _ in self._fresh():
                pass

    async def drain_in_a_loop(self) -> None:
        """As :meth:`drain`."""
        if not self.is_asynchronous:
            await asyncio.to_thread(self.drain)
            return
        async for _ in self._fresh_in_a_loop():
            pass

    def _fresh(self) -> Iterator[bytes]:
        """Pieces of what was not read before."""
        if not isinstance(self._rest, Iterator):
            raise SourceFailed(InvalidInput("chunks is an asynchronous iterable, which only AsyncRemoteClient takes."))
        for piece in self._gathered(self._rest):
            self._keep(piece)
            yield piece

    async def _fresh_in_a_loop(self) -> AsyncIterator[bytes]:
        if not isinstance(self._rest, AsyncIterator):
            raise TypeError
        lines: list[bytes] = []
        size, began = 0, time.monotonic()
        try:
            async for item in self._rest:
                lines.append(self._line(item))
                size += len(lines[-1])
                if size >= PIECE_BYTES or time.monotonic() - began >= SLOW_SECONDS:
                    piece = b"".join(lines)
                    await asyncio.to_thread(self._keep, piece)
                    yield piece
                    lines, size, began = [], 0, time.monotonic()
        except (SourceFailed, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            raise SourceFailed(error) from error
        if lines:
            self._keep(piece := b"".join(lines))
            yield piece

    def _gathered(self, items: Iterator[object]) -> Iterator[bytes]:
        lines: list[bytes] = []
        size, began = 0, time.monotonic()
        while True:
            try:
                item = next(items)
            except StopIteration:
                break
            except BaseException as error:
                raise SourceFailed(error) from error
            lines.append(self._line(item))
            size += len(lines[-1])
            if size >= PIECE_BYTES or time.monotonic() - began >= SLOW_SECONDS:
                yield b"".join(lines)
                lines, size, began = [], 0, time.monotonic()
        if lines:
            yield b"".join(lines)

    def _line(self, item: object) -> bytes:
        position, self._position = self._position, self._position + 1
        try:
            chunk = prepare(item, position)
        except InvalidChunk as error:
            error.with_traceback(None)  # the frames would keep the text in memory
            if self._skips and (line := _as_it_is(item)) is not None:
                return line  # the gateway puts it on the dead list
            raise SourceFailed(error) from None
        chunk_id, text = json.dumps(chunk.id, ensure_ascii=False), json.dumps(chunk.text.decode(), ensure_ascii=False)
        return f'{{"id":{chunk_id},"text":{text},"metadata":{chunk.metadata}}}\n'.encode()

    def _keep(self, piece: bytes) -> None:
        if self._kept is not None:
            try:
                self._kept.seek(0, 2)
                self._kept.write(piece)
            except OSError as error:
                raise SourceFailed(
                    InvalidSetting(
                        "chunks that can be read only once are kept in a temporary file while they are sent, and it "
                        f"cannot be written in {tempfile.tempdir or 'any temporary folder'}: "
                        f"{error.strerror or error}. Set TMPDIR to a folder with more room, or give a list."
                    )
                ) from None

    def _replayed(self) -> Iterator[bytes]:
        if self._kept is None:
            return
        place = 0
        while True:
            self._kept.seek(place)
            piece = self._kept.read(PIECE_BYTES)
            if not piece:
                return
            place += len(piece)
            yield piece


def _as_it_is(item: object) -> bytes | None:
    """The line of a chunk that is not valid, which the gateway refuses too; None if it is longer than any line may be.

    What JSON cannot hold becomes something that it can hold and that is not valid either.
    """
    if isinstance(item, Chunk):
        item = (item.id, item.text, item.metadata)
    if isinstance(item, tuple | list):
        item = dict(zip(("id", "text", "metadata"), item, strict=False))
    given: Mapping[Any, Any] = item if isinstance(item, Mapping) else {}
    chunk = {
        "id": _or_else(given.get("id"), None),
        "text": _or_else(given.get("text"), None),
        "metadata": _or_else(given.get("metadata") or {}, "not a JSON object"),
    }
    line = json.dumps(chunk, allow_nan=False).encode() + b"\n"
    return line if len(line) <= LONGEST_LINE else None


def _or_else(value: object, other: object) -> object:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return other
    return value
