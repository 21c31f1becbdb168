"""Faults of Redis and Postgres. Importing this file adds them to ``tests.chaos.faults.KINDS``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from random import Random
from signal import SIGCONT, SIGINT, SIGKILL, SIGQUIT, SIGSTOP, Signals

import sqlalchemy as sa

from tests.chaos.faults import kind
from tests.chaos.processes import children_of
from tests.chaos.world import CannotStrike, Hit, World, kill, wait_gone
from tests.support.waiting import PATIENCE

OUTAGE_SECONDS = (0.2, 1.5)
FROZEN_SECONDS = (2.0, 5.0)
MID_WRITE_SECONDS = 2.0
GONE_SECONDS = PATIENCE
STATISTICS_SECONDS = 3.0
"""Backends add up their statistics every second or so."""

WORKER = "chunkmill-worker"
"""How a worker's connections call themselves."""


@kind("redis-killed", "kill -9 of Redis, back with its append-only file", server=True)
def redis_killed(world: World, random: Random, hit: Hit) -> None:
    _kill_redis(world, random, hit, keep_data=True)


@kind("redis-emptied", "kill -9 of Redis, back with nothing", server=True)
def redis_emptied(world: World, random: Random, hit: Hit) -> None:
    _kill_redis(world, random, hit, keep_data=False)


def _kill_redis(world: World, random: Random, hit: Hit, *, keep_data: bool) -> None:
    pid = world.redis_pid()
    hit.strikes()
    kill(pid, SIGKILL)
    try:
        wait_gone(pid, GONE_SECONDS)
        time.sleep(random.uniform(*OUTAGE_SECONDS))
        if not keep_data:
            for file in (world.stack.home / "redis").glob("**/*.aof*"):
                file.unlink()
    finally:
        world.stack.up()
        hit.is_healed()


@kind("redis-flushed", "FLUSHALL", server=True)
def redis_flushed(world: World, random: Random, hit: Hit) -> None:
    with world.redis() as client:
        hit.strikes()
        client.flushall()
    hit.is_healed()


@kind("redis-frozen", "SIGSTOP to Redis for some seconds", server=True)
def redis_frozen(world: World, random: Random, hit: Hit) -> None:
    pid = world.redis_pid()
    hit.strikes()
    kill(pid, SIGSTOP)
    try:
        time.sleep(random.uniform(*FROZEN_SECONDS))
    finally:
        kill(pid, SIGCONT)
        hit.is_healed()


@kind("redis-disconnected", "CLIENT KILL of every connection, in the middle of tasks", server=True)
def redis_disconnected(world: World, random: Random, hit: Hit) -> None:
    with world.redis() as client:
        hit.strikes()
        hit.notes["connections"] = sum(
            client.client_kill_filter(_type=which, skipme=True) for which in ("pubsub", "normal")
        )
    hit.is_healed()


@kind("redis-full", "maxmemory reached, with noeviction: Redis refuses every write for some seconds", server=True)
def redis_full(world: World, random: Random, hit: Hit) -> None:
    with world.redis() as client:
        hit.strikes()
        client.config_set("maxmemory", 1)
        try:
            time.sleep(random.uniform(*FROZEN_SECONDS))
        finally:
            client.config_set("maxmemory", 0)
            hit.is_healed()


@kind("postgres-restarted", "Postgres stopped as `pg_ctl stop -m fast` does, and started", server=True)
def postgres_restarted(world: World, random: Random, hit: Hit) -> None:
    _restart_postgres(world, random, hit, SIGINT)


@kind("postgres-crashed", "Postgres stopped as by a crash, and started: it recovers from its log", server=True)
def postgres_crashed(world: World, random: Random, hit: Hit) -> None:
    _restart_postgres(world, random, hit, SIGQUIT)


def _restart_postgres(world: World, random: Random, hit: Hit, how: Signals) -> None:
    pid = world.postgres_pid()
    hit.strikes()
    kill(pid, how)
    try:
        wait_gone(pid, GONE_SECONDS)
        time.sleep(random.uniform(*OUTAGE_SECONDS))
    finally:
        world.stack.up()
        hit.is_healed()


@kind("postgres-backend-killed", "kill -9 of a worker's backend: Postgres ends all others and recovers", server=True)
def postgres_backend_killed(world: World, random: Random, hit: Hit) -> None:
    with world.db.connect() as conn:
        pids = conn.execute(
            sa.text("SELECT pid FROM pg_stat_activity WHERE application_name = :name ORDER BY pid"), {"name": WORKER}
        ).scalars()
        backends = list(pids)
    if not backends:
        raise CannotStrike("no worker is connected to Postgres")
    hit.strikes()
    kill(random.choice(backends), SIGKILL)
    time.sleep(0.1)
    deadline = time.monotonic() + GONE_SECONDS
    while not world.stack.status().postgres.running:
        if time.monotonic() > deadline:
            raise CannotStrike(f"Postgres did not come back within {GONE_SECONDS:g} s")
        time.sleep(0.05)
    hit.is_healed()


@kind("postgres-frozen", "SIGSTOP to Postgres and its backends for half a lease", server=True)
def postgres_frozen(world: World, random: Random, hit: Hit) -> None:
    pid = world.postgres_pid()
    frozen = [pid]
    hit.strikes()
    kill(pid, SIGSTOP)  # first, so that it starts no more of them
    try:
        for backend in children_of(pid):
            frozen.append(backend)
            kill(backend, SIGSTOP)
        time.sleep(world.lease * random.uniform(0.3, 0.6))
    finally:
        for process_id in reversed(frozen):
            kill(process_id, SIGCONT)
        hit.is_healed()


@kind("postgres-cut", "pg_terminate_backend of all workers' connections, some with vectors written and not committed",
      server=True)  # fmt: skip
def postgres_cut(world: World, random: Random, hit: Hit) -> None:
    with _writers_held(world) as (_, writing):
        hit.strikes()
        with world.db.connect() as conn:
            conn.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name"),
                {"name": WORKER},
            )
    hit.is_healed()
    hit.notes["cut_while_writing"] = len(writing)


@kind("postgres-deadlock", "rows of the ledger and of the vector table locked crosswise, so that a write is the victim",
      server=True)  # fmt: skip
def postgres_deadlock(world: World, random: Random, hit: Hit) -> None:
    before = _deadlocks(world)
    with _writers_held(world) as (conn, writing):
        hit.strikes()
        if writing:
            # The worker has written some of these and waits for the ledger's row; now we wait for the worker.
            with contextlib.suppress(sa.exc.DBAPIError):
                conn.execute(
                    sa.text(
                        f"INSERT INTO {world.table} SELECT DISTINCT ON (h) h, 1, false, (SELECT embedding FROM "
                        f"{world.table} LIMIT 1) FROM chunk_batches CROSS JOIN unnest(content_hashes) AS h "
                        "WHERE state = 'running' ORDER BY h ON CONFLICT DO NOTHING"
                    )
                )
    hit.is_healed()
    deadline = time.monotonic() + STATISTICS_SECONDS
    while writing and _deadlocks(world) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    hit.notes["deadlocks"] = _deadlocks(world) - before


@contextlib.contextmanager
def _writers_held(world: World) -> Iterator[tuple[sa.Connection, list[int]]]:
    """Lock the running ChunkBatches until workers wait with vectors written and not committed.

    Yields the connection with the locks, for statements that are rolled back in the end, and the workers' backends
    that wait so. Less than a lease passes, else the lock alone would be a fault.
    """
    with world.db.connect().execution_options(isolation_level="READ COMMITTED") as conn, conn.begin() as transaction:
        try:
            # The worker's side, which waits for a second at most, has to be the one that finds the deadlock.
            conn.execute(sa.text("SET LOCAL deadlock_timeout = '5s'"))
            conn.execute(sa.text(f"SET LOCAL statement_timeout = '{int(world.lease * 1000)}ms'"))
            me = conn.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            conn.execute(sa.text("SELECT id FROM chunk_batches WHERE state = 'running' ORDER BY id FOR UPDATE"))
            yield conn, _writing(world, me)
        finally:
            transaction.rollback()


def _writing(world: World, blocker: int) -> list[int]:
    """Workers' backends that wait for ``blocker`` and have written vectors; empty when none came in time."""
    deadline = time.monotonic() + min(MID_WRITE_SECONDS, world.lease / 2)
    pids: list[int] = []
    with world.db.connect() as look:
        while not pids and time.monotonic() < deadline:
            pids = list(
                look.execute(
                    sa.text(
                        "SELECT a.pid FROM pg_stat_activity a WHERE a.application_name = :name "
                        "AND :blocker = ANY(pg_blocking_pids(a.pid)) AND EXISTS (SELECT FROM pg_locks l "
                        "WHERE l.pid = a.pid AND l.relation = CAST(:table AS regclass) "
                        "AND l.mode = 'RowExclusiveLock' AND l.granted)"
                    ),
                    {"name": WORKER, "blocker": blocker, "table": world.table},
                ).scalars()
            )
            time.sleep(0.02)
    return pids


def _deadlocks(world: World) -> int:
    with world.db.connect() as conn:
        return int(
            conn.execute(
                sa.text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
            ).scalar_one()
        )
