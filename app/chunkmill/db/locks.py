"""The keys of Chunkmill's advisory locks. Each begins with the letters "chm", so that no other program takes it."""

from __future__ import annotations

import sqlalchemy as sa

MIGRATION_LOCK = 0x63686D00
"""Whoever migrates or restores the database (``alembic/env.py``, ``chunkmill.db.backup``)."""
REGISTER_LOCK = 0x63686D01
"""One transaction at a time registers a new space."""
PRODUCER_LOCK = 0x63686D02
"""The first of two keys; the second is the job. The connection that enqueues a job holds it for the whole time."""
DELETE_LOCK = 0x63686D03
"""Shared by transactions that add chunks, contents or vectors; exclusive for one that deletes contents."""
NOTICE_LOCK = 0x63686D04
"""One poller at a time writes the budget's warnings."""
GATHER_LOCK = 0x63686D05
"""One transaction at a time fills a ProviderBatch, so that the budgets are counted exactly."""

BUDGET_LOCK = 0x63686D06
"""One transaction at a time looks whether the budget allows what it is about to send. It is the last lock that a
transaction takes, so that nobody who holds it waits."""
FLUSH_LOCK = 0x63686D07
"""The first of two keys; the second is the collection. Shared by connections that flush a tail of the collection, one
for each of its spaces; a flush of an earlier release, and a drop, hold it alone."""
MERGE_LOCK = 0x63686D08
"""The first of two keys; the second is the collection. The same for connections that merge its segments."""
NAMES_LOCK = 0x63686D09
"""One transaction at a time gives a name to a collection or an alias, or takes one away. It is the first lock that the
transaction takes."""
SPACES_LOCK = 0x63686D0A
"""Shared by transactions that go through the vector tables of all spaces; exclusive for one that drops a space."""
LIVES_LOCK = 0x63686D0B
"""The first of two keys; the second is the collection. Shared by the windows of enqueues, each of which reads the
collection's spaces; exclusive for a transaction that changes them. The row's own lock would let windows overlap for
ever while such a transaction waits for it; here whoever comes later stands behind it."""
FLUSH_SPACE_LOCK = 0x63686D17
"""The first of two keys; the second is made of a collection and a space. One connection at a time flushes their
tail."""
MERGE_SPACE_LOCK = 0x63686D18
"""The same for the connection that merges the segments of a collection in a space."""
REEMBED_LOCK = 0x63686D19
"""The first of two keys; the second is the collection. One connection at a time takes the steps of its re-embedding."""

REPLACE_LOCK = 0x63686D1A
"""The first of two keys; the second is the collection. Shared by connections that are going to delete what their source
does not have. While somebody holds it, every other enqueue writes also the chunks that it finds unchanged, so that one
can tell that another source has them."""

KEY_LOCK = 0x63686D29
"""The first of two keys; the second is the hash of an idempotency key. A transaction that gives a job this key holds
it, also a producer's own one, whose job is not in ``jobs`` before it is delivered."""


METADATA_LOCK = 0x63686D2A
"""The first of two keys; the second is 0. One connection at a time builds the index of all metadata."""


def lock(conn: sa.Connection, key: int) -> None:
    """Take the exclusive lock of ``key`` until the end of this transaction; wait while another one holds it."""
    conn.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def holders(conn: sa.Connection, key: int) -> set[str]:
    """The transactions of other sessions that hold ``key``, shared or alone."""
    query = """
        SELECT virtualtransaction
        FROM pg_locks
        WHERE locktype = 'advisory'
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND classid = 0 AND objid = CAST(:key AS oid) AND objsubid = 1
          AND granted AND pid <> pg_backend_pid()
    """
    return set(conn.execute(sa.text(query), {"key": key}).scalars())


def be_patient(conn: sa.Connection, seconds: float) -> None:
    """Let each lock of this transaction be waited for this long, and longer than an autovacuum can stand in its way.

    Postgres ends an autovacuum for whoever has waited for its table for ``deadlock_timeout``, which is 1 s by default.
    Whoever gives up before that can wait for as long as the autovacuum lasts, which is hours for a large table.
    """
    query = """
        SELECT set_config('lock_timeout', CAST(CAST(greatest(:wanted, ends.after_ms + 500) AS bigint) AS text), true)
        FROM (
            SELECT 1000 * extract(epoch FROM CAST(current_setting('deadlock_timeout') AS interval)) AS after_ms
        ) ends
    """
    conn.execute(sa.text(query), {"wanted": 1_000 * seconds})


def lock_shared(conn: sa.Connection, key: int) -> None:
    """Take the shared lock of ``key`` until the end of this transaction; wait while another one holds it alone."""
    conn.execute(sa.text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": key})


def lock_of(conn: sa.Connection, key: int, of: int) -> None:
    """:func:`lock`, for a lock with two keys."""
    conn.execute(sa.text("SELECT pg_advisory_xact_lock(:key, :of)"), {"key": key, "of": of})
