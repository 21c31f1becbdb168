"""A text is stored as it was given, whatever encoding a session, a role or a database asks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Client
from chunkmill.cli.__main__ import cli
from chunkmill.db.connect import create_db, migrate, require_migrated
from chunkmill.domain.chunks import content_hash
from chunkmill.embedded import StackStatus
from chunkmill.errors import StoreUnavailable
from chunkmill.settings import Settings
from tests.conftest import admin, url_of
from tests.integration.conftest import Runner
from tests.openai_server import OpenAIServer
from tests.support.corridor import corridor

TEXTS = {"größe": "Die Größe der Straße", "雨": "雨が降っています", "plain": "It is raining"}
LATIN_URL = "options=-cclient_encoding%3DLATIN1"


def rows_of(db: sa.Engine, query: str) -> list[tuple[object, ...]]:
    with db.begin() as conn:
        return [tuple(row) for row in conn.execute(sa.text(query))]


@pytest.fixture
def latin_sessions(request: pytest.FixtureRequest, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database's URL, once something asks every session for another encoding than UTF-8."""
    url = settings.require_database_url()
    if request.param == "variable":
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    elif request.param == "database":
        db = create_db(url, role="test", pool_size=1)
        with db.begin() as conn:
            conn.execute(sa.text(f'ALTER DATABASE "{sa.make_url(url).database}" SET client_encoding = LATIN1'))
        db.dispose()
    else:
        url += ("&" if "?" in url else "?") + LATIN_URL
    return url


@pytest.mark.parametrize("latin_sessions", ["variable", "database", "url"], indirect=True)
def test_texts_and_ids_are_stored_as_given_by_a_session_of_another_encoding(
    latin_sessions: str, settings: Settings, client: Client
) -> None:
    own = settings.model_copy(update={"database_url": latin_sessions})
    with Client(create_db(latin_sessions, role="client"), client._broker, own) as latin:
        latin.enqueue(TEXTS.items(), collection="docs")
        latin.enqueue(TEXTS.items(), collection="others")
    stored = rows_of(client._db, "SELECT content_hash, text FROM contents")
    assert {(content_hash(text), text) for text in TEXTS.values()} == set(stored)
    assert {row[0] for row in rows_of(client._db, "SELECT chunk_id FROM chunks")} == TEXTS.keys()


def damage(db: sa.Engine, text: str) -> None:
    """What a session of LATIN1 made of a text before sessions were all of UTF-8."""
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE contents SET text = :damaged WHERE content_hash = :hash"),
            {"damaged": text.encode().decode("latin-1"), "hash": content_hash(text)},
        )


def test_a_damaged_text_gets_no_vector_until_it_is_enqueued_again(client: Client, runner: Runner) -> None:
    """Of two jobs with two texts each, it stops only the job whose text is damaged, and only that text."""
    job = client.enqueue([("a", "Die Größe"), ("b", "It is raining")], collection="docs")
    other = client.enqueue([("c", "Die Länge"), ("d", "It is snowing")], collection="others")
    damage(client._db, "Die Größe")
    assert runner.finish(job).state == "failed"
    assert runner.finish(other).state == "completed"
    assert [(entry.chunk_id, entry.code) for entry in client.dead()] == [("a", "damaged_text")]
    assert client.vectors("docs").keys() == {"b"}

    again = client.enqueue([("a", "Die Größe"), ("b", "It is raining")], collection="docs")
    assert runner.finish(again).state == "completed"
    assert client.audit("docs").complete


@pytest.mark.parametrize("route", ["openai", "openai-sync"])
def test_a_damaged_text_is_neither_sent_nor_paid(settings: Settings, route: str) -> None:
    with OpenAIServer() as server, corridor(settings, server) as mill:
        job = mill.client.enqueue([("a", "Die Größe"), ("b", "It is raining")], collection="docs", route=route)
        damage(mill.db, "Die Größe")
        (ended,) = mill.finish(job)
        assert ended.state == "failed"
        assert [(entry.chunk_id, entry.code) for entry in mill.client.dead()] == [("a", "damaged_text")]
        mill.check_vectors({"b": "It is raining"})
        mill.check_paid_once({"It is raining"})


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def foreign(request: pytest.FixtureRequest, stack: StackStatus) -> Iterator[tuple[str, str]]:
    """The URL of an empty database of another encoding, and the encoding."""
    admin(stack, f"CREATE DATABASE foreign_one ENCODING '{request.param}' TEMPLATE template0 LOCALE 'C' "
          "LOCALE_PROVIDER libc")  # fmt: skip
    yield url_of(stack, "foreign_one"), request.param
    admin(stack, "DROP DATABASE foreign_one WITH (FORCE)")


def test_a_database_of_another_encoding_is_refused_by_name(foreign: tuple[str, str], settings: Settings) -> None:
    url, encoding = foreign
    why = rf"encoding of the database is {encoding}.*needs UTF8.*CREATE DATABASE"
    with pytest.raises(StoreUnavailable, match=why):
        migrate(url)
    db = create_db(url, role="worker", pool_size=1)
    with pytest.raises(StoreUnavailable, match=why):
        require_migrated(db)  # which clients, workers and pollers call
    db.dispose()
    env = {"DATABASE_URL": url, "REDIS_URL": settings.require_redis_url()}
    said = CliRunner().invoke(cli, ["doctor"], env=env)
    assert f"encoding        {encoding}" in said.output.replace("✗ ", ""), said.output
