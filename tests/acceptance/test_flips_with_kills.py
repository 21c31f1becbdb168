"""A thousand flips and rollbacks while producers, deleters, workers, pollers and the client that flips are killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
from tests.support import flip_chaos
from tests.support.checkout import CHECKOUT, PYTHONPATH
from tests.support.waiting import PATIENCE, running

SEED = 1_000
ROLES = (*["enqueue"] * 6, "delete", "delete", "work", "work", "poll", "poll", "go")


class Crew:
    """A process for each role, started again whenever it is killed."""

    def __init__(self, settings: Settings, rng: random.Random) -> None:
        env = os.environ | {
            "DATABASE_URL": settings.require_database_url(),
            "REDIS_URL": settings.require_redis_url(),
            "PYTHONPATH": PYTHONPATH,
        }
        command = [sys.executable, "-P", "-m", "tests.support.flip_chaos"]
        self._parent = subprocess.Popen(
            command, cwd=CHECKOUT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._rng = rng
        self._seeds = itertools.count(SEED)
        self._numbers = [self._start(role) for role in ROLES]
        self.kills = 0
        self.worker_kills = 0

    def _start(self, role: str) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(f"{role} {next(self._seeds)}\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def kill_one(self) -> None:
        """SIGKILL one of them, and start it anew."""
        i = self._rng.randrange(len(ROLES))
        os.kill(self._numbers[i], signal.SIGKILL)
        self._numbers[i] = self._start(ROLES[i])
        self.kills += 1
        self.worker_kills += ROLES[i] == "work"

    def end(self) -> None:
        """Kill all of them; it may be called twice."""
        for number in self._numbers:
            os.kill(number, signal.SIGKILL)
        self._numbers = []
        if self._parent.stdin is not None and not self._parent.stdin.closed:
            self._parent.stdin.close()
        self._parent.wait(PATIENCE)
        if self._parent.stdout is not None:
            self._parent.stdout.close()


@pytest.fixture
def crew(settings: Settings) -> Iterator[Crew]:
    made = Crew(settings, random.Random(SEED))
    try:
        yield made
    finally:
        made.end()


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_thousand_flips_lose_no_chunk_and_mix_no_spaces(
    settings: Settings, client: Client, db: sa.Engine, request: pytest.FixtureRequest
) -> None:
    cycles = int(os.environ.get("FLIPS", "1000")) // 2
    old, new = flip_chaos.prepare(client, db)
    crew: Crew = request.getfixturevalue("crew")
    watched, patience = threading.Event(), threading.Event()
    rng = random.Random(SEED)
    watching = create_db(settings.require_database_url(), role="watcher")
    with contextlib.ExitStack() as stack:
        seers = stack.enter_context(
            running(
                partial(flip_chaos.watch, watching, (old, new), watched.is_set),
                partial(flip_chaos.search, client, (old, new), random.Random(SEED), watched.is_set),
                release=watched.set,
            )
        )
        done, kills, since = 0, 0, time.monotonic()
        while done < cycles:
            # On a busy machine a process takes longer to start than kills are apart, so they come ever more rarely
            # until it has come back once more.
            patience.wait(min(60.0, 4 * rng.random() * 1.2 ** (crew.kills - kills)))
            crew.kill_one()
            before, done = done, flip_chaos.times_back(watching)
            if done > before:
                kills, since = crew.kills, time.monotonic()
                print(f"{2 * done} flips, {crew.kills} kills", file=sys.stderr, flush=True)
            assert time.monotonic() < since + PATIENCE, f"after {done} times it came back no more; {_shown(client)}"
    crew.end()
    watcher, searcher = (seer.result() for seer in seers)
    watching.dispose()
    print(f"{watcher.flips} flips, {crew.kills} kills, {watcher.looks} looks, {searcher.searches} searches")
    assert (watcher.problems, searcher.problems) == ([], [])
    assert watcher.flips >= 2 * cycles - 1
    # What a killed worker had in hand is computed again, and nothing else: at most four texts for each kill.
    computed = flip_chaos.computed(db)
    assert {space_id for space_id, _ in computed} == {new.id}
    assert sum(map(len, computed.values())) <= len(flip_chaos.STEADY) + 4 * crew.worker_kills


def _shown(client: Client) -> str:
    return repr([(one.id, one.state, one.problem) for one in client.reembeddings(limit=3)])
