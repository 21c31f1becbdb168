"""Finds the chunks of a collection that a source does not have and that were written before the source was read.

A row of Postgres names the transaction that wrote it (``xmin``). The number of the next transaction, read while no
window of an enqueue is under way, divides the chunks: what is written from then on has a number that is not smaller.
An enqueue that finds a chunk unchanged writes nothing, so while the collection is watched, it writes that chunk too.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.db.locks import REPLACE_LOCK
from chunkmill.domain.filters import Filter
from chunkmill.spaces import others
from chunkmill.store.delete import begin_deletion, delete_unreferenced

WINDOW = 20_000
"""How many chunks one statement looks at."""
SOURCE_IDS = "source_ids"
"""The temporary table of a session with the ids that its source has."""
REFUSED_IDS = "refused_ids"
"""The temporary table of a session with the ids of chunks and documents that its source has, but whose text was
refused."""

_NEXT = "SELECT CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint) AS number"
"""The number of the next transaction. The fence, and what is compared with it, must be counted in the same way."""


def is_old(written_by: str) -> str:
    """The condition in SQL that a row was written before the ``fence``. ``written_by`` is its ``xmin`` as a bigint, and
    ``n.number`` the number of the next transaction.

    A row has the lowest 32 bits of a number. If the row is so old that these bits stand for another number, it counts
    as newer at worst, and stays.
    """
    return f"n.number - ((n.number - {written_by}) & 4294967295) < :fence"


def watch(conn: sa.Connection, collection_id: int) -> int | None:
    """Watch the collection from now on, until :func:`unwatch` or the end of the connection.

    Returns the fence: the number of the first transaction that writes later. None if the collection was dropped. Call
    it in a transaction of its own. It waits for the windows that are under way.
    """
    lock = "SELECT pg_advisory_lock_shared(:key, :id)"
    conn.execute(sa.text(lock), {"key": REPLACE_LOCK, "id": collection_id})
    if others.lock_for_change(conn, collection_id).active is None:
        return None
    return int(conn.execute(sa.text(_NEXT)).scalar_one())


def unwatch(conn: sa.Connection, collection_id: int) -> None:
    """End what :func:`watch` began."""
    unlock = "SELECT pg_advisory_unlock_shared(:key, :id)"
    conn.execute(sa.text(unlock), {"key": REPLACE_LOCK, "id": collection_id})


def create_source_ids(conn: sa.Connection) -> None:
    """Create the temporary tables. Drop them with :func:`chunkmill.db.temporary.dropping`."""
    conn.execute(sa.text(f"CREATE TEMP TABLE {SOURCE_IDS} (chunk_id text PRIMARY KEY)"))
    conn.execute(sa.text(f"CREATE TEMP TABLE {REFUSED_IDS} (id text PRIMARY KEY)"))


def add_source_ids(conn: sa.Connection, ids: Sequence[str]) -> None:
    """Note that the source has these ids. One that comes again is noted once."""
    insert = f"INSERT INTO {SOURCE_IDS} SELECT unnest(CAST(:ids AS text[])) ON CONFLICT DO NOTHING"
    conn.execute(sa.text(insert), {"ids": list(ids)})


def add_refused_ids(conn: sa.Connection, ids: Sequence[str]) -> None:
    """Note that the source has these ids, and that their texts could not be read. The chunks with these ids stay, and
    so do those that :mod:`chunkmill.chunking` cut from documents with these ids."""
    insert = f"INSERT INTO {REFUSED_IDS} SELECT unnest(CAST(:ids AS text[])) ON CONFLICT DO NOTHING"
    conn.execute(sa.text(insert), {"ids": list(ids)})


def pick_missing(
    conn: sa.Connection, *, collection_id: int, chosen: Filter, fence: int, job_id: int, after: str
) -> tuple[list[str], str | None]:
    """The ids among the next :data:`WINDOW` chunks behind ``after`` that the source does not have, and that passed the
    filter and were written before the ``fence`` and by no later job than ``job_id``. With it comes the id behind which
    the next window begins; None if this one was the last.
    """
    condition, values = chosen.sql("c.metadata")
    query = f"""
        WITH looked_at AS MATERIALIZED (
            SELECT chunk_id, job_id, metadata, CAST(CAST(xmin AS text) AS bigint) AS written_by
            FROM chunks
            WHERE collection_id = :collection AND chunk_id > :after
            ORDER BY chunk_id
            LIMIT :size
        ),
        missing AS (
            SELECT c.chunk_id
            FROM looked_at c
            CROSS JOIN ({_NEXT}) n
            WHERE c.job_id <= :job AND {is_old("c.written_by")} AND ({condition})
              AND NOT EXISTS (SELECT FROM {SOURCE_IDS} s WHERE s.chunk_id = c.chunk_id)
              AND NOT EXISTS (
                  SELECT FROM {REFUSED_IDS} r WHERE r.id IN (c.chunk_id, regexp_replace(c.chunk_id, '#[^#]*$', ''))
              )
        )
        SELECT (SELECT array_agg(chunk_id ORDER BY chunk_id) FROM missing) AS ids,
               (SELECT CASE WHEN count(*) = :size THEN max(chunk_id) END FROM looked_at) AS last
    """
    parameters = {"collection": collection_id, "after": after, "size": WINDOW, "fence": fence, "job": job_id}
    row = conn.execute(sa.text(query), parameters | values).one()
    return row.ids or [], row.last


def delete_missing(conn: sa.Connection, *, collection_id: int, fence: int, ids: Sequence[str]) -> int:
    """Delete those of ``ids``, which :func:`pick_missing` gave, that nobody has written since, with texts that nothing
    uses. Returns how many were deleted.
    """
    begin_deletion(conn)
    delete = f"""
        DELETE FROM chunks c
        USING ({_NEXT}) n
        WHERE c.collection_id = :collection AND c.chunk_id = ANY(:ids)
          AND {is_old("CAST(CAST(c.xmin AS text) AS bigint)")}
        RETURNING c.content_hash
    """
    parameters = {"collection": collection_id, "ids": list(ids), "fence": fence}
    hashes = conn.execute(sa.text(delete), parameters).scalars().all()
    delete_unreferenced(conn, hashes)
    return len(hashes)
