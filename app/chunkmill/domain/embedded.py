"""Vectors that were made for somebody who waited, and what is known of their texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chunkmill.domain.printed import PrintedResult
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.system.numbers import NDArray, np


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedTexts(PrintedResult):
    """Everything is in the order of the texts."""

    vectors: NDArray[np.float32]
    """``(n, d)`` float32."""
    tokens: NDArray[np.int32]
    """``(n,)`` int32: how many tokens the model read, with its prompt and special tokens. 0 if that is not known."""
    truncated: NDArray[np.bool_]
    """``(n,)`` bool: whether the text had more tokens than the model reads, so that its end is not in its vector."""
    spec: SpaceSpec | None = None
    """The space of the vectors. None in a part of an answer."""
    made: NDArray[np.bool_] | None = None
    """``(n,)`` bool: whether a worker made the vector for this answer. Of equal texts that is one at most, and none if
    the vector was stored or in the cache of queries. None if that is not known."""

    def __len__(self) -> int:
        return len(self.vectors)


def joined(parts: list[EmbeddedTexts], dimensions: int) -> EmbeddedTexts:
    """All parts, one after the other. Without any, there are no texts."""
    if len(parts) == 1:
        return parts[0]
    return EmbeddedTexts(
        np.concatenate([np.empty((0, dimensions), np.float32), *(part.vectors for part in parts)]),
        np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)]),
        np.concatenate([np.empty(0, np.bool_), *(part.truncated for part in parts)]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedText:
    """One of them."""

    vector: NDArray[np.float32]
    """``(d,)`` float32."""
    tokens: int
    truncated: bool


def counted(embedded: EmbeddedTexts, texts: Sequence[str], expected: Callable[[str], int]) -> tuple[int, int]:
    """The tokens of all texts, and those of the texts whose vectors workers made for this answer.

    A text has as many as ``expected`` if its worker has not counted them. Workers of an earlier release do not, and
    while workers are replaced, one answer may have parts of both.
    """
    tokens = np.array([int(n) or expected(text) for n, text in zip(embedded.tokens, texts, strict=True)], np.int64)
    return int(tokens.sum()), int(tokens.sum() if embedded.made is None else tokens[embedded.made].sum())


def estimated_tokens(text: str) -> int:
    """A guess at the tokens of a text, special tokens included, without reading it."""
    return len(text) // 4 + 2
