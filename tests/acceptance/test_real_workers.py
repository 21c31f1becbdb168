"""The whole system with real processes: enqueue here, embed there, and kill processes and servers meanwhile."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import redis
import sqlalchemy as sa

from chunkmill import Chunk, Client, JobState
from chunkmill.broker import Broker
from chunkmill.client.asking import sockets
from chunkmill.client.asking.sockets import sockets_of
from chunkmill.db.connect import create_db
from chunkmill.embedded import Stack
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.support.damaged_model import damaged_model
from tests.support.embedded_homes import folder_for_homes
from tests.support.waiting import PATIENCE, running, until

SECRET = "ZEBRAFISH"  # this word is in every text and nowhere else


def documents(n: int, words: int = 12) -> list[Chunk]:
    return [
        Chunk(f"doc-{i}", f"{SECRET} {i} " + "about matters of some length " * (words // 5), {"i": i}) for i in range(n)
    ]


def readable(traffic: bytes) -> bytes:
    """Return Redis' traffic followed by every message body, decoded, because kombu writes bodies in base64."""
    bodies = re.findall(rb"[A-Za-z0-9+/]{16,}={0,2}", traffic)
    return traffic + b"\n".join(base64.b64decode(body[: len(body) // 4 * 4]) for body in bodies)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    narrow = settings.model_copy(update={"chunk_batch_size": 64})
    with Client(create_db(settings.require_database_url(), role="client"), Broker.connect(narrow), narrow) as made:
        yield made


def vectors_written(db: sa.Engine) -> int:
    with db.begin() as conn:
        return int(conn.execute(sa.text("SELECT count(*) FROM vectors_1")).scalar_one())


def test_the_main_job(processes: Processes, client: Client, settings: Settings, db: sa.Engine) -> None:
    """Enqueue, embed and search. At no time is a text in Redis, in an event or in a log."""
    worker, poller = processes.worker("-E", fresh=True), processes.poller(fresh=True)
    seen: list[bytes] = []
    with redis.Redis.from_url(settings.require_redis_url()) as store, store.monitor() as monitor:
        job = client.enqueue(documents(400), collection="docs", idempotency_key="main-job")
        job = client.wait(job.id, timeout=PATIENCE)
        hits = client.search(f"{SECRET} 123 about matters of some length", collection="docs", k=3, timeout=PATIENCE)
        store.echo("the end")
        for command in monitor.listen():
            seen.append(str(command["command"]).encode())
            if "the end" in command["command"]:
                break
        seen += [store.dump(key) or b"" for key in store.scan_iter()]
    assert (job.state, job.embedded, job.chunks) == (JobState.COMPLETED, 400, 400)
    assert client.audit("docs").complete
    assert hits[0].chunk_id == "doc-123"
    everything = readable(b"\n".join(seen))
    assert b"task-received" in everything  # so events were on, and we looked at them
    assert b"workers.embed_chunk_batch" in everything
    for log in (worker, poller):
        everything += log.output().encode()
    for word in (SECRET, "about matters", "main-job", "doc-123"):
        assert word.encode() not in everything
    assert worker.terminate() == 0


def test_a_worker_that_is_killed_while_it_answers_at_its_socket_costs_its_callers_nothing(
    processes: Processes, client: Client, settings: Settings, db: sa.Engine
) -> None:
    """All calls go to the one worker that has a socket. After its death the other one answers what it had."""
    first = processes.worker()
    client.embed(["a text"], timeout=PATIENCE)

    def is_reached() -> bool:
        client.embed([f"a text of {time.monotonic()}"], timeout=PATIENCE)
        return bool(sockets_of(client._db).ready)

    until(is_reached, first.output)
    processes.worker(WORKER_SOCKET="off")
    stop = threading.Event()

    def embed(caller: int) -> int:
        calls = 0
        while not stop.is_set():
            calls += 1
            texts = [f"call {calls} of caller {caller}, text {n}" for n in range(6)]
            assert client.embed(texts, timeout=PATIENCE).shape == (6, 384)
        return calls

    def rows_asked() -> int:
        with db.begin() as conn:
            return conn.execute(sa.text("SELECT last_value FROM embed_requests_id_seq")).scalar_one()

    with running(*(partial(embed, n) for n in range(4)), release=stop.set) as calls:
        until(lambda: any(connection.open for connection in sockets._hub.connections))
        before = rows_asked()
        first.kill()
        until(lambda: rows_asked() > before + 8)
        stop.set()
        assert all(call.result() > 1 for call in calls)


@pytest.mark.slow
def test_flushall_and_a_killed_worker_in_mid_job_lose_nothing(
    processes: Processes, client: Client, settings: Settings, db: sa.Engine
) -> None:
    """Promises 2 and 3: the second worker finishes, every content has one vector, and none was computed in vain."""
    processes.poller()
    first = processes.worker(EMBEDDING_PARALLEL_BATCHES="2")
    job = client.enqueue(documents(400, words=60), collection="docs")
    until(lambda: client.job(job.id).embedded > 0, first.output)
    with redis.Redis.from_url(settings.require_redis_url()) as store:
        store.flushdb()
    first.kill()
    before = vectors_written(db)
    assert 0 < before < 400
    second = processes.worker()
    job = client.wait(job.id, timeout=PATIENCE)
    assert (job.state, job.embedded, vectors_written(db)) == (JobState.COMPLETED, 400, 400)
    assert client.audit("docs").complete
    with db.begin() as conn:
        embedded_by_second = conn.execute(
            sa.text("SELECT sum(contents) FROM usage WHERE worker LIKE :pid"), {"pid": f"%:{second.popen.pid}"}
        ).scalar_one()
        attempts = conn.execute(sa.text("SELECT max(attempt) FROM chunk_batches")).scalar_one()
    assert embedded_by_second == 400 - before  # what the first worker had written was not embedded again
    assert attempts == 2
    assert second.terminate() == 0


@pytest.mark.slow  # make chaos does it, and test_flushall_and_a_killed_worker_in_mid_job_lose_nothing a part of it
def test_redis_killed_and_started_empty_in_mid_job(settings: Settings, db: sa.Engine, tmp_path: Path) -> None:
    """Promise 2 in its hardest form: kill -9, and a new Redis without the append-only file at the same address."""
    with folder_for_homes("cm-") as home:
        own = Stack(home, fsync=False)
        status = own.up()
        apart = settings.model_copy(update={"redis_url": status.redis_url, "chunk_batch_size": 64})
        processes = Processes(apart, tmp_path)
        try:
            processes.poller()
            worker = processes.worker()
            with Client(db, Broker.connect(apart), apart) as client:
                job = client.enqueue(documents(700, words=60), collection="docs")
                until(lambda: client.job(job.id).embedded > 100, worker.output)
                assert status.redis.pid is not None
                os.kill(status.redis.pid, signal.SIGKILL)
                for leftover in (home / "redis").glob("**/*.aof*"):
                    leftover.unlink()
                assert own.up().redis.started
                job = client.wait(job.id, timeout=PATIENCE)
                assert (job.state, job.embedded) == (JobState.COMPLETED, 700)
                assert client.audit("docs").complete
        finally:
            processes.stop_all()


def test_sigterm_drains_at_once_and_uncharged(processes: Processes, client: Client, db: sa.Engine) -> None:
    worker = processes.worker()
    job = client.enqueue(documents(600, words=200), collection="docs")
    until(lambda: client.job(job.id).embedded > 0, worker.output)
    assert worker.terminate() == 0
    with db.begin() as conn:
        running = conn.execute(sa.text("SELECT count(*) FROM chunk_batches WHERE state = 'running'")).scalar_one()
        charged = conn.execute(
            sa.text("SELECT count(*) FROM chunk_batches WHERE state = 'available' AND max_attempts - attempt < 5")
        ).scalar_one()
    assert (running, charged) == (0, 0)
    assert 0 < client.job(job.id).embedded < 600


def test_the_worker_has_sensible_defaults(processes: Processes) -> None:
    worker = processes.worker()
    (own,) = re.findall(r"([\w.@-]+) ready\.", worker.output())
    # With a destination, `inspect` returns when that worker answers; without one, it waits for its whole timeout.
    asked = ("--destination", own, "--timeout", str(PATIENCE))
    inspect = processes.start("celery", "-A", "chunkmill_workers", "inspect", "stats", "--json", *asked)
    assert inspect.popen.wait(PATIENCE) == 0
    lines = [line for line in inspect.output().splitlines() if line.startswith("{") and '"pool"' in line]
    ((name, stats),) = json.loads(lines[0]).items()
    assert stats["pool"]["implementation"].endswith("thread:TaskPool")
    assert stats["pool"]["max-concurrency"] == 2
    assert stats["prefetch_count"] == 2  # the worker takes only what it works on
    assert name.startswith("cpu-")
    assert worker.output().count("embedding on the CPU") == 1


@pytest.mark.slow
def test_a_worker_on_both_queues_runs_as_many_tasks_as_both_together(processes: Processes) -> None:
    """Tasks that wait for the provider do not reduce the number of tasks for the device."""
    numbers = {"EMBEDDING_PARALLEL_BATCHES": "3", "OPENAI_PARALLEL_REQUESTS": "5", "OPENAI_API_KEY": "sk-none"}
    for queues, tasks in (("gpu,openai", 8), ("openai", 5)):
        worker = processes.start("celery", "-A", "chunkmill_workers", "worker", "-Q", queues, **numbers)
        worker.wait_for("ready.")
        assert f"tasks at a time: {tasks}" in worker.output()
        assert worker.terminate() == 0


def test_a_worker_that_is_told_no_queue_takes_local_work_only(processes: Processes) -> None:
    """Celery's own default is every queue that is declared."""
    worker = processes.start("celery", "-A", "chunkmill_workers", "worker", fresh=True)
    worker.wait_for("ready.")
    assert re.findall(r"takes work of queue (.+?) from", worker.output()) == ["gpu"]
    assert worker.terminate() == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--autoscale=4,1"], marks=pytest.mark.slow),
        pytest.param(["-P", "solo"], marks=pytest.mark.slow),
        ["-Q", "gpu,gpus"],
    ],
)
def test_options_with_which_a_worker_would_fail_at_work_are_refused_at_its_start(
    processes: Processes, options: list[str]
) -> None:
    worker = processes.start("celery", "-A", "chunkmill_workers", "worker", *options)
    assert worker.popen.wait(PATIENCE) == 78
    assert options[0].partition("=")[0] in worker.output()
    assert "Traceback" not in worker.output()


def test_a_worker_without_its_model_says_so_and_ends(processes: Processes) -> None:
    worker = processes.worker(ready=False, EMBEDDING_MODEL="/no/such/folder")
    assert worker.popen.wait(PATIENCE) == 78
    assert "/no/such/folder" in worker.output()
    assert "Traceback" not in worker.output()


@pytest.mark.slow  # tests/integration/test_canary.py does it without a process
def test_a_worker_that_drifts_takes_no_doorbell_says_so_and_ends(
    processes: Processes, client: Client, db: sa.Engine, tmp_path: Path
) -> None:
    """A part of its weights is lost, which its fingerprint does not show. Only its vectors do."""
    assert processes.worker().terminate() == 0  # makes the reference
    processes.poller()
    job = client.enqueue(documents(100), collection="docs")
    until(lambda: sum(client._broker.queued_doorbells().values()) == 2)
    drifting = processes.worker(ready=False, EMBEDDING_MODEL=str(damaged_model(tmp_path / "model")))
    assert drifting.popen.wait(PATIENCE) == 78
    said = drifting.output()
    assert re.search(r"drift from space \w{12} .*golden text \d+ has a similarity of 0\.\d+", said)
    assert "chunkmill models canary --reset" in said
    assert "Traceback" not in said
    assert "ready." not in said
    with db.begin() as conn:
        untouched = conn.execute(sa.text("SELECT count(*) FROM chunk_batches WHERE attempt = 0")).scalar_one()
    assert untouched == sum(client._broker.queued_doorbells().values()) == 2
    assert client.job(job.id).state is JobState.RUNNING


@pytest.mark.slow
def test_two_workers_share_one_job(processes: Processes, client: Client, db: sa.Engine) -> None:
    processes.poller()
    workers = [processes.worker(ready=False) for _ in range(2)]
    for worker in workers:
        worker.wait_for("ready.")
    job = client.wait(client.enqueue(documents(800), collection="docs").id, timeout=PATIENCE)
    assert job.state is JobState.COMPLETED
    with db.begin() as conn:
        shares = conn.execute(sa.text("SELECT worker, sum(contents) FROM usage GROUP BY worker")).all()
    assert len(shares) == 2
    assert sum(share for _, share in shares) == 800


@pytest.mark.slow  # make chaos does it, and test_claims.py with leases that ran out
def test_a_frozen_worker_loses_its_lease_and_does_no_harm_when_it_wakes(
    processes: Processes, client: Client, db: sa.Engine
) -> None:
    processes.poller()
    frozen = processes.worker()
    job = client.enqueue(documents(300, words=100), collection="docs")
    until(lambda: client.job(job.id).embedded > 0, frozen.output)
    os.kill(frozen.popen.pid, signal.SIGSTOP)
    try:
        processes.worker()
        job = client.wait(job.id, timeout=PATIENCE)
    finally:
        os.kill(frozen.popen.pid, signal.SIGCONT)
    assert (job.state, job.embedded) == (JobState.COMPLETED, 300)
    assert frozen.terminate() == 0
    assert client.job(job.id) == job
    matrix = client.vectors("docs")
    assert len(matrix) == 300
    assert np.isfinite(np.stack(list(matrix.values()))).all()
