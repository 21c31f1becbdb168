"""Chooses a job's lane when the job is opened, and moves it to another one while its work has not begun."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from chunkmill.db.connect import connections
from chunkmill.db.statements import with_constants
from chunkmill.domain.costs import machine_usd
from chunkmill.domain.prices import MILLION
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.routing import BATCH_TAKES, Choice, Offer, choose, is_late, require_served, serving
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import ChunkBatchState, JobState, ProviderBatchState, Route
from chunkmill.ledger.money import budget, charges
from chunkmill.ledger.provider import provider_endings, provider_lanes
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces import registry

SLICE = 5_000
"""How many ChunkBatches of a job one call moves."""
MEASURED_ATTEMPTS = 10_000
"""How many of the latest attempts tell the speed of local workers. ``usage`` has no index by space."""


def lanes_of(settings: Settings, spec: SpaceSpec) -> tuple[Route, ...]:
    """The lanes that serve a space under these settings. Paid ones do not if their settings are wrong."""
    no_provider = settings.embedding_provider == "local" or settings.provider_problem is not None
    model = None if no_provider else model_for(settings, spec)
    return serving(spec, model, batches=settings.openai_batches)


def may_cost(settings: Settings, spec: SpaceSpec, asked: Route) -> bool:
    """Whether a job of the space may come to a paid lane."""
    return asked is not Route.LOCAL and any(lane.is_paid for lane in lanes_of(settings, spec))


def job_may_cost(conn: sa.Connection, settings: Settings, job_id: int) -> bool:
    """Whether the job may come to a paid lane. If this release cannot read the job's space, it may."""
    query = "SELECT route, space_id FROM jobs WHERE id = :id"
    row = conn.execute(sa.text(query), {"id": job_id}).one()
    space = registry.get_if_readable(conn, row.space_id)
    return space is None or may_cost(settings, space.spec, Route(row.route))


def decide(
    conn: sa.Connection, settings: Settings, spec: SpaceSpec, asked: Route, deadline: datetime | None = None
) -> Choice:
    """The lane of a new job. The caller checks whether the budget allows it.

    Raises :class:`UnknownRoute`, and :class:`InvalidSetting` if it needs a paid lane, whose settings are wrong.
    """
    if asked not in (Route.LOCAL, Route.AUTO) or spec.provider == OPENAI:
        settings.require_provider()
    require_served(asked, lanes_of(settings, spec), spec)
    # Without a deadline, how long the lanes take does not matter.
    now = datetime.now(UTC) if deadline is None else conn.execute(sa.text("SELECT now()")).scalar_one()
    return choose(asked, offers(conn, settings, spec), now=now, deadline=deadline)


def offers(conn: sa.Connection, settings: Settings, spec: SpaceSpec) -> list[Offer]:
    """The lanes that serve a space, each with its price and its present health."""
    lanes = lanes_of(settings, spec)
    if len(lanes) == 1:
        return [Offer(lanes[0])]
    paid = {lane.route: lane for lane in provider_lanes.lanes(conn)}
    price = charges.price_today(conn, model_for(settings, spec))
    used_up = settings.openai_monthly_budget_usd is not None and budget.read(conn, settings).is_used_up
    unpriced = budget.why_unpriced(settings, spec)
    offered = []
    for route in lanes:
        if route is Route.LOCAL:
            seconds = seconds_per_token(conn, spec)
            usd = None if seconds is None else machine_usd(seconds * int(MILLION), settings.gpu_hour_usd)
            offered.append(Offer(route, usd, idle=not connections(conn).workers))
            continue
        stopped = unpriced or ("the month's budget is used up" if used_up else None)
        if paid[route].is_stopped:
            stopped = f"stopped ({paid[route].stop_code}) until `chunkmill lanes resume {route}`"
        offered.append(Offer(route, price.of(int(MILLION), route) if price else None, stopped))
    return offered


_SECONDS_PER_TOKEN = sa.text("""
SELECT sum(u.engine_seconds) / sum(u.tokens)
FROM (SELECT * FROM usage ORDER BY chunk_batch_id DESC LIMIT :attempts) u
JOIN spaces s ON s.id = u.space_id
WHERE s.fingerprint = :fingerprint
  AND u.engine_seconds > 0 AND u.tokens > 0 AND u.provider <> :openai
""")


def seconds_per_token(conn: sa.Connection, spec: SpaceSpec) -> float | None:
    """Engine seconds per token that local workers took for the space lately. None if they have embedded nothing."""
    parameters = {"attempts": MEASURED_ATTEMPTS, "fingerprint": spec.fingerprint, "openai": OPENAI}
    seconds = conn.execute(_SECONDS_PER_TOKEN, parameters).scalar_one()
    return None if seconds is None else float(seconds)


def entry(choice: Choice, at: datetime) -> dict[str, str]:
    """A choice as the column ``jobs.routing`` keeps it."""
    kept = {"at": at.isoformat(), "route": choice.route.value, "because": choice.because}
    return kept if choice.instead_of is None else {**kept, "instead_of": choice.instead_of.value}


def lane_now(conn: sa.Connection, job_id: int) -> Route | None:
    """The lane of a job; None if it is in the outbox and was not delivered yet."""
    row = conn.execute(sa.text("SELECT route, routing FROM jobs WHERE id = :id"), {"id": job_id}).one_or_none()
    return None if row is None else lane_of(row.route, row.routing)


def lane_of(asked: str, routing: Sequence[dict[str, Any]]) -> Route:
    """The lane of a job's ChunkBatches: the latest choice, or what was asked for.

    A job of an old version has no choice and is local.
    """
    if asked != Route.AUTO:
        return Route(asked)
    return Route(routing[-1]["route"]) if routing else Route.LOCAL


# The first conditions avoid reading the ChunkBatches while no lane is stopped, no deadline is near, and no job is in
# its lane only because a better one was stopped.
_JOBS_TO_MOVE = with_constants(
    """
SELECT id, space_id, state, deadline, routing, now() AS now
FROM jobs j
WHERE route = :auto AND state IN (:enqueueing, :running)
  AND (routing -> -1 ->> 'instead_of' = ANY(CAST(:open AS text[]))
       OR routing -> -1 ? 'leaving'
       OR (cardinality(CAST(:stopped AS text[])) > 0 OR deadline < now() + CAST(:takes AS interval))
          AND EXISTS (
              SELECT FROM chunk_batches b
              WHERE b.job_id = j.id
                AND (b.state = :available OR (b.state = :at_work AND b.lease_until IS NULL AND EXISTS (
                    SELECT FROM provider_batch_members m
                    JOIN provider_batches p ON p.id = m.provider_batch_id
                    WHERE m.chunk_batch_id = b.id AND p.state IN (:gathered, :uploaded))))
                AND (b.route = ANY(CAST(:stopped AS text[]))
                     OR (b.route = :openai AND j.deadline < now() + CAST(:takes AS interval)))))
ORDER BY id
FOR NO KEY UPDATE OF j SKIP LOCKED
""",
    auto=Route.AUTO,
    openai=Route.OPENAI,
    enqueueing=JobState.ENQUEUEING,
    running=JobState.RUNNING,
    available=ChunkBatchState.AVAILABLE,
    at_work=ChunkBatchState.RUNNING,
    gathered=ProviderBatchState.GATHERED,
    uploaded=ProviderBatchState.UPLOADED,
)


def reroute(conn: sa.Connection, settings: Settings) -> int:
    """Move ChunkBatches of jobs with route ``auto`` that have not begun to another lane; returns how many.

    They are moved away from a lane that stopped, and from the Batch API when the deadline comes near. They are moved
    back to a better lane that was stopped and takes work again. What was gathered for the Batch API and not sent is
    given back first. Nothing is moved if no better lane is left. One call moves a slice of each job: call it again.
    """
    stopped = [lane.route.value for lane in provider_lanes.lanes(conn) if lane.is_stopped]
    if not settings.openai_batches:
        stopped.append(Route.OPENAI.value)
    lanes_open = [route.value for route in Route if route.value not in stopped]
    parameters = {"stopped": stopped, "open": lanes_open, "takes": BATCH_TAKES}
    jobs = conn.execute(_JOBS_TO_MOVE, parameters).all()
    return sum(_reroute(conn, settings, job, stopped) for job in jobs)


def _reroute(conn: sa.Connection, settings: Settings, job: sa.Row[Any], stopped: Sequence[str]) -> int:
    space = registry.get_if_readable(conn, job.space_id)
    if space is None:
        return 0  # pollers of its own release move it
    late = is_late(job.deadline, job.now)
    last = job.routing[-1] if job.routing else {}
    current = lane_of(Route.AUTO, job.routing)
    all_offers = offers(conn, settings, space.spec)
    can_take = {offer.route for offer in all_offers if not offer.stopped and offer.route.value not in stopped}
    best = choose(Route.AUTO, all_offers, now=job.now, deadline=job.deadline)
    left = {*stopped, *((Route.OPENAI.value,) if late else ())}
    if best.route is not current and best.route in can_take:
        if current.value in left:
            why = "it stopped" if current.value in stopped else f"the deadline {job.deadline:%Y-%m-%d %H:%M %Z} is near"
            _note(conn, job, replace(best, because=f"moved from {current} because {why}; {best.because}"))
            return _move(conn, job.id, left, best.route)
        if best.route == last.get("instead_of"):
            because = f"moved from {current} because {best.route} takes work again; {best.because}"
            # The ChunkBatches that are to follow may be more than a slice, or be added later.
            _note(conn, job, replace(best, because=because), leaving=current)
            return _move(conn, job.id, left | {current.value}, best.route)
    if best.instead_of is None and "instead_of" in last:
        _forget(conn, job.id, "instead_of")  # no better lane is stopped any more
    if current not in can_take:
        return 0
    # The job was moved before. This is the next slice, or what its producer has added since.
    moved_now = _move(conn, job.id, (left | {last.get("leaving", "")}) - {current.value, ""}, current)
    if not moved_now and "leaving" in last and job.state != JobState.ENQUEUEING:
        _forget(conn, job.id, "leaving")
    return moved_now


def _note(conn: sa.Connection, job: sa.Row[Any], moved: Choice, *, leaving: Route | None = None) -> None:
    """Keep the new choice of a job, and the lane from which ChunkBatches are still to be moved back."""
    kept = entry(moved, job.now) | ({} if leaving is None else {"leaving": leaving.value})
    conn.execute(
        sa.text("UPDATE jobs SET routing = routing || CAST(:entry AS jsonb) WHERE id = :id"),
        {"id": job.id, "entry": json.dumps(kept)},
    )


def _forget(conn: sa.Connection, job_id: int, field: str) -> None:
    """Delete a field of a job's latest choice."""
    conn.execute(
        sa.text("UPDATE jobs SET routing = routing #- ARRAY['-1', CAST(:field AS text)] WHERE id = :id"),
        {"id": job_id, "field": field},
    )


# What is at a provider is paid for there, so it stays. MATERIALIZED, because a plan that reads the slice again for each
# row of a job finds another slice each time.
_MOVE = sa.text("""
WITH moved AS MATERIALIZED (
    SELECT id
    FROM chunk_batches c
    WHERE job_id = :id AND state = :available AND route = ANY(CAST(:left AS text[]))
      AND NOT EXISTS (SELECT FROM provider_inputs i WHERE i.chunk_batch_id = c.id)
    LIMIT :slice
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE chunk_batches b
SET route = :to, rung_at = NULL
FROM moved m
WHERE b.id = m.id AND b.state = :available
""")


def _move(conn: sa.Connection, job_id: int, left: Collection[str], to: Route) -> int:
    if Route.OPENAI.value in left:
        provider_endings.give_back_unsent(conn, f"given back, because job {job_id} moves to {to}", of_jobs=[job_id])
    available = ChunkBatchState.AVAILABLE
    parameters = {"id": job_id, "to": to, "left": sorted(left), "slice": SLICE, "available": available}
    return int(conn.execute(_MOVE, parameters).rowcount)
