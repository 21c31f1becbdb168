"""The producer's side against real Postgres and Redis; no worker runs here."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import redis
import sqlalchemy as sa

from chunkmill import Chunk, Client, InvalidChunk, JobState, NotFound
from chunkmill.broker import QUEUE, Broker
from chunkmill.client import Client as ClientClass
from chunkmill.errors import InvalidInput, JobCancelled, SpaceMismatch, UnknownModel, UnknownRoute
from chunkmill.ledger.jobs import recover
from chunkmill.settings import Settings
from tests.support.imports import assert_light
from tests.support.waiting import PATIENCE, running, together

Rows = Callable[[str], int]


def chunks(n: int, prefix: str = "text") -> list[Chunk]:
    return [Chunk(f"id-{i}", f"{prefix} {i}", {"n": i}) for i in range(n)]


def written(rows: Rows) -> dict[str, int]:
    return {
        table: rows(table) for table in ("jobs", "collections", "chunks", "contents", "chunk_batches", "dead_chunks")
    }


def test_an_enqueue_is_one_job_with_its_chunk_batches(client: Client, rows: Rows, broker: Broker) -> None:
    job = client.enqueue(chunks(1200), collection="docs")
    assert (job.state, job.chunks, job.contents, job.remaining) == (JobState.RUNNING, 1200, 1200, 1200)
    assert rows("chunks") == rows("contents") == 1200
    assert rows("chunk_batches") == 3  # 512 + 512 + 176
    assert sum(broker.queued_doorbells().values()) == 3
    assert client.jobs()[0] == client.job(job.id)


@pytest.mark.parametrize("length", [3, 12_000])
def test_a_bad_chunk_is_refused_before_anything_is_written(client: Client, rows: Rows, length: int) -> None:
    before = written(rows)

    def stream() -> Iterator[tuple[str, str]]:
        yield from ((f"id-{i}", f"text {i}") for i in range(length))
        yield ("bad", "a NUL \x00 at the very end")

    with pytest.raises(InvalidChunk, match=rf"chunk 'bad' at position {length}: .*NUL"):
        client.enqueue(stream(), collection="docs")
    assert written(rows) == before


def test_skipping_puts_bad_chunks_into_the_dead_list(client: Client) -> None:
    job = client.enqueue(
        [("a", "one"), ("", "two"), ("c", "three\x00"), ("d", "four"), ("e", 5)], collection="docs", on_invalid="skip"
    )
    assert (job.chunks, job.dead) == (2, 3)
    assert [(d.chunk_id, d.code) for d in job.dead_chunks] == [
        ("", "empty_id"), ("c", "nul_in_text"), ("e", "text_not_text"),
    ]  # fmt: skip
    assert "position 1" in job.dead_chunks[0].reason


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"route": "pigeon"}, UnknownRoute, "'pigeon'; it must be one of: local, openai, openai-sync, auto"),
        ({"model": "no-such-model"}, UnknownModel, "no-such-model"),
        ({"priority": "urgent"}, InvalidInput, "high, normal, low"),
        ({"on_long": "shorten"}, InvalidInput, "truncate, reject, split"),
        ({"on_invalid": "ignore"}, InvalidInput, "'raise' or 'skip'"),
        ({"collection": ""}, InvalidInput, "collection"),
        ({"idempotency_key": "\x00"}, InvalidInput, "idempotency_key"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    client: Client, rows: Rows, arguments: dict[str, str], error: type[Exception], says: str
) -> None:
    before = written(rows)
    with pytest.raises(error, match=says):
        client.enqueue(chunks(3), **{"collection": "docs", **arguments})
    assert written(rows) == before


def test_the_same_text_again_is_a_no_op_and_another_replaces(client: Client, db: sa.Engine) -> None:
    def versions() -> dict[str, str]:
        with db.begin() as conn:
            return {r.chunk_id: r.xmin for r in conn.execute(sa.text("SELECT chunk_id, xmin::text FROM chunks"))}

    client.enqueue([("a", "one"), ("b", "two")], collection="docs")
    before = versions()
    client.enqueue([("a", "one"), ("b", "zwei")], collection="docs")
    after = versions()
    assert after["a"] == before["a"]
    assert after["b"] != before["b"]
    assert client.audit("docs").chunks == 2


def test_an_unchanged_enqueue_does_not_touch_a_row(client: Client, db: sa.Engine) -> None:
    client.enqueue(chunks(50), collection="docs")
    with db.begin() as conn:
        # xmax would show a row that ON CONFLICT locked on its way to changing nothing.
        before = conn.execute(sa.text("SELECT chunk_id, xmin::text, xmax::text FROM chunks ORDER BY 1")).all()
    client.enqueue(chunks(50), collection="docs")
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT chunk_id, xmin::text, xmax::text FROM chunks ORDER BY 1")).all() == before


def test_other_metadata_alone_replaces_the_metadata(client: Client, db: sa.Engine) -> None:
    client.enqueue([Chunk("a", "one", {"v": 1})], collection="docs")
    client.enqueue([Chunk("a", "one", {"v": 2})], collection="docs")
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT metadata FROM chunks")).scalar_one() == {"v": 2}


def test_duplicate_texts_are_one_content(client: Client, rows: Rows) -> None:
    job = client.enqueue([(str(i), "the same") for i in range(100)], collection="docs")
    assert (job.chunks, job.contents, rows("contents")) == (100, 1, 1)


def test_the_same_key_is_the_same_job(client: Client, rows: Rows) -> None:
    first = client.enqueue(chunks(10), collection="docs", idempotency_key="night-1")
    second = client.enqueue(chunks(10), collection="docs", idempotency_key="night-1")
    assert second.id == first.id
    assert (rows("jobs"), second.chunks) == (1, 10)
    with pytest.raises(InvalidInput, match="belongs to job"):
        client.enqueue(chunks(10), collection="elsewhere", idempotency_key="night-1")


def test_the_same_key_from_many_threads_is_one_job(client: Client, rows: Rows) -> None:
    def enqueue() -> int:
        return client.enqueue(chunks(300), collection="docs", idempotency_key="k").id

    ids = together(*[enqueue] * 6)
    assert len(set(ids)) == 1
    assert (rows("jobs"), client.job(ids[0]).contents) == (1, 300)


def test_a_producer_that_died_half_way_is_named_and_can_go_on(
    settings: Settings, client: Client, db: sa.Engine
) -> None:
    class Killed(BaseException):
        pass

    def dies() -> Iterator[tuple[str, str]]:
        yield from ((str(i), f"text {i}") for i in range(25))
        raise Killed

    small = settings.model_copy(update={"enqueue_window": 10})
    with contextlib.closing(ClientClass(db, Broker.connect(small), small)) as producer:
        with pytest.raises(Killed):
            producer.enqueue(dies(), collection="docs", idempotency_key="k", on_invalid="skip")
        (job,) = producer.jobs()
        assert (job.state, job.chunks) == (JobState.ENQUEUEING, 20)
        with db.begin() as conn:
            assert recover.fail_abandoned(conn) == [job.id]
        failed = producer.job(job.id)
        assert failed.state is JobState.FAILED
        assert "same idempotency_key" in (failed.error or "")
        again = producer.enqueue(((str(i), f"text {i}") for i in range(30)), collection="docs", idempotency_key="k")
    assert (again.id, again.state, again.chunks, again.contents) == (job.id, JobState.RUNNING, 30, 30)


def test_a_live_producer_is_not_taken_for_dead(settings: Settings, client: Client, db: sa.Engine) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[tuple[str, str]]:
        yield from ((str(i), f"text {i}") for i in range(25))
        arrived.set()
        assert go_on.wait(PATIENCE)

    small = settings.model_copy(update={"enqueue_window": 10})
    producer = ClientClass(db, Broker.connect(small), small)
    with running(lambda: producer.enqueue(slow(), collection="docs", on_invalid="skip"), release=go_on.set):
        assert arrived.wait(PATIENCE)
        with db.begin() as conn:
            assert recover.fail_abandoned(conn) == []
    assert client.jobs()[0].state is JobState.RUNNING


def test_two_producers_with_shared_contents_do_not_deadlock(settings: Settings, db: sa.Engine) -> None:
    small = settings.model_copy(update={"enqueue_window": 50})
    client = ClientClass(db, Broker.connect(small), small)

    def produce(order: int) -> None:
        client.enqueue([(f"{i}", f"shared text {i}") for i in range(1000)][::order], collection="docs")

    together(*[partial(produce, order) for order in (1, -1, 1, -1)])
    assert client.audit("docs").chunks == 1000


def test_a_collection_keeps_its_space(client: Client) -> None:
    client.enqueue(chunks(1), collection="docs")
    with pytest.raises(SpaceMismatch, match="another collection"):
        client.enqueue(chunks(1), collection="docs", on_long="split")


def test_doorbells_hold_no_text_and_no_chunk_id_and_are_only_a_window(settings: Settings, db: sa.Engine) -> None:
    narrow = settings.model_copy(update={"doorbell_window": 3, "chunk_batch_size": 10})
    client = ClientClass(db, Broker.connect(narrow), narrow)
    client.enqueue([(f"secret-id-{i}", f"top secret text {i}") for i in range(100)], collection="docs")
    with redis.Redis.from_url(narrow.require_redis_url()) as store:
        assert sum(client._broker.queued_doorbells().values()) == 3
        held = b"".join(
            key + (store.dump(key) or b"") + b"".join(store.lrange(key, 0, -1) if store.type(key) == b"list" else [])
            for key in store.scan_iter()
        )
    assert QUEUE.encode() in held
    assert b"secret" not in held


def test_redis_down_does_not_stop_an_enqueue(settings: Settings, db: sa.Engine, rows: Rows) -> None:
    cut_off = settings.model_copy(update={"redis_url": "unix:///nonexistent/redis.sock?db=0"})
    client = ClientClass(db, Broker.connect(cut_off), cut_off)
    job = client.enqueue(chunks(10), collection="docs")
    assert (job.state, rows("chunk_batches")) == (JobState.RUNNING, 1)


def test_cancel_then_retry(client: Client, rows: Rows) -> None:
    job = client.enqueue(chunks(10), collection="docs")
    assert client.cancel(job.id).state is JobState.CANCELLED
    with pytest.raises(JobCancelled, match=f"job {job.id} was cancelled, so it is not complete"):
        client.wait(job.id, timeout=PATIENCE)
    again = client.retry(job.id)
    assert (again.state, again.remaining) == (JobState.RUNNING, 10)
    assert client.retry(job.id) == again  # it runs already


def test_unknown_names_say_what_to_do(client: Client) -> None:
    with pytest.raises(NotFound, match="there is no job 99"):
        client.job(99)
    with pytest.raises(NotFound, match="there is no collection 'nope'"):
        client.audit("nope")
    with pytest.raises(NotFound):
        client.cancel(99)


def test_an_empty_iterable_is_a_completed_job(client: Client) -> None:
    assert client.enqueue(iter(()), collection="docs").state is JobState.COMPLETED


def test_any_iterable_in_constant_memory(settings: Settings) -> None:
    """Enqueue 25,000 and 65,000 chunks in fresh processes: the peak may not follow the length."""
    script = r"""
import re, sys
from pathlib import Path
from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
settings = Settings.from_env()
client = Client(create_db(settings.database_url, role="client"), Broker.connect(settings), settings)
n = int(sys.argv[1])
job = client.enqueue(((f"{n}-{i}", f"text number {i} of {n}" + " and more" * 120) for i in range(n)), collection=str(n))
assert job.contents == n
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, str(n)], env=os.environ | env, capture_output=True, text=True, check=True
            ).stdout
        )
        for n in (25_000, 65_000)
    ]
    # 40,000 chunks more are 44 MB of text and 56 MB as Python objects; the spool holds 32 MiB at most, and is full.
    assert peaks[1] - peaks[0] < 40_000, peaks
    assert peaks[1] < 200 * 1024, peaks


def test_the_producer_side_imports_no_torch(settings: Settings) -> None:
    script = """
import sys
from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
settings = Settings.from_env()
client = Client(create_db(settings.database_url, role="client"), Broker.connect(settings), settings)
client.enqueue([("a", "text")], collection="docs")
loaded = {"torch", "transformers", "tokenizers", "safetensors"} & sys.modules.keys()
assert not loaded, loaded
"""
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    subprocess.run([sys.executable, "-c", script], env=os.environ | env, check=True)


def test_a_program_imports_celery_when_it_enqueues_and_not_before(settings: Settings, client: Client) -> None:
    """To import it takes longer than a search."""
    for name in ("docs", "other"):
        client.enqueue([("a", f"text of {name}")], collection=name)
    script = """
import sys
from chunkmill import Client
loaded = lambda: {"celery.app.base", "kombu.entity", "billiard"} & sys.modules.keys()
with Client() as client:
    first, second = client.jobs()
    assert [one.name for one in client.collections()] == ["docs", "other"]
    assert [client.audit(name).missing for name in ("docs", "other")] == [1, 1]
    assert client.lanes() and not client.dead_chunks(first.id)
    client.cancel(second.id)
    assert not loaded(), loaded()
    client.enqueue([("b", "another text")], collection="docs")
    assert loaded()
"""
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    subprocess.run([sys.executable, "-c", script], env=os.environ | env, check=True)


def test_commands_that_look_import_no_library_that_they_do_not_use(settings: Settings, client: Client) -> None:
    """To import NumPy, Redis' client and SQLAlchemy's ORM takes longer than what these commands ask Postgres."""
    for name in ("docs", "other"):
        job = client.enqueue([("a", f"text of {name}")], collection=name)
    failing = [f"job {job.id + 1}", "audit docs", "search text -c docs --timeout 1"]  # nobody embeds anything here
    commands = [
        *("jobs", f"job {job.id}", "collections", "lanes", "cost", "cache", "keys list", "dead list", "models"),
        *("chunks list docs", "golden list docs", "jobs --json", "models list", *failing, "status"),
    ]
    addresses = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    assert_light(commands, environment=os.environ | addresses, failing=failing)


def test_a_second_enqueue_of_the_window_asks_few_queries(client: Client) -> None:
    """A hot path's query count: per window of 5,000 chunks, never per chunk."""
    client.enqueue(chunks(4000), collection="docs")
    statements: list[str] = []
    listener = lambda *args: statements.append(args[2])  # noqa: E731
    sa.event.listen(client._db, "before_cursor_execute", listener)
    client.enqueue(chunks(4000), collection="docs")
    sa.event.remove(client._db, "before_cursor_execute", listener)
    assert len(statements) <= 44, "\n".join(itertools.chain(statements))
