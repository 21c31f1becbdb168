"""The results of the engine. They are frozen, and every array states its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TextFailure:
    """A text that got no vector. ``reason`` never holds the text.

    ``code`` is ``too_long`` (under the policy ``reject``), ``tokenize_failed``, ``forward_failed`` (the model raised
    on this text alone), ``out_of_memory`` (this text alone does not fit the device's memory) or ``not_finite``.
    """

    index: int
    """Position in the texts given."""
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class TokenBatchResult:
    """The texts that one forward pass finished. A split text is in the result of the pass of its last window."""

    indices: NDArray[np.int32]
    """(m,) int32, positions in the texts given."""
    vectors: NDArray[np.float32]
    """(m, dimensions) float32, C order."""
    n_tokens: NDArray[np.int32]
    """(m,) int32, special tokens and prompt included, before any truncation; ``max_tokens + 1`` for a long text that
    was not read to its end."""
    truncated: NDArray[np.bool_]
    """(m,) bool: the text was longer than the model reads, and its end was cut off."""
    failures: tuple[TextFailure, ...]
    """The texts that got no vector."""
    seconds: float
    """Time on the device, without the wait for its turn."""
    tokens: int = 0
    """Tokens of this call's rows that went through the model, without padding."""
    padded_tokens: int = 0
    """The same tokens with their share of the padding."""
    under_way: int = 0
    """How many rows of this call other passes had when this pass was finished. A row is a text, or a window of one."""
    tokenize_seconds: float = 0.0
    """How long it took to tokenize texts. A result that carries it has no vectors: there is one for each call of the
    tokenizer."""


@dataclass(frozen=True, slots=True)
class Timings:
    """What one call of ``embed`` took. Times are in seconds; ``total`` includes the wait for the device."""

    tokenize: float
    forward: float
    total: float
    token_batches: int
    """Forward passes that held texts of the call."""
    tokens: int
    padded_tokens: int


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors in input order; ``np.asarray(embeddings)`` is the matrix."""

    vectors: NDArray[np.float32]
    """(n, dimensions) float32, C order."""
    n_tokens: NDArray[np.int32]
    """(n,) int32, special tokens and prompt included, before any truncation."""
    truncated: NDArray[np.bool_]
    """(n,) bool: the text was longer than the model reads, and its end was cut off."""
    timings: Timings

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.vectors)
