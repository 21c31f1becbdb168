"""What each key used in a month, exactly, however many gateways book at once.

A request reserves what it may use before anything is computed for it, under the lock of the key's row, and gives back
what it did not use. If a gateway is killed in between, its reservation counts as used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.keys import KeyLimits

# Rows are made and locked in the order of their keys, so that two gateways never wait for each other in a circle.
# A key that is not there any more, as after a backup was restored, must not keep the others from being booked.
_MAKE = sa.text("""
INSERT INTO api_key_usage (key_id, month)
SELECT wanted.key_id, wanted.month
FROM unnest(CAST(:ids AS bigint[]), CAST(:months AS date[])) AS wanted (key_id, month)
JOIN api_keys k ON k.id = wanted.key_id
ORDER BY wanted.key_id, wanted.month
ON CONFLICT (key_id, month) DO NOTHING
""")
_LOCK = sa.text("""
SELECT u.key_id, u.month, u.requests, u.tokens, u.usd
FROM api_key_usage u
JOIN unnest(CAST(:ids AS bigint[]), CAST(:months AS date[])) AS wanted (key_id, month)
    ON wanted.key_id = u.key_id AND wanted.month = u.month
ORDER BY u.key_id, u.month
FOR UPDATE OF u
""")
_ADD = sa.text("""
UPDATE api_key_usage u
SET requests = u.requests + added.requests, tokens = u.tokens + added.tokens, usd = u.usd + added.usd
FROM unnest(
    CAST(:ids AS bigint[]), CAST(:months AS date[]), CAST(:requests AS bigint[]), CAST(:tokens AS bigint[]),
    CAST(:usd AS numeric[])
) AS added (key_id, month, requests, tokens, usd)
WHERE u.key_id = added.key_id AND u.month = added.month
""")


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request may use at most, and the limits of its key."""

    key_id: int
    limits: KeyLimits
    tokens: int
    usd: Decimal


@dataclass(frozen=True, slots=True)
class UsageBooking:
    """What is added to a key's month. Negative numbers give back what was reserved."""

    requests: int = 0
    tokens: int = 0
    usd: Decimal = Decimal(0)

    def plus(self, other: UsageBooking) -> UsageBooking:
        return UsageBooking(self.requests + other.requests, self.tokens + other.tokens, self.usd + other.usd)


Months = Mapping[tuple[int, date], UsageBooking]
"""By the id of the key and the first day of the month."""


def this_month(conn: sa.Connection) -> date:
    """The first day of the present month in UTC, by the clock of Postgres."""
    day: date = conn.execute(sa.text("SELECT date_trunc('month', now() AT TIME ZONE 'UTC')::date")).scalar_one()
    return day


def reserve(conn: sa.Connection, asked: Sequence[Demand]) -> tuple[date, list[str | None]]:
    """The month, and for each request None if it is reserved, else the limit that it would exceed: ``tokens`` or
    ``usd``.

    Requests of one key are served in order, so a smaller one may fit after a larger one did not. For a key that is not
    in the database nothing is booked.
    """
    month = this_month(conn)
    used = _locked(conn, {(one.key_id, month) for one in asked})
    added: dict[tuple[int, date], UsageBooking] = {}
    verdicts = []
    for one in asked:
        key = (one.key_id, month)
        together = used.get(key, UsageBooking()).plus(added.get(key, UsageBooking()))
        verdict = _against(one, together)
        if verdict is None:
            added[key] = added.get(key, UsageBooking()).plus(UsageBooking(0, one.tokens, one.usd))
        verdicts.append(verdict)
    _add(conn, added)
    return month, verdicts


def book(conn: sa.Connection, booked: Months) -> None:
    """Add to the months of keys. What belongs to a key that is not in the database any more is left out."""
    _locked(conn, booked.keys())
    _add(conn, booked)


def _locked(conn: sa.Connection, wanted: Collection[tuple[int, date]]) -> dict[tuple[int, date], UsageBooking]:
    """What is booked in the months so far. Their rows stay locked until the transaction ends."""
    parameters = {"ids": [key_id for key_id, _ in wanted], "months": [month for _, month in wanted]}
    conn.execute(_MAKE, parameters)
    rows = conn.execute(_LOCK, parameters)
    return {(row.key_id, row.month): UsageBooking(row.requests, row.tokens, row.usd) for row in rows}


def _add(conn: sa.Connection, booked: Months) -> None:
    if not booked:
        return
    parameters = {
        "ids": [key_id for key_id, _ in booked],
        "months": [month for _, month in booked],
        "requests": [one.requests for one in booked.values()],
        "tokens": [one.tokens for one in booked.values()],
        "usd": [one.usd for one in booked.values()],
    }
    conn.execute(_ADD, parameters)


def _against(one: Demand, used: UsageBooking) -> str | None:
    limits = one.limits
    if limits.tokens_per_month is not None and used.tokens + one.tokens > limits.tokens_per_month:
        return "tokens"
    # A key whose dollars are used up still embeds what costs nothing.
    if limits.usd_per_month is not None and one.usd > 0 and used.usd + one.usd > limits.usd_per_month:
        return "usd"
    return None
