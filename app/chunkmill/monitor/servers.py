"""Read-only looks at Postgres and Redis: what `status` and `doctor` show."""

from __future__ import annotations

import time
from dataclasses import dataclass

import redis
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.db.connect import create_db, migration_level, unreachable_message
from chunkmill.domain.lanes import Lane
from chunkmill.domain.states import Route
from chunkmill.errors import StoreUnavailable
from chunkmill.ledger.provider import provider_lanes
from chunkmill.monitor import snapshot as ledger_look
from chunkmill.monitor.snapshot import Fault
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.spaces.registry import Space
from chunkmill.telemetry.logging import without_passwords

LOOKED_FOR = ("chunkmill-worker", "chunkmill-worker-openai", "chunkmill-poller")
START_WORKER = "chunkmill worker"
START_PROVIDER_WORKER = "celery -A chunkmill_workers worker -Q openai"


@dataclass(frozen=True, slots=True)
class Database:
    """One look. Connections are counted, not processes: each keeps a pool of several."""

    version: str
    pgvector: str | None
    pgvector_available: str | None
    migration: str | None
    head: str | None
    worker_connections: int
    """Of workers with a model of their own."""
    provider_connections: int
    """Of workers of the paid routes."""
    poller_connections: int
    open_jobs: int | None
    """None before the first migration."""
    clock_ahead: float
    """Seconds by which its clock is ahead of this machine's, to half a round trip."""
    lanes: tuple[Lane, ...] = ()
    """The paid ones; none before the migration that has them."""
    faults: tuple[Fault, ...] = ()
    """The latest, the newest first."""

    def start_for(self, route: Route) -> str | None:
        """The command that starts a worker of a route; None where one is connected."""
        if route is Route.AUTO:
            return None if self.worker_connections or self.provider_connections else START_WORKER
        if route.is_paid:
            return None if self.provider_connections else START_PROVIDER_WORKER
        return None if self.worker_connections else START_WORKER

    @property
    def is_migrated(self) -> bool:
        return self.migration == self.head


def look_at_database(settings: Settings) -> Database:
    """Raises :class:`StoreUnavailable` when Postgres cannot be reached."""
    url = settings.require_database_url()
    db = create_db(url, role="cli", pool_size=1)
    try:
        with db.connect() as conn:
            return _database(conn)
    except sa.exc.OperationalError as error:
        raise StoreUnavailable(unreachable_message(url, error)) from error
    finally:
        db.dispose()


@dataclass(frozen=True, slots=True)
class Live:
    """What only the servers know. A server that cannot be reached gives its error instead."""

    database: Database | None
    database_error: str | None
    doorbells: int | None
    redis_version: str | None
    redis_error: str | None


def look(settings: Settings) -> Live:
    """Raises nothing for a server that is away: that is what the look is for."""
    database = database_error = doorbells = version = redis_error = None
    try:
        database = look_at_database(settings)
    except StoreUnavailable as error:
        database_error = str(error)
    except sa.exc.DBAPIError as error:
        database_error = str(error.orig).splitlines()[0]
    try:
        version = look_at_redis(settings).version
        doorbells = queued_doorbells(settings)
    except (redis.RedisError, OSError) as error:
        redis_error = f"cannot use Redis at {without_passwords(settings.require_redis_url())}: {error}"
    return Live(database, database_error, doorbells, version, redis_error)


def look_at_spaces(settings: Settings) -> list[tuple[Space, list[str]]]:
    """The registered spaces, each with the names of the collections in it."""
    db = create_db(settings.require_database_url(), role="cli", pool_size=1)
    try:
        with db.connect() as conn:
            all_collections = collections.all_collections(conn)
            return [(s, [c.name for c in all_collections if c.space_id == s.id]) for s in registry.all_spaces(conn)]
    finally:
        db.dispose()


def queued_doorbells(settings: Settings) -> int:
    """Raises ``redis.RedisError``."""
    broker = Broker.connect(settings)
    try:
        return sum(broker.queued_doorbells().values())
    finally:
        broker.close()


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """``clock_ahead`` as in :class:`Database`; a configuration value is None where the server hides it."""

    version: str
    eviction: str | None
    appendonly: str | None
    clock_ahead: float


def look_at_redis(settings: Settings) -> RedisFacts:
    """Raises ``redis.RedisError``."""
    with redis.Redis.from_url(
        settings.require_redis_url(), socket_timeout=5, socket_connect_timeout=2, decode_responses=True
    ) as client:
        version = str(client.info("server")["redis_version"])
        sent = time.time()
        seconds, micros = client.time()
        ahead = seconds + micros / 1e6 - (sent + time.time()) / 2
        return RedisFacts(version, _config(client, "maxmemory-policy"), _config(client, "appendonly"), ahead)


def _config(client: redis.Redis, name: str) -> str | None:
    try:
        return str(client.config_get(name)[name])
    except (redis.ResponseError, KeyError):  # hosted servers refuse CONFIG
        return None


def _database(conn: sa.Connection) -> Database:
    sent = time.time()
    clock = float(conn.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
    ahead = clock - (sent + time.time()) / 2
    facts = conn.execute(
        sa.text(
            "SELECT current_setting('server_version') AS version, "
            "(SELECT extversion FROM pg_extension WHERE extname = 'vector') AS installed, "
            "(SELECT default_version FROM pg_available_extensions WHERE name = 'vector') AS available, "
            "to_regclass('jobs') IS NOT NULL AS has_jobs, to_regclass('provider_lanes') IS NOT NULL AS has_lanes"
        )
    ).one()
    names = sa.text(
        "SELECT application_name, count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = ANY(:names) GROUP BY 1"
    )
    connected = {row[0]: int(row[1]) for row in conn.execute(names, {"names": list(LOOKED_FOR)})}
    open_jobs = None
    if facts.has_jobs:
        query = sa.text("SELECT count(*) FROM jobs WHERE state IN ('enqueueing', 'running')")
        open_jobs = conn.execute(query).scalar_one()
    current, head = migration_level(conn)
    lanes = tuple(provider_lanes.lanes(conn)) if facts.has_lanes else ()
    return Database(
        version=facts.version.split()[0],
        pgvector=facts.installed,
        pgvector_available=facts.available,
        migration=current,
        head=head,
        worker_connections=connected.get("chunkmill-worker", 0),
        provider_connections=connected.get("chunkmill-worker-openai", 0),
        poller_connections=connected.get("chunkmill-poller", 0),
        open_jobs=open_jobs,
        lanes=lanes,
        faults=tuple(ledger_look.latest_faults(conn)) if facts.has_lanes else (),
        clock_ahead=ahead,
    )
