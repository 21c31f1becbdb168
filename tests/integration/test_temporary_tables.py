"""No temporary table stays with a pooled connection, because it would hold back the age of the whole database."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from chunkmill import Client
from tests.integration.conftest import Runner
from tests.integration.hands import Hands

CHUNKS = [(f"id-{i}", f"a text about subject {i}") for i in range(20)]


def temporary_tables(db: sa.Engine) -> list[str]:
    statement = "SELECT relname FROM pg_class WHERE relpersistence = 't' AND relkind = 'r' ORDER BY relname"
    with db.begin() as conn:
        return list(conn.execute(sa.text(statement)).scalars())


def test_producers_workers_and_retention_leave_no_temporary_table(
    db: sa.Engine, client: Client, runner: Runner, hands: Hands
) -> None:
    job = client.enqueue(CHUNKS, collection="docs")
    hands.write(1, [text for _, text in CHUNKS[:5]])  # another job's worker was first, so that the write is staged
    runner.finish(job)
    runner.finish(client.enqueue(CHUNKS[:7], collection="other"))
    client.delete("docs", [chunk_id for chunk_id, _ in CHUNKS[10:]])
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET finished_at = finished_at - interval '2 days'"))
    for dry_run in (True, False):
        client.prune(older_than=timedelta(days=1), dry_run=dry_run)
        client.evict(max_bytes=0, dry_run=dry_run)
    client.estimate(CHUNKS, collection="docs")
    assert temporary_tables(db) == []
    assert client._db.pool.checkedin() > 0  # type: ignore[attr-defined]


def test_what_breaks_off_leaves_no_temporary_table(
    db: sa.Engine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.enqueue(CHUNKS, collection="docs")

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chunkmill.store.evict._delete_slice", broken)
    monkeypatch.setattr("chunkmill.ledger.prune._marked", broken)
    client.delete("docs", all_chunks=True)
    hands = Hands(db)
    hands.write(1, ["a text that nothing refers to"])
    with pytest.raises(KeyboardInterrupt):
        client.evict(max_bytes=0)
    with pytest.raises(KeyboardInterrupt):
        client.prune(older_than=timedelta(days=1))
    assert temporary_tables(db) == []
