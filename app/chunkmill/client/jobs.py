"""The client's methods for jobs: enqueue, follow, cancel, retry."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from chunkmill.client.base import ClientPart, store_errors
from chunkmill.client.ends import AWAY_SECONDS, RECONNECT_SECONDS, JobWatch
from chunkmill.client.enqueue import EnqueueRequest, enqueue
from chunkmill.client.outbox import enqueue_within, open_if_undelivered
from chunkmill.client.paying import quote_of
from chunkmill.client.steps import PauseStep, Steps, TellStep, run_steps
from chunkmill.client.stopping import stoppable
from chunkmill.client.transactions import as_transaction
from chunkmill.db.retry import transact
from chunkmill.domain.arguments import (
    as_deadline,
    as_flag,
    as_function,
    as_items,
    as_most_refused,
    as_number,
    as_on_invalid,
    as_seconds,
    as_word,
    require_name,
)
from chunkmill.domain.chosen import as_replaced
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import Attempt, FailingChunkBatch, Job, require_not_failed, still_open
from chunkmill.domain.shapes import rows_of
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.errors import InvalidInput, StoreLimit, StoreUnavailable, WaitTimeout
from chunkmill.ledger.access import spends
from chunkmill.ledger.jobs import cancel, jobs, routing
from chunkmill.ledger.money import budget
from chunkmill.ledger.work import attempts
from chunkmill.monitor import hindrance
from chunkmill.telemetry import tracing
from chunkmill.telemetry.progress import JobProgress

logger = logging.getLogger(__name__)

HINDRANCE_SECONDS = 2.0
"""How many seconds pass between two checks of `wait` for what hinders the job. A check reads the job's open
ChunkBatches and who is connected."""
CANCEL_TRIES = 5
"""How often each transaction of a cancel is tried, within three seconds in all, because a deadlock or a failover may
end it."""


class Jobs(ClientPart):
    """The part of the client that is about jobs."""

    def enqueue(
        self,
        chunks: Iterable[object],
        *,
        collection: str,
        model: str | None = None,
        route: Route | str = Route.AUTO,
        priority: Priority | str = Priority.NORMAL,
        idempotency_key: str | None = None,
        on_long: OnLong | str = OnLong.TRUNCATE,
        on_invalid: Literal["raise", "skip"] = "raise",
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        deadline: datetime | timedelta | float | None = None,
        replace: bool | Mapping[str, Any] = False,
        allow_empty: bool = False,
        max_refused: float | None = None,
        within: object = None,
    ) -> Job:
        """Ask for vectors of ``chunks``, which is any iterable of :class:`Chunk`, ``(id, text)`` pairs,
        ``(id, text, metadata)`` triples, or dicts, dataclasses, named tuples or rows with the fields ``id`` and
        ``text``, whose other fields become metadata. A data frame of pandas or Polars and a table of Arrow are read row
        by row. An id may be a whole number or a UUID.

        Memory stays constant however long the iterable is. A chunk whose id is in the collection already replaces the
        old one if its text or metadata differ; otherwise nothing is written. Contents that have a vector in the model's
        space are not embedded again. While the collection is being re-embedded, or can still be rolled back, what is
        new to it is embedded into its other space too, by a job of its own, for which this one does not wait.

        ``on_invalid="raise"`` checks the whole iterable first and raises :class:`InvalidChunk` at the first bad chunk,
        with nothing written. ``"skip"`` commits window by window, so that workers start at once, and puts bad chunks on
        the job's dead list. The window of a slow source is committed with the first chunk that comes after 5 s.

        A second enqueue with the same ``idempotency_key`` returns the job of the first one, and completes that enqueue
        if its producer died halfway. It raises :class:`InvalidInput` if the first one has ended and had other chunks,
        had another ``collection``, space or ``on_long``, or was cancelled before its end.

        ``Job.new``, ``replaced``, ``unchanged``, ``repeated`` and ``refused`` say how the chunks met the collection.

        ``replace=True`` also deletes the chunks of the collection that the iterable does not have. ``replace`` may be a
        filter on metadata, such as ``{"source": "wiki"}``; then only chunks that pass it are deleted. The iterable is
        read to its end first, and kept like that of ``on_invalid="raise"``. If it raises an error, nothing is written
        and nothing deleted; an iterable without a chunk raises :class:`InvalidInput` unless ``allow_empty`` is true,
        and so does a bad chunk without a valid id. The deletions begin when the job is sealed. What any other enqueue
        adds, replaces or finds unchanged after this call began stays. ``Job.deleted`` says how many chunks were
        deleted. If the call fails during the deletions, the same call with its ``idempotency_key`` ends them, unless
        another enqueue has found chunks unchanged meanwhile: then it raises :class:`InvalidInput` and deletes nothing.

        ``max_refused`` belongs to ``on_invalid="skip"``: if more chunks than this number, or than this share if it is a
        float below 1, are bad, :class:`TooManyRefused` is raised and nothing is written. The whole iterable is checked
        first.

        ``dimensions`` shortens the vectors of a model that was trained for it, and normalizes them again. ``precision``
        is ``float`` or ``int8``. Each value of either makes a space of its own. If ``precision`` is None it is
        ``EMBEDDING_PRECISION``. If ``dimensions`` is None it is ``EMBEDDING_DIMENSIONS`` for ``EMBEDDING_MODEL``, and
        the model's own number for another model.

        ``route`` is ``local``, ``openai`` (the Batch API, which costs half and takes up to 24 hours), ``openai-sync``
        (plain requests), or ``auto``, which chooses the cheapest route that serves the model's space, is not stopped
        and can meet the ``deadline``. The deadline is a datetime with a time zone, a timedelta, or a number of seconds
        from now. Work that has not begun when the deadline comes near may move to a more expensive route.
        :meth:`explain` says what was chosen, and why.

        ``within`` is a transaction of your own: a ``Session`` or a ``Connection`` of SQLAlchemy, or a ``Connection`` of
        psycopg, to the same database. The job exists if and only if you commit; until then nobody sees it, and the
        call takes no lock that others wait for. It takes at most 100,000 chunks with 256 MiB, of which it keeps a page
        in memory. The returned job has its number already. A poller enqueues its chunks after your commit, with the
        counts of ``Job.new`` and the like. If the collection has come to another space by then, the job fails and says
        so. An error leaves your transaction as it was. It cannot be combined with ``replace`` and ``max_refused``.

        Raises :class:`InvalidChunk`, :class:`UnknownModel`, :class:`UnknownRoute`, :class:`BudgetExceeded`,
        :class:`SpaceMismatch` and :class:`InvalidInput`. A Redis that is down is not an error: the poller rings when
        Redis is back.
        """
        require_name("collection", collection)
        route, priority = as_word(Route, route, "route"), as_word(Priority, priority, "priority")
        on_long = as_word(OnLong, on_long, "on_long")
        on_invalid = as_on_invalid(on_invalid)
        replaces, allow_empty = as_replaced(replace), as_flag("allow_empty", allow_empty)
        most_refused = as_most_refused(max_refused, skips=on_invalid == "skip")
        chunks = self._while_open(stoppable(rows_of(as_items("chunks", chunks))))
        if idempotency_key is not None:
            require_name("idempotency_key", idempotency_key)
        due = None if deadline is None else as_deadline(deadline, datetime.now(UTC))
        transaction = None if within is None else as_transaction(within)
        if transaction is not None and (replaces is not None or most_refused is not None):
            raise InvalidInput(
                "replace and max_refused cannot be combined with within, because the chunks are enqueued after your "
                "commit. Leave them out, or enqueue without within."
            )
        spec = self._spec(model, on_long, dimensions=dimensions, precision=precision)
        with self._transaction() as conn:
            choice = routing.decide(conn, self._settings, spec, route, due)
            again = idempotency_key is not None and jobs.is_key_used(conn, idempotency_key)
            if choice.route.is_paid and not again:
                budget.require_budget(conn, self._settings, spec)
            quote = quote_of(
                self._db, conn, self._settings,
                collection=collection, spec=spec, route=route, choice=choice, on_long=on_long,
            )  # fmt: skip
        request = EnqueueRequest(
            collection,
            spec,
            self._settings.vector_storage,
            route,
            choice,
            due,
            priority,
            on_long,
            idempotency_key,
            skip_invalid=on_invalid == "skip",
            may_cost=routing.may_cost(self._settings, spec, route),
            replaces=replaces,
            allow_empty=allow_empty,
            max_refused=most_refused,
        )
        if transaction is not None:
            with store_errors(self._db), tracing.root("chunkmill.enqueue", {}, kind="PRODUCER") as span:
                job = enqueue_within(self._db, request, chunks, transaction)
                job = self._job_now(job) if isinstance(job, int) else job
                span.set({"space": job.space, "job": job.id, "chunks": job.chunks})
                return job
        with store_errors(self._db), tracing.root("chunkmill.enqueue", {}, kind="PRODUCER") as span:
            job = self._job_now(enqueue(self._db, self._settings, request, chunks, ring=self._ring, quote=quote))
            span.set({"space": job.space, "job": job.id, "chunks": job.chunks, "contents": job.contents})
            return job

    def job(self, job_id: int) -> Job:
        """The job as it is now, with what hinders it. Raises :class:`NotFound`."""
        job_id = as_number("job_id", job_id)
        with self._transaction() as conn:
            job = jobs.get(conn, job_id)
            return replace(job, hindrance=hindrance.read(conn, job))

    def _job_now(self, job_id: int) -> Job:
        """The job as it is now, without what hinders it."""
        with self._transaction() as conn:
            return jobs.get(conn, job_id)

    def _hindrance(self, job: Job) -> str | None:
        with self._transaction() as conn:
            return hindrance.read(conn, job)

    def jobs(self, limit: int = 20) -> list[Job]:
        """The latest jobs, newest first."""
        limit = as_number("limit", limit, least=0)
        with self._transaction() as conn:
            return Rows(jobs.latest(conn, limit), Job)

    def dead_chunks(self, job_id: int, limit: int = 1000) -> list[DeadChunk]:
        """The first ``limit`` chunks of a job that got no vector, with the reasons. Raises :class:`NotFound`."""
        job_id, limit = as_number("job_id", job_id), as_number("limit", limit, least=0)
        with self._transaction() as conn:
            jobs.get(conn, job_id)
            return Rows(jobs.dead_chunks(conn, job_id, limit=limit), DeadChunk)

    def wait(
        self,
        job_id: int,
        *,
        timeout: float | None = None,
        on_progress: Callable[[Job], None] | None = None,
        on_hindrance: Callable[[str], None] | None = None,
        progress: bool = False,
    ) -> Job:
        """Wait until a job has finished, and return it. ``timeout`` is in seconds; None waits for ever.

        Postgres notifies of the end, so the job need not be read often: without ``on_progress`` it is read once in 30
        s. If Postgres goes away while this waits, it waits for Postgres too; after a minute without it, it raises
        :class:`StoreUnavailable`. ``progress`` shows a bar: in the cell of a notebook, on a terminal (stderr), or else
        as a line every 5 s.

        ``on_progress`` is called with the job each time it was read. ``on_hindrance`` is called with a sentence if
        something hinders the job and waiting alone does not help: a ChunkBatch failed or waits for another kind of
        worker, its lane is stopped, no poller or no worker is connected, or Postgres is away. Without it the sentence
        is shown with the bar, or is a warning in the log, and so is :attr:`Job.notice` at the end.

        Raises :class:`JobFailed` if chunks are left without a vector, :class:`JobCancelled`, which is a kind of it, if
        somebody cancelled the job, :class:`WaitTimeout`, whose message ends with that sentence, and :class:`NotFound`.
        Chunks that were refused (``on_invalid="skip"``, ``on_long="reject"``) fail no job: see ``Job.dead``.
        """
        return run_steps(
            self._wait_steps(
                job_id, timeout=timeout, on_progress=on_progress, on_hindrance=on_hindrance, progress=progress
            )
        )

    def _wait_steps(
        self,
        job_id: int,
        *,
        timeout: float | None = None,
        on_progress: Callable[[Job], object] | None = None,
        on_hindrance: Callable[[str], object] | None = None,
        progress: bool = False,
    ) -> Steps[Job]:
        job_id, timeout = as_number("job_id", job_id), None if timeout is None else as_seconds("timeout", timeout)
        as_function("on_progress", on_progress)
        as_function("on_hindrance", on_hindrance)
        if not as_flag("progress", progress):
            return (yield from self._watched(job_id, timeout, on_progress, on_hindrance))
        bar = JobProgress(job_id)

        def look(job: Job) -> object:
            bar.look(job)
            return on_progress(job) if on_progress else None  # which may be a coroutine

        try:
            return (yield from self._watched(job_id, timeout, look, on_hindrance or bar.note))
        finally:
            bar.close()

    def _watched(
        self,
        job_id: int,
        timeout: float | None,
        on_progress: Callable[[Job], object] | None,
        on_hindrance: Callable[[str], object] | None,
    ) -> Steps[Job]:
        with JobWatch(self._db, job_id) as watching:
            return (yield from self._until_ended(job_id, watching, timeout, on_progress, on_hindrance))

    def _until_ended(
        self,
        job_id: int,
        watching: JobWatch,
        timeout: float | None,
        on_progress: Callable[[Job], object] | None,
        on_hindrance: Callable[[str], object] | None,
    ) -> Steps[Job]:
        say = on_hindrance or partial(logger.warning, "job %s: %s", job_id)
        hindered, hindered_at = None, time.monotonic()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            asked = time.monotonic()
            job = yield from self._read_steps(job_id, watching, deadline, say)
            looked = time.monotonic()
            if on_progress:
                yield TellStep(on_progress, job)
            require_not_failed(job)
            if job.state.is_final:
                if job.notice and on_hindrance is None:
                    logger.warning("job %s: %s", job_id, job.notice)
                return job
            if timeout is not None and deadline is not None and looked >= deadline:
                advice = self._hindrance(job) or "Check with `chunkmill status` that a worker and a poller run."
                raise WaitTimeout(f"{still_open(job, timeout)} {advice}")
            if looked >= hindered_at:
                before = hindered
                with contextlib.suppress(StoreUnavailable):  # the next look says so
                    hindered = self._hindrance(job)
                if hindered and hindered != before:
                    yield TellStep(say, hindered)
                looked = time.monotonic()
                hindered_at = looked + max(HINDRANCE_SECONDS, 10 * (looked - asked))
            # Reading a job of a million ChunkBatches takes a while. Never spend more than a tenth of the time on it.
            pause = max(0.1, 10 * (looked - asked))
            yield watching.wait(pause, deadline, is_watched=on_progress is not None)

    def _read_steps(
        self, job_id: int, watching: JobWatch, deadline: float | None, say: Callable[[str], object]
    ) -> Steps[Job]:
        """Read the job. If it was read before, an outage of Postgres is waited for, for a minute at most and not beyond
        the deadline.
        """
        until, is_said = time.monotonic() + AWAY_SECONDS, False
        while True:
            watching.look()
            try:
                return self._job_now(job_id)
            except StoreUnavailable as away:
                now = time.monotonic()
                is_late = now > until or (deadline is not None and now >= deadline)
                if not watching.has_begun or is_late or isinstance(away, StoreLimit):
                    raise
                if not is_said:
                    is_said = True
                    yield TellStep(say, f"{away} The job goes on when Postgres is back, and so does this wait.")
                left = RECONNECT_SECONDS if deadline is None else deadline - now
                yield PauseStep(min(RECONNECT_SECONDS, left))

    def end_of(self, job_id: int) -> Future[Job]:
        """A future of the job's end, for a program that does not wait: ``end_of(id).add_done_callback(function)``.

        Its result is the job as it ended: completed, failed or cancelled. Callbacks run one after the other, in a
        thread of the client, so a long one should hand its work over. The future lives as long as this process: after a
        restart, ask for it anew. It raises :class:`ClientClosed` if the client is closed before, :class:`NotFound` if
        the job was deleted, and :class:`StoreUnavailable` after Postgres was away for a minute. ``cancel()`` of the
        future only forgets it. With asyncio, ``asyncio.create_task(client.wait(job_id))`` does the same.
        """
        job = self.job(job_id)
        return self._futures.of(job)

    def cancel(self, job_id: int) -> Job:
        """Cancel a job: no ChunkBatch of it starts any more, and workers leave those they hold. Written vectors stay.

        The job stops at once. Its ChunkBatches follow, which takes seconds for a large job; a poller completes this if
        the process dies.
        """
        job_id = as_number("job_id", job_id)
        with store_errors(self._db):
            with self._db.begin() as conn:
                jobs.get(conn, job_id)
                open_if_undelivered(conn, job_id)
            transact(self._db, lambda conn: cancel.cancel_if_open(conn, job_id), what="cancel", tries=CANCEL_TRIES)
            while transact(self._db, lambda conn: cancel.cancel_some(conn, job_id), what="cancel", tries=CANCEL_TRIES):
                pass
        return self._job_now(job_id)

    def retry(self, job_id: int) -> Job:
        """Embed what a failed or cancelled job left without a vector. Any other job is returned as it is."""
        job_id = as_number("job_id", job_id)
        with self._transaction() as conn:
            job = jobs.get(conn, job_id)
            again = jobs.retry_if_ended(conn, job_id, max_attempts=self._settings.max_attempts)
            if again:
                may_cost = routing.job_may_cost(conn, self._settings, job_id)
                spends.go_on(conn, job_id, may_cost=may_cost)
            elif job.state in (JobState.FAILED, JobState.CANCELLED):
                raise InvalidInput(
                    f"job {job_id} was never enqueued to its end, so it cannot be retried. Enqueue its chunks again: "
                    "what is embedded is not embedded twice."
                )
        if again:
            self._take_up([job_id])
        return self._job_now(job_id)

    def attempts(self, job_id: int) -> list[Attempt]:
        """All attempts at a job's ChunkBatches, the oldest first: which worker, how it ended, what it cost.

        For a worker that died it also says what was seen of the death, and how many contents it could have cost
        (``at_risk``). Raises :class:`NotFound`.
        """
        job_id = as_number("job_id", job_id)
        with self._transaction() as conn:
            jobs.get(conn, job_id)
            return Rows(attempts.of_job(conn, job_id), Attempt)

    def failing(self, job_id: int) -> FailingChunkBatch | None:
        """The first ChunkBatch of a job that was discarded; without one, the first that failed and is tried again."""
        job_id = as_number("job_id", job_id)
        with self._transaction() as conn:
            return attempts.first_failing(conn, job_id)
