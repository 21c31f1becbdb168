"""A job's trace context, kept while its producer traces. Reading it costs one query more if the table is there."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

MOST_LINKS = 32
"""The most links to jobs in the span of one ProviderBatch, which may carry contents of many jobs."""


def keep(conn: sa.Connection, job_id: int, traceparent: str | None) -> None:
    """Store a job's trace context.

    The first one stays, because a producer that comes again under its idempotency key goes on with the same job.
    """
    if traceparent is not None and _is_there(conn):
        conn.execute(
            sa.text("INSERT INTO job_traces VALUES (:job_id, :traceparent) ON CONFLICT DO NOTHING"),
            {"job_id": job_id, "traceparent": traceparent},
        )


def of_job(conn: sa.Connection, job_id: int) -> Sequence[str]:
    """The trace context of a job, or an empty sequence."""
    if not _is_there(conn):
        return ()
    statement = sa.text("SELECT traceparent FROM job_traces WHERE job_id = :id")
    return conn.execute(statement, {"id": job_id}).scalars().all()


_OF_PROVIDER_BATCH = sa.text("""
SELECT traceparent
FROM job_traces
WHERE job_id IN (SELECT job_id FROM provider_inputs WHERE provider_batch_id = :id)
ORDER BY job_id
LIMIT :limit
""")


def of_provider_batch(conn: sa.Connection, provider_batch_id: int) -> Sequence[str]:
    """The trace contexts of the jobs whose contents a ProviderBatch carries, at most ``MOST_LINKS``."""
    if not _is_there(conn):
        return ()
    return conn.execute(_OF_PROVIDER_BATCH, {"id": provider_batch_id, "limit": MOST_LINKS}).scalars().all()


def _is_there(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('job_traces') IS NOT NULL")).scalar_one())
