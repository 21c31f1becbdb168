"""Collections: named sets of chunks, each with one active space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.db.locks import NAMES_LOCK, lock
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import JobState
from chunkmill.errors import InvalidInput, NotFound, SpaceMismatch, StoreUnavailable
from chunkmill.spaces import others, registry
from chunkmill.spaces.registry import Space


@dataclass(frozen=True, slots=True)
class Collection:
    """A row of ``collections``. ``name`` is its own name, also if it was found by an alias."""

    id: int
    name: str
    space_id: int


IS_KEPT = "to_jsonb(k) ->> 'dropped_at' IS NULL AND to_jsonb(k) ->> 'is_hidden' IS DISTINCT FROM 'true'"
"""Whether people may see the collection ``k``. A statement that forgot a part of it would show what was dropped, or the
inputs of somebody's batch. The columns are read in this way because the schema of the last release has none of them."""


def resolve(conn: sa.Connection, name: str, *, is_hidden: bool = False) -> Collection | None:
    """The collection that has this name or this alias. This is the one place that reads names.

    Hidden collections are not found, unless ``is_hidden`` asks for one of them.
    """
    hidden = """
        SELECT k.id, k.name, k.space_id
        FROM collections k
        WHERE k.name = :name AND k.is_hidden AND k.dropped_at IS NULL
    """
    of_name = f"""
        SELECT k.id, k.name, k.space_id
        FROM collections k
        WHERE k.name = :name AND {IS_KEPT}
    """
    of_alias = f"""
        SELECT k.id, k.name, k.space_id
        FROM collection_aliases a
        JOIN collections k ON k.id = a.collection_id
        WHERE a.name = :name AND {IS_KEPT}
    """
    row = conn.execute(sa.text(hidden if is_hidden else of_name), {"name": name}).one_or_none()
    if row is None and not is_hidden and have_lives(conn):
        row = conn.execute(sa.text(of_alias), {"name": name}).one_or_none()
    return Collection(row.id, row.name, row.space_id) if row else None


def find(conn: sa.Connection, name: str) -> Collection:
    """The collection that has this name or this alias. Raises :class:`NotFound`."""
    collection = resolve(conn, name)
    if collection is None:
        raise not_found(name)
    return collection


def not_found(name: str) -> NotFound:
    """The error about a collection that does not exist, or that somebody may not see."""
    return NotFound(f"there is no collection {name!r}; `chunkmill collections` lists the ones that exist.")


_OF_NAMES = """
SELECT k.id, k.name, k.space_id
FROM collections k
WHERE k.name = ANY(:names) AND k.dropped_at IS NULL
UNION
SELECT k.id, k.name, k.space_id
FROM collection_aliases a
JOIN collections k ON k.id = a.collection_id
WHERE a.name = ANY(:names) AND k.dropped_at IS NULL
"""


def of_names(conn: sa.Connection, names: Sequence[str]) -> list[Collection]:
    """The collections that have these names or aliases. Names that no collection has are ignored."""
    rows = conn.execute(sa.text(_OF_NAMES), {"names": list(names)})
    return [Collection(row.id, row.name, row.space_id) for row in rows]


def all_collections(conn: sa.Connection) -> list[Collection]:
    """All collections, by name."""
    query = f"""
        SELECT k.id, k.name, k.space_id
        FROM collections k
        WHERE {IS_KEPT}
        ORDER BY k.name
    """
    return [Collection(row.id, row.name, row.space_id) for row in conn.execute(sa.text(query))]


def have_lives(conn: sa.Connection) -> bool:
    """Whether collections can be dropped, renamed and given aliases. False on the schema of the last release."""
    return bool(conn.execute(sa.text("SELECT to_regclass('collection_aliases') IS NOT NULL")).scalar_one())


def require_lives(conn: sa.Connection) -> None:
    """Raise :class:`StoreUnavailable` on the schema of the last release."""
    if not have_lives(conn):
        raise StoreUnavailable(
            "the database cannot drop or rename collections, or give them aliases, yet. Run: chunkmill migrate"
        )


def lock_for_enqueue(conn: sa.Connection, name: str, space: Space, *, is_hidden: bool = False) -> Collection:
    """Create the collection if it is new, lock it until the end of this transaction, and move it into ``space``.

    An enqueue into another one of its spaces is taken as it is: its windows are written for all of them. Raises
    :class:`SpaceMismatch` if it is in another space and may not move. A hidden collection was made before; it
    raises :class:`NotFound` if it was dropped since.
    """
    if is_hidden:
        hidden = """
            SELECT k.id, k.name, k.space_id
            FROM collections k
            WHERE k.name = :name AND k.is_hidden AND k.dropped_at IS NULL
            FOR NO KEY UPDATE
        """
        row = conn.execute(sa.text(hidden), {"name": name}).one_or_none()
        if row is None or row.space_id != space.id:
            raise NotFound(f"the hidden collection {name!r} was dropped.")
        return Collection(row.id, row.name, row.space_id)
    # The lock keeps others from moving or dropping the collection before this call's job can be seen.
    with conn.begin_nested() as savepoint:
        collection = _lock(conn, name)
        if collection is None:
            # Who waited for a drop has locked the row, although it is not found any more. Who holds the lock of names
            # may wait for that row, so that it must be let go before the lock of names is asked for.
            savepoint.rollback()
    if collection is None:
        # From here on no collection and no alias of this name can be made. An insert that meets a conflict would take
        # a number of the sequence with it, and numbers end.
        lock(conn, NAMES_LOCK)
        collection = _lock(conn, name) or _create(conn, name, space)
    if collection.space_id != space.id and not _is_beside(conn, collection, space.id):
        _require_movable(conn, collection, space.spec)
        move = "UPDATE collections SET space_id = :space WHERE id = :id"
        conn.execute(sa.text(move), {"space": space.id, "id": collection.id})
    return Collection(collection.id, collection.name, space.id)


def _lock(conn: sa.Connection, name: str) -> Collection | None:
    of_name = f"""
        SELECT k.id, k.name, k.space_id
        FROM collections k
        WHERE k.name = :name AND {IS_KEPT}
        FOR NO KEY UPDATE
    """
    # The alias too: if it is taken away, or moved, while this waits for the collection, it is not found.
    of_alias = f"""
        SELECT k.id, k.name, k.space_id
        FROM collection_aliases a
        JOIN collections k ON k.id = a.collection_id
        WHERE a.name = :name AND {IS_KEPT}
        FOR NO KEY UPDATE OF k
        FOR SHARE OF a
    """
    row = conn.execute(sa.text(of_name), {"name": name}).one_or_none()
    if row is None and have_lives(conn):
        row = conn.execute(sa.text(of_alias), {"name": name}).one_or_none()
    return Collection(row.id, row.name, row.space_id) if row else None


def _create(conn: sa.Connection, name: str, space: Space) -> Collection:
    # A producer of the last release does not take the lock of names.
    create = """
        INSERT INTO collections (name, space_id)
        VALUES (:name, :space)
        ON CONFLICT (name) DO NOTHING
    """
    conn.execute(sa.text(create), {"name": name, "space": space.id})
    collection = _lock(conn, name)
    if collection is None and have_lives(conn):
        # It was dropped a moment ago, or by a process that has died since.
        free = "SELECT free_dropped_name(id) FROM collections WHERE name = :name AND dropped_at IS NOT NULL"
        conn.execute(sa.text(free), {"name": name})
        conn.execute(sa.text(create), {"name": name, "space": space.id})
        collection = _lock(conn, name)
    if collection is None:
        raise InvalidInput(
            f"the collection cannot be named {name!r}, because the jobs of a dropped collection are listed under this "
            "name. Choose another name, or delete those jobs with `chunkmill prune`."
        )
    return collection


def require_space(conn: sa.Connection, name: str, spec: SpaceSpec) -> None:
    """Raise the :class:`SpaceMismatch` that an enqueue into the collection would raise now. Nothing is changed."""
    collection = resolve(conn, name)
    if collection is None or registry.get(conn, collection.space_id).spec.fingerprint == spec.fingerprint:
        return
    space = registry.find(conn, spec.fingerprint)
    if space is None or not _is_beside(conn, collection, space.id):
        _require_movable(conn, collection, spec)


def _is_beside(conn: sa.Connection, collection: Collection, space_id: int) -> bool:
    """Whether the collection has this space beside the active one: one that is being filled, or the one it left."""
    return space_id in others.of(conn, collection.id).others


def _require_movable(conn: sa.Connection, collection: Collection, to: SpaceSpec) -> None:
    """Raise :class:`SpaceMismatch` unless the collection is empty, has one space, and no job is open in it."""
    if others.of(conn, collection.id).others:
        old = registry.get(conn, collection.space_id).spec
        raise SpaceMismatch(
            f"collection {collection.name!r} is in another space ({_described(old)}) than the one that is asked for "
            f"({_described(to)}), and is being re-embedded or can still be rolled back. Enqueue with the model, "
            "on_long, dimensions and precision of one of its two spaces: what is enqueued reaches both."
        )
    query = """
        SELECT EXISTS (SELECT FROM chunks WHERE collection_id = :id)
            OR EXISTS (SELECT FROM jobs WHERE collection_id = :id AND state IN (:enqueueing, :running))
    """
    parameters = {"id": collection.id, "enqueueing": JobState.ENQUEUEING, "running": JobState.RUNNING}
    if conn.execute(sa.text(query), parameters).scalar_one():
        old = registry.get(conn, collection.space_id).spec
        raise SpaceMismatch(
            f"collection {collection.name!r} holds vectors of another space ({_described(old)}) than the one that is "
            f"asked for ({_described(to)}). Vectors of two spaces cannot be compared: enqueue into another collection, "
            "or with the model, on_long, dimensions and precision of this one, or delete the collection's chunks first."
        )


def _described(spec: SpaceSpec) -> str:
    return f"{spec.model!r}, {spec.dimensions} dimensions, {spec.precision}, long texts: {spec.long_text}"
