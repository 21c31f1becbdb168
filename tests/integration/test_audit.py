"""An audit speaks of one collection: what its chunks lack, and why, whatever other collections have of it."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.chunks import content_hash
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.work import chunk_batches
from chunkmill.spaces import registry


@pytest.fixture
def two(client: Client) -> Client:
    """A client of two collections with chunks of the same ids and the same texts, none of them embedded."""
    for collection in ("docs", "others"):
        client.enqueue([("a", "text a"), ("b", "text b"), ("c", "text c")], collection=collection)
    return client


def complete(db: sa.Engine, chunk_batch_id: int, *dead: str) -> None:
    """End a ChunkBatch, whose texts ``dead`` a worker could not embed; it lost the vectors of the others."""
    with db.begin() as conn:
        lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner="w", lease_seconds=60)
        assert lease is not None
        assert chunk_batches.complete_if_held(conn, lease, n_embedded=3 - len(dead), n_truncated=0)
        contents = [DeadContent(content_hash(text), "not_finite", "why") for text in dead]
        dead_chunks.add_contents(conn, contents, job_id=lease.job_id, collection_id=lease.collection_id)


def numbers(client: Client, collection: str) -> tuple[int, int, int]:
    audit = client.audit(collection)
    return audit.missing, audit.pending, audit.dead


def test_pending_is_what_its_own_jobs_are_at(two: Client, db: sa.Engine) -> None:
    assert [numbers(two, name) for name in ("docs", "others")] == [(3, 3, 0), (3, 3, 0)]
    complete(db, 1)
    assert [numbers(two, name) for name in ("docs", "others")] == [(3, 0, 0), (3, 3, 0)]
    with db.begin() as conn:
        assert chunk_batches.claim_if_due(conn, 2, owner="w", lease_seconds=60)  # at a worker now
    assert numbers(two, "others") == (3, 3, 0)


def test_dead_is_what_died_in_its_own_jobs(two: Client, db: sa.Engine) -> None:
    complete(db, 1, "text a", "text b")
    assert [numbers(two, name) for name in ("docs", "others")] == [(3, 0, 2), (3, 3, 0)]


def test_a_chunk_whose_dead_text_was_replaced_is_not_dead(two: Client, db: sa.Engine) -> None:
    complete(db, 1, "text a", "text b")
    two.enqueue([("a", "another text")], collection="docs")
    assert numbers(two, "docs") == (3, 1, 1)


def test_embedded_is_what_its_own_space_has_a_vector_of(two: Client, db: sa.Engine) -> None:
    two.enqueue([("a", "text a"), ("d", "text d")], collection="split", on_long="split")
    with db.begin() as conn:
        _, space = registry.all_spaces(conn)
        conn.execute(
            sa.text(
                f"INSERT INTO {space.table_name} SELECT content_hash, 3, text = 'text a', "
                "CAST('[1' || repeat(',0', 383) || ']' AS vector) FROM contents WHERE text IN ('text a', 'text b')"
            )
        )
    audits = [two.audit(name) for name in ("docs", "others", "split")]
    assert [(audit.embedded, audit.truncated, audit.missing_ids) for audit in audits] == [
        (0, 0, ("a", "b", "c")),
        (0, 0, ("a", "b", "c")),
        (1, 1, ("d",)),
    ]
