"""Deletes old finished jobs from the ledger, slice by slice, with everything that belongs to them but their charges.

Charges are the bill and stay. The record of what a failed or cancelled job left without a vector is nowhere else, so
such a job stays while a chunk still waits for a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from chunkmill.db.temporary import dropping
from chunkmill.domain.retention import Amount, OnProgress
from chunkmill.domain.states import ChunkBatchState, JobState, ProviderBatchState
from chunkmill.ledger.reembedding import fill
from chunkmill.spaces import others
from chunkmill.spaces.registry import all_tables

SLICE = 5_000
"""How many rows one transaction deletes while it locks the job's row. 5,000 ChunkBatches of 512 hashes take 0.15 s."""

_GRACE = timedelta(hours=1)
"""How long after its end a job stays in any case: a worker that lost its lease may still account for its attempt, and
the ProviderBatches of the last hour are counted."""

_STATES = {
    "completed": JobState.COMPLETED,
    "failed": JobState.FAILED,
    "cancelled": JobState.CANCELLED,
    "available": ChunkBatchState.AVAILABLE,
    "running": ChunkBatchState.RUNNING,
    "discarded": ChunkBatchState.DISCARDED,
    "closed": ProviderBatchState.CLOSED,
}


@dataclass(frozen=True, slots=True)
class _Table:
    """A table from which rows are deleted."""

    name: str
    row_bytes: str
    """The approximate bytes of a row ``t`` in SQL: its variable part, and the usual size of the rest."""


# The hashes of a ChunkBatch are stored outside the row (TOAST), and this counts their bytes without reading them.
_CHUNK_BATCHES = _Table("chunk_batches", "200 + pg_column_size(t.content_hashes)")
_USAGE = _Table("usage", "150")
_MEMBERS = _Table("provider_batch_members", "40")
_DEAD_CHUNKS = _Table("dead_chunks", "100 + octet_length(t.chunk_id) + octet_length(t.reason)")
_JOBS = _Table("jobs", "200 + pg_column_size(t.routing)")
_PROVIDER_BATCHES = _Table("provider_batches", "400")
_TABLES = (_CHUNK_BATCHES, _USAGE, _MEMBERS, _DEAD_CHUNKS, _JOBS, _PROVIDER_BATCHES)


def prune_jobs(
    db: sa.Engine, *, before: datetime, dry_run: bool, on_progress: OnProgress | None = None
) -> tuple[dict[str, Amount], int]:
    """Delete jobs that ended before a time, or count them.

    Returns the amounts by table, and how many jobs stayed because chunks of theirs have no vector.
    """
    amounts = {table.name: Amount() for table in _TABLES}
    with db.connect() as conn, dropping(conn, "doomed_jobs"):
        with conn.begin():
            kept = _mark(conn, before)
        job_ids = _marked(conn)
        if dry_run:
            with conn.begin():
                return _count(conn, before), kept
        for done, job_id in enumerate(job_ids, start=1):
            while deleted := _delete_some_of(conn, job_id, before):
                for name, amount in deleted.items():
                    amounts[name] += amount
            if on_progress:
                on_progress("jobs", done, len(job_ids))
        while True:
            with conn.begin():
                orphaned = _orphaned_provider_batches(conn, before)
                amounts["provider_batches"] += _delete(conn, _PROVIDER_BATCHES, "id", orphaned)
            if len(orphaned) < SLICE:
                return amounts, kept


# A job stays while it fills a space of a collection, and while something of it is at a provider: inputs in flight, or a
# ProviderBatch that is not closed.
_MARK_FINISHED = sa.text("""
INSERT INTO doomed_jobs
SELECT j.id
FROM jobs j
WHERE j.state IN (:completed, :failed, :cancelled)
  AND j.id <> ALL(CAST(:filling AS bigint[]))
  AND j.finished_at < :before
  AND j.finished_at < now() - CAST(:grace AS interval)
  AND NOT EXISTS (
      SELECT FROM chunk_batches b
      WHERE b.job_id = j.id AND b.state IN (:available, :running))
  AND NOT EXISTS (SELECT FROM provider_inputs i WHERE i.job_id = j.id)
  AND NOT EXISTS (
      SELECT FROM provider_batches p
      JOIN provider_batch_members m ON m.provider_batch_id = p.id
      JOIN chunk_batches b ON b.id = m.chunk_batch_id
      WHERE p.state <> :closed AND b.job_id = j.id)
""")


def _mark(conn: sa.Connection, before: datetime) -> int:
    """Put the jobs to delete into a table of this session; returns how many of that age must stay."""
    conn.execute(sa.text("CREATE TEMP TABLE IF NOT EXISTS doomed_jobs (id bigint PRIMARY KEY)"))
    conn.execute(sa.text("TRUNCATE doomed_jobs"))
    conn.execute(_MARK_FINISHED, {"before": before, "grace": _GRACE, "filling": fill.job_ids(conn), **_STATES})
    return sum(_keep_jobs_with_missing_vectors(conn, space.id, space.table_name) for space in all_tables(conn))


def _keep_jobs_with_missing_vectors(conn: sa.Connection, space_id: int, table: str) -> int:
    """Unmark the jobs of a space that left a chunk without a vector; returns how many.

    Such a chunk is still in the collection with the same text, and still has no vector. If the collection has left the
    space since, its chunks are not those of the job.
    """
    collections = others.collections_in(conn, space_id)
    statement = f"""
        DELETE FROM doomed_jobs
        USING jobs j
        WHERE j.id = doomed_jobs.id AND j.space_id = :space AND j.state <> :completed
          AND j.collection_id = ANY(CAST(:collections AS integer[]))
          AND (
              EXISTS (
                  SELECT FROM dead_chunks d
                  JOIN chunks c ON c.collection_id = j.collection_id
                               AND c.chunk_id = d.chunk_id
                               AND c.content_hash = d.content_hash
                  WHERE d.job_id = j.id
                    AND NOT EXISTS (SELECT FROM {table} v WHERE v.content_hash = c.content_hash))
              OR EXISTS (
                  SELECT FROM chunk_batches b
                  CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
                  JOIN chunks c ON c.content_hash = h.content_hash AND c.collection_id = j.collection_id
                  WHERE b.job_id = j.id AND b.state IN (:discarded, :cancelled)
                    AND NOT EXISTS (SELECT FROM {table} v WHERE v.content_hash = c.content_hash)))
    """
    return conn.execute(sa.text(statement), {"space": space_id, "collections": collections, **_STATES}).rowcount


def _marked(conn: sa.Connection) -> list[int]:
    with conn.begin():
        return list(conn.execute(sa.text("SELECT id FROM doomed_jobs ORDER BY id")).scalars())


# A retry of the job waits for this transaction; if the retry was first, the job is skipped.
_LOCK_FINISHED_JOB = sa.text("""
SELECT j.id
FROM jobs j
WHERE j.id = :id
  AND j.state IN (:completed, :failed, :cancelled)
  AND j.finished_at < :before
  AND j.finished_at < now() - CAST(:grace AS interval)
  AND NOT EXISTS (
      SELECT FROM chunk_batches b
      WHERE b.job_id = j.id AND b.state IN (:available, :running))
FOR UPDATE SKIP LOCKED
""")


def _delete_some_of(conn: sa.Connection, job_id: int, before: datetime) -> dict[str, Amount]:
    """Delete the next slice of a job, and at last the job. Returns nothing if the job is gone or runs again."""
    with conn.begin():
        parameters = {"id": job_id, "before": before, "grace": _GRACE, **_STATES}
        if conn.execute(_LOCK_FINISHED_JOB, parameters).one_or_none() is None:
            return {}
        chunk_batch_ids = _ids(conn, _CHUNK_BATCHES, job_id)
        if chunk_batch_ids:
            return {
                _USAGE.name: _delete(conn, _USAGE, "chunk_batch_id", chunk_batch_ids),
                _MEMBERS.name: _delete(conn, _MEMBERS, "chunk_batch_id", chunk_batch_ids),
                _CHUNK_BATCHES.name: _delete(conn, _CHUNK_BATCHES, "id", chunk_batch_ids),
            }
        dead_chunk_ids = _ids(conn, _DEAD_CHUNKS, job_id)
        if dead_chunk_ids:
            return {_DEAD_CHUNKS.name: _delete(conn, _DEAD_CHUNKS, "id", dead_chunk_ids)}
        return {_JOBS.name: _delete(conn, _JOBS, "id", [job_id])}


def _ids(conn: sa.Connection, table: _Table, job_id: int) -> list[int]:
    """The ids of a slice of a job's rows."""
    statement = sa.text(f"SELECT id FROM {table.name} WHERE job_id = :job LIMIT :limit")
    return list(conn.execute(statement, {"job": job_id, "limit": SLICE}).scalars())


_ORPHANED_PROVIDER_BATCHES = sa.text("""
SELECT p.id
FROM provider_batches p
WHERE p.state = :closed
  AND p.closed_at < :before
  AND greatest(p.closed_at, p.creating_since) < now() - CAST(:grace AS interval)
  AND NOT EXISTS (SELECT FROM provider_inputs i WHERE i.provider_batch_id = p.id)
  AND NOT EXISTS (SELECT FROM provider_batch_members m WHERE m.provider_batch_id = p.id)
LIMIT :limit
""")


def _orphaned_provider_batches(conn: sa.Connection, before: datetime) -> list[int]:
    """The ids of a slice of old ProviderBatches that no ChunkBatch waits for any more."""
    parameters = {"before": before, "grace": _GRACE, "closed": ProviderBatchState.CLOSED, "limit": SLICE}
    return list(conn.execute(_ORPHANED_PROVIDER_BATCHES, parameters).scalars())


def _delete(conn: sa.Connection, table: _Table, key: str, ids: list[int]) -> Amount:
    """Delete the rows whose ``key`` is one of ``ids``; returns how much that was."""
    statement = f"""
        WITH gone AS (
            DELETE FROM {table.name} t
            WHERE t.{key} = ANY(CAST(:ids AS bigint[]))
            RETURNING {table.row_bytes} AS bytes)
        SELECT count(*) AS rows, coalesce(sum(bytes), 0)::bigint AS bytes
        FROM gone
    """
    row = conn.execute(sa.text(statement), {"ids": ids}).one()
    return Amount(row.rows, row.bytes)


def _count(conn: sa.Connection, before: datetime) -> dict[str, Amount]:
    """How much a prune of the marked jobs would delete, by table."""
    return {
        _CHUNK_BATCHES.name: _count_of_jobs(conn, _CHUNK_BATCHES, "job_id"),
        _USAGE.name: _count_of_chunk_batches(conn, _USAGE),
        _MEMBERS.name: _count_of_chunk_batches(conn, _MEMBERS),
        _DEAD_CHUNKS.name: _count_of_jobs(conn, _DEAD_CHUNKS, "job_id"),
        _JOBS.name: _count_of_jobs(conn, _JOBS, "id"),
        _PROVIDER_BATCHES.name: _count_provider_batches(conn, before),
    }


def _count_of_jobs(conn: sa.Connection, table: _Table, key: str) -> Amount:
    statement = f"""
        SELECT count(*) AS rows, coalesce(sum({table.row_bytes}), 0)::bigint AS bytes
        FROM {table.name} t
        JOIN doomed_jobs d ON d.id = t.{key}
    """
    row = conn.execute(sa.text(statement)).one()
    return Amount(row.rows, row.bytes)


def _count_of_chunk_batches(conn: sa.Connection, table: _Table) -> Amount:
    statement = f"""
        SELECT count(*) AS rows, coalesce(sum({table.row_bytes}), 0)::bigint AS bytes
        FROM {table.name} t
        JOIN chunk_batches b ON b.id = t.chunk_batch_id
        JOIN doomed_jobs d ON d.id = b.job_id
    """
    row = conn.execute(sa.text(statement)).one()
    return Amount(row.rows, row.bytes)


def _count_provider_batches(conn: sa.Connection, before: datetime) -> Amount:
    """The old ProviderBatches that only ChunkBatches of marked jobs wait for."""
    statement = f"""
        SELECT count(*) AS rows, coalesce(sum({_PROVIDER_BATCHES.row_bytes}), 0)::bigint AS bytes
        FROM provider_batches t
        WHERE t.state = :closed
          AND t.closed_at < :before
          AND greatest(t.closed_at, t.creating_since) < now() - CAST(:grace AS interval)
          AND NOT EXISTS (SELECT FROM provider_inputs i WHERE i.provider_batch_id = t.id)
          AND NOT EXISTS (
              SELECT FROM provider_batch_members m
              WHERE m.provider_batch_id = t.id
                AND m.chunk_batch_id NOT IN (
                    SELECT b.id FROM chunk_batches b JOIN doomed_jobs d ON d.id = b.job_id))
    """
    parameters = {"before": before, "grace": _GRACE, "closed": ProviderBatchState.CLOSED}
    row = conn.execute(sa.text(statement), parameters).one()
    return Amount(row.rows, row.bytes)
