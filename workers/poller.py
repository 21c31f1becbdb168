"""The loop that rings doorbells for whatever is due and mends what was left behind. Any number may run."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import sqlalchemy as sa

from app.broker import PUBLISH_ERRORS, Broker
from app.db import spaces
from app.ledger import rescue
from app.ledger.doorbells import ring_due
from app.ledger.finish import finish_if_done
from app.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did."""

    rescued: int
    discarded: int
    finished: int
    abandoned: int
    rung: int


class Poller:
    """Postgres says what is due; the poller only repeats it to Redis. Losing one, or all for a while, loses nothing."""

    def __init__(self, db: sa.Engine, broker: Broker, settings: Settings) -> None:
        self._db = db
        self._broker = broker
        self._settings = settings
        self._away: str | None = None

    def run(self, stop: threading.Event) -> None:
        """Rounds until ``stop``. Postgres or Redis being away is logged once, and the next round tries again."""
        logger.info("poller: a window of %s doorbells", self._settings.doorbell_window)
        while not stop.is_set():
            try:
                done = self.round()
            except (sa.exc.OperationalError, *PUBLISH_ERRORS) as error:
                self._say_away(type(error).__name__)
            else:
                self._say_back()
                if done.rescued or done.discarded or done.abandoned:
                    logger.info(
                        "took back %s expired leases, discarded %s ChunkBatches, named %s abandoned jobs",
                        done.rescued, done.discarded, done.abandoned,
                    )  # fmt: skip
            stop.wait(self._settings.poll_interval)

    def round(self) -> Round:
        """One round. Raises ``sqlalchemy.exc.OperationalError`` or one of ``PUBLISH_ERRORS``."""
        with self._db.begin() as conn:
            taken = rescue.take_back_expired(conn)
            abandoned = rescue.fail_abandoned(conn)
            rescue.drop_old_requests(conn)
        with self._db.begin() as conn:
            rung = ring_due(
                conn,
                self._broker,
                window=self._settings.doorbell_window,
                repair_seconds=self._settings.doorbell_repair_seconds,
            )
        # Last, because the anti-join of a large job takes its time and doorbells should not wait for it.
        finished = self._finish_jobs()
        return Round(taken.available, taken.discarded, finished, len(abandoned), rung)

    def _finish_jobs(self) -> int:
        with self._db.begin() as conn:
            waiting = rescue.jobs_without_open_batches(conn)
        finished = 0
        for job_id, space_id in waiting:
            try:
                with self._db.begin() as conn:
                    finished += finish_if_done(conn, job_id, spaces.get(conn, space_id), wait=False) is not None
            except sa.exc.DBAPIError:
                logger.exception("job %s cannot be finished; the others go on", job_id)
        return finished

    def _say_away(self, what: str) -> None:
        if self._away != what:
            logger.warning("poller: %s; trying again every %s s", what, self._settings.poll_interval)
        self._away = what

    def _say_back(self) -> None:
        if self._away:
            logger.info("poller: back after %s", self._away)
        self._away = None
