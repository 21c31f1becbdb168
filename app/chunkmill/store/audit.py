"""The proof of completeness: the anti-join of a collection's chunks with its space's vectors."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.domain.results import Audit
from chunkmill.domain.states import ChunkBatchState
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space

SHOWN_MISSING = 20


def audit(conn: sa.Connection, space: Space, collection: Collection) -> Audit:
    """How many chunks of the collection have a vector in its space, and what is known of those that have none."""
    count = f"""
        SELECT count(*) AS chunks,
               count(DISTINCT c.content_hash) AS contents,
               count(v.content_hash) AS embedded,
               count(*) FILTER (WHERE v.truncated) AS truncated
        FROM chunks c
        LEFT JOIN {space.table_name} v USING (content_hash)
        WHERE c.collection_id = :id
    """
    counts = conn.execute(sa.text(count), {"id": collection.id}).one()
    explain_missing = f"""
        WITH missing AS (
            SELECT c.chunk_id, c.content_hash
            FROM chunks c
            LEFT JOIN {space.table_name} v USING (content_hash)
            WHERE c.collection_id = :id AND v.content_hash IS NULL
        ),
        pending AS (
            SELECT DISTINCT h.content_hash
            FROM chunk_batches b
            JOIN jobs j ON j.id = b.job_id
            CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
            WHERE j.collection_id = :id AND j.space_id = :space AND b.state IN (:available, :running)
        )
        SELECT count(*) FILTER (WHERE m.content_hash IN (SELECT content_hash FROM pending)) AS pending,
               count(*) FILTER (WHERE EXISTS (
                   SELECT
                   FROM dead_chunks d
                   JOIN jobs j ON j.id = d.job_id
                   WHERE j.collection_id = :id AND j.space_id = :space
                     AND d.content_hash = m.content_hash AND d.chunk_id = m.chunk_id
               )) AS dead,
               (
                   SELECT array_agg(chunk_id)
                   FROM (SELECT chunk_id FROM missing ORDER BY chunk_id LIMIT :shown) first
               ) AS ids
        FROM missing m
    """
    parameters = {
        "id": collection.id,
        "space": space.id,
        "available": ChunkBatchState.AVAILABLE,
        "running": ChunkBatchState.RUNNING,
        "shown": SHOWN_MISSING,
    }
    missing = conn.execute(sa.text(explain_missing), parameters).one()
    return Audit(
        collection=collection.name,
        space=space.spec.fingerprint,
        model=space.spec.model,
        chunks=counts.chunks,
        contents=counts.contents,
        embedded=counts.embedded,
        missing=counts.chunks - counts.embedded,
        pending=missing.pending,
        dead=missing.dead,
        truncated=counts.truncated,
        missing_ids=tuple(missing.ids or ()),
    )
