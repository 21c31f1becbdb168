"""ChunkBatches that ProviderBatches carry: what became of a content counts for its own job and attempt alone."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.spaces import OnLong
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_work
from chunkmill.ledger.provider.provider_work import WaitingChunkBatch
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.support.paid_ledger import SMALL, add_inputs, add_provider_batch, register


@pytest.fixture
def small(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings)


def rows_of(conn: sa.Connection, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in conn.execute(sa.text(query), parameters)]


def one_of(conn: sa.Connection, query: str, **parameters: Any) -> Any:
    return conn.execute(sa.text(query), parameters).scalar_one()


def enqueue(client: Client, *texts: str, collection: str, **more: Any) -> int:
    """The id of a new job's one ChunkBatch."""
    chunks = [(f"{collection}-{i}", text) for i, text in enumerate(texts)]
    job = client.enqueue(chunks, **{"collection": collection, "model": SMALL, "route": "openai", **more})
    with client._db.begin() as conn:
        return int(one_of(conn, "SELECT id FROM chunk_batches WHERE job_id = :id", id=job.id))


def waiting(conn: sa.Connection, chunk_batch: int) -> WaitingChunkBatch:
    row = conn.execute(
        sa.text("SELECT b.*, j.collection_id FROM chunk_batches b JOIN jobs j ON j.id = b.job_id WHERE b.id = :id"),
        {"id": chunk_batch},
    ).one()
    return WaitingChunkBatch(
        row.id, row.job_id, row.space_id, row.priority, row.attempt, row.max_attempts, tuple(row.content_hashes),
        OnLong.TRUNCATE, row.collection_id,
    )  # fmt: skip


def begin(conn: sa.Connection, chunk_batch: int, *batches: int) -> Lease:
    """Lease a ChunkBatch to ProviderBatches, for which it waits from now on."""
    step = provider_batches.claim_if_due(conn, batches[0], owner="w", lease_seconds=60, server="s")
    assert step is not None
    provider_batches.release(conn, step, delay_s=0)
    lease = provider_work.begin(conn, waiting(conn, chunk_batch), step)
    provider_work.join(conn, lease, batches)
    return lease


def close(conn: sa.Connection, *batches: int) -> None:
    conn.execute(
        sa.text("UPDATE provider_batches SET state = 'closed', closed_at = now() WHERE id = ANY(:ids)"),
        {"ids": list(batches)},
    )


def hash_of(conn: sa.Connection, text: str) -> bytes:
    content_hash: bytes = one_of(conn, "SELECT content_hash FROM contents WHERE text = :text", text=text)
    return content_hash


def bury(conn: sa.Connection, job: int, text: str) -> None:
    """The text is dead in the job, which has it in a chunk."""
    conn.execute(
        sa.text(
            "INSERT INTO dead_chunks (job_id, chunk_id, content_hash, code, reason) "
            "SELECT j.id, c.chunk_id, c.content_hash, 'refused', 'why' FROM jobs j "
            "JOIN chunks c ON c.collection_id = j.collection_id JOIN contents t ON t.content_hash = c.content_hash "
            "WHERE j.id = :job AND t.text = :text"
        ),
        {"job": job, "text": text},
    )


ERRORS = "SELECT id, error_code, error FROM chunk_batches ORDER BY id"


def test_a_failure_is_charged_to_the_attempt_that_had_it(client: Client, db: sa.Engine, small: registry.Space) -> None:
    """A job may be cancelled and retried while its contents are at the provider: a later attempt is under way when the
    failure of the earlier one comes back."""
    one, other, ended = (enqueue(client, name, collection=name) for name in ("one", "other", "ended"))
    with db.begin() as conn:
        batch = add_provider_batch(conn, small)
        first, another, over = (begin(conn, chunk_batch, batch) for chunk_batch in (one, other, ended))
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'available' WHERE id = :id"), {"id": one})
        second = begin(conn, one, batch)
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'cancelled' WHERE id = :id"), {"id": ended})
        failures = {
            (lease.chunk_batch_id, lease.attempt): (f"code_{n}", f"reason {n}")
            for n, lease in enumerate((first, another, over))
        }

        provider_work.charge_failure(conn, failures)

        assert rows_of(conn, ERRORS) == [(one, None, None), (other, "code_1", "reason 1"), (ended, None, None)]
        provider_work.charge_failure(conn, {(one, second.attempt): ("code_2", "reason 2")})
        assert rows_of(conn, ERRORS)[0] == (one, "code_2", "reason 2")


def test_a_new_attempt_does_not_inherit_the_failure_of_the_one_before(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    one = enqueue(client, "text", collection="docs")
    charged = "SELECT attempt - max_attempts FROM chunk_batches"
    with db.begin() as conn:
        batch = add_provider_batch(conn, small)
        at_first = one_of(conn, charged)
        begin(conn, one, batch)
        provider_work.charge_failure(conn, {(one, 1): ("server_error", "Sorry.")})
        close(conn, batch)
        assert provider_work.settle(conn, small, [one])
        assert one_of(conn, charged) == at_first + 1
        conn.execute(sa.text("UPDATE chunk_batches SET not_before = now()"))

        second = add_provider_batch(conn, small)  # it expires: at no cost
        begin(conn, one, second)
        close(conn, second)
        assert provider_work.settle(conn, small, [one])

        assert one_of(conn, charged) == at_first + 1
        outcomes = rows_of(conn, "SELECT attempt, outcome FROM usage ORDER BY attempt")
        assert outcomes == [(1, "failed"), (2, "released")]


def test_what_waits_for_a_provider_batch_is_found_job_by_job(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    """What another lane, a bell or a later moment has is left alone, and so is another space."""
    low, plain, high = (
        enqueue(client, f"{name} a", f"{name} b", collection=name, **more)
        for name, more in (("low", {"priority": "low"}), ("plain", {"route": "openai-sync"}), ("high", {}))
    )
    enqueue(client, "text", collection="other", dimensions=256)
    with db.begin() as conn:
        jobs = provider_work.open_jobs(conn, small)
        assert [job.id for job in jobs] == [waiting(conn, high).job_id, waiting(conn, low).job_id]

        def taken() -> list[list[int]]:
            return [
                [chunk_batch.id for chunk_batch in provider_work.take_waiting(conn, small, job, limit=8)]
                for job in jobs
            ]

        assert taken() == [[high], [low]]
        provider_work.split(conn, waiting(conn, high), 1)
        rest = one_of(conn, "SELECT max(id) FROM chunk_batches")
        assert taken() == [[high, rest], [low]]
        parts = [waiting(conn, chunk_batch).hashes for chunk_batch in (high, rest)]
        assert sorted(parts) == sorted((hash_of(conn, f"high {name}"),) for name in ("a", "b"))
        provider_work.postpone(conn, waiting(conn, high), delay_s=60)
        conn.execute(sa.text("UPDATE chunk_batches SET rung_at = now() WHERE id = :id"), {"id": low})
        assert taken() == [[rest], []]
        assert plain not in (high, low, rest)


def test_a_content_that_is_dead_in_another_job_is_sent_for_this_one(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    refused, own = (enqueue(client, "shared", name, collection=name) for name in ("refused", "own"))
    with db.begin() as conn:
        bury(conn, waiting(conn, refused).job_id, "shared")
        bury(conn, waiting(conn, own).job_id, "own")

        missing = [
            provider_work.missing_texts(conn, small, waiting(conn, chunk_batch)) for chunk_batch in (refused, own)
        ]
        sent = [set(texts.values()) for texts, _ in missing]
        assert sent == [{"refused"}, {"shared"}]


def test_a_content_that_is_dead_in_another_job_is_not_settled_for_this_one(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    refused, own = (enqueue(client, "shared", collection=name) for name in ("refused", "own"))
    with db.begin() as conn:
        batch = add_provider_batch(conn, small)
        for chunk_batch in (refused, own):
            begin(conn, chunk_batch, batch)
        bury(conn, waiting(conn, refused).job_id, "shared")
        close(conn, batch)

        provider_work.settle(conn, small, [refused, own])

        assert rows_of(conn, "SELECT state FROM chunk_batches ORDER BY id") == [("completed",), ("available",)]


def test_a_chunk_batch_is_settled_once_all_its_own_provider_batches_are_through(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    both, second_only, neither = (enqueue(client, name, collection=name) for name in ("both", "second", "neither"))
    with db.begin() as conn:
        first, second, others = (add_provider_batch(conn, small) for _ in range(3))
        begin(conn, both, first, second)
        begin(conn, second_only, second)
        begin(conn, neither, others)

        def ready() -> list[int]:
            ready = [chunk_batch for _, chunk_batch in provider_work.ready_to_settle(conn, limit=10)]
            settled = "SELECT count(*) FROM chunk_batches WHERE state <> 'running'"
            before = one_of(conn, settled)
            conn.execute(sa.text("SAVEPOINT looked"))
            provider_work.settle(conn, small, [both, second_only, neither])
            assert one_of(conn, settled) - before == len(ready)
            conn.execute(sa.text("ROLLBACK TO SAVEPOINT looked"))
            return ready

        assert ready() == []
        close(conn, first)
        assert ready() == []
        conn.execute(sa.text("UPDATE provider_batches SET state = 'cleaning' WHERE id = :id"), {"id": second})
        assert ready() == [both, second_only]
        close(conn, second, others)
        assert ready() == [both, second_only, neither]


def test_a_batch_that_is_given_up_discards_only_what_waits_for_it(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    """A member may be with a worker by now, or over."""
    given_up, other, with_a_worker, over = (
        enqueue(client, name, collection=name) for name in ("given-up", "other", "worker", "over")
    )
    with db.begin() as conn:
        batch, another = (add_provider_batch(conn, small) for _ in range(2))
        for chunk_batch in (given_up, with_a_worker, over):
            begin(conn, chunk_batch, batch)
        begin(conn, other, another)
        conn.execute(sa.text("UPDATE chunk_batches SET lease_until = now() WHERE id = :id"), {"id": with_a_worker})
        conn.execute(sa.text("UPDATE chunk_batches SET state = 'cancelled' WHERE id = :id"), {"id": over})

        provider_work.discard(conn, provider_work.members(conn, batch), code="model_not_found", reason="No such model.")

        assert rows_of(conn, "SELECT state, error_code FROM chunk_batches ORDER BY id") == [
            ("discarded", "model_not_found"), ("running", None), ("running", None), ("cancelled", None),
        ]  # fmt: skip
        ended = "SELECT chunk_batch_id, outcome FROM usage WHERE outcome IS NOT NULL"
        assert rows_of(conn, ended) == [(given_up, "failed")]


def test_contents_are_dead_in_the_jobs_that_brought_them(client: Client, db: sa.Engine, small: registry.Space) -> None:
    one, other = (enqueue(client, "shared", name, collection=name) for name in ("one", "other"))
    with db.begin() as conn:
        batch = add_provider_batch(conn, small)
        jobs = {}
        for chunk_batch, texts in ((one, ("shared", "one")), (other, ("other",))):
            lease = begin(conn, chunk_batch, batch)
            jobs[chunk_batch] = lease.job_id
            hashes = [hash_of(conn, text) for text in texts]
            carrier = {"chunk_batch_id": lease.chunk_batch_id, "attempt": lease.attempt, "job_id": lease.job_id}
            add_inputs(conn, small, batch, hashes, **carrier)
        in_flight = provider_inputs.remove_all(conn, batch)

        provider_work.bury_in_flight(conn, [(content, "refused", "No such text.") for content in in_flight])

        dead = rows_of(conn, "SELECT job_id, chunk_id FROM dead_chunks ORDER BY 1, 2")
        assert dead == [(jobs[one], "one-0"), (jobs[one], "one-1"), (jobs[other], "other-1")]
