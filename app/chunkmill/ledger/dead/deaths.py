"""ChunkBatches whose worker died: taken back, and after two deaths cut until the content that kills stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.deaths import SUSPECT_DEATHS, Bury, Split, after_death
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Route
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Common, Lease
from chunkmill.ledger.work.usage import Outcome
from chunkmill.spaces import registry

_SILENT = "it was silent past its lease"


@dataclass(frozen=True, slots=True)
class TakenBack:
    """ChunkBatches taken back from dead workers: as they were, cut into smaller ones, or closed with a dead content."""

    available: int = 0
    split: int = 0
    buried: int = 0

    @property
    def total(self) -> int:
        return self.available + self.split + self.buried


def take_back_expired(conn: sa.Connection, *, limit: int = 500) -> TakenBack:
    """Take back leases that ran out. SKIP LOCKED lets any number of pollers share the work."""
    return _take_back(conn, "lease_until < now()", {"limit": limit}, _SILENT, skip="SKIP LOCKED")


def take_back_from(conn: sa.Connection, owner: str, *, evidence: str) -> TakenBack:
    """Take back at once what a worker held that is known to be dead; ``evidence`` says how it ended.

    It waits for rows that the dead worker's last transaction still holds: the server may not know yet.
    """
    return _take_back(conn, "lease_owner = :owner", {"owner": owner, "limit": 10_000}, evidence)


def _take_back(conn: sa.Connection, which: str, facts: dict[str, Any], evidence: str, *, skip: str = "") -> TakenBack:
    """A death charges no attempt: ``chunkmill.domain.deaths`` bounds how often a ChunkBatch may kill."""
    gone = conn.execute(
        sa.text(
            f"WITH gone AS (SELECT id, lease_owner FROM chunk_batches WHERE state = 'running' AND {which} "
            f"              ORDER BY lease_until LIMIT :limit FOR UPDATE {skip}) "
            "UPDATE chunk_batches b SET state = 'available', deaths = deaths + 1, max_attempts = max_attempts + 1, "
            "error_code = 'worker_died', error = 'worker ' || gone.lease_owner || ' died with it: ' || :evidence, "
            # Due since it was due before: what was under way goes before what never was.
            "lease_owner = NULL, lease_until = NULL, rung_at = NULL "
            "FROM gone WHERE b.id = gone.id "
            "RETURNING b.id, b.attempt, b.deaths, b.job_id, b.space_id, gone.lease_owner AS owner"
        ),
        {**facts, "evidence": evidence[:1000]},
    ).all()
    if not gone:
        return TakenBack()
    # An attempt that had written nothing yet has no account so far.
    conn.execute(
        sa.text(
            "INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, contents, tokens, "
            "engine_seconds, outcome, evidence, ended_at) "
            "SELECT d.id, d.attempt, d.job_id, d.space_id, s.spec ->> 'provider', d.owner, 0, 0, 0, :died, :evidence, "
            "now() FROM unnest(CAST(:ids AS bigint[]), CAST(:attempts AS int[]), CAST(:jobs AS bigint[]), "
            "CAST(:spaces AS int[]), CAST(:owners AS text[])) AS d(id, attempt, job_id, space_id, owner) "
            "JOIN spaces s ON s.id = d.space_id ON CONFLICT (chunk_batch_id, attempt) DO UPDATE SET "
            "outcome = excluded.outcome, evidence = excluded.evidence, ended_at = excluded.ended_at"
        ),
        {
            "died": Outcome.DIED,
            "evidence": evidence[:1000],
            "ids": [row.id for row in gone],
            "attempts": [row.attempt for row in gone],
            "jobs": [row.job_id for row in gone],
            "spaces": [row.space_id for row in gone],
            "owners": [row.owner for row in gone],
        },
    )
    split = buried = 0
    for row in gone:
        if row.deaths >= SUSPECT_DEATHS:
            verdict = _judge(conn, row.id)
            split += isinstance(verdict, Split)
            buried += isinstance(verdict, Bury)
    return TakenBack(len(gone) - split - buried, split, buried)


def _judge(conn: sa.Connection, chunk_batch_id: int) -> object:
    """Decide about a suspect, whose row this transaction has locked."""
    row = conn.execute(
        sa.text(
            "SELECT b.*, j.on_long, j.collection_id FROM chunk_batches b JOIN jobs j ON j.id = b.job_id "
            "WHERE b.id = :id"
        ),
        {"id": chunk_batch_id},
    ).one()
    space = registry.get(conn, row.space_id)
    refuses = row.on_long == OnLong.REJECT
    missing = list(
        conn.execute(
            sa.text(
                "SELECT c.content_hash FROM unnest(CAST(:hashes AS bytea[])) WITH ORDINALITY AS h(content_hash, at) "
                "JOIN contents c USING (content_hash) WHERE NOT EXISTS (SELECT FROM "
                # A long content that another job cut is still to be refused in this one.
                f"{space.table_name} v WHERE v.content_hash = c.content_hash AND NOT (v.truncated AND :refuses)) "
                "ORDER BY h.at"
            ),
            {"hashes": row.content_hashes, "refuses": refuses},
        ).scalars()
    )
    verdict = after_death(row.deaths, missing)
    if isinstance(verdict, Split):
        common = Common(
            row.job_id, row.space_id, Route(row.route), row.priority, max(row.max_attempts - row.attempt, 1)
        )
        chunk_batches.add(conn, common, verdict.parts, deaths=SUSPECT_DEATHS)
        note = f"cut into {len(verdict.parts)} ChunkBatches after {row.deaths} deaths; {row.error}"
        _close(conn, row, space, missing, code="split", note=note)
    elif isinstance(verdict, Bury):
        lease = Lease(
            row.id, row.attempt, row.max_attempts, row.job_id, row.space_id, row.collection_id, OnLong(row.on_long)
        )
        reason = f"{row.deaths} workers died while they embedded it, the last two with nothing beside it: "
        reason += "; ".join(_deaths_of(conn, row.id))
        dead_chunks.add_contents(conn, lease, [DeadContent(verdict.content_hash, "kills_workers", reason[:2000])])
        _close(conn, row, space, missing, code="kills_workers", note=row.error)
    return verdict


def _close(
    conn: sa.Connection, row: sa.Row[Any], space: registry.Space, moved: Sequence[bytes], *, code: str, note: str
) -> None:
    """What is embedded stays in it, completed; the rest is in other ChunkBatches or on the dead list by now."""
    gone = set(moved)
    kept = [content_hash for content_hash in row.content_hashes if content_hash not in gone]
    buried = len(gone) if code == "kills_workers" else 0
    conn.execute(
        sa.text(
            "UPDATE chunk_batches SET state = 'completed', content_hashes = :hashes, n_contents = :n + :buried, "
            "n_embedded = :n - n_cached, finished_at = now(), error_code = :code, error = :note, "
            "n_truncated = (SELECT count(*) FROM "
            f"{space.table_name} v WHERE v.truncated AND v.content_hash = ANY(:hashes)) WHERE id = :id"
        ),
        {
            "id": row.id,
            # A dead content stays: `retry` finds what to do again by the hashes of its ChunkBatch.
            "hashes": list(row.content_hashes) if buried else kept,
            "n": len(kept),
            "buried": buried,
            "code": code,
            "note": note[:2000],
        },
    )


def _deaths_of(conn: sa.Connection, chunk_batch_id: int) -> list[str]:
    return [
        f"{row.worker}, {row.evidence}"
        for row in conn.execute(
            sa.text(
                "SELECT worker, evidence FROM usage WHERE chunk_batch_id = :id AND outcome = :died ORDER BY attempt"
            ),
            {"id": chunk_batch_id, "died": Outcome.DIED},
        )
    ]
