"""Postgres stops, crashes and cuts connections while workers work: they continue by themselves, uncharged."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db, migrate
from chunkmill.domain.states import JobState
from chunkmill.embedded import Stack
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.support.embedded_homes import folder_for_homes
from tests.support.waiting import PATIENCE, until


@pytest.fixture
def own(settings: Settings) -> Iterator[tuple[Stack, Settings]]:
    """Yield servers of its own, because other tests share theirs. With fsync, Postgres recovers from a crash."""
    with folder_for_homes("cm-") as home:
        stack = Stack(home, fsync=True)
        status = stack.up()
        migrate(status.database_url)
        changed = {"database_url": sa.make_url(status.database_url).render_as_string(hide_password=False)}
        changed["redis_url"] = status.redis_url
        yield stack, Settings.from_env(**changed, chunk_batch_size=64, lease_seconds=3.0)


@pytest.mark.slow
def test_the_fleet_outlives_restarts_crashes_and_cut_connections(own: tuple[Stack, Settings], tmp_path: Path) -> None:
    stack, settings = own
    processes = Processes(settings, tmp_path)
    poller, worker = processes.poller(), processes.worker()
    db = create_db(settings.require_database_url(), role="test")
    try:
        with Client(db, Broker.connect(settings), settings) as client:
            documents = [(f"d{i}", f"document {i} " + f"word{i} " * 60) for i in range(900)]
            job_id = client.enqueue(documents, collection="docs").id

            def embedded() -> int:
                return patiently(lambda: client.job(job_id).embedded)

            def further() -> None:
                before = embedded()
                until(lambda: embedded() > before or done(), lambda: worker.output() + poller.output())

            def done() -> bool:
                return patiently(lambda: client.job(job_id).state.is_final)

            further()
            with db.begin() as conn:  # cuts every connection of the worker, whatever it is doing
                cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = :name"
                assert conn.execute(sa.text(cut), {"name": "chunkmill-worker"}).scalar_one() > 0
            further()
            for how in (signal.SIGINT, signal.SIGQUIT):  # a fast shutdown, and one that is like a crash
                pid = stack.status().postgres.pid
                assert pid is not None
                os.kill(pid, how)
                said = poller.output().count("trying again")
                until(lambda: not stack.status().postgres.running)
                until(lambda said=said: poller.output().count("trying again") > said, poller.output)  # type: ignore[misc]
                stack.up()
                further()
            job = patiently(lambda: client.wait(job_id, timeout=PATIENCE))
            assert (job.state, job.embedded, job.dead) == (JobState.COMPLETED, 900, 0)
            assert client.audit("docs").complete
            with db.begin() as conn:
                charged = "SELECT id, attempt, max_attempts, deaths, error FROM chunk_batches"
                assert conn.execute(sa.text(f"{charged} WHERE attempt - (max_attempts - 5) > 1")).all() == []
                failed = conn.execute(sa.text("SELECT evidence FROM usage WHERE outcome = 'failed'"))
                assert failed.scalars().all() == []
        assert worker.popen.poll() is None
        assert poller.popen.poll() is None
        assert worker.terminate() == 0
    finally:
        processes.stop_all()
        db.dispose()


def patiently(ask: Any) -> Any:
    """Ask again until Postgres answers: a client gets an error while it is away."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return ask()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
