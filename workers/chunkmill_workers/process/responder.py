"""A thread that listens on a connection of its own: for texts that somebody waits for, and for cancelled jobs."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import sqlalchemy as sa

from chunkmill.db.connect import READ_ONLY, raw, read_only_message, sqlstate
from chunkmill.db.retry import is_transient
from chunkmill.domain.reasons import reason_of
from chunkmill.errors import ChunkmillError, NewerSpace, StoreUnavailable
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import CHANNEL, EmbedRequest
from chunkmill.ledger.jobs.jobs import CANCELLED_CHANNEL
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill_workers.process.context import QueueContext
from chunkmill_workers.process.unserved import Unserved

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
        self._unsure: EmbedRequest | None = None
        """The request whose claim may or may not be committed."""

    @property
    @abstractmethod
    def unserved(self) -> Unserved:
        """The spaces that this worker leaves to others."""

    @abstractmethod
    def answer_next(self) -> bool:
        """Answer one request. Returns False if there is none for this worker now."""

    def claim(
        self, claim_next: Callable[[sa.Connection, list[int]], EmbedRequest | None]
    ) -> tuple[EmbedRequest, Space] | None:
        """Claim a request, and read its space. None if there is none for this worker.

        ``claim_next`` gets the ids of the spaces that this worker leaves to others.

        If the answer to the commit is lost, the next claim gives the request back first, uncharged. If there is none,
        those are told who have waited in vain for a worker of such a space.
        """
        if self._unsure is not None:
            with self._context.begin() as conn:
                embed_requests.release(conn, self._unsure)
            self._unsure = None
        unserved = self.unserved.now()
        with self._context.begin() as conn:
            request = self._unsure = claim_next(conn, list(unserved))
            if request is None:
                named = {space_id: f"{self._context.name}: {reason}" for space_id, reason in unserved.items()}
                embed_requests.refuse_unanswered(conn, named)
                return None
            try:
                space: Space | None = registry.get(conn, request.space_id)
            except NewerSpace as newer:
                self.unserved.leave(request.space_id, newer)
                space = None
                conn.rollback()  # the claim too: a worker that can read the space answers
        self._unsure = None
        return (request, space) if space is not None else self.claim(claim_next)

    def end_without_vectors(self, request: EmbedRequest, error: Exception) -> None:
        """Tell whoever waits why there are no vectors; or leave the request to others, if only this worker failed."""
        with self._context.begin() as conn:
            if is_transient(error) or (isinstance(error, ChunkmillError) and error.elsewhere):
                logger.warning("embed request %s is left to other workers: %s", request.id, reason_of(error))
                embed_requests.release(conn, request)
            else:
                told = reason_of(error) if isinstance(error, ChunkmillError) else f"{reason_of(error)} in the worker"
                embed_requests.refuse(conn, request, f"{self._context.name}: {told}")

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
        read_only = sqlstate(error) == READ_ONLY
        said = read_only_message(str(self._context.db.url)) if read_only else reason_of(error)
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
