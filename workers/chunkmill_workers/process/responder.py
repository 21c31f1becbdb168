"""A thread that listens on a connection of its own: for texts that somebody waits for, and for cancelled jobs."""

from __future__ import annotations

import contextlib
import logging
import math
import selectors
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
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
from chunkmill_workers.process.unserved import UnservedWork

logger = logging.getLogger(__name__)

Context = TypeVar("Context", bound=QueueContext)

LOOK_SECONDS = 1.0
"""How long to wait for a notification before looking anyway, because not every connection pooler passes them on."""
RECONNECT_SECONDS = 2.0
"""How long to wait before listening again after an error."""


class Responder(threading.Thread, Generic[Context]):
    """Answers requests: calls ``look`` whenever a request may have come, or :meth:`wake` was called."""

    def __init__(self, name: str, context: Context) -> None:
        super().__init__(name=name, daemon=True)
        self._context = context
        self._stop_listening = threading.Event()
        self._said: str | None = None
        self._woken: socket.socket | None = None
        self._waker: socket.socket | None = None
        self._unsure: list[EmbedRequest] = []
        """The requests whose claim may or may not be committed."""
        self._spaces: dict[int, Space] = {}

    @property
    @abstractmethod
    def unserved(self) -> UnservedWork:
        """The spaces that this worker leaves to others."""

    @abstractmethod
    def answer_next(self) -> bool:
        """Claim and answer what this worker takes at a time. Returns False if there is nothing for it now."""

    def look(self, *, may_wait: bool) -> None:
        """Answer what waits. ``may_wait`` is False if this thread was woken, and nothing says that a request came."""
        while self.answer_next():
            pass

    def claim(
        self,
        claim_some: Callable[[sa.Connection, list[int]], Sequence[EmbedRequest]],
        *,
        loading: Sequence[int] = (),
    ) -> list[tuple[EmbedRequest, Space]]:
        """Claim requests, and read their spaces. There are none if none is for this worker.

        ``claim_some`` gets the ids of the spaces that this worker leaves to others, and of those that are ``loading``.

        If the answer to the commit is lost, the next claim gives the requests back first, uncharged. If there are none,
        those are told who have waited in vain for a worker of such a space.
        """
        if self._unsure:
            with self._context.begin() as conn:
                embed_requests.release(conn, *self._unsure)
            self._unsure = []
        unserved = self.unserved.now()
        with self._context.begin() as conn:
            self._unsure = list(claim_some(conn, [*unserved, *loading]))
            if not self._unsure:
                named = {space_id: f"{self._context.name}: {reason}" for space_id, reason in unserved.items()}
                embed_requests.refuse_unanswered(conn, named)
                return []
            newer = self._read_spaces(conn)
            if newer:
                conn.rollback()  # the claim too: a worker that can read the space answers
        claimed, self._unsure = self._unsure, []
        if newer:
            return self.claim(claim_some, loading=loading)
        return [(request, self._spaces[request.space_id]) for request in claimed]

    def _read_spaces(self, conn: sa.Connection) -> bool:
        """Read the spaces of what was claimed. Returns whether one of them is of a newer release, and is left alone."""
        newer = False
        for space_id in {request.space_id for request in self._unsure} - self._spaces.keys():
            try:
                self._spaces[space_id] = registry.get(conn, space_id)
            except NewerSpace as error:
                self.unserved.leave(space_id, error)
                newer = True
        return newer

    def end_without_vectors(self, request: EmbedRequest, error: Exception) -> bool:
        """Tell whoever waits why there are no vectors; or leave the request to others, if only this worker failed.

        Returns whether somebody was told.
        """
        with self._context.begin() as conn:
            if is_transient(error) or (isinstance(error, ChunkmillError) and error.elsewhere):
                logger.warning("embed request %s is left to other workers: %s", request.id, reason_of(error))
                embed_requests.release(conn, request)
                return False
            told = reason_of(error) if isinstance(error, ChunkmillError) else f"{reason_of(error)} in the worker"
            embed_requests.refuse(conn, request, f"{self._context.name}: {told}")
            return True

    def stop(self) -> None:
        self._stop_listening.set()
        self.wake()
        self.join(timeout=5)

    def wake(self) -> None:
        """Let the thread look now. Any thread may call it."""
        if (waker := self._waker) is not None:
            with contextlib.suppress(OSError):  # it is full, so that the thread wakes in any case, or closed
                waker.send(b"!")

    def run(self) -> None:
        woken, waker = socket.socketpair()
        with woken, waker:
            woken.setblocking(False)
            waker.setblocking(False)
            self._woken, self._waker = woken, waker
            while not self._stop_listening.is_set():
                try:
                    self._listen()
                except Exception as error:  # noqa: BLE001 - a worker whose responder ended would never answer again
                    self._say(error)
                    self._stop_listening.wait(RECONNECT_SECONDS)
            self._woken = self._waker = None

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
            try:
                conn.execute(sa.text(f"LISTEN {CHANNEL}"))
                conn.execute(sa.text(f"LISTEN {CANCELLED_CHANNEL}"))
                checked_at, may_wait = -math.inf, True
                while not self._stop_listening.is_set():
                    self.look(may_wait=may_wait)
                    if time.monotonic() - checked_at >= LOOK_SECONDS:
                        self._require_primary(conn)
                        checked_at = time.monotonic()
                    self._said = None
                    heard = _heard(conn)
                    if not heard:
                        self._wait(raw(conn).fileno())
                        heard = _heard(conn)
                    if CANCELLED_CHANNEL in heard:
                        # The ledger knows which leases are lost. The notification alone does not say so: it may be
                        # late, and its job may have been retried since, so that the lease that is held now is valid.
                        self._context.leases.renew()
                    may_wait = CHANNEL in heard or time.monotonic() - checked_at >= LOOK_SECONDS
            finally:
                # A listening connection must not go back into the pool.
                conn.invalidate()

    def _wait(self, connection: int) -> None:
        """Wait until something comes on the ``connection``, a file descriptor, or :meth:`wake` is called, or for
        ``LOOK_SECONDS``."""
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            if self._woken is not None:
                selector.register(self._woken, selectors.EVENT_READ)
            selector.select(LOOK_SECONDS)
        if self._woken is not None:
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)


def _heard(conn: sa.Connection) -> set[str]:
    """The channels of the notifications that have come."""
    return {notice.channel for notice in raw(conn).notifies(timeout=0)}
