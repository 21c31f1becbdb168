"""Old code beside a new schema, new code beside an old one, and a migration while everything runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.db.compatibility import OLDEST_SCHEMA
from chunkmill.db.connect import (
    alembic_config,
    create_db,
    migrate,
    migration_level,
    raw,
    require_migrated,
    schema_level,
)
from chunkmill.db.home import find_home
from chunkmill.embedded import StackStatus
from chunkmill.errors import StoreUnavailable
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.process.lease import LeaseKeeper
from tests.conftest import admin, url_of
from tests.integration.conftest import Runner
from tests.support.installations import install_as_before
from tests.support.release import read, replay
from tests.support.waiting import Call, running, until

RELEASE = Path(__file__).parents[1] / "fixtures" / "release.json.gz"


@pytest.fixture
def old(stack: StackStatus) -> Iterator[str]:
    """The URL of a database as the last release left it."""
    admin(stack, "CREATE DATABASE old_schema")
    url = url_of(stack, "old_schema")
    install_as_before(url, OLDEST_SCHEMA)
    yield url
    admin(stack, "DROP DATABASE old_schema WITH (FORCE)")


@pytest.fixture
def beside(old: str, settings: Settings, engines: Engines) -> Iterator[Runner]:
    """This code's producer and worker on that database."""
    own = settings.model_copy(update={"database_url": old, "chunk_batch_size": 4})
    db = create_db(old, role="worker")
    client = Client(create_db(old, role="client"), Broker.connect(own), own)
    yield Runner(WorkerContext(own, db, engines, LeaseKeeper(db, 30), name="new-worker"), client)
    client.close()
    db.dispose()


@pytest.fixture
def recorded(old: str) -> dict[str, Any]:
    """What the last release said to Postgres. It made tables with words that Postgres 15 does not know."""
    db = create_db(old, role="test")
    with db.connect() as conn:
        version = int(conn.execute(sa.text("SHOW server_version_num")).scalar_one())
    db.dispose()
    if version < 160_000:
        pytest.skip("the last release could not run on Postgres 15, so no producer or worker of it is beside this code")
    return read(RELEASE)


def test_the_last_releases_statements_meet_the_same_rows_on_this_schema(
    settings: Settings, old: str, recorded: dict[str, Any]
) -> None:
    """Enqueue, claim, write, complete, retry, cancel, take back, search, delete: as release 0005 said it.

    They name no schema, so the installation must have stayed where that release made it.
    """
    migrate(old)
    assert recorded["release"] == OLDEST_SCHEMA, (
        "the recording is of another release than the code allows beside itself"
    )
    assert len(recorded["events"]) > 300
    assert replay(recorded["events"], old.replace("+psycopg", "")) == []
    own = settings.model_copy(update={"database_url": old})
    with Client(create_db(old, role="client"), Broker.connect(own), own) as client:
        assert [str(job.state) for job in client.jobs()] == recorded["states"]
        assert client.audit("docs").complete
        vector = client.vectors("docs", ["c0"])["c0"]
        assert client.search(vector, collection="docs", k=1)[0].chunk_id == "c0"


def test_what_a_statement_misses_is_found(old: str, recorded: dict[str, Any]) -> None:
    """The replay is no use unless a schema that breaks the old code fails it."""
    migrate(old)
    db = create_db(old, role="test")
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE chunk_batches RENAME COLUMN deaths TO died"))
    db.dispose()
    with pytest.raises(Exception, match="deaths"):
        replay(recorded["events"], old.replace("+psycopg", ""))


def test_new_code_runs_on_the_last_releases_schema(beside: Runner, old: str) -> None:
    client = beside.client
    require_migrated(beside.context.db)
    job = client.enqueue([(f"c{i}", f"text {i}") for i in range(10)], collection="docs")
    poller = Poller(beside.context.db, client._broker, beside.context.settings)
    poller.round()
    assert beside.finish(job).state == "completed"
    again = client.enqueue([("c0", "another"), ("c1", "text 1")], collection="docs")
    client.cancel(again.id)
    client.retry(again.id)
    assert beside.finish(again).state == "completed"
    poller.round()
    assert client.audit("docs").complete
    vector = client.vectors("docs", ["c1"])["c1"]
    assert client.search(vector, collection="docs", k=1)[0].chunk_id == "c1"
    assert client.delete("docs", ["c2"]) == 1
    client.explain(job.id), client.usage(), client.lanes(), client.attempts(job.id), client.dead()
    with pytest.raises(StoreUnavailable, match=r"at migration 0005.*chunkmill migrate"):
        client.prune()


def test_an_older_schema_and_a_newer_one_are_told_apart(old: str) -> None:
    db = create_db(old, role="test")

    def at(revision: str, oldest_code: str | None = None) -> None:
        with db.begin() as conn:
            table = find_home(raw(conn)).version_table  # type: ignore[union-attr]
            conn.execute(sa.text(f"UPDATE {table} SET version_num = :to"), {"to": revision})
            if oldest_code:
                conn.execute(sa.text("UPDATE schema_compatibility SET oldest_code = :code"), {"code": oldest_code})

    require_migrated(db)
    at("0004")
    with pytest.raises(StoreUnavailable, match=r"at migration 0004.*\(or 0005.*chunkmill migrate"):
        require_migrated(db)
    at("0005")
    migrate(old)
    require_migrated(db)
    with db.connect() as conn:
        _, head = migration_level(conn)
    at("9000", head)
    require_migrated(db)
    at("9001", "9000")
    with pytest.raises(
        StoreUnavailable, match=rf"of 9000 or later beside it, and this code is of {head}. Upgrade this process"
    ):
        require_migrated(db)
    db.dispose()


def test_each_migration_says_which_code_may_run_on_it(old: str) -> None:
    migrate(old)
    db = create_db(old, role="test", pool_size=1)
    config = alembic_config(old)
    said = set()
    with db.begin() as conn:
        known = schema_level(conn).known
    # From the newest back to 0006, which brought the table.
    for revision in reversed(known[known.index("0006") :]):
        command.downgrade(config, revision)
        with db.begin() as conn:
            oldest = conn.execute(sa.text("SELECT oldest_code FROM schema_compatibility")).scalars().all()
        assert len(oldest) == 1
        assert oldest[0] in known
        said.add(oldest[0])
    assert said <= set(known[known.index(OLDEST_SCHEMA) :])
    db.dispose()


def test_every_new_migration_states_it() -> None:
    for file in sorted((Path(__file__).parents[2] / "alembic" / "versions").glob("0*.py")):
        if file.name >= "0006":
            assert re.search(r'^oldest_code = "\d{4}"$', file.read_text(), re.MULTILINE), file.name


def test_a_migration_under_load_loses_nothing(beside: Runner, old: str) -> None:
    """Producers enqueue and workers embed while the schema goes up and, their connections kept, on with the new one."""
    client, context = beside.client, beside.context
    migrated = threading.Event()

    def produce() -> int:
        turn = 0
        while turn < 6 or not migrated.is_set():
            client.enqueue([(f"c{turn}-{i}", f"text {turn} {i}") for i in range(12)], collection="docs")
            turn += 1
        client.enqueue([("last", "after it")], collection="docs")
        return turn

    def embed(producing: Call) -> None:
        while producing.is_alive() or beside.due():
            beside.run_due()

    with running(produce, release=migrated.set) as (producing,), running(partial(embed, producing)):
        try:
            # Not before some is done and more is open.
            until(lambda: not producing.is_alive() or (beside.due() and client.jobs() and client.vectors("docs")))
            assert producing.is_alive(), producing.result()
            migrate(old)
        finally:
            migrated.set()
        turns = producing.result()
    with context.db.begin() as conn:
        current, head = migration_level(conn)
    assert current == head
    audit = client.audit("docs")
    assert (audit.complete, audit.chunks) == (True, 12 * turns + 1)
    assert {str(job.state) for job in client.jobs(1000)} == {"completed"}
    assert np.isfinite(client.vectors("docs", ["last"])["last"]).all()
