"""Builds the segments of serving indexes.

A builder may be killed at any point. A search reads a segment only once it is live, and who builds next drops what was
left half built. No producer, worker or search waits for a builder, but for the moment in which an index begins
(`_begin`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.db.locks import DELETE_LOCK, FLUSH_LOCK, MERGE_LOCK, lock
from chunkmill.domain.serving import (
    MAX_FLUSH_ROWS,
    MIN_ROWS,
    STALE_SHARE,
    BuilderKind,
    Segment,
    SegmentKind,
    SegmentState,
    kind_for,
    segments_to_merge,
)
from chunkmill.spaces.registry import Space
from chunkmill.store import segments
from chunkmill.store.segments import ServingIndex

BEGIN_PATIENCE_S = 10
"""How many seconds the beginning of an index waits for transactions that write. It is tried again later."""
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


def flush(db: sa.Engine, space: Space, collection_id: int) -> Built | None:
    """Make a flat segment of a collection's tail, or begin its serving index.

    Returns None if nothing is to do, or if another builder is at it.
    """
    with _alone(db, FLUSH_LOCK, collection_id) as conn:
        if conn is None:
            return None
        with conn.begin():
            segments.drop_unread(conn, collection_id, BuilderKind.FLUSH)
            index = segments.find(conn, collection_id, space.id)
            if index is None and not _has_chunks(conn, collection_id, MIN_ROWS):
                return None
        if index is None or not index.is_ready:
            return _build_first(conn, space, collection_id)
        with conn.begin():
            if not _has_tail(conn, space, collection_id, MIN_ROWS):
                return None
            new = segments.create(conn, collection_id, space, SegmentKind.FLAT, BuilderKind.FLUSH)
        rows, useless = _fill_from_tail(conn, space, collection_id, new)
        return _publish_tail(conn, space, collection_id, new, rows=rows, useless=useless)


def merge(db: sa.Engine, space: Space, collection_id: int, *, memory_mb: int) -> Built | None:
    """Make one segment of several, or write a segment anew whose rows are largely deleted.

    ``memory_mb`` is what Postgres may use to build a graph. A graph that needs more is built much more slowly. Returns
    None if nothing is to do, or if another builder is at it.
    """
    with _alone(db, MERGE_LOCK, collection_id) as conn:
        if conn is None:
            return None
        with conn.begin():
            segments.drop_unread(conn, collection_id, BuilderKind.MERGE)
            index = segments.find(conn, collection_id, space.id)
            if index is None:
                return None
            stale = _stale_segments(conn, space, collection_id, index)
            old = segments_to_merge(index.segments, dimensions=space.spec.dimensions, stale=stale)
            if not old:
                return None
            kind = kind_for(sum(segment.rows for segment in old), space.spec.dimensions)
            new = segments.create(conn, collection_id, space, kind, BuilderKind.MERGE)
        rows = _fill_from_segments(conn, collection_id, new, old)
        _finish(conn, new, memory_mb=memory_mb)
        with conn.begin():
            _go_live(conn, new, rows)
            retire = "UPDATE segments SET state = :retired, retired_at = now() WHERE id = ANY(:old)"
            ids = [segment.id for segment in old]
            conn.execute(sa.text(retire), {"retired": SegmentState.RETIRED, "old": ids})
        return Built(Segment(new.id, kind, rows), tuple(old))


@contextlib.contextmanager
def _alone(db: sa.Engine, key: int, collection_id: int) -> Iterator[sa.Connection | None]:
    """A connection that holds the collection's lock of this kind; None if another one holds it."""
    keys = {"key": key, "collection": collection_id}
    with db.connect() as conn:
        taken = conn.execute(sa.text("SELECT pg_try_advisory_lock(:key, :collection)"), keys).scalar_one()
        conn.commit()
        try:
            yield conn if taken else None
        finally:
            if taken:
                conn.rollback()
                conn.execute(sa.text("SELECT pg_advisory_unlock(:key, :collection)"), keys)
                conn.commit()


def _build_first(conn: sa.Connection, space: Space, collection_id: int) -> Built | None:
    """Begin the tail of a collection, and put into its first segment what has a chunk and a vector already.

    If an earlier builder died in between, this begins again. Until the end, searches are exact.
    """
    with conn.begin():
        conn.execute(sa.text(f"SET LOCAL lock_timeout = '{BEGIN_PATIENCE_S}s'"))
        watch = "SELECT watch_collection(:collection, :space)"
        conn.execute(sa.text(watch), {"collection": collection_id, "space": space.id})
    with conn.begin():
        # Everyone who writes chunks or vectors holds the shared side of this lock until the end of the transaction. So
        # whoever has not seen the index has committed, and everybody else fills the tail.
        conn.execute(sa.text(f"SET LOCAL lock_timeout = '{BEGIN_PATIENCE_S}s'"))
        lock(conn, DELETE_LOCK)
    with conn.begin():
        new = segments.create(conn, collection_id, space, SegmentKind.FLAT, BuilderKind.FLUSH)
    fill = f"""
        INSERT INTO {new.table_name} (content_hash, embedding)
        SELECT v.content_hash, v.embedding::halfvec({space.spec.dimensions})
        FROM (SELECT DISTINCT content_hash FROM chunks WHERE collection_id = :collection) c
        JOIN {space.table_name} v USING (content_hash)
    """
    with conn.begin():
        rows = conn.execute(sa.text(fill), {"collection": collection_id}).rowcount
    _finish(conn, new)
    with conn.begin():
        _go_live(conn, new, rows)
        be_ready = "UPDATE serving_indexes SET is_ready = true WHERE collection_id = :collection AND space_id = :space"
        conn.execute(sa.text(be_ready), {"collection": collection_id, "space": space.id})
    return Built(Segment(new.id, new.kind, rows))


def collections_to_index(conn: sa.Connection) -> list[tuple[int, int]]:
    """``(collection id, space id)`` of the collections that have a serving index or are large enough for one.

    The indexes of collections that moved to another space, or are gone, are forgotten.
    """
    moved = """
        SELECT i.collection_id, i.space_id
        FROM serving_indexes i
        LEFT JOIN collections k ON k.id = i.collection_id
        WHERE k.space_id IS DISTINCT FROM i.space_id
    """
    for row in conn.execute(sa.text(moved)).all():
        segments.forget(conn, row.collection_id, row.space_id)
    large = """
        SELECT k.id, k.space_id
        FROM collections k
        WHERE EXISTS (SELECT FROM serving_indexes i WHERE i.collection_id = k.id)
           OR EXISTS (SELECT FROM chunks c WHERE c.collection_id = k.id OFFSET :least LIMIT 1)
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


def _fill_from_tail(conn: sa.Connection, space: Space, collection_id: int, new: Segment) -> tuple[int, list[int]]:
    """Copy vectors of the tail. Returns how many, and the ids of the tail's rows that have no chunk or no vector."""
    some = """
        SELECT id, content_hash
        FROM serving_tail
        WHERE collection_id = :collection AND space_id = :space
        ORDER BY id
        LIMIT :most
    """
    has_chunk = "EXISTS (SELECT FROM chunks c WHERE c.content_hash = t.content_hash AND c.collection_id = :collection)"
    fill = f"""
        INSERT INTO {new.table_name} (content_hash, embedding)
        SELECT v.content_hash, v.embedding::halfvec({space.spec.dimensions})
        FROM (SELECT DISTINCT content_hash FROM ({some}) t WHERE {has_chunk}) t
        JOIN {space.table_name} v USING (content_hash)
    """
    select_useless = f"""
        SELECT t.id
        FROM ({some}) t
        WHERE NOT {has_chunk}
           OR NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = t.content_hash)
    """
    parameters = {"collection": collection_id, "space": space.id, "most": MAX_FLUSH_ROWS}
    with conn.begin():
        conn.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        rows = conn.execute(sa.text(fill), parameters).rowcount
        useless = list(conn.execute(sa.text(select_useless), parameters).scalars())
    _finish(conn, new)
    return rows, useless


def _publish_tail(
    conn: sa.Connection, space: Space, collection_id: int, new: Segment, *, rows: int, useless: Sequence[int]
) -> Built:
    """Let searches read the new segment, and take what it holds out of the tail."""
    take_out = f"""
        DELETE FROM serving_tail t
        USING {new.table_name} s
        WHERE t.collection_id = :collection AND t.space_id = :space AND t.content_hash = s.content_hash
    """
    with conn.begin():
        _go_live(conn, new, rows)
        conn.execute(sa.text(take_out), {"collection": collection_id, "space": space.id})
        # By their numbers: if such a content has got what it lacked, a new row says so.
        conn.execute(sa.text("DELETE FROM serving_tail WHERE id = ANY(:useless)"), {"useless": list(useless)})
    return Built(Segment(new.id, new.kind, rows))


def _fill_from_segments(conn: sa.Connection, collection_id: int, new: Segment, old: Sequence[Segment]) -> int:
    """Copy the rows that belong to a chunk. Two segments may hold the same content, with the same vector."""
    rows_of_all = " UNION ALL ".join(f"SELECT content_hash, embedding FROM {segment.table_name}" for segment in old)
    fill = f"""
        INSERT INTO {new.table_name} (content_hash, embedding)
        SELECT DISTINCT ON (s.content_hash) s.content_hash, s.embedding
        FROM ({rows_of_all}) s
        WHERE EXISTS (SELECT FROM chunks c WHERE c.content_hash = s.content_hash AND c.collection_id = :collection)
    """
    with conn.begin():
        return conn.execute(sa.text(fill), {"collection": collection_id}).rowcount


def _finish(conn: sa.Connection, new: Segment, *, memory_mb: int | None = None) -> None:
    with conn.begin():
        if memory_mb is not None:
            conn.execute(sa.text(f"SET LOCAL maintenance_work_mem = '{memory_mb}MB'"))
        conn.execute(sa.text("SELECT finish_segment(:id)"), {"id": new.id})


def _go_live(conn: sa.Connection, new: Segment, rows: int) -> None:
    go_live = "UPDATE segments SET state = :live, live_since = now(), n_rows = :rows WHERE id = :id"
    conn.execute(sa.text(go_live), {"live": SegmentState.LIVE, "rows": rows, "id": new.id})


def _stale_segments(conn: sa.Connection, space: Space, collection_id: int, index: ServingIndex) -> list[int]:
    """The ids of segments of which too many rows belong to no chunk.

    They are looked for if chunks were deleted or replaced since the last look; what replaces a chunk comes with a newer
    segment.
    """
    has_changed = """
        UPDATE serving_indexes i
        SET checked_at = now(), deletions = (SELECT last_value FROM deletions)
        WHERE i.collection_id = :collection AND i.space_id = :space
          AND i.checked_at < now() - make_interval(secs => :pause)
          AND (i.deletions <> (SELECT last_value FROM deletions)
               OR EXISTS (
                   SELECT
                   FROM segments s
                   WHERE s.collection_id = i.collection_id AND s.space_id = i.space_id AND s.live_since > i.checked_at))
    """
    parameters = {"collection": collection_id, "space": space.id, "pause": STALE_PAUSE_S}
    if conn.execute(sa.text(has_changed), parameters).rowcount == 0:
        return []
    stale = []
    for segment in index.segments:
        count = f"""
            SELECT count(*)
            FROM {segment.table_name} s
            WHERE NOT EXISTS (
                SELECT FROM chunks c WHERE c.content_hash = s.content_hash AND c.collection_id = :collection)
        """
        gone = conn.execute(sa.text(count), parameters).scalar_one()
        if gone > STALE_SHARE * segment.rows:
            stale.append(segment.id)
    return stale
