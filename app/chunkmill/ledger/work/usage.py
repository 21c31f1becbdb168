"""Attempts: what each one cost, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import sqlalchemy as sa

from chunkmill.ledger.work.chunk_batches import Lease


class Outcome(StrEnum):
    """How an attempt ended; one that lost its lease has none."""

    COMPLETED = "completed"
    RELEASED = "released"
    FAILED = "failed"
    DIED = "died"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one attempt has done so far.

    ``contents`` and ``tokens`` it embedded, ``engine_seconds`` for them, ``recomputed`` of the contents that had a
    vector when it came to write theirs; ``at_risk`` is the most it ever had embedded or on the device and not written.
    """

    provider: str
    worker: str
    contents: int = 0
    tokens: int = 0
    engine_seconds: float = 0.0
    recomputed: int = 0
    at_risk: int = 0


def book(
    conn: sa.Connection, lease: Lease, usage: Usage, outcome: Outcome | None = None, evidence: str | None = None
) -> Usage:
    """Bring an attempt's account up to date; ``outcome`` closes it, with what was seen if it failed.

    The counts are totals under the key (ChunkBatch, attempt), so a transaction that is run again books nothing twice.
    It also finds its own vectors there, and what it had booked as ``contents`` stays so: go on from what is returned.
    """
    row = conn.execute(
        sa.text(
            "INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, contents, tokens, "
            "engine_seconds, recomputed, at_risk, outcome, evidence, ended_at) VALUES (:chunk_batch, :attempt, :job, "
            ":space, :provider, :worker, :contents, :tokens, :seconds, :recomputed, :at_risk, CAST(:outcome AS text), "
            ":evidence, CASE WHEN CAST(:outcome AS text) IS NOT NULL THEN now() END) "
            "ON CONFLICT (chunk_batch_id, attempt) DO UPDATE SET "
            f"contents = CASE WHEN {_RUN_AGAIN} THEN usage.contents ELSE excluded.contents END, "
            f"recomputed = CASE WHEN {_RUN_AGAIN} THEN usage.recomputed ELSE excluded.recomputed END, "
            "tokens = excluded.tokens, engine_seconds = excluded.engine_seconds, "
            "at_risk = excluded.at_risk, outcome = coalesce(excluded.outcome, usage.outcome), "
            "evidence = coalesce(excluded.evidence, usage.evidence), "
            "ended_at = coalesce(excluded.ended_at, usage.ended_at) RETURNING contents, recomputed"
        ),
        {
            "chunk_batch": lease.chunk_batch_id,
            "attempt": lease.attempt,
            "job": lease.job_id,
            "space": lease.space_id,
            "provider": usage.provider,
            "worker": usage.worker,
            "contents": usage.contents,
            "tokens": usage.tokens,
            "seconds": usage.engine_seconds,
            "recomputed": usage.recomputed,
            "at_risk": usage.at_risk,
            "outcome": outcome,
            "evidence": evidence,
        },
    ).one()
    return replace(usage, contents=row.contents, recomputed=row.recomputed)


_RUN_AGAIN = "usage.contents + usage.recomputed = excluded.contents + excluded.recomputed"
"""Nothing was written since, or by this very transaction."""


def add(conn: sa.Connection, done: Mapping[tuple[int, int], tuple[int, int]]) -> None:
    """Add to the accounts of attempts that others carry out: ``(ChunkBatch id, attempt) → (contents, tokens)``.

    In the transaction that writes the vectors: both are there, or neither.
    """
    conn.execute(
        sa.text(
            "UPDATE usage u SET contents = u.contents + d.contents, tokens = u.tokens + d.tokens "
            "FROM unnest(CAST(:ids AS bigint[]), CAST(:attempts AS int[]), CAST(:contents AS int[]), "
            "CAST(:tokens AS bigint[])) AS d(id, attempt, contents, tokens) "
            "WHERE u.chunk_batch_id = d.id AND u.attempt = d.attempt"
        ),
        {
            "ids": [chunk_batch for chunk_batch, _ in done],
            "attempts": [attempt for _, attempt in done],
            "contents": [contents for contents, _ in done.values()],
            "tokens": [tokens for _, tokens in done.values()],
        },
    )


def close_attempt(
    conn: sa.Connection, chunk_batch_id: int, attempt: int, outcome: Outcome, evidence: str | None = None
) -> None:
    """Close an account whose counts stay."""
    conn.execute(
        sa.text(
            "UPDATE usage SET outcome = :outcome, evidence = :evidence, ended_at = now() "
            "WHERE chunk_batch_id = :id AND attempt = :attempt"
        ),
        {"id": chunk_batch_id, "attempt": attempt, "outcome": outcome, "evidence": evidence and evidence[:1000]},
    )


def book_released(conn: sa.Connection, owner: str) -> None:
    """Close the accounts of all that a worker holds: what ``chunk_batches.release_all`` gives back next, in the same
    transaction, which has the rows locked by then."""
    conn.execute(
        sa.text(
            "WITH held AS (SELECT id, attempt FROM chunk_batches WHERE lease_owner = :owner AND state = 'running' "
            "              FOR UPDATE) "
            "UPDATE usage u SET outcome = :outcome, ended_at = now() FROM held "
            "WHERE (u.chunk_batch_id, u.attempt) = (held.id, held.attempt)"
        ),
        {"owner": owner, "outcome": Outcome.RELEASED},
    )
