"""An enqueue inside the producer's own transaction: the job exists if and only if that commits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from chunkmill.broker import Broker
from chunkmill.client import Client, outbox
from chunkmill.client.outbox import Deliverer
from chunkmill.db.connect import create_db, open_alone
from chunkmill.domain.providers import read_models
from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState
from chunkmill.errors import (
    ChunkmillError,
    InvalidChunk,
    InvalidInput,
    NotFound,
    SpaceMismatch,
    StoreUnavailable,
    WaitTimeout,
)
from chunkmill.ledger.jobs import jobs, recover
from chunkmill.monitor.servers import read_status
from chunkmill.settings import Settings
from chunkmill.spaces import collections, names
from tests.conftest import client_for
from tests.integration.hands import Hands
from tests.support import reembeddings
from tests.support.waiting import until

CHUNKS = [("a", "text a"), ("b", "text b", {"n": 1})]


@pytest.fixture
def own(settings: Settings) -> Iterator[sa.Engine]:
    """The producer's own connections, with a search path of their own."""
    engine = sa.create_engine(settings.require_database_url().partition("?schema")[0])
    with engine.begin() as conn:
        conn.execute(sa.text("CREATE TABLE public.articles (id text PRIMARY KEY)"))
    yield engine
    engine.dispose()


@contextmanager
def session(own: sa.Engine) -> Iterator[orm.Session]:
    with orm.Session(own) as made:
        made.execute(sa.text("INSERT INTO public.articles VALUES ('a')"))
        yield made


@contextmanager
def connection(own: sa.Engine) -> Iterator[sa.Connection]:
    with own.connect() as made:
        yield made


@contextmanager
def driver(own: sa.Engine) -> Iterator[psycopg.Connection]:
    with psycopg.connect(own.url.set(drivername="postgresql").render_as_string(False)) as made:
        yield made


@contextmanager
def driver_that_commits(own: sa.Engine) -> Iterator[psycopg.Connection]:
    """Except in a block of its own."""
    with driver(own) as made:
        made.autocommit = True
        made.execute("BEGIN")
        yield made


KINDS = pytest.mark.parametrize("kind", [session, connection, driver, driver_that_commits])
Kind = Callable[[sa.Engine], "contextmanager[orm.Session]"]


@pytest.fixture
def deliverer(client: Client, db: sa.Engine, settings: Settings) -> Deliverer:
    return Deliverer(db, settings, client._ring)


@contextmanager
def before_statement(engine: sa.Engine, number: int, do: Callable[[], object]) -> Iterator[list[str]]:
    """Do something in a thread before the statement ``number`` that a connection of this engine runs. The statement
    comes when it is done, or when it waits for a lock. Yields the statements."""
    seen: list[str] = []
    thread = threading.Thread(target=do)
    own_thread = threading.get_ident()
    waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    watcher = sa.create_engine(engine.url)

    def look(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        if threading.get_ident() != own_thread:
            return
        seen.append(statement)
        if len(seen) == number:
            thread.start()
            until(lambda: not thread.is_alive() or one(watcher, waits) == 1)

    sa.event.listen(engine, "before_cursor_execute", look)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "before_cursor_execute", look)
        if thread.ident is not None:
            thread.join()
        watcher.dispose()


def one(db: sa.Engine, query: str) -> object:
    with db.begin() as conn:
        return conn.execute(sa.text(query)).scalar_one()


@KINDS
def test_a_job_exists_if_and_only_if_the_transaction_commits(
    kind: Kind, own: sa.Engine, client: Client, deliverer: Deliverer, hands: Hands
) -> None:
    other = client.enqueue([("o", "text o")], collection="other")
    with kind(own) as taken_back:
        job = client.enqueue(CHUNKS, collection="docs", within=taken_back)
        taken_back.rollback()
    with kind(own) as committed:
        kept = client.enqueue(CHUNKS, collection="docs", within=committed)
        assert kept.id not in (job.id, other.id)
        with pytest.raises(NotFound):
            client.job(kept.id)
        assert deliverer.round() == 0
        committed.commit()
    with pytest.raises(NotFound):
        client.job(job.id)
    waits = client.job(kept.id)
    assert (waits.state, waits.chunks, waits.collection) == (JobState.ENQUEUEING, 2, "docs")
    assert waits == kept
    assert deliverer.round() == 1
    delivered = client.job(kept.id)
    assert (delivered.state, delivered.contents, delivered.new) == (JobState.RUNNING, 2, 2)
    assert {name: chunk.metadata for name, chunk in client.get("docs", ["a", "b"]).items()} == {"a": {}, "b": {"n": 1}}
    hands.work()
    assert client.job(kept.id).state is JobState.COMPLETED
    assert client.job(other.id).state is JobState.COMPLETED
    assert deliverer.round() == 0


@pytest.mark.parametrize("more", [{"replace": True}, {"max_refused": 1, "on_invalid": "skip"}])
def test_what_is_decided_after_the_whole_stream_is_refused_within_a_transaction(
    more: dict[str, Any], own: sa.Engine, client: Client, db: sa.Engine
) -> None:
    with own.begin() as transaction, pytest.raises(InvalidInput, match="replace and max_refused cannot be combined"):
        client.enqueue(CHUNKS, collection="docs", within=transaction, **more)
    assert one(db, "SELECT count(*) FROM outbox_jobs") == 0


@KINDS
def test_an_error_leaves_the_transaction_as_it_was(kind: Kind, own: sa.Engine, client: Client, db: sa.Engine) -> None:
    with kind(own) as committed:
        with pytest.raises(InvalidChunk, match="position 1"):
            client.enqueue([("a", "text a"), ("b", "")], collection="docs", within=committed)
        kept = client.enqueue(CHUNKS, collection="docs", within=committed)
        committed.commit()
    assert one(db, "SELECT array_agg(job_id) FROM outbox_jobs") == [kept.id]
    assert one(db, "SELECT count(*) FROM outbox_pages") == 1


def test_bad_chunks_that_are_skipped_come_to_the_dead_list(
    own: sa.Engine, client: Client, deliverer: Deliverer
) -> None:
    chunks = [("a", "text a"), ("b", ""), ("a\x00", "text"), ("c", "text c")]
    with connection(own) as committed:
        job = client.enqueue(chunks, collection="docs", within=committed, on_invalid="skip")
        committed.commit()
    deliverer.round()
    assert client.job(job.id).chunks == 2
    assert [(dead.chunk_id, dead.reason[:10]) for dead in client.dead_chunks(job.id)] == [
        ("b", "position 1"), ("a\\x00", "position 2"),
    ]  # fmt: skip


def test_an_open_transaction_locks_nothing_that_others_need(
    own: sa.Engine, client: Client, db: sa.Engine, hands: Hands
) -> None:
    """However long it stays open: others enqueue into its collection, delete from it, and drop it."""
    client.enqueue([("a", "text a"), ("b", "text b")], collection="docs")
    with connection(own) as open_one:
        job = client.enqueue(CHUNKS, collection="docs", within=open_one)
        pid = open_one.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        held = hands.rows(
            """
            SELECT DISTINCT l.locktype, c.relname
            FROM pg_locks l
            LEFT JOIN pg_class c ON c.oid = l.relation
            WHERE l.pid = :pid AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
              AND l.locktype NOT IN ('virtualxid', 'transactionid')
            """,
            pid=pid,
        )
        assert {locktype for locktype, _ in held} == {"relation"}
        assert {name for _, name in held} <= {
            "outbox_jobs", "outbox_pages", "pk_outbox_jobs", "pk_outbox_pages", "uq_outbox_jobs_idempotency_key",
        }  # fmt: skip
        again = client.enqueue(CHUNKS, collection="docs")
        hands.work()
        assert client.job(again.id).state is JobState.COMPLETED
        client.delete("docs", ids=["a"])
        client.drop_collection("docs")
        open_one.commit()
    assert client.job(job.id).chunks == 2


def test_a_key_gives_the_same_job_in_whatever_way_it_comes_again(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine
) -> None:
    other = client.enqueue(CHUNKS, collection="other", idempotency_key="other")
    with connection(own) as conn, connection(own) as second:

        def again(**arguments: object) -> int:
            arguments = {"collection": "docs", "idempotency_key": "k", **arguments}
            return client.enqueue(CHUNKS, **arguments).id  # type: ignore[arg-type]

        assert client.enqueue(CHUNKS, collection="other", idempotency_key="other", within=conn).id == other.id
        first = again(within=conn)
        assert again(within=conn) == first
        with pytest.raises(InvalidInput, match="enqueued other chunks"):
            client.enqueue(CHUNKS[:1], collection="docs", idempotency_key="k", within=conn)
        conn.commit()
        for within in (None, second):  # while it is in the outbox
            assert again(within=within) == first
            for arguments, chunks, said in (
                ({"collection": "docs"}, CHUNKS[:1], "enqueued other chunks"),
                ({"collection": "other"}, CHUNKS, "another collection"),
                ({"collection": "docs", "on_long": "reject"}, CHUNKS, "another on_long"),
            ):
                with pytest.raises(InvalidInput, match=said):
                    client.enqueue(chunks, idempotency_key="k", within=within, **arguments)  # type: ignore[arg-type]
        second.commit()
        deliverer.round()
        for within in (None, second):  # and once it was delivered
            assert again(within=within) == first
            with pytest.raises(InvalidInput, match="enqueued other chunks"):
                client.enqueue(CHUNKS[:1], collection="docs", idempotency_key="k", within=within)
    assert one(db, "SELECT count(*) FROM outbox_jobs") == 0
    assert one(db, "SELECT count(*) FROM jobs") == 2


@pytest.mark.parametrize("ends", ["commit", "rollback"])
@pytest.mark.parametrize("is_within", [True, False])
def test_two_with_one_key_at_once_are_one_job(
    ends: str, is_within: bool, own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine
) -> None:
    got: list[int] = []

    def come_second() -> None:
        with ExitStack() as stack:
            conn = stack.enter_context(own.connect()) if is_within else None
            got.append(client.enqueue(CHUNKS, collection="docs", idempotency_key="k", within=conn).id)
            if conn is not None:
                conn.commit()

    with connection(own) as conn:
        first = client.enqueue(CHUNKS, collection="docs", idempotency_key="k", within=conn)
        second = threading.Thread(target=come_second)
        second.start()
        until(lambda: one(db, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == 1)
        getattr(conn, ends)()
        second.join()
    deliverer.round()
    assert (got == [first.id]) is (ends == "commit")
    assert client.job(got[0]).idempotency_key == "k"
    assert one(db, "SELECT count(*) FROM jobs") == 1


@pytest.mark.parametrize("is_delivered", [True, False])
def test_an_old_snapshot_finds_the_job_of_a_key_that_it_cannot_see(
    is_delivered: bool, own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine
) -> None:
    with own.connect().execution_options(isolation_level="REPEATABLE READ") as conn:
        conn.execute(sa.text("SELECT 1 FROM pg_class LIMIT 1"))
        with connection(own) as newer:
            first = client.enqueue(CHUNKS, collection="docs", idempotency_key="k", within=newer)
            client.enqueue(CHUNKS, collection="docs", idempotency_key="other", within=newer)
            newer.commit()
        if is_delivered:
            deliverer.round()
        assert client.enqueue(CHUNKS, collection="docs", idempotency_key="k", within=conn).id == first.id
        with pytest.raises(InvalidInput, match="enqueued other chunks"):
            client.enqueue([("c", "text c")], collection="docs", idempotency_key="k", within=conn)
        fresh = client.enqueue([("c", "text c")], collection="docs", idempotency_key="new", within=conn)
        conn.commit()
    deliverer.round()
    assert [job.id for job in client.jobs()] == [fresh.id, first.id + 1, first.id]


def test_a_job_whose_key_another_one_has_got_meanwhile_loses_no_chunk(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine
) -> None:
    """A producer of the last release does not look into the outbox."""
    with connection(own) as conn:
        second = client.enqueue([("c", "text c")], collection="docs", idempotency_key="k", within=conn)
        kept = client.enqueue([("d", "text d")], collection="docs", idempotency_key="own", within=conn)
        conn.commit()
    first = client.enqueue(CHUNKS, collection="docs", idempotency_key="earlier")
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET idempotency_key = 'k' WHERE id = :id"), {"id": first.id})
    deliverer.round()
    assert client.job(second.id).idempotency_key is None
    assert client.job(first.id).idempotency_key == "k"
    assert client.job(kept.id).idempotency_key == "own"
    assert set(client.get("docs", ["c", "d"])) == {"c", "d"}


def test_who_delivers_may_die_and_the_next_one_goes_on(
    own: sa.Engine, client: Client, settings: Settings, db: sa.Engine, monkeypatch: pytest.MonkeyPatch, hands: Hands
) -> None:
    monkeypatch.setattr(outbox, "PAGE_CHUNKS", 2)
    narrow = settings.model_copy(update={"enqueue_window": 2, "chunk_batch_size": 1})
    chunks = [(f"c{n}", f"text {n}") for n in range(7)]
    with connection(own) as conn:
        job = client.enqueue(chunks, collection="docs", within=conn, idempotency_key="k")
        conn.commit()

    class Died(BaseException):
        pass

    def die(conn: sa.Connection) -> None:
        if client.job(job.id).chunks == 4:
            raise Died

    with pytest.raises(Died):
        Deliverer(db, narrow, die).round()
    with db.begin() as conn:
        assert recover.fail_abandoned(conn) == []
    assert client.job(job.id).state is JobState.ENQUEUEING
    assert Deliverer(db, narrow, client._ring).round() == 1
    delivered = client.job(job.id)
    assert (delivered.state, delivered.chunks, delivered.contents) == (JobState.RUNNING, 7, 7)
    assert client.enqueue(reversed(chunks), collection="docs", idempotency_key="k").id == job.id
    hands.work()
    assert client.job(job.id).state is JobState.COMPLETED


def test_two_that_deliver_at_once_enqueue_once(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine, settings: Settings
) -> None:
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn)
        later = client.enqueue([("z", "text z")], collection="other", within=conn)
        conn.commit()
    between: list[int] = []
    first = Deliverer(db, settings, lambda _: between.append(deliverer.round()))
    assert first.round() == 1
    assert between == [1]  # the other job
    assert [client.job(number).chunks for number in (job.id, later.id)] == [2, 1]


def test_a_job_that_cannot_be_enqueued_any_more_fails_and_says_why(
    own: sa.Engine, client: Client, deliverer: Deliverer
) -> None:
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn)
        fine = client.enqueue(CHUNKS, collection="other", within=conn)
        conn.commit()
    client.enqueue([("z", "text z")], collection="docs", precision="int8")
    assert deliverer.round() == 2
    failed = client.job(job.id)
    assert failed.state is JobState.FAILED
    assert "holds vectors of another space" in str(failed.error)
    assert client.job(fine.id).state is JobState.RUNNING
    with connection(own) as conn, pytest.raises(SpaceMismatch):  # what is known at once is said at once
        client.enqueue(CHUNKS, collection="docs", within=conn)


def test_a_setting_that_one_poller_lacks_costs_no_job(
    settings: Settings, own: sa.Engine, client: Client, db: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its model has a price where the job was enqueued, and where another poller runs."""
    models = {"mine": {"dimensions": 8, "usd": 0}, "other": {"dimensions": 8, "usd": 0}}
    budget = {"openai_monthly_budget_usd": Decimal(5)}
    priced = settings.model_copy(update={"openai_models": read_models(models), **budget})
    lacking = settings.model_copy(update={"openai_models": read_models(models | {"mine": {"dimensions": 8}}), **budget})
    producer = client_for(priced)
    with connection(own) as conn:
        job = producer.enqueue(CHUNKS, collection="docs", model="mine", route="openai-sync", within=conn)
        fine = producer.enqueue(CHUNKS, collection="other", model="other", route="openai-sync", within=conn)
        conn.commit()
    assert Deliverer(db, lacking, client._ring).round() == 1
    assert [client.job(number).state for number in (job.id, fine.id)] == [JobState.ENQUEUEING, JobState.RUNNING]
    assert f"job {job.id} of the outbox was not delivered (model 'mine' has no price" in caplog.text
    assert Deliverer(db, priced, client._ring).round() == 1
    assert client.job(job.id).state is JobState.RUNNING
    assert client.job(job.id).chunks == len(CHUNKS)
    producer.close()


def test_what_passes_is_tried_again_and_keeps_no_other_waiting(
    own: sa.Engine, client: Client, deliverer: Deliverer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn)
        fine = client.enqueue(CHUNKS, collection="other", within=conn)
        conn.commit()
    deliver = outbox.deliver

    def refuse(*args: object, **kwargs: object) -> bool:
        if args[2] == job.id:
            raise StoreUnavailable("Postgres is full")
        return deliver(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(outbox, "deliver", refuse)
    assert deliverer.round() == 1
    assert client.job(fine.id).state is JobState.RUNNING
    monkeypatch.setattr(outbox, "deliver", deliver)
    deliverer._pauses.clear()
    assert deliverer.round() == 1
    assert client.job(job.id).state is JobState.RUNNING


@pytest.mark.parametrize("most", ["MOST_CHUNKS", "MOST_BYTES"])
def test_more_than_a_transaction_may_take_is_refused_whole(
    most: str, own: sa.Engine, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "PAGE_CHUNKS", 1)
    monkeypatch.setattr(outbox, most, {"MOST_CHUNKS": 3, "MOST_BYTES": 36}[most])
    chunks = [(f"c{n}", f"text {n}", {}) for n in range(4)]  # of ten bytes each, with "{}"
    with connection(own) as conn:
        with pytest.raises(InvalidInput, match="at most"):
            client.enqueue(chunks, collection="docs", within=conn)
        client.enqueue(chunks[:3], collection="docs", within=conn)
        conn.commit()
    assert one(db, "SELECT count(*) FROM outbox_pages") == 3


def test_a_job_in_the_outbox_can_be_cancelled(own: sa.Engine, client: Client, deliverer: Deliverer) -> None:
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn)
        kept = client.enqueue(CHUNKS, collection="docs", within=conn)
        conn.commit()
    assert client.cancel(job.id).state is JobState.CANCELLED
    assert deliverer.round() == 2
    assert (client.job(job.id).state, client.job(job.id).chunks) == (JobState.CANCELLED, 0)
    assert client.job(kept.id).state is JobState.RUNNING


def test_who_waits_is_told_that_nobody_delivers_the_job(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine, settings: Settings
) -> None:
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn)
        fresh = client.enqueue(CHUNKS, collection="docs", within=conn)
        conn.commit()
    with db.begin() as conn:
        late = "UPDATE outbox_jobs SET created_at = created_at - interval '1 min' WHERE job_id = :id"
        conn.execute(sa.text(late), {"id": job.id})

    def said(job: Job) -> str:
        with pytest.raises(WaitTimeout) as caught:
            client.wait(job.id, timeout=0)
        return str(caught.value)

    for waiting in (job, fresh):
        assert "a poller makes its ChunkBatches, and none is connected" in said(waiting)
        assert "its log says" not in said(waiting)  # nobody's
    poller = create_db(settings.require_database_url(), role="poller")
    with poller.connect():
        assert "is not delivered yet" in said(job)
        assert "its log says why it does not" in str(client.job(job.id).hindrance)
        assert "delivered" not in said(fresh)
    poller.dispose()
    deliverer.round()
    assert "delivered" not in said(job)


def test_a_job_in_the_outbox_is_listed_counted_and_explained(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine, settings: Settings
) -> None:
    opened = client.enqueue([("o", "text o")], collection="other")
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key="k")
        client.enqueue(CHUNKS, collection="other", within=conn, route="local")
        conn.commit()
    with connection(own) as conn:
        taken_back = client.enqueue(CHUNKS, collection="docs", within=conn)
        conn.rollback()
    listed = client.jobs()
    assert [one.id for one in listed] == [job.id + 1, job.id, opened.id]
    assert listed[1] == job
    assert [one.id for one in client.jobs(1)] == [job.id + 1]
    with db.begin() as conn:
        other = collections.find(conn, "other").id
        assert [one.id for one in jobs.page(conn, limit=9, collections=[other])] == [job.id + 1, opened.id]
        assert [one.id for one in jobs.page(conn, limit=9, before=job.id + 1)] == [job.id, opened.id]
        assert jobs.with_key(conn, "k") == job
    status = read_status(settings)
    assert (status.open_jobs, status.undelivered_jobs) == (3, 2)
    explained = client.explain(job.id)
    assert (explained.state, explained.open) == (JobState.ENQUEUEING, ())
    assert "is not delivered yet" in explained.waits[0]
    with pytest.raises(NotFound):
        client.explain(taken_back.id)
    deliverer.round()
    assert [one.id for one in client.jobs()] == [job.id + 1, job.id, opened.id]
    status = read_status(settings)
    assert (status.open_jobs, status.undelivered_jobs) == (3, 0)


def test_what_is_delivered_reaches_both_spaces_of_a_collection_that_moves(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine, hands: Hands
) -> None:
    """Also if the re-embedding began after the call."""
    client.enqueue([("o", "text o")], collection="other")
    client.enqueue([("z", "text z")], collection="docs")
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn)
        space = reembeddings.second_space(db, "docs")
        reembeddings.begin(db, "docs", space)
        conn.commit()
    deliverer.round()
    beside = hands.rows("SELECT n_chunks, state FROM jobs WHERE space_id = :space", space=space.id)
    assert beside == [(2, "running")]
    hands.work()
    assert hands.rows(f"SELECT count(*) FROM {space.table_name}") == [(2,)]
    assert client.job(job.id).state is JobState.COMPLETED


def test_a_commit_is_heard_of_at_once(own: sa.Engine, client: Client, db: sa.Engine, settings: Settings) -> None:
    slow = settings.model_copy(update={"poll_interval": 3600.0})
    stop = threading.Event()
    thread = Deliverer(db, slow, client._ring).start(stop)
    until(lambda: one(db, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN chunkmill_outbox%'") == 1)
    for _ in range(2):
        with connection(own) as conn:
            job = client.enqueue(CHUNKS, collection="docs", within=conn)
            conn.commit()
        until(lambda: client.job(job.id).state is not JobState.ENQUEUEING)  # noqa: B023
    stop.set()
    with db.begin() as conn:
        conn.execute(sa.text("SELECT pg_notify('chunkmill_outbox', 'nothing')"))
    thread.join()


def test_nothing_ends_the_thread_that_delivers(
    own: sa.Engine, client: Client, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [RuntimeError("a fault of ours"), OSError(24, "Too many open files")]

    def fail_twice(db: sa.Engine) -> object:
        if failures:
            raise failures.pop()
        return open_alone(db)

    monkeypatch.setattr(outbox, "open_alone", fail_twice)
    stop = threading.Event()
    thread = Deliverer(db, settings, client._ring).start(stop)
    with connection(own) as conn:
        made = [client.enqueue(CHUNKS, collection=name, within=conn) for name in ("docs", "other")]
        conn.commit()
    until(lambda: all(client.job(job.id).state is JobState.RUNNING for job in made) or not thread.is_alive())
    assert failures == []
    assert thread.is_alive()
    stop.set()
    thread.join()


def test_what_is_no_transaction_of_this_database_is_refused(
    own: sa.Engine, client: Client, db: sa.Engine, stack: object
) -> None:
    def refused(within: object, said: str) -> None:
        with pytest.raises(ChunkmillError, match=said) as caught:
            client.enqueue(CHUNKS, collection="docs", within=within)
        assert "text a" not in str(caught.value)

    refused(own, "type Engine")
    refused("postgresql://", "type str")
    with own.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        refused(conn, "commits each statement")
    with driver(own) as raw:
        raw.autocommit = True
        refused(raw, "commits each statement")
        raw.autocommit = False
        with pytest.raises(psycopg.Error):
            raw.execute("SELECT 1 / 0")
        refused(raw, "has failed")
    refused(raw, "closed")

    url = own.url.set(drivername="postgresql").render_as_string(False)

    async def asynchronous() -> None:
        async with await psycopg.AsyncConnection.connect(url) as conn:
            refused(conn, "psycopg for asyncio cannot be used.*asyncio.to_thread")

    asyncio.run(asynchronous())
    # SQLAlchemy's own need greenlet, so they are known by where they come from.
    for kind in ("AsyncSession", "async_scoped_session", "AsyncConnection"):
        refused(type(kind, (), {"__module__": "sqlalchemy.ext.asyncio.some"})(), f"type {kind};.*session.run_sync")
    with sa.create_engine("sqlite://").connect() as conn:
        refused(conn, "connection to sqlite")
    with orm.Session(own) as failed:
        with pytest.raises(sa.exc.DBAPIError):
            failed.execute(sa.text("SELECT 1 / 0"))
        refused(failed, "Roll it back")
    elsewhere = sa.create_engine(own.url.set(database="postgres"))
    with elsewhere.connect() as conn:
        refused(conn, "another database")
    elsewhere.dispose()
    assert one(db, "SELECT count(*) FROM outbox_jobs") == 0


# --- a delivery between any two statements of somebody else --------------------------------------------------------


def _with_key(client: Client, key: str, job_id: int) -> int:
    with client._db.begin() as conn:
        job = jobs.with_key(conn, key)
    assert job is not None
    return job.id


def _other_chunks(client: Client, key: str, job_id: int) -> int:
    with pytest.raises(InvalidInput, match="enqueued other chunks"):
        client.enqueue(CHUNKS[:1], collection="docs", idempotency_key=key)
    return job_id


LOOKS: dict[str, Callable[[Client, str, int], int]] = {
    "enqueue": lambda client, key, _: client.enqueue(CHUNKS, collection="docs", idempotency_key=key).id,
    "other chunks": _other_chunks,
    "with_key": _with_key,
    "job": lambda client, _, job_id: client.job(job_id).id,
    "explain": lambda client, _, job_id: client.explain(job_id).job_id,
    "retry": lambda client, _, job_id: client.retry(job_id).id,
    "attempts": lambda client, _, job_id: len(client.attempts(job_id)) + job_id,
    "cancel": lambda client, _, job_id: client.cancel(job_id).id,
    "jobs": lambda client, _, job_id: next(job.id for job in client.jobs() if job.id == job_id),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_finds_a_job_that_is_delivered_at_that_moment(
    look: str, own: sa.Engine, client: Client, deliverer: Deliverer, caplog: pytest.LogCaptureFixture
) -> None:
    client.enqueue(CHUNKS, collection="docs")
    number, seen = 0, list[str]()
    while len(seen) >= number:  # until the call has fewer statements
        number += 1
        with connection(own) as conn:
            job = client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key=f"k{number}")
            client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key=f"other{number}")
            conn.commit()
        with before_statement(client._db, number, deliverer.round) as seen:
            assert LOOKS[look](client, f"k{number}", job.id) == job.id, seen
        deliverer.round()
    assert number > 3
    assert [record.message for record in caplog.records if record.name == outbox.__name__] == []


def test_a_second_transaction_finds_the_job_of_its_key_that_is_delivered_at_that_moment(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine
) -> None:
    client.enqueue(CHUNKS, collection="docs")
    for engine in (own, client._db):
        number, seen = 0, list[str]()
        while len(seen) >= number:
            number += 1
            key = f"k{engine is own}{number}"
            with connection(own) as conn:
                job = client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key=key)
                client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key=f"other {key}")
                conn.commit()
            with connection(own) as second:
                with before_statement(engine, number, deliverer.round) as seen:
                    again = client.enqueue(CHUNKS, collection="docs", within=second, idempotency_key=key)
                assert again.id == job.id, seen
                second.commit()
            deliverer.round()
        assert number > 4
    assert one(db, "SELECT count(*) FROM outbox_jobs") == 0


@pytest.mark.parametrize("key", ["k", None])
def test_who_comes_late_to_a_delivery_does_nothing_and_says_nothing(
    key: str | None,
    own: sa.Engine,
    client: Client,
    deliverer: Deliverer,
    db: sa.Engine,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    late = Deliverer(client._db, settings, lambda _: None)
    with connection(own) as conn:
        other = client.enqueue([("z", "text z")], collection="other", within=conn, idempotency_key="other")
        conn.commit()
    number, seen = 0, list[str]()
    while len(seen) >= number:  # until the delivery has fewer statements
        number += 1
        with connection(own) as conn:
            job = client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key=key and f"{key}{number}")
            conn.commit()
        with before_statement(client._db, number, deliverer.round) as seen:
            late.round()
        deliverer.round()
        assert (client.job(job.id).state, client.job(job.id).chunks) == (JobState.RUNNING, 2), seen
    assert (client.job(other.id).state, client.job(other.id).chunks) == (JobState.RUNNING, 1)
    assert number > 10
    assert one(db, "SELECT count(*) FROM outbox_jobs") == 0
    assert [record.message for record in caplog.records if record.name.startswith("chunkmill")] == []


def test_who_comes_to_a_delivery_after_the_job_was_pruned_makes_no_empty_job_of_it(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine, settings: Settings, hands: Hands
) -> None:
    late = Deliverer(client._db, settings, lambda _: None)

    def deliver_and_prune() -> None:
        deliverer.round()
        hands.work()
        with db.begin() as conn:
            conn.execute(sa.text("UPDATE jobs SET finished_at = finished_at - interval '9 days'"))
        client.prune(1)

    for number in range(1, 8):  # until the late one has opened the job
        with connection(own) as conn:
            client.enqueue(CHUNKS, collection="docs", within=conn)
            client.enqueue([("z", "text z")], collection="other", within=conn, idempotency_key=f"k{number}")
            conn.commit()
        with before_statement(late._db, number, deliver_and_prune) as seen:
            late.round()
        assert [job.id for job in client.jobs() if job.chunks == 0] == [], seen


def test_a_delivery_waits_for_no_transaction_that_has_come_again_with_its_key(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine
) -> None:
    with db.begin() as conn:  # so that a build in which it waits does not hang
        conn.execute(sa.text(f"ALTER DATABASE {db.url.database} SET lock_timeout = '20s'"))
    db.dispose()
    with connection(own) as conn:
        jobs_of_it = [client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key=key) for key in "kl"]
        jobs_of_it.append(client.enqueue(CHUNKS, collection="other", within=conn))
        conn.commit()
    with connection(own) as open_one:
        assert client.enqueue(CHUNKS, collection="docs", within=open_one, idempotency_key="k").id == jobs_of_it[0].id
        assert deliverer.round() == 3
        open_one.rollback()
    assert {client.job(job.id).state for job in jobs_of_it} == {JobState.RUNNING}


# --- keys of jobs that ended in the outbox, or whose producer died ---------------------------------------------------


@pytest.mark.parametrize("is_delivered", [False, True])
@pytest.mark.parametrize("is_within", [False, True])
def test_the_key_of_a_job_that_was_cancelled_in_the_outbox_stays_with_it_as_that_of_any_other(
    is_within: bool, is_delivered: bool, own: sa.Engine, client: Client, deliverer: Deliverer
) -> None:
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key="k")
        kept = client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key="kept")
        conn.commit()
    cancelled = client.cancel(job.id)
    assert (cancelled.state, cancelled.idempotency_key) == (JobState.CANCELLED, "k")
    if is_delivered:
        deliverer.round()
    with connection(own) as conn:
        within = conn if is_within else None
        with pytest.raises(InvalidInput, match="cancelled before all of its chunks"):
            client.enqueue(CHUNKS, collection="docs", idempotency_key="k", within=within)
        assert client.enqueue(CHUNKS, collection="docs", idempotency_key="kept", within=within).id == kept.id
        conn.commit()
    with pytest.raises(InvalidInput, match="never enqueued to its end"):
        client.retry(job.id)
    deliverer.round()
    assert client.job(job.id).state is JobState.CANCELLED
    assert client.job(kept.id).state is JobState.RUNNING


def test_a_cancelled_job_is_taken_out_without_an_error_also_if_it_could_not_be_enqueued(
    own: sa.Engine, client: Client, deliverer: Deliverer, caplog: pytest.LogCaptureFixture
) -> None:
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn)
        kept = client.enqueue(CHUNKS, collection="other", within=conn)
        conn.commit()
    client.enqueue([("z", "text z")], collection="docs", precision="int8")
    client.cancel(job.id)
    assert deliverer.round() == 2
    assert [client.job(number).state for number in (job.id, kept.id)] == [JobState.CANCELLED, JobState.RUNNING]
    assert [record.message for record in caplog.records if record.name == outbox.__name__] == []


def test_a_job_in_the_outbox_that_is_retried_stays_as_it_is(
    own: sa.Engine, client: Client, deliverer: Deliverer
) -> None:
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn)
        kept = client.enqueue(CHUNKS, collection="docs", within=conn)
        conn.commit()
    assert client.retry(job.id) == job
    assert deliverer.round() == 2
    assert [client.job(number).state for number in (job.id, kept.id)] == [JobState.RUNNING] * 2


@pytest.mark.parametrize("is_within", [False, True])
def test_the_key_of_a_job_whose_collection_was_dropped_is_free_at_once(
    is_within: bool, own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine, hands: Hands
) -> None:
    """Also if who dropped it has died before it took the keys from the jobs."""
    keys = ["sealed", "open"]
    old = [client.enqueue(CHUNKS, collection="docs", idempotency_key=key) for key in keys]
    other = client.enqueue(CHUNKS, collection="other", idempotency_key="other")
    hands.work()
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET sealed_at = NULL, state = 'failed' WHERE id = :id"), {"id": old[1].id})
        names.drop(conn, "docs")
    with connection(own) as conn:
        within = conn if is_within else None
        new = [client.enqueue(CHUNKS, collection="docs", idempotency_key=key, within=within).id for key in keys]
        assert client.enqueue(CHUNKS, collection="other", idempotency_key="other", within=within).id == other.id
        conn.commit()
    deliverer.round()
    assert not set(new) & {job.id for job in old}
    assert [client.job(number).idempotency_key for number in new] == keys
    assert [client.job(job.id).idempotency_key for job in old] == [None, None]
    assert set(client.get("docs", ["a", "b"])) == {"a", "b"}


def test_what_a_dead_producer_left_out_is_no_failure_once_a_transaction_completes_it(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine, settings: Settings
) -> None:
    small = settings.model_copy(update={"enqueue_window": 1, "chunk_batch_size": 1})

    def die(key: str) -> int:
        def chunks() -> Iterator[tuple[str, str]]:
            yield ("a", "text a")
            raise KeyboardInterrupt

        narrow = Client(create_db(settings.require_database_url(), role="client"), Broker.connect(small), small)
        with narrow, pytest.raises(KeyboardInterrupt):
            narrow.enqueue(chunks(), collection="docs", idempotency_key=key, on_invalid="skip")
        with db.begin() as conn:
            (job_id,) = recover.fail_abandoned(conn)
        return job_id

    job_id, cancelled, untouched = die("k"), die("l"), die("m")
    assert client.job(job_id).state is JobState.FAILED
    with connection(own) as conn:
        for key, number in (("k", job_id), ("l", cancelled)):
            assert client.enqueue(CHUNKS, collection="docs", idempotency_key=key, within=conn).id == number
        conn.commit()
    assert client.job(job_id).state is JobState.ENQUEUEING
    with pytest.raises(WaitTimeout):
        client.wait(job_id, timeout=0)
    assert client.retry(job_id).state is JobState.ENQUEUEING
    assert client.cancel(cancelled).state is JobState.CANCELLED
    deliverer.round()
    assert [(client.job(number).state, client.job(number).idempotency_key) for number in (job_id, cancelled)] == [
        (JobState.RUNNING, "k"), (JobState.CANCELLED, "l"),
    ]  # fmt: skip
    assert client.job(untouched).state is JobState.FAILED


def test_a_key_that_comes_again_while_its_job_is_half_delivered_must_have_the_same_chunks(
    own: sa.Engine, client: Client, settings: Settings, db: sa.Engine
) -> None:
    narrow = settings.model_copy(update={"enqueue_window": 1, "chunk_batch_size": 1})
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="docs", within=conn, idempotency_key="k")
        conn.commit()

    class Died(BaseException):
        pass

    def die(_: sa.Connection) -> None:
        raise Died

    with pytest.raises(Died):
        Deliverer(db, narrow, die).round()
    with connection(own) as conn:
        for within in (None, conn):
            with pytest.raises(InvalidInput, match="enqueued other chunks"):
                client.enqueue([("x", "text x")], collection="docs", idempotency_key="k", within=within)
            assert client.enqueue(CHUNKS, collection="docs", idempotency_key="k", within=within).id == job.id
        conn.commit()
    assert Deliverer(db, narrow, client._ring).round() == 1
    assert client.job(job.id).chunks == 2
    assert not client.get("docs", ["x"])


def test_a_key_finds_its_job_in_the_outbox_by_every_name_of_the_collection(
    own: sa.Engine, client: Client, deliverer: Deliverer
) -> None:
    client.enqueue(CHUNKS, collection="docs")
    client.enqueue(CHUNKS, collection="other")
    client.set_alias("current", "docs")
    with connection(own) as conn:
        job = client.enqueue(CHUNKS, collection="current", within=conn, idempotency_key="k")
        conn.commit()
    with connection(own) as conn:
        for within in (None, conn):
            assert client.enqueue(CHUNKS, collection="docs", within=within, idempotency_key="k").id == job.id
            with pytest.raises(InvalidInput, match="another collection"):
                client.enqueue(CHUNKS, collection="other", within=within, idempotency_key="k")
        conn.commit()
    deliverer.round()
    assert client.job(job.id).collection == "docs"


def test_an_entry_for_an_alias_is_listed_as_one_for_its_collection(
    own: sa.Engine, client: Client, deliverer: Deliverer, db: sa.Engine
) -> None:
    """Whoever may see only that collection sees it, and nobody else does."""
    for name in ("docs", "other"):
        client.enqueue(CHUNKS, collection=name)
    client.set_alias("current", "docs")
    client.set_alias("latest", "other")
    with connection(own) as conn:
        entries = {name: client.enqueue(CHUNKS, collection=name, within=conn).id for name in ("current", "latest")}
        conn.commit()
    assert [(one.id, one.collection) for one in client.jobs(2)] == [
        (entries["latest"], "other"),
        (entries["current"], "docs"),
    ]
    assert client.job(entries["current"]).collection == "docs"
    with db.begin() as conn:
        for name, entry in (("docs", entries["current"]), ("other", entries["latest"])):
            seen = jobs.page(conn, limit=9, collections=[collections.find(conn, name).id])
            assert [one.id for one in seen if one.id in entries.values()] == [entry]
    deliverer.round()
    assert [client.job(entry).collection for entry in entries.values()] == ["docs", "other"]
