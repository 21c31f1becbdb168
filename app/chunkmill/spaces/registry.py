"""Spaces in the database, each with its own vector table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from chunkmill.db.locks import REGISTER_LOCK, lock
from chunkmill.domain.spaces import LongText, Pooling, Precision, SpaceSpec
from chunkmill.errors import NotFound, SpaceMismatch


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
    def vector_type(self) -> str:
        """The type of ``embedding`` in Postgres, such as ``vector(384)``."""
        return f"{self.storage}({self.spec.dimensions})"

    @property
    def is_half(self) -> bool:
        """Whether its vectors are stored in half precision."""
        return self.storage == "halfvec"

    def require_fingerprint(self, fingerprint: str) -> None:
        """Raise :class:`SpaceMismatch` unless vectors of ``fingerprint`` belong here."""
        if fingerprint != self.spec.fingerprint:
            raise SpaceMismatch(
                f"a vector of space {fingerprint[:12]} cannot enter space {self.spec.fingerprint[:12]} "
                f"({self.spec.model!r}): the model's files, pooling, prompts or limits differ. Give this worker "
                "the model the space was made with, or enqueue into a new collection."
            )


def register(conn: sa.Connection, spec: SpaceSpec, *, storage: str = "vector") -> Space:
    """Return the space of ``spec``. If it is new, create it, with a table for vectors of type ``storage``."""
    registered = find(conn, spec.fingerprint)
    if registered:
        return registered
    # Two producers may register a new model at once, and CREATE TABLE IF NOT EXISTS alone can still collide.
    lock(conn, REGISTER_LOCK)
    registered = find(conn, spec.fingerprint)
    if registered:
        return registered
    insert = """
        INSERT INTO spaces (fingerprint, model, dimensions, spec, storage)
        VALUES (:fingerprint, :model, :dimensions, CAST(:spec AS jsonb), :storage)
        RETURNING id
    """
    parameters = {
        "fingerprint": spec.fingerprint,
        "model": spec.model,
        "dimensions": spec.dimensions,
        "spec": json.dumps(asdict(spec)),
        "storage": storage,
    }
    space = Space(conn.execute(sa.text(insert), parameters).scalar_one(), spec, storage)
    if conn.execute(sa.text("SELECT has_schema_privilege(current_schema(), 'CREATE')")).scalar_one():
        conn.execute(sa.text(_create_vector_table(space)))
    else:
        # A role that may not create tables calls this function of the tables' owner: deploy/postgres-role.sql.
        conn.execute(sa.text("SELECT create_vector_table(:space)"), {"space": space.id})
    return space


def find(conn: sa.Connection, fingerprint: str) -> Space | None:
    """The space of this fingerprint, or None."""
    query = "SELECT id, spec, storage FROM spaces WHERE fingerprint = :fingerprint"
    row = conn.execute(sa.text(query), {"fingerprint": fingerprint}).one_or_none()
    return _space(row) if row else None


def find_by_prefix(conn: sa.Connection, prefix: str) -> Space:
    """The space whose fingerprint begins with ``prefix``. Raises :class:`NotFound` if there is none or several."""
    spaces = [space for space in all_spaces(conn) if prefix and space.spec.fingerprint.startswith(prefix)]
    if len(spaces) != 1:
        problem = "several spaces have" if spaces else "no space has"
        raise NotFound(f"{problem} a fingerprint that begins with {prefix!r}; `chunkmill models` lists the spaces.")
    return spaces[0]


def get(conn: sa.Connection, space_id: int) -> Space:
    """The space with this id, which must exist."""
    query = "SELECT id, spec, storage FROM spaces WHERE id = :id"
    return _space(conn.execute(sa.text(query), {"id": space_id}).one())


def all_spaces(conn: sa.Connection) -> list[Space]:
    """All spaces, by id."""
    return [_space(row) for row in conn.execute(sa.text("SELECT id, spec, storage FROM spaces ORDER BY id"))]


def _space(row: sa.Row[tuple[object, ...]]) -> Space:
    fields = dict(row.spec)
    fields["pooling"] = Pooling(fields["pooling"])
    fields["long_text"] = LongText(fields["long_text"])
    fields["precision"] = Precision(fields["precision"])
    return Space(row.id, SpaceSpec(**fields), row.storage)


def _create_vector_table(space: Space) -> str:
    return f"""
        CREATE TABLE {space.table_name} (
            content_hash bytea PRIMARY KEY,
            n_tokens integer NOT NULL,
            truncated boolean NOT NULL,
            embedding {space.vector_type} STORAGE {_storage_strategy(space.spec.dimensions, space.storage)} NOT NULL
        )
    """


def _storage_strategy(dimensions: int, storage: str) -> str:
    """``PLAIN``, which keeps a vector in its row, if at least two rows fit a page of 8 kB; ``EXTERNAL`` otherwise.

    Postgres' default would split a row of more than 2 kB into TOAST chunks: three or four heap tuples and as many
    index entries for a vector of 768 dimensions. A larger inline vector would waste the rest of its page.
    """
    row_bytes = dimensions * (2 if storage == "halfvec" else 4) + 90
    return "PLAIN" if row_bytes <= 4000 else "EXTERNAL"
