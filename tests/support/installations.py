"""Installations as earlier releases made them."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.db.connect import create_db, migrate


def in_schema(url: str, schema: str) -> str:
    """The URL with the schema that DATABASE_SCHEMA would name."""
    return sa.make_url(url).update_query_dict({"schema": schema}).render_as_string(hide_password=False)


def install_as_before(url: str, revision: str = "head", schema: str = "public") -> None:
    """Migrate as releases did that had no schema of their own: the tables are in ``public``, beside anything else, and
    the migration is in ``alembic_version``."""
    there = in_schema(url, schema)
    migrate(there, revision)
    db = create_db(there, role="test", pool_size=1)
    with db.begin() as conn:
        conn.execute(sa.text("ALTER TABLE chunkmill_alembic_version RENAME TO alembic_version"))
        conn.execute(sa.text("ALTER INDEX chunkmill_alembic_version_pkc RENAME TO alembic_version_pkc"))
    db.dispose()
