"""What each attempt did and how it ended: an account is one attempt's, and the end of another leaves it alone."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.states import Route
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.ledger.work.usage import Outcome, Usage
from tests.integration.hands import Hands


@pytest.fixture
def attempts(client: Client, hands: Hands, db: sa.Engine) -> tuple[Lease, Lease, Lease]:
    """Two attempts at one ChunkBatch, of which the first failed, and one at another. Each has an account."""
    for name in "ab":
        client.enqueue([(name, f"text {name}"), (f"{name}2", f"text {name}2")], collection="docs")
    one, other = hands.due()
    first = hands.claim(one)
    book(db, first, Outcome.FAILED, "no memory", contents=1)
    hands.fail(first)
    second, beside = hands.claim(one), hands.claim(other, "host:10")
    book(db, second), book(db, beside)
    return first, second, beside


def book(
    db: sa.Engine, lease: Lease, outcome: Outcome | None = None, evidence: str | None = None, *, contents: int = 0
) -> None:
    with db.begin() as conn:
        usage.book(conn, lease, Usage("local", "host:1", contents=contents), outcome, evidence)


def accounts(hands: Hands) -> list[tuple[Any, ...]]:
    return hands.rows(
        "SELECT outcome, evidence, contents, tokens, ended_at IS NOT NULL FROM usage ORDER BY chunk_batch_id, attempt"
    )


FAILED = ("failed", "no memory", 1, 0, True)
OPEN = (None, None, 0, 0, False)


def test_a_late_write_leaves_the_end_of_an_attempt(attempts: tuple[Lease, ...], hands: Hands, db: sa.Engine) -> None:
    """A worker that was taken for dead writes once more; its attempt has ended all the same."""
    _, second, _ = attempts
    with db.begin() as conn:
        deaths.take_back_from(conn, "host:1", evidence="ended by SIGSEGV")
    book(db, second, contents=2)
    assert accounts(hands) == [FAILED, ("died", "ended by SIGSEGV", 2, 0, True), OPEN]


def test_a_leaving_worker_ends_what_it_holds_and_no_attempt_before(
    attempts: tuple[Lease, ...], hands: Hands, db: sa.Engine
) -> None:
    with db.begin() as conn:
        usage.book_released(conn, "host:1")
        assert chunk_batches.release_all(conn, "host:1") == 1
    assert accounts(hands) == [FAILED, ("released", None, 0, 0, True), OPEN]


def test_an_attempt_that_is_closed_leaves_the_others_as_they_are(
    attempts: tuple[Lease, ...], hands: Hands, db: sa.Engine
) -> None:
    _, second, _ = attempts
    with db.begin() as conn:
        usage.close_attempt(conn, second.chunk_batch_id, second.attempt, Outcome.COMPLETED)
    assert accounts(hands) == [FAILED, ("completed", None, 0, 0, True), OPEN]


def test_what_a_provider_did_is_booked_on_the_attempts_that_sent_it(
    attempts: tuple[Lease, ...], hands: Hands, db: sa.Engine
) -> None:
    _, second, beside = attempts
    with db.begin() as conn:
        done = {(second.chunk_batch_id, second.attempt): (2, 20), (beside.chunk_batch_id, beside.attempt): (1, 7)}
        usage.add(conn, done)
    assert accounts(hands) == [FAILED, (None, None, 2, 20, False), (None, None, 1, 7, False)]


def test_a_buried_text_names_the_workers_that_died_and_no_other(client: Client, hands: Hands, db: sa.Engine) -> None:
    job = client.enqueue([("a", "text a")], collection="docs")
    (chunk_batch_id,) = hands.of_job(job.id)
    for pid in (7, 8, 9, 10):
        lease = hands.claim(chunk_batch_id, f"left:{pid}")
        book(db, lease, Outcome.RELEASED, "it left")
        with db.begin() as conn:
            assert chunk_batches.release_if_held(conn, lease)
        hands.die(chunk_batch_id)
    hands.finish(job.id)
    (dead,) = client.dead_chunks(job.id)
    assert dead.code == "kills_workers"
    assert "host:1, ended by SIGSEGV; host:2, ended by SIGSEGV; host:3" in dead.reason
    assert "left" not in dead.reason


def test_what_is_cut_up_counts_as_truncated_what_was(client: Client, hands: Hands) -> None:
    job = client.enqueue([(str(i), f"text {i}") for i in range(6)], collection="docs")
    (chunk_batch_id,) = hands.of_job(job.id)
    lease = hands.claim(chunk_batch_id)
    hands.write(lease.space_id, ["text 0", "text 1", "text 2"])
    hands.rows(
        f"UPDATE {hands.vectors_of(job.id)} SET truncated = true WHERE content_hash = :hash RETURNING 1",
        hash=content_hash("text 1"),
    )
    with hands.db.begin() as conn:
        deaths.take_back_from(conn, "host:1", evidence="ended by SIGSEGV")
    hands.die(chunk_batch_id)
    job_now = client.job(job.id)
    assert (job_now.contents, job_now.embedded, job_now.truncated, job_now.remaining) == (6, 3, 1, 3)


@pytest.mark.parametrize(("route", "priority", "rank"), [("local", "low", 9), ("openai-sync", "high", 3)])
def test_what_a_chunk_batch_is_cut_into_has_its_route_and_priority(
    client: Client, hands: Hands, db: sa.Engine, route: str, priority: str, rank: int
) -> None:
    job = client.enqueue([(str(i), f"text {i}") for i in range(3)], collection="docs", priority=priority)
    (chunk_batch_id,) = hands.of_job(job.id)
    hands.rows("UPDATE chunk_batches SET route = :route RETURNING id", route=route)
    for _ in range(2):
        with db.begin() as conn:
            chunk_batches.claim_if_due(conn, chunk_batch_id, owner="host:1", lease_seconds=60, route=Route(route))
            deaths.take_back_from(conn, "host:1", evidence="ended by SIGSEGV")
    parts = hands.rows("SELECT route, priority FROM chunk_batches WHERE id <> :id", id=chunk_batch_id)
    assert parts == [(route, rank)] * 3


def test_a_jobs_account_attempts_and_failures_are_its_own(client: Client, hands: Hands, db: sa.Engine) -> None:
    jobs = [client.enqueue([(name, f"text {name}")], collection="docs") for name in "abc"]
    leases = [hands.claim(*hands.of_job(job.id)) for job in jobs]
    for n, lease in enumerate(leases, start=1):
        with db.begin() as conn:
            usage.book(conn, lease, Usage("local", f"host:{n}", tokens=10**n, engine_seconds=n))
    hands.fail(leases[0], error="the first reason"), hands.fail(leases[1], error="the second reason", retryable=False)
    assert [(client.job(job.id).tokens, client.job(job.id).engine_seconds) for job in jobs] == [
        (10, 1.0), (100, 2.0), (1000, 3.0),
    ]  # fmt: skip
    assert [[attempt.worker for attempt in client.attempts(job.id)] for job in jobs] == [
        ["host:1"], ["host:2"], ["host:3"],
    ]  # fmt: skip
    failing = [client.failing(job.id) for job in jobs]
    assert [failure and failure.error for failure in failing] == ["the first reason", "the second reason", None]
