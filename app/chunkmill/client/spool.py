"""Keeps a producer's stream until all of it has been checked."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import IO

from chunkmill.domain.chunks import PreparedChunk
from chunkmill.errors import InvalidChunk, InvalidSetting

MEMORY_BYTES = 32 * 1024 * 1024
"""How much of a stream stays in memory. The rest is written to an unnamed file in the temporary directory."""
OBJECT_BYTES = 280
"""How many bytes a PreparedChunk takes besides its text and metadata, measured with tracemalloc."""

_FRAME = struct.Struct("<III32s")
_IS_INVALID = 2**32 - 1
"""Stands for the length of the id if what follows is a bad chunk."""

Item = PreparedChunk | InvalidChunk


class Spool:
    """Reads a stream to its end and gives it back once. Memory stays constant, because a file takes the rest.

    ``enqueue`` promises to refuse a bad chunk before anything is written, and to take any iterable. A generator can be
    read only once, so the spool keeps what was read. Before it is given back, :meth:`look` shows it as often as wanted.
    """

    def __init__(self, chunks: Iterable[Item]) -> None:
        self._kept: list[Item] = []
        self._file: IO[bytes] | None = None
        self.count = 0
        """How many items there are."""
        self.refused = 0
        """How many of them are bad chunks."""
        self.first: InvalidChunk | None = None
        """The first bad chunk."""
        self.nameless: InvalidChunk | None = None
        """The first bad chunk without a valid id."""
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
            with contextlib.suppress(OSError):  # what does not fit on the disk is not needed any more
                self._file.close()

    def __iter__(self) -> Iterator[Item]:
        yield from self._kept
        self._kept = []  # it is read only once, so memory can be freed
        yield from self._read()

    def look(self) -> Iterator[Item]:
        """All items. End it before the next one begins."""
        yield from self._kept
        yield from self._read()

    def _read(self) -> Iterator[Item]:
        if self._file is None:
            return
        with _told():
            self._file.seek(0)
        read = self._file.read
        while frame := read(_FRAME.size):
            head, text, metadata, content_hash = _FRAME.unpack(frame)
            if head == _IS_INVALID:
                yield _invalid(read(text))
                continue
            body = read(head + text + metadata)
            yield PreparedChunk(
                body[:head].decode(), body[head : head + text], body[head + text :].decode(), content_hash
            )

    def _take(self, chunks: Iterator[Item]) -> None:
        size = 0
        chunks = self._counted(chunks)
        for chunk in chunks:
            self._kept.append(chunk)
            size += OBJECT_BYTES
            if isinstance(chunk, PreparedChunk):
                size += len(chunk.text) + len(chunk.metadata)
            if size >= MEMORY_BYTES:
                break
        else:
            return
        with _told():
            self._file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115 - closed by close()
        write = self._file.write
        for chunk in chunks:
            if isinstance(chunk, InvalidChunk):
                fields = [chunk.problem, chunk.chunk_id, chunk.position, chunk.reason, chunk.known_id]
                said = json.dumps(fields).encode()
                with _told():
                    write(_FRAME.pack(_IS_INVALID, len(said), 0, bytes(32)) + said)
                continue
            head, metadata = chunk.id.encode(), chunk.metadata.encode()
            with _told():
                write(_FRAME.pack(len(head), len(chunk.text), len(metadata), chunk.content_hash))
                write(head + chunk.text + metadata)

    def _counted(self, chunks: Iterator[Item]) -> Iterator[Item]:
        for chunk in chunks:
            self.count += 1
            if isinstance(chunk, InvalidChunk):
                self.refused += 1
                self.first = self.first or chunk
                if chunk.known_id is None:
                    self.nameless = self.nameless or chunk
            yield chunk


def _invalid(said: bytes) -> InvalidChunk:
    problem, chunk_id, position, reason, known_id = json.loads(said)
    return InvalidChunk(problem, chunk_id=chunk_id, position=position, reason=reason, known_id=known_id)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raise :class:`InvalidSetting` if the temporary file cannot be made or written."""
    try:
        yield
    except OSError as error:
        raise InvalidSetting(
            "the chunks are kept in a temporary file until all of them are checked, and it cannot be written in "
            f"{tempfile.tempdir or 'any temporary folder'}: {error.strerror or error}. Nothing was written into the "
            "database. Set TMPDIR to a folder with more room, or pass on_invalid='skip', which needs no file."
        ) from error
