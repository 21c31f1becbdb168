"""The leases that a worker holds, and when it renews them."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.errors import LeaseLost
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.process.lease import LeaseKeeper


def claim(db: sa.Engine, chunk_batch_id: int) -> Lease:
    with db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner="test-worker", lease_seconds=1)
    assert lease is not None
    return lease


def takes_back(db: sa.Engine, chunk_batch_id: int) -> None:
    """As if its worker were dead."""
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "UPDATE chunk_batches SET state = 'available', lease_owner = NULL, lease_until = NULL, "
                "not_before = now() WHERE id = :id"
            ),
            {"id": chunk_batch_id},
        )


def is_renewed(db: sa.Engine, chunk_batch_id: int) -> bool:
    query = "SELECT lease_until > now() + interval '2 s' FROM chunk_batches WHERE id = :id"
    with db.begin() as conn:
        return bool(conn.execute(sa.text(query), {"id": chunk_batch_id}).scalar_one())


@pytest.fixture
def two_jobs(client: Client) -> None:
    for name in ("one", "other"):
        client.enqueue([("a", f"a text of {name}")], collection=name)


@pytest.mark.usefixtures("two_jobs")
def test_a_lease_that_is_lost_is_lost_alone(context: WorkerContext, db: sa.Engine) -> None:
    with context.leases.holding(claim(db, 1)) as lost, context.leases.holding(claim(db, 2)) as held:
        takes_back(db, 1)
        context.leases.renew()
        with pytest.raises(LeaseLost, match="ChunkBatch 1"):
            lost.check()
        held.check()
        assert is_renewed(db, 2)


@pytest.mark.usefixtures("two_jobs")
def test_the_end_of_an_attempt_that_lost_its_lease_leaves_the_next_ones_renewed(
    context: WorkerContext, db: sa.Engine
) -> None:
    """The same worker may claim a ChunkBatch again that it lost, while the thread of the first attempt still runs."""
    with ExitStack() as first, ExitStack() as second:
        lost = first.enter_context(context.leases.holding(claim(db, 1)))
        takes_back(db, 1)
        context.leases.renew()
        held = second.enter_context(context.leases.holding(claim(db, 1)))
        assert (lost.lost.is_set(), held.lost.is_set()) == (True, False)
        first.close()
        assert context.leases.n_held == 1
        context.leases.renew()
        held.check()
        assert is_renewed(db, 1)


class Pauses:
    """In the place of the event that ends the keeper: notes the pauses, and lets none of them pass."""

    def __init__(self, most: int) -> None:
        self.taken: list[float] = []
        self._most = most

    def wait(self, seconds: float) -> bool:
        self.taken.append(seconds)
        return len(self.taken) > self._most


def test_after_a_renewal_that_failed_the_next_is_not_a_third_of_the_lease_away(
    db: sa.Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Postgres may be back before the lease is over. After a good renewal, the pause is the usual one again."""
    keeper = LeaseKeeper(db, 90)
    keeper._stop = pauses = Pauses(6)  # type: ignore[assignment]
    outcomes = iter([True, False, False, True, True, False])

    def renew() -> None:
        if not next(outcomes):
            raise psycopg.OperationalError("the server closed the connection unexpectedly")

    monkeypatch.setattr(keeper, "renew", renew)
    with caplog.at_level(logging.WARNING):
        keeper._run()

    assert pauses.taken == [30, 30, 3, 3, 30, 30, 3]
    assert len(caplog.records) == 2, "each outage is told once"
