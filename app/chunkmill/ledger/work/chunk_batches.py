"""ChunkBatches: each transition is one UPDATE that names its guard.

``attempt`` is the fencing number. A worker whose lease was taken back holds an old one, and none of its
updates finds a row any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.db.copy import copy_binary, encode_hash_array, encode_rows
from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.retries import retry_delay
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import ChunkBatchState, Route
from chunkmill.errors import ChunkmillError


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one worker to finish one ChunkBatch, until ``attempt`` is raised by another claim."""

    chunk_batch_id: int
    attempt: int
    max_attempts: int
    job_id: int
    space_id: int
    collection_id: int
    on_long: OnLong
    suspect: bool = False
    """Workers died with it: it is embedded with nothing beside it."""


@dataclass(frozen=True, slots=True)
class Common:
    """What all ChunkBatches of one enqueue share."""

    job_id: int
    space_id: int
    route: Route
    priority: int
    max_attempts: int


def add(conn: sa.Connection, common: Common, batches: Sequence[Sequence[bytes]], *, deaths: int = 0) -> None:
    """Add one available ChunkBatch for each sequence of content hashes."""
    _copy(conn, common, ChunkBatchState.AVAILABLE, [(hashes, 0, 0) for hashes in batches], deaths=deaths)


def add_cached(conn: sa.Connection, common: Common, hashes: Sequence[bytes], *, n_truncated: int) -> None:
    """Record contents that have a vector already as a ChunkBatch born completed.

    So the anti-join that ends the job covers every content of the job, and a vector that vanished since
    is embedded again.
    """
    if hashes:
        _copy(conn, common, ChunkBatchState.COMPLETED, [(hashes, len(hashes), n_truncated)])


def _copy(
    conn: sa.Connection,
    common: Common,
    state: ChunkBatchState,
    batches: Sequence[tuple[Sequence[bytes], int, int]],
    *,
    deaths: int = 0,
) -> None:
    """COPY rows of ``(hashes, n_cached, n_truncated)``.

    As bind parameters the arrays took a tenth of an enqueue: psycopg writes each hash as escaped text.
    """
    if not batches:
        return
    shared = (
        common.job_id.to_bytes(8, "big"),
        common.space_id.to_bytes(4, "big"),
        common.route.encode(),
        common.priority.to_bytes(2, "big"),
        common.max_attempts.to_bytes(4, "big"),
        state.encode(),
        deaths.to_bytes(2, "big"),
    )
    rows = (
        (
            *shared,
            encode_hash_array(hashes),
            len(hashes).to_bytes(4, "big"),
            n_cached.to_bytes(4, "big"),
            n_truncated.to_bytes(4, "big"),
        )
        for hashes, n_cached, n_truncated in batches
    )
    columns = (
        "job_id, space_id, route, priority, max_attempts, state, deaths, content_hashes, n_contents, n_cached, "
        "n_truncated"
    )
    copy_binary(conn, f"chunk_batches ({columns})", encode_rows(rows))


def claim_if_due(
    conn: sa.Connection,
    chunk_batch_id: int,
    *,
    owner: str,
    lease_seconds: float,
    route: Route = Route.LOCAL,
    not_spaces: Sequence[int] = (),
) -> Lease | None:
    """Lease a ChunkBatch, or None: it is done, leased by another, not due yet, out of attempts, or on another route
    since its doorbell was rung.

    A ChunkBatch of one of ``not_spaces`` is left for another worker. A lease that ran out is not claimed over: the
    poller takes it back, and counts the death.
    """
    row = conn.execute(
        sa.text(
            "UPDATE chunk_batches b SET state = 'running', attempt = attempt + 1, lease_owner = :owner, "
            "lease_until = now() + make_interval(secs => :lease) FROM jobs j "
            "WHERE b.id = :id AND j.id = b.job_id AND b.attempt < b.max_attempts AND b.not_before <= now() "
            "AND b.route = :route "
            "AND b.space_id <> ALL(CAST(:not_spaces AS int[])) "
            "AND b.state = 'available' AND j.state <> 'cancelled' "
            "RETURNING b.attempt, b.max_attempts, b.deaths, b.job_id, b.space_id, j.collection_id, j.on_long"
        ),
        {
            "id": chunk_batch_id,
            "owner": owner,
            "lease": lease_seconds,
            "route": route,
            "not_spaces": list(not_spaces),
        },
    ).one_or_none()
    if row is None:
        return None
    return Lease(
        chunk_batch_id=chunk_batch_id,
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        job_id=row.job_id,
        space_id=row.space_id,
        collection_id=row.collection_id,
        on_long=OnLong(row.on_long),
        suspect=row.deaths >= SUSPECT_DEATHS,
    )


def renew_if_held(conn: sa.Connection, leases: Sequence[Lease], *, lease_seconds: float) -> set[int]:
    """Renew all leases of a process in one statement; returns the ids that are still held."""
    held = (
        "SELECT b.id FROM chunk_batches b "
        "JOIN unnest(CAST(:ids AS bigint[]), CAST(:attempts AS int[])) AS l(id, attempt) USING (id, attempt) "
        "WHERE b.state = 'running'"
    )
    facts = {"ids": [lease.chunk_batch_id for lease in leases], "attempts": [lease.attempt for lease in leases]}
    conn.execute(
        sa.text(
            "UPDATE chunk_batches SET lease_until = now() + make_interval(secs => :lease) WHERE id = ANY(ARRAY("
            # What another transaction has locked, such as a cancel of a large job, must not keep the others waiting.
            f"{held} ORDER BY b.id FOR NO KEY UPDATE OF b SKIP LOCKED))"
        ),
        {**facts, "lease": lease_seconds},
    )
    return set(conn.execute(sa.text(held), facts).scalars())


def record_progress_if_held(conn: sa.Connection, lease: Lease, n_embedded: int) -> bool:
    """Note how many contents have a vector by now. False: the lease is lost."""
    result = conn.execute(
        sa.text(f"UPDATE chunk_batches SET n_embedded = :n {_HELD}"), {"n": n_embedded, **_held(lease)}
    )
    return result.rowcount == 1


def complete_if_held(conn: sa.Connection, lease: Lease, *, n_embedded: int, n_truncated: int) -> bool:
    """End an attempt that left nothing to do. False: the lease is lost, and nothing was changed.

    True as well where this attempt has completed it before: the answer to its commit was lost, and it is run again.
    """
    result = conn.execute(
        sa.text(
            "UPDATE chunk_batches SET state = 'completed', n_embedded = :n, n_truncated = :truncated, "
            "lease_owner = NULL, lease_until = NULL, finished_at = now(), error_code = NULL, error = NULL "
            f"{_HELD}"
        ),
        {"n": n_embedded, "truncated": n_truncated, **_held(lease)},
    )
    if result.rowcount == 1:
        return True
    # With an error it was cut up or buried, after this attempt had been counted as dead.
    before = (
        "SELECT EXISTS (SELECT FROM chunk_batches WHERE id = :id AND attempt = :attempt AND state = 'completed' "
        "AND error_code IS NULL)"
    )
    return bool(conn.execute(sa.text(before), _held(lease)).scalar_one())


def fail_if_held(
    conn: sa.Connection, lease: Lease, *, code: str, error: str, retryable: bool
) -> ChunkBatchState | None:
    """End an attempt that raised: available again after a delay, or discarded. None: the lease is lost."""
    delay = retry_delay(lease.attempt, lease.max_attempts, retryable=retryable)
    facts = {"code": code, "error": error[:2000], **_held(lease)}
    if delay is None:
        state = ChunkBatchState.DISCARDED
        change = "state = 'discarded', finished_at = now()"
    else:
        state = ChunkBatchState.AVAILABLE
        change = "state = 'available', rung_at = NULL, not_before = now() + make_interval(secs => :delay)"
        facts["delay"] = delay
    result = conn.execute(
        sa.text(
            f"UPDATE chunk_batches SET {change}, lease_owner = NULL, lease_until = NULL, error_code = :code, "
            f"error = :error {_HELD}"
        ),
        facts,
    )
    return state if result.rowcount else None


def release_if_held(
    conn: sa.Connection, lease: Lease, *, because: ChunkmillError | None = None, delay_s: float = 0.0
) -> bool:
    """Give a ChunkBatch back at once and uncharged: the worker is leaving or unfit, the work is not at fault.

    ``because`` is noted on it until somebody completes it; ``delay_s`` keeps it from others so long. False: the lease
    is lost.

    The attempt number stays, for it is the fencing number; the limit moves up by one instead.
    """
    result = conn.execute(
        sa.text(
            "UPDATE chunk_batches SET state = 'available', lease_owner = NULL, lease_until = NULL, rung_at = NULL, "
            "error_code = coalesce(:code, error_code), error = coalesce(:error, error), "
            # Without a delay it stays due since when it was, before what nobody has begun.
            "not_before = CASE WHEN :delay > 0 THEN now() + make_interval(secs => :delay) ELSE not_before END, "
            f"max_attempts = max_attempts + 1 {_HELD}"
        ),
        {
            "code": because and because.code,
            "error": because and str(because)[:2000],
            "delay": delay_s,
            **_held(lease),
        },
    )
    return result.rowcount == 1


def release_all(conn: sa.Connection, owner: str) -> int:
    """Give back, uncharged, everything a worker holds whose tasks do not come to it themselves; returns how many."""
    result = conn.execute(
        sa.text(
            "UPDATE chunk_batches SET state = 'available', lease_owner = NULL, lease_until = NULL, rung_at = NULL, "
            "max_attempts = max_attempts + 1 WHERE lease_owner = :owner AND state = 'running'"
        ),
        {"owner": owner},
    )
    return int(result.rowcount)


_HELD = "WHERE id = :id AND attempt = :attempt AND state = 'running'"


def _held(lease: Lease) -> dict[str, int]:
    return {"id": lease.chunk_batch_id, "attempt": lease.attempt}
