"""ProviderBatches: which are due, who takes the next step, and each step's one guarded UPDATE.

``attempt`` is the fencing number of the lease on a step, as with ChunkBatches. A worker that lost its lease changes
nothing.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import sqlalchemy as sa

from chunkmill.broker import StepBell
from chunkmill.domain.reasons import storable
from chunkmill.domain.states import ChunkBatchState, JobState, Route
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.errors import LeaseLost
from chunkmill.openai.wire.status import RemoteStatus

_SPENDING = [state for state in State if state.spends]
_ENQUEUED = [state for state in State if state.is_enqueued]
ENDED = [status for status in RemoteStatus if status.is_terminal]
"""The ``provider_status`` of a batch that is not in the provider's queue any more. While its result files are not all
there, which may take hours, it is still ``submitted``; counted as enqueued, it would keep all other work waiting."""
UNSENT_AT_A_TIME = 20
"""How many ProviderBatches one transaction takes over. It is small because each may hold 50,000 contents."""


@dataclass(frozen=True, slots=True)
class Step:
    """A ProviderBatch as it was when its lease was taken or last changed, and the right to change it."""

    id: int
    attempt: int
    state: State
    space_id: int
    token: str
    failures: int
    uploads: int
    creates: int
    resends: int
    downloads: int
    n_requests: int
    n_inputs: int
    n_tokens: int
    looks: int
    refusals: int
    key_digest: str | None
    input_file_id: str | None
    batch_id: str | None
    provider_status: str | None
    n_done: int
    n_completed: int | None
    used_tokens: int | None
    output_file_id: str | None
    error_file_id: str | None
    cancel_requested: bool
    error_code: str | None
    error: str | None
    creating_for_s: float
    """Seconds since the latest request to create it was about to be sent, by Postgres' clock."""
    submitted_for_s: float
    """Seconds since the provider confirmed it, by Postgres' clock."""
    cancelled_for_s: float
    """Seconds since its cancellation was requested, by Postgres' clock; 0 if it was not."""
    created_on: date
    """The day on which it was gathered, in UTC."""

    @property
    def name(self) -> str:
        return f"ProviderBatch {self.id}"


_COLUMNS = """
    id, attempt, state, space_id, token, failures, uploads, creates, resends, downloads, n_requests, n_inputs,
    n_tokens, looks, refusals, key_digest,
    input_file_id, batch_id, provider_status, n_done, n_completed, used_tokens, output_file_id, error_file_id,
    cancel_requested_at IS NOT NULL AS cancel_requested, error_code, error,
    coalesce(extract(epoch FROM clock_timestamp() - creating_since), 0)::float AS creating_for_s,
    coalesce(extract(epoch FROM clock_timestamp() - submitted_at), 0)::float AS submitted_for_s,
    coalesce(extract(epoch FROM clock_timestamp() - cancel_requested_at), 0)::float AS cancelled_for_s,
    (created_at AT TIME ZONE 'UTC')::date AS created_on
"""
"""The columns of a `Step`, which three statements read."""


def spaces_to_gather(conn: sa.Connection, *, wait_seconds: float, full: int) -> list[int]:
    """Ids of spaces that need a ProviderBatch and have none that is being filled.

    A space needs one if its work has waited for ``wait_seconds``, or if ``full`` contents wait. No space needs one
    while the lane is stopped or paused.
    """
    # For each open job, it probes ix_chunk_batches_unrung_by_route a few times, however much work of the job waits.
    rows = conn.execute(
        sa.text("""
            WITH waiting AS (
                SELECT j.space_id
                FROM jobs j
                CROSS JOIN LATERAL (
                    SELECT b.created_at, b.n_contents
                    FROM chunk_batches b
                    WHERE b.state = :available AND b.rung_at IS NULL AND b.route = :openai
                      AND b.priority = j.priority AND b.job_id BETWEEN j.id AND j.id AND b.not_before <= now()
                    ORDER BY b.job_id, b.id
                    LIMIT 200
                ) b
                WHERE j.state IN (:enqueueing, :running) AND j.route IN (:openai, :auto)
                GROUP BY j.space_id
                HAVING min(b.created_at) <= now() - make_interval(secs => :wait) OR sum(b.n_contents) >= :full
            )
            SELECT space_id
            FROM waiting w
            WHERE NOT EXISTS (
                SELECT FROM provider_lanes l
                WHERE l.route = :openai AND (l.stopped_at IS NOT NULL OR l.paused_until > now())
            )
            AND NOT EXISTS (
                SELECT FROM provider_batches p WHERE p.space_id = w.space_id AND p.state = :gathering
            )
            ORDER BY space_id
        """),
        {
            "available": ChunkBatchState.AVAILABLE,
            "enqueueing": JobState.ENQUEUEING,
            "running": JobState.RUNNING,
            "gathering": State.GATHERING,
            "openai": Route.OPENAI,
            "auto": Route.AUTO,
            "wait": wait_seconds,
            "full": full,
        },
    )
    return list(rows.scalars())


def open_gathering(conn: sa.Connection, space_id: int) -> None:
    """Open a ProviderBatch to be filled, unless the space has one: an index keeps two pollers from opening two."""
    # The condition of ON CONFLICT names the partial index, which it cannot do with a parameter.
    conn.execute(
        sa.text("""
            INSERT INTO provider_batches (space_id, state, token)
            VALUES (:space, :gathering, :token)
            ON CONFLICT (space_id) WHERE state = 'gathering' DO NOTHING
        """),
        {"space": space_id, "gathering": State.GATHERING, "token": secrets.token_hex(8)},
    )


def any_open(conn: sa.Connection) -> bool:
    """Whether any ProviderBatch is open. Where none is, as in most deployments, a poller need not ask Redis for bells
    of steps.
    """
    query = sa.text("SELECT EXISTS (SELECT FROM provider_batches WHERE state <> :closed)")
    return bool(conn.execute(query, {"closed": State.CLOSED}).scalar_one())


def take_due(conn: sa.Connection, *, repair_seconds: float, limit: int) -> list[StepBell]:
    """Mark ProviderBatches with a step that is due as rung, and return their bells.

    A step for which no worker came is due again after ``repair_seconds``.
    """
    rows = conn.execute(
        sa.text("""
            WITH due AS (
                SELECT id
                FROM provider_batches p
                WHERE state <> :closed AND not_before <= now()
                  AND (lease_until IS NULL OR lease_until < now())
                  AND (rung_at IS NULL OR rung_at < now() - make_interval(secs => :age))
                  AND NOT EXISTS (
                      SELECT FROM provider_lanes l
                      WHERE l.route = :openai
                        AND (l.paused_until > now() OR (l.stopped_at IS NOT NULL AND p.state = ANY(:spending)))
                  )
                ORDER BY not_before
                LIMIT :limit
                FOR UPDATE SKIP LOCKED
            )
            UPDATE provider_batches p
            SET rung_at = now()
            FROM due
            WHERE p.id = due.id
            RETURNING p.id, p.state, p.space_id, (SELECT s.model FROM spaces s WHERE s.id = p.space_id) AS model
        """),
        {
            "closed": State.CLOSED,
            "openai": Route.OPENAI,
            "spending": _SPENDING,
            "age": repair_seconds,
            "limit": limit,
        },
    )
    return [
        StepBell(row.id, {"state": row.state, "space": row.space_id, "model": row.model})
        for row in sorted(rows, key=lambda row: row.id)
    ]


def claim_if_due(
    conn: sa.Connection,
    provider_batch_id: int,
    *,
    owner: str,
    lease_seconds: float,
    server: str,
    not_spaces: Sequence[int] = (),
) -> Step | None:
    """Take the lease on the next step; returns None if another worker has it, if it is not due, if the batch is at
    another server, or if its space is one of ``not_spaces``, which are left to other workers.

    A lease that ran out can be claimed, because each step continues from what its row says.
    """
    row = conn.execute(
        sa.text(f"""
            UPDATE provider_batches p
            SET attempt = attempt + 1, lease_owner = :owner, rung_at = NULL,
                lease_until = now() + make_interval(secs => :lease)
            WHERE id = :id AND state <> :closed AND not_before <= now()
              AND (lease_until IS NULL OR lease_until < now())
              AND (server IS NULL OR server = :server)
              AND space_id <> ALL(CAST(:not_spaces AS int[]))
              AND NOT EXISTS (
                  SELECT FROM provider_lanes l
                  WHERE l.route = :openai
                    AND (l.paused_until > now() OR (l.stopped_at IS NOT NULL AND p.state = ANY(:spending)))
              )
            RETURNING {_COLUMNS}
        """),
        {
            "id": provider_batch_id,
            "owner": owner,
            "lease": lease_seconds,
            "server": server,
            "not_spaces": list(not_spaces),
            "closed": State.CLOSED,
            "openai": Route.OPENAI,
            "spending": _SPENDING,
        },
    ).one_or_none()
    return None if row is None else _step(row)


def is_held(conn: sa.Connection, step: Step, *, owner: str) -> bool:
    """Whether the claim that made ``step`` was committed. It is for a claim that got no answer to its commit."""
    row = conn.execute(
        sa.text("SELECT id FROM provider_batches WHERE id = :id AND attempt = :attempt AND lease_owner = :owner"),
        {"id": step.id, "attempt": step.attempt, "owner": owner},
    )
    return row.one_or_none() is not None


def renew_if_held(conn: sa.Connection, steps: Sequence[Step], *, lease_seconds: float) -> set[int]:
    """Renew all leases of a process; returns the ids of the ProviderBatches that it still holds."""
    rows = conn.execute(
        sa.text("""
            UPDATE provider_batches p
            SET lease_until = now() + make_interval(secs => :lease)
            FROM unnest(CAST(:ids AS bigint[]), CAST(:attempts AS int[])) AS l(id, attempt)
            WHERE p.id = l.id AND p.attempt = l.attempt AND p.lease_owner IS NOT NULL
            RETURNING p.id
        """),
        {
            "ids": [step.id for step in steps],
            "attempts": [step.attempt for step in steps],
            "lease": lease_seconds,
        },
    )
    return set(rows.scalars())


def advance(conn: sa.Connection, step: Step, state: State, **columns: Any) -> Step:
    """Complete the step: the ProviderBatch is in ``state`` now and has the new ``columns``. Raises LeaseLost."""
    fresh = {} if state is State.CLEANING else {"error": None}  # the reason why it ended stays in the row
    return _change(conn, step, {"failures": 0, "state": state, **fresh, **columns})


def note(conn: sa.Connection, step: Step, **columns: Any) -> Step:
    """Change columns of the ProviderBatch and stay at the step. Raises LeaseLost."""
    return _change(conn, step, columns)


def release(conn: sa.Connection, step: Step, *, delay_s: float, failed: str | None = None, **columns: Any) -> None:
    """Give the lease back, so that the step is due again after ``delay_s`` seconds. Raises LeaseLost.

    ``failed`` says what went wrong, if anything did, and adds one to the failures in a row.
    """
    if failed is not None:
        columns |= {"failures": step.failures + 1, "error": failed}
    due = sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, delay_s)
    # The state is not part of the guard: the owner of the attempt may give the lease back at any step.
    _change(
        conn,
        step,
        {**columns, "lease_owner": None, "lease_until": None, "rung_at": None, "not_before": due},
        any_state=True,
    )


def release_all(conn: sa.Connection, owner: str) -> None:
    """Give back every step that a worker holds; the next worker continues from where it stopped."""
    conn.execute(
        sa.text("""
            UPDATE provider_batches
            SET lease_owner = NULL, lease_until = NULL, rung_at = NULL, attempt = attempt + 1
            WHERE lease_owner = :owner AND state <> :closed
        """),
        {"owner": owner, "closed": State.CLOSED},
    )


def can_be_taken_over(conn: sa.Connection) -> bool:
    """False on the schema of the last release, whose poller this may be during an upgrade."""
    query = sa.text("""
        SELECT EXISTS (
            SELECT FROM pg_attribute WHERE attrelid = to_regclass('provider_batches') AND attname = 'key_digest'
        )
    """)
    return bool(conn.execute(query).scalar_one())


def take_over(conn: sa.Connection, provider_batch_id: int) -> Step | None:
    """Take a ProviderBatch away from whoever holds it, to end it in this transaction. None if there is none."""
    row = conn.execute(
        sa.text(f"""
            UPDATE provider_batches
            SET attempt = attempt + 1, lease_owner = NULL, lease_until = NULL, rung_at = NULL, not_before = now()
            WHERE id = :id
            RETURNING {_COLUMNS}
        """),
        {"id": provider_batch_id},
    ).one_or_none()
    return None if row is None else _step(row)


def take_over_unsent(
    conn: sa.Connection, *, of_jobs: Sequence[int] | None = None, limit: int = UNSENT_AT_A_TIME
) -> list[Step]:
    """Take over ProviderBatches of which nothing was created and that nobody works on now, to give them back.

    With ``of_jobs``, only those for which a ChunkBatch of these jobs waits.
    """
    rows = conn.execute(
        sa.text(f"""
            WITH unsent (unsent_id) AS (
                SELECT id
                FROM provider_batches p
                WHERE state IN (:gathered, :uploaded) AND (lease_until IS NULL OR lease_until < now())
                  AND (CAST(:jobs AS bigint[]) IS NULL OR EXISTS (
                      SELECT FROM provider_batch_members m
                      JOIN chunk_batches b ON b.id = m.chunk_batch_id
                      WHERE m.provider_batch_id = p.id AND b.job_id = ANY(CAST(:jobs AS bigint[]))
                        AND b.state = :running
                  ))
                ORDER BY id
                LIMIT :limit
                FOR UPDATE SKIP LOCKED
            )
            UPDATE provider_batches p
            SET attempt = attempt + 1, lease_owner = NULL, lease_until = NULL, rung_at = NULL, not_before = now()
            FROM unsent
            WHERE p.id = unsent.unsent_id
            RETURNING {_COLUMNS}
        """),
        {
            "gathered": State.GATHERED,
            "uploaded": State.UPLOADED,
            "running": ChunkBatchState.RUNNING,
            "jobs": None if of_jobs is None else list(of_jobs),
            "limit": limit,
        },
    )
    return [_step(row) for row in rows]


def any_other_at_provider(conn: sa.Connection, step: Step) -> bool:
    """Whether the provider has, or may have, another ProviderBatch of ours in its queue."""
    query = sa.text("""
        SELECT EXISTS (
            SELECT FROM provider_batches
            WHERE state IN (:creating, :submitted) AND id <> :id
              AND (state = :submitted AND provider_status = ANY(:ended)) IS NOT TRUE
        )
    """)
    parameters = {"creating": State.CREATING, "submitted": State.SUBMITTED, "ended": ENDED, "id": step.id}
    return bool(conn.execute(query, parameters).scalar_one())


def followed_as(conn: sa.Connection, server: str, batch_id: str) -> int | None:
    """The ProviderBatch that is followed at a server under an id of the provider; None if there is none."""
    query = sa.text("""
        SELECT id
        FROM provider_batches
        WHERE server = :server AND batch_id = :batch AND state IN (:submitted, :collecting)
    """)
    parameters = {"server": server, "batch": batch_id, "submitted": State.SUBMITTED, "collecting": State.COLLECTING}
    followed: int | None = conn.execute(query, parameters).scalar_one_or_none()
    return followed


def close(conn: sa.Connection, step: Step) -> None:
    """Close a ProviderBatch for which nothing is left to do. Raises LeaseLost."""
    _change(conn, step, {"state": State.CLOSED, "lease_owner": None, "lease_until": None, "closed_at": sa.func.now()})


def open_half(conn: sa.Connection, step: Step, **columns: Any) -> Step:
    """Open a gathered ProviderBatch for a part of this one's contents; the same ChunkBatches wait for it."""
    values = {"space_id": step.space_id, "state": State.GATHERED, "token": secrets.token_hex(8), **columns}
    half = _step(conn.execute(sa.insert(_table()).values(values).returning(sa.text(_COLUMNS))).one())
    conn.execute(
        sa.text("""
            INSERT INTO provider_batch_members (provider_batch_id, chunk_batch_id)
            SELECT :half, chunk_batch_id FROM provider_batch_members WHERE provider_batch_id = :id
        """),
        {"half": half.id, "id": step.id},
    )
    return half


def count_inputs(conn: sa.Connection, provider_batch_id: int) -> None:
    """Count again what a ProviderBatch holds, after a part of it was moved to another."""
    conn.execute(
        sa.text("""
            UPDATE provider_batches p
            SET n_requests = i.requests, n_inputs = i.inputs, n_contents = i.contents, n_tokens = i.tokens
            FROM (
                SELECT max(request_no) + 1 AS requests, count(*) AS contents,
                       sum(coalesce(cardinality(weights), 1)) AS inputs, sum(sent_tokens) AS tokens
                FROM provider_inputs
                WHERE provider_batch_id = :id
            ) i
            WHERE p.id = :id
        """),
        {"id": provider_batch_id},
    )


def plus(column: str, n: int) -> sa.ColumnElement[int]:
    """The new value ``column + n``, for ``advance`` and ``note``."""
    grown: sa.ColumnElement[int] = _table().c[column] + n
    return grown


def count_oddities(conn: sa.Connection, step: Step, kinds: dict[str, int]) -> None:
    """Add to the counts of what should not be in a result file."""
    for kind, n in kinds.items():
        conn.execute(
            sa.text("""
                UPDATE provider_batches
                SET oddities = jsonb_set(
                    oddities, ARRAY[CAST(:kind AS text)], to_jsonb(coalesce((oddities ->> :kind)::int, 0) + :n)
                )
                WHERE id = :id AND attempt = :attempt
            """),
            {"id": step.id, "attempt": step.attempt, "kind": kind, "n": n},
        )


def abandon_unwanted(conn: sa.Connection) -> list[int]:
    """Request the cancellation of ProviderBatches for which no ChunkBatch waits any more; returns their ids.

    Their jobs were cancelled.
    """
    rows = conn.execute(
        sa.text("""
            UPDATE provider_batches p
            SET cancel_requested_at = now(), not_before = now(), rung_at = NULL
            WHERE state = ANY(:enqueued) AND cancel_requested_at IS NULL
              AND NOT EXISTS (
                  SELECT FROM provider_batch_members m
                  JOIN chunk_batches b ON b.id = m.chunk_batch_id
                  WHERE m.provider_batch_id = p.id AND b.state = :running
              )
            RETURNING id
        """),
        {"enqueued": _ENQUEUED, "running": ChunkBatchState.RUNNING},
    )
    return list(rows.scalars())


@functools.cache
def _table() -> sa.Table:
    # Only workers of a paid route need it, and the import makes every command and every worker start 0.4 s later.
    from chunkmill.db.provider_schema import ProviderBatchRow

    table = ProviderBatchRow.__table__
    assert isinstance(table, sa.Table)  # noqa: S101
    return table


def _change(
    conn: sa.Connection,
    step: Step,
    columns: dict[str, Any],
    *,
    any_state: bool = False,
) -> Step:
    table = _table()
    # Some texts are the provider's own words, which may have characters that Postgres does not store.
    columns = {name: storable(value) if type(value) is str else value for name, value in columns.items()}
    held = sa.and_(table.c.id == step.id, table.c.attempt == step.attempt)
    row = conn.execute(
        sa.update(table)
        .where(held if any_state else sa.and_(held, table.c.state == step.state))
        .values(columns)
        .returning(sa.text(_COLUMNS))
    ).one_or_none()
    if row is None:
        raise LeaseLost(
            f"{step.name}: attempt {step.attempt} lost its lease at step {step.state}. Another worker continues from "
            "there."
        )
    return _step(row)


def _step(row: sa.Row[Any]) -> Step:
    columns = dict(row._mapping)
    columns["state"] = State(columns["state"])
    return Step(**columns)
