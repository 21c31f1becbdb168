"""An enqueue inside the producer's own transaction, and its delivery once that is committed.

The transaction writes the chunks into the outbox and into nothing else. So it holds no lock that a worker, a search or
another producer waits for, however long it stays open. After the commit a poller hears of it and enqueues the chunks as
any enqueue does, under the job's number.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import psycopg
import sqlalchemy as sa

from chunkmill.client.enqueue import EnqueueRequest, digested, enqueue, require_same_chunks, require_same_request
from chunkmill.client.transactions import DATABASE, OuterTransaction
from chunkmill.db import home
from chunkmill.db.connect import open_alone, raw
from chunkmill.db.locks import KEY_LOCK
from chunkmill.domain.chunks import PreparedChunk, StreamDigest, prepare_all, prepare_or_skip
from chunkmill.domain.reasons import reason_of
from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState
from chunkmill.errors import (
    ChunkmillError,
    InvalidChunk,
    InvalidInput,
    InvalidSetting,
    NewerSpace,
    StoreUnavailable,
)
from chunkmill.ledger.jobs import jobs, outbox, streams
from chunkmill.ledger.jobs.outbox import OUTBOX_CHANNEL, KeyedEntry, OutboxEntry, Statements
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.telemetry import tracing

logger = logging.getLogger(__name__)

MOST_CHUNKS = 100_000
MOST_BYTES = 256 * 1024 * 1024
"""How many chunks, and bytes of text and metadata, one enqueue inside a transaction may have. They are written twice,
and the transaction is the producer's."""
PAGE_CHUNKS, PAGE_BYTES = 500, 1024 * 1024
"""When a page of the outbox is full. One page is in memory at a time."""
LEAST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0
"""How long a job whose delivery failed waits for the next try."""
OWN_LACKS = (InvalidSetting, NewerSpace)
"""Errors that are the fault of this process. Another process may have the setting or the release that this one
lacks."""


# --- in the producer's transaction -----------------------------------------------------------------------------------


def enqueue_within(
    db: sa.Engine, request: EnqueueRequest, chunks: Iterable[object], transaction: OuterTransaction
) -> Job | int:
    """Write a job into the outbox, in the producer's transaction.

    Returns the job as it will be once the transaction is committed, or the number of a job that has the idempotency key
    already. Raises what an enqueue raises, with nothing written, and the transaction can go on.
    """
    with db.begin() as conn:
        if not outbox.is_kept(conn):
            raise StoreUnavailable(
                "the database has no outbox for enqueues within transactions. Run: chunkmill migrate"
            )
        installation = home.find_home(raw(conn))
        assert installation is not None, "the outbox is in it"  # noqa: S101
        ours = conn.execute(sa.text(DATABASE)).one()
        job_id = outbox.new_job_id(conn)
        collections.require_space(conn, request.collection, request.spec)
    statements = Statements(installation.schema)
    digest = None if request.idempotency_key is None else StreamDigest()
    with transaction.block():
        if tuple(transaction.rows(DATABASE)[0]) != tuple(ours):
            raise InvalidInput(
                "within leads to another database than the client, so that the job would never be found. Give a "
                "connection to the database of DATABASE_URL."
            )
        prepared = prepare_or_skip(chunks) if request.skip_invalid else prepare_all(chunks)
        if request.idempotency_key is not None and digest is not None:
            transaction.rows(statements.lock_key, {"lock": KEY_LOCK, "key": request.idempotency_key})
            # Only this transaction sees what it has written, and it may not see what others have committed since it
            # began.
            own = transaction.rows(statements.entry_of_key, {"key": request.idempotency_key})
            keyed = _job_of_key(db, request, outbox.held(own[0]) if own else None)
            if keyed is not None and keyed.has_all:
                require_same_chunks(request, keyed.job_id, keyed.digest, prepared)
                undelivered = transaction.rows(statements.job, {"job_id": keyed.job_id})
                return keyed.job_id if keyed.is_sealed or not undelivered else outbox.as_job(undelivered[0])
            if keyed is not None:
                job_id = keyed.job_id  # its producer died, and this transaction completes its enqueue
            prepared = digested(prepared, digest)
        entry = OutboxEntry(
            job_id=job_id,
            collection=request.collection,
            spec=request.spec,
            storage=request.storage,
            route=request.route,
            choice=request.choice,
            deadline=request.deadline,
            priority=request.priority,
            on_long=request.on_long,
            idempotency_key=request.idempotency_key,
            may_cost=request.may_cost,
            traceparent=tracing.traceparent(),
        )
        parameters = outbox.entry_parameters(entry)
        transaction.rows(statements.add_entry, parameters)
        n_chunks = 0
        for number, page in enumerate(_pages(prepared)):
            transaction.rows(statements.add_page, {"job_id": job_id, "number": number, "chunks": outbox.page_of(page)})
            n_chunks += sum(isinstance(item, PreparedChunk) for item in page)
        closed = {"job_id": job_id, "n_chunks": n_chunks, "digest": None if digest is None else digest.digest()}
        transaction.rows(statements.close_entry, closed)
        transaction.rows(statements.tell, {"channel": OUTBOX_CHANNEL, "payload": str(job_id)})
        return outbox.as_job(transaction.rows(statements.job, {"job_id": job_id})[0])


@dataclass(frozen=True, slots=True)
class _KeyedJob:
    """The job that has the key of a request already."""

    job_id: int
    digest: bytes | None
    is_sealed: bool
    has_all: bool
    """All its chunks are in the ledger or in the outbox."""


def _job_of_key(db: sa.Engine, request: EnqueueRequest, own: KeyedEntry | None) -> _KeyedJob | None:
    """The job of the request's key, if there is one. ``own`` is the one that the producer's transaction sees in the
    outbox. Raises :class:`InvalidInput` if it asked for something else."""
    assert request.idempotency_key is not None  # noqa: S101
    with db.begin() as conn:
        # The outbox first: a job that is delivered between the two looks is seen by the second one.
        held = own or outbox.of_key(conn, request.idempotency_key)
        space = registry.find(conn, request.spec.fingerprint)
        job = jobs.of_key(
            conn,
            request.idempotency_key,
            collection=request.collection,
            space_id=0 if space is None else space.id,
            on_long=request.on_long,
        )
        if job is not None and job.is_sealed:
            return _KeyedJob(job.id, streams.digest_of(conn, job.id), is_sealed=True, has_all=True)
        if held is not None:
            require_same_request(conn, held, request)
            return _KeyedJob(held.job_id, held.digest, is_sealed=False, has_all=True)
        return None if job is None else _KeyedJob(job.id, None, is_sealed=False, has_all=False)


def _pages(prepared: Iterable[PreparedChunk | InvalidChunk]) -> Iterator[list[PreparedChunk | InvalidChunk]]:
    """Raises :class:`InvalidInput` if they are more than one transaction may have."""
    page: list[PreparedChunk | InvalidChunk] = []
    n_bytes = page_bytes = 0
    for n_items, item in enumerate(prepared, start=1):
        size = len(item.id) + len(item.text) + len(item.metadata) if isinstance(item, PreparedChunk) else 0
        n_bytes += size
        if n_items > MOST_CHUNKS or n_bytes > MOST_BYTES:
            raise InvalidInput(
                f"an enqueue within a transaction takes at most {MOST_CHUNKS:,} chunks with {MOST_BYTES:,} bytes of "
                "text and metadata, and this one has more. Nothing of it was written. Enqueue after your transaction, "
                "or in several transactions."
            )
        page.append(item)
        page_bytes += size
        if len(page) == PAGE_CHUNKS or page_bytes >= PAGE_BYTES:
            yield page
            page, page_bytes = [], 0
    if page:
        yield page


# --- once it is committed --------------------------------------------------------------------------------------------


def deliver(db: sa.Engine, settings: Settings, job_id: int, *, ring: Callable[[sa.Connection], None]) -> bool:
    """Enqueue the chunks of a job in the outbox, and take it out. False if another process is delivering it, or has
    delivered it.

    A job that was cancelled is only taken out.

    If the process dies at any moment, the next delivery goes on in the same job. An error that will not pass ends the
    job as failed, with the reason; any other one is raised, and the job stays in the outbox. What only this process
    lacks is raised too: a setting of its environment, or the release that can read a space.
    """
    with db.begin() as conn:
        entry, job = outbox.read(conn, job_id), jobs.of_id(conn, job_id)
        if job is not None and job.state is JobState.CANCELLED:
            return outbox.delete(conn, job_id)
    if entry is None:
        return False
    request = EnqueueRequest(
        entry.collection,
        entry.spec,
        entry.storage,
        entry.route,
        entry.choice,
        entry.deadline,
        entry.priority,
        entry.on_long,
        entry.idempotency_key,
        skip_invalid=True,  # they were checked before; those that were refused go to the dead list
        may_cost=entry.may_cost,
        job_id=job_id,
        traceparent=entry.traceparent,
    )
    try:
        enqueue(db, settings, request, _items(db, job_id), ring=ring)
    except ChunkmillError as error:
        if error.retryable or isinstance(error, OWN_LACKS):
            raise
        with db.begin() as conn:
            is_ours = _fail_if_undelivered(conn, entry, reason_of(error))
        if is_ours:
            logger.error("job %s of the outbox cannot be enqueued: %s", job_id, error)  # noqa: TRY400 - it is said
        return is_ours
    with db.begin() as conn:
        job = jobs.of_id(conn, job_id)
        is_over = job is not None and (job.is_sealed or job.state is JobState.CANCELLED)
        return is_over and outbox.delete(conn, job_id)


def open_if_undelivered(conn: sa.Connection, job_id: int) -> None:
    """Open a job that is still in the outbox, with none of its chunks, so that it can be cancelled. It has its key, as
    any job that is cancelled before all of its chunks were enqueued."""
    entry = outbox.read(conn, job_id) if outbox.is_kept(conn) else None
    if entry is None:
        return
    job = jobs.of_id(conn, job_id)
    if job is None:
        _open(conn, entry, entry.idempotency_key)
    elif job.state is JobState.FAILED:  # another producer died, and the delivery would go on in its job
        jobs.reopen_for_enqueue_if_unsealed(conn, job_id)


def _items(db: sa.Engine, job_id: int) -> Iterator[object]:
    """The items of a job, of which one page at a time is in memory."""
    number = 0
    while True:
        with db.begin() as conn:
            page = outbox.page(conn, job_id, number)
        if page is None:
            return
        yield from page
        number += 1


def _fail_if_undelivered(conn: sa.Connection, entry: OutboxEntry, error: str) -> bool:
    """End the job as failed, so that whoever waits for it hears why. Its key is free. False if another process has
    taken it out of the outbox meanwhile: then the error has nothing to do with the job."""
    if not outbox.delete(conn, entry.job_id):
        return False
    if jobs.of_id(conn, entry.job_id) is None:
        _open(conn, entry, None)
    jobs.fail_if_enqueueing(conn, entry.job_id, error)
    return True


def _open(conn: sa.Connection, entry: OutboxEntry, idempotency_key: str | None) -> None:
    """Open the job of an entry, whether or not its collection can take its chunks."""
    space = registry.register_and_hold(conn, entry.spec, storage=entry.storage)
    collection = collections.resolve(conn, entry.collection)
    if collection is None:
        collection = collections.lock_for_enqueue(conn, entry.collection, space)
    open_job = partial(
        jobs.open_job,
        conn,
        collection=collections.Collection(collection.id, collection.name, space.id),
        route=entry.route,
        priority=entry.priority,
        on_long=entry.on_long,
        choice=entry.choice,
        deadline=entry.deadline,
        job_id=entry.job_id,
    )
    if open_job(idempotency_key=idempotency_key) is None:
        open_job(idempotency_key=None)  # another job has got the key; if this one was opened, nothing happens


class Deliverer:
    """Delivers what is in the outbox, in a thread beside a poller's rounds. Any number of processes may do so.

    It hears of a commit by a notification, and looks by itself every ``POLL_INTERVAL``, because a pooler may pass no
    notification on.
    """

    def __init__(self, db: sa.Engine, settings: Settings, ring: Callable[[sa.Connection], None]) -> None:
        self._db = db
        self._settings = settings
        self._ring = ring
        self._pauses: dict[int, tuple[float, float]] = {}
        """Jobs whose delivery failed: when to try again, and after how many seconds."""
        self._said: str | None = None

    def start(self, stop: threading.Event) -> threading.Thread:
        """Start the thread, which ends soon after ``stop``."""
        thread = threading.Thread(target=self.run, args=(stop,), name="outbox", daemon=True)
        thread.start()
        return thread

    def run(self, stop: threading.Event) -> None:
        """Deliver until ``stop``."""
        while not stop.is_set():
            try:
                if not self._can_deliver():
                    stop.wait(60.0)
                    continue
                with closing(open_alone(self._db)) as connection:
                    connection.execute(f"LISTEN {OUTBOX_CHANNEL}", prepare=False)
                    self._serve(connection, stop)
            except Exception as error:  # noqa: BLE001 - without this thread no job of the outbox is delivered
                self._say(f"the outbox cannot be read ({reason_of(error)}); trying again every few seconds")
                stop.wait(max(1.0, self._settings.poll_interval))

    def _serve(self, connection: psycopg.Connection[object], stop: threading.Event) -> None:
        while not stop.is_set():
            self.round(stop)
            for _ in connection.notifies(timeout=self._settings.poll_interval, stop_after=1):
                pass

    def round(self, stop: threading.Event | None = None) -> int:
        """Deliver all that is in the outbox now; returns how many jobs. A job that fails holds up no other."""
        delivered = after = 0
        while True:
            with self._db.begin() as conn:
                waiting = outbox.waiting(conn, after=after) if outbox.is_kept(conn) else []
            for job_id in waiting:
                after = job_id
                if stop is not None and stop.is_set():
                    return delivered
                until, pause = self._pauses.get(job_id, (0.0, 0.0))
                if time.monotonic() < until:
                    continue
                try:
                    delivered += deliver(self._db, self._settings, job_id, ring=self._ring)
                except Exception as error:  # noqa: BLE001 - one job must not keep the others waiting
                    pause = min(LONGEST_PAUSE_S, max(LEAST_PAUSE_S, 2 * pause))
                    self._pauses[job_id] = (time.monotonic() + pause, pause)
                    logger.warning(
                        "job %s of the outbox was not delivered (%s); trying again in %g s",
                        job_id,
                        reason_of(error),
                        pause,
                    )
                else:
                    self._pauses.pop(job_id, None)
            if not waiting:
                return delivered

    def _can_deliver(self) -> bool:
        with self._db.begin() as conn:
            if not outbox.is_kept(conn):
                return False
            if outbox.may_deliver(conn):
                return True
        self._say(
            "this poller's role may read no texts, so it delivers no jobs that were enqueued within transactions. If "
            "there are such jobs, run one poller with a login of both groups: GRANT chunkmill_producers TO its_login;"
        )
        return False

    def _say(self, what: str) -> None:
        """Log it once."""
        if what != self._said:
            logger.warning("poller: %s", what)
        self._said = what
