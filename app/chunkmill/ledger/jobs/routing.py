"""Chooses a job's lane when the job is opened, and moves it to another one while its work has not begun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from chunkmill.db.connect import connections
from chunkmill.db.statements import with_constants
from chunkmill.domain.costs import machine_usd
from chunkmill.domain.prices import MILLION
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.routing import BATCH_TAKES, Choice, Offer, choose, is_late, require_served, serving
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import ChunkBatchState, JobState, Route
from chunkmill.ledger.money import budget, charges
from chunkmill.ledger.provider import provider_lanes
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces import registry

SLICE = 5_000
"""ChunkBatches of a job that one call moves."""
MEASURED_ATTEMPTS = 10_000
"""How many of the latest attempts tell the speed of local workers. ``usage`` has no index by space."""


def lanes_of(settings: Settings, spec: SpaceSpec) -> tuple[Route, ...]:
    """The lanes that serve a space under these settings. Paid ones do not if their settings are wrong."""
    no_provider = settings.embedding_provider == "local" or settings.provider_problem is not None
    model = None if no_provider else model_for(settings, spec)
    return serving(spec, model, batches=settings.openai_batches)


def decide(
    conn: sa.Connection, settings: Settings, spec: SpaceSpec, asked: Route, deadline: datetime | None = None
) -> Choice:
    """The lane of a new job. The caller checks whether the budget allows it.

    Raises :class:`UnknownRoute`, and :class:`InvalidSetting` if it needs a paid lane, whose settings are wrong.
    """
    if asked not in (Route.LOCAL, Route.AUTO) or spec.provider == OPENAI:
        settings.require_provider()
    require_served(asked, lanes_of(settings, spec), spec)
    now = conn.execute(sa.text("SELECT now()")).scalar_one()
    return choose(asked, offers(conn, settings, spec), now=now, deadline=deadline)


def offers(conn: sa.Connection, settings: Settings, spec: SpaceSpec) -> list[Offer]:
    """The lanes that serve a space, each with its price and its present health."""
    lanes = lanes_of(settings, spec)
    if len(lanes) == 1:
        return [Offer(lanes[0])]
    paid = {lane.route: lane for lane in provider_lanes.lanes(conn)}
    price = charges.price_today(conn, model_for(settings, spec))
    used_up = settings.openai_monthly_budget_usd is not None and budget.read(conn, settings).is_used_up
    found = []
    for route in lanes:
        if route is Route.LOCAL:
            seconds = seconds_per_token(conn, spec)
            usd = None if seconds is None else machine_usd(seconds * int(MILLION), settings.gpu_hour_usd)
            found.append(Offer(route, usd, idle=not connections(conn).workers))
            continue
        stopped = "the month's budget is used up" if used_up else None
        if paid[route].is_stopped:
            stopped = f"stopped ({paid[route].stop_code}) until `chunkmill lanes resume {route}`"
        found.append(Offer(route, price.of(int(MILLION), route) if price else None, stopped))
    return found


_SECONDS_PER_TOKEN = sa.text("""
SELECT sum(u.engine_seconds) / sum(u.tokens)
FROM (SELECT * FROM usage ORDER BY chunk_batch_id DESC LIMIT :attempts) u
JOIN spaces s ON s.id = u.space_id
WHERE s.fingerprint = :fingerprint
  AND u.engine_seconds > 0 AND u.tokens > 0 AND u.provider <> 'openai'
""")


def seconds_per_token(conn: sa.Connection, spec: SpaceSpec) -> float | None:
    """Engine seconds per token that local workers took for the space lately. None if they have embedded nothing."""
    seconds = conn.execute(
        _SECONDS_PER_TOKEN, {"attempts": MEASURED_ATTEMPTS, "fingerprint": spec.fingerprint}
    ).scalar_one()
    return None if seconds is None else float(seconds)


def entry(choice: Choice, at: datetime) -> dict[str, str]:
    """A choice as the column ``jobs.routing`` keeps it."""
    return {"at": at.isoformat(), "route": choice.route.value, "because": choice.because}


def lane_of(asked: str, routing: Sequence[dict[str, Any]]) -> Route:
    """The lane of a job's ChunkBatches: the latest choice, or what was asked for.

    A job of an old version has no choice and is local.
    """
    if asked != Route.AUTO:
        return Route(asked)
    return Route(routing[-1]["route"]) if routing else Route.LOCAL


# The first condition on :stopped and the deadline spares the look at the ChunkBatches while no lane is stopped and no
# deadline is near.
_JOBS_TO_MOVE = with_constants(
    """
SELECT id, space_id, deadline, routing, now() AS now
FROM jobs j
WHERE route = :auto AND state IN (:enqueueing, :running)
  AND (cardinality(CAST(:stopped AS text[])) > 0 OR deadline < now() + CAST(:takes AS interval))
  AND EXISTS (
      SELECT FROM chunk_batches b
      WHERE b.job_id = j.id AND b.state = :available
        AND (b.route = ANY(CAST(:stopped AS text[]))
             OR (b.route = :openai AND j.deadline < now() + CAST(:takes AS interval))))
ORDER BY id
FOR NO KEY UPDATE OF j SKIP LOCKED
""",
    auto=Route.AUTO,
    openai=Route.OPENAI,
    enqueueing=JobState.ENQUEUEING,
    running=JobState.RUNNING,
    available=ChunkBatchState.AVAILABLE,
)


def reroute(conn: sa.Connection, settings: Settings) -> int:
    """Move ChunkBatches of jobs with route ``auto`` that have not begun to another lane; returns how many.

    They are moved away from a lane that stopped, and from the Batch API when the deadline comes near. Nothing is moved
    if no better lane is left. One call moves a slice of each job: call it again.
    """
    stopped = [lane.route.value for lane in provider_lanes.lanes(conn) if lane.is_stopped]
    if not settings.openai_batches:
        stopped.append(Route.OPENAI.value)
    jobs = conn.execute(_JOBS_TO_MOVE, {"stopped": stopped, "takes": BATCH_TAKES}).all()
    return sum(_reroute(conn, settings, job, stopped) for job in jobs)


# What is at a provider is paid for there, so it stays.
_MOVE = sa.text("""
UPDATE chunk_batches b
SET route = :to, rung_at = NULL
FROM (
    SELECT id
    FROM chunk_batches c
    WHERE job_id = :id AND state = :available AND route = ANY(CAST(:left AS text[]))
      AND NOT EXISTS (SELECT FROM provider_inputs i WHERE i.chunk_batch_id = c.id)
    LIMIT :slice
    FOR NO KEY UPDATE SKIP LOCKED) m
WHERE b.id = m.id AND b.state = :available
""")


def _reroute(conn: sa.Connection, settings: Settings, job: sa.Row[Any], stopped: Sequence[str]) -> int:
    left = {*stopped, *((Route.OPENAI.value,) if is_late(job.deadline, job.now) else ())}
    space = registry.get_if_readable(conn, job.space_id)
    if space is None:
        return 0  # pollers of its own release move it
    open_offers = [
        offer for offer in offers(conn, settings, space.spec) if offer.route not in left and not offer.stopped
    ]
    if not open_offers:
        return 0
    current = lane_of(Route.AUTO, job.routing)
    if any(offer.route is current for offer in open_offers):
        to = current  # the job was moved before; this is what its producer has added since, or the next slice
    else:
        choice = choose(Route.AUTO, open_offers, now=job.now, deadline=job.deadline)
        to = choice.route
        late = is_late(job.deadline, job.now) and current is Route.OPENAI and current.value not in stopped
        why = f"the deadline {job.deadline:%Y-%m-%d %H:%M %Z} is near" if late else "it stopped"
        moved = Choice(to, f"moved from {current} because {why}; {choice.because}")
        conn.execute(
            sa.text("UPDATE jobs SET routing = routing || CAST(:entry AS jsonb) WHERE id = :id"),
            {"id": job.id, "entry": json.dumps(entry(moved, job.now))},
        )
    available = ChunkBatchState.AVAILABLE
    result = conn.execute(_MOVE, {"id": job.id, "to": to, "left": sorted(left), "slice": SLICE, "available": available})
    return int(result.rowcount)
