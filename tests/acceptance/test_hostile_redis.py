"""Somebody else writes to Redis: real workers refuse it, stay, and answer the next doorbell."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from chunkmill.broker import PRIORITY_STEPS, Doorbell, keys_of
from chunkmill.client import Client
from chunkmill.domain.states import JobState
from chunkmill.messages.door import LARGEST_REPLY
from chunkmill.settings import Settings
from tests.acceptance.conftest import Process, Processes
from tests.acceptance.odd_worker import ODD_BELL
from tests.conftest import client_for
from tests.support.hostile import MARK, hostile_bells, hostile_commands, hostile_events, random_messages
from tests.support.waiting import PATIENCE, until

PORT = "23464"
OTHER_TYPES = ("unacked", "unacked_index", "unacked_mutex", "_kombu.binding.gpu", "_kombu.binding.reply.celery.pidbox",
               "_kombu.binding.celery.pidbox", "_kombu.binding.celeryev", "_kombu.binding_deadlines")  # fmt: skip


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with client_for(settings) as made:
        yield made


@pytest.fixture
def store(client: Client) -> redis.Redis:
    return client._broker.client


def channel(settings: Settings, name: str) -> str:
    url = urlsplit(settings.require_redis_url())
    number = re.search(r"db=(\d+)", url.query)
    return f"/{number[1] if number else url.path.strip('/') or 0}.{name}"


def memory(process: Process) -> int:
    """Return the megabytes that the process holds."""
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]


def refused(process: Process) -> dict[tuple[str, str], int]:
    """Return how many messages the process has refused, by place and reason."""
    match = re.search(r"metrics are served at (http://127\.0\.0\.1:\d+/metrics)", process.output())
    assert match, process.output()
    with urllib.request.urlopen(match[1], timeout=PATIENCE) as answer:  # noqa: S310 - the line above has its scheme
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.labels["place"], sample.labels["reason"]): int(sample.value)
        for family in families
        for sample in family.samples
        if sample.name == "chunkmill_refused_messages_total" and sample.value
    }


def of(place: str, counts: dict[tuple[str, str], int]) -> int:
    return sum(number for (name, _), number in counts.items() if name == place)


def answers(client: Client, worker: Process, name: str) -> None:
    """Assert that the worker answers a right doorbell."""
    job = client.enqueue([(name, f"the text of {name}")], collection=name)
    until(lambda: client.job(job.id).state.is_final or worker.popen.poll() is not None, worker.output)
    assert client.job(job.id).state is JobState.COMPLETED, worker.output()


def test_nothing_in_redis_ends_a_worker_or_makes_it_deaf(
    processes: Processes, client: Client, store: redis.Redis, settings: Settings
) -> None:
    """No poller runs, so that only the worker itself can have removed what was in the way.

    `celery -A chunkmill_workers worker` is started without an option that says no to gossip and mingle.
    """
    for key in OTHER_TYPES:
        store.set(key, MARK)
    worker = processes.worker(METRICS_PORT=PORT)
    answers(client, worker, "first")
    before = memory(worker)

    bells, commands, events = hostile_bells(), hostile_commands(), hostile_events()
    store.rpush("gpu", *bells.values())
    for message in events.values():
        assert store.publish(channel(settings, "celeryev/worker.heartbeat"), message) == 0  # nobody listens: no gossip
    until(lambda: not store.exists(*keys_of("gpu")), worker.output)
    # A connection over which too much comes is closed, and made again.
    too_large = [message for message in commands.values() if len(message) > LARGEST_REPLY]
    small = [message for message in commands.values() if len(message) <= LARGEST_REPLY]
    name = channel(settings, "celery.pidbox")
    for message in small:
        assert store.publish(name, message) == 1
    until(lambda: of("control", refused(worker)) == len(small), lambda: str(refused(worker)))
    unread = sum(len(message) > LARGEST_REPLY for message in bells.values())
    assert of("unknown", refused(worker)) == unread
    for number, message in enumerate(too_large, start=1):
        until(lambda message=message: store.publish(name, message) == 1)
        until(lambda number=number: of("unknown", refused(worker)) == unread + number, lambda: str(refused(worker)))
    counts = refused(worker)
    assert of("gpu", counts) + unread == len(bells)
    assert {reason for _, reason in counts} == {"size", "shape", "task", "options"}
    answers(client, worker, "second")
    assert memory(worker) - before < 60

    asked = processes.start("celery", "-A", "chunkmill_workers", "inspect", "ping", "--timeout=5")
    assert asked.popen.wait(PATIENCE) == 0, asked.output()
    assert "1 node online" in asked.output()
    said = worker.output()
    assert MARK not in said
    assert "refused messages in Redis" in said
    for sign in ("Traceback", "CRITICAL", "ERROR", "mingle", "Connection to broker lost"):
        assert sign not in said, said
    assert worker.terminate() == 0


def test_a_worker_whose_user_may_not_read_its_channels_names_them(
    processes: Processes, store: redis.Redis, settings: Settings
) -> None:
    """Celery says only that the connection was lost, once a second. The user may read those of another database."""
    own, other = channel(settings, "celery.pidbox"), "/99.celery.pidbox"
    rights = ["~*", "+@all", "resetchannels", f"&{other}"]
    store.execute_command("ACL", "SETUSER", "of_another_database", "on", ">a-password", *rights)
    try:
        url = settings.require_redis_url().replace("://", "://of_another_database:a-password@")
        worker = processes.worker(ready=False, REDIS_URL=url)
        worker.wait_for("Redis does not let the user in REDIS_URL read the channels")
        said = worker.output()
        assert own in said
        assert "a-password" not in said
        assert "deploy/redis-acl.conf" in said
    finally:
        store.execute_command("ACL", "DELUSER", "of_another_database")


def test_a_key_of_another_type_in_the_place_of_a_queue_is_deleted(
    processes: Processes, client: Client, store: redis.Redis
) -> None:
    kinds = [
        store.set,
        store.sadd,
        lambda key, value: store.hset(key, value, value),
        lambda key, value: store.zadd(key, {value: 1}),
    ]
    for make, key in zip(kinds, keys_of("gpu"), strict=True):
        make(key, MARK)
    worker = processes.worker()
    until(lambda: not store.exists(*keys_of("gpu")), worker.output)
    answers(client, worker, "first")
    for key in keys_of("gpu"):
        store.set(key, MARK)
        until(lambda key=key: not store.exists(key), worker.output)
    answers(client, worker, "second")
    assert MARK not in worker.output()


def test_a_worker_is_not_kept_from_its_queue(
    processes: Processes, client: Client, store: redis.Redis, settings: Settings
) -> None:
    """Neither a long queue of strange messages nor somebody who publishes without a pause can do it, and a worker that
    refuses messages is not taken for one that no longer consumes."""
    worker = processes.worker(STALL_SECONDS="2", METRICS_PORT=PORT)
    processes.poller()
    for _ in range(20):
        store.rpush("gpu", *[b"x"] * 10_000)
    answers(client, worker, "first")
    assert of("gpu", refused(worker)) < 20_000
    name = channel(settings, "celery.pidbox")
    job = client.enqueue([(f"c{i}", f"text {i}") for i in range(60)], collection="second")
    while not client.job(job.id).state.is_final:
        with store.pipeline(transaction=False) as pipe:
            for _ in range(2000):
                pipe.publish(name, b"x" * 300)
            pipe.execute()
        assert worker.popen.poll() is None, worker.output()
    assert client.job(job.id).state is JobState.COMPLETED
    assert worker.terminate() == 0


@pytest.mark.slow  # four starts of a worker; tests of the supervisor do it with small processes
def test_a_supervisor_whose_workers_end_again_and_again_says_why_and_clears_the_queue(
    processes: Processes, client: Client, store: redis.Redis
) -> None:
    """Each doorbell here passes the door and ends whoever takes it. The poller rings again for the job."""
    client._broker.ring([Doorbell(ODD_BELL, 0)] * 20)
    job = client.enqueue([("a", "a text behind them")], collection="docs")
    supervisor = processes.start("tests.acceptance.odd_supervisor", ODD="bell", EMBEDDING_DEVICE="cpu")
    supervisor.wait_for("worker on the CPU ended 3 times in a row soon after its start")
    assert re.search(r"queue gpu was cleared: 1\d doorbells were deleted", supervisor.output())
    processes.poller()
    until(lambda: client.job(job.id).state.is_final, supervisor.output)
    assert client.job(job.id).state is JobState.COMPLETED
    assert supervisor.output().count("started, pid") == 4
    assert supervisor.terminate() == 0


@pytest.mark.slow
def test_ten_thousand_random_messages_change_nothing(
    processes: Processes, client: Client, store: redis.Redis, settings: Settings
) -> None:
    """`make fuzz` runs it. The seed is fixed."""
    worker = processes.worker()
    answers(client, worker, "first")
    name = channel(settings, "celery.pidbox")
    sizes = []
    for number, message in enumerate(random_messages(seed=17, number=10_000), start=1):
        store.rpush(keys_of("gpu")[number % len(PRIORITY_STEPS)], message)
        store.publish(name, message)
        if number % 500 == 0:
            until(lambda: not store.exists(*keys_of("gpu")), worker.output)
            sizes.append(memory(worker))
            assert worker.popen.poll() is None, worker.output()
    assert sizes[-1] - sizes[4] < 30
    answers(client, worker, "second")
    assert worker.terminate() == 0
