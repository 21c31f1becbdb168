"""Ends a worker that hangs: a step takes too long, a ChunkBatch makes no progress, the device is broken, or doorbells
stay unanswered.

What the worker held is taken back as from a dead worker, because the work may be the cause. The process exits with
code 70, and a supervisor starts another one.
"""

from __future__ import annotations

import logging
import threading
import time

from chunkmill.broker import Broker, publish_errors
from chunkmill.ledger.dead import deaths
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.process.drain import Drain, leave, with_last_words
from chunkmill_workers.supervisor.supervisor import supervisor_is_gone

logger = logging.getLogger(__name__)

EX_SOFTWARE = 70
LOOK_S = 1.0
LOOK_AT_QUEUE_S = 10.0


class Watchdog(threading.Thread):
    """Checks the worker every second, and the queue in Redis about every ten seconds, with a connection of its own."""

    def __init__(self, context: WorkerContext, broker: Broker, drain: Drain) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._drain = drain
        self._context = context
        self._broker = broker
        self._ended = threading.Event()
        self._looked_at = 0.0
        self._waiting_since: float | None = None
        self._refused = 0.0
        """How many messages the door had refused at the last look. Who refuses messages consumes."""
        self._failed: set[str] = set()
        """The checks that failed when they were last made."""

    def stop(self) -> None:
        self._ended.set()

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            if supervisor_is_gone() and not self._context.stopping.is_set():
                logger.warning("the supervisor of this worker has ended, so the worker ends too")
                self._drain.tell_itself()
                continue
            if evidence := self.look():
                self._end(evidence)

    def look(self) -> str | None:
        """What is wrong with this worker; None if nothing is. A check that fails keeps no other from being made."""
        for check in (self._broken, self._long_step, self._still_lease, self._unanswered_doorbells):
            try:
                evidence = check()
            except Exception:  # without a watchdog nobody would end a worker that hangs
                if check.__name__ not in self._failed:
                    logger.exception("the watchdog cannot check this worker, and tries again")
                self._failed.add(check.__name__)
            else:
                self._failed.discard(check.__name__)
                if evidence:
                    return evidence
        return None

    def _broken(self) -> str | None:
        return self._context.broken

    def _long_step(self) -> str | None:
        """Whether a step of the engine is past its deadline. A load has a longer one, because it may be a download."""
        engines, settings = self._context.engines, self._context.settings
        seconds, what = engines.longest_step()
        if seconds > settings.step_deadline_seconds:
            return f"{what} takes {seconds:.0f} s, more than STEP_DEADLINE_SECONDS"
        seconds = engines.loads.longest()
        if seconds > settings.load_deadline_seconds:
            return f"the load of a model takes {seconds:.0f} s, more than LOAD_DEADLINE_SECONDS"
        return None

    def _still_lease(self) -> str | None:
        """Whether a thread waits for something that nobody does.

        A thread may wait for Postgres, and for other threads while the engines make progress.
        """
        seconds, chunk_batch_id = self._context.leases.stillest()
        seconds = min(seconds, self._context.engines.quiet())
        if seconds <= self._context.settings.step_deadline_seconds:
            return None
        return (
            f"ChunkBatch {chunk_batch_id} has made no progress for {seconds:.0f} s with nothing running in the engine, "
            "more than STEP_DEADLINE_SECONDS"
        )

    def _unanswered_doorbells(self) -> str | None:
        """Whether this worker consumes no longer: doorbells wait, it is idle, and none has reached it for too long."""
        now, context = time.monotonic(), self._context
        pause = min(LOOK_AT_QUEUE_S, context.settings.stall_seconds / 4)
        if context.stopping.is_set() or now - self._looked_at < pause:
            return None
        self._looked_at = now
        try:
            waiting = sum(self._broker.queued_doorbells().values())
        except publish_errors():
            waiting = 0  # Redis is away, so no worker can consume
        refused, self._refused = self._refused, COUNTS.total(metrics.REFUSED)
        if not waiting or context.workroom.inside or refused != self._refused:
            self._waiting_since = None
            return None
        since = self._waiting_since = max(self._waiting_since or now, context.last_doorbell)
        if now - since < context.settings.stall_seconds:
            return None
        if not self._broker.takes_writes():
            return None  # another worker could not take a doorbell either
        return f"{waiting} doorbells wait in Redis and none has reached this worker for {now - since:.0f} s"

    def _end(self, evidence: str) -> None:
        logger.error("the watchdog ends this worker (exit code %s): %s", EX_SOFTWARE, evidence)
        with_last_words(lambda: self._take_back(evidence))
        leave(EX_SOFTWARE)

    def _take_back(self, evidence: str) -> None:
        with self._context.db.begin() as conn:
            deaths.take_back_from(conn, self._context.name, evidence=evidence)
