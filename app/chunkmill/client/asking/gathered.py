"""The texts of a call, and their vectors as they come from the cache, from the store and from workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from chunkmill.domain.chunks import content_hash
from chunkmill.domain.embedded import EmbeddedText, EmbeddedTexts
from chunkmill.system.numbers import np


class DistinctTexts:
    """Each distinct text is needed once, however often it stands in the call."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._hashes = [content_hash(text) for text in texts]
        self.missing = dict(zip(self._hashes, texts, strict=True))
        """``content hash → text`` of those without a vector so far, in the order of the call."""
        self._known: dict[bytes, EmbeddedText] = {}
        self._made: set[bytes] = set()

    def add(self, content_hash: bytes, embedded: EmbeddedText, *, is_made: bool = False) -> None:
        """Take the vector of a text. ``is_made`` says that a worker made it for this call."""
        self._known[content_hash] = embedded
        if is_made:
            self._made.add(content_hash)
        self.missing.pop(content_hash, None)

    def of(self, hashes: Iterable[bytes]) -> Iterator[tuple[bytes, EmbeddedText]]:
        """The vectors of some of the texts."""
        return ((content_hash, self._known[content_hash]) for content_hash in hashes)

    def result(self, dimensions: int) -> EmbeddedTexts:
        """All vectors in the order of the texts. Call it when none is missing."""
        texts = [self._known[content_hash] for content_hash in self._hashes]
        vectors = np.empty((len(texts), dimensions), np.float32)
        for row, text in enumerate(texts):
            vectors[row] = text.vector
        first = {content_hash: row for row, content_hash in reversed(list(enumerate(self._hashes)))}
        made = np.zeros(len(texts), np.bool_)
        made[[first[content_hash] for content_hash in self._made]] = True
        return EmbeddedTexts(
            vectors,
            np.fromiter((text.tokens for text in texts), np.int32, len(texts)),
            np.fromiter((text.truncated for text in texts), np.bool_, len(texts)),
            made=made,
        )
