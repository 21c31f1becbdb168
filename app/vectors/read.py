"""Texts for the worker, vectors for the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from app.db.spaces import Space


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of a ChunkBatch: ``(content_hash, text)`` to embed, and the counts of the rest.

    ``known`` contents have a vector by now, ``truncated`` of them were cut; a hash that is in neither was
    deleted since the enqueue.
    """

    texts: list[tuple[bytes, str]]
    known: int
    truncated: int


def read_work(conn: sa.Connection, space: Space, chunk_batch_id: int) -> Work:
    """Read a ChunkBatch's texts, dropping the contents that got a vector meanwhile."""
    hashes = "(SELECT unnest(content_hashes) FROM chunk_batches WHERE id = :id)"
    known = conn.execute(
        sa.text(
            f"SELECT count(*) AS n, count(*) FILTER (WHERE truncated) AS truncated FROM {space.table_name} "
            f"WHERE content_hash IN {hashes}"
        ),
        {"id": chunk_batch_id},
    ).one()
    rows = conn.execute(
        sa.text(
            f"SELECT c.content_hash, c.text FROM contents c WHERE c.content_hash IN {hashes} "
            f"AND NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = c.content_hash)"
        ),
        {"id": chunk_batch_id},
    )
    return Work([(bytes(content_hash), text) for content_hash, text in rows], known.n, known.truncated)


def read_vectors(
    conn: sa.Connection, space: Space, *, collection_id: int, chunk_ids: Sequence[str] | None
) -> dict[str, NDArray[np.float32]]:
    """``chunk_id → (d,) float32``; chunks without a vector are left out. All chunks when ids are None."""
    chosen = "" if chunk_ids is None else "AND c.chunk_id = ANY(:ids)"
    rows = conn.execute(
        sa.text(
            f"SELECT c.chunk_id, v.embedding::real[] AS embedding FROM chunks c "
            f"JOIN {space.table_name} v USING (content_hash) WHERE c.collection_id = :collection {chosen} "
            "ORDER BY c.chunk_id"
        ),
        {"collection": collection_id, "ids": list(chunk_ids or ())},
    )
    return {row.chunk_id: np.asarray(row.embedding, dtype=np.float32) for row in rows}
