"""Deletions beside everything that refers to a text or writes a vector of one: each waits for the other.

A deletion holds the exclusive side of one advisory lock; an enqueue's window, a worker that reads or writes, and a
provider's gathering and writing hold its shared side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client, JobState
from chunkmill.db.locks import DELETE_LOCK
from chunkmill.errors import InvalidInput
from chunkmill.spaces import registry
from chunkmill.store.delete import delete_some
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.local import pipeline
from chunkmill_workers.local.attempt import LocalAttempt
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from tests.conftest import FIRST_IDS
from tests.integration.conftest import Runner
from tests.support.corridor_scene import Scene
from tests.support.waiting import PATIENCE, until


def select(db: sa.Engine, statement: str) -> list[Any]:
    with db.begin() as conn:
        return list(conn.execute(sa.text(statement)).scalars())


def waits_for_a_deletion(db: sa.Engine) -> bool:
    """Whether a transaction of this database stands before the shared side of the deletions' lock."""
    return select(
        db,
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND NOT granted "
        f"AND objid = {DELETE_LOCK} AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    ) == [1]


@contextmanager
def deletion_under_way(db: sa.Engine, chunk_id: str) -> Iterator[sa.Connection]:
    """A chunk of the first collection is deleted, with its text, and the transaction is not committed yet."""
    with db.begin() as deleting:
        assert delete_some(deleting, collection_id=FIRST_IDS["collections"], chunk_ids=[chunk_id], limit=10) == 1
        yield deleting


@contextmanager
def waiting_for_a_deletion(db: sa.Engine, chunk_id: str, call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Delete a chunk and its text, and run ``call`` before this is committed: it must wait.

    The block runs while ``call`` waits; behind it the deletion is committed, and the list has what ``call`` returned.
    """
    returned: list[Any] = []
    with ThreadPoolExecutor(1) as threads:
        with deletion_under_way(db, chunk_id):
            running = threads.submit(call)
            until(lambda: running.done() or waits_for_a_deletion(db))
            assert not running.done(), "it did not wait for the deletion"
            yield returned
        returned.append(running.result(PATIENCE))


def test_an_enqueue_stores_anew_what_is_being_deleted(client: Client, runner: Runner, db: sa.Engine) -> None:
    """Its vector can still be seen, so an enqueue that did not wait would take it for cached."""
    runner.finish(client.enqueue([("a", "wanted again"), ("b", "stays")], collection="docs"))
    enqueue = lambda: client.enqueue([("c", "wanted again")], collection="others")  # noqa: E731
    with waiting_for_a_deletion(db, "a", enqueue) as returned:
        assert select(db, "SELECT chunk_id FROM chunks WHERE collection_id = 2") == []
    (job,) = returned
    assert (job.contents, job.cached) == (1, 0)
    assert runner.finish(job).state is JobState.COMPLETED
    assert client.audit("others").complete
    assert select(db, "SELECT text FROM contents ORDER BY text") == ["stays", "wanted again"]


def test_a_worker_does_not_read_a_text_that_is_being_deleted(
    client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_stream = Engine.stream
    embedded: list[str] = []

    def listens(self: Engine, texts: Any, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        embedded.extend(texts)
        return real_stream(self, texts, *args, **kwargs)

    client.enqueue([("a", "soon gone"), ("b", "stays")], collection="docs")
    hear_canary(context, db)
    monkeypatch.setattr(Engine, "stream", listens)
    with waiting_for_a_deletion(db, "a", lambda: run_chunk_batch(context, 1)) as returned:
        assert embedded == []
    assert returned == [TaskResult.COMPLETED]
    assert embedded == ["stays"]
    assert select(db, "SELECT count(*) FROM vectors_1") == [1]


def test_a_worker_does_not_write_a_vector_of_a_text_that_is_being_deleted(
    client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the text before the deletion began."""
    real_stream = Engine.stream
    has_read, go_on = threading.Event(), threading.Event()

    def pauses(self: Engine, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        has_read.set()
        assert go_on.wait(PATIENCE)
        yield from real_stream(self, *args, **kwargs)

    client.enqueue([("a", "soon gone"), ("b", "stays")], collection="docs")
    hear_canary(context, db)
    monkeypatch.setattr(Engine, "stream", pauses)
    with ThreadPoolExecutor(1) as threads:
        try:
            running = threads.submit(run_chunk_batch, context, 1)
            assert has_read.wait(PATIENCE)
            with deletion_under_way(db, "a"):
                go_on.set()
                until(lambda: running.done() or waits_for_a_deletion(db))
                assert not running.done(), "it did not wait for the deletion"
            assert running.result(PATIENCE) is TaskResult.COMPLETED
        finally:
            go_on.set()
    assert select(db, "SELECT count(*) FROM vectors_1") == [1]
    assert client.audit("docs").complete


def test_a_text_that_is_being_deleted_is_not_gathered_for_a_provider(stage: Scene) -> None:
    db = stage.corridor.db
    texts = stage.texts(3)
    job = stage.enqueue(texts)
    with waiting_for_a_deletion(db, "c1", lambda: stage.finish(job)) as returned:
        assert select(db, "SELECT count(*) FROM provider_inputs") == [0]
        assert stage.asked("files.create") == 0
    ((finished,),) = returned
    del texts["c1"]
    stage.check_done(finished, texts)


def test_a_provider_writes_no_vector_of_a_text_that_is_being_deleted(stage: Scene) -> None:
    """The text was paid for by then, and nothing may be left of it all the same."""
    db = stage.corridor.db
    texts = stage.texts(3)
    stage.server.control(in_progress_seconds=3600.0)
    job = stage.enqueue(texts)
    stage.run_until(lambda: select(db, "SELECT state FROM provider_batches") == ["submitted"])
    stage.server.control(in_progress_seconds=0.0)
    with waiting_for_a_deletion(db, "c1", lambda: stage.finish(job)) as returned:
        assert select(db, "SELECT count(*) FROM vectors_1") == [0]
    ((finished,),) = returned
    assert finished.state is JobState.COMPLETED
    del texts["c1"]
    stage.corridor.check_vectors(texts)
    assert select(db, "SELECT count(*) FROM vectors_1") == [2]
    stage.check_books()


@pytest.mark.parametrize("way", ["delete", "prune", "evict"])
def test_a_text_that_went_while_it_was_embedded_leaves_no_vector(
    way: str, client: Client, runner: Runner, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletion begins and ends between a worker's look and its write, so that no lock shows it."""
    client.enqueue([("a", "soon gone"), ("b", "stays")], collection="docs")
    complete = LocalAttempt.complete

    def too_late(self: LocalAttempt) -> None:
        if way == "delete":
            client.delete("docs", ["a"])
        else:
            client.enqueue([("a", "in its place")], collection="docs")
            amounts = (client.prune(0) if way == "prune" else client.evict(older_than=0)).amounts
            assert amounts["contents"].rows == 1
        complete(self)

    monkeypatch.setattr(pipeline, "FLUSH_SECONDS", 1e9)
    with monkeypatch.context() as patch:
        patch.setattr(LocalAttempt, "complete", too_late)
        assert run_chunk_batch(runner.context, 1) is TaskResult.COMPLETED
    assert select(db, "SELECT count(*) FROM vectors_1") == [1]
    assert select(db, "SELECT contents FROM usage WHERE chunk_batch_id = 1") == [1]


@pytest.mark.parametrize("way", ["prune", "evict"])
def test_a_text_that_goes_with_its_vector_before_the_end_is_not_taken_for_a_crash(
    way: str, client: Client, runner: Runner, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow ChunkBatch has written the vectors of its first texts before its last are embedded."""
    for name in ("docs", "other"):
        client.enqueue([("a", f"soon gone from {name}"), ("b", f"stays in {name}")], collection=name)
    complete = LocalAttempt.complete

    def late(self: LocalAttempt) -> None:
        assert select(db, "SELECT count(*) FROM vectors_1") == [2]
        client.enqueue([("a", "in its place")], collection="docs")
        amounts = (client.prune(0) if way == "prune" else client.evict(older_than=0)).amounts
        assert amounts["contents"].rows == 1
        complete(self)

    monkeypatch.setattr(pipeline, "FLUSH_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(LocalAttempt, "complete", late)
        assert run_chunk_batch(runner.context, 1) is TaskResult.COMPLETED
    assert select(db, "SELECT count(*) FROM vectors_1") == [1]
    for number in (2, 3, 2):
        run_chunk_batch(runner.context, number)
    assert all(client.audit(name).complete for name in ("docs", "other"))


def test_a_vector_that_a_crash_took_is_missed_although_others_were_deleted(
    client: Client, runner: Runner, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.enqueue([("a", "soon gone"), ("b", "stays")], collection="docs")
    complete = LocalAttempt.complete

    def crashed(self: LocalAttempt) -> None:
        client.enqueue([("a", "in its place")], collection="docs")
        assert client.prune(0).amounts["contents"].rows == 1
        with db.begin() as conn:
            assert conn.execute(sa.text("DELETE FROM vectors_1")).rowcount == 1
        complete(self)

    monkeypatch.setattr(pipeline, "FLUSH_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(LocalAttempt, "complete", crashed)
        assert run_chunk_batch(runner.context, 1) is TaskResult.RELEASED
    for number in (1, 2, 1):  # a doorbell may serve the ChunkBatch of the other job in its turn
        run_chunk_batch(runner.context, number)
    assert client.audit("docs").complete


def hear_canary(context: WorkerContext, db: sa.Engine) -> None:
    """As a worker does on its start, so that what a test then does to the engine meets its chunks alone."""
    with db.begin() as conn:
        (space,) = registry.all_spaces(conn)
    context.engine_for(space)


def test_a_missing_list_of_ids_is_not_everything(client: Client) -> None:
    for name in ("docs", "other"):
        client.enqueue([("a", "one"), ("b", "two")], collection=name)
    for wrong in ({}, {"ids": None}, {"ids": ["a"], "all_chunks": True}, {"ids": [], "all_chunks": True}):
        with pytest.raises(InvalidInput, match="all_chunks=True"):
            client.delete("docs", **wrong)
    assert client.delete("docs", []) == 0
    assert client.audit("docs").chunks == 2
    assert client.delete("docs", all_chunks=True) == 2
    assert client.audit("other").chunks == 2
