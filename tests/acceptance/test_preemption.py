"""A real worker on a machine whose cloud announces that the machine is about to be taken away."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from chunkmill import Chunk, Client
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
from tests.acceptance.conftest import Process, Processes
from tests.support.metadata_servers import AwsServer, GcpServer, MetadataServer
from tests.support.waiting import PATIENCE, until

TEXTS = 600


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    narrow = settings.model_copy(update={"chunk_batch_size": 64})
    with Client(create_db(settings.require_database_url(), role="client"), Broker.connect(narrow), narrow) as made:
        yield made


def worker_in_mid_job(
    processes: Processes, client: Client, server: MetadataServer, notice: str, *, texts: int = TEXTS
) -> tuple[Process, int]:
    """Return a worker that watches ``server`` and is at work, and the id of its job."""
    worker = processes.worker(PREEMPTION_NOTICE=notice, PREEMPTION_METADATA_URL=server.url)
    job = client.enqueue(
        (Chunk(f"doc-{i}", f"{i} " + "about matters of some length " * 40) for i in range(texts)), collection="docs"
    )
    until(lambda: client.job(job.id).embedded > 0, worker.output)
    server.wait_for(lambda: server.asked(server.notice_path) >= 2)
    return worker, job.id


def assert_drained(client: Client, db: sa.Engine, job_id: int, *, at_least: int) -> None:
    """Assert that no ChunkBatch is held, none was charged, and what was embedded is kept."""
    with db.begin() as conn:
        running = conn.execute(sa.text("SELECT count(*) FROM chunk_batches WHERE state = 'running'")).scalar_one()
        charged = conn.execute(
            sa.text("SELECT count(*) FROM chunk_batches WHERE state = 'available' AND max_attempts - attempt < 5")
        ).scalar_one()
        vectors = conn.execute(sa.text("SELECT count(*) FROM vectors_1")).scalar_one()
    assert (running, charged) == (0, 0)
    assert at_least <= client.job(job_id).embedded == vectors < TEXTS


@pytest.mark.parametrize(
    ("cloud", "notice"),
    [
        pytest.param(GcpServer, "gcp", marks=pytest.mark.slow),
        pytest.param(AwsServer, "aws", marks=pytest.mark.slow),
        (AwsServer, "auto"),
    ],
)
def test_a_notice_drains_the_worker(
    processes: Processes, client: Client, db: sa.Engine, cloud: type[MetadataServer], notice: str
) -> None:
    with cloud() as server:
        worker, job_id = worker_in_mid_job(processes, client, server, notice)
        done = client.job(job_id).embedded
        server.preempt()
        assert worker.popen.wait(PATIENCE) == 0, worker.output()
    assert f"preemption notice from {cloud.cloud}" in worker.output()
    assert_drained(client, db, job_id, at_least=done)


def test_the_systems_own_signal_after_the_notice_cuts_no_drain_short(
    processes: Processes, client: Client, db: sa.Engine
) -> None:
    """On GCP the machine starts to shut down right after the notice, and sends SIGTERM to all processes."""
    with GcpServer() as server:
        worker, job_id = worker_in_mid_job(processes, client, server, "gcp")
        done = client.job(job_id).embedded
        server.preempt()
        worker.wait_for("preemption notice from gcp")
        worker.popen.send_signal(signal.SIGTERM)
        assert worker.popen.wait(PATIENCE) == 0, worker.output()
    assert_drained(client, db, job_id, at_least=done)


@pytest.mark.slow
def test_neither_a_hint_nor_nonsense_stops_the_worker(processes: Processes, client: Client) -> None:
    with AwsServer() as server:
        server.hint = '{"noticeTime": "2026-11-21T08:00:00Z"}'
        worker, job_id = worker_in_mid_job(processes, client, server, "aws", texts=200)
        server.misbehave(lambda handler: handler.wfile.write(b"TRUE"))
        assert client.wait(job_id, timeout=PATIENCE).embedded == 200
        assert worker.popen.poll() is None
        assert worker.output().count("PREEMPTION_DRAIN_ON_REBALANCE") == 1
        assert worker.terminate() == 0
