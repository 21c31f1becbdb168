"""Who waits for a job is told what is known to hinder it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime

import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from rich.console import Console

from chunkmill.cli.__main__ import cli
from chunkmill.cli.jobs import jobs as command
from chunkmill.cli.output import Screen
from chunkmill.cli.watch.jobs import JobsWatcher, draw
from chunkmill.client import Client
from chunkmill.client import jobs as of_client
from chunkmill.db.connect import create_db
from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState, Route
from chunkmill.errors import JobCancelled, StoreUnavailable, WaitTimeout
from chunkmill.ledger.provider import provider_lanes
from chunkmill.ledger.work import chunk_batches
from chunkmill.monitor import hindrance, reports
from chunkmill.monitor.reports import Kind, Report
from chunkmill.settings import Settings
from chunkmill_workers.process.lease import owner_name
from chunkmill_workers.supervisor.supervisor import LeaseRecovery
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, Call, until


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
    supervisor = LeaseRecovery(engine)
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


def test_a_wait_that_looks_often_asks_rarely_what_hinders_the_job(
    jobs: tuple[Job, Job], client: Client, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That reads the job's open ChunkBatches, and who is connected to the server."""
    asked, read = [], hindrance.read
    monkeypatch.setattr(of_client, "HINDRANCE_SECONDS", 3600.0)
    monkeypatch.setattr(hindrance, "read", lambda conn, job: asked.append(job.id) or read(conn, job))
    looks = iter(range(100))

    def look(job: Job) -> None:
        if next(looks) == 4:
            hands.work()

    assert client.wait(jobs[0].id, on_progress=look, on_hindrance=lambda _: None).state is JobState.COMPLETED
    assert next(looks) > 4
    assert asked == [jobs[0].id]


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

    def stop() -> None:
        client.cancel(jobs[0].id)

    ended = Call(lambda: client.wait(jobs[0].id, on_progress=lambda _: caplog.records and stop()))
    with pytest.raises(JobCancelled):
        ended.result()
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


class Outage:
    """Postgres drops the connections of a client, and takes no new ones while it is away."""

    def __init__(self, client: Client, db: sa.Engine) -> None:
        self._client, self._db = client, db
        self.refusals = 0

    def begin(self) -> None:
        sa.event.listen(self._client._db, "do_connect", self._refuse)
        with self._db.begin() as conn:
            conn.execute(
                sa.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND application_name LIKE '%client%'"
                )
            )

    def _refuse(self, *_: object) -> None:
        self.refusals += 1
        if self.refusals == 2:
            sa.event.remove(self._client._db, "do_connect", self._refuse)
        raise psycopg.OperationalError("connection refused")


@pytest.fixture
def outage(client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Outage:
    monkeypatch.setattr(of_client, "RECONNECT_SECONDS", 0.01)
    return Outage(client, db)


def test_a_wait_goes_on_after_an_outage_of_postgres_and_says_so_once(
    jobs: tuple[Job, Job], client: Client, hands: Hands, connected: object, outage: Outage
) -> None:
    looks = iter(range(1_000))
    said: list[str] = []

    def look(job: Job) -> None:
        number = next(looks)
        if number == 1:
            outage.begin()
        elif number == 2:
            hands.work()

    assert client.wait(jobs[0].id, on_progress=look, on_hindrance=said.append).state is JobState.COMPLETED
    assert outage.refusals == 2
    (sentence,) = said
    assert "The job goes on when Postgres is back, and so does this wait." in sentence


def test_a_wait_that_cannot_begin_or_has_no_time_left_says_that_postgres_is_away(
    jobs: tuple[Job, Job], client: Client, connected: object, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage.begin()
    with pytest.raises(StoreUnavailable):
        client.wait(jobs[0].id)
    outage.refusals = -1_000
    with pytest.raises(StoreUnavailable):
        client.wait(jobs[0].id, timeout=0.05, on_progress=lambda _: outage.begin())


def test_progress_shows_a_bar_and_what_hinders_the_job(
    jobs: tuple[Job, Job], client: Client, hands: Hands, connected: object, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    hands.fail(hands.claim(1), error="host:1: no such kernel")
    looks = iter(range(100))

    def look(job: Job) -> None:
        if next(looks) == 2:
            hands.work()

    client.wait(jobs[0].id, timeout=PATIENCE, on_progress=look, progress=True)
    first, last = capsys.readouterr().err.splitlines()
    failed = "ChunkBatch 1 will be tried again, because attempt 1 of 5 failed: host:1: no such kernel"
    assert first == f"job {jobs[0].id}: {failed}"
    assert last.startswith(f"job {jobs[0].id}: 1 of 1 text, completed after ")
    assert caplog.records == []


def test_jobs_are_watched_through_an_outage(
    jobs: tuple[Job, Job], client: Client, hands: Hands, outage: Outage
) -> None:
    watcher = JobsWatcher(client, 10)
    assert [job.remaining for job in watcher.look().jobs] == [1, 1]
    outage.begin()
    away = watcher.look()
    assert away.error is not None
    assert [job.id for job in away.jobs] == [jobs[1].id, jobs[0].id]  # what was known
    hands.work()
    while (view := watcher.look()).error is not None:
        pass
    assert [job.state for job in view.jobs] == [JobState.COMPLETED] * 2
    for columns in (70, 80, 120):
        console = Console(width=columns, file=io.StringIO())
        console.print(draw(away, away.read_at or 0.0, 0.0, columns))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in shown
        assert "0/1" in shown


def test_watched_jobs_are_json_in_a_pipe(jobs: tuple[Job, Job], settings: Settings, hands: Hands) -> None:
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    refused = CliRunner().invoke(cli, ["jobs", "--watch"], env=env)
    assert refused.exit_code == 1
    assert "add --json" in refused.output
    told = CliRunner().invoke(cli, ["jobs", "--watch", "--json", "--times", "2", "--every", "0.2"], env=env)
    documents = [json.loads(line) for line in told.output.splitlines()]
    assert [[job["remaining"] for job in document["jobs"]] for document in documents] == [[1, 1]] * 2
