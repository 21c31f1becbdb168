"""Alembic's entry point, run by ``chunkmill migrate`` and by ``alembic`` from the checkout."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from alembic import context

from chunkmill.db import home
from chunkmill.db.connect import create_db, known_revisions, raw, why_not_server
from chunkmill.db.home import VERSION_TABLE, Home
from chunkmill.db.locks import MIGRATION_LOCK
from chunkmill.db.provider_schema import Base
from chunkmill.errors import StoreUnavailable
from chunkmill.settings import Settings

NOT_MIGRATED = {VERSION_TABLE, home.OLD_VERSION_TABLE, "ix_chunks_metadata"}
"""What no migration makes: the version tables, and the index of metadata that ``chunkmill index`` builds."""


def run_offline(schema: str) -> None:
    """Write the migrations as SQL, for psql. Nothing is connected to."""
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # psql would read the doubled % of another style as they stand
        literal_binds=True,
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        version_table_schema=schema,
        transaction_per_migration=True,
        on_version_apply=note_oldest_code,
    )
    if context.get_starting_revision_argument() is None:
        context.execute("CREATE EXTENSION IF NOT EXISTS vector")
        context.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    context.execute(f"SELECT set_config('search_path', '{schema}, ' || current_setting('search_path'), false)")
    with context.begin_transaction():
        context.run_migrations()


def run_online(url: str) -> None:
    db = create_db(url, role="migrate", pool_size=1)
    try:
        with db.connect() as conn:
            lock(conn)
            try:
                upgrade(conn, home.split_schema(url)[1])
            finally:
                conn.rollback()
                conn.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
                conn.commit()
    finally:
        db.dispose()


def lock(conn: sa.Connection) -> None:
    """Let several machines start at once: the later ones wait and find nothing to do.

    They ask, rather than wait inside a statement, whose snapshot would hold up CREATE INDEX CONCURRENTLY for ever.
    """
    ask = sa.text("SELECT pg_try_advisory_lock(:key)")
    while not conn.execute(ask, {"key": MIGRATION_LOCK}).scalar_one():
        conn.commit()
        time.sleep(0.2)
    conn.commit()


def upgrade(conn: sa.Connection, schema: str) -> None:
    """Run the migrations in the schema of the installation, which is made if there is none."""
    if problem := why_not_server(conn):
        raise StoreUnavailable(problem)
    installation = home.find_home(raw(conn))
    if installation is None:
        prepare(conn, schema)
        installation = Home(schema, VERSION_TABLE)
    elif installation.is_old:
        installation = home.take_over(conn, installation, known_revisions())
    home.set_path(raw(conn), installation.schema)
    conn.commit()
    ours = set(sa.inspect(conn).get_table_names(schema=installation.schema))
    conn.commit()

    def note_migration(*, ctx: Any, step: Any, heads: Collection[Any], **_: Any) -> None:
        note_oldest_code(ctx=ctx, step=step)
        for revision in heads:
            home.follow_old_table(ctx.connection, installation, str(revision))

    def is_ours(name: str | None, kind: str, _parents: object) -> bool:
        """Not other programs' tables; nor vector tables, which are made with their space and depend on its model."""
        if kind == "table":
            return name in ours - NOT_MIGRATED and not (name or "").startswith(("vectors_", "segment_", "keywords_"))
        return name not in NOT_MIGRATED

    context.configure(
        conn,
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        version_table_schema=installation.schema,
        include_name=is_ours,
        compare_server_default=True,
        transaction_per_migration=True,
        on_version_apply=note_migration,
    )
    with context.begin_transaction():
        context.run_migrations()
    conn.commit()


def prepare(conn: sa.Connection, schema: str) -> None:
    """Create pgvector's types, where the server's own search path puts them, and the schema."""
    if conn.execute(sa.text("SELECT to_regtype('vector')")).scalar_one() is None:
        # In a schema of Chunkmill's own, other users of the database could not use them.
        conn.execute(sa.text("SET LOCAL search_path TO DEFAULT"))
        create_extension(conn)
        conn.commit()
    if conn.execute(sa.text("SELECT to_regnamespace(:schema)"), {"schema": schema}).scalar_one() is None:
        # IF NOT EXISTS would need the right to create schemas even for a schema that is there.
        conn.execute(sa.text(f'CREATE SCHEMA "{schema}"'))
        conn.commit()


def create_extension(conn: sa.Connection) -> None:
    try:
        conn.execute(sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
    except sa.exc.ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != "42501":
            raise
        conn.rollback()
        who, where = conn.execute(sa.text("SELECT current_user, current_database()")).one()
        raise StoreUnavailable(
            f"pgvector is not in database {where!r}, and the role {who!r} may not create it. Let a superuser, or the "
            "administrator's role of a managed server, run in that database: CREATE EXTENSION vector; and then run "
            "chunkmill migrate again."
        ) from error


def note_oldest_code(*, ctx: Any, step: Any, **_: Any) -> None:
    """In the migration's own transaction: the schema that it leaves says which older code may run on it."""
    scripts = [step.revision_map.get_revision(revision) for revision in step.destination_revision_ids]
    for script in scripts:
        if oldest := getattr(script.module, "oldest_code", None):
            ctx.execute("DELETE FROM schema_compatibility")
            ctx.execute(f"INSERT INTO schema_compatibility VALUES ('{oldest}')")


def run() -> None:
    url = context.config.attributes.get("url")
    if context.is_offline_mode():
        run_offline(home.split_schema(url)[1] if url else Settings.from_env().database_schema)
    else:
        run_online(url or Settings.from_env().require_database_url())


run()
