"""The end of a job, and the anti-join that decides it."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.domain.plurals import count
from chunkmill.domain.states import ChunkBatchState, JobState
from chunkmill.spaces import others
from chunkmill.spaces.registry import VectorTable

ENDED_CHANNEL = "chunkmill_ended"
"""The channel on which a trigger (migration 0029) notifies of the number of each job that ends."""

_LOCK_RUNNING_JOB = sa.text("""
SELECT j.collection_id
FROM jobs j
WHERE j.id = :id AND j.state = :running
FOR NO KEY UPDATE
""")
_LOCK_RUNNING_JOB_OR_SKIP = sa.text("""
SELECT j.collection_id
FROM jobs j
WHERE j.id = :id AND j.state = :running
FOR NO KEY UPDATE SKIP LOCKED
""")
_HAS_OPEN_CHUNK_BATCHES = sa.text("""
SELECT EXISTS (
    SELECT FROM chunk_batches
    WHERE job_id = :id AND state IN (:available, :running))
""")
# ``max_attempts`` bounds how often this happens: if a vector is missing each time, the job must fail in the end.
_REOPEN = sa.text("""
UPDATE chunk_batches
SET state = CASE WHEN attempt < max_attempts THEN :available ELSE :discarded END,
    not_before = now(), rung_at = NULL, n_cached = 0, n_embedded = 0,
    error_code = 'vectors_missing', error = 'completed, but vectors were missing from the space'
WHERE id = ANY(:ids) AND state = :completed
""")
_FILLS_ARE_KEPT = sa.text("""
SELECT to_regclass(quote_ident(current_schema()) || '.reembedding_fills') IS NOT NULL
""")
_IS_BEING_FILLED = sa.text("""
SELECT EXISTS (
    SELECT
    FROM reembedding_fills f
    JOIN reembeddings e ON e.id = f.reembedding_id
    WHERE f.job_id = :id AND f.began_at IS NOT NULL AND e.finished_at IS NULL)
""")
_DISCARDED = sa.text("""
SELECT count(*) AS n, (
    SELECT error FROM chunk_batches WHERE job_id = :id AND state = :discarded ORDER BY id LIMIT 1) AS first_error
FROM chunk_batches
WHERE job_id = :id AND state = :discarded
""")
_END = sa.text("""
UPDATE jobs
SET state = :state, error = :error, finished_at = now()
WHERE id = :id
""")


def finish_if_done(conn: sa.Connection, job_id: int, space: VectorTable, *, wait: bool = True) -> JobState | None:
    """End a sealed job that has no open ChunkBatches; returns its new state, or None if it goes on.

    The anti-join decides. If a vector is missing that no dead chunk explains (someone deleted it, or a worker's promise
    was false), its ChunkBatch becomes available again instead, while it has attempts. A job that fills a space also
    goes on if more contents are about to be added to it. One transaction at a time ends a job. Without ``wait``, a job
    that another transaction is ending is skipped. The job is judged by the chunks of its collection if its space is one
    of the collection's, active or not; otherwise the collection has left that space, and its chunks say nothing about
    the job.
    """
    lock = _LOCK_RUNNING_JOB if wait else _LOCK_RUNNING_JOB_OR_SKIP
    collection_id = conn.execute(lock, {"id": job_id, "running": JobState.RUNNING}).scalar_one_or_none()
    if collection_id is None:
        return None
    states = {
        "available": ChunkBatchState.AVAILABLE,
        "running": ChunkBatchState.RUNNING,
        "completed": ChunkBatchState.COMPLETED,
        "discarded": ChunkBatchState.DISCARDED,
    }
    if conn.execute(_HAS_OPEN_CHUNK_BATCHES, {"id": job_id, **states}).scalar_one():
        return None
    if _is_being_filled(conn, job_id):
        return None
    is_judged = space.id in others.of(conn, collection_id).ids
    with_missing = _completed_with_missing_vectors(conn, job_id, collection_id, space) if is_judged else []
    if with_missing:
        conn.execute(_REOPEN, {"ids": with_missing, **states})
        return None
    discarded = conn.execute(_DISCARDED, {"id": job_id, **states}).one()
    dead = _count_dead_chunks(conn, job_id, collection_id, space) if is_judged else 0
    problems = []
    if discarded.n:
        were = count(discarded.n, "ChunkBatch was", "ChunkBatches were")
        problems.append(f"{were} discarded after the last attempt, the first because: {discarded.first_error}.")
    if dead:
        problems.append(f"{count(dead, 'chunk')} cannot be embedded; the dead list says why.")
    state = JobState.FAILED if problems else JobState.COMPLETED
    error = " ".join([*problems, "`retry` tries them again."]) if problems else None
    conn.execute(_END, {"id": job_id, "state": state, "error": error})
    return state


_TELLS_OF_ENDS = sa.text("""
SELECT EXISTS (
    SELECT FROM pg_trigger
    WHERE tgrelid = to_regclass('jobs') AND tgname = 'tell_job_ended')
""")


def tells_of_ends(conn: sa.Connection) -> bool:
    """Whether the database notifies of each job that ends. False on the schema of the last release."""
    return bool(conn.execute(_TELLS_OF_ENDS).scalar_one())


def fills_are_kept(conn: sa.Connection) -> bool:
    """Whether spaces can be filled. False on the schema of the last release."""
    return bool(conn.execute(_FILLS_ARE_KEPT).scalar_one())


def _is_being_filled(conn: sa.Connection, job_id: int) -> bool:
    """Whether a pass of a re-embedding is about to add to the job. The anti-join reads all of the job's contents, so if
    the job ended after each page, which happens when workers are fast, the cost would grow with the square of the
    collection's size.
    """
    return fills_are_kept(conn) and bool(conn.execute(_IS_BEING_FILLED, {"id": job_id}).scalar_one())


def _completed_with_missing_vectors(
    conn: sa.Connection, job_id: int, collection_id: int, space: VectorTable
) -> list[int]:
    """Completed ChunkBatches with a content that a chunk still refers to and that has no vector or dead chunk."""
    statement = f"""
        SELECT DISTINCT b.id
        FROM chunk_batches b
        CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
        LEFT JOIN {space.table_name} v ON v.content_hash = h.content_hash
        WHERE b.job_id = :id AND b.state = :completed
          AND v.content_hash IS NULL
          AND EXISTS (
              SELECT FROM chunks c
              WHERE c.content_hash = h.content_hash AND c.collection_id = :collection)
          AND NOT EXISTS (
              SELECT FROM dead_chunks d
              WHERE d.job_id = :id AND d.content_hash = h.content_hash)
    """
    parameters = {"id": job_id, "collection": collection_id, "completed": ChunkBatchState.COMPLETED}
    return list(conn.execute(sa.text(statement), parameters).scalars())


def _count_dead_chunks(conn: sa.Connection, job_id: int, collection_id: int, space: VectorTable) -> int:
    """The dead chunks of a job that still have the same text and no vector, except those that it refused as too long:
    such a chunk is in the collection only if another job accepted it.
    """
    statement = f"""
        SELECT count(*)
        FROM dead_chunks d
        JOIN chunks c ON c.collection_id = :collection
                     AND c.chunk_id = d.chunk_id
                     AND c.content_hash = d.content_hash
        WHERE d.job_id = :id AND d.code <> 'too_long'
          AND NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = d.content_hash)
    """
    return int(conn.execute(sa.text(statement), {"id": job_id, "collection": collection_id}).scalar_one())
