"""Flips and rollbacks while everybody writes and connections are cut. `make chaos` kills the processes too."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from functools import partial

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.chunks import content_hash
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from tests.integration.hands import Hands
from tests.support import flip_chaos
from tests.support.flip_chaos import STEADY
from tests.support.several_spaces import other_space, write
from tests.support.waiting import PATIENCE, running

SEED = 20


def cut_connections(settings: Settings, rng: random.Random, stopped: threading.Event) -> int:
    """End a session of the clients, the workers or the pollers now and then. Returns how many."""
    cut = 0
    query = """
        SELECT pg_terminate_backend(pid)
        FROM (
            SELECT pid FROM pg_stat_activity
            WHERE datname = current_database()
              AND application_name IN ('chunkmill-client', 'chunkmill-worker', 'chunkmill-poller')
            ORDER BY random()
            LIMIT 1
        ) one
    """
    url = settings.require_database_url().replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as conn:
        while not stopped.wait(0.3 * rng.random()):
            cut += len(conn.execute(query).fetchall())
    return cut


@pytest.mark.parametrize("cycles", [10])
def test_no_chunk_is_missing_and_no_answer_mixes_spaces(
    settings: Settings, client: Client, db: sa.Engine, hands: Hands, cycles: int
) -> None:
    """Two who enqueue, one who deletes, two workers and a poller, while the collection goes and comes back."""
    settings = flip_chaos.small(settings)
    with db.begin() as conn:
        conn.execute(sa.text(flip_chaos.COMPUTED))
    for collection in ("docs", "stays"):
        client.enqueue(STEADY, collection=collection)
    with db.begin() as conn:
        old = registry.get(conn, collections.find(conn, "docs").space_id)
        write(conn, old, [text for _, text in STEADY])
        new = other_space(conn, old)
    hands.work()
    stop, watched = threading.Event(), threading.Event()
    rngs = (random.Random(SEED + i) for i in range(20))
    roles = [*["enqueue"] * 2, "delete", *["work"] * 2, "poll"]
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
        stack.enter_context(
            running(
                *[partial(flip_chaos.ROLES[role], settings, next(rngs), stop.is_set) for role in roles],
                partial(cut_connections, settings, next(rngs), stop),
                release=stop.set,
            )
        )
        flip_chaos.go_and_come_back(
            client, settings.embedding_model, times=cycles, deadline=time.monotonic() + PATIENCE
        )
    watcher, searcher = (seer.result() for seer in seers)
    watching.dispose()
    assert (watcher.problems, searcher.problems) == ([], [])
    assert (watcher.flips, watcher.looks > cycles, searcher.searches > 0) == (2 * cycles, True, True)
    assert hands.rows("SELECT id FROM reembeddings WHERE finished_at IS NULL") == []
    # Nothing was embedded twice but what a worker had in hand when its connection was cut.
    steady = [content_hash(text) for _, text in STEADY]
    again = hands.rows(
        "SELECT space_id, content_hash, count(*) FROM chaos_computed "
        "WHERE content_hash = ANY(CAST(:steady AS bytea[])) GROUP BY 1, 2",
        steady=steady,
    )
    assert {bytes(row[1]) for row in again if row[0] == new.id} == set(steady)
    assert [row for row in again if row[0] == old.id] == []
    assert max(row[2] for row in again) <= 2
