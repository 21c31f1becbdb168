"""Why a job is embedded where it is, and what it waits for."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.lanes import Lane
from chunkmill.domain.results import Explanation, JobProviderBatch, OpenWork, RoutingStep
from chunkmill.domain.states import ChunkBatchState, JobState, ProviderBatchState, Route
from chunkmill.errors import NotFound
from chunkmill.ledger.provider import provider_lanes

SHOWN_PROVIDER_BATCHES = 100


def explain(conn: sa.Connection, job_id: int) -> Explanation:
    """Explain where a job is embedded and what it waits for. Raises :class:`NotFound`."""
    job = conn.execute(
        sa.text("SELECT state, route, deadline, routing FROM jobs WHERE id = :id"), {"id": job_id}
    ).one_or_none()
    if job is None:
        raise NotFound(f"there is no job {job_id}; `chunkmill jobs` lists the latest.")
    lanes = {lane.route: lane for lane in provider_lanes.lanes(conn)}
    work, provider_batches = _open_work(conn, job_id), _provider_batches(conn, job_id)
    return Explanation(
        job_id,
        JobState(job.state),
        Route(job.route),
        job.deadline,
        tuple(_step(entry) for entry in job.routing),
        work,
        tuple(_wait(part, lanes, provider_batches) for part in work),
        tuple(lanes.values()),
        provider_batches,
    )


def _step(entry: dict[str, Any]) -> RoutingStep:
    return RoutingStep(datetime.fromisoformat(entry["at"]), Route(entry["route"]), entry["because"])


_OPEN_WORK = sa.text("""
SELECT route, state, state = :running AND lease_until IS NULL AS at_provider,
       count(*) AS n, sum(n_contents - n_cached - n_embedded)::bigint AS contents, min(not_before) AS due_at,
       (array_agg(error ORDER BY id) FILTER (WHERE error IS NOT NULL AND error_code <> 'worker_died'))[1] AS because
FROM chunk_batches
WHERE job_id = :id AND state IN (:available, :running)
GROUP BY 1, 2, 3
ORDER BY 1, 2, 3
""")


def _open_work(conn: sa.Connection, job_id: int) -> tuple[OpenWork, ...]:
    states = {"available": ChunkBatchState.AVAILABLE, "running": ChunkBatchState.RUNNING}
    rows = conn.execute(_OPEN_WORK, {"id": job_id, **states})
    return tuple(
        OpenWork(
            Route(row.route), ChunkBatchState(row.state), row.at_provider, row.n, row.contents, row.due_at, row.because
        )
        for row in rows
    )


_PROVIDER_BATCHES = sa.text("""
SELECT p.*
FROM provider_batches p
WHERE p.id IN (
    SELECT m.provider_batch_id
    FROM provider_batch_members m
    JOIN chunk_batches b ON b.id = m.chunk_batch_id
    WHERE b.job_id = :id)
ORDER BY p.id DESC
LIMIT :limit
""")


def _provider_batches(conn: sa.Connection, job_id: int) -> tuple[JobProviderBatch, ...]:
    rows = conn.execute(_PROVIDER_BATCHES, {"id": job_id, "limit": SHOWN_PROVIDER_BATCHES})
    return tuple(
        JobProviderBatch(
            row.id,
            ProviderBatchState(row.state),
            row.provider_status,
            row.n_requests,
            row.n_done,
            row.n_contents,
            None if row.state == ProviderBatchState.CLOSED else row.not_before,
            row.error,
        )
        for row in rows
    )


def _wait(work: OpenWork, lanes: dict[Route, Lane], provider_batches: tuple[JobProviderBatch, ...]) -> str:
    one = work.chunk_batches == 1
    who = f"{work.chunk_batches:,} ChunkBatch{'' if one else 'es'} ({work.contents:,} contents)"
    waits = f"{who} {'waits' if one else 'wait'}"
    if work.at_provider:
        open_ids = [
            str(provider_batch.id) for provider_batch in provider_batches if provider_batch.next_look is not None
        ]
        return f"{waits} for ProviderBatch {', '.join(open_ids) or 'results being collected'}"
    if work.state is ChunkBatchState.RUNNING:
        return f"{who} {'is' if one else 'are'} with a worker of {work.route}"
    lane = lanes.get(work.route)
    tried = f". The latest try of the first of them: {work.because}" if work.because else ""
    if lane is None:
        return f"{waits} for a local worker{tried}"
    if lane.stopped_at:
        return (
            f"{waits} because {lane.route} stopped at {_moment(lane.stopped_at)} ({lane.stop_code}): "
            f"{lane.stop_reason}. Resume it: chunkmill lanes resume {lane.route}"
        )
    if lane.paused_until:
        return f"{waits} because {lane.route} pauses until {_moment(lane.paused_until)}: {lane.pause_reason}"
    if lane.held_reason:
        return f"{waits} because {lane.route} is held: {lane.held_reason}"
    if work.route is Route.OPENAI:
        return f"{waits} to be gathered into a ProviderBatch"
    return f"{waits} for a worker on queue openai{tried}"


def _moment(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M:%S %Z}"
