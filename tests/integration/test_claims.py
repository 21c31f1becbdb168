"""Who may take a ChunkBatch, and when its bell is rung again: leases, back-off, and what is taken back."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.domain.states import Route
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.dead.deaths import TakenBackCounts
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from tests.integration.hands import Hands


@pytest.fixture
def two(client: Client, hands: Hands) -> tuple[int, int]:
    """Two ChunkBatches, each of a job of its own. Both have numbers that no job has."""
    with hands.db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE chunk_batches ALTER COLUMN id RESTART WITH 101"))
    for name in "ab":
        client.enqueue([(name, f"text {name}")], collection="docs")
    first, second = hands.due()
    return first, second


def claim(db: sa.Engine, chunk_batch_id: int, owner: str = "host:1", route: Route = Route.LOCAL) -> Lease | None:
    with db.begin() as conn:
        return chunk_batches.claim_if_due(conn, chunk_batch_id, owner=owner, lease_seconds=60, route=route)


def expire(hands: Hands) -> None:
    hands.rows("UPDATE chunk_batches SET lease_until = now() - interval '1 s' WHERE state = 'running' RETURNING id")


def test_a_bell_before_its_time_finds_nothing(two: tuple[int, int], hands: Hands, db: sa.Engine) -> None:
    first, second = two
    hands.fail(hands.claim(first))
    assert claim(db, first) is None
    assert claim(db, second) is not None
    hands.rows("UPDATE chunk_batches SET not_before = now() WHERE id = :id RETURNING id", id=first)
    assert claim(db, first) is not None


def test_what_failed_is_rung_as_soon_as_it_is_due(
    two: tuple[int, int], hands: Hands, db: sa.Engine, broker: Broker, settings: Settings
) -> None:
    """Not only once its first bell counts as lost."""
    first, second = two
    patient = settings.model_copy(update={"doorbell_repair_seconds": 3600.0})
    poller = Poller(db, broker, patient)
    poller.round()
    broker.client.flushdb()  # both bells are answered
    hands.fail(hands.claim(first)), hands.claim(second)
    assert poller.round().rung == 0
    hands.rows("UPDATE chunk_batches SET not_before = now() WHERE id = :id RETURNING id", id=first)
    assert poller.round().rung == 1


def test_a_bell_of_another_route_finds_nothing(two: tuple[int, int], hands: Hands, db: sa.Engine) -> None:
    """It was rung before its ChunkBatch moved to another lane."""
    first, second = two
    hands.rows("UPDATE chunk_batches SET route = 'openai-sync' WHERE id = :id RETURNING id", id=second)
    assert claim(db, second) is None
    assert claim(db, first, route=Route.OPENAI_SYNC) is None
    assert claim(db, second, route=Route.OPENAI_SYNC) is not None
    assert claim(db, first) is not None


def test_pollers_share_what_ran_out_and_do_not_wait_for_each_other(
    two: tuple[int, int], hands: Hands, db: sa.Engine
) -> None:
    for chunk_batch_id in two:
        hands.claim(chunk_batch_id)
    expire(hands)
    with db.begin() as one, db.begin() as other:
        assert deaths.take_back_expired(one, limit=1) == TakenBackCounts(available=1)
        other.execute(sa.text("SET LOCAL lock_timeout = '5s'"))
        assert deaths.take_back_expired(other) == TakenBackCounts(available=1)
    assert hands.due() == list(two)


def test_an_attempt_that_lost_its_lease_does_not_renew_that_of_the_next(
    two: tuple[int, int], hands: Hands, db: sa.Engine
) -> None:
    first, second = two
    zombie, other = hands.claim(first), hands.claim(second)
    hands.rows("UPDATE chunk_batches SET lease_until = now() - interval '1 s' WHERE id = :id RETURNING id", id=first)
    with db.begin() as conn:
        assert deaths.take_back_expired(conn) == TakenBackCounts(available=1)
    hands.claim(first, "host:2")
    until = "SELECT lease_until FROM chunk_batches WHERE id = :id"
    before = hands.rows(until, id=first)
    with db.begin() as conn:
        assert chunk_batches.renew_if_held(conn, [zombie, other], lease_seconds=600) == {second}
    assert hands.rows(until, id=first) == before


def test_a_leaving_worker_gives_back_what_it_holds_and_nothing_else(
    two: tuple[int, int], hands: Hands, db: sa.Engine
) -> None:
    first, second = two
    hands.claim(first, "host:1"), hands.claim(second, "host:10")
    with db.begin() as conn:
        assert chunk_batches.release_all(conn, "host:1") == 1
    assert hands.rows("SELECT id, state, lease_owner FROM chunk_batches ORDER BY id") == [
        (first, "available", None), (second, "running", "host:10"),
    ]  # fmt: skip


def test_what_is_given_back_still_says_why_it_failed_before(
    two: tuple[int, int], client: Client, hands: Hands, db: sa.Engine
) -> None:
    first, _ = two
    hands.fail(hands.claim(first), error="the disk was full")
    lease = hands.claim(first)
    with db.begin() as conn:
        assert chunk_batches.release_if_held(conn, lease)
    failing = client.failing(lease.job_id)
    assert failing is not None
    assert (failing.id, failing.code, failing.error) == (first, "worker_error", "the disk was full")


def test_a_lease_is_as_long_as_was_asked_for(two: tuple[int, int], db: sa.Engine) -> None:
    """By the server's clock, which stands still in a transaction."""
    left = sa.text("SELECT extract(epoch FROM lease_until - now()) FROM chunk_batches WHERE id = :id")
    with db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, two[0], owner="host:1", lease_seconds=60)
        assert lease is not None
        assert conn.execute(left, {"id": two[0]}).scalar_one() == 60
        assert chunk_batches.renew_if_held(conn, [lease], lease_seconds=90) == {two[0]}
        assert conn.execute(left, {"id": two[0]}).scalar_one() == 90


def test_what_failed_is_due_again_after_two_seconds_and_then_after_four(
    two: tuple[int, int], hands: Hands, db: sa.Engine
) -> None:
    delays = []
    for _ in range(2):
        lease = hands.claim(two[1])
        with db.begin() as conn:
            chunk_batches.fail_if_held(conn, lease, code="x", error="y", retryable=True)
            delay = "SELECT extract(epoch FROM not_before - now()) FROM chunk_batches WHERE id = :id"
            delays.append(conn.execute(sa.text(delay), {"id": two[1]}).scalar_one())
    assert delays == [2, 4]


def test_what_is_given_back_with_a_delay_is_kept_from_others_for_so_long(
    two: tuple[int, int], hands: Hands, db: sa.Engine
) -> None:
    first, second = two
    delay = "SELECT extract(epoch FROM not_before - now()) FROM chunk_batches WHERE id = :id"
    with db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, first, owner="host:1", lease_seconds=60)
        assert lease is not None
        assert chunk_batches.release_if_held(conn, lease, delay_s=7)
        assert conn.execute(sa.text(delay), {"id": first}).scalar_one() == 7
    assert claim(db, first) is None
    assert claim(db, second) is not None
