"""Which vectors a space can hold. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
