"""Who waits for a job is told what is known to hinder it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from chunkmill.cli.jobs import jobs as command
from chunkmill.cli.output import Screen
from chunkmill.client import Client
from chunkmill.client import jobs as of_client
from chunkmill.db.connect import create_db
from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState, Route
from chunkmill.errors import WaitTimeout
from chunkmill.ledger.provider import provider_lanes
from chunkmill.ledger.work import chunk_batches
from chunkmill.monitor import reports
from chunkmill.monitor.reports import Kind, Report
from chunkmill.settings import Settings
from chunkmill_workers.process.lease import owner_name
from chunkmill_workers.supervisor.supervisor import TakeBack
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, until


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
    assert "ChunkBatch 1 will be tried again, because attempt 1 of 5 failed: host:1: precision int8 needs a C" in said
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
    assert "To start one: chunkmill poller. No worker is connected" in timed_out(client, jobs[0])
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


REPORT = Report("host:7", "local", "gpu0-7@host", "gpu0", datetime.now(UTC), 60.0, 0, 0, 0, 0.0, 0)


@pytest.mark.parametrize(
    ("kind", "seconds_ago", "is_there"),
    [("local", 0, True), ("both", 0, True), ("provider", 0, False), ("local", 30, False)],
)
def test_a_worker_that_reports_is_there_although_a_pooler_hides_whose_its_connections_are(
    kind: Kind, seconds_ago: int, is_there: bool, jobs: tuple[Job, Job], client: Client, db: sa.Engine
) -> None:
    with db.begin() as conn:
        reports.write(conn, replace(REPORT, kind=kind))
        conn.execute(
            sa.text("UPDATE worker_reports SET seen_at = now() - make_interval(secs => :age)"), {"age": seconds_ago}
        )
    assert ("No worker is connected" in timed_out(client, jobs[0])) is not is_there


def test_a_worker_that_is_being_started_is_not_missed(
    jobs: tuple[Job, Job], client: Client, settings: Settings, db: sa.Engine
) -> None:
    engine = create_db(settings.require_database_url(), role="supervisor", pool_size=1)
    supervisor = TakeBack(engine)
    until(lambda: "A worker is starting" in timed_out(client, jobs[0]), lambda: timed_out(client, jobs[0]))
    assert "No worker is connected" not in timed_out(client, jobs[0])
    # It forgets a worker that it sees die, instead of showing it as silent.
    with db.begin() as conn:
        for pid in (7, 8):
            reports.write(conn, replace(REPORT, name=owner_name(pid)))
    supervisor.report(7, "killed by SIGKILL")

    def left() -> list[str]:
        with db.begin() as conn:
            return [report.name for report in reports.read(conn)]

    until(lambda: left() == [owner_name(8)], left)
    supervisor.close(PATIENCE)
    engine.dispose()


def test_a_lane_that_is_stopped_is_said_with_what_to_do_once(
    client: Client, jobs: tuple[Job, Job], db: sa.Engine
) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET route = 'openai' WHERE id = :id"), {"id": jobs[0].id})
        for route, code in ((Route.OPENAI, "invalid_api_key"), (Route.OPENAI_SYNC, "model_not_found")):
            reason = "Fix OPENAI_API_KEY. The lane stays stopped until: chunkmill lanes resume"
            provider_lanes.stop(conn, route, code=code, reason=reason)
    said = timed_out(client, jobs[0])
    assert said.count("chunkmill lanes resume openai") == said.count("chunkmill lanes resume") == 1
    assert "Lane openai is stopped since" in said
    assert "invalid_api_key: Fix OPENAI_API_KEY" in said
    assert "No worker is connected, so nothing is embedded. To start one, which takes some 20 s: celery" in said
    assert "lanes resume" not in timed_out(client, jobs[1])


@pytest.mark.parametrize("code", ["invalid_setting", "model_load", "provider_stopped"])
def test_what_nobody_is_charged_for_has_no_number_of_attempts(
    code: str, jobs: tuple[Job, Job], client: Client, hands: Hands, db: sa.Engine
) -> None:
    with db.begin() as conn:
        chunk_batches.release_if_held(conn, hands.claim(1), code=code, error="host:1: it cannot be.")
    said = timed_out(client, jobs[0])
    waits_for = "the provider" if code == "provider_stopped" else "a worker that can embed it"
    assert f"ChunkBatch 1 waits for {waits_for}: host:1: it cannot be. No poller" in said
    assert "attempt" not in said


def test_a_search_that_gets_no_answer_says_whether_a_worker_is_there(
    client: Client, jobs: object, settings: Settings
) -> None:
    with pytest.raises(WaitTimeout, match=r"No worker is connected.*: chunkmill worker"):
        client.search("text", collection="one", timeout=0.01)
    engine = create_db(settings.require_database_url(), role="worker")
    with engine.connect(), pytest.raises(WaitTimeout, match="One is connected, so allow more time"):
        client.search("text", collection="one", timeout=0.01)
    engine.dispose()


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
    assert noted == ["ChunkBatch 1 will be tried again, because attempt 1 of 5 failed: host:1: no such kernel"]
