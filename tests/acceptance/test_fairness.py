"""Several jobs on one real worker: no job waits for all of another one, and a cancelled job stops at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from chunkmill import Client, JobState
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.domain.doorbells import SMALLEST_WINDOW
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.support.waiting import PATIENCE, until

SIZE = 32
"""Contents of a ChunkBatch: some tenths of a second on a CPU."""


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    small = settings.model_copy(update={"chunk_batch_size": SIZE})
    with Client(create_db(settings.require_database_url(), role="client"), Broker.connect(small), small) as made:
        yield made


def texts(name: str, chunk_batches: int) -> list[tuple[str, str]]:
    return [(f"{name}-{i}", f"{name} {i} " + "of some length " * 8) for i in range(chunk_batches * SIZE)]


def finished(db: sa.Engine) -> list[int]:
    """Return the job of every completed ChunkBatch, in the order in which they were completed."""
    with db.begin() as conn:
        return list(
            conn.execute(
                sa.text("SELECT job_id FROM chunk_batches WHERE state = 'completed' ORDER BY finished_at, id")
            ).scalars()
        )


@pytest.mark.slow  # tests/integration/test_fairness.py does it without a real worker
def test_two_jobs_of_one_priority_progress_together(processes: Processes, client: Client, db: sa.Engine) -> None:
    processes.poller()
    worker = processes.worker(EMBEDDING_PARALLEL_BATCHES="1")
    first = client.enqueue(texts("first", 60), collection="docs")
    until(lambda: client.job(first.id).embedded > 0, worker.output)
    second = client.enqueue(texts("second", 60), collection="docs")
    until(lambda: client.job(second.id).embedded >= 10 * SIZE, worker.output)
    order = finished(db)
    together = order[order.index(second.id) :]
    assert 10 - SMALLEST_WINDOW <= together.count(first.id) <= together.count(second.id) + SMALLEST_WINDOW
    assert client.job(first.id).remaining > 0
    for job in (first, second):
        client.cancel(job.id)


def test_an_interactive_job_passes_a_bulk_job_and_the_bulk_job_goes_on(
    processes: Processes, client: Client, db: sa.Engine
) -> None:
    processes.poller()
    worker = processes.worker(EMBEDDING_PARALLEL_BATCHES="1")
    bulk = client.enqueue(texts("bulk", 120), collection="docs")
    until(lambda: client.job(bulk.id).embedded > 0, worker.output)
    urgent = client.enqueue(texts("urgent", 1), collection="docs", priority="high")
    urgent = client.wait(urgent.id, timeout=PATIENCE)
    assert urgent.state is JobState.COMPLETED
    with db.begin() as conn:
        before_it = conn.execute(
            sa.text(
                "SELECT count(*) FROM chunk_batches b, chunk_batches u WHERE u.job_id = :urgent AND b.job_id = :bulk "
                "AND b.finished_at BETWEEN u.rung_at AND u.finished_at"
            ),
            {"urgent": urgent.id, "bulk": bulk.id},
        ).scalar_one()
    # It waited for the ChunkBatch in the worker's hands, and not for everything in Redis.
    assert before_it <= SMALLEST_WINDOW // 2
    going_on = client.job(bulk.id)
    assert going_on.state is JobState.RUNNING
    until(lambda: client.job(bulk.id).embedded > going_on.embedded, worker.output)

    # The bells of a cancelled job, which are still in Redis, are answered without any work.
    cancelled = client.cancel(bulk.id)
    with db.begin() as conn:
        begun = conn.execute(sa.text("SELECT sum(attempt) FROM chunk_batches")).scalar_one()
    after = client.wait(client.enqueue(texts("after", 1), collection="docs").id, timeout=PATIENCE)
    assert (cancelled.state, after.state) == (JobState.CANCELLED, JobState.COMPLETED)
    until(lambda: sum(client._broker.queued_doorbells().values()) == 0, worker.output)
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT sum(attempt) FROM chunk_batches")).scalar_one() == begun + 1
    assert worker.terminate() == 0


@pytest.mark.slow
def test_cancel_stops_what_a_worker_is_in(processes: Processes, client: Client, db: sa.Engine) -> None:
    processes.poller()
    worker = processes.worker(EMBEDDING_PARALLEL_BATCHES="1")
    client._settings = client._settings.model_copy(update={"chunk_batch_size": 16384})
    bulk = client.enqueue(texts("bulk", 120), collection="docs")
    until(lambda: client.job(bulk.id).embedded > 0, worker.output)
    bulk = client.cancel(bulk.id)
    # The worker hears of it at the end of a TokenBatch, or earlier if it writes.
    until(lambda: "lost its lease" in worker.output() or "superseded" in worker.output(), worker.output)
    after = client.wait(client.enqueue(texts("after", 1), collection="docs").id, timeout=PATIENCE)
    with db.begin() as conn:
        vectors = conn.execute(sa.text("SELECT count(*) FROM vectors_1")).scalar_one()
    assert (after.state, after.embedded) == (JobState.COMPLETED, SIZE)
    assert bulk.embedded + SIZE <= vectors < bulk.chunks
    assert worker.terminate() == 0
