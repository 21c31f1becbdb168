"""ChunkBatches of route ``openai``: taken by ProviderBatches, and settled when those have ended.

While ProviderBatches have its contents, a ChunkBatch is ``running`` under a lease without an end, and its attempt
number fences it as usual. What became of a content is read from what is there: a vector, a dead chunk, or neither.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chunkmill.db.locks import DELETE_LOCK, GATHER_LOCK, lock, lock_shared
from chunkmill.domain.reasons import storable
from chunkmill.domain.retries import retry_delay
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import ChunkBatchState, JobState, Route
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_inputs import InFlight
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill.ledger.work.chunk_batches import Lease, SharedFields
from chunkmill.ledger.work.usage import Outcome, Usage
from chunkmill.spaces.registry import Space
from chunkmill.store.read import split_damaged

AGAIN_SECONDS = 5.0
"""How long a ChunkBatch waits before it is tried again, if others have its contents in plain requests."""


@dataclass(frozen=True, slots=True)
class WaitingChunkBatch:
    """An available ChunkBatch, locked by this transaction."""

    id: int
    job_id: int
    space_id: int
    priority: int
    attempt: int
    max_attempts: int
    hashes: tuple[bytes, ...]
    on_long: OnLong
    collection_id: int


def serialize_gathers(conn: sa.Connection) -> None:
    """Keep others from filling a ProviderBatch, or deleting texts, until the end of this transaction."""
    lock(conn, GATHER_LOCK)
    lock_shared(conn, DELETE_LOCK)


def drop_gathering(conn: sa.Connection, step: Step) -> None:
    """Delete a ProviderBatch that was opened and got no contents."""
    conn.execute(
        sa.text("DELETE FROM provider_batches WHERE id = :id AND attempt = :attempt AND state = :gathering"),
        {"id": step.id, "attempt": step.attempt, "gathering": State.GATHERING},
    )


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job some of whose ChunkBatches may wait for a ProviderBatch."""

    id: int
    priority: int
    on_long: OnLong
    collection_id: int


def open_jobs(conn: sa.Connection, space: Space) -> list[OpenJob]:
    """The open jobs of a space that may use the Batch API, those of high priority first."""
    rows = conn.execute(
        sa.text("""
            SELECT id, priority, on_long, collection_id
            FROM jobs
            WHERE state IN (:enqueueing, :running) AND route IN (:openai, :auto) AND space_id = :space
            ORDER BY priority, id
        """),
        {
            "space": space.id,
            "enqueueing": JobState.ENQUEUEING,
            "running": JobState.RUNNING,
            "openai": Route.OPENAI,
            "auto": Route.AUTO,
        },
    )
    return [OpenJob(row.id, row.priority, OnLong(row.on_long), row.collection_id) for row in rows]


def take_waiting(conn: sa.Connection, space: Space, job: OpenJob, *, limit: int) -> list[WaitingChunkBatch]:
    """The next available ChunkBatches of a job, locked. Those that others are changing are skipped."""
    rows = conn.execute(
        sa.text("""
            SELECT id, attempt, max_attempts, content_hashes
            FROM chunk_batches
            WHERE state = :available AND rung_at IS NULL AND route = :openai AND priority = :priority
              AND job_id BETWEEN :job AND :job AND not_before <= now()
            ORDER BY job_id, id
            LIMIT :limit
            FOR UPDATE SKIP LOCKED
        """),
        {
            "available": ChunkBatchState.AVAILABLE,
            "openai": Route.OPENAI,
            "priority": job.priority,
            "job": job.id,
            "limit": limit,
        },
    )
    return [
        WaitingChunkBatch(
            row.id,
            job.id,
            space.id,
            job.priority,
            row.attempt,
            row.max_attempts,
            tuple(row.content_hashes),
            job.on_long,
            job.collection_id,
        )
        for row in rows
    ]


def missing_texts(
    conn: sa.Connection, space: Space, waiting: WaitingChunkBatch
) -> tuple[dict[bytes, str], list[bytes]]:
    """``content_hash → text`` of its contents that are still there, have no vector, and are not dead in its job.

    Beside them the hashes of those whose stored text is another one, which must not be sent.
    """
    # A dead content is left out, because one that was refused alone would be sent again with the others for ever.
    rows = conn.execute(
        sa.text(f"""
            SELECT c.content_hash, c.text
            FROM contents c
            WHERE c.content_hash = ANY(:hashes)
              AND NOT EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = c.content_hash)
              AND NOT EXISTS (
                  SELECT FROM dead_chunks d WHERE d.job_id = :job AND d.content_hash = c.content_hash
              )
        """),
        {"hashes": list(waiting.hashes), "job": waiting.job_id},
    )
    right, damaged = split_damaged(rows)
    return dict(right), damaged


def split(conn: sa.Connection, waiting: WaitingChunkBatch, kept: int) -> None:
    """Leave the first ``kept`` contents in a ChunkBatch and move the others into a new one, which waits."""
    rest = waiting.hashes[kept:]
    attempts_left = max(1, waiting.max_attempts - waiting.attempt)
    shared = SharedFields(waiting.job_id, waiting.space_id, Route.OPENAI, waiting.priority, attempts_left)
    chunk_batches.add(conn, shared, [rest])
    conn.execute(
        sa.text("UPDATE chunk_batches SET content_hashes = :hashes, n_contents = :n WHERE id = :id"),
        {"id": waiting.id, "hashes": list(waiting.hashes[:kept]), "n": kept},
    )


def postpone(conn: sa.Connection, waiting: WaitingChunkBatch, *, delay_s: float) -> None:
    """Let a ChunkBatch that has no room in a ProviderBatch now wait for ``delay_s`` seconds."""
    conn.execute(
        sa.text("UPDATE chunk_batches SET not_before = now() + make_interval(secs => :delay) WHERE id = :id"),
        {"id": waiting.id, "delay": delay_s},
    )


def begin(conn: sa.Connection, waiting: WaitingChunkBatch, step: Step) -> Lease:
    """Lease a ChunkBatch to the ProviderBatches that have its contents, and open the account of the attempt."""
    attempt = conn.execute(
        sa.text("""
            UPDATE chunk_batches
            SET state = :running, attempt = attempt + 1, lease_owner = :owner, lease_until = NULL,
                error_code = NULL, error = NULL
            WHERE id = :id
            RETURNING attempt
        """),
        {"id": waiting.id, "owner": step.name, "running": ChunkBatchState.RUNNING},
    ).scalar_one()
    lease = Lease(
        waiting.id,
        attempt,
        waiting.max_attempts,
        waiting.job_id,
        waiting.space_id,
        waiting.collection_id,
        waiting.on_long,
    )
    usage.book(conn, lease, Usage("openai", step.name))
    return lease


def bury(conn: sa.Connection, lease: Lease, dead: Sequence[DeadContent]) -> None:
    dead_chunks.add_contents(conn, dead, job_id=lease.job_id, collection_id=lease.collection_id)


def bury_in_flight(conn: sa.Connection, dead: Sequence[tuple[InFlight, str, str]]) -> None:
    """Put contents ``(content, code, reason)`` that the provider refuses on the dead lists of their jobs."""
    by_job: dict[int, list[tuple[InFlight, str, str]]] = {}
    for refused in dead:
        by_job.setdefault(refused[0].job_id, []).append(refused)
    for job_id, buried in by_job.items():
        collection_id = conn.execute(
            sa.text("SELECT collection_id FROM jobs WHERE id = :id"), {"id": job_id}
        ).scalar_one()
        contents = [DeadContent(content.content_hash, code, reason) for content, code, reason in buried]
        dead_chunks.add_contents(conn, contents, job_id=job_id, collection_id=collection_id)


def join(conn: sa.Connection, lease: Lease, carriers: Collection[int]) -> None:
    """Let the ChunkBatch wait for these ProviderBatches."""
    conn.execute(
        sa.text("""
            INSERT INTO provider_batch_members (provider_batch_id, chunk_batch_id)
            SELECT unnest(CAST(:carriers AS bigint[])), :id
            ON CONFLICT DO NOTHING
        """),
        {"carriers": sorted(carriers), "id": lease.chunk_batch_id},
    )


def charge_failure(conn: sa.Connection, failures: Mapping[tuple[int, int], tuple[str, str]]) -> None:
    """Note on ChunkBatches why contents came back, ``(id, attempt) → (code, reason)``: their attempts are charged."""
    for (chunk_batch_id, attempt), (code, reason) in failures.items():
        conn.execute(
            sa.text("""
                UPDATE chunk_batches
                SET error_code = :code, error = :error
                WHERE id = :id AND attempt = :attempt AND state = :running
            """),
            {
                "id": chunk_batch_id,
                "attempt": attempt,
                "code": storable(code),
                "error": storable(reason),
                "running": ChunkBatchState.RUNNING,
            },
        )


def discard(conn: sa.Connection, chunk_batch_ids: Sequence[int], *, code: str, reason: str) -> None:
    """Discard ChunkBatches, however many attempts they have left; ``retry`` makes them available again."""
    rows = conn.execute(
        sa.text("""
            UPDATE chunk_batches
            SET state = :discarded, lease_owner = NULL, finished_at = now(), error_code = :code, error = :reason
            WHERE id = ANY(:ids) AND state = :running AND lease_until IS NULL
            RETURNING id, attempt
        """),
        {
            "ids": list(chunk_batch_ids),
            "code": storable(code),
            "reason": storable(reason),
            "discarded": ChunkBatchState.DISCARDED,
            "running": ChunkBatchState.RUNNING,
        },
    )
    for row in rows.all():
        usage.close_attempt(conn, row.id, row.attempt, Outcome.FAILED, reason)


def any_plain(conn: sa.Connection) -> bool:
    """Whether any ChunkBatch waits for plain requests."""
    # There are two conditions because there are two partial indexes, one for each.
    query = sa.text("""
        SELECT EXISTS (SELECT FROM chunk_batches WHERE state = :available AND route = :plain AND rung_at IS NULL)
            OR EXISTS (SELECT FROM chunk_batches WHERE state = :available AND route = :plain AND rung_at IS NOT NULL)
    """)
    return bool(conn.execute(query, {"available": ChunkBatchState.AVAILABLE, "plain": Route.OPENAI_SYNC}).scalar_one())


def ready_to_settle(conn: sa.Connection, *, limit: int) -> list[tuple[int, int]]:
    """``(space id, ChunkBatch id)`` of ChunkBatches whose ProviderBatches have all ended."""
    rows = conn.execute(
        sa.text("""
            SELECT b.space_id, b.id
            FROM chunk_batches b
            WHERE b.state = :running AND b.lease_until IS NULL
              AND NOT EXISTS (
                  SELECT FROM provider_batch_members m
                  JOIN provider_batches p ON p.id = m.provider_batch_id
                  WHERE m.chunk_batch_id = b.id AND p.state NOT IN (:cleaning, :closed)
              )
            ORDER BY b.id
            LIMIT :limit
        """),
        {"limit": limit, "running": ChunkBatchState.RUNNING, "cleaning": State.CLEANING, "closed": State.CLOSED},
    )
    return [(row.space_id, row.id) for row in rows]


def members(conn: sa.Connection, provider_batch_id: int) -> list[int]:
    """Ids of the ChunkBatches that wait for a ProviderBatch."""
    rows = conn.execute(
        sa.text("SELECT chunk_batch_id FROM provider_batch_members WHERE provider_batch_id = :id ORDER BY 1"),
        {"id": provider_batch_id},
    )
    return list(rows.scalars())


def settle(conn: sa.Connection, space: Space, chunk_batch_ids: Sequence[int]) -> set[int]:
    """End the attempts of these ChunkBatches that wait for no ProviderBatch any more; returns the ids of their jobs.

    If two ProviderBatches end at once, both lock the ChunkBatch first, and the later sees what the earlier did.
    """
    conn.execute(
        sa.text("SELECT FROM chunk_batches WHERE id = ANY(:ids) ORDER BY id FOR UPDATE"), {"ids": list(chunk_batch_ids)}
    )
    rows = conn.execute(
        sa.text("""
            SELECT b.*, j.on_long, j.collection_id
            FROM chunk_batches b
            JOIN jobs j ON j.id = b.job_id
            WHERE b.id = ANY(:ids) AND b.state = :running AND b.lease_until IS NULL
              AND NOT EXISTS (
                  SELECT FROM provider_batch_members m
                  JOIN provider_batches p ON p.id = m.provider_batch_id
                  WHERE m.chunk_batch_id = b.id AND p.state NOT IN (:cleaning, :closed)
              )
            ORDER BY b.id
        """),
        {
            "ids": list(chunk_batch_ids),
            "running": ChunkBatchState.RUNNING,
            "cleaning": State.CLEANING,
            "closed": State.CLOSED,
        },
    ).all()
    for row in rows:
        _settle(conn, space, row)
    return {row.job_id for row in rows}


def _settle(conn: sa.Connection, space: Space, row: sa.Row[Any]) -> None:
    lease = Lease(
        row.id, row.attempt, row.max_attempts, row.job_id, row.space_id, row.collection_id, OnLong(row.on_long)
    )
    if lease.on_long is OnLong.REJECT:
        _refuse_long(conn, lease, space)
    contents = conn.execute(
        sa.text(f"""
            SELECT count(*) FILTER (WHERE v.content_hash IS NOT NULL) AS embedded,
                   count(*) FILTER (WHERE v.truncated) AS truncated,
                   array_agg(h.content_hash) FILTER (
                       WHERE v.content_hash IS NULL AND c.content_hash IS NOT NULL AND d.content_hash IS NULL
                   ) AS missing
            FROM chunk_batches b
            CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
            LEFT JOIN {space.table_name} v ON v.content_hash = h.content_hash
            LEFT JOIN contents c ON c.content_hash = h.content_hash
            LEFT JOIN (SELECT DISTINCT content_hash FROM dead_chunks WHERE job_id = :job) d
                   ON d.content_hash = h.content_hash
            WHERE b.id = :id
        """),
        {"id": row.id, "job": row.job_id},
    ).one()
    missing: list[bytes] = contents.missing or []
    refused = contents.truncated if lease.on_long is OnLong.REJECT else 0
    n_embedded = contents.embedded - refused - row.n_cached
    if missing and row.error_code is not None:
        if retry_delay(row.attempt, row.max_attempts, retryable=True) is not None:
            chunk_batches.record_progress_if_held(conn, lease, n_embedded)
            chunk_batches.fail_if_held(conn, lease, code=row.error_code, error=row.error, retryable=True)
            usage.close_attempt(conn, lease.chunk_batch_id, lease.attempt, Outcome.FAILED, row.error)
            return
        reason = f"no vector after {row.attempt} attempts: {row.error}"
        bury(conn, lease, [DeadContent(hash_, row.error_code, reason) for hash_ in missing])
    elif missing:
        # No attempt is charged: the content expired, was cancelled at the provider, or was in flight for another
        # ChunkBatch that gave it up.
        chunk_batches.record_progress_if_held(conn, lease, n_embedded)
        chunk_batches.release_if_held(conn, lease, delay_s=AGAIN_SECONDS)
        usage.close_attempt(conn, lease.chunk_batch_id, lease.attempt, Outcome.RELEASED)
        return
    chunk_batches.complete_if_held(conn, lease, n_embedded=n_embedded, n_truncated=contents.truncated - refused)
    usage.close_attempt(conn, lease.chunk_batch_id, lease.attempt, Outcome.COMPLETED)


def _refuse_long(conn: sa.Connection, lease: Lease, space: Space) -> None:
    """Put long texts on the dead list that this job refuses, although another job had them truncated and embedded."""
    rows = conn.execute(
        sa.text(f"""
            SELECT v.content_hash, v.n_tokens
            FROM {space.table_name} v
            WHERE v.truncated AND v.content_hash IN (SELECT unnest(content_hashes) FROM chunk_batches WHERE id = :id)
        """),
        {"id": lease.chunk_batch_id},
    )
    truncated = [(row.content_hash, row.n_tokens) for row in rows]
    bury(conn, lease, dead_chunks.refused_contents(lease.on_long, truncated))
