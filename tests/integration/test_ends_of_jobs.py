"""Whoever waits for a job hears of its end from Postgres, and looks by itself only if it cannot hear."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from functools import partial

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill import AsyncClient, Client
from chunkmill.client import ends
from chunkmill.client.ends import Ends, ends_of
from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState
from chunkmill.errors import ClientClosed, JobCancelled, JobFailed, NotFound, StoreLimit, StoreUnavailable
from chunkmill.ledger.jobs import recover
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, Call, until


@pytest.fixture
def jobs(client: Client) -> tuple[Job, Job]:
    first, second = (client.enqueue([(name, f"text {name}")], collection=name) for name in ("one", "other"))
    return first, second


@pytest.fixture
def hears(client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """The listener of the client. It alone can let a call go on: a look of the call's own never comes."""
    monkeypatch.setattr(ends, "FIRST_REST_S", 10_000.0)
    monkeypatch.setattr(ends, "LONGEST_REST_S", 20_000.0)
    yield ends_of(client._db)


def listening(db: sa.Engine) -> int:
    """The session of the listener; 0 if there is none."""
    query = "SELECT coalesce(max(pid), 0) FROM pg_stat_activity WHERE query = 'LISTEN chunkmill_ended'"
    with db.begin() as conn:
        return int(conn.execute(sa.text(query)).scalar_one())


def waiting_for(client: Client, job: Job) -> Call:
    return Call(partial(client.wait, job.id))


def rests(hears: Ends) -> bool:
    """A call waits for nothing but a notification."""
    return hears.are_heard and any(watch._rest == ends.LONGEST_REST_S for watch in hears._watches)


def reads(client: Client) -> list[str]:
    """The statements that read jobs, from now on."""
    seen: list[str] = []

    @sa.event.listens_for(client._db, "before_cursor_execute")
    def _see(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        if "FROM jobs" in statement:
            seen.append(statement)

    return seen


def test_a_wait_hears_of_the_end_and_reads_the_job_only_a_few_times(
    jobs: tuple[Job, Job], client: Client, hands: Hands, hears: Ends
) -> None:
    seen = reads(client)
    waiting = waiting_for(client, jobs[0])
    until(lambda: rests(hears))
    before = len(seen)
    hands.embed(hands.claim(hands.of_job(jobs[1].id)[0]), {})  # the end of another job wakes nobody
    assert client.job(jobs[1].id).state is JobState.COMPLETED
    hands.work()
    assert waiting.result().state is JobState.COMPLETED
    assert len(seen) - before == 2  # that of this test, and the last one
    assert not hears._watches


def test_an_asynchronous_wait_hears_of_it_too(jobs: tuple[Job, Job], client: Client, hands: Hands, hears: Ends) -> None:
    async def both() -> list[Job]:
        asynchronous = AsyncClient(client)
        waits = [asyncio.create_task(asynchronous.wait(job.id)) for job in jobs]
        while len(hears._watches) < 2 or not rests(hears):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(hands.work)
        ended = list(await asyncio.gather(*waits))
        await asynchronous.close()
        return ended

    assert [job.state for job in asyncio.run(both())] == [JobState.COMPLETED] * 2


@pytest.mark.parametrize("way", ["cancel", "fail", "abandon"])
def test_every_end_is_told(
    way: str, jobs: tuple[Job, Job], client: Client, hands: Hands, hears: Ends, db: sa.Engine
) -> None:
    waiting = waiting_for(client, jobs[0])
    until(lambda: rests(hears))
    if way == "cancel":
        client.cancel(jobs[0].id)
    elif way == "fail":
        hands.work(dead={"text one": "text_kills"})
    else:
        with db.begin() as conn:
            conn.execute(sa.text("UPDATE jobs SET state = 'enqueueing' WHERE id = :id"), {"id": jobs[0].id})
            recover.fail_abandoned(conn)
    with pytest.raises(JobFailed) as raised:
        waiting.result()
    assert isinstance(raised.value, JobCancelled) is (way == "cancel")


def test_a_listener_that_loses_its_connection_makes_another_and_misses_no_end(
    jobs: tuple[Job, Job], client: Client, hands: Hands, hears: Ends, db: sa.Engine,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    waiting = waiting_for(client, jobs[0])
    until(lambda: rests(hears))
    first = listening(db)
    hands.rows("SELECT pg_terminate_backend(:pid)", pid=first)
    until(lambda: listening(db) not in (0, first))
    until(lambda: hears.are_heard)
    assert "cannot hear when jobs end" in caplog.text
    again = waiting_for(client, jobs[1])
    until(lambda: sum(watch._rest == ends.LONGEST_REST_S for watch in hears._watches) == 2)
    # And an end while nobody listens.
    monkeypatch.setattr(ends, "open_alone", _refuse)
    hands.rows("SELECT pg_terminate_backend(:pid)", pid=listening(db))
    until(lambda: not hears.are_heard)
    hands.work()
    assert [call.result().state for call in (waiting, again)] == [JobState.COMPLETED] * 2


def _refuse(_db: object) -> None:
    raise psycopg.OperationalError("no connection is left")


def test_behind_a_pooler_that_passes_nothing_on_a_call_looks_by_itself_which_is_said_once(
    jobs: tuple[Job, Job], client: Client, hands: Hands, hears: Ends,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(ends, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(ends, "ENDED_CHANNEL", "elsewhere; UNLISTEN *")
    waits = [waiting_for(client, job) for job in jobs]
    until(lambda: "notifications of Postgres do not arrive" in caplog.text)
    hands.work()
    assert [call.result().state for call in waits] == [JobState.COMPLETED] * 2
    assert caplog.text.count("do not arrive") == 1
    assert not hears.are_heard


def test_on_the_schema_of_the_last_release_a_call_looks_by_itself(
    jobs: tuple[Job, Job], client: Client, hands: Hands, hears: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, ends.logger.name)
    with hands.db.begin() as conn:
        conn.execute(sa.text("DROP TRIGGER tell_job_ended ON jobs"))
    waiting = waiting_for(client, jobs[0])
    until(lambda: hears._watches)
    hands.work()
    assert waiting.result().state is JobState.COMPLETED


@pytest.mark.parametrize("error", [StoreUnavailable, StoreLimit])
def test_a_wait_goes_on_after_postgres_was_away(
    error: type[StoreUnavailable], jobs: tuple[Job, Job], client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not if a setting of Postgres ended it, or if Postgres is away from the start."""
    monkeypatch.setattr("chunkmill.client.jobs.RECONNECT_SECONDS", 0.0)
    real, looks, said = client._job_now, iter(range(1000)), []

    def job(job_id: int) -> Job:
        look = next(looks)
        if look in away:
            raise error("cannot connect.")
        if look == 3:
            hands.work()
        return real(job_id)

    monkeypatch.setattr(client, "_job_now", job)
    away = {0}
    with pytest.raises(error):
        client.wait(jobs[0].id)
    away, looks = {1, 2}, iter(range(1000))
    if error is StoreLimit:
        with pytest.raises(StoreLimit):
            client.wait(jobs[0].id, on_hindrance=said.append)
        return
    assert client.wait(jobs[0].id, on_hindrance=said.append).state is JobState.COMPLETED
    assert sum(sentence.startswith("cannot connect") for sentence in said) == 1


def test_a_wait_ends_if_postgres_stays_away(
    jobs: tuple[Job, Job], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkmill.client.jobs.AWAY_SECONDS", -1.0)
    real, looks = client._job_now, iter(range(1000))

    def job(job_id: int) -> Job:
        if next(looks) == 0:
            return real(job_id)
        raise StoreUnavailable("cannot connect")

    monkeypatch.setattr(client, "_job_now", job)
    with pytest.raises(StoreUnavailable):
        client.wait(jobs[0].id)


def test_a_future_is_fulfilled_when_its_job_ends(
    jobs: tuple[Job, Job], client: Client, hands: Hands, hears: Ends
) -> None:
    told: list[JobState] = []
    futures: list[Future[Job]] = [client.end_of(job.id) for job in (*jobs, jobs[0])]
    for future in futures:
        future.add_done_callback(lambda done: told.append(done.result().state))
    until(lambda: rests(hears))
    hands.work(dead={"text other": "text_kills"})
    assert [future.result(PATIENCE).state for future in futures] == [
        JobState.COMPLETED, JobState.FAILED, JobState.COMPLETED,
    ]  # fmt: skip
    until(lambda: len(told) == 3)
    assert client.end_of(jobs[1].id).result(0).state is JobState.FAILED
    until(lambda: not hears._watches)
    later = client.enqueue([("later", "text later")], collection="one")
    after = client.end_of(later.id)
    until(lambda: rests(hears))
    hands.work()
    assert after.result(PATIENCE).id == later.id


def test_a_future_ends_with_its_client_its_job_or_its_owner(
    jobs: tuple[Job, Job], client: Client, db: sa.Engine, hears: Ends
) -> None:
    with pytest.raises(NotFound):
        client.end_of(99_999)
    forgotten, deleted, left = client.end_of(jobs[0].id), client.end_of(jobs[0].id), client.end_of(jobs[1].id)
    until(lambda: rests(hears))
    forgotten.cancel()
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET state = 'cancelled' WHERE id = :id"), {"id": jobs[0].id})
        conn.execute(sa.text("DELETE FROM job_streams WHERE job_id = :id"), {"id": jobs[0].id})
        conn.execute(sa.text("DELETE FROM chunk_batches WHERE job_id = :id"), {"id": jobs[0].id})
        conn.execute(sa.text("UPDATE chunks SET job_id = :to WHERE job_id = :id"), {"id": jobs[0].id, "to": jobs[1].id})
        conn.execute(sa.text("DELETE FROM jobs WHERE id = :id"), {"id": jobs[0].id})
    with pytest.raises(NotFound):
        deleted.result(PATIENCE)
    with pytest.raises(CancelledError):
        forgotten.result(0)
    assert not left.done()
    client.close()
    with pytest.raises(ClientClosed):
        left.result(0)


def test_a_forked_process_waits_and_has_futures_of_its_own(
    jobs: tuple[Job, Job], client: Client, hands: Hands, hears: Ends
) -> None:
    """Of what its parent waits for, it knows nothing."""
    parents = client.end_of(jobs[0].id)
    until(lambda: rests(hears))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own = client.end_of(jobs[1].id)
            until(lambda: rests(ends_of(client._db)))
            hands.db.dispose(close=False)
            hands.embed(hands.claim(hands.of_job(jobs[1].id)[0]), {})
            code = 0 if own.result(PATIENCE).state is JobState.COMPLETED else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    hands.work()
    assert parents.result(PATIENCE).state is JobState.COMPLETED


def test_an_end_between_two_connections_is_seen_by_the_second(
    jobs: tuple[Job, Job], client: Client, hears: Ends
) -> None:
    """Who looked before the connection listened is told to look once more."""
    watch = ends.Watch(hears, [jobs[0].id])
    hears.add(client._db, watch)
    until(lambda: hears.are_heard)
    assert watch.signal.is_given
    hears.remove(watch)
