"""Keeps the jobs of served batches going while no poller runs, in a thread of each gateway.

A batch ends when its job has ended. A job whose worker was killed ends only if somebody takes the worker's lease back,
rings for the work again, and ends the job once all of it is done. That is the poller's part, of which any number may
run at a time, so a gateway may take it too. Jobs on paid routes need a poller all the same.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.db.connect import connections
from chunkmill.db.retry import is_outage
from chunkmill.domain.reasons import reason_of
from chunkmill.ledger.served import batches, files
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 5.0
"""How often it is looked whether a job of a batch is open and no poller runs."""
STOP_SECONDS: Final = 5.0


class JobRecovery:
    """Runs the rounds of :meth:`Poller.rescue` while a batch waits for its job and no poller is connected."""

    def __init__(self, db: sa.Engine, broker: Broker, settings: Settings) -> None:
        self._db = db
        self._poller = Poller(db, broker, settings)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recovery of batches", daemon=True)
        self._is_at_work = False
        self._said: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the step in hand, for which it waits a while: the end of a large job may take long."""
        self._stopping.set()
        self._thread.join(STOP_SECONDS)

    def look(self) -> bool:
        """Run a round if one is needed. Returns whether it was."""
        with self._db.begin() as conn:
            is_needed = files.are_kept(conn) and batches.wait_for_jobs(conn) and not connections(conn).pollers
        if is_needed != self._is_at_work:
            self._is_at_work = is_needed
            if is_needed:
                logger.warning(
                    "no poller is connected, so this gateway takes back leases and ends jobs for the sake of its "
                    "batches. Start one with: chunkmill poller"
                )
        if is_needed:
            self._poller.rescue()
        return is_needed

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception as error:
                said = reason_of(error)
                if said != self._said:
                    problem = "the gateway cannot ring for the jobs of its batches or end them: %s"
                    logger.error(problem, said, exc_info=_unknown(error))  # noqa: TRY400
                self._said = said
            else:
                self._said = None


def _unknown(error: Exception) -> Exception | None:
    """The error if its traceback tells more than its reason."""
    return None if isinstance(error, sa.exc.SQLAlchemyError) or is_outage(error) else error
