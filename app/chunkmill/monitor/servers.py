"""One reading of Postgres and Redis: what ``status`` and ``doctor`` show."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.db.connect import (
    Connections,
    connections,
    create_db,
    refusal,
    schema_level,
    server_encoding,
    sqlstate,
    unreachable_message,
)
from chunkmill.errors import StoreUnavailable
from chunkmill.ledger.jobs import outbox
from chunkmill.monitor import present, snapshot
from chunkmill.monitor.present import Presence
from chunkmill.monitor.snapshot import Snapshot
from chunkmill.settings import Settings
from chunkmill.spaces import collections, others, registry
from chunkmill.spaces.registry import Space
from chunkmill.store import segments
from chunkmill.telemetry.logging import without_passwords

if TYPE_CHECKING:
    import redis  # imported when Redis is asked: a search that finds no worker asks Postgres alone


@dataclass(frozen=True, slots=True)
class Database:
    """What the database server says about itself and about who is connected to it."""

    version: str
    encoding: str
    pgvector: str | None
    """The version that is installed in this database; None if there is none."""
    pgvector_available: str | None
    """The version that the server could install."""
    migration: str | None
    head: str | None
    is_newer: bool
    """Whether a newer release made the schema."""
    present: Presence
    clock_ahead: float
    """How many seconds its clock is ahead of this machine's, give or take half a round trip."""
    altered_roles: tuple[str, ...] = ()
    """Settings of sessions that somebody gave to a role of Chunkmill or to this database: ``role: name=value``."""

    shared_graphs: tuple[str, ...] = ()
    """Indexes that an earlier release built over whole spaces. They slow down every write, and no search reads them."""

    @property
    def connections(self) -> Connections:
        return self.present.connections

    @property
    def is_migrated(self) -> bool:
        return self.migration == self.head


@dataclass(frozen=True, slots=True)
class RedisServer:
    """What the Redis server says about itself. A configuration value is None if the server hides it."""

    version: str
    eviction: str | None
    appendonly: str | None
    clock_ahead: float
    """As in :class:`Database`."""
    kind: str = "redis"
    """``redis`` or ``valkey``."""
    refused_channels: str | None = None
    """What the server said if the user may not subscribe to the channels of Celery's events and questions. Only
    :func:`read_redis` asks."""


@dataclass(frozen=True, slots=True)
class Status:
    """What ``status`` shows. A server that cannot be reached has an error instead of a value."""

    database: Database | None = None
    database_error: str | None = None
    snapshot: Snapshot | None = None
    """None before the migration that created the tables of the paid routes."""
    open_jobs: int | None = None
    """None before the first migration. Those in the outbox are among them."""
    undelivered_jobs: int = 0
    """Open jobs that wait in the outbox."""
    redis: RedisServer | None = None
    redis_error: str | None = None
    doorbells: Mapping[str, int] | None = None
    """Doorbells in Redis, by queue."""


def read_status(settings: Settings) -> Status:
    """Read both servers once. A server that is away raises nothing, because the status has to say so."""
    database = database_error = taken = open_jobs = server = redis_error = doorbells = None
    undelivered = 0
    try:
        with _connected(settings) as conn:
            database = _database(conn)
            if _has_table(conn, "jobs"):
                undelivered = outbox.count(conn) if outbox.is_kept(conn) else 0
                opened = sum(n for state, n in snapshot.jobs_by_state(conn).items() if not state.is_final)
                open_jobs = opened + undelivered
            if _has_table(conn, "provider_lanes"):
                taken = snapshot.take(conn, settings)
    except StoreUnavailable as error:
        database_error = str(error)
    except sa.exc.DBAPIError as error:
        database = None
        database_error = refused_message(error)
    from redis import RedisError

    broker = Broker.connect(settings)
    try:
        server = _redis(broker.client)
        doorbells = broker.doorbells_by_queue()
    except (RedisError, OSError) as error:
        redis_error = f"cannot use Redis at {without_passwords(settings.require_redis_url())}: {error}"
    finally:
        broker.close()
    return Status(database, database_error, taken, open_jobs, undelivered, server, redis_error, doorbells)


def read_database(settings: Settings) -> Database:
    """Raises :class:`StoreUnavailable` if Postgres cannot be reached."""
    with _connected(settings) as conn:
        return _database(conn)


def refused_message(error: sa.exc.DBAPIError) -> str:
    """What to say if Postgres answers and refuses to say what is asked here."""
    said = refusal(error)
    if sqlstate(error) != "42501":
        return said
    return f"{said}. This login may not read that: use the login of a producer, a worker or a poller."


def shares_sessions(settings: Settings) -> bool:
    """Whether something before Postgres lends one session to several connections, as PgBouncer's transaction mode does.

    Raises :class:`StoreUnavailable` if Postgres cannot be reached.
    """
    url = settings.require_database_url()
    db = create_db(url, role="cli", pool_size=2)
    pid = sa.text("SELECT pg_backend_pid()")
    try:
        with db.connect() as first, db.connect() as second:
            with first.begin():
                before = first.execute(pid).scalar_one()
            with second.begin():
                # It holds the session that it got, so that the next transaction of the first needs another one.
                other = second.execute(pid).scalar_one()
                if other == before:
                    return True
                with first.begin():
                    return bool(first.execute(pid).scalar_one() != before)
    except sa.exc.OperationalError as error:
        raise StoreUnavailable(unreachable_message(url, error)) from error
    finally:
        db.dispose()


def read_redis(settings: Settings) -> RedisServer:
    """Raises ``redis.RedisError`` or ``OSError`` if Redis cannot be reached."""
    broker = Broker.connect(settings)
    try:
        return replace(_redis(broker.client), refused_channels=_refused_channels(broker.client))
    finally:
        broker.close()


def read_spaces(settings: Settings) -> list[tuple[Space, list[str]]]:
    """The registered spaces, each with the names of the collections that have it, as the active one or beside it."""
    with _connected(settings) as conn:
        every = collections.all_collections(conn)
        pairs = others.all_others(conn)
        beside = set(zip(pairs.collections, pairs.spaces, strict=True))
        return [
            (s, [c.name for c in every if c.space_id == s.id or (c.id, s.id) in beside])
            for s in registry.all_spaces(conn)
        ]


@contextlib.contextmanager
def _connected(settings: Settings) -> Iterator[sa.Connection]:
    """A connection for one reading. Raises :class:`StoreUnavailable` if Postgres cannot be reached."""
    url = settings.require_database_url()
    db = create_db(url, role="cli", pool_size=1)
    try:
        with db.connect() as conn:
            yield conn
    except sa.exc.OperationalError as error:
        raise StoreUnavailable(unreachable_message(url, error)) from error
    finally:
        db.dispose()


_SERVER = sa.text(
    """
    SELECT
        current_setting('server_version') AS version,
        (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS pgvector,
        (SELECT default_version FROM pg_available_extensions WHERE name = 'vector') AS pgvector_available
    """
)


_ALTERED = sa.text(
    """
    SELECT coalesce(r.rolname, 'every role') || ': ' || left(setting, 80) AS altered
    FROM pg_db_role_setting s
    CROSS JOIN LATERAL unnest(s.setconfig) AS setting
    LEFT JOIN pg_roles r ON r.oid = s.setrole
    WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
    AND (
        r.rolname IS NULL
        OR r.rolname = current_user
        OR r.rolname ~ '^chunkmill(_|$)'
        OR EXISTS (
            SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
            WHERE m.member = r.oid AND g.rolname ~ '^chunkmill_(producer|worker|poller|reader)s$'
        )
    )
    ORDER BY 1
    """
)


def _database(conn: sa.Connection) -> Database:
    sent = time.time()
    clock = float(conn.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
    ahead = clock - (sent + time.time()) / 2
    server = conn.execute(_SERVER).one()
    level = schema_level(conn)
    return Database(
        version=server.version.split()[0],
        encoding=server_encoding(conn),
        pgvector=server.pgvector,
        pgvector_available=server.pgvector_available,
        migration=level.current,
        head=level.head,
        is_newer=level.is_newer,
        # Before the first migration, a table of the name belongs to somebody else.
        present=present.read(conn) if level.current else present.Presence(connections(conn)),
        clock_ahead=ahead,
        altered_roles=tuple(conn.execute(_ALTERED).scalars()),
        shared_graphs=tuple(name for name, _ in segments.shared_graphs(conn)),
    )


def _has_table(conn: sa.Connection, name: str) -> bool:
    return bool(conn.execute(sa.text("SELECT to_regclass(:name) IS NOT NULL"), {"name": name}).scalar_one())


def _redis(client: redis.Redis) -> RedisServer:
    info = client.info("server")
    kind = "valkey" if "valkey_version" in info else "redis"  # Valkey also names a Redis, always the same one
    sent = time.time()
    seconds, micros = client.time()
    ahead = seconds + micros / 1e6 - (sent + time.time()) / 2
    return RedisServer(
        version=str(info[f"{kind}_version"]),
        eviction=_config(client, "maxmemory-policy"),
        appendonly=_config(client, "appendonly"),
        clock_ahead=ahead,
        kind=kind,
    )


def _refused_channels(client: redis.Redis) -> str | None:
    """Their names have the number of the database in them, as kombu builds them."""
    from redis.exceptions import NoPermissionError

    number = client.connection_pool.connection_kwargs.get("db") or 0
    with client.pubsub() as channels:  # type: ignore[no-untyped-call]
        try:
            channels.psubscribe(f"/{number}.celeryev/*", f"/{number}.celery.pidbox")
            for _ in range(2):
                channels.get_message(timeout=5)
        except NoPermissionError as error:
            return str(error)
    return None


def _config(client: redis.Redis, name: str) -> str | None:
    from redis import ResponseError

    try:
        return str(client.config_get(name)[name])
    except (ResponseError, KeyError):  # hosted servers refuse CONFIG
        return None
