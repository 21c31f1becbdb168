"""What an operator looks at, read from Postgres: `status --watch` and the poller's metrics ask the same.

In two parts. ``now`` costs a few milliseconds whatever the ledger's size: small tables, and the ends of indexes.
``tally`` counts, so it grows with the jobs that are open: 1.5 s with 2,000,000 ChunkBatches in them. Whoever asks again
and again leaves ``TALLY_SHARE`` times its cost between two of them (``chunkmill.monitor.watcher``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.lanes import PAID_ROUTES, Lane
from chunkmill.domain.states import ChunkBatchState, JobState, Route
from chunkmill.ledger.money import budget, charges
from chunkmill.ledger.provider import provider_lanes
from chunkmill.monitor import reports
from chunkmill.monitor.reports import Report
from chunkmill.settings import Settings

LANES = (Route.LOCAL, *PAID_ROUTES)
RECENT_SECONDS = 600
"""What counts as a recent fault."""
SHOWN_FAULTS = 8
JOBS_SECONDS = 24 * 3600
"""Jobs that ended within so long count for the cache's hit rate."""


@dataclass(frozen=True, slots=True)
class Money:
    """US dollars, by UTC. ``limit`` None: there is none."""

    today: Decimal
    month: Decimal
    committed: Decimal
    limit: Decimal | None


@dataclass(frozen=True, slots=True)
class Fault:
    """``what`` is ``died`` or ``failed`` of an attempt, ``discarded`` of a ChunkBatch, ``stopped`` of a lane."""

    at: datetime
    what: str
    line: str


@dataclass(frozen=True, slots=True)
class Now:
    """``running`` ChunkBatches by lane; ``oldest`` says how long ago the oldest waiting one became due."""

    at: datetime
    running: Mapping[Route, int]
    oldest: Mapping[Route, float]
    lanes: Sequence[Lane]
    workers: Sequence[Report]
    pollers: int
    """Connections."""
    money: Money
    recent: Mapping[str, int]
    """Faults within ``RECENT_SECONDS``, by kind."""
    faults: Sequence[Fault]
    """The latest, the newest first."""


@dataclass(frozen=True, slots=True)
class OpenJob:
    id: int
    collection: str
    model: str
    state: JobState
    chunks: int
    contents: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Tally:
    """``chunks`` of the jobs that are open or ended within a day, and ``asked``: the contents that were to be embedded
    for them."""

    ready: Mapping[Route, int]
    discarded: Mapping[Route, int]
    jobs: Mapping[JobState, int]
    open_jobs: Sequence[OpenJob]
    dead_chunks: int
    chunks: int
    asked: int
    remaining: int = field(default=0)

    @property
    def cache_hits(self) -> float | None:
        """The share of chunks that needed no embedding: their text was known, or was in the job before."""
        return max(0.0, 1 - self.asked / self.chunks) if self.chunks else None


def now(conn: sa.Connection, settings: Settings) -> Now:
    at, pollers = conn.execute(
        sa.text(
            "SELECT now(), (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'chunkmill-poller')"
        )
    ).one()
    running = conn.execute(
        sa.text("SELECT route, count(*) AS n FROM chunk_batches WHERE state = 'running' GROUP BY route")
    )
    lanes = provider_lanes.lanes(conn)
    has_reports = reports.is_there(conn)  # and so the indexes by which faults are found
    recent, faults = _faults(conn) if has_reports else ({}, [])
    return Now(
        at=at,
        running=_by_lane(running),
        oldest=_oldest(conn),
        lanes=lanes,
        workers=reports.read(conn) if has_reports else (),
        pollers=pollers,
        money=_money(conn, settings),
        recent=recent,
        faults=_newest([*faults, *_stops(lanes)]),
    )


def latest_faults(conn: sa.Connection) -> Sequence[Fault]:
    """As in ``now``, alone; none on a schema without their indexes."""
    if not reports.is_there(conn):
        return ()
    return _newest([*_faults(conn)[1], *_stops(provider_lanes.lanes(conn))])


def tally(conn: sa.Connection) -> Tally:
    # One process of the server: who paces himself by the time it took must know what it cost.
    conn.execute(sa.text("SELECT set_config('max_parallel_workers_per_gather', '0', true)"))
    ready = conn.execute(
        sa.text("SELECT route, count(*) AS n FROM chunk_batches WHERE state = 'available' GROUP BY route")
    )
    discarded = conn.execute(
        sa.text("SELECT route, count(*) AS n FROM chunk_batches WHERE state = 'discarded' GROUP BY route")
    )
    jobs = conn.execute(sa.text("SELECT state, count(*) AS n FROM jobs GROUP BY state"))
    rows = conn.execute(sa.text(_JOBS), {"seconds": JOBS_SECONDS}).all()
    open_jobs = [
        OpenJob(row.id, row.collection, row.model, JobState(row.state), row.n_chunks, row.contents, row.remaining)
        for row in rows
        if not JobState(row.state).is_final
    ]
    return Tally(
        ready=_by_lane(ready),
        discarded=_by_lane(discarded),
        jobs={JobState(row.state): row.n for row in jobs},
        open_jobs=open_jobs,
        dead_chunks=conn.execute(sa.text("SELECT count(*) FROM dead_chunks")).scalar_one(),
        chunks=sum(row.n_chunks for row in rows),
        asked=sum(row.asked for row in rows),
        remaining=sum(job.remaining for job in open_jobs),
    )


# One pass over the ChunkBatches of these jobs; a subquery for each job would read a large one's several times.
_JOBS = """
WITH shown AS (
    SELECT j.id, j.state, j.n_chunks, c.name AS collection, s.model
    FROM jobs j JOIN collections c ON c.id = j.collection_id JOIN spaces s ON s.id = j.space_id
    WHERE j.state IN ('enqueueing', 'running') OR j.finished_at > now() - make_interval(secs => :seconds)),
sums AS (
    SELECT job_id, sum(n_contents)::bigint AS contents, sum(n_contents - n_cached)::bigint AS asked,
           coalesce(sum(n_contents - n_cached - n_embedded) FILTER (WHERE state IN ('available', 'running')), 0)::bigint
               AS remaining
    FROM chunk_batches WHERE job_id = ANY (ARRAY(SELECT id FROM shown)) GROUP BY job_id)
SELECT shown.*, coalesce(contents, 0) AS contents, coalesce(asked, 0) AS asked, coalesce(remaining, 0) AS remaining
FROM shown LEFT JOIN sums ON sums.job_id = shown.id ORDER BY shown.id
"""

# The first of each index is the oldest: job ids grow, and so do those of ChunkBatches. What waits out a pause after a
# failure is passed over, as it is not due.
_OLDEST = """
SELECT p.route, extract(epoch FROM now() - min(first.not_before)) AS seconds
FROM unnest(CAST(:routes AS text[])) AS p(route) CROSS JOIN unnest(CAST(:ranks AS int[])) AS r(rank)
CROSS JOIN LATERAL (
    (SELECT not_before FROM chunk_batches WHERE state = 'available' AND rung_at IS NULL AND route = p.route
     AND priority = r.rank AND not_before <= now() ORDER BY job_id, id LIMIT 1)
    UNION ALL
    (SELECT not_before FROM chunk_batches WHERE state = 'available' AND rung_at IS NOT NULL AND route = p.route
     AND priority = r.rank AND not_before <= now() ORDER BY rung_at LIMIT 1)) AS first
GROUP BY p.route
"""


def _oldest(conn: sa.Connection) -> dict[Route, float]:
    # As in `doorbells`: a plan that sorts reads all that is open.
    conn.execute(sa.text("SELECT set_config('enable_sort', 'off', true)"))
    rows = conn.execute(sa.text(_OLDEST), {"routes": [route.value for route in LANES], "ranks": [3, 6, 9]})
    return {Route(row.route): max(0.0, float(row.seconds)) for row in rows}


def _by_lane(rows: Iterable[sa.Row[tuple[object, ...]]]) -> dict[Route, int]:
    """All lanes: what a lane does not have is 0."""
    return dict.fromkeys(LANES, 0) | {Route(row.route): int(row.n) for row in rows}


def _money(conn: sa.Connection, settings: Settings) -> Money:
    today = conn.execute(sa.text(f"SELECT coalesce(sum(usd), 0) FROM charges WHERE day = {charges.TODAY}")).scalar_one()
    month = budget.read(conn, settings)
    return Money(Decimal(today), month.spent, month.committed, month.limit)


def _faults(conn: sa.Connection) -> tuple[dict[str, int], list[Fault]]:
    facts = {"seconds": RECENT_SECONDS, "limit": SHOWN_FAULTS}
    since = "now() - make_interval(secs => :seconds)"
    attempts = conn.execute(
        sa.text(
            "SELECT outcome, count(*) AS n FROM usage WHERE outcome IN ('died', 'failed') "
            f"AND ended_at > {since} GROUP BY outcome"
        ),
        facts,
    )
    given_up = conn.execute(
        sa.text(f"SELECT count(*) FROM chunk_batches WHERE state = 'discarded' AND finished_at > {since}"), facts
    ).scalar_one()
    recent = {row.outcome: row.n for row in attempts} | {ChunkBatchState.DISCARDED.value: given_up}
    latest = conn.execute(
        sa.text(
            "(SELECT ended_at AS at, outcome AS what, worker || ': ChunkBatch ' || chunk_batch_id || ' of job ' || "
            "  job_id || ': ' || coalesce(evidence, 'nothing is known of it') AS line "
            "  FROM usage WHERE outcome IN ('died', 'failed') AND ended_at IS NOT NULL ORDER BY ended_at DESC "
            "  LIMIT :limit) "
            "UNION ALL (SELECT finished_at, 'discarded', 'ChunkBatch ' || id || ' of job ' || job_id || ' after ' || "
            "  attempt || ' attempts: ' || coalesce(error, error_code, '') FROM chunk_batches "
            "  WHERE state = 'discarded' AND finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT :limit)"
        ),
        facts,
    )
    return recent, [Fault(row.at, row.what, " ".join(row.line.split())) for row in latest]


def _newest(faults: Iterable[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: fault.at, reverse=True)[:SHOWN_FAULTS]


def _stops(lanes: Iterable[Lane]) -> list[Fault]:
    return [
        Fault(lane.stopped_at, "stopped", f"lane {lane.route}: {lane.stop_code}: {lane.stop_reason}")
        for lane in lanes
        if lane.stopped_at is not None
    ]
