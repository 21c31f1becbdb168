"""Names of collections: taken away by a drop, changed by a rename, added by an alias.

A name belongs to a collection or to an alias. Each of these functions first takes the lock of names.
``chunkmill.spaces.collections`` reads names, and gives one to a new collection.
"""

from __future__ import annotations

import shlex

import sqlalchemy as sa

from chunkmill.db.locks import NAMES_LOCK, lock
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.spaces import collections
from chunkmill.spaces.collections import Collection

VIEWS = 500
"""How many views one transaction changes, because it can hold only so many locks."""
RENAME_PATIENCE_S = 1
"""How many seconds one try of a rename waits for the windows of producers. No collection can be made meanwhile."""


def drop(conn: sa.Connection, name: str) -> Collection:
    """Let nobody find the collection any more. The rest of the drop is in ``chunkmill.ledger.dropping``.

    Raises :class:`NotFound`, and :class:`InvalidInput` if ``name`` is an alias or the collection has one.
    """
    lock(conn, NAMES_LOCK)
    collection = _own(conn, name, "drop")
    if aliases := aliases_of(conn, collection.id):
        raise InvalidInput(
            f"collection {name!r} is not dropped, because it has the alias {aliases[0]!r}. Move the alias to another "
            f"collection, or remove it first: chunkmill collections unalias {shlex.quote(aliases[0])}"
        )
    # The name stays for a moment, because a change of it has to wait for the windows that producers are writing.
    update = "UPDATE collections SET dropped_at = now() WHERE id = :id"
    conn.execute(sa.text(update), {"id": collection.id})
    return collection


def rename(conn: sa.Connection, name: str, to: str) -> Collection:
    """Give the collection the name ``to``. Raises :class:`NotFound`, and :class:`InvalidInput` if ``to`` is taken.

    The change waits for the windows that producers are writing, and ends with ``lock_not_available`` if they leave no
    moment for it.
    """
    lock(conn, NAMES_LOCK)
    collection = _own(conn, name, "rename")
    if to == name:
        return collection
    _require_free(conn, to)
    conn.execute(sa.text(f"SET LOCAL lock_timeout = '{RENAME_PATIENCE_S}s'"))
    update = "UPDATE collections SET name = :to WHERE id = :id"
    conn.execute(sa.text(update), {"id": collection.id, "to": to})
    return Collection(collection.id, to, collection.space_id)


def set_alias(conn: sa.Connection, alias: str, collection: str) -> Collection:
    """Let ``alias`` be one more name of ``collection``. If it is that of another collection, it moves.

    Whoever resolves the alias gets either the old or the new collection. Returns the new one. Raises
    :class:`NotFound`, and :class:`InvalidInput` if ``alias`` is the name of a collection.
    """
    lock(conn, NAMES_LOCK)
    target = collections.find(conn, collection)
    named = collections.resolve(conn, alias)
    if named is not None and named.name == alias:
        raise InvalidInput(f"{alias!r} is the name of a collection, so it cannot be an alias. Choose another alias.")
    update = """
        INSERT INTO collection_aliases (name, collection_id)
        VALUES (:alias, :id)
        ON CONFLICT (name) DO UPDATE SET collection_id = EXCLUDED.collection_id, created_at = now()
    """
    _free_dropped(conn, alias)
    conn.execute(sa.text(update), {"alias": alias, "id": target.id})
    return target


def remove_alias(conn: sa.Connection, alias: str) -> None:
    """Take an alias away. Raises :class:`NotFound`. The collection stays."""
    lock(conn, NAMES_LOCK)
    deleted = conn.execute(sa.text("DELETE FROM collection_aliases WHERE name = :alias"), {"alias": alias})
    if deleted.rowcount == 0:
        raise NotFound(f"there is no alias {alias!r}; `chunkmill collections` lists the ones that exist.")


def refresh_views(conn: sa.Connection) -> int:
    """Make, replace or drop a slice of the views that are not as they should be. Returns how many were changed."""
    call = "SELECT refresh_collection_views(:most)"
    return int(conn.execute(sa.text(call), {"most": VIEWS}).scalar_one())


def aliases_of(conn: sa.Connection, collection_id: int) -> list[str]:
    """The aliases of a collection, in order."""
    query = "SELECT name FROM collection_aliases WHERE collection_id = :id ORDER BY name"
    return list(conn.execute(sa.text(query), {"id": collection_id}).scalars())


def _own(conn: sa.Connection, name: str, what: str) -> Collection:
    collection = collections.find(conn, name)
    if collection.name != name:
        raise InvalidInput(
            f"{name!r} is an alias of collection {collection.name!r}. To {what} the collection, give its own name."
        )
    return collection


def _require_free(conn: sa.Connection, name: str) -> None:
    taken = collections.resolve(conn, name)
    if taken is not None:
        kind = "a collection" if taken.name == name else f"an alias of collection {taken.name!r}"
        raise InvalidInput(f"the name {name!r} is taken: it is {kind}. Nothing was changed.")
    _free_dropped(conn, name)


def _free_dropped(conn: sa.Connection, name: str) -> None:
    free = "SELECT free_dropped_name(id) FROM collections WHERE name = :name AND dropped_at IS NOT NULL"
    conn.execute(sa.text(free), {"name": name})
