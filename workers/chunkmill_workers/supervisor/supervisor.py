"""``chunkmill worker``: runs one Celery worker per GPU, and starts it again when it dies.

The supervisor loads no model and holds no work, so what kills a worker (a text, a driver, the kernel when memory is
short) does not kill it. It is the first to know that a worker is dead and how it died. So it takes the leases back at
once and keeps that as evidence; the poller would wait until the leases end.
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

from chunkmill.db.connect import UNDEFINED_TABLE, create_db, refusal, sqlstate
from chunkmill.embedded.environment import Environment
from chunkmill.errors import ChunkmillError
from chunkmill.ledger.dead.deaths import TakenBackCounts, take_back_from
from chunkmill.ledger.work.chunk_batches import release_all
from chunkmill.ledger.work.usage import book_released
from chunkmill.monitor import reports
from chunkmill.settings import Settings
from chunkmill.system.python import module_command
from chunkmill.telemetry.logging import configure
from chunkmill_workers.host.gpu import visible_gpus
from chunkmill_workers.process.lease import owner_name
from chunkmill_workers.supervisor.supervision import (
    AfterExit,
    Place,
    arguments_for,
    back_off,
    is_suspicious,
    plan_places,
    read_ending,
)

logger = logging.getLogger("chunkmill_workers.supervisor.supervisor")  # also where this file is `__main__`

WORKER = module_command("chunkmill_workers", "worker", "-Q", "gpu")
PARENT = "CHUNKMILL_SUPERVISOR_PID"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

KILL_SECONDS = 12.0
"""How long after the first signal workers are killed. A worker drains in 5 s, and some platforms leave 15 s."""
LEAVE_SECONDS = 13.0
"""How long after the first signal the supervisor exits, even if a driver that hangs keeps a process from ending."""
REPORT_SECONDS = 1.0
"""How long the last reports to the ledger may take then. The poller does what they miss when the leases end."""


def supervisor_is_gone() -> bool:
    """Whether the supervisor that started this worker is dead, so that nobody would stop or restart the worker.

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
    """Keeps a process in each place until it is told to stop. It runs in the main thread and handles the signals.

    ``on_end`` is called with the pid of each process that ended and how it ended, or None if it was told to stop, as
    its end says nothing about the work then. ``on_crash_loop`` is called if a worker ends again and again, with the
    words for a log. Neither may wait.
    """

    def __init__(
        self,
        places: Sequence[Place],
        command: Sequence[str],
        on_end: Callable[[int, str | None], None],
        on_crash_loop: Callable[[str], None] = logger.error,
    ) -> None:
        alone = len(places) == 1
        self._posts = [_Post(place, arguments_for(place, command, alone=alone)) for place in places]
        self._on_end = on_end
        self._on_crash_loop = on_crash_loop
        self._stop_at: float | None = None
        """When the first signal to stop came."""
        self._killed = False
        self._code = os.EX_OK

    def run(self) -> int:
        """Run until no process is left, or ``LEAVE_SECONDS`` are over. Returns the exit code."""
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
                # In a session of its own: else a terminal's Ctrl-C would reach the worker beside the signal from here,
                # and a worker that is told twice to stop exits with what it holds.
                post.process = subprocess.Popen(
                    post.command,
                    env=os.environ | post.place.environment | {PARENT: str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:  # too little memory, or too many processes
                self._start_later(post, f"worker on {post.place.name}: could not be started: {error}")
            else:
                logger.info("worker on %s: started, pid %s", post.place.name, post.process.pid)

    def _pause(self) -> float | None:
        """How many seconds until something is due; None if nothing is."""
        due = [post.start_at for post in self._posts if post.start_at is not None]
        if self._stop_at is not None:
            due.append(self._stop_at + (LEAVE_SECONDS if self._killed else KILL_SECONDS))
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _ask_to_stop(self, asked_by: signal.Signals) -> None:
        """Send SIGTERM to every process. A worker drains at the first signal and exits at the second."""
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
                if is_suspicious(post.failures, returncode):
                    self._on_crash_loop(f"worker on {post.place.name} ended {post.failures} times in a row")
            elif ending.then is AfterExit.MISCONFIGURED:
                self._code = os.EX_CONFIG
                logger.error("%s: %s, because of a wrong configuration: its message says what to fix", who, evidence)
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
    """A function that waits for signals, for at most the given seconds, and returns the numbers of those that came.

    The handlers do nothing, and a socket keeps the numbers. So no signal interrupts a step of the loop, and a signal
    that comes just before the wait ends it.
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


class LeaseRecovery:
    """Takes back the leases of dead workers, in a thread of its own because Postgres may take long to answer."""

    def __init__(self, db: sa.Engine) -> None:
        self._db = db
        self._reports: queue.SimpleQueue[tuple[int, str | None] | None] = queue.SimpleQueue()
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="take-back", daemon=True)
        self._thread.start()

    def report(self, pid: int, evidence: str | None) -> None:
        """Report a worker that has ended. ``evidence`` says how, and is None if it was told to stop."""
        self._reports.put((pid, evidence))

    def close(self, timeout: float) -> None:
        self._reports.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        with contextlib.suppress(sa.exc.SQLAlchemyError), self._db.connect():
            pass  # the pool keeps the connection: who waits for a worker can see that one is being started
        while (report := self._reports.get()) is not None:
            self._take_back(*report)

    def _take_back(self, pid: int, evidence: str | None) -> None:
        owner = owner_name(pid)
        try:
            with self._db.begin() as conn:
                if reports.exist(conn):
                    reports.remove(conn, owner)  # else `status` would show a worker that is silent
                if evidence is None:
                    book_released(conn, owner)
                    taken = TakenBackCounts(available=release_all(conn, owner))
                else:
                    taken = take_back_from(conn, owner, evidence=evidence)
        except Exception as error:  # noqa: BLE001 - the next report must be handled
            # Without tables there is nothing to take back, and the worker has said that they are missing.
            if not self._is_away and sqlstate(error) != UNDEFINED_TABLE:
                logger.warning(
                    "leases of dead workers cannot be taken back at once; the poller does it when they end: %s",
                    refusal(error),
                )
            self._is_away = True
        else:
            self._is_away = False
            if taken.total:
                logger.info("took back what pid %s held: %s", pid, taken.sentence)


class QueueClearing:
    """Clears the queues of workers that end again and again, in a thread of its own because Redis may be away.

    What passes the door may still end a worker, by a fault of ours or of a library, and would meet the next one too. No
    work is lost, because the poller rings again for what is due.
    """

    def __init__(self, settings: Settings, command: Sequence[str]) -> None:
        self._settings = settings
        self._command = command

    def start(self, what_happened: str) -> None:
        threading.Thread(target=self._clear, args=(what_happened,), name="clear-queue", daemon=True).start()

    def _clear(self, what_happened: str) -> None:
        # Imported here because the supervisor stays small until it is needed.
        from chunkmill.broker import QUEUES, Broker, publish_errors

        broker = Broker.connect(self._settings)
        try:
            for queue in QUEUES:
                if any(queue in argument for argument in self._command):
                    logger.error(
                        "%s soon after its start. In case something in Redis ends it, queue %s was cleared: %s "
                        "doorbells were deleted, and the poller rings again for what is due. If this repeats, its "
                        "messages above say why.",
                        what_happened, queue, broker.clear(queue),
                    )  # fmt: skip
        except publish_errors() as error:
            logger.error("%s, and its queue cannot be cleared: %s", what_happened, refusal(error))  # noqa: TRY400
        finally:
            broker.close()


def main(arguments: Sequence[str]) -> int:
    configure()
    try:
        settings = Environment.load().settings
    except ChunkmillError as error:
        logger.error("%s", error)  # noqa: TRY400 - the message is for a person; a traceback would hide it
        return os.EX_TEMPFAIL if error.retryable else os.EX_CONFIG
    configure(settings.log_level, settings.log_format)
    device = settings.embedding_device
    places = plan_places(device, [] if device == "cpu" else visible_gpus())
    ledger = LeaseRecovery(create_db(settings.require_database_url(), role="supervisor", pool_size=1))
    command = [*WORKER, *arguments]
    code = Supervisor(places, command, ledger.report, QueueClearing(settings, command).start).run()
    ledger.close(REPORT_SECONDS)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
