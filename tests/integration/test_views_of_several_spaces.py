"""The SQL view of a collection shows its active space, also after a flip, and holds no flip up."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from tests.support.several_spaces import begin, other_space, swap, write

VIEWS = "chunkmill_collections"
TEXTS = ("a text", "another text")


def rows(db: sa.Engine, query: str) -> list[tuple[Any, ...]]:
    with db.begin() as conn:
        return [tuple(row) for row in conn.execute(sa.text(query))]


def shown(db: sa.Engine, view: str) -> str:
    """The type of the vectors that a view shows, and the space they are of."""
    (row,) = rows(db, f"SELECT pg_typeof(embedding), count(*) FROM {VIEWS}.{view} GROUP BY 1")
    assert row[1] == len(TEXTS)
    (mark,) = rows(db, f"SELECT obj_description('{VIEWS}.{view}'::regclass, 'pg_class')")
    return f"{row[0]} of space {mark[0].split()[-1]}"


def make(client: Client, db: sa.Engine, storage: str) -> None:
    """Two collections that are on their way from space 1 to space 2."""
    for name in ("docs", "others"):
        client.enqueue([(f"c{i}", text) for i, text in enumerate(TEXTS)], collection=name)
    with db.begin() as conn:
        old = registry.get(conn, collections.find(conn, "docs").space_id)
        new = other_space(conn, old, storage=storage)
        for space in (old, new):
            write(conn, space, TEXTS)
        for name in ("docs", "others"):
            begin(conn, name, new)
    assert (old.id, new.id) == (1, 2)
    client.set_alias("live", "docs")


@pytest.mark.parametrize("storage", ["vector", "halfvec"])
def test_a_flip_and_a_rollback_move_the_views_and_keep_what_was_granted(
    client: Client, db: sa.Engine, storage: str
) -> None:
    make(client, db, storage)
    with db.begin() as conn:
        for view in ("docs", "live"):
            conn.execute(sa.text(f"GRANT SELECT ON {VIEWS}.{view} TO PUBLIC"))
        conn.execute(sa.text(f"GRANT SELECT ON {VIEWS}.docs TO pg_monitor WITH GRANT OPTION"))
    for expected in (f"{storage} of space 2", "vector of space 1", f"{storage} of space 2"):
        with db.begin() as conn:
            swap(conn, "docs")
        assert (shown(db, "docs"), shown(db, "live")) == (expected, expected)
        assert shown(db, "others") == "vector of space 1"
        for view in ("docs", "live"):
            assert rows(db, f"SELECT has_table_privilege('public', '{VIEWS}.{view}', 'SELECT')") == [(True,)]
        granted = f"SELECT has_table_privilege('pg_monitor', '{VIEWS}.docs', 'SELECT WITH GRANT OPTION')"
        assert rows(db, granted) == [(True,)]
        assert rows(db, f"SELECT has_table_privilege('public', '{VIEWS}.others', 'SELECT')") == [(False,)]


def test_an_alias_that_moves_to_another_collection_takes_no_rights_with_it(client: Client, db: sa.Engine) -> None:
    make(client, db, "vector")
    with db.begin() as conn:
        conn.execute(sa.text(f"GRANT SELECT ON {VIEWS}.live TO PUBLIC"))
    client.set_alias("live", "others")
    assert rows(db, f"SELECT has_table_privilege('public', '{VIEWS}.live', 'SELECT')") == [(False,)]


def test_what_was_built_upon_a_view_follows_a_flip(client: Client, db: sa.Engine) -> None:
    make(client, db, "vector")
    with db.begin() as conn:
        conn.execute(sa.text(f"CREATE VIEW report AS SELECT min(embedding <-> embedding) AS d FROM {VIEWS}.docs"))
        swap(conn, "docs")
    assert shown(db, "docs") == "vector of space 2"
    assert rows(db, "SELECT d FROM report") == [(0.0,)]
    with db.begin() as conn:
        swap(conn, "docs")
    make_no_view_stay(db)


def make_no_view_stay(db: sa.Engine) -> None:
    """Nothing of the view that was replaced keeps the vectors of the space that the collection has left."""
    with db.begin() as conn:
        conn.execute(sa.text("DROP TABLE vectors_2"))


def test_who_reads_a_view_holds_no_flip_up_and_the_poller_makes_it_right_later(
    client: Client, db: sa.Engine, settings: Settings
) -> None:
    make(client, db, "halfvec")
    with db.connect() as reader, reader.begin():
        reader.execute(sa.text(f"SELECT * FROM {VIEWS}.docs"))
        with db.begin() as conn:
            conn.execute(sa.text("SET LOCAL statement_timeout = '500ms'"))  # half of what a change of a name waits
            swap(conn, "docs")
        assert shown(db, "docs") == "vector of space 1"
    Poller(db, client._broker, settings).round()
    assert shown(db, "docs") == shown(db, "live") == "halfvec of space 2"
