"""Makes chunks of documents: their texts, ids and metadata."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chunkmill.chunking.counting import TextMeasure, characters, tokens_of
from chunkmill.chunking.cutting import Rule, cut
from chunkmill.chunking.document import Document, Kind, kind_of
from chunkmill.chunking.libraries import library
from chunkmill.chunking.reading import UnreadableDocument, read, read_text
from chunkmill.domain.arguments import as_number, as_word
from chunkmill.domain.chunks import Chunk
from chunkmill.errors import InvalidInput
from chunkmill.system.files import open_regular

if TYPE_CHECKING:
    from chunkmill.settings import Settings

LEAST_SIZE: Final = 16
"""The smallest size of a chunk. One character has at most a few tokens, so a chunk always holds some."""
METADATA_KEYS: Final = ("document", "chunk_start", "chunk_end", "headings", "page", "last_page")
"""The keys that a chunk's metadata get here."""


class Unit(StrEnum):
    """In what the size of a chunk is measured."""

    TOKENS = "tokens"
    """Tokens of the model's own tokenizer, without the special ones."""
    CHARACTERS = "characters"


class Chunker:
    """Cuts documents into chunks of at most ``size`` tokens of a model, or characters.

    Each chunk but the first of a section begins with up to ``overlap`` of the tokens or characters before it.
    ``model`` is a name as :meth:`Client.enqueue <chunkmill.Client.enqueue>` takes it; if it is None it is
    ``EMBEDDING_MODEL``. Its tokenizer has to be on this machine. Raises :class:`InvalidInput`, also if the model does
    not read ``size`` tokens, and :class:`UnknownModel`.

    The id of a chunk is ``<id of its document>#<12 digits>``, and the digits are made from its text. So a chunk keeps
    its id when the document changes elsewhere, and gets another one when its own text changes. Its metadata are those
    of the document and:

    - ``document``: the id of the document,
    - ``chunk_start`` and ``chunk_end``: its position in the document's text, in characters,
    - ``headings``: the titles above it, from the outermost to its own, if there are any,
    - ``page`` and ``last_page``: where it begins and ends, from 1 on, if the document has pages.
    """

    def __init__(
        self,
        size: int,
        *,
        overlap: int = 0,
        unit: Unit | str = Unit.TOKENS,
        model: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.size = as_number("size", size, least=LEAST_SIZE)
        self.overlap = as_number("overlap", overlap, least=0)
        self.unit = as_word(Unit, unit, "unit")
        if 2 * self.overlap > self.size:
            raise InvalidInput(f"overlap is {self.overlap}; it must be at most half of the size, which is {self.size}.")
        if self.unit is Unit.CHARACTERS:
            self._measure: TextMeasure = characters()
        else:
            if settings is None:
                from chunkmill.settings import Settings

                settings = Settings.from_env()
            self._measure = tokens_of(settings, model, self.size)
        splitter = library("semantic_text_splitter").TextSplitter
        self._splitters: dict[int, Any] = {}
        self._new_splitter = splitter.from_callback
        self._rule = Rule(self.size, self.overlap, self._measure.sizes, self._split, self._measure.tail)

    def __repr__(self) -> str:
        return f"Chunker({self.size}, overlap={self.overlap}, unit={self.unit.value!r})"

    def chunks(
        self, document_id: str, text: str, metadata: Mapping[str, Any] | None = None, *, kind: Kind | str = Kind.TEXT
    ) -> Iterator[Chunk]:
        """The chunks of a text. ``kind`` is ``text``, ``markdown`` or ``html``."""
        kind = as_word(Kind, kind, "kind")
        if kind is Kind.PDF:
            raise InvalidInput("kind is 'pdf', and a PDF is not text. Pass the file to Chunker.file().")
        if not isinstance(text, str):
            raise InvalidInput(f"text is of type {type(text).__name__}; it must be a str.")
        try:
            document = read_text(text, kind)
        except UnreadableDocument as error:
            raise InvalidInput(f"the document {document_id!r}: {error}.") from None
        return self.cut(document_id, document, metadata)

    def file(
        self,
        path: str | Path,
        *,
        document_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        kind: Kind | str | None = None,
    ) -> Iterator[Chunk]:
        """The chunks of a file. If ``document_id`` is None it is the name of the file.

        If ``kind`` is None the end of the name says it. Raises :class:`InvalidInput` if the file cannot be read.
        """
        path = Path(path)
        chosen = kind_of(path.name) if kind is None else as_word(Kind, kind, "kind")
        if chosen is None:
            raise InvalidInput(f"{path}: the kind of the document is not known from its name. Pass kind.")
        try:
            with open_regular(path) as opened:
                document = read(opened, chosen, path.name)
        except UnreadableDocument as error:
            raise InvalidInput(f"{path}: {error}.") from None
        except OSError as error:
            raise InvalidInput(f"{path} cannot be read: {error.strerror or error}. Check the path.") from None
        return self.cut(path.name if document_id is None else document_id, document, metadata)

    def cut(self, document_id: str, document: Document, metadata: Mapping[str, Any] | None = None) -> Iterator[Chunk]:
        """The chunks of a document that was read already."""
        given = dict(metadata or {})
        if taken := [key for key in METADATA_KEYS if key in given]:
            raise InvalidInput(
                f"the metadata of {document_id!r} have the key {taken[0]!r}, which says where a chunk stands. Rename "
                "it, or leave it out."
            )
        return self._chunks(document_id, document, given)

    def _chunks(self, document_id: str, document: Document, given: Mapping[str, Any]) -> Iterator[Chunk]:
        seen: Counter[str] = Counter()
        for passage in cut(document, self._rule):
            text = document.text[passage.start : passage.end]
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            seen[digest] += 1
            # A passage that comes twice in a document is two chunks.
            again = f"-{seen[digest]}" if seen[digest] > 1 else ""
            metadata = {**given, "document": document_id, "chunk_start": passage.start, "chunk_end": passage.end}
            if passage.headings:
                metadata["headings"] = list(passage.headings)
            if passage.page is not None:
                metadata |= {"page": passage.page, "last_page": passage.last_page}
            yield Chunk(f"{document_id}#{digest}{again}", text, metadata)

    def _split(self, text: str, size: int) -> list[str]:
        """Pieces of at most ``size`` that together are the text, between sentences or words as far as possible."""
        if size not in self._splitters:
            self._splitters[size] = self._new_splitter(lambda part: self._measure.sizes([part])[0], size, trim=False)
        pieces: Sequence[str] = self._splitters[size].chunks(text)
        return list(pieces)
