"""Writes the account of each attempt: what it cost and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import sqlalchemy as sa

from chunkmill.db.statements import with_constants
from chunkmill.domain.reasons import storable
from chunkmill.domain.states import ChunkBatchState
from chunkmill.ledger.work.chunk_batches import Lease


class Outcome(StrEnum):
    """How an attempt ended. An attempt that lost its lease has no outcome."""

    COMPLETED = "completed"
    RELEASED = "released"
    FAILED = "failed"
    DIED = "died"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one attempt has done so far.

    ``contents`` and ``tokens`` were embedded in ``engine_seconds``. ``recomputed`` counts the contents that already had
    a vector when the attempt wrote its own. ``at_risk`` is the most that it ever had embedded or on the device without
    having written it.
    """

    provider: str
    worker: str
    contents: int = 0
    tokens: int = 0
    engine_seconds: float = 0.0
    recomputed: int = 0
    at_risk: int = 0


# If the sums of contents and recomputed are equal, nothing was written since, or this very transaction runs again and
# met its own vectors: then the booked split between the two stays.
_BOOK = sa.text("""
INSERT INTO usage (
    chunk_batch_id, attempt, job_id, space_id, provider, worker,
    contents, tokens, engine_seconds, recomputed, at_risk, outcome, evidence, ended_at)
VALUES (
    :chunk_batch, :attempt, :job, :space, :provider, :worker,
    :contents, :tokens, :seconds, :recomputed, :at_risk, CAST(:outcome AS text), :evidence,
    CASE WHEN CAST(:outcome AS text) IS NOT NULL THEN now() END)
ON CONFLICT (chunk_batch_id, attempt) DO UPDATE SET
    contents = CASE
        WHEN usage.contents + usage.recomputed = excluded.contents + excluded.recomputed THEN usage.contents
        ELSE excluded.contents END,
    recomputed = CASE
        WHEN usage.contents + usage.recomputed = excluded.contents + excluded.recomputed THEN usage.recomputed
        ELSE excluded.recomputed END,
    tokens = excluded.tokens,
    engine_seconds = excluded.engine_seconds,
    at_risk = excluded.at_risk,
    outcome = coalesce(excluded.outcome, usage.outcome),
    evidence = coalesce(excluded.evidence, usage.evidence),
    ended_at = coalesce(excluded.ended_at, usage.ended_at)
RETURNING contents, recomputed
""")


def book(
    conn: sa.Connection, lease: Lease, usage: Usage, outcome: Outcome | None = None, evidence: str | None = None
) -> Usage:
    """Bring an attempt's account up to date and return it as booked.

    ``outcome`` closes the account; ``evidence`` says what was seen if the attempt failed. The counts are totals under
    the key (ChunkBatch, attempt), so a transaction that runs again books nothing twice. Such a transaction also meets
    its own vectors, and what it had booked as ``contents`` stays booked so: go on from the usage that is returned.
    """
    row = conn.execute(
        _BOOK,
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
            "evidence": evidence and storable(evidence),
        },
    ).one()
    return replace(usage, contents=row.contents, recomputed=row.recomputed)


_ADD = sa.text("""
UPDATE usage u
SET contents = u.contents + d.contents, tokens = u.tokens + d.tokens
FROM unnest(
    CAST(:ids AS bigint[]), CAST(:attempts AS int[]), CAST(:contents AS int[]), CAST(:tokens AS bigint[])
) AS d(id, attempt, contents, tokens)
WHERE u.chunk_batch_id = d.id AND u.attempt = d.attempt
""")


def add(conn: sa.Connection, done: Mapping[tuple[int, int], tuple[int, int]]) -> None:
    """Add to the accounts of attempts at a provider: ``(ChunkBatch id, attempt) → (contents, tokens)``.

    Call it in the transaction that writes the vectors, so that both are there or neither.
    """
    conn.execute(
        _ADD,
        {
            "ids": [chunk_batch for chunk_batch, _ in done],
            "attempts": [attempt for _, attempt in done],
            "contents": [contents for contents, _ in done.values()],
            "tokens": [tokens for _, tokens in done.values()],
        },
    )


_CLOSE = sa.text("""
UPDATE usage
SET outcome = :outcome, evidence = :evidence, ended_at = now()
WHERE chunk_batch_id = :id AND attempt = :attempt
""")


def close_attempt(
    conn: sa.Connection, chunk_batch_id: int, attempt: int, outcome: Outcome, evidence: str | None = None
) -> None:
    """Close an account without changing its counts."""
    evidence = evidence and storable(evidence)
    conn.execute(_CLOSE, {"id": chunk_batch_id, "attempt": attempt, "outcome": outcome, "evidence": evidence})


_CLOSE_RELEASED = with_constants(
    """
WITH held AS (
    SELECT id, attempt
    FROM chunk_batches
    WHERE lease_owner = :owner AND state = :running
    FOR UPDATE)
UPDATE usage u
SET outcome = :outcome, ended_at = now()
FROM held
WHERE u.chunk_batch_id = held.id AND u.attempt = held.attempt
""",
    running=ChunkBatchState.RUNNING,
)


def book_released(conn: sa.Connection, owner: str) -> None:
    """Close the accounts of all ChunkBatches that a worker holds, and lock those ChunkBatches.

    Call it before ``chunk_batches.release_all``, in the same transaction.
    """
    conn.execute(_CLOSE_RELEASED, {"owner": owner, "outcome": Outcome.RELEASED})
