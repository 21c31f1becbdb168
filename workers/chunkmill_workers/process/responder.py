"""A thread that listens on a connection of its own: for texts that somebody waits for, and for cancelled jobs."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from typing import Generic, TypeVar

import sqlalchemy as sa

from chunkmill.db.connect import READ_ONLY, raw, read_only_message, refusal, sqlstate
from chunkmill.errors import ChunkmillError, StoreUnavailable
from chunkmill.ledger.embed_requests import CHANNEL
from chunkmill.ledger.jobs.jobs import CANCELLED_CHANNEL
from chunkmill_workers.process.context import QueueContext

logger = logging.getLogger(__name__)

Context = TypeVar("Context", bound=QueueContext)

LOOK_SECONDS = 1.0
"""How long to wait for a notification before looking anyway, because not every connection pooler passes them on."""
RECONNECT_SECONDS = 2.0
"""How long to wait before listening again after an error."""


class Responder(threading.Thread, Generic[Context]):
    """Answers requests: calls ``answer_next`` until it returns False, whenever a request may have come."""

    def __init__(self, name: str, context: Context) -> None:
        super().__init__(name=name, daemon=True)
        self._context = context
        self._stop_listening = threading.Event()
        self._said: str | None = None

    @abstractmethod
    def answer_next(self) -> bool:
        """Answer one request. Returns False if there is none for this worker now."""

    def stop(self) -> None:
        self._stop_listening.set()
        self.join(timeout=5)

    def run(self) -> None:
        while not self._stop_listening.is_set():
            try:
                self._listen()
            except Exception as error:  # noqa: BLE001 - a worker whose responder ended would never answer again
                self._say(error)
                self._stop_listening.wait(RECONNECT_SECONDS)

    def _say(self, error: Exception) -> None:
        """Say what is wrong, once until something else is wrong or a request could be looked for again."""
        if sqlstate(error) == READ_ONLY:
            said = read_only_message(str(self._context.db.url))
        elif isinstance(error, sa.exc.DBAPIError | ChunkmillError):
            said = refusal(error)
        else:
            said = type(error).__name__  # the message of an unknown error may quote a text
        if said != self._said:
            logger.warning("%s: %s; listening again every %g s", self.name, said, RECONNECT_SECONDS)
        self._said = said

    def _require_primary(self, conn: sa.Connection) -> None:
        """Raise :class:`StoreUnavailable` if ``conn`` leads to a server that takes no writes.

        Nobody notifies there. Requests are answered through other connections, which may lead to the new primary.
        """
        if conn.execute(sa.text("SHOW transaction_read_only")).scalar_one() == "on":
            raise StoreUnavailable(read_only_message(str(self._context.db.url)))

    def _listen(self) -> None:
        with self._context.db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(sa.text(f"LISTEN {CHANNEL}"))
            conn.execute(sa.text(f"LISTEN {CANCELLED_CHANNEL}"))
            try:
                while not self._stop_listening.is_set():
                    while self.answer_next():
                        pass
                    self._require_primary(conn)
                    self._said = None
                    heard = {notice.channel for notice in raw(conn).notifies(timeout=LOOK_SECONDS, stop_after=1)}
                    if CANCELLED_CHANNEL in heard:
                        # The ledger knows which leases are lost. The notification alone does not say so: it may be
                        # late, and its job may have been retried since, so that the lease that is held now is valid.
                        self._context.leases.renew()
            finally:
                # A listening connection must not go back into the pool.
                conn.invalidate()
