"""The end of a job, and the anti-join that decides it."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.domain.states import JobState
from chunkmill.spaces.registry import Space


def finish_if_done(conn: sa.Connection, job_id: int, space: Space, *, wait: bool = True) -> JobState | None:
    """End a sealed job without open ChunkBatches; returns its new state, or None if it goes on.

    The anti-join decides. Where a vector is missing that no dead chunk explains (someone deleted it, or a
    worker's promise was false) its ChunkBatch becomes available again instead, while it has attempts. One
    closer works at a time; without ``wait`` a job that someone else is closing is passed over.
    """
    skip = "" if wait else "SKIP LOCKED"
    row = conn.execute(
        sa.text(f"SELECT collection_id FROM jobs WHERE id = :id AND state = 'running' FOR NO KEY UPDATE {skip}"),
        {"id": job_id},
    ).one_or_none()
    if row is None:
        return None
    open_left = conn.execute(
        sa.text("SELECT EXISTS (SELECT FROM chunk_batches WHERE job_id = :id AND state IN ('available', 'running'))"),
        {"id": job_id},
    ).scalar_one()
    if open_left:
        return None
    unexplained = _batches_with_missing(conn, job_id, row.collection_id, space)
    if unexplained:
        conn.execute(
            sa.text(
                "UPDATE chunk_batches SET "
                # Bounded by its attempts: a vector that never stays must fail the job, not circle for ever.
                "state = CASE WHEN attempt < max_attempts THEN 'available' ELSE 'discarded' END, "
                "not_before = now(), rung_at = NULL, n_cached = 0, n_embedded = 0, "
                "error_code = 'vectors_missing', error = 'completed, but vectors were missing from the space' "
                "WHERE id = ANY(:ids) AND state = 'completed'"
            ),
            {"ids": unexplained},
        )
        return None
    incomplete = conn.execute(
        sa.text(
            "SELECT (SELECT count(*) FROM chunk_batches WHERE job_id = :id AND state = 'discarded') AS discarded, "
            "(SELECT error FROM chunk_batches WHERE job_id = :id AND state = 'discarded' ORDER BY id LIMIT 1) AS why, "
            "(SELECT count(*) FROM dead_chunks d JOIN chunks c ON (c.collection_id, c.chunk_id, c.content_hash) "
            "  = (:collection, d.chunk_id, d.content_hash) WHERE d.job_id = :id "
            f" AND NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = d.content_hash)) AS dead"
        ),
        {"id": job_id, "collection": row.collection_id},
    ).one()
    state = JobState.FAILED if incomplete.discarded or incomplete.dead else JobState.COMPLETED
    problems = []
    if incomplete.discarded:
        problems.append(
            f"{incomplete.discarded} ChunkBatches were discarded after their last attempt, the first because: "
            f"{incomplete.why}."
        )
    if incomplete.dead:
        problems.append(f"{incomplete.dead} chunks cannot be embedded; the dead list says why.")
    error = " ".join([*problems, "`retry` tries them again."]) if problems else None
    conn.execute(
        sa.text("UPDATE jobs SET state = :state, error = :error, finished_at = now() WHERE id = :id"),
        {"id": job_id, "state": state, "error": error},
    )
    return state


def _batches_with_missing(conn: sa.Connection, job_id: int, collection: int, space: Space) -> list[int]:
    """Completed ChunkBatches with a content that a chunk still refers to and that has no vector or dead chunk."""
    return list(
        conn.execute(
            sa.text(
                "SELECT DISTINCT b.id FROM chunk_batches b CROSS JOIN unnest(b.content_hashes) AS h(content_hash) "
                f"LEFT JOIN {space.table_name} v ON v.content_hash = h.content_hash "
                "WHERE b.job_id = :id AND b.state = 'completed' AND v.content_hash IS NULL "
                "AND EXISTS (SELECT FROM chunks c WHERE c.content_hash = h.content_hash "
                "            AND c.collection_id = :collection) "
                "AND NOT EXISTS (SELECT FROM dead_chunks d WHERE d.job_id = :id "
                "                AND d.content_hash = h.content_hash)"
            ),
            {"id": job_id, "collection": collection},
        ).scalars()
    )
