"""Which doorbells to ring: the work lies in Postgres, Redis only holds a window of reminders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from chunkmill.broker import LOCAL_BELLS, Bells, Broker, Doorbell
from chunkmill.domain.doorbells import plan_doorbells, share_out
from chunkmill.domain.states import Priority, Route


@dataclass(frozen=True, slots=True)
class _Queue:
    """The doorbells of one route and priority."""

    route: Route
    priority: int

    @property
    def facts(self) -> dict[str, object]:
        return {"route": self.route, "priority": self.priority}


@dataclass(slots=True)
class _Rung:
    """Available ChunkBatches of one priority whose bell was rung: how many of each job, how many long ago."""

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
    """Ring for what is due on one route, and again for what Redis lost; returns how many.

    ``queued`` is what :meth:`Broker.queued_doorbells` has just said. Each priority has its window, less the bells
    that are served before its own: low priority cannot keep high priority waiting, and Redis holds three windows at
    most. Jobs of one priority take turns. The marks are committed after the bells: a crash in between rings twice,
    which the claim answers, rather than never. Raises one of ``chunkmill.broker.PUBLISH_ERRORS`` while Redis is away;
    roll back then.
    """
    queued = dict(queued)
    # A new job is past what the statistics know: a row or two, says the planner, and sorts two million for each probe.
    # Without a sort only ix_chunk_batches_unrung_by_route has the order asked for.
    conn.execute(
        sa.text("SELECT set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)")
    )
    counts = _count_rung(conn, bells.route, repair_seconds=repair_seconds)
    due: list[Doorbell] = []
    for rank in sorted(priority.rank for priority in Priority):
        ahead = sum(n for step, n in queued.items() if step <= rank)
        rung = counts.get(rank, _Rung())
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


def _count_rung(conn: sa.Connection, route: Route, *, repair_seconds: float) -> dict[int, _Rung]:
    """By priority. They are few: as many as the windows hold."""
    rows = conn.execute(
        sa.text(
            "SELECT priority, job_id, count(*), "
            "       count(*) FILTER (WHERE rung_at < now() - make_interval(secs => :age)) "
            "FROM chunk_batches WHERE state = 'available' AND rung_at IS NOT NULL AND route = :route "
            "GROUP BY priority, job_id"
        ),
        {"age": repair_seconds, "route": route},
    )
    counts: dict[int, _Rung] = {}
    for priority, job_id, rung, stale in rows:
        count = counts.setdefault(priority, _Rung())
        count.by_job[job_id] += rung
        count.stale += stale
    return counts


def _take_lost(conn: sa.Connection, queue: _Queue, *, limit: int, repair_seconds: float) -> list[Doorbell]:
    """Mark again ChunkBatches whose doorbell was rung long ago, the oldest first."""
    if limit <= 0:
        return []
    rows = conn.execute(
        sa.text(
            "WITH lost AS (SELECT id FROM chunk_batches WHERE state = 'available' AND route = :route "
            "              AND priority = :priority AND rung_at < now() - make_interval(secs => :age) "
            "              AND not_before <= now() ORDER BY rung_at LIMIT :limit FOR UPDATE SKIP LOCKED) "
            f"UPDATE chunk_batches b SET rung_at = now() FROM lost WHERE b.id = lost.id RETURNING {_BELL}"
        ),
        {**queue.facts, "limit": limit, "age": repair_seconds},
    )
    return [bell for _, bell in _bells(queue, rows)]


def _take_due(conn: sa.Connection, queue: _Queue, rung: Mapping[int, int], *, limit: int) -> list[Doorbell]:
    """Mark due ChunkBatches as rung and return their bells in the order to ring: in turns over their jobs.

    ``rung`` are the bells of each job that nobody has answered yet.
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
        # A job at its end had less than its share, and the others get the rest.
    return [bell for _, _, bell in sorted(turns, key=lambda turn: turn[:2])]


def _jobs_due(conn: sa.Connection, queue: _Queue, bells: Mapping[int, int], *, limit: int) -> list[int]:
    """At most ``limit`` jobs with something due, those with the fewest bells first, and equals by lot.

    Not the oldest of equals: with more jobs than bells the youngest would wait for all others.
    """
    rows = conn.execute(
        sa.text(
            # One probe of the index for each job, and never a look at its other ChunkBatches. DISTINCT reads all.
            # With _mark, on two cores that five other processes wanted: one job with 2,000,000 due 8 ms for 8 bells
            # and 12 ms for 256; 5,000 jobs 260 ms, nearly all of it here; 200,000 in back-off before the rest 115 ms.
            "WITH RECURSIVE due (job_id) AS ("
            f"  (SELECT job_id FROM chunk_batches WHERE {_DUE} ORDER BY job_id, id LIMIT 1) "
            "  UNION ALL "
            f"  SELECT (SELECT b.job_id FROM chunk_batches b WHERE {_DUE} AND b.job_id > due.job_id "
            "           ORDER BY b.job_id, b.id LIMIT 1) FROM due WHERE due.job_id IS NOT NULL) "
            "SELECT job_id FROM due "
            "LEFT JOIN unnest(CAST(:jobs AS bigint[]), CAST(:bells AS int[])) AS w(job_id, bells) USING (job_id) "
            "WHERE job_id IS NOT NULL ORDER BY coalesce(bells, 0), random() LIMIT :limit"
        ),
        {**queue.facts, "jobs": list(bells), "bells": list(bells.values()), "limit": limit},
    )
    return list(rows.scalars())


def _mark(conn: sa.Connection, queue: _Queue, shares: Mapping[int, int]) -> list[tuple[int, Doorbell]]:
    """Mark as many ChunkBatches of each job as its share says: ``(job id, bell)``, the oldest of each job first."""
    if not shares:
        return []
    rows = conn.execute(
        sa.text(
            "WITH due AS (SELECT b.id FROM unnest(CAST(:jobs AS bigint[]), CAST(:shares AS int[])) AS s(job_id, share) "
            "  CROSS JOIN LATERAL ("
            # Not "=", which would let the planner walk the primary key through all that is completed.
            f"   SELECT id FROM chunk_batches WHERE {_DUE} AND job_id BETWEEN s.job_id AND s.job_id "
            "    ORDER BY job_id, id LIMIT s.share FOR UPDATE SKIP LOCKED) b) "
            # As an array: the planner takes the shares for millions of rows, and a join with those reads the table.
            "UPDATE chunk_batches b SET rung_at = now() WHERE b.id = ANY(ARRAY(SELECT id FROM due)) "
            f"RETURNING {_BELL}"
        ),
        {**queue.facts, "jobs": list(shares), "shares": list(shares.values())},
    )
    return _bells(queue, rows)


def _bells(queue: _Queue, rows: Iterable[sa.Row[Any]]) -> list[tuple[int, Doorbell]]:
    bells = []
    for row in sorted(rows, key=lambda row: row.id):
        shown = {"job": row.job_id, "collection": row.collection, "contents": row.n_contents}
        bells.append((row.job_id, Doorbell(row.id, queue.priority, shown)))
    return bells


_BELL = (
    # The name by two probes of primary keys a row. A join would let the planner choose, who thinks these rows millions.
    "b.id, b.job_id, b.n_contents, (SELECT c.name FROM jobs j JOIN collections c ON c.id = j.collection_id "
    "WHERE j.id = b.job_id) AS collection"
)


_DUE = "state = 'available' AND rung_at IS NULL AND route = :route AND priority = :priority AND not_before <= now()"
"""``ix_chunk_batches_unrung_by_route`` (route, priority, job_id, id, not_before) answers it alone. In the order of
``id``, so that what a dead worker held goes before what nobody began; ``not_before`` is last, to pass over what waits
for its next attempt without a look at the table."""
