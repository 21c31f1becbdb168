"""Cancels jobs: running ChunkBatches stop in one short transaction, and open ones follow in slices.

From the first commit on nothing of the job is claimed (``chunk_batches.claim_if_due``), so the slices have time. If the
process that was to commit them dies, the poller goes on.
"""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.db.statements import with_constants
from chunkmill.domain.states import ChunkBatchState, JobState
from chunkmill.ledger.jobs.jobs import CANCELLED_CHANNEL

SLICE = 5000
"""How many ChunkBatches one transaction cancels.

500,000 take 3 s, 30 ms for each transaction, and twice that while somebody holds an old snapshot, because the index
then keeps the entries of cancelled rows. In one transaction all rows were locked for 2.7 s.
"""
_STATES = {
    "available": ChunkBatchState.AVAILABLE,
    "running": ChunkBatchState.RUNNING,
    "cancelled": ChunkBatchState.CANCELLED,
}

_CANCEL_JOB = sa.text("""
UPDATE jobs
SET state = :cancelled, finished_at = now()
WHERE id = :id AND state IN (:enqueueing, :running)
""")
_CANCEL_RUNNING = sa.text("""
UPDATE chunk_batches
SET state = :cancelled, lease_owner = NULL, lease_until = NULL, finished_at = now()
WHERE job_id = :id AND state = :running
  AND EXISTS (SELECT FROM jobs j WHERE j.id = :id AND j.state = :job_cancelled)
""")


def cancel_if_open(conn: sa.Connection, job_id: int) -> None:
    """Cancel a job and its running ChunkBatches.

    A worker in one of these hears of it at the commit, looks, and sees that its lease is gone. One that does not hear
    of it sees so when it writes. The statement waits for a transaction that is splitting a ChunkBatch; the parts are
    left to :func:`cancel_some`, which sees them.
    """
    conn.execute(
        _CANCEL_JOB,
        {
            "id": job_id,
            "enqueueing": JobState.ENQUEUEING,
            "running": JobState.RUNNING,
            "cancelled": JobState.CANCELLED,
        },
    )
    conn.execute(_CANCEL_RUNNING, {"id": job_id, "job_cancelled": JobState.CANCELLED, **_STATES})
    _tell(conn, job_id)


# The lock keeps a retry from making the job run again while some ChunkBatches are about to be cancelled.
_LOCK_CANCELLED_JOB = sa.text("""
SELECT id
FROM jobs
WHERE id = :id AND state = :cancelled
FOR NO KEY UPDATE
""")


def cancel_some(conn: sa.Connection, job_id: int) -> int:
    """Cancel the next open ChunkBatches of a cancelled job; returns how many, 0 at the end."""
    locked = conn.execute(_LOCK_CANCELLED_JOB, {"id": job_id, "cancelled": JobState.CANCELLED})
    return 0 if locked.one_or_none() is None else _cancel_some(conn, job_id)


# A client that is cancelling a job holds the job's row, but only for moments.
_LOCK_JOB_LEFT_BEHIND = sa.text("""
SELECT j.id
FROM jobs j
CROSS JOIN LATERAL (
    SELECT FROM chunk_batches b
    WHERE b.job_id = j.id AND b.state IN (:available, :running)
    LIMIT 1) b
WHERE j.state = :job_cancelled
ORDER BY j.id
LIMIT 1
FOR NO KEY UPDATE OF j SKIP LOCKED
""")


def cancel_some_left_behind(conn: sa.Connection) -> int:
    """Go on as :func:`cancel_some` does for one job whose cancel was interrupted; returns 0 if there is no such job."""
    job_id = conn.execute(_LOCK_JOB_LEFT_BEHIND, {"job_cancelled": JobState.CANCELLED, **_STATES}).scalar_one_or_none()
    return 0 if job_id is None else _cancel_some(conn, job_id)


# Running ChunkBatches too: their claim had begun when the job was cancelled.
_CANCEL_OPEN = with_constants(
    """
WITH open AS (
    SELECT id, state
    FROM chunk_batches
    WHERE job_id = :id AND state IN (:available, :running)
    LIMIT :limit
    FOR UPDATE),
cancelled AS (
    UPDATE chunk_batches
    SET state = :cancelled, lease_owner = NULL, lease_until = NULL, finished_at = now()
    WHERE id = ANY(ARRAY(SELECT id FROM open)))
SELECT count(*) AS n, count(*) FILTER (WHERE state = :running) AS running
FROM open
""",
    available=ChunkBatchState.AVAILABLE,
    running=ChunkBatchState.RUNNING,
    cancelled=ChunkBatchState.CANCELLED,
)


def _cancel_some(conn: sa.Connection, job_id: int) -> int:
    # With any other plan each slice would read the whole job, or the whole table. The index on (job_id, state) leaves
    # out what is cancelled already.
    conn.execute(
        sa.text("SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true)")
    )
    counts = conn.execute(_CANCEL_OPEN, {"id": job_id, "limit": SLICE}).one()
    if counts.running:
        _tell(conn, job_id)
    return int(counts.n)


def _tell(conn: sa.Connection, job_id: int) -> None:
    conn.execute(sa.text("SELECT pg_notify(:channel, :job)"), {"channel": CANCELLED_CHANNEL, "job": str(job_id)})
