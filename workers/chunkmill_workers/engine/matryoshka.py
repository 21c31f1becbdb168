"""Shortens vectors, for a space with fewer dimensions than the model gives. Pure: NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shorten(vectors: NDArray[np.float32], dimensions: int, *, normalize: bool) -> NDArray[np.float32]:
    """The first ``dimensions`` numbers of each vector: (n, dimensions) float32 from (n, at least as many) float32.

    With ``normalize``, as the space says, they are then brought back to length 1. This is the order in which
    sentence-transformers applies ``truncate_dim`` and ``normalize_embeddings``. Vectors that already have
    ``dimensions`` numbers are returned unchanged.
    """
    if vectors.shape[1] <= dimensions:
        return vectors
    first = np.ascontiguousarray(vectors[:, :dimensions])
    if not normalize:
        return first
    # The smallest divisor is that of torch's normalize: a zero vector stays a zero vector.
    length = np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1e-12)
    shortened: NDArray[np.float32] = first / length
    return shortened
