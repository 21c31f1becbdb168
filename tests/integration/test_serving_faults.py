"""What may happen to a serving index from outside: odd vectors, other sessions, lost tables, races, older releases."""

from __future__ import annotations

import logging
import re
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command as alembic
from numpy.typing import NDArray

from chunkmill import Chunk, Client
from chunkmill.broker import Broker
from chunkmill.cli.start.doctor import database_checks
from chunkmill.db.connect import alembic_config, create_db, migrate
from chunkmill.db.locks import DELETE_LOCK
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.serving import BuilderKind, SegmentKind
from chunkmill.domain.spaces import Pooling, SpaceSpec
from chunkmill.embedded import StackStatus
from chunkmill.embedded.postgres import find_programs
from chunkmill.errors import StoreUnavailable
from chunkmill.monitor.servers import read_database
from chunkmill.poller import indexer
from chunkmill.poller.indexer import Indexer
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.store import indexing, segments
from chunkmill.store import search as searching
from chunkmill.store.write import write_vectors
from tests.conftest import admin, url_of
from tests.integration.test_serving_indexes import COLLECTIONS, DIMENSIONS, index, space_of, vector_of, work, write
from tests.integration.test_serving_indexes import tiny as tiny  # the fixture of small segments
from tests.support.installations import in_schema
from tests.support.waiting import Call, until


def begin_with(client: Client, db: sa.Engine, chunks: int, *, are_indexed: bool = True) -> None:
    """Two collections of so many chunks of their own, embedded and indexed."""
    for name in COLLECTIONS:
        client.enqueue([(f"{name}-{i}", f"{name} {i}") for i in range(chunks)], collection=name)
    work(db)
    if are_indexed:
        for name in COLLECTIONS:
            index(client, name)


def give(db: sa.Engine, vectors: Mapping[str, NDArray[np.float32]]) -> None:
    """Give texts these very vectors."""
    with db.begin() as conn:
        space = space_of(db)
        hashes = [content_hash(text) for text in vectors]
        n = len(hashes)
        write_vectors(
            conn, space, space.spec.fingerprint, hashes, np.full(n, 3, np.int32), np.zeros(n, np.bool_),
            np.stack(list(vectors.values())),
        )  # fmt: skip


def id_of(db: sa.Engine, name: str) -> int:
    with db.begin() as conn:
        return collections.find(conn, name).id


def ask(db: sa.Engine, query: str, **parameters: object) -> Sequence[object]:
    with db.begin() as conn:
        return list(conn.execute(sa.text(query), parameters).scalars())


def segment_tables(db: sa.Engine) -> set[str]:
    query = "SELECT relname FROM pg_class WHERE relname ~ '^segment_[0-9]+$' AND relkind = 'r'"
    return {str(name) for name in ask(db, query)}


def in_the_middle(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object], times: int = 1) -> list[int]:
    """Run ``action`` between the filling and the publishing of the next segments. Returns a list of their ids."""
    finish, seen = indexing._finish, list[int]()

    def finished(conn: sa.Connection, new: segments.Segment, **options: object) -> None:
        finish(conn, new, **options)  # type: ignore[arg-type]
        seen.append(new.id)
        if len(seen) <= times:
            action()

    monkeypatch.setattr(indexing, "_finish", finished)
    return seen


# --- What is found ---


def statements_of(
    client: Client, *, exact: bool, metadata: Mapping[str, object] | None = None
) -> list[tuple[str, Mapping[str, object], Mapping[str, str]]]:
    """What a search for three chunks asks Postgres: statement, parameters, and how a graph is read then."""
    asked: list[tuple[str, Mapping[str, object], Mapping[str, str]]] = []

    def note(
        conn: sa.Connection, _cursor: object, statement: str, parameters: Mapping[str, object], *_: object
    ) -> None:
        if "<=>" in statement:
            query = "SELECT name, setting FROM pg_settings WHERE name LIKE 'hnsw.%%' OR name = 'plan_cache_mode'"
            asked.append((statement, parameters, {row.name: row.setting for row in conn.exec_driver_sql(query)}))

    sa.event.listen(client._db, "before_cursor_execute", note)
    client.search(vector_of("docs 1"), collection="docs", k=3, exact=exact, metadata=metadata)
    sa.event.remove(client._db, "before_cursor_execute", note)
    assert asked
    return asked


def test_a_graph_is_read_in_relaxed_order_and_not_for_many_more_candidates_than_hits(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strict order drops what is met out of order. A graph that is asked for many more looks for them long."""
    begin_with(client, db, 60)
    monkeypatch.setattr(searching, "JUDGED", 3 + searching.MORE_CANDIDATES + 2)
    client.search(vector_of("docs 1"), collection="docs", k=3)
    for statement, parameters, settings in statements_of(client, exact=False):
        assert (settings["hnsw.iterative_scan"], settings["plan_cache_mode"]) == ("relaxed_order", "force_custom_plan")
        with db.begin() as conn:
            searching.see_one_moment(conn)
            conn.execute(sa.text("SET LOCAL enable_seqscan = off"))
            (plan,) = conn.exec_driver_sql("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters).scalar_one()
        scans = [node for node in nodes(plan["Plan"]) if str(node.get("Index Name", "")).startswith("ix_segment_")]
        assert [node["Actual Rows"] for node in scans] == [searching.JUDGED + 1]


def test_a_graph_that_needs_more_memory_than_it_may_have_says_so(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(indexing, "GRAPH_NODE_BYTES", 1 << 20)
    begin_with(client, db, 60, are_indexed=False)
    for name, memory_mb in zip(COLLECTIONS, (64, 32), strict=True):
        client._settings = client._settings.model_copy(update={"index_memory_mb": memory_mb})
        index(client, name)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        said = [warning for warning in warnings if "INDEX_MEMORY_MB" in warning]
        assert len(said) == (memory_mb == 32)
    assert "a graph of 60 rows needs about 60 MiB of memory in Postgres, and INDEX_MEMORY_MB is 32" in said[0]


def test_a_graph_is_left_as_soon_as_enough_rows_pass_the_filter(client: Client, db: sa.Engine) -> None:
    """Postgres must see that the number of those that have passed can only grow. All rows pass this one."""
    begin_with(client, db, 200)
    for statement, parameters, _ in statements_of(client, exact=False, metadata={"absent": {"$exists": False}}):
        with db.begin() as conn:
            searching.see_one_moment(conn)
            conn.execute(sa.text("SET LOCAL enable_seqscan = off"))
            (plan,) = conn.exec_driver_sql("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters).scalar_one()
        scans = [node for node in nodes(plan["Plan"]) if str(node.get("Index Name", "")).startswith("ix_segment_")]
        assert [node["Actual Rows"] for node in scans] == [searching.JUDGED + 1]


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A plan's nodes."""
    return [plan, *(inner for outer in plan.get("Plans", ()) for inner in nodes(outer))]


def test_an_exact_search_reads_each_table_once(client: Client, db: sa.Engine) -> None:
    begin_with(client, db, 5)
    ((statement, parameters, _),) = statements_of(client, exact=True)
    with db.begin() as conn:
        plan = "\n".join(conn.exec_driver_sql("EXPLAIN " + statement, parameters).scalars())
    for table in ("vectors_1", "chunks", "contents"):
        assert len(re.findall(rf" on {table} ", plan)) == 1, plan


def test_no_search_reads_an_index_of_the_whole_space(client: Client, db: sa.Engine) -> None:
    """The last release built such an index and an operator may. It knows nothing of collections, and is not exact."""
    begin_with(client, db, 5, are_indexed=False)
    with db.begin() as conn:
        conn.execute(sa.text("CREATE INDEX mine ON vectors_1 USING hnsw (embedding vector_cosine_ops)"))
    asked = statements_of(client, exact=False) + statements_of(client, exact=True)
    with db.begin() as conn:
        for setting in ("enable_sort", "enable_seqscan", "enable_bitmapscan"):
            conn.execute(sa.text(f"SET LOCAL {setting} = off"))
        for statement, parameters, _ in asked:
            plan = "\n".join(conn.exec_driver_sql("EXPLAIN " + statement, parameters).scalars())
            assert "Index Scan using mine" not in plan, plan


def directions(n: int) -> NDArray[np.float32]:
    """``(n, d)`` float32 of length 1: from one direction to another one, in n steps."""
    angles = np.linspace(0, 1.5, n)
    made = np.zeros((n, DIMENSIONS), np.float32)
    made[:, 0], made[:, 1] = np.cos(angles), np.sin(angles)
    return made


@pytest.mark.parametrize("rows", [12, 40], ids=["flat", "graph"])
def test_vectors_that_half_precision_cannot_hold_are_found_through_segments(
    client: Client, db: sa.Engine, rows: int
) -> None:
    """Their numbers are beyond 65,504, or below what half precision can tell from zero."""
    client.enqueue([(f"c{i:02}", f"text {i}") for i in range(rows)], collection="docs")
    lengths = [np.float32((1e6, 1e-9, 1)[i % 3]) for i in range(rows)]
    vectors = [vector * length for vector, length in zip(directions(rows), lengths, strict=True)]
    give(db, {f"text {i}": vector for i, vector in enumerate(vectors)})
    made = client.index("docs")
    assert (made.is_ready, made.rows, made.graph_rows, made.tail) == (True, rows, rows if rows == 40 else 0, 0)
    with db.begin() as conn:
        conn.execute(sa.text("DELETE FROM serving_tail"))
    for i in range(rows):
        hits = client.search(vectors[i], collection="docs", k=1)
        exact = client.search(vectors[i], collection="docs", k=1, exact=True)
        assert [hit.chunk_id for hit in hits] == [hit.chunk_id for hit in exact] == [f"c{i:02}"]
    with db.begin() as conn:
        query = "SELECT count(*) FROM segment_{} WHERE abs(l2_norm(embedding) - 1) > 0.01"
        live = segments.find(conn, collections.find(conn, "docs").id, 1)
        assert live is not None
        assert conn.execute(sa.text(query.format(live.segments[0].id))).scalar_one() == 0


def test_a_graph_that_was_left_early_does_not_hide_what_is_in_it(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tail has enough hits, but those in the graph are nearer, behind many rows that do not pass the filter."""
    for name, value in (
        ("BEAM", 5),
        ("WIDEST_BEAM", 5),
        ("MORE_CANDIDATES", 3),
        ("MAX_SCANNED", 1),
        ("LEAST_SPREAD", 0),
        ("MAX_EXACT", 2),  # the filter leaves more, so the search is not exact because of it
        ("SLACK", 0),  # the graph is read again until enough rows have passed
    ):
        monkeypatch.setattr(searching, name, value)
    steps = directions(60)
    for name in COLLECTIONS:
        chunks = [Chunk(f"c{i:02}", f"{name} {i}", {"lang": "de" if i >= 45 else "fr"}) for i in range(50)]
        client.enqueue(chunks, collection=name)
        give(db, {f"{name} {i}": steps[i] for i in range(50)})
        assert client.index(name).graph_rows == 50
        client.enqueue([Chunk(f"t{i}", f"{name} tail {i}", {"lang": "de"}) for i in range(1)], collection=name)
    client.enqueue([Chunk(f"t{i}", f"tail {i}", {"lang": "de"}) for i in range(4)], collection="docs")
    give(db, {f"tail {i}": steps[55 + i] for i in range(4)})
    hits = client.search(steps[0], collection="docs", k=3, metadata={"lang": "de"})
    assert [hit.chunk_id for hit in hits] == ["c45", "c46", "c47"]


@pytest.mark.parametrize("triggers", ["of an index", "of outdated chunks"])
def test_an_autovacuum_of_the_chunks_ends_for_the_first_index(
    client: Client, db: sa.Engine, stack: StackStatus, triggers: str
) -> None:
    """That of a large table lasts for hours. Postgres ends it for whoever waits longer than deadlock_timeout."""
    client.enqueue([Chunk(f"c{i:04}", f"docs {i}", {"long": "x" * 1_000}) for i in range(2_000)], collection="docs")
    give(db, {f"docs {i}": vector_of(f"docs {i}") for i in range(2_000)})
    slowly = "autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1"
    always = "autovacuum_vacuum_insert_threshold = 0, autovacuum_vacuum_insert_scale_factor = 0"
    works = """
        SELECT count(*)
        FROM pg_stat_progress_vacuum
        WHERE datname = current_database() AND relid = 'chunks'::regclass
    """

    def is_at_work() -> bool:
        with db.begin() as conn:
            return bool(conn.execute(sa.text(works)).scalar_one())

    admin(stack, "ALTER SYSTEM SET autovacuum_naptime = '1s'")
    admin(stack, "SELECT pg_reload_conf()")
    try:
        with db.begin() as conn:
            conn.execute(sa.text(f"ALTER TABLE chunks SET ({slowly}, {always})"))
            conn.execute(sa.text("UPDATE chunks SET metadata = metadata"))
        until(is_at_work)
        if triggers == "of an index":
            assert client.index("docs").is_ready
        else:
            assert client.outdated("docs", serve=True).is_served
    finally:
        admin(stack, "ALTER SYSTEM RESET autovacuum_naptime")
        admin(stack, "SELECT pg_reload_conf()")


@pytest.mark.parametrize("metadata", [None, {"lang": "de"}], ids=["no filter", "a filter"])
def test_deleted_chunks_take_no_places_among_the_candidates(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, Any] | None
) -> None:
    """Their rows are in the graph until a merge, nearer than all others, and the tail alone has enough hits."""
    for name, value in (("LEAST_SPREAD", 0), ("MAX_EXACT", 2)):
        monkeypatch.setattr(searching, name, value)
    steps = directions(80)
    for name in COLLECTIONS:
        client.enqueue([Chunk(f"c{i:02}", f"{name} {i}", {"lang": "de"}) for i in range(50)], collection=name)
        give(db, {f"{name} {i}": steps[i] for i in range(50)})
        assert client.index(name).graph_rows == 50
    client.enqueue([Chunk(f"t{i}", f"tail {i}", {"lang": "de"}) for i in range(20)], collection="docs")
    give(db, {f"tail {i}": steps[55 + i] for i in range(20)})
    client.delete("docs", [f"c{i:02}" for i in range(25)])
    hits = client.search(steps[0], collection="docs", k=3, metadata=metadata, explain=True)
    assert [hit.chunk_id for hit in hits] == ["c25", "c26", "c27"]
    assert hits.explanation is not None
    assert not hits.explanation.is_exact


def test_rows_of_a_graph_that_are_read_at_once_do_not_hide_what_is_behind_them(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of all chunks pass the filter, but none of those near the query, and the tail has enough hits."""
    for name, value in (("LEAST_SPREAD", 0), ("MAX_EXACT", 2)):
        monkeypatch.setattr(searching, name, value)
    steps = directions(330)
    for name in COLLECTIONS:
        chunks = [Chunk(f"c{i:03}", f"{name} {i}", {"lang": "de" if i >= 200 else "fr"}) for i in range(300)]
        client.enqueue(chunks, collection=name)
        give(db, {f"{name} {i}": steps[i] for i in range(300)})
        assert client.index(name).graph_rows == 300
    client.enqueue([Chunk(f"t{i}", f"tail {i}", {"lang": "de"}) for i in range(20)], collection="docs")
    give(db, {f"tail {i}": steps[305 + i] for i in range(20)})
    hits = client.search(steps[0], collection="docs", k=3, metadata={"lang": "de"}, explain=True)
    assert [hit.chunk_id for hit in hits] == ["c200", "c201", "c202"]
    assert hits.explanation is not None
    assert not hits.explanation.is_exact


def test_a_vector_that_came_back_as_another_one_is_the_one_that_a_merge_writes(client: Client, db: sa.Engine) -> None:
    """It was evicted, and a worker of another device made it anew."""
    begin_with(client, db, 40)
    with db.begin() as conn:
        conn.execute(sa.text("DELETE FROM vectors_1 WHERE content_hash = :hash"), {"hash": content_hash("docs 7")})
    give(db, {"docs 7": vector_of("another")})
    client.delete("docs", [f"docs-{i}" for i in range(20, 40)])
    assert client.index("docs").rows == 20
    with db.begin() as conn:
        live = segments.find(conn, collections.find(conn, "docs").id, 1)
        assert live is not None
        wanted = "SELECT l2_normalize(embedding)::halfvec FROM vectors_1 WHERE content_hash = :hash"
        kept = [
            conn.execute(
                sa.text(f"SELECT embedding = ({wanted}) FROM {part.table_name} WHERE content_hash = :hash"),
                {"hash": content_hash("docs 7")},
            ).scalar_one()
            for part in live.segments
        ]
    assert kept == [True]


def enqueue_beside(client: Client, db: sa.Engine, text: str) -> tuple[sa.Connection, sa.Transaction]:
    """``text`` is in docs. Its vector is being written while it is enqueued into others: neither sees the other."""
    client.enqueue([("a", text)], collection="docs")
    conn = db.connect()
    writing = conn.begin()
    write(conn, space_of(db), [text])
    client.enqueue([("b", text)], collection="others")
    return conn, writing


def test_what_a_flush_took_for_useless_is_found_once_its_chunk_batch_is_done(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tail has an old row of the content, which is deleted; the end of the ChunkBatch may not rely on it."""
    begin_with(client, db, 5)
    client.enqueue([("b", "text"), ("c", "more")], collection="others")
    work(db)
    client.delete("others", ["b"])
    conn, writing = enqueue_beside(client, db, "text")

    def finish_the_work() -> None:
        writing.commit()
        conn.close()
        work(db)

    in_the_middle(monkeypatch, finish_the_work)
    assert indexing.flush(db, space_of(db), id_of(db, "others")) is not None
    assert client.search(vector_of("text"), collection="others", k=1)[0].chunk_id == "b"


def test_a_vector_written_beside_an_enqueue_that_is_cancelled_is_found(client: Client, db: sa.Engine) -> None:
    begin_with(client, db, 5)
    conn, writing = enqueue_beside(client, db, "text")
    writing.commit()
    conn.close()
    (job,) = [job for job in client.jobs(10) if job.collection == "others" and job.state == "running"][:1]
    client.cancel(job.id)
    assert client.search(vector_of("text"), collection="others", k=1, exact=True)[0].chunk_id == "b"
    assert client.search(vector_of("text"), collection="others", k=1)[0].chunk_id == "b"


def test_a_chunk_that_is_replaced_and_replaced_back_is_found(client: Client, db: sa.Engine) -> None:
    begin_with(client, db, 5)
    for text in ("other text", "docs 3"):
        client.enqueue([("docs-3", text)], collection="docs")
        work(db)
        client.index("docs")
        assert client.search(vector_of(text), collection="docs", k=1)[0].text == text
    assert "other text" not in {hit.text for hit in client.search(vector_of("other text"), collection="docs", k=5)}


# --- What is left behind ---


def test_a_collection_that_moved_leaves_no_table(
    client: Client, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(client, db, 5)
    before = segment_tables(db)
    client.delete("docs", all_chunks=True)
    Poller(db, client._broker, settings).round()
    client.enqueue([("c", "text")], collection="docs", on_long="split")
    Indexer(db, settings).round()
    monkeypatch.setattr(segments, "GRACE_S", 0)
    Indexer(db, settings).round()
    others = {f"segment_{number}" for number in ask(db, "SELECT id FROM segments")}
    assert segment_tables(db) == others
    assert len(others) == len(before) - 1
    assert ask(db, "SELECT count(*) FROM serving_tail WHERE collection_id = :id", id=id_of(db, "docs")) == [0]


def test_a_segment_of_an_index_that_was_forgotten_meanwhile_is_not_published(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(client, db, 5)
    number = id_of(db, "docs")

    def forget() -> None:
        with db.begin() as conn:
            segments.forget(conn, number, 1)

    client.enqueue([(f"new-{i}", f"new {i}") for i in range(3)], collection="docs")
    work(db)
    in_the_middle(monkeypatch, forget)
    indexing.flush(db, space_of(db), number)
    states = "SELECT DISTINCT state FROM segments WHERE collection_id = :id"
    assert ask(db, states, id=number) == ["retired"]
    assert ask(db, states, id=id_of(db, "others")) == ["live"]


def test_segments_whose_tables_are_lost_are_built_anew(client: Client, db: sa.Engine, settings: Settings) -> None:
    """As after a backup that left them out. Until then searches are exact."""
    begin_with(client, db, 5)
    for name in segment_tables(db):
        with db.begin() as conn:
            conn.execute(sa.text(f"DROP TABLE {name}"))
    assert client.search(vector_of("docs 3"), collection="docs", k=1)[0].text == "docs 3"
    client.enqueue([("new", "new text")], collection="docs")
    work(db)
    assert Indexer(db, settings).round() == 2
    for name in COLLECTIONS:
        assert client.index(name).is_ready
        assert client.search(vector_of(f"{name} 3"), collection=name, k=1)[0].text == f"{name} 3"
    assert client.index("docs").rows == 6


def test_an_index_in_another_schema_is_not_this_installations(
    client: Client, db: sa.Engine, settings: Settings
) -> None:
    """One that has not been upgraded yet, in a database with another one that has, further back in the search path."""
    begin_with(client, db, 5)
    url = settings.require_database_url()
    (schema,) = ask(db, "SELECT current_schema()")
    older = in_schema(f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}", "older")
    migrate(older, "0013")
    behind = create_db(older, role="test", pool_size=1)
    with behind.begin() as conn:
        assert conn.execute(sa.text("SELECT to_regclass('serving_indexes') IS NOT NULL")).scalar_one()
        assert not segments.are_kept(conn)
    behind.dispose()


STEPS = {
    "first": ("watch_chunks", "watch_collection", "create_segment", "fill_", "finish_segment", "publish_segment"),
    "flush": ("create_segment", "fill_", "finish_segment", "publish_segment"),
    "merge": ("create_segment", "fill_", "finish_segment", "publish_segment"),
}
QUICK = {("first", "fill_", "after"), ("flush", "finish_segment", "in"), ("merge", "publish_segment", "after")}


@pytest.mark.parametrize(
    ("build", "step", "at"),
    [
        pytest.param(build, step, at, marks=() if (build, step, at) in QUICK else pytest.mark.slow)
        for build, steps in STEPS.items()
        for step in steps
        for at in ("in", "after")
    ],
)
def test_a_builder_that_dies_at_any_step_leaves_nothing_that_the_next_one_does_not_finish(
    client: Client, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, build: str, step: str, at: str
) -> None:
    """The server ends its session, as it does with that of a process that was killed."""
    begin_with(client, db, 20, are_indexed=False)
    if build == "merge":
        monkeypatch.setattr("chunkmill.domain.serving.GRAPH_ROWS", 1000)
    if build != "first":
        for name in COLLECTIONS:
            index(client, name)
        monkeypatch.setattr("chunkmill.domain.serving.GRAPH_ROWS", 10)
    client.enqueue([(f"new {i}", f"new {i}") for i in range(5)], collection="docs")
    work(db)
    if build == "merge":
        assert indexing.flush(db, space_of(db), id_of(db, "docs")) is not None
    victim = create_db(settings.require_database_url(), role="builder", pool_size=1)

    def die(conn: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
        if step in statement:
            with db.begin() as other:
                pid = conn.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
                other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    sa.event.listen(victim, f"{'before' if at == 'in' else 'after'}_cursor_execute", die)
    with pytest.raises(sa.exc.DBAPIError):
        if build == "merge":
            indexing.merge(victim, space_of(db), id_of(db, "docs"), memory_mb=64)
        else:
            indexing.flush(victim, space_of(db), id_of(db, "docs"))
    victim.dispose()
    texts = [f"docs {i}" for i in range(20)] + [f"new {i}" for i in range(5)]
    for text in texts[::6]:
        assert client.search(vector_of(text), collection="docs", k=1)[0].text == text
    monkeypatch.setattr(segments, "GRACE_S", 0)
    made = client.index("docs")
    assert (made.is_ready, made.rows, made.tail) == (True, 25, 0)
    for text in texts:
        assert client.search(vector_of(text), collection="docs", k=1)[0].text == text
    client.index("docs")
    kept = ask(db, "SELECT 'segment_' || id FROM segments")
    assert segment_tables(db) == set(kept)
    assert set(ask(db, "SELECT state FROM segments WHERE collection_id = :id", id=id_of(db, "docs"))) == {"live"}


# --- Who waits for whom ---


def test_nobody_waits_while_an_index_begins_behind_a_long_transaction(client: Client, db: sa.Engine) -> None:
    begin_with(client, db, 5, are_indexed=False)
    index(client, "docs")
    with db.connect() as writer, writer.begin():
        writer.execute(sa.text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": DELETE_LOCK})
        beginning = Call(lambda: index(client, "others"))
        until(lambda: ask(db, "SELECT count(*) FROM serving_indexes") == [2])
        for _ in range(20):
            with db.begin() as other:
                free = "SELECT pg_try_advisory_xact_lock_shared(:key)"
                assert other.execute(sa.text(free), {"key": DELETE_LOCK}).scalar_one()
                other.execute(sa.text("SELECT FROM spaces FOR KEY SHARE NOWAIT"))
        client.enqueue([("new", "new text")], collection="others")
        assert beginning.is_alive()
    beginning.result()
    assert client.search(vector_of("others 1"), collection="others", k=1)[0].text == "others 1"


def test_an_index_that_cannot_begin_is_said(client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "BEGIN_PATIENCE_S", 0)
    monkeypatch.setattr(indexing, "BEGIN_TRIES", 2)
    begin_with(client, db, 5, are_indexed=False)
    with db.connect() as writer, writer.begin():
        writer.execute(sa.text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": DELETE_LOCK})
        with pytest.raises(StoreUnavailable, match=r"could not begin.*pg_stat_activity"):
            client.index("docs")
    assert client.index("docs").is_ready


def test_a_backup_that_reads_an_old_segment_keeps_no_builder_waiting(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(client, db, 40)
    monkeypatch.setattr(segments, "GRACE_S", 0)
    retired = ask(db, "SELECT id FROM segments WHERE state = 'retired' AND collection_id = :id", id=id_of(db, "docs"))
    with db.connect() as backup, backup.begin():
        backup.execute(sa.text(f"LOCK TABLE segment_{retired[0]} IN ACCESS SHARE MODE"))
        for name in COLLECTIONS:
            assert indexing.flush(db, space_of(db), id_of(db, name)) is None
        assert f"segment_{retired[0]}" in segment_tables(db)
    indexing.flush(db, space_of(db), id_of(db, "docs"))
    assert f"segment_{retired[0]}" not in segment_tables(db)


def test_a_build_that_fails_is_not_tried_again_at_once(
    client: Client, db: sa.Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have filled the disk or the memory, which others need too."""
    begin_with(client, db, 5, are_indexed=False)
    broken, tried, flush = id_of(db, "docs"), list[int](), indexing.flush

    def flush_or_fail(db: sa.Engine, space: registry.Space, collection_id: int) -> object:
        tried.append(collection_id)
        if collection_id == broken and tried.count(broken) < 3:
            raise MemoryError
        return flush(db, space, collection_id)

    monkeypatch.setattr(indexing, "flush", flush_or_fail)
    builder = Indexer(db, settings)
    assert builder.round() == 1
    client.enqueue([(f"more {i}", f"more of others {i}") for i in range(5)], collection="others")
    work(db)
    assert builder.round() == 1
    assert tried.count(broken) == 1
    assert tried.count(id_of(db, "others")) == 2
    now = indexer.time.monotonic
    monkeypatch.setattr(indexer.time, "monotonic", lambda: now() + indexer.LONGEST_PAUSE_S)
    builder.round()
    assert tried.count(broken) == 2


def test_who_asks_for_an_index_does_not_wait_for_those_who_go_on_writing(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(client, db, 5, are_indexed=False)
    numbers = iter(range(10**6))

    def write_more() -> None:
        part = next(numbers)
        assert part < 20, "it goes on for ever"
        client.enqueue([(f"new {part} {i}", f"new {part} {i}") for i in range(3)], collection="docs")
        work(db)

    in_the_middle(monkeypatch, write_more, times=10**6)
    assert client.index("docs").is_ready


def test_two_who_ask_for_an_index_at_once_build_it_once(client: Client, db: sa.Engine) -> None:
    begin_with(client, db, 40, are_indexed=False)
    gate = threading.Barrier(2)

    def call() -> object:
        gate.wait()
        return client.index("docs")

    calls = [Call(call) for _ in range(2)]
    assert {made.result().graph_rows for made in calls} == {40}
    assert ask(db, "SELECT count(*) FROM segments WHERE state <> 'retired'") == [1]


def test_a_build_takes_the_memory_of_the_setting_and_the_time_that_it_needs(client: Client, db: sa.Engine) -> None:
    """Whatever the server's own settings are, which come back with the end of the transaction."""
    begin_with(client, db, 40, are_indexed=False)
    client._settings = client._settings.model_copy(update={"index_memory_mb": 77})
    seen = dict[str, set[tuple[str, str]]]()

    def look(conn: sa.Connection, *_: object) -> tuple[str, str]:
        query = "SELECT current_setting('maintenance_work_mem'), current_setting('statement_timeout')"
        return tuple(conn.exec_driver_sql(query).one())  # type: ignore[return-value]

    def note(conn: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
        for name in ("fill_", "finish_segment", "publish_segment", "stale_segments"):
            if f"{name}" in statement:
                seen.setdefault(name, set()).add(look(conn))

    with db.begin() as conn:
        conn.execute(sa.text("ALTER ROLE CURRENT_USER SET statement_timeout = '5min'"))
    client._db.dispose()
    try:
        sa.event.listen(client._db, "before_cursor_execute", note)
        assert client.index("docs").graph_rows == 40
        with client._db.begin() as conn:
            assert "77MB" not in look(conn)
            assert look(conn)[1] == "5min"
    finally:
        with db.begin() as conn:
            conn.execute(sa.text("ALTER ROLE CURRENT_USER RESET statement_timeout"))
    assert {timeout for every in seen.values() for _, timeout in every} == {"0"}
    assert len(seen) == 4
    assert "77MB" in {memory for memory, _ in seen["finish_segment"]}


def test_a_graph_is_built_by_one_process_where_several_have_no_shared_memory(
    client: Client, db: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """In a container, /dev/shm has 64 MB by default, and pgvector's parallel build puts all its memory there."""
    begin_with(client, db, 40, are_indexed=False)
    refuse = """
        ALTER FUNCTION finish_segment(bigint) RENAME TO really_finish_segment;
        CREATE FUNCTION finish_segment(segment bigint) RETURNS void LANGUAGE plpgsql AS $$
        BEGIN
            IF current_setting('max_parallel_maintenance_workers') <> '0' THEN
                RAISE EXCEPTION 'could not resize shared memory segment "/PostgreSQL.1": No space left on device'
                USING ERRCODE = 'disk_full';
            END IF;
            PERFORM really_finish_segment(segment);
        END $$
    """
    with db.begin() as conn:
        for statement in refuse.split(";\n        CREATE"):
            conn.execute(sa.text(statement if "ALTER" in statement else f"CREATE{statement}"))
    assert client.index("docs").graph_rows == 40
    assert "--shm-size" in caplog.text


def test_chunks_are_taken_by_a_collection_whose_old_space_is_gone(
    client: Client, db: sa.Engine, settings: Settings
) -> None:
    """Its old index is forgotten by the poller, which may be later."""
    begin_with(client, db, 5)
    client.delete("docs", all_chunks=True)
    Poller(db, client._broker, settings).round()
    client.enqueue([("c", "text")], collection="docs", on_long="split")
    with db.begin() as conn:
        conn.execute(sa.text("DROP TABLE vectors_1 CASCADE"))
    client.enqueue([("d", "more text")], collection="docs", on_long="split")
    assert ask(db, "SELECT chunk_id FROM chunks WHERE collection_id = :id ORDER BY 1", id=id_of(db, "docs")) == [
        "c", "d",
    ]  # fmt: skip


# --- Dimensions ---


@pytest.mark.parametrize(
    ("dimensions", "storage", "kind"),
    [(3_000, "vector", SegmentKind.HNSW), (3_000, "halfvec", SegmentKind.HNSW), (4_001, "vector", SegmentKind.BITS),
     (16_000, "vector", SegmentKind.BITS)],
)  # fmt: skip
def test_segments_hold_vectors_of_many_dimensions(
    db: sa.Engine, client: Client, dimensions: int, storage: str, kind: SegmentKind
) -> None:
    spec = SpaceSpec("local", "m", f"sha256:{dimensions}", dimensions, 256, Pooling.MEAN, normalize=True)
    rng = np.random.default_rng(1)
    with db.begin() as conn:
        for name in COLLECTIONS:
            space = registry.register(conn, spec, storage=storage)
            insert = "INSERT INTO collections (name, space_id) VALUES (:name, :space) RETURNING id"
            number = conn.execute(sa.text(insert), {"name": name, "space": space.id}).scalar_one()
            add_job = """
                INSERT INTO jobs (collection_id, space_id, state, route, priority, on_long)
                VALUES (:id, :space, 'completed', 'local', 5, 'truncate')
                RETURNING id
            """
            job = conn.execute(sa.text(add_job), {"id": number, "space": space.id}).scalar_one()
            texts = [f"{name} {i}" for i in range(35)]
            add_texts = """
                INSERT INTO contents (content_hash, text)
                SELECT * FROM unnest(CAST(:hashes AS bytea[]), CAST(:texts AS text[]))
            """
            add_chunks = """
                INSERT INTO chunks (collection_id, chunk_id, content_hash, metadata, job_id)
                SELECT :id, t, h, '{}', :job FROM unnest(CAST(:hashes AS bytea[]), CAST(:texts AS text[])) x (h, t)
            """
            parameters = {"id": number, "job": job, "hashes": [content_hash(text) for text in texts], "texts": texts}
            conn.execute(sa.text(add_texts), parameters)
            conn.execute(sa.text(add_chunks), parameters)
            vectors = rng.standard_normal((35, dimensions)).astype(np.float32)
            write_vectors(
                conn, space, spec.fingerprint, parameters["hashes"], np.full(35, 3, np.int32),
                np.zeros(35, np.bool_), vectors,
            )  # fmt: skip
    number = id_of(db, "docs")
    indexing.build_now(db, space, number, memory_mb=64)
    with db.begin() as conn:
        made = segments.find(conn, number, space.id)
    assert made is not None
    assert (made.is_ready, [part.kind for part in made.segments], made.rows) == (True, [kind], 35)
    read = client.vectors("docs", ["docs 7"])["docs 7"]
    assert client.search(read, collection="docs", k=1)[0].chunk_id == "docs 7"


# --- Other releases ---


def test_the_shared_graph_of_the_last_release_is_dropped_and_an_operators_index_stays(
    client: Client, db: sa.Engine, settings: Settings
) -> None:
    begin_with(client, db, 5, are_indexed=False)
    with db.begin() as conn:
        for name, operators in (("ix_vectors_1_hnsw_vector", "cosine"), ('"My index"', "l2")):
            create = f"CREATE INDEX {name} ON vectors_1 USING hnsw (embedding vector_{operators}_ops)"
            conn.execute(sa.text(create))
    (check,) = [one for one in database_checks(read_database(settings)) if one.name == "shared graphs"]
    assert (check.state, "DROP INDEX CONCURRENTLY ix_vectors_1_hnsw_vector;" in check.advice) == ("warn", True)
    assert client.index("docs").is_ready
    names = set(ask(db, "SELECT indexname FROM pg_indexes WHERE tablename = 'vectors_1'"))
    assert "ix_vectors_1_hnsw_vector" not in names
    assert "My index" in names
    assert not [one for one in database_checks(read_database(settings)) if one.name == "shared graphs"]
    assert client.search(vector_of("docs 3"), collection="docs", k=1)[0].text == "docs 3"


def test_a_downgrade_beside_a_builder_leaves_no_segment(client: Client, db: sa.Engine, settings: Settings) -> None:
    begin_with(client, db, 5)
    url = settings.require_database_url()
    with db.connect() as conn:
        with conn.begin():
            segments.create(conn, id_of(db, "docs"), space_of(db), SegmentKind.FLAT, BuilderKind.MERGE)
            going_down = Call(lambda: alembic.downgrade(alembic_config(url), "0013"))
            waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
            until(lambda: ask(db, waiting) == [True])
        going_down.result()
    assert segment_tables(db) == set()
    client.enqueue([("new", "new text")], collection="docs")
    work(db)
    assert client.search(vector_of("new text"), collection="docs", k=1)[0].chunk_id == "new"
    migrate(url)
    for name in COLLECTIONS:
        index(client, name)


def test_a_content_is_noted_once_if_its_worker_saw_its_chunk(client: Client, db: sa.Engine) -> None:
    """The end of the ChunkBatch notes only what is not in the tail."""
    begin_with(client, db, 5)
    client.enqueue([("new", "new text")], collection="docs")
    assert work(db) == 1
    assert ask(db, "SELECT count(*) FROM serving_tail WHERE collection_id = :id", id=id_of(db, "docs")) == [1]


@pytest.mark.parametrize("without_segments", [False, True])
def test_a_backup_with_or_without_segments_is_searched_and_written_to(
    client: Client, db: sa.Engine, settings: Settings, stack: StackStatus, without_segments: bool
) -> None:
    begin_with(client, db, 5)
    client.enqueue([("new", "new text")], collection="docs")
    work(db)
    options = ["--exclude-table=*.segment_*"] if without_segments else []
    source = sa.make_url(settings.require_database_url())
    admin(stack, "DROP DATABASE IF EXISTS restored_one")
    admin(stack, "CREATE DATABASE restored_one")
    restored = url_of(stack, "restored_one")
    programs = find_programs()
    try:
        dump = run([programs / "pg_dump", *options, "--dbname", plain_url(source)])
        run([programs / "psql", "-q", "-v", "ON_ERROR_STOP=1", "--dbname", plain_url(sa.make_url(restored))], dump)
        there = settings.model_copy(update={"database_url": restored})
        behind = create_db(restored, role="client")
        with Client(behind, Broker.connect(settings), there) as other:
            for text in ("docs 3", "new text"):
                assert other.search(vector_of(text), collection="docs", k=1)[0].text == text
            other.enqueue([("later", "later text")], collection="docs")
            work(behind)
            assert other.search(vector_of("later text"), collection="docs", k=1)[0].chunk_id == "later"
            assert Indexer(behind, there).round() == (2 if without_segments else 1)
            for name, text in (("docs", "docs 3"), ("docs", "later text"), ("others", "others 1")):
                assert other.search(vector_of(text), collection=name, k=1)[0].text == text
            assert other.index("docs").rows == 7
    finally:
        admin(stack, "DROP DATABASE restored_one WITH (FORCE)")


def plain_url(url: sa.URL) -> str:
    """The URL as Postgres' own programs take it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def run(command: Sequence[object], given: str | None = None) -> str:
    done = subprocess.run([str(word) for word in command], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
