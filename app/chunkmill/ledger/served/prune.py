"""Deletes old files and batches of the served Batch API, a few in each transaction, or counts them."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from chunkmill.db.statements import with_constants
from chunkmill.domain.retention import Amount, OnProgress
from chunkmill.domain.served import ServedState
from chunkmill.ledger.served import files

SLICE = 20
"""How many batches or files one transaction deletes. A batch has up to 50,000 lines, and a file 200 pieces."""

_FINAL = {
    "completed": ServedState.COMPLETED,
    "failed": ServedState.FAILED,
    "expired": ServedState.EXPIRED,
    "cancelled": ServedState.CANCELLED,
}
# A result file goes with its batch, if that is old enough. An input file may be needed by a batch that has not ended.
_COUNT_FILES = """
WITH old AS (
    SELECT f.id
    FROM served_files f
    WHERE f.created_at < :before
      AND NOT EXISTS (
          SELECT FROM served_batches b
          WHERE b.tenant = f.tenant AND b.input_file = f.name
            AND b.state NOT IN (:completed, :failed, :expired, :cancelled))
    UNION
    SELECT f.id
    FROM served_files f
    JOIN served_batches b ON b.id = f.served_batch_id
    WHERE b.state IN (:completed, :failed, :expired, :cancelled)
      AND coalesce(b.completed_at, b.failed_at, b.expired_at, b.cancelled_at) < :before
)
SELECT count(*) AS rows, coalesce(sum(200 + p.bytes), 0)::bigint AS bytes
FROM old
CROSS JOIN LATERAL (
    SELECT coalesce(sum(pg_column_size(data)), 0) AS bytes FROM served_file_pieces p WHERE p.served_file_id = old.id
) p
"""
_DELETE_FILES = """
WITH old AS (
    SELECT f.id
    FROM served_files f
    WHERE f.created_at < :before
      AND NOT EXISTS (
          SELECT FROM served_batches b
          WHERE b.tenant = f.tenant AND b.input_file = f.name
            AND b.state NOT IN (:completed, :failed, :expired, :cancelled))
    UNION
    SELECT f.id
    FROM served_files f
    JOIN served_batches b ON b.id = f.served_batch_id
    WHERE b.state IN (:completed, :failed, :expired, :cancelled)
      AND coalesce(b.completed_at, b.failed_at, b.expired_at, b.cancelled_at) < :before
)
DELETE FROM served_files
WHERE id IN (SELECT id FROM old ORDER BY id LIMIT :most)
"""
_COUNT_BATCHES = """
SELECT count(*) AS rows, coalesce(sum(500 + l.bytes), 0)::bigint AS bytes
FROM served_batches b
CROSS JOIN LATERAL (
    SELECT coalesce(sum(80 + octet_length(custom_id)), 0) AS bytes
    FROM served_batch_lines l
    WHERE l.served_batch_id = b.id
) l
WHERE b.state IN (:completed, :failed, :expired, :cancelled)
  AND coalesce(b.completed_at, b.failed_at, b.expired_at, b.cancelled_at) < :before
"""
_DELETE_BATCHES = """
DELETE FROM served_batches
WHERE id IN (
    SELECT b.id
    FROM served_batches b
    WHERE b.state IN (:completed, :failed, :expired, :cancelled)
      AND coalesce(b.completed_at, b.failed_at, b.expired_at, b.cancelled_at) < :before
    ORDER BY b.id
    LIMIT :most)
"""


def prune_served(
    db: sa.Engine, *, before: datetime, dry_run: bool, on_progress: OnProgress | None = None
) -> dict[str, Amount]:
    """Delete files that were made, and batches that ended, before a time, or count them. Returns the amounts.

    With an output file go the texts and vectors of its batch: its collection is dropped.
    """
    with db.begin() as conn:
        if not files.are_kept(conn):
            return {}
        amounts = {
            "served_files": _amount(conn, _COUNT_FILES, before),
            "served_batches": _amount(conn, _COUNT_BATCHES, before),
        }
    if dry_run:
        return amounts
    for table, delete, n_rows in (
        ("served_files", _DELETE_FILES, amounts["served_files"].rows),
        ("served_batches", _DELETE_BATCHES, amounts["served_batches"].rows),
    ):
        done = 0
        while True:
            with db.begin() as conn:
                deleted = conn.execute(_text(delete), {"before": before, "most": SLICE}).rowcount
            if not deleted:
                break
            done += deleted
            if on_progress:
                on_progress(table, done, max(done, n_rows))
    return amounts


def _amount(conn: sa.Connection, query: str, before: datetime) -> Amount:
    row = conn.execute(_text(query), {"before": before}).one()
    return Amount(row.rows, row.bytes)


def _text(statement: str) -> sa.TextClause:
    return with_constants(statement, **_FINAL)
