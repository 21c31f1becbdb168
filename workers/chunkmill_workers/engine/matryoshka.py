"""A full vector to the first dimensions of it, for a space that keeps fewer than the model makes. Pure: NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shorten(vectors: NDArray[np.float32], dimensions: int, *, normalize: bool) -> NDArray[np.float32]:
    """(n, dimensions) float32 from (n, at least as many): cut first, then brought back to length 1.

    The order of sentence-transformers' ``truncate_dim`` with ``normalize_embeddings``. ``normalize`` is the space's:
    a model that leaves its vectors as long as they are keeps them so. Vectors that are not cut come back untouched.
    """
    if vectors.shape[1] <= dimensions:
        return vectors
    first = np.ascontiguousarray(vectors[:, :dimensions])
    if not normalize:
        return first
    # The floor is that of torch's normalize: a zero vector stays one.
    length = np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1e-12)
    shortened: NDArray[np.float32] = first / length
    return shortened
