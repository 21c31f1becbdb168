"""What a fault can reach, and what it leaves on record."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import redis
import sqlalchemy as sa

from chunkmill.embedded import Stack
from chunkmill_workers.process.lease import owner_name
from tests.chaos.executions import Blow
from tests.chaos.processes import Child, Crew, command_line
from tests.chaos.watcher import Held, Watcher
from tests.support.waiting import PATIENCE

VICTIM_SECONDS = PATIENCE
"""For a worker to be up at all."""
BUSY_SECONDS = 2.0
"""For one that holds a lease: to kill an idle worker proves little."""
LOOK_TIMEOUT = PATIENCE


class CannotStrike(Exception):
    """What the fault needs did not come."""


@dataclass
class Hit:
    """One fault as it went. ``problems`` are promises that were broken, in words."""

    number: int
    begun: threading.Event = field(default_factory=threading.Event)
    struck: float = 0.0
    healed: float = 0.0
    struck_wall: float = 0.0
    healed_wall: float = 0.0
    pids: set[int] = field(default_factory=set)
    held: Held = frozenset()
    """What the struck workers held: others must take it over."""
    held_at: float = 0.0
    notes: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def strikes(self) -> None:
        """Now. What comes before was waiting for a victim."""
        self.struck, self.struck_wall = time.monotonic(), time.time()
        self.begun.set()

    def is_healed(self) -> None:
        """All servers are back, and what was killed is for its supervisor to start."""
        self.healed, self.healed_wall = time.monotonic(), time.time()

    @property
    def blow(self) -> Blow:
        return Blow(self.number, self.struck_wall, self.healed_wall, frozenset(self.pids))


@dataclass(frozen=True, slots=True)
class World:
    """``db``: an engine in autocommit, as the database's superuser."""

    stack: Stack
    db: sa.Engine
    crew: Crew
    watcher: Watcher
    lease: float
    table: str
    redis_url: str

    @contextlib.contextmanager
    def victim(self, random: Random) -> Iterator[tuple[Child, int]]:
        """A worker that is up and no other fault's, with its pid; one that holds a lease, if there is one soon."""
        child, pid = self._choose(random)
        try:
            yield child, pid
        finally:
            child.struck = False

    def wait_busy(self) -> None:
        """Until a worker is up, and holds a lease if one does soon: a server's fault is to meet work."""
        self._await_workers()

    def _choose(self, random: Random) -> tuple[Child, int]:
        child, pid = random.choice(self._await_workers())
        child.struck = True
        return child, pid

    def _await_workers(self) -> list[tuple[Child, int]]:
        """Workers that are up and no other fault's, with their pids: those that hold leases, if there are any soon."""
        started = time.monotonic()
        while (waited := time.monotonic() - started) < VICTIM_SECONDS:
            up = [(child, pid) for child in self.crew.workers if not child.struck and (pid := child.ready_pid())]
            look = self.watcher.latest
            busy = [(child, pid) for child, pid in up if look and owner_name(pid) in look.running]
            if choice := busy or (up if waited > BUSY_SECONDS else []):
                return choice
            time.sleep(0.05)
        raise CannotStrike(f"no worker was up within {VICTIM_SECONDS:g} s")

    def note_held(self, hit: Hit) -> None:
        """What the ledger has under the names of the struck, which can renew no more."""
        look = self.watcher.after(time.monotonic(), LOOK_TIMEOUT)
        if look is None:
            raise CannotStrike(f"Postgres did not answer within {LOOK_TIMEOUT:g} s")
        owners = [owner_name(pid) for pid in hit.pids]
        hit.held = frozenset().union(*(look.running.get(owner, frozenset()) for owner in owners))
        hit.held_at = look.asked

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url, socket_timeout=PATIENCE)

    def redis_pid(self) -> int:
        return _required(self.stack.status().redis.pid, "Redis")

    def postgres_pid(self) -> int:
        return _required(self.stack.status().postgres.pid, "Postgres")


def _required(pid: int | None, server: str) -> int:
    if pid is None:
        raise CannotStrike(f"{server} does not run")
    return pid


def kill(pid: int, number: signal.Signals) -> None:
    """Signal a process that may have ended by itself just now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_gone(pid: int, timeout: float) -> None:
    """Until a process that is not our child has ended."""
    deadline = time.monotonic() + timeout
    while command_line(pid):
        if time.monotonic() > deadline:
            raise CannotStrike(f"process {pid} did not end within {timeout:g} s")
        time.sleep(0.02)
