"""The chunks of a collection: got, listed, counted, deleted and changed, with two collections and two spaces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill import ChunkState, Client
from chunkmill.broker import Broker
from chunkmill.client import chunks as reading
from chunkmill.db.connect import create_db
from chunkmill.db.locks import DELETE_LOCK
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.filters import Filter, parse
from chunkmill.errors import InvalidInput, NotFound, SpaceMismatch
from chunkmill.ledger.jobs import jobs
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.store import chunks as store
from chunkmill.store import indexing, segments
from chunkmill.store.delete import delete_some
from chunkmill.store.write import write_vectors
from tests.integration.hands import Hands
from tests.support.waiting import Call, running, until

DIMENSIONS = 384
NAMES = ("docs", "others")


def vector_of(text: str) -> NDArray[np.float32]:
    """A vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)


def embed(db: sa.Engine, job_id: int, texts: Iterable[str], *, truncated: bool = False) -> None:
    """Write the vectors of texts into the space of a job."""
    texts = list(texts)
    with db.begin() as conn:
        space = registry.get(conn, jobs.space_id(conn, job_id))
        write_vectors(
            conn,
            space,
            space.spec.fingerprint,
            [content_hash(text) for text in texts],
            np.full(len(texts), 3, np.int32),
            np.full(len(texts), truncated, np.bool_),
            np.stack([vector_of(text) for text in texts]),
        )


def fill(client: Client, db: sa.Engine, n: int = 10) -> None:
    """Two collections whose chunks have the same ids, in two spaces, all with a vector."""
    for name, on_long in zip(NAMES, ("truncate", "split"), strict=True):
        chunks = [(f"c{i}", f"{name} text {i}", {"n": i, "half": i % 2, "in": name}) for i in range(n)]
        job = client.enqueue(chunks, collection=name, on_long=on_long)
        embed(db, job.id, [text for _, text, _ in chunks])


@contextmanager
def meanwhile(monkeypatch: pytest.MonkeyPatch, what: str, act: Callable[[], object]) -> Iterator[None]:
    """Call ``act`` once, right before the store's function ``what`` is called for the first time."""
    real, done = getattr(store, what), []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(True)
            act()
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(store, what, call)
        yield
    assert done


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, pages and transactions of a few chunks, so that a small collection has many."""
    monkeypatch.setattr(store, "FIRST_WINDOW", 2)
    monkeypatch.setattr(store, "MAX_WINDOW", 7)
    monkeypatch.setattr(reading, "PAGE", 3)
    monkeypatch.setattr(reading, "DELETE_STEP", 3)
    monkeypatch.setattr(reading, "UPDATE_STEP", 3)


def test_a_chunk_says_whether_it_has_a_vector_and_if_not_why(client: Client, db: sa.Engine, hands: Hands) -> None:
    chunks = [(word, f"{word} text", {"is": word}) for word in ("cut", "dead", "embedded")]
    job = client.enqueue(chunks, collection="docs")
    embed(db, job.id, ["cut text"], truncated=True)
    hands.work(dead={"dead text": "not_finite"})
    other = client.enqueue([("dead", "dead text"), ("cut", "cut text")], collection="others", on_long="split")
    cancelled = client.enqueue([("missing", "missing text")], collection="docs")
    client.cancel(cancelled.id)
    later = client.enqueue([("pending", "pending text")], collection="docs")
    listed = {chunk.id: chunk for chunk in client.chunks("docs")}
    assert {name: (chunk.state.value, chunk.truncated) for name, chunk in listed.items()} == {
        "cut": ("embedded", True),
        "dead": ("dead", None),
        "embedded": ("embedded", False),
        "missing": ("missing", None),
        "pending": ("pending", None),
    }
    assert [chunk.job_id for chunk in listed.values()] == [job.id] * 3 + [cancelled.id, later.id]
    assert {chunk.state for chunk in client.chunks("others")} == {ChunkState.PENDING}
    assert client.cancel(other.id).state == "cancelled"
    assert {chunk.state for chunk in client.chunks("others")} == {ChunkState.MISSING}
    assert client.chunks("docs", filter={"is": "cut"}).__next__().content_hash == content_hash("cut text").hex()


def test_get_gives_what_is_there_in_the_order_of_the_ids(client: Client, db: sa.Engine, small_steps: None) -> None:
    fill(client, db)
    wanted = ["c7", "no such chunk", "c1", "c1", "c3", "c2", "c9", "c0"]
    chunks = client.get("docs", wanted, with_vector=True)
    assert list(chunks) == ["c7", "c1", "c3", "c2", "c9", "c0"]
    for chunk_id, chunk in chunks.items():
        assert (chunk.id, chunk.text) == (chunk_id, f"docs text {chunk_id[1:]}")
        assert chunk.metadata == {"n": int(chunk_id[1:]), "half": int(chunk_id[1:]) % 2, "in": "docs"}
        np.testing.assert_array_equal(chunk.vector, vector_of(chunk.text))
    assert client.get("docs", ["c1"], with_text=False)["c1"].text is None
    assert "docs text" not in repr(chunks)
    assert client.get("docs", []) == {}
    with pytest.raises(InvalidInput, match="ids is a str"):
        client.get("docs", "c1")
    with pytest.raises(NotFound, match="no collection 'none'"):
        client.get("none", ["c1"])


@pytest.mark.parametrize("chosen", [None, {"half": 1}, {"n": {"$gte": 3}}], ids=["all", "half", "from 3"])
def test_a_chunk_that_stays_comes_exactly_once_while_others_come_and_go(
    client: Client, db: sa.Engine, small_steps: None, chosen: dict[str, Any] | None
) -> None:
    ids = [f"c{i}" for i in range(10)] + ["C1", "é", "ë", "zz", "A-1", "a 1", "1", "10", "9", "\u4e2d"]
    for name in NAMES:
        client.enqueue([(c, f"{name} {c}", {"n": i, "half": 1}) for i, c in enumerate(ids)], collection=name)
    with db.begin() as conn:
        in_order = store.sort(conn, ids)
    passing = [c for c in in_order if chosen != {"n": {"$gte": 3}} or ids.index(c) >= 3]
    assert [chunk.id for chunk in client.chunks("docs", filter=chosen)] == passing
    seen = []
    for number, chunk in enumerate(client.chunks("docs", filter=chosen)):
        seen.append(chunk.id)
        client.delete("docs", [f"{c}+" for c in in_order])
        if number < 5:
            client.enqueue([(f"{c}+", "new", {"n": 99, "half": 1}) for c in in_order], collection="docs")
    assert [c for c in seen if not c.endswith("+")] == passing
    assert len(seen) == len(set(seen))


def test_pages_by_cursor_are_the_list(client: Client, db: sa.Engine, small_steps: None) -> None:
    fill(client, db, 20)
    for chosen in (None, {"half": 1}):
        whole = list(client.chunks("docs", filter=chosen))
        pages, after = [], ""
        while page := list(client.chunks("docs", filter=chosen, after=after, limit=4)):
            assert len(page) == 4 or page[-1].id == whole[-1].id
            pages += page
            after = page[-1].id
            client.delete("docs", [page[0].id])
        assert [chunk.id for chunk in pages] == [chunk.id for chunk in whole]
        client.enqueue([(c.id, c.text, c.metadata) for c in whole], collection="docs")
    assert list(client.chunks("docs", limit=0)) == []


def test_a_page_holds_no_more_bytes_than_it_may_but_at_least_one_chunk(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAGE_BYTES", 10_000)
    sizes = [100, 4_000, 5_000, 3_000, 50_000, 100, 9_000]
    client.enqueue([(f"c{i}", "x" * size, {"m": "y" * 500}) for i, size in enumerate(sizes)], collection="docs")
    real, pages = store.read_page, []

    def listens(*args: Any, **kwargs: Any) -> Any:
        page = real(*args, **kwargs)
        pages.append([len(chunk.text or "") for chunk in page])
        return page

    monkeypatch.setattr(store, "read_page", listens)
    assert [len(chunk.text or "") for chunk in client.chunks("docs")] == sizes
    assert pages == [[100, 4_000], [5_000, 3_000], [50_000], [100], [9_000]]


def test_no_transaction_is_open_and_a_lost_connection_is_no_end(
    client: Client, db: sa.Engine, small_steps: None
) -> None:
    fill(client, db)
    sessions = """
        SELECT pg_terminate_backend(pid), state
        FROM pg_stat_activity
        WHERE application_name = 'chunkmill-client' AND datname = current_database()
    """
    seen = []
    for chunk in client.chunks("docs"):
        with db.begin() as conn:
            assert {row.state for row in conn.execute(sa.text(sessions))} <= {"idle"}
        seen.append(chunk.id)
    assert seen == [f"c{i}" for i in range(10)]


@pytest.mark.parametrize("window", [7, 1_000], ids=["several windows", "one window"])
def test_a_collection_that_goes_or_moves_is_no_end(
    client: Client, db: sa.Engine, small_steps: None, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(store, "MAX_WINDOW", window)
    fill(client, db)
    listed, batches = client.chunks("docs"), client.iter_vectors("docs", batch_size=2)
    assert (next(listed).id, next(batches)[0]) == ("c0", ["c0", "c1"])
    client.delete("docs", all_chunks=True)
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET state = 'cancelled'"))
    client.enqueue([("c5", "again", {})], collection="docs", on_long="split")
    for rest in (listed, batches):
        with pytest.raises(SpaceMismatch, match="'docs' was emptied"):
            list(rest)
    others = client.chunks("others")
    next(others)
    with db.begin() as conn:
        conn.execute(sa.text("DELETE FROM chunks WHERE metadata ->> 'in' = 'others'"))
        conn.execute(sa.text("UPDATE jobs SET collection_id = (SELECT id FROM collections WHERE name = 'docs')"))
        conn.execute(sa.text("DELETE FROM collections WHERE name = 'others'"))
    with pytest.raises(NotFound, match="'others' was dropped"):
        list(others)


def test_count_counts_what_passes(client: Client, db: sa.Engine) -> None:
    fill(client, db)
    assert [client.count(name) for name in NAMES] == [10, 10]
    assert client.count("docs", filter={"half": 1}) == 5
    assert client.count("docs", filter={"n": {"$lt": 3}, "in": "docs"}) == 3
    assert client.count("docs", filter={"in": "others"}) == 0
    with pytest.raises(InvalidInput, match="filter"):
        client.count("docs", filter={"n": {"$no": 1}})


def test_an_or_finds_nothing_of_another_collection(client: Client, db: sa.Engine) -> None:
    for name in NAMES:
        job = client.enqueue([(f"{name} {i}", f"{name} text {i}", {"n": i}) for i in range(6)], collection=name)
        embed(db, job.id, [f"{name} text {i}" for i in range(6)])
    either = {"$or": [{"n": 1}, {"n": 2}]}
    hits = client.search(vector_of("others text 1"), collection="docs", metadata=either)
    assert {hit.chunk_id for hit in hits} == {chunk.id for chunk in client.chunks("docs", filter=either)}
    assert {hit.chunk_id for hit in hits} == {"docs 1", "docs 2"}
    assert client.delete("docs", filter=either) == 2
    assert [client.count(name) for name in NAMES] == [4, 6]


@pytest.mark.parametrize("has_index", [False, True], ids=["without index", "with index"])
def test_a_filter_deletes_what_passes_it_and_texts_that_nothing_uses(
    client: Client, db: sa.Engine, small_steps: None, has_index: bool
) -> None:
    fill(client, db)
    job = client.enqueue([("copy", "docs text 1", {"in": "others"})], collection="others", on_long="split")
    embed(db, job.id, ["docs text 1"])
    if has_index:
        indexing.index_metadata(db)
    assert client.delete("docs", filter={"half": 1}) == 5
    assert [chunk.id for chunk in client.chunks("docs")] == ["c0", "c2", "c4", "c6", "c8"]
    assert client.count("others") == 11
    with db.begin() as conn:
        texts = conn.execute(sa.text("SELECT text FROM contents WHERE text LIKE 'docs%' ORDER BY text")).scalars().all()
        assert texts == [f"docs text {i}" for i in (0, 1, 2, 4, 6, 8)]
        counts = "SELECT (SELECT count(*) FROM vectors_1), (SELECT count(*) FROM vectors_2)"
        assert tuple(conn.execute(sa.text(counts)).one()) == (6, 11)
    assert client.delete("docs", filter={"half": 1}) == 0
    assert client.audit("docs").complete


def test_two_who_build_the_index_of_metadata_at_once_do_not_wait_for_each_other(
    client: Client, db: sa.Engine, hands: Hands
) -> None:
    """Each build waits for all transactions that began before it."""
    fill(client, db)
    with db.connect() as writer, writer.begin() as window:
        writer.execute(sa.text("LOCK TABLE chunks IN ROW EXCLUSIVE MODE"))
        writer.execute(sa.text("SELECT pg_current_xact_id()"))
        with running(lambda: indexing.index_metadata(db), lambda: indexing.index_metadata(db)) as builders:
            until(lambda: hands.waiting() >= 1)
            second = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE :query"
            until(lambda: hands.rows(second, query="%pg_try_advisory_lock(%")[0][0] >= 1 or hands.waiting() >= 2)
            window.rollback()
        for builder in builders:
            builder.result()
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('ix_chunks_metadata')"
    assert hands.rows(valid) == [(True,)]


@pytest.mark.parametrize("has_index", [False, True], ids=["without index", "with index"])
def test_a_deletion_by_filter_leaves_what_is_written_meanwhile(
    client: Client, db: sa.Engine, small_steps: None, monkeypatch: pytest.MonkeyPatch, has_index: bool
) -> None:
    fill(client, db)
    if has_index:
        indexing.index_metadata(db)

    def write() -> None:
        client.enqueue(
            [
                ("new", "a new text", {"half": 1, "n": 100}),
                ("zz", "a new text", {"half": 1, "n": 101}),
                ("c3", "another text", {"half": 1, "n": 3}),
            ],
            collection="docs",
        )
        client.update_metadata("docs", {"half": 0}, ids=["c5"])
        client.update_metadata("docs", {"seen": True}, ids=["c7"])

    with meanwhile(monkeypatch, "delete_picked", write):
        assert client.delete("docs", filter={"half": 1}) == 3
    left = {chunk.id: chunk.text for chunk in client.chunks("docs")}
    assert set(left) == {"c0", "c2", "c4", "c6", "c8", "new", "zz", "c3", "c5"}
    assert left["c3"] == "another text"
    assert client.count("others", filter={"half": 1}) == 5


EVERYTHING: list[dict[str, Any]] = [
    {},
    {"$and": [{}]},
    {"$or": [{"half": 1}, {}]},
    {"n": {"$nin": []}},
    {"a": {"b": {"$nin": []}}},
    {"$not": {"n": {"$in": []}}},
    {"$not": {"$not": {}}},
    {"$not": {"$and": [{"half": 1}, {"n": {"$in": []}}]}},
]


@pytest.mark.parametrize("chosen", EVERYTHING, ids=str)
def test_a_filter_that_is_empty_never_means_everything(client: Client, chosen: dict[str, Any]) -> None:
    for name in NAMES:
        client.enqueue([(f"c{i}", f"text {i}", {"half": i % 2}) for i in range(4)], collection=name)
    assert client.count("docs", filter=chosen) == 4
    for call in (client.delete, lambda name, **given: client.update_metadata(name, {"a": 1}, **given)):
        with pytest.raises(InvalidInput, match="every chunk passes this filter"):
            call("docs", filter=chosen)
        for wrong in ({"ids": [], "filter": chosen}, {"all_chunks": True, "filter": {"a": 1}}, {}):
            with pytest.raises(InvalidInput, match="all_chunks=True"):
                call("docs", **wrong)
        assert call("docs", ids=[]) == 0
        assert call("docs", filter={"n": {"$in": []}}) == 0
    assert client.count("docs", filter={"$not": {"a": {"$exists": True}}}) == 4
    assert client.delete("docs", filter={"$and": [{}, {"half": 1}]}) == 2
    assert [client.count(name) for name in NAMES] == [2, 4]


def metadata_of(client: Client, name: str = "docs") -> dict[str, Any]:
    return {chunk.id: chunk.metadata for chunk in client.chunks(name, with_text=False)}


def test_metadata_are_merged_removed_or_replaced_and_nothing_is_embedded_again(
    client: Client, db: sa.Engine, small_steps: None, hands: Hands
) -> None:
    fill(client, db, 6)
    work = hands.ledger()[:3]
    before = metadata_of(client)
    assert client.update_metadata("docs", {"seen": {"by": "ada"}, "n": -1}, filter={"half": 1}) == 3
    assert client.update_metadata("docs", {"a": None}, ids=["c0", "no such chunk"], remove=["in", "not there"]) == 1
    changed = {f"c{i}": {**before[f"c{i}"], "seen": {"by": "ada"}, "n": -1} for i in (1, 3, 5)}
    assert metadata_of(client) == {**before, **changed, "c0": {"n": 0, "half": 0, "a": None}}
    assert client.update_metadata("docs", {"seen": {"on": 1}}, ids=["c1"]) == 1
    assert client.get("docs", ["c1"])["c1"].metadata["seen"] == {"on": 1}
    assert client.update_metadata("docs", {"only": "this"}, replace=True, filter={"n": -1}) == 3
    assert client.update_metadata("docs", {}, replace=True, ids=["c2"]) == 1
    assert client.update_metadata("docs", {"all": True}, all_chunks=True) == 6
    assert metadata_of(client) == {
        "c0": {"n": 0, "half": 0, "a": None, "all": True},
        "c1": {"only": "this", "all": True},
        "c2": {"all": True},
        "c3": {"only": "this", "all": True},
        "c4": {**before["c4"], "all": True},
        "c5": {"only": "this", "all": True},
    }
    assert {chunk["in"] for chunk in metadata_of(client, "others").values()} == {"others"}
    assert hands.ledger()[:3] == work
    assert client.audit("docs").complete
    for wrong in ({}, {"metadata": {}}, {"replace": True}, {"metadata": {"a": 1}, "replace": True, "remove": ["a"]}):
        with pytest.raises(InvalidInput, match="replace=True"):
            client.update_metadata("docs", ids=["c1"], **wrong)


def test_metadata_grow_no_larger_than_an_enqueue_accepts(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_METADATA_BYTES", 1_000)
    monkeypatch.setattr("chunkmill.domain.chosen.MAX_METADATA_BYTES", 1_000)
    client.enqueue([("a", "one", {"x": "y" * 100}), ("b", "two", {"x": "y" * 600})], collection="docs")
    before = metadata_of(client)
    with pytest.raises(InvalidInput, match=r"chunk 'b' would have more than 1,000 bytes"):
        client.update_metadata("docs", {"more": "z" * 500}, all_chunks=True)
    assert metadata_of(client) == before
    with pytest.raises(InvalidInput, match="the limit is 1,000"):
        client.update_metadata("docs", {"more": "z" * 1_000}, all_chunks=True)
    assert client.update_metadata("docs", {"more": "z" * 500}, remove=["x"], all_chunks=True) == 2
    assert metadata_of(client)["b"] == {"more": "z" * 500}


def test_other_metadata_wake_no_tail_and_the_next_filtered_search_sees_them(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "MIN_ROWS", 2)
    monkeypatch.setattr("chunkmill.store.search.MAX_EXACT", 0)
    fill(client, db)
    for name in NAMES:
        assert client.index(name).is_ready

    def tails() -> list[int]:
        with db.begin() as conn:
            rows = [collections.find(conn, name) for name in NAMES]
            return [segments.describe(conn, row.id, row.space_id).tail for row in rows]

    assert tails() == [0, 0]
    assert client.update_metadata("docs", {"topic": "tea"}, ids=["c4", "c6"]) == 2
    assert client.update_metadata("docs", {"half": 2}, filter={"half": 1}) == 5
    query = vector_of("docs text 4")
    assert {hit.chunk_id for hit in client.search(query, collection="docs", metadata={"topic": "tea"})} == {"c4", "c6"}
    assert client.search(query, collection="docs", metadata={"half": 1}) == []
    # The same through an enqueue: only the chunk that has another text goes through the tail.
    changed = [("c1", "docs text 1", {"other": 1}), ("c2", "docs text 3", {"other": 1})]
    client.enqueue(changed, collection="docs")
    assert tails() == [1, 0]
    assert client.search(vector_of("docs text 3"), collection="docs", k=2)[1].chunk_id in ("c2", "c3")


def test_a_change_of_metadata_and_a_deletion_wait_for_each_other(client: Client, db: sa.Engine) -> None:
    """They take rows in different orders, and could deadlock."""
    fill(client, db)
    with db.begin() as deleting:
        row = collections.find(deleting, "docs")
        delete_some(deleting, collection_id=row.id, chunk_ids=["c1"], limit=1)
        change = Call(lambda: client.update_metadata("docs", {"half": 9}, filter={"half": 1}))
        waiting = """
            SELECT l.objid
            FROM pg_stat_activity a
            JOIN pg_locks l USING (pid)
            WHERE a.datname = current_database() AND NOT l.granted
        """
        waits: list[Any] = []
        until(lambda: waits.extend(deleting.execute(sa.text(waiting)).scalars()) or waits or not change.is_alive())
        assert waits == [DELETE_LOCK]
    assert change.result() == 4
    assert client.count("docs", filter={"half": 9}) == 4


@pytest.mark.parametrize("storage", ["vector", "halfvec"])
def test_vectors_come_in_full_batches_as_they_are_stored(
    settings: Settings, db: sa.Engine, small_steps: None, storage: str
) -> None:
    with_storage = settings.model_copy(update={"vector_storage": storage})
    pool = create_db(settings.require_database_url(), role="client")
    with Client(pool, Broker.connect(with_storage), with_storage) as client:
        fill(client, db, 23)
        client.enqueue([("c1x", "it has no vector", {"half": 1})], collection="docs")
        stored = client.vectors("docs")
        for size in (1, 4, 23, 1_000):
            batches = list(client.iter_vectors("docs", batch_size=size))
            assert [len(ids) for ids, _ in batches[:-1]] == [size] * (len(batches) - 1)
            assert [chunk_id for ids, _ in batches for chunk_id in ids] == list(stored)
            for ids, vectors in batches:
                assert (vectors.dtype, vectors.shape) == (np.float32, (len(ids), DIMENSIONS))
                np.testing.assert_array_equal(vectors, [stored[chunk_id] for chunk_id in ids])
        half = [chunk_id for ids, _ in client.iter_vectors("docs", filter={"half": 1}) for chunk_id in ids]
        assert half == [c for c in stored if int(c[1:]) % 2]
        assert list(client.iter_vectors("docs", filter={"half": 7})) == []
        for chunk in client.chunks("docs", with_vector=True):
            if chunk.vector is None:
                assert chunk.id == "c1x"
            else:
                np.testing.assert_array_equal(chunk.vector, stored[chunk.id])
        for wrong in (0, 100_001, 1.5):
            with pytest.raises(InvalidInput, match="batch_size"):
                client.iter_vectors("docs", batch_size=wrong)  # type: ignore[arg-type]


def test_a_filter_that_no_index_serves_ends_no_reading(client: Client, db: sa.Engine) -> None:
    """The look for the few that pass gives up, and the collection is read in windows."""
    fill(client, db)
    indexing.index_metadata(db)

    class Slow(Filter):
        def sql(self, column: str) -> tuple[str, dict[str, object]]:
            return "pg_sleep(3600) IS NOT NULL", {}

    with db.begin() as conn:
        row = collections.find(conn, "docs")
        assert store.pick_if_few(conn, collection=row, chosen=Slow(), after="") is None
        assert conn.execute(sa.text("SELECT 1")).scalar_one() == 1
    with db.begin() as conn:
        picked = store.pick_if_few(conn, collection=row, chosen=parse({"half": 1}), after="c1")
        assert picked is not None
        assert picked.ids == ["c3", "c5", "c7", "c9"]
        missing = replace(row, id=row.id + 1_000)
        with pytest.raises(NotFound, match="was dropped"):
            store.pick_if_few(conn, collection=missing, chosen=parse({"half": 1}), after="")


def test_between_the_steps_of_a_call_about_ids_no_connection_is_held(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an error, whose traceback keeps the call's iterators alive."""
    for name in NAMES:
        client.enqueue([(f"c{i}", f"{name} {i}") for i in range(3)], collection=name)
    held: list[int] = []

    def fails(*_: object, **__: object) -> None:
        held.append(client._db.pool.checkedout())  # type: ignore[attr-defined]
        raise InvalidInput("not now")

    monkeypatch.setattr(client, "_transact", fails)
    monkeypatch.setattr(client, "_pages", fails)
    with pytest.raises(InvalidInput, match="not now") as changing:
        client.update_metadata("docs", {"a": 1}, ids=["c2", "c0"])
    with pytest.raises(InvalidInput, match="not now") as getting:
        client.get("others", ["c2", "c0"])
    assert held == [0, 0]
    assert changing.traceback and getting.traceback
    assert client._db.pool.checkedout() == 0  # type: ignore[attr-defined]
