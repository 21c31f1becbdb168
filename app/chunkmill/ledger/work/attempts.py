"""What became of each attempt at a job's ChunkBatches: the read side of ``chunkmill.ledger.work.usage``."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.results import Attempt, FailingChunkBatch
from chunkmill.domain.states import ChunkBatchState
from chunkmill.ledger.work.usage import Outcome

# The error stands with the ChunkBatch, so it is that of the last attempt alone.
_SELECT = """
SELECT u.*, CASE WHEN u.outcome IS NOT NULL THEN u.outcome
                 WHEN b.attempt > u.attempt THEN 'superseded'
                 WHEN b.state = 'running' THEN 'running'
                 ELSE 'interrupted' END AS how,
       CASE WHEN u.outcome = 'failed' AND b.attempt = u.attempt THEN b.error ELSE u.evidence END AS what
FROM usage u JOIN chunk_batches b ON b.id = u.chunk_batch_id WHERE u.job_id = :job
"""
_ORDER = "ORDER BY u.created_at, u.chunk_batch_id, u.attempt"


def of_job(conn: sa.Connection, job_id: int) -> list[Attempt]:
    """All that were booked, the oldest first."""
    return [_attempt(row) for row in conn.execute(sa.text(_SELECT + _ORDER), {"job": job_id})]


def died_with(conn: sa.Connection, job_id: int, content_hash: bytes) -> list[Attempt]:
    """The attempts that died with the ChunkBatches of a job that hold this content now."""
    died = "AND u.outcome = :died AND :hash = ANY(b.content_hashes) "
    facts = {"job": job_id, "died": Outcome.DIED, "hash": content_hash}
    return [_attempt(row) for row in conn.execute(sa.text(_SELECT + died + _ORDER), facts)]


def first_failing(conn: sa.Connection, job_id: int) -> FailingChunkBatch | None:
    """The first ChunkBatch of a job that was discarded; without one, the first that is open and bears an error.

    A single death is no failure: a spot machine went.
    """
    row = conn.execute(
        sa.text(
            "SELECT id, state, attempt, max_attempts, deaths, error_code, error FROM chunk_batches "
            "WHERE job_id = :job AND state IN ('available', 'running', 'discarded') AND error IS NOT NULL "
            "AND NOT (error_code = 'worker_died' AND deaths < :suspect) "
            "ORDER BY state <> 'discarded', id LIMIT 1"
        ),
        {"job": job_id, "suspect": SUSPECT_DEATHS},
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
        outcome=row.how,
        evidence=row.what,
        contents=row.contents,
        recomputed=row.recomputed,
        at_risk=row.at_risk,
        tokens=row.tokens,
        engine_seconds=row.engine_seconds,
        # An account is opened by the first write, or by the end of an attempt that came to none.
        first_write_at=row.created_at if wrote else None,
        ended_at=row.ended_at,
    )
