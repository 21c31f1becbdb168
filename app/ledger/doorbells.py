"""Which doorbells to ring: the work lies in Postgres, Redis only holds a window of reminders."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from app.broker import Broker, Doorbell
from app.domain.doorbells import plan_doorbells


def ring_due(conn: sa.Connection, broker: Broker, *, window: int, repair_seconds: float) -> int:
    """Ring for what is due, and again for what Redis lost, up to ``window`` doorbells; returns how many.

    The marks are committed after the bells: a crash in between rings twice, which the claim answers,
    rather than never. Raises one of ``app.broker.PUBLISH_ERRORS`` while Redis is away; roll back then.
    """
    counts = _count_rung(conn, repair_seconds=repair_seconds)
    plan = plan_doorbells(window=window, queued=broker.queued_doorbells(), rung=counts.rung, stale=counts.stale)
    bells = _take_lost(conn, limit=plan.again, repair_seconds=repair_seconds)
    bells += _take_due(conn, limit=plan.fresh)
    if bells:
        broker.ring(bells)
    return len(bells)


@dataclass(frozen=True, slots=True)
class RungCounts:
    """Available ChunkBatches whose doorbell was rung; ``stale`` of them longer ago than the repair age."""

    rung: int
    stale: int


def _count_rung(conn: sa.Connection, *, repair_seconds: float) -> RungCounts:
    row = conn.execute(
        sa.text(
            "SELECT count(*) AS rung, "
            "count(*) FILTER (WHERE rung_at < now() - make_interval(secs => :age)) AS stale "
            "FROM chunk_batches WHERE state = 'available' AND rung_at IS NOT NULL"
        ),
        {"age": repair_seconds},
    ).one()
    return RungCounts(row.rung, row.stale)


def _take_due(conn: sa.Connection, *, limit: int) -> list[Doorbell]:
    """Mark up to ``limit`` due ChunkBatches as rung, the most urgent first. Ring, then commit.

    A crash between the two leaves a bell without its mark, and it is rung twice: the claim answers that.
    """
    return _take(conn, "rung_at IS NULL AND not_before <= now()", "priority, id", limit, age=0)


def _take_lost(conn: sa.Connection, *, limit: int, repair_seconds: float) -> list[Doorbell]:
    """Mark again up to ``limit`` ChunkBatches whose doorbell was rung long ago, the oldest first."""
    return _take(
        conn,
        "rung_at < now() - make_interval(secs => :age) AND not_before <= now()",
        "priority, rung_at",
        limit,
        age=repair_seconds,
    )


def _take(conn: sa.Connection, condition: str, order: str, limit: int, *, age: float) -> list[Doorbell]:
    if limit <= 0:
        return []
    rows = conn.execute(
        sa.text(
            f"WITH due AS (SELECT id FROM chunk_batches WHERE state = 'available' AND {condition} "
            f"             ORDER BY {order} LIMIT :limit FOR UPDATE SKIP LOCKED) "
            "UPDATE chunk_batches b SET rung_at = now() FROM due WHERE b.id = due.id "
            "RETURNING b.id, b.priority"
        ),
        {"limit": limit, "age": age},
    )
    return sorted(
        (Doorbell(row.id, row.priority) for row in rows),
        key=lambda bell: (bell.priority, bell.chunk_batch_id),
    )
