"""A collection moves to another space and back: what starts when, who waits for whom, and what is embedded twice.

A poller, a worker, producers, deleters and searchers are processes of their own. The rows of the collection and their
vectors in the old space are written by SQL. The worker is a stand-in: it takes ChunkBatches from the ledger and writes
vectors as the worker does, without a model and without Celery, so that only the ledger and the store are measured. It
is killed once in the middle of the filling.

Every process notes how long it waits for locks, by the clock that all processes of a machine have in common.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import Gates, Reembedding, ReembeddingState
from chunkmill.broker import Broker
from chunkmill.cli.start.children import Child
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.states import ChunkBatchState
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches
from chunkmill.models import resolve_spec
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.spaces.registry import Space
from chunkmill.store.read import keep_deletions_out
from chunkmill.store.write import relax_durability
from chunkmill.system.python import module_command
from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.pipeline import process
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import Servers, temporary_stack
from chunkmill_workers.benchmarks.stats import Measurement, Target, slope
from chunkmill_workers.benchmarks.topics import TOPICS, World

ROWS, MILLION_ROWS = 100_000, 1_000_000
CYCLES, MILLION_CYCLES = 5, 3
"""How often the collection goes and comes back."""
START, LOCKED, BACK = Target(10, at_most=True), Target(100, at_most=True), Target(1, at_most=True)
TWICE = Target(512, at_most=True)
"""The contents of a ChunkBatch, which the stand-in embeds in one pass."""
POLLER_MIB, GROWTH_MIB = Target(200, at_most=True), Target(2, at_most=True)
COLLECTION, STEADY = "docs", "steady"
BASES = 2_048
"""How many vectors the rows share."""
GATES = Gates(canary=False, recall=None, ndcg_loss=None, p95_ratio=None)
LEASE_S = 10.0
"""So short, because a worker is killed. The stand-in needs less than a second for a ChunkBatch."""
LOOK_S = 0.02
PAUSE_S = 1.0
"""How long the collection is left alone before each flip and rollback."""
IDS, TEXTS = 5_000, 500
"""The chunks that come and go, and how many of the steady texts they have."""
FRESH = 0.1
"""The share of the enqueues that bring a text which is new."""
PRODUCERS, DELETERS, SEARCHERS = 2, 1, 2
LOCKS = ("pg_advisory_xact_lock", "FOR KEY SHARE")
"""A statement with one of these waits for the flip, if anything does."""


def run(
    *, quick: bool, say: Say, million: bool = False, rows: int | None = None, cycles: int | None = None
) -> dict[str, Any]:
    """The result. With ``quick`` it only shows that everything runs."""
    rows = rows or (5_000 if quick else MILLION_ROWS if million else ROWS)
    cycles = cycles or (1 if quick else MILLION_CYCLES if million else CYCLES)
    is_indexed = not million
    env = {"LEASE_SECONDS": f"{LEASE_S:g}"} | ({} if is_indexed else {"INDEX_SECONDS": "0"})
    say("starting Postgres and Redis")
    with temporary_stack() as servers, contextlib.ExitStack() as stack:
        db = stack.enter_context(servers.db())
        client = stack.enter_context(servers.client())
        clock = Clock(client._db)
        say(f"storing {rows:,} chunks")
        scene = _prepare(servers, client, db, rows)
        if is_indexed:
            say("indexing them")
            client.index(COLLECTION)
        say("starting a poller")
        poller = stack.enter_context(process(servers, "poller", module_command("chunkmill.cli", "poller"), env))
        _wait_for_poller(db, poller)
        measurements, samples, workers = _fill(servers, stack, client, db, scene, poller, env, say)
        say("starting those who enqueue, delete and search")
        crowd = [
            stack.enter_context(_role(servers, role, number, env))
            for role, n in (("enqueue", PRODUCERS), ("delete", DELETERS), ("search", SEARCHERS))
            for number in range(n)
        ]
        _wait_for(crowd)
        alive = [poller, workers[-1].child, *(one.child for one in crowd)]
        turns = _go_and_come_back(client, clock, cycles, alive, say)
        _expect_the_same_chunks(db, scene)
        for one in crowd:
            one.child.require_alive()
        stack.pop_all().close()
        # The folder with the notes is there until the end of the outer block.
        noted = [(one.role, note) for one in (*crowd, *workers) for note in one.notes()]
        versions = servers.versions
    measurements += _turns(rows, turns) + _waits(rows, turns, noted)
    settings = {
        "chunks": rows,
        "flips_and_rollbacks": cycles,
        "serving_indexes": is_indexed,
        "producers": PRODUCERS,
        "deleters": DELETERS,
        "searchers": SEARCHERS,
        "lease_seconds": LEASE_S,
        "chunk_batch_size": servers.settings.chunk_batch_size,
        "enqueue_window": servers.settings.enqueue_window,
        "load_average": os.getloadavg(),
    }
    extra = {"samples": samples, "turns": [turn.as_json() for turn in turns]}
    name = "reembed-million" if million else "reembed"
    return document(name, measurements, settings=settings, versions=versions, extra=extra)


@dataclass(frozen=True, slots=True)
class Scene:
    """The collection, its space, and the chunks that nobody touches."""

    rows: int
    collection_id: int
    old: Space


_BASES = "CREATE TABLE bench_bases (n integer PRIMARY KEY, embedding vector)"
_COMPUTED = "CREATE TABLE bench_computed (space_id integer, n integer)"
_TEXTS = """
    SELECT i, sha256(convert_to(t.text, 'UTF8')) AS content_hash, t.text
    FROM generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS i
    CROSS JOIN LATERAL (SELECT 'steady text ' || i || ': ' || repeat(md5(i::text) || ' ', 8) AS text) t
"""


def _prepare(servers: Servers, client: Client, db: sa.Engine, rows: int, step: int = 50_000) -> Scene:
    """A collection of ``rows`` chunks with vectors, by SQL, which is faster than a producer and a worker."""
    client.enqueue([("first", "the first text")], collection=COLLECTION)
    with db.begin() as conn:
        collection = collections.find(conn, COLLECTION)
        old = registry.get(conn, collection.space_id)
        job_id = conn.execute(sa.text("SELECT max(id) FROM jobs")).scalar_one()
        conn.execute(sa.text(_BASES))
        conn.execute(sa.text(_COMPUTED))
        insert = "INSERT INTO bench_bases VALUES (:n, CAST(:embedding AS vector))"
        vectors = bases(old.spec.dimensions)
        conn.execute(sa.text(insert), [{"n": n, "embedding": str(vector.tolist())} for n, vector in enumerate(vectors)])
    statement = f"""
        WITH texts AS MATERIALIZED ({_TEXTS}),
        stored AS (INSERT INTO contents (content_hash, text) SELECT content_hash, text FROM texts),
        embedded AS (
            INSERT INTO {old.table_name} (content_hash, embedding, n_tokens, truncated)
            SELECT t.content_hash, b.embedding, 8, false
            FROM texts t
            JOIN bench_bases b ON b.n = t.i % CAST(:bases AS integer)
        )
        INSERT INTO chunks (collection_id, chunk_id, content_hash, metadata, job_id)
        SELECT :collection, 'steady-' || i, content_hash, jsonb_build_object('part', i % 2000), :job
        FROM texts
    """
    for first in range(0, rows, step):
        last = min(first + step, rows) - 1
        parameters = {"first": first, "last": last, "bases": BASES, "collection": collection.id, "job": job_id}
        with db.begin() as conn:
            conn.execute(sa.text(statement), parameters)
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(sa.text("VACUUM (ANALYZE)"))
    return Scene(rows, collection.id, old)


def steady_text(row: int) -> str:
    """The text that :func:`_prepare` gave a row."""
    digest = hashlib.md5(str(row).encode(), usedforsecurity=False).hexdigest()
    return f"steady text {row}: " + f"{digest} " * 8


def bases(dimensions: int) -> NDArray[np.float32]:
    """``(2048, d)`` float32 of length 1, of which each row has one."""
    rng = np.random.default_rng(19)
    made = World().vectors(rng.integers(0, TOPICS, BASES), rng)
    return np.ascontiguousarray(np.resize(made, (BASES, dimensions)))


def _fill(
    servers: Servers, stack: contextlib.ExitStack, client: Client, db: sa.Engine, scene: Scene, poller: Child,
    env: Mapping[str, str], say: Say,
) -> tuple[list[Measurement], list[dict[str, Any]], list[Role]]:  # fmt: skip
    """Begin the first migration, let a worker be killed in the middle, and wait until it ramps."""
    say("beginning the migration")
    began = time.perf_counter()
    begun = _begin(client)
    until_returned = time.perf_counter() - began
    with db.begin() as conn:
        new = registry.VectorTable(_to_space(conn, begun.id))
    start = None
    while start is None:
        poller.require_alive()
        if _has_chunk_batch(db, new.id):
            start = time.perf_counter() - began
        time.sleep(LOOK_S)
    samples: list[dict[str, Any]] = []
    workers = [stack.enter_context(_role(servers, "work", 0, env))]
    killed_at = None
    while (seen := client.reembedding(begun.id)).state is not ReembeddingState.RAMPING:
        _require_open(seen)
        poller.require_alive()
        embedded = _embedded(db, new)
        resident = machine.memory_kib(poller.pid, "VmRSS")
        seconds = round(time.perf_counter() - began, 1)
        samples.append({
            "seconds": seconds, "state": seen.state, "embedded": embedded,
            "poller": None if resident is None else round(resident / 1024, 1),
        })  # fmt: skip
        say(f"{seen.state}: {embedded:,} of {scene.rows:,} embedded")
        if killed_at is None and embedded >= scene.rows // 2:
            os.kill(workers[0].child.pid, signal.SIGKILL)
            killed_at = seconds
            workers.append(stack.enter_context(_role(servers, "work", 1, env)))
        else:
            workers[-1].child.require_alive()
        time.sleep(0.5)
    filled = next((sample["seconds"] for sample in samples if sample["embedded"] >= scene.rows), samples[-1]["seconds"])
    group = f"a migration of {scene.rows:,} chunks"
    peak = machine.memory_kib(poller.pid, "VmHWM")
    measurements = [
        Measurement(
            group, "from the call to the first ChunkBatch that a worker may take", "s", [start], target=START,
            details={"until_the_call_returned": round(until_returned, 3)},
        ),
        Measurement(group, "embedded by the stand-in", "chunks/s", [scene.rows / (filled - start)]),
        Measurement(
            group, "contents embedded twice, after a kill", "contents", [float(_twice(db, new))], target=TWICE,
            details={"killed_at": killed_at},
        ),
    ]  # fmt: skip
    if peak:
        measurements.append(Measurement(group, "poller's peak memory", "MiB", [peak / 1024], target=POLLER_MIB))
    late = [s for s in samples if s["embedded"] > scene.rows / 5 and s["poller"] is not None]
    # Without several numbers of chunks there is no slope.
    is_line = len({s["embedded"] for s in late}) > 2
    grown = slope([s["embedded"] / 100_000 for s in late], [s["poller"] for s in late]) if is_line else None
    if grown is not None:
        name = "poller's memory growth, per 100,000 chunks embedded"
        # A small run ends before the poller's buffers have grown.
        target = GROWTH_MIB if scene.rows >= ROWS else None
        measurements.append(Measurement(group, name, "MiB", [grown], target=target))
    return measurements, samples, workers


def _wait_for_poller(db: sa.Engine, poller: Child) -> None:
    """Until it asks the database, which a poller that runs has done long ago."""
    query = """
        SELECT EXISTS (
            SELECT FROM pg_stat_activity
            WHERE datname = current_database() AND application_name = 'chunkmill-poller')
    """
    while True:
        poller.require_alive()
        with db.begin() as conn:
            if conn.execute(sa.text(query)).scalar_one():
                return
        time.sleep(LOOK_S)


def _begin(client: Client) -> Reembedding:
    """To the same model with long texts split, which is another space. A ramp that stays lets nobody but us flip."""
    model = client._settings.embedding_model
    return client.reembed(COLLECTION, to=model, on_long="split", gates=GATES, ramp=(50,), step_hours=0)


def _require_open(seen: Reembedding) -> None:
    if not seen.is_open or seen.problem:
        raise RuntimeError(f"the re-embedding is {seen.state} and says: {seen.problem}")


def _to_space(conn: sa.Connection, reembedding_id: int) -> int:
    query = "SELECT to_space_id FROM reembeddings WHERE id = :id"
    return int(conn.execute(sa.text(query), {"id": reembedding_id}).scalar_one())


def _has_chunk_batch(db: sa.Engine, space_id: int) -> bool:
    """Whether there is one of the steady chunks that a worker may take."""
    query = """
        SELECT EXISTS (
            SELECT
            FROM chunk_batches b
            JOIN reembeddings e ON e.job_id = b.job_id
            WHERE b.space_id = :space AND b.state = :available AND b.not_before <= now())
    """
    with db.begin() as conn:
        parameters = {"space": space_id, "available": ChunkBatchState.AVAILABLE}
        return bool(conn.execute(sa.text(query), parameters).scalar_one())


def _embedded(db: sa.Engine, new: registry.VectorTable) -> int:
    query = "SELECT coalesce(sum(n_embedded), 0) FROM chunk_batches WHERE space_id = :space"
    with db.begin() as conn:
        return int(conn.execute(sa.text(query), {"space": new.id}).scalar_one())


def _twice(db: sa.Engine, new: registry.VectorTable) -> int:
    """How many contents were begun once more than they have vectors. Nobody has enqueued or deleted anything so far."""
    query = f"""
        SELECT (SELECT coalesce(sum(n), 0) FROM bench_computed WHERE space_id = :space)
             - (SELECT count(*) FROM {new.table_name})
    """
    with db.begin() as conn:
        return int(conn.execute(sa.text(query), {"space": new.id}).scalar_one())


def _expect_the_same_chunks(db: sa.Engine, scene: Scene) -> None:
    """No chunk that nobody touched is missing in the space in which the collection is."""
    with db.begin() as conn:
        active = registry.VectorTable(collections.find(conn, COLLECTION).space_id)
        query = f"""
            SELECT count(*)
            FROM chunks c
            JOIN {active.table_name} v ON v.content_hash = c.content_hash
            WHERE c.collection_id = :collection AND c.chunk_id LIKE 'steady-%'
        """
        n = conn.execute(sa.text(query), {"collection": scene.collection_id}).scalar_one()
    if n != scene.rows:
        raise RuntimeError(f"{scene.rows - n:,} of {scene.rows:,} chunks are missing in space {active.id}")


@dataclass(slots=True)
class Turn:
    """A flip or a rollback. Times are those of ``time.monotonic``, which all processes of a machine share."""

    what: str
    began: float
    ended: float
    asked: list[float]
    """When the lock that keeps writers out was asked for, in each try, when it came, and when it was let go."""
    locked: list[float]
    let_go: list[float]

    def held(self) -> float:
        """The longest time in seconds for which others were kept out."""
        return max(b - a for a, b in zip(self.locked, self.let_go, strict=True))

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "seconds": round(self.ended - self.began, 3),
            "tries": [
                {"waited_ms": round(1e3 * (b - a), 2), "held_ms": round(1e3 * (c - b), 2)}
                for a, b, c in zip(self.asked, self.locked, self.let_go, strict=True)
            ],
        }


class Clock:
    """Notes when the connections of a pool wait for locks, and when they let the lock of a flip go."""

    def __init__(self, db: sa.Engine, note: Callable[[str, float, float], None] | None = None) -> None:
        self._note = note
        self.asked: list[float] = []
        self.locked: list[float] = []
        self.let_go: list[float] = []
        sa.event.listen(db, "before_cursor_execute", self._before)
        sa.event.listen(db, "after_cursor_execute", self._after)
        # The pool's own events come before the statement is sent, and others wait until it is done.
        dialect: Any = db.dialect
        dialect.do_commit = self._ending(dialect.do_commit)
        dialect.do_rollback = self._ending(dialect.do_rollback)

    def clear(self) -> None:
        """Forget what was noted."""
        self.asked, self.locked, self.let_go = [], [], []

    def _before(
        self, _conn: object, _cursor: object, _statement: str, _parameters: object, context: Any, *_: object
    ) -> None:
        context.began_at = time.monotonic()

    def _after(
        self, _conn: object, _cursor: object, statement: str, _parameters: object, context: Any, *_: object
    ) -> None:
        if not any(word in statement for word in LOCKS):
            return
        now = time.monotonic()
        if self._note is not None:
            self._note("lock", context.began_at, now)
        elif "pg_advisory_xact_lock(" in statement:
            self.asked.append(context.began_at)
            self.locked.append(now)

    def _ending(self, end: Callable[[object], None]) -> Callable[[object], None]:
        def timed(connection: object) -> None:
            end(connection)
            if len(self.let_go) < len(self.locked):
                self.let_go.append(time.monotonic())

        return timed


def _go_and_come_back(client: Client, clock: Clock, cycles: int, alive: Sequence[Child], say: Say) -> list[Turn]:
    """Flip and roll back, and begin again. The first migration ramps already."""
    turns = []
    for cycle in range(cycles):
        if cycle:
            _begin(client)
        while (seen := client.reembedding(COLLECTION)).state is not ReembeddingState.RAMPING:
            _require_open(seen)
            for child in alive:
                child.require_alive()
            say(f"cycle {cycle + 1} of {cycles}: {seen.state}")
            time.sleep(0.5)
        for what, act in (("flip", client.flip), ("rollback", client.rollback)):
            say(f"cycle {cycle + 1} of {cycles}: {what}")
            # Those who write meet the collection in both states, and the poller looks at what is to be proved.
            time.sleep(PAUSE_S)
            while not _is_looked_at(client._db):
                for child in alive:
                    child.require_alive()
                time.sleep(0.1)
            clock.clear()
            began = time.monotonic()
            act(seen.id, timeout=600.0)
            turns.append(Turn(what, began, time.monotonic(), clock.asked, clock.locked, clock.let_go))
            say(f"cycle {cycle + 1} of {cycles}: {turns[-1].as_json()}")
    return turns


def _is_looked_at(db: sa.Engine) -> bool:
    """Whether a poller has looked at what the next flip or rollback has to prove."""
    query = """
        SELECT EXISTS (
            SELECT FROM reembedding_looks l
            JOIN reembeddings e ON e.id = l.reembedding_id
            JOIN collections k ON k.id = e.collection_id AND k.space_id = l.space_id
            WHERE k.name = :name AND e.finished_at IS NULL)
    """
    with db.begin() as conn:
        return bool(conn.execute(sa.text(query), {"name": COLLECTION}).scalar_one())


def _turns(rows: int, turns: Sequence[Turn]) -> list[Measurement]:
    group = f"flips of {rows:,} chunks, while others write and search"
    made = []
    for what in ("flip", "rollback"):
        chosen = [turn for turn in turns if turn.what == what]
        seconds = [turn.ended - turn.began for turn in chosen]
        held = [1e3 * turn.held() for turn in chosen]
        tries = [len(turn.asked) for turn in chosen]
        target = BACK if what == "rollback" else None
        made += [
            Measurement(
                group, f"{what}, the whole call, at most", "s", [max(seconds)], target=target,
                details={"seconds": seconds, "tries": tries},
            ),
            Measurement(
                group, f"{what}, the lock is held, at most", "ms", [max(held)], target=LOCKED, details={"held_ms": held}
            ),
        ]  # fmt: skip
    return made


def _waits(rows: int, turns: Sequence[Turn], noted: Sequence[tuple[str, Note]]) -> list[Measurement]:
    """The longest waits of everybody else."""
    group = f"others, while {rows:,} chunks are flipped"
    tries = [one for turn in turns for one in zip(turn.asked, turn.locked, turn.let_go, strict=True)]
    made = []
    for role, words in (
        ("enqueue", "a window of an enqueue waits for a flip, at most"),
        ("delete", "a deletion waits for a flip, at most"),
        ("work", "a worker's write waits for a flip, at most"),
    ):
        locks = [note for of, note in noted if of == role and note.what == "lock"]
        # A flip that waits for its lock holds up those who come after it, as one that has it does.
        waits = [max((note.overlap(asked, let_go) for asked, _, let_go in tries), default=0.0) for note in locks]
        alone = [note.seconds for note, waited in zip(locks, waits, strict=True) if not waited]
        details = {"locks": len(locks), "longest_at_other_times_ms": round(1e3 * max(alone, default=0.0), 2)}
        target = LOCKED if role == "enqueue" else None
        made.append(Measurement(group, words, "ms", [1e3 * max(waits, default=0.0)], target=target, details=details))
    searches = [note for of, note in noted if of == "search"]
    # A search waits for no lock of the queue before the flip, so that it can only wait while the flip has it.
    waits = [max((note.overlap(locked, let_go) for _, locked, let_go in tries), default=0.0) for note in searches]
    met = [note.seconds for note, waited in zip(searches, waits, strict=True) if waited]
    alone = [note.seconds for note, waited in zip(searches, waits, strict=True) if not waited]
    details = {
        "searches": len(searches),
        "longest_that_met_a_flip_ms": round(1e3 * max(met, default=0.0), 2),
        "longest_at_other_times_ms": round(1e3 * max(alone, default=0.0), 2),
        "median_at_other_times_ms": round(1e3 * float(np.median(alone or [0.0])), 2),
    }
    words = "a search can have waited for a flip, at most"
    made.append(Measurement(group, words, "ms", [1e3 * max(waits, default=0.0)], target=LOCKED, details=details))
    return made


@dataclass(frozen=True, slots=True)
class Note:
    """Something that somebody did, and from when to when, by ``time.monotonic``."""

    what: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def overlap(self, began: float, ended: float) -> float:
        """How many seconds of it were between these times."""
        return max(0.0, min(self.ended, ended) - max(self.began, began))


@dataclass(frozen=True, slots=True)
class Role:
    """A process that works on the collection, and the file of its notes."""

    role: str
    child: Child
    file: Path

    def notes(self) -> Iterator[Note]:
        """What it noted. A process that was killed may have left half a line."""
        for line in self.file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield Note(*json.loads(line))


@contextlib.contextmanager
def _role(servers: Servers, role: str, number: int, env: Mapping[str, str]) -> Iterator[Role]:
    name = f"{role}-{number}"
    file = servers.folder / f"{name}.jsonl"
    file.touch()
    command = module_command("chunkmill_workers.benchmarks.reembed", role, str(number), str(file))
    with process(servers, name, command, env) as child:
        yield Role(role, child, file)


def _wait_for(crowd: Sequence[Role]) -> None:
    """Until each of them has done something."""
    for one in crowd:
        while next(one.notes(), None) is None:
            one.child.require_alive()
            time.sleep(LOOK_S)


def _enqueue(client: Client, rng: random.Random) -> None:
    """Add and replace chunks. Most texts are known, so that there are many windows and the worker keeps up."""
    texts = [steady_text(rng.randrange(TEXTS)) for _ in range(rng.randint(1, 200))]
    if rng.random() < FRESH:
        texts.append(f"a new text {rng.random()}")
    client.enqueue([(f"c{rng.randrange(IDS)}", text) for text in texts], collection=COLLECTION)
    time.sleep(0.2 * rng.random())


def _delete(client: Client, rng: random.Random) -> None:
    client.delete(COLLECTION, [f"c{rng.randrange(IDS)}" for _ in range(rng.randint(1, 100))])
    time.sleep(0.4 * rng.random())


def _search(client: Client, rng: random.Random, queries: NDArray[np.float32], note: Callable[..., None]) -> None:
    """Ask with a filter that leaves one of 2,000 chunks, which is quick in a collection of any size."""
    query = queries[rng.randrange(len(queries))]
    began = time.monotonic()
    client.search(query, collection=COLLECTION, k=10, metadata={"part": rng.randrange(2_000)})
    note("search", began, time.monotonic())
    time.sleep(0.02 * rng.random())


_NOTE = """
    INSERT INTO bench_computed (space_id, n)
    SELECT b.space_id, count(*)
    FROM chunk_batches b
    CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
    WHERE b.id = :id AND NOT EXISTS (SELECT FROM {vectors} v WHERE v.content_hash = h.content_hash)
    GROUP BY b.space_id
"""
_EMBED = """
    INSERT INTO {vectors} (content_hash, embedding, n_tokens, truncated)
    SELECT h.content_hash, s.embedding, 8, false
    FROM chunk_batches b
    CROSS JOIN unnest(b.content_hashes) AS h(content_hash)
    JOIN contents c ON c.content_hash = h.content_hash
    JOIN bench_bases s ON s.n = (256 * get_byte(h.content_hash, 0) + get_byte(h.content_hash, 1))
        % CAST(:bases AS integer)
    WHERE b.id = :id
    ORDER BY h.content_hash
    ON CONFLICT DO NOTHING
"""


def _embed_some(db: sa.Engine, owner: str) -> bool:
    """Embed a ChunkBatch that is due, in the place of a worker. False if there is none."""
    due = """
        SELECT id FROM chunk_batches
        WHERE state = :available AND not_before <= now()
        ORDER BY priority, id
        LIMIT 4
    """
    with db.begin() as conn:
        ids = conn.execute(sa.text(due), {"available": ChunkBatchState.AVAILABLE}).scalars().all()
        lease = None
        for number in ids:
            lease = lease or chunk_batches.claim_if_due(conn, number, owner=owner, lease_seconds=LEASE_S)
    if lease is None:
        return False
    space = registry.VectorTable(lease.space_id)
    parameters = {"id": lease.chunk_batch_id, "bases": BASES}
    with db.begin() as conn:
        relax_durability(conn)
        conn.execute(sa.text(_NOTE.format(vectors=space.table_name)), parameters)
    with db.begin() as conn:
        relax_durability(conn)
        keep_deletions_out(conn)
        written = conn.execute(sa.text(_EMBED.format(vectors=space.table_name)), parameters).rowcount
        if not chunk_batches.complete_if_held(conn, lease, n_embedded=written, n_truncated=0):
            conn.rollback()
            return True
    with db.begin() as conn:
        finish_if_done(conn, lease.job_id, registry.VectorTable(jobs.space_id(conn, lease.job_id)), wait=False)
    return True


def _work(db: sa.Engine, owner: str) -> None:
    """The stand-in for a worker. Two texts whose hashes have the same first bytes have the same vector."""
    if not _embed_some(db, owner):
        time.sleep(0.02)


def _main(role: str, number: int, file: str) -> None:
    """Do the same again and again until SIGTERM, and note how long it took. It is the main function of a process."""
    signal.signal(signal.SIGTERM, _leave)
    settings = Settings.from_env()
    rng = random.Random(f"{role} {number}")
    db = create_db(settings.require_database_url(), role="worker" if role == "work" else "client")
    vectors = bases(resolve_spec(settings.embedding_model).dimensions)
    with (
        Path(file).open("a", buffering=1, encoding="utf-8") as notes,
        Client(db, Broker.connect(settings), settings) as client,
    ):

        def note(what: str, began: float, ended: float) -> None:
            notes.write(json.dumps([what, began, ended]) + "\n")

        Clock(db, note)
        acts: dict[str, Callable[[], None]] = {
            "enqueue": lambda: _enqueue(client, rng),
            "delete": lambda: _delete(client, rng),
            "search": lambda: _search(client, rng, vectors, note),
            "work": lambda: _work(db, f"stand-in:{os.getpid()}"),
        }
        while True:
            acts[role]()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
