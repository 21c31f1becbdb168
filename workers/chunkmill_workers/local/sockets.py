"""A worker's socket: callers on the same machine send requests straight to the embedder, without rows in Postgres.

It is an accelerator that may be missing. A worker that cannot listen goes on without it, and callers that cannot reach
it, or are refused, ask through Postgres. ``chunkmill.domain.frames`` describes what goes over the wire.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import selectors
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import psycopg
import sqlalchemy as sa

from chunkmill.db.connect import refusal
from chunkmill.domain import frames
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.frames import BadFrame, Frame, FrameKind, Question, Refusal
from chunkmill.domain.reasons import reason_of
from chunkmill.errors import DeviceFailed
from chunkmill.machine import this_boot
from chunkmill.monitor import worker_sockets
from chunkmill.monitor.reports import REPORT_SECONDS
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry import tracing
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.embedder import AwaitedRequest, Kind, NobodyWaits, RequestEmbedder, WorkerLeaves
from chunkmill_workers.local.responder import HANGS_SECONDS, MOST_OPEN

logger = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 64
MOST_TEXTS, MOST_BYTES = 1_024, 16 * 1024 * 1024
"""How many texts, and how many bytes of them, one connection may have under way."""
MOST_UNREAD_BYTES: Final = 64 * 1024 * 1024
"""A caller that leaves more of its answers unread is disconnected."""
STRANGER_SECONDS: Final = 5.0
"""How long a connection may take to prove that it knows the token."""
TICK_SECONDS: Final = 1.0
"""How often callers with open requests are told that the worker is alive."""
READ_BYTES: Final = 256 * 1024


class _Connection:
    """A caller's connection. The thread of the server reads from it; threads of the embedder write answers to it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.opened_at = time.monotonic()
        self.received = bytearray()
        self.nonce = secrets.token_bytes(frames.NONCE_BYTES)
        self.is_known = False
        """The caller has proved that it knows the token."""
        self.n_texts = self.n_bytes = 0
        self._mutex = threading.Lock()
        self._unsent = bytearray()
        self._is_closed = False
        self._open: dict[int, tuple[int, int]] = {}
        """``number → texts and bytes`` of the requests that the embedder has."""
        self._cancelled: set[int] = set()

    @property
    def has_open(self) -> bool:
        with self._mutex:
            return bool(self._open)

    @property
    def n_unsent(self) -> int:
        with self._mutex:
            return len(self._unsent)

    def begin(self, number: int, n_texts: int, n_bytes: int) -> bool:
        """Note a request. Returns False if there are too many. Raises :class:`BadFrame` if the number is in use."""
        with self._mutex:
            if number in self._open:
                raise BadFrame("the number of a request that is open")
            if self.n_texts + n_texts > MOST_TEXTS or self.n_bytes + n_bytes > MOST_BYTES:
                return False
            self._open[number] = n_texts, n_bytes
            self.n_texts += n_texts
            self.n_bytes += n_bytes
            return True

    def cancel(self, number: int) -> None:
        with self._mutex:
            if number in self._open:
                self._cancelled.add(number)

    def is_wanted(self, number: int) -> bool:
        with self._mutex:
            return not self._is_closed and number not in self._cancelled

    def end(self, number: int) -> bool:
        """The embedder is done with a request. Returns whether somebody waits for it."""
        with self._mutex:
            n_texts, n_bytes = self._open.pop(number)
            self.n_texts -= n_texts
            self.n_bytes -= n_bytes
            is_wanted = not self._is_closed and number not in self._cancelled
            self._cancelled.discard(number)
            return is_wanted

    def send(self, message: bytes) -> bool:
        """Send at once as much as the socket takes. Returns whether the rest is to be sent by the server's thread."""
        with self._mutex:
            if self._is_closed:
                return False
            self._unsent += message
            self._flush()
            return bool(self._unsent)

    def flush(self) -> None:
        """Send more of what is left."""
        with self._mutex:
            self._flush()

    def _flush(self) -> None:
        while self._unsent and not self._is_closed:
            try:
                sent = self.sock.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                return  # the server's thread will read the end of the connection
            del self._unsent[:sent]

    def close(self) -> None:
        with self._mutex:
            self._is_closed = True
            self._unsent.clear()
            self.sock.close()


class WorkerSocketServer:
    """Listens where ``where`` says: ``auto``, ``unix:FOLDER`` or ``tcp:HOST:PORT``. :meth:`start` returns at once.

    One thread reads from all connections. A second one writes the worker's row every few seconds, with the spaces whose
    models are loaded. Answers are sent by the threads of the embedder.
    """

    def __init__(self, context: WorkerContext, embedder: RequestEmbedder, where: str) -> None:
        self._context = context
        self._embedder = embedder
        self._where = where
        self._token = secrets.token_bytes(32)
        self._boot = this_boot()
        self.address: str | None = None
        """Where it listens; None if it does not."""
        self._path: Path | None = None
        self._spaces: dict[int, Space] = {}
        """The registered spaces that this worker answers at once."""
        self._connections: dict[int, _Connection] = {}
        self._stopped = threading.Event()
        self._woken, self._waker = socket.socketpair()
        self._threads: list[threading.Thread] = []
        self._said: str | None = None
        self._said_of_strangers: str | None = None

    def start(self) -> None:
        try:
            listening, self.address, self._path = _listen(self._where)
        except (OSError, ValueError) as error:
            logger.warning(
                "this worker has no socket for callers on this machine, who ask it through Postgres: WORKER_SOCKET=%s "
                "cannot be used (%s)", self._where, error,
            )  # fmt: skip
            return
        for end in (listening, self._woken, self._waker):
            end.setblocking(False)
        serve = partial(self._serve, listening)
        for name, work in (("worker-socket", serve), ("socket-announcer", self._announce_often)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Close all connections, so that their callers ask through Postgres."""
        self._stopped.set()
        self._wake()
        for thread in self._threads:
            thread.join(timeout=2)
        self._woken.close()
        self._waker.close()

    # --- who may ask --------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Write the worker's row once, with the spaces that it answers at once."""
        if self.address is None:
            return
        with self._context.db.begin() as conn:
            if not worker_sockets.exist(conn):
                return  # the schema of an older release
            spaces = registry.all_spaces(conn)
            self._spaces = {
                space.id: space for space in spaces if self._context.ready_engine(space, use=False) is not None
            }
            worker_sockets.write(
                conn,
                self._boot,
                self._context.name,
                self.address,
                self._token,
                self._spaces.keys(),
                takes_traces=tracing.is_on(),
            )

    def _announce_often(self) -> None:
        while not self._stopped.is_set():
            try:
                self.announce()
            except Exception as error:  # noqa: BLE001 - a worker that announces nothing is asked through Postgres
                self._say(error)
            else:
                self._said = None
            self._stopped.wait(REPORT_SECONDS)
        with contextlib.suppress(sa.exc.SQLAlchemyError, psycopg.Error), self._context.db.begin() as conn:
            if worker_sockets.exist(conn):
                worker_sockets.remove(conn, self._context.name)

    def _say(self, error: Exception) -> None:
        is_store = isinstance(error, sa.exc.SQLAlchemyError | psycopg.Error)
        said = refusal(error) if is_store else reason_of(error)
        if said != self._said:
            logger.warning("callers on this machine do not learn of this worker's socket for now: %s", said)
        self._said = said

    # --- the thread that reads ----------------------------------------------------------------------------------------

    def _serve(self, listening: socket.socket) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._woken, selectors.EVENT_READ)
                selector.register(listening, selectors.EVENT_READ)
                self._serve_until_stopped(selector, listening)
        except Exception:
            logger.exception("the worker's socket is closed, and callers ask through Postgres")
        finally:
            self.address = None
            self._stopped.set()
            listening.close()
            if self._path is not None:
                with contextlib.suppress(OSError):
                    self._path.unlink()
            for connection in list(self._connections.values()):
                connection.close()
            self._connections.clear()

    def _serve_until_stopped(self, selector: selectors.BaseSelector, listening: socket.socket) -> None:
        ticked_at = time.monotonic()
        while not self._stopped.is_set():
            for key, events in selector.select(TICK_SECONDS):
                if key.fileobj is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                elif key.fileobj is listening:
                    self._accept(selector, listening)
                elif (connection := self._connections.get(key.fd)) is not None:
                    self._attend(selector, connection, events)
            if time.monotonic() - ticked_at >= TICK_SECONDS:
                ticked_at = time.monotonic()
                self._tick(selector, listening)
            for fd, connection in self._connections.items():
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.n_unsent else 0)
                if selector.get_key(fd).events != wanted:
                    selector.modify(fd, wanted)

    def _accept(self, selector: selectors.BaseSelector, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            return
        except OSError:  # as when no descriptors are left: the next tick listens again
            selector.unregister(listening)
            return
        if len(self._connections) >= MOST_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(sock)
        self._connections[sock.fileno()] = connection
        selector.register(sock, selectors.EVENT_READ)
        connection.send(frames.frame(FrameKind.CHALLENGE, body=frames.pack_challenge(connection.nonce)))

    def _tick(self, selector: selectors.BaseSelector, listening: socket.socket) -> None:
        if listening not in selector.get_map():
            selector.register(listening, selectors.EVENT_READ)
        now, hangs = time.monotonic(), self._context.engines.longest_step()[0] > HANGS_SECONDS
        for connection in list(self._connections.values()):
            is_stranger = not connection.is_known and now - connection.opened_at > STRANGER_SECONDS
            if is_stranger or connection.n_unsent > MOST_UNREAD_BYTES:
                self._drop(selector, connection)
            elif connection.is_known and not hangs and connection.has_open:
                connection.send(frames.frame(FrameKind.ALIVE))

    def _attend(self, selector: selectors.BaseSelector, connection: _Connection, events: int) -> None:
        """Read what has come, and send more. Whatever goes wrong ends this connection, and nothing else."""
        try:
            if events & selectors.EVENT_WRITE:
                connection.flush()
            if events & selectors.EVENT_READ:
                received = connection.sock.recv(READ_BYTES)
                if not received:
                    self._drop(selector, connection)
                    return
                connection.received += received
                for one in self._frames_of(connection):
                    self._take(connection, one)
        except BlockingIOError:
            return
        except BadFrame as error:
            if str(error) != self._said_of_strangers:
                logger.warning("a connection to this worker's socket was closed: it sent %s", error)
            self._said_of_strangers = str(error)
            self._drop(selector, connection)
        except OSError:
            self._drop(selector, connection)
        except Exception as error:  # noqa: BLE001 - the message may quote a text
            logger.error("a connection to this worker's socket was closed: %s", type(error).__name__)  # noqa: TRY400
            self._drop(selector, connection)

    @staticmethod
    def _frames_of(connection: _Connection) -> Iterator[Frame]:
        """The frames that have come. Before the proof only small ones are read."""
        while True:
            most = frames.MOST_ASKED_BYTES if connection.is_known else frames.MOST_STRANGE_BYTES
            one = next(frames.take_frames(connection.received, most), None)
            if one is None:
                return
            yield one

    def _drop(self, selector: selectors.BaseSelector, connection: _Connection) -> None:
        fd = connection.sock.fileno()
        selector.unregister(connection.sock)
        self._connections.pop(fd, None)
        connection.close()

    def _take(self, connection: _Connection, one: Frame) -> None:
        if not connection.is_known:
            self._welcome(connection, one)
        elif one.kind == FrameKind.ASK:
            self._ask(connection, one, frames.read_question(one.body))
        elif one.kind == FrameKind.ASK_TRACED:
            self._ask(connection, one, frames.read_traced_question(one.body))
        elif one.kind == FrameKind.CANCEL:
            connection.cancel(one.number)
        else:
            raise BadFrame("a frame that callers do not send")

    def _welcome(self, connection: _Connection, one: Frame) -> None:
        if one.kind != FrameKind.HELLO:
            raise BadFrame("something else than its proof at first")
        nonce, given = frames.read_hello(one.body)
        if not frames.is_proof(given, frames.proof(self._token, b"caller", connection.nonce, nonce)):
            raise BadFrame("a proof of another token")
        connection.is_known = True
        mine = frames.proof(self._token, b"worker", connection.nonce, nonce)
        connection.send(frames.frame(FrameKind.WELCOME, body=mine))

    def _ask(self, connection: _Connection, one: Frame, question: Question) -> None:
        space = self._spaces.get(question.space_id)
        if self._context.stopping.is_set() or self._context.broken is not None:
            self._refuse(connection, one.number, Refusal.LEAVES)
        elif (
            space is None or space.spec.fingerprint != question.fingerprint or self._context.ready_engine(space) is None
        ):
            self._refuse(connection, one.number, Refusal.SPACE)
        elif self._embedder.n_open >= MOST_OPEN or not connection.begin(one.number, len(question.texts), len(one.body)):
            self._refuse(connection, one.number, Refusal.FULL)
        else:
            kind: Kind = "query" if question.kind == "query" else "document"
            self._embedder.submit(
                AwaitedRequest(
                    space,
                    kind,
                    question.texts,
                    on_answer=partial(self._on_answer, connection, one.number),
                    on_error=partial(self._on_error, connection, one.number),
                    urgency=question.urgency,
                    caller=question.caller,
                    deadline=time.monotonic() + question.seconds,
                    is_wanted=partial(connection.is_wanted, one.number),
                    traceparent=question.traceparent,
                )
            )

    # --- in the threads of the embedder -------------------------------------------------------------------------------

    def _on_answer(self, connection: _Connection, number: int, answer: EmbeddedTexts) -> None:
        is_wanted = connection.end(number)
        COUNTS.add(m.EMBED_REQUESTS, 1, "answered" if is_wanted else "dropped")
        if is_wanted and connection.send(frames.frame(FrameKind.ANSWER, number, frames.pack_answer(answer))):
            self._wake()

    def _on_error(self, connection: _Connection, number: int, error: Exception) -> None:
        is_wanted = connection.end(number)
        if isinstance(error, DeviceFailed):
            self._context.broken = str(error)  # the watchdog ends this worker
            self._embedder.close()
        leaves = isinstance(error, DeviceFailed | WorkerLeaves)
        is_dropped = isinstance(error, NobodyWaits) or not is_wanted
        COUNTS.add(m.EMBED_REQUESTS, 1, "dropped" if is_dropped else "left")
        if is_wanted:
            self._refuse(connection, number, Refusal.LEAVES if leaves else Refusal.FAILED)

    def _refuse(self, connection: _Connection, number: int, reason: Refusal) -> None:
        if connection.send(frames.frame(FrameKind.REFUSAL, number, bytes([reason]))):
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is full, so that the thread wakes in any case, or closed
            self._waker.send(b"!")


# --- where to listen -------------------------------------------------------------------------------------------------


def _listen(where: str) -> tuple[socket.socket, str, Path | None]:
    """A socket that listens, its address, and the file that is to be deleted at the end. Raises OSError."""
    if where.startswith("tcp:"):
        host, _, port = where.removeprefix("tcp:").rpartition(":")
        address = ipaddress.ip_address(host.strip("[]"))
        if not address.is_loopback:
            raise ValueError("it is no loopback address")
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((str(address), int(port)))
            listening.listen(MOST_CONNECTIONS)
        except BaseException:
            listening.close()
            raise
        shown = f"[{address}]" if address.version == 6 else str(address)
        return listening, f"tcp:{shown}:{listening.getsockname()[1]}", None
    folder = _private_folder() if where == "auto" else Path(where.removeprefix("unix:"))
    _require_ours(folder)
    _delete_stale(folder)
    path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
    # Under its final name the socket listens already, so that another worker that starts now does not find it stale.
    hidden = path.with_suffix(".new")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(hidden))
        hidden.chmod(0o600 if where == "auto" else 0o660)
        listening.listen(MOST_CONNECTIONS)
        hidden.rename(path)
    except BaseException:
        listening.close()
        hidden.unlink(missing_ok=True)
        raise
    return listening, f"unix:{path}", path


def _private_folder() -> Path:
    """The folder of this user's sockets, in which nobody else can look for one."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"chunkmill-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    mode = folder.lstat()
    if mode.st_uid != os.getuid() or not stat.S_ISDIR(mode.st_mode) or stat.S_IMODE(mode.st_mode) & 0o077:
        raise OSError(f"{folder} is not a folder of this user's alone, with mode 0700")
    return folder


def _require_ours(folder: Path) -> None:
    """Raise OSError if others could put a socket of theirs in the place of ours."""
    state = folder.stat()
    if not stat.S_ISDIR(state.st_mode) or stat.S_IMODE(state.st_mode) & stat.S_IWOTH:
        raise OSError(f"{folder} is not a folder, or everybody may write to it")


def _delete_stale(folder: Path) -> None:
    """Delete the sockets of workers that were killed. At them nobody listens."""
    for path in folder.glob("*.sock"):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            continue  # a file refuses a connection too, and it is somebody else's
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # it is busy, or another user's
