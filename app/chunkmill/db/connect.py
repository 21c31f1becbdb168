"""Connections to Postgres, its migrations, and the check that its schema is one that this code can use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from chunkmill.db.compatibility import SchemaLevel, why_not
from chunkmill.errors import StoreUnavailable


def create_db(url: str, *, role: str, pool_size: int = 5) -> sa.Engine:
    """A pool of connections. ``pg_stat_activity`` shows ``role``, for example ``client``, ``worker`` or ``poller``."""
    db = sa.create_engine(
        url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        hide_parameters=True,  # they hold texts, and error messages are logged
        connect_args={
            "application_name": f"chunkmill-{role}",
            "connect_timeout": 10,
            # A worker that loses its network must notice it before its lease is over, not after two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,
        },
    )

    @sa.event.listens_for(db, "connect")
    def _quiet(connection: psycopg.Connection[Any], _record: object) -> None:
        # Staging tables are created with IF NOT EXISTS, whose notices would fill the log. This is not a start-up
        # option, because that would replace the options in the URL.
        connection.execute("SET client_min_messages = warning")
        connection.commit()

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


def alembic_config(url: str) -> Config:
    """Alembic's configuration. Its scripts are in the checkout or in the installed package."""
    packaged = Path(__file__).parent / "alembic"
    checkout = Path(__file__).parents[3] / "alembic"
    config = Config()
    config.set_main_option("script_location", str(packaged if packaged.is_dir() else checkout))
    config.attributes["url"] = url
    return config


def migrate(url: str, revision: str = "head") -> None:
    """Upgrade the schema. Several machines may do it at once, because ``alembic/env.py`` takes a lock."""
    try:
        command.upgrade(alembic_config(url), revision)
    except sa.exc.OperationalError as error:
        raise StoreUnavailable(unreachable_message(url, error)) from error
    except sa.exc.DBAPIError as error:
        raise StoreUnavailable(
            f"the database could not be migrated: {refusal(error)}. Chunkmill needs the right to create tables, and "
            "pgvector installed on the server."
        ) from error


def migration_level(conn: sa.Connection) -> tuple[str | None, str | None]:
    """The migration of the database and the newest one of this code: ``(current, head)``."""
    scripts = ScriptDirectory.from_config(alembic_config(""))
    return MigrationContext.configure(conn).get_current_revision(), scripts.get_current_head()


def schema_level(conn: sa.Connection) -> SchemaLevel:
    """The migration of the database beside those of this code, for :func:`why_not`."""
    scripts = ScriptDirectory.from_config(alembic_config(""))
    known = [script.revision for script in reversed(list(scripts.walk_revisions()))]
    current = MigrationContext.configure(conn).get_current_revision()
    oldest = None
    if current is not None and current not in known:
        # The schema is newer than this code, so it is newer than 0006, which created this table.
        oldest = conn.execute(sa.text("SELECT min(oldest_code) FROM schema_compatibility")).scalar_one()
    return SchemaLevel(current, known, oldest)


def require_migrated(db: sa.Engine) -> None:
    """Raise :class:`StoreUnavailable` if Postgres cannot be reached, or if this code may not run on its schema.

    ``chunkmill.db.compatibility`` decides that: code and schema may be one release apart.
    """
    try:
        with db.connect() as conn:
            problem = why_not(schema_level(conn))
    except sa.exc.OperationalError as error:
        raise StoreUnavailable(unreachable_message(str(db.url), error)) from error
    if problem:
        raise StoreUnavailable(problem)


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


def store_error(url: str, error: sa.exc.OperationalError) -> StoreUnavailable:
    """The error for a Postgres that cannot be reached, or that refused: a deadlock, a timeout, a full disk."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate is None or sqlstate.startswith(("08", "57P")):
        return StoreUnavailable(unreachable_message(url, error))
    return StoreUnavailable(f"Postgres refused ({sqlstate}): {refusal(error)}. The same call may be made again.")


def unreachable_message(url: str, error: Exception) -> str:
    """What to say if Postgres at ``url`` cannot be reached. It does not contain the password."""
    target = sa.make_url(url)
    address = target.query.get("host") or f"{target.host}:{target.port or 5432}"
    if not isinstance(address, str):
        address = ",".join(address)
    return (
        f"cannot connect to Postgres at {address}, database {target.database!r}: {refusal(error)}. "
        "Check DATABASE_URL, and that the server is up. `chunkmill doctor` shows more."
    )
