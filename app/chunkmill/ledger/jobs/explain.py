"""Why a job is embedded where it is, and what it waits for."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.lanes import Lane, with_lane
from chunkmill.domain.plurals import count
from chunkmill.domain.results import Explanation, JobProviderBatch, OpenWork, RoutingStep
from chunkmill.domain.states import ChunkBatchState, JobState, ProviderBatchState, Route
from chunkmill.errors import NotFound
from chunkmill.ledger.jobs import outbox
from chunkmill.ledger.provider import provider_lanes

SHOWN_PROVIDER_BATCHES = 100
LOOKED_AT = 20
"""For how many waiting ChunkBatches this looks up whether their contents are in flight elsewhere."""


def explain(conn: sa.Connection, job_id: int) -> Explanation:
    """Explain where a job is embedded and what it waits for. Raises :class:`NotFound`."""
    query, parameters = sa.text("SELECT state, route, deadline, routing FROM jobs WHERE id = :id"), {"id": job_id}
    job = conn.execute(query, parameters).one_or_none()
    if job is None:
        undelivered = _undelivered(conn, job_id)
        if undelivered is not None:
            return undelivered
        job = conn.execute(query, parameters).one_or_none()  # it may have been delivered in between
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
        tuple(_wait(part, lanes, provider_batches, _in_flight_elsewhere(conn, job_id, part)) for part in work),
        tuple(lanes.values()),
        provider_batches,
    )


def _undelivered(conn: sa.Connection, job_id: int) -> Explanation | None:
    """Explain a job that is in the outbox; None if it is not."""
    entry = outbox.read(conn, job_id) if outbox.is_kept(conn) else None
    if entry is None:
        return None
    waits = outbox.WAITS if outbox.is_late(conn, job_id) else outbox.WAITS.partition(":")[0]
    lanes = tuple(provider_lanes.lanes(conn))
    return Explanation(job_id, JobState.ENQUEUEING, entry.route, entry.deadline, (), (), (waits,), lanes, ())


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
            row.error and with_lane(row.error, Route.OPENAI),
        )
        for row in rows
    )


_IN_FLIGHT_ELSEWHERE = sa.text("""
WITH first AS (
    SELECT id, space_id, content_hashes
    FROM chunk_batches
    WHERE job_id = :id AND state = :available AND route = :plain
    ORDER BY id
    LIMIT :looked)
SELECT i.provider_batch_id AS id, p.state, count(*) AS contents
FROM first f
CROSS JOIN unnest(f.content_hashes) AS h(content_hash)
JOIN provider_inputs i ON i.space_id = f.space_id AND i.content_hash = h.content_hash AND i.chunk_batch_id <> f.id
LEFT JOIN provider_batches p ON p.id = i.provider_batch_id
GROUP BY i.provider_batch_id, p.state
ORDER BY i.provider_batch_id
""")


def _in_flight_elsewhere(conn: sa.Connection, job_id: int, work: OpenWork) -> list[sa.Row[Any]]:
    """Who has contents in flight for which plain requests of the job wait: ProviderBatches, or others' requests."""
    if work.route is not Route.OPENAI_SYNC or work.state is not ChunkBatchState.AVAILABLE:
        return []
    parameters = {"id": job_id, "available": ChunkBatchState.AVAILABLE, "plain": work.route, "looked": LOOKED_AT}
    return list(conn.execute(_IN_FLIGHT_ELSEWHERE, parameters))


def _blocked(lane: Lane) -> str | None:
    """Why a lane sends nothing now; None if it does."""
    if lane.stopped_at:
        return f"{lane.route} is stopped {lane.why}"
    if lane.paused_until:
        return f"{lane.route} pauses until {_moment(lane.paused_until)}: {lane.pause_reason}"
    return None


def _wait(
    work: OpenWork,
    lanes: dict[Route, Lane],
    provider_batches: tuple[JobProviderBatch, ...],
    elsewhere: list[sa.Row[Any]],
) -> str:
    one = work.chunk_batches == 1
    who = f"{count(work.chunk_batches, 'ChunkBatch', 'ChunkBatches')} ({count(work.contents, 'content')})"
    waits = f"{who} {'waits' if one else 'wait'}"
    if work.at_provider:
        still_open = [provider_batch for provider_batch in provider_batches if provider_batch.next_look is not None]
        ids = ", ".join(str(provider_batch.id) for provider_batch in still_open)
        blocked = _blocked(lanes[Route.OPENAI]) if any(batch.state.spends for batch in still_open) else None
        because = f", which is not sent because {blocked}" if blocked else ""
        return f"{waits} for ProviderBatch {ids or 'results being collected'}{because}"
    if work.state is ChunkBatchState.RUNNING:
        return f"{who} {'is' if one else 'are'} with a worker of {work.route}"
    lane = lanes.get(work.route)
    tried = f". The latest try of the first of them: {work.because}" if work.because else ""
    if lane is None:
        return f"{waits} for a local worker{tried}"
    if blocked := _blocked(lane):
        return f"{waits} because {blocked}"
    if elsewhere:
        others = [str(row.id) for row in elsewhere if row.id is not None]
        who = f"ProviderBatch {', '.join(others)} has" if others else "plain requests of other jobs have"
        unsent = any(row.state and ProviderBatchState(row.state).spends for row in elsewhere)
        blocked = _blocked(lanes[Route.OPENAI]) if unsent else None
        because = f", which is not sent because {blocked}" if blocked else ""
        return f"{waits} because {who} some of the same texts in flight, and a text is paid for once{because}"
    if lane.held_reason:
        return f"{waits} because {lane.route} is held: {lane.held_reason}"
    if work.route is Route.OPENAI:
        return f"{waits} to be gathered into a ProviderBatch"
    return f"{waits} for a worker on queue openai{tried}"


def _moment(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M:%S %Z}"
