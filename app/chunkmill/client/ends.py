"""One connection of a process that hears when jobs end, for all its calls that wait for one.

Postgres notifies ``chunkmill_ended`` with the number of a job that has ended. So whoever waits need not look again and
again. A pooler that lends sessions for a transaction at a time passes no notification on; the listener finds that out
by a notification to itself, says so once, and calls then look by themselves, as they do while its connection is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial

import psycopg
import sqlalchemy as sa

from chunkmill.client.door import door
from chunkmill.client.steps import Signal, WaitStep
from chunkmill.db.connect import address_of, open_alone
from chunkmill.domain.reasons import reason_of
from chunkmill.domain.results import Job
from chunkmill.errors import ClientClosed, StoreLimit, StoreUnavailable
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.jobs.finish import ENDED_CHANNEL, tells_of_ends

logger = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
"""How many seconds the listener waits for a notification to itself before it concludes that none arrive."""
FIRST_REST_S, LONGEST_REST_S = 2.0, 30.0
"""After how many seconds a call reads its job although it heard of nothing, at first and later. It then also checks
whether something hinders the job."""
IDLE_SECONDS = 30.0
"""How long the listener stays when no call waits any more."""
RECONNECT_SECONDS = 1.0
"""How long after an error the listener connects again."""
AWAY_SECONDS = 60.0
"""How long Postgres may be away while a job is waited for. A restart or a failover takes less."""


class Watch:
    """Gives a signal when a job ends for which one call waits. Make it before the call reads the jobs, so that no end
    is missed.
    """

    def __init__(self, ends: Ends, job_ids: Sequence[int]) -> None:
        self._ends = ends
        self.job_ids = set(job_ids)
        self.signal = Signal()
        self._rest = FIRST_REST_S

    def look(self) -> None:
        """Call it each time before the jobs are read: every end from here on gives the signal anew."""
        if self.signal.is_given:
            self.signal = Signal()

    def wait(self, pause: float) -> WaitStep:
        """The step that waits until a job ends. If no notifications arrive, it lasts ``pause`` seconds."""
        if not self._ends.are_heard:
            return WaitStep(self.signal, pause)
        rest, self._rest = self._rest, min(LONGEST_REST_S, 2 * self._rest)
        return WaitStep(self.signal, max(pause, rest))


class JobWatch:
    """How one call watches one job, from its second look on: a job that has ended already needs no listener."""

    def __init__(self, db: sa.Engine, job_id: int) -> None:
        self._db = db
        self._job_id = job_id
        self._watch: Watch | None = None

    def __enter__(self) -> JobWatch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            ends_of(self._db).remove(self._watch)

    @property
    def has_begun(self) -> bool:
        """Whether the job was read once."""
        return self._watch is not None

    def look(self) -> None:
        """Call it each time before the job is read."""
        if self._watch is not None:
            self._watch.look()

    def wait(self, pause: float, deadline: float | None, *, is_watched: bool) -> WaitStep:
        """The step that waits until the job is to be read again, no longer than the deadline. It lasts ``pause``
        seconds if no notifications arrive, or if the caller wants to see the progress.
        """
        if self._watch is None:
            ends = ends_of(self._db)
            self._watch = Watch(ends, [self._job_id])
            ends.add(self._db, self._watch)
            wait = WaitStep(self._watch.signal, pause)
        else:
            wait = WaitStep(self._watch.signal, pause) if is_watched else self._watch.wait(pause)
        return (
            wait
            if deadline is None
            else WaitStep(wait.signal, min(wait.seconds, max(0.0, deadline - time.monotonic())))
        )


class Ends:
    """The listener of this process for one database. Its thread runs from the first watch until it is idle."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._databases: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
        self._watches: set[Watch] = set()
        self._thread: threading.Thread | None = None
        self._waker: socket.socket | None = None
        self._quiet_since = 0.0
        self._said: str | None = None
        self.are_heard = False
        """Whether notifications reach this process."""

    def add(self, db: sa.Engine, watch: Watch) -> None:
        with self._mutex:
            self._databases.add(db)
            self._watches.add(watch)
            if self._thread is None:
                ends = socket.socketpair()
                for end in ends:
                    end.setblocking(False)
                self._waker = ends[0]
                self._thread = threading.Thread(target=self._run, args=(ends,), name="chunkmill-ended", daemon=True)
                self._thread.start()

    def remove(self, watch: Watch) -> None:
        with self._mutex:
            self._watches.discard(watch)
            self._quiet_since = time.monotonic()

    def leave(self, db: sa.Engine) -> None:
        """A client was closed. The connection goes with the last of them."""
        with self._mutex:
            self._databases.discard(db)
            thread = None if self._databases else self._thread
        if thread is not None:
            self._wake()
            thread.join(RECONNECT_SECONDS)  # it may be connecting to a server that does not answer

    def _wake(self) -> None:
        # If its buffer is full, the thread will wake up anyway; if it was closed, the thread has ended.
        with contextlib.suppress(OSError, AttributeError):
            self._waker.send(b"\0")  # type: ignore[union-attr]

    # --- in the thread -------------------------------------------------------------------------------------------

    def _run(self, ends: tuple[socket.socket, socket.socket]) -> None:
        try:
            while not self._is_over():
                try:
                    db = next(iter(self._databases))
                    with contextlib.closing(open_alone(db)) as connection:
                        self._listen(db, connection, ends[1])
                except StopIteration:
                    return  # the client was closed, or forgotten, while calls wait
                except Exception as error:  # noqa: BLE001 - whatever it was, the calls that wait must look themselves
                    self._lose(error)
                    with contextlib.suppress(BlockingIOError), selectors.DefaultSelector() as selector:
                        selector.register(ends[1], selectors.EVENT_READ)
                        selector.select(RECONNECT_SECONDS)
                        ends[1].recv(4096)
        finally:
            with self._mutex:
                if self._thread is threading.current_thread():
                    self._thread = None
                    self.are_heard = False
            for end in ends:
                end.close()

    def _is_over(self) -> bool:
        """Whether the thread is to end. A watch that is added from then on starts another one."""
        with self._mutex:
            if self._watches and self._databases:
                return False
            is_over = not self._databases or time.monotonic() >= self._quiet_since + IDLE_SECONDS
            if is_over:
                self._thread = None
                self.are_heard = False
            return is_over

    def _lose(self, error: Exception) -> None:
        self.are_heard = False
        said = f"cannot hear when jobs end ({reason_of(error)}): each call that waits looks for itself meanwhile"
        if self._watches and said != self._said:
            logger.warning("%s", said)
            self._said = said
        self._tell(lambda watch: True)

    def _tell(self, concerns: Callable[[Watch], bool]) -> None:
        with self._mutex:
            signals = [watch.signal for watch in self._watches if concerns(watch)]
        for signal in signals:
            signal.give()

    def _listen(self, db: sa.Engine, connection: psycopg.Connection[object], woken: socket.socket) -> None:
        heard: list[str] = []
        connection.add_notify_handler(lambda notice: heard.append(notice.payload))
        connection.execute(f"LISTEN {ENDED_CHANNEL}", prepare=False)
        with db.begin() as conn:
            are_told = tells_of_ends(conn)
        probe = f"probe {secrets.token_hex(8)}"
        with db.begin() as conn:  # another session: a pooler may hand a notification to whoever is there
            conn.execute(sa.text("SELECT pg_notify(:channel, :probe)"), {"channel": ENDED_CHANNEL, "probe": probe})
        unproven_at = time.monotonic() + PROBE_SECONDS
        self._tell(lambda watch: True)  # a job may have ended before this connection listened
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while not self._is_over():
                connection.pgconn.consume_input()
                while notice := connection.pgconn.notifies():
                    heard.append(notice.extra.decode("ascii", errors="replace"))
                if heard:
                    self.are_heard, self._said = are_told, None
                    # Any role of the database may notify. What is not a number is not a job.
                    ended = {int(word) for word in heard if word.isascii() and word.isdigit() and len(word) < 20}
                    heard.clear()
                    self._tell(lambda watch: not ended.isdisjoint(watch.job_ids))  # noqa: B023 - called at once
                elif are_told and not self.are_heard and time.monotonic() >= unproven_at:
                    self._say_unheard()
                    unproven_at = float("inf")
                selector.select(IDLE_SECONDS if self.are_heard else PROBE_SECONDS)
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)

    def _say_unheard(self) -> None:
        said = (
            "notifications of Postgres do not arrive, as behind a pooler that lends sessions for a transaction at a "
            "time: each call that waits for a job looks for itself. Let DATABASE_URL lead past the pooler to avoid that"
        )
        if said != self._said:
            logger.warning("%s", said)
        self._said = said


_mutex = threading.Lock()
_ends: dict[str, Ends] = {}


def ends_of(db: sa.Engine) -> Ends:
    """The listener of this process for the database and schema of ``db``."""
    address = address_of(db)
    with _mutex:
        return _ends.setdefault(address, Ends())


def _begin_in_child() -> None:
    """A child process has no thread of its parent's, and must not read from its connection."""
    global _mutex
    _mutex = threading.Lock()
    _ends.clear()
    for futures in list(_all_futures):
        futures._begin()


class Futures:
    """The futures of a client's jobs, and the one thread that fulfils them while there are some."""

    def __init__(self, db: sa.Engine) -> None:
        self._db = db
        self._begin()
        _all_futures.add(self)

    def _begin(self) -> None:
        """Begin with no future and no thread: at first, and in a child process, whose parent fulfils its own."""
        self._mutex = threading.Lock()
        self._futures: dict[int, list[Future[Job]]] = {}
        self._watch: Watch | None = None

    def of(self, job: Job) -> Future[Job]:
        """The future of a job, which was read a moment ago."""
        future: Future[Job] = Future()
        if job.state.is_final:
            future.set_result(job)
            return future
        with self._mutex:
            self._futures.setdefault(job.id, []).append(future)
            if self._watch is None:
                self._watch = Watch(ends_of(self._db), [job.id])
                threading.Thread(target=self._run, args=(self._watch,), name="chunkmill-futures", daemon=True).start()
            else:
                self._watch.job_ids.add(job.id)
            self._watch.signal.give()  # it may have ended before the watch knew of it
        return future

    def close(self) -> None:
        """Make all of them raise :class:`ClientClosed`."""
        with self._mutex:
            left, self._futures = self._futures, {}
            if self._watch is not None:
                self._watch.signal.give()
        for futures in left.values():
            for future in futures:
                _fail(future, ClientClosed("the client was closed before the job had ended."))

    def _run(self, watch: Watch) -> None:
        ends = ends_of(self._db)
        ends.add(self._db, watch)
        away_since: float | None = None
        try:
            while True:
                watch.look()
                with self._mutex:
                    self._futures = {
                        job_id: waiting
                        for job_id, futures in self._futures.items()
                        if (waiting := [future for future in futures if not future.cancelled()])
                    }
                    watch.job_ids = set(self._futures)
                    if not self._futures:
                        self._watch = None
                        return
                try:
                    for job_id in self._not_open(sorted(watch.job_ids)):
                        self._look(job_id)
                    away_since = None
                except StoreUnavailable as error:
                    away_since = away_since or time.monotonic()
                    if isinstance(error, StoreLimit) or time.monotonic() - away_since > AWAY_SECONDS:
                        self._settle(watch.job_ids, partial(_fail, error=error))
                if self._futures:  # if the last was settled just now, nothing would end the wait
                    step = watch.wait(1.0)
                    step.signal.wait(step.seconds)
        finally:
            ends.remove(watch)

    def _not_open(self, job_ids: Sequence[int]) -> list[int]:
        with door(self._db), self._db.begin() as conn:
            return jobs.not_open(conn, job_ids)

    def _look(self, job_id: int) -> None:
        try:
            with door(self._db), self._db.begin() as conn:
                job = jobs.get(conn, job_id)
        except StoreUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - as that the job was deleted: whoever has the future gets it
            self._settle([job_id], partial(_fail, error=error))
            return
        if job.state.is_final:
            self._settle([job_id], partial(_fulfil, job=job))

    def _settle(self, job_ids: Sequence[int] | set[int], settle: Callable[[Future[Job]], None]) -> None:
        with self._mutex:
            futures = [future for job_id in job_ids for future in self._futures.pop(job_id, [])]
        for future in futures:
            settle(future)


def _fulfil(future: Future[Job], job: Job) -> None:
    with contextlib.suppress(InvalidStateError):  # somebody has cancelled it
        future.set_result(job)


def _fail(future: Future[Job], error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)


_all_futures: weakref.WeakSet[Futures] = weakref.WeakSet()
os.register_at_fork(after_in_child=_begin_in_child)
