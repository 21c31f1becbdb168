"""A failover: the address leads to the new primary, and old sessions still to a server that takes no writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from chunkmill import Client, StoreUnavailable
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db, raw
from chunkmill.db.copy import copy_binary
from chunkmill.domain.states import JobState
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from chunkmill_workers.local.responder import EmbedResponder
from tests.support.waiting import Call, until


@contextmanager
def read_only(db: sa.Engine) -> Iterator[None]:
    """Sessions that are made in the block take no writes, not even after it."""
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        name = conn.execute(sa.text("SELECT current_database()")).scalar_one()
        conn.execute(sa.text("SET default_transaction_read_only = off"))
        conn.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        yield
        conn.execute(sa.text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))


def pin(*pools: sa.Engine) -> None:
    """Fill each pool with sessions that lead to the old primary."""
    for pool in pools:
        pool.dispose()
        several = [pool.connect() for _ in range(3)]
        for conn in several:
            conn.close()


def is_pinned(pool: sa.Engine) -> bool:
    with pool.connect() as conn:
        return str(conn.execute(sa.text("SHOW transaction_read_only")).scalar_one()) == "on"


def test_worker_poller_and_client_leave_a_server_that_has_become_read_only(
    settings: Settings, db: sa.Engine, broker: Broker, client: Client, context: WorkerContext
) -> None:
    job = client.enqueue([("a", "one"), ("b", "two")], collection="docs")
    client.enqueue([("c", "three")], collection="other")
    context.engine_for(context.engines.load_default(context.db))
    behind = create_db(settings.require_database_url(), role="poller")
    poller = Poller(behind, broker, settings)
    with read_only(db):
        pin(context.db, client._db, behind)
    assert all(map(is_pinned, (context.db, client._db, behind)))

    with pytest.raises(StoreUnavailable, match="is read-only: it is a standby, or the old primary"):
        client.enqueue([("d", "four")], collection="docs")
    client.enqueue([("d", "four")], collection="docs")
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    assert client.job(job.id).state is JobState.COMPLETED
    with pytest.raises(sa.exc.DBAPIError):
        poller.round()
    poller.round()
    # Each pool dropped all of its connections with the first that was refused.
    assert not any(map(is_pinned, (context.db, client._db, behind)))
    behind.dispose()


def test_who_only_reads_leaves_the_old_primary_too(
    settings: Settings, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read is refused there, so a client that waits or searches would see the past for ever."""
    monkeypatch.setattr("chunkmill.db.connect.OLDEST_SECONDS", 1)
    broker = Broker.connect(settings)
    url = settings.require_database_url()
    readers = [Client(create_db(url, role=role), broker, settings) for role in ("client", "gateway")]
    with read_only(db):
        pin(*(reader._db for reader in readers))
    for reader in readers:
        until(lambda reader=reader: reader.collections() == [] and not is_pinned(reader._db))  # type: ignore[misc]
        reader.close()


def test_a_copy_too_leaves_a_read_only_server(db: sa.Engine, client: Client, context: WorkerContext) -> None:
    """COPY runs below SQLAlchemy, which does not see its errors by itself."""
    client.enqueue([("a", "one")], collection="docs")
    with read_only(db):
        pin(context.db)
    copied = "COPY contents (content_hash, text) FROM STDIN"
    with pytest.raises(sa.exc.DBAPIError), context.db.begin() as conn:
        copy_binary(conn, copied.removeprefix("COPY ").removesuffix(" FROM STDIN"), b"")
    assert not is_pinned(context.db)


def test_a_listener_leaves_a_read_only_server_and_says_once_what_is_wrong(
    db: sa.Engine, client: Client, context: WorkerContext, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("chunkmill_workers.process.responder.RECONNECT_SECONDS", 0.02)
    context.engine_for(context.engines.load_default(context.db))
    listened: list[int] = []
    listen = EmbedResponder._listen

    def counted(self: EmbedResponder) -> None:
        listened.append(1)
        listen(self)

    monkeypatch.setattr(EmbedResponder, "_listen", counted)
    responder = EmbedResponder(context)
    with read_only(db):
        pin(context.db)
        responder.start()
        until(lambda: len(listened) > 3)
    said = [r.message for r in caplog.records if "listening again" in r.message]
    assert len(said) == 1
    assert "is read-only: it is a standby, or the old primary after a failover" in said[0]
    call = Call(lambda: client.embed(["a query"], kind="query"))
    assert call.result().shape[0] == 1
    responder.stop()


def test_a_listener_that_stays_on_the_old_primary_while_requests_go_to_the_new_one_is_noticed(
    db: sa.Engine, context: WorkerContext
) -> None:
    """Nobody notifies on the old one, so that it would hear of no cancelled job any more."""
    responder = EmbedResponder(context)
    with read_only(db):
        pin(context.db)
        with context.db.connect() as conn:
            pid = raw(conn).info.backend_pid
            with pytest.raises(StoreUnavailable, match="is read-only"):
                responder._require_primary(conn)
    assert pid
    context.db.dispose()
    with context.db.connect() as conn:
        responder._require_primary(conn)
