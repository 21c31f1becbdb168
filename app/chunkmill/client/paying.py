"""Computes what an enqueue would cost before it begins, if a key of the gateway with limited dollars pays for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import partial

import sqlalchemy as sa

from chunkmill.client.estimate import EstimateRequest, estimate
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.costs import LaneEstimate
from chunkmill.domain.routing import Choice
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.errors import ChunkmillError, InvalidChunk, InvalidSetting
from chunkmill.ledger.access import spends
from chunkmill.ledger.reembedding import beside
from chunkmill.settings import Settings
from chunkmill.spaces import collections, others, registry

Items = Callable[[], Iterable[PreparedChunk | InvalidChunk]]
"""Gives all items of a stream, as often as it is called."""
Quote = Callable[[Items], Decimal]
"""US dollars that an enqueue of the stream costs at most, by our own count of tokens."""


def quote_of(
    db: sa.Engine,
    conn: sa.Connection,
    settings: Settings,
    *,
    collection: str,
    spec: SpaceSpec,
    route: Route,
    choice: Choice,
    on_long: OnLong,
) -> Quote | None:
    """A function that computes what an enqueue would cost; None if that need not be known, because it costs nothing or
    no key with limited dollars pays.

    While the collection is being re-embedded, what is embedded into its other spaces is counted too.
    """
    if not spends.is_limited(conn):
        return None
    wanted = [(spec, route, choice, on_long), *_beside(conn, settings, collection, spec)]
    asked = [(EstimateRequest(to, by, None, long), lane.route) for to, by, lane, long in wanted if lane.route.is_paid]
    return partial(_quote, db, settings, asked) if asked else None


def usd_of(lane: LaneEstimate) -> Decimal:
    """US dollars of a lane; 0 if its model has no price, because nothing is booked then.

    Raises :class:`InvalidSetting` if tokens cannot be counted here.
    """
    if lane.tokens is None:
        raise InvalidSetting(f"what this costs must be known before it begins, and {lane.unknown}")
    return lane.usd or Decimal(0)


def _quote(db: sa.Engine, settings: Settings, asked: list[tuple[EstimateRequest, Route]], items: Items) -> Decimal:
    total = Decimal(0)
    for request, route in asked:
        lanes = estimate(db, settings, request, items()).lanes
        total += usd_of(next(lane for lane in lanes if lane.route is route))
    return total


def _beside(
    conn: sa.Connection, settings: Settings, name: str, spec: SpaceSpec
) -> list[tuple[SpaceSpec, Route, Choice, OnLong]]:
    """The other spaces into which the enqueue embeds, as ``beside.open_beside`` chooses their lanes."""
    collection = collections.resolve(conn, name)
    if collection is None:
        return []
    lives = others.of(conn, collection.id)
    wanted = []
    for space_id in sorted(lives.ids):
        space = registry.get_if_readable(conn, space_id)
        if space is None or space.spec.fingerprint == spec.fingerprint:
            continue
        other = lives.others.get(space_id)
        try:
            route, choice = beside.choose(conn, settings, space.spec, None if other is None else other.reembedding_id)
        except ChunkmillError:
            continue  # a poller embeds it, for the re-embedding
        on_long = OnLong(other.on_long) if other is not None and other.on_long else space.spec.long_text.policy
        wanted.append((space.spec, route, choice, on_long))
    return wanted
