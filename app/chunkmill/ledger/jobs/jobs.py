"""Jobs: one row per ``enqueue``, its counts derived from its ChunkBatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from chunkmill.db.schema import CollectionRow, JobRow
from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.results import Job
from chunkmill.domain.routing import Choice
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.errors import InvalidInput, NotFound, SpaceMismatch
from chunkmill.ledger.jobs.routing import entry, lane_of
from chunkmill.spaces.registry import Space

SHOWN_DEAD_CHUNKS = 20
PRODUCER_LOCK = 0x63686D02  # first key of the advisory lock; the second is the job
CANCELLED_CHANNEL = "chunkmill_cancelled"


@dataclass(frozen=True, slots=True)
class Opened:
    """A job to enqueue into, and the lane of its ChunkBatches. ``is_new`` is False when its key was used before."""

    id: int
    state: JobState
    lane: Route
    is_new: bool


def collection_id(conn: sa.Connection, name: str, space: Space) -> int:
    """The collection's id, made with ``space`` if it is new. Raises :class:`SpaceMismatch` for another space."""
    conn.execute(
        sa.dialects.postgresql.insert(CollectionRow)
        .values(name=name, space_id=space.id)
        .on_conflict_do_nothing(index_elements=["name"])
    )
    row = conn.execute(
        # Locked, so that nobody moves the collection to another space before this job can be seen.
        sa.select(CollectionRow.id, CollectionRow.space_id)
        .where(CollectionRow.name == name)
        .with_for_update(key_share=True)
    ).one()
    if row.space_id == space.id:
        return int(row.id)
    # An emptied collection may start again in another space.
    moved = conn.execute(
        sa.text(
            "UPDATE collections c SET space_id = :space WHERE c.id = :id "
            "AND NOT EXISTS (SELECT FROM chunks k WHERE k.collection_id = c.id) AND NOT EXISTS "
            "(SELECT FROM jobs j WHERE j.collection_id = c.id AND j.state IN ('enqueueing', 'running'))"
        ),
        {"id": row.id, "space": space.id},
    )
    if moved.rowcount == 0:
        raise SpaceMismatch(
            f"collection {name!r} holds vectors of space {row.space_id}, and this enqueue asks for space {space.id} "
            f"({space.spec.model!r}, {space.spec.dimensions} dimensions, {space.spec.precision}, long texts: "
            f"{space.spec.long_text}). Vectors of two spaces cannot be compared: enqueue into another collection, with "
            "the model, on_long, dimensions and precision of the first, or delete the collection's chunks before."
        )
    return int(row.id)


def find_collection(conn: sa.Connection, name: str) -> tuple[int, int]:
    """``(collection id, space id)``. Raises :class:`NotFound`."""
    row = conn.execute(
        sa.select(CollectionRow.id, CollectionRow.space_id).where(CollectionRow.name == name)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no collection {name!r}; `chunkmill audit` lists the ones that exist.")
    return int(row.id), int(row.space_id)


def open_job(
    conn: sa.Connection,
    *,
    collection: int,
    space: Space,
    route: Route,
    priority: Priority,
    on_long: OnLong,
    idempotency_key: str | None,
    choice: Choice | None = None,
    deadline: datetime | None = None,
) -> Opened:
    """A new job in state ``enqueueing``, or the one that ``idempotency_key`` made before, in the lane it has.

    ``choice`` is the lane of a new one; ``route`` is what was asked for.
    """
    at = conn.execute(sa.text("SELECT now()")).scalar_one()
    routing = [entry(choice, at)] if choice else []
    inserted = conn.execute(
        sa.dialects.postgresql.insert(JobRow)
        .values(
            collection_id=collection,
            space_id=space.id,
            state=JobState.ENQUEUEING,
            route=route,
            priority=priority.rank,
            on_long=on_long,
            idempotency_key=idempotency_key,
            deadline=deadline,
            routing=routing,
        )
        .on_conflict_do_nothing(index_elements=["idempotency_key"])
        .returning(JobRow.id)
    ).scalar_one_or_none()
    if inserted is not None:
        return Opened(inserted, JobState.ENQUEUEING, lane_of(route, routing), is_new=True)
    found = conn.execute(sa.select(JobRow).where(JobRow.idempotency_key == idempotency_key)).one()
    if (found.collection_id, found.space_id) != (collection, space.id):
        raise InvalidInput(
            f"idempotency_key {idempotency_key!r} belongs to job {found.id}, which went into another collection "
            "or space. Use a key of its own for each enqueue."
        )
    return Opened(found.id, JobState(found.state), lane_of(found.route, found.routing), is_new=False)


def hold_producer_lock(conn: sa.Connection, job_id: int) -> bool:
    """Take the session lock that says "the producer of this job is alive". False if another one holds it.

    The lock ends with the connection, so a producer that dies frees it at once.
    """
    return bool(conn.execute(sa.text("SELECT pg_try_advisory_lock(:space, :job)"), _producer_lock(job_id)).scalar_one())


def drop_producer_lock(conn: sa.Connection, job_id: int) -> None:
    conn.execute(sa.text("SELECT pg_advisory_unlock(:space, :job)"), _producer_lock(job_id))


def _producer_lock(job_id: int) -> dict[str, int]:
    # Two 32-bit keys; a collision after 2**31 jobs would only delay the naming of an abandoned job.
    return {"space": PRODUCER_LOCK, "job": job_id % 2**31}


def reopen_for_enqueue_if_unsealed(conn: sa.Connection, job_id: int) -> bool:
    """Start an unfinished enqueue over, in the same job; what is embedded by now will be a cache hit.

    False: the job was enqueued to its end, or cancelled, and stays as it is.
    """
    reopened = conn.execute(
        sa.text(
            "UPDATE jobs SET state = 'enqueueing', error = NULL, finished_at = NULL, n_chunks = 0 "
            "WHERE id = :id AND sealed_at IS NULL AND state <> 'cancelled'"
        ),
        {"id": job_id},
    )
    if reopened.rowcount == 0:
        return False
    # Usage points at the ChunkBatches that ran, so those stay; a worker inside one may finish it.
    conn.execute(
        sa.text(
            "DELETE FROM chunk_batches b WHERE job_id = :id AND state <> 'running' "
            "AND NOT EXISTS (SELECT FROM usage u WHERE u.chunk_batch_id = b.id)"
        ),
        {"id": job_id},
    )
    conn.execute(sa.text("DELETE FROM dead_chunks WHERE job_id = :id"), {"id": job_id})
    return True


def is_key_used(conn: sa.Connection, idempotency_key: str) -> bool:
    used = sa.text("SELECT EXISTS (SELECT FROM jobs WHERE idempotency_key = :key)")
    return bool(conn.execute(used, {"key": idempotency_key}).scalar_one())


def is_sealed(conn: sa.Connection, idempotency_key: str) -> bool:
    """Whether the key has a job whose enqueue reached its end."""
    return bool(
        conn.execute(
            sa.text("SELECT EXISTS (SELECT FROM jobs WHERE idempotency_key = :key AND sealed_at IS NOT NULL)"),
            {"key": idempotency_key},
        ).scalar_one()
    )


def add_chunks(conn: sa.Connection, job_id: int, n: int) -> bool:
    """Count a window's chunks. False when the job is not being enqueued any more: it was cancelled."""
    result = conn.execute(
        sa.text("UPDATE jobs SET n_chunks = n_chunks + :n WHERE id = :id AND state = 'enqueueing'"),
        {"id": job_id, "n": n},
    )
    return result.rowcount == 1


def seal_if_enqueueing(conn: sa.Connection, job_id: int) -> None:
    """The iterable has ended: from now on the job may complete."""
    conn.execute(
        sa.text("UPDATE jobs SET state = 'running', sealed_at = now() WHERE id = :id AND state = 'enqueueing'"),
        {"id": job_id},
    )


def retry_if_ended(conn: sa.Connection, job_id: int, *, max_attempts: int) -> bool:
    """Make what a failed or cancelled job left open available again, with fresh attempts. False: nothing to do.

    ``attempt`` goes on counting, for it is the fencing number; ``max_attempts`` moves up instead.
    """
    row = conn.execute(
        sa.text(
            "UPDATE jobs SET state = 'running', error = NULL, finished_at = NULL "
            "WHERE id = :id AND sealed_at IS NOT NULL AND state IN ('failed', 'cancelled') RETURNING id"
        ),
        {"id": job_id},
    ).one_or_none()
    if row is None:
        return False
    conn.execute(
        sa.text(
            "UPDATE chunk_batches b SET state = 'available', not_before = now(), rung_at = NULL, "
            "max_attempts = attempt + :more, deaths = least(deaths, :suspect), n_cached = 0, error_code = NULL, "
            "error = NULL, finished_at = NULL "
            # Some are available still where a cancel has not come to its end.
            "WHERE job_id = :id AND (state IN ('discarded', 'cancelled') OR state = 'available' AND attempt > 0 "
            "OR id IN ("
            # From the dead chunks through the arrays once; an array per dead chunk would be quadratic.
            "  SELECT d.id FROM chunk_batches d CROSS JOIN unnest(d.content_hashes) AS h(content_hash) "
            "  JOIN dead_chunks x ON x.job_id = :id AND x.code <> 'too_long' AND x.content_hash = h.content_hash "
            "  WHERE d.job_id = :id AND d.state = 'completed'))"
        ),
        {"id": job_id, "more": max_attempts, "suspect": SUSPECT_DEATHS},
    )
    conn.execute(
        sa.text("DELETE FROM dead_chunks WHERE job_id = :id AND content_hash IS NOT NULL AND code <> 'too_long'"),
        {"id": job_id},
    )
    return True


_SELECT_JOBS = """
SELECT j.*, c.name AS collection, s.fingerprint, s.model,
       coalesce(b.contents, 0) AS contents, coalesce(b.cached, 0) AS cached,
       coalesce(b.embedded, 0) AS embedded, coalesce(b.remaining, 0) AS remaining,
       coalesce(b.truncated, 0) AS truncated,
       coalesce(u.tokens, 0) AS tokens, coalesce(u.engine_seconds, 0) AS engine_seconds,
       (SELECT count(*) FROM dead_chunks d WHERE d.job_id = j.id) AS dead
FROM jobs j JOIN collections c ON c.id = j.collection_id JOIN spaces s ON s.id = j.space_id
LEFT JOIN LATERAL (
    SELECT sum(n_contents) AS contents, sum(n_cached) AS cached, sum(n_embedded) AS embedded,
           sum(n_contents - n_cached - n_embedded) FILTER (WHERE state IN ('available', 'running')) AS remaining,
           sum(n_truncated) AS truncated
    FROM chunk_batches WHERE job_id = j.id) b ON true
LEFT JOIN LATERAL (
    SELECT sum(tokens) AS tokens, sum(engine_seconds) AS engine_seconds FROM usage WHERE job_id = j.id) u ON true
"""


def get(conn: sa.Connection, job_id: int) -> Job:
    """One job with the first of its dead chunks. Raises :class:`NotFound`."""
    row = conn.execute(sa.text(_SELECT_JOBS + "WHERE j.id = :id"), {"id": job_id}).one_or_none()
    if row is None:
        raise NotFound(f"there is no job {job_id}; `chunkmill jobs` lists the latest.")
    return _job(row, dead_chunks(conn, job_id, limit=SHOWN_DEAD_CHUNKS))


def latest(conn: sa.Connection, limit: int) -> list[Job]:
    rows = conn.execute(sa.text(_SELECT_JOBS + "ORDER BY j.id DESC LIMIT :limit"), {"limit": limit})
    return [_job(row, ()) for row in rows]


def space_id(conn: sa.Connection, job_id: int) -> int:
    return int(conn.execute(sa.select(JobRow.space_id).where(JobRow.id == job_id)).scalar_one())


def collection_names(conn: sa.Connection) -> list[str]:
    return list(conn.execute(sa.select(CollectionRow.name).order_by(CollectionRow.name)).scalars())


def dead_chunks(conn: sa.Connection, job_id: int, *, limit: int) -> Sequence[DeadChunk]:
    rows = conn.execute(
        sa.text("SELECT chunk_id, code, reason FROM dead_chunks WHERE job_id = :id ORDER BY id LIMIT :limit"),
        {"id": job_id, "limit": limit},
    )
    return [DeadChunk(row.chunk_id, row.code, row.reason) for row in rows]


def _job(row: sa.Row[tuple[object, ...]], dead: Sequence[DeadChunk]) -> Job:
    priority = next(p for p in Priority if p.rank == row.priority)
    return Job(
        id=row.id,
        state=JobState(row.state),
        collection=row.collection,
        space=row.fingerprint,
        model=row.model,
        route=Route(row.route),
        priority=priority,
        idempotency_key=row.idempotency_key,
        chunks=row.n_chunks,
        contents=int(row.contents),
        cached=int(row.cached),
        embedded=int(row.embedded),
        remaining=int(row.remaining),
        dead=row.dead,
        truncated=int(row.truncated),
        tokens=int(row.tokens),
        engine_seconds=float(row.engine_seconds),
        created_at=row.created_at,
        finished_at=row.finished_at,
        error=row.error,
        dead_chunks=tuple(dead),
    )
