"""Delete chunks, and with the last reference to a content its text and its vectors."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.db.locks import DELETE_LOCK, lock
from chunkmill.spaces.registry import all_tables


def delete_some(conn: sa.Connection, *, collection_id: int, chunk_ids: Sequence[str] | None, limit: int) -> int:
    """Delete up to ``limit`` chunks (of ``chunk_ids``, or of all) and the contents that no chunk refers to any more.

    Returns how many chunks were deleted. The exclusive lock keeps an enqueue from referring to a content in the moment
    of its deletion; it is held for this one transaction.
    """
    begin_deletion(conn)
    if chunk_ids is None:
        delete = """
            DELETE FROM chunks
            WHERE (collection_id, chunk_id) IN (
                SELECT collection_id, chunk_id
                FROM chunks
                WHERE collection_id = :collection
                LIMIT :limit
            )
            RETURNING content_hash
        """
    else:
        delete = """
            DELETE FROM chunks
            WHERE (collection_id, chunk_id) IN (
                SELECT collection_id, chunk_id
                FROM chunks
                WHERE collection_id = :collection AND chunk_id = ANY(:ids)
                LIMIT :limit
            )
            RETURNING content_hash
        """
    parameters = {"collection": collection_id, "ids": list(chunk_ids or ()), "limit": limit}
    hashes = conn.execute(sa.text(delete), parameters).scalars().all()
    delete_unreferenced(conn, hashes)
    return len(hashes)


def delete_unreferenced(conn: sa.Connection, hashes: Sequence[bytes]) -> None:
    """Delete the texts and vectors of those contents that no chunk refers to. Call it after ``begin_deletion``."""
    for table in [*(space.table_name for space in all_tables(conn)), "contents"]:
        delete = f"""
            DELETE FROM {table} t
            WHERE t.content_hash = ANY(:hashes)
              AND NOT EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash)
        """
        conn.execute(sa.text(delete), {"hashes": list(hashes)})


def begin_deletion(conn: sa.Connection) -> None:
    """Keep everyone who adds chunks, contents or vectors out until the end of this transaction, and count a deletion.

    The count tells the workers that texts which they have read may be deleted by the time their vectors are ready.
    """
    lock(conn, DELETE_LOCK)
    conn.execute(sa.text("SELECT nextval('deletions')"))
