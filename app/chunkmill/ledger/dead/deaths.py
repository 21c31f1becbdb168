"""Takes ChunkBatches back from dead workers, and after two deaths splits them until the content that kills is alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chunkmill.db.statements import with_constants
from chunkmill.domain.deaths import SUSPECT_DEATHS, Bury, Split, after_death
from chunkmill.domain.reasons import storable
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import ChunkBatchState, Route
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import KILLS_WORKERS, DeadContent
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import SharedFields
from chunkmill.ledger.work.usage import Outcome
from chunkmill.spaces import registry

_SILENT = "it was silent past its lease"
_SPLIT = "split"
"""The error code of a ChunkBatch whose contents without a vector were moved into smaller ones."""


@dataclass(frozen=True, slots=True)
class TakenBackCounts:
    """How many ChunkBatches were taken back from dead workers: whole, split, or completed with a dead content."""

    available: int = 0
    split: int = 0
    buried: int = 0

    @property
    def total(self) -> int:
        return self.available + self.split + self.buried

    @property
    def sentence(self) -> str:
        """`3 ChunkBatches, 1 of them split`, for a log."""
        parts = [f"{self.total} ChunkBatch{'' if self.total == 1 else 'es'}"]
        for number, fate in ((self.split, "split"), (self.buried, "closed with a dead content")):
            if number:
                parts.append(f"{number} of them {fate}" if self.total > 1 else fate)
        return ", ".join(parts)


# Both statements leave not_before as it is: work that had begun is due since earlier, and goes before other work.
_TAKE_BACK_EXPIRED = with_constants(
    """
WITH dead AS (
    SELECT id, lease_owner
    FROM chunk_batches
    WHERE state = :running AND lease_until < now()
    ORDER BY lease_until
    LIMIT :limit
    FOR UPDATE SKIP LOCKED)
UPDATE chunk_batches b
SET state = :available, deaths = deaths + 1, max_attempts = max_attempts + 1,
    error_code = 'worker_died', error = 'worker ' || dead.lease_owner || ' died with it: ' || :evidence,
    lease_owner = NULL, lease_until = NULL, rung_at = NULL
FROM dead
WHERE b.id = dead.id
RETURNING b.id, b.attempt, b.deaths, b.job_id, b.space_id, dead.lease_owner AS owner
""",
    available=ChunkBatchState.AVAILABLE,
    running=ChunkBatchState.RUNNING,
)


def take_back_expired(conn: sa.Connection, *, limit: int = 500) -> TakenBackCounts:
    """Take back ChunkBatches whose lease has expired. Any number of pollers can share the work (SKIP LOCKED)."""
    rows = conn.execute(_TAKE_BACK_EXPIRED, {"limit": limit, "evidence": _SILENT}).all()
    return _account_for(conn, rows, _SILENT)


_TAKE_BACK_FROM = with_constants(
    """
WITH dead AS (
    SELECT id, lease_owner
    FROM chunk_batches
    WHERE state = :running AND lease_owner = :owner
    ORDER BY lease_until
    LIMIT :limit
    FOR UPDATE)
UPDATE chunk_batches b
SET state = :available, deaths = deaths + 1, max_attempts = max_attempts + 1,
    error_code = 'worker_died', error = 'worker ' || dead.lease_owner || ' died with it: ' || :evidence,
    lease_owner = NULL, lease_until = NULL, rung_at = NULL
FROM dead
WHERE b.id = dead.id
RETURNING b.id, b.attempt, b.deaths, b.job_id, b.space_id, dead.lease_owner AS owner
""",
    available=ChunkBatchState.AVAILABLE,
    running=ChunkBatchState.RUNNING,
)


def take_back_from(conn: sa.Connection, owner: str, *, evidence: str) -> TakenBackCounts:
    """Take back at once what a dead worker held; ``evidence`` says how the worker ended.

    It waits for rows that the dead worker's last transaction still locks, because the server may not know of its death.
    """
    evidence = storable(evidence, 1000)
    rows = conn.execute(_TAKE_BACK_FROM, {"owner": owner, "limit": 10_000, "evidence": evidence}).all()
    return _account_for(conn, rows, evidence)


# An attempt that had written nothing has no row in ``usage`` yet, so this adds one.
_CLOSE_ACCOUNTS = sa.text("""
INSERT INTO usage (
    chunk_batch_id, attempt, job_id, space_id, provider, worker,
    contents, tokens, engine_seconds, outcome, evidence, ended_at)
SELECT d.id, d.attempt, d.job_id, d.space_id, s.spec ->> 'provider', d.owner, 0, 0, 0, :died, :evidence, now()
FROM unnest(
    CAST(:ids AS bigint[]), CAST(:attempts AS int[]), CAST(:jobs AS bigint[]), CAST(:spaces AS int[]),
    CAST(:owners AS text[])
) AS d(id, attempt, job_id, space_id, owner)
JOIN spaces s ON s.id = d.space_id
ON CONFLICT (chunk_batch_id, attempt) DO UPDATE SET
    outcome = excluded.outcome,
    evidence = excluded.evidence,
    ended_at = excluded.ended_at
""")


def _account_for(conn: sa.Connection, taken: Sequence[sa.Row[Any]], evidence: str) -> TakenBackCounts:
    """Close the accounts of attempts that died and decide about suspects.

    A death is not charged as an attempt: ``chunkmill.domain.deaths`` bounds how often a ChunkBatch may kill.
    """
    if not taken:
        return TakenBackCounts()
    conn.execute(
        _CLOSE_ACCOUNTS,
        {
            "died": Outcome.DIED,
            "evidence": evidence,
            "ids": [row.id for row in taken],
            "attempts": [row.attempt for row in taken],
            "jobs": [row.job_id for row in taken],
            "spaces": [row.space_id for row in taken],
            "owners": [row.owner for row in taken],
        },
    )
    split = buried = 0
    for row in taken:
        if row.deaths >= SUSPECT_DEATHS:
            verdict = _judge(conn, row.id)
            split += isinstance(verdict, Split)
            buried += isinstance(verdict, Bury)
    return TakenBackCounts(len(taken) - split - buried, split, buried)


_SUSPECT = sa.text("""
SELECT b.*, j.on_long, j.collection_id
FROM chunk_batches b
JOIN jobs j ON j.id = b.job_id
WHERE b.id = :id
""")


def _judge(conn: sa.Connection, chunk_batch_id: int) -> object:
    """Decide about a suspect, whose row this transaction has locked; returns the verdict."""
    row = conn.execute(_SUSPECT, {"id": chunk_batch_id}).one()
    space = registry.VectorTable(row.space_id)
    missing = _missing(conn, space, row.content_hashes, refuses_long=row.on_long == OnLong.REJECT)
    verdict = after_death(row.deaths, missing)
    if isinstance(verdict, Split):
        shared = SharedFields(
            row.job_id, row.space_id, Route(row.route), row.priority, max(row.max_attempts - row.attempt, 1)
        )
        chunk_batches.add(conn, shared, verdict.parts, deaths=SUSPECT_DEATHS)
        note = f"split into {len(verdict.parts)} ChunkBatches after {row.deaths} deaths; {row.error}"
        _close(conn, row, space, missing, code=_SPLIT, note=note)
    elif isinstance(verdict, Bury):
        reason = f"{row.deaths} workers died while they embedded it, the last two with nothing beside it: "
        reason += "; ".join(_deaths_of(conn, row.id))
        dead = DeadContent(verdict.content_hash, KILLS_WORKERS, reason)
        dead_chunks.add_contents(conn, [dead], job_id=row.job_id, collection_id=row.collection_id)
        _close(conn, row, space, missing, code=KILLS_WORKERS, note=row.error)
    return verdict


def _missing(
    conn: sa.Connection, space: registry.VectorTable, hashes: Sequence[bytes], *, refuses_long: bool
) -> list[bytes]:
    """The contents that have no vector yet, in the order of ``hashes``.

    If the job refuses long texts, one that another job had truncated counts as missing: this job is still to refuse it.
    """
    statement = f"""
        SELECT c.content_hash
        FROM unnest(CAST(:hashes AS bytea[])) WITH ORDINALITY AS h(content_hash, at)
        JOIN contents c USING (content_hash)
        WHERE NOT EXISTS (
            SELECT FROM {space.table_name} v
            WHERE v.content_hash = c.content_hash AND NOT (v.truncated AND :refuses_long))
        ORDER BY h.at
    """
    return list(conn.execute(sa.text(statement), {"hashes": hashes, "refuses_long": refuses_long}).scalars())


def _close(
    conn: sa.Connection, row: sa.Row[Any], space: registry.VectorTable, moved: Sequence[bytes], *, code: str, note: str
) -> None:
    """Complete a ChunkBatch with what is embedded; its other contents are in other ChunkBatches or on the dead list by
    now.
    """
    gone = set(moved)
    kept = [content_hash for content_hash in row.content_hashes if content_hash not in gone]
    buried = len(gone) if code == KILLS_WORKERS else 0
    statement = f"""
        UPDATE chunk_batches
        SET state = :completed, content_hashes = :hashes, n_contents = :kept + :buried,
            n_embedded = :kept - n_cached, finished_at = now(), error_code = :code, error = :note,
            n_truncated = (
                SELECT count(*)
                FROM {space.table_name} v
                WHERE v.truncated AND v.content_hash = ANY(:hashes))
        WHERE id = :id
    """
    conn.execute(
        sa.text(statement),
        {
            "id": row.id,
            "completed": ChunkBatchState.COMPLETED,
            # A dead content stays, because `retry` looks up what to do again by the hashes of its ChunkBatch.
            "hashes": list(row.content_hashes) if buried else kept,
            "kept": len(kept),
            "buried": buried,
            "code": code,
            "note": storable(note),
        },
    )


_DEATHS_OF = sa.text("""
SELECT worker, evidence
FROM usage
WHERE chunk_batch_id = :id AND outcome = :died
ORDER BY attempt
""")


def _deaths_of(conn: sa.Connection, chunk_batch_id: int) -> list[str]:
    rows = conn.execute(_DEATHS_OF, {"id": chunk_batch_id, "died": Outcome.DIED})
    return [f"{row.worker}, {row.evidence}" for row in rows]
