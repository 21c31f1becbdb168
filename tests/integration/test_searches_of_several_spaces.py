"""A search in a collection that has several spaces is answered by one of them, and says by which."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import Client, Hits
from chunkmill.broker import Broker
from chunkmill.client import counting
from chunkmill.db.connect import create_db
from chunkmill.domain.sessions import SearchId, percent_of
from chunkmill.errors import EngineError, InvalidInput, NotFound, WaitTimeout
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.keys import OneKey
from chunkmill.poller.poller import Poller
from chunkmill.remote import RemoteClient
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.spaces.registry import Space
from chunkmill.store import golden, searches
from chunkmill.store import search as searching
from chunkmill.store.searches import Key
from tests.support.gateways import running_gateway
from tests.support.several_spaces import (
    TwoSpaceWorker,
    begin,
    other_space,
    set_share,
    swap,
    two_space_worker,
    vector_of,
    write,
)
from tests.support.waiting import PATIENCE, until

COLLECTIONS = ("docs", "others")
N = 12
SESSIONS = [f"user {i}" for i in range(40)]


@pytest.fixture
def spaces(client: Client, db: sa.Engine) -> tuple[Space, Space]:
    """Two collections with all of their vectors in two spaces. Both are on their way from the first to the second."""
    for name in COLLECTIONS:
        client.enqueue([(f"c{i}", f"{name} {i}") for i in range(N)], collection=name)
    with db.begin() as conn:
        old = registry.get(conn, collections.find(conn, "docs").space_id)
        new = other_space(conn, old)
        for space in (old, new):
            write(conn, space, [f"{name} {i}" for name in COLLECTIONS for i in range(N)])
        for name in COLLECTIONS:
            begin(conn, name, new)
    return old, new


@pytest.fixture
def worker(db: sa.Engine) -> Iterator[TwoSpaceWorker]:
    with two_space_worker(db) as running:
        yield running


def share(db: sa.Engine, percent: int, name: str = "docs") -> None:
    with db.begin() as conn:
        set_share(conn, name, percent)


def flip(db: sa.Engine, name: str = "docs") -> None:
    with db.begin() as conn:
        swap(conn, name)


def ask(client: Client, text: str = "docs 3", *, session: str | None = None, space: str | None = None) -> Hits:
    hits = client.search(text, collection="docs", k=N, session=session, space=space, timeout=PATIENCE)
    assert isinstance(hits, Hits)
    return hits


def expected(space: Space, query: str) -> list[tuple[str, float]]:
    """The hits of ``docs`` in a space, by NumPy."""
    asked = vector_of(space, query)
    scores = []
    for i in range(N):
        stored = vector_of(space, f"docs {i}")
        scores.append((f"c{i}", float(stored @ asked / np.linalg.norm(stored) / np.linalg.norm(asked))))
    return sorted(scores, key=lambda pair: -pair[1])


def assert_is_of(hits: Hits, space: Space, query: str) -> None:
    """The query and all that it was compared with are of this space."""
    assert hits.space == space.spec.fingerprint
    wanted = expected(space, query)
    assert [hit.chunk_id for hit in hits] == [chunk_id for chunk_id, _ in wanted]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in wanted], abs=1e-5)


def test_a_share_of_the_sessions_is_answered_by_the_new_space_and_always_the_same_ones(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    with db.begin() as conn:
        number = conn.execute(
            sa.text("SELECT reembedding_id FROM collection_spaces WHERE collection_id = :id"),
            {"id": collections.find(conn, "docs").id},
        ).scalar_one()
    for percent in (0, 10, 50, 100):
        share(db, percent)
        for session in SESSIONS:
            is_new = percent_of(session, number) < percent
            assert_is_of(ask(client, session=session), new if is_new else old, "docs 3")
        assert ask(client).space == old.spec.fingerprint  # nobody in particular asks
    assert {percent_of(session, number) < 50 for session in SESSIONS} == {True, False}
    share(db, 0)
    flip(db)
    assert {ask(client, session=session).space for session in SESSIONS} == {new.spec.fingerprint}
    assert ask(client).space == new.spec.fingerprint


def test_a_space_is_searched_by_its_name(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    share(db, 100)
    assert_is_of(ask(client, space="active"), old, "docs 3")
    assert_is_of(ask(client, space="filling"), new, "docs 3")
    assert_is_of(ask(client, space=new.spec.fingerprint[:12]), new, "docs 3")
    flip(db)
    assert_is_of(ask(client, space="active"), new, "docs 3")
    assert_is_of(ask(client, space="previous"), old, "docs 3")
    with pytest.raises(NotFound, match=r"has no space 'filling'\. It has these: active .* previous"):
        ask(client, space="filling")
    with pytest.raises(InvalidInput, match=r"several spaces.*Give the role or the fingerprint"):
        ask(client, space=old.spec.model)  # both spaces are of this model
    # The vector of a query, and the neighbours of a chunk, are of the space that is named.
    hits = client.search(vector_of(old, "docs 5"), collection="docs", k=N, space="previous")
    assert_is_of(hits, old, "docs 5")
    like = client.search(like="c5", collection="docs", k=N, space="previous")
    assert [hit.chunk_id for hit in like] == [chunk_id for chunk_id, _ in expected(old, "docs 5")[1:]]


def test_two_arguments_that_choose_the_space_are_refused(client: Client, spaces: tuple[Space, Space]) -> None:
    old, _ = spaces
    with pytest.raises(InvalidInput, match="either session or space"):
        ask(client, session="a", space="active")
    with pytest.raises(InvalidInput, match="a query vector belongs to one already"):
        client.search(vector_of(old, "docs 1"), collection="docs", session="a")
    with pytest.raises(InvalidInput, match="on_unserved is 'any'"):
        client.search("docs 1", collection="docs", on_unserved="any")  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="session is ''"):
        ask(client, session="")


def test_no_answer_mixes_spaces_while_the_collection_flips_and_the_share_changes(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    by_fingerprint = {space.spec.fingerprint: space for space in spaces}
    stop, answered = threading.Event(), {space.spec.fingerprint: 0 for space in spaces}
    failures: list[BaseException] = []
    mutex = threading.Lock()

    def search(seed: int) -> None:
        rng = random.Random(seed)
        own = create_db(settings.require_database_url(), role="client")
        try:
            with Client(own, Broker.connect(settings), settings) as asker:
                while not stop.is_set():
                    query = f"docs {rng.randrange(N)}"
                    session = rng.choice([None, *SESSIONS])
                    hits = ask(asker, query, session=session)
                    assert_is_of(hits, by_fingerprint[hits.space], query)
                    with mutex:
                        answered[hits.space] += 1
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    rng = random.Random(0)
    for _ in range(40):
        flip(db)
        with db.begin() as conn:  # a ramp begins again with what was the previous one
            conn.execute(
                sa.text("UPDATE collection_spaces SET role = 'filling', share = :share"), {"share": rng.randrange(101)}
            )
        before = dict(answered)
        until(lambda before=before: stop.is_set() or sum(answered.values()) >= sum(before.values()) + 3)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert min(answered.values()) > 10


def test_a_search_whose_space_the_collection_leaves_meanwhile_begins_again(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vectors may be gone. The hits are then those of the active space, and not some of both."""
    old, new = spaces
    share(db, 100)
    see_one_moment = searching.see_one_moment
    left: list[str] = []

    def leave(conn: sa.Connection) -> None:
        """Between the embedding of the query and the search."""
        see_one_moment(conn)
        if not left:
            left.append("left")
            with db.begin() as other:
                other.execute(sa.text("DELETE FROM collection_spaces"))
                other.execute(sa.text(f"DELETE FROM {new.table_name}"))

    monkeypatch.setattr(searching, "see_one_moment", leave)
    assert_is_of(ask(client, session="a"), old, "docs 3")
    assert left


def test_a_search_whose_space_is_dropped_meanwhile_begins_again(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = spaces
    share(db, 100)
    search_all = searching.search_all
    dropped: list[str] = []

    def drop(conn: sa.Connection, *args: object, **named: object) -> list[Hits]:
        conn.execute(sa.text("SELECT 1"))  # the search sees one moment from here on
        if not dropped:
            dropped.append("dropped")
            with db.begin() as other:
                other.execute(sa.text("DELETE FROM collection_spaces"))
                other.execute(sa.text(f"DROP TABLE {new.table_name}"))
        return search_all(conn, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(searching, "search_all", drop)
    monkeypatch.setattr(searching, "see_one_moment", lambda conn: None)
    assert_is_of(ask(client, session="a"), old, "docs 3")
    assert dropped


def test_a_query_that_no_worker_serves_goes_to_the_previous_space_only_if_that_is_allowed(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    worker.unserved.add(new.id)
    share(db, 100)
    with pytest.raises(EngineError, match="no worker has the model"):
        ask(client, session="a")
    for session in ("a", "b"):
        hits = client.search(
            "docs 3", collection="docs", k=N, session=session, on_unserved="previous", timeout=PATIENCE
        )
        assert_is_of(hits, old, "docs 3")
        assert hits.instead_of == new.spec.fingerprint
    # Nobody waits for half of the time again and again: the second search did not ask for the new space.
    assert worker.asked == [("docs 3",)] * 3
    flip(db)
    hits = client.search("docs 4", collection="docs", k=N, on_unserved="previous", timeout=PATIENCE)
    assert_is_of(hits, old, "docs 4")
    assert hits.instead_of == new.spec.fingerprint
    with db.begin() as conn:
        conn.execute(sa.text("DELETE FROM collection_spaces"))
    with pytest.raises(EngineError):  # the collection has no other space
        client.search("docs 5", collection="docs", on_unserved="previous", timeout=PATIENCE)


def test_an_answer_of_the_space_that_was_to_answer_says_of_no_other(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    share(db, 100)
    hits = client.search("docs 3", collection="docs", session="a", on_unserved="previous", timeout=PATIENCE)
    assert (hits.space, hits.instead_of) == (spaces[1].spec.fingerprint, None)


@pytest.fixture
def another(settings: Settings) -> Iterator[Client]:
    """A client of another process."""
    with Client(create_db(settings.require_database_url(), role="other"), Broker.connect(settings), settings) as made:
        yield made


def test_searches_with_a_session_are_counted_by_space_and_reach_other_processes(
    client: Client, another: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    for _ in range(3):
        ask(client, session="a")
    ask(client)
    ask(client, space="filling")
    share(db, 100)
    for _ in range(2):
        ask(client, session="a")
    worker.unserved.add(new.id)
    for query in ("docs 8", "docs 9"):
        with pytest.raises(EngineError):
            ask(client, query, session="a")
    with pytest.raises(InvalidInput):
        client.search("docs 3", collection="docs", session="a", hybrid=True)
    with pytest.raises(WaitTimeout):
        worker.may.clear()
        client.search("docs 7", collection="docs", session="a", timeout=0)
    client.close()  # which writes what there is
    with db.begin() as conn:
        written = conn.execute(
            sa.text("SELECT space_id, bucket = -1 AS failed, sum(n) FROM search_counts GROUP BY 1, 2 ORDER BY 1, 2")
        ).all()
    assert [tuple(row) for row in written] == [(old.id, False, 3), (new.id, False, 2), (new.id, True, 3)]
    active, filling = another.search_counts("docs")
    assert (active.role, active.share, active.searches, active.errors) == ("active", 0, 3, 0)
    assert (filling.role, filling.share, filling.searches, filling.errors) == ("filling", 100, 5, 3)
    assert filling.p50_ms is not None and filling.p95_ms is not None and 0 < filling.p50_ms <= filling.p95_ms
    assert [(counts.searches, counts.p95_ms) for counts in another.search_counts("others")] == [(0, None)] * 2


def test_counts_are_written_by_themselves(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "WRITE_SECONDS", 0.01)
    monkeypatch.setattr(counting, "QUIET_ROUNDS", 2)

    def total() -> int:
        with db.begin() as conn:
            return int(conn.execute(sa.text("SELECT coalesce(sum(n), 0) FROM search_counts")).scalar_one())

    for n in (1, 2):
        ask(client, session="a")
        until(lambda n=n: total() == n)
        until(lambda: counting.counting_of(client._db)._thread is None)  # it ends, and the next search begins another


def test_a_search_writes_nothing_and_chooses_its_space_in_the_statement_that_reads_the_collection(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    share(db, 100)
    ask(client, session="a")  # the schema is known now, and the query is in the cache
    statements: list[str] = []

    def note(conn: object, cursor: object, statement: str, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            statements.append(" ".join(statement.split()))

    sa.event.listen(client._db, "before_cursor_execute", note)
    ask(client, session="a")
    assert statements[0].startswith("SELECT k.id AS collection_id")
    of_spaces = [statement for statement in statements if "collection_spaces" in statement]
    assert len(of_spaces) == 2  # the choice, and beside the serving index whether the space is still the collection's
    assert not [statement for statement in statements if statement.startswith(("INSERT", "UPDATE", "DELETE"))]
    assert len(statements) == 8, statements  # there were 11 when a collection had one space


def test_counts_that_cannot_be_written_stop_no_search_and_are_not_forgotten(
    client: Client,
    db: sa.Engine,
    spaces: tuple[Space, Space],
    worker: TwoSpaceWorker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE search_counts ADD CONSTRAINT full_disk CHECK (n < 0)"))
    ask(client, session="a")
    for _ in range(2):
        counting.counting_of(client._db).write(client._db)
    assert caplog.text.count("the counts of searches cannot be written") == 1
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE search_counts DROP CONSTRAINT full_disk"))
    assert client.search_counts("docs")[0].searches == 1


def test_feedback_is_counted_once_for_the_space_that_answered(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    of_old, of_new = ask(client, space="active"), ask(client, space="filling")
    assert client.feedback(of_new.search_id, of_new[0].chunk_id)
    assert client.feedback(of_new.search_id, of_new[1].chunk_id)
    assert not client.feedback(of_new.search_id, of_new[0].chunk_id)
    assert client.feedback(of_old.search_id, of_new[0].chunk_id)
    flip(db)
    counts = {one.space: (one.role, one.feedback) for one in client.search_counts("docs")}
    assert counts == {new.spec.fingerprint: ("active", 2), old.spec.fingerprint: ("previous", 1)}
    assert {one.feedback for one in client.search_counts("others")} == {0}
    with pytest.raises(NotFound, match="no chunk 'gone'"):
        client.feedback(of_new.search_id, "gone")
    with pytest.raises(InvalidInput, match="search_id"):
        client.feedback("what", "c1")
    assert SearchId.read(of_old.search_id).space_id == old.id


def test_the_query_cache_holds_no_vector_of_another_space(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    for active in (old, new, old):
        assert_is_of(ask(client), active, "docs 3")
        flip(db)
    assert worker.asked == [("docs 3",)] * 2  # once for each space
    assert client.query_cache().hits == 1


def test_a_mix_that_was_tuned_for_a_space_is_that_of_its_searches_alone(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    client.keywords("docs", language="simple")
    with db.begin() as conn:
        number = collections.find(conn, "docs").id
        tune = """
            INSERT INTO search_tunings (collection_id, space_id, alpha, report)
            VALUES (:id, :space, 0.5, '{}')
        """
        conn.execute(sa.text(tune), {"id": number, "space": new.id})
        assert golden.chosen_alpha(conn, number, old.id) is None
    assert ask(client, space="active")[0].mixed is None
    hits = ask(client, space="filling")
    assert hits[0].mixed is not None
    assert hits.space == new.spec.fingerprint


def test_an_alias_finds_all_spaces_of_its_collection(
    client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    client.set_alias("now", "docs")
    hits = client.search("docs 3", collection="now", space="filling", k=N, timeout=PATIENCE)
    assert_is_of(hits, spaces[1], "docs 3")
    with pytest.raises(NotFound, match="no collection 'never'"):
        client.search("docs 3", collection="never")


def test_a_gateway_and_its_client_pass_the_session_the_space_and_the_feedback_on(
    settings: Settings, client: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    share(db, 100)
    callers = {
        "cmk_of_all": Caller(None, "all", "one", frozenset({Scope.SEARCH})),
        "cmk_of_others": Caller(None, "others", "two", frozenset({Scope.SEARCH}), collections=frozenset({"others"})),
    }

    class Ring(OneKey):
        async def caller(self, key: str) -> Caller | None:
            return callers.get(key)

    with (
        running_gateway(settings, keys=Ring()) as gateway,
        RemoteClient(gateway.url, "cmk_of_all") as remote,
        RemoteClient(gateway.url, "cmk_of_others") as another,
    ):
        of_session = remote.search("docs 3", collection="docs", k=N, session="a")
        assert_is_of(of_session, new, "docs 3")
        assert_is_of(remote.search("docs 3", collection="docs", k=N, space="active"), old, "docs 3")
        several = remote.search(["docs 3", "docs 4"], collection="docs", k=N, space="filling")
        for hits, text in zip(several, ("docs 3", "docs 4"), strict=True):
            assert_is_of(hits, new, text)
        with pytest.raises(NotFound, match="has no space 'previous'"):
            remote.search("docs 3", collection="docs", space="previous")
        assert remote.feedback(of_session.search_id, "c3")
        assert not remote.feedback(of_session.search_id, "c3")
        with pytest.raises(NotFound, match="no collection of this search"):
            another.feedback(of_session.search_id, "c4")
        worker.unserved.add(new.id)
        hits = remote.search("docs 7", collection="docs", k=N, session="a", on_unserved="previous")
        assert_is_of(hits, old, "docs 7")
        assert hits.instead_of == new.spec.fingerprint
    assert client.search_counts("docs")[1].feedback == 1


def test_a_schema_that_is_migrated_or_downgraded_beside_a_client_stops_no_search(
    client: Client, another: Client, db: sa.Engine, spaces: tuple[Space, Space], worker: TwoSpaceWorker
) -> None:
    old, new = spaces
    share(db, 100)
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE collection_spaces RENAME TO kept"))
        conn.execute(sa.text("ALTER TABLE search_counts RENAME TO kept_counts"))
    assert_is_of(ask(client, session="a"), old, "docs 3")
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE kept RENAME TO collection_spaces"))
    assert_is_of(ask(client, session="a"), new, "docs 3")
    client.close()  # its counts have no table
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE kept_counts RENAME TO search_counts"))
    assert [counts.searches for counts in another.search_counts("docs")] == [0, 0]
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE collection_spaces RENAME TO kept"))
    assert_is_of(ask(another, session="a"), old, "docs 3")


def test_old_counts_become_those_of_hours_and_are_deleted_in_the_end(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space]
) -> None:
    old, new = spaces
    with db.begin() as conn:
        number = collections.find(conn, "docs").id
        now = int(conn.execute(sa.text("SELECT extract(epoch FROM now())::bigint")).scalar_one()) // 3600 * 3600

        def keys(at: int, bucket: int) -> dict[Key, int]:
            return {Key(number, old.id, at, bucket): 1, Key(number, new.id, at, bucket): 2, Key(-1, 1, at, 3): 9}

        for at in (now - 5 * 3600, now - 5 * 3600 + 60, now - 5 * 3600 + 600):
            searches.add(conn, keys(at, 40))
            searches.add(conn, keys(at, searches.FAILED))
        searches.add(conn, keys(now, 41))
        searches.add(conn, keys(now - 91 * 24 * 3600, 42))
        insert = """
            INSERT INTO search_feedback (search_number, chunk_id, collection_id, space_id, created_at)
            VALUES
                ('a', 'c1', :id, 1, now()), ('b', 'c1', :id, 1, now() - interval '91 days'), ('c', 'c1', -1, 1, now())
        """
        conn.execute(sa.text(insert), {"id": number})
    Poller(db, client._broker, settings).round()
    with db.begin() as conn:
        for _ in range(2):
            searches.tidy(conn)
        counted = searches.read(conn, number, since=datetime.now(UTC) - timedelta(days=100))
        assert {space_id: (one.latencies, one.errors) for space_id, one in counted.items()} == {
            old.id: ({40: 3, 41: 1}, 3),
            new.id: ({40: 6, 41: 2}, 6),
        }
        assert counted[old.id].feedback == 1
        assert conn.execute(sa.text("SELECT count(*) FROM search_counts")).scalar_one() == 6
        assert conn.execute(sa.text("SELECT count(*) FROM search_feedback")).scalar_one() == 1
