"""Homes of embedded stacks that are taken away, made anew, or half up; and that no test leaves a server behind."""

from __future__ import annotations

import fcntl
import os
import queue
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psycopg
import pytest

from chunkmill.embedded import Stack, StackStatus, process
from chunkmill.embedded.paths import server_account
from chunkmill.embedded.process import command_line, is_ours, start_detached
from chunkmill.errors import EmbeddedStackError
from tests.support.embedded_homes import folder_for_homes
from tests.support.waiting import PATIENCE, until

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


@pytest.fixture
def home() -> Iterator[Path]:
    with folder_for_homes() as folder:
        yield folder / "home"


class Locks:
    """The locks of homes, as another process holds them; and what a stack here is about to wait for."""

    def __init__(self) -> None:
        self.asked: queue.Queue[int] = queue.Queue()
        """The inode of each lock file that a stack asks for."""
        self._last = 0
        self._flock = fcntl.flock

    def flock(self, file: IO[str], how: int) -> None:
        lock = os.fstat(file.fileno()).st_ino
        if lock != self._last:  # a stack asks again and again
            self._last = lock
            self.asked.put(lock)
        self._flock(file, how)

    @contextmanager
    def held(self, home: Path) -> Iterator[int]:
        """Make a home and hold its lock. Yields the lock file's inode."""
        home.mkdir()
        (home / "chunkmill.lock").touch(mode=0o600)
        with (home / "chunkmill.lock").open("a") as file:
            self._flock(file, fcntl.LOCK_EX)
            yield os.fstat(file.fileno()).st_ino


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> Locks:
    made = Locks()
    monkeypatch.setattr("chunkmill.embedded.stack.fcntl.flock", made.flock)
    return made


class Beside:
    """A call in a thread, for tests that hold what it waits for."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.errors: list[BaseException] = []
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert self.ended
        assert self.errors == []

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001 - the test asks for it
            self.errors.append(error)


def test_the_lock_of_a_removed_home_is_no_lock(home: Path, locks: Locks) -> None:
    """Otherwise whoever waited for it would work in the new home beside the one that holds the new home's lock."""
    with locks.held(home) as old:
        waiting = Beside(Stack(home).down)
        assert locks.asked.get(timeout=PATIENCE) == old
        shutil.rmtree(home)
        new_lock = locks.held(home)
        new = new_lock.__enter__()
    try:
        until(lambda: waiting.ended or not locks.asked.empty())
        assert not waiting.ended
        assert locks.asked.get(timeout=PATIENCE) == new
    finally:
        new_lock.__exit__(None, None, None)
    waiting.join()


@pytest.mark.parametrize("call", [Stack.down, Stack.destroy])
def test_a_stack_that_somebody_else_destroys_meanwhile_is_down(
    home: Path, locks: Locks, call: Callable[[Stack], object]
) -> None:
    with locks.held(home) as lock:
        waiting = Beside(lambda: call(Stack(home)))
        assert locks.asked.get(timeout=PATIENCE) == lock
        shutil.rmtree(home)
    waiting.join()
    assert not home.exists()


def test_a_redis_that_ran_before_outlives_a_postgres_that_does_not_start(home: Path) -> None:
    """Workers elsewhere may use it; only what this very call has started is stopped again."""
    stack = Stack(home, fsync=False)
    redis_pid = stack.up().redis.pid
    stack._postgres.stop()
    (home / "postgres/data/PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedStackError, match="Postgres 16"):
        stack.up()
    assert stack.status().redis.pid == redis_pid


@needs_proc
def test_nothing_that_a_test_starts_outlives_it() -> None:
    """Not even servers that `down` does not know, because the files and folders that name them are gone."""
    with pytest.raises(KeyError), folder_for_homes() as folder:
        lost, half, whole = (Stack(folder / name, fsync=False) for name in ("lost", "half", "whole"))
        statuses = [stack.up() for stack in (lost, half, whole)]
        shutil.rmtree(lost.home)
        (half.home / "redis/redis.pid").unlink()
        raise KeyError("a test that fails")
    pids = [pid for status in statuses for pid in (status.postgres.pid, status.redis.pid)]
    assert [command_line(pid) for pid in pids if pid is not None] == [""] * 6
    assert not folder.exists()


def asked_of(status: StackStatus, *postgres_settings: str) -> dict[str, object]:
    """Settings of Postgres."""
    with psycopg.connect(status.database_url.replace("+psycopg", "")) as connection:
        return {name: connection.execute(f"SHOW {name}".encode()).fetchone()[0] for name in postgres_settings}  # type: ignore[index]


def test_a_stack_keeps_its_word_when_the_power_goes_and_opens_its_ports_to_this_machine_alone(home: Path) -> None:
    """A stack for tests is the exception, not the rule."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    status = Stack(home, port=ports[0], redis_port=ports[1]).up()
    written = dict(line.split(maxsplit=1) for line in (home / "redis/redis.conf").read_text().splitlines()[1:])
    wanted = {
        "listen_addresses": "127.0.0.1",
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
    }
    assert asked_of(status, *wanted) == wanted
    # At a port nobody may ask Redis for its settings.
    wanted = {"bind": "127.0.0.1", "appendonly": "yes", "appendfsync": "everysec"}
    assert {name: written.get(name) for name in wanted} == wanted


def test_a_process_is_waited_for_while_it_is_a_shell_or_has_no_arguments_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two, the kernel has loaded the program and not yet given it its arguments."""
    program, real, seen = shutil.which("sleep") or "sleep", process.command_line, []

    def command_line(pid: int) -> str:
        seen.append(("/bin/sh -c a b", "")[len(seen)] if len(seen) < 2 else real(pid))
        return seen[-1]

    monkeypatch.setattr(process, "command_line", command_line)
    pid = start_detached([program, "300"], Path(os.devnull), server_account())
    os.kill(pid, signal.SIGKILL)
    assert seen[2:][-1] == f"{program} 300 "


def test_a_process_that_has_just_been_started_is_known() -> None:
    """A shell starts it, and for a moment it is still that shell. Tried often, because that moment is short."""
    for _ in range(30):
        pid = start_detached([shutil.which("sleep") or "sleep", "300"], Path(os.devnull), server_account())
        try:
            assert is_ours(pid, ("sleep", "300"))
        finally:
            os.kill(pid, signal.SIGKILL)
