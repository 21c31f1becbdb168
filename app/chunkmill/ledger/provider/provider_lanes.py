"""The lanes of the paid routes: what all workers of one share. A row says who waits for what, and for how long."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from chunkmill.domain.lanes import PAID_ROUTES, Lane
from chunkmill.domain.states import Route


def lanes(conn: sa.Connection) -> list[Lane]:
    """All paid lanes, also one that nobody has used yet."""
    rows = {row.route: row for row in conn.execute(sa.text(_SELECT))}
    by_state = conn.execute(
        sa.text("SELECT state, count(*) AS n FROM provider_batches WHERE state <> 'closed' GROUP BY state")
    )
    counts = {row.state: row.n for row in by_state}
    found = []
    for route in PAID_ROUTES:
        row = rows.get(route)
        opened = counts if route is Route.OPENAI else None
        found.append(Lane(route, open=opened) if row is None else _lane(row, opened))
    return found


def lane(conn: sa.Connection, route: Route) -> Lane:
    row = conn.execute(sa.text(f"{_SELECT} WHERE route = :route"), {"route": route}).one_or_none()
    return Lane(route) if row is None else _lane(row, None)


def pause(conn: sa.Connection, route: Route, *, seconds: float, reason: str) -> None:
    """All workers of the lane wait: a limit is no failure. A longer pause that is under way stays."""
    _make(conn, route)
    conn.execute(
        sa.text(
            "UPDATE provider_lanes SET paused_until = now() + make_interval(secs => :seconds), pause_reason = :reason "
            "WHERE route = :route AND (paused_until IS NULL OR paused_until < now() + make_interval(secs => :seconds))"
        ),
        {"route": route, "seconds": seconds, "reason": reason[:500]},
    )


def stop(conn: sa.Connection, route: Route, *, code: str, reason: str) -> bool:
    """Spend no more on the lane until somebody resumes it. False: it had been stopped before."""
    _make(conn, route)
    result = conn.execute(
        sa.text(
            "UPDATE provider_lanes SET stopped_at = now(), stop_code = :code, stop_reason = :reason "
            "WHERE route = :route AND stopped_at IS NULL"
        ),
        {"route": route, "code": code, "reason": reason[:500]},
    )
    return result.rowcount == 1


def resume(conn: sa.Connection, route: Route) -> bool:
    """Take work again. False: it was neither stopped nor paused."""
    result = conn.execute(
        sa.text(
            "UPDATE provider_lanes SET stopped_at = NULL, stop_code = NULL, stop_reason = NULL, paused_until = NULL, "
            "pause_reason = NULL WHERE route = :route AND (stopped_at IS NOT NULL OR paused_until > now())"
        ),
        {"route": route},
    )
    return result.rowcount == 1


def hold(conn: sa.Connection, route: Route, reason: str | None) -> bool:
    """Note why work waits, or with None that it does not. False: it said so before."""
    if reason is not None:
        _make(conn, route)
    result = conn.execute(
        sa.text(
            "UPDATE provider_lanes SET held_reason = :reason "
            "WHERE route = :route AND held_reason IS DISTINCT FROM :reason"
        ),
        {"route": route, "reason": reason},
    )
    return result.rowcount == 1


def learn_max_inputs(conn: sa.Connection, route: Route, inputs: int) -> None:
    """The provider found a batch too large; smaller ones from now on."""
    _make(conn, route)
    conn.execute(
        sa.text("UPDATE provider_lanes SET max_inputs = least(max_inputs, :inputs) WHERE route = :route"),
        {"route": route, "inputs": max(1, inputs)},
    )


def take_turn(
    conn: sa.Connection, route: Route, *, tokens: int, requests_per_minute: int, tokens_per_minute: int
) -> float:
    """Reserve one request of ``tokens`` and return how many seconds to wait before it is sent.

    One pace for all workers: the generic cell rate algorithm, with a short burst. 0 per minute: no pace of our own.
    """
    if not requests_per_minute and not tokens_per_minute:
        return 0.0
    _make(conn, route)
    row = conn.execute(
        sa.text(
            "UPDATE provider_lanes SET "
            "next_request_at = greatest(next_request_at, now()) + make_interval(secs => :request), "
            "next_token_at = greatest(next_token_at, now()) + make_interval(secs => :tokens) WHERE route = :route "
            "RETURNING extract(epoch FROM greatest(next_request_at - make_interval(secs => :request), "
            "next_token_at - make_interval(secs => :tokens)) - now())"
        ),
        {
            "route": route,
            "request": 60 / requests_per_minute if requests_per_minute else 0.0,
            "tokens": 60 * tokens / tokens_per_minute if tokens_per_minute else 0.0,
        },
    ).scalar_one()
    return max(0.0, float(row) - BURST_SECONDS)


BURST_SECONDS = 10.0
"""So much of a minute's quota may go out at once: providers count in windows shorter than a minute, too."""

_SELECT = (
    "SELECT route, CASE WHEN paused_until > now() THEN paused_until END AS paused_until, "
    "CASE WHEN paused_until > now() THEN pause_reason END AS pause_reason, stopped_at, stop_code, stop_reason, "
    "held_reason, max_inputs FROM provider_lanes"
)


def _lane(row: sa.Row[tuple[object, ...]], opened: Mapping[str, int] | None) -> Lane:
    return Lane(
        Route(row.route),
        row.paused_until,
        row.pause_reason,
        row.stopped_at,
        row.stop_code,
        row.stop_reason,
        row.held_reason,
        row.max_inputs,
        opened,
    )


def _make(conn: sa.Connection, route: Route) -> None:
    conn.execute(sa.text("INSERT INTO provider_lanes (route) VALUES (:route) ON CONFLICT DO NOTHING"), {"route": route})
