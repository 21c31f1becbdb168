"""What the engine hands out. Frozen, and every array states its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TextFailure:
    """A text that got no vector. ``reason`` never holds the text.

    ``code`` is ``too_long`` (policy reject), ``tokenize_failed``, ``forward_failed`` (the model raised on
    this text alone, out of memory included) or ``not_finite``.
    """

    index: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class TokenBatchResult:
    """What one forward pass finished. A text split into windows comes with the pass of its last window."""

    indices: NDArray[np.int32]
    """(m,) int32, positions in the texts given."""
    vectors: NDArray[np.float32]
    """(m, dimensions) float32, C order."""
    n_tokens: NDArray[np.int32]
    """(m,) int32, special tokens and prompt included, before any truncation."""
    truncated: NDArray[np.bool_]
    """(m,) bool."""
    failures: tuple[TextFailure, ...]
    seconds: float
    """Time on the device, without waiting for its turn."""
    tokens: int = 0
    """Tokens that went through the model."""
    padded_tokens: int = 0
    """The same with padding: rows x longest row."""
    under_way: int = 0
    """Texts of this call that were on the device when it was done; windows, where texts are split."""
    tokenize_seconds: float = 0.0
    """The first result of a stream carries the time that tokenizing all its texts took."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one ``embed`` went, in seconds; ``total`` includes waiting for the device."""

    tokenize: float
    forward: float
    total: float
    token_batches: int
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
    """(n,) bool."""
    timings: Timings

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.vectors)
