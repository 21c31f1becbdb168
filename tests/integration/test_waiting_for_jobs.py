"""Who waits for a job is told what is known to hinder it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import sqlalchemy as sa

from chunkmill.cli.jobs import jobs as command
from chunkmill.cli.output import Screen
from chunkmill.client import Client
from chunkmill.client import jobs as of_client
from chunkmill.db.connect import create_db
from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState
from chunkmill.errors import WaitTimeout
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE


@pytest.fixture
def jobs(client: Client) -> tuple[Job, Job]:
    first, second = (client.enqueue([(name, f"text {name}")], collection=name) for name in ("one", "other"))
    return first, second


@pytest.fixture
def connected(settings: Settings) -> Iterator[list[sa.Connection]]:
    """A poller and a worker are connected to Postgres."""
    with ExitStack() as stack:
        engines = [create_db(settings.require_database_url(), role=role) for role in ("poller", "worker")]
        yield [stack.enter_context(engine.connect()) for engine in engines]
    for engine in engines:
        engine.dispose()


def timed_out(client: Client, job: Job) -> str:
    with pytest.raises(WaitTimeout) as caught:
        client.wait(job.id, timeout=0)
    return str(caught.value)


def test_a_failure_that_is_known_is_in_the_timeout(
    jobs: tuple[Job, Job], client: Client, hands: Hands, connected: object
) -> None:
    hands.fail(hands.claim(1), error="host:1: precision int8 needs a CPU with AVX512-VNNI")
    said = timed_out(client, jobs[0])
    assert "ChunkBatch 1 is available after attempt 1 of 5: host:1: precision int8 needs a CPU" in said
    assert "No poller" not in said
    assert "No worker" not in said
    other = timed_out(client, jobs[1])
    assert "int8" not in other
    assert "chunkmill status" in other


@pytest.mark.parametrize("role", ["poller", "worker"])
def test_that_nobody_is_connected_is_in_the_timeout(
    role: str, jobs: tuple[Job, Job], client: Client, settings: Settings
) -> None:
    assert "No poller is connected" in timed_out(client, jobs[0])
    assert "chunkmill poller. No worker is connected" in timed_out(client, jobs[0])
    engine = create_db(settings.require_database_url(), role=role)
    with engine.connect():
        said = timed_out(client, jobs[0])
    engine.dispose()
    assert ("No poller is connected" in said) is (role == "worker")
    assert ("No worker is connected" in said) is (role == "poller")


def test_that_texts_were_cut_is_said_at_the_end_of_a_wait_unless_the_caller_shows_it(
    jobs: tuple[Job, Job], client: Client, hands: Hands, caplog: pytest.LogCaptureFixture
) -> None:
    hands.work()
    client.wait(jobs[0].id)
    assert not caplog.messages
    hands.rows("UPDATE chunk_batches SET n_truncated = 1 WHERE job_id = :id RETURNING 1", id=jobs[1].id)
    client.wait(jobs[1].id, on_hindrance=print)
    assert not caplog.messages
    client.wait(jobs[0].id)
    client.wait(jobs[1].id)
    (said,) = caplog.messages
    assert said.startswith(f"job {jobs[1].id}: 1 text is longer than the model reads")


def test_what_hinders_a_job_is_said_while_it_is_waited_for_and_once(
    jobs: tuple[Job, Job],
    client: Client,
    hands: Hands,
    connected: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(of_client, "HINDRANCE_SECONDS", 0.0)
    hands.fail(hands.claim(1), error="the first reason")
    said: list[str] = []
    looks = iter(range(100))

    def look(job: Job) -> None:
        number = next(looks)
        if number == 3:
            hands.fail(hands.claim(1), error="the second reason")
        elif number == 6:
            hands.work()

    assert client.wait(jobs[0].id, timeout=PATIENCE, on_progress=look, on_hindrance=said.append).state is (
        JobState.COMPLETED
    )
    assert [("first" in sentence, "second" in sentence) for sentence in said] == [(True, False), (False, True)]
    assert caplog.records == []


def test_without_a_function_what_hinders_a_job_is_a_warning(
    jobs: tuple[Job, Job], client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for a wait without an end, which would go on in silence."""
    ended = threading.Thread(target=lambda: client.wait(jobs[0].id, on_progress=lambda _: caplog.records and stop()))

    def stop() -> None:
        client.cancel(jobs[0].id)

    ended.start()
    ended.join(PATIENCE)
    assert not ended.is_alive()
    [record] = caplog.records
    assert f"job {jobs[0].id}: No poller is connected" in record.getMessage()


def test_the_command_shows_it_under_the_bar(
    jobs: tuple[Job, Job], client: Client, hands: Hands, connected: object, capsys: pytest.CaptureFixture[str]
) -> None:
    hands.fail(hands.claim(1), error="host:1: no such kernel")
    looks = iter(range(100))

    def look() -> None:
        if next(looks) == 2:
            hands.work()

    assert command.follow(Screen(as_json=False), client, jobs[0].id, on_look=look).state is JobState.COMPLETED
    noted = [line["note"] for line in map(json.loads, capsys.readouterr().err.splitlines()) if "note" in line]
    assert noted == ["ChunkBatch 1 is available after attempt 1 of 5: host:1: no such kernel"]
