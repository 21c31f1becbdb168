"""Which vectors a space can hold, and how vectors are shortened to it. Pure."""

from __future__ import annotations

from chunkmill.system.numbers import NDArray, np

LARGEST_HALF = 65_504
"""The largest number of half precision, which ``halfvec`` stores."""
OUT_OF_RANGE = f"its vector has a number beyond {LARGEST_HALF:,}, the largest of a space that is stored as halfvec"
NOT_FINITE = "its vector has a number that is not finite"


def unfit(vectors: NDArray[np.float32], *, half: bool) -> NDArray[np.bool_]:
    """(n,) bool: the rows of ``(n, d)`` vectors that cannot be stored, in half precision if ``half``."""
    with np.errstate(over="ignore", invalid="ignore"):  # a number too large for half precision becomes infinite
        stored = vectors.astype(np.float16) if half else vectors
    return np.asarray(~np.isfinite(stored).all(axis=1), np.bool_)


def why_unfit(vector: NDArray[np.float32]) -> tuple[str, str]:
    """The code and the reason for one of the rows that :func:`unfit` names."""
    return ("out_of_range", OUT_OF_RANGE) if np.isfinite(vector).all() else ("not_finite", NOT_FINITE)


def shorten(vectors: NDArray[np.float32], dimensions: int, *, normalize: bool) -> NDArray[np.float32]:
    """The first ``dimensions`` numbers of each vector: (n, dimensions) float32 from (n, at least as many) float32.

    With ``normalize``, as the space says, they are then brought back to length 1. This is the order in which
    sentence-transformers applies ``truncate_dim`` and ``normalize_embeddings``. Vectors that already have
    ``dimensions`` numbers are returned unchanged.
    """
    if vectors.shape[1] <= dimensions:
        return vectors
    first = np.ascontiguousarray(vectors[:, :dimensions])
    return to_unit_length(first) if normalize else first


def to_unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(n, d)`` vectors brought to length 1, as float32. A zero vector stays a zero vector."""
    # The smallest divisor is that of torch's normalize.
    length = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit: NDArray[np.float32] = vectors / length
    return unit
