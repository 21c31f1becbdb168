"""Look at the ledger and at Redis again and again: what `status --watch` shows and what a poller's metrics say."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psycopg
import redis
import sqlalchemy as sa

from chunkmill.broker import BELLS, Broker
from chunkmill.db.connect import create_db, refusal, store_error
from chunkmill.domain.states import Route
from chunkmill.monitor import snapshot
from chunkmill.monitor.reports import Kind
from chunkmill.monitor.snapshot import LANES, Now, OpenJob, Tally
from chunkmill.openai.catalogue import read_twins
from chunkmill.settings import Settings

TALLY_SHARE = 20
"""Times its own cost between two tallies: looking takes no more than a twentieth of one of Postgres' cores."""
LEAST_TALLY_SECONDS = 2.0
PACE_SECONDS = 300.0
"""An open job's rate is that of so long."""
TIMEOUT = "60s"
"""Of a statement. Behind a lock or a broken disk it is better to say so than to hang."""


@dataclass(frozen=True, slots=True)
class Eta:
    """Contents a second of a job, and seconds until its last at that rate."""

    per_second: float
    seconds: float


@dataclass(frozen=True, slots=True)
class View:
    """The latest that is known. With an error, ``now`` and ``tally`` are what was seen before it, or None."""

    now: Now | None
    tally: Tally | None
    doorbells: Mapping[str, int] | None
    """In Redis, by queue; None while it is away."""
    postgres_error: str | None
    redis_error: str | None
    etas: Mapping[int, Eta]
    now_seconds: float
    """What the latest looks cost."""
    tally_seconds: float
    now_at: float | None
    """On this process's monotonic clock."""
    tally_at: float | None


class Pace:
    """The rate of each open job over the last minutes, from what was left of it at each tally."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, dict[int, int]]] = deque()

    def add(self, at: float, jobs: Sequence[OpenJob]) -> dict[int, Eta]:
        """Etas, as far as they are known: of a job seen twice of which something was done in between."""
        left = {job.id: job.remaining for job in jobs}
        self._looks.append((at, left))
        while at - self._looks[0][0] > PACE_SECONDS:
            self._looks.popleft()
        etas = {}
        for job_id, remaining in left.items():
            then, before = next((t, seen[job_id]) for t, seen in self._looks if job_id in seen)
            if before > remaining and at > then:
                rate = (before - remaining) / (at - then)
                etas[job_id] = Eta(rate, remaining / rate)
        return etas


class Looker:
    """One connection to Postgres and one to Redis, which may be away: then the view says so. For one thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        read_twins(settings)
        self._url = settings.require_database_url()
        self._db = create_db(self._url, role="look", pool_size=1)
        self._broker = Broker.connect(settings)
        self._pace = Pace()
        self._tally_due = 0.0
        self._view = View(None, None, None, None, None, {}, 0.0, 0.0, None, None)

    def look(self) -> View:
        view = self._view
        now, tally, etas = view.now, view.tally, view.etas
        now_seconds, tally_seconds, now_at, tally_at = view.now_seconds, view.tally_seconds, view.now_at, view.tally_at
        problem = None
        try:
            started = time.monotonic()
            with self._begin() as conn:
                now = snapshot.now(conn, self._settings)
            now_at = time.monotonic()
            now_seconds = now_at - started
            if now_at >= self._tally_due:
                with self._begin() as conn:
                    tally = snapshot.tally(conn)
                tally_at = time.monotonic()
                tally_seconds = tally_at - now_at
                self._tally_due = tally_at + max(LEAST_TALLY_SECONDS, TALLY_SHARE * tally_seconds)
                etas = self._pace.add(tally_at, tally.open_jobs)
        except sa.exc.OperationalError as error:
            problem = str(store_error(self._url, error))
        except (sa.exc.SQLAlchemyError, psycopg.Error) as error:
            problem = f"Postgres refused: {refusal(error)}. `chunkmill doctor` shows more."
        doorbells, redis_problem = self._doorbells()
        self._view = View(
            now, tally, doorbells, problem, redis_problem, etas, now_seconds, tally_seconds, now_at, tally_at
        )
        return self._view

    def close(self) -> None:
        self._broker.close()
        self._db.dispose()

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        """A read-only transaction with a limit on each statement."""
        with self._db.begin() as conn:
            conn.execute(sa.text("SET TRANSACTION READ ONLY"))
            conn.execute(sa.text(f"SET LOCAL statement_timeout = '{TIMEOUT}'"))
            yield conn

    def _doorbells(self) -> tuple[dict[str, int] | None, str | None]:
        try:
            return {bells.queue: sum(self._broker.queued_doorbells(bells).values()) for bells in BELLS}, None
        except (redis.RedisError, OSError) as error:
            return None, f"cannot use Redis: {refusal(error).rstrip('.')}. Doorbells wait in Postgres meanwhile."


def lane_states(now: Now) -> dict[Route, str]:
    """``stopped``, ``paused`` or ``held`` as the ledger says; else ``running``, or ``idle`` where no worker for the
    lane reports."""
    live = [worker for worker in now.workers if not worker.is_silent]
    said = {lane.route: lane.state for lane in now.lanes}
    states = {}
    for route in LANES:
        state = said.get(route, "running")
        kind: Kind = "local" if route is Route.LOCAL else "provider"
        served = any(worker.serves(kind) for worker in live)
        states[route] = "idle" if state == "running" and not served else state
    return states
