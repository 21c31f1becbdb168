"""A producer's stream, kept aside until all of it has been checked."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Iterator
from types import TracebackType

from app.domain.chunks import PreparedChunk

MEMORY_BYTES = 32 * 1024 * 1024
"""Up to here the spool stays in memory; past it, it moves to an unnamed file in the temporary directory."""

_FRAME = struct.Struct("<III32s")


class Spool:
    """Takes a stream once, to the end, and gives it back. Memory stays constant, disk takes the rest.

    ``enqueue`` promises to refuse a bad chunk before anything is written, and to take any iterable; a
    generator can be read only once, so what was read must wait somewhere.
    """

    def __init__(self, chunks: Iterable[PreparedChunk]) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115 - closed in __exit__
        try:
            for chunk in chunks:
                head, text, metadata = chunk.id.encode(), chunk.text, chunk.metadata.encode()
                self._file.write(_FRAME.pack(len(head), len(text), len(metadata), chunk.content_hash))
                self._file.write(head)
                self._file.write(text)
                self._file.write(metadata)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[PreparedChunk]:
        self._file.seek(0)
        read = self._file.read
        while frame := read(_FRAME.size):
            head, text, metadata, content_hash = _FRAME.unpack(frame)
            yield PreparedChunk(read(head).decode(), read(text), read(metadata).decode(), content_hash)
