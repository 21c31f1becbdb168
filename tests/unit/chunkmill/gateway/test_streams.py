"""What lasts: one look for all who follow a job, places that are given back, and readers who stand still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState
from chunkmill.errors import NotFound
from chunkmill.gateway import streams
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.streams import StreamedResponse, Streams
from tests.support.waiting import PATIENCE
from tests.unit.chunkmill.gateway.test_shapes import JOB

Result = TypeVar("Result")


def run(call: Awaitable[Result]) -> Result:
    async def bounded() -> Result:
        async with asyncio.timeout(PATIENCE):
            return await call

    return asyncio.run(bounded())


class Row:
    """A job as it is in the database; each look counts."""

    def __init__(self) -> None:
        self.job: Job | Exception = JOB
        self.looks: list[int] = []

    async def look(self, job_id: int) -> Job:
        self.looks.append(job_id)
        if isinstance(self.job, Exception):
            raise self.job
        return replace(self.job, id=job_id)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Row:
    monkeypatch.setattr(streams, "LOOK_SECONDS", 0.001)
    return Row()


async def all_of(following: AsyncGenerator[Job | None, None]) -> list[Job | None]:
    return [news async for news in following]


def test_who_follows_a_job_hears_when_something_hinders_it_and_when_it_is_over(row: Row) -> None:
    async def scene() -> None:
        following = Streams().follow(1, row.look)
        told = []
        for hindrance in (None, "No worker is connected", None):
            row.job = replace(JOB, hindrance=hindrance)
            told.append(await anext(following))
        assert [job and job.hindrance for job in told] == [None, "No worker is connected", None]
        await following.aclose()

    run(scene())


def test_many_followers_of_a_job_cost_one_look(row: Row) -> None:
    async def scene() -> None:
        own = Streams()
        followers = [own.follow(job_id, row.look) for job_id in (1, 1, 1, 2)]
        first = [await anext(follower) for follower in followers]
        assert [job and job.id for job in first] == [1, 1, 1, 2]
        assert len(own._watches) == 2
        before = list(row.looks)
        row.job = replace(JOB, embedded=2)
        second = [await anext(follower) for follower in followers]
        assert [job and job.embedded for job in second] == [2, 2, 2, 2]
        assert before.count(1) == 1
        for follower in followers[1:]:
            await follower.aclose()
        row.job = replace(JOB, state=JobState.FAILED)
        rest = await all_of(followers[0])
        assert [job and job.state for job in rest] == [JobState.FAILED]
        assert (own._watches, own._followers) == ({}, 0)

    run(scene())


def test_a_job_that_is_followed_again_is_looked_at_again(row: Row) -> None:
    async def scene() -> None:
        own = Streams()
        for state in (JobState.COMPLETED, JobState.CANCELLED):
            row.job = replace(JOB, state=state)
            assert [job and job.state for job in await all_of(own.follow(1, row.look))] == [state]

    run(scene())


def test_an_error_reaches_every_follower(row: Row) -> None:
    async def scene() -> None:
        own = Streams()
        followers = [own.follow(1, row.look) for _ in range(2)]
        for follower in followers:
            await anext(follower)
        row.job = NotFound("it was pruned")
        for follower in followers:
            with pytest.raises(NotFound):
                await anext(follower)
        assert own._watches == {}

    run(scene())


def test_a_stream_ends_when_the_gateway_leaves(row: Row) -> None:
    async def scene() -> None:
        leaving: list[bool] = []
        following = Streams().follow(1, row.look, leaving=lambda: bool(leaving))
        await anext(following)
        leaving.append(True)
        assert await all_of(following) == []

    run(scene())


def test_places_are_counted(monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    monkeypatch.setattr(streams, "MOST_LONG", 2)
    monkeypatch.setattr(streams, "MOST_FOLLOWERS", 1)

    async def scene() -> None:
        own = Streams()
        with own.one_more(), own.one_more():
            with pytest.raises(Refusal) as refused, own.one_more():
                pass
            assert (refused.value.status, refused.value.retry_after) == (429, 2.0)
        with own.one_more():
            own.require_room()
        following = own.follow(1, row.look)
        await anext(following)
        with pytest.raises(Refusal):
            own.require_room()
        await following.aclose()
        own.require_room()

    run(scene())


def test_a_reader_who_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALL_SECONDS", 0.01)
    ended: list[str] = []

    async def parts() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
        finally:
            ended.append("parts")

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def scene() -> None:
        answer = await StreamedResponse.of(parts(), media_type="text/plain", ends=lambda: ended.append("place"))
        with pytest.raises(TimeoutError):
            await answer({"type": "http", "method": "GET"}, receive, stuck)

    run(scene())
    assert ended == ["parts", "place"]


def test_an_error_before_the_first_part_is_raised_and_gives_the_place_back() -> None:
    ended: list[bool] = []

    async def parts() -> AsyncGenerator[bytes, None]:
        if not ended:
            raise NotFound("nothing there")
        yield b""

    async def scene() -> None:
        with pytest.raises(NotFound):
            await StreamedResponse.of(parts(), media_type="text/plain", ends=lambda: ended.append(True))

    run(scene())
    assert ended == [True]
