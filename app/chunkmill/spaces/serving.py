"""The spaces of a collection that answer its searches: the active one, and others while it is on its way to another."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakSet

import psycopg
import sqlalchemy as sa

from chunkmill.domain.reembedding import SpaceRole
from chunkmill.domain.sessions import percent_of
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.spaces import collections, registry
from chunkmill.spaces.collections import IS_KEPT, Collection
from chunkmill.spaces.others import ARE_KEPT
from chunkmill.spaces.registry import Space

ACTIVE = "active"
"""The word for the active space, beside those of :class:`SpaceRole`."""


@dataclass(frozen=True, slots=True)
class OtherSpace:
    """A space of a collection beside the active one."""

    space: Space
    role: SpaceRole
    share: int
    """Of how many percent of the sessions it answers the searches."""
    reembedding_id: int


@dataclass(frozen=True, slots=True)
class ServedCollection:
    """A collection and the spaces that can answer its searches."""

    id: int
    name: str
    active: Space
    others: tuple[OtherSpace, ...] = ()

    @property
    def active_share(self) -> int:
        """Of how many percent of the sessions the active space answers the searches."""
        return max(0, 100 - sum(other.share for other in self.others))

    def collection_in(self, space: Space) -> Collection:
        """The collection as if ``space`` was its only one."""
        return Collection(self.id, self.name, space.id)

    def of_session(self, session: str) -> Space:
        """The space that answers a session: always the same one while the shares stay."""
        for other in self.others:
            if percent_of(session, other.reembedding_id) < other.share:
                return other.space
        return self.active

    def named(self, name: str) -> Space:
        """The space of this name: ``active``, ``filling`` or ``previous``, a model, or the beginning of a fingerprint.

        Raises :class:`NotFound` if the collection has none, and :class:`InvalidInput` if it has several.
        """
        spaces = {ACTIVE: self.active} | {other.role.value: other.space for other in self.others}
        if name in spaces:
            return spaces[name]
        every = [self.active, *(other.space for other in self.others)]
        meant = [space for space in every if space.spec.model == name]
        if not meant and len(name) >= LEAST_PREFIX:
            meant = [space for space in every if space.spec.fingerprint.startswith(name)]
        if len(meant) == 1:
            return meant[0]
        listed = ", ".join(
            f"{role} ({space.spec.model!r}, fingerprint {space.spec.fingerprint[:12]})"
            for role, space in spaces.items()
        )
        if meant:
            raise InvalidInput(
                f"space is {name!r}, which several spaces of collection {self.name!r} match: {listed}. Give the role "
                "or the fingerprint of one."
            )
        raise NotFound(f"collection {self.name!r} has no space {name[:200]!r}. It has these: {listed}.")

    def before(self, space: Space) -> Space | None:
        """The space that the collection had before this one: that of all searches before a ramp or before a flip."""
        if space.id != self.active.id:
            return self.active
        return next((other.space for other in self.others if other.role is SpaceRole.PREVIOUS), None)


LEAST_PREFIX = 4
"""How many characters of a fingerprint a caller must give at least."""
_with_others: WeakSet[sa.Engine] = WeakSet()
"""The databases whose schema is known to have other spaces."""


def _query(*, is_known: bool, alias: bool) -> sa.TextClause:
    """The statement of :func:`_rows`. The schema of the last release has no other spaces, and an alias is read only if
    no collection has the name."""
    others = """UNION ALL
            SELECT o.space_id, o.role, o.share, o.reembedding_id
            FROM collection_spaces o
            WHERE o.collection_id = k.id AND o.space_id <> k.space_id"""
    of_name = "k.name = :name"
    if alias:
        of_name = "k.id = (SELECT a.collection_id FROM collection_aliases a WHERE a.name = :name)"
    return sa.text(f"""
        SELECT k.id AS collection_id, k.name, s.id, s.fingerprint, s.spec, s.storage, o.role, o.share, o.reembedding_id,
               {ARE_KEPT} AS may_have_others
        FROM collections k
        CROSS JOIN LATERAL (
            SELECT k.space_id AS id, NULL AS role, 0 AS share, 0::bigint AS reembedding_id
            {others if is_known else ""}
        ) o
        JOIN spaces s ON s.id = o.id
        WHERE {of_name} AND {IS_KEPT}
        ORDER BY o.role IS NOT NULL, o.reembedding_id DESC, s.id
    """)


# Each search runs one of them, and SQLAlchemy takes some time to read such a text.
_QUERIES = {
    (is_known, alias): _query(is_known=is_known, alias=alias) for is_known in (False, True) for alias in (False, True)
}


def find(conn: sa.Connection, name: str) -> ServedCollection:
    """The collection that has this name or this alias, and its spaces, in one statement. Raises :class:`NotFound`."""
    rows = _rows(conn, name, alias=False)
    if not rows and collections.have_lives(conn):
        rows = _rows(conn, name, alias=True)
    if not rows:
        raise collections.not_found(name)
    active = registry.from_row(rows[0])
    others = (
        OtherSpace(space, SpaceRole(row.role), row.share, row.reembedding_id)
        for row in rows[1:]
        if (space := registry.from_row_if_readable(row))
    )
    return ServedCollection(rows[0].collection_id, rows[0].name, active, tuple(others))


def _rows(conn: sa.Connection, name: str, *, alias: bool) -> list[sa.Row[tuple[object, ...]]]:
    """The active space and then the others, if there is such a collection."""
    is_known = conn.engine in _with_others
    try:
        rows = list(conn.execute(_QUERIES[is_known, alias], {"name": name}).all())
    except sa.exc.ProgrammingError as error:
        if isinstance(error.orig, psycopg.errors.UndefinedTable):
            _with_others.discard(conn.engine)  # the schema was downgraded since
        raise
    if rows and not is_known and rows[0].may_have_others:
        _with_others.add(conn.engine)
        return _rows(conn, name, alias=alias)
    return rows


def is_served(conn: sa.Connection) -> str:
    """A condition in SQL: whether the space ``:space`` is one of the collection's, ``:collection``."""
    is_other = "EXISTS (SELECT FROM collection_spaces o WHERE o.collection_id = k.id AND o.space_id = :space)"
    return f"""EXISTS (
                   SELECT FROM collections k
                   WHERE k.id = :collection
                     AND (k.space_id = :space OR {is_other if conn.engine in _with_others else "false"}))"""
