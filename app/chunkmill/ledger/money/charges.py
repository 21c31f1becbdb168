"""What providers charged, confirmed by their answers: booked once, with the vectors it paid for, and read as sums.

What no answer confirmed is in ``adjustments``.

Days and months are in UTC, by the clock of Postgres, because the provider's invoice is in UTC and a producer's clock
may show anything.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.costs import AdjustmentKind, Cost, CostsBy, machine_usd
from chunkmill.domain.prices import Price, price_on
from chunkmill.domain.providers import OPENAI, ProviderModel
from chunkmill.domain.states import Route

TODAY = "(now() AT TIME ZONE 'UTC')::date"
"""The day of a charge in SQL. Booking and summing must use the same day."""
MONTH = f"date_trunc('month', {TODAY})::date"
"""The first day of its month in SQL, for the same reason."""
NO_MODEL = "(no model)"
"""The key of corrections that name neither a model nor a job, if costs are summed by model."""


def today(conn: sa.Connection) -> date:
    """The day of a charge that is booked now."""
    day: date = conn.execute(sa.text(f"SELECT {TODAY}")).scalar_one()
    return day


def price_today(conn: sa.Connection, model: ProviderModel | None) -> Price | None:
    """The price of a charge that is booked now; None if there is no model or it has no price."""
    return None if model is None else price_on(model.prices, today(conn))


def book_tokens(
    conn: sa.Connection,
    price: Price | None,
    *,
    route: Route,
    space_id: int,
    job_id: int = 0,
    provider_batch_id: int = 0,
    contents: int,
    tokens: int,
) -> None:
    """Add to today's charge what ``tokens`` cost on a route, or 0 dollars if the price is not known. See ``book``."""
    usd = Decimal(0) if price is None else price.of(tokens, route)
    book(
        conn,
        route=route,
        space_id=space_id,
        job_id=job_id,
        provider_batch_id=provider_batch_id,
        contents=contents,
        tokens=tokens,
        usd=usd,
    )


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
    """Add to today's charge. Call it in the transaction that writes the vectors, so that either both are committed or
    neither is.

    ``job_id`` is 0 for a caller who waits for the answer, as a search does; ``provider_batch_id`` is 0 for plain
    requests.
    """
    conn.execute(
        sa.text(f"""
            INSERT INTO charges AS c (day, route, space_id, job_id, provider_batch_id, contents, tokens, usd)
            VALUES ({TODAY}, :route, :space, :job, :provider_batch, :contents, :tokens, :usd)
            ON CONFLICT (day, route, space_id, job_id, provider_batch_id) DO UPDATE
            SET contents = c.contents + excluded.contents,
                tokens = c.tokens + excluded.tokens,
                usd = c.usd + excluded.usd
        """),
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


def month_confirmed(conn: sa.Connection) -> Decimal:
    """US dollars of this calendar month that answers confirmed. Adjustments are not among them."""
    spent = conn.execute(sa.text(f"SELECT coalesce(sum(usd), 0) FROM charges WHERE day >= {MONTH}")).scalar_one()
    return Decimal(spent)


def report(conn: sa.Connection, by: CostsBy, *, since: date | None, gpu_hour_usd: Decimal | None) -> tuple[Cost, ...]:
    """What was charged or adjusted, and beside it what local workers embedded, per group and route."""
    adjusted = "SELECT day, route, space_id, job_id, 0, 0, usd, NULL, kind FROM adjustments"
    rows = conn.execute(
        sa.text(f"""
            WITH embedded AS (
                SELECT day, route, space_id, job_id, contents, tokens, usd, NULL::float8 AS engine_seconds,
                       NULL::text AS kind
                FROM charges
                {f"UNION ALL {adjusted}" if keeps_adjustments(conn) else ""}
                UNION ALL
                SELECT (created_at AT TIME ZONE 'UTC')::date, :local, space_id, job_id, contents, tokens, NULL,
                       engine_seconds, NULL
                FROM usage
                WHERE engine_seconds > 0 AND provider <> :openai
            ),
            grouped AS (
                SELECT CASE CAST(:by AS text)
                           WHEN 'day' THEN to_char(e.day, 'YYYY-MM-DD')
                           WHEN 'month' THEN to_char(e.day, 'YYYY-MM')
                           WHEN 'model' THEN coalesce(s.model, :no_model)
                           WHEN 'route' THEN e.route
                           WHEN 'job' THEN e.job_id::text
                       END AS key, e.*
                FROM embedded e
                LEFT JOIN spaces s ON s.id = e.space_id
                WHERE CAST(:since AS date) IS NULL OR e.day >= :since
            )
            SELECT key, route, sum(contents)::bigint AS contents, sum(tokens)::bigint AS tokens, sum(usd) AS usd,
                   sum(engine_seconds) AS engine_seconds,
                   coalesce(sum(usd) FILTER (WHERE kind = :lost), 0) AS lost,
                   coalesce(sum(usd) FILTER (WHERE kind = :maybe_charged), 0) AS maybe_charged,
                   coalesce(sum(usd) FILTER (WHERE kind = :correction), 0) AS corrected
            FROM grouped
            GROUP BY key, route
            ORDER BY CASE CAST(:by AS text) WHEN 'job' THEN min(job_id) END, key, route
        """),
        {
            "by": by,
            "since": since,
            "local": Route.LOCAL,
            "openai": OPENAI,
            "no_model": NO_MODEL,
            "lost": AdjustmentKind.LOST,
            "maybe_charged": AdjustmentKind.MAYBE_CHARGED,
            "correction": AdjustmentKind.CORRECTION,
        },
    )
    return tuple(
        Cost(
            row.key,
            Route(row.route),
            row.contents,
            row.tokens,
            row.usd if row.engine_seconds is None else machine_usd(row.engine_seconds, gpu_hour_usd),
            row.engine_seconds,
            row.lost,
            row.maybe_charged,
            row.corrected,
        )
        for row in rows
    )


def keeps_adjustments(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('adjustments') IS NOT NULL")).scalar_one())
