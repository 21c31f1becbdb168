"""Hidden collections: nobody lists or searches them, and they have no serving index and no view.

Each holds the chunks of one served batch, and has its name. ``chunkmill.ledger.dropping`` deletes what a drop leaves.
"""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.spaces.registry import Space


def create(conn: sa.Connection, name: str, space: Space) -> None:
    """Create the hidden collection of this name, unless it is there already."""
    insert = """
        INSERT INTO collections (name, space_id, is_hidden)
        VALUES (:name, :space, true)
        ON CONFLICT (name) DO NOTHING
    """
    conn.execute(sa.text(insert), {"name": name, "space": space.id})


def lock(conn: sa.Connection, name: str) -> int | None:
    """The id of the hidden collection, whose row is locked until the end of this transaction; None if there is none.

    Nobody opens a job in it meanwhile.
    """
    query = """
        SELECT id
        FROM collections
        WHERE name = :name AND is_hidden AND dropped_at IS NULL
        FOR NO KEY UPDATE
    """
    collection_id: int | None = conn.execute(sa.text(query), {"name": name}).scalar_one_or_none()
    return collection_id


def drop(conn: sa.Connection, name: str) -> None:
    """Let nobody find the hidden collection any more. A poller deletes what is in it."""
    update = "UPDATE collections SET dropped_at = now() WHERE name = :name AND is_hidden AND dropped_at IS NULL"
    conn.execute(sa.text(update), {"name": name})
