"""The part of the bill that no answer confirmed: what was lost, what may have been charged, and a person's corrections.

The budget counts it as it counts charges, because the provider's invoice may. On the schema of the last release there
is no table for it: then it is booked as a charge, so that it still counts.
"""

from __future__ import annotations

from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.costs import AdjustmentKind
from chunkmill.domain.prices import Price
from chunkmill.domain.states import Route
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


def month_adjusted(conn: sa.Connection) -> Decimal:
    """US dollars of all adjustments of this calendar month. Corrections may make it negative."""
    if not is_kept(conn):
        return Decimal(0)
    query = f"SELECT coalesce(sum(usd), 0) FROM adjustments WHERE day >= {charges.MONTH}"
    return Decimal(conn.execute(sa.text(query)).scalar_one())


def is_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('adjustments') IS NOT NULL")).scalar_one())
