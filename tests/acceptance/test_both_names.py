"""Workers and publishers of two releases beside each other: doorbells have two names during one release."""

from __future__ import annotations

from chunkmill.broker import ADVANCE_TASK, EMBED_TASK, NEXT_NAMES, QUEUE, REQUEST_TASK, Broker
from chunkmill.client import Client
from chunkmill.domain.states import JobState
from tests.acceptance.conftest import Processes
from tests.support.waiting import PATIENCE


def test_the_names_are_those_of_the_last_release_and_of_the_next() -> None:
    assert (EMBED_TASK, REQUEST_TASK, ADVANCE_TASK) == (
        "workers.embed_chunk_batch",
        "workers.request_chunk_batch",
        "workers.advance_provider_batch",
    )
    for name, next_name in NEXT_NAMES.items():
        assert next_name == f"chunkmill_{name}"


def test_a_worker_answers_doorbells_under_both_names(processes: Processes, client: Client, broker: Broker) -> None:
    jobs = [client.enqueue([(name, f"the text of {name}")], collection=name) for name in ("last", "next")]
    assert sum(broker.queued_doorbells().values()) == 2
    broker.client.flushdb()  # deletes what the client rang, and no poller runs that would ring again
    for chunk_batch_id, name in ((1, EMBED_TASK), (2, NEXT_NAMES[EMBED_TASK])):
        broker.celery.send_task(name, args=[chunk_batch_id], queue=QUEUE)
    worker = processes.worker()
    for job in jobs:
        assert client.wait(job.id, timeout=PATIENCE).state is JobState.COMPLETED, worker.output()
