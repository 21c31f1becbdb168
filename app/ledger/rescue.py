"""What the poller mends: leases that ran out, jobs that may end, producers and requests that were left behind."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from app.ledger.jobs import PRODUCER_LOCK


@dataclass(frozen=True, slots=True)
class Rescued:
    """ChunkBatches taken back from silent workers: ``available`` again, or ``discarded`` after the last attempt."""

    available: int
    discarded: int


def take_back_expired(conn: sa.Connection, *, limit: int = 500) -> Rescued:
    """Take back leases that ran out. SKIP LOCKED lets any number of pollers share the work."""
    states = conn.execute(
        sa.text(
            "WITH expired AS (SELECT id FROM chunk_batches WHERE state = 'running' AND lease_until < now() "
            "                 ORDER BY lease_until LIMIT :limit FOR UPDATE SKIP LOCKED) "
            "UPDATE chunk_batches b SET "
            "state = CASE WHEN attempt < max_attempts THEN 'available' ELSE 'discarded' END, "
            "finished_at = CASE WHEN attempt < max_attempts THEN NULL ELSE now() END, "
            "error_code = 'lease_expired', error = 'worker ' || lease_owner || ' was silent past its lease', "
            "lease_owner = NULL, lease_until = NULL, rung_at = NULL "
            "FROM expired WHERE b.id = expired.id RETURNING b.state"
        ),
        {"limit": limit},
    ).scalars()
    found = list(states)
    discarded = found.count("discarded")
    return Rescued(available=len(found) - discarded, discarded=discarded)


def jobs_without_open_batches(conn: sa.Connection, *, limit: int = 100) -> list[tuple[int, int]]:
    """``(job id, space id)`` of sealed jobs that may end: the worker that closed their last ChunkBatch died."""
    rows = conn.execute(
        sa.text(
            "SELECT j.id, j.space_id FROM jobs j WHERE j.state = 'running' AND NOT EXISTS (SELECT FROM chunk_batches b "
            "WHERE b.job_id = j.id AND b.state IN ('available', 'running')) ORDER BY j.id LIMIT :limit"
        ),
        {"limit": limit},
    )
    return [(row.id, row.space_id) for row in rows]


def fail_abandoned(conn: sa.Connection) -> list[int]:
    """Jobs whose producer died before its iterable ended become ``failed``; what they committed is embedded.

    A live producer holds the job's advisory lock on its connection (``app.ledger.jobs.hold_producer_lock``).
    """
    rows = conn.execute(
        sa.text(
            "UPDATE jobs j SET state = 'failed', finished_at = now(), error = 'the producer stopped after ' || "
            "n_chunks || ' chunks. Enqueue again with the same idempotency_key to continue in this job; "
            "without one, enqueue again: what is embedded is not embedded twice.' "
            "WHERE state = 'enqueueing' AND NOT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' "
            "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
            "AND l.classid = :class AND l.objid = (j.id % 2147483648)) RETURNING j.id"
        ),
        {"class": PRODUCER_LOCK},
    )
    return list(rows.scalars())


def drop_old_requests(conn: sa.Connection, *, older_than_seconds: float = 600) -> None:
    """Forget embed requests that nobody fetched: their client gave up or died."""
    conn.execute(
        sa.text("DELETE FROM embed_requests WHERE created_at < now() - make_interval(secs => :age)"),
        {"age": older_than_seconds},
    )
