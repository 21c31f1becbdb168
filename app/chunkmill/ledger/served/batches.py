"""Served batches: created by a request, and brought from state to state by whichever gateway has claimed them.

A claim is a lease with a fencing number, as of a ChunkBatch. Each change of state names the number and the state that
it expects, so that a gateway that was killed or was too slow changes nothing, and its step is taken again by another.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from chunkmill.db.statements import with_constants
from chunkmill.domain.served import BatchOrder, FileKind, ServedState
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.errors import LeaseLost
from chunkmill.ledger.access import spends
from chunkmill.ledger.served import files

LEASE_SECONDS = 30
"""How long a step may be silent. It renews its lease with each slice, which takes a second at most."""
COUNT_SECONDS = 5
"""How old the counts of a batch in progress may be. If a caller asks and they are older, they are counted again."""

_STATES = {state.value: state for state in ServedState}


@dataclass(frozen=True, slots=True)
class ServedBatch:
    """A row of ``served_batches``. ``name`` is its id in the API."""

    id: int
    name: str
    tenant: str
    asked: BatchOrder
    models: frozenset[str] | None
    state: ServedState
    input_file: str
    model: str | None
    errors: Sequence[Mapping[str, Any]] | None
    job_id: int | None
    output_file: str | None
    error_file: str | None
    n_total: int
    n_completed: int
    n_failed: int
    n_tokens: int
    attempt: int
    at: Mapping[ServedState, datetime | None]
    """When it came into each state but the first."""
    created_at: datetime
    expires_at: datetime
    is_expired: bool
    is_stale: bool
    """Its counts are old."""
    key_id: int | None = None
    """The key that made it, which pays for it. None if no key of the table made it, or if an older release did."""

    @property
    def job_key(self) -> str:
        """The idempotency key of its job, so that a step that is taken again goes on in the same job."""
        return f"chunkmill-{self.name}"


def create(
    conn: sa.Connection,
    *,
    tenant: str,
    idempotency_key: str | None,
    asked: BatchOrder,
    models: frozenset[str] | None,
    input_file: str,
) -> tuple[ServedBatch, bool]:
    """Create a batch. The key that creates it pays for it. If the tenant has used the ``idempotency_key`` before, that
    batch is returned, and False."""
    insert = """
        INSERT INTO served_batches (name, tenant, idempotency_key, asked, models, state, input_file, expires_at)
        VALUES (
            :name, :tenant, :key, CAST(:asked AS jsonb), CAST(:models AS text[]), :validating, :input_file,
            now() + make_interval(secs => :seconds))
        ON CONFLICT (tenant, idempotency_key) DO NOTHING
        RETURNING name
    """
    parameters = {
        "name": f"batch_{secrets.token_hex(12)}",
        "tenant": tenant,
        "key": idempotency_key,
        "asked": json.dumps(asdict(asked)),
        "models": None if models is None else sorted(models),
        "validating": ServedState.VALIDATING,
        "input_file": input_file,
        "seconds": asked.seconds,
    }
    name = conn.execute(sa.text(insert), parameters).scalar_one_or_none()
    is_new = name is not None
    if name is None:
        query = "SELECT name FROM served_batches WHERE tenant = :tenant AND idempotency_key = :key"
        name = conn.execute(sa.text(query), {"tenant": tenant, "key": idempotency_key}).scalar_one()
    if is_new and (key_id := spends.payer()) is not None and spends.are_kept(conn):
        conn.execute(
            sa.text("UPDATE served_batches SET key_id = :key WHERE name = :name"), {"key": key_id, "name": name}
        )
    batch = find(conn, tenant, name)
    assert batch is not None, "a batch that was just seen"  # noqa: S101
    return batch, is_new


def find(conn: sa.Connection, tenant: str, name: str) -> ServedBatch | None:
    """The tenant's batch; None if there is none."""
    if "\0" in name:
        return None  # no name contains this character, and Postgres would refuse the query
    query = """
        SELECT b.*, b.expires_at <= now() AS is_expired,
               coalesce(b.counted_at < now() - make_interval(secs => :stale), true) AS is_stale
        FROM served_batches b
        WHERE b.tenant = :tenant AND b.name = :name
    """
    row = conn.execute(sa.text(query), {"tenant": tenant, "name": name, "stale": float(COUNT_SECONDS)}).one_or_none()
    return None if row is None else _batch(row)


def get(conn: sa.Connection, batch_id: int) -> ServedBatch | None:
    """The batch with this id; None if it was pruned."""
    query = """
        SELECT b.*, b.expires_at <= now() AS is_expired,
               coalesce(b.counted_at < now() - make_interval(secs => :stale), true) AS is_stale
        FROM served_batches b
        WHERE b.id = :id
    """
    row = conn.execute(sa.text(query), {"id": batch_id, "stale": float(COUNT_SECONDS)}).one_or_none()
    return None if row is None else _batch(row)


def page(conn: sa.Connection, tenant: str, *, after: int | None, limit: int) -> list[ServedBatch]:
    """The first ``limit`` of the tenant's batches behind the one with the id ``after``, the newest first."""
    query = """
        SELECT b.*, b.expires_at <= now() AS is_expired,
               coalesce(b.counted_at < now() - make_interval(secs => :stale), true) AS is_stale
        FROM served_batches b
        WHERE b.tenant = :tenant AND (CAST(:after AS bigint) IS NULL OR b.id < CAST(:after AS bigint))
        ORDER BY b.id DESC
        LIMIT :limit
    """
    parameters = {"tenant": tenant, "after": after, "limit": limit, "stale": float(COUNT_SECONDS)}
    return [_batch(row) for row in conn.execute(sa.text(query), parameters)]


def cancel_if_open(conn: sa.Connection, batch_id: int) -> bool:
    """Begin to cancel a batch, and take its step away from the gateway that has it. False if it has ended."""
    update = """
        UPDATE served_batches
        SET state = :cancelling, cancelling_at = now(), attempt = attempt + 1, lease_until = NULL, not_before = now()
        WHERE id = :id AND state IN (:validating, :in_progress, :finalizing)
    """
    return conn.execute(sa.text(update), {"id": batch_id, **_STATES}).rowcount == 1


# A batch in progress has something to do once its job has ended, or its time is over.
_CLAIM_DUE = with_constants(
    """
UPDATE served_batches
SET attempt = attempt + 1, lease_until = now() + make_interval(secs => :lease)
WHERE id = (
    SELECT b.id
    FROM served_batches b
    WHERE b.state IN (:validating, :in_progress, :finalizing, :cancelling)
      AND b.not_before <= now()
      AND (b.lease_until IS NULL OR b.lease_until < now())
      AND (b.state <> :in_progress
           OR b.expires_at <= now()
           OR NOT EXISTS (SELECT FROM jobs j WHERE j.id = b.job_id AND j.state IN (:enqueueing, :running)))
    ORDER BY b.not_before, b.id
    LIMIT 1
    FOR UPDATE SKIP LOCKED)
RETURNING id
""",
    validating=ServedState.VALIDATING,
    in_progress=ServedState.IN_PROGRESS,
    finalizing=ServedState.FINALIZING,
    cancelling=ServedState.CANCELLING,
)


def claim_due(conn: sa.Connection) -> ServedBatch | None:
    """Lease the next batch that has something to do; None if there is none. Each of several gateways gets another."""
    parameters = {"lease": float(LEASE_SECONDS), "enqueueing": JobState.ENQUEUEING, "running": JobState.RUNNING}
    batch_id = conn.execute(_CLAIM_DUE, parameters).scalar_one_or_none()
    return None if batch_id is None else get(conn, batch_id)


_WAIT_FOR_JOBS = sa.text("""
SELECT EXISTS (
    SELECT FROM served_batches b JOIN jobs j ON j.id = b.job_id
    WHERE b.state = :in_progress AND j.state = :running)
""")


def wait_for_jobs(conn: sa.Connection) -> bool:
    """Whether a batch waits for the end of its job."""
    parameters = {"in_progress": ServedState.IN_PROGRESS, "running": JobState.RUNNING}
    return bool(conn.execute(_WAIT_FOR_JOBS, parameters).scalar_one())


def hold(conn: sa.Connection, batch: ServedBatch) -> None:
    """Renew the lease and lock the row until the end of this transaction. Raises :class:`LeaseLost`."""
    update = """
        UPDATE served_batches
        SET lease_until = now() + make_interval(secs => :lease)
        WHERE id = :id AND attempt = :attempt AND state = :state
    """
    parameters = {"id": batch.id, "attempt": batch.attempt, "state": batch.state, "lease": float(LEASE_SECONDS)}
    if conn.execute(sa.text(update), parameters).rowcount == 0:
        raise LeaseLost(f"batch {batch.name} is held by another gateway, or was cancelled.")


def release(conn: sa.Connection, batch: ServedBatch, *, pause_seconds: float = 0.0) -> None:
    """Leave the step of a batch to any gateway, after a pause. If the lease was lost, nothing is changed."""
    update = """
        UPDATE served_batches
        SET lease_until = NULL, not_before = now() + make_interval(secs => :pause)
        WHERE id = :id AND attempt = :attempt
    """
    conn.execute(sa.text(update), {"id": batch.id, "attempt": batch.attempt, "pause": float(pause_seconds)})


def set_model(conn: sa.Connection, batch: ServedBatch, model: str) -> None:
    """Note the name by which the file asks for its model, after :func:`hold`."""
    conn.execute(sa.text("UPDATE served_batches SET model = :model WHERE id = :id"), {"id": batch.id, "model": model})


def start(conn: sa.Connection, batch: ServedBatch, *, job_id: int, n_total: int, n_failed: int) -> None:
    """``validating`` → ``in_progress``, after :func:`hold`."""
    update = """
        UPDATE served_batches
        SET state = :in_progress, in_progress_at = now(), lease_until = NULL, not_before = now(),
            job_id = :job, n_total = :n_total, n_failed = :n_failed
        WHERE id = :id
    """
    parameters = {"id": batch.id, "job": job_id, "n_total": n_total, "n_failed": n_failed, **_STATES}
    conn.execute(sa.text(update), parameters)


def finalize(conn: sa.Connection, batch: ServedBatch) -> None:
    """``in_progress`` → ``finalizing``, after :func:`hold`."""
    update = """
        UPDATE served_batches
        SET state = :finalizing, finalizing_at = now(), lease_until = NULL, not_before = now()
        WHERE id = :id
    """
    conn.execute(sa.text(update), {"id": batch.id, **_STATES})


def set_counts(conn: sa.Connection, batch: ServedBatch, *, n_completed: int, n_failed: int) -> None:
    """Write the counts of a batch in progress. If its state is another one by now, nothing is changed."""
    update = """
        UPDATE served_batches
        SET n_completed = :completed_lines, n_failed = :failed_lines, counted_at = now()
        WHERE id = :id AND state = :in_progress
    """
    parameters = {"id": batch.id, "completed_lines": n_completed, "failed_lines": n_failed, **_STATES}
    conn.execute(sa.text(update), parameters)


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a batch that has ended. The bytes are those of its two files."""

    n_total: int = 0
    n_completed: int = 0
    n_failed: int = 0
    n_tokens: int = 0
    output_bytes: int = 0
    error_bytes: int = 0


def end(
    conn: sa.Connection,
    batch: ServedBatch,
    state: ServedState,
    result: Result,
    *,
    errors: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Bring a batch into a final state together with its two files, after :func:`hold`."""
    output, error = (
        files.add_result(
            conn,
            tenant=batch.tenant,
            kind=kind,
            served_batch_id=batch.id,
            filename=f"{batch.name}_{kind}.jsonl",
            n_bytes=n_bytes,
            seconds=batch.asked.output_seconds,
        )
        for kind, n_bytes in ((FileKind.OUTPUT, result.output_bytes), (FileKind.ERROR, result.error_bytes))
    )
    update = f"""
        UPDATE served_batches
        SET state = :state, {state.value}_at = now(), lease_until = NULL,
            output_file = :output, error_file = :error, errors = CAST(:errors AS jsonb),
            n_total = :n_total, n_completed = :n_completed, n_failed = :n_failed, n_tokens = :n_tokens
        WHERE id = :id
    """
    parameters = {
        "id": batch.id,
        "state": state,
        "output": output,
        "error": error,
        "errors": None if errors is None else json.dumps(list(errors)),
        "n_total": result.n_total,
        "n_completed": result.n_completed,
        "n_failed": result.n_failed,
        "n_tokens": result.n_tokens,
    }
    conn.execute(sa.text(update), parameters)


def job_of_key(conn: sa.Connection, key: str) -> int | None:
    """The id of the job with this idempotency key; None if there is none."""
    query = "SELECT id FROM jobs WHERE idempotency_key = :key"
    job_id: int | None = conn.execute(sa.text(query), {"key": key}).scalar_one_or_none()
    return job_id


def is_being_enqueued(conn: sa.Connection, job_id: int) -> bool:
    """Whether the job's producer has not come to its end, and nobody has cancelled the job."""
    query = "SELECT sealed_at IS NULL AND state <> :cancelled FROM jobs WHERE id = :id"
    return bool(conn.execute(sa.text(query), {"id": job_id, "cancelled": JobState.CANCELLED}).scalar_one())


def _batch(row: sa.Row[tuple[object, ...]]) -> ServedBatch:
    asked = dict(row.asked)
    return ServedBatch(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        asked=BatchOrder(**asked | {"route": Route(asked["route"]), "priority": Priority(asked["priority"])}),
        models=None if row.models is None else frozenset(row.models),
        state=ServedState(row.state),
        input_file=row.input_file,
        model=row.model,
        errors=row.errors,
        job_id=row.job_id,
        output_file=row.output_file,
        error_file=row.error_file,
        n_total=row.n_total,
        n_completed=row.n_completed,
        n_failed=row.n_failed,
        n_tokens=row.n_tokens,
        attempt=row.attempt,
        at={state: getattr(row, f"{state}_at") for state in ServedState if state is not ServedState.VALIDATING},
        created_at=row.created_at,
        expires_at=row.expires_at,
        is_expired=row.is_expired,
        is_stale=row.is_stale,
        key_id=getattr(row, "key_id", None),
    )
