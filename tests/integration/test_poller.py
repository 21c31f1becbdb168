"""Doorbells: Redis holds a window of reminders, Postgres the work."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.cli.__main__ import cli
from chunkmill.cli.processes import processes
from chunkmill.client import Client as ClientClass
from chunkmill.db.connect import create_db
from chunkmill.domain.doorbells import DoorbellWindow
from chunkmill.domain.states import JobState
from chunkmill.ledger.dead.deaths import TakenBackCounts
from chunkmill.ledger.jobs import recover
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from tests.integration.conftest import Runner
from tests.support.cutting_proxy import Cut, cutting_proxy
from tests.support.server_start import server_started
from tests.support.waiting import PATIENCE, running, together, until


@pytest.fixture
def narrow(settings: Settings) -> Settings:
    """A window of 4 doorbells and 25 ChunkBatches to ring for."""
    return settings.model_copy(update={"doorbell_window": 4, "chunk_batch_size": 4, "doorbell_repair_seconds": 0.05})


@pytest.fixture
def poller(narrow: Settings, db: sa.Engine, broker: Broker) -> Poller:
    return Poller(db, broker, narrow)


def enqueue(narrow: Settings, db: sa.Engine, n: int, **options: str) -> int:
    client = ClientClass(db, Broker.connect(narrow), narrow)
    return client.enqueue([(f"{n}-{i}", f"text {n} {i}") for i in range(n)], collection="docs", **options).id


def answer_bells(store: redis.Redis, n: int) -> list[bytes]:
    """Take up to ``n`` messages off the queue, as Celery would, the most urgent first."""
    taken = []
    for key in ("gpu", "gpu\x06\x163", "gpu\x06\x166", "gpu\x06\x169"):
        while len(taken) < n and (message := store.rpop(key)):
            taken.append(message)
    return taken


def claim_all_rung(db: sa.Engine) -> None:
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE chunk_batches SET state = 'cancelled' WHERE state = 'available' AND rung_at IS NOT NULL")
        )


def test_never_more_than_a_window_and_every_chunk_batch_in_the_end(
    narrow: Settings, db: sa.Engine, broker: Broker, poller: Poller
) -> None:
    enqueue(narrow, db, 100)
    rung = 0
    for _ in range(20):
        poller.round()
        assert sum(broker.queued_doorbells().values()) <= 4
        rung += len(answer_bells(broker.client, 4))
        claim_all_rung(db)
    assert rung == 25


def test_flushall_is_mended_from_postgres(narrow: Settings, db: sa.Engine, broker: Broker, poller: Poller) -> None:
    """Promise 2: what Redis forgot is rung again."""
    enqueue(narrow, db, 16)
    assert sum(broker.queued_doorbells().values()) == 4
    broker.client.flushall()
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = rung_at - interval '1 s'"))
    assert poller.round().rung == 4
    assert sum(broker.queued_doorbells().values()) == 4
    assert poller.round().rung == 0  # and only once


def test_a_long_queue_is_not_taken_for_a_lost_one(
    narrow: Settings, db: sa.Engine, broker: Broker, poller: Poller
) -> None:
    enqueue(narrow, db, 16)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = rung_at - interval '1 h'"))
    assert poller.round().rung == 0


def test_urgent_jobs_ring_first(narrow: Settings, db: sa.Engine, broker: Broker, poller: Poller) -> None:
    enqueue(narrow, db, 40, priority="low")
    answer_bells(broker.client, 99)
    claim_all_rung(db)
    urgent = enqueue(narrow, db, 12, priority="high")
    poller.round()
    with db.begin() as conn:
        rung = conn.execute(
            sa.text("SELECT job_id FROM chunk_batches WHERE state = 'available' AND rung_at IS NOT NULL ORDER BY id")
        ).scalars()
        assert Counter(rung)[urgent] == 3
    assert broker.client.llen("gpu\x06\x163") == 3


def test_many_pollers_ring_each_bell_once(narrow: Settings, db: sa.Engine, broker: Broker) -> None:
    # Repair is off: while one poller has committed its bells and not rung them yet, old ones would look lost.
    wide = narrow.model_copy(update={"doorbell_window": 1000, "doorbell_repair_seconds": 60.0})
    enqueue(narrow, db, 100)  # four bells are rung by the enqueue itself
    pollers = [Poller(db, Broker.connect(wide), wide) for _ in range(4)]
    for poller in pollers:
        poller._window = DoorbellWindow(1000)  # as if they had seen fast workers
    assert sum(ended.rung for ended in together(*[poller.round for poller in pollers])) == 21
    assert sum(broker.queued_doorbells().values()) == 25


def test_expired_leases_are_taken_back_until_a_text_has_killed_too_often(
    db: sa.Engine, client: Client, poller: Poller
) -> None:
    job = client.enqueue([("a", "text")], collection="docs")
    for death in range(1, 5):
        with db.begin() as conn:
            conn.execute(
                sa.text(
                    "UPDATE chunk_batches SET state = 'running', attempt = attempt + 1, lease_owner = 'gone', "
                    "lease_until = now() - interval '1 s'"
                )
            )
        assert poller.round().taken_back == (TakenBackCounts(available=1) if death < 4 else TakenBackCounts(buried=1))
    with db.begin() as conn:
        error = conn.execute(sa.text("SELECT error FROM chunk_batches")).scalar_one()
    assert error == "worker gone died with it: it was silent past its lease"
    assert poller.round().finished == 0
    job = client.job(job.id)
    assert (job.state, job.dead_chunks[0].code) == (JobState.FAILED, "kills_workers")


def test_a_job_whose_last_worker_died_before_closing_it_is_closed(
    runner: Runner, client: Client, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.enqueue([("a", "text")], collection="docs")
    with monkeypatch.context() as patch:
        patch.setattr("chunkmill_workers.process.context.finish_if_done", lambda *args: None)
        runner.run_due()
    assert client.job(job.id).state is JobState.RUNNING
    assert poller.round().finished == 1
    assert client.job(job.id).state is JobState.COMPLETED


def test_redis_away_is_survived_and_said_once(
    narrow: Settings, db: sa.Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off = narrow.model_copy(update={"redis_url": "unix:///nonexistent/redis.sock?db=0", "poll_interval": 0.01})
    poller = Poller(db, Broker.connect(cut_off), cut_off)
    stop = threading.Event()
    rounds: list[None] = []
    real = poller.round

    def counted() -> Any:
        rounds.append(None)
        return real()

    monkeypatch.setattr(poller, "round", counted)
    with running(lambda: poller.run(stop), release=stop.set):
        until(lambda: len(rounds) > 3)
    [said] = [r.message for r in caplog.records if "trying again" in r.message]
    assert said.startswith("poller: ConnectionError: ")
    assert said.endswith("; trying again every 0.01 s")
    assert "/nonexistent/redis.sock" in said


@contextmanager
def polling(poller: Poller) -> Iterator[None]:
    """The poller's own loop, in a thread."""
    stop = threading.Event()
    with running(lambda: poller.run(stop), release=stop.set):
        yield


def lease_runs_out(db: sa.Engine) -> None:
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "UPDATE chunk_batches SET state = 'running', attempt = attempt + 1, lease_owner = 'gone', "
                "lease_until = now() - interval '1 s'"
            )
        )


def state(db: sa.Engine) -> str:
    with db.begin() as conn:
        return str(conn.execute(sa.text("SELECT state FROM chunk_batches")).scalar_one())


def test_while_redis_is_away_what_dead_workers_held_is_taken_back(
    settings: Settings, db: sa.Engine, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Their leases are in Postgres, so that an outage of Redis excuses no worker that is silent."""
    cut_off = settings.model_copy(update={"redis_url": "unix:///nonexistent/redis.sock?db=0", "lease_seconds": 3000.0})
    client.enqueue([("a", "text")], collection="docs")
    server_started(db, "1 day")
    with polling(Poller(db, Broker.connect(cut_off), cut_off)):
        until(lambda: "trying again" in caplog.text)
        lease_runs_out(db)
        until(lambda: state(db) == "available")


def test_after_an_outage_of_postgres_live_workers_may_renew_their_leases_first(
    settings: Settings, db: sa.Engine, broker: Broker, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody could renew a lease meanwhile, so that one that ran out says nothing about its worker."""
    caplog.set_level("INFO", "chunkmill.poller.poller")
    patient = settings.model_copy(update={"lease_seconds": 3000.0})
    client.enqueue([("a", "text")], collection="docs")
    server_started(db, "1 day")
    lease_runs_out(db)
    with cutting_proxy(settings.require_database_url()) as proxy:
        proxy.cut = Cut(b"chunk_batches", answer_lost=False)
        behind = create_db(proxy.url, role="poller")
        with polling(Poller(behind, broker, patient)):
            until(lambda: "poller: back after" in caplog.text)
        behind.dispose()
    assert proxy.cut.struck == 1
    assert state(db) == "running"


def test_a_new_poller_too_is_patient_after_a_start_of_postgres(
    settings: Settings, db: sa.Engine, broker: Broker, client: Client
) -> None:
    """After a reboot of their host both are new, and live workers on other hosts had no chance to renew a lease."""
    patient = settings.model_copy(update={"lease_seconds": 3000.0})
    client.enqueue([("a", "text")], collection="docs")
    lease_runs_out(db)
    server_started(db, "990 s")
    assert Poller(db, broker, patient).round().taken_back == TakenBackCounts()
    assert state(db) == "running"
    server_started(db, "1010 s")
    assert Poller(db, broker, patient).round().taken_back == TakenBackCounts(available=1)


def never_ends(db: sa.Engine, job_id: int) -> None:
    """The end of a job takes longer than Postgres allows."""
    wait = """
        CREATE FUNCTION too_long() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_sleep(600);
            RETURN NEW;
        END $$
    """
    trigger = f"""
        CREATE TRIGGER too_long BEFORE UPDATE ON jobs
        FOR EACH ROW WHEN (OLD.id = {job_id}) EXECUTE FUNCTION too_long()
    """
    with db.begin() as conn:
        conn.execute(sa.text(wait))
        conn.execute(sa.text(trigger))
        name = conn.execute(sa.text("SELECT current_database()")).scalar_one()
        conn.execute(sa.text(f"ALTER DATABASE {name} SET statement_timeout = '200ms'"))


def test_a_job_that_cannot_end_in_time_stops_neither_the_others_nor_the_taking_back_of_leases(
    settings: Settings,
    db: sa.Engine,
    broker: Broker,
    client: Client,
    runner: Runner,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (client.enqueue([(name, f"text {name}")], collection=name) for name in ("first", "second"))
    with monkeypatch.context() as patch:
        patch.setattr("chunkmill_workers.process.context.finish_if_done", lambda *args: None)
        runner.run_due()
    client.enqueue([("c", "another text")], collection="third")
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "UPDATE chunk_batches SET state = 'running', attempt = attempt + 1, lease_owner = 'gone', "
                "lease_until = now() + interval '1 h' WHERE state = 'available'"
            )
        )
    server_started(db, "1 day")
    never_ends(db, first.id)
    behind = create_db(settings.require_database_url(), role="poller")
    poller = Poller(behind, broker, settings)
    assert poller.round().finished == 1
    assert client.job(second.id).state is JobState.COMPLETED
    assert client.job(first.id).state is JobState.RUNNING
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() - interval '1 s' WHERE state = 'running'"))
    assert poller.round().taken_back == TakenBackCounts(available=1)
    said = [record.message for record in caplog.records if "end of job" in record.message]
    assert len(said) == 1
    assert f"the end of job {first.id}: Postgres ended it: canceling statement" in said[0]
    assert "ALTER ROLE ... SET statement_timeout" in said[0]
    assert [job_id for job_id, _ in poller._jobs_that_may_end([first.id])] == []
    with db.begin() as conn:
        conn.execute(sa.text("DROP TRIGGER too_long ON jobs"))
    poller._unfinished[first.id] = (0.0, 5.0)  # its pause is over
    assert poller.round().finished == 1
    behind.dispose()


def test_a_hundred_jobs_that_cannot_end_keep_no_later_one_waiting(db: sa.Engine, client: Client) -> None:
    first, second = (client.enqueue([], collection=name) for name in ("first", "second"))
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET state = 'running', finished_at = NULL"))
        one = recover.jobs_without_open_chunk_batches(conn, limit=1)
        other = recover.jobs_without_open_chunk_batches(conn, but=[first.id], limit=1)
    assert ([job_id for job_id, _ in one], [job_id for job_id, _ in other]) == ([first.id], [second.id])


def test_a_step_that_always_fails_stops_no_other_step_and_is_said_once(
    narrow: Settings, db: sa.Engine, poller: Poller, client: Client, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(*_: Any) -> None:
        raise ValueError("nobody thought of this")

    monkeypatch.setattr("chunkmill.ledger.jobs.cancel.cancel_some_left_behind", broken)
    client.enqueue([("a", "text")], collection="docs")
    lease_runs_out(db)
    assert poller.round().taken_back == TakenBackCounts(available=1)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = NULL"))
    assert poller.round().rung == 1
    said = [record.message for record in caplog.records if "the cancels that were left behind" in record.message]
    assert len(said) == 1
    assert "ValueError" in said[0]
    assert "nobody thought of this" not in said[0]  # the words of an unknown error may quote a text


def test_a_step_that_breaks_its_connection_in_each_round_does_not_keep_leases_from_being_taken_back(
    settings: Settings, db: sa.Engine, broker: Broker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an anti-join does whose session is ended for its memory. Patience counts from a round that took back."""
    patient = settings.model_copy(update={"lease_seconds": 3000.0})
    client.enqueue([("a", "text")], collection="docs")
    server_started(db, "1 day")
    poller = Poller(db, broker, patient)

    def breaks(*_: Any, **__: Any) -> None:
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr("chunkmill.poller.poller.recover.jobs_without_open_chunk_batches", breaks)
    for _ in range(2):
        with pytest.raises(psycopg.OperationalError):
            poller.round()
        until_then = poller._patient_until
        assert until_then > time.monotonic()
        lease_runs_out(db)
        with pytest.raises(psycopg.OperationalError):
            poller.round()
        assert state(db) == "running"
        assert poller._patient_until == until_then
        poller._patient_until = 7.0  # the patience is over
        with pytest.raises(psycopg.OperationalError):
            poller.round()
        assert state(db) == "available"
        poller._patient_until = 7.0


@pytest.fixture
def ending(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[threading.Event], object]], None]:
    """Runs the command of a poller that ends at once, while a thread of its own does something."""
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    monkeypatch.setattr(processes, "configure", lambda *_: None)
    for name, url in (("DATABASE_URL", settings.require_database_url()), ("REDIS_URL", settings.require_redis_url())):
        monkeypatch.setenv(name, url)

    def run(work: Callable[[threading.Event], object]) -> None:
        def start(stop: threading.Event) -> threading.Thread:
            thread = threading.Thread(target=work, args=(stop,), daemon=True)
            thread.start()
            return thread

        monkeypatch.setattr(processes, "Deliverer", lambda *_: SimpleNamespace(start=start))
        monkeypatch.setattr(processes, "Poller", lambda *_: SimpleNamespace(run=lambda stop: None))
        result = CliRunner().invoke(cli, ["poller"])
        assert result.exit_code == 0, result.output

    return run


def test_a_poller_that_ends_waits_for_its_threads(ending: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LAST_SECONDS", PATIENCE)
    ended: list[str] = []

    def work(stop: threading.Event) -> None:
        assert stop.wait(PATIENCE)
        time.sleep(0.3)
        ended.append("a moment later")

    ending(work)
    assert ended == ["a moment later"]


def test_a_poller_that_ends_leaves_a_thread_that_hangs(
    ending: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LAST_SECONDS", 0.1)
    over = threading.Event()
    ending(lambda _: over.wait(PATIENCE))
    over.set()
