"""The drain begins in a signal handler, which may interrupt the main thread while that has any lock."""

from __future__ import annotations

import logging
import threading

import pytest

from tests.waiting import PATIENCE, Call, running
from workers.context import WorkerContext
from workers.drain import Drain


def test_the_handler_takes_no_lock_and_logs_nothing(
    context: WorkerContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is called here as a handler would be: by the thread that has the lock of the flag it leads to, which cannot be
    taken twice, while another has those of all logging."""
    left: list[int] = []
    monkeypatch.setattr("workers.drain.leave", left.append)
    monkeypatch.setattr("workers.drain.LIMIT_S", 0)
    handlers = [handler for handler in logging.getLogger().handlers if handler.lock]
    assert handlers
    caplog.set_level(logging.DEBUG)
    before = set(threading.enumerate())
    drain = Drain([context])
    (drain_thread,) = set(threading.enumerate()) - before
    held, begun = threading.Event(), threading.Event()

    def hold_logging() -> None:
        for handler in handlers:
            handler.acquire()
        held.set()
        begun.wait(PATIENCE)
        for handler in handlers:
            handler.release()

    def interrupted() -> None:
        with context.stopping._cond:
            drain.begin()
        begun.set()

    with running(hold_logging, release=begun.set):
        assert held.wait(PATIENCE)
        Call(interrupted).result()
        assert begun.is_set()
    assert context.stopping.wait(PATIENCE)  # and the drain goes on in a thread of its own
    drain_thread.join(PATIENCE)
    assert left == [0]
