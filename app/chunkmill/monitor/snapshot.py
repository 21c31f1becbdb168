"""The questions that an operator asks of the ledger, each asked in one place.

``status``, ``status --watch`` and the poller's metrics read them here. ``take`` costs a few milliseconds, however large
the ledger is: it reads small tables and the ends of indexes. ``count`` grows with the jobs that are open: it takes
1.5 s if they have 2,000,000 ChunkBatches. A caller that counts repeatedly waits ``COUNT_SHARE`` times as long as the
count took (``chunkmill.monitor.watcher``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.db.connect import Connections, connections
from chunkmill.db.statements import with_constants
from chunkmill.domain.budget import dollars
from chunkmill.domain.lanes import PAID_ROUTES, Lane
from chunkmill.domain.states import ChunkBatchState, JobState, Route
from chunkmill.ledger.money import adjustments, budget, charges
from chunkmill.ledger.provider import provider_lanes
from chunkmill.ledger.work.usage import Outcome
from chunkmill.monitor import present, reports
from chunkmill.monitor.present import Presence
from chunkmill.monitor.reports import Kind, Report
from chunkmill.settings import Settings

LANES = (Route.LOCAL, *PAID_ROUTES)
RECENT_SECONDS = 600
"""How many seconds a fault counts as recent."""
SHOWN_FAULTS = 8
HIT_RATE_SECONDS = 24 * 3600
"""How many seconds after its end a job still counts for the cache's hit rate."""
OPEN = [state.value for state in JobState if not state.is_final]
PRIORITY_RANKS = [3, 6, 9]


@dataclass(frozen=True, slots=True)
class Money:
    """US dollars; days and months are those of UTC. ``limit`` is None if no budget is set.

    ``today`` and ``month`` are what was charged or may have been. The last three are the parts of ``month`` that no
    answer confirmed.
    """

    today: Decimal
    month: Decimal
    committed: Decimal
    limit: Decimal | None
    lost: Decimal = Decimal(0)
    maybe_charged: Decimal = Decimal(0)
    corrected: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Fault:
    """``what`` is ``died`` or ``failed`` for an attempt, ``discarded`` for a ChunkBatch, ``stopped`` for a lane."""

    at: datetime
    what: str
    line: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the ledger says at one moment, as far as it is cheap to ask."""

    at: datetime
    running: Mapping[Route, int]
    """ChunkBatches that a worker or a provider has, by lane."""
    oldest: Mapping[Route, float]
    """How many seconds ago the oldest waiting ChunkBatch of a lane became due; a lane without one is missing."""
    lanes: Sequence[Lane]
    workers: Sequence[Report]
    connections: Connections
    money: Money
    recent: Mapping[str, int]
    """Number of faults of each kind in the last ``RECENT_SECONDS``."""
    faults: Sequence[Fault]
    """The latest faults, newest first."""


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
class Totals:
    """What has to be counted. The hit rate is that of the jobs that are open or ended within ``HIT_RATE_SECONDS``:
    ``chunks`` is the number of their chunks and ``asked`` the number of contents that had to be embedded for them."""

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
        """The share of chunks that needed no embedding, because their text was known or came earlier in the job."""
        return max(0.0, 1 - self.asked / self.chunks) if self.chunks else None


def take(conn: sa.Connection, settings: Settings) -> Snapshot:
    """What is cheap to ask: running work, workers, lanes, money and the latest faults."""
    # The indexes by which faults are found came with the table of reports.
    has_reports = reports.exist(conn)
    workers = reports.read(conn) if has_reports else ()
    there = Presence(connections(conn), [report for report in workers if not report.is_silent])
    lanes = present.served(provider_lanes.lanes(conn), there)
    return Snapshot(
        at=conn.execute(sa.text("SELECT now()")).scalar_one(),
        running=_batches_by_lane(conn, ChunkBatchState.RUNNING),
        oldest=_oldest(conn),
        lanes=lanes,
        workers=workers,
        connections=there.connections,
        money=_money(conn, settings),
        recent=_recent_faults(conn) if has_reports else {},
        faults=_newest([*(_latest_faults(conn) if has_reports else ()), *_stops(lanes)]),
    )


def count(conn: sa.Connection) -> Totals:
    """What has to be counted: ready and discarded ChunkBatches, jobs, dead chunks and the cache's hits."""
    # One process of the server does the work, so that the time it takes is also its cost for the server.
    conn.execute(sa.text("SELECT set_config('max_parallel_workers_per_gather', '0', true)"))
    parameters = {
        "open": OPEN,
        "seconds": HIT_RATE_SECONDS,
        "available": ChunkBatchState.AVAILABLE,
        "running": ChunkBatchState.RUNNING,
    }
    rows = conn.execute(_JOBS, parameters).all()
    open_jobs = [
        OpenJob(row.id, row.collection, row.model, JobState(row.state), row.n_chunks, row.contents, row.remaining)
        for row in rows
        if row.state in OPEN
    ]
    return Totals(
        ready=_batches_by_lane(conn, ChunkBatchState.AVAILABLE),
        discarded=_batches_by_lane(conn, ChunkBatchState.DISCARDED),
        jobs=jobs_by_state(conn),
        open_jobs=open_jobs,
        dead_chunks=conn.execute(sa.text("SELECT count(*) FROM dead_chunks")).scalar_one(),
        chunks=sum(row.n_chunks for row in rows),
        asked=sum(row.asked for row in rows),
        remaining=sum(job.remaining for job in open_jobs),
    )


def jobs_by_state(conn: sa.Connection) -> dict[JobState, int]:
    """How many jobs there are in each state; a state without jobs is missing."""
    rows = conn.execute(sa.text("SELECT state, count(*) AS n FROM jobs GROUP BY state"))
    return {JobState(row.state): row.n for row in rows}


def lane_states(snapshot: Snapshot) -> dict[Route, str]:
    """The state of each lane: ``stopped``, ``paused`` or ``held`` if the ledger says so, ``idle`` if no worker for
    the lane reports, otherwise ``running``."""
    live = [worker for worker in snapshot.workers if not worker.is_silent]
    in_ledger = {lane.route: lane.state for lane in snapshot.lanes}
    states = {}
    for route in LANES:
        state = in_ledger.get(route, "running")
        kind: Kind = "local" if route is Route.LOCAL else "provider"
        served = any(worker.serves(kind) for worker in live)
        states[route] = "idle" if state == "running" and not served else state
    return states


# One pass over the ChunkBatches of these jobs: a subquery for each job would read those of a large job several times.
_JOBS = sa.text(
    """
    WITH counted AS (
        SELECT j.id, j.state, j.n_chunks, c.name AS collection, s.model
        FROM jobs j
        JOIN collections c ON c.id = j.collection_id
        JOIN spaces s ON s.id = j.space_id
        WHERE j.state = ANY (:open) OR j.finished_at > now() - make_interval(secs => :seconds)
    ),
    sums AS (
        SELECT
            job_id,
            sum(n_contents)::bigint AS contents,
            sum(n_contents - n_cached)::bigint AS asked,
            sum(n_contents - n_cached - n_embedded) FILTER (WHERE state IN (:available, :running))::bigint
                AS remaining
        FROM chunk_batches
        WHERE job_id = ANY (ARRAY(SELECT id FROM counted))
        GROUP BY job_id
    )
    SELECT
        counted.*,
        coalesce(sums.contents, 0) AS contents,
        coalesce(sums.asked, 0) AS asked,
        coalesce(sums.remaining, 0) AS remaining
    FROM counted
    LEFT JOIN sums ON sums.job_id = counted.id
    ORDER BY counted.id
    """
)


def _batches_by_lane(conn: sa.Connection, state: ChunkBatchState) -> dict[Route, int]:
    """How many ChunkBatches of each lane are in ``state``: 0 for a lane that has none."""
    rows = conn.execute(
        sa.text("SELECT route, count(*) AS n FROM chunk_batches WHERE state = :state GROUP BY route"),
        {"state": state},
    )
    return dict.fromkeys(LANES, 0) | {Route(row.route): int(row.n) for row in rows}


# The first entry of each index is the oldest, because the ids of jobs and of ChunkBatches grow. A ChunkBatch that
# waits out a pause after a failure is not due, so it is skipped.
_OLDEST = with_constants(
    """
    SELECT lane.route, extract(epoch FROM now() - min(first.not_before)) AS seconds
    FROM unnest(CAST(:routes AS text[])) AS lane (route)
    CROSS JOIN unnest(CAST(:ranks AS int[])) AS priority (rank)
    CROSS JOIN LATERAL (
        (
            SELECT not_before
            FROM chunk_batches
            WHERE state = :available AND rung_at IS NULL
                AND route = lane.route AND priority = priority.rank AND not_before <= now()
            ORDER BY job_id, id
            LIMIT 1
        )
        UNION ALL
        (
            SELECT not_before
            FROM chunk_batches
            WHERE state = :available AND rung_at IS NOT NULL
                AND route = lane.route AND priority = priority.rank AND not_before <= now()
            ORDER BY rung_at
            LIMIT 1
        )
    ) AS first
    GROUP BY lane.route
    """,
    available=ChunkBatchState.AVAILABLE,
)


def _oldest(conn: sa.Connection) -> dict[Route, float]:
    # A plan that sorts would read everything that is open, as in ``doorbells``.
    conn.execute(sa.text("SELECT set_config('enable_sort', 'off', true)"))
    rows = conn.execute(_OLDEST, {"routes": [route.value for route in LANES], "ranks": PRIORITY_RANKS})
    return {Route(row.route): max(0.0, float(row.seconds)) for row in rows}


def unconfirmed_line(money: Money) -> str | None:
    """What was lost this month and what may have been charged, and where the reasons are; None if that is nothing."""
    parts = (("lost", money.lost), ("maybe charged", money.maybe_charged))
    shown = [f"{dollars(usd)} USD {what}" for what, usd in parts if usd]
    return f"{', '.join(shown)} this month; to see why: chunkmill cost adjustments" if shown else None


def _money(conn: sa.Connection, settings: Settings) -> Money:
    today = conn.execute(sa.text(f"SELECT coalesce(sum(usd), 0) FROM charges WHERE day = {charges.TODAY}")).scalar_one()
    month = budget.read(conn, settings)
    return Money(
        Decimal(today) + adjustments.day_adjusted(conn).total,
        month.spent,
        month.committed,
        month.limit,
        month.lost,
        month.maybe_charged,
        month.corrected,
    )


_FAULTS = {"died": Outcome.DIED, "failed": Outcome.FAILED, "discarded": ChunkBatchState.DISCARDED}
_RECENT_FAULTS = with_constants(
    """
    SELECT outcome AS kind, count(*) AS n
    FROM usage
    WHERE outcome IN (:died, :failed) AND ended_at > now() - make_interval(secs => :seconds)
    GROUP BY outcome
    UNION ALL
    SELECT :discarded, count(*)
    FROM chunk_batches
    WHERE state = :discarded AND finished_at > now() - make_interval(secs => :seconds)
    """,
    **_FAULTS,
)


def _recent_faults(conn: sa.Connection) -> dict[str, int]:
    return {row.kind: row.n for row in conn.execute(_RECENT_FAULTS, {"seconds": RECENT_SECONDS})}


_LATEST_FAULTS = with_constants(
    """
    (
        SELECT
            ended_at AS at,
            outcome AS what,
            format('%s: ChunkBatch %s of job %s: %s',
                   worker, chunk_batch_id, job_id, coalesce(evidence, 'no evidence was recorded')) AS line
        FROM usage
        WHERE outcome IN (:died, :failed) AND ended_at IS NOT NULL
        ORDER BY ended_at DESC
        LIMIT :limit
    )
    UNION ALL
    (
        SELECT
            finished_at,
            :discarded,
            format('ChunkBatch %s of job %s after %s attempts: %s',
                   id, job_id, attempt, coalesce(error, error_code, ''))
        FROM chunk_batches
        WHERE state = :discarded AND finished_at IS NOT NULL
        ORDER BY finished_at DESC
        LIMIT :limit
    )
    """,
    **_FAULTS,
)


def _latest_faults(conn: sa.Connection) -> list[Fault]:
    rows = conn.execute(_LATEST_FAULTS, {"limit": SHOWN_FAULTS})
    return [Fault(row.at, row.what, " ".join(row.line.split())) for row in rows]


def _newest(faults: Iterable[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: fault.at, reverse=True)[:SHOWN_FAULTS]


def _stops(lanes: Iterable[Lane]) -> list[Fault]:
    return [
        Fault(lane.stopped_at, "stopped", f"lane {lane.route}: {lane.stop_code}: {lane.stop_reason}")
        for lane in lanes
        if lane.stopped_at is not None
    ]
