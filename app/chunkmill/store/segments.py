"""Which segments serve a collection, as rows, and the segments themselves, as tables.

On the schema of the last release there are none, and every search is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.domain.results import Index
from chunkmill.domain.serving import BuilderKind, Segment, SegmentKind, SegmentState
from chunkmill.errors import StoreUnavailable
from chunkmill.spaces.registry import Space

ARE_KEPT = "to_regclass(quote_ident(current_schema()) || '.serving_indexes') IS NOT NULL"
"""True in SQL if this installation has serving indexes. It looks only into the installation's own schema, because
another installation may have them in a later schema of the path."""
GRACE_S = 300
"""How many seconds a retired segment stays for searches that began before."""


@dataclass(frozen=True, slots=True)
class ServingIndex:
    """The segments that serve the searches of a collection in a space, together with the tail. Until ``is_ready``, old
    chunks are missing from them.
    """

    is_ready: bool
    segments: tuple[Segment, ...]
    has_lost: bool = False
    """Whether the table of a live segment is gone, as after a backup without them. Such an index is not ready."""

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @property
    def has_graphs(self) -> bool:
        return any(segment.kind is not SegmentKind.FLAT for segment in self.segments)

    @property
    def has_bits(self) -> bool:
        return any(segment.kind is SegmentKind.BITS for segment in self.segments)


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text(f"SELECT {ARE_KEPT}")).scalar_one())


def require_kept(conn: sa.Connection) -> None:
    """Raise :class:`StoreUnavailable` on the schema of the last release."""
    if not are_kept(conn):
        raise StoreUnavailable(
            "the database has no serving indexes yet, and every search is exact. Run: chunkmill migrate"
        )


def find(conn: sa.Connection, collection_id: int, space_id: int) -> ServingIndex | None:
    """The serving index of a collection in a space; None if there is none."""
    index, _ = find_and_tell(conn, collection_id, space_id, ())
    return index


def find_and_tell(
    conn: sa.Connection, collection_id: int, space_id: int, conditions: Sequence[str]
) -> tuple[ServingIndex | None, list[bool]]:
    """:func:`find`, and in the same statement which of ``conditions`` hold; they are SQL on ``:collection`` and
    ``:space``."""
    told = "".join(f", {condition}" for condition in conditions)
    query = f"""
        SELECT i.is_ready, s.id, s.kind, s.n_rows, to_regclass('segment_' || s.id) IS NULL AS is_lost {told}
        FROM (SELECT) one
        LEFT JOIN serving_indexes i ON i.collection_id = :collection AND i.space_id = :space
        LEFT JOIN segments s ON s.collection_id = i.collection_id AND s.space_id = i.space_id AND s.state = :live
        ORDER BY s.id
    """
    parameters = {"collection": collection_id, "space": space_id, "live": SegmentState.LIVE}
    rows = conn.execute(sa.text(query), parameters).all()
    holding = [bool(holds) for holds in rows[0][5:]]
    if rows[0].is_ready is None:
        return None, holding
    live = tuple(Segment(row.id, SegmentKind(row.kind), row.n_rows) for row in rows if row.id is not None)
    has_lost = any(row.is_lost and row.id is not None for row in rows)
    return ServingIndex(rows[0].is_ready and not has_lost, live, has_lost), holding


def create(conn: sa.Connection, collection_id: int, space: Space, kind: SegmentKind, builder: BuilderKind) -> Segment:
    """Register a segment that is going to be built, and create its table."""
    call = "SELECT create_segment(:collection, :space, :kind, :builder)"
    parameters = {"collection": collection_id, "space": space.id, "kind": kind, "builder": builder}
    return Segment(conn.execute(sa.text(call), parameters).scalar_one(), kind, 0)


def publish(
    conn: sa.Connection, segment: Segment, rows: int, *, replaces: Sequence[Segment] = (), useless: Sequence[int] = ()
) -> None:
    """Let searches read a segment in place of those that it ``replaces``.

    After a flush, what it holds leaves the tail, and so do the ``useless`` rows of the tail (their ids).
    """
    call = """
        SELECT publish_segment(:id, :rows, CAST(:replaces AS bigint[]), CAST(:useless AS bigint[]))
    """
    parameters = {
        "id": segment.id,
        "rows": rows,
        "replaces": [old.id for old in replaces],
        "useless": list(useless),
    }
    conn.execute(sa.text(call), parameters)


def are_of_spaces(conn: sa.Connection) -> bool:
    """Whether the segments of one space can be dropped without those of another one that are being built.

    False on the schema of an earlier release, on which a collection has one builder of a kind at a time.
    """
    query = """
        SELECT to_regproc(quote_ident(current_schema()) || '.drop_unread_segments_of_space') IS NOT NULL
    """
    return bool(conn.execute(sa.text(query)).scalar_one())


def drop_unread(conn: sa.Connection, collection_id: int, builder: BuilderKind, *, space_id: int | None = None) -> int:
    """Drop segments that a dead builder of this kind left half built, and those that were retired long enough ago.

    With ``space_id`` that is what belongs to this space. Only the holder of that builder's lock may call it, of the
    lock of the collection or of that of the space. Returns how many segments were dropped.
    """
    call = "SELECT drop_unread_segments(:collection, :builder, :grace)"
    if space_id is not None:
        call = "SELECT drop_unread_segments_of_space(:collection, :space, :builder, :grace)"
    parameters = {"collection": collection_id, "space": space_id, "builder": builder, "grace": float(GRACE_S)}
    if space_id is None:
        del parameters["space"]
    dropped: int = conn.execute(sa.text(call), parameters).scalar_one()
    return dropped


def forget(conn: sa.Connection, collection_id: int, space_id: int) -> None:
    """Stop all searches from using the index of a collection. Its segments are dropped later."""
    call = "SELECT forget_serving_index(:collection, :space)"
    conn.execute(sa.text(call), {"collection": collection_id, "space": space_id})


def shared_graphs(conn: sa.Connection, vectors: str = "%") -> list[tuple[str, bool]]:
    """The graphs of whole spaces that an earlier release built on vector tables of this name, and whether the role of
    ``conn`` owns them. An index that an operator made has another name."""
    query = """
        SELECT c.relname, pg_has_role(t.relowner, 'USAGE') AS may
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indexrelid
        JOIN pg_class t ON t.oid = i.indrelid
        WHERE t.relnamespace = current_schema()::regnamespace
          AND t.relname LIKE :vectors
          AND c.relname ~ '^ix_vectors_[0-9]+_hnsw_(vector|halfvec)$'
        ORDER BY c.relname
    """
    return [(row.relname, row.may) for row in conn.execute(sa.text(query), {"vectors": vectors})]


def describe(conn: sa.Connection, collection_id: int, space_id: int) -> Index:
    """The serving index of a collection in numbers. Without one, all of them are 0."""
    query = """
        SELECT coalesce((
                   SELECT is_ready FROM serving_indexes WHERE collection_id = :collection AND space_id = :space
               ), false) AS is_ready,
               count(*) AS segments,
               coalesce(sum(n_rows), 0)::bigint AS rows,
               coalesce(sum(n_rows) FILTER (WHERE kind <> :flat), 0)::bigint AS graph_rows,
               (
                   SELECT count(*) FROM serving_tail WHERE collection_id = :collection AND space_id = :space
               ) AS tail,
               coalesce(sum(pg_total_relation_size(to_regclass('segment_' || id))), 0)::bigint AS bytes
        FROM segments
        WHERE collection_id = :collection AND space_id = :space AND state = :live
    """
    parameters = {
        "collection": collection_id,
        "space": space_id,
        "live": SegmentState.LIVE,
        "flat": SegmentKind.FLAT,
    }
    row = conn.execute(sa.text(query), parameters).one()
    return Index(row.is_ready, row.segments, row.rows, row.graph_rows, row.tail, row.bytes)
