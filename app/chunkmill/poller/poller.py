"""The loop that rings doorbells for work that is due, and recovers what others left behind. Any number may run."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.broker import PUBLISH_ERRORS, Broker
from chunkmill.db.retry import is_transient
from chunkmill.domain.doorbells import HURRY, DoorbellWindow
from chunkmill.domain.reasons import reason_of
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.dead.deaths import TakenBack
from chunkmill.ledger.jobs import cancel, recover
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work.doorbells import ring_due
from chunkmill.monitor import reports
from chunkmill.poller.paid import ProviderRounds
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS

logger = logging.getLogger(__name__)

CANCELS_SECONDS = 10.0
"""Time between two searches for unfinished cancels. Each search reads all jobs that were ever cancelled."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did."""

    taken_back: TakenBack
    finished: int
    abandoned: int
    rung: int


class Poller:
    """Postgres says what is due, and the poller repeats it to Redis. If pollers are lost for a while, no work is lost.

    It remembers only how fast workers answer its doorbells, which each poller learns for itself.
    """

    def __init__(self, db: sa.Engine, broker: Broker, settings: Settings) -> None:
        self._db = db
        self._broker = broker
        self._settings = settings
        self._away: str | None = None
        self._patient_until = -math.inf
        """After an outage of Postgres, live workers first get time to renew leases that ran out meanwhile."""
        self._window = DoorbellWindow.smallest(settings.doorbell_window)
        self._looked_at = -math.inf
        self._cancels_at = -math.inf
        self._provider = ProviderRounds(db, broker, settings)

    def run(self, stop: threading.Event) -> None:
        """Run rounds until ``stop``. An outage of Postgres or Redis is logged once, and the next round tries again."""
        logger.info("poller: keeps at most %s doorbells in Redis", self._settings.doorbell_window)
        while not stop.is_set():
            pause = self._settings.poll_interval
            try:
                done = self.round()
            except Exception as error:
                if not is_transient(error) and not isinstance(error, PUBLISH_ERRORS):
                    raise
                if is_transient(error):
                    self._patient_until = time.monotonic() + self._settings.lease_seconds / 3
                self._say_away(reason_of(error))
            else:
                self._say_back()
                _count(done)
                if self._window.hurry:
                    pause *= HURRY
                taken = done.taken_back
                if taken.total:
                    logger.info(
                        "took back %s ChunkBatches of silent workers: %s of them split, %s closed with a dead content",
                        taken.total, taken.split, taken.buried,
                    )  # fmt: skip
                if done.abandoned:
                    logger.info("failed %s jobs whose producers are gone", done.abandoned)
            stop.wait(pause)

    def round(self) -> Round:
        """Run one round. If a server is away, raises a transient error (`is_transient`) or a publishing error."""
        patient = time.monotonic() < self._patient_until
        with self._db.begin() as conn:
            taken = TakenBack() if patient else deaths.take_back_expired(conn)
            abandoned = recover.fail_abandoned(conn)
            recover.delete_old_requests(conn)
        self._go_on_cancelling()
        rung = self._ring() + self._provider.round()
        # This comes last, because the anti-join of a large job takes time and doorbells should not wait for it.
        finished = self._finish_jobs()
        return Round(taken, finished, len(abandoned), rung)

    def _go_on_cancelling(self) -> None:
        """Cancel one more slice of what a client left behind, in each round until nothing is left."""
        if time.monotonic() >= self._cancels_at:
            with self._db.begin() as conn:
                left = cancel.cancel_some_left_behind(conn)
                reports.delete_old(conn)
            self._cancels_at = -math.inf if left else time.monotonic() + CANCELS_SECONDS

    def _ring(self) -> int:
        settings = self._settings
        # Redis is read before the transaction: if Redis is away, this fails at once and no transaction waits for it.
        queued = self._broker.queued_doorbells()
        n_queued, looked_at = sum(queued.values()), time.monotonic()
        part = min(1.0, max(HURRY, (looked_at - self._looked_at) / settings.poll_interval))
        window = self._window.adapted(n_queued, part=part, most=settings.doorbell_window)
        with self._db.begin() as conn:
            rung = ring_due(
                conn,
                self._broker,
                queued=queued,
                window=window.size,
                repair_seconds=settings.doorbell_repair_seconds,
            )
        self._window, self._looked_at = window.filled(n_queued + rung), looked_at
        return rung

    def _finish_jobs(self) -> int:
        with self._db.begin() as conn:
            waiting = recover.jobs_without_open_chunk_batches(conn)
        finished = 0
        for job_id, space_id in waiting:
            try:
                with self._db.begin() as conn:
                    finished += finish_if_done(conn, job_id, registry.get(conn, space_id), wait=False) is not None
            except sa.exc.DBAPIError as error:
                if is_transient(error):
                    raise
                logger.exception("job %s cannot be finished; the other jobs are not affected", job_id)
        return finished

    def _say_away(self, what: str) -> None:
        if self._away != what:
            logger.warning("poller: %s; trying again every %s s", what, self._settings.poll_interval)
        self._away = what

    def _say_back(self) -> None:
        if self._away:
            logger.info("poller: back after %s", self._away)
        self._away = None


def _count(done: Round) -> None:
    COUNTS.add_all(((m.ROUNDS, 1), (m.RUNG, done.rung), (m.TAKEN_BACK, done.taken_back.total)))
    COUNTS.touch(m.LAST_ROUND)
