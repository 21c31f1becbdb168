"""Jobs: enqueue, follow, stop, try again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Literal

from chunkmill.client.base import Connected, store_errors
from chunkmill.client.enqueue import EnqueueRequest, enqueue
from chunkmill.db.retry import transact
from chunkmill.domain.arguments import as_deadline, as_word, require_name
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.results import Attempt, FailingChunkBatch, Job
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.errors import InvalidInput, JobFailed, WaitTimeout
from chunkmill.ledger.jobs import cancel, jobs, routing
from chunkmill.ledger.money import budget
from chunkmill.ledger.work import attempts
from chunkmill.telemetry import tracing

CANCEL_TRIES = 5
"""Of each of its transactions, which a deadlock or a failover may end; three seconds in all."""


class Jobs(Connected):
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
        """Ask for vectors of ``chunks``: any iterable of :class:`Chunk`, ``(id, text)`` pairs or dicts.

        Memory stays constant whatever the iterable's length. A chunk id that is in the collection already
        is replaced when its text or metadata differ, and left alone when they do not. Contents that have a
        vector in the model's space are not embedded again.

        ``on_invalid="raise"`` checks the whole iterable first and raises :class:`InvalidChunk` at the first
        bad chunk, with nothing written. ``"skip"`` commits window by window, so that workers start at once,
        and puts bad chunks into the job's dead list. ``idempotency_key``: a second enqueue under the same key
        returns the first one's job, and finishes it if its producer died half-way.

        ``dimensions`` cuts the vectors of a model that was trained for it and brings them back to length 1;
        ``precision`` is ``float`` or ``int8``. Both make a space of their own. None: ``EMBEDDING_PRECISION``, and of
        ``EMBEDDING_MODEL`` ``EMBEDDING_DIMENSIONS``, of another model what it gives.

        ``route``: ``local`` workers, ``openai`` (the Batch API: half price, up to 24 h), ``openai-sync`` (plain
        requests), or ``auto``: the cheapest lane that serves the model's space, is not stopped, and can keep the
        ``deadline``. That is a datetime with a time zone, a timedelta, or seconds from now; what has not begun when
        it comes near may move to a dearer lane. :meth:`explain` says what was chosen, and why.

        Raises :class:`InvalidChunk`, :class:`UnknownModel`, :class:`UnknownRoute`, :class:`BudgetExceeded`,
        :class:`SpaceMismatch` and :class:`InvalidInput`. A Redis that is down is no error: the poller rings when it
        is back.
        """
        require_name("collection", collection)
        route, priority = as_word(Route, route, "route"), as_word(Priority, priority, "priority")
        on_long = as_word(OnLong, on_long, "on_long")
        if on_invalid not in ("raise", "skip"):
            raise InvalidInput(f"on_invalid is {on_invalid!r}; it must be 'raise' or 'skip'.")
        if idempotency_key is not None:
            require_name("idempotency_key", idempotency_key)
        due = None if deadline is None else as_deadline(deadline, datetime.now(UTC))
        space = self._space(model, on_long, dimensions=dimensions, precision=precision)
        with self._transaction() as conn:
            choice = routing.decide(conn, self._settings, space.spec, route, due)
            again = idempotency_key is not None and jobs.is_key_used(conn, idempotency_key)
            if choice.route.is_paid and not again:
                budget.require_budget(conn, self._settings)
        request = EnqueueRequest(
            collection,
            space,
            route,
            choice,
            due,
            priority,
            on_long,
            idempotency_key,
            skip_invalid=on_invalid == "skip",
        )
        with store_errors(self._db), tracing.root("chunkmill.enqueue", {"space": space.id}, kind="PRODUCER") as span:
            job = self.job(enqueue(self._db, self._settings, request, chunks, ring=self._ring))
            span.set({"job": job.id, "chunks": job.chunks, "contents": job.contents})
            return job

    def job(self, job_id: int) -> Job:
        """The job as it is now. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            return jobs.get(conn, job_id)

    def jobs(self, limit: int = 20) -> list[Job]:
        """The latest jobs, newest first."""
        with self._transaction() as conn:
            return jobs.latest(conn, limit)

    def dead_chunks(self, job_id: int, limit: int = 1000) -> list[DeadChunk]:
        """The first ``limit`` chunks of a job that got no vector, each with its reason. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            jobs.get(conn, job_id)
            return list(jobs.dead_chunks(conn, job_id, limit=limit))

    def wait(
        self, job_id: int, *, timeout: float | None = None, on_progress: Callable[[Job], None] | None = None
    ) -> Job:
        """Wait until a job has ended and return it; ``timeout`` in seconds, None for ever.

        ``on_progress`` gets the job after every look. Raises :class:`JobFailed` when chunks are left without a
        vector, :class:`WaitTimeout`, :class:`NotFound`. A cancelled job is returned as it is.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            asked = time.monotonic()
            job = self.job(job_id)
            looked = time.monotonic()
            if on_progress:
                on_progress(job)
            if job.state is JobState.FAILED:
                shown = "; ".join(f"{d.chunk_id!r}: {d.reason}" for d in job.dead_chunks[:3])
                raise JobFailed(f"job {job_id} failed: {job.error} {shown}".rstrip(), job_id=job_id)
            if job.state.is_final:
                return job
            if deadline is not None and looked >= deadline:
                raise WaitTimeout(
                    f"job {job_id} is {job.state} after {timeout:g} s with {job.remaining:,} of {job.contents:,} "
                    "contents to go. It goes on; wait again, or see that a worker and a poller run: "
                    "chunkmill status."
                )
            # A look at a job of a million ChunkBatches takes its time; never spend more than a tenth on looking.
            pause = max(0.1, 10 * (looked - asked))
            time.sleep(pause if deadline is None else min(pause, max(0.0, deadline - looked)))

    def cancel(self, job_id: int) -> Job:
        """Stop a job: nothing of it starts any more, and workers leave what they are in. Vectors written stay.

        A large job takes seconds, but stops in the first moment; a poller does the rest if this process dies.
        """
        with store_errors(self._db):
            with self._db.begin() as conn:
                jobs.get(conn, job_id)
            transact(self._db, lambda conn: cancel.cancel_if_open(conn, job_id), what="cancel", tries=CANCEL_TRIES)
            while transact(self._db, lambda conn: cancel.cancel_some(conn, job_id), what="cancel", tries=CANCEL_TRIES):
                pass
        return self.job(job_id)

    def retry(self, job_id: int) -> Job:
        """Try again what a failed or cancelled job left without a vector. Another job is returned as it is."""
        with self._transaction() as conn:
            job = jobs.get(conn, job_id)
            again = jobs.retry_if_ended(conn, job_id, max_attempts=self._settings.max_attempts)
            if not again and job.state in (JobState.FAILED, JobState.CANCELLED):
                raise InvalidInput(
                    f"job {job_id} was never enqueued to its end, so it cannot be retried. Enqueue again: what is "
                    "embedded is not embedded twice."
                )
        if again:
            self._take_up([job_id])
        return self.job(job_id)

    def attempts(self, job_id: int) -> list[Attempt]:
        """All attempts at a job's ChunkBatches, the oldest first: who, how it ended, what it cost. Raises
        :class:`NotFound`.

        Of a worker that died: what was seen of its death, and how many contents it could have cost (``at_risk``).
        """
        with self._transaction() as conn:
            jobs.get(conn, job_id)
            return attempts.of_job(conn, job_id)

    def failing(self, job_id: int) -> FailingChunkBatch | None:
        """The first ChunkBatch of a job that was discarded or, without one, that failed and is tried again."""
        with self._transaction() as conn:
            return attempts.first_failing(conn, job_id)
