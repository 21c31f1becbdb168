"""A space that nothing refers to goes; one in use, or being filled, stays; and a call that is refused makes none."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill import Client
from chunkmill.cli.__main__ import cli
from chunkmill.domain.spaces import Pooling, SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.errors import BudgetExceeded, ChunkmillError, InvalidChunk, InvalidInput, NotFound, SpaceMismatch
from chunkmill.ledger.money import charges
from chunkmill.settings import Settings
from chunkmill.spaces import registry, unused
from tests.conftest import client_for
from tests.integration.hands import Hands
from tests.support.waiting import running, until

CHUNKS = [("a", "text a"), ("b", "text b")]


def spec(name: str = "m", dimensions: int = 8) -> SpaceSpec:
    return SpaceSpec("local", name, f"sha256:{name}", dimensions, 256, Pooling.MEAN, normalize=True)


def register(db: sa.Engine, name: str, days: int = 10) -> registry.Space:
    """Register a space, ``days`` ago."""
    with db.begin() as conn:
        space = registry.register(conn, spec(name))
        update = "UPDATE spaces SET created_at = now() - make_interval(days => :days) WHERE id = :id"
        conn.execute(sa.text(update), {"days": days, "id": space.id})
    return space


def rows(db: sa.Engine, query: str, **parameters: object) -> list[tuple[object, ...]]:
    with db.begin() as conn:
        return [tuple(row) for row in conn.execute(sa.text(query), parameters)]


def models(db: sa.Engine) -> list[object]:
    """The models of the spaces; each space has its table, and each table its space."""
    tables = {name for (name,) in rows(db, "SELECT tablename FROM pg_tables WHERE tablename ~ '^vectors_[0-9]+$'")}
    spaces = rows(db, "SELECT model, 'vectors_' || id FROM spaces ORDER BY id")
    assert {table for _, table in spaces} == tables
    return [model for model, _ in spaces]


def age(db: sa.Engine) -> None:
    with db.begin() as conn:
        for column, table in (("created_at", "spaces"), ("created_at", "contents"), ("finished_at", "jobs")):
            conn.execute(
                sa.text(f"UPDATE {table} SET {column} = now() - interval '10 days' WHERE {column} IS NOT NULL")
            )


def test_prune_drops_the_spaces_that_nothing_refers_to_and_only_those(
    client: Client, hands: Hands, db: sa.Engine
) -> None:
    client.enqueue(CHUNKS, collection="docs")
    client.enqueue(CHUNKS, collection="gone", on_long="split")
    hands.work()
    for name in ("unused", "also unused", "canary"):
        register(db, name)
    register(db, "young", days=1)
    cached = register(db, "cached")
    insert = f"INSERT INTO {cached.table_name} VALUES (sha256('x'), 1, false, array_fill(1::real, '{{8}}')::vector)"
    with db.begin() as conn:
        conn.execute(sa.text(insert))
        conn.execute(sa.text("INSERT INTO contents (content_hash, text) VALUES (sha256('x'), 'x')"))
        canary = """
            INSERT INTO space_canaries (space_id, version, vectors, n_tokens, made_by)
            SELECT id, 1, '', '{}', '{}' FROM spaces WHERE model = 'canary'
        """
        conn.execute(sa.text(canary))
    client.drop_collection("gone")
    mine = models(db)[:2]
    planned = client.prune(5, dry_run=True)
    assert len(planned.spaces) == 3
    assert len(models(db)) == 7
    assert client.prune(5).spaces == planned.spaces
    assert models(db) == [*mine, "young", "cached"]
    with db.begin() as conn:
        conn.execute(sa.text("UPDATE jobs SET finished_at = now() - interval '10 days'"))
        conn.execute(sa.text("UPDATE spaces SET created_at = now() - interval '10 days' WHERE model <> 'young'"))
        conn.execute(sa.text("UPDATE contents SET created_at = now() - interval '10 days'"))
    assert len(client.prune(5).spaces) == 2, "the last job of the dropped collection is gone, and so is the cache"
    assert models(db) == [mine[0], "young"]
    assert client.audit("docs").complete


@pytest.mark.parametrize("user", ["job", "charge", "question", "at a provider", "question at a provider", "collection"])
def test_a_space_that_something_refers_to_stays(client: Client, db: sa.Engine, user: str) -> None:
    space, other = register(db, "used"), register(db, "unused")
    statements = {
        "collection": "INSERT INTO collections (name, space_id) VALUES ('empty', :space)",
        "question": "INSERT INTO embed_requests (space_id, kind, texts) VALUES (:space, 'query', '{a}')",
        "at a provider": "INSERT INTO provider_inputs (space_id, content_hash, chunk_batch_id, attempt, job_id, "
        "n_tokens, sent_tokens, truncated) VALUES (:space, '', 1, 1, 1, 1, 1, false)",
        "question at a provider": "INSERT INTO provider_questions (key, space_id, tokens, until) "
        "VALUES ('', :space, 1, now())",
        "job": "INSERT INTO jobs (collection_id, space_id, state, route, priority, on_long) "
        "SELECT id, :space, 'running', 'local', 1, 'truncate' FROM collections",
    }
    if user == "job":
        with db.begin() as conn:
            conn.execute(
                sa.text("INSERT INTO collections (name, space_id) VALUES ('elsewhere', :space)"), {"space": other.id}
            )
    with db.begin() as conn:
        if user == "charge":
            charges.book(
                conn, route=Route.OPENAI, space_id=space.id, job_id=1, provider_batch_id=1, contents=1, tokens=1, usd=1
            )  # type: ignore[arg-type]
        else:
            conn.execute(sa.text(statements[user]), {"space": space.id})
    client.prune(1)
    assert models(db)[0] == "used"
    with pytest.raises(InvalidInput, match="is not dropped, because"):
        client.drop_space(space.spec.fingerprint)
    assert models(db)[0] == "used"


def test_the_vectors_of_a_space_that_an_open_job_fills_beside_the_collections_own_stay(
    client: Client, hands: Hands, db: sa.Engine
) -> None:
    """As when a collection is embedded anew by another model: its active space is still the old one."""
    job_id = client.enqueue(CHUNKS, collection="docs").id
    hands.work()
    client.enqueue([("x", "text x")], collection="others", on_long="split")
    hands.work()
    with db.begin() as conn:
        other = registry.all_spaces(conn)[1]
        fill = """
            UPDATE jobs SET space_id = :space, state = 'running', finished_at = NULL WHERE id = :job
        """
        conn.execute(sa.text(fill), {"space": other.id, "job": job_id})
    hands.write(other.id, [text for _, text in CHUNKS])
    age(db)
    assert client.cache()[1].unreferenced.rows == 0
    assert client.evict(older_than=1, space=other.spec.fingerprint).total.rows == 0
    client.prune(1)
    assert rows(db, f"SELECT count(*) FROM {other.table_name}") == [(3,)]
    with db.begin() as conn:
        conn.execute(
            sa.text("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = :job"), {"job": job_id}
        )
    assert client.evict(older_than=1, space=other.spec.fingerprint).amounts[other.table_name].rows == 2


def test_an_enqueue_that_is_about_to_use_a_space_keeps_it_or_registers_it_anew(db: sa.Engine) -> None:
    space = register(db, "m")
    with db.connect() as producer, producer.begin():
        held = registry.register_and_hold(producer, space.spec, storage="vector")
        assert unused.drop_all(db, before=datetime.now(UTC), dry_run=False) == []
        assert held.id == space.id
    with db.connect() as dropper:
        transaction = dropper.begin()
        drop = "SELECT drop_unused_space(:space, now(), false)"
        assert dropper.execute(sa.text(drop), {"space": space.id}).scalar_one()

        def enqueue() -> int:
            with db.begin() as conn:
                return registry.register_and_hold(conn, space.spec, storage="vector").id

        with running(enqueue, release=lambda: transaction.is_active and transaction.commit()) as (call,):
            waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            until(lambda: rows(db, waiting) == [(True,)])
            transaction.commit()
        assert call.result() > space.id
    assert models(db) == ["m"]


def test_who_goes_through_all_vector_tables_keeps_each_of_them(db: sa.Engine) -> None:
    register(db, "unused")
    with db.begin() as conn:
        assert len(registry.all_tables(conn)) == 1
        assert unused.drop_all(db, before=datetime.now(UTC), dry_run=False) == []
    assert len(unused.drop_all(db, before=datetime.now(UTC), dry_run=False)) == 1


def test_a_space_is_dropped_by_its_fingerprint_with_what_is_cached_in_it(
    client: Client, hands: Hands, db: sa.Engine, settings: Settings
) -> None:
    client.enqueue(CHUNKS, collection="docs")
    hands.work()
    register(db, "unused")
    cached = register(db, "cached")
    with db.begin() as conn:
        insert = f"INSERT INTO {cached.table_name} VALUES ('', 1, false, array_fill(1::real, '{{8}}')::vector)"
        conn.execute(sa.text(insert))
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}
    refused = CliRunner().invoke(cli, ["models", "drop", cached.spec.fingerprint], env=env)
    assert (refused.exit_code, "pass --yes" in refused.output) == (1, True)
    said = CliRunner().invoke(cli, ["models", "drop", cached.spec.fingerprint[:12], "--yes", "--json"], env=env)
    assert json.loads(said.output) == {"dropped": cached.spec.fingerprint[:12]}
    assert models(db)[1:] == ["unused"]
    with pytest.raises(NotFound):
        client.drop_space(cached.spec.fingerprint)
    with pytest.raises(InvalidInput, match="collection 'docs' is in it"):
        client.drop_space(client.audit("docs").space)
    client.drop_collection("docs")
    with pytest.raises(InvalidInput, match="dropped"):
        client.drop_space(registry_first(db))


def registry_first(db: sa.Engine) -> str:
    with db.begin() as conn:
        return registry.all_spaces(conn)[0].spec.fingerprint


# Calls that are refused


def test_a_call_that_is_refused_registers_no_space(client: Client, db: sa.Engine, settings: Settings) -> None:
    client.enqueue(CHUNKS, collection="docs", idempotency_key="k")
    before = models(db)
    with pytest.raises(SpaceMismatch):
        client.enqueue(CHUNKS, collection="docs", on_long="split")
    with pytest.raises(InvalidInput, match="belongs to job"):
        client.enqueue(CHUNKS, collection="others", on_long="split", idempotency_key="k")
    with pytest.raises(InvalidChunk):
        client.enqueue([("a", "a"), ("b", "")], collection="others", on_long="split")
    with pytest.raises(ChunkmillError):
        client.enqueue(CHUNKS, collection="others", on_long="split", route="openai")
    with pytest.raises(InvalidInput):
        client.enqueue(5, collection="others", on_long="split")  # type: ignore[arg-type]
    with pytest.raises(SpaceMismatch):
        client.estimate(CHUNKS, collection="docs", on_long="split")
    assert client.embed([], dimensions=None).shape == (0, 384)
    assert models(db) == before
    assert [info.name for info in client.collections()] == ["docs"]
    client.enqueue(CHUNKS, collection="others", on_long="split")
    assert len(models(db)) == 2


def test_an_enqueue_over_the_budget_registers_no_space(settings: Settings, db: sa.Engine) -> None:
    poor = Settings.from_env(
        database_url=settings.require_database_url(), redis_url=settings.require_redis_url(), openai_api_key="k",
        openai_base_url="http://127.0.0.1:1/v1", embedding_model="text-embedding-3-small",
        openai_monthly_budget_usd=1.0,
    )  # fmt: skip
    with db.begin() as conn:
        charges.book(conn, route=Route.OPENAI, space_id=99, job_id=1, provider_batch_id=1, contents=1, tokens=1, usd=2)  # type: ignore[arg-type]
    with (
        client_for(poor) as client,
        pytest.raises(BudgetExceeded),
    ):
        client.enqueue(CHUNKS, collection="docs", route="openai")
    assert models(db) == []
