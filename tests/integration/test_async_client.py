"""AsyncClient: the verbs of Client for asyncio. None blocks the loop, and a call that ends early leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import (
    AsyncClient,
    Client,
    ClientClosed,
    InvalidChunk,
    InvalidInput,
    Job,
    JobFailed,
    NotFound,
    StoreUnavailable,
    WaitTimeout,
)
from chunkmill.client.aio import calls
from chunkmill.client.asking import inquiry
from chunkmill.errors import JobCancelled
from chunkmill.ledger import embed_requests
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors
from chunkmill.telemetry import tracing
from tests.conftest import client_for
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, until

Result = TypeVar("Result")
ROOT = Path(__file__).parents[2]
DIMENSIONS = 384
SEARCHES = 50


@pytest.fixture
def aio(settings: Settings) -> Iterator[AsyncClient]:
    made = AsyncClient(client_for(settings))
    yield made
    asyncio.run(made.close())


def run(call: Awaitable[Result]) -> Result:
    """Run a test's coroutine. One that hangs fails."""

    async def bounded() -> Result:
        async with asyncio.timeout(PATIENCE):
            return await call

    return asyncio.run(bounded())


async def true(condition: Callable[[], object]) -> None:
    """Return once ``condition()`` is true. The loop goes on meanwhile."""
    await asyncio.to_thread(until, condition)


async def turns(number: int = 50) -> None:
    """Let the loop turn so often: whatever could go on has gone on by then."""
    for _ in range(number):
        await asyncio.sleep(0)


def is_at_rest(client: AsyncClient) -> bool:
    """Whether no call of the client runs, no connection is out, and no request is open."""
    db = client._client._db
    with db.begin() as conn:
        requests = conn.execute(sa.text("SELECT count(*) FROM embed_requests")).scalar_one()
    return not client._calls and db.pool.checkedout() == 0 and requests == 0  # type: ignore[attr-defined]


def number_vector(number: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.eye(1, DIMENSIONS, number, dtype=np.float32)


class Worker(threading.Thread):
    """A worker's stand-in: once it may, it answers requests for ``text 7`` with the unit vector 7."""

    def __init__(self, db: sa.Engine) -> None:
        super().__init__(daemon=True)
        self.may = threading.Event()
        self.ends = threading.Event()
        self._db = db

    def run(self) -> None:
        self.may.wait()
        while not self.ends.wait(0.001):
            with self._db.begin() as conn:
                while request := embed_requests.claim_next(conn):
                    vectors = np.concatenate([number_vector(int(text.split()[-1])) for text in request.texts])
                    embed_requests.answer(conn, request.id, vectors)


@pytest.fixture
def worker(db: sa.Engine) -> Iterator[Worker]:
    made = Worker(db)
    made.start()
    yield made
    made.ends.set()
    made.may.set()
    made.join(PATIENCE)


def embed(client: Client, job: Job, db: sa.Engine) -> None:
    """Give the text ``text 7`` of a job the unit vector 7, whoever it belongs to."""
    with db.begin() as conn:
        space = registry.all_spaces(conn)[0]
        texts = conn.execute(sa.text("SELECT content_hash, text FROM contents ORDER BY content_hash")).all()
        numbers = [
            int(row.text.decode().split()[-1] if isinstance(row.text, bytes) else row.text.split()[-1]) for row in texts
        ]
        write_vectors(
            conn,
            space,
            space.spec.fingerprint,
            [row.content_hash for row in texts],
            np.ones(len(texts), np.int32),
            np.zeros(len(texts), np.bool_),
            np.concatenate([number_vector(number) for number in numbers]),
        )


@pytest.fixture
def collections(client: Client, db: sa.Engine) -> tuple[str, str]:
    """Two collections, with the numbers below 50 and those from 50 on. All have vectors."""
    for name, first in (("low", 0), ("high", SEARCHES)):
        job = client.enqueue(((f"{name}-{n}", f"text {n}") for n in range(first, first + SEARCHES)), collection=name)
        embed(client, job, db)
    return "low", "high"


class Heart:
    """A coroutine that beats as often as the loop turns."""

    def __init__(self) -> None:
        self.beats = 0

    async def beat(self) -> None:
        while True:
            self.beats += 1
            await asyncio.sleep(0)

    async def beat_further(self, times: int = 100) -> None:
        """Return when it has beaten so many times more."""
        goal = self.beats + times
        while self.beats < goal:
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def heartbeat() -> AsyncIterator[Heart]:
    heart = Heart()
    task = asyncio.create_task(heart.beat())
    yield heart
    task.cancel()


# --- concurrency ---------------------------------------------------------------------------------------------------


def test_fifty_searches_wait_at_once_without_blocking_the_loop_and_get_their_own_hits(
    aio: AsyncClient, worker: Worker, hands: Hands, collections: tuple[str, str]
) -> None:
    async def scene() -> None:
        async with heartbeat() as heart, asyncio.TaskGroup() as group:
            searches = [
                group.create_task(aio.search(f"text {n}", collection=collections[n % 2], k=1, timeout=PATIENCE))
                for n in range(SEARCHES)
            ]
            # All of them are open before one is answered, though there are ten threads.
            await true(lambda: hands.rows("SELECT count(*) FROM embed_requests") == [(SEARCHES,)])
            await heart.beat_further()
            assert not any(search.done() for search in searches)
            # Nor do those who wait keep others out.
            assert [job.collection for job in await aio.jobs()] == ["high", "low"]
            worker.may.set()
        for n, search in enumerate(searches):
            (hit,) = search.result()
            if n % 2 == 0:
                assert (hit.chunk_id, round(hit.score, 3)) == (f"low-{n}", 1.0)
            else:
                assert hit.chunk_id.startswith("high-")
        ours = [
            thread for thread in threading.enumerate() if thread.name.startswith(("chunkmill-short", "chunkmill-long"))
        ]
        assert len(ours) <= 10

    run(scene())
    until(lambda: is_at_rest(aio))


def test_a_search_that_waits_has_neither_a_thread_nor_a_connection(
    aio: AsyncClient, hands: Hands, collections: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inquiry, "PATROL_SECONDS", 2 * PATIENCE)

    async def scene() -> None:
        searches = [asyncio.create_task(aio.search(f"text {n}", collection="low")) for n in range(SEARCHES)]
        await true(lambda: hands.rows("SELECT count(*) FROM embed_requests") == [(SEARCHES,)])
        await true(lambda: aio._client._db.pool.checkedout() == 0)  # type: ignore[attr-defined]
        assert len(await aio.jobs()) == 2
        for search in searches:
            search.cancel()
        await asyncio.wait(searches)
        assert is_at_rest(aio)

    run(scene())


def test_waits_for_more_jobs_than_there_are_threads_keep_nobody_out(
    aio: AsyncClient, client: Client, hands: Hands
) -> None:
    jobs = [client.enqueue([(f"{n}", f"text {n}")], collection=f"docs-{n}") for n in range(24)]

    async def scene() -> None:
        seen: set[int] = set()
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(cancelled(job.id, seen)) for job in jobs]
            await true(lambda: len(seen) == len(jobs))
            for job in jobs:
                assert (await aio.cancel(job.id)).state == "cancelled"
        assert [wait.result() for wait in waits] == [job.id for job in jobs]

    async def cancelled(job_id: int, seen: set[int]) -> int:
        with pytest.raises(JobCancelled) as raised:
            await aio.wait(job_id, on_progress=lambda job: seen.add(job.id))
        return raised.value.job_id

    run(scene())


def test_sources_may_search_with_the_client_that_enqueues_them(
    aio: AsyncClient, worker: Worker, collections: tuple[str, str]
) -> None:
    """Twelve enqueues hold all threads and connections that enqueues may have, and each waits for a search."""
    worker.may.set()

    async def chunks(name: str) -> AsyncIterator[tuple[str, str]]:
        for n in (3, 4):
            (hit,) = await aio.search(f"text {n}", collection="low", k=1, timeout=PATIENCE)
            yield f"{name} {hit.chunk_id}", hit.text

    async def scene() -> list[Job]:
        return list(await asyncio.gather(*(aio.enqueue(chunks(f"new-{n}"), collection=f"new-{n}") for n in range(12))))

    assert [job.chunks for job in run(scene())] == [2] * 12
    assert is_at_rest(aio)


# --- sources -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_invalid", ["raise", "skip"])
def test_an_asynchronous_source_is_enqueued_like_any_other(aio: AsyncClient, on_invalid: Any, hands: Hands) -> None:
    async def chunks() -> AsyncIterator[tuple[str, str]]:
        for n in range(1_000):
            yield f"c{n}", f"text {n % 700}"
            if n % 100 == 0:
                await asyncio.sleep(0)

    job = run(aio.enqueue(chunks(), collection="docs", on_invalid=on_invalid))
    assert (job.chunks, job.collection, job.state) == (1_000, "docs", "running")
    assert hands.rows("SELECT count(*), count(DISTINCT content_hash) FROM chunks") == [(1_000, 700)]
    assert run(aio.estimate(chunks(), on_invalid=on_invalid)).contents == 700


def test_a_source_is_read_no_faster_than_it_is_enqueued(aio: AsyncClient, client: Client, db: sa.Engine) -> None:
    first_window = 2 * client._settings.chunk_batch_size
    read = 0

    async def endless() -> AsyncIterator[tuple[str, str]]:
        nonlocal read
        for read in itertools.count():
            yield f"c{read}", f"text {read}"
            await asyncio.sleep(0)

    async def scene() -> None:
        async with heartbeat() as heart:
            with db.connect() as conn, conn.begin():
                conn.execute(sa.text("LOCK TABLE contents"))
                task = asyncio.create_task(aio.enqueue(endless(), collection="docs", on_invalid="skip"))
                await true(lambda: read >= first_window)
                await true(lambda: waits_for_lock(db))
                await heart.beat_further()
                before = read
                await heart.beat_further(1_000)
                assert read == before <= first_window + 2 * calls.AHEAD
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(scene())
    assert is_at_rest(aio)


def waits_for_lock(db: sa.Engine) -> bool:
    with db.begin() as conn:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return bool(conn.execute(sa.text(query)).scalar_one())


class Trouble(Exception):
    pass


def test_the_error_of_a_source_comes_out_as_it_is_and_nothing_is_written(aio: AsyncClient, hands: Hands) -> None:
    trouble = Trouble("the disk is gone")

    async def chunks() -> AsyncIterator[tuple[str, str]]:
        yield "a", "text 1"
        raise trouble

    def others() -> Iterator[tuple[str, str]]:
        yield "a", "text 1"
        raise trouble

    for source in (chunks, others):
        with pytest.raises(Trouble) as caught:
            run(aio.enqueue(source(), collection="docs"))
        assert caught.value is trouble
    assert hands.rows("SELECT count(*) FROM jobs") == [(0,)]
    assert is_at_rest(aio)


def test_a_source_that_is_cancelled_cancels_its_enqueue(aio: AsyncClient) -> None:
    async def chunks() -> AsyncIterator[tuple[str, str]]:
        yield "a", "text 1"
        raise asyncio.CancelledError

    async def scene() -> None:
        with pytest.raises(asyncio.CancelledError):
            await aio.enqueue(chunks(), collection="docs")

    run(scene())
    assert is_at_rest(aio)


def test_texts_to_embed_may_come_asynchronously(aio: AsyncClient, worker: Worker) -> None:
    worker.may.set()

    async def texts() -> AsyncIterator[str]:
        for n in (7, 8, 9):
            yield f"text {n}"

    assert run(aio.embed(texts(), timeout=PATIENCE)).argmax(axis=1).tolist() == [7, 8, 9]


# --- calls that are cancelled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["search", "embed"])
def test_a_cancelled_call_withdraws_what_it_asked_of_a_worker(
    verb: str, aio: AsyncClient, hands: Hands, collections: tuple[str, str]
) -> None:
    def call() -> Awaitable[object]:
        if verb == "search":
            return aio.search("text 3", collection="low", timeout=PATIENCE)
        return aio.embed(["text 300", "text 301"], timeout=PATIENCE)

    async def scene() -> None:
        cancelled, other = (asyncio.ensure_future(call()) for _ in range(2))
        await true(lambda: hands.rows("SELECT count(*) FROM embed_requests") == [(2,)])
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert hands.rows("SELECT count(*) FROM embed_requests") == [(1,)], "the other one still waits"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await other
        assert is_at_rest(aio)

    run(scene())


def test_a_call_that_is_cancelled_in_a_transaction_ends_with_it_and_not_before(
    aio: AsyncClient, hands: Hands, db: sa.Engine, collections: tuple[str, str]
) -> None:
    async def scene() -> None:
        with db.connect() as conn, conn.begin():
            conn.execute(sa.text("LOCK TABLE embed_requests"))
            task = asyncio.create_task(aio.search("text 3", collection="low", timeout=PATIENCE))
            await true(lambda: waits_for_lock(db))
            for _ in range(3):  # whoever is impatient cannot make it leak either
                task.cancel()
                await turns()
            assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_at_rest(aio)

    run(scene())


def test_a_call_that_is_cancelled_before_a_thread_is_free_does_nothing(
    aio: AsyncClient, hands: Hands, db: sa.Engine
) -> None:
    async def scene() -> None:
        with db.connect() as conn, conn.begin():
            conn.execute(sa.text("LOCK TABLE jobs"))
            busy = [asyncio.create_task(aio.jobs()) for _ in range(5)]
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            await true(lambda: hands.rows(query) == [(5,)])
            late = asyncio.create_task(aio.dead())
            await turns()
            late.cancel()
            with pytest.raises(asyncio.CancelledError):
                await late
        assert [await task for task in busy] == [[]] * 5

    run(scene())


@pytest.mark.parametrize("kind", ["asynchronous", "synchronous"])
@pytest.mark.parametrize("on_invalid", ["raise", "skip"])
def test_a_cancelled_enqueue_leaves_its_source_and_its_connection(
    kind: str, on_invalid: Any, aio: AsyncClient, hands: Hands, db: sa.Engine
) -> None:
    """What it committed stays, and the same key completes it."""
    read = threading.Event()
    ended: list[str] = []

    async def asynchronous() -> AsyncIterator[tuple[str, str]]:
        try:
            for n in itertools.count():
                yield f"c{n}", f"text {n}"
                if n == 2_000:
                    read.set()
                await asyncio.sleep(0)
        finally:
            ended.append(kind)

    def synchronous() -> Iterator[tuple[str, str]]:
        for n in itertools.count():
            yield f"c{n}", f"text {n}"
            if n == 2_000:
                read.set()

    async def scene() -> None:
        chunks = asynchronous() if kind == "asynchronous" else synchronous()
        task = asyncio.create_task(aio.enqueue(chunks, collection="docs", on_invalid=on_invalid, idempotency_key="k"))
        await true(read.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_at_rest(aio)
        assert ended == ([kind] if kind == "asynchronous" else [])
        states = [state for (state,) in hands.rows("SELECT state FROM jobs")]
        assert states == ([] if on_invalid == "raise" else ["enqueueing"])
        job = await aio.enqueue([("c1", "text 1")], collection="docs", idempotency_key="k")
        assert job.state == "running"
        assert job.id == hands.rows("SELECT min(id) FROM jobs")[0][0]

    run(scene())


def test_a_timeout_ends_a_wait_for_a_job(aio: AsyncClient, client: Client) -> None:
    job = client.enqueue([("a", "text 1")], collection="docs")

    async def scene() -> None:
        looked = asyncio.Event()
        task = asyncio.create_task(aio.wait(job.id, on_progress=lambda _: looked.set()))
        await looked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_at_rest(aio)

    run(scene())
    assert client.job(job.id).state == "running", "only the wait was cancelled"


# --- errors, functions, context ------------------------------------------------------------------------------------


def test_errors_keep_their_types(aio: AsyncClient, client: Client, db: sa.Engine, collections: tuple[str, str]) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        run(aio.search("text 1", collection="nowhere"))
    with pytest.raises(InvalidInput, match="k is 0"):
        run(aio.search("text 1", collection="low", k=0))
    with pytest.raises(InvalidInput, match="chunks"):
        run(aio.enqueue("a text", collection="docs"))
    with pytest.raises(InvalidChunk) as caught:
        run(aio.enqueue([("a", "one"), ("b", "")], collection="docs"))
    assert caught.value.position == 1
    with pytest.raises(WaitTimeout):
        run(aio.embed(["text 300"], timeout=0))
    with pytest.raises(NotFound):
        run(aio.wait(999))
    job = client.enqueue([("a", "text 300")], collection="docs")
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET state = 'failed', error = 'a test' WHERE id = :id"), {"id": job.id})
    with pytest.raises(JobFailed) as failed:
        run(aio.wait(job.id))
    assert failed.value.job_id == job.id
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE embed_requests RENAME TO gone"))
    with pytest.raises(StoreUnavailable, match="UndefinedTable"):
        run(aio.embed(["text 300"]))
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE gone RENAME TO embed_requests"))
    assert is_at_rest(aio)


def test_functions_are_called_in_the_loop_and_may_be_coroutines(aio: AsyncClient, client: Client) -> None:
    job = client.enqueue([("a", "text 1")], collection="docs")
    seen: list[tuple[str, int, object]] = []

    async def scene() -> None:
        loop = asyncio.get_running_loop()

        async def progress(job: Job) -> None:
            assert asyncio.get_running_loop() is loop
            seen.append(("progress", threading.get_ident(), (await aio.job(job.id)).id))
            if len(seen) > 3:
                await aio.cancel(job.id)

        def hindrance(sentence: str) -> None:
            assert asyncio.get_running_loop() is loop
            seen.append(("hindrance", threading.get_ident(), sentence))

        with pytest.raises(JobCancelled):
            await aio.wait(job.id, on_progress=progress, on_hindrance=hindrance)
        pruned = await aio.prune(
            0, on_progress=lambda what, done, of: seen.append(("prune", threading.get_ident(), what))
        )
        assert not pruned.dry_run

    run(scene())
    assert {ident for _, ident, _ in seen} == {threading.get_ident()}
    assert {"progress", "hindrance"} <= {what for what, _, _ in seen}


def test_an_error_of_a_function_ends_the_call_that_called_it(aio: AsyncClient, client: Client) -> None:
    job = client.enqueue([("a", "text 1")], collection="docs")
    trouble = Trouble("of the progress bar")

    async def progress(_: Job) -> None:
        raise trouble

    with pytest.raises(Trouble) as caught:
        run(aio.wait(job.id, on_progress=progress))
    assert caught.value is trouble
    assert is_at_rest(aio)


def test_context_variables_and_spans_reach_the_threads(aio: AsyncClient, client: Client) -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")
    seen: list[tuple[str, str]] = []

    def chunks(name: str) -> Iterator[tuple[str, str]]:
        seen.append((name, tenant.get()))
        yield name, f"text {name}"

    async def later(name: str) -> AsyncIterator[tuple[str, str]]:
        seen.append((name, tenant.get()))
        yield name, f"text {name}"

    async def one(name: str) -> None:
        tenant.set(name)
        await aio.enqueue(chunks(name), collection=name)
        await aio.enqueue(later(name), collection=name)

    async def scene() -> None:
        await asyncio.gather(one("first"), one("second"))

    run(scene())
    assert sorted(seen) == [("first", "first"), ("first", "first"), ("second", "second"), ("second", "second")]


def test_an_enqueue_is_traced_below_the_span_of_its_task(
    aio: AsyncClient, monkeypatch: pytest.MonkeyPatch, hands: Hands
) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    monkeypatch.setattr(tracing, "_tracer", lambda: tracer)

    async def one(name: str) -> str:
        with tracer.start_as_current_span(name) as span:
            await aio.enqueue([(name, f"text {name}")], collection=name)
            return format(span.get_span_context().trace_id, "032x")

    async def scene() -> list[str]:
        return list(await asyncio.gather(one("first"), one("second")))

    first, second = run(scene())
    query = """
        SELECT c.name, t.traceparent
        FROM job_traces t
        JOIN jobs j ON j.id = t.job_id
        JOIN collections c ON c.id = j.collection_id
    """
    traced = {name: parent.split("-")[1] for name, parent in hands.rows(query)}
    assert traced == {"first": first, "second": second}


# --- iterators -----------------------------------------------------------------------------------------------------


class Numbers:
    """Hands numbers out in a transaction, as a method that streams does."""

    def __init__(self, client: AsyncClient) -> None:
        self._db = client._client._db
        self.made = 0
        self.ended_in: str | None = None

    def below(self, limit: int) -> Iterator[int]:
        try:
            with self._db.begin() as conn:
                for number in range(limit):
                    self.made += 1
                    yield conn.execute(sa.text("SELECT CAST(:n AS int)"), {"n": number}).scalar_one()
        finally:
            self.ended_in = threading.current_thread().name

    def broken(self, limit: int) -> Iterator[int]:
        yield from self.below(limit)
        raise Trouble("at the end")


def waits_for_its_reader() -> bool:
    """Whether a thread with items for the loop waits until it may hand them over."""
    for frame in sys._current_frames().values():
        names = [where.f_code.co_name for where, _ in traceback.walk_stack(frame)]
        if "_hand_over" in names and names[0] == "wait":
            return True
    return False


def test_an_iterator_becomes_asynchronous_and_is_read_no_faster_than_it_is_taken(aio: AsyncClient) -> None:
    numbers = Numbers(aio)

    async def scene() -> None:
        taken: list[int] = []
        async with heartbeat() as heart:
            async for number in aio._items(numbers.below, 500):
                taken.append(number)
                assert numbers.made <= len(taken) + 2 * calls.AHEAD
                if len(taken) == 5:
                    await true(lambda: numbers.made > len(taken) and waits_for_its_reader())
                    before = numbers.made
                    await heart.beat_further(1_000)
                    assert numbers.made == before < 500
                    assert len(await aio.jobs()) == 0, "others are served meanwhile"
        assert taken == list(range(500))

    run(scene())
    assert is_at_rest(aio)


def test_chunks_and_vectors_are_read_asynchronously(aio: AsyncClient, collections: tuple[str, str]) -> None:
    async def scene() -> None:
        ids = sorted(f"low-{n}" for n in range(SEARCHES))
        assert [chunk.id async for chunk in aio.chunks("low")] == ids
        assert [len(names) async for names, _ in aio.iter_vectors("high", batch_size=20)] == [20, 20, 10]
        with pytest.raises(NotFound, match="nowhere"):
            await anext(aio.chunks("nowhere"))
        assert await aio.delete("low", filter={"none": 1}) == 0

    run(scene())
    until(lambda: is_at_rest(aio))


def test_an_iterator_that_is_left_early_ends_in_its_thread_and_gives_its_connection_back(aio: AsyncClient) -> None:
    numbers = Numbers(aio)

    async def scene() -> None:
        async with contextlib.aclosing(aio._items(numbers.below, 1_000_000)) as items:
            async for number in items:
                if number == 3:
                    break
        assert str(numbers.ended_in).startswith("chunkmill-long")
        assert is_at_rest(aio)
        task = asyncio.create_task(anext(aio._items(numbers.below, 1)))
        await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scene())
    until(lambda: is_at_rest(aio))


def test_an_error_of_an_iterator_comes_after_its_items(aio: AsyncClient) -> None:
    numbers = Numbers(aio)

    async def scene() -> None:
        taken = []
        with pytest.raises(Trouble):
            async for number in aio._items(numbers.broken, 3):
                taken.append(number)  # noqa: PERF401 - what came before the error counts
        assert taken == [0, 1, 2]

    run(scene())


# --- the life of a client ------------------------------------------------------------------------------------------


def test_closing_ends_the_calls_that_run_and_leaves_nothing(
    settings: Settings, client: Client, hands: Hands, collections: tuple[str, str]
) -> None:
    job = client.enqueue([("a", "text 1000")], collection="docs")
    numbers: list[Numbers] = []

    async def endless() -> AsyncIterator[tuple[str, str]]:
        yield "b", "text 2"
        await asyncio.Event().wait()

    async def scene() -> AsyncClient:
        async with AsyncClient(client_for(settings)) as aio:
            numbers.append(Numbers(aio))
            handed_out = aio._items(numbers[0].below, 1_000_000)
            assert await anext(handed_out) == 0
            looked = asyncio.Event()
            running = [
                asyncio.ensure_future(call)
                for call in (
                    aio.search("text 3", collection="low", timeout=PATIENCE),
                    aio.embed(["text 300"], timeout=PATIENCE),
                    aio.wait(job.id, on_progress=lambda _: looked.set()),
                    aio.enqueue(endless(), collection="new"),
                )
            ]
            await true(lambda: hands.rows("SELECT count(*) FROM embed_requests") == [(2,)])
            await looked.wait()
        for call in running:
            with pytest.raises(ClientClosed):
                await call
        with pytest.raises(ClientClosed):
            async for _ in handed_out:
                pass
        with pytest.raises(ClientClosed, match="from_env"):
            await aio.jobs()
        await aio.close()
        return aio

    aio = run(scene())
    assert hands.rows("SELECT count(*) FROM embed_requests") == [(0,)]
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'chunkmill-client' AND state LIKE 'idle in%'"
    )
    assert hands.rows(sessions) == [(0,)]
    assert aio._client._db.pool.checkedout() == 0  # type: ignore[attr-defined]
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("chunkmill-")])


def test_two_clients_share_a_loop_and_closing_one_leaves_the_other(
    settings: Settings, hands: Hands, collections: tuple[str, str]
) -> None:
    async def scene() -> None:
        async with AsyncClient(client_for(settings)) as stays:
            async with AsyncClient(client_for(settings)) as goes:
                ended, waits = (
                    asyncio.create_task(one.search("text 3", collection="low", timeout=PATIENCE))
                    for one in (goes, stays)
                )
                await true(lambda: hands.rows("SELECT count(*) FROM embed_requests") == [(2,)])
            with pytest.raises(ClientClosed):
                await ended
            assert not waits.done()
            assert hands.rows("SELECT count(*) FROM embed_requests") == [(1,)]
            assert await stays.enqueue([("a", "text 1")], collection="new")
            waits.cancel()

    run(scene())


def test_a_client_serves_two_loops_one_after_the_other_and_at_once(
    aio: AsyncClient, worker: Worker, collections: tuple[str, str]
) -> None:
    worker.may.set()

    async def searches(first: int) -> list[str]:
        calls = (aio.search(f"text {n}", collection="low", k=1, timeout=PATIENCE) for n in range(first, first + 10))
        return [hits[0].chunk_id for hits in await asyncio.gather(*calls)]

    results: dict[int, list[str]] = {}
    loops = [threading.Thread(target=lambda n=n: results.update({n: run(searches(n))})) for n in (0, 20)]  # type: ignore[misc]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join(PATIENCE)
    results[10] = run(searches(10))
    assert results == {first: [f"low-{n}" for n in range(first, first + 10)] for first in (0, 10, 20)}
    assert is_at_rest(aio)


def test_a_forked_process_uses_the_client_of_its_parent_in_a_loop_of_its_own(
    aio: AsyncClient, collections: tuple[str, str], hands: Hands
) -> None:
    query = number_vector(3)[0]

    async def scene(name: str) -> None:
        (hit,) = await aio.search(query, collection="low", k=1)
        assert hit.chunk_id == "low-3"
        assert (await aio.enqueue([(name, "text 1")], collection=name)).chunks == 1

    run(scene("before"))  # the parent has threads now, which the child has not
    children = []
    for name in ("child-1", "child-2"):
        pid = os.fork()
        if pid == 0:
            code = 1
            faulthandler.dump_traceback_later(PATIENCE, exit=True)  # a child that hangs would hang its parent
            try:
                run(scene(name))
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    run(scene("parent"))
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert hands.rows("SELECT count(*) FROM jobs") == [(6,)]


def test_the_interpreter_ends_although_a_call_runs(settings: Settings, hands: Hands, db: sa.Engine) -> None:
    """A loop that was stopped in the middle of an enqueue, as when the kernel of a notebook ends."""
    script = """
        import asyncio
        from chunkmill import AsyncClient

        async def endless():
            yield "a", "text 1"
            asyncio.get_running_loop().stop()
            await asyncio.Event().wait()

        async def main():
            client = await AsyncClient.from_env()
            await client.enqueue(endless(), collection="docs", on_invalid="skip")

        loop = asyncio.new_event_loop()
        task = loop.create_task(main())
        loop.run_forever()
        assert not task.done()
        print("the end", flush=True)
    """
    environment = {
        **os.environ,
        "DATABASE_URL": settings.require_database_url(),
        "REDIS_URL": settings.require_redis_url(),
        "PYTHONPATH": str(ROOT / "app"),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'chunkmill-client'"
    until(lambda: hands.rows(sessions) == [(0,)])


def test_from_env_connects_without_blocking_the_loop_and_says_what_is_wrong(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())

    async def scene() -> None:
        async with heartbeat() as heart, await AsyncClient.from_env() as client:
            assert heart.beats > 1
            assert await client.collections() == []
            assert repr(client).startswith("AsyncClient(database='postgresql+psycopg://")
        monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@/nothing?host=/nonexistent")
        with pytest.raises(StoreUnavailable, match="cannot connect"):
            await AsyncClient.from_env()

    run(scene())


def test_golden_queries_are_read_and_written_beside_the_loop(aio: AsyncClient, tmp_path: Path) -> None:
    """The file of the queries is a pipe that nobody has opened for writing yet, so that to read it blocks."""
    queries, judgements = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    os.mkfifo(queries)
    judgements.write_text("query-id\tcorpus-id\tscore\nq1\ta\t1\n")

    async def story() -> None:
        await aio.enqueue([("a", "a text")], collection="docs")
        golden = await aio.golden("docs")
        assert repr(golden) == "AsyncGoldenQueries('docs')"
        loading = asyncio.create_task(golden.load(queries, judgements))
        await true(lambda: aio._calls)
        await turns()
        assert not loading.done()
        await asyncio.to_thread(queries.write_text, '{"_id": "q1", "text": "a query"}\n')
        assert (await loading).queries == await golden.count() == 1
        assert [query.id for query in await golden.list()] == ["q1"]
        assert await golden.clear() == 1

    run(story())


def test_what_is_no_client_is_refused_without_a_word_of_it() -> None:
    with pytest.raises(InvalidInput, match=r"client is of type str; .* await AsyncClient\.from_env\(\)") as refused:
        AsyncClient("postgresql://user:secret@host/db")  # type: ignore[arg-type]
    assert "secret" not in str(refused.value)
    with pytest.raises(TypeError, match=r"AsyncClient\.__init__\(\) missing .* 'client'"):
        AsyncClient()  # type: ignore[call-arg]
