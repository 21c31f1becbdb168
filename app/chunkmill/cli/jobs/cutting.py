"""Cuts what `enqueue --chunk` reads: the documents of folders, single documents, and the texts of records."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from chunkmill.chunking import Chunker, Kind
from chunkmill.chunking.document import KINDS, Document, kind_of, suffix_of
from chunkmill.chunking.reading import UnreadableDocument, content_of, read, read_text, unpacked
from chunkmill.cli.jobs.decoded import document_text
from chunkmill.cli.jobs.folders import FolderFile, SkippedEntries
from chunkmill.domain.chunks import Chunk
from chunkmill.errors import InvalidInput
from chunkmill.system.files import Folder

DOCUMENT_SUFFIXES = frozenset(KINDS)


@dataclass(frozen=True, slots=True)
class UncutDocument:
    """A document that cannot be cut. ``problem`` says why, and ``name`` is its id, if that is known."""

    problem: str
    name: str | None = None


class Cutter:
    """Cuts with one chunker, and counts."""

    def __init__(self, chunker: Chunker, suffixes: Collection[str] = ()) -> None:
        self._chunker = chunker
        self.suffixes = frozenset(f".{suffix.lower().lstrip('.')}" for suffix in suffixes) or DOCUMENT_SUFFIXES
        """Of the files that are read in folders. What has no kind of its own is read as text."""
        self.documents = 0
        self.chunks = 0

    def file(self, path: Path, skipped: SkippedEntries, encoding: str | None) -> Iterator[Chunk | UncutDocument]:
        """The chunks of a document that was named itself. Its id is its name."""
        with Folder(path.resolve().parent) as folder:
            document = FolderFile(folder, path.name, (path.resolve().name,))
            yield from self.document(document, path, skipped, encoding, is_named=True)

    def document(
        self, document: FolderFile, path: Path, skipped: SkippedEntries, encoding: str | None, *, is_named: bool = False
    ) -> Iterator[Chunk | UncutDocument]:
        """The chunks of a document. One without a text is skipped, and so is one of links, unless it ``is_named``."""
        if document.problem is not None:
            yield UncutDocument(document.problem, document.name if document.has_no_id else None)
            return
        try:
            with document.open() as file:
                text = self._read(file, document.name, encoding)
        except UnreadableDocument as error:
            yield UncutDocument(str(error), document.name)
            return
        except OSError as error:
            yield UncutDocument(f"cannot be read: {error.strerror or error}", document.name)
            return
        if not text.blocks:
            skipped.add(path, "has no text")
            return
        if text.has_only_links and not is_named:
            skipped.add(path, "has only links")
            return
        self.documents += 1
        yield from self._counted(self._chunker.cut(document.name, text, {"path": document.name}))

    def record(self, record: Chunk) -> Iterator[Chunk | UncutDocument]:
        """The chunks of a record. A record that is not a text with metadata is left to the checks of the client."""
        is_whole = isinstance(record.id, str) and isinstance(record.text, str) and record.text.strip()
        if not is_whole or not isinstance(record.metadata, Mapping):
            yield record
            return
        try:
            chunks = self._chunker.chunks(record.id, record.text, record.metadata)
        except InvalidInput as error:
            yield UncutDocument(str(error).rstrip("."), record.id)
            return
        self.documents += 1
        yield from self._counted(chunks)

    def _read(self, file: BinaryIO, name: str, encoding: str | None) -> Document:
        """HTML and PDF files, and Python's sources, state their encodings themselves."""
        file, name = unpacked(file, name)
        kind = kind_of(name) or Kind.TEXT
        if kind in (Kind.HTML, Kind.PDF) or suffix_of(name) in (".py", ".pyi"):
            return read(file, kind, name)
        try:
            return read_text(document_text(content_of(file), encoding), kind)
        except ValueError as error:
            raise UnreadableDocument(str(error)) from None

    def _counted(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self.chunks += 1
            yield chunk
