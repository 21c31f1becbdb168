"""A collection with two spaces has a serving index in both, which are built beside each other."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain import serving
from chunkmill.domain.reembedding import ReembeddingState
from chunkmill.domain.serving import BuilderKind, SegmentKind
from chunkmill.poller.indexer import Indexer
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.spaces.registry import Space
from chunkmill.store import indexing, segments
from chunkmill.store import search as searching
from tests.support.several_spaces import begin, go_on, other_space, swap, vector_of, write

COLLECTIONS = ("docs", "others")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collections of a few chunks get segments, segments of 8 rows get a graph, and nothing waits."""
    monkeypatch.setattr(indexing, "MIN_ROWS", 2)
    monkeypatch.setattr(indexing, "STALE_PAUSE_S", 0)
    monkeypatch.setattr(serving, "MIN_ROWS", 2)
    monkeypatch.setattr(serving, "GRAPH_ROWS", 8)
    monkeypatch.setattr(searching, "MAX_EXACT", 0)


@pytest.fixture
def spaces(client: Client, db: sa.Engine) -> tuple[Space, Space]:
    """Two collections of five chunks, all with vectors in two spaces."""
    for name in COLLECTIONS:
        add(client, name, range(5))
    with db.begin() as conn:
        old = registry.get(conn, collections.find(conn, "docs").space_id)
        new = other_space(conn, old)
    for space in (old, new):
        give(db, space, range(5))
    return old, new


def add(client: Client, name: str, numbers: Iterable[int]) -> None:
    client.enqueue([(f"c{i}", f"{name} {i}") for i in numbers], collection=name)


def give(db: sa.Engine, space: Space, numbers: Iterable[int]) -> None:
    with db.begin() as conn:
        write(conn, space, [f"{name} {i}" for i in numbers for name in COLLECTIONS])


def id_of(db: sa.Engine, name: str) -> int:
    with db.begin() as conn:
        return collections.find(conn, name).id


def are_ready(db: sa.Engine, name: str, *spaces: Space) -> list[bool]:
    with db.begin() as conn:
        return [indexing.is_ready(conn, collections.find(conn, name).id, space) for space in spaces]


def rows(db: sa.Engine, query: str, **parameters: object) -> list[object]:
    with db.begin() as conn:
        return list(conn.execute(sa.text(query), parameters).scalars())


def indexed_spaces(db: sa.Engine, name: str) -> list[object]:
    query = "SELECT space_id FROM serving_indexes WHERE collection_id = :id AND is_ready ORDER BY space_id"
    return rows(db, query, id=id_of(db, name))


def nearest(db: sa.Engine, space: Space, name: str, text: str) -> tuple[str, bool]:
    """The nearest chunk to a text in a space, and whether it was found through a serving index."""
    number = id_of(db, name)
    with db.begin() as conn:
        hits = searching.search(conn, space, vector_of(space, text), collection_id=number, k=1, explain=True)
    assert hits.explanation is not None
    return hits[0].chunk_id, not hits.explanation.is_exact


def test_each_space_of_a_collection_gets_an_index_of_its_own(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space]
) -> None:
    old, new = spaces
    with db.begin() as conn:
        begin(conn, "docs", new)
    assert are_ready(db, "docs", old, new) == [False, False]
    Indexer(db, settings).round()
    assert indexed_spaces(db, "docs") == [old.id, new.id]
    assert indexed_spaces(db, "others") == [old.id]
    assert are_ready(db, "docs", old, new) == [True, True]
    for space in spaces:
        assert nearest(db, space, "docs", "docs 3") == ("c3", True)


def test_the_index_of_a_space_that_is_being_filled_begins_when_it_is_full(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space]
) -> None:
    old, new = spaces
    with db.begin() as conn:
        filling = begin(conn, "docs", new, state=ReembeddingState.FILLING)
        begin(conn, "others", new, state=ReembeddingState.JUDGING)
    Indexer(db, settings).round()
    assert indexed_spaces(db, "docs") == [old.id]
    assert indexed_spaces(db, "others") == [old.id, new.id]
    with db.begin() as conn:
        go_on(conn, filling, state=ReembeddingState.INDEXING)
    assert are_ready(db, "docs", new) == [False]
    Indexer(db, settings).round()
    assert are_ready(db, "docs", new) == [True]


def test_an_index_is_ready_when_its_tail_is_short_and_no_merge_is_due(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space]
) -> None:
    old, new = spaces
    with db.begin() as conn:
        begin(conn, "docs", new)
    Indexer(db, settings).round()
    add(client, "docs", range(5, 12))
    give(db, old, range(5, 12))
    assert are_ready(db, "docs", old, new) == [False, True]  # what has no vector is not counted here
    give(db, new, range(5, 12))
    assert are_ready(db, "docs", old, new) == [False, False]
    with db.begin() as conn:
        number = collections.find(conn, "docs").id
    for space in spaces:
        assert indexing.flush(db, space, number) is not None
    assert are_ready(db, "docs", old, new) == [False, False]  # of the rows of both segments a graph is to be made
    assert indexing.merge(db, new, number, memory_mb=64) is not None
    assert are_ready(db, "docs", old, new) == [False, True]


def test_a_flip_and_a_rollback_find_both_indexes_ready(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space]
) -> None:
    old, new = spaces
    with db.begin() as conn:
        begin(conn, "docs", new)
    Indexer(db, settings).round()
    built = rows(db, "SELECT id FROM segments ORDER BY id")
    for active in (new, old, new):
        with db.begin() as conn:
            swap(conn, "docs")
        Indexer(db, settings).round()
        assert rows(db, "SELECT space_id FROM collections WHERE id = :id", id=id_of(db, "docs")) == [active.id]
        assert nearest(db, old, "docs", "docs 3") == nearest(db, new, "docs", "docs 3") == ("c3", True)
    assert rows(db, "SELECT id FROM segments ORDER BY id") == built


def test_what_is_written_into_both_spaces_is_found_in_both_at_once(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space]
) -> None:
    old, new = spaces
    with db.begin() as conn:
        begin(conn, "docs", new)
    Indexer(db, settings).round()
    add(client, "docs", [9])
    give(db, new, [9])
    assert nearest(db, new, "docs", "docs 9") == ("c9", True)
    assert nearest(db, old, "docs", "docs 9")[0] != "c9"
    give(db, old, [9])
    assert nearest(db, old, "docs", "docs 9") == ("c9", True)
    client.delete("docs", ["c9"])
    assert "c9" not in {nearest(db, space, "docs", "docs 9")[0] for space in spaces}


def test_the_index_of_a_space_that_the_collection_has_left_is_dropped(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = spaces
    with db.begin() as conn:
        for name in COLLECTIONS:
            begin(conn, name, new)
    Indexer(db, settings).round()
    add(client, "docs", [9])
    give(db, new, [9])  # one row for the tail
    with db.begin() as conn:
        conn.execute(
            sa.text("DELETE FROM collection_spaces WHERE collection_id = :id"),
            {"id": collections.find(conn, "docs").id},
        )
    monkeypatch.setattr(segments, "GRACE_S", 0)
    Indexer(db, settings).round()
    Indexer(db, settings).round()
    assert (indexed_spaces(db, "docs"), indexed_spaces(db, "others")) == ([old.id], [old.id, new.id])
    left = "SELECT DISTINCT space_id FROM {} WHERE collection_id = :id"
    assert rows(db, left.format("segments"), id=id_of(db, "docs")) == [old.id]
    assert new.id not in rows(db, left.format("serving_tail"), id=id_of(db, "docs"))
    tables = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relname ~ '^segment_[0-9]+$'"
    assert rows(db, tables) == rows(db, "SELECT count(*) FROM segments")


def test_a_builder_drops_nothing_that_another_is_building_in_the_other_space(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space]
) -> None:
    old, new = spaces
    with db.begin() as conn:
        begin(conn, "docs", new)
    number = id_of(db, "docs")
    with indexing._building(db, BuilderKind.FLUSH, number, old.id, wait=False) as lock:
        assert lock is not None
        with lock.conn.begin():
            half = segments.create(lock.conn, number, old, SegmentKind.FLAT, BuilderKind.FLUSH)
        assert indexing.flush(db, old, number) is None
        assert indexing.flush(db, new, number) is not None
        assert half.id in rows(db, "SELECT id FROM segments WHERE state = 'building'")
    assert indexing.flush(db, old, number) is not None
    assert rows(db, "SELECT id FROM segments WHERE state = 'building'") == []


def test_a_poller_of_the_last_release_forgets_no_index_of_another_space(
    client: Client, db: sa.Engine, settings: Settings, spaces: tuple[Space, Space]
) -> None:
    """It asks for it before each of its rounds, because the collection's active space is another one."""
    old, new = spaces
    with db.begin() as conn:
        begin(conn, "docs", new)
    Indexer(db, settings).round()
    with db.begin() as conn:
        number = collections.find(conn, "docs").id
        conn.execute(sa.text("SELECT forget_serving_index(:id, :space)"), {"id": number, "space": new.id})
    assert indexed_spaces(db, "docs") == [old.id, new.id]
    lost = rows(db, "SELECT id FROM segments WHERE state = 'live' AND space_id = :id", id=new.id)
    with db.begin() as conn:
        conn.execute(sa.text(f"DROP TABLE segment_{lost[0]}"))
    Indexer(db, settings).round()
    assert are_ready(db, "docs", new) == [True]
    assert nearest(db, new, "docs", "docs 3") == ("c3", True)
