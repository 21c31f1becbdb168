"""The methods of ``AsyncClient``. `make docs` writes this file from those of ``Client``."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from datetime import date, datetime, timedelta
from decimal import Decimal
from os import PathLike
from typing import Any, Literal, overload

from chunkmill.client.aio.running import RunningCalls
from chunkmill.domain.bridges import Bridge, BridgeQuote
from chunkmill.domain.collections import CollectionInfo, DroppedCollection, OnDropped
from chunkmill.domain.comparing import Comparison, ComparisonQuote
from chunkmill.domain.costs import Adjustment, AdjustmentKind, Correction, Costs, CostsBy, Estimate, Spent
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.gates import Gates
from chunkmill.domain.golden import MAX_JUDGED
from chunkmill.domain.lanes import Lane
from chunkmill.domain.maps import CollectionMap, MapMethod
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.reembedding import KEEP_DAYS, RAMP, STEP_HOURS, Quote, Reembedding
from chunkmill.domain.results import (
    Abandoned,
    Attempt,
    Audit,
    DeadDetails,
    DeadEntry,
    DroppedDead,
    Explanation,
    FailingChunkBatch,
    Hits,
    Index,
    Job,
    Keywords,
    Outdated,
    RetriedDead,
    SearchCounts,
    SearchTuning,
)
from chunkmill.domain.retention import CacheSpace, Pruned, QueryCache
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Priority, Route
from chunkmill.domain.stored import Exported, StoredChunk
from chunkmill.system.numbers import NDArray, np


class AsyncVerbs(RunningCalls):
    """Every public method of ``Client``, with its arguments."""

    async def enqueue(
        self,
        chunks: Iterable[object] | AsyncIterable[object],
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
        return await self._long(
            self._client.enqueue,
            chunks,
            collection=collection,
            model=model,
            route=route,
            priority=priority,
            idempotency_key=idempotency_key,
            on_long=on_long,
            on_invalid=on_invalid,
            dimensions=dimensions,
            precision=precision,
            deadline=deadline,
            replace=replace,
            allow_empty=allow_empty,
            max_refused=max_refused,
            within=within,
        )

    async def job(self, job_id: int) -> Job:
        """The job as it is now, with what hinders it. Raises :class:`NotFound`."""
        return await self._short(self._client.job, job_id)

    async def jobs(self, limit: int = 20) -> list[Job]:
        """The latest jobs, newest first."""
        return await self._short(self._client.jobs, limit)

    async def dead_chunks(self, job_id: int, limit: int = 1000) -> list[DeadChunk]:
        """The first ``limit`` chunks of a job that got no vector, with the reasons. Raises :class:`NotFound`."""
        return await self._short(self._client.dead_chunks, job_id, limit)

    async def wait(
        self,
        job_id: int,
        *,
        timeout: float | None = None,
        on_progress: Callable[[Job], Awaitable[None] | None] | None = None,
        on_hindrance: Callable[[str], Awaitable[None] | None] | None = None,
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
        return await self._wait(
            self._client._wait_steps(
                job_id, timeout=timeout, on_progress=on_progress, on_hindrance=on_hindrance, progress=progress
            )
        )

    async def end_of(self, job_id: int) -> Future[Job]:
        """A future of the job's end, for a program that does not wait: ``end_of(id).add_done_callback(function)``.

        Its result is the job as it ended: completed, failed or cancelled. Callbacks run one after the other, in a
        thread of the client, so a long one should hand its work over. The future lives as long as this process: after a
        restart, ask for it anew. It raises :class:`ClientClosed` if the client is closed before, :class:`NotFound` if
        the job was deleted, and :class:`StoreUnavailable` after Postgres was away for a minute. ``cancel()`` of the
        future only forgets it. With asyncio, ``asyncio.create_task(client.wait(job_id))`` does the same.
        """
        return await self._short(self._client.end_of, job_id)

    async def cancel(self, job_id: int) -> Job:
        """Cancel a job: no ChunkBatch of it starts any more, and workers leave those they hold. Written vectors stay.

        The job stops at once. Its ChunkBatches follow, which takes seconds for a large job; a poller completes this if
        the process dies.
        """
        return await self._long(self._client.cancel, job_id)

    async def retry(self, job_id: int) -> Job:
        """Embed what a failed or cancelled job left without a vector. Any other job is returned as it is."""
        return await self._long(self._client.retry, job_id)

    async def attempts(self, job_id: int) -> list[Attempt]:
        """All attempts at a job's ChunkBatches, the oldest first: which worker, how it ended, what it cost.

        For a worker that died it also says what was seen of the death, and how many contents it could have cost
        (``at_risk``). Raises :class:`NotFound`.
        """
        return await self._short(self._client.attempts, job_id)

    async def failing(self, job_id: int) -> FailingChunkBatch | None:
        """The first ChunkBatch of a job that was discarded; without one, the first that failed and is tried again."""
        return await self._short(self._client.failing, job_id)

    async def estimate(
        self,
        chunks: Iterable[object] | AsyncIterable[object],
        *,
        model: str | None = None,
        route: Route | str = Route.AUTO,
        collection: str | None = None,
        on_long: OnLong | str = OnLong.TRUNCATE,
        on_invalid: Literal["raise", "skip"] = "raise",
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        deadline: datetime | timedelta | float | None = None,
        replace: bool | Mapping[str, Any] = False,
    ) -> Estimate:
        """What :meth:`enqueue` with the same arguments would send, and what it would cost on each route.

        Nothing is written. Memory stays constant; a temporary table in Postgres holds the hash of each distinct text
        while this runs. Tokens are counted on this machine, with the tokenizer of each route. With ``replace``, which
        needs a ``collection``, ``Estimate.deleted`` says how many chunks an enqueue would delete. Raises what
        :meth:`enqueue` raises except :class:`BudgetExceeded`, because the answer contains the budget.
        """
        return await self._long(
            self._client.estimate,
            chunks,
            model=model,
            route=route,
            collection=collection,
            on_long=on_long,
            on_invalid=on_invalid,
            dimensions=dimensions,
            precision=precision,
            deadline=deadline,
            replace=replace,
        )

    async def usage(self, by: CostsBy | str = CostsBy.MONTH, *, since: date | None = None) -> Costs:
        """What was embedded and what it cost, by day, month, model, route or job, since a day in UTC.

        The provider counted what the paid routes cost, except for what was lost, may have been charged, or was
        corrected; each row says how much that is. What the local route costs is its engine's time multiplied by
        GPU_HOUR_USD.
        """
        return await self._short(self._client.usage, by, since=since)

    async def adjustments(
        self, kind: AdjustmentKind | str | None = None, *, since: date | None = None, limit: int = 100
    ) -> list[Adjustment]:
        """The parts of the bill that no answer confirmed, with their reasons: the latest ``limit``, newest first.

        ``kind`` selects those that were ``lost``, that were ``maybe_charged``, or that are a ``correction``, which
        :meth:`correct_charge` booked. None means all.
        """
        return await self._short(self._client.adjustments, kind, since=since, limit=limit)

    async def correct_charge(
        self,
        usd: Decimal | int | str,
        *,
        route: Route | str,
        day: date,
        reason: str,
        author: str,
        model: str | None = None,
        job_id: int = 0,
        key: str | None = None,
    ) -> Correction:
        """Add ``usd`` (which is negative for money that was not charged) to what is booked on a paid route on a day.

        The budget counts it in the month of that day, in UTC. ``reason`` and ``author`` are kept. A correction has a
        ``key``, and a second call with the same key books nothing. Without one, the key is made of the amount, route,
        day, reason, model and job, so the same call may be made again after an error.

        Raises :class:`InvalidInput` if an argument is wrong, if more is taken back than the month has on that route (or
        the job has there), if the day has not begun, or if the key is that of another correction; and
        :class:`NotFound` if there is no such model.
        """
        return await self._short(
            self._client.correct_charge,
            usd,
            route=route,
            day=day,
            reason=reason,
            author=author,
            model=model,
            job_id=job_id,
            key=key,
        )

    async def explain(self, job_id: int) -> Explanation:
        """Why a job is embedded where it is, and what it waits for. Raises :class:`NotFound`."""
        return await self._short(self._client.explain, job_id)

    async def lanes(self) -> list[Lane]:
        """The paid lanes: running, idle (no worker serves them), paused, stopped or held, and why."""
        return await self._short(
            self._client.lanes,
        )

    async def abandon(self, provider_batch_id: int) -> Abandoned:
        """Let go of a ProviderBatch that does not end. Jobs that wait for its contents send them again.

        If they may have been charged, that is booked, and the provider is asked to cancel it. If its files cannot be
        deleted, a second call closes it all the same. Raises :class:`NotFound`, and :class:`InvalidInput` if it is
        closed.
        """
        return await self._short(self._client.abandon, provider_batch_id)

    async def resume_lane(self, route: Route | str) -> bool:
        """Let a stopped or paused lane take work again, and forget limits that the provider's refusals have taught.

        Returns False if there was nothing to do.
        """
        return await self._short(self._client.resume_lane, route)

    async def dead(
        self, job_id: int | None = None, collection: str | None = None, code: str | None = None, limit: int = 1000
    ) -> list[DeadEntry]:
        """The newest ``limit`` entries of the dead list.

        ``job_id``, ``collection`` and ``code`` keep only the entries of a job, of a collection, or with a code. Raises
        :class:`NotFound` for a job or a collection that does not exist.
        """
        return await self._short(self._client.dead, job_id, collection, code, limit)

    async def dead_codes(
        self, job_id: int | None = None, collection: str | None = None, code: str | None = None
    ) -> dict[str, int]:
        """``code → entries`` of the dead list, the most frequent first. The arguments are those of :meth:`dead`."""
        return await self._short(self._client.dead_codes, job_id, collection, code)

    async def dead_chunk(self, dead_id: int, *, with_text: bool = False) -> DeadDetails:
        """All that is known of one entry of the dead list, with its text if ``with_text``. Raises :class:`NotFound`."""
        return await self._short(self._client.dead_chunk, dead_id, with_text=with_text)

    async def retry_dead(
        self,
        ids: Iterable[int] | AsyncIterable[int] | None = None,
        *,
        job_id: int | None = None,
        code: str | None = None,
    ) -> RetriedDead:
        """Embed the texts of dead chunks after all, in the jobs that they belong to.

        ``ids`` names the chunks. Without it, ``job_id`` and ``code`` choose all of a job, all with a code, or both.
        A text that killed workers stays a suspect, which workers embed alone. A chunk cannot be retried if enqueue
        refused it, if it was refused as too long, if it was replaced or deleted since, or if its job was cancelled.
        Such a chunk raises :class:`InvalidInput` if ``ids`` names it. It is ignored if the job or the code chooses it,
        unless they choose no other. Raises :class:`NotFound` for an id that is not on the list. A call that raises
        changes nothing.
        """
        return await self._long(self._client.retry_dead, ids, job_id=job_id, code=code)

    async def drop_dead(
        self,
        ids: Iterable[int] | AsyncIterable[int] | None = None,
        *,
        job_id: int | None = None,
        code: str | None = None,
    ) -> DroppedDead:
        """Take chunks off the dead list and out of their collections. A job that failed for nothing else completes.

        ``ids`` names the chunks. Without it, ``job_id`` and ``code`` choose all of a job, all with a code, or both.
        If a chunk was given another text since, or if its text has a vector since, only its entry is deleted and the
        chunk stays in its collection. A chunk that is dead in another space of its collection than the active one stays
        too, with its entry. A text that no chunk refers to any more is deleted. Raises :class:`NotFound` for an id that
        is not on the list, and :class:`InvalidInput` for that of a chunk that is dead in another space; nothing is
        changed then. Many chunks are dropped in several transactions. If one of them fails, the earlier ones stay, and
        the same call made again drops the rest.
        """
        return await self._long(self._client.drop_dead, ids, job_id=job_id, code=code)

    async def compare(
        self,
        collection: str,
        model: str,
        *,
        against: str | None = None,
        sample: int = 20000,
        queries: int = MAX_JUDGED,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        max_usd: Decimal | int | str | None = None,
        timeout: float = 3600.0,
        on_progress: Callable[[int], Awaitable[None] | None] | None = None,
        on_spent: Callable[[Spent], Awaitable[None] | None] | None = None,
    ) -> Comparison:
        """Judge ``model`` against the model of a collection, or against ``against``, on a sample of the collection.

        The golden queries of the collection are asked in both models, at most ``queries`` of them. If there are none,
        first lines and sentences of chunks serve as queries, each of which asks for the rest of its chunk. The sample
        has the relevant texts and others chosen at random, ``sample`` in all. Workers embed what has no vector yet, as
        they answer any other request, and nothing is stored. A worker must serve each model. For each text of the
        sample, memory grows by only about 100 bytes. ``on_progress`` is called with the number of texts that were
        compared so far, first with 0 before anything is embedded, and ``on_spent`` with what is spent, before and after
        each request to workers.

        A provider's model is quoted first (:meth:`quote_comparison`). Raises :class:`BudgetExceeded` before anything is
        sent if the quote is above ``max_usd`` or above what the month's budget has left. Too few queries to tell is no
        error: ``changes.needed`` says how many it would take. Raises :class:`NotFound`, :class:`UnknownModel`,
        :class:`InvalidInput` if there is nothing to judge by, and :class:`WaitTimeout` when workers have not done it
        within ``timeout`` seconds.
        """
        return await self._long(
            self._client.compare,
            collection,
            model,
            against=against,
            sample=sample,
            queries=queries,
            dimensions=dimensions,
            precision=precision,
            max_usd=max_usd,
            timeout=timeout,
            on_progress=on_progress,
            on_spent=on_spent,
        )

    async def quote_comparison(
        self,
        collection: str,
        model: str,
        *,
        against: str | None = None,
        sample: int = 20000,
        queries: int = MAX_JUDGED,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> ComparisonQuote:
        """What :meth:`compare` with these arguments would have embedded, and what that would cost. Nothing is sent.

        The tokens of a provider's model are counted as those of an enqueue are. Raises what :meth:`compare` raises
        before it sends anything.
        """
        return await self._long(
            self._client.quote_comparison,
            collection,
            model,
            against=against,
            sample=sample,
            queries=queries,
            dimensions=dimensions,
            precision=precision,
        )

    async def keywords(self, collection: str, *, language: str | None = None) -> Keywords | None:
        """The keywords of a collection; None if it has none. With ``language`` it gets some.

        ``language`` is a text search configuration of Postgres, such as ``english`` or ``simple``. The call returns
        when all chunks have their keywords, which takes about a minute for 100,000 of them; writers and searches go on,
        and if it is interrupted, the poller goes on with it. From then on each chunk gets its keywords in the commit
        that writes it. Keywords stay in Postgres and are deleted with the text.

        Raises :class:`NotFound`, and :class:`InvalidInput` if Postgres does not know the language, or if the collection
        has keywords in another one: call :meth:`drop_keywords` first.
        """
        return await self._long(self._client.keywords, collection, language=language)

    async def drop_keywords(self, collection: str) -> bool:
        """Delete the keywords of a collection, and what its golden queries chose. Returns whether there were any.

        Its searches then use vectors alone. Raises :class:`NotFound`.
        """
        return await self._short(self._client.drop_keywords, collection)

    async def tune_search(
        self,
        collection: str,
        *,
        timeout: float = 600.0,
        space: str | None = None,
        on_spent: Callable[[Spent], Awaitable[None] | None] | None = None,
    ) -> SearchTuning:
        """Judge searches by vectors, by keywords and by both with the collection's golden queries, and choose.

        If mixing is better even at the lower bound of its confidence interval, searches are mixed from then on;
        otherwise they use vectors alone. The report says why. Call it again when the collection, its space or its
        golden queries have changed. At most 2,000 queries are judged, chosen at random, and a worker embeds them. The
        choice holds for one space: ``space`` names another one of the collection than the active one, as in
        :meth:`search`, for example before the collection moves to it. ``on_spent`` is called with what is spent, before
        and after each request to workers.

        Raises :class:`NotFound`, :class:`InvalidInput` if the collection has no keywords or no golden queries, and
        :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        return await self._long(self._client.tune_search, collection, timeout=timeout, space=space, on_spent=on_spent)

    async def feedback(self, search_id: str, chunk_id: str) -> bool:
        """Say that a hit was what somebody wanted, for example because they clicked on it.

        ``search_id`` is that of the hits. It names the space that answered, so that :meth:`search_counts` compares two
        spaces by what their users chose. Returns False if the same was said before. Raises :class:`InvalidInput`, and
        :class:`NotFound` if the collection does not have the chunk any more.
        """
        return await self._short(self._client.feedback, search_id, chunk_id)

    async def search_counts(self, collection: str, *, hours: float = 24.0) -> list[SearchCounts]:
        """How the searches of the last ``hours`` went in each space of a collection, the active one first.

        Searches with a ``session`` are counted, while the collection has several spaces. Each process writes its counts
        every 5 s. Counts of more than two hours ago exist for whole hours only, and after 90 days they are deleted.
        Raises :class:`NotFound` and :class:`InvalidInput`.
        """
        return await self._short(self._client.search_counts, collection, hours=hours)

    async def outdated(self, collection: str, *, serve: bool | None = None) -> Outdated:
        """Whether searches find a replaced chunk by its old vector until it has its new one.

        By default they do not: a chunk whose text was replaced cannot be found until a worker has embedded the new
        text. With ``serve=True`` a chunk that is replaced from then on is found by its old vector and shown with its
        old text, and ``outdated`` of the hit says so. Its metadata are the new ones. A filter must pass both the old
        and the new ones. From the commit that writes the new vector on, the chunk is found by that; a chunk that is
        deleted is not found at all. Old texts and vectors are copied for as long as that takes, and each search
        compares its query with all of them. Keywords find new texts only. ``serve=False`` ends it and deletes the
        copies.

        Raises :class:`NotFound`, and :class:`StoreUnavailable` if the table of chunks was held for 20 s when the first
        collection was set so.
        """
        return await self._long(self._client.outdated, collection, serve=serve)

    async def bridge(
        self,
        collection: str,
        model: str,
        *,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        sample: int = 5000,
        queries: int = 500,
        compare_old: bool = False,
        max_usd: Decimal | int | str | None = None,
        timeout: float = 3600.0,
        on_progress: Callable[[Spent], Awaitable[None] | None] | None = None,
    ) -> Bridge:
        """Learn to answer queries of ``model`` in the space that the collection has now, and store what was learnt.

        ``search(bridge=model)`` uses it from then on, and nothing else does. It is for a time in which the collection's
        own model cannot be asked, or in which a migration to ``model`` is under way. It ends by itself when the
        collection leaves its space, and ``search(bridge=model)`` then searches the new one.

        It is learnt from up to ``sample`` stored texts, chosen at random. Those without a vector of ``model`` are
        embedded now, as workers answer any other request, and these vectors are not stored. Up to ``queries`` golden
        queries, or else titles of chunks, choose among three kinds of adapter and measure what is lost against a full
        re-embedding; their answers are not learnt from. With ``compare_old`` they are also asked with the collection's
        own model, which a worker must then serve. A bridge of the same model is replaced.

        If the collection is on its way into a space of this model, the bridge is from that space. Otherwise
        ``dimensions`` and ``precision`` are those of :meth:`enqueue`, and long texts are treated as in the space that
        the collection has. The sample takes about ``20 * sample * (d + e)`` bytes of memory for ``d`` and ``e``
        dimensions.

        A provider's model is quoted first (:meth:`quote_bridge`). Raises :class:`BudgetExceeded` before anything is
        sent if the quote is above ``max_usd`` or above what the month's budget has left. ``on_progress`` is called with
        what is spent, before and after each request to workers.

        Raises :class:`NotFound`, :class:`InvalidInput` if the collection is in that space already, or has too few texts
        or no queries, :class:`EngineError`, and :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        return await self._long(
            self._client.bridge,
            collection,
            model,
            dimensions=dimensions,
            precision=precision,
            sample=sample,
            queries=queries,
            compare_old=compare_old,
            max_usd=max_usd,
            timeout=timeout,
            on_progress=on_progress,
        )

    async def quote_bridge(
        self,
        collection: str,
        model: str,
        *,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        sample: int = 5000,
        queries: int = 500,
        compare_old: bool = False,
    ) -> BridgeQuote:
        """What :meth:`bridge` with these arguments would have embedded, and what that would cost. Nothing is sent.

        The tokens of a provider's model are counted as those of an enqueue are. Raises what :meth:`bridge` raises
        before it sends anything.
        """
        return await self._long(
            self._client.quote_bridge,
            collection,
            model,
            dimensions=dimensions,
            precision=precision,
            sample=sample,
            queries=queries,
            compare_old=compare_old,
        )

    async def bridges(self, collection: str | None = None) -> list[Bridge]:
        """The bridges of a collection, or of all, by collection and name. Raises :class:`NotFound`."""
        return await self._short(self._client.bridges, collection)

    async def drop_bridge(self, collection: str, name: str) -> bool:
        """Delete the bridge of a collection for the model ``name``. Returns whether there was one.

        Searches through it raise :class:`NotFound` from then on. Raises :class:`NotFound`.
        """
        return await self._short(self._client.drop_bridge, collection, name)

    @overload
    async def search(
        self,
        query: str | np.ndarray[tuple[int], np.dtype[np.float32]] | None = None,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Hits: ...

    @overload
    async def search(
        self,
        query: list[str] | tuple[str, ...] | np.ndarray[tuple[int, int], np.dtype[np.float32]],
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Hits]: ...

    async def search(
        self,
        query: str | list[str] | tuple[str, ...] | NDArray[np.float32] | None = None,
        *,
        collection: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        exact: bool = False,
        timeout: float = 30.0,
        like: str | None = None,
        min_score: float | None = None,
        offset: int | None = None,
        explain: bool = False,
        hybrid: bool | float | Literal["rrf"] | None = None,
        session: str | None = None,
        space: str | None = None,
        on_unserved: Literal["previous"] | None = None,
        bridge: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Hits | list[Hits]:
        """The ``k`` chunks nearest to ``query`` by cosine, best first.

        ``query`` is a text, which a worker embeds with the space's query prompt, or a ``(d,)`` vector. A list of texts
        or an ``(n, d)`` array gives a list of hit lists, in the same order. Instead of a query, ``like`` names a chunk
        of the collection: the hits are those nearest to its stored vector, without the chunk itself.

        Only chunks whose metadata pass ``filter`` are returned (docs/search.md describes the language; ``metadata`` is
        an older name of this argument), and no hit has a score below ``min_score``. ``offset`` skips this many of the
        nearest. Pages fit together if all of them are asked for with an offset, the first one with 0, and nothing is
        written meanwhile. ``exact`` compares the query with every vector of the collection. With ``explain`` the
        ``explanation`` of a hit list says how it was found, which takes longer.

        With ``hybrid``, chunks with the words of the query come first too: a number from 0.0 to 1.0 is the weight of
        the cosine in the mix, ``"rrf"`` fuses the ranks, True takes the weight that :meth:`tune_search` found best or
        0.8, and False uses the cosine alone. By default the search does what :meth:`tune_search` chose, which is the
        cosine alone until it was called. Hybrid searches are for texts, return at most 1,000 hits, and need
        :meth:`keywords`. ``"…"`` around words asks for the phrase, and ``word*`` for all words that begin with
        ``word``.

        While a collection is moving to another space (:meth:`reembed`), it has several spaces. ``session`` names
        whoever asks, such as a user: the new space answers its share of the sessions, always the same ones, and their
        searches are counted (:meth:`search_counts`). Without a session the active space answers. ``space`` names
        another one: ``"active"``, ``"filling"``, ``"previous"``, a model or the beginning of a fingerprint. A vector
        belongs to a space, so it takes no ``session``. If no worker embeds the query in time, or none can, the search
        fails, because a search in another space has other hits. ``on_unserved="previous"`` then searches the space that
        the collection had before: half of ``timeout`` is for the first space and half for the previous one, and
        ``instead_of`` of the hits says that this happened.

        With ``bridge``, the name of a model for which :meth:`bridge` has learnt one, the query is embedded with that
        model and carried into the collection's space, which ``bridge`` of each hit says. Once the collection is in a
        space of that model, the same call searches it without a bridge.

        Raises :class:`NotFound`, :class:`InvalidInput`, :class:`EngineError` if a worker cannot embed the query, and
        :class:`WaitTimeout` when no worker answers within ``timeout`` seconds.
        """
        return await self._wait(
            self._client._search_steps(
                query,
                collection=collection,
                k=k,
                filter=filter,
                exact=exact,
                timeout=timeout,
                like=like,
                min_score=min_score,
                offset=offset,
                explain=explain,
                hybrid=hybrid,
                session=session,
                space=space,
                on_unserved=on_unserved,
                bridge=bridge,
                metadata=metadata,
            )
        )

    async def embed(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> NDArray[np.float32]:
        """``(n, d)`` float32 vectors of ``texts`` in input order, which a worker makes now and nobody stores.

        ``dimensions`` and ``precision`` are those of :meth:`enqueue`. Raises :class:`InvalidChunk` if a text is not
        valid, :class:`EngineError` if a worker cannot embed it, and :class:`WaitTimeout`.
        """
        return await self._wait(
            self._client._embed_steps(
                await self._gathered(texts),
                model=model,
                kind=kind,
                timeout=timeout,
                dimensions=dimensions,
                precision=precision,
            )
        )

    async def embed_texts(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        model: str | None = None,
        kind: Literal["document", "query"] = "document",
        timeout: float = 30.0,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        caller: str = "",
        blank: bool = False,
    ) -> EmbeddedTexts:
        """Like :meth:`embed`, and says how many tokens each text had and whether it was cut.

        With ``blank`` a text may be empty or white space. Its vector is then that of the model's special tokens alone.
        Workers share their time between callers, such as the users of a server, if each has its own ``caller``.
        """
        return await self._wait(
            self._client._embed_texts_steps(
                await self._gathered(texts),
                model=model,
                kind=kind,
                timeout=timeout,
                dimensions=dimensions,
                precision=precision,
                caller=caller,
                blank=blank,
            )
        )

    async def query_cache(self) -> QueryCache:
        """What this client keeps of the vectors of its queries, and how often that helped.

        Searches and ``embed(kind="query")`` take the vector of a text that they have asked for in the last
        QUERY_CACHE_SECONDS from memory. Texts are not kept, only their hashes. QUERY_CACHE_MB bounds the memory.
        """
        return await self._short(
            self._client.query_cache,
        )

    async def save_query_cache(self, path: str | PathLike[str]) -> int:
        """Write the vectors of queries into a file, for :meth:`load_query_cache` in another process. Returns how many.

        The file replaces an older one in one step. It holds vectors and hashes, and no text.
        """
        return await self._short(self._client.save_query_cache, path)

    async def load_query_cache(self, path: str | PathLike[str]) -> int:
        """Take the vectors of a file that :meth:`save_query_cache` wrote. Returns how many were taken.

        Those that are too old are left out, and and if there are more than fit, those used last are taken. Vectors of
        other spaces do no harm. Raises :class:`InvalidInput` if the file is damaged, is of another kind, or may be
        written by everybody; nothing is taken then. Whoever can write the file decides what searches find.
        """
        return await self._short(self._client.load_query_cache, path)

    async def clear_query_cache(self) -> None:
        """Forget the vectors of all queries."""
        return await self._short(
            self._client.clear_query_cache,
        )

    async def vectors(
        self, collection: str, ids: Iterable[str] | AsyncIterable[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """``chunk id → (d,) float32`` of ``ids``, or of the whole collection. Chunks without a vector are left out."""
        return await self._long(self._client.vectors, collection, ids)

    async def audit(self, collection: str) -> Audit:
        """Anti-join a collection's chunks with its space's vectors. ``audit.complete`` is true if all have one."""
        return await self._long(self._client.audit, collection)

    async def index(self, collection: str, *, space: str | None = None) -> Index:
        """Build now what searches of the collection need, and return what there is then.

        ``space`` names another space of the collection than the active one, as in :meth:`search`.

        The poller does the same by itself within some seconds; if it is building something now, this waits for it.
        Writers and searches go on meanwhile. A graph takes about a minute for 100,000 chunks, and the memory of
        INDEX_MEMORY_MB in Postgres. If an earlier release built a graph of the whole space and this role owns it, it is
        dropped, because no search uses it and it makes every write slow. Raises :class:`NotFound`, and
        :class:`StoreUnavailable` if a transaction that writes lasts so long that the index cannot begin.
        """
        return await self._long(self._client.index, collection, space=space)

    async def map(
        self,
        collection: str,
        *,
        by: str | None = None,
        sample: int = 5000,
        method: MapMethod | str = MapMethod.PCA,
        texts: bool = False,
    ) -> CollectionMap:
        """Draw the vectors of a collection in two dimensions, coloured by the metadata field ``by``.

        At most ``sample`` distinct texts are drawn. They are chosen at random, and are the same ones each time. They
        are read a thousand at a time; ``4 * sample * d`` bytes of memory hold their vectors of ``d`` dimensions,
        however large the collection is. ``method`` is ``pca``, or ``umap``, which needs the extra ``umap`` and takes
        longer. The result is shown by a notebook, and :meth:`CollectionMap.save` writes it as a page or a picture. It
        has the beginnings of the texts only if ``texts`` is true, because whoever gets the file can read them.

        ``by`` is a key of the metadata. If no chunk has that key, it is read as a path: ``a.b`` is the key ``b`` of the
        object ``a``. Numbers are coloured by a scale. Of other values, the nine most frequent have a colour each.

        Raises :class:`NotFound`, and :class:`InvalidInput` if nothing has a vector yet or UMAP is not installed.
        """
        return await self._long(self._client.map, collection, by=by, sample=sample, method=method, texts=texts)

    async def get(
        self,
        collection: str,
        ids: Iterable[str] | AsyncIterable[str],
        *,
        with_text: bool = True,
        with_vector: bool = False,
    ) -> dict[str, StoredChunk]:
        """``chunk id → StoredChunk`` of ``ids``, in their order. An id that is not in the collection is left out.

        Raises :class:`NotFound` if there is no such collection.
        """
        return await self._long(self._client.get, collection, ids, with_text=with_text, with_vector=with_vector)

    def chunks(
        self,
        collection: str,
        *,
        filter: Mapping[str, Any] | None = None,
        after: str = "",
        limit: int | None = None,
        with_text: bool = True,
        with_vector: bool = False,
    ) -> AsyncGenerator[StoredChunk, None]:
        """The chunks of a collection that pass ``filter``, or all, in the order in which Postgres sorts their ids.

        ``after`` begins behind an id, and ``limit`` ends after so many chunks: the next page begins ``after`` the last
        id of this one. The iterator reads as it goes, in constant memory and without an open transaction. A chunk that
        is in the collection all the time comes exactly once. What is added, changed or deleted meanwhile comes as it is
        when its page is read. Raises :class:`NotFound`, also if the collection is dropped meanwhile,
        :class:`SpaceMismatch` if it moves to another space, and :class:`InvalidInput`.
        """
        return self._items(
            self._client.chunks,
            collection,
            filter=filter,
            after=after,
            limit=limit,
            with_text=with_text,
            with_vector=with_vector,
        )

    async def count(self, collection: str, *, filter: Mapping[str, Any] | None = None) -> int:
        """How many chunks of a collection pass ``filter``; without one, how many there are. Raises :class:`NotFound`
        and :class:`InvalidInput`.
        """
        return await self._short(self._client.count, collection, filter=filter)

    async def delete(
        self,
        collection: str,
        ids: Iterable[str] | AsyncIterable[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        all_chunks: bool = False,
    ) -> int:
        """Delete chunks by id, by ``filter``, or with ``all_chunks`` all of the collection. Returns how many.

        A text that no chunk refers to any more is deleted with its vectors. A filter deletes the chunks that pass it
        when the call begins, in several transactions; what an enqueue adds or replaces meanwhile stays, and so does a
        chunk that no longer passes. If the call fails, what it has deleted stays deleted, and the same call deletes the
        rest. Raises :class:`InvalidInput` unless exactly one of ``ids``, ``filter`` and ``all_chunks`` is given, and
        for a filter that is empty, so that a list or a filter that is missing never means everything; and
        :class:`NotFound`.
        """
        return await self._long(self._client.delete, collection, ids, filter=filter, all_chunks=all_chunks)

    async def update_metadata(
        self,
        collection: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        ids: Iterable[str] | AsyncIterable[str] | None = None,
        filter: Mapping[str, Any] | None = None,
        all_chunks: bool = False,
        remove: Iterable[str] | AsyncIterable[str] = (),
        replace: bool = False,
    ) -> int:
        """Change the metadata of chunks. Nothing is embedded again. Returns how many chunks were chosen.

        The keys of ``metadata`` are set and the keys in ``remove`` are removed; other keys stay. A value takes the
        place of the old one as a whole, also if both are objects. With ``replace``, ``metadata`` takes the place of all
        that the chunk had. The next search finds the chunks by what they have now. An enqueue that names a chunk again
        sets its metadata anew. Many chunks are changed in several transactions; a filter is applied again in each, so a
        chunk that an enqueue has changed meanwhile is left alone unless it still passes. Raises :class:`InvalidInput`
        unless exactly one of ``ids``, ``filter`` and ``all_chunks`` is given, for a filter that is empty, and if the
        result would be larger than an enqueue accepts; and :class:`NotFound`.
        """
        return await self._long(
            self._client.update_metadata,
            collection,
            metadata,
            ids=ids,
            filter=filter,
            all_chunks=all_chunks,
            remove=remove,
            replace=replace,
        )

    def iter_vectors(
        self, collection: str, *, batch_size: int = 1000, filter: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[tuple[list[str], NDArray[np.float32]], None]:
        """Batches of ``(ids, vectors)``: the ids of up to ``batch_size`` chunks and their ``(n, d)`` float32 vectors.

        Every batch but the last is full. The chunks are those that pass ``filter`` and have a vector, in the order of
        their ids. As for :meth:`chunks`, memory is constant, no transaction stays open, a chunk that stays comes
        exactly once, and the same errors are raised. The vectors are normalised if the model's are.
        """
        return self._items(self._client.iter_vectors, collection, batch_size=batch_size, filter=filter)

    async def export(
        self,
        collection: str,
        path: str | os.PathLike[str],
        *,
        filter: Mapping[str, Any] | None = None,
        with_text: bool = True,
        with_vector: bool = True,
        overwrite: bool = False,
        on_progress: Callable[[int, int], Awaitable[None] | None] | None = None,
    ) -> Exported:
        """Write the chunks that pass ``filter``, or all, into a file, in the order of their ids.

        The name says the format: ``.parquet``, which needs the extra ``parquet``, or JSON lines, ``.jsonl`` and
        ``.ndjson``, also with ``.gz``. A chunk has the fields ``id``, ``text``, ``metadata`` (in Parquet as JSON text),
        ``vector`` (``(d,)`` float32, null if there is none), ``truncated`` and ``content_hash``. If others write
        meanwhile, the same holds as for :meth:`chunks`. The file gets its name once it is complete, and an existing
        file is kept unless ``overwrite`` is true. ``on_progress`` is called with the number of chunks written, and of
        all. ``chunkmill enqueue`` takes the file. Raises :class:`InvalidInput`, :class:`NotFound` and what
        :meth:`chunks` raises.
        """
        return await self._long(
            self._client.export,
            collection,
            path,
            filter=filter,
            with_text=with_text,
            with_vector=with_vector,
            overwrite=overwrite,
            on_progress=on_progress,
        )

    async def collections(self, *, exact: bool = False) -> list[CollectionInfo]:
        """All collections, by name, with what is in them and how they are served.

        This is cheap for large collections too: the chunks of one with more than 1,000 are estimated, which
        ``CollectionInfo.counted`` says. ``exact`` counts them, which reads the keys of all chunks and vectors.
        """
        return await self._short(self._client.collections, exact=exact)

    async def drop_collection(
        self, name: str, *, wait: bool = True, on_progress: OnDropped | None = None
    ) -> DroppedCollection:
        """Drop a collection with all of its chunks, their texts and vectors, its serving index and its view.

        The name is free at once: whoever enqueues into it from then on gets a new, empty collection. Open jobs are
        cancelled; what is at a provider is followed to its end and booked. The chunks are deleted in short
        transactions beside everything else. With ``wait=False``, or if the process dies or Postgres ends one of these
        transactions, a poller deletes them, which :attr:`DroppedCollection.complete` says.

        The jobs and their costs stay until they are pruned. They are listed under the name with "(dropped)" and a
        number. Their idempotency keys may be used again. Texts that another collection has stay, with their vectors.

        Raises :class:`NotFound`, and :class:`InvalidInput` if ``name`` is an alias or if the collection has one.
        """
        return await self._short(self._client.drop_collection, name, wait=wait, on_progress=on_progress)

    async def rename_collection(self, name: str, to: str) -> None:
        """Give a collection another name. Its jobs, its aliases and its serving index stay, and so does its view.

        Enqueues that are under way go on. The old name is free. Raises :class:`NotFound`, :class:`InvalidInput` if
        ``name`` is an alias or ``to`` is taken, and :class:`StoreUnavailable` if several producers write into the
        collection without a pause for 10 s.
        """
        return await self._short(self._client.rename_collection, name, to)

    async def set_alias(self, alias: str, collection: str) -> None:
        """Let ``alias`` be one more name of ``collection``, which every method accepts.

        An alias of another collection moves, at one moment: whoever resolves it gets the old or the new collection.
        Raises :class:`NotFound`, and :class:`InvalidInput` if ``alias`` is the name of a collection.
        """
        return await self._short(self._client.set_alias, alias, collection)

    async def remove_alias(self, alias: str) -> None:
        """Take an alias away. Its collection stays. Raises :class:`NotFound`."""
        return await self._short(self._client.remove_alias, alias)

    @overload
    async def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[True],
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Quote: ...

    @overload
    async def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[False] = False,
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Reembedding: ...

    async def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: bool = False,
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Quote | Reembedding:
        """Begin to move a collection to the model ``to``, or with ``dry_run`` say what that would take.

        Neither searches nor enqueues are interrupted: the stored texts are embedded into the new space as work of
        ``priority``, what is enqueued meanwhile is embedded into both, and searches go on in the old space. The new one
        must pass the ``gates``, answers the growing shares of ``ramp``, each for ``step_hours``, and becomes the active
        one at a single moment. The old one is kept up to date for ``keep_days``, so that :meth:`rollback` can return to
        it. A poller does all this; a call with the same arguments returns the re-embedding that is under way.

        ``on_long``, ``dimensions``, ``precision`` and ``route`` are as in :meth:`enqueue`. A ramp whose last share is
        not 100 stays there until somebody calls :meth:`flip` or :meth:`cancel_reembedding`, and an empty one flips as
        soon as the gates are passed. Nothing is begun if a paid route would cost more than ``max_usd``, by the estimate
        of ``dry_run``; what is enqueued afterwards costs more.

        Raises :class:`NotFound`, :class:`InvalidInput` if another re-embedding of the collection is under way or it is
        in the space already, :class:`UnknownModel`, :class:`UnknownRoute`, and :class:`BudgetExceeded`.
        """
        return await self._long(
            self._client.reembed,
            collection,
            to=to,
            dry_run=dry_run,
            on_long=on_long,
            dimensions=dimensions,
            precision=precision,
            gates=gates,
            ramp=ramp,
            step_hours=step_hours,
            keep_days=keep_days,
            priority=priority,
            route=route,
            max_usd=max_usd,
        )

    async def reembedding(self, which: int | str) -> Reembedding:
        """A re-embedding by its id, or the latest one of a collection by its name. Raises :class:`NotFound`."""
        return await self._short(self._client.reembedding, which)

    async def reembeddings(self, collection: str | None = None, *, limit: int = 20) -> list[Reembedding]:
        """The latest re-embeddings, newest first: of one collection, or of all. Raises :class:`NotFound`."""
        return await self._short(self._client.reembeddings, collection, limit=limit)

    async def flip(self, which: int | str, *, missing: int | None = None, timeout: float = 60.0) -> Reembedding:
        """Make the new space the active one now, without the rest of the ramp.

        No chunk that can be searched is missing afterwards: that is proved in the moment of the flip, for which writers
        wait some milliseconds. If chunks got their vector in the old space a moment ago, this waits for their vector in
        the new one, up to ``timeout`` seconds. ``missing`` chunks may be missing all the same; None means as many as
        the gates allow. The gates of quality are not checked.

        Raises :class:`NotFound`, :class:`InvalidInput` if it is not judged or ramping, and :class:`WaitTimeout`, which
        says how many chunks have no vector in the new space. Nothing is changed then.
        """
        return await self._long(self._client.flip, which, missing=missing, timeout=timeout)

    async def rollback(self, which: int | str, *, missing: int | None = None, timeout: float = 60.0) -> Reembedding:
        """Make the space that the collection left the active one again. It is :meth:`flip` backwards, with the same
        proof.

        The new space is kept up to date for ``keep_days``; after that it is dropped. Raises what :meth:`flip` raises.
        """
        return await self._long(self._client.rollback, which, missing=missing, timeout=timeout)

    async def judge_reembedding(
        self,
        which: int | str,
        *,
        timeout: float = 600.0,
        on_spent: Callable[[Spent], Awaitable[None] | None] | None = None,
    ) -> Reembedding:
        """Check the gates now, and note what they said. A poller whose role may read texts does it by itself.

        Workers embed the golden queries in both spaces, for which this waits up to ``timeout`` seconds. ``on_spent`` is
        called with what is spent, before and after each request to workers. Raises :class:`NotFound`, and
        :class:`InvalidInput` if it is not judged now.
        """
        return await self._long(self._client.judge_reembedding, which, timeout=timeout, on_spent=on_spent)

    async def pause_reembedding(self, which: int | str) -> Reembedding:
        """Stop a re-embedding in its present state and share. Texts that workers already have are still embedded.

        Chunks that are enqueued meanwhile still reach both spaces. Raises :class:`NotFound`, and :class:`InvalidInput`
        if it has ended.
        """
        return await self._short(self._client.pause_reembedding, which)

    async def resume_reembedding(
        self, which: int | str, *, gates: Gates | None = None, ramp: Sequence[int] | None = None
    ) -> Reembedding:
        """Go on with a re-embedding that was paused, has a problem, or stepped back, if you like with other ``gates``
        or another ``ramp``.

        Its gates are checked anew. Once the ramp has begun they were passed, and of other ``gates`` only ``missing``
        counts, at the flip. Raises :class:`NotFound`, and :class:`InvalidInput` if it has ended.
        """
        return await self._short(self._client.resume_reembedding, which, gates=gates, ramp=ramp)

    async def cancel_reembedding(self, which: int | str) -> Reembedding:
        """Give up a re-embedding before its flip. Searches stay in the old space.

        Vectors of the new space that are written stay, as those that no collection refers to, until they are pruned or
        evicted. Raises :class:`NotFound`, and :class:`InvalidInput` after the flip, when :meth:`rollback` returns.
        """
        return await self._short(self._client.cancel_reembedding, which)

    async def finish_reembedding(self, which: int | str) -> Reembedding:
        """Drop the space that the collection left, before ``keep_days`` are over. There is no way back after that.

        A poller deletes its vectors. Raises :class:`NotFound`, and :class:`InvalidInput` if the collection has left no
        space that is still kept.
        """
        return await self._short(self._client.finish_reembedding, which)

    async def prune(
        self,
        older_than: timedelta | float = 30,
        *,
        dry_run: bool = False,
        on_progress: Callable[[str, int, int], Awaitable[None] | None] | None = None,
    ) -> Pruned:
        """Delete jobs that finished more than ``older_than`` (days) ago, and vectors and texts that were stored before
        then and that no collection refers to. This is safe while everything runs.

        Of the Batch API that a gateway serves, it deletes older files, unless a batch that has not ended needs them,
        and batches that ended before then, with their texts and vectors.

        Deleting a job also deletes its ChunkBatches, attempts, usage, dead list and idempotency key. Charges stay,
        because they are the bill. A failed or cancelled job stays as long as a chunk of it has no vector. At the end it
        drops the spaces that were registered before then, if nothing refers to them and they have no vector left.
        ``dry_run`` only counts; its ``spaces`` do not include a space to which only jobs refer that would be deleted.
        """
        return await self._long(self._client.prune, older_than, dry_run=dry_run, on_progress=on_progress)

    async def drop_space(self, space: str) -> None:
        """Drop an embedding space that nothing refers to, with the vectors that are still in it.

        ``space`` is the beginning of its fingerprint. Raises :class:`NotFound`, and :class:`InvalidInput`, which names
        the collection or the job that refers to it. A space that the bill names stays.
        """
        return await self._short(self._client.drop_space, space)

    async def cache(self, *, recent: timedelta | float = 7) -> list[CacheSpace]:
        """Each space's vectors, their size, and how often enqueues found a vector that they needed, ever and in the
        last ``recent`` days.
        """
        return await self._short(self._client.cache, recent=recent)

    async def evict(
        self,
        *,
        older_than: timedelta | float | None = None,
        max_bytes: int | None = None,
        space: str | None = None,
        dry_run: bool = False,
        on_progress: Callable[[str, int, int], Awaitable[None] | None] | None = None,
    ) -> Pruned:
        """Delete vectors that no collection refers to, and their texts: those stored more than ``older_than`` (days)
        ago, or the oldest, until ``max_bytes`` of them are left. This is safe while everything runs.

        ``space`` is the beginning of a fingerprint; None means all spaces. Raises :class:`InvalidInput` and
        :class:`NotFound`.
        """
        return await self._long(
            self._client.evict,
            older_than=older_than,
            max_bytes=max_bytes,
            space=space,
            dry_run=dry_run,
            on_progress=on_progress,
        )
