"""What attempts cost."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from app.db.schema import UsageRow
from app.ledger.chunk_batches import Lease


@dataclass(frozen=True, slots=True)
class Usage:
    """``contents`` and ``tokens`` that one attempt embedded, and the engine's seconds for them."""

    provider: str
    worker: str
    contents: int
    tokens: int
    engine_seconds: float


def book(conn: sa.Connection, lease: Lease, usage: Usage) -> None:
    """Book one attempt, in the transaction that ends it. The key (ChunkBatch, attempt) books it once."""
    conn.execute(
        sa.insert(UsageRow).values(
            chunk_batch_id=lease.chunk_batch_id,
            attempt=lease.attempt,
            job_id=lease.job_id,
            space_id=lease.space_id,
            provider=usage.provider,
            worker=usage.worker,
            contents=usage.contents,
            tokens=usage.tokens,
            engine_seconds=usage.engine_seconds,
        )
    )
