"""Collections: named sets of chunks, each with one active space."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import JobState
from chunkmill.errors import NotFound, SpaceMismatch
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space


@dataclass(frozen=True, slots=True)
class Collection:
    """A row of ``collections``."""

    id: int
    name: str
    space_id: int


def find(conn: sa.Connection, name: str) -> Collection:
    """The collection of this name. Raises :class:`NotFound`."""
    collection = _find(conn, name)
    if collection is None:
        raise NotFound(f"there is no collection {name!r}; `chunkmill audit` lists the ones that exist.")
    return collection


def all_collections(conn: sa.Connection) -> list[Collection]:
    """All collections, by name."""
    rows = conn.execute(sa.text("SELECT id, name, space_id FROM collections ORDER BY name"))
    return [Collection(row.id, row.name, row.space_id) for row in rows]


def lock_for_enqueue(conn: sa.Connection, name: str, space: Space) -> Collection:
    """Create the collection if it is new, lock it until the end of this transaction, and move it into ``space``.

    Raises :class:`SpaceMismatch` if it is in another space and may not move.
    """
    # The lock keeps others from moving the collection to another space before this call's job can be seen.
    lock = sa.text("SELECT id, space_id FROM collections WHERE name = :name FOR NO KEY UPDATE")
    row = conn.execute(lock, {"name": name}).one_or_none()
    if row is None:
        # Only now, because an insert that meets a conflict takes a number of the sequence with it, and numbers end.
        create = """
            INSERT INTO collections (name, space_id)
            VALUES (:name, :space)
            ON CONFLICT (name) DO NOTHING
        """
        conn.execute(sa.text(create), {"name": name, "space": space.id})
        row = conn.execute(lock, {"name": name}).one()
    if row.space_id != space.id:
        _require_movable(conn, Collection(row.id, name, row.space_id), space.spec)
        move = "UPDATE collections SET space_id = :space WHERE id = :id"
        conn.execute(sa.text(move), {"space": space.id, "id": row.id})
    return Collection(row.id, name, space.id)


def require_space(conn: sa.Connection, name: str, spec: SpaceSpec) -> None:
    """Raise the :class:`SpaceMismatch` that an enqueue into the collection would raise now. Nothing is changed."""
    collection = _find(conn, name)
    if collection is not None and registry.get(conn, collection.space_id).spec.fingerprint != spec.fingerprint:
        _require_movable(conn, collection, spec)


def _find(conn: sa.Connection, name: str) -> Collection | None:
    query = "SELECT id, name, space_id FROM collections WHERE name = :name"
    row = conn.execute(sa.text(query), {"name": name}).one_or_none()
    return Collection(row.id, row.name, row.space_id) if row else None


def _require_movable(conn: sa.Connection, collection: Collection, to: SpaceSpec) -> None:
    """Raise :class:`SpaceMismatch` unless the collection is empty and no job is open in it."""
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
