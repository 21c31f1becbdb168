"""What providers charged: booked once, with the vectors it paid for, and read back as sums.

A day and a month are of UTC, by the clock of Postgres: the provider's invoice is so too, and a producer's clock may
be anything.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.costs import Cost, CostsBy
from chunkmill.domain.states import Route

TODAY = "(now() AT TIME ZONE 'UTC')::date"
MONTH = f"date_trunc('month', {TODAY})::date"


def book(
    conn: sa.Connection,
    *,
    route: Route,
    space_id: int,
    job_id: int,
    provider_batch_id: int,
    contents: int,
    tokens: int,
    usd: Decimal,
) -> None:
    """Add to today's charge. Call it in the transaction that writes the vectors: both are there, or neither.

    ``job_id`` 0: somebody who waited, as for a search. ``provider_batch_id`` 0: plain requests.
    """
    conn.execute(
        sa.text(
            "INSERT INTO charges AS c (day, route, space_id, job_id, provider_batch_id, contents, tokens, usd) "
            f"VALUES ({TODAY}, :route, :space, :job, :provider_batch, :contents, :tokens, :usd) "
            "ON CONFLICT (day, route, space_id, job_id, provider_batch_id) DO UPDATE SET "
            "contents = c.contents + excluded.contents, tokens = c.tokens + excluded.tokens, "
            "usd = c.usd + excluded.usd"
        ),
        {
            "route": route,
            "space": space_id,
            "job": job_id,
            "provider_batch": provider_batch_id,
            "contents": contents,
            "tokens": tokens,
            "usd": usd,
        },
    )


def today(conn: sa.Connection) -> date:
    """The day of a charge that is booked now."""
    day: date = conn.execute(sa.text(f"SELECT {TODAY}")).scalar_one()
    return day


def month_spent(conn: sa.Connection) -> Decimal:
    """US dollars charged in this calendar month."""
    spent = conn.execute(sa.text(f"SELECT coalesce(sum(usd), 0) FROM charges WHERE day >= {MONTH}")).scalar_one()
    return Decimal(spent)


def report(conn: sa.Connection, by: CostsBy, *, since: date | None, gpu_hour_usd: Decimal | None) -> tuple[Cost, ...]:
    """What was charged, and beside it what local workers embedded, per group and route."""
    rows = conn.execute(
        sa.text(
            "SELECT key, route, sum(contents)::bigint AS contents, sum(tokens)::bigint AS tokens, sum(usd) AS usd, "
            f"sum(engine_seconds) AS engine_seconds FROM (SELECT {_KEYS[by]} AS key, x.* FROM ("
            "  SELECT day, route, space_id, job_id, contents, tokens, usd, NULL::float8 AS engine_seconds FROM charges "
            "  UNION ALL SELECT (created_at AT TIME ZONE 'UTC')::date, 'local', space_id, job_id, contents, tokens, "
            "  NULL, engine_seconds FROM usage WHERE engine_seconds > 0 AND provider <> 'openai') x "
            "JOIN spaces s ON s.id = x.space_id WHERE CAST(:since AS date) IS NULL OR day >= :since) g "
            f"GROUP BY key, route ORDER BY {'min(job_id)' if by is CostsBy.JOB else 'key'}, route"
        ),
        {"since": since},
    )
    return tuple(
        Cost(
            row.key,
            Route(row.route),
            row.contents,
            row.tokens,
            row.usd if row.engine_seconds is None else _rent(row.engine_seconds, gpu_hour_usd),
            row.engine_seconds,
        )
        for row in rows
    )


_KEYS = {
    CostsBy.DAY: "to_char(x.day, 'YYYY-MM-DD')",
    CostsBy.MONTH: "to_char(x.day, 'YYYY-MM')",
    CostsBy.MODEL: "s.model",
    CostsBy.ROUTE: "x.route",
    CostsBy.JOB: "x.job_id::text",
}


def _rent(engine_seconds: float, gpu_hour_usd: Decimal | None) -> Decimal | None:
    """US dollars of so much of a machine's time."""
    return None if gpu_hour_usd is None else gpu_hour_usd * Decimal(engine_seconds) / 3600
