"""The part of the bill that no answer confirmed: what was lost, what may have been charged, and a person's corrections.

The budget counts it as it counts charges, because the provider's invoice may. On the schema of the last release there
is no table for it: then it is booked as a charge, so that it still counts.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any, Literal

import sqlalchemy as sa

from chunkmill.db.locks import BUDGET_LOCK, lock
from chunkmill.domain.costs import AdjustedSums, Adjustment, AdjustmentKind, Correction
from chunkmill.domain.prices import Price
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput, NotFound, StoreUnavailable
from chunkmill.ledger.money import charges


def add_tokens(
    conn: sa.Connection,
    price: Price | None,
    *,
    kind: AdjustmentKind,
    route: Route,
    space_id: int,
    job_id: int = 0,
    provider_batch_id: int = 0,
    contents: int,
    tokens: int,
    reason: str,
) -> None:
    """Book today what ``tokens`` cost on a route, or 0 dollars if the price is not known.

    ``reason`` is shown to people, and so it must hold neither a key nor a text.
    """
    if not is_kept(conn):
        charges.book_tokens(
            conn,
            price,
            route=route,
            space_id=space_id,
            job_id=job_id,
            provider_batch_id=provider_batch_id,
            contents=contents,
            tokens=tokens,
        )
        return
    conn.execute(
        sa.text(f"""
            INSERT INTO adjustments
                   (day, kind, route, space_id, job_id, provider_batch_id, contents, tokens, usd, reason)
            VALUES ({charges.TODAY}, :kind, :route, :space, :job, :provider_batch, :contents, :tokens, :usd, :reason)
        """),
        {
            "kind": kind,
            "route": route,
            "space": space_id,
            "job": job_id,
            "provider_batch": provider_batch_id,
            "contents": contents,
            "tokens": tokens,
            "usd": Decimal(0) if price is None else price.of(tokens, route),
            "reason": reason,
        },
    )


def month_adjusted(conn: sa.Connection, route: Route | None = None) -> AdjustedSums:
    """The adjustments of this calendar month, of one route or of all. Corrections may make their sum negative."""
    return _adjusted(conn, "month", route)


def day_adjusted(conn: sa.Connection) -> AdjustedSums:
    """The adjustments of today (UTC)."""
    return _adjusted(conn, "day", None)


def _adjusted(conn: sa.Connection, period: Literal["day", "month"], route: Route | None) -> AdjustedSums:
    """The adjustments of this day or month (UTC). No adjustment is of a later day."""
    if not is_kept(conn):
        return AdjustedSums()
    rows = conn.execute(
        sa.text(f"""
            SELECT kind, sum(usd) AS usd
            FROM adjustments
            WHERE day >= CAST(date_trunc(:period, {charges.TODAY}) AS date)
              AND (CAST(:route AS text) IS NULL OR route = :route)
            GROUP BY kind
        """),
        {"period": period, "route": route},
    )
    sums = {row.kind: row.usd for row in rows}
    return AdjustedSums(*(sums.get(kind, Decimal(0)) for kind in AdjustmentKind))


def listed(
    conn: sa.Connection, *, kind: AdjustmentKind | None, since: date | None, limit: int
) -> tuple[Adjustment, ...]:
    """Adjustments, the newest first: of one kind or of all, from the day ``since`` on."""
    if not is_kept(conn):
        return ()
    # The columns of corrections are read in this way because the schema of an earlier release has none of them.
    rows = conn.execute(
        sa.text("""
            SELECT a.id, a.created_at, a.day, a.kind, a.route, s.model, a.job_id, a.contents, a.tokens, a.usd, a.reason,
                   to_jsonb(a) ->> 'author' AS author, to_jsonb(a) ->> 'key' AS key
            FROM adjustments a
            LEFT JOIN spaces s ON s.id = a.space_id
            WHERE (CAST(:kind AS text) IS NULL OR a.kind = :kind) AND (CAST(:since AS date) IS NULL OR a.day >= :since)
            ORDER BY a.id DESC
            LIMIT :limit
        """),
        {"kind": kind, "since": since, "limit": limit},
    )
    return tuple(_adjustment(row) for row in rows)


def correct(
    conn: sa.Connection,
    usd: Decimal,
    *,
    route: Route,
    day: date,
    reason: str,
    author: str,
    key: str,
    model: str | None = None,
    job_id: int = 0,
) -> Correction:
    """Book a correction once. See :meth:`Client.correct_charge`, which also says what is raised."""
    if not keeps_keys(conn):
        raise StoreUnavailable("the database cannot keep corrections yet. Run: chunkmill migrate")
    lock(conn, BUDGET_LOCK)  # two corrections at once must not both take from the same sum
    given = {"day": day, "route": route, "job": job_id, "usd": usd, "reason": reason, "author": author, "key": key}
    booked = _of_key(conn, key)
    if booked is not None:
        same = (booked.day, booked.route, booked.job_id, booked.usd, booked.reason) == (day, route, job_id, usd, reason)
        if not same or model not in (None, booked.model):
            raise InvalidInput(
                f"key {key!r} is that of another correction: {booked.usd:f} USD on route {booked.route} on "
                f"{booked.day}, {booked.reason!r}. Give this one a key of its own."
            )
        return Correction(booked, is_new=False)
    if day > charges.today(conn):
        raise InvalidInput(f"the day of the correction is {day}, which has not begun (UTC).")
    there = conn.execute(_BOOKED_IN_MONTH, given).scalar_one()
    if there + usd < 0:
        whose = f" of job {job_id}" if job_id else ""
        raise InvalidInput(
            f"the correction takes back {-usd:f} USD, and only {there:f} USD are booked{whose} on route {route} in "
            f"{day:%Y-%m}. `chunkmill cost --by job --since {day.replace(day=1)}` shows what is booked."
        )
    conn.execute(_BOOK_CORRECTION, given | {"space": _space_of(conn, route, model, job_id), **_KINDS})
    now_booked = _of_key(conn, key)
    assert now_booked is not None  # noqa: S101 - it is in this transaction
    return Correction(now_booked, is_new=True)


_KINDS = {"kind": AdjustmentKind.CORRECTION}
# The sum is that of the whole month, because an invoice names no days.
_BOOKED_IN_MONTH = sa.text("""
SELECT coalesce(sum(usd), 0)
FROM (
    SELECT day, route, job_id, usd FROM charges
    UNION ALL
    SELECT day, route, job_id, usd FROM adjustments
) booked
WHERE date_trunc('month', day) = date_trunc('month', CAST(:day AS date))
  AND route = :route
  AND (:job = 0 OR job_id = :job)
""")
_BOOK_CORRECTION = sa.text("""
INSERT INTO adjustments
       (day, kind, route, space_id, job_id, provider_batch_id, contents, tokens, usd, reason, author, key)
VALUES (:day, :kind, :route, :space, :job, 0, 0, 0, :usd, :reason, :author, :key)
""")


def _space_of(conn: sa.Connection, route: Route, model: str | None, job_id: int) -> int:
    """A space of the model, or the one that the job was charged for; 0 if neither is given. Raises NotFound."""
    if model is not None:
        query = "SELECT min(id) FROM spaces WHERE model = :model"
    elif job_id:
        query = "SELECT max(space_id) FROM charges WHERE job_id = :job AND route = :route"
    else:
        return 0
    space_id = conn.execute(sa.text(query), {"model": model, "job": job_id, "route": route}).scalar_one()
    if space_id is None and model is not None:
        raise NotFound(f"there is no space of model {model!r}; `chunkmill models` lists them.")
    return space_id or 0


def _of_key(conn: sa.Connection, key: str) -> Adjustment | None:
    row = conn.execute(
        sa.text("""
            SELECT a.id, a.created_at, a.day, a.kind, a.route, s.model, a.job_id, a.contents, a.tokens, a.usd, a.reason,
                   a.author, a.key
            FROM adjustments a
            LEFT JOIN spaces s ON s.id = a.space_id
            WHERE a.key = :key
        """),
        {"key": key},
    ).one_or_none()
    return None if row is None else _adjustment(row)


def _adjustment(row: sa.Row[Any]) -> Adjustment:
    values = row._asdict()
    return Adjustment(**values | {"kind": AdjustmentKind(row.kind), "route": Route(row.route)})


def charged_or_lost(conn: sa.Connection) -> str:
    """A query for what is charged, as ``(provider_batch_id, day, tokens)``: the charges, and what is ``:lost``."""
    charged = "SELECT provider_batch_id, day, tokens FROM charges"
    if not is_kept(conn):
        return charged
    return f"{charged} UNION ALL SELECT provider_batch_id, day, tokens FROM adjustments WHERE kind = :lost"


def is_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return charges.keeps_adjustments(conn)


def keeps_keys(conn: sa.Connection) -> bool:
    """Whether the table has the columns of a correction."""
    query = "SELECT FROM pg_attribute WHERE attrelid = to_regclass('adjustments') AND attname = 'key'"
    return conn.execute(sa.text(query)).one_or_none() is not None
