"""What keeps a job from its end and does not pass by waiting, for everybody who waits for it."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState
from chunkmill.ledger.jobs import outbox, routing
from chunkmill.ledger.provider import provider_lanes
from chunkmill.ledger.work import attempts
from chunkmill.monitor import present


def read(conn: sa.Connection, job: Job) -> str | None:
    """A sentence or a few that say what is the matter and what to do; None if nothing is, or if the job has ended.

    This reads the job's open ChunkBatches, as a look at the job itself does.
    """
    if job.state.is_final:
        return None
    there = present.read(conn)
    said = []
    route = routing.lane_now(conn, job.id)
    if route is not None:  # otherwise it is in the outbox, so that it has no ChunkBatches yet
        failing = attempts.first_failing(conn, job.id)
        lane = provider_lanes.lane(conn, route) if route.is_paid else None
        if failing is not None:
            said.append(failing.sentence)
        if lane is not None and lane.why:
            said.append(f"Lane {route} is {lane.state} {lane.why}")
    if route is None and not there.connections.pollers:
        said.append(
            "The job was enqueued within a transaction, so a poller makes its ChunkBatches, and none is connected. "
            f"To start one: {present.START_POLLER}"
        )
    elif not there.connections.pollers:
        said.append(
            "No poller is connected, so only the first doorbells are rung, and what a dead worker held is not "
            f"taken back. To start one: {present.START_POLLER}"
        )
    elif job.state is JobState.ENQUEUEING and outbox.is_kept(conn) and outbox.is_late(conn, job.id):
        said.append(outbox.WAITS)
    said += filter(None, [there.lack(route or job.route)])
    return ". ".join(sentence.rstrip(".") for sentence in said) or None
