"""What an operator sees is what the ledger has: the same queries feed `status --watch` and the poller's metrics."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Chunk, Client
from chunkmill.broker import Broker
from chunkmill.cli.__main__ import cli
from chunkmill.db.connect import create_db, migrate
from chunkmill.domain.states import JobState, Route
from chunkmill.embedded import Stack, StackStatus
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.provider import provider_lanes
from chunkmill.monitor import reports, snapshot
from chunkmill.monitor.gauges import Gauges, samples
from chunkmill.monitor.snapshot import lane_states
from chunkmill.monitor.watcher import Watcher
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import Counts
from chunkmill.telemetry.metrics import Role
from chunkmill_workers.host.nvml import Gpu, GpuUse
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.process.reporting import Reporter, Worker
from tests.conftest import client_for, fresh_settings
from tests.integration.conftest import Runner
from tests.integration.hands import Hands
from tests.support.embedded_homes import folder_for_homes
from tests.support.waiting import PATIENCE, until


def chunks(n: int, word: str = "text") -> list[Chunk]:
    return [Chunk(f"{word}-{i}", f"{word} number {i}") for i in range(n)]


def tallied(db: sa.Engine) -> snapshot.Totals:
    with db.begin() as conn:
        return snapshot.count(conn)


def seen(db: sa.Engine, settings: Settings) -> snapshot.Snapshot:
    with db.begin() as conn:
        return snapshot.take(conn, settings)


def execute(db: sa.Engine, statement: str, **parameters: object) -> None:
    with db.begin() as conn:
        conn.execute(sa.text(statement), parameters)


def reporter(context: WorkerContext, counts: Counts, held: int = 0) -> Reporter:
    return Reporter(context, Worker("local", "cpu-1@here", "cpu", lambda: held), None, counts)


def test_an_empty_ledger(db: sa.Engine, settings: Settings) -> None:
    now, tally = seen(db, settings), tallied(db)
    assert (now.oldest, now.faults, now.workers, set(now.running.values())) == ({}, [], [], {0})
    assert (tally.open_jobs, tally.cache_hits, tally.dead_chunks) == ([], None, 0)
    assert set(lane_states(now).values()) == {"idle"}


def test_counts_are_those_of_the_ledger(
    client: Client, runner: Runner, db: sa.Engine, settings: Settings, context: WorkerContext
) -> None:
    small = settings.model_copy(update={"chunk_batch_size": 10})
    with client_for(small) as of_ten:
        first = of_ten.enqueue(chunks(30), collection="docs")
        runner.run_due()
        of_ten.enqueue([*chunks(30), *chunks(20, "more")], collection="others")  # 30 are known by now
        waiting = of_ten.enqueue(chunks(5, "paid"), collection="paid")
    execute(db, "UPDATE chunk_batches SET route = 'openai-sync' WHERE job_id = :id", id=waiting.id)
    execute(db, "UPDATE chunk_batches SET not_before = now() - interval '1 hour' WHERE job_id = :id", id=waiting.id)
    tally, now = tallied(db), seen(db, settings)
    assert client.job(first.id).state is JobState.COMPLETED
    assert tally.ready == {Route.LOCAL: 2, Route.OPENAI: 0, Route.OPENAI_SYNC: 1}
    assert tally.jobs == {JobState.COMPLETED: 1, JobState.RUNNING: 2}
    assert [(job.collection, job.chunks, job.remaining) for job in tally.open_jobs] == [
        ("others", 50, 20),
        ("paid", 5, 5),
    ]
    assert (tally.chunks, tally.asked, tally.remaining) == (85, 55, 25)
    assert tally.cache_hits == pytest.approx(30 / 85)
    assert now.oldest[Route.OPENAI_SYNC] == pytest.approx(3600, abs=300)
    assert now.oldest[Route.LOCAL] < 300
    assert Route.OPENAI not in now.oldest


def test_what_waits_out_a_pause_is_not_the_oldest(client: Client, db: sa.Engine, settings: Settings) -> None:
    client.enqueue(chunks(3), collection="docs")
    execute(db, "UPDATE chunk_batches SET not_before = now() + interval '1 hour', rung_at = NULL")
    assert seen(db, settings).oldest == {}
    execute(db, "UPDATE chunk_batches SET not_before = now() - interval '1 hour', rung_at = now()")  # rung, unanswered
    assert seen(db, settings).oldest[Route.LOCAL] == pytest.approx(3600, abs=300)


def test_pollers_of_another_database_are_not_counted(db: sa.Engine, settings: Settings, stack: StackStatus) -> None:
    with fresh_settings(stack) as elsewhere:
        engines = [create_db(one.require_database_url(), role="poller") for one in (settings, elsewhere, elsewhere)]
        try:
            with engines[0].connect() as one, engines[1].connect() as two, engines[2].connect() as three:
                for conn in (one, two, three):
                    conn.execute(sa.text("SELECT 1"))
                assert seen(db, settings).connections.pollers == 1
        finally:
            for engine in engines:
                engine.dispose()


def test_jobs_that_ended_days_ago_do_not_count_for_the_hit_rate(client: Client, db: sa.Engine, hands: Hands) -> None:
    old = client.enqueue(chunks(8), collection="docs")
    hands.work()
    client.enqueue([*chunks(8), *chunks(2, "more")], collection="docs")
    hands.work()
    assert (tallied(db).chunks, tallied(db).asked) == (18, 10)
    execute(db, "UPDATE jobs SET finished_at = now() - interval '25 hours' WHERE id = :id", id=old.id)
    assert (tallied(db).chunks, tallied(db).asked, tallied(db).cache_hits) == (10, 2, 0.8)


def test_deaths_failures_discards_and_stops_are_told_with_their_reason(
    client: Client, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.enqueue(chunks(3), collection="docs")
    execute(
        db,
        "UPDATE chunk_batches SET state = 'running', lease_owner = 'h:9', lease_until = now() - interval '1 s', "
        "attempt = 1",
    )
    with db.begin() as conn:
        assert deaths.take_back_from(conn, "h:9", evidence="ended by SIGSEGV").total == 1
    execute(
        db,
        "UPDATE chunk_batches SET state = 'discarded', finished_at = now() + interval '1 s', attempt = 5, "
        "error = :error",
        error="the model\nis broken",
    )
    with db.begin() as conn:
        provider_lanes.stop(conn, Route.OPENAI, code="insufficient_quota", reason="no money left")
    execute(db, "UPDATE provider_lanes SET stopped_at = now() + interval '2 s'")
    now, tally = seen(db, settings), tallied(db)
    assert [(fault.what, fault.line) for fault in now.faults] == [
        ("stopped", "lane openai: insufficient_quota: no money left"),
        ("discarded", "ChunkBatch 1 of job 301 after 5 attempts: the model is broken"),
        ("died", "h:9: ChunkBatch 1 of job 301: ended by SIGSEGV"),
    ]
    assert now.recent == {"died": 1, "discarded": 1}
    assert tally.discarded[Route.LOCAL] == 1
    assert lane_states(now)[Route.OPENAI] == "stopped"
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    told = CliRunner().invoke(cli, ["status", "--json"])
    assert [fault["line"] for fault in json.loads(told.output)["database"]["faults"]] == [f.line for f in now.faults]
    assert "h:9: ChunkBatch 1 of job 301: ended by SIGSEGV" in CliRunner().invoke(cli, ["status"]).output
    # What is long ago is told still, and counts as recent no more.
    execute(db, "UPDATE usage SET ended_at = now() - interval '1 hour'")
    now = seen(db, settings)
    assert "died" not in now.recent
    assert now.faults[-1].what == "died"


def test_a_worker_says_what_it_did_in_its_last_minute(
    context: WorkerContext, client: Client, runner: Runner, db: sa.Engine, settings: Settings
) -> None:
    counts = Counts()
    thread = reporter(context, counts, held=2)
    counts.add_all(((m.CONTENTS, 30), (m.TOKENS, 600), (m.PADDED_TOKENS, 800), (m.ENGINE_SECONDS, 0.5)))
    thread.report()
    workers = seen(db, settings).workers
    assert [(w.name, w.label, w.contents, w.tokens, w.padded_tokens, w.held) for w in workers] == [
        ("test-worker", "cpu-1@here", 30, 600, 800, 2)
    ]
    assert workers[0].window_seconds > 0
    assert not workers[0].is_silent
    assert lane_states(seen(db, settings))[Route.LOCAL] == "running"
    assert dict(counts.series(m.HELD, frozenset({Role.WORKER}))) == {(): 2}
    execute(db, "UPDATE worker_reports SET seen_at = now() - interval '1 minute'")
    assert seen(db, settings).workers[0].is_silent
    assert lane_states(seen(db, settings))[Route.LOCAL] == "idle"
    thread.report()  # it was only slow
    assert not seen(db, settings).workers[0].is_silent


def test_a_worker_says_good_bye_and_the_poller_forgets_one_that_did_not(
    context: WorkerContext, db: sa.Engine, broker: Broker, settings: Settings
) -> None:
    thread = reporter(context, Counts())
    thread.start()
    thread.stop()
    assert not thread.is_alive()
    assert seen(db, settings).workers == []
    reporter(context, Counts()).report()
    execute(db, "UPDATE worker_reports SET seen_at = now() - interval '9 minutes'")
    Poller(db, broker, settings).round()
    assert len(seen(db, settings).workers) == 1
    execute(db, "UPDATE worker_reports SET seen_at = now() - interval '11 minutes'")
    Poller(db, broker, settings).round()
    assert seen(db, settings).workers == []


def test_a_schema_of_the_release_before_has_no_reports_and_keeps_nobody_up(
    context: WorkerContext, db: sa.Engine, broker: Broker, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    execute(db, "DROP TABLE worker_reports")
    thread = reporter(context, Counts())
    thread.report()
    thread.report()
    assert caplog.text.count("this worker is not in `status` for now") == 1
    Poller(db, broker, settings).round()
    assert seen(db, settings).workers == ()


def test_each_time_that_a_worker_cannot_report_it_says_why_once(
    context: WorkerContext, db: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    thread = reporter(context, Counts())
    for outage in (1, 2):
        execute(db, "ALTER TABLE worker_reports RENAME TO put_away")
        thread.report()
        thread.report()
        assert caplog.text.count("this worker is not in `status` for now") == outage
        execute(db, "ALTER TABLE put_away RENAME TO worker_reports")
        thread.report()


class Busy(Gpu):
    def __init__(self) -> None:
        pass

    def use(self) -> GpuUse:
        return GpuUse(0.5, 10, 20)


def test_a_gpu_is_in_the_report_and_in_the_metrics(context: WorkerContext, db: sa.Engine, settings: Settings) -> None:
    counts = Counts()
    Reporter(context, Worker("local", "gpu-1@here", "GPU-1", lambda: 0), Busy(), counts).report()
    worker = seen(db, settings).workers[0]
    assert (worker.gpu_busy, worker.gpu_memory_used, worker.gpu_memory_total) == (0.5, 10, 20)
    assert counts.series(m.GPU_BUSY, frozenset({Role.WORKER})) == [((), 0.5)]


def test_a_look_and_its_metrics(client: Client, db: sa.Engine, settings: Settings) -> None:
    paid = settings.model_copy(update={"openai_monthly_budget_usd": 50})
    client.enqueue(chunks(3), collection="docs")
    watcher = Watcher(paid)
    try:
        view = watcher.look()
    finally:
        watcher.close()
    assert (view.postgres_error, view.redis_error) == (None, None)
    assert view.doorbells == {"gpu": 1, "openai": 0}
    values = {(metric.name, labels): value for metric, labels, value in samples(view)}
    assert values["chunkmill_ready_chunk_batches", ("local",)] == 1
    assert values["chunkmill_lane_state", ("local", "idle")] == 1
    assert values["chunkmill_jobs", ("running",)] == 1
    assert values["chunkmill_budget_usd", ()] == 50
    assert {metric for metric, _, _ in samples(view)} == set(m.LEDGER)
    # Away, it says no more of the ledger than that.
    blind = samples(replace(view, postgres_error="gone"))
    assert {metric for metric, _, _ in blind} == {m.STORE_UP, m.DOORBELLS}
    assert (m.STORE_UP, ("postgres",), 0.0) in blind


def test_the_gauges_goes_on_looking(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be is no end either: the metrics are away, and back with the next look."""
    counts = Counts()
    counts.set(m.BUDGET, 10)
    gauges = Gauges(settings, counts)
    real, looks = gauges._watcher.look, itertools.count()
    failed = threading.Event()

    def look_or_break() -> object:
        if next(looks) == 0:
            raise ZeroDivisionError
        failed.wait(PATIENCE)
        return real()

    monkeypatch.setattr(gauges._watcher, "look", look_or_break)
    monkeypatch.setattr("chunkmill.monitor.gauges.LOOK_SECONDS", 0.01)
    poller = frozenset({Role.POLLER})
    gauges.start()
    until(lambda: counts.series(m.BUDGET, poller) == [])
    failed.set()
    until(lambda: counts.series(m.STORE_UP, poller))
    gauges.stop()
    assert not gauges.is_alive()


def test_postgres_and_redis_go_and_come_back() -> None:
    """A stack of its own, which is stopped in between."""
    with folder_for_homes("cm-") as home:
        stack = Stack(home, fsync=False)
        status = stack.up()
        migrate(status.database_url)
        watcher = Watcher(Settings.from_env(database_url=status.database_url, redis_url=status.redis_url))
        first = watcher.look()
        assert (first.postgres_error, first.redis_error) == (None, None)
        stack.down()
        gone = watcher.look()
        assert gone.postgres_error is not None
        assert "cannot connect to Postgres" in gone.postgres_error
        assert gone.redis_error is not None
        assert gone.snapshot == first.snapshot  # what was known
        assert gone.doorbells is None
        stack.up()
        back = watcher.look()
        assert (back.postgres_error, back.redis_error) == (None, None)
        assert back.snapshot is not None
        assert first.snapshot is not None
        assert back.snapshot.at > first.snapshot.at
        watcher.close()


def test_in_a_pipe_it_wants_json_and_gives_a_document_a_line(
    client: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.enqueue(chunks(3), collection="docs")
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    refused = CliRunner().invoke(cli, ["status", "--watch"])
    assert refused.exit_code == 1
    assert "add --json" in refused.output
    told = CliRunner().invoke(cli, ["status", "--watch", "--json", "--times", "2", "--every", "0.2"])
    assert told.exit_code == 0, told.output
    documents = [json.loads(line) for line in told.output.splitlines()]
    assert len(documents) == 2
    assert documents[0]["at"] < documents[1]["at"]
    assert [lane["lane"] for lane in documents[1]["lanes"]] == ["local", "openai", "openai-sync"]
    assert documents[1]["open_jobs"][0]["remaining"] == 3


def test_reports_are_written_by_name(db: sa.Engine, context: WorkerContext) -> None:
    """Two workers are two rows; one that starts again under its name takes its row."""
    for name in ("one", "two", "one"):
        context.name = name
        reporter(context, Counts()).report()
    with db.begin() as conn:
        assert [report.name for report in reports.read(conn)] == ["one", "two"]
