"""What `backup` and `restore` do. It imports the database, which their help does not need."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import sqlalchemy as sa

from chunkmill.cli.output import Screen, count, duration
from chunkmill.cli.progress import Bar
from chunkmill.db import backup as archives
from chunkmill.db import home
from chunkmill.db.compatibility import SchemaLevel, why_not
from chunkmill.db.connect import (
    connected_processes,
    create_db,
    known_revisions,
    raw,
    store_error,
    why_not_server,
)
from chunkmill.db.connect import migrate as run_migrations
from chunkmill.db.locks import MIGRATION_LOCK
from chunkmill.db.programs import Programs, find_programs
from chunkmill.db.requirements import numbers
from chunkmill.embedded.environment import Environment
from chunkmill.errors import InvalidInput, StoreUnavailable
from chunkmill.ledger import restored
from chunkmill.settings import Settings
from chunkmill.telemetry.logging import without_passwords

_MB = 1_000_000
NAMED = 10
"""How many tables of other programs an error names."""


def write_backup(screen: Screen, file: Path) -> None:
    """What the command does."""
    settings = Environment.load(needs_redis=False).settings
    url = settings.require_database_url()
    if file.exists():
        raise InvalidInput(f"{file} is there already, and a backup replaces no file. Choose another name.")
    if not file.absolute().parent.is_dir():
        raise InvalidInput(f"the folder {file.absolute().parent} does not exist. Make it first.")
    started = time.monotonic()
    with _connected(url) as conn:
        installation = home.find_home(raw(conn))
        if installation is None:
            raise InvalidInput("the database is empty, so there is nothing to back up.")
        server = _server(conn)
        migration = home.read_revision(conn, installation, known_revisions())
        taken_at = conn.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
        held = restored.inventory(conn)
    programs = find_programs(server)
    with Bar(screen, "backup") as bar:
        archives.dump(url, installation.schema, file, programs, _shown(bar, "backup"))
    size, seconds = file.stat().st_size, time.monotonic() - started
    if screen.json:
        screen.document(
            {
                "file": file, "bytes": size, "seconds": seconds, "taken_at": taken_at, "postgres": server,
                "pg_dump": programs.major, "schema": installation.schema, "migration": migration,
                "collections": held.collections, "chunks": held.chunks, "texts": held.texts,
                "open_jobs": held.open_jobs,
            }
        )  # fmt: skip
        return
    screen.fields(
        {
            "backup": f"{file}, {size / _MB:,.1f} MB in {duration(seconds)}",
            "of": f"{taken_at.astimezone():%Y-%m-%d %H:%M:%S}, migration {migration}, Postgres {server}",
            "holds": f"{count(held.collections, 'collection')}, {count(held.chunks, 'chunk')}, "
            f"{count(held.texts, 'text')}, {count(held.open_jobs, 'open job')}",
        }
    )
    screen.say("")
    screen.say(
        "To bring it back, here or on another machine: ", (f"chunkmill restore {shlex.quote(str(file))}", "bold")
    )


def read_backup(screen: Screen, file: Path, *, replace: bool, yes: bool) -> None:
    """What the command does."""
    settings = Environment.load(needs_redis=False).settings
    url = settings.require_database_url()
    started = time.monotonic()
    with _connected(url) as conn:
        there = _there(conn, settings)
    programs = find_programs(there.server)
    archive = _readable(file, programs)
    if archive.server > programs.major:
        programs = find_programs(archive.server)
    _check(archive, there, settings)
    _check_replaced(screen, there, replace=replace, yes=yes)
    target = archives.Target(url, there.server, there.schema, settings.index_memory_mb, MIGRATION_LOCK)
    with Bar(screen, "restore") as bar:
        archives.restore(target, archive, programs, restored.PUT_IN_ORDER, _shown(bar, "restore"))
        bar.stage("restore: migrations and statistics")
        if archive.migration != known_revisions()[-1]:
            run_migrations(url)
        held = _analyzed(url)
    seconds = time.monotonic() - started
    if screen.json:
        screen.document(
            {
                "file": file, "seconds": seconds, "taken_at": archive.taken_at, "migration": archive.migration,
                "collections": held.contents.collections, "chunks": held.contents.chunks,
                "texts": held.contents.texts, "open_jobs": held.contents.open_jobs,
                "stopped_lanes": list(held.contents.stopped_lanes), "needs_rights": held.has_roles,
            }
        )  # fmt: skip
        return
    screen.fields(
        {
            "restored": f"{file}, of {archive.taken_at.astimezone():%Y-%m-%d %H:%M:%S}, in {duration(seconds)}",
            "holds": f"{count(held.contents.collections, 'collection')}, {count(held.contents.chunks, 'chunk')}, "
            f"{count(held.contents.texts, 'text')}, {count(held.contents.open_jobs, 'open job')}",
        }
    )
    screen.say("")
    if held.has_roles:
        screen.hint(
            "A backup holds no rights, and this server has the roles of deploy/postgres-role.sql: run that file now, "
            "before anything else starts."
        )
    for lane in held.contents.stopped_lanes:
        screen.hint(
            f"The lane {lane} is stopped. What was sent to the provider since the backup is not in it, and would be "
            f"paid for again: docs/backup.md. To go on: chunkmill lanes resume {lane}"
        )
    screen.say("Next, start workers and a poller. Searches are exact until the poller has built the serving indexes.")


@dataclass(frozen=True, slots=True)
class _Destination:
    """The database that a backup is to be restored into."""

    server: int
    address: str
    other_name: str
    """A name for a new database beside it, as SQL writes it."""
    schema: str | None
    """The schema of the installation that it holds; None if there is none."""
    is_empty: bool
    others: dict[str, int]
    """How many connections Chunkmill's processes have, by their role."""
    problem: str | None
    types: str | None
    """The schema of pgvector's types, as SQL writes it; None if pgvector is not installed."""
    public_is_used: bool
    of_others: dict[str, list[str]]
    """Schema → what a restore would delete in it that is not Chunkmill's."""


def _there(conn: sa.Connection, settings: Settings) -> _Destination:
    installation = home.find_home(raw(conn))
    row = conn.execute(
        sa.text("""
            SELECT current_database() AS database,
                   (SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
                    WHERE e.extname = 'vector') AS types,
                   EXISTS (
                       SELECT FROM pg_class c
                       WHERE c.relnamespace = to_regnamespace('public') AND c.relkind IN ('r', 'p')
                         AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
                   ) AS public_is_used
        """)
    ).one()
    url = without_passwords(settings.require_database_url()).replace("+psycopg", "").replace("%2F", "/")
    return _Destination(
        _server(conn),
        f"{row.database!r} at {url}",
        conn.dialect.identifier_preparer.quote(f"{row.database}_restored"),
        installation.schema if installation else None,
        restored.is_empty(conn) if installation else True,
        connected_processes(conn),
        why_not_server(conn),
        row.types,
        row.public_is_used,
        {
            schema: theirs
            for schema in dict.fromkeys([settings.database_schema, *([installation.schema] if installation else [])])
            if schema != "public" and (theirs := restored.of_others(conn, schema, installation))
        },
    )


def _readable(file: Path, programs: Programs) -> archives.Archive:
    """What the file says. Programs that are older than it cannot say it, so the newest then try."""
    try:
        return archives.read_archive(file, programs, known_revisions())
    except InvalidInput as error:
        if "unsupported version" not in str(error):
            raise
        return archives.read_archive(file, find_programs(programs.major + 1), known_revisions())


def _check(archive: archives.Archive, there: _Destination, settings: Settings) -> None:
    """Refuse what cannot end well, before anything is touched."""
    if there.problem:
        raise StoreUnavailable(there.problem)
    if archive.server > there.server:
        raise InvalidInput(
            f"the backup is from Postgres {archive.server}, and this server is Postgres {there.server}. Restore it on "
            f"Postgres {archive.server} or later."
        )
    level = SchemaLevel(archive.migration, known_revisions(), archive.oldest_code)
    if problem := why_not(level):
        raise InvalidInput(f"the backup cannot be used by this release: {problem}".replace("the database", "it"))
    if archive.schema not in (settings.database_schema, "public"):
        raise InvalidInput(
            f"the backup is of an installation in the schema {archive.schema!r}, and DATABASE_SCHEMA is "
            f"{settings.database_schema!r}. Functions name the schema, so restore it with: "
            f"DATABASE_SCHEMA={archive.schema} chunkmill restore {shlex.quote(str(archive.file))}"
        )
    if "public" in (archive.schema, there.schema) and there.public_is_used:
        raise InvalidInput(
            "the schema 'public' of this database holds tables, and an installation in 'public' cannot be told from "
            f"tables of other programs. {_into_a_new_one(there)}"
        )
    for schema, theirs in there.of_others.items():
        more = f" and {len(theirs) - NAMED:,} more" if len(theirs) > NAMED else ""
        raise InvalidInput(
            f"a restore would delete what is not Chunkmill's in the schema {schema!r} of the database {there.address}, "
            f"or depends on its tables: {', '.join(theirs[:NAMED])}{more}. Nothing was changed. "
            f"{_into_a_new_one(there)} Or move tables of other programs into another schema, with ALTER TABLE and SET "
            "SCHEMA, and drop what you can make again."
        )
    if None not in (archive.types, there.types) and archive.types != there.types:
        raise InvalidInput(
            f"the backup has pgvector's types in the schema {archive.types}, and here they are in {there.types}. Let "
            f"the owner of the extension run: ALTER EXTENSION vector SET SCHEMA {archive.types};"
        )
    if there.others:
        said = ", ".join(
            count(n, f"connection as {role}", f"connections as {role}") for role, n in there.others.items()
        )
        raise InvalidInput(
            f"processes of Chunkmill are connected to the database {there.address}: {said}. Stop them, because they "
            "would go on with work of another time. Then try again."
        )


def _into_a_new_one(there: _Destination) -> str:
    return f"Restore into a new database: run CREATE DATABASE {there.other_name}; and name it in DATABASE_URL."


def _check_replaced(screen: Screen, there: _Destination, *, replace: bool, yes: bool) -> None:
    """Refuse to delete an installation that somebody may need."""
    if there.is_empty:
        return
    if not replace:
        raise InvalidInput(
            f"the database {there.address} holds an installation with data. {_into_a_new_one(there)} Or, if that data "
            "is to be deleted, use --replace."
        )
    if yes:
        return
    if screen.asked_json or not sys.stdin.isatty():
        raise InvalidInput(
            "restore --replace asks before it deletes, and stdin is not a terminal: pass --yes to do it without asking."
        )
    if not click.confirm(f"Delete all that Chunkmill has in the database {there.address}?", err=True):
        raise click.Abort


@dataclass(frozen=True, slots=True)
class _RestoredInventory:
    contents: restored.Inventory
    has_roles: bool


def _analyzed(url: str) -> _RestoredInventory:
    """Let Postgres count what is there, because it plans badly without, and return what it is."""
    with _connected(url) as conn:
        tables = conn.execute(
            sa.text("""
                SELECT format('%I.%I', current_schema(), relname)
                FROM pg_class
                WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
                ORDER BY 1
            """)
        )
        for table in tables.scalars().all():
            conn.execute(sa.text(f"ANALYZE {table}"))
            conn.commit()
        roles = conn.execute(sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'chunkmill_migrator')"))
        return _RestoredInventory(restored.inventory(conn), bool(roles.scalar_one()))


def _server(conn: sa.Connection) -> int:
    return numbers(conn.execute(sa.text("SHOW server_version")).scalar_one())[0]


def _shown(bar: Bar, what: str) -> archives.Progress:
    """Shows what is written now, and how much was."""
    last = ""

    def show(table: str, n_bytes: int) -> None:
        nonlocal last
        if table != last:
            last = table
            bar.stage(f"{what}: {table}")
        bar.update(n_bytes // _MB, None, "MB")

    return show


@contextmanager
def _connected(url: str) -> Iterator[sa.Connection]:
    db = create_db(url, role="backup", pool_size=1)
    try:
        with db.connect() as conn:
            yield conn
    except sa.exc.DBAPIError as error:
        raise store_error(url, error) from error
    finally:
        db.dispose()
