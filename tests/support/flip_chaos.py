"""Everybody who works on a collection that flips and rolls back all the time, and somebody who watches.

The roles run as threads of a test, or as processes that are killed: ``python -P -m tests.support.flip_chaos`` forks
them for the servers in DATABASE_URL and REDIS_URL.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import psycopg
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import ChunkmillError, Gates, ReembeddingState, WaitTimeout
from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.states import ChunkBatchState
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.reembedding import fill
from chunkmill.ledger.work import chunk_batches
from chunkmill.poller.poller import Poller
from chunkmill.poller.reembedding import Reembedder
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.store.read import read_work, still_wanted
from chunkmill.store.write import write_vectors
from tests.support.several_spaces import other_space, vector_of, write

logger = logging.getLogger(__name__)

STEADY = [(f"steady-{i}", f"the steady text {i}") for i in range(25)]
"""Chunks that nobody touches."""
IDS, TEXTS = 40, 60
"""The chunks that come and go, and their texts. Some of the texts are in the other collection too."""
GATES = Gates(canary=False, recall=None, ndcg_loss=None, p95_ratio=None)
COMPUTED = """
    CREATE TABLE IF NOT EXISTS chaos_computed (space_id int, content_hash bytea, pid int, at timestamptz DEFAULT now())
"""
TROUBLE = (ChunkmillError, sa.exc.SQLAlchemyError, psycopg.Error, OSError)
"""What a connection that is cut may look like."""


def small(settings: Settings) -> Settings:
    """Settings under which a few chunks make several windows and ChunkBatches."""
    changes = {"chunk_batch_size": 4, "enqueue_window": 6, "index_seconds": 0.0, "doorbell_window": 50}
    return settings.model_copy(update=changes)


def new_client(settings: Settings) -> Client:
    return Client(create_db(settings.require_database_url(), role="client"), Broker.connect(settings), settings)


def enqueue(settings: Settings, rng: random.Random, stopped: Callable[[], bool]) -> None:
    """Enqueue and replace chunks, in either of the two spaces, in both collections."""
    with new_client(settings) as client:
        while not stopped():
            chunks = [(f"c{rng.randrange(IDS)}", f"text {rng.randrange(TEXTS)}") for _ in range(rng.randint(1, 9))]
            collection = "docs" if rng.random() < 0.8 else "stays"
            on_long = "split" if collection == "docs" and rng.random() < 0.3 else "truncate"
            with contextlib.suppress(*TROUBLE):
                client.enqueue(chunks, collection=collection, on_long=on_long)
            time.sleep(0.2 * rng.random())


def delete(settings: Settings, rng: random.Random, stopped: Callable[[], bool]) -> None:
    """Delete chunks that come and go."""
    with new_client(settings) as client:
        while not stopped():
            ids = [f"c{rng.randrange(IDS)}" for _ in range(rng.randint(1, 6))]
            with contextlib.suppress(*TROUBLE):
                client.delete("docs" if rng.random() < 0.8 else "stays", ids)
            time.sleep(0.4 * rng.random())


def work(settings: Settings, rng: random.Random, stopped: Callable[[], bool]) -> None:
    """Embed what is due, the more urgent first, and note in a table of its own what was computed."""
    db = create_db(settings.require_database_url(), role="worker")
    owner = f"chaos:{os.getpid()}:{threading.get_ident()}"
    try:
        while not stopped():
            try:
                if not _embed_one(db, settings, rng, owner):
                    time.sleep(0.01)
            except (*TROUBLE, AssertionError):
                # As the supervisor does when a worker ends.
                with contextlib.suppress(*TROUBLE), db.begin() as conn:
                    chunk_batches.release_all(conn, owner)
    finally:
        db.dispose()


def _embed_one(db: sa.Engine, settings: Settings, rng: random.Random, owner: str) -> bool:
    due = """
        SELECT id FROM chunk_batches
        WHERE state = :available AND not_before <= now()
        ORDER BY priority, id
        LIMIT 4
    """
    with db.begin() as conn:
        ids = conn.execute(sa.text(due), {"available": ChunkBatchState.AVAILABLE}).scalars().all()
        if not ids:
            return False
        lease = chunk_batches.claim_if_due(conn, rng.choice(ids), owner=owner, lease_seconds=settings.lease_seconds)
    if lease is None:
        return True
    with db.begin() as conn:
        space = registry.get(conn, lease.space_id)
        todo = read_work(conn, space, lease.chunk_batch_id)
    with db.begin() as conn:
        note = "INSERT INTO chaos_computed (space_id, content_hash, pid) SELECT :space, unnest(:hashes), :pid"
        hashes = [text_hash for text_hash, _ in todo.texts]
        conn.execute(
            sa.text(note.replace(":hashes", "CAST(:hashes AS bytea[])")),
            {"space": space.id, "hashes": hashes, "pid": os.getpid()},
        )
    with db.begin() as conn:
        wanted = still_wanted(conn, hashes, since=todo.deletions)
        texts = [(h, text) for h, text in todo.texts if wanted is None or h in wanted]
        if texts:
            write_vectors(
                conn,
                space,
                space.spec.fingerprint,
                [h for h, _ in texts],
                np.ones(len(texts), np.int32),
                np.zeros(len(texts), np.bool_),
                np.stack([vector_of(space, text) for _, text in texts]),
            )
        if not chunk_batches.complete_if_held(conn, lease, n_embedded=todo.known + len(texts), n_truncated=0):
            conn.rollback()
            return True
    with db.begin() as conn:
        finish_if_done(conn, lease.job_id, registry.VectorTable(jobs.space_id(conn, lease.job_id)), wait=False)
    return True


def poll(settings: Settings, rng: random.Random, stopped: Callable[[], bool]) -> None:
    """What a poller does, as often as it can."""
    db = create_db(settings.require_database_url(), role="poller")
    broker = Broker.connect(settings)
    try:
        while not stopped():
            for rounds in (Poller(db, broker, settings).round, Reembedder(db, settings).round):
                with contextlib.suppress(*TROUBLE):
                    rounds()
            time.sleep(0.1 * rng.random())
    finally:
        broker.close()
        db.dispose()


def go(settings: Settings, rng: random.Random, stopped: Callable[[], bool]) -> None:
    """Move the collection to its other space and back, all the time. It looks what is next, so it may die anywhere."""
    with new_client(settings) as client:
        while not stopped():
            try:
                _go_on(client, settings.embedding_model)
            except WaitTimeout:
                # Workers that are killed again and again take a content for one that kills.
                with contextlib.suppress(*TROUBLE):
                    client.retry_dead()
            except TROUBLE as error:
                logger.debug("tried again: %s", error)
            time.sleep(0.05 * rng.random())


def _go_on(client: Client, model: str) -> None:
    latest = client.reembeddings("docs", limit=1)
    if not latest or not latest[0].is_open:
        client.reembed("docs", to=model, on_long="split", gates=GATES, ramp=(50,), step_hours=0, priority="high")
    elif latest[0].state is ReembeddingState.RAMPING:
        client.flip(latest[0].id, timeout=2.0)
    elif latest[0].state is ReembeddingState.FLIPPED:
        client.rollback(latest[0].id, timeout=2.0)


def times_back(db: sa.Engine) -> int:
    """How often the collection has come back. It has gone as often."""
    query = "SELECT count(*) FROM reembeddings WHERE state = :state AND flipped_at IS NOT NULL"
    with db.begin() as conn:
        return int(conn.execute(sa.text(query), {"state": ReembeddingState.ROLLED_BACK}).scalar_one())


def prepare(client: Client, db: sa.Engine) -> tuple[registry.Space, registry.Space]:
    """Two collections in one space, with chunks that nobody touches, embedded. Returns the old and the new space."""
    with db.begin() as conn:
        conn.execute(sa.text(COMPUTED))
    for collection in ("docs", "stays"):
        client.enqueue(STEADY, collection=collection)
    with db.begin() as conn:
        old = registry.get(conn, collections.find(conn, "docs").space_id)
        write(conn, old, [text for _, text in STEADY])
        return old, other_space(conn, old)


def computed(db: sa.Engine) -> dict[tuple[int, bytes], list[datetime]]:
    """``(space, content) → when it was computed``, in order, of the texts that nobody touches."""
    query = """
        SELECT space_id, content_hash, array_agg(at ORDER BY at) AS times
        FROM chaos_computed
        WHERE content_hash = ANY(CAST(:steady AS bytea[]))
        GROUP BY space_id, content_hash
    """
    with db.begin() as conn:
        rows = conn.execute(sa.text(query), {"steady": [content_hash(text) for _, text in STEADY]})
        return {(row.space_id, bytes(row.content_hash)): row.times for row in rows}


ROLES = {"enqueue": enqueue, "delete": delete, "work": work, "poll": poll, "go": go}


@dataclass
class Seen:
    """What the watcher saw."""

    looks: int = 0
    flips: int = 0
    searches: int = 0
    problems: list[str] = field(default_factory=list)


_SEARCHABLE = """
SELECT k.space_id, c.chunk_id, c.ctid::text || ' ' || c.xmin::text AS version,
       CASE k.space_id WHEN :old THEN o.content_hash IS NOT NULL ELSE n.content_hash IS NOT NULL END AS is_searchable
FROM collections k
LEFT JOIN chunks c ON c.collection_id = k.id
LEFT JOIN vectors_{old} o ON o.content_hash = c.content_hash
LEFT JOIN vectors_{new} n ON n.content_hash = c.content_hash
WHERE k.name = 'docs'
"""


def watch(db: sa.Engine, spaces: tuple[registry.Space, registry.Space], stopped: Callable[[], bool]) -> Seen:
    """Look all the time which chunks can be searched, each time in one snapshot.

    A chunk that could be searched, and whose row nobody has written since, must be searchable in the next look: its
    content cannot have been deleted, because the chunk refers to it.
    """
    seen = Seen()
    old, new = spaces
    query = sa.text(_SEARCHABLE.format(old=old.id, new=new.id))
    before: dict[tuple[str, str], bool] = {}
    active = None
    while not stopped():
        with db.begin() as conn:
            rows = conn.execute(query, {"old": old.id}).all()
        seen.looks += 1
        if rows and rows[0].space_id != active:
            seen.flips += active is not None
            active = rows[0].space_id
        now = {(row.chunk_id, row.version): row.is_searchable for row in rows if row.chunk_id is not None}
        lost = [key[0] for key, was in before.items() if was and now.get(key) is False]
        if lost:
            seen.problems.append(f"look {seen.looks}: {sorted(lost)[:5]} are missing in space {active}")
        before = now
        time.sleep(0.02)
    return seen


def search(
    client: Client, spaces: tuple[registry.Space, registry.Space], rng: random.Random, stopped: Callable[[], bool]
) -> Seen:
    """Search all the time. All hits of an answer have the scores of one and the same space."""
    seen = Seen()
    known: dict[tuple[int, str], NDArray[np.float32]] = {}

    def unit(space: registry.Space, text: str) -> NDArray[np.float32]:
        if (space.id, text) not in known:
            vector = vector_of(space, text)
            known[space.id, text] = vector / np.linalg.norm(vector)
        return known[space.id, text]

    while not stopped():
        query = np.asarray([rng.gauss(0, 1) for _ in range(spaces[0].spec.dimensions)], np.float32)
        query /= np.linalg.norm(query)
        try:
            hits = client.search(query, collection="docs", k=12)
        except TROUBLE:
            continue
        seen.searches += 1
        fits = [all(abs(hit.score - float(unit(space, hit.text) @ query)) < 1e-3 for hit in hits) for space in spaces]
        if not any(fits):
            seen.problems.append(f"search {seen.searches} mixes spaces")
        time.sleep(0.2)
    return seen


@contextlib.contextmanager
def quick_passes() -> Iterator[None]:
    """Let the filling look again at once at what it left alone."""
    kept, fill.RETRY_SECONDS = fill.RETRY_SECONDS, 0.2
    try:
        yield
    finally:
        fill.RETRY_SECONDS = kept


def main() -> None:
    """Fork a process for each line of stdin, ``ROLE SEED``, and print its number, so that none imports all this again.

    The processes end when this one does, at the end of stdin.
    """
    logging.basicConfig(level=os.environ.get("CHAOS_LOG", "CRITICAL"))
    fill.RETRY_SECONDS = 0.2
    settings = small(Settings.from_env(lease_seconds=2.0, poll_interval=0.1))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getpid()
    for line in sys.stdin:
        role, seed = line.split()
        if number := os.fork():
            print(number, flush=True)
            continue
        ROLES[role](settings, random.Random(int(seed)), lambda: os.getppid() != parent)
        os._exit(0)


if __name__ == "__main__":
    main()
