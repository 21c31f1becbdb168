"""How the work went over the last hours or days, read from the ledger as it is: nothing is written for it but minutes.

What was pruned is not seen any more. Every statement groups in Postgres, so that the answer stays small however much
work there was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import sqlalchemy as sa

from chunkmill.domain.states import ChunkBatchState, Route
from chunkmill.monitor import minutes
from chunkmill.monitor.snapshot import LANES

PARTS = 120
"""Into how many parts of equal length the time is cut. Two stand in one column of a terminal with 80."""
TIMEOUT = "60s"


@dataclass(frozen=True, slots=True)
class History:
    """What happened in each of ``PARTS`` parts of the time from ``begin`` on, which are ``part_seconds`` long.

    A lane is missing if there was nothing on it.
    """

    begin: datetime
    part_seconds: float
    tokens: Mapping[Route, Sequence[float]]
    """Tokens that were embedded. Those of an attempt are spread evenly over the parts from its begin to its end."""
    waits: Mapping[Route, Sequence[float]]
    """How many seconds the ChunkBatch that waited longest for its first worker had waited, at its worst moment in the
    part."""
    padding: Sequence[float | None]
    """Which share of the computed tokens was padding, from 0 to 1; None if nothing was computed, or nobody looked."""

    @property
    def moments(self) -> list[datetime]:
        """When each part begins."""
        return [self.begin + timedelta(seconds=i * self.part_seconds) for i in range(len(self.padding))]

    def tokens_per_s(self, lane: Route) -> list[float]:
        """The rate of a lane in each part."""
        return [tokens / self.part_seconds for tokens in self.tokens[lane]]


class Span(NamedTuple):
    """Attempts that began and ended in the same parts. A part before the begin has a number below 0."""

    lane: Route
    first: int
    last: int
    tokens: int


class WaitCounts(NamedTuple):
    """ChunkBatches that came in one part and were claimed in another; ``last`` is ``PARTS`` if they still wait.

    ``came`` is the earliest moment in seconds after the begin, and ``longest`` the longest wait until a claim.
    """

    lane: Route
    first: int
    last: int
    came: float
    longest: float


_MOMENT = sa.text("SELECT now()")

# An attempt whose lease was lost has no end, and nobody knows how long it went on: its tokens count when it began.
_TOKENS = sa.text(
    """
    WITH attempts AS (
        SELECT
            b.route,
            u.tokens,
            u.created_at,
            CASE
                WHEN u.ended_at IS NOT NULL THEN u.ended_at
                WHEN b.state = :running AND b.attempt = u.attempt THEN CAST(:until AS timestamptz)
                ELSE u.created_at
            END AS ended_at
        FROM usage u
        JOIN chunk_batches b ON b.id = u.chunk_batch_id
        WHERE u.tokens > 0
    )
    SELECT
        route,
        greatest(-:parts, floor(extract(epoch FROM created_at - CAST(:begin AS timestamptz)) / :seconds))::int AS first,
        least(:parts - 1, floor(extract(epoch FROM ended_at - CAST(:begin AS timestamptz)) / :seconds))::int AS last,
        sum(tokens)::bigint AS tokens
    FROM attempts
    WHERE ended_at >= :begin
    GROUP BY 1, 2, 3
    """
)

# A ChunkBatch that ended without an attempt, because its job was cancelled for instance, waited until then.
_WAITS = sa.text(
    """
    WITH waited AS (
        SELECT
            b.route,
            b.created_at,
            CASE
                WHEN u.created_at IS NOT NULL THEN u.created_at
                WHEN b.state = ANY (:open) THEN NULL
                ELSE coalesce(b.finished_at, b.created_at)
            END AS claimed_at
        FROM chunk_batches b
        LEFT JOIN usage u ON u.chunk_batch_id = b.id AND u.attempt = 1
    )
    SELECT
        route,
        greatest(-1, floor(extract(epoch FROM created_at - CAST(:begin AS timestamptz)) / :seconds))::int AS first,
        least(:parts, coalesce(floor(extract(epoch FROM claimed_at - CAST(:begin AS timestamptz)) / :seconds), :parts))
            ::int AS last,
        extract(epoch FROM min(created_at) - CAST(:begin AS timestamptz))::float8 AS came,
        coalesce(extract(epoch FROM max(claimed_at - created_at)), 0)::float8 AS longest
    FROM waited
    WHERE claimed_at IS NULL OR claimed_at >= :begin
    GROUP BY 1, 2, 3
    """
)

_PADDING = sa.text(
    """
    SELECT
        floor(extract(epoch FROM minute - CAST(:begin AS timestamptz)) / :seconds)::int AS part,
        sum(tokens)::bigint AS tokens,
        sum(padded_tokens)::bigint AS padded
    FROM engine_minutes
    WHERE minute >= :begin AND minute < :until
    GROUP BY 1
    ORDER BY 1
    """
)

# What was begun earlier and went on into the time that is asked for, went on from its begin.
_FIRST = sa.text(
    """
    SELECT extract(epoch FROM now() - min(came))::float8
    FROM (
        SELECT greatest(created_at, CAST(:begin AS timestamptz)) AS came
        FROM chunk_batches
        WHERE created_at >= :begin OR finished_at >= :begin OR state = ANY (:open)
        UNION ALL
        SELECT created_at FROM usage WHERE created_at >= :begin
    ) AS work
    """
)
SHORTEST = 600.0


def seconds_of_work(conn: sa.Connection, most: float) -> float:
    """How long ago the first work of the last ``most`` seconds was: at least ten minutes, and ``most`` without any.

    A drawing of a whole day shows little of an installation that is an hour old.
    """
    _bound(conn)
    begin = conn.execute(_MOMENT).scalar_one() - timedelta(seconds=most)
    known = {"begin": begin, "open": [ChunkBatchState.AVAILABLE, ChunkBatchState.RUNNING]}
    passed: float | None = conn.execute(_FIRST, known).scalar_one()
    if passed is None:
        return most
    step = 60.0 if passed < 2 * 3600 else 3600.0
    return min(most, max(SHORTEST, math.ceil(1.02 * passed / step) * step))


def _bound(conn: sa.Connection) -> None:
    """No statement of this transaction may take longer than a minute: they read whole tables of the ledger."""
    conn.execute(sa.text("SELECT set_config('statement_timeout', :timeout, true)"), {"timeout": TIMEOUT})


def read(conn: sa.Connection, seconds: float) -> History:
    """What happened in the last ``seconds``.

    It reads all attempts and ChunkBatches that are not pruned, once. No statement may take longer than a minute.
    """
    _bound(conn)
    until: datetime = conn.execute(_MOMENT).scalar_one()
    begin = until - timedelta(seconds=seconds)
    known = {"begin": begin, "until": until, "seconds": seconds / PARTS, "parts": PARTS}
    attempts = conn.execute(_TOKENS, {**known, "running": ChunkBatchState.RUNNING})
    spans = [Span(Route(row.route), row.first, row.last, row.tokens) for row in attempts]
    open_states = [ChunkBatchState.AVAILABLE, ChunkBatchState.RUNNING]
    batches = conn.execute(_WAITS, {**known, "open": open_states})
    waits = [WaitCounts(Route(row.route), row.first, row.last, row.came, row.longest) for row in batches]
    padding: list[float | None] = [None] * PARTS
    if minutes.are_kept(conn):
        # A minute may be longer than a part.
        length = max(1, math.ceil(minutes.MINUTE_SECONDS / (seconds / PARTS)))
        for row in conn.execute(_PADDING, known):
            for part in range(row.part, min(row.part + length, PARTS)):
                padding[part] = max(0.0, 1 - row.tokens / row.padded)
    return History(begin, seconds / PARTS, spread(spans), longest(waits, seconds / PARTS), padding)


def spread(spans: Iterable[Span]) -> dict[Route, list[float]]:
    """The tokens of each part, by lane."""
    tokens: dict[Route, list[float]] = {}
    for lane, first, last, number in spans:
        of_lane = tokens.setdefault(lane, [0.0] * PARTS)
        for part in range(max(first, 0), last + 1):
            of_lane[part] += number / (last + 1 - first)
    return _in_order(tokens)


def longest(waits: Iterable[WaitCounts], part_seconds: float) -> dict[Route, list[float]]:
    """The longest wait in each part, by lane."""
    worst: dict[Route, list[float]] = {}
    for lane, first, last, came, waited in waits:
        of_lane = worst.setdefault(lane, [0.0] * PARTS)
        for part in range(max(first, 0), min(last, PARTS - 1) + 1):
            # Who is claimed in this part has waited longest at that moment, and who is not, at its end.
            age = waited if part == last else (part + 1) * part_seconds - came
            of_lane[part] = max(of_lane[part], age)
    return _in_order(worst)


def _in_order(lanes: Mapping[Route, list[float]]) -> dict[Route, list[float]]:
    return {lane: lanes[lane] for lane in LANES if lane in lanes and any(lanes[lane])}
