"""The producer's API. Everything here begins its own transactions; nothing here imports torch."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from types import TracebackType
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from app.broker import PUBLISH_ERRORS, Broker
from app.db import spaces
from app.db.connect import create_db, migrate, require_at_least, require_migrated, store_error
from app.db.retry import transact
from app.domain.arguments import as_deadline, as_word, require_name
from app.domain.chunks import prepare_all, prepare_or_skip
from app.domain.costs import Costs, CostsBy, Estimate
from app.domain.doorbells import SMALLEST_WINDOW
from app.domain.jobs import (
    Attempt,
    Audit,
    DeadDetails,
    DeadEntry,
    DroppedDead,
    FailingChunkBatch,
    Job,
    RetriedDead,
    SearchHit,
)
from app.domain.planning import DeadChunk
from app.domain.providers import OPENAI
from app.domain.retention import CacheSpace, OnProgress, Pruned, as_age
from app.domain.spaces import OnLong, Precision, SpaceSpec
from app.domain.states import JobState, Priority, Route
from app.enqueueing import MAX_BATCH_BYTES, Enqueueing, EnqueueRequest
from app.environment import Environment
from app.errors import (
    EngineError,
    InvalidInput,
    JobFailed,
    StoreUnavailable,
    WaitTimeout,
)
from app.estimating import EstimateRequest, Estimating
from app.ledger import (
    attempts,
    budget,
    cancel,
    charges,
    dead_chunks,
    dead_retry,
    embed_requests,
    explain,
    jobs,
    provider_lanes,
    routing,
)
from app.ledger.dead_chunks import Which
from app.ledger.doorbells import ring_due
from app.ledger.explain import Explanation
from app.ledger.finish import finish_if_done
from app.ledger.provider_lanes import Lane
from app.ledger.prune import prune_jobs
from app.models.asked import asked_spec
from app.settings import Settings
from app.telemetry import tracing
from app.vectors import audit as auditing
from app.vectors import read
from app.vectors import search as searching
from app.vectors.delete import delete_some
from app.vectors.prune import AGES_SINCE, cache_spaces, drop_unreferenced, find_space

logger = logging.getLogger(__name__)

DELETE_STEP = 5_000
"""Chunks deleted in one transaction, which holds up enqueues while it runs."""
EMBED_STEP = 256
"""Texts of one embed request: bounds the row, and how long a worker holds it."""
CANCEL_TRIES = 5
"""Of each of its transactions, which a deadlock or a failover may end; three seconds in all."""
QUIET_SECONDS = 10.0
"""After a doorbell that failed, ring no more for so long: each try may take seconds to fail."""


class Client:
    """Enqueue chunks, follow jobs, search. Thread-safe; make one per process.

    Errors are those of ``app.errors``; a wrong argument is refused before anything is written.
    """

    def __init__(self, db: sa.Engine, broker: Broker, settings: Settings) -> None:
        self._db = db
        self._broker = broker
        self._settings = settings
        self._quiet_until = 0.0

    @classmethod
    def from_env(cls) -> Client:
        """A client for ``DATABASE_URL`` and ``REDIS_URL``; both unset, for the embedded stack, started if down.

        Raises :class:`InvalidSetting` for a wrong setting and :class:`StoreUnavailable` when Postgres cannot be
        reached or needs ``chunkmill migrate``. The embedded database is migrated here.
        """
        environment = Environment.load(start_embedded=True)
        settings = environment.settings
        tracing.configure("chunkmill-client")
        if environment.is_embedded:
            migrate(settings.require_database_url())
        db = create_db(settings.require_database_url(), role="client")
        try:
            require_migrated(db)
        except BaseException:
            db.dispose()
            raise
        return cls(db, Broker.connect(settings), settings)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The embedded stack stays up for the next caller: ``chunkmill down`` stops it."""
        self._db.dispose()
        self._broker.close()

    # Jobs

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
        with _store_errors(self._db), tracing.root("chunkmill.enqueue", {"space": space.id}, kind="PRODUCER") as span:
            job = self.job(Enqueueing(self._db, self._settings, request, ring=self._ring).run(chunks))
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
        with _store_errors(self._db):
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

    # Money and lanes

    def estimate(
        self,
        chunks: Iterable[object],
        *,
        model: str | None = None,
        route: Route | str = Route.AUTO,
        collection: str | None = None,
        on_long: OnLong | str = OnLong.TRUNCATE,
        on_invalid: Literal["raise", "skip"] = "raise",
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        deadline: datetime | timedelta | float | None = None,
    ) -> Estimate:
        """What :meth:`enqueue` with the same arguments would send, and cost on each lane. Nothing is written.

        Memory stays constant; a temporary table in Postgres holds the hash of each distinct text while this runs.
        Tokens are counted with the lane's own tokenizer, on this machine. Raises what :meth:`enqueue` does, but for
        :class:`BudgetExceeded`: the budget is in the answer.
        """
        on_long, route = as_word(OnLong, on_long, "on_long"), as_word(Route, route, "route")
        if collection is not None:
            require_name("collection", collection)
        if on_invalid not in ("raise", "skip"):
            raise InvalidInput(f"on_invalid is {on_invalid!r}; it must be 'raise' or 'skip'.")
        due = None if deadline is None else as_deadline(deadline, datetime.now(UTC))
        spec = self._spec(model, on_long, dimensions=dimensions, precision=precision)
        request = EstimateRequest(spec, route, due, on_long, collection)
        prepared = prepare_all(chunks) if on_invalid == "raise" else prepare_or_skip(chunks)
        with _store_errors(self._db):
            return Estimating(self._db, self._settings, request).run(prepared)

    def usage(self, by: CostsBy | str = CostsBy.MONTH, *, since: date | None = None) -> Costs:
        """What was embedded and what it cost, by day, month, model, route or job, since a day of UTC.

        Paid routes as the provider counted; the local one beside them by its engine's time and GPU_HOUR_USD.
        """
        by = as_word(CostsBy, by, "by")
        if since is not None and (isinstance(since, datetime) or not isinstance(since, date)):
            raise InvalidInput(f"since is {since!r}; it must be a date.")
        settings = self._settings
        with self._transaction() as conn:
            rows = charges.report(conn, by, since=since, gpu_hour_usd=settings.gpu_hour_usd)
            return Costs(by, since, rows, budget.read(conn, settings))

    def explain(self, job_id: int) -> Explanation:
        """Why a job is embedded where it is, and what it waits for. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            return explain.explain(conn, job_id)

    def lanes(self) -> list[Lane]:
        """The paid lanes: running, paused, stopped or held, and why."""
        with self._transaction() as conn:
            return provider_lanes.lanes(conn)

    def resume_lane(self, route: Route | str) -> bool:
        """Let a paid lane that was stopped or paused take work again. False: it was neither."""
        route = as_word(Route, route, "route")
        if not route.is_paid:
            raise InvalidInput(f"route is {route.value!r}; the lanes that can stop are openai and openai-sync.")
        with self._transaction() as conn:
            return provider_lanes.resume(conn, route)

    # The dead list

    def dead(
        self,
        job_id: int | None = None,
        collection: str | None = None,
        code: str | None = None,
        limit: int = 1000,
    ) -> list[DeadEntry]:
        """The newest ``limit`` entries of the dead list: of a job, of a collection, with a code, or all.

        Raises :class:`NotFound` for a job or a collection that does not exist.
        """
        with self._transaction() as conn:
            return dead_chunks.entries(conn, self._listed(conn, job_id, collection, code), limit=limit)

    def dead_codes(
        self, job_id: int | None = None, collection: str | None = None, code: str | None = None
    ) -> dict[str, int]:
        """``code → entries`` of the dead list, the most frequent first. The arguments are those of :meth:`dead`."""
        with self._transaction() as conn:
            return dead_chunks.count_codes(conn, self._listed(conn, job_id, collection, code))

    def dead_chunk(self, dead_id: int, *, with_text: bool = False) -> DeadDetails:
        """All that is known of one entry of the dead list, its text only if asked for. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            return dead_chunks.details(conn, dead_id, with_text=with_text)

    def retry_dead(
        self, ids: Iterable[int] | None = None, *, job_id: int | None = None, code: str | None = None
    ) -> RetriedDead:
        """Have the texts of dead chunks embedded after all, each in its job: those of ``ids``, or all of a job, with a
        code, or both.

        What killed workers stays a suspect, which workers embed alone. A chunk refused at the door or as too long, one
        that was replaced or deleted since, and one whose job was cancelled cannot be retried: named in ``ids`` it
        raises :class:`InvalidInput`, found by job or code it is passed over, and raises only where nothing else is
        found. Raises :class:`NotFound` for an id that is not on the list. Nothing is changed by a call that raises.
        """
        which = self._meant(ids, job_id, code)
        with self._transaction() as conn:
            retried = dead_retry.retry(
                conn,
                which,
                max_contents=self._settings.chunk_batch_size,
                max_bytes=MAX_BATCH_BYTES,
                max_attempts=self._settings.max_attempts,
            )
        self._take_up(retried.jobs)
        return retried

    def drop_dead(
        self, ids: Iterable[int] | None = None, *, job_id: int | None = None, code: str | None = None
    ) -> DroppedDead:
        """Take chunks off the dead list and out of their collections: those of ``ids``, or all of a job, with a code,
        or both. A job that failed for nothing else completes.

        A chunk that carries another text since, or whose text has a vector since, stays where it is; only its entry
        goes. A text that no chunk refers to any more is deleted. Raises :class:`NotFound` for an id that is not on the
        list; nothing is changed then.
        """
        which = self._meant(ids, job_id, code)
        with self._transaction() as conn:
            dropped, leaving = dead_retry.take_off(conn, which)
            for collection, chunk_ids in leaving.items():
                collection_id, _ = jobs.find_collection(conn, collection)
                delete_some(conn, collection_id=collection_id, chunk_ids=chunk_ids, limit=len(chunk_ids))
        self._take_up(dropped.jobs)
        return dropped

    # Vectors

    def search(
        self,
        query: str | NDArray[np.float32],
        *,
        collection: str,
        k: int = 10,
        metadata: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
    ) -> list[SearchHit]:
        """The ``k`` chunks nearest to ``query`` by cosine, best first.

        ``query`` is a text, which a worker embeds with the space's query prompt, or a ``(d,)`` vector.
        ``metadata`` keeps chunks that contain it (jsonb containment). ``exact`` passes over an HNSW index.
        Raises :class:`NotFound`, :class:`InvalidInput`, and :class:`WaitTimeout` when no worker answers within
        ``timeout`` seconds.
        """
        if k < 1:
            raise InvalidInput(f"k is {k}; it must be at least 1.")
        with self._transaction() as conn:
            collection_id, space_id = jobs.find_collection(conn, collection)
            space = spaces.get(conn, space_id)
        if isinstance(query, str):
            vector = self._ask(space, [query], "query", timeout)[0]
        else:
            vector = np.asarray(query, dtype=np.float32)
        if vector.shape != (space.spec.dimensions,) or not np.isfinite(vector).all():
            raise InvalidInput(
                f"the query vector has shape {vector.shape}; collection {collection!r} takes a finite vector of shape "
                f"({space.spec.dimensions},)."
            )
        with self._transaction() as conn:
            return searching.search(
                conn, space, vector, collection_id=collection_id, k=k, metadata=metadata, exact=exact
            )

    def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> NDArray[np.float32]:
        """``(n, d)`` float32 vectors of ``texts`` in input order, made by a worker now and stored nowhere.

        ``dimensions`` and ``precision`` are those of :meth:`enqueue`.
        Raises :class:`InvalidChunk` for a text that is not valid, :class:`EngineError` when a worker cannot embed
        it, and :class:`WaitTimeout`.
        """
        if kind not in ("document", "query"):
            raise InvalidInput(f"kind is {kind!r}; it must be 'document' or 'query'.")
        if isinstance(texts, str):
            raise InvalidInput("texts is a str; give a list of texts.")
        for _ in prepare_all(((f"texts[{i}]", text) for i, text in enumerate(texts))):
            pass
        space = self._space(model, OnLong.TRUNCATE, dimensions=dimensions, precision=precision)
        if not texts:
            return np.empty((0, space.spec.dimensions), dtype=np.float32)
        deadline = time.monotonic() + timeout
        parts = [
            self._ask(space, texts[i : i + EMBED_STEP], kind, deadline - time.monotonic())
            for i in range(0, len(texts), EMBED_STEP)
        ]
        return np.concatenate(parts)

    def vectors(self, collection: str, ids: Sequence[str] | None = None) -> dict[str, NDArray[np.float32]]:
        """``chunk id → (d,) float32`` for ``ids``, or for the whole collection; chunks without one are left out."""
        with self._transaction() as conn:
            collection_id, space_id = jobs.find_collection(conn, collection)
            return read.read_vectors(conn, spaces.get(conn, space_id), collection_id=collection_id, chunk_ids=ids)

    def delete(self, collection: str, ids: Sequence[str] | None = None) -> int:
        """Delete chunks by id, or all of the collection; returns how many.

        A text that no chunk refers to any more is deleted with its vectors.
        """
        if isinstance(ids, str):
            raise InvalidInput("ids is a str; give a list of chunk ids.")
        with self._transaction() as conn:
            collection_id, _ = jobs.find_collection(conn, collection)
        deleted = 0
        for step in itertools.count():
            part = None if ids is None else ids[step * DELETE_STEP : (step + 1) * DELETE_STEP]
            if part is not None and not len(part):
                break
            with self._transaction() as conn:
                gone = delete_some(conn, collection_id=collection_id, chunk_ids=part, limit=DELETE_STEP)
            deleted += gone
            if part is None and gone == 0:
                break
        return deleted

    def audit(self, collection: str) -> Audit:
        """Anti-join a collection's chunks with its space's vectors. ``audit.complete`` says all are there."""
        with self._transaction() as conn:
            collection_id, space_id = jobs.find_collection(conn, collection)
            return auditing.audit(conn, spaces.get(conn, space_id), name=collection, collection_id=collection_id)

    # Retention

    def prune(
        self,
        older_than: timedelta | float = 30,
        *,
        dry_run: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Pruned:
        """Drop jobs that ended more than ``older_than`` (days) ago, and vectors and texts stored before that which no
        collection refers to. Safe while everything runs.

        With a job go its ChunkBatches, attempts, usage, dead list and idempotency key; charges stay, for they are the
        bill. A failed or cancelled job stays while a chunk of it has no vector. ``dry_run`` only counts.
        """
        before = self._before("older_than", older_than)
        with _store_errors(self._db):
            jobs_gone, kept = prune_jobs(self._db, before=before, dry_run=dry_run, on_progress=on_progress)
            gone = drop_unreferenced(self._db, before=before, dry_run=dry_run, on_progress=on_progress)
        return Pruned(dry_run, before, jobs_gone | gone, kept)

    def cache(self, *, recent: timedelta | float = 7) -> list[CacheSpace]:
        """Each space's vectors, their size, and how often enqueues found what they needed; also in the last ``recent``
        days."""
        days = as_age("recent", recent) / timedelta(days=1)
        with self._transaction() as conn:
            require_at_least(conn, AGES_SINCE)
            return cache_spaces(conn, recent_days=days)

    def evict(
        self,
        *,
        older_than: timedelta | float | None = None,
        max_bytes: int | None = None,
        space: str | None = None,
        dry_run: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Pruned:
        """Drop vectors that no collection refers to, and their texts, the oldest first: those stored more than
        ``older_than`` (days) ago, or as many as it takes to leave ``max_bytes`` of them. Safe while everything runs.

        ``space`` is the beginning of a fingerprint; None: all. Raises :class:`InvalidInput`, :class:`NotFound`.
        """
        if (older_than is None) == (max_bytes is None):
            raise InvalidInput("say what to evict: either older_than or max_bytes.")
        if max_bytes is not None and max_bytes < 0:
            raise InvalidInput(f"max_bytes is {max_bytes}; it must not be negative.")
        before = None if older_than is None else self._before("older_than", older_than)
        with self._transaction() as conn:
            require_at_least(conn, AGES_SINCE)
            chosen = None if space is None else find_space(conn, space)
        with _store_errors(self._db):
            gone = drop_unreferenced(
                self._db, space=chosen, before=before, max_bytes=max_bytes, dry_run=dry_run, on_progress=on_progress
            )
        return Pruned(dry_run, before, gone)

    def collections(self) -> list[str]:
        """The names of all collections, in order."""
        with self._transaction() as conn:
            return jobs.collection_names(conn)

    def index(self, collection: str, *, halfvec: bool = False) -> searching.Index:
        """Build an HNSW index over the collection's space, without blocking writers; best after a bulk load.

        Collections in one space share it. ``halfvec`` indexes half precision, at half the size; past 2,000
        dimensions it is always so.
        """
        with self._transaction() as conn:
            _, space_id = jobs.find_collection(conn, collection)
            space = spaces.get(conn, space_id)
        return searching.build_index(self._db, space, halfvec=halfvec)

    # Inside

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with _store_errors(self._db), self._db.begin() as conn:
            yield conn

    def _before(self, argument: str, age: timedelta | float) -> datetime:
        """So long ago by Postgres' clock, once its schema is known to have what a prune needs."""
        asked = as_age(argument, age)
        with self._transaction() as conn:
            require_at_least(conn, AGES_SINCE)
            now: datetime = conn.execute(sa.text("SELECT now()")).scalar_one()
        try:
            return now - asked
        except OverflowError:
            raise InvalidInput(f"{argument} is {asked}, which is before the calendar begins.") from None

    def _space(
        self,
        model: str | None,
        on_long: OnLong,
        *,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> spaces.Space:
        """The space that is meant, registered."""
        spec = self._spec(model, on_long, dimensions=dimensions, precision=precision)
        with self._transaction() as conn:
            return spaces.register(conn, spec, storage=self._settings.vector_storage)

    def _spec(
        self, model: str | None, on_long: OnLong, *, dimensions: int | None, precision: Precision | str | None
    ) -> SpaceSpec:
        def registered() -> list[SpaceSpec]:
            with self._transaction() as conn:
                return [space.spec for space in spaces.all_spaces(conn)]

        return asked_spec(
            self._settings, model, on_long=on_long, dimensions=dimensions, precision=precision, registered=registered
        )

    def _take_up(self, job_ids: Iterable[int]) -> None:
        """End the jobs among these that have nothing left to do, and ring for the others."""
        for job_id in job_ids:
            with self._transaction() as conn:
                finish_if_done(conn, job_id, spaces.get(conn, jobs.space_id(conn, job_id)))
        with _store_errors(self._db), self._db.connect() as conn:
            self._ring(conn)

    @staticmethod
    def _listed(conn: sa.Connection, job_id: int | None, collection: str | None, code: str | None) -> Which:
        if job_id is not None:
            jobs.get(conn, job_id)
        if collection is not None:
            jobs.find_collection(conn, collection)
        return Which(job_id=job_id, collection=collection, code=code)

    @staticmethod
    def _meant(ids: Iterable[int] | None, job_id: int | None, code: str | None) -> Which:
        if (ids is None) == (job_id is None and code is None):
            raise InvalidInput("say which dead chunks: either ids, or job_id or code or both.")
        if ids is None:
            return Which(job_id=job_id, code=code)
        chosen = tuple(ids)
        if not all(isinstance(each, int) for each in chosen):
            raise InvalidInput("ids must be whole numbers, as `dead` and `chunkmill dead list` give them.")
        return Which(ids=chosen)

    def _ring(self, conn: sa.Connection) -> None:
        if time.monotonic() < self._quiet_until:
            return
        try:
            with tracing.span("ring") as span, conn.begin():
                rung = ring_due(
                    conn,
                    self._broker,
                    queued=self._broker.queued_doorbells(),
                    window=min(SMALLEST_WINDOW, self._settings.doorbell_window),  # the rest is the poller's
                    repair_seconds=self._settings.doorbell_repair_seconds,
                )
                span.set({"doorbells": rung})
        except PUBLISH_ERRORS as error:
            logger.warning("cannot ring (%s: %s); the poller will ring when Redis is back", type(error).__name__, error)
            self._quiet_until = time.monotonic() + QUIET_SECONDS

    def _ask(self, space: spaces.Space, texts: Sequence[str], kind: str, timeout: float) -> NDArray[np.float32]:
        with self._transaction() as conn:
            request = embed_requests.ask(conn, space_id=space.id, kind=kind, texts=texts)
        deadline = time.monotonic() + timeout
        pause = 0.002
        while True:
            with self._transaction() as conn:
                answer = embed_requests.take_answer(conn, request, dimensions=space.spec.dimensions)
                if answer is None and time.monotonic() >= deadline:
                    embed_requests.withdraw(conn, request)
            if answer is not None:
                if answer.vectors is None:
                    raise EngineError(f"the worker could not embed: {answer.error}")
                return answer.vectors
            if time.monotonic() >= deadline:
                queue = "openai" if space.spec.provider == OPENAI else "gpu"
                raise WaitTimeout(f"no worker answered in time. Start one: celery -A workers worker -Q {queue}")
            time.sleep(pause)
            pause = min(0.05, pause * 1.5)


@contextlib.contextmanager
def _store_errors(db: sa.Engine) -> Iterator[None]:
    """Say in our own words that Postgres went away."""
    try:
        yield
    except sa.exc.OperationalError as error:
        raise store_error(str(db.url), error) from error
    except sa.exc.TimeoutError as error:
        raise StoreUnavailable("all connections of this client are in use; make one client per few threads.") from error
