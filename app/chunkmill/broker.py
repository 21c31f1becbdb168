"""The broker: names of queues and tasks, Celery's configuration, and the publishing of doorbells.

Celery, kombu and the client of Redis are imported when they are first used, because a program that searches or looks
at jobs rings nothing.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from chunkmill.domain.states import Route
from chunkmill.settings import Settings
from chunkmill.settings.addresses import redis_tls

if TYPE_CHECKING:
    import redis
    from celery import Celery

logger = logging.getLogger(__name__)

QUEUE = "gpu"
PROVIDER_QUEUE = "openai"
QUEUES = (QUEUE, PROVIDER_QUEUE)
EMBED_TASK = "workers.embed_chunk_batch"
REQUEST_TASK = "workers.request_chunk_batch"
ADVANCE_TASK = "workers.advance_provider_batch"
NEXT_NAMES = {
    EMBED_TASK: "chunkmill_workers.embed_chunk_batch",
    REQUEST_TASK: "chunkmill_workers.request_chunk_batch",
    ADVANCE_TASK: "chunkmill_workers.advance_provider_batch",
}
"""The names of these tasks in the next release.

During an upgrade, workers of two releases run side by side. Workers of this release answer both names, and this release
rings under the old ones, which workers of the last release know. The next release may ring under the new ones.
"""
PRIORITY_STEPS = [0, 3, 6, 9]
STEP_PRIORITY = 0
"""The priority of a ProviderBatch's steps. They come before doorbells, whose priorities are those of jobs."""

Shown = Mapping[str, int | str]
"""A doorbell's label, which Flower shows beside its id: ``{"job": 3, "collection": "docs", "contents": 64}``.

The label is for people, and no worker reads it. It has numbers, states, and names of collections and models, never a
text.
"""
LONGEST_NAME = 60
"""The longest name of a collection or model in a label. Names may have 200 characters, but Redis holds many doorbells.
"""


@dataclass(frozen=True, slots=True)
class Doorbell:
    """The id of a ChunkBatch, the priority rank of its job (0 is served first), and a label. Nothing else goes into
    Redis."""

    chunk_batch_id: int
    priority: int
    shown: Shown = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepBell:
    """Like a doorbell, but for the next step of a ProviderBatch."""

    provider_batch_id: int
    shown: Shown = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bells:
    """The queue with the doorbells of a route's ChunkBatches, and the task that answers them."""

    route: Route
    queue: str
    task: str


LOCAL_BELLS = Bells(Route.LOCAL, QUEUE, EMBED_TASK)
SYNC_BELLS = Bells(Route.OPENAI_SYNC, PROVIDER_QUEUE, REQUEST_TASK)
BELLS = (LOCAL_BELLS, SYNC_BELLS)
"""Route ``openai`` has no doorbells, because its ChunkBatches are gathered into ProviderBatches."""


def refusals() -> tuple[type[Exception], ...]:
    """What Redis answers while it cannot do what it is asked: it is full, fails over, cannot save, lacks a replica, or
    lost its users (OOM, READONLY, MISCONF, NOREPLICAS, NOPERM, and whatever a newer server adds).

    All of them count as an outage, because all pass by themselves or with an operator's help, and our commands are
    always the same: none is refused for what it says. kombu takes them for errors of a channel, which end a worker.
    """
    from redis.exceptions import InvalidResponse, ResponseError

    return ResponseError, InvalidResponse


def publish_errors() -> tuple[type[Exception], ...]:
    """What publishing raises while Redis is away. A publisher may log it and continue, because the poller rings again.

    Python asks an ``except`` clause for its errors when there is one.
    """
    from kombu.exceptions import KombuError
    from redis.exceptions import RedisError

    return RedisError, KombuError, OSError


def make_celery(settings: Settings) -> Celery:
    """The Celery app, which is the same for producers, workers, pollers and Flower.

    Only the ledger decides about retries. Celery neither retries nor keeps results. It acknowledges late, so a doorbell
    may be delivered twice; that is harmless, because the second claim finds nothing to do.
    """
    from celery import Celery
    from kombu import Queue

    url = settings.require_redis_url()
    app = Celery("chunkmill", broker=kombu_url(url), set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE,
        task_queues=[Queue(QUEUE), Queue(PROVIDER_QUEUE)],
        task_acks_late=True,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_pool="threads",
        worker_concurrency=settings.embedding_parallel_batches,
        worker_prefetch_multiplier=1,
        worker_enable_prefetch_count_reduction=False,
        worker_soft_shutdown_timeout=0,  # works only with prefork; with threads it leads to a warm shutdown
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=5,
        broker_transport_options={
            "socket_timeout": 30,  # without it a frozen Redis hangs every synchronous command
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "priority_steps": PRIORITY_STEPS,
            "queue_order_strategy": "priority",
            # A publisher gives up soon, because the poller rings again. By default kombu waits for ever.
            "max_retries": 2,
            "interval_start": 0.1,
            "interval_step": 0.2,
            "interval_max": 0.5,
        },
    )
    if tls := redis_tls(url):
        app.conf.broker_use_ssl = tls
    return app


_first_use = threading.Lock()
os.register_at_fork(before=_first_use.acquire, after_in_parent=_first_use.release, after_in_child=_first_use.release)


class Broker:
    """Two connections to Redis: Celery's publishes, and a plain client reads the queues first.

    The client comes first on purpose: if Redis is away, it fails within seconds, while kombu would wait.
    """

    __slots__ = ("_celery", "_client", "_settings")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._celery: Celery | None = None
        self._client: redis.Redis | None = None

    @classmethod
    def connect(cls, settings: Settings) -> Broker:
        """Raises :class:`InvalidSetting` if no server is known. Both clients are made, and connect, when first used."""
        settings.require_redis_url()
        return cls(settings)

    @property
    def client(self) -> redis.Redis:
        """The client that reads the queues."""
        with _first_use:
            if self._client is None:
                from redis import Redis

                url = self._settings.require_redis_url()
                self._client = Redis.from_url(
                    url.partition("?")[0] if url.startswith("rediss://") else url,
                    socket_timeout=5,
                    socket_connect_timeout=2,
                    health_check_interval=25,
                    **redis_tls(url),
                )
            return self._client

    @property
    def celery(self) -> Celery:
        """The app that publishes, which is made when it is first used. Threads that ring go through ``_producers``."""
        if self._celery is None:
            self._celery = make_celery(self._settings)
        return self._celery

    def queued_doorbells(self, bells: Bells = LOCAL_BELLS) -> dict[int, int]:
        """How many doorbells wait in Redis, by priority rank.

        Doorbells that were delivered and not acknowledged do not count: their ChunkBatches are running, or their
        worker was killed and nobody will answer them. What stands in the place of a list is deleted.
        """
        try:
            return self._lengths(bells.queue)
        except refusals() as error:
            if not is_wrong_type(error):
                raise
        delete_wrong_types(self.client)
        return self._lengths(bells.queue)

    def _lengths(self, queue: str) -> dict[int, int]:
        with self.client.pipeline(transaction=False) as pipe:
            for key in keys_of(queue):
                pipe.llen(key)
            return dict(zip(PRIORITY_STEPS, pipe.execute(), strict=True))

    def takes_writes(self) -> bool:
        """Whether Redis carries out a command that writes. While it does not, no worker can take a doorbell either."""
        try:
            self.client.delete(f"{QUEUE}.nothing")  # a command that writes, which changes nothing
        except publish_errors():
            return False
        return True

    def clear(self, queue: str) -> int:
        """Delete all doorbells of a queue; returns their number. No work is lost, because the poller rings again."""
        delete_wrong_types(self.client)
        number = sum(self._lengths(queue).values())
        self.client.delete(*keys_of(queue))
        return number

    def doorbells_by_queue(self) -> dict[str, int]:
        """How many doorbells of ChunkBatches wait in Redis, by queue."""
        return {bells.queue: sum(self.queued_doorbells(bells).values()) for bells in BELLS}

    def ring(self, doorbells: Iterable[Doorbell], bells: Bells = LOCAL_BELLS) -> None:
        """Publish doorbells in one pipeline.

        Raises one of :func:`publish_errors`, and some may have been sent by then.
        """
        self._send(
            bells.task,
            bells.queue,
            (
                (bell.chunk_batch_id, bell.priority, f"ChunkBatch {bell.chunk_batch_id}", bell.shown)
                for bell in doorbells
            ),
        )

    def ring_steps(self, bells: Iterable[StepBell]) -> None:
        """Publish the next steps of ProviderBatches, as ``ring`` does with doorbells."""
        self._send(
            ADVANCE_TASK,
            PROVIDER_QUEUE,
            (
                (bell.provider_batch_id, STEP_PRIORITY, f"ProviderBatch {bell.provider_batch_id}", bell.shown)
                for bell in bells
            ),
        )

    def _send(self, task: str, queue: str, messages: Iterable[tuple[int, int, str, Shown]]) -> None:
        with self._producers().acquire(block=True) as producer, _batch(producer):
            for number, priority, name, shown in messages:
                self.celery.send_task(
                    task,
                    args=[number],
                    # Events carry these two in place of the arguments, and Flower shows them. As the repr of a dict,
                    # the label can be searched there: `kwargs:job=3`.
                    argsrepr=name,
                    kwargsrepr=repr({key: _short(value) for key, value in shown.items()}),
                    queue=queue,
                    priority=priority,
                    producer=producer,
                    retry=False,
                    ignore_result=True,
                    declare=[],  # kombu would note the queue in a table in Redis, which nobody reads
                )

    def _producers(self) -> Any:
        """The pool that Celery shares between all apps of this process with the same URL.

        Celery makes it when it is first asked. Of threads that ask at once, each would get a pool of its own.
        """
        with _first_use:
            return self.celery.producer_pool

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._celery is not None:
            self._celery.close()


def keys_of(queue: str) -> list[str]:
    """The keys in Redis of a queue's lists, one for each of ``PRIORITY_STEPS``."""
    return [queue if step == 0 else f"{queue}\x06\x16{step}" for step in PRIORITY_STEPS]


def is_wrong_type(error: Exception) -> bool:
    """Whether a command found another type of value than its own."""
    return "WRONGTYPE" in str(error)  # the error of a pipeline begins with the command


def delete_wrong_types(client: redis.Redis) -> None:
    """Delete a key that has a queue's name and is not a list. Nobody could take or send a doorbell there."""
    wrong = [key for queue in QUEUES for key in keys_of(queue) if client.type(key) not in (b"list", b"none")]
    if wrong:
        client.delete(*wrong)
        logger.warning(
            "deleted %s in Redis: no list, so that no doorbell could be sent there", ", ".join(map(repr, wrong))
        )


def _batch(producer: Any) -> AbstractContextManager[object]:
    """kombu 5.7 sends the messages of a block in one pipeline. Before 5.7 each is a command of its own."""
    return producer.batch(max_size=500) if hasattr(producer, "batch") else nullcontext()


def _short(value: int | str) -> int | str:
    return f"{value[: LONGEST_NAME - 1]}…" if isinstance(value, str) and len(value) > LONGEST_NAME else value


def kombu_url(url: str) -> str:
    """The URL as kombu writes it: without options, which kombu reads in its own way, and with
    ``redis+socket:///path?virtual_host=0`` for a Unix socket."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url.partition("?")[0]
    return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={dict(parse_qsl(parts.query)).get('db', '0')}"
