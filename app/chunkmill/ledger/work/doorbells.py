"""Which doorbells to ring. The work is in Postgres; Redis holds only as many doorbells as its doorbell windows
allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from chunkmill.broker import LOCAL_BELLS, Bells, Broker, Doorbell
from chunkmill.db.statements import with_constants
from chunkmill.domain.doorbells import plan_doorbells, share_out
from chunkmill.domain.states import ChunkBatchState, Priority, Route


@dataclass(frozen=True, slots=True)
class _Queue:
    """The doorbells of one route and priority."""

    route: Route
    priority: int

    @property
    def parameters(self) -> dict[str, object]:
        return {"route": self.route, "priority": self.priority}


@dataclass(slots=True)
class _RungBells:
    """Available ChunkBatches of one priority whose bell was rung: how many of each job, and how many long ago."""

    by_job: Counter[int] = field(default_factory=Counter)
    stale: int = 0


def ring_due(
    conn: sa.Connection,
    broker: Broker,
    *,
    queued: Mapping[int, int],
    window: int,
    repair_seconds: float,
    bells: Bells = LOCAL_BELLS,
) -> int:
    """Ring for what is due on one route, and again for bells that Redis has lost; returns the number of bells.

    ``queued`` is what :meth:`Broker.queued_doorbells` has just returned. Each priority has its doorbell window, less
    the bells of higher priorities, which are served first. So low priority cannot keep high priority waiting, and Redis
    holds at most three windows. Jobs of one priority take turns.

    The marks are committed after the bells are in Redis, so a crash in between rings twice, which the claim tolerates,
    instead of never. Raises one of ``chunkmill.broker.publish_errors`` while Redis is away; roll back then.
    """
    queued = dict(queued)
    # Postgres' statistics do not know a new job yet, so the planner expects a row or two and sorts two million rows for
    # each probe. If sorting is off, it has to use ix_chunk_batches_unrung_by_route, the only index in this order.
    conn.execute(
        sa.text("SELECT set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)")
    )
    counts = _count_rung(conn, bells.route, repair_seconds=repair_seconds)
    due: list[Doorbell] = []
    for rank in sorted(priority.rank for priority in Priority):
        ahead = sum(n for step, n in queued.items() if step <= rank)
        rung = counts.get(rank, _RungBells())
        room = window - ahead
        plan = plan_doorbells(room=room, queued=queued[rank], rung=rung.by_job.total(), stale=rung.stale)
        fresh = _take_due(conn, _Queue(bells.route, rank), rung.by_job, limit=plan.fresh)
        again = _take_lost(
            conn, _Queue(bells.route, rank), limit=min(plan.again, room - len(fresh)), repair_seconds=repair_seconds
        )
        queued[rank] += len(again) + len(fresh)
        due += again + fresh
    if due:
        broker.ring(due, bells)
    return len(due)


_COUNT_RUNG = with_constants(
    """
SELECT priority, job_id, count(*),
       count(*) FILTER (WHERE rung_at < now() - make_interval(secs => :age))
FROM chunk_batches
WHERE state = :available AND rung_at IS NOT NULL AND route = :route
GROUP BY priority, job_id
""",
    available=ChunkBatchState.AVAILABLE,
)


def _count_rung(conn: sa.Connection, route: Route, *, repair_seconds: float) -> dict[int, _RungBells]:
    """The rung ChunkBatches of a route, by priority. They are no more than the doorbell windows hold."""
    rows = conn.execute(_COUNT_RUNG, {"age": repair_seconds, "route": route})
    counts: dict[int, _RungBells] = {}
    for priority, job_id, rung, stale in rows:
        count = counts.setdefault(priority, _RungBells())
        count.by_job[job_id] += rung
        count.stale += stale
    return counts


_MARK_LOST = with_constants(
    """
WITH lost AS (
    SELECT id
    FROM chunk_batches
    WHERE state = :available AND route = :route AND priority = :priority
      AND rung_at < now() - make_interval(secs => :age) AND not_before <= now()
    ORDER BY rung_at
    LIMIT :limit
    FOR UPDATE SKIP LOCKED)
UPDATE chunk_batches b
SET rung_at = now()
FROM lost
WHERE b.id = lost.id
RETURNING b.id, b.job_id, b.n_contents, (
    SELECT c.name FROM jobs j JOIN collections c ON c.id = j.collection_id WHERE j.id = b.job_id) AS collection
""",
    available=ChunkBatchState.AVAILABLE,
)


def _take_lost(conn: sa.Connection, queue: _Queue, *, limit: int, repair_seconds: float) -> list[Doorbell]:
    """Mark ChunkBatches whose doorbell was rung long ago as rung now, the oldest first; returns their bells."""
    if limit <= 0:
        return []
    rows = conn.execute(_MARK_LOST, {**queue.parameters, "limit": limit, "age": repair_seconds})
    return [bell for _, bell in _bells(queue, rows)]


def _take_due(conn: sa.Connection, queue: _Queue, rung: Mapping[int, int], *, limit: int) -> list[Doorbell]:
    """Mark due ChunkBatches as rung and return their bells in the order to ring: in turns over their jobs.

    ``rung`` is the number of bells of each job that nobody has answered yet.
    """
    bells = Counter(rung)
    turns: list[tuple[int, int, Doorbell]] = []
    while len(turns) < limit:
        room = limit - len(turns)
        jobs = _jobs_due(conn, queue, bells, limit=room)
        taken = _mark(conn, queue, share_out({job: bells[job] for job in jobs}, room))
        if not taken:
            break
        for job_id, bell in taken:
            bells[job_id] += 1
            turns.append((bells[job_id], bell.chunk_batch_id, bell))
        # A job near its end had fewer due than its share. The other jobs get the rest in the next round of this loop.
    return [bell for _, _, bell in sorted(turns, key=lambda turn: turn[:2])]


# One probe of the index for each job, and never a look at its other ChunkBatches. DISTINCT would read all of them.
# Together with _MARK, on two cores that five other processes wanted: one job with 2,000,000 due takes 8 ms for 8 bells
# and 12 ms for 256; 5,000 jobs take 260 ms, nearly all of it here; 200,000 in back-off before the rest take 115 ms.
#
# Here and in _MARK the index ix_chunk_batches_unrung_by_route (route, priority, job_id, id, not_before) is all that is
# read. It is in the order of id, so that what a dead worker held goes before what nobody has begun; not_before is its
# last column, so that what waits for its next attempt is passed over without a look at the table.
_JOBS_DUE = with_constants(
    """
WITH RECURSIVE due (job_id) AS (
    (SELECT b.job_id
     FROM chunk_batches b
     WHERE b.state = :available AND b.rung_at IS NULL
       AND b.route = :route AND b.priority = :priority AND b.not_before <= now()
     ORDER BY b.job_id, b.id
     LIMIT 1)
    UNION ALL
    SELECT (SELECT b.job_id
            FROM chunk_batches b
            WHERE b.state = :available AND b.rung_at IS NULL
              AND b.route = :route AND b.priority = :priority AND b.not_before <= now()
              AND b.job_id > due.job_id
            ORDER BY b.job_id, b.id
            LIMIT 1)
    FROM due
    WHERE due.job_id IS NOT NULL)
SELECT job_id
FROM due
LEFT JOIN unnest(CAST(:jobs AS bigint[]), CAST(:bells AS int[])) AS w(job_id, bells) USING (job_id)
WHERE job_id IS NOT NULL
ORDER BY coalesce(bells, 0), random()
LIMIT :limit
""",
    available=ChunkBatchState.AVAILABLE,
)


def _jobs_due(conn: sa.Connection, queue: _Queue, bells: Mapping[int, int], *, limit: int) -> list[int]:
    """At most ``limit`` jobs with something due: those with the fewest bells first, and equal ones in random order.

    Equal ones are not in the order of their age: with more jobs than bells the youngest would wait for all others.
    """
    rows = conn.execute(
        _JOBS_DUE, {**queue.parameters, "jobs": list(bells), "bells": list(bells.values()), "limit": limit}
    )
    return list(rows.scalars())


# job_id is compared by BETWEEN, because "=" would let the planner walk the primary key through all that is completed.
# The ids are passed as an array, because the planner takes the shares for millions of rows and would read the whole
# table for a join with them. For the same reason the collection's name comes from two probes of primary keys a row.
_MARK = with_constants(
    """
WITH due AS (
    SELECT b.id
    FROM unnest(CAST(:jobs AS bigint[]), CAST(:shares AS int[])) AS s(job_id, share)
    CROSS JOIN LATERAL (
        SELECT id
        FROM chunk_batches
        WHERE state = :available AND rung_at IS NULL
          AND route = :route AND priority = :priority AND not_before <= now()
          AND job_id BETWEEN s.job_id AND s.job_id
        ORDER BY job_id, id
        LIMIT s.share
        FOR UPDATE SKIP LOCKED) b)
UPDATE chunk_batches b
SET rung_at = now()
WHERE b.id = ANY(ARRAY(SELECT id FROM due))
RETURNING b.id, b.job_id, b.n_contents, (
    SELECT c.name FROM jobs j JOIN collections c ON c.id = j.collection_id WHERE j.id = b.job_id) AS collection
""",
    available=ChunkBatchState.AVAILABLE,
)


def _mark(conn: sa.Connection, queue: _Queue, shares: Mapping[int, int]) -> list[tuple[int, Doorbell]]:
    """Mark as many ChunkBatches of each job as its share says, the oldest first; returns ``(job id, bell)``."""
    if not shares:
        return []
    rows = conn.execute(_MARK, {**queue.parameters, "jobs": list(shares), "shares": list(shares.values())})
    return _bells(queue, rows)


def _bells(queue: _Queue, rows: Iterable[sa.Row[Any]]) -> list[tuple[int, Doorbell]]:
    bells = []
    for row in sorted(rows, key=lambda row: row.id):
        label = {"job": row.job_id, "collection": row.collection, "contents": row.n_contents}
        bells.append((row.job_id, Doorbell(row.id, queue.priority, label)))
    return bells
