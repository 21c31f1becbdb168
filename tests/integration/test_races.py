"""Interleavings and failures that were found by thinking hard, kept so that they stay found."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client, InvalidInput, JobFailed, JobState
from chunkmill.broker import Broker
from chunkmill.client import Client as ClientClass
from chunkmill.db.connect import create_db
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import EngineError, StoreUnavailable, UnknownModel
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.work import chunk_batches
from chunkmill.models import resolve_model
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.store.delete import delete_some
from chunkmill_workers.local import pipeline
from chunkmill_workers.local.attempt import LocalAttempt
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from chunkmill_workers.process.lease import LeaseKeeper
from chunkmill_workers.process.unserved import UnservedWork
from tests.conftest import FIRST_IDS
from tests.integration.conftest import Runner
from tests.support.waiting import PATIENCE, Call, together, until

LONG = "word " * 600


def execute(db: sa.Engine, statement: str, **parameters: object) -> list[Any]:
    with db.begin() as conn:
        result = conn.execute(sa.text(statement), parameters)
        return list(result.scalars()) if result.returns_rows else []


class Unable:
    """Engines of a worker that has no model, or whose GPU is gone."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.left_to_others = UnservedWork()

    def for_space(self, space: object) -> None:
        raise self._error

    def loaded(self, space: object, *, use: bool = True) -> None:
        return None

    def longest_step(self) -> tuple[float, str]:
        return 0.0, ""

    def unserved(self) -> dict[int, str]:
        return self.left_to_others.now()


def test_a_lost_bell_is_found(settings: Settings, client: Client, db: sa.Engine) -> None:
    client.enqueue([("a", "text")], collection="docs")
    store = client._broker.client
    for key in store.scan_iter("gpu*"):
        store.delete(key)
    execute(db, "UPDATE chunk_batches SET rung_at = rung_at - interval '1 h'")
    assert Poller(db, client._broker, settings).round().rung == 1


def test_low_priority_cannot_keep_high_priority_waiting(settings: Settings, client: Client, db: sa.Engine) -> None:
    small = settings.model_copy(update={"chunk_batch_size": 1, "doorbell_window": 8})
    producer = ClientClass(db, Broker.connect(small), small)
    producer.enqueue([(f"l{i}", f"low {i}") for i in range(40)], collection="docs", priority="low")
    producer.enqueue([("h", "high")], collection="docs", priority="high")
    assert producer._broker.client.llen("gpu\x06\x163") == 1
    assert producer._broker.client.llen("gpu\x06\x169") == 8


def test_many_producers_share_a_small_pool(settings: Settings, client: Client) -> None:
    client._settings = settings.model_copy(update={"enqueue_window": 5})
    client.enqueue([("first", "registers the space")], collection="docs")
    start = threading.Barrier(10, timeout=PATIENCE)

    def stream(i: int) -> Iterator[tuple[str, str]]:
        start.wait()
        yield from ((f"{i}-{j}", f"text {i} {j}") for j in range(12))

    def produce(i: int) -> None:
        client.enqueue(stream(i), collection="docs", on_invalid="skip")

    together(*[partial(produce, i) for i in range(10)])


def test_the_poller_rings_while_a_job_is_being_finished(
    settings: Settings, client: Client, runner: Runner, db: sa.Engine
) -> None:
    job = runner.finish(client.enqueue([("a", "text")], collection="docs"))
    execute(db, "UPDATE jobs SET state = 'running', finished_at = NULL")
    client.enqueue([("b", "another")], collection="other")
    execute(db, "UPDATE chunk_batches SET rung_at = NULL WHERE state = 'available'")
    with db.begin() as closer:
        closer.execute(sa.text("SELECT FROM jobs WHERE id = :id FOR NO KEY UPDATE"), {"id": job.id})
        # In a thread: a poller that waits for the closer ends with this block, and the test has failed by then.
        assert Call(Poller(db, client._broker, settings).round).result().rung == 1


def test_one_broken_job_does_not_stop_the_poller(
    settings: Settings, client: Client, runner: Runner, db: sa.Engine
) -> None:
    runner.finish(client.enqueue([("a", "text")], collection="docs"))
    execute(db, "UPDATE jobs SET state = 'running', finished_at = NULL")
    execute(db, "ALTER TABLE vectors_1 RENAME TO gone")
    assert Poller(db, client._broker, settings).round().finished == 0


@pytest.mark.parametrize("flush_seconds", [pytest.param(1e9, id="in hand"), pytest.param(0, id="written")])
def test_a_text_deleted_while_it_was_embedded_leaves_no_vector(
    client: Client, runner: Runner, db: sa.Engine, monkeypatch: pytest.MonkeyPatch, flush_seconds: float
) -> None:
    """Its vector may still be in the worker's hands, or written and deleted again, which the worker sees at the end."""
    job = client.enqueue([("a", "soon gone"), ("b", "stays")], collection="docs")
    complete = LocalAttempt.complete

    def too_late(self: LocalAttempt) -> None:
        client.delete("docs", ["a"])
        complete(self)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "FLUSH_SECONDS", flush_seconds)
        patch.setattr(LocalAttempt, "complete", too_late)
        assert runner.run_due() == [TaskResult.COMPLETED]
    assert runner.finish(job).state is JobState.COMPLETED
    assert execute(db, "SELECT count(*) FROM vectors_1") == [1]
    runner.finish(client.enqueue([("a", "soon gone")], collection="docs"))
    vector = client.vectors("docs")["a"]
    assert client.search(vector, collection="docs", k=1)[0].chunk_id == "a"


def test_a_deletion_under_way_while_a_worker_reads_leaves_no_vector(
    client: Client, context: WorkerContext, db: sa.Engine
) -> None:
    client.enqueue([("a", "soon gone"), ("b", "stays")], collection="docs")
    with db.begin() as deleting:
        delete_some(deleting, collection_id=FIRST_IDS["collections"], chunk_ids=["a"], limit=10)
        worker = Call(lambda: run_chunk_batch(context, 1))
        # The worker stands before the deletion's lock.
        until(lambda: execute(db, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") != [0])
    assert worker.result() is TaskResult.COMPLETED
    assert execute(db, "SELECT count(*) FROM vectors_1") == [1]
    assert client.audit("docs").complete


def test_the_same_files_under_two_paths_are_one_space(
    settings: Settings, client: Client, db: sa.Engine, tmp_path: Path
) -> None:
    bundled = resolve_model(settings.embedding_model).path
    producers, workers = tmp_path / "producer", tmp_path / "worker"
    shutil.copytree(bundled, producers)
    shutil.copytree(bundled, workers)
    client.enqueue([("a", "text")], collection="docs", model=str(producers))
    shutil.rmtree(producers)  # it was on another machine
    own = settings.model_copy(update={"embedding_model": str(workers)})
    engines = Engines(own, "cpu")
    engines.load_default(db)
    worker = WorkerContext(own, db, engines, LeaseKeeper(db, 3), name="w")
    assert run_chunk_batch(worker, 1) is TaskResult.COMPLETED


def test_a_worker_without_the_model_does_not_use_up_the_attempts(
    settings: Settings, client: Client, runner: Runner, context: WorkerContext, db: sa.Engine, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "model"
    shutil.copytree(resolve_model(settings.embedding_model).path, elsewhere)
    # Other weights than the default's, so a space of its own that this worker will not find.
    (elsewhere / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 384, "pooling_mode": "cls"}')
    job = client.enqueue([("a", "text")], collection="docs", model=str(elsewhere))
    shutil.rmtree(elsewhere)
    lacking = WorkerContext(settings, db, Engines(settings, "cpu"), LeaseKeeper(db, 3), name="lacking")
    for _ in range(8):
        execute(db, "UPDATE chunk_batches SET not_before = now()")
        run_chunk_batch(lacking, 1)
    assert execute(db, "SELECT attempt FROM chunk_batches") == [1]
    assert execute(db, "SELECT error_code FROM chunk_batches") == ["unknown_model"]
    assert client.job(job.id).state is JobState.RUNNING


def test_an_unknown_model_does_not_cost_a_loaded_one(settings: Settings, db: sa.Engine) -> None:
    engines = Engines(settings.model_copy(update={"embedding_engines": 1}), "cpu")
    known = engines.load_default(db)
    elsewhere = dataclasses.replace(known.spec, model="/no/such/model", revision="sha256:00")
    with pytest.raises(UnknownModel):
        engines.for_space(registry.Space(known.id + 1, elsewhere, known.storage))
    assert list(engines._engines) == [(settings.embedding_model, known.spec.precision)]


def test_whatever_breaks_the_engine_a_query_gets_an_answer_and_the_lane_goes_on(
    client: Client, context: WorkerContext
) -> None:
    client.enqueue([("a", "text")], collection="docs")
    context.engines = Unable(RuntimeError("CUDA error while embedding SECRET"))  # type: ignore[assignment]
    responder = EmbedResponder(context)
    responder.start()
    try:
        for _ in range(2):
            with pytest.raises(EngineError, match="RuntimeError in the worker") as caught:
                client.embed(["SECRET"], timeout=PATIENCE)
            assert "SECRET" not in str(caught.value)
    finally:
        responder.stop()


def test_reject_refuses_what_another_job_truncated_first(client: Client, runner: Runner) -> None:
    strict = client.enqueue([("r", LONG)], collection="strict", on_long="reject")
    client.enqueue([("t", LONG)], collection="loose")
    assert run_chunk_batch(runner.context, 2) is TaskResult.COMPLETED
    assert run_chunk_batch(runner.context, 1) is TaskResult.COMPLETED
    job = client.job(strict.id)
    assert (job.state, job.dead, job.truncated, job.embedded) == (JobState.COMPLETED, 1, 0, 0)
    assert client.vectors("strict") == {}
    assert list(client.vectors("loose")) == ["t"]


def test_a_job_cancelled_before_its_end_cannot_complete_later(settings: Settings, client: Client) -> None:
    client._settings = settings.model_copy(update={"enqueue_window": 5})

    def stream() -> Iterator[tuple[str, str]]:
        for i in range(20):
            if i == 12:
                client.cancel(client.jobs()[0].id)
            yield (str(i), f"text {i}")

    job = client.enqueue(stream(), collection="docs", on_invalid="skip")
    assert (job.state, job.chunks) == (JobState.CANCELLED, 10)
    with pytest.raises(InvalidInput, match="never enqueued to its end"):
        client.retry(job.id)


def test_a_discarded_chunk_batch_says_why(client: Client, db: sa.Engine, settings: Settings) -> None:
    job = client.enqueue([("a", "text")], collection="docs")
    with db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, 1, owner="box:1", lease_seconds=60)
        assert lease is not None
        chunk_batches.fail_if_held(conn, lease, code="worker_error", error="box:1: no room left", retryable=False)
    assert Poller(db, client._broker, settings).round().finished == 1
    with pytest.raises(JobFailed, match="box:1: no room left"):
        client.wait(job.id, timeout=PATIENCE)


def test_a_collection_cannot_move_under_an_enqueue(client: Client, db: sa.Engine) -> None:
    here, there = client._space(None, OnLong.TRUNCATE), client._space(None, OnLong.SPLIT)
    client.delete("docs", all_chunks=True) if client.collections() else None
    with db.begin() as producer:
        collection = collections.lock_for_enqueue(producer, "docs", here)
        producer.commit()
    with db.connect() as producer, producer.begin():
        assert collections.lock_for_enqueue(producer, "docs", here) == collection
        jobs.open_job(
            producer, collection=collection, route=Route.LOCAL, priority=Priority.NORMAL,
            on_long=OnLong.TRUNCATE, idempotency_key=None,
        )  # fmt: skip
        with pytest.raises(sa.exc.OperationalError), db.begin() as mover:
            mover.execute(sa.text("SET LOCAL lock_timeout = '300ms'"))
            collections.lock_for_enqueue(mover, "docs", there)


def test_no_error_shows_a_query(client: Client, db: sa.Engine) -> None:
    client.enqueue([("a", "text")], collection="docs")
    execute(
        db,
        "CREATE FUNCTION boom() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$",
    )
    execute(db, "CREATE TRIGGER t BEFORE INSERT ON embed_requests FOR EACH ROW EXECUTE FUNCTION boom()")
    with pytest.raises(StoreUnavailable) as caught:
        client.search("TOP-SECRET", collection="docs", timeout=1)
    message = "".join(f"{error}" for error in _chain(caught.value))
    assert "TOP-SECRET" not in message


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_postgres_refusing_is_not_postgres_away(client: Client) -> None:
    with (
        pytest.raises(StoreUnavailable, match="due to statement timeout"),
        client._transaction() as conn,
    ):
        conn.execute(sa.text("SET LOCAL statement_timeout = '50ms'"))
        conn.execute(sa.text("SELECT pg_sleep(5)"))


def test_options_in_the_url_are_kept(settings: Settings) -> None:
    url = settings.require_database_url() + "&options=-csearch_path%3Dfoo"
    db = create_db(url, role="test")
    assert execute(db, "SHOW search_path") == ["chunkmill, foo, public"]
    db.dispose()


def test_skipped_chunks_do_not_pile_up(settings: Settings, db: sa.Engine, broker: Broker) -> None:
    import tracemalloc

    client = ClientClass(db, broker, settings.model_copy(update={"enqueue_window": 500}))
    peaks = []
    for n in (500, 1_000, 8_000):  # the first imports what the others use
        tracemalloc.start()
        client.enqueue(((str(i), "x" * 2000 + "\x00") for i in range(n)), collection=f"docs-{n}", on_invalid="skip")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1], peaks


def test_deep_metadata_is_refused_and_named(client: Client) -> None:
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(100_000):
        inner["a"] = {}
        inner = inner["a"]
    try:
        job = client.enqueue(
            [("a", "text", deep), ("b", "fine", {"path": "C:\\u0000"})], collection="docs", on_invalid="skip"
        )
    finally:
        while deep:  # taken apart by hand: freeing it whole would recurse as deep
            deep = deep.pop("a", {})
    assert [d.code for d in job.dead_chunks] == ["bad_metadata"]
