"""One connection of a process that listens for the answers to all its calls, and fetches them.

A worker notifies ``chunkmill_answers`` with the ids of the requests that it has answered. The listener fetches what is
for this process in one statement, however many calls wait for it, and wakes these calls. In between it looks for
answers without a notification, because a pooler may pass none on, and a worker of the last release sends none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psycopg
import sqlalchemy as sa

from chunkmill.client.steps import Signal
from chunkmill.db.connect import address_of, open_alone
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.reasons import reason_of
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import ANSWERS_CHANNEL, AnswerRow

logger = logging.getLogger(__name__)

SOON_SECONDS, LATER_SECONDS = 0.002, 0.05
"""How long after the request the listener first looks for an answer without a notification, and how often it looks
later. If notifications arrive, it looks only as often as that."""
IDLE_SECONDS = 30.0
"""How long the listener keeps its connection when no call waits any more. Connecting again takes as long as embedding a
short text."""
RHYTHM_SECONDS = 1.0
"""How long it then goes on waking up every ``LATER_SECONDS``, so that a call need not wake it."""
RECONNECT_SECONDS = 1.0
"""How long after an error no listener is started. Calls that begin meanwhile look for their answers themselves."""
PATROL_SECONDS = 1.0
"""How many seconds pass between two checks of a waiting call whether the listener still works."""
PROVEN = 3
"""After this many answers in a row that came without a notification, no notifications are expected any more."""
MOST_AT_ONCE = 64
"""How many answers one statement fetches. Each may have 32 vectors."""


@dataclass(frozen=True, slots=True)
class SocketAnswer:
    """The result of a request that was sent to a worker directly. Without ``embedded`` the worker gave no answer."""

    id: int
    """Below 0, because ids above 0 are those of rows."""
    embedded: EmbeddedTexts | None
    is_suspect: bool = False
    """The worker was gone before it answered. It may have died of the request."""

    @property
    def error(self) -> str | None:
        return None if self.embedded is not None else "the request was left"


class Mailbox:
    """The open requests of one call, and the answers that have arrived.

    ``is_adrift`` says that the listener is gone. The call then looks for its answers itself.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._mutex = listener.mutex
        self._signal = Signal()
        self._open: set[int] = set()
        self._arrived: list[AnswerRow | SocketAnswer] = []
        self._wake_at = 0
        self.is_adrift = False

    @property
    def open(self) -> list[int]:
        """The ids of the requests without an answer. Those below 0 were sent to a worker directly."""
        with self._mutex:
            return sorted(self._open)

    @property
    def open_rows(self) -> list[int]:
        """The ids of the rows without an answer."""
        return [request_id for request_id in self.open if request_id > 0]

    def expect(self, request_ids: Sequence[int], *, wake_at: int, with_counts: bool) -> None:
        """Listen for the answers to these requests too. Call it before the transaction that asks commits, so that no
        notification is missed.

        The signal is given when at most ``wake_at`` requests are open, at the first error, and when the listener is
        gone. ``with_counts`` says whether the schema has the columns of counts.
        """
        with self._mutex:
            self._open.update(request_ids)
            self._wake_at = wake_at
        self._listener.expect(self, request_ids, with_counts=with_counts)

    def expect_directly(self, request_id: int, *, wake_at: int) -> None:
        """Wait for :meth:`deliver` with this id too. Call it before the request is sent."""
        with self._mutex:
            self._open.add(request_id)
            self._wake_at = wake_at

    def forget_direct(self, request_id: int) -> None:
        """The request was not sent after all."""
        with self._mutex:
            self._open.discard(request_id)

    def deliver(self, answer: SocketAnswer) -> None:
        """Hand over the result of a request that was sent to a worker directly."""
        with self._mutex:
            signal = self.put(answer) if answer.id in self._open else None
        if signal is not None:
            signal.give()

    @property
    def signal(self) -> Signal:
        """The signal to wait for. It is given already if there is a reason to go on."""
        with self._mutex:
            return self._signal

    @property
    def has_news(self) -> bool:
        """Whether answers have arrived with which the call is to go on."""
        with self._mutex:
            return bool(self._arrived) and (self.is_adrift or self._signal.is_given)

    def take(self) -> list[AnswerRow | SocketAnswer]:
        """The answers that have arrived since the last call."""
        with self._mutex:
            arrived, self._arrived = self._arrived, []
            if self._signal.is_given and not self.is_adrift:
                self._signal = Signal()
            return arrived

    def put(self, answer: AnswerRow | SocketAnswer) -> Signal | None:
        """Add an answer. Returns the signal if it is to be given. The caller of this method, or of the next one, must
        hold the mutex.
        """
        self._open.discard(answer.id)
        self._arrived.append(answer)
        return self._signal if answer.error is not None or len(self._open) <= self._wake_at else None

    def cast_adrift(self) -> Signal:
        """Let the call look for its answers itself, once the signal is given."""
        self.is_adrift = True
        return self._signal

    def collect(self, answers: Sequence[AnswerRow]) -> None:
        """Add answers that the call has fetched itself."""
        with self._mutex:
            for answer in answers:
                self.put(answer)
        self._listener.forget(answer.id for answer in answers)

    def patrol(self) -> None:
        """Let the call look for its answers itself if the listener does not. It may still deliver them."""
        if self._listener.has_stopped() and self.open_rows:
            self.is_adrift = True

    def close(self) -> list[int]:
        """Wait for nothing any more. Returns the ids of the requests that are still open."""
        left = self.open
        self._listener.forget(left)
        return left


class Listener:
    """The listener of this process for one database. Its thread runs from the first call that waits until it is idle.

    It has one connection, which does not belong to a client's pool.
    """

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self._databases: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
        self._waiting: dict[int, Mailbox] = {}
        self._thread: threading.Thread | None = None
        self._waker: socket.socket | None = None
        self._with_counts = True
        self._heard: list[int] = []
        self._trust = 0
        """Above 0 if notifications arrive."""
        self._pause = SOON_SECONDS
        self._due = self._sleeps_until = self._not_before = self._beat = 0.0
        self._quiet_since: float | None = None
        self._said: str | None = None

    def mailbox(self, db: sa.Engine) -> Mailbox:
        """A mailbox for a call of a client with these connections."""
        with self.mutex:
            self._databases.add(db)
        return Mailbox(self)

    def expect(self, mailbox: Mailbox, request_ids: Sequence[int], *, with_counts: bool) -> None:
        with self.mutex:
            now = time.monotonic()
            if self._thread is None and not self._start(now):
                mailbox.cast_adrift()
                return
            self._with_counts = with_counts
            self._waiting.update(dict.fromkeys(request_ids, mailbox))
            self._pause = LATER_SECONDS if self._trust else SOON_SECONDS
            self._due = (
                min(self._due, now + self._pause) if len(self._waiting) > len(request_ids) else now + self._pause
            )
            wakes = self._sleeps_until > self._due
        if wakes:
            self._wake()

    def forget(self, request_ids: Iterable[int]) -> None:
        with self.mutex:
            for request_id in request_ids:
                self._waiting.pop(request_id, None)

    def has_stopped(self) -> bool:
        """Whether the listener has done nothing for ``PATROL_SECONDS``, for example because its connection hangs."""
        with self.mutex:
            return time.monotonic() - self._beat >= PATROL_SECONDS

    def leave(self, db: sa.Engine) -> None:
        """A client was closed. The connection goes with the last of them, unless calls still wait."""
        with self.mutex:
            self._databases.discard(db)
            thread = None if self._databases or self._waiting else self._thread
        if thread is not None:
            self._wake()
            thread.join(RECONNECT_SECONDS)  # it may hang in a connect to a dead server

    def _start(self, now: float) -> bool:
        """Start the thread. Returns False if there was an error a moment ago."""
        db = next(iter(self._databases), None)
        if db is None or now < self._not_before:
            return False
        # A pool of its own with the same way to connect, and no connection yet.
        pool = db.pool.recreate()
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
        self._waker = ends[0]
        self._quiet_since, self._trust, self._beat = None, 0, now
        self._thread = threading.Thread(target=self._run, args=(pool, ends), name="chunkmill-answers", daemon=True)
        self._thread.start()
        return True

    def _wake(self) -> None:
        # If its buffer is full, the thread will wake up anyway; if it was closed, the thread has ended.
        with contextlib.suppress(OSError, AttributeError):
            self._waker.send(b"\0")  # type: ignore[union-attr]

    # --- in the thread -------------------------------------------------------------------------------------------

    def _run(self, pool: sa.Pool, ends: tuple[socket.socket, socket.socket]) -> None:
        _, woken = ends
        try:
            with contextlib.closing(open_alone(pool)) as connection:
                self._listen(connection, woken)
        except Exception as error:  # noqa: BLE001 - whatever it was, the calls that wait must look themselves
            self._end(error)
        finally:
            for end in ends:
                end.close()

    def _end(self, error: Exception) -> None:
        """Let the calls that wait look for their answers themselves."""
        with self.mutex:
            if self._thread is not threading.current_thread():
                return  # it has ended already, and only its connection could not be closed
            self._thread = None
            self._not_before = time.monotonic() + RECONNECT_SECONDS
            signals = {mailbox.cast_adrift() for mailbox in self._waiting.values()}
            self._waiting.clear()
        for signal in signals:
            signal.give()
        if signals:
            self._say(error)

    def _say(self, error: Exception) -> None:
        """Log why answers have to be looked for, once for each reason."""
        said = reason_of(error)
        if said != self._said:
            logger.warning("cannot listen for answers of workers (%s): for now each call reads its own answer", said)
        self._said = said

    def _listen(self, connection: psycopg.Connection[object], woken: socket.socket) -> None:
        connection.add_notify_handler(lambda notice: self._hear(notice.payload))
        connection.execute(f"LISTEN {ANSWERS_CHANNEL}", prepare=False)
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while True:
                self._drain(connection)
                if ids := self._heard_of():
                    self._fetch(connection, ids)
                    continue
                if ids := self._due_now():
                    self._untold(self._fetch(connection, ids))
                    continue
                seconds = self._rest()
                if seconds is None:
                    return
                selector.select(seconds)
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)

    def _drain(self, connection: psycopg.Connection[object]) -> None:
        """Hear all notifications that have arrived."""
        connection.pgconn.consume_input()
        while notice := connection.pgconn.notifies():
            self._hear(notice.extra.decode("ascii", errors="replace"))

    def _hear(self, payload: str) -> None:
        # Any role of the database may notify. What is not a number is not an id.
        self._heard += [
            int(word) for word in payload.split(",") if word.isascii() and word.isdigit() and len(word) < 20
        ]

    def _heard_of(self) -> list[int]:
        """The requests whose answers a worker has told of."""
        with self.mutex:
            self._sleeps_until = 0.0
            self._beat = time.monotonic()
            ids = [request_id for request_id in dict.fromkeys(self._heard) if request_id in self._waiting]
            self._heard.clear()
            if ids:
                self._trust = PROVEN
                self._said = None
            return ids

    def _due_now(self) -> list[int]:
        """All requests, if it is time to look for answers of which nobody has told."""
        with self.mutex:
            if not self._waiting or self._beat < self._due:
                return []
            self._pause = min(LATER_SECONDS, self._pause * 1.5)
            self._due = self._beat + self._pause
            return list(self._waiting)

    def _untold(self, fetched: int) -> None:
        """Answers came without a notification. It may only be late, so one of them shows nothing."""
        with self.mutex:
            self._trust = max(0, self._trust - fetched)

    def _rest(self) -> float | None:
        """For how many seconds there is nothing to do, unless something is heard. None if the thread is to end."""
        with self.mutex:
            now = time.monotonic()
            if self._waiting:
                self._quiet_since = None
                until = self._due
            else:
                quiet = now if self._quiet_since is None else self._quiet_since
                self._quiet_since = quiet
                if not self._databases or now >= quiet + IDLE_SECONDS:
                    self._thread = None  # a call that begins now starts another one
                    return None
                until = now + LATER_SECONDS if now < quiet + RHYTHM_SECONDS else quiet + IDLE_SECONDS
            self._sleeps_until = until
            return max(0.0, until - now)

    def _fetch(self, connection: psycopg.Connection[object], ids: Sequence[int]) -> int:
        """Fetch the answers that there are, and deliver them. Returns how many."""
        fetched = 0
        for first in range(0, len(ids), MOST_AT_ONCE):
            answers: list[AnswerRow] = []
            try:
                with connection.transaction():
                    answers = embed_requests.take_answers(
                        connection, ids[first : first + MOST_AT_ONCE], with_counts=self._with_counts
                    )
            finally:
                # They are here, whether or not the answer to the commit was lost.
                self._deliver(answers)
            fetched += len(answers)
        return fetched

    def _deliver(self, answers: Sequence[AnswerRow]) -> None:
        signals = []
        with self.mutex:
            for answer in answers:
                mailbox = self._waiting.pop(answer.id, None)
                if mailbox is not None and (signal := mailbox.put(answer)) is not None:
                    signals.append(signal)
        for signal in signals:
            signal.give()


_mutex = threading.Lock()
_listeners: dict[str, Listener] = {}


def listener_of(db: sa.Engine) -> Listener:
    """The listener of this process for the database and schema of ``db``."""
    address = address_of(db)
    with _mutex:
        return _listeners.setdefault(address, Listener())


def _begin_in_child() -> None:
    """A child process has no thread of its parent's, and must not read from its connection."""
    global _mutex
    _mutex = threading.Lock()
    _listeners.clear()


os.register_at_fork(after_in_child=_begin_in_child)
