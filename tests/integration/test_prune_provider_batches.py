"""Which ProviderBatches, and which jobs with a part in one, are pruned, whatever else is at a provider."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.retention import Pruned
from chunkmill.ledger.provider import provider_room
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.support.paid_ledger import SMALL, add_inputs, add_provider_batch, register


@pytest.fixture
def small(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings)


def ago(span: str) -> Any:
    return sa.text(f"now() - interval '{span}'")


def closed(conn: sa.Connection, space: registry.Space, span: str, *, made: str | None = None) -> int:
    """A ProviderBatch that was closed so long ago; ``made``: it was made at the provider that long ago."""
    made_at = None if made is None else ago(made)
    return add_provider_batch(conn, space, "closed", closed_at=ago(span), creating_since=made_at)


def left(db: sa.Engine) -> set[int]:
    with db.begin() as conn:
        return set(conn.execute(sa.text("SELECT id FROM provider_batches")).scalars())


def gone(pruned: Pruned) -> dict[str, int]:
    return {table: amount.rows for table, amount in pruned.amounts.items() if amount.rows}


def prune(client: Client, days: float) -> dict[str, int]:
    """What went, which is what a dry run said."""
    planned = gone(client.prune(days, dry_run=True))
    assert gone(client.prune(days)) == planned
    return planned


def test_what_counts_for_the_hour_stays_however_young_may_be_pruned(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    """Without the last hour's ProviderBatches more would be made than OPENAI_MAX_BATCHES_PER_HOUR allows."""
    with db.begin() as conn:
        kept = {closed(conn, small, "1 second", made="59 minutes"), closed(conn, small, "30 minutes", made="2 hours"),
                closed(conn, small, "40 minutes", made="50 minutes")}  # fmt: skip
        closed(conn, small, "61 minutes", made="2 hours")
        closed(conn, small, "2 hours")  # never made: its contents were given back
        assert provider_room.enqueued(conn).made_in_an_hour == 2

    assert prune(client, 0) == {"provider_batches": 2}

    assert left(db) == kept
    with db.begin() as conn:
        assert provider_room.enqueued(conn).made_in_an_hour == 2


def test_a_closed_batch_goes_by_its_own_age_and_inputs(client: Client, db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        young, in_flight = closed(conn, small, "6 days"), closed(conn, small, "40 days")
        old = closed(conn, small, "8 days")
        not_closed = add_provider_batch(conn, small, "cleaning", created_at=ago("40 days"))
        add_inputs(conn, small, in_flight, [bytes(32)])
        add_inputs(conn, small, not_closed, [bytes([1]) * 32])

    assert prune(client, 7) == {"provider_batches": 1}
    assert left(db) == {young, in_flight, not_closed}
    assert old not in left(db)


def finished(client: Client, name: str) -> tuple[int, int]:
    """``(job, ChunkBatch)`` of a job that was completed 40 days ago."""
    job = client.enqueue([(name, name)], collection=name, model=SMALL, route="openai")
    with client._db.begin() as conn:
        conn.execute(
            sa.text("UPDATE jobs SET state = 'completed', finished_at = now() - interval '40 days' WHERE id = :id"),
            {"id": job.id},
        )
        query = "UPDATE chunk_batches SET state = 'completed' WHERE job_id = :id RETURNING id"
        return job.id, int(conn.execute(sa.text(query), {"id": job.id}).scalar_one())


def join(conn: sa.Connection, batch: int, *chunk_batches: int) -> None:
    for chunk_batch in chunk_batches:
        conn.execute(
            sa.text("INSERT INTO provider_batch_members VALUES (:batch, :id)"), {"batch": batch, "id": chunk_batch}
        )


@pytest.mark.parametrize(
    "state", ["gathering", "gathered", "uploaded", "creating", "submitted", "collecting", "cleaning"]
)
def test_a_job_stays_while_a_batch_of_its_own_is_open(
    client: Client, db: sa.Engine, small: registry.Space, state: str
) -> None:
    (kept, at_provider), (_, through), (_, shared) = (finished(client, name) for name in ("kept", "gone", "shared"))
    with db.begin() as conn:
        open_batch = add_provider_batch(conn, small, state)
        done, common = closed(conn, small, "40 days"), closed(conn, small, "40 days")
        join(conn, open_batch, at_provider)
        join(conn, done, through)
        join(conn, common, at_provider, shared)

    assert prune(client, 30) == {
        "jobs": 2, "chunk_batches": 2, "provider_batch_members": 2, "provider_batches": 1,
    }  # fmt: skip

    assert [job.id for job in client.jobs()] == [kept]
    assert left(db) == {open_batch, common}  # the kept job has a part in both


@pytest.mark.parametrize("route", ["batch", "plain"])
def test_a_job_stays_while_contents_of_its_own_are_in_flight(
    client: Client, db: sa.Engine, small: registry.Space, route: str
) -> None:
    (kept, chunk_batch), (_, _) = (finished(client, name) for name in ("kept", "gone"))
    with db.begin() as conn:
        batch = add_provider_batch(conn, small) if route == "batch" else None
        add_inputs(conn, small, batch, [bytes(32)], job_id=kept, chunk_batch_id=chunk_batch)

    assert prune(client, 30) == {"jobs": 1, "chunk_batches": 1}
    assert [job.id for job in client.jobs()] == [kept]
