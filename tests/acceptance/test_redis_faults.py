"""Redis freezes, fills up, or cuts every connection of real processes: they continue by themselves, and jobs finish.

test_real_workers has the tests in which Redis is emptied, or killed and started empty.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.domain.states import JobState
from chunkmill.embedded import Stack
from chunkmill.settings import Settings
from tests.acceptance.conftest import Process, Processes
from tests.support.embedded_homes import folder_for_homes
from tests.support.waiting import PATIENCE, until


@dataclass(frozen=True)
class Place:
    """A Redis for one test alone, because other tests share theirs, with a worker and a poller."""

    client: Client
    worker: Process
    poller: Process
    redis: redis.Redis
    redis_pid: int
    home: Path
    db: sa.Engine

    def fill(self, n: int = 300) -> int:
        documents = [(f"d{i}", f"document {i} " + f"word{i} " * 40) for i in range(n)]
        return self.client.enqueue(documents, collection="docs").id

    def finishes(self, job_id: int, *, others: int = 0) -> None:
        """Assert that every text was embedded once, although a doorbell may have been answered twice.

        ``others`` is how many texts of other jobs were embedded."""
        job = self.client.wait(job_id, timeout=PATIENCE)
        assert (job.state, job.embedded, job.dead) == (JobState.COMPLETED, 300, 0)
        assert self.client.audit("docs").complete
        with self.db.begin() as conn:
            booked = conn.execute(sa.text("SELECT sum(contents), sum(recomputed) FROM usage")).one()
        assert tuple(booked) == (300 + others, 0)
        assert self.worker.popen.poll() is None, self.worker.output()
        assert self.poller.popen.poll() is None, self.poller.output()


@pytest.fixture
def place(settings: Settings, db: sa.Engine, tmp_path: Path) -> Iterator[Place]:
    with folder_for_homes("cm-") as home:
        status = Stack(home, fsync=False).up()
        apart = settings.model_copy(update={"redis_url": status.redis_url, "chunk_batch_size": 32})
        processes = Processes(apart, tmp_path)
        try:
            poller, worker = processes.poller(), processes.worker()
            with (
                Client(db, Broker.connect(apart), apart) as client,
                redis.Redis.from_url(status.redis_url) as connection,
            ):
                assert status.redis.pid is not None
                yield Place(client, worker, poller, connection, status.redis.pid, home, db)
        finally:
            processes.stop_all()


@pytest.mark.slow
def test_every_connection_cut_in_mid_job(place: Place) -> None:
    """Celery then gives running doorbells back, and they are answered again: the claim finds that the work is held."""
    job_id = place.fill()
    for _ in range(3):
        before = place.client.job(job_id).embedded
        place.redis.client_kill_filter(_type="normal", skipme=True)
        place.redis.client_kill_filter(_type="pubsub", skipme=True)
        until(lambda: place.client.job(job_id).embedded > before or place.client.job(job_id).state.is_final)  # noqa: B023
    place.finishes(job_id)


@pytest.mark.slow
def test_frozen_for_a_while(place: Place) -> None:
    job_id = place.fill()
    until(lambda: place.client.job(job_id).embedded > 0, place.worker.output)
    os.kill(place.redis_pid, signal.SIGSTOP)
    try:
        place.poller.wait_for("trying again")  # its look at Redis has timed out, as a producer's would
    finally:
        os.kill(place.redis_pid, signal.SIGCONT)
    place.finishes(job_id)


@pytest.mark.slow
def test_full_while_a_producer_enqueues(place: Place) -> None:
    """What is enqueued meanwhile is in Postgres, and its doorbells are sent when there is room."""
    place.redis.config_set("maxmemory", 1)
    job_id = place.fill()
    until(lambda: "trying again" in place.poller.output(), place.poller.output)
    place.redis.config_set("maxmemory", 0)
    place.finishes(job_id)


@pytest.mark.slow
def test_full_while_workers_take_doorbells(place: Place) -> None:
    """Celery takes a bell and can record neither this nor its answer. The work is embedded all the same."""
    job_id = place.fill()
    until(lambda: place.client.job(job_id).embedded > 0, place.worker.output)
    place.redis.config_set("maxmemory", 1)
    before = place.client.job(job_id).embedded
    until(lambda: place.client.job(job_id).embedded > before + 64, place.worker.output)
    place.redis.config_set("maxmemory", 0)
    place.finishes(job_id)
    assert "Couldn't ack" not in place.worker.output()


def refuse_without_replicas(place: Place) -> Callable[[], object]:
    """As after a failover, while the new primary has no replica."""
    place.redis.config_set("min-replicas-to-write", 1)
    return lambda: place.redis.config_set("min-replicas-to-write", 0)


def refuse_without_snapshots(place: Place) -> Callable[[], object]:
    """As on a full disk: the snapshot cannot be saved, and Redis takes no more writes."""
    in_the_way = place.home / "redis" / "dump.rdb"
    in_the_way.mkdir()
    place.redis.config_set("save", "3600 1")

    def status_is(wanted: str) -> bool:
        with contextlib.suppress(redis.ResponseError):  # one is being saved
            place.redis.bgsave()
        return bool(place.redis.info("persistence")["rdb_last_bgsave_status"] == wanted)

    until(lambda: status_is("err"))

    def pass_by() -> None:
        in_the_way.rmdir()
        until(lambda: status_is("ok"))

    return pass_by


@pytest.mark.slow
@pytest.mark.parametrize("refuse", [refuse_without_replicas, refuse_without_snapshots])
def test_refusing_every_write_for_a_while(place: Place, refuse: Callable[[Place], Callable[[], object]]) -> None:
    job_id = place.fill()
    until(lambda: place.client.job(job_id).embedded > 0, place.worker.output)
    pass_by = refuse(place)
    lost = "Connection to broker lost"
    until(lambda: lost in place.worker.output() or place.worker.popen.poll() is not None, place.worker.output)
    assert place.worker.popen.poll() is None, place.worker.output()
    late = place.client.enqueue([("late", "a text that comes while no bell can be rung")], collection="late").id
    pass_by()
    assert place.client.wait(late, timeout=PATIENCE).state is JobState.COMPLETED
    place.finishes(job_id, others=1)
