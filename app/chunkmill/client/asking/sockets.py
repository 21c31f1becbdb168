"""Requests that are sent straight to workers on this machine, through sockets that the workers announce in Postgres.

Sockets only make this faster and may be missing: requests that no socket takes, or that a worker refuses or does not
answer, go through Postgres. A process has one connection to each worker, and one thread that reads from all of them. A
client that lives in one event loop has connections of its own, from which that loop reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.client.asking.listener import Mailbox, SocketAnswer
from chunkmill.db.connect import address_of
from chunkmill.domain import frames
from chunkmill.domain.frames import BadFrame, Frame, FrameKind, Question, Refusal
from chunkmill.machine import this_boot
from chunkmill.monitor import worker_sockets
from chunkmill.monitor.worker_sockets import WorkerSocket
from chunkmill.spaces.registry import Space

logger = logging.getLogger(__name__)

KNOWN_SECONDS = 3.0
"""How many seconds the list of workers with sockets is used before it is read again."""
RETRY_SECONDS = 1.0
"""How many seconds after an error no connection to the same worker is tried."""
AVOID_SECONDS = 3.0
"""How many seconds a worker is not asked after it said that it is leaving, or for a space after it said that it has not
loaded the model."""
SILENT_SECONDS = 4.0
"""How many seconds a worker with open requests may be silent before other workers get them. A worker reports every
second that it is alive."""
GREETING_SECONDS = 2.0
"""How many seconds a new connection has until both sides have proved that they know the token."""
IDLE_SECONDS = 30.0
"""How many seconds pass between two checks of an idle thread whether it is still needed."""
MOST_TEXTS, MOST_LARGE_TEXTS = 512, 64
"""How many texts may be under way on one connection for a short call, and for a large one, to send there too. If there
are more, the call asks through Postgres, where any worker takes its request."""
MOST_UNSENT_BYTES = 8 * 1024 * 1024
READ_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class _Open:
    """A request that a worker has."""

    id: int
    n_texts: int
    dimensions: int
    space_id: int
    mailbox: Mailbox


class _Connection:
    """A connection to one worker. Everything but ``sock`` and ``received`` is used with the mutex of the hub."""

    def __init__(self, home: Sockets, worker: WorkerSocket, sock: socket.socket) -> None:
        self.home = home
        self.worker = worker
        self.sock = sock
        self.received = bytearray()
        self.unsent = bytearray()
        self.nonce = secrets.token_bytes(frames.NONCE_BYTES)
        self.challenge: bytes | None = None
        self.is_ready = self.is_doomed = self.is_closed = False
        self.heard_at = time.monotonic()
        self.open: dict[int, _Open] = {}
        self.n_texts = 0
        self.avoided: dict[int, float] = {}
        """``space id → until when`` the worker is not asked for it."""

    def send(self, message: bytes) -> bool:
        """Send at once as much as the socket takes. Returns whether the thread is to send the rest."""
        self.unsent += message
        self.flush()
        return bool(self.unsent)

    def flush(self) -> None:
        # After an error the thread reads the end of the connection, and closes it.
        with contextlib.suppress(OSError):
            while self.unsent:
                del self.unsent[: self.sock.send(self.unsent)]

    def limit(self, now: float) -> float:
        """The time by which the worker must have sent something."""
        if not self.is_ready:
            return self.heard_at + GREETING_SECONDS
        if self.open:
            return self.heard_at + SILENT_SECONDS
        # While the connection is in use, the thread sleeps only for so short a time that no request need wake it.
        return now + (SILENT_SECONDS if now - self.heard_at < IDLE_SECONDS else IDLE_SECONDS)


class _Hub:
    """Connections, and whoever reads from them while there are any."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.connections: set[_Connection] = set()
        self._sleeps_until = 0.0

    def add(self, connection: _Connection) -> None:
        """Read from a connection too. With the mutex."""
        raise NotImplementedError

    def wake(self) -> None:
        """Let the reader look again. With the mutex."""
        raise NotImplementedError

    def wake_before(self, moment: float) -> None:
        """Let the reader look before ``moment``. With the mutex."""
        if self._sleeps_until > moment:
            self.wake()

    def forget_all(self) -> None:
        """In a child process: close what was inherited, which does not end the parent's connections."""
        for connection in self.connections:
            connection.sock.close()

    # --- where it is read ---------------------------------------------------------------------------------------------

    def _close_what_is_over(self) -> None:
        with self.mutex:
            self._sleeps_until = 0.0
            now = time.monotonic()
            over = [
                (connection, "it was silent for too long" if not connection.is_doomed else "")
                for connection in self.connections
                if connection.is_doomed or not connection.home.is_used or now >= connection.limit(now)
            ]
        for connection, why in over:
            self._close(connection, why)

    def _seconds_left(self) -> float:
        """For how long nothing else is to be done. With the mutex."""
        now = time.monotonic()
        self._sleeps_until = min(connection.limit(now) for connection in self.connections)
        return max(0.0, self._sleeps_until - now)

    def _attend(self, connection: _Connection, events: int) -> None:
        if connection.is_closed:
            return
        try:
            if events & selectors.EVENT_WRITE:
                with self.mutex:
                    connection.flush()
            if events & ~selectors.EVENT_WRITE:
                self._read(connection)
        except BlockingIOError:
            return
        except BadFrame as error:
            self._close(connection, f"it sent {error}")
        except OSError as error:
            self._close(connection, error.strerror or type(error).__name__)

    def _read(self, connection: _Connection) -> None:
        received = connection.sock.recv(READ_BYTES)
        if not received:
            self._close(connection, "it closed the connection")
            return
        connection.received += received
        with self.mutex:
            connection.heard_at = time.monotonic()
        most = frames.MOST_ANSWERED_BYTES if connection.is_ready else frames.MOST_STRANGE_BYTES
        for one in frames.take_frames(connection.received, most):
            if not connection.is_ready:
                self._greet(connection, one)
            elif one.kind in (FrameKind.ANSWER, FrameKind.REFUSAL):
                self._deliver(connection, one)
            elif one.kind != FrameKind.ALIVE:
                raise BadFrame("a frame that workers do not send")

    def _greet(self, connection: _Connection, one: Frame) -> None:
        token = connection.worker.token
        if one.kind == FrameKind.CHALLENGE and connection.challenge is None:
            connection.challenge = frames.read_challenge(one.body)
            mine = frames.proof(token, b"caller", connection.challenge, connection.nonce)
            with self.mutex:
                connection.send(frames.frame(FrameKind.HELLO, body=frames.pack_hello(connection.nonce, mine)))
        elif one.kind == FrameKind.WELCOME and connection.challenge is not None:
            if not frames.is_proof(one.body, frames.proof(token, b"worker", connection.challenge, connection.nonce)):
                raise BadFrame("a proof of another token")
            with self.mutex:
                connection.is_ready = True
        else:
            raise BadFrame("no greeting")

    def _deliver(self, connection: _Connection, one: Frame) -> None:
        with self.mutex:
            request = connection.open.get(one.number)
        if request is None:
            return  # it was cancelled
        embedded, is_avoided = None, False
        if one.kind == FrameKind.REFUSAL:
            is_avoided = frames.read_refusal(one.body) in (Refusal.SPACE, Refusal.LEAVES)
        else:
            embedded = frames.read_answer(one.body, request.n_texts, request.dimensions)
        with self.mutex:
            if connection.open.pop(one.number, None) is None:
                return  # it was cancelled meanwhile
            connection.n_texts -= request.n_texts
            if is_avoided:
                connection.avoided[request.space_id] = time.monotonic() + AVOID_SECONDS
        request.mailbox.deliver(SocketAnswer(request.id, embedded))

    def _close(self, connection: _Connection, why: str) -> None:
        """Close a connection, and leave its requests to others."""
        with self.mutex:
            self.connections.discard(connection)
            connection.is_closed = True
            connection.is_ready = False
            left = list(connection.open.values())
            connection.open.clear()
            connection.home.forget(connection)
        connection.sock.close()
        if why:
            logger.info("the connection to worker %s was closed: %s", connection.worker.name, why)
        for request in left:
            request.mailbox.deliver(SocketAnswer(request.id, None, is_suspect=not connection.is_doomed))


class _ThreadHub(_Hub):
    """A thread reads, from the first connection on until there is none."""

    def __init__(self) -> None:
        super().__init__()
        self._thread: threading.Thread | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def add(self, connection: _Connection) -> None:
        self.connections.add(connection)
        if self._thread is None:
            self._ends = socket.socketpair()
            for end in self._ends:
                end.setblocking(False)
            self._thread = threading.Thread(target=self._run, args=(self._ends,), name="chunkmill-sockets", daemon=True)
            self._thread.start()
        else:
            self.wake()

    def wake(self) -> None:
        if self._ends is not None:
            with contextlib.suppress(OSError):  # it is full, so that the thread wakes in any case
                self._ends[0].send(b"\0")

    def forget_all(self) -> None:
        super().forget_all()
        for end in self._ends or ():
            end.close()

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self, ends: tuple[socket.socket, socket.socket]) -> None:
        try:
            # Not epoll, which a forked process would share.
            with selectors.PollSelector() as selector:
                selector.register(ends[1], selectors.EVENT_READ)
                self._read_all(selector, ends[1])
        except Exception as error:  # the calls that wait must not wait for a thread that has ended
            logger.exception("for now requests go to workers through Postgres, because their sockets cannot be used")
            with self.mutex:
                connections = list(self.connections)
                self._thread = self._ends = None
            for connection in connections:
                self._close(connection, type(error).__name__)
        finally:
            for end in ends:
                end.close()

    def _read_all(self, selector: selectors.BaseSelector, woken: socket.socket) -> None:
        registered: dict[_Connection, int] = {}
        while True:
            seconds = self._look(selector, registered)
            if seconds is None:
                return
            for key, events in selector.select(seconds):
                if key.fileobj is woken:
                    with contextlib.suppress(BlockingIOError):
                        woken.recv(4096)
                else:
                    self._attend(key.data, events)

    def _look(self, selector: selectors.BaseSelector, registered: dict[_Connection, int]) -> float | None:
        """Close what is to be closed, and say for how long nothing else is to be done. None if the thread is to end."""
        self._close_what_is_over()
        with self.mutex:
            # They are closed already, so the selector must be given the descriptors that they had.
            for fd in [fd for fd, key in selector.get_map().items() if isinstance(key.data, _Connection)]:
                connection = selector.get_map()[fd].data
                if connection not in self.connections:
                    selector.unregister(fd)
                    del registered[connection]
            for connection in self.connections:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
                if connection not in registered:
                    selector.register(connection.sock, wanted, connection)
                elif registered[connection] != wanted:
                    selector.modify(connection.sock, wanted, connection)
                registered[connection] = wanted
            if not self.connections:
                self._thread = self._ends = None
                return None
            return self._seconds_left()


class _LoopHub(_Hub):
    """An event loop reads, so that an answer reaches the task that waits for it without another thread.

    Requests may be sent from any thread. A loop that is closed must be left before.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._reads: set[_Connection] = set()
        self._writes: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_woken = False

    def add(self, connection: _Connection) -> None:
        self.connections.add(connection)
        self.wake()

    def wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits in it
                self._loop.call_soon_threadsafe(self._look)

    def _close(self, connection: _Connection, why: str) -> None:
        # This comes before the close, because afterwards another file may have the same number.
        self._loop.remove_reader(connection.sock)
        self._loop.remove_writer(connection.sock)
        self._reads.discard(connection)
        self._writes.discard(connection)
        super()._close(connection, why)

    def _look(self) -> None:
        with self.mutex:
            self._is_woken = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._close_what_is_over()
        with self.mutex:
            for connection in self.connections:
                if connection not in self._reads:
                    self._reads.add(connection)
                    self._loop.add_reader(connection.sock, self._attend, connection, selectors.EVENT_READ)
                if connection.unsent and connection not in self._writes:
                    self._writes.add(connection)
                    self._loop.add_writer(connection.sock, self._write, connection)
            if self.connections:
                self._timer = self._loop.call_later(self._seconds_left(), self._look)

    def _write(self, connection: _Connection) -> None:
        self._attend(connection, selectors.EVENT_WRITE)
        with self.mutex:
            is_sent = not connection.unsent
        if is_sent and connection in self._writes:
            self._writes.discard(connection)
            self._loop.remove_writer(connection.sock)


class Sockets:
    """The workers of one database that this process can reach directly. It is thread-safe."""

    def __init__(self, hub: _Hub | None = None) -> None:
        self._own_hub = hub
        self._databases: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
        self._workers: dict[str, WorkerSocket] = {}
        self._connections: dict[str, _Connection] = {}
        self._not_before: dict[str, float] = {}
        self._unreachable: set[bytes] = set()
        """The tokens of workers for which the log already says that they cannot be reached."""
        self._read_at: float | None = None
        self._reading = threading.Lock()

    @property
    def _hub(self) -> _Hub:
        return self._own_hub or _hub

    @property
    def is_used(self) -> bool:
        """Whether a client of the database is left."""
        return bool(self._databases)

    def join(self, db: sa.Engine) -> None:
        """A client with these connections uses them."""
        with self._hub.mutex:
            self._databases.add(db)

    def leave(self, db: sa.Engine) -> None:
        """A client was closed. The connections go with the last of them."""
        with self._hub.mutex:
            self._databases.discard(db)
            if not self._databases:
                self._read_at = None
                for connection in self._connections.values():
                    connection.is_doomed = True
                self._hub.wake()

    @property
    def is_known(self) -> bool:
        """Whether it was read once which workers have sockets."""
        return self._read_at is not None

    @property
    def is_due(self) -> bool:
        """Whether :meth:`refresh` has something to do."""
        now = time.monotonic()
        with self._hub.mutex:
            return (
                self._read_at is None
                or now - self._read_at >= KNOWN_SECONDS
                or any(
                    name not in self._connections and now >= self._not_before.get(name, 0.0) for name in self._workers
                )
            )

    def refresh(self, transaction: Callable[[], AbstractContextManager[sa.Connection]]) -> None:
        """Read which workers have sockets, if that is not known, and connect to those of them that are new."""
        if not self._reading.acquire(blocking=False):
            return  # another call reads it
        try:
            now = time.monotonic()
            if self._read_at is None or now - self._read_at >= KNOWN_SECONDS:
                workers: list[WorkerSocket] = []
                with contextlib.suppress(sa.exc.ProgrammingError), transaction() as conn:  # a role that may not read it
                    workers = worker_sockets.read(conn, this_boot())
                with self._hub.mutex:
                    self._read_at = now
                    self._workers = {worker.name: worker for worker in workers}
            self._connect_all(now)
        finally:
            self._reading.release()

    def ask(self, space: Space, question: Question, mailbox: Mailbox, wake_at: int) -> int | None:
        """Send a request to the worker with the fewest texts under way. Returns its id, which is below 0.

        Its result is delivered to the mailbox, once. None if no worker takes it.
        """
        with self._hub.mutex:
            if not any(self._takes(connection, space, question) for connection in self._connections.values()):
                return None
        body = frames.pack_question(question)
        if body is None:
            return None
        trace = frames.trace_of(question, body)
        request_id = -next(_numbers)
        mailbox.expect_directly(request_id, wake_at=wake_at)
        with self._hub.mutex:
            takers = [one for one in self._connections.values() if self._takes(one, space, question)]
            connection = min(takers, key=lambda one: one.n_texts, default=None)
            if connection is not None:
                now, n = time.monotonic(), len(question.texts)
                if not connection.open:
                    connection.heard_at = now
                number = -request_id & 0xFFFFFFFF
                connection.open[number] = _Open(request_id, n, space.spec.dimensions, space.id, mailbox)
                connection.n_texts += n
                message = frames.frame(FrameKind.ASK, number, body)
                if trace and self._takes_traces(connection):
                    message = frames.frame(FrameKind.ASK_TRACED, number, trace + body)
                if connection.send(message):
                    self._hub.wake()
                else:
                    self._hub.wake_before(connection.limit(now))
                return request_id
        mailbox.forget_direct(request_id)
        return None

    def cancel(self, request_ids: Iterable[int]) -> list[int]:
        """Cancel these requests, for which nobody waits any more. Returns those that had no answer; none will be
        delivered for them.
        """
        numbers = {-request_id & 0xFFFFFFFF for request_id in request_ids}
        cancelled: list[int] = []
        with self._hub.mutex:
            for connection in self._connections.values():
                for number in numbers & connection.open.keys():
                    request = connection.open.pop(number)
                    connection.n_texts -= request.n_texts
                    cancelled.append(request.id)
                    if connection.send(frames.frame(FrameKind.CANCEL, number)):
                        self._hub.wake()
        return cancelled

    def forget(self, connection: _Connection) -> None:
        """The connection was closed. With the mutex of the hub."""
        name = connection.worker.name
        if self._connections.get(name) is connection:
            del self._connections[name]
            if not connection.is_doomed:
                self._not_before[name] = time.monotonic() + RETRY_SECONDS

    @property
    def ready(self) -> list[str]:
        """The names of the workers that can be asked now."""
        with self._hub.mutex:
            return sorted(name for name, connection in self._connections.items() if connection.is_ready)

    def _takes(self, connection: _Connection, space: Space, question: Question) -> bool:
        """Whether a worker may be asked now. With the mutex of the hub."""
        worker = self._workers.get(connection.worker.name)
        if worker is None or space.id not in worker.spaces or not connection.is_ready or connection.is_doomed:
            return False
        if connection.avoided.get(space.id, 0.0) > time.monotonic() or len(connection.unsent) > MOST_UNSENT_BYTES:
            return False
        room = MOST_TEXTS if question.urgency == 0 else MOST_LARGE_TEXTS
        return connection.n_texts + len(question.texts) <= room

    def _takes_traces(self, connection: _Connection) -> bool:
        """Whether the worker has announced that it continues traces. With the mutex of the hub."""
        worker = self._workers.get(connection.worker.name)
        return worker is not None and worker.takes_traces and worker.token == connection.worker.token

    def _connect_all(self, now: float) -> None:
        with self._hub.mutex:
            for worker in self._workers.values():
                connection = self._connections.get(worker.name)
                if connection is not None:
                    if connection.worker.token != worker.token:
                        connection.is_doomed = True  # another process has the name now
                        self._hub.wake()
                elif now >= self._not_before.get(worker.name, 0.0) and self._databases:
                    try:
                        sock = _connect(worker.address)
                    except OSError as error:
                        if worker.token not in self._unreachable:  # a worker in a container has other paths
                            logger.info("worker %s cannot be reached at its socket: %s", worker.name, error.strerror)
                        self._unreachable.add(worker.token)
                        self._not_before[worker.name] = now + RETRY_SECONDS
                        continue
                    self._connections[worker.name] = _Connection(self, worker, sock)
                    self._hub.add(self._connections[worker.name])
            self._not_before = {name: at for name, at in self._not_before.items() if at > now}
            self._unreachable &= {worker.token for worker in self._workers.values()}


def _connect(address: str) -> socket.socket:
    """A socket that is connected, or will be soon. Raises OSError."""
    kind, _, rest = address.partition(":")
    if kind == "unix":
        family, target = socket.AF_UNIX, rest
    elif kind == "tcp":
        # Workers listen on loopback only. If somebody writes another address into the table, this machine must not
        # connect to it.
        host, _, port = rest.rpartition(":")
        try:
            ip, number = ipaddress.ip_address(host.strip("[]")), int(port)
        except ValueError:
            raise OSError(0, "an address of a newer release") from None
        if not ip.is_loopback or not 0 < number < 65_536:
            raise OSError(0, "an address that is not of this machine")
        family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
        target = (str(ip), number)  # type: ignore[assignment]
    else:
        raise OSError(0, "an address of a newer release")
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect(target)
        except BlockingIOError:
            if family == socket.AF_UNIX:
                raise  # too many wait there already
    except BaseException:
        sock.close()
        raise
    return sock


_mutex = threading.Lock()
_hub = _ThreadHub()
_sockets: dict[str, Sockets] = {}
_of_loops: weakref.WeakKeyDictionary[sa.Engine, Sockets] = weakref.WeakKeyDictionary()
_numbers = itertools.count(1)


def live_in_loop(db: sa.Engine) -> None:
    """From now on the running loop reads from the workers for the client with these connections, until it is closed."""
    made = Sockets(_LoopHub(asyncio.get_running_loop()))
    made.join(db)
    with _mutex:
        _of_loops[db] = made


def sockets_of(db: sa.Engine) -> Sockets:
    """The sockets of this process for the database and schema of ``db``."""
    address = address_of(db)
    with _mutex:
        if (own := _of_loops.get(db)) is not None:
            return own
        made = _sockets.setdefault(address, Sockets())
    made.join(db)
    return made


def leave(db: sa.Engine) -> None:
    """A client with these connections was closed."""
    with _mutex:
        sockets = _of_loops.pop(db, None) or _sockets.get(address_of(db))
    if sockets is not None:
        sockets.leave(db)


def _begin_in_child() -> None:
    """A child process has no thread of its parent's, and must not read from its connections."""
    global _mutex, _hub
    for hub in (_hub, *(made._own_hub for made in _of_loops.values())):
        if hub is not None:
            hub.forget_all()
    _of_loops.clear()
    _mutex, _hub = threading.Lock(), _ThreadHub()
    _sockets.clear()


os.register_at_fork(after_in_child=_begin_in_child)
