"""A suspect has the worker to itself, and a broken device touches nothing more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.errors import DeviceFailed
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.local import pipeline
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from tests.support.waiting import PATIENCE, running, until


def states(db: sa.Engine) -> list[tuple[Any, ...]]:
    with db.begin() as conn:
        return [tuple(row) for row in conn.execute(sa.text("SELECT id, state FROM chunk_batches ORDER BY id"))]


def test_a_suspect_waits_unheld_until_its_neighbours_are_done(
    context: WorkerContext, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour that dies meanwhile takes nothing of it along; and while it runs, nothing else does."""
    for n in range(2):
        client.enqueue([(f"c{n}", f"text of job {n}")], collection="docs")
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET deaths = 2 WHERE id = 2"))
    context.engines.load_default(db)
    inside, go_on = threading.Event(), threading.Event()
    seen: dict[str, int] = {}
    real_stream = Engine.stream

    def slow(self: Engine, texts: Any, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        if texts == ["text of job 0"]:
            inside.set()
            assert go_on.wait(PATIENCE)
        elif texts == ["text of job 1"]:
            seen["beside the suspect"] = context.workroom.inside - 1
        yield from real_stream(self, texts, *args, **kwargs)

    monkeypatch.setattr(Engine, "stream", slow)
    with running(lambda: run_chunk_batch(context, 1), release=go_on.set) as (first,):
        assert inside.wait(PATIENCE)
        with running(lambda: run_chunk_batch(context, 2), release=go_on.set) as (second,):
            until(lambda: context.workroom.has_suspect or not second.is_alive())
            assert states(db) == [(1, "running"), (2, "available")]
    assert (first.result(), second.result()) == (TaskResult.COMPLETED, TaskResult.COMPLETED)
    assert seen == {"beside the suspect": 0}


def test_a_suspect_that_meets_another_is_kept_from_coming_back_at_once(
    context: WorkerContext, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bell would be rung, claimed and given back again and again while the other has the worker."""
    client.enqueue([("c", "a text")], collection="docs")
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET deaths = 2"))
    real = pipeline._claim

    def claim(*args: Any) -> Lease | None:
        context.workroom._suspect = True  # the other had entered before, too
        return real(*args)

    monkeypatch.setattr(pipeline, "_claim", claim)
    monkeypatch.setattr(pipeline, "ANOTHER_SUSPECT_SECONDS", PATIENCE)
    assert run_chunk_batch(context, 1) is TaskResult.RELEASED
    with db.begin() as conn:
        states = conn.execute(
            sa.text("SELECT state, max_attempts - attempt AS attempts, not_before > now() AS later FROM chunk_batches")
        ).one()
    assert tuple(states) == ("available", 5, True)


def test_a_worker_with_a_broken_device_takes_nothing_more(
    context: WorkerContext, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the canary meets it first, before there is a text: each further claim would cost another a death."""
    for n in range(2):
        client.enqueue([(f"c{n}", f"text of job {n}")], collection="docs")

    def gone(*_: object, **__: object) -> None:
        raise DeviceFailed("the model no longer runs on cuda:0")

    monkeypatch.setattr(context, "engine_for", gone)
    assert run_chunk_batch(context, 1) is TaskResult.FAILED
    assert context.broken == "the model no longer runs on cuda:0"
    assert run_chunk_batch(context, 2) is TaskResult.NOT_OURS
    assert states(db) == [(1, "running"), (2, "available")]  # the first is the watchdog's to take back
    assert not EmbedResponder(context).answer_next()


def test_a_query_that_meets_a_broken_device_is_left_to_another_worker(
    context: WorkerContext, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = context.engines.load_default(db)
    with db.begin() as conn:
        insert = "INSERT INTO embed_requests (space_id, kind, texts) VALUES (:space, 'query', ARRAY['a text'])"
        conn.execute(sa.text(insert), {"space": space.id})

    def gone(*_: object, **__: object) -> None:
        raise DeviceFailed("the model no longer runs on cuda:0")

    monkeypatch.setattr(context, "engine_for", gone)
    EmbedResponder(context).answer_next()
    assert context.broken
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT error, vectors FROM embed_requests")).one() == (None, None)
