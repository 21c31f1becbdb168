"""Batchers on a real database: for threads, and for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import AsyncClient, Client, InvalidChunk, InvalidInput, Job, StoreUnavailable, UnknownModel
from chunkmill.client.batcher import Enqueue
from tests.integration.test_async_client import aio, is_at_rest, run, true  # noqa: F401 - aio is a fixture


def losing_one_answer(enqueue: Enqueue) -> Enqueue:
    """``enqueue``, whose first answer is lost."""
    lost = threading.Event()

    def call(chunks: Sequence[object], key: str) -> Job:
        job = enqueue(chunks, key)
        if not lost.is_set():
            lost.set()
            raise StoreUnavailable("the connection broke")
        return job

    return call


def test_documents_that_come_one_by_one_become_few_jobs_and_a_lost_answer_makes_no_second(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkmill.client.batcher.FIRST_PAUSE_S", 0.01)
    with client.batcher("docs", max_chunks=4, max_seconds=1_000, priority="high") as add:
        monkeypatch.setattr(add, "_enqueue", losing_one_answer(add._enqueue))
        for number in range(10):
            add(number, f"text {number}", {"n": number})
    jobs = sorted(client.jobs(), key=lambda job: job.id)
    assert [job.id for job in jobs] == add.jobs
    assert [(job.chunks, job.priority, job.collection) for job in jobs] == [
        (4, "high", "docs"),
        (4, "high", "docs"),
        (2, "high", "docs"),
    ]
    assert client.count("docs", filter={"n": 7}) == 1


def test_bad_chunks_that_are_skipped_are_on_the_dead_list_of_their_job(client: Client) -> None:
    with client.batcher("docs", on_invalid="skip") as add:
        add("a", "a text")
        add("b", " ")
    (job_id,) = add.jobs
    assert [dead.chunk_id for dead in client.dead_chunks(job_id)] == ["b"]


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"collection": ""}, InvalidInput, "collection"),
        ({"max_chunks": 0}, InvalidInput, "max_chunks"),
        ({"max_bytes": 2**60}, InvalidInput, "max_bytes"),
        ({"max_seconds": -1}, InvalidInput, "max_seconds"),
        ({"on_invalid": "ask"}, InvalidInput, "on_invalid"),
        ({"model": "/nothing"}, UnknownModel, "/nothing"),
        ({"deadline": datetime.now(UTC) + timedelta(1)}, InvalidInput, "one moment for all jobs"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_first_chunk(
    given: dict[str, Any], kind: type[Exception], says: str, client: Client
) -> None:
    with pytest.raises(kind, match=says):
        client.batcher(**{"collection": "docs"} | given)


def test_an_async_batcher_adds_without_a_thread_and_waits_for_room_in_the_loop(
    aio: AsyncClient,  # noqa: F811
    db: sa.Engine,
) -> None:
    async def story() -> list[Job]:
        async with aio.batcher("docs", max_chunks=2, max_seconds=1_000) as add:
            blocker = db.connect()
            blocker.execute(sa.text("LOCK TABLE chunks"))
            for number in range(4):
                await add(number, f"text {number}")
            with pytest.raises(InvalidChunk):
                await add("bad", "")
            waiting = asyncio.create_task(add(4, "text 4"))
            await true(lambda: waiting.done() or add._batcher._signals)
            assert not waiting.done()
            assert len(add.rest()) == 4
            blocker.rollback()
            blocker.close()
            await waiting
            await add.flush()
            assert (add.added, add.enqueued, add.rest()) == (5, 5, [])
            await add("last", "one more text")
        assert repr(add) == "AsyncBatcher(added=6, enqueued=6)"
        assert len(add.jobs) == 4
        return list(await aio.jobs())

    assert sorted(job.chunks for job in run(story())) == [1, 1, 2, 2]
    assert is_at_rest(aio)


def test_a_task_that_is_cancelled_while_it_waits_for_room_leaves_the_batcher_as_it_was(
    aio: AsyncClient,  # noqa: F811
    db: sa.Engine,
) -> None:
    async def story() -> None:
        async with aio.batcher("docs", max_chunks=1, max_seconds=1_000) as add:
            with db.connect() as blocker:
                blocker.execute(sa.text("LOCK TABLE chunks"))
                await add("a", "a text")
                await true(lambda: add._batcher._sending)
                await add("b", "b text")
                waiting = asyncio.create_task(add("c", "c text"))
                await true(lambda: add._batcher._signals)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                blocker.rollback()
        assert await aio.count("docs") == 2

    run(story())


def test_an_async_batcher_checks_its_arguments_when_it_begins(aio: AsyncClient) -> None:  # noqa: F811
    async def story() -> None:
        with pytest.raises(InvalidInput, match="max_chunks"):
            async with aio.batcher("docs", max_chunks=0):
                pass
        with pytest.raises(RuntimeError, match="async with"):
            await aio.batcher("docs")("a", "text")

    run(story())
