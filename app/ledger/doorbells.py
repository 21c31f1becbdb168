"""Which doorbells to ring: the work lies in Postgres, Redis only holds a window of reminders."""

from __future__ import annotations

import sqlalchemy as sa

from app.broker import Broker, Doorbell
from app.domain.doorbells import plan_doorbells
from app.domain.states import Priority


def ring_due(conn: sa.Connection, broker: Broker, *, window: int, repair_seconds: float) -> int:
    """Ring for what is due, and again for what Redis lost; returns how many.

    Each priority has its window, less the bells that are served before its own: low priority cannot keep
    high priority waiting, and Redis holds three windows at most. The marks are committed after the bells:
    a crash in between rings twice, which the claim answers, rather than never. Raises one of
    ``app.broker.PUBLISH_ERRORS`` while Redis is away; roll back then.
    """
    queued = broker.queued_doorbells()
    counts = _count_rung(conn, repair_seconds=repair_seconds)
    bells: list[Doorbell] = []
    for rank in sorted(priority.rank for priority in Priority):
        ahead = sum(n for step, n in queued.items() if step <= rank)
        rung, stale = counts.get(rank, (0, 0))
        plan = plan_doorbells(room=window - ahead, queued=queued[rank], rung=rung, stale=stale)
        taken = _take_lost(conn, rank, limit=plan.again, repair_seconds=repair_seconds)
        taken += _take_due(conn, rank, limit=plan.fresh)
        queued[rank] += len(taken)
        bells += taken
    if bells:
        broker.ring(bells)
    return len(bells)


def _count_rung(conn: sa.Connection, *, repair_seconds: float) -> dict[int, tuple[int, int]]:
    """By priority: available ChunkBatches whose doorbell was rung, and how many of them longer ago than the age."""
    rows = conn.execute(
        sa.text(
            "SELECT priority, count(*), count(*) FILTER (WHERE rung_at < now() - make_interval(secs => :age)) "
            "FROM chunk_batches WHERE state = 'available' AND rung_at IS NOT NULL GROUP BY priority"
        ),
        {"age": repair_seconds},
    )
    return {priority: (rung, stale) for priority, rung, stale in rows}


def _take_due(conn: sa.Connection, priority: int, *, limit: int) -> list[Doorbell]:
    """Mark due ChunkBatches as rung, in order."""
    return _take(conn, priority, "rung_at IS NULL", "id", limit, age=0)


def _take_lost(conn: sa.Connection, priority: int, *, limit: int, repair_seconds: float) -> list[Doorbell]:
    """Mark again ChunkBatches whose doorbell was rung long ago, the oldest first."""
    condition = "rung_at < now() - make_interval(secs => :age)"
    return _take(conn, priority, condition, "rung_at", limit, age=repair_seconds)


def _take(conn: sa.Connection, priority: int, condition: str, order: str, limit: int, *, age: float) -> list[Doorbell]:
    if limit <= 0:
        return []
    ids = conn.execute(
        sa.text(
            "WITH due AS (SELECT id FROM chunk_batches WHERE state = 'available' AND priority = :priority "
            f"             AND {condition} AND not_before <= now() ORDER BY {order} LIMIT :limit "
            "             FOR UPDATE SKIP LOCKED) "
            "UPDATE chunk_batches b SET rung_at = now() FROM due WHERE b.id = due.id RETURNING b.id"
        ),
        {"priority": priority, "limit": limit, "age": age},
    ).scalars()
    return [Doorbell(chunk_batch_id, priority) for chunk_batch_id in sorted(ids)]
