"""Temporary tables that last longer than a transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import sqlalchemy as sa


@contextlib.contextmanager
def dropping(conn: sa.Connection, *tables: str) -> Iterator[None]:
    """Drop temporary ``tables``, if they exist, at the end of the block.

    A temporary table that stays with a pooled connection keeps its disk space, and holds back the age of the whole
    database: autovacuum cannot freeze it, and after two billion transactions Postgres takes no more writes.
    """
    try:
        yield
    finally:
        try:
            conn.rollback()
            with conn.begin():
                for table in tables:
                    conn.execute(sa.text(f"DROP TABLE IF EXISTS pg_temp.{table}"))
        except sa.exc.SQLAlchemyError:
            conn.invalidate()  # the tables last as long as their connection, so the pool must not keep it
