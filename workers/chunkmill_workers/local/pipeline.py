"""What a local worker does with one ChunkBatch, from top to bottom."""

from __future__ import annotations

import logging
import time
from enum import StrEnum

import psycopg
import sqlalchemy as sa

from chunkmill.db.retry import is_transient
from chunkmill.domain.reasons import code_of, reason_of
from chunkmill.domain.states import Route
from chunkmill.errors import ChunkmillError, DeviceFailed, LeaseLost, StoreLimit
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.spaces.registry import Space
from chunkmill.store.read import Work
from chunkmill.store.write import relax_durability
from chunkmill.telemetry import metrics, tracing
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.local.attempt import LocalAttempt, VectorsLost
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.process.claims import claim
from chunkmill_workers.process.lease import HeldLease
from chunkmill_workers.process.work_context import attempt_at

logger = logging.getLogger(__name__)

FLUSH_ROWS = 4096
FLUSH_SECONDS = 0.25
"""Vectors are written after this many rows or seconds. A write takes about 3 ms of the machine. A kill costs the
TokenBatches since the last write and those on the device (docs/decisions/0019)."""
ANOTHER_SUSPECT_SECONDS = 2.0
"""How long a suspect waits for its next try if another one is alone in the worker."""


class TaskResult(StrEnum):
    """What a task did with the ChunkBatch of its doorbell."""

    NOT_OURS = "not_ours"
    COMPLETED = "completed"
    RELEASED = "released"
    LEASE_LOST = "lease_lost"
    FAILED = "failed"


class Interrupted(Exception):
    """The engine stopped early because the worker was told to leave."""


def run_chunk_batch(context: WorkerContext, chunk_batch_id: int) -> TaskResult:
    """Claim, read, embed, write, complete. However this ends, the ledger is true. No fault of the texts raises.

    If Postgres is away, the task waits for it. That costs no attempt.
    """
    context.last_doorbell, rung_ns = time.monotonic(), time.time_ns()
    try:
        return _answer(context, chunk_batch_id, rung_ns)
    except StoreLimit as limit:
        # Not even the end of the attempt could be recorded. Other workers take it up when its lease ends.
        logger.error("ChunkBatch %s: %s", chunk_batch_id, limit)  # noqa: TRY400 - a traceback would hide the advice
        return TaskResult.FAILED


def _answer(context: WorkerContext, chunk_batch_id: int, rung_ns: int) -> TaskResult:
    with context.workroom.entered():
        lease = _claim(context, chunk_batch_id)
        if lease is None:
            return TaskResult.NOT_OURS  # done, held, not due, or left to others
        if not lease.suspect:
            with context.leases.holding(lease) as held, attempt_at(context, lease, rung_ns=rung_ns):
                return _counted(_run(context, held))
        # A suspect is not held while others are embedded here: if they killed the worker, it would be blamed.
        _give_back(context, lease, delay_s=ANOTHER_SUSPECT_SECONDS if context.workroom.has_suspect else 0.0)
        with context.workroom.alone() as alone:
            lease = _claim(context, lease.chunk_batch_id, in_turn=False) if alone else None
            if lease is None:
                return TaskResult.RELEASED
            with context.leases.holding(lease) as held, attempt_at(context, lease, rung_ns=rung_ns):
                return _counted(_run(context, held))


def _counted(outcome: TaskResult) -> TaskResult:
    COUNTS.add(metrics.ATTEMPTS, 1, outcome)
    return outcome


def _claim(context: WorkerContext, chunk_batch_id: int, *, in_turn: bool = True) -> Lease | None:
    """Claim the ChunkBatch if it is due. A worker that leaves or whose device is broken claims nothing."""
    if context.stopping.is_set() or context.broken:
        return None

    try:
        unserved = list(context.engines.unserved())
        lease = claim(context, chunk_batch_id, route=Route.LOCAL, not_spaces=unserved, in_turn=in_turn)
    except (sa.exc.SQLAlchemyError, psycopg.Error):
        if context.stopping.is_set():
            return None  # Postgres is away, and the worker leaves
        raise
    except StoreLimit as limit:
        logger.error("ChunkBatch %s was not claimed; the poller rings for it again: %s", chunk_batch_id, limit)  # noqa: TRY400
        return None
    COUNTS.add(metrics.CLAIMS, 1, "claimed" if lease else "nothing")
    return lease


def _give_back(context: WorkerContext, lease: Lease, *, delay_s: float) -> None:
    context.transact(lambda conn: chunk_batches.release_if_held(conn, lease, delay_s=delay_s), "release")


def _run(context: WorkerContext, held: HeldLease) -> TaskResult:
    lease = held.lease
    attempt = LocalAttempt(context, lease)
    try:
        _embed(context, held, attempt)
    except Interrupted:
        attempt.release()
        attempt.log_end("given back, because the worker leaves")
        return TaskResult.RELEASED
    except LeaseLost as lost:
        logger.warning("%s", lost)
        return TaskResult.LEASE_LOST
    except VectorsLost:
        logger.warning(
            "ChunkBatch %s: Postgres lost vectors that were written, as a crash may; they are embedded again",
            lease.chunk_batch_id,
        )
        attempt.release()
        return TaskResult.RELEASED
    except DeviceFailed as broken:
        # The lease is kept. The watchdog takes it back as from a dead worker, because the work may be the cause.
        context.broken = str(broken)
        return TaskResult.FAILED
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the ledger must say so
        if is_transient(error):  # as when the canary's reference could not be read
            attempt.release()
            return TaskResult.RELEASED
        if isinstance(error, ChunkmillError) and error.elsewhere:
            # Not charged, because this worker is at fault. The reason stays in the ChunkBatch until another takes it.
            context.engines.leave(lease.space_id, error)
            attempt.release(because=error)
            logger.warning("ChunkBatch %s is left to other workers: %s", lease.chunk_batch_id, error)
            return TaskResult.RELEASED
        _record_failure(context, attempt, error)
        return TaskResult.FAILED
    attempt.log_end("completed")
    context.finish_job(lease)
    return TaskResult.COMPLETED


def _embed(context: WorkerContext, held: HeldLease, attempt: LocalAttempt) -> None:
    lease = held.lease

    def read(conn: sa.Connection) -> tuple[Space, Work]:
        relax_durability(conn)  # if a crash loses the account, the first write opens it
        return attempt.open(conn)

    space, work = context.transact(read, "read texts")
    attempt.begin(space, work)
    engine = context.engine_for(space)
    attempt.use(engine)
    texts = [text for _, text in work.texts]
    flushed_at = time.monotonic()
    with tracing.span("embed", {"contents": len(texts)}):
        for result in engine.stream(texts, on_long=lease.on_long, stop=context.stopping.is_set):
            held.moved()
            attempt.take(result)
            held.check()
            if attempt.pending_rows >= FLUSH_ROWS or time.monotonic() - flushed_at >= FLUSH_SECONDS:
                attempt.flush()
                flushed_at = time.monotonic()
    if attempt.left:
        # Keep what is done.
        attempt.flush()
        raise Interrupted
    attempt.complete()


def _record_failure(context: WorkerContext, attempt: LocalAttempt, error: Exception) -> None:
    lease = attempt.lease
    retryable = not isinstance(error, ChunkmillError) or error.retryable
    message = reason_of(error)
    tracing.fail(code_of(error))
    state = attempt.fail(code=code_of(error), error=f"{context.name}: {message}", retryable=retryable)
    logger.error(
        "ChunkBatch %s, attempt %s of %s failed and is %s: %s",
        lease.chunk_batch_id, lease.attempt, lease.max_attempts, state or "another worker's", message,
        exc_info=None if isinstance(error, ChunkmillError) else error,
    )  # fmt: skip
    context.finish_job(lease)
