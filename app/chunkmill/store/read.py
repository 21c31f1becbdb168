"""Texts for the worker, vectors for the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.spaces.registry import DELETE_LOCK, Space


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of a ChunkBatch: ``(content_hash, text)`` to embed, and the counts of the rest.

    ``known`` contents have a vector by now, ``truncated`` of them were cut: ``(content_hash, n_tokens)``. A
    hash that is in neither was deleted since the enqueue. ``deletions`` says after how many deletions the
    texts were read.
    """

    texts: list[tuple[bytes, str]]
    known: int
    truncated: list[tuple[bytes, int]]
    deletions: int


def read_work(conn: sa.Connection, space: Space, chunk_batch_id: int) -> Work:
    """Read a ChunkBatch's texts, dropping the contents that got a vector meanwhile."""
    facts = {"id": chunk_batch_id}
    hashes = "(SELECT unnest(content_hashes) FROM chunk_batches WHERE id = :id)"
    # A sequence shows its new value before the deletion that raised it commits. Behind the lock no deletion is
    # half done, so texts and count are of one state.
    keep_deletions_out(conn)
    deletions = _count_deletions(conn)
    known = conn.execute(
        sa.text(f"SELECT count(*) FROM {space.table_name} WHERE content_hash IN {hashes}"), facts
    ).scalar_one()
    truncated = conn.execute(
        sa.text(f"SELECT content_hash, n_tokens FROM {space.table_name} WHERE truncated AND content_hash IN {hashes}"),
        facts,
    )
    texts = conn.execute(
        sa.text(
            f"SELECT c.content_hash, c.text FROM contents c WHERE c.content_hash IN {hashes} "
            f"AND NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = c.content_hash)"
        ),
        facts,
    )
    return Work(
        texts=[(content_hash, text) for content_hash, text in texts.fetchall()],
        known=known,
        truncated=[(content_hash, n_tokens) for content_hash, n_tokens in truncated.fetchall()],
        deletions=deletions,
    )


def count_vectors(conn: sa.Connection, space: Space, hashes: Sequence[bytes]) -> int:
    """How many of these contents have a vector."""
    if not hashes:
        return 0
    return int(
        conn.execute(
            sa.text(f"SELECT count(*) FROM {space.table_name} WHERE content_hash = ANY(:hashes)"),
            {"hashes": list(hashes)},
        ).scalar_one()
    )


def still_wanted(conn: sa.Connection, hashes: Sequence[bytes], *, since: int) -> set[bytes] | None:
    """Which contents are still there to have a vector; None for all, when nothing was deleted ``since``.

    Takes the lock that keeps a deletion out until this transaction has written them.
    """
    keep_deletions_out(conn)
    return None if _count_deletions(conn) == since else wanted(conn, hashes)


def wanted(conn: sa.Connection, hashes: Sequence[bytes]) -> set[bytes]:
    """Which contents are there. Behind ``keep_deletions_out`` they stay so."""
    rows = conn.execute(
        sa.text("SELECT content_hash FROM contents WHERE content_hash = ANY(:hashes)"), {"hashes": list(hashes)}
    )
    return set(rows.scalars())


def keep_deletions_out(conn: sa.Connection) -> None:
    """Until the end of this transaction."""
    conn.execute(sa.text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": DELETE_LOCK})


def _count_deletions(conn: sa.Connection) -> int:
    """A number that every ``delete`` raises."""
    return int(conn.execute(sa.text("SELECT last_value FROM deletions")).scalar_one())


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
