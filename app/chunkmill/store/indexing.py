"""Builds the segments of serving indexes.

A builder may be killed at any point. A search reads a segment only once it is live, and the next builder drops what was
left half built. No producer, worker or search waits for a builder, except for a second at most when the first index of
a space begins (`_watch`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psycopg
import sqlalchemy as sa

from chunkmill.db.connect import refusal, sqlstate
from chunkmill.db.locks import (
    DELETE_LOCK,
    FLUSH_LOCK,
    FLUSH_SPACE_LOCK,
    MERGE_LOCK,
    MERGE_SPACE_LOCK,
    METADATA_LOCK,
    be_patient,
    holders,
)
from chunkmill.domain import serving
from chunkmill.domain.reembedding import ReembeddingState
from chunkmill.domain.serving import (
    MAX_FLUSH_ROWS,
    MIN_ROWS,
    STALE_SHARE,
    BuilderKind,
    Segment,
    SegmentKind,
    SegmentState,
    kind_for,
    rows_to_flush,
    segments_to_merge,
)
from chunkmill.errors import StoreUnavailable
from chunkmill.spaces import others
from chunkmill.spaces.collections import IS_KEPT
from chunkmill.spaces.registry import Space
from chunkmill.store import segments

TRIGGER_PATIENCE_S = 1
"""How many seconds the creation of a trigger waits for transactions that write, if that is long enough to end an
autovacuum. It is short because others wait behind it; the creation is tried again later."""
logger = logging.getLogger(__name__)

BEGIN_TRIES = 6
"""How often a call that wants an index tries to begin it."""
BEGIN_PATIENCE_S = 10
"""How many seconds the beginning of an index waits for transactions that write. Others are not held up meanwhile."""
LOOK_S = 0.1
"""How many seconds pass between two checks whether another builder has finished."""
STALE_PAUSE_S = 600
"""How many seconds pass at least between two searches for rows that belong to no chunk, because such a search reads all
segments."""
DISK_FULL = "53100"
"""The SQLSTATE of a server whose disk, or whose /dev/shm, is full."""
GRAPH_NODE_BYTES = 690
"""How many bytes a node of a graph takes in memory in addition to its vector, with pgvector's 16 neighbours a layer and
32 in the lowest one: 674 in its structures, and some for their area. Measured: 1,273 MiB held some 920,000 rows of 384
dimensions."""


@dataclass(frozen=True, slots=True)
class BuiltSegment:
    """A segment that is live now, and the segments that it replaced."""

    segment: Segment
    replaced: tuple[Segment, ...] = ()


def graph_bytes(kind: SegmentKind, rows: int, dimensions: int) -> int:
    """About how many bytes Postgres needs to build the graph of a segment with this number of rows in memory."""
    return rows * (GRAPH_NODE_BYTES + (dimensions // 8 if kind is SegmentKind.BITS else 2 * dimensions))


def flush(db: sa.Engine, space: Space, collection_id: int, *, wait: bool = False) -> BuiltSegment | None:
    """Make a flat segment of a collection's tail, or begin its serving index.

    Returns None if nothing is to do. If another builder is working on it, this returns None at once, or with ``wait``
    it waits until that one has finished.
    """
    with _building(db, BuilderKind.FLUSH, collection_id, space.id, wait=wait) as lock:
        if lock is None:
            return None
        conn = lock.conn
        with conn.begin():
            lock.drop_unread()
        with conn.begin():
            index = segments.find(conn, collection_id, space.id)
            if index is not None and index.has_lost:
                segments.forget(conn, collection_id, space.id)
                index = None
            if index is None and not _has_chunks(conn, collection_id, MIN_ROWS):
                return None
            if index is not None and index.is_ready:
                least = rows_to_flush(index.segments)
                if not _has_tail(conn, space, collection_id, MIN_ROWS if wait else least):
                    return None
        if index is None or not index.is_ready:
            return _build_first(conn, space, collection_id)
        with conn.begin():
            new = segments.create(conn, collection_id, space, SegmentKind.FLAT, BuilderKind.FLUSH)
        with conn.begin():
            # The rows of the tail that cannot enter the segment are read at the same moment as those that can.
            conn.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            _take_time(conn)
            fill = "SELECT filled, useless FROM fill_segment_from_tail(:id, :most)"
            rows, useless = conn.execute(sa.text(fill), {"id": new.id, "most": MAX_FLUSH_ROWS}).one()
        _finish(conn, new)
        with conn.begin():
            _take_time(conn)
            segments.publish(conn, new, rows, useless=useless or ())
        return BuiltSegment(Segment(new.id, new.kind, rows))


def merge(
    db: sa.Engine, space: Space, collection_id: int, *, memory_mb: int, compact: bool = False, wait: bool = False
) -> BuiltSegment | None:
    """Make one segment of several, or write a segment anew whose rows are largely deleted.

    ``memory_mb`` is what Postgres may use to build a graph. A graph that needs more is built much more slowly.
    ``compact`` asks for a graph of bits. What is returned, and ``wait``, are as in :func:`flush`.
    """
    with _building(db, BuilderKind.MERGE, collection_id, space.id, wait=wait) as lock:
        if lock is None:
            return None
        conn = lock.conn
        with conn.begin():
            lock.drop_unread()
        with conn.begin():
            _take_time(conn)
            stale = _stale_segments(conn, space, collection_id)
        with conn.begin():
            index = segments.find(conn, collection_id, space.id)
            if index is None or index.has_lost:
                return None
            old = segments_to_merge(index.segments, dimensions=space.spec.dimensions, stale=stale)
            if not old:
                return None
            rows = sum(segment.rows for segment in old)
            kind = kind_for(rows, space.spec.dimensions, compact=compact)
            new = segments.create(conn, collection_id, space, kind, BuilderKind.MERGE)
        needed_mb = graph_bytes(kind, rows, space.spec.dimensions) >> 20
        if kind is not SegmentKind.FLAT and needed_mb > memory_mb:
            logger.warning(
                "collection %s: a graph of %s rows needs about %s MiB of memory in Postgres, and INDEX_MEMORY_MB is "
                "%s, so it is built several times more slowly. Raise it if the server has that much memory.",
                collection_id, rows, needed_mb, memory_mb,
            )  # fmt: skip
        elif kind is not SegmentKind.FLAT:
            logger.info(
                "collection %s: a graph of %s rows takes about %s MiB of memory in Postgres, and INDEX_MEMORY_MB is %s",
                collection_id, rows, needed_mb, memory_mb,
            )  # fmt: skip
        with conn.begin():
            # What belongs to no chunk is left out, and what is in two segments is written once.
            _take_time(conn)
            fill = "SELECT fill_segment_from_others(:id, CAST(:old AS bigint[]))"
            parameters = {"id": new.id, "old": [segment.id for segment in old]}
            rows = conn.execute(sa.text(fill), parameters).scalar_one()
        _finish(conn, new, memory_mb=memory_mb)
        with conn.begin():
            _take_time(conn)
            segments.publish(conn, new, rows, replaces=old)
        return BuiltSegment(Segment(new.id, kind, rows), tuple(old))


def build_now(db: sa.Engine, space: Space, collection_id: int, *, memory_mb: int, compact: bool = False) -> None:
    """Flush and merge until all that the collection has when this begins is in segments of the right size.

    What is written meanwhile is left to the poller; otherwise this would go on for as long as somebody writes. Raises
    :class:`StoreUnavailable` if an index that the collection needs cannot begin.
    """
    for _ in range(BEGIN_TRIES):
        with db.begin() as conn:
            index = segments.find(conn, collection_id, space.id)
            is_needed = index is not None or _has_chunks(conn, collection_id, MIN_ROWS)
            noted = _count_tail(conn, space, collection_id)
        if not is_needed or (index is not None and index.is_ready):
            break
        flush(db, space, collection_id, wait=True)
    else:
        raise StoreUnavailable(
            f"the serving index of collection {collection_id} could not begin in {BEGIN_TRIES} tries, because a "
            "transaction that writes chunks or vectors, or a VACUUM of their tables, did not end. Searches are exact "
            "meanwhile. Look for it in pg_stat_activity (xact_start) and end it; the same call may be made again."
        )
    for _ in range(1 + noted // MAX_FLUSH_ROWS):
        if flush(db, space, collection_id, wait=True) is None:
            break
    with db.begin() as conn:
        index = segments.find(conn, collection_id, space.id)
    # The loop ends, because each merge makes the segments fewer, builds a missing graph, or rewrites a segment.
    for _ in range(1 + 2 * len(index.segments) if index else 0):
        if merge(db, space, collection_id, memory_mb=memory_mb, compact=compact, wait=True) is None:
            break


def drop_shared_graphs(db: sa.Engine, space: Space) -> list[str]:
    """Drop the graphs of a whole space that the last release built, if this role owns them. Returns their names.

    No search of this release reads them, and every vector that is written has to be added to them. Searches and writes
    do not wait for the drop.
    """
    dropped = []
    # One at a time, under the key of merges; a space has the negative of its number there.
    with _alone(db, [_Key(MERGE_LOCK, -space.id)], wait=True) as guard:
        if guard is None:
            return []
        # DROP INDEX CONCURRENTLY cannot run inside a transaction.
        with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            for name, is_ours in segments.shared_graphs(conn, space.table_name):
                if is_ours:
                    conn.execute(sa.text(f"DROP INDEX CONCURRENTLY IF EXISTS {name}"))
                    dropped.append(name)
    return dropped


@dataclass(frozen=True, slots=True)
class _Key:
    """Two keys of an advisory lock."""

    first: int
    second: int
    is_shared: bool = False

    def try_to_take(self, conn: sa.Connection) -> bool:
        call = "SELECT pg_try_advisory_lock_shared(:a, :b)" if self.is_shared else "SELECT pg_try_advisory_lock(:a, :b)"
        return bool(conn.execute(sa.text(call), {"a": self.first, "b": self.second}).scalar_one())

    def let_go(self, conn: sa.Connection) -> None:
        call = "SELECT pg_advisory_unlock_shared(:a, :b)" if self.is_shared else "SELECT pg_advisory_unlock(:a, :b)"
        conn.execute(sa.text(call), {"a": self.first, "b": self.second})


@contextlib.contextmanager
def _alone(db: sa.Engine, keys: Sequence[_Key], *, wait: bool) -> Iterator[sa.Connection | None]:
    """A connection that holds all of these locks; None if another one holds one of them."""
    with db.connect() as conn:
        # The locks are requested repeatedly, because a graph takes longer than a statement may take.
        while True:
            taken: list[_Key] = []
            for key in keys:
                if not key.try_to_take(conn):
                    break
                taken.append(key)
            if len(taken) < len(keys):
                for key in taken:
                    key.let_go(conn)
                taken = []
            conn.commit()
            if taken or not wait:
                break
            time.sleep(LOOK_S)
        try:
            yield conn if taken else None
        finally:
            if taken:
                conn.rollback()
                for key in taken:
                    key.let_go(conn)
                conn.commit()


@dataclass(frozen=True, slots=True)
class _Lock:
    """The lock of one builder of a collection in a space, and the connection that holds it."""

    conn: sa.Connection
    builder: BuilderKind
    collection_id: int
    space_id: int
    is_of_space: bool
    """Another space of the collection may have such a builder at the same time."""

    def drop_unread(self) -> int:
        space_id = self.space_id if self.is_of_space else None
        return segments.drop_unread(self.conn, self.collection_id, self.builder, space_id=space_id)


@contextlib.contextmanager
def _building(
    db: sa.Engine, builder: BuilderKind, collection_id: int, space_id: int, *, wait: bool
) -> Iterator[_Lock | None]:
    """The lock of the builder of this kind of a collection in a space; None if another one holds it.

    A builder of the last release holds the lock of the collection alone, because it drops what is half built in any
    space of it. On a schema that cannot tell spaces apart, builders of this release do so too.
    """
    of_collection, of_space = (
        (FLUSH_LOCK, FLUSH_SPACE_LOCK) if builder is BuilderKind.FLUSH else (MERGE_LOCK, MERGE_SPACE_LOCK)
    )
    with db.begin() as conn:
        is_of_space = segments.are_of_spaces(conn)
        # If two pairs happen to have the same key, they only wait for each other.
        both = "SELECT hashint8(CAST(:collection AS bigint) << 32 | CAST(:space AS bigint))"
        pair = conn.execute(sa.text(both), {"collection": collection_id, "space": space_id}).scalar_one()
    keys = [_Key(of_collection, collection_id, is_shared=is_of_space)]
    if is_of_space:
        keys.append(_Key(of_space, pair))
    with _alone(db, keys, wait=wait) as conn:
        yield None if conn is None else _Lock(conn, builder, collection_id, space_id, is_of_space)


def _build_first(conn: sa.Connection, space: Space, collection_id: int) -> BuiltSegment | None:
    """Begin the tail of a collection, and put into its first segment what has a chunk and a vector already.

    If an earlier builder died in between, this begins again. Until the end, searches are exact. Returns None if
    transactions that write never paused, so that it could not begin. It is tried again later.
    """
    if not _watch(conn, space, collection_id) or not _wait_for_writers(conn):
        return None
    with conn.begin():
        new = segments.create(conn, collection_id, space, SegmentKind.FLAT, BuilderKind.FLUSH)
    with conn.begin():
        _take_time(conn)
        rows = conn.execute(sa.text("SELECT fill_first_segment(:id)"), {"id": new.id}).scalar_one()
    _finish(conn, new)
    with conn.begin():
        _take_time(conn)
        segments.publish(conn, new, rows)
    return BuiltSegment(Segment(new.id, new.kind, rows))


def _watch(conn: sa.Connection, space: Space, collection_id: int) -> bool:
    """Make every later transaction that writes fill the tail of the collection. False if a trigger could not be
    created.

    The first index of an installation, and of a space, creates triggers. Each is created in a transaction of its own,
    so that nobody waits behind several of them.
    """
    parameters = {"collection": collection_id, "space": space.id}
    try:
        for call in (
            "SELECT watch_chunks()",
            "SELECT watch_chunk_batches()",
            "SELECT watch_vectors(:space)",
            "SELECT watch_collection(:collection, :space)",
        ):
            with conn.begin():
                be_patient(conn, TRIGGER_PATIENCE_S)
                conn.execute(sa.text(call), parameters)
    except sa.exc.OperationalError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            return False
        raise
    return True


def _wait_for_writers(conn: sa.Connection) -> bool:
    """Wait until all transactions that write chunks or vectors now have ended. False if one takes too long.

    They hold this lock in shared mode until they end. So every writer that has not seen the index has committed, and
    all others fill the tail. Taking the lock itself would hold up all writers that come meanwhile.
    """
    deadline = time.monotonic() + BEGIN_PATIENCE_S
    with conn.begin():
        writers = holders(conn, DELETE_LOCK)
    while writers:
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
        with conn.begin():
            writers &= holders(conn, DELETE_LOCK)
    return True


def _take_time(conn: sa.Connection) -> None:
    """Switch off ``statement_timeout`` for this transaction, because a large segment takes longer than it allows."""
    conn.execute(sa.text("SET LOCAL statement_timeout = 0"))


def drop_left_behind(db: sa.Engine) -> int:
    """Drop the segments of collections in spaces in which they have no serving index any more.

    The collection moved, has left the space, or is gone. Returns how many. Segments that are being built or were read
    lately are left for later.
    """
    query = """
        SELECT DISTINCT s.collection_id, s.space_id
        FROM segments s
        WHERE NOT EXISTS (
            SELECT FROM serving_indexes i WHERE i.collection_id = s.collection_id AND i.space_id = s.space_id)
        ORDER BY s.collection_id, s.space_id
    """
    with db.begin() as conn:
        left = conn.execute(sa.text(query)).all()
    dropped = 0
    for collection_id, space_id in left:
        for builder in BuilderKind:
            with _building(db, builder, collection_id, space_id, wait=False) as lock:
                if lock is not None:
                    with lock.conn.begin():
                        dropped += lock.drop_unread()
    return dropped


def is_ready(conn: sa.Connection, collection_id: int, space: Space) -> bool:
    """Whether searches of the collection in this space have the serving index that they are going to have.

    Nothing is left to build: the index has begun, its tail is short, and no merge is due. A collection that is too
    small for an index is ready too, and so is every one on a schema without serving indexes.
    """
    if not segments.are_kept(conn):
        return True
    index = segments.find(conn, collection_id, space.id)
    if index is None:
        return not _has_chunks(conn, collection_id, MIN_ROWS)
    if not index.is_ready or _has_tail(conn, space, collection_id, rows_to_flush(index.segments)):
        return False
    return not segments_to_merge(index.segments, dimensions=space.spec.dimensions)


def collections_to_index(conn: sa.Connection, builder: BuilderKind) -> list[tuple[int, int]]:
    """``(collection id, space id)`` of the collections for which :func:`flush` or :func:`merge` may have work.

    A collection comes once for each of its spaces. The index of a space that is being filled begins when the filling
    is over, because one large segment is built faster than a tail that is flushed again and again.

    It is one query, so that collections without work cost a poller nothing, however many there are. Before a flush, the
    indexes of collections that moved to another space, or are gone, are forgotten.
    """
    has_others = others.are_kept(conn)
    if builder is BuilderKind.FLUSH:
        _forget_moved(conn, has_others=has_others)
    query = f"""
        SELECT k.id, s.space_id
        FROM collections k
        CROSS JOIN LATERAL (
            SELECT k.space_id, true AS is_active, true AS may_begin
            {_OTHER_SPACES if has_others else ""}
        ) s
        LEFT JOIN serving_indexes i ON i.collection_id = k.id AND i.space_id = s.space_id
        WHERE {IS_KEPT}
          AND ({_MAY_FLUSH if builder is BuilderKind.FLUSH else _MAY_MERGE}
               OR EXISTS (
                   SELECT FROM segments g
                   WHERE g.collection_id = k.id AND g.space_id = s.space_id
                     AND (g.state = :building AND g.builder = :builder
                          OR g.state = :retired AND g.retired_at < now() - make_interval(secs => :grace))))
        ORDER BY k.id, s.is_active DESC, s.space_id
    """
    parameters = {
        "builder": builder,
        "building": SegmentState.BUILDING,
        "live": SegmentState.LIVE,
        "retired": SegmentState.RETIRED,
        "flat": SegmentKind.FLAT,
        "grace": float(segments.GRACE_S),
        "least": MIN_ROWS - 1,
        "graph_rows": serving.GRAPH_ROWS,
        "pause": float(STALE_PAUSE_S),
        "planned": ReembeddingState.PLANNED,
        "filling": ReembeddingState.FILLING,
    }
    return [(row.id, row.space_id) for row in conn.execute(sa.text(query), parameters)]


_OTHER_SPACES = """UNION ALL
            SELECT o.space_id, false, r.state NOT IN (:planned, :filling)
            FROM collection_spaces o
            JOIN reembeddings r ON r.id = o.reembedding_id
            WHERE o.collection_id = k.id AND o.space_id <> k.space_id"""
_MAY_FLUSH = """CASE
                   WHEN i.collection_id IS NULL
                   THEN s.may_begin
                        AND EXISTS (SELECT FROM chunks c WHERE c.collection_id = k.id OFFSET :least LIMIT 1)
                   ELSE NOT i.is_ready
                        OR EXISTS (
                            SELECT FROM serving_tail t
                            WHERE t.collection_id = k.id AND t.space_id = s.space_id
                            OFFSET :least LIMIT 1)
                        OR EXISTS (
                            SELECT FROM segments g
                            WHERE g.collection_id = k.id AND g.space_id = s.space_id AND g.state = :live
                              AND to_regclass('segment_' || g.id) IS NULL)
               END"""
_MAY_MERGE = """(
                   SELECT count(*) > 1
                          OR coalesce(sum(g.n_rows) FILTER (WHERE g.kind = :flat), 0) >= :graph_rows
                          OR i.checked_at < now() - make_interval(secs => :pause)
                             AND (i.deletions <> (SELECT last_value FROM deletions)
                                  OR coalesce(max(g.live_since) > i.checked_at, false))
                   FROM segments g
                   WHERE g.collection_id = i.collection_id AND g.space_id = i.space_id AND g.state = :live)"""


def _forget_moved(conn: sa.Connection, *, has_others: bool) -> None:
    """Forget the indexes of collections in spaces that are no longer theirs."""
    is_other = "EXISTS (SELECT FROM collection_spaces o WHERE o.collection_id = k.id AND o.space_id = i.space_id)"
    moved = f"""
        SELECT i.collection_id, i.space_id
        FROM serving_indexes i
        LEFT JOIN collections k ON k.id = i.collection_id
        WHERE k.space_id IS DISTINCT FROM i.space_id AND NOT {is_other if has_others else "false"}
           OR to_jsonb(k) ->> 'dropped_at' IS NOT NULL
    """
    for row in conn.execute(sa.text(moved)).all():
        segments.forget(conn, row.collection_id, row.space_id)


def index_metadata(db: sa.Engine) -> None:
    """Build the index that finds chunks by their metadata, if this role owns the chunks. Writers go on meanwhile.

    An index that an interrupted build has left is built again, because writes maintain it although no query can use it.
    """
    look = """
        SELECT pg_has_role(t.relowner, 'USAGE') AS may, i.indisvalid
        FROM pg_class t
        LEFT JOIN pg_index i ON i.indrelid = t.oid AND i.indexrelid = to_regclass('ix_chunks_metadata')
        WHERE t.oid = to_regclass('chunks')
    """
    with db.begin() as conn:
        row = conn.execute(sa.text(look)).one()
    if not row.may or row.indisvalid:
        return
    # CREATE INDEX CONCURRENTLY waits for other transactions, and two builders at the same time would wait for each
    # other. It cannot run inside a transaction.
    with (
        _alone(db, [_Key(METADATA_LOCK, 0)], wait=True),
        db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn,
    ):
        if conn.execute(sa.text(look)).one().indisvalid:
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


def _count_tail(conn: sa.Connection, space: Space, collection_id: int) -> int:
    query = "SELECT count(*) FROM serving_tail WHERE collection_id = :collection AND space_id = :space"
    rows: int = conn.execute(sa.text(query), {"collection": collection_id, "space": space.id}).scalar_one()
    return rows


def _finish(conn: sa.Connection, new: Segment, *, memory_mb: int | None = None) -> None:
    """Build the graph of a segment, if it is to have one."""
    try:
        _finish_with(conn, new, memory_mb)
    except sa.exc.DBAPIError as error:
        if sqlstate(error) != DISK_FULL or "shared memory" not in refusal(error):
            raise
        # Parallel workers share the memory of the build through /dev/shm, which has 64 MB in a container by default.
        logger.warning(
            "segment %s: %s. The graph is built by one process instead, which takes longer. Give the container of "
            "Postgres more shared memory than INDEX_MEMORY_MB (--shm-size).", new.id, refusal(error),
        )  # fmt: skip
        _finish_with(conn, new, memory_mb, alone=True)


def _finish_with(conn: sa.Connection, new: Segment, memory_mb: int | None, *, alone: bool = False) -> None:
    with conn.begin():
        _take_time(conn)
        if alone:
            conn.execute(sa.text("SET LOCAL max_parallel_maintenance_workers = 0"))
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
