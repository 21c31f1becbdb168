"""Reads the ledger and Redis repeatedly, for ``status --watch`` and for the poller's metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psycopg
import redis
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.db.connect import create_db, refusal, store_error
from chunkmill.monitor import snapshot
from chunkmill.monitor.snapshot import OpenJob, Snapshot, Totals
from chunkmill.openai.catalogue import read_twins
from chunkmill.settings import Settings
from chunkmill.telemetry.pace import Pace

COUNT_SHARE = 20
"""How many times its own duration passes between two counts, so that they use at most a twentieth of one of
Postgres' cores."""
LEAST_COUNT_SECONDS = 2.0
PACE_SECONDS = 300.0
"""The rate of an open job is measured over this many seconds."""
TIMEOUT = "60s"
"""The longest time that a statement may take. If a lock or a broken disk holds it up, an error is better than silence.
"""


@dataclass(frozen=True, slots=True)
class Eta:
    """How many contents of a job are embedded per second, and how many seconds it takes to embed the rest, if known."""

    per_second: float
    seconds: float | None


@dataclass(frozen=True, slots=True)
class View:
    """The latest that is known. If there is an error, ``snapshot`` and ``totals`` are from before it, or None."""

    snapshot: Snapshot | None = None
    totals: Totals | None = None
    doorbells: Mapping[str, int] | None = None
    """Doorbells in Redis, by queue; None while Redis is away."""
    postgres_error: str | None = None
    redis_error: str | None = None
    etas: Mapping[int, Eta] = field(default_factory=dict)
    """By the job's id."""
    snapshot_seconds: float = 0.0
    """How many seconds the latest snapshot took."""
    totals_seconds: float = 0.0
    """How many seconds the latest count took."""
    snapshot_at: float | None = None
    """When the snapshot was taken, on this process's monotonic clock."""
    totals_at: float | None = None


class JobPaces:
    """The rate of each open job over the last minutes."""

    def __init__(self) -> None:
        self._paces: dict[int, Pace] = {}

    def add(self, at: float, jobs: Sequence[OpenJob]) -> dict[int, Eta]:
        """The ETAs of the jobs that were counted at least twice and in which something was embedded in between.

        Their seconds are None until enough was embedded to tell them.
        """
        self._paces = {job.id: self._paces.get(job.id, Pace(PACE_SECONDS)) for job in jobs}
        etas = {}
        for job in jobs:
            pace = self._paces[job.id]
            (rate,) = pace.add(at, -job.remaining)
            if rate > 0:
                etas[job.id] = Eta(rate, pace.seconds_left(job.remaining))
        return etas


class Watcher:
    """One connection to Postgres and one to Redis. If a server is away, the view says so. For use by one thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        read_twins(settings)
        self._url = settings.require_database_url()
        self._db = create_db(self._url, role="look", pool_size=1)
        self._broker = Broker.connect(settings)
        self._paces = JobPaces()
        self._count_due = 0.0
        self._view = View()

    def look(self) -> View:
        """Read everything that is due, and return what is known now."""
        problem = None
        try:
            self._take_snapshot()
            if time.monotonic() >= self._count_due:
                self._count()
        except sa.exc.OperationalError as error:
            problem = str(store_error(self._url, error))
        except (sa.exc.SQLAlchemyError, psycopg.Error) as error:
            problem = f"Postgres refused: {refusal(error)}. `chunkmill doctor` shows more."
        doorbells, redis_problem = self._doorbells()
        self._view = replace(self._view, doorbells=doorbells, postgres_error=problem, redis_error=redis_problem)
        return self._view

    def close(self) -> None:
        self._broker.close()
        self._db.dispose()

    def _take_snapshot(self) -> None:
        started = time.monotonic()
        with self._begin() as conn:
            taken = snapshot.take(conn, self._settings)
        now = time.monotonic()
        self._view = replace(self._view, snapshot=taken, snapshot_seconds=now - started, snapshot_at=now)

    def _count(self) -> None:
        started = time.monotonic()
        with self._begin() as conn:
            totals = snapshot.count(conn)
        now = time.monotonic()
        seconds = now - started
        self._count_due = now + max(LEAST_COUNT_SECONDS, COUNT_SHARE * seconds)
        etas = self._paces.add(now, totals.open_jobs)
        self._view = replace(self._view, totals=totals, etas=etas, totals_seconds=seconds, totals_at=now)

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        """A read-only transaction with a time limit on each statement."""
        with self._db.begin() as conn:
            conn.execute(sa.text("SET TRANSACTION READ ONLY"))
            conn.execute(sa.text(f"SET LOCAL statement_timeout = '{TIMEOUT}'"))
            yield conn

    def _doorbells(self) -> tuple[dict[str, int] | None, str | None]:
        try:
            return self._broker.doorbells_by_queue(), None
        except (redis.RedisError, OSError) as error:
            return None, f"cannot use Redis: {refusal(error).rstrip('.')}. Until it is back, work waits in Postgres."
