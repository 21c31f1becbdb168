"""A socket straight into the worker: it answers what Postgres would, and whatever goes wrong with it, Postgres does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import AsyncClient, Client, WaitTimeout
from chunkmill.client.asking import inquiry, sockets
from chunkmill.client.asking.sockets import sockets_of
from chunkmill.domain import frames
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.frames import FrameKind
from chunkmill.domain.spaces import OnLong
from chunkmill.embedded import StackStatus
from chunkmill.errors import EngineError
from chunkmill.machine import this_boot
from chunkmill.monitor import worker_sockets
from chunkmill.settings import Settings
from chunkmill_workers.local import sockets as server_module
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.embedder import AwaitedRequest, WorkerLeaves
from chunkmill_workers.local.responder import EmbedResponder
from chunkmill_workers.local.sockets import WorkerSocketServer
from tests.conftest import client_for, fresh_settings
from tests.integration.conftest import count
from tests.integration.test_forks import child
from tests.support.askers import DIMENSIONS, answer, answering, claim, vector_of
from tests.support.waiting import PATIENCE, Call, until

LONG = 3 * PATIENCE


class Worker:
    """A worker's socket with a stand-in for its embedder: it answers at once, or when it is ``released``."""

    def __init__(self, db: sa.Engine, name: str, where: str, *, holds: bool = False) -> None:
        self.db, self.name = db, name
        self.stopping, self.broken = threading.Event(), None
        self.engines = SimpleNamespace(longest_step=lambda: (self.hangs, ""))
        self.hangs = 0.0
        self.n_open = 0
        self.holds = holds
        self.is_loaded = True
        self.asked: list[AwaitedRequest] = []
        self.server = WorkerSocketServer(self, self, where)  # type: ignore[arg-type]

    def ready_engine(self, _: object, *, use: bool = True) -> object:
        return self if self.is_loaded else None

    def submit(self, asked: AwaitedRequest) -> None:
        self.asked.append(asked)
        if not self.holds:
            self.answer(asked)

    @staticmethod
    def answer(asked: AwaitedRequest) -> None:
        """A text has as many tokens as characters."""
        tokens = np.array([len(text) for text in asked.texts], np.int32)
        asked.on_answer(EmbeddedTexts(np.stack([vector_of(text) for text in asked.texts]), tokens, tokens > 8))

    def close(self) -> None: ...

    def dies(self) -> None:
        """What the kernel does for a process that is killed: its connections are closed."""
        self.server._stopped.set()
        self.server._wake()


Start = Callable[..., Worker]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "s").mkdir(mode=0o700)
    return f"unix:{tmp_path}/s"


@pytest.fixture
def start(folder: str) -> Iterator[Start]:
    """Starts a worker's socket, which is announced when this returns."""
    started: list[Worker] = []

    def start(db: sa.Engine, name: str = "one:1", *, where: str = folder, **how: bool) -> Worker:
        worker = Worker(db, name, where, **how)
        worker.server.start()
        started.append(worker)
        worker.server.announce()
        return worker

    yield start
    for worker in started:
        worker.server.stop()


def connect(client: Client, *names: str) -> None:
    """Return when the client's process can ask these workers."""
    client._space(None, OnLong.TRUNCATE)
    reached = sockets_of(client._db)

    def is_ready() -> bool:
        reached._read_at = None
        reached.refresh(client._transaction)
        return set(names) <= set(reached.ready)

    until(is_ready, lambda: reached.ready, pause=0.01)


@pytest.fixture
def here(client: Client) -> Client:
    """A client whose space is registered, so that workers may announce it."""
    client._space(None, OnLong.TRUNCATE)
    return client


@pytest.mark.parametrize("where", ["unix", "tcp:127.0.0.1:0", "tcp:[::1]:0"])
def test_a_call_is_answered_through_the_socket_with_tokens_and_cuts(
    where: str, here: Client, db: sa.Engine, start: Start, folder: str
) -> None:
    worker = start(db, where=folder if where == "unix" else where)
    connect(here, "one:1")
    for kind in ("document", "query"):
        made = here.embed_texts(["text 3", "text 345", "text 3"], kind=kind, timeout=LONG)
        assert made.vectors.argmax(axis=1).tolist() == [3, 345, 3]
        assert (made.tokens.tolist(), made.truncated.tolist()) == ([6, 8, 6], [False, False, False])
    assert here.embed_texts(["text 00000345"], timeout=LONG, caller="Zoë").truncated.tolist() == [True]
    assert [(asked.kind, asked.urgency, asked.caller) for asked in worker.asked] == [
        ("document", 0, ""),
        ("query", 0, ""),
        ("document", 0, "Zoë"),
    ]
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT last_value, is_called FROM embed_requests_id_seq")).one().is_called is False


def test_the_worker_with_the_fewest_texts_under_way_is_asked(here: Client, db: sa.Engine, start: Start) -> None:
    one, two = start(db, "one:1", holds=True), start(db, "two:2", holds=True)
    connect(here, "one:1", "two:2")
    calls = [Call(lambda: here.embed(["text 1", "text 2", "text 3"], timeout=LONG))]
    until(lambda: one.asked or two.asked)
    busy, idle = (one, two) if one.asked else (two, one)
    for n in range(3):
        calls.append(Call(lambda n=n: here.embed([f"text {n}"], timeout=LONG)))
        until(lambda n=n: len(idle.asked) == n + 1)
    assert len(busy.asked) == 1
    for worker in (one, two):
        for asked in worker.asked:
            worker.answer(asked)
    assert [call.result().argmax(axis=1).tolist() for call in calls] == [[1, 2, 3], [0], [1], [2]]


def test_many_texts_go_both_ways_and_come_back_in_their_order(here: Client, db: sa.Engine, start: Start) -> None:
    worker = start(db, holds=True)
    connect(here, "one:1")
    texts = [f"text {n % DIMENSIONS} {n} {n % DIMENSIONS}" for n in range(700)]
    with answering(db) as answerer:
        call = Call(lambda: here.embed(texts, timeout=LONG))
        until(lambda: answerer.answered and len(worker.asked) == 2)  # MOST_LARGE_TEXTS
        for asked in worker.asked:
            worker.answer(asked)
        worker.holds = False
        assert call.result().argmax(axis=1).tolist() == [n % DIMENSIONS for n in range(700)]
    sent = [text for asked in [*worker.asked, *answerer.answered] for text in asked.texts]
    assert sorted(sent) == sorted(texts)


def test_a_worker_that_dies_leaves_its_requests_to_others_at_once(here: Client, db: sa.Engine, start: Start) -> None:
    worker = start(db, holds=True)
    connect(here, "one:1")
    calls = [Call(lambda n=n: here.embed([f"text {n}"], timeout=LONG)) for n in range(3)]
    until(lambda: len(worker.asked) == 3)
    assert count(db, "embed_requests") == 0
    worker.dies()
    with answering(db) as answerer:
        assert [call.result().argmax() for call in calls] == [0, 1, 2]
        # Each counts as a try, so that a text that kills workers has as few of them as in Postgres.
        assert [request.attempt for request in answerer.answered] == [2, 2, 2]
    assert not any(asked.is_wanted() for asked in worker.asked)
    for asked in worker.asked:
        worker.answer(asked)  # too late, and nobody hears it


@pytest.mark.parametrize("why", ["leaves", "full", "not loaded", "a text failed"])
def test_what_a_worker_refuses_is_asked_through_postgres(why: str, here: Client, db: sa.Engine, start: Start) -> None:
    worker = start(db, holds=True)
    connect(here, "one:1")
    if why == "leaves":
        worker.stopping.set()
    elif why == "full":
        worker.n_open = 10**6
    elif why == "not loaded":
        worker.is_loaded = False
    with answering(db) as answerer:
        call = Call(lambda: here.embed(["text 5"], timeout=LONG))
        if why == "a text failed":
            until(lambda: worker.asked)
            worker.asked[0].on_error(EngineError("text 0 of 1 got no vector"))
        assert call.result().argmax() == 5
        assert [(list(request.texts), request.attempt) for request in answerer.answered] == [(["text 5"], 1)]


def test_a_worker_that_left_is_not_asked_again_soon(here: Client, db: sa.Engine, start: Start) -> None:
    worker = start(db, holds=True)
    connect(here, "one:1")
    with answering(db):
        call = Call(lambda: here.embed(["text 5"], timeout=LONG))
        until(lambda: worker.asked)
        worker.asked[0].on_error(WorkerLeaves())
        assert call.result().argmax() == 5
        assert here.embed(["text 6"], timeout=LONG).argmax() == 6
    assert len(worker.asked) == 1


def test_a_worker_that_says_nothing_is_left(
    here: Client, db: sa.Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inquiry, "SLOW_SECONDS", LONG)
    monkeypatch.setattr(sockets, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(server_module, "TICK_SECONDS", 0.05)
    worker = start(db, holds=True)
    connect(here, "one:1")
    with answering(db) as answerer:
        call = Call(lambda: here.embed(["text 5"], timeout=LONG))
        until(lambda: worker.asked)
        told_at = sockets_of(here._db)._connections["one:1"].heard_at
        until(lambda: sockets_of(here._db)._connections["one:1"].heard_at > told_at + 1.5)  # it says that it is alive
        assert not answerer.answered
        worker.hangs = 10**6
        assert call.result().argmax() == 5
    assert len(answerer.answered) == 1


def test_a_request_that_a_worker_keeps_too_long_is_taken_back(
    here: Client, db: sa.Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inquiry, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(inquiry, "PATROL_SECONDS", 0.05)
    worker = start(db, holds=True)
    connect(here, "one:1")
    call = Call(lambda: here.embed(["text 5"], timeout=LONG))
    until(lambda: count(db, "embed_requests"))
    until(lambda: not worker.asked[0].is_wanted())
    worker.answer(worker.asked[0])  # nobody takes it, and the other answer counts
    request = claim(db)
    assert request is not None
    answer(db, request)
    assert call.result().argmax() == 5


def test_who_gives_up_takes_the_request_back(here: Client, db: sa.Engine, start: Start) -> None:
    worker = start(db, holds=True)
    connect(here, "one:1")
    with pytest.raises(WaitTimeout):
        here.embed(["text 5"], timeout=0.2)
    until(lambda: not worker.asked[0].is_wanted())
    assert worker.asked[0].deadline is not None
    assert sockets_of(here._db)._connections["one:1"].n_texts == 0
    assert count(db, "embed_requests") == 0


def test_tasks_wait_without_threads_and_a_cancelled_one_takes_its_request_back(
    settings: Settings, here: Client, db: sa.Engine, start: Start
) -> None:
    worker = start(db, holds=True)
    connect(here, "one:1")

    async def calls() -> None:
        async with AsyncClient(client_for(settings)) as client:
            before = threading.active_count()
            tasks = [asyncio.create_task(client.embed([f"text {n}"], timeout=LONG)) for n in range(40)]
            await asyncio.to_thread(until, lambda: len(worker.asked) == 40)
            assert threading.active_count() - before < 20
            tasks[7].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[7]
            await asyncio.to_thread(until, lambda: sum(not asked.is_wanted() for asked in worker.asked) == 1)
            for asked in worker.asked:
                worker.answer(asked)
            vectors = await asyncio.gather(*(task for n, task in enumerate(tasks) if n != 7))
        assert [vector.argmax() for vector in vectors] == [n for n in range(40) if n != 7]

    asyncio.run(calls())


def test_callers_ask_only_workers_of_their_own_database_and_machine(
    stack: StackStatus, here: Client, db: sa.Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = start(db, "one:1")
    with fresh_settings(stack) as settings, client_for(settings) as other:
        other._space(None, OnLong.TRUNCATE)
        theirs = start(other._db, "one:1")
        with monkeypatch.context() as far:
            far.setattr(server_module, "this_boot", lambda: "another machine")
            remote = start(db, "far:1")
        remote.server.announce()  # its own thread does so every few seconds
        connect(here, "one:1")
        connect(other, "one:1")
        for n in range(4):
            assert here.embed([f"text {n}"], timeout=LONG).argmax() == n
        assert other.embed(["text 9"], timeout=LONG).argmax() == 9
        assert (len(mine.asked), len(theirs.asked), len(remote.asked)) == (4, 1, 0)
        assert sockets_of(here._db).ready == ["one:1"]
        other._db.dispose()


# --- strangers -------------------------------------------------------------------------------------------------------


class Stranger:
    """A program that connects to a worker's socket, with the worker's token or another one."""

    def __init__(self, worker: Worker, token: bytes | None = None) -> None:
        assert worker.server.address is not None
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(worker.server.address.removeprefix("unix:"))
        self.challenge = frames.read_challenge(self.read()[1])
        if token is not None:
            nonce = os.urandom(16)
            proof = frames.proof(token, b"caller", self.challenge, nonce)
            self.send(FrameKind.HELLO, frames.pack_hello(nonce, proof))

    def send(self, kind: int, body: bytes, number: int = 0) -> None:
        self.sock.sendall(struct.pack("<IBI", len(body), kind, number) + body)

    def read(self) -> tuple[int, bytes]:
        head = self.sock.recv(9, socket.MSG_WAITALL)
        size, kind, _ = struct.unpack("<IBI", head)
        return kind, self.sock.recv(size, socket.MSG_WAITALL) if size else b""

    def answer_until_closed(self) -> bytes:
        """What else the worker says until it closes the connection."""
        said = b""
        with self.sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while received := self.sock.recv(4096):
                said += received
        return said


def test_who_does_not_know_the_token_is_told_nothing(
    here: Client, db: sa.Engine, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(db)
    question = frames.pack_question(frames.Question(1, "0" * 64, "query", 0, 9.0, "", ["a secret text"]))
    assert question is not None
    with caplog.at_level(logging.DEBUG):
        for token in (None, b"", bytes(32), worker.server._token[:-1] + b"\0"):
            stranger = Stranger(worker, token)
            if token is None:
                stranger.send(FrameKind.ASK, question)
            assert stranger.answer_until_closed() == b""
    assert not worker.asked
    assert "secret" not in caplog.text
    assert worker.server._token.hex() not in caplog.text
    friend = Stranger(worker, worker.server._token)
    with friend.sock:
        assert friend.read()[0] == FrameKind.WELCOME


TRACE = b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"


def hostile() -> Iterator[tuple[str, bytes]]:
    def ask(body: bytes) -> bytes:
        return struct.pack("<IBI", len(body), FrameKind.ASK, 1) + body

    def traced(body: bytes) -> bytes:
        return struct.pack("<IBI", len(body), FrameKind.ASK_TRACED, 1) + body

    head = struct.Struct("<I32sBBfHI")
    fine = (1, bytes(32), 0, 0, 9.0, 0, 1)

    def changed(at: int, value: Any) -> bytes:
        return head.pack(*fine[:at], value, *fine[at + 1 :]) + struct.pack("<I", 4) + b"text"

    yield "a body of 4 GiB", struct.pack("<IBI", 2**32 - 1, FrameKind.ASK, 1)
    yield "a trace that ends too early", traced(b"00-" + b"1" * 32)
    yield "a trace that is none", traced(b"00-" + b"G" * 52 + head.pack(*fine) + struct.pack("<I", 4) + b"text")
    yield "a trace without a request", traced(TRACE)
    yield "a trace, and a request that is none", traced(TRACE + changed(2, 7))
    yield "an unknown frame", struct.pack("<IBI", 0, 99, 1)
    yield "a frame of workers", struct.pack("<IBI", 0, FrameKind.ANSWER, 1)
    yield "an empty request", ask(b"")
    yield "no texts", ask(changed(6, 0))
    yield "four thousand million texts", ask(changed(6, 2**32 - 1))
    yield "an unknown kind", ask(changed(2, 7))
    yield "an unknown urgency", ask(changed(3, 7))
    yield "time without end", ask(changed(4, float("inf")))
    yield "no time at all", ask(changed(4, float("nan")))
    yield "a caller that is not there", ask(changed(5, 900))
    yield "a size that is not there", ask(head.pack(*fine) + struct.pack("<I", 2**32 - 1) + b"text")
    yield "bytes at the end", ask(changed(0, 1) + b"!")
    yield "no UTF-8", ask(head.pack(*fine) + struct.pack("<I", 4) + b"\xff\xfe\xfd\xfc")


def test_a_hostile_frame_ends_its_connection_and_nothing_else(
    here: Client, db: sa.Engine, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(db)
    connect(here, "one:1")
    for what, message in hostile():
        stranger = Stranger(worker, worker.server._token)
        assert stranger.read()[0] == FrameKind.WELCOME
        stranger.sock.sendall(message)
        assert stranger.answer_until_closed() == b"", what
    assert not worker.asked
    assert here.embed(["text 8"], timeout=LONG).argmax() == 8
    assert len(worker.asked) == 1


def test_a_number_in_use_ends_the_connection(here: Client, db: sa.Engine, start: Start) -> None:
    worker = start(db, holds=True)
    space = here._space(None, OnLong.TRUNCATE)
    stranger = Stranger(worker, worker.server._token)
    question = frames.Question(space.id, space.spec.fingerprint, "query", 0, 9.0, "", ["text 1"])
    for _ in range(2):
        stranger.send(FrameKind.ASK, frames.pack_question(question) or b"", number=7)
    stranger.answer_until_closed()
    assert [asked.is_wanted() for asked in worker.asked] == [False]


def test_nobody_who_listens_at_a_workers_address_gets_a_text(
    here: Client, db: sa.Engine, start: Start, tmp_path: Path
) -> None:
    """Another program has the address of a worker that was killed."""
    worker = start(db)
    assert worker.server.address is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as impostor:
        impostor.bind(f"{tmp_path}/impostor")
        impostor.listen()
        impostor.settimeout(PATIENCE)
        worker.server.address = f"unix:{tmp_path}/impostor"
        worker.server.announce()
        with answering(db) as answerer:
            assert here.embed(["text 5"], timeout=LONG).argmax() == 5
            caught, _ = impostor.accept()
            with caught:
                caught.settimeout(PATIENCE)
                caught.sendall(frames.frame(FrameKind.CHALLENGE, body=frames.pack_challenge(bytes(16))))
                hello = caught.recv(4096)
                assert worker.server._token not in hello
                caught.sendall(frames.frame(FrameKind.WELCOME, body=hello[-32:]))  # its own proof sent back
                assert caught.recv(4096) == b""
            assert here.embed(["text 6"], timeout=LONG).argmax() == 6
            assert len(answerer.answered) == 2


def test_no_row_of_a_worker_chooses_whom_a_caller_asks(here: Client, db: sa.Engine, start: Start) -> None:
    """Whoever writes rows of workers may write any address."""
    worker = start(db)
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        elsewhere.setblocking(False)
        port = elsewhere.getsockname()[1]
        addresses = [
            f"tcp:0.0.0.0:{port}",
            f"tcp:localhost:{port}",
            "tcp:127.0.0.1:http",
            "tcp:127.0.0.1:99999",
            "tcp:",
        ]
        for number, address in enumerate(addresses):
            with db.begin() as conn:
                worker_sockets.write(conn, this_boot(), f"odd:{number}", address, bytes(32), worker.server._spaces)
        connect(here, "one:1")
        assert here.embed(["text 4"], timeout=LONG).argmax() == 4
        assert sockets_of(here._db).ready == ["one:1"]
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


# --- processes -------------------------------------------------------------------------------------------------------


def test_sockets_of_workers_that_were_killed_are_deleted_and_their_rows_do_no_harm(
    here: Client, db: sa.Engine, start: Start, folder: str
) -> None:
    path = Path(folder.removeprefix("unix:")) / "1-dead.sock"
    of_others = path.with_name("notes.sock")
    of_others.write_text("This is no socket.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    living = start(db, "one:1")
    assert not path.exists()
    assert of_others.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    gone = start(db, "gone:2")
    gone.server.address = f"unix:{path}"
    gone.server.announce()
    connect(here, "one:1")
    assert here.embed(["text 4"], timeout=LONG).argmax() == 4
    assert sockets_of(here._db).ready == ["one:1"]
    assert (len(living.asked), len(gone.asked)) == (1, 0)


def test_a_worker_that_ends_takes_its_socket_and_its_row_along(
    here: Client, db: sa.Engine, start: Start, folder: str
) -> None:
    worker = start(db)
    connect(here, "one:1")
    worker.server.stop()
    assert count(db, "worker_sockets") == 0
    assert not list(Path(folder.removeprefix("unix:")).iterdir())
    with answering(db):
        assert here.embed(["text 4"], timeout=LONG).argmax() == 4


def test_a_folder_that_others_may_write_to_gets_no_socket(
    here: Client, db: sa.Engine, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert start(db, where=f"unix:{tmp_path}/open").server.address is None
    assert "WORKER_SOCKET" in caplog.text
    assert count(db, "worker_sockets") == 0


def test_by_default_only_this_user_reaches_the_socket(
    here: Client, db: sa.Engine, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    address = start(db, where="auto").server.address
    assert address is not None
    path = Path(address.removeprefix("unix:"))
    assert path.parent.parent == tmp_path
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    path.parent.chmod(0o755)
    assert start(db, where="auto").server.address is None


def test_a_forked_process_has_connections_of_its_own(here: Client, db: sa.Engine, start: Start) -> None:
    worker = start(db)
    connect(here, "one:1")
    assert here.embed(["text 1"], timeout=LONG).argmax() == 1

    def calls() -> None:
        connect(here, "one:1")
        for n in range(20, 40):
            assert here.embed([f"text {n}"], timeout=LONG).argmax() == n

    pid = child(calls)
    for n in range(20):
        assert here.embed([f"text {n}"], timeout=LONG).argmax() == n
    assert os.waitpid(pid, 0)[1] == 0
    assert here.embed(["text 2"], timeout=LONG).argmax() == 2
    assert len(worker.asked) == 42


def test_a_process_has_one_connection_and_one_thread_and_they_end_with_the_last_client(
    settings: Settings, here: Client, db: sa.Engine, start: Start
) -> None:
    workers = [start(db, "one:1"), start(db, "two:2")]
    connect(here, "one:1", "two:2")
    with client_for(settings) as second:
        connect(second, "one:1", "two:2")
        for n in range(4):
            second.embed([f"text {n}"], timeout=LONG)
        assert [len(worker.server._connections) for worker in workers] == [1, 1]
        assert sum(thread.name == "chunkmill-sockets" for thread in threading.enumerate()) == 1
    assert here.embed(["text 1"], timeout=LONG).argmax() == 1
    here.close()
    until(lambda: not any(worker.server._connections for worker in workers))
    until(lambda: not any(thread.name == "chunkmill-sockets" for thread in threading.enumerate()))


def test_a_setting_keeps_a_client_to_postgres(settings: Settings, here: Client, db: sa.Engine, start: Start) -> None:
    worker = start(db)
    connect(here, "one:1")
    with client_for(settings.model_copy(update={"worker_socket": "off"})) as off, answering(db):
        assert off.embed(["text 1"], timeout=LONG).argmax() == 1
    assert not worker.asked


def test_a_schema_without_the_table_is_served_through_postgres(here: Client, db: sa.Engine, start: Start) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("DROP TABLE worker_sockets"))
    start(db)
    with answering(db):
        assert here.embed(["text 1"], timeout=LONG).argmax() == 1


def test_a_worker_announces_only_what_it_answers_at_once_and_the_vectors_are_those_of_its_model(
    here: Client, context: WorkerContext, db: sa.Engine, folder: str
) -> None:
    cut, split = (here._space(None, on_long) for on_long in (OnLong.TRUNCATE, OnLong.SPLIT))
    engine = context.engine_for(cut)
    responder = EmbedResponder(context)
    server = WorkerSocketServer(context, responder.embedder, folder)
    responder.start()
    server.start()
    try:
        server.announce()
        with db.begin() as conn:
            assert conn.execute(sa.text("SELECT spaces FROM worker_sockets")).scalar_one() == [cut.id]
        context.engine_for(split)
        server.announce()
        with db.begin() as conn:
            assert conn.execute(sa.text("SELECT spaces FROM worker_sockets")).scalar_one() == [cut.id, split.id]
        connect(here, "test-worker")
        long = "many words in one long text " * 80
        made = here.embed_texts(["a text", long], kind="query", timeout=LONG)
    finally:
        server.stop()
        responder.stop()
    expected = engine.embed(["a text", long], kind="query", on_long=OnLong.TRUNCATE)
    np.testing.assert_allclose(made.vectors, expected.vectors, atol=1e-5)
    assert made.truncated.tolist() == [False, True]
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT is_called FROM embed_requests_id_seq")).scalar_one() is False
