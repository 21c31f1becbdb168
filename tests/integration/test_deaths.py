"""What the ledger makes of dead workers, on Postgres; no engine is needed for that."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.domain.states import JobState
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.dead.deaths import TakenBackCounts
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.poller.poller import Poller
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors
from tests.support.server_start import server_started
from tests.support.waiting import PATIENCE, Call, running, until

CHUNKS = [(f"id-{i}", f"text number {i}") for i in range(20)]


def claim(db: sa.Engine, chunk_batch_id: int, owner: str = "host:1") -> Lease:
    with db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner=owner, lease_seconds=60)
    assert lease is not None
    return lease


def die(db: sa.Engine, owner: str = "host:1", evidence: str = "ended by SIGSEGV") -> TakenBackCounts:
    with db.begin() as conn:
        return deaths.take_back_from(conn, owner, evidence=evidence)


def rows(db: sa.Engine, statement: str) -> list[tuple[Any, ...]]:
    with db.begin() as conn:
        return [tuple(row) for row in conn.execute(sa.text(statement))]


def write(db: sa.Engine, hashes: list[bytes], *, truncated: bool = False) -> None:
    """Vectors as an engine would have made them."""
    with db.begin() as conn:
        (space,) = registry.all_spaces(conn)
        vectors = np.ones((len(hashes), space.spec.dimensions), np.float32)
        ones = np.ones(len(hashes))
        write_vectors(
            conn, space, space.spec.fingerprint, hashes, ones.astype(np.int32), ones.astype(bool) & truncated, vectors
        )


def hashes_of(db: sa.Engine, chunk_batch_id: int) -> list[bytes]:
    ((hashes,),) = rows(db, f"SELECT content_hashes FROM chunk_batches WHERE id = {chunk_batch_id}")
    return list(hashes)


def test_a_lease_that_ran_out_is_taken_back_uncharged_and_booked_as_a_death(client: Client, db: sa.Engine) -> None:
    client.enqueue(CHUNKS, collection="docs")
    claim(db, 1)
    with db.begin() as conn:
        assert deaths.take_back_expired(conn) == TakenBackCounts()  # it is held
        conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() - interval '1 s'"))
        assert deaths.take_back_expired(conn) == TakenBackCounts(available=1)
    assert rows(db, "SELECT state, attempt, max_attempts, deaths, lease_owner, rung_at FROM chunk_batches") == [
        ("available", 1, 6, 1, None, None)
    ]
    ((worker, outcome, evidence, ended),) = rows(db, "SELECT worker, outcome, evidence, ended_at FROM usage")
    assert (worker, outcome, evidence) == ("host:1", "died", "it was silent past its lease")
    assert ended is not None


def test_of_a_dead_worker_everything_is_taken_back_at_once_and_of_others_nothing(client: Client, db: sa.Engine) -> None:
    for n in range(3):
        client.enqueue([(f"c{n}", f"text of job {n}")], collection="docs")
    claim(db, 1, "host:1"), claim(db, 2, "host:1"), claim(db, 3, "host:10")
    assert die(db, "host:1") == TakenBackCounts(available=2)
    assert rows(db, "SELECT state, lease_owner FROM chunk_batches ORDER BY id") == [
        ("available", None), ("available", None), ("running", "host:10"),
    ]  # fmt: skip
    ((error,),) = rows(db, "SELECT DISTINCT error FROM chunk_batches WHERE error IS NOT NULL")
    assert error == "worker host:1 died with it: ended by SIGSEGV"


def test_any_number_of_spot_kills_discards_nothing(client: Client, db: sa.Engine) -> None:
    """Errors use up attempts; deaths do not: every machine of a fleet may go while it holds the same ChunkBatch."""
    job = client.enqueue([("one", "a single text")], collection="docs")
    for _ in range(3):
        claim(db, 1)
        assert die(db) == TakenBackCounts(available=1)
    assert rows(db, "SELECT state, max_attempts - attempt FROM chunk_batches") == [("available", 5)]
    assert client.job(job.id).state is JobState.RUNNING


def test_after_two_deaths_it_is_cut_into_suspects_of_what_is_missing(client: Client, db: sa.Engine) -> None:
    job = client.enqueue(CHUNKS, collection="docs")
    done = hashes_of(db, 1)[:4]
    write(db, done)
    claim(db, 1)
    assert die(db) == TakenBackCounts(available=1)
    claim(db, 1)
    assert die(db) == TakenBackCounts(split=1)
    state, kept, n, embedded, error = rows(
        db, "SELECT state, content_hashes, n_contents, n_embedded, error FROM chunk_batches WHERE id = 1"
    )[0]
    assert (state, list(kept), n, embedded) == ("completed", done, 4, 4)
    assert "split into 16 ChunkBatches after 2 deaths" in error
    parts = rows(db, "SELECT state, n_contents, deaths, attempt, max_attempts FROM chunk_batches WHERE id > 1")
    assert parts == [("available", 1, 2, 0, 5)] * 16
    assert claim(db, 2).suspect
    assert not lease_of_a_new_job(client, db).suspect
    job_now = client.job(job.id)
    assert (job_now.state, job_now.contents, job_now.embedded, job_now.remaining) == (JobState.RUNNING, 20, 4, 16)


def lease_of_a_new_job(client: Client, db: sa.Engine) -> Lease:
    client.enqueue([("new", "a text of another job")], collection="docs")
    ((latest,),) = rows(db, "SELECT max(id) FROM chunk_batches")
    return claim(db, latest)


def test_what_kills_alone_is_buried_with_the_evidence_and_its_neighbours_finish(client: Client, db: sa.Engine) -> None:
    job = client.enqueue(CHUNKS[:3], collection="docs")
    for _ in range(2):
        claim(db, 1)
        taken = die(db)
    assert taken == TakenBackCounts(split=1)
    for pid in (7, 8):
        claim(db, 3, f"host:{pid}")
        taken = die(db, f"host:{pid}", f"exit {pid}")
    assert taken == TakenBackCounts(buried=1)
    for chunk_batch_id in (2, 4):
        lease = claim(db, chunk_batch_id)
        write(db, hashes_of(db, chunk_batch_id))
        with db.begin() as conn:
            assert chunk_batches.complete_if_held(conn, lease, n_embedded=1, n_truncated=0)
    with db.begin() as conn:
        (space,) = registry.all_spaces(conn)
        assert finish_if_done(conn, job.id, space) is JobState.FAILED
    job_now = client.job(job.id)
    (dead,) = job_now.dead_chunks
    assert (job_now.embedded, job_now.remaining, dead.chunk_id, dead.code) == (2, 0, "id-1", "kills_workers")
    assert "host:7, exit 7; host:8, exit 8" in dead.reason
    # Tried again it stays a suspect, with two lives more.
    assert client.retry(job.id).state is JobState.RUNNING
    claim(db, 3)
    assert die(db) == TakenBackCounts(available=1)
    lease = claim(db, 3)
    assert lease.suspect
    assert die(db) == TakenBackCounts(buried=1)


def test_a_text_that_is_to_be_refused_is_refused_by_a_part_too(client: Client, db: sa.Engine) -> None:
    """Another job cut it and wrote its vector; under `reject` that is no reason to leave it out."""
    client.enqueue(CHUNKS[:4], collection="docs", on_long="reject")
    long = hashes_of(db, 1)[0]
    write(db, [long], truncated=True)
    write(db, hashes_of(db, 1)[1:2])
    for _ in range(2):
        claim(db, 1)
        die(db)
    in_parts = [h for (hashes,) in rows(db, "SELECT content_hashes FROM chunk_batches WHERE id > 1") for h in hashes]
    assert long in in_parts
    assert len(in_parts) == 3


def test_a_deleted_chunk_is_no_suspect(client: Client, db: sa.Engine) -> None:
    client.enqueue(CHUNKS[:2], collection="docs")
    client.delete("docs", ["id-0"])
    for _ in range(3):
        claim(db, 1)
        assert die(db) == TakenBackCounts(available=1)  # a single content is left, so there is nothing to cut
    claim(db, 1)
    assert die(db) == TakenBackCounts(buried=1)


def test_the_poller_takes_back_what_ran_out(client: Client, db: sa.Engine) -> None:
    client.enqueue(CHUNKS, collection="docs")
    claim(db, 1)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() - interval '1 s'"))
    done = Poller(db, client._broker, client._settings).round()
    assert done.taken_back == TakenBackCounts(available=1)
    assert done.rung == 1


def test_an_account_is_kept_once_however_often_it_is_written(client: Client, db: sa.Engine) -> None:
    client.enqueue(CHUNKS, collection="docs")
    lease = claim(db, 1)
    account = usage.Usage("local", "host:1", contents=5, tokens=50, engine_seconds=0.5, recomputed=1, at_risk=9)
    with db.begin() as conn:
        usage.book(conn, lease, account)
        usage.book(conn, lease, account)
    assert rows(db, "SELECT contents, tokens, recomputed, at_risk, outcome, ended_at FROM usage") == [
        (5, 50, 1, 9, None, None)
    ]
    die(db)
    with db.begin() as conn:
        usage.book(conn, lease, account)  # a zombie's last write does not make it alive
    assert rows(db, "SELECT contents, outcome FROM usage") == [(5, "died")]


def test_a_completion_whose_answer_was_lost_is_found_done(client: Client, db: sa.Engine) -> None:
    client.enqueue(CHUNKS, collection="docs")
    lease = claim(db, 1)
    with db.begin() as conn:
        assert chunk_batches.complete_if_held(conn, lease, n_embedded=20, n_truncated=0)
    with db.begin() as conn:
        assert chunk_batches.complete_if_held(conn, lease, n_embedded=20, n_truncated=0)
        conn.execute(sa.text("UPDATE chunk_batches SET attempt = attempt + 1"))
        assert not chunk_batches.complete_if_held(conn, lease, n_embedded=20, n_truncated=0)


@pytest.mark.parametrize("held", [1, 2])
def test_leaving_gives_back_everything_uncharged(client: Client, db: sa.Engine, held: int) -> None:
    for n in range(2):
        client.enqueue([(f"c{n}", f"text of job {n}")], collection="docs")
    for n in range(held):
        claim(db, n + 1)
    with db.begin() as conn:
        assert chunk_batches.release_all(conn, "host:1") == held
    assert rows(db, "SELECT DISTINCT state, max_attempts - attempt, deaths FROM chunk_batches") == [("available", 5, 0)]


def test_a_zombie_cannot_complete_what_was_cut_up_meanwhile(client: Client, db: sa.Engine) -> None:
    """Its attempt is the last of a row that is completed, though not by it."""
    client.enqueue(CHUNKS, collection="docs")
    claim(db, 1)
    die(db)
    zombie = claim(db, 1)
    assert die(db) == TakenBackCounts(split=1)
    with db.begin() as conn:
        assert not chunk_batches.complete_if_held(conn, zombie, n_embedded=20, n_truncated=0)


def test_a_cancel_that_meets_a_cut_cancels_the_parts_too(client: Client, db: sa.Engine) -> None:
    job = client.enqueue(CHUNKS, collection="docs")
    claim(db, 1)
    die(db)
    claim(db, 1)
    with db.begin() as cutting:
        assert deaths.take_back_from(cutting, "host:1", evidence="x") == TakenBackCounts(split=1)
        cancel = Call(lambda: client.cancel(job.id))
        while not rows(
            db, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        ):
            assert cancel.is_alive()
    cancel.result()
    assert rows(db, "SELECT DISTINCT state FROM chunk_batches WHERE id > 1") == [("cancelled",)]


def test_nothing_of_a_cancelled_job_is_claimed(client: Client, db: sa.Engine) -> None:
    client.enqueue(CHUNKS, collection="docs")
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET state = 'cancelled'"))
        assert chunk_batches.claim_if_due(conn, 1, owner="w", lease_seconds=60) is None


def test_a_heartbeat_does_not_wait_for_a_row_that_another_has_locked(client: Client, db: sa.Engine) -> None:
    """A cancel of a large job holds rows for long; the other leases of the process go on, and none counts as lost."""
    for n in range(2):
        client.enqueue([(f"c{n}", f"text of job {n}")], collection="docs")
    leases = [claim(db, 1), claim(db, 2)]
    before = dict(rows(db, "SELECT id, lease_until FROM chunk_batches"))
    with db.begin() as other:
        other.execute(sa.text("SELECT FROM chunk_batches WHERE id = 1 FOR UPDATE"))
        with db.begin() as conn:
            conn.execute(sa.text(f"SET LOCAL lock_timeout = '{PATIENCE:g}s'"))
            assert chunk_batches.renew_if_held(conn, leases, lease_seconds=600) == {1, 2}
    after = dict(rows(db, "SELECT id, lease_until FROM chunk_batches"))
    assert after[1] == before[1]
    assert after[2] > before[2]


def test_after_an_outage_live_workers_come_before_the_poller(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody's lease ran out while nobody could renew; that is no death."""
    client.enqueue(CHUNKS, collection="docs")
    claim(db, 1)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() - interval '1 s'"))
    server_started(db, "1 day")
    poller = Poller(db, client._broker, client._settings.model_copy(update={"lease_seconds": 600.0}))
    stop, real = threading.Event(), deaths.take_back_expired
    monkeypatch.setattr(deaths, "take_back_expired", lambda conn: _away())
    with running(lambda: poller.run(stop), release=stop.set):
        until(lambda: poller._away is not None)
        monkeypatch.setattr(deaths, "take_back_expired", real)
        until(lambda: poller._away is None)
    assert rows(db, "SELECT state, deaths FROM chunk_batches") == [("running", 0)]


def _away() -> TakenBackCounts:
    raise psycopg.OperationalError("the server closed the connection")
