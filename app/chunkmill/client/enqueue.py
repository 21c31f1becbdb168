"""One enqueue: it checks the stream, then commits it to a job, window by window."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from chunkmill.client.finish import end_or_leave
from chunkmill.client.spool import Spool
from chunkmill.db.connect import refusal
from chunkmill.domain import planning
from chunkmill.domain.chunks import PreparedChunk, prepare_all, prepare_or_skip
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.routing import Choice
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import InvalidChunk
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.jobs import jobs, traces
from chunkmill.ledger.work import chunk_batches
from chunkmill.settings import Settings
from chunkmill.spaces import collections
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space
from chunkmill.store import staging
from chunkmill.telemetry import tracing

logger = logging.getLogger(__name__)

DEADLOCK_TRIES = 5
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""The most text of one ChunkBatch. It bounds a worker's memory when chunks are large."""
MAX_WINDOW_BYTES = 32 * 1024 * 1024
"""The most text of one window. It bounds the producer's memory."""


@dataclass(frozen=True, slots=True)
class EnqueueRequest:
    """What the caller asked for, checked. ``choice`` is the lane if the job is a new one."""

    collection: str
    space: Space
    route: Route
    choice: Choice
    deadline: datetime | None
    priority: Priority
    on_long: OnLong
    idempotency_key: str | None
    skip_invalid: bool


def enqueue(
    db: sa.Engine,
    settings: Settings,
    request: EnqueueRequest,
    chunks: Iterable[object],
    *,
    ring: Callable[[sa.Connection], None],
) -> int:
    """Commit the chunks to a job, window by window, and return the job's id.

    ``ring`` is called after each commit, with the connection between two transactions. Raises :class:`InvalidChunk`
    with nothing written, unless bad chunks are skipped.
    """
    with contextlib.ExitStack() as stack:
        prepared: Iterable[PreparedChunk | InvalidChunk]
        if request.skip_invalid:
            prepared = prepare_or_skip(chunks)
        elif _is_sealed(db, request):
            prepared = ()  # the job is complete, so nothing of this stream is needed
        else:
            prepared = stack.enter_context(Spool(prepare_all(chunks)))
        conn = stack.enter_context(db.connect())
        collection, job, is_producer = _open(conn, request)
        if is_producer:
            try:
                if job.is_new or _reopen(conn, job.id):
                    _Producer(conn, settings, request, collection, job, ring).fill(prepared)
            finally:
                _drop_producer_lock(conn, job.id)
        return job.id


def _is_sealed(db: sa.Engine, request: EnqueueRequest) -> bool:
    if request.idempotency_key is None:
        return False
    with db.begin() as conn:
        return jobs.is_sealed(conn, request.idempotency_key)


def _open(conn: sa.Connection, request: EnqueueRequest) -> tuple[Collection, jobs.OpenedJob, bool]:
    """The collection, the job, and whether this call is the job's producer."""
    with conn.begin():
        collection = collections.lock_for_enqueue(conn, request.collection, request.space)
        job = jobs.open_job(
            conn,
            collection=collection,
            route=request.route,
            priority=request.priority,
            on_long=request.on_long,
            idempotency_key=request.idempotency_key,
            choice=request.choice,
            deadline=request.deadline,
        )
        traces.keep(conn, job.id, tracing.traceparent())
        # In the job's own transaction, so that a job that can be seen has its producer's lock.
        return collection, job, jobs.hold_producer_lock(conn, job.id)


def _reopen(conn: sa.Connection, job_id: int) -> bool:
    with conn.begin():
        return jobs.reopen_for_enqueue_if_unsealed(conn, job_id)


@dataclass(frozen=True, slots=True)
class _Producer:
    """The producer of one job: ``conn`` holds the job's lock."""

    conn: sa.Connection
    settings: Settings
    request: EnqueueRequest
    collection: Collection
    job: jobs.OpenedJob
    ring: Callable[[sa.Connection], None]

    def fill(self, prepared: Iterable[PreparedChunk | InvalidChunk]) -> None:
        """Commit the whole stream and seal the job, unless it is cancelled meanwhile."""
        first, most = 2 * self.settings.chunk_batch_size, self.settings.enqueue_window
        for chunks, refused in windows(prepared, first, most):
            if not self._commit(chunks, refused):
                return
            self.ring(self.conn)
        with self.conn.begin():
            jobs.seal_if_enqueueing(self.conn, self.job.id)
        end_or_leave(self.conn, self.job.id, self.request.space)

    def _commit(self, chunks: Sequence[PreparedChunk], refused: Sequence[DeadChunk]) -> bool:
        """Commit one window in a transaction of its own. False if the job is no longer being enqueued.

        Two enqueues that share texts may deadlock. Postgres then rolls one back, which runs again. After a broken
        connection it cannot run again, because the producer's lock ended with the connection.
        """
        for tries_left in reversed(range(DEADLOCK_TRIES)):
            try:
                with self.conn.begin():
                    return self._write(chunks, refused)
            except sa.exc.OperationalError as error:
                if not (tries_left and getattr(error.orig, "sqlstate", None) in ("40P01", "40001")):
                    raise
                logger.info("an enqueue collided with another one over the same texts (%s); again", refusal(error))
        raise AssertionError("the last try returned or raised")

    def _write(self, window: Sequence[PreparedChunk], refused: Sequence[DeadChunk]) -> bool:
        """Write one window in the transaction of ``conn``. False if the job is no longer being enqueued."""
        conn, request, job = self.conn, self.request, self.job
        chunks = planning.distinct(window)
        staging.stage(conn, chunks.values())
        known = staging.known_vectors(conn, request.space)
        plan = planning.plan_window(chunks, known, request.on_long)
        if not jobs.add_chunks(conn, job.id, len(plan.references)):
            return False
        dead_chunks.add_refused(conn, job.id, [*refused, *plan.rejected])
        staging.drop_rejected(conn, plan.rejected)
        staging.add_contents(conn, plan.missing)
        staging.merge_chunks(conn, collection_id=self.collection.id, job_id=job.id)
        shared = chunk_batches.SharedFields(
            job.id, request.space.id, job.lane, request.priority.rank, self.settings.max_attempts
        )
        chunk_batches.add(conn, shared, planning.cut(plan.missing, self.settings.chunk_batch_size, MAX_BATCH_BYTES))
        chunk_batches.add_cached(conn, shared, plan.cached, n_truncated=sum(known[h].truncated for h in plan.cached))
        return True


def windows(
    items: Iterable[PreparedChunk | InvalidChunk], first: int, most: int
) -> Iterator[tuple[list[PreparedChunk], list[DeadChunk]]]:
    """The windows of a stream: the chunks of each, and the chunks that were skipped.

    The first window has ``first`` items, so that workers begin at once. Each further one has four times as many as the
    one before, but at most ``most``, and about ``MAX_WINDOW_BYTES`` of text.
    """
    size = min(first, most)
    chunks: list[PreparedChunk] = []
    refused: list[DeadChunk] = []
    n_bytes = 0
    for item in items:
        if isinstance(item, PreparedChunk):
            chunks.append(item)
            n_bytes += len(item.text)
        else:
            refused.append(DeadChunk(item.chunk_id, item.reason, f"position {item.position}: {item.problem}"))
        if len(chunks) + len(refused) == size or n_bytes >= MAX_WINDOW_BYTES:
            yield chunks, refused
            chunks, refused, n_bytes = [], [], 0
            size = min(4 * size, most)
    if chunks or refused:
        yield chunks, refused


def _drop_producer_lock(conn: sa.Connection, job_id: int) -> None:
    try:
        conn.rollback()
        with conn.begin():
            jobs.drop_producer_lock(conn, job_id)
    except sa.exc.SQLAlchemyError:
        # The lock ends with its connection, so the pool must not keep this one.
        conn.invalidate()
