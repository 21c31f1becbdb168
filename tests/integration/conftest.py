from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from chunkmill.broker import PRIORITY_STEPS, QUEUE
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.results import Job
from chunkmill.ledger.work.doorbells import ring_due
from chunkmill.settings import Settings
from chunkmill.spaces.canaries import Canary
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import tracing
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.local import canary
from chunkmill_workers.local.canary import embed_golden
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.process.lease import LeaseKeeper
from chunkmill_workers.provider import flow
from tests.integration.hands import Hands
from tests.openai_server import OpenAIServer
from tests.support.corridor_scene import Scene, scene

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    """The provider of a file's tests."""
    with OpenAIServer() as running:
        yield running


@pytest.fixture
def stage(settings: Settings, server: OpenAIServer, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The paid corridor in front of ``server``."""
    with scene(settings, server, request) as made:
        yield made


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of a paid lane ends only if the test says so, and not while a slow machine is still looking at it."""
    monkeypatch.setattr(flow, "LEAST_PAUSE_S", 3600.0)


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """The bundled model, loaded once per pytest process. In float32: most tests compare numbers.

    They embed the golden texts once for each kind of space. Each test's database has a space of its own, and to embed
    the same texts with the same engine again would take half a second of each test and say nothing new. Engines that a
    test loads itself embed them as ever, and so do all if a test has changed how, and in test_canary.py.
    """
    made = Engines(Settings.from_env(embedding_dtype="fp32"), "cpu")
    as_written = Engine.stream
    golden: dict[tuple[object, ...], Canary] = {}

    def embed_once(engine: Engine, space: Space, worker: str) -> Canary:
        is_changed = Engine.stream is not as_written or "stream" in vars(engine)
        if is_changed or engine not in made._engines.values():
            return embed_golden(engine, space, worker)
        key = engine, space.spec.dimensions, space.spec.normalize, space.spec.long_text.policy
        if key not in golden:
            golden[key] = embed_golden(engine, space, worker)
        return replace(golden[key], made_by=replace(golden[key].made_by, worker=worker))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canary, "embed_golden", embed_once)
        yield made


@pytest.fixture
def context(settings: Settings, engines: Engines) -> Iterator[WorkerContext]:
    with worker_context(settings, engines) as made:
        yield made


@contextmanager
def worker_context(settings: Settings, engines: Engines) -> Iterator[WorkerContext]:
    """What a worker's tasks share, without the worker process around it."""
    db = create_db(settings.require_database_url(), role="worker")
    made = WorkerContext(settings, db, engines, LeaseKeeper(db, settings.lease_seconds), name="test-worker")
    try:
        yield made
    finally:
        # A thread that a failed test left would look for its database for ever.
        made.stopping.set()
        made.leases._stop.set()
        sa.event.listen(db, "do_connect", _the_test_is_over)
        db.dispose()


def _the_test_is_over(*_: object) -> None:
    raise RuntimeError("the test that this connection is for is over")


class Runner:
    """Answers the doorbells that lie in Redis, as a worker would, and hands the job back.

    What is due is what the product rings: a ChunkBatch that no bell is rung for is not embedded here either. Repair is
    off, so a ChunkBatch that becomes available with the mark of an old bell (``rung_at``) stays where it is.
    """

    def __init__(self, context: WorkerContext, client: Client) -> None:
        self.context = context
        self.client = client
        self._broker = client._broker

    def due(self) -> list[int]:
        """The ChunkBatches whose bells lie in Redis once a poller has rung for all that is due, in order."""
        with self.context.db.begin() as conn:
            queued = self._broker.queued_doorbells()
            ring_due(conn, self._broker, queued=queued, window=10_000, repair_seconds=24 * 3600)
        messages = [message for queue in QUEUES for message in self._broker.client.lrange(queue, 0, -1)]
        return sorted({chunk_batch_of(message) for message in messages})

    def run_due(self) -> list[TaskResult]:
        """Answer the bells of all that is due, in order. A bell whose ChunkBatch has ended since is answered too."""
        self.due()
        # One at a time: a bell that a producer rings meanwhile must not be taken away unanswered.
        taken = [message for queue in QUEUES for message in iter(partial(self._broker.client.rpop, queue), None)]
        return [run_chunk_batch(self.context, bell) for bell in sorted({chunk_batch_of(message) for message in taken})]

    def finish(self, job: Job) -> Job:
        for _ in range(20):
            if not self.due():
                return self.client.job(job.id)
            self.run_due()
        pytest.fail(f"ChunkBatches become due for ever: {self.client.job(job.id)}")


QUEUES = tuple(QUEUE if step == 0 else f"{QUEUE}\x06\x16{step}" for step in PRIORITY_STEPS)
"""The lists in Redis that hold the bells of local work, the most urgent first."""


def chunk_batch_of(message: bytes) -> int:
    """The ChunkBatch that a bell in Redis is about."""
    ((chunk_batch_id,), *_) = json.loads(base64.b64decode(json.loads(message)["body"]))
    return int(chunk_batch_id)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[ReadableSpan]]:
    """Traces are on in this process, and this returns the spans that have ended.

    The provider is not made the process's own, which other tests share.
    """
    pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(tracing, "_tracer", lambda: tracer)
    return lambda: list(exporter.get_finished_spans())


@pytest.fixture
def runner(context: WorkerContext, client: Client) -> Runner:
    return Runner(context, client)


@pytest.fixture
def hands(db: sa.Engine) -> Hands:
    return Hands(db)


def count(db: sa.Engine, table: str) -> int:
    with db.begin() as conn:
        return int(conn.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one())


@pytest.fixture
def rows(db: sa.Engine) -> object:
    """``rows("jobs")``: how many rows a table has."""
    return lambda table: count(db, table)
