"""Celery's configuration is data, so each value that a promise rests on stands here with its reason."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator

import pytest
from celery import Celery
from redis._parsers.base import BaseParser

from chunkmill.broker import PRIORITY_STEPS, Broker, _batch, make_celery
from chunkmill.domain.states import Priority
from chunkmill.messages.transport import RedisTransport
from chunkmill.settings import Settings

URL = "redis://127.0.0.1:1/0"
"""Nothing listens there, and nothing connects: what is tested is what would be sent."""

CONFIGURATION = [
    ("broker_url", URL, "the server that REDIS_URL names"),
    ("task_default_queue", "gpu", "a bell without a queue of its own goes to the local workers"),
    ("task_acks_late", True, "a worker that drains can put back the bells of what it gives back"),
    ("task_ignore_result", True, "results are in Postgres; Redis would keep a second, stale copy"),
    ("task_serializer", "json", "a message is an id, and nothing in it can be run"),
    ("accept_content", ["json"], "pickle would run what anybody who can write to Redis put there"),
    ("worker_pool", "threads", "CUDA cannot be begun again after a fork"),
    ("worker_concurrency", 3, "EMBEDDING_PARALLEL_BATCHES says how many ChunkBatches a worker holds"),
    ("worker_prefetch_multiplier", 1, "a worker holds no bell that another could answer"),
    ("worker_enable_prefetch_count_reduction", False, "after a lost connection a worker keeps its concurrency"),
    ("worker_soft_shutdown_timeout", 0, "it works for processes only; with threads it turns into an error"),
    ("worker_send_task_events", True, "Flower sees what is done"),
    ("worker_hijack_root_logger", False, "our format of logs stays, which leaves passwords out"),
    ("broker_connection_retry_on_startup", True, "a worker that starts before Redis waits for it"),
    ("broker_connection_max_retries", None, "a worker outlives any outage of Redis"),
    ("broker_connection_timeout", 5, "seconds: an address that does not answer is given up"),
]

TRANSPORT = {
    # Seconds. Without it a frozen Redis hangs whoever sends a command, for ever.
    "socket_timeout": 30,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 25,  # below the timeouts of firewalls that forget quiet connections
    # One list in Redis for each rank, served in order.
    "priority_steps": [0, 3, 6, 9],
    "queue_order_strategy": "priority",
    # A publisher gives up after two more tries within about a second, because the poller rings again.
    "max_retries": 2,
    "interval_start": 0.1,
    "interval_step": 0.2,
    "interval_max": 0.5,
}


def settings(**other: object) -> Settings:
    return Settings.from_env(**{"redis_url": URL, "embedding_parallel_batches": 3, **other})


@pytest.mark.parametrize(("name", "value", "reason"), CONFIGURATION, ids=[name for name, _, _ in CONFIGURATION])
def test_each_promised_value_of_celery(name: str, value: object, reason: str) -> None:
    assert make_celery(settings()).conf[name] == value, reason


def test_each_promised_value_of_the_connection_to_redis() -> None:
    assert make_celery(settings()).conf.broker_transport_options == TRANSPORT


def test_nothing_else_differs_from_celerys_defaults() -> None:
    ours, default = dict(make_celery(settings()).conf), dict(Celery(set_as_current=False).conf)
    differing = {name for name in ours if ours[name] != default.get(name)}
    assert differing <= {name for name, _, _ in CONFIGURATION} | {"broker_transport_options", "task_queues"}


def test_each_queue_is_declared() -> None:
    """``celery worker`` without -Q, and ``celery purge``, go by what is declared."""
    assert [queue.name for queue in make_celery(settings()).conf.task_queues] == ["gpu", "openai"]


def test_every_rank_has_a_list_in_redis() -> None:
    """kombu would put any other rank into the list below it, and the poller counts the bells of each list."""
    assert {priority.rank for priority in Priority} < set(PRIORITY_STEPS)
    assert Priority.HIGH.rank < Priority.NORMAL.rank < Priority.LOW.rank


@pytest.mark.parametrize(
    ("url", "verified"),
    [
        ("rediss://host:6379/0", {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}),
        (URL, None),
        ("unix:///run/redis.sock", None),
    ],
)
def test_certificates_are_verified(url: str, verified: object) -> None:
    """kombu's own default is to take any certificate."""
    assert (make_celery(settings(redis_url=url)).conf.broker_use_ssl or None) == verified


def test_the_look_at_the_queue_gives_up_sooner_than_the_workers() -> None:
    """A round of the poller waits for it, and so does whoever types `chunkmill status`."""
    broker = Broker.connect(settings())
    options = broker.client.connection_pool.connection_kwargs
    broker.close()
    assert {name: options[name] for name in ("socket_timeout", "socket_connect_timeout", "health_check_interval")} == {
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "health_check_interval": 25,
    }


def test_workers_and_publishers_have_one_configuration() -> None:
    """Otherwise they would not find one another's lists, or wait for one another."""
    names = ["broker_transport_options", *(name for name, _, _ in CONFIGURATION)]
    code = (
        "import json, sys; from chunkmill_workers.celery import app; "
        "print(json.dumps({name: app.conf[name] for name in json.loads(sys.argv[1])}))"
    )
    env = {**os.environ, "REDIS_URL": URL, "EMBEDDING_PARALLEL_BATCHES": "3", "DATABASE_URL": "postgresql://h/d"}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(names)], env=env, capture_output=True, text=True)
    publisher = make_celery(settings()).conf
    assert json.loads(done.stdout) == {name: publisher[name] for name in names}, done.stderr


@pytest.mark.parametrize(
    ("imports", "module"),
    [
        ("chunkmill.client, chunkmill.poller.poller, chunkmill_workers.tasks", "kombu.transport.redis"),
        ("chunkmill_workers.celery", "chunkmill.messages.transport"),
    ],
    ids=["a host program", "a worker"],
)
def test_only_our_own_processes_have_another_transport(imports: str, module: str) -> None:
    """A program that imports Chunkmill may have a Celery app of its own, whose connections are none of our business."""
    code = (
        f"import {imports}; from kombu import Connection; "
        "print({type(Connection(url).transport).__module__ for url in ('redis://h', 'rediss://h', 'redis+socket:///s')})"
    )
    env = {**os.environ, "REDIS_URL": URL, "DATABASE_URL": "postgresql://h/d"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == f"{{{module!r}}}", done.stderr


def test_every_answer_with_which_redis_refuses_is_an_outage_to_a_worker() -> None:
    """Whatever its first word: a newer server may have words that no client knows."""
    for answer in ("MISCONF x", "NOREPLICAS x", "OOM x", "READONLY x", "NOPERM x", "ERR x", "NEVERHEARD x", "BUSY x"):
        assert isinstance(BaseParser.parse_error(answer), RedisTransport.connection_errors), answer


def test_doorbells_go_with_any_kombu_that_is_allowed() -> None:
    """A producer of kombu before 5.7 has no ``batch``."""
    sizes: list[int] = []

    class Newer:
        @contextlib.contextmanager
        def batch(self, max_size: int) -> Iterator[None]:
            sizes.append(max_size)
            yield

    for producer, times in ((object(), 0), (Newer(), 1)):
        with _batch(producer):
            assert len(sizes) == times
