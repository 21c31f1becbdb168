"""A client that lives in one event loop: the loop looks into the store and asks workers, and threads do the rest."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from chunkmill import AsyncClient, Client, WaitTimeout
from chunkmill.broker import Broker
from chunkmill.client.asking.lookups import Lookups
from chunkmill.client.asking.sockets import sockets_of
from chunkmill.db.connect import create_db
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.embedded import EmbeddedTexts
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.integration.conftest import count
from tests.integration.test_worker_sockets import Start
from tests.integration.test_worker_sockets import folder as folder
from tests.integration.test_worker_sockets import start as start
from tests.support.askers import DIMENSIONS, answering, vector_of
from tests.support.waiting import PATIENCE

LONG = 3 * PATIENCE
Embed = Callable[..., Awaitable[EmbeddedTexts]]


@pytest.fixture
def specs(client: Client, db: sa.Engine) -> list[SpaceSpec]:
    """Two spaces of one size. Each has a vector of "text 1", and of "text 2" one that no worker makes."""
    spec = client._space(None, OnLong.TRUNCATE).spec
    other = SpaceSpec("local", "org/other", "b" * 64, DIMENSIONS, spec.max_tokens, spec.pooling, spec.normalize)
    with db.begin() as conn:
        for number, one in enumerate((spec, other)):
            space = registry.register(conn, one)
            for text, place in (("text 1", 1), ("text 2", 200 + number)):
                insert = f"""
                    INSERT INTO {space.table_name} (content_hash, embedding, n_tokens, truncated)
                    VALUES (:hash, :vector, :tokens, :is_cut)
                """
                vector = str(vector_of(f"text {place}").tolist())
                stored = {"hash": content_hash(text), "vector": vector, "tokens": 7 + number, "is_cut": bool(number)}
                conn.execute(sa.text(insert), stored)
    return [spec, other]


def in_loop(settings: Settings, work: Callable[[AsyncClient, Embed], Awaitable[None]]) -> None:
    """Run ``work`` with a client that lives in the loop and whose connection for look-ups is open."""

    async def run() -> None:
        db = create_db(settings.require_database_url(), role="client")
        async with AsyncClient(Client(db, Broker.connect(settings), settings)) as client:
            client._live_in_loop()

            async def embed(texts: list[str], spec: SpaceSpec, *, timeout: float = LONG) -> EmbeddedTexts:
                return await client._embed_in_loop(texts, spec, kind="document", timeout=timeout, caller="")

            assert client._lookups is not None
            client._lookups._open()
            assert client._lookups._opening is not None
            await client._lookups._opening
            await work(client, embed)

    asyncio.run(run())


def places(embedded: EmbeddedTexts) -> list[int]:
    return [int(place) for place in embedded.vectors.argmax(axis=1)]


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many calls each statement looked for."""
    sizes: list[int] = []
    send = Lookups._send

    def counted(self: Lookups, pgconn: object) -> None:
        send(self, pgconn)  # type: ignore[arg-type]
        sizes.append(len(self._under_way))

    monkeypatch.setattr(Lookups, "_send", counted)
    yield sizes


def test_calls_that_wait_are_looked_for_in_one_statement_and_each_gets_its_own(
    settings: Settings, specs: list[SpaceSpec], db: sa.Engine, statements: list[int]
) -> None:
    async def work(_: AsyncClient, embed: Embed) -> None:
        for spec in specs:  # a process looks for its spaces once
            await embed(["text 1"], spec)
        statements.clear()
        texts = [["text 1"], ["text 2"], ["text 2", "text 1", "text 2"], ["text 2"], ["text 1"]]
        first = await asyncio.gather(*(embed(text, specs[0]) for text in texts))
        assert [places(made) for made in first] == [[1], [200], [200, 1, 200], [200], [1]]
        assert statements == [1, 4]
        statements.clear()
        both = await asyncio.gather(*(embed(["text 2"], specs[n % 2]) for n in range(6)))
        assert [places(made) for made in both] == [[200], [201]] * 3
        assert [(made.tokens.tolist(), made.truncated.tolist()) for made in both[:2]] == [([7], [False]), ([8], [True])]
        assert sorted(statements) == [1, 2, 3]

    in_loop(settings, work)
    assert count(db, "embed_requests") == 0


def test_what_is_not_stored_is_asked_of_workers_and_only_that(
    settings: Settings, specs: list[SpaceSpec], db: sa.Engine
) -> None:
    async def work(_: AsyncClient, embed: Embed) -> None:
        assert places(await embed(["text 2", "text 9", "text 1"], specs[0])) == [200, 9, 1]

    with answering(db) as answerer:
        in_loop(settings, work)
    assert [list(request.texts) for request in answerer.answered] == [["text 9"]]


def test_a_connection_that_is_lost_costs_no_answer_and_is_opened_again(
    settings: Settings, specs: list[SpaceSpec], db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkmill.client.asking.lookups.AGAIN_SECONDS", 0.0)

    async def work(client: AsyncClient, embed: Embed) -> None:
        lookups = client._lookups
        assert lookups is not None
        assert lookups._connection is not None
        gone = lookups._connection.info.backend_pid
        with db.begin() as conn:
            conn.execute(sa.text("SELECT pg_terminate_backend(:pid, 30000)"), {"pid": gone})
        made = await asyncio.gather(*(embed(["text 2"], specs[0]) for _ in range(3)))
        assert [places(vectors) for vectors in made] == [[200]] * 3
        while lookups._connection is None or lookups._connection.info.backend_pid == gone:
            assert places(await embed(["text 2"], specs[0])) == [200]

    in_loop(settings, work)


def test_a_connection_that_hangs_is_given_up(
    settings: Settings, specs: list[SpaceSpec], db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkmill.client.asking.inquiry.LOOK_SECONDS", 0.2)

    async def work(client: AsyncClient, embed: Embed) -> None:
        assert client._lookups is not None
        monkeypatch.setattr(client._lookups, "_answer", lambda: None)  # nothing comes of the statement
        made = await asyncio.gather(*(embed(["text 2"], specs[0]) for _ in range(2)))
        assert [places(vectors) for vectors in made] == [[200]] * 2

    in_loop(settings, work)


def test_a_space_that_was_dropped_is_registered_anew(settings: Settings, specs: list[SpaceSpec], db: sa.Engine) -> None:
    async def work(_: AsyncClient, embed: Embed) -> None:
        assert places(await embed(["text 2"], specs[1])) == [201]
        with db.begin() as conn:
            space = registry.find(conn, specs[1].fingerprint)
            assert space is not None
            conn.execute(sa.text(f"DROP TABLE {space.table_name}"))
            conn.execute(sa.text("DELETE FROM spaces WHERE id = :id"), {"id": space.id})
        assert places(await embed(["text 2"], specs[1])) == [2]

    with answering(db):
        in_loop(settings, work)


def test_workers_are_asked_at_their_sockets_by_the_loop_and_left_when_they_die(
    settings: Settings, specs: list[SpaceSpec], db: sa.Engine, start: Start, folder: Path
) -> None:
    worker = start(db)

    async def connected(client: AsyncClient) -> None:
        reached = sockets_of(client._client._db)
        while reached.ready != ["one:1"]:
            reached._read_at = None
            await asyncio.to_thread(reached.refresh, client._client._transaction)

    async def work(client: AsyncClient, embed: Embed) -> None:
        await connected(client)
        made = await asyncio.gather(*(embed([f"text {n}"], specs[0]) for n in range(3, 20)))
        assert [places(vectors) for vectors in made] == [[n] for n in range(3, 20)]
        assert "chunkmill-sockets" not in {thread.name for thread in threading.enumerate()}
        assert count(db, "embed_requests") == 0
        worker.holds = True
        n_asked = len(worker.asked)
        left = asyncio.create_task(embed(["text 33"], specs[0]))
        given_up = asyncio.create_task(embed(["text 34"], specs[0]))
        while len(worker.asked) < n_asked + 2:
            await asyncio.sleep(0.01)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        while any(asked.is_wanted() for asked in worker.asked if list(asked.texts) == ["text 34"]):
            await asyncio.sleep(0.01)
        worker.dies()
        assert places(await left) == [33]
        assert sockets_of(client._client._db).ready == []

    with answering(db) as answerer:
        in_loop(settings, work)
    assert [(list(request.texts), request.attempt) for request in answerer.answered] == [(["text 33"], 2)]


def test_what_nobody_answers_in_time_is_withdrawn(settings: Settings, specs: list[SpaceSpec], db: sa.Engine) -> None:
    async def work(_: AsyncClient, embed: Embed) -> None:
        with pytest.raises(WaitTimeout):
            await embed(["text 9"], specs[0], timeout=0.1)

    in_loop(settings, work)
    assert count(db, "embed_requests") == 0
