"""Connections to Postgres, its migrations, and the check that its schema is one that this code can use."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy as sa

from chunkmill.db import home
from chunkmill.db.compatibility import SchemaLevel, why_not
from chunkmill.db.requirements import encoding_problem, pgvector_problem, version_problem
from chunkmill.domain.reasons import DOCTOR_SHOWS_MORE
from chunkmill.errors import StoreLimit, StoreUnavailable

if TYPE_CHECKING:
    from alembic.config import Config


OLDEST_SECONDS = 300
"""A connection of the pool that is older is made anew. After a failover a session may stay with the old primary. A
write is refused there (``_leave_read_only_server``), but whoever only reads would read the past for ever."""


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
        pool_recycle=OLDEST_SECONDS,
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

    sa.event.listen(db, "handle_error", _leave_read_only_server)
    _pools.add(db)
    _addresses[db] = url
    return db


def address_of(db: sa.Engine) -> str:
    """What tells the database and the schema of ``db`` from others in this process. It may hold a password."""
    return _addresses.get(db) or f"{id(db)}"


def _leave_read_only_server(context: sa.engine.ExceptionContext) -> None:
    """Let the pool drop all its connections once one of them leads to a server that takes no writes.

    After a failover the address leads to the new primary, but a session with the old one stays, and answers a ping.
    """
    if context.original_exception is not None and sqlstate(context.original_exception) == READ_ONLY:
        context.is_disconnect = True


_pools: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_addresses: weakref.WeakKeyDictionary[sa.Engine, str] = weakref.WeakKeyDictionary()


def _leave_connections_to_parent() -> None:
    """Let a child process begin with empty pools. On its parent's sockets each would read the other's answers.

    The sockets are not closed, because Postgres would then end the parent's sessions.
    """
    for db in list(_pools):
        db.dispose(close=False)


os.register_at_fork(after_in_child=_leave_connections_to_parent)


@dataclass(frozen=True, slots=True)
class Connections:
    """How many connections each kind of process has to this database. A process keeps a pool of several."""

    workers: int
    """Workers with a model of their own."""
    provider_workers: int
    """Workers of the paid routes."""
    pollers: int
    supervisors: int = 0
    """Processes of ``chunkmill worker``, which start workers."""


# The names are those that ``create_db`` gives to the roles.
_CONNECTIONS = sa.text(
    """
    SELECT
        count(*) FILTER (WHERE application_name = 'chunkmill-worker') AS workers,
        count(*) FILTER (WHERE application_name = 'chunkmill-worker-openai') AS provider_workers,
        count(*) FILTER (WHERE application_name = 'chunkmill-poller') AS pollers,
        count(*) FILTER (WHERE application_name = 'chunkmill-supervisor') AS supervisors
    FROM pg_stat_activity
    WHERE datname = current_database()
    """
)


def connections(conn: sa.Connection) -> Connections:
    """The connections of workers and pollers to the database of ``conn``, as ``pg_stat_activity`` lists them."""
    return Connections(**conn.execute(_CONNECTIONS).one()._mapping)


def connected_processes(conn: sa.Connection) -> dict[str, int]:
    """Role → how many connections Chunkmill's processes of it have to this database, the most first, without ``conn``.

    The roles are those that :func:`create_db` was given, such as ``worker`` and ``client``.
    """
    rows = conn.execute(
        sa.text(
            """
            SELECT substr(application_name, 11) AS role, count(*) AS n
            FROM pg_stat_activity
            WHERE application_name LIKE 'chunkmill-%' AND datname = current_database() AND pid <> pg_backend_pid()
            GROUP BY 1
            ORDER BY 2 DESC, 1
            """
        )
    )
    return {row.role: row.n for row in rows}


def open_alone(db: sa.Engine | sa.Pool) -> psycopg.Connection[object]:
    """A connection beside the pool, prepared like those of the pool. It commits each statement."""
    # A pool of its own with the same way to connect, and no connection yet.
    fairy = (db.pool.recreate() if isinstance(db, sa.Engine) else db).connect()
    connection = fairy.driver_connection
    fairy.detach()  # SQLAlchemy would roll a lost connection back, and log that it cannot
    if not isinstance(connection, psycopg.Connection):
        raise TypeError(f"expected a psycopg connection, got {type(connection).__name__}")
    try:
        connection.rollback()
        connection.autocommit = True
    except BaseException:
        connection.close()
        raise
    return connection


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
    """Alembic's configuration."""
    from alembic.config import Config  # importing Alembic takes long, and only these functions need it

    config = Config()
    config.set_main_option("script_location", str(_scripts()))
    config.attributes["url"] = url
    return config


def _scripts() -> Path:
    """The folder of the migrations, in the installed package or in the checkout."""
    packaged = Path(__file__).parent / "alembic"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "alembic"


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
        if revision == "head" and level.current == level.head:
            return  # every client of the embedded stack asks, and to load Alembic takes longer than most commands
        from alembic import command

        command.upgrade(alembic_config(url), revision)
    except sa.exc.DBAPIError as error:
        raise migration_error(url, error) from error
    finally:
        db.dispose()


def write_migrations(revision: str = "head", schema: str = home.DEFAULT_SCHEMA) -> None:
    """Write the migrations to stdout, as SQL for psql. Nothing is connected to.

    ``revision`` is the last migration, or a range such as ``0008:head`` if the database is not empty.
    """
    from alembic import command

    command.upgrade(alembic_config(f"postgresql+psycopg://?schema={schema}"), revision, sql=True)


def migration_error(url: str, error: sa.exc.DBAPIError) -> StoreUnavailable:
    """The error for a migration that Postgres ended."""
    code = sqlstate(error)
    if isinstance(error, sa.exc.OperationalError) and is_away(code):
        return StoreUnavailable(unreachable_message(url, error))
    advice = "Run chunkmill migrate again: what it did is kept, and it goes on from there."
    if code == "55P03":
        advice = (
            "Another session held a table for longer than the migration waits, so it gave up rather than hold up the "
            f"workers. {advice} If that does not help, end the session that holds it: docs/runbook.md."
        )
    elif code == "42501":
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
    """This code's migrations, the oldest first: the numbers before their files' names.

    Every process asks for them at its start, and importing Alembic would take longer than all else it does there.
    """
    return sorted(path.name.partition("_")[0] for path in (_scripts() / "versions").glob("[0-9]*_*.py"))


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


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE that Postgres sent with ``error``, which psycopg or SQLAlchemy raised; None if it sent none."""
    return getattr(getattr(error, "orig", error), "sqlstate", None)


# A transaction that met one of these limits meets it again unless somebody changes the setting or ends what it waited
# for. So it is not an outage, which would pass by itself.
_LIMITS = {
    "57014": "statement_timeout",
    "55P03": "lock_timeout",
    "25P03": "idle_in_transaction_session_timeout",
    "25P04": "transaction_timeout",
    "53400": "temp_file_limit",
}


def limit_of(error: BaseException) -> str | None:
    """The setting of Postgres that ended the transaction, such as ``statement_timeout``; None for any other error."""
    return _LIMITS.get(sqlstate(error) or "")


def limit_error(what: str, error: Exception) -> StoreLimit:
    """The error for ``what`` was ended by a setting of Postgres. ``limit_of(error)`` is not None."""
    setting = limit_of(error)
    advice = (
        f"{setting} of this role or database is too low for it: raise it for the role that Chunkmill uses, with "
        f"ALTER ROLE ... SET {setting} = '5min', and start this process again."
    )
    if setting in ("statement_timeout", "lock_timeout"):
        advice += " If it only waited for a lock, end the session that holds it: see pg_blocking_pids()."
    return StoreLimit(f"{what}: Postgres ended it: {refusal(error)}. {advice}")


UNDEFINED_TABLE = "42P01"
"""The SQLSTATE of a database without our tables."""
READ_ONLY = "25006"
"""The SQLSTATE of a server that takes no writes: a standby, or an old primary after a failover."""


def is_away(sqlstate: str | None) -> bool:
    """Whether an OperationalError of this SQLSTATE means that Postgres cannot be reached."""
    return sqlstate is None or sqlstate.startswith(("08", "28", "3D", "57P"))


def store_error(url: str, error: sa.exc.DBAPIError) -> StoreUnavailable:
    """The error for a Postgres that cannot be reached, or that refused: a deadlock, a timeout, a full disk."""
    if limit_of(error):
        return limit_error("this call", error)
    code = sqlstate(error)
    if is_away(code):
        return StoreUnavailable(unreachable_message(url, error))
    if code == READ_ONLY:
        return StoreUnavailable(f"{read_only_message(url)} The same call may be made again.")
    return StoreUnavailable(f"Postgres refused ({code}): {refusal(error)}. The same call may be made again.")


def read_only_message(url: str) -> str:
    """What to say if the server behind ``url`` takes no writes. It does not contain the password."""
    return (
        f"Postgres at {_address(url)} is read-only: it is a standby, or the old primary after a failover. The "
        "connections are made anew. If this lasts, let DATABASE_URL name the primary."
    )


def unreachable_message(url: str, error: Exception) -> str:
    """What to say if Postgres at ``url`` cannot be reached. It does not contain the password."""
    return (
        f"cannot connect to Postgres at {_address(url)}: {refusal(error)}. "
        f"Check DATABASE_URL, and that the server is up.{DOCTOR_SHOWS_MORE}"
    )


def _address(url: str) -> str:
    target = sa.make_url(url)
    address = target.query.get("host") or f"{target.host}:{target.port or 5432}"
    if not isinstance(address, str):
        address = ",".join(address)
    return f"{address}, database {target.database!r}"
