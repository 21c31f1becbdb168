"""Cancel of a job of any size: in one moment for what runs, in slices for the rest, and never half for good."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.domain.states import JobState
from chunkmill.ledger.jobs import cancel, recover
from chunkmill.ledger.jobs.jobs import CANCELLED_CHANNEL
from chunkmill.ledger.work import chunk_batches
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.support.waiting import PATIENCE, Call, until

MANY = 4 * cancel.SLICE + 2


def states(db: sa.Engine) -> dict[str, int]:
    with db.begin() as conn:
        counts = conn.execute(sa.text("SELECT state, count(*) FROM chunk_batches GROUP BY state")).all()
    return {row.state: row.count for row in counts}


def grow(db: sa.Engine, n: int) -> None:
    """``n`` ChunkBatches in all: copies of the one that job 1 has. Two are running."""
    columns = "job_id, space_id, route, priority, content_hashes, n_contents, max_attempts"
    with db.begin() as conn:
        conn.execute(
            sa.text(
                f"INSERT INTO chunk_batches ({columns}, state) SELECT {columns}, 'available' FROM chunk_batches, "
                "generate_series(2, :n)"
            ),
            {"n": n},
        )
    for chunk_batch_id in (1, n):
        claim(db, chunk_batch_id)


def claim(db: sa.Engine, chunk_batch_id: int) -> chunk_batches.Lease:
    with db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner="host:1", lease_seconds=600)
    assert lease is not None
    return lease


class Died(Exception):
    pass


def died(*_: Any) -> int:
    raise Died


@pytest.fixture
def half_done(client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> int:
    """A job whose cancel died after its first slice: 10 of 25 ChunkBatches are cancelled beside the two that ran."""
    monkeypatch.setattr(cancel, "SLICE", 10)
    job = client.enqueue([("c", "a text")], collection="docs")
    grow(db, 27)
    real = cancel.cancel_some
    slices = iter([real])

    def some(conn: sa.Connection, job_id: int) -> int:
        return next(slices, died)(conn, job_id)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(cancel, "cancel_some", some)
        client.cancel(job.id)
    assert states(db) == {"cancelled": 12, "available": 15}
    assert client.job(job.id).state is JobState.CANCELLED
    return job.id


def test_a_large_job_is_cancelled_in_slices_and_what_runs_first(client: Client, db: sa.Engine) -> None:
    job = client.enqueue([("c", "a text")], collection="docs")
    grow(db, MANY)
    seen: list[dict[str, int]] = []

    @sa.event.listens_for(client._db, "checkin")  # a transaction is over, and committed
    def look(*_: object) -> None:
        seen.append(states(db))

    assert client.cancel(job.id).state is JobState.CANCELLED
    assert states(db) == {"cancelled": MANY}
    steps = [event["cancelled"] for event in seen if "cancelled" in event]
    assert steps[0] == 2  # those that ran, before any other
    assert "running" not in seen[1]
    grown = [after - before for before, after in itertools.pairwise(steps)]
    assert max(grown) <= cancel.SLICE
    assert sum(grown) == MANY - 2


def test_a_poller_ends_a_cancel_whose_client_died(
    client: Client, db: sa.Engine, broker: Broker, settings: Settings, half_done: int
) -> None:
    poller = Poller(db, broker, settings)
    poller.round()
    assert states(db) == {"cancelled": 22, "available": 5}
    poller.round()
    assert states(db) == {"cancelled": 27}
    with broker.client.pipeline() as pipe:
        pipe.flushdb().execute()
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = rung_at - interval '1 h'"))
    assert poller.round().rung == 0


def test_a_poller_leaves_other_jobs_alone(
    client: Client, db: sa.Engine, broker: Broker, settings: Settings, half_done: int
) -> None:
    other = client.enqueue([("d", "another text")], collection="docs")
    poller = Poller(db, broker, settings)
    for _ in range(4):
        poller.round()
    assert states(db) == {"cancelled": 27, "available": 1}
    assert client.job(other.id).state is JobState.RUNNING


def test_the_same_cancel_again_goes_on(client: Client, db: sa.Engine, half_done: int) -> None:
    client.cancel(half_done)
    assert states(db) == {"cancelled": 27}


def test_a_retry_of_a_cancel_that_is_half_done_takes_up_all_of_it(
    client: Client, db: sa.Engine, broker: Broker, settings: Settings, half_done: int
) -> None:
    with db.begin() as conn:  # one of those that were not come to has failed four times
        conn.execute(
            sa.text(
                "UPDATE chunk_batches SET attempt = 4, not_before = now() + interval '1 h', error_code = 'x' "
                "WHERE id = (SELECT max(id) FROM chunk_batches WHERE state = 'available')"
            )
        )
    assert client.retry(half_done).state is JobState.RUNNING
    Poller(db, broker, settings).round()
    assert states(db) == {"available": 27}
    with db.begin() as conn:
        assert conn.execute(
            sa.text("SELECT min(max_attempts - attempt), bool_and(not_before <= now()) FROM chunk_batches")
        ).one() == (5, True)


def test_a_slice_and_a_retry_do_not_mix(client: Client, db: sa.Engine, half_done: int) -> None:
    """A running job must have nothing that is cancelled: it would complete without it."""
    with db.begin() as conn:
        assert cancel.cancel_some(conn, half_done) == 10
        retry = Call(lambda: client.retry(half_done))
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        while not conn.execute(sa.text(waiting)).all():
            assert retry.is_alive()
            conn.execute(sa.text("SELECT pg_stat_clear_snapshot()"))
    retry.result()
    assert states(db) == {"available": 27}
    with db.begin() as conn:
        assert cancel.cancel_some(conn, half_done) == 0
        assert cancel.cancel_some_left_behind(conn) == 0


def test_a_claim_that_had_begun_when_the_job_was_cancelled_is_cancelled_too(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.enqueue([("c", "a text")], collection="docs")
    with db.begin() as claiming:
        lease = chunk_batches.claim_if_due(claiming, 1, owner="host:1", lease_seconds=600)
        assert lease is not None
        cancelling = Call(lambda: client.cancel(job.id))
        while client.job(job.id).state is not JobState.CANCELLED:
            assert cancelling.is_alive()
    cancelling.result()
    assert states(db) == {"cancelled": 1}
    with db.begin() as conn:
        assert chunk_batches.renew_if_held(conn, [lease], lease_seconds=600) == set()


def test_a_cancel_outlives_a_deadlock(client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    job = client.enqueue([("c", "a text")], collection="docs")
    real, failures = cancel.cancel_some, iter([1, 2])

    def some(conn: sa.Connection, job_id: int) -> int:
        if next(failures, None):
            conn.execute(sa.text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40P01'; END $$"))
        return real(conn, job_id)

    monkeypatch.setattr(cancel, "cancel_some", some)
    assert client.cancel(job.id).state is JobState.CANCELLED
    assert states(db) == {"cancelled": 1}


def test_a_claim_that_met_a_cancel_whose_client_died_is_cancelled_by_a_poller_and_hears_of_it(
    client: Client, db: sa.Engine, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its claim was committed the job was cancelled already, and whoever was to cancel the rest is dead."""
    job = client.enqueue([("c", "a text")], collection="docs")
    client.enqueue([("d", "another text")], collection="docs")
    with ThreadPoolExecutor(1) as threads, monkeypatch.context() as patch:
        patch.setattr(cancel, "cancel_some", died)
        with db.begin() as claiming:
            assert chunk_batches.claim_if_due(claiming, 1, owner="host:1", lease_seconds=600) is not None
            cancelling = threads.submit(client.cancel, job.id)
            until(lambda: client.job(job.id).state is JobState.CANCELLED)
        with pytest.raises(Died):
            cancelling.result(PATIENCE)
    assert states(db) == {"running": 1, "available": 1}
    with db.connect() as listening:
        listening.execution_options(isolation_level="AUTOCOMMIT").execute(sa.text(f"LISTEN {CANCELLED_CHANNEL}"))
        Poller(db, broker, settings).round()
        heard = listening.connection.driver_connection.notifies(timeout=PATIENCE, stop_after=1)
        assert [notice.payload for notice in heard] == [str(job.id)]
        listening.invalidate()
    assert states(db) == {"cancelled": 1, "available": 1}


def test_a_cancel_of_a_job_that_has_failed_leaves_what_runs(client: Client, db: sa.Engine, hands: Hands) -> None:
    """It was named abandoned while workers were in it. What they finish is kept, and the job says why it failed."""
    job = client.enqueue([("c", "a text")], collection="docs")
    other = client.enqueue([("d", "another text")], collection="docs")
    leases = [hands.claim(*hands.of_job(open_job.id)) for open_job in (job, other)]
    with db.begin() as conn:  # as while its producer was still at it; by now that is gone
        conn.execute(sa.text("UPDATE jobs SET state = 'enqueueing', sealed_at = NULL WHERE id = :id"), {"id": job.id})
        assert recover.fail_abandoned(conn) == [job.id]
    cancelled = client.cancel(job.id)
    assert (cancelled.state, "the producer stopped" in (cancelled.error or "")) == (JobState.FAILED, True)
    assert states(db) == {"running": 2}
    for lease in leases:
        hands.embed(lease, {})
    assert (client.job(job.id).embedded, client.job(other.id).state) == (1, JobState.COMPLETED)
