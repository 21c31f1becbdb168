"""Real workers with the real engine that die because of their work, hang in it or leave in the middle of it."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.domain.states import JobState
from chunkmill.errors import JobFailed
from tests.acceptance.conftest import Process, Processes
from tests.acceptance.odd_worker import HANGS, MARK
from tests.support.waiting import PATIENCE, until


def rows(db: sa.Engine, statement: str) -> list[tuple[Any, ...]]:
    with db.begin() as conn:
        return [tuple(row) for row in conn.execute(sa.text(statement))]


def odd(processes: Processes, how: str, **env: str) -> Process:
    return processes.start("tests.acceptance.odd_worker", ODD=how, LEASE_SECONDS="3600", **env)


def documents(n: int, words: int = 60) -> list[tuple[str, str]]:
    return [(f"d{i}", f"document {i} " + f"word{i} " * words) for i in range(n)]


@pytest.mark.slow  # tests/integration/test_suspects.py and test_deaths.py do it without processes
def test_a_text_that_kills_workers_ends_alone_on_the_dead_list(
    processes: Processes, client: Client, db: sa.Engine
) -> None:
    processes.poller()
    chunks = [*documents(2), ("killer", MARK), *documents(4)[2:]]
    job = client.enqueue(chunks, collection="docs")
    deaths = 0
    while not client.job(job.id).state.is_final:
        worker = odd(processes, "segfault")
        until(lambda: worker.popen.poll() is not None or client.job(job.id).state.is_final, worker.output)  # noqa: B023
        deaths += worker.popen.poll() == -signal.SIGSEGV
        with db.begin() as conn:  # ends its lease, which lasts longer than a slow machine stands still
            conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() WHERE state = 'running'"))
        assert deaths <= 6, "handed out for ever"
    with pytest.raises(JobFailed, match="killer"):
        client.wait(job.id, timeout=PATIENCE)
    (dead,) = client.job(job.id).dead_chunks
    assert (dead.chunk_id, dead.code) == ("killer", "kills_workers")
    assert dead.reason.count("silent past its lease") >= 2
    assert MARK not in dead.reason
    audit = client.audit("docs")
    assert (audit.missing_ids, audit.embedded, audit.pending) == (("killer",), 4, 0)
    # The text died twice with its ChunkBatch and then alone, so its neighbours did not die with it again.
    assert deaths == 4
    assert rows(db, "SELECT max(deaths) FROM chunk_batches") == [(4,)]


@pytest.mark.parametrize(
    ("how", "env", "evidence"),
    [
        ("hang", {"STEP_DEADLINE_SECONDS": "10"}, "a forward pass takes"),
        pytest.param(
            "tokenizer", {"STEP_DEADLINE_SECONDS": "10"}, "a call of the tokenizer takes", marks=pytest.mark.slow
        ),
        pytest.param("break", {}, "no longer runs on cuda:0", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_the_watchdog_ends_a_worker_whose_device_is_lost(
    how: str, env: dict[str, str], evidence: str, processes: Processes, client: Client, db: sa.Engine
) -> None:
    """Its leases come back at once, with the evidence, although they would have lasted for minutes."""
    job = client.enqueue([*documents(3), ("k", MARK)], collection="docs")
    worker = odd(processes, how, **env)
    until(lambda: worker.popen.poll() is not None, worker.output)
    assert worker.popen.returncode == 70, worker.output()
    assert evidence in worker.output()
    ((outcome, seen),) = rows(db, "SELECT outcome, evidence FROM usage")
    assert outcome == "died"
    assert evidence in seen
    assert rows(db, "SELECT state, deaths, max_attempts - attempt FROM chunk_batches") == [("available", 1, 5)]
    processes.poller()
    processes.worker()
    assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED


def test_the_watchdog_ends_a_worker_that_no_longer_consumes(processes: Processes, client: Client) -> None:
    worker = odd(processes, "deaf", STALL_SECONDS="2")
    worker.wait_for("Canceling queue gpu")
    processes.poller()
    client.enqueue(documents(3), collection="docs")
    until(lambda: worker.popen.poll() is not None, worker.output)
    assert worker.popen.returncode == 70, worker.output()
    assert re.search(r"\d+ doorbells wait in Redis and none has reached this worker", worker.output())


@pytest.mark.slow
def test_an_idle_worker_on_an_empty_queue_is_left_alone(processes: Processes) -> None:
    worker = processes.worker(STALL_SECONDS="1")
    time.sleep(4)
    assert worker.popen.poll() is None
    assert worker.terminate() == 0


def test_a_worker_that_hangs_while_it_drains_gives_back_what_it_holds_and_leaves(
    processes: Processes, client: Client, db: sa.Engine
) -> None:
    client.enqueue([("k", MARK)], collection="docs")
    worker = odd(processes, "hang")
    worker.wait_for(HANGS)
    assert worker.terminate() == 0
    assert rows(db, "SELECT state, deaths, max_attempts - attempt FROM chunk_batches") == [("available", 0, 5)]
    assert rows(db, "SELECT outcome, evidence, ended_at IS NULL FROM usage") == [("released", None, False)]


def test_a_second_sigterm_ends_the_worker_at_once(processes: Processes, client: Client, db: sa.Engine) -> None:
    client.enqueue([("k", MARK)], collection="docs")
    worker = odd(processes, "hang", ODD_DRAIN_SECONDS="3600")
    worker.wait_for(HANGS)
    os.kill(worker.popen.pid, signal.SIGTERM)
    worker.wait_for("draining")
    assert worker.terminate() == 143
