"""The connection that listens: what it hears is for its responder alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import sqlalchemy as sa

from chunkmill.db.connect import create_db
from chunkmill.ledger.embed_requests import CHANNEL
from chunkmill.ledger.jobs.jobs import CANCELLED_CHANNEL
from chunkmill.settings import Settings
from chunkmill_workers.process import responder
from chunkmill_workers.process.lease import LeaseKeeper
from chunkmill_workers.process.responder import Responder
from tests.support.waiting import PATIENCE, until


class Worker:
    """What a responder needs of a worker: a pool of two connections, and leases."""

    def __init__(self, settings: Settings) -> None:
        self.db = create_db(settings.require_database_url(), role="worker", pool_size=2)
        self.leases = LeaseKeeper(self.db, 60)

    def channels(self) -> list[str]:
        """What the connections in the pool listen to."""
        heard: list[str] = []
        with ExitStack() as stack:
            for conn in [stack.enter_context(self.db.connect()) for _ in range(2)]:
                heard += conn.execute(sa.text("SELECT pg_listening_channels()")).scalars()
        return heard


class Asked(Responder):
    """Has no requests to answer. It breaks at the first look, if it is told to."""

    def __init__(self, worker: Worker, *, breaks: bool) -> None:
        super().__init__("asked", worker)
        self._breaks = breaks
        self.looked = threading.Event()

    def answer_next(self) -> bool:
        if self._breaks:
            self._breaks = False
            raise RuntimeError("a defect")
        self.looked.set()
        return False


@pytest.fixture
def worker(settings: Settings) -> Iterator[Worker]:
    made = Worker(settings)
    yield made
    made.db.dispose()


@pytest.mark.parametrize("breaks", [False, True], ids=["stopped", "broken and stopped"])
def test_a_connection_that_listened_does_not_go_back_into_the_pool(
    breaks: bool, worker: Worker, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next user would be sent the notifications, and would keep them until it is closed."""
    monkeypatch.setattr(responder, "RECONNECT_SECONDS", 0.01)
    answering = Asked(worker, breaks=breaks)
    answering.start()
    try:
        assert answering.looked.wait(PATIENCE)
        for channel in (CHANNEL, CANCELLED_CHANNEL):
            with db.begin() as conn:
                conn.execute(sa.text(f"NOTIFY {channel}"))
    finally:
        answering.stop()
        answering.join(PATIENCE)
    assert not answering.is_alive()
    assert worker.channels() == []


def test_a_responder_whose_connection_is_cut_listens_again(
    worker: Worker, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder, "RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(responder, "LOOK_SECONDS", PATIENCE)  # only a notification, or the cut, ends its wait
    answering = Asked(worker, breaks=False)
    answering.start()
    try:
        assert answering.looked.wait(PATIENCE)
        answering.looked.clear()
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SHOW transaction_read_only'"
        with db.begin() as conn:
            assert conn.execute(sa.text(f"{cut} AND datname = current_database()")).scalars().all() == [True]
        assert answering.looked.wait(PATIENCE)
    finally:
        answering._stop_listening.set()
        with db.begin() as conn:
            conn.execute(sa.text(f"NOTIFY {CHANNEL}"))
        until(lambda: _notified(answering, db))


def _notified(answering: Responder, db: sa.Engine) -> bool:
    """Rings until the responder has ended: it may have begun to wait only after the last notification."""
    with db.begin() as conn:
        conn.execute(sa.text(f"NOTIFY {CHANNEL}"))
    return not answering.is_alive()
