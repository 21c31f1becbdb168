from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from app.client import Client
from app.db.connect import create_db
from app.domain.jobs import Job
from app.settings import Settings
from workers.context import WorkerContext
from workers.engines import Engines
from workers.lease import LeaseKeeper
from workers.pipeline import Outcome, run_chunk_batch


@pytest.fixture(scope="session")
def engines() -> Engines:
    """The bundled model, loaded once per pytest process. In float32: most tests compare numbers."""
    return Engines(Settings.from_env(embedding_dtype="fp32"), "cpu")


@pytest.fixture
def context(settings: Settings, engines: Engines) -> Iterator[WorkerContext]:
    """What a worker's tasks share, without the worker process around it."""
    db = create_db(settings.require_database_url(), role="worker")
    made = WorkerContext(settings, db, engines, LeaseKeeper(db, settings.lease_seconds), name="test-worker")
    yield made
    # A thread that a failed test left would look for its database for ever.
    made.stopping.set()
    made.leases._stop.set()
    sa.event.listen(db, "do_connect", _the_test_is_over)
    db.dispose()


def _the_test_is_over(*_: object) -> None:
    raise RuntimeError("the test that this connection is for is over")


class Runner:
    """Runs what is due in the ledger, as doorbells would, and hands the job back."""

    def __init__(self, context: WorkerContext, client: Client) -> None:
        self.context = context
        self.client = client

    def due(self) -> list[int]:
        with self.context.db.begin() as conn:
            return list(
                conn.execute(
                    sa.text(
                        "SELECT id FROM chunk_batches WHERE state = 'available' AND not_before <= now() ORDER BY id"
                    )
                ).scalars()
            )

    def run_due(self) -> list[Outcome]:
        return [run_chunk_batch(self.context, chunk_batch_id) for chunk_batch_id in self.due()]

    def finish(self, job: Job) -> Job:
        for _ in range(20):
            if not self.due():
                return self.client.job(job.id)
            self.run_due()
        pytest.fail(f"ChunkBatches become due for ever: {self.client.job(job.id)}")


@pytest.fixture
def runner(context: WorkerContext, client: Client) -> Runner:
    return Runner(context, client)


def count(db: sa.Engine, table: str) -> int:
    with db.begin() as conn:
        return int(conn.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one())


@pytest.fixture
def rows(db: sa.Engine) -> object:
    """``rows("jobs")``: how many rows a table has."""
    return lambda table: count(db, table)
