from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory

from chunkmill.db.connect import alembic_config, create_db, known_revisions, migrate, migration_level, require_migrated
from chunkmill.domain.serving import BuilderKind, SegmentKind
from chunkmill.domain.spaces import Pooling, SpaceSpec
from chunkmill.embedded import StackStatus
from chunkmill.errors import StoreUnavailable
from chunkmill.spaces import canaries, registry
from chunkmill.spaces.canaries import Canary, Maker
from chunkmill.store import keywords, segments
from chunkmill.store.indexing import index_metadata
from tests.conftest import admin, url_of
from tests.support.installations import install_as_before

SPEC = SpaceSpec("local", "m", "sha256:00", 8, 256, Pooling.MEAN, normalize=True)


@pytest.fixture
def empty(stack: StackStatus) -> Iterator[str]:
    """The URL of a database without any schema."""
    admin(stack, "CREATE DATABASE empty_one")
    yield url_of(stack, "empty_one")
    admin(stack, "DROP DATABASE empty_one WITH (FORCE)")


def tables(db: sa.Engine) -> set[str]:
    return set(sa.inspect(db).get_table_names())


def test_the_numbers_of_the_files_are_alembics_order() -> None:
    scripts = ScriptDirectory.from_config(alembic_config(""))
    assert known_revisions() == [script.revision for script in reversed(list(scripts.walk_revisions()))]


def test_up_down_up_and_no_drift(empty: str) -> None:
    config = alembic_config(empty)
    db = create_db(empty, role="test")
    migrate(empty)
    with db.begin() as conn:
        current, head = migration_level(conn)
        assert current == head
        space = registry.register(conn, SPEC)
    command.check(config)  # raises when the models and the migrations say different things
    assert space.table_name in tables(db)
    index_metadata(db)
    with db.begin() as conn:
        conn.execute(sa.text("SELECT watch_collection(1, :space)"), {"space": space.id})
        segments.create(conn, 1, space, SegmentKind.HNSW, BuilderKind.MERGE)
        insert = "INSERT INTO collections (name, space_id) VALUES ('docs', :space) RETURNING id"
        collection = conn.execute(sa.text(insert), {"space": space.id}).scalar_one()
        keywords.create(conn, collection, "english")
    command.check(config)  # nor does what `chunkmill index` and `chunkmill keywords` make differ from the models
    command.downgrade(config, "base")
    assert tables(db) == {"chunkmill_alembic_version"}
    migrate(empty)
    command.check(config)
    assert "chunk_batches" in tables(db)
    db.dispose()


def test_the_canarys_table_joins_a_database_in_use_and_leaves_it(empty: str) -> None:
    """While a job is being enqueued into a space that is already there."""
    migrate(empty, "0001")
    db = create_db(empty, role="test")
    with db.begin() as conn:
        space = registry.register(conn, SPEC)
    with db.connect() as in_use:
        collection = sa.text("INSERT INTO collections (name, space_id) VALUES ('docs', :space)")
        in_use.execute(collection, {"space": space.id})
        migrate(empty, "0002")
        in_use.commit()
    golden = Canary(np.ones((2, 8), np.float32), np.array([3, 5], np.int32), Maker("w", "cpu", "float32", {}))
    with db.begin() as conn:
        canaries.find_or_keep(conn, space.id, 1, golden)
    command.downgrade(alembic_config(empty), "0001")
    with db.begin() as conn:
        assert conn.execute(sa.text("SELECT name FROM collections")).scalars().all() == ["docs"]
        assert registry.get(conn, space.id) == space
    db.dispose()


def test_numbers_of_collections_that_enqueues_took_in_vain_are_given_back(empty: str) -> None:
    """Two thousand million enqueues would have used them up."""
    migrate(empty, "0008")
    db = create_db(empty, role="test")
    add = sa.text("INSERT INTO collections (name, space_id) VALUES (:name, :space) RETURNING id")
    with db.begin() as conn:
        space = registry.register(conn, SPEC)
        first = conn.execute(add, {"name": "docs", "space": space.id}).scalar_one()
        conn.execute(sa.text("SELECT setval(pg_get_serial_sequence('collections', 'id'), 2147483647)"))
    migrate(empty)
    with db.begin() as conn:
        assert conn.execute(add, {"name": "other", "space": space.id}).scalar_one() == first + 1
    db.dispose()


def test_a_database_that_is_not_ready_says_what_to_run(empty: str) -> None:
    db = create_db(empty, role="test")
    with pytest.raises(StoreUnavailable, match=r"the database is empty.*chunkmill migrate"):
        require_migrated(db)
    db.dispose()


def test_an_unreachable_database_is_named_without_its_password() -> None:
    db = create_db("postgresql+psycopg://user:hunter2@127.0.0.1:1/nothing", role="test")
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1") as caught:
        require_migrated(db)
    assert "hunter2" not in str(caught.value)


def test_hashes_are_not_compressed_in_vain(db: sa.Engine) -> None:
    with db.begin() as conn:
        storage = conn.execute(
            sa.text(
                "SELECT attstorage FROM pg_attribute WHERE attrelid = 'chunk_batches'::regclass "
                "AND attname = 'content_hashes'"
            )
        ).scalar_one()
    assert storage in (b"e", "e")


@pytest.mark.parametrize(
    ("dimensions", "storage", "strategy"),
    [(384, "vector", "p"), (768, "vector", "p"), (1024, "vector", "e"), (1024, "halfvec", "p"), (3072, "halfvec", "e")],
)
def test_vector_tables_keep_what_fits_a_page_inline(
    db: sa.Engine, dimensions: int, storage: str, strategy: str
) -> None:
    spec = SpaceSpec("local", "m", f"sha256:{dimensions}", dimensions, 256, Pooling.MEAN, normalize=True)
    with db.begin() as conn:
        space = registry.register(conn, spec, storage=storage)
        assert registry.register(conn, spec, storage=storage) == space
        assert registry.get(conn, space.id) == registry.find(conn, spec.fingerprint) == space
        attstorage = conn.execute(
            sa.text(
                "SELECT attstorage::text FROM pg_attribute WHERE attrelid = to_regclass(:t) AND attname = 'embedding'"
            ),
            {"t": space.table_name},
        ).scalar_one()
    assert attstorage == strategy


def test_a_negative_charge_of_an_older_release_becomes_nothing(empty: str) -> None:
    db = create_db(empty, role="test")
    install_as_before(empty, "0009")
    with db.begin() as conn:
        conn.execute(
            sa.text("""
                INSERT INTO charges VALUES
                ('2026-01-01', 'openai', 1, 1, 0, 1, -5, -20),
                ('2026-01-01', 'openai', 2, 2, 0, 2, 6, 30)
            """)
        )
    migrate(empty)
    with db.connect() as conn:
        rows = conn.execute(sa.text("SELECT job_id, contents, tokens, usd FROM charges ORDER BY job_id"))
        assert [tuple(row) for row in rows] == [(1, 1, 0, 0), (2, 2, 6, 30)]
    db.dispose()


def test_exact_money_rewrites_no_table_and_keeps_every_amount(empty: str) -> None:
    """Both tables grow for ever, and a rewrite would keep every worker waiting."""
    db = create_db(empty, role="test")
    install_as_before(empty, "0010")
    with db.begin() as conn:
        conn.execute(
            sa.text("""
                INSERT INTO charges VALUES
                ('2026-01-01', 'openai', 1, 1, 0, 1, 5, 0.0000000001),
                ('2026-02-01', 'openai', 2, 2, 0, 2, 6, 12345678.0000000001)
            """)
        )
        files = sa.text("SELECT pg_relation_filenode(t) FROM unnest(ARRAY['charges', 'adjustments']::regclass[]) t")
        before = conn.execute(files).scalars().all()
    migrate(empty)
    with db.begin() as conn:
        assert conn.execute(files).scalars().all() == before
        conn.execute(sa.text("UPDATE charges SET usd = usd + 0.00000000000001 WHERE job_id = 1"))
        rows = conn.execute(sa.text("SELECT usd FROM charges ORDER BY job_id")).scalars()
        assert list(rows) == [Decimal("0.00000000010001"), Decimal("12345678.0000000001")]
    db.dispose()
