"""Eviction and the cache's numbers in a database of two spaces, in which nothing of one may count for the other."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from chunkmill import Client, NotFound
from chunkmill.db.connect import alembic_config
from chunkmill.domain.retention import Amount
from chunkmill.models import DEFAULT_SPEC
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.integration.conftest import Runner


def execute(db: sa.Engine, statement: str, **parameters: object) -> list[Any]:
    with db.begin() as conn:
        result = conn.execute(sa.text(statement), parameters)
        return list(result.scalars()) if result.returns_rows else []


@pytest.fixture
def both(runner: Runner) -> Client:
    """A client of a database where two spaces have a vector of the same text, and a collection refers to neither."""
    client = runner.client
    runner.finish(client.enqueue([("a", "shared"), ("b", "of the first")], collection="first"))
    runner.finish(client.enqueue([("a", "shared")], collection="second", on_long="split"))
    client.enqueue([("a", "replaced"), ("b", "of the first")], collection="first")
    client.enqueue([("a", "replaced")], collection="second", on_long="split")
    runner.run_due()
    return client


def test_a_text_that_another_space_has_a_vector_of_is_not_evicted(both: Client, db: sa.Engine) -> None:
    first, _ = both.cache()
    planned = both.evict(older_than=0, space=first.space, dry_run=True)
    assert {table: amount.rows for table, amount in planned.amounts.items()} == {"vectors_1": 1, "contents": 0}
    assert both.evict(older_than=0, space=first.space).amounts == planned.amounts
    assert execute(db, "SELECT text FROM contents ORDER BY text") == ["of the first", "replaced", "shared"]
    # The other space's vector is the last one, and the text goes with it.
    planned = both.evict(older_than=0, dry_run=True)
    assert {table: amount.rows for table, amount in planned.amounts.items()} == {"vectors_2": 1, "contents": 1}
    assert both.evict(older_than=0).amounts == planned.amounts
    assert execute(db, "SELECT text FROM contents ORDER BY text") == ["of the first", "replaced"]


def test_a_text_stays_a_suspect_as_long_as_it_is_stored(both: Client, db: sa.Engine) -> None:
    """Otherwise the provider would be sent it beside other texts again, which it refuses with it."""
    execute(db, "INSERT INTO provider_suspects SELECT 2, content_hash FROM contents WHERE text = 'shared'")
    first, _ = both.cache()
    both.evict(older_than=0, space=first.space)
    assert execute(db, "SELECT space_id FROM provider_suspects") == [2]
    both.evict(older_than=0)
    assert execute(db, "SELECT space_id FROM provider_suspects") == []


def test_each_space_shows_its_own_hits(both: Client) -> None:
    first, second = both.cache()
    assert [(space.contents, space.hits) for space in (first, second)] == [(4, 1), (2, 0)]
    assert [space.unreferenced.rows for space in (first, second)] == [1, 1]
    assert first.unreferenced != Amount() != second.unreferenced


def test_recent_are_the_last_days_that_were_asked_for(both: Client, db: sa.Engine) -> None:
    execute(db, "UPDATE chunk_batches SET created_at = now() - interval '6 days' WHERE id = 1")
    execute(db, "UPDATE chunk_batches SET created_at = now() - interval '8 days' WHERE id = 2")
    assert [space.recent_contents for space in both.cache()] == [4, 1]
    assert [space.recent_contents for space in both.cache(recent=9)] == [4, 2]
    assert [space.recent_contents for space in both.cache(recent=5.9)] == [2, 1]


def test_a_beginning_that_several_fingerprints_have_is_refused(client: Client, db: sa.Engine) -> None:
    with db.begin() as conn:
        for i in range(17):
            registry.register(conn, dataclasses.replace(DEFAULT_SPEC, revision=f"sha256:{i}"))
    digits = Counter(space.space[0] for space in client.cache())
    shared, times = digits.most_common(1)[0]
    assert times > 1  # because there are only 16 digits
    with pytest.raises(NotFound, match="several spaces have"):
        client.evict(older_than=0, space=shared)


def test_a_prune_runs_on_the_schema_that_brought_ages(
    client: Client, runner: Runner, db: sa.Engine, settings: Settings
) -> None:
    """In the middle of an upgrade that goes further."""
    runner.finish(client.enqueue([("a", "one")], collection="docs"))
    runner.finish(client.enqueue([("a", "two")], collection="docs"))
    command.downgrade(alembic_config(settings.require_database_url()), "0006")
    assert client.prune(0).amounts["contents"].rows == 1
    assert client.evict(older_than=0).total.rows == 0
    assert len(client.cache()) == 1
