"""Each collection has a SQL view, which any client of pgvector reads under a role that may read nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from pgvector.sqlalchemy import VECTOR
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.db.connect import alembic_config, create_db, migrate
from chunkmill.domain.collections import quoted, view_name
from chunkmill.embedded import StackStatus
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from tests.conftest import admin, client_for, url_of
from tests.integration.hands import Hands
from tests.support.installations import in_schema, install_as_before
from tests.support.roles import as_role, run_file

PAGE = Path(__file__).parents[2] / "docs" / "collections.md"
VIEWS = "chunkmill_collections"


def rows(db: sa.Engine, query: str, **parameters: object) -> list[tuple[Any, ...]]:
    with db.begin() as conn:
        return [tuple(row) for row in conn.execute(sa.text(query), parameters)]


def views(db: sa.Engine, schema: str = VIEWS) -> list[str]:
    """The names of the views of an installation."""
    query = "SELECT viewname FROM pg_views WHERE schemaname = :schema ORDER BY 1"
    return [name for (name,) in rows(db, query, schema=schema)]


def ids(db: sa.Engine, view: str, schema: str = VIEWS) -> set[str]:
    return {chunk_id for (chunk_id,) in rows(db, f"SELECT chunk_id FROM {quoted(schema, view)}".replace(":", "\\:"))}


def fill(client: Client, *collections: str) -> None:
    for name in collections:
        client.enqueue([(f"{name}-{i}", f"{name} {i}", {"n": i}) for i in range(3)], collection=name)


# Coming and going


def test_the_views_come_move_and_go_with_their_collections_and_aliases(
    client: Client, hands: Hands, db: sa.Engine
) -> None:
    fill(client, "docs", "others")
    assert views(db) == ["docs", "others"]
    hands.work(dead={"docs 1": "not_finite"})
    query = f"SELECT chunk_id, text, metadata, embedding IS NULL, truncated FROM {VIEWS}.docs ORDER BY 1"
    assert rows(db, query) == [
        ("docs-0", "docs 0", {"n": 0}, False, False),
        ("docs-1", "docs 1", {"n": 1}, True, None),
        ("docs-2", "docs 2", {"n": 2}, False, False),
    ]
    client.set_alias("live", "docs")
    assert (views(db), ids(db, "live")) == (["docs", "live", "others"], ids(db, "docs"))
    client.set_alias("live", "others")
    assert ids(db, "live") == {"others-0", "others-1", "others-2"}
    client.rename_collection("docs", "papers")
    assert (views(db), len(ids(db, "papers"))) == (["live", "others", "papers"], 3)
    client.remove_alias("live")
    client.drop_collection("papers")
    assert views(db) == ["others"]
    assert len(ids(db, "others")) == 3
    fill(client, "papers")
    assert ids(db, "papers") == {"papers-0", "papers-1", "papers-2"}


def test_a_collection_that_moves_to_another_space_shows_the_vectors_of_that_space(
    client: Client, hands: Hands, db: sa.Engine, settings: Settings
) -> None:
    fill(client, "docs")
    client.set_alias("live", "docs")
    hands.work()
    client.delete("docs", all_chunks=True)
    client.enqueue([("new", "a text")], collection="docs", on_long="split")
    assert rows(db, f"SELECT chunk_id, embedding FROM {VIEWS}.docs") == [("new", None)]
    hands.work()
    for name in ("docs", "live"):
        assert rows(db, f"SELECT chunk_id, vector_dims(embedding) FROM {VIEWS}.{name}") == [("new", 384)]


@pytest.mark.parametrize(
    "name",
    ['"; DROP TABLE chunks; --', "Docs", "a.b", "%s %(x)s", "日本語", "x" * 63, "x" * 200, "日" * 200, "$body$", " a"],
)
def test_every_name_of_a_collection_has_a_view_of_its_own(client: Client, db: sa.Engine, name: str) -> None:
    fill(client, name, name[:-1] + "y")
    for one_collection in (name, name[:-1] + "y"):
        assert ids(db, view_name(one_collection)) == {f"{one_collection}-{i}" for i in range(3)}
    assert rows(db, "SELECT collection_view_name(:name)", name=name) == [(view_name(name),)]
    assert {info.view for info in client.collections()} == {
        quoted(VIEWS, view_name(collection)) for collection in (name, name[:-1] + "y")
    }
    client.drop_collection(name)
    assert views(db) == [view_name(name[:-1] + "y")]


def test_who_reads_a_view_for_long_holds_nobody_up_and_the_poller_makes_it_right_later(
    client: Client, db: sa.Engine, settings: Settings
) -> None:
    fill(client, "docs")
    poller = Poller(db, client._broker, settings)
    with db.connect() as reader, reader.begin():
        reader.execute(sa.text(f"SELECT * FROM {VIEWS}.docs"))
        client.drop_collection("docs")
        fill(client, "docs")
        poller.round()
        assert client.audit("docs").chunks == 3
    Poller(db, client._broker, settings).round()
    assert (views(db), len(ids(db, "docs"))) == (["docs"], 3)


def test_what_somebody_else_has_put_into_the_schema_or_built_upon_a_view_stays(
    client: Client, hands: Hands, db: sa.Engine
) -> None:
    with db.begin() as conn:
        conn.execute(sa.text(f"CREATE TABLE {VIEWS}.mine (a integer)"))
    fill(client, "mine", "docs")
    with db.begin() as conn:
        conn.execute(sa.text(f"CREATE VIEW report AS SELECT count(*) AS n FROM {VIEWS}.docs"))
        conn.execute(sa.text(f"GRANT SELECT ON {VIEWS}.docs TO PUBLIC"))
    client.rename_collection("docs", "papers")
    assert views(db) == ["papers"]
    assert rows(db, "SELECT n FROM report") == [(3,)]
    assert rows(db, f"SELECT has_table_privilege('public', '{VIEWS}.papers', 'SELECT')") == [(True,)]
    client.drop_collection("papers")
    client.drop_collection("mine")
    assert rows(db, "SELECT n FROM report") == [(0,)]
    assert rows(db, f"SELECT count(*) FROM {VIEWS}.mine") == [(0,)]


# Migrations and installations


def test_collections_of_before_the_upgrade_have_views_after_it_and_a_downgrade_takes_them_away(
    stack: StackStatus, settings: Settings
) -> None:
    admin(stack, "CREATE DATABASE views_of_before")
    url = url_of(stack, "views_of_before")
    migrate(url, "0014")
    own = settings.model_copy(update={"database_url": url})
    db = create_db(url, role="test")
    with Client(create_db(url, role="client"), Broker.connect(own), own) as client:
        fill(client, "docs", "others")
        assert [(info.name, info.view) for info in client.collections()] == [("docs", None), ("others", None)]
        migrate(url)
        assert views(db) == ["docs", "others"]
        client.set_alias("live", "docs")
        client.drop_collection("others", wait=False)
        command.downgrade(alembic_config(url), "0014")
        assert views(db) == []
        assert rows(db, "SELECT to_regnamespace('chunkmill_collections')") == [(None,)]
        assert client.audit("docs").chunks == 3
        fill(client, "others")
        migrate(url)
        assert (views(db), ids(db, "others")) == (
            ["docs", "others", "others (dropped 2)"], {"others-0", "others-1", "others-2"},
        )  # fmt: skip
    db.dispose()
    admin(stack, "DROP DATABASE views_of_before WITH (FORCE)")


def test_a_migration_changes_the_tables_below_the_views_which_come_back(
    client: Client, hands: Hands, db: sa.Engine
) -> None:
    fill(client, "docs", "others")
    hands.work()
    change = "ALTER TABLE chunks ALTER COLUMN chunk_id TYPE varchar(300)"
    with db.connect() as conn, conn.begin():
        conn.execute(sa.text("SELECT pg_advisory_xact_lock(x'63686D00'::bigint)"))  # as alembic/env.py holds
        assert conn.execute(sa.text("SELECT hide_collection_views(500)")).scalar_one() == 2
        conn.execute(sa.text(change))
        conn.execute(sa.text("SELECT refresh_collection_views(500)"))
    assert len(ids(db, "docs")) == 3
    with db.connect() as migrating:
        migrating.execute(sa.text("SELECT pg_advisory_lock(x'63686D00'::bigint)"))
        while migrating.execute(sa.text("SELECT hide_collection_views(1)")).scalar_one():
            migrating.commit()
        fill(client, "new")
        assert rows(db, "SELECT refresh_collection_views(500)") == [(0,)]
        assert views(db) == []
        migrating.commit()
        migrating.execute(sa.text("SELECT refresh_collection_views(500)"))
        migrating.commit()
        migrating.execute(sa.text("SELECT pg_advisory_unlock_all()"))
    assert views(db) == ["docs", "new", "others"]


def test_two_installations_of_a_database_show_their_collections_in_two_schemas(
    stack: StackStatus, settings: Settings
) -> None:
    admin(stack, "CREATE DATABASE two_with_views")
    url = url_of(stack, "two_with_views")
    long = "s" * 60
    install_as_before(url)  # in public
    homes = {"public": url, "mine": in_schema(url, "mine"), long: in_schema(url, long)}
    for home, place in homes.items():
        migrate(place)
        own = settings.model_copy(update={"database_url": place})
        with Client(create_db(place, role="client"), Broker.connect(own), own) as client:
            fill(client, "docs")
            client.enqueue([(f"of {home[:6]}", "a text")], collection="docs")
            (info,) = client.collections()
            assert info.view is not None
            schema = info.view.split(".")[0].strip('"')
            assert len(schema) <= 63
            db = create_db(place, role="test")
            assert ids(db, "docs", schema) == {"docs-0", "docs-1", "docs-2", f"of {home[:6]}"}
            db.dispose()
    admin(stack, "DROP DATABASE two_with_views WITH (FORCE)")


def test_a_schema_of_somebody_elses_gets_no_views_and_nothing_fails(stack: StackStatus, settings: Settings) -> None:
    admin(stack, "CREATE DATABASE theirs_with_views")
    url = url_of(stack, "theirs_with_views")
    theirs = sa.create_engine(url, poolclass=sa.NullPool)
    with theirs.begin() as conn:
        conn.execute(sa.text("CREATE SCHEMA chunkmill_collections"))
        conn.execute(sa.text("CREATE TABLE chunkmill_collections.docs (a integer)"))
    migrate(url)
    own = settings.model_copy(update={"database_url": url})
    with Client(create_db(url, role="client"), Broker.connect(own), own) as client:
        fill(client, "docs", "others")
        assert [info.view for info in client.collections()] == [None, None]
        client.rename_collection("docs", "papers")
        client.drop_collection("papers")
    command.downgrade(alembic_config(url), "base")
    assert rows(theirs, "SELECT count(*) FROM chunkmill_collections.docs") == [(0,)]
    admin(stack, "DROP DATABASE theirs_with_views WITH (FORCE)")


# The read-only role


class Base(DeclarativeBase):
    pass


class Doc(Base):
    """What an application that knows SQLAlchemy and pgvector, and nothing of Chunkmill, writes."""

    __tablename__ = "docs"
    __table_args__ = {"schema": VIEWS}  # noqa: RUF012

    chunk_id: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]
    embedding: Mapped[Any] = mapped_column(VECTOR(384))


@pytest.fixture
def installed(stack: StackStatus, settings: Settings) -> Iterator[tuple[Settings, str]]:
    """The settings of a producer, and the URL of a login in chunkmill_viewers, after deploy/postgres-role.sql."""
    admin(stack, "CREATE DATABASE views_for_readers")
    superuser = url_of(stack, "views_for_readers")
    run_file(superuser)
    for role in ("producer", "viewer"):
        admin(stack, f"DROP ROLE IF EXISTS views_{role}")
        admin(stack, f"CREATE ROLE views_{role} LOGIN IN ROLE chunkmill_{role}s")
    migrate(as_role(superuser, "chunkmill_migrator"))
    run_file(superuser)
    yield (
        settings.model_copy(update={"database_url": as_role(superuser, "views_producer")}),
        as_role(superuser, "views_viewer"),
    )
    admin(stack, "DROP DATABASE views_for_readers WITH (FORCE)")
    for role in ("producer", "viewer"):
        admin(stack, f"DROP ROLE views_{role}")


def test_psycopg_and_an_orm_read_the_views_by_distance_under_a_role_that_reads_nothing_else(
    installed: tuple[Settings, str], stack: StackStatus
) -> None:
    own, viewer = installed
    worker = create_db(url_of(stack, "views_for_readers"), role="worker")
    with client_for(own) as client:
        fill(client, "docs", "others")
        Hands(worker).work()
        with worker.begin() as conn:  # vectors that differ
            conn.execute(sa.text("UPDATE vectors_1 SET embedding = array_fill(0::real, '{384}')::vector"))
            for i in range(3):
                vector = np.zeros(384)
                vector[0], vector[1] = 1, i
                update = """
                    UPDATE vectors_1 v SET embedding = CAST(:vector AS vector)
                    FROM contents t WHERE t.content_hash = v.content_hash AND t.text LIKE :text
                """
                conn.execute(sa.text(update), {"vector": str(vector.tolist()), "text": f"% {i}"})
        query = np.zeros(384, np.float32)
        query[1] = 1
        expected = ["docs-2", "docs-1", "docs-0"]
        assert [hit.chunk_id for hit in client.search(query, collection="docs")] == expected

        with psycopg.connect(viewer.replace("+psycopg", ""), autocommit=True) as conn:
            by_distance = "SELECT chunk_id FROM chunkmill_collections.docs ORDER BY embedding <=> %s::vector LIMIT 3"
            assert [row[0] for row in conn.execute(by_distance, [str(query.tolist())])] == expected
            for forbidden in FORBIDDEN:
                # Before it looks at rights, Postgres says that a view of several tables cannot be changed.
                with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.ObjectNotInPrerequisiteState)):
                    conn.execute(forbidden)  # type: ignore[arg-type]
        engine = sa.create_engine(viewer, poolclass=sa.NullPool)
        with Session(engine) as session:
            nearest = sa.select(Doc).order_by(Doc.embedding.cosine_distance(query)).limit(2)
            docs = session.scalars(nearest).all()
            assert [(doc.chunk_id, doc.text) for doc in docs] == [("docs-2", "docs 2"), ("docs-1", "docs 1")]
            assert list(docs[0].embedding[:2]) == [1, 2]
            assert session.scalar(sa.select(sa.func.count()).select_from(Doc)) == 3

        client.set_alias("live", "others")
        client.rename_collection("docs", "papers")
        client.drop_collection("papers")
        fill(client, "docs")
        with psycopg.connect(viewer.replace("+psycopg", ""), autocommit=True) as conn:
            assert conn.execute("SELECT count(*) FROM chunkmill_collections.docs").fetchone() == (3,)
            assert conn.execute("SELECT min(chunk_id) FROM chunkmill_collections.live").fetchone() == ("others-0",)
            readable = """
                SELECT count(*), count(*) FILTER (WHERE has_table_privilege(c.oid, 'SELECT'))
                FROM pg_class c
                JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'chunkmill'
                WHERE c.relkind = 'r'
            """
            tables, readable_tables = conn.execute(readable).fetchone() or (0, 0)
            assert tables > 20
            assert readable_tables == 0
    worker.dispose()


def test_the_sql_of_the_page_works_as_it_is_pasted(
    client: Client, hands: Hands, settings: Settings, stack: StackStatus
) -> None:
    blocks = re.findall(r"^```sql\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    nearest, grants = blocks
    languages = {"mill-2": "en", "mill-3": "de", "mill-1": "en"}
    chunks = [(chunk_id, f"text {chunk_id}", {"lang": lang}) for chunk_id, lang in languages.items()]
    client.enqueue(chunks, collection="docs")
    client.enqueue([("mill-1", "another text"), ("mill-4", "one more")], collection="others")
    hands.work()
    dashboard = as_role(settings.require_database_url(), "dashboard").replace("+psycopg", "")
    try:
        with psycopg.connect(settings.require_database_url().replace("+psycopg", ""), autocommit=True) as owner:
            assert owner.execute(nearest).fetchall() == [("mill-1", "text mill-1"), ("mill-2", "text mill-2")]  # type: ignore[call-overload]
            owner.execute(grants)  # type: ignore[call-overload]
        client.enqueue([("late", "a later text")], collection="later")
        with psycopg.connect(dashboard, autocommit=True) as viewer:
            for view, chunks_in_it in (("docs", 3), ("others", 2), ("later", 1)):
                counted = viewer.execute(f"SELECT count(*) FROM {VIEWS}.{view}").fetchone()  # type: ignore[call-overload]
                assert counted == (chunks_in_it,)
            for forbidden in FORBIDDEN:
                with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.ObjectNotInPrerequisiteState)):
                    viewer.execute(forbidden)  # type: ignore[call-overload]
    finally:
        with psycopg.connect(settings.require_database_url().replace("+psycopg", ""), autocommit=True) as owner:
            owner.execute("DROP OWNED BY dashboard")
        admin(stack, "DROP ROLE dashboard")


def test_a_login_in_the_group_is_made_with_the_command_of_the_page(
    installed: tuple[Settings, str], stack: StackStatus
) -> None:
    made = re.search(r"^psql .* -c '(CREATE ROLE reports .*)'$", PAGE.read_text(), re.MULTILINE)
    assert made is not None
    admin(stack, made[1])
    try:
        own, viewer = installed
        with client_for(own) as client:
            fill(client, "docs", "others")
        with psycopg.connect(as_role(viewer, "reports").replace("+psycopg", "")) as conn:
            assert conn.execute("SELECT count(*) FROM chunkmill_collections.docs").fetchone() == (3,)
    finally:
        admin(stack, "DROP ROLE reports")


FORBIDDEN = (
    "SELECT text FROM chunkmill.contents",
    "SELECT * FROM chunkmill.chunks",
    "SELECT * FROM chunkmill.vectors_1",
    "SELECT * FROM chunkmill.jobs",
    "SELECT chunkmill.show_collection('docs')",
    "UPDATE chunkmill_collections.docs SET text = ''",
    "DELETE FROM chunkmill_collections.docs",
    "DROP VIEW chunkmill_collections.docs",
    "CREATE VIEW chunkmill_collections.mine AS SELECT 1",
    "CREATE TABLE public.mine (a integer)",
)
"""What the read-only role is refused."""


def test_a_view_hides_the_other_collections_from_a_function_in_a_condition(
    client: Client, hands: Hands, db: sa.Engine
) -> None:
    """Without a barrier a cheap function of the reader's would be called with the rows of all collections."""
    fill(client, "docs", "others")
    with db.begin() as conn:
        conn.execute(
            sa.text("""
            CREATE FUNCTION pg_temp.spy(said text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001
            AS $$ BEGIN RAISE WARNING 'saw %', said; RETURN true; END $$
        """)
        )
        driver = conn.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        seen: list[str] = []
        driver.add_notice_handler(lambda notice: seen.append(notice.message_primary or ""))
        # An index would leave the other collections out before any condition is looked at.
        for index in ("enable_indexscan", "enable_bitmapscan"):
            conn.execute(sa.text(f"SET LOCAL {index} = off"))
        conn.execute(sa.text(f"SELECT * FROM {VIEWS}.docs WHERE pg_temp.spy(chunk_id)"))
    assert sorted(seen) == ["saw docs-0", "saw docs-1", "saw docs-2"]
