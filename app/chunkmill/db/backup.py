"""A backup of an installation as one file, and its return: by ``pg_dump``, ``pg_restore`` and ``psql``.

The file is an archive of ``pg_dump`` (format ``custom``), so that Postgres' own tools can read it too. It holds the
schema of the installation as it was at one moment. It does not hold what can be made again: the segments of serving
indexes, which pollers build; the views of the collections; and the rows of unlogged tables, such as requests that
somebody waited for.

A restore is one transaction of ``psql``, whose last word is COMMIT. Whatever ends before that leaves the database as it
was: a broken file, a full disk, a kill.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psycopg.conninfo
import sqlalchemy as sa

from chunkmill.db import home
from chunkmill.db.programs import Programs, environment
from chunkmill.errors import InvalidInput, StoreUnavailable, install_command

LOCK_SECONDS = 60
"""For how long a dump waits for a table that a migration holds."""
Progress = Callable[[str, int], None]
"""It is told what is written now and how many bytes were, several times a second."""
_PIECE = 1 << 20
_SECRET_OPTIONS = ("sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
"""Of libpq, beside the password. No variable of the environment can hold them."""
_TICK_SECONDS = 0.2
_REMEMBERED_LINES = 20
_NEVER_RESTORED = re.compile(r"^\d+; \d+ \d+ (SCHEMA|EXTENSION|COMMENT - (SCHEMA|EXTENSION)) ")
"""Entries of an archive that a role without rights on the whole database could not make. They are there already."""
_RESTRICTED = re.compile(rb"(?:--[^\n]*\n|\n)*\\restrict \w+\n")
"""How a script of ``pg_restore`` begins since August 2025: from here on ``psql`` obeys only SQL. Otherwise a row or a
name in a backup could be one of its own commands, such as one that runs a program (CVE-2025-8714)."""
_NEW_SETTING = b"SET transaction_timeout = 0;\n"
"""Programs of Postgres 17 and later write it, and servers before 17 do not know it."""


@dataclass(frozen=True, slots=True)
class Archive:
    """What a file of :func:`dump` says about itself."""

    file: Path
    schema: str
    """The schema that holds the installation."""
    migration: str
    oldest_code: str | None
    """The newest migration of the oldest code that may run on it."""
    server: int
    """The major version of the server that it is from."""
    taken_at: datetime
    types: str | None
    """The schema of pgvector's types, as SQL writes it. None if there is no table of vectors."""
    entries: tuple[str, ...] = field(repr=False)
    """The lines of its table of contents that a restore makes."""


def dump(url: str, schema: str, file: Path, programs: Programs, progress: Progress) -> None:
    """Write the installation in ``schema`` into ``file``, which only this user can read. It replaces no other file.

    The file has another name until it is whole. Everybody works on meanwhile: a dump sees what was committed when it
    began. Raises :class:`StoreUnavailable` if ``pg_dump`` ends early; its words name no text of a chunk.
    """
    partial = file.with_name(f"{file.name}.partial")
    quoted = home.quoted(schema)
    command = [
        programs.command("pg_dump"), "--format=custom", "--compress=1", "--no-password", "--verbose",
        f"--schema={quoted}", f"--exclude-table={quoted}.segment_[0-9]+", "--no-unlogged-table-data",
        f"--lock-wait-timeout={LOCK_SECONDS}s", f"--dbname={_conninfo(url)}", f"--file={partial}",
    ]  # fmt: skip
    try:
        partial.unlink(missing_ok=True)
        partial.touch(0o600, exist_ok=False)  # pg_dump would let others read it
        _dump(command, url, partial, progress)
        try:
            file.hardlink_to(partial)  # unlike a rename, this never replaces a file
        except OSError:
            if file.exists():
                raise
            partial.rename(file)  # a file system without links
    except FileExistsError:
        raise InvalidInput(f"{file} was made by somebody else meanwhile, so the backup was not written.") from None
    except OSError as error:
        raise InvalidInput(f"the backup cannot be written into {file}: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _dump(command: list[str], url: str, partial: Path, progress: Progress) -> None:
    with _started(command, url) as running:
        while not running.ended.wait(_TICK_SECONDS):
            progress(running.what, partial.stat().st_size)
        if running.returncode:
            raise StoreUnavailable(
                f"the backup was not finished, because pg_dump ended with {running.returncode}: {running.last_words} "
                "Nothing was left behind."
            )
    progress("done", partial.stat().st_size)


def read_archive(file: Path, programs: Programs, known: Sequence[str]) -> Archive:
    """What a backup says about itself. ``known`` are this code's migrations. Raises :class:`InvalidInput` if the file
    is not one, or cannot be read.
    """
    listed = _read(programs, file, "--list").splitlines()
    head = "\n".join(line for line in listed if line.startswith(";"))
    server = re.search(r"Dumped from database version: (\d+)", head)
    taken = re.search(r"Archive created at (\d+-\d+-\d+ \d+:\d+:\d+) UTC", head)
    tables = [match[1] for line in listed if (match := re.match(r"\d+; \d+ \d+ TABLE (.+) chunk_batches \S+$", line))]
    if not server or not taken or not tables:
        raise InvalidInput(f"{file} is an archive of pg_dump, and it holds no installation of Chunkmill.")
    schema = tables[0]
    # The old table may belong to another program that shares the schema, so it counts only if there is no own one.
    migration = next(
        (
            revision
            for table in (home.VERSION_TABLE, home.OLD_VERSION_TABLE)
            if (revision := home.own_revision(_rows(programs, file, schema, table), known))
        ),
        None,
    )
    if migration is None:
        raise InvalidInput(f"{file} does not say which migration its tables are of, so it cannot be restored.")
    return Archive(
        file,
        schema,
        migration,
        min(_rows(programs, file, schema, "schema_compatibility"), default=None),
        int(server[1]),
        datetime.fromisoformat(taken[1]).replace(tzinfo=UTC),
        _types(programs, file),
        tuple(line for line in listed if line and not line.startswith(";") and not _NEVER_RESTORED.match(line)),
    )


def _rows(programs: Programs, file: Path, schema: str, table: str) -> list[str]:
    """What a table with one column holds, in order; nothing if the archive has no such table."""
    script = _read(programs, file, "--data-only", f"--schema={schema}", f"--table={table}")
    copies: list[str] = re.findall(r"^COPY [^\n]* FROM stdin;\n(.*?)^\\\.$", script, re.MULTILINE | re.DOTALL)
    return sorted(line for copy in copies for line in copy.splitlines())


def _types(programs: Programs, file: Path) -> str | None:
    """The schema that the columns of vectors name."""
    column = re.compile(rb"^    embedding (\S+)\.(?:vector|halfvec)\(\d+\)", re.MULTILINE)
    command = [programs.command("pg_restore"), "--schema-only", "--file=-", str(file)]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as made:
        assert made.stdout is not None  # noqa: S101 - a pipe was asked for
        for line in made.stdout:
            if match := column.match(line):
                made.kill()
                return match[1].decode()
    return None


def _read(programs: Programs, file: Path, *options: str) -> str:
    output = [] if "--list" in options else ["--file=-"]
    done = subprocess.run(
        [programs.command("pg_restore"), *options, *output, str(file)], env=environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        raise InvalidInput(f"{file} cannot be read as a backup: {_said(done.stderr.splitlines())}")
    return done.stdout


_BEFORE = """
BEGIN;
SET LOCAL lock_timeout = '10s';
SELECT pg_advisory_xact_lock(:migration_lock);
SELECT
    set_config('chunkmill.restored', :'schema', true),
    set_config('chunkmill.replaced', :'replaced', true),
    set_config('chunkmill.types', :'types', true),
    set_config('maintenance_work_mem', :'memory', true);

-- What was in the schemas of the installations, this one's and the one that it replaces, with the views of collections.
-- Schemas stay, because not every role that owns what is in them may create them.
DO $do$
DECLARE
    places name[];
    views name[];
    old record;
BEGIN
    places := array_remove(
        ARRAY[current_setting('chunkmill.restored')::name, current_setting('chunkmill.replaced')::name], 'public'
    );
    SELECT array_agg(n.nspname)
    INTO views
    FROM pg_namespace n
    JOIN unnest(places) AS place(name) ON starts_with(
        obj_description(n.oid, 'pg_namespace'), format('The collections of Chunkmill in the schema %s, ', place.name)
    );
    FOR old IN
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END AS kind,
               format('%I.%I', n.nspname, c.relname) AS name
        FROM pg_class c
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE (n.nspname = ANY(places) AND c.relkind IN ('r', 'p', 'v', 'S')
               OR n.nspname = ANY(views) AND c.relkind = 'v')
          -- The sequence of a column goes with its table, and what an extension has made stays with it.
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype IN ('a', 'i', 'e'))
        ORDER BY c.relkind <> 'v', c.relkind = 'S'
    LOOP
        EXECUTE format('DROP %s IF EXISTS %s CASCADE', old.kind, old.name);
    END LOOP;
    FOR old IN
        SELECT p.oid::regprocedure::text AS name
        FROM pg_proc p
        JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname = ANY(places)
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('DROP ROUTINE IF EXISTS %s CASCADE', old.name);
    END LOOP;

    IF to_regnamespace(quote_ident(current_setting('chunkmill.restored'))) IS NULL THEN
        EXECUTE format('CREATE SCHEMA %I', current_setting('chunkmill.restored'));
    END IF;
    IF current_setting('chunkmill.types') <> '' AND to_regnamespace(current_setting('chunkmill.types')) IS NULL THEN
        EXECUTE format('CREATE SCHEMA %s', current_setting('chunkmill.types'));
    END IF;
    IF current_setting('chunkmill.types') <> '' AND NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'vector') THEN
        EXECUTE format('CREATE EXTENSION vector SCHEMA %s', current_setting('chunkmill.types'));
    END IF;
END
$do$;
"""

_AFTER = """
SELECT
    set_config(
        'search_path', quote_ident(:'schema') || coalesce(', ' || nullif(:'types', ''), '') || ', pg_temp', true
    );
-- Postgres lets everybody call a new function, and the defaults of a schema may give rights on its new tables. Who may
-- do what is said by deploy/postgres-role.sql, and until it has run it is nobody but the owner.
DO $do$
DECLARE
    given record;
BEGIN
    FOR given IN
        SELECT DISTINCT 'TABLE' AS kind, c.oid::regclass::text AS name, a.grantee
        FROM pg_class c
        CROSS JOIN aclexplode(c.relacl) a
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'v') AND a.grantee <> c.relowner
        UNION ALL
        SELECT DISTINCT 'SEQUENCE', c.oid::regclass::text, a.grantee
        FROM pg_class c
        CROSS JOIN aclexplode(c.relacl) a
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'S' AND a.grantee <> c.relowner
        UNION ALL
        SELECT DISTINCT 'ROUTINE', p.oid::regprocedure::text, a.grantee
        FROM pg_proc p
        CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        WHERE p.pronamespace = current_schema()::regnamespace AND p.prorettype <> 'trigger'::regtype
          AND a.grantee <> p.proowner
          AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format(
            'REVOKE ALL ON %s %s FROM %s', given.kind, given.name,
            CASE given.grantee WHEN 0 THEN 'PUBLIC' ELSE given.grantee::regrole::text END
        );
    END LOOP;
END
$do$;
"""


@dataclass(frozen=True, slots=True)
class Target:
    """The database that an archive is restored into."""

    url: str
    server: int
    """The major version of its server."""
    replaced: str | None
    """The schema of the installation whose place the archive takes; None if there is none."""
    memory_mb: int
    """How much memory the building of an index may take."""
    migration_lock: int
    """The key of the advisory lock that a migration holds."""

    def variables(self, archive: Archive) -> dict[str, str]:
        """What the SQL around the archive knows, for ``psql``."""
        return {
            "schema": archive.schema,
            "replaced": self.replaced or archive.schema,
            "types": archive.types or "",
            "memory": f"{self.memory_mb}MB",
            "migration_lock": str(self.migration_lock),
            "taken_at": archive.taken_at.isoformat(),
        }


def restore(target: Target, archive: Archive, programs: Programs, put_in_order: str, progress: Progress) -> None:
    """Make what the archive holds, in place of the installation that is there, in one transaction.

    ``put_in_order`` is SQL that runs at its end, in the schema of the archive, with the variable ``taken_at``.
    Everything belongs to the role of the target, and nobody else has rights. Raises :class:`InvalidInput` if the file
    is damaged, and :class:`StoreUnavailable` if Postgres refuses. Then nothing has changed.
    """
    with tempfile.NamedTemporaryFile("w", prefix="chunkmill-", suffix=".list") as wanted:
        wanted.write("\n".join(archive.entries) + "\n")
        wanted.flush()
        reader = [
            programs.command("pg_restore"), "--no-owner", "--no-privileges", "--no-tablespaces", "--verbose",
            "--no-publications", "--no-subscriptions", "--no-security-labels", f"--use-list={wanted.name}", "--file=-",
            str(archive.file),
        ]  # fmt: skip
        writer = [
            programs.command("psql"), "--no-psqlrc", "--no-password", "--quiet", "--tuples-only", "--output=/dev/null",
            "--set=ON_ERROR_STOP=1", "--set=VERBOSITY=terse", "--set=SHOW_CONTEXT=never",
            *(f"--set={name}={value}" for name, value in target.variables(archive).items()),
            f"--dbname={_conninfo(target.url)}", "--file=-",
        ]  # fmt: skip
        with (
            _started(reader, target.url, stdout=subprocess.PIPE) as source,
            _started(writer, target.url, stdin=subprocess.PIPE) as psql,
        ):
            _pour(source, psql, _AFTER + put_in_order, progress, old_server=target.server < 17)


def _pour(source: _RunningProgram, psql: _RunningProgram, after: str, progress: Progress, *, old_server: bool) -> None:
    """Send everything to ``psql``. It gets its COMMIT only after ``pg_restore`` has read the archive to its end."""
    script, into = source.stdout, psql.stdin
    n_bytes = 0
    try:
        into.write(_BEFORE.encode())
        piece = script.read(_PIECE)
        if piece and not _RESTRICTED.match(piece):
            psql.kill()
            raise StoreUnavailable(
                f"nothing was restored, because {source.program} lacks the security fix of August 2025, without which "
                "a backup can run programs on this machine. Update Postgres' programs to their latest minor release; "
                f"those of Postgres 18 come with: {install_command('embedded')}"
            )
        if old_server:
            piece = piece.replace(_NEW_SETTING, b"", 1)
        while piece:
            into.write(piece)
            n_bytes += len(piece)
            progress(source.what, n_bytes)
            piece = script.read(_PIECE)
        source.ended.wait()
        if source.returncode:
            psql.kill()
            raise InvalidInput(
                f"the backup is damaged, and nothing was restored: pg_restore ended with {source.returncode}: "
                f"{source.last_words}"
            )
        into.write(f"{after}\nCOMMIT;\n".encode())
        into.close()
    except BrokenPipeError:
        pass  # psql has ended, and says below why
    psql.ended.wait()
    if psql.returncode:
        raise StoreUnavailable(f"nothing was restored, because Postgres refused: {psql.last_words}")


class _RunningProgram:
    """A program that runs, what it said last, and what it is doing."""

    def __init__(self, process: subprocess.Popen[bytes], program: str) -> None:
        self._process = process
        self.program = program
        self.what = "starting"
        self.ended = threading.Event()
        self._lines: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def returncode(self) -> int:
        return self._process.returncode

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        return self._process.stdout

    @property
    def last_words(self) -> str:
        """What it said at the end, without what it said while all was well."""
        return _said(self._lines)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End it, if it has not ended by itself."""
        if self._process.poll() is None:
            self._process.kill()
        self.ended.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _listen(self) -> None:
        assert self._process.stderr is not None  # noqa: S101 - a pipe was asked for
        for raw in self._process.stderr:
            line = raw.decode(errors="replace").strip()
            if work := re.search(r'(?:dumping contents of|processing data for) table "(.+)"', line):
                self.what = work[1].rpartition(".")[2]
            elif made := re.match(r"pg_restore: creating (?:INDEX|CONSTRAINT) \"(.+)\"", line):
                self.what = made[1].rpartition(".")[2]
            self._lines = [*self._lines[-_REMEMBERED_LINES:], line]
        self._process.wait()
        self.ended.set()


@contextlib.contextmanager
def _started(
    command: list[str], url: str, *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
) -> Iterator[_RunningProgram]:
    # The password is in the environment, because every user of a machine can read the arguments of its processes.
    password = _options(url).get("password")
    secret = {"PGPASSWORD": str(password)} if password is not None else {}
    try:
        process = subprocess.Popen(
            command, env=environment(**secret), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise StoreUnavailable(f"{command[0]} could not be run: {error}.") from error
    running = _RunningProgram(process, command[0])
    try:
        yield running
    finally:
        running.close()


def _said(lines: list[str]) -> str:
    """Postgres' complaint among the lines. It may quote rows below its first line, and rows contain texts."""
    first = next((line for line in lines if "error: " in line.lower() or "fatal: " in line.lower()), "")
    if not first:
        return "it gave no reason."
    return re.sub(r"^(?:psql:<stdin>:\d+|\w+): (?:error: |ERROR:\s+|FATAL:\s+)?", "", first).rstrip(".") + "."


def _conninfo(url: str) -> str:
    """The address for Postgres' programs, without the password. Raises :class:`InvalidInput` for another secret."""
    options = _options(url)
    if secret := next((name for name in _SECRET_OPTIONS if name in options), None):
        raise InvalidInput(
            f"DATABASE_URL has {secret}, which every user of this machine could read among the arguments of Postgres' "
            "programs. Put it into a file of services that only you can read, name that file in PGSERVICEFILE, and "
            f"write service=NAME in place of {secret}."
        )
    left_out = ("password", "client_encoding", "application_name", "context")  # the last is SQLAlchemy's own
    return psycopg.conninfo.make_conninfo(**{name: value for name, value in options.items() if name not in left_out})


def _options(url: str) -> dict[str, Any]:
    """What the URL says, in libpq's words. The password may be among its parameters too."""
    address, _ = home.split_schema(url)
    return dict(sa.create_engine(address).dialect.create_connect_args(address)[1])
