"""Doorbells: Redis holds a window of reminders, Postgres the work."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.client import Client as ClientClass
from chunkmill.db.connect import create_db
from chunkmill.domain.doorbells import DoorbellWindow
from chunkmill.domain.states import JobState
from chunkmill.ledger.dead.deaths import TakenBack
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from tests.integration.conftest import Runner
from tests.support.cutting_proxy import Cut, cutting_proxy
from tests.support.waiting import running, together, until


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
        assert poller.round().taken_back == (TakenBack(available=1) if death < 4 else TakenBack(buried=1))
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
        patch.setattr("chunkmill_workers.local.pipeline.finish_if_done", lambda *args: None)
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
    lease_runs_out(db)
    with cutting_proxy(settings.require_database_url()) as proxy:
        proxy.cut = Cut(b"chunk_batches", answer_lost=False)
        behind = create_db(proxy.url, role="poller")
        with polling(Poller(behind, broker, patient)):
            until(lambda: "poller: back after" in caplog.text)
        behind.dispose()
    assert proxy.cut.struck == 1
    assert state(db) == "running"
