"""`chunkmill worker` with real workers: a worker that dies is replaced, and what it held is free at once."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from chunkmill import Chunk, Client, JobState
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
from tests.acceptance.conftest import Process, Processes
from tests.support.waiting import PATIENCE, until


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    narrow = settings.model_copy(update={"chunk_batch_size": 64})
    with Client(create_db(settings.require_database_url(), role="client"), Broker.connect(narrow), narrow) as made:
        yield made


def documents(n: int, words: int) -> list[Chunk]:
    return [Chunk(f"doc-{i}", f"{i} " + "about matters of some length " * (words // 5)) for i in range(n)]


def workers(supervisor: Process) -> list[int]:
    """Return the pids of all workers so far."""
    return [int(pid) for pid in re.findall(r"started, pid (\d+)", supervisor.output())]


def held_by(db: sa.Engine, pid: int) -> int:
    with db.begin() as conn:
        return int(
            conn.execute(
                sa.text("SELECT count(*) FROM chunk_batches WHERE state = 'running' AND lease_owner LIKE :owner"),
                {"owner": f"%:{pid}"},
            ).scalar_one()
        )


def freeze_at_work(db: sa.Engine, pid: int) -> bool:
    """Stop a process if it holds a lease."""
    if held_by(db, pid):
        os.kill(pid, signal.SIGSTOP)
        if held_by(db, pid):
            return True
        os.kill(pid, signal.SIGCONT)
    return False


@pytest.mark.slow  # make chaos kills supervised workers; tests of the supervisor do it with small processes
def test_a_dead_worker_is_replaced_and_its_leases_are_free_at_once(
    processes: Processes, client: Client, db: sa.Engine
) -> None:
    """A lease is longer than this test may take, so only the supervisor can have taken it back."""
    processes.poller()
    own = ("-c", "2", "-n", "own@%h")
    supervisor = processes.start("chunkmill.cli", "worker", *own, EMBEDDING_DEVICE="cpu", LEASE_SECONDS="3600")
    job = client.enqueue(documents(300, words=60), collection="docs")
    deaths = {signal.SIGKILL: "ended by SIGKILL (out of memory?)", signal.SIGSEGV: "ended by SIGSEGV"}
    for number, (death, evidence) in enumerate(deaths.items(), start=1):
        until(lambda n=number: len(workers(supervisor)) == n, supervisor.output)
        pid = workers(supervisor)[-1]
        until(lambda pid=pid: freeze_at_work(db, pid), supervisor.output)
        os.kill(pid, death)
        os.kill(pid, signal.SIGCONT)
        until(lambda pid=pid: not held_by(db, pid), supervisor.output)
        with db.begin() as conn:
            noted = conn.execute(
                sa.text("SELECT evidence FROM usage WHERE worker LIKE :owner AND evidence IS NOT NULL"),
                {"owner": f"%:{pid}"},
            ).scalars()
            assert set(noted) == {evidence}
        assert f"pid {pid}: {evidence}; starting again in" in supervisor.output()
    job = client.wait(job.id, timeout=PATIENCE)
    assert (job.state, job.embedded) == (JobState.COMPLETED, 300)
    assert client.audit("docs").complete
    assert len(workers(supervisor)) == 3
    assert "own@" in supervisor.output()
    assert supervisor.terminate() == 0
    assert not [pid for pid in workers(supervisor) if Path(f"/proc/{pid}").exists()]


def test_sigterm_drains_every_worker_and_leaves_nothing_behind(
    processes: Processes, client: Client, db: sa.Engine
) -> None:
    supervisor = processes.start("chunkmill.cli", "worker", EMBEDDING_DEVICE="cpu")
    job = client.enqueue(documents(600, words=200), collection="docs")
    until(lambda: client.job(job.id).embedded > 0, supervisor.output)
    assert supervisor.terminate() == 0
    (pid,) = workers(supervisor)
    assert not Path(f"/proc/{pid}").exists()
    assert f"pid {pid}: exit code 0" in supervisor.output()
    assert held_by(db, pid) == 0
    assert 0 < client.job(job.id).embedded < 600


def test_a_wrong_configuration_ends_it(processes: Processes) -> None:
    supervisor = processes.start("chunkmill.cli", "worker", EMBEDDING_DEVICE="cpu", EMBEDDING_MODEL="/no/such/folder")
    assert supervisor.popen.wait(PATIENCE) == 78
    assert len(workers(supervisor)) == 1
    assert "/no/such/folder" in supervisor.output()
    assert "wrong configuration" in supervisor.output()
    assert "Traceback" not in supervisor.output()
