"""Builds the segments of serving indexes.

A builder may be killed at any point. A search reads a segment only once it is live, and who builds next drops what was
left half built. No producer, worker or search waits for a builder, but for the moment in which an index begins
(`_begin`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import sqlalchemy as sa

from chunkmill.db.locks import DELETE_LOCK, FLUSH_LOCK, MERGE_LOCK, lock
from chunkmill.domain.serving import (
    MAX_FLUSH_ROWS,
    MIN_ROWS,
    STALE_SHARE,
    BuilderKind,
    Segment,
    SegmentKind,
    kind_for,
    segments_to_merge,
)
from chunkmill.spaces.registry import Space
from chunkmill.store import segments

BEGIN_PATIENCE_S = 10
"""How many seconds the beginning of an index waits for transactions that write. It is tried again later."""
LOOK_S = 0.1
"""How many seconds pass until somebody who waits for another builder looks again."""
STALE_PAUSE_S = 600
"""At least how many seconds pass between two looks for rows that belong to no chunk, which read all segments."""
GRAPH_NODE_BYTES = 300
"""What a node of a graph takes in memory beside its vector, with pgvector's 16 neighbours a layer."""


@dataclass(frozen=True, slots=True)
class Built:
    """A segment that is live now, and the segments that it replaced."""

    segment: Segment
    replaced: tuple[Segment, ...] = ()


def graph_bytes(rows: int, dimensions: int) -> int:
    """About how many bytes of memory Postgres needs to build the graph of a segment of so many rows at once."""
    return rows * (GRAPH_NODE_BYTES + 2 * dimensions)


def flush(db: sa.Engine, space: Space, collection_id: int, *, wait: bool = False) -> Built | None:
    """Make a flat segment of a collection's tail, or begin its serving index.

    Returns None if nothing is to do. If another builder is at it, this returns None at once, or waits until that one
    has finished if ``wait`` says so.
    """
    with _alone(db, FLUSH_LOCK, collection_id, wait=wait) as conn:
        if conn is None:
            return None
        with conn.begin():
            segments.drop_unread(conn, collection_id, BuilderKind.FLUSH)
            index = segments.find(conn, collection_id, space.id)
            if index is None and not _has_chunks(conn, collection_id, MIN_ROWS):
                return None
            if index is not None and index.is_ready and not _has_tail(conn, space, collection_id, MIN_ROWS):
                return None
        if index is None or not index.is_ready:
            return _build_first(conn, space, collection_id)
        with conn.begin():
            new = segments.create(conn, collection_id, space, SegmentKind.FLAT, BuilderKind.FLUSH)
        with conn.begin():
            # What is in the tail and cannot be in the segment is of the same moment as what is in it.
            conn.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            fill = "SELECT filled, useless FROM fill_segment_from_tail(:id, :most)"
            rows, useless = conn.execute(sa.text(fill), {"id": new.id, "most": MAX_FLUSH_ROWS}).one()
        _finish(conn, new)
        with conn.begin():
            segments.publish(conn, new, rows, useless=useless or ())
        return Built(Segment(new.id, new.kind, rows))


def merge(db: sa.Engine, space: Space, collection_id: int, *, memory_mb: int, wait: bool = False) -> Built | None:
    """Make one segment of several, or write a segment anew whose rows are largely deleted.

    ``memory_mb`` is what Postgres may use to build a graph. A graph that needs more is built much more slowly. What is
    returned, and ``wait``, are as in :func:`flush`.
    """
    with _alone(db, MERGE_LOCK, collection_id, wait=wait) as conn:
        if conn is None:
            return None
        with conn.begin():
            segments.drop_unread(conn, collection_id, BuilderKind.MERGE)
            index = segments.find(conn, collection_id, space.id)
            if index is None:
                return None
            stale = _stale_segments(conn, space, collection_id)
            old = segments_to_merge(index.segments, dimensions=space.spec.dimensions, stale=stale)
            if not old:
                return None
            kind = kind_for(sum(segment.rows for segment in old), space.spec.dimensions)
            new = segments.create(conn, collection_id, space, kind, BuilderKind.MERGE)
        with conn.begin():
            # Two segments may hold the same content, with the same vector. What belongs to no chunk is left out.
            fill = "SELECT fill_segment_from_others(:id, CAST(:old AS bigint[]))"
            parameters = {"id": new.id, "old": [segment.id for segment in old]}
            rows = conn.execute(sa.text(fill), parameters).scalar_one()
        _finish(conn, new, memory_mb=memory_mb)
        with conn.begin():
            segments.publish(conn, new, rows, replaces=old)
        return Built(Segment(new.id, kind, rows), tuple(old))


@contextlib.contextmanager
def _alone(db: sa.Engine, key: int, collection_id: int, *, wait: bool) -> Iterator[sa.Connection | None]:
    """A connection that holds the collection's lock of this kind; None if another one holds it."""
    keys = {"key": key, "collection": collection_id}
    with db.connect() as conn:
        # Asked again and again, because a graph takes longer than a statement may take.
        while True:
            taken = conn.execute(sa.text("SELECT pg_try_advisory_lock(:key, :collection)"), keys).scalar_one()
            conn.commit()
            if taken or not wait:
                break
            time.sleep(LOOK_S)
        try:
            yield conn if taken else None
        finally:
            if taken:
                conn.rollback()
                conn.execute(sa.text("SELECT pg_advisory_unlock(:key, :collection)"), keys)
                conn.commit()


def _build_first(conn: sa.Connection, space: Space, collection_id: int) -> Built | None:
    """Begin the tail of a collection, and put into its first segment what has a chunk and a vector already.

    If an earlier builder died in between, this begins again. Until the end, searches are exact. Returns None if writers
    left no moment for it, so that it is tried again later.
    """
    try:
        with conn.begin():
            conn.execute(sa.text(f"SET LOCAL lock_timeout = '{BEGIN_PATIENCE_S}s'"))
            watch = "SELECT watch_collection(:collection, :space)"
            conn.execute(sa.text(watch), {"collection": collection_id, "space": space.id})
        with conn.begin():
            # Everyone who writes chunks or vectors holds the shared side of this lock until the end of the transaction.
            # So whoever has not seen the index has committed, and everybody else fills the tail.
            conn.execute(sa.text(f"SET LOCAL lock_timeout = '{BEGIN_PATIENCE_S}s'"))
            lock(conn, DELETE_LOCK)
    except sa.exc.OperationalError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            return None
        raise
    with conn.begin():
        new = segments.create(conn, collection_id, space, SegmentKind.FLAT, BuilderKind.FLUSH)
    with conn.begin():
        rows = conn.execute(sa.text("SELECT fill_first_segment(:id)"), {"id": new.id}).scalar_one()
    _finish(conn, new)
    with conn.begin():
        segments.publish(conn, new, rows)
    return Built(Segment(new.id, new.kind, rows))


def collections_to_index(conn: sa.Connection) -> list[tuple[int, int]]:
    """``(collection id, space id)`` of the collections that have a serving index or are large enough for one.

    The indexes of collections that moved to another space, or are gone, are forgotten.
    """
    moved = """
        SELECT i.collection_id, i.space_id
        FROM serving_indexes i
        LEFT JOIN collections k ON k.id = i.collection_id
        WHERE k.space_id IS DISTINCT FROM i.space_id OR to_jsonb(k) ->> 'dropped_at' IS NOT NULL
    """
    for row in conn.execute(sa.text(moved)).all():
        segments.forget(conn, row.collection_id, row.space_id)
    large = """
        SELECT k.id, k.space_id
        FROM collections k
        WHERE to_jsonb(k) ->> 'dropped_at' IS NULL
          AND (EXISTS (SELECT FROM serving_indexes i WHERE i.collection_id = k.id)
               OR EXISTS (SELECT FROM chunks c WHERE c.collection_id = k.id OFFSET :least LIMIT 1))
        ORDER BY k.id
    """
    rows = conn.execute(sa.text(large), {"least": MIN_ROWS - 1})
    return [(row.id, row.space_id) for row in rows]


def index_metadata(db: sa.Engine) -> None:
    """Build the index that finds chunks by their metadata, if this role owns the chunks. Writers go on meanwhile.

    What an interrupted build left is built again: writes maintain it, and no query uses it.
    """
    look = """
        SELECT pg_has_role(t.relowner, 'USAGE') AS may, i.indisvalid
        FROM pg_class t
        LEFT JOIN pg_index i ON i.indrelid = t.oid AND i.indexrelid = to_regclass('ix_chunks_metadata')
        WHERE t.oid = to_regclass('chunks')
    """
    # CREATE INDEX CONCURRENTLY cannot run inside a transaction.
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        row = conn.execute(sa.text(look)).one()
        if not row.may or row.indisvalid:
            return
        conn.execute(sa.text("DROP INDEX CONCURRENTLY IF EXISTS ix_chunks_metadata"))
        create = """
            CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_chunks_metadata ON chunks
            USING gin (metadata jsonb_path_ops)
        """
        conn.execute(sa.text(create))


def _has_chunks(conn: sa.Connection, collection_id: int, least: int) -> bool:
    query = "SELECT EXISTS (SELECT FROM chunks WHERE collection_id = :collection OFFSET :least LIMIT 1)"
    return bool(conn.execute(sa.text(query), {"collection": collection_id, "least": least - 1}).scalar_one())


def _has_tail(conn: sa.Connection, space: Space, collection_id: int, least: int) -> bool:
    query = """
        SELECT EXISTS (
            SELECT FROM serving_tail WHERE collection_id = :collection AND space_id = :space OFFSET :least LIMIT 1)
    """
    parameters = {"collection": collection_id, "space": space.id, "least": least - 1}
    return bool(conn.execute(sa.text(query), parameters).scalar_one())


def _finish(conn: sa.Connection, new: Segment, *, memory_mb: int | None = None) -> None:
    with conn.begin():
        if memory_mb is not None:
            conn.execute(sa.text(f"SET LOCAL maintenance_work_mem = '{memory_mb}MB'"))
        conn.execute(sa.text("SELECT finish_segment(:id)"), {"id": new.id})


def _stale_segments(conn: sa.Connection, space: Space, collection_id: int) -> list[int]:
    """The ids of segments of which too many rows belong to no chunk.

    They are looked for if chunks were deleted or replaced since the last look; what replaces a chunk comes with a newer
    segment.
    """
    call = "SELECT stale_segments(:collection, :space, :pause, :share)"
    parameters = {
        "collection": collection_id,
        "space": space.id,
        "pause": float(STALE_PAUSE_S),
        "share": STALE_SHARE,
    }
    return list(conn.execute(sa.text(call), parameters).scalar_one())
