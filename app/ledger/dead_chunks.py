"""The dead list: chunks of a job that got no vector, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from app.db.schema import DeadChunkRow
from app.domain.planning import DeadChunk
from app.ledger.chunk_batches import Lease


@dataclass(frozen=True, slots=True)
class DeadContent:
    """A content that the engine could not embed, or that the policy refuses."""

    content_hash: bytes
    code: str
    reason: str


def add_refused(conn: sa.Connection, job_id: int, dead: Sequence[DeadChunk]) -> None:
    """Chunks refused at the door, which were never stored."""
    if dead:
        conn.execute(
            sa.insert(DeadChunkRow),
            [{"job_id": job_id, "chunk_id": d.chunk_id, "code": d.code, "reason": d.reason} for d in dead],
        )


def add_contents(conn: sa.Connection, lease: Lease, dead: Sequence[DeadContent]) -> None:
    """Name the chunks of every dead content, in the transaction that completes its ChunkBatch.

    A chunk that is too long under the ``reject`` policy leaves the collection again, as if it had been
    refused at the door. Any other keeps its place, shows as missing in the audit and fails the job.
    """
    if not dead:
        return
    facts = {
        "job": lease.job_id,
        "collection": lease.collection_id,
        "hashes": [d.content_hash for d in dead],
        "codes": [d.code for d in dead],
        "reasons": [d.reason for d in dead],
    }
    conn.execute(
        sa.text(
            "INSERT INTO dead_chunks (job_id, chunk_id, content_hash, code, reason) "
            "SELECT :job, c.chunk_id, c.content_hash, d.code, d.reason "
            "FROM unnest(CAST(:hashes AS bytea[]), CAST(:codes AS text[]), CAST(:reasons AS text[])) "
            "     AS d(content_hash, code, reason) "
            "JOIN chunks c ON c.content_hash = d.content_hash AND c.collection_id = :collection "
            "ON CONFLICT DO NOTHING"
        ),
        facts,
    )
    conn.execute(
        sa.text(
            "DELETE FROM chunks c USING unnest(CAST(:hashes AS bytea[]), CAST(:codes AS text[])) "
            "AS d(content_hash, code) WHERE d.code = 'too_long' AND c.content_hash = d.content_hash "
            "AND c.collection_id = :collection AND c.job_id = :job"
        ),
        facts,
    )
