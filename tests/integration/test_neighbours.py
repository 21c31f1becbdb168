"""Other users of this machine, and the embedded stack: what they reach, what they can block, and what root opens.

Tests that need a second user are skipped unless root runs them, who can be `nobody`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
import sqlalchemy as sa
from click.testing import CliRunner
from redis.backoff import NoBackoff
from redis.retry import Retry

from chunkmill.cli.__main__ import cli
from chunkmill.db.connect import create_db, migrate
from chunkmill.domain.spaces import Pooling, SpaceSpec
from chunkmill.embedded import Stack, StackStatus, temporary_folder
from chunkmill.embedded.paths import reachable_program, server_account
from chunkmill.embedded.process import command_line, is_ours
from chunkmill.errors import EmbeddedStackError
from chunkmill.spaces import registry
from tests.support.embedded_homes import folder_for_homes
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
NOBODY = 65534
AS_NOBODY = {"user": NOBODY, "group": NOBODY, "extra_groups": []}


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_for_homes() as path:
        yield path


@pytest.fixture
def home(folder: Path) -> Path:
    return folder / "home"


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def with_ports(home: Path) -> tuple[Stack, StackStatus]:
    port, redis_port = free_ports()
    stack = Stack(home, fsync=False, port=port, redis_port=redis_port)
    return stack, stack.up()


def plain(url: str) -> str:
    return url.replace("+psycopg", "")


# --- Ports --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened() -> Iterator[StackStatus]:
    """A stack with both ports, for the tests that only try to get in."""
    with folder_for_homes() as path:
        yield with_ports(path / "home")[1]


def test_nobody_gets_in_at_the_ports_without_the_password(opened: StackStatus) -> None:
    url = sa.make_url(opened.database_url)
    for user in ("postgres", "chunkmill", "root", "nobody"):
        for database in ("chunkmill", "postgres", "template1"):
            for password in ("", "wrong", user):
                with pytest.raises(psycopg.OperationalError, match=r"no pg_hba|no password|password authentication"):
                    psycopg.connect(
                        host="127.0.0.1", port=url.port, user=user, dbname=database, password=password,
                        passfile="/nowhere", connect_timeout=10,
                    )  # fmt: skip
    port = redis.connection.parse_url(opened.redis_url)["port"]
    for login in ({}, {"password": "x"}, {"username": "default", "password": ""}, {"username": "chunkmill"}):
        with redis.Redis(port=port, retry=Retry(NoBackoff(), 0), **login) as stranger:
            for command in ("PING", "INFO", "CONFIG GET dir", "EVAL return(1) 0", "LPUSH gpu x"):
                with pytest.raises((redis.AuthenticationError, redis.ResponseError)):
                    stranger.execute_command(*command.split())


def test_the_password_of_a_port_gives_no_way_to_programs_files_or_other_users(opened: StackStatus) -> None:
    with psycopg.connect(plain(opened.database_url), autocommit=True) as conn:
        rights = conn.execute(
            """
            SELECT rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls
            FROM pg_roles
            WHERE rolname = current_user
            """
        ).fetchone()
        assert rights == (False,) * 5
        for statement in (
            "COPY (SELECT 1) TO PROGRAM 'id'",
            "COPY (SELECT 1) TO '/tmp/chunkmill-written'",
            "SELECT pg_read_file('pg_hba.conf')",
            "ALTER SYSTEM SET listen_addresses = '*'",
            "SET ROLE postgres",
            "CREATE ROLE another SUPERUSER",
            "SELECT * FROM pg_authid",
            "CREATE EXTENSION adminpack",
        ):
            with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.FeatureNotSupported)):
                conn.execute(statement)
    with redis.Redis.from_url(opened.redis_url) as client:
        client.set("kept", "1")
        assert client.info("server")["redis_version"]
        for command in (
            "CONFIG SET dir /tmp", "CONFIG GET *", "SAVE", "BGSAVE", "MODULE LOAD /tmp/x.so", "DEBUG SLEEP 0",
            "REPLICAOF 127.0.0.1 1", "ACL LIST", "MONITOR", "SHUTDOWN", "FLUSHALL", "KEYS *", "CLIENT KILL TYPE normal",
            "MIGRATE 127.0.0.1 1 kept 0 1",
        ):  # fmt: skip
            with pytest.raises(redis.ResponseError, match=r"permission"):
                client.execute_command(*command.split())


def test_the_passwords_are_in_files_of_the_owner_alone_and_in_no_process_list(opened: StackStatus) -> None:
    assert opened.addresses is not None
    lines = dict(line.split("=", 1) for line in opened.addresses.read_text().splitlines())
    assert lines == {"DATABASE_URL": plain(opened.database_url), "REDIS_URL": opened.redis_url}
    passwords = [sa.make_url(url).password for url in lines.values()]
    for name in ("addresses.env", "servers.json"):
        status = (opened.home / name).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid())
    for file in [*opened.home.rglob("*.conf"), *opened.home.rglob("*.log")]:
        assert not [password for password in passwords if str(password) in file.read_text(errors="replace")]
    for server in (opened.postgres, opened.redis):
        for name in ("cmdline", "environ"):
            shown = Path(f"/proc/{server.pid}/{name}").read_text(errors="replace")
            assert not [password for password in passwords if str(password) in shown]


def test_up_with_ports_warns_and_says_where_the_passwords_are(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    env = {"CHUNKMILL_HOME": str(home)}
    port, redis_port = free_ports()
    Stack(home, fsync=False, port=port, redis_port=redis_port).up()

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(cli, list(arguments), env=env)
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    for arguments in (["up", "--port", str(port), "--redis-port", str(redis_port)], ["up"], ["status"]):
        output = said(*arguments)
        assert (output.count("ran already"), output.count("started")) == ((2, 0) if arguments[0] == "up" else (0, 0))
        assert f"postgresql://chunkmill:***@127.0.0.1:{port}/chunkmill" in output, "as psql takes it"
        assert f"redis://chunkmill:***@127.0.0.1:{redis_port}/0" in output
        assert str(home / "addresses.env") in output
        assert "Every user of this machine can reach these ports" in output
    for password in (sa.make_url(Stack(home).status().database_url).password, "postgres@"):
        assert str(password) not in output
    assert "up to date" in output
    assert "No check failed" in said("doctor")
    usage = said("up", "--help")
    assert usage.count("Every user of this machine can reach it.") == 2
    assert "asks for a password" in usage
    db = create_db(Stack(home).status().database_url, role="worker", pool_size=1)
    with db.connect():
        assert "are cut: 1 worker" in said("down")
    db.dispose()
    output = said("up")
    assert f"127.0.0.1:{port}/chunkmill" in output, "a port is remembered"
    assert (output.count("ran already"), output.count("started")) == (0, 2)
    assert "were open" not in said("down")
    assert "addresses.env" not in said("up", "--port", "0", "--redis-port", "0")


@needs_root
def test_another_user_gets_in_with_the_address_and_not_without(opened: StackStatus) -> None:
    """The same from a process of `nobody`, for whom the port is meant if the owner hands out the address."""
    url = sa.make_url(opened.database_url)
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("needs psql")
    stolen = [psql, "-w", "-h", "127.0.0.1", "-p", str(url.port), "-U", "postgres", "-d", "chunkmill", "-c", "SELECT 1"]
    refused = subprocess.run(
        stolen, capture_output=True, text=True, cwd="/", env={"PATH": "/usr/bin:/bin"}, **AS_NOBODY
    )
    assert (refused.returncode, "no pg_hba.conf entry" in refused.stderr) == (2, True)
    given = subprocess.run(
        [psql, plain(opened.database_url), "-c", "SELECT 1"], capture_output=True, text=True, cwd="/",
        env={"PATH": "/usr/bin:/bin"}, **AS_NOBODY,
    )  # fmt: skip
    assert given.returncode == 0, given.stderr
    for path in (opened.home, opened.addresses, opened.home / "postgres", opened.home / "redis/redis.sock"):
        looked = subprocess.run(["cat", str(path)], capture_output=True, text=True, **AS_NOBODY)
        assert "Permission denied" in looked.stderr


def test_what_was_made_at_the_socket_can_be_changed_at_the_port_and_the_other_way_round(home: Path) -> None:
    def register(status: StackStatus, revision: str) -> None:
        db = create_db(status.database_url, role="test", pool_size=1)
        with db.begin() as conn:
            registry.register(conn, SpaceSpec("local", "m", revision, 8, 256, Pooling.MEAN, normalize=True))
        db.dispose()

    first = Stack(home, fsync=False)
    migrate(first.up().database_url)
    register(first.status(), "a")
    first.down()
    second, status = with_ports(home)
    migrate(status.database_url)
    register(status, "b")
    with psycopg.connect(plain(status.database_url)) as conn:
        conn.execute("ALTER TABLE chunkmill.vectors_1 ADD COLUMN mine int")
        conn.execute("ALTER TABLE chunkmill.jobs ADD COLUMN mine int")
        left = conn.execute(
            """
            SELECT relname FROM pg_class
            WHERE relnamespace = 'chunkmill'::regnamespace AND relowner <> 'chunkmill'::regrole
            """
        ).fetchall()
        assert left == []
    assert Stack(home).status().database_url == status.database_url  # every command finds it by itself
    with redis.Redis.from_url(Stack(home).status().redis_url) as client:
        assert client.ping()
    second.down()
    third = first.up()
    assert third.addresses is None
    register(third, "c")
    assert with_ports_again(first, home)


def with_ports_again(running: Stack, home: Path) -> bool:
    running.down()
    status = with_ports(home)[1]
    with psycopg.connect(plain(status.database_url)) as conn:
        conn.execute("ALTER TABLE chunkmill.vectors_3 ADD COLUMN mine int")
    return status.running


def test_a_server_of_an_earlier_release_that_lets_everybody_in_is_named(home: Path) -> None:
    stack, status = with_ports(home)
    url = sa.make_url(status.database_url)
    with psycopg.connect(host=str(home / "postgres"), port=url.port, user="postgres", dbname="chunkmill") as conn:
        (rules,) = conn.execute("SHOW hba_file").fetchone() or ("",)
    assert rules == str(home / "postgres/pg_hba.conf")
    stack.down()
    # As an earlier release wrote and started it.
    (home / "postgres/data/pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 trust\n")
    old = Stack(home, fsync=False, port=url.port)
    settings = old._postgres._settings
    old._postgres._settings = lambda: [  # type: ignore[method-assign]
        f"hba_file={home}/postgres/data/pg_hba.conf" if word.startswith("hba_file=") else word for word in settings()
    ]
    old.up()
    with pytest.raises(EmbeddedStackError, match=r"every user of this machine.*chunkmill down.*--port"):
        Stack(home, fsync=False).up()


# --- Blocking and ending ------------------------------------------------------------------------------------


@pytest.fixture(params=["another user", "this user"])
def as_user(request: pytest.FixtureRequest) -> dict[str, object]:
    if request.param == "this user":
        return {}
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    return AS_NOBODY


@pytest.mark.skipif(shutil.which("yes") is None, reason="needs yes")
def test_a_process_with_the_title_of_a_server_is_no_server(home: Path, as_user: dict[str, object]) -> None:
    """Any user can run a program under any name and arguments."""
    stack = Stack(home, fsync=False)
    title = [f"{home}/redis-server", f"{home}/redis/redis.conf"]
    # It takes any argument, and stops at once because nobody reads what it writes.
    with subprocess.Popen(title, executable=shutil.which("yes"), stdout=subprocess.PIPE, cwd="/", **as_user) as process:  # type: ignore[call-overload]
        try:
            until(lambda: command_line(process.pid).startswith(title[0]))
            assert not is_ours(process.pid, ("-server", title[1]))
            assert stack.up().running
            assert stack.down().redis.pid is None
            assert process.poll() is None
        finally:
            process.kill()


@needs_root
def test_a_lock_that_another_user_holds_blocks_nobody(home: Path) -> None:
    """An earlier release made the lock readable for everybody, in a folder that everybody could pass through."""
    stack = Stack(home, fsync=False)
    stack.up()
    stack.down()
    lock = home / "chunkmill.lock"
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    home.chmod(0o711)
    lock.chmod(0o644)
    code = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        pytest.skip("needs a Python that every user can run")
    with subprocess.Popen(
        [python, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **AS_NOBODY
    ) as holder:  # type: ignore[call-overload]
        assert holder.stdout is not None
        holder.stdout.readline()
        assert stack.up().running
        assert not stack.down().running
        holder.kill()
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o710


def test_a_lock_that_is_never_released_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkmill.embedded.stack._LOCK_SECONDS", 0.0)
    stack = Stack(home, fsync=False)
    stack.up()
    with (home / "chunkmill.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedStackError, match=r"another process has held the lock"):
            stack.down()


@needs_root
def test_a_name_under_tmp_that_another_user_took_blocks_nobody(folder: Path) -> None:
    stack = Stack(folder / ("long" * 40), fsync=False)
    taken = []
    for _ in range(2):
        status = stack.up()
        for url in (status.database_url, status.redis_url.replace("unix://", "host=")):
            sockets = Path(url.partition("host=")[2].partition("&")[0].partition("?")[0])
            sockets = sockets.parent if sockets.name == "redis.sock" else sockets
            assert sockets.parent == Path("/tmp")  # noqa: S108 - that folder
            taken.append(sockets)
        stack.down()
        for sockets in taken:
            sockets.mkdir(exist_ok=True)
            os.chown(sockets, NOBODY, NOBODY)
    try:
        assert len(set(taken)) == 4
        assert stack.up().running
    finally:
        stack.destroy()
        for sockets in taken:
            shutil.rmtree(sockets)


# --- Root ---------------------------------------------------------------------------------------------------


def modes_above(path: Path) -> list[tuple[Path, int, int, int]]:
    folders = [(folder, folder.stat()) for folder in path.parents]
    return [(folder, status.st_mode, status.st_uid, status.st_gid) for folder, status in folders]


@needs_root
def test_root_opens_no_folder_and_says_which_one_is_closed(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    stack = Stack(closed / "inner" / "home", fsync=False)
    before = modes_above(closed / "x")
    with pytest.raises(EmbeddedStackError, match=rf"{closed} is closed to it.*CHUNKMILL_HOME"):
        stack.up()
    assert modes_above(closed / "x") == before

    fine = Stack(folder / "new" / "home", fsync=False)
    before = modes_above(folder / "x")
    status = fine.up()
    assert modes_above(folder / "x") == before
    uid = server_account().uid
    for server in (status.postgres, status.redis):
        assert Path(f"/proc/{server.pid}").stat().st_uid == uid != 0


@needs_root
def test_a_redis_folder_that_root_made_is_handed_to_the_servers_user(home: Path) -> None:
    """Redis ran as root before, and its append-only files are root's."""
    stack = Stack(home, fsync=False)
    with redis.Redis.from_url(stack.up().redis_url) as client:
        client.set("kept", "yes")
    stack.down()
    for entry in [home / "redis", *(home / "redis").rglob("*")]:
        os.chown(entry, 0, 0)
    with redis.Redis.from_url(stack.up().redis_url) as client:
        assert client.get("kept") == b"yes"


@needs_root
def test_programs_below_a_closed_folder_are_copied_and_run(folder: Path, home: Path) -> None:
    account = server_account()
    closed = folder / "closed"
    (closed / "tree/bin").mkdir(parents=True)
    (closed / "tree.libs").mkdir()
    (closed / "tree.libs/word").write_text("here\n")
    closed.chmod(0o700)
    program = closed / "tree/bin/program"
    program.write_text('#!/bin/sh\ncat "${0%/*}/../../tree.libs/word"\n')
    program.chmod(0o700)
    (closed / "tree.libs/word").chmod(0o600)
    home.mkdir()
    home.chmod(0o711)
    copy = reachable_program(program, closed / "tree", home, account)
    assert copy == reachable_program(program, closed / "tree", home, account)
    assert home in copy.parents
    as_server = {"user": account.uid, "group": account.gid, "extra_groups": []}
    assert subprocess.run([copy], capture_output=True, text=True, cwd="/", **as_server).stdout == "here\n"
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert not os.access(copy, os.W_OK, effective_ids=True) or copy.stat().st_uid == 0
    # One that can be reached is run where it is.
    open_program = folder / "program"
    shutil.copy(program, open_program)
    open_program.chmod(0o755)
    assert reachable_program(open_program, open_program, home, account) == open_program


@needs_root
def test_a_temporary_folder_is_open_to_the_servers_user_alone() -> None:
    folder = temporary_folder("chunkmill-test-")
    try:
        status = folder.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o710, server_account().gid)
    finally:
        folder.rmdir()
