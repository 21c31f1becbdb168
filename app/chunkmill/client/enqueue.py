"""One enqueue: it checks the stream, then commits it to a job, window by window."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from functools import partial

import sqlalchemy as sa

from chunkmill.client import replacing
from chunkmill.client.beside import JobsBeside
from chunkmill.client.finish import end_or_leave
from chunkmill.client.replacing import Replacement
from chunkmill.client.spool import Spool
from chunkmill.db.connect import refusal
from chunkmill.domain import planning
from chunkmill.domain.chunks import PreparedChunk, StreamDigest, prepare_all, prepare_or_skip
from chunkmill.domain.filters import Filter
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.routing import Choice
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.errors import InvalidChunk, InvalidInput, TooManyRefused
from chunkmill.ledger.access import spends
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.jobs import jobs, outbox, streams, traces
from chunkmill.ledger.money import budget
from chunkmill.ledger.work import chunk_batches
from chunkmill.settings import Settings
from chunkmill.spaces import collections, others, registry
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space
from chunkmill.store import staging
from chunkmill.telemetry import tracing

logger = logging.getLogger(__name__)

DEADLOCK_TRIES = 5
MAX_WINDOW_BYTES = 32 * 1024 * 1024
"""The most bytes of text and metadata in one window. It bounds the producer's memory."""
PATIENCE_S = 5.0
"""How many seconds the first chunk of a window waits for others. It is short because workers could embed the chunk
meanwhile."""


@dataclass(frozen=True, slots=True)
class EnqueueRequest:
    """What the caller asked for, checked. ``choice`` is the lane if the job is a new one.

    The space of ``spec`` is registered together with the job, so that a call that is refused registers none. If it is
    new, its vectors have the column type ``storage``.
    """

    collection: str
    spec: SpaceSpec
    storage: str
    route: Route
    choice: Choice
    deadline: datetime | None
    priority: Priority
    on_long: OnLong
    idempotency_key: str | None
    skip_invalid: bool
    is_hidden: bool = False
    """The collection is a hidden one, which exists already."""
    may_cost: bool = False
    """A paid route serves the space, and may be chosen."""
    replaces: Filter | None = None
    """Of the chunks that pass this filter, delete those that the source does not have. None deletes nothing."""
    allow_empty: bool = False
    """A source without a chunk may delete all that passes ``replaces``."""
    max_refused: int | float | None = None
    """How many of the source's chunks may be refused: a number, or a share below 1."""
    job_id: int | None = None
    """The number of the job, if it comes from the outbox."""
    traceparent: str | None = None
    """The trace of the producer that wrote it there."""


def enqueue(
    db: sa.Engine,
    settings: Settings,
    request: EnqueueRequest,
    chunks: Iterable[object],
    *,
    ring: Callable[[sa.Connection], None],
    quote: Callable[[Callable[[], Iterable[PreparedChunk | InvalidChunk]]], Decimal] | None = None,
) -> int:
    """Commit the chunks to a job, window by window, and return the job's id.

    ``ring`` is called after each commit, with the connection between two transactions. ``quote`` computes from the
    whole stream what the job will cost. The amount is reserved for the key that begins the job. Raises
    :class:`InvalidChunk` with nothing written, unless bad chunks are skipped, :class:`TooManyRefused`, and
    :class:`InvalidInput` if chunks are to be deleted and the stream does not say all ids that the source has.
    """
    with contextlib.ExitStack() as stack:
        prepared: Iterable[PreparedChunk | InvalidChunk] = (
            prepare_or_skip(chunks) if request.skip_invalid else prepare_all(chunks)
        )
        usd, replacement, conn = Decimal(0), None, None
        if request.replaces is not None:
            conn = stack.enter_context(db.connect())
            replacement = stack.enter_context(replacing.begin(conn, request.collection, request.replaces))
            prepared = replacement.noting(prepared)
        must_be_whole = request.replaces is not None or request.max_refused is not None
        if quote is not None or must_be_whole or not request.skip_invalid:
            prepared = spool = stack.enter_context(Spool(prepared))
            if must_be_whole:
                _require_whole(request, spool)
            usd = usd if quote is None else quote(spool.look)
        if conn is None:
            conn = stack.enter_context(db.connect())
        collection, job, space = _open(conn, settings, request, usd)
        if collection is not None:
            beside = JobsBeside(conn, settings, collection, space, request.priority, job.id)
            try:
                _Producer(conn, settings, request, space, collection, job, beside, ring, replacement).fill(prepared)
            finally:
                _drop_producer_locks(conn, [job.id, *beside.locked])
        elif job.is_sealed:
            _require_same_stream(conn, request, job, prepared)
            if replacement is not None:
                _end_deletions(conn, request, job, replacement)
        return job.id


def _require_whole(request: EnqueueRequest, source: Spool) -> None:
    """Raise :class:`InvalidInput` if too much of the source is missing for what was asked. Nothing is written yet."""
    most, first = request.max_refused, source.first
    if most is not None and first is not None and source.refused > (most * source.count if most < 1 else most):
        allowed = f"{most:,}" if isinstance(most, int) else f"{most:.2%} of them"
        raise TooManyRefused(
            f"{source.refused:,} of {source.count:,} chunks are refused, and max_refused allows {allowed}. The first "
            f"one: chunk {first.chunk_id!r} at position {first.position}: {first.problem}. Nothing was written, and "
            "nothing was deleted. Fix the source, or allow more.",
            refused=source.refused,
            chunks=source.count,
        )
    if request.replaces is None:
        return
    if (nameless := source.nameless) is not None:
        raise InvalidInput(
            f"the item at position {nameless.position} has no id that can be read ({nameless.problem}), so it is not "
            "known which chunks the source has. Nothing was written, and nothing was deleted. Fix the item, or enqueue "
            "without replacing (replace=True in Python, --sync on the command line)."
        )
    if not (source.count or request.allow_empty):
        raise InvalidInput(
            f"the source is empty, so replacing would delete every chunk of {request.collection!r} that it may delete. "
            "Nothing was deleted. If that is meant, allow it: allow_empty=True in Python, --allow-empty on the command "
            "line."
        )


def _end_deletions(conn: sa.Connection, request: EnqueueRequest, job: jobs.OpenedJob, replacement: Replacement) -> None:
    """Go on with the deletions of a call with the same key that died. A chunk that another enqueue has named since that
    call began is kept.

    Raises :class:`InvalidInput` if it is not known which chunks those are.
    """
    with conn.begin():
        deletions = streams.deletions_of(conn, job.id)
        is_known = deletions.fence is not None and not streams.were_named_since(conn, job.id)
    if deletions.are_done:
        return
    if not is_known or deletions.fence is None:
        raise InvalidInput(
            f"idempotency_key {request.idempotency_key!r} belongs to job {job.id}, whose chunks are all enqueued, but "
            "which has not deleted all that its source does not have. It is not known which of those chunks others "
            "have enqueued since, so nothing more was deleted. Read the source again, and enqueue it with another key: "
            "that deletes what it does not have now."
        )
    replace(replacement, fence=deletions.fence).delete(job.id)


def _require_same_stream(
    conn: sa.Connection, request: EnqueueRequest, job: jobs.OpenedJob, prepared: Iterable[PreparedChunk | InvalidChunk]
) -> None:
    """Raise :class:`InvalidInput` if the job of the key was enqueued with other chunks."""
    with conn.begin():
        # The outbox is read first, so that a job that is delivered between the two queries is found by the second one.
        in_outbox = outbox.digest_of(conn, job.id) if outbox.is_kept(conn) else None
        kept = streams.digest_of(conn, job.id) or in_outbox
    require_same_chunks(request, job.id, kept, prepared)


def require_same_chunks(
    request: EnqueueRequest, job_id: int, kept: bytes | None, prepared: Iterable[PreparedChunk | InvalidChunk]
) -> None:
    """Raise :class:`InvalidInput` if the job of the request's key has other chunks. ``kept`` is their digest, and None
    for a job of an older release."""
    if kept is None:
        return
    digest = StreamDigest()
    for _ in digested(prepared, digest):
        pass
    if digest.digest() != kept:
        raise InvalidInput(
            f"idempotency_key {request.idempotency_key!r} belongs to job {job_id}, which enqueued other chunks: an id, "
            "a text or a metadata object differs. Nothing was written. Use a key of its own for each enqueue."
        )


def digested(
    prepared: Iterable[PreparedChunk | InvalidChunk], digest: StreamDigest
) -> Iterator[PreparedChunk | InvalidChunk]:
    """The items, while their digest is taken."""
    for item in prepared:
        if isinstance(item, PreparedChunk):
            digest.add(item)
        yield item


def _open(
    conn: sa.Connection, settings: Settings, request: EnqueueRequest, usd: Decimal
) -> tuple[Collection | None, jobs.OpenedJob, Space]:
    """The job, its space, and the collection if this call is to enqueue into it: it has the job's producer lock then.

    All of this is one transaction, because a prune between the search for the key and the creation of its job would
    leave a job that is complete without a chunk.
    """
    with conn.begin():
        if request.job_id is not None:
            # Its key is its own already. The lock of the key may be held by a producer's open transaction, for which
            # no delivery waits.
            outbox.hold(conn, request.job_id)
        elif request.idempotency_key is not None and outbox.is_kept(conn):
            outbox.lock_key(conn, request.idempotency_key)  # the first lock, because a producer's own one may take long
        space = registry.register_and_hold(conn, request.spec, storage=request.storage)
        job = _existing(conn, request, space)
        if job is not None and job.is_sealed:
            return None, job, space
        collection = collections.lock_for_enqueue(conn, request.collection, space, is_hidden=request.is_hidden)
        if job is None:
            if request.choice.route.is_paid:
                budget.require_budget(conn, settings, request.spec)
            open_job = partial(
                jobs.open_job,
                conn,
                collection=collection,
                route=request.route,
                priority=request.priority,
                on_long=request.on_long,
                choice=request.choice,
                deadline=request.deadline,
                job_id=request.job_id,
            )
            job = open_job(idempotency_key=request.idempotency_key) or _existing(conn, request, space)
            if job is None and request.job_id is not None:
                # A producer of the last release, or a transaction with an old snapshot, gave the key to another job.
                logger.warning(
                    "job %s gets no idempotency key, because another job has got it meanwhile", request.job_id
                )
                job = open_job(idempotency_key=None)
            assert job is not None, "the key was free, and then it had no job"  # noqa: S101
            if job.is_new:
                spends.begin(conn, job_id=job.id, usd=usd)
        traces.keep(conn, job.id, request.traceparent or tracing.traceparent())
        # The lock is taken in the transaction that makes the job, so that every job that others can see has its
        # producer's lock.
        if not jobs.hold_producer_lock(conn, job.id):
            return None, job, space
        try:
            if job.is_new:
                return collection, job, space
            if jobs.reopen_for_enqueue_if_unsealed(conn, job.id):
                spends.go_on(conn, job.id, may_cost=request.may_cost)
                return collection, job, space
            # Another producer has sealed it meanwhile, or somebody cancelled it, which is an error.
            jobs.drop_producer_lock(conn, job.id)
            return None, _existing(conn, request, space) or job, space
        except BaseException:
            conn.invalidate()  # the lock ends with its connection
            raise


def _existing(conn: sa.Connection, request: EnqueueRequest, space: Space) -> jobs.OpenedJob | None:
    """The job that the request goes on with: the one from the outbox, or the one of its key."""
    if request.job_id is not None:
        return jobs.of_id(conn, request.job_id)
    if request.idempotency_key is None:
        return None
    # The outbox is read first, so that a job that is delivered between the two queries is found by the second one.
    held = outbox.of_key(conn, request.idempotency_key) if outbox.is_kept(conn) else None
    job = jobs.of_key(
        conn,
        request.idempotency_key,
        collection=request.collection,
        space_id=space.id,
        on_long=request.on_long,
        is_hidden=request.is_hidden,
    )
    if held is None or (job is not None and job.is_sealed):
        return job
    require_same_request(conn, held, request)
    # Nothing is left to enqueue: all its chunks are in the outbox, also if they are being delivered.
    return jobs.OpenedJob(held.job_id, JobState.ENQUEUEING, request.choice.route, is_new=False, is_sealed=True)


def require_same_request(conn: sa.Connection, held: outbox.KeyedEntry, request: EnqueueRequest) -> None:
    """Raise :class:`InvalidInput` if the job in the outbox that has the key of the request asked for something else.
    Two names of one collection ask for the same."""
    collection = request.collection
    if collection != held.collection and (named := collections.resolve(conn, collection)) is not None:
        collection = held.collection if named == collections.resolve(conn, held.collection) else collection
    asked = (collection, request.spec.fingerprint, request.on_long)
    if asked != (held.collection, held.fingerprint, held.on_long):
        raise InvalidInput(
            f"idempotency_key {request.idempotency_key!r} belongs to job {held.job_id}, which enqueued into another "
            f"collection ({held.collection!r}) or space, or with another on_long. Use a key of its own for each "
            "enqueue."
        )


@dataclass(frozen=True, slots=True)
class _Producer:
    """The producer of one job: ``conn`` holds the job's lock."""

    conn: sa.Connection
    settings: Settings
    request: EnqueueRequest
    space: Space
    collection: Collection
    job: jobs.OpenedJob
    beside: JobsBeside
    ring: Callable[[sa.Connection], None]
    replacement: Replacement | None

    def fill(self, prepared: Iterable[PreparedChunk | InvalidChunk]) -> None:
        """Commit the whole stream and seal the job, unless it is cancelled meanwhile."""
        first, most = 2 * self.settings.chunk_batch_size, self.settings.enqueue_window
        with self.conn.begin():
            kept = streams.kept(self.conn)
        digest = None if self.request.idempotency_key is None else StreamDigest()
        if digest is not None:
            prepared = digested(prepared, digest)
        for chunks, refused in windows(prepared, first, most):
            if not self._commit(chunks, refused, kept):
                self.beside.seal()
                return
            self.ring(self.conn)
        with self.conn.begin():
            is_sealed = jobs.seal_if_enqueueing(self.conn, self.job.id)
            if kept.counts:
                fence = None if self.replacement is None else self.replacement.fence
                streams.seal(self.conn, self.job.id, None if digest is None else digest.digest(), fence)
        self.beside.seal()
        if is_sealed and self.replacement is not None:
            self.replacement.delete(self.job.id)
        end_or_leave(self.conn, self.job.id, self.space)

    def _commit(
        self, chunks: Sequence[PreparedChunk], refused: Sequence[DeadChunk], kept: streams.StreamColumns
    ) -> bool:
        """Commit one window in a transaction of its own. False if the job is no longer being enqueued.

        Two enqueues that share texts may deadlock. Postgres then rolls one back, which runs again. After a broken
        connection it cannot run again, because the producer's lock ended with the connection.
        """
        for tries_left in reversed(range(DEADLOCK_TRIES)):
            try:
                with self.conn.begin():
                    is_written = self._write(chunks, refused, kept)
            except sa.exc.OperationalError as error:
                if not (tries_left and getattr(error.orig, "sqlstate", None) in ("40P01", "40001")):
                    raise
                logger.info("an enqueue collided with another one over the same texts (%s); again", refusal(error))
            else:
                self.beside.committed()
                return is_written
        raise AssertionError("the last try returned or raised")

    def _write(
        self, window: Sequence[PreparedChunk], refused: Sequence[DeadChunk], kept: streams.StreamColumns
    ) -> bool:
        """Write one window in the transaction of ``conn``. False if the job is no longer being enqueued.

        The collection may have come to another space, or left one, since the last window. Its spaces are locked until
        the commit, so that no window that was written for one set of spaces is committed under another.
        """
        conn, request, job = self.conn, self.request, self.job
        lives = others.hold(conn, self.collection.id)
        chunks = planning.distinct(window)
        staging.stage(conn, chunks.values())
        known = staging.known_vectors(conn, self.space)
        plan = planning.plan_window(chunks, known, request.on_long)
        if not jobs.add_chunks(conn, job.id, len(plan.references)):
            return False
        dead_chunks.add_refused(conn, job.id, [*refused, *plan.rejected])
        staging.drop_rejected(conn, plan.rejected)
        needed = self.beside.needed(lives, plan.references)
        texts = dict(plan.missing)
        for of_space in needed.values():
            texts.update(of_space)
        staging.add_contents(conn, texts)
        merged = staging.merge_chunks(
            conn,
            collection_id=self.collection.id,
            job_id=job.id,
            on_long=request.on_long,
            is_first_try=job.is_new,
        )
        n_repeated = merged.repeated + len(window) - len(chunks)
        n_refused = len(refused) + len(plan.rejected)
        streams.add(conn, job.id, replace(merged, repeated=n_repeated, refused=n_refused), kept)
        shared = chunk_batches.SharedFields(
            job.id, self.space.id, job.lane, request.priority.rank, self.settings.max_attempts
        )
        if self.space.id in lives.ids:  # otherwise no search would find the vectors
            chunk_batches.add(
                conn,
                shared,
                planning.into_chunk_batches(plan.missing, self.settings.chunk_batch_size, planning.MAX_BATCH_BYTES),
            )
        self.beside.write(lives, needed, max_bytes=planning.MAX_BATCH_BYTES)
        chunk_batches.add_cached(conn, shared, plan.cached, n_truncated=sum(known[h].truncated for h in plan.cached))
        return True


def windows(
    items: Iterable[PreparedChunk | InvalidChunk],
    first: int,
    most: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[list[PreparedChunk], list[DeadChunk]]]:
    """The windows of a stream: the chunks of each, and the chunks that were skipped.

    The first window has ``first`` items, so that workers begin at once. Each further one has four times as many as the
    one before, but at most ``most``, and about ``MAX_WINDOW_BYTES`` of text and metadata. The items of a slow source do
    not wait for a full window: the first item that comes after ``PATIENCE_S`` closes it.
    """
    size = min(first, most)
    chunks: list[PreparedChunk] = []
    refused: list[DeadChunk] = []
    n_bytes = 0
    since = clock()
    for item in items:
        if not (chunks or refused):
            since = clock()
        if isinstance(item, PreparedChunk):
            chunks.append(item)
            n_bytes += len(item.id) + len(item.text) + len(item.metadata)
        else:
            refused.append(DeadChunk(item.chunk_id, item.reason, f"position {item.position}: {item.problem}"))
        is_full = len(chunks) + len(refused) == size
        if is_full or n_bytes >= MAX_WINDOW_BYTES or clock() - since >= PATIENCE_S:
            yield chunks, refused
            chunks, refused, n_bytes = [], [], 0
            if is_full:
                size = min(4 * size, most)
    if chunks or refused:
        yield chunks, refused


def _drop_producer_locks(conn: sa.Connection, job_ids: Sequence[int]) -> None:
    try:
        conn.rollback()
        with conn.begin():
            for job_id in job_ids:
                jobs.drop_producer_lock(conn, job_id)
    except sa.exc.SQLAlchemyError:
        # The lock ends with its connection, so the pool must not keep this one.
        conn.invalidate()
