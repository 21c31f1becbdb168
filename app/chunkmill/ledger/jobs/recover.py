"""What the poller mends beside leases: jobs that may end, producers and requests that were left behind."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.db.locks import PRODUCER_LOCK


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

    A live producer holds the job's advisory lock on its connection (``chunkmill.ledger.jobs.jobs.hold_producer_lock``).
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
