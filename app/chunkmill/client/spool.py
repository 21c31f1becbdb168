"""A producer's stream, kept aside until all of it has been checked."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import IO

from chunkmill.domain.chunks import PreparedChunk

MEMORY_BYTES = 32 * 1024 * 1024
"""Up to here a stream stays in memory; the rest goes into an unnamed file in the temporary directory."""
OBJECT_BYTES = 280
"""What a PreparedChunk costs beside its text and metadata, by tracemalloc."""

_FRAME = struct.Struct("<III32s")


class Spool:
    """Takes a stream once, to the end, and gives it back. Memory stays constant, disk takes the rest.

    ``enqueue`` promises to refuse a bad chunk before anything is written, and to take any iterable; a
    generator can be read only once, so what was read must wait somewhere.
    """

    def __init__(self, chunks: Iterable[PreparedChunk]) -> None:
        self._kept: list[PreparedChunk] = []
        self._file: IO[bytes] | None = None
        try:
            self._take(iter(chunks))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._kept = []
        if self._file is not None:
            self._file.close()

    def __iter__(self) -> Iterator[PreparedChunk]:
        yield from self._kept
        self._kept = []  # read once: what is committed need not stay
        if self._file is None:
            return
        self._file.seek(0)
        read = self._file.read
        while frame := read(_FRAME.size):
            head, text, metadata, content_hash = _FRAME.unpack(frame)
            body = read(head + text + metadata)
            yield PreparedChunk(
                body[:head].decode(), body[head : head + text], body[head + text :].decode(), content_hash
            )

    def _take(self, chunks: Iterator[PreparedChunk]) -> None:
        size = 0
        for chunk in chunks:
            self._kept.append(chunk)
            size += len(chunk.text) + len(chunk.metadata) + OBJECT_BYTES
            if size >= MEMORY_BYTES:
                break
        else:
            return
        self._file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115 - closed by close()
        write = self._file.write
        for chunk in chunks:
            head, metadata = chunk.id.encode(), chunk.metadata.encode()
            write(_FRAME.pack(len(head), len(chunk.text), len(metadata), chunk.content_hash))
            write(head + chunk.text + metadata)
