"""The spaces of a collection that answer its searches: the active one, and others while it is on its way to another."""

from __future__ import annotations

import sqlalchemy as sa

ARE_KEPT = "to_regclass('collection_spaces') IS NOT NULL"
"""True in SQL if collections can have other spaces than the active one."""


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of an earlier release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text(f"SELECT {ARE_KEPT}")).scalar_one())
