"""The paid lanes: what all workers of one share. A row says why the lane waits, and until when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.lanes import PAID_ROUTES, Lane
from chunkmill.domain.reasons import storable
from chunkmill.domain.states import ProviderBatchState, Route
from chunkmill.ledger.money import adjustments

UNPROVED = "unproved"
"""The ``stop_code`` of a lane that is not stopped, and that failed or was stopped before: a probe comes first."""
BURST_SECONDS = 10.0
"""The part of a minute's quota that may be sent at once. It is small because providers also count over times shorter
than a minute."""

LEARNT_SECONDS = 24 * 3600.0
"""For how long a limit of tokens that was learnt from a refusal is used. It expires because another program may have
filled the queue."""

# The columns of `max_tokens` are read in a way that also works on the schema of the last release, which has none.
_SELECT = """
    SELECT route,
           CASE WHEN paused_until > now() THEN paused_until END AS paused_until,
           CASE WHEN paused_until > now() THEN pause_reason END AS pause_reason,
           stopped_at, CASE WHEN stopped_at IS NOT NULL THEN stop_code END AS stop_code, stop_reason, held_reason,
           max_inputs,
           CASE
               WHEN (to_jsonb(l) ->> 'max_tokens_until')::timestamptz > now()
               THEN (to_jsonb(l) ->> 'max_tokens')::bigint
           END AS max_tokens
    FROM provider_lanes l
    WHERE CAST(:route AS text) IS NULL OR route = :route
"""


def lanes(conn: sa.Connection) -> list[Lane]:
    """All paid lanes, including those that nobody has used yet, with what they lost this month."""
    rows = {row.route: row for row in conn.execute(sa.text(_SELECT), {"route": None})}
    by_state = conn.execute(
        sa.text("SELECT state, count(*) AS n FROM provider_batches WHERE state <> :closed GROUP BY state"),
        {"closed": ProviderBatchState.CLOSED},
    )
    counts = {row.state: row.n for row in by_state}
    listed = [_lane(route, rows.get(route), counts if route is Route.OPENAI else None) for route in PAID_ROUTES]
    sums = [adjustments.month_adjusted(conn, lane.route) for lane in listed]
    return [
        replace(lane, lost_usd=adjusted.lost, maybe_charged_usd=adjusted.maybe_charged)
        for lane, adjusted in zip(listed, sums, strict=True)
    ]


def lane(conn: sa.Connection, route: Route) -> Lane:
    """One paid lane, without the count of its ProviderBatches and what it lost."""
    return _lane(route, conn.execute(sa.text(_SELECT), {"route": route}).one_or_none(), None)


def pause(conn: sa.Connection, route: Route, *, seconds: float, reason: str) -> None:
    """Let all workers of a lane wait, because a limit is not a failure. A longer pause that is under way stays."""
    _add_row(conn, route)
    conn.execute(
        sa.text("""
            UPDATE provider_lanes
            SET paused_until = now() + make_interval(secs => :seconds), pause_reason = :reason
            WHERE route = :route
              AND (paused_until IS NULL OR paused_until < now() + make_interval(secs => :seconds))
        """),
        {"route": route, "seconds": seconds, "reason": storable(reason, 500)},
    )


def pause_failing(conn: sa.Connection, route: Route, *, seconds: float, reason: str) -> None:
    """Let all workers of a lane wait whose requests get no answers. After the pause a probe must succeed first."""
    pause(conn, route, seconds=seconds, reason=reason)
    conn.execute(
        sa.text("UPDATE provider_lanes SET stop_code = :unproved WHERE stopped_at IS NULL AND route = :route"),
        {"route": route, "unproved": UNPROVED},
    )


def is_unproved(conn: sa.Connection, route: Route) -> bool:
    """Whether the lane failed or was stopped, and no probe has succeeded since."""
    query = "SELECT stop_code = :unproved AND stopped_at IS NULL FROM provider_lanes WHERE route = :route"
    return bool(conn.execute(sa.text(query), {"route": route, "unproved": UNPROVED}).scalar_one_or_none())


def prove(conn: sa.Connection, route: Route) -> None:
    """A probe has succeeded: the lane takes work as before."""
    conn.execute(
        sa.text("UPDATE provider_lanes SET stop_code = NULL WHERE route = :route AND stop_code = :unproved"),
        {"route": route, "unproved": UNPROVED},
    )


def stop(conn: sa.Connection, route: Route, *, code: str, reason: str) -> bool:
    """Spend no more on the lane until somebody resumes it. Returns False if it was stopped already."""
    _add_row(conn, route)
    result = conn.execute(
        sa.text("""
            UPDATE provider_lanes
            SET stopped_at = now(), stop_code = :code, stop_reason = :reason
            WHERE route = :route AND stopped_at IS NULL
        """),
        {"route": route, "code": storable(code), "reason": storable(reason, 500)},
    )
    return result.rowcount == 1


def resume(conn: sa.Connection, route: Route) -> bool:
    """Let the lane take work again, and forget what its provider's refusals have taught.

    After a stop, a probe comes before anything else. Returns False if there was nothing to do.
    """
    result = conn.execute(
        sa.text("""
            UPDATE provider_lanes
            SET stopped_at = NULL, stop_reason = NULL, paused_until = NULL, pause_reason = NULL, max_inputs = NULL,
                stop_code = CASE WHEN stopped_at IS NULL THEN stop_code ELSE :unproved END
            WHERE route = :route AND (stopped_at IS NOT NULL OR paused_until > now() OR max_inputs IS NOT NULL)
        """),
        {"route": route, "unproved": UNPROVED},
    )
    return _forget_max_tokens(conn, route) or result.rowcount == 1


def _forget_max_tokens(conn: sa.Connection, route: Route) -> bool:
    if lane(conn, route).max_tokens is None:
        return False
    conn.execute(sa.text("UPDATE provider_lanes SET max_tokens_until = NULL WHERE route = :route"), {"route": route})
    return True


def hold(conn: sa.Connection, route: Route, reason: str | None) -> bool:
    """Note why the lane's work is held; None says that it is not held. Returns False if the note said so already."""
    if reason is not None:
        _add_row(conn, route)
    result = conn.execute(
        sa.text("""
            UPDATE provider_lanes
            SET held_reason = :reason
            WHERE route = :route AND held_reason IS DISTINCT FROM :reason
        """),
        {"route": route, "reason": reason},
    )
    return result.rowcount == 1


def learn_max_inputs(conn: sa.Connection, route: Route, inputs: int) -> None:
    """Make smaller ProviderBatches from now on: the provider refused one as too large."""
    _add_row(conn, route)
    conn.execute(
        sa.text("UPDATE provider_lanes SET max_inputs = least(max_inputs, :inputs) WHERE route = :route"),
        {"route": route, "inputs": max(1, inputs)},
    )


def learn_max_tokens(conn: sa.Connection, route: Route, tokens: int) -> None:
    """Have at most this many tokens at the provider for a day, because it refused more. A lower limit that was learnt
    before stays.
    """
    _add_row(conn, route)
    conn.execute(
        sa.text("""
            UPDATE provider_lanes
            SET max_tokens = CASE WHEN max_tokens_until > now() THEN least(max_tokens, :tokens) ELSE :tokens END,
                max_tokens_until = now() + make_interval(secs => :seconds)
            WHERE route = :route
        """),
        {"route": route, "tokens": max(1, tokens), "seconds": LEARNT_SECONDS},
    )


def take_turn(
    conn: sa.Connection, route: Route, *, tokens: int, requests_per_minute: int, tokens_per_minute: int
) -> float:
    """Reserve one request of ``tokens`` and return how many seconds to wait before it is sent.

    All workers share one pace, by the generic cell rate algorithm with a short burst. 0 per minute means no limit.
    """
    if not requests_per_minute and not tokens_per_minute:
        return 0.0
    _add_row(conn, route)
    seconds = conn.execute(
        sa.text("""
            UPDATE provider_lanes
            SET next_request_at = greatest(next_request_at, now()) + make_interval(secs => :request),
                next_token_at = greatest(next_token_at, now()) + make_interval(secs => :tokens)
            WHERE route = :route
            RETURNING extract(epoch FROM greatest(
                next_request_at - make_interval(secs => :request), next_token_at - make_interval(secs => :tokens)
            ) - now())
        """),
        {
            "route": route,
            "request": 60 / requests_per_minute if requests_per_minute else 0.0,
            "tokens": 60 * tokens / tokens_per_minute if tokens_per_minute else 0.0,
        },
    ).scalar_one()
    return max(0.0, float(seconds) - BURST_SECONDS)


def _lane(route: Route, row: sa.Row[Any] | None, open_batches: Mapping[str, int] | None) -> Lane:
    if row is None:
        return Lane(route, open=open_batches)
    return Lane(
        route,
        row.paused_until,
        row.pause_reason,
        row.stopped_at,
        row.stop_code,
        row.stop_reason,
        row.held_reason,
        row.max_inputs,
        open_batches,
        max_tokens=row.max_tokens,
    )


def _add_row(conn: sa.Connection, route: Route) -> None:
    conn.execute(sa.text("INSERT INTO provider_lanes (route) VALUES (:route) ON CONFLICT DO NOTHING"), {"route": route})
