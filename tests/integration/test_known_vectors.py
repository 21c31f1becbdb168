"""Vectors that need no worker: of queries that were asked for before, and of texts that are stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill import AsyncClient, Client, WaitTimeout
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors
from chunkmill_workers.engine.matryoshka import shorten
from chunkmill_workers.local.context import WorkerContext
from tests.integration.conftest import Runner
from tests.support.askers import Answerer, answering, vector_of


@pytest.fixture
def worker(db: sa.Engine) -> Iterator[Answerer]:
    with answering(db) as running:
        yield running


def a_client(settings: Settings, **changes: object) -> Client:
    changed = settings.model_copy(update=changes)
    return Client(create_db(settings.require_database_url(), role="client"), Broker.connect(settings), changed)


def store(client: Client, db: sa.Engine, name: str, texts: list[str], on_long: str = "truncate") -> registry.Space:
    """Enqueue the texts and write, for ``text 7``, the unit vector 7 with 7 tokens; every third text is cut."""
    job = client.enqueue([(text, text) for text in texts], collection=name, on_long=on_long)
    with db.begin() as conn:
        space = registry.get(
            conn, conn.execute(sa.text("SELECT space_id FROM jobs WHERE id = :id"), {"id": job.id}).scalar_one()
        )
        rows = conn.execute(
            sa.text(
                "SELECT content_hash, chunk_id FROM chunks JOIN collections c ON c.id = collection_id WHERE c.name = :n"
            ),
            {"n": name},
        ).all()
        numbers = [int(row.chunk_id.split()[-1]) for row in rows]
        write_vectors(
            conn,
            space,
            space.spec.fingerprint,
            [row.content_hash for row in rows],
            np.array(numbers, np.int32),
            np.array([n % 3 == 0 for n in numbers]),
            np.stack([vector_of(row.chunk_id) for row in rows]),
        )
    return space


# --- queries


def test_the_vector_of_a_query_is_made_once_for_searches_and_embed(
    client: Client, db: sa.Engine, worker: Answerer
) -> None:
    store(client, db, "docs", ["text 1", "text 2"])
    store(client, db, "split", ["text 3", "text 4"], on_long="split")
    for _ in range(2):
        assert client.search("text 1", collection="docs", k=1)[0].chunk_id == "text 1"
        assert client.embed(["text 1"], kind="query").argmax() == 1
        assert client.search(["text 2", "text 1"], collection="docs", k=1)[1][0].chunk_id == "text 1"
    assert worker.texts == ["text 1", "text 2"]
    assert client.search("text 1", collection="split", k=1)
    assert worker.texts == ["text 1", "text 2", "text 1"], "another space has another vector"
    embedded = client.embed_texts(["text 1"], kind="query")
    assert (embedded.tokens.tolist(), embedded.truncated.tolist()) == ([6], [False])
    cached = client.query_cache()
    assert (cached.hits, cached.misses, cached.vectors) == (7, 3, 3)


def test_a_query_that_nobody_answered_is_asked_for_again(client: Client, db: sa.Engine) -> None:
    with pytest.raises(WaitTimeout):
        client.embed(["text 1"], kind="query", timeout=0.01)
    with answering(db):
        assert client.embed(["text 1"], kind="query").argmax() == 1


def test_settings_turn_the_cache_off_or_let_it_keep_documents(
    settings: Settings, db: sa.Engine, worker: Answerer
) -> None:
    with a_client(settings, query_cache_mb=0) as without, a_client(settings, query_cache_documents=True) as both:
        for _ in range(2):
            without.embed(["text 1"], kind="query")
            both.embed(["text 2"])
            both.embed(["text 3"], kind="query")
        assert sorted(worker.texts) == ["text 1", "text 1", "text 2", "text 3"]
        assert without.query_cache().limit == 0
        assert both.query_cache().vectors == 2


def test_documents_are_not_cached_unless_a_setting_says_so(client: Client, worker: Answerer) -> None:
    for _ in range(2):
        client.embed(["text 2"])
    assert worker.texts == ["text 2"] * 2


def test_a_cache_that_was_saved_serves_another_client_without_a_worker(
    settings: Settings, client: Client, db: sa.Engine, tmp_path: Path
) -> None:
    with answering(db):
        client.embed(["text 1", "text 2"], kind="query")

    async def scene() -> None:
        async with AsyncClient(client) as first:
            assert await first.save_query_cache(tmp_path / "queries") == 2
        async with AsyncClient(a_client(settings)) as second:
            assert await second.load_query_cache(tmp_path / "queries") == 2
            assert (await second.embed(["text 2", "text 1"], kind="query")).argmax(axis=1).tolist() == [2, 1]
            assert (await second.query_cache()).hits == 2
            await second.clear_query_cache()
            with pytest.raises(WaitTimeout):
                await second.embed(["text 1"], kind="query", timeout=0.01)

    asyncio.run(scene())


# --- stored texts


def test_stored_texts_need_no_worker_and_others_are_asked_for(client: Client, db: sa.Engine, worker: Answerer) -> None:
    store(client, db, "docs", ["text 1", "text 2", "text 3"])
    embedded = client.embed_texts(["text 3", "text 200", "text 1", "text 3"])
    assert worker.texts == ["text 200"]
    assert embedded.vectors.dtype == np.float32
    assert embedded.vectors.dtype.isnative
    assert np.array_equal(embedded.vectors, [vector_of(f"text {n}") for n in (3, 200, 1, 3)])
    assert embedded.tokens.tolist() == [3, 8, 1, 3]
    assert embedded.truncated.tolist() == [True, False, False, True]


def test_stored_vectors_are_of_documents_of_the_same_space(client: Client, db: sa.Engine, worker: Answerer) -> None:
    store(client, db, "split", ["text 1", "text 2"], on_long="split")
    assert client.embed(["text 1"]).argmax() == 1
    assert worker.texts == ["text 1"], "its space splits long texts, and embed cuts them"
    store(client, db, "docs", ["text 1", "text 2"])
    client.embed(["text 2"], kind="query")
    assert worker.texts == ["text 1", "text 2"]
    client.embed(["text 1", "text 2"])
    assert len(worker.texts) == 2


def test_vectors_that_were_stored_in_half_precision_are_not_taken(
    settings: Settings, db: sa.Engine, worker: Answerer
) -> None:
    with a_client(settings, vector_storage="halfvec") as client:
        store(client, db, "docs", ["text 1"])
        client.embed(["text 1"])
        assert worker.texts == ["text 1"]


def test_all_texts_of_a_call_are_looked_up_in_one_statement(client: Client, db: sa.Engine) -> None:
    store(client, db, "docs", [f"text {n}" for n in range(300)])
    client.embed(["text 1"])
    statements: list[str] = []
    sa.event.listen(client._db, "before_cursor_execute", lambda _c, _k, statement, *_: statements.append(statement))
    assert client.embed([f"text {n}" for n in range(300)]).argmax(axis=1).tolist() == list(range(300))
    assert len(statements) == 1


def test_a_stored_vector_is_the_one_that_a_worker_would_answer(
    client: Client, runner: Runner, context: WorkerContext, db: sa.Engine
) -> None:
    """Within 1e-6, for long and short texts, with the same counts."""
    texts = ["How to bake bread", "tide " * 400, "a", "Zürich 東京"]
    runner.finish(client.enqueue([(str(i), text) for i, text in enumerate(texts)], collection="docs"))
    stored = client.embed_texts(texts, timeout=0.0)
    with db.begin() as conn:
        space = registry.all_spaces(conn)[0]
    result = context.engine_for(space).embed(texts, kind="document", on_long=space.spec.long_text.policy, urgent=True)
    answered = shorten(result.vectors, space.spec.dimensions, normalize=space.spec.normalize)
    assert np.abs(stored.vectors - answered).max() <= 1e-6
    assert stored.tokens.tolist() == result.n_tokens.tolist()
    assert stored.truncated.tolist() == result.truncated.tolist() == [False, True, False, False]
