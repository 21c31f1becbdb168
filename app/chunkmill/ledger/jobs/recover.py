"""What the poller repairs besides leases: jobs that may end, and what dead producers and callers left behind."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.db.locks import PRODUCER_LOCK
from chunkmill.db.statements import with_constants
from chunkmill.domain.states import ChunkBatchState, JobState
from chunkmill.ledger import embed_requests
from chunkmill.ledger.jobs import outbox

_JOBS_THAT_MAY_END = with_constants(
    """
SELECT j.id, j.space_id
FROM jobs j
WHERE j.state = :job_running
  AND j.id <> ALL(CAST(:but AS bigint[]))
  AND NOT EXISTS (
      SELECT FROM chunk_batches b
      WHERE b.job_id = j.id AND b.state IN (:available, :running))
ORDER BY j.id
LIMIT :limit
""",
    job_running=JobState.RUNNING,
    available=ChunkBatchState.AVAILABLE,
    running=ChunkBatchState.RUNNING,
)


def jobs_without_open_chunk_batches(
    conn: sa.Connection, *, but: Sequence[int] = (), limit: int = 100
) -> list[tuple[int, int]]:
    """``(job id, space id)`` of sealed jobs that may end, because the worker that closed their last ChunkBatch died.

    The jobs ``but`` are left out.
    """
    rows = conn.execute(_JOBS_THAT_MAY_END, {"limit": limit, "but": list(but)})
    return [(row.id, row.space_id) for row in rows]


# A lock of the producer is keyed by (PRODUCER_LOCK, job id modulo 2^31).
_FAIL_ABANDONED = with_constants(
    """
UPDATE jobs j
SET state = :failed, finished_at = now(),
    error = format('the producer stopped after %s chunks. %s', n_chunks, CAST(:advice AS text))
WHERE state = :enqueueing
  AND NOT EXISTS (
      SELECT FROM pg_locks l
      WHERE l.locktype = 'advisory'
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND l.classid = :class
        AND l.objid = (j.id % 2147483648))
  AND j.id <> ALL(CAST(:but AS bigint[]))
RETURNING j.id
""",
    enqueueing=JobState.ENQUEUEING,
    failed=JobState.FAILED,
)
_ADVICE = (
    "Enqueue again with the same idempotency_key to continue in this job; without one, enqueue again: what is embedded "
    "is not embedded twice."
)


def fail_abandoned(conn: sa.Connection) -> list[int]:
    """Fail the jobs whose producer died before its iterable ended; returns their ids. The chunks that they had
    committed are embedded.

    A live producer holds the job's advisory lock on its connection (``chunkmill.ledger.jobs.jobs.hold_producer_lock``).
    A job in the outbox is not failed: its chunks are still there, so it is delivered again.
    """
    but = outbox.being_delivered(conn) if outbox.is_kept(conn) else []
    parameters = {"class": PRODUCER_LOCK, "advice": _ADVICE, "but": but}
    return list(conn.execute(_FAIL_ABANDONED, parameters).scalars())


_DELETE_OLD_REQUESTS = sa.text("""
DELETE FROM embed_requests
WHERE created_at < now() - make_interval(secs => :age)
""")


_DELETE_LATE_REQUESTS = sa.text("""
DELETE FROM embed_requests
WHERE deadline < clock_timestamp() - make_interval(secs => :grace)
""")


def delete_old_requests(conn: sa.Connection, *, older_than_seconds: float = 600, grace_seconds: float = 5) -> None:
    """Delete embed requests whose answer nobody took, because their caller gave up or died.

    A request that states its deadline is deleted ``grace_seconds`` after the deadline.
    """
    conn.execute(_DELETE_OLD_REQUESTS, {"age": older_than_seconds})
    if embed_requests.has_columns(conn, "deadline"):
        conn.execute(_DELETE_LATE_REQUESTS, {"grace": grace_seconds})
