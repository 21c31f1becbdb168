"""What the watchdog takes for a hang, and what not: by its own clock, which the test turns."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.domain.results import Job
from chunkmill.ledger.work import chunk_batches
from chunkmill_workers.engine.loop import DeviceLoop
from chunkmill_workers.engine.tokenizer import TextTokenizer
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.pipeline import run_chunk_batch
from chunkmill_workers.local.watchdog import Watchdog
from chunkmill_workers.process.drain import Drain
from chunkmill_workers.tuning.tuned import load_engine
from tests.support.waiting import PATIENCE

_starts = itertools.count(1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands still, but for the seconds that a test adds to ``ahead``. It never goes back from one test to the next,
    which share the engines and what they remember of their last step."""
    start = 1e6 * next(_starts)
    turned = SimpleNamespace(ahead=0.0, monotonic=lambda: start + turned.ahead)
    for module in (
        "chunkmill_workers.process.lease",
        "chunkmill_workers.local.watchdog",
        "chunkmill_workers.engine.steps",
    ):
        monkeypatch.setattr(f"{module}.time", turned)
    return turned


@pytest.fixture
def watchdog(clock: SimpleNamespace, context: WorkerContext, broker: Broker, client: Client) -> Iterator[Watchdog]:
    """It looks when it is told to. The engine is there, as in a worker."""
    context.engine_for(context.engines.load_default(context.db))
    yield Watchdog(context, broker, Drain([context]))


class Task(threading.Thread):
    """A task thread, which may hang until the test lets it go."""

    def __init__(self, context: WorkerContext, chunk_batch_id: int = 1) -> None:
        super().__init__(daemon=True)
        self._context, self._id = context, chunk_batch_id
        self.start()

    def run(self) -> None:
        run_chunk_batch(self._context, self._id)


class Gate:
    """Stands where a thread is to hang: ``reached`` by it, and ``open`` for it to go on."""

    def __init__(self, real: Any) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._real = real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.reached.set()
        assert self.open.wait(PATIENCE)
        return self._real(*args, **kwargs)


def enqueue(client: Client, name: str = "docs") -> Job:
    return client.enqueue([("a", f"a text of {name}")], collection=name)


def settled(context: WorkerContext, task: Task, client: Client, job: Job) -> None:
    task.join(PATIENCE)
    assert not task.is_alive()
    assert client.job(job.id).state == "completed"


def test_a_call_of_the_tokenizer_that_hangs_is_seen_though_others_get_on(
    watchdog: Watchdog, context: WorkerContext, client: Client, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, other = enqueue(client), enqueue(client, "other")
    real = TextTokenizer.encode
    gate = Gate(real)
    with monkeypatch.context() as patch:
        patch.setattr(TextTokenizer, "encode", lambda *args, **more: gate(*args, **more))
        task = Task(context)
        assert gate.reached.wait(PATIENCE)
    clock.ahead += 119
    assert watchdog.look() is None
    settled(context, Task(context, 2), client, other)
    clock.ahead += 2
    assert watchdog.look() == "a call of the tokenizer takes 121 s, more than STEP_DEADLINE_SECONDS"
    gate.open.set()
    settled(context, task, client, job)
    assert watchdog.look() is None


def test_the_load_of_a_model_has_longer(
    watchdog: Watchdog, context: WorkerContext, client: Client, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = enqueue(client)
    gate = Gate(load_engine)
    monkeypatch.setattr("chunkmill_workers.local.engines.load_engine", gate)
    context.engines = Engines(context.settings, "cpu")  # another worker's, which has not loaded it yet
    task = Task(context)
    assert gate.reached.wait(PATIENCE)
    clock.ahead += 1799
    assert watchdog.look() is None
    clock.ahead += 2
    assert watchdog.look() == "the load of a model takes 1801 s, more than LOAD_DEADLINE_SECONDS"
    gate.open.set()
    settled(context, task, client, job)
    assert watchdog.look() is None


def test_a_chunk_batch_that_waits_for_nothing_is_seen(
    watchdog: Watchdog, context: WorkerContext, client: Client, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows were lost inside the engine, where no pass has them; nobody would ever come with a result."""
    job = enqueue(client)
    lost: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()

    def lose(loop: DeviceLoop, name: int, rows: Any, *how: Any) -> None:
        loop._sources[name].stream.added += len(rows)
        lost.put((loop, name, rows, *how))

    gate = Gate(DeviceLoop.results)
    gate.open.set()
    with monkeypatch.context() as patch:
        patch.setattr(DeviceLoop, "add", lose)
        patch.setattr(DeviceLoop, "results", lambda *args, **more: gate(*args, **more))
        task = Task(context)
        assert gate.reached.wait(PATIENCE)
        loop, name, rows, *how = lost.get(timeout=PATIENCE)
    clock.ahead += 119
    assert watchdog.look() is None
    with context.engines.loads.step():  # the engines get on: it may wait behind others
        clock.ahead += 100
        assert watchdog.look() is None
    clock.ahead += 119
    assert watchdog.look() is None
    clock.ahead += 2
    assert "ChunkBatch 1 has made no progress for 121 s with nothing running" in str(watchdog.look())
    loop._sources[name].stream.added -= len(rows)
    loop.add(name, rows, *how)
    settled(context, task, client, job)


def test_waiting_for_postgres_is_no_hang(
    watchdog: Watchdog, context: WorkerContext, client: Client, clock: SimpleNamespace, db: sa.Engine
) -> None:
    """While it writes: somebody has its row locked."""
    job = enqueue(client)
    real, claimed, go_on = context.engine_for, threading.Event(), threading.Event()

    def engine_for(space: Any) -> Any:
        claimed.set()
        assert go_on.wait(PATIENCE)
        return real(space)

    context.engine_for = engine_for  # type: ignore[method-assign]
    task = Task(context)
    assert claimed.wait(PATIENCE)
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with db.begin() as other:
        other.execute(sa.text("SELECT FROM chunk_batches WHERE id = 1 FOR UPDATE"))
        go_on.set()
        with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            while not conn.execute(sa.text(waiting)).all():
                assert task.is_alive()
        clock.ahead += 1000
        assert watchdog.look() is None
    settled(context, task, client, job)


STALL = 1000.0


@pytest.fixture
def rung(watchdog: Watchdog, context: WorkerContext, client: Client, clock: SimpleNamespace) -> Watchdog:
    """The watchdog of an idle worker, which has seen that the doorbells of two jobs wait."""
    context.settings = context.settings.model_copy(update={"stall_seconds": STALL})
    context.last_doorbell = clock.monotonic()
    enqueue(client)
    enqueue(client, "other")
    assert watchdog.look() is None
    return watchdog


def test_a_worker_that_no_doorbell_reaches_is_seen(rung: Watchdog, clock: SimpleNamespace) -> None:
    clock.ahead += STALL - 1
    assert rung.look() is None
    clock.ahead += STALL
    assert rung.look() == f"2 doorbells wait in Redis and none has reached this worker for {2 * STALL - 1:.0f} s"


def test_doorbells_that_wait_for_a_busy_worker_are_no_evidence(
    rung: Watchdog, context: WorkerContext, clock: SimpleNamespace
) -> None:
    """Nor is the time for which it was busy, once it is idle again."""
    with context.workroom.entered():
        clock.ahead += 2 * STALL
        assert rung.look() is None
    clock.ahead += STALL - 1
    assert rung.look() is None
    clock.ahead += STALL - 1
    assert rung.look() is None
    clock.ahead += STALL
    assert "2 doorbells wait in Redis" in str(rung.look())


def test_a_worker_that_a_doorbell_reached_lately_consumes(
    rung: Watchdog, context: WorkerContext, clock: SimpleNamespace
) -> None:
    """More doorbells may always wait, of more work than one worker can do."""
    clock.ahead += STALL - 1
    context.last_doorbell = clock.monotonic()
    clock.ahead += STALL - 1
    assert rung.look() is None
    clock.ahead += STALL
    assert f"none has reached this worker for {2 * STALL - 1:.0f} s" in str(rung.look())


def test_while_redis_takes_no_writes_nobody_could_take_a_doorbell(
    rung: Watchdog, broker: Broker, clock: SimpleNamespace
) -> None:
    """The queue can still be read. A worker that ended for it would be started and ended again and again."""
    broker.client.config_set("min-replicas-to-write", 1)
    try:
        clock.ahead += STALL
        assert rung.look() is None
        clock.ahead += 2 * STALL
        assert rung.look() is None
    finally:
        broker.client.config_set("min-replicas-to-write", 0)
    clock.ahead += STALL
    assert "2 doorbells wait in Redis" in str(rung.look())


def test_after_an_empty_queue_the_wait_begins_anew(
    rung: Watchdog, client: Client, broker: Broker, clock: SimpleNamespace
) -> None:
    clock.ahead += STALL - 1
    broker.client.flushdb()  # others took them
    assert rung.look() is None
    enqueue(client, "a third")
    clock.ahead += STALL - 1
    assert rung.look() is None
    clock.ahead += STALL - 1
    assert rung.look() is None


def test_a_worker_that_leaves_answers_no_doorbells(
    rung: Watchdog, context: WorkerContext, clock: SimpleNamespace
) -> None:
    context.stopping.set()
    clock.ahead += 2 * STALL
    assert rung.look() is None


def test_of_two_chunk_batches_the_one_that_stands_still_is_named(
    watchdog: Watchdog, context: WorkerContext, client: Client, clock: SimpleNamespace
) -> None:
    enqueue(client)
    enqueue(client, "other")
    with context.db.begin() as conn:
        still, other = (chunk_batches.claim_if_due(conn, number, owner="w", lease_seconds=60) for number in (2, 1))
    assert still is not None
    assert other is not None
    with context.leases.holding(still), context.leases.holding(other) as moves:
        clock.ahead += 121
        moves.moved()
        clock.ahead += 1
        assert "ChunkBatch 2 has made no progress for 122 s" in str(watchdog.look())


def test_a_check_that_fails_ends_neither_the_watchdog_nor_the_other_checks(
    rung: Watchdog, context: WorkerContext, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As with an engine that has no clock of its steps."""

    def broken() -> tuple[float, str]:
        raise AttributeError("no steps")

    monkeypatch.setattr(context.engines, "longest_step", broken)
    clock.ahead += 2 * STALL
    assert "2 doorbells wait in Redis" in str(rung.look())
    rung.look()
    assert caplog.text.count("the watchdog cannot check this worker") == 1
