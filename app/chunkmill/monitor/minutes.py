"""What the engines of all workers did, minute by minute, which pollers write down from the workers' reports."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.monitor.reports import SILENT_SECONDS

MINUTE_SECONDS = 60.0
"""How often a poller looks. A report covers the last minute of its worker."""
KEPT_DAYS = 35
"""How long the minutes are kept: 50,400 rows at most, whatever the workers do."""


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of an earlier release, on which this code runs too during an upgrade."""
    query = "SELECT to_regclass(quote_ident(current_schema()) || '.engine_minutes') IS NOT NULL"
    return bool(conn.execute(sa.text(query)).scalar_one())


# Of several pollers the first writes the minute. A minute in which nothing was computed has no row.
_ADD = sa.text(
    """
    INSERT INTO engine_minutes (minute, workers, tokens, padded_tokens, engine_seconds)
    SELECT date_trunc('minute', now()), count(*), sum(tokens), sum(padded_tokens), sum(engine_seconds)
    FROM worker_reports
    WHERE padded_tokens > 0 AND seen_at > now() - make_interval(secs => :silent)
    HAVING count(*) > 0
    ON CONFLICT (minute) DO NOTHING
    """
)


def add(conn: sa.Connection) -> bool:
    """Write down the present minute if workers computed something. Returns whether this call did it."""
    return bool(are_kept(conn) and conn.execute(_ADD, {"silent": SILENT_SECONDS}).rowcount)


def delete_old(conn: sa.Connection) -> None:
    """Delete the minutes that are not kept any more."""
    if are_kept(conn):
        conn.execute(
            sa.text("DELETE FROM engine_minutes WHERE minute < now() - make_interval(days => :days)"),
            {"days": KEPT_DAYS},
        )
