"""What a re-embedding would take, said before it begins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.client.estimate import EstimateRequest, LaneCounter
from chunkmill.domain.costs import USD_PLACES, LaneEstimate
from chunkmill.domain.reembedding import Plan, Quote
from chunkmill.domain.serving import GRAPH_ROWS, MIN_ROWS
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.errors import InvalidInput
from chunkmill.ledger.jobs import routing
from chunkmill.ledger.money import budget, charges
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry

SAMPLE = 20_000
"""The tokens of at most this many texts are counted, which takes a few seconds. Their sum is then known to about 1
%."""
PAGE = 1_000
"""How many texts are read and counted at a time."""
ROW_BYTES = 150
"""About how many bytes a vector takes besides its numbers: the row, its hash, and its entry in the primary key."""
SEGMENT_ROW_BYTES = 72
"""The same for a row of a segment, which has no key."""
GRAPH_BYTES = 1.25
"""The graph of a segment takes about this many times the bytes of its rows' vectors (measured at 384 dimensions)."""


def quote(db: sa.Engine, settings: Settings, collection: str, spec: SpaceSpec, plan: Plan) -> Quote:
    """What it would take to move a collection to the space of ``spec``. Nothing is written.

    Memory is that of one page of texts. Raises :class:`NotFound`, :class:`InvalidInput` if the collection is in the
    space already, and :class:`UnknownRoute`.
    """
    with db.begin() as conn:
        row = collections.find(conn, collection)
        old = registry.get(conn, row.space_id)
        space = registry.find(conn, spec.fingerprint)
        if old.spec.fingerprint == spec.fingerprint:
            raise InvalidInput(
                f"collection {collection!r} is in the space of {spec.model!r} already, with the same dimensions, "
                "precision and on_long. Name another model, or change one of these."
            )
        choice = routing.decide(conn, settings, spec, plan.route)
        counts = _count(conn, row.id, space)
    to_embed = counts.contents - counts.cached - counts.in_flight
    request = EstimateRequest(spec, plan.route, None, OnLong(plan.on_long))
    counters = [LaneCounter(route, settings, request) for route in routing.lanes_of(settings, spec)]
    sampled = 0
    for texts in _sample(db, row.id, space):
        counted: dict[object, tuple[int, int]] = {}  # both paid lanes count tokens in the same way
        for counter in counters:
            counter.add(texts, counted)
        sampled += len(texts)
    with db.begin() as conn:
        price = charges.price_today(conn, model_for(settings, spec))
        rate = routing.seconds_per_token(conn, spec)
        lanes = [counter.estimate(price, rate) for counter in counters]
        money = budget.read(conn, settings)
    scale = Decimal(to_embed) / sampled if sampled else Decimal(0)
    number = 2 if settings.vector_storage == "halfvec" else 4
    return Quote(
        collection=row.name,
        from_space=old.spec.fingerprint,
        from_model=old.spec.model,
        to_space=spec.fingerprint,
        to_model=spec.model,
        dimensions=spec.dimensions,
        chunks=counts.chunks,
        contents=counts.contents,
        cached=counts.cached,
        in_flight=counts.in_flight,
        to_embed=to_embed,
        sampled=sampled,
        route=choice.route,
        because=choice.because,
        lanes=tuple(_scaled(lane, scale) for lane in lanes),
        vector_bytes=to_embed * (spec.dimensions * number + ROW_BYTES),
        index_bytes=_index_bytes(counts.contents, spec.dimensions),
        kept_bytes=counts.contents * (old.spec.dimensions * (2 if old.is_half else 4) + ROW_BYTES)
        + _index_bytes(counts.contents, old.spec.dimensions),
        keep_days=plan.keep_days,
        budget=money,
    )


def _scaled(lane: LaneEstimate, scale: Decimal) -> LaneEstimate:
    """The estimate of all texts, from that of the sample."""
    return replace(
        lane,
        tokens=None if lane.tokens is None else round(lane.tokens * scale),
        refused=None if lane.refused is None else round(lane.refused * scale),
        usd=None if lane.usd is None else (lane.usd * scale).quantize(USD_PLACES),
        seconds=None if lane.seconds is None else lane.seconds * float(scale),
    )


def _index_bytes(contents: int, dimensions: int) -> int:
    if contents < MIN_ROWS:
        return 0
    rows = contents * (2 * dimensions + SEGMENT_ROW_BYTES)
    return round(rows * (1 + GRAPH_BYTES)) if contents >= GRAPH_ROWS else rows


def _count(conn: sa.Connection, collection_id: int, space: registry.Space | None) -> sa.Row[tuple[int, int, int, int]]:
    """``(chunks, contents, cached, in_flight)``. It reads the keys of all chunks."""
    conn.execute(sa.text("SET LOCAL statement_timeout = 0"))
    if space is None:
        query = """
            SELECT count(*) AS chunks, count(DISTINCT content_hash) AS contents, 0 AS cached, 0 AS in_flight
            FROM chunks
            WHERE collection_id = :collection
        """
        return conn.execute(sa.text(query), {"collection": collection_id}).one()
    query = f"""
        SELECT coalesce(sum(c.n), 0)::bigint AS chunks, count(*) AS contents, count(v.content_hash) AS cached,
               count(i.content_hash) FILTER (WHERE v.content_hash IS NULL) AS in_flight
        FROM (
            SELECT content_hash, count(*) AS n
            FROM chunks
            WHERE collection_id = :collection
            GROUP BY content_hash
        ) c
        LEFT JOIN {space.table_name} v ON v.content_hash = c.content_hash
        LEFT JOIN provider_inputs i ON i.space_id = :space AND i.content_hash = c.content_hash
    """
    return conn.execute(sa.text(query), {"collection": collection_id, "space": space.id}).one()


def _sample(db: sa.Engine, collection_id: int, space: registry.Space | None) -> Iterator[Sequence[tuple[bytes, str]]]:
    """``(hash, text)`` of the first contents, ordered by hash, that have to be embedded. A hash is as good as a random
    number, so they are a random sample.
    """
    query = """
        SELECT c.content_hash, t.text
        FROM (
            SELECT DISTINCT c.content_hash
            FROM chunks c
            WHERE c.collection_id = :collection AND c.content_hash > :after
            ORDER BY c.content_hash
            LIMIT :page
        ) c
        JOIN contents t ON t.content_hash = c.content_hash
        ORDER BY c.content_hash
    """
    if space is not None:
        query = f"""
            SELECT c.content_hash, t.text
            FROM (
                SELECT DISTINCT c.content_hash
                FROM chunks c
                WHERE c.collection_id = :collection AND c.content_hash > :after
                  AND NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = c.content_hash)
                  AND NOT EXISTS (
                      SELECT FROM provider_inputs i WHERE i.space_id = :space AND i.content_hash = c.content_hash)
                ORDER BY c.content_hash
                LIMIT :page
            ) c
            JOIN contents t ON t.content_hash = c.content_hash
            ORDER BY c.content_hash
        """
    after = b""
    for _ in itertools.repeat(None, SAMPLE // PAGE):
        with db.begin() as conn:
            parameters = {"collection": collection_id, "after": after, "page": PAGE}
            if space is not None:
                parameters["space"] = space.id
            rows = conn.execute(sa.text(query), parameters).all()
        if not rows:
            return
        after = rows[-1].content_hash
        yield [(row.content_hash, row.text) for row in rows]
