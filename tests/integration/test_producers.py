"""Producers that die, come again, or work beside another: their locks, their keys, and the space of a collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.client import Client as ClientClass
from chunkmill.db.connect import create_db
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.states import JobState
from chunkmill.embedded import StackStatus
from chunkmill.errors import InvalidInput, SpaceMismatch
from chunkmill.ledger.jobs import jobs, recover
from chunkmill.ledger.work import usage
from chunkmill.ledger.work.usage import Outcome, Usage
from chunkmill.settings import Settings
from tests.conftest import fresh_settings
from tests.integration.hands import Hands
from tests.support.waiting import until


class Killed(BaseException):
    pass


def stream(n: int, *, bad: int = 0, dies: bool = False) -> Iterator[tuple[str, str]]:
    """``n`` chunks, then ``bad`` ones that are refused at the door; after all of them the producer may die."""
    yield from ((f"id-{i}", f"text {i}") for i in range(n))
    yield from ((f"bad-{i}", "") for i in range(bad))
    if dies:
        raise Killed


@pytest.fixture
def producer(settings: Settings, db: sa.Engine) -> Iterator[Client]:
    """Its windows are of at most ten chunks, and its ChunkBatches of five."""
    small = settings.model_copy(update={"enqueue_window": 10, "chunk_batch_size": 5})
    engine = create_db(settings.require_database_url(), role="client")
    with ClientClass(engine, Broker.connect(small), small) as made:
        yield made


def die(producer: Client, n: int = 20, *, bad: int = 0, **options: Any) -> int:
    """Enqueue ``n`` chunks and die before the iterable ends. Returns the job's id."""
    with pytest.raises(Killed):
        producer.enqueue(stream(n, bad=bad, dies=True), collection="docs", on_invalid="skip", **options)
    return producer.jobs(1)[0].id


def abandoned(db: sa.Engine) -> list[int]:
    """The jobs that a poller names abandoned now."""
    with db.begin() as conn:
        conn.execute(sa.text("SET LOCAL lock_timeout = '10s'"))
        return recover.fail_abandoned(conn)


# The producer's lock


def test_a_job_that_can_be_seen_has_its_producers_lock(producer: Client, db: sa.Engine) -> None:
    """A poller looks before each statement of the producer, and finds no job that seems to be abandoned."""
    pids: list[int] = []

    @sa.event.listens_for(producer._db, "before_cursor_execute")
    def look(*_: object) -> None:
        pids.extend(abandoned(db))

    job = producer.enqueue(stream(15), collection="docs", on_invalid="skip")
    assert pids == []
    assert job.state is JobState.RUNNING


def test_a_producer_alive_in_another_database_keeps_no_job_of_this_one_open(
    producer: Client, db: sa.Engine, stack: StackStatus
) -> None:
    job = die(producer)
    with fresh_settings(stack) as elsewhere:
        other = create_db(elsewhere.require_database_url(), role="client")
        try:
            with other.connect() as conn, conn.begin():
                assert jobs.hold_producer_lock(conn, job)
                assert abandoned(db) == [job]
        finally:
            other.dispose()


def test_a_lock_for_another_purpose_keeps_no_job_open(producer: Client, db: sa.Engine) -> None:
    job = die(producer)
    with db.connect() as conn, conn.begin():
        conn.execute(sa.text("SELECT pg_advisory_xact_lock(:of_a_gpu, :job)"), {"of_a_gpu": 17, "job": job})
        conn.execute(sa.text("SELECT pg_advisory_xact_lock(:job)"), {"job": job})
        assert abandoned(db) == [job]


def test_another_live_producer_keeps_no_job_open(producer: Client, db: sa.Engine) -> None:
    first = die(producer)
    second = die(producer)
    with db.connect() as conn, conn.begin():
        assert jobs.hold_producer_lock(conn, second)
        assert abandoned(db) == [first]


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**33 + 5])
def test_a_producer_is_found_alive_whatever_the_number_of_its_job(producer: Client, db: sa.Engine, number: int) -> None:
    with db.begin() as conn:
        conn.execute(sa.text(f"ALTER TABLE jobs ALTER COLUMN id RESTART WITH {number}"))
    sizes: list[list[int]] = []

    def alive() -> Iterator[tuple[str, str]]:
        yield from stream(15)
        sizes.append(abandoned(db))

    assert producer.enqueue(alive(), collection="docs", on_invalid="skip").id == number
    assert sizes == [[]]
    dead = die(producer)
    assert (dead, abandoned(db)) == (number + 1, [dead])


def test_a_producer_whose_lock_cannot_be_given_back_does_not_keep_it(producer: Client, db: sa.Engine) -> None:
    """The server refuses the unlock. The lock ends with the connection, which must not go back into the pool."""

    @sa.event.listens_for(producer._db, "before_cursor_execute", retval=True)
    def refuse(_conn: object, _cursor: object, statement: str, parameters: Any, *_: object) -> tuple[str, Any]:
        return (
            statement.replace("SELECT", "SELECT 1 / 0,") if "pg_advisory_unlock" in statement else statement
        ), parameters

    job = die(producer)
    counts: list[int] = []
    until(lambda: counts.extend(abandoned(db)) or counts)  # the server ends the connection a moment later
    assert counts == [job]


def test_the_end_of_an_enqueue_seals_its_own_job_alone(producer: Client, db: sa.Engine) -> None:
    dead = die(producer)
    assert producer.enqueue(stream(15), collection="docs").state is JobState.RUNNING
    assert producer.job(dead).state is JobState.ENQUEUEING
    assert abandoned(db) == [dead]


# The key


def test_the_key_of_a_cancelled_enqueue_is_refused(producer: Client) -> None:
    """Its job has 20 of 30 chunks: neither may it be handed back as if it had all, nor may it begin again."""
    job = die(producer, idempotency_key="k")
    other = die(producer, idempotency_key="other")
    assert producer.cancel(job).state is JobState.CANCELLED
    with pytest.raises(InvalidInput, match=f"job {job}, which was cancelled before all .* another key"):
        producer.enqueue(stream(30), collection="docs", idempotency_key="k")
    assert (producer.job(job).state, producer.job(job).chunks) == (JobState.CANCELLED, 20)
    again = producer.enqueue(stream(30), collection="docs", idempotency_key="other")
    assert (again.id, again.state, again.chunks) == (other, JobState.RUNNING, 30)


def test_a_job_that_was_cancelled_after_its_enqueue_is_handed_back_by_its_key(producer: Client) -> None:
    job = producer.enqueue(stream(30), collection="docs", idempotency_key="k")
    producer.cancel(job.id)
    again = producer.enqueue(stream(30), collection="docs", idempotency_key="k")
    assert (again.id, again.state, again.chunks) == (job.id, JobState.CANCELLED, 30)


def test_an_enqueue_that_is_cancelled_while_its_key_starts_it_over_is_refused(producer: Client, client: Client) -> None:
    job = die(producer, idempotency_key="k")

    @sa.event.listens_for(producer._db, "before_cursor_execute")
    def cancel(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        if "pg_try_advisory_lock" in statement:
            client.cancel(job)

    with pytest.raises(InvalidInput, match="was cancelled before all"):
        producer.enqueue(stream(30), collection="docs", idempotency_key="k")
    assert client.job(job).chunks == 20


def test_a_job_that_is_pruned_while_its_key_comes_again_is_made_anew_with_all_its_chunks(
    producer: Client, client: Client, hands: Hands
) -> None:
    job = producer.enqueue(stream(3), collection="docs", idempotency_key="k")
    hands.work()
    hands.rows("UPDATE jobs SET finished_at = now() - interval '90 days' RETURNING 1")
    pruned: list[int] = []

    @sa.event.listens_for(producer._db, "before_cursor_execute")
    def prune(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        """Before anything is asked about the collection; the arguments and the budget are checked by then."""
        if "collections" in statement and not pruned:
            pruned.append(client.prune(30).amounts["jobs"].rows)

    again = producer.enqueue(stream(3), collection="docs", idempotency_key="k")
    assert pruned[0] == 1
    assert (again.id != job.id, again.chunks) == (True, 3)


def test_a_key_that_was_used_in_another_space_is_refused(client: Client) -> None:
    """The collection may change its space once it is empty; the job of the key does not."""
    job = client.enqueue([("a", "some text")], collection="docs", idempotency_key="k")
    client.cancel(job.id)
    client.delete("docs", all_chunks=True)
    with pytest.raises(InvalidInput, match=f"belongs to job {job.id}"):
        client.enqueue([("a", "some text")], collection="docs", idempotency_key="k", on_long="split")
    assert client.enqueue([("a", "some text")], collection="docs", idempotency_key="k").id == job.id


def test_an_enqueue_that_starts_over_counts_each_content_and_refusal_once(producer: Client, hands: Hands) -> None:
    """One of its ChunkBatches has an account of what it cost and stays. One is with a worker, who may finish it."""
    job = die(producer, 20, bad=10, idempotency_key="k")
    before = producer.job(job)
    assert (before.chunks, before.dead) == (20, 10)
    done, held, *_ = hands.of_job(job)
    lease = hands.claim(done)
    with hands.db.begin() as conn:
        usage.book(conn, lease, Usage("local", "host:1", contents=5), Outcome.COMPLETED)
    hands.embed(lease, {})
    lease = hands.claim(held)
    again = producer.enqueue(stream(25, bad=10), collection="docs", idempotency_key="k", on_invalid="skip")
    assert (again.id, again.state, again.chunks, again.dead) == (job, JobState.RUNNING, 25, 10)
    # What is embedded is a cache hit now. What the worker holds is asked for once more. The rest has begun anew.
    assert (again.contents, again.embedded, again.cached, again.remaining) == (5 + 5 + 25, 5, 5, 5 + 20)
    hands.embed(lease, {})
    hands.work()
    assert producer.job(job).state is JobState.COMPLETED
    assert producer.audit("docs").complete


@pytest.mark.parametrize("on_invalid", ["raise", "skip"])
@pytest.mark.parametrize(
    ("again", "is_same"),
    [
        ([("b", "text b"), ("a", "text a", {"n": 1, "m": 2})], True),
        ([("a", "text a", {"m": 2, "n": 1}), ("b", "text b"), ("bad", "")], True),
        ([("a", "text a", {"n": 1, "m": 2})], False),
        ([("a", "text a", {"n": 1, "m": 2}), ("b", "text b"), ("c", "text c")], False),
        ([("a", "text a", {"n": 1, "m": 2}), ("b", "another text")], False),
        ([("a", "text a", {"n": 1, "m": 3}), ("b", "text b")], False),
        ([], False),
    ],
    ids=["in another order", "refused beside", "one less", "one more", "another text", "other metadata", "nothing"],
)
def test_a_key_comes_again_with_the_same_chunks_or_is_refused(
    producer: Client, rows: Callable[[str], int], on_invalid: Any, again: list[Any], is_same: bool
) -> None:
    chunks = [("a", "text a", {"n": 1, "m": 2}), ("b", "text b")]
    if ("bad", "") in again and on_invalid == "raise":
        again = again[:-1]
    producer.enqueue(iter(chunks[::-1]), collection="docs", idempotency_key="other")
    job = producer.enqueue(iter(chunks), collection="docs", idempotency_key="k", on_invalid=on_invalid)
    if is_same:
        repeated = producer.enqueue(iter(again), collection="docs", idempotency_key="k", on_invalid=on_invalid)
        assert (repeated.id, repeated.chunks) == (job.id, 2)
    else:
        with pytest.raises(InvalidInput, match=f"belongs to job {job.id}, which enqueued other chunks.*its own"):
            producer.enqueue(iter(again), collection="docs", idempotency_key="k", on_invalid=on_invalid)
    assert (rows("jobs"), rows("chunks"), rows("contents")) == (2, 2, 2)


def test_a_key_stands_for_the_chunks_that_its_enqueue_ended_with(producer: Client) -> None:
    """The producer that died had others, of which nothing is left to compare with."""
    job = die(producer, idempotency_key="k")
    again = producer.enqueue(stream(3), collection="docs", idempotency_key="k")
    assert (again.id, again.chunks, again.new, again.unchanged) == (job, 3, 0, 3)
    assert producer.enqueue(stream(3), collection="docs", idempotency_key="k").id == job
    with pytest.raises(InvalidInput, match="other chunks"):
        producer.enqueue(stream(20), collection="docs", idempotency_key="k")


def test_a_key_with_another_policy_is_refused(producer: Client) -> None:
    producer.enqueue(stream(3), collection="docs", idempotency_key="k", on_long="reject")
    with pytest.raises(InvalidInput, match="another on_long"):
        producer.enqueue(stream(3), collection="docs", idempotency_key="k")


# What became of the chunks


def test_a_job_says_what_its_chunks_met(producer: Client) -> None:
    """In windows of ten: an id comes again in its window, and one in a later window."""
    producer.enqueue([(f"id-{i}", f"text {i}", {"n": i}) for i in range(4)], collection="docs")
    producer.enqueue([(f"id-{i}", "not counted") for i in range(30)], collection="other")
    given = [
        ("id-0", "text 0", {"n": 0}), ("id-1", "another", {"n": 1}), ("id-2", "text 2", {"n": -1}),
        *((f"new-{i}", f"text {i}") for i in range(5)),
        ("new-0", "comes again at once"), ("", "has no id"),
        *((f"new-{i}", f"text {i}") for i in range(3, 20)),
    ]  # fmt: skip
    job = producer.enqueue(given, collection="docs", on_invalid="skip")
    assert (job.new, job.replaced, job.unchanged, job.repeated, job.dead) == (20, 2, 1, 3, 1)
    assert len(given) == 20 + 2 + 1 + 3 + 1
    again = producer.enqueue([("new-0", "comes again at once"), ("id-0", "text 0")], collection="docs")
    assert (again.new, again.replaced, again.unchanged, again.repeated) == (0, 1, 1, 0)
    assert [listed.new for listed in producer.jobs(2)] == [0, 20]


def test_an_enqueue_takes_no_number_that_it_does_not_need(producer: Client, hands: Hands) -> None:
    """Numbers of collections end at 2**31."""
    for _ in range(5):
        for name in ("docs", "other"):
            producer.enqueue(stream(2), collection=name, idempotency_key=name)
            producer.enqueue(stream(2), collection=name)
    collections = hands.rows("SELECT max(id) - min(id) FROM collections")
    taken = hands.rows("SELECT nextval(pg_get_serial_sequence('collections', 'id')) - max(id) FROM collections")
    assert (collections, taken) == ([(1,)], [(1,)])
    ((jobs_taken,),) = hands.rows("SELECT nextval(pg_get_serial_sequence('jobs', 'id')) - min(id) FROM jobs")
    assert jobs_taken == 2 + 2 * 5


# Beside others


def test_an_empty_collection_keeps_its_space_under_an_open_job(producer: Client, hands: Hands) -> None:
    """What the job embeds would not be found in the other space."""
    old = producer.enqueue([("a", "some text")], collection="docs")
    producer.enqueue([("b", "another text")], collection="other")
    producer.delete("docs", all_chunks=True)
    with pytest.raises(SpaceMismatch, match="another collection"):
        producer.enqueue([("a", "some text")], collection="docs", on_long="split")
    hands.embed(hands.claim(*hands.of_job(old.id)), {})
    moved = producer.enqueue([("a", "some text")], collection="docs", on_long="split")
    assert moved.space != old.space


def test_an_enqueue_that_postgres_undoes_because_of_a_deadlock_is_run_again(producer: Client) -> None:
    """The fake is the deadlock: the server refuses a window twice, with that code."""
    refused: list[str] = []

    @sa.event.listens_for(producer._db, "before_cursor_execute", retval=True)
    def deadlock(_conn: object, _cursor: object, statement: str, parameters: Any, *_: object) -> tuple[str, Any]:
        if "UPDATE jobs SET n_chunks" in statement and len(refused) < 2:
            refused.append(statement)
            return "DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40P01'; END $$", None
        return statement, parameters

    job = producer.enqueue(stream(25), collection="docs")
    assert len(refused) == 2
    assert (job.state, job.chunks, job.contents) == (JobState.RUNNING, 25, 25)


def test_texts_that_another_job_cut_are_counted_as_truncated(producer: Client, hands: Hands) -> None:
    first = producer.enqueue([("a", "text a"), ("b", "text b"), ("c", "text c")], collection="docs")
    hands.work()
    hands.rows(
        f"UPDATE {hands.vectors_of(first.id)} SET truncated = true WHERE content_hash <> :hash RETURNING 1",
        hash=content_hash("text a"),
    )
    again = producer.enqueue([("a", "text a"), ("b", "text b"), ("new", "a new text")], collection="other")
    assert (again.cached, again.truncated) == (2, 1)


def test_a_producer_that_could_not_ring_does_not_try_for_each_window(
    settings: Settings, producer: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A try may take seconds to fail; there are six windows."""
    cut_off = settings.model_copy(update={"redis_url": "unix:///nonexistent/redis.sock?db=0"})
    broker = Broker.connect(cut_off)
    away = ClientClass(producer._db, broker, producer._settings)
    job = away.enqueue(stream(60), collection="docs")
    broker.close()
    assert job.contents == 60
    assert [record.message.partition(" (")[0] for record in caplog.records].count("cannot ring") == 1
