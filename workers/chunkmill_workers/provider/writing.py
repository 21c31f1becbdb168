"""Writes the vectors that a provider made. Nothing else does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.openai.plan.packing import PackedInput
from chunkmill.spaces.registry import Space
from chunkmill.store.read import keep_deletions_out, wanted
from chunkmill.store.write import write_vectors


def write(conn: sa.Connection, space: Space, rows: Sequence[PackedInput], vectors: NDArray[np.float32]) -> int:
    """Write the vectors of the contents that were not deleted meanwhile. Returns how many vectors are new."""
    if not rows:
        return 0
    keep_deletions_out(conn)
    there = wanted(conn, [row.content_hash for row in rows])
    kept = [i for i, row in enumerate(rows) if row.content_hash in there]
    return write_vectors(
        conn,
        space,
        space.spec.fingerprint,
        [rows[i].content_hash for i in kept],
        np.array([rows[i].n_tokens for i in kept], np.int32),
        np.array([rows[i].truncated for i in kept], np.bool_),
        vectors[kept],
    )
