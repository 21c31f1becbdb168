"""Ends a worker that hangs: a device step past its deadline, a broken device, or doorbells that it does not answer.

What it held is taken back as from a dead worker, for the work may be what killed it, and a supervisor starts another
process (exit code 70).
"""

from __future__ import annotations

import logging
import threading
import time

from app.broker import PUBLISH_ERRORS, Broker
from app.ledger import deaths
from workers.context import WorkerContext
from workers.drain import Drain, leave, with_last_words
from workers.supervisor import supervisor_is_gone

logger = logging.getLogger(__name__)

EX_SOFTWARE = 70
LOOK_S = 1.0
LOOK_AT_QUEUE_S = 10.0


class Watchdog(threading.Thread):
    """Looks every second; at the queue, with a connection of its own, every ten or so."""

    def __init__(self, context: WorkerContext, broker: Broker, drain: Drain) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._drain = drain
        self._context = context
        self._broker = broker
        self._ended = threading.Event()
        self._looked_at = 0.0
        self._waiting_since: float | None = None

    def stop(self) -> None:
        self._ended.set()

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            if supervisor_is_gone() and not self._context.stopping.is_set():
                logger.warning("the supervisor of this worker is gone: leaving too")
                self._drain.tell_itself()
                continue
            evidence = self._broken_device() or self._long_step() or self._unanswered_doorbells()
            if evidence:
                self._end(evidence)

    def _broken_device(self) -> str | None:
        return self._context.broken

    def _long_step(self) -> str | None:
        seconds = self._context.engines.longest_pass()
        limit = self._context.settings.step_deadline_seconds
        return f"a forward pass takes {seconds:.0f} s, more than STEP_DEADLINE_SECONDS" if seconds > limit else None

    def _unanswered_doorbells(self) -> str | None:
        """Doorbells wait, this worker is idle, and none has reached it for long: it no longer consumes."""
        now, context = time.monotonic(), self._context
        pause = min(LOOK_AT_QUEUE_S, context.settings.stall_seconds / 4)
        if context.stopping.is_set() or now - self._looked_at < pause:
            return None
        self._looked_at = now
        try:
            waiting = sum(self._broker.queued_doorbells().values())
        except PUBLISH_ERRORS:
            waiting = 0  # with Redis away nobody can consume
        if not waiting or context.room.inside:
            self._waiting_since = None
            return None
        since = self._waiting_since = max(self._waiting_since or now, context.last_doorbell)
        if now - since < context.settings.stall_seconds:
            return None
        return f"{waiting} doorbells wait in Redis and none has reached this worker for {now - since:.0f} s"

    def _end(self, evidence: str) -> None:
        logger.error("the watchdog ends this worker (exit code %s): %s", EX_SOFTWARE, evidence)
        with_last_words(lambda: self._take_back(evidence))
        leave(EX_SOFTWARE)

    def _take_back(self, evidence: str) -> None:
        with self._context.db.begin() as conn:
            deaths.take_back_from(conn, self._context.name, evidence=evidence)
