"""A serving index answers as an exact search does, while it is written to, built, merged, killed and built again."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import Client
from chunkmill.db.connect import create_db
from chunkmill.db.locks import FLUSH_LOCK, MERGE_LOCK
from chunkmill.domain import serving
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.results import SearchHit
from chunkmill.ledger.work import chunk_batches
from chunkmill.poller.indexer import Indexer
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.store import indexing, read, segments
from chunkmill.store import search as searching
from chunkmill.store.write import write_vectors
from tests.support.waiting import Call, until

COLLECTIONS = ("docs", "others")
DIMENSIONS = 384


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collections of a few chunks get segments, segments of 30 rows get a graph, and nothing waits."""
    monkeypatch.setattr(indexing, "MIN_ROWS", 2)
    monkeypatch.setattr(indexing, "STALE_PAUSE_S", 0)
    monkeypatch.setattr(serving, "MIN_ROWS", 2)
    monkeypatch.setattr(serving, "GRAPH_ROWS", 30)
    monkeypatch.setattr(searching, "MAX_EXACT", 0)


def vector_of(text: str) -> NDArray[np.float32]:
    """A vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)


def write(conn: sa.Connection, space: registry.Space, texts: Iterable[str]) -> None:
    """Give texts their vectors, in the place of a worker."""
    texts = list(texts)
    write_vectors(
        conn,
        space,
        space.spec.fingerprint,
        [content_hash(text) for text in texts],
        np.full(len(texts), 3, np.int32),
        np.zeros(len(texts), np.bool_),
        np.stack([vector_of(text) for text in texts]),
    )


def work(db: sa.Engine) -> int:
    """Do all ChunkBatches that are available, as a worker does: read, write, complete. Returns how many."""
    done = 0
    with db.begin() as conn:
        due = (
            conn.execute(sa.text("SELECT id FROM chunk_batches WHERE state = 'available' ORDER BY id")).scalars().all()
        )
    for chunk_batch_id in due:
        with db.begin() as conn:
            lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner="w", lease_seconds=60)
            if lease is None:
                continue
            space = registry.get(conn, lease.space_id)
            todo = read.read_work(conn, space, chunk_batch_id)
        with db.begin() as conn:
            wanted = read.still_wanted(conn, [hash_ for hash_, _ in todo.texts], since=todo.deletions)
            texts = [text for hash_, text in todo.texts if wanted is None or hash_ in wanted]
            if texts:
                write(conn, space, texts)
        with db.begin() as conn:
            assert chunk_batches.complete_if_held(conn, lease, n_embedded=todo.known + len(texts), n_truncated=0)
        done += 1
    return done


def space_of(db: sa.Engine) -> registry.Space:
    with db.begin() as conn:
        return registry.all_spaces(conn)[0]


def search(db: sa.Engine, name: str, text: str, k: int) -> tuple[list[SearchHit], list[SearchHit], set[str]]:
    """The hits through the serving index and exactly, at one moment, and the ids whose own ChunkBatch is not done."""
    with db.begin() as conn:
        conn.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        row = collections.find(conn, name)
        space = registry.get(conn, row.space_id)
        ways = [
            searching.search(conn, space, vector_of(text), collection_id=row.id, k=k, exact=exact)
            for exact in (False, True)
        ]
        query = """
            SELECT c.chunk_id
            FROM jobs j
            JOIN chunk_batches b ON b.job_id = j.id AND b.state IN ('available', 'running')
            JOIN chunks c ON c.collection_id = j.collection_id AND c.content_hash = ANY(b.content_hashes)
            WHERE j.collection_id = :collection
        """
        unfinished = set(conn.execute(sa.text(query), {"collection": row.id}).scalars())
    return ways[0], ways[1], unfinished


def index(client: Client, name: str) -> None:
    assert client.index(name).is_ready


def test_a_new_chunk_is_found_in_the_commit_that_wrote_its_vector(client: Client, db: sa.Engine) -> None:
    for name in COLLECTIONS:
        client.enqueue([(f"{name}-{i}", f"{name} {i}") for i in range(5)], collection=name)
    work(db)
    for name in COLLECTIONS:
        index(client, name)
    client.enqueue([("new", "new text"), ("other", "other text")], collection="docs")
    assert client.search(vector_of("new text"), collection="docs", k=1)[0].chunk_id != "new"
    with db.begin() as conn:
        write(conn, space_of(db), ["new text"])
    assert client.search(vector_of("new text"), collection="docs", k=1)[0].chunk_id == "new"
    assert client.search(vector_of("new text"), collection="others", k=1)[0].chunk_id != "new"


def test_a_text_that_another_collection_has_embedded_is_found_in_the_commit_of_the_enqueue(
    client: Client, db: sa.Engine
) -> None:
    for name in COLLECTIONS:
        client.enqueue([(f"{name}-{i}", f"{name} {i}") for i in range(5)], collection=name)
    work(db)
    index(client, "others")
    index(client, "docs")
    client.enqueue([("copy", "docs 3")], collection="others")
    assert client.search(vector_of("docs 3"), collection="others", k=1)[0].chunk_id == "copy"


def test_a_vector_written_beside_the_enqueue_of_its_text_is_found_once_the_chunk_batch_is_done(
    client: Client, db: sa.Engine
) -> None:
    """Neither transaction sees the other's row. What certainly comes later is the end of the ChunkBatch."""
    for name in COLLECTIONS:
        client.enqueue([(f"{name}-{i}", f"{name} {i}") for i in range(5)], collection=name)
    work(db)
    for name in COLLECTIONS:
        index(client, name)
    client.enqueue([("a", "at the same time")], collection="docs")
    with db.connect() as conn, conn.begin():
        write(conn, space_of(db), ["at the same time"])
        client.enqueue([("b", "at the same time")], collection="others")
    work(db)
    for name, chunk_id in (("docs", "a"), ("others", "b")):
        assert client.search(vector_of("at the same time"), collection=name, k=1)[0].chunk_id == chunk_id


def test_what_is_being_written_while_an_index_begins_is_found(client: Client, db: sa.Engine) -> None:
    """The index of another collection has made the triggers, and this writer came before this index."""
    for name in COLLECTIONS:
        client.enqueue([(f"{name}-{i}", f"{name} {i}") for i in range(5)], collection=name)
    work(db)
    index(client, "docs")
    client.enqueue([("late", "late text")], collection="others")
    with db.connect() as conn, conn.begin():
        read.keep_deletions_out(conn)
        write(conn, space_of(db), ["late text"])
        beginning = Call(lambda: index(client, "others"))
        began = "SELECT count(*) FROM serving_indexes"
        until(lambda: conn.execute(sa.text(began)).scalar_one() == 2 or not beginning.is_alive())
        assert beginning.is_alive()
    beginning.result()
    assert client.search(vector_of("late text"), collection="others", k=1)[0].chunk_id == "late"


def test_a_deleted_or_replaced_chunk_is_never_found(client: Client, db: sa.Engine) -> None:
    for name in COLLECTIONS:
        client.enqueue([(f"c{i}", f"text {i}") for i in range(6)], collection=name)
    work(db)
    for name in COLLECTIONS:
        index(client, name)
    client.delete("docs", ["c1"])
    client.enqueue([("c2", "another text")], collection="docs")
    work(db)
    for text in ("text 1", "text 2"):
        hits = client.search(vector_of(text), collection="docs", k=5)
        assert {hit.text for hit in hits} == {"text 0", "text 3", "text 4", "text 5", "another text"}
        assert client.search(vector_of(text), collection="others", k=1)[0].text == text
    client.enqueue([("c1", "text 1")], collection="docs")
    assert client.search(vector_of("text 1"), collection="docs", k=1)[0].chunk_id == "c1"


def test_small_segments_become_a_graph_and_the_old_ones_are_dropped_when_nobody_reads_them(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in COLLECTIONS:
        for part in range(8):
            client.enqueue([(f"{part}-{i}", f"{name} {part} {i}") for i in range(5)], collection=name)
            work(db)
            client.index(name)
        assert client.index(name).graph_rows >= 30
    assert client.index("docs").rows == 40
    monkeypatch.setattr(segments, "GRACE_S", 0)
    client.index("docs")
    with db.begin() as conn:
        query = """
            SELECT k.name, count(*) FILTER (WHERE s.state = 'retired') > 0 AS has_retired
            FROM segments s
            JOIN collections k ON k.id = s.collection_id
            GROUP BY k.name
        """
        assert {row.name: row.has_retired for row in conn.execute(sa.text(query))} == {"docs": False, "others": True}
        tables = "SELECT count(*) FROM pg_class WHERE relname LIKE 'segment\\_%' AND relkind = 'r'"
        rows = conn.execute(sa.text("SELECT count(*) FROM segments")).scalar_one()
        assert conn.execute(sa.text(tables)).scalar_one() == rows


def test_a_segment_whose_rows_are_largely_deleted_is_written_anew(client: Client, db: sa.Engine) -> None:
    for name in COLLECTIONS:
        client.enqueue([(f"c{i}", f"{name} {i}") for i in range(40)], collection=name)
        work(db)
        assert client.index(name).graph_rows == 40
    client.delete("docs", [f"c{i}" for i in range(20)])
    assert client.index("docs").rows == 20
    assert client.index("others").rows == 40


def test_a_collection_that_moved_to_another_space_leaves_no_index(
    client: Client, db: sa.Engine, settings: Settings
) -> None:
    for name in COLLECTIONS:
        client.enqueue([(f"c{i}", f"{name} {i}") for i in range(5)], collection=name)
        work(db)
        index(client, name)
    client.delete("docs", all_chunks=True)
    Poller(db, client._broker, settings).round()  # it ends the jobs
    client.enqueue([("c", "text")], collection="docs", on_long="split")
    Indexer(db, settings).round()
    with db.begin() as conn:
        space, _ = registry.all_spaces(conn)
        ids = [collections.find(conn, name).id for name in COLLECTIONS]
        assert [segments.find(conn, number, space.id) is None for number in ids] == [True, False]


def test_the_poller_builds_by_itself_what_large_collections_need(
    client: Client, db: sa.Engine, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Its log names the collection as people do."""
    caplog.set_level("INFO", "chunkmill.poller.indexer")
    for name in COLLECTIONS:
        client.enqueue([(f"c{i}", f"{name} {i}") for i in range(5)], collection=name)
    client.enqueue([("c", "alone")], collection="small")
    work(db)
    indexer = Indexer(db, settings)
    assert indexer.round() == 2
    assert {record.message.partition(": segment")[0] for record in caplog.records} == {
        f"collection {name!r}" for name in COLLECTIONS
    }
    client.enqueue([(f"d{i}", f"new {i}") for i in range(5)], collection="docs")
    work(db)
    assert indexer.round() == 1
    with db.begin() as conn:
        (space,) = registry.all_spaces(conn)
        ids = [collections.find(conn, name).id for name in (*COLLECTIONS, "small")]
        described = [segments.describe(conn, number, space.id) for number in ids]
    assert [(one.is_ready, one.rows, one.tail) for one in described] == [(True, 10, 0), (True, 5, 0), (False, 0, 0)]


def test_collections_at_rest_cost_a_poller_nothing(client: Client, db: sa.Engine, settings: Settings) -> None:
    """A round asks as much about eight collections as about two, until one of them has something to build."""
    statements: list[str] = []
    sa.event.listen(db, "before_cursor_execute", lambda *args: statements.append(args[2]))

    def asked() -> int:
        statements.clear()
        assert Indexer(db, settings).round() == 0
        return len(statements)

    def fill(*names: str) -> None:
        for name in names:
            client.enqueue([(f"c{i}", f"{name} {i}") for i in range(5)], collection=name)
        work(db)

    fill(*COLLECTIONS)
    assert Indexer(db, settings).round() == 2
    about_two = asked()
    fill(*(f"more {i}" for i in range(6)))
    assert Indexer(db, settings).round() == 6
    assert asked() == about_two
    client.delete("docs", ["c0", "c1", "c2"])
    fill("others")
    assert Indexer(db, settings).round() == 1  # of docs, most of which is deleted
    client.enqueue([(f"d{i}", f"new {i}") for i in range(5)], collection="others")
    work(db)
    assert Indexer(db, settings).round() == 1


@pytest.mark.parametrize("key", [FLUSH_LOCK, MERGE_LOCK], ids=["flush", "merge"])
def test_who_asks_for_an_index_waits_for_what_another_builds_of_the_same_collection(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch, key: int
) -> None:
    ids = {}
    for name in COLLECTIONS:
        client.enqueue([(f"c{i}", f"{name} {i}") for i in range(5)], collection=name)
        with db.begin() as conn:
            ids[name] = collections.find(conn, name).id
    work(db)
    waits = threading.Event()
    pause = indexing.time.sleep
    monkeypatch.setattr(indexing.time, "sleep", lambda seconds: (waits.set(), pause(seconds)))
    # An index that is built concurrently waits for transactions that began before, and this one is to hold only a lock.
    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as another:
        another.execute(sa.text("SELECT pg_advisory_lock(:key, :id)"), {"key": key, "id": ids["docs"]})
        another.commit()  # CREATE INDEX CONCURRENTLY waits for open transactions
        index(client, "others")
        assert not waits.is_set()
        asked = Call(lambda: client.index("docs"))
        until(waits.is_set)
        assert asked.is_alive()
        another.execute(sa.text("SELECT pg_advisory_unlock_all()"))
    assert asked.result().is_ready


def write_and_delete(client: Client, seed: int, stop: threading.Event) -> None:
    rng = random.Random(seed)
    while not stop.is_set():
        name = rng.choice(COLLECTIONS)
        if rng.random() < 0.3:
            client.delete(name, [f"c{rng.randrange(50)}" for _ in range(3)])
        else:
            client.enqueue(
                {f"c{rng.randrange(50)}": f"text {rng.randrange(70)}" for _ in range(6)}.items(), collection=name
            )


def build_and_die(url: str, settings: Settings, seed: int, stop: threading.Event) -> None:
    """Build what is due. Now and then the builder's connection is cut, wherever the build is."""
    rng = random.Random(seed)
    db = create_db(url, role="builder")
    while not stop.is_set():
        killer = threading.Timer(rng.random() * 0.2, kill, (url,)) if rng.random() < 0.4 else None
        if killer:
            killer.start()
        try:
            Indexer(db, settings).round()
        except sa.exc.DBAPIError:
            db.dispose()
        if killer:
            killer.join()
    db.dispose()


def kill(url: str) -> None:
    db = create_db(url, role="killer", pool_size=1)
    with db.begin() as conn:
        query = """
            SELECT pg_terminate_backend(pid)
            FROM pg_stat_activity
            WHERE application_name = 'chunkmill-builder' AND datname = current_database()
        """
        conn.execute(sa.text(query))
    db.dispose()


def repeat(function: Callable[[], object], stop: threading.Event) -> Callable[[], None]:
    def run() -> None:
        while not stop.is_set():
            function()

    return run


@pytest.mark.parametrize("looks", [150, pytest.param(3_000, marks=pytest.mark.slow)])
def test_each_answer_is_that_of_an_exact_search_at_the_same_moment(
    client: Client, db: sa.Engine, settings: Settings, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two producers that also delete, a worker, and two builders whose connections are cut, beside the searches."""
    monkeypatch.setattr(segments, "GRACE_S", 5)
    for name in COLLECTIONS:
        client.enqueue([(f"c{i}", f"text {i}") for i in range(40)], collection=name)
        work(db)
        index(client, name)
    stop, rng, seen = threading.Event(), random.Random(7), Counter[str]()
    url = db.url.render_as_string(hide_password=False)
    calls = [
        Call(lambda: write_and_delete(client, 1, stop)),
        Call(lambda: write_and_delete(client, 2, stop)),
        Call(repeat(lambda: work(db), stop)),
        Call(lambda: build_and_die(url, settings, 3, stop)),
        Call(lambda: build_and_die(url, settings.model_copy(update={"index_compact": True}), 4, stop)),
    ]
    try:
        for _ in range(looks):
            ids, right, unfinished = search(db, rng.choice(COLLECTIONS), f"text {rng.randrange(70)}", k=5)
            assert len({hit.chunk_id for hit in ids}) == len(ids)
            missing = [hit for hit in right if hit.chunk_id not in unfinished and hit not in ids]
            # What an unfinished ChunkBatch holds may be found or not, and then something else takes its place.
            wrong = [] if any(hit.chunk_id in unfinished for hit in right) else [h for h in ids if h not in right]
            assert (missing, wrong) == ([], []), (ids, right, unfinished)
            seen["looks"] += 1
            seen["hits"] += len(ids)
    finally:
        stop.set()
        for call in calls:
            call.result()
    assert seen["hits"] > seen["looks"]
    until(lambda: work(db) == 0)
    for name in COLLECTIONS:
        client.index(name)
        for i in range(70):
            ids, right, unfinished = search(db, name, f"text {i}", k=5)
            assert (ids, unfinished) == (right, set())
