"""Alembic's entry point, run by ``chunkmill migrate`` and by ``alembic`` from the checkout."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from alembic import context

from chunkmill.db.provider_schema import Base
from chunkmill.settings import Settings

MIGRATION_LOCK = 0x63686D00


def is_ours(_object: Any, name: str | None, kind: str, _reflected: bool, _compare_to: Any) -> bool:
    """Vector tables are made when a space is registered; their columns depend on the model."""
    return not (kind == "table" and (name or "").startswith("vectors_"))


def note_oldest_code(ctx: Any, step: Any, **_: Any) -> None:
    """In the migration's own transaction: the schema that it leaves says which older code may run on it."""
    scripts = [step.revision_map.get_revision(revision) for revision in step.destination_revision_ids]
    for script in scripts:
        if oldest := getattr(script.module, "oldest_code", None):
            ctx.connection.execute(sa.text("DELETE FROM schema_compatibility"))
            ctx.connection.execute(sa.text("INSERT INTO schema_compatibility VALUES (:code)"), {"code": oldest})


def run() -> None:
    url = context.config.attributes.get("url") or Settings.from_env().require_database_url()
    with sa.create_engine(url, poolclass=sa.NullPool, hide_parameters=True).connect() as conn:
        context.configure(
            conn,
            target_metadata=Base.metadata,
            include_object=is_ours,
            compare_server_default=True,
            transaction_per_migration=True,
            on_version_apply=note_oldest_code,
        )
        # Several machines may start at once; the later ones wait and find nothing to do. They ask, rather than wait
        # inside a statement, whose snapshot would hold up CREATE INDEX CONCURRENTLY for ever.
        lock = sa.text("SELECT pg_try_advisory_lock(:key)")
        while not conn.execute(lock, {"key": MIGRATION_LOCK}).scalar_one():
            conn.commit()
            time.sleep(0.2)
        conn.commit()
        try:
            with context.begin_transaction():
                context.run_migrations()
            conn.commit()
        finally:
            conn.rollback()
            conn.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
            conn.commit()


run()
