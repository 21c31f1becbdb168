"""The dead list and the report of attempts, on Postgres, through the client and through the command."""

from __future__ import annotations

import json
import os
import pty
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from chunkmill import Chunk, Client, InvalidInput, Job, JobState, NotFound
from chunkmill.cli.__main__ import cli
from chunkmill.client import Client as ClientClass
from chunkmill.db.locks import DELETE_LOCK
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.results import DeadEntry, RetriedDead, Standing
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.support import forks
from tests.support.checkout import CHECKOUT, PYTHONPATH
from tests.support.waiting import PATIENCE, Call, running, until

POISON = "a text that no wörker survives"


def ids(entries: list[DeadEntry]) -> list[int]:
    return [entry.id for entry in entries]


def failed(client: Client, hands: Hands, *texts: str, code: str = "not_finite", collection: str = "docs") -> Job:
    """A job that failed for these texts, chunks ``id-0`` and so on, beside one that is embedded."""
    items = [(f"id-{i}", text) for i, text in enumerate(texts)]
    job = client.enqueue([*items, ("well", "a harmless text")], collection=collection)
    hands.work(dead=dict.fromkeys(texts, code))
    job = client.job(job.id)
    assert (job.state, job.dead) == (JobState.FAILED, len(texts))
    return job


# Reading


def test_what_kills_workers_is_listed_with_the_deaths_and_without_its_text(client: Client, hands: Hands) -> None:
    job = client.enqueue([("well", "a harmless text"), Chunk("bad", POISON, {"lang": "en"})], collection="docs")
    assert hands.kill_with(POISON, job) == 4
    (entry,) = client.dead()
    assert (entry.job_id, entry.job_state, entry.collection, entry.chunk_id) == (job.id, JobState.FAILED, "docs", "bad")
    assert (entry.code, entry.standing, entry.why_not_retried) == ("kills_workers", Standing.MISSING, None)
    assert entry.content_hash == content_hash(POISON).hex()
    details = client.dead_chunk(entry.id)
    assert details.entry == entry
    assert (details.metadata, details.characters, details.bytes) == ({"lang": "en"}, len(POISON), len(POISON) + 1)
    # The two deaths before it stood alone were with a neighbour.
    assert [(d.worker, d.outcome, d.evidence) for d in details.deaths] == [
        ("host:3", "died", "ended by SIGSEGV"), ("host:4", "died", "ended by SIGSEGV"),
    ]  # fmt: skip
    assert details.text is None
    with_text = client.dead_chunk(entry.id, with_text=True)
    assert with_text.text == POISON
    assert POISON not in repr(with_text)


def test_the_list_is_newest_first_and_chosen_by_job_collection_and_code(client: Client, hands: Hands) -> None:
    first = failed(client, hands, "one", "two")
    second = failed(client, hands, "three", code="out_of_memory", collection="other")
    assert sorted(ids(client.dead()), reverse=True) == ids(client.dead())
    assert [e.job_id for e in client.dead()] == [second.id, first.id, first.id]
    assert ids(client.dead(limit=1)) == [client.dead()[0].id]
    assert (
        {e.job_id for e in client.dead(job_id=first.id)}
        == {e.job_id for e in client.dead(code="not_finite")}
        == {first.id}
    )
    assert [e.job_id for e in client.dead(collection="other")] == [second.id]
    assert client.dead(job_id=first.id, code="out_of_memory") == []
    assert client.dead_codes() == {"not_finite": 2, "out_of_memory": 1}
    assert client.dead_codes(collection="other") == {"out_of_memory": 1}
    for wrong in ({"job_id": 99}, {"collection": "none"}):
        with pytest.raises(NotFound):
            client.dead(**wrong)
        with pytest.raises(NotFound):
            client.dead_codes(**wrong)
    with pytest.raises(NotFound, match="no dead chunk 99"):
        client.dead_chunk(99)


# Retry


def test_retry_makes_exactly_the_dead_content_due_again_alone_and_suspect(client: Client, hands: Hands) -> None:
    job = client.enqueue([(f"id-{i}", f"text {i}") for i in range(8)] + [("bad", POISON)], collection="docs")
    hands.kill_with(POISON, job)
    counted = client.job(job.id)
    assert client.retry_dead(ids(client.dead())) == RetriedDead((job.id,), 1, 1, {})
    holding = hands.rows(
        "SELECT state, content_hashes, n_contents, deaths, attempt, max_attempts FROM chunk_batches "
        "WHERE :hash = ANY(content_hashes)",
        hash=content_hash(POISON),
    )
    assert holding == [("available", [content_hash(POISON)], 1, 2, 0, 5)]
    again = client.job(job.id)
    assert (again.state, again.dead, again.remaining, again.error) == (JobState.RUNNING, 0, 1, None)
    assert (again.contents, again.embedded) == (counted.contents, counted.embedded)  # moved, not counted twice
    hands.work()
    assert client.job(job.id).state is JobState.COMPLETED
    assert client.audit("docs").complete


def test_what_kills_again_is_buried_after_two_more_deaths(client: Client, hands: Hands) -> None:
    job = client.enqueue([("well", "a harmless text"), ("bad", POISON)], collection="docs")
    hands.kill_with(POISON, job)
    client.retry_dead(ids(client.dead()))
    assert hands.kill_with(POISON, job) == 2
    (entry,) = client.dead()
    assert (entry.code, client.job(job.id).state) == ("kills_workers", JobState.FAILED)
    assert [d.worker for d in client.dead_chunk(entry.id).deaths] == ["host:5", "host:6"]


def test_retry_by_code_leaves_all_else_as_it_is(client: Client, hands: Hands) -> None:
    first = client.enqueue([(f"id-{i}", f"text {i}") for i in range(9)], collection="docs")
    second = client.enqueue([("x", "text x"), ("y", "text y")], collection="other")
    third = client.enqueue([("z", "text z")], collection="third")
    dead = dict.fromkeys(["text 1", "text 4", "text x"], "not_finite") | {"text 7": "forward_failed"}
    hands.work(dead=dead | {"text z": "forward_failed"})
    retried = client.retry_dead(code="not_finite")
    assert (retried.jobs, retried.chunks, retried.contents) == ((first.id, second.id), 3, 3)
    available = dict(hands.rows("SELECT job_id, content_hashes FROM chunk_batches WHERE state = 'available'"))
    assert {job: set(hashes) for job, hashes in available.items()} == {
        first.id: {content_hash("text 1"), content_hash("text 4")},
        second.id: {content_hash("text x")},
    }
    assert hands.rows("SELECT DISTINCT deaths FROM chunk_batches") == [(0,)]
    assert client.job(third.id).state is JobState.FAILED
    hands.work()
    assert client.job(second.id).state is JobState.COMPLETED
    job = client.job(first.id)
    assert (job.state, job.dead, job.contents, job.embedded) == (JobState.FAILED, 1, 9, 8)


def test_many_dead_texts_are_cut_into_chunk_batches_of_the_usual_size(
    client: Client, hands: Hands, settings: Settings
) -> None:
    job = failed(client, hands, *(f"text {i}" for i in range(5)))
    small = ClientClass(client._db, client._broker, settings.model_copy(update={"chunk_batch_size": 2}))
    small.retry_dead(job_id=job.id)
    assert hands.rows("SELECT n_contents FROM chunk_batches WHERE state = 'available' ORDER BY 1") == [(1,), (2,), (2,)]


def test_chunks_that_share_a_text_are_retried_together(client: Client, hands: Hands) -> None:
    job = client.enqueue([("a", "the same"), ("b", "the same")], collection="docs")
    hands.work(dead={"the same": "not_finite"})
    first, _ = client.dead(job_id=job.id)
    assert client.retry_dead([first.id]) == RetriedDead((job.id,), 2, 1, {})
    assert client.dead() == []


def test_a_job_that_runs_takes_the_retried_text_and_goes_on(client: Client, hands: Hands, settings: Settings) -> None:
    small = ClientClass(client._db, client._broker, settings.model_copy(update={"chunk_batch_size": 1}))
    job = small.enqueue([("a", "text a"), ("b", "text b")], collection="docs")
    held = hands.claim(hands.due()[1])
    hands.work(dead={"text a": "not_finite"})
    client.retry_dead(job_id=job.id)
    assert client.job(job.id).state is JobState.RUNNING
    hands.embed(held, {})
    assert client.job(job.id).state is JobState.RUNNING
    hands.work()
    assert client.job(job.id).state is JobState.COMPLETED


def test_what_cannot_be_retried_says_why_and_changes_nothing(client: Client, hands: Hands) -> None:
    refused = client.enqueue([("empty", " "), ("well", "a text")], collection="door", on_invalid="skip")
    client.enqueue([("long", "a long text")], collection="long", on_long="reject")
    cancelled = client.enqueue([("c", "text c"), ("d", "text d")], collection="cancelled")
    unsealed = client.enqueue([("e", "text e")], collection="unsealed")
    hands.work(dead={"a long text": "too_long", "text c": "not_finite", "text e": "not_finite"})
    with hands.db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET state = 'cancelled' WHERE id = :id"), {"id": cancelled.id})
        conn.execute(sa.text("UPDATE jobs SET sealed_at = NULL WHERE id = :id"), {"id": unsealed.id})
    before = hands.ledger()
    for collection, says in {
        "door": "never stored",
        "long": "texts of this length",
        "cancelled": f"chunkmill retry {cancelled.id}",
        "unsealed": "never enqueued to its end",
    }.items():
        (entry,) = client.dead(collection=collection)
        assert says in str(entry.why_not_retried)
        with pytest.raises(InvalidInput, match=says):
            client.retry_dead([entry.id])
    with pytest.raises(InvalidInput, match="never stored"):
        client.retry_dead(job_id=refused.id)
    assert hands.ledger() == before


def test_by_job_the_others_are_passed_over_and_counted(client: Client, hands: Hands) -> None:
    job = client.enqueue([("1", ""), ("2", " "), ("3", "text 3")], collection="docs", on_invalid="skip")
    hands.work(dead={"text 3": "not_finite"})
    before = hands.ledger()
    with pytest.raises(InvalidInput, match="never stored"):
        client.retry_dead(ids(client.dead()))
    assert hands.ledger() == before
    retried = client.retry_dead(job_id=job.id)
    assert (retried.chunks, retried.contents) == (1, 1)
    ((why, n),) = retried.passed_over.items()
    assert ("never stored" in why, n) == (True, 2)
    assert [e.code for e in client.dead()] == ["empty_text", "empty_text"]
    hands.work()
    assert (client.job(job.id).state, len(client.dead())) == (JobState.COMPLETED, 2)


@pytest.mark.parametrize("call", [Client.retry_dead, Client.drop_dead], ids=["retry", "drop"])
def test_an_unknown_id_changes_nothing(client: Client, hands: Hands, call: Callable[..., object]) -> None:
    job = failed(client, hands, "text a")
    (entry,) = client.dead(job_id=job.id)
    before = hands.ledger()
    with pytest.raises(NotFound, match="no dead chunk 98, 99"):
        call(client, [entry.id, 99, 98])
    for nothing in ({"job_id": 99}, {"code": "none"}, {"ids": []}):
        with pytest.raises(NotFound):
            call(client, **nothing)
    for wrong in ({}, {"ids": [entry.id], "job_id": job.id}, {"ids": "1"}):
        with pytest.raises(InvalidInput):
            call(client, **wrong)
    assert hands.ledger() == before


# What changed since


def test_a_text_that_has_a_vector_since_is_not_embedded_again(client: Client, hands: Hands) -> None:
    job = failed(client, hands, "text a")
    client.enqueue([("elsewhere", "text a")], collection="other")
    hands.work()
    (entry,) = client.dead()
    assert entry.standing is Standing.EMBEDDED
    before = hands.rows("SELECT * FROM chunk_batches ORDER BY id")
    assert client.retry_dead([entry.id]) == RetriedDead((job.id,), 1, 0, {})
    assert client.job(job.id).state is JobState.COMPLETED
    assert hands.rows("SELECT * FROM chunk_batches ORDER BY id") == before


def test_a_drop_takes_an_entry_off_that_enqueue_refused(client: Client, hands: Hands) -> None:
    first, second = (
        client.enqueue([("empty", " "), ("well", "a text")], collection="door", on_invalid="skip") for _ in range(2)
    )
    hands.work()
    (newer, older) = client.dead(collection="door")
    assert (newer.job_id, older.job_id, newer.content_hash) == (second.id, first.id, None)
    # The text of neither is known, so that they may be about two texts: only the one that is named goes.
    assert client.drop_dead([older.id]).entries == 1
    assert [entry.id for entry in client.dead(collection="door")] == [newer.id]
    assert client.drop_dead(job_id=second.id).entries == 1


def test_a_drop_spares_a_chunk_that_has_its_vector_since(client: Client, hands: Hands) -> None:
    job = failed(client, hands, "text a")
    client.enqueue([("elsewhere", "text a")], collection="other")
    hands.work()
    dropped = client.drop_dead(job_id=job.id)
    assert (dropped.jobs, dropped.entries, dropped.chunks) == ((job.id,), 1, 0)
    assert client.job(job.id).state is JobState.COMPLETED
    assert sorted(client.vectors("docs")) == ["id-0", "well"]
    assert client.dead() == []


@pytest.mark.parametrize("since", ["replaced", "deleted"])
def test_a_stale_entry_says_so_and_its_drop_touches_no_chunk(client: Client, hands: Hands, since: str) -> None:
    job = failed(client, hands, "text a")
    if since == "replaced":
        client.enqueue([("id-0", "another text")], collection="docs")
        hands.work()
    else:
        client.delete("docs", ["id-0"])
    (entry,) = client.dead()
    assert entry.standing == since
    assert (client.dead_chunk(entry.id).metadata, client.dead_chunk(entry.id).text) == (None, None)
    with pytest.raises(InvalidInput, match=r"stale, because the chunk (has another text now|was deleted)"):
        client.retry_dead([entry.id])
    chunks = hands.rows("SELECT * FROM chunks ORDER BY chunk_id")
    assert client.drop_dead([entry.id]).chunks == 0
    assert client.dead() == []
    assert hands.rows("SELECT * FROM chunks ORDER BY chunk_id") == chunks
    assert client.job(job.id).state is JobState.COMPLETED


# Drop


def test_a_drop_takes_the_chunk_and_its_text_and_the_job_completes(client: Client, hands: Hands) -> None:
    job = failed(client, hands, "text a", "text b")
    first, second = client.dead(job_id=job.id)
    assert client.drop_dead([first.id]).chunks == 1
    again = client.job(job.id)
    assert (again.state, again.dead) == (JobState.FAILED, 1)
    assert "1 chunk cannot be embedded" in (again.error or "")
    assert client.audit("docs").missing == 1
    dropped = client.drop_dead([second.id])
    assert (dropped.jobs, dropped.entries, dropped.chunks) == ((job.id,), 1, 1)
    again = client.job(job.id)
    assert (again.state, again.dead, again.error, again.remaining) == (JobState.COMPLETED, 0, None, 0)
    assert client.audit("docs").complete
    assert hands.rows("SELECT chunk_id FROM chunks") == [("well",)]
    assert hands.rows("SELECT text FROM contents") == [("a harmless text",)]


def test_a_drop_of_a_chunk_takes_what_other_jobs_list_of_it_too(client: Client, hands: Hands) -> None:
    jobs = [failed(client, hands, "text a") for _ in range(2)]
    first, second = client.dead()
    assert (first.chunk_id, second.chunk_id) == ("id-0", "id-0")
    dropped = client.drop_dead([first.id])
    assert (dropped.jobs, dropped.entries, dropped.chunks) == (tuple(job.id for job in jobs), 2, 1)
    assert [client.job(job.id).state for job in jobs] == [JobState.COMPLETED] * 2


def test_a_drop_leaves_the_other_chunks_of_the_same_text(client: Client, hands: Hands) -> None:
    one = client.enqueue([("a", "the same")], collection="docs")
    hands.work(dead={"the same": "not_finite"})
    two = client.enqueue([("b", "the same")], collection="docs")
    hands.work(dead={"the same": "not_finite"})
    (entry,) = client.dead(job_id=one.id)
    assert entry.chunk_id == "a"
    client.drop_dead([entry.id])
    # The first job has no chunk left and does not try the text again for the sake of another job's.
    assert client.job(one.id).state is JobState.COMPLETED
    assert hands.due() == []
    assert client.job(two.id).state is JobState.FAILED
    assert [(e.job_id, e.chunk_id, e.standing) for e in client.dead()] == [(two.id, "b", Standing.MISSING)]
    assert hands.rows("SELECT text FROM contents") == [("the same",)]


def test_a_job_that_failed_for_something_else_too_stays_failed_and_a_cancelled_one_cancelled(
    client: Client, hands: Hands
) -> None:
    discarded = failed(client, hands, "text a")
    cancelled = failed(client, hands, "text b", collection="other")
    with hands.db.begin() as conn:
        conn.execute(
            sa.text("UPDATE chunk_batches SET state = 'discarded', error = 'why not' WHERE job_id = :id"),
            {"id": discarded.id},
        )
        conn.execute(sa.text("UPDATE jobs SET state = 'cancelled' WHERE id = :id"), {"id": cancelled.id})
    assert client.drop_dead(code="not_finite").jobs == (discarded.id,)
    assert client.dead() == []
    job = client.job(discarded.id)
    assert (job.state, "why not" in (job.error or "")) == (JobState.FAILED, True)
    assert client.job(cancelled.id).state is JobState.CANCELLED


# Races


@contextmanager
def waiting(db: sa.Engine, calls: list[Callable[[], object]]) -> Iterator[tuple[sa.Connection, list[object]]]:
    """Start ``calls`` when the block has its locks, in the order given, and wait until all wait for these.

    The list gets what each returned or raised once the block's transaction has ended.
    """
    results: list[object] = []

    def outcome(call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - it is what the test looks at
            return error

    started = []
    with db.begin() as conn:
        yield conn, results
        for n, call in enumerate(calls, start=1):
            started.append(Call(partial(outcome, call)))
            until(lambda n=n: _waiters(db) == n)
    results += [call.result() for call in started]


def _waiters(db: sa.Engine) -> int:
    with db.begin() as conn:
        return int(
            conn.execute(
                sa.text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND wait_event_type = 'Lock'"
                )
            ).scalar_one()
        )


@pytest.mark.parametrize("calls", [("retry", "retry"), ("retry", "drop"), ("drop", "retry"), ("drop", "drop")])
def test_of_two_at_once_one_is_told_that_it_is_gone(client: Client, hands: Hands, calls: tuple[str, str]) -> None:
    job = failed(client, hands, "text a")
    (entry,) = client.dead()
    meant = {"retry": lambda: client.retry_dead([entry.id]), "drop": lambda: client.drop_dead([entry.id])}
    with waiting(hands.db, [meant[call] for call in calls]) as (conn, results):
        conn.execute(sa.text("SELECT FROM jobs WHERE id = :id FOR NO KEY UPDATE"), {"id": job.id})
    assert [type(result) for result in results].count(NotFound) == 1, results
    assert len(hands.due()) == (1 if RetriedDead in map(type, results) else 0)
    hands.work()
    assert client.job(job.id).state is JobState.COMPLETED
    assert client.audit("docs").complete


def test_a_job_cancelled_meanwhile_is_not_taken_up(client: Client, hands: Hands) -> None:
    job = failed(client, hands, "text a")
    with waiting(hands.db, [lambda: client.retry_dead(job_id=job.id)]) as (conn, results):
        conn.execute(sa.text("UPDATE jobs SET state = 'cancelled' WHERE id = :id"), {"id": job.id})
    (refused,) = results
    assert isinstance(refused, InvalidInput)
    assert "was cancelled" in str(refused)
    assert hands.due() == []
    assert client.job(job.id).state is JobState.CANCELLED
    assert len(client.dead()) == 1


def test_a_chunk_that_an_enqueue_is_replacing_is_not_dropped(client: Client, hands: Hands) -> None:
    job = failed(client, hands, "text a")
    new = content_hash("another text")
    with waiting(hands.db, [lambda: client.drop_dead(job_id=job.id)]) as (conn, results):
        # An enqueue's transaction, half-way.
        conn.execute(sa.text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": DELETE_LOCK})
        conn.execute(sa.text("INSERT INTO contents VALUES (:h, 'another text')"), {"h": new})
        conn.execute(sa.text("UPDATE chunks SET content_hash = :h WHERE chunk_id = 'id-0'"), {"h": new})
    (dropped,) = results
    assert getattr(dropped, "chunks", dropped) == 0
    assert hands.rows("SELECT content_hash FROM chunks WHERE chunk_id = 'id-0'") == [(new,)]


# Attempts


def test_the_report_of_attempts_says_how_each_ended_and_what_it_cost(client: Client, hands: Hands) -> None:
    job = client.enqueue([(f"id-{i}", f"text {i}") for i in range(4)], collection="docs")

    def book(lease: Lease, worker: str, outcome: usage.Outcome | None = None, **counts: int) -> None:
        with hands.db.begin() as conn:
            usage.book(conn, lease, usage.Usage("local", worker, **counts), outcome)

    book(hands.claim(1, "host:1"), "host:1", contents=1, at_risk=3)
    with hands.db.begin() as conn:
        deaths.take_back_from(conn, "host:1", evidence="ended by SIGKILL")
    lease = hands.claim(1, "host:2")
    book(lease, "host:2", contents=1, recomputed=2, at_risk=2)
    with hands.db.begin() as conn:
        chunk_batches.release_all(conn, "host:2")
    assert client.attempts(job.id)[-1].outcome == "interrupted"
    lease = hands.claim(1, "host:3")
    book(lease, "host:3", usage.Outcome.FAILED)
    with hands.db.begin() as conn:
        chunk_batches.fail_if_held(conn, lease, code="worker_error", error="host:3: no disk", retryable=True)
    assert client.attempts(job.id)[-1].evidence == "host:3: no disk"
    book(hands.claim(1, "host:4"), "host:4", contents=1)
    attempts = client.attempts(job.id)
    assert [(a.attempt, a.worker, a.outcome, a.contents, a.recomputed, a.at_risk) for a in attempts] == [
        (1, "host:1", "died", 1, 0, 3),
        (2, "host:2", "superseded", 1, 2, 2),
        (3, "host:3", "failed", 0, 0, 0),
        (4, "host:4", "running", 1, 0, 0),
    ]
    assert attempts[0].evidence == "ended by SIGKILL"
    assert [a.ended_at is not None for a in attempts] == [True, False, True, False]
    assert [a.first_write_at is not None for a in attempts] == [True, True, False, True]
    assert client.attempts(client.enqueue([("x", "text x")], collection="docs").id) == []
    with pytest.raises(NotFound):
        client.attempts(99)


def test_the_failing_chunk_batch_is_the_discarded_one_or_the_first_and_no_single_death(
    client: Client, hands: Hands, settings: Settings
) -> None:
    small = ClientClass(client._db, client._broker, settings.model_copy(update={"chunk_batch_size": 1}))
    job = small.enqueue([(f"id-{i}", f"text {i}") for i in range(3)], collection="docs")

    def fail(chunk_batch_id: int, *, retryable: bool) -> None:
        lease = hands.claim(chunk_batch_id)
        with hands.db.begin() as conn:
            error = f"no {chunk_batch_id}"
            chunk_batches.fail_if_held(conn, lease, code="worker_error", error=error, retryable=retryable)

    hands.die(1)  # a spot machine went
    assert client.failing(job.id) is None
    fail(2, retryable=True)
    failing = client.failing(job.id)
    assert failing is not None
    assert (failing.id, failing.state, failing.attempt, failing.max_attempts, failing.error) == (
        2, "available", 1, 5, "no 2",
    )  # fmt: skip
    fail(3, retryable=False)
    failing = client.failing(job.id)
    assert failing is not None
    assert (failing.id, failing.state) == (3, "discarded")


# The command


@pytest.fixture
def command(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chunkmill` finds this test's servers."""
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())


def call(*arguments: str, exit_code: int = 0) -> Result:
    done = CliRunner().invoke(cli, list(arguments))
    assert done.exit_code == exit_code, done.output
    return done


def document(*arguments: str, exit_code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", exit_code=exit_code).stdout)


@pytest.mark.usefixtures("command")
def test_dead_list_and_dead_show(client: Client, hands: Hands) -> None:
    assert call("dead", "list").stdout == "No chunk is dead.\n"
    assert document("dead", "list") == {"dead": [], "codes": {}}
    items = [("well", "a harmless text"), Chunk("bad", POISON, {"lang": "en"}), ("empty", "")]
    job = client.enqueue(items, collection="docs", on_invalid="skip")
    hands.kill_with(POISON, job)
    bad, empty = client.dead()
    listed = call("dead", "list", "--job", str(job.id), "-c", "docs")
    assert bad.reason in listed.stdout
    assert [line.split()[:6] for line in listed.stdout.splitlines()[1:3]] == [
        [str(bad.id), "301", "docs", "bad", "kills_workers", "missing"],
        [str(empty.id), "301", "docs", "empty", "empty_text", "refused"],
    ]
    assert listed.stdout.endswith("\n\n1 empty_text, 1 kills_workers\n")
    assert call("dead", "list", "-n", "1").stdout.endswith("These are the newest 1 of 2. -n shows more.\n")
    told = document("dead", "list", "--code", "empty_text")
    assert [entry["chunk_id"] for entry in told["dead"]] == ["empty"]
    assert "never stored" in told["dead"][0]["why_not_retried"]
    assert call("dead", "list", "--code", "none").stdout == "No dead chunk matches.\n"

    shown = call("dead", "show", str(bad.id))
    assert all(word in shown.stdout for word in ("host:4", "ended by SIGSEGV", '{"lang": "en"}', "31 bytes"))
    assert str(bad.content_hash) in shown.stdout
    assert f"To see the text: chunkmill dead show {bad.id} --text" in shown.stderr
    assert "not stored" in call("dead", "show", str(empty.id)).stdout
    assert call("dead", "show", str(bad.id), "--text").stdout.endswith(f"\n\n{POISON}\n")
    details = document("dead", "show", str(bad.id))
    assert (details["id"], details["text"], len(details["deaths"])) == (bad.id, None, 2)
    assert document("dead", "show", str(bad.id), "--text")["text"] == POISON
    outputs = listed.output + shown.output + json.dumps(details, ensure_ascii=False)
    assert POISON not in outputs
    assert "no dead chunk 99" in call("dead", "show", "99", exit_code=1).stderr
    assert "no job 99" in call("dead", "list", "--job", "99", exit_code=1).stderr


@pytest.mark.usefixtures("command")
def test_dead_retry(client: Client, hands: Hands) -> None:
    job = client.enqueue([("bad", "text a"), ("empty", "")], collection="docs", on_invalid="skip")
    hands.work(dead={"text a": "not_finite"})
    for wrong in ([], ["1", "--job", "1"]):
        assert "by ID, or choose" in call("dead", "retry", *wrong, exit_code=2).stderr
    done = call("dead", "retry", "--job", str(job.id))
    assert done.stdout.splitlines() == [
        "1 chunk of job 301 removed from the dead list; 1 text to embed.",
        "Job 301 (docs) is running: 1 to go, 1 dead.",
    ]
    assert "1 chunk skipped: refused by enqueue" in done.stderr
    hands.work(dead={"text a": "not_finite"})
    (again,) = client.dead(code="not_finite")

    def work() -> None:
        until(lambda: bool(hands.due()))
        hands.work(dead={"text a": "out_of_memory"})

    with running(work):
        waited = document("dead", "retry", str(again.id), "--wait", exit_code=4)
    assert (waited["chunks"], waited["contents"], waited["passed_over"]) == (1, 1, {})
    assert [(after["id"], after["state"]) for after in waited["jobs"]] == [(job.id, "failed")]
    assert "no dead chunk" in call("dead", "retry", str(again.id), exit_code=1).stderr


@pytest.mark.usefixtures("command")
def test_dead_drop_needs_a_yes(client: Client, hands: Hands) -> None:
    job = failed(client, hands, "text a", "text b")
    first, _ = ids(client.dead())
    assert "pass --yes" in call("dead", "drop", str(first), exit_code=1).stderr
    assert len(client.dead()) == 2
    assert call("dead", "drop", str(first), "--yes").stdout.splitlines() == [
        "1 entry deleted from the dead list, 1 chunk from their collections.",
        "Job 301 (docs) is failed: 0 to go, 1 dead.",
    ]
    assert "no dead chunk" in call("dead", "drop", str(first), "--yes", exit_code=1).stderr
    dropped = document("dead", "drop", "--code", "not_finite", "--yes")
    assert (dropped["entries"], dropped["chunks"]) == (1, 1)
    assert [(after["id"], after["state"]) for after in dropped["jobs"]] == [(job.id, "completed")]
    assert client.dead() == []


@pytest.mark.usefixtures("command")
def test_on_a_terminal_drop_asks_and_list_cuts_the_reason(client: Client, hands: Hands) -> None:
    job = client.enqueue([("bad", POISON)], collection="docs")
    hands.kill_with(POISON, job)
    (entry,) = client.dead()
    code, seen = on_a_terminal("dead", "list")
    assert code == 0
    (line,) = [line for line in seen.splitlines() if "kills_workers  missing" in line]
    assert (len(line) <= 100, "…" in line) == (True, True), seen
    code, seen = on_a_terminal("dead", "drop", str(entry.id), answer="n")
    assert (code, "Delete 1 dead chunk" in seen, client.dead()) == (1, True, [entry])
    code, _ = on_a_terminal("dead", "drop", "--job", str(job.id), answer="y")
    assert (code, client.dead(), client.job(job.id).state) == (0, [], JobState.COMPLETED)


def on_a_terminal(*arguments: str, answer: str | None = None) -> tuple[int, str]:
    """Exit code and screen of a real process on a terminal of 100 columns; ``answer`` is typed at the question."""
    controller, terminal = pty.openpty()
    child = forks.start(
        ["chunkmill.cli", *arguments], cwd=CHECKOUT, stdin=terminal, stdout=terminal, stderr=terminal, new_session=True,
        env=os.environ | {"COLUMNS": "100", "TERM": "xterm", "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    try:
        while select.select([controller], [], [], PATIENCE)[0]:
            try:
                seen += os.read(controller, 65536)
            except OSError:  # the terminal's last user has gone
                break
            if answer and b"[y/N]" in seen:
                os.write(controller, f"{answer}\n".encode())
                answer = None
        return child.wait(PATIENCE), seen.decode()
    finally:
        os.close(controller)
        if child.poll() is None:
            child.kill()
            child.wait()


@pytest.mark.usefixtures("command")
def test_a_job_shows_its_attempts_and_what_fails_in_it(client: Client, hands: Hands) -> None:
    job = client.enqueue([("well", "a harmless text"), ("other", "another")], collection="docs")
    before = document("job", str(job.id), "--attempts")
    assert (before["attempts"], before["failing"]) == ([], None)
    assert "0 attempts, 0 deaths, 0 texts recomputed" in call("job", str(job.id), "--attempts").stdout
    hands.die(1)
    lease = hands.claim(1, "host:9")
    with hands.db.begin() as conn:
        usage.book(conn, lease, usage.Usage("local", "host:9", recomputed=2, at_risk=7), usage.Outcome.FAILED)
        chunk_batches.fail_if_held(conn, lease, code="worker_error", error="host:9: no disk", retryable=True)
    shown = call("job", str(job.id), "--attempts").stdout
    assert "failing" in shown
    assert "attempt 2 of 6 failed: host:9: no disk" in " ".join(shown.split())
    assert all(word in shown for word in ("host:1", "died: ended by SIGSEGV", "failed: host:9: no disk"))
    assert "2 attempts, 1 death, 2 texts recomputed, at most 7 at risk at a time." in shown
    told = document("job", str(job.id), "--attempts")
    assert told["attempt_totals"] == {"attempts": 2, "deaths": 1, "recomputed": 2, "most_at_risk": 7}
    assert [attempt["outcome"] for attempt in told["attempts"]] == ["died", "failed"]
    assert told["failing"]["error"] == "host:9: no disk"
    hands.embed(hands.claim(1), {})
    assert document("job", str(job.id))["failing"] is None
    assert "attempts" not in document("job", str(job.id))
