"""All spaces of a collection: the active one, and those beside it (``collection_spaces``).

Whoever writes for a collection reads them with :func:`hold`, and whoever changes them calls :func:`lock_for_change`
first. On the schema of the last release a collection has its active space alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from chunkmill.db.locks import LIVES_LOCK, lock_of
from chunkmill.domain.reembedding import SpaceRole
from chunkmill.domain.spaces import OnLong

ARE_KEPT = "to_regclass(quote_ident(current_schema()) || '.collection_spaces') IS NOT NULL"
"""True in SQL if collections can have other spaces than the active one. Another installation may have them in a later
schema of the path."""


@dataclass(frozen=True, slots=True)
class OtherSpace:
    """A space of a collection beside the active one."""

    id: int
    role: SpaceRole
    on_long: OnLong
    reembedding_id: int


@dataclass(frozen=True, slots=True)
class Lives:
    """The spaces of one collection at one moment. ``active`` is None if the collection does not exist any more."""

    active: int | None
    others: Mapping[int, OtherSpace] = field(default_factory=dict)

    @property
    def ids(self) -> set[int]:
        """The ids of all of them."""
        return {*self.others, *(() if self.active is None else (self.active,))}


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text(f"SELECT {ARE_KEPT}")).scalar_one())


_WAIT_FOR_CHANGES = sa.text(f"""
SELECT pg_advisory_xact_lock_shared(:key, :id), {ARE_KEPT} AS are_kept
""")
_HOLD = sa.text("""
SELECT k.space_id AS active, o.space_id, o.role, o.on_long, o.reembedding_id
FROM collections k
LEFT JOIN collection_spaces o ON o.collection_id = k.id
WHERE k.id = :id
ORDER BY o.space_id
FOR KEY SHARE OF k
""")
_HOLD_ACTIVE = sa.text("""
SELECT k.space_id AS active, CAST(NULL AS integer) AS space_id
FROM collections k
WHERE k.id = :id
FOR KEY SHARE
""")
_OTHERS = sa.text("""
SELECT space_id, role, on_long, reembedding_id
FROM collection_spaces
WHERE collection_id = :id
ORDER BY space_id
""")


def hold(conn: sa.Connection, collection_id: int) -> Lives:
    """The spaces of a collection, which nobody changes before the end of this transaction.

    It is the first lock of a window, so that a window that waits for a change of the spaces keeps nobody waiting.
    """
    # Two statements: the second one sees what a change has committed for which the first one waited.
    kept = conn.execute(_WAIT_FOR_CHANGES, {"key": LIVES_LOCK, "id": collection_id}).one().are_kept
    # The row's lock too, so that whoever takes that one alone is kept out as well.
    return _read(conn.execute(_HOLD if kept else _HOLD_ACTIVE, {"id": collection_id}).all())


def lock_for_change(conn: sa.Connection, collection_id: int) -> Lives:
    """The spaces of a collection, which this transaction is about to change: no window is under way from here on.

    It waits for the windows that are, and windows that come later wait for it. Producers of the last release take the
    lock of the collection's row alone, and only with their new chunks.
    """
    lock_of(conn, LIVES_LOCK, collection_id)
    query = "SELECT space_id FROM collections WHERE id = :id FOR UPDATE"
    active = conn.execute(sa.text(query), {"id": collection_id}).scalar_one_or_none()
    return Lives(active, _others(conn, collection_id) if are_kept(conn) else {})


_ALL_OF = sa.text("""
SELECT k.space_id AS active, o.space_id, o.role, o.on_long, o.reembedding_id
FROM collections k
LEFT JOIN collection_spaces o ON o.collection_id = k.id
WHERE k.id = :id
ORDER BY o.space_id
""")
_ACTIVE_OF = sa.text("""
SELECT k.space_id AS active, CAST(NULL AS integer) AS space_id
FROM collections k
WHERE k.id = :id
""")


def of(conn: sa.Connection, collection_id: int) -> Lives:
    """The spaces of a collection as they are now, read by one statement and locked by nobody."""
    return _read(conn.execute(_ALL_OF if are_kept(conn) else _ACTIVE_OF, {"id": collection_id}).all())


def _read(rows: Sequence[sa.Row[tuple[object, ...]]]) -> Lives:
    if not rows:
        return Lives(None)
    return Lives(rows[0].active, {row.space_id: _other(row) for row in rows if row.space_id is not None})


_IN_SPACE = sa.text("""
SELECT id FROM collections WHERE space_id = :space
UNION
SELECT collection_id FROM collection_spaces WHERE space_id = :space
""")
_ACTIVE_IN_SPACE = sa.text("""
SELECT id FROM collections WHERE space_id = :space
""")


def collections_in(conn: sa.Connection, space_id: int) -> list[int]:
    """The ids of the collections of which this is a space, in whatever role, also of those that were dropped."""
    query = _IN_SPACE if are_kept(conn) else _ACTIVE_IN_SPACE
    return list(conn.execute(query, {"space": space_id}).scalars())


@dataclass(frozen=True, slots=True)
class Pairs:
    """``(collection, space)`` of all spaces beside the active ones, as two arrays for a statement."""

    collections: Sequence[int]
    spaces: Sequence[int]


def all_others(conn: sa.Connection) -> Pairs:
    """All spaces beside the active ones. They are few: at most one for each collection that is being re-embedded."""
    rows = []
    if are_kept(conn):
        rows = list(conn.execute(sa.text("SELECT collection_id, space_id FROM collection_spaces")))
    return Pairs([row.collection_id for row in rows], [row.space_id for row in rows])


def _others(conn: sa.Connection, collection_id: int) -> dict[int, OtherSpace]:
    return {row.space_id: _other(row) for row in conn.execute(_OTHERS, {"id": collection_id})}


def _other(row: sa.Row[tuple[object, ...]]) -> OtherSpace:
    return OtherSpace(row.space_id, SpaceRole(row.role), OnLong(row.on_long), row.reembedding_id)
