"""ChunkBatches: each transition is one UPDATE that names its guard.

``attempt`` is the fencing number. A worker whose lease was taken back holds an old number, and its updates match no
row any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import sqlalchemy as sa

from chunkmill.db.copy import copy_binary, encode_hash_array, encode_rows
from chunkmill.db.statements import with_constants
from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.reasons import storable
from chunkmill.domain.retries import retry_delay
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import ChunkBatchState, JobState, Route


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one worker to finish one ChunkBatch, until ``attempt`` is raised by another claim."""

    chunk_batch_id: int
    attempt: int
    max_attempts: int
    job_id: int
    space_id: int
    collection_id: int
    on_long: OnLong
    suspect: bool = False
    """Workers died while they embedded it, so it is embedded alone."""
    until: datetime | None = None
    """When the lease was first going to end, to the microsecond. After a rollback another claim may have the same
    attempt number; this time tells the two apart. None at a provider."""


@dataclass(frozen=True, slots=True)
class SharedFields:
    """The columns that all ChunkBatches of one enqueue share."""

    job_id: int
    space_id: int
    route: Route
    priority: int
    max_attempts: int


def add(conn: sa.Connection, shared: SharedFields, hash_lists: Sequence[Sequence[bytes]], *, deaths: int = 0) -> None:
    """Add one available ChunkBatch for each sequence of content hashes."""
    _copy(conn, shared, ChunkBatchState.AVAILABLE, [(hashes, 0, 0) for hashes in hash_lists], deaths=deaths)


def add_cached(conn: sa.Connection, shared: SharedFields, hashes: Sequence[bytes], *, n_truncated: int) -> None:
    """Add one completed ChunkBatch for contents that already have a vector.

    With it the anti-join that ends the job covers every content of the job, and a vector that has vanished by then is
    embedded again.
    """
    if hashes:
        _copy(conn, shared, ChunkBatchState.COMPLETED, [(hashes, len(hashes), n_truncated)])


_COPIED = """
chunk_batches (
    job_id, space_id, route, priority, max_attempts, state, deaths, content_hashes, n_contents, n_cached, n_truncated
)"""


def _copy(
    conn: sa.Connection,
    shared: SharedFields,
    state: ChunkBatchState,
    rows: Sequence[tuple[Sequence[bytes], int, int]],
    *,
    deaths: int = 0,
) -> None:
    """COPY rows of ``(hashes, n_cached, n_truncated)``.

    Sent as parameters, the arrays took a tenth of an enqueue, because psycopg writes each hash as escaped text.
    """
    if not rows:
        return
    fields = (
        shared.job_id.to_bytes(8, "big"),
        shared.space_id.to_bytes(4, "big"),
        shared.route.encode(),
        shared.priority.to_bytes(2, "big"),
        shared.max_attempts.to_bytes(4, "big"),
        state.encode(),
        deaths.to_bytes(2, "big"),
    )
    encoded = (
        (
            *fields,
            encode_hash_array(hashes),
            len(hashes).to_bytes(4, "big"),
            n_cached.to_bytes(4, "big"),
            n_truncated.to_bytes(4, "big"),
        )
        for hashes, n_cached, n_truncated in rows
    )
    copy_binary(conn, _COPIED, encode_rows(encoded))


# Only ChunkBatches whose bell was rung are read, by ix_chunk_batches_rung_by_route. They are no more than the doorbell
# windows hold. Those of jobs that the worker never served come in the order in which they were rung.
_TURN = with_constants(
    """
WITH bell AS MATERIALIZED (
    SELECT b.job_id, b.priority, b.state <> :available AND b.state <> :cancelled AS is_taken,
           now() - make_interval(secs => s.ago) AS served_at
    FROM chunk_batches b
    LEFT JOIN unnest(CAST(:jobs AS bigint[]), CAST(:ago AS float8[])) AS s(job_id, ago) USING (job_id)
    WHERE b.id = :id AND b.route = :route)
SELECT b.id
FROM bell, chunk_batches b
JOIN jobs j ON j.id = b.job_id
LEFT JOIN unnest(CAST(:jobs AS bigint[]), CAST(:ago AS float8[])) AS s(job_id, ago) ON s.job_id = b.job_id
WHERE b.state = :available AND b.rung_at IS NOT NULL
  AND b.route = :route AND b.priority = (SELECT priority FROM bell)
  AND b.not_before <= now() AND b.attempt < b.max_attempts
  AND b.space_id <> ALL(CAST(:not_spaces AS int[]))
  AND j.state <> :cancelled_job
  AND (bell.is_taken OR (
      b.job_id <> bell.job_id AND coalesce(now() - make_interval(secs => s.ago), b.rung_at) < bell.served_at))
ORDER BY coalesce(now() - make_interval(secs => s.ago), b.rung_at), b.rung_at, b.id
LIMIT 1
FOR UPDATE OF b SKIP LOCKED
""",
    available=ChunkBatchState.AVAILABLE,
)


def turn_of(
    conn: sa.Connection,
    chunk_batch_id: int,
    *,
    served: Mapping[int, float],
    route: Route = Route.LOCAL,
    not_spaces: Sequence[int] = (),
) -> int:
    """Return the ChunkBatch that a worker should claim when the bell of ``chunk_batch_id`` reaches it.

    ``served`` says how many seconds ago the worker last held something of a job; 0 if it holds it now. If the worker
    has served the bell's job since another job's bell was rung, then it is the other job's turn. So a small job that
    comes later need not wait for all bells of a large one that are before its own in Redis. The bell of the ChunkBatch
    that was claimed instead stays in Redis, and later stands for one that was passed over.
    """
    turn = conn.execute(
        _TURN,
        {
            "id": chunk_batch_id,
            "route": route,
            "jobs": list(served),
            "ago": list(served.values()),
            "not_spaces": list(not_spaces),
            "cancelled": ChunkBatchState.CANCELLED,
            "cancelled_job": JobState.CANCELLED,
        },
    ).scalar_one_or_none()
    return chunk_batch_id if turn is None else int(turn)


_CLAIM = sa.text("""
UPDATE chunk_batches b
SET state = :running, attempt = attempt + 1, lease_owner = :owner,
    lease_until = now() + make_interval(secs => :lease)
FROM jobs j
WHERE b.id = :id AND j.id = b.job_id
  AND b.state = :available AND b.route = :route AND b.not_before <= now()
  AND b.attempt < b.max_attempts
  AND b.space_id <> ALL(CAST(:not_spaces AS int[]))
  AND j.state <> :cancelled
RETURNING b.attempt, b.max_attempts, b.deaths, b.job_id, b.space_id, b.lease_until, j.collection_id, j.on_long
""")


def claim_if_due(
    conn: sa.Connection,
    chunk_batch_id: int,
    *,
    owner: str,
    lease_seconds: float,
    route: Route = Route.LOCAL,
    not_spaces: Sequence[int] = (),
) -> Lease | None:
    """Lease a ChunkBatch and return the lease.

    None if it is done, leased by another worker, not due yet, out of attempts, or on another route since its doorbell
    was rung. A ChunkBatch of one of ``not_spaces`` is left to another worker. A lease that has expired is not claimed:
    the poller takes the ChunkBatch back and counts the death.
    """
    row = conn.execute(
        _CLAIM,
        {
            "id": chunk_batch_id,
            "owner": owner,
            "lease": lease_seconds,
            "route": route,
            "not_spaces": list(not_spaces),
            "available": ChunkBatchState.AVAILABLE,
            "running": ChunkBatchState.RUNNING,
            "cancelled": JobState.CANCELLED,
        },
    ).one_or_none()
    if row is None:
        return None
    return Lease(
        chunk_batch_id=chunk_batch_id,
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        job_id=row.job_id,
        space_id=row.space_id,
        collection_id=row.collection_id,
        on_long=OnLong(row.on_long),
        suspect=row.deaths >= SUSPECT_DEATHS,
        until=row.lease_until,
    )


_TAKE_UP = sa.text("""
UPDATE chunk_batches
SET lease_until = now() + make_interval(secs => :lease)
WHERE id = :id AND attempt = :attempt AND state = :running AND lease_until = :until
RETURNING lease_until
""")


def take_up_if_held(conn: sa.Connection, lease: Lease, *, lease_seconds: float) -> Lease | None:
    """The lease, renewed, if the claim that made it was committed and nobody has acted on it; else None.

    It is for a claim that got no answer to its commit.
    """
    until = conn.execute(_TAKE_UP, {**_guard(lease), "until": lease.until, "lease": lease_seconds}).scalar_one_or_none()
    return replace(lease, until=until) if until else None


# Rows that another transaction has locked, for example to cancel a large job, must not keep the other leases waiting:
# they are skipped here and counted as held by _STILL_HELD.
_RENEW = sa.text("""
UPDATE chunk_batches
SET lease_until = now() + make_interval(secs => :lease)
WHERE id = ANY(ARRAY(
    SELECT b.id
    FROM chunk_batches b
    JOIN unnest(CAST(:ids AS bigint[]), CAST(:attempts AS int[])) AS l(id, attempt) USING (id, attempt)
    WHERE b.state = :running
    ORDER BY b.id
    FOR NO KEY UPDATE OF b SKIP LOCKED))
""")
_STILL_HELD = sa.text("""
SELECT b.id
FROM chunk_batches b
JOIN unnest(CAST(:ids AS bigint[]), CAST(:attempts AS int[])) AS l(id, attempt) USING (id, attempt)
WHERE b.state = :running
""")


def renew_if_held(conn: sa.Connection, leases: Sequence[Lease], *, lease_seconds: float) -> set[int]:
    """Renew all leases of a process in one statement; returns the ids of the ChunkBatches that are still held."""
    held = {
        "ids": [lease.chunk_batch_id for lease in leases],
        "attempts": [lease.attempt for lease in leases],
        "running": ChunkBatchState.RUNNING,
    }
    conn.execute(_RENEW, {**held, "lease": lease_seconds})
    return set(conn.execute(_STILL_HELD, held).scalars())


# The guard of every statement below is the same: this ChunkBatch, this attempt, and running.
_RECORD_PROGRESS = sa.text("""
UPDATE chunk_batches
SET n_embedded = :n
WHERE id = :id AND attempt = :attempt AND state = :running
""")


def record_progress_if_held(conn: sa.Connection, lease: Lease, n_embedded: int) -> bool:
    """Set how many contents have a vector by now. False if the lease is lost."""
    return conn.execute(_RECORD_PROGRESS, {"n": n_embedded, **_guard(lease)}).rowcount == 1


_COMPLETE = sa.text("""
UPDATE chunk_batches
SET state = :completed, n_embedded = :n, n_truncated = :truncated, finished_at = now(),
    lease_owner = NULL, lease_until = NULL, error_code = NULL, error = NULL
WHERE id = :id AND attempt = :attempt AND state = :running
""")
# With an error, the ChunkBatch was split or its last content buried, after this attempt had been counted as dead.
_COMPLETED_BEFORE = sa.text("""
SELECT EXISTS (
    SELECT FROM chunk_batches
    WHERE id = :id AND attempt = :attempt AND state = :completed AND error_code IS NULL)
""")


def complete_if_held(conn: sa.Connection, lease: Lease, *, n_embedded: int, n_truncated: int) -> bool:
    """End an attempt that left nothing to do. False if the lease is lost; nothing is changed then.

    Also True if this very attempt has completed the ChunkBatch before: the answer to its commit was lost, and the
    transaction runs again.
    """
    completed = {"completed": ChunkBatchState.COMPLETED}
    counts = {"n": n_embedded, "truncated": n_truncated}
    if conn.execute(_COMPLETE, {**completed, **counts, **_guard(lease)}).rowcount == 1:
        return True
    attempt = {"id": lease.chunk_batch_id, "attempt": lease.attempt}
    return bool(conn.execute(_COMPLETED_BEFORE, {**completed, **attempt}).scalar_one())


_DISCARD = sa.text("""
UPDATE chunk_batches
SET state = :discarded, finished_at = now(),
    lease_owner = NULL, lease_until = NULL, error_code = :code, error = :error
WHERE id = :id AND attempt = :attempt AND state = :running
""")
_RETRY_LATER = sa.text("""
UPDATE chunk_batches
SET state = :available, rung_at = NULL, not_before = now() + make_interval(secs => :delay),
    lease_owner = NULL, lease_until = NULL, error_code = :code, error = :error
WHERE id = :id AND attempt = :attempt AND state = :running
""")


def fail_if_held(
    conn: sa.Connection, lease: Lease, *, code: str, error: str, retryable: bool
) -> ChunkBatchState | None:
    """End an attempt that raised; returns the new state: available again after a delay, or discarded.

    None if the lease is lost.
    """
    delay = retry_delay(lease.attempt, lease.max_attempts, retryable=retryable)
    parameters = {"code": storable(code), "error": storable(error), **_guard(lease)}
    if delay is None:
        state = ChunkBatchState.DISCARDED
        result = conn.execute(_DISCARD, {**parameters, "discarded": state})
    else:
        state = ChunkBatchState.AVAILABLE
        result = conn.execute(_RETRY_LATER, {**parameters, "available": state, "delay": delay})
    return state if result.rowcount else None


# Without a delay, not_before stays: the ChunkBatch is due since the same time as before, and so goes before work that
# nobody has begun. The attempt number is the fencing number and cannot go back, so the limit moves up instead.
_RELEASE = sa.text("""
UPDATE chunk_batches
SET state = :available, rung_at = NULL, max_attempts = max_attempts + 1,
    not_before = CASE WHEN :delay > 0 THEN now() + make_interval(secs => :delay) ELSE not_before END,
    error_code = coalesce(:code, error_code), error = coalesce(:error, error),
    lease_owner = NULL, lease_until = NULL
WHERE id = :id AND attempt = :attempt AND state = :running
""")


def release_if_held(
    conn: sa.Connection, lease: Lease, *, code: str | None = None, error: str | None = None, delay_s: float = 0.0
) -> bool:
    """Make a ChunkBatch available again at once and uncharged, because the worker is leaving or unfit.

    ``code`` and ``error`` stay on the ChunkBatch until somebody completes it. Nobody can claim it for ``delay_s``
    seconds. False if the lease is lost.
    """
    result = conn.execute(
        _RELEASE,
        {
            "code": code,
            "error": error and storable(error),
            "delay": delay_s,
            "available": ChunkBatchState.AVAILABLE,
            **_guard(lease),
        },
    )
    return result.rowcount == 1


_RELEASE_ALL = with_constants(
    """
UPDATE chunk_batches
SET state = :available, rung_at = NULL, max_attempts = max_attempts + 1, lease_owner = NULL, lease_until = NULL
WHERE lease_owner = :owner AND state = :running
""",
    available=ChunkBatchState.AVAILABLE,
    running=ChunkBatchState.RUNNING,
)


def release_all(conn: sa.Connection, owner: str) -> int:
    """Make everything that a worker still holds available again, uncharged; returns the number of ChunkBatches.

    It is for ChunkBatches whose tasks do not release them themselves.
    """
    return int(conn.execute(_RELEASE_ALL, {"owner": owner}).rowcount)


def _guard(lease: Lease) -> dict[str, object]:
    return {"id": lease.chunk_batch_id, "attempt": lease.attempt, "running": ChunkBatchState.RUNNING}
