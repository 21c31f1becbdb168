"""Spaces in the database, each with its own vector table."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields

import sqlalchemy as sa

from chunkmill.db.locks import REGISTER_LOCK, SPACES_LOCK, lock, lock_shared
from chunkmill.domain.spaces import LongText, Precision, SpaceSpec, pooling_of
from chunkmill.errors import NewerSpace, NotFound, SpaceMismatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VectorTable:
    """Where the vectors of a registered space are. It is known for a space of a newer release too."""

    id: int

    @property
    def table_name(self) -> str:
        return f"vectors_{self.id}"


@dataclass(frozen=True, slots=True)
class Space(VectorTable):
    """A registered space. ``storage`` is the column type of its vectors: ``vector`` or ``halfvec``."""

    spec: SpaceSpec
    storage: str

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
        # A statement of its own, because CREATE TABLE takes STORAGE only since Postgres 16.
        storage = _storage_strategy(spec.dimensions, space.storage)
        conn.execute(sa.text(f"ALTER TABLE {space.table_name} ALTER COLUMN embedding SET STORAGE {storage}"))
    else:
        # A role that may not create tables calls this function of the tables' owner: deploy/postgres-role.sql.
        conn.execute(sa.text("SELECT create_vector_table(:space)"), {"space": space.id})
    return space


def register_and_hold(conn: sa.Connection, spec: SpaceSpec, *, storage: str) -> Space:
    """:func:`register`, and keep everyone from dropping the space until the end of this transaction.

    Until then the caller writes what refers to it.
    """
    while (space := find_and_hold(conn, spec.fingerprint)) is None:
        register(conn, spec, storage=storage)
    return space


def find_and_hold(conn: sa.Connection, fingerprint: str) -> Space | None:
    """:func:`find`, and keep everyone from dropping the space until the end of this transaction."""
    query = "SELECT id, fingerprint, spec, storage FROM spaces WHERE fingerprint = :fingerprint FOR KEY SHARE"
    row = conn.execute(sa.text(query), {"fingerprint": fingerprint}).one_or_none()
    return _space(row) if row else None


def find(conn: sa.Connection, fingerprint: str) -> Space | None:
    """The space of this fingerprint, or None."""
    query = "SELECT id, fingerprint, spec, storage FROM spaces WHERE fingerprint = :fingerprint"
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
    """The space with this id, which must exist. Raises :class:`NewerSpace` if only a newer release can read it."""
    query = "SELECT id, fingerprint, spec, storage FROM spaces WHERE id = :id"
    return _space(conn.execute(sa.text(query), {"id": space_id}).one())


def get_if_readable(conn: sa.Connection, space_id: int) -> Space | None:
    """The space with this id, which must exist. None if only a newer release can read it; the log says so once."""
    try:
        return get(conn, space_id)
    except NewerSpace as newer:
        _say(space_id, newer)
        return None


def from_row(row: sa.Row[tuple[object, ...]]) -> Space:
    """The space of a row with the columns ``id``, ``fingerprint``, ``spec`` and ``storage``. Raises
    :class:`NewerSpace`."""
    return _space(row)


def from_row_if_readable(row: sa.Row[tuple[object, ...]]) -> Space | None:
    """The same, but None if only a newer release can read the space; the log says so once."""
    try:
        return _space(row)
    except NewerSpace as newer:
        _say(row.id, newer)
        return None


def all_tables(conn: sa.Connection) -> list[VectorTable]:
    """The tables of all spaces, by id, whichever release registered them. What is deleted goes from all of them.

    None of them is dropped until the end of this transaction.
    """
    lock_shared(conn, SPACES_LOCK)
    return [VectorTable(row.id) for row in conn.execute(sa.text("SELECT id FROM spaces ORDER BY id"))]


def all_spaces(conn: sa.Connection) -> list[Space]:
    """All spaces that this release can read, by id. The log names the others, once per process."""
    spaces = []
    for row in conn.execute(sa.text("SELECT id, fingerprint, spec, storage FROM spaces ORDER BY id")):
        try:
            spaces.append(_space(row))
        except NewerSpace as newer:
            _say(row.id, newer)
    return spaces


def _say(space_id: int, newer: NewerSpace) -> None:
    if space_id not in _said:
        logger.warning("%s", newer)
    _said.add(space_id)


_said: set[int] = set()
_FIELDS = {field.name for field in fields(SpaceSpec)}


def _space(row: sa.Row[tuple[object, ...]]) -> Space:
    """The space of a row. Fields that a newer release has added are left out if the fingerprint is the same without."""
    try:
        known = {name: value for name, value in dict(row.spec).items() if name in _FIELDS}
        known["pooling"] = pooling_of(known["pooling"])
        known["long_text"] = LongText(known["long_text"])
        known["precision"] = Precision(known["precision"])
        spec = SpaceSpec(**known)
    except (ValueError, KeyError, TypeError) as error:
        raise _newer(row, f"{type(error).__name__}: {error}") from None
    if len(known) < len(row.spec) and spec.fingerprint != row.fingerprint:
        raise _newer(row, f"fields {sorted(set(row.spec) - _FIELDS)} change its vectors")
    return Space(row.id, spec, row.storage)


def _newer(row: sa.Row[tuple[object, ...]], problem: str) -> NewerSpace:
    return NewerSpace(
        f"space {row.id} (fingerprint {row.fingerprint[:12]}) was registered by a newer release and cannot be read by "
        f"this one ({problem}). Its work is left to that release's processes. Upgrade this process to use the space."
    )


def _create_vector_table(space: Space) -> str:
    return f"""
        CREATE TABLE {space.table_name} (
            content_hash bytea PRIMARY KEY,
            n_tokens integer NOT NULL,
            truncated boolean NOT NULL,
            embedding {space.vector_type} NOT NULL
        )
    """


def _storage_strategy(dimensions: int, storage: str) -> str:
    """``PLAIN``, which keeps a vector in its row, if at least two rows fit a page of 8 kB; ``EXTERNAL`` otherwise.

    Postgres' default would split a row of more than 2 kB into TOAST chunks: three or four heap tuples and as many
    index entries for a vector of 768 dimensions. A larger inline vector would waste the rest of its page.
    """
    row_bytes = dimensions * (2 if storage == "halfvec" else 4) + 90
    return "PLAIN" if row_bytes <= 4000 else "EXTERNAL"
