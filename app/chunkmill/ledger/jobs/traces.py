"""A job's trace context, kept while its producer traces. One query where that is so, none where it is not."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

MOST_LINKS = 32
"""Of a ProviderBatch, which may carry contents of many jobs."""


def keep(conn: sa.Connection, job_id: int, traceparent: str | None) -> None:
    """The first one stays: a producer that comes again under its idempotency key goes on with the same job."""
    if traceparent is not None and _is_there(conn):
        conn.execute(
            sa.text("INSERT INTO job_traces VALUES (:job_id, :traceparent) ON CONFLICT DO NOTHING"),
            {"job_id": job_id, "traceparent": traceparent},
        )


def of_job(conn: sa.Connection, job_id: int) -> Sequence[str]:
    """One or none."""
    return _read(conn, "SELECT traceparent FROM job_traces WHERE job_id = :id", job_id)


def of_provider_batch(conn: sa.Connection, provider_batch_id: int) -> Sequence[str]:
    """Of the jobs whose contents it carries, at most ``MOST_LINKS``."""
    return _read(
        conn,
        "SELECT traceparent FROM job_traces WHERE job_id IN "
        f"(SELECT job_id FROM provider_inputs WHERE provider_batch_id = :id) ORDER BY job_id LIMIT {MOST_LINKS}",
        provider_batch_id,
    )


def _read(conn: sa.Connection, query: str, number: int) -> Sequence[str]:
    return conn.execute(sa.text(query), {"id": number}).scalars().all() if _is_there(conn) else ()


def _is_there(conn: sa.Connection) -> bool:
    """Not in the schema of the last release, on which this code runs too, for the time of an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('job_traces') IS NOT NULL")).scalar_one())
