"""The flip: another space of a collection becomes the active one, and no chunk that could be searched is missing.

A chunk can be searched if its content has a vector in the active space. So the proof is an anti-join: no content of the
collection has a vector in the space that is active and none in the one that becomes it. It reads the whole collection,
which takes seconds, so that it is made while everybody works (:func:`look`), and kept, so that a later one reads only
what was written since (:func:`look_and_keep`). What it leaves open is little:

- contents that had a vector in neither space, and may have got one in the active space since, and
- contents of the ChunkBatches that windows of enqueues have written since.

In the moment of the flip (:func:`try_to_flip`) only these are checked. No chunk or vector is added or deleted
meanwhile: every transaction that does so, in this release and the last one, holds ``DELETE_LOCK`` in shared mode, and
the flip holds it exclusively. Waiters for this lock are served in order, so a flip gets its turn however many producers
there are. A lock of the collection's row does not promise that: while one transaction holds it in shared mode, others
can always take it in that mode too.

A rollback is the same with the two spaces in each other's place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chunkmill.db.connect import sqlstate
from chunkmill.db.locks import DELETE_LOCK, holders, lock
from chunkmill.domain.reembedding import ReembeddingState
from chunkmill.domain.states import ChunkBatchState, JobState, Priority
from chunkmill.errors import InvalidInput
from chunkmill.ledger.reembedding.lives import Life, on_long_of
from chunkmill.spaces import registry
from chunkmill.spaces.registry import VectorTable

MOST_OPEN = 20_000
"""The most contents that are checked in the moment of a flip."""
MOST_OPEN_BACK = 200_000
"""The same for a rollback, which may be urgent, and must not wait until a large enqueue is over."""
FEW_NEW = 500
"""A flip is tried once no more than this many contents were enqueued since the last check."""
FEW_HASHES = 2_000
"""The most missing contents that are embedded before all others."""
LOOKS = 8
"""How often one try checks again what was enqueued since its previous check."""
LOCK_PATIENCE_S = 5.0
"""How many seconds a flip waits for the windows and the writes that are under way. Others queue behind it meanwhile."""
WRITERS_PATIENCE_S = 60.0
"""How many seconds a check waits for the transactions that are writing when it begins. Later ones are not held up."""
REUSE_SECONDS = 1800.0
"""How old a look that was kept may be. What was written since is in ChunkBatches, which stay for an hour at least after
the end of their job (``ledger.prune``). An enqueue that begins anew deletes some, and counts it in ``reopenings``."""
HOLD_SECONDS = 3.0
"""How long new work for the space that is about to be left waits, so that the other space can catch up."""
LOCK_NOT_AVAILABLE = ("55P03", "40001", "40P01")

FLIP_FROM = (ReembeddingState.JUDGING, ReembeddingState.RAMPING)
"""The states from which a person may flip."""
ROLL_BACK_FROM = (ReembeddingState.FLIPPED,)


@dataclass(frozen=True, slots=True)
class Direction:
    """From which space a collection goes to which. ``back`` is a rollback."""

    life: Life
    active: VectorTable
    other: VectorTable
    back: bool

    @property
    def most_open(self) -> int:
        """How many contents may be looked at in the moment of the flip."""
        return MOST_OPEN_BACK if self.back else MOST_OPEN

    @classmethod
    def of(cls, life: Life, *, back: bool) -> Direction:
        """The way of a re-embedding: to the new space, or back to the old one."""
        old, new = VectorTable(life.from_space_id), VectorTable(life.to_space_id)
        return cls(life, new, old, back) if back else cls(life, old, new, back)


@dataclass(frozen=True, slots=True)
class FlipAttempt:
    """The result of one try to flip. ``missing`` is how many chunks can be searched now and could not be afterwards.

    ``open_contents`` is how many contents would have to be checked, if they are too many for one moment.
    """

    done: bool
    missing: int = 0
    open_contents: int = 0
    seconds: float = 0.0
    """For how many seconds the flip held its lock, while others waited."""
    hashes: tuple[bytes, ...] = ()
    """Some contents of the missing chunks."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was looked at: everything that was written up to ChunkBatch ``mark``.

    ``lacking`` are the contents that had no vector in the other space; ``missing`` is how many chunks of them had one
    in the active space.
    """

    mark: int
    lacking: tuple[bytes, ...]
    missing: int
    is_all: bool
    """False if there are more than the list may hold."""
    reopenings: int
    """How often enqueues had begun anew, in the whole installation. If one has done so since, this check is
    worthless."""


def flip_once(db: sa.Engine, way: Direction, *, states: Sequence[ReembeddingState], missing: int) -> FlipAttempt:
    """Prove and flip, or say what is in the way. Nothing else is changed, and it may be called again at any time.

    ``missing`` is how many chunks may be missing afterwards. Raises :class:`InvalidInput` if the re-embedding is in
    none of the ``states`` any more.
    """
    seen = look_and_keep(db, way)
    for _ in range(LOOKS):
        if not seen.is_all:
            return FlipAttempt(done=False, missing=seen.missing, open_contents=len(seen.lacking))
        with db.begin() as conn:
            n_new = _count_new(conn, way, seen.mark)
        if n_new <= FEW_NEW:
            break
        seen = look_again(db, way, seen)
    if seen.missing > missing:
        return FlipAttempt(done=False, missing=seen.missing, hashes=seen.lacking[:FEW_HASHES])
    try:
        return try_to_flip(db, way, seen, states=states, missing=missing)
    except sa.exc.DBAPIError as error:
        if sqlstate(error) in LOCK_NOT_AVAILABLE:
            return FlipAttempt(done=False)
        raise


def look_and_keep(db: sa.Engine, way: Direction, *, patience: float = WRITERS_PATIENCE_S) -> Look:
    """Look at what was written since the look that was kept, or at everything if none was, and keep what was seen.

    So a flip takes no longer if the collection is larger, once a poller has looked. ``patience`` is how many seconds
    this waits for those who write now.
    """
    kept = _kept(db, way)
    seen = look(db, way, patience=patience) if kept is None else look_again(db, way, kept, patience=patience)
    if seen.is_all and seen.mark:
        _keep(db, way, seen)
    return seen


def look(db: sa.Engine, way: Direction, *, patience: float = WRITERS_PATIENCE_S) -> Look:
    """The anti-join of the whole collection, while everybody works."""
    reopenings, mark = _mark(db, patience)
    query = f"""
        SELECT c.content_hash, count(*) AS chunks,
               EXISTS (SELECT FROM {way.active.table_name} a WHERE a.content_hash = c.content_hash) AS is_searchable
        FROM chunks c
        WHERE c.collection_id = :collection
          AND NOT EXISTS (SELECT FROM {way.other.table_name} o WHERE o.content_hash = c.content_hash)
        GROUP BY c.content_hash
        LIMIT :most
    """
    with db.begin() as conn:
        conn.execute(sa.text("SET LOCAL statement_timeout = 0"))
        # Both sides lie in the order of their hashes in an index. To merge them took 1.9 s of one process for a million
        # chunks on a busy machine, and a hash join 8.3 s, or 2.8 s of three processes, with files on the disk. Each of
        # several processes that merge would read all vectors.
        conn.execute(sa.text("SET LOCAL enable_hashjoin = off"))
        conn.execute(sa.text("SET LOCAL max_parallel_workers_per_gather = 0"))
        parameters = {"collection": way.life.collection_id, "most": way.most_open + 1}
        rows = conn.execute(sa.text(query), parameters).all()
    return _look_of(way, rows, reopenings, mark)


def look_again(db: sa.Engine, way: Direction, seen: Look, *, patience: float = WRITERS_PATIENCE_S) -> Look:
    """The same of what was written since, and of what was open."""
    _, mark = _mark(db, patience)
    with db.begin() as conn:
        conn.execute(sa.text("SET LOCAL statement_timeout = 0"))  # all writes of half an hour may have to be read
        rows = conn.execute(sa.text(_still_lacking(way)), _parameters(way, seen)).all()
    return _look_of(way, rows, seen.reopenings, mark)


def _look_of(way: Direction, rows: Sequence[sa.Row[Any]], reopenings: int, mark: int) -> Look:
    return Look(
        mark,
        tuple(row.content_hash for row in sorted(rows, key=lambda row: not row.is_searchable)),
        sum(row.chunks for row in rows if row.is_searchable),
        len(rows) <= way.most_open,
        reopenings,
    )


def _mark(db: sa.Engine, patience: float) -> tuple[int, int]:
    """How often enqueues have begun anew, and then the last ChunkBatch, once everybody has committed who may have
    written one up to it.

    Taking the lock itself would hold up all transactions that come meanwhile.
    """
    with db.begin() as conn:
        reopenings = _count_reopenings(conn)
        mark = int(conn.execute(sa.text("SELECT coalesce(max(id), 0) FROM chunk_batches")).scalar_one())
        writers = holders(conn, DELETE_LOCK)
    deadline = time.monotonic() + patience
    while writers and time.monotonic() < deadline:
        time.sleep(0.01)
        with db.begin() as conn:
            writers &= holders(conn, DELETE_LOCK)
    if writers:
        # There is no mark, because a transaction that is still open may write ChunkBatches with numbers below it.
        return reopenings, 0
    return reopenings, mark


def _count_reopenings(conn: sa.Connection) -> int:
    query = "SELECT coalesce(pg_sequence_last_value(to_regclass('reopenings')), 0)"
    return int(conn.execute(sa.text(query)).scalar_one())


def _are_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('reembedding_looks') IS NOT NULL")).scalar_one())


def _kept(db: sa.Engine, way: Direction) -> Look | None:
    """The latest check in this direction, if it can be told what was written since."""
    query = """
        SELECT mark, lacking, reopenings
        FROM reembedding_looks
        WHERE reembedding_id = :id AND space_id = :active
          AND looked_at > now() - make_interval(secs => :seconds)
    """
    parameters = {"id": way.life.id, "active": way.active.id, "seconds": REUSE_SECONDS}
    with db.begin() as conn:
        row = conn.execute(sa.text(query), parameters).one_or_none() if _are_kept(conn) else None
        if row is None or row.reopenings != _count_reopenings(conn):
            return None
    return Look(row.mark, tuple(row.lacking), missing=0, is_all=True, reopenings=row.reopenings)


def _keep(db: sa.Engine, way: Direction, seen: Look) -> None:
    # The list may have 6 MB. If nothing was written since, the list that is kept is still complete, so it is replaced
    # only before it gets too old.
    statement = """
        INSERT INTO reembedding_looks AS l (reembedding_id, space_id, mark, lacking, reopenings)
        VALUES (:id, :active, :mark, CAST(:lacking AS bytea[]), :reopenings)
        ON CONFLICT (reembedding_id) DO UPDATE SET
            space_id = excluded.space_id, mark = excluded.mark, lacking = excluded.lacking,
            reopenings = excluded.reopenings, looked_at = excluded.looked_at
        WHERE l.space_id <> excluded.space_id OR l.mark <> excluded.mark OR l.reopenings <> excluded.reopenings
           OR l.looked_at < now() - make_interval(secs => :seconds)
    """
    parameters = {
        "seconds": REUSE_SECONDS / 2,
        "id": way.life.id,
        "active": way.active.id,
        "mark": seen.mark,
        "lacking": list(seen.lacking),
        "reopenings": seen.reopenings,
    }
    with db.begin() as conn:
        if _are_kept(conn):
            conn.execute(sa.text(statement), parameters)


# Both look again at the contents that were lacking, and at those in ChunkBatches of the collection after the mark.


def _still_lacking(way: Direction) -> str:
    return f"""
        WITH candidates AS MATERIALIZED (
            SELECT unnest(CAST(:lacking AS bytea[])) AS content_hash
            UNION
            SELECT unnest(b.content_hashes)
            FROM chunk_batches b
            JOIN jobs j ON j.id = b.job_id
            WHERE b.id > :mark AND j.collection_id = :collection
        )
        SELECT x.content_hash, count(*) AS chunks,
               EXISTS (SELECT FROM {way.active.table_name} a WHERE a.content_hash = x.content_hash) AS is_searchable
        FROM candidates x
        JOIN chunks c ON c.content_hash = x.content_hash AND c.collection_id = :collection
        WHERE NOT EXISTS (SELECT FROM {way.other.table_name} o WHERE o.content_hash = x.content_hash)
        GROUP BY x.content_hash
        LIMIT :most
    """


def _missing(way: Direction) -> str:
    return f"""
        WITH candidates AS MATERIALIZED (
            SELECT unnest(CAST(:lacking AS bytea[])) AS content_hash
            UNION
            SELECT unnest(b.content_hashes)
            FROM chunk_batches b
            JOIN jobs j ON j.id = b.job_id
            WHERE b.id > :mark AND j.collection_id = :collection
        )
        SELECT x.content_hash, count(*) AS chunks
        FROM candidates x
        JOIN {way.active.table_name} a ON a.content_hash = x.content_hash
        JOIN chunks c ON c.content_hash = x.content_hash AND c.collection_id = :collection
        WHERE NOT EXISTS (SELECT FROM {way.other.table_name} o WHERE o.content_hash = x.content_hash)
        GROUP BY x.content_hash
    """


def _parameters(way: Direction, seen: Look) -> dict[str, object]:
    return {
        "collection": way.life.collection_id,
        "mark": seen.mark,
        "lacking": list(seen.lacking),
        "most": way.most_open + 1,
    }


def _count_new(conn: sa.Connection, way: Direction, mark: int) -> int:
    query = """
        SELECT coalesce(sum(b.n_contents), 0)
        FROM chunk_batches b
        JOIN jobs j ON j.id = b.job_id
        WHERE b.id > :mark AND j.collection_id = :collection
    """
    return int(conn.execute(sa.text(query), {"mark": mark, "collection": way.life.collection_id}).scalar_one())


def try_to_flip(
    db: sa.Engine, way: Direction, seen: Look, *, states: Sequence[ReembeddingState], missing: int
) -> FlipAttempt:
    """The moment of the flip: look at what is open, and swap the spaces, in one short transaction."""
    with db.connect() as conn, conn.begin() as transaction:
        kept = registry.get(conn, way.active.id)
        conn.execute(sa.text(f"SET LOCAL lock_timeout = '{LOCK_PATIENCE_S:g}s'"))
        lock(conn, DELETE_LOCK)
        began = time.monotonic()
        if _count_reopenings(conn) != seen.reopenings or _count_new(conn, way, seen.mark) > way.most_open:
            transaction.rollback()
            return FlipAttempt(done=False, seconds=time.monotonic() - began)
        rows = conn.execute(sa.text(_missing(way)), _parameters(way, seen)).all()
        n_missing = sum(row.chunks for row in rows)
        if n_missing > missing:
            transaction.rollback()
            hashes = tuple(row.content_hash for row in rows)
            return FlipAttempt(done=False, missing=n_missing, seconds=time.monotonic() - began, hashes=hashes)
        swap = "SELECT swap_spaces(:id, :back, CAST(:states AS text[]), :to, :on_long)"
        parameters = {
            "id": way.life.id,
            "back": way.back,
            "states": [state.value for state in states],
            "to": ReembeddingState.ROLLED_BACK if way.back else ReembeddingState.FLIPPED,
            "on_long": on_long_of(kept),
        }
        if not conn.execute(sa.text(swap), parameters).scalar_one():
            transaction.rollback()
            raise InvalidInput(
                f"re-embedding {way.life.id} of collection {way.life.collection!r} cannot "
                f"{'roll back' if way.back else 'flip'} now, because it has changed meanwhile. Look at it first: "
                f"chunkmill reembed show {way.life.id}."
            )
        transaction.commit()
        return FlipAttempt(done=True, missing=n_missing, seconds=time.monotonic() - began)


_HOLD = sa.text("""
UPDATE chunk_batches b
SET not_before = now() + make_interval(secs => :seconds), rung_at = NULL
FROM jobs j
WHERE j.id = b.job_id AND j.collection_id = :collection AND j.state IN (:enqueueing, :running)
  AND b.space_id = :active AND b.state = :available AND b.not_before <= now()
""")
_HASTEN = sa.text("""
UPDATE chunk_batches b
SET priority = :high, rung_at = NULL
FROM jobs j
WHERE j.id = b.job_id AND j.collection_id = :collection AND j.state IN (:enqueueing, :running)
  AND b.space_id = :other AND b.state = :available AND b.priority > :high
  AND b.content_hashes && CAST(:hashes AS bytea[])
""")
_RELEASE = sa.text("""
UPDATE chunk_batches b
SET not_before = now(), rung_at = NULL
FROM jobs j
WHERE j.id = b.job_id AND j.collection_id = :collection AND j.state IN (:enqueueing, :running)
  AND b.space_id = :active AND b.state = :available AND b.attempt = 0
  AND b.not_before BETWEEN now() AND now() + make_interval(secs => :seconds)
""")


def let_catch_up(conn: sa.Connection, way: Direction, tried: FlipAttempt) -> None:
    """Let the other space catch up: embed there first what is missing, and for a moment nothing new in the active one.

    Otherwise a collection into which somebody enqueues all the time would never flip, because there is always a chunk
    that has got its vector in the active space a moment ago.
    """
    parameters = {
        "collection": way.life.collection_id,
        "active": way.active.id,
        "other": way.other.id,
        "seconds": HOLD_SECONDS,
        "high": Priority.HIGH.rank,
        "hashes": list(tried.hashes),
        "available": ChunkBatchState.AVAILABLE,
        "enqueueing": JobState.ENQUEUEING,
        "running": JobState.RUNNING,
    }
    conn.execute(_HOLD, parameters)
    if tried.hashes:
        conn.execute(_HASTEN, parameters)


def let_go_on(conn: sa.Connection, way: Direction) -> None:
    """End the hold of :func:`let_catch_up`, which would otherwise end by itself."""
    parameters = {
        "collection": way.life.collection_id,
        "active": way.active.id,
        "seconds": HOLD_SECONDS,
        "available": ChunkBatchState.AVAILABLE,
        "enqueueing": JobState.ENQUEUEING,
        "running": JobState.RUNNING,
    }
    conn.execute(_RELEASE, parameters)
