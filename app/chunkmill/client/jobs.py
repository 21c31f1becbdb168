"""The client's methods for jobs: enqueue, follow, cancel, retry."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal

from chunkmill.client.base import ClientPart, store_errors
from chunkmill.client.enqueue import EnqueueRequest, enqueue
from chunkmill.client.paying import quote_of
from chunkmill.client.steps import Pause, Steps, Tell, run_steps
from chunkmill.client.stopping import stoppable
from chunkmill.db.connect import connections
from chunkmill.db.retry import transact
from chunkmill.domain.arguments import (
    as_deadline,
    as_flag,
    as_function,
    as_items,
    as_number,
    as_seconds,
    as_word,
    require_name,
)
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import Attempt, FailingChunkBatch, Job
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.errors import InvalidInput, JobFailed, StoreUnavailable, WaitTimeout
from chunkmill.ledger.access import spends
from chunkmill.ledger.jobs import cancel, jobs, routing
from chunkmill.ledger.money import budget
from chunkmill.ledger.work import attempts
from chunkmill.monitor.servers import START_PROVIDER_WORKER, START_WORKER
from chunkmill.telemetry import tracing
from chunkmill.telemetry.progress import JobProgress

logger = logging.getLogger(__name__)

AWAY_SECONDS = 1.0
"""How long `wait` pauses between two looks while Postgres is away."""
HINDRANCE_SECONDS = 2.0
"""How often `wait` looks for what hinders the job. The look reads the job's open ChunkBatches."""
CANCEL_TRIES = 5
"""How often each transaction of a cancel is tried, for three seconds in all. A deadlock or a failover may end it."""


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
    ) -> Job:
        """Ask for vectors of ``chunks``, which is any iterable of :class:`Chunk`, ``(id, text)`` pairs,
        ``(id, text, metadata)`` triples or dicts.

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

        ``Job.new``, ``replaced``, ``unchanged`` and ``repeated`` say how the chunks met the collection.

        ``dimensions`` shortens the vectors of a model that was trained for it, and normalizes them again. ``precision``
        is ``float`` or ``int8``. Each value of either makes a space of its own. If ``precision`` is None it is
        ``EMBEDDING_PRECISION``. If ``dimensions`` is None it is ``EMBEDDING_DIMENSIONS`` for ``EMBEDDING_MODEL``, and
        the model's own number for another model.

        ``route`` is ``local``, ``openai`` (the Batch API, which costs half and takes up to 24 hours), ``openai-sync``
        (plain requests), or ``auto``, which chooses the cheapest route that serves the model's space, is not stopped
        and can meet the ``deadline``. The deadline is a datetime with a time zone, a timedelta, or a number of seconds
        from now. Work that has not begun when the deadline comes near may move to a more expensive route.
        :meth:`explain` says what was chosen, and why.

        Raises :class:`InvalidChunk`, :class:`UnknownModel`, :class:`UnknownRoute`, :class:`BudgetExceeded`,
        :class:`SpaceMismatch` and :class:`InvalidInput`. A Redis that is down is not an error: the poller rings when
        Redis is back.
        """
        require_name("collection", collection)
        route, priority = as_word(Route, route, "route"), as_word(Priority, priority, "priority")
        on_long = as_word(OnLong, on_long, "on_long")
        if not isinstance(on_invalid, str) or on_invalid not in ("raise", "skip"):
            raise InvalidInput("on_invalid must be 'raise' or 'skip'.")
        chunks = stoppable(as_items("chunks", chunks))
        if idempotency_key is not None:
            require_name("idempotency_key", idempotency_key)
        due = None if deadline is None else as_deadline(deadline, datetime.now(UTC))
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
        )
        with store_errors(self._db), tracing.root("chunkmill.enqueue", {}, kind="PRODUCER") as span:
            job = self.job(enqueue(self._db, self._settings, request, chunks, ring=self._ring, quote=quote))
            span.set({"space": job.space, "job": job.id, "chunks": job.chunks, "contents": job.contents})
            return job

    def job(self, job_id: int) -> Job:
        """The job as it is now. Raises :class:`NotFound`."""
        job_id = as_number("job_id", job_id)
        with self._transaction() as conn:
            return jobs.get(conn, job_id)

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

        ``progress`` shows a bar: in the cell of a notebook, on a terminal (stderr), or else as a line every 5 s. If
        Postgres goes away while this waits, it waits for Postgres too.

        ``on_progress`` is called with the job each time it was read. ``on_hindrance`` is called with a sentence if
        something hinders the job that waiting alone does not change: a ChunkBatch failed, no poller or no worker is
        connected, or Postgres is away. Without it the sentence is shown with the bar, or is a warning in the log.

        Raises :class:`JobFailed` if chunks are left without a vector, :class:`WaitTimeout` and :class:`NotFound`. A
        cancelled job is returned as it is.
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
            return (yield from self._looks(job_id, timeout, on_progress, on_hindrance))
        bar = JobProgress(job_id)

        def look(job: Job) -> object:
            bar.look(job)
            return on_progress(job) if on_progress else None  # which may be a coroutine

        try:
            return (yield from self._looks(job_id, timeout, look, on_hindrance or bar.note))
        finally:
            bar.close()

    def _looks(
        self,
        job_id: int,
        timeout: float | None,
        on_progress: Callable[[Job], object] | None,
        on_hindrance: Callable[[str], object] | None,
    ) -> Steps[Job]:
        say = on_hindrance or partial(logger.warning, "job %s: %s", job_id)
        is_known = is_away = False
        hindered, hindered_at = "", time.monotonic()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            asked = time.monotonic()
            try:
                job = self.job(job_id)
            except StoreUnavailable as error:
                looked = time.monotonic()
                if not is_known or (deadline is not None and looked >= deadline):
                    raise
                if not is_away:
                    is_away = True
                    yield Tell(say, f"{error} The job goes on when Postgres is back, and so does this wait.")
                left = math.inf if deadline is None else max(0.0, deadline - looked)
                yield Pause(min(left, AWAY_SECONDS))
                continue
            is_away, is_known = False, True
            looked = time.monotonic()
            if on_progress:
                yield Tell(on_progress, job)
            if job.state is JobState.FAILED:
                shown = "; ".join(f"{d.chunk_id!r}: {d.reason}" for d in job.dead_chunks[:3])
                raise JobFailed(f"job {job_id} failed: {job.error} {shown}".rstrip(), job_id=job_id)
            if job.state.is_final:
                return job
            if deadline is not None and looked >= deadline:
                advice = self._hindrance(job) or "Check with `chunkmill status` that a worker and a poller run."
                raise WaitTimeout(
                    f"job {job_id} is {job.state} after {timeout:g} s with {job.remaining:,} of {job.contents:,} "
                    f"contents to go. It goes on, so you may wait again. {advice}"
                )
            if looked >= hindered_at:
                before = hindered
                with contextlib.suppress(StoreUnavailable):  # the next look says so
                    hindered = self._hindrance(job)
                if hindered and hindered != before:
                    yield Tell(say, hindered)
                looked = time.monotonic()
                hindered_at = looked + max(HINDRANCE_SECONDS, 10 * (looked - asked))
            # Reading a job of a million ChunkBatches takes a while. Never spend more than a tenth of the time on it.
            pause = max(0.1, 10 * (looked - asked))
            yield Pause(pause if deadline is None else min(pause, max(0.0, deadline - looked)))

    def _hindrance(self, job: Job) -> str:
        """What keeps a job from its end and does not pass by waiting, in a sentence or two; empty if nothing does."""
        with self._transaction() as conn:
            failing = attempts.first_failing(conn, job.id)
            connected = connections(conn)
        said = []
        if failing is not None:
            tries = f"attempt {failing.attempt} of {failing.max_attempts}"
            said.append(f"ChunkBatch {failing.id} is {failing.state} after {tries}: {failing.error}")
        if not connected.pollers:
            said.append("No poller is connected, so doorbells beyond the first few are not rung: chunkmill poller")
        serving = 0 if job.route is Route.LOCAL else connected.provider_workers
        serving += 0 if job.route.is_paid else connected.workers
        if not serving:
            start = START_PROVIDER_WORKER if job.route.is_paid else START_WORKER
            said.append(f"No worker is connected, so nothing is embedded: {start}")
        return ". ".join(sentence.rstrip(".") for sentence in said)

    def cancel(self, job_id: int) -> Job:
        """Cancel a job: no ChunkBatch of it starts any more, and workers leave those they hold. Written vectors stay.

        The job stops at once. Its ChunkBatches follow, which takes seconds for a large job; a poller completes this if
        the process dies.
        """
        job_id = as_number("job_id", job_id)
        with store_errors(self._db):
            with self._db.begin() as conn:
                jobs.get(conn, job_id)
            transact(self._db, lambda conn: cancel.cancel_if_open(conn, job_id), what="cancel", tries=CANCEL_TRIES)
            while transact(self._db, lambda conn: cancel.cancel_some(conn, job_id), what="cancel", tries=CANCEL_TRIES):
                pass
        return self.job(job_id)

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
        return self.job(job_id)

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
