"""The drain begins in a signal handler, which may interrupt the main thread while that has any lock."""

from __future__ import annotations

import logging
import threading
from threading import Event
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.errors import ProviderSilent
from chunkmill.ledger.provider import provider_batches
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.process.context import QueueContext
from chunkmill_workers.process.drain import SECOND_TIME, Drain, with_last_words
from chunkmill_workers.provider.plain import request_chunk_batch
from tests.support.corridor_scene import Scene
from tests.support.waiting import PATIENCE, Call, running


def test_the_handler_takes_no_lock_and_logs_nothing(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is called here as a handler would be: by the thread that has the lock of the flag it leads to, which cannot be
    taken twice, while another has those of all logging."""
    left: list[int] = []
    monkeypatch.setattr("chunkmill_workers.process.drain.leave", left.append)
    monkeypatch.setattr("chunkmill_workers.process.drain.LIMIT_S", 0)
    handlers = [handler for handler in logging.getLogger().handlers if handler.lock]
    assert handlers
    caplog.set_level(logging.DEBUG)
    before = set(threading.enumerate())
    drain = Drain([context])
    (drain_thread,) = set(threading.enumerate()) - before
    held, begun = threading.Event(), threading.Event()

    def hold_logging() -> None:
        for handler in handlers:
            handler.acquire()
        held.set()
        begun.wait(PATIENCE)
        for handler in handlers:
            handler.release()

    def interrupted() -> None:
        with context.stopping._cond:
            drain.begin()
        begun.set()

    with running(hold_logging, release=begun.set):
        assert held.wait(PATIENCE)
        Call(interrupted).result()
        assert begun.is_set()
    assert context.stopping.wait(PATIENCE)  # and the drain goes on in a thread of its own
    drain_thread.join(PATIENCE)
    assert left == [0]


def test_a_worker_that_hangs_gives_back_what_it_holds_and_nothing_else(
    context: WorkerContext, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, each with a ChunkBatch and a step of a ProviderBatch. One leaves: its accounts are closed as
    released, its attempts are not charged, and others can go on at once."""
    claim = {"lease_seconds": 600.0}
    owners = (context.name, "another worker")
    leases, steps = [], []
    for number, owner in enumerate(owners):
        job = client.enqueue(
            [("a", f"text of {owner}")], collection=f"docs {number}", on_long=("truncate", "split")[number]
        )
        with context.db.begin() as conn:
            query = sa.text("SELECT id, space_id FROM chunk_batches WHERE job_id = :job")
            chunk_batch = conn.execute(query, {"job": job.id}).one()
            lease = chunk_batches.claim_if_due(conn, chunk_batch.id, owner=owner, **claim)
            assert lease is not None
            usage.book(conn, lease, usage.Usage("local", owner, contents=7 + number))
            provider_batches.open_gathering(conn, chunk_batch.space_id)
            step_id = conn.execute(sa.text("SELECT max(id) FROM provider_batches")).scalar_one()
            step = provider_batches.claim_if_due(conn, step_id, owner=owner, server="here", **claim)
        assert step is not None
        leases.append(lease)
        steps.append(step)

    drain_to_the_end([context], monkeypatch)

    with context.db.begin() as conn:
        accounts = conn.execute(sa.text("SELECT contents, outcome FROM usage ORDER BY contents")).all()
        again = [chunk_batches.claim_if_due(conn, lease.chunk_batch_id, owner="third", **claim) for lease in leases]
        taken = [provider_batches.claim_if_due(conn, step.id, owner="third", server="here", **claim) for step in steps]
    assert [tuple(row) for row in accounts] == [(7, "released"), (8, None)]
    assert again[0] is not None and again[1] is None
    assert again[0].max_attempts - again[0].attempt == leases[0].max_attempts - leases[0].attempt
    assert taken[0] is not None and taken[1] is None


def test_a_worker_on_both_queues_stops_its_tasks_on_both(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Paid:
        db, name, stopping = context.db, context.name, threading.Event()
        answer_seconds = 0.0

        def book_abandoned(self) -> None:
            pass

    drain_to_the_end([context, Paid()], monkeypatch)

    assert context.stopping.is_set()
    assert Paid.stopping.is_set()


def drain_to_the_end(contexts: list[QueueContext], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drain in this process, which stays, without the pause for tasks to end by themselves."""
    monkeypatch.setattr("chunkmill_workers.process.drain.leave", lambda code: None)
    monkeypatch.setattr("chunkmill_workers.process.drain.LIMIT_S", 0)
    monkeypatch.setattr("chunkmill_workers.process.drain.LAST_WORDS_S", PATIENCE)
    before = set(threading.enumerate())
    drain = Drain(contexts)
    [thread] = set(threading.enumerate()) - before
    drain.begin()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_last_words_are_not_waited_for_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Postgres may be what hangs."""
    monkeypatch.setattr("chunkmill_workers.process.drain.LAST_WORDS_S", 0.0)
    answered, returned = threading.Event(), threading.Event()

    def leave_a_message() -> None:
        with_last_words(lambda: answered.wait(PATIENCE) and None)
        returned.set()

    threading.Thread(target=leave_a_message, daemon=True).start()
    try:
        assert returned.wait(PATIENCE / 2)
    finally:
        answered.set()


def test_the_third_signal_after_a_notice_ends_the_worker_at_once(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is the notice's own, the second is the platform's for the same end, the third is an operator's."""
    left: list[int] = []
    monkeypatch.setattr("chunkmill_workers.process.drain.leave", left.append)
    monkeypatch.setattr("chunkmill_workers.process.drain.LIMIT_S", 0)
    before = set(threading.enumerate())
    drain = Drain([context])
    [thread] = set(threading.enumerate()) - before
    monkeypatch.setattr("chunkmill_workers.process.drain.os.kill", lambda process, number: drain.begin())

    drain.tell_itself()
    thread.join(PATIENCE)  # else it would end this process after the test
    assert not thread.is_alive()
    assert left == [0]
    drain.begin()
    assert left == [0]
    drain.begin()
    assert left == [0, SECOND_TIME]


def paid_request_under_way(stage: Scene) -> tuple[Event, Call]:
    """A plain request of four texts that is with the provider until the event is set."""
    context = stage.corridor.context
    stage.enqueue(stage.texts(4), route="openai-sync")
    [chunk_batch_id] = stage.corridor.due("chunk_batches", "state = 'available'")
    asked, answer = threading.Event(), threading.Event()

    def embed(*_: object, **__: object) -> dict[str, Any]:
        asked.set()
        answer.wait(PATIENCE)
        raise ProviderSilent("the test is over", was_sent=False)

    context.provider.embed = embed  # type: ignore[method-assign]
    call = Call(lambda: request_chunk_batch(context, chunk_batch_id))
    assert asked.wait(PATIENCE)
    return answer, call


def test_a_drain_waits_for_the_provider_as_long_as_a_request_may_take_and_not_after_a_notice(
    stage: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = stage.corridor.context
    drain = Drain([context])
    monkeypatch.setattr("chunkmill_workers.process.drain.os.kill", lambda process, number: None)
    assert drain._ends_at(100.0) == 108.0
    answer, call = paid_request_under_way(stage)
    assert drain._ends_at(100.0) == 108.0 + context.settings.openai_timeout_seconds

    drain.tell_itself()
    ends_at = drain._ends_at(100.0)

    assert drain._noticed_at is not None and ends_at == drain._noticed_at + 8.0
    answer.set()
    call.result()


def test_a_request_that_a_leaving_worker_abandons_is_booked(stage: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a notice there is no time to wait for it."""
    context = stage.corridor.context
    left = threading.Event()
    monkeypatch.setattr("chunkmill_workers.process.drain.leave", lambda code: left.set())
    monkeypatch.setattr("chunkmill_workers.process.drain.LIMIT_S", 0)
    monkeypatch.setattr("chunkmill_workers.process.drain.LAST_WORDS_S", PATIENCE)
    drain = Drain([context])
    monkeypatch.setattr("chunkmill_workers.process.drain.os.kill", lambda process, number: drain.begin())
    answer, call = paid_request_under_way(stage)

    drain.tell_itself()

    assert left.wait(PATIENCE)
    assert stage.corridor.rows("SELECT kind, contents::int FROM adjustments") == [
        {"kind": "maybe_charged", "contents": 4}
    ]
    assert stage.corridor.one("SELECT state FROM chunk_batches") == "available"
    answer.set()
    call.result()
    assert stage.corridor.one("SELECT count(*) FROM adjustments") == 1
