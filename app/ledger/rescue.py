"""What the poller asks of the ledger: leases that ran out, doorbells to ring, jobs that may end."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from app.broker import Doorbell


@dataclass(frozen=True, slots=True)
class Rescued:
    """ChunkBatches taken back from silent workers: ``available`` again, or ``discarded`` after the last attempt."""

    available: int
    discarded: int


def take_back_expired(conn: sa.Connection, *, limit: int = 500) -> Rescued:
    """Take back leases that ran out. SKIP LOCKED lets any number of pollers share the work."""
    states = conn.execute(
        sa.text(
            "WITH expired AS (SELECT id FROM chunk_batches WHERE state = 'running' AND lease_until < now() "
            "                 ORDER BY lease_until LIMIT :limit FOR UPDATE SKIP LOCKED) "
            "UPDATE chunk_batches b SET "
            "state = CASE WHEN attempt < max_attempts THEN 'available' ELSE 'discarded' END, "
            "finished_at = CASE WHEN attempt < max_attempts THEN NULL ELSE now() END, "
            "error_code = 'lease_expired', error = 'worker ' || lease_owner || ' was silent past its lease', "
            "lease_owner = NULL, lease_until = NULL, rung_at = NULL "
            "FROM expired WHERE b.id = expired.id RETURNING b.state"
        ),
        {"limit": limit},
    ).scalars()
    found = list(states)
    discarded = found.count("discarded")
    return Rescued(available=len(found) - discarded, discarded=discarded)


@dataclass(frozen=True, slots=True)
class RungCounts:
    """Available ChunkBatches whose doorbell was rung; ``stale`` of them longer ago than the repair age."""

    rung: int
    stale: int


def count_rung(conn: sa.Connection, *, repair_seconds: float) -> RungCounts:
    row = conn.execute(
        sa.text(
            "SELECT count(*) AS rung, "
            "count(*) FILTER (WHERE rung_at < now() - make_interval(secs => :age)) AS stale "
            "FROM chunk_batches WHERE state = 'available' AND rung_at IS NOT NULL"
        ),
        {"age": repair_seconds},
    ).one()
    return RungCounts(row.rung, row.stale)


def take_due(conn: sa.Connection, *, limit: int) -> list[Doorbell]:
    """Mark up to ``limit`` due ChunkBatches as rung, the most urgent first. Ring, then commit.

    A crash between the two leaves a bell without its mark, and it is rung twice: the claim answers that.
    """
    return _take(conn, "rung_at IS NULL AND not_before <= now()", "priority, id", limit, age=0)


def take_lost(conn: sa.Connection, *, limit: int, repair_seconds: float) -> list[Doorbell]:
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
            f"WITH due AS (SELECT id FROM chunk_batches WHERE state = 'available' AND {condition} "  # noqa: S608
            f"             ORDER BY {order} LIMIT :limit FOR UPDATE SKIP LOCKED) "
            "UPDATE chunk_batches b SET rung_at = now() FROM due WHERE b.id = due.id "
            "RETURNING b.id, b.priority"
        ),
        {"limit": limit, "age": age},
    )
    return sorted((Doorbell(row.id, row.priority) for row in rows), key=lambda bell: (bell.priority, bell.chunk_batch_id))


def jobs_without_open_batches(conn: sa.Connection, *, limit: int = 100) -> list[tuple[int, int]]:
    """``(job id, space id)`` of sealed jobs that may end: the worker that closed their last ChunkBatch died."""
    rows = conn.execute(
        sa.text(
            "SELECT j.id, j.space_id FROM jobs j WHERE j.state = 'running' AND NOT EXISTS (SELECT FROM chunk_batches b "
            "WHERE b.job_id = j.id AND b.state IN ('available', 'running')) ORDER BY j.id LIMIT :limit"
        ),
        {"limit": limit},
    )
    return [(row.id, row.space_id) for row in rows]


def fail_abandoned(conn: sa.Connection, *, older_than_seconds: float) -> list[int]:
    """Jobs whose producer died before its iterable ended become ``failed``; what they committed is embedded.

    A live producer holds the job's advisory lock on its connection; the lock of a dead one can be taken.
    """
    rows = conn.execute(
        sa.text(
            "WITH dead AS (SELECT id FROM jobs WHERE state = 'enqueueing' "
            "    AND created_at < now() - make_interval(secs => :age) "
            "    AND pg_try_advisory_xact_lock(:space, (id % 2147483648)::int) FOR UPDATE SKIP LOCKED) "
            "UPDATE jobs j SET state = 'failed', finished_at = now(), error = 'the producer stopped after ' || "
            "n_chunks || ' chunks. Enqueue again with the same idempotency_key to continue in this job; "
            "without one, enqueue again: what is embedded is not embedded twice.' "
            "FROM dead WHERE j.id = dead.id RETURNING j.id"
        ),
        {"age": older_than_seconds, "space": 0x63686D02},
    )
    return list(rows.scalars())


def drop_old_requests(conn: sa.Connection, *, older_than_seconds: float = 600) -> None:
    """Forget embed requests that nobody fetched: their client gave up or died."""
    conn.execute(
        sa.text("DELETE FROM embed_requests WHERE created_at < now() - make_interval(secs => :age)"),
        {"age": older_than_seconds},
    )
