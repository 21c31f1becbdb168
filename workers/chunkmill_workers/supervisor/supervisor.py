"""``chunkmill worker``: one Celery worker per GPU, started again when it dies.

It loads no model and holds no work, so what kills a worker (a text, a driver, the kernel short of memory) leaves it
alone. It is the first to know that a worker is dead, and how it died: it takes the leases back at once with that as
evidence, where the poller would wait until they run out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.db.connect import create_db, refusal
from chunkmill.embedded.environment import Environment
from chunkmill.errors import ChunkmillError
from chunkmill.ledger.dead.deaths import TakenBack, take_back_from
from chunkmill.ledger.work.chunk_batches import release_all
from chunkmill.ledger.work.usage import book_released
from chunkmill.telemetry.logging import configure
from chunkmill_workers.host.gpu import visible_gpus
from chunkmill_workers.process.lease import owner_name
from chunkmill_workers.supervisor.supervision import AfterExit, Place, arguments_for, back_off, plan_places, read_ending

logger = logging.getLogger("chunkmill_workers.supervisor.supervisor")  # also where this file is `__main__`

WORKER = (sys.executable, "-m", "celery", "-A", "chunkmill_workers", "worker", "-Q", "gpu")
PARENT = "CHUNKMILL_SUPERVISOR_PID"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

KILL_SECONDS = 12.0
"""From the first signal on. A worker drains in 5 s and some platforms leave 15: what is there at 12 hangs."""
LEAVE_SECONDS = 13.0
"""From the first signal on: the end, even where a process cannot be killed because its driver does not answer."""
REPORT_SECONDS = 1.0
"""What the last reports to the ledger get then; past that, the poller does the same when the leases run out."""


def supervisor_is_gone() -> bool:
    """In a worker: the supervisor that started this process is dead, and nobody would stop or restart the worker.

    False in a worker that no supervisor started. The kernel gives an orphan another parent at once.
    """
    supervisor = os.environ.get(PARENT)
    return supervisor is not None and os.getppid() != int(supervisor)


@dataclass
class _Post:
    """A place and its process: running, or waiting for ``start_at``, or, with neither, left empty."""

    place: Place
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    start_at: float | None = 0.0
    started_at: float = 0.0
    failures: int = 0


class Supervisor:
    """Keeps a process in each place until it is told to stop. It runs in the main thread, whose signals it takes.

    ``on_end`` is called with the pid of each process that ended and the evidence, or None where it was told to stop:
    what it still held says nothing about the work. It must not wait.
    """

    def __init__(
        self, places: Sequence[Place], command: Sequence[str], on_end: Callable[[int, str | None], None]
    ) -> None:
        alone = len(places) == 1
        self._posts = [_Post(place, arguments_for(place, command, alone=alone)) for place in places]
        self._on_end = on_end
        self._stop_at: float | None = None
        """When the first signal to stop came."""
        self._killed = False
        self._code = os.EX_OK

    def run(self) -> int:
        """Until no process is left, or none may be waited for any more. Returns the exit code."""
        with _signals() as wait:
            while True:
                self._start_due()
                if not any(post.process or post.start_at is not None for post in self._posts) or self._is_late():
                    return self._code
                for number in wait(self._pause()):
                    if number in STOP_SIGNALS:
                        self._ask_to_stop(signal.Signals(number))
                self._see_who_ended()
                self._kill_late()

    def _start_due(self) -> None:
        for post in self._posts:
            if post.start_at is None or post.start_at > time.monotonic():
                continue
            post.start_at, post.started_at = None, time.monotonic()
            try:
                # A session of its own: a terminal's Ctrl-C would reach it beside the signal from here, and a worker
                # that is told twice drops what it holds.
                post.process = subprocess.Popen(
                    post.command,
                    env=os.environ | post.place.environment | {PARENT: str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:  # no memory, or no process left
                self._start_later(post, f"worker on {post.place.name}: could not be started: {error}")
            else:
                logger.info("worker on %s: started, pid %s", post.place.name, post.process.pid)

    def _pause(self) -> float | None:
        """Seconds until something is due by the clock; None: nothing is."""
        due = [post.start_at for post in self._posts if post.start_at is not None]
        if self._stop_at is not None:
            due.append(self._stop_at + (LEAVE_SECONDS if self._killed else KILL_SECONDS))
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _ask_to_stop(self, asked_by: signal.Signals) -> None:
        """SIGTERM to every process for each signal that came: a worker drains at the first and ends at the second."""
        running = [post.process for post in self._posts if post.process is not None]
        if self._stop_at is None:
            self._stop_at, self._code = time.monotonic(), os.EX_OK
            for post in self._posts:
                post.start_at = None
        logger.info("%s: telling %s of %s workers to stop", asked_by.name, len(running), len(self._posts))
        for process in running:
            process.send_signal(signal.SIGTERM)

    def _see_who_ended(self) -> None:
        for post in self._posts:
            if post.process is None or (returncode := post.process.poll()) is None:
                continue
            pid, post.process = post.process.pid, None
            ending = read_ending(returncode)
            who = f"worker on {post.place.name}, pid {pid}"
            evidence = f"killed {KILL_SECONDS:g} s after SIGTERM" if self._killed else ending.evidence
            innocent = self._stop_at is not None or ending.then is AfterExit.DRAINED
            self._on_end(pid, None if innocent else evidence)
            if self._stop_at is not None:
                logger.info("%s: %s", who, evidence)
            elif ending.then is AfterExit.RESTART:
                self._start_later(post, f"{who}: {evidence}")
            elif ending.then is AfterExit.MISCONFIGURED:
                self._code = os.EX_CONFIG
                logger.error("%s: %s, wrong configuration: its message above says what to mend", who, evidence)
            else:
                logger.info("%s: %s, it has drained and is not started again", who, evidence)

    def _start_later(self, post: _Post, what: str) -> None:
        now = time.monotonic()
        post.failures, delay = back_off(post.failures, now - post.started_at)
        post.start_at = now + delay
        logger.error("%s; starting again in %g s", what, delay)

    def _kill_late(self) -> None:
        if self._killed or self._stop_at is None or time.monotonic() < self._stop_at + KILL_SECONDS:
            return
        self._killed = True
        for post in self._posts:
            if post.process is not None:
                post.process.kill()

    def _is_late(self) -> bool:
        if self._stop_at is None or time.monotonic() < self._stop_at + LEAVE_SECONDS:
            return False
        for post in self._posts:
            if post.process is not None:
                logger.error("worker on %s, pid %s: SIGKILL did not end it", post.place.name, post.process.pid)
        return True


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[float | None], bytes]]:
    """A function that waits, at most so many seconds, and returns the numbers of the signals that came.

    Handlers that do nothing, and a socket that keeps the numbers: a signal interrupts no step of the loop, and one that
    comes just before the wait ends it.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

        def wait(seconds: float | None) -> bytes:
            select.select([reader], [], [], seconds)
            try:
                return reader.recv(4096)
            except BlockingIOError:
                return b""

        try:
            yield wait
        finally:
            signal.set_wakeup_fd(-1)


class TakeBack:
    """Takes the leases of dead workers back, in a thread of its own: Postgres may need long to say that it is away."""

    def __init__(self, db: sa.Engine) -> None:
        self._db = db
        self._reports: queue.SimpleQueue[tuple[int, str | None] | None] = queue.SimpleQueue()
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="take-back", daemon=True)
        self._thread.start()

    def report(self, pid: int, evidence: str | None) -> None:
        """A worker has ended, however it did: one that drained has nothing left. Without evidence it was told to go."""
        self._reports.put((pid, evidence))

    def close(self, timeout: float) -> None:
        self._reports.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (report := self._reports.get()) is not None:
            self._take_back(*report)

    def _take_back(self, pid: int, evidence: str | None) -> None:
        owner = owner_name(pid)
        try:
            with self._db.begin() as conn:
                if evidence is None:
                    book_released(conn, owner)
                    taken = TakenBack(available=release_all(conn, owner))
                else:
                    taken = take_back_from(conn, owner, evidence=evidence)
        except Exception as error:  # noqa: BLE001 - the next report must be heard
            if not self._is_away:
                logger.warning(
                    "leases of dead workers cannot be taken back at once; the poller does it when they run out: %s",
                    refusal(error),
                )
            self._is_away = True
        else:
            self._is_away = False
            if taken.total:
                logger.info(
                    "took back %s ChunkBatches of pid %s: %s of them cut, %s closed with a dead content",
                    taken.total, pid, taken.split, taken.buried,
                )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    configure()
    try:
        settings = Environment.load(start_embedded=False).settings
    except ChunkmillError as error:
        logger.error("%s", error)  # noqa: TRY400 - the message is for a person; a traceback would hide it
        return os.EX_TEMPFAIL if error.retryable else os.EX_CONFIG
    configure(settings.log_level, settings.log_format)
    device = settings.embedding_device
    places = plan_places(device, [] if device == "cpu" else visible_gpus())
    ledger = TakeBack(create_db(settings.require_database_url(), role="supervisor", pool_size=1))
    code = Supervisor(places, [*WORKER, *arguments], ledger.report).run()
    ledger.close(REPORT_SECONDS)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
