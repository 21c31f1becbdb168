"""Finished jobs that are old leave the ledger, slice by slice, with all that hangs on them but their charges.

Charges are the bill and stay. What a failed or cancelled job left without a vector is its only record of it, so such a
job stays while a chunk still waits for it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.retention import Amount, OnProgress
from chunkmill.spaces.registry import all_spaces

SLICE = 5_000
"""Rows of one transaction, which holds its job's row; 5,000 ChunkBatches of 512 hashes take 0.15 s."""

_GRACE = "interval '1 hour'"
"""A worker that lost its lease may still account for its attempt, and an hour's batches are counted."""

_FINISHED = (
    "j.state IN ('completed', 'failed', 'cancelled') AND j.finished_at < :before "
    f"AND j.finished_at < now() - {_GRACE} "
    "AND NOT EXISTS (SELECT FROM chunk_batches b WHERE b.job_id = j.id AND b.state IN ('available', 'running'))"
)
_AT_A_PROVIDER = (
    "(EXISTS (SELECT FROM provider_inputs i WHERE i.job_id = j.id) OR EXISTS (SELECT FROM provider_batches p "
    "JOIN provider_batch_members m ON m.provider_batch_id = p.id JOIN chunk_batches b ON b.id = m.chunk_batch_id "
    "WHERE p.state <> 'closed' AND b.job_id = j.id))"
)
_CLOSED = (
    f"p.state = 'closed' AND p.closed_at < :before AND greatest(p.closed_at, p.creating_since) < now() - {_GRACE} "
    "AND NOT EXISTS (SELECT FROM provider_inputs i WHERE i.provider_batch_id = p.id)"
)

# Bytes of a row, about: what is variable in it, and the usual size of the rest. A ChunkBatch's hashes lie out of line,
# and counting them must not read them in.
_SIZES = {
    "chunk_batches": "200 + pg_column_size(t.content_hashes)",
    "usage": "150",
    "provider_batch_members": "40",
    "dead_chunks": "100 + octet_length(t.chunk_id) + octet_length(t.reason)",
    "jobs": "200 + pg_column_size(t.routing)",
    "provider_batches": "400",
}
# In the order in which the rows must go. Each is found by the ids of what it hangs on.
_OF_CHUNK_BATCHES = {"usage": "chunk_batch_id", "provider_batch_members": "chunk_batch_id", "chunk_batches": "id"}


def prune_jobs(
    db: sa.Engine, *, before: datetime, dry_run: bool, on_progress: OnProgress | None = None
) -> tuple[dict[str, Amount], int]:
    """What went by table (or would go), and how many jobs stayed because chunks of theirs have no vector."""
    amounts = dict.fromkeys(_SIZES, Amount())
    with db.connect() as conn:
        with conn.begin():
            kept = _mark(conn, before)
        job_ids = _marked(conn)
        if dry_run:
            with conn.begin():
                return _count(conn, before), kept
        for done, job_id in enumerate(job_ids, start=1):
            while gone := _drop_some_of(conn, job_id, before):
                for table, amount in gone.items():
                    amounts[table] += amount
            if on_progress:
                on_progress("jobs", done, len(job_ids))
        while True:
            with conn.begin():
                gone_batches = _delete(conn, "provider_batches", f"id IN ({_ORPHANED})", before=before, limit=SLICE)
            amounts["provider_batches"] += gone_batches
            if gone_batches.rows < SLICE:
                return amounts, kept


def _mark(conn: sa.Connection, before: datetime) -> int:
    """Put the jobs that may go into a table of this session; returns how many of that age may not yet."""
    conn.execute(sa.text("CREATE TEMP TABLE IF NOT EXISTS doomed_jobs (id bigint PRIMARY KEY)"))
    conn.execute(sa.text("TRUNCATE doomed_jobs"))
    old = f"FROM jobs j WHERE {_FINISHED} AND NOT {_AT_A_PROVIDER}"
    conn.execute(
        sa.text(f"INSERT INTO doomed_jobs SELECT j.id {old} AND j.state = 'completed'"),
        {"before": before},
    )
    kept = 0
    for space in all_spaces(conn):
        ended = f"{old} AND j.state <> 'completed' AND j.space_id = :space"
        missing = _still_missing(space.table_name)
        facts = {"before": before, "space": space.id}
        found = conn.execute(sa.text(f"SELECT count(*) {ended}"), facts).scalar_one()
        if found:
            went = conn.execute(sa.text(f"INSERT INTO doomed_jobs SELECT j.id {ended} AND NOT {missing}"), facts)
            kept += found - went.rowcount
    return int(kept)


def _still_missing(table: str) -> str:
    """A chunk that the job left without a vector is in the collection with the same text, and has none still."""
    embedded = f"EXISTS (SELECT FROM {table} v WHERE v.content_hash = c.content_hash)"
    return (
        "(EXISTS (SELECT FROM dead_chunks d JOIN chunks c ON c.collection_id = j.collection_id "
        f"  AND c.chunk_id = d.chunk_id AND c.content_hash = d.content_hash WHERE d.job_id = j.id AND NOT {embedded}) "
        "OR EXISTS (SELECT FROM chunk_batches b CROSS JOIN unnest(b.content_hashes) AS h(content_hash) "
        "  JOIN chunks c ON c.content_hash = h.content_hash AND c.collection_id = j.collection_id "
        f"  WHERE b.job_id = j.id AND b.state IN ('discarded', 'cancelled') AND NOT {embedded}))"
    )


def _marked(conn: sa.Connection) -> list[int]:
    with conn.begin():
        return list(conn.execute(sa.text("SELECT id FROM doomed_jobs ORDER BY id")).scalars())


def _drop_some_of(conn: sa.Connection, job_id: int, before: datetime) -> dict[str, Amount]:
    """The next slice of a job, and at last the job; nothing where it is gone, or runs again."""
    with conn.begin():
        # Whoever retries the job waits for this transaction, or it passes over the job.
        locked = conn.execute(
            sa.text(f"SELECT FROM jobs j WHERE j.id = :id AND {_FINISHED} FOR UPDATE SKIP LOCKED"),
            {"id": job_id, "before": before},
        ).one_or_none()
        if locked is None:
            return {}
        ids = _ids(conn, "chunk_batches", job_id)
        if ids:
            return {
                table: _delete(conn, table, f"{key} = ANY(CAST(:ids AS bigint[]))", ids=ids)
                for table, key in _OF_CHUNK_BATCHES.items()
            }
        ids = _ids(conn, "dead_chunks", job_id)
        if ids:
            return {"dead_chunks": _delete(conn, "dead_chunks", "id = ANY(CAST(:ids AS bigint[]))", ids=ids)}
        return {"jobs": _delete(conn, "jobs", "id = :id", id=job_id)}


def _ids(conn: sa.Connection, table: str, job_id: int) -> list[int]:
    rows = conn.execute(
        sa.text(f"SELECT id FROM {table} WHERE job_id = :job LIMIT :limit"), {"job": job_id, "limit": SLICE}
    )
    return list(rows.scalars())


def _delete(conn: sa.Connection, table: str, which: str, **facts: Any) -> Amount:
    row = conn.execute(
        sa.text(
            f"WITH gone AS (DELETE FROM {table} t WHERE {which} RETURNING {_SIZES[table]} AS bytes) "
            "SELECT count(*) AS rows, coalesce(sum(bytes), 0)::bigint AS bytes FROM gone"
        ),
        facts,
    ).one()
    return Amount(row.rows, row.bytes)


# ProviderBatches that nobody has a part in any more.
_ORPHANED = (
    f"SELECT p.id FROM provider_batches p WHERE {_CLOSED} "
    "AND NOT EXISTS (SELECT FROM provider_batch_members m WHERE m.provider_batch_id = p.id) LIMIT :limit"
)


def _count(conn: sa.Connection, before: datetime) -> dict[str, Amount]:
    """The same, left where it is."""
    doomed = "SELECT b.id FROM chunk_batches b WHERE b.job_id IN (SELECT id FROM doomed_jobs)"
    which = {
        "usage": f"t.chunk_batch_id IN ({doomed})",
        "provider_batch_members": f"t.chunk_batch_id IN ({doomed})",
        "chunk_batches": "t.job_id IN (SELECT id FROM doomed_jobs)",
        "dead_chunks": "t.job_id IN (SELECT id FROM doomed_jobs)",
        "jobs": "t.id IN (SELECT id FROM doomed_jobs)",
        "provider_batches": f"t.id IN (SELECT p.id FROM provider_batches p WHERE {_CLOSED} "
        "AND NOT EXISTS (SELECT FROM provider_batch_members m WHERE m.provider_batch_id = p.id "
        f"AND m.chunk_batch_id NOT IN ({doomed})))",
    }
    counted = {}
    for table, size in _SIZES.items():
        row = conn.execute(
            sa.text(
                f"SELECT count(*) AS rows, coalesce(sum({size}), 0)::bigint AS bytes FROM {table} t "
                f"WHERE {which[table]}"
            ),
            {"before": before} if ":before" in which[table] else {},
        ).one()
        counted[table] = Amount(row.rows, row.bytes)
    return counted
