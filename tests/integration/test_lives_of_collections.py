"""Collections are listed, dropped whole, renamed and given aliases, while others write, and after a kill."""

from __future__ import annotations

import contextlib
import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Client
from chunkmill.cli.__main__ import cli
from chunkmill.db.connect import create_db
from chunkmill.db.locks import DELETE_LOCK
from chunkmill.domain import serving
from chunkmill.domain.states import JobState
from chunkmill.errors import InvalidInput, NotFound, StoreUnavailable
from chunkmill.ledger import dropping, overview
from chunkmill.poller.indexer import Indexer
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import names
from chunkmill.store import indexing, segments
from tests.integration.conftest import count
from tests.integration.hands import Hands
from tests.integration.test_any_argument import KNOWN, METHODS
from tests.support.waiting import running, until


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collections of a few chunks get segments, and a slice of a drop has two chunks."""
    monkeypatch.setattr(indexing, "MIN_ROWS", 2)
    monkeypatch.setattr(serving, "MIN_ROWS", 2)
    monkeypatch.setattr(segments, "GRACE_S", 0)
    monkeypatch.setattr(dropping, "SLICE", 2)


def fill(client: Client, name: str, n: int = 5, **more: object) -> int:
    """Enqueue ``n`` chunks whose texts are of this collection alone, and one that all collections share."""
    chunks = [(f"c{i}", f"{name} {i}") for i in range(n)] + [("same", "a text of all")]
    return client.enqueue(chunks, collection=name, **more).id  # type: ignore[arg-type]


def ids(client: Client, name: str) -> set[str]:
    """The ids of the chunks that searches of a collection find."""
    return {hit.chunk_id for hit in client.search(np.ones(384, np.float32), collection=name, k=100)}


def rows(db: sa.Engine, query: str) -> list[tuple[object, ...]]:
    with db.begin() as conn:
        return [tuple(row) for row in conn.execute(sa.text(query))]


def names_of(client: Client) -> list[str]:
    return [info.name for info in client.collections()]


# What there is


def test_each_number_of_the_list_is_that_of_its_collection(client: Client, hands: Hands) -> None:
    fill(client, "docs")
    fill(client, "others", 2, on_long="split")
    hands.work(dead={"docs 1": "not_finite", "others 0": "not_finite"})
    client.index("docs")
    client.enqueue([("new", "a new text"), ("newer", "a newer text")], collection="docs")
    client.set_alias("live", "docs")
    docs, others = client.collections()
    assert (docs.name, docs.aliases, docs.chunks, docs.embedded, docs.pending, docs.dead, docs.counted) == (
        "docs", ("live",), 8, 5, 2, 1, True,
    )  # fmt: skip
    assert (others.chunks, others.embedded, others.pending, others.dead) == (3, 2, 0, 1)
    assert docs.space == client.audit("docs").space != others.space == client.audit("others").space
    assert (docs.index, others.index) == (client.index("docs"), overview.NO_INDEX)
    assert docs.last_enqueue_at is not None
    assert docs.last_enqueue_at == client.jobs(1)[0].created_at > docs.created_at
    assert docs.view == '"chunkmill_collections"."docs"'


@pytest.mark.parametrize("pages", [2_000, 1, 60], ids=["all", "few", "most"])
def test_a_large_collection_is_estimated_unless_the_caller_wants_it_counted(
    pages: int, client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after a load and right after most was deleted, whatever the statistics of Postgres are from."""
    monkeypatch.setattr(overview, "SAMPLED_PAGES", pages)

    def load(collection: str, n: int) -> None:
        client.enqueue([(f"c{i}", f"{collection} {i}") for i in range(n)], collection=collection)

    def looked() -> dict[str, int]:
        infos = client.collections()
        assert [info.counted for info in infos] == [info.chunks <= 1_000 for info in infos]
        assert pages == 60 or [info.embedded for info in infos] == [0] * len(infos)
        return {info.name: info.chunks for info in infos}

    def is_about(estimated: int, chunks: int) -> bool:
        return estimated == chunks if pages != 60 else chunks / 2 < estimated < 2 * chunks

    with db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(sa.text("ALTER TABLE chunks SET (autovacuum_enabled = off)"))
        load("docs", 4_000)
        load("small", 3)
        seen = looked()
        assert is_about(seen["docs"], 4_000) and seen["small"] == 3
        conn.execute(sa.text("ANALYZE chunks"))
    load("later", 2_500)
    seen = looked()
    assert is_about(seen["docs"], 4_000) and is_about(seen["later"], 2_500)
    client.delete("docs", [f"c{i}" for i in range(1_500, 4_000)])
    seen = looked()
    assert is_about(seen["docs"], 1_500) and is_about(seen["later"], 2_500)
    client.delete("docs", [f"c{i}" for i in range(900, 1_500)])
    assert looked()["docs"] == 900
    exact = {info.name: (info.chunks, info.counted) for info in client.collections(exact=True)}
    assert exact == {"docs": (900, True), "later": (2_500, True), "small": (3, True)}


# Drop


def test_a_drop_takes_all_of_the_collection_and_nothing_of_another(
    client: Client, hands: Hands, db: sa.Engine, settings: Settings
) -> None:
    for name in ("docs", "others"):
        fill(client, name)
    hands.work(dead={"docs 1": "not_finite", "others 1": "not_finite"})
    for name in ("docs", "others"):
        client.index(name)
    before = ids(client, "others")

    dropped = client.drop_collection("docs")

    assert (dropped.name, dropped.chunks, dropped.complete) == ("docs", 6, True)
    assert names_of(client) == ["others"]
    assert ids(client, "others") == before
    audit = client.audit("others")
    assert (audit.chunks, audit.embedded, audit.dead) == (6, 5, 1)
    assert {text for (text,) in rows(db, "SELECT text FROM contents")} == {f"others {i}" for i in range(5)} | {
        "a text of all"
    }
    assert count(db, "vectors_1") == 5
    assert [(entry.collection, entry.chunk_id) for entry in client.dead()] == [("others", "c1")]
    assert rows(db, "SELECT count(*) FROM dead_chunks") == [(1,)]
    assert rows(db, "SELECT DISTINCT k.name FROM segments JOIN collections k ON k.id = collection_id") == [("others",)]
    tables = "SELECT count(*) FROM pg_class WHERE relname ~ '^segment_[0-9]+$' AND relkind = 'r'"
    assert rows(db, tables) == rows(db, "SELECT count(*) FROM segments")
    with pytest.raises(NotFound):
        client.search(np.ones(384, np.float32), collection="docs")
    assert [job.collection for job in client.jobs()] == ["others", "docs (dropped 201)"]
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET finished_at = now() - interval '2 days'"))
    client.prune(1)
    assert rows(db, "SELECT name FROM collections") == [("others",)]


@pytest.mark.parametrize("by", ["client", "poller"])
def test_the_open_jobs_of_a_dropped_collection_are_cancelled_and_its_workers_write_nothing_more(
    client: Client, hands: Hands, db: sa.Engine, settings: Settings, by: str
) -> None:
    job_id, other = fill(client, "docs"), fill(client, "others")
    lease = hands.claim(hands.of_job(job_id)[0])
    if by == "client":
        client.drop_collection("docs")
    else:
        with db.begin() as conn:  # and then the client dies
            names.drop(conn, "docs")
        Poller(db, client._broker, settings).round()
    assert (client.job(job_id).state, client.job(other).state) == (JobState.CANCELLED, JobState.RUNNING)
    with pytest.raises(AssertionError):  # its lease is gone
        hands.complete(lease)
    hands.work()
    assert client.audit("others").complete
    assert rows(db, "SELECT count(*) FROM chunks WHERE collection_id = 201") == [(0,)]
    with pytest.raises(InvalidInput, match="was dropped"):
        client.retry(job_id)


def test_a_name_is_free_at_once_and_what_comes_into_it_meanwhile_is_not_deleted(
    client: Client, hands: Hands, db: sa.Engine, settings: Settings
) -> None:
    """The client dies right after its first commit. A producer and a poller go on."""
    fill(client, "docs", idempotency_key="k")
    hands.work()
    client.index("docs")
    with db.begin() as conn:
        old = names.drop(conn, "docs")
    assert names_of(client) == []
    again = client.enqueue([("c0", "docs 0"), ("new", "a new text")], collection="docs", idempotency_key="k")
    (info,) = client.collections()
    assert (info.chunks, again.new, again.cached) == (2, 2, 1)
    hands.work()
    until(lambda: [Poller(db, client._broker, settings).round(), not left(db)][1])
    Indexer(db, settings).round()
    assert ids(client, "docs") == {"c0", "new"}
    assert client.audit("docs").complete
    assert {text for (text,) in rows(db, "SELECT text FROM contents")} == {"docs 0", "a new text"}
    assert rows(db, f"SELECT count(*) FROM chunks WHERE collection_id = {old.id}") == [(0,)]
    assert client.job(again.id).idempotency_key == "k"


def left(db: sa.Engine) -> list[int]:
    with db.begin() as conn:
        return dropping.left_behind(conn, 10)


@pytest.mark.parametrize("has_more_than_chunks", [True, False])
def test_a_drop_that_is_killed_anywhere_is_finished_by_a_poller(
    client: Client, hands: Hands, db: sa.Engine, settings: Settings, has_more_than_chunks: bool
) -> None:
    """The drop's own connection is cut at each of its statements in turn.

    A key, dead chunks and a serving index each tell a poller of the drop, so that one collection has none of them.
    """
    for kill_at in range(1, 60, 2):
        name = f"docs {kill_at}"
        fill(client, name, idempotency_key=name if has_more_than_chunks else None)
        fill(client, "stays")
        hands.work(dead={f"{name} 1": "not_finite"} if has_more_than_chunks else {})
        if has_more_than_chunks:
            client.index(name)
        doomed = create_db(settings.require_database_url(), role="doomed", pool_size=1)
        statements = 0

        @sa.event.listens_for(doomed, "before_cursor_execute")
        def _cut(conn: sa.Connection, *_: object, at: int = kill_at) -> None:
            nonlocal statements
            statements += 1
            if statements == at:
                rows(db, f"SELECT pg_terminate_backend({conn.connection.driver_connection.info.backend_pid})")  # type: ignore[union-attr]

        finished = False
        with contextlib.suppress(StoreUnavailable):  # before the first commit
            finished = Client(doomed, client._broker, settings).drop_collection(name).complete and statements < kill_at
        doomed.dispose()
        if name in names_of(client):
            assert not finished
            assert client.audit(name).embedded == (5 if has_more_than_chunks else 6)
            client.drop_collection(name)
        until(lambda: [Poller(db, client._broker, settings).round(), not left(db)][1])
        assert rows(db, "SELECT count(*) FROM chunks") == [(6,)]
        assert client.audit("stays").complete
        assert rows(db, "SELECT count(*) FROM dead_chunks") == [(0,)]
        assert rows(db, "SELECT count(*) FROM jobs WHERE idempotency_key IS NOT NULL") == [(0,)]
        assert rows(db, "SELECT count(*) FROM serving_indexes") == [(0,)]
        if finished:
            return
    pytest.fail("the drop never got to its end")


def test_a_producer_that_is_dropped_halfway_stops_and_one_that_comes_then_gets_a_collection_of_its_own(
    client: Client, db: sa.Engine, settings: Settings
) -> None:
    small = settings.model_copy(update={"chunk_batch_size": 1, "enqueue_window": 2})
    dropped, first_window = threading.Event(), threading.Event()

    def stream() -> object:
        for i in range(8):
            if i == 4:
                first_window.set()
                assert dropped.wait(60)
            yield (f"old{i}", f"an old text {i}")

    with (
        Client(db, client._broker, small) as producer,
        running(
            lambda: producer.enqueue(stream(), collection="docs", on_invalid="skip"),  # type: ignore[arg-type]
            release=dropped.set,
        ) as (call,),
    ):
        first_window.wait(60)
        client.drop_collection("docs")
        new = client.enqueue([("new", "a new text")], collection="docs")
        dropped.set()
        old = call.result()
    assert (old.state, client.job(new.id).state) == (JobState.CANCELLED, JobState.RUNNING)
    assert rows(db, "SELECT chunk_id, collection_id FROM chunks") == [("new", 202)]
    assert not left(db)


def test_a_window_that_is_being_written_does_not_hold_up_the_drop_and_is_deleted_after_it(
    client: Client, db: sa.Engine
) -> None:
    fill(client, "docs")
    with db.connect() as window, window.begin():
        add = """
            INSERT INTO chunks (collection_id, chunk_id, content_hash, metadata, job_id)
            SELECT collection_id, 'late', content_hash, '{}', job_id FROM chunks LIMIT 1
        """
        window.execute(sa.text(add))  # its foreign key locks the row of the collection
        with db.begin() as conn:
            conn.execute(sa.text("SET LOCAL lock_timeout = '1ms'"))
            old = names.drop(conn, "docs")
    dropping.go_on(db, old.id)
    assert count(db, "chunks") == 0


def test_other_producers_and_workers_go_on_between_the_slices(client: Client, hands: Hands, db: sa.Engine) -> None:
    fill(client, "docs", 9)
    hands.work()
    done: list[int] = []

    def beside(deleted: int) -> None:
        with db.begin() as conn:
            may = "SELECT pg_try_advisory_xact_lock_shared(:key)"
            assert conn.execute(sa.text(may), {"key": DELETE_LOCK}).scalar_one()
        client.enqueue([(f"c{deleted}", f"beside {deleted}")], collection="others")
        done.append(deleted)

    assert client.drop_collection("docs", on_progress=beside).chunks == 10
    assert done == [2, 4, 6, 8, 10]
    assert client.audit("others").chunks == 5


def test_a_collection_with_an_alias_is_not_dropped_nor_by_its_alias(client: Client) -> None:
    fill(client, "docs")
    client.set_alias("live", "docs")
    with pytest.raises(InvalidInput, match="has the alias 'live'"):
        client.drop_collection("docs")
    with pytest.raises(InvalidInput, match="is an alias of collection 'docs'"):
        client.drop_collection("live")
    with pytest.raises(NotFound):
        client.drop_collection("nothing")
    assert client.audit("docs").chunks == 6
    client.remove_alias("live")
    dropped = client.drop_collection("docs", wait=False)
    assert (dropped.chunks, dropped.complete) == (0, False)
    assert names_of(client) == []


# Rename and alias


def test_a_renamed_collection_keeps_all_and_its_old_name_is_free(client: Client, hands: Hands) -> None:
    job_id = fill(client, "docs", idempotency_key="k")
    fill(client, "others")
    hands.work()
    client.set_alias("live", "docs")
    client.rename_collection("docs", "papers")
    assert names_of(client) == ["others", "papers"]
    assert (client.job(job_id).collection, client.audit("live").collection) == ("papers", "papers")
    assert fill(client, "papers", idempotency_key="k2") != job_id
    same = [(f"c{i}", f"docs {i}") for i in range(5)] + [("same", "a text of all")]
    assert client.enqueue(same, collection="papers", idempotency_key="k").id == job_id
    with pytest.raises(InvalidInput, match="'papers' now"):
        client.enqueue(same, collection="docs", idempotency_key="k")
    client.enqueue([("c", "a text")], collection="docs")
    assert (client.audit("docs").chunks, client.audit("papers").chunks) == (1, 6)
    for taken in ("docs", "live", "others"):
        with pytest.raises(InvalidInput, match="is taken"):
            client.rename_collection("papers", taken)
    with pytest.raises(InvalidInput, match="is an alias"):
        client.rename_collection("live", "x")


def test_every_method_takes_an_alias_and_a_moved_alias_means_the_other_collection(client: Client, hands: Hands) -> None:
    for name in ("blue", "green"):
        fill(client, name)
    hands.work(dead={"blue 1": "not_finite"})
    client.set_alias("live", "blue")
    assert client.search(np.ones(384, np.float32), collection="live", k=100)[0].text.startswith("blue")
    assert client.audit("live").collection == "blue"
    assert [entry.chunk_id for entry in client.dead(collection="live")] == ["c1"]
    assert client.vectors("live").keys() == client.vectors("blue").keys()
    job = client.enqueue([("new", "a new text")], collection="live")
    assert job.collection == "blue"
    assert client.delete("live", ["new"]) == 1
    assert client.estimate([("a", "b")], collection="live").chunks == 1
    assert client.index("live").is_ready
    client.set_alias("live", "green")
    assert client.audit("live").collection == "green"
    with pytest.raises(InvalidInput, match="is the name of a collection"):
        client.set_alias("blue", "green")
    client.remove_alias("live")
    with pytest.raises(NotFound):
        client.audit("live")
    with pytest.raises(NotFound):
        client.remove_alias("live")
    with pytest.raises(NotFound):
        client.set_alias("live", "nothing")


def test_a_name_is_never_that_of_a_collection_and_of_an_alias(client: Client, db: sa.Engine) -> None:
    """A producer that makes the collection, and one that makes the alias, at once, many times."""
    fill(client, "docs")
    for round_ in range(8):
        name = f"n{round_}"
        outcomes: list[str] = []

        def attempt(call: Callable[[], object], outcomes: list[str] = outcomes) -> None:
            try:
                call()
                outcomes.append("made")
            except InvalidInput:
                outcomes.append("refused")

        with running(
            lambda name=name: attempt(lambda: client.set_alias(name, "docs")),  # type: ignore[misc]
            lambda name=name: attempt(lambda: client.enqueue([(name, "a text")], collection=name)),  # type: ignore[misc]
        ):
            pass
        both = "SELECT count(*) FROM collections k JOIN collection_aliases a ON a.name = k.name"
        assert rows(db, both) == [(0,)], round_
    for table, columns in (("collections", "(name, space_id)"), ("collection_aliases", "(name, collection_id)")):
        other = "SELECT name FROM collection_aliases" if table == "collections" else "SELECT name FROM collections"
        target = "1" if table == "collections" else "201"
        with pytest.raises(sa.exc.IntegrityError, match="has this name already"):
            rows(db, f"INSERT INTO {table} {columns} SELECT name, {target} FROM ({other} LIMIT 1) n RETURNING 1")


def test_a_rename_waits_for_a_window_and_says_what_to_do_if_there_is_always_one(
    client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(client, "docs")
    monkeypatch.setattr("chunkmill.client.collections.RENAME_TRIES", 1)
    with db.connect() as window, window.begin():
        window.execute(sa.text("SELECT FROM collections WHERE name = 'docs' FOR KEY SHARE"))
        with pytest.raises(StoreUnavailable, match="give it an alias"):
            client.rename_collection("docs", "papers")
    client.rename_collection("docs", "papers")
    assert names_of(client) == ["papers"]


def test_the_commands_do_the_same_and_ask_before_a_drop(client: Client, settings: Settings, hands: Hands) -> None:
    fill(client, "docs")
    hands.work()
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}

    def run(*arguments: str) -> tuple[int, str]:
        said = CliRunner().invoke(cli, ["collections", *arguments], env=env)
        return said.exit_code, said.output

    assert run("alias", "live", "docs") == (0, "'live' is an alias of 'docs'.\n")
    assert run("rename", "docs", "papers") == (0, "'docs' is now 'papers'.\n")
    (listed,) = json.loads(run("--json")[1])
    assert (listed["name"], listed["aliases"], listed["chunks"], listed["index"]["rows"]) == ("papers", ["live"], 6, 0)
    assert run("unalias", "live") == (0, "'live' is an alias no longer.\n")
    code, said = run("drop", "papers")
    assert (code, "pass --yes" in said) == (1, True)
    assert names_of(client) == ["papers"]
    assert run("drop", "papers", "--yes") == (0, "Dropped 'papers' with 6 chunks.\n")
    assert json.loads(run("--json")[1]) == []


def test_no_method_that_takes_a_collection_misses_an_alias(
    client: Client, hands: Hands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every method, also one that comes later: a name that is read in another way would not be found."""
    monkeypatch.chdir(tmp_path)  # an export writes a file
    fill(client, "docs")
    hands.work()
    client.set_alias("live", "docs")
    asked = []
    for method in METHODS:
        call = getattr(client, method)
        if "collection" in inspect.signature(call).parameters:
            with contextlib.suppress(InvalidInput):  # a good value of another argument is missing
                call(**{**KNOWN.get(method, {}), "collection": "live"})
            asked.append(method)
    assert {"enqueue", "search", "audit", "delete", "dead", "estimate"} <= set(asked)
    assert names_of(client) == ["docs"]


def test_producers_that_enqueue_beside_many_drops_lose_nothing_in_the_collection_of_now(
    client: Client, db: sa.Engine, settings: Settings
) -> None:
    """Four producers, one that drops, and a poller that cleans up. A job belongs to the collection of before, and is
    cancelled or deleted with it, or to the one of now, which has all of its chunks."""
    done: list[tuple[int, list[str]]] = []
    stop = threading.Event()

    def produce(number: int) -> None:
        for round_ in range(1000):
            if stop.is_set():
                return
            chunks = [(f"{number}-{round_}-{i}", f"text {i} of {number % 2}") for i in range(2)]
            done.append((client.enqueue(chunks, collection="docs").id, [chunk_id for chunk_id, _ in chunks]))

    def clean() -> None:
        poller = Poller(db, client._broker, settings)
        while not stop.is_set():
            poller.round()

    with running(*(lambda n=n: produce(n) for n in range(4)), clean, release=stop.set):  # type: ignore[misc]
        for drops in range(5):
            until(lambda drops=drops: len(done) > 4 * drops and names_of(client) == ["docs"])  # type: ignore[misc]
            client.drop_collection("docs", wait=bool(drops % 2))
        until(lambda: len(done) > 30)
    until(lambda: [Poller(db, client._broker, settings).round(), not left(db)][1])
    stored = {chunk_id for (chunk_id,) in rows(db, "SELECT chunk_id FROM chunks")}
    of_now = [chunk_ids for job_id, chunk_ids in done if client.job(job_id).collection == "docs"]
    assert of_now
    assert stored == {chunk_id for chunk_ids in of_now for chunk_id in chunk_ids}
    assert rows(db, "SELECT count(*) FROM chunks c WHERE NOT EXISTS (SELECT FROM contents t "
                    "WHERE t.content_hash = c.content_hash)") == [(0,)]  # fmt: skip
    assert rows(db, "SELECT count(*) FROM collections WHERE dropped_at IS NOT NULL") == [(5,)]
