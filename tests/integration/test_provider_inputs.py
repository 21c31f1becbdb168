"""Contents in flight, and the attempts that brought them: nothing takes away what another carrier or attempt has."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.states import Route
from chunkmill.ledger.provider import provider_inputs
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.openai.plan.inputs import ProviderInput, TextWindow
from chunkmill.openai.wire.answers import SentRequest
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.support.paid_ledger import LARGE, SMALL, add_inputs, add_provider_batch, register

A, B, C, D = (bytes([n]) * 32 for n in range(1, 5))


@pytest.fixture
def small(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings)


@pytest.fixture
def large(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings, LARGE)


def carriers(conn: sa.Connection, space: registry.Space) -> dict[bytes, int | None]:
    return provider_inputs.carriers(conn, space.id, [A, B, C, D])


def rows_of(conn: sa.Connection, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in conn.execute(sa.text(query), parameters)]


def execute(conn: sa.Connection, statement: str, **parameters: Any) -> None:
    conn.execute(sa.text(statement), parameters)


def enqueue(client: Client, texts: dict[str, str], *, collection: str = "docs", route: str = "openai-sync") -> int:
    """The id of a new job's one ChunkBatch."""
    job = client.enqueue(texts.items(), collection=collection, model=SMALL, route=route)
    with client._db.begin() as conn:
        query = sa.text("SELECT id FROM chunk_batches WHERE job_id = :id")
        return int(conn.execute(query, {"id": job.id}).scalar_one())


def claim(conn: sa.Connection, chunk_batch: int, owner: str) -> Lease:
    lease = chunk_batches.claim_if_due(conn, chunk_batch, owner=owner, lease_seconds=60, route=Route.OPENAI_SYNC)
    assert lease is not None
    return lease


def inputs(*hashes: bytes) -> list[ProviderInput]:
    return [ProviderInput(content_hash, (TextWindow("text", 10),), 10) for content_hash in hashes]


# Accounted for


def test_an_answer_takes_out_of_flight_only_what_its_own_carrier_has(
    db: sa.Engine, small: registry.Space, large: registry.Space
) -> None:
    """An answer may be late: its contents are in another ProviderBatch by now, whose charge is not booked yet."""
    with db.begin() as conn:
        first, second, third = (add_provider_batch(conn, space) for space in (small, small, large))
        add_inputs(conn, small, first, [A])
        add_inputs(conn, small, second, [B])
        add_inputs(conn, small, None, [C])
        add_inputs(conn, large, third, [A, B, C])

        def remove(batch: int | None) -> int:
            return provider_inputs.remove(conn, space_id=small.id, hashes=[A, B, C], provider_batch_id=batch)

        assert remove(first) == 1
        assert carriers(conn, small) == {B: second, C: None}
        assert (remove(first), remove(third)) == (0, 0)
        assert remove(None) == 1
        assert carriers(conn, small) == {B: second}
        assert carriers(conn, large) == {A: third, B: third, C: third}


def test_what_is_left_of_a_provider_batch_is_its_own(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        first, second = (add_provider_batch(conn, small) for _ in range(2))
        add_inputs(conn, small, first, [A, B])
        add_inputs(conn, small, second, [C])
        add_inputs(conn, small, None, [D])

        assert provider_inputs.sent(conn, first) == {0: SentRequest(1, 10), 1: SentRequest(1, 10)}
        assert {provider_input.content_hash for provider_input in provider_inputs.remove_all(conn, first)} == {A, B}
        assert carriers(conn, small) == {C: second, D: None}


def test_requests_are_read_in_slices_that_neither_overlap_nor_leave_any_out(
    db: sa.Engine, small: registry.Space, large: registry.Space
) -> None:
    """Another ProviderBatch has requests of the same numbers."""
    with db.begin() as conn:
        first, second = (add_provider_batch(conn, space) for space in (small, large))
        add_inputs(conn, small, first, [bytes([n]) * 32 for n in range(5)])
        add_inputs(conn, large, second, [bytes([n]) * 32 for n in range(10, 15)])

        def sliced(batch: int, after: int, limit: int) -> list[int]:
            contents = provider_inputs.slice_of(conn, batch, after=after, limit=limit)
            return [content.content_hash[0] for content in contents]

        assert [sliced(first, after, 2) for after in (-1, 1, 3, 5)] == [[0, 1], [2, 3], [4], []]
        assert [sliced(second, after, 5) for after in (-1, 4)] == [[10, 11, 12, 13, 14], []]
        execute(
            conn, "UPDATE provider_inputs SET request_no = request_no + 32765 WHERE provider_batch_id = :id", id=second
        )
        assert [sliced(second, after, 2) for after in (32_764, 32_766, 32_768)] == [[10, 11], [12, 13], [14]]
        execute(
            conn, "UPDATE provider_inputs SET request_no = request_no - 32765 WHERE provider_batch_id = :id", id=second
        )
        asked = provider_inputs.of_requests(conn, second, [0, 4, 5])
        assert {n: [row.content_hash[0] for row in rows] for n, rows in asked.items()} == {0: [10], 4: [14]}


def test_texts_that_were_deleted_leave_their_own_provider_batch(db: sa.Engine, small: registry.Space) -> None:
    with db.begin() as conn:
        first, second = (add_provider_batch(conn, small) for _ in range(2))
        execute(conn, "INSERT INTO contents (content_hash, text) VALUES (:b, 'text b'), (:c, 'text c')", b=B, c=C)
        for place, content_hash in enumerate((A, B, C)):
            add_inputs(conn, small, first, [content_hash], position=place)
        add_inputs(conn, small, second, [D], position=3)

        assert provider_inputs.remove_deleted(conn, first) == 1
        assert carriers(conn, small) == {B: first, C: first, D: second}
        places = "SELECT provider_batch_id, position FROM provider_inputs ORDER BY content_hash"
        assert rows_of(conn, places) == [(first, 0), (first, 1), (second, 3)]


# Plain requests


def test_contents_are_an_attempts_own_if_they_are_put_in_flight_again(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    """The answer to the commit may be lost, so that it is run again: what it finds then is its own."""
    one, other = (enqueue(client, {name: name}, collection=name) for name in ("one", "other"))
    with db.begin() as conn:
        lease, another = claim(conn, one, "w1"), claim(conn, other, "w2")
        assert provider_inputs.add_own(conn, another, inputs(D)) == {D}
        for _ in range(2):
            assert provider_inputs.add_own(conn, lease, inputs(A, B, D)) == {A, B}
        assert provider_inputs.add_own(conn, another, inputs(B, C)) == {C}
        owners = "SELECT content_hash, chunk_batch_id, attempt, job_id FROM provider_inputs ORDER BY 1"
        mine, theirs = ((held.chunk_batch_id, held.attempt, held.job_id) for held in (lease, another))
        assert rows_of(conn, owners) == [(A, *mine), (B, *mine), (C, *theirs), (D, *theirs)]


def test_what_an_earlier_attempt_left_in_flight_is_taken_over(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    one, other = (enqueue(client, {name: name}, collection=name) for name in ("one", "other"))
    with db.begin() as conn:
        first = claim(conn, one, "w1")
        provider_inputs.add_own(conn, first, inputs(A, B))
        chunk_batches.release_if_held(conn, first)
        second, another = claim(conn, one, "w1"), claim(conn, other, "w2")
        assert second.attempt > first.attempt
        assert provider_inputs.add_own(conn, second, inputs(A)) == {A}
        assert provider_inputs.add_own(conn, another, inputs(A, B)) == {B}  # of its first attempt, which is over


@pytest.mark.parametrize("state", ["cancelled", "discarded"])
def test_a_provider_batch_keeps_its_contents_although_the_attempt_that_brought_them_is_over(
    client: Client, db: sa.Engine, small: registry.Space, state: str
) -> None:
    """It is at the provider and will be paid for: nobody else may send the same."""
    brought, other = (enqueue(client, {name: name}, collection=name) for name in ("brought", "other"))
    with db.begin() as conn:
        batch = add_provider_batch(conn, small)
        old = claim(conn, brought, "w1")
        carrier = {"chunk_batch_id": old.chunk_batch_id, "attempt": old.attempt}
        add_inputs(conn, small, batch, [A], **carrier)
        add_inputs(conn, small, None, [B], **carrier)
        execute(conn, "UPDATE chunk_batches SET state = :state WHERE id = :id", state=state, id=brought)
        lease = claim(conn, other, "w2")

        assert provider_inputs.add_own(conn, lease, inputs(A)) == set()
        provider_inputs.drop_left_behind(conn, small.id, [A, B])
        assert carriers(conn, small) == {A: batch}
        add_inputs(conn, small, None, [C], **carrier)
        provider_inputs.remove_own(conn, old)
        assert carriers(conn, small) == {A: batch}


def test_only_what_attempts_left_that_are_over_is_left_behind(
    client: Client, db: sa.Engine, small: registry.Space, large: registry.Space
) -> None:
    one, other = (enqueue(client, {name: name}, collection=name) for name in ("one", "other"))
    with db.begin() as conn:
        first = claim(conn, one, "w1")
        provider_inputs.add_own(conn, first, inputs(A))
        chunk_batches.release_if_held(conn, first)
        second, another = claim(conn, one, "w1"), claim(conn, other, "w2")
        provider_inputs.add_own(conn, second, inputs(B))
        provider_inputs.add_own(conn, another, inputs(C))
        add_inputs(conn, large, None, [A], chunk_batch_id=one, attempt=first.attempt)

        provider_inputs.drop_left_behind(conn, small.id, [A, B, C])

        assert (carriers(conn, small), carriers(conn, large)) == ({B: None, C: None}, {A: None})


def test_an_attempt_takes_back_what_it_and_earlier_ones_put_in_flight(
    client: Client, db: sa.Engine, small: registry.Space
) -> None:
    one, other = (enqueue(client, {name: name}, collection=name) for name in ("one", "other"))
    with db.begin() as conn:
        first = claim(conn, one, "w1")
        provider_inputs.add_own(conn, first, inputs(A))
        chunk_batches.release_if_held(conn, first)
        second, another = claim(conn, one, "w1"), claim(conn, other, "w2")
        provider_inputs.add_own(conn, second, inputs(B))
        provider_inputs.add_own(conn, another, inputs(C))

        provider_inputs.remove_own(conn, first)  # late: the second attempt is under way
        assert carriers(conn, small) == {B: None, C: None}
        add_inputs(conn, small, None, [A], chunk_batch_id=one, attempt=first.attempt)
        provider_inputs.remove_own(conn, second)
        assert carriers(conn, small) == {C: None}


def test_a_suspect_of_one_space_is_none_of_another(db: sa.Engine, small: registry.Space, large: registry.Space) -> None:
    with db.begin() as conn:
        for space in (small, large):
            provider_inputs.add_suspects(conn, space.id, [A, B])
        provider_inputs.drop_suspects(conn, small.id, [A, C])

        assert provider_inputs.suspects(conn, small.id, [A, B, C]) == {B}
        assert provider_inputs.suspects(conn, large.id, [A, B, C]) == {A, B}
