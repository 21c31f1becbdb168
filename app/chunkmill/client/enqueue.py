"""One enqueue: check the stream, then commit it window by window into a job."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

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
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill.store import staging
from chunkmill.telemetry import tracing

logger = logging.getLogger(__name__)

DEADLOCK_TRIES = 5
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Text of one ChunkBatch: bounds a worker's memory when chunks are large."""
MAX_WINDOW_BYTES = 32 * 1024 * 1024
"""Text of one window: bounds the producer's."""


@dataclass(frozen=True, slots=True)
class EnqueueRequest:
    """What the caller asked for, checked. ``choice`` is the lane, should the job be a new one."""

    collection: str
    space: Space
    route: Route
    choice: Choice
    deadline: datetime | None
    priority: Priority
    on_long: OnLong
    idempotency_key: str | None
    skip_invalid: bool


class Enqueueing:
    """``run`` it once. ``ring`` is called after each commit, with the connection between two transactions."""

    def __init__(
        self, db: sa.Engine, settings: Settings, request: EnqueueRequest, *, ring: Callable[[sa.Connection], None]
    ) -> None:
        self._db = db
        self._settings = settings
        self._request = request
        self._ring = ring

    def run(self, chunks: Iterable[object]) -> int:
        """Returns the job's id. Raises :class:`InvalidChunk` with nothing written, unless bad chunks are skipped."""
        with contextlib.ExitStack() as stack:
            prepared: Iterable[PreparedChunk | InvalidChunk]
            if self._request.skip_invalid:
                prepared = prepare_or_skip(chunks)
            elif self._is_sealed():
                prepared = ()  # the job is there; nothing of this stream is needed
            else:
                prepared = stack.enter_context(Spool(prepare_all(chunks)))
            conn = stack.enter_context(self._db.connect())
            collection_id, opened, mine = self._open(conn)
            if mine:
                try:
                    if opened.is_new or self._reopen(conn, opened.id):
                        self._fill(conn, opened, collection_id, prepared)
                finally:
                    _drop_producer_lock(conn, opened.id)
            return opened.id

    def _is_sealed(self) -> bool:
        key = self._request.idempotency_key
        if key is None:
            return False
        with self._db.begin() as conn:
            return jobs.is_sealed(conn, key)

    def _open(self, conn: sa.Connection) -> tuple[int, jobs.Opened, bool]:
        """The collection, the job, and whether this call is the job's producer."""
        request = self._request
        with conn.begin():
            collection_id = jobs.collection_id(conn, request.collection, request.space)
            opened = jobs.open_job(
                conn,
                collection=collection_id,
                space=request.space,
                route=request.route,
                priority=request.priority,
                on_long=request.on_long,
                idempotency_key=request.idempotency_key,
                choice=request.choice,
                deadline=request.deadline,
            )
            traces.keep(conn, opened.id, tracing.traceparent())
            # In the job's own transaction: a job that can be seen has its producer's lock.
            return collection_id, opened, jobs.hold_producer_lock(conn, opened.id)

    def _reopen(self, conn: sa.Connection, job_id: int) -> bool:
        with conn.begin():
            return jobs.reopen_for_enqueue_if_unsealed(conn, job_id)

    def _fill(
        self,
        conn: sa.Connection,
        opened: jobs.Opened,
        collection_id: int,
        prepared: Iterable[PreparedChunk | InvalidChunk],
    ) -> None:
        for chunks, refused in windows(prepared, 2 * self._settings.chunk_batch_size, self._settings.enqueue_window):
            if not self._commit(conn, opened, collection_id, chunks, refused):
                return  # cancelled meanwhile
            self._ring(conn)
        with conn.begin():
            jobs.seal_if_enqueueing(conn, opened.id)
        with conn.begin():
            finish_if_done(conn, opened.id, self._request.space)

    def _commit(
        self,
        conn: sa.Connection,
        opened: jobs.Opened,
        collection_id: int,
        chunks: Sequence[PreparedChunk],
        refused: Sequence[DeadChunk],
    ) -> bool:
        """One window in a transaction of its own; False: the job is not being enqueued any more.

        Two enqueues that share texts may deadlock; Postgres undoes one, which runs again. On a connection that broke
        it cannot: the producer's lock went with it.
        """
        for tries_left in reversed(range(DEADLOCK_TRIES)):
            try:
                with conn.begin():
                    return self._commit_window(conn, opened, collection_id, chunks, refused)
            except sa.exc.OperationalError as error:
                if not (tries_left and getattr(error.orig, "sqlstate", None) in ("40P01", "40001")):
                    raise
                logger.info("an enqueue met another one over the same texts (%s); again", refusal(error))
        raise AssertionError("the last try returned or raised")

    def _commit_window(
        self,
        conn: sa.Connection,
        opened: jobs.Opened,
        collection_id: int,
        batch: Sequence[PreparedChunk],
        refused: Sequence[DeadChunk],
    ) -> bool:
        """Write one window in the transaction of ``conn``. False: the job is not being enqueued any more."""
        request, settings, job_id = self._request, self._settings, opened.id
        chunks = planning.distinct(batch)
        staging.stage(conn, chunks.values())
        known = staging.known_vectors(conn, request.space)
        plan = planning.plan_window(chunks, known, request.on_long)
        if not jobs.add_chunks(conn, job_id, len(plan.references)):
            return False
        dead_chunks.add_refused(conn, job_id, [*refused, *plan.rejected])
        staging.drop_rejected(conn, plan.rejected)
        staging.add_contents(conn, plan.missing)
        staging.merge_chunks(conn, collection_id=collection_id, job_id=job_id)
        shared = chunk_batches.SharedFields(
            job_id, request.space.id, opened.lane, request.priority.rank, settings.max_attempts
        )
        chunk_batches.add(conn, shared, planning.cut(plan.missing, settings.chunk_batch_size, MAX_BATCH_BYTES))
        chunk_batches.add_cached(conn, shared, plan.cached, n_truncated=sum(known[h].truncated for h in plan.cached))
        return True


def windows(
    items: Iterable[PreparedChunk | InvalidChunk], first: int, most: int
) -> Iterator[tuple[list[PreparedChunk], list[DeadChunk]]]:
    """The chunks, and the skipped ones: ``first`` items, so that workers begin at once, then four times as many each
    time, at most ``most``, and about ``MAX_WINDOW_BYTES`` of text.
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
