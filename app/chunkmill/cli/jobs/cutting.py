"""Cuts what `enqueue --chunk` reads: the documents of folders, single documents, and the texts of records."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from chunkmill.chunking import Chunker, Kind
from chunkmill.chunking.document import KINDS, kind_of
from chunkmill.chunking.reading import UnreadableDocument, read
from chunkmill.cli.jobs.decoded import in_utf8
from chunkmill.cli.jobs.folders import FolderFile, SkippedEntries
from chunkmill.domain.chunks import Chunk
from chunkmill.errors import InvalidInput
from chunkmill.files import Folder

DOCUMENT_SUFFIXES = frozenset(KINDS)


class Cutter:
    """Cuts with one chunker, and counts. A problem is a text that says why a document cannot be cut."""

    def __init__(self, chunker: Chunker, suffixes: Collection[str] = ()) -> None:
        self._chunker = chunker
        self.suffixes = frozenset(f".{suffix.lower().lstrip('.')}" for suffix in suffixes) or DOCUMENT_SUFFIXES
        """Of the files that are read in folders. What has no kind of its own is read as text."""
        self.documents = 0
        self.chunks = 0

    def file(self, path: Path, skipped: SkippedEntries, encoding: str | None) -> Iterator[Chunk | str]:
        """The chunks of a document that was named itself. Its id is its name."""
        with Folder(path.resolve().parent) as folder:
            yield from self.document(FolderFile(folder, path.name, (path.resolve().name,)), path, skipped, encoding)

    def document(
        self, document: FolderFile, path: Path, skipped: SkippedEntries, encoding: str | None
    ) -> Iterator[Chunk | str]:
        """The chunks of a document. One without a text is skipped. HTML and PDF files state their encoding."""
        if document.problem is not None:
            yield document.problem
            return
        kind = kind_of(document.name) or Kind.TEXT
        try:
            with document.open() as file:
                if encoding is not None and kind in (Kind.TEXT, Kind.MARKDOWN):
                    file = in_utf8(file, encoding)
                text = read(file, kind, document.name)
        except UnreadableDocument as error:
            yield str(error)
            return
        except OSError as error:
            yield f"cannot be read: {error.strerror or error}"
            return
        if not text.blocks:
            skipped.add(path, "has no text")
            return
        self.documents += 1
        yield from self._counted(self._chunker.cut(document.name, text, {"path": document.name}))

    def record(self, record: Chunk) -> Iterator[Chunk | str]:
        """The chunks of a record. A record that is not a text with metadata is left to the checks of the client."""
        is_whole = isinstance(record.id, str) and isinstance(record.text, str) and record.text.strip()
        if not is_whole or not isinstance(record.metadata, Mapping):
            yield record
            return
        try:
            chunks = self._chunker.chunks(record.id, record.text, record.metadata)
        except InvalidInput as error:
            yield str(error).rstrip(".")
            return
        self.documents += 1
        yield from self._counted(chunks)

    def _counted(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self.chunks += 1
            yield chunk
