"""Delete chunks, and with the last reference to a text the text itself and its vectors."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.spaces.registry import DELETE_LOCK, all_spaces


def delete_some(conn: sa.Connection, *, collection_id: int, chunk_ids: Sequence[str] | None, limit: int) -> int:
    """Delete up to ``limit`` chunks (of ``chunk_ids``, or of all) and what nothing refers to any more.

    Returns how many chunks went. The exclusive lock keeps an enqueue from pointing at a content in the
    moment of its deletion; it is held for this one transaction.
    """
    conn.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": DELETE_LOCK})
    # Tells the workers that texts they have read may be gone by the time their vectors are there.
    conn.execute(sa.text("SELECT nextval('deletions')"))
    chosen = "" if chunk_ids is None else "AND chunk_id = ANY(:ids)"
    hashes = list(
        conn.execute(
            sa.text(
                "DELETE FROM chunks WHERE (collection_id, chunk_id) IN (SELECT collection_id, chunk_id FROM chunks "
                f"WHERE collection_id = :collection {chosen} LIMIT :limit) RETURNING content_hash"
            ),
            {"collection": collection_id, "ids": list(chunk_ids or ()), "limit": limit},
        ).scalars()
    )
    unreferenced = (
        "WHERE t.content_hash = ANY(:hashes) "
        "AND NOT EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash)"
    )
    for space in all_spaces(conn):
        conn.execute(sa.text(f"DELETE FROM {space.table_name} t {unreferenced}"), {"hashes": hashes})
    conn.execute(sa.text(f"DELETE FROM contents t {unreferenced}"), {"hashes": hashes})
    return len(hashes)
