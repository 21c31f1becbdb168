"""Jobs: one row for each ``enqueue``. Its counts are derived from its ChunkBatches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from chunkmill.db.locks import PRODUCER_LOCK
from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.planning import DeadChunk, MergeCounts
from chunkmill.domain.results import Job
from chunkmill.domain.routing import Choice
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import ChunkBatchState, JobState, Priority, Route
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.ledger.jobs import outbox, streams
from chunkmill.ledger.jobs.routing import entry, lane_of
from chunkmill.spaces import collections, others
from chunkmill.spaces.collections import Collection

SHOWN_DEAD_CHUNKS = 20
CANCELLED_CHANNEL = "chunkmill_cancelled"


@dataclass(frozen=True, slots=True)
class OpenedJob:
    """A job to enqueue into, and the lane of its ChunkBatches. ``is_new`` is False if its key was used before."""

    id: int
    state: JobState
    lane: Route
    is_new: bool
    is_sealed: bool = False
    """Its producer's iterable has ended, so there is nothing left to enqueue."""


def open_job(
    conn: sa.Connection,
    *,
    collection: Collection,
    route: Route,
    priority: Priority,
    on_long: OnLong,
    idempotency_key: str | None,
    choice: Choice | None = None,
    deadline: datetime | None = None,
    job_id: int | None = None,
) -> OpenedJob | None:
    """Create a job in state ``enqueueing``; returns None if another transaction has used the key meanwhile.

    ``choice`` is the lane of a new job; ``route`` is what the caller asked for. Look for a job of the key with
    :func:`of_key` first: an insert that meets a conflict uses up a number of the sequence. A job of the outbox has its
    number ``job_id`` already. If it was opened meanwhile, this returns None too.
    """
    at = conn.execute(sa.text("SELECT now()")).scalar_one()
    routing = [entry(choice, at)] if choice else []
    insert = """
        INSERT INTO jobs (
            id, collection_id, space_id, state, route, priority, on_long, idempotency_key, deadline, routing
        )
        OVERRIDING SYSTEM VALUE
        VALUES (
            coalesce(CAST(:id AS bigint), nextval(pg_get_serial_sequence('jobs', 'id'))),
            :collection, :space, :enqueueing, :route, :priority, :on_long, :key, :deadline, CAST(:routing AS jsonb)
        )
        ON CONFLICT DO NOTHING
        RETURNING id
    """
    parameters = {
        "id": job_id,
        "collection": collection.id,
        "space": collection.space_id,
        "enqueueing": JobState.ENQUEUEING,
        "route": route,
        "priority": priority.rank,
        "on_long": on_long,
        "key": idempotency_key,
        "deadline": deadline,
        "routing": json.dumps(routing),
    }
    opened = conn.execute(sa.text(insert), parameters).scalar_one_or_none()
    return None if opened is None else OpenedJob(opened, JobState.ENQUEUEING, lane_of(route, routing), is_new=True)


def of_id(conn: sa.Connection, job_id: int) -> OpenedJob | None:
    """The job with this number, or None if it was not opened yet."""
    query = "SELECT state, route, routing, sealed_at FROM jobs WHERE id = :id"
    job = conn.execute(sa.text(query), {"id": job_id}).one_or_none()
    if job is None:
        return None
    return OpenedJob(
        job_id, JobState(job.state), lane_of(job.route, job.routing), is_new=False, is_sealed=job.sealed_at is not None
    )


_OF_KEY = sa.text("""
SELECT j.id, j.state, j.route, j.routing, j.on_long, j.sealed_at, j.space_id, j.collection_id, c.name AS collection,
       to_jsonb(c) ->> 'dropped_at' IS NOT NULL AS is_dropped
FROM jobs j
JOIN collections c ON c.id = j.collection_id
WHERE j.idempotency_key = :key
""")


def of_key(
    conn: sa.Connection,
    idempotency_key: str | None,
    *,
    collection: str,
    space_id: int,
    on_long: OnLong,
    is_hidden: bool = False,
) -> OpenedJob | None:
    """The job that an enqueue with this key created before, or None. Of the collection only the identity counts, so
    that the job is found after a rename, and by an alias. The key of a job whose collection was dropped is free.

    Raises :class:`InvalidInput` if that enqueue asked for something else, or was cancelled before its end.
    """
    job = conn.execute(_OF_KEY, {"key": idempotency_key}).one_or_none()
    if job is None:
        return None
    if job.is_dropped:
        free = "UPDATE jobs SET idempotency_key = NULL WHERE id = :id AND idempotency_key = :key"
        conn.execute(sa.text(free), {"id": job.id, "key": idempotency_key})
        return None
    asked = collections.resolve(conn, collection, is_hidden=is_hidden)
    if (asked and asked.id, job.space_id, job.on_long) != (job.collection_id, space_id, on_long):
        raise InvalidInput(
            f"idempotency_key {idempotency_key!r} belongs to job {job.id}, which enqueued into another collection "
            f"({job.collection!r} now) or space, or with another on_long. Use a key of its own for each enqueue."
        )
    if job.state == JobState.CANCELLED and job.sealed_at is None:
        raise InvalidInput(
            f"idempotency_key {idempotency_key!r} belongs to job {job.id}, which was cancelled before all of its "
            "chunks were enqueued, and stays as it is. Nothing was written: enqueue with another key."
        )
    return OpenedJob(
        job.id, JobState(job.state), lane_of(job.route, job.routing), is_new=False, is_sealed=job.sealed_at is not None
    )


def hold_producer_lock(conn: sa.Connection, job_id: int) -> bool:
    """Take the session lock that says "the producer of this job is alive". False if another connection holds it.

    The lock ends with the connection, so a producer that dies frees it at once.
    """
    return bool(conn.execute(sa.text("SELECT pg_try_advisory_lock(:key, :job)"), _producer_lock(job_id)).scalar_one())


def drop_producer_lock(conn: sa.Connection, job_id: int) -> None:
    """Give the lock of :func:`hold_producer_lock` back."""
    conn.execute(sa.text("SELECT pg_advisory_unlock(:key, :job)"), _producer_lock(job_id))


def _producer_lock(job_id: int) -> dict[str, int]:
    # A key has 32 bits. If two jobs, 2**31 apart, share a key, an abandoned job is only noticed later.
    return {"key": PRODUCER_LOCK, "job": job_id % 2**31}


def reopen_for_enqueue_if_unsealed(conn: sa.Connection, job_id: int) -> bool:
    """Start an unfinished enqueue over in the same job; contents that are embedded by now will be found in the cache.

    Returns False if the job was enqueued to its end or cancelled. Such a job stays as it is.
    """
    reopen = """
        UPDATE jobs
        SET state = :enqueueing, error = NULL, finished_at = NULL, n_chunks = 0
        WHERE id = :id AND sealed_at IS NULL AND state <> :cancelled
    """
    states = {"enqueueing": JobState.ENQUEUEING, "cancelled": JobState.CANCELLED}
    if conn.execute(sa.text(reopen), {"id": job_id} | states).rowcount == 0:
        return False
    # A flip must not rely on a check that it made before this, because these ChunkBatches are deleted. The schema of
    # the last release has no such sequence.
    conn.execute(sa.text("SELECT nextval(to_regclass('reopenings'))"))
    # ChunkBatches that were claimed stay, because rows of ``usage`` refer to them; a worker that holds one may finish
    # it.
    delete = """
        DELETE FROM chunk_batches b
        WHERE job_id = :id
          AND state <> :running
          AND NOT EXISTS (SELECT FROM usage u WHERE u.chunk_batch_id = b.id)
    """
    conn.execute(sa.text(delete), {"id": job_id, "running": ChunkBatchState.RUNNING})
    conn.execute(sa.text("DELETE FROM dead_chunks WHERE job_id = :id"), {"id": job_id})
    streams.forget(conn, job_id)
    return True


def is_key_used(conn: sa.Connection, idempotency_key: str) -> bool:
    """Whether the key has a job. It may be in the outbox."""
    if outbox.is_kept(conn) and outbox.of_key(conn, idempotency_key) is not None:
        return True
    query = "SELECT EXISTS (SELECT FROM jobs WHERE idempotency_key = :key)"
    return bool(conn.execute(sa.text(query), {"key": idempotency_key}).scalar_one())


def add_chunks(conn: sa.Connection, job_id: int, n: int) -> bool:
    """Count a window's chunks. False if the job is no longer being enqueued, because it was cancelled."""
    update = "UPDATE jobs SET n_chunks = n_chunks + :n WHERE id = :id AND state = :enqueueing"
    parameters = {"id": job_id, "n": n, "enqueueing": JobState.ENQUEUEING}
    return conn.execute(sa.text(update), parameters).rowcount == 1


def fail_if_enqueueing(conn: sa.Connection, job_id: int, error: str) -> None:
    """End a job whose chunks cannot be enqueued."""
    update = """
        UPDATE jobs
        SET state = :failed, error = :error, finished_at = now()
        WHERE id = :id AND state = :enqueueing
    """
    states = {"failed": JobState.FAILED, "enqueueing": JobState.ENQUEUEING}
    conn.execute(sa.text(update), {"id": job_id, "error": error} | states)


def seal_if_enqueueing(conn: sa.Connection, job_id: int) -> bool:
    """Note that the iterable has ended: from now on the job may complete. False if it is no longer being enqueued."""
    update = "UPDATE jobs SET state = :running, sealed_at = now() WHERE id = :id AND state = :enqueueing"
    states = {"running": JobState.RUNNING, "enqueueing": JobState.ENQUEUEING}
    return conn.execute(sa.text(update), {"id": job_id} | states).rowcount == 1


def retry_if_ended(conn: sa.Connection, job_id: int, *, max_attempts: int) -> bool:
    """Make available again, with fresh attempts, what a failed or cancelled job left without a vector.

    Returns False if the job is neither, is in the outbox, or was never enqueued to its end. ``attempt`` counts on,
    because it is the fencing number; ``max_attempts`` moves up instead. Raises :class:`InvalidInput` if the collection
    has left the job's space since, or was dropped: nobody would find what the job embeds.
    """
    # The lock keeps everyone from moving the collection until the job can be seen to run.
    lock = """
        SELECT c.id, c.name, j.space_id, to_jsonb(c) ->> 'dropped_at' IS NOT NULL AS is_dropped
        FROM jobs j
        JOIN collections c ON c.id = j.collection_id
        WHERE j.id = :id
        FOR SHARE OF c
    """
    collection = conn.execute(sa.text(lock), {"id": job_id}).one_or_none()
    if collection is None:
        return False
    reopen = """
        UPDATE jobs
        SET state = :running, error = NULL, finished_at = NULL
        WHERE id = :id AND sealed_at IS NOT NULL AND state IN (:failed, :cancelled)
    """
    states = {"running": JobState.RUNNING, "failed": JobState.FAILED, "cancelled": JobState.CANCELLED}
    if conn.execute(sa.text(reopen), {"id": job_id} | states).rowcount == 0:
        return False
    if collection.is_dropped:
        raise InvalidInput(
            f"job {job_id} cannot be retried: its collection was dropped, with all chunks. Enqueue the chunks again."
        )
    if collection.space_id not in others.of(conn, collection.id).ids:
        raise InvalidInput(
            f"job {job_id} cannot be retried: collection {collection.name!r} has moved to another space since, so "
            "nobody would find its vectors. Enqueue the chunks again, with the model and the on_long of the collection."
        )
    # A ChunkBatch is still available if a cancel was interrupted. Of the completed ones, those with a dead content are
    # found by reading every array once; a look into the arrays for each dead chunk would be quadratic.
    make_available = """
        UPDATE chunk_batches b
        SET state = :available, not_before = now(), rung_at = NULL, max_attempts = attempt + :more,
            deaths = least(deaths, :suspect), n_cached = 0, error_code = NULL, error = NULL, finished_at = NULL
        WHERE job_id = :id
          AND (
            state IN (:discarded, :cancelled)
            OR state = :available AND attempt > 0
            OR id IN (
                SELECT c.id
                FROM chunk_batches c
                CROSS JOIN unnest(c.content_hashes) AS h(content_hash)
                JOIN dead_chunks d ON d.job_id = :id AND d.code <> 'too_long' AND d.content_hash = h.content_hash
                WHERE c.job_id = :id AND c.state = :completed
            )
          )
    """
    parameters = {
        "id": job_id,
        "more": max_attempts,
        "suspect": SUSPECT_DEATHS,
        "available": ChunkBatchState.AVAILABLE,
        "discarded": ChunkBatchState.DISCARDED,
        "cancelled": ChunkBatchState.CANCELLED,
        "completed": ChunkBatchState.COMPLETED,
    }
    conn.execute(sa.text(make_available), parameters)
    take_off_list = """
        DELETE FROM dead_chunks
        WHERE job_id = :id AND content_hash IS NOT NULL AND code <> 'too_long'
    """
    conn.execute(sa.text(take_off_list), {"id": job_id})
    return True


def get(conn: sa.Connection, job_id: int) -> Job:
    """One job with the first of its dead chunks. Raises :class:`NotFound`."""
    rows = _select(conn, [job_id])
    if not rows or (rows[0].state == JobState.FAILED and rows[0].sealed_at is None):
        # The job is in the outbox, or a producer died before it had sent all of it and another one has put the whole
        # into the outbox. It may be delivered between the two queries.
        undelivered = outbox.job(conn, job_id) if outbox.is_kept(conn) else None
        if undelivered is not None:
            return undelivered
        rows = _select(conn, [job_id])
    if not rows:
        raise NotFound(f"there is no job {job_id}; `chunkmill jobs` lists the latest.")
    merged = streams.counts_of(conn, [job_id]).get(job_id) if rows[0].has_streams else None
    return _job(rows[0], dead_chunks(conn, job_id, limit=SHOWN_DEAD_CHUNKS), merged)


def not_open(conn: sa.Connection, job_ids: Sequence[int]) -> list[int]:
    """Which of these jobs have ended, or are not in the table."""
    query = """
        SELECT w.id
        FROM unnest(CAST(:ids AS bigint[])) AS w(id)
        LEFT JOIN jobs j ON j.id = w.id
        WHERE j.id IS NULL OR j.state NOT IN (:enqueueing, :running)
    """
    parameters = {"ids": list(job_ids), "enqueueing": JobState.ENQUEUEING, "running": JobState.RUNNING}
    return list(conn.execute(sa.text(query), parameters).scalars())


def latest(conn: sa.Connection, limit: int) -> list[Job]:
    """The newest ``limit`` jobs, without their dead chunks."""
    return page(conn, limit=limit)


def _all(conn: sa.Connection, ids: Sequence[int]) -> list[Job]:
    rows = _select(conn, ids)
    merged = streams.counts_of(conn, ids) if rows and rows[0].has_streams else {}
    return [_job(row, (), merged.get(row.id)) for row in rows]


_PAGE = """
SELECT id
FROM jobs
WHERE (CAST(:before AS bigint) IS NULL OR id < CAST(:before AS bigint))
ORDER BY id DESC
LIMIT :limit
"""
# The newest jobs of each collection are at the end of an index, so few rows are read, however many jobs there are.
_PAGE_OF_COLLECTIONS = """
SELECT newest.id
FROM unnest(CAST(:collections AS bigint[])) AS k(id)
CROSS JOIN LATERAL (
    SELECT j.id
    FROM jobs j
    WHERE j.collection_id = k.id AND (CAST(:before AS bigint) IS NULL OR j.id < CAST(:before AS bigint))
    ORDER BY j.id DESC
    LIMIT :limit
) newest
ORDER BY newest.id DESC
LIMIT :limit
"""


def page(
    conn: sa.Connection, *, limit: int, before: int | None = None, collections: Sequence[int] | None = None
) -> list[Job]:
    """The newest ``limit`` jobs, without their dead chunks: those with a smaller id than ``before``, and of these
    collections only, if they are given. Those in the outbox are among them.
    """
    # A job that is delivered between the two queries is found by both, and the second result counts.
    undelivered = []
    if outbox.is_kept(conn):
        undelivered = outbox.listed(conn, limit=limit, before=before, collections=collections)
    if collections is None:
        rows = conn.execute(sa.text(_PAGE), {"before": before, "limit": limit})
    else:
        parameters = {"before": before, "limit": limit, "collections": list(collections)}
        rows = conn.execute(sa.text(_PAGE_OF_COLLECTIONS), parameters)
    opened = _all(conn, rows.scalars().all())
    by_id = {job.id: job for job in (*undelivered, *opened)}
    return sorted(by_id.values(), key=lambda job: job.id, reverse=True)[:limit]


def with_key(conn: sa.Connection, idempotency_key: str) -> Job | None:
    """The job that an enqueue with this key created, without its dead chunks."""
    query = "SELECT id FROM jobs WHERE idempotency_key = :key"
    # The outbox is read first, so that a job that is delivered between the two queries is found by the second one.
    undelivered = outbox.job_of_key(conn, idempotency_key) if outbox.is_kept(conn) else None
    jobs = _all(conn, conn.execute(sa.text(query), {"key": idempotency_key}).scalars().all())
    return jobs[0] if jobs else undelivered


def space_id(conn: sa.Connection, job_id: int) -> int:
    """The id of the job's space."""
    return int(conn.execute(sa.text("SELECT space_id FROM jobs WHERE id = :id"), {"id": job_id}).scalar_one())


def collection_id(conn: sa.Connection, job_id: int) -> int:
    """The id of the job's collection."""
    return int(conn.execute(sa.text("SELECT collection_id FROM jobs WHERE id = :id"), {"id": job_id}).scalar_one())


def dead_chunks(conn: sa.Connection, job_id: int, *, limit: int) -> Sequence[DeadChunk]:
    """The first ``limit`` chunks on the job's dead list."""
    query = "SELECT chunk_id, code, reason FROM dead_chunks WHERE job_id = :id ORDER BY id LIMIT :limit"
    rows = conn.execute(sa.text(query), {"id": job_id, "limit": limit})
    return [DeadChunk(row.chunk_id, row.code, row.reason) for row in rows]


_SELECT_JOBS = """
    SELECT j.*, c.name AS collection, s.fingerprint, s.model, to_regclass('job_streams') IS NOT NULL AS has_streams,
           coalesce(b.contents, 0) AS contents, coalesce(b.cached, 0) AS cached,
           coalesce(b.embedded, 0) AS embedded, coalesce(b.remaining, 0) AS remaining,
           coalesce(b.truncated, 0) AS truncated,
           coalesce(u.tokens, 0) AS tokens, coalesce(u.engine_seconds, 0) AS engine_seconds,
           (SELECT count(*) FROM dead_chunks d WHERE d.job_id = j.id) AS dead
    FROM jobs j
    JOIN collections c ON c.id = j.collection_id
    JOIN spaces s ON s.id = j.space_id
    LEFT JOIN LATERAL (
        SELECT sum(n_contents) AS contents, sum(n_cached) AS cached, sum(n_embedded) AS embedded,
               sum(n_contents - n_cached - n_embedded) FILTER (WHERE state IN (:available, :running)) AS remaining,
               sum(n_truncated) AS truncated
        FROM chunk_batches
        WHERE job_id = j.id
    ) b ON true
    LEFT JOIN LATERAL (
        SELECT sum(tokens) AS tokens, sum(engine_seconds) AS engine_seconds
        FROM usage
        WHERE job_id = j.id
    ) u ON true
    WHERE j.id = ANY(:ids)
    ORDER BY j.id DESC
"""


def _select(conn: sa.Connection, ids: Sequence[int]) -> Sequence[sa.Row[tuple[object, ...]]]:
    """The jobs with these ids, newest first."""
    states = {"available": ChunkBatchState.AVAILABLE, "running": ChunkBatchState.RUNNING}
    return conn.execute(sa.text(_SELECT_JOBS), {"ids": list(ids)} | states).all()


def _job(row: sa.Row[tuple[object, ...]], dead: Sequence[DeadChunk], merged: MergeCounts | None) -> Job:
    priority = next(p for p in Priority if p.rank == row.priority)
    return Job(
        id=row.id,
        state=JobState(row.state),
        collection=row.collection,
        space=row.fingerprint,
        model=row.model,
        route=Route(row.route),
        priority=priority,
        idempotency_key=row.idempotency_key,
        chunks=row.n_chunks,
        contents=int(row.contents),
        cached=int(row.cached),
        embedded=int(row.embedded),
        remaining=int(row.remaining),
        dead=row.dead,
        truncated=int(row.truncated),
        tokens=int(row.tokens),
        engine_seconds=float(row.engine_seconds),
        created_at=row.created_at,
        finished_at=row.finished_at,
        error=row.error,
        dead_chunks=tuple(dead),
        new=None if merged is None else merged.new,
        replaced=None if merged is None else merged.replaced,
        unchanged=None if merged is None else merged.unchanged,
        repeated=None if merged is None else merged.repeated,
        refused=None if merged is None else merged.refused,
        deleted=None if merged is None else merged.deleted,
    )
