"""Cancel: what a job's workers are in stops in one short transaction; what nobody has begun follows in slices.

From the first commit on nothing of the job is claimed (``chunk_batches.claim_if_due``), so the slices have time, and
whoever was to commit them may die: the poller goes on.
"""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.ledger.jobs.jobs import CANCELLED_CHANNEL

SLICE = 5000
"""ChunkBatches of one transaction. 500,000 take 3 s, 30 ms a slice, and twice that beside an old snapshot, which keeps
the index from forgetting what is cancelled; in one transaction all their rows were held for 2.7 s."""

_CANCELLED = "state = 'cancelled', lease_owner = NULL, lease_until = NULL, finished_at = now()"


def cancel_if_open(conn: sa.Connection, job_id: int) -> None:
    """Cancel a job and what of it is running. A worker inside hears of it at the commit, looks, and finds its lease
    gone; one that does not hear finds out when it writes.

    It waits for whoever is cutting a ChunkBatch up; the parts are left to :func:`cancel_some`, which sees them.
    """
    conn.execute(
        sa.text(
            "UPDATE jobs SET state = 'cancelled', finished_at = now() "
            "WHERE id = :id AND state IN ('enqueueing', 'running')"
        ),
        {"id": job_id},
    )
    conn.execute(
        sa.text(
            f"UPDATE chunk_batches SET {_CANCELLED} WHERE job_id = :id AND state = 'running' "
            "AND EXISTS (SELECT FROM jobs j WHERE j.id = :id AND j.state = 'cancelled')"
        ),
        {"id": job_id},
    )
    _tell(conn, job_id)


def cancel_some(conn: sa.Connection, job_id: int) -> int:
    """Cancel the next open ChunkBatches of a cancelled job; returns how many, 0 at the end."""
    # The lock keeps a retry from making the job run again while some of it are on their way to be cancelled.
    locked = "SELECT id FROM jobs WHERE id = :id AND state = 'cancelled' FOR NO KEY UPDATE"
    if conn.execute(sa.text(locked), {"id": job_id}).one_or_none() is None:
        return 0
    return _cancel_some(conn, job_id)


def cancel_some_left_behind(conn: sa.Connection) -> int:
    """The same for one job whose cancel ended before its end; 0 where nobody left one."""
    job_id = conn.execute(
        sa.text(
            "SELECT j.id FROM jobs j CROSS JOIN LATERAL (SELECT FROM chunk_batches b WHERE b.job_id = j.id "
            "AND b.state IN ('available', 'running') LIMIT 1) b "
            # A client that is at it holds the job's row, but for moments.
            "WHERE j.state = 'cancelled' ORDER BY j.id LIMIT 1 FOR NO KEY UPDATE OF j SKIP LOCKED"
        )
    ).scalar_one_or_none()
    return 0 if job_id is None else _cancel_some(conn, job_id)


def _cancel_some(conn: sa.Connection, job_id: int) -> int:
    # Any other plan reads the whole job, or the whole table, once for each slice. The index on (job_id, state) passes
    # over what is cancelled.
    conn.execute(
        sa.text("SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true)")
    )
    found = conn.execute(
        sa.text(
            # Running ones too: their claim had begun when the job was cancelled.
            "WITH open AS (SELECT id, state FROM chunk_batches WHERE job_id = :id "
            "              AND state IN ('available', 'running') LIMIT :limit FOR UPDATE), "
            f"gone AS (UPDATE chunk_batches SET {_CANCELLED} WHERE id = ANY(ARRAY(SELECT id FROM open))) "
            "SELECT count(*) AS n, count(*) FILTER (WHERE state = 'running') AS running FROM open"
        ),
        {"id": job_id, "limit": SLICE},
    ).one()
    if found.running:
        _tell(conn, job_id)
    return int(found.n)


def _tell(conn: sa.Connection, job_id: int) -> None:
    conn.execute(sa.text("SELECT pg_notify(:channel, :job)"), {"channel": CANCELLED_CHANNEL, "job": str(job_id)})
