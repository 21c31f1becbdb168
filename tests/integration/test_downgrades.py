"""Each downgrade gives the schema of the migration before, to the last column, and keeps what is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pprint import pformat

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory

from chunkmill.db.connect import alembic_config, create_db, migrate
from chunkmill.domain.spaces import Pooling, SpaceSpec
from chunkmill.embedded import StackStatus
from chunkmill.spaces import registry
from tests.conftest import admin, url_of

SPEC = SpaceSpec("local", "m", "sha256:00", 8, 256, Pooling.MEAN, normalize=True)
REVISIONS = [
    script.revision for script in reversed(list(ScriptDirectory.from_config(alembic_config("")).walk_revisions()))
]

Schema = dict[str, list[tuple[object, ...]]]

OURS = "c.relnamespace = current_schema()::regnamespace AND c.relname NOT LIKE '%alembic_version'"
CATALOGUE = {
    "tables": (
        "SELECT c.relname, c.relkind::text, c.relpersistence::text, c.reloptions FROM pg_class c "
        f"WHERE {OURS} AND c.relkind IN ('r', 'p', 'v', 'm', 'S')"
    ),
    "columns": (
        "SELECT c.relname, row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum), a.attname, "
        "format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text, a.attgenerated::text, "
        "a.attstorage::text, a.attcompression::text, pg_get_expr(d.adbin, d.adrelid) FROM pg_class c "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
        f"LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum WHERE {OURS} AND c.relkind = 'r'"
    ),
    "indexes": (
        "SELECT c.relname, pg_get_indexdef(i.indexrelid), i.indisvalid, i.indisready FROM pg_index i "
        f"JOIN pg_class c ON c.oid = i.indrelid WHERE {OURS}"
    ),
    "constraints": (
        "SELECT c.relname, t.conname, pg_get_constraintdef(t.oid), t.convalidated FROM pg_constraint t "
        f"JOIN pg_class c ON c.oid = t.conrelid WHERE {OURS}"
    ),
    "sequences": (
        "SELECT c.relname, format_type(s.seqtypid, NULL), s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, "
        f"s.seqcycle FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid WHERE {OURS}"
    ),
    "triggers": (
        "SELECT c.relname, pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid "
        f"WHERE {OURS} AND NOT t.tgisinternal"
    ),
    # Those of an extension come and go with it.
    "functions": (
        "SELECT p.oid::regprocedure::text FROM pg_proc p WHERE p.pronamespace = current_schema()::regnamespace "
        "AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')"
    ),
    "types": (
        "SELECT t.typname FROM pg_type t WHERE t.typnamespace = current_schema()::regnamespace AND t.typtype IN "
        "('e', 'd') AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = t.oid AND d.deptype = 'e')"
    ),
}


def schema_of(db: sa.Engine) -> Schema:
    """All that Postgres knows of our tables, except their rows."""
    with db.begin() as conn:
        catalogue = {
            kind: sorted((tuple(row) for row in conn.execute(sa.text(query))), key=repr)
            for kind, query in CATALOGUE.items()
        }
        if ("schema_compatibility", "r", "p", None) in catalogue["tables"]:
            said = conn.execute(sa.text("SELECT oldest_code FROM schema_compatibility"))
            catalogue["what older code may run on it"] = [tuple(row) for row in said]
    return catalogue


def differences(schema: Schema, wanted: Schema) -> dict[str, object]:
    return {
        kind: {
            "too much": [row for row in schema.get(kind, []) if row not in wanted.get(kind, [])],
            "missing": [row for row in wanted.get(kind, []) if row not in schema.get(kind, [])],
        }
        for kind in schema.keys() | wanted.keys()
        if schema.get(kind) != wanted.get(kind)
    }


@pytest.fixture
def empty(stack: StackStatus) -> Iterator[str]:
    """The URL of a database without any schema."""
    admin(stack, "CREATE DATABASE goes_up_and_down")
    yield url_of(stack, "goes_up_and_down")
    admin(stack, "DROP DATABASE goes_up_and_down WITH (FORCE)")


@pytest.fixture
def db(empty: str) -> Iterator[sa.Engine]:
    engine = create_db(empty, role="test")
    yield engine
    engine.dispose()


def test_each_downgrade_gives_the_schema_of_an_upgrade_to_that_step(empty: str, db: sa.Engine) -> None:
    config = alembic_config(empty)
    wanted = {"base": schema_of(db)}
    for revision in REVISIONS:
        migrate(empty, revision)
        wanted[revision] = schema_of(db)
    assert all(differences(wanted[b], wanted[a]) for a, b in zip(wanted, list(wanted)[1:], strict=False))
    wrong = {}
    for revision in reversed(["base", *REVISIONS[:-1]]):
        command.downgrade(config, revision)
        if difference := differences(schema_of(db), wanted[revision]):
            wrong[f"after the downgrade to {revision}"] = difference
    # And what went down step by step goes up again.
    for revision in REVISIONS if not wrong else []:
        migrate(empty, revision)
        if difference := differences(schema_of(db), wanted[revision]):
            wrong[f"after another upgrade to {revision}"] = difference
    assert wrong == {}, pformat(wrong)


def test_a_downgrade_keeps_the_rows_of_the_tables_that_stay(empty: str, db: sa.Engine) -> None:
    """Two collections of two spaces with a job each go from the newest schema to the oldest one and up again."""
    migrate(empty)
    with db.begin() as conn:
        for name, dimensions in (("docs", 8), ("others", 16)):
            space = registry.register(conn, dataclasses.replace(SPEC, dimensions=dimensions))
            conn.execute(sa.text(STORED), {"name": name, "space": space.id})
    before = rows_of(db)
    assert {table: len(rows) for table, rows in before.items()} == dict.fromkeys(KEPT, 2)
    for revision in reversed(REVISIONS[:-1]):
        command.downgrade(alembic_config(empty), revision)
        assert rows_of(db) == before, f"after the downgrade to {revision}"
    migrate(empty)
    assert rows_of(db) == before


STORED = """
WITH collection AS (INSERT INTO collections (name, space_id) VALUES (CAST(:name AS text), :space) RETURNING id),
job AS (INSERT INTO jobs (collection_id, space_id, state, route, priority, on_long, n_chunks)
  SELECT id, :space, 'running', 'local', 1, 'truncate', 1 FROM collection RETURNING id),
content AS (INSERT INTO contents (content_hash, text)
  VALUES (sha256(convert_to(:name, 'UTF8')), 'a text of ' || :name)),
chunk AS (INSERT INTO chunks SELECT collection.id, 'id-' || :name, sha256(convert_to(:name, 'UTF8')), '{"n": 1}', job.id
  FROM collection, job),
batch AS (INSERT INTO chunk_batches (job_id, space_id, state, route, priority, content_hashes, n_contents, max_attempts)
  SELECT id, :space, 'available', 'local', 1, ARRAY[sha256(convert_to(:name, 'UTF8'))], 1, 5 FROM job RETURNING id),
spent AS (INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, contents, tokens,
  engine_seconds) SELECT batch.id, 1, job.id, :space, 'local', 'w', 1, 3, 0.5 FROM batch, job)
INSERT INTO dead_chunks (job_id, chunk_id, content_hash, code, reason)
  SELECT id, 'id-' || :name, sha256(convert_to(:name, 'UTF8')), 'not_finite', 'why' FROM job
"""
KEPT = {
    "spaces": "id, fingerprint, spec",
    "collections": "id, name, space_id",
    "contents": "content_hash, text",
    "chunks": "collection_id, chunk_id, content_hash, metadata, job_id",
    "jobs": "id, collection_id, space_id, state, route, n_chunks",
    "chunk_batches": "id, job_id, space_id, state, route, content_hashes",
    "usage": "chunk_batch_id, attempt, job_id, worker, tokens",
    "dead_chunks": "id, job_id, chunk_id, content_hash, code",
}
"""Of the first migration's tables, the columns that a row is known by."""


def rows_of(db: sa.Engine) -> dict[str, list[tuple[object, ...]]]:
    with db.begin() as conn:
        return {
            table: [tuple(row) for row in conn.execute(sa.text(f"SELECT {columns} FROM {table} ORDER BY 1"))]
            for table, columns in KEPT.items()
        }
