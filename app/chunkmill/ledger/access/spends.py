"""What a key of the gateway spends on the jobs, served batches and re-embeddings that it begins.

The bill (``charges`` and ``adjustments``) names the job whose ChunkBatch sent a content, and a content is sent once for
all jobs that need it. So the key that began this job pays, and no other. A spend is what one such beginning costs: its
jobs, what they were expected to cost, what they were charged, and the months of the key in which these amounts count.

What is expected is reserved in the transaction that makes the job. From then on a poller lets the bill replace it, also
after the key was revoked. Work that no key began, such as a job of the command line, belongs to no spend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.budget import dollars
from chunkmill.domain.keys import KeyLimits
from chunkmill.errors import BudgetExceeded, InvalidInput
from chunkmill.ledger.access import usage
from chunkmill.ledger.access.usage import Demand

_PAYER: ContextVar[int | None] = ContextVar("chunkmill_payer", default=None)


class QuotaExceeded(BudgetExceeded):
    """The key has too few dollars left in this month."""

    code = "insufficient_quota"


@contextlib.contextmanager
def paid_by(key_id: int | None) -> Iterator[None]:
    """Whatever begins in this block, and in its tasks and threads, is paid for by this key; None means that no key
    pays.
    """
    token = _PAYER.set(key_id)
    try:
        yield
    finally:
        _PAYER.reset(token)


def payer() -> int | None:
    """The key that pays for what begins now."""
    return _PAYER.get()


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    query = "SELECT to_regclass(quote_ident(current_schema()) || '.api_key_spends') IS NOT NULL"
    return bool(conn.execute(sa.text(query)).scalar_one())


def is_limited(conn: sa.Connection) -> bool:
    """Whether the key that pays for what begins now has a monthly limit in dollars, so that the cost must be known
    first."""
    if payer() is None or not are_kept(conn):
        return False
    query = "SELECT EXISTS (SELECT FROM api_keys WHERE id = :key AND usd_per_month IS NOT NULL)"
    return bool(conn.execute(sa.text(query), {"key": payer()}).scalar_one())


def require_some_left(conn: sa.Connection) -> None:
    """Raise :class:`QuotaExceeded` if nothing is left of the present key's dollars of this month."""
    if not is_limited(conn):
        return
    query = """
        SELECT k.usd_per_month AS most
        FROM api_keys k
        LEFT JOIN api_key_usage u
            ON u.key_id = k.id AND u.month = date_trunc('month', now() AT TIME ZONE 'UTC')::date
        WHERE k.id = :key AND coalesce(u.usd, 0) >= k.usd_per_month
    """
    most = conn.execute(sa.text(query), {"key": payer()}).scalar_one_or_none()
    if most is not None:
        raise QuotaExceeded(
            f"this API key may use {most} US dollars a month (UTC), and nothing is left of this month. Wait for the "
            "next month, or use a route that costs nothing."
        )


# A key that is not in the table is one that a gateway on loopback made for itself, and has no limits.
_BEGIN = sa.text("""
INSERT INTO api_key_spends (key_id, reembedding_id, estimated)
SELECT id, :reembedding, :usd
FROM api_keys
WHERE id = :key
RETURNING id
""")
_ADD_JOB = sa.text("""
INSERT INTO api_key_spend_jobs (job_id, spend_id)
VALUES (:job, :spend)
""")
_RESERVED = sa.text("""
INSERT INTO api_key_spend_months (spend_id, month, charged, reserved)
VALUES (:spend, :month, 0, :usd)
""")


def begin(
    conn: sa.Connection, *, job_id: int | None = None, reembedding_id: int | None = None, usd: Decimal = Decimal(0)
) -> None:
    """Write down that the present key begins a job or a re-embedding, in the transaction that makes it, and reserve
    ``usd`` US dollars in this month (UTC). Nothing is done if no key begins it.

    Raises :class:`QuotaExceeded` if the month has too little left; what was made must not be committed then. The row of
    the key's month stays locked until the commit.
    """
    if payer() is None or not are_kept(conn):
        return
    parameters = {"key": payer(), "reembedding": reembedding_id, "usd": usd}
    spend = conn.execute(_BEGIN, parameters).scalar_one_or_none()
    if spend is None:
        return
    if job_id is not None:
        conn.execute(_ADD_JOB, {"job": job_id, "spend": spend})
    if not usd:
        return
    limit = _limit(conn)
    asked = Demand(payer() or 0, KeyLimits(usd_per_month=limit), 0, usd)
    month, (against,) = usage.reserve(conn, [asked])
    if against is not None:
        raise QuotaExceeded(
            f"this API key may use {limit} US dollars a month (UTC). What you ask for costs about {dollars(usd)}, and "
            "less is left of this month. Nothing was written. Ask for less, wait for the next month, or use a route "
            "that costs nothing."
        )
    conn.execute(_RESERVED, {"spend": spend, "month": month, "usd": usd})


def add_beside(conn: sa.Connection, job_id: int, *, beside: int) -> None:
    """Whoever pays for the job ``beside`` pays for ``job_id`` too, which embeds the same chunks into another space."""
    if payer() is None or not are_kept(conn):
        return
    insert = """
        INSERT INTO api_key_spend_jobs (job_id, spend_id)
        SELECT :job, spend_id
        FROM api_key_spend_jobs
        WHERE job_id = :beside
    """
    conn.execute(sa.text(insert), {"job": job_id, "beside": beside})


_OF_JOB = sa.text("""
SELECT s.id, s.key_id
FROM api_key_spend_jobs o
JOIN api_key_spends s ON s.id = o.spend_id
WHERE o.job_id = :job
FOR UPDATE OF s
""")
_STANDS = sa.text("""
SELECT k.usd_per_month AS most, u.usd AS used, m.reserved
FROM api_key_spends s
JOIN api_keys k ON k.id = s.key_id
JOIN api_key_spend_months m ON m.spend_id = s.id
JOIN api_key_usage u ON u.key_id = s.key_id AND u.month = m.month
WHERE s.id = :spend AND m.month = date_trunc('month', now() AT TIME ZONE 'UTC')::date
FOR UPDATE OF u
""")


def go_on(conn: sa.Connection, job_id: int, *, may_cost: bool) -> None:
    """The present key goes on with a job that had ended or lost its producer. Call it once the job is open again, in
    the same transaction: what it may still cost is reserved again.

    ``may_cost`` says whether a paid route serves the job. Then only the key that began it may go on, because it pays.
    Raises :class:`InvalidInput` if that is another key or none, and :class:`QuotaExceeded`. If no key asks, nothing is
    checked: a poller sees that the job is open again.
    """
    if payer() is None or not are_kept(conn) or not _is_stored(conn):
        return
    row = conn.execute(_OF_JOB, {"job": job_id}).one_or_none()
    if row is None or row.key_id != payer():
        if may_cost:
            raise InvalidInput(
                f"job {job_id} was not begun by this API key, and whoever began it would pay for what it costs. "
                "Enqueue the chunks again, with an idempotency key of your own: what is embedded is not embedded twice."
            )
        return
    settle(conn, row.id)
    stands = conn.execute(_STANDS, {"spend": row.id}).one_or_none()
    if stands is None or stands.most is None or not may_cost:
        return
    if stands.used > stands.most or (not stands.reserved and stands.used >= stands.most):
        raise QuotaExceeded(
            f"this API key may use {stands.most} US dollars a month (UTC), and there is too little left to go on with "
            f"job {job_id}. Nothing was changed. Wait for the next month."
        )


def due(conn: sa.Connection, *, again: bool) -> list[int]:
    """The spends to settle: the open ones, and with ``again`` those too whose bill has changed since their end."""
    return list(conn.execute(sa.text("SELECT due_api_key_spends(:again)"), {"again": again}).scalars())


def settle(conn: sa.Connection, spend_id: int) -> bool:
    """Replace what is reserved for a spend by what was charged so far. Returns whether all of its jobs have ended."""
    return bool(conn.execute(sa.text("SELECT settle_api_key_spend(:id)"), {"id": spend_id}).scalar_one())


def _limit(conn: sa.Connection) -> Decimal | None:
    query = "SELECT usd_per_month FROM api_keys WHERE id = :key"
    limit: Decimal | None = conn.execute(sa.text(query), {"key": payer()}).scalar_one()
    return limit


def _is_stored(conn: sa.Connection) -> bool:
    query = "SELECT EXISTS (SELECT FROM api_keys WHERE id = :key)"
    return bool(conn.execute(sa.text(query), {"key": payer()}).scalar_one())
