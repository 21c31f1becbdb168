"""Whose bells are rung, and how a cancelled job leaves: real Postgres and Redis, and workers played by the test."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client, JobState
from chunkmill.broker import QUEUE, Broker, keys_of
from chunkmill.client import Client as ClientClass
from chunkmill.domain.deaths import SUSPECT_DEATHS
from chunkmill.domain.doorbells import SMALLEST_WINDOW
from chunkmill.ledger.jobs.jobs import CANCELLED_CHANNEL
from chunkmill.ledger.work import chunk_batches
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.local import pipeline
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from tests.support.waiting import until

WINDOW = 4


@pytest.fixture
def narrow(settings: Settings) -> Settings:
    """A window that stays at 4 doorbells, and ChunkBatches of one content."""
    return settings.model_copy(update={"doorbell_window": WINDOW, "chunk_batch_size": 1})


@pytest.fixture
def poller(narrow: Settings, db: sa.Engine, broker: Broker) -> Poller:
    return Poller(db, broker, narrow)


@pytest.fixture
def enqueue(narrow: Settings, db: sa.Engine) -> Callable[..., int]:
    producer = ClientClass(db, Broker.connect(narrow), narrow)
    names = iter(range(1000))

    def made(n: int, **options: str) -> int:
        name = next(names)
        return producer.enqueue([(f"{name}-{i}", f"{name} {i}") for i in range(n)], collection="docs", **options).id

    return made


@pytest.fixture
def serve(db: sa.Engine, broker: Broker) -> Callable[[], int]:
    """Answer the next bell as a worker would, and return the job it was for."""

    def served() -> int:
        messages = (broker.client.rpop(key) for key in ("gpu", *(f"gpu\x06\x16{step}" for step in (3, 6, 9))))
        message = next(filter(None, messages))
        ((chunk_batch_id,), *_) = json.loads(base64.b64decode(json.loads(message)["body"]))
        with db.begin() as conn:
            return int(
                conn.execute(
                    sa.text("UPDATE chunk_batches SET state = 'completed' WHERE id = :id RETURNING job_id"),
                    {"id": chunk_batch_id},
                ).scalar_one()
            )

    return served


@pytest.fixture
def answer(context: WorkerContext, db: sa.Engine, broker: Broker) -> Callable[[], int | None]:
    """Let a real task answer the next bell, and return the job whose ChunkBatch it completed; None if it had none."""

    def completed() -> Counter[int]:
        with db.begin() as conn:
            return Counter(
                conn.execute(sa.text("SELECT job_id FROM chunk_batches WHERE state = 'completed'")).scalars()
            )

    def answered() -> int | None:
        messages = (broker.client.rpop(key) for key in keys_of(QUEUE))
        ((chunk_batch_id,), *_) = json.loads(base64.b64decode(json.loads(next(filter(None, messages)))["body"]))
        before = completed()
        run_chunk_batch(context, chunk_batch_id)
        return next(iter(completed() - before), None)

    return answered


def rung(db: sa.Engine) -> Counter[int]:
    """Bells of each job that nobody has answered."""
    with db.begin() as conn:
        return Counter(
            conn.execute(
                sa.text("SELECT job_id FROM chunk_batches WHERE state = 'available' AND rung_at IS NOT NULL")
            ).scalars()
        )


def test_the_second_job_begins_when_the_window_of_the_first_is_answered(
    enqueue: Callable[..., int], serve: Callable[[], int], poller: Poller
) -> None:
    first, second = enqueue(20), enqueue(20)
    served = []
    for _ in range(24):
        served.append(serve())
        poller.round()
    assert served[:WINDOW] == [first] * WINDOW  # they were in Redis before the second came
    assert Counter(served[WINDOW:]) == {first: 10, second: 10}
    for at in range(WINDOW, 24):
        assert abs(served[WINDOW:at].count(first) - served[WINDOW:at].count(second)) <= WINDOW


def test_a_small_job_does_not_wait_for_the_bells_of_a_large_one(
    enqueue: Callable[..., int], answer: Callable[[], int | None], poller: Poller, db: sa.Engine, broker: Broker
) -> None:
    """They are before its own in Redis. On a slow worker they were minutes of work."""
    large = enqueue(20)
    assert answer() == large
    small, other = enqueue(1), enqueue(2)
    poller.round()
    assert rung(db) == {large: WINDOW - 1, small: 1}
    # What is free after a claim is rung for the other one, which has the fewest bells.
    served = []
    for _ in range(6):
        served.append(answer())
        poller.round()
    assert served == [large, small, large, other, large, other]
    # No bell is lost: each that is left stands for a ChunkBatch that was passed over.
    while sum(broker.queued_doorbells().values()):
        assert answer() in (large, other)
    assert not rung(db)


def test_small_jobs_that_keep_coming_do_not_keep_a_large_one_waiting(
    enqueue: Callable[..., int], answer: Callable[[], int | None], poller: Poller
) -> None:
    large, served = enqueue(20), []
    for _ in range(12):
        enqueue(1)
        poller.round()
        served.append(answer())
    assert None not in served
    # While n of its first four bells wait, at most 4 - n small ones are rung and may go before the next of them.
    assert served.count(large) >= WINDOW
    assert len(set(served)) > WINDOW


@pytest.mark.parametrize(
    "change",
    [
        "priority = 9",
        "route = 'openai-sync'",
        "state = 'running'",
        "not_before = now() + interval '1 h'",
        "attempt = max_attempts",
        "rung_at = NULL",
        "rung_at = now() + interval '1 h'",
    ],
)
def test_the_turn_goes_to_what_may_be_claimed_now(change: str, enqueue: Callable[..., int], db: sa.Engine) -> None:
    """After an hour of the first job, it would be the turn of the second one."""
    first, _second = enqueue(1), enqueue(1)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = now() - interval '1 minute'"))
        turns = [chunk_batches.turn_of(conn, 1, served=served) for served in ({first: 0.0}, {first: 3600.0}, {})]
        conn.execute(sa.text(f"UPDATE chunk_batches SET {change} WHERE id = 2"))
        turns.append(chunk_batches.turn_of(conn, 1, served={first: 0.0}))
    assert turns == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("state", "turn"), [("running", 2), ("completed", 2), ("discarded", 2), ("available", 1), ("cancelled", 1)]
)
def test_a_bell_whose_chunk_batch_another_worker_took_stands_for_one_that_was_passed_over(
    state: str, turn: int, enqueue: Callable[..., int], db: sa.Engine
) -> None:
    enqueue(1), enqueue(1)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET state = :state WHERE id = 1"), {"state": state})
        assert chunk_batches.turn_of(conn, 1, served={}) == turn


def test_the_turn_goes_to_no_cancelled_job_and_to_no_space_that_the_worker_has_not(
    enqueue: Callable[..., int], db: sa.Engine
) -> None:
    first, second = enqueue(1), enqueue(1)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = now() - interval '1 minute'"))
        assert chunk_batches.turn_of(conn, 1, served={first: 0.0}) == 2
        assert chunk_batches.turn_of(conn, 1, served={first: 0.0}, not_spaces=[1]) == 1
        conn.execute(sa.text("UPDATE jobs SET state = 'cancelled' WHERE id = :id"), {"id": second})
        assert chunk_batches.turn_of(conn, 1, served={first: 0.0}) == 1


def test_a_suspect_whose_turn_it_is_is_the_one_that_is_embedded_alone(
    context: WorkerContext, enqueue: Callable[..., int], answer: Callable[[], int | None], db: sa.Engine
) -> None:
    large = enqueue(20)
    assert answer() == large
    suspect = enqueue(1)
    assert answer() == large
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE chunk_batches SET deaths = :n WHERE job_id = :id"), {"n": SUSPECT_DEATHS, "id": suspect}
        )
    assert answer() == suspect


def test_bells_of_one_round_alternate(
    enqueue: Callable[..., int], serve: Callable[[], int], poller: Poller, db: sa.Engine, broker: Broker
) -> None:
    first, second = enqueue(9), enqueue(9)
    broker.client.flushdb()
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = NULL"))
    poller.round()
    served = [serve() for _ in range(WINDOW)]
    assert served in ([first, second] * 2, [second, first] * 2)


def test_with_more_jobs_than_bells_nobody_waits_for_all_others(
    enqueue: Callable[..., int], serve: Callable[[], int], poller: Poller, db: sa.Engine
) -> None:
    """By lot, so some luck is left: one in 10**7 that a fair poller fails here."""
    jobs = [enqueue(30) for _ in range(WINDOW + 3)]
    served: Counter[int] = Counter()
    for _ in range(100):
        served[serve()] += 1
        poller.round()
        assert max(rung(db).values()) <= WINDOW
    assert set(served) == set(jobs)


def test_a_job_at_its_end_leaves_the_rest_to_the_others(
    settings: Settings, enqueue: Callable[..., int], db: sa.Engine, broker: Broker
) -> None:
    small, large = enqueue(2), enqueue(20)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = NULL"))
    broker.client.flushdb()
    assert Poller(db, broker, settings).round().rung == SMALLEST_WINDOW
    assert rung(db) == {small: 2, large: SMALLEST_WINDOW - 2}


def test_a_job_that_waits_for_its_next_attempts_holds_nobody_up(
    enqueue: Callable[..., int], db: sa.Engine, broker: Broker, poller: Poller
) -> None:
    failing, other = enqueue(20), enqueue(20)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = NULL"))
        conn.execute(
            sa.text("UPDATE chunk_batches SET not_before = now() + interval '1 h' WHERE job_id = :id"), {"id": failing}
        )
    broker.client.flushdb()
    poller.round()
    assert rung(db) == {other: WINDOW}


def test_what_a_dead_worker_held_is_rung_before_what_nobody_began(
    enqueue: Callable[..., int], serve: Callable[[], int], db: sa.Engine, poller: Poller
) -> None:
    enqueue(20)
    serve()
    with db.begin() as conn:  # as it is taken back
        conn.execute(
            sa.text(
                "UPDATE chunk_batches SET state = 'available', rung_at = NULL, not_before = now() "
                "WHERE state = 'completed'"
            )
        )
    poller.round()
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT rung_at FROM chunk_batches ORDER BY id LIMIT 1")).scalar_one() is not None


def test_bells_that_nobody_can_answer_leave_room_for_others(
    enqueue: Callable[..., int], db: sa.Engine, broker: Broker, poller: Poller
) -> None:
    """No worker has the first job's model: its bells are taken, the claim passes them over, and they look lost."""
    unserved, other = enqueue(20), enqueue(20)
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE chunk_batches SET rung_at = now() - interval '1 h' WHERE job_id = :id"), {"id": unserved}
        )
    for _ in range(3):
        broker.client.flushdb()
        poller.round()
    assert rung(db) == {unserved: 20, other: 3 * WINDOW // 2}


def test_bells_that_wait_on_another_route_take_no_room(
    enqueue: Callable[..., int], poller: Poller, db: sa.Engine, broker: Broker
) -> None:
    elsewhere, here = enqueue(10), enqueue(10)
    broker.client.flushdb()
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = NULL WHERE job_id = :id"), {"id": here})
        conn.execute(
            sa.text("UPDATE chunk_batches SET route = 'openai', rung_at = now() - interval '1 h' WHERE job_id = :id"),
            {"id": elsewhere},
        )
    poller.round()
    assert rung(db)[here] == WINDOW


def test_bells_of_a_job_whose_producer_died_are_rung_too(
    enqueue: Callable[..., int], db: sa.Engine, broker: Broker, poller: Poller
) -> None:
    job = enqueue(3)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET state = 'failed'"))
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = NULL"))
    broker.client.flushdb()
    poller.round()
    assert rung(db) == {job: 3}


def test_a_producer_fills_the_smallest_window_and_the_poller_learns_how_many_are_needed(
    settings: Settings, db: sa.Engine, broker: Broker
) -> None:
    wide = settings.model_copy(update={"chunk_batch_size": 1, "doorbell_window": 64})
    client = ClientClass(db, Broker.connect(wide), wide)
    client.enqueue([(str(i), f"text {i}") for i in range(500)], collection="docs")
    assert sum(broker.queued_doorbells().values()) == SMALLEST_WINDOW
    poller = Poller(db, broker, wide)
    held = []
    for _ in range(6):
        broker.client.delete("gpu\x06\x166")  # all answered
        with db.begin() as conn:
            conn.execute(sa.text("UPDATE chunk_batches SET state = 'completed' WHERE rung_at IS NOT NULL"))
        poller.round()
        held.append(sum(broker.queued_doorbells().values()))
    assert held == [8, 16, 32, 64, 64, 64]


def test_bells_of_cancelled_chunk_batches_are_answered_with_nothing(
    client: Client, context: WorkerContext, enqueue: Callable[..., int], broker: Broker, poller: Poller, db: sa.Engine
) -> None:
    cancelled, other = enqueue(9), enqueue(2)
    poller.round()
    assert sum(broker.queued_doorbells().values()) == WINDOW
    client.cancel(cancelled)
    with db.begin() as conn:
        ids = conn.execute(sa.text("SELECT id FROM chunk_batches WHERE job_id = :id"), {"id": cancelled}).scalars()
    assert {run_chunk_batch(context, chunk_batch_id) for chunk_batch_id in ids} == {TaskResult.NOT_OURS}
    broker.client.flushdb()  # a worker took those messages
    assert poller.round().rung == 2
    assert rung(db) == {other: 2}
    again = client.retry(cancelled)
    assert (again.state, again.remaining) == (JobState.RUNNING, 9)
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT max(attempt) FROM chunk_batches")).scalar_one() == 0


@pytest.fixture
def responder(context: WorkerContext) -> Iterator[EmbedResponder]:
    running = EmbedResponder(context)
    running.start()
    yield running
    running.stop()


def test_a_cancelled_chunk_batch_stops_at_its_next_token_batch_and_keeps_what_was_written(
    client: Client, context: WorkerContext, db: sa.Engine, responder: EmbedResponder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the notice can stop it: nothing is written after the cancel, and no lease is renewed."""
    text = "with many words to fill several forward passes " * 5
    job = client.enqueue([(str(i), f"text number {i}, {text}") for i in range(100)], collection="docs")
    real_stream = Engine.stream
    written: list[bytes] = []
    after = 0

    def cancelled_after_two(self: Engine, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        nonlocal after
        for n, result in enumerate(real_stream(self, *args, **kwargs)):
            after += n > 1
            yield result
            if n == 1:
                with db.begin() as conn:
                    written.extend(conn.execute(sa.text("SELECT content_hash FROM vectors_1")).scalars())
                monkeypatch.setattr(pipeline, "FLUSH_SECONDS", 1e9)
                client.cancel(job.id)
                until(lambda: all(held.lost.is_set() for held in context.leases._held.values()))

    context.engine_for(_space(context))
    monkeypatch.setattr(pipeline, "FLUSH_SECONDS", 0)
    monkeypatch.setattr(Engine, "stream", cancelled_after_two)
    assert run_chunk_batch(context, 1) is TaskResult.LEASE_LOST
    assert after == 1
    with db.begin() as conn:
        assert sorted(conn.execute(sa.text("SELECT content_hash FROM vectors_1")).scalars()) == sorted(written)
    assert 0 < len(written) < 100
    monkeypatch.undo()
    done = client.job(job.id)
    assert (done.state, done.embedded) == (JobState.CANCELLED, len(written))
    client.retry(job.id)
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    with db.begin() as conn:
        contents = conn.execute(sa.text("SELECT contents FROM usage ORDER BY attempt DESC LIMIT 1")).scalar_one()
    assert contents == 100 - len(written)  # nothing that was written is embedded again


def test_a_cancel_that_is_heard_late_leaves_the_next_attempt_alone(
    client: Client, context: WorkerContext, db: sa.Engine, responder: EmbedResponder
) -> None:
    job = client.enqueue([("a", "text")], collection="docs")
    client.cancel(job.id)
    client.retry(job.id)
    with db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, 1, owner="w", lease_seconds=1)
        claimed_until = conn.execute(sa.text("SELECT lease_until FROM chunk_batches")).scalar_one()
    assert lease is not None

    def is_renewed() -> bool:
        with db.begin() as conn:
            return conn.execute(sa.text("SELECT lease_until FROM chunk_batches")).scalar_one() > claimed_until

    with context.leases.holding(lease) as held:
        with db.begin() as conn:
            conn.execute(sa.text("SELECT pg_notify(:c, :job)"), {"c": CANCELLED_CHANNEL, "job": str(job.id)})
        until(is_renewed)
        held.check()


def _space(context: WorkerContext) -> registry.Space:
    with context.db.begin() as conn:
        return registry.all_spaces(conn)[0]
