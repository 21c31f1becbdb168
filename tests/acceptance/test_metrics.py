"""Metrics of real processes: what a worker and a poller report equals what the ledger says."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from chunkmill import Chunk, Client, JobState
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
from tests.acceptance.conftest import Process, Processes
from tests.support.waiting import PATIENCE, until

SECRET = "ZEBRAFISH"
PORT = "22464"
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def page_of(process: Process) -> str:
    process.wait_for("/metrics")
    match = re.search(r"metrics are served at (http://127\.0\.0\.1:\d+/metrics)", process.output())
    assert match, process.output()
    with urllib.request.urlopen(match[1], timeout=PATIENCE) as answer:  # noqa: S310 - the line above has its scheme
        return str(answer.read().decode())


def series(page: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float | None:
    return series.get((f"chunkmill_{name}", frozenset(labels.items())))


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    narrow = settings.model_copy(update={"chunk_batch_size": 64})
    with Client(create_db(settings.require_database_url(), role="client"), Broker.connect(narrow), narrow) as made:
        yield made


def test_a_job_is_the_same_in_metrics_and_ledger(
    processes: Processes, client: Client, settings: Settings, db: sa.Engine
) -> None:
    """Each process has its own port, the numbers are those of the ledger, and no text, id or secret is among them."""
    key = "sk-test-not-to-be-seen-anywhere"
    worker = processes.worker(METRICS_PORT=PORT)
    poller = processes.start("chunkmill.cli", "poller", METRICS_PORT=PORT, OPENAI_API_KEY=key)
    job = client.enqueue(
        [Chunk(f"doc-{i}", f"{SECRET} {i} " + "and its matters " * (i % 9)) for i in range(150)], collection="herring"
    )
    assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED
    # The last attempt is counted after its job has ended.
    until(lambda: value(series(page_of(worker)), "attempts_total", outcome="completed") == 3, worker.output)
    of_worker = series(page_of(worker))
    with db.begin() as conn:
        booked = conn.execute(
            sa.text(
                "SELECT sum(contents) AS contents, sum(tokens) AS tokens, sum(engine_seconds) AS seconds, "
                "count(*) FILTER (WHERE outcome = 'completed') AS completed, min(worker) AS worker FROM usage"
            )
        ).one()
    assert value(of_worker, "contents_total") == booked.contents == 150
    assert value(of_worker, "tokens_total") == booked.tokens
    assert value(of_worker, "engine_seconds_total") == pytest.approx(booked.seconds)
    padded = value(of_worker, "padded_tokens_total")
    assert padded is not None
    assert padded >= booked.tokens
    assert value(of_worker, "claims_total", result="claimed") == booked.completed == 3
    assert any(("name", booked.worker) in labels for name, labels in of_worker if name == "chunkmill_process_info")

    until(lambda: value(series(page_of(poller)), "jobs", state="completed") == 1, poller.output)
    of_poller = series(page_of(poller))
    assert value(of_poller, "ready_chunk_batches", lane="local") == 0
    assert value(of_poller, "remaining_contents") == 0
    assert value(of_poller, "workers", kind="local", state="live") == 1
    assert value(of_poller, "lane_state", lane="local", state="running") == 1
    assert value(of_poller, "store_up", store="postgres") == value(of_poller, "store_up", store="redis") == 1
    until(lambda: (value(series(page_of(poller)), "poller_rounds_total") or 0) > 0, poller.output)
    assert not [name for name, _ in of_poller if name == "chunkmill_tokens_total"]

    everything = page_of(worker) + page_of(poller)
    for word in (
        SECRET,
        "matters",
        "herring",
        "doc-1",
        key,
        str(sa.make_url(settings.require_database_url()).database),
    ):
        assert word not in everything
    assert worker.terminate() == 0
    with db.begin() as conn:  # the worker has signed off
        assert conn.execute(sa.text("SELECT count(*) FROM worker_reports")).scalar_one() == 0
    assert poller.terminate() == 0


def test_a_port_that_cannot_be_had_is_a_wrong_configuration(processes: Processes, tmp_path: Path) -> None:
    worker = processes.worker(METRICS_PORT=PORT, METRICS_ADDRESS="203.0.113.1", ready=False)
    assert worker.popen.wait(PATIENCE) == 78
    assert "METRICS_ADDRESS" in worker.output()
