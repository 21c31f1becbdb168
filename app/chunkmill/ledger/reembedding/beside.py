"""Jobs beside a producer's job: what an enqueue embeds into the other spaces of its collection.

A ChunkBatch belongs to a job of its space, so that its dead chunks, its retry and its end say nothing about the job of
the producer. Each enqueue opens such a job in each other space, with the first window that has something for it.
"""

from __future__ import annotations

import logging

import sqlalchemy as sa

from chunkmill.domain.routing import Choice
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import ChunkmillError
from chunkmill.ledger.jobs import jobs, routing
from chunkmill.ledger.jobs.jobs import OpenedJob
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.collections import Collection

logger = logging.getLogger(__name__)


def choose(
    conn: sa.Connection, settings: Settings, spec: SpaceSpec, reembedding_id: int | None
) -> tuple[Route, Choice]:
    """The route that a re-embedding asks for, and the lane of a job into one of its spaces under these settings.

    The plan's route is for the new space; for the old space, which is kept after the flip, the lane is chosen as for
    ``auto``. Raises :class:`UnknownRoute` and :class:`InvalidSetting`.
    """
    query = """
        SELECT e.plan ->> 'route' AS route
        FROM reembeddings e
        JOIN spaces s ON s.id = e.to_space_id
        WHERE e.id = :id AND s.fingerprint = :fingerprint
    """
    row = None
    if reembedding_id is not None:
        row = conn.execute(sa.text(query), {"id": reembedding_id, "fingerprint": spec.fingerprint}).one_or_none()
    route = Route(row.route) if row is not None and row.route else Route.AUTO
    return route, routing.decide(conn, settings, spec, route)


def open_beside(
    conn: sa.Connection,
    settings: Settings,
    *,
    collection: Collection,
    space_id: int,
    on_long: OnLong | None,
    priority: Priority,
    reembedding_id: int | None,
) -> OpenedJob | None:
    """Open a job of an enqueue in another space of its collection, in the transaction of the window.

    ``on_long`` is that of the space; None for the active one, which has the policy of its vectors. Returns None if this
    process cannot choose a lane for the space: the poller fills it then.
    """
    space = registry.get_if_readable(conn, space_id)
    if space is None:
        return None
    try:
        route, choice = choose(conn, settings, space.spec, reembedding_id)
    except ChunkmillError as error:
        name = space.spec.fingerprint[:12]
        logger.info("the poller embeds the new chunks into space %s, because this process cannot: %s", name, error)
        return None
    return jobs.open_job(
        conn,
        collection=Collection(collection.id, collection.name, space_id),
        route=route,
        priority=priority,
        on_long=on_long or space.spec.long_text.policy,
        idempotency_key=None,
        choice=choice,
    )
