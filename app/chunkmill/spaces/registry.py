"""Spaces in the database, each with its own vector table."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa
from pgvector.sqlalchemy import HALFVEC, VECTOR

from chunkmill.db.schema import SpaceRow
from chunkmill.domain.spaces import LongText, Pooling, Precision, SpaceSpec
from chunkmill.errors import SpaceMismatch

REGISTER_LOCK = 0x63686D01  # an advisory lock key of our own: "chm" and a number
DELETE_LOCK = 0x63686D03
"""Shared by everyone who adds references to contents or vectors of them, exclusive for ``chunkmill.store.delete``."""


@dataclass(frozen=True, slots=True)
class Space:
    """A registered space. ``storage`` is the column type of its vectors: ``vector`` or ``halfvec``."""

    id: int
    spec: SpaceSpec
    storage: str

    @property
    def table_name(self) -> str:
        return f"vectors_{self.id}"

    @property
    def table(self) -> sa.TableClause:
        """``content_hash bytea, n_tokens int, truncated bool, embedding vector|halfvec(d)``."""
        return sa.table(
            self.table_name,
            sa.column("content_hash", sa.LargeBinary),
            sa.column("n_tokens", sa.Integer),
            sa.column("truncated", sa.Boolean),
            sa.column("embedding", self.vector_type),
        )

    @property
    def vector_type(self) -> HALFVEC | VECTOR:
        return HALFVEC(self.spec.dimensions) if self.storage == "halfvec" else VECTOR(self.spec.dimensions)

    def require_fingerprint(self, fingerprint: str) -> None:
        """Raise :class:`SpaceMismatch` unless vectors of ``fingerprint`` belong here."""
        if fingerprint != self.spec.fingerprint:
            raise SpaceMismatch(
                f"a vector of space {fingerprint[:12]} cannot enter space {self.spec.fingerprint[:12]} "
                f"({self.spec.model!r}): the model's files, pooling, prompts or limits differ. Give this worker "
                "the model the space was made with, or enqueue into a new collection."
            )


def register(conn: sa.Connection, spec: SpaceSpec, *, storage: str = "vector") -> Space:
    """The space of ``spec``, made with its vector table if it is new. ``storage`` holds for a new one."""
    found = find(conn, spec.fingerprint)
    if found:
        return found
    # Two producers may meet a new model at once; CREATE TABLE IF NOT EXISTS alone can still collide.
    conn.execute(sa.select(sa.func.pg_advisory_xact_lock(REGISTER_LOCK)))
    found = find(conn, spec.fingerprint)
    if found:
        return found
    space_id = conn.execute(
        sa.insert(SpaceRow)
        .values(
            fingerprint=spec.fingerprint,
            model=spec.model,
            dimensions=spec.dimensions,
            spec=asdict(spec),
            storage=storage,
        )
        .returning(SpaceRow.id)
    ).scalar_one()
    space = Space(space_id, spec, storage)
    if conn.execute(sa.text("SELECT has_schema_privilege(current_schema(), 'CREATE')")).scalar_one():
        conn.execute(sa.text(_create_vector_table(space)))
    else:
        # A role that may create nothing has this function, of the tables' owner: deploy/postgres-role.sql.
        conn.execute(sa.text("SELECT create_vector_table(:space)"), {"space": space.id})
    return space


def find(conn: sa.Connection, fingerprint: str) -> Space | None:
    row = conn.execute(sa.select(SpaceRow.__table__).where(SpaceRow.fingerprint == fingerprint)).one_or_none()
    return _space(row) if row else None


def get(conn: sa.Connection, space_id: int) -> Space:
    return _space(conn.execute(sa.select(SpaceRow.__table__).where(SpaceRow.id == space_id)).one())


def all_spaces(conn: sa.Connection) -> list[Space]:
    return [_space(row) for row in conn.execute(sa.select(SpaceRow.__table__).order_by(SpaceRow.id))]


def _space(row: sa.Row[tuple[object, ...]]) -> Space:
    fields = dict(row.spec)
    fields["pooling"] = Pooling(fields["pooling"])
    fields["long_text"] = LongText(fields["long_text"])
    fields["precision"] = Precision(fields["precision"])
    return Space(row.id, SpaceSpec(**fields), row.storage)


def _create_vector_table(space: Space) -> str:
    column = f"{space.storage}({space.spec.dimensions})"
    return (
        f"CREATE TABLE {space.table_name} (content_hash bytea PRIMARY KEY, n_tokens integer NOT NULL, "
        f"truncated boolean NOT NULL, "
        f"embedding {column} STORAGE {_storage_strategy(space.spec.dimensions, space.storage)} NOT NULL)"
    )


def _storage_strategy(dimensions: int, storage: str) -> str:
    """Keep a vector in its row while at least two rows fit a page of 8 kB, else move it out of line.

    Postgres' default would cut a row of over 2 kB into TOAST chunks: three or four heap tuples and as many
    index entries for a 768-d vector. Past half a page an inline vector would waste what is left of the page.
    """
    row_bytes = dimensions * (2 if storage == "halfvec" else 4) + 90
    return "PLAIN" if row_bytes <= 4000 else "EXTERNAL"
