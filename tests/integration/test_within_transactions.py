"""An enqueue inside the producer's own transaction: the job exists if and only if that commits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from chunkmill.client import Client, enqueue, outbox
from chunkmill.client.outbox import Deliverer
from chunkmill.db.connect import create_db
from chunkmill.domain.states import JobState
from chunkmill.errors import ChunkmillError, InvalidChunk, InvalidInput, NotFound, SpaceMismatch, StoreUnavailable
from chunkmill.ledger.jobs import recover
from chunkmill.settings import Settings
from tests.conftest import admin, url_of
from tests.integration.hands import Hands
from tests.support.waiting import until

CHUNKS = [("a", "text a"), ("b", "text b", {"n": 1})]


@pytest.fixture
def own(settings: Settings) -> Iterator[sa.Engine]:
    """The producer's own connections, with a search path of their own."""
    engine = sa.create_engine(settings.require_database_url().partition("?schema")[0])
    with engine.begin() as conn:
        conn.execute(sa.text("CREATE TABLE public.articles (id text PRIMARY KEY)"))
    yield engine
    engine.dispose()


@contextmanager
def session(own: sa.Engine) -> Iterator[orm.Session]:
    with orm.Session(own) as made:
        made.execute(sa.text("INSERT INTO public.articles VALUES ('a')"))
        yield made


@contextmanager
def connection(own: sa.Engine) -> Iterator[sa.Connection]:
    with own.connect() as made:
        yield made


@contextmanager
def driver(own: sa.Engine) -> Iterator[psycopg.Connection]:
    with psycopg.connect(own.url.set(drivername="postgresql").render_as_string(False)) as made:
        yield made


@contextmanager
def driver_that_commits(own: sa.Engine) -> Iterator[psycopg.Connection]:
    """Except in a block of its own."""
    with driver(own) as made:
        made.autocommit = True
        made.execute("BEGIN")
        yield made


KINDS = pytest.mark.parametrize("kind", [session, connection, driver, driver_that_commits])
Kind = Callable[[sa.Engine], "contextmanager[orm.Session]"]


@pytest.fixture
def deliverer(client: Client, db: sa.Engine, settings: Settings) -> Deliverer:
    return Deliverer(db, settings, client._ring)


def one(db: sa.Engine, query: str) -> object:
    with db.begin() as conn:
        return conn.execute(sa.text(query)).scalar_one()


@KINDS
def test_a_job_exists_if_and_only_if_the_transaction_commits(
    kind: Kind, own: sa.Engine, client: Client, deliverer: Deliverer, hands: Hands
) -> None:
    other = client.enqueue([("o", "text o")], collection="other")
    with kind(own) as taken_back:
        job = client.enqueue(CHUNKS, collection="docs", within=taken_back)
        taken_back.rollback()
    with kind(own) as committed:
        kept = client.enqueue(CHUNKS, collection="docs", within=committed)
        assert kept.id not in (job.id, other.id)
        with pytest.raises(NotFound):
            client.job(kept.id)
        assert deliverer.round() == 0
        committed.commit()
    with pytest.raises(NotFound):
        client.job(job.id)
    waits = client.job(kept.id)
    assert (waits.state, waits.chunks, waits.collection) == (JobState.ENQUEUEING, 2, "docs")
    assert waits == kept
    assert deliverer.round() == 1
    delivered = client.job(kept.id)
    assert (delivered.state, delivered.contents, delivered.new) == (JobState.RUNNING, 2, 2)
    assert [chunk.metadata for chunk in client.get("docs", ["a", "b"])] == [{}, {"n": 1}]
    hands.work()
    assert client.job(kept.id).state is JobState.COMPLETED
    assert client.job(other.id).state is JobState.COMPLETED
    assert deliverer.round() == 0
