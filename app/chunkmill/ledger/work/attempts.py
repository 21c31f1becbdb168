"""Reads the accounts that ``chunkmill.ledger.work.usage`` writes: what became of each attempt of a job."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.results import Attempt, FailingChunkBatch
from chunkmill.domain.states import ChunkBatchState
from chunkmill.ledger.work.usage import Outcome

# The error stands on the ChunkBatch, so it belongs to the last attempt alone.
_OF_JOB = sa.text("""
SELECT u.*,
       CASE WHEN u.outcome IS NOT NULL THEN u.outcome
            WHEN b.attempt > u.attempt THEN 'superseded'
            WHEN b.state = :running THEN :running
            ELSE 'interrupted' END AS shown_outcome,
       CASE WHEN u.outcome = :failed AND b.attempt = u.attempt THEN b.error ELSE u.evidence END AS shown_evidence
FROM usage u
JOIN chunk_batches b ON b.id = u.chunk_batch_id
WHERE u.job_id = :job
  AND (CAST(:died_with AS bytea) IS NULL OR (u.outcome = :died AND CAST(:died_with AS bytea) = ANY(b.content_hashes)))
ORDER BY u.created_at, u.chunk_batch_id, u.attempt
""")


def of_job(conn: sa.Connection, job_id: int) -> list[Attempt]:
    """All attempts at a job's ChunkBatches that have an account, the oldest first."""
    return _attempts(conn, job_id, died_with=None)


def died_with(conn: sa.Connection, job_id: int, content_hash: bytes) -> list[Attempt]:
    """The attempts that died with the ChunkBatches of a job that hold this content now."""
    return _attempts(conn, job_id, died_with=content_hash)


def _attempts(conn: sa.Connection, job_id: int, *, died_with: bytes | None) -> list[Attempt]:
    parameters = {
        "job": job_id,
        "died_with": died_with,
        "running": ChunkBatchState.RUNNING,
        "failed": Outcome.FAILED,
        "died": Outcome.DIED,
    }
    return [_attempt(row) for row in conn.execute(_OF_JOB, parameters)]


_FIRST_FAILING = sa.text("""
SELECT id, state, attempt, max_attempts, deaths, error_code, error
FROM chunk_batches
WHERE job_id = :job AND state IN (:available, :running, :discarded)
  AND error IS NOT NULL
  AND NOT (error_code = 'worker_died' AND deaths < :suspect)
ORDER BY state <> :discarded, id
LIMIT 1
""")


def first_failing(conn: sa.Connection, job_id: int) -> FailingChunkBatch | None:
    """The first ChunkBatch of a job that was discarded; if there is none, the first open one that has an error.

    A single death is not a failure, because spot machines are taken away.
    """
    row = conn.execute(
        _FIRST_FAILING,
        {
            "job": job_id,
            "suspect": SUSPECT_DEATHS,
            "available": ChunkBatchState.AVAILABLE,
            "running": ChunkBatchState.RUNNING,
            "discarded": ChunkBatchState.DISCARDED,
        },
    ).one_or_none()
    if row is None:
        return None
    state = ChunkBatchState(row.state)
    return FailingChunkBatch(row.id, state, row.attempt, row.max_attempts, row.deaths, row.error_code, row.error)


def _attempt(row: sa.Row[Any]) -> Attempt:
    wrote = row.contents or row.recomputed
    return Attempt(
        chunk_batch_id=row.chunk_batch_id,
        attempt=row.attempt,
        worker=row.worker,
        outcome=row.shown_outcome,
        evidence=row.shown_evidence,
        contents=row.contents,
        recomputed=row.recomputed,
        at_risk=row.at_risk,
        tokens=row.tokens,
        engine_seconds=row.engine_seconds,
        # An account is opened by the first write, or by the end of an attempt that wrote nothing.
        first_write_at=row.created_at if wrote else None,
        ended_at=row.ended_at,
    )
