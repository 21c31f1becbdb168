"""Connections to Postgres, and what must be true of it before anything is read or written."""

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
    """A pool of connections. ``role`` (``client``, ``worker``, ``poller``) shows in ``pg_stat_activity``."""
    db = sa.create_engine(
        url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        hide_parameters=True,  # they hold texts, and an error's message goes into logs
        connect_args={
            "application_name": f"chunkmill-{role}",
            "connect_timeout": 10,
            # A worker that loses its network must notice before its lease is over, not after two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,
        },
    )

    @sa.event.listens_for(db, "connect")
    def _quiet(connection: psycopg.Connection[Any], _record: object) -> None:
        # Staging tables are made with IF NOT EXISTS, whose notices would fill the log. Not as a start-up
        # option, which would replace those in the URL.
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
    """The psycopg connection below, inside the same transaction: for COPY and LISTEN."""
    driver = conn.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise TypeError(f"expected a psycopg connection, got {type(driver).__name__}")
    return driver


def alembic_config(url: str) -> Config:
    """Alembic's configuration. The scripts stand in the checkout, or inside the installed package."""
    packaged = Path(__file__).parent / "alembic"
    checkout = Path(__file__).parents[3] / "alembic"
    config = Config()
    config.set_main_option("script_location", str(packaged if packaged.is_dir() else checkout))
    config.attributes["url"] = url
    return config


def migrate(url: str, revision: str = "head") -> None:
    """Upgrade the schema. Safe to run from several machines at once: Alembic's run holds a lock."""
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
    """``(current, head)`` revisions."""
    scripts = ScriptDirectory.from_config(alembic_config(""))
    return MigrationContext.configure(conn).get_current_revision(), scripts.get_current_head()


def schema_level(conn: sa.Connection) -> SchemaLevel:
    """What :func:`why_not` judges."""
    scripts = ScriptDirectory.from_config(alembic_config(""))
    known = [script.revision for script in reversed(list(scripts.walk_revisions()))]
    current = MigrationContext.configure(conn).get_current_revision()
    oldest = None
    if current is not None and current not in known:
        # Newer than this code. It has had the table since 0006, and a downgrade to before that is known to all.
        oldest = conn.execute(sa.text("SELECT min(oldest_code) FROM schema_compatibility")).scalar_one()
    return SchemaLevel(current, known, oldest)


def require_migrated(db: sa.Engine) -> None:
    """Raise :class:`StoreUnavailable` when Postgres cannot be reached, or its schema is not one that this code runs on.

    For one release old code runs beside a new schema and new code beside the old one: ``chunkmill.db.compatibility``.
    """
    try:
        with db.connect() as conn:
            problem = why_not(schema_level(conn))
    except sa.exc.OperationalError as error:
        raise StoreUnavailable(unreachable_message(str(db.url), error)) from error
    if problem:
        raise StoreUnavailable(problem)


def require_at_least(conn: sa.Connection, revision: str) -> None:
    """Raise :class:`StoreUnavailable` where the schema is older than ``revision``: for what came with it."""
    level = schema_level(conn)
    if level.current in level.known and level.known.index(level.current) < level.known.index(revision):
        raise StoreUnavailable(
            f"the database is at migration {level.current}, and this needs {revision}. Run: chunkmill migrate"
        )


def refusal(error: Exception) -> str:
    """The first line of what Postgres said."""
    lines = str(getattr(error, "orig", error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def store_error(url: str, error: sa.exc.OperationalError) -> StoreUnavailable:
    """Postgres away, or Postgres refusing: a deadlock, a statement timeout, a full disk."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate is None or sqlstate.startswith(("08", "57P")):
        return StoreUnavailable(unreachable_message(url, error))
    return StoreUnavailable(f"Postgres refused ({sqlstate}): {refusal(error)}. The same call may be made again.")


def unreachable_message(url: str, error: Exception) -> str:
    target = sa.make_url(url)
    where = target.query.get("host") or f"{target.host}:{target.port or 5432}"
    return (
        f"cannot connect to Postgres at {where}, database {target.database!r}: {refusal(error)}. "
        "Check DATABASE_URL and that the server is up; `chunkmill doctor` shows more."
    )
