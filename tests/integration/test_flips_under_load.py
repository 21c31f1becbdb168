"""Flips and rollbacks while everybody writes and connections are cut. `make chaos` kills the processes too."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import psycopg
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.support import flip_chaos
from tests.support.waiting import running, until

SEED = 20
CYCLES = 10


@dataclass(frozen=True, slots=True)
class Cut:
    """A session of one of the roles that was ended, somewhere between two times of the server's clock."""

    role: str
    after: datetime
    before: datetime


def cut_connections(settings: Settings, rng: random.Random, stopped: threading.Event) -> list[Cut]:
    """End a session of the clients, the workers or the pollers now and then."""
    cuts: list[Cut] = []
    query = """
        SELECT application_name, now() AS after, pg_terminate_backend(pid), clock_timestamp() AS before
        FROM (
            SELECT pid, application_name FROM pg_stat_activity
            WHERE datname = current_database()
              AND application_name IN ('chunkmill-client', 'chunkmill-worker', 'chunkmill-poller')
            ORDER BY random()
            LIMIT 1
        ) one
    """
    url = settings.require_database_url().replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as conn:
        while not stopped.wait(0.3 * rng.random()):
            cuts.extend(Cut(role, after, before) for role, after, _, before in conn.execute(query))
    return cuts


def test_no_chunk_is_missing_and_no_answer_mixes_spaces(
    settings: Settings, client: Client, db: sa.Engine, hands: Hands
) -> None:
    """Two who enqueue, one who deletes, two workers and a poller, while the collection goes and comes back."""
    # A lease that runs out because the machine is busy would let a content be embedded again without a cut.
    settings = flip_chaos.small(settings).model_copy(update={"lease_seconds": 30.0})
    old, new = flip_chaos.prepare(client, db)
    hands.work()
    stop, watched = threading.Event(), threading.Event()
    rngs = (random.Random(SEED + i) for i in range(20))
    watching = create_db(settings.require_database_url(), role="watcher")
    with contextlib.ExitStack() as stack:
        stack.enter_context(flip_chaos.quick_passes())
        seers = stack.enter_context(
            running(
                partial(flip_chaos.watch, watching, (old, new), watched.is_set),
                partial(flip_chaos.search, client, (old, new), next(rngs), watched.is_set),
                release=watched.set,
            )
        )
        roles = ["enqueue", "enqueue", "delete", "work", "work", "poll", "go"]
        *_, cutter = stack.enter_context(
            running(
                *[partial(flip_chaos.ROLES[role], settings, next(rngs), stop.is_set) for role in roles],
                partial(cut_connections, settings, next(rngs), stop),
                release=stop.set,
            )
        )
        until(
            lambda: flip_chaos.times_back(watching) >= CYCLES,
            lambda: hands.rows("SELECT id, state, problem FROM reembeddings ORDER BY id DESC LIMIT 3"),
            pause=0.1,
        )
    watcher, searcher = (seer.result() for seer in seers)
    watching.dispose()
    assert (watcher.problems, searcher.problems) == ([], [])
    assert watcher.flips >= 2 * CYCLES
    assert searcher.searches > 0
    cuts = [cut for cut in cutter.result() if cut.role == "chunkmill-worker"]
    assert cuts
    computed = flip_chaos.computed(hands.db)
    assert {space_id for space_id, _ in computed} == {new.id}
    assert len(computed) == len(flip_chaos.STEADY)
    # All was there before the collection went for the first time, and nothing was embedded again later. Until then
    # nothing was but what a worker had in hand when its connection was cut.
    [(went,)] = hands.rows("SELECT min(flipped_at) FROM reembeddings")
    for times in computed.values():
        assert times[-1] < went
        for first, again in itertools.pairwise(times):
            assert any(cut.after < again and first < cut.before for cut in cuts), (first, again, cuts)
