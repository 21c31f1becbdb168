"""Connections to Postgres, its migrations, and the check that its schema is one that this code can use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from chunkmill.db import home
from chunkmill.db.compatibility import SchemaLevel, why_not
from chunkmill.db.requirements import encoding_problem, pgvector_problem, version_problem
from chunkmill.errors import StoreUnavailable


def create_db(url: str, *, role: str, pool_size: int = 5) -> sa.Engine:
    """A pool of connections. ``pg_stat_activity`` shows ``role``, for example ``client``, ``worker`` or ``poller``.

    Unqualified names are those of Chunkmill's own schema (``chunkmill.db.home``).
    """
    address, schema = home.split_schema(url)
    db = sa.create_engine(
        address,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        hide_parameters=True,  # they hold texts, and error messages are logged
        connect_args={
            "application_name": f"chunkmill-{role}",
            "connect_timeout": 10,
            # COPY sends UTF-8. A session of another encoding, which PGCLIENTENCODING, a role or a database may set,
            # would store other characters under the hash of the right text.
            "client_encoding": "utf8",
            # A worker that loses its network must notice it before its lease is over, not after two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,
        },
    )

    @sa.event.listens_for(db, "connect")
    def _enter(connection: psycopg.Connection[Any], _record: object) -> None:
        home.enter(connection, schema)

    return db


@dataclass(frozen=True, slots=True)
class Connections:
    """How many connections each kind of process has to this database. A process keeps a pool of several."""

    workers: int
    """Workers with a model of their own."""
    provider_workers: int
    """Workers of the paid routes."""
    pollers: int


# The names are those that ``create_db`` gives to the roles ``worker``, ``worker-openai`` and ``poller``.
_CONNECTIONS = sa.text(
    """
    SELECT
        count(*) FILTER (WHERE application_name = 'chunkmill-worker') AS workers,
        count(*) FILTER (WHERE application_name = 'chunkmill-worker-openai') AS provider_workers,
        count(*) FILTER (WHERE application_name = 'chunkmill-poller') AS pollers
    FROM pg_stat_activity
    WHERE datname = current_database()
    """
)


def connections(conn: sa.Connection) -> Connections:
    """The connections of workers and pollers to the database of ``conn``, as ``pg_stat_activity`` lists them."""
    return Connections(**conn.execute(_CONNECTIONS).one()._mapping)


def raw(conn: sa.Connection) -> psycopg.Connection[tuple[Any, ...]]:
    """The psycopg connection under ``conn``, in the same transaction. COPY and LISTEN need it."""
    driver = conn.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise TypeError(f"expected a psycopg connection, got {type(driver).__name__}")
    return driver


def server_encoding(conn: sa.Connection) -> str:
    """The encoding of the database, such as ``UTF8``. Postgres says it when a connection begins."""
    return raw(conn).info.parameter_status("server_encoding") or "unknown"


def alembic_config(url: str) -> Config:
    """Alembic's configuration. Its scripts are in the checkout or in the installed package."""
    packaged = Path(__file__).parent / "alembic"
    checkout = Path(__file__).parents[3] / "alembic"
    config = Config()
    config.set_main_option("script_location", str(packaged if packaged.is_dir() else checkout))
    config.attributes["url"] = url
    return config


def migrate(url: str, revision: str = "head") -> None:
    """Upgrade the schema. Several machines may do it at once, because ``alembic/env.py`` takes a lock.

    A schema of a newer release stays as it is. Raises :class:`StoreUnavailable` if this code may not run on it, if the
    server will not do, or if Postgres refuses; the message says what to do.
    """
    db = create_db(url, role="migrate", pool_size=1)
    try:
        with db.connect() as conn:
            if problem := why_not_server(conn):
                raise StoreUnavailable(problem)
            level = schema_level(conn)
        if level.is_newer:
            if problem := why_not(level):
                raise StoreUnavailable(problem)
            return
        command.upgrade(alembic_config(url), revision)
    except sa.exc.DBAPIError as error:
        raise migration_error(url, error) from error
    finally:
        db.dispose()


def write_migrations(revision: str = "head", schema: str = home.DEFAULT_SCHEMA) -> None:
    """Write the migrations to stdout, as SQL for psql. Nothing is connected to.

    ``revision`` is the last migration, or a range such as ``0008:head`` if the database is not empty.
    """
    command.upgrade(alembic_config(f"postgresql+psycopg://?schema={schema}"), revision, sql=True)


def migration_error(url: str, error: sa.exc.DBAPIError) -> StoreUnavailable:
    """The error for a migration that Postgres ended."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    if isinstance(error, sa.exc.OperationalError) and is_away(sqlstate):
        return StoreUnavailable(unreachable_message(url, error))
    advice = "Run chunkmill migrate again: what it did is kept, and it goes on from there."
    if sqlstate == "55P03":
        advice = (
            "Another session held a table for longer than the migration waits, so it gave up rather than hold up the "
            f"workers. {advice} If that does not help, end the session that holds it: docs/runbook.md."
        )
    elif sqlstate == "42501":
        advice = (
            "The role needs the right to create tables in Chunkmill's schema. Let the owner of the database run: "
            "CREATE SCHEMA chunkmill AUTHORIZATION the_role; or use the roles of deploy/postgres-role.sql."
        )
    return StoreUnavailable(f"the database could not be migrated: {refusal(error)}. {advice}")


def why_not_server(conn: sa.Connection) -> str | None:
    """Why the server or its pgvector will not do, and what to do; None if they will."""
    server = conn.execute(
        sa.text(
            """
            SELECT
                current_setting('server_version') AS version,
                (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS installed,
                (SELECT default_version FROM pg_available_extensions WHERE name = 'vector') AS available
            """
        )
    ).one()
    return (
        version_problem(server.version)
        or encoding_problem(server_encoding(conn))
        or pgvector_problem(server.installed, server.available)
    )


def known_revisions() -> list[str]:
    """This code's migrations, the oldest first."""
    scripts = ScriptDirectory.from_config(alembic_config(""))
    return [script.revision for script in reversed(list(scripts.walk_revisions()))]


def migration_level(conn: sa.Connection) -> tuple[str | None, str | None]:
    """The migration of the database and the newest one of this code: ``(current, head)``."""
    level = schema_level(conn)
    return level.current, level.head


def schema_level(conn: sa.Connection) -> SchemaLevel:
    """The migration of the database beside those of this code, for :func:`why_not`."""
    known = known_revisions()
    installation = home.find_home(raw(conn))
    current = home.read_revision(conn, installation, known) if installation else None
    oldest = None
    if current is not None and current not in known:
        # The schema is newer than this code, so it is newer than 0006, which created this table.
        oldest = conn.execute(sa.text("SELECT min(oldest_code) FROM schema_compatibility")).scalar_one()
    return SchemaLevel(current, known, oldest)


def require_migrated(db: sa.Engine) -> None:
    """Raise :class:`StoreUnavailable` if Postgres cannot be reached, if its database is not in UTF-8, or if this code
    may not run on its schema.

    ``chunkmill.db.compatibility`` decides that: code and schema may be one release apart.
    """
    try:
        with db.connect() as conn:
            problem = encoding_problem(server_encoding(conn)) or _why_closed(conn) or why_not(schema_level(conn))
    except sa.exc.OperationalError as error:
        raise StoreUnavailable(unreachable_message(str(db.url), error)) from error
    if problem:
        raise StoreUnavailable(problem)


def _why_closed(conn: sa.Connection) -> str | None:
    """What to do if the role may not look into the schema of the installation; None if it may.

    Postgres leaves such a schema out of the search path without a word.
    """
    query = """
        SELECT current_user AS role, nspname AS schema
        FROM pg_namespace
        WHERE nspname = :schema AND NOT has_schema_privilege(oid, 'USAGE')
    """
    installation = home.find_home(raw(conn))
    row = conn.execute(sa.text(query), {"schema": installation.schema if installation else None}).one_or_none()
    if row is None:
        return None
    return (
        f"the role {row.role!r} may not use the schema {row.schema!r}, which holds Chunkmill's tables. Run "
        f"deploy/postgres-role.sql, or let its owner run: GRANT USAGE ON SCHEMA {row.schema} TO {row.role};"
    )


def require_at_least(conn: sa.Connection, revision: str) -> None:
    """Raise :class:`StoreUnavailable` if the schema is older than ``revision``, which the caller needs."""
    level = schema_level(conn)
    if level.current in level.known and level.known.index(level.current) < level.known.index(revision):
        raise StoreUnavailable(
            f"the database is at migration {level.current}, and this needs {revision}. Run: chunkmill migrate"
        )


def refusal(error: Exception) -> str:
    """The first line of Postgres' message."""
    lines = str(getattr(error, "orig", error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_away(sqlstate: str | None) -> bool:
    """Whether an OperationalError of this SQLSTATE means that Postgres cannot be reached."""
    return sqlstate is None or sqlstate.startswith(("08", "28", "3D", "57P"))


def store_error(url: str, error: sa.exc.OperationalError) -> StoreUnavailable:
    """The error for a Postgres that cannot be reached, or that refused: a deadlock, a timeout, a full disk."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    if is_away(sqlstate):
        return StoreUnavailable(unreachable_message(url, error))
    return StoreUnavailable(f"Postgres refused ({sqlstate}): {refusal(error)}. The same call may be made again.")


def unreachable_message(url: str, error: Exception) -> str:
    """What to say if Postgres at ``url`` cannot be reached. It does not contain the password."""
    target = sa.make_url(url)
    address = target.query.get("host") or f"{target.host}:{target.port or 5432}"
    return (
        f"cannot connect to Postgres at {address}, database {target.database!r}: {refusal(error)}. "
        "Check DATABASE_URL, and that the server is up. `chunkmill doctor` shows more."
    )
